"""Files come whole or not at all."""

import errno
import json
import math
import os
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dreambooth import files
from dreambooth.errors import UserError
from dreambooth.files import require_free, write_json, write_tensors, write_text, write_with

FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


def fail(*args: object, **kwargs: object) -> None:
    raise FULL_DISK


def write_half(path: Path) -> None:
    path.write_text("half of the n")
    raise FULL_DISK


def test_write_with_makes_missing_folders_and_returns_the_path(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.txt"
    assert write_with(path, lambda p: p.write_text("new")) == path and path.read_text() == "new"


def test_write_with_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("a long old content")
    write_text(path, "new")
    assert path.read_text() == "new"


def test_write_with_leaves_the_old_content_when_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left"):
        write_with(path, write_half)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_write_with_leaves_the_old_content_when_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]


def test_write_with_leaves_nothing_behind_when_there_was_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        write_with(tmp_path / "x.txt", write_half)
    assert os.listdir(tmp_path) == []


def test_write_with_never_shows_a_half_written_file(tmp_path: Path) -> None:
    path, seen = tmp_path / "x.txt", []
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("ne")
        seen.append(path.read_text())
        temporary.write_text("new")

    write_with(path, write)
    assert seen == ["old"] and path.read_text() == "new"


def test_write_with_leaves_nothing_behind_after_ctrl_c(tmp_path: Path) -> None:
    def interrupted(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_with(tmp_path / "x.txt", interrupted)
    assert os.listdir(tmp_path) == []


def test_write_text_keeps_letters_of_every_language(tmp_path: Path) -> None:
    assert write_text(tmp_path / "x.txt", "Käse 犬 🐕").read_text(encoding="utf-8") == "Käse 犬 🐕"


def test_write_json_reads_back_equal(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True, "Käse"], "b": {"c": []}}
    assert json.loads(write_json(tmp_path / "x.json", value).read_text(encoding="utf-8")) == value


def test_write_json_writes_nan_as_null(tmp_path: Path) -> None:
    text = write_json(tmp_path / "x.json", {"a": math.nan, "b": [math.nan, (1.0, math.nan)]}).read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) == {"a": None, "b": [None, [1.0, None]]}


def test_write_json_writes_infinity_as_json(tmp_path: Path) -> None:
    text = write_json(tmp_path / "x.json", {"a": math.inf}).read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_write_json_leaves_the_old_file_when_a_value_is_no_json(tmp_path: Path) -> None:
    path = write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_write_tensors_reads_back_equal_with_its_metadata(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor([1.5], dtype=torch.bfloat16)}
    path = write_tensors(tmp_path / "x.safetensors", tensors, {"step": "3"})
    found = load_file(path)
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"step": "3"}


def test_write_tensors_gives_the_same_bytes_for_the_same_tensors(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2)}
    first = write_tensors(tmp_path / "1.safetensors", tensors, {"x": "1"})
    second = write_tensors(tmp_path / "2.safetensors", dict(reversed(tensors.items())), {"x": "1"})
    assert first.read_bytes() == second.read_bytes()


def test_require_free_refuses_a_disk_that_is_too_full_and_names_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: usage(10**12, 10**12 - 10**9, 10**9))
    require_free(tmp_path, 10**9, "output_dir")
    with pytest.raises(UserError, match=r"^output_dir must be on a disk with 2\.00 GB free for checkpoints, got '1\.00 GB'; "):
        require_free(tmp_path, 2 * 10**9, "output_dir")


def test_written_weights_have_the_mode_of_any_new_file(tmp_path: Path) -> None:
    """safetensors leaves a file that only its owner can read: a run folder on a shared disk would hold weights that nobody else can load."""
    (tmp_path / "plain").touch()
    written = files.write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
    assert written.stat().st_mode == (tmp_path / "plain").stat().st_mode
