"""Sweeps that last: killed and continued, extended, worked on by several processes at once; no job done twice, none lost with another."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf
from PIL import Image
from small_runs import ROOT, SMALL, composed, make_photos, run, typed

from dreambooth import base_images, claims, cli, evaluation, sweeps
from dreambooth.base.stable_diffusion import StableDiffusionModel
from dreambooth.base_images import answer_digest, draw_base
from dreambooth.callbacks import ContinueState
from dreambooth.claims import Busy, ClaimLost
from dreambooth.config import Config
from dreambooth.dreambench import AbsentSubjectError
from dreambooth.errors import UserError
from dreambooth.evaluation import draw, selection_plan
from dreambooth.metrics_csv import MetricsFile
from dreambooth.runs import RunFolder, read_run
from dreambooth.sweeps import Job, SweepStart, finished, jobs_that_fit, read_plan, seconds_left, selection_score, table, time_left

FEW = [*SMALL, "prior=none", "trainer.max_steps=2", "trainer.eval_every=2", "sampling.steps=1", "evaluation.final_images=1"]
FEW = [word for word in FEW if not word.startswith("prior.")]


@pytest.fixture(scope="module")
def subject(tiny_folder, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What every run of these tests has: a tiny base, photos, no class images, few pictures."""
    photos = make_photos(tmp_path_factory.mktemp("photos") / "dog")
    return [*FEW, f"base.path={tiny_folder()}", f"data.subject_dir={photos}", "subject.class_noun=dog"]


def another_owner(folder: Path, name: str = ".claim", **changes: object) -> None:
    """Writes the claim of a process on another machine, alive a moment ago."""
    folder.mkdir(parents=True, exist_ok=True)
    owner = claims._this_process()._replace(**{"token": "other", "place": "another machine", "host": "node7", "pid": 4711} | changes)
    (folder / name).write_text(json.dumps(owner._asdict()))


def finished_run(folder: Path, seconds: float, **fields: object) -> RunFolder:
    record = {"status": "done", "config": {}, "digests": {}, "fingerprint": "", "seconds": {"training": seconds - 1.0, "loading": 1.0}} | fields
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))
    return RunFolder(folder, record)


# What a sweep goes over, and how long it takes


@pytest.mark.parametrize(
    ("words", "params", "jobs", "varies"),
    [
        (["a=1,2,3", "b=x"], {}, 3, ["a"]),
        (["a=1,2,3", "b=range(4)"], {}, 12, ["a", "b"]),
        (["b=5"], {"a": "1,2,3"}, 3, ["a"]),
        (["a=7"], {"a": "1,2,3"}, 1, []),
        (["b=choice(1,2)"], {"a": "1,2,3"}, 6, ["a", "b"]),
        (["a=glob(*)"], {}, None, ["a"]),
    ],
)
def test_read_plan_counts_the_jobs_that_hydra_starts(words: list[str], params: dict, jobs: int | None, varies: list[str]) -> None:
    config = OmegaConf.create({"hydra": {"sweeper": {"params": params}, "overrides": {"task": words}}})
    assert read_plan(config) == (jobs, varies)
    if jobs is not None:
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        all_words = [f"{key}={value}" for key, value in params.items()] + words
        assert len(BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(all_words), None)[0]) == jobs


def test_seconds_left_is_the_mean_of_the_finished_ones_shared_by_all_who_work(tmp_path: Path) -> None:
    assert seconds_left(tmp_path, finished(tmp_path), 3) is None
    finished_run(tmp_path / "a", 100)
    finished_run(tmp_path / "b", 200)
    finished_run(tmp_path / "c", 900, status="running")
    assert seconds_left(tmp_path, finished(tmp_path), 3) == pytest.approx(450)
    another_owner(tmp_path / "c")
    assert seconds_left(tmp_path, finished(tmp_path), 3) == pytest.approx(225)
    assert seconds_left(tmp_path, finished(tmp_path), 1) == pytest.approx(150)  # one job is not done faster by two


