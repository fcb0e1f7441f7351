"""The photos of a run's subjects, from folders or from the lab's world, checked before any model loads; those set aside to measure on."""

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from dreambooth import captions
from dreambooth.config import Config, Subject
from dreambooth.errors import ConfigError
from dreambooth.files import write_png
from dreambooth.generation import save_png
from dreambooth.photo_folder import Photo, read_photo_folder
from dreambooth.photos import Mode, cut, frame, prepare

PHOTOS = 5  # of the lab's built-in subject, unless data.photos says more or less
KNOWN = 10  # photos of it that the scores look at, trained on or not


@dataclass(frozen=True)
class SubjectPhotos:
    """Upright RGB photos, in a fixed order, with what they bring along, and what was noticed on the way."""

    images: list[Image.Image]
    names: list[str]
    digest: str  # hex, of the contents alone; of all subjects
    warnings: list[str]  # one sentence each; of all subjects
    source: str  # for people: the folder, or the lab's subject
    others: list[Image.Image] = field(default_factory=list)  # left out by data.photos: the scores look at them as at those trained on
    other_names: list[str] = field(default_factory=list)
    held_out: list[Image.Image] = field(default_factory=list)  # set aside: never trained on
    held_out_names: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)  # one a photo
    masks: list[Image.Image | None] = field(default_factory=list)  # one a photo, mode L, white is the subject; None: it has none
    held_out_masks: list[Image.Image | None] = field(default_factory=list)
    subject: Subject = field(default_factory=Subject)  # whom they show
    repeats: int = 1  # how often each counts
    extras: list["SubjectPhotos"] = field(default_factory=list)  # of the other subjects of the run

    @property
    def everyone(self) -> list["SubjectPhotos"]:
        """The photos of each subject, the first one's first."""
        return [self, *self.extras]

    @property
    def count(self) -> int:
        """Photos to train on, of all subjects, each once."""
        return sum(len(photos.images) for photos in self.everyone)

    @property
    def weighted_count(self) -> int:
        """Photos to train on, repeats counted: what a round through all of them takes."""
        return sum(len(photos.images) * photos.repeats for photos in self.everyone)


def read_subject_photos(config: Config) -> SubjectPhotos:
    """Returns every usable photo of a resolved config's subject, and of its extra subjects.

    Raises:
        UserError: naming the folder's config path or the file, when there is nothing to train on or a bad photo is to be refused.
    """
    first, extras = _read_one(config, "data.subject_dir"), []
    for number, extra in enumerate(config.extra_subjects):
        data = replace(config.data, subject_dir=extra.subject_dir, held_out=0, photos=None, repeats=extra.repeats)
        alone = replace(config, subject=extra.as_subject(), data=data, extra_subjects=[])
        extras.append(_read_one(alone, f"extra_subjects[{number}].subject_dir"))
    if not extras:
        return first
    digest = hashlib.sha256("\n".join(photos.digest for photos in [first, *extras]).encode()).hexdigest()
    return replace(first, extras=extras, digest=digest, warnings=first.warnings + [line for photos in extras for line in photos.warnings])


def _read_one(config: Config, where: str) -> SubjectPhotos:
    """Returns the photos of the config's first subject; `where` is the config path of their folder."""
    data = config.data
    if data.subject_dir is None:
        return _lab_photos(config)
    found = read_photo_folder(data.subject_dir, data.resolution, data.on_bad_photo, where, masks=data.masks, square=not data.buckets)
    photos = sorted(found.photos, key=lambda photo: photo.sha256)  # by content: renaming a file changes no result
    kept = len(photos) - data.held_out
    if kept < 1:
        rule, next_step = f"must leave photos to train on, of {len(photos)}", "set fewer aside"
        raise ConfigError("data.held_out", rule, data.held_out, next_step)
    if data.photos is not None and data.photos > kept:
        raise ConfigError("data.photos", f"must be at most the {kept} photos that there are to train on", data.photos, "take fewer, or null for all")
    own, aside = photos[:kept][: data.photos], photos[kept:]
    others = photos[len(own) : kept]
    texts, doubts = _captions(config, own)
    return SubjectPhotos(
        [p.image for p in own],
        [p.name for p in own],
        _digest(config, found.digest, photos),
        found.warnings + doubts,
        str(found.folder),
        others=[p.image for p in others],
        other_names=[p.name for p in others],
        held_out=[p.image for p in aside],
        held_out_names=[p.name for p in aside],
        captions=texts,
        masks=[p.mask for p in own],
        held_out_masks=[p.mask for p in aside],
        subject=config.subject,
        repeats=data.repeats,
    )


