"""Priors: what keeps the class from drifting into the subject. Typed choices of the config, and the frozen model that one of them asks.

All of them are one term of the loss, lambda times an error on samples whose caption names the class alone: against images of the class
(`class_images`), or against what the un-tuned model says (`self_distilled`).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dreambooth.base.protocol import BaseModel
from dreambooth.errors import ConfigError

SHAPES = ("linear", "cosine")


@dataclass(slots=True)
class Prior:
    """Parent of the ways to keep the class from drifting into the subject."""

    name: str = "prior"

    @property
    def templates(self) -> list[str]:
        """The captions of the class samples, {subject} standing for the class noun; empty without a class term."""
        return []

    @property
    def class_samples(self) -> int:
        """Class samples in a batch."""
        return 0

    @property
    def wants_bank(self) -> bool:
        """Whether images of the class are needed."""
        return False

    @property
    def asks_frozen_model(self) -> bool:
        """Whether the targets of the class samples are the un-tuned model's predictions."""
        return False

    def weight_at(self, step: int, max_steps: int) -> float:
        """Returns lambda at a step: a function of the step alone, so a continued run goes on where it was.

        Args:
            step: optimiser steps done, in [0, max_steps).
            max_steps: optimiser steps of the whole run.
        """
        return 0.0


@dataclass(slots=True)
class NoPrior(Prior):
    """Fine-tunes on the subject alone."""

    name: str = "none"


