"""Randomness as a function of integers, never of history: the same key gives the same draw, on any machine, in any order."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

# One stream per use, so that two draws with equal (seed, step, sample) never share numbers.
NOISE, TIMESTEP, POSTERIOR, ORDER, CROP, FLIP, SAMPLING, PRIOR_ORDER, CLASS_BANK, OFFSET, PERTURBATION, ADAPTER_INIT, DROPOUT, BUCKET = range(14)


def generator(*key: int) -> torch.Generator:
    """Returns a CPU generator whose numbers depend on the key alone.

    Args:
        key: any non-negative integers, by custom (stream, seed, step, sample).
    """
    state = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def normal(shape: tuple[int, ...], *key: int) -> Tensor:
    """Returns standard normal numbers of the given shape (float32, CPU) for one key."""
    return torch.randn(shape, generator=generator(*key), dtype=torch.float32)  # whatever torch's default is: bf16-true changes it in a step


def normals(shape: tuple[int, ...], stream: int, keys: Tensor) -> Tensor:
    """Returns standard normal numbers (B, *shape), float32 on the CPU; row i depends on the stream and on keys[i] alone.

    Args:
        keys: (B, k) non-negative integers, as (seed, step, sample).
    """
    return torch.stack([normal(shape, stream, *key) for key in keys.tolist()])


def integer(high: int, *key: int) -> int:
    """Returns one integer in [0, high) for one key."""
    return int(torch.randint(high, (), generator=generator(*key)))


def uniform(*key: int) -> float:
    """Returns one number in [0, 1) for one key."""
    return float(torch.rand((), generator=generator(*key), dtype=torch.float32))


def permutation(length: int, *key: int) -> list[int]:
    """Returns 0..length-1 in an order that depends on the key alone."""
    return torch.randperm(length, generator=generator(*key)).tolist()


def seed_torch(*key: int) -> None:
    """Sets torch's own generators to a state that depends on the key alone: for layers that draw from them, as dropout."""
    torch.manual_seed(generator(*key).initial_seed())


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Lets libraries draw on the CPU, inside the context, numbers that depend on the key alone; torch's generator is then as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(*key).initial_seed())
        yield
