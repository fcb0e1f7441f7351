"""Scores of feature vectors: what was learned about the subject, and what was lost; networks live in `encoders.py`."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class MetricInfo(NamedTuple):
    """One row of the table of scores."""

    key: str  # name in scores.json, after "score/" in a log
    title: str  # name in a report
    direction: str  # "up" or "down": where better is
    sentence: str  # what it says, for a reader who sees it for the first time


METRICS = (
    MetricInfo("identity_fidelity", "Identity fidelity", "up", "How much the generated images look like the subject's photos."),
    MetricInfo("prompt_alignment", "Prompt alignment", "up", "How well the generated images show what their prompts say."),
    MetricInfo("drift", "Drift", "down", "How much images of the plain class have come to look like the subject."),
    MetricInfo("diversity", "Diversity", "up", "How much images of one prompt differ from each other."),
)


def identity_fidelity(generated: Tensor, subject: Tensor) -> Tensor:
    """Returns how much the generated images look like the subject: the mean cosine over all pairs (generated, photo).

    Args:
        generated: identity features of the generated images, (N, D), any length of vector.
        subject: identity features of the subject's photos, (M, D).

    Returns:
        A scalar in [-1, 1], higher is better; NaN if N or M is 0.

    Raises:
        ValueError: the shapes do not fit.

    Source: Ruiz et al. 2023, sec. 4.1 ("DINO" with DINO features, "CLIP-I" with CLIP's).
    """
    return per_image_fidelity(generated, subject).mean()


def per_image_fidelity(generated: Tensor, subject: Tensor) -> Tensor:
    """Returns each generated image's mean cosine to all photos of the subject, (N,) in [-1, 1]; see `identity_fidelity`."""
    return _cosines(generated, subject, "generated", "subject").mean(dim=1)  # (N, M) -> (N,)


def prompt_alignment(images: Tensor, prompts: Tensor) -> Tensor:
    """Returns how well images show their prompts: the mean cosine of each image to its own prompt ("CLIP-T").

    Args:
        images: image features in the space shared with text, (N, D), any length of vector.
        prompts: features of the prompt of each image, (N, D): row i belongs to image i.

    Returns:
        A scalar in [-1, 1], higher is better: not times 100, not clamped at 0. NaN if N is 0.

    Raises:
        ValueError: the shapes do not fit.

    Source: Ruiz et al. 2023, sec. 4.1.
    """
    return per_image_alignment(images, prompts).mean()


def per_image_alignment(images: Tensor, prompts: Tensor) -> Tensor:
    """Returns the cosine of each image to its own prompt, (N,) in [-1, 1]; see `prompt_alignment`."""
    images, prompts = _unit(images, "images"), _unit(prompts, "prompts")
    if images.shape != prompts.shape:
        raise ValueError(f"prompts must hold one row for each image, {tuple(images.shape)}, got {tuple(prompts.shape)}")
    return (images * prompts).sum(dim=1)  # (N, D) -> (N,)


def drift(class_images: Tensor, subject: Tensor) -> Tensor:
    """Returns how far the class has collapsed onto the subject: "PRES", the mean cosine over all pairs (class image, photo).

    Args:
        class_images: identity features of the tuned model's images for the class prompt ("a photo of a dog"), (N, D).
        subject: identity features of the subject's photos, (M, D).

    Returns:
        A scalar in [-1, 1], **lower** is better; compare it with the un-tuned base's. NaN if N or M is 0.

    Raises:
        ValueError: the shapes do not fit.

    Source: Ruiz et al. 2023, sec. 4.3 ("PRES").
    """
    return _cosines(class_images, subject, "class_images", "subject").mean()


def diversity(features: Tensor, groups: Tensor) -> Tensor:
    """Returns how much images of one prompt differ: "DIV", the mean over prompts of the mean distance of their pairs.

    The distance of images i < j is 1 - cosine in the identity encoder's space: a perceptual distance, but not the LPIPS that
    the paper uses (its backbone is not to be had offline), so the values are not comparable with published ones.

    Args:
        features: identity features, (N, D), any length of vector.
        groups: the prompt of each image as an integer, (N,); prompts with a single image say nothing and are ignored.

    Returns:
        A scalar in [0, 2], higher is better; NaN if no prompt has two images.

    Raises:
        ValueError: the shapes do not fit, or the groups are not integers.

    Source: Ruiz et al. 2023, sec. 4.3 ("DIV"), with another distance.
    """
    units = _unit(features, "features")
    _check_groups(groups, len(units))
    distances = [1 - _mean_of_pairs(units[groups == group]) for group in groups.unique()]
    return torch.stack([units.new_tensor(float("nan")), *distances]).nanmean()


def real_photo_oracle(subject: Tensor, self_pairs: bool = False) -> Tensor:
    """Returns the identity fidelity of the real photos to each other: what a perfect model could reach.

    Args:
        subject: identity features of the subject's photos, (M, D).
        self_pairs: also count each photo against itself (cosine 1), which adds about (1 - oracle) / M.
            Published oracles (0.774 in Ruiz et al. 2023, table 1) very probably do.

    Returns:
        A scalar in [-1, 1]; NaN if there is no pair.

    Raises:
        ValueError: the shape is not (M, D).
    """
    if self_pairs:
        return _cosines(subject, subject, "subject", "subject").mean()
    return _mean_of_pairs(_unit(subject, "subject"))


def memorisation(generated: Tensor, subject: Tensor) -> Tensor:
    """Returns how close each generated image is to its nearest training photo: the largest cosine.

    Args:
        generated: identity features of the generated images, (N, D).
        subject: identity features of the training photos, (M, D).

    Returns:
        (N,) in [-1, 1]; near 1, or above the real-photo oracle, means a copy rather than success. NaN if M is 0.

    Raises:
        ValueError: the shapes do not fit.
    """
    cosines = _cosines(generated, subject, "generated", "subject")
    return cosines.amax(dim=1) if cosines.shape[1] else cosines.new_full(cosines.shape[:1], float("nan"))  # (N, M) -> (N,)


class _MeanOfImages(Metric):
    """A mean over images, kept as a sum and a count, so that batches and ranks may be split in any way."""

    full_state_update = False
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, scores: Tensor) -> None:
        self.total += scores.sum()
        self.count += len(scores)

    def compute(self) -> Tensor:
        """Returns the mean over all images so far, a scalar; NaN if there was none."""
        return self.total / self.count


