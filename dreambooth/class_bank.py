"""The class bank: images of a class with their captions, drawn by the un-tuned base, with their provenance.

A bank is a folder of PNG files and a `manifest.json`: the recipe that made it, and the hash of every image as it was drawn. The folder
is named by the recipe, so the runs of a sweep share it and a bank of another base, prompt or sampler can never be taken for it; the hashes
tell an image that was put there by hand. How many images there are is no part of the recipe: image k depends on `prior.seed` and k, a run
takes as many from the first on as it wants, and a run that wants more draws the rest. One that was cut off is continued; of two processes
that want more of it at once, one draws and one waits.
"""

import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dreambooth.base.protocol import BaseModel
from dreambooth.claims import alone_in
from dreambooth.config import Config, to_plain
from dreambooth.errors import UserError
from dreambooth.files import write_json
from dreambooth.generation import generate, save_png
from dreambooth.ranks import ALONE, Ranks

FORMAT = 3
MANIFEST = "manifest.json"
Progress = Callable[[int, int], None]  # images there are, images wanted


class BankItem(NamedTuple):
    """One class image to draw: its file, its caption and the integers that its noise depends on."""

    name: str
    prompt: str
    key: tuple[int, int, int]


class ClassBank(NamedTuple):
    """Class images with their captions and the class that each shows; `digest` names the content."""

    images: list[Image.Image | Path]
    captions: list[str]
    nouns: list[str]
    digest: str
    warnings: list[str]
    names: list[str]  # of the images, for people


class Manifest(NamedTuple):
    """What a drawn bank says of itself: the recipe, and the sha256 of each image by name, as it was drawn."""

    recipe: dict[str, Any]
    hashes: dict[str, str]


def plan(config: Config, count: int | None = None, noun: str | None = None) -> list[BankItem]:
    """Returns the first class images of a class: the prompts in turn, a seed of its own for each image.

    Args:
        config: resolved.
        count: images; None: `prior.num_images`.
        noun: the class, as class prompts name it; None: the first subject's.
    """
    prompts = bank_prompts(config, noun)
    chosen = [prompts[k % len(prompts)] for k in range(config.prior.num_images if count is None else count)]
    return [BankItem(f"{k:05d}.png", prompt, (config.prior.seed, zlib.crc32(prompt.encode()), k)) for k, prompt in enumerate(chosen)]


def bank_prompts(config: Config, noun: str | None = None) -> list[str]:
    """Returns the captions of a class's images, which take turns; `noun` as in `plan`."""
    return [template.replace("{subject}", noun or config.prior_nouns[0]) for template in config.prior.templates]


def recipe(config: Config, base_digest: str, noun: str | None = None) -> dict[str, Any]:
    """Returns all that decides what the images of a drawn bank look like, however many there are; `noun` as in `plan`."""
    return {
        "format": FORMAT,
        "base_digest": base_digest,
        "sampling": {key: value for key, value in to_plain(config.sampling).items() if key != "batch_size"},
        "resolution": config.data.resolution,
        "seed": config.prior.seed,
        "prompts": bank_prompts(config, noun),
    }


def recipe_digest(config: Config, base_digest: str, noun: str | None = None) -> str:
    """Returns the hex digest that names a drawn bank: that of its recipe."""
    return hashlib.sha256(json.dumps(recipe(config, base_digest, noun), sort_keys=True).encode()).hexdigest()


def drawn_digest(config: Config, base_digest: str, count: int | None = None, noun: str | None = None) -> str:
    """Returns the hex digest that names the first `count` images of a drawn bank, however many more it holds; arguments as for `plan`."""
    count = config.prior.num_images if count is None else count
    return hashlib.sha256(f"{recipe_digest(config, base_digest, noun)} {count}".encode()).hexdigest()


def bank_folder(config: Config, base_digest: str, noun: str | None = None) -> Path:
    """Returns where a drawn bank lies; `noun` as in `plan`."""
    name = re.sub(r"[^\w-]+", "_", noun or config.prior_nouns[0])
    return Path(config.output_dir) / "class_banks" / f"{name}-{recipe_digest(config, base_digest, noun)[:12]}"


def draw_bank(
    config: Config,
    base: BaseModel,
    base_digest: str,
    on_progress: Progress = lambda done, total: None,
    count: int | None = None,
    ranks: Ranks = ALONE,
    noun: str | None = None,
) -> ClassBank:
    """Returns the first class images of a class, as the un-tuned base draws them; draws those that are not there yet.

    The last bits of an image depend on what is drawn beside it. So the batches are always the same ones (the first `sampling.batch_size`
    images, the next, ...) and always whole: the bank may get a few images more than were wanted, and none depends on the count.

    Args:
        config: resolved, with a prior that wants class images.
        base: the un-tuned model; nothing may be attached to it yet.
        base_digest: its content hash.
        on_progress: called with the images there are and the images wanted.
        count, noun: as in `plan`.
        ranks: the processes that draw together, each every so many-th batch; all of them call this, and the first one writes.

    Raises:
        UserError: the bank's folder holds another recipe, or an image that is not the one that was drawn.
    """
    wanted, folder = plan(config, count, noun), bank_folder(config, base_digest, noun)
    is_short = ranks.is_first and not _all_there(folder, recipe(config, base_digest, noun), wanted)
    if ranks.from_first(is_short):
        _grow(config, base, base_digest, len(wanted), noun, on_progress, ranks)
    on_progress(len(wanted), len(wanted))
    captions, nouns = [item.prompt for item in wanted], [noun or config.prior_nouns[0]] * len(wanted)
    files = [folder / item.name for item in wanted]
    return ClassBank(files, captions, nouns, drawn_digest(config, base_digest, len(wanted), noun), [], [str(file) for file in files])


