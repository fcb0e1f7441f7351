"""LoRA files in the two layouts that are in use: diffusers', with the adapter's own description, and kohya's, which web UIs read.

Both hold the same matrices. Diffusers' keys are `unet.<layer>.lora_A.weight` and the scale stands in the metadata (without it the
loader takes alpha = rank); kohya's are `lora_unet_<layer with _>.lora_down.weight`, with one `.alpha` a layer.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.adapters.peft_layers import ADAPTER, adapter_layers
from dreambooth.base.protocol import BaseModel
from dreambooth.files import write_tensors

StateDict = dict[str, Tensor]

PARTS = ("unet", "text_encoder")
DIFFUSERS_PREFIXES = {"unet": "unet.", "text_encoder": "text_encoder.text_model."}
KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
KOHYA_MATRICES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
MAGNITUDE = "lora_magnitude_vector"  # DoRA's lengths
# peft wants the name as it is, transformers, which loads the text encoder's part, as that of a parameter.
DIFFUSERS_MAGNITUDES = {"unet": MAGNITUDE, "text_encoder": f"{MAGNITUDE}.weight"}
ARCHITECTURES = {"quick_gelu": ("sd_v1", "stable-diffusion-v1/lora"), "gelu": ("sd_v2", "stable-diffusion-v2-1/lora")}  # by the text encoder


def has_lora(base: BaseModel) -> bool:
    """Tells whether adapters are attached to a base."""
    return any(adapter_layers(getattr(base, part)) for part in PARTS)


def has_dora(base: BaseModel) -> bool:
    """Tells whether the adapters attached to a base learn lengths apart from directions."""
    return any(ADAPTER in place.layer.lora_magnitude_vector for part in PARTS for place in adapter_layers(getattr(base, part)))


def lora_matrices(network: nn.Module) -> dict[str, StateDict]:
    """Returns the matrices of each adapter layer, by the layer's dotted name and then as `lora_A.weight`, ...; detached."""
    found = {}
    for place in adapter_layers(network):
        matrices = {f"lora_{kind}.weight": getattr(place.layer, f"lora_{kind}")[ADAPTER].weight.detach() for kind in "AB"}
        if ADAPTER in place.layer.lora_magnitude_vector:
            matrices[MAGNITUDE] = place.layer.lora_magnitude_vector[ADAPTER].weight.detach()
        found[place.path] = matrices
    return found


def diffusers_lora(base: BaseModel, dtype: torch.dtype) -> tuple[StateDict, dict[str, str]]:
    """Returns the tensors and the metadata of a LoRA file in diffusers' layout."""
    tensors: StateDict = {}
    about: dict[str, Any] = {}
    for part in PARTS:
        network = getattr(base, part)
        for layer, matrices in lora_matrices(network).items():
            names = {MAGNITUDE: DIFFUSERS_MAGNITUDES[part]}
            tensors |= {f"{DIFFUSERS_PREFIXES[part]}{layer}.{names.get(name, name)}": tensor.to(dtype) for name, tensor in matrices.items()}
        if hasattr(network, "peft_config"):
            about |= {f"{part}.{key}": _plain(value) for key, value in network.peft_config[ADAPTER].to_dict().items()}
    return tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(about, sort_keys=True)}


def kohya_lora(base: BaseModel, dtype: torch.dtype) -> StateDict:
    """Returns the tensors of a LoRA file in kohya's layout, with the true alpha of every layer; not for DoRA."""
    tensors: StateDict = {}
    for part in PARTS:
        for place in adapter_layers(getattr(base, part)):
            name = KOHYA_PREFIXES[part] + place.path.replace(".", "_")
            tensors[f"{name}.alpha"] = torch.tensor(float(place.layer.lora_alpha[ADAPTER]), dtype=dtype)
        for layer, matrices in lora_matrices(getattr(base, part)).items():
            name = KOHYA_PREFIXES[part] + layer.replace(".", "_")
            tensors |= {f"{name}.{KOHYA_MATRICES[matrix]}": tensor.to(dtype) for matrix, tensor in matrices.items()}
    return tensors


def kohya_metadata(base: BaseModel, title: str, steps: int, plain_config: dict[str, Any]) -> dict[str, str]:
    """Returns what image tools show of a LoRA file: the `ss_` keys of kohya's scripts and those of modelspec 1.0.1.

    Args:
        base: with the adapters attached.
        title: of the model.
        steps: after which the weights were taken.
        plain_config: of the run, as in run.json.
    """
    layer = next(place.layer for part in PARTS for place in adapter_layers(getattr(base, part)))
    version, architecture = ARCHITECTURES["quick_gelu" if base.text_encoder.config.hidden_act == "quick_gelu" else "gelu"]
    optim, subject = plain_config["optim"], plain_config["subject"]
    return {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(layer.r[ADAPTER]),
        "ss_network_alpha": str(float(layer.lora_alpha[ADAPTER])),
        "ss_base_model_version": version,
        "ss_v2": str(version == "sd_v2"),
        "ss_output_name": title,
        "ss_steps": str(steps),
        "ss_seed": str(plain_config["seed"]),
        "ss_unet_lr": str(optim["learning_rate"]),
        "ss_text_encoder_lr": str(optim["text_encoder_learning_rate"]),
        "ss_optimizer": optim["name"],
        "ss_resolution": str(plain_config["data"]["resolution"]),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.title": title,
        "modelspec.resolution": f"{base.resolution}x{base.resolution}",
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}.get(base.prediction_type, base.prediction_type),
        "modelspec.trigger_phrase": f"{subject['identifier']} {subject['class_noun']}",
        "dreambooth": json.dumps({"step": steps, "config": plain_config}, sort_keys=True),
    }


def save_diffusers_lora(base: BaseModel, path: Path, dtype: torch.dtype) -> Path:
    """Writes the attached adapters as one file for `load_lora_weights` of diffusers."""
    return write_tensors(path, *diffusers_lora(base, dtype))


def save_kohya_lora(base: BaseModel, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> Path:
    """Writes the attached adapters as one file for web UIs."""
    return write_tensors(path, kohya_lora(base, dtype), metadata)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
