"""Images -> scores: every network runs once over a set of images, and the functions of `metrics` say what its features mean."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dreambooth.encoders import LoadedEncoders
from dreambooth.evaluation import Item
from dreambooth.metrics import cosines, pixels, real_photos
from dreambooth.metrics.masked_identity import Foreground, foreground, masked_features
from dreambooth.metrics.states import within_groups
from dreambooth.metrics.table import METRICS, PAIRWISE, MetricInfo
from dreambooth.statistics.intervals import Interval, bootstrap_interval
from dreambooth.step_choice import StepScores

ALWAYS = ("identity_fidelity", "image_fidelity", "prompt_alignment", "prompt_alignment_with_identifier", "drift", "diversity", "class_diversity")
NAN = float("nan")
Masks = Sequence[np.ndarray | None] | np.ndarray
Truth = Callable[[np.ndarray, Sequence[Item]], dict[str, np.ndarray]]  # (images, items) -> columns of the table of images


class Reference(NamedTuple):
    """What generated images are held against: the subject's photos and their features, made once by `reference`."""

    photos: np.ndarray  # uint8 (M, H, W, 3): the training photos, prepared
    others: np.ndarray | None  # uint8 (O, H, W, 3): further photos of the subject, neither trained on nor held out
    masks: Masks | None  # of each photo, float (H, W) in [0, 1]: where the subject is; None for a photo without one
    held_out: np.ndarray | None  # uint8 (K, H, W, 3): photos of the subject that were not trained on
    identity: Tensor  # (M, D) identity features of the training photos
    image: Tensor  # (M, E) image features of the training photos
    known_identity: Tensor  # (M + O, D) of all photos but those held out: what fidelity and drift are measured against
    known_image: Tensor  # (M + O, E)
    dinov2: Tensor | None  # (M, F) identity features of the training photos by DINOv2; None without it
    known_dinov2: Tensor | None  # (M + O, F)
    held_out_identity: Tensor | None  # (K, D) identity features of the photos held out
    foreground: Foreground | None  # what the masks say; None without masks, or if they tell no patch from another


def reference(
    photos: np.ndarray,
    encoders: LoadedEncoders,
    masks: Masks | None = None,
    held_out: np.ndarray | None = None,
    others: np.ndarray | None = None,
) -> Reference:
    """Returns the subject's photos with all features that `score` needs.

    Args:
        photos: uint8 (M, H, W, 3), the training photos as the model was shown them.
        encoders: the feature extractors.
        masks: one for each photo, float (H, W) in [0, 1], 1 where the subject is; a photo whose mask is None takes no part in the masked
            identity, and without any mask there is none.
        held_out: uint8 (K, H, W, 3), photos of the subject that were not trained on; None or empty: memorisation is measured against the
            training photos themselves, leaving one out.
        others: uint8 (O, H, W, 3), photos that a run on fewer photos was not trained on: with them runs on one, three and five photos of a
            subject are measured against the same ones.

    Raises:
        ValueError: the masks are not one for each photo, of its size.
    """
    masked = [k for k, mask in enumerate(masks if masks is not None else ()) if mask is not None]
    if masks is not None and (len(masks) != len(photos) or any(masks[k].shape != photos.shape[1:3] for k in masked)):
        found = [None if mask is None else mask.shape for mask in masks]
        raise ValueError(f"masks must be one for each of {len(photos)} photos and of its size, {photos.shape[1:3]}, got {found}")
    identity, tokens = encoders.identity_with_patches(photos, lambda tokens: tokens if masked else tokens[:, :0])
    known = foreground(tokens[masked], encoders.patch_shares([masks[k] for k in masked])) if masked else None
    held_out = held_out if held_out is not None and len(held_out) else None
    held_out_identity = encoders.identity(held_out) if held_out is not None else None
    image = known_image = encoders.image(photos)
    known_identity = identity
    dinov2 = known_dinov2 = encoders.identity_dinov2(photos) if encoders.dinov2 is not None else None
    if others is not None and len(others):
        known_identity, known_image = torch.cat([identity, encoders.identity(others)]), torch.cat([image, encoders.image(others)])
        known_dinov2 = torch.cat([dinov2, encoders.identity_dinov2(others)]) if dinov2 is not None else None
    features = (identity, image, known_identity, known_image, dinov2, known_dinov2, held_out_identity)
    return Reference(photos, others, masks, held_out, *features, known)


