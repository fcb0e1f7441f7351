"""Objectives: what the UNet is asked to predict, and how much each timestep counts. Typed choices of the config."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dreambooth import randomness
from dreambooth.base.protocol import BaseModel
from dreambooth.diffusion import WEIGHTINGS, add_noise, capped_velocity_weight, min_snr_weight, prediction_target
from dreambooth.errors import ConfigError


class Corrupted(NamedTuple):
    """A noised batch: what goes in, at which timestep, what should come out, and how much it counts."""

    noisy: Tensor  # (B, C, h, w)
    t: Tensor  # (B,) integers in [0, T)
    target: Tensor  # (B, C, h, w)
    weight: Tensor  # (B,)


@dataclass(slots=True)
class Objective:
    """Parent of the objectives: draws timesteps and noise, and weighs the samples."""

    name: str = "objective"
    weighting: str | None = None  # "uniform" (the paper), "min_snr" (Hang et al. 2023), "capped_velocity"; null: the base's recipe
    snr_gamma: float = 5.0  # cap of min_snr and capped_velocity; > 0

    def __post_init__(self) -> None:
        if self.weighting is not None and self.weighting not in WEIGHTINGS:
            raise ConfigError("objective.weighting", f"must be one of {', '.join(WEIGHTINGS)}", self.weighting, "choose one of them")
        if not self.snr_gamma > 0:  # NaN too
            raise ConfigError("objective.snr_gamma", "must be above 0", self.snr_gamma, "5.0 is the paper's")

    def corrupt(self, latents: Tensor, keys: Tensor, base: BaseModel) -> Corrupted:
        """Returns the batch noised at random timesteps, with its targets and weights.

        Args:
            latents: (B, C, h, w) clean latents.
            keys: (B, 3) integers (seed, step, sample): all that the noise and the timestep depend on.
            base: gives the schedule and the prediction type.
        """
        acp, kind = base.alphas_cumprod, base.prediction_type
        t = torch.tensor([randomness.integer(len(acp), randomness.TIMESTEP, *key) for key in keys.tolist()], device=latents.device)  # (B,)
        noise = randomness.normals(latents.shape[1:], randomness.NOISE, keys).to(latents)  # (B, C, h, w)
        return Corrupted(add_noise(latents, noise, t, acp), t, prediction_target(kind, latents, noise, t, acp), self.weight(t, acp, kind))

    def weight(self, t: Tensor, alphas_cumprod: Tensor, prediction_type: str) -> Tensor:
        """Returns how much each sample counts, (B,)."""
        if self.weighting == "min_snr":
            return min_snr_weight(t, alphas_cumprod, self.snr_gamma, prediction_type)
        if self.weighting == "capped_velocity":
            return capped_velocity_weight(t, alphas_cumprod, self.snr_gamma, prediction_type)
        return torch.ones(len(t), device=t.device)


@dataclass(slots=True)
class FollowBase(Objective):
    """Predicts what the base was trained to predict: noise, velocity or clean latents (`base.prediction_type`)."""

    name: str = "follow_base"
