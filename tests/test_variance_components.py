"""Variance components against known ones: a hand-worked table and simulated experiments."""

import math

import numpy as np
import pytest

from dreambooth.statistics.variance_components import VarianceComponents, variance_components

SHAPE = (6, 4, 5, 3)  # subjects, seeds, prompts, noises
TRUE = VarianceComponents(subject=1.0, prompt=0.6, subject_prompt=0.4, seed=0.5, seed_prompt=0.3, noise=0.7, rest=0.2)
WHERE = {
    "subject": (0,),
    "prompt": (2,),
    "subject_prompt": (0, 2),
    "seed": (0, 1),
    "seed_prompt": (0, 1, 2),
    "noise": (0, 2, 3),
    "rest": (0, 1, 2, 3),
}


def _experiment(draws: np.random.Generator, true: VarianceComponents) -> np.ndarray:
    """A table of scores whose parts have known variances; each part varies along its own axes alone."""
    parts = [
        draws.normal(0, math.sqrt(getattr(true, name)), [n if axis in axes else 1 for axis, n in enumerate(SHAPE)]) for name, axes in WHERE.items()
    ]
    return sum(parts, np.zeros(SHAPE))


def test_variance_components_are_right_on_average() -> None:
    draws = np.random.default_rng(0)
    found = np.mean([variance_components(_experiment(draws, TRUE)) for _ in range(600)], axis=0)
    assert found == pytest.approx(np.array(TRUE), abs=0.06)  # of the largest, 0.03 is one standard error


@pytest.mark.parametrize("name", WHERE)
def test_variance_components_give_a_single_source_to_its_name_alone(name: str) -> None:
    draws, true = np.random.default_rng(1), VarianceComponents(*(0.0,) * 7)._replace(**{name: 1.0})
    found = np.mean([variance_components(_experiment(draws, true)) for _ in range(300)], axis=0)
    shares = dict(zip(WHERE, found / found.sum(), strict=True))
    assert shares[name] > 0.85


def test_variance_components_by_hand() -> None:
    scores = np.broadcast_to(np.array([0.0, 2.0])[:, None, None, None], (2, 2, 2, 2))  # two subjects that differ by 2, and nothing else
    assert variance_components(scores) == (2.0, 0, 0, 0, 0, 0, 0)  # the variance of 0 and 2 with n - 1


def test_variance_components_shares_sum_to_one() -> None:
    assert sum(variance_components(_experiment(np.random.default_rng(2), TRUE)).shares().values()) == pytest.approx(1)


def test_variance_components_of_what_does_not_vary_have_no_shares() -> None:
    assert math.isnan(variance_components(np.full(SHAPE, 0.5)).shares()["seed"])


@pytest.mark.parametrize("shape", [(3, 1, 2, 2), (3, 2, 2), (0, 2, 2, 2)])
def test_variance_components_of_a_table_that_is_too_small_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="2 or more each"):
        variance_components(np.ones(shape))


def test_variance_components_of_a_table_with_a_gap_are_refused() -> None:
    scores = np.ones(SHAPE)
    scores[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="complete"):
        variance_components(scores)
