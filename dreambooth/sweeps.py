"""A sweep as a whole: what became of each of its jobs, and how long the rest will take, whichever launcher runs them.

While a sweep lasts, a folder `<output_dir>/.sweeps/<time>-<pid>` holds a file a job: other processes and machines write there what they
did, and the process that was started by hand shows it at the end. The runs themselves know nothing of it, and no job needs it: without the
folder there is no table, and that is all.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from dreambooth.claims import holder
from dreambooth.files import write_json
from dreambooth.metrics_csv import MetricsFile
from dreambooth.runs import RunFolder

FOLDER = "DREAMBOOTH_SWEEP"  # environment variable: the folder of the sweep under way; the processes of its jobs inherit it
STATES = ("done before", "done", "left out", "failed", "cut off", "elsewhere")
HERE = ("BasicLauncher", "JoblibLauncher")  # their jobs end with the process that launched them; a cluster's go on
STALE_S = 14 * 86400.0  # after so long without a word from a job, the folder of a sweep is removed by the next sweep
NEEDS_BYTES = 2e9  # of memory a job, as long as no run of the group has told
WORST_SCORE = -1.0  # of a cosine


class Job(NamedTuple):
    """What became of one job so far."""

    number: int  # from 1
    words: str  # its settings on the command line
    state: str  # one of STATES
    run: str | None = None  # its folder, as soon as that is known
    note: str | None = None  # the first line of the error; who does it, for "elsewhere"
    overrides: Sequence[str] = ()  # all that its launcher was given for it


class Plan(NamedTuple):
    """What a sweep goes over."""

    jobs: int | None  # None when its sweeper does not say
    varies: list[str]  # the settings that differ from job to job


_opened: Path | None = None  # the folder of the sweep that this process started
_ends_here = True  # whether none of its jobs can outlive this process


class SweepStart(Callback):
    """Hydra's callback, named in conf/train.yaml: opens the folder of a sweep before its launcher starts, and goes back to some jobs at its end."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Notes how many jobs there are, and has joblib run as many at once as fit."""
        global _opened, _ends_here
        sweeps = Path(str(OmegaConf.select(config, "hydra.sweep.dir"))).absolute()
        remove_stale(sweeps)
        _opened, plan = sweeps / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}", read_plan(config)
        _ends_here = str(config.hydra.launcher.get("_target_")).endswith(HERE)
        write_json(_opened / "sweep.json", plan._asdict())
        os.environ[FOLDER] = str(_opened)
        if config.hydra.launcher.get("n_jobs") == -1:
            fit = jobs_that_fit(Path(config.output_dir) / config.group)
            with read_write(config), open_dict(config):
                config.hydra.launcher.n_jobs = min(fit, plan.jobs or fit)
            print(f"{config.hydra.launcher.n_jobs} jobs at once, as many as fit (hydra.launcher.n_jobs)")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Does what was another process's when its turn came and is nobody's now; a sweeper that searches was told of such jobs already."""
        if task is not None and str(config.hydra.sweeper.get("_target_")).endswith("BasicSweeper"):
            go_back(lambda job: _launch(job, config))


task: Callable[[DictConfig], Any] | None = None  # what Hydra runs for each job; told by the script


def go_back(launch: Callable[[Job], None]) -> None:
    """Launches, one after the other, the jobs that were done elsewhere and whose folder no living process holds any more.

    Args:
        launch: runs a job to its end.
    """
    tried: set[Job] = set()  # as they were found: one that is found the same again would be so for ever
    while free := [job for job in jobs_so_far() if job.state == "elsewhere" and job not in tried and holder(Path(str(job.run))) is None]:
        for job in free:
            tried.add(job)
            print(f"\nback to job {job.number}: {job.note} is done with it, or dead")
            launch(job)


def _launch(job: Job, config: DictConfig) -> None:
    context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks(config))
    launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)
    launcher.launch([list(job.overrides)], initial_job_idx=job.number - 1)


def remove_stale(sweeps: Path) -> None:
    """Removes the folders of sweeps, in the folder of them all, of whose jobs nothing was heard for `STALE_S`."""
    for plan in sweeps.glob("*/sweep.json"):
        with suppress(OSError):  # another process removes it too
            if time.time() - plan.parent.stat().st_mtime > STALE_S:
                shutil.rmtree(plan.parent, ignore_errors=True)


def read_plan(config: DictConfig) -> Plan:
    """Returns what a sweep goes over, from Hydra's whole config."""
    sweeper = config.hydra.sweeper
    words = [f"{key}={values}" for key, values in (sweeper.get("params") or {}).items()] + list(config.hydra.overrides.task)
    overrides = {o.get_key_element(): o for o in OverridesParser.create().parse_overrides(words)}  # of one key the last word counts
    swept = {key: o for key, o in overrides.items() if o.is_sweep_override()}
    if "n_trials" in sweeper:
        return Plan(sweeper.n_trials, list(swept))
    try:
        counts = {key: len(list(o.sweep_string_iterator())) for key, o in swept.items()}
    except (HydraException, AttributeError):  # a glob, an interval
        return Plan(None, list(swept))
    return Plan(math.prod(counts.values()), [key for key, count in counts.items() if count > 1])


