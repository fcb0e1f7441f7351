"""Recipes: what `null` in the config means for each family of base models, and the step that fills it in."""

import copy
import dataclasses
import functools
from typing import Any

from dreambooth.adapters.lora import ATTENTION, WITH_CONVOLUTIONS
from dreambooth.adapters.textual_inversion import PivotalTuning, TextualInversion
from dreambooth.config import BaseEncoders, Config
from dreambooth.cross_checks import refuse_ignored
from dreambooth.dreambench import read_dreambench, same_prompt
from dreambooth.encoders import ClipDino, LabEncoders
from dreambooth.errors import ConfigError
from dreambooth.lab.splits import CLASS_IMAGE_CONTEXTS
from dreambooth.priors import ClassImages, NoPrior, RecipePrior

# The lab: measured on this project's own base, see experiments/. The final contexts appear in no photo and in no class caption;
# the selection contexts are in no photo. Photos are captioned with their places: otherwise the word is learned for pictures whose place is not
# said, and hardly elsewhere. Eight denoising steps show what fifty do: class and place named right in as many of 120 pictures (0.98 and 1.00),
# identity features at a cosine of 0.984 to fifty's, 5% less of the finest detail. Of 200 steps of full tuning with the prior the last fifty
# brought nothing that can be told (15 runs of experiments/methods, selection prompts, mean and 95%: identity fidelity +0.008 +- 0.017, prompt
# alignment -0.018 +- 0.020, the subject's diversity -0.013 +- 0.010). LoRA, a word alone and pivotal tuning keep
# 200: their fidelity still rose there (+0.019 +- 0.027, +0.019 +- 0.032, +0.034 +- 0.035), if not by more than chance may do.
LAB: dict[str, Any] = {
    "subject.class_noun": "dog",
    "subject.prompt": "a photo of a {subject}",
    "data.captions": "auto",
    "data.batch_size": 4,
    "data.held_out": 4,
    "prior.batch_size": 4,
    "prior.num_images": 64,
    "prior.prompts": ["a photo of a {subject}", *(f"a photo of a {{subject}} {context}" for context in CLASS_IMAGE_CONTEXTS)],
    "method.train_text_encoder": True,
    "method.train_token": True,
    "objective.weighting": "capped_velocity",
    "optim.learning_rate": 4e-4,
    "optim.text_encoder_learning_rate": 4e-4,
    "optim.token_learning_rate": 5e-3,
    "trainer.max_steps": 150,
    "trainer.eval_every": 50,
    "trainer.fixed_loss_every": 10,
    "sampling.sampler": "dpmsolver++",
    "sampling.steps": 8,
    "sampling.guidance_scale": 3.0,
    "sampling.guidance_rescale": 0.0,
    "sampling.batch_size": 32,
    "evaluation.selection_prompts": [f"a photo of a {{subject}} {context}" for context in ("in a city", "at night", "at sunset", "on a red carpet")],
    "evaluation.final_prompts": [
        f"a photo of a {{subject}} {context}" for context in ("in the snow", "in the jungle", "in the desert", "on the moon")
    ],
    "evaluation.class_prompt": "a photo of a {subject}",
    "evaluation.selection_images": 2,
    "evaluation.final_images": 6,
    "evaluation.class_images": 8,
    "evaluation.other_prompts": [f"a photo of a {noun}" for noun in ("teapot", "car", "duck", "robot")],
    "evaluation.other_images": 4,
}

# Stable Diffusion: the paper's learning rate and lambda, its sample count as it is used with 200 class images
# (Ruiz et al. 2023, sec. 4 and supplement; the diffusers guide).
STABLE_DIFFUSION: dict[str, Any] = {
    "subject.prompt": "a photo of a {subject}",
    "data.captions": "prompt",
    "data.batch_size": 1,
    "data.held_out": 0,
    "prior.batch_size": 1,
    "prior.num_images": 200,
    "prior.prompts": ["a photo of a {subject}"],
    "method.train_text_encoder": False,
    "method.train_token": False,
    "objective.weighting": "uniform",
    "optim.learning_rate": 5e-6,
    "optim.text_encoder_learning_rate": 2e-6,
    "optim.token_learning_rate": 5e-4,
    "trainer.max_steps": 800,
    "trainer.eval_every": 100,
    "trainer.fixed_loss_every": 20,
    "sampling.sampler": "ddim",
    "sampling.steps": 50,
    "sampling.guidance_scale": 7.5,
    "sampling.guidance_rescale": 0.0,
    "sampling.batch_size": 4,
    "evaluation.selection_prompts": [
        f"a photo of a {{subject}} {context}" for context in ("at night", "on a city street", "on a red carpet", "in a kitchen")
    ],
    "evaluation.final_prompts": [
        f"a photo of a {{subject}} {context}" for context in ("in the snow", "in the jungle", "on the beach", "on the moon")
    ],
    "evaluation.class_prompt": "a photo of a {subject}",
    "evaluation.selection_images": 2,
    "evaluation.final_images": 4,
    "evaluation.class_images": 8,
    "evaluation.other_prompts": [f"a photo of a {noun}" for noun in ("house", "bicycle", "person")],
    "evaluation.other_images": 2,
}

