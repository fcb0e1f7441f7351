"""Claims: one process at a time works in a folder, whatever process or machine of a shared disk it is; a dead one's work is taken over.

A claim is the file `.claim` in the folder: made with O_EXCL, so of all who try at once one succeeds, and kept young by a heartbeat. Its
owner is dead when its process is gone (seen from the same machine) or when no heartbeat has come for `DEAD_AFTER_S` (seen from any other).
The claim of a dead owner is not removed but succeeded, by the file `.claim.<token of the dead claim>`, made with O_EXCL too. Tokens are
unique, so for each dead claim one process succeeds, once: a slow process that still looks at an older claim can never push a living owner out.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from dreambooth.errors import UserError

NAME = ".claim"
BEAT_S = 20.0
DEAD_AFTER_S = 120.0  # several heartbeats, and the minute for which network disks may show an old time
POLL_S = 1.0


class Owner(NamedTuple):
    """Who holds a folder."""

    token: str  # names this very claim
    place: str  # machine since its last start and process namespace, within which a pid means a process; "" where that is not known
    host: str
    pid: int
    started: str  # of the process, in clock ticks since the machine's start: pids are used again
    since: str  # of the claim, UTC

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since} (UTC)"


class Busy(UserError):
    """A folder that another living process works in."""

    def __init__(self, folder: Path, owner: Owner) -> None:
        super().__init__(str(folder), f"is being done by {owner}", None, "give the same command again when it has ended")
        self.folder, self.owner = folder, owner


class ClaimLost(UserError):
    """This process lost its claim, so another may be at work in the folder: nothing more may be written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            str(folder),
            "is no longer this process's: it gave no sign of life for too long and another took over, or the folder was removed",
            None,
            "nothing more is written; give the same command again to see how it stands",
        )


class Claim:
    """A folder held by this process: a context manager that gives it back. Made by `claim`.

    Attributes:
        folder: what is held.
        owner: what others see.
    """

    def __init__(self, folder: Path, path: Path, owner: Owner, beat_s: float) -> None:
        self.folder, self.owner = folder, owner
        self._path, self._beat_s, self._lost, self._confirmed = path, beat_s, False, _clock()
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"claim of {folder}", daemon=True)
        self._heart.start()

    def confirm(self) -> None:
        """Looks on the disk whether the folder is still held; to be called before something is written into it.

        Raises:
            ClaimLost: it is not.
        """
        if not self._lost:
            chain = _chain(self.folder)
            self._lost = not chain or chain[-1][1].token != self.owner.token
        if self._lost:
            raise ClaimLost(self.folder)
        self._confirmed = _clock()

    def check(self) -> None:
        """Does as `confirm`, but looks on the disk only when the heartbeat has not done so of late: cheap enough for every step.

        Raises:
            ClaimLost: the folder is not held any more.
        """
        if self._lost or _clock() - self._confirmed > 2 * self._beat_s:  # a process that was stopped wakes up here before its heartbeat
            self.confirm()

    def release(self) -> None:
        """Gives the folder back; does nothing when it is lost."""
        self._stop.set()
        self._heart.join()
        try:
            self.confirm()
        except (ClaimLost, OSError):
            return
        leftovers = [path for path in self.folder.glob(f"{NAME}.*") if path.suffix != ".tmp"]  # before the next owner can make any
        for path in [self.folder / NAME, *leftovers]:  # the first claim first: without it the others mean nothing
            path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(self._beat_s):
            try:
                self.confirm()
                os.utime(self._path)  # by the clock of the disk
            except ClaimLost:
                return  # `check` says so in the thread that works
            except OSError:  # a network disk that is away for a moment
                continue

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def claim(folder: Path, beat_s: float = BEAT_S, dead_after_s: float = DEAD_AFTER_S) -> Claim | None:
    """Returns the claim on a folder, to be used in a `with`; None when a living process holds it, be it this one.

    Args:
        folder: made when missing.
        beat_s: seconds between two heartbeats.
        dead_after_s: seconds without one after which an owner on another machine counts as dead; well above its `beat_s`.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        chain = _chain(folder)
        if chain and not _is_dead(*chain[-1], dead_after_s):
            return None
        path = folder / (f"{NAME}.{chain[-1][1].token}" if chain else NAME)
        mine = _this_process()
        if not _create(path, mine):
            time.sleep(0.01)
            continue  # another was quicker: look again
        if [owner.token for _, owner in _chain(folder)][-1:] == [mine.token]:
            return Claim(folder, path, mine, beat_s)
        path.unlink(missing_ok=True)  # what it was to succeed was given back in the meantime


def holder(folder: Path, dead_after_s: float = DEAD_AFTER_S) -> Owner | None:
    """Returns the living process that holds a folder, if one does."""
    chain = _chain(folder)
    return chain[-1][1] if chain and not _is_dead(*chain[-1], dead_after_s) else None


def held(folder: Path) -> Claim:
    """Returns the claim on a folder.

    Raises:
        Busy: a living process holds it.
    """
    while True:
        if (mine := claim(folder)) is not None:
            return mine
        if (owner := holder(folder)) is not None:
            raise Busy(folder, owner)


@contextmanager
def alone_in(folder: Path, work: str, say: Callable[[str], None] = print) -> Iterator[Claim]:
    """Waits until no other process holds a folder, then holds it; takes over when the other dies.

    Args:
        folder: made when missing.
        work: what the other does, for the line that is said while this one waits: "draws".
        say: takes that line.
    """
    told = ""
    while (mine := claim(folder)) is None:
        other = holder(folder)
        if other is not None and other.token != told:
            say(f"waiting for the process that {work} {folder}: {other}")
            told = other.token
        time.sleep(POLL_S)
    with mine:
        yield mine


def is_claim(name: str) -> bool:
    """Tells whether a file of this name belongs to a claim, not to the folder's content."""
    return name == NAME or name.startswith(f"{NAME}.")


