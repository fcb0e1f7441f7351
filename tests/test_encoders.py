"""The feature extractors on tiny random networks, built here; preprocessing against independent implementations."""

import hashlib
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from dreambooth.clip_dino import clip_preprocessing, dino_preprocessing
from dreambooth.encoders import ClipDino, LabEncoders, LoadedEncoders, LoadedLab
from dreambooth.errors import ConfigError, UserError
from dreambooth.lab.paths import SCORERS_FOLDER
from dreambooth.lab.scorers import LabScorers

CLIP_SIZE, DINO_SIZE, TOKENS = 32, 28, 24
PROMPTS = ["a dog", "a red dog on the moon", ""]


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Returns a smooth random picture (H, W, 3), so that a shifted crop changes numbers but not chaotically."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save_clip(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": TOKENS, "bos_token_id": 52, "eos_token_id": 53}
    vision = {**sizes, "image_size": CLIP_SIZE, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_dino(folder: Path, kind: str = "vit") -> Path:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": DINO_SIZE, "patch_size": 14}
    if kind == "dinov2":
        Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2)).save_pretrained(folder)
    else:
        ViTModel(ViTConfig(**sizes, intermediate_size=32), add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return save_clip(root / "clip"), save_dino(root / "dino")


@pytest.fixture(scope="module")
def loaded(folders: tuple[Path, Path]) -> LoadedEncoders:
    return ClipDino(clip_path=str(folders[0]), dino_path=str(folders[1])).load()


@pytest.fixture
def images() -> Tensor:
    return torch.from_numpy(np.stack([picture(40, 48, seed) for seed in range(5)]))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (20, 20), (51, 34), (33, 58), (300, 200)])
def test_clip_preprocessing_agrees_with_transformers_at_even_margins(height: int, width: int) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = picture(height, width)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = torch.as_tensor(np.asarray(processor(Image.fromarray(image))["pixel_values"][0]))
    assert torch.allclose(clip_preprocessing(32)(image), expected, atol=1e-5)


def test_dino_preprocessing_is_resize_256_and_centre_crop_224() -> None:
    image = picture(300, 450)
    resized = np.asarray(Image.fromarray(image).resize((384, 256), Image.Resampling.BICUBIC))  # width x height
    by_hand = (resized[16:240, 80:304] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.abs(dino_preprocessing(224)(image).permute(1, 2, 0).numpy() - by_hand).max() < 1e-5


def test_preprocessing_centres_odd_margins_as_torchvision_does() -> None:
    ramp = np.tile(np.arange(35, dtype=np.uint8)[None, :, None], (32, 1, 3))  # 3 columns to cut: round(1.5) = 2 go on the left
    first = clip_preprocessing(32)(ramp)[0, 0, 0] * 0.26862954 + 0.48145466
    assert first.item() * 255 == pytest.approx(2, abs=1e-3)


def test_preprocessing_averages_when_it_shrinks() -> None:
    checkers = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, axis=2)
    grey = clip_preprocessing(32)(checkers)[0] * 0.26862954 + 0.48145466
    assert (grey - 0.5).abs().max() < 0.05  # without antialiasing: all black or all white


@pytest.mark.parametrize("encode", ["identity", "image", "text"])
def test_features_are_unit_float32_on_the_cpu(loaded: LoadedEncoders, images: Tensor, encode: str) -> None:
    features = getattr(loaded, encode)(PROMPTS if encode == "text" else images)
    widths = {"identity": 20, "image": 12, "text": 12}
    assert (features.dtype, features.device.type, features.requires_grad) == (torch.float32, "cpu", False)
    assert features.shape == (len(PROMPTS) if encode == "text" else 5, widths[encode])
    assert torch.allclose(features.norm(dim=1), torch.ones(len(features)), atol=1e-5)


@pytest.mark.parametrize("encode", ["identity", "image", "text"])
def test_features_do_not_depend_on_the_batch_size(loaded: LoadedEncoders, images: Tensor, encode: str) -> None:
    items = PROMPTS if encode == "text" else images
    assert torch.allclose(getattr(loaded, encode)(items, batch_size=1), getattr(loaded, encode)(items), atol=1e-5)


