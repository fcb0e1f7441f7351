"""The scores batch by batch and over several processes: thin `torchmetrics.Metric` shells over the pure functions.

They take features or pixels; the network that makes the features is the caller's choice. Each gives, in any split over batches and
ranks, what the function gives for all images at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dreambooth.metrics.cosines import diversity_of_distances, identity_diversity, paired_drift, per_image_alignment, per_image_fidelity
from dreambooth.metrics.pixels import color_drift, sharpness
from dreambooth.metrics.real_photos import memorisation


class _MeanOfImages(Metric):
    """A mean over subjects of the means over their images, kept as sums and counts, so that batches and ranks may be split in any way.

    Args:
        num_subjects: how many subjects there are; with 1 it is the mean over images.
    """

    full_state_update = False
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self, num_subjects: int = 1) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(num_subjects, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(num_subjects, dtype=torch.long), dist_reduce_fx="sum")

    def _add(self, scores: Tensor, subject_index: int) -> None:
        self.total[subject_index] += scores.sum()
        self.count[subject_index] += len(scores)

    def compute(self) -> Tensor:
        """Returns the mean over subjects (those with images) so far, a scalar; NaN if there was no image."""
        seen = self.count > 0
        return (self.total[seen] / self.count[seen]).mean().float()


class IdentityFidelity(_MeanOfImages):
    """`identity_fidelity`: mean over images of the mean cosine to all of their subject's photos. Up is better."""

    higher_is_better = True

    def update(self, generated: Tensor, subject: Tensor, subject_index: int = 0) -> None:
        """Adds generated images (N, D) of one subject, whose photos (M, D), M >= 1, are all given each time."""
        self._add(per_image_fidelity(generated, subject), subject_index)


class ImageFidelity(IdentityFidelity):
    """CLIP-I: `identity_fidelity` of image features. Up is better."""


class MaskedIdentity(IdentityFidelity):
    """`identity_fidelity` of patches pooled inside the subject: give it `masked_identity.masked_features` and `Foreground.photos`. Up is better."""


class PromptAlignment(_MeanOfImages):
    """`prompt_alignment`: mean over images of the cosine to their own prompt. Up is better."""

    higher_is_better = True

    def update(self, images: Tensor, prompts: Tensor, subject_index: int = 0) -> None:
        """Adds images (N, D) and the prompt of each (N, D)."""
        self._add(per_image_alignment(images, prompts), subject_index)


class Drift(_MeanOfImages):
    """`drift`: mean over class-prompt images of the mean cosine to all of the subject's photos. Down is better."""

    higher_is_better = False

    def update(self, class_images: Tensor, subject: Tensor, subject_index: int = 0) -> None:
        """Adds class-prompt images (N, D); the subject's photos (M, D), M >= 1, are all given each time."""
        self._add(per_image_fidelity(class_images, subject), subject_index)


class Memorisation(_MeanOfImages):
    """`memorisation`: mean over images of how much closer they are to a training photo than real photos are. Down is better."""

    higher_is_better = False

    def update(self, generated: Tensor, subject: Tensor, held_out: Tensor | None = None, subject_index: int = 0) -> None:
        """Adds generated images (N, D) of one subject; its photos (M, D), and those held out (K, D), are all given each time."""
        self._add(memorisation(generated, subject, held_out), subject_index)


class Sharpness(_MeanOfImages):
    """`sharpness`: mean over images of their fine detail beside the photos'. Up is better."""

    higher_is_better = True

    def update(self, images: Tensor, photos: Tensor, subject_index: int = 0) -> None:
        """Adds images, uint8 (N, H, W, 3); the subject's photos, uint8 (M, h, w, 3), are all given each time."""
        self._add(sharpness(images, photos), subject_index)


class OtherClassDrift(_MeanOfImages):
    """`paired_drift`: mean over images of other classes of 1 - cosine to what the base draws. Down is better."""

    higher_is_better = False

    def update(self, tuned: Tensor, base: Tensor, subject_index: int = 0) -> None:
        """Adds identity features of the tuned model's images (N, D) and of the base's for the same prompts and noise (N, D)."""
        self._add(paired_drift(tuned, base), subject_index)


class OtherClassColorDrift(_MeanOfImages):
    """`color_drift`: mean over images of other classes of the share of colour that the base draws otherwise. Down is better."""

    higher_is_better = False

    def update(self, tuned: Tensor, base: Tensor, subject_index: int = 0) -> None:
        """Adds the tuned model's images and the base's for the same prompts and noise, both uint8 (N, H, W, 3)."""
        self._add(color_drift(tuned, base), subject_index)


class _AllImages(Metric):
    """Keeps every image, or its features, as those of one prompt may be spread over batches and ranks.

    Under DDP a rank that has no image must still call `update` once, with as many dimensions and 0 images, for torchmetrics cannot
    gather a missing state.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    images: list[Tensor]
    groups: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("images", [], dist_reduce_fx="cat")
        self.add_state("groups", [], dist_reduce_fx="cat")

    def update(self, images: Tensor, groups: Tensor) -> None:
        """Adds images (N, ...) and the prompt of each as an integer (N,): the same one in every batch and rank, another for every subject.

        Raises:
            ValueError: the groups are not one integer for each image.
        """
        if groups.shape != (len(images),) or groups.is_floating_point() or groups.is_complex():
            raise ValueError(f"groups must hold one integer for each image, ({len(images)},), got {groups.dtype} of shape {tuple(groups.shape)}")
        self.images.append(images)
        self.groups.append(groups)

    def compute(self) -> Tensor:
        """Returns the score of all images so far, a scalar; NaN if no prompt has two images."""
        if isinstance(self.images, list) and not self.images:
            return torch.tensor(float("nan"), device=self.device)
        return self._score(dim_zero_cat(self.images), dim_zero_cat(self.groups))

    def _score(self, images: Tensor, groups: Tensor) -> Tensor:
        raise NotImplementedError


class IdentityDiversity(_AllImages):
    """`identity_diversity` of a class: mean over prompts of the mean of 1 - cosine over pairs of their images' identity features. Up is better."""

    def _score(self, images: Tensor, groups: Tensor) -> Tensor:
        return identity_diversity(images, groups)


class PerceptualDiversity(_AllImages):
    """`diversity_of_distances`: mean over prompts of the mean distance over pairs of their images. Up is better.

    Args:
        distances: gives the distances of all pairs (n, n) of n images, uint8 (n, H, W, 3): `pixels.structural_distances`, `Lpips.distances`.
    """

    def __init__(self, distances: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.distances = distances

    def _score(self, images: Tensor, groups: Tensor) -> Tensor:
        return diversity_of_distances(within_groups(self.distances, images, groups), groups)


def within_groups(distances: Callable[[Tensor], Tensor], images: Tensor, groups: Tensor) -> Tensor:
    """Returns the distances of all pairs of one group, (N, N) float32, and 0 elsewhere: the network sees a group at a time.

    Args:
        distances: gives the distances of all pairs (n, n) of n images.
        images: (N, ...), what the network takes.
        groups: the prompt of each image as an integer, (N,).
    """
    found = torch.zeros(len(images), len(images))
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        found[rows[:, None], rows] = distances(images[rows]).float().cpu()
    return found
