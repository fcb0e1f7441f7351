"""The built-in procedural world: sixteen classes of toys in eighteen places, with known identities and therefore a known ground truth.

A picture is a function of (identity, context, seed): the seed decides pose, viewpoint, scale, light, placement and the details of
the place. Nothing else has a say, so an identity can be rendered again anywhere, in another colour or surface and with an accessory:
the oracle that real photos do not have. What pretraining must not see: `splits`.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from dreambooth.errors import UserError
from dreambooth.lab.canvas import make_canvas
from dreambooth.lab.identities import CLASSES, COLORS, Identity, caption, identity
from dreambooth.lab.raytrace import gather_solids, ground_shadow, trace
from dreambooth.lab.scenes import SCENES, paint
from dreambooth.lab.shading import contact_shade, shade
from dreambooth.lab.shapes import build
from dreambooth.lab.views import Views, draw_light, draw_view, ray_directions, stack_lights, stack_views
from dreambooth.lab.weather import FALLING

__all__ = [
    "CLASSES",
    "COLORS",
    "CONTEXTS",
    "WORLD_VERSION",
    "Identity",
    "caption",
    "ground_truth",
    "identity",
    "render",
    "render_masks",
    "subject_photos",
]

WORLD_VERSION = 2  # changes when old pictures change, and the shipped weights with them; new classes and places are appended
CONTEXTS: tuple[str, ...] = tuple(SCENES)
PHOTO_CONTEXTS: tuple[str, ...] = ("on the grass", "on a wooden table", "on the beach", "on the grass", "on a wooden table")
PHOTO_STREAM = 9  # part of the key of every photo of a built-in subject
SUPERSAMPLING = 2  # rays along each side of a pixel
CHUNK = 16  # pictures at once: bounds the memory


def render(identities: Sequence[Identity], contexts: Sequence[str], seeds: Sequence[int], resolution: int = 64, device: str = "cpu") -> Tensor:
    """Returns pictures of subjects in places: uint8 (N, 3, resolution, resolution).

    Args:
        identities, contexts, seeds: one of each a picture, which depends on its own three and the resolution, not on its neighbours.
        resolution: pixels along each side; the same seed shows the same scene at every resolution.
        device: where the rays are traced, and where the result lies.

    Raises:
        UserError: for lists of different lengths, an unknown context, a negative seed or a resolution below 8.
    """
    if not len(identities) == len(contexts) == len(seeds):
        lengths = (len(identities), len(contexts), len(seeds))
        raise UserError("identities, contexts and seeds", "must have the same length", lengths, "give one of each a picture")
    if any(seed < 0 for seed in seeds):
        raise UserError("seeds", "must not be negative", min(seeds), "choose 0 or more")
    return render_keyed(identities, contexts, [(seed,) for seed in seeds], resolution, device)


def render_keyed(
    identities: Sequence[Identity], contexts: Sequence[str], keys: Sequence[tuple[int, ...]], resolution: int = 64, device: str = "cpu"
) -> Tensor:
    """Returns pictures as `render` does, with several integers as the seed of each."""
    for context in contexts:
        check_context(context)
    if resolution < 8:
        raise UserError("resolution", "must be at least 8", resolution, "the lab's models were trained at 64")
    pictures = torch.empty(len(identities), 3, resolution, resolution, dtype=torch.uint8, device=device)
    order = sorted(range(len(identities)), key=lambda item: contexts[item])  # places are painted together
    for first in range(0, len(order), CHUNK):
        chunk = order[first : first + CHUNK]
        own = ([column[item] for item in chunk] for column in (identities, contexts, keys))
        pictures[chunk] = render_chunk(*own, resolution, device)
    return pictures


def render_masks(identities: Sequence[Identity], keys: Sequence[tuple[int, ...]], resolution: int = 64, device: str = "cpu") -> Tensor:
    """Returns where the subject is in the pictures of the same identities and keys: float (N, resolution, resolution), shares of each pixel.

    The place has no say in where the subject stands, so it is not asked for; what falls before the subject (snow, rain) is not in the mask.

    Args:
        identities, keys: as for `render_keyed`; a seed of `render` is the key (seed,).
        resolution: pixels along each side.
        device: where the rays are traced, and where the result lies.
    """
    masks = torch.empty(len(identities), resolution, resolution, device=device)
    for first in range(0, len(identities), CHUNK):
        rngs = [np.random.default_rng(key) for key in keys[first : first + CHUNK]]
        parts = [build(subject) for subject in identities[first : first + CHUNK]]
        drawn = [draw_view(subject.class_noun, own, rng) for subject, own, rng in zip(identities[first : first + CHUNK], parts, rngs, strict=True)]
        views, side = stack_views(drawn, device), resolution * SUPERSAMPLING
        hits = trace(gather_solids(parts, [view.yaw for view in drawn], device), views, ray_directions(views.pitch, side))
        covered = torch.zeros(len(drawn) * side * side, device=device)
        covered[hits.ray] = 1
        masks[first : first + CHUNK] = avg_pool2d(covered.view(-1, 1, side, side), SUPERSAMPLING)[:, 0]
    return masks


def subject_photos(class_noun: str, seed: int, count: int = 5) -> tuple[Tensor, list[str]]:
    """Returns the photos of the built-in subject (class, seed): uint8 (count, 3, 64, 64), and the context of each.

    They are what a user's folder of photos is otherwise: few pictures, in the few places where the subject happened to be.
    """
    contexts = [PHOTO_CONTEXTS[index % len(PHOTO_CONTEXTS)] for index in range(count)]
    subject = identity(class_noun, seed)
    return render_keyed([subject] * count, contexts, [(seed, index, PHOTO_STREAM) for index in range(count)]), contexts


def ground_truth(class_noun: str, seed: int, contexts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """Returns the subject (class, seed) itself in any contexts, uint8 (N, 3, 64, 64): what a perfect model would draw."""
    return render([identity(class_noun, seed)] * len(contexts), contexts, seeds)


def check_context(context: str) -> None:
    """Raises UserError unless the world has this context."""
    if context not in CONTEXTS:
        raise UserError("context", "must be a place of the lab's world", context, f"choose one of {', '.join(CONTEXTS)}")


def render_chunk(identities: Sequence[Identity], contexts: Sequence[str], keys: Sequence[tuple[int, ...]], resolution: int, device: str) -> Tensor:
    """Returns a few pictures, sorted by context, uint8 (B, 3, resolution, resolution).

    The order of the draws from each picture's generator (view, place, light, flakes or drops) is part of the world: old seeds keep their pictures.
    """
    rngs = [np.random.default_rng(key) for key in keys]
    parts = [build(subject) for subject in identities]
    drawn = [draw_view(subject.class_noun, solids, rng) for subject, solids, rng in zip(identities, parts, rngs, strict=True)]
    views = stack_views(drawn, device)
    directions = ray_directions(views.pitch, resolution * SUPERSAMPLING)
    place, shaded_ground = paint_places(contexts, directions, views, rngs)
    lights = stack_lights([draw_light(context, rng) for context, rng in zip(contexts, rngs, strict=True)], device)
    solids = gather_solids(parts, [view.yaw for view in drawn], device)
    shadow = ground_shadow(solids, views, lights.direction, directions.shape[-1])
    place = place * (1 - torch.maximum(shadow * 0.55 * (shaded_ground > 0), shaded_ground))
    hits = trace(solids, views, directions)
    flat = place.transpose(0, 1).reshape(3, -1)  # (3, B * N * N)
    flat[:, hits.ray] = shade(solids, hits, views, lights)
    picture = flat.view(3, *place.shape[:1], *place.shape[2:]).transpose(0, 1)  # (B, 3, N, N)
    for index, (context, rng) in enumerate(zip(contexts, rngs, strict=True)):
        if context in FALLING:
            FALLING[context](picture[index], rng)
    pixels = avg_pool2d(picture.clamp(0, 1), SUPERSAMPLING)
    return (((pixels - 0.5) * 1.03 + 0.5).clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def paint_places(contexts: Sequence[str], directions: Tensor, views: Views, rngs: Sequence[np.random.Generator]) -> tuple[Tensor, Tensor]:
    """Returns the empty places, (B, 3, N, N), and the shade around the subject's foot, (B, 1, N, N): 0 where there is no ground."""
    places, shades = [], []
    for context, group in groupby(range(len(contexts)), key=contexts.__getitem__):
        items = list(group)
        canvas = make_canvas(directions[items], views.camera[items], [rngs[item] for item in items])
        place, is_ground = paint(context, canvas)
        places.append(place)
        shades.append(contact_shade(Views(*(field[items] for field in views)), canvas.x, canvas.z) * is_ground)
    return torch.cat(places), torch.cat(shades)
