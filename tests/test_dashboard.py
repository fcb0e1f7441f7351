"""The W&B side of an experiment: what is sent, read back from an offline run, and the dashboard as the library would save it."""

from pathlib import Path
from typing import Any

import pytest
from wandb_records import read_offline_run

from dreambooth.__main__ import main
from dreambooth.config import Tracking
from dreambooth.dashboard import online_report, publish, workspace
from dreambooth.errors import UserError
from dreambooth.mirror import final_summary
from dreambooth.report.data import read_study
from dreambooth.report.page import make_report

ONLINE = Tracking(mode="online", entity="lab")


@pytest.fixture
def spec(prior_group: Path) -> dict[str, Any]:
    """The dashboard in the form in which the library sends it."""
    return workspace(read_study([prior_group]), ONLINE)._to_model().model_dump(by_alias=True)


def test_report_as_a_run_holds_its_words_tables_plots_and_grids(prior_group: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboard", str(prior_group)]) == 0
    said = capsys.readouterr().out
    assert "wandb sync" in said and "--online" in said
    found = read_offline_run(prior_group)
    logged = {key.partition(".")[0] for row in found["history"] for key in row}
    report = make_report(read_study([prior_group]))
    wanted = {f"report/{part.name}" for section in report.sections for part in (*section.plots, *section.panels)}
    assert wanted and wanted <= logged and "report/words" in logged
    assert sum(key.startswith("report/") for key in logged) == 1 + len(wanted) + sum(len(section.tables) for section in report.sections)
    assert found["group"] == "prior" and found["project"] == "dreambooth"


def test_report_is_not_taken_for_a_run_of_the_experiment(prior_group: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its files lie beside the run folders: a later report must not stumble over them."""
    before = read_study([prior_group])
    assert main(["dashboard", str(prior_group)]) == 0
    assert len(read_study([prior_group]).runs) == len(before.runs)


def test_dashboard_groups_by_what_the_arms_differ_in_and_shows_the_group_alone(spec: dict[str, Any]) -> None:
    runs = spec["spec"]["section"]["runSets"][0]
    assert [(key["section"], key["name"]) for key in runs["grouping"]] == [("config", "prior.value.name")]
    assert "'prior'" in str(runs["filters"]) and "report" in str(runs["filters"])


def test_dashboard_draws_losses_scores_over_the_steps_and_at_the_end_and_pictures(spec: dict[str, Any]) -> None:
    """That a run logs all of them: test_end_to_end.py, where there is a run."""
    text = str(spec)
    for key in ("identity_fidelity", "prompt_alignment", "drift", "class_diversity"):
        assert f"score/{key}" in text and f"final/best/{key}" in text
    assert all(key in text for key in ("train/loss", "train/subject_loss", "train/prior_loss", "samples/selection", "final/grid"))


def test_online_report_has_the_answer_and_the_tables(prior_group: Path) -> None:
    study = read_study([prior_group])
    report = make_report(study)
    text = str(online_report(study, report, ONLINE).blocks)
    assert report.question in text and report.sections[0].tables[0].rows[0][0] in text and "score/identity_fidelity" in text


def test_online_needs_an_entity_and_sends_nothing_without(prior_group: Path) -> None:
    with pytest.raises(UserError, match="--entity must name your user or team"):
        publish(read_study([prior_group]), Tracking(mode="online"), prior_group)
    assert not (prior_group / "wandb").exists()


def test_online_builds_the_dashboard_and_the_report_page(prior_group: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    class Saved:
        url = "https://wandb.test/saved"

    saved: list[str] = []
    monkeypatch.setattr(workspaces.Workspace, "save", lambda self: saved.append(self.name) or Saved)
    monkeypatch.setattr(reports.Report, "save", lambda self: saved.append(self.title) or Saved)
    monkeypatch.setattr("dreambooth.dashboard.send_report", lambda *given: "there")
    lines = publish(read_study([prior_group]), ONLINE, prior_group)
    assert saved == ["DreamBooth: prior", "DreamBooth: prior"] and sum("https://wandb.test/saved" in line for line in lines) == 2


def test_final_scores_are_scalars_by_arm_and_leave_out_what_was_not_measured() -> None:
    scores = {"rows": [{"arm": "base", "identity_fidelity": 0.1, "drift": None}, {"arm": "best", "identity_fidelity": 0.8, "step": 100}]}
    assert final_summary(scores) == {"final/base/identity_fidelity": 0.1, "final/best/identity_fidelity": 0.8}