# What a method wants to be different from its family. LoRA: the diffusers guide (1e-4, 500 steps) and its advanced script (text encoder
# 5e-5); keys and values: Kumari et al. 2023; textual inversion: the diffusers guide and DreamBench++ (5e-4, 3000 steps); pivotal tuning:
# the advanced script (the embedding for the first half).
STABLE_DIFFUSION_METHODS: dict[str, dict[str, Any]] = {
    "lora": {
        "method.target_modules": [*ATTENTION],
        "optim.learning_rate": 1e-4,
        "optim.text_encoder_learning_rate": 5e-5,
        "trainer.max_steps": 500,
    },
    "cross_attention_kv": {"optim.learning_rate": 1e-5, "trainer.max_steps": 500},
    "textual_inversion": {"optim.token_learning_rate": 5e-4, "trainer.max_steps": 3000, "trainer.eval_every": 500},
    "pivotal_tuning_lora": {
        "method.lora.target_modules": [*ATTENTION],
        "optim.learning_rate": 1e-4,
        "optim.text_encoder_learning_rate": 5e-5,
        "trainer.max_steps": 1000,
    },
    "pivotal_tuning_full": {"trainer.max_steps": 1000},
}
# The lab's own, by 31 runs on subjects that no study uses (boat, rocket and backpack 913, seed 5): identity fidelity after 200 steps.
# LoRA on the attention alone stays low whatever its rank and rate: rocket (un-tuned 0.18) 0.20 to 0.33, backpack (0.06) 0.50 to 0.60 at rank 4
# and 16, rates 2e-3 to 8e-3. With the convolutions and the feed-forward layers, rank 4, at 2e-3, 4e-3, 8e-3: 0.42, 0.52, 0.52 and 0.50, 0.70,
# 0.75: a UNet this small has most of its weights in convolutions. Its feed-forward layers answer 0 (their gates are shut), so adapters there
# learn nothing and are left out. Pivotal tuning so, at 4e-3 and 8e-3: 0.39 and 0.44, 0.59 and 0.71. Boat (0.12): keys and values at 1e-3,
# 4e-3, 1e-2: 0.39, 0.46, 0.59; the word alone stays at 0.20 at 1e-2, 2e-2 and 5e-2: it is too little.
LAB_METHODS: dict[str, dict[str, Any]] = {
    "lora": {
        "method.target_modules": [*WITH_CONVOLUTIONS],
        "optim.learning_rate": 8e-3,
        "optim.text_encoder_learning_rate": 2e-3,
        "trainer.max_steps": 200,
    },
    "cross_attention_kv": {"optim.learning_rate": 1e-2},
    "textual_inversion": {"optim.token_learning_rate": 2e-2, "trainer.max_steps": 200},
    "pivotal_tuning_lora": {
        "method.lora.target_modules": [*WITH_CONVOLUTIONS],
        "optim.learning_rate": 8e-3,
        "optim.token_learning_rate": 2e-2,
        "trainer.max_steps": 200,
    },
    "pivotal_tuning_full": {"trainer.max_steps": 200},
}


def resolve(config: Config) -> Config:
    """Fills every `null` that the base's recipe knows, and the encoders, in place; returns the config.

    Raises:
        ConfigError: if the subject is not said: photos without a class noun, or neither photos nor the lab; or if a final prompt
            also chooses the step; or if a setting would do nothing (`refuse_ignored`).
    """
    lab = config.base.is_lab()
    if isinstance(config.prior, RecipePrior):
        config.prior = _prior_of_the_recipe(config)
    if config.data.dreambench is not None:
        _take_from_dreambench(config)
    if config.data.subject_dir is not None and config.subject.class_noun is None:
        raise ConfigError("subject.class_noun", "must be set when data.subject_dir is", None, "say what the photos show: subject.class_noun=dog")
    if config.data.subject_dir is None and not lab:
        raise ConfigError(
            "data.subject_dir",
            "must be set for this base (only base=lab has a built-in subject)",
            None,
            "give the folder with the photos: data.subject_dir=photos/ subject.class_noun=dog",
        )
    family, methods = (LAB, LAB_METHODS) if lab else (STABLE_DIFFUSION, STABLE_DIFFUSION_METHODS)
    recipe = family | methods.get(config.method.recipe_name, {})
    if config.data.steps_per_image is not None:
        recipe = {dotted: value for dotted, value in recipe.items() if dotted != "trainer.max_steps"}  # `settle_steps` fills it in
        if config.trainer.max_steps is not None:
            rule, per_image, steps = "must be null where trainer.max_steps is set", config.data.steps_per_image, config.trainer.max_steps
            either = f"add data.steps_per_image=null to train for {steps} steps, or trainer.max_steps=null to train for {per_image} a photo"
            raise ConfigError("data.steps_per_image", f"{rule}: both say how long to train", per_image, either)
    if config.data.subject_dir is not None and config.data.held_out is None:
        config.data.held_out = 0  # the lab renders further photos of its own subject; of the user's none is taken away unasked
    for dotted, value in recipe.items():
        *sections, key = dotted.split(".")
        node = functools.reduce(lambda node, section: getattr(node, section, None), sections, config)
        if getattr(node, key, ...) is None:
            setattr(node, key, copy.deepcopy(value))  # or a job of a sweep that changes a list would change the recipe of the next
    require_held_out(config, "evaluation.final_prompts")
    others = config.evaluation.other_prompts
    if others != recipe["evaluation.other_prompts"] and any(map(config.subject.is_named_in, others)):
        raise ConfigError("evaluation.other_prompts", f"must not name the subject's class, {config.subject.class_noun}", others, "name other classes")
    if getattr(config.prior, "class_dir", None) is None and getattr(config.prior, "top_up", False):
        config.prior.top_up = False  # the same run as without, so one that is done is found
    if config.data.resolution is None:
        config.data.resolution = config.base.native_resolution()
    _fit_extra_subjects(config, lab)
    if config.trainer.max_steps is not None:
        _fit_inversion(config)
    if config.trainer.checkpoint_every is None:
        config.trainer.checkpoint_every = config.trainer.eval_every
    if isinstance(config.encoders, BaseEncoders):
        config.encoders = (LabEncoders if lab else ClipDino)(lpips_backbone=config.encoders.lpips_backbone)
    refuse_ignored(config)
    return config


