"""The solids that every subject is made of: boxes, ellipsoids and cones that may be cut (frusta)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from dreambooth.lab.identities import SURFACES, Identity, Rgb

DARK: Rgb = (0.06, 0.06, 0.07)
WHITE: Rgb = (0.95, 0.95, 0.95)
GLASS: Rgb = (0.55, 0.78, 0.9)
METAL: Rgb = (0.62, 0.64, 0.68)

SIDES = (-1, 1)  # left and right, back and front

MATT, DULL, PLAIN, SATIN, GLOSSY, MIRROR = 0.08, 0.2, 0.35, 0.6, 0.7, 0.8


class Kind(IntEnum):
    """The three kinds of solid, in their own unit space: |x|,|y|,|z| <= 1; |p| <= 1; radius varies with -1 <= y <= 1."""

    BOX = 0
    ELLIPSOID = 1
    FRUSTUM = 2


@dataclass(frozen=True)
class Pattern:
    """A second colour painted on a solid: one of `identities.PATTERNS`, and how fine it is."""

    name: str
    color: Rgb
    frequency: int


def upright() -> np.ndarray:
    """Returns the 3x3 rotation that does nothing."""
    return np.eye(3)


@dataclass(frozen=True)
class Primitive:
    """One solid in the subject's own space (y is up, the ground is y = 0).

    Attributes:
        center, half_size: three numbers each, in world units (a subject is 1 to 2 high).
        rotation: 3x3, applied to the solid about its centre.
        bottom, top: the radius of a frustum at its two ends, as a share of half_size.
        gloss: strength of the highlight.
    """

    kind: Kind
    center: Sequence[float]
    half_size: Sequence[float]
    color: Rgb
    rotation: np.ndarray = field(default_factory=upright)
    bottom: float = 1.0
    top: float = 1.0
    pattern: Pattern | None = None
    gloss: float = PLAIN

    @property
    def highest(self) -> float:
        """The height of the top of its bounding box."""
        return float(self.center[1] + np.abs(self.rotation[1]) @ np.asarray(self.half_size))


def pattern_of(subject: Identity) -> Pattern | None:
    """Returns what is painted on the subject's body, in its second colour; None for a plain body."""
    name = subject.pattern if subject.surface is None else SURFACES[subject.surface]
    return None if name == "none" else Pattern(name, subject.colors[1], subject.frequency)


def turn_x(angle: float) -> np.ndarray:
    """Returns the rotation about x by an angle in radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])


def turn_y(angle: float) -> np.ndarray:
    """Returns the rotation about y (up) by an angle in radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])


def turn_z(angle: float) -> np.ndarray:
    """Returns the rotation about z by an angle in radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def box(
    center: Sequence[float],
    half_size: Sequence[float],
    color: Rgb,
    rotation: np.ndarray | None = None,
    pattern: Pattern | None = None,
    gloss: float = PLAIN,
) -> Primitive:
    """Returns a box."""
    return Primitive(Kind.BOX, center, half_size, color, upright() if rotation is None else rotation, pattern=pattern, gloss=gloss)


def ball(
    center: Sequence[float],
    half_size: float | Sequence[float],
    color: Rgb,
    rotation: np.ndarray | None = None,
    pattern: Pattern | None = None,
    gloss: float = PLAIN,
) -> Primitive:
    """Returns an ellipsoid; one number for its half size makes a sphere."""
    size = half_size if isinstance(half_size, Sequence) else (half_size, half_size, half_size)
    return Primitive(Kind.ELLIPSOID, center, size, color, upright() if rotation is None else rotation, pattern=pattern, gloss=gloss)


def tube(
    center: Sequence[float],
    radius: float | tuple[float, float],
    half_height: float,
    color: Rgb,
    bottom: float = 1.0,
    top: float = 1.0,
    rotation: np.ndarray | None = None,
    pattern: Pattern | None = None,
    gloss: float = PLAIN,
) -> Primitive:
    """Returns a cylinder along y, or a cone when `bottom` and `top` (shares of the radius) differ; a pair of radii is (x, z)."""
    x, z = radius if isinstance(radius, tuple) else (radius, radius)
    turned = upright() if rotation is None else rotation
    return Primitive(Kind.FRUSTUM, center, (x, half_height, z), color, turned, bottom, top, pattern, gloss)


def arc(center: Sequence[float], radius: float, thickness: float, color: Rgb, count: int, start: float, end: float) -> list[Primitive]:
    """Returns small balls along a circle in the xy plane, from one angle (radians) to another: handles of pots and bags."""
    x, y, z = center
    angles = np.linspace(start, end, count)
    return [ball((x + np.cos(a) * radius, y + np.sin(a) * radius, z), thickness, color, gloss=DULL) for a in angles]
