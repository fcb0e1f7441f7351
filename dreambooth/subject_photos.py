"""The subject's photos, from the user's folder or from the lab's world, checked before any model loads."""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dreambooth.config import Config
from dreambooth.photo_folder import read_photo_folder


@dataclass(frozen=True)
class SubjectPhotos:
    """Upright RGB photos, in a fixed order, and what was noticed on the way."""

    images: list[Image.Image]
    names: list[str]
    digest: str  # hex, of the contents alone
    warnings: list[str]  # one sentence each
    source: str  # for people: the folder, or the lab's subject


def read_subject_photos(config: Config) -> SubjectPhotos:
    """Returns every usable photo of a resolved config's subject.

    Raises:
        UserError: naming `data.subject_dir` or the file, when there is nothing to train on or a bad photo is to be refused.
    """
    if config.data.subject_dir is None:
        return _lab_photos(config)
    found = read_photo_folder(config.data.subject_dir, config.data.resolution, config.data.on_bad_photo)
    photos = sorted(found.photos, key=lambda photo: photo.sha256)  # by content: renaming a file changes no result
    return SubjectPhotos([p.image for p in photos], [p.name for p in photos], found.digest, found.warnings, str(found.folder))


def _lab_photos(config: Config) -> SubjectPhotos:
    from dreambooth.lab.world import subject_photos

    class_noun, seed = config.subject.class_noun, config.subject.lab_seed
    pixels, contexts = subject_photos(class_noun, seed)  # (N, 3, H, W) uint8
    arrays = [np.ascontiguousarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    digest = hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
    names = [f"{k}-{context.replace(' ', '-')}" for k, context in enumerate(contexts)]
    return SubjectPhotos([Image.fromarray(a) for a in arrays], names, digest, _doubts(config), f"the lab's {class_noun} {seed}")


def _doubts(config: Config) -> list[str]:
    """Returns what the lab's base and scorers were not trained on, by the mark in their folder."""
    noun, mark = config.subject.class_noun, json.loads((config.base.locate() / "lab.json").read_text(encoding="utf-8"))
    words = {
        "classes": "the lab's base was not trained on this class: its pictures will be poor",
        "scorer_classes": "the lab's scorers were not trained on this class: do not report its scores",
    }
    return [f"subject.class_noun={noun}: {text} (they know {', '.join(mark[key])})" for key, text in words.items() if noun not in mark[key]]
