"""The end of a run in plain words: what was learned, what was lost, which step is the best, what to type next."""

import re
import shlex
from typing import Any

from dreambooth.runs import RunFolder

MEASURES = (  # key of the scores, its name in the summary, whether up is good, words for a change to the better and to the worse
    ("identity_fidelity", "identity fidelity", True, "the subject was learned", "further from the subject than the un-tuned base"),
    ("prompt_alignment", "prompt alignment", True, "prompts are followed better", "prompts are followed less"),
    ("drift", "drift of the class", False, "the class moved away from the subject", "the class moved towards the subject"),
    ("diversity", "diversity of the subject", True, "", ""),
    ("class_diversity", "diversity of the class", True, "", ""),
)


def summarize(run: RunFolder, scores: dict[str, Any], reason: str) -> str:
    """Returns the summary of a finished run.

    Args:
        run: its folder.
        scores: what scores.json holds.
        reason: why the best step was chosen, from the declared rule.
    """
    config, rows = run.config, {row["arm"]: row for row in scores["rows"]}
    lines = ["", f"{config.subject.in_prompt('{subject}')}: step {rows['best']['step']} of {config.trainer.max_steps} is the best", f"  {reason}"]
    if scores["missing"]:
        lines += ["what was learned and lost is not measured", f"  {scores['missing']}"]
    else:
        lines += ["what was learned (on prompts that chose nothing; step 0 is the un-tuned base)", *_measured(MEASURES[:1], rows, scores)]
        lines += ["what was lost", *_measured(MEASURES[1:], rows, scores), f"  {scores['unit']}"]
    prompt = config.subject.in_prompt("a photo of a {subject} on the beach")
    model = "model/" if config.base.is_lab() else "model.safetensors"
    return "\n".join(
        [
            *lines,
            "where it is",
            f"  look at  {run.path / 'samples' / 'final_grid.png'}",
            f"  time     {_time(run.record['seconds'])}",
            "what to type next",
            f"  python generate.py {_argument('run', run.path)} {_argument('prompt', prompt)}",
            f"  python evaluate.py {_argument('run', run.path)}",
            f"  python -m dreambooth export {shlex.quote(str(run.path))} {model}",
        ]
    )


def _measured(measures: tuple[tuple[str, str, bool, str, str], ...], rows: dict[str, Any], scores: dict[str, Any]) -> list[str]:
    """Returns a line a measure: before and after, the difference with its interval in words, the mark to read it against."""
    base, best, references = rows["base"], rows["best"], scores["references"]
    mark_name = "true renders" if "ground_truth" in references else "real photos"
    marks = references.get("ground_truth", references["real_photos"])
    lines = []
    for key, name, up_is_good, better, worse in measures:
        if not _is_number(best.get(key)) or not _is_number(base.get(key)):
            continue
        line = f"  {name:25}{base[key]:6.2f} -> {best[key]:5.2f}"
        line += f"   ({mark_name} {marks[key]:.2f})" if _is_number(marks.get(key)) else ""
        difference = scores["differences"].get("best - base", {}).get(key)
        lines.append(line + (f"   {_in_words(difference, up_is_good, better, worse)}" if difference else ""))
    return lines


def _in_words(difference: dict[str, Any], up_is_good: bool, better: str, worse: str) -> str:
    mean, low, high = difference["mean"], difference["low"], difference["high"]
    if low is None:
        return f"{mean:+.2f}, too few {difference['unit']}s for an interval"
    interval = f"{mean:+.2f}, 95% interval {low:+.2f} to {high:+.2f} over {difference['n']} {difference['unit']}s"
    if low <= 0 <= high:
        return f"{interval}: no change can be shown"
    return f"{interval}: {better if (mean > 0) == up_is_good else worse}"


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
    keys = ("identity_fidelity", "prompt_alignment", "drift", "diversity", "class_diversity")
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
