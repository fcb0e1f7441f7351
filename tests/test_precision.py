"""Each precision trains on a base of each kind, with the noise and the schedule of full precision; what it wrote can be continued and loaded."""

import math
from collections.abc import Callable
from pathlib import Path

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
from dreambooth.runs import load

KINDS = ("epsilon", "v_prediction", "sample")
DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.float32, "16-mixed": torch.float32, "bf16-true": torch.bfloat16}  # of the weights


@pytest.fixture
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
    """Gives `configured("bf16-mixed", "epsilon")`: two steps of a LoRA and the token's row, by the self-distilled prior, with EMA."""

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
        return make_config(settings("lora with text encoder until a step") | changes)

    return make


@pytest.fixture(scope="module")
def in_full() -> dict[str, Fitted]:
    """The trainings in full precision by kind of base."""
    return {}


@pytest.mark.usefixtures("half_on_cpu")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", DTYPES)
def test_precision_trains_to_a_state_that_can_be_continued_and_loaded(configured, in_full, tmp_path: Path, precision: str, kind: str) -> None:
    config = configured(precision, kind)
    before = trainable_state(attached(config)[0])
    whole = fit(config, tmp_path)
    state = trainable_state(whole.module.base)
    assert {tensor.dtype for tensor in state.values()} == {DTYPES[precision]} and all(bool(tensor.isfinite().all()) for tensor in state.values())
    assert [key for key in state if torch.equal(state[key].float(), before[key])] == []

    if kind not in in_full:
        in_full[kind] = whole if precision == "32-true" else fit(configured("32-true", kind))
    assert all(math.isfinite(loss) for loss in whole.losses)
    assert whole.losses[0] == pytest.approx(in_full[kind].losses[0], rel=0 if precision == "32-true" else 0.02)  # the same noise

    rest = fit(config, state=tmp_path / "1.ckpt")
    assert rest.losses == whole.losses[1:]
    assert all(torch.equal(tensor, state[key]) for key, tensor in trainable_state(rest.module.base).items())

    fresh, _ = attached(config)
    load_trainable_state(fresh, state, "final.safetensors")
    assert bool(output(fresh).isfinite().all()) and trainable_state(fresh).keys() == state.keys()
    assert all(torch.equal(tensor, state[key].float()) for key, tensor in trainable_state(fresh).items())


@pytest.mark.usefixtures("half_on_cpu")
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
