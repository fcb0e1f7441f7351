"""Claims on folders: one owner at a time, whatever the others try; a dead owner is succeeded once; one who was pushed out notices."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dreambooth import claims
from dreambooth.claims import Busy, ClaimLost, alone_in, claim, held, holder, is_claim

FORK = multiprocessing.get_context("fork")


def dead_process() -> int:
    """Returns the number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def write_claim(folder: Path, age_s: float = 0.0, name: str = ".claim", **changes: object) -> str:
    """Writes a claim as a process would that is not this one; returns its token."""
    folder.mkdir(parents=True, exist_ok=True)
    owner = claims._this_process()._replace(**changes)
    (folder / name).write_text(json.dumps(owner._asdict()))
    then = time.time() - age_s
    os.utime(folder / name, (then, then))
    return owner.token


def elsewhere(folder: Path, age_s: float) -> str:
    return write_claim(folder, age_s, place="another machine", host="node7")


def claim_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if is_claim(path.name))


def test_claim_is_for_one_at_a_time(tmp_path: Path) -> None:
    with claim(tmp_path) as first:
        assert first is not None and claim(tmp_path) is None
    assert claim_files(tmp_path) == []
    with claim(tmp_path) as again:
        assert again is not None


def test_claim_makes_the_folder(tmp_path: Path) -> None:
    with claim(tmp_path / "a" / "b"):
        assert claim_files(tmp_path / "a" / "b") == [".claim"]


def test_claim_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in the middle"), claim(tmp_path):
        raise RuntimeError("in the middle")
    assert claim_files(tmp_path) == []


