"""The DataModule: subject and class images mixed in every batch by a sampler without memory.

Which image, crop and flip a sample gets depends on (seed, step, sample) alone, so a run that continues at step 120 sees just what an
uninterrupted one sees, and arms of an ablation see the same images in the same order. So does the bucket of a batch, on (seed, step).
"""

import hashlib
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

from dreambooth import buckets, randomness
from dreambooth.captions import describe
from dreambooth.config import Config, Subject
from dreambooth.photos import cut, frame, to_pixel_values
from dreambooth.ranks import ALONE, Ranks
from dreambooth.subject_photos import SubjectPhotos


class Batch(NamedTuple):
    """One mixed batch; the samples stand in no particular order."""

    pixel_values: Tensor  # (B, 3, H, W) in [-1, 1]
    prompts: list[str]  # B
    is_prior: Tensor  # (B,) bool, True for class images
    keys: Tensor  # (B, 3) int64: (seed, step, sample), all that the randomness of a sample depends on
    mask: Tensor | None = None  # (B, 1, H, W) in [0, 1], 1 where the subject is, 1 everywhere without a mask; None: this run has no masks
    contents: list[str] | None = None  # B, a digest of each sample's pixels: what a cache may know them by
    names: list[str | None] | None = None  # B, for people: the file of each image; None where it has none

    def describe(self, row: int) -> str:
        """Returns which sample stands in a row, for people: its kind, the name of its image, its prompt."""
        kind, name = "class sample" if self.is_prior[row] else "subject image", self.names[row] if self.names else None
        return f"{kind}{f' {name}' if name else ''} ({self.prompts[row]!r})"


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
    masks: list[Image.Image | None] | None = None  # of the pictures, mode L, white is the subject; None: of none
    names: list[str] | None = None  # of the images, for people; None: they have none


class Sample(NamedTuple):
    """One prepared image with all that belongs to it."""

    pixels: np.ndarray  # uint8 (H, W, 3)
    caption: str
    draw: Draw
    mask: np.ndarray | None  # uint8 (H, W), cut as the image; None: the whole image counts
    content: str  # digest of the pixels
    name: str | None  # of the image, for people


@lru_cache(maxsize=16)
def _order(length: int, is_prior: bool, seed: int, epoch: int, bucket: int) -> list[int]:
    stream = randomness.PRIOR_ORDER if is_prior else randomness.ORDER
    return randomness.permutation(length, stream, seed, epoch, *([bucket] if bucket else []))


class MixedImages(Dataset[Sample]):
    """Prepared images by draw: each kind is walked through in an order shuffled anew on every round.

    With `data.buckets` every bucket has a walk of its own through its photos, and class images are cropped to the bucket of their batch.
    `ranks` walk together: their batches are one, as many times as large.
    """

    def __init__(self, config: Config, subject: ImageSet, class_bank: ImageSet | None, ranks: int = 1) -> None:
        self.data, self.seed = config.data, config.seed
        self.kinds = {False: subject, True: class_bank}
        self.batch_sizes = {False: ranks * config.data.batch_size, True: ranks * class_batch_size(config)}
        sizes = buckets.bucket_sizes(config.data.resolution) if config.data.buckets else [(config.data.resolution,) * 2]
        members: list[list[int]] = [[] for _ in sizes]
        for index, image in enumerate(subject.images):
            members[buckets.nearest_bucket(*image.size, sizes) if config.data.buckets else 0].append(index)
        self.buckets = [(size, own) for size, own in zip(sizes, members, strict=True) if own]  # those that have photos

    def __getitem__(self, draw: Draw) -> Sample:
        """Returns the sample of a draw."""
        turn = buckets.turn(draw.step, tuple(len(own) for _, own in self.buckets), self.seed) if len(self.buckets) > 1 else buckets.Turn(0, draw.step)
        size, members = self.buckets[turn.bucket]
        kind = self.kinds[draw.is_prior]
        walk, batch = (range(len(kind.images)), draw.step) if draw.is_prior else (members, turn.earlier)
        epoch, position = divmod(batch * self.batch_sizes[draw.is_prior] + draw.place, len(walk))
        index = walk[_order(len(walk), draw.is_prior, self.seed, epoch, 0 if draw.is_prior else turn.bucket)[position]]
        return self._prepared(kind, index, size, draw)

    def _prepared(self, kind: ImageSet, index: int, size: tuple[int, int], draw: Draw) -> Sample:
        """Returns an image and its mask, cropped and flipped alike, as the draw says."""
        image = kind.images[index]
        if isinstance(image, Path):
            with Image.open(image) as opened:
                image = opened.convert("RGB")
        key = (self.seed, draw.step, draw.sample)
        u = (randomness.uniform(randomness.CROP, *key, 0), randomness.uniform(randomness.CROP, *key, 1)) if self.data.crop == "random" else (0.5, 0.5)
        flip = self.data.flip and randomness.uniform(randomness.FLIP, *key) < 0.5
        place = frame(image, size, self.data.crop, u)
        mask, pixels = kind.masks[index] if kind.masks else None, cut(image, place, flip)
        mask = None if mask is None else cut(mask, place, flip)
        return Sample(pixels, kind.captions[index], draw, mask, pixels_digest(pixels), kind.names[index] if kind.names else None)