def _captions(config: Config, photos: list[Photo]) -> tuple[list[str], list[str]]:
    """Returns the caption of each photo, and a line for each that does not name the subject, or for captions that are there but not used."""
    subject, common = config.subject, config.subject.in_prompt(config.subject.prompt)
    own = [photo for photo in photos if photo.caption]
    if config.data.captions == "prompt":
        unused = f"{len(own)} of {len(photos)} photos have a caption of their own that is not used, the first {own[0].name}" if own else ""
        return [common] * len(photos), [f"{unused}: set data.captions=auto to train on them"] if own else []
    named = subject.in_prompt("{subject}")
    texts = [captions.fill(p.caption, named, subject.identifier, subject.class_noun) if p.caption else common for p in photos]
    doubts = [
        f"the caption of {photo.name} does not name the subject ({subject.identifier}): {text}"
        for photo, text in zip(photos, texts, strict=True)
        if not captions.is_word_in(subject.identifier, text)
    ]
    return texts, doubts


def _digest(config: Config, digest: str, photos: list[Photo]) -> str:
    """Returns the hex digest of all that the photos bring into the run: their own, and that of captions and masks that are used."""
    parts = [digest]
    for photo in photos:
        if config.data.captions == "auto" and photo.caption:
            parts.append(f"{photo.sha256} {photo.caption}")
        if photo.mask is not None and config.data.masks:
            parts.append(f"{photo.sha256} {hashlib.sha256(photo.mask.tobytes()).hexdigest()}")
    return digest if len(parts) == 1 else hashlib.sha256("\n".join(parts).encode()).hexdigest()


def prepared(images: list[Image.Image], resolution: int, crop: Mode = "center") -> np.ndarray:
    """Returns photos as the scores see them, uint8 (M, H, W, 3): a square at the training resolution, from the centre or by "smart"."""
    crop = "center" if crop == "random" else crop
    return np.stack([np.ascontiguousarray(prepare(image, resolution, crop)) for image in images])


def save_photos(run_folder: Path, photos: SubjectPhotos, resolution: int, crop: Mode = "center") -> None:
    """Writes the prepared photos into `photos/` of a run folder, with their masks in `masks/`; others in `others/`, those set aside in `held_out/`.

    Those of extra subjects go to `photos/1-<identifier>/` and so on: they are trained on, but the scores look at the first subject alone.
    """
    folders = [("photos", photos.images, photos.names, photos.masks, photos.source)]
    folders.append(("photos/others", photos.others, photos.other_names, [], photos.source))
    folders.append(("photos/held_out", photos.held_out, photos.held_out_names, photos.held_out_masks, photos.source))
    for number, extra in enumerate(photos.extras, 1):
        word = re.sub(r"[^\w-]", "_", extra.subject.identifier)
        folders.append((f"photos/{number}-{word}", extra.images, extra.names, extra.masks, extra.source))
    for folder, images, names, masks, source in folders:
        for k, (image, name) in enumerate(zip(images, names, strict=True)):
            save_png(run_folder / folder / f"{k:03d}.png", prepared([image], resolution, crop)[0], {"photo": name, "source": source})
        for k, mask in enumerate(masks):
            if mask is not None:
                seen = cut(mask, frame(images[k], resolution, "center" if crop == "random" else crop))  # as its photo
                write_png(run_folder / folder / "masks" / f"{k:03d}.png", Image.fromarray(seen))


def _lab_photos(config: Config) -> SubjectPhotos:
    from dreambooth.lab.world import PHOTO_STREAM, identity, render_masks, subject_photos

    subject, own_count = config.subject, config.data.photos or PHOTOS
    known = max(KNOWN, own_count)
    count = known + config.data.held_out
    pixels, contexts = subject_photos(subject.class_noun, subject.lab_seed, count)  # (N, 3, H, W) uint8; more do not change the first
    arrays = [np.ascontiguousarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    digest = hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
    names = [f"{k}-{context.replace(' ', '-')}" for k, context in enumerate(contexts)]
    images, source = [Image.fromarray(a) for a in arrays], f"the lab's {subject.class_noun} {subject.lab_seed}"
    own = identity(subject.class_noun, subject.lab_seed)
    shares = render_masks([own] * count, [(subject.lab_seed, k, PHOTO_STREAM) for k in range(count)], arrays[0].shape[0])  # (N, H, W), exact
    masks: list[Image.Image | None] = [Image.fromarray((share * 255).round().byte().numpy()) for share in shares]
    texts = [subject.in_prompt(subject.prompt + (f" {context}" if config.data.captions == "auto" else "")) for context in contexts[:own_count]]
    return SubjectPhotos(
        images[:own_count],
        names[:own_count],
        digest,
        _doubts(config),
        source,
        others=images[own_count:known],
        other_names=names[own_count:known],
        held_out=images[known:],
        held_out_names=names[known:],
        captions=texts,
        masks=masks[:own_count],
        held_out_masks=masks[known:],
        subject=subject,
        repeats=config.data.repeats,
    )


def _doubts(config: Config) -> list[str]:
    """Returns what the lab's base and scorers were not trained on, by the mark in their folder."""
    noun, mark = config.subject.class_noun, json.loads((config.base.locate() / "lab.json").read_text(encoding="utf-8"))
    words = {
        "classes": "the lab's base was not trained on this class: its pictures will be poor",
        "scorer_classes": "the lab's scorers were not trained on this class: do not report its scores",
    }
    return [f"subject.class_noun={noun}: {text} (they know {', '.join(mark[key])})" for key, text in words.items() if noun not in mark[key]]