class Scores(NamedTuple):
    """The scores of one set of images: a value and an interval each, by their keys in METRICS, and one row an image."""

    values: dict[str, float]  # those that can be measured; NaN if there are too few images
    intervals: dict[str, Interval]
    per_image: pd.DataFrame  # NaN where a column does not apply to an image

    def as_step(self, step: int) -> StepScores:
        """Returns what the rule for the best step looks at."""
        return StepScores(step, **{key: self.values[key] for key in ("identity_fidelity", "prompt_alignment", "drift", "diversity")})


def score(
    images: np.ndarray,
    items: Sequence[Item],
    reference: Reference,
    encoders: LoadedEncoders,
    base_images: np.ndarray | None = None,
    truth: Truth | None = None,
) -> Scores:
    """Returns what the images say: of the subject's, of the plain class's, and of those of other classes.

    A score of the subject's images is the mean over prompts of the mean over each prompt's images; one of class images the mean over
    images. What cannot be measured is left out of the values: `masked_identity` without masks, `lpips_diversity` without LPIPS,
    `identity_fidelity_dinov2` without DINOv2, `memorisation` with a single photo and none held out, `sharpness` under 20 pixels, the
    other-class scores without items of kind "other" or without the base's images.

    Args:
        images: uint8 (N, H, W, 3), drawn for the items.
        items: N, of kind "subject", "class" and "other" in any order.
        reference: what `reference` makes of the subject's photos.
        encoders: the feature extractors.
        base_images: uint8 (N, H, W, 3), what the un-tuned base draws for the same items and noise; only those of kind "other" are used.
        truth: gives further columns where the ground truth is known (`lab_truth.LabTruth`).
    """
    kinds = np.array([item.kind for item in items], dtype=object)
    rows = pd.DataFrame(
        {
            "kind": kinds,
            "template": [item.template for item in items],
            "prompt": [item.prompt for item in items],
            "k": [item.key[-1] for item in items],
        }
    )
    identity, masked = _identity(images, reference, encoders)
    rows["identity"] = cosines.per_image_fidelity(identity, reference.known_identity).numpy()
    nearest = real_photos.nearest_photo(identity, reference.identity)
    rows["nearest_photo"], rows["nearest_photo_index"] = nearest.cosine.numpy(), nearest.index.numpy()
    rows["memorisation"] = real_photos.memorisation(identity, reference.identity, reference.held_out_identity).numpy()
    rows["masked_identity"] = masked.numpy()
    rows["sharpness"] = _sharpness(images, reference).numpy()
    rows["diversity"] = _per_image_diversity(pixels.structural_distances, images, items)

    def add(column: str, kind: str, values: Tensor) -> None:
        rows[column] = NAN
        rows.loc[kinds == kind, column] = values.numpy().astype(float)

    own = [item for item in items if item.kind == "subject"]
    features = encoders.image(images[kinds == "subject"])  # (S, E)
    add("image", "subject", cosines.per_image_fidelity(features, reference.known_image))
    add("alignment", "subject", cosines.per_image_alignment(features, _texts([item.scored_prompt for item in own], encoders)))
    add("alignment_with_identifier", "subject", cosines.per_image_alignment(features, _texts([item.prompt for item in own], encoders)))
    if encoders.dinov2 is not None:
        features = encoders.identity_dinov2(images[kinds == "subject"])  # (S, F)
        add("identity_dinov2", "subject", cosines.per_image_fidelity(features, reference.known_dinov2))
    if encoders.perceptual is not None:
        rows["lpips_diversity"] = _per_image_diversity(encoders.perceptual.distances, images, items)
    of_class = identity[torch.from_numpy(kinds == "class")]
    add("identity_diversity", "class", cosines.per_image_diversity(1 - of_class @ of_class.T, torch.zeros(len(of_class), dtype=torch.long)))
    drifts = _other_classes(images, base_images, kinds, identity, encoders)
    add("other_class_drift", "other", drifts[0])
    add("other_class_color_drift", "other", drifts[1])
    for column, values in (truth(images, items) if truth is not None else {}).items():
        rows[column] = values
    return Scores(_values(rows), _intervals(rows), rows)