def pixels_digest(pixels: np.ndarray) -> str:
    """Returns the hex digest of an image as it is trained on: it changes with the photo, the crop, the flip and the size, and with nothing else."""
    return hashlib.blake2b(pixels, digest_size=20, salt="x".join(map(str, pixels.shape[:2])).encode()).hexdigest()


class StepSampler(Sampler[list[Draw]]):
    """The draws of each batch, from a starting batch to the last; its length counts all batches, those before the start too.

    Rank r has the places from r x batch on: those of all ranks together are what one process draws in a batch as many times as large.
    """

    def __init__(self, subject_batch: int, class_batch: int, start: int, total: int, rank: int = 0) -> None:
        self.subject_batch, self.class_batch, self.start, self.total, self.rank = subject_batch, class_batch, start, total, rank

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.start, self.total):
            subject = [Draw(step, self.rank * self.subject_batch + k, False) for k in range(self.subject_batch)]
            yield subject + [Draw(step, self.rank * self.class_batch + k, True) for k in range(self.class_batch)]


class DreamBoothData(pl.LightningDataModule):
    """Mixes subject and class images: `data.batch_size` + `prior.batch_size` a batch and rank, from where the trainer stands.

    Args:
        config: resolved.
        subject: the photos, each with its caption.
        class_bank: class images with theirs; None: no prior preservation.
        ranks: this process among those that train together; each has samples of its own.
    """

    def __init__(self, config: Config, subject: ImageSet, class_bank: ImageSet | None, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self.config, self.ranks, self.images = config, ranks, MixedImages(config, subject, class_bank, ranks.count)

    def train_dataloader(self) -> DataLoader:
        """Returns batches from the trainer's present step on: an endless stream has no epochs, only steps."""
        every = self.config.trainer.accumulate_grad_batches
        start = self.trainer.global_step * every if self.trainer else 0
        sizes = self.config.data.batch_size, class_batch_size(self.config)
        sampler = StepSampler(*sizes, start, self.config.trainer.max_steps * every, self.ranks.index)
        return DataLoader(self.images, batch_sampler=sampler, collate_fn=self.collate, num_workers=self.config.data.num_workers)

    def collate(self, samples: list[Sample]) -> Batch:
        """Returns the samples as one batch."""
        pixels, captions, draws, masks, contents, names = zip(*samples, strict=True)
        keys = torch.tensor([[self.config.seed, draw.step, draw.sample] for draw in draws])  # (B, 3)
        is_prior = torch.tensor([draw.is_prior for draw in draws])
        has_masks = self.images.kinds[False].masks is not None
        mask = torch.stack([_mask_tensor(own, image.shape[:2]) for own, image in zip(masks, pixels, strict=True)]) if has_masks else None
        return Batch(to_pixel_values(np.stack(pixels)), list(captions), is_prior, keys, mask, list(contents), list(names))


def _mask_tensor(mask: np.ndarray | None, size: tuple[int, int]) -> Tensor:
    """Returns a mask as (1, H, W) float32 in [0, 1]; ones where there is none."""
    return torch.ones(1, *size) if mask is None else torch.from_numpy(mask.astype(np.float32) / 255)[None]


def class_batch_size(config: Config) -> int:
    """Returns the class samples in a batch: 0 without prior preservation."""
    return config.prior.class_samples


def subject_set(photos: SubjectPhotos, with_masks: bool) -> ImageSet:
    """Returns what the subject samples of the batches are made of: the photos of every subject, each as often as its repeats say."""
    chosen = [(own, k) for own in photos.everyone for _ in range(own.repeats) for k in range(len(own.images))]
    masks = [own.masks[k] for own, k in chosen] if with_masks else None
    names = [own.names[k] for own, k in chosen]
    return ImageSet([own.images[k] for own, k in chosen], [own.captions[k] for own, k in chosen], masks, names)


def class_set(
    config: Config,
    photos: list[Image.Image | Path],
    bank: ImageSet | None,
    subjects: list[Subject] | None = None,
    names: list[str] | None = None,
) -> ImageSet | None:
    """Returns what the class samples of the batches are made of; None without prior preservation.

    Args:
        config: resolved.
        photos: the subjects'.
        bank: class images with their captions, where the prior wants some.
        subjects: whom each photo shows; None: the first subject.
        names: of the photos, for people; None: they have none.
    """
    if bank is not None or not config.prior.class_samples:
        return bank
    shown, templates = subjects or [config.subject] * len(photos), config.prior.templates
    captions = [subject.prior_in_prompt(template) for template in templates for subject in shown]
    names = names and [name for _ in templates for name in names]
    return ImageSet([photo for _ in templates for photo in photos], captions, names=names)  # every pairing


def describe_batch(config: Config, photos: SubjectPhotos, class_images: int) -> str:
    """Returns what a step is made of and how often each image is seen, in one sentence.

    Args:
        config: resolved.
        photos: of all subjects.
        class_images: length of what `class_set` returns; 0 without prior preservation.
    """
    every, steps = config.trainer.accumulate_grad_batches * config.trainer.devices, config.trainer.max_steps
    drawn = every * config.data.batch_size
    text = f"each step: {drawn} subject images ({_describe_seen(photos, steps, steps * drawn)})"
    if not class_images:
        return text + ", no prior preservation"
    count = every * class_batch_size(config)
    seen = steps * count / class_images
    if config.prior.wants_bank:
        told = f"{count} class images (each of {class_images}: {seen:.1f} times)"
    else:
        pairs = f"{photos.count} photos x {len(config.prior.templates)} class prompts"
        told = f"{count} class samples (the subject's own photos under class prompts; each of {pairs}: {seen:.1f} times)"
    target = ", whose target is the un-tuned model's prediction" if config.prior.asks_frozen_model else ""
    return f"{text} + {told}{target}, {config.prior.describe_weight()}"


def _describe_seen(photos: SubjectPhotos, steps: int, drawn: int) -> str:
    """Returns how often each photo is among so many drawn subject images: for each subject, where their repeats differ."""
    times = {own.repeats: f"{drawn * own.repeats / photos.weighted_count:.0f} times" for own in photos.everyone}
    if len(times) == 1:
        return f"each of {photos.count} photos is seen {times[photos.repeats]} in {steps} steps"
    parts = [f"each of {len(own.images)} photos of {own.subject.in_prompt('{subject}')} is seen {times[own.repeats]}" for own in photos.everyone]
    return f"{', '.join(parts)} in {steps} steps"


def describe_photos(config: Config, photos: SubjectPhotos) -> list[str]:
    """Returns what the photos are made into, for people: subjects, captions, buckets, masks, doubts about the cache; nothing in the plain case."""
    lines = [line for own in photos.everyone for line in describe(own.names, own.captions)]
    if photos.extras:
        counts = [f"{own.subject.in_prompt('{subject}')} ({len(own.images)} photos x {own.repeats})" for own in photos.everyone]
        lines.append(f"subjects: {', '.join(counts)}")
    if config.data.buckets:
        used = MixedImages(config, subject_set(photos, False), None).buckets
        lines.append("buckets: " + ", ".join(f"{len(own)} of {size[0]} x {size[1]} px" for size, own in used))
    if config.data.masks:
        masked = sum(mask is not None for own in photos.everyone for mask in own.masks)
        lines.append(f"masks: {masked} photos; outside them the loss weighs {config.data.mask_background_weight:g}")
    if config.data.crop == "random" and config.data.cache != "off" and any(image.width != image.height for image in photos.images):
        lines.append(
            f"cache: random crops seldom come again, so it saves little ({config.data.cache_mb} MB are kept at most); center or smart ones do"
        )
    return lines
