"""Recipes: what `null` in the config means for each family of base models, and the step that fills it in."""

import copy
from typing import Any

from dreambooth.config import BaseEncoders, Config
from dreambooth.encoders import ClipDino, LabEncoders
from dreambooth.errors import ConfigError

# The lab: measured on this project's own base, see experiments/. The final contexts appear in no photo and in no class caption;
# the selection contexts are in no photo.
LAB: dict[str, Any] = {
    "subject.class_noun": "robot",
    "subject.prompt": "a photo of a {subject}",
    "data.batch_size": 4,
    "prior.batch_size": 4,
    "prior.num_images": 64,
    "prior.prompts": ["a photo of a {subject}"]
    + [
        f"a photo of a {{subject}} {context}"
        for context in (
            "on the grass",
            "on a wooden table",
            "on the beach",
            "in a city",
            "at night",
            "at sunset",
            "on a checkered floor",
            "on a red carpet",
        )
    ],
    "method.train_text_encoder": True,
    "method.train_token": True,
    "objective.weighting": "capped_velocity",
    "optim.learning_rate": 2e-4,
    "optim.text_encoder_learning_rate": 4e-4,
    "optim.token_learning_rate": 5e-3,
    "trainer.max_steps": 200,
    "trainer.eval_every": 50,
    "sampling.sampler": "dpmsolver++",
    "sampling.steps": 16,
    "sampling.guidance_scale": 3.0,
    "sampling.batch_size": 32,
    "evaluation.selection_prompts": [f"a photo of a {{subject}} {context}" for context in ("in a city", "at night", "at sunset", "on a red carpet")],
    "evaluation.final_prompts": [
        f"a photo of a {{subject}} {context}" for context in ("in the snow", "in the jungle", "in the desert", "on the moon")
    ],
    "evaluation.class_prompt": "a photo of a {subject}",
    "evaluation.selection_images": 4,
    "evaluation.final_images": 8,
    "evaluation.class_images": 12,
}

# Stable Diffusion: the paper's learning rate and lambda, its sample count as it is used with 200 class images
# (Ruiz et al. 2023, sec. 4 and supplement; the diffusers guide).
STABLE_DIFFUSION: dict[str, Any] = {
    "subject.prompt": "a photo of a {subject}",
    "data.batch_size": 1,
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
    "sampling.sampler": "ddim",
    "sampling.steps": 50,
    "sampling.guidance_scale": 7.5,
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
}


def resolve(config: Config) -> Config:
    """Fills every `null` that the base's recipe knows, and the encoders, in place; returns the config.

    Raises:
        ConfigError: if the subject is not said: photos without a class noun, or neither photos nor the lab.
    """
    lab = config.base.is_lab()
    if config.data.subject_dir is not None and config.subject.class_noun is None:
        raise ConfigError("subject.class_noun", "must be set when data.subject_dir is", None, "say what the photos show: subject.class_noun=dog")
    if config.data.subject_dir is None and not lab:
        raise ConfigError(
            "data.subject_dir",
            "must be set for this base (only base=lab has a built-in subject)",
            None,
            "give the folder with the photos: data.subject_dir=photos/ subject.class_noun=dog",
        )
    for dotted, value in (LAB if lab else STABLE_DIFFUSION).items():
        section, key = dotted.split(".")
        node = getattr(config, section)
        if getattr(node, key, ...) is None:
            setattr(node, key, copy.deepcopy(value))  # or a job of a sweep that changes a list would change the recipe of the next
    if config.data.resolution is None:
        config.data.resolution = config.base.native_resolution()
    if config.trainer.checkpoint_every is None:
        config.trainer.checkpoint_every = config.trainer.eval_every
    if isinstance(config.encoders, BaseEncoders):
        config.encoders = LabEncoders() if lab else ClipDino()
    return config
