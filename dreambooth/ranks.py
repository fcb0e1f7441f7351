"""The processes that share one run, one a device: the first starts the others, tells them what to do, and ends with them.

The first rank is the process that the user started. It alone writes files and lines, and holds the run folder; the others (its ranks 1, 2, ...)
draw and train their share and send it what they made. They are started by it, not by a launcher that types the command again, so a sweep
starts the ranks of each of its jobs. They say nothing on the terminal: what they print is shown when one of them fails.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from dreambooth.errors import ConfigError, UserError

Value = TypeVar("Value")

FOLLOWER = "DREAMBOOTH_FOLLOWER"  # environment variable that marks the process of a further rank
LOCAL_RANK = "LOCAL_RANK"  # the one that Lightning and its kin look at: with it set, they start no processes of their own
LIMIT = timedelta(days=7)  # of waiting for another rank: one that has died is noticed by its process, not by its silence
POLL_S, NOTICE_S, END_S = 0.2, 5.0, 60.0  # looks at the others; for this rank to notice that one died; for the others to end in order
REFUSED, LEFT_ALONE = 2, 3  # exit status of a rank: for an input that cannot be used; after the first rank was gone
TAIL = 4000  # characters of what a failed rank printed


class Ranks(NamedTuple):
    """This process among those of its run."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.index == 0

    def share(self, items: Sequence[Value]) -> Sequence[Value]:
        """Returns every `count`-th of some items, beginning with this rank's own: over all ranks each is there once."""
        return items[self.index :: self.count]

    def from_first(self, value: Value) -> Value:
        """Returns the first rank's value on every rank; all of them must call it."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def at_first(self, value: Value) -> list[Value] | None:
        """Returns the values of all ranks, in their order, on the first one, and None on the others; all of them must call it."""
        if self.count == 1:
            return [value]
        values = [None] * self.count if self.is_first else None
        dist.gather_object(value, values, dst=0)
        return values

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Returns the mean of a tensor over all ranks, on every one; all of them must call it. What is not finite on one is so on all."""
        if self.count == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.count

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replaces each of some tensors by its sum over all ranks, in place and in one exchange; all of them must call it."""
        if self.count == 1:
            return
        together = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(together)
        for tensor, total in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view(tensor.shape))


ALONE = Ranks()


def check(count: int, device: str) -> None:
    """Refuses, before anything is loaded, more ranks than there are devices.

    Args:
        count: ranks asked for.
        device: "cpu", which takes any number of processes, or "cuda".

    Raises:
        ConfigError: naming `trainer.devices`.
    """
    if count == 1:
        return
    if not dist.is_available():
        raise ConfigError("trainer.devices", "must be 1 with a PyTorch that was built without torch.distributed", count, "leave it out")
    if device == "cuda" and count > torch.cuda.device_count():
        raise ConfigError("trainer.devices", f"must be at most the {torch.cuda.device_count()} GPUs that there are", count, "set a smaller number")


@contextmanager
def together(count: int, device: str, program: Sequence[str], task: dict[str, Any]) -> Iterator[Ranks]:
    """Gives the first rank of a run; outside the context the others are gone, whatever happened.

    Args:
        count: ranks, one of them this process.
        device: "cpu" or "cuda".
        program: what the others run, as it stands behind "python": it must call `following`.
        task: plain values that they are given.

    Raises:
        UserError: another rank could not use its input.
        RuntimeError: another rank failed; with the end of what it printed.
    """
    if count == 1:
        yield ALONE
        return
    store = dist.TCPStore("127.0.0.1", 0, count, is_master=True, wait_for_workers=False)  # port 0: the system finds a free one
    threads = torch.get_num_threads()
    per_rank = max(1, threads // count) if device == "cpu" else threads
    told = task | {"port": store.port, "count": count, "device": device}
    followers = [_Follower(index, program, told, per_rank) for index in range(1, count)]
    closed = threading.Event()
    try:
        torch.set_num_threads(per_rank)
        os.environ[LOCAL_RANK] = "0"
        threading.Thread(target=_end_with_the_dead, args=(followers, closed), daemon=True).start()
        _join(store, 0, count, device)
        yield Ranks(0, count)
        for follower in followers:
            follower.wait(END_S)
        _blame(followers)
    except UserError:
        raise
    except Exception as error:
        _blame(followers, NOTICE_S if isinstance(error, RuntimeError) else 0.0, error)  # torch's word for a rank that is gone
        raise
    finally:
        closed.set()
        for follower in followers:
            follower.end()
        os.environ.pop(LOCAL_RANK, None)
        torch.set_num_threads(threads)
        if dist.is_initialized():
            dist.destroy_process_group()


def is_follower() -> bool:
    """Tells whether this process was started by `together`."""
    return FOLLOWER in os.environ


@contextmanager
def following() -> Iterator[tuple[Ranks, dict[str, Any]]]:
    """Gives a further rank its place and its task, in a process that `together` started; it ends when the first rank is gone.

    The process ends with the context, whether its share is done or failed, and nothing behind it runs: an interpreter that winds up while a
    thread of torch still waits for it is aborted, now and then, and a share that was done would count as failed.
    """
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    index, count = int(os.environ[LOCAL_RANK]), task["count"]
    store = dist.TCPStore("127.0.0.1", task["port"], count, is_master=False)
    _join(store, index, count, task["device"])
    try:
        yield Ranks(index, count), task
    except SystemExit as stop:
        _leave(stop.code if isinstance(stop.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        _leave(1)
    dist.destroy_process_group()
    _leave(0)


def refuse(sentence: str) -> int:
    """Says why this further rank stops; returns the exit status by which the first one knows that it is for the user to mend."""
    print(sentence, flush=True)
    return REFUSED


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _join(store: dist.Store, index: int, count: int, device: str) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # what the ranks send each other stays on this machine
    if device == "cuda":
        torch.cuda.set_device(index)  # from here on, "cuda" is this rank's own GPU
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=index, world_size=count, timeout=LIMIT)


class _Follower:
    """A further rank, as the first one sees it."""

    def __init__(self, index: int, program: Sequence[str], task: dict[str, Any], threads: int) -> None:
        self.index, self.printed = index, tempfile.TemporaryFile()
        path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))  # this very package
        self.process = subprocess.Popen(
            [sys.executable, *program],
            stdin=subprocess.PIPE,
            stdout=self.printed,
            stderr=subprocess.STDOUT,
            env=os.environ | {FOLLOWER: "1", LOCAL_RANK: str(index), "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the first rank, which ends the others
        )
        pipe: IO[bytes] = self.process.stdin
        with suppress(BrokenPipeError):  # it died at once: its exit status tells
            pipe.write(json.dumps(task).encode() + b"\n")
            pipe.flush()  # and left open: its end is the first rank's

    @property
    def has_failed(self) -> bool:
        return self.process.poll() not in (None, 0)

    def wait(self, limit_s: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(limit_s)

    def end(self) -> None:
        """Ends the process, if it still runs."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(number)
                self.wait(5.0)
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.printed.close()

    def last_words(self) -> str:
        self.printed.seek(0)
        return self.printed.read().decode(errors="replace")[-TAIL:].strip()


