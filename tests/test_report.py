"""The report: what tells arms apart, what the answer rests on, what is shown of failures, and that every picture can be read aloud."""

import html
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from written_runs import SHOWN, STEPS, SUBJECTS, write_run

from dreambooth.__main__ import main
from dreambooth.arms import axes
from dreambooth.config import Config
from dreambooth.errors import UserError
from dreambooth.report.answer import answer, caution, cautions, how_many_steps, is_led
from dreambooth.report.course import Point, StepsAfter, course, steps_after, steps_after_table
from dreambooth.report.data import read_header, read_study
from dreambooth.report.figures import TITLES, Plot, bars, draw_dots, heat_maps, look, paired_dots, subject_differences, trajectories
from dreambooth.report.page import Report, Section, breakable, make_report, render, write_report
from dreambooth.report.pictures import panels
from dreambooth.report.record import cost_table, unmet_limits
from dreambooth.report.tables import Table, clipped, compare, own_yardsticks, score_tables, verdict
from dreambooth.statistics.intervals import Interval
from dreambooth.step_choice import StepScores, choose_step


class Written(NamedTuple):
    """A report that was written once, to be looked at."""

    runs: Path
    folder: Path
    html: str
    markdown: str


@pytest.fixture
def written(prior_group: Path, make_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The report of the prior group with one failed run."""
    runs = tmp_path_factory.getbasetemp() / "written"
    if not runs.is_dir():
        shutil.copytree(prior_group, runs)
        config = make_config(SHOWN | {"prior.name": "none", "subject.name": "dog", "seed": 2, "group": "prior"})
        write_run(runs / "run-failed", config, status="failed", error="ValueError: loss is <nan>")
        write_report([runs])
    return Written(runs, runs, (runs / "report.html").read_text(), (runs / "report.md").read_text())


def at(mean: float) -> Interval:
    """An interval around a mean."""
    return Interval(mean, mean - 0.1, mean + 0.1, 5, "subject")


class Images(HTMLParser):
    """Collects what a page shows as pictures, with their text alternatives."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str | None] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        has = dict(attributes)
        if tag == "img":
            self.found.append(has.get("alt"))
        if has.get("role") == "img":
            self.found.append(has.get("aria-label"))
        self.fetched += [value for key, value in attributes if key in ("src", "srcset") or (tag == "link" and key == "href")]


def test_axes_are_the_settings_that_differ_but_subject_and_seed(prior_group: Path) -> None:
    study = read_study([prior_group])
    assert sorted(study.arms) == ["prior=class_images", "prior=none"]
    assert (study.subjects, len(study.runs)) == (list(SUBJECTS), 12)


def test_axes_of_a_name_keep_commas_in_a_list() -> None:
    assert axes("optim.learning_rate=0.1, prior.prompts=['a', 'b']") == {"optim.learning_rate": "0.1", "prior.prompts": "['a', 'b']"}


def test_baseline_is_the_arm_with_the_recipe_whatever_ran_first(prior_group: Path) -> None:
    study = read_study([prior_group])
    assert (study.baseline, study.baseline_reason) == ("prior=class_images", "its settings are the recipe's")


def test_baseline_is_the_first_arm_where_none_has_the_recipe(write_group: Callable[..., Path]) -> None:
    study = read_study([write_group([({"optim.learning_rate": rate}, 0.5, 0.1) for rate in (3e-4, 7e-5)], seeds=(0,))])
    assert study.baseline == "optim.learning_rate=0.0003"


def test_baseline_that_is_asked_for_turns_the_differences_round(prior_group: Path) -> None:
    ours, asked = (compare(read_study([prior_group], baseline)) for baseline in (None, "none"))
    assert ours["drift"].rows[1].difference.mean == pytest.approx(0.3)
    assert asked["drift"].rows[1].difference.mean == pytest.approx(-0.3)


def test_baseline_that_is_no_arm_is_refused(prior_group: Path) -> None:
    with pytest.raises(UserError, match="must name one of the arms"):
        read_study([prior_group], "lora")


def test_difference_is_paired_so_what_subjects_share_does_not_widen_it(prior_group: Path) -> None:
    row = compare(read_study([prior_group]))["identity_fidelity"].rows[1]
    assert row.mean.high - row.mean.low == pytest.approx(0.2, abs=1e-6)  # subjects lie at 0, 0.1 and 0.2
    assert (row.difference.low, row.difference.high) == (pytest.approx(0.1), pytest.approx(0.1))  # each subject gains the same


def test_answer_names_the_difference_with_its_interval_and_what_cannot_be_told(prior_group: Path) -> None:
    study = read_study([prior_group])
    (sentence,) = answer(study, compare(study))
    assert "prior=none against prior=class_images at the chosen step" in sentence
    assert "drift of the class +0.300 (+0.300 to +0.300), the class moved more towards the subject;" in sentence
    assert re.search(r"cannot be told whether anything changed in prompt alignment \+0\.000 .*95% intervals over 3 subjects", sentence)


def test_scores_are_those_of_the_step_that_the_selection_prompts_chose(prior_group: Path) -> None:
    """On the final prompts the last step is more faithful by 0.2; it must not become the chosen one."""
    study = read_study([prior_group])
    subject_levels = 0.1 + 0.015  # mean level of the subjects and of the two noises
    assert compare(study, "best")["identity_fidelity"].rows[0].mean.mean == pytest.approx(subject_levels + 0.5)
    assert compare(study, "final")["identity_fidelity"].rows[0].mean.mean == pytest.approx(subject_levels + 0.7)


def test_course_has_every_step_of_a_run_and_its_front(prior_group: Path) -> None:
    points = course(read_study([prior_group]))
    assert [(point.arm, point.step) for point in points] == [(arm, step) for arm in ("prior=class_images", "prior=none") for step in STEPS]
    assert [(point.arm, point.step) for point in points if point.on_front] == [("prior=none", 10)]  # best in both: 0.7 and 0.29
    assert points[1].values["identity_fidelity"].mean == pytest.approx(0.6)


def test_steps_after_one_are_held_against_the_same_run_so_that_what_runs_differ_in_falls_out(prior_group: Path) -> None:
    found = steps_after(read_study([prior_group]))
    assert [(one.arm, one.step, one.last) for one in found] == [("prior=class_images", 10, 20), ("prior=none", 10, 20)]
    gain = found[0].values["identity_fidelity"]
    assert (gain.mean, gain.low, gain.high) == (pytest.approx(-0.05), pytest.approx(-0.05), pytest.approx(-0.05))  # subjects lie at 0, 0.1 and 0.2
    assert steps_after_table(found).rows[0] == [
        "prior=class_images, step 10 to 20",
        "-0.050 (-0.050 to -0.050)",
        "-0.010 (-0.010 to -0.010)",
        "+0.000 (+0.000 to +0.000)",
    ]


def test_steps_after_are_those_that_all_runs_of_an_arm_have(prior_group: Path) -> None:
    study = read_study([prior_group])
    more = [{"step": 30.0, "identity_fidelity": 0.9, "prompt_alignment": 0.1, "drift": 0.1}]
    part = study._replace(runs=[run._replace(course=run.course + more) if run.config.seed == 0 else run for run in study.runs])
    assert {(one.step, one.last) for one in steps_after(part)} == {(10, 20)}
    every = study._replace(runs=[run._replace(course=run.course + more) for run in study.runs])
    assert [(one.step, one.last) for one in steps_after(every)] == [(10, 30), (20, 30)] * 2


def test_nothing_is_said_of_steps_with_too_few_subjects_or_a_single_step(prior_group: Path) -> None:
    study = read_study([prior_group])
    two = study._replace(runs=[run for run in study.runs if run.subject != "vase"])
    one_step = study._replace(runs=[run._replace(course=run.course[:2]) for run in study.runs])
    for few in (two, one_step):
        assert steps_after(few) == [] and how_many_steps(few, []) is None
    assert not steps_after_table([]).rows


def test_answer_says_from_which_step_on_nothing_more_can_be_told(prior_group: Path, written: Written) -> None:
    study = read_study([prior_group])
    said = (
        "Steps: with prior=class_images, on the selection prompts, identity fidelity still changes after step 10: -0.050 (-0.050 to -0.050); "
        "prompt alignment still changes after step 10: -0.010 (-0.010 to -0.010); no change up to step 20 can be told in "
        "drift of the class from step 10 on: +0.000 (+0.000 to +0.000)."
    )
    assert how_many_steps(study, steps_after(study)) == said
    assert said in html.unescape(written.html) and f"> {said}" in written.markdown
    told, untold = Interval(0.2, 0.1, 0.3, 5, "subject"), Interval(0.1, -0.1, 0.3, 5, "subject")
    by_step = [StepsAfter(study.baseline, 50 * (k + 1), 250, {"drift": gain}) for k, gain in enumerate((untold, told, untold, untold))]
    assert "no change up to step 250 can be told in drift of the class from step 150 on: +0.100" in str(how_many_steps(study, by_step))


def test_crowded_course_numbers_the_first_the_last_and_the_front_alone(prior_group: Path) -> None:
    study = read_study([prior_group])
    points = [Point(study.baseline, k, {"identity_fidelity": at(0.1 * k), "prompt_alignment": at(0.9)}, on_front=k == 5) for k in range(1, 15)]
    few, many = (trajectories(study, some)[1].svg for some in (points[:12], points))
    assert set(range(1, 13)) <= {int(text) for text in re.findall(r"<text[^>]*>(\d+)</text>", few)}
    assert {int(text) for text in re.findall(r"<text[^>]*>(\d+)</text>", many)} == {1, 5, 14}


def test_subject_difference_is_of_the_same_prompt_and_noise(prior_group: Path) -> None:
    study = read_study([prior_group])
    images = study.compared()[0]
    images = images[(images.label == "prior=class_images") | (images.k == 1)]  # unpaired, the noise's 0.03 would come on top
    found = subject_differences(images, TITLES["identity_fidelity"], study.baseline)
    assert found.difference.tolist() == pytest.approx([0.1, 0.1, 0.1])


def test_arm_whose_runs_all_failed_is_still_named(write_group: Callable[..., Path], make_config: Callable[..., Config]) -> None:
    folder = write_group([({}, 0.5, 0.1)])
    config = make_config(SHOWN | {"prior.name": "none", "subject.name": "dog", "seed": 0, "group": "prior"})
    write_run(folder / "run-failed", config, status="failed", error="out of memory")
    (left,) = read_study([folder]).left_out
    assert "prior=none" in left.arm and left.reason == "out of memory"


def test_folder_without_a_scored_run_is_refused_with_the_reasons(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    write_run(tmp_path / "g" / "run-a", make_config({"subject.name": "dog"}), status="failed", error="out of memory")
    with pytest.raises(UserError, match="out of memory"):
        read_study([tmp_path / "g"])


def test_two_runs_that_nothing_tells_apart_are_refused(prior_group: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (prior_group / "run-0-cat-0").rename(tmp_path / "copy" / "a")
    shutil.copytree(tmp_path / "copy" / "a", prior_group / "run-0-cat-0")
    with pytest.raises(UserError, match="must differ in subject, seed or a setting"):
        read_study([prior_group, tmp_path / "copy"])


def test_run_that_two_groups_share_is_counted_once(prior_group: Path, tmp_path: Path) -> None:
    """What one experiment took over from another lies in both folders, under one name."""
    other = tmp_path / "prior_weight"
    for path in [*prior_group.glob("run-1-*-0")]:  # copies of the baseline
        taken = other / path.name
        shutil.copytree(path, taken)
        record = json.loads((taken / "run.json").read_text())
        record["config"]["group"] = "prior_weight"
        (taken / "run.json").write_text(json.dumps(record | {"taken_from": f"prior/{path.name}"}))
    study = read_study([other, prior_group])
    assert (len(study.runs), study.groups) == (12, ["prior_weight", "prior"])
    assert {run.folder.path.parent for run in study.runs} == {prior_group.resolve()}  # where they were trained
    assert len(read_study([other]).runs) == 3
    title = make_report(study).question
    assert "What does the prior-preservation loss keep" in title and "How strong must the prior-preservation loss be?" in title


def test_shared_run_with_other_inputs_is_no_copy(prior_group: Path, tmp_path: Path) -> None:
    taken = tmp_path / "other" / "run-1-cat-0"
    shutil.copytree(prior_group / "run-1-cat-0", taken)
    record = json.loads((taken / "run.json").read_text())
    record["digests"]["photos"] = "q" * 64
    (taken / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="must differ in subject, seed or a setting"):
        read_study([prior_group, tmp_path / "other"])


def test_pictures_of_all_arms_share_subject_prompts_and_noise(prior_group: Path) -> None:
    found = [panel for panel in panels(read_study([prior_group]), seed=4) if panel.name.startswith("steps_")]
    files = [[[cell and cell.path.name for cell in row.pictures] for row in panel.rows] for panel in found]
    assert len(found) == 2 and files[0] == files[1]
    assert len({tuple(row) for row in files[0][1:]}) == 1  # down a column, the same noise at every step
    assert {cell.path.parents[2].name.split("-", 2)[2] for panel in found for cell in panel.rows[1].pictures} in (
        {f"{subject}-{seed}"} for subject in SUBJECTS for seed in (0, 1)
    )


def test_pictures_are_drawn_by_the_seed_and_not_by_scores(prior_group: Path) -> None:
    def shown(seed: int) -> list[str]:
        return [str(cell.path) for panel in panels(read_study([prior_group]), seed) for row in panel.rows for cell in row.pictures if cell]

    before = shown(0)
    for path in prior_group.glob("*/scores.parquet"):
        frame = pd.read_parquet(path)
        frame.assign(identity=-frame.identity).to_parquet(path)
    assert shown(0) == before
    assert any(shown(seed) != before for seed in (1, 2, 3))


def test_single_setting_is_held_against_the_untuned_base(write_group: Callable[..., Path]) -> None:
    study = read_study([write_group([({}, 0.5, 0.1)], seeds=(0,))])
    found = compare(study)["identity_fidelity"]
    assert (found.baseline, [row.arm for row in found.rows]) == ("un-tuned base", ["un-tuned base", "best step", "last step"])
    assert found.rows[1].difference.mean == pytest.approx(0.5)


def test_failed_run_is_listed_with_its_error(written: Written) -> None:
    assert "loss is &lt;nan&gt;" in written.html and "run-failed" in written.markdown
    assert "1 failed or unfinished" in written.html


def test_every_picture_of_the_page_has_a_text_alternative(written: Written) -> None:
    page = Images()
    page.feed(written.html)
    assert len(page.found) > 30 and all(page.found)
    assert written.html.count("<svg") == len(re.findall(r'<div role="img" aria-label="[^"]+">', written.html)) >= 7
    assert all(alt.strip() for alt in re.findall(r"!\[(.*?)\]\(", written.markdown))


def test_page_fetches_nothing_and_markdown_shows_what_is_there(written: Written) -> None:
    page = Images()
    page.feed(written.html)
    assert page.fetched and all(source.startswith("data:image/") for source in page.fetched)
    assert "<script" not in written.html and "url(http" not in written.html
    pictures = re.findall(r"\]\((.*?\.png)\)", written.markdown)
    assert len(pictures) >= 9 and all((written.folder / name).is_file() for name in pictures)


def test_ids_of_the_page_are_unique(written: Written) -> None:
    ids = re.findall(r'\bid="([^"]+)"', written.html)
    assert len(ids) == len(set(ids)) > 20


def test_header_of_an_experiment_gives_the_question(written: Written) -> None:
    assert read_header("prior")["Question"].startswith("what does the prior-preservation loss keep")
    assert "What does the prior-preservation loss keep" in written.markdown.splitlines()[0]
    assert read_header("no such experiment") == {}
    published = "Published: 15 subjects, Imagen (Ruiz et al. 2023, table 3)"  # beside our own figures
    assert published in written.html and published in written.markdown


def test_answer_says_once_that_so_few_subjects_leave_the_test_nothing_to_decide(prior_group: Path) -> None:
    study = read_study([prior_group])
    found = compare(study)
    (words,) = cautions(study, found)
    assert words.startswith("The test cannot decide here (3 subjects: p cannot be below 0.25, and 0.05 is the limit)")
    assert "interval alone" not in answer(study, found)[0]
    info, row = TITLES["drift"], found["drift"].rows[1]
    able = row._replace(test=row.test._replace(smallest_p=0.01), holm_p=0.2)
    assert verdict(able, info, True, 2) == "the class moved more towards the subject, by the interval alone"
    assert verdict(able, info, True, 6) == "the class moved more towards the subject"  # 6 arms: nothing below 0.06


def test_class_that_moved_less_is_not_said_to_have_moved_away(prior_group: Path) -> None:
    found = compare(read_study([prior_group], "none"))
    assert verdict(found["drift"].rows[1], TITLES["drift"], True) == "the class moved less towards the subject"


def test_answer_about_several_arms_begins_with_a_sentence_about_all(write_group: Callable[..., Path]) -> None:
    arms = [({}, 0.5, 0.1), ({"prior.weight": 2.0}, 0.6, 0.1), ({"prior.weight": 3.0}, 0.6, 0.3), ({"prior.weight": 4.0}, 0.5, 0.1)]
    folder = write_group(arms)
    study = read_study([folder])
    found = compare(study)
    said = answer(study, found)
    assert is_led(study, found) and len(said) == 4
    one = "1 is better in some and worse in none that can be told: prior.weight=2.0 (identity fidelity)"
    rest = "Of the others 1 is better in some and worse in others, 1 is not to be told from it."
    over = "The differences to it, with 95% intervals over 3 subjects:"
    assert said[0] == f"Of 3 arms held against prior.weight=1.0 at the chosen step in 4 leading scores, {one}. {rest} {over}"
    assert [sentence.partition(":")[0] for sentence in said[1:]] == ["prior.weight=2.0", "prior.weight=3.0", "prior.weight=4.0"]
    assert not any("intervals over" in sentence for sentence in said[1:])
    markdown, page = (render(make_report(study), f"report.{kind}.jinja") for kind in ("md", "html"))
    assert markdown.count("> - prior.weight=") == page.count("<li>prior.weight=") == 3
    two = study._replace(arms=study.arms[:2], images=study.images[study.images.label.isin(study.arms[:2])])
    assert not is_led(two, compare(two)) and len(answer(two, compare(two))) == 1


def test_answer_about_several_arms_that_are_alike_says_that_none_can_be_told(write_group: Callable[..., Path]) -> None:
    study = read_study([write_group([({"prior.weight": weight}, 0.5, 0.1) for weight in (1.0, 2.0, 3.0)], seeds=(0,))])
    held = "Of 2 arms held against prior.weight=1.0 at the chosen step in 4 leading scores, none can be told from it."
    assert answer(study, compare(study))[0] == f"{held} The differences to it, with 95% intervals over 3 subjects:"


def test_report_says_in_how_many_runs_no_step_was_within_the_limits(prior_group: Path) -> None:
    steps = [StepScores(0, 0.1, 0.3, 0.0), StepScores(10, 0.6, 0.1, 0.5)]
    reasons = {True: choose_step(steps, 0.9, 0.2).reason, False: choose_step(steps, 0.1, 0.9).reason}
    for path in prior_group.glob("run-0-*/run.json"):  # without the prior
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"best_step_reason": reasons["cat" not in path.parent.name]}))
    study = read_study([prior_group])
    assert unmet_limits(study) == {"prior=none": (4, 6)}  # the other arm's runs do not say
    words = "In 4 of 6 runs no step was within the limits of the choice, and the one with the highest identity fidelity less its breach was taken."
    report = make_report(study)
    assert words in report.caution and "each run's own un-tuned base" in report.caution
    rows = dict(report.sections[-1].tables[0].rows)
    assert rows["runs with a step within the limits"] == "prior=none: 2 of 6"
    assert "those of the run's own un-tuned base; where no step has both" in rows["the step is chosen by"]


