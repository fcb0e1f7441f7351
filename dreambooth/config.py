"""THE PAGE OF KNOBS: every setting with its type, default and unit; the table of choices; recipes; the plain form and its fingerprint.

`null` means "as the recipe of the base says": `resolve` fills it in, and `run.json` shows what it became.
"""

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dreambooth.adapters.lora import Lora
from dreambooth.adapters.methods import CrossAttentionKV, Full, Method
from dreambooth.adapters.textual_inversion import PivotalTuning, TextualInversion
from dreambooth.base.stable_diffusion import StableDiffusion
from dreambooth.encoders import ClipDino, Encoders, LabEncoders
from dreambooth.errors import ConfigError
from dreambooth.objective import Epsilon, FollowBase, Objective, Sample, Velocity
from dreambooth.optimization import AdamW, AdamW8bit, Optimizer, Prodigy
from dreambooth.priors import ClassImages, NoPrior, Prior, RecipePrior, SelfDistilled
from dreambooth.samplers import SAMPLERS
from dreambooth.side_files import MASKS

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


def _each_once(where: str, prompts: list[str] | None) -> None:
    twice = next((text for text in prompts or [] if prompts.count(text) > 1), None)
    _require(twice is None, where, "must hold each prompt once", twice, "leave the second one out, or ask for more images a prompt")


@dataclass(slots=True)
class Subject:
    """Who or what is learned, and how prompts name it."""

    identifier: str = "sks"  # [V], the rare word that will mean the subject; best one token of the base's tokenizer
    class_noun: str | None = None  # what the subject is: dog, person, toy; null: the built-in subject's
    prompt_noun: str | None = None  # the noun behind [V] in prompts, where it is not class_noun: a wrong one, or "" for none; null: class_noun
    prompt: str | None = None  # caption of the photos; {subject} becomes "[V] [class noun]"; null: the base's recipe
    lab_seed: int = 913  # which individual of the lab's world is the built-in subject
    name: str | None = None  # of this very subject, for tables and its evaluation noise; with data.dreambench: which of its subjects

    def __post_init__(self) -> None:
        _require(bool(self.identifier.strip()), "subject.identifier", "must be a word", self.identifier, "choose a rare word such as sks or ohwx")
        _require(
            self.class_noun is None or bool(self.class_noun.strip()), "subject.class_noun", "must be a word", self.class_noun, "say what it is: dog"
        )
        _templates("subject.prompt", [self.prompt] if self.prompt is not None else None)
        _require(
            self.name is None or re.fullmatch(r"[\w-]+", self.name) is not None,
            "subject.name",
            "must be letters, digits, _ and -",
            self.name,
            "write it like dog6",
        )

    def in_prompt(self, template: str) -> str:
        """Returns the template with the subject in it: "a photo of a {subject}" -> "a photo of a sks dog"."""
        noun = self.class_noun if self.prompt_noun is None else self.prompt_noun
        return template.replace("{subject}", f"{self.identifier} {noun}".strip())

    def class_in_prompt(self, template: str) -> str:
        """Returns the template with the class alone, as scores ask for it: "a photo of a {subject}" -> "a photo of a dog"."""
        return template.replace("{subject}", str(self.class_noun))

    def prior_in_prompt(self, template: str) -> str:
        """Returns the template with the noun of the class images: the one that the training prompts name, if they name any."""
        return template.replace("{subject}", self.prompt_noun or str(self.class_noun))

    def is_named_in(self, text: str) -> bool:
        """Tells whether a text names the subject's class, in the singular or the plural."""
        return self.class_noun is not None and re.search(rf"\b{re.escape(self.class_noun)}(s|es)?\b", text, re.IGNORECASE) is not None


