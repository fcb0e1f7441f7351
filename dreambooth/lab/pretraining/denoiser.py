"""Stage base: a stock UNet2DConditionModel, from scratch, on the latents of the lab's autoencoder.

Its text encoder is that of the text-image scorer, kept as it is, as Stable Diffusion's is CLIP's. One that was trained with the UNet hardly
told classes apart: 0.6 % of the variance of its features came from the class word after 196,000 pictures, of the scorer's 38 %.

The network predicts the clean latents (`prediction_type="sample"`), weighted by 1 / sigma^2 up to a cap: the loss of v-prediction without
its steep part at low noise (Salimans & Ho 2022). The two differ only in what the last layer must put out; clean latents are the simpler
target for a small network, since they hold no noise that it would have to carry through, and the measured DreamBooth settings of the lab
were found with it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dreambooth.base.stable_diffusion import StableDiffusionModel
from dreambooth.diffusion import add_noise, capped_velocity_weight, prediction_target, scaled_linear_alphas_cumprod
from dreambooth.errors import UserError
from dreambooth.files import write_with
from dreambooth.grids import image_grid
from dreambooth.lab.measures import sharpness, to_bytes
from dreambooth.lab.pretraining.data import Renders
from dreambooth.lab.pretraining.tokenizer import token_ids
from dreambooth.lab.pretraining.training import DENOISER, Job, Place, Say, generator, precision
from dreambooth.randomness import SAMPLING, normal

PREDICTION_TYPE = "sample"
SHOWN_STEPS, SHOWN_GUIDANCE = 20, 3.0
SHUT = 1e-3  # a hidden number of a feed-forward layer below this was shut off by its gate
FEW_OPEN = 0.05  # share of open gates below which a layer is dead


def new_unet(widths: tuple[int, ...], channels: int, text_width: int, groups: int, cells: int) -> Any:
    """Returns an untrained UNet2DConditionModel that attends to the text on all levels but the finest."""
    from diffusers import UNet2DConditionModel

    attends = [level > 0 for level in range(len(widths))]
    unet = UNet2DConditionModel(
        sample_size=cells,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=tuple("CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        cross_attention_dim=text_width,
        attention_head_dim=[max(1, width // 32) for width in widths],  # diffusers reads it as the number of heads
        norm_num_groups=groups,
    )
    with torch.no_grad():  # every block begins near the identity, and the first prediction near the mean
        for name, weight in unet.named_parameters():
            if name.endswith(("conv2.weight", "proj_out.weight")):
                weight *= 0.2
        unet.conv_out.weight *= 0.1
    return unet


def new_scheduler() -> Any:
    """Returns the sampler that the folder names: DPM-Solver++ (2M), good from 16 steps."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=PREDICTION_TYPE,
        timestep_spacing="trailing",
        steps_offset=1,
    )


class Latents:
    """The moments of the latents of some renders, computed once and kept in one file as float16.

    Args:
        file: where to.
        vae: the trained autoencoder.
        renders: the pictures.
        numbers: which of them, (N,): row k of the file belongs to picture numbers[k].
        say: gets a line now and then.
    """

    def __init__(self, file: Path, vae: Any, renders: Renders, numbers: Tensor, say: Say) -> None:
        self.device, self.numbers, self.say = renders.device, numbers, say
        channels, cells = 2 * vae.config.latent_channels, 64 // 2 ** (len(vae.config.block_out_channels) - 1)
        shape = (len(numbers), channels, cells, cells)
        if not file.is_file() or np.load(file, mmap_mode="r").shape != shape:
            write_with(file, lambda path: self._encode(path, shape, vae, renders))
        stored = np.load(file, mmap_mode="r" if self.device.type == "cpu" else None)
        self.moments = stored if self.device.type == "cpu" else torch.from_numpy(stored).to(self.device)

    @torch.no_grad()
    def _encode(self, path: Path, shape: tuple[int, ...], vae: Any, renders: Renders) -> None:
        stored, start, last = np.lib.format.open_memmap(path, "w+", np.float16, shape), time.monotonic(), 0.0
        for part in torch.arange(shape[0]).split(512):
            moments = vae.encode(renders.pixels(self.numbers[part].to(self.device))).latent_dist.parameters
            stored[int(part[0]) : int(part[-1]) + 1] = moments.half().cpu().numpy()
            done, spent = int(part[-1]) + 1, time.monotonic() - start
            if spent - last > 10:
                last = spent
                self.say(f"base: latents of {done} of {shape[0]} pictures, about {spent / done * (shape[0] - done):.0f} s left")
        stored.flush()

    def sample(self, index: Tensor, noise: Tensor) -> Tensor:
        """Returns samples of the posteriors, (B, C, h, w) float32."""
        if isinstance(self.moments, np.ndarray):
            moments = torch.from_numpy(self.moments[index.numpy()])
        else:
            moments = self.moments[index]
        mean, log_variance = moments.float().chunk(2, 1)
        return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise


