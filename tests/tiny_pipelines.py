"""Stable Diffusion folders with random weights and a real CLIP tokenizer, made in about a second, offline, for tests."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

WORDS = (
    "a photo picture painting of sks ohwx zwx the in on with at and red blue green old small dog cat robot backpack toy vase teapot "
    "car duck snow jungle beach desert moon grass table street city forest background mountain hat glasses top wheat purple"
).split()


class Layout(NamedTuple):
    """The constructor arguments of the three networks of a pipeline."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]


def build_tiny(folder: str | Path, family: str = "sd1", prediction_type: str = "epsilon", size: str = "tiny", seed: int = 0) -> Path:
    """Writes a stock diffusers folder with random weights and returns it; the same arguments give the same bytes.

    Args:
        folder: where to; made.
        family: "sd1" (CLIP text, convolutions around attention) or "sd2" (OpenCLIP text, linear layers there, heads per level).
        prediction_type: "epsilon", "v_prediction" or "sample"; written in the scheduler's config.
        size: "tiny" (64 px, latents 8 x 8, 1.2 M parameters), "mid" (512 px, 85 M, for benchmarks) or "sd15" (the family's true size).
        seed: of the weights.
    """
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from transformers.utils import logging

    folder = Path(folder)
    tokenizer = build_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet, vae, text_encoder = build_networks(family, size, vocabulary=len(tokenizer))
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDPMScheduler(**betas, clip_sample=False, steps_offset=1, prediction_type=prediction_type)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    logging.disable_progress_bar()
    pipeline.save_pretrained(folder)
    return folder


def build_networks(family: str, size: str, vocabulary: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Returns an UNet, an autoencoder and a text encoder in eval mode, on torch's current default device ("meta" costs nothing).

    Args:
        family: "sd1" or "sd2".
        size: "tiny", "mid" or "sd15"; the last has CLIP's true vocabulary of 49408 whatever `vocabulary` says.
        vocabulary: number of tokens; the end mark is the last of them.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    parts = layout(family, size)
    tokens = 49408 if size == "sd15" else vocabulary
    marks = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    text_config = CLIPTextConfig(vocab_size=tokens, max_position_embeddings=77, **marks, **parts.text_encoder)
    networks = UNet2DConditionModel(**parts.unet), AutoencoderKL(**parts.vae), CLIPTextModel(text_config)
    return tuple(network.eval() for network in networks)


def layout(family: str, size: str) -> Layout:
    """Returns the layout of a family at a size; "sd15" is the published one (Stable Diffusion 1.5 or 2.1)."""
    channels, layers, width, text_layers, vae_channels, cells = {
        "tiny": ((32, 64), 1, 32, 2, (32, 32, 32, 32), 8),
        "mid": ((96, 192, 384, 384), 2, 192, 6, (32, 64, 128, 128), 64),
        "sd15": ((320, 640, 1280, 1280), 2, 768, 12, (128, 256, 512, 512), 64),
    }[size]
    if family == "sd2":  # OpenCLIP ViT-H: wider, 24 layers of which the last is left out
        width, text_layers, cells = (1024, 23, 96) if size == "sd15" else (2 * width, text_layers, cells)
    blocks, heads = len(channels), [channel // (64 if size == "sd15" else 16) for channel in channels]
    unet = {
        "sample_size": cells,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ("CrossAttnDownBlock2D",) * (blocks - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (blocks - 1),
        "cross_attention_dim": width,
        "attention_head_dim": heads if family == "sd2" else 8,
        "use_linear_projection": family == "sd2",
        "norm_num_groups": 32,
    }
    vae = {
        "block_out_channels": vae_channels,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": layers,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "sample_size": cells * 8,
        "scaling_factor": 0.18215,
    }
    text_encoder = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": text_layers,
        "num_attention_heads": max(2, width // 64),
        "projection_dim": 512 if (family, size) == ("sd2", "sd15") else width,
        "hidden_act": "gelu" if family == "sd2" else "quick_gelu",
    }
    return Layout(unet, vae, text_encoder)


def build_tokenizer(folder: Path, words: list[str] = WORDS) -> Any:
    """Returns a CLIPTokenizer of 77 tokens whose vocabulary is all bytes and the given words, one token each.

    Args:
        folder: existing or not; vocab.json and merges.txt lie under it for a moment.
        words: lower case, in the order of their ids.
    """
    from transformers import CLIPTokenizer

    letters = [_byte_letter(byte) for byte in range(256)]
    vocabulary = dict.fromkeys(letters + [letter + "</w>" for letter in letters])  # a set that keeps its order
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        pieces = _pieces(word, merges)
        merges |= dict.fromkeys(("".join(pieces[:index]), pieces[index]) for index in range(1, len(pieces)))
    vocabulary |= dict.fromkeys(left + right for left, right in merges)
    vocabulary |= dict.fromkeys(("<|startoftext|>", "<|endoftext|>"))
    temporary = folder / "tokenizer_source"
    temporary.mkdir(parents=True)
    (temporary / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (temporary / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(temporary, model_max_length=77)
    shutil.rmtree(temporary)
    return tokenizer


def _byte_letter(byte: int) -> str:
    """Returns the printable letter that GPT-2's and CLIP's tokenizers write for a byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in printable].index(byte))


def _pieces(word: str, merges: dict[tuple[str, str], None]) -> list[str]:
    """Returns what byte pair encoding makes of a word: the earliest merge first, until none applies."""
    pieces, ranks = [*word[:-1], word[-1] + "</w>"], {pair: rank for rank, pair in enumerate(merges)}
    while pairs := [pair for pair in zip(pieces, pieces[1:], strict=False) if pair in ranks]:
        best = pairs.index(min(pairs, key=ranks.__getitem__))
        at = [index for index, pair in enumerate(zip(pieces, pieces[1:], strict=False)) if pair in ranks][best]
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
    return pieces
