"""The mathematics of diffusion training: schedules, noising, targets, timestep weights, the prior-preservation loss.

Symbols follow Ho et al. 2020: `x0` clean latents, `t` integer timesteps, `alphas_cumprod[t]` the share of signal variance that
is left at t; sigma^2 = 1 - alphas_cumprod. Every function is pure, per sample first, and reduces last, in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
WEIGHTINGS = ("uniform", "min_snr", "capped_velocity")
HUBER_SCHEDULES = ("exponential", "snr", "constant")


class Loss(NamedTuple):
    """What one training step gives: three scalars, `total = subject + prior_loss_weight * prior`, and what they are made of."""

    total: Tensor
    subject: Tensor
    prior: Tensor
    per_sample: Tensor  # (B,) float32, detached: each sample's own, by its timestep's weight but without lambda

    def as_logs(self, prefix: str) -> dict[str, Tensor]:
        """Returns detached values under the metric keys that dashboards use."""
        return {f"{prefix}loss": self.total.detach(), f"{prefix}subject_loss": self.subject.detach(), f"{prefix}prior_loss": self.prior.detach()}


def scaled_linear_alphas_cumprod(num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """Returns the share of signal variance left after each step of Stable Diffusion's schedule.

    Args:
        num_steps: T, number of timesteps; at least 1.
        beta_start, beta_end: noise variance added at the first and the last step; in (0, 1).

    Returns:
        (T,) float32, falling from nearly 1 to nearly 0. Betas are linear in their square root
        (Rombach et al. 2022, the released configs).
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Returns the schedule shifted and stretched so that the last timestep is pure noise (Lin et al. 2024, alg. 1).

    Args:
        alphas_cumprod: (T,), falling.

    Returns:
        (T,) like it: the first value as before, the last exactly 0. A schedule that ends at 0 comes back unchanged.
    """
    amplitude = alphas_cumprod.double().sqrt()
    first, last = amplitude[0], amplitude[-1]
    return ((amplitude - last) * first / (first - last)).square().to(alphas_cumprod.dtype)


def _at(t: Tensor, alphas_cumprod: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns signal and noise amplitudes (sqrt of alphas_cumprod, sqrt of the rest) at t, shaped to broadcast over `like`."""
    signal = alphas_cumprod.to(like.device)[t].float().reshape(-1, *[1] * (like.ndim - 1))  # (B, 1, 1, 1)
    return signal.sqrt(), (1.0 - signal).sqrt()


