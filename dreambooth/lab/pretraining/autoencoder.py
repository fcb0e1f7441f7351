"""Stage vae: a stock AutoencoderKL between 64 px pictures and 16 x 16 latents of 8 channels, trained end to end.

End to end, not with the encoder fixed to the PCA of 4 x 4 patches as in the first version of the lab: that one had its latents at minute 0,
which only a machine without a GPU needs, and could not pass more than eight numbers of a patch (27.6 dB); a trained encoder chooses what
to pass, and needs no weights written by hand. At its end the latents are brought to mean 0 and deviation 1 a channel by folding the change
into the two 1 x 1 convolutions between the halves, which is exact, so that the scaling factor is 1.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dreambooth.grids import image_grid
from dreambooth.lab.measures import psnr, to_bytes
from dreambooth.lab.pretraining.data import HeldOut, Renders
from dreambooth.lab.pretraining.training import AUTOENCODER, Job, Place, generator, precision

KL_WEIGHT = 1e-4  # of the mean over latent numbers: a posterior deviation of some percent, and no channel runs away
GRADIENT_WEIGHT, SQUARE_WEIGHT = 0.5, 2.0  # beside the absolute error: edges, and what PSNR counts
STATISTICS_IMAGES = 2048  # pictures from which the latents' mean and deviation are taken


def new_autoencoder(widths: tuple[int, ...], channels: int, groups: int) -> Any:
    """Returns an untrained AutoencoderKL that halves the sides len(widths) - 1 times."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=groups,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        force_upcast=False,
    )


def reconstruction_loss(decoded: Tensor, pictures: Tensor) -> Tensor:
    """Returns the mean absolute error of pixels and of their differences to the neighbours, and a share of the squared error."""
    error = decoded.float() - pictures
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + GRADIENT_WEIGHT * edges + SQUARE_WEIGHT * error.pow(2).mean()


class AutoencoderJob(Job):
    """The training of the autoencoder."""

    name = "vae"

    def __init__(self, recipe: dict[str, Any], renders: Renders, judged: HeldOut, place: Place) -> None:
        self.recipe, self.renders, self.judged, self.place = recipe, renders, judged, place
        self.batch_size, self.matrix_lr, self.other_lr = recipe["batch_size"], recipe["matrix_lr"], recipe["other_lr"]
        torch.manual_seed(place.seed)
        vae = new_autoencoder(tuple(recipe["widths"]), recipe["channels"], recipe["groups"])
        self.networks = {"vae": vae}
        self._forward = torch.compile(forward) if place.compiled else forward

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        draws = generator(self.place, AUTOENCODER, step)
        index = torch.randint(len(self.renders), (self.batch_size,), generator=draws, device=self.place.device)
        pictures, crop = self.renders.pixels(index), self.recipe["crop"]
        down, right, mirrored = torch.randint(2**20, (3,), generator=draws, device=self.place.device).tolist()
        top, left = (offset % (pictures.shape[-1] - crop + 1) for offset in (down, right))
        pictures = (pictures.flip(-1) if mirrored % 2 else pictures)[..., top : top + crop, left : left + crop]
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        vae = self.networks["vae"]
        cells = pictures.shape[-1] // 2 ** (len(vae.config.block_out_channels) - 1)
        noise = torch.randn(len(pictures), vae.config.latent_channels, cells, cells, generator=draws, device=self.place.device)
        with precision(self.place.device):
            decoded, mean, log_variance = self._forward(vae, pictures, noise)
        divergence = 0.5 * (mean.float().pow(2) + log_variance.float().exp() - 1 - log_variance.float()).mean()
        reconstruction = reconstruction_loss(decoded, pictures)
        return reconstruction + KL_WEIGHT * divergence, {"reconstruction": reconstruction.detach(), "divergence": divergence.detach()}

    @torch.no_grad()
    def measure(self, averages: dict[str, nn.Module]) -> tuple[dict[str, float], Image.Image]:
        decoded = roundtrip(averages["vae"], self.judged.pixels.to(self.place.device)).cpu()
        rows = [to_bytes(pictures[:12]) for pictures in (self.judged.pixels, decoded)]
        return {"psnr_db": float(psnr(decoded, self.judged.pixels).mean())}, image_grid(rows, ("render", "decoded"), scale=2)


class DecoderJob(AutoencoderJob):
    """The training of the decoding half alone, on an autoencoder whose latents others rest on already.

    Pictures get sharper while the latents stay what they are, to the bit: it may run beside or after the training of the base.

    Args:
        vae: the trained autoencoder.
    """

    name = "decoder"

    def __init__(self, recipe: dict[str, Any], vae: Any, renders: Renders, judged: HeldOut, place: Place) -> None:
        super().__init__(recipe, renders, judged, place)
        self.networks["vae"].load_state_dict(vae.state_dict())
        for half in (self.networks["vae"].encoder, self.networks["vae"].quant_conv):
            half.requires_grad_(False)


def forward(vae: Any, pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what a sample of the latents decodes to, and the mean and logarithmic variance of the latents."""
    latents = vae.encode(pictures).latent_dist
    return vae.decode(latents.mean + latents.std * noise).sample, latents.mean, latents.logvar


@torch.no_grad()
def roundtrip(vae: Any, pictures: Tensor, batch: int = 64) -> Tensor:
    """Returns pictures (N, 3, H, W) in [-1, 1] after coding and decoding, from the means of the latents."""
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample.float().clamp(-1, 1) for part in pictures.split(batch)])


@torch.no_grad()
def standardize_latents(vae: Any, renders: Renders) -> None:
    """Changes the autoencoder so that samples of its latents have mean 0 and deviation 1 in each channel; it decodes to the same as before."""
    numbers = np.linspace(0, len(renders) - 1, min(len(renders), STATISTICS_IMAGES)).astype(np.int64)
    parts = torch.from_numpy(numbers).to(renders.device).split(128)
    moments = [vae.encode(renders.pixels(part)).latent_dist for part in parts]
    latents = torch.cat([moment.mean for moment in moments]).transpose(0, 1).flatten(1).double()  # (C, N * h * w)
    spread = torch.cat([moment.var for moment in moments]).transpose(0, 1).flatten(1).double().mean(1)
    mean, deviation = latents.mean(1).float(), (latents.var(1) + spread).sqrt().float().clamp(min=1e-4)
    channels, coder, decoder = len(mean), vae.quant_conv, vae.post_quant_conv
    coder.weight[:channels] /= deviation.view(-1, 1, 1, 1)
    coder.bias[:channels] = (coder.bias[:channels] - mean) / deviation
    coder.bias[channels:] -= 2 * deviation.log()  # the logarithmic variance; the clamp of diffusers at -30 is far away
    decoder.bias += decoder.weight[:, :, 0, 0] @ mean
    decoder.weight *= deviation.view(1, -1, 1, 1)
