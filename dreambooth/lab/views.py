"""Where the subject stands, where the camera is and where the light comes from: all that a seed decides before anything is painted."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dreambooth.lab.identities import Rgb
from dreambooth.lab.primitives import Primitive

FIELD = 0.5  # tangent of half the opening angle of the camera
SIDEWAYS_CLASSES = ("car", "duck", "dog", "teapot", "boat", "fish", "train")  # built along x: turned so that one mostly sees their side or front

# Context -> (diffuse, ambient) light; the first is daylight.
DAYLIGHT: tuple[Rgb, Rgb] = ((1.0, 0.98, 0.93), (0.4, 0.42, 0.46))
LIGHTS: dict[str, tuple[Rgb, Rgb]] = {
    "at night": ((0.44, 0.496, 0.76), (0.22, 0.25, 0.38)),
    "at sunset": ((1.1, 0.68, 0.4), (0.38, 0.27, 0.34)),
    "in the jungle": ((0.85, 0.95, 0.65), (0.28, 0.36, 0.26)),
    "on the moon": ((1.12, 1.1, 1.05), (0.2, 0.2, 0.22)),
    "on a wooden table": ((0.95, 0.88, 0.75), (0.4, 0.38, 0.36)),
    "on a red carpet": ((1.0, 0.95, 0.88), (0.36, 0.33, 0.33)),
    "under water": ((0.62, 0.92, 0.95), (0.24, 0.42, 0.46)),
    "in a cave": ((0.85, 0.75, 0.62), (0.26, 0.24, 0.24)),
    "in the rain": ((0.62, 0.65, 0.7), (0.4, 0.43, 0.47)),
    "in a library": ((1.0, 0.88, 0.68), (0.36, 0.32, 0.28)),
}


class View(NamedTuple):
    """Pose and camera of one picture (world space: y up, the subject stands at the origin)."""

    yaw: float  # radians about y
    camera: np.ndarray  # (3,)
    pitch: float  # radians, downwards
    height: float  # of the subject
    width: float  # half extent of the subject on the ground
    size: float  # what the camera frames


class Light(NamedTuple):
    """The light of one picture: a direction towards it and two colours."""

    direction: np.ndarray  # (3,), unit
    diffuse: np.ndarray  # (3,)
    ambient: np.ndarray  # (3,)


class Views(NamedTuple):
    """The views of B pictures, as tensors."""

    camera: Tensor  # (B, 3)
    pitch: Tensor  # (B,)
    height: Tensor  # (B,)
    width: Tensor  # (B,)
    size: Tensor  # (B,)


class Lights(NamedTuple):
    """The lights of B pictures, as tensors."""

    direction: Tensor  # (B, 3)
    diffuse: Tensor  # (B, 3)
    ambient: Tensor  # (B, 3)


def draw_view(class_noun: str, parts: Sequence[Primitive], rng: np.random.Generator) -> View:
    """Returns pose and camera of one picture: turned by up to 20 degrees, seen 9 to 13 degrees from above, near enough to fill the picture.

    Narrow draws, as in a photographer's studio: with turns of up to 43 degrees and places to match, a base trained for nine minutes on one
    core drew 36 % of the classes so that they were named right, with these 47 %.
    """
    yaw = rng.uniform(-0.35, 0.35)
    if class_noun in SIDEWAYS_CLASSES:
        yaw -= 0.45
    height = max(part.highest for part in parts)
    width = max(max(abs(p.center[0]), abs(p.center[2])) + 0.6 * max(p.half_size[0], p.half_size[2]) for p in parts)
    size = max(height * 0.54, width * 0.92)
    pitch = rng.uniform(0.16, 0.23)
    distance = size / FIELD * rng.uniform(1.24, 1.36)
    target = np.array([rng.uniform(-0.07, 0.07) * size, height * 0.5 + rng.uniform(0.0, 0.07) * size, 0.0])
    camera = target + distance * np.array([0.0, np.sin(pitch), np.cos(pitch)])
    return View(yaw, camera, pitch, height, width, size)


def draw_light(context: str, rng: np.random.Generator) -> Light:
    """Returns the light of one picture: the context's colours, a strength, a direction from above."""
    diffuse, ambient = LIGHTS.get(context, DAYLIGHT)
    strength = rng.uniform(0.85, 1.1)
    azimuth, elevation = rng.uniform(-1.2, 1.2), rng.uniform(0.6, 1.15)
    direction = np.array([np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)])
    return Light(direction, np.array(diffuse) * strength, np.array(ambient))


def rows(values: Sequence[float | np.ndarray], device: str) -> Tensor:
    """Returns one row a picture, float32."""
    return torch.from_numpy(np.array(values, np.float32)).to(device)


def stack_views(views: Sequence[View], device: str) -> Views:
    """Returns the views as tensors, one row a picture."""
    return Views(
        camera=rows([view.camera for view in views], device),
        pitch=rows([view.pitch for view in views], device),
        height=rows([view.height for view in views], device),
        width=rows([view.width for view in views], device),
        size=rows([view.size for view in views], device),
    )


def stack_lights(lights: Sequence[Light], device: str) -> Lights:
    """Returns the lights as tensors, one row a picture."""
    return Lights(*(rows([light[field] for light in lights], device) for field in range(3)))


def ray_directions(pitch: Tensor, side: int, shift: float = 0.0) -> Tensor:
    """Returns unit directions through a square grid of side x side samples, (B, 3, side, side), row 0 on top.

    Args:
        pitch: (B,) how far each camera looks down, in radians.
        side: samples along each side of the picture.
        shift: moves every sample right and down, in samples.
    """
    steps = torch.arange(side, dtype=torch.float32, device=pitch.device)
    across = ((steps + 0.5 + shift) / side * 2 - 1) * FIELD  # (side,)
    sin, cos = pitch.sin().view(-1, 1, 1), pitch.cos().view(-1, 1, 1)
    rise = -across.view(1, -1, 1)  # (1, side, 1)
    x = across.view(1, 1, -1).expand(len(pitch), side, side)
    y = (rise * cos - sin).expand(-1, -1, side)
    z = (-rise * sin - cos).expand(-1, -1, side)
    length = (x * x + y * y + z * z).sqrt()
    return torch.stack([x / length, y / length, z / length], 1)
