"""THE PAGE OF KNOBS: every setting with its type, default and unit; the table of choices; recipes; the plain form and its fingerprint.

`null` means "as the recipe of the base says": `resolve` fills it in, and `run.json` shows what it became.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dreambooth.adapters import Full, Method
from dreambooth.base.stable_diffusion import StableDiffusion
from dreambooth.encoders import ClipDino, Encoders, LabEncoders
from dreambooth.errors import ConfigError
from dreambooth.objective import FollowBase, Objective
from dreambooth.optimization import AdamW, Optimizer
from dreambooth.samplers import SAMPLERS

ACCELERATORS = ("auto", "cpu", "gpu", "cuda")


def _require(holds: bool, where: str, rule: str, got: object, next_step: str) -> None:
    if not holds:
        raise ConfigError(where, rule, got, next_step)


def _positive(where: str, value: int | float | None) -> None:
    next_step = "set a positive number, or null for the base's recipe"
    _require(value is None or value > 0, where, "must be above 0", value, next_step)
    _require(value is None or math.isfinite(value), where, "must be finite", value, next_step)


def _templates(where: str, templates: list[str] | None) -> None:
    for text in templates or []:
        _require("{subject}" in text, where, "must name the subject as {subject}", text, 'write it like "a photo of a {subject}"')


@dataclass(slots=True)
class Subject:
    """Who or what is learned, and how prompts name it."""

    identifier: str = "sks"  # [V], the rare word that will mean the subject; best one token of the base's tokenizer
    class_noun: str | None = None  # what the subject is: dog, person, toy; null: the built-in subject's
    prompt: str | None = None  # caption of the photos; {subject} becomes "[V] [class noun]"; null: the base's recipe
    lab_seed: int = 913  # which individual of the lab's world is the built-in subject

    def __post_init__(self) -> None:
        _require(bool(self.identifier.strip()), "subject.identifier", "must be a word", self.identifier, "choose a rare word such as sks or ohwx")
        _require(
            self.class_noun is None or bool(self.class_noun.strip()), "subject.class_noun", "must be a word", self.class_noun, "say what it is: dog"
        )
        _templates("subject.prompt", [self.prompt] if self.prompt is not None else None)

    def in_prompt(self, template: str) -> str:
        """Returns the template with the subject in it: "a photo of a {subject}" -> "a photo of a sks dog"."""
        return template.replace("{subject}", f"{self.identifier} {self.class_noun}")

    def class_in_prompt(self, template: str) -> str:
        """Returns the template with the class alone: "a photo of a {subject}" -> "a photo of a dog"."""
        return template.replace("{subject}", str(self.class_noun))


@dataclass(slots=True)
class Data:
    """The subject's photos and how they are cropped."""

    subject_dir: str | None = None  # folder with 3 to 30 photos of the subject; null: the lab's built-in subject
    on_bad_photo: str = "skip"  # a photo that cannot be read: "skip" it and say so, or "refuse" to start
    resolution: int | None = None  # px, side of the square crop; null: the base's own
    crop: str = "center"  # "center", or "random" (another place each time)
    flip: bool = False  # mirror at random; leave off for faces and for anything with a left and a right
    batch_size: int | None = None  # subject images a step; null: the base's recipe
    num_workers: int = 0  # processes that prepare images; 0: none beside the main one

    def __post_init__(self) -> None:
        _require(self.on_bad_photo in ("skip", "refuse"), "data.on_bad_photo", "must be skip or refuse", self.on_bad_photo, "choose one")
        _require(self.crop in ("center", "random"), "data.crop", "must be center or random", self.crop, "choose one")
        _require(
            self.resolution is None or (self.resolution >= 16 and self.resolution % 8 == 0),
            "data.resolution",
            "must be a multiple of 8 px, 16 or more",
            self.resolution,
            "512 is Stable Diffusion 1.5's",
        )
        _positive("data.batch_size", self.batch_size)
        _require(self.num_workers >= 0, "data.num_workers", "must be 0 or more", self.num_workers, "0 is enough for a few photos")


