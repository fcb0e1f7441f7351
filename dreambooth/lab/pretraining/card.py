"""What pretraining leaves behind: the weights of all parts in float16, within their limit, and a model card with the measured figures."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dreambooth.errors import UserError
from dreambooth.files import write_json, write_tensors, write_text
from dreambooth.lab.pretraining.denoiser import assemble
from dreambooth.lab.pretraining.tokenizer import save_tokenizer
from dreambooth.lab.scorers import Layout
from dreambooth.lab.splits import RARE_TOKENS, TRAINED_CLASSES, TRAINED_CONTEXTS
from dreambooth.lab.world import WORLD_VERSION
from dreambooth.statistics.intervals import Interval, describe

STAGES_FILE = "training.json"  # beside the card: how each network was trained
LIMIT_BYTES = 40_000_000  # of all weights: they are in the history of the repository for ever


def write_base(folder: Path, unet: Any, text_encoder: Any, vae: Any, tokenizer: Any, classes: Sequence[str], contexts: Sequence[str]) -> None:
    """Writes the stock diffusers folder in float16, and lab.json in it: the classes and contexts are those that the UNet was taught."""
    assemble(unet, text_encoder, vae, tokenizer).to("cpu", torch.float16, memory_format=torch.contiguous_format).save(folder)
    config = folder / "text_encoder" / "config.json"  # else a plain call of stock tools gives a float16 text encoder beside a float32 UNet
    write_json(config, {**json.loads(config.read_text(encoding="utf-8")), "dtype": "float32"})
    mark = {
        "world": WORLD_VERSION,
        "classes": list(classes),
        "contexts": list(contexts),
        "scorers": "../scorers",
        "scorer_classes": list(TRAINED_CLASSES),
    }
    write_json(folder / "lab.json", mark)


def write_scorers(folder: Path, networks: dict[str, nn.Module], layout: Layout, tokenizer: Any) -> None:
    """Writes the scorers in float16 with the layout and the tokenizer that `LabScorers.load` reads.

    Args:
        folder: where to.
        networks: "identity", "image" and "text".
        layout: their shape.
        tokenizer: of the text encoder.
    """
    for name in ("identity", "image", "text"):
        tensors = {key: tensor.half() for key, tensor in networks[name].state_dict().items() if tensor.is_floating_point()}
        write_tensors(folder / f"{name}.safetensors", tensors, {"format": "pt"})
    write_json(folder / "config.json", layout.to_plain())
    save_tokenizer(tokenizer, folder / "tokenizer")


def check_size(output: Path) -> int:
    """Returns the bytes of all weights; a UserError when they are above the limit."""
    size = sum(file.stat().st_size for file in weights_files(output))
    if size > LIMIT_BYTES:
        rule = f"must hold at most {LIMIT_BYTES / 1e6:.0f} MB of weights"
        raise UserError(str(output), rule, f"{size / 1e6:.1f} MB", "choose smaller widths")
    return size


def weights_files(output: Path) -> list[Path]:
    """Returns the weights of base and scorers, sorted."""
    return sorted(file for part in ("base", "scorers") for file in (output / part).rglob("*.safetensors"))


def read_stages(folder: Path) -> dict[str, Any]:
    """Returns how each network of a folder was trained, by name; empty where that is not known."""
    file = folder / STAGES_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def adopt_stages(output: Path, start: Path) -> None:
    """Takes over how the networks of another folder were trained, unless that was done; its base becomes an earlier one: base 1, base 2, ..."""
    stages = read_stages(start)
    if stages and not (output / STAGES_FILE).is_file():
        earlier = sum(name.startswith("base ") for name in stages)
        write_json(output / STAGES_FILE, {f"base {earlier + 1}" if name == "base" else name: stage for name, stage in stages.items()})


def write_card(output: Path, work: Path, quality: dict[str, Any] | None, titles: dict[str, str]) -> Path:
    """Writes README.md: what the weights are, how they were made, and what was measured; returns its path.

    Args:
        output: holds base/ and scorers/.
        work: holds the summaries of the stages.
        quality: what `dreambooth.lab.quality` wrote; None before it has run.
        titles: of its figures.
    """
    size, mark = check_size(output), json.loads((output / "base" / "lab.json").read_text(encoding="utf-8"))
    stages = read_stages(output) | {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(work.glob("*.json"))}
    write_json(output / STAGES_FILE, stages)
    others = [word for word in (*TRAINED_CLASSES, *TRAINED_CONTEXTS) if word not in (*mark["classes"], *mark["contexts"])]
    lines = [
        "# The lab's weights",
        "",
        "A small latent text-to-image model and its judges, trained from nothing by `python -m dreambooth.lab.pretrain` on the project's own",
        "procedural world. No photo, no scraped caption and no other model went in. They draw and know nothing else: an instrument,",
        "not an image generator. This page was written by the program.",
        "",
        f"- `base/`: an ordinary diffusers folder. `scorers/`: identity, image, text encoders. All float16, {size / 1e6:.1f} MB together.",
        f"- World {WORLD_VERSION}. The base draws {', '.join(mark['classes'])}, {', '.join(mark['contexts'])}.",
        f"- Autoencoder and scorers know these as well: {', '.join(others) or 'no others'}.",
        f"- Rare words, one token each and in no caption: {', '.join(RARE_TOKENS)}.",
        "",
        "## Training",
        "",
        "| network | images seen | steps | seconds | device | settings | last quick figures |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, stage in sorted(stages.items()):
        settings = ", ".join(f"{key} {value}" for key, value in stage["recipe"].items())
        figures = ", ".join(f"{key} {value:.3f}" for key, value in stage["figures"].items())
        unfinished = "" if stage["steps"] == stage["planned_steps"] else " (not finished)"
        lines.append(
            f"| {name} | {stage['images_seen']:,} | {stage['steps']}{unfinished} | {stage['seconds']} | {stage['device']} | {settings} | {figures} |"
        )
    lines += ["", "## Quality", "", *_quality_lines(quality, titles), "", "## Files", "", "| file | bytes | sha256 |", "|---|---|---|"]
    for file in weights_files(output):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        lines.append(f"| {file.relative_to(output).as_posix()} | {file.stat().st_size:,} | {digest} |")
    lines += [
        "",
        "## Limits",
        "",
        "- Base and scorers share the renderer: agreement between them says nothing about photos of real things.",
        "- What was held out of training (classes, places, subjects: `dreambooth/lab/splits.py`) is unknown to base and scorers alike.",
        "- A word that the world does not have is spelled in pieces and means nothing to the model.",
    ]
    return write_text(output / "README.md", "\n".join(lines) + "\n")


def _quality_lines(quality: dict[str, Any] | None, titles: dict[str, str]) -> list[str]:
    if quality is None:
        return ["Not measured yet: run `python -m dreambooth.lab.pretrain --stage card`."]
    lines = [
        f"On held-out seeds, with 95 % intervals: {len(quality['classes'])} classes x {len(quality['contexts'])} places x {quality['seeds']} seeds,",
        f"{quality['subjects_per_class']} held-out subjects of each class x {quality['views_per_subject']} pictures.",
        "",
        "| figure | value |",
        "|---|---|",
    ]
    return lines + [f"| {titles[name]} | {describe(Interval(**values), 3)} |" for name, values in quality["figures"].items()]
