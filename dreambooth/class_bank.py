"""The class bank: images of the class with their captions, drawn by the un-tuned base or brought by the user, with their provenance.

A drawn bank is a folder of PNG files and a `manifest.json`: the recipe that made it, and the hash of every image as it was drawn. The folder
is named by the recipe, so the runs of a sweep share it and a bank of another base, prompt or sampler can never be taken for it; the hashes
tell an image that was put there by hand. One that was cut off is continued; of two processes that want it at once, one draws and one waits.
"""

import hashlib
import json
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dreambooth.base.protocol import BaseModel
from dreambooth.captions import fill, is_word_in
from dreambooth.claims import alone_in
from dreambooth.config import Config, to_plain
from dreambooth.errors import UserError
from dreambooth.files import write_json
from dreambooth.generation import generate, save_png
from dreambooth.photo_folder import read_photo_folder
from dreambooth.ranks import ALONE, Ranks

Progress = Callable[[int, int], None]  # images there are, images wanted


class BankItem(NamedTuple):
    """One class image to draw: its file, its caption and the integers that its noise depends on."""

    name: str
    prompt: str
    key: tuple[int, int, int]


class ClassBank(NamedTuple):
    """Class images with their captions; `digest` names the content."""

    images: list[Image.Image | Path]
    captions: list[str]
    digest: str
    warnings: list[str]


def wants_class_images(config: Config) -> bool:
    """Tells whether this run needs images of the class."""
    return config.prior.wants_bank


def to_draw(config: Config, own: ClassBank | None) -> int:
    """Returns the number of class images that the base has to draw beside the user's own.

    Args:
        config: resolved.
        own: the user's images, from `read_user_bank`.
    """
    if not wants_class_images(config) or (own and not config.prior.top_up):
        return 0
    return max(0, images_wanted(config) - (len(own.images) if own else 0))


def images_wanted(config: Config) -> int:
    """Returns the class images that a prior wants in all: `prior.num_images` for each class that a subject belongs to."""
    return config.prior.num_images * len(config.prior_nouns)


def bank_digest(config: Config, base_digest: str, own: ClassBank | None) -> str:
    """Returns the hex digest that names the class images of a run before any is drawn; "none" where it has none.

    Args:
        config: resolved.
        base_digest: content hash of the base.
        own: the user's images, from `read_user_bank`.
    """
    if not wants_class_images(config):
        return "none"
    count = to_draw(config, own)
    parts = ([own.digest] if own else []) + ([manifest_digest(config, base_digest, count)] if count else [])
    return parts[0] if len(parts) == 1 else hashlib.sha256("+".join(parts).encode()).hexdigest()


def complete_bank(
    config: Config,
    base: BaseModel,
    base_digest: str,
    own: ClassBank | None,
    on_progress: Progress = lambda done, total: None,
    ranks: Ranks = ALONE,
) -> ClassBank | None:
    """Returns all class images of a run: the user's first, then those of the base; None where the prior wants none.

    Args:
        config, base, base_digest, on_progress, ranks: as `draw_bank`.
        own: the user's images, from `read_user_bank`.
    """
    count = to_draw(config, own)
    if not count:
        return own
    drawn = draw_bank(config, base, base_digest, on_progress, count, ranks)
    if own is None:
        return drawn
    return ClassBank(own.images + drawn.images, own.captions + drawn.captions, bank_digest(config, base_digest, own), own.warnings)


def read_user_bank(config: Config) -> ClassBank | None:
    """Returns the user's own class images; None without `prior.class_dir`.

    Their captions are the first class prompt, or with `data.captions=auto` each one's own (the file beside it, or its name), where it has one.

    Raises:
        UserError: naming `prior.class_dir` or the file.
    """
    if not wants_class_images(config) or config.prior.class_dir is None:
        return None
    found = read_photo_folder(config.prior.class_dir, config.data.resolution, config.data.on_bad_photo, "prior.class_dir")
    caption = config.subject.prior_in_prompt(config.prior.prompts[0])
    photos = sorted(found.photos, key=lambda photo: photo.sha256)  # by content: renaming a file changes no result
    images, captions = [photo.image for photo in photos], [caption] * len(photos)
    if config.data.captions == "prompt":
        return ClassBank(images, captions, found.digest, found.warnings)
    noun = config.subject.prior_in_prompt("{subject}")
    captions = [fill(photo.caption, noun, "", noun) if photo.caption else caption for photo in photos]
    words = [subject.identifier for subject in config.subjects]
    doubts = [
        f"the caption of the class image {photo.name} names the subject: {text}"
        for photo, text in zip(photos, captions, strict=True)
        if any(is_word_in(word, text) for word in words)
    ]
    digest = hashlib.sha256("\n".join([found.digest, *captions]).encode()).hexdigest()
    return ClassBank(images, captions, digest, found.warnings + doubts)


def plan(config: Config, count: int | None = None) -> list[BankItem]:
    """Returns the class images that a resolved config asks for: the prompts in turn, a seed of its own for each image.

    Args:
        config: resolved.
        count: images; None: all that the prior wants.
    """
    prompts = config.prior_prompts
    chosen = [prompts[k % len(prompts)] for k in range(images_wanted(config) if count is None else count)]
    return [BankItem(f"{k:05d}.png", prompt, (config.seed, zlib.crc32(prompt.encode()), k)) for k, prompt in enumerate(chosen)]


