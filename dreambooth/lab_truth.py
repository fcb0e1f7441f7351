"""The ground truth that only the lab has, for the images of a plan: whether they show the right subject, and the place that was asked for."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from dreambooth.config import Config
from dreambooth.encoders import LoadedEncoders
from dreambooth.evaluation import Item
from dreambooth.lab import ground_truth
from dreambooth.lab.ground_truth import Gallery
from dreambooth.worked_out import Tensors, code_digest, once

CODE = code_digest(Path(ground_truth.__file__).parent)  # of the world, as it is loaded: what is edited later is not what runs here
RIVALS, POSES = 8, 12  # of the gallery: renders of 9 subjects in 12 poses for each place, some seconds once a subject


class LabTruth:
    """Judges the images of the built-in subject's prompts: columns for the table of images, NaN where nothing is known.

    `true_identity` is the share of other subjects of the class that an image resembles less than the subject, against true renders in the
    place that the prompt names (0.5 by chance); `true_identity_margin` by how much, in logarithms of a distance; `true_context` is 1 where
    the text-image encoder finds the place that the prompt names the best of all places that it knows: the truth is the place that was asked
    for, the judge is the network behind prompt alignment (it names the place of true renders rightly, see the model card).

    Args:
        config: resolved, of a run on the lab's built-in subject.
        encoders: the lab's.
        shared: folder in which runs share the true renders; None: they are made anew.
    """

    def __init__(self, config: Config, encoders: LoadedEncoders, shared: Path | None = None) -> None:
        self.shared = shared
        mark = json.loads((config.base.locate() / "lab.json").read_text(encoding="utf-8"))
        self.subject, self.contexts, self.encoders = config.subject, list(mark["contexts"]), encoders

    def __call__(self, images: np.ndarray, items: Sequence[Item]) -> dict[str, np.ndarray]:
        """Returns the columns, (N,) each, of images uint8 (N, H, W, 3) drawn for the items."""
        places = [self.place(item) for item in items]
        chosen = [k for k, place in enumerate(places) if place is not None]
        columns = {name: np.full(len(items), np.nan) for name in ("true_identity", "true_identity_margin", "true_context")}
        if chosen:
            own, asked = images[chosen], [places[k] for k in chosen]
            gallery = _gallery(self.subject.class_noun, self.subject.lab_seed, tuple(sorted(set(asked))), self.shared)
            verdict = gallery.judge(_channels_first(own), asked)
            columns["true_identity"][chosen], columns["true_identity_margin"][chosen] = verdict.rank.numpy(), verdict.margin.numpy()
            texts = self.encoders.text([f"a photo of a {self.subject.class_noun} {context}" for context in self.contexts])  # (C, E)
            named = (self.encoders.image(own) @ texts.T).argmax(1).tolist()
            columns["true_context"][chosen] = [float(self.contexts[name] == place) for name, place in zip(named, asked, strict=True)]
        return columns

    def place(self, item: Item) -> str | None:
        """Returns the place that a prompt of the subject names, of those that the encoders know; None for other items."""
        if item.kind != "subject":
            return None
        return next((context for context in self.contexts if item.template.endswith(f" {context}")), None)


def lab_truth(config: Config, encoders: LoadedEncoders | None, shared: Path | None = None) -> LabTruth | None:
    """Returns the judge of a run on the lab's built-in subject, see `LabTruth`; None for every other run."""
    if encoders is None or config.data.subject_dir is not None or not config.base.is_lab():
        return None
    return LabTruth(config, encoders, shared)


class _Kept(Gallery):
    """A gallery of renders that were made before."""

    def __init__(self, contexts: Sequence[str], kept: Tensors) -> None:
        self.contexts, self.masks = list(contexts), kept["masks"]
        self.cells = {context: kept[f"cells {context}"] for context in contexts}


@lru_cache(maxsize=4)
def _gallery(class_noun: str, seed: int, contexts: tuple[str, ...], shared: Path | None) -> Gallery:
    about = {"class_noun": class_noun, "seed": seed, "contexts": contexts, "rivals": RIVALS, "poses": POSES, "code": CODE}
    return _Kept(contexts, once(shared, "gallery", about, lambda: _tensors(Gallery(class_noun, seed, contexts, RIVALS, POSES))))


def _tensors(gallery: Gallery) -> Tensors:
    return {"masks": gallery.masks} | {f"cells {context}": cells for context, cells in gallery.cells.items()}


def _channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)  # (N, 3, H, W)