@dataclass(slots=True)
class Prior:
    """Parent of the ways to keep the class from drifting into the subject."""

    name: str = "prior"


@dataclass(slots=True)
class NoPrior(Prior):
    """Fine-tunes on the subject alone."""

    name: str = "none"


@dataclass(slots=True)
class ClassImages(Prior):
    """Class images of the un-tuned base in every batch, with the prior-preservation loss (Ruiz et al. 2023)."""

    name: str = "class_images"
    weight: float = 1.0  # lambda, of the class term in the loss; the paper's is 1
    batch_size: int | None = None  # class images a step; null: the base's recipe
    num_images: int | None = None  # class images in the bank; the paper used about 1000, 200 are usual; null: the base's recipe
    prompts: list[str] | None = None  # captions of the class images, in turn; {subject} becomes the class noun; null: the base's recipe
    class_dir: str | None = None  # a folder of your own class images, instead of generating them

    def __post_init__(self) -> None:
        _require(self.weight >= 0, "prior.weight", "must be 0 or more", self.weight, "1.0 is the paper's")
        _positive("prior.batch_size", self.batch_size)
        _positive("prior.num_images", self.num_images)
        _templates("prior.prompts", self.prompts)


@dataclass(slots=True)
class Training:
    """How long and on what."""

    max_steps: int | None = None  # optimiser steps; null: the base's recipe
    eval_every: int | None = None  # steps between evaluations and sample grids; null: the base's recipe
    checkpoint_every: int | None = None  # steps between states that a killed run continues from; null: eval_every
    accumulate_grad_batches: int = 1  # batches a step
    gradient_clip_val: float = 1.0  # largest gradient norm
    precision: str = "32-true"  # Lightning's: 32-true, bf16-mixed, 16-mixed, bf16-true
    accelerator: str = "auto"  # Lightning's: auto, cpu, gpu
    devices: int = 1
    log_every_n_steps: int = 1  # steps between rows of metrics.csv
    progress_bar: bool = True

    def __post_init__(self) -> None:
        for key in ("max_steps", "eval_every", "checkpoint_every", "accumulate_grad_batches", "gradient_clip_val", "devices", "log_every_n_steps"):
            _positive(f"trainer.{key}", getattr(self, key))
        _require(self.devices == 1, "trainer.devices", "must be 1 in this version", self.devices, "start one job a device instead")
        _require(
            self.accelerator in ACCELERATORS,
            "trainer.accelerator",
            f"must be one of {', '.join(ACCELERATORS)}",
            self.accelerator,
            "choose one of them",
        )
        known = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
        _require(self.precision in known, "trainer.precision", f"must be one of {', '.join(known)}", self.precision, "32-true is the safe one")


@dataclass(slots=True)
class Sampling:
    """How pictures are drawn from a model: class images, samples and evaluation alike."""

    sampler: str | None = None  # ddim, dpmsolver++, euler, euler_a, ddpm, pndm, unipc, heun; null: the base's recipe
    steps: int | None = None  # denoising steps; null: the base's recipe
    guidance_scale: float | None = None  # classifier-free guidance; 1 is off; null: the base's recipe
    batch_size: int | None = None  # images at once; null: the base's recipe

    def __post_init__(self) -> None:
        _require(self.sampler in (None, *SAMPLERS), "sampling.sampler", f"must be one of {', '.join(SAMPLERS)}", self.sampler, "choose one of them")
        for key in ("steps", "batch_size", "guidance_scale"):
            _positive(f"sampling.{key}", getattr(self, key))

    def over(self, config: "Config") -> "Config":
        """Returns the config with the sampling that is set here in place of its own, in place."""
        for own in dataclasses.fields(self):
            if getattr(self, own.name) is not None:
                setattr(config.sampling, own.name, getattr(self, own.name))
        return config


