"""Latents and text embeddings kept by content, so that nothing frozen is computed twice: in memory, on disk, or not at all.

An entry's key is a digest of all that its value depends on: the pixels that the autoencoder sees (so the photo, the crop, the flip and the
size, whatever their names or order) or the prompt, the arithmetic that computes it, and on disk the weights that do. Nothing is known by its
position in a list or by a step, and an entry that is damaged, or another's, is computed again and never served.

Latents are kept as the mean and the standard deviation of the autoencoder's posterior and sampled anew at each step. Every image and every
prompt is encoded by itself, kept or not: what comes back does not depend on the rest of its batch, so runs with and without a cache are equal
bit for bit.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dreambooth.base.protocol import BaseModel
from dreambooth.files import write_tensors

Tensors = dict[str, Tensor]


class Store(ABC):
    """Named tensors on the CPU by key."""

    persistent = False  # whether entries outlive the process, and so need keys that name the weights

    @abstractmethod
    def get(self, key: str) -> Tensors | None:
        """Returns what was put under a key; None where it is not there, or no longer whole."""

    @abstractmethod
    def put(self, key: str, tensors: Tensors) -> None:
        """Keeps tensors under a key, if there is room."""


class NoStore(Store):
    """Keeps nothing."""

    def get(self, key: str) -> Tensors | None:
        """Returns None."""
        return None

    def put(self, key: str, tensors: Tensors) -> None:
        """Does nothing."""


class MemoryStore(Store):
    """Keeps the entries that were used last, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self.entries: OrderedDict[str, Tensors] = OrderedDict()

    def get(self, key: str) -> Tensors | None:
        """Returns an entry, which now counts as the newest."""
        if key in self.entries:
            self.entries.move_to_end(key)
        return self.entries.get(key)

    def put(self, key: str, tensors: Tensors) -> None:
        """Keeps an entry and drops the oldest ones that no longer fit."""
        if _bytes(tensors) > self.max_bytes:
            return
        self.bytes += _bytes(tensors) - _bytes(self.entries.pop(key, {}))
        self.entries[key] = tensors
        while self.bytes > self.max_bytes:
            self.bytes -= _bytes(self.entries.popitem(last=False)[1])


class DiskStore(Store):
    """Keeps entries as safetensors files, written whole or not at all and checked when they are read; runs share the folder.

    It only grows: at `max_bytes` nothing more is written. To empty it, delete the folder.

    Args:
        folder: made when missing.
        max_bytes: of all entries in the folder.
    """

    persistent = True

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.bytes = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))

    def path(self, key: str) -> Path:
        """Returns the file of an entry."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> Tensors | None:
        """Returns an entry whose key and checksum are right; None for any other file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path(key), framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        except (OSError, SafetensorError):  # not there, or not whole
            return None
        return tensors if about == {"entry": _label(key, tensors)} else None

    def put(self, key: str, tensors: Tensors) -> None:
        """Writes an entry, while there is room for it."""
        if self.bytes + _bytes(tensors) > self.max_bytes:
            return
        write_tensors(self.path(key), tensors, {"entry": _label(key, tensors)})
        self.bytes += _bytes(tensors)


