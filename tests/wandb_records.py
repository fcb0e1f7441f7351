"""Reads an offline W&B run back without a server: a LevelDB log of protobuf records behind a 7-byte header."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768


def read_offline_run(folder: Path, timeout_s: float = 30) -> dict[str, Any]:
    """Returns history (a list of rows), summary, config, group, name and project.

    W&B's own process writes on after `finish`, a block at a time: read again until the exit record, the last one, is there whole.
    """
    from wandb.proto import wandb_internal_pb2 as wandb_pb

    path = next(folder.glob("wandb/offline-run-*/*.wandb"))
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found: dict[str, Any] = {"history": [], "summary": {}, "config": {}, "exit": False}
        for data in _records(path.read_bytes()):
            record = wandb_pb.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                found["history"].append({_key(item): json.loads(item.value_json) for item in record.history.item})
            elif kind == "summary":
                found["summary"] |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
            elif kind == "run":
                found |= {"group": record.run.run_group, "name": record.run.display_name, "project": record.run.project}
                found["config"] |= {_key(item): json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "config":
                found["config"] |= {_key(item): json.loads(item.value_json) for item in record.config.update}
            elif kind == "exit":
                found["exit"] = True
        if found["exit"]:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{path} has no exit record after {timeout_s} s")


def _key(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


def _records(content: bytes) -> Iterator[bytes]:
    assert content[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(content):
        left = BLOCK - position % BLOCK
        if left < 7:  # what is left of a block holds no header
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        if kind == 0:
            position += left
            continue
        data = content[position + 7 : position + 7 + length]
        if len(data) < length:  # not all there yet
            return
        position += 7 + length
        parts = data if kind in (1, 2) else parts + data  # 1 whole, 2 first, 3 middle, 4 last
        if kind in (1, 4):
            yield parts