@pytest.mark.parametrize("encode", ["identity", "image", "text"])
def test_features_of_nothing_have_the_right_width(loaded: LoadedEncoders, images: Tensor, encode: str) -> None:
    some = getattr(loaded, encode)(["a"] if encode == "text" else images[:1])
    assert getattr(loaded, encode)([]).shape == (0, some.shape[1])


def test_features_do_not_depend_on_the_precision_of_the_training(loaded: LoadedEncoders, images: Tensor) -> None:
    outside = loaded.identity(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loaded.identity(images), outside)


def test_features_of_a_photo_do_not_depend_on_its_neighbours(loaded: LoadedEncoders) -> None:
    photos = [picture(40, 48), picture(90, 33, seed=1), picture(64, 64, seed=2)]
    together = loaded.identity(photos)
    assert torch.allclose(together, torch.cat([loaded.identity(photo[None]) for photo in photos]), atol=1e-5)


def test_identity_is_the_class_token_after_the_final_layer_norm(loaded: LoadedEncoders, folders: tuple[Path, Path], images: Tensor) -> None:
    model = ViTModel.from_pretrained(folders[1], add_pooling_layer=False).eval()
    x = torch.stack([dino_preprocessing(DINO_SIZE)(image.numpy()) for image in images])
    hidden: list[Tensor] = []
    model.layernorm.register_forward_hook(lambda _module, inputs, _output: hidden.append(inputs[0]))
    with torch.no_grad():
        model(x)
    token = nn.functional.layer_norm(hidden[0], (20,), model.layernorm.weight, model.layernorm.bias, model.config.layer_norm_eps)[:, 0]
    assert torch.allclose(loaded.identity(images), nn.functional.normalize(token, dim=1), atol=1e-5)


def test_image_and_text_are_the_embeddings_that_clip_compares(loaded: LoadedEncoders, folders: tuple[Path, Path], images: Tensor) -> None:
    model, tokenizer = CLIPModel.from_pretrained(folders[0]).eval(), CLIPTokenizer.from_pretrained(folders[0])
    x = torch.stack([clip_preprocessing(CLIP_SIZE)(image.numpy()) for image in images])
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=TOKENS, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=x, **tokens).logits_per_image / model.logit_scale.exp()
    assert torch.allclose(loaded.image(images) @ loaded.text(PROMPTS).T, logits, atol=1e-5)


def test_identity_of_dinov2_is_its_class_token(folders: tuple[Path, Path], images: Tensor, tmp_path: Path) -> None:
    folder = save_dino(tmp_path / "dinov2", "dinov2")
    x = torch.stack([dino_preprocessing(DINO_SIZE)(image.numpy()) for image in images])
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(folder).eval()(x).pooler_output
    features = ClipDino(clip_path=str(folders[0]), dino_path=str(folder)).load().identity(images)
    assert torch.allclose(features, nn.functional.normalize(expected, dim=1), atol=1e-5)


def test_dinov2_is_seen_at_224_though_its_positions_are_for_more(folders: tuple[Path, Path], tmp_path: Path) -> None:
    torch.manual_seed(2)
    sizes: dict[str, Any] = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 252, "patch_size": 14}
    model = Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2)).eval()
    model.save_pretrained(tmp_path / "dinov2")
    image = picture(256, 300)
    by_hand = (image[16:240, 38:262] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]  # the short side is 256 as it is
    with torch.no_grad():
        tokens = model(torch.from_numpy(by_hand).permute(2, 0, 1)[None].float()).last_hidden_state[0]
    loaded = ClipDino(clip_path=str(folders[0]), dino_path=str(tmp_path / "dinov2")).load()
    patches = loaded.patches([image])
    assert torch.allclose(loaded.identity([image])[0], nn.functional.normalize(tokens[0], dim=0), atol=1e-5)
    assert patches.grid == (16, 16) and torch.allclose(patches.tokens[0], tokens[1:], atol=1e-5)
    assert (
        "dinov2 patch 14, class token after the final norm, 12-d, patches = its other tokens, 16 x 16, resize 256 bicubic, crop 224" in loaded.version
    )


