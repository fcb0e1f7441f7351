"""The lab's judges: an identity encoder in DINO's role, an image and text encoder in CLIP's role, both trained on the lab's world alone.

`weights/README.md` says how good the shipped ones are. A folder of scorers holds their weights, a `config.json` with the shape of the
networks (`Layout`) and a tokenizer.
"""

import json
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreambooth.errors import UserError
from dreambooth.lab.paths import SCORERS_FOLDER

FEATURES = 128
BATCH = 256  # images at once: bounds the memory


@dataclass(frozen=True)
class Layout:
    """The shape of the networks."""

    image_side: int = 64  # pixels that the image encoders see; at 32 they forgive blur
    features: int = FEATURES
    stem: int = 32  # channels of the first convolution
    blocks: tuple[tuple[int, int], ...] = ((64, 2), (128, 2), (128, 1), (192, 2))  # channels and stride of each residual block
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4

    @classmethod
    def read(cls, folder: Path) -> "Layout":
        """Returns the layout that a folder's config.json holds.

        Raises:
            UserError: the file is not there, or does not hold a layout.
        """
        file = _present(folder / "config.json", "says the shape of the lab's scorers")
        try:
            plain = json.loads(file.read_text(encoding="utf-8"))
            return cls(**{**plain, "blocks": tuple((int(channels), int(stride)) for channels, stride in plain["blocks"])})
        except (ValueError, TypeError, KeyError) as problem:
            raise UserError(str(file), f"must hold the layout of the lab's scorers ({problem})", next_step="copy that file again") from None

    def to_plain(self) -> dict[str, Any]:
        """Returns what config.json holds."""
        return asdict(self)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut; stride 2 halves the picture."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1)
        self.norm2 = nn.GroupNorm(8, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1)
        plain = channels_in == channels_out and stride == 1
        self.shortcut = nn.Identity() if plain else nn.Conv2d(channels_in, channels_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class ImageEncoder(nn.Module):
    """A small residual network: pictures -> unit features."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.image_side, self.features = layout.image_side, layout.features
        self.stem = nn.Conv2d(3, layout.stem, 3, 1, 1)
        channels = [layout.stem, *(width for width, _ in layout.blocks)]
        strides = [stride for _, stride in layout.blocks]
        self.blocks = nn.Sequential(*(ResidualBlock(*shape) for shape in zip(channels, channels[1:], strides, strict=False)))
        self.norm = nn.GroupNorm(8, channels[-1])
        self.head = nn.Linear(channels[-1] * 2, layout.features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, side, side) in [-1, 1] -> (B, features) of length 1."""
        return self.pool(self.feature_map(x))

    def feature_map(self, x: Tensor) -> Tensor:
        """(B, 3, side, side) in [-1, 1] -> (B, C, h, w): the last features that still know where they are."""
        return F.silu(self.norm(self.blocks(self.stem(x))))

    def pool(self, hidden: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, features) of length 1."""
        pooled = torch.cat([hidden.mean((2, 3)), hidden.amax((2, 3))], 1)  # (B, 2 C)
        return F.normalize(self.head(pooled), dim=-1)


def new_text_encoder(layout: Layout, tokenizer: Any) -> Any:
    """Returns an untrained CLIP text encoder whose projection has the features of the image encoder."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=layout.text_width,
            intermediate_size=layout.text_width * 3,
            projection_dim=layout.features,
            num_hidden_layers=layout.text_layers,
            num_attention_heads=layout.text_heads,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class LabScorers(nn.Module):
    """The lab's identity, image and text encoders, frozen; all features are (N, D), float32, of length 1.

    `load` makes one with its weights. Gradients are off, and autocast has no effect on the scores.

    Args:
        layout: shape of the networks.
        tokenizer: a CLIPTokenizer.
    """

    def __init__(self, layout: Layout, tokenizer: Any) -> None:
        super().__init__()
        self.layout, self.tokenizer = layout, tokenizer
        self.identity_encoder = ImageEncoder(self.layout)
        self.image_encoder = ImageEncoder(self.layout)
        self.text_encoder = new_text_encoder(self.layout, self.tokenizer)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: str | Path | None = None) -> "LabScorers":
        """Returns the scorers of a folder with identity, image and text.safetensors; None takes the packaged ones.

        Raises:
            UserError: when a file is missing.
        """
        from safetensors.torch import load_file
        from transformers import CLIPTokenizer

        folder = SCORERS_FOLDER if folder is None else Path(folder)
        layout, own = Layout.read(folder), _present(folder / "tokenizer", "splits the prompts for the lab's scorers")
        scorers = cls(layout, CLIPTokenizer.from_pretrained(own))
        for name in ("identity", "image", "text"):
            file = _present(folder / f"{name}.safetensors", "holds one of the lab's scorers")
            weights = {key: tensor.float() for key, tensor in load_file(file).items()}
            scorers.get_submodule(f"{name}_encoder").load_state_dict(weights)
        return scorers

    @property
    def device(self) -> torch.device:
        """Where the encoders lie."""
        return self.image_encoder.head.weight.device

    def train(self, mode: bool = True) -> "LabScorers":
        """Stays in evaluation mode, also inside a module that is trained."""
        return super().train(False)

    def identity(self, images: Tensor) -> Tensor:
        """Returns features that are alike for one subject in any pose and place: (N, 3, H, W) in [-1, 1] -> (N, D)."""
        return self.encode(self.identity_encoder, images)

    def image(self, images: Tensor) -> Tensor:
        """Returns features of what is where, to be compared with `text`: (N, 3, H, W) in [-1, 1] -> (N, D)."""
        return self.encode(self.image_encoder, images)

    @torch.no_grad()
    def text(self, prompts: list[str]) -> Tensor:
        """Returns features of prompts, to be compared with `image`: (N, D).

        Raises:
            UserError: for a prompt of more tokens than the text encoder reads.
        """
        limit = self.tokenizer.model_max_length
        for prompt in prompts:
            length = len(self.tokenizer(prompt).input_ids)
            if length > limit:
                where, rule = f"the prompt {prompt!r}", f"must have at most {limit} tokens for the lab's text encoder"
                raise UserError(where, rule, length, "use fewer words; a word that the lab does not know costs a token a letter")
        tokens = self.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids.to(self.device)  # (N, L)
        with torch.autocast(self.device.type, enabled=False):
            return F.normalize(self.text_encoder(tokens).text_embeds, dim=-1)

    @torch.no_grad()
    def identity_with_patches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns identity features (N, D) and the map that they were pooled from (N, h, w, C): (N, 3, H, W) in [-1, 1]."""
        encoder = self.identity_encoder
        with torch.autocast(self.device.type, enabled=False):
            maps = torch.cat([encoder.feature_map(shrink(batch.to(self.device).float(), encoder.image_side)) for batch in images.split(BATCH)])
            return encoder.pool(maps), maps.permute(0, 2, 3, 1)

    def patch_shares(self, masks: Tensor) -> Tensor:
        """Returns the share of each place of the identity map that a mask covers, resized as a picture is: (N, H, W) in [0, 1] -> (N, h, w)."""
        side = self.identity_encoder.image_side
        small = shrink(masks[:, None].float(), side).clamp(0, 1)  # (N, 1, side, side)
        return F.avg_pool2d(small, prod(stride for _, stride in self.layout.blocks))[:, 0]

    @torch.no_grad()
    def encode(self, encoder: ImageEncoder, images: Tensor) -> Tensor:
        """Returns an encoder's features of pictures of any size, a bounded number at a time."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be float (N, 3, H, W) in [-1, 1], got {images.dtype} {tuple(images.shape)}")
        if not len(images):
            return torch.empty(0, encoder.features, device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            return torch.cat([encoder(shrink(batch.to(self.device).float(), encoder.image_side)) for batch in images.split(BATCH)])


def shrink(images: Tensor, side: int) -> Tensor:
    """Returns pictures of any size at side x side pixels, by the mean of what each pixel covers (smaller ones are interpolated)."""
    if images.shape[-2:] == (side, side):
        return images
    if min(images.shape[-2:]) > side and not any(length % side for length in images.shape[-2:]):
        return F.interpolate(images, size=(side, side), mode="area")
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False)


def _present(path: Path, use: str) -> Path:
    """Returns the path; UserError when nothing is there."""
    if not path.exists():
        raise UserError(str(path), f"must be there: it {use}", next_step="give the folder of the lab's scorers")
    return path
