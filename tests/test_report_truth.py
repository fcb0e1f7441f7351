"""The part of a report that rests on the lab's ground truth, against numbers worked out by hand."""

from pathlib import Path

import numpy as np
import pytest

from dreambooth.report.data import Study, read_study
from dreambooth.report.page import make_report
from dreambooth.report.truth import agreement, chosen_minus_last, truth_tables, way_closed

BASE = {"cat": 0.0, "dog": 0.2, "vase": 0.4}  # identity fidelity of the un-tuned base, of true renders 0.8 for all
BEST = {"cat": 0.4, "dog": 0.5, "vase": 0.8}  # 1/2, 1/2 and all of the way


@pytest.fixture
def study(prior_group: Path) -> Study:
    """Three subjects, two seeds, two arms, with truths as they would be: the chosen step is 0.1 better in truth than the last one."""
    found = read_study([prior_group])
    for run in found.runs:
        run.scores["rows"] = [
            {"arm": "base", "step": 0, "identity_fidelity": BASE[run.subject]},
            {"arm": "best", "step": 10, "identity_fidelity": BEST[run.subject]},
            {"arm": "final", "step": 20, "identity_fidelity": BEST[run.subject] + 0.1},
        ]
        run.scores["references"]["ground_truth"] = {"identity_fidelity": 0.8}
    own = found.images.kind == "subject"
    gain = found.images.arm.map({"base": 0.0, "best": 0.4, "final": 0.3})
    truth = found.images.assign(true_identity=np.where(own, 0.5 + gain, np.nan), true_context=np.where(own, 1.0, np.nan))
    noise = np.random.default_rng(0).normal(size=len(truth)) * 1e-3
    return found._replace(images=truth.assign(true_identity_margin=np.where(own, gain + noise, np.nan)))


def test_way_closed_is_the_share_from_the_base_to_true_renders(study: Study) -> None:
    assert way_closed(study, study.baseline).mean == pytest.approx((0.5 + 0.5 + 1.0) / 3)
    assert way_closed(study, study.baseline, "final").mean == pytest.approx((0.5 / 0.8 + 0.4 / 0.6 + 0.5 / 0.4) / 3)


def test_way_closed_is_over_subjects_whatever_the_seeds(study: Study) -> None:
    found = way_closed(study, study.baseline)
    assert (found.n, found.unit) == (3, "subject") and found.low < found.mean < found.high


def test_chosen_step_is_held_against_the_last_one_picture_by_picture(study: Study) -> None:
    assert chosen_minus_last(study, study.baseline, "true_identity").mean == pytest.approx(0.1)


def test_what_the_choice_gives_identity_for_stands_beside_it(study: Study) -> None:
    """The class pictures of the last step are made to look 0.25 more like the subject than those of the chosen one."""
    of_class = study.images.kind == "class"
    worse = study.images.identity + np.where(of_class & (study.images.arm == "final"), 0.25, 0)
    table = next(table for table in truth_tables(study._replace(images=study.images.assign(identity=worse))) if "chosen" in table.title)
    assert table.header[4:6] == ["Drift of the class", "Diversity of the class"]
    assert all(row[4].startswith("-0.250 ") for row in table.rows)


def test_score_that_follows_the_truth_agrees_with_it_and_one_that_runs_against_it_does_not(study: Study) -> None:
    images = study.images[study.images.kind == "subject"]
    assert agreement(images.assign(same=images.true_identity_margin * 2 + 1), "same", "true_identity_margin").mean == pytest.approx(1)
    assert agreement(images.assign(against=-images.true_identity_margin), "against", "true_identity_margin").mean == pytest.approx(-1)


def test_report_of_the_lab_has_the_three_tables_and_any_other_none(study: Study, prior_group: Path) -> None:
    section = next(part for part in make_report(study).sections if part.title == "Against the ground truth")
    assert [table.title for table in section.tables] == ["How much was learned", "Was the step chosen well?", "Which scores tell the truth?"]
    assert all(len(row) == len(table.header) for table in section.tables for row in table.rows)
    assert "10 (6x) of" in section.tables[1].rows[0][-1]
    assert truth_tables(read_study([prior_group])) == []


def test_agreement_with_a_truth_that_hardly_varies_is_not_printed(study: Study) -> None:
    own = study.images.kind == "subject"
    place = np.where(own, (np.arange(len(own)) != int(np.flatnonzero(own & (study.images.arm == "best"))[0])).astype(float), np.nan)
    for truth, words in ((place, "truth hardly varies (9"), (np.where(own, np.arange(len(own)) % 2, np.nan), "0.")):
        images = study.images.assign(true_context=truth)
        table = truth_tables(study._replace(images=images))[2]
        row = next(row for row in table.rows if row[0] == "Identity fidelity")
        assert row[2].lstrip("-").startswith(words) and "hardly" not in row[1]
