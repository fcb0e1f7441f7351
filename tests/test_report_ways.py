"""A report of what `evaluate.py` drew again: ways of drawing are arms, compared picture by picture, of models that are counted once."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from written_runs import SHOWN, SUBJECTS, write_final_pictures

from dreambooth.__main__ import main
from dreambooth.report.answer import cautions
from dreambooth.report.course import course
from dreambooth.report.data import Study, read_study
from dreambooth.report.figures import TITLES, bars, base_marks, paired_dots, trajectories
from dreambooth.report.page import make_report, render
from dreambooth.report.pictures import panels
from dreambooth.report.record import cost_table, reproducibility, unmet_limits
from dreambooth.report.tables import compare, score_tables
from dreambooth.report.truth import each_once
from dreambooth.report.ways import trade_off, way_maps
from dreambooth.runs import read_run

OWN = "sampling.guidance_scale=7.5, sampling.sampler=ddim"  # as the runs were drawn in the end: the recipe of the tiny base
WAYS = {  # guidance scale, sampler: how much better tuned pictures are than the runs' own 0.5, and how much all are, the un-tuned base's too
    (3.0, "ddim"): (0.55, 0.0),
    (3.0, "euler_a"): (0.45, 0.0),
    (7.5, "euler_a"): (0.5, 0.2),
}
ARMS = [OWN, *(f"sampling.guidance_scale={scale}, sampling.sampler={sampler}" for scale, sampler in WAYS)]


def draw_again(run: Path, scale: float, sampler: str, gain: float, base: float, suffix: str = "", **evaluation: object) -> Path:
    """Writes what evaluate.py writes of a run that it draws in another way; returns the file of the scores."""
    config = copy.deepcopy(read_run(run).config)
    config.sampling.guidance_scale, config.sampling.sampler = scale, sampler
    for key, value in evaluation.items():
        setattr(config.evaluation, key, value)
    suffix = suffix or f"-{scale:g}{sampler}"
    write_final_pictures(run, config, gain, suffix=suffix, base=base)
    return run / f"scores{suffix}.json"


@pytest.fixture
def group(write_group: Callable[..., Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One setting, three subjects, two seeds, each drawn in four ways."""
    kept = tmp_path_factory.getbasetemp() / "drawn_again"
    if not kept.is_dir():
        shutil.copytree(write_group([({}, 0.5, 0.1)], group="guidance"), kept)
        for run in sorted(kept.iterdir()):
            for (scale, sampler), (gain, base) in WAYS.items():
                draw_again(run, scale, sampler, gain, base)
    shutil.copytree(kept, tmp_path / "guidance", dirs_exist_ok=True)
    return tmp_path / "guidance"


@pytest.fixture
def study(group: Path) -> Study:
    return read_study([group])


def test_ways_of_drawing_are_arms_named_by_their_settings_and_the_recipe_is_the_baseline(study: Study) -> None:
    assert (study.arms, study.baseline_reason) == (ARMS, "its settings are the recipe's")


def test_difference_of_a_way_is_paired_over_subjects_and_seeds(study: Study) -> None:
    row = compare(study)["identity_fidelity"].rows[1]
    assert (row.arm, row.unpaired, row.seeds, row.difference.n) == (ARMS[1], 0, (2, 2), 3)
    assert (row.difference.low, row.difference.high) == (pytest.approx(0.05), pytest.approx(0.05))


def test_untuned_base_that_was_drawn_in_a_way_has_a_row_for_it(study: Study) -> None:
    rows = dict((row[0], row[1]) for row in score_tables(study, compare(study), compare(study, "final"))[0].rows)
    assert rows[f"un-tuned base of {', '.join(ARMS[:3])}"].startswith("0.115 ")
    assert rows[f"un-tuned base of {ARMS[3]}"].startswith("0.315 ")


def test_bars_hold_each_way_against_the_base_that_was_drawn_the_same_way(study: Study) -> None:
    marks = base_marks(study, TITLES["drift"])
    assert [round(marks[arm] - marks[OWN], 6) for arm in ARMS] == [0, 0, 0, 0.2]
    assert f"{ARMS[3]} 0.33" in bars(study, compare(study), "drift", "pres").alt.split("drawn the same way")[1]