class DenoiserJob(Job):
    """The training of the UNet, for a text encoder and an autoencoder that stay as they are."""

    name = "base"

    def __init__(
        self,
        recipe: dict[str, Any],
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        renders: Renders,
        latents: Latents,
        shown: list[str],
        place: Place,
        start: Path | None = None,
    ) -> None:
        self.recipe, self.tokenizer, self.text_encoder, self.vae, self.renders = recipe, tokenizer, text_encoder, vae, renders
        self.latents, self.shown, self.place, self.matrix_decay = latents, shown, place, recipe["matrix_decay"]
        self.batch_size, self.matrix_lr, self.other_lr = recipe["batch_size"], recipe["matrix_lr"], recipe["other_lr"]
        self.shape = (vae.config.latent_channels, *latents.moments.shape[-2:])
        torch.manual_seed(place.seed + 3)
        unet = new_unet(tuple(recipe["widths"]), self.shape[0], text_encoder.config.hidden_size, recipe["groups"], self.shape[-1])
        if start is not None:
            take_up(unet, start)
        self.networks = {"unet": unet}
        self.tokens = token_ids(tokenizer, [renders.rows[number].caption for number in latents.numbers.tolist()]).to(place.device)  # (N, L)
        self.no_words = token_ids(tokenizer, [""])[0].to(place.device)  # (L,)
        self.alphas_cumprod = scaled_linear_alphas_cumprod().to(place.device)
        self._forward = torch.compile(unet) if place.compiled else unet

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        draws, device, batch = generator(self.place, DENOISER, step), self.place.device, self.batch_size
        index = torch.randint(len(self.tokens), (batch,), generator=draws, device=device)
        posterior, noise = torch.randn(2, batch, *self.shape, generator=draws, device=device)
        t = torch.randint(len(self.alphas_cumprod), (batch,), generator=draws, device=device)
        is_mute = torch.rand(batch, generator=draws, device=device) < self.recipe["caption_dropout"]
        index, posterior, noise, t, is_mute = (self.place.ranks.share(drawn) for drawn in (index, posterior, noise, t, is_mute))
        tokens = torch.where(is_mute[:, None], self.no_words, self.tokens[index])
        x0 = self.latents.sample(index, posterior)
        noisy = add_noise(x0, noise, t, self.alphas_cumprod).contiguous(memory_format=torch.channels_last)
        with precision(device):
            with torch.no_grad():
                text = self.text_encoder(tokens).last_hidden_state  # (B, L, D)
            pred = self._forward(noisy, t, text).sample
        target = prediction_target(PREDICTION_TYPE, x0, noise, t, self.alphas_cumprod)
        weight = capped_velocity_weight(t, self.alphas_cumprod, self.recipe["weight_cap"], PREDICTION_TYPE)
        return (weight * (pred.float() - target).pow(2).flatten(1).mean(1)).mean(), {}

    @torch.no_grad()
    def measure(self, averages: dict[str, nn.Module]) -> tuple[dict[str, float], Image.Image]:
        model = assemble(averages["unet"], self.text_encoder, self.vae, self.tokenizer)
        with watched_gates(averages["unet"]) as shares:
            pictures = draw(model, self.shown, [(0, number) for number in range(len(self.shown))])
        real = self.renders.pixels(self.latents.numbers[:256].to(self.place.device))
        rows = [to_bytes(pictures[first : first + 12]) for first in range(0, len(pictures), 12)]
        ratio = float(sharpness(pictures).mean() / sharpness(real).mean().cpu())
        return {"sharpness_ratio": ratio, "open_gates": min(torch.tensor(own).mean().item() for own in shares.values())}, image_grid(rows, scale=2)