def test_patches_are_the_other_tokens_after_the_final_layer_norm(loaded: LoadedEncoders, folders: tuple[Path, Path], images: Tensor) -> None:
    model = ViTModel.from_pretrained(folders[1], add_pooling_layer=False).eval()
    with torch.no_grad():
        tokens = model(torch.stack([dino_preprocessing(DINO_SIZE)(image.numpy()) for image in images])).last_hidden_state
    patches = loaded.patches(images, batch_size=2)
    assert patches.grid == (2, 2) and torch.allclose(patches.tokens, tokens[:, 1:], atol=1e-5)


def test_identity_with_patches_gives_both_from_one_pass(loaded: LoadedEncoders, images: Tensor) -> None:
    identity, means = loaded.identity_with_patches(images, lambda tokens: tokens.mean(dim=1), batch_size=3)
    assert torch.allclose(identity, loaded.identity(images), atol=1e-6)
    assert torch.allclose(means, loaded.patches(images).tokens.mean(dim=1), atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(40, 48), (64, 32), (28, 28), (90, 131)])
def test_patch_shares_come_from_the_same_crop_as_the_image(loaded: LoadedEncoders, height: int, width: int) -> None:
    mask = (picture(height, width)[..., 0] > 128).astype(np.float32)
    as_image = dino_preprocessing(DINO_SIZE)((mask * 255).astype(np.uint8)[..., None].repeat(3, 2))[0] * 0.229 + 0.485  # (28, 28) in [0, 1]
    by_hand = as_image.reshape(2, 14, 2, 14).mean(dim=(1, 3)).flatten()
    assert torch.allclose(loaded.patch_shares([mask])[0], by_hand, atol=0.01)  # an image is rounded to bytes, a mask is not


def test_patch_shares_of_a_mask_that_the_crop_cuts_off_are_zero(loaded: LoadedEncoders) -> None:
    mask = np.zeros((32, 64), np.float32)
    mask[:, :16] = 1  # the centre crop keeps columns 18 to 46
    assert loaded.patch_shares([mask]).max() == 0


@pytest.mark.parametrize("bad", [np.zeros((8, 8, 1)), np.full((8, 8), 255), np.full((8, 8), np.nan)])
def test_patch_shares_refuse_what_is_no_mask(loaded: LoadedEncoders, bad: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"masks must be \(height, width\) in \[0, 1\]"):
        loaded.patch_shares([bad])


