"""A run's model for other tools: whole or as an adapter, every file read back into a stock pipeline and compared before it is called done."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreambooth import randomness
from dreambooth.adapters.methods import trainable_state
from dreambooth.adapters.token_rows import token_rows
from dreambooth.base.protocol import BaseModel, quiet
from dreambooth.base.stable_diffusion import StableDiffusion
from dreambooth.config import to_plain
from dreambooth.errors import UserError
from dreambooth.interop.embedding import embedding_name, embedding_state, save_embedding
from dreambooth.interop.ldm import max_difference_after_reload, save_single_file
from dreambooth.interop.lora import has_dora, has_lora, kohya_metadata, save_diffusers_lora, save_kohya_lora
from dreambooth.runs import Trained

LAYOUTS = ("model", "lora", "kohya", "embedding")
MAX_NOISE, MAX_SHARE = 1e-5, 0.01  # of the output, and of what the adapter does to it: differences above both are a lost or a wrong tensor


def export(trained: Trained, output: Path, layout: str, dtype: torch.dtype, title: str) -> list[str]:
    """Writes a model and returns one line for each file and each thing to know.

    Args:
        trained: with its method attached; it is used up.
        output: a folder, or a file that ends in .safetensors.
        layout: "model" (everything merged: a folder for diffusers, a file for web UIs), "lora" (diffusers' layout; a folder gets every
            form of the adapter), "kohya" (a LoRA file for web UIs) or "embedding" (the learned word).
        dtype: of the tensors in the files.
        title: of the model, as the run folder's name.

    Raises:
        UserError: the method has no such form, or a file does not read back as the model that it was written from.
    """
    if output.suffix not in ("", ".safetensors"):
        raise UserError("output", "must be a folder or a .safetensors file", str(output), "name it model.safetensors, or model/")
    if layout == "model":
        return _export_model(trained, output, dtype, title)
    rows = token_rows(trained.base)
    if not trained.config.method.is_additive:
        rule = f"must be model for a run of method={trained.config.method.name}, which changes the base's own weights"
        raise UserError("--layout", rule, layout, "leave it out")
    if layout == "embedding" and rows is None:
        raise UserError("--layout", "must not be embedding for a run that learned no word", layout, "write lora")
    if layout in ("lora", "kohya") and not has_lora(trained.base) and output.suffix:
        raise UserError("--layout", "must not be a LoRA's for a run without one", layout, "write embedding")
    if layout == "kohya" and has_dora(trained.base):
        rule = "must not be kohya for DoRA: its readers disagree on what a `dora_scale` is, and diffusers drops it"
        raise UserError("--layout", rule, layout, "write model, with all merged, or lora")
    if layout != "lora" and not output.suffix:
        raise UserError("output", "must be a .safetensors file for this layout", str(output), "or take --layout lora, which fills a folder")
    return _export_adapter(trained, output, layout, dtype, title)


def _export_model(trained: Trained, output: Path, dtype: torch.dtype, title: str) -> list[str]:
    base, subject = trained.base, trained.config.subject
    rows = token_rows(base)
    if output.suffix and rows is not None and rows.old_tokenizer is not None:
        rule = "must be a folder: a single file has no room for the token that was added to the tokenizer"
        raise UserError("output", rule, str(output), "name a folder, or take --layout embedding")
    trained.config.method.merge(base)
    if output.suffix:
        metadata = {"dreambooth.run": title, "dreambooth.step": str(trained.step), "dreambooth.prompt": subject.in_prompt("{subject}")}
        save_single_file(base, output, dtype, metadata)
        _require_equal(output, max_difference_after_reload(base.to(dtype), output))
        notes = (
            [] if base.latent_channels == 4 else [f"note: its autoencoder has {base.latent_channels} channels; other tools need a diffusers folder"]
        )
        return [*notes, f"written: {output}"]
    base.to(dtype).save(output)
    with quiet():
        reloaded = StableDiffusion(path=str(output)).load(dtype)
    _require_equal(output, _difference(base, reloaded, [subject.in_prompt("a photo of a {subject}")]))
    return [f"written: {output}"]


def _export_adapter(trained: Trained, output: Path, layout: str, dtype: torch.dtype, title: str) -> list[str]:
    base, subject = trained.base, trained.config.subject
    with torch.no_grad():
        for tensor in trainable_state(base).values():
            tensor.copy_(tensor.to(dtype))  # what the file can hold is what is compared
    rows = token_rows(base)
    word = embedding_name(rows, base, subject.identifier) if rows is not None else subject.identifier
    prompt = f"a photo of a {word} {subject.class_noun}"
    embedding = embedding_state(rows, word, dtype) if rows is not None else None
    writers: dict[str, Callable[[Path], Path]] = {}
    if has_lora(base):
        about = kohya_metadata(base, title, trained.step, to_plain(trained.config))
        writers["lora"] = lambda path: save_diffusers_lora(base, path, dtype)
        if not has_dora(base):
            writers["kohya"] = lambda path: save_kohya_lora(base, path, dtype, about)
    if embedding is not None:
        writers["embedding"] = lambda path: save_embedding(path, embedding, prompt)
    names = {"lora": "pytorch_lora_weights.safetensors", "kohya": f"{title}_kohya.safetensors", "embedding": "learned_embeds.safetensors"}
    wanted = {kind: output / names[kind] for kind in writers} if not output.suffix else {layout: output}
    lines = []
    for kind, path in wanted.items():
        writers[kind](path)
        _require_same_output(trained, path, kind, embedding, word)
        lines.append(f"written: {path} ({kind})")
    if len(writers) > 1 and embedding is not None and set(wanted) != set(writers):
        lines.append("note: this run learned both a LoRA and a word; --layout lora with a folder as output writes all of it")
    if base.scheduler.config.get("rescale_betas_zero_snr"):
        lines.append("note: draw with rescale_betas_zero_snr=True and timestep_spacing=trailing; only a model folder says so itself")
    return [*lines, f"use it in prompts like: {prompt}"]


def _require_same_output(trained: Trained, path: Path, kind: str, embedding: dict[str, Tensor] | None, word: str) -> None:
    """Loads a file into a stock pipeline over the un-tuned base, with the other half of the adapter beside it, and compares what it says."""
    subject = trained.config.subject
    own, theirs = ([f"a photo of a {name} {subject.class_noun}", f"a photo of a {subject.class_noun}"] for name in (subject.identifier, word))
    expected = prediction(trained.base.pipeline(), own)
    with quiet():
        fresh = trained.config.base.load()
        pipeline = fresh.pipeline()
        plain = prediction(pipeline, own)
        if embedding is not None:
            pipeline.load_textual_inversion(str(path) if kind == "embedding" else {name: value.float() for name, value in embedding.items()})
        if kind != "embedding":
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
        elif has_lora(trained.base):
            with tempfile.TemporaryDirectory() as folder:
                beside = save_diffusers_lora(trained.base, Path(folder) / "lora.safetensors", torch.float32)
                pipeline.load_lora_weights(folder, weight_name=beside.name)
    difference, effect = ((other - expected).abs().max().item() for other in (prediction(pipeline, theirs), plain))
    allowed = max(MAX_NOISE * expected.abs().max().item(), MAX_SHARE * effect)
    if not difference <= allowed:  # NaN too
        raise UserError(str(path), "must act in a stock pipeline as it was trained", f"a difference of {difference:g}", "do not use it; report this")


@torch.no_grad()
def prediction(pipeline: Any, prompts: list[str]) -> Tensor:
    """Returns what a stock Stable Diffusion pipeline predicts for prompts on fixed noise, (B, C, h, w) float32."""
    unet, count = pipeline.unet, len(prompts)
    modes = [(network, network.training) for network in (unet, pipeline.text_encoder)]
    for network, _ in modes:
        network.eval()
    text, _ = pipeline.encode_prompt(prompts, unet.device, 1, False)  # (B, L, D)
    size = unet.config.sample_size
    shape = (unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
    noisy = torch.stack([randomness.normal(shape, randomness.NOISE, number) for number in range(count)])  # (B, C, h, w)
    t = torch.linspace(100, 900, count).long()  # (B,)
    said = unet(noisy.to(unet.device, unet.dtype), t.to(unet.device), encoder_hidden_states=text).sample.float()
    for network, was_training in modes:
        network.train(was_training)
    return said


def _difference(model: BaseModel, reloaded: BaseModel, prompts: list[str]) -> float:
    """Returns the largest difference between two models' weights; infinity where a name, a shape or the tokens of a prompt differ."""
    if not torch.equal(model.tokenize(prompts), reloaded.tokenize(prompts)):
        return float("inf")
    worst = 0.0
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(one, part).state_dict() for one in (model, reloaded))
        if {name: tensor.shape for name, tensor in ours.items()} != {name: tensor.shape for name, tensor in theirs.items()}:
            return float("inf")
        for name, tensor in ours.items():
            gap = (tensor.double() - theirs[name].double()).abs().max().item()
            worst = max(worst, float("inf") if gap != gap else gap)
    return worst


def _require_equal(path: Path, difference: float) -> None:
    if difference != 0.0:
        raise UserError(str(path), "must read back as it was written", f"a difference of {difference:g}", "do not use it; report this")