@contextmanager
def watched_gates(unet: nn.Module) -> Iterator[dict[str, list[float]]]:
    """Collects, of each feed-forward layer in each call of the network, the share of hidden numbers that its gates let through.

    Near 0 a layer does nothing, and learns nothing any more: its gradient is gone. It happened under Muon, whose steps are full ones of noise
    where there is no gradient, while no decay held the matrices back.
    """
    shares: dict[str, list[float]] = {}

    def watch(name: str) -> Any:
        return lambda layer, inputs, output: shares.setdefault(name, []).append(float((inputs[0].abs() > SHUT).float().mean()))

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in unet.named_modules() if name.endswith("ff.net.2")]
    try:
        yield shares
    finally:
        for hook in hooks:
            hook.remove()


def take_up(unet: Any, folder: Path) -> None:
    """Gives an untrained network the weights of a trained one, and lets its feed-forward layers begin anew where their gates are shut.

    The network draws what the trained one draws: a layer with shut gates puts out its bias and nothing else, and so does the new one at first,
    whose last matrix is zero; but its gates are open, so it can learn.

    Args:
        unet: the untrained network.
        folder: a folder of diffusers with a network of the same shape.

    Raises:
        UserError: the trained network has another shape.
    """
    fresh = {name: weight.clone() for name, weight in unet.state_dict().items()}
    trained = type(unet).from_pretrained(folder, local_files_only=True).float()
    if {name: weight.shape for name, weight in trained.state_dict().items()} != {name: weight.shape for name, weight in fresh.items()}:
        rule = "must hold a UNet of the recipe's widths and text encoder"
        raise UserError("--start", rule, str(folder), "set base.widths to its block_out_channels")
    unet.load_state_dict(trained.state_dict())
    channels, cells = unet.config.in_channels, unet.config.sample_size
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(8, channels, cells, cells, generator=draws)
    text = torch.randn(8, 16, unet.config.cross_attention_dim, generator=draws)
    with torch.no_grad(), watched_gates(unet) as shares:
        unet(noise, torch.arange(8) * 125, text)
    with torch.no_grad():
        for name, (share,) in shares.items():
            if share < FEW_OPEN:
                layer = unet.get_submodule(name.removesuffix(".net.2"))
                layer.net[0].load_state_dict({key: fresh[f"{name.removesuffix('2')}0.{key}"] for key in layer.net[0].state_dict()})
                layer.net[2].weight.zero_()


def assemble(unet: Any, text_encoder: Any, vae: Any, tokenizer: Any) -> StableDiffusionModel:
    """Returns the parts as one base model."""
    return StableDiffusionModel(unet=unet, text_encoder=text_encoder, vae=vae, tokenizer=tokenizer, scheduler=new_scheduler())


@torch.no_grad()
def draw(
    model: StableDiffusionModel,
    prompts: list[str],
    keys: list[tuple[int, ...]],
    steps: int = SHOWN_STEPS,
    guidance: float = SHOWN_GUIDANCE,
    batch: int = 64,
) -> Tensor:
    """Returns one picture a prompt by the folder's own sampler, (N, 3, H, W) in [-1, 1] on the CPU; each depends on its prompt and key alone."""
    if len(prompts) != len(keys):
        raise UserError("prompts and keys", "must have the same length", (len(prompts), len(keys)), "give one key a prompt")
    pipeline, pictures = model.pipeline(), []
    for first in range(0, len(prompts), batch):
        own = slice(first, first + batch)
        latents = torch.stack([normal(model.latent_shape(), SAMPLING, *key) for key in keys[own]]).to(model.device, model.unet.dtype)
        output = pipeline(prompts[own], num_inference_steps=steps, guidance_scale=guidance, latents=latents, output_type="np")
        pictures.append(torch.from_numpy(output.images).permute(0, 3, 1, 2) * 2 - 1)
    return torch.cat(pictures).float()
