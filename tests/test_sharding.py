"""`trainer.sharding`: two devices that each keep half of what learns end with the weights of one, and continue to the bit."""

import json
from pathlib import Path

import pytest
import torch
from small_runs import ROOT, SMALL, composed, cut, make_photos, run, typed, weights

from dreambooth import ranks
from dreambooth.adapters.methods import Full, trainable_state
from dreambooth.base.stable_diffusion import StableDiffusion
from dreambooth.errors import ConfigError
from dreambooth.metrics_csv import MetricsFile
from dreambooth.runs import RunFolder, read_run
from dreambooth.sharding import check, gathered, shard, whole

WORDS = (
    "method=full",
    "method.train_text_encoder=true",
    "method.train_token=true",
    "trainer.max_steps=4",
    "trainer.eval_every=2",
    "trainer.checkpoint_every=2",
    "trainer.fixed_loss_every=1",
    "trainer.accumulate_grad_batches=2",
    "optim.eps=1e-2",  # Adam's first steps go by the sign of a gradient otherwise: a rounding would become a whole step
    "sampling.batch_size=2",
    "subject.class_noun=dog",
    "evaluation.selection_prompts=['a photo of a {subject}','a {subject} on the beach']",
    "evaluation.final_prompts=['a {subject} in the snow']",
)
TWO = ("trainer.devices=2", "trainer.sharding=true", "data.batch_size=1", "prior.batch_size=1")
ONE = ("data.batch_size=2", "prior.batch_size=2")


@pytest.fixture(scope="module")
def words(tiny_folder, tmp_path_factory: pytest.TempPathFactory):
    """Gives the words of a run that writes into a folder of its own."""
    folder = tmp_path_factory.mktemp("sharding")
    base, photos = tiny_folder(), make_photos(folder / "photos")
    return lambda name: [*WORDS, f"base.path={base}", f"data.subject_dir={photos}", f"output_dir={folder / name}"]


@pytest.fixture(scope="module")
def sharded(words) -> RunFolder:
    """A run of two devices, as a user types it."""
    own = words("sharded")
    done = typed(*SMALL, *own, *TWO)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_run(next(Path(own[-1].removeprefix("output_dir=")).glob("default/*/run.json")).parent)


@pytest.fixture(scope="module")
def alone(words) -> RunFolder:
    """The same of one device with the doubled batch."""
    return run(*words("alone"), *ONE)


def test_sharding_learns_what_one_device_learns_with_the_doubled_batch(sharded: RunFolder, alone: RunFolder) -> None:
    for name in ("best", "final"):
        ours, theirs = weights(sharded, name), weights(alone, name)
        assert ours.keys() == theirs.keys()
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], atol=2e-6, rtol=1e-5)


def test_sharding_logs_the_losses_of_one_device_each_once(sharded: RunFolder, alone: RunFolder) -> None:
    ours, theirs = (MetricsFile(own.path / "metrics.csv").read() for own in (sharded, alone))
    for key in ("train/loss", "train/subject_loss", "train/prior_loss", "score/fixed_batch_loss"):
        losses = [[(int(row["step"]), float(row[key])) for row in rows if row[key]] for rows in (ours, theirs)]
        assert len(losses[0]) == len(losses[1]) >= 4
        for own, other in zip(*losses, strict=True):
            assert own[0] == other[0] and own[1] == pytest.approx(other[1], rel=2e-5)


def test_sharding_continued_equals_a_straight_run_bit_for_bit(sharded: RunFolder, words) -> None:
    own = [*words("cut"), *TWO]
    with cut(2, is_saved=True):
        run(*own)
    continued = run(*own)
    assert continued.record["resumed"] == 1
    ours, theirs = weights(continued), weights(sharded)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_sharding_leaves_a_state_that_is_one_whole_file_of_what_learns(sharded: RunFolder) -> None:
    state = torch.load(sharded.path / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    kept = {name.removeprefix("base."): tensor for name, tensor in state["state_dict"].items()}
    final = weights(sharded)
    assert kept.keys() == final.keys() and all(torch.equal(kept[name].float(), final[name].float()) for name in final)
    assert json.loads((sharded.path / "run.json").read_text())["status"] == "done"


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (("trainer.devices=1",), "trainer.devices"),
        (("method=lora",), "method"),
        (("method.text_encoder_stop_step=3",), "method.text_encoder_stop_step"),
        (("prior=self_distilled",), "prior"),
        (("optim=prodigy",), "optim"),
        (("trainer.ema_decay=0.9",), "trainer.ema_decay"),
        (("trainer.compile=true",), "trainer.compile"),
        (("trainer.precision=16-mixed",), "trainer.precision"),
    ],
)
def test_check_refuses_what_cannot_be_shared_out(words: tuple[str, ...], where: str) -> None:
    config = composed("trainer.devices=2", "trainer.sharding=true", *words)
    with pytest.raises(ConfigError, match=rf"^{where.replace('.', '[.]')} must be .* with trainer.sharding=true"):
        check(config)


def test_check_lets_through_what_can_be_shared_out() -> None:
    check(composed("trainer.devices=2", "trainer.sharding=true"))
    check(composed("method=lora"))


OTHER = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from dreambooth import ranks
from test_sharding import kept_by
with ranks.following() as (own, task):
    own.at_first(kept_by(task["base"]))
"""


def kept_by(path: str) -> dict[str, float]:
    """What one of two ranks holds of a model that is shared out, and whether it is whole, and the same, inside `whole` alone."""
    from torch.distributed.device_mesh import init_device_mesh

    base = StableDiffusion(path=path).load()
    groups = Full(train_text_encoder=True, train_token=True).attach(base, "sks", "dog")
    noisy, t, prompts = torch.ones(2, *base.latent_shape(32, 32)), torch.tensor([3, 500]), ["a sks dog", "a dog"]
    with torch.no_grad():
        before = base.predict(noisy, t, base.encode_prompts(prompts))
    everything = {name: tensor.clone() for name, tensor in trainable_state(base).items()}
    groups = shard(base, groups, init_device_mesh("cpu", (2,)))
    held = [parameter for group in groups for parameter in group.parameters]
    with whole(base):
        inside = trainable_state(base)
        same = inside.keys() == everything.keys() and all(torch.equal(inside[name], everything[name]) for name in everything)
        if torch.distributed.get_rank() == 0:  # alone: nothing in here waits for the other rank
            with torch.no_grad():
                same = same and torch.equal(base.predict(noisy, t, base.encode_prompts(prompts)), before)
    outside = trainable_state(base)
    return {
        "total": sum(tensor.numel() for tensor in everything.values()),
        "kept": sum(parameter.to_local().numel() for parameter in held),
        "same": float(same),
        "shared_again": float(all(hasattr(tensor, "to_local") for tensor in outside.values())),
        "gathered": float(all(torch.equal(tensor, everything[name]) for name, tensor in gathered(outside).items())),
    }


def test_shard_leaves_each_rank_its_half_and_whole_gives_back_all(tiny_folder, tmp_path: Path) -> None:
    script = tmp_path / "other.py"
    script.write_text(OTHER.format(root=str(ROOT), tests=str(ROOT / "tests")))
    path = str(tiny_folder())
    with ranks.together(2, "cpu", [str(script)], {"base": path}) as own:
        both = own.at_first(kept_by(path))
    assert sum(each["kept"] for each in both) == both[0]["total"] == both[1]["total"]
    for each in both:
        assert each["kept"] == pytest.approx(each["total"] / 2, rel=0.05)
        assert each["same"] and each["shared_again"] and each["gathered"]
