"""The rule for the best step against hand-checked and random runs; early stopping by it; the ratio of loss variances."""

import math
import random
import statistics
from functools import partial

import numpy as np
import pytest

from dreambooth import step_choice
from dreambooth.step_choice import StepScores, dvar_ratio

NAN = math.nan
choose_step, stop_early = (partial(rule, min_alignment_ratio=0.95, max_drift_gain=0.1) for rule in (step_choice.choose_step, step_choice.stop_early))
BASE = StepScores(0, 0.2, 0.30, 0.10, 0.5)


def test_choose_step_takes_the_most_faithful_admissible_step() -> None:
    rows = [BASE, StepScores(100, 0.6, 0.30, 0.12), StepScores(200, 0.7, 0.29, 0.19), StepScores(300, 0.8, 0.28, 0.19)]
    choice = choose_step(rows)  # step 300: alignment 0.28 < 0.95 x 0.30
    assert choice.step == 200
    assert choice.reason == (
        "step 200 has the highest identity fidelity, 0.700, of the 2 of 3 steps within the limits "
        "(prompt alignment at least 0.285 and drift at most 0.200)"
    )


def test_choose_step_refuses_a_collapsed_class() -> None:
    assert choose_step([BASE, StepScores(100, 0.6, 0.30, 0.15), StepScores(200, 0.9, 0.30, 0.21)]).step == 100


def test_choose_step_keeps_a_step_exactly_at_its_limits() -> None:
    base = StepScores(0, 0.2, 0.30, 0.70)  # 0.7 + 0.1 is 0.7999999999999999 in floating point
    assert choose_step([base, StepScores(100, 0.6, 0.30, 0.75), StepScores(200, 0.9, 0.285, 0.80)]).step == 200


def test_choose_step_without_admissible_step_weighs_fidelity_against_the_breach_and_says_so() -> None:
    rows = [BASE, StepScores(100, 0.6, 0.25, 0.15), StepScores(200, 0.65, 0.24, 0.26)]
    choice = choose_step(rows)  # breaches 0.035 and 0.045 + 0.06: 0.6 - 0.035 = 0.565, 0.65 - 0.105 = 0.545
    assert choice.step == 100
    assert choice.reason == (
        "no step is within the limits (prompt alignment at least 0.285 and drift at most 0.200); "
        "step 100 has the highest identity fidelity less its breach, 0.565: prompt alignment 0.250 is 0.035 too low"
    )


def test_choose_step_without_admissible_step_does_not_prefer_one_that_has_hardly_learned() -> None:
    """The least breach is that of the step nearest to the base."""
    assert choose_step([BASE, StepScores(100, 0.3, 0.28, 0.15), StepScores(200, 0.8, 0.27, 0.22)]).step == 200


@pytest.mark.parametrize("alignment", [0.30, 0.20])
def test_choose_step_gives_ties_to_the_earlier_step(alignment: float) -> None:
    rows = [StepScores(200, 0.6, alignment, 0.1), BASE, StepScores(100, 0.6, alignment, 0.1)]
    assert choose_step(rows).step == 100


def test_choose_step_never_takes_the_base_beside_a_tuned_step() -> None:
    assert choose_step([StepScores(0, 0.9, 0.9, 0.0), StepScores(10, 0.1, 0.1, 0.9)]).step == 10


def test_choose_step_takes_the_base_if_it_is_alone() -> None:
    assert choose_step([BASE]).step == 0


def test_choose_step_never_takes_nan_beside_a_number() -> None:
    broken = [StepScores(200, NAN, 0.3, 0.1), StepScores(300, 0.9, NAN, 0.1), StepScores(400, 0.9, 0.3, NAN)]
    assert choose_step([BASE, StepScores(100, 0.1, 0.1, 0.9), *broken]).step == 100


def test_choose_step_of_nan_alone_takes_the_last_and_says_so() -> None:
    choice = choose_step([BASE, StepScores(100, NAN, 0.3, 0.1), StepScores(200, NAN, 0.3, 0.1)])
    assert choice.step == 200 and choice.reason == "step 200 is the last one, as no step has all the scores that the rule needs"


