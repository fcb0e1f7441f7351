"""A .ckpt or .bin file is a pickle, which may hold a program: it is refused, in words, and never run."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from tiny_pipelines import build_tiny

from dreambooth.base.files import read_header
from dreambooth.base.stable_diffusion import StableDiffusion
from dreambooth.errors import UserError

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


class Bomb:
    """Unpickled by an unsafe loader, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("is_zip", [True, False])
def test_ckpt_with_a_program_inside_is_refused_and_not_run(original: Path, tmp_path: Path, is_zip: bool) -> None:
    path, fuse = tmp_path / "bad.ckpt", tmp_path / "it ran"
    content = {"state_dict": {"model.diffusion_model.x": torch.zeros(1)}, "extra": Bomb(fuse)}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    choice = StableDiffusion(path=str(path), config_path=str(original))
    for use in (choice.check, choice.load, choice.native_resolution):
        with pytest.raises(UserError, match="^base.path must hold plain tensors, but .*ckpt cannot be read safely"):
            use()
    assert not fuse.exists()
    torch.load(path, weights_only=False)  # the trap is a real one
    assert fuse.exists()


def test_loader_of_diffusers_does_not_run_a_program_in_a_ckpt(original: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    path, fuse = tmp_path / "bad.ckpt", tmp_path / "it ran"
    torch.save({"state_dict": {}, "extra": Bomb(fuse)}, path)
    with pytest.raises(OSError, match="Unable to load weights"):
        StableDiffusionPipeline.from_single_file(str(path), config=str(original), local_files_only=True)
    assert not fuse.exists()


@pytest.mark.parametrize("name", OLD_NAMES)
def test_bin_with_a_program_inside_is_refused_and_not_run(folder: Path, tmp_path: Path, name: str) -> None:
    fuse = tmp_path / "it ran"
    (folder / name).unlink()
    torch.save({"extra": Bomb(fuse)}, folder / OLD_NAMES[name])
    with pytest.raises(UserError, match=r"^base.path must hold plain tensors, but .*bin cannot be read safely \(it names "):
        StableDiffusion(path=str(folder)).load()
    assert not fuse.exists()


def test_ckpt_that_is_a_bare_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    path, fuse = tmp_path / "bad.ckpt", tmp_path / "it ran"
    path.write_bytes(pickle.dumps(Bomb(fuse), protocol=2))
    with pytest.raises(UserError, match="cannot be read safely"):
        StableDiffusion(path=str(path)).check()
    assert not fuse.exists()


def test_ckpt_header_reads_names_and_shapes(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(2, 3)}, "global_step": 7}, tmp_path / "x.ckpt")
    assert read_header(tmp_path / "x.ckpt").shapes == {"a": (2, 3)}
