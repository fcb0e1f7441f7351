"""Rays against solids, for a batch of pictures at once: what each ray hits first, and the shadow on the ground.

Work is done on (solid, ray) pairs from the solids' bounding squares on the screen, so the cost follows what is seen.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dreambooth.lab.identities import PATTERNS
from dreambooth.lab.primitives import Kind, Pattern, Primitive, turn_y
from dreambooth.lab.views import FIELD, Views, ray_directions

FAR = 1e6  # the distance of what is not hit
NEAR = 1e-3
TINY = 1e-6
SHADOW_SIDE = 64  # shadows are soft: this grid is enough at every resolution
SHADOW_REACH = 3.2  # times the subject's size


class Solids(NamedTuple):
    """K solids of B pictures, in world space; vectors lie first, so that each component is contiguous."""

    picture: Tensor  # (K,) which picture, increasing
    kind: Tensor  # (K,)
    center: Tensor  # (3, K)
    to_unit: Tensor  # (3, 3, K) world -> unit space of the solid
    radius: Tensor  # (K,) of a ball around it
    bottom: Tensor  # (K,)
    top: Tensor  # (K,)
    color: Tensor  # (3, K)
    gloss: Tensor  # (K,)
    pattern: Tensor  # (K,) index in PATTERNS
    pattern_color: Tensor  # (3, K)
    frequency: Tensor  # (K,)


class Hits(NamedTuple):
    """What H rays hit first."""

    ray: Tensor  # (H,) index into the flattened (B, N, N) rays
    solid: Tensor  # (H,)
    distance: Tensor  # (H,)
    direction: Tensor  # (3, H) of the ray
    point: Tensor  # (3, H) in the unit space of the solid
    normal: Tensor  # (3, H) unit, in world space


def dot(a: Sequence[Tensor] | Tensor, b: Sequence[Tensor] | Tensor) -> Tensor:
    """Returns the dot product over the first axis of length 3; spelled out, so that it rounds alike in every batch."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def transform(matrix: Tensor, vector: Tensor) -> Tensor:
    """Returns matrix @ vector for matrices (3, 3, P) and vectors (3, P)."""
    return torch.stack([dot(matrix[row], vector) for row in range(3)])


def gather_solids(parts: Sequence[Sequence[Primitive]], yaws: Sequence[float], device: str) -> Solids:
    """Returns the solids of each picture, turned by its yaw, as one table."""
    rows, vectors, matrices = [], [], []
    for picture, (solids, yaw) in enumerate(zip(parts, yaws, strict=True)):
        turn = turn_y(yaw)
        for solid in solids:
            half_size = np.asarray(solid.half_size, float)
            radius = np.linalg.norm(half_size) * (max(solid.bottom, solid.top, 1.0) if solid.kind == Kind.FRUSTUM else 1.0)
            pattern = solid.pattern or Pattern("none", solid.color, 1)
            index = PATTERNS.index(pattern.name)
            rows.append((picture, solid.kind, radius, solid.bottom, solid.top, solid.gloss, index, pattern.frequency))
            vectors.append((turn @ np.asarray(solid.center, float), solid.color, pattern.color))
            matrices.append((turn @ solid.rotation).T / half_size[:, None])
    numbers = torch.from_numpy(np.array(rows, np.float32).T.copy()).to(device)
    center, color, second = torch.from_numpy(np.array(vectors, np.float32).transpose(1, 2, 0).copy()).to(device)  # each (3, K)
    to_unit = torch.from_numpy(np.array(matrices, np.float32).transpose(1, 2, 0).copy()).to(device)  # (3, 3, K)
    picture, kind, radius, bottom, top, gloss, index, frequency = numbers
    return Solids(picture.long(), kind.long(), center, to_unit, radius, bottom, top, color, gloss, index.long(), second, frequency)