def test_reading_of_the_header_stands_under_the_answer(prior_group: Path) -> None:
    study = read_study([prior_group])
    assert "Reading" in study.header
    report = make_report(study._replace(header={"Reading": "less than <hoped> for"}))
    page, markdown = (render(report, f"report.{kind}.jinja") for kind in ("html", "md"))
    assert page.index(report.caution.split("'")[0]) < page.index("less than &lt;hoped&gt; for") < page.index("2 arms, 3 subjects")
    assert markdown.index("> ") < markdown.index("less than <hoped> for") < markdown.index("2 arms, 3 subjects")


def test_interval_of_a_bounded_score_ends_where_the_score_does(prior_group: Path) -> None:
    assert clipped(Interval(0.99, 0.95, 1.02, 5, "subject"), "true_identity") == Interval(0.99, 0.95, 1.0, 5, "subject")
    assert clipped(Interval(0.9, -0.2, 1.4, 5, "subject"), "true_context", is_difference=True)[1:3] == (-0.2, 1.0)
    assert clipped(Interval(0.9, None, None, 2, "subject"), "true_identity").low is None
    assert clipped(Interval(-3, -4, 5, 5, "subject"), "memorisation").high == 5
    study = read_study([prior_group])
    truth = np.where(study.images.kind == "subject", study.images.subject != "cat", np.nan)  # 0, 1, 1
    rows = compare(study._replace(images=study.images.assign(true_identity=truth * 0.5 + 0.5)))["true_identity"].rows
    assert all(row.mean.high <= 1 for row in rows)


