"""Randomness is a function of its key: never of history, of neighbours, or of torch's own state."""

import itertools
from collections.abc import Callable

import pytest
import torch

from dreambooth import randomness
from dreambooth.randomness import NOISE, TIMESTEP, integer, normal, normals, permutation, uniform

KNOWN = [0.217951, -0.751166, -0.540690]
STREAMS = [value for name, value in vars(randomness).items() if name.isupper()]


def test_streams_are_all_different() -> None:
    assert len(set(STREAMS)) == len(STREAMS) == 14


def test_normal_is_the_same_for_the_same_key() -> None:
    assert torch.equal(normal((4, 8, 8), NOISE, 0, 5, 2), normal((4, 8, 8), NOISE, 0, 5, 2))


def test_normal_does_not_hear_of_torch_manual_seed() -> None:
    torch.manual_seed(1)
    first = normal((16,), NOISE, 0)
    torch.manual_seed(2)
    assert torch.equal(first, normal((16,), NOISE, 0))


def test_normal_leaves_torchs_own_state_alone() -> None:
    before = torch.get_rng_state()
    normal((16,), NOISE, 0), permutation(9, NOISE), uniform(NOISE), integer(5, NOISE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "draw", [lambda: normal((64,), NOISE, 0, 5, 2), lambda: torch.tensor(uniform(NOISE, 0, 5, 2), dtype=torch.float64)], ids=["normal", "uniform"]
)
def test_numbers_do_not_hear_of_torchs_default_dtype(draw: Callable[[], torch.Tensor]) -> None:
    """Lightning's bf16-true sets it to bfloat16 in a training step: the noise was rounded to it, so arms of another precision saw other noise."""
    exact = draw()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = draw()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, exact)


@pytest.mark.parametrize(
    "other", [(TIMESTEP, 0, 5, 2), (NOISE, 1, 5, 2), (NOISE, 0, 6, 2), (NOISE, 0, 5, 3), (NOISE, 5, 0, 2), (NOISE, 0, 5), (NOISE, 0, 5, 2, 0)]
)
def test_normal_differs_when_any_part_of_the_key_differs(other: tuple[int, ...]) -> None:
    correlation = torch.corrcoef(torch.stack([normal((4096,), NOISE, 0, 5, 2), normal((4096,), *other)]))[0, 1]
    assert abs(float(correlation)) < 0.08  # 5 standard errors of unrelated numbers


def test_normal_is_known_for_one_key_on_every_machine() -> None:
    """Written down once: a run that continues on another machine, or next year, must meet the same noise."""
    assert normal((3,), 0, 0, 0, 0).tolist() == pytest.approx(KNOWN, abs=1e-6)


def test_normal_is_standard_normal() -> None:
    numbers = torch.cat([normal((256,), NOISE, 0, step, 0) for step in range(400)])  # 102400 numbers
    assert abs(float(numbers.mean())) < 5 / 320
    assert abs(float(numbers.var()) - 1) < 5 * (2 / 102400) ** 0.5
    assert abs(float((numbers.abs() < 1).float().mean()) - 0.6827) < 0.008


def test_normals_rows_depend_on_their_own_key_alone() -> None:
    keys = torch.tensor([[0, 1, 0], [0, 1, 1], [7, 1, 0]])
    rows = normals((4, 2), NOISE, keys)
    for row, key in zip(rows, keys, strict=True):
        assert torch.equal(row, normals((4, 2), NOISE, key[None])[0])
        assert torch.equal(row, normal((4, 2), NOISE, *key.tolist()))


def test_integer_is_evenly_spread_by_chi_square() -> None:
    counts = torch.bincount(torch.tensor([integer(20, TIMESTEP, 0, step, 0) for step in range(4000)]), minlength=20).float()
    chi_square = float(((counts - 200) ** 2 / 200).sum())
    assert 5 < chi_square < 45  # 19 degrees of freedom: outside once in a few thousand seeds; below 5 it would be too even to be random


def test_uniform_lies_in_the_unit_interval_and_is_even() -> None:
    numbers = torch.tensor([uniform(NOISE, step) for step in range(4000)])
    assert 0 <= float(numbers.min()) < 0.01 and 0.99 < float(numbers.max()) < 1
    assert abs(float(numbers.mean()) - 0.5) < 5 * (1 / 12 / 4000) ** 0.5


def test_permutation_holds_every_number_once() -> None:
    assert sorted(permutation(50, NOISE, 3)) == list(range(50))


def test_permutation_gives_every_order_equally_often() -> None:
    seen = [tuple(permutation(3, NOISE, key)) for key in range(1200)]
    counts = [seen.count(order) for order in itertools.permutations(range(3))]
    assert sum((count - 200) ** 2 / 200 for count in counts) < 21  # chi-square with 5 degrees of freedom: 1 in 1000


def test_keys_that_differ_never_share_a_state() -> None:
    states = {randomness.generator(stream, 0, step, sample).initial_seed() for stream in STREAMS for step in range(100) for sample in range(4)}
    assert len(states) == len(STREAMS) * 400