def references(reference: Reference, prompts: Sequence[str], encoders: LoadedEncoders) -> dict[str, dict[str, float]]:
    """Returns the marks to read scores against, each by the keys of METRICS: the rows "real_photos", "real_photos_with_self_pairs", "copy_baseline".

    Args:
        reference: of the subject's photos.
        prompts: the scored prompts (identifier dropped), for the alignment of the copy baseline.
        encoders: the feature extractors.
    """
    with_self_pairs = (("real_photos", False), ("real_photos_with_self_pairs", True))
    found = {
        name: {
            "identity_fidelity": float(real_photos.real_photo_oracle(reference.known_identity, self_pairs)),
            "image_fidelity": float(real_photos.real_photo_oracle(reference.known_image, self_pairs)),
        }
        for name, self_pairs in with_self_pairs
    }
    if reference.foreground is not None:
        for name, self_pairs in with_self_pairs:
            found[name]["masked_identity"] = float(real_photos.real_photo_oracle(reference.foreground.photos, self_pairs))
    apart = pixels.structural_distances(torch.from_numpy(reference.photos))  # as `diversity` of the photos
    apart = float(cosines.diversity_of_distances(apart, torch.zeros(len(apart), dtype=torch.long)))
    found["real_photos"] |= {"diversity": apart, "sharpness": 1.0}
    if len(reference.identity) > 1 or reference.held_out_identity is not None:
        found["real_photos"]["memorisation"] = 0.0  # the mark that it is measured from
    texts = encoders.text(list(dict.fromkeys(prompts)))
    found["copy_baseline"] = real_photos.copy_baseline(
        reference.identity, reference.image, texts, reference.held_out_identity, reference.known_identity, reference.known_image
    ) | {"diversity": apart, "sharpness": 1.0}
    if reference.dinov2 is not None:
        for name, self_pairs in with_self_pairs:
            found[name]["identity_fidelity_dinov2"] = float(real_photos.real_photo_oracle(reference.known_dinov2, self_pairs))
        found["copy_baseline"]["identity_fidelity_dinov2"] = float(cosines.identity_fidelity(reference.dinov2, reference.known_dinov2))
    return found


def _identity(images: np.ndarray, reference: Reference, encoders: LoadedEncoders) -> tuple[Tensor, Tensor]:
    """Returns the images' identity features (N, D) and masked identity (N,), NaN without masks, from one forward pass."""
    known = reference.foreground

    def reduce(tokens: Tensor) -> Tensor:
        if known is None:
            return torch.full((len(tokens),), NAN)
        return cosines.per_image_fidelity(masked_features(tokens, known), known.photos)

    return encoders.identity_with_patches(images, reduce)


def _texts(prompts: list[str], encoders: LoadedEncoders) -> Tensor:
    """Returns the features of the prompts (N, E); equal ones are encoded once."""
    unique = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    return encoders.text(list(unique))[[unique[prompt] for prompt in prompts]]


def _groups(items: Sequence[Item]) -> Tensor:
    """Returns an integer for each image (N,), equal for images of one kind and template."""
    return torch.tensor([zlib.crc32(f"{item.kind}:{item.template}".encode()) for item in items], dtype=torch.long)


