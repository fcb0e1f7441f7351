"""LDM names at the true sizes of Stable Diffusion 1.5 and 2.1, on the meta device: shapes without memory."""

import pytest
import torch
from tiny_pipelines import build_networks

from dreambooth.interop.ldm import clip_to_ldm, openclip_to_ldm, unet_to_ldm, vae_to_ldm

TRUE_SIZES = {
    "sd1": ((859_520_964, 83_653_863, 123_060_480), (686, 248, 196)),
    "sd2": ((865_910_724, 83_653_863, 340_387_840), (686, 248, 372)),
}
KNOWN_NAMES = {  # LDM name -> shape, written by hand
    "sd1": {
        "model.diffusion_model.time_embed.0.weight": (1280, 320),
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.8.2.conv.weight": (640, 640, 3, 3),
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.decoder.norm_out.weight": (128,),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "first_stage_model.post_quant_conv.bias": (4,),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight": (768, 768),
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,),
    },
    "sd2": {
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.token_embedding.weight": (49408, 1024),
        "cond_stage_model.model.ln_final.weight": (1024,),
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_bias": (3072,),
        "cond_stage_model.model.transformer.resblocks.22.attn.out_proj.weight": (1024, 1024),
        "cond_stage_model.model.transformer.resblocks.22.mlp.c_fc.weight": (4096, 1024),
        "cond_stage_model.model.transformer.resblocks.22.mlp.c_proj.bias": (1024,),
        "cond_stage_model.model.transformer.resblocks.22.ln_2.weight": (1024,),
    },
}


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def true_size(request: pytest.FixtureRequest) -> tuple[str, tuple]:
    with torch.device("meta"):
        return request.param, build_networks(request.param, "sd15", vocabulary=49408)


def to_ldm(family: str, networks: tuple) -> dict[str, torch.Tensor]:
    unet, vae, text_encoder = networks
    text_to_ldm = clip_to_ldm if family == "sd1" else openclip_to_ldm
    text = text_to_ldm(text_encoder.state_dict())
    return {**unet_to_ldm(unet.state_dict(), unet.config), **vae_to_ldm(vae.state_dict(), 4), **text}


def test_true_size_has_the_published_counts(true_size: tuple[str, tuple]) -> None:
    family, networks = true_size
    parameters, tensors = TRUE_SIZES[family]
    assert tuple(sum(parameter.numel() for parameter in network.parameters()) for network in networks) == parameters
    assert tuple(len(network.state_dict()) for network in networks) == tensors


def test_true_size_has_the_known_ldm_names(true_size: tuple[str, tuple]) -> None:
    family, networks = true_size
    shapes = {name: tuple(tensor.shape) for name, tensor in to_ldm(family, networks).items()}
    assert {name: shapes.get(name) for name in KNOWN_NAMES[family]} == KNOWN_NAMES[family]


def test_true_size_has_686_248_and_196_names_under_the_prefixes(true_size: tuple[str, tuple]) -> None:
    family, networks = true_size
    names = list(to_ldm(family, networks))
    prefixes = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
    counts = [sum(name.startswith(prefix) for name in names) for prefix in prefixes]
    text = 196 if family == "sd1" else 23 * 12 + 4  # OpenCLIP: twelve tensors a layer, two embeddings, one norm
    assert counts == [686, 248, text]