class IdentityFidelity(_MeanOfImages):
    """Mean over images of the mean cosine to all of their subject's photos: `identity_fidelity`, batch by batch. Up is better."""

    higher_is_better = True

    def update(self, generated: Tensor, subject: Tensor) -> None:
        """Adds generated images (N, D) of one subject, whose photos (M, D), M >= 1, are all given each time."""
        self._add(per_image_fidelity(generated, subject))


class PromptAlignment(_MeanOfImages):
    """Mean over images of the cosine to their own prompt: `prompt_alignment`, batch by batch. Up is better."""

    higher_is_better = True

    def update(self, images: Tensor, prompts: Tensor) -> None:
        """Adds images (N, D) and the prompt of each (N, D)."""
        self._add(per_image_alignment(images, prompts))


class Drift(_MeanOfImages):
    """Mean over class-prompt images of the mean cosine to all of the subject's photos: `drift`, batch by batch. Down is better."""

    higher_is_better = False

    def update(self, class_images: Tensor, subject: Tensor) -> None:
        """Adds class-prompt images (N, D); the subject's photos (M, D), M >= 1, are all given each time."""
        self._add(per_image_fidelity(class_images, subject))


class Diversity(Metric):
    """Mean over prompts of the mean of 1 - cosine over pairs of their images: `diversity`, over all batches. Up is better.

    Keeps the features, as the images of one prompt may be spread over batches and ranks. Under DDP a rank that has no image
    must still call `update` once, with shapes (0, D) and (0,), for torchmetrics cannot gather a missing state.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    features: list[Tensor]
    groups: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("groups", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, groups: Tensor) -> None:
        """Adds images (N, D) and the prompt of each as an integer (N,), the same integer in every batch and rank."""
        units = _unit(features, "features")
        _check_groups(groups, len(units))
        self.features.append(units)
        self.groups.append(groups)

    def compute(self) -> Tensor:
        """Returns the diversity of all images so far, a scalar; NaN if no prompt has two images."""
        if isinstance(self.features, list) and not self.features:
            return torch.tensor(float("nan"), device=self.device)
        return diversity(dim_zero_cat(self.features), dim_zero_cat(self.groups))


def _unit(features: Tensor, name: str) -> Tensor:
    """Returns the rows scaled to length 1, in float32 or better; a row of zeros stays zero."""
    if features.ndim != 2:
        raise ValueError(f"{name} must be features of shape (images, dimensions), got {tuple(features.shape)}")
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)


def _cosines(a: Tensor, b: Tensor, a_name: str, b_name: str) -> Tensor:
    """Returns the cosine of every row of a (N, D) to every row of b (M, D): (N, M)."""
    a, b = _unit(a, a_name), _unit(b, b_name)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{a_name} and {b_name} must have features of one encoder, got {a.shape[1]} and {b.shape[1]} dimensions")
    return a @ b.T


def _mean_of_pairs(units: Tensor) -> Tensor:
    """Returns the mean cosine over pairs of two different rows of unit vectors (K, D); NaN if K < 2."""
    rows, columns = torch.triu_indices(len(units), len(units), offset=1, device=units.device)
    return (units @ units.T)[rows, columns].mean()  # (K, K) -> (K (K - 1) / 2,) -> scalar


def _check_groups(groups: Tensor, images: int) -> None:
    """Raises ValueError unless groups hold one integer for each image."""
    if groups.shape != (images,):
        raise ValueError(f"groups must hold one integer for each image, ({images},), got shape {tuple(groups.shape)}")
    if groups.is_floating_point() or groups.is_complex():
        raise ValueError(f"groups must be integers, got {groups.dtype}")
