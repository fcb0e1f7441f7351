"""LPIPS on a random AlexNet: against torchmetrics' own network, whose only missing part is torchvision's list of layers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.functional.image import lpips as theirs

from dreambooth.config import Config
from dreambooth.encoders import ClipDino, LabEncoders
from dreambooth.errors import ConfigError
from dreambooth.perceptual import Lpips


def alexnet_features() -> nn.Sequential:
    """The convolutional part of AlexNet (Krizhevsky 2014, "One weird trick"), as torchvision numbers its layers."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
    )


@pytest.fixture(scope="module")
def features() -> nn.Sequential:
    torch.manual_seed(0)
    return alexnet_features()


@pytest.fixture(scope="module")
def backbone(features: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    state = {f"features.{key}": tensor for key, tensor in features.state_dict().items()}
    torch.save(state | {"classifier.1.bias": torch.zeros(3)}, path)
    return path


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (3, 64, 72, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_lpips_agrees_with_torchmetrics(features: nn.Sequential, backbone: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained: features)
    network = theirs._NoTrainLpips(net="alex", pnet_rand=True)
    scaled = images.permute(0, 3, 1, 2) / 127.5 - 1
    expected = torch.stack([network(scaled, scaled[[k]].expand(3, -1, -1, -1)).flatten() for k in range(3)])
    distances = Lpips.load(backbone).distances(images)
    assert expected[0, 1] > 1e-4 and torch.allclose(distances, expected, rtol=1e-4, atol=1e-8)


def test_lpips_of_an_image_with_itself_is_zero(backbone: Path, images: Tensor) -> None:
    assert Lpips.load(backbone).distances(images[[0, 0]]).tolist() == [[0, 0], [0, 0]]


def test_lpips_is_symmetric(backbone: Path, images: Tensor) -> None:
    distances = Lpips.load(backbone).distances(images)
    assert torch.equal(distances, distances.T) and distances.shape == (3, 3)


def test_lpips_reads_safetensors_and_arrays(features: nn.Sequential, backbone: Path, images: Tensor, tmp_path: Path) -> None:
    save_file({f"features.{key}": tensor for key, tensor in features.state_dict().items()}, tmp_path / "alexnet.safetensors")
    assert torch.equal(Lpips.load(tmp_path / "alexnet.safetensors").distances(images.numpy()), Lpips.load(backbone).distances(images))


@pytest.mark.parametrize("bad", [np.zeros((1, 64, 64, 3), np.float32), np.zeros((1, 3, 64, 64), np.uint8), np.zeros((1, 31, 64, 3), np.uint8)])
def test_lpips_refuses_images_of_another_kind(backbone: Path, bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="images must be uint8"):
        Lpips.load(backbone).distances(bad)


def test_lpips_refuses_another_network(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg.pth")
    with pytest.raises(ConfigError, match=r"must hold torchvision's AlexNet, features.0.weight of shape .* got \(64, 3, 3, 3\)"):
        Lpips.load(tmp_path / "vgg.pth")


@pytest.mark.parametrize("name", ["alexnet.pth", "alexnet.safetensors"])
def test_lpips_refuses_a_file_that_holds_no_weights(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"<html>not found</html>")
    with pytest.raises(ConfigError, match="encoders.lpips_backbone must be a file of weights"):
        Lpips.load(tmp_path / name)


def test_encoders_say_in_their_version_whether_lpips_is_there(backbone: Path) -> None:
    without, with_lpips = LabEncoders().load(), LabEncoders(lpips_backbone=str(backbone)).load()
    assert without.perceptual is None and without.version.endswith("; diversity by 1 - MS-SSIM, no LPIPS weights")
    assert with_lpips.perceptual is not None and "; LPIPS 0.1 alexnet, images at their own size, sha256 of backbone " in with_lpips.version


def test_encoders_say_at_once_that_the_backbone_is_not_there() -> None:
    assert LabEncoders(lpips_backbone="nowhere/alexnet.pth").missing() == (
        "encoders.lpips_backbone must be the file of torchvision's AlexNet weights, got 'nowhere/alexnet.pth'; "
        "correct the path, or set it to null to do without LPIPS"
    )


def test_the_encoders_of_the_base_keep_the_backbone(make_config: Callable[..., Config]) -> None:
    encoders = make_config({"encoders.lpips_backbone": "alexnet.pth"}).encoders
    assert (type(encoders), encoders.lpips_backbone) == (ClipDino, "alexnet.pth")
