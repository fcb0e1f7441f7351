"""DreamBench (Ruiz et al. 2023): its folder of subjects and its prompt file, read strictly and without running any of its text."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dreambooth.errors import ConfigError, UserError
from dreambooth.photo_folder import read_photo_folder, shown

PROMPT_FILE = "prompts_and_classes.txt"
PROMPT_KINDS = ("recontextualisation", "property", "accessory", "plain", "other")
# The file does not say which subjects are alive, the paper does: its cats and dogs. The others are for folders in the same format.
LIVE_CLASSES = frozenset(
    "dog cat puppy kitten horse pony cow pig sheep goat rabbit hamster bird parrot chicken duckling turtle lizard frog fish "
    "person man woman boy girl child baby".split()
)
_SUBJECT = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_-]*),(?P<class_noun>[A-Za-z][A-Za-z' -]*)")  # a name is a folder, never a path
_PROMPT = re.compile(r"""(?P<quote>['"])(?P<text>[^'"{}\\]*\{0\} \{1\}[^'"{}\\]*)(?P=quote)\.format\(unique_token, class_token\)(?P<comma>,?)""")
_ARTICLE = re.compile(r"(a|an|the)?")
_PHOTO_OF = re.compile(r"^((a|an|the) )?(photo|picture|photograph) of ")


class AbsentSubjectError(ConfigError):
    """A subject that the prompt file lists and whose photos are not in the folder: a sweep over all subjects passes it over."""


class BenchSubject(NamedTuple):
    """One subject of the folder."""

    name: str  # also the name of its folder
    class_noun: str
    live: bool  # an animal or a person: wears things, where an object is put in more places

    @property
    def sort(self) -> str:
        """ "live" or "object"."""
        return "live" if self.live else "object"


class DreamBench(NamedTuple):
    """The subjects and prompts of a DreamBench folder.

    Attributes:
        folder: where the subjects' folders lie.
        subjects: those that the prompt file lists and that have a folder, in the file's order.
        absent: names that are listed and have no folder.
        object_prompts, live_prompts: templates with {subject}, in the file's order.
    """

    folder: Path
    subjects: tuple[BenchSubject, ...]
    absent: tuple[str, ...]
    object_prompts: tuple[str, ...]
    live_prompts: tuple[str, ...]

    def subject(self, name: str | None, where: str = "subject.name") -> BenchSubject:
        """Returns the subject of that name.

        Raises:
            AbsentSubjectError: it is listed, but its photos are not there.
            ConfigError: it is not listed.
        """
        found = next((subject for subject in self.subjects if subject.name == name), None)
        if found is not None:
            return found
        there = ", ".join(subject.name for subject in self.subjects)
        if name in self.absent:
            raise AbsentSubjectError(
                where, f"must have a folder of photos in {self.folder}", name, f"put its photos there, or choose one of {there or 'none'}"
            )
        raise ConfigError(where, f"must be a subject of {self.folder}", name, f"choose one of {there or 'none'}")

    def prompts(self, subject: BenchSubject) -> tuple[str, ...]:
        """Returns the templates for a subject: 25 of its sort in the published file."""
        return self.live_prompts if subject.live else self.object_prompts

    def photo_folder(self, subject: BenchSubject) -> Path:
        """Returns the folder with the subject's photos."""
        return self.folder / subject.name

    def with_photos(self, digest: str, resolution: int) -> BenchSubject | None:
        """Returns the subject whose photos have that content digest (see `photo_folder.PhotoSet`); None if no one has.

        Decodes the photos of every subject, so it takes some seconds.

        Args:
            digest: of the photos that a run was trained on.
            resolution: px, of that run; photos too small for it do not count.
        """
        for subject in self.subjects:
            if read_photo_folder(str(self.photo_folder(subject)), resolution, config_path="data.dreambench").digest == digest:
                return subject
        return None

    def describe(self, name: str) -> str:
        """Returns one line for people: the subject of that name, its prompts, and how many listed subjects are not there."""
        subject = self.subject(name)
        prompts = self.prompts(subject)
        counts = ", ".join(f"{sum(prompt_kind(p) == kind for p in prompts)} {kind}" for kind in PROMPT_KINDS if kind in map(prompt_kind, prompts))
        line = f"DreamBench: {subject.name}, a {subject.class_noun} ({subject.sort}), {len(prompts)} final prompts ({counts})"
        return line + (f"; {len(self.absent)} listed subjects have no photos here and are left out" if self.absent else "")