@dataclass(slots=True)
class ExtraSubject:
    """One more subject that is learned in the same run; prompts name it by its own words, as "a photo of a ohwx cat"."""

    identifier: str = MISSING  # its rare word; another than that of every other subject
    class_noun: str = MISSING  # what it is: dog, person, toy; its class gets class images of its own
    subject_dir: str | None = None  # folder with its photos; null: the individual lab_seed of the lab's world
    lab_seed: int | None = None  # which individual of the lab's world, where subject_dir is null
    prompt: str | None = None  # caption of its photos; {subject} becomes "[V] [class noun]"; null: subject.prompt
    repeats: int = 1  # how often each of its photos counts, against data.repeats of the first subject's

    def __post_init__(self) -> None:
        _templates("extra_subjects.prompt", [self.prompt] if self.prompt is not None else None)
        _positive("extra_subjects.repeats", self.repeats)
        alone = (self.subject_dir is None) != (self.lab_seed is None)
        _require(alone, "extra_subjects", "must name either a subject_dir or a lab_seed each", self.identifier, "give the folder with its photos")

    def as_subject(self) -> Subject:
        """Returns it as a subject, whose words prompts and captions are made of."""
        return Subject(self.identifier, self.class_noun, prompt=self.prompt, lab_seed=self.lab_seed or 0)


@dataclass(slots=True)
class Data:
    """The subject's photos: their captions and masks, how they are cropped, and where what is computed from them is kept."""

    subject_dir: str | None = None  # folder with 3 to 30 photos of the subject; null: the lab's built-in subject
    dreambench: str | None = None  # DreamBench folder: subject.name's photos, class noun and final prompts come from it
    photos: int | None = None  # train on so many of the photos, whichever come first by content; null: all (of the built-in subject 5)
    on_bad_photo: str = "skip"  # a photo that cannot be read: "skip" it and say so, or "refuse" to start
    resolution: int | None = None  # px, side of the square crop; null: the base's own
    buckets: bool = False  # keep each photo's shape: resize to the bucket of about resolution^2 px that fits it best; a batch has one bucket
    crop: str = "center"  # "center", "random" (another place each time), "smart" (where the most detail is; for faces masks are better)
    flip: bool = False  # mirror at random; leave off for faces and for anything with a left and a right
    batch_size: int | None = None  # subject images a batch and device; null: the base's recipe
    held_out: int | None = None  # photos set aside to measure on (of the built-in subject: further ones); null: the base's recipe
    num_workers: int = 0  # processes that prepare images; 0: none beside the main one
    captions: str | None = None  # "prompt": subject.prompt for all; "auto": photo.txt beside it, else its name after @, else that; null: the recipe
    masks: str | None = None  # null: off; "sidecar": photo.mask.png, white is the subject; "alpha": else transparency; "auto": else by rembg
    mask_background_weight: float = 0.1  # of the loss outside the mask, in [0, 1]; 0 lets surroundings dissolve, 1: the scores alone look at masks
    repeats: int = 1  # how often each photo counts, against those of extra_subjects
    steps_per_image: int | None = None  # trainer.max_steps = this x photos x repeats; 100 is the rule of thumb; null: as max_steps says
    cache: str = "memory"  # where latents and text embeddings are kept: "memory", "disk" (<output_dir>/caches, for later runs too), "off"
    cache_mb: int = 1024  # MB, the most that is kept; > 0
    cache_dtype: str = "float32"  # of the latents that are kept: "float32" (exact), "float16" (half the room, rounded)

    def __post_init__(self) -> None:
        self._check_kept()
        _require(self.on_bad_photo in ("skip", "refuse"), "data.on_bad_photo", "must be skip or refuse", self.on_bad_photo, "choose one")
        _require(self.crop in ("center", "random", "smart"), "data.crop", "must be center, random or smart", self.crop, "choose one")
        _require(
            self.resolution is None or (self.resolution >= 16 and self.resolution % 8 == 0),
            "data.resolution",
            "must be a multiple of 8 px, 16 or more",
            self.resolution,
            "512 is Stable Diffusion 1.5's",
        )
        _positive("data.batch_size", self.batch_size)
        _positive("data.photos", self.photos)
        _require(self.held_out is None or self.held_out >= 0, "data.held_out", "must be 0 or more", self.held_out, "0 trains on every photo")
        _require(self.num_workers >= 0, "data.num_workers", "must be 0 or more", self.num_workers, "0 is enough for a few photos")

    def _check_kept(self) -> None:
        """Checks what photos bring along, and what is kept of them."""
        known = {
            "captions": (None, "prompt", "auto"),
            "masks": (None, *MASKS),
            "cache": ("memory", "disk", "off"),
            "cache_dtype": ("float32", "float16"),
        }
        for key, values in known.items():
            rule = f"must be one of {', '.join('null' if value is None else value for value in values)}"
            _require(getattr(self, key) in values, f"data.{key}", rule, getattr(self, key), "choose one")
        weight = self.mask_background_weight
        _require(0 <= weight <= 1, "data.mask_background_weight", "must be in [0, 1]", weight, "0.1 is the default")
        for key in ("repeats", "steps_per_image", "cache_mb"):
            _positive(f"data.{key}", getattr(self, key))