def _blame(followers: list[_Follower], limit_s: float = 0.0, cause: Exception | None = None) -> None:
    """Raises the error of the rank that failed first, if one did; gives it some time to be gone."""
    deadline = time.monotonic() + limit_s
    while not (failed := [follower for follower in followers if follower.has_failed]) and time.monotonic() < deadline:
        if all(follower.process.poll() == 0 for follower in followers):
            return
        time.sleep(POLL_S)
    if not failed:
        return
    words, status = failed[0].last_words(), failed[0].process.returncode
    if status == REFUSED:
        raise UserError(f"rank {failed[0].index}", f"stopped: {words.splitlines()[-1] if words else 'no reason given'}") from cause
    raise RuntimeError(f"rank {failed[0].index} ended with exit status {status}; the end of what it printed:\n{words}") from cause


def _end_with_the_dead(followers: list[_Follower], closed: threading.Event) -> None:
    """Ends this process when another rank died and this one waits for it in a call that does not notice."""
    while not closed.wait(POLL_S):
        if any(follower.has_failed for follower in followers):
            if closed.wait(NOTICE_S + END_S):
                return
            words = next(follower for follower in followers if follower.has_failed).last_words()
            print(f"{words}\na rank of this run has died; the same command continues the run", file=sys.stderr, flush=True)
            for follower in followers:
                follower.process.kill()
            os._exit(1)


def _end_with_the_first() -> None:
    with suppress(OSError):
        while os.read(0, 1):  # not sys.stdin, whose lock a blocked thread would keep when the interpreter ends
            pass
    os._exit(LEFT_ALONE)
