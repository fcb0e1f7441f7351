"""Aspect-ratio buckets: sizes of about one area but of many shapes, the one that fits a photo best, and whose turn it is at a step. Pure."""

import math
from functools import lru_cache
from typing import NamedTuple

from dreambooth import randomness

LARGE_PX = 512  # from this resolution on, sides are multiples of 64 px, as usual for Stable Diffusion; below, of an eighth of the resolution
STEP_PX = 64
MAX_ASPECT = 4.0  # longer photos are refused anyway


class Turn(NamedTuple):
    """Which bucket a batch is made of, and how many batches that bucket has had before."""

    bucket: int
    earlier: int


def bucket_step(resolution: int) -> int:
    """Returns of what the sides of all buckets are multiples, in px: 64 from a resolution of 512 on, 8 at the lab's 64."""
    return STEP_PX if resolution >= LARGE_PX else max(8, resolution // 64 * 8)


def bucket_sizes(resolution: int) -> list[tuple[int, int]]:
    """Returns the (width, height) of all buckets in px: the square, and the sides whose area is nearest to its for every width and height.

    The square is among them, each size comes with its transpose, and no side is more than 4 times the other. Areas differ from
    resolution^2 by the rounding to whole steps (by 14% at most for a resolution of 512).

    Args:
        resolution: side of the square, px; a multiple of 8.
    """
    step, sizes = bucket_step(resolution), {(resolution, resolution)}
    for long in range(math.ceil(resolution / step) * step, int(resolution * MAX_ASPECT**0.5) + 1, step):
        short = max(step, round(resolution**2 / long / step) * step)
        if short <= resolution and long <= MAX_ASPECT * short and (long, short) != (resolution, resolution):
            sizes |= {(long, short), (short, long)}
    return sorted(sizes)


def nearest_bucket(width: int, height: int, sizes: list[tuple[int, int]]) -> int:
    """Returns the index of the size whose aspect ratio is nearest to a picture's, in proportion; of equals the one with the largest area."""
    wanted = math.log(width / height)
    fits = [(round(abs(math.log(w / h) - wanted), 9), -w * h, index) for index, (w, h) in enumerate(sizes)]
    return min(fits)[2]


def lost_share(width: int, height: int, size: tuple[int, int]) -> float:
    """Returns the share of a picture, in [0, 1), that is cropped away when it is scaled to cover a size."""
    scale = max(size[0] / width, size[1] / height)
    return 1.0 - size[0] * size[1] / (width * height * scale**2)


def turn(step: int, photos: tuple[int, ...], seed: int) -> Turn:
    """Returns whose turn it is at a batch: a function of (seed, step), in exact proportion to the photos of each bucket.

    Batches come in rounds of as many as there are photos, in an order shuffled anew for each round; a bucket with n photos has n of them.
    So after every round each photo has been seen equally often, whatever the size of a batch.

    Args:
        step: number of the batch, from 0.
        photos: how many there are in each bucket; at least one in all.
        seed: of the training.
    """
    epoch, position = divmod(step, sum(photos))
    bucket, within = _round(photos, seed, epoch)[position]
    return Turn(bucket, epoch * photos[bucket] + within)


@lru_cache(maxsize=16)
def _round(photos: tuple[int, ...], seed: int, epoch: int) -> list[Turn]:
    """Returns the turns of a round, `earlier` counted within it."""
    owners = [bucket for bucket, count in enumerate(photos) for _ in range(count)]
    seen, turns = [0] * len(photos), []
    for place in randomness.permutation(len(owners), randomness.BUCKET, seed, epoch):
        turns.append(Turn(owners[place], seen[owners[place]]))
        seen[owners[place]] += 1
    return turns
