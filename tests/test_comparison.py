"""Tables of arms against hand computation: pairing, macro means, tests, and what the sentence under the header admits."""

import math

import numpy as np
import pandas as pd
import pytest

from dreambooth.statistics.comparison import Comparison, compare_arms, to_markdown, to_table
from dreambooth.statistics.intervals import bootstrap_interval, holm

NAN = math.nan


def _frame(subjects: int = 6, seeds: int = 3, effects: dict[str, float] | None = None, spread: float = 0.02) -> pd.DataFrame:
    """One row an image: subjects differ by far more than arms do; the base has no training seed."""
    draws, rows = np.random.default_rng(0), []
    for subject in range(subjects):
        level = draws.normal(0.7, 0.1)
        for arm, effect in (effects or {"base": -0.3, "prior": 0.0, "low_rank": -0.05}).items():
            for seed in range(1 if arm == "base" else seeds):
                for prompt in ("snow", "moon"):
                    for k in range(2):
                        score = level + effect + draws.normal(0, spread)
                        rows.append((arm, f"s{subject}", NAN if arm == "base" else seed, prompt, k, score))
    return pd.DataFrame(rows, columns=["arm", "subject", "seed", "prompt", "k", "identity"])


def _row(comparison: Comparison, arm: str):
    return next(row for row in comparison.rows if row.arm == arm)


def test_compare_arms_gives_the_mean_difference_of_pairs() -> None:
    frame = _frame()
    wide = frame[frame.arm != "base"].pivot_table(index=["subject", "seed", "prompt", "k"], columns="arm", values="identity")
    expected = (wide.low_rank - wide.prior).groupby(["subject", "seed"]).mean().groupby("subject").mean()
    row = _row(compare_arms(frame, "identity", "prior"), "low_rank")
    assert row.difference.mean == pytest.approx(expected.mean())
    assert row.test.p == pytest.approx(2 / 64)  # all six subjects are on one side


def test_compare_arms_interval_is_as_wide_as_that_over_subjects() -> None:
    frame = _frame(subjects=12)
    wide = frame[frame.arm != "base"].pivot_table(index=["subject", "seed", "prompt", "k"], columns="arm", values="identity")
    known = bootstrap_interval((wide.low_rank - wide.prior).groupby("subject").mean())
    found = _row(compare_arms(frame, "identity", "prior"), "low_rank").difference
    assert found.n == 12 and found.high - found.low == pytest.approx(known.high - known.low, rel=0.3)


def test_compare_arms_means_weigh_subjects_equally() -> None:
    rows = [("a", "dog", 0, "p", k, 1.0) for k in range(8)] + [("a", "cat", 0, "p", 0, 0.0), ("a", "cat", 1, "p", 0, 0.4)]
    frame = pd.DataFrame(rows, columns=["arm", "subject", "seed", "prompt", "k", "identity"])
    assert compare_arms(frame, "identity", "a").rows[0].mean.mean == pytest.approx((1.0 + 0.2) / 2)


def test_compare_arms_pairs_the_base_without_seed_with_every_seed() -> None:
    row = _row(compare_arms(_frame(), "identity", "base"), "prior")
    assert row.difference.mean == pytest.approx(0.3, abs=0.01) and row.unpaired == 0 and row.seeds == (3, 3)


def test_compare_arms_pairs_arms_with_seeds_seed_by_seed() -> None:
    frame = _frame(effects={"a": 0.0, "b": 0.0}, seeds=2, spread=0.0)
    frame.loc[frame.seed == 1, "identity"] += 0.5  # a seed that is lucky in both arms
    difference = _row(compare_arms(frame, "identity", "a"), "b").difference
    assert (difference.low, difference.high) == pytest.approx((0.0, 0.0))


def test_compare_arms_says_how_many_images_have_no_partner() -> None:
    frame = _frame()
    frame = frame.drop(frame[(frame.arm == "prior") & (frame.subject == "s0") & (frame.seed == 2)].index)
    comparison = compare_arms(frame, "identity", "prior")
    assert _row(comparison, "low_rank").unpaired == 4 and "4 images without a partner" in comparison.sentence


def test_compare_arms_corrects_for_the_number_of_arms() -> None:
    effects = {"prior": 0.0, "a": -0.05, "b": 0.05, "c": 0.001}
    rows = compare_arms(_frame(subjects=8, effects=effects), "identity", "prior").rows
    assert math.isnan(rows[0].holm_p) and rows[0].difference is None
    assert [row.holm_p for row in rows[1:]] == pytest.approx(holm([row.test.p for row in rows[1:]]))
    assert rows[1].holm_p == pytest.approx(3 * rows[1].test.p)


def test_compare_arms_says_what_its_numbers_rest_on() -> None:
    assert compare_arms(_frame(subjects=5), "identity", "prior").sentence == (
        "95% intervals over 5 subjects x 3 training seeds (subjects resampled, and seeds within them); differences pair images of the same "
        "prompt and k; p is two-sided, from all patterns of signs of subject means; 5 subjects: p cannot be below 0.06; "
        "Holm's correction over 2 arms."
    )


def test_compare_arms_with_two_subjects_gives_no_interval_and_says_so() -> None:
    comparison = compare_arms(_frame(subjects=2), "identity", "prior")
    assert comparison.sentence.startswith("No intervals: 2 subjects x 3 training seeds, and 3 subjects are the fewest")
    assert all(row.mean.low is None for row in comparison.rows)


def test_compare_arms_with_one_seed_says_what_is_not_in_the_intervals() -> None:
    sentence = compare_arms(_frame(seeds=1), "identity", "prior").sentence
    assert sentence.startswith("95% intervals over 6 subjects x 1 training seed; one training seed: what another would change is not in them")
    assert "cannot be below" not in sentence  # 6 subjects: 2 / 64


def test_compare_arms_with_a_missing_subject_warns_of_the_means() -> None:
    frame = _frame()
    comparison = compare_arms(frame[(frame.arm != "low_rank") | (frame.subject != "s0")], "identity", "prior")
    assert "do not have the same number of subjects" in comparison.sentence and "over 5 to 6 subjects" in comparison.sentence


def test_compare_arms_leaves_out_what_was_not_measured() -> None:
    frame = _frame()
    extra = frame.assign(prompt="class", identity=NAN)
    with_gaps, without = compare_arms(pd.concat([frame, extra]), "identity", "prior"), compare_arms(frame, "identity", "prior")
    assert to_markdown(with_gaps, digits=6) == to_markdown(without, digits=6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop(columns="k"), "columns k"),
        (lambda frame: frame[frame.arm != "prior"], "baseline must be one of"),
        (lambda frame: pd.concat([frame, frame.tail(1)]), "one image for each"),
    ],
)
def test_compare_arms_of_a_frame_that_does_not_fit_is_refused(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_arms(change(_frame()), "identity", "prior")


def test_to_table_has_a_row_an_arm_with_the_baseline_first() -> None:
    table = to_table(compare_arms(_frame(), "identity", "prior"))
    assert list(table.columns) == ["arm", "identity", "minus prior", "p", "p (Holm)", "subjects", "seeds"]
    assert list(table.arm) == ["prior", "base", "low_rank"] and table.loc[2, "p (Holm)"] == "0.062" and list(table.seeds) == ["3", "0", "3"]


def test_to_markdown_puts_the_sentence_between_header_and_table() -> None:
    comparison = compare_arms(_frame(), "identity", "prior")
    lines = to_markdown(comparison).splitlines()
    assert lines[0] == "**identity, against prior**" and lines[2] == comparison.sentence and lines[4].startswith("| arm | identity |")
