"""CLIP and DINO folders with random weights, made in about a second, offline: the full protocol's scorers in tests."""

from pathlib import Path

import torch
from tiny_pipelines import build_tokenizer


def build_tiny_encoders(folder: Path) -> list[str]:
    """Writes a CLIP that reads 77 tokens and a DINO ViT; returns the words of the command line that select them."""
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    clip, dino = folder / "clip", folder / "dino"
    tokenizer = build_tokenizer(clip)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    last = len(tokenizer) - 1
    text = {**sizes, "vocab_size": last + 1, "max_position_embeddings": 77, "bos_token_id": last - 1, "eos_token_id": last}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=12)).save_pretrained(clip)
        ViTModel(ViTConfig(**sizes, image_size=28, patch_size=14), add_pooling_layer=False).save_pretrained(dino)
    tokenizer.save_pretrained(clip)
    return ["encoders=clip_dino", f"encoders.clip_path={clip}", f"encoders.dino_path={dino}"]


def build_tiny_dinov2(folder: Path) -> Path:
    """Writes a DINOv2 of 28 px and 24 features, whose layers do enough to tell images apart; returns the folder."""
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 24, "mlp_ratio": 2, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Dinov2Model(Dinov2Config(**sizes, initializer_range=0.3))
        for part in (model.layernorm.weight, model.layernorm.bias):  # 1 and 0 otherwise, which a missing norm would hardly change
            torch.nn.init.normal_(part, 0.5, 0.5)
        model.save_pretrained(folder)
    return folder
