"""The whole protocol on DreamBench's format: three subjects trained and scored, cut off, continued, and put into one table."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import ROOT, make_dreambench, run
from tiny_encoders import build_tiny_dinov2, build_tiny_encoders

import evaluate as script
from dreambooth import evaluation
from dreambooth.config import EvaluateConfig, EvaluateData
from dreambooth.errors import ConfigError, UserError
from dreambooth.final_scores import evaluate_run, read_photos
from dreambooth.generation import read_recipe
from dreambooth.rescoring import find_runs
from dreambooth.runs import RunFolder, read_run

SUBJECTS = {"puppy": "dog", "mug": "mug", "plush_bear": "stuffed animal"}
WORDS = (
    "prior=none",
    "trainer.max_steps=1",
    "trainer.eval_every=1",
    "sampling.batch_size=4",
    "evaluation.final_images=1",
    "optim.learning_rate=1e-3",
)


@pytest.fixture(scope="module")
def group(tiny_folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A group folder with a finished run for each of three subjects, on a tiny model, scored by tiny CLIP and DINO."""
    root = tmp_path_factory.mktemp("protocol")
    bench, encoders = make_dreambench(root / "bench", SUBJECTS), build_tiny_encoders(root / "encoders")
    for name in SUBJECTS:
        run(
            *WORDS,
            "optim.learning_rate=1e-3",
            *encoders,
            f"base.path={tiny_folder()}",
            f"data.dreambench={bench}",
            f"subject.name={name}",
            f"output_dir={root / 'runs'}",
        )
    return root / "runs" / "default"


@pytest.fixture
def copy(group: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(group, tmp_path / "group", ignore=shutil.ignore_patterns("last.ckpt", "combined*")))


def one(group: Path, subject: str = "mug") -> RunFolder:
    runs = (read_run(path.parent) for path in sorted(group.glob("*/run.json")))
    return next(run for run in runs if run.record["config"]["subject"]["name"] == subject)


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob(pattern))}


def again(group: Path, **settings: object) -> dict:
    return script.evaluate(EvaluateConfig(runs=str(group), accelerator="cpu", **settings))


# --- one run ----------------------------------------------------------------------------------------------------------------------------


def test_reference_rows_are_always_there(group: Path) -> None:
    scores = json.loads((one(group).path / "scores.json").read_text())
    assert [row["arm"] for row in scores["rows"]] == ["base", "best", "final"] and scores["rows"][0]["step"] == 0
    assert set(scores["references"]) == {"real_photos", "real_photos_with_self_pairs", "copy_baseline"}
    assert {"identity_fidelity", "prompt_alignment", "image_fidelity"} <= scores["references"]["copy_baseline"].keys()


def test_oracle_leaves_self_pairs_out_and_the_other_row_counts_them(group: Path) -> None:
    run = one(group)
    features = run.config.encoders.load().identity(read_photos(run)).double().numpy()
    cosines = features @ features.T
    references = json.loads((run.path / "scores.json").read_text())["references"]
    assert references["real_photos"]["identity_fidelity"] == pytest.approx(cosines[~np.eye(4, dtype=bool)].mean(), abs=1e-6)
    assert references["real_photos_with_self_pairs"]["identity_fidelity"] == pytest.approx(cosines.mean(), abs=1e-6)


def test_copy_baseline_is_the_score_of_the_photos_drawn_for_every_prompt(group: Path) -> None:
    run = one(group)
    encoders, photos = run.config.encoders.load(), read_photos(run)
    images = encoders.image(photos).double().numpy()
    texts = encoders.text(["a mug in the snow", "a mug with a city in the background", "a red mug"]).double().numpy()
    copied = json.loads((run.path / "scores.json").read_text())["references"]["copy_baseline"]
    assert copied["prompt_alignment"] == pytest.approx(np.mean([image @ text for image in images for text in texts]), abs=1e-6)


def test_table_of_images_says_what_each_row_is(group: Path) -> None:
    table = pd.read_parquet(one(group, "puppy").path / "scores.parquet")
    about = ["run", "group", "subject", "seed", "arm", "step", "kind", "prompt_kind", "template", "prompt", "k"]
    assert list(table.columns[: len(about)]) == about
    assert table.subject.unique().tolist() == ["puppy"] and table.group.unique().tolist() == ["default"]
    own = table[(table.arm == "best") & (table.kind == "subject")]
    assert own.prompt_kind.tolist() == ["recontextualisation", "accessory", "property"]
    assert set(table[table.kind != "subject"].prompt_kind) == {""} and set(table.kind) == {"subject", "class", "other"}


