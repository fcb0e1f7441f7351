"""Compares the memory estimate of a run with what its training takes on a CPU, byte by byte as PyTorch's allocator reports it.

python -m experiments.benchmarks.memory            all cases, each in a process of its own: about five minutes on one core
python -m experiments.benchmarks.memory lora       one case

A mid-size Stable Diffusion (UNet channels 64, 128, 256, 256; 256 px, 32 x 32 latents; batch 1 + 1) with random weights is trained for three
steps by the real module and Trainer. `measured` is the largest "Total Allocated" of torch.profiler over the three steps, weights and all;
`resident` is what the process grew by from before the model was made to its largest, scratch space of the kernels included.
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image

from dreambooth.base.stable_diffusion import LAB_FOLDER, StableDiffusionModel
from dreambooth.config import Config, from_plain
from dreambooth.data import DreamBoothData, ImageSet
from dreambooth.memory import estimate
from dreambooth.module import DreamBoothModule
from dreambooth.recipes import resolve

PARTS = {"prior": "class_images", "method": "full", "objective": "follow_base", "optim": "adamw", "encoders": "base"}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, text encoder": {"method.train_text_encoder": True},
    "full, gradient checkpointing": {"trainer.gradient_checkpointing": True},
    "full, bf16-mixed": {"trainer.precision": "bf16-mixed"},
    "full, bf16-true": {"trainer.precision": "bf16-true"},
    "full, two batches a step": {"trainer.accumulate_grad_batches": 2},
    "full, self-distilled prior, EMA": {"prior": "self_distilled", "trainer.ema_decay": 0.99},
    "lora": {"method": "lora"},
    "lora, text encoder": {"method": "lora", "method.train_text_encoder": True},
    "lora, gradient checkpointing": {"method": "lora", "trainer.gradient_checkpointing": True},
    "cross_attention_kv": {"method": "cross_attention_kv"},
    "textual_inversion": {"method": "textual_inversion"},
}


def mid_size() -> StableDiffusionModel:
    """Returns a Stable Diffusion of 34 M parameters in the UNet with random weights, on the lab's small vocabulary."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(LAB_FOLDER, subfolder="tokenizer")
    unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(64, 128, 256, 256), cross_attention_dim=192, attention_head_dim=8, norm_num_groups=32
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(32, 64, 128, 128), layers_per_block=2, latent_channels=4, sample_size=256, **blocks)
    shape = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4}
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=77, **shape))
    tokenizer.model_max_length = 77
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    return StableDiffusionModel(unet, text_encoder, vae, tokenizer, scheduler)


def case_config(changes: dict[str, Any]) -> Config:
    """Returns the resolved config of a case: three steps at 256 px, batch 1 + 1."""
    plain: dict[str, Any] = {"base": {"name": "stable_diffusion"}}
    for group, name in (PARTS | {key: value for key, value in changes.items() if "." not in key}).items():
        plain[group] = {"name": name}
    settings = {
        "trainer.max_steps": 3,
        "trainer.accelerator": "cpu",
        "data.resolution": 256,
        "data.batch_size": 1,
        "prior.batch_size": 1,
        "sampling.batch_size": 1,
        "method.train_text_encoder": False,
        "method.train_token": False,
    }
    config = from_plain(plain, "case")
    for dotted, value in (settings | {key: value for key, value in changes.items() if "." in key}).items():
        section, key = dotted.split(".")
        node = getattr(config, section)
        if key in {field.name for field in dataclasses.fields(node)}:
            setattr(node, key, value)
    return resolve(config)


def measure(name: str) -> dict[str, Any]:
    """Returns the estimate of a case in bytes, by parts, and what its training took."""
    config = case_config(CASES[name])
    rng = np.random.default_rng(0)
    photos = ImageSet([Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)) for _ in range(4)], ["a photo of a sks robot"] * 4)
    estimated = estimate(config, mid_size())
    before = _resident_bytes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        base = mid_size()
        groups = config.method.attach(base, config.subject.identifier, config.subject.class_noun, config.seed)
        module, data = DreamBoothModule(config, base, groups), DreamBoothData(config, photos, photos)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(
            max_steps=3,
            accelerator="cpu",
            precision=config.trainer.precision,
            accumulate_grad_batches=config.trainer.accumulate_grad_batches,
            gradient_clip_val=config.trainer.gradient_clip_val,
            **quiet,
        )
        trainer.fit(module, data)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"name": name, "measured": allocated_peak(profile), "resident": grown, "estimated": estimated._asdict() | {"training": estimated.training}}


def allocated_peak(profile: torch.profiler.profile) -> int:
    """Returns the most bytes that were allocated at once while a profile was taken."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        trace = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    events = [event["args"] for event in trace if event.get("name") == "[memory]"]
    return max(event["Total Allocated"] for event in events) - (events[0]["Total Allocated"] - events[0]["Bytes"])


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    """Prints a Markdown table, a row a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"some of: {'; '.join(CASES)}")
    parser.add_argument("--json", action="store_true", help="one case as JSON")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps(measure(arguments.cases[0])))
        return
    print("| case | estimated MB | weights | gradients | optimizer | activations | measured MB | error | resident MB |\n|---|" + "---|" * 8)
    for name in arguments.cases or CASES:
        done = subprocess.run([sys.executable, "-m", "experiments.benchmarks.memory", "--json", name], capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        parts = [f"{row['estimated'][key] / 1e6:.0f}" for key in ("training", "weights", "gradients", "optimizer", "activations")]
        error = row["estimated"]["training"] / row["measured"] - 1
        print(f"| {name} | {' | '.join(parts)} | {row['measured'] / 1e6:.0f} | {error:+.1%} | {row['resident'] / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
