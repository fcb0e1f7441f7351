"""Run folders -> a study: which settings tell the arms apart, which arm is the baseline, what each run scored, what failed."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from dreambooth.arms import as_typed, axes, in_brief, recipe_settings, settings_that_differ
from dreambooth.combined_scores import ARM_WORDS, BASE
from dreambooth.config import Config
from dreambooth.errors import UserError
from dreambooth.metrics_csv import MetricsFile
from dreambooth.report.drawn import Drawn, LeftOut, drawn_again, own_pictures
from dreambooth.runs import RunFolder, read_run

CONF = Path(__file__).resolve().parents[2] / "conf"
PICTURE = ["subject", "kind", "template", "k"]
SAME = 1e-4  # scores of the same picture against the same photos; sums in another order differ by less
ONE_ARM = "these settings"  # the label of the only arm


class ScoredRun(NamedTuple):
    """One finished run with scores, as it was drawn in the end or again by `evaluate.py`: one arm, subject and training seed."""

    folder: RunFolder
    config: Config  # of what was drawn again, with that sampling
    subject: str
    arm: str
    scores: dict[str, Any]  # what its scores.json holds
    course: list[dict[str, float]]  # scores on the selection prompts at every evaluated step, by key, with "step"; [] for what was drawn again
    model: str  # arm of the training alone, whatever the way of drawing
    suffix: str  # of the names of its files; "" is the run's own

    @property
    def pictures(self) -> Path:
        """The folder of its final pictures."""
        return self.folder.path / "samples" / self.scores.get("pictures", f"final{self.suffix}")


class Study(NamedTuple):
    """All that a report is made from."""

    header: dict[str, str]  # of the experiments' YAML: Question, Command, Time, Arms, Expected, Reading, Paper, Figures; {} where there is none
    groups: list[str]
    arms: list[str]  # the baseline first
    baseline: str  # the arm that the others are held against
    baseline_reason: str
    runs: list[ScoredRun]
    left_out: list[LeftOut]
    images: pd.DataFrame  # the final scores of every image, with `label`; arm is base, best or final in every run

    @property
    def has_arms(self) -> bool:
        """Tells whether there are settings to compare; otherwise the steps of one setting are held against the un-tuned base."""
        return len(self.arms) > 1

    @property
    def is_drawn_again(self) -> bool:
        """Tells whether there are arms that were drawn again from trained models."""
        return any(run.suffix for run in self.runs)

    @property
    def is_of_drawing_alone(self) -> bool:
        """Tells whether all arms were drawn from the same models, so that no course of training sets them apart."""
        return self.is_drawn_again and len(self.models) == 1

    @property
    def models(self) -> dict[str, list[ScoredRun]]:
        """The trained arms with their runs, each run once, however often it was drawn."""
        found: dict[str, dict[Path, ScoredRun]] = {}
        for run in self.runs:
            found.setdefault(run.model, {}).setdefault(run.folder.path, run)
        return {model: list(runs.values()) for model, runs in found.items()}

    @property
    def subjects(self) -> list[str]:
        """The subjects, in the order of the runs."""
        return list(dict.fromkeys(run.subject for run in self.runs))

    def of_arm(self, arm: str) -> list[ScoredRun]:
        """Returns the scored runs of an arm."""
        return [run for run in self.runs if run.arm == arm]

    def compared(self, step: str = "best") -> tuple[pd.DataFrame, str]:
        """Returns the images to compare, with the arm's name in `label`, and the label of the baseline.

        Args:
            step: "best", the step that the declared rule chose on the selection prompts, or "final", the last one.
        """
        if self.has_arms:
            return self.images[self.images.arm == step], self.baseline
        tuned = self.images[self.images.arm != "base"]
        return pd.concat([self.base, tuned.assign(label=tuned.arm.map(ARM_WORDS))], ignore_index=True), BASE

    @property
    def base(self) -> pd.DataFrame:
        """The images of the un-tuned base, once where all arms drew the same; else once for each kind of drawing, as a setting concerns it."""
        base = self.images[self.images.arm == "base"]
        alike: list[list[str]] = []  # arms whose bases drew the same
        for arm in self.arms:
            same = next((ones for ones in alike if score_alike(base[base.label.isin([*ones, arm])], ["identity", "alignment"])), None)
            if same is None:
                alike.append([arm])
            else:
                same.append(arm)
        if len(alike) == 1:
            return base.drop_duplicates(PICTURE).assign(label=BASE, seed=np.nan)
        names = {arm: f"{BASE} of {', '.join(ones)}" for ones in alike for arm in ones}
        return base.assign(label=base.label.map(names)).drop_duplicates([*PICTURE, "label"]).assign(seed=np.nan)


def score_alike(images: pd.DataFrame, columns: Sequence[str]) -> bool:
    """Tells whether each picture (of one subject, kind, prompt and noise) has the same scores in all rows, but for rounding."""
    of_picture = images.groupby(PICTURE)[list(columns)]
    return not (of_picture.max() - of_picture.min() > SAME).any(axis=None)


def read_study(folders: Sequence[str | Path], baseline: str | None = None, is_own_drawing: bool = False) -> Study:
    """Returns the study that run folders make up; what `evaluate.py` drew again of all runs in other ways are arms as well.

    Args:
        folders: run folders, or folders that hold them.
        baseline: an arm, or a part of its name that no other has; None: the arm with the recipe's settings, else the one started first.
        is_own_drawing: leave out what was drawn again.

    Raises:
        UserError: no run, no scored run, several evaluators, two runs that nothing tells apart, or no such baseline.
    """
    found_all = _find(folders)
    groups = list(dict.fromkeys(run.config.group for run in found_all))
    own = [own_pictures(run) for run in _each_once(found_all)]
    again, partly = ([], []) if is_own_drawing else drawn_again(own)
    runs, left_out = [], []
    models = dict(zip((one.run.path for one in own), _arms(own), strict=True))
    for one, arm in zip([*own, *again], _arms([*own, *again]), strict=True):
        if one.is_scored:
            course = [] if one.suffix else _course(one.run)
            runs.append(ScoredRun(one.run, one.config, one.subject, arm, one.scores, course, models[one.run.path], one.suffix))
        else:
            left_out.append(LeftOut(one.run.path.name, arm, one.subject, one.config.seed, one.run.status, _reason(one)))
    _check(runs, left_out)
    found = list(dict.fromkeys(run.arm for run in sorted(runs, key=lambda run: run.folder.record.get("started", ""))))
    first, reason = _baseline(runs, found, baseline)
    order = [first, *(arm for arm in found if arm != first)]
    runs = sorted(runs, key=lambda run: order.index(run.arm))
    return Study(_headers(groups), groups, order, first, reason, runs, [*left_out, *partly], _images(runs))


def read_header(group: str) -> dict[str, str]:
    """Returns the header of an experiment's YAML by its words (Question, Command, Expected ...); {} if there is no such experiment."""
    path = CONF / "experiment" / f"{group}.yaml"
    found: dict[str, str] = {}
    word = None
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        if not line.startswith("#"):
            break
        match = re.match(r"# ([A-Z][a-z]+): +(.*)", line)
        if match:
            word = match[1]
            found[word] = match[2].removesuffix("\\").strip()
        elif word is not None:
            found[word] += " " + line.lstrip("# ").removesuffix("\\").strip()
    return found