@dataclass(slots=True)
class ClassTerm(Prior):
    """Parent of the priors that add a class term to the loss."""

    weight: float = 1.0  # lambda, of the class term in the loss; the paper's is 1
    weight_end: float | None = None  # lambda at the last step; null: `weight` all along
    weight_shape: str = "linear"  # of the way from weight to weight_end: "linear" or "cosine"
    batch_size: int | None = None  # class samples a step; null: the base's recipe
    num_images: int | None = None  # class images of each class; the paper used about 1000, 200 are usual; null: the base's recipe
    prompts: list[str] | None = None  # captions of the class samples, in turn; {subject} becomes the class noun; null: the base's recipe
    class_dir: str | None = None  # your own class images, all used; {subject} is the class noun; of several classes it holds a folder each
    top_up: bool = False  # generate what your images lack of num_images; without class_dir that is all, and as good as false
    seed: int = 0  # of the generated class images; not the training seed, so that runs with other seeds share them

    def __post_init__(self) -> None:
        def require(holds: bool, key: str, rule: str, next_step: str) -> None:
            if not holds:
                raise ConfigError(f"prior.{key}", rule, getattr(self, key), next_step)

        require(self.weight >= 0, "weight", "must be 0 or more", "1.0 is the paper's")  # NaN too
        require(self.weight_end is None or self.weight_end >= 0, "weight_end", "must be 0 or more", "null keeps prior.weight all along")
        for key in ("weight", "weight_end"):
            require(getattr(self, key) is None or math.isfinite(getattr(self, key)), key, "must be finite", "1.0 is the paper's")
        require(self.weight_shape in SHAPES, "weight_shape", f"must be one of {', '.join(SHAPES)}", "choose one of them")
        for key in ("batch_size", "num_images"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be above 0", "set a positive number, or null for the base's recipe")
        for text in self.prompts or []:
            if "{subject}" not in text:
                raise ConfigError("prior.prompts", "must name the subject as {subject}", text, 'write it like "a photo of a {subject}"')
        require(self.prompts != [], "prompts", "must hold at least one prompt", "leave it out for the base's recipe")
        require(self.seed >= 0, "seed", "must be 0 or more", "any whole number will do")

    @property
    def templates(self) -> list[str]:
        return self.prompts or []

    @property
    def class_samples(self) -> int:
        return self.batch_size or 0

    @property
    def wants_bank(self) -> bool:
        return True

    def weight_at(self, step: int, max_steps: int) -> float:
        if self.weight_end is None:
            return self.weight
        done = min(step / max(max_steps - 1, 1), 1.0)  # 0 at the first step, 1 at the last
        if self.weight_shape == "cosine":
            done = (1.0 - math.cos(math.pi * done)) / 2.0
        return self.weight + (self.weight_end - self.weight) * done

    def describe_weight(self) -> str:
        """Returns lambda in words."""
        if self.weight_end is None:
            return f"prior loss weight {self.weight:g}"
        return f"prior loss weight from {self.weight:g} to {self.weight_end:g} ({self.weight_shape})"


@dataclass(slots=True)
class ClassImages(ClassTerm):
    """Class images of the un-tuned base in every batch, with the prior-preservation loss (Ruiz et al. 2023)."""

    name: str = "class_images"


@dataclass(slots=True)
class RecipePrior(ClassImages):
    """The prior that belongs to the method: class images; none for textual inversion, whose word no class prompt has."""

    name: str = "recipe"


@dataclass(slots=True)
class SelfDistilled(ClassTerm):
    """The tuned model shall say under a class prompt what the un-tuned one says there, on the same noisy latents.

    No class image is needed: by default the latents are the subject's own photos, whose every pairing with a prompt takes its turn.
    The price is one more forward pass for the class samples, and the un-tuned values of what learns beside the learned ones.
    """

    name: str = "self_distilled"
    images: str = "subject"  # whose noisy latents: the "subject" photos, or "class" images (a bank, as in class_images)

    def __post_init__(self) -> None:
        ClassTerm.__post_init__(self)
        if self.images not in ("subject", "class"):
            raise ConfigError("prior.images", "must be subject or class", self.images, "choose one")
        if self.images == "subject" and self.class_dir is not None:
            raise ConfigError("prior.class_dir", "must be null unless prior.images=class", self.class_dir, "set prior.images=class to use them")

    @property
    def wants_bank(self) -> bool:
        return self.images == "class"

    @property
    def asks_frozen_model(self) -> bool:
        return True


class FrozenModel:
    """The un-tuned model inside the tuned one: what learns, as it was before the first step, put in place for the length of a `with`.

    Every method leaves the output of its base unchanged when it is attached, so the values of that moment are the un-tuned model, whatever the
    method: for an adapter they cost the adapter's own size, for full fine-tuning a copy of the UNet (and of the text encoder, if that learns).

    Args:
        parameters: all that will learn, before the first step.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @property
    def nbytes(self) -> int:
        """Memory that the values take, in bytes."""
        return sum(value.numel() * value.element_size() for value in self.values)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the un-tuned values in place, without gradients, and the learned ones back at the end, whatever happens."""
        self.values = [value.to(p.device, p.dtype) for value, p in zip(self.values, self.parameters, strict=True)]  # nothing, after the first time
        learned = [parameter.data for parameter in self.parameters]
        try:
            with torch.no_grad():
                self._put(self.values)
                yield
        finally:
            self._put(learned)

    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value
        torch.clear_autocast_cache()  # autocast remembers half-precision copies by parameter, not by value


def distilled_targets(
    base: BaseModel, frozen: FrozenModel, target: Tensor, noisy: Tensor, t: Tensor, prompts: Sequence[str], is_prior: Tensor
) -> Tensor:
    """Returns the targets (B, C, h, w) with those of the class samples replaced by the un-tuned model's predictions.

    Args:
        base: the live model.
        frozen: its un-tuned values.
        target: (B, C, h, w) of the kind that the base predicts.
        noisy: (B, C, h, w), the very latents that the tuned model sees.
        t: (B,).
        prompts: B captions.
        is_prior: (B,) bool, True for class samples.
    """
    rows = is_prior.nonzero().flatten()  # (b,)
    if not len(rows):
        return target
    with frozen.in_place():
        text = base.encode_prompts([prompts[row] for row in rows.tolist()])  # (b, L, D)
        predicted = base.predict(noisy[rows], t[rows], text)  # (b, C, h, w)
    return target.index_copy(0, rows.to(target.device), predicted.to(target))
