"""Objectives: which error the loss measures, how the noise is made, and how much each timestep counts. Typed choices of the config.

What the UNet outputs (noise, velocity or clean latents) is a property of its base and never changes: a few hundred steps on a few photos
cannot teach it another output, and the pipeline would read it wrongly meanwhile. What an objective chooses is the quantity whose error
is measured. Given the noisy latents the three follow from each other, so `objective=velocity` on a base that predicts noise trains the
velocity that its noise implies; in the loss that is one factor a timestep (`diffusion.error_scale`).
"""

import inspect
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dreambooth import randomness
from dreambooth.base.protocol import BaseModel
from dreambooth.diffusion import (
    HUBER_SCHEDULES,
    WEIGHTINGS,
    add_noise,
    capped_velocity_weight,
    error_scale,
    huber_delta,
    min_snr_weight,
    prediction_target,
    rescale_zero_terminal_snr,
)
from dreambooth.errors import ConfigError

NAMES = {"epsilon": "the noise (epsilon)", "v_prediction": "the velocity", "sample": "the clean latents (x0)"}


class Corrupted(NamedTuple):
    """A noised batch: what goes in, at which timestep, what should come out, and how its error counts."""

    noisy: Tensor  # (B, C, h, w)
    t: Tensor  # (B,) integers in [0, T)
    target: Tensor  # (B, C, h, w), of the kind that the base predicts
    weight: Tensor  # (B,)
    delta: Tensor | None  # (B,) of the pseudo-Huber error; None: squared error


