"""The live model against diffusers itself: what it encodes, predicts, decodes and saves is what the pipeline does."""

import os
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from tiny_pipelines import WORDS, build_tiny

from dreambooth.base.protocol import BaseModel
from dreambooth.base.stable_diffusion import StableDiffusion
from dreambooth.errors import UserError

PROMPTS = ["a photo of sks dog", ""]


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("base") / request.param, family=request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> BaseModel:
    return StableDiffusion(path=str(folder)).load()


@pytest.fixture
def fresh(folder: Path) -> BaseModel:
    """A model of its own for a test that changes it."""
    return StableDiffusion(path=str(folder)).load()


@pytest.fixture(scope="module")
def pixel_values() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_base_comes_frozen_and_in_eval_mode(model: BaseModel) -> None:
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_base_state_dict_holds_weights_alone(model: BaseModel) -> None:
    assert {name.split(".")[0] for name in model.state_dict()} == {"unet", "text_encoder", "vae"}


def test_alphas_cumprod_equal_the_schedulers(model: BaseModel) -> None:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert torch.equal(model.alphas_cumprod, scheduler.alphas_cumprod)
    assert model.alphas_cumprod.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_alphas_cumprod_stay_exact_when_the_weights_are_converted(fresh: BaseModel, dtype: torch.dtype) -> None:
    """Rounded to bfloat16, as trainer.precision=bf16-true once did, the first two are 1: no noise, and an infinite signal-to-noise ratio."""
    exact = fresh.alphas_cumprod.clone()
    whole = torch.nn.ModuleList([fresh]).to(dtype)  # as Lightning converts the module around it
    assert fresh.unet.dtype == dtype and torch.equal(whole[0].alphas_cumprod, exact)


def test_latent_shape_is_an_eighth_of_the_pixels(model: BaseModel) -> None:
    assert model.latent_shape() == (4, 8, 8)
    assert model.latent_shape(128, 64) == (4, 16, 8)


@pytest.mark.parametrize("side", [0, -8, 60])
def test_latent_shape_refuses_a_side_that_is_no_multiple(model: BaseModel, side: int) -> None:
    with pytest.raises(UserError, match="image size must be a positive multiple of 8 px, got"):
        model.latent_shape(height=side)


def test_latents_are_scaled_as_the_pipelines_are(model: BaseModel, pixel_values: torch.Tensor) -> None:
    parts = model.pipeline().components
    pipeline = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([0])
    expected = pipeline.prepare_latents(pixel_values, t, 2, 1, torch.float32, "cpu", torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    ours = model.encode_images(pixel_values, noise)
    posterior = model.vae.encode(pixel_values).latent_dist.sample(generator) * 0.18215
    torch.testing.assert_close(ours, posterior, rtol=0, atol=1e-6)
    # The pipeline adds a step's noise, drawn next from the same generator.
    noised = pipeline.scheduler.add_noise(ours, torch.randn(2, 4, 8, 8, generator=generator), t)
    torch.testing.assert_close(noised, expected, rtol=0, atol=1e-6)


def test_encode_images_is_mean_plus_std_times_noise(model: BaseModel, pixel_values: torch.Tensor) -> None:
    mean, std = model.latent_distribution(pixel_values)
    noise = torch.randn(2, 4, 8, 8)
    assert mean.shape == std.shape == (2, 4, 8, 8)
    assert torch.equal(model.encode_images(pixel_values), mean)
    assert torch.equal(model.encode_images(pixel_values, noise), mean + std * noise)


def test_encode_images_applies_the_shift_of_the_autoencoder(fresh: BaseModel, pixel_values: torch.Tensor) -> None:
    before = fresh.encode_images(pixel_values)
    fresh.vae.register_to_config(shift_factor=0.5)
    torch.testing.assert_close(fresh.encode_images(pixel_values), before - 0.5 * 0.18215)


def test_decode_gives_images_in_range(model: BaseModel) -> None:
    images = model.decode(100 * torch.randn(2, 4, 8, 8))
    assert images.shape == (2, 3, 64, 64)
    assert images.dtype == torch.float32
    assert -1 <= images.min() and images.max() <= 1


def test_decode_undoes_the_scaling_of_encode(model: BaseModel, pixel_values: torch.Tensor) -> None:
    reconstruction = model.vae(pixel_values).sample.clamp(-1, 1)
    torch.testing.assert_close(model.decode(model.encode_images(pixel_values)), reconstruction, rtol=0, atol=1e-5)


def test_encode_images_in_half_precision_returns_float32(folder: Path, pixel_values: torch.Tensor) -> None:
    half = StableDiffusion(path=str(folder)).load(torch.bfloat16)
    assert half.vae.dtype == torch.bfloat16
    assert half.encode_images(pixel_values).dtype == torch.float32


def test_predict_equals_the_call_of_the_unet(model: BaseModel) -> None:
    noisy, t = torch.randn(2, 4, 8, 8), torch.tensor([7, 900])
    text = model.encode_prompts(PROMPTS)
    assert torch.equal(model.predict(noisy, t, text), model.unet(noisy, t, text).sample)


def test_predict_passes_gradients_to_the_unet(fresh: BaseModel) -> None:
    fresh.unet.requires_grad_(True)
    text = fresh.encode_prompts(PROMPTS)
    fresh.predict(torch.randn(2, 4, 8, 8), torch.tensor([7, 900]), text).sum().backward()
    assert fresh.unet.conv_in.weight.grad.abs().sum() > 0
    assert not text.requires_grad


def test_encode_prompts_passes_gradients_to_the_text_encoder(fresh: BaseModel) -> None:
    fresh.text_encoder.requires_grad_(True)
    fresh.encode_prompts(PROMPTS).square().sum().backward()
    assert fresh.text_encoder.get_input_embeddings().weight.grad.abs().sum() > 0


def test_encode_prompts_equals_the_pipelines(model: BaseModel) -> None:
    expected, _ = model.pipeline().encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)
    assert torch.equal(model.encode_prompts(PROMPTS), expected)


