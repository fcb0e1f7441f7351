"""Models of the Hugging Face hub: the local cache first, the network only when it must and may be asked."""

import os
from pathlib import Path

from dreambooth.base.files import WEIGHT_NAMES, missing_files
from dreambooth.errors import UserError

CONFIG_PATTERNS = ["model_index.json", "*/config.json", "scheduler/*.json", "tokenizer/*"]


def is_offline() -> bool:
    """Tells whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids the network."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in {"1", "ON", "YES", "TRUE"}


def cached(repo_id: str, revision: str | None, variant: str | None, weights: bool = True) -> Path | None:
    """Returns the cached folder of a hub id when it is a whole model (or whole configs), else None. Never asks the network."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except OSError:
        return None
    return None if missing_files(folder, variant, weights) else folder


def fetch(repo_id: str, revision: str | None, variant: str | None, weights: bool = True, where: str = "base.path") -> Path:
    """Returns the local folder of a hub id, downloaded when the cache does not hold it.

    Args:
        repo_id: "owner/name".
        revision: branch, tag or commit; None: the default branch.
        variant: suffix of the weights files; None: plain names.
        weights: False: configs and tokenizer alone.
        where: the config path that an error starts with.

    Raises:
        UserError: not in the cache and the network is forbidden, or the hub does not give it.
    """
    folder = cached(repo_id, revision, variant, weights)
    if folder is not None:
        return folder
    if is_offline():
        rule = "must be a folder here, or a hub id in the local cache while HF_HUB_OFFLINE is set"
        raise UserError(where, rule, repo_id, "check the path, or download the model once while online")
    for suffix in (".safetensors", ".bin"):
        folder = _download(repo_id, revision, _patterns(variant, suffix, weights), where)
        if not missing_files(folder, variant, weights):
            break
    return folder


def _patterns(variant: str | None, suffix: str, weights: bool) -> list[str]:
    """Returns the file patterns to download: the configs, and the weights in one format."""
    middle = f".{variant}" if variant else ""
    stems = [(part, names[0 if suffix == ".safetensors" else 1]) for part, names in WEIGHT_NAMES.items()]
    endings = (f"{middle}{suffix}", f"-*-of-*{suffix}", f"{suffix}.index{middle}.json")  # one file, or shards and their index
    names = [f"{part}/{stem}{ending}" for part, stem in stems for ending in endings]
    return CONFIG_PATTERNS + (names if weights else [])


def _download(repo_id: str, revision: str | None, patterns: list[str], where: str) -> Path:
    """Returns the folder of a download; every way in which the hub can refuse becomes one sentence."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        rule = f"must be a folder here or a model that the hub gives ({type(error).__name__}: {reason})"
        raise UserError(where, rule, repo_id, "check the spelling, your access to it and the network") from None