def test_page_escapes_what_comes_from_outside() -> None:
    report = Report(
        "a <b>", "<script>", ["x < y"], "<em>", None, "", {"Expected": "<i>"}, [Section("<u>", [], [], [Table("<p>", "<q>", ["<s>"], [["<em>"]])])]
    )
    assert not re.findall(r"<(?:b|script|i|u|q|s|em)>", render(report, "report.html.jinja"))


def test_command_writes_the_same_files_again(written: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(written.runs), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / "report.html"), str(tmp_path / "out" / "report.md")]
    assert (tmp_path / "out" / "report.html").read_text() == written.html
    assert main(["report", str(tmp_path / "nothing")]) == 2


def test_heat_maps_come_with_a_learning_rate_axis(write_group: Callable[..., Path]) -> None:
    study = read_study([write_group([({"optim.learning_rate": rate}, gain, 0.1) for rate, gain in ((1e-4, 0.3), (1e-3, 0.6))], seeds=(0,))])
    plots = {plot.name: plot for plot in heat_maps(study, course(study))}
    assert "learning rate 0.0001, step 10: 0.40; learning rate 0.0001, step 20: 0.35" in plots["heat_map_identity_fidelity_0"].alt


def test_costs_are_means_over_the_runs_of_an_arm(prior_group: Path) -> None:
    table = cost_table(read_study([prior_group]))
    assert table.header == ["arm", "runs", "training", "whole run", "peak memory"]  # no column of what nobody knows
    assert table.rows[0] == ["prior=class_images", "6", "60.00 s", "90.00 s", "2.00 GB"]