def test_time_left_is_an_upper_bound_while_jobs_to_come_may_be_done_already(tmp_path: Path) -> None:
    assert time_left(tmp_path, 3, met=0) == ""
    finished_run(tmp_path / "a", 1000)
    assert time_left(tmp_path, 3, met=0) == "; at most 50 min left"
    assert time_left(tmp_path, 2, met=1) == "; about 33 min left"


@pytest.mark.parametrize(("seconds", "words"), [(40, "40 s"), (89.6, "90 s"), (1380, "23 min"), (11520, "3.2 h")])
def test_in_words_says_a_time_as_people_do(seconds: float, words: str) -> None:
    assert sweeps.in_words(seconds) == words


def test_jobs_that_fit_are_limited_by_cores_and_by_the_memory_that_a_run_of_the_group_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(sweeps, "_free_bytes", lambda: 11e9)
    assert jobs_that_fit(tmp_path) == 5  # 2 GB each, as long as none has told
    finished_run(tmp_path / "a", 10, peak_memory_bytes=4e9)
    assert jobs_that_fit(tmp_path) == 2
    finished_run(tmp_path / "b", 10, peak_memory_bytes=40e9)
    assert jobs_that_fit(tmp_path) == 1
    monkeypatch.setattr(sweeps, "_free_bytes", lambda: 1e15)
    assert jobs_that_fit(tmp_path) == 8
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert jobs_that_fit(tmp_path) == 1


def test_table_shows_every_job_with_its_folder_the_error_of_a_failed_one_and_who_does_the_others() -> None:
    jobs = [
        Job(1, "a=1", "done before", "runs/g/x"),
        Job(2, "a=2", "failed", "runs/g/yy", "it broke"),
        Job(3, "a=3", "elsewhere", "runs/g/z", "process 4711 on node7"),
    ]
    lines = table(jobs, 5).splitlines()
    assert lines[1] == "sweep of 5 jobs: 1 done before, 1 failed, 1 elsewhere, 2 not begun"
    assert lines[3].split() == ["2", "failed", "runs/g/yy", "a=2:", "it", "broke"]
    assert lines[-1] == "being done elsewhere: runs/g/z by process 4711 on node7; run the same command again to see them"


@pytest.mark.parametrize(("score", "expected"), [("0.75", 0.75), ("nan", -1.0), ("", -1.0)])
def test_selection_score_is_the_fidelity_of_the_chosen_step_and_never_nan(tmp_path: Path, score: str, expected: float) -> None:
    done = finished_run(tmp_path / "a", 10, best_step=20)
    (tmp_path / "a" / "metrics.csv").write_text(f"step,train/loss,score/identity_fidelity\n10,,0.9\n20,0.1,\n20,,{score}\n30,,0.95\n")
    assert selection_score(done) == expected


# The folder of a sweep, and what becomes of a job in it


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Gives `opened("BasicLauncher")`: the folder of a sweep over a=1,2,3 that this process has just started with that launcher."""
    monkeypatch.setenv(sweeps.FOLDER, "")  # so that it is as it was afterwards

    def start(launcher: str) -> Path:
        hydra = {
            "sweep": {"dir": str(tmp_path / ".sweeps")},
            "sweeper": {},
            "launcher": {"_target_": f"x.{launcher}"},
            "overrides": {"task": ["a=1,2,3"]},
        }
        SweepStart().on_multirun_start(OmegaConf.create({"hydra": hydra, "output_dir": str(tmp_path), "group": "g"}))
        return Path(os.environ[sweeps.FOLDER])

    yield start
    sweeps.close()


@pytest.fixture
def do_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Gives `do_job(2, work)`: job 2 of that sweep as Hydra would run it, a=2; returns its result."""

    def do(number: int, work: Callable[[dict], object] = lambda config: "done", failed: object = None) -> object:
        job = SimpleNamespace(num=number - 1, override_dirname=f"a={number}")
        given = SimpleNamespace(mode=RunMode.MULTIRUN, job=job, overrides=SimpleNamespace(task=[f"a={number}"]))
        monkeypatch.setattr(HydraConfig, "get", lambda: given)
        return cli.run_job(work, OmegaConf.create({"output_dir": str(tmp_path), "group": "g", "a": number}), failed)

    monkeypatch.setattr(cli, "FAILED_JOBS", [])
    monkeypatch.setattr(cli, "_end_in_order_on_sigterm", lambda: None)  # the process is not the job's alone
    return do