@dataclass(slots=True)
class Training:
    """How long and on what."""

    max_steps: int | None = None  # optimiser steps; null: the base's recipe
    eval_every: int | None = None  # steps between evaluations and sample grids; null: the base's recipe
    fixed_loss_every: int | None = None  # steps between measurements of the loss on a fixed batch; 0: never; null: the base's recipe
    early_stop_patience: int | None = None  # stop after so many evaluations in a row without a better step; null: never
    checkpoint_every: int | None = None  # steps between states that a killed run continues from; null: eval_every
    accumulate_grad_batches: int = 1  # batches a step
    gradient_clip_val: float | None = 1.0  # largest gradient norm; null: gradients are not clipped
    ema_decay: float | None = None  # moving average of what learns, in [0, 1): it is evaluated and kept then; null: none; 0.999 is usual
    gradient_checkpointing: bool = False  # less memory, a third slower: activations are computed again where the gradient needs them
    compile: bool = False  # torch.compile of the UNet: minutes at the start, for long runs on a GPU
    precision: str = "32-true"  # Lightning's: 32-true, bf16-mixed, 16-mixed, bf16-true
    accelerator: str = "auto"  # Lightning's: auto, cpu, gpu
    devices: int = 1  # GPUs, or processes on a CPU, that train one model together; data.batch_size and prior.batch_size are of each
    sharding: bool = False  # with several devices and method=full: each keeps its part of weights, gradients and moments (FSDP)
    log_every_n_steps: int = 1  # steps between rows of metrics.csv
    progress_bar: bool = True

    def __post_init__(self) -> None:
        for key in ("max_steps", "eval_every", "checkpoint_every", "accumulate_grad_batches", "devices", "log_every_n_steps"):
            _positive(f"trainer.{key}", getattr(self, key))
        _positive("trainer.early_stop_patience", self.early_stop_patience)
        clip = self.gradient_clip_val
        _require(clip is None or 0 < clip < math.inf, "trainer.gradient_clip_val", "must be above 0 and finite", clip, "1.0 is usual, null is off")
        decay = self.ema_decay
        _require(decay is None or 0 <= decay < 1, "trainer.ema_decay", "must be in [0, 1)", decay, "0.999 is usual, null is off")
        every = self.fixed_loss_every
        _require(every is None or every >= 0, "trainer.fixed_loss_every", "must be 0 or more", every, "0 never measures it")
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
    guidance_rescale: float | None = None  # in [0, 1], takes back over-exposure by guidance (Lin et al. 2024; 0.7 with zero terminal SNR); null: 0

    def __post_init__(self) -> None:
        _require(self.sampler in (None, *SAMPLERS), "sampling.sampler", f"must be one of {', '.join(SAMPLERS)}", self.sampler, "choose one of them")
        for key in ("steps", "batch_size", "guidance_scale"):
            _positive(f"sampling.{key}", getattr(self, key))
        share = self.guidance_rescale
        _require(share is None or 0 <= share <= 1, "sampling.guidance_rescale", "must be in [0, 1]", share, "0.7 is usual, 0 is off")

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
    other_prompts: list[str] | None = None  # of other classes, to see what else has moved; []: none; null: the base's, less the subject's own class
    other_images: int | None = None  # images a prompt of another class; null: the base's recipe
    min_alignment_ratio: float = 0.95  # the best step keeps at least this share of the un-tuned base's prompt alignment
    max_drift_gain: float = 0.15  # and its drift is at most this much above the un-tuned base's
    seed: int = 1000  # of the evaluation noise; not the training seed, so that runs with other seeds stay paired

    def __post_init__(self) -> None:
        for key in ("selection_prompts", "final_prompts"):
            _templates(f"evaluation.{key}", getattr(self, key))
            _each_once(f"evaluation.{key}", getattr(self, key))
        _each_once("evaluation.other_prompts", self.other_prompts)
        for text in self.other_prompts or []:
            _require("{subject}" not in text, "evaluation.other_prompts", "must name another class", text, 'write it like "a photo of a house"')
        _templates("evaluation.class_prompt", [self.class_prompt] if self.class_prompt is not None else None)
        for key in ("selection_images", "final_images", "class_images", "other_images"):
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
class Export:
    """The file for other tools that the summary at a run's end says how to write; `python -m dreambooth export` takes no other setting from here."""

    name: str = "model"  # "model": model.safetensors, of the lab model/; "joepenna": a name with date, steps, photos, token and class, as there
    weights: str = "best"  # of the chosen step, "best", or of the last one, "final"

    def __post_init__(self) -> None:
        for key, values in (("name", ("model", "joepenna")), ("weights", ("best", "final"))):
            _require(getattr(self, key) in values, f"export.{key}", f"must be {' or '.join(values)}", getattr(self, key), "choose one")


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
    price_per_hour: float | None = None  # of the machine, in your money: a run then says what it will cost; null: unknown
    base: StableDiffusion = MISSING
    subject: Subject = field(default_factory=Subject)
    extra_subjects: list[ExtraSubject] = field(default_factory=list)  # learned too, in the same run; evaluation looks at `subject` alone
    data: Data = field(default_factory=Data)
    prior: Prior = MISSING
    method: Method = MISSING
    objective: Objective = MISSING
    optim: Optimizer = MISSING
    trainer: Training = field(default_factory=Training)
    sampling: Sampling = field(default_factory=Sampling)
    encoders: Encoders = MISSING
    evaluation: Evaluation = field(default_factory=Evaluation)
    export: Export = field(default_factory=Export)
    wandb: Tracking = field(default_factory=Tracking)

    def __post_init__(self) -> None:
        _require(self.seed >= 0, "seed", "must be 0 or more", self.seed, "any whole number will do")
        price = self.price_per_hour
        _require(price is None or 0 <= price < math.inf, "price_per_hour", "must be 0 or more", price, "leave it out where it is not known")
        words = [subject.identifier.casefold() for subject in self.subjects]
        twice = next((word for word in words if words.count(word) > 1), None)
        _require(twice is None, "extra_subjects.identifier", "must be another one for each subject", twice, "choose another rare word")

    @property
    def subjects(self) -> list[Subject]:
        """All that is learned: `subject` first."""
        return [self.subject, *(extra.as_subject() for extra in self.extra_subjects)]

    @property
    def identifiers(self) -> str:
        """The rare words of all subjects with a space between: what a method's embedding rows are for."""
        return " ".join(subject.identifier for subject in self.subjects)

    @property
    def prior_prompts(self) -> list[str]:
        """The captions of class samples: each of the prior's in turn, for each class that a subject belongs to."""
        return [template.replace("{subject}", noun) for template in self.prior.templates for noun in self.prior_nouns]

    @property
    def prior_nouns(self) -> list[str]:
        """The classes that the subjects belong to, each once, as class prompts name them."""
        return list(dict.fromkeys(subject.prior_in_prompt("{subject}") for subject in self.subjects))


