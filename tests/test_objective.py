"""Noise and timesteps of a sample are its own: whatever stands beside it in the batch, and in every arm of an ablation."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dreambooth.base.stable_diffusion import StableDiffusion
from dreambooth.config import Config
from dreambooth.data import Draw
from dreambooth.diffusion import add_noise, capped_velocity_weight, min_snr_weight, prediction_target, scaled_linear_alphas_cumprod
from dreambooth.errors import ConfigError
from dreambooth.objective import FollowBase

ACP = scaled_linear_alphas_cumprod()
LATENTS = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
KEYS = torch.tensor([[3, 10, sample] for sample in range(4)])


def base(kind: str = "epsilon") -> SimpleNamespace:
    """All that an objective asks of a base."""
    return SimpleNamespace(alphas_cumprod=ACP, prediction_type=kind)


def draw_timesteps(count: int, seed: int = 0) -> Tensor:
    keys = torch.tensor([[seed, step, sample] for step in range(count // 4) for sample in range(4)])
    return FollowBase().corrupt(torch.zeros(count, 1, 1, 1), keys, base()).t


def test_corrupt_gives_a_sample_the_same_noise_whatever_the_batch() -> None:
    whole = FollowBase().corrupt(LATENTS, KEYS, base())
    for i in range(4):
        alone = FollowBase().corrupt(LATENTS[i : i + 1], KEYS[i : i + 1], base())
        assert torch.equal(whole.noisy[i], alone.noisy[0]) and torch.equal(whole.target[i], alone.target[0]) and whole.t[i] == alone.t[0]


def test_corrupt_gives_a_sample_the_same_noise_in_any_place() -> None:
    order = torch.tensor([2, 0, 3, 1])
    straight, shuffled = (FollowBase().corrupt(LATENTS[rows], KEYS[rows], base()) for rows in (torch.arange(4), order))
    assert all(torch.equal(a[order], b) for a, b in zip(straight, shuffled, strict=True))


@pytest.mark.parametrize("column", [0, 1, 2], ids=["seed", "step", "sample"])
def test_corrupt_draws_other_noise_for_another_key(column: int) -> None:
    other = KEYS.clone()
    other[:, column] += 100
    first, second = (FollowBase().corrupt(LATENTS, keys, base()) for keys in (KEYS, other))
    assert not torch.equal(first.t, second.t)
    assert abs(float(torch.corrcoef(torch.stack([first.target.flatten(), second.target.flatten()]))[0, 1])) < 0.16  # 5 standard errors


def test_corrupt_gives_different_samples_different_noise() -> None:
    target = FollowBase().corrupt(LATENTS, KEYS, base()).target.flatten(1)
    off_diagonal = torch.corrcoef(target) - torch.eye(4)
    assert float(off_diagonal.abs().max()) < 0.32


def test_corrupt_leaves_a_subject_sample_its_noise_when_the_prior_is_switched_off() -> None:
    with_prior = [Draw(7, place, is_prior) for place in range(2) for is_prior in (False, True)]
    alone = [Draw(7, place, False) for place in range(2)]
    keys = {name: torch.tensor([[0, d.step, d.sample] for d in draws]) for name, draws in (("both", with_prior), ("alone", alone))}
    both, single = FollowBase().corrupt(LATENTS, keys["both"], base()), FollowBase().corrupt(LATENTS[:2], keys["alone"], base())
    subject = torch.tensor([not d.is_prior for d in with_prior])
    assert torch.equal(both.target[subject], single.target) and torch.equal(both.t[subject], single.t)


def test_corrupt_draws_timesteps_evenly_by_chi_square() -> None:
    counts = torch.bincount(draw_timesteps(4000) // 50, minlength=20).float()  # 20 bins, 200 expected in each
    assert 5 < float(((counts - 200) ** 2 / 200).sum()) < 45  # 19 degrees of freedom


def test_corrupt_draws_the_first_and_the_last_timestep_and_none_beyond() -> None:
    keys = torch.tensor([[0, step, 0] for step in range(200)])
    short = SimpleNamespace(alphas_cumprod=ACP[:7], prediction_type="epsilon")
    t = FollowBase().corrupt(torch.zeros(200, 1, 1, 1), keys, short).t
    assert set(t.tolist()) == set(range(7))


def test_corrupt_draws_timesteps_unrelated_to_those_of_the_next_step() -> None:
    t = draw_timesteps(4000).float()
    assert abs(float(torch.corrcoef(torch.stack([t[:-4], t[4:]]))[0, 1])) < 0.08


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_corrupt_noises_as_ho_et_al_and_targets_what_the_base_predicts(kind: str) -> None:
    noise = FollowBase().corrupt(LATENTS, KEYS, base("epsilon")).target
    noisy, t, target, _ = FollowBase().corrupt(LATENTS, KEYS, base(kind))
    assert torch.equal(noisy, add_noise(LATENTS, noise, t, ACP))
    assert torch.equal(target, prediction_target(kind, LATENTS, noise, t, ACP))


def test_corrupt_draws_the_same_numbers_for_every_prediction_type() -> None:
    first, second = FollowBase().corrupt(LATENTS, KEYS, base("epsilon")), FollowBase().corrupt(LATENTS, KEYS, base("v_prediction"))
    assert torch.equal(first.noisy, second.noisy) and torch.equal(first.t, second.t)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        (None, lambda t: torch.ones(len(t))),
        ("uniform", lambda t: torch.ones(len(t))),
        ("min_snr", lambda t: min_snr_weight(t, ACP, 3.0, "v_prediction")),
        ("capped_velocity", lambda t: capped_velocity_weight(t, ACP, 3.0, "v_prediction")),
    ],
)
def test_weight_is_the_chosen_one(weighting: str | None, expected: Callable[[Tensor], Tensor]) -> None:
    corrupted = FollowBase(weighting=weighting, snr_gamma=3.0).corrupt(LATENTS, KEYS, base("v_prediction"))
    torch.testing.assert_close(corrupted.weight, expected(corrupted.t))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_corrupt_of_a_real_base_takes_its_schedule_and_prediction_type(kind: str, tiny_folder: Callable[..., Path]) -> None:
    model = StableDiffusion(path=str(tiny_folder("sd1", kind))).load()
    noisy, t, target, _ = FollowBase().corrupt(LATENTS, KEYS, model)
    torch.testing.assert_close(noisy, FollowBase().corrupt(LATENTS, KEYS, base()).noisy)
    torch.testing.assert_close(target, FollowBase().corrupt(LATENTS, KEYS, base(kind)).target)
    assert model.predict(noisy, t, model.encode_prompts(["a photo"] * 4)).shape == target.shape


def test_objective_default_weighting_comes_from_the_recipe(make_config: Callable[..., Config]) -> None:
    assert FollowBase().weighting is None
    assert make_config().objective.weighting == "uniform"


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan])
def test_objective_refuses_a_cap_that_is_not_positive(gamma: float) -> None:
    with pytest.raises(ConfigError, match="^objective.snr_gamma must be above 0"):
        FollowBase(snr_gamma=gamma)