def test_version_is_the_same_for_a_copy_of_the_folder(loaded: LoadedEncoders, folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert ClipDino(clip_path=str(save_clip(tmp_path / "copy")), dino_path=str(folders[1])).load().version == loaded.version


def test_version_changes_with_the_weights(loaded: LoadedEncoders, folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert ClipDino(clip_path=str(save_clip(tmp_path / "other", seed=9)), dino_path=str(folders[1])).load().version != loaded.version


def test_version_names_layer_crop_and_hash(loaded: LoadedEncoders) -> None:
    assert "class token after the final norm, 20-d, patches = its other tokens, 2 x 2, resize 32 bicubic, crop 28, ImageNet" in loaded.version
    assert "projections, 12-d, resize 32 bicubic, crop 32, CLIP mean and std, sha256 " in loaded.version


def test_text_refuses_a_prompt_that_clip_would_cut_off(loaded: LoadedEncoders) -> None:
    fits = "a" * (TOKENS - 2)  # beside the start and end tokens
    assert loaded.text([fits]).shape == (1, 12)
    with pytest.raises(UserError, match=f"the prompt '{fits}b' must fit into CLIP's 24 tokens, got 25; shorten it"):
        loaded.text(["a dog", fits + "b"])


def test_text_refuses_a_bare_string(loaded: LoadedEncoders) -> None:
    with pytest.raises(ValueError, match="must be a list of texts"):
        loaded.text("a dog")


@pytest.mark.parametrize("bad", [np.zeros((1, 8, 8, 3)), np.zeros((1, 3, 8, 8), np.uint8), np.zeros((8, 8, 3), np.uint8)])
def test_images_of_another_kind_are_refused(loaded: LoadedEncoders, bad: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="must be uint8 of shape"):
        loaded.identity(bad)


def test_clip_dino_in_folders_lacks_nothing(folders: tuple[Path, Path]) -> None:
    assert ClipDino(clip_path=str(folders[0]), dino_path=str(folders[1])).missing() is None


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty Hugging Face cache, and a network that counts as an error."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_args, **_options: pytest.fail("asked the network"))
    return tmp_path


@pytest.mark.usefixtures("no_network")
def test_clip_dino_that_is_not_here_says_what_to_do_without_a_network() -> None:
    assert ClipDino().missing() == (
        "encoders.clip_path must be a model on this machine, as a folder or in the Hugging Face cache, got 'openai/clip-vit-base-patch32'; "
        "run `hf download openai/clip-vit-base-patch32` where there is a network, or set it to a folder that holds the model"
    )


@pytest.mark.usefixtures("no_network")
def test_clip_dino_with_a_mistyped_folder_does_not_suggest_a_download(folders: tuple[Path, Path]) -> None:
    sentence = ClipDino(clip_path=str(folders[0]), dino_path="/nowhere/dino").missing()
    assert sentence is not None and sentence.startswith("encoders.dino_path must be") and "hf download" not in sentence


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer.json"])
def test_clip_dino_names_a_file_that_is_not_there(folders: tuple[Path, Path], tmp_path: Path, lost: str) -> None:
    clip = save_clip(tmp_path / "clip")
    (clip / lost).unlink()
    choice = ClipDino(clip_path=str(clip), dino_path=str(folders[1]))
    assert lost in (choice.missing() or "")
    with pytest.raises(ConfigError, match=lost):
        choice.load()


def cache(root: Path, repo: str, save: Any) -> None:
    """Puts a model into a Hugging Face cache as a download would."""
    folder = root / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    save(folder / "snapshots" / ("0" * 40))


def test_clip_dino_in_the_cache_loads_without_a_network(no_network: Path, loaded: LoadedEncoders) -> None:
    cache(no_network, "openai/clip-vit-base-patch32", save_clip)
    cache(no_network, "facebook/dino-vits16", save_dino)
    assert ClipDino().missing() is None
    assert ClipDino().load().version == loaded.version


def test_clip_dino_downloads_what_is_not_here(no_network: Path, monkeypatch: pytest.MonkeyPatch, folders: tuple[Path, Path]) -> None:
    asked: list[str] = []

    def download(repo: str, allow_patterns: list[str]) -> None:
        asked.append(repo)
        cache(no_network, repo, save_dino)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    ClipDino(clip_path=str(folders[0])).load()
    assert asked == ["facebook/dino-vits16"]


def test_clip_dino_that_cannot_be_downloaded_says_what_to_do(no_network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_args: Any, **_options: Any) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("outgoing traffic has been disabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConfigError, match="encoders.clip_path must be a model on this machine"):
        ClipDino().load()


def test_clip_dino_refuses_a_model_of_another_type(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="encoders.dino_path must be a model of type vit or dinov2, got 'clip in "):
        ClipDino(clip_path=str(folders[0]), dino_path=str(folders[0])).load()


def test_clip_dino_refuses_weights_with_holes_that_random_numbers_would_fill(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    dino = save_dino(tmp_path / "dino")
    tensors = {key: value for key, value in load_file(dino / "model.safetensors").items() if "layernorm.weight" not in key}
    save_file(tensors, dino / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="must hold all weights of a ViTModel, got '.* without layernorm.weight'"):
        ClipDino(clip_path=str(folders[0]), dino_path=str(dino)).load()


class StandInScorers:
    """Has the interface of the lab's scorers; its features are the means of the channels."""

    def identity_with_patches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(dim=(2, 3)), nn.functional.adaptive_avg_pool2d(x, (1, 2)).permute(0, 2, 3, 1)

    def patch_shares(self, masks: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(masks, (1, 2))

    def image(self, x: Tensor) -> Tensor:
        return -x.mean(dim=(2, 3))

    def text(self, prompts: list[str]) -> Tensor:
        return torch.tensor([[float(len(prompt)), 1.0, 0.0] for prompt in prompts])


@pytest.fixture
def lab() -> LoadedEncoders:
    return LoadedLab(StandInScorers(), torch.device("cpu"), "stand-in")


def test_lab_gives_the_scorers_pixels_from_minus_one_to_one(lab: LoadedEncoders) -> None:
    image = np.full((1, 4, 6, 3), [255, 0, 51], np.uint8)  # 1, -1, -0.6
    expected = torch.tensor([[1.0, -1.0, -0.6]]) / 2.36**0.5
    assert torch.allclose(lab.identity(image), expected, atol=1e-6) and torch.allclose(lab.image(image), -expected, atol=1e-6)


def test_lab_keeps_the_order_of_images_of_mixed_sizes(lab: LoadedEncoders) -> None:
    photos = [picture(8, 8), picture(8, 8, seed=1), picture(6, 9, seed=2), picture(8, 8, seed=3)]
    assert torch.allclose(lab.identity(photos), torch.cat([lab.identity([photo]) for photo in photos]), atol=1e-6)


def test_lab_text_is_scaled_to_unit_length(lab: LoadedEncoders) -> None:
    assert torch.allclose(lab.text(["abc"]), torch.tensor([[3.0, 1.0, 0.0]]) / 10**0.5)


def test_lab_scorers_that_are_shipped_load_and_agree_with_themselves() -> None:
    choice = LabEncoders()
    assert choice.missing() is None
    loaded, images = choice.load(), torch.from_numpy(np.stack([picture(64, 64, seed) for seed in range(3)]))
    direct = LabScorers.load(None)
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.allclose(loaded.identity(images), direct.identity(x), atol=1e-5)
    assert torch.allclose(loaded.image(images), direct.image(x), atol=1e-5)
    assert torch.allclose(loaded.text(["a red robot"]), direct.text(["a red robot"]), atol=1e-5)


def test_lab_identity_is_pooled_from_its_patches() -> None:
    loaded, scorers = LabEncoders().load(), LabScorers.load(None)
    images = torch.from_numpy(np.stack([picture(64, 64, seed) for seed in range(3)]))
    patches = loaded.patches(images)
    side = patches.grid[0]
    maps = patches.tokens.unflatten(1, patches.grid)  # (N, h, w, C)
    pooled = torch.cat([maps.mean(dim=(1, 2)), maps.amax(dim=(1, 2))], dim=1)
    expected = nn.functional.normalize(scorers.identity_encoder.head(pooled), dim=1)
    assert patches.grid == (side, side) and torch.allclose(loaded.identity(images), expected, atol=1e-5)


def test_lab_patch_shares_are_where_the_mask_is() -> None:
    loaded, mask = LabEncoders().load(), np.zeros((64, 64), np.float32)
    mask[:32, 32:] = 1
    rows, columns = loaded.patches(np.zeros((1, 64, 64, 3), np.uint8)).grid
    expected = torch.zeros(rows, columns)
    expected[: rows // 2, columns // 2 :] = 1
    assert torch.allclose(loaded.patch_shares([mask])[0].view(rows, columns), expected)


def test_lab_version_hashes_the_weights() -> None:
    files = [SCORERS_FOLDER / f"{name}.safetensors" for name in ("identity", "image", "text")]
    expected = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    assert LabEncoders().load().version == (
        f"lab: scorers; patches = the identity network's last map; sha256 {expected}; diversity by 1 - MS-SSIM, no LPIPS weights"
    )


def test_lab_without_its_files_says_which_and_what_to_do(tmp_path: Path) -> None:
    assert LabEncoders(folder=str(tmp_path)).missing() == (
        f"encoders.folder must be a folder with identity.safetensors, got '{tmp_path}'; set it to null for the shipped scorers"
    )
