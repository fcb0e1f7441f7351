"""How the three scripts meet the terminal: the choices made known to Hydra, an error as one sentence, a progress bar."""

import difflib
import errno
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dreambooth import config, sweeps
from dreambooth.claims import Busy
from dreambooth.config import CHOICES, choice_name
from dreambooth.dreambench import AbsentSubjectError
from dreambooth.errors import ConfigError, UserError

Result = TypeVar("Result")

SOME_FAILED = 1  # exit status of a sweep with jobs that failed
BAD_INPUT = 2  # for an input that cannot be used
SOME_ELSEWHERE = 3  # of a sweep without failures, some of whose jobs other processes are still at
STOPPED, TERMINATED = 130, 143  # by Ctrl-C (SIGINT), by SIGTERM
SEE_ALL = "see them all: python train.py --cfg job"
FAILED_JOBS: list[str] = []  # what was said of the jobs of this process that failed


def register(name: str, schema: type) -> None:
    """Makes a script's config known to Hydra as `<name>_schema`, and every choice as `<group>/<name>`."""
    store = ConfigStore.instance()
    store.store(name=f"{name}_schema", node=schema)
    for group, kinds in CHOICES.items():
        for kind in kinds:
            store.store(group=group, name=choice_name(kind), node=kind)


def run_script(main: Callable[[], None]) -> None:
    """Runs a Hydra main; what the user can mend is one sentence on stderr and exit status 2, anything else a traceback.

    A sweep ends with the table of its jobs, also when it is stopped; with exit status 1 when some failed, else 3 when some are still done elsewhere.
    """
    _end_in_order_on_sigterm()  # here too: a launcher's jobs are other processes, and this one has to stop them
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that the error itself arrives here, not Hydra's print of it
    quiet()
    sweeps.task = getattr(main, "__wrapped__", main)  # what Hydra's decorator holds
    try:
        _run_to_the_end(main)
    finally:
        states = sweeps.close()
    if states & {"failed", "cut off"}:
        sys.exit(SOME_FAILED)
    if FAILED_JOBS:
        sys.exit(BAD_INPUT)
    if "elsewhere" in states:
        sys.exit(SOME_ELSEWHERE)


def _run_to_the_end(main: Callable[[], None]) -> None:
    """Runs a Hydra main and says in a sentence what the user can mend, or how to go on."""
    try:
        main()
    except Exception as error:  # the run's boundary
        sentence = explain(error)
        if sentence is None:
            raise
        _say(sentence)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the same command continues the run", file=sys.stderr)
        sys.exit(STOPPED)
    except SystemExit as stop:
        if stop.code == TERMINATED:
            print("stopped by SIGTERM; the same command continues the run", file=sys.stderr)
        raise


def run_job(work: Callable[[Any], Result], cfg: DictConfig, failed: Result | None = None) -> Result | None:
    """Runs one job of a script on its typed config and returns its result; in a sweep, a job that fails leaves the others to run.

    Args:
        work: takes the typed config.
        cfg: what Hydra composed.
        failed: the result of a job of a sweep that failed; of one that is done elsewhere or left out nothing is known, so it is None.
    """
    _end_in_order_on_sigterm()
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        return _run_one(work, cfg)
    sweeps.begin(str(cfg.get("output_dir")), str(cfg.get("group")))
    try:
        result = work(_typed(cfg))
    except Busy as busy:
        print(f"skipped: {busy}")
        sweeps.end("elsewhere", str(busy.owner), busy.folder)
    except AbsentSubjectError as absent:  # no failure: the sweep is over every subject that there may be
        print(f"left out: {absent}")
        sweeps.end("left out")
    except Exception as error:  # the job's boundary: the run folder holds the reason
        if (sentence := explain(error)) is None:
            traceback.print_exc()
        _say(sentence or f"the job failed: {type(error).__name__}: {error}; the others go on")
        sweeps.end("failed", sentence or f"{type(error).__name__}: {error}")
        return failed
    else:
        sweeps.end("done")
        return result
    return None


def _run_one(work: Callable[[Any], Result], cfg: DictConfig) -> Result | None:
    """Runs a job that is no part of a sweep; what the user can mend is said in a sentence, anything else raised."""
    try:
        return work(_typed(cfg))
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        _say(sentence)
    return None


