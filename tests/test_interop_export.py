"""Exports that a stock pipeline reads: every layout acts as the model that was trained, and what is lost is noticed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreambooth.adapters.lora import Lora
from dreambooth.adapters.methods import CrossAttentionKV, Full, Method, trainable_state
from dreambooth.adapters.textual_inversion import PivotalTuning, TextualInversion
from dreambooth.base.stable_diffusion import StableDiffusion
from dreambooth.config import Config
from dreambooth.errors import UserError
from dreambooth.interop import export as exporting
from dreambooth.interop.export import export, prediction
from dreambooth.interop.lora import diffusers_lora, kohya_lora
from dreambooth.runs import Trained

CONVS = ["to_q", "to_v", "proj_in", "conv1", "ff.net.0.proj"]


def trained_by(make_config: Callable[..., Config], method: Method, identifier: str = "sks", base: str | None = None) -> Trained:
    """A model with what it learned moved off its start at random."""
    config = make_config({"subject.identifier": identifier} | ({"base.path": base} if base else {}))
    config.method = method
    model = config.base.load()
    method.attach(model, identifier, "dog", seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in trainable_state(model).values():
            tensor += 0.3 * tensor.abs().mean().clamp(min=0.1) * torch.randn(tensor.shape, generator=generator)
    return Trained(model, config, 7)


def said(trained: Trained, word: str = "sks") -> Tensor:
    return prediction(trained.base.pipeline(), [f"a photo of a {word} dog", "a photo of a dog"])


def stock(trained: Trained) -> object:
    return StableDiffusion(path=trained.config.base.path).load().pipeline()


LORAS = {
    "plain": lambda: Lora(rank=2, alpha=6.0),
    "text encoder": lambda: Lora(rank=2, alpha=1.0, train_text_encoder=True),
    "convolutions": lambda: Lora(rank=2, alpha=3.0, target_modules=CONVS),
    "dora": lambda: Lora(rank=2, alpha=4.0, use_dora=True, train_text_encoder=True),
}


@pytest.mark.parametrize(
    ("kind", "layout"), [(kind, layout) for kind in LORAS for layout in ("lora", "kohya") if (kind, layout) != ("dora", "kohya")]
)
def test_lora_file_acts_in_a_stock_pipeline_as_it_was_trained(make_config, tmp_path: Path, kind: str, layout: str) -> None:
    trained = trained_by(make_config, LORAS[kind]())
    expected = said(trained)
    export(trained, tmp_path / "dog.safetensors", layout, torch.float32, "dog")
    pipeline = stock(trained)
    before = prediction(pipeline, ["a photo of a sks dog", "a photo of a dog"])
    pipeline.load_lora_weights(str(tmp_path), weight_name="dog.safetensors")
    found = prediction(pipeline, ["a photo of a sks dog", "a photo of a dog"])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (before - expected).abs().max() > 1e-2  # the LoRA does something that could be lost


def test_kohya_file_names_and_alphas_are_those_of_its_layout(make_config, tmp_path: Path) -> None:
    trained = trained_by(make_config, Lora(rank=2, alpha=6.0, train_text_encoder=True))
    export(trained, tmp_path / "dog.safetensors", "kohya", torch.float16, "dog")
    tensors = load_file(tmp_path / "dog.safetensors")
    unet, text = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "lora_te_text_model_encoder_layers_1_self_attn_q_proj"
    for name in (unet, text):
        assert tensors[f"{name}.alpha"].item() == 6.0
        assert tensors[f"{name}.lora_down.weight"].shape == (2, 32) and tensors[f"{name}.lora_up.weight"].shape == (32, 2)
        assert tensors[f"{name}.lora_up.weight"].dtype == torch.float16
    assert {name.split(".", 1)[1] for name in tensors} == {"alpha", "lora_down.weight", "lora_up.weight"}
    assert len(tensors) == 3 * (len(trainable_state(trained.base)) // 2)


def test_kohya_file_says_what_it_is(make_config, tmp_path: Path) -> None:
    trained = trained_by(make_config, Lora(rank=2, alpha=6.0))
    export(trained, tmp_path / "dog.safetensors", "kohya", torch.float16, "my run")
    with safe_open(tmp_path / "dog.safetensors", "pt") as file:
        about = file.metadata()
    assert (about["ss_network_module"], about["ss_network_dim"], about["ss_network_alpha"]) == ("networks.lora", "2", "6.0")
    assert (about["ss_base_model_version"], about["ss_steps"], about["ss_output_name"]) == ("sd_v1", "7", "my run")
    assert about["modelspec.trigger_phrase"] == "sks dog"


def test_kohya_file_of_the_second_family_says_so_and_acts(make_config, tiny_folder, tmp_path: Path) -> None:
    trained = trained_by(make_config, Lora(rank=2, alpha=3.0, train_text_encoder=True), base=str(tiny_folder("sd2", "v_prediction")))
    export(trained, tmp_path / "dog.safetensors", "kohya", torch.float32, "dog")  # compares by itself
    with safe_open(tmp_path / "dog.safetensors", "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sd_v2" and file.metadata()["modelspec.prediction_type"] == "v"


def test_diffusers_lora_without_its_metadata_is_noticed(make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the loader takes alpha = rank in silence; here the scale is 3."""

    def without(base, path: Path, dtype: torch.dtype) -> Path:
        tensors, _ = diffusers_lora(base, dtype)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        return path

    monkeypatch.setattr(exporting, "save_diffusers_lora", without)
    with pytest.raises(UserError, match="must act in a stock pipeline as it was trained"):
        export(trained_by(make_config, Lora(rank=2, alpha=6.0)), tmp_path / "dog.safetensors", "lora", torch.float32, "dog")


