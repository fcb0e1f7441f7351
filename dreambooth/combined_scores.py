"""Many scored runs -> one table: macro over subjects, with intervals over subjects and training seeds, split by what the prompts ask."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dreambooth.arms import settings_that_differ
from dreambooth.config import Config, to_plain
from dreambooth.dreambench import PROMPT_KINDS
from dreambooth.errors import UserError
from dreambooth.files import write_json, write_text, write_with
from dreambooth.final_scores import subject_label
from dreambooth.metrics.table import METRICS, MetricInfo
from dreambooth.rescoring import Rescoring
from dreambooth.statistics.comparison import Comparison, compare_arms, to_markdown
from dreambooth.statistics.intervals import Interval, bootstrap_interval, describe, hierarchical_interval

BASE = "un-tuned base"
ARM_WORDS = {"base": BASE, "best": "best step", "final": "last step"}
REFERENCE_WORDS = {
    "real_photos": "real photos (i != j)",
    "real_photos_with_self_pairs": "real photos, self-pairs counted",
    "copy_baseline": "copies of the photos",
    "ground_truth": "true renders",
}


class Evaluated(NamedTuple):
    """A run that was scored, and what its scores.json holds."""

    how: Rescoring
    scores: dict[str, Any]


def require_one_evaluator(configs: Iterable[Config]) -> None:
    """Refuses runs whose scores would come from different networks, before anything is drawn.

    Raises:
        UserError: two runs have other encoders.
    """
    kinds = {str(to_plain(config.encoders)) for config in configs}
    if len(kinds) > 1:
        raise UserError(
            "runs", "must be scored by one evaluator", " and ".join(sorted(kinds)), "choose one for all: encoders=clip_dino or encoders=lab"
        )


def combine(evaluated: Sequence[Evaluated], left_out: Sequence[str], output: Path) -> tuple[dict[str, Any], str]:
    """Writes scores.parquet (one row an image), scores.json and table.md of many runs; returns what the last two hold.

    Args:
        evaluated: the runs, each scored just now.
        left_out: a sentence for each run that is not in the table.
        output: folder, made when missing.

    Raises:
        UserError: runs without scores, of other evaluators, or two runs that nothing tells apart.
    """
    versions = {one.scores["evaluator"] for one in evaluated}
    if None in versions or len(versions) > 1:
        missing = next((one.scores["missing"] for one in evaluated if one.scores["missing"]), None)
        raise UserError(
            "runs", "must all have scores of one evaluator", missing or " and ".join(sorted(map(str, versions))), "see encoders in --cfg job"
        )
    images = _images(evaluated)
    labelled = _one_base(images)
    comparisons = {info.key: _compared(labelled, info) for info in METRICS}
    comparisons = {key: found for key, found in comparisons.items() if found is not None}
    result = {
        "format": 1,
        "evaluator": next(iter(versions)),
        "sentence": comparisons["identity_fidelity"].sentence,
        "runs": [_about(one, setting) for one, setting in zip(evaluated, images.attrs["settings"], strict=True)],
        "left_out": list(left_out),
        "rows": _rows(comparisons),
        "references": _references(evaluated),
        "by_prompt_kind": _by_prompt_kind(labelled),
        "differences": {key: [_difference(row) for row in found.rows if row.difference] for key, found in comparisons.items()},
    }
    table = _markdown(result, comparisons, labelled)
    images.attrs = {}
    write_with(output / "scores.parquet", lambda temporary: images.to_parquet(temporary, index=False))
    write_json(output / "scores.json", result)
    write_text(output / "table.md", table + "\n")
    return result, table


def _images(evaluated: Sequence[Evaluated]) -> pd.DataFrame:
    """Returns the per-image scores of all runs, one below the other, with the column `setting`; the settings by run in its attrs."""
    labels = [subject_label(one.how.run, one.how.config) for one in evaluated]
    settings = settings_that_differ([(label, one.how.config) for label, one in zip(labels, evaluated, strict=True)])
    seen: dict[tuple[str, int, str], Path] = {}
    frames = []
    for one, label, setting in zip(evaluated, labels, settings, strict=True):
        run, same = one.how.run, (label, one.how.config.seed, setting)
        if same in seen:
            got = f"{seen[same]} and {run.path}"
            raise UserError("runs", f"must differ in subject, seed or a setting ({label}, seed {same[1]})", got, "leave one of them out")
        seen[same] = run.path
        frame = pd.read_parquet(run.path / f"scores{one.how.suffix}.parquet")
        frame.insert(list(frame.columns).index("seed") + 1, "setting", setting)
        frames.append(frame)
    images = pd.concat(frames, ignore_index=True)
    images.attrs["settings"] = settings
    return images


def _one_base(images: pd.DataFrame) -> pd.DataFrame:
    """Returns the images with a column `label` that names each row of the table; un-tuned bases that drew the same are counted once.

    The base does not depend on the training, so its pictures are the same for all seeds and settings, unless a setting concerns drawing.
    """
    words = images.arm.map(ARM_WORDS)
    labelled = images.assign(label=words.where(images.setting == "", images.setting + ": " + words))
    base = labelled.arm == "base"
    what = ["subject", "kind", "template", "k"]
    if (labelled[base].groupby(what)[["identity", "alignment"]].nunique() <= 1).all(axis=None):
        once = labelled[base].drop_duplicates(what).assign(label=BASE, seed=np.nan)
        labelled = pd.concat([once, labelled[~base]], ignore_index=True)
    return labelled


def _compared(labelled: pd.DataFrame, info: MetricInfo) -> Comparison | None:
    """Returns one score of every row of the table against the first base; None where it was not measured in that base or in the others."""
    rows = labelled[labelled.kind == info.kind]
    if info.column not in rows.columns:
        return None
    rows = rows[["label", "subject", "seed", "template", "k", info.column]].dropna(subset=info.column).rename(columns={info.column: info.key})
    base = next((label for label in rows.label if label.endswith(BASE)), None)
    return compare_arms(rows, info.key, base, arm="label", pairs=("template", "k")) if base else None


def _rows(comparisons: dict[str, Comparison]) -> list[dict[str, Any]]:
    """Returns a dict a row of the table: arm, and each score's mean with its interval."""
    found: dict[str, dict[str, Any]] = {}
    for key, comparison in comparisons.items():
        for row in comparison.rows:
            entry = found.setdefault(row.arm, {"arm": row.arm, "subjects": row.subjects, "seeds": list(row.seeds)})
            entry |= {key: row.mean.mean, f"{key}_interval": _interval(row.mean)}
    return list(found.values())