def test_every_arm_is_drawn_with_the_same_noise(group: Path) -> None:
    folder = one(group).path / "samples" / "final"
    base, best = ({path.name: read_recipe(path) for path in (folder / arm).iterdir()} for arm in ("base", "best"))
    assert base.keys() == best.keys() and len(base) > 0
    assert all((base[name]["key"], base[name]["prompt"]) == (best[name]["key"], best[name]["prompt"]) for name in base)
    assert all(base[name]["model"] != best[name]["model"] for name in base)


def test_base_is_scored_whatever_arms_are_asked_for(copy: Path) -> None:
    run = one(copy)
    scores = script.evaluate(EvaluateConfig(run=str(run.path), arms=["best"], images=2, accelerator="cpu"))
    assert [row["arm"] for row in scores["rows"]] == ["base", "best"]


def test_scoring_again_draws_nothing_and_gives_the_same_files(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = one(copy)
    before = files(run.path, "scores*")

    def draw(*args: object) -> None:
        raise AssertionError("an image that was there has been drawn again")

    monkeypatch.setattr(evaluation, "draw", draw)
    script.evaluate(EvaluateConfig(run=str(run.path), accelerator="cpu"))
    assert files(run.path, "scores*") == before


@pytest.mark.parametrize("batches", [0, 1, 2, 4])
def test_evaluation_cut_at_any_batch_and_continued_gives_the_same_bytes(
    group: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    run = one(copy)
    shutil.rmtree(run.path / "samples")
    for path in run.path.glob("scores*"):
        path.unlink()
    real, drawn = evaluation.draw, []

    def cut(*args: object) -> np.ndarray:
        if len(drawn) == batches:
            raise KeyboardInterrupt
        drawn.append(args)
        return real(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(evaluation, "draw", cut)
        evaluate_run(run, run.config)
    assert not list(run.path.glob("scores*"))
    evaluate_run(run, run.config)
    assert files(run.path, "scores*") == files(one(group).path, "scores*")
    assert files(run.path / "samples" / "final", "*.png") == files(one(group).path / "samples" / "final", "*.png")


def test_weights_that_changed_are_drawn_anew(copy: Path) -> None:
    run = one(copy)
    folder, weights = run.path / "samples" / "final", run.path / "checkpoints" / "best.safetensors"
    before = {arm: files(folder / arm, "*.png") for arm in ("base", "best")}
    tensors, metadata = load_file(weights), _metadata(weights)
    save_file({name: tensor + 0.05 * torch.ones_like(tensor) for name, tensor in tensors.items()}, weights, metadata)
    evaluate_run(run, run.config)
    assert files(folder / "base", "*.png") == before["base"]
    pixels = {name: np.asarray(Image.open(folder / "best" / name)) for name in before["best"]}
    fresh = Path(shutil.copytree(run.path, run.path.parent / "fresh")) / "samples" / "final" / "best"
    shutil.rmtree(fresh)
    evaluate_run(RunFolder(fresh.parents[2], run.record), run.config)
    assert all(np.array_equal(pixels[name], np.asarray(Image.open(fresh / name))) for name in pixels)


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        return opened.metadata()


# --- many runs --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def combined(group: Path) -> dict:
    return again(group)


def test_table_of_many_holds_every_image_of_every_run(group: Path, combined: dict) -> None:
    table = pd.read_parquet(group / "combined" / "scores.parquet")
    parts = [pd.read_parquet(one(group, name).path / "scores.parquet") for name in SUBJECTS]
    assert len(table) == sum(map(len, parts)) and set(table.subject) == set(SUBJECTS)
    assert list(table.columns[:6]) == ["run", "group", "subject", "seed", "setting", "arm"]


def test_row_of_many_is_the_mean_over_subjects_of_their_own_scores(group: Path, combined: dict) -> None:
    own = [json.loads((one(group, name).path / "scores.json").read_text()) for name in SUBJECTS]
    for arm, row in zip(("base", "best", "final"), combined["rows"], strict=True):
        for key in ("identity_fidelity", "prompt_alignment", "drift", "class_diversity", "other_class_drift"):
            expected = np.mean([next(r for r in scores["rows"] if r["arm"] == arm)[key] for scores in own])
            assert row[key] == pytest.approx(expected, abs=1e-6), (arm, key)
    assert combined["rows"][1]["identity_fidelity_interval"]["n"] == 3
    assert combined["rows"][1]["identity_fidelity_interval"]["unit"] == "subject"
    oracle = np.mean([scores["references"]["real_photos"]["identity_fidelity"] for scores in own])
    assert combined["references"]["real_photos"]["identity_fidelity"] == pytest.approx(oracle, abs=1e-6)


def test_last_step_has_a_row_of_all_subjects_where_it_is_the_chosen_one(combined: dict) -> None:
    last = combined["rows"][2]
    assert last["arm"] == "last step" and last["subjects"] == len(SUBJECTS)
    assert last["identity_fidelity"] == combined["rows"][1]["identity_fidelity"]


def test_scores_are_split_by_kind_of_prompt(group: Path, combined: dict) -> None:
    table = pd.read_parquet(group / "combined" / "scores.parquet")
    found = {(row["arm"], row["prompt_kind"]): row for row in combined["by_prompt_kind"]}
    assert {kind for _, kind in found} == {"recontextualisation", "property", "accessory"}
    worn = table[(table.arm == "best") & (table.subject == "puppy") & table.template.str.contains("wearing")]
    assert found["best step", "accessory"]["identity_fidelity"] == pytest.approx(worn.identity.mean(), abs=1e-6)
    assert found["best step", "accessory"]["identity_fidelity_interval"]["low"] is None  # one live subject gives no interval


def test_table_says_what_its_intervals_rest_on_before_any_number(group: Path, combined: dict) -> None:
    text = (group / "combined" / "table.md").read_text()
    assert text.index("3 subjects x 1 training seed") < text.index("| ---")
    for words in ("real photos (i != j)", "real photos, self-pairs counted", "copies of the photos", "un-tuned base", "best step"):
        assert words in text


def test_live_subjects_get_live_prompts(group: Path, combined: dict) -> None:
    table = pd.read_parquet(group / "combined" / "scores.parquet")
    worn = table[table.template.str.contains("wearing")]
    assert set(worn.subject) == {"puppy"} and "a {subject} with a city in the background" not in set(table[table.subject == "puppy"].template)


def test_unfinished_and_failed_runs_are_named_and_left_out(copy: Path) -> None:
    for name, status in (("mug", "failed"), ("puppy", "running")):
        run = one(copy, name)
        run.update(status=status, error="no room" if status == "failed" else None)
    found, left_out = find_runs(str(copy))
    assert [run.config.subject.name for run in found] == ["plush_bear"]
    assert len(left_out) == 2 and any(line.endswith("is 'failed': no room") for line in left_out)
    result = again(copy, arms=["best"])
    assert result["left_out"] == left_out
    assert result["rows"][0]["identity_fidelity_interval"] == {"low": None, "high": None, "n": 1, "unit": "subject"}
    assert "no intervals: 1 subject" in result["sentence"].lower()


def test_folder_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^runs must hold a finished run"):
        find_runs(str(tmp_path))
    with pytest.raises(UserError, match="must be a run folder"):
        find_runs([str(tmp_path / "nothing")])


def test_evaluation_of_many_that_is_killed_and_continued_gives_the_same_table(group: Path, copy: Path) -> None:
    """Kill -9 in the middle of the drawing; what is already drawn is kept."""
    words = [f"runs={copy}", "images=3", "sampling.batch_size=2", "accelerator=cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as this process: how many threads add up a sum changes its last bits
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "evaluate.py", *words], cwd=ROOT, env=environment, **quiet)
    deadline = time.monotonic() + 240
    while len(pictures := list(copy.glob("*/samples/final-*/*/*.png"))) < 24 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in pictures if path.is_file()}
    assert 24 <= len(kept) < 3 * 2 * (3 * 3 + 2 + 6) and not list(copy.glob("combined*"))
    settings = EvaluateConfig(runs=str(copy), images=3, accelerator="cpu")
    settings.sampling.batch_size = 2
    script.evaluate(settings)
    assert sum(path.stat().st_mtime_ns == time_ns for path, time_ns in kept.items()) >= len(kept) - 2  # at most the last batch is drawn anew
    whole = EvaluateConfig(runs=str(group), images=3, accelerator="cpu")
    whole.sampling.batch_size = 2
    script.evaluate(whole)
    (ours,), (theirs,) = copy.glob("combined-*"), group.glob("combined-*")
    assert (ours / "scores.parquet").read_bytes() == (theirs / "scores.parquet").read_bytes()
    assert (ours / "table.md").read_text() == (theirs / "table.md").read_text()


@pytest.fixture(scope="module")
def with_dinov2(group: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the group whose runs are scored again, with DINOv2 beside their own encoders."""
    root = tmp_path_factory.mktemp("dinov2")
    runs = Path(shutil.copytree(group, root / "group", ignore=shutil.ignore_patterns("last.ckpt", "combined*", "scores-*")))
    again(runs, encoders=replace(one(runs).config.encoders, dinov2_path=str(build_tiny_dinov2(root / "network"))))
    return runs


def test_dinov2_adds_a_score_and_changes_no_other(group: Path, with_dinov2: Path) -> None:
    own, (added,) = json.loads((one(group).path / "scores.json").read_text()), one(with_dinov2).path.glob("scores-*.json")
    for theirs, ours in zip(own["rows"], json.loads(added.read_text())["rows"], strict=True):
        new = {key: ours.pop(key) for key in ("identity_fidelity_dinov2", "identity_fidelity_dinov2_interval")}
        assert ours == theirs and -1 < new["identity_fidelity_dinov2"] < 1 and new["identity_fidelity_dinov2_interval"]["unit"] == "prompt"


def test_dinov2_has_its_reference_rows_and_differences(group: Path, with_dinov2: Path) -> None:
    own, (added,) = json.loads((one(group).path / "scores.json").read_text()), one(with_dinov2).path.glob("scores-*.json")
    scores = json.loads(added.read_text())
    for part in ("references", "differences"):
        for name, row in scores[part].items():
            assert set(row) - set(own[part][name]) == {"identity_fidelity_dinov2"}, name


def test_dinov2_has_a_column_of_the_subjects_images_behind_those_of_before(group: Path, with_dinov2: Path) -> None:
    own, (added,) = pd.read_parquet(one(group).path / "scores.parquet"), one(with_dinov2).path.glob("scores-*.parquet")
    table = pd.read_parquet(added)
    assert set(table.columns) - set(own.columns) == {"identity_dinov2"}
    assert table.identity_dinov2.notna().equals(table.kind == "subject")


def test_dinov2_stands_in_the_table_of_many_runs(group: Path, with_dinov2: Path) -> None:
    (table,) = with_dinov2.glob("combined-*/table.md")
    header, line = "| Identity fidelity (up) | Identity fidelity by DINOv2 (up) |", "| un-tuned base |"
    text = table.read_text()
    assert header in text and "identity by DINOv2 = dinov2 patch 14" in text
    assert "-" not in [cell.strip() for cell in next(row for row in text.splitlines() if row.startswith(line)).split("|")[2:4]]


# --- other prompts ----------------------------------------------------------------------------------------------------------------------


def test_run_on_own_photos_finds_its_subject_of_dreambench_by_the_photos(copy: Path) -> None:
    run = one(copy)
    bench = run.config.data.dreambench
    record = json.loads((run.path / "run.json").read_text())
    record["config"]["subject"]["name"] = record["config"]["data"]["dreambench"] = None
    record["config"]["evaluation"]["final_prompts"] = ["a {subject} on a bus"]
    (run.path / "run.json").write_text(json.dumps(record))
    scores = script.evaluate(EvaluateConfig(run=str(run.path), data=EvaluateData(dreambench=bench), accelerator="cpu"))
    assert scores["evaluation"]["final_prompts"] == ["a {subject} in the snow", "a {subject} with a city in the background", "a red {subject}"]


def test_run_of_nobody_in_dreambench_is_refused(group: Path, copy: Path, tmp_path: Path) -> None:
    other = make_dreambench(tmp_path / "other", {"vase": "vase"})
    with pytest.raises(UserError, match="must be of a subject of .*, got 'mug'"):
        script.evaluate(EvaluateConfig(run=str(one(copy).path), data=EvaluateData(dreambench=str(other)), accelerator="cpu"))


def test_prompts_that_chose_the_step_are_refused_for_the_final_scores(copy: Path) -> None:
    with pytest.raises(ConfigError, match="^prompts must not hold a prompt of evaluation.selection_prompts"):
        script.evaluate(EvaluateConfig(run=str(one(copy).path), prompts=["a {subject} at night"], accelerator="cpu"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "^run must be set, or runs"),
        ({"run": "a", "runs": "b"}, "^run must be set, or runs for many, not both"),
        ({"runs": 3}, "^runs must be a folder or a list"),
        ({"run": "a", "output": "b"}, "^output is for runs"),
        ({"run": "a", "prompts": ["a {subject}"], "data": EvaluateData(dreambench="x")}, "^prompts must be null with data.dreambench"),
        ({"run": "a", "prompts": ["a {subject}", "a {subject}"]}, "^prompts must hold each prompt once"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        EvaluateConfig(**settings)
