"""Optimisers and learning-rate schedules. Typed choices of the config."""

import importlib.util
import math
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import torch

from dreambooth.adapters.methods import ParamGroup
from dreambooth.errors import ConfigError

SCHEDULES = ("constant", "cosine")
RATES = ("learning_rate", "text_encoder_learning_rate", "token_learning_rate")
LEAST_FACTOR = 0.01  # of the rate that Prodigy finds; below it stand rates that were meant for AdamW


@dataclass(slots=True)
class Optimizer:
    """Parent of the optimisers: learning rates by part, and their course over the steps."""

    name: str = "optimizer"
    learning_rate: float | None = None  # of the UNet or the adapter; null: the recipe of the base and the method
    text_encoder_learning_rate: float | None = None  # null: the recipe
    token_learning_rate: float | None = None  # of the identifier's embedding row; null: the recipe
    schedule: str = "constant"  # "constant" or "cosine" (to zero at max_steps), after the warm-up
    warmup_steps: int = 0  # steps from 0 to the full rate, from where a part begins to learn

    def __post_init__(self) -> None:
        for key in RATES:
            value = getattr(self, key)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"optim.{key}", "must be 0 or more and finite", value, "5e-6 is the paper's for Stable Diffusion")
        if self.schedule not in SCHEDULES:
            raise ConfigError("optim.schedule", f"must be one of {', '.join(SCHEDULES)}", self.schedule, "choose one of them")
        if self.warmup_steps < 0:
            raise ConfigError("optim.warmup_steps", "must be 0 or more", self.warmup_steps, "0 means none")

    def check(self, device: str, precision: str) -> None:
        """Refuses, before anything is loaded, what cannot run on this machine; by default nothing.

        Args:
            device: "cpu" or "cuda", where the training will be.
            precision: Lightning's name, as "16-mixed".

        Raises:
            ConfigError: a package or a device is missing, or two settings exclude each other.
        """

    def build(self, groups: list[ParamGroup], precision: str = "32-true") -> torch.optim.Optimizer:
        """Returns the optimiser over the groups, each at its part's learning rate.

        Args:
            groups: what learns.
            precision: Lightning's name, as "16-mixed".
        """
        raise NotImplementedError

    def rate(self, part: str) -> float:
        """Returns the full learning rate of a part: "unet", "text_encoder" or "token"."""
        return {"unet": self.learning_rate, "text_encoder": self.text_encoder_learning_rate, "token": self.token_learning_rate}[part]

    def factor(self, step: int, max_steps: int) -> float:
        """Returns what the learning rates are multiplied by at a step, in [0, 1]."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    def group_factors(self, groups: list[ParamGroup], max_steps: int) -> list[Callable[[int], float]]:
        """Returns a function of the step for each group: 0 while it does not learn, else its factor, counted from where it begins."""

        def of(group: ParamGroup) -> Callable[[int], float]:
            return lambda step: self.factor(step - group.start, max_steps - group.start) if group.learns_at(step) else 0.0

        return [of(group) for group in groups]


@dataclass(slots=True)
class Adam(Optimizer):
    """Parent of Adam's kin: the decay of the moments and of the weights; the identifier's row is never decayed."""

    name: str = "adam"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # decay of the two moments, each in [0, 1)
    weight_decay: float = 0.01  # per step, times the learning rate
    eps: float = 1e-8

    def __post_init__(self) -> None:
        Optimizer.__post_init__(self)
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError("optim.betas", "must be two numbers in [0, 1)", list(self.betas), "[0.9,0.999] is usual")
        if not (self.weight_decay >= 0 and self.eps > 0):  # NaN too
            got = f"weight_decay={self.weight_decay} eps={self.eps}"
            raise ConfigError("optim", "must have weight_decay >= 0 and eps > 0", got, "set both")

    def settings(self, groups: list[ParamGroup]) -> list[dict[str, Any]]:
        """Returns torch's form of the groups."""
        return [
            {
                "params": group.parameters,
                "lr": self.rate(group.part),
                "weight_decay": 0.0 if group.part == "token" else self.weight_decay,
                "name": group.part,
            }
            for group in groups
        ]


