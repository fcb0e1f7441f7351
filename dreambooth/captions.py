"""Captions: what the file beside a photo or the photo's own name says about it, as templates that name no subject yet. Pure.

{subject} stands for identifier and noun ("sks dog"), {class} for the noun alone, {identifier} for the rare word.
"""

import re

LONGEST_SHOWN = 40  # captions that are printed one by one


def from_file_name(stem: str) -> str | None:
    """Returns the caption in a file name without its ending, what stands after the first @; None where there is none.

    The words S and C in it become the identifier and the class noun, as notebook users write them: `07@a photo of S C at night` ->
    "a photo of {identifier} {class} at night". What stands before the @ only keeps equal captions apart.
    """
    _, at, caption = stem.partition("@")
    if not at or not caption.strip():
        return None
    return re.sub(r"\bC\b", "{class}", re.sub(r"\bS\b", "{identifier}", caption.strip()))


def from_text(text: str) -> str | None:
    """Returns the caption in the text of a side file: all of it, line breaks as spaces; None for an empty one."""
    return " ".join(text.split()) or None


def fill(template: str, subject: str, identifier: str, class_noun: str) -> str:
    """Returns a caption with its placeholders replaced, each once, and no doubled spaces; other braces stay as they are.

    Args:
        template: a caption.
        subject: for {subject}.
        identifier: for {identifier}; "" in the captions of class images.
        class_noun: for {class}.
    """
    words = {"subject": subject, "identifier": identifier, "class": class_noun}
    return " ".join(re.sub(r"\{(subject|identifier|class)\}", lambda found: words[found[1]], template).split())


def is_word_in(word: str, caption: str) -> bool:
    """Tells whether a caption holds a word (or words) as such, whatever the letters' case: `sks` is not in "masks"."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE) is not None


def describe(names: list[str], captions: list[str]) -> list[str]:
    """Returns the captions for people, a line each; none where all are the same."""
    if len(set(captions)) < 2:
        return []
    lines = [f"caption of {name}: {caption}" for name, caption in zip(names, captions, strict=True)]
    rest = len(lines) - LONGEST_SHOWN
    return lines if rest <= 0 else [*lines[:LONGEST_SHOWN], f"... and {rest} more captions"]