@dataclass(slots=True)
class Evaluation:
    """What is drawn and scored, while training (selection) and at the end (final), with the same noise at every step and arm."""

    selection_prompts: list[str] | None = None  # scored every eval_every steps, to choose the best step; null: the base's recipe
    final_prompts: list[str] | None = None  # scored at the end and by evaluate.py, never used to choose; null: the base's recipe
    class_prompt: str | None = None  # what drift and diversity are measured on; {subject} becomes the class noun; null: the base's recipe
    selection_images: int | None = None  # images a selection prompt; null: the base's recipe
    final_images: int | None = None  # images a final prompt; null: the base's recipe
    class_images: int | None = None  # images of the class prompt; null: the base's recipe
    min_alignment_ratio: float = 0.95  # the best step keeps at least this share of the un-tuned base's prompt alignment
    max_drift_gain: float = 0.15  # and its drift is at most this much above the un-tuned base's
    seed: int = 1000  # of the evaluation noise; not the training seed, so that runs with other seeds stay paired

    def __post_init__(self) -> None:
        for key in ("selection_prompts", "final_prompts"):
            _templates(f"evaluation.{key}", getattr(self, key))
        _templates("evaluation.class_prompt", [self.class_prompt] if self.class_prompt is not None else None)
        for key in ("selection_images", "final_images", "class_images"):
            _positive(f"evaluation.{key}", getattr(self, key))
        _require(
            0 <= self.min_alignment_ratio <= 1, "evaluation.min_alignment_ratio", "must be in [0, 1]", self.min_alignment_ratio, "0.95 is the default"
        )
        _require(self.max_drift_gain >= 0, "evaluation.max_drift_gain", "must be 0 or more", self.max_drift_gain, "0.15 is the default")
        _require(self.seed >= 0, "evaluation.seed", "must be 0 or more", self.seed, "any whole number will do")


@dataclass(slots=True)
class Tracking:
    """Weights & Biases, a mirror of the run folder."""

    mode: str = "offline"  # "offline" (a folder that `wandb sync` can send later), "online", "disabled"
    project: str = "dreambooth"
    entity: str | None = None  # null: your default
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _require(self.mode in ("offline", "online", "disabled"), "wandb.mode", "must be offline, online or disabled", self.mode, "choose one")


@dataclass(slots=True)
class BaseEncoders(Encoders):
    """The encoders that belong to the base: the lab's scorers for the lab, CLIP and DINO for Stable Diffusion."""

    name: str = "base"


@dataclass(slots=True)
class Config:
    """One training run."""

    group: str = "default"  # folder of the runs, and W&B group; an experiment sets its own name
    output_dir: str = "runs"  # where run folders and class banks go
    seed: int = 0  # of the training: order, crops, noise, timesteps
    base: StableDiffusion = MISSING
    subject: Subject = field(default_factory=Subject)
    data: Data = field(default_factory=Data)
    prior: Prior = MISSING
    method: Method = MISSING
    objective: Objective = MISSING
    optim: Optimizer = MISSING
    trainer: Training = field(default_factory=Training)
    sampling: Sampling = field(default_factory=Sampling)
    encoders: Encoders = MISSING
    evaluation: Evaluation = field(default_factory=Evaluation)
    wandb: Tracking = field(default_factory=Tracking)

    def __post_init__(self) -> None:
        _require(self.seed >= 0, "seed", "must be 0 or more", self.seed, "any whole number will do")


CHOICES: dict[str, tuple[type, ...]] = {
    "base": (StableDiffusion,),
    "prior": (NoPrior, ClassImages),
    "method": (Full,),
    "objective": (FollowBase,),
    "optim": (AdamW,),
    "encoders": (BaseEncoders, LabEncoders, ClipDino),
}
NOT_SCIENCE = ("group", "output_dir", "wandb", "data.num_workers", "trainer.progress_bar", "trainer.checkpoint_every")  # change no result


def choice_name(kind: type) -> str:
    """Returns the word that selects a choice on the command line: `method=full`."""
    return kind.__dataclass_fields__["name"].default


def to_plain(config: object) -> dict[str, Any]:
    """Returns a config as dicts, lists, strings and numbers: what goes into run.json, W&B and checkpoints."""
    return dataclasses.asdict(config)


