"""The class bank: images of the class with their captions, drawn by the un-tuned base or brought by the user, with their provenance.

A drawn bank is a folder of PNG files and a `manifest.json`, named by the content of all that made it, so that the runs of a sweep share it
and a bank of another base, prompt or sampler can never be taken for it. One killed half-way is continued.
"""

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dreambooth.base.protocol import BaseModel
from dreambooth.config import ClassImages, Config, to_plain
from dreambooth.errors import UserError
from dreambooth.files import write_json
from dreambooth.generation import generate, save_png
from dreambooth.photo_folder import read_photo_folder


class BankItem(NamedTuple):
    """One class image to draw: its file, its caption and the integers that its noise depends on."""

    name: str
    prompt: str
    key: tuple[int, int]


class ClassBank(NamedTuple):
    """Class images with their captions; `digest` names the content."""

    images: list[Image.Image | Path]
    captions: list[str]
    digest: str
    warnings: list[str]


def plan(config: Config) -> list[BankItem]:
    """Returns the class images that a resolved config asks for: the prompts in turn, a seed of its own for each image."""
    prompts = [config.subject.class_in_prompt(template) for template in config.prior.prompts]
    chosen = [prompts[k % len(prompts)] for k in range(config.prior.num_images)]
    return [BankItem(f"{k:05d}.png", prompt, (config.seed, zlib.crc32(prompt.encode()), k)) for k, prompt in enumerate(chosen)]


def manifest(config: Config, base_digest: str) -> dict[str, Any]:
    """Returns all that decides what a drawn bank looks like."""
    return {
        "format": 1,
        "base_digest": base_digest,
        "sampling": {key: value for key, value in to_plain(config.sampling).items() if key != "batch_size"},
        "resolution": config.data.resolution,
        "images": [item._asdict() | {"key": list(item.key)} for item in plan(config)],
    }


def manifest_digest(config: Config, base_digest: str) -> str:
    """Returns the hex digest that names a drawn bank."""
    return hashlib.sha256(json.dumps(manifest(config, base_digest), sort_keys=True).encode()).hexdigest()


def read_user_bank(config: Config) -> ClassBank:
    """Returns the user's own class images, all captioned with the first class prompt.

    Raises:
        UserError: naming `prior.class_dir` or the file.
    """
    found = read_photo_folder(config.prior.class_dir, config.data.resolution, config.data.on_bad_photo, "prior.class_dir")
    caption = config.subject.class_in_prompt(config.prior.prompts[0])
    images = [photo.image for photo in sorted(found.photos, key=lambda photo: photo.sha256)]  # by content: renaming a file changes no result
    return ClassBank(images, [caption] * len(images), found.digest, found.warnings)


def draw_bank(config: Config, base: BaseModel, base_digest: str, on_progress: Callable[[int, int], None] = lambda done, total: None) -> ClassBank:
    """Returns the class images of the un-tuned base, drawing those that are not there yet.

    Args:
        config: resolved, with prior preservation by class images.
        base: the un-tuned model; nothing may be attached to it yet.
        base_digest: its content hash.
        on_progress: called with the images there are and the images wanted.

    Raises:
        UserError: the bank's folder holds images that another recipe made.
    """
    wanted, digest = plan(config), manifest_digest(config, base_digest)
    folder = Path(config.output_dir) / "class_banks" / f"{config.subject.class_noun.replace(' ', '_')}-{digest[:12]}"
    recipe = manifest(config, base_digest)
    if (folder / "manifest.json").is_file():
        if _read(folder / "manifest.json") != recipe:
            raise UserError(str(folder), "holds class images of another recipe", None, "delete the folder; it will be drawn anew")
    else:
        write_json(folder / "manifest.json", recipe)
    missing = [item for item in wanted if not _is_whole(folder / item.name)]
    for start in range(0, len(missing), config.sampling.batch_size):
        batch = missing[start : start + config.sampling.batch_size]
        on_progress(len(wanted) - len(missing) + start, len(wanted))
        images = generate(base, [item.prompt for item in batch], [item.key for item in batch], config.sampling, config.data.resolution)
        for item, image in zip(batch, images, strict=True):
            save_png(folder / item.name, np.ascontiguousarray(image), {"prompt": item.prompt, "key": list(item.key), "base_digest": base_digest})
    on_progress(len(wanted), len(wanted))
    return ClassBank([folder / item.name for item in wanted], [item.prompt for item in wanted], digest, [])


def wants_class_images(config: Config) -> bool:
    """Tells whether this run preserves the prior by class images."""
    return isinstance(config.prior, ClassImages)


def _read(manifest_path: Path) -> Any:
    try:
        return json.loads(manifest_path.read_text(encoding="utf-8"))
    except ValueError:  # no JSON: the recipe of nothing
        return None


def _is_whole(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
        return True
    except OSError:  # missing or cut off: drawn again
        return False