def fail(config: dict) -> None:
    raise UserError("a", "must be another")


def test_job_is_done_though_the_folder_of_its_sweep_was_removed(opened: Callable, do_job: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    """As after a launcher that gave up while jobs still waited on the cluster."""
    folder = opened("SlurmLauncher")
    assert do_job(1) == "done" and (folder / "1.json").is_file()
    shutil.rmtree(folder)
    assert do_job(2) == "done" and do_job(3, fail, failed=-1.0) == -1.0
    assert not folder.exists()
    assert sweeps.close() == set() and "sweep of" not in capsys.readouterr().out


def test_job_goes_on_when_the_folder_of_its_sweep_is_removed_meanwhile(opened: Callable, do_job: Callable) -> None:
    folder = opened("SlurmLauncher")
    assert do_job(1, lambda config: shutil.rmtree(folder) or sweeps.working_in(folder, False) or "done") == "done"
    assert not folder.exists()


def test_job_is_done_though_the_plan_of_its_sweep_cannot_be_read(opened: Callable, do_job: Callable) -> None:
    (opened("SlurmLauncher") / "sweep.json").write_text("{")
    assert do_job(1) == "done"


@pytest.mark.parametrize(("launcher", "is_kept"), [("SlurmLauncher", True), ("BasicLauncher", False), ("JoblibLauncher", False)])
def test_folder_of_a_sweep_outlives_its_launcher_while_a_cluster_may_still_run_jobs(
    opened: Callable, do_job: Callable, capsys: pytest.CaptureFixture[str], launcher: str, is_kept: bool
) -> None:
    folder = opened(launcher)
    do_job(1)
    assert sweeps.close() == {"done"} and folder.exists() == is_kept
    said = capsys.readouterr().out
    assert "1 done, 2 not begun" in said and ("on the cluster" in said) == is_kept


def test_folder_of_a_sweep_is_removed_when_every_job_is_closed(opened: Callable, do_job: Callable) -> None:
    folder = opened("SlurmLauncher")
    for number in (1, 2, 3):
        do_job(number)
    assert sweeps.close() == {"done"} and not folder.exists()


def test_folder_of_a_sweep_stays_while_a_job_is_open(opened: Callable, do_job: Callable) -> None:
    folder = opened("SlurmLauncher")
    for number in (1, 2):
        do_job(number)
    with pytest.raises(KeyboardInterrupt):
        do_job(3, lambda config: (_ for _ in ()).throw(KeyboardInterrupt))
    assert sweeps.close() == {"done", "cut off"} and folder.exists()


def test_close_leaves_the_sweep_that_another_process_started(opened: Callable, do_job: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = opened("BasicLauncher")
    monkeypatch.setattr(sweeps, "_opened", None)  # as in a command that a job starts
    assert sweeps.close() == set() and folder.exists() and os.environ[sweeps.FOLDER] == str(folder)


def test_next_sweep_removes_the_folder_of_one_that_is_long_over(opened: Callable, tmp_path: Path) -> None:
    for name, days in (("old", 15), ("waiting", 13)):
        (tmp_path / ".sweeps" / name).mkdir(parents=True)
        (tmp_path / ".sweeps" / name / "sweep.json").write_text("{}")
        os.utime(tmp_path / ".sweeps" / name, (time.time() - days * 86400,) * 2)
    folder = opened("BasicLauncher")
    assert sorted(path.name for path in (tmp_path / ".sweeps").iterdir()) == sorted([folder.name, "waiting"])


def busy_with(folder: Path) -> Callable[[dict], None]:
    """Returns work that another process is at, or was a moment ago."""

    def work(config: dict) -> None:
        raise Busy(folder, claims._this_process()._replace(since="an hour"))

    return work


def test_sweep_goes_back_once_to_what_nobody_does_any_more_and_leaves_what_is_at_work(opened: Callable, do_job: Callable, tmp_path: Path) -> None:
    opened("BasicLauncher")
    another_owner(tmp_path / "living")
    for number, name in ((1, "living"), (2, "dead"), (3, "never written")):
        do_job(number, busy_with(tmp_path / name))
    launched = []

    def launch(job: Job) -> None:
        launched.append((job.number, job.overrides))
        do_job(job.number, busy_with(tmp_path / "never written") if job.number == 3 else lambda config: "done")

    sweeps.go_back(launch)
    assert launched == [(2, ("a=2",)), (3, ("a=3",))]
    assert [job.state for job in sweeps.jobs_so_far()] == ["elsewhere", "done", "elsewhere"]


@pytest.mark.parametrize(("fails", "status"), [(False, cli.SOME_ELSEWHERE), (True, cli.SOME_FAILED)])
def test_exit_status_tells_of_jobs_that_are_still_done_elsewhere(
    opened: Callable, do_job: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: bool, status: int
) -> None:
    opened("BasicLauncher")

    def main() -> None:
        do_job(1)
        do_job(2, busy_with(tmp_path / "run"))
        do_job(3, *[fail] * fails)

    with pytest.raises(SystemExit) as stop:
        cli.run_script(main)
    assert stop.value.code == status == (1 if fails else 3)
    assert "being done elsewhere: " in capsys.readouterr().out


def test_job_that_failed_has_a_score_for_a_search_and_one_that_is_done_elsewhere_has_none(opened: Callable, do_job: Callable, tmp_path: Path) -> None:
    """None is what the Optuna sweeper takes for a trial that failed: the point is not held against its settings."""
    opened("BasicLauncher")

    def absent(config: dict) -> None:
        raise AbsentSubjectError("data.dreambench", "has no such photos")

    assert [do_job(1, fail, failed=-1.0), do_job(2, busy_with(tmp_path / "run"), failed=-1.0), do_job(3, absent, failed=-1.0)] == [-1.0, None, None]
    assert sweeps.close() == {"failed", "elsewhere", "left out"}


# One folder, one process


def test_run_that_another_process_does_is_left_untouched_and_named(subject: list[str], tmp_path: Path) -> None:
    done = run(*subject, f"output_dir={tmp_path}")
    done.update(status="running")
    another_owner(done.path)
    before = {path: path.stat().st_mtime_ns for path in done.path.rglob("*") if path.is_file()}
    with pytest.raises(Busy, match="process 4711 on node7 since") as caught:
        run(*subject, f"output_dir={tmp_path}")
    assert cli.explain(caught.value).startswith(str(done.path))
    assert {path: path.stat().st_mtime_ns for path in done.path.rglob("*") if path.is_file()} == before


def test_run_that_is_done_is_shown_even_while_another_process_looks_at_it(subject: list[str], tmp_path: Path) -> None:
    done = run(*subject, f"output_dir={tmp_path}")
    assert not list(done.path.glob(".claim*"))
    another_owner(done.path)
    assert run(*subject, f"output_dir={tmp_path}").status == "done"


def test_run_whose_folder_was_taken_over_stops_and_writes_nothing_more(subject: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a machine that slept: the heartbeat has not looked yet when the next state is to be written."""
    save, seen = ContinueState.on_train_batch_end, {}

    def taken_over(self: ContinueState, trainer, module, *rest) -> None:
        if trainer.global_step == 2:
            another_owner(self.run.path, f".claim.{self.run.claim.owner.token}")
            seen.update({path: path.stat().st_mtime_ns for path in self.run.path.rglob("*") if path.is_file()})
        save(self, trainer, module, *rest)

    monkeypatch.setattr(ContinueState, "on_train_batch_end", taken_over)
    with pytest.raises(ClaimLost, match="another took over"):
        run(*subject, "trainer.max_steps=6", "trainer.checkpoint_every=2", f"output_dir={tmp_path}")
    folder = next((tmp_path / "default").iterdir())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == seen
    assert read_run(folder).status == "running" and not (folder / "checkpoints" / "last.ckpt").exists()


def test_run_stops_at_the_next_step_when_its_heartbeat_saw_the_takeover(subject: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, rows = ContinueState.on_train_batch_end, []

    def taken_over(self: ContinueState, trainer, module, *rest) -> None:
        save(self, trainer, module, *rest)
        if trainer.global_step == 2:
            another_owner(self.run.path, f".claim.{self.run.claim.owner.token}")
            with pytest.raises(ClaimLost):
                self.run.claim.confirm()  # what the heartbeat does
            rows.extend(MetricsFile(self.run.path / "metrics.csv").read())

    monkeypatch.setattr(ContinueState, "on_train_batch_end", taken_over)
    with pytest.raises(ClaimLost):
        run(*subject, "trainer.max_steps=6", "trainer.log_every_n_steps=1", f"output_dir={tmp_path}")
    assert MetricsFile(next((tmp_path / "default").iterdir()) / "metrics.csv").read() == rows


# Pictures of the base, drawn once


@pytest.fixture
def config(make_config) -> Config:
    return make_config({"evaluation.selection_images": 1, "evaluation.class_images": 2, "sampling.batch_size": 3})


def drawing_run(config: Config) -> RunFolder:
    return RunFolder(Path(config.output_dir) / "default" / "some-run", {"digests": {"base": "d"}})


def count_drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that grows by the size of every batch that is drawn."""
    drawn, original = [], evaluation.generate

    def counted(base, prompts, *rest) -> np.ndarray:
        drawn.append(len(prompts))
        return original(base, prompts, *rest)

    monkeypatch.setattr(evaluation, "generate", counted)
    return drawn


def test_draw_base_gives_what_drawing_anew_gives_and_draws_once(
    config: Config, shared_base: StableDiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = selection_plan(config)
    anew, drawn = draw(shared_base, plan, config), count_drawn(monkeypatch)
    first = draw_base(drawing_run(config), shared_base, plan, config)
    assert sum(drawn) == len(plan)
    second = draw_base(drawing_run(config), shared_base, plan, config)
    assert sum(drawn) == len(plan)
    assert np.array_equal(first, anew) and np.array_equal(second, anew)
    manifest = json.loads(next((Path(config.output_dir) / "base_images").glob("*/manifest.json")).read_text())
    assert [image["prompt"] for image in manifest["images"]] == [item.prompt for item in plan]


def test_draw_base_draws_again_what_is_damaged_with_its_whole_batch(
    config: Config, shared_base: StableDiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = selection_plan(config)
    first = draw_base(drawing_run(config), shared_base, plan, config)
    path = next((Path(config.output_dir) / "base_images").glob("*/class-*-00.png"))
    path.write_bytes(path.read_bytes()[:200])
    drawn = count_drawn(monkeypatch)
    assert np.array_equal(draw_base(drawing_run(config), shared_base, plan, config), first)
    assert 0 < sum(drawn) <= 3


@pytest.mark.parametrize(
    "changes",
    [{"sampling.steps": 3}, {"sampling.guidance_scale": 2.0}, {"evaluation.seed": 7}, {"sampling.sampler": "euler"}, {"sampling.batch_size": 2}],
)
def test_draw_base_never_takes_pictures_of_another_recipe(config: Config, make_config, shared_base: StableDiffusionModel, changes: dict) -> None:
    same = {"evaluation.selection_images": 1, "evaluation.class_images": 2, "sampling.batch_size": 3}
    other = make_config(same | changes)
    draw_base(drawing_run(config), shared_base, selection_plan(config), config)
    assert np.array_equal(draw_base(drawing_run(other), shared_base, selection_plan(other), other), draw(shared_base, selection_plan(other), other))
    assert len(list((Path(config.output_dir) / "base_images").iterdir())) == 2


@pytest.mark.parametrize(("method", "shares"), [("method=full", True), ("method=lora", True), ("method=textual_inversion", False)])
def test_answer_digest_is_shared_by_methods_that_start_at_the_base_and_by_no_other(
    method: str, shares: bool, fresh_base: StableDiffusionModel, config: Config, subject: list[str]
) -> None:
    plan, own = selection_plan(config), composed(*subject, method)
    before, pictures = answer_digest(fresh_base, plan, config), draw(fresh_base, plan, config)
    own.method.attach(fresh_base, "sks", "dog", 0)
    assert (answer_digest(fresh_base, plan, config) == before) == shares
    assert np.array_equal(draw(fresh_base, plan, config), pictures) or not shares


def test_answer_digest_sees_one_weight_that_changed_a_little(fresh_base: StableDiffusionModel, config: Config) -> None:
    before = answer_digest(fresh_base, selection_plan(config), config)
    weight = fresh_base.unet.conv_in.weight
    weight.data[0, 0, 1, 1] += 1e-4
    assert answer_digest(fresh_base, selection_plan(config), config) != before


def test_answer_digest_sees_a_word_that_only_one_prompt_has(fresh_base: StableDiffusionModel, config: Config) -> None:
    plan = selection_plan(config)
    before, prompts = answer_digest(fresh_base, plan, config), list(dict.fromkeys(item.prompt for item in plan))
    known = set(fresh_base.token_id(prompts[0]))
    word = next(token for prompt in prompts[1:] for token in fresh_base.token_id(prompt) if token not in known)
    fresh_base.text_encoder.get_input_embeddings().weight.data[word] += 0.01
    assert answer_digest(fresh_base, plan, config) != before


def test_draw_base_waits_for_nobody_when_all_is_there(config: Config, shared_base: StableDiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = selection_plan(config)
    first = draw_base(drawing_run(config), shared_base, plan, config)
    another_owner(next((Path(config.output_dir) / "base_images").iterdir()))
    monkeypatch.setattr(base_images, "alone_in", None)  # would wait for ever
    assert np.array_equal(draw_base(drawing_run(config), shared_base, plan, config), first)


def test_runs_that_differ_in_the_seed_share_the_pictures_of_the_base(subject: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(*subject, f"output_dir={tmp_path}")
    asked, original = [], base_images.draw_missing

    def looked(base, items, own, kept, *rest) -> np.ndarray:
        asked.append((len(items), kept.there))
        return original(base, items, own, kept, *rest)

    monkeypatch.setattr(base_images, "draw_missing", looked)
    second = run(*subject, "seed=1", f"output_dir={tmp_path}")
    alone = run(*subject, "seed=1", f"output_dir={tmp_path / 'alone'}")
    assert len(asked) == 4 and all(wanted == there for wanted, there in asked[:2]) and all(there == 0 for _, there in asked[2:])
    for picture in [*(second.path / "samples" / "final" / "base").glob("*.png"), *(second.path / "samples" / "step-000000").glob("*.png")]:
        twin = alone.path / picture.relative_to(second.path)
        with Image.open(picture) as one, Image.open(twin) as two:
            assert np.array_equal(np.asarray(one), np.asarray(two)), picture
    assert first.path != second.path


# Real sweeps, as they are typed


def start(words: list[str], log: Path) -> subprocess.Popen:
    with log.open("w") as handle:
        return subprocess.Popen([sys.executable, "train.py", "-m", *words], cwd=ROOT, stdout=handle, stderr=subprocess.STDOUT)


def trained(*logs: Path) -> Counter:
    """Returns how often each run was trained or continued, by the line that says so."""
    lines = [line for log in logs for line in log.read_text().splitlines()]
    return Counter(line.removeprefix("run folder ") for line in lines if line.startswith("run folder "))


def wait_for_training(process: subprocess.Popen, runs: Path) -> Path:
    """Waits until a process is in the middle of a job; returns the folder of that."""
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        for record in runs.glob("default/*/run.json"):
            owner = claims.holder(record.parent)
            if owner is not None and owner.pid == process.pid and (record.parent / "metrics.csv").is_file():
                return record.parent
        time.sleep(0.02)
    raise AssertionError(f"process {process.pid} was never seen in a job")


def test_sweep_of_two_processes_that_are_both_killed_loses_no_job_and_does_none_twice(subject: list[str], tmp_path: Path) -> None:
    """Two work on four jobs and one gets kill -9; a third joins, passes the job that the second is at, and then that one gets kill -9 too.

    The third ends the sweep, the job that it passed included; the command again, with one more value, does that and nothing else.
    """
    runs, logs = tmp_path / "runs", [tmp_path / f"{name}.log" for name in "abcd"]
    words = [*subject, f"output_dir={runs}", "trainer.max_steps=12", "trainer.eval_every=12", "trainer.checkpoint_every=4"]
    rates = "optim.learning_rate=1e-4,2e-4,3e-4,4e-4"
    first, second = start([*words, rates], logs[0]), start([*words, rates], logs[1])
    hit = [wait_for_training(first, runs)]
    os.kill(first.pid, signal.SIGKILL)
    hit.append(wait_for_training(second, runs))
    os.kill(second.pid, signal.SIGSTOP)  # it lives and holds its job until the third has come to it
    third, deadline = start([*words, rates], logs[2]), time.monotonic() + 240
    while "skipped: " not in logs[2].read_text() and third.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(second.pid, signal.SIGKILL)
    assert [first.wait(60), second.wait(60), third.wait(240)] == [-signal.SIGKILL, -signal.SIGKILL, 0], logs[2].read_text()
    assert "being done elsewhere" not in logs[2].read_text() and logs[2].read_text().count("back to job ") == 1
    more = typed("-m", *words, f"{rates},5e-4")
    logs[3].write_text(more.stdout)
    assert more.returncode == 0, more.stderr
    assert "sweep of 5 jobs: 4 done before, 1 done\n" in more.stdout and sum(trained(logs[3]).values()) == 1
    records = {str(path.parent): json.loads(path.read_text()) for path in runs.glob("default/*/run.json")}
    assert sorted(r["config"]["optim"]["learning_rate"] for r in records.values()) == [1e-4, 2e-4, 3e-4, 4e-4, 5e-4]
    assert {r["status"] for r in records.values()} == {"done"}
    assert {path: 1 + r.get("resumed", 0) for path, r in records.items()} == trained(*logs)
    assert Counter({path: r["resumed"] for path, r in records.items() if r.get("resumed")}) == Counter(map(str, hit))
    for path in records:
        steps = [int(row["step"]) for row in MetricsFile(Path(path) / "metrics.csv").read() if row.get("train/loss")]
        assert len(steps) == len(set(steps))
    assert not list(runs.rglob(".claim*"))


def broken_sweep(subject: list[str], tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a sweep of three whose middle job fails in the middle of its training."""
    rates = "optim.learning_rate=1e-4,1e30,2e-4"
    return typed("-m", *subject, f"output_dir={tmp_path / 'runs'}", "trainer.max_steps=20", "trainer.eval_every=20", rates, *words)


def check_broken_sweep(result: subprocess.CompletedProcess[str], runs: Path) -> None:
    assert result.returncode == 1, result.stderr
    records = {r["config"]["optim"]["learning_rate"]: r for path in runs.glob("default/*/run.json") for r in [json.loads(path.read_text())]}
    assert {rate: record["status"] for rate, record in records.items()} == {1e-4: "done", 1e30: "failed", 2e-4: "done"}
    assert "the loss must stay finite" in records[1e30]["error"]
    rows = result.stdout[result.stdout.index("sweep of 3 jobs: 2 done, 1 failed") :].splitlines()
    assert [row.split()[:2] for row in rows[1:4]] == [["1", "done"], ["2", "failed"], ["3", "done"]]
    assert "optim.learning_rate=1e+30: the loss must stay finite" in rows[2] and str(runs / "default") in rows[2]


def test_sweep_shows_a_failed_job_with_its_error_and_does_the_others(subject: list[str], tmp_path: Path) -> None:
    result = broken_sweep(subject, tmp_path)
    check_broken_sweep(result, tmp_path / "runs")
    assert "job 1 of 3: optim.learning_rate=0.0001\n" in result.stdout
    assert "job 3 of 3: optim.learning_rate=0.0002; about " in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_sweep_by_another_launcher_ends_like_one_by_hydras_own(subject: list[str], tmp_path: Path, launcher: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher" if launcher == "joblib" else "hydra_plugins.hydra_submitit_launcher")
    check_broken_sweep(broken_sweep(subject, tmp_path, f"hydra/launcher={launcher}"), tmp_path / "runs")


@pytest.mark.slow
def test_sweep_by_optuna_counts_a_job_that_fails_as_the_worst_and_one_that_is_done_elsewhere_as_no_trial(subject: list[str], tmp_path: Path) -> None:
    """Three settings, drawn again and again: one is done, one fails in its training, one is another process's."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    import optuna

    runs, storage = tmp_path / "runs", f"sqlite:///{tmp_path / 'search.db'}"
    words = [*subject, f"output_dir={runs}", "trainer.max_steps=20", "trainer.eval_every=20"]
    other = run(*words, "optim.learning_rate=2e-4")
    other.update(status="running")
    another_owner(other.path)
    search = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=0", "hydra.sweeper.direction=maximize"]
    study = ["hydra.sweeper.n_trials=15", "hydra.sweeper.n_jobs=1", "hydra.sweeper.study_name=rates", f"hydra.sweeper.storage={storage}"]
    result = typed("-m", *words, *search, *study, "optim.learning_rate=choice(1e-4,2e-4,1e30)")
    assert result.returncode == 1, result.stderr
    assert "sweep of 15 jobs: " in result.stdout and "back to job" not in result.stdout
    trials = optuna.load_study(study_name="rates", storage=storage).trials
    done = next(found for path in runs.glob("default/*") if (found := read_run(path)).status == "done")
    assert len(trials) == 15 and {(float(trial.params["optim.learning_rate"]), trial.state.name, trial.value) for trial in trials} == {
        (1e-4, "COMPLETE", selection_score(done)),
        (2e-4, "FAIL", None),
        (1e30, "COMPLETE", -1.0),
    }
    best = OmegaConf.load(runs / ".sweeps" / "optimization_results.yaml")
    assert best.best_value == selection_score(done)


def test_sigterm_ends_a_run_in_order_and_gives_its_folder_back(subject: list[str], tmp_path: Path) -> None:
    words = [*subject, f"output_dir={tmp_path}", "trainer.max_steps=500", "trainer.eval_every=500", "trainer.checkpoint_every=2"]
    with subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob("default/*/checkpoints/last.ckpt")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    stopped = read_run(next((tmp_path / "default").iterdir()))
    assert process.returncode == 143 and stderr.strip().endswith("stopped by SIGTERM; the same command continues the run")
    assert stopped.status == "failed" and stopped.record["error"] == "stopped by SIGTERM" and not list(stopped.path.glob(".claim*"))


@pytest.mark.slow
def test_sigterm_ends_a_sweep_of_several_processes_with_all_of_them(subject: list[str], tmp_path: Path) -> None:
    """Only the process that was started gets the signal, as from `kill`: those that it started must not train on."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = [*subject, f"output_dir={tmp_path}", "trainer.max_steps=5000", "trainer.eval_every=5000", "trainer.checkpoint_every=2"]
    sweep = ["-m", *words, "optim.learning_rate=1e-4,2e-4", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    said = tmp_path / "stderr.txt"  # no pipe, which those that are left would keep open
    with said.open("w") as stderr, subprocess.Popen([sys.executable, "train.py", *sweep], cwd=ROOT, stdout=stderr, stderr=stderr) as process:
        deadline = time.monotonic() + 240
        while len(list(tmp_path.glob("default/*/checkpoints/last.ckpt"))) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        owners = [claims.holder(folder) for folder in tmp_path.glob("default/*")]
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    at_work = {owner.pid: owner.started for owner in owners if owner}
    deadline = time.monotonic() + 20
    while (left := [pid for pid, started in at_work.items() if claims._is_running(pid, started)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert process.returncode == 143 and "stopped by SIGTERM; the same command continues the run" in said.read_text(), said.read_text()
    assert len(at_work) == 2 and process.pid not in at_work
    assert left == []
