"""The lab's judges: an identity encoder in DINO's role, an image and text encoder in CLIP's role, both trained on the lab's world alone.

They see 32 x 32 pixels, so they forgive blur; they know four classes (robot, teapot, car, duck), and hardly the
body's colour. `weights/README.md` says how good they are.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreambooth.errors import UserError
from dreambooth.lab.paths import BASE_FOLDER, SCORERS_FOLDER

IMAGE_SIDE = 32  # pixels that the encoders see
FEATURES = 128
WIDTHS = (32, 64, 128, 192)
TEXT_WIDTH = 128
TEXT_LAYERS = 3
BATCH = 256  # images at once: bounds the memory


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

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, 1, 1)
        self.blocks = nn.Sequential(
            ResidualBlock(WIDTHS[0], WIDTHS[1], 2),
            ResidualBlock(WIDTHS[1], WIDTHS[2], 2),
            ResidualBlock(WIDTHS[2], WIDTHS[2]),
            ResidualBlock(WIDTHS[2], WIDTHS[3], 2),
        )
        self.norm = nn.GroupNorm(8, WIDTHS[3])
        self.head = nn.Linear(WIDTHS[3] * 2, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) in [-1, 1] -> (B, 128) of length 1."""
        hidden = F.silu(self.norm(self.blocks(self.stem(x))))  # (B, 192, 4, 4)
        pooled = torch.cat([hidden.mean((2, 3)), hidden.amax((2, 3))], 1)  # (B, 384)
        return F.normalize(self.head(pooled), dim=-1)


class LabScorers(nn.Module):
    """The lab's identity, image and text encoders, frozen; all features are (N, 128), float32, of length 1.

    `load` makes one with its weights. Gradients are off, and autocast has no effect on the scores.
    """

    def __init__(self) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

        self.tokenizer = CLIPTokenizer.from_pretrained(BASE_FOLDER / "tokenizer")
        self.identity_encoder = ImageEncoder()
        self.image_encoder = ImageEncoder()
        self.text_encoder = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=TEXT_WIDTH * 3,
                projection_dim=FEATURES,
                num_hidden_layers=TEXT_LAYERS,
                num_attention_heads=4,
                max_position_embeddings=self.tokenizer.model_max_length,
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        )
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: str | Path | None = None) -> "LabScorers":
        """Returns the scorers of a folder with identity, image and text.safetensors; None takes the packaged ones.

        Raises:
            UserError: when a file is missing.
        """
        from safetensors.torch import load_file

        folder = SCORERS_FOLDER if folder is None else Path(folder)
        scorers = cls()
        for name in ("identity", "image", "text"):
            file = folder / f"{name}.safetensors"
            if not file.is_file():
                rule = "must be there: it holds one of the lab's scorers"
                raise UserError(str(file), rule, next_step="give the folder of the lab's scorers")
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
        """Returns features that are alike for one subject in any pose and place: (N, 3, H, W) in [-1, 1] -> (N, 128)."""
        return self.encode(self.identity_encoder, images)

    def image(self, images: Tensor) -> Tensor:
        """Returns features of what is where, to be compared with `text`: (N, 3, H, W) in [-1, 1] -> (N, 128)."""
        return self.encode(self.image_encoder, images)

    @torch.no_grad()
    def text(self, prompts: list[str]) -> Tensor:
        """Returns features of prompts, to be compared with `image`: (N, 128).

        Raises:
            UserError: for a prompt of more tokens than the text encoder reads.
        """
        limit = self.tokenizer.model_max_length
        for prompt in prompts:
            length = len(self.tokenizer(prompt).input_ids)
            if length > limit:
                where, rule = f"the prompt {prompt!r}", f"must have at most {limit} tokens for the lab's text encoder"
                raise UserError(where, rule, length, "use fewer words; a word that the lab does not know costs a token a letter")
        tokens = self.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids.to(self.device)  # (N, 16)
        with torch.autocast(self.device.type, enabled=False):
            return F.normalize(self.text_encoder(tokens).text_embeds, dim=-1)

    @torch.no_grad()
    def encode(self, encoder: ImageEncoder, images: Tensor) -> Tensor:
        """Returns an encoder's features of pictures of any size, a bounded number at a time."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be float (N, 3, H, W) in [-1, 1], got {images.dtype} {tuple(images.shape)}")
        if not len(images):
            return torch.empty(0, FEATURES, device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            return torch.cat([encoder(shrink(batch.to(self.device).float())) for batch in images.split(BATCH)])


def shrink(images: Tensor) -> Tensor:
    """Returns pictures of any size at the encoders' 32 x 32, by the mean of what each pixel covers (smaller ones are interpolated)."""
    if images.shape[-2:] == (IMAGE_SIDE, IMAGE_SIDE):
        return images
    if min(images.shape[-2:]) > IMAGE_SIDE and not any(side % IMAGE_SIDE for side in images.shape[-2:]):
        return F.interpolate(images, size=(IMAGE_SIDE, IMAGE_SIDE), mode="area")
    return F.interpolate(images, size=(IMAGE_SIDE, IMAGE_SIDE), mode="bilinear", antialias=True, align_corners=False)
