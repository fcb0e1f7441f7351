"""A run that was killed and continued ends as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import LEAST, ROOT, SMALL, Cut, cut, make_photos, no_estimate, run, typed, weights

from dreambooth.metrics_csv import MetricsFile
from dreambooth.runs import RunFolder, read_run

STEPS = 7
HARD = (  # all that could remember something: accumulation, random crops, flips, buckets, a schedule, a moving average, evaluation in between
    f"trainer.max_steps={STEPS}",
    "trainer.eval_every=3",
    "trainer.checkpoint_every=2",
    "trainer.accumulate_grad_batches=2",
    "trainer.ema_decay=0.6",
    "data.crop=random",
    "data.flip=true",
    "data.buckets=true",
    "data.batch_size=2",
    "prior.batch_size=1",
    "optim.schedule=cosine",
    "optim.warmup_steps=2",
    "optim.learning_rate=1e-3",
    "subject.class_noun=dog",
    *LEAST,
)
FULL = ("method.train_text_encoder=true", "method.train_token=true")
METHODS = {
    "full": ("method.text_encoder_stop_step=2", *FULL),
    "lora": ("method.dropout=0.3", "method.text_encoder_stop_step=2", *FULL),
    "cross_attention_kv": (),
    "textual_inversion": ("method.num_vectors=2",),
    "pivotal_tuning": ("method.inversion_steps=2",),
}
SHORT = (
    "prior=self_distilled",
    "trainer.max_steps=4",
    "trainer.eval_every=2",
    "trainer.accumulate_grad_batches=1",
    "optim.token_learning_rate=1e-2",
)


def _words(base: Path, photos: Path, output: Path) -> list[str]:
    return [*HARD, *FULL, *_places(base, photos, output)]


def _places(base: Path, photos: Path, output: Path) -> list[str]:
    return [f"base.path={base}", f"data.subject_dir={photos}", f"output_dir={output}"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_photos(tmp_path_factory.mktemp("photos") / "dog")
    return make_photos(folder, count=2, size=(64, 96), seed=1)  # in place of the first two: there are two buckets


@pytest.fixture(scope="module")
def straight(tiny_folder, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run(*_words(tiny_folder(), photos, tmp_path_factory.mktemp("straight")))


def _assert_equal(continued: RunFolder, straight: RunFolder) -> None:
    ours, theirs = weights(continued), weights(straight)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert MetricsFile(continued.path / "metrics.csv").read() == MetricsFile(straight.path / "metrics.csv").read()


@pytest.mark.parametrize("cut_at", [1, 2, 3, 5, 7])
def test_run_cut_at_any_step_and_continued_equals_a_straight_one_bit_for_bit(straight, tiny_folder, photos, tmp_path, cut_at: int) -> None:
    words = _words(tiny_folder(), photos, tmp_path)
    with cut(cut_at):
        run(*words)
    failed = next((tmp_path / "default").iterdir())
    assert read_run(failed).status == "failed" and "Cut" in read_run(failed).record["error"]
    continued = run(*words)
    assert continued.path == failed and continued.status == "done" and continued.record["resumed"] == 1
    _assert_equal(continued, straight)


@pytest.mark.parametrize("method", METHODS)
def test_run_of_every_method_with_the_self_distilled_prior_continued_equals_a_straight_one_bit_for_bit(
    tiny_folder, photos, tmp_path, monkeypatch, method: str
) -> None:
    """The straight run is evaluated between its two halves; the continued one starts its second half from the state alone."""
    no_estimate(monkeypatch)
    words = [*HARD, f"method={method}", *METHODS[method], *SHORT]
    whole = run(*words, *_places(tiny_folder(), photos, tmp_path / "straight"))
    with cut(3):
        run(*words, *_places(tiny_folder(), photos, tmp_path / "cut"))
    continued = run(*words, *_places(tiny_folder(), photos, tmp_path / "cut"))
    assert continued.record["resumed"] == 1
    _assert_equal(continued, whole)


def test_run_cut_between_its_state_and_the_losses_of_that_step_equals_a_straight_one_bit_for_bit(straight, tiny_folder, photos, tmp_path) -> None:
    words = _words(tiny_folder(), photos, tmp_path)
    with cut(2, is_saved=True):
        run(*words)
    continued = run(*words)
    assert continued.record["resumed"] == 1
    _assert_equal(continued, straight)


def _has_state(folder: Path) -> bool:
    return any("training" in read_run(state.parents[1]).record["seconds"] for state in folder.glob("default/*/checkpoints/last.ckpt"))


def _signalled(words: list[str], folder: Path, number: signal.Signals) -> tuple[int, str]:
    """Starts train.py and sends it a signal when its first state is on disk, with the seconds that it took; returns the exit status and stderr."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests themselves run in the background, children would ignore it
    with subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 240
        while not _has_state(folder) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, number)
        _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


def test_ctrl_c_says_how_to_go_on(tiny_folder, photos, tmp_path) -> None:
    long = ["trainer.max_steps=500", "trainer.eval_every=500"]
    status, stderr = _signalled([*SMALL, *_words(tiny_folder(), photos, tmp_path), *long], tmp_path, signal.SIGINT)
    assert status == 130 and stderr.strip().endswith("stopped by Ctrl-C; the same command continues the run")
    stopped = read_run(next((tmp_path / "default").iterdir()))
    assert stopped.status == "failed" and stopped.record["error"] == "stopped by Ctrl-C"


def test_run_killed_with_kill_9_and_continued_equals_a_straight_one_bit_for_bit(straight, tiny_folder, photos, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as many as here: sums of other parts differ in the last bit
    words = [*SMALL, *_words(tiny_folder(), photos, tmp_path)]
    status, _ = _signalled(words, tmp_path, signal.SIGKILL)
    killed = read_run(next((tmp_path / "default").iterdir()))
    assert status == -signal.SIGKILL and killed.status == "running"
    done = typed(*words)
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stdout
    _assert_equal(read_run(killed.path), straight)
    assert read_run(killed.path).record["seconds"]["loading"] > killed.record["seconds"]["loading"] > 0  # those of both processes


def test_run_cut_in_its_final_scores_and_continued_equals_a_straight_one_bit_for_bit(straight, tiny_folder, photos, tmp_path, monkeypatch) -> None:
    words = _words(tiny_folder(), photos, tmp_path)

    def crash(*args, **kwargs) -> None:
        raise Cut

    with monkeypatch.context() as patched, pytest.raises(Cut):
        patched.setattr("dreambooth.final_scores.evaluate_run", crash)
        run(*words)
    continued = run(*words)
    assert continued.record["best_step"] == straight.record["best_step"]
    _assert_equal(continued, straight)


def test_evaluation_while_training_does_not_change_the_weights(straight, tiny_folder, photos, tmp_path) -> None:
    other = run(*_words(tiny_folder(), photos, tmp_path), "trainer.eval_every=1", "evaluation.class_images=5")
    ours, theirs = weights(other), weights(straight)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_data_workers_do_not_change_the_weights(straight, tiny_folder, photos, tmp_path) -> None:
    other = run(*_words(tiny_folder(), photos, tmp_path), "data.num_workers=2")
    assert other.path.name == straight.path.name
    assert all(torch.equal(tensor, weights(straight)[name]) for name, tensor in weights(other).items())
