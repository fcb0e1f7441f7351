"""What is known of a subject before anything is drawn, worked out once for all runs that would find the same: the marks to read scores against.

It lies in `<output_dir>/oracle/`, under a digest of all that it depends on, as `base_images` does: a run that finds it takes it, to the bit what
it would work out itself; what is damaged is worked out again.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dreambooth.caches import DiskStore, Tensors, entry_key
from dreambooth.claims import alone_in
from dreambooth.config import Config
from dreambooth.runs import RunFolder

MAX_BYTES = 10**9  # of the folder; renders of one subject are 2 MB


def shared_folder(run: RunFolder, config: Config) -> Path | None:
    """Returns where the runs of a sweep share such work; None for a run that was moved away from the others."""
    return run.path.parents[1] / "oracle" if run.path.parent.name == config.group else None


def once(shared: Path | None, kind: str, about: dict[str, object], compute: Callable[[], Tensors]) -> Tensors:
    """Returns tensors on the CPU: worked out by the first run that asks, then read; another that asks meanwhile waits.

    Args:
        shared: of `shared_folder`; None: nothing is kept.
        kind: a word for what they are.
        about: plain values, all that they depend on beside the versions of torch and numpy.
        compute: works them out.
    """
    if shared is None:
        return compute()
    store, key = DiskStore(shared, MAX_BYTES), entry_key(kind, about | {"numpy": np.__version__}, "cpu", torch.float32)
    found = store.get(key)
    if found is None:
        with alone_in(store.path(key).parent, "works out reference scores in"):
            found = store.get(key)  # another may have worked them out while this one waited
            if found is None:
                found = compute()
                store.put(key, found)
    return found


def code_digest(folder: Path, pattern: str = "*.py") -> str:
    """Returns a hex digest of the source files in a folder: what they work out may change with them."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
