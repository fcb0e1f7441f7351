"""Optimisers and learning-rate schedules. Typed choices of the config."""

import math
from dataclasses import dataclass, field

import torch

from dreambooth.adapters import ParamGroup
from dreambooth.errors import ConfigError

SCHEDULES = ("constant", "cosine")


@dataclass(slots=True)
class Optimizer:
    """Parent of the optimisers: learning rates by part, and their course over the steps."""

    name: str = "optimizer"
    learning_rate: float | None = None  # of the UNet or the adapter; null: the base's recipe
    text_encoder_learning_rate: float | None = None  # null: the base's recipe
    token_learning_rate: float | None = None  # of the identifier's embedding row; null: the base's recipe
    schedule: str = "constant"  # "constant" or "cosine" (to zero at max_steps), after the warm-up
    warmup_steps: int = 0  # steps from 0 to the full rate

    def __post_init__(self) -> None:
        for key in ("learning_rate", "text_encoder_learning_rate", "token_learning_rate"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"optim.{key}", "must be 0 or more and finite", value, "5e-6 is the paper's for Stable Diffusion")
        if self.schedule not in SCHEDULES:
            raise ConfigError("optim.schedule", f"must be one of {', '.join(SCHEDULES)}", self.schedule, "choose one of them")
        if self.warmup_steps < 0:
            raise ConfigError("optim.warmup_steps", "must be 0 or more", self.warmup_steps, "0 means none")

    def build(self, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        """Returns the optimiser over the groups, each at its part's learning rate."""
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


@dataclass(slots=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019); the identifier's row is never decayed."""

    name: str = "adamw"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # decay of the two moments, each in [0, 1)
    weight_decay: float = 0.01  # per step, times the learning rate
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super(AdamW, self).__post_init__()
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError("optim.betas", "must be two numbers in [0, 1)", list(self.betas), "[0.9,0.999] is usual")
        if not (self.weight_decay >= 0 and self.eps > 0):  # NaN too
            raise ConfigError("optim", "must have weight_decay >= 0 and eps > 0", f"weight_decay={self.weight_decay} eps={self.eps}", "set both")

    def build(self, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        settings = [
            {"params": g.parameters, "lr": self.rate(g.part), "weight_decay": 0.0 if g.part == "token" else self.weight_decay, "name": g.part}
            for g in groups
        ]
        return torch.optim.AdamW(settings, betas=tuple(self.betas), eps=self.eps)
