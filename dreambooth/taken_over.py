"""A run that another experiment has done already is taken from there: ablations share their baseline, and it is trained once."""

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from dreambooth.config import Config, fingerprint
from dreambooth.errors import UserError
from dreambooth.files import write_json
from dreambooth.runs import RunFolder, read_run, run_path

NOT_TAKEN = ("wandb", "run.json")  # a mirror is of one group; the record is written anew


def take_over(config: Config, **digests: str) -> Path | None:
    """Puts a finished run of equal settings and inputs, from another group of the output folder, into this run's own place.

    Files are shared by hard links where the disk can (they are replaced, never written into, so each group keeps its own); the folder
    appears whole or not at all. Its run.json names the group and, in `taken_from`, where it was trained.

    Args:
        config: resolved.
        digests: content hashes of its inputs; see `open_run`.

    Returns:
        The folder that it came from; None if there is none, or if the run's own folder is there already.
    """
    path = run_path(config, **digests)
    if path.exists():
        return None
    found = next((run for place in sorted(Path(config.output_dir).glob(f"*/{path.name}")) if (run := _finished(place)) is not None), None)
    if found is None:
        return None
    temporary = Path(config.output_dir) / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        shutil.copytree(found.path, temporary, copy_function=_link, ignore=shutil.ignore_patterns(*NOT_TAKEN, ".*"))
        write_json(temporary / "run.json", _renamed(found, config))
        path.parent.mkdir(parents=True, exist_ok=True)
        os.rename(temporary, path)  # refused if another process has made the folder meanwhile
    except OSError:
        if not path.exists():
            raise
        return None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return found.path


def _finished(place: Path) -> RunFolder | None:
    try:
        run = read_run(place)
    except UserError:
        return None
    same = fingerprint(run.record["config"], **run.record["digests"]) == place.name[-8:]
    return run if same and run.status == "done" else None


def _renamed(found: RunFolder, config: Config) -> dict[str, Any]:
    own = found.record["config"] | {"group": config.group, "output_dir": config.output_dir}
    origin = found.record.get("taken_from", f"{found.path.parent.name}/{found.path.name}")  # where it was trained, even if that is gone by now
    return found.record | {"config": own, "taken_from": origin}


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without hard links
        shutil.copy2(source, target)