def test_costs_tell_what_learned_and_how_fast(prior_group: Path) -> None:
    for path in prior_group.glob("*/run.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": 30}))
        (path.parent / "checkpoints").mkdir()
        save_file({"a": torch.zeros(20, 50), "b": torch.zeros(7)}, path.parent / "checkpoints" / "best.safetensors")
    size = path.parent.joinpath("checkpoints", "best.safetensors").stat().st_size
    row = dict(zip(*(lambda table: (table.header, table.rows[0]))(cost_table(read_study([prior_group]))), strict=True))
    assert (row["learned parameters"], row["steps a second"], row["file"]) == ("1,007", "0.50", f"{size / 1000:.2f} kB")


def test_base_is_one_row_for_all_arms_that_drew_the_same(prior_group: Path) -> None:
    study = read_study([prior_group])
    assert set(study.base.label) == {"un-tuned base"}
    three = study._replace(arms=[*study.arms, "other"], images=pd.concat([study.images, study.images.assign(label="other")]))
    moved = three.images.assign(identity=three.images.identity + 0.1 * (three.images.label == "other"))
    assert set(three._replace(images=moved).base.label) == {"un-tuned base of prior=class_images, prior=none", "un-tuned base of other"}


def test_base_that_is_scored_alike_but_for_rounding_is_one_row(prior_group: Path) -> None:
    study = read_study([prior_group])
    noise = 6e-8 * (study.images.label == "prior=none")
    assert set(study._replace(images=study.images.assign(identity=study.images.identity + noise)).base.label) == {"un-tuned base"}


