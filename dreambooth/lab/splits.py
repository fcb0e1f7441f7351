"""Which parts of the world pretraining sees and which are held out of it; its stream of items; the prompts and words of the world.

Held out are classes, contexts and identities: a test shows that the stream never yields any of them. The tokenizer is built from
`vocabulary()` and has their words too, so that a prompt with them is as long as any other.
"""

from typing import NamedTuple

import numpy as np

from dreambooth.lab.identities import ACCESSORIES, CLASSES, COLORS, SURFACES, Identity, caption, check_word, identity, with_article
from dreambooth.lab.world import CONTEXTS

HELD_OUT_CLASSES: tuple[str, ...] = ("chair", "penguin")
HELD_OUT_CONTEXTS: tuple[str, ...] = ("in the rain", "in a library")
TRAINED_CLASSES: tuple[str, ...] = tuple(noun for noun in CLASSES if noun not in HELD_OUT_CLASSES)
TRAINED_CONTEXTS: tuple[str, ...] = tuple(context for context in CONTEXTS if context not in HELD_OUT_CONTEXTS)
CLASS_IMAGE_CONTEXTS: tuple[str, ...] = (  # of class images in experiments: none of those that the final scores are measured in
    "on the grass", "on a wooden table", "on the beach", "in a city", "at night", "at sunset", "on a checkered floor", "on a red carpet",
)  # fmt: skip
HELD_OUT_SEEDS = range(900, 1000)  # the subjects of the experiments and of the science tests
TRAINED_SEEDS = range(100_000, 1_000_000)  # far from all that tests and people choose
FIRST_RENDER_SEED = 1_000_000  # no evaluation shows the poses and places of pretraining
TRAINING_STREAM = 5  # part of the key of every item: changing it makes another stream

COLOR_ODDS, CONTEXT_ODDS, PHOTO_ODDS = 0.4, 0.85, 0.8  # how many captions name them; of the others, the body's colour and the place stay unsaid
ACCESSORY_ODDS, SURFACE_ODDS = 0.2, 0.1  # how many pictures have them; captions always name them

KINDS: tuple[str, ...] = ("recontextualisation", "property", "accessory")  # DreamBench's kinds of prompt (Ruiz et al. 2023, sec. 5)
RARE_TOKENS: tuple[str, ...] = ("sks", "zwx", "ohwx", "vtk", "qrn")  # in no caption: free for a subject
GENERAL_WORDS: tuple[str, ...] = (
    "a", "an", "the", "photo", "picture", "painting", "drawing", "image", "of", "and", "with", "without", "wearing", "toy", "style",
    "in", "on", "at", "by", "under", "one", "two", "small", "big", "old", "new", "front", "back", "side", "next", "to", "is", "no",
)  # fmt: skip


class TrainingItem(NamedTuple):
    """One picture of the pretraining stream: `render([subject], [context], [seed])`, and what is said about it."""

    subject: Identity
    context: str  # where the picture is taken; the caption may leave it unsaid
    seed: int
    caption: str


class Prompt(NamedTuple):
    """One evaluation prompt with `{subject}` in it, and what it asks for: words of the world, or None."""

    template: str
    context: str | None = None
    main_color: str | None = None
    surface: str | None = None
    accessory: str | None = None


def is_held_out(identity_seed: int) -> bool:
    """Returns whether the subjects with this seed, of all classes, are kept out of pretraining."""
    return identity_seed in HELD_OUT_SEEDS


def draw_training_item(index: int) -> TrainingItem:
    """Returns item number `index` >= 0 of the pretraining stream: a function of the index alone, never anything held out."""
    rng = np.random.default_rng([index, TRAINING_STREAM])
    noun, context = str(rng.choice(TRAINED_CLASSES)), str(rng.choice(TRAINED_CONTEXTS))
    subject_seed = int(rng.integers(TRAINED_SEEDS.start, TRAINED_SEEDS.stop))
    accessory = str(rng.choice(list(ACCESSORIES))) if rng.random() < ACCESSORY_ODDS else None
    surface = str(rng.choice(list(SURFACES))) if rng.random() < SURFACE_ODDS else None
    subject = identity(noun, subject_seed, accessory=accessory, surface=surface)
    names_color, names_context, is_photo = rng.random() < COLOR_ODDS, rng.random() < CONTEXT_ODDS, rng.random() < PHOTO_ODDS
    words = caption(subject, context if names_context else None, color=names_color)
    return TrainingItem(subject, context, FIRST_RENDER_SEED + index, words if is_photo else words.removeprefix("a photo of "))


def prompts(kind: str) -> list[str]:
    """Returns the evaluation prompts of one of KINDS, with `{subject}` where "sks robot" goes.

    Recontextualisation names every context, property every colour and surface, accessory every accessory; `true_scene` says what to see.

    Raises:
        ConfigError: for a kind that is not one of KINDS.
    """
    check_word("kind", "kind of prompt", kind, KINDS)
    return [prompt.template for prompt in PROMPTS[kind]]


def true_scene(template: str, class_noun: str, seed: int) -> tuple[Identity, str | None]:
    """Returns what a prompt of `prompts` asks for: the subject as it should look, and the context, None if any will do.

    Raises:
        ConfigError: for a template that is not one of `prompts`.
    """
    known = {prompt.template: prompt for kind in KINDS for prompt in PROMPTS[kind]}
    check_word("template", "prompt", template, known)
    asked = known[template]
    return identity(class_noun, seed, accessory=asked.accessory, main_color=asked.main_color, surface=asked.surface), asked.context


def vocabulary() -> list[str]:
    """Returns every word that the world's captions can hold, general words and the rare tokens, sorted: what a tokenizer is built from."""
    phrases = (*CLASSES, *CONTEXTS, *COLORS, *SURFACES, *ACCESSORIES, *ACCESSORIES.values(), *GENERAL_WORDS, *RARE_TOKENS)
    return sorted({word for phrase in phrases for word in phrase.split()})


PROMPTS: dict[str, list[Prompt]] = {
    "recontextualisation": [Prompt(f"a photo of a {{subject}} {context}", context=context) for context in CONTEXTS],
    "property": [Prompt(f"a photo of {with_article(color)} {{subject}}", main_color=color) for color in COLORS]
    + [Prompt(f"a photo of {with_article(surface)} {{subject}}", surface=surface) for surface in SURFACES],
    "accessory": [Prompt(f"a photo of a {{subject}} {phrase}", accessory=accessory) for accessory, phrase in ACCESSORIES.items()],
}
