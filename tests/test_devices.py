"""Several devices train one model: as one with a batch as many times as large, nothing made twice, nothing written twice, and they end together."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import ROOT, SMALL, cut, make_photos, run, typed, weights

from dreambooth import class_bank, evaluation, final_scores, ranks
from dreambooth.class_bank import draw_bank
from dreambooth.config import Config
from dreambooth.data import Batch, DreamBoothData, ImageSet, describe_batch
from dreambooth.errors import ConfigError, UserError
from dreambooth.evaluation import draw_together, selection_plan
from dreambooth.final_scores import draw_final_share
from dreambooth.finite_loss import StopAtNonFinite
from dreambooth.metrics_csv import MetricsFile
from dreambooth.module import LastBatch
from dreambooth.ranks import ALONE, Ranks
from dreambooth.runs import RunFolder, load, read_run
from dreambooth.subject_photos import SubjectPhotos

WORDS = (
    "method=pivotal_tuning",  # a part that stops and a part that begins while the ranks train
    "method.inversion_steps=2",
    "method.lora.rank=2",
    "trainer.max_steps=4",
    "trainer.eval_every=3",
    "trainer.checkpoint_every=2",
    "trainer.accumulate_grad_batches=2",
    "trainer.ema_decay=0.5",
    "data.crop=random",
    "data.flip=true",
    "optim.learning_rate=1e-2",
    "optim.text_encoder_learning_rate=1e-2",
    "optim.token_learning_rate=1e-2",
    "optim.eps=1e-2",  # Adam's first steps go by the sign of a gradient otherwise: a rounding would become a whole step
    "sampling.batch_size=2",
    "prior.num_images=5",
    "evaluation.selection_prompts=['a photo of a {subject}','a {subject} on the beach']",
    "evaluation.final_prompts=['a {subject} in the snow','a {subject} in a box']",
    "subject.class_noun=dog",
)
TWO, ONE = ("trainer.devices=2", "data.batch_size=1", "prior.batch_size=1"), ("data.batch_size=2", "prior.batch_size=2")


class Places(NamedTuple):
    """Where the runs of this file read and write."""

    base: Path
    photos: Path
    output: Path

    def words(self, name: str) -> list[str]:
        return [*WORDS, f"base.path={self.base}", f"data.subject_dir={self.photos}", f"output_dir={self.output / name}"]


@pytest.fixture(scope="module")
def places(tiny_folder, tmp_path_factory: pytest.TempPathFactory) -> Places:
    folder = tmp_path_factory.mktemp("devices")
    return Places(tiny_folder(), make_photos(folder / "photos"), folder)


@pytest.fixture(scope="module")
def on_two(places: Places) -> RunFolder:
    """A run of two devices, as a user types it, as a job of a sweep."""
    done = typed("-m", *SMALL, *places.words("two"), *TWO)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is the best") == 1  # the other rank says nothing
    found = [read_run(path.parent) for path in (places.output / "two" / "default").glob("*/run.json")]
    assert [own.status for own in found] == ["done"]
    return found[0]


@pytest.fixture(scope="module")
def on_one(places: Places) -> RunFolder:
    """The same of one device with the doubled batch."""
    return run(*places.words("one"), *ONE)


def test_devices_learn_what_one_learns_with_the_doubled_batch(on_two: RunFolder, on_one: RunFolder) -> None:
    ours, theirs = weights(on_two), weights(on_one)
    assert ours.keys() == theirs.keys() and max(float(tensor.abs().max()) for tensor in theirs.values()) > 1e-3
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-6, rtol=1e-5)


def test_devices_log_the_losses_of_one_with_the_doubled_batch_each_once(on_two: RunFolder, on_one: RunFolder) -> None:
    ours, theirs = (MetricsFile(own.path / "metrics.csv").read() for own in (on_two, on_one))
    filled = [[(row["step"], {key for key, value in row.items() if value}) for row in rows] for rows in (ours, theirs)]
    assert filled[0] == filled[1]
    for key in ("train/loss", "train/subject_loss", "train/prior_loss", "score/fixed_batch_loss"):
        losses = [[float(row[key]) for row in rows if row[key]] for rows in (ours, theirs)]
        assert len(losses[0]) >= 2 and losses[0] == pytest.approx(losses[1], rel=2e-5)


def test_devices_draw_the_class_images_of_one_bit_for_bit(on_two, on_one) -> None:
    banks = [json.loads(next(own.path.parents[1].glob("class_banks/*/manifest.json")).read_text()) for own in (on_two, on_one)]
    assert banks[0] == banks[1] and len(banks[0]["sha256"]) == 6  # whole batches


def test_devices_draw_the_pictures_of_one(on_two, on_one) -> None:
    names = sorted(path.relative_to(on_one.path) for path in on_one.path.glob("samples/**/*.png"))
    assert names == sorted(path.relative_to(on_two.path) for path in on_two.path.glob("samples/**/*.png"))
    for name in names:
        ours, theirs = (np.asarray(Image.open(own.path / name), int) for own in (on_two, on_one))
        assert abs(ours - theirs).max() <= (0 if "step-000000" in str(name) else 3), name  # levels of 255; later the weights differ by a rounding


def test_devices_leave_one_record_and_no_claim(on_two) -> None:
    own = on_two
    assert own.record["best_step"] == 4 and own.record["steps"] == 4 and "resumed" not in own.record
    assert not list(own.path.rglob(".*")) and not list(own.path.rglob("rehearsal*"))


def test_devices_continued_equal_a_straight_run_bit_for_bit(on_two, places: Places) -> None:
    words = [*places.words("cut"), *TWO]
    with cut(2, is_saved=True):  # the other rank is in the middle of a step then
        run(*words)
    assert os.environ.get(ranks.LOCAL_RANK) is None and not torch.distributed.is_initialized()
    continued = run(*words)
    assert continued.record["resumed"] == 1
    ours, theirs = weights(continued), weights(on_two)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_ranks_together_draw_the_samples_of_one_with_the_doubled_batch(make_config: Callable[..., Config]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 96, 3), dtype=np.uint8)
    photos = [Image.fromarray(image) for image in noise]
    sets = ImageSet(photos[:3], ["a", "b", "c"]), ImageSet(photos[3:], ["d"] * 5)
    hard = {"trainer.max_steps": 6, "data.crop": "random", "data.flip": True, "trainer.accumulate_grad_batches": 2}
    small = make_config(hard | {"data.batch_size": 2, "prior.batch_size": 1, "trainer.devices": 2})
    large = make_config(hard | {"data.batch_size": 4, "prior.batch_size": 2})
    loaders = [DreamBoothData(small, *sets, Ranks(index, 2)).train_dataloader() for index in (0, 1)]
    shown = SubjectPhotos(photos[:3], ["a", "b", "c"], "", [], "")
    for first, second, whole in zip(*loaders, DreamBoothData(large, *sets).train_dataloader(), strict=True):
        keys = torch.cat([first.keys, second.keys])
        order = [keys.tolist().index(key) for key in whole.keys.tolist()]
        assert sorted(order) == list(range(6)) and torch.equal(torch.cat([first.pixel_values, second.pixel_values])[order], whole.pixel_values)
        assert [(first.prompts + second.prompts)[k] for k in order] == whole.prompts
    assert describe_batch(small, shown, 5) == describe_batch(large, shown, 5)


class Threads(Ranks):
    """Ranks that are threads of this process: what they exchange, without processes."""

    def meet(self, value: Any) -> list[Any]:
        BOX[self.index] = value
        BARRIER.wait()
        values = list(BOX)
        BARRIER.wait()
        return values

    def from_first(self, value: Any) -> Any:
        return self.meet(value)[0]

    def at_first(self, value: Any) -> list[Any] | None:
        values = self.meet(value)
        return values if self.is_first else None

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.meet(value)).mean()


BOX, BARRIER = [None, None], threading.Barrier(2, timeout=60)


def both(work: Callable[[Ranks], Any]) -> list[Any]:
    """What two ranks return for the same work."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(work, Threads(index, 2)) for index in (0, 1)]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The keys of all images that are drawn; each image is its key's, and no model is asked."""
    keys: list[tuple[int, ...]] = []

    def generate(base: Any, prompts: list[str], own: list[tuple[int, ...]], sampling: Any, resolution: int, *args: Any) -> np.ndarray:
        assert len(prompts) == len(own) <= sampling.batch_size
        keys.extend(own)
        return np.stack([np.random.default_rng(key).integers(0, 256, (resolution, resolution, 3), dtype=np.uint8) for key in own])

    monkeypatch.setattr(class_bank, "generate", generate)
    monkeypatch.setattr(evaluation, "generate", generate)
    return keys


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_draw_bank_makes_no_image_twice(make_config: Callable[..., Config], drawn: list, tmp_path: Path, count: int) -> None:
    config = make_config({"prior.num_images": count, "sampling.batch_size": 2})
    banks = both(lambda own: draw_bank(config, None, "digest", ranks=own))
    assert len(drawn) == len(set(drawn)) == count + count % 2 and banks[0] == banks[1]  # whole batches
    contents = [path.read_bytes() for path in banks[0].images]
    alone = draw_bank(make_config({"prior.num_images": count, "sampling.batch_size": 2, "output_dir": str(tmp_path / "alone")}), None, "digest")
    assert contents == [path.read_bytes() for path in alone.images]
    drawn.clear()
    both(lambda own: draw_bank(config, None, "digest", ranks=own))
    assert drawn == []  # all are there


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_draw_together_gives_the_images_of_one_in_order_and_none_twice(make_config: Callable[..., Config], drawn: list, size: int) -> None:
    config = make_config({"sampling.batch_size": size, "evaluation.selection_images": 2, "evaluation.class_images": 3})
    items = selection_plan(config)
    images, nothing = both(lambda own: draw_together(None, items, config, own))
    assert nothing is None and sorted(drawn) == sorted(item.key for item in items)
    assert np.array_equal(images, draw_together(None, items, config, ALONE))


