"""What the rays of a batch of pictures look at, and the brushes with which the scenes paint it."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dreambooth.lab.textures import mix, noise_bank, rgb, sample, texel

STAR_SIDE = 128  # stars live on a grid of this many cells, so that they do not move with the resolution
HORIZON = 1e-3  # rays that fall less steeply than this see the sky

NOWHERE = 9.0  # a position outside every picture: pads lists of unequal length

Rng = np.random.Generator


class Layers(NamedTuple):
    """A painted place: sky and ground colours, and which of them each ray sees."""

    sky: Tensor
    ground: Tensor
    is_ground: Tensor


class Wall(NamedTuple):
    """A wall behind the subject: positions on it in world units, and which rays see the ground before it."""

    x: Tensor
    y: Tensor
    is_ground: Tensor


class Canvas(NamedTuple):
    """What B pictures look at: ground positions (x, z), positions (u, v) above the horizon, and their generators."""

    u: Tensor
    v: Tensor
    x: Tensor
    z: Tensor
    distance: Tensor
    is_ground: Tensor
    camera: Tensor  # (2, B, 1, 1, 1) its height and its z
    offset: Tensor  # (4, B, 1, 1, 1)
    bank: Tensor  # (B, 1, 1, 1) which texture
    rngs: list[Rng]

    def draw(self, sampler: Callable[[Rng], object]) -> Tensor:
        """Returns what `sampler` draws for each picture: a number, or nested lists of numbers, -> (..., B, 1, 1, 1)."""
        values = np.array([sampler(rng) for rng in self.rngs], np.float32)  # (B, ...)
        return torch.from_numpy(np.moveaxis(values, 0, -1)[..., None, None, None]).to(self.u.device)

    def draw_color(self, sampler: Callable[[Rng], object]) -> Tensor:
        """Returns one drawn colour a picture, (B, 3, 1, 1)."""
        return self.draw(sampler)[..., 0].movedim(0, 1)

    def draw_stars(self, odds: float) -> Tensor:
        """Returns a mask of small stars, each cell of the grid with the given odds."""
        cells = torch.from_numpy(np.stack([rng.random((STAR_SIDE, STAR_SIDE)) > 1 - odds for rng in self.rngs]))
        side = self.u.shape[-1]
        index = torch.arange(side) * STAR_SIDE // side
        return cells[:, None, index][..., index].to(self.u.device)  # (B, 1, N, N)

    def noise(self, u: Tensor, v: Tensor) -> Tensor:
        """Returns the pictures' smooth texture at (u, v)."""
        return sample(noise_bank(False, str(self.u.device)), self.bank, u, v)

    def rough(self, u: Tensor, v: Tensor, shift: int = 0) -> Tensor:
        """Returns the pictures' rough texture, or the one `shift` further, at (u, v)."""
        return sample(noise_bank(True, str(self.u.device)), (self.bank + shift) % 4, u, v)

    def ground_noise(self) -> Tensor:
        """Returns smooth noise that lies on the ground."""
        return self.noise(self.x * 0.12 + self.offset[0], self.z * 0.12 + self.offset[1])

    def ground_grain(self) -> Tensor:
        """Returns rough noise that lies on the ground."""
        return self.rough(self.x * 0.25 + self.offset[1], self.z * 0.25 + self.offset[2])

    def sky_noise(self) -> Tensor:
        """Returns smooth noise in the sky: clouds."""
        smooth = noise_bank(False, str(self.u.device))
        return sample(smooth, (self.bank + 1) % 6, self.u * 0.35 + self.offset[2], self.v * 0.7 + self.offset[3])

    def sky(self, low: Tensor, high: Tensor, clouds: float = 0.0) -> Tensor:
        """Returns a sky from a colour at the horizon to one above, with white clouds of the given strength."""
        plain = mix(low, high, (self.v / 0.7).clamp(0, 1))
        return mix(plain, torch.ones_like(low), ((self.sky_noise() - 0.5) * 4).clamp(0, 1) * clouds) if clouds else plain

    def below_hills(self, base: float, height: float) -> Tensor:
        """Returns a mask of all that lies below a rolling skyline."""
        row = (self.offset[3] * 255).long()
        outline = noise_bank(False, str(self.u.device))[3][row, texel(self.u * 0.18 + self.offset[0])]
        return self.v < base + height * outline

    def wall(self, z: float) -> Wall:
        """Returns what is seen of a wall across the world at a negative z, and what is left of the ground before it."""
        height, depth = self.camera[0], self.camera[1] - z
        return Wall(self.u * depth, self.v * depth + height, self.is_ground & (self.z > z))

    def rgb(self, red: float, green: float, blue: float) -> Tensor:
        """Returns a colour that broadcasts over the pictures, (1, 3, 1, 1)."""
        return rgb((red, green, blue), self.u)


def make_canvas(directions: Tensor, camera: Tensor, rngs: list[Rng]) -> Canvas:
    """Returns the canvas of rays (B, 3, N, N) that start at cameras (B, 3)."""
    dx, dy, dz = directions[:, 0:1], directions[:, 1:2], directions[:, 2:3]
    cx, cy, cz = (camera[:, axis].view(-1, 1, 1, 1) for axis in range(3))
    is_ground = dy < -HORIZON
    distance = torch.where(is_ground, cy / (-dy).clamp(min=HORIZON), 0.0)
    forward = (-dz).clamp(min=0.05)
    numbers = np.array([[*rng.random(4), rng.integers(4)] for rng in rngs], np.float32)  # (B, 5)
    drawn = torch.from_numpy(numbers.T.copy()).view(5, -1, 1, 1, 1).to(directions.device)
    eye, (x, z) = torch.stack([cy, cz]), (cx + distance * dx, cz + distance * dz)
    return Canvas(dx / forward, dy / forward, x, z, distance, is_ground, eye, drawn[:4], drawn[4].long(), rngs)