def recipe(config: Config, base_digest: str, count: int | None = None) -> dict[str, Any]:
    """Returns all that decides what a drawn bank looks like; `count` as in `plan`."""
    return {
        "format": 2,
        "base_digest": base_digest,
        "sampling": {key: value for key, value in to_plain(config.sampling).items() if key != "batch_size"},
        "resolution": config.data.resolution,
        "images": [item._asdict() | {"key": list(item.key)} for item in plan(config, count)],
    }


def manifest_digest(config: Config, base_digest: str, count: int | None = None) -> str:
    """Returns the hex digest that names a drawn bank: that of its recipe."""
    return hashlib.sha256(json.dumps(recipe(config, base_digest, count), sort_keys=True).encode()).hexdigest()


def draw_bank(
    config: Config,
    base: BaseModel,
    base_digest: str,
    on_progress: Progress = lambda done, total: None,
    count: int | None = None,
    ranks: Ranks = ALONE,
) -> ClassBank:
    """Returns the class images of the un-tuned base, drawing those that are not there yet.

    Args:
        config: resolved, with a prior that wants class images.
        base: the un-tuned model; nothing may be attached to it yet.
        base_digest: its content hash.
        on_progress: called with the images there are and the images wanted.
        count: images; None: `prior.num_images`.
        ranks: the processes that draw together, each every so many-th batch; all of them call this, and the first one writes.

    Raises:
        UserError: the bank's folder holds another recipe, or an image that is not the one that was drawn.
    """
    wanted, digest = plan(config, count), manifest_digest(config, base_digest, count)
    folder = Path(config.output_dir) / "class_banks" / f"{config.subject.class_noun.replace(' ', '_')}-{digest[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    # Two runs at once would draw in batches of different sizes: images equal to a rounding.
    with alone_in(folder, "draws") if ranks.is_first else nullcontext() as claim:
        missing: list[BankItem] = []
        if ranks.is_first:
            hashes = _recorded_hashes(folder, recipe(config, base_digest, count))
            missing = [item for item in wanted if not _is_as_drawn(folder / item.name, hashes.get(item.name))]
        missing = ranks.from_first(missing)
        together = config.sampling.batch_size * ranks.count
        for start in range(0, len(missing), together):
            batches = [
                missing[k : k + config.sampling.batch_size] for k in range(start, min(start + together, len(missing)), config.sampling.batch_size)
            ]
            on_progress(len(wanted) - len(missing) + start, len(wanted))
            drawn = ranks.at_first([_drawn(base, batch, config) for batch in ranks.share(batches)])
            if drawn is None:
                continue
            claim.confirm()
            for item, image in zip(missing[start : start + together], np.concatenate([images for own in drawn for images in own]), strict=True):
                about = {"prompt": item.prompt, "key": list(item.key), "base_digest": base_digest}
                hashes[item.name] = _file_hash(save_png(folder / item.name, np.ascontiguousarray(image), about))
            write_json(folder / "manifest.json", recipe(config, base_digest, count) | {"sha256": hashes})
    ranks.from_first(None)  # all files are there now
    on_progress(len(wanted), len(wanted))
    return ClassBank([folder / item.name for item in wanted], [item.prompt for item in wanted], digest, [])


def _drawn(base: BaseModel, batch: list[BankItem], config: Config) -> np.ndarray:
    return generate(base, [item.prompt for item in batch], [item.key for item in batch], config.sampling, config.data.resolution)


def _recorded_hashes(folder: Path, wanted: dict[str, Any]) -> dict[str, str]:
    """Returns the sha256 of each image by name, as it was drawn; writes the manifest of a new bank.

    Raises:
        UserError: the manifest is that of another recipe.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        write_json(path, wanted | {"sha256": {}})
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        hashes = dict(found.pop("sha256", {}))
    except (ValueError, AttributeError, TypeError):  # no JSON, or no object: the recipe of nothing
        raise UserError(str(folder), "must have a readable manifest.json", None, "delete the folder; it will be drawn anew") from None
    odd = next((key for key in {**wanted, **found} if found.get(key) != wanted.get(key)), None)
    if odd:
        rule = f"holds class images of another recipe: its {odd!r} is not what this run asks for"
        raise UserError(str(folder), rule, None, "delete the folder; it will be drawn anew")
    return hashes


def _is_as_drawn(path: Path, sha256: str | None) -> bool:
    """Tells whether an image is there as it was drawn; one that is missing, cut off or not yet recorded has to be drawn again.

    Raises:
        UserError: a whole image that is another one than was drawn.
    """
    if sha256 is None or not path.is_file():
        return False
    if _file_hash(path) == sha256:
        return True
    if not _is_whole(path):
        return False
    next_step = "delete the file to have it drawn again, or name your own images in prior.class_dir"
    raise UserError(str(path), "must be the image that the base drew (its hash is in manifest.json), got another one", None, next_step)


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
        return True
    except OSError:  # missing or cut off
        return False
