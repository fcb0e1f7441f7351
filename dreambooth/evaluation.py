"""The protocol: prompts x noise -> images -> scores. The same for selection while training and for the final scores of a run folder."""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dreambooth.base.protocol import BaseModel
from dreambooth.config import Config
from dreambooth.encoders import LoadedEncoders
from dreambooth.generation import generate, save_png
from dreambooth.metrics import Diversity, Drift, IdentityFidelity, PromptAlignment, memorisation, per_image_alignment, per_image_fidelity
from dreambooth.statistics import Interval, StepScores, bootstrap_interval


class Item(NamedTuple):
    """One image to draw and score."""

    kind: str  # "subject" or "class"
    template: str  # the prompt with {subject}
    prompt: str  # what the model is given
    scored_prompt: str  # what alignment is measured against: the identifier dropped, the class noun kept
    key: tuple[int, int, int]  # (evaluation seed, template, k): the noise, shared by every step, arm and training seed


def plan(config: Config, templates: Sequence[str], images_per_prompt: int) -> list[Item]:
    """Returns what is drawn: the subject in each template, and the class alone for drift."""
    subject, seed = config.subject, config.evaluation.seed
    items = [
        Item("subject", template, subject.in_prompt(template), subject.class_in_prompt(template), (seed, zlib.crc32(template.encode()), k))
        for template in templates
        for k in range(images_per_prompt)
    ]
    prompt = subject.class_in_prompt(config.evaluation.class_prompt)
    key = zlib.crc32(f"class:{config.evaluation.class_prompt}".encode())
    return items + [Item("class", config.evaluation.class_prompt, prompt, prompt, (seed, key, k)) for k in range(config.evaluation.class_images)]


def selection_plan(config: Config) -> list[Item]:
    """Returns the small plan that chooses the step."""
    return plan(config, config.evaluation.selection_prompts, config.evaluation.selection_images)


def final_plan(config: Config) -> list[Item]:
    """Returns the plan of the final scores; its prompts are never used to choose."""
    return plan(config, config.evaluation.final_prompts, config.evaluation.final_images)


def draw(base: BaseModel, items: Sequence[Item], config: Config, on_progress: Callable[[int], None] = lambda done: None) -> np.ndarray:
    """Returns the images of a plan, uint8 (N, H, W, 3)."""
    return generate(base, [i.prompt for i in items], [i.key for i in items], config.sampling, config.data.resolution, on_progress)


def image_names(items: Sequence[Item]) -> list[str]:
    """Returns the file name of each image of a plan: `<kind>-<prompt>-<k>.png`."""
    slugs = ["".join(c if c.isalnum() else "-" for c in item.template.replace("{subject}", "").lower()) for item in items]
    return [f"{item.kind}-{'-'.join(filter(None, slug.split('-')))[:60]}-{item.key[-1]:02d}.png" for item, slug in zip(items, slugs, strict=True)]


def save_images(folder: Path, items: Sequence[Item], images: np.ndarray, recipe: dict[str, Any]) -> None:
    """Writes the images of a plan, each with the recipe, its prompt and its noise in the PNG."""
    for name, item, image in zip(image_names(items), items, images, strict=True):
        save_png(folder / name, np.ascontiguousarray(image), recipe | {"prompt": item.prompt, "key": list(item.key)})


class Scores(NamedTuple):
    """The scores of one set of images: a value and an interval each, and one row an image."""

    values: dict[str, float]
    intervals: dict[str, Interval]
    per_image: pd.DataFrame

    def as_step(self, step: int) -> StepScores:
        """Returns what the rule for the best step looks at."""
        return StepScores(step, **{key: self.values[key] for key in ("identity_fidelity", "prompt_alignment", "drift", "diversity")})


def score(images: np.ndarray, items: Sequence[Item], subject_features: Tensor, encoders: LoadedEncoders) -> Scores:
    """Returns what the images say: fidelity, alignment and diversity of the subject's, drift and diversity of the class's.

    Args:
        images: uint8 (N, H, W, 3), drawn for the items.
        items: N.
        subject_features: (M, D) identity features of the real photos.
        encoders: the feature extractors.
    """
    is_subject = np.array([item.kind == "subject" for item in items])
    subject_items = [item for item in items if item.kind == "subject"]
    identity = encoders.identity(images)  # (N, D)
    own, other = identity[torch.from_numpy(is_subject)], identity[torch.from_numpy(~is_subject)]
    image_features = encoders.image(images[is_subject])  # (S, E)
    prompts = encoders.text([item.scored_prompt for item in subject_items])  # (S, E)
    groups = torch.tensor([zlib.crc32(item.template.encode()) for item in subject_items])  # (S,)
    values = {
        "identity_fidelity": _compute(IdentityFidelity(), own, subject_features),
        "prompt_alignment": _compute(PromptAlignment(), image_features, prompts),
        "drift": _compute(Drift(), other, subject_features),
        "diversity": _compute(Diversity(), own, groups),
        "class_diversity": _compute(Diversity(), other, torch.zeros(len(other), dtype=torch.long)),
    }
    fidelity = per_image_fidelity(identity, subject_features)
    alignment = torch.full((len(items),), float("nan"))
    alignment[torch.from_numpy(is_subject)] = per_image_alignment(image_features, prompts)
    rows = pd.DataFrame(
        {
            "kind": [item.kind for item in items],
            "template": [item.template for item in items],
            "prompt": [item.prompt for item in items],
            "k": [item.key[-1] for item in items],
            "identity": fidelity.numpy(),
            "alignment": alignment.numpy(),
            "nearest_photo": memorisation(identity, subject_features).numpy(),
        }
    )
    return Scores(values, _intervals(rows), rows)


def _compute(metric: Any, *inputs: Tensor) -> float:
    metric.update(*inputs)
    return float(metric.compute())


def _intervals(rows: pd.DataFrame) -> dict[str, Interval]:
    """Returns 95% intervals for this one subject and training run: over prompts (clusters of images that share one), or over class images."""
    subject, other = rows[rows.kind == "subject"], rows[rows.kind == "class"]
    prompts = subject.template.to_numpy()
    return {
        "identity_fidelity": bootstrap_interval(subject.identity.to_numpy(), prompts, unit="prompt"),
        "prompt_alignment": bootstrap_interval(subject.alignment.to_numpy(), prompts, unit="prompt"),
        "drift": bootstrap_interval(other.identity.to_numpy(), unit="image"),
    }
