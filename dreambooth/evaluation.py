"""The protocol: prompts x noise -> images. The same for selection while training and for the final scores of a run folder."""

import json
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dreambooth.base.protocol import BaseModel
from dreambooth.config import Config
from dreambooth.generation import generate, read_recipe, save_png
from dreambooth.ranks import Ranks


class Item(NamedTuple):
    """One image to draw and score."""

    kind: str  # "subject", "class", or "other" (a prompt of another class)
    template: str  # the prompt with {subject}
    prompt: str  # what the model is given
    scored_prompt: str  # what alignment is measured against: the identifier dropped, the class noun kept
    key: tuple[int, int, int, int]  # (evaluation seed, subject, template, k): the noise, shared by every step, arm and training seed


def plan(config: Config, templates: Sequence[str], images_per_prompt: int, purpose: str = "") -> list[Item]:
    """Returns what is drawn: the subject in each template, and the class alone for drift, with noise of its own for each purpose."""
    subject, settings = config.subject, config.evaluation
    items = [
        Item("subject", template, subject.in_prompt(template), subject.class_in_prompt(template), _key(config, template, k))
        for template in templates
        for k in range(images_per_prompt)
    ]
    prompt = subject.class_in_prompt(settings.class_prompt)
    keys = [_key(config, f"{purpose}class:{settings.class_prompt}", k) for k in range(settings.class_images)]
    return items + [Item("class", settings.class_prompt, prompt, prompt, key) for key in keys]


def selection_plan(config: Config) -> list[Item]:
    """Returns the small plan that chooses the step; it shares no noise with the final one, the class's images included."""
    return plan(config, config.evaluation.selection_prompts, config.evaluation.selection_images, "selection ")


def final_plan(config: Config) -> list[Item]:
    """Returns the plan of the final scores, whose prompts are never used to choose; with prompts of other classes, for their drift."""
    settings = config.evaluation
    others = [text for text in settings.other_prompts or [] if not config.subject.is_named_in(text)]
    return plan(config, settings.final_prompts, settings.final_images) + [
        Item("other", text, text, text, _key(config, f"other:{text}", k)) for text in others for k in range(settings.other_images or 0)
    ]


def _key(config: Config, text: str, k: int) -> tuple[int, int, int, int]:
    """Returns the noise key of image k of a prompt: the same for all arms, steps and training seeds of one subject.

    Subjects differ, so that they are independent draws and an interval over subjects is right. A subject is its name; without one, the
    lab's individual. Photos without a name all share one key: their folder's name says nothing about them, and the class noun may be
    what an experiment varies.
    """
    subject = config.subject
    lab = f"lab:{subject.class_noun}:{subject.lab_seed}" if config.data.subject_dir is None else None
    name = f"name:{subject.name}" if subject.name is not None else lab
    return config.evaluation.seed, zlib.crc32(name.encode()) if name else 0, zlib.crc32(text.encode()), k


def draw(base: BaseModel, items: Sequence[Item], config: Config, on_progress: Callable[[int], None] = lambda done: None) -> np.ndarray:
    """Returns the images of a plan, uint8 (N, H, W, 3)."""
    return generate(base, [i.prompt for i in items], [i.key for i in items], config.sampling, config.data.resolution, on_progress)


