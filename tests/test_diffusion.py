"""The mathematics of training, against diffusers' schedulers, the papers' formulas and numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr
from scipy.special import pseudo_huber
from torch import Tensor

from dreambooth.diffusion import (
    PREDICTION_TYPES,
    Loss,
    add_noise,
    capped_velocity_weight,
    error_scale,
    huber_delta,
    mask_weight,
    min_snr_weight,
    per_sample_error,
    prediction_target,
    prior_preservation_loss,
    rescale_zero_terminal_snr,
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


def test_rescale_zero_terminal_snr_is_diffusers_schedule() -> None:
    theirs = DDPMScheduler.from_config(SCHEDULER.config, rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close(rescale_zero_terminal_snr(ACP), theirs, atol=1e-6, rtol=0)


def test_rescale_zero_terminal_snr_is_worked_out_by_hand() -> None:
    """Amplitudes 0.9, 0.7, 0.5 less 0.5 are 0.4, 0.2, 0; times 0.9 / 0.4 they are 0.9, 0.45, 0."""
    torch.testing.assert_close(rescale_zero_terminal_snr(torch.tensor([0.81, 0.49, 0.25])), torch.tensor([0.81, 0.2025, 0.0]))


def test_rescale_zero_terminal_snr_ends_in_nothing_but_noise() -> None:
    rescaled = rescale_zero_terminal_snr(ACP)
    assert rescaled[-1] == 0.0 and rescaled[0] == pytest.approx(float(ACP[0]), rel=1e-6) and bool((rescaled.diff() < 0).all())


def test_rescale_zero_terminal_snr_twice_is_once() -> None:
    once = rescale_zero_terminal_snr(ACP)
    torch.testing.assert_close(rescale_zero_terminal_snr(once), once)


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


@pytest.mark.parametrize("measured", PREDICTION_TYPES)
@pytest.mark.parametrize("predicted", PREDICTION_TYPES)
def test_error_scale_is_how_far_diffusers_conversion_moves_the_measured_quantity(predicted: str, measured: str) -> None:
    """A wrong prediction is turned by diffusers' DDIM step into clean latents and noise, and those into the measured quantity."""
    scheduler = DDIMScheduler.from_config(SCHEDULER.config, prediction_type=predicted, clip_sample=False)
    scheduler.set_timesteps(1000)
    for t in (50, 400, 900):
        at = torch.tensor([t])
        noisy = SCHEDULER.add_noise(X0[:1], NOISE[:1], at)
        wrong = prediction_target(predicted, X0[:1], NOISE[:1], at, ACP) + 0.5
        x0 = scheduler.step(wrong, t, noisy).pred_original_sample
        noise = (noisy - ACP[t].sqrt() * x0) / (1 - ACP[t]).sqrt()
        found = {"sample": x0, "epsilon": noise, "v_prediction": SCHEDULER.get_velocity(x0, noise, at)}[measured]
        error = (found - prediction_target(measured, X0[:1], NOISE[:1], at, ACP)).abs()
        torch.testing.assert_close(error, torch.full_like(error, 0.5 * float(error_scale(at, ACP, predicted, measured))), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("kind", "expected"), [("sample", [5.0, 2.0, 1 / 0.9]), ("epsilon", [1 / 0.9, 2.0, 5.0]), ("v_prediction", [1.0, 1.0, 1.0])])
def test_capped_velocity_weight_is_worked_out_by_hand(kind: str, expected: list[float]) -> None:
    weight = capped_velocity_weight(torch.tensor([0, 1, 2]), torch.tensor([0.9, 0.5, 0.1]), 5.0, kind)  # 1/0.1 is 10, capped at 5
    torch.testing.assert_close(weight, torch.tensor(expected))


def test_per_sample_error_is_the_mean_square_of_each_sample() -> None:
    pred, target, _ = errors(80, 3)
    torch.testing.assert_close(per_sample_error(pred, target), torch.stack([F.mse_loss(a, b) for a, b in zip(pred, target, strict=True)]))


def test_per_sample_error_with_delta_is_twice_scipys_pseudo_huber() -> None:
    """Twice, so that a small error costs its square, as without delta."""
    pred, target, delta = errors(81, 3)
    expected = [2 * pseudo_huber(float(d), (a - b).double().numpy()).mean() for a, b, d in zip(pred, target, delta, strict=True)]
    torch.testing.assert_close(per_sample_error(pred, target, delta), torch.tensor(expected).float(), atol=1e-6, rtol=1e-5)


def test_per_sample_error_with_delta_is_the_square_of_small_and_the_size_of_large_errors() -> None:
    small = per_sample_error(torch.tensor([[1e-3]]), torch.zeros(1, 1), torch.tensor([1.0]))
    large = per_sample_error(torch.tensor([[1000.0]]), torch.zeros(1, 1), torch.tensor([0.1]))
    assert small.item() == pytest.approx(1e-6, rel=1e-5) and large.item() == pytest.approx(2 * 0.1 * 1000, rel=1e-3)


