"""A model as one LDM file, the layout that other image tools read: tables of names, pure functions over state dicts, and one writer.

LDM is the code of Rombach et al. 2022 (CompVis/latent-diffusion). Its file holds three networks under three prefixes; Stable Diffusion 1
has a CLIP text encoder under the names of transformers, Stable Diffusion 2 one under the names of OpenCLIP with query, key and value fused.
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreambooth.base.files import LDM_PREFIXES
from dreambooth.base.protocol import BaseModel, quiet
from dreambooth.errors import UserError
from dreambooth.files import write_tensors

StateDict = dict[str, Tensor]

UNET_ENDS = (
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("conv_in", "input_blocks.0.0"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_PATTERNS = (
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.down.\1.block.\2"),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)", r"decoder.up.\1.block.\2"),
    (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0", r"decoder.up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)
OPENCLIP_PATTERNS = (
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^encoder\.layers\.(\d+)\.layer_norm([12])\.", r"transformer.resblocks.\1.ln_\2."),
    (r"^encoder\.layers\.(\d+)\.mlp\.fc1\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (r"^encoder\.layers\.(\d+)\.mlp\.fc2\.", r"transformer.resblocks.\1.mlp.c_proj."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"transformer.resblocks.\1.attn.out_proj."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.q_proj\.", r"transformer.resblocks.\1.attn.in_proj_"),
)
MODELSPEC_PREDICTION = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}  # modelspec 1.0.0, prediction_type


def save_single_file(model: BaseModel, path: str | Path, dtype: torch.dtype = torch.float16, metadata: dict[str, str] | None = None) -> Path:
    """Writes a model as one LDM .safetensors file and returns its path.

    It is written beside its final name and renamed at the end; a file that was there before is replaced.

    Args:
        model: a Stable Diffusion 1 or 2 model with nothing attached (merge a LoRA first).
        path: ends in .safetensors.
        dtype: of the tensors in the file.
        metadata: free text by name, kept in the file's head beside what the model predicts (`modelspec.prediction_type`).

    Raises:
        UserError: another ending, weights that the dtype cannot hold, or a model whose schedule no such file can carry.
        ValueError: the model has tensors that LDM has no name for.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError("export path", "must end in .safetensors", str(path), "name another file")
    if model.scheduler.config.get("rescale_betas_zero_snr"):
        rule = "must be a folder for a model with zero terminal SNR: a single file carries no schedule, and tools would assume the usual one"
        raise UserError("export path", rule, str(path), "leave out .safetensors to get a diffusers folder")
    tensors = {name: tensor.to("cpu", dtype) for name, tensor in model_to_ldm(model).items()}
    lost = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if lost:
        raise UserError(str(path), f"cannot hold {lost[0]} in {dtype}: it is not finite there", next_step="take bfloat16 or float32")
    notes = {"format": "pt", "modelspec.prediction_type": MODELSPEC_PREDICTION[model.prediction_type], **(metadata or {})}
    return write_tensors(path, tensors, notes)


def max_difference_after_reload(model: BaseModel, path: str | Path) -> float:
    """Returns the largest absolute difference between a model's weights, in the file's dtype, and what diffusers reads from the file.

    Zero says that the file holds exactly this model under names that others understand; infinity that a tensor is missing or not finite.

    Args:
        model: the model that was written.
        path: an LDM file, from `save_single_file`.
    """
    from dreambooth.base.stable_diffusion import StableDiffusion

    dtype = _file_dtype(Path(path))
    with tempfile.TemporaryDirectory() as layout:
        _write_layout(model, Path(layout))
        reloaded = StableDiffusion(path=str(path), config_path=layout).load(dtype)
    worst = 0.0
    for part in LDM_PREFIXES:
        there = getattr(reloaded, part).state_dict()
        for name, tensor in getattr(model, part).state_dict().items():
            if name not in there:
                return float("inf")
            difference = (tensor.to("cpu", dtype).double() - there[name].double()).abs().max().item()
            worst = max(worst, float("inf") if difference != difference else difference)
    return worst


def model_to_ldm(model: BaseModel) -> StateDict:
    """Returns the LDM state dict of a live model; tensors share memory with it where their shape allows."""
    unet, vae, text_encoder = model.unet, model.vae, model.text_encoder
    is_openclip = text_encoder.config.hidden_act != "quick_gelu"  # OpenCLIP's own sign: it was trained with the plain gelu
    text_to_ldm: Callable[[StateDict], StateDict] = openclip_to_ldm if is_openclip else clip_to_ldm
    return {
        **unet_to_ldm(unet.state_dict(), unet.config),
        **vae_to_ldm(vae.state_dict(), len(vae.config.block_out_channels)),
        **text_to_ldm(text_encoder.state_dict()),
    }


