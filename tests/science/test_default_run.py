"""The default run, as a user types it: the subject is learned on prompts that were not in training, and the class is kept."""

import json

import pytest
from small_runs import typed

pytestmark = pytest.mark.science


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("default")
    result = typed(f"output_dir={folder}", timeout_s=1500)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    return json.loads(next(folder.glob("default/*/scores.json")).read_text())


def _row(scores: dict, arm: str) -> dict:
    return next(row for row in scores["rows"] if row["arm"] == arm)


def test_identity_fidelity_is_clearly_above_the_untuned_base_on_prompts_that_were_not_in_training(scores: dict) -> None:
    difference = scores["differences"]["best - base"]["identity_fidelity"]
    assert difference["low"] > 0.3, difference


def test_identity_fidelity_comes_most_of_the_way_to_true_renders_of_the_subject(scores: dict) -> None:
    base, best = _row(scores, "base")["identity_fidelity"], _row(scores, "best")["identity_fidelity"]
    assert (best - base) / (scores["references"]["ground_truth"]["identity_fidelity"] - base) > 0.6


def test_prompt_alignment_is_kept(scores: dict) -> None:
    assert _row(scores, "best")["prompt_alignment"] > 0.9 * _row(scores, "base")["prompt_alignment"]


def test_class_does_not_drift_into_the_subject(scores: dict) -> None:
    assert _row(scores, "best")["drift"] < _row(scores, "base")["drift"] + 0.2
    assert _row(scores, "best")["class_diversity"] > 0.3


def test_final_prompts_were_in_no_caption_and_chose_nothing(scores: dict) -> None:
    settings = scores["evaluation"]
    assert not set(settings["final_prompts"]) & set(settings["selection_prompts"])
    assert all("{subject}" in prompt for prompt in settings["final_prompts"])
