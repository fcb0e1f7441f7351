"""LDM files: every weight comes back bit for bit through diffusers' own reader, under the names that other tools know."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import build_tiny

from dreambooth.base.files import read_header
from dreambooth.base.protocol import BaseModel
from dreambooth.base.stable_diffusion import StableDiffusion
from dreambooth.errors import UserError
from dreambooth.interop.ldm import (
    clip_to_ldm,
    max_difference_after_reload,
    model_to_ldm,
    openclip_to_ldm,
    save_single_file,
    unet_to_ldm,
    vae_to_ldm,
)

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("ldm") / request.param, family=request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> BaseModel:
    """Every parameter random: a fresh network has zeros and ones, which hide a swap of two names."""
    model = StableDiffusion(path=str(folder)).load()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05 + parameter.data
    return model


@pytest.fixture(scope="module", params=[".safetensors", ".ckpt"])
def file(request: pytest.FixtureRequest, model: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_single_file(model, tmp_path_factory.mktemp("file") / "model.safetensors", torch.float32)
    if request.param == ".safetensors":
        return path
    torch.save({"state_dict": load_file(path), "global_step": 7}, path.with_suffix(".ckpt"))
    return path.with_suffix(".ckpt")


@pytest.fixture(scope="module")
def written(model: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The .safetensors file alone, for what does not depend on the format."""
    return save_single_file(model, tmp_path_factory.mktemp("file") / "model.safetensors", torch.float32)


def test_single_file_gives_back_every_weight_bit_for_bit(model: BaseModel, file: Path, folder: Path) -> None:
    again = StableDiffusion(path=str(file), config_path=str(folder)).load()
    for part in PARTS:
        expected, got = getattr(model, part).state_dict(), getattr(again, part).state_dict()
        assert expected.keys() == got.keys()
        assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


def test_single_file_predicts_the_same(model: BaseModel, file: Path, folder: Path) -> None:
    again = StableDiffusion(path=str(file), config_path=str(folder)).load()
    noisy, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 800])
    text = model.encode_prompts(["a photo of sks dog", "cat"])
    assert torch.equal(again.encode_prompts(["a photo of sks dog", "cat"]), text)
    assert torch.equal(again.predict(noisy, t, text), model.predict(noisy, t, text))
    assert torch.equal(again.decode(noisy), model.decode(noisy))


def test_single_file_check_and_resolution_need_no_model(file: Path, folder: Path) -> None:
    choice = StableDiffusion(path=str(file), config_path=str(folder))
    choice.check()
    assert choice.native_resolution() == 64
    assert not choice.is_lab()


def test_single_file_digest_covers_weights_and_layout(written: Path, folder: Path, tmp_path: Path) -> None:
    first = StableDiffusion(path=str(written), config_path=str(folder)).digest()
    tensors = load_file(written)
    tensors["model.diffusion_model.out.2.bias"] += 1
    save_file(tensors, tmp_path / "other.safetensors")
    assert StableDiffusion(path=str(tmp_path / "other.safetensors"), config_path=str(folder)).digest() != first
    copied = tmp_path / "copied.safetensors"
    copied.write_bytes(written.read_bytes())
    assert StableDiffusion(path=str(copied), config_path=str(folder)).digest() == first


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_max_difference_after_reload_is_zero_in_the_files_dtype(model: BaseModel, tmp_path: Path, dtype: torch.dtype) -> None:
    path = save_single_file(model, tmp_path / "model.safetensors", dtype)
    assert max_difference_after_reload(model, path) == 0.0


def test_max_difference_after_reload_finds_a_changed_weight(model: BaseModel, written: Path, tmp_path: Path) -> None:
    tensors = load_file(written)
    tensors["first_stage_model.decoder.mid.attn_1.q.bias"][0] += 0.25
    save_file(tensors, tmp_path / "changed.safetensors")
    assert max_difference_after_reload(model, tmp_path / "changed.safetensors") == pytest.approx(0.25)


def test_single_file_keeps_what_the_model_predicts(folder: Path, tmp_path: Path) -> None:
    model = StableDiffusion(path=str(folder), prediction_type="v_prediction").load()
    path = save_single_file(model, tmp_path / "v.safetensors")
    assert StableDiffusion(path=str(path), config_path=str(folder)).load().prediction_type == "v_prediction"
    told = StableDiffusion(path=str(path), config_path=str(folder), prediction_type="epsilon")
    assert told.load().prediction_type == "epsilon"


def test_single_file_without_word_of_it_predicts_as_its_layout_does(written: Path, tmp_path: Path, folder: Path) -> None:
    save_file(load_file(written), tmp_path / "silent.safetensors")
    layout = StableDiffusion(path=str(folder)).load().save(tmp_path / "layout", prediction_type="v_prediction")
    assert StableDiffusion(path=str(tmp_path / "silent.safetensors"), config_path=str(layout)).load().prediction_type == "v_prediction"