def test_score_that_rests_on_each_arms_own_photos_is_not_compared(prior_group: Path) -> None:
    study = read_study([prior_group])
    assert own_yardsticks(study) == []
    images, other = study.images, study.images.label == "prior=none"
    sharper = images.assign(sharpness=np.where(other, 1.2, 0.9), memorisation=-0.1)
    found = study._replace(images=sharper)
    assert own_yardsticks(found) == ["sharpness"]
    tables = {table.title: table for table in score_tables(found, compare(found), compare(found, "final"))}
    words = {row[0]: row[-1] for row in tables["Differences, each minus prior=class_images"].rows}
    assert words["Sharpness"] == "not comparable: each arm's own photos are the yardstick"
    assert "yardstick" not in words["Memorisation"] + words["Drift of the class"]
    assert "they make Sharpness 0.900 (prior=class_images), 1.200 (prior=none). In this score arms cannot be compared." in tables["Scores"].note
    drawn_otherwise = found._replace(images=sharper.assign(alignment=images.alignment + 0.1 * other))
    assert own_yardsticks(drawn_otherwise) == []  # other pictures, so that nothing is known of the photos
    but_one = images.k == 0  # that some of them happen to be scored alike says nothing either
    assert own_yardsticks(found._replace(images=sharper.assign(alignment=images.alignment + 0.1 * (other & but_one)))) == []