def _sharpness(images: np.ndarray, reference: Reference) -> Tensor:
    if min(images.shape[1:3], default=0) < pixels.SMALLEST_PX:
        return torch.full((len(images),), NAN)
    return pixels.sharpness(torch.from_numpy(images), torch.from_numpy(reference.photos))


def _per_image_diversity(distances: Callable[[Tensor], Tensor], images: np.ndarray, items: Sequence[Item]) -> np.ndarray:
    """Returns each image's mean distance to the others of its prompt, (N,); NaN for one that is alone."""
    groups = _groups(items)
    return cosines.per_image_diversity(within_groups(distances, torch.from_numpy(images), groups), groups).numpy()


def _other_classes(
    images: np.ndarray, base_images: np.ndarray | None, kinds: np.ndarray, identity: Tensor, encoders: LoadedEncoders
) -> tuple[Tensor, Tensor]:
    """Returns how far the images of other classes moved from the base's, by identity features and by colour, (O,) each; NaN without the base's."""
    others = kinds == "other"
    if base_images is None or not others.any():
        return torch.full((int(others.sum()),), NAN), torch.full((int(others.sum()),), NAN)
    tuned, base = images[others], base_images[others]
    features = identity[torch.from_numpy(others)]
    return cosines.paired_drift(features, encoders.identity(base)), pixels.color_drift(torch.from_numpy(tuned), torch.from_numpy(base))


def _by_score(rows: pd.DataFrame) -> Iterator[tuple[MetricInfo, pd.DataFrame]]:
    """Yields each score that has a column, with the images of its kind."""
    yield from ((info, rows[rows.kind == info.kind]) for info in METRICS if info.column in rows)


def _values(rows: pd.DataFrame) -> dict[str, float]:
    """Returns each score that can be measured: the macro mean of its column over the prompts of its kind (class images share one prompt)."""
    found = {}
    for info, own in _by_score(rows):
        if info.column in PAIRWISE:  # an image that is alone with its prompt says nothing
            own = own[own.groupby("template").k.transform("size") > 1]
        column = own[info.column]
        if info.key in ALWAYS or not column.isna().all():
            groups = torch.tensor(own.groupby("template").ngroup().to_numpy())
            found[info.key] = float(cosines.macro_mean(torch.tensor(column.to_numpy(float)), groups))
    return found


def _intervals(rows: pd.DataFrame) -> dict[str, Interval]:
    """Returns 95% intervals for this one subject and training run: over prompts (clusters of images that share one), or over class images."""
    found = {}
    for info, own in _by_score(rows):
        values = own[info.column].to_numpy(float)
        if np.isnan(values).all():
            continue
        if info.kind == "class" and info.column in PAIRWISE:
            found[info.key] = bootstrap_interval(pair_mean_pseudovalues(values), unit="image")
        elif info.kind == "class":
            found[info.key] = bootstrap_interval(values, unit="image")
        else:
            found[info.key] = bootstrap_interval(values, own.template.to_numpy(), unit="prompt")
    return found


def pair_mean_pseudovalues(per_image: np.ndarray) -> np.ndarray:
    """Returns values whose mean is the mean over pairs, and whose spread is what resampling images needs for a right interval.

    Every image is in n - 1 pairs, so the images' own mean distances are not independent: their plain bootstrap gives an interval of half
    the width. The jackknife's pseudo-values, n U - (n - 1) U without image i, do not have that fault.

    Args:
        per_image: each image's mean distance to the n - 1 others, (n,).

    Returns:
        (n,); with fewer than 3 images, what came in.

    Source: Arvesen 1969, "Jackknifing U-statistics".
    """
    n = len(per_image)
    if n < 3:
        return per_image
    return (2 * (n - 1) * per_image - n * per_image.mean()) / (n - 2)
