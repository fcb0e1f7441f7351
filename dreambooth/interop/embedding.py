"""A learned word as an embedding file: one safetensors tensor under the word's name, as diffusers and web UIs read it."""

from pathlib import Path

import torch
from torch import Tensor

from dreambooth.adapters.token_rows import TokenRows
from dreambooth.base.protocol import BaseModel
from dreambooth.files import write_tensors


def embedding_name(rows: TokenRows, base: BaseModel, identifier: str) -> str:
    """Returns the word under which others load the embedding: the identifier, in <> where their tokenizer has an entry of that name."""
    plain = rows.old_tokenizer or base.tokenizer
    return f"<{identifier}>" if identifier in plain.get_vocab() else identifier


def embedding_state(rows: TokenRows, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns {word: vectors}, with vectors (k, D): the identifier's tokens in their order."""
    return {name: rows.vectors().to("cpu", dtype)}


def save_embedding(path: Path, state: dict[str, Tensor], prompt: str) -> Path:
    """Writes an embedding file, with an example of its use in the metadata."""
    return write_tensors(path, state, {"format": "pt", "dreambooth.prompt": prompt})