def test_draw_final_share_leaves_every_picture_of_the_tuned_arms_in_the_folder_once(on_one, monkeypatch, drawn: list, tmp_path: Path) -> None:
    own = on_one
    other = RunFolder(tmp_path / own.path.name, own.record)
    other.path.mkdir()
    for part in ("checkpoints", "run.json"):
        (other.path / part).symlink_to(own.path / part)
    loaded = load(own.path)  # once: the transformers library does not load in two threads
    monkeypatch.setattr(final_scores, "load", lambda *words: loaded)
    both(lambda each: draw_final_share(other, own.config, each))
    assert len(drawn) == len(set(drawn)) == len(list((other.path / "samples" / "final" / "best").iterdir()))
    ours, theirs = ({path.name for path in (each.path / "samples" / "final" / "best").iterdir()} for each in (other, own))
    assert ours == theirs
    drawn.clear()
    draw_final_share(other, own.config, ALONE)
    assert drawn == []


def test_stop_at_non_finite_stops_all_ranks_and_names_the_sample_of_another_one(make_config: Callable[..., Config]) -> None:
    trainer, config, nan = SimpleNamespace(global_step=2), make_config(), float("nan")

    def stopped(own: Ranks) -> str:
        images, keys = torch.zeros(2, 3, 8, 8), torch.tensor([[0, 2, 0], [0, 2, 1]])
        batch = Batch(images, ["a sks dog"] * 2, torch.tensor([False, False]), keys, names=[f"{own.index}a.png", f"{own.index}b.png"])
        losses = torch.tensor([1.0, nan if own.index else 1.0])
        finite, module = StopAtNonFinite(config, own), SimpleNamespace(last=LastBatch(losses.mean(), losses, torch.tensor([7, 11])))
        finite.on_train_batch_start(trainer, module, batch, 0)
        with pytest.raises(UserError) as error:
            finite.on_before_backward(trainer, module, losses.mean())
        return str(error.value)

    sentences = both(stopped)
    assert sentences[0] == sentences[1] and sentences[0].startswith(
        "the loss must stay finite, at step 3, for subject image 1b.png ('a sks dog') at timestep 11, got nan; lower optim.learning_rate"
    )


