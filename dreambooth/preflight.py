"""What is looked at before a run costs anything: the prompts, the scorers, the folder, then the memory and the disk that it will need."""

import math
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dreambooth.base.protocol import BaseModel, tokenized
from dreambooth.buckets import bucket_sizes, nearest_bucket
from dreambooth.captions import is_word_in
from dreambooth.config import Config
from dreambooth.cross_checks import odd_settings
from dreambooth.errors import UserError
from dreambooth.evaluation import final_plan, selection_plan
from dreambooth.files import require_free
from dreambooth.lab.splits import RARE_TOKENS
from dreambooth.memory import Memory, available_bytes, estimate, gigabytes
from dreambooth.memory_cuts import find_cuts
from dreambooth.subject_photos import SubjectPhotos
from dreambooth.tokens import judge

ROOM = 0.9  # share of the memory that can be had; the rest is for what the estimate does not see
HOPELESS = 1.5  # times the memory that can be had: above it a run is refused, below it only warned of
ENTRY = 512  # bytes of a cache's file beside its tensors: their names, its key and checksum
FINAL_ARMS = 3  # un-tuned base, best step, last step


class Disk(NamedTuple):
    """Bytes that a run will write at most, by what they are for."""

    checkpoints: int
    pictures: int  # of all evaluations, with the grids
    class_images: int
    wandb: int
    cache: int = 0  # of latents and text embeddings

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self)

    def describe(self) -> str:
        """Returns the parts that there are, in words."""
        return ", ".join(f"{key.replace('_', ' ')} {gigabytes(value)}" for key, value in self._asdict().items() if value)


def require_writable(folder: str | Path, where: str = "output_dir") -> None:
    """Makes a folder and refuses one that nothing can be written into.

    Raises:
        UserError: naming `where`.
    """
    folder = Path(folder)
    probe = folder / f".{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
    except OSError as error:
        rule = f"must be a folder that can be written into ({error.strerror or error})"
        raise UserError(where, rule, str(folder), f"set {where} to another folder") from error
    finally:
        if folder.is_dir():
            probe.unlink(missing_ok=True)