def test_two_subjects_are_said_to_be_too_few(prior_group: Path) -> None:
    study = read_study(sorted(path for path in prior_group.iterdir() if "vase" not in path.name))
    assert "Too few subjects (2)" in caution(study)
    assert compare(study)["identity_fidelity"].rows[1].difference.unit == "prompt"


def test_answer_about_two_arms_does_not_speak_of_the_untuned_base(write_group: Callable[..., Path]) -> None:
    study = read_study([write_group([({"optim.learning_rate": 3e-4}, 0.5, 0.1), ({"optim.learning_rate": 7e-5}, 0.2, 0.1)])])
    assert "identity fidelity -0.300 (-0.300 to -0.300), less like the subject" in answer(study, compare(study))[0]
    alone = study._replace(arms=study.arms[:1], runs=study.of_arm(study.baseline), images=study.images[study.images.label == study.baseline])
    assert "the subject was learned" in " ".join(answer(alone, compare(alone)))


def test_setting_breaks_between_the_words_of_its_name_where_it_is_narrow() -> None:
    assert str(breakable("subject.prompt_noun=mushroom, last step", True)) == "subject.<wbr>prompt_<wbr>noun=<wbr>mushroom, last step"


def test_setting_breaks_behind_its_sign_and_not_inside_a_word_and_stays_escaped() -> None:
    assert str(breakable("subject.prompt_noun=mushroom, last step")) == "subject.prompt_noun=<wbr>mushroom, last step"
    assert str(breakable("modules=[to_q,to_k]")) == "modules=<wbr>[to_q,<wbr>to_k]"
    assert str(breakable("6,103,848 of <b>")) == "6,103,848 of &lt;b&gt;"


