"""A paper's figures beside ours: read from an experiment's header, held against the same arms, by their signs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dreambooth.errors import UserError
from dreambooth.report.data import CONF, read_header, read_study
from dreambooth.report.page import make_report
from dreambooth.report.published import Published, beside_the_paper, compared_signs, read_figures
from dreambooth.report.tables import Table, compare
from dreambooth.statistics.intervals import Interval

WITH_FIGURES = [path.stem for path in sorted((CONF / "experiment").glob("*.yaml")) if "Figures" in read_header(path.stem)]


def table(folder: Path, figures: str) -> Table | None:
    study = read_study([folder])
    return beside_the_paper(study._replace(header={"Figures": figures}), compare(study, "best"), compare(study, "final"))


def test_read_figures_takes_arms_as_they_are_typed() -> None:
    assert read_figures("drift: class_images 0.493, none 0.664; diversity: '' -0.5,null 1") == [
        Published("drift", "class_images", 0.493),
        Published("drift", "none", 0.664),
        Published("diversity", "''", -0.5),
        Published("diversity", "null", 1.0),
    ]
    assert read_figures("") == []


@pytest.mark.parametrize("text", ["DINO: none 0.6", "drift: none", "drift: none high", "drift none 0.6", "drift: none nan"])
def test_read_figures_refuses_another_form(text: str) -> None:
    with pytest.raises(UserError, match=r'Figures must be written like "drift: class_images 0.493, none 0.664", got .*; mend the experiment'):
        read_figures(text)


def test_beside_the_paper_holds_differences_to_the_baseline_side_by_side(prior_group: Path) -> None:
    """The written runs: without the prior fidelity is 0.1 higher and drift 0.3, at every picture."""
    found = table(prior_group, "identity_fidelity: class_images 0.68, none 0.72; drift: class_images 0.7, none 0.5")
    assert found.header[2:8] == [f"{d}{w}" for d in ("", "difference ") for w in ("published", "ours, chosen step", "ours, last step")]
    assert [row[:2] + row[5:] for row in found.rows] == [
        ["Identity fidelity", "prior=class_images", "", "", "", "baseline"],
        ["Identity fidelity", "prior=none", "+0.040", "+0.100 (+0.100 to +0.100)", "+0.100 (+0.100 to +0.100)", "the same way"],
        ["Drift of the class", "prior=class_images", "", "", "", "baseline"],
        ["Drift of the class", "prior=none", "-0.200", "+0.300 (+0.300 to +0.300)", "+0.300 (+0.300 to +0.300)", "the other way"],
    ]
    assert [row[2:5] for row in found.rows[:2]] == [
        ["0.680", "0.615 (0.515 to 0.715)", "0.815 (0.715 to 0.915)"],
        ["0.720", "0.715 (0.615 to 0.815)", "0.915 (0.815 to 1.000)"],  # a cosine ends at 1
    ]
    assert found.note.startswith("1 of 2 differences go the published way, 1 the other way, 0 cannot be told.")


def test_beside_the_paper_says_nothing_of_arms_and_scores_that_one_side_lacks(prior_group: Path) -> None:
    assert table(prior_group, "drift: class_images 0.7, self_distilled 0.5") is None
    assert table(prior_group, "drift: none 0.7") is None  # nothing to subtract
    assert table(prior_group, "sharpness: class_images 0.7, none 0.5") is None  # was not measured
    assert table(prior_group, "") is None


def test_beside_the_paper_stands_in_the_report(prior_group: Path) -> None:
    titles = [table.title for section in make_report(read_study([prior_group])).sections for table in section.tables]
    assert "Beside the paper" in titles


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (0.1, Interval(0.5, 0.1, 0.9, 5, "subject"), "the same way"),
        (-0.1, Interval(-0.5, -0.9, -0.1, 5, "subject"), "the same way"),
        (-0.1, Interval(0.5, 0.1, 0.9, 5, "subject"), "the other way"),
        (0.1, Interval(0.5, -0.1, 0.9, 5, "subject"), "cannot be told here"),
        (0.1, Interval(0.5, None, None, 2, "subject"), "cannot be told here"),
        (0.0, Interval(0.5, 0.1, 0.9, 5, "subject"), "cannot be told here"),
        (0.1, None, "cannot be told here"),
    ],
)
def test_compared_signs_needs_an_interval_without_0(theirs: float, ours: Interval | None, words: str) -> None:
    assert compared_signs(theirs, ours) == words


@pytest.mark.parametrize("name", WITH_FIGURES)
def test_figures_of_every_experiment_can_be_read_and_name_its_arms(name: str, sweep_values: Callable[[str], list[str]]) -> None:
    arms = {one.arm for one in read_figures(read_header(name)["Figures"])}
    assert len(arms) >= 2 and arms <= set(sweep_values(name))


@pytest.fixture
def sweep_values() -> Callable[[str], list[str]]:
    """Gives the values that an experiment sweeps over, as they are typed."""
    from omegaconf import OmegaConf

    def read(name: str) -> list[str]:
        params = OmegaConf.load(CONF / "experiment" / f"{name}.yaml").hydra.sweeper.params
        return [value for values in params.values() for value in str(values).split(",")]

    return read


def test_figures_stand_in_the_experiments_whose_papers_have_them() -> None:
    assert {"prior", "class_noun", "photos", "methods"} <= set(WITH_FIGURES)
