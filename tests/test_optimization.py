"""Learning rates by part and over the steps; weight decay where it belongs."""

import math

import pytest
import torch
from torch import nn

from dreambooth.adapters import ParamGroup
from dreambooth.errors import ConfigError
from dreambooth.optimization import AdamW

RATES = {"learning_rate": 1e-3, "text_encoder_learning_rate": 2e-3, "token_learning_rate": 4e-3}


def groups(*parts: str) -> list[ParamGroup]:
    return [ParamGroup(part, [nn.Parameter(torch.full((3,), 2.0))]) for part in parts]


def test_build_gives_each_part_its_learning_rate() -> None:
    built = AdamW(**RATES).build(groups("unet", "text_encoder", "token"))
    assert {group["name"]: group["lr"] for group in built.param_groups} == {"unet": 1e-3, "text_encoder": 2e-3, "token": 4e-3}


def test_build_hands_every_parameter_to_the_optimizer() -> None:
    parts = groups("unet", "token")
    built = AdamW(**RATES).build(parts)
    assert [id(p) for group in built.param_groups for p in group["params"]] == [id(p) for part in parts for p in part.parameters]


def test_build_decays_all_but_the_identifiers_row() -> None:
    built = AdamW(**RATES, weight_decay=0.5).build(groups("unet", "text_encoder", "token"))
    assert {group["name"]: group["weight_decay"] for group in built.param_groups} == {"unet": 0.5, "text_encoder": 0.5, "token": 0.0}


def test_build_passes_betas_and_eps_on() -> None:
    group = AdamW(**RATES, betas=[0.8, 0.95], eps=1e-6).build(groups("unet")).param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)


def test_adamw_first_step_is_worked_out_by_hand() -> None:
    """Adam's first step is the learning rate against the gradient's sign; decay takes learning rate x weight_decay of the weight."""
    part = groups("unet")[0]
    optimizer = AdamW(learning_rate=0.1, weight_decay=0.5, eps=1e-12).build([part])
    part.parameters[0].grad = torch.tensor([3.0, -7.0, 1e-3])
    optimizer.step()
    decayed = 2.0 * (1 - 0.1 * 0.5)
    torch.testing.assert_close(part.parameters[0].detach(), torch.tensor([decayed - 0.1, decayed + 0.1, decayed - 0.1]))


@pytest.mark.parametrize("part", ["unet", "text_encoder", "token"])
def test_rate_zero_is_a_value_and_freezes_its_part(part: str) -> None:
    key = {"unet": "learning_rate"}.get(part, f"{part}_learning_rate")
    own = groups(part)
    optimizer = AdamW(**(RATES | {key: 0.0})).build(own)
    own[0].parameters[0].grad = torch.ones(3)
    optimizer.step()
    assert own[0].parameters[0].tolist() == [2.0] * 3


def test_factor_constant_is_one_at_every_step() -> None:
    assert {AdamW().factor(step, 10) for step in range(10)} == {1.0}


def test_factor_warm_up_of_three_steps_is_worked_out_by_hand() -> None:
    schedule = AdamW(warmup_steps=3)
    assert [schedule.factor(step, 10) for step in range(5)] == [1 / 4, 2 / 4, 3 / 4, 1.0, 1.0]


def test_factor_cosine_is_worked_out_by_hand() -> None:
    schedule = AdamW(schedule="cosine")
    assert [schedule.factor(step, 4) for step in range(5)] == pytest.approx([1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0.0], abs=1e-12)


def test_factor_cosine_starts_after_the_warm_up() -> None:
    schedule = AdamW(schedule="cosine", warmup_steps=2)
    assert [schedule.factor(step, 6) for step in (2, 4, 6)] == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize(("warmup", "max_steps"), [(0, 1), (5, 3), (3, 3), (2, 50)])
def test_factor_stays_between_zero_and_one(schedule: str, warmup: int, max_steps: int) -> None:
    values = [AdamW(schedule=schedule, warmup_steps=warmup).factor(step, max_steps) for step in range(max_steps + 3)]
    assert all(0 <= value <= 1 for value in values) and values[0] > 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1e-9),
        ("learning_rate", math.inf),
        ("text_encoder_learning_rate", math.nan),
        ("token_learning_rate", -1.0),
        ("warmup_steps", -1),
        ("schedule", "linear"),
        ("betas", [0.9, 1.0]),
        ("betas", [0.9]),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("eps", 0.0),
    ],
)
def test_optimizer_refuses_a_value_that_cannot_work(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match="^optim"):
        AdamW(**{field: value})