@dataclass(slots=True)
class Objective:
    """Parent of the objectives: draws timesteps and noise, and weighs the samples."""

    measures: ClassVar[str | None] = None  # the quantity whose error is the loss; None: what the base predicts

    name: str = "objective"
    weighting: str | None = None  # "uniform" (the paper), "min_snr" (Hang et al. 2023), "capped_velocity"; null: the base's recipe
    snr_gamma: float = 5.0  # cap of min_snr and capped_velocity; > 0
    noise_offset: float = 0.0  # strength of one more draw of noise a channel, the same in every cell, for dark and bright pictures; 0.1 is usual
    input_perturbation: float = 0.0  # more noise in the input that the target does not know of (Ning et al. 2023); 0.1 is the paper's
    min_timestep: int = 0  # first timestep that is trained, in [0, T); T is 1000 for Stable Diffusion
    max_timestep: int | None = None  # last timestep that is trained, in [0, T); null: T - 1
    zero_terminal_snr: bool = False  # train and sample with a schedule that ends in pure noise (Lin et al. 2024); not for epsilon
    huber_delta: float | None = None  # pseudo-Huber error, linear above this, in (0, 1]; 0.1 is usual; null: squared error
    huber_schedule: str = "exponential"  # of huber_delta over t: "exponential" (Khrapov et al. 2024), "snr", "constant"

    def __post_init__(self) -> None:
        def require(holds: bool, key: str, rule: str, next_step: str) -> None:
            if not holds:
                raise ConfigError(f"objective.{key}", rule, getattr(self, key), next_step)

        require(self.weighting in (None, *WEIGHTINGS), "weighting", f"must be one of {', '.join(WEIGHTINGS)}", "choose one of them")
        require(self.snr_gamma > 0, "snr_gamma", "must be above 0", "5.0 is the paper's")  # NaN too
        for key in ("noise_offset", "input_perturbation"):
            require(0 <= getattr(self, key) < math.inf, key, "must be 0 or more and finite", "0 is off, 0.1 is usual")
        require(self.min_timestep >= 0, "min_timestep", "must be 0 or more", "0 trains from the cleanest timestep on")
        last = self.max_timestep
        from_first = f"must be objective.min_timestep ({self.min_timestep}) or more"
        require(last is None or last >= self.min_timestep, "max_timestep", from_first, "raise it, or leave it out")
        delta = self.huber_delta
        require(delta is None or 0 < delta <= 1, "huber_delta", "must be above 0 and at most 1", "0.1 is usual; null is the squared error")
        known = f"must be one of {', '.join(HUBER_SCHEDULES)}"
        require(self.huber_schedule in HUBER_SCHEDULES, "huber_schedule", known, "choose one of them")

    def check(self, base: BaseModel) -> None:
        """Refuses what a base cannot be trained with; costs nothing.

        Raises:
            ConfigError: a timestep that the base has not, or a zero terminal SNR where the noise is predicted or measured.
        """
        steps = len(base.alphas_cumprod)
        for key in ("min_timestep", "max_timestep"):
            if (getattr(self, key) or 0) >= steps:
                raise ConfigError(f"objective.{key}", f"must be below {steps}, the timesteps of this base", getattr(self, key), f"take {steps - 1}")
        if not self.zero_terminal_snr:
            return
        where, rule = "objective.zero_terminal_snr", "at the last timestep the input is the noise itself, so there is nothing to learn"
        if base.prediction_type == "epsilon":
            next_step = "take a v-prediction base (base=sd21), or objective.noise_offset=0.1 for dark and bright pictures"
            raise ConfigError(where, f"must be false for a base that predicts the noise: {rule}", True, next_step)
        if self.measured(base) == "epsilon":
            raise ConfigError(where, f"must be false with objective=epsilon: {rule}", True, "take objective=velocity")

    def prepare(self, base: BaseModel) -> None:
        """Gives a base the schedule that this objective trains on, in place; sampling and export follow, as they ask the base.

        With `zero_terminal_snr` the un-tuned base is drawn with the new schedule as well, so step 0 of a run is not quite the stock model.

        Raises:
            ConfigError: as `check`.
        """
        self.check(base)
        if not self.zero_terminal_snr:
            return
        from diffusers import DDIMScheduler

        # Trailing spacing starts at the last timestep, which the new schedule is all about (Lin et al. 2024, sec. 3.3).
        changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        kind = type(base.scheduler)
        if "rescale_betas_zero_snr" not in inspect.signature(kind.__init__).parameters:
            kind, changes = DDIMScheduler, changes | {"clip_sample": False}  # latents are not bounded; DDIM's default would clip them
        base.scheduler = base.new_scheduler(kind, **changes)
        base.alphas_cumprod = rescale_zero_terminal_snr(base.alphas_cumprod)

    def measured(self, base: BaseModel) -> str:
        """Returns the quantity whose error is the loss: "epsilon", "v_prediction" or "sample"."""
        return self.measures or base.prediction_type

    def corrupt(self, latents: Tensor, keys: Tensor, base: BaseModel) -> Corrupted:
        """Returns the batch noised at random timesteps, with its targets and weights.

        Args:
            latents: (B, C, h, w) clean latents.
            keys: (B, 3) integers (seed, step, sample): all that the noise and the timestep depend on.
            base: gives the schedule and the prediction type; it went through `prepare`.
        """
        acp, kind = base.alphas_cumprod, base.prediction_type
        count = (len(acp) if self.max_timestep is None else self.max_timestep + 1) - self.min_timestep
        drawn = [self.min_timestep + randomness.integer(count, randomness.TIMESTEP, *key) for key in keys.tolist()]
        t = torch.tensor(drawn, device=latents.device)  # (B,)
        noise = randomness.normals(latents.shape[1:], randomness.NOISE, keys).to(latents)  # (B, C, h, w)
        if self.noise_offset:
            noise = noise + self.noise_offset * randomness.normals((latents.shape[1], 1, 1), randomness.OFFSET, keys).to(latents)
        used = noise
        if self.input_perturbation:
            used = noise + self.input_perturbation * randomness.normals(latents.shape[1:], randomness.PERTURBATION, keys).to(latents)
        target = prediction_target(kind, latents, noise, t, acp)
        return Corrupted(add_noise(latents, used, t, acp), t, target, *self.weigh(t, acp, kind))

    def weigh(self, t: Tensor, alphas_cumprod: Tensor, prediction_type: str) -> tuple[Tensor, Tensor | None]:
        """Returns the weight (B,) of each sample's error in what the base predicts, and the delta (B,) of its pseudo-Huber error.

        Both carry the change to the measured quantity: an error s times as large has the squared error s^2 times, and, since
        Huber(s e; delta) = s^2 Huber(e; delta / s), the pseudo-Huber error too.
        """
        measured = self.measures or prediction_type
        scale = error_scale(t, alphas_cumprod, prediction_type, measured)  # (B,)
        weight = scale.square() * self.timestep_weight(t, alphas_cumprod, measured)
        if self.huber_delta is None:
            return weight, None
        delta = huber_delta(t, alphas_cumprod, self.huber_delta, self.huber_schedule)
        return weight, delta / scale.clamp(min=1e-6)  # a scale of 0 has weight 0

    def timestep_weight(self, t: Tensor, alphas_cumprod: Tensor, measured: str) -> Tensor:
        """Returns how much an error in the measured quantity counts at each timestep, (B,)."""
        if self.weighting == "min_snr":
            return min_snr_weight(t, alphas_cumprod, self.snr_gamma, measured)
        if self.weighting == "capped_velocity":
            return capped_velocity_weight(t, alphas_cumprod, self.snr_gamma, measured)
        return torch.ones(len(t), device=t.device, dtype=torch.float32)

    def describe(self, base: BaseModel) -> str:
        """Returns what is trained, in one line for people."""
        measured, told = self.measured(base), f"objective: the UNet predicts {NAMES[base.prediction_type]}"
        if measured != base.prediction_type:
            told += f", as its base; the loss is that of {NAMES[measured]} which follows from it"
        weights = {"min_snr": f"min-SNR weights (gamma {self.snr_gamma:g})", "capped_velocity": f"velocity weights capped at {self.snr_gamma:g}"}
        told += ", " + weights.get(str(self.weighting), "every timestep weighs the same")
        last = len(base.alphas_cumprod) - 1 if self.max_timestep is None else self.max_timestep
        options = {
            f"timesteps {self.min_timestep} to {last}": (self.min_timestep, last) != (0, len(base.alphas_cumprod) - 1),
            f"noise offset {self.noise_offset:g}": self.noise_offset,
            f"input perturbation {self.input_perturbation:g}": self.input_perturbation,
            f"pseudo-Huber error ({self.huber_schedule}, delta {self.huber_delta})": self.huber_delta is not None,
            "zero terminal SNR (trained and sampled from pure noise, trailing timesteps)": self.zero_terminal_snr,
        }
        return ", ".join([told, *(text for text, is_on in options.items() if is_on)])


@dataclass(slots=True)
class FollowBase(Objective):
    """The error in what the base was trained to predict: noise, velocity or clean latents (`base.prediction_type`)."""

    name: str = "follow_base"


@dataclass(slots=True)
class Epsilon(Objective):
    """The error in the noise (Ho et al. 2020, eq. 14): the loss of Stable Diffusion 1, whatever the base predicts."""

    measures: ClassVar[str | None] = "epsilon"
    name: str = "epsilon"


@dataclass(slots=True)
class Velocity(Objective):
    """The error in the velocity (Salimans & Ho 2022): the loss of Stable Diffusion 2.1 at 768 px, whatever the base predicts."""

    measures: ClassVar[str | None] = "v_prediction"
    name: str = "velocity"


@dataclass(slots=True)
class Sample(Objective):
    """The error in the clean latents (x-prediction), whatever the base predicts; it looks away from fine detail."""

    measures: ClassVar[str | None] = "sample"
    name: str = "sample"
