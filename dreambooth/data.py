"""The DataModule: subject and class images mixed in every batch by a sampler without memory.

Which image, crop and flip a sample gets depends on (seed, step, sample) alone, so a run that continues at step 120 sees just what an
uninterrupted one sees, and arms of an ablation see the same images in the same order.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dreambooth import randomness
from dreambooth.config import ClassImages, Config
from dreambooth.photos import prepare, to_pixel_values


class Batch(NamedTuple):
    """One mixed batch; the samples stand in no particular order."""

    pixel_values: Tensor  # (B, 3, H, W) in [-1, 1]
    prompts: list[str]  # B
    is_prior: Tensor  # (B,) bool, True for class images
    keys: Tensor  # (B, 3) int64: (seed, step, sample), all that the randomness of a sample depends on


class Draw(NamedTuple):
    """One place in the stream of samples: the j-th subject or class image of a step."""

    step: int
    place: int
    is_prior: bool

    @property
    def sample(self) -> int:
        """A number that is this sample's own within its step; a subject image keeps it when the prior is switched off."""
        return 2 * self.place + self.is_prior


class ImageSet(NamedTuple):
    """Images of one kind with a caption each; an image is a PIL picture or a file that is read when its turn comes."""

    images: list[Image.Image | Path]
    captions: list[str]


@lru_cache(maxsize=16)
def _order(length: int, is_prior: bool, seed: int, epoch: int) -> list[int]:
    return randomness.permutation(length, randomness.PRIOR_ORDER if is_prior else randomness.ORDER, seed, epoch)


class MixedImages(Dataset[tuple[np.ndarray, str, Draw]]):
    """Prepared images by draw: each kind is walked through in an order shuffled anew on every round."""

    def __init__(self, config: Config, subject: ImageSet, class_bank: ImageSet | None) -> None:
        self.data, self.seed = config.data, config.seed
        self.kinds = {False: subject, True: class_bank}
        self.batch_sizes = {False: config.data.batch_size, True: class_batch_size(config)}

    def __getitem__(self, draw: Draw) -> tuple[np.ndarray, str, Draw]:
        """Returns the uint8 image (H, W, 3), its caption and the draw."""
        kind = self.kinds[draw.is_prior]
        epoch, position = divmod(draw.step * self.batch_sizes[draw.is_prior] + draw.place, len(kind.images))
        index = _order(len(kind.images), draw.is_prior, self.seed, epoch)[position]
        image = kind.images[index]
        if isinstance(image, Path):
            with Image.open(image) as opened:
                image = opened.convert("RGB")
        key = (self.seed, draw.step, draw.sample)
        u = (randomness.uniform(randomness.CROP, *key, 0), randomness.uniform(randomness.CROP, *key, 1)) if self.data.crop == "random" else (0.5, 0.5)
        flip = self.data.flip and randomness.uniform(randomness.FLIP, *key) < 0.5
        return prepare(image, self.data.resolution, self.data.crop, flip, u), kind.captions[index], draw


class StepSampler(Sampler[list[Draw]]):
    """The draws of each batch, from a starting batch to the last; its length counts all batches, those before the start too."""

    def __init__(self, subject_batch: int, class_batch: int, start: int, total: int) -> None:
        self.subject_batch, self.class_batch, self.start, self.total = subject_batch, class_batch, start, total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.start, self.total):
            subject = [Draw(step, place, False) for place in range(self.subject_batch)]
            yield subject + [Draw(step, place, True) for place in range(self.class_batch)]


class DreamBoothData(pl.LightningDataModule):
    """Mixes subject and class images: `data.batch_size` + `prior.batch_size` a batch, from where the trainer stands.

    Args:
        config: resolved.
        subject: the photos, each with its caption.
        class_bank: class images with theirs; None: no prior preservation.
    """

    def __init__(self, config: Config, subject: ImageSet, class_bank: ImageSet | None) -> None:
        super().__init__()
        self.config, self.images = config, MixedImages(config, subject, class_bank)

    def train_dataloader(self) -> DataLoader:
        """Returns batches from the trainer's present step on: an endless stream has no epochs, only steps."""
        every = self.config.trainer.accumulate_grad_batches
        start = self.trainer.global_step * every if self.trainer else 0
        sizes = self.images.batch_sizes
        sampler = StepSampler(sizes[False], sizes[True], start, self.config.trainer.max_steps * every)
        return DataLoader(self.images, batch_sampler=sampler, collate_fn=self.collate, num_workers=self.config.data.num_workers)

    def collate(self, samples: list[tuple[np.ndarray, str, Draw]]) -> Batch:
        """Returns the samples as one batch."""
        images, captions, draws = zip(*samples, strict=True)
        keys = torch.tensor([[self.config.seed, draw.step, draw.sample] for draw in draws])  # (B, 3)
        return Batch(to_pixel_values(np.stack(images)), list(captions), torch.tensor([draw.is_prior for draw in draws]), keys)


def class_batch_size(config: Config) -> int:
    """Returns the class images in a batch: 0 without prior preservation."""
    return config.prior.batch_size if isinstance(config.prior, ClassImages) else 0


def describe_batch(config: Config, photos: int, class_images: int) -> str:
    """Returns what a step is made of and how often each image is seen, in one sentence."""
    every, steps = config.trainer.accumulate_grad_batches, config.trainer.max_steps
    seen = steps * every * config.data.batch_size / photos
    text = f"each step: {every * config.data.batch_size} subject images (each of {photos} photos is seen {seen:.0f} times in {steps} steps)"
    if not class_images:
        return text + ", no prior preservation"
    seen = steps * every * class_batch_size(config) / class_images
    return (
        text
        + f" + {every * class_batch_size(config)} class images (each of {class_images}: {seen:.1f} times), prior loss weight {config.prior.weight:g}"
    )
