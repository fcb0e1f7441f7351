"""What `evaluate.py` is asked for: which runs, on which prompts and settings, and under which names the answers are written."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dreambooth.config import Config, EvaluateConfig, to_plain
from dreambooth.dreambench import read_dreambench
from dreambooth.errors import UserError
from dreambooth.final_scores import ARMS, subject_label
from dreambooth.recipes import require_held_out
from dreambooth.runs import RunFolder, read_run


class Rescoring(NamedTuple):
    """One run and how it is to be scored."""

    run: RunFolder
    config: Config  # the run's, with what is asked for in its place
    suffix: str  # of the names of what is written; "" where it is the run's own evaluation
    pictures: str  # of the folder of the pictures, which do not depend on the encoders and arms


def find_runs(runs: str | Sequence[str]) -> tuple[list[RunFolder], list[str]]:
    """Returns the finished runs of a list of run folders, or of the folder of a group, and a sentence for each that is not finished.

    Raises:
        UserError: a folder of the list is no run, or none is finished.
    """
    paths = [Path(path) for path in ([runs] if isinstance(runs, str) else runs)]
    if isinstance(runs, str) and paths[0].is_dir() and not (paths[0] / "run.json").is_file():
        paths = sorted(path.parent for path in paths[0].glob("*/run.json"))
    found = [read_run(path) for path in dict.fromkeys(paths)]
    left_out = [
        f"{run.path} is {run.status!r}" + (f": {run.record['error']}" if run.record.get("error") else "") for run in found if run.status != "done"
    ]
    done = [run for run in found if run.status == "done"]
    if not done:
        got = "; ".join(left_out) or (runs if isinstance(runs, str) else list(runs))
        raise UserError("runs", "must hold a finished run", got, "train first, or give the folder that holds the run folders: runs=runs/default")
    return done, left_out


def rescoring(run: RunFolder, settings: EvaluateConfig) -> Rescoring:
    """Returns how a run is to be scored.

    Raises:
        UserError: prompts that chose the run's step, or a DreamBench folder without the run's subject.
    """
    own, changed = run.config, settings.applied_to(run.config)
    own.trainer.accelerator = changed.trainer.accelerator
    if settings.data.dreambench is not None:
        changed.evaluation.final_prompts = list(_dreambench_prompts(run, changed, settings.data.dreambench))
    if changed.evaluation.final_prompts != own.evaluation.final_prompts:
        require_held_out(changed, "prompts" if settings.prompts is not None else "data.dreambench")
    drawing = [to_plain(changed.evaluation), to_plain(changed.sampling)]
    pictures = "" if drawing == [to_plain(own.evaluation), to_plain(own.sampling)] else _suffix(drawing)
    scoring = [to_plain(changed.encoders), [arm for arm in ARMS if arm in settings.arms or arm == "base"]]
    return Rescoring(run, changed, pictures if scoring == [to_plain(own.encoders), list(ARMS)] else _suffix([*drawing, *scoring]), pictures)


def output_folder(rescorings: Sequence[Rescoring], output: str | None) -> Path:
    """Returns where the table of many runs goes: as asked, or `combined` beside them, with the suffix of what is not their own evaluation."""
    if output is not None:
        return Path(output)
    parents = {one.run.path.resolve().parent for one in rescorings}
    if len(parents) > 1:
        raise UserError("output", "must be set when the runs lie in several folders", None, "write output=runs/comparison")
    suffixes = sorted({one.suffix for one in rescorings})
    return rescorings[0].run.path.parent / f"combined{suffixes[0] if len(suffixes) == 1 else _suffix(suffixes)}"


def _dreambench_prompts(run: RunFolder, config: Config, folder: str) -> tuple[str, ...]:
    """Returns the DreamBench prompts of a run's subject, found by its name, else by the photos that it was trained on."""
    bench = read_dreambench(folder)
    if config.subject.name in [subject.name for subject in bench.subjects] + list(bench.absent):
        return bench.prompts(bench.subject(config.subject.name, f"{run.path}: subject.name"))
    subject = bench.with_photos(run.record["digests"]["photos"], config.data.resolution)
    if subject is None:
        raise UserError(
            str(run.path),
            f"must be of a subject of {folder}",
            subject_label(run, config),
            "give prompts=[...] instead",
        )
    return bench.prompts(subject)


def _reason(error: str | None) -> str:
    return f": {error}" if error else ""


def _suffix(plan: object) -> str:
    return "-" + hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:8]