def test_kohya_file_with_a_lost_layer_is_noticed(make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(base, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> Path:
        tensors = kohya_lora(base, dtype)
        lost = next(name for name in tensors if "attn2_to_v" in name).split(".")[0]
        save_file({name: tensor.contiguous() for name, tensor in tensors.items() if not name.startswith(lost)}, path, metadata)
        return path

    monkeypatch.setattr(exporting, "save_kohya_lora", lossy)
    with pytest.raises(UserError, match="must act in a stock pipeline as it was trained"):
        export(trained_by(make_config, Lora(rank=2, alpha=6.0)), tmp_path / "dog.safetensors", "kohya", torch.float32, "dog")


@pytest.mark.parametrize(
    ("method", "identifier"),
    [
        (TextualInversion(), "sks"),
        (TextualInversion(num_vectors=3), "<toto>"),
        (TextualInversion(new_token=False), "qyx"),
    ],
    ids=["own row", "three vectors", "own rows of several tokens"],
)
def test_embedding_file_acts_in_a_stock_pipeline_as_it_was_trained(make_config, tmp_path: Path, method: Method, identifier: str) -> None:
    trained = trained_by(make_config, method, identifier)
    expected = said(trained, identifier)
    export(trained, tmp_path / "dog.safetensors", "embedding", torch.float32, "dog")
    (word,) = load_file(tmp_path / "dog.safetensors")
    pipeline = stock(trained)
    pipeline.load_textual_inversion(str(tmp_path / "dog.safetensors"))
    found = prediction(pipeline, [f"a photo of a {word} dog", "a photo of a dog"])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_embedding_of_a_name_that_the_tokenizer_has_is_written_under_another(make_config, tmp_path: Path) -> None:
    """An entry of the vocabulary with exactly that name makes the loader refuse the file."""
    trained = trained_by(make_config, TextualInversion(new_token=False), "s")
    assert "s" in trained.base.tokenizer.get_vocab()
    lines = export(trained, tmp_path / "dog.safetensors", "embedding", torch.float32, "dog")
    assert list(load_file(tmp_path / "dog.safetensors")) == ["<s>"] and lines[-1].endswith("a photo of a <s> dog")


@pytest.mark.parametrize("method", [Lora(rank=2, alpha=3.0, train_token=True), PivotalTuning(inversion_steps=1, lora=Lora(rank=2, alpha=3.0))])
def test_lora_folder_holds_every_form_and_together_they_act_as_trained(make_config, tmp_path: Path, method: Method) -> None:
    trained = trained_by(make_config, method)
    expected = said(trained)
    export(trained, tmp_path / "out", "lora", torch.float32, "my-run")
    names = {"pytorch_lora_weights.safetensors", "my-run_kohya.safetensors", "learned_embeds.safetensors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for weights in names - {"learned_embeds.safetensors"}:
        pipeline = stock(trained)
        pipeline.load_textual_inversion(str(tmp_path / "out" / "learned_embeds.safetensors"))
        pipeline.load_lora_weights(str(tmp_path / "out"), weight_name=weights)
        torch.testing.assert_close(prediction(pipeline, ["a photo of a sks dog", "a photo of a dog"]), expected, atol=1e-5, rtol=1e-5)


def test_lora_folder_of_dora_leaves_the_layout_out_that_cannot_hold_it(make_config, tmp_path: Path) -> None:
    export(trained_by(make_config, LORAS["dora"]()), tmp_path / "out", "lora", torch.float16, "my-run")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pytorch_lora_weights.safetensors"]


@pytest.mark.parametrize(
    "method",
    [
        Full(train_text_encoder=True, train_token=True),
        CrossAttentionKV(),
        Lora(rank=2, train_text_encoder=True, train_token=True),
        TextualInversion(num_vectors=2),
    ],
    ids=lambda method: method.name,
)
def test_model_folder_is_the_trained_model_for_every_method(make_config, tmp_path: Path, method: Method) -> None:
    trained = trained_by(make_config, method)
    expected = said(trained)
    export(trained, tmp_path / "model", "model", torch.float32, "dog")
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None, local_files_only=True)
    torch.testing.assert_close(prediction(pipeline, ["a photo of a sks dog", "a photo of a dog"]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [CrossAttentionKV(), Lora(rank=2, train_token=True)], ids=lambda method: method.name)
def test_model_file_is_written_for_every_method_without_new_tokens(make_config, tmp_path: Path, method: Method) -> None:
    lines = export(trained_by(make_config, method), tmp_path / "dog.safetensors", "model", torch.float16, "dog")
    assert lines[-1] == f"written: {tmp_path / 'dog.safetensors'}"


def test_model_file_refuses_a_new_token(make_config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no room for the token"):
        export(trained_by(make_config, TextualInversion(num_vectors=2)), tmp_path / "dog.safetensors", "model", torch.float32, "dog")


@pytest.mark.parametrize(
    ("method", "layout", "name", "words"),
    [
        (Full(train_token=True), "lora", "out", "must be model for a run of method=full"),
        (CrossAttentionKV(), "embedding", "dog.safetensors", "must be model for a run of method=cross_attention_kv"),
        (Lora(rank=1), "embedding", "dog.safetensors", "learned no word"),
        (TextualInversion(), "kohya", "dog.safetensors", "must not be a LoRA's for a run without one"),
        (Lora(rank=1, use_dora=True), "kohya", "dog.safetensors", "must not be kohya for DoRA"),
        (Lora(rank=1), "kohya", "out", "must be a .safetensors file for this layout"),
        (Lora(rank=1), "lora", "dog.ckpt", "must be a folder or a .safetensors file"),
    ],
)
def test_export_refuses_a_form_that_the_method_has_not(make_config, tmp_path: Path, method: Method, layout: str, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        export(trained_by(make_config, method), tmp_path / name, layout, torch.float32, "dog")
    assert not (tmp_path / name).exists()