CHOICES: dict[str, tuple[type, ...]] = {
    "base": (StableDiffusion,),
    "prior": (NoPrior, ClassImages, SelfDistilled, RecipePrior),
    "method": (Full, Lora, CrossAttentionKV, TextualInversion, PivotalTuning),
    "objective": (FollowBase, Epsilon, Velocity, Sample),
    "optim": (AdamW, AdamW8bit, Prodigy),
    "encoders": (BaseEncoders, LabEncoders, ClipDino),
}
NOT_SCIENCE = (  # change no result
    *("group", "output_dir", "price_per_hour", "export", "wandb"),
    *("data.num_workers", "data.cache", "data.cache_mb", "trainer.progress_bar", "trainer.checkpoint_every"),
)


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
        science["data"].pop("dreambench", None)
        science["prior"].pop("class_dir", None)
        for extra in science.get("extra_subjects", []):
            extra.pop("subject_dir", None)
    text = json.dumps([science, sorted(digests.items())], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(slots=True)
class EvaluateData:
    """Where other prompts come from."""

    dreambench: str | None = None  # DreamBench folder: its prompts for the run's subject, found by subject.name or by the photos


@dataclass(slots=True)
class EvaluateConfig:
    """Scores one run or many again: as at their end, or on other prompts and settings (null: each run's own)."""

    run: str | None = None  # one run folder
    runs: Any = None  # many, into one table: a list of run folders, or the folder of a group (every finished run in it)
    output: str | None = None  # folder of the table of many; null: `combined` beside them
    arms: list[str] = field(default_factory=lambda: ["base", "best", "final"])  # un-tuned base (always scored), chosen step, last step
    data: EvaluateData = field(default_factory=EvaluateData)
    encoders: Encoders = MISSING  # base: each run's own
    prompts: list[str] | None = None  # with {subject}
    images: int | None = None  # a prompt
    class_images: int | None = None  # images of the class prompt
    seed: int | None = None  # of the evaluation noise
    sampling: Sampling = field(default_factory=Sampling)
    accelerator: str = "auto"  # auto, cpu, gpu

    def __post_init__(self) -> None:
        if self.encoders == MISSING:  # BaseEncoders as the field's default would be the only kind that Hydra lets in
            self.encoders = BaseEncoders()
        _require(
            bool(self.arms) and not set(self.arms) - {"base", "best", "final"}, "arms", "must be some of base, best, final", list(self.arms), "choose"
        )
        named = [key for key in ("run", "runs") if getattr(self, key) not in (None, [], "")]
        _require(len(named) == 1, "run", "must be set, or runs for many, not both", named or None, "write run=runs/default/full-dog-1a2b3c4d")
        lists = isinstance(self.runs, list | tuple) and all(isinstance(path, str) for path in self.runs)
        _require(self.runs is None or isinstance(self.runs, str) or lists, "runs", "must be a folder or a list of folders", self.runs, "see --help")
        both = self.prompts is not None and self.data.dreambench is not None
        _require(not both, "prompts", "must be null with data.dreambench, which brings its own", self.prompts, "leave one of them out")
        _require(self.output is None or self.run is None, "output", "is for runs, not for run", self.output, "one run is scored in its own folder")
        _templates("prompts", self.prompts)
        _each_once("prompts", self.prompts)
        _positive("images", self.images)
        _positive("class_images", self.class_images)

    def applied_to(self, config: Config) -> Config:
        """Returns the run's config with what is set here, in place."""
        for own, key in (("prompts", "final_prompts"), ("images", "final_images"), ("class_images", "class_images"), ("seed", "seed")):
            if getattr(self, own) is not None:
                setattr(config.evaluation, key, getattr(self, own))
        if not isinstance(self.encoders, BaseEncoders):
            config.encoders = self.encoders
        elif self.encoders.lpips_backbone is not None:
            config.encoders.lpips_backbone = self.encoders.lpips_backbone
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