def _end_in_order_on_sigterm() -> None:
    """Makes SIGTERM end this process like an error, so that what it holds is given back; a handler that is there already is left."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)


def stopped_by(stop: BaseException) -> str:
    """Returns in words what stopped a run that was stopped from outside."""
    return "stopped by SIGTERM" if isinstance(stop, SystemExit) and stop.code == TERMINATED else "stopped by Ctrl-C"


def _typed(cfg: DictConfig) -> Any:
    try:
        return OmegaConf.to_object(cfg)
    except AttributeError as error:  # a key that was forced in with +
        kind, key = re.findall(r"'(\w+)'", str(error))[:2]
        section = next((f"{name}." for name in cfg if OmegaConf.is_config(cfg[name]) and OmegaConf.get_type(cfg, name).__name__ == kind), "")
        raise ConfigError(section + key, "must be a setting that exists", None, SEE_ALL) from error


def explain(error: BaseException) -> str | None:
    """Returns one sentence for an error that a user can mend; None for a defect of the program."""
    seen: BaseException | None = error
    while seen is not None:  # Hydra and OmegaConf wrap the cause
        if isinstance(seen, UserError):
            return str(seen)
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{seen.filename or 'the disk'} must have room, got a full disk; free some space and give the same command again, it continues"
        seen = seen.__cause__ or seen.__context__
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _explain_config(error)
    return None


def _explain_config(error: Exception) -> str:
    texts, seen = [], error
    while seen is not None:
        texts.append(str(seen))
        seen = seen.__cause__
    text = "\n".join(texts)
    if unknown := re.search(r"Key '([^']+)' not in '([^']+)'", text):
        path = (re.search(r"full_key: (\S+)", text) or re.search(r"Could not override '([^']+)'", text) or unknown)[1]
        near = _near(unknown[1], unknown[2])
        next_step = f"did you mean {path.removesuffix(unknown[1])}{near}?" if near else SEE_ALL
        return f"{path} must be a setting that exists; {next_step}"
    for pattern, answer in ANSWERS:
        if found := re.search(pattern, text):
            return answer(found)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"the command line must fit the config: {' '.join(dict.fromkeys(lines))[:400]}; {SEE_ALL}"


def _near(key: str, section: str) -> str | None:
    """Returns the setting of a section (by its class name) that a wrong key probably meant: alike, or with those initials."""
    kinds = {
        kind.__name__: kind for kind in (*vars(config).values(), *(kind for group in CHOICES.values() for kind in group)) if isinstance(kind, type)
    }
    known = list(getattr(kinds.get(section), "__dataclass_fields__", ()))
    initials = [name for name in known if "".join(word[0] for word in name.split("_")) == key]
    return next(iter(initials + difflib.get_close_matches(key, known, 1, 0.65)), None)


def _kind(omegaconf_type: str) -> str:
    return {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}.get(omegaconf_type, f"a {omegaconf_type.lower()}")


def _example(omegaconf_type: str) -> str:
    return {"Integer": "100", "Float": "1e-5", "Boolean": "true"}.get(omegaconf_type, "...")


KEY = r"[\s\S]*?full_key: (\S+)"  # where OmegaConf says which setting it was
ANSWERS: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (  # what Hydra and OmegaConf say, by pattern -> our sentence
    (
        r"Value '([^']*)' of type '[^']*' could not be converted to (\w+)" + KEY,
        lambda m: f"{m[3]} must be {_kind(m[2])}, got {m[1]!r}; write it like {m[3]}={_example(m[2])}",
    ),
    (
        r"Could not find '(\w+)/([^']+)'[\s\S]*?Available options in '\w+':\s*([\s\S]*?)(?:\nConfig search path|\Z)",
        lambda m: f"{m[1]} must be one of {', '.join(m[3].split())}, got {m[2]!r}; choose one of them",
    ),
    (r"(?i)missing mandatory value: (\S+)", lambda m: f"{m[1]} must be set; write {m[1]}=..."),
    (r"Value '([^']*)' is not a valid bool" + KEY, lambda m: f"{m[2]} must be true or false, got {m[1]!r}; write it like {m[2]}=true"),
    (r"field '[^']*' is not Optional" + KEY, lambda m: f"{m[1]} must have a value, got null; leave it out for the default"),
    (r"is not a ListConfig, list or tuple" + KEY, lambda m: f'{m[1]} must be a list; write it like \'{m[1]}=["first","second"]\''),
    (
        r"Ambiguous value for argument '([^=']+)=",
        lambda m: f"{m[1]} must be quoted when it holds a comma; write it like '{m[1]}=\"one, two\"', or add -m to sweep over the values",
    ),
    (r"missing EQUAL at '<EOF>'", lambda m: f"the command line must be words of the form setting=value; {SEE_ALL}"),
    (
        r"override_grammar",
        lambda m: (
            "text with braces, brackets, quotes or = must be quoted twice, for the shell and for Hydra; "
            "write it like 'prompt=\"a {subject} in the snow\"'"
        ),
    ),
)


def _say(sentence: str) -> None:
    FAILED_JOBS.append(sentence)
    print(f"error: {sentence}", file=sys.stderr)


@contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """Shows a bar over `total` images; gives the function that moves it on by n."""
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="image", dynamic_ncols=True) as bar:
        yield bar.update


def quiet() -> None:
    """Keeps the libraries' advertisements and harmless warnings off the terminal; our own lines stay."""
    import logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("WANDB_SILENT", "true")
    for name in ("pytorch_lightning", "lightning.pytorch", "diffusers", "transformers", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for pattern in (
        r".*isinstance\(treespec, LeafSpec\).*",
        r".*does not have many workers.*",
        r".*litlogger.*",
        r".*in eval mode at the start of training.*",
        r".*resumed from a checkpoint that ended before.*",
    ):
        warnings.filterwarnings("ignore", pattern)
