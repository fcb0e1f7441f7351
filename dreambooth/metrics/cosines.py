"""Scores of feature vectors: what was learned about the subject, and what was lost; networks live in `encoders.py`.

Three kinds of features come in, and every score says which it takes:

- *identity*: DINO ViT-S/16, class token after the final layer norm, 384 numbers; short side resized to 256 (bicubic, antialiased), centre
  crop 224, ImageNet mean and standard deviation (Caron et al. 2021). DINOv2 the same way, in its place or beside it. In the lab: the identity scorer.
- *image* and *text*: CLIP ViT-B/32, the projections that CLIP itself compares, 512 numbers; short side resized to 224 (bicubic,
  antialiased), centre crop 224, CLIP's mean and standard deviation (Radford et al. 2021). In the lab: the image and text scorers.

Which networks it was in fact stands in the evaluator's version beside the scores (`LoadedEncoders.version`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def identity_fidelity(generated: Tensor, subject: Tensor) -> Tensor:
    """Returns how much the generated images look like the subject: the mean cosine over all pairs (generated, photo).

    Args:
        generated: features of the generated images, (N, D), any length of vector.
        subject: features of the subject's photos, (M, D), of the same network.

    Returns:
        A scalar in [-1, 1], higher is better; NaN if N or M is 0.

    Raises:
        ValueError: the shapes do not fit.

    With identity features it is the paper's "DINO", here `identity_fidelity`; with image features its "CLIP-I", here `image_fidelity`
    (the paper does not say which CLIP). All pairs, not one photo an image; the mean over subjects is `macro_mean`.

    Source: Ruiz et al. 2023, sec. 4.1; layer and preprocessing, which the paper leaves open: google/dreambooth issue 3.
    """
    return per_image_fidelity(generated, subject).mean()


def per_image_fidelity(generated: Tensor, subject: Tensor) -> Tensor:
    """Returns each generated image's mean cosine to all photos of the subject, (N,) in [-1, 1]; see `identity_fidelity`."""
    return cosines_of(generated, subject, "generated", "subject").mean(dim=1)  # (N, M) -> (N,)


def prompt_alignment(images: Tensor, prompts: Tensor) -> Tensor:
    """Returns how well images show their prompts: the mean cosine of each image to its own prompt ("CLIP-T").

    Args:
        images: image features in the space shared with text, (N, D), any length of vector.
        prompts: features of the prompt of each image, (N, D): row i belongs to image i.

    Returns:
        A scalar in [-1, 1], higher is better: not times 100, not clamped at 0. NaN if N is 0.

    Raises:
        ValueError: the shapes do not fit.

    Image and text features. The prompt is given without the identifier and with the class noun ("a dog on the beach"): the network does
    not know the identifier, whose letters would only add noise. The other reading is `prompt_alignment_with_identifier`; the paper does
    not say which is its own.

    Source: Ruiz et al. 2023, sec. 4.1.
    """
    return per_image_alignment(images, prompts).mean()


def per_image_alignment(images: Tensor, prompts: Tensor) -> Tensor:
    """Returns the cosine of each image to its own prompt, (N,) in [-1, 1]; see `prompt_alignment`."""
    images, prompts = unit_rows(images, "images"), unit_rows(prompts, "prompts")
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

    Identity features. The class prompt names no subject, and the photos are real ones of the subject.

    Source: Ruiz et al. 2023, sec. 4.3 ("PRES").
    """
    return cosines_of(class_images, subject, "class_images", "subject").mean()


def identity_diversity(features: Tensor, groups: Tensor) -> Tensor:
    """Returns how much the individuals in images of one prompt differ: the mean over prompts of the mean distance of their pairs.

    The distance of images i < j is 1 - cosine of identity features, so it says whether a class is still many individuals; of images of one
    subject it says only how well the subject is kept, and lower would be better. For "DIV" see `diversity_of_distances`.

    Args:
        features: identity features, (N, D), any length of vector.
        groups: the prompt of each image as an integer, (N,); prompts with a single image say nothing and are ignored.

    Returns:
        A scalar in [0, 2], for images of a class higher is better; NaN if no prompt has two images.

    Raises:
        ValueError: the shapes do not fit, or the groups are not integers.
    """
    units = unit_rows(features, "features")
    return diversity_of_distances(1 - units @ units.T, groups)


def diversity_of_distances(distances: Tensor, groups: Tensor) -> Tensor:
    """Returns how much images of one prompt differ: "DIV", the mean over prompts of the mean distance of their pairs, no image with itself.

    The paper's distance is LPIPS (`perceptual.Lpips.distances`); where its weights are not, `pixels.structural_distances` needs none, but its
    values are not comparable with published ones.

    Args:
        distances: symmetric, (N, N); the diagonal is not looked at.
        groups: the prompt of each image as an integer, (N,); prompts with a single image say nothing and are ignored.

    Returns:
        A scalar; NaN if no prompt has two images, or a distance is NaN.

    Raises:
        ValueError: the shapes do not fit, or the groups are not integers.

    Source: Ruiz et al. 2023, sec. 4.3 ("DIV").
    """
    per_image = per_image_diversity(distances, groups)
    counts = (groups[:, None] == groups[None, :]).sum(dim=1)
    paired = counts > 1
    return macro_mean(per_image[paired], groups[paired])


def per_image_diversity(distances: Tensor, groups: Tensor) -> Tensor:
    """Returns each image's mean distance to the other images of its group, (N,); NaN for an image that is alone; see `diversity_of_distances`."""
    _check_groups(groups, len(distances))
    if distances.shape != (len(groups), len(groups)):
        raise ValueError(f"distances must be of all pairs, ({len(groups)}, {len(groups)}), got {tuple(distances.shape)}")
    mates = groups[:, None] == groups[None, :]
    mates &= ~torch.eye(len(groups), dtype=torch.bool, device=groups.device)
    return torch.where(mates, distances, 0).sum(dim=1) / mates.sum(dim=1)  # (N, N) -> (N,)