def prompt_findings(config: Config, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Returns what is odd about the identifier and the prompts, one sentence each.

    Args:
        config: resolved.
        tokenizer: the base's.
        prompts: every prompt that the run gives to the model, the captions of the photos among them.

    Raises:
        UserError: a prompt is longer than the text encoder can read.
    """
    tokenized(tokenizer, list(prompts))
    free, found = RARE_TOKENS if config.base.is_lab() else (), []
    for subject in config.subjects:
        if not config.method.makes_new_token(tokenizer, subject.identifier):
            verdict = judge(tokenizer, subject.identifier, free)
            if verdict.kind != "rare":
                found.append(f"subject.identifier: {verdict.sentence}; python -m dreambooth tokens lists rare ones")
        lost = [text for text in dict.fromkeys(prompts) if is_word_in(subject.identifier, text) and not subject.is_named_in(text)]
        if lost:
            others = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
            told = f"the prompt {lost[0]!r}{others} names {subject.identifier} without its class, {subject.class_noun}"
            found.append(f"{told}: what the model knows of the class does not help there")
    return found


def before_loading(config: Config, prompts: Sequence[str]) -> list[str]:
    """Returns what is odd and can be told before a model loads, one sentence each.

    Args:
        config: resolved.
        prompts: as for `prompt_findings`.

    Raises:
        UserError: something without which the run would fail later.
    """
    found = [*odd_settings(config), *prompt_findings(config, config.base.load_tokenizer(), prompts)]
    missing = config.encoders.missing()
    if missing:
        found.append(f"this run draws pictures but has no scores, unless these weights can be downloaded: {missing}")
    return found


def disk_needed(config: Config, memory: Memory, class_images: int, cache: int = 0) -> Disk:
    """Returns the bytes that a run will write at most.

    A picture counts as if PNG compressed nothing. Each checkpoint file is written beside the one that it replaces.

    Args:
        config: resolved.
        memory: its estimate: what learns is as large as its gradients.
        class_images: how many the base still has to draw.
        cache: bytes, from `cache_needed`.
    """
    picture = 3 * config.data.resolution**2
    steps, every = config.trainer.max_steps, config.trainer.eval_every
    evaluations = 1 + steps // every + (1 if steps % every else 0)
    selection = evaluations * len(selection_plan(config)) * picture
    final = FINAL_ARMS * len(final_plan(config)) * picture
    share = config.trainer.devices if config.trainer.sharding else 1  # the memory is of one device, but a file is whole
    learned = share * memory.gradients
    state = learned + share * memory.optimizer + memory.average
    mirror = selection + final if config.wandb.mode != "disabled" else 0
    return Disk(3 * learned + 2 * state, 2 * (selection + final), class_images * picture, mirror, cache)


def cache_needed(config: Config, base: BaseModel, photos: SubjectPhotos, class_images: int, prompts: Sequence[str]) -> int:
    """Returns the bytes that `data.cache=disk` will write at most: 0 for the other caches, and never more than is left of `data.cache_mb`.

    Each image is kept once for every way it is cut: flipped or not, in each bucket a class image, anew with each random crop.

    Args:
        config: resolved.
        base: gives the size of latents and of text embeddings.
        photos: of all subjects.
        class_images: in the bank, those that are still to be drawn among them.
        prompts: that may be trained on.
    """
    if config.data.cache != "disk":
        return 0
    side, images = config.data.resolution, [image for own in photos.everyone for image in own.images]
    sizes = bucket_sizes(side) if config.data.buckets else [(side, side)]
    used = {sizes[nearest_bucket(*image.size, sizes)] for image in images}
    trainer, classes = config.trainer, config.prior.class_samples
    seen = trainer.max_steps * trainer.accumulate_grad_batches * trainer.devices * (config.data.batch_size + classes)
    cut = (2 if config.data.flip else 1) * (len(images) + class_images * len(used))
    kept = seen if config.data.crop == "random" else min(seen, cut)
    cells = max(math.prod(base.latent_shape(height, width)) for width, height in used)
    latents = 2 * cells * (2 if config.data.cache_dtype == "float16" else 4) + ENTRY  # means and standard deviations
    text = 4 * base.tokenizer.model_max_length * base.text_encoder.get_input_embeddings().weight.shape[1] + ENTRY
    held = sum(file.stat().st_size for file in (Path(config.output_dir) / "caches").glob("*/*.safetensors"))
    return min(kept * latents + len(set(prompts)) * text, max(0, config.data.cache_mb * 10**6 - held))


def check_disk(config: Config, run_folder: Path, memory: Memory, class_images: int, cache: int = 0) -> str:
    """Returns in one line what the run will write; what it wrote before it was cut off counts as written.

    Args:
        config, memory, class_images, cache: as for `disk_needed`.
        run_folder: where it writes.

    Raises:
        UserError: the disk has no room for it.
    """
    disk = disk_needed(config, memory, class_images, cache)
    written = sum(file.stat().st_size for file in run_folder.rglob("*") if file.is_file())
    require_free(run_folder, max(0, disk.total - written), "output_dir", f"this run ({disk.describe()})")
    return f"disk: at most {gigabytes(disk.total)} ({disk.describe()})"


def check_memory(config: Config, base: BaseModel, device: str, available: int | None = None) -> tuple[Memory, list[str]]:
    """Returns the estimate of a run's memory, and the lines that say it: with the cuts that make it fit where it may not.

    Args:
        config: resolved.
        base: freshly loaded, nothing attached.
        device: "cpu" or "cuda".
        available: bytes that there are; None: as the device says.

    Raises:
        UserError: it cannot fit by far; the estimate is good to some percent, so a run that may just fit is let through.
    """
    memory = estimate(config, base, device)
    available = available_bytes(base, device) if available is None else available
    told = f"memory: {memory.describe()}"
    if available is None:
        return memory, [told]
    told += f"; {gigabytes(available)} can be had on this {'GPU' if device != 'cpu' else 'machine'}"
    if memory.total <= ROOM * available:
        return memory, [told]
    cuts = find_cuts(config, base, device, int(ROOM * available))
    if not cuts:
        advice = "no setting is known that makes it smaller"
    else:
        ends = "which fits" if cuts[-1].together <= ROOM * available else "which is still too much: take a larger machine"
        advice = f"set {', '.join(cut.describe() for cut in cuts)}; all of these together need {gigabytes(cuts[-1].together)}, {ends}"
    if memory.total > HOPELESS * available:
        raise UserError("the run", f"must fit into the {gigabytes(available)} of memory that can be had", memory.describe(), advice)
    return memory, [told, f"warning: it may run out of memory; {advice}"]