def jobs_that_fit(group: Path) -> int:
    """Returns how many jobs this machine can run at once: by its cores, its free memory and the runs of the group so far; 1 with a GPU."""
    import torch

    if torch.cuda.is_available():
        return 1  # processes that share a GPU only slow each other down
    needed = max((record.get("peak_memory_bytes", 0) for record in finished(group)), default=0) or NEEDS_BYTES
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(_free_bytes() // needed)))


def _free_bytes() -> float:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")


def finished(group: Path) -> list[dict[str, Any]]:
    """Returns the records of the finished runs in a group's folder."""
    records = []
    for path in group.glob("*/run.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("status") == "done":
            records.append(record)
    return records


def seconds_left(group: Path, done: Sequence[dict[str, Any]], jobs: int) -> float | None:
    """Returns the seconds that so many jobs will take: each as long as the finished ones of the group on average, shared by all who work in it.

    Args:
        group: the folder of the runs.
        done: the records of those that are finished.
        jobs: still to be done, the one that begins now included.
    """
    seconds = [sum(record.get("seconds", {}).values()) for record in done]
    if not seconds or not jobs:
        return None
    others = sum(holder(path.parent) is not None for path in group.glob("*/run.json"))
    return jobs * sum(seconds) / len(seconds) / min(1 + others, jobs)


def time_left(group: Path, jobs: int, met: int) -> str:
    """Returns the end of a line that says how long so many jobs will take; "" as long as no run of the group has told.

    Args:
        group: the folder of the runs.
        jobs: that the sweep has yet to come to, the one that begins now included.
        met: finished runs that it came to. Where the group has more, jobs to come may be done already.
    """
    done = finished(group)
    seconds = seconds_left(group, done, jobs)
    if seconds is None:
        return ""
    return f"; {'at most' if len(done) > met else 'about'} {in_words(seconds)} left"


_present: Job | None = None  # the job that this process is at, where somebody wants to know


def begin(output_dir: str, group: str) -> None:
    """Takes up the job that Hydra just started, and says how far the sweep is; says nothing of a sweep of one.

    Args:
        output_dir, group: of its config.
    """
    global _present
    hydra = HydraConfig.get()
    number = hydra.job.num + 1
    if (plan := _plan()) is None:  # no sweep of train.py, or one whose launcher is gone
        _present = None
        print(f"\njob {number}: {hydra.job.override_dirname}")
        return
    seen, given = jobs_so_far(), tuple(hydra.overrides.task)
    words = [word for word in given if word.split("=")[0].lstrip("+") in plan.varies]
    _present, total = Job(number, " ".join(words or given), "cut off", overrides=given), plan.jobs
    if total != 1:
        states = [other.state for other in seen]
        before = states.count("done before")
        met = before + states.count("done")
        closed = met + states.count("left out") + states.count("failed")
        left = time_left(Path(output_dir) / group, total - closed, met) if total else ""
        place = f"job {number}" + (f" of {total}" if total else "") + (f" ({before} done before)" if before else "")
        print(f"\n{place}: {_present.words}{left}")
    _write(_present)


def working_in(run: Path, done_before: bool) -> None:
    """Notes the run folder of the present job, and whether nothing is left to do."""
    global _present
    if _present is not None:
        _present = _present._replace(run=str(run), state="done before" if done_before else "cut off")
        _write(_present)


def end(state: str, note: str | None = None, run: Path | None = None) -> None:
    """Closes the present job.

    Args:
        state: one of `STATES`; "done" leaves "done before" as it is.
        note: why it failed, or who does it.
        run: its folder, where `working_in` was not told.
    """
    global _present
    if _present is not None:
        state = _present.state if (state, _present.state) == ("done", "done before") else state
        _write(_present._replace(state=state, note=note and (note.splitlines() or [""])[0], run=str(run) if run else _present.run))
    _present = None


def _write(job: Job) -> None:
    if _plan() is not None:
        with suppress(OSError):  # the table is no reason to stop a job
            write_json(Path(os.environ[FOLDER]) / f"{job.number}.json", job._asdict())


def jobs_so_far() -> list[Job]:
    """Returns what is known of the jobs of the sweep under way, in order."""
    if FOLDER not in os.environ:
        return []
    found = [_read(path) for path in Path(os.environ[FOLDER]).glob("[0-9]*.json")]
    jobs = [Job(**fields | {"overrides": tuple(fields.get("overrides", ()))}) for fields in found if fields is not None]
    return sorted(jobs, key=lambda job: job.number)


def _plan() -> Plan | None:
    """Returns the plan of the sweep that this process is part of; None when there is none, or its folder was removed."""
    fields = _read(Path(os.environ[FOLDER]) / "sweep.json") if FOLDER in os.environ else None
    return Plan(**fields) if fields is not None else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def close() -> set[str]:
    """Shows what became of the sweep that this process started, if it started one; returns the states of its jobs.

    Its folder is removed when every job is closed. Jobs that a cluster has yet to run keep it, for `remove_stale`.
    """
    global _opened
    if _opened is None:
        return set()
    jobs, plan = jobs_so_far(), _plan()
    folder, _opened = _opened, None
    os.environ.pop(FOLDER, None)
    if plan is None:
        return {job.state for job in jobs}
    is_closed = len(jobs) >= (plan.jobs or 1) and all(job.state != "cut off" for job in jobs)
    if _ends_here or is_closed:
        shutil.rmtree(folder, ignore_errors=True)
    if jobs and plan.jobs != 1:
        print(table(jobs, plan.jobs))
        if not (_ends_here or is_closed):
            print("what is cut off or not begun may still run or wait on the cluster; run the same command again for what is not done by then")
    return {job.state for job in jobs}


def table(jobs: list[Job], total: int | None) -> str:
    """Returns the end of a sweep as text: how many of each, a line a job, what to do about those that are done elsewhere."""
    counts = [f"{sum(job.state == state for job in jobs)} {state}" for state in STATES if any(job.state == state for job in jobs)]
    missing = (total or len(jobs)) - len(jobs)
    lines = ["", f"sweep of {total or len(jobs)} jobs: " + ", ".join(counts + ([f"{missing} not begun"] if missing else []))]
    width = max(len(job.run or "-") for job in jobs)
    for job in jobs:
        lines.append(f"  {job.number:3}  {job.state:11}  {job.run or '-':{width}}  {job.words}" + (f": {job.note}" if job.state == "failed" else ""))
    elsewhere = [f"{job.run} by {job.note}" for job in jobs if job.state == "elsewhere"]
    if elsewhere:
        lines.append(f"being done elsewhere: {'; '.join(elsewhere)}; run the same command again to see them")
    return "\n".join(lines)


def in_words(seconds: float) -> str:
    """Returns a time as a person says it: 40 s, 23 min, 3.2 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def selection_score(run: RunFolder) -> float:
    """Returns what a searching sweeper maximises: the identity fidelity of the chosen step on the selection prompts, in [-1, 1].

    A run without one (no encoders, not a number) counts as the worst there is, like a job that failed, so that a search goes on.
    """
    rows = [row for row in MetricsFile(run.path / "metrics.csv").read() if row["step"] == str(run.record.get("best_step"))]
    found = next((float(row["score/identity_fidelity"]) for row in rows if row.get("score/identity_fidelity")), float("nan"))
    return found if found == found else WORST_SCORE
