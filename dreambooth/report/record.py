"""What the runs of a study cost, which of them are in no figure, and what it takes to get the same numbers again: tables of a report."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from dreambooth.config import to_plain
from dreambooth.report.data import ScoredRun, Study
from dreambooth.report.tables import Table

NONE_WITHIN = "no step is within the limits"  # as `step_choice` begins its reason
COSTS: dict[str, Callable[[ScoredRun], float | None]] = {
    "learned parameters": lambda run: _learned(run)[0],
    "steps a second": lambda run: _steps(run) / _seconds(run)["training"] if _seconds(run).get("training") and _steps(run) else None,
    "training": lambda run: _seconds(run).get("training"),
    "whole run": lambda run: sum(_seconds(run).values()),
    "peak memory": lambda run: run.folder.record.get("peak_memory_bytes"),
    "peak GPU memory": lambda run: run.folder.record.get("peak_gpu_memory_bytes"),
    "file": lambda run: _learned(run)[1],
    "price": lambda run: None if run.config.price_per_hour is None else run.config.price_per_hour * sum(_seconds(run).values()) / 3600,
}
UNITS = {"training": "s", "whole run": "s", "peak memory": "bytes", "peak GPU memory": "bytes", "file": "bytes", "learned parameters": ""}


def cost_table(study: Study) -> Table:
    """Returns what each arm cost, means over its runs: what learned, steps a second, seconds, memory, the file, and money where a price is set."""
    models = study.models
    columns = {name: [_cost(runs, name) for runs in models.values()] for name in COSTS}
    shown = [name for name, cells in columns.items() if any(cell != "-" for cell in cells)]
    rows = [[arm, str(len(models[arm])), *(columns[name][k] for name in shown)] for k, arm in enumerate(models)]
    note = "Means over the runs of an arm; a run in the same process as others has the process's peak memory."
    note += " Of the training and the runs' own drawing: what drawing again took is not measured." if study.is_drawn_again else ""
    return Table("Costs", note, ["arm", "runs", *shown], rows)


def _cost(runs: Sequence[ScoredRun], name: str) -> str:
    values = [value for run in runs if (value := COSTS[name](run)) is not None]
    if not values:
        return "-"
    mean, unit = sum(values) / len(values), UNITS.get(name)
    if unit == "bytes":
        scale, word = next(pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if mean >= pair[0] or pair[0] == 1)
        return f"{mean / scale:.2f} {word}"
    return f"{mean:,.0f}" if unit == "" else f"{mean:.2f} {unit or ''}".strip()


def _seconds(run: ScoredRun) -> dict[str, float]:
    return run.folder.record.get("seconds", {})


def _steps(run: ScoredRun) -> int | None:
    return run.folder.record.get("steps")


def _learned(run: ScoredRun) -> tuple[int | None, int | None]:
    """Returns how many numbers were learned, and the bytes of the file that holds them."""
    from safetensors import SafetensorError, safe_open

    path = run.folder.path / "checkpoints" / "best.safetensors"
    if not path.is_file():
        return None, None
    try:
        with safe_open(path, "pt") as opened:
            count = sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())
    except SafetensorError:
        count = None
    return count, path.stat().st_size


def left_out_table(study: Study) -> Table | None:
    """Returns the runs that failed, were not finished or have no scores, and ways of drawing that lack some, with the reason; None without any."""
    if not study.left_out:
        return None
    words = {"failed": "failed", "running": "not finished", "done": "not scored"}
    rows = [
        [one.name, one.arm, one.subject, "" if one.seed is None else str(one.seed), words.get(one.status, one.status), one.reason]
        for one in study.left_out
    ]
    return Table("Failed and unfinished runs", "They are in no figure above.", ["run", "arm", "subject", "seed", "state", "reason"], rows)


def reproducibility(study: Study) -> Table:
    """Returns what it takes to get the same numbers again: code, inputs, evaluator, prompts, seeds, versions, hours."""
    models, configs = study.models, [run.config for run in study.runs]
    runs = [run for own in models.values() for run in own]
    records, first = [run.folder.record for run in runs], configs[0]
    versions = {f"{name} {version}" for record in records for name, version in record.get("versions", {}).items()}
    hours = sum(sum(record.get("seconds", {}).values()) for record in records) / 3600
    rule = first.evaluation
    base = "above, those of the run's own un-tuned base; where no step has both, the highest identity fidelity less the breach"
    limits = f"alignment at least {rule.min_alignment_ratio:g} times, drift at most {rule.max_drift_gain:g} {base}"
    entries = {
        "command": [study.header[word] for word in ("Command", *(["Then"] if study.is_drawn_again else [])) if word in study.header],
        "code": sorted({str(record.get("git_revision")) for record in records}),
        "base": [str(path) for path in dict.fromkeys(config.base.path for config in configs)],
        **{f"digest of {name.replace('_', ' ')}": _digests(records, name) for name in ("base", "photos", "class_images")},
        "evaluator": [str(study.runs[0].scores["evaluator"])],
        "selection prompts": [_prompts([config.evaluation.selection_prompts for config in configs])],
        "final prompts": [_prompts([config.evaluation.final_prompts for config in configs])],
        "the step is chosen by": [f"highest identity fidelity on the selection prompts with {limits}"],
        "chosen steps": [f"{arm}: {', '.join(str(run.folder.record.get('best_step')) for run in own)}" for arm, own in models.items()],
        "runs with a step within the limits": [f"{arm}: {runs - unmet} of {runs}" for arm, (unmet, runs) in unmet_limits(study).items()],
        "subjects": study.subjects,
        "training seeds": sorted({str(config.seed) for config in configs}),
        "evaluation seed": sorted({str(config.evaluation.seed) for config in configs}),
        "sampling": sorted({", ".join(f"{key} {value}" for key, value in to_plain(config.sampling).items()) for config in configs}),
        "versions": [", ".join(sorted(versions))] + sorted({f"Python {record.get('python')}" for record in records}),
        "run": [f"{min(r.get('started', '') for r in records)} to {max(r.get('finished', '') for r in records)}, {hours:.2f} hours of work in all"],
        "run folders": [run.folder.path.name for run in runs],
    }
    rows = [[key, "; ".join(values)] for key, values in entries.items() if values]
    return Table("To get the same numbers again", "", ["", ""], rows)


def unmet_limits(study: Study) -> dict[str, tuple[int, int]]:
    """Returns for each arm how many runs had no step within the limits of the choice, of how many that say why they chose theirs."""
    reasons = {arm: [str(reason) for run in runs if (reason := run.folder.record.get("best_step_reason"))] for arm, runs in study.models.items()}
    return {arm: (sum(reason.startswith(NONE_WITHIN) for reason in said), len(said)) for arm, said in reasons.items() if said}


def _digests(records: Sequence[dict[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(record["digests"][name][:16] for record in records if record["digests"].get(name)))


def _prompts(lists: Sequence[Sequence[str] | None]) -> str:
    texts = list(dict.fromkeys(text for prompts in lists for text in prompts or []))
    shown = ", ".join(f'"{text}"' for text in texts[:8]) + (f" and {len(texts) - 8} more" if len(texts) > 8 else "")
    return f"{shown} (SHA-256 {hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]})"
