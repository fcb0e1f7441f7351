"""The files of a model: is all there and readable, which family is it, what is its content hash. Reads configs and headers, no weights."""

import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from dreambooth.base.protocol import PREDICTION_TYPES
from dreambooth.errors import UserError

WEIGHT_NAMES = {
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "text_encoder": ("model", "pytorch_model"),
}  # part -> stem of its .safetensors file, stem of its .bin file
PART_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
LDM_PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
SD1_TEXT_KEY = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
SD2_TEXT_KEY = "cond_stage_model.model.token_embedding.weight"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


class Header(NamedTuple):
    """What the head of a weights file says.

    Attributes:
        shapes: tensor name -> shape.
        metadata: free text by name (safetensors only).
    """

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


class SingleFile(NamedTuple):
    """What an LDM file turns out to be.

    Attributes:
        family: "sd1" (CLIP text encoder) or "sd2" (OpenCLIP text encoder).
        cross_width: width of the text that the network attends to; 768 in SD1, 1024 in SD2.
        prediction_type: what the file's metadata says; None where it is silent, as nearly all files are.
    """

    family: str
    cross_width: int
    prediction_type: str | None


def read_json(path: Path, where: str) -> dict[str, Any]:
    """Returns the object in a JSON file; a UserError that starts with `where` when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(where, f"must name readable configs, but {path} is not: {error}", next_step="copy that file again") from None
    if not isinstance(content, dict):
        raise UserError(where, f"must name readable configs, but {path} is no JSON object", next_step="copy that file again")
    return content


def weights_of(folder: Path, part: str, variant: str | None = None) -> list[Path]:
    """Returns the weights files of a part that are there, .safetensors first; an empty list when any is missing.

    Args:
        folder: a diffusers folder.
        part: "unet", "vae" or "text_encoder".
        variant: as "fp16" in diffusion_pytorch_model.fp16.safetensors; None: plain names.
    """
    middle = f".{variant}" if variant else ""
    for stem, suffix in zip(WEIGHT_NAMES[part], (".safetensors", ".bin"), strict=True):
        single = folder / part / f"{stem}{middle}{suffix}"
        if single.is_file():
            return [single]
        index = folder / part / f"{stem}{suffix}.index{middle}.json"
        if index.is_file():
            shards = sorted(set(read_json(index, "base.path").get("weight_map", {}).values()))
            files = [folder / part / shard for shard in shards]
            return [index, *files] if files and all(file.is_file() for file in files) else []
    return []


def missing_files(folder: Path, variant: str | None = None, weights: bool = True) -> list[str]:
    """Returns the names, relative to the folder, of what a diffusers folder lacks to be a whole model.

    Args:
        folder: a diffusers folder.
        variant: see `weights_of`.
        weights: False: ask for the configs and the tokenizer alone.
    """
    configs = ["model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in WEIGHT_NAMES)]
    missing = [name for name in configs if not (folder / name).is_file()]
    tokenizer = folder / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file() and not all((tokenizer / name).is_file() for name in ("vocab.json", "merges.txt")):
        missing.append("tokenizer/tokenizer.json")
    middle = f".{variant}" if variant else ""
    for part, (stem, _) in WEIGHT_NAMES.items():
        if weights and not weights_of(folder, part, variant):
            missing.append(f"{part}/{stem}{middle}.safetensors")
    return missing


def model_files(folder: Path, variant: str | None = None, weights: bool = True) -> list[Path]:
    """Returns the files of a diffusers folder that decide what the model does, in a fixed order."""
    names = ["model_index.json", "scheduler/scheduler_config.json", *(f"tokenizer/{name}" for name in TOKENIZER_FILES)]
    files = [folder / name for name in [*names, *(f"{part}/config.json" for part in WEIGHT_NAMES)]]
    for part in WEIGHT_NAMES:
        files += weights_of(folder, part, variant) if weights else []
    return [file for file in files if file.is_file()]


def check_folder(folder: Path, variant: str | None = None, weights: bool = True, where: str = "base.path") -> None:
    """Raises a UserError when a diffusers folder is no whole, readable Stable Diffusion 1 or 2 text-to-image model.

    Args:
        folder: the folder.
        variant: see `weights_of`.
        weights: False: only its configs and tokenizer are needed.
        where: the config path that the sentence starts with.
    """
    if not (folder / "model_index.json").is_file():
        raise UserError(where, "must be a diffusers folder (one that holds model_index.json)", str(folder), "check the path")
    index = read_json(folder / "model_index.json", where)
    if index.get("_class_name") not in PIPELINES:
        rule = f"must hold a Stable Diffusion 1 or 2 model, but {folder} is a {index.get('_class_name')}"
        raise UserError(where, rule, next_step="name another model: other families are not supported")
    missing = missing_files(folder, variant, weights)
    if missing:
        rule = f"must hold every part of the model, but {folder} lacks {', '.join(missing)}"
        raise UserError(where, rule, next_step="copy or download the model again")
    _check_configs(folder, where)
    for part in WEIGHT_NAMES:
        for file in weights_of(folder, part, variant) if weights else []:
            if file.suffix != ".json":
                read_header(file, where)


def _check_configs(folder: Path, where: str) -> None:
    """Raises a UserError when the configs describe a model that this family cannot train."""
    configs = {part: read_json(folder / part / "config.json", where) for part in WEIGHT_NAMES}
    for part in ("unet", "vae"):
        if configs[part].get("_class_name") != PART_CLASSES[part]:
            rule = f"must have a {PART_CLASSES[part]} as its {part}, but {folder} has a {configs[part].get('_class_name')}"
            raise UserError(where, rule, next_step="name another model")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", where)
    if scheduler.get("prediction_type", "epsilon") not in PREDICTION_TYPES:
        rule = f"must predict one of {', '.join(PREDICTION_TYPES)}, but the scheduler of {folder} says otherwise"
        raise UserError(where, rule, scheduler["prediction_type"], "name another model")
    _check_channels(configs["unet"].get("in_channels", 4), configs["vae"].get("latent_channels", 4), folder, where)


def _check_channels(in_channels: int, latent_channels: int, path: Path, where: str) -> None:
    """Raises a UserError when the network does not take plain latents (an inpainting or depth model, for one)."""
    if in_channels != latent_channels:
        kind = "an inpainting model" if in_channels == 2 * latent_channels + 1 else "a model with extra inputs"
        rule = f"must take {latent_channels} latent channels, but {path} is {kind} with {in_channels}"
        raise UserError(where, rule, next_step="name the plain text-to-image model; inpainting works with that one too")


def read_header(path: Path, where: str = "base.path") -> Header:
    """Returns the tensor names and shapes of a .safetensors, .ckpt or .bin file, without reading the weights or running what is in it.

    Raises:
        UserError: the file is cut off, no weights file, or a pickle that holds anything but plain tensors and numbers.
    """
    return _safetensors_header(path, where) if path.suffix == ".safetensors" else _pickle_header(path, where)


def _safetensors_header(path: Path, where: str) -> Header:
    """Returns the header of a .safetensors file (format: 8 bytes of length, then JSON, then the data)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 0 < length <= min(size, MAX_HEADER_BYTES) else b""
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(where, f"must be a .safetensors file, but {path} has no readable header", next_step="download it again") from None
    if 8 + length + end != size:
        rule = f"must be a whole file, but {path} has {size} bytes where its header asks for {8 + length + end}"
        raise UserError(where, rule, next_step="download it again")
    return Header(shapes, metadata)


