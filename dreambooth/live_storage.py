"""The bytes of all tensors that are alive, followed operation by operation, for real tensors and for fake ones alike."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveStorage(TorchDispatchMode):
    """Inside the context, counts every storage that an operation makes from when it is made until it is freed.

    A view shares its tensor's storage and counts once. What was there before counts only if it is named.

    Args:
        known: tensors of before that count too, until they are freed.

    Attributes:
        now: bytes alive.
        peak: the most that there ever were.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now, self.peak, self._sizes = 0, 0, {}
        for tensor in known:
            self._count(tensor)

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        before = {id(leaf.untyped_storage()) for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in before:  # a view, or in place: it was there before
                self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._sizes:
            return
        self._sizes[id(storage)] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, id(storage)).atexit = False

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