class Caches:
    """What the training step asks for latents and text embeddings.

    Args:
        base: the live model, whose autoencoder is frozen.
        store: where entries are kept.
        dtype: of the latents that are kept; float32 is exact.

    Attributes:
        computed, found: how many encodings were computed, and how many came from the store.
    """

    def __init__(self, base: BaseModel, store: Store, dtype: torch.dtype = torch.float32) -> None:
        self.base, self.store, self.dtype = base, store, dtype
        self.computed = self.found = 0
        self._digests: dict[str, str] = {}  # of the weights, computed when they are first needed

    def latents(self, pixel_values: Tensor, contents: Sequence[str] | None, noise: Tensor) -> Tensor:
        """Returns latents (B, C, h, w) float32 as `base.encode_images` does, sampled with the noise of this step.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1].
            contents: a digest of each image's pixels; None: unknown, so nothing is kept.
            noise: (B, C, h, w) standard normal.
        """
        rows = []
        for row, pixels in enumerate(pixel_values):
            about = {"content": contents[row], "weights": self._weights("vae")} if contents else None
            rows.append(self._entry("latents", about, lambda own=pixels: self._distribution(own)))
        mean, std = (torch.cat([row[name].to(self.base.device, torch.float32) for row in rows]) for name in ("mean", "std"))  # (B, C, h, w)
        return mean + std * noise.to(mean)

    def embeddings(self, prompts: Sequence[str]) -> Tensor:
        """Returns text embeddings (B, L, D) as `base.encode_prompts` does; with gradients, and never kept, where the text encoder learns."""
        if text_learns(self.base):
            return self.base.encode_prompts(list(prompts))
        rows: dict[str, Tensor] = {}
        for prompt in dict.fromkeys(prompts):
            about = {"prompt": prompt, "weights": self._weights("text_encoder")}
            if self.store.persistent:
                about["tokens"] = self.base.tokenize([prompt]).tolist()  # the same words may be other tokens elsewhere
            rows[prompt] = self._entry("text", about, lambda own=prompt: self._text(own))["text"]
        return torch.cat([rows[prompt].to(self.base.device) for prompt in prompts])  # (B, L, D)

    def _distribution(self, pixels: Tensor) -> Tensors:
        """Returns the mean and the standard deviation of an image's latents, rounded to what is kept of them also when they are new."""
        alone = pixels.contiguous()[None]  # (1, 3, H, W); another layout in memory can give other last bits
        mean, std = self.base.latent_distribution(alone)  # (1, C, h, w)
        return {"mean": mean.to(self.dtype), "std": std.to(self.dtype)}

    @torch.no_grad()
    def _text(self, prompt: str) -> Tensors:
        return {"text": self.base.encode_prompts([prompt])}  # (1, L, D)

    def _entry(self, kind: str, about: dict[str, object] | None, compute: Callable[[], Tensors]) -> Tensors:
        """Returns an entry from the store, or computes and keeps it; without `about` it is only computed."""
        if about is None:
            self.computed += 1
            return compute()
        key = entry_key(kind, about, self.base.device.type, self.dtype)
        found = self.store.get(key)
        if found is not None:
            self.found += 1
            return found
        self.computed += 1
        computed = compute()
        self.store.put(key, {name: tensor.detach().cpu() for name, tensor in computed.items()})
        return computed

    def _weights(self, part: str) -> str:
        """Returns the digest of a part's weights where entries outlive this process, and "" where they cannot."""
        if not self.store.persistent:
            return ""
        if part not in self._digests:
            self._digests[part] = module_digest(getattr(self.base, part))
        return self._digests[part]


def make_caches(base: BaseModel, kind: str, folder: Path, max_bytes: int, dtype: str = "float32") -> Caches:
    """Returns the caches of a run.

    Args:
        base: the live model.
        kind: "memory", "disk" or "off".
        folder: where a disk cache lies.
        max_bytes: the most that is kept.
        dtype: "float32" or "float16", of the latents that are kept.
    """
    stores: dict[str, Callable[[], Store]] = {
        "memory": lambda: MemoryStore(max_bytes),
        "disk": lambda: DiskStore(folder, max_bytes),
        "off": NoStore,
    }
    return Caches(base, stores[kind](), {"float32": torch.float32, "float16": torch.float16}[dtype])


def text_learns(base: BaseModel) -> bool:
    """Tells whether an attached method trains anything of the text encoder, the identifier's embedding included."""
    return any(name.startswith("text_encoder.") for name in base.learned)


def entry_key(kind: str, about: dict[str, object], device: str, dtype: torch.dtype) -> str:
    """Returns the hex digest of all that an encoding depends on.

    Args:
        kind: "latents" or "text".
        about: the content and the weights.
        device: "cpu", "cuda"; results differ in the last bits between kinds of device and versions of torch.
        dtype: that latents are kept in.
    """
    mixed = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"
    arithmetic = {"device": device, "torch": torch.__version__, "autocast": mixed, "kept_as": str(dtype)}
    return hashlib.sha256(json.dumps([kind, about, arithmetic], sort_keys=True).encode()).hexdigest()


def module_digest(module: nn.Module) -> str:
    """Returns a hex digest of a network's weights and config, as they are in memory; about a second a gigabyte."""
    config = module.config if isinstance(module.config, dict) else module.config.to_dict()
    told = {key: value for key, value in config.items() if not key.startswith("_")}  # not where it was loaded from
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _label(key: str, tensors: Tensors) -> str:
    """Returns the key with a checksum of the content: what a whole entry says of itself."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_raw(tensor))
    return f"{key} {digest.hexdigest()}"


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
