"""LPIPS, the perceptual distance of the paper's diversity score, on AlexNet: written here, so that torchvision is not needed."""

from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dreambooth.errors import ConfigError
from dreambooth.files import sha256_of

WHERE = "encoders.lpips_backbone"
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1], so that they suit the backbone
EPSILON = 1e-8  # inside the root of a length
SMALLEST_PX = 32  # along each side: below it the last layers have next to no place left


class Layer(NamedTuple):
    """One convolution of AlexNet, with the number that its weights have in torchvision's file."""

    number: int
    channels_in: int
    channels_out: int
    kernel: int
    stride: int
    padding: int
    is_pooled_before: bool


LAYERS = (
    Layer(0, 3, 64, 11, 4, 2, False),
    Layer(3, 64, 192, 5, 1, 2, True),
    Layer(6, 192, 384, 3, 1, 1, True),
    Layer(8, 384, 256, 3, 1, 1, False),
    Layer(10, 256, 256, 3, 1, 1, False),
)


class Lpips(nn.Module):
    """The distance of two images as a network sees it: LPIPS version 0.1, AlexNet, with its trained linear heads.

    An image in [-1, 1], at its own size, is shifted and scaled per channel and goes through AlexNet's five convolutions. After the ReLU of
    each, every place is scaled to length 1 across channels; the squared difference of two images is weighted by channel (the heads),
    summed over channels and averaged over places; the five are added. The heads are the ones that torchmetrics ships.

    Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", sec. 3. Ruiz et al. 2023 do not
    say which network their DIV uses; AlexNet is the default of the authors of LPIPS.

    Args:
        backbone: torchvision's AlexNet state dict; only "features.<number>.weight" and ".bias" of LAYERS are looked at.
        heads: "lin<k>.model.1.weight" for each layer, (1, channels, 1, 1).
        version: the evaluator in words.
    """

    version: str
    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: dict[str, Tensor], heads: dict[str, Tensor], version: str = "LPIPS") -> None:
        super().__init__()
        self.version = version
        self.convolutions = nn.ModuleList(
            nn.Conv2d(layer.channels_in, layer.channels_out, layer.kernel, layer.stride, layer.padding) for layer in LAYERS
        )
        for layer, convolution in zip(LAYERS, self.convolutions, strict=True):
            convolution.load_state_dict({part: backbone[f"features.{layer.number}.{part}"].float() for part in ("weight", "bias")})
        self.heads = nn.ParameterList(heads[f"lin{k}.model.1.weight"].float().flatten() for k in range(len(LAYERS)))  # (channels,) each
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path, device: str | torch.device = "cpu") -> "Lpips":
        """Returns LPIPS with a backbone from a file.

        Args:
            path: torchvision's AlexNet weights, .pth or .safetensors ("alexnet-owt-7be5be79.pth").
            device: where to compute.

        Raises:
            ConfigError: the file is not there, or does not hold AlexNet.
        """
        import torchmetrics

        backbone = _read(path)
        for layer in LAYERS:
            name, shape = f"features.{layer.number}.weight", (layer.channels_out, layer.channels_in, layer.kernel, layer.kernel)
            found = tuple(backbone[name].shape) if name in backbone else "no such tensor"
            if found != shape or f"features.{layer.number}.bias" not in backbone:
                rule = f"must hold torchvision's AlexNet, {name} of shape {shape} with its bias, in {path}"
                raise ConfigError(WHERE, rule, found, "give alexnet-owt-7be5be79.pth, or set it to null to do without LPIPS")
        heads_file = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "alex.pth"
        heads = torch.load(heads_file, map_location="cpu", weights_only=True)
        version = f"LPIPS 0.1 alexnet, images at their own size, sha256 of backbone {sha256_of([path])}, of heads {sha256_of([heads_file])}"
        return cls(backbone, heads, version).to(device)

    def distances(self, images: Tensor | NDArray[np.uint8]) -> Tensor:
        """Returns the distances of all pairs, (N, N) float32, symmetric, 0 on the diagonal, on the CPU; each image goes through the network once.

        Args:
            images: uint8 RGB of one size, (N, H, W, 3), at least 32 pixels along each side.

        Raises:
            ValueError: the images are of another kind.
        """
        pixels = torch.as_tensor(images)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or min(pixels.shape[1:3]) < SMALLEST_PX:
            rule = f"images must be uint8 (images, height, width, 3) of at least {SMALLEST_PX} pixels along each side"
            raise ValueError(f"{rule}, got {pixels.dtype} {tuple(pixels.shape)}")
        total = torch.zeros(len(pixels), len(pixels))
        with torch.no_grad(), torch.autocast(self.shift.device.type, enabled=False):
            seen = [self._features(image.to(self.shift.device)) for image in pixels]  # of each image, five maps (C, h * w)
            for first in range(len(seen)):
                for second in range(first + 1, len(seen)):
                    parts = [(head @ (a - b).pow(2)).mean() for head, a, b in zip(self.heads, seen[first], seen[second], strict=True)]
                    total[first, second] = total[second, first] = float(sum(parts))
        return total

    def _features(self, image: Tensor) -> list[Tensor]:
        x = image.permute(2, 0, 1)[None].float() / 127.5 - 1  # (H, W, 3) -> (1, 3, H, W) in [-1, 1]
        x = (x - self.shift) / self.scale
        maps = []
        for layer, convolution in zip(LAYERS, self.convolutions, strict=True):
            x = F.relu(convolution(F.max_pool2d(x, 3, 2) if layer.is_pooled_before else x))
            maps.append((x / (x.pow(2).sum(dim=1, keepdim=True) + EPSILON).sqrt())[0].flatten(1))  # (1, C, h, w) -> (C, h * w)
        return maps


def _read(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a weights file.

    Raises:
        ConfigError: the file cannot be read as one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    next_step = "download it again, or set it to null to do without LPIPS"
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, UnpicklingError, SafetensorError) as problem:
        raise ConfigError(WHERE, f"must be a file of weights ({type(problem).__name__})", str(path), next_step) from None
    if not isinstance(tensors, dict):
        raise ConfigError(WHERE, "must be a file of named tensors", str(path), next_step)
    return tensors
