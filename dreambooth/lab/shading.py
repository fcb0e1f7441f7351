"""From what the rays hit to colours: paint and patterns, light, and the shade that the subject leaves on the ground."""

import math

import torch
from torch import Tensor

from dreambooth.lab.identities import PATTERNS
from dreambooth.lab.primitives import Kind
from dreambooth.lab.raytrace import Hits, Solids, dot
from dreambooth.lab.views import Lights, Views


def pattern_mask(name: str, kind: Tensor, point: Tensor, frequency: Tensor) -> Tensor:
    """Returns where a pattern shows its second colour, (H,), at points (3, H) in unit space."""
    x, y, z = point
    around = torch.where(kind == Kind.BOX, torch.where(x.abs() > 0.98, z, x) * 0.5, torch.atan2(x, z) / math.pi)
    if name == "stripes":
        return torch.sin(y * frequency * 3.6) > 0.15
    if name == "vstripes":
        return torch.sin(around * frequency * 9) > 0.1
    if name == "checker":
        return ((around * frequency * 1.6 + 0.01).floor() + (y * frequency * 0.75 + 0.01).floor()) % 2 > 0
    if name == "band":
        return (y - 0.05).abs() < 0.27
    along = y * frequency * 0.62
    row = along.floor()
    across = around * frequency * 1.3 + 0.5 * (row % 2)
    return (across - across.floor() - 0.5) ** 2 + (along - row - 0.5) ** 2 < 0.085  # dots


def surface_color(solids: Solids, hits: Hits) -> Tensor:
    """Returns the paint at each hit, (3, H) in [0, 1], before any light."""
    color = solids.color[:, hits.solid]
    pattern = solids.pattern[hits.solid]
    for index, name in enumerate(PATTERNS[1:], start=1):
        at = (pattern == index).nonzero()[:, 0]
        solid = hits.solid[at]
        second = pattern_mask(name, solids.kind[solid], hits.point[:, at], solids.frequency[solid])
        color[:, at] = torch.where(second, solids.pattern_color[:, solid], color[:, at])
    return color


def shade(solids: Solids, hits: Hits, views: Views, lights: Lights) -> Tensor:
    """Returns the colour of each hit, (3, H): wrapped diffuse light, ambient light with occlusion, a highlight, a bright rim."""
    picture = solids.picture[hits.solid]
    light, diffuse, ambient = lights.direction[picture].T, lights.diffuse[picture].T, lights.ambient[picture].T  # (3, H)
    normal, to_camera = hits.normal, -hits.direction
    wrapped = (dot(normal, light) * 0.85 + 0.15).clamp(0, 1)
    halfway = light + to_camera
    halfway = halfway / dot(halfway, halfway).sqrt()
    highlight = dot(normal, halfway).clamp(0, 1) ** 28 * solids.gloss[hits.solid]
    height = views.camera[picture, 1] + hits.distance * hits.direction[1]
    open_sky = (0.6 + 0.4 * (height / (views.height[picture] * 0.35)).clamp(0, 1)) * (0.72 + 0.28 * normal[1])
    rim = (1 - dot(normal, to_camera).clamp(0, 1)) ** 3 * 0.18
    lit = diffuse * wrapped + ambient * open_sky * 1.15
    return surface_color(solids, hits) * lit + diffuse * highlight + ambient * rim


def contact_shade(views: Views, x: Tensor, z: Tensor) -> Tensor:
    """Returns the shade around the subject's foot at ground positions (B, 1, N, N), in [0, 0.35]."""
    width, size = views.width.view(-1, 1, 1, 1), views.size.view(-1, 1, 1, 1)
    return torch.exp(-(torch.hypot(x, z) - width * 0.6).clamp(min=0) * 2.2 / size) * 0.35
