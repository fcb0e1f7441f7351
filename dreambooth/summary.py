"""The end of a run in plain words: what was learned, what was lost, which step is the best, what to type next."""

import re
import shlex
from collections.abc import Sequence
from typing import Any

from dreambooth.config import Config
from dreambooth.diagnosis import Setting, diagnose
from dreambooth.metrics.table import METRICS, MetricInfo
from dreambooth.runs import RunFolder
from dreambooth.step_choice import StepScores


def summarize(run: RunFolder, scores: dict[str, Any], reason: str, course: Sequence[StepScores] = ()) -> str:
    """Returns the summary of a finished run.

    Args:
        run: its folder.
        scores: what scores.json holds.
        reason: why the best step was chosen, from the declared rule.
        course: the scores of every step that was evaluated on the way.
    """
    config, rows = run.config, {row["arm"]: row for row in scores["rows"]}
    lines = ["", f"{config.subject.in_prompt('{subject}')}: step {rows['best']['step']} of {config.trainer.max_steps} is the best", f"  {reason}"]
    if scores["missing"]:
        lines += ["what was learned and lost is not measured", f"  {scores['missing']}"]
    else:
        lines += ["what was learned (on prompts that chose nothing; step 0 is the un-tuned base)", *_measured(METRICS[:1], rows, scores)]
        lines += ["what was lost", *_measured(METRICS[1:], rows, scores), f"  {scores['unit']}"]
        last = rows.get("final", rows["best"])
        found = diagnose(rows["base"], rows["best"], last, scores["references"], scores["differences"], setting(run), course)
        lines += ["what the scores say", *(f"  {line}" for line in found.lines())]
    prompt = config.subject.in_prompt("a photo of a {subject} on the beach")
    return "\n".join(
        [
            *lines,
            "where it is",
            f"  look at  {run.path / 'samples' / 'final_grid.png'}",
            f"  time     {_time(run.record['seconds'])}",
            "what to type next",
            f"  python generate.py {_argument('run', run.path)} {_argument('prompt', prompt)}",
            f"  python evaluate.py {_argument('run', run.path)}",
            f"  python -m dreambooth export {shlex.quote(str(run.path))} {_export_words(config)}",
        ]
    )


def _export_words(config: Config) -> str:
    """Returns what to type behind the run folder to export it as its config says; the lab is no single file, whatever its name."""
    model = "model/" if config.base.is_lab() else "model.safetensors" if config.export.name == "model" else f"--name {config.export.name}"
    return model if config.export.weights == "best" else f"{model} --weights {config.export.weights}"


def setting(run: RunFolder) -> Setting:
    """Returns what of the run's config an advice depends on."""
    config = run.config
    learns_text = getattr(config.method, "train_text_encoder", None)
    return Setting(
        config.trainer.max_steps,
        config.trainer.eval_every,
        config.evaluation.min_alignment_ratio,
        config.evaluation.max_drift_gain,
        config.optim.learning_rate,
        photos=len(list((run.path / "photos").glob("*.png"))),
        prior_weight=getattr(config.prior, "weight", None),
        prior_prompts=len(config.prior.templates),
        captions=getattr(config.data, "captions", None) == "auto",
        trains_text_encoder=learns_text is not False,
        text_encoder_learning_rate=config.optim.text_encoder_learning_rate if learns_text else None,
    )


def _measured(measures: Sequence[MetricInfo], rows: dict[str, Any], scores: dict[str, Any]) -> list[str]:
    """Returns a line a measure: before and after, the difference with its interval in words, the mark to read it against."""
    base, best, references = rows["base"], rows["best"], scores["references"]
    mark_name = "true renders" if "ground_truth" in references else "real photos"
    marks = references.get("ground_truth", references["real_photos"])
    lines = []
    for info in measures:
        key, name = info.key, info.title[0].lower() + info.title[1:]
        if not info.is_headline or not _is_number(best.get(key)) or not _is_number(base.get(key)):
            continue
        line = f"  {name:25}{base[key]:6.2f} -> {best[key]:5.2f}"
        line += f"   ({mark_name} {marks[key]:.2f})" if _is_number(marks.get(key)) else ""
        difference = scores["differences"].get("best - base", {}).get(key)
        lines.append(line + (f"   {_in_words(difference, info)}" if difference else ""))
    return lines


def _in_words(difference: dict[str, Any], info: MetricInfo) -> str:
    mean, low, high = difference["mean"], difference["low"], difference["high"]
    if low is None:
        return f"{mean:+.2f}, too few {difference['unit']}s for an interval"
    interval = f"{mean:+.2f}, 95% interval {low:+.2f} to {high:+.2f} over {difference['n']} {difference['unit']}s"
    if low <= 0 <= high:
        return f"{interval}: no change can be shown"
    words = info.better if (mean > 0) == (info.direction == "up") else info.worse
    return f"{interval}: {words}" if words else interval


def _argument(key: str, value: object) -> str:
    """Returns `key=value` as the shell and Hydra both take it."""
    plain = re.fullmatch(r"[\w ./:-]+", str(value)) is not None
    return shlex.quote(f"{key}={value}" if plain else f'{key}="{value}"')


def _is_number(value: float | None) -> bool:
    return value is not None and value == value


def _time(seconds: dict[str, float]) -> str:
    total = sum(seconds.values())
    parts = ", ".join(f"{part} {value:.0f} s" for part, value in seconds.items() if value >= 0.5)
    return f"{total // 60:.0f} min {total % 60:.0f} s: {parts}"


def score_table(scores: dict[str, Any]) -> str:
    """Returns the rows of scores.json as a text table with 95% intervals, reference rows below."""
    if scores["missing"]:
        return f"no scores: {scores['missing']}"
    keys = [info.key for info in METRICS if info.is_headline and any(_is_number(row.get(info.key)) for row in scores["rows"])]
    lines = [f"{'':30}" + "".join(f"{key.replace('_', ' '):>26}" for key in keys)]
    for row in scores["rows"]:
        lines.append(f"{row['arm'] + ' (step ' + str(row['step']) + ')':30}" + "".join(f"{_cell(row, key):>26}" for key in keys))
    for name, row in scores["references"].items():
        lines.append(f"{name.replace('_', ' '):30}" + "".join(f"{_cell(row, key):>26}" for key in keys))
    return "\n".join([*lines, scores["unit"]])


def _cell(row: dict[str, Any], key: str) -> str:
    if not _is_number(row.get(key)):
        return "-"
    interval = row.get(f"{key}_interval")
    return f"{row[key]:.3f}" + (f" ({interval['low']:.3f} to {interval['high']:.3f})" if interval and interval["low"] is not None else "")
