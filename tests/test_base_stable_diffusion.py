"""The config choice: what it accepts, what it refuses and in which words, and that it never waits for a network."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tiny_pipelines import build_tiny

from dreambooth.base.stable_diffusion import StableDiffusion
from dreambooth.errors import ConfigError, UserError

OLD_NAMES = {
    "unet/diffusion_pytorch_model.safetensors": "unet/diffusion_pytorch_model.bin",
    "text_encoder/model.safetensors": "text_encoder/pytorch_model.bin",
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("base") / "sd1")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(**fields: str) -> str:
    with pytest.raises(UserError) as caught:
        StableDiffusion(**fields).check()
    return str(caught.value)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code after the import of StableDiffusion in a process of its own."""
    code = "import sys; from dreambooth.base.stable_diffusion import StableDiffusion; " + code
    root, environment = Path(__file__).resolve().parents[1], {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, timeout=60)


def test_check_accepts_a_whole_folder_without_heavy_imports(original: Path) -> None:
    done = python(f"StableDiffusion(path={str(original)!r}).check(); print({{'diffusers', 'transformers'}} & set(sys.modules))")
    assert done.stdout == "set()\n", done.stderr


def test_prediction_type_must_be_known() -> None:
    with pytest.raises(ConfigError, match="^base.prediction_type must be one of epsilon, v_prediction, sample, got 'velocity'"):
        StableDiffusion(prediction_type="velocity")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_prediction_type_follows_the_folder(prediction_type: str, tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "model", prediction_type=prediction_type)
    assert StableDiffusion(path=str(folder)).load().prediction_type == prediction_type


def test_prediction_type_of_the_config_wins(original: Path) -> None:
    assert StableDiffusion(path=str(original), prediction_type="sample").load().prediction_type == "sample"


def test_native_resolution_is_read_from_the_configs(original: Path) -> None:
    assert StableDiffusion(path=str(original)).native_resolution() == 64


def test_native_resolution_takes_a_pair_of_sides(folder: Path) -> None:
    edit(folder / "unet" / "config.json", sample_size=[8, 16])
    assert StableDiffusion(path=str(folder)).native_resolution() == 128


def test_is_lab_tells_by_the_file_of_the_lab(folder: Path) -> None:
    assert not StableDiffusion(path=str(folder)).is_lab()
    (folder / "lab.json").write_text("{}")
    assert StableDiffusion(path=str(folder)).is_lab()


def test_digest_is_of_the_content_and_not_of_the_place(original: Path, folder: Path) -> None:
    assert StableDiffusion(path=str(original)).digest() == StableDiffusion(path=str(folder)).digest()


@pytest.mark.parametrize("name", ["unet/config.json", "text_encoder/model.safetensors", "scheduler/scheduler_config.json"])
def test_digest_changes_with_every_part(folder: Path, name: str) -> None:
    before = StableDiffusion(path=str(folder)).digest()
    with (folder / name).open("ab") as file:
        file.write(b" ")
    assert StableDiffusion(path=str(folder)).digest() != before