def test_choose_step_ignores_diversity() -> None:
    assert choose_step([BASE, StepScores(100, 0.6, 0.3, 0.1, 0.9), StepScores(200, 0.7, 0.3, 0.1, NAN)]).step == 200


def test_choose_step_with_a_base_without_drift_leaves_drift_out() -> None:
    choice = choose_step([StepScores(0, 0.2, 0.3), StepScores(100, 0.6, 0.3), StepScores(200, 0.7, 0.3)])
    assert choice.step == 200 and choice.reason.endswith("within the limits (prompt alignment at least 0.285)")


def test_choose_step_without_a_base_takes_the_most_faithful_and_says_so() -> None:
    choice = choose_step([StepScores(100, 0.8, 0.1, 0.9), StepScores(200, 0.7, 0.3, 0.1)])
    assert choice.step == 100 and choice.reason.endswith("(none, as the base was not scored)")


def test_choose_step_with_negative_base_alignment_does_not_ask_for_more_than_the_base() -> None:
    assert choose_step([StepScores(0, 0, -0.1, 0), StepScores(1, 0.1, -0.1, 0), StepScores(2, 0.9, -0.104, 0)]).step == 2


def test_choose_step_of_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        choose_step([])


def _random_run(draw: random.Random) -> list[StepScores]:
    def score(nan_share: float) -> float:  # coarse, so that ties happen
        return NAN if draw.random() < nan_share else draw.randint(-2, 10) / 10

    nan_share = draw.choice([0.0, 0.0, 0.3, 0.9])
    return [StepScores(10 * k, score(nan_share), score(nan_share), score(nan_share)) for k in range(draw.randint(2, 9))]


def test_choose_step_online_agrees_with_choosing_at_the_end() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        rows = _random_run(draw)
        best = choose_step(rows).step
        assert choose_step([row for row in rows if row.step <= best]).step == best


def test_choose_step_lets_a_run_keep_one_set_of_weights_as_it_goes() -> None:
    draw = random.Random(2)
    for _ in range(1000):
        rows = _random_run(draw)
        kept = -1
        for end in range(1, len(rows) + 1):
            if choose_step(rows[:end]).step == rows[end - 1].step:
                kept = rows[end - 1].step  # overwrites the weights kept before
        assert choose_step(rows).step == kept


def test_choose_step_does_not_depend_on_the_order_of_rows() -> None:
    draw = random.Random(1)
    for _ in range(300):
        rows = _random_run(draw)
        assert choose_step(draw.sample(rows, len(rows))) == choose_step(rows)


def _rows(*fidelities: float) -> list[StepScores]:
    """A run whose every step is admissible."""
    return [BASE] + [StepScores(100 * k, fidelity, 0.30, 0.12) for k, fidelity in enumerate(fidelities, 1)]


def test_stop_early_goes_on_while_steps_get_better() -> None:
    assert not stop_early(_rows(0.4, 0.5, 0.6), patience=1).stop


def test_stop_early_ends_after_as_many_worse_evaluations_as_it_has_patience() -> None:
    assert [stop_early(_rows(0.4, 0.6, 0.5, 0.6)[:end], patience=2).stop for end in range(1, 6)] == [False, False, False, False, True]


def test_stop_early_says_which_step_was_not_bettered() -> None:
    reason = stop_early(_rows(0.4, 0.6, 0.5, 0.6), patience=2).reason
    assert reason.startswith("stopped early at step 400: 2 evaluations without a better step than 200 (step 200 has the highest identity fidelity")


def test_stop_early_says_how_much_patience_is_left() -> None:
    assert stop_early(_rows(0.4, 0.6, 0.5), patience=2).reason == "1 evaluation without a better step than 200; the run ends at 2"


def test_stop_early_does_not_count_a_faithful_step_that_breaks_the_limits_as_better() -> None:
    rows = [*_rows(0.6), StepScores(200, 0.9, 0.2, 0.1), StepScores(300, 0.9, 0.3, 0.5)]
    assert stop_early(rows, patience=2).stop


def test_stop_early_counts_anew_when_an_admissible_step_is_better() -> None:
    assert not stop_early(_rows(0.6, 0.5, 0.7), patience=1).stop