def _prior_of_the_recipe(config: Config) -> NoPrior | ClassImages:
    """Returns class images; no prior where a word alone learns, unless a setting of the prior was asked for.

    No class prompt has the word, so the class term has no gradient there.
    """
    if isinstance(config.method, TextualInversion) and config.prior == RecipePrior():
        return NoPrior()
    return ClassImages(**{own.name: getattr(config.prior, own.name) for own in dataclasses.fields(ClassImages) if own.name != "name"})


def settle_steps(config: Config, photos: int) -> Config:
    """Fills in `trainer.max_steps` where `data.steps_per_image` decides it, in place; returns the config.

    Args:
        config: from `resolve`.
        photos: to train on, those of extra subjects and repeats counted.
    """
    if config.trainer.max_steps is None:
        config.trainer.max_steps = config.data.steps_per_image * photos
        _fit_inversion(config)
    return config


def _fit_extra_subjects(config: Config, lab: bool) -> None:
    """Gives extra subjects the first one's prompt, and refuses those that cannot be learned."""
    for extra in config.extra_subjects:
        extra.prompt = extra.prompt or config.subject.prompt
        if extra.subject_dir is None and not lab:
            rule = "must be set for this base (only base=lab has built-in subjects)"
            raise ConfigError("extra_subjects.subject_dir", rule, None, f"give the folder with the photos of {extra.identifier}")
    if config.extra_subjects and isinstance(config.method, TextualInversion | PivotalTuning):
        rule = f"must be empty with method={config.method.name}, which learns one word"
        raise ConfigError("extra_subjects", rule, len(config.extra_subjects), "take method=lora or method=full")


def _fit_inversion(config: Config) -> None:
    """Gives pivotal tuning half of the steps for its first part, or checks that what is set leaves some for the second."""
    method, steps = config.method, config.trainer.max_steps
    if not isinstance(method, PivotalTuning):
        return
    if method.inversion_steps is None:
        method.inversion_steps = max(1, steps // 2)
    if method.inversion_steps >= steps:
        rule = f"must be below trainer.max_steps ({steps}), so that {method.then} learns too"
        raise ConfigError("method.inversion_steps", rule, method.inversion_steps, "lower it, or choose method=textual_inversion")


def require_held_out(config: Config, where: str) -> None:
    """Refuses final prompts that also choose the step: what is chosen on a prompt looks better there than it is.

    Args:
        config: with both lists of prompts.
        where: the config path of the final prompts, for the message.

    Raises:
        ConfigError: a prompt stands in both lists, word for word but for "a photo of".
    """
    chosen_on = {same_prompt(template) for template in config.evaluation.selection_prompts}
    for template in config.evaluation.final_prompts:
        if same_prompt(template) in chosen_on:
            raise ConfigError(where, "must not hold a prompt of evaluation.selection_prompts", template, "leave it out, or set the other list too")


def _take_from_dreambench(config: Config) -> None:
    """Fills in the photos, the class noun and the final prompts of the DreamBench subject; a class noun or prompts that are set are kept."""
    bench = read_dreambench(config.data.dreambench)
    subject = bench.subject(config.subject.name)
    photos = str(bench.photo_folder(subject))
    if config.data.subject_dir not in (None, photos):
        raise ConfigError("data.subject_dir", "must be null with data.dreambench, which brings the photos", config.data.subject_dir, "leave one out")
    config.data.subject_dir = photos
    if config.subject.class_noun is None:
        config.subject.class_noun = subject.class_noun
    if config.evaluation.final_prompts is None:
        config.evaluation.final_prompts = list(bench.prompts(subject))