def test_check_refuses_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ranks.check(2, "cuda")
    ranks.check(3, "cpu")
    with pytest.raises(ConfigError, match=r"trainer\.devices must be at most the 2 GPUs that there are, got 3"):
        ranks.check(3, "cuda")


OTHER = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from dreambooth import ranks
with ranks.following() as (own, task):
    print(f"this is rank {{own.index}} of {{own.count}}", flush=True)
    assert own.from_first(None) == "hello"
    {{rest}}
"""


@pytest.fixture
def other(tmp_path: Path) -> Callable[[str], list[str]]:
    """Gives `other("sys.exit(1)")`: the program of a further rank that takes a greeting and then does this."""

    def write(rest: str) -> list[str]:
        script = tmp_path / "other.py"
        script.write_text(OTHER.replace("{rest}", rest))
        return [str(script)]

    return write


def test_together_exchanges_values(other: Callable[[str], list[str]]) -> None:
    import torch as torch_here

    with ranks.together(2, "cpu", other("own.at_first(task['word']); import torch; own.mean(torch.tensor(4.0))"), {"word": "there"}) as own:
        assert own == Ranks(0, 2) and own.from_first("hello") == "hello"
        assert own.at_first("here") == ["here", "there"]
        assert float(own.mean(torch_here.tensor(2.0))) == 3.0


def test_together_takes_a_share_that_was_done_however_the_interpreter_would_end(other: Callable[[str], list[str]]) -> None:
    with ranks.together(2, "cpu", other("import atexit, os; atexit.register(os.abort); own.at_first('done')"), {}) as own:
        own.from_first("hello")
        assert own.at_first(None) == [None, "done"]


def test_together_tells_the_error_of_another_rank(other: Callable[[str], list[str]]) -> None:
    with (
        pytest.raises(RuntimeError, match=r"(?s)rank 1 ended with exit status 1.*this is rank 1 of 2.*a bad day"),
        ranks.together(2, "cpu", other("raise ValueError('a bad day')"), {}) as own,
    ):
        own.from_first("hello")
        own.at_first(None)  # waits for a value that never comes


def test_together_gives_what_another_rank_refuses_as_a_sentence(other: Callable[[str], list[str]]) -> None:
    with (
        pytest.raises(UserError, match="rank 1 stopped: the photo must be whole"),
        ranks.together(2, "cpu", other("sys.exit(ranks.refuse('the photo must be whole'))"), {}) as own,
    ):
        own.from_first("hello")
        own.at_first(None)


LEADER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from dreambooth import ranks
with ranks.together(2, "cpu", [sys.argv[2]], {}) as own:
    own.from_first("hello")
    print(own.at_first(0)[1], flush=True)
    time.sleep(60)
"""


def test_together_ends_the_others_when_the_first_is_killed(other: Callable[[str], list[str]]) -> None:
    words = [sys.executable, "-c", LEADER, str(ROOT), *other("import os; own.at_first(os.getpid()); time.sleep(60)")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as first:
        pid = int(first.stdout.readline())
        assert is_running(pid)
        first.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    """Tells whether a process runs; the remains of one that ended do not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