def candidate_pairs(solids: Solids, views: Views, chosen: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Returns the pairs (solid, ray) whose ray passes the bounding square of one of the chosen solids, each (P,)."""
    picture = solids.picture[chosen]
    to_center = solids.center[:, chosen] - views.camera[picture].T  # (3, C)
    sin, cos = views.pitch[picture].sin(), views.pitch[picture].cos()
    depth = -to_center[1] * sin - to_center[2] * cos
    right, up = to_center[0] / depth / FIELD, (to_center[1] * cos - to_center[2] * sin) / depth / FIELD
    reach = solids.radius[chosen] / (depth - solids.radius[chosen] * 0.6) / FIELD * 1.1
    visible = depth - solids.radius[chosen] >= 0.05

    def edges(middle: Tensor) -> tuple[Tensor, Tensor]:
        low = ((middle - reach + 1) / 2 * side).long().clamp(0, side)
        high = ((middle + reach + 1) / 2 * side + 2).long().clamp(0, side)
        return low, (high - low).clamp(min=0)

    (left, width), (upper, height) = edges(right), edges(-up)
    area = width * height * visible
    owner = torch.repeat_interleave(torch.arange(len(chosen), device=area.device), area)  # (P,)
    within = torch.arange(len(owner), device=area.device) - (area.cumsum(0) - area)[owner]
    row = upper[owner] + within.div(width[owner], rounding_mode="floor")
    column = left[owner] + within.remainder(width[owner])
    return chosen[owner], (picture[owner] * side + row) * side + column


def hit_box(origin: Tensor, direction: Tensor, bottom: Tensor, top: Tensor) -> Tensor:
    """Returns the distance to the unit box (slab method), FAR where it is missed; origin and direction (3, P) in unit space."""
    inverse = 1 / torch.where(direction.abs() < TINY, TINY, direction)
    one, other = (-1 - origin) * inverse, (1 - origin) * inverse
    enter, leave = torch.minimum(one, other).amax(0), torch.maximum(one, other).amin(0)
    return torch.where((enter < leave) & (enter > NEAR), enter, FAR)


def hit_ball(origin: Tensor, direction: Tensor, bottom: Tensor, top: Tensor) -> Tensor:
    """Returns the distance to the unit ball, FAR where it is missed."""
    a, b, c = dot(direction, direction), dot(direction, origin), dot(origin, origin) - 1
    discriminant = b * b - a * c
    distance = (-b - discriminant.clamp(min=0).sqrt()) / a
    return torch.where((discriminant > 0) & (distance > NEAR), distance, FAR)


def hit_frustum(origin: Tensor, direction: Tensor, bottom: Tensor, top: Tensor) -> Tensor:
    """Returns the distance to the cut cone |y| <= 1 whose radius goes from `bottom` to `top`, FAR where it is missed."""
    middle, slope = (bottom + top) / 2, (top - bottom) / 2
    radius, widening = middle + slope * origin[1], slope * direction[1]
    a = direction[0] ** 2 + direction[2] ** 2 - widening**2
    b = direction[0] * origin[0] + direction[2] * origin[2] - widening * radius
    c = origin[0] ** 2 + origin[2] ** 2 - radius**2
    a = torch.where(a.abs() < 1e-7, 1e-7, a)
    discriminant = b * b - a * c
    root = discriminant.clamp(min=0).sqrt()
    nearest = torch.full_like(a, FAR)
    for t in ((-b - root) / a, (-b + root) / a):
        y = origin[1] + t * direction[1]
        on_wall = (discriminant > 0) & (t > NEAR) & (y.abs() <= 1) & (middle + slope * y >= 0)
        nearest = torch.where(on_wall & (t < nearest), t, nearest)
    inverse = 1 / torch.where(direction[1].abs() < TINY, TINY, direction[1])
    for y, rim in ((-1, bottom), (1, top)):
        t = (y - origin[1]) * inverse
        on_cap = ((origin[0] + t * direction[0]) ** 2 + (origin[2] + t * direction[2]) ** 2 <= rim * rim) & (t > NEAR)
        nearest = torch.where(on_cap & (t < nearest), t, nearest)
    return nearest


INTERSECTIONS: dict[Kind, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    Kind.BOX: hit_box,
    Kind.ELLIPSOID: hit_ball,
    Kind.FRUSTUM: hit_frustum,
}


def normals(solids: Solids, solid: Tensor, point: Tensor) -> Tensor:
    """Returns the unit normals (3, H) in world space at points (3, H) in the unit space of their solids."""
    magnitude = point.abs()
    box = point.sign() * (magnitude >= magnitude.amax(0) - 1e-4)
    middle, slope = (solids.bottom[solid] + solids.top[solid]) / 2, (solids.top[solid] - solids.bottom[solid]) / 2
    wall = torch.stack([point[0], -slope * (middle + slope * point[1]), point[2]])
    zero = torch.zeros_like(point[1])
    frustum = torch.where(magnitude[1] > 0.9995, torch.stack([zero, point[1].sign(), zero]), wall)
    kind = solids.kind[solid]
    local = torch.where(kind == Kind.BOX, box, torch.where(kind == Kind.ELLIPSOID, point, frustum))
    world = transform(solids.to_unit[:, :, solid].transpose(0, 1), local)
    return world / (dot(world, world).sqrt() + 1e-9)


def trace(solids: Solids, views: Views, directions: Tensor) -> Hits:
    """Returns what the rays (B, 3, N, N) from the cameras hit first; of two solids at the same distance, the earlier one."""
    side = directions.shape[-1]
    rays = directions.transpose(0, 1).reshape(3, -1)  # (3, B * N * N)
    origin = transform(solids.to_unit, views.camera[solids.picture].T - solids.center)  # (3, K)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for kind, intersect in INTERSECTIONS.items():
        solid, ray = candidate_pairs(solids, views, (solids.kind == kind).nonzero()[:, 0], side)
        direction = transform(solids.to_unit[:, :, solid], rays[:, ray])
        distance = intersect(origin[:, solid], direction, solids.bottom[solid], solids.top[solid])
        hit = (distance < FAR).nonzero()[:, 0]
        found.append((solid[hit], ray[hit], distance[hit]))
    solid, ray, distance = (torch.cat(column) for column in zip(*found, strict=True))
    nearest = torch.full((rays.shape[1],), FAR, device=rays.device).scatter_reduce(0, ray, distance, "amin")
    first = distance == nearest[ray]
    owner = torch.full_like(nearest, len(solids.kind), dtype=torch.long).scatter_reduce(0, ray[first], solid[first], "amin")
    ray = (nearest < FAR).nonzero()[:, 0]
    solid, distance, direction = owner[ray], nearest[ray], rays[:, ray]
    point = origin[:, solid] + distance * transform(solids.to_unit[:, :, solid], direction)
    return Hits(ray, solid, distance, direction, point, normals(solids, solid, point))


def blocks_light(solids: Solids, index: Tensor, light: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """Returns which ground points x, z (B, P) one solid of each picture, `index` (B,), keeps in the dark, (B, P)."""
    matrix = solids.to_unit[:, :, index, None]  # (3, 3, B, 1)
    start = transform(matrix[..., 0], -solids.center[:, index])[..., None]  # (3, B, 1)
    lift = 0.002
    origin = [matrix[row, 0] * x + matrix[row, 2] * z + (matrix[row, 1] * lift + start[row]) for row in range(3)]  # 3 x (B, P)
    direction = transform(matrix[..., 0], light.T)[..., None]  # (3, B, 1)
    inverse = 1 / torch.where(direction.abs() < TINY, TINY, direction)
    planes = [((-1 - o) * i, (1 - o) * i) for o, i in zip(origin, inverse, strict=True)]
    enter = torch.stack([torch.minimum(one, other) for one, other in planes]).amax(0)
    leave = torch.stack([torch.maximum(one, other) for one, other in planes]).amin(0)
    in_box = (enter < leave) & (leave > 0)
    is_box, is_ball = (solids.kind[index] == Kind.BOX)[:, None], (solids.kind[index] == Kind.ELLIPSOID)[:, None]
    squared_radius = torch.where(is_ball, 1.0, 1.05)  # a frustum casts nearly the shadow of a ball
    a, b, c = dot(direction, direction), dot(origin, direction), dot(origin, origin) - squared_radius
    in_ball = (b * b - a * c > 0) & (b < 0)
    return torch.where(is_box, in_box, in_ball)


def ground_shadow(solids: Solids, views: Views, light: Tensor, side: int) -> Tensor:
    """Returns how dark the subject's soft shadow makes the ground that each ray may see, (B, 1, side, side) in [0, 1]; light: (B, 3)."""
    count = len(views.camera)
    dx, dy, dz = ray_directions(views.pitch, SHADOW_SIDE, shift=-0.25).flatten(2).unbind(1)  # (B, P)
    is_ground = dy < -NEAR
    distance = torch.where(is_ground, views.camera[:, 1:2] / (-dy).clamp(min=NEAR), 0.0)
    x, z = views.camera[:, 0:1] + distance * dx, views.camera[:, 2:3] + distance * dz
    reach = views.size[:, None] * SHADOW_REACH
    near = is_ground & (x.abs() < reach) & (z.abs() < reach)
    dark = torch.zeros_like(near)
    per_picture = torch.bincount(solids.picture, minlength=count)
    start = per_picture.cumsum(0) - per_picture
    for slot in range(int(per_picture.max())):
        exists = slot < per_picture
        index = torch.where(exists, start + slot, start)
        dark |= blocks_light(solids, index, light, x, z) & exists[:, None]
    shadow = (dark & near).float().view(count, 1, SHADOW_SIDE, SHADOW_SIDE)
    for _ in range(2):
        shadow = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(shadow, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    return torch.nn.functional.interpolate(shadow, size=(side, side), mode="bilinear", align_corners=False)