def read_dreambench(folder: str | Path, where: str = "data.dreambench") -> DreamBench:
    """Returns what a DreamBench folder holds: `prompts_and_classes.txt` and a folder of photos for each subject that it lists, or for some.

    Args:
        folder: as published (there `dataset/`), or one of the same format.
        where: the config field that named it, for errors.

    Raises:
        UserError: no such folder or file, a line that does not fit (file and line are named), or a folder that the file does not list.
    """
    root = Path(folder).expanduser()
    path = root / PROMPT_FILE
    if not path.is_file():
        raise UserError(where, f"must be a folder with {PROMPT_FILE}", str(folder), "give the published folder of 30 subjects, or one of its format")
    classes, object_prompts, live_prompts = _parse(path)
    folders = {entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__"))}
    unlisted = sorted(folders - classes.keys())
    if unlisted:
        raise UserError(
            str(root / shown(unlisted[0])),
            f"must be a subject that {PROMPT_FILE} lists",
            None,
            f"add a line {shown(unlisted[0])},<class>, or move it away",
        )
    subjects = tuple(BenchSubject(name, noun, noun.split()[-1].lower() in LIVE_CLASSES) for name, noun in classes.items() if name in folders)
    absent = tuple(name for name in classes if name not in folders)
    return DreamBench(root, subjects, absent, object_prompts, live_prompts)


def prompt_kind(template: str) -> str:
    """Returns what a prompt asks of the subject, by its words: one of `PROMPT_KINDS`, so that scores can be split.

    A property goes before the subject ("a red {subject}"), an accessory is worn ("wearing a hat", "in a chef outfit"), anything else that
    follows the subject is a new context; "plain" names the subject alone; "other" is all else, as an art style.
    A property or an accessory changes the subject's look, so identity is lower there by design.

    Source: Ruiz et al. 2023, sec. 4.1 and the supplement's list of prompts.
    """
    before, _, after = _PHOTO_OF.sub("", " ".join(template.split())).partition("{subject}")
    before, after = before.strip().lower(), after.strip(" .,").lower()
    bare = _ARTICLE.fullmatch(before) is not None
    if re.search(r"\bstyle\b", after) or " of " in f" {before} " or (after and not bare):
        return "other"
    if after:
        return "accessory" if re.search(r"\b(wearing|outfit)\b", after) else "recontextualisation"
    return "plain" if bare else "property"


def same_prompt(template: str) -> str:
    """Returns a form of a template that is equal for two that ask for the same picture: case, spaces, the last stop and "a photo of" aside."""
    return _PHOTO_OF.sub("", " ".join(template.split()).lower()).rstrip(" .,")


def _parse(path: Path) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """Returns subject -> class, the object templates and the live templates of a prompt file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(str(path), "must be text in UTF-8", None, "take the published file") from None
    lines = _Lines(path, text.splitlines())
    lines.expect("Classes")
    lines.expect("subject_name,class")
    classes: dict[str, str] = {}
    for number, line in lines.until("Prompts"):
        found = _SUBJECT.fullmatch(line)
        if found is None or found["name"] in classes:
            raise lines.error(number, "must be `name,class`, each name once", line)
        classes[found["name"]] = found["class_noun"].strip()
    if not classes:
        raise lines.error(lines.number, "must list a subject before it", "Prompts")
    lines.expect("Object Prompts")
    object_prompts = _templates(lines)
    lines.expect("Live Subject Prompts")
    live_prompts = _templates(lines)
    lines.expect_end()
    return classes, object_prompts, live_prompts


def _templates(lines: "_Lines") -> tuple[str, ...]:
    """Returns the templates of one `prompt_list = [...]`, with {subject} in the place of the token and the class."""
    lines.expect("prompt_list = [")
    templates: list[str] = []
    separated = True
    for number, line in lines.until("]"):
        found = _PROMPT.fullmatch(line)
        template = found["text"].replace("{0} {1}", "{subject}") if found else ""
        if found is None or not separated or template.count("{subject}") != 1 or template in templates:
            raise lines.error(number, "must be '... {0} {1} ...'.format(unique_token, class_token), each prompt once, with commas between", line)
        templates.append(template)
        separated = bool(found["comma"])
    if not templates:
        raise lines.error(lines.number, "must have a prompt before it", "]")
    return tuple(templates)


class _Lines:
    """The lines of a file that are not blank, taken one after the other; `number` counts from 1, as editors do."""

    def __init__(self, path: Path, lines: Sequence[str]) -> None:
        self.path, self.number = path, 0
        self._rest = iter([(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()])
        self._last = len(lines)

    def error(self, number: int, rule: str, got: str | None) -> UserError:
        """Returns the error that names the file and the line."""
        return UserError(f"{self.path}, line {number},", rule, got, "take the published file as the pattern")

    def expect(self, wanted: str) -> None:
        """Takes the next line, which must be that text."""
        line = self._next()
        if line != wanted:
            raise self.error(self.number, f"must be {wanted!r}", "the end of the file" if line is None else line)

    def until(self, mark: str) -> Iterator[tuple[int, str]]:
        """Gives (number, line) up to the mark, and takes the mark."""
        while (line := self._next()) != mark:
            if line is None:
                raise self.error(self.number, f"must come after a line {mark!r}", "the end of the file")
            yield self.number, line

    def expect_end(self) -> None:
        """Refuses anything that follows."""
        line = self._next()
        if line is not None:
            raise self.error(self.number, "must be the end of the file", line)

    def _next(self) -> str | None:
        """Takes the next line; None at the end of the file."""
        self.number, line = next(self._rest, (self._last, None))
        return line
