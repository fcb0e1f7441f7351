"""A run that stops early ends like any other, and stays stopped when it is continued."""

from pathlib import Path

import pytest
from small_runs import make_photos, run

from dreambooth import callbacks
from dreambooth.metrics_csv import MetricsFile
from dreambooth.runs import RunFolder, read_run
from dreambooth.step_choice import EarlyStop

STOP_AT = 4


@pytest.fixture
def words(tiny_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run of eight steps whose rule says stop at step 4 (the rule itself has its own tests)."""
    monkeypatch.setattr(callbacks, "stop_early", lambda rows, *rule: EarlyStop(rows[-1].step >= STOP_AT, "no better step since 2"))
    return [
        f"base.path={tiny_folder()}",
        f"data.subject_dir={make_photos(tmp_path / 'dog')}",
        f"output_dir={tmp_path / 'runs'}",
        "trainer.max_steps=8",
        "trainer.eval_every=2",
        "trainer.early_stop_patience=1",
        "trainer.fixed_loss_every=1",
        "subject.class_noun=dog",
        "prior=none",
    ]


def trained_steps(folder: RunFolder) -> list[int]:
    return [int(row["step"]) for row in MetricsFile(folder.path / "metrics.csv").read() if row.get("train/loss")]


def test_run_stops_early_with_final_weights_and_scores(words: list[str]) -> None:
    done = run(*words)
    assert done.status == "done" and done.record["steps"] == STOP_AT
    assert trained_steps(done) == [1, 2, 3, 4]
    assert (done.path / "checkpoints" / "final.safetensors").is_file() and (done.path / "scores.json").is_file()


def test_run_killed_after_its_early_stop_trains_no_further(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dreambooth.final_scores.evaluate_run", killed)
        with pytest.raises(KeyboardInterrupt):
            run(*words)
    (folder,) = [path.parent for path in Path(words[2].partition("=")[2]).glob("*/*/run.json")]
    assert read_run(folder).status == "failed"
    done = run(*words)
    assert done.status == "done" and trained_steps(done) == [1, 2, 3, 4]
