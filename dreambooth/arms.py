"""What sets runs apart: the names of the arms of a study, as "prior=none" or "method=lora, method.rank=8"."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dreambooth.config import CHOICES, NOT_SCIENCE, Config, from_plain, to_plain
from dreambooth.errors import UserError
from dreambooth.recipes import resolve

OF_THE_SUBJECT = ("subject.name", "subject.class_noun", "subject.lab_seed", "data.subject_dir", "data.dreambench", "evaluation.final_prompts")
NO_SETTING = (*NOT_SCIENCE, "seed", "data.subject_dir", "data.dreambench", "subject.name", "trainer.accelerator")
AS_TYPED = {"None": "null", "True": "true", "False": "false", "": "''"}
PLAIN_WORD = re.compile(r"[A-Za-z_][\w.]*")  # needs no quotes on the command line
LONG = 30  # characters of a list above which the name of an arm has it in brief
CHOSEN = tuple(f"{group}.name" for group, kinds in CHOICES.items() if len(kinds) > 1)  # what the user chooses by a word


def settings_that_differ(runs: Sequence[tuple[str, Config]]) -> list[str]:
    """Returns what sets each run apart from the others but subject and seed: "prior=none", "optim.learning_rate=0.0001", or "".

    What belongs to a subject (its class noun, its prompts) counts only if it differs between runs of one subject; what follows from a
    choice by the recipe (the learning rate of a method, say) does not count where it is the recipe's in every run.

    Args:
        runs: the subject's label and the resolved config of each.
    """
    flat = [flattened(to_plain(config)) for _, config in runs]
    varied = {key for key in _keys(flat) if key not in OF_THE_SUBJECT and not _ignored(key) and _differs(flat, key)}
    for label in dict.fromkeys(label for label, _ in runs):
        own = [plain for plain, (subject, _) in zip(flat, runs, strict=True) if subject == label]
        varied |= {key for key in _keys(own) if not _ignored(key) and _differs(own, key)}
    if any(key in CHOSEN for key in varied):
        recipes = [
            recipe_settings(config, {group: plain.get(f"{group}.name") for group in CHOICES}) for (_, config), plain in zip(runs, flat, strict=True)
        ]
        varied -= {key for key in varied - {*CHOSEN} if all(recipe.get(key) == plain.get(key) for recipe, plain in zip(recipes, flat, strict=True))}
    brief = [flattened(to_plain(config), in_brief) for _, config in runs]
    shown = {key: flat if _is_lost(key, flat, brief) else brief for key in sorted(varied)}
    return [
        ", ".join(f"{key.removesuffix('.name')}={texts[number][key]}" for key, texts in shown.items() if key in texts[number])
        for number in range(len(runs))
    ]


def axes(arm: str) -> dict[str, str]:
    """Returns the settings in an arm's name: "prior=none, optim.learning_rate=0.0001" -> two entries."""
    parts = re.split(r", (?=[a-z_]+(?:\.[a-z_]+)*=)", arm) if "=" in arm else []
    return dict(part.split("=", 1) for part in parts)


def recipe_settings(config: Config, names: Mapping[str, str], write: Callable[[Any], str] | None = None) -> dict[str, str]:
    """Returns the settings that a config's base and subject get when nothing but some choices is asked for; {} where that cannot be told.

    Args:
        config: resolved.
        names: of the choices, by their group: {"method": "lora", ...}.
        write: gives a value as text; None: `as_typed`.

    Returns:
        Values as text by dotted name.
    """
    plain = to_plain(config)
    kept = {"base": plain["base"], "subject": plain["subject"], "data": {"subject_dir": plain["data"]["subject_dir"]}}
    choices = {group: {"name": names[group]} for group in CHOICES if group != "base" and names.get(group)}
    try:
        return flattened(to_plain(resolve(from_plain(kept | choices, "the recipe"))), write or as_typed)
    except UserError:
        return {}


def as_typed(value: Any) -> str:
    """Returns a setting as one types it on the command line: null, true, '', [to_q,to_k]."""
    if isinstance(value, list) and all(isinstance(entry, str) and PLAIN_WORD.fullmatch(entry) for entry in value):
        return f"[{','.join(value)}]"
    return AS_TYPED.get(str(value), str(value))


def in_brief(value: Any) -> str:
    """Returns a setting as one types it, but of a list that is too long to stand in a table only the first entry and how many there are."""
    typed = as_typed(value)
    return f"[{as_typed(value[:1])[1:-1]}, ... {len(value)} in all]" if isinstance(value, list) and len(typed) > LONG and len(value) > 1 else typed


def flattened(plain: dict[str, Any], write: Callable[[Any], str] = as_typed, above: str = "") -> dict[str, str]:
    """Returns a nested dict as text by dotted name."""
    found: dict[str, str] = {}
    for key, value in plain.items():
        found |= flattened(value, write, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": write(value)}
    return found


def _keys(flat: Sequence[dict[str, str]]) -> set[str]:
    return {key for plain in flat for key in plain}


def _differs(flat: Sequence[dict[str, str]], key: str) -> bool:
    """Tells whether runs that have a setting have it differently; one that a choice lacks is told by the choice's name."""
    return len({plain[key] for plain in flat if key in plain}) > 1


def _is_lost(key: str, flat: Sequence[dict[str, str]], brief: Sequence[dict[str, str]]) -> bool:
    """Tells whether two values of a setting look the same in brief."""
    full, short = ({plain[key] for plain in texts if key in plain} for texts in (flat, brief))
    return len(short) < len(full)


def _ignored(key: str) -> bool:
    return any(key == other or key.startswith(f"{other}.") for other in NO_SETTING)