def _references(evaluated: Sequence[Evaluated]) -> dict[str, dict[str, Any]]:
    """Returns each reference row, macro over subjects, with intervals over subjects."""
    labels = [subject_label(one.how.run, one.how.config) for one in evaluated]
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for one in evaluated for name in one.scores["references"]):
        rows = [one.scores["references"].get(name, {}) for one in evaluated]
        for key in dict.fromkeys(key for row in rows for key in row):
            values = [np.nan if row.get(key) is None else row[key] for row in rows]
            interval = bootstrap_interval(values, labels, unit="subject")
            found.setdefault(name, {})[key] = interval.mean
            found[name][f"{key}_interval"] = _interval(interval)
    return found


def _by_prompt_kind(labelled: pd.DataFrame) -> list[dict[str, Any]]:
    """Returns a dict for each row of the table and kind of prompt: the scores of the subject's images, macro over subjects."""
    subject, found = labelled[labelled.kind == "subject"], []
    for label in dict.fromkeys(subject.label):
        for kind in PROMPT_KINDS:
            rows = subject[(subject.label == label) & (subject.prompt_kind == kind)]
            if rows.empty:
                continue
            entry: dict[str, Any] = {"arm": label, "prompt_kind": kind, "prompts": int(rows.template.nunique()), "images": len(rows)}
            for info in METRICS:
                if info.kind == "subject" and info.column in rows.columns and rows[info.column].notna().any():
                    interval = hierarchical_interval(rows[info.column], rows.subject, rows.seed.fillna(-1))
                    entry |= {info.key: interval.mean, f"{info.key}_interval": _interval(interval)}
            found.append(entry)
    return found


def _difference(row: Any) -> dict[str, Any]:
    return {"arm": row.arm, "mean": row.difference.mean} | _interval(row.difference) | {"p": row.test.p, "p_holm": row.holm_p}


def _interval(interval: Interval) -> dict[str, Any]:
    return {"low": interval.low, "high": interval.high, "n": interval.n, "unit": interval.unit}


def _about(one: Evaluated, setting: str) -> dict[str, Any]:
    run, config = one.how.run, one.how.config
    steps = {row["arm"]: row["step"] for row in one.scores["rows"]}
    return {"run": str(run.path), "subject": subject_label(run, config), "seed": config.seed, "setting": setting, "steps": steps}


def _markdown(result: dict[str, Any], comparisons: dict[str, Comparison], labelled: pd.DataFrame) -> str:
    """Returns the tables for people: what they rest on first, reference rows above the arms, differences with their tests."""
    shown = [info for info in METRICS if info.key in comparisons]
    marks = [{"arm": REFERENCE_WORDS.get(name, name)} | row for name, row in result["references"].items()]
    own = [info for info in shown if info.kind == "subject"]
    kinds = [row | {"arm": f"{row['arm']}, {row['prompt_kind']} ({row['images']} images)"} for row in result["by_prompt_kind"]]
    subjects = [
        {"arm": f"{subject}, {label}"}
        | {info.key: rows[rows.kind == info.kind].groupby("seed", dropna=False)[info.column].mean().mean() for info in shown}
        for (subject, label), rows in labelled.groupby(["subject", "label"], sort=False)
    ]
    parts = [
        result["sentence"],
        "Means are macro: images of a prompt, runs of a subject, subjects.",
        f"Evaluator: {result['evaluator']}",
        *(f"Left out: {line}" for line in result["left_out"]),
        _table("all prompts", shown, [*marks, *result["rows"]]),
        _table("by kind of prompt (a property or an accessory lowers identity by design)", own, kinds),
        *(to_markdown(comparisons[info.key]) for info in shown if info.is_headline),
        _table("each subject", shown, subjects),
    ]
    return "\n\n".join(parts)


def _table(title: str, shown: Sequence[MetricInfo], rows: Sequence[dict[str, Any]]) -> str:
    """Returns a Markdown table: a row each, a column a score with the direction where better is."""
    lines = [["", *(f"{info.title} ({info.direction})" for info in shown)], ["---"] * (len(shown) + 1)]
    lines += [[row["arm"], *(_cell(row, info.key) for info in shown)] for row in rows]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


def _cell(row: dict[str, Any], key: str) -> str:
    value, interval = row.get(key), row.get(f"{key}_interval")
    if value is None or value != value:
        return "-"
    return describe(Interval(value, **interval), 3) if interval else f"{value:.3f}"