def test_tokenize_spells_out_a_token_of_several_vectors_as_the_pipeline_does(fresh: BaseModel) -> None:
    fresh.tokenizer.add_tokens(["<toy>", "<toy>_1"])
    ids = fresh.tokenizer.convert_tokens_to_ids(["<toy>", "<toy>_1"])
    fresh.text_encoder.resize_token_embeddings(len(fresh.tokenizer))
    assert set(ids) <= set(fresh.tokenize(["a photo of <toy>"])[0].tolist())
    expected, _ = fresh.pipeline().encode_prompt(["a photo of <toy>"], "cpu", 1, do_classifier_free_guidance=False)
    assert torch.equal(fresh.encode_prompts(["a photo of <toy>"]), expected)


def test_tokenize_pads_to_the_length_of_clip(model: BaseModel) -> None:
    ids = model.tokenize(PROMPTS)
    assert ids.shape == (2, 77)
    assert ids.dtype == torch.int64


def test_tokenize_takes_a_prompt_that_just_fits(model: BaseModel) -> None:
    assert model.tokenize(["dog " * 75]).shape == (1, 77)


def test_tokenize_refuses_a_prompt_that_is_too_long(model: BaseModel) -> None:
    with pytest.raises(UserError, match="^prompt 'cat .* got 80; shorten it by 3 tokens$"):
        model.tokenize(["a dog", "cat " * 78])


def test_tokenize_says_nothing_on_the_screen(model: BaseModel, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError):
        model.tokenize(["cat " * 78])
    assert capfd.readouterr() == ("", "")


def test_tiny_tokenizer_has_one_token_for_each_word(model: BaseModel) -> None:
    assert [word for word in WORDS if len(model.token_id(word)) != 1] == []


def test_token_id_is_one_for_a_word_and_several_for_a_rare_one(model: BaseModel) -> None:
    assert len(model.token_id("sks")) == 1
    assert len(model.token_id("xyzzy")) == 5


def test_pipeline_shares_the_weights(model: BaseModel) -> None:
    pipeline = model.pipeline()
    assert pipeline.unet is model.unet and pipeline.vae is model.vae and pipeline.text_encoder is model.text_encoder


def test_pipeline_draws_an_image_without_a_progress_bar(model: BaseModel, capfd: pytest.CaptureFixture[str]) -> None:
    options = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    assert model.pipeline()("a photo of sks dog", **options).images.shape == (1, 3, 64, 64)
    assert "%" not in capfd.readouterr().err