def test_bars_name_arms_below_them_where_that_fits_and_in_the_legend_where_not(prior_group: Path, write_group: Callable[..., Path]) -> None:
    arms = [({"prior.prompts": ["a photo of a {subject}"] * count}, 0.5, 0.1) for count in (2, 7, 8, 9)]
    long = write_group(arms, group="prompts")
    short, crowded = (read_study([group]) for group in (prior_group, long))
    texts = [re.findall(r"<text[^>]*>([^<]+)</text>", bars(study, compare(study), "drift", "pres").svg) for study in (short, crowded)]
    assert "prior=none" in texts[0] and not any("prior.prompts" in text for text in texts[0])
    assert [text for text in texts[1] if text.startswith("prior.prompts=")] == [html.escape(arm, quote=False) for arm in crowded.arms]
    assert texts[1].index("un-tuned base") < texts[1].index(html.escape(crowded.arms[0], quote=False))  # so they stand in the legend


def test_looks_of_many_arms_are_all_different() -> None:
    seen = [look(k) for k in range(16)]
    assert len({(one["color"], one["marker"]) for one in seen}) == 16


def test_dots_of_many_arms_lie_in_the_band_of_their_subject_and_inside_the_axes() -> None:
    subjects, arms = ["car", "dog", "duck"], [f"prior.weight={k}" for k in range(12)]
    found = pd.DataFrame([(arm, subject, 0.1 * k) for arm in arms for k, subject in enumerate(subjects)], columns=["label", "subject", "difference"])
    ax = Figure().subplots()
    draw_dots(found, {arm: look(k) for k, arm in enumerate(arms)}, "difference", ax)
    low, high = ax.get_ylim()
    lines = [line for line in ax.get_lines() if line.get_label() in arms]
    heights = {(line.get_label(), band): y for line in lines for band, y in enumerate(line.get_ydata())}
    assert len(set(heights.values())) == 36  # none on another
    assert all(abs(y - band) < 0.5 and low < y < high for (_, band), y in heights.items())
    left, right = ax.get_xlim()
    assert all(left < x < right for line in lines for x in line.get_xdata())


