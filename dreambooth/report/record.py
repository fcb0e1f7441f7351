"""What the runs of a study cost, which of them are in no figure, and what it takes to get the same numbers again: tables of a report."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from dreambooth.config import to_plain
from dreambooth.report.data import ScoredRun, Study
from dreambooth.report.tables import Table


def cost_table(study: Study) -> Table:
    """Returns what each arm cost: mean over its runs of seconds, memory, size of the learned tensors, and money where a price is set."""
    rows = []
    for arm in study.arms:
        runs = study.of_arm(arm)
        parts = [run.folder.record.get("seconds", {}) for run in runs]
        total = [sum(part.values()) for part in parts]
        prices = [run.config.price_per_hour * s / 3600 for run, s in zip(runs, total, strict=True) if run.config.price_per_hour is not None]
        rows.append(
            [
                arm,
                str(len(runs)),
                _mean([part.get("training") for part in parts], 1, "s"),
                _mean(total, 1, "s"),
                _mean([run.folder.record.get("peak_memory_bytes") for run in runs], 1e9, "GB"),
                _mean([run.folder.record.get("peak_gpu_memory_bytes") for run in runs], 1e9, "GB"),
                _mean([_weights_bytes(run) for run in runs], 1e6, "MB"),
                _mean(prices, 1, ""),
            ]
        )
    header = ["arm", "runs", "training", "whole run", "peak memory", "peak GPU memory", "learned tensors", "price"]
    return Table("Costs", "Means over the runs of an arm; a run in the same process as others has the process's peak memory.", header, rows)


def left_out_table(study: Study) -> Table | None:
    """Returns the runs that failed, were not finished or have no scores, with the reason; None where there are none."""
    if not study.left_out:
        return None
    words = {"failed": "failed", "running": "not finished", "done": "not scored"}
    rows = [[one.name, one.arm, one.subject, str(one.seed), words.get(one.status, one.status), one.reason] for one in study.left_out]
    return Table("Failed and unfinished runs", "They are in no figure above.", ["run", "arm", "subject", "seed", "state", "reason"], rows)


def reproducibility(study: Study) -> Table:
    """Returns what it takes to get the same numbers again: code, inputs, evaluator, prompts, seeds, versions, hours."""
    records, configs = [run.folder.record for run in study.runs], [run.config for run in study.runs]
    first = configs[0]
    versions = {f"{name} {version}" for record in records for name, version in record.get("versions", {}).items()}
    hours = sum(sum(record.get("seconds", {}).values()) for record in records) / 3600
    rule = first.evaluation
    limits = f"alignment at least {rule.min_alignment_ratio:g} times, drift at most {rule.max_drift_gain:g} above the un-tuned base's"
    entries = {
        "command": [study.header["Command"]] if "Command" in study.header else [],
        "code": sorted({str(record.get("git_revision")) for record in records}),
        "base": [str(path) for path in dict.fromkeys(config.base.path for config in configs)],
        **{f"digest of {name.replace('_', ' ')}": _digests(records, name) for name in ("base", "photos", "class_images")},
        "evaluator": [str(study.runs[0].scores["evaluator"])],
        "selection prompts": [_prompts([config.evaluation.selection_prompts for config in configs])],
        "final prompts": [_prompts([config.evaluation.final_prompts for config in configs])],
        "the step is chosen by": [f"highest identity fidelity on the selection prompts with {limits}"],
        "chosen steps": [f"{arm}: {', '.join(str(run.folder.record.get('best_step')) for run in study.of_arm(arm))}" for arm in study.arms],
        "subjects": study.subjects,
        "training seeds": sorted({str(config.seed) for config in configs}),
        "evaluation seed": sorted({str(config.evaluation.seed) for config in configs}),
        "sampling": sorted({", ".join(f"{key} {value}" for key, value in to_plain(config.sampling).items()) for config in configs}),
        "versions": [", ".join(sorted(versions))] + sorted({f"Python {record.get('python')}" for record in records}),
        "run": [f"{min(r.get('started', '') for r in records)} to {max(r.get('finished', '') for r in records)}, {hours:.2f} hours of work in all"],
        "run folders": [run.folder.path.name for run in study.runs],
    }
    rows = [[key, "; ".join(values)] for key, values in entries.items() if values]
    return Table("To get the same numbers again", "", ["", ""], rows)


def _mean(values: Sequence[float | None], unit: float, word: str) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known) / unit:.2f} {word}".strip() if known else "-"


def _weights_bytes(run: ScoredRun) -> int | None:
    path = run.folder.path / "checkpoints" / "best.safetensors"
    return path.stat().st_size if path.is_file() else None


def _digests(records: Sequence[dict[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(record["digests"][name][:16] for record in records if record["digests"].get(name)))


def _prompts(lists: Sequence[Sequence[str] | None]) -> str:
    texts = list(dict.fromkeys(text for prompts in lists for text in prompts or []))
    shown = ", ".join(f'"{text}"' for text in texts[:8]) + (f" and {len(texts) - 8} more" if len(texts) > 8 else "")
    return f"{shown} (SHA-256 {hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]})"