def test_digest_trusts_the_names_of_the_hub_cache(folder: Path, tmp_path: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    plain = StableDiffusion(path=str(folder)).digest()
    blob = tmp_path / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
    blob.parent.mkdir()
    file.rename(blob)
    file.symlink_to(blob)
    assert StableDiffusion(path=str(folder)).digest() == plain


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_check_names_a_missing_part(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert refusal(path=str(folder)) == (f"base.path must hold every part of the model, but {folder} lacks {name}; copy or download the model again")


def test_check_asks_for_the_files_of_the_variant(folder: Path) -> None:
    assert "lacks unet/diffusion_pytorch_model.fp16.safetensors, vae/" in refusal(path=str(folder), variant="fp16")


def test_load_takes_the_variant(folder: Path) -> None:
    for file in folder.glob("*/*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))
        file.unlink()
    model = StableDiffusion(path=str(folder), variant="fp16").load()
    assert model.unet.dtype == model.vae.dtype == model.text_encoder.dtype == torch.float32
    weight = model.unet.conv_in.weight
    assert torch.equal(weight, weight.half().float())


def test_load_takes_weights_in_bin_files(original: Path, folder: Path) -> None:
    for name, old_name in OLD_NAMES.items():
        torch.save(load_file(folder / name), folder / old_name)
        (folder / name).unlink()
    expected = StableDiffusion(path=str(original)).load().state_dict()
    loaded = StableDiffusion(path=str(folder)).load().state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_check_names_a_folder_without_a_model(tmp_path: Path) -> None:
    assert refusal(path=str(tmp_path)) == (
        f"base.path must be a diffusers folder (one that holds model_index.json), got '{tmp_path}'; check the path"
    )


@pytest.mark.parametrize("path", ["nowhere/to/be/found", "./nowhere", "model.ckpt", "some name with spaces"])
def test_check_names_a_path_that_is_nothing(path: str) -> None:
    message = refusal(path=path)
    assert message.startswith("base.path must be lab, an existing diffusers folder, a hub id (owner/name), or an existing")
    assert message.endswith(f"got {path!r}; check the path")


def test_check_refuses_another_family_by_name(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    assert "must hold a Stable Diffusion 1 or 2 model, but" in refusal(path=str(folder))
    assert "is a StableDiffusionXLPipeline; name another model" in refusal(path=str(folder))


def test_check_refuses_an_inpainting_unet(folder: Path) -> None:
    edit(folder / "unet" / "config.json", in_channels=9)
    assert "is an inpainting model with 9; name the plain text-to-image model" in refusal(path=str(folder))


def test_check_refuses_a_scheduler_of_another_kind(folder: Path) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="flow_prediction")
    assert refusal(path=str(folder)).startswith("base.path must predict one of epsilon, v_prediction, sample, but")


def test_check_names_a_config_that_is_no_json(folder: Path) -> None:
    (folder / "vae" / "config.json").write_text("<html>not found</html>")
    assert refusal(path=str(folder)).startswith(f"base.path must name readable configs, but {folder / 'vae' / 'config.json'} is not")


def test_check_names_weights_that_were_cut_off(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 100)
    assert f"{file} has {size - 100} bytes where its header asks for {size}" in refusal(path=str(folder))


def test_check_names_a_pointer_that_git_lfs_left(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 334643276\n")
    assert f"but {file} has no readable header" in refusal(path=str(folder))


def test_check_refuses_a_config_path_beside_a_folder(original: Path) -> None:
    message = refusal(path=str(original), config_path=str(original))
    assert message.startswith("base.config_path must be null unless base.path is a single file, got")


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_load_refuses_weights_with_a_hole(folder: Path, name: str) -> None:
    file = folder / f"{name}.safetensors"
    tensors = load_file(file)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"^base.path must hold all weights of the {name.split('/')[0]}, but .* lacks 1 of them, got "):
        StableDiffusion(path=str(folder)).load()


def test_load_refuses_weights_of_another_size(folder: Path) -> None:
    edit(folder / "vae" / "config.json", block_out_channels=[64, 64, 64, 64])
    with pytest.raises(UserError, match="^base.path must hold weights that fit their configs, but"):
        StableDiffusion(path=str(folder)).load()


def test_load_takes_the_length_of_prompts_from_the_text_encoder_where_the_tokenizer_is_silent(folder: Path) -> None:
    config = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    assert StableDiffusion(path=str(folder)).load().tokenize(["a dog"]).shape == (1, 77)


def test_load_prints_nothing(original: Path, capfd: pytest.CaptureFixture[str]) -> None:
    StableDiffusion(path=str(original)).load()
    assert capfd.readouterr() == ("", "")


# The hub, which is never asked here.


@pytest.fixture
def hub_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Stands in for a hub with an empty cache; keeps what it was asked."""
    calls = []

    def snapshot_download(repo_id: str, **options: object) -> str:
        calls.append({"repo_id": repo_id, **options})
        raise LocalEntryNotFoundError("nothing in the cache\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_hub_id_offline_is_refused_without_asking_the_network(hub_calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refusal(path="owner/model")
    expected = "base.path must be a folder here, or a hub id in the local cache while HF_HUB_OFFLINE is set, got 'owner/model'"
    assert message.startswith(expected)
    assert hub_calls and all(call["local_files_only"] for call in hub_calls)


def test_hub_id_offline_fails_within_seconds_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = python("StableDiffusion(path='owner/model').load()", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "UserError: base.path must be a folder here, or a hub id in the local cache" in done.stderr


def test_hub_id_that_the_hub_does_not_give_is_one_sentence(hub_calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    rule = r"^base.path must be a folder here or a model that the hub gives \(LocalEntryNotFoundError: nothing in the cache\), got"
    with pytest.raises(UserError, match=rule):
        StableDiffusion(path="owner/model").locate()


def test_hub_id_in_the_cache_loads_offline(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(original))
    choice = StableDiffusion(path="owner/model", revision="main")
    choice.check()
    assert choice.load().latent_shape() == (4, 8, 8)
    assert choice.digest() == StableDiffusion(path=str(original)).digest()


def test_hub_id_half_in_the_cache_is_downloaded(original: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    asked = []

    def snapshot_download(repo_id: str, local_files_only: bool = False, **options: object) -> str:
        asked.extend(options.get("allow_patterns", []))
        return str(folder if local_files_only else original)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert StableDiffusion(path="owner/model").locate() == original
    assert "unet/diffusion_pytorch_model.safetensors" in asked
    assert not any(pattern.endswith(".bin") for pattern in asked)