def add_noise(x0: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Returns the noisy latents at timestep t (Ho et al. 2020, eq. 4).

    Args:
        x0, noise: (B, C, h, w).
        t: (B,) integers in [0, T).
        alphas_cumprod: (T,).
    """
    alpha, sigma = _at(t, alphas_cumprod, x0)
    return alpha * x0 + sigma * noise


def velocity(x0: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Returns v = alpha * noise - sigma * x0, the target of v-prediction (Salimans & Ho 2022, appendix D)."""
    alpha, sigma = _at(t, alphas_cumprod, x0)
    return alpha * noise - sigma * x0


def prediction_target(prediction_type: str, x0: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Returns what the UNet should output, like x0: the noise, the velocity, or the clean latents.

    Raises:
        ValueError: for a prediction type other than "epsilon", "v_prediction" and "sample".
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return velocity(x0, noise, t, alphas_cumprod)
    if prediction_type == "sample":
        return x0
    raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")


def signal_to_noise(t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Returns SNR(t) = alphas_cumprod / (1 - alphas_cumprod), (B,) float32."""
    signal = alphas_cumprod.to(t.device)[t].float()
    return signal / (1.0 - signal)


def error_scale(t: Tensor, alphas_cumprod: Tensor, predicted: str, measured: str) -> Tensor:
    """Returns how large an error in one quantity is in another, (B,): 1 when both are the same.

    Given the noisy latents, any two of noise, velocity and clean latents follow from the third, linearly (Salimans & Ho 2022, sec. 4 and
    appendix D): an error of 1 in x0 is one of alpha / sigma in epsilon and of 1 / sigma in v. So the loss of one quantity is the loss
    of another times the square of this.

    Args:
        t: (B,) integers in [0, T).
        alphas_cumprod: (T,).
        predicted: the quantity that has the error, one of `PREDICTION_TYPES`.
        measured: the quantity that the error is wanted in, likewise.
    """
    signal = alphas_cumprod.to(t.device)[t].float()
    alpha, sigma, one = signal.sqrt(), (1.0 - signal).sqrt(), torch.ones_like(signal)
    if predicted == measured:
        return one  # also where a quotient would be 0 / 0
    in_units_of_v = {"v_prediction": one, "sample": sigma, "epsilon": alpha}
    return in_units_of_v[measured] / in_units_of_v[predicted]


def min_snr_weight(t: Tensor, alphas_cumprod: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Returns the min-SNR-gamma weight of each sample, (B,) (Hang et al. 2023, sec. 3.4).

    The weight of the *implied x0 error* is min(SNR, gamma), so the weight of the predicted quantity's error is that times
    1 for x0, 1/SNR for epsilon and 1/(SNR + 1) for v.
    """
    snr = signal_to_noise(t, alphas_cumprod)
    return snr.clamp(max=gamma) / {"sample": torch.ones_like(snr), "epsilon": snr, "v_prediction": snr + 1.0}[prediction_type]


def capped_velocity_weight(t: Tensor, alphas_cumprod: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Returns the weight (B,) that makes the loss that of v-prediction, capped at gamma.

    The velocity error is the x0 error over sigma and the epsilon error over alpha (Salimans & Ho 2022, sec. 4), so the weights
    are 1/sigma^2 for x0, 1/alpha^2 for epsilon and 1 for v.
    """
    signal = alphas_cumprod.to(t.device)[t].float()
    weight = {"sample": 1.0 / (1.0 - signal), "epsilon": 1.0 / signal, "v_prediction": torch.ones_like(signal)}[prediction_type]
    return weight.clamp(max=gamma)


def huber_delta(t: Tensor, alphas_cumprod: Tensor, delta: float, schedule: str) -> Tensor:
    """Returns where the pseudo-Huber loss turns from quadratic to linear at each timestep, (B,).

    Args:
        t: (B,) integers in [0, T).
        alphas_cumprod: (T,).
        delta: in (0, 1]; in units of the measured quantity, whose standard deviation is about 1.
        schedule: "exponential": delta^(t / T), so 1 at the clean end and delta at the noisy end, as photos that do not fit disturb the
            coarse, noisy steps most (Khrapov et al. 2024, "scheduled pseudo-Huber loss"); "snr": (1 - delta) / (1 + sigma)^2 + delta with
            sigma^2 = 1 / SNR, the variant in common trainers; "constant": delta everywhere, the plain pseudo-Huber loss.
    """
    if schedule == "exponential":
        return delta ** (t.float() / len(alphas_cumprod))
    if schedule == "snr":
        return (1.0 - delta) / (1.0 + signal_to_noise(t, alphas_cumprod).rsqrt()).square() + delta
    return torch.full(t.shape, float(delta), device=t.device, dtype=torch.float32)


def mask_weight(mask: Tensor, size: tuple[int, int], background: float) -> Tensor:
    """Returns how much each latent cell counts under masks, (B, 1, h, w) float32, with mean 1 for each sample.

    1 inside and `background` outside, in proportion to the area of a cell that is inside, then divided by the sample's mean: so the loss
    is the mean over the subject's cells (for a background of 0), and a small subject's is as large as a large one's.

    Args:
        mask: (B, 1, H, W) in [0, 1], 1 where the subject is.
        size: (h, w) of the latents.
        background: weight outside, in [0, 1]. A sample that shows nothing but background counts evenly, and not at all if this is 0.
    """
    inside = torch.nn.functional.adaptive_avg_pool2d(mask.float(), size)  # (B, 1, h, w)
    weight = background + (1.0 - background) * inside
    return weight / weight.mean((1, 2, 3), keepdim=True).clamp(min=1e-6)


def per_sample_error(pred: Tensor, target: Tensor, delta: Tensor | None = None, cell_weight: Tensor | None = None) -> Tensor:
    """Returns the mean error of each sample, (B,) float32: squared, or pseudo-Huber where `delta` is given.

    Args:
        pred, target: (B, C, h, w).
        delta: (B,), or None for the squared error. The pseudo-Huber error 2 delta (sqrt(e^2 + delta^2) - delta) of an element is e^2
            where e is small against delta and 2 delta |e| where it is large.
        cell_weight: (B, 1, h, w) of each cell's error, with mean 1 (see `mask_weight`); None: all count alike.
    """
    error = (pred.float() - target.float()).square()  # (B, C, h, w)
    if delta is not None:
        delta = delta.float().reshape(-1, *[1] * (error.ndim - 1))  # (B, 1, 1, 1)
        error = 2.0 * delta * error / ((error + delta.square()).sqrt() + delta)  # a - b as (a^2 - b^2) / (a + b): no cancellation
    return (error if cell_weight is None else error * cell_weight.to(error)).flatten(1).mean(1)


def prior_preservation_loss(
    pred: Tensor,
    target: Tensor,
    is_prior: Tensor,
    prior_loss_weight: float,
    weight: Tensor,
    delta: Tensor | None = None,
    cell_weight: Tensor | None = None,
) -> Loss:
    """Returns the subject loss plus lambda times the class loss (Ruiz et al. 2023, eq. 2).

    Args:
        pred, target: (B, C, h, w), what the UNet said and what it should have said.
        is_prior: (B,) bool, True for class images. Samples may come in any order and any proportion.
        prior_loss_weight: lambda; 1.0 in the paper. 0.0 leaves only the subject.
        weight: (B,) timestep weight of each sample; ones for the paper's loss.
        delta: (B,) of the pseudo-Huber error, or None for the paper's squared error.
        cell_weight: (B, 1, h, w) of each latent cell, with mean 1 for each sample, or None: see `mask_weight`.

    Each term is the mean over its own samples of the weighted mean error, so the ratio of subject to class images
    in a batch does not change their balance: lambda alone does. A kind with no sample contributes 0.
    """
    per_sample = weight.float() * per_sample_error(pred, target, delta, cell_weight)  # (B,)
    prior = is_prior.to(per_sample.dtype)
    subject_loss = (per_sample * (1.0 - prior)).sum() / (1.0 - prior).sum().clamp(min=1.0)
    prior_loss = (per_sample * prior).sum() / prior.sum().clamp(min=1.0)
    return Loss(subject_loss + prior_loss_weight * prior_loss, subject_loss, prior_loss, per_sample.detach())