def test_numbers_below_the_dots_stand_apart() -> None:
    found = pd.DataFrame(
        [("a", subject, gain) for subject, gain in (("cat-913", -0.062), ("dog", 0.137))], columns=["label", "subject", "difference"]
    )
    figure = Figure(figsize=(4.8, 3.7), layout="constrained")
    ax = figure.subplots()
    draw_dots(found, {"a": look(1)}, "difference", ax)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.get_xticklabels() if ax.get_xlim()[0] <= text.get_position()[0] <= ax.get_xlim()[1]]
    assert len(boxes) >= 3 and all(left.x1 + 4 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))


def test_dots_say_which_side_is_better(prior_group: Path) -> None:
    study = read_study([prior_group])
    sides = {key: str(paired_dots(study, key)).split("further ")[1].split(" is better")[0] for key in ("identity_fidelity", "drift")}
    assert sides == {"identity_fidelity": "right", "drift": "left"}


def test_arm_looks_the_same_in_the_dots_as_in_the_course_and_many_make_the_drawing_taller(write_group: Callable[..., Path]) -> None:
    rates = [(k + 1) * 1e-5 for k in range(9)]
    study = read_study([write_group([({"optim.learning_rate": rate}, 0.5 - 0.01 * k, 0.1) for k, rate in enumerate(rates)], seeds=(0,))])
    dots, course_plot = paired_dots(study, "identity_fidelity"), trajectories(study, course(study))[0]
    assert all(f"--arm-{k}" in dots.svg and f"--arm-{k}" in course_plot.svg for k in range(7))
    few = paired_dots(study._replace(images=study.images[study.images.label.isin(study.arms[:2])]), "identity_fidelity")
    assert _height(dots) > _height(few)


def _height(plot: Plot) -> float:
    return float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', plot.svg)[1])
