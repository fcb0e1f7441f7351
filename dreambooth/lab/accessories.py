"""What can be put on every subject: one function an accessory, which finds its place from the subject's solids."""

from collections.abc import Callable, Sequence

import numpy as np

from dreambooth.lab.primitives import DARK, GLOSSY, MATT, METAL, SIDES, WHITE, Kind, Pattern, Primitive, ball, box, tube, turn_z

RED, BLUE, TURQUOISE = (0.85, 0.08, 0.1), (0.1, 0.2, 0.75), (0.0, 0.72, 0.74)
AROUND, DOWN = Pattern("vstripes", WHITE, 2), Pattern("stripes", WHITE, 2)
BRIM = 0.34  # the hat's radius


def put_on(accessory: str, parts: Sequence[Primitive]) -> list[Primitive]:
    """Returns the solids of an accessory, one of `identities.ACCESSORIES`, for a subject made of these parts."""
    return WEARING[accessory](parts)


def crown_of(parts: Sequence[Primitive]) -> tuple[float, float, float]:
    """Returns the point on the highest part where something stands: above the middle of the subject, unless a brim there would hang in the air."""
    tallest = max(parts, key=lambda part: (round(part.highest, 5), tuple(part.center)))  # rounded: a gable's two slopes are equally high
    x, _, z = tallest.center
    return x, tallest.highest, 0.0 if abs(z) - tallest.half_size[2] < BRIM else z


def hat(parts: Sequence[Primitive]) -> list[Primitive]:
    """Returns a black top hat with a red band, on the highest part."""
    x, top, z = crown_of(parts)
    return [
        tube((x, top, z), BRIM, 0.03, DARK),
        tube((x, top + 0.2, z), 0.22, 0.2, DARK),
        tube((x, top + 0.07, z), 0.23, 0.05, (0.8, 0.08, 0.1)),
    ]


def scarf(parts: Sequence[Primitive]) -> list[Primitive]:
    """Returns a turquoise and white scarf around the body, which builders put first, with an end that hangs down in front and one behind."""
    body = parts[0]
    half = np.abs(body.rotation) @ np.asarray(body.half_size)  # of its bounding box
    tall = max(part.highest for part in parts)
    y, thickness = body.center[1] + half[1] * 0.45, 0.06 * tall
    share = section(body, 0.45) + 0.04
    x, z = half[0] * share + 0.02, half[2] * share + 0.02
    center = (body.center[0], y, body.center[2])
    loop = box(center, (x, thickness, z), TURQUOISE, pattern=AROUND, gloss=MATT)
    if body.kind != Kind.BOX:
        loop = tube(center, (x, z), thickness, TURQUOISE, pattern=AROUND, gloss=MATT)
    ends = []
    for side in SIDES:
        end = (center[0] + x * 0.3, y - 2.2 * thickness, center[2] + side * (z + 0.015))
        ends.append(box(end, (1.3 * thickness, 2.8 * thickness, 0.03), TURQUOISE, pattern=DOWN, gloss=MATT))
    return [loop, *ends]


def section(part: Primitive, height: float) -> float:
    """Returns the share of its half size that a solid has at a height in its own space, -1 to 1; of a turned solid nearly."""
    if part.kind == Kind.ELLIPSOID:
        return float(np.sqrt(1 - height**2))
    return float(part.bottom + (part.top - part.bottom) * (height + 1) / 2) if part.kind == Kind.FRUSTUM else 1.0


def balloon(parts: Sequence[Primitive]) -> list[Primitive]:
    """Returns a red balloon on a string that is tied to the top of the subject."""
    x, top, z = crown_of(parts)
    return [
        tube((x + 0.12, top + 0.1, z), 0.02, 0.28, WHITE, rotation=turn_z(-0.45)),
        tube((x + 0.24, top + 0.37, z), 0.07, 0.05, RED, 1, 0.1),
        ball((x + 0.28, top + 0.68, z), (0.3, 0.35, 0.3), RED, gloss=GLOSSY),
    ]


def flag(parts: Sequence[Primitive]) -> list[Primitive]:
    """Returns a pole on the highest part, with a flag in blue and white."""
    x, top, z = crown_of(parts)
    return [
        tube((x, top + 0.3, z), 0.035, 0.4, METAL),
        box((x + 0.36, top + 0.5, z), (0.34, 0.2, 0.02), BLUE, pattern=Pattern("band", WHITE, 2)),
    ]


WEARING: dict[str, Callable[[Sequence[Primitive]], list[Primitive]]] = {"hat": hat, "scarf": scarf, "balloon": balloon, "flag": flag}