def _headers(groups: Sequence[str]) -> dict[str, str]:
    """Returns the header of a group; of several groups what all of them ask, and what each says of its own, named."""
    found = {group: header for group in groups if (header := read_header(group))}
    if len(groups) == 1:
        return found.get(groups[0], {})
    questions = [header["Question"] for header in found.values() if "Question" in header]
    joined = {"Question": " ".join(question[0].upper() + question[1:] for question in questions)} if questions else {}
    for word in ("Command", "Arms", "Expected", "Reading", "Paper"):
        said = [f"{group}: {header[word]}" for group, header in found.items() if word in header]
        joined |= {word: "; ".join(said)} if said else {}
    return joined


def _each_once(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """Returns the runs, a finished one that several groups share (see `taken_over`) only once: where it was trained, if that is among them."""
    done: dict[str, RunFolder] = {}
    for run in runs:
        name = _identity(run)
        if run.status == "done" and (name not in done or ("taken_from" in done[name].record and "taken_from" not in run.record)):
            done[name] = run
    return [run for run in runs if run.status != "done" or done[_identity(run)] is run]


def _identity(run: RunFolder) -> str:
    """Returns what is the same of copies of one run, and of no two others: the name of its folder and what it was made from."""
    return json.dumps([run.path.name, run.record["fingerprint"], run.record["digests"]], sort_keys=True)


def _find(folders: Sequence[str | Path]) -> list[RunFolder]:
    """Returns the runs of folders that are runs or hold them, each once."""
    paths: list[Path] = []
    for folder in map(Path, folders):
        held = [folder] if (folder / "run.json").is_file() else sorted(path.parent for path in folder.glob("*/run.json"))
        if not held:
            raise UserError(str(folder), "must be a run folder or hold some", None, "give a folder that train.py made, as runs/prior")
        paths += held
    return [read_run(path) for path in dict.fromkeys(path.resolve() for path in paths)]


def _arms(drawn: Sequence[Drawn]) -> list[str]:
    return [setting or ONE_ARM for setting in settings_that_differ([(one.subject, one.config) for one in drawn])]


def _reason(one: Drawn) -> str:
    """Returns why a run has no scores."""
    missing = (one.scores or {}).get("missing")
    return str(one.run.record.get("error") or missing or ("no scores.json" if one.run.status == "done" else "not finished"))


def _course(run: RunFolder) -> list[dict[str, float]]:
    """Returns the scores that metrics.csv has for each evaluated step."""
    rows = [row for row in MetricsFile(run.path / "metrics.csv").read() if row.get("score/identity_fidelity")]
    return [
        {"step": float(row["step"])} | {key.removeprefix("score/"): float(text) for key, text in row.items() if key.startswith("score/") and text}
        for row in rows
    ]


def _check(runs: Sequence[ScoredRun], left_out: Sequence[LeftOut]) -> None:
    if not runs:
        got = "; ".join(f"{one.name} is {one.status!r}: {one.reason}" for one in left_out)
        raise UserError("runs", "must hold a finished run with scores", got, "finish the runs by the same command, or score them: evaluate.py")
    versions = {run.scores["evaluator"] for run in runs}
    if len(versions) > 1:
        raise UserError("runs", "must all have scores of one evaluator", " and ".join(sorted(versions)), "score them again: evaluate.py encoders=...")
    seen: dict[tuple[str, str, int], str] = {}
    for run in runs:
        same, name = (run.arm, run.subject, run.config.seed), run.folder.path.name
        if same in seen:
            rule = f"must differ in subject, seed or a setting ({run.subject}, seed {run.config.seed})"
            raise UserError("runs", rule, f"{seen[same]} and {name}", "leave one of them out")
        seen[same] = name


def _baseline(runs: Sequence[ScoredRun], arms: Sequence[str], asked: str | None) -> tuple[str, str]:
    """Returns the baseline and why it is that one."""
    if asked is not None:
        fitting = [arm for arm in arms if arm == asked] or [arm for arm in arms if asked in arm]
        if len(fitting) != 1:
            raise UserError("--baseline", f"must name one of the arms {' | '.join(arms)}", asked, "give the whole name of one")
        return fitting[0], "as asked for"
    for arm in arms:
        config = next(run.config for run in runs if run.arm == arm)
        recipes = [_recipe(config, write) for write in (as_typed, in_brief)]
        if arm != ONE_ARM and all(value in [recipe.get(key, recipe.get(f"{key}.name")) for recipe in recipes] for key, value in axes(arm).items()):
            return arm, "its settings are the recipe's"
    return arms[0], "the first of the sweep, as no arm has the recipe's settings"


def _recipe(config: Config, write: Callable[[Any], str]) -> dict[str, str]:
    """Returns the settings that this base and subject get when nothing is asked for, as text by dotted name; {} where that cannot be told."""
    train = CONF / "train.yaml"
    if not train.is_file():
        return {}
    entries = OmegaConf.to_container(OmegaConf.load(train))["defaults"]
    return recipe_settings(config, {group: name for entry in entries if isinstance(entry, dict) for group, name in entry.items()}, write)


def _images(runs: Sequence[ScoredRun]) -> pd.DataFrame:
    """Returns the scores of every image of all runs."""
    frames = []
    for run in runs:
        frame = pd.read_parquet(run.folder.path / f"scores{run.suffix}.parquet").assign(label=run.arm, subject=run.subject, seed=run.config.seed)
        frames.append(frame.assign(run=run.folder.path.name))
    return pd.concat(frames, ignore_index=True)