def test_save_single_file_keeps_metadata(model: BaseModel, tmp_path: Path) -> None:
    path = save_single_file(model, tmp_path / "model.safetensors", metadata={"prompt": "a photo of sks dog"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "modelspec.prediction_type": "epsilon", "prompt": "a photo of sks dog"}


def test_save_single_file_leaves_one_file_that_others_may_read(model: BaseModel, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = save_single_file(model, tmp_path / "deep" / "model.safetensors")
    assert os.listdir(path.parent) == ["model.safetensors"]
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_save_single_file_refuses_another_ending(model: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^export path must end in .safetensors, got"):
        save_single_file(model, tmp_path / "model.ckpt")


def test_save_single_file_refuses_weights_that_overflow(folder: Path, tmp_path: Path) -> None:
    model = StableDiffusion(path=str(folder)).load()
    model.unet.conv_out.bias.data[0] = 1e5
    with pytest.raises(UserError, match="cannot hold model.diffusion_model.out.2.bias in torch.float16"):
        save_single_file(model, tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == []


def test_unet_to_ldm_refuses_a_tensor_without_a_place(model: BaseModel) -> None:
    with pytest.raises(ValueError, match="adapter.weight of the unet has no place in an LDM file"):
        unet_to_ldm({"adapter.weight": torch.zeros(1)}, model.unet.config)


def test_clip_names_are_the_same_from_both_versions_of_transformers() -> None:
    new = clip_to_ldm({"final_layer_norm.bias": torch.zeros(1)})
    old = clip_to_ldm({"text_model.final_layer_norm.bias": torch.zeros(1)})
    assert list(new) == list(old) == ["cond_stage_model.transformer.text_model.final_layer_norm.bias"]


def test_openclip_fuses_query_key_and_value_in_that_order() -> None:
    prefix = "text_model.encoder.layers.3.self_attn."
    state = {f"{prefix}{kind}_proj.bias": torch.full((2,), float(index)) for index, kind in enumerate("kqv")}
    fused = openclip_to_ldm(state)
    assert list(fused) == ["cond_stage_model.model.transformer.resblocks.3.attn.in_proj_bias"]
    assert fused["cond_stage_model.model.transformer.resblocks.3.attn.in_proj_bias"].tolist() == [1, 1, 0, 0, 2, 2]


def test_vae_attention_becomes_convolutions_of_one_pixel(model: BaseModel) -> None:
    renamed = vae_to_ldm(model.vae.state_dict(), 4)
    assert renamed["first_stage_model.encoder.mid.attn_1.proj_out.weight"].shape == (32, 32, 1, 1)


def test_model_to_ldm_takes_the_names_of_the_text_encoder(model: BaseModel, folder: Path, written: Path) -> None:
    names = read_header(written).shapes
    assert names.keys() == model_to_ldm(model).keys()
    assert any(name.startswith("cond_stage_model.model.") for name in names) == ("sd2" in folder.name)


# What a single file is refused for.


def refusal(path: Path, config_path: Path | None) -> str:
    with pytest.raises(UserError) as caught:
        StableDiffusion(path=str(path), config_path=config_path and str(config_path)).check()
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."])
def test_single_file_without_a_network_is_refused(written: Path, folder: Path, tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "part.safetensors"
    save_file({name: tensor for name, tensor in load_file(written).items() if not name.startswith(prefix)}, path)
    expected = f"base.path must hold a whole Stable Diffusion model, but {path} has no tensors under {prefix}; name a full checkpoint"
    assert refusal(path, folder) == expected


def test_single_file_of_sdxl_is_refused_by_name(tmp_path: Path, folder: Path) -> None:
    save_file({"conditioner.embedders.0.transformer.x": torch.zeros(1)}, tmp_path / "xl.safetensors")
    assert "but " + str(tmp_path / "xl.safetensors") + " is SDXL; name another model" in refusal(tmp_path / "xl.safetensors", folder)


def test_single_file_of_a_lora_is_refused_by_name(tmp_path: Path, folder: Path) -> None:
    save_file({"lora_unet_mid.lora_down.weight": torch.zeros(1), "lora_unet_mid.alpha": torch.zeros(1)}, tmp_path / "l.safetensors")
    assert "is a LoRA; name the base model" in refusal(tmp_path / "l.safetensors", folder)


def test_single_file_for_inpainting_is_refused(written: Path, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(written)
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(32, 9, 3, 3)
    save_file(tensors, tmp_path / "inpaint.safetensors")
    assert "is an inpainting model with 9" in refusal(tmp_path / "inpaint.safetensors", folder)


def test_single_file_with_a_layout_of_another_width_is_refused(written: Path, folder: Path, tmp_path: Path) -> None:
    other = build_tiny(tmp_path / "other", family="sd1" if "sd2" in folder.name else "sd2")
    assert refusal(written, other).startswith(f"base.config_path must have the layout of {written}, whose text is ")


def test_single_file_with_a_hole_is_refused(written: Path, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(written)
    del tensors["model.diffusion_model.out.2.bias"]
    save_file(tensors, tmp_path / "hole.safetensors")
    with pytest.raises(UserError, match="^base.(path must hold all weights of the unet|config_path must have the layout)"):
        StableDiffusion(path=str(tmp_path / "hole.safetensors"), config_path=str(folder)).load()


def test_single_file_without_a_layout_needs_the_cache_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("dreambooth.base.hub.cached", lambda *_: None)
    assert "base.config_path must be a folder here, or a hub id in the local cache" in refusal(written, None)


def test_single_file_of_sd2_must_be_told_what_it_predicts(written: Path, folder: Path, tmp_path: Path) -> None:
    if "sd2" not in folder.name:
        pytest.skip("a fact of Stable Diffusion 2")
    save_file(load_file(written), tmp_path / "silent.safetensors")
    choice = StableDiffusion(path=str(tmp_path / "silent.safetensors"))
    with pytest.raises(UserError, match="^base.prediction_type must be given for a Stable Diffusion 2 single file"):
        choice.native_resolution()
    choice.prediction_type = "v_prediction"
    assert choice.native_resolution() == 768
    choice.prediction_type = "epsilon"
    assert choice.native_resolution() == 512