def unet_to_ldm(state: StateDict, config: dict[str, Any]) -> StateDict:
    """Returns a UNet's tensors under their LDM names; shapes and values stay.

    Args:
        state: of a UNet2DConditionModel.
        config: its `block_out_channels`, `layers_per_block`, `down_block_types` and `up_block_types`.

    Raises:
        ValueError: a tensor that LDM has no name for, as that of an attached adapter.
    """
    blocks = dict(unet_blocks(config))
    renamed = {}
    for name, tensor in state.items():
        source = next((block for block in blocks if name.startswith(block + ".")), None)
        if source is None:
            raise ValueError(f"{name} of the unet has no place in an LDM file; merge adapters before the export")
        tail = name[len(source) + 1 :]
        if ".resnets." in source:
            layer, _, rest = tail.partition(".")
            tail = f"{UNET_RESNET.get(layer, layer)}.{rest}"
        renamed[f"{LDM_PREFIXES['unet']}{blocks[source]}.{tail}"] = tensor
    return renamed


def unet_blocks(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (diffusers name, LDM name) of every block of a UNet.

    LDM numbers its blocks in one row: the first convolution is input block 0, each residual layer is one more, and so is each
    downsampler; an upsampler is the last member of the output block that it follows.
    """
    yield from UNET_ENDS
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    number = 1
    for level, kind in enumerate(config["down_block_types"]):
        for layer in range(layers):
            yield f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{number}.0"
            if "CrossAttn" in kind:
                yield f"down_blocks.{level}.attentions.{layer}", f"input_blocks.{number}.1"
            number += 1
        if level < levels - 1:
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for level, kind in enumerate(config["up_block_types"]):
        for layer in range(layers + 1):
            yield f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{number}.0"
            if "CrossAttn" in kind:
                yield f"up_blocks.{level}.attentions.{layer}", f"output_blocks.{number}.1"
            if layer == layers and level < levels - 1:
                yield f"up_blocks.{level}.upsamplers.0", f"output_blocks.{number}.{2 if 'CrossAttn' in kind else 1}"
            number += 1


def vae_to_ldm(state: StateDict, levels: int) -> StateDict:
    """Returns an autoencoder's tensors under their LDM names.

    LDM counts the decoder's levels from the finest, diffusers from the coarsest; LDM's attention is made of 1 x 1 convolutions.

    Args:
        state: of an AutoencoderKL.
        levels: its number of resolutions.
    """
    renamed = {}
    for name, tensor in state.items():
        if ".attentions.0.to_" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # (out, in, 1, 1)
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", name)
        renamed[LDM_PREFIXES["vae"] + _rename(name, VAE_PATTERNS)] = tensor
    return renamed


def clip_to_ldm(state: StateDict) -> StateDict:
    """Returns a CLIP text encoder's tensors under their names in Stable Diffusion 1, with or without `text_model.` in front at first."""
    return {f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in state.items()}


def openclip_to_ldm(state: StateDict) -> StateDict:
    """Returns an OpenCLIP text encoder's tensors under their names in Stable Diffusion 2, query, key and value fused by rows."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    renamed = {}
    for name, tensor in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([state[name.replace(".q_proj.", f".{kind}_proj.")] for kind in "qkv"])  # (3 * width, ...)
        renamed["cond_stage_model.model." + _rename(name, OPENCLIP_PATTERNS)] = tensor
    return renamed


def _rename(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    """Returns a name after all patterns of a table, in order."""
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def _file_dtype(path: Path) -> torch.dtype:
    """Returns the dtype of the first tensor of a .safetensors file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


def _write_layout(model: BaseModel, folder: Path) -> None:
    """Writes the configs and the tokenizer of a model, no weights, as a diffusers folder."""
    with quiet():
        pipeline = model.pipeline()
        pipeline.save_config(folder)
        for part in ("unet", "vae"):
            getattr(model, part).save_config(folder / part)
        model.text_encoder.config.save_pretrained(folder / "text_encoder")
        model.tokenizer.save_pretrained(folder / "tokenizer")
        pipeline.scheduler.save_pretrained(folder / "scheduler")