def draw_together(base: BaseModel, items: Sequence[Item], config: Config, ranks: Ranks) -> np.ndarray | None:
    """Returns what `draw` does, on the first rank; each rank draws every so many-th batch, as it is in one process, and none is drawn twice.

    Args:
        base, items, config: as for `draw`, the same on all ranks, which all call this.
        ranks: this process among them; the other ones get None.
    """
    size = config.sampling.batch_size
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    drawn = ranks.at_first([draw(base, part, config) for part in ranks.share(parts)])
    if drawn is None:
        return None
    return np.concatenate([drawn[k % ranks.count][k // ranks.count] for k in range(len(parts))])


class Kept(NamedTuple):
    """The images of a plan in a folder, batch by batch as they are drawn; None for a batch that is still to be drawn."""

    folder: Path
    names: list[str]
    recipes: list[dict[str, Any]]
    batches: list[tuple[slice, np.ndarray | None]]

    @property
    def there(self) -> int:
        """How many images need not be drawn."""
        return sum(len(images) for _, images in self.batches if images is not None)


def find_kept(folder: Path, items: Sequence[Item], config: Config, recipe: dict[str, Any]) -> Kept:
    """Returns what of a plan is already drawn in a folder, exactly as it would be drawn now.

    Which images are drawn together can change the last bits of their pixels, so whole batches count: one image that is missing, damaged
    or was made by another recipe (weights, prompt, noise, sampling, neighbours in the batch) has its batch drawn anew.

    Args:
        folder: of the images.
        items: the plan.
        config: its sampling and resolution are part of every image's recipe.
        recipe: what else an image depends on, and whatever is to be kept in the file: plain values.
    """
    size, names = config.sampling.batch_size, image_names(items)
    recipes, batches = [], []
    drawing = {"sampling": {key: getattr(config.sampling, key) for key in config.sampling.__dataclass_fields__}, "resolution": config.data.resolution}
    for start in range(0, len(items), size):
        part = slice(start, min(start + size, len(items)))
        batch = f"{zlib.crc32(repr([(item.prompt, item.key) for item in items[part]]).encode()):08x}"
        recipes += [recipe | drawing | {"prompt": item.prompt, "key": list(item.key), "batch": batch} for item in items[part]]
        batches.append((part, _read_batch(folder, names[part], recipes[part], config.data.resolution)))
    return Kept(folder, names, recipes, batches)


def draw_missing(
    base: BaseModel, items: Sequence[Item], config: Config, kept: Kept, on_progress: Callable[[int], None] = lambda done: None
) -> np.ndarray:
    """Returns the images of a plan, uint8 (N, H, W, 3): those that are kept, and the rest, drawn and written batch by batch.

    Args:
        base: the model.
        items, config: as `find_kept` was given.
        kept: what it found.
        on_progress: called after each batch with the number of its images.
    """
    done = []
    for part, images in kept.batches:
        if images is None:
            images = np.ascontiguousarray(draw(base, items[part], config))  # in memory as a picture that is read: networks round by layout
            for name, image, recipe in zip(kept.names[part], images, kept.recipes[part], strict=True):
                save_png(kept.folder / name, image, recipe)
        done.append(images)
        on_progress(len(images))
    return np.concatenate(done)


def _read_batch(folder: Path, names: Sequence[str], recipes: Sequence[dict[str, Any]], resolution: int) -> np.ndarray | None:
    """Returns the images of one batch, uint8 (n, H, W, 3), if each is there and has its recipe; else None."""
    images = []
    for name, recipe in zip(names, recipes, strict=True):
        path = folder / name
        try:
            if not path.is_file() or read_recipe(path) != json.loads(json.dumps(recipe)):
                return None
            with Image.open(path) as picture:
                images.append(np.asarray(picture.convert("RGB")))
        except (OSError, SyntaxError, ValueError):  # what PIL and json say of a damaged file
            return None
    return np.stack(images) if all(image.shape == (resolution, resolution, 3) for image in images) else None


def image_names(items: Sequence[Item]) -> list[str]:
    """Returns the file name of each image of a plan, no two alike: `<kind>-<prompt>-<k>.png`, with a number where prompts read alike."""
    stems = [f"{item.kind}-{_slug(item.template)}" for item in items]
    templates = Counter(stem for stem, _ in {(stem, item.template) for stem, item in zip(stems, items, strict=True)})
    return [
        f"{stem if templates[stem] == 1 else f'{stem}-{zlib.crc32(item.template.encode()):08x}'}-{item.key[-1]:02d}.png"
        for item, stem in zip(items, stems, strict=True)
    ]


def _slug(template: str) -> str:
    words = "".join(c if c.isalnum() else "-" for c in template.replace("{subject}", "").lower())
    return "-".join(filter(None, words.split("-")))[:60]


def save_images(folder: Path, items: Sequence[Item], images: np.ndarray, recipe: dict[str, Any]) -> None:
    """Writes the images of a plan, each with the recipe, its prompt and its noise in the PNG."""
    for name, item, image in zip(image_names(items), items, images, strict=True):
        save_png(folder / name, np.ascontiguousarray(image), recipe | {"prompt": item.prompt, "key": list(item.key)})
