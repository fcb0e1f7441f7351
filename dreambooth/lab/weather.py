"""What falls between the camera and all else."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

CELLS = 128  # flakes and drops lie on a grid of this many cells, so that they do not move with the resolution


def snow(picture: Tensor, rng: np.random.Generator) -> None:
    """Draws 14 to 33 flakes over one picture (3, N, N), in place: each covers 1/64 of its side."""
    side = picture.shape[-1]
    for _ in range(int(rng.integers(14, 34))):
        top, left = (int(corner) * side // CELLS for corner in rng.integers(0, CELLS - 2, 2))
        flake = picture[:, top : top + max(side // 64, 1), left : left + max(side // 64, 1)]
        flake.mul_(0.25).add_(0.75)


def rain(picture: Tensor, rng: np.random.Generator) -> None:
    """Draws 60 to 89 slanting drops over one picture (3, N, N), in place: each 7 to 15 cells long and one wide."""
    side, drops = picture.shape[-1], int(rng.integers(60, 90))
    top, left, length = rng.integers(-8, CELLS, drops), rng.integers(0, CELLS, drops), rng.integers(7, 16, drops)
    step = np.arange(16)[:, None]
    row, column = top + step, left - step // 4  # (16, drops)
    is_drop = (step < length) & (row >= 0) & (row < CELLS) & (column >= 0)
    is_wet = np.zeros((CELLS, CELLS), bool)
    is_wet[row[is_drop], column[is_drop]] = True
    cell = np.arange(side) * CELLS // side
    wet = torch.from_numpy(is_wet[cell][:, cell]).to(picture.device)
    picture.copy_(torch.where(wet, picture * 0.6 + 0.36, picture))


FALLING: dict[str, Callable[[Tensor, np.random.Generator], None]] = {"in the snow": snow, "in the rain": rain}
