"""The judge by true renders: it knows the subject, gives strangers one half, and looks at the subject rather than at the place."""

import pytest
import torch

from dreambooth.lab.ground_truth import FIRST_RIVAL, RIVAL_STRIDE, RIVALS, Gallery, cells
from dreambooth.lab.identities import identity
from dreambooth.lab.splits import HELD_OUT_SEEDS
from dreambooth.lab.world import render

PLACES = ["in the snow", "in the desert"]
CONTEXTS = [PLACES[k % 2] for k in range(12)]


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    return Gallery("robot", 913, PLACES, rivals=8, poses=8)


def pictures(seeds: list[int], contexts: list[str]) -> torch.Tensor:
    return render([identity("robot", seed) for seed in seeds], contexts, list(range(500, 500 + len(seeds))))


def test_judge_knows_the_subject_in_other_poses(gallery: Gallery) -> None:
    verdict = gallery.judge(pictures([913] * 12, CONTEXTS), CONTEXTS)
    assert verdict.rank.mean() > 0.97 and verdict.margin.min() > 0


def test_judge_gives_other_subjects_about_one_half(gallery: Gallery) -> None:
    verdict = gallery.judge(pictures([940 + k for k in range(12)], CONTEXTS), CONTEXTS)
    assert 0.25 < verdict.rank.mean() < 0.75 and abs(float(verdict.margin.mean())) < 0.5


def test_judge_looks_at_the_subject_and_not_at_the_place(gallery: Gallery) -> None:
    """A picture of the subject elsewhere is still of the subject."""
    elsewhere = pictures([913] * 12, ["on the beach"] * 12)
    assert gallery.judge(elsewhere, CONTEXTS).rank.mean() > 0.9


def test_judge_gives_a_rival_the_last_rank(gallery: Gallery) -> None:
    rival = pictures([FIRST_RIVAL] * 4, CONTEXTS[:4])
    verdict = gallery.judge(rival, CONTEXTS[:4])
    assert verdict.rank.max() < 1 and verdict.margin.max() < pictures_margin(gallery)


def pictures_margin(gallery: Gallery) -> float:
    return float(gallery.judge(pictures([913] * 12, CONTEXTS), CONTEXTS).margin.mean())


def test_margin_falls_as_the_subject_fades_into_a_stranger(gallery: Gallery) -> None:
    own, other = pictures([913] * 6, CONTEXTS[:6]).float(), pictures([940] * 6, CONTEXTS[:6]).float()
    margins = [float(gallery.judge((own * (1 - share) + other * share).byte(), CONTEXTS[:6]).margin.mean()) for share in (0.0, 0.4, 0.8)]
    assert margins[0] > margins[1] > margins[2]


def test_rivals_are_no_subjects_of_experiments() -> None:
    assert not {FIRST_RIVAL + RIVAL_STRIDE * rival for rival in range(RIVALS)} & set(HELD_OUT_SEEDS)


def test_cells_are_means_of_squares() -> None:
    picture = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    picture[0, 0, :4, :4] = 255
    assert cells(picture)[0, 0].tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_judge_of_no_pictures_is_empty(gallery: Gallery) -> None:
    assert gallery.judge(torch.zeros(0, 3, 64, 64, dtype=torch.uint8), []).rank.shape == (0,)
