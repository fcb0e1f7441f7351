"""The mathematics of training, against diffusers' schedulers, the papers' formulas and numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from dreambooth.diffusion import (
    PREDICTION_TYPES,
    Loss,
    add_noise,
    capped_velocity_weight,
    min_snr_weight,
    prediction_target,
    prior_preservation_loss,
    scaled_linear_alphas_cumprod,
    signal_to_noise,
    velocity,
)

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
ACP = SCHEDULER.alphas_cumprod
T = torch.tensor([0, 1, 250, 500, 998, 999])


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X0, NOISE = draw(1, len(T), 4, 8, 8), draw(2, len(T), 4, 8, 8)


def errors(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, targets and uneven weights of `count` samples."""
    return draw(seed, count, 4, 8, 8), draw(seed + 1, count, 4, 8, 8), draw(seed + 2, count).abs() + 0.1


def test_scaled_linear_alphas_cumprod_is_diffusers_schedule() -> None:
    torch.testing.assert_close(scaled_linear_alphas_cumprod(), ACP, atol=1e-6, rtol=0)


def test_scaled_linear_alphas_cumprod_of_two_steps_is_worked_out_by_hand() -> None:
    torch.testing.assert_close(scaled_linear_alphas_cumprod(2, 0.25, 0.5), torch.tensor([0.75, 0.375]))  # 1 - 1/4, and that times 1 - 1/2


def test_add_noise_is_diffusers_add_noise() -> None:
    torch.testing.assert_close(add_noise(X0, NOISE, T, ACP), SCHEDULER.add_noise(X0, NOISE, T), atol=1e-6, rtol=0)


def test_add_noise_of_half_signal_is_worked_out_by_hand() -> None:
    noisy = add_noise(torch.tensor([[10.0]]), torch.tensor([[-5.0]]), torch.tensor([1]), torch.tensor([1.0, 0.36]))
    torch.testing.assert_close(noisy, torch.tensor([[0.6 * 10 - 0.8 * 5]]))


def test_velocity_is_diffusers_get_velocity() -> None:
    torch.testing.assert_close(velocity(X0, NOISE, T, ACP), SCHEDULER.get_velocity(X0, NOISE, T), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("kind", "expected"), [("epsilon", NOISE), ("v_prediction", SCHEDULER.get_velocity(X0, NOISE, T)), ("sample", X0)])
def test_prediction_target_is_what_the_kind_names(kind: str, expected: Tensor) -> None:
    torch.testing.assert_close(prediction_target(kind, X0, NOISE, T, ACP), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_prediction_target_brings_diffusers_back_to_the_clean_latents(kind: str) -> None:
    scheduler = DDPMScheduler.from_config(SCHEDULER.config, prediction_type=kind, clip_sample=False)
    t = torch.tensor([400])
    noisy, target = add_noise(X0[:1], NOISE[:1], t, ACP), prediction_target(kind, X0[:1], NOISE[:1], t, ACP)
    recovered = scheduler.step(target, 400, noisy, generator=torch.Generator().manual_seed(0)).pred_original_sample
    torch.testing.assert_close(recovered, X0[:1], atol=1e-5, rtol=0)


def test_prediction_target_refuses_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match="prediction_type must be one of epsilon, v_prediction, sample, got 'flow'"):
        prediction_target("flow", X0, NOISE, T, ACP)


def test_signal_to_noise_is_diffusers_compute_snr() -> None:
    torch.testing.assert_close(signal_to_noise(T, ACP), compute_snr(SCHEDULER, T), atol=0, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [  # SNR is 9, 1 and 1/9; gamma is 5
        ("epsilon", [5 / 9, 1.0, 1.0]),
        ("v_prediction", [5 / 10, 1 / 2, (1 / 9) / (10 / 9)]),  # over SNR + 1, not over SNR plus 1: two peers differ here
        ("sample", [5.0, 1.0, 1 / 9]),
    ],
)
def test_min_snr_weight_is_worked_out_by_hand(kind: str, expected: list[float]) -> None:
    weight = min_snr_weight(torch.tensor([0, 1, 2]), torch.tensor([0.9, 0.5, 0.1]), 5.0, kind)
    torch.testing.assert_close(weight, torch.tensor(expected), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("kind", "divisor"), [("epsilon", lambda snr: snr), ("v_prediction", lambda snr: snr + 1)])
