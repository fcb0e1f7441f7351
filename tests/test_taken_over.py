"""Experiments share a run: what one has trained, another takes from it whole, and each keeps its own afterwards."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dreambooth.config import Config
from dreambooth.files import write_text
from dreambooth.runs import RunFolder, claimed_run, open_run, read_run
from dreambooth.taken_over import take_over

MakeConfig = Callable[..., Config]
DIGESTS = {"base": "b", "photos": "p", "class_images": "none"}


@pytest.fixture
def of_group(make_config: MakeConfig) -> Callable[..., Config]:
    """Gives `of_group("prior")`: the same settings for another group."""
    return lambda group, **changes: make_config({"group": group, **changes})


def done(config: Config, status: str = "done") -> RunFolder:
    """Writes a run as train.py leaves it, in small."""
    run = open_run(config, **DIGESTS)
    for name in ("scores.json", "samples/final_grid.png", "wandb/offline-run/log", ".hidden.tmp"):
        write_text(run.path / name, f"{name} of {config.group}")
    run.finish(status, best_step=10)
    return run


def test_take_over_puts_a_finished_run_into_the_other_group(of_group: Callable[..., Config]) -> None:
    first = done(of_group("prior"))
    before = (first.path / "run.json").read_bytes()
    assert take_over(of_group("photos"), **DIGESTS) == first.path
    with claimed_run(of_group("photos"), **DIGESTS) as run:
        assert run.path == first.path.parent.parent / "photos" / first.path.name
    files = sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file())
    assert files == ["run.json", "samples/final_grid.png", "scores.json"]  # no mirror, nothing half-written
    assert (run.status, run.record["best_step"], run.config.group) == ("done", 10, "photos")
    assert run.record["taken_from"] == f"prior/{first.path.name}"
    assert run.record["started"] == first.record["started"]
    assert (first.path / "run.json").read_bytes() == before
    assert [path.name for path in first.path.parent.parent.iterdir() if path.name.startswith(".")] == []


def test_take_over_names_where_a_run_was_trained_even_from_a_copy_of_it(of_group: Callable[..., Config]) -> None:
    first = done(of_group("prior"))
    second = take_over(of_group("photos"), **DIGESTS) and read_run(first.path.parent.parent / "photos" / first.path.name)
    shutil.rmtree(first.path)
    assert take_over(of_group("methods"), **DIGESTS) == second.path
    assert read_run(first.path.parent.parent / "methods" / first.path.name).record["taken_from"] == f"prior/{first.path.name}"


@pytest.mark.parametrize("has_links", [True, False])
def test_take_over_leaves_each_its_own_files(of_group: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, has_links: bool) -> None:
    first = done(of_group("prior"))
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(OSError(errno.EPERM, "no hard links here")))
    take_over(of_group("photos"), **DIGESTS)
    own = first.path.parent.parent / "photos" / first.path.name / "scores.json"
    assert (own.stat().st_ino == (first.path / "scores.json").stat().st_ino) == has_links
    write_text(own, "scored again")
    assert (first.path / "scores.json").read_text() == "scores.json of prior"


@pytest.mark.parametrize("status", ["running", "failed"])
def test_take_over_takes_only_what_is_done(of_group: Callable[..., Config], status: str) -> None:
    first = done(of_group("prior"), status)
    assert take_over(of_group("photos"), **DIGESTS) is None
    assert not (first.path.parent.parent / "photos").exists()


def test_take_over_takes_no_other_settings_and_no_other_inputs(of_group: Callable[..., Config]) -> None:
    done(of_group("prior"))
    assert take_over(of_group("photos", seed=1), **DIGESTS) is None
    assert take_over(of_group("photos"), **(DIGESTS | {"photos": "others"})) is None


def test_take_over_does_not_trust_a_folder_whose_config_was_changed(of_group: Callable[..., Config]) -> None:
    path = done(of_group("prior")).path / "run.json"
    record = json.loads(path.read_text())
    record["config"]["seed"] = 5
    path.write_text(json.dumps(record))
    assert take_over(of_group("photos"), **DIGESTS) is None


def test_take_over_leaves_a_run_that_was_begun_alone(of_group: Callable[..., Config]) -> None:
    done(of_group("prior"))
    begun = open_run(of_group("photos"), **DIGESTS)
    assert take_over(of_group("photos"), **DIGESTS) is None
    assert read_run(begun.path).status == "running"


def test_take_over_on_a_full_disk_leaves_nothing_half(of_group: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    first = done(of_group("prior"))
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("dreambooth.taken_over.write_json", lambda *args: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space left"):
        take_over(of_group("photos"), **DIGESTS)
    assert sorted(path.name for path in Path(first.path.parent.parent).iterdir()) == ["prior"]


def test_take_over_gives_way_to_a_process_that_came_first(of_group: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    first = done(of_group("prior"))
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        open_run(of_group("photos"), **DIGESTS)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert take_over(of_group("photos"), **DIGESTS) is None
    assert read_run(first.path.parent.parent / "photos" / first.path.name).status == "running"
    assert sorted(path.name for path in first.path.parent.parent.iterdir()) == ["photos", "prior"]