def _pickle_header(path: Path, where: str) -> Header:
    """Returns the header of a .ckpt or .bin file: PyTorch's restricted unpickler runs no code, and the meta device reads no weights."""
    import pickle

    import torch

    try:
        content = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {foreign[1]}" if foreign else type(error).__name__
        rule = f"must hold plain tensors, but {path} cannot be read safely ({reason})"
        raise UserError(where, rule, next_step="convert it to .safetensors where you trust it, and name that file") from None
    while isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    tensors = content.items() if isinstance(content, dict) else ()
    return Header({name: tuple(value.shape) for name, value in tensors if isinstance(value, torch.Tensor)}, {})


def read_single_file(path: Path, where: str = "base.path") -> SingleFile:
    """Returns what an LDM single file is.

    Raises:
        UserError: unreadable, or not a whole Stable Diffusion 1 or 2 text-to-image model.
    """
    shapes, metadata = read_header(path, where)
    if any(name.startswith("conditioner.embedders.") for name in shapes):
        raise UserError(where, f"must hold a Stable Diffusion 1 or 2 model, but {path} is SDXL", next_step="name another model")
    if shapes and all("lora_" in name or name.endswith(".alpha") for name in shapes):
        raise UserError(where, f"must hold a whole model, but {path} is a LoRA", next_step="name the base model that it was made for")
    missing = [prefix for prefix in LDM_PREFIXES.values() if not any(name.startswith(prefix) for name in shapes)]
    if missing:
        rule = f"must hold a whole Stable Diffusion model, but {path} has no tensors under {', '.join(missing)}"
        raise UserError(where, rule, next_step="name a full checkpoint")
    if SD1_TEXT_KEY not in shapes and SD2_TEXT_KEY not in shapes:
        rule = f"must hold the text encoder of Stable Diffusion 1 or 2, but {path} has neither {SD1_TEXT_KEY} nor {SD2_TEXT_KEY}"
        raise UserError(where, rule, next_step="name another file")
    width = next((shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), 0)
    latent_channels = shapes.get("first_stage_model.decoder.conv_in.weight", (0, 4))[1]
    _check_channels(shapes.get("model.diffusion_model.input_blocks.0.0.weight", (0, 0))[1], latent_channels, path, where)
    told = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}.get(metadata.get("modelspec.prediction_type", ""))
    return SingleFile("sd1" if SD1_TEXT_KEY in shapes else "sd2", width, told)


def files_digest(files: dict[str, Path]) -> str:
    """Returns a sha256 in hex over names and contents, whatever the order and the folder they lie in."""
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name}\0{_file_digest(files[name])}\n".encode())
    return total.hexdigest()


def _file_digest(path: Path) -> str:
    """Returns the sha256 of a file in hex; the hub's cache names its large files by it, so those are not read."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and len(blob.name) == 64:
        return blob.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
