"""The class images of a run: those in the user's folder, then those of the un-tuned base; how many of each, and the digest that names them.

The user's folder is judged like the photos. One that is itself a bank which this program drew has to fit the run, and brings its own captions.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dreambooth.base.protocol import BaseModel
from dreambooth.captions import fill, is_word_in
from dreambooth.class_bank import (
    FORMAT,
    MANIFEST,
    ClassBank,
    Manifest,
    Progress,
    bank_folder,
    bank_prompts,
    draw_bank,
    drawn_digest,
    in_batches,
    is_as_drawn,
    plan,
    read_manifest,
)
from dreambooth.config import Config
from dreambooth.errors import UserError
from dreambooth.photo_folder import read_photo_folder
from dreambooth.ranks import ALONE, Ranks

WHERE = "prior.class_dir"


def wants_class_images(config: Config) -> bool:
    """Tells whether this run needs images of the class."""
    return config.prior.wants_bank


def to_draw(config: Config, own: ClassBank | None) -> dict[str, int]:
    """Returns the number of class images that the base has to give beside the user's own, by class: what they lack of `prior.num_images`.

    Args:
        config: resolved.
        own: the user's images, from `read_user_bank`.
    """
    if not wants_class_images(config) or (own and not config.prior.top_up):
        return {}
    there = Counter(own.nouns if own else [])
    return {noun: config.prior.num_images - there[noun] for noun in config.prior_nouns if there[noun] < config.prior.num_images}


def still_to_draw(config: Config, base_digest: str, own: ClassBank | None) -> int:
    """Returns the number of class images that a run will write: those that no earlier run has drawn; arguments as for `bank_digest`."""
    found = 0
    for noun, count in to_draw(config, own).items():
        folder = bank_folder(config, base_digest, noun)
        found += sum(not (folder / item.name).is_file() for item in plan(config, in_batches(config, count), noun))
    return found


def bank_digest(config: Config, base_digest: str, own: ClassBank | None) -> str:
    """Returns the hex digest that names the class images of a run before any is drawn; "none" where it has none.

    Args:
        config: resolved.
        base_digest: content hash of the base.
        own: the user's images, from `read_user_bank`.
    """
    if not wants_class_images(config):
        return "none"
    drawn = [drawn_digest(config, base_digest, count, noun) for noun, count in to_draw(config, own).items()]
    return _joined(([own.digest] if own else []) + drawn)


def complete_bank(
    config: Config,
    base: BaseModel,
    base_digest: str,
    own: ClassBank | None,
    on_progress: Progress = lambda done, total: None,
    ranks: Ranks = ALONE,
) -> ClassBank | None:
    """Returns all class images of a run: the user's first, then those of the base, class by class; None where the prior wants none.

    Args:
        config, base, base_digest, on_progress, ranks: as `draw_bank`.
        own: the user's images, from `read_user_bank`.
    """
    counts = to_draw(config, own)
    total, before, parts = sum(counts.values()), 0, [own] if own else []
    for noun, count in counts.items():
        parts.append(draw_bank(config, base, base_digest, lambda done, _, before=before: on_progress(before + done, total), count, ranks, noun))
        before += count
    return together(parts) if parts else None


def together(parts: Sequence[ClassBank]) -> ClassBank:
    """Returns several banks as one, in their order."""
    if len(parts) == 1:
        return parts[0]
    return ClassBank(
        [image for part in parts for image in part.images],
        [caption for part in parts for caption in part.captions],
        [noun for part in parts for noun in part.nouns],
        _joined([part.digest for part in parts]),
        [line for part in parts for line in part.warnings],
        [name for part in parts for name in part.names],
    )


def _joined(digests: Sequence[str]) -> str:
    """Returns one digest for several, or the only one."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("+".join(digests).encode()).hexdigest()


def read_user_bank(config: Config) -> ClassBank | None:
    """Returns the user's own class images; None without `prior.class_dir`.

    Their captions are the first class prompt, or with `data.captions=auto` each one's own (the file beside it, or its name), where it has one.
    Where the subjects are of several classes, the folder holds one for each, named by the class. {subject} in its path stands for the class noun.

    Raises:
        UserError: naming `prior.class_dir` or the file.
    """
    if not wants_class_images(config) or config.prior.class_dir is None:
        return None
    folder = config.subject.prior_in_prompt(config.prior.class_dir)  # run.json keeps {subject}: one word for all subjects of a study
    nouns = config.prior_nouns
    if len(nouns) == 1:
        return _images_of(config, folder, nouns[0])
    folders = _folders_by_class(Path(folder).expanduser(), nouns, config.prior.top_up)
    return together([_images_of(config, str(folder), noun) for noun, folder in folders.items()])