@pytest.mark.parametrize(
    "change",
    [
        {"evaluation": {"seed": 7}},
        {"evaluation": {"final_prompts": ["a {subject} on the moon"]}},
        {"evaluator": "other"},
        {"rows": [{"arm": "base"}]},
    ],
    ids=["noise", "prompts", "evaluator", "arms"],
)
def test_pictures_that_cannot_be_held_against_the_runs_own_are_no_arm(group: Path, change: dict) -> None:
    for path in group.glob("*/scores-3ddim.json"):
        scores = json.loads(path.read_text())
        scores |= change | {"evaluation": scores["evaluation"] | change.get("evaluation", {})}
        path.write_text(json.dumps(scores))
    found = read_study([group])
    assert found.arms == [ARMS[0], *ARMS[2:]] and not found.left_out


def test_way_in_which_only_some_runs_were_drawn_is_left_out_and_named(group: Path) -> None:
    next(group.glob("*/scores-3ddim.json")).unlink()
    found = read_study([group])
    assert found.arms == [ARMS[0], *ARMS[2:]]
    ((name, arm, reason),) = [(one.name, one.arm, one.reason) for one in found.left_out]
    assert (name, arm) == ("5 of 6 runs", "sampling.guidance_scale=3.0") and "evaluate.py command again" in reason
    assert "5 of 6 runs" in render(make_report(found), "report.md.jinja")


def test_way_that_was_scored_twice_is_one_arm(group: Path) -> None:
    for run in group.iterdir():
        draw_again(run, 3.0, "ddim", 0.55, 0.0, suffix="-again")
    assert read_study([group]).arms == ARMS


def test_runs_that_were_trained_with_several_samplings_have_no_ways(group: Path) -> None:
    for path in group.glob("*-1/run.json"):
        record = json.loads(path.read_text())
        record["config"]["sampling"]["steps"] = 3
        path.write_text(json.dumps(record))
    assert read_study([group]).arms == ["sampling.steps=2", "sampling.steps=3"]


def test_own_drawing_is_the_report_of_the_training(group: Path) -> None:
    written = []
    for words in (["--own-drawing"], []):
        assert main(["report", str(group), *words]) == 0
        written.append((group / "report.md").read_text())
    assert [("guidance_scale=3.0" in text, "Scores by step of training" in text) for text in written] == [(False, True), (True, False)]


def test_report_of_drawing_alone_says_that_there_is_no_course_in_place_of_drawing_one(study: Study) -> None:
    report = make_report(study)
    (section,) = [one for one in report.sections if one.title == "Over the steps of training"]
    assert (section.plots, [table for table in section.tables if table.rows]) == ([], [])
    assert all("There is no course to show" in render(report, f"report.{kind}.jinja") for kind in ("html", "md"))
    assert not any(panel.name.startswith("steps_") for one in report.sections for panel in one.panels)


def test_pictures_of_ways_are_of_one_run_with_the_same_prompts_and_noise(study: Study) -> None:
    (panel,) = [panel for panel in panels(study, seed=1) if panel.name == "ways"]
    assert [row.label for row in panel.rows] == ["photos", *(arm.replace("sampling.", "") for arm in ARMS)]
    names = [[cell.path.name for cell in row.pictures] for row in panel.rows[1:]]
    assert all(own == names[0] for own in names) and len(names[0]) == len(SHOWN["evaluation.final_prompts"])
    assert len({cell.path.parents[3] for row in panel.rows[1:] for cell in row.pictures}) == 1
    assert [row.pictures[0].path.parents[1].name for row in panel.rows[1:]] == ["final", "final-3ddim", "final-3euler_a", "final-7.5euler_a"]


@pytest.mark.parametrize("name", ["class_drift", "nearest_photos"])
def test_pictures_of_a_way_come_from_its_own_folder(study: Study, name: str) -> None:
    (panel,) = [panel for panel in panels(study, seed=1) if panel.name == name]
    folders = {row.label: row.pictures[0].path.parents[1].name for row in panel.rows if row.label.startswith("sampling.")}
    assert list(folders.values()) == ["final", "final-3ddim", "final-3euler_a", "final-7.5euler_a"]


