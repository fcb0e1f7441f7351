"""Where the spread of a score comes from: subjects, prompts, training seeds or noise."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class VarianceComponents(NamedTuple):
    """Variances that add up to that of a single image's score; each >= 0."""

    subject: float  # some subjects are easier
    prompt: float  # some prompts are easier, for every subject
    subject_prompt: float  # some prompts are easier for some subjects
    seed: float  # another training seed of the same subject
    seed_prompt: float  # that differs by prompt
    noise: float  # another evaluation noise, shared by the training seeds
    rest: float  # what is left for one image

    def shares(self) -> dict[str, float]:
        """Returns each part's share of the sum, in [0, 1]; NaN if nothing varies."""
        total = sum(self)
        return {name: value / total if total > 0 else float("nan") for name, value in self._asdict().items()}


def variance_components(scores: ArrayLike) -> VarianceComponents:
    """Returns how much subjects, prompts, training seeds and noise each make a score vary, by the method of moments.

    The design is that of a complete experiment: prompts crossed with subjects; training seeds nested in subjects (seed 0 of two subjects
    is two runs); evaluation noise nested in subject and prompt, and shared by the seeds. The mean squares of the analysis of variance
    are set equal to what they are expected to be, and solved; a negative solution, which small components give by chance, becomes 0.

    Args:
        scores: (subjects, seeds, prompts, noises), at least 2 each, without NaN: no run may be missing.

    Raises:
        ValueError: the table is not complete or too small.

    Source: Searle, Casella & McCulloch 1992, "Variance Components", ch. 4.
    """
    y = np.asarray(scores, dtype=float)
    if y.ndim != 4 or min(y.shape) < 2 or not np.isfinite(y).all():
        raise ValueError(f"scores must be a complete table (subjects, seeds, prompts, noises) of 2 or more each, got shape {y.shape}")
    a, c, b, d = y.shape
    grand, of_s, of_p, of_sp = y.mean(), _mean(y, 1, 2, 3), _mean(y, 0, 1, 3), _mean(y, 1, 3)
    of_sr, of_srp, of_spk = _mean(y, 2, 3), _mean(y, 3), _mean(y, 1)
    rest = _square(y - of_srp - of_spk + of_sp) / (a * b * (c - 1) * (d - 1))
    ms_noise = _square(np.broadcast_to(of_spk - of_sp, y.shape)) / (a * b * (d - 1))
    ms_seed_prompt = _square(np.broadcast_to(of_srp - of_sr - of_sp + of_s, y.shape)) / (a * (c - 1) * (b - 1))
    ms_seed = _square(np.broadcast_to(of_sr - of_s, y.shape)) / (a * (c - 1))
    ms_subject_prompt = _square(np.broadcast_to(of_sp - of_s - of_p + grand, y.shape)) / ((a - 1) * (b - 1))
    ms_prompt = _square(np.broadcast_to(of_p - grand, y.shape)) / (b - 1)
    ms_subject = _square(np.broadcast_to(of_s - grand, y.shape)) / (a - 1)
    found = (
        (ms_subject - ms_subject_prompt - ms_seed + ms_seed_prompt) / (b * c * d),
        (ms_prompt - ms_subject_prompt) / (a * c * d),
        (ms_subject_prompt - ms_seed_prompt - ms_noise + rest) / (c * d),
        (ms_seed - ms_seed_prompt) / (b * d),
        (ms_seed_prompt - rest) / d,
        (ms_noise - rest) / c,
        rest,
    )
    return VarianceComponents(*(max(0.0, float(value)) for value in found))


def _mean(values: NDArray[np.float64], *axes: int) -> NDArray[np.float64]:
    return values.mean(axis=axes, keepdims=True)


def _square(deviations: NDArray[np.float64]) -> float:
    return float((deviations**2).sum())