def test_min_snr_weight_is_the_formula_of_diffusers_train_dreambooth(kind: str, divisor) -> None:
    snr = compute_snr(SCHEDULER, T)
    expected = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0] / divisor(snr)
    torch.testing.assert_close(min_snr_weight(T, ACP, 5.0, kind), expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("weigh", "gamma"), [(min_snr_weight, 5.0), (min_snr_weight, 1e9), (capped_velocity_weight, math.inf)])
def test_weights_give_all_prediction_types_the_same_loss(weigh, gamma: float) -> None:
    """An error in v means an error of sigma in x0 and of alpha in the noise: the three weighted losses must agree."""
    t = torch.tensor([100, 800])
    alpha, sigma = ACP[t].sqrt().reshape(-1, 1, 1, 1), (1 - ACP[t]).sqrt().reshape(-1, 1, 1, 1)
    v_error = draw(5, 2, 4, 8, 8)
    per_kind = {"v_prediction": v_error, "sample": sigma * v_error, "epsilon": alpha * v_error}
    losses = {kind: weigh(t, ACP, gamma, kind) * error.pow(2).flatten(1).mean(1) for kind, error in per_kind.items()}
    torch.testing.assert_close(losses["sample"], losses["v_prediction"], atol=0, rtol=1e-4)
    torch.testing.assert_close(losses["epsilon"], losses["v_prediction"], atol=0, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sample", "epsilon"])
def test_capped_velocity_weight_without_a_cap_gives_the_velocity_loss(kind: str) -> None:
    """The velocity that a prediction implies is computed by diffusers' own conversion, and its plain loss is the reference."""
    t = torch.tensor([20, 250, 500, 900, 980, 999])
    alpha, sigma = ACP[t].sqrt().reshape(-1, 1, 1, 1), (1 - ACP[t]).sqrt().reshape(-1, 1, 1, 1)
    noisy = SCHEDULER.add_noise(X0, NOISE, t)
    target = prediction_target(kind, X0, NOISE, t, ACP)
    pred = target + 0.3 * draw(7, *X0.shape)
    x0, noise = (pred, (noisy - alpha * pred) / sigma) if kind == "sample" else ((noisy - sigma * pred) / alpha, pred)
    implied = SCHEDULER.get_velocity(x0.double(), noise.double(), t)
    v_loss = (implied - SCHEDULER.get_velocity(X0, NOISE, t)).pow(2).flatten(1).mean(1).float()
    weighted = capped_velocity_weight(t, ACP, math.inf, kind) * (pred - target).pow(2).flatten(1).mean(1)
    torch.testing.assert_close(weighted, v_loss, atol=0, rtol=1e-3)


@pytest.mark.parametrize(("kind", "expected"), [("sample", [5.0, 2.0, 1 / 0.9]), ("epsilon", [1 / 0.9, 2.0, 5.0]), ("v_prediction", [1.0, 1.0, 1.0])])
def test_capped_velocity_weight_is_worked_out_by_hand(kind: str, expected: list[float]) -> None:
    weight = capped_velocity_weight(torch.tensor([0, 1, 2]), torch.tensor([0.9, 0.5, 0.1]), 5.0, kind)  # 1/0.1 is 10, capped at 5
    torch.testing.assert_close(weight, torch.tensor(expected))


def test_prior_preservation_loss_is_the_papers_two_halves() -> None:
    pred, target, _ = errors(10, 6)
    is_prior = torch.tensor([False] * 3 + [True] * 3)
    loss = prior_preservation_loss(pred, target, is_prior, 0.7, torch.ones(6))
    subject, prior = F.mse_loss(pred[:3], target[:3]), F.mse_loss(pred[3:], target[3:])
    torch.testing.assert_close(torch.stack(loss), torch.stack([subject + 0.7 * prior, subject, prior]), atol=1e-6, rtol=1e-6)


def test_prior_preservation_loss_of_two_samples_is_worked_out_by_hand() -> None:
    pred, target = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # squared errors 4/2 and 4/2
    loss = prior_preservation_loss(pred, target, torch.tensor([True, False]), 0.5, torch.tensor([3.0, 1.0]))
    assert [float(value) for value in loss] == [2.0 + 0.5 * 3 * 2.0, 2.0, 6.0]


def test_prior_preservation_loss_keeps_its_value_when_samples_are_shuffled() -> None:
    pred, target, weight = errors(20, 7)
    is_prior = torch.tensor([True, False, True, True, False, True, False])
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    straight = prior_preservation_loss(pred, target, is_prior, 0.4, weight)
    shuffled = prior_preservation_loss(pred[order], target[order], is_prior[order], 0.4, weight[order])
    torch.testing.assert_close(torch.stack(shuffled), torch.stack(straight), atol=1e-6, rtol=1e-6)


def test_prior_preservation_loss_of_an_odd_batch_takes_each_mean_over_its_own_kind() -> None:
    pred, target, _ = errors(30, 5)
    is_prior = torch.tensor([False, True, True, True, True])
    loss = prior_preservation_loss(pred, target, is_prior, 1.0, torch.ones(5))
    expected = F.mse_loss(pred[:1], target[:1]) + F.mse_loss(pred[1:], target[1:])
    torch.testing.assert_close(loss.total, expected, atol=1e-6, rtol=1e-6)


def test_prior_preservation_loss_with_lambda_zero_is_the_subject_loss() -> None:
    pred, target, weight = errors(40, 4)
    loss = prior_preservation_loss(pred, target, torch.tensor([False, True, False, True]), 0.0, weight)
    assert loss.total == loss.subject and loss.prior > 0


def test_prior_preservation_loss_with_lambda_zero_sends_class_images_no_gradient() -> None:
    pred, target, weight = errors(41, 4)
    pred.requires_grad_(True)
    is_prior = torch.tensor([False, True, False, True])
    prior_preservation_loss(pred, target, is_prior, 0.0, weight).total.backward()
    assert (pred.grad.flatten(1).norm(dim=1) > 0).tolist() == (~is_prior).tolist()


def test_prior_preservation_loss_without_class_images_is_the_plain_loss() -> None:
    pred, target, _ = errors(50, 3)
    loss = prior_preservation_loss(pred, target, torch.zeros(3, dtype=torch.bool), 1.0, torch.ones(3))
    assert loss.prior == 0.0
    torch.testing.assert_close(loss.total, F.mse_loss(pred, target), atol=1e-6, rtol=1e-6)


def test_prior_preservation_loss_without_subject_images_has_no_subject_term() -> None:
    pred, target, _ = errors(60, 3)
    loss = prior_preservation_loss(pred, target, torch.ones(3, dtype=torch.bool), 0.5, torch.ones(3))
    assert loss.subject == 0.0
    torch.testing.assert_close(loss.total, 0.5 * F.mse_loss(pred, target), atol=1e-6, rtol=1e-6)


def test_prior_preservation_loss_keeps_each_weight_with_its_sample_peer_defect_min_snr_x_prior() -> None:
    """Diffusers' train_dreambooth weighs B subject losses with the timesteps of all 2B samples, and with B = 1 silently averages them.

    One subject image with weight 1 and one class image with weight 0.2, error 1 each: that script's subject term is 0.6, the right one 1.
    """
    loss = prior_preservation_loss(torch.ones(2, 4), torch.zeros(2, 4), torch.tensor([False, True]), 1.0, torch.tensor([1.0, 0.2]))
    assert loss.subject.item() == 1.0
    assert loss.prior.item() == pytest.approx(0.2)


def test_prior_preservation_loss_weighs_class_images_by_their_own_timesteps() -> None:
    pred, target, weight = errors(70, 4)
    is_prior = torch.tensor([True, False, False, True])
    loss = prior_preservation_loss(pred, target, is_prior, 1.0, weight)
    by_hand = [sum(weight[i] * F.mse_loss(pred[i], target[i]) for i in rows) / 2 for rows in ((1, 2), (0, 3))]
    torch.testing.assert_close(torch.stack([loss.subject, loss.prior]), torch.stack(by_hand), atol=1e-6, rtol=1e-6)


def test_prior_preservation_loss_of_bf16_predictions_is_reduced_in_float32() -> None:
    """In bf16, with 8 bits of mantissa, the square alone would be off by a tenth of a percent."""
    pred, target = torch.full((2, 4, 64, 64), 0.1, dtype=torch.bfloat16), torch.zeros(2, 4, 64, 64, dtype=torch.bfloat16)
    loss = prior_preservation_loss(pred, target, torch.tensor([False, True]), 1.0, torch.ones(2, dtype=torch.bfloat16))
    exact = float(pred[0, 0, 0, 0]) ** 2
    assert loss.total.dtype == torch.float32
    assert loss.subject.item() == pytest.approx(exact, rel=1e-5)


def test_loss_as_logs_gives_detached_values_under_dashboard_keys() -> None:
    loss = Loss(*(torch.tensor(value, requires_grad=True) for value in (3.0, 1.0, 2.0)))
    logs = loss.as_logs("train/")
    assert {key: float(value) for key, value in logs.items()} == {"train/loss": 3.0, "train/subject_loss": 1.0, "train/prior_loss": 2.0}
    assert not any(value.requires_grad for value in logs.values())
