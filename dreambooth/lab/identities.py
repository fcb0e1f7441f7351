"""The subjects of the built-in world: what makes one robot this robot, drawn from (class noun, seed)."""

import colorsys
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dreambooth.errors import ConfigError

Rgb = tuple[float, float, float]

# The index of a class is part of the draw of its subjects: new ones are appended. Which are trained on: `splits`.
CLASSES: tuple[str, ...] = (
    "robot", "teapot", "car", "duck", "dog", "house", "boat", "mushroom", "rocket", "backpack",
    "chair", "fish", "lamp", "tree", "penguin", "train",
)  # fmt: skip

# Colour word -> hue, saturation, value, each in [0, 1]: the middle of what the word may mean.
COLORS: dict[str, Rgb] = {
    "red": (0.0, 0.85, 0.85),
    "orange": (0.075, 0.9, 0.95),
    "yellow": (0.15, 0.85, 0.97),
    "green": (0.36, 0.75, 0.62),
    "blue": (0.61, 0.8, 0.82),
    "purple": (0.77, 0.65, 0.68),
    "pink": (0.93, 0.45, 0.98),
    "white": (0.1, 0.03, 0.96),
    "black": (0.6, 0.15, 0.13),
    "brown": (0.07, 0.65, 0.45),
}

PATTERNS: tuple[str, ...] = ("none", "stripes", "vstripes", "dots", "checker", "band")
PATTERN_ODDS: tuple[float, ...] = (0.4, 0.15, 0.12, 0.15, 0.08, 0.1)
SURFACES: dict[str, str] = {"striped": "stripes", "spotted": "dots", "checkered": "checker"}  # property word -> one of PATTERNS
ACCESSORIES: dict[str, str] = {  # what can be put on any subject -> how a caption says it
    "hat": "wearing a hat",
    "scarf": "wearing a scarf",
    "balloon": "with a balloon",
    "flag": "with a flag",
}
IDENTITY_STREAM = 77  # part of the key of every identity: changing it makes all other subjects


@dataclass(frozen=True)
class Identity:
    """One subject: everything that stays the same in all its pictures, and what a prompt may put on it.

    Attributes:
        class_noun: one of CLASSES.
        seed: which subject of that class.
        color_names: colour words: body, second (pattern), third (head, lid), fourth (limbs, trim). Two different ones: third and fourth
            each repeat one of the first two. Four of their own make patchwork, which a small model learns slowly.
        colors: the exact RGB of each, in [0, 1].
        pattern: one of PATTERNS, painted on the body in the second colour.
        frequency: how fine the pattern is, 2 to 4.
        proportions: twelve numbers in [0, 1) that the class turns into sizes and options.
        accessory: one of ACCESSORIES that it wears or has, or None.
        surface: one of SURFACES, painted over its own pattern, or None. Captions name it; its own pattern they never do.
    """

    class_noun: str
    seed: int
    color_names: tuple[str, str, str, str]
    colors: tuple[Rgb, Rgb, Rgb, Rgb]
    pattern: str
    frequency: int
    proportions: tuple[float, ...]
    accessory: str | None = None
    surface: str | None = None

    @property
    def main_color(self) -> str:
        """The colour word of the body: the one that a caption names."""
        return self.color_names[0]

    def between(self, index: int, low: float, high: float) -> float:
        """Returns the size number `index` of this subject, in [low, high)."""
        return low + (high - low) * self.proportions[index]

    def has(self, index: int, odds: float = 0.5) -> bool:
        """Returns whether this subject has the option number `index`, which a share `odds` of all subjects has."""
        return self.proportions[index] < odds


def shade_of(color_name: str, rng: np.random.Generator) -> Rgb:
    """Returns one RGB in [0, 1] that the colour word may mean, slightly off its middle; three draws from `rng`."""
    hue, saturation, value = COLORS[color_name]
    hue = (hue + rng.uniform(-0.018, 0.018)) % 1
    saturation_shift = rng.uniform(-0.08, 0.08) * (saturation > 0.1)  # white stays white
    value_shift = rng.uniform(-0.07, 0.07)
    return colorsys.hsv_to_rgb(hue, min(max(saturation + saturation_shift, 0.0), 1.0), min(max(value + value_shift, 0.0), 1.0))


def identity(class_noun: str, seed: int, accessory: str | None = None, main_color: str | None = None, surface: str | None = None) -> Identity:
    """Returns the subject that belongs to a class and a seed: the same one on every machine.

    What a prompt adds (accessory, colour, surface) leaves all else of the subject as it is: the ground truth of such prompts.

    Args:
        class_noun: one of CLASSES.
        seed: any non-negative integer.
        accessory: put this on; one of ACCESSORIES.
        main_color: make the body this colour instead of the drawn one; one of COLORS.
        surface: paint this on the body instead of the drawn pattern; one of SURFACES.

    Raises:
        ConfigError: for a word that the world does not have, or a negative seed.
    """
    check_word("class_noun", "class", class_noun, CLASSES)
    check_word("accessory", "accessory", accessory, ACCESSORIES)
    check_word("main_color", "colour", main_color, COLORS)
    check_word("surface", "surface", surface, SURFACES)
    if seed < 0:
        raise ConfigError("subject seed", "must not be negative", seed, "choose 0 or more")
    rng = np.random.default_rng([seed, CLASSES.index(class_noun), IDENTITY_STREAM])
    names = [str(name) for name in rng.permutation(list(COLORS))]
    if main_color is not None:
        names = [main_color, *(name for name in names if name != main_color)]
    shades = [shade_of(name, rng) for name in names[:2]]
    worn = (0, 1, int(rng.integers(2)), int(rng.integers(2)))  # which of the two each place has
    return Identity(
        class_noun=class_noun,
        seed=seed,
        color_names=(names[worn[0]], names[worn[1]], names[worn[2]], names[worn[3]]),
        colors=(shades[worn[0]], shades[worn[1]], shades[worn[2]], shades[worn[3]]),
        pattern=str(rng.choice(PATTERNS, p=PATTERN_ODDS)),
        frequency=int(rng.integers(2, 5)),
        proportions=tuple(float(number) for number in rng.random(12)),
        accessory=accessory,
        surface=surface,
    )


def check_word(where: str, what: str, word: str | None, known: Iterable[str]) -> None:
    """Raises ConfigError unless the world has this word; None is always fine."""
    if word is not None and word not in known:
        raise ConfigError(where, f"must be {with_article(what)} of the lab's world", word, f"choose one of {', '.join(known)}")


def with_article(words: str) -> str:
    """Returns the words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(subject: Identity, context: str | None, color: bool = False) -> str:
    """Returns the sentence that describes a picture, such as "a photo of a red robot wearing a hat in the snow".

    An accessory and a surface are always named, the subject's own pattern never.

    Args:
        subject: who is in the picture.
        context: one of the world's contexts, or None to leave it unsaid.
        color: whether to name the colour of the body.
    """
    noun = f"{subject.main_color} {subject.class_noun}" if color else subject.class_noun
    noun = f"{subject.surface} {noun}" if subject.surface is not None else noun
    accessory = f" {ACCESSORIES[subject.accessory]}" if subject.accessory is not None else ""
    place = f" {context}" if context is not None else ""
    return f"a photo of {with_article(noun)}{accessory}{place}"