def from_plain(plain: dict[str, Any], source: str = "run.json") -> Config:
    """Returns the typed config of a plain one; the inverse of `to_plain`.

    Args:
        plain: nested dicts; missing fields take today's defaults.
        source: the file it came from, for the message.

    Raises:
        ConfigError: for an unknown field, choice or type. Nothing in the dict can name a Python object.
    """
    node = OmegaConf.structured(Config)
    _require("${" not in json.dumps(plain), source, "must hold plain values", "an interpolation ${...}", "use the file as a run wrote it")
    try:
        for group, kinds in CHOICES.items():
            named = {choice_name(kind): kind for kind in kinds}
            settings = plain.get(group)
            name = settings.get("name") if isinstance(settings, dict) else settings
            _require(name in named, f"{source}: {group}.name", f"must be one of {', '.join(named)}", name, "use the version that wrote it")
            node[group] = OmegaConf.structured(named[name])
        return OmegaConf.to_object(OmegaConf.merge(node, plain))
    except OmegaConfBaseException as error:
        raise ConfigError(
            source, f"must fit the config of this version: {str(error).splitlines()[0]}", None, "use the version that wrote it"
        ) from error


def fingerprint(plain: dict[str, Any], **digests: str) -> str:
    """Returns 8 hex digits that name a run: equal for equal settings and inputs.

    Args:
        plain: a resolved plain config; what cannot change a result (`NOT_SCIENCE`) is left out.
        digests: content hashes of what the config merely points at: base, photos, class images.
    """
    science = json.loads(json.dumps(plain))
    for dotted in NOT_SCIENCE:
        *parents, last = dotted.split(".")
        node = science
        for key in parents:
            node = node.get(key, {})
        node.pop(last, None)
    if digests:  # contents stand for the places where they lie
        science["base"].pop("path", None)
        science["data"].pop("subject_dir", None)
        science["prior"].pop("class_dir", None)
    text = json.dumps([science, sorted(digests.items())], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(slots=True)
class EvaluateConfig:
    """Scores a run again: as it was scored at its end, or on other prompts and settings (null: the run's own)."""

    run: str = MISSING  # run folder
    arms: list[str] = field(default_factory=lambda: ["base", "best", "final"])  # un-tuned base, chosen step, last step
    prompts: list[str] | None = None  # with {subject}
    images: int | None = None  # a prompt
    class_images: int | None = None  # images of the class prompt
    seed: int | None = None  # of the evaluation noise
    sampling: Sampling = field(default_factory=Sampling)
    accelerator: str = "auto"  # auto, cpu, gpu

    def __post_init__(self) -> None:
        _require(
            bool(self.arms) and not set(self.arms) - {"base", "best", "final"}, "arms", "must be some of base, best, final", list(self.arms), "choose"
        )
        _templates("prompts", self.prompts)
        _positive("images", self.images)
        _positive("class_images", self.class_images)

    def applied_to(self, config: Config) -> Config:
        """Returns the run's config with what is set here, in place."""
        for own, key in (("prompts", "final_prompts"), ("images", "final_images"), ("class_images", "class_images"), ("seed", "seed")):
            if getattr(self, own) is not None:
                setattr(config.evaluation, key, getattr(self, own))
        config.trainer.accelerator = self.accelerator
        return self.sampling.over(config)


@dataclass(slots=True)
class GenerateConfig:
    """Draws images with a run's model."""

    run: str = MISSING  # run folder
    prompt: str = MISSING  # {subject} becomes "[V] [class noun]"
    weights: str = "best"  # best, final, or base for the un-tuned model
    images: int = 4
    seed: int = 0  # image k depends on (seed, k) alone
    resolution: int | None = None  # px; null: the run's
    output: str | None = None  # folder; null: <run>/generated
    sampling: Sampling = field(default_factory=Sampling)
    accelerator: str = "auto"  # auto, cpu, gpu

    def __post_init__(self) -> None:
        _require(self.weights in ("best", "final", "base"), "weights", "must be best, final or base", self.weights, "choose one")
        _positive("images", self.images)
        _require(self.seed >= 0, "seed", "must be 0 or more", self.seed, "any whole number will do")
