"""Each precision trains on a base of each kind, with the noise and the schedule of full precision; what it wrote can be continued and loaded."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import pytorch_lightning as pl
import torch
from method_cases import Fitted, attached, fit, output, settings
from pytorch_lightning.plugins import MixedPrecision
from small_runs import LEAST, make_photos, no_estimate, run, weights

import train as script
from dreambooth.adapters.methods import load_trainable_state, trainable_state
from dreambooth.config import Config
from dreambooth.metrics_csv import MetricsFile
from dreambooth.objective import Corrupted, Objective
from dreambooth.runs import load

KINDS = ("epsilon", "v_prediction", "sample")
DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.float32, "16-mixed": torch.float32, "bf16-true": torch.bfloat16}  # of the weights
each_kind, each_precision = pytest.mark.parametrize("kind", KINDS), pytest.mark.parametrize("precision", DTYPES)


class Trained(NamedTuple):
    """A short training, with all that it noised and the states that it wrote."""

    fitted: Fitted
    noised: list[Corrupted]
    folder: Path


@pytest.fixture(autouse=True)
def half_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets 16-mixed be float16 with scaled gradients here too, as on a GPU: on a CPU, Lightning takes bf16-mixed for it, with a warning."""
    make = script.make_trainer

    def made(config: Config, *args: object) -> pl.Trainer:
        is_half = config.trainer.precision == "16-mixed"
        if is_half:
            config.trainer.precision = "32-true"
        trainer = make(config, *args)
        if is_half:
            config.trainer.precision = "16-mixed"
            trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
        return trainer

    monkeypatch.setattr(script, "make_trainer", made)


@pytest.fixture
def configured(make_config: Callable[..., Config], tiny_folder: Callable[..., Path]) -> Callable[[str, str], Config]:
    """Gives `configured("bf16-mixed", "epsilon")`: two steps of the keys and values and the token's row, by the self-distilled prior, with EMA."""

    def make(precision: str, kind: str) -> Config:
        changes = {
            "base.path": str(tiny_folder("sd1", kind)),
            "trainer.precision": precision,
            "data.resolution": 32,
            "trainer.max_steps": 2,
            "prior.name": "self_distilled",
            "objective.weighting": "min_snr",
            "optim.warmup_steps": 0,
        }
        return make_config(settings("keys and values") | changes)

    return make


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Config], Trained]:
    """Gives `trained(config)`: its training, done once for each precision and kind of base."""
    done: dict[tuple[str, str], Trained] = {}

    def train(config: Config) -> Trained:
        key = config.trainer.precision, config.base.path
        if key not in done:
            folder, noised, corrupt = tmp_path_factory.mktemp("states"), [], Objective.corrupt
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Objective, "corrupt", lambda self, *args: noised.append(corrupt(self, *args)) or noised[-1])
                done[key] = Trained(fit(config, folder), noised, folder)
        return done[key]

    return train


@each_kind
@each_precision
def test_precision_moves_all_that_learns(configured, trained, precision: str, kind: str) -> None:
    config = configured(precision, kind)
    before, fitted = trainable_state(attached(config)[0]), trained(config).fitted
    after = trainable_state(fitted.module.base)
    assert len(fitted.losses) == 2 and all(math.isfinite(loss) for loss in fitted.losses)
    assert {tensor.dtype for tensor in after.values()} == {DTYPES[precision]}
    assert [name for name in after if torch.equal(after[name].float(), before[name]) or not bool(after[name].isfinite().all())] == []


@each_kind
@pytest.mark.parametrize("precision", [name for name in DTYPES if name != "32-true"])
def test_precision_changes_neither_noise_nor_timesteps_nor_weights_and_hardly_the_loss(configured, trained, precision: str, kind: str) -> None:
    """The schedule and the draws stay float32; what is rounded is what the networks say."""
    full, other = trained(configured("32-true", kind)), trained(configured(precision, kind))
    for theirs, ours in zip(full.noised, other.noised, strict=True):
        assert torch.equal(ours.t, theirs.t) and torch.equal(ours.weight, theirs.weight)
        assert kind != "epsilon" or torch.equal(ours.target, theirs.target)  # the noise itself
    assert other.fitted.losses[0] == pytest.approx(full.fitted.losses[0], rel=0.03)


@each_precision
def test_precision_continued_from_a_state_equals_a_straight_training_bit_for_bit(configured, trained, precision: str) -> None:
    config = configured(precision, "v_prediction")
    whole = trained(config)
    rest = fit(config, state=whole.folder / "1.ckpt")
    theirs = trainable_state(whole.fitted.module.base)
    assert rest.losses == whole.fitted.losses[1:]
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in trainable_state(rest.module.base).items())


@each_kind
@each_precision
def test_precision_leaves_tensors_that_a_fresh_base_takes_up_in_full(configured, trained, precision: str, kind: str) -> None:
    state, (fresh, _) = trainable_state(trained(configured(precision, kind)).fitted.module.base), attached(configured(precision, kind))
    load_trainable_state(fresh, state, "final.safetensors")
    assert bool(output(fresh).isfinite().all())
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in trainable_state(fresh).items())


@pytest.mark.parametrize(("precision", "kind"), [("bf16-mixed", "v_prediction"), ("16-mixed", "sample"), ("bf16-true", "epsilon")])
def test_precision_gives_a_whole_run_that_draws_and_loads(tiny_folder, tmp_path: Path, monkeypatch, precision: str, kind: str) -> None:
    no_estimate(monkeypatch)
    words = (f"base.path={tiny_folder('sd1', kind)}", f"data.subject_dir={make_photos(tmp_path / 'dog', 3)}", f"output_dir={tmp_path / 'runs'}")
    few = (*LEAST, "prior=none", "trainer.max_steps=1", "optim.learning_rate=1e-2")
    done = run(*words, *few, "subject.class_noun=dog", "method=lora", f"trainer.precision={precision}")
    losses = [float(value) for row in MetricsFile(done.path / "metrics.csv").read() for key, value in row.items() if value and "loss" in key]
    assert done.record["status"] == "done" and len(losses) >= 4 and all(math.isfinite(loss) for loss in losses)
    loaded = trainable_state(load(done.path, "final").base)
    assert all(torch.equal(loaded[key], tensor.float()) for key, tensor in weights(done).items())