def test_pipeline_takes_the_given_scheduler(model: BaseModel) -> None:
    scheduler = model.new_scheduler(DDIMScheduler)
    assert model.pipeline(scheduler).scheduler is scheduler
    assert torch.equal(scheduler.alphas_cumprod, model.alphas_cumprod)


def test_pipeline_samples_with_the_prediction_type_of_the_model(fresh: BaseModel) -> None:
    fresh.prediction_type = "v_prediction"
    assert fresh.pipeline().scheduler.config.prediction_type == "v_prediction"
    assert fresh.new_scheduler(DDIMScheduler).config.prediction_type == "v_prediction"


def test_save_then_load_predicts_the_same(model: BaseModel, tmp_path: Path) -> None:
    again = StableDiffusion(path=str(model.save(tmp_path / "saved"))).load()
    noisy, t = torch.randn(2, 4, 8, 8), torch.tensor([7, 900])
    text = model.encode_prompts(PROMPTS)
    assert torch.equal(again.encode_prompts(PROMPTS), text)
    assert torch.equal(again.predict(noisy, t, text), model.predict(noisy, t, text))
    assert torch.equal(again.decode(noisy), model.decode(noisy))


def test_save_writes_a_folder_that_diffusers_loads(model: BaseModel, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(model.save(tmp_path / "saved"), local_files_only=True)
    assert torch.equal(pipeline.unet.conv_in.weight, model.unet.conv_in.weight)


def test_save_names_the_text_encoder_as_transformers_4_reads_it(model: BaseModel, tmp_path: Path) -> None:
    folder = model.save(tmp_path / "saved")
    with safe_open(folder / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())
    assert (folder / "tokenizer" / "vocab.json").is_file() and (folder / "tokenizer" / "merges.txt").is_file()


def test_save_is_the_same_wherever_the_model_came_from(model: BaseModel, tmp_path: Path) -> None:
    model.tokenize(["a photo"])  # the tokenizer remembers how it was last called
    first = StableDiffusion(path=str(model.save(tmp_path / "first")))
    second = StableDiffusion(path=str(first.load().save(tmp_path / "second")))
    assert first.digest() == second.digest()
    assert str(tmp_path) not in (tmp_path / "second" / "unet" / "config.json").read_text()


def test_save_writes_the_prediction_type_it_is_told(model: BaseModel, tmp_path: Path) -> None:
    folder = model.save(tmp_path / "saved", prediction_type="v_prediction")
    assert StableDiffusion(path=str(folder)).load().prediction_type == "v_prediction"
    assert model.prediction_type == "epsilon"


def test_save_replaces_a_model_and_leaves_nothing_beside_it(model: BaseModel, tmp_path: Path) -> None:
    model.save(tmp_path / "saved")
    model.save(tmp_path / "saved", prediction_type="sample")
    assert os.listdir(tmp_path) == ["saved"]
    assert StableDiffusion(path=str(tmp_path / "saved")).load().prediction_type == "sample"


def test_save_cut_off_leaves_what_was_there(model: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(*_: object, **__: object) -> None:
        raise OSError("disk full")

    digest = StableDiffusion(path=str(model.save(tmp_path / "saved"))).digest()
    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", break_off)
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path / "saved")
    assert os.listdir(tmp_path) == ["saved"]
    assert StableDiffusion(path=str(tmp_path / "saved")).digest() == digest


def test_save_refuses_a_folder_with_other_files(model: BaseModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds files that are no model and would be lost"):
        model.save(tmp_path)


def test_save_refuses_an_attached_adapter(fresh: BaseModel, tmp_path: Path) -> None:
    fresh.unet.conv_in.lora_down = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="unet.conv_in.lora_down.weight belongs to an attached adapter"):
        fresh.save(tmp_path / "saved")


def test_save_leaves_files_that_others_may_read(model: BaseModel, tmp_path: Path) -> None:
    folder = model.save(tmp_path / "saved")
    modes = {file.stat().st_mode for file in folder.rglob("*") if file.is_file()}
    assert len(modes) == 1