def test_holder_says_who_holds_it(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    with claim(tmp_path):
        owner = holder(tmp_path)
        assert (owner.host, owner.pid) == (socket.gethostname(), os.getpid())
        assert f"process {os.getpid()} on {socket.gethostname()} since 20" in str(owner)


def test_held_names_the_owner_when_it_is_busy(tmp_path: Path) -> None:
    elsewhere(tmp_path, age_s=5)
    with pytest.raises(Busy, match=r"is being done by process \d+ on node7 since .*; give the same command again"):
        held(tmp_path)


def test_claim_of_a_process_that_is_gone_is_taken_over_at_once(tmp_path: Path) -> None:
    write_claim(tmp_path, pid=dead_process())
    with claim(tmp_path) as mine:
        assert mine is not None and claim(tmp_path) is None
        mine.confirm()
    assert claim_files(tmp_path) == []


def test_claim_of_a_process_number_that_was_given_to_another_process_is_taken_over(tmp_path: Path) -> None:
    write_claim(tmp_path, started="1")  # this very pid, but of a process that started with the machine
    with claim(tmp_path) as mine:
        assert mine is not None


def test_claim_of_a_killed_process_that_nobody_has_waited_for_is_taken_over(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    write_claim(tmp_path, pid=process.pid, started=claims._started(process.pid))
    assert claim(tmp_path) is None
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is dead now, and still in the table of processes
    with claim(tmp_path) as mine:
        assert mine is not None
    process.wait()


@pytest.mark.parametrize(("age_s", "is_taken"), [(0, False), (100, False), (140, True)])
def test_claim_of_another_machine_is_taken_over_when_its_heartbeat_is_old(tmp_path: Path, age_s: float, is_taken: bool) -> None:
    elsewhere(tmp_path, age_s)
    mine = claim(tmp_path)
    assert (mine is not None) == is_taken
    if mine:
        mine.release()


@pytest.mark.parametrize("skew_s", [-3600, 3600])
def test_claim_reads_ages_by_the_clock_of_the_disk_not_by_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew_s: float) -> None:
    elsewhere(tmp_path, age_s=10)
    local = time.time
    monkeypatch.setattr(time, "time", lambda: local() + skew_s)
    assert claim(tmp_path) is None


def test_claim_of_an_owner_that_died_while_writing_it_is_taken_over_when_it_is_old(tmp_path: Path) -> None:
    (tmp_path / ".claim").touch()
    assert claim(tmp_path) is None  # it may just be written
    os.utime(tmp_path / ".claim", (time.time() - 140,) * 2)
    with claim(tmp_path) as mine:
        assert mine is not None and claim(tmp_path) is None
    assert claim_files(tmp_path) == []


def test_claim_that_succeeded_a_dead_one_is_succeeded_when_it_dies_too(tmp_path: Path) -> None:
    first = write_claim(tmp_path, pid=dead_process())
    write_claim(tmp_path, name=f".claim.{first}", token="second", pid=dead_process())
    with claim(tmp_path) as mine:
        assert claim_files(tmp_path) == sorted([".claim", f".claim.{first}", ".claim.second"])
        mine.confirm()
        assert holder(tmp_path).token == mine.owner.token
    assert claim_files(tmp_path) == []


def test_claim_does_not_push_out_a_living_owner_by_an_old_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A looks, and sees a dead claim; before A acts, B takes over; then A acts on what it saw."""
    write_claim(tmp_path, pid=dead_process())
    looked, taken = claims._is_dead, []

    def slow(*arguments: object) -> bool:
        answer = looked(*arguments)
        if not taken:
            monkeypatch.setattr(claims, "_is_dead", looked)
            taken.append(claim(tmp_path))
        return answer

    monkeypatch.setattr(claims, "_is_dead", slow)
    assert claim(tmp_path) is None
    taken[0].confirm()
    taken[0].release()


def test_claim_by_an_old_look_at_a_claim_given_back_since_holds_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A looks, and sees a dead claim; before A acts, B takes over, ends, gives back; C claims. A must not think that it succeeds the dead one."""
    write_claim(tmp_path, pid=dead_process())
    looked, others = claims._is_dead, []

    def slow(*arguments: object) -> bool:
        answer = looked(*arguments)
        if not others:
            monkeypatch.setattr(claims, "_is_dead", looked)
            claim(tmp_path).release()
            others.append(claim(tmp_path))
        return answer

    monkeypatch.setattr(claims, "_is_dead", slow)
    assert claim(tmp_path) is None
    others[0].confirm()
    others[0].release()
    assert claim_files(tmp_path) == []


def _race(folder: str, start: object, wins: object, inside: object) -> None:
    start.wait(30)
    for turn in range(12):
        place = Path(folder) / str(turn)
        mine = claim(place)
        if mine is not None:
            with mine:
                handle = os.open(place / "inside", os.O_CREAT | os.O_EXCL)  # fails where two are in at once
                time.sleep(0.005)
                os.close(handle)
                os.unlink(place / "inside")
                with wins.get_lock():
                    wins.value += 1
    with inside.get_lock():
        inside.value += 1


@pytest.mark.parametrize("with_dead_owner", [False, True])
def test_claim_by_many_processes_at_once_never_lets_two_in(tmp_path: Path, with_dead_owner: bool) -> None:
    if with_dead_owner:
        gone = dead_process()
        for turn in range(12):
            write_claim(tmp_path / str(turn), pid=gone)
    start, wins, ended = FORK.Event(), FORK.Value("i", 0), FORK.Value("i", 0)
    racers = [FORK.Process(target=_race, args=(str(tmp_path), start, wins, ended)) for _ in range(4)]
    for racer in racers:
        racer.start()
    start.set()
    for racer in racers:
        racer.join(30)
    assert ended.value == 4 and wins.value >= 12  # a racer that met another inside died of it
    assert [name for turn in range(12) for name in claim_files(tmp_path / str(turn))] == []


def test_heartbeat_keeps_a_claim_young(tmp_path: Path) -> None:
    with claim(tmp_path, beat_s=0.02):
        os.utime(tmp_path / ".claim", (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / ".claim").stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - (tmp_path / ".claim").stat().st_mtime < 5


def test_owner_that_was_succeeded_notices_and_leaves_the_folder_to_the_other(tmp_path: Path) -> None:
    mine = claim(tmp_path)
    write_claim(tmp_path, name=f".claim.{mine.owner.token}", token="other", place="another machine")
    with pytest.raises(ClaimLost, match="no longer this process's"):
        mine.confirm()
    mine.release()
    assert claim_files(tmp_path) == sorted([".claim", f".claim.{mine.owner.token}"]) and holder(tmp_path).token == "other"


def test_owner_whose_folder_was_removed_notices(tmp_path: Path) -> None:
    mine = claim(tmp_path / "run")
    (tmp_path / "run" / ".claim").unlink()
    with pytest.raises(ClaimLost):
        mine.confirm()
    mine.release()


def test_heartbeat_tells_the_cheap_check_that_the_claim_is_lost(tmp_path: Path) -> None:
    mine = claim(tmp_path, beat_s=0.02)
    mine.check()
    write_claim(tmp_path, name=f".claim.{mine.owner.token}", token="other", place="another machine")
    deadline = time.monotonic() + 10
    with pytest.raises(ClaimLost):
        while time.monotonic() < deadline:
            mine.check()
            time.sleep(0.01)
    mine.release()


def test_cheap_check_looks_itself_after_the_whole_process_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = claim(tmp_path, beat_s=20)
    write_claim(tmp_path, name=f".claim.{mine.owner.token}", token="other", place="another machine")
    mine.check()  # no heartbeat has looked yet
    now = claims._clock()
    monkeypatch.setattr(claims, "_clock", lambda: now + 60)
    with pytest.raises(ClaimLost):
        mine.check()
    mine.release()


def test_alone_in_waits_for_the_owner_with_one_line_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "POLL_S", 0.01)
    mine, lines = claim(tmp_path), []
    threading.Timer(0.2, mine.release).start()
    start = time.monotonic()
    with alone_in(tmp_path, "draws", lines.append):
        assert time.monotonic() - start > 0.1
    assert len(lines) == 1 and f"waiting for the process that draws {tmp_path}: process {os.getpid()} on" in lines[0]


def test_alone_in_takes_over_when_the_owner_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "POLL_S", 0.01)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    write_claim(tmp_path, pid=process.pid, started=claims._started(process.pid))
    threading.Timer(0.1, process.kill).start()
    with alone_in(tmp_path, "draws", lambda line: None) as mine:
        mine.confirm()
        assert process.poll() is not None or claims._started(process.pid) is None
    process.wait()
