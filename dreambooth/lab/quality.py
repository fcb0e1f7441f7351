"""`python -m dreambooth.lab.quality FOLDER`: how good the lab's own models are, on held-out seeds, with 95 % intervals.

FOLDER holds `base/` and `scorers/`, as `dreambooth/lab/weights` does. The figures:

- codec: PSNR of held-out renders after coding and decoding.
- identity encoder: odds that two pictures of a subject are more alike than pictures of two subjects of its class (AUC), macro over subjects.
- text-image encoder: whether a picture's own caption is the best of 32; whether the right colour beats each other colour.
- base: pictures for every class in every place; whether the text-image encoder names the class and the place, among all of both.
  The same of true renders: more than that no base can reach with this judge.
- sharpness: `measures.detail`, which no network computes, of the base's pictures against held-out renders of the same classes and places.
  Two figures: the ratio of the finest detail, and a kernel distance as in KID. Renders under a blur of one pixel are the control: they must
  be far from the renders, or the figure proves nothing. The scorers' own loss of cosine under that blur says whether they forgive it.
- likeness: the same kernel distance of the identity encoder's features (KID with the lab's own network), which sees parts and colours that
  no real subject has; a patchwork can be sharp.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dreambooth.errors import UserError
from dreambooth.files import write_json, write_png
from dreambooth.grids import image_grid
from dreambooth.lab import measures
from dreambooth.lab.identities import COLORS, caption, identity
from dreambooth.lab.paths import WEIGHTS_FOLDER
from dreambooth.lab.pretraining.autoencoder import roundtrip
from dreambooth.lab.pretraining.data import HeldOut, held_out
from dreambooth.lab.pretraining.denoiser import draw
from dreambooth.lab.scorers import LabScorers
from dreambooth.metrics.pixels import blur
from dreambooth.statistics.intervals import Interval, bootstrap_interval, describe

CONTROL_SIGMA = 1.0  # px, of the blurred control
SUBJECTS, VIEWS = 12, 4  # held-out subjects of each class, and pictures of each
CHOICES = 32  # captions among which the right one is to be found
BLOCK = 24  # pictures of each block of the kernel distance; blocks give the interval
SEED_STREAM = 31  # part of the key of every drawn picture
TITLES = {
    "codec_psnr_db": "codec, PSNR in dB",
    "identity_auc": "identity encoder, AUC within a class",
    "identity_auc_decoded": "the same, pictures through the codec",
    "caption_retrieval": "text-image encoder, own caption best of 32",
    "color_accuracy": "text-image encoder, body's colour best of 10",
    "identity_lost_to_blur": "identity encoder, cosine to own photos lost to blur",
    "alignment_lost_to_blur": "text-image encoder, cosine to caption lost to blur",
    "class_accuracy": "base, class named right",
    "context_accuracy": "base, place named right",
    "class_accuracy_real": "renders, class named right",
    "context_accuracy_real": "renders, place named right",
    "sharpness_ratio": "base, finest detail over that of renders",
    "sharpness_ratio_real": "other renders, the same",
    "sharpness_ratio_codec": "decoded renders, the same",
    "sharpness_ratio_blurred": "blurred control, the same",
    "detail_distance": "base, kernel distance of detail to renders",
    "detail_distance_real": "other renders, the same",
    "detail_distance_codec": "decoded renders, the same",
    "detail_distance_blurred": "blurred control, the same",
    "likeness_distance": "base, kernel distance of identity features to renders",
    "likeness_distance_real": "other renders, the same",
    "likeness_distance_codec": "decoded renders, the same",
    "likeness_distance_blurred": "blurred control, the same",
}


def measure_folder(
    folder: Path, seeds: int = 8, device: str = "cpu", subjects: int = SUBJECTS, say: Callable[[str], None] = print
) -> tuple[dict[str, Interval], dict[str, Any], Image.Image]:
    """Returns the figures of a folder of weights, what they rest on, and a grid: rows classes, columns places.

    Args:
        folder: holds base/ with lab.json, and scorers/.
        seeds: pictures of each class in each place.
        device: where the networks run.
        subjects: held-out subjects of each class for codec and scorers.
        say: gets a line before each part.

    Raises:
        UserError: the folder is not the lab's.
    """
    from dreambooth.base.stable_diffusion import StableDiffusion

    mark = read_mark(folder)
    model = StableDiffusion(path=str(folder / "base")).load().to(device)
    scorers = LabScorers.load(folder / "base" / mark["scorers"]).to(device)
    classes = [noun for noun in mark["classes"] if noun in mark["scorer_classes"]]
    contexts = mark["contexts"]
    say(f"renders {len(classes)} classes x {subjects} held-out subjects x {VIEWS} pictures for codec and scorers")
    seen = held_out(classes, contexts, subjects, VIEWS)
    figures = measure_codec_and_scorers(model, scorers, seen)
    prompts = [(noun, context) for noun in classes for context in contexts for _ in range(seeds)]
    say(f"draws {len(prompts)} pictures: {len(classes)} classes x {len(contexts)} contexts x {seeds} seeds")
    drawn = draw(model, [caption(identity(*asked(noun)), context) for noun, context in prompts], [(SEED_STREAM, i) for i in range(len(prompts))])
    figures |= name_accuracy(scorers, drawn, prompts, classes, contexts)
    say(f"renders 2 x {len(prompts)} held-out pictures to compare their detail")
    (others, shown), (real, _) = (spread(classes, contexts, seeds, seed) for seed in (2, 1))
    named = name_accuracy(scorers, others, shown, classes, contexts)  # what the judge makes of true renders is the most that a base can reach
    figures |= {f"{name}_real": named[name] for name in ("class_accuracy", "context_accuracy")}
    figures |= compare_with_renders(model, scorers, drawn, others, real)
    basis = {
        "classes": classes,
        "classes_left_out": [noun for noun in mark["classes"] if noun not in classes],
        "contexts": contexts,
        "seeds": seeds,
        "subjects_per_class": subjects,
        "views_per_subject": VIEWS,
        "class_accuracy_by_class": by_group(figures.pop("_classes_right"), [noun for noun, _ in prompts]),
        "context_accuracy_by_context": by_group(figures.pop("_contexts_right"), [context for _, context in prompts]),
    }
    first = {pair: number for number, pair in reversed(list(enumerate(prompts)))}
    rows = [measures.to_bytes(drawn[[first[noun, context] for context in contexts]]) for noun in classes]
    return figures, basis, image_grid(rows, classes, contexts, scale=2)


def asked(noun: str) -> tuple[str, int]:
    """Returns any subject of a class: captions without colour do not depend on which."""
    return noun, 0


def read_mark(folder: Path) -> dict[str, Any]:
    """Returns what base/lab.json says; UserError when it is not there."""
    file = folder / "base" / "lab.json"
    if not file.is_file():
        raise UserError(str(folder), "must hold base/lab.json, as dreambooth/lab/weights does", next_step="name the folder above base and scorers")
    return json.loads(file.read_text(encoding="utf-8"))


@torch.no_grad()
def measure_codec_and_scorers(model: Any, scorers: LabScorers, seen: HeldOut) -> dict[str, Interval]:
    """Returns the figures that need no drawing."""
    pixels = seen.pixels.to(model.device)
    decoded = roundtrip(model.vae, pixels)
    nouns = [subject.class_noun for subject in seen.subjects]
    names = [f"{subject.class_noun} {subject.seed}" for subject in seen.subjects]
    own, own_decoded, soft = (scorers.identity(pictures) for pictures in (pixels, decoded, blur(pixels, CONTROL_SIGMA)))
    images, soft_images, texts = scorers.image(pixels), scorers.image(blur(pixels, CONTROL_SIGMA)), scorers.text(seen.captions)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    retrieved = measures.caption_retrieval(images[order], texts[order], [seen.captions[i] for i in order], min(CHOICES, len(order)))
    partner = [first + (number - first + 1) % VIEWS for number in range(len(names)) for first in [number - number % VIEWS]]
    lost = (own * own[partner]).sum(1) - (soft * own[partner]).sum(1)
    return {
        "codec_psnr_db": bootstrap_interval(measures.psnr(decoded, pixels).cpu(), names, unit="subject"),
        "identity_auc": bootstrap_interval(measures.same_subject_auc(own, names, nouns), unit="subject"),
        "identity_auc_decoded": bootstrap_interval(measures.same_subject_auc(own_decoded, names, nouns), unit="subject"),
        "caption_retrieval": bootstrap_interval(retrieved, [names[i] for i in order[: len(retrieved)]], unit="subject"),
        "color_accuracy": bootstrap_interval(color_right(scorers, images, seen), names, unit="subject"),
        "identity_lost_to_blur": bootstrap_interval(lost.cpu(), names, unit="subject"),
        "alignment_lost_to_blur": bootstrap_interval(((images - soft_images) * texts).sum(1).cpu(), names, unit="subject"),
    }


def color_right(scorers: LabScorers, images: Tensor, seen: HeldOut) -> Tensor:
    """Returns for each picture whether its caption with the true colour beats those with each other colour, (N,) of 0 and 1."""
    subjects = list(zip(seen.subjects, seen.contexts, strict=True))
    prompts = [
        caption(identity(subject.class_noun, subject.seed, main_color=color), place, color=True) for subject, place in subjects for color in COLORS
    ]
    texts = scorers.text(prompts).view(len(subjects), len(COLORS), -1)
    best = torch.einsum("nd,ncd->nc", images, texts).argmax(1).tolist()
    names = list(COLORS)
    return torch.tensor([float(names[choice] == subject.main_color) for choice, (subject, _) in zip(best, subjects, strict=True)])


def name_accuracy(
    scorers: LabScorers, drawn: Tensor, prompts: Sequence[tuple[str, str]], classes: Sequence[str], contexts: Sequence[str]
) -> dict[str, Any]:
    """Returns how often the best of all prompts (class x place) for a drawn picture has its class, and its place."""
    texts = scorers.text([caption(identity(*asked(noun)), context) for noun in classes for context in contexts])
    best = (scorers.image(drawn) @ texts.T).argmax(1).tolist()
    named = [(classes[choice // len(contexts)], contexts[choice % len(contexts)]) for choice in best]
    class_right = [float(got[0] == wanted[0]) for got, wanted in zip(named, prompts, strict=True)]
    context_right = [float(got[1] == wanted[1]) for got, wanted in zip(named, prompts, strict=True)]
    cells = [f"{noun} {context}" for noun, context in prompts]
    return {
        "class_accuracy": bootstrap_interval(class_right, cells, unit="prompt"),
        "context_accuracy": bootstrap_interval(context_right, cells, unit="prompt"),
        "_classes_right": class_right,
        "_contexts_right": context_right,
    }


def compare_with_renders(model: Any, scorers: LabScorers, drawn: Tensor, other: Tensor, real: Tensor) -> dict[str, Interval]:
    """Returns sharpness and likeness of drawn pictures, and of the controls made of other renders, beside real ones; all of the same prompts."""
    kinds = {"": drawn, "_codec": roundtrip(model.vae, other.to(model.device)).cpu(), "_real": other, "_blurred": blur(other, CONTROL_SIGMA)}
    reference = measures.detail(real)
    middle, scale = reference.mean(0), reference.std(0).clamp(min=1e-6)
    standard = (reference - middle) / scale
    length = scorers.layout.features**0.5  # the kernel divides by the number of features
    known = scorers.identity(real).cpu() * length
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))  # blocks are mixtures of all classes and places
    blocks = [block for block in order.split(BLOCK) if len(block) >= min(BLOCK, len(real))]
    figures = {}
    for kind, pictures in kinds.items():
        features = (measures.detail(pictures) - middle) / scale
        features = features.clamp(-20, 20)  # a flat picture is far enough away
        distances = [float(measures.kernel_distance(features[block], standard[block])) for block in blocks]
        ratio = measures.sharpness(pictures) / measures.sharpness(real).mean()
        figures[f"sharpness_ratio{kind}"] = bootstrap_interval(ratio, unit="picture")
        figures[f"detail_distance{kind}"] = bootstrap_interval(distances, unit="block")
        seen = scorers.identity(pictures).cpu() * length
        alike = [float(measures.kernel_distance(seen[block], known[block])) for block in blocks]
        figures[f"likeness_distance{kind}"] = bootstrap_interval(alike, unit="block")
    return {name: figures[name] for name in TITLES if name in figures}


def spread(classes: Sequence[str], contexts: Sequence[str], seeds: int, seed: int) -> tuple[Tensor, list[tuple[str, str]]]:
    """Returns held-out renders with every class in every place equally often, (N, 3, 64, 64), and the class and place of each."""
    seen = [held_out([noun], contexts, seeds, len(contexts), seed=seed) for noun in classes]
    shown = [(subject.class_noun, place) for part in seen for subject, place in zip(part.subjects, part.contexts, strict=True)]
    return torch.cat([part.pixels for part in seen]), shown


def by_group(values: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
    """Returns the mean of each group."""
    return {
        name: round(sum(own) / len(own), 4)
        for name in dict.fromkeys(groups)
        for own in [[value for value, group in zip(values, groups, strict=True) if group == name]]
    }


def report(folder: Path, seeds: int, device: str, out: Path, subjects: int = SUBJECTS) -> dict[str, Any]:
    """Measures, prints a line a figure, and writes `out` (JSON) and a grid beside it (PNG); returns what is in the JSON."""
    figures, basis, grid = measure_folder(folder, seeds, device, subjects)
    for name, title in TITLES.items():
        if name in figures:
            print(f"{title}: {describe(figures[name], 3)}")
    if basis["classes_left_out"]:
        print(f"left out, as the scorers do not know them: {', '.join(basis['classes_left_out'])}")
    content = {"figures": {name: interval._asdict() for name, interval in figures.items()}, **basis}
    write_json(out, content)
    picture = out.with_suffix(".png")
    write_png(picture, grid)
    print(f"wrote {out} and {picture}")
    return content


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 1 after an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m dreambooth.lab.quality", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=WEIGHTS_FOLDER, help="holds base/ and scorers/; default: the packaged weights")
    parser.add_argument("--seeds", type=int, default=8, help="pictures of each class in each place")
    parser.add_argument("--subjects", type=int, default=SUBJECTS, help="held-out subjects of each class for codec and scorers, 2 to 100")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, default=Path("quality.json"), help="where the figures go; the grid lies beside it")
    given = parser.parse_args(arguments)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if given.device == "auto" else given.device
    try:
        report(given.folder, given.seeds, device, given.json, given.subjects)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