def _clips_when_fused(precision: str) -> bool:
    """Returns whether Lightning clips the gradients of a fused optimiser: under no mixed precision, bf16-mixed included."""
    return not precision.endswith("-mixed")


@dataclass(slots=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019); the identifier's row is never decayed."""

    name: str = "adamw"
    fused: bool | None = None  # one kernel for all parameters; null: yes, unless precision is mixed: Lightning clips no gradients then

    def check(self, device: str, precision: str) -> None:
        if self.fused and not _clips_when_fused(precision):
            rule = f"must not be true with trainer.precision={precision}, whose gradients it cannot clip"
            raise ConfigError("optim.fused", rule, True, "leave it out")

    def build(self, groups: list[ParamGroup], precision: str = "32-true") -> torch.optim.Optimizer:
        devices = {p.device.type for group in groups for p in group.parameters}
        fused = devices in ({"cpu"}, {"cuda"}) and _clips_when_fused(precision) if self.fused is None else self.fused
        return torch.optim.AdamW(self.settings(groups), betas=tuple(self.betas), eps=self.eps, fused=fused)


@dataclass(slots=True)
class AdamW8bit(Adam):
    """AdamW whose two moments are kept in 8 bits, a quarter of the memory (Dettmers et al. 2022); on CUDA, by the package bitsandbytes."""

    name: str = "adamw8bit"

    def check(self, device: str, precision: str) -> None:
        if device != "cuda":
            raise ConfigError("optim", "must not be adamw8bit without a CUDA GPU", device, "choose optim=adamw")
        _require_package("bitsandbytes", "adamw8bit")

    def build(self, groups: list[ParamGroup], precision: str = "32-true") -> torch.optim.Optimizer:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(self.settings(groups), betas=tuple(self.betas), eps=self.eps)


@dataclass(slots=True)
class Prodigy(Adam):
    """Adam that finds its own learning rate (Mishchenko & Defazio 2024), by the package prodigyopt; the rates here are factors of it, usually 1."""

    name: str = "prodigy"
    learning_rate: float | None = 1.0  # factor of the rate found; one for all parts, or 0 for a part that shall not learn
    text_encoder_learning_rate: float | None = 1.0
    token_learning_rate: float | None = 1.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])  # decay of the two moments, each in [0, 1)
    d_coef: float = 1.0  # the rate found is multiplied by it; above 0
    use_bias_correction: bool = True  # as in Adam; the authors' advice for diffusion models
    safeguard_warmup: bool = True  # keeps a warm-up out of the estimate of the rate

    def __post_init__(self) -> None:
        Adam.__post_init__(self)
        if not 0 < self.d_coef < math.inf:
            raise ConfigError("optim.d_coef", "must be above 0 and finite", self.d_coef, "1.0 is the authors'")
        rates = {getattr(self, key) for key in RATES} - {0, None}
        if len(rates) > 1:
            raise ConfigError("optim", "must have one rate for all parts, or 0: prodigy finds a single one", sorted(rates), "set all three to 1.0")

    def check(self, device: str, precision: str) -> None:
        for key in RATES:  # not at once, so that the run folders of others can still be read
            value = getattr(self, key)
            if value is not None and 0 < value < LEAST_FACTOR:
                rule = "must be about 1 with optim=prodigy, which finds the rate itself and takes this as a factor of it"
                raise ConfigError(f"optim.{key}", rule, value, f"add {' '.join(f'optim.{rate}=1.0' for rate in RATES)}")
        _require_package("prodigyopt", "prodigy")

    def build(self, groups: list[ParamGroup], precision: str = "32-true") -> torch.optim.Optimizer:
        _require_package("prodigyopt", "prodigy")
        from prodigyopt import Prodigy as ProdigyOptimizer

        settings = self.settings(groups)
        with redirect_stdout(StringIO()):  # it announces its weight decay
            return ProdigyOptimizer(
                settings,
                betas=tuple(self.betas),
                eps=self.eps,
                decouple=True,
                d_coef=self.d_coef,
                use_bias_correction=self.use_bias_correction,
                safeguard_warmup=self.safeguard_warmup,
            )


def _require_package(package: str, choice: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError("optim", f"needs the package {package}", choice, f"run pip install {package}, or choose optim=adamw")