def macro_mean(values: Tensor, groups: Tensor) -> Tensor:
    """Returns the mean over groups (subjects, prompts) of the mean of each: every group counts once, however many images it has.

    Args:
        values: per-image scores, (N,).
        groups: the group of each image as an integer, (N,).

    Returns:
        A scalar; NaN if N is 0 or a value is NaN.

    Raises:
        ValueError: the groups are not N integers.
    """
    _check_groups(groups, len(values))
    labels, place = groups.unique(return_inverse=True)
    sums = values.new_zeros(len(labels)).index_add(0, place, values)
    return (sums / place.bincount(minlength=len(labels))).mean()


def paired_drift(tuned: Tensor, base: Tensor) -> Tensor:
    """Returns how far each image has moved from what the un-tuned base draws: 1 - cosine of the two, one to one ("other_class_drift").

    Args:
        tuned: identity features of the tuned model's images for prompts of other classes than the subject's, (N, D).
        base: identity features of the base's images for the same prompts and noise, (N, D): row i belongs to row i.

    Returns:
        (N,) in [0, 2], **lower** is better; 0 for the base itself.

    Raises:
        ValueError: the shapes do not fit.
    """
    tuned, base = unit_rows(tuned, "tuned"), unit_rows(base, "base")
    if tuned.shape != base.shape:
        raise ValueError(f"base must hold one row for each tuned image, {tuple(tuned.shape)}, got {tuple(base.shape)}")
    return 1 - (tuned * base).sum(dim=1)  # (N, D) -> (N,)


def unit_rows(features: Tensor, name: str) -> Tensor:
    """Returns the rows scaled to length 1, in float32 or better; a row of zeros stays zero."""
    if features.ndim != 2:
        raise ValueError(f"{name} must be features of shape (images, dimensions), got {tuple(features.shape)}")
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)


def cosines_of(a: Tensor, b: Tensor, a_name: str, b_name: str) -> Tensor:
    """Returns the cosine of every row of a (N, D) to every row of b (M, D): (N, M)."""
    a, b = unit_rows(a, a_name), unit_rows(b, b_name)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{a_name} and {b_name} must have features of one encoder, got {a.shape[1]} and {b.shape[1]} dimensions")
    return a @ b.T


def mean_of_pairs(units: Tensor) -> Tensor:
    """Returns the mean cosine over pairs of two different rows of unit vectors (K, D); NaN if K < 2."""
    rows, columns = torch.triu_indices(len(units), len(units), offset=1, device=units.device)
    return (units @ units.T)[rows, columns].mean()  # (K, K) -> (K (K - 1) / 2,) -> scalar


def _check_groups(groups: Tensor, images: int) -> None:
    """Raises ValueError unless groups hold one integer for each image."""
    if groups.shape != (images,):
        raise ValueError(f"groups must hold one integer for each image, ({images},), got shape {tuple(groups.shape)}")
    if groups.is_floating_point() or groups.is_complex():
        raise ValueError(f"groups must be integers, got {groups.dtype}")