def test_stop_early_waits_while_no_step_is_admissible_and_the_breach_gets_smaller() -> None:
    rows = [BASE, *(StepScores(100 * k, 0.6, 0.3, drift) for k, drift in enumerate((0.6, 0.5, 0.4), 1))]
    assert not stop_early(rows, patience=1).stop and stop_early([*rows, StepScores(400, 0.6, 0.3, 0.4)], patience=1).stop


def test_stop_early_does_not_hold_an_evaluation_without_scores_against_the_run() -> None:
    rows = [*_rows(0.6, 0.5), StepScores(300, NAN, 0.3, 0.1), StepScores(400, 0.7, 0.3, NAN)]
    assert not stop_early(rows, patience=2).stop and stop_early(rows, patience=1).stop


def test_stop_early_never_ends_a_run_without_scores() -> None:
    assert not stop_early([StepScores(k, NAN, NAN) for k in range(50)], patience=1).stop


def test_stop_early_of_the_base_alone_goes_on() -> None:
    assert not stop_early([BASE], patience=1).stop


def test_stop_early_follows_the_limits_that_it_is_given() -> None:
    rows = [*_rows(0.6), StepScores(200, 0.9, 0.30, 0.25)]
    assert stop_early(rows, patience=1).stop and not stop_early(rows, patience=1, max_drift_gain=0.2).stop
    rows = [*_rows(0.6), StepScores(200, 0.9, 0.28, 0.1)]
    assert stop_early(rows, patience=1).stop and not stop_early(rows, patience=1, min_alignment_ratio=0.9).stop


def test_stop_early_does_not_depend_on_the_order_of_rows() -> None:
    draw = random.Random(3)
    for _ in range(300):
        rows = _random_run(draw)
        assert stop_early(draw.sample(rows, len(rows)), patience=2) == stop_early(rows, patience=2)


def test_stop_early_loses_nothing_but_steps_that_came_after_its_patience() -> None:
    draw = random.Random(4)
    for _ in range(1000):
        rows = [row for row in _random_run(draw) if not math.isnan(row.identity_fidelity + row.prompt_alignment + row.drift)]
        ends = [end for end in range(1, len(rows) + 1) if stop_early(rows[:end], patience=2).stop]
        if not ends:
            continue
        kept = [row.step for row in rows[: ends[0]]].index(choose_step(rows[: ends[0]]).step)
        assert ends[0] - 1 - kept == 2  # exactly the patience lies between the step that is kept and the end


def test_stop_early_without_patience_is_refused() -> None:
    with pytest.raises(ValueError, match="patience"):
        stop_early([BASE], patience=0)


def test_dvar_ratio_is_the_variance_of_the_last_losses_over_that_of_all() -> None:
    assert dvar_ratio([4.0, 0.0, 1.0, 3.0], window=2) == pytest.approx(1.0 / 2.5)  # variances 1 of (1, 3), 2.5 of all


def test_dvar_ratio_agrees_with_the_standard_library() -> None:
    losses = [random.Random(5).gauss(0, 1) / (1 + k) for k in range(40)]
    assert dvar_ratio(losses, 10) == pytest.approx(statistics.pvariance(losses[-10:]) / statistics.pvariance(losses))


def test_dvar_ratio_is_nan_while_it_is_too_short_and_one_at_first() -> None:
    assert math.isnan(dvar_ratio([1.0, 2.0], 3)) and dvar_ratio([1.0, 2.0, 4.0], 3) == pytest.approx(1.0)


def test_dvar_ratio_falls_when_the_loss_settles() -> None:
    falling = np.arange(40, 0, -1.0)  # the variance of n whole numbers in a row is (n^2 - 1) / 12
    assert dvar_ratio(falling, 20) == pytest.approx(399 / 1599)
    assert dvar_ratio([*falling, *np.ones(20)], 20) == 0.0


@pytest.mark.parametrize("losses", [[1.0, 1.0, 1.0], [1.0, NAN, 2.0], [1.0, math.inf, 2.0], []])
def test_dvar_ratio_of_what_has_no_variance_is_nan(losses: list[float]) -> None:
    assert math.isnan(dvar_ratio(losses, 2))


def test_dvar_ratio_with_a_window_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="window"):
        dvar_ratio([1.0, 2.0], 1)