def test_trade_off_is_drawn_as_paired_differences_with_its_front(study: Study) -> None:
    images = study.images.assign(alignment=study.images.alignment + 0.1 * (study.images.label == ARMS[2]))
    alt = trade_off(study, compare(study._replace(images=images))).alt
    assert f"{ARMS[2]}: alignment +0.100 (+0.100 to +0.100), fidelity -0.050 (-0.050 to -0.050)" in alt
    assert alt.endswith(f"Pareto front: {ARMS[2]}, {ARMS[3]}.")  # 0.2 more fidelity; 0.1 more alignment


def test_maps_show_a_score_over_guidance_scale_and_sampler(study: Study) -> None:
    (plot,) = [plot for plot in way_maps(study, compare(study)) if plot.name == "way_map_identity_fidelity"]
    shown = re.findall(r"<text[^>]*>([^<]+)</text>", plot.svg)
    assert [text for text in shown if re.fullmatch(r"0\.\d{3}", text)] == ["0.565", "0.815", "0.665", "0.615"]  # euler_a below, 3.0 left
    assert {"3.0", "7.5", "ddim", "euler_a"} <= set(shown)


def test_maps_need_two_samplers_and_two_scales(study: Study) -> None:
    assert way_maps(study._replace(arms=ARMS[:2]), compare(study)) == []


def test_models_are_counted_once_however_often_they_were_drawn(study: Study) -> None:
    assert make_report(study).basis.startswith("4 arms, 3 subjects, 2 training seeds, 6 scored runs, each drawn in 4 ways.")
    assert cost_table(study).rows[0][:2] == ["these settings", "6"] and len(cost_table(study).rows) == 1
    rows = dict(reproducibility(study).rows)
    assert (rows["chosen steps"], rows["run folders"].count("run-")) == ("these settings: 10, 10, 10, 10, 10, 10", 6)
    assert "0.15 hours of work" in rows["run"]  # 6 x 90 s


def test_commands_of_the_header_that_drew_again_are_among_what_it_takes(study: Study) -> None:
    command = dict(reproducibility(study).rows)["command"]
    assert "python train.py experiment=guidance" in command and "python evaluate.py -m runs=runs/guidance" in command and "\\" not in command


def test_run_without_a_step_within_the_limits_is_counted_once(group: Path) -> None:
    for path in group.glob("*/run.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"best_step_reason": "no step is within the limits"}))
    assert unmet_limits(read_study([group])) == {"these settings": (6, 6)}


def test_caution_says_that_drawing_changes_the_base_too(study: Study) -> None:
    assert any("drawn the same way" in words for words in cautions(study, compare(study)))
    own = read_study([run.folder.path for run in study.of_arm(OWN)], is_own_drawing=True)
    assert not any("drawn the same way" in words for words in cautions(own, compare(own)))


def test_pictures_of_every_way_count_where_scores_are_held_against_the_truth(study: Study) -> None:
    own = study.images[study.images.kind == "subject"]
    tuned = each_once(own)[lambda rows: rows.step > 0]
    assert len(tuned) == len(own[own.step > 0]) == 4 * 6 * 2 * 4  # ways, runs, steps, pictures


def test_trained_arms_that_were_drawn_again_keep_their_course_and_the_ways_have_none(write_group: Callable[..., Path]) -> None:
    folder = write_group([({"prior.name": "none"}, 0.6, 0.4), ({}, 0.5, 0.1)], seeds=(0,), group="mixed")
    for run in sorted(folder.iterdir()):
        draw_again(run, 3.0, "ddim", 0.5, 0.0)
    found = read_study([folder])
    trained = [arm for arm in found.arms if "guidance_scale=7.5" in arm]
    assert (len(found.arms), list(found.models)) == (4, ["prior=class_images", "prior=none"])
    assert {point.arm for point in course(found)} == set(trained)
    assert not any("guidance_scale=3.0" in text for text in re.findall(r"<text[^>]*>([^<]+)</text>", trajectories(found, course(found))[0].svg))
    titles = [panel.title for panel in panels(found, 0) if panel.name.startswith("steps_")]
    assert titles == [f"Steps x prompts: {arm}" for arm in trained]


def test_dots_have_a_row_for_every_subject_and_way(study: Study) -> None:
    rows = re.findall(r"sampling\.guidance_scale=\S+ sampling\.sampler=\S+ [+-]0\.\d\d", paired_dots(study, "identity_fidelity").alt)
    assert len(rows) == len(SUBJECTS) * len(WAYS)
