"""The renders that everything is trained on: made once by a pool of processes, kept in small files, read without a copy."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dreambooth.errors import UserError
from dreambooth.files import write_json, write_with
from dreambooth.lab.identities import ACCESSORIES, Identity, caption, identity
from dreambooth.lab.splits import HELD_OUT_SEEDS, TRAINED_CLASSES, TRAINED_CONTEXTS, TrainingItem, draw_training_item
from dreambooth.lab.world import WORLD_VERSION, render

SHARD = 256  # pictures a file: what a kill may cost a worker, and what a worker takes at once
BLOCK = 4  # of every four pictures, the last shows the first one's subject again
SECOND_VIEW_SEED = 500_000_000  # added to the seed of the first view
VIEW_STREAM = 6  # part of the key of the second view's place


class Row(NamedTuple):
    """What is known of one picture beside its pixels."""

    class_noun: str
    subject_seed: int
    context: str
    caption: str  # of the stream: may leave the colour and the place unsaid
    full_caption: str  # names colour and place


def draw_picture(index: int) -> TrainingItem:
    """Returns what picture number `index` shows: three items of the stream, then the first of them again, elsewhere and without its accessory.

    The second views are the pairs from which the identity encoder learns. An accessory comes and goes, so it is no part of who it is.
    """
    block, place = divmod(index, BLOCK)
    if place < BLOCK - 1:
        return draw_training_item(block * (BLOCK - 1) + place)
    first = draw_training_item(block * (BLOCK - 1))
    others = [context for context in TRAINED_CONTEXTS if context != first.context]
    context = str(np.random.default_rng([index, VIEW_STREAM]).choice(others))
    words = first.caption.replace(first.context, context)
    if first.subject.accessory is not None:
        words = words.replace(f" {ACCESSORIES[first.subject.accessory]}", "")
    return TrainingItem(replace(first.subject, accessory=None), context, first.seed + SECOND_VIEW_SEED, words)


def write_shard(folder: Path, number: int, size: int) -> int:
    """Renders one file of pictures and the file of what is known of them; returns how many."""
    items = [draw_picture(index) for index in range(number * size, (number + 1) * size)]
    pixels = render([item.subject for item in items], [item.context for item in items], [item.seed for item in items]).numpy()
    rows = [
        Row(item.subject.class_noun, item.subject.seed, item.context, item.caption, caption(item.subject, item.context, color=True)) for item in items
    ]
    write_json(folder / f"{number:05d}.json", rows)
    write_with(folder / f"{number:05d}.npy", lambda path: _save_array(path, pixels))  # last: its presence says that both are there
    return size


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def render_stream(folder: Path, images: int, workers: int, say: Callable[[str], None], shard: int = SHARD, first: int = 0) -> None:
    """Renders `images` pictures from number `first` on (in whole files) that are not there yet, and says how it goes.

    Raises:
        UserError: the folder holds renders of another world or of another size of files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan, wanted = (
        folder / "plan.json",
        {"world": WORLD_VERSION, "shard": shard, "first": first, "classes": list(TRAINED_CLASSES), "contexts": list(TRAINED_CONTEXTS)},
    )
    if plan.is_file() and json.loads(plan.read_text(encoding="utf-8")) != wanted:
        rule = f"must belong to world {WORLD_VERSION}, its splits and pictures from number {first} on"
        raise UserError(str(plan), rule, next_step="delete this folder to render anew")
    write_json(plan, wanted)
    numbers = [number for number in range(first // shard, first // shard + -(-images // shard)) if not (folder / f"{number:05d}.npy").is_file()]
    if not numbers:
        say(f"data: all {images} pictures are there")
        return
    say(f"data: {len(numbers) * shard} pictures to render with {workers} processes; the rate follows (about 70 a second and process)")
    start, done, last = time.monotonic(), 0, 0.0
    for count in _shards_written(folder, numbers, workers, shard):
        done += count
        spent = time.monotonic() - start
        if spent - last > 5 or done == len(numbers) * shard:
            rate, last = done / spent, spent
            say(f"data: {done} of {len(numbers) * shard}, {rate:.0f} images/s, about {(len(numbers) * shard - done) / rate:.0f} s left")
    write_json(folder / "rendering.json", {"images": done, "seconds": round(time.monotonic() - start, 1), "workers": workers})


def _shards_written(folder: Path, numbers: Sequence[int], workers: int, shard: int) -> Iterator[int]:
    """Writes the files, by a pool of processes or, for one worker, in this one; yields the pictures of each as it is done."""
    if workers <= 1:
        yield from (write_shard(folder, number, shard) for number in numbers)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet_worker) as pool:
        for future in as_completed([pool.submit(write_shard, folder, number, shard) for number in numbers]):
            yield future.result()


def _quiet_worker() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


class Renders:
    """The pictures on the disk, as tensors on a device; a GPU holds them all, a CPU reads them from mapped files.

    Args:
        folder: where `render_stream` wrote.
        device: where the batches are wanted.
        limit: use so many files, and refuse if there are fewer; None for all.
    """

    def __init__(self, folder: Path, device: torch.device, limit: int | None = None) -> None:
        files = sorted(folder.glob("[0-9]*.npy"))[:limit]
        if not files or (limit is not None and len(files) < limit):
            rule = "must hold renders" if limit is None else f"must hold {limit} files of renders"
            raise UserError(str(folder), rule, len(files), "run the stage data first, or ask for fewer --renders")
        self.device = device
        self.files = [np.load(file, mmap_mode="r") for file in files]  # (S, 3, 64, 64) each
        self.shard = len(self.files[0])
        self.rows = [Row(*row) for file in files for row in json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))]
        self.on_gpu = torch.from_numpy(np.concatenate(self.files)).to(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self.rows)

    def showing(self, classes: Sequence[str], contexts: Sequence[str]) -> Tensor:
        """Returns the numbers of the pictures that show one of these classes in one of these places, ascending."""
        fits = [number for number, row in enumerate(self.rows) if row.class_noun in classes and row.context in contexts]
        return torch.tensor(fits, dtype=torch.long)

    def pixels(self, index: Tensor) -> Tensor:
        """Returns pictures in [-1, 1], (B, 3, 64, 64) float32 on the device."""
        if self.on_gpu is not None:
            batch = self.on_gpu[index]
        else:
            batch = torch.from_numpy(np.stack([self.files[number // self.shard][number % self.shard] for number in index.tolist()]))
        return to_float(batch)

    @cached_property
    def pairs(self) -> dict[str, Tensor]:
        """The numbers of the pictures of which a second view is there, (P,) for each class; the view is BLOCK - 1 further."""
        numbers: dict[str, list[int]] = {}
        for first in range(0, len(self) - BLOCK + 1, BLOCK):
            numbers.setdefault(self.rows[first].class_noun, []).append(first)
        return {noun: torch.tensor(own, device=self.device) for noun, own in sorted(numbers.items())}


def to_float(pixels: Tensor) -> Tensor:
    """Returns uint8 pictures as float32 in [-1, 1], with channels last in memory."""
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


class HeldOut(NamedTuple):
    """Renders that no training has seen, and what they show."""

    pixels: Tensor  # (N, 3, 64, 64) in [-1, 1]
    subjects: list[Identity]
    contexts: list[str]
    captions: list[str]


def held_out(
    classes: Sequence[str], contexts: Sequence[str], subjects: int, views: int, seed: int = 0, accessories: Sequence[str | None] = (None,)
) -> HeldOut:
    """Returns renders of subjects with held-out seeds, in unseen poses, grouped by class, then subject, then view.

    Args:
        classes: class nouns.
        contexts: the places, dealt out so that each is shown about equally often and a subject's views differ.
        subjects: of each class; at most as many as there are held-out seeds.
        views: pictures of each subject.
        seed: below 1000; other poses.
        accessories: dealt out likewise.
    """
    names = [(noun, HELD_OUT_SEEDS[number]) for noun in classes for number in range(subjects)]
    shown, places, keys = [], [], []
    for number, (noun, subject_seed) in enumerate(names):
        order = np.random.default_rng([subject_seed, number, seed]).permutation(len(contexts))
        for view in range(views):
            shown.append(identity(noun, subject_seed, accessory=accessories[(number + view) % len(accessories)]))
            places.append(contexts[int(order[view % len(contexts)])])
            keys.append(seed * 900 + number * views + view)
    words = [caption(subject, place, color=True) for subject, place in zip(shown, places, strict=True)]
    return HeldOut(to_float(render(shown, places, keys)), shown, places, words)
