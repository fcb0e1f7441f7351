"""Noise textures that tile, and the small functions that blend with them."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from dreambooth.lab.identities import Rgb

SIDE = 256  # texels along each side of a texture


def fractal_noise(seed: int, octaves: int, persistence: float) -> np.ndarray:
    """Returns one (SIDE, SIDE) float32 texture in [0, 1] that tiles: smooth value noise, each octave twice as fine."""
    rng = np.random.default_rng(seed)
    total = np.zeros((SIDE, SIDE), np.float32)
    for octave in range(octaves):
        cells = 4 * 2**octave
        grid = rng.random((cells, cells)).astype(np.float32)
        position = np.arange(SIDE) / SIDE * cells
        low = position.astype(int)
        high = (low + 1) % cells
        t = (position - low).astype(np.float32)
        t = t * t * (3 - 2 * t)
        rows = grid[:, low] * (1 - t) + grid[:, high] * t  # (cells, SIDE)
        total += persistence**octave * (rows[low] * (1 - t[:, None]) + rows[high] * t[:, None])
    return (total - total.min()) / (total.max() - total.min())


@cache
def noise_bank(rough: bool, device: str) -> Tensor:
    """Returns the world's textures, (6, SIDE, SIDE) smooth or (4, SIDE, SIDE) rough ones, float32 in [0, 1]."""
    if rough:
        textures = [fractal_noise(50 + index, octaves=6, persistence=0.95) for index in range(4)]
    else:
        textures = [fractal_noise(index, octaves=5, persistence=0.55) for index in range(6)]
    return torch.from_numpy(np.stack(textures)).to(device)


def texel(position: Tensor) -> Tensor:
    """Returns the index in [0, SIDE) of the texel at a position; a texture repeats every 1.0."""
    return (position * SIDE).floor().long() & (SIDE - 1)


def sample(bank: Tensor, index: Tensor | int, u: Tensor, v: Tensor) -> Tensor:
    """Returns texture `index` (one a picture) of a bank at positions (u, v), nearest texel, in their shape."""
    return bank.flatten()[index * SIDE * SIDE + texel(v) * SIDE + texel(u)]


def mix(a: Tensor, b: Tensor, amount: Tensor) -> Tensor:
    """Returns a + (b - a) * amount, broadcast."""
    return a + (b - a) * amount


def smoothstep(x: Tensor, start: float | Tensor, end: float | Tensor) -> Tensor:
    """Returns 0 before `start`, 1 after `end`, smooth between; start > end makes a falling step."""
    t = ((x - start) / (end - start)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def rgb(color: Rgb, like: Tensor) -> Tensor:
    """Returns a colour as a (1, 3, 1, 1) tensor on the device of `like`."""
    return torch.tensor(color, dtype=torch.float32, device=like.device).view(1, 3, 1, 1)
