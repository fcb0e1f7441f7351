"""The end of a run in plain words: what was learned, what was lost, which step is the best, what to type next."""

from typing import Any

from dreambooth.runs import RunFolder


def summarize(run: RunFolder, scores: dict[str, Any], reason: str) -> str:
    """Returns the summary of a finished run.

    Args:
        run: its folder.
        scores: what scores.json holds.
        reason: why the best step was chosen, from the declared rule.
    """
    rows = {row["arm"]: row for row in scores["rows"]}
    lines = [
        f"\n{run.config.subject.identifier} {run.config.subject.class_noun}: {rows['best']['step']} of {run.config.trainer.max_steps} steps are the best"
    ]
    if scores["missing"]:
        lines += [f"  no scores: {scores['missing']}", "  the last step was kept as the best; look at the pictures"]
    else:
        lines += [f"  learned   {line}" for line in _learned(rows, scores)]
        lines += [f"  lost      {line}" for line in _lost(rows, scores)]
        lines += [f"  best step {reason}", f"  note      {scores['unit']}"]
    lines += [
        f"  pictures  {run.path / 'samples' / 'final_grid.png'}",
        f"  run       {run.path}",
        f"  time      {_time(run.record['seconds'])}",
        "next:",
        f'  python generate.py run={run.path} "prompt=a photo of a {{subject}} on the beach"     draw with it',
        f"  python evaluate.py run={run.path}     score it again, or on prompts of your own",
        f"  python -m dreambooth export {run.path} {'model/' if run.config.base.is_lab() else 'model.safetensors'}     the tuned model for other image tools",
    ]
    return "\n".join(lines)


def _time(seconds: dict[str, float]) -> str:
    total = sum(seconds.values())
    parts = ", ".join(f"{part} {value:.0f} s" for part, value in seconds.items() if value >= 0.5)
    return f"{total // 60:.0f} min {total % 60:.0f} s: {parts}"


def _learned(rows: dict[str, Any], scores: dict[str, Any]) -> list[str]:
    base, best = rows["base"]["identity_fidelity"], rows["best"]["identity_fidelity"]
    gain = _gain(scores, "identity_fidelity")
    line = f"identity fidelity {best:.2f} on new prompts, from {base:.2f} for the un-tuned base{gain}"
    references = scores["references"]
    mark = references.get("ground_truth", references["real_photos"])["identity_fidelity"]
    kind = "the subject truly rendered for these prompts" if "ground_truth" in references else "real photos with each other"
    share = f", {100 * (best - base) / (mark - base):.0f}% of the way" if mark > base else ""
    return [line, f"  ({kind}: {mark:.2f}{share})"]


def _lost(rows: dict[str, Any], scores: dict[str, Any]) -> list[str]:
    base, best = rows["base"], rows["best"]
    words = {
        "prompt_alignment": "prompt alignment",
        "drift": "drift of the class towards the subject",
        "diversity": "diversity of the subject's pictures",
        "class_diversity": "diversity of the class",
    }
    return [f"{name} {best[key]:.2f}, from {base[key]:.2f}{_gain(scores, key)}" for key, name in words.items()]


def _gain(scores: dict[str, Any], key: str) -> str:
    """Returns the paired difference of the best arm to the base with its interval, or nothing where there is none."""
    found = scores["differences"].get("best - base", {}).get(key)
    if not found:
        return ""
    if found["low"] is None:
        return f" (difference {found['mean']:+.2f}; too few {found['unit']}s for an interval)"
    return f" (difference {found['mean']:+.2f}, 95% interval {found['low']:+.2f} to {found['high']:+.2f} over {found['n']} {found['unit']}s)"


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
    if row.get(key) is None:
        return "-"
    interval = row.get(f"{key}_interval")
    return f"{row[key]:.3f}" + (f" ({interval['low']:.3f} to {interval['high']:.3f})" if interval and interval["low"] is not None else "")