def _folders_by_class(root: Path, nouns: list[str], top_up: bool) -> dict[str, Path]:
    """Returns the folder of each class that has one in `root`: that of its name, "_" for a space, whatever the letters' case.

    Raises:
        UserError: a class without a folder, where none is to be drawn, or anything that belongs to no class.
    """
    found = {path.name.casefold(): path for path in sorted(root.iterdir()) if not path.name.startswith(".")} if root.is_dir() else {}
    folders = {noun: path for noun in nouns if (path := found.get(noun.replace(" ", "_").casefold(), found.get(noun.casefold()))) and path.is_dir()}
    bare = [noun for noun in nouns if noun not in folders]
    rule = f"must hold a folder for each class that is learned ({', '.join(nouns)}), named by it"
    if bare and (not top_up or not folders):
        next_step = f"put the images of each class into its own, or leave {WHERE} out to have all drawn"
        if folders:
            next_step = f"make {root / bare[0].replace(' ', '_')}, or set prior.top_up=true to have the images of {', '.join(bare)} drawn"
        raise UserError(WHERE, rule, str(root), next_step)
    odd = next((path for path in found.values() if path not in folders.values()), None)
    if odd is not None:
        raise UserError(WHERE, f"{rule}, and nothing else", odd.name, "move it into the folder of its class, or away")
    return folders


def _images_of(config: Config, folder: str, noun: str) -> ClassBank:
    """Returns the images of one class in a folder of the user's, which may be a bank that this program drew."""
    root = Path(folder).expanduser()
    manifest = read_manifest(root)
    if manifest is not None:
        return _images_of_bank(config, root, manifest, noun)
    inner = next((path.parent for path in sorted(root.rglob(MANIFEST)) if read_manifest(path.parent) is not None), None)
    if inner is not None:
        rule = "must not hold a folder of class images that this program drew among others"
        raise UserError(WHERE, rule, str(inner), "name that folder itself, or one without it")
    found = read_photo_folder(folder, config.data.resolution, config.data.on_bad_photo, WHERE)
    caption = bank_prompts(config, noun)[0]
    photos = sorted(found.photos, key=lambda photo: photo.sha256)  # by content: renaming a file changes no result
    images, captions, nouns = [photo.image for photo in photos], [caption] * len(photos), [noun] * len(photos)
    names = [photo.name for photo in photos]
    if config.data.captions == "prompt":
        return ClassBank(images, captions, nouns, found.digest, found.warnings, names)
    captions = [fill(photo.caption, noun, "", noun) if photo.caption else caption for photo in photos]
    words = [subject.identifier for subject in config.subjects]
    doubts = [
        f"the caption of the class image {photo.name} names the subject: {text}"
        for photo, text in zip(photos, captions, strict=True)
        if any(is_word_in(word, text) for word in words)
    ]
    digest = hashlib.sha256("\n".join([found.digest, *captions]).encode()).hexdigest()
    return ClassBank(images, captions, nouns, digest, found.warnings + doubts, names)


def _images_of_bank(config: Config, folder: Path, manifest: Manifest, noun: str) -> ClassBank:
    """Returns the first `prior.num_images` of a bank that this program drew, or as many as it has, with the captions they were drawn for.

    Raises:
        UserError: it was drawn for something else than this run trains on, an image is not as it was drawn, or it is to be topped up.
    """
    _check_fits(config, folder, manifest, noun)
    items = []
    for item in plan(config, None, noun):
        if item.name not in manifest.hashes:
            break
        if not is_as_drawn(folder / item.name, manifest.hashes[item.name]):
            next_step = f"leave {WHERE} out in the run that drew it, and it is drawn again"
            raise UserError(str(folder / item.name), "must be there whole, as it was drawn", None, next_step)
        items.append(item)
    if not items:
        raise UserError(WHERE, "must hold at least one class image", str(folder), f"leave {WHERE} out to have them drawn")
    hashes, captions = [manifest.hashes[item.name] for item in items], [item.prompt for item in items]
    foreign = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") and path.name not in {*manifest.hashes, MANIFEST})
    warnings = [f"{folder}: ignored what its manifest does not name ({len(foreign)}): {', '.join(foreign[:3])}"] if foreign else []
    digest = hashlib.sha256("\n".join([*hashes, *captions]).encode()).hexdigest()
    files = [folder / item.name for item in items]
    return ClassBank(files, captions, [noun] * len(items), digest, warnings, [str(file) for file in files])


def _check_fits(config: Config, folder: Path, manifest: Manifest, noun: str) -> None:
    """Refuses a drawn bank that is not of this run's base, resolution and class prompts; how it was sampled is its own affair."""
    own = f"leave {WHERE} out to have class images drawn, or copy the images without {MANIFEST} to use them as your own"
    if manifest.recipe.get("format") != FORMAT:
        raise UserError(WHERE, "must not hold class images that another version of this program drew", str(folder), own)
    wanted = {"base_digest": config.base.digest(), "resolution": config.data.resolution, "prompts": bank_prompts(config, noun)}
    words = {"base_digest": "by another base", "resolution": "at another resolution", "prompts": "for other prompts"}
    for key, value in wanted.items():
        got = manifest.recipe.get(key)
        if got != value:
            rule = f"holds class images that were drawn {words[key]} ({folder / MANIFEST}); this run's {key} is {value}"
            raise UserError(WHERE, rule, got, own)
    if config.prior.top_up:
        rule = f"must be false where {WHERE} is a folder that this program drew: the further images could be the same ones again"
        raise UserError("prior.top_up", rule, True, f"leave {WHERE} out: what the folder lacks is drawn")