def _chain(folder: Path) -> list[tuple[Path, Owner]]:
    """Returns the claims of a folder with their files: the first, the one that succeeded it, and so on to the one that holds."""
    found: list[tuple[Path, Owner]] = []
    path = folder / NAME
    while (owner := _read(path)) is not None:
        found.append((path, owner))
        path = folder / f"{NAME}.{owner.token}"
    return found


def _read(path: Path) -> Owner | None:
    """Returns what a claim says; None when there is none."""
    try:
        text, stat = path.read_text(encoding="utf-8"), path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):  # just being written, or its owner died over it: then its age tells
        return Owner(f"{stat.st_ino:x}-{stat.st_mtime_ns:x}", "", "an unknown machine", 0, "", "an unknown time")


def _create(path: Path, owner: Owner) -> bool:
    """Makes a claim file; False when it is there already."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    except FileNotFoundError:  # the folder was removed a moment ago
        return False
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(json.dumps(owner._asdict()))
    return True


def _is_dead(path: Path, owner: Owner, dead_after_s: float) -> bool:
    """Tells whether the owner of a claim is gone for good."""
    if owner.place and owner.place == _this_process().place and (running := _is_running(owner.pid, owner.started)) is not None:
        return not running
    try:
        return _disk_time(path.parent) - path.stat().st_mtime > dead_after_s
    except FileNotFoundError:  # given back in this moment: the caller looks again
        return False


def _disk_time(folder: Path) -> float:
    """Returns the time by the clock that a folder's disk stamps its files with: that of a file server may differ from this machine's."""
    probe = folder / f"{NAME}.{secrets.token_hex(8)}.tmp"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _this_process() -> Owner:
    """Returns a new owner: this process, with a token of its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: owners are judged by their heartbeat alone
        place = ""
    now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")
    return Owner(secrets.token_hex(8), place, socket.gethostname(), os.getpid(), _started(os.getpid()) or "", now)


def _is_running(pid: int, started: str) -> bool | None:
    """Tells whether a process of this machine still runs; None when that is not to be seen."""
    found = _started(pid)
    if found is not None:
        return found == started
    try:
        os.kill(pid, 0)  # asks only
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, on a machine that hides those
        return None
    return False  # ended, and its parent has not yet asked how


def _started(pid: int) -> str | None:
    """Returns when a process of this machine started, in clock ticks; None when none can be seen, or only the remains of one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def _clock() -> float:
    """Returns seconds that go on while the machine sleeps, where it has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