def in_batches(config: Config, count: int) -> int:
    """Returns the images that a bank holds after so many were wanted: those of whole batches."""
    return math.ceil(count / config.sampling.batch_size) * config.sampling.batch_size


def read_manifest(folder: Path) -> Manifest | None:
    """Returns what a drawn bank says of itself; None for a folder without a manifest, or with that of another program.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or "base_digest" not in found:
            return None
        hashes = dict(found.pop("sha256", {}))
    except (ValueError, TypeError):  # no JSON, or no table of hashes
        raise UserError(str(path), "must be a manifest that can be read", None, "delete the folder if this program drew its images") from None
    return Manifest(found, hashes)


def is_as_drawn(path: Path, sha256: str | None) -> bool:
    """Tells whether an image is there as it was drawn; one that is missing, cut off or not yet recorded has to be drawn again.

    Raises:
        UserError: a whole image that is another one than was drawn.
    """
    if _matches(path, sha256):
        return True
    if sha256 is None or not _is_whole(path):
        return False
    next_step = "delete the file to have it drawn again, or name a folder of your own images in prior.class_dir"
    raise UserError(str(path), f"must be the image that the base drew (its hash is in {MANIFEST}), got another one", None, next_step)


def _all_there(folder: Path, wanted: dict[str, Any], items: list[BankItem]) -> bool:
    """Tells whether nothing is left to draw, without the claim on the folder: a bank that is large enough waits for nobody."""
    hashes = _recorded(folder, wanted)
    return all(_matches(folder / item.name, hashes.get(item.name)) for item in items)


def _grow(config: Config, base: BaseModel, base_digest: str, count: int, noun: str | None, on_progress: Progress, ranks: Ranks) -> None:
    """Draws what the first `count` images of a bank lack; arguments as for `draw_bank`."""
    folder, about = bank_folder(config, base_digest, noun), recipe(config, base_digest, noun)
    # Two runs at once would draw in batches of different sizes: images equal to a rounding.
    with alone_in(folder, "draws") if ranks.is_first else nullcontext() as claim:
        hashes: dict[str, str] = {}
        batches: list[list[BankItem]] = []
        if ranks.is_first:
            hashes = _recorded(folder, about)
            write_json(folder / MANIFEST, about | {"sha256": hashes})
            missing = {item.name for item in plan(config, count, noun) if not is_as_drawn(folder / item.name, hashes.get(item.name))}
            batches = [batch for batch in _batches(config, count, noun) if any(item.name in missing for item in batch)]
        batches = ranks.from_first(batches)
        for start in range(0, len(batches), ranks.count):
            turn = batches[start : start + ranks.count]
            if ranks.is_first:
                on_progress(count - len(missing), count)
            drawn = ranks.at_first([_drawn(base, batch, config) for batch in ranks.share(turn)])
            if drawn is None:
                continue
            claim.confirm()
            for batch, images in zip(turn, [images for own in drawn for images in own], strict=True):
                hashes |= _saved(folder, batch, images, hashes, base_digest)
                missing -= {item.name for item in batch}
            write_json(folder / MANIFEST, about | {"sha256": hashes})
    ranks.from_first(None)  # all files are there now


def _batches(config: Config, count: int, noun: str | None) -> list[list[BankItem]]:
    """Returns the whole batches that hold the first `count` images."""
    items, size = plan(config, in_batches(config, count), noun), config.sampling.batch_size
    return [items[k : k + size] for k in range(0, len(items), size)]


def _drawn(base: BaseModel, batch: list[BankItem], config: Config) -> np.ndarray:
    return generate(base, [item.prompt for item in batch], [item.key for item in batch], config.sampling, config.data.resolution)


def _saved(folder: Path, batch: list[BankItem], images: np.ndarray, hashes: dict[str, str], base_digest: str) -> dict[str, str]:
    """Writes those images of a batch that are not there, and returns their hashes."""
    new = {}
    for item, image in zip(batch, images, strict=True):
        path = folder / item.name
        if not is_as_drawn(path, hashes.get(item.name)):
            about = {"prompt": item.prompt, "key": list(item.key), "base_digest": base_digest}
            new[item.name] = _file_hash(save_png(path, np.ascontiguousarray(image), about))
    return new


def _recorded(folder: Path, wanted: dict[str, Any]) -> dict[str, str]:
    """Returns the sha256 of each image of a bank by name, as it was drawn; empty for a new one.

    Raises:
        UserError: the manifest is that of another recipe, or cannot be read.
    """
    if not (folder / MANIFEST).is_file():
        return {}
    next_step = "delete the folder; it will be drawn anew"
    try:
        found = read_manifest(folder)
    except UserError:
        found = None
    if found is None:
        raise UserError(str(folder), f"must have a readable {MANIFEST}", None, next_step)
    odd = next((key for key in {**wanted, **found.recipe} if found.recipe.get(key) != wanted.get(key)), None)
    if odd:
        raise UserError(str(folder), f"holds class images of another recipe: its {odd!r} is not what this run asks for", None, next_step)
    return found.hashes


def _matches(path: Path, sha256: str | None) -> bool:
    return sha256 is not None and path.is_file() and _file_hash(path) == sha256


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
