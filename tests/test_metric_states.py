"""The metric shells: any split over batches and ranks gives what the pure functions give at once; two real processes over gloo."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dreambooth.metrics import cosines, pixels, real_photos
from dreambooth.metrics.states import (
    Drift,
    IdentityDiversity,
    IdentityFidelity,
    ImageFidelity,
    MaskedIdentity,
    Memorisation,
    OtherClassColorDrift,
    OtherClassDrift,
    PerceptualDiversity,
    PromptAlignment,
    Sharpness,
)
from dreambooth.metrics.table import METRICS

GROUPS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 2, 1])


def features(rows: int, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 3 + 0.5


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 20, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def known_distances(images: Tensor) -> Tensor:
    """A network with a known answer: the distance of two images is that of their mean grey."""
    grey = images.float().mean(dim=(1, 2, 3))
    return (grey[:, None] - grey[None, :]).abs()


def grey_diversity(images: Tensor, groups: Tensor) -> Tensor:
    return cosines.diversity_of_distances(known_distances(images), groups)


CASES = {
    "identity": (IdentityFidelity, cosines.identity_fidelity, lambda rows: (features(10)[rows], features(4, seed=1))),
    "image": (ImageFidelity, cosines.identity_fidelity, lambda rows: (features(10)[rows], features(4, seed=1))),
    "masked": (MaskedIdentity, cosines.identity_fidelity, lambda rows: (features(10)[rows], features(4, seed=1))),
    "alignment": (PromptAlignment, cosines.prompt_alignment, lambda rows: (features(10)[rows], features(10, seed=2)[rows])),
    "drift": (Drift, cosines.drift, lambda rows: (features(10)[rows], features(4, seed=1))),
    "memorisation": (Memorisation, lambda *a: real_photos.memorisation(*a).mean(), lambda rows: (features(10)[rows], features(4, seed=1))),
    "other": (OtherClassDrift, lambda *a: cosines.paired_drift(*a).mean(), lambda rows: (features(10)[rows], features(10, seed=2)[rows])),
    "sharpness": (Sharpness, lambda *a: pixels.sharpness(*a).mean(), lambda rows: (pictures(10)[rows], pictures(3, seed=1))),
    "colors": (OtherClassColorDrift, lambda *a: pixels.color_drift(*a).mean(), lambda rows: (pictures(10)[rows], pictures(10, seed=2)[rows])),
    "identity_diversity": (IdentityDiversity, cosines.identity_diversity, lambda rows: (features(10)[rows], GROUPS[rows])),
    "perceptual": (lambda: PerceptualDiversity(known_distances), grey_diversity, lambda rows: (pictures(10)[rows], GROUPS[rows])),
}
every_case = pytest.mark.parametrize(("kind", "function", "inputs"), CASES.values(), ids=CASES)


@every_case
def test_metric_in_uneven_batches_equals_the_function(kind, function, inputs) -> None:
    metric = kind()
    for rows in (slice(0, 1), slice(1, 7), slice(7, 7), slice(7, 10)):
        metric.update(*inputs(rows))
    assert metric.compute().item() == pytest.approx(function(*inputs(slice(None))).item(), abs=1e-5)


@every_case
def test_metric_merged_from_uneven_ranks_equals_the_function(kind, function, inputs) -> None:
    ranks = [kind(), kind()]
    ranks[0].update(*inputs(slice(0, 2)))
    ranks[1].update(*inputs(slice(2, 5)))
    ranks[1].update(*inputs(slice(5, 10)))
    ranks[0].merge_state(ranks[1])
    assert ranks[0].compute().item() == pytest.approx(function(*inputs(slice(None))).item(), abs=1e-5)


def rank_of_two(rank: int, meeting: str, results: str) -> None:
    """One process of two: rank 0 sees three images, rank 1 sees seven."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    found = {}
    for name, (kind, _, inputs) in CASES.items():
        metric = kind()
        for rows in ([slice(0, 1), slice(1, 3)], [slice(3, 9), slice(9, 10)])[rank]:
            metric.update(*inputs(rows))
        found[name] = metric.compute().item()
    torch.save(found, f"{results}-{rank}")
    dist.destroy_process_group()


def test_metrics_of_two_processes_equal_the_functions(tmp_path: Path) -> None:
    mp.start_processes(rank_of_two, args=(str(tmp_path / "meeting"), str(tmp_path / "found")), nprocs=2, start_method="fork")  # quicker
    expected = {name: function(*inputs(slice(None))).item() for name, (_, function, inputs) in CASES.items()}
    for rank in range(2):
        assert torch.load(tmp_path / f"found-{rank}", weights_only=True) == pytest.approx(expected, abs=1e-5)


@every_case
def test_metric_reset_forgets(kind, function, inputs) -> None:
    metric = kind()
    metric.update(*inputs(slice(0, 5)))
    metric.reset()
    metric.update(*inputs(slice(5, 10)))
    assert metric.compute().item() == pytest.approx(function(*inputs(slice(5, 10))).item(), abs=1e-5)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@every_case
def test_metric_without_images_is_nan(kind, function, inputs) -> None:
    assert kind().compute().isnan()


def test_metric_of_several_subjects_counts_each_once() -> None:
    metric, subject = IdentityFidelity(num_subjects=3), torch.tensor([[1.0, 0.0]])
    metric.update(torch.tensor([[1.0, 0.0]] * 9), subject, subject_index=0)  # nine images at 1
    metric.update(torch.tensor([[0.0, 1.0]]), subject, subject_index=2)  # one image at 0; subject 1 has none
    assert metric.compute().item() == pytest.approx(0.5)  # over images it would be 0.9


def test_diversity_metric_refuses_prompts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="one integer for each image"):
        IdentityDiversity().update(features(3), torch.zeros(2, dtype=torch.long))


def test_table_directions_match_the_metric_classes() -> None:
    kinds = {
        "identity_fidelity": IdentityFidelity,
        "identity_fidelity_dinov2": IdentityFidelity,
        "image_fidelity": ImageFidelity,
        "masked_identity": MaskedIdentity,
        "prompt_alignment": PromptAlignment,
        "prompt_alignment_with_identifier": PromptAlignment,
        "drift": Drift,
        "diversity": PerceptualDiversity,
        "class_diversity": PerceptualDiversity,
        "class_identity_diversity": IdentityDiversity,
        "lpips_diversity": PerceptualDiversity,
        "class_lpips_diversity": PerceptualDiversity,
        "memorisation": Memorisation,
        "sharpness": Sharpness,
        "other_class_drift": OtherClassDrift,
        "other_class_color_drift": OtherClassColorDrift,
    }
    measured = [row for row in METRICS if not row.key.startswith("true_")]  # those are the lab's, and no means of features
    assert {row.key: row.direction == "up" for row in measured} == {key: kind.higher_is_better for key, kind in kinds.items()}
