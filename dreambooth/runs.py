"""The run folder: created, continued, skipped or refused; `run.json`; a trained model loaded back from it.

run.json       plain config, status, error, digests of the inputs, versions, seconds by part, peak memory
photos/        the subject's photos as they were prepared
checkpoints/   last.ckpt (to continue), best.safetensors and final.safetensors (the learned tensors, self-describing)
metrics.csv    losses and scores by step (`metrics_csv`)
samples/       pictures of each evaluation, grids
scores.json, scores.parquet
"""

import json
import platform
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dreambooth.adapters.methods import load_trainable_state, trainable_state
from dreambooth.base.protocol import BaseModel
from dreambooth.claims import Claim, held, is_claim
from dreambooth.config import Config, fingerprint, from_plain, to_plain
from dreambooth.errors import UserError
from dreambooth.files import write_json, write_tensors

PACKAGES = ("torch", "pytorch-lightning", "diffusers", "transformers", "hydra-core", "torchmetrics", "numpy")


class RunFolder:
    """One run on disk. Everything that a run knows about itself is in `record`, which is `run.json`.

    Attributes:
        claim: that of this process on the folder, while it works in it; None for a run that is only looked at.
    """

    def __init__(self, path: Path, record: dict[str, Any], claim: Claim | None = None) -> None:
        self.path, self.record, self.claim = path, record, claim
        self._parts: list[str] = []  # clocks that run, outermost first; time goes to the innermost
        self._counted = 0.0  # up to when it has been given out

    @property
    def status(self) -> str:
        """ "running" (or cut off), "done" or "failed"."""
        return self.record["status"]

    @property
    def config(self) -> Config:
        """The typed, resolved config."""
        return from_plain(self.record["config"], str(self.path / "run.json"))

    @property
    def resume_state(self) -> Path | None:
        """The state to continue from, if the run got as far as one."""
        path = self.path / "checkpoints" / "last.ckpt"
        return path if path.is_file() else None

    def update(self, **fields: Any) -> None:
        """Writes fields into run.json, with the seconds until now.

        Raises:
            ClaimLost: the folder is another process's by now; nothing is written.
        """
        self.confirm()
        self._count()
        self.record |= fields
        write_json(self.path / "run.json", self.record)

    def confirm(self) -> None:
        """Makes sure, before something is written, that the folder is still this process's own.

        Raises:
            ClaimLost: it is not.
        """
        if self.claim is not None:
            self.claim.confirm()

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Adds the seconds spent inside to `seconds.<part>`, and none of them to the part around it; kept at the next `update`."""
        self._count()
        self._parts.append(part)
        try:
            yield
        finally:
            self._count()
            self._parts.pop()

    def _count(self) -> None:
        now = time.perf_counter()
        if self._parts:
            seconds = self.record.setdefault("seconds", {})
            seconds[self._parts[-1]] = round(seconds.get(self._parts[-1], 0.0) + now - self._counted, 4)
        self._counted = now

    def finish(self, status: str, error: str | None = None, **fields: Any) -> None:
        """Closes the run as "done" or "failed" with the reason."""
        peak = {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        if torch.cuda.is_available():
            peak["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
        self.update(status=status, error=error, finished=_now(), **peak, **fields)


def run_path(config: Config, **digests: str) -> Path:
    """Returns where the run of a resolved config lies: equal configs with equal inputs share a folder; see `open_run`."""
    name = f"{config.method.name}-{config.subject.class_noun.replace(' ', '_')}-{fingerprint(to_plain(config), **digests)}"
    return Path(config.output_dir) / config.group / name


@contextmanager
def claimed_run(config: Config, **digests: str) -> Iterator[RunFolder]:
    """Gives the folder of a resolved config to this process alone, as `open_run` does; one that is done is given as it is, to be looked at.

    Raises:
        Busy: a living process works in it; nothing was touched.
        UserError: as `open_run`.
    """
    path = run_path(config, **digests)
    if (path / "run.json").is_file() and read_run(path).status == "done":
        yield open_run(config, **digests)
        return
    with held(path) as claim:
        run = open_run(config, **digests)  # perhaps done by now: by the process that held it until a moment ago
        run.claim = claim
        try:
            yield run
        finally:
            run.claim = None


def open_run(config: Config, **digests: str) -> RunFolder:
    """Returns the folder of a resolved config: a new one, or the one that the same command made before.

    Args:
        config: resolved.
        digests: content hashes of the inputs that the config points at (base, photos, class images).

    Raises:
        UserError: the folder holds another config, or something that is no run.
    """
    plain, path = to_plain(config), run_path(config, **digests)
    name = path.name
    if path.exists() and any(not (is_claim(entry.name) or entry.name.startswith(".") and entry.name.endswith(".tmp")) for entry in path.iterdir()):
        run = read_run(path)
        if run.record["fingerprint"] != name[-8:] or fingerprint(run.record["config"], **run.record["digests"]) != name[-8:]:
            raise UserError(str(path), "holds a run with another config", None, "move it away or change output_dir")
        if run.status != "done":
            run.update(status="running", error=None, resumed=run.record.get("resumed", 0) + 1)
        return run
    run = RunFolder(
        path,
        {
            "format": 1,
            "status": "running",
            "error": None,
            "fingerprint": name[-8:],
            "started": _now(),
            "config": plain,
            "digests": digests,
            "git_revision": git_revision(),
            "python": platform.python_version(),
            "versions": installed_versions(),
            "seconds": {},
        },
    )
    run.update()
    return run


def read_run(path: str | Path) -> RunFolder:
    """Returns the run in a folder.

    Raises:
        UserError: the folder is missing or is no run folder.
    """
    path = Path(path)
    try:
        record = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            str(path), "must be a run folder (with a run.json)", None, "give a folder that train.py made, as runs/default/full-dog-1a2b3c4d"
        ) from None
    except ValueError as error:
        raise UserError(str(path / "run.json"), f"must be JSON: {error}", None, "restore it, or move the folder away and train again") from None
    if not isinstance(record, dict) or not {"status", "config", "digests", "fingerprint"} <= record.keys():
        raise UserError(str(path / "run.json"), "must be the record of a run", None, "restore it, or move the folder away and train again")
    return RunFolder(path, record)


def save_weights(run: RunFolder, name: str, base: BaseModel, step: int) -> Path:
    """Writes the learned tensors as `checkpoints/<name>.safetensors`, with the plain config and the step in its metadata.

    Raises:
        ClaimLost: the folder is another process's by now; nothing is written.
    """
    run.confirm()
    averaged = run.record["config"].get("trainer", {}).get("ema_decay") is not None
    about = {"step": step, "averaged": averaged, "base_digest": run.record["digests"].get("base"), "config": run.record["config"]}
    metadata = {"dreambooth": json.dumps(about, sort_keys=True)}  # one key: safetensors writes several in any order
    return write_tensors(run.path / "checkpoints" / f"{name}.safetensors", trainable_state(base), metadata)


class Trained(NamedTuple):
    """A model loaded from a run folder: `step` 0 is the un-tuned base."""

    base: BaseModel
    config: Config
    step: int


def load(path: str | Path, weights: str = "best") -> Trained:
    """Returns a run's model, live, with the method attached (so that other weights of the run can be written into it).

    Args:
        path: the run folder.
        weights: "best", "final", or "base" for the un-tuned model.

    Raises:
        UserError: no such run, no such weights, or a base whose content has changed since.
    """
    run = read_run(path)
    config = run.config
    if config.base.digest() != run.record["digests"]["base"]:
        raise UserError(
            str(run.path), "was trained on another base than the one now at base.path", config.base.path, "put the old base back, or train again"
        )
    base = config.base.load()
    config.objective.prepare(base)
    config.method.attach(base, config.identifiers, config.subject.class_noun, config.seed)
    return Trained(base, config, 0 if weights == "base" else load_weights(run, weights, base))


def load_weights(run: RunFolder, name: str, base: BaseModel) -> int:
    """Writes the tensors of `checkpoints/<name>.safetensors` into an attached base; returns the step they were taken at."""
    from safetensors import SafetensorError, safe_open

    path = run.path / "checkpoints" / f"{name}.safetensors"
    if not path.is_file():
        raise UserError(
            str(path), "does not exist", None, f"the run is {run.status!r}; finish it by the same train.py command, or ask for other weights"
        )
    try:
        with safe_open(path, "pt") as opened:
            state = {key: opened.get_tensor(key) for key in opened.keys()}
            step = int(json.loads(opened.metadata()["dreambooth"])["step"])
    except SafetensorError as error:
        raise UserError(str(path), f"must be a whole safetensors file: {error}", None, "train again, or take the other weights") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(str(path), "must be weights that a run wrote", None, "train again, or take the other weights") from None
    load_trainable_state(base, state, str(path))
    return step


def git_revision() -> str | None:
    """Returns the commit of the code, with "+changes" when files differ from it; None outside a git checkout."""
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=here, capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if changed else "")


def installed_versions() -> dict[str, str]:
    """Returns the versions of the packages that a result can depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