def test_per_sample_error_with_delta_has_a_gradient_where_nothing_is_wrong() -> None:
    pred = torch.zeros(1, 4, requires_grad=True)
    per_sample_error(pred, torch.zeros(1, 4), torch.tensor([0.1])).sum().backward()
    assert torch.equal(pred.grad, torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.25, 0.25]),
        ("exponential", [1.0, 0.25 ** (1 / 4), 0.25 ** (2 / 4)]),  # T is 4: delta^(0/4), delta^(1/4), delta^(2/4)
        ("snr", [0.75 / (1 + 1 / 3) ** 2 + 0.25, 0.75 / 4 + 0.25, 0.75 / 16 + 0.25]),  # sigma = 1 / sqrt(SNR): 1/3, 1, 3
    ],
)
def test_huber_delta_is_worked_out_by_hand(schedule: str, expected: list[float]) -> None:
    delta = huber_delta(torch.tensor([0, 1, 2]), torch.tensor([0.9, 0.5, 0.1, 0.05]), 0.25, schedule)
    torch.testing.assert_close(delta, torch.tensor(expected))


def test_prior_preservation_loss_with_delta_weighs_the_pseudo_huber_error() -> None:
    pred, target, weight = errors(90, 4)
    is_prior, delta = torch.tensor([True, False, False, True]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    loss = prior_preservation_loss(pred, target, is_prior, 0.5, weight, delta)
    each = [float(weight[i]) * 2 * pseudo_huber(float(delta[i]), (pred[i] - target[i]).double().numpy()).mean() for i in range(4)]
    assert loss.total.item() == pytest.approx((each[1] + each[2]) / 2 + 0.5 * (each[0] + each[3]) / 2, rel=1e-5)


def test_prior_preservation_loss_is_the_papers_two_halves() -> None:
    pred, target, _ = errors(10, 6)
    is_prior = torch.tensor([False] * 3 + [True] * 3)
    loss = prior_preservation_loss(pred, target, is_prior, 0.7, torch.ones(6))
    subject, prior = F.mse_loss(pred[:3], target[:3]), F.mse_loss(pred[3:], target[3:])
    torch.testing.assert_close(torch.stack(loss[:3]), torch.stack([subject + 0.7 * prior, subject, prior]), atol=1e-6, rtol=1e-6)


def test_prior_preservation_loss_of_two_samples_is_worked_out_by_hand() -> None:
    pred, target = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # squared errors 4/2 and 4/2
    loss = prior_preservation_loss(pred, target, torch.tensor([True, False]), 0.5, torch.tensor([3.0, 1.0]))
    assert [float(value) for value in loss[:3]] == [2.0 + 0.5 * 3 * 2.0, 2.0, 6.0]
    assert loss.per_sample.tolist() == [6.0, 2.0]


def test_prior_preservation_loss_keeps_its_value_when_samples_are_shuffled() -> None:
    pred, target, weight = errors(20, 7)
    is_prior = torch.tensor([True, False, True, True, False, True, False])
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    straight = prior_preservation_loss(pred, target, is_prior, 0.4, weight)
    shuffled = prior_preservation_loss(pred[order], target[order], is_prior[order], 0.4, weight[order])
    torch.testing.assert_close(torch.stack(shuffled[:3]), torch.stack(straight[:3]), atol=1e-6, rtol=1e-6)


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
    loss = Loss(*(torch.tensor(value, requires_grad=True) for value in (3.0, 1.0, 2.0)), torch.zeros(2))
    logs = loss.as_logs("train/")
    assert {key: float(value) for key, value in logs.items()} == {"train/loss": 3.0, "train/subject_loss": 1.0, "train/prior_loss": 2.0}
    assert not any(value.requires_grad for value in logs.values())


def test_mask_weight_by_hand() -> None:
    """One of four cells is half inside: shares 0.5, 0, 0, 0 and a background of 0.2 give 0.6, 0.2, 0.2, 0.2, whose mean is 0.3."""
    mask = torch.zeros(1, 1, 4, 4)
    mask[0, 0, 0, :2] = 1.0
    expected = torch.tensor([[[[2.0, 2 / 3], [2 / 3, 2 / 3]]]])
    torch.testing.assert_close(mask_weight(mask, (2, 2), 0.2), expected)


@pytest.mark.parametrize("background", [0.0, 0.1, 1.0])
def test_mask_weight_has_mean_one_whatever_the_subject_covers(background: float) -> None:
    masks = torch.zeros(3, 1, 32, 32)
    for k, side in enumerate((3, 16, 32)):
        masks[k, :, :side, :side] = 1.0
    torch.testing.assert_close(mask_weight(masks, (4, 4), background).mean((1, 2, 3)), torch.ones(3))


def test_mask_weight_without_background_ignores_a_sample_that_shows_none_of_the_subject() -> None:
    assert mask_weight(torch.zeros(1, 1, 8, 8), (2, 2), 0.0).tolist() == [[[[0.0, 0.0], [0.0, 0.0]]]]


@pytest.mark.parametrize("huber", [False, True])
def test_prior_preservation_loss_with_cell_weights_is_the_weighted_mean_of_each_sample(huber: bool) -> None:
    pred, target, weight = errors(80, 4)
    is_prior, delta = torch.tensor([False, True, False, True]), torch.full((4,), 0.3)
    cells = torch.rand(4, 1, *pred.shape[-2:], generator=torch.Generator().manual_seed(1))
    error = 2 * 0.3 * (((pred - target) ** 2 + 0.09).sqrt() - 0.3) if huber else (pred - target) ** 2
    by_hand = [float(weight[i] * (error[i] * cells[i]).mean()) for i in range(4)]
    loss = prior_preservation_loss(pred, target, is_prior, 0.5, weight, delta if huber else None, cells)
    assert float(loss.subject) == pytest.approx((by_hand[0] + by_hand[2]) / 2, rel=1e-5)
    assert float(loss.prior) == pytest.approx((by_hand[1] + by_hand[3]) / 2, rel=1e-5)
