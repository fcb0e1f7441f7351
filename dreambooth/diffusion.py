"""The mathematics of diffusion training: schedules, noising, targets, timestep weights, the prior-preservation loss.

Symbols follow Ho et al. 2020: `x0` clean latents, `t` integer timesteps, `alphas_cumprod[t]` the share of signal variance that
is left at t; sigma^2 = 1 - alphas_cumprod. Every function is pure, per sample first, and reduces last, in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
WEIGHTINGS = ("uniform", "min_snr", "capped_velocity")


class Loss(NamedTuple):
    """The three numbers of one training step; all scalars, `total = subject + prior_loss_weight * prior`."""

    total: Tensor
    subject: Tensor
    prior: Tensor

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


def prior_preservation_loss(pred: Tensor, target: Tensor, is_prior: Tensor, prior_loss_weight: float, weight: Tensor) -> Loss:
    """Returns the subject loss plus lambda times the class loss (Ruiz et al. 2023, eq. 2).

    Args:
        pred, target: (B, C, h, w), what the UNet said and what it should have said.
        is_prior: (B,) bool, True for class images. Samples may come in any order and any proportion.
        prior_loss_weight: lambda; 1.0 in the paper. 0.0 leaves only the subject.
        weight: (B,) timestep weight of each sample; ones for the paper's loss.

    Each term is the mean over its own samples of the weighted mean squared error, so the ratio of subject to class images
    in a batch does not change their balance: lambda alone does. A kind with no sample contributes 0.
    """
    per_sample = weight.float() * (pred.float() - target.float()).pow(2).flatten(1).mean(1)  # (B,)
    prior = is_prior.to(per_sample.dtype)
    subject_loss = (per_sample * (1.0 - prior)).sum() / (1.0 - prior).sum().clamp(min=1.0)
    prior_loss = (per_sample * prior).sum() / prior.sum().clamp(min=1.0)
    return Loss(subject_loss + prior_loss_weight * prior_loss, subject_loss, prior_loss)
