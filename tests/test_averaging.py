"""The moving average of weights: worked out by hand, put in place and taken away again without a trace, and what is evaluated and kept."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_runs import make_photos, run
from torch import nn

from dreambooth import callbacks
from dreambooth.adapters.methods import trainable_state
from dreambooth.averaging import AveragedWeights
from dreambooth.errors import ConfigError
from dreambooth.runs import RunFolder


def weight(value: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.full((2,), value, dtype=dtype))


def average(averaged: AveragedWeights) -> float:
    with averaged.applied():
        return averaged.parameters[0].detach().float()[0].item()


def test_average_of_three_updates_is_worked_out_by_hand() -> None:
    """The first update takes the weight; then shares of 2/11 and 3/12 of the average stay, below the decay."""
    parameter = weight(5.0)
    averaged = AveragedWeights([parameter], decay=0.9)
    found = []
    for value in (1.0, 2.0, 4.0):
        parameter.data.fill_(value)
        averaged.update()
        found.append(average(averaged))
    second = 2 / 11 * 1.0 + 9 / 11 * 2.0
    assert found == pytest.approx([1.0, second, 3 / 12 * second + 9 / 12 * 4.0])


def test_average_keeps_no_more_than_its_decay() -> None:
    parameter = weight(1.0)
    averaged = AveragedWeights([parameter], decay=0.1)
    for value in (1.0, 2.0):
        parameter.data.fill_(value)
        averaged.update()
    assert average(averaged) == pytest.approx(0.1 * 1.0 + 0.9 * 2.0)


def test_average_of_a_part_that_stopped_does_not_jump() -> None:
    parameter = weight(1.0)
    averaged = AveragedWeights([parameter], decay=0.9)
    averaged.update()
    parameter.data.fill_(2.0)
    parameter.requires_grad_(False)
    averaged.update()
    assert average(averaged) == pytest.approx(2 / 11 * 1.0 + 9 / 11 * 2.0)


def test_average_in_place_is_taken_away_bit_for_bit_even_after_an_error() -> None:
    parameter = weight(0.1)
    averaged = AveragedWeights([parameter], decay=0.9)
    averaged.update()
    parameter.data.fill_(1 / 3)
    before = parameter.detach().clone()
    with pytest.raises(KeyboardInterrupt), averaged.applied():
        assert parameter[0].item() == pytest.approx(0.1)
        raise KeyboardInterrupt
    assert torch.equal(parameter, before) and parameter.requires_grad


def test_average_of_half_precision_weights_is_kept_in_full() -> None:
    parameter = weight(1.0, torch.bfloat16)
    averaged = AveragedWeights([parameter], decay=0.999)
    assert averaged.ema.shadow_params[0].dtype == torch.float32


def test_average_goes_on_from_its_state() -> None:
    parameter = weight(1.0)
    whole, cut = AveragedWeights([parameter], 0.9), AveragedWeights([parameter], 0.9)
    for averaged in (whole, cut):
        averaged.update()
    rest = AveragedWeights([parameter], 0.9)
    rest.load_state_dict(cut.state_dict())
    parameter.data.fill_(3.0)
    for averaged in (whole, rest):
        averaged.update()
    assert average(rest) == average(whole)


DRAWN_WITH: list[dict[str, torch.Tensor]] = []  # the learned tensors at each selection of the run below


@pytest.fixture(scope="module")
def averaged_run(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("averaged")
    words = ("method=lora", "method.train_text_encoder=false", "method.train_token=false", "prior=none", "subject.class_noun=dog")
    steps = ("trainer.max_steps=3", "trainer.eval_every=3", "optim.learning_rate=1e-2", "trainer.ema_decay=0.99", "evaluation.other_prompts=[]")
    draw = callbacks.draw_together

    def watched(base, *args):
        DRAWN_WITH.append({name: tensor.clone() for name, tensor in trainable_state(base).items()})
        return draw(base, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "draw_together", watched)
        return run(*words, *steps, f"base.path={tiny_folder()}", f"data.subject_dir={make_photos(folder / 'dog')}", f"output_dir={folder}")


def test_run_with_an_average_keeps_it_and_not_the_last_weights(averaged_run: RunFolder) -> None:
    kept = load_file(averaged_run.path / "checkpoints" / "final.safetensors")
    state = torch.load(averaged_run.path / "checkpoints" / "last.ckpt", weights_only=True)
    last = {name.removeprefix("base."): tensor for name, tensor in state["state_dict"].items()}
    shadow = dict(zip(last, state["averaged_weights"]["shadow_params"], strict=True))
    assert kept.keys() == last.keys()
    assert all(torch.equal(kept[name], shadow[name]) for name in kept)
    assert any(not torch.equal(kept[name], last[name]) for name in kept)


def test_run_with_an_average_draws_with_what_it_keeps(averaged_run: RunFolder) -> None:
    kept = load_file(averaged_run.path / "checkpoints" / "final.safetensors")
    assert all(torch.equal(DRAWN_WITH[-1][name], kept[name]) for name in kept)


def test_run_with_an_average_says_so_in_the_file(averaged_run: RunFolder) -> None:
    with safe_open(averaged_run.path / "checkpoints" / "final.safetensors", "pt") as file:
        assert '"averaged": true' in file.metadata()["dreambooth"]


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_training_refuses_a_decay_that_is_no_share(decay: float) -> None:
    from dreambooth.config import Training

    with pytest.raises(ConfigError, match="trainer.ema_decay must be in"):
        Training(ema_decay=decay)
