"""Learning rates by part and over the steps; weight decay where it belongs."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dreambooth.adapters.methods import ParamGroup, let_learn
from dreambooth.errors import ConfigError
from dreambooth.optimization import AdamW, AdamW8bit, Optimizer, Prodigy

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


def windowed(start: int = 0, stop: int | None = None) -> list[ParamGroup]:
    return [ParamGroup("unet", [nn.Parameter(torch.ones(3))], start, stop)]


def test_group_factors_are_zero_where_a_group_does_not_learn() -> None:
    (factor,) = AdamW().group_factors(windowed(2, 4), 6)
    assert [factor(step) for step in range(6)] == [0, 0, 1, 1, 0, 0]


def test_group_factors_warm_up_and_fall_from_where_the_group_begins() -> None:
    (factor,) = AdamW(schedule="cosine", warmup_steps=1).group_factors(windowed(2), 7)
    assert [factor(step) for step in range(8)] == pytest.approx([0, 0, 1 / 2, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0])


def test_group_factors_of_several_groups_are_their_own() -> None:
    first, second = AdamW().group_factors(windowed(0, 1) + windowed(1), 4)
    assert ([first(0), first(1)], [second(0), second(1)]) == ([1, 0], [0, 1])


@pytest.mark.parametrize(("fused", "expected"), [(None, True), (True, True), (False, False)])
def test_adamw_fused_is_as_asked_and_so_by_itself(fused: bool | None, expected: bool) -> None:
    assert bool(AdamW(**RATES, fused=fused).build(groups("unet")).param_groups[0]["fused"]) is expected


@pytest.mark.parametrize(("precision", "expected"), [("32-true", True), ("bf16-true", True), ("16-mixed", False), ("bf16-mixed", False)])
def test_adamw_is_not_fused_by_itself_where_lightning_could_not_clip(precision: str, expected: bool) -> None:
    assert bool(AdamW(**RATES).build(groups("unet"), precision).param_groups[0]["fused"]) is expected


def test_adamw_fused_step_is_the_plain_one() -> None:
    ends = []
    for fused in (False, True):
        part = groups("unet")
        optimizer = AdamW(**RATES, fused=fused, weight_decay=0.1).build(part)
        for number in range(3):
            part[0].parameters[0].grad = torch.tensor([1.0, -2.0, 0.5]) * (number + 1)
            optimizer.step()
        ends.append(part[0].parameters[0].detach())
    torch.testing.assert_close(*ends, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_adamw_fused_is_refused_where_lightning_could_not_clip(precision: str) -> None:
    with pytest.raises(ConfigError, match=f"optim.fused must not be true with trainer.precision={precision}"):
        AdamW(fused=True).check("cuda", precision)


def test_adamw8bit_is_refused_without_a_gpu_in_one_sentence() -> None:
    with pytest.raises(ConfigError, match="^optim must not be adamw8bit without a CUDA GPU, got 'cpu'; choose optim=adamw$"):
        AdamW8bit().check("cpu", "32-true")


@pytest.mark.parametrize(("optimizer", "package"), [(AdamW8bit(), "bitsandbytes"), (Prodigy(), "prodigyopt")])
def test_optimizer_whose_package_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch, optimizer: Optimizer, package: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"needs the package {package}.*run pip install {package}"):
        optimizer.check("cuda", "32-true")


def test_adamw8bit_hands_groups_rates_and_decay_to_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    fake = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=lambda settings, **options: seen.update(settings=settings, **options)))
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    AdamW8bit(**RATES, weight_decay=0.5, betas=[0.8, 0.9]).build(groups("unet", "token"))
    assert [(one["name"], one["lr"], one["weight_decay"]) for one in seen["settings"]] == [("unet", 1e-3, 0.5), ("token", 4e-3, 0.0)]
    assert (seen["betas"], seen["eps"]) == ((0.8, 0.9), 1e-8)


@pytest.mark.parametrize(("field", "value"), [("d_coef", 0.0), ("betas", [1.0, 0.9]), ("learning_rate", 0.5)])
def test_prodigy_refuses_a_value_that_cannot_work(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match="^optim"):
        Prodigy(**{field: value})


@pytest.mark.parametrize("key", ["learning_rate", "text_encoder_learning_rate", "token_learning_rate"])
def test_prodigy_refuses_a_rate_that_was_meant_for_adamw(key: str) -> None:
    """As a preset for AdamW brings it: the factor would leave a millionth of the rate that was found."""
    others = dict.fromkeys(("learning_rate", "text_encoder_learning_rate", "token_learning_rate"), 0.0)
    with pytest.raises(ConfigError, match=rf"^optim\.{key} must be about 1 with optim=prodigy.*got 1e-06; add optim.learning_rate=1.0 optim.text"):
        Prodigy(**others | {key: 1e-6}).check("cpu", "32-true")


@pytest.mark.parametrize("rate", [0.01, 0.5, 1.0, 2.0])
def test_prodigy_takes_a_factor_of_about_one(monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    Prodigy(learning_rate=rate, text_encoder_learning_rate=rate, token_learning_rate=0.0).check("cpu", "32-true")


def test_prodigy_lets_a_part_stay_out() -> None:
    assert Prodigy(text_encoder_learning_rate=0.0).rate("text_encoder") == 0


def test_prodigy_finds_a_rate_and_comes_down_a_quadratic() -> None:
    pytest.importorskip("prodigyopt")
    part = [ParamGroup("unet", [nn.Parameter(torch.tensor([3.0, -2.0]))])]
    optimizer = Prodigy(weight_decay=0.0).build(part)
    for _ in range(300):
        optimizer.zero_grad()
        part[0].parameters[0].pow(2).sum().backward()
        optimizer.step()
    assert part[0].parameters[0].abs().max() < 0.1 and optimizer.param_groups[0]["d"] > 1e-3


@pytest.mark.parametrize("window", [[(0, None), (0, 40)], [(0, 40), (40, None)]], ids=["stops", "in turn"])
def test_prodigy_steps_groups_that_learn_for_a_while_only(window: list[tuple[int, int | None]]) -> None:
    """Its groups may differ in their rates only by a 0."""
    pytest.importorskip("prodigyopt")
    parts = [ParamGroup("unet", [nn.Parameter(torch.tensor([3.0, -2.0]))], *one) for one in window]
    optim = Prodigy(weight_decay=0.0, schedule="cosine", warmup_steps=5)
    optimizer = optim.build(parts)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, optim.group_factors(parts, 400))
    for step in range(400):
        let_learn(parts, step)
        optimizer.zero_grad()
        sum(p.pow(2).sum() for part in parts for p in part.parameters if p.requires_grad).backward()
        optimizer.step()
        schedule.step()
    ends = [part.parameters[0].detach().abs().max().item() for part in parts]
    assert min(ends) < 0.1 and all(math.isfinite(end) for end in ends)
