"""The run folder: the same command again continues or skips, another config is refused, and nothing is ever half-written."""

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dreambooth import files, runs
from dreambooth.adapters.methods import trainable_state
from dreambooth.base.stable_diffusion import StableDiffusion
from dreambooth.config import Config, from_plain, to_plain
from dreambooth.errors import ConfigError, UserError
from dreambooth.metrics_csv import MetricsFile
from dreambooth.runs import RunFolder, load, load_weights, open_run, read_run, save_weights

MakeConfig = Callable[..., Config]
DIGESTS = {"base": "b", "photos": "p", "class_images": "none"}


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    return make_config()


def edit(run: RunFolder, **changes: object) -> None:
    """Changes run.json by hand, as a user might."""
    path = run.path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- open_run ---------------------------------------------------------------------------------------------------------------------------


def test_open_run_makes_a_folder_that_describes_itself(config: Config) -> None:
    run = open_run(config, **DIGESTS)
    record = json.loads((run.path / "run.json").read_text())
    assert record["status"] == "running" and record["config"] == to_plain(config) and record["digests"] == DIGESTS
    assert record["versions"]["torch"] == torch.__version__
    assert run.path.parent == Path(config.output_dir) / config.group
    assert run.path.name == f"full-dog-{record['fingerprint']}"


def test_open_run_gives_a_config_back_that_equals_the_first(config: Config) -> None:
    assert read_run(open_run(config, **DIGESTS).path).config == config


def test_open_run_puts_no_space_in_a_folder_name(make_config: MakeConfig) -> None:
    assert " " not in open_run(make_config({"subject.class_noun": "toy dog"}), **DIGESTS).path.name


def test_open_run_continues_what_was_cut_off(config: Config) -> None:
    first = open_run(config, **DIGESTS)
    second = open_run(config, **DIGESTS)
    third = open_run(config, **DIGESTS)
    assert first.path == second.path == third.path
    assert (second.record["resumed"], third.record["resumed"], third.status) == (1, 2, "running")
    assert third.record["started"] == first.record["started"]


def test_open_run_continues_what_failed_and_forgets_the_error(config: Config) -> None:
    open_run(config, **DIGESTS).finish("failed", "the disk was full")
    again = open_run(config, **DIGESTS)
    assert (again.status, again.record["error"]) == ("running", None)
    assert (read_run(again.path).status, read_run(again.path).record["error"]) == ("running", None)


def test_open_run_leaves_what_is_done_untouched(config: Config) -> None:
    run = open_run(config, **DIGESTS)
    run.finish("done", best_step=5)
    before = (run.path / "run.json").read_bytes()
    again = open_run(config, **DIGESTS)
    assert again.status == "done" and again.record["best_step"] == 5 and (run.path / "run.json").read_bytes() == before


def test_open_run_of_another_config_is_another_folder(make_config: MakeConfig) -> None:
    paths = {open_run(make_config({"seed": seed}), **DIGESTS).path for seed in (0, 1)}
    assert len(paths) == 2


@pytest.mark.parametrize("name", ["base", "photos", "class_images"])
def test_open_run_with_another_input_is_another_folder(config: Config, name: str) -> None:
    assert open_run(config, **DIGESTS).path != open_run(config, **DIGESTS | {name: "changed"}).path


def test_open_run_ignores_what_changes_no_result(make_config: MakeConfig) -> None:
    first, second = (open_run(make_config({"data.num_workers": n, "wandb.mode": m}), **DIGESTS) for n, m in ((0, "offline"), (2, "disabled")))
    assert first.path == second.path


def test_open_run_refuses_a_folder_whose_config_was_changed_by_hand(config: Config) -> None:
    run = open_run(config, **DIGESTS)
    edit(run, config=to_plain(dataclasses.replace(config, seed=7)))
    with pytest.raises(UserError, match="holds a run with another config"):
        open_run(config, **DIGESTS)


def test_open_run_refuses_a_folder_with_another_fingerprint(config: Config) -> None:
    run = open_run(config, **DIGESTS)
    edit(run, fingerprint="00000000")
    with pytest.raises(UserError, match="holds a run with another config"):
        open_run(config, **DIGESTS)


def test_open_run_refuses_a_folder_that_is_no_run(config: Config) -> None:
    run = open_run(config, **DIGESTS)
    (run.path / "run.json").unlink()
    (run.path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="must be a run folder"):
        open_run(config, **DIGESTS)
    assert os.listdir(run.path) == ["thesis.txt"]


def test_open_run_takes_an_empty_folder(config: Config) -> None:
    run = open_run(config, **DIGESTS)
    (run.path / "run.json").unlink()
    assert "resumed" not in open_run(config, **DIGESTS).record


def test_open_run_takes_a_folder_that_a_kill_left_before_its_first_record(config: Config) -> None:
    """A kill between the temporary file and its renaming leaves only that file; the same command must go on from there."""
    run = open_run(config, **DIGESTS)
    (run.path / "run.json").rename(run.path / ".run.json.0123abcd.tmp")
    assert open_run(config, **DIGESTS).status == "running"


# --- run.json ---------------------------------------------------------------------------------------------------------------------------


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("owner", "call"), [(files.os, "replace"), (files.os, "fsync"), (Path, "write_text")])
def test_update_on_a_full_disk_leaves_run_json_whole(config: Config, monkeypatch: pytest.MonkeyPatch, owner: object, call: str) -> None:
    run = open_run(config, **DIGESTS)
    before = (run.path / "run.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, full_disk)
        with pytest.raises(OSError, match="No space left"):
            run.update(status="done")
    assert (run.path / "run.json").read_bytes() == before and os.listdir(run.path) == ["run.json"]


def test_update_writes_at_once_and_keeps_the_rest(config: Config) -> None:
    run = open_run(config, **DIGESTS)
    run.update(best_step=3)
    assert read_run(run.path).record["best_step"] == 3 and read_run(run.path).config == config


def test_finish_writes_status_error_and_peak_memory(config: Config) -> None:
    run = open_run(config, **DIGESTS)
    run.finish("failed", "the loss must stay finite")
    record = read_run(run.path).record
    assert (record["status"], record["error"]) == ("failed", "the loss must stay finite")
    assert 50e6 < record["peak_memory_bytes"] < 100e9


def test_clock_adds_up_the_seconds_of_a_part(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr(runs.time, "perf_counter", lambda: next(now))
    run = RunFolder(Path("x"), {})
    for _ in range(2):
        with run.clock("loading"):
            pass
    assert run.record["seconds"] == {"loading": 5.0}


def test_clock_counts_no_second_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 3.0, 7.0, 10.0])  # outer from 0 to 10, inner from 3 to 7
    monkeypatch.setattr(runs.time, "perf_counter", lambda: next(now))
    run = RunFolder(Path("x"), {})
    with run.clock("training"), run.clock("evaluation"):
        pass
    assert run.record["seconds"] == {"evaluation": 4.0, "training": 6.0}


def test_update_in_the_middle_of_a_part_keeps_its_seconds_until_then_and_none_is_counted_twice(config, monkeypatch) -> None:
    run = open_run(config, **DIGESTS)
    now = iter([0.0, 3.0, 4.0, 7.0, 10.0])
    monkeypatch.setattr(runs.time, "perf_counter", lambda: next(now))
    with run.clock("training"), run.clock("evaluation"):
        run.update()
        assert read_run(run.path).record["seconds"] == {"training": 3.0, "evaluation": 1.0}
    assert run.record["seconds"] == {"training": 6.0, "evaluation": 4.0}


def test_clock_keeps_the_time_of_a_part_that_fails() -> None:
    run = RunFolder(Path("x"), {})
    with pytest.raises(ValueError, match="no"), run.clock("loading"):
        raise ValueError("no")
    assert "loading" in run.record["seconds"]


def test_read_run_names_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be a run folder"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", '{"status": "run', "\0\0\0", "[]", "{}", '{"status": "done"}'])
def test_read_run_names_a_run_json_that_is_spoilt(config: Config, text: str) -> None:
    run = open_run(config, **DIGESTS)
    (run.path / "run.json").write_text(text)
    with pytest.raises(UserError, match="run.json"):
        read_run(run.path).config  # noqa: B018


@pytest.mark.parametrize(
    "spoil",
    [
        lambda plain: plain["method"].update(_target_="os.system"),
        lambda plain: plain["method"].update(name="os.system"),
        lambda plain: plain["base"].update(name="dreambooth.config.Config"),
        lambda plain: plain.update(_target_="os.system", cmd="true"),
        lambda plain: plain["optim"].update(name="torch.optim.AdamW"),
        lambda plain: plain.update(method="os.system"),
    ],
)
def test_config_of_a_run_can_name_no_python_object(config: Config, spoil: Callable[[dict], None]) -> None:
    run = open_run(config, **DIGESTS)
    plain = to_plain(config)
    spoil(plain)
    edit(run, config=plain)
    with pytest.raises(ConfigError, match="run.json"):
        read_run(run.path).config  # noqa: B018


def test_config_of_a_run_takes_an_interpolation_for_no_more_than_text_or_refuses_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder comes from other people: its config must not read this machine's environment."""
    monkeypatch.setenv("SECRET", "password")
    plain = to_plain(config)
    plain["group"] = "${oc.env:SECRET}"
    try:
        group = from_plain(plain).group
    except ConfigError:
        return
    assert "password" not in group


# --- weights ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(make_config: MakeConfig, tiny_folder: Callable[..., Path], tmp_path: Path) -> tuple[RunFolder, dict[str, torch.Tensor]]:
    """A run with weights at step 7 on a base that a test may spoil, and the weights."""
    folder = shutil.copytree(tiny_folder(), tmp_path / "base")
    config = make_config({"base.path": str(folder), "method.train_token": True})
    run = open_run(config, **DIGESTS | {"base": config.base.digest()})
    base = config.base.load()
    config.method.attach(base, config.subject.identifier)
    with torch.no_grad():
        for k, parameter in enumerate(p for p in base.parameters() if p.requires_grad):
            parameter += 0.01 * (k + 1)
    save_weights(run, "best", base, 7)
    return run, {name: tensor.clone() for name, tensor in trainable_state(base).items()}


def test_load_gives_the_saved_weights_and_their_step(trained: tuple[RunFolder, dict]) -> None:
    run, state = trained
    found = load(run.path)
    loaded = trainable_state(found.base)
    assert found.step == 7 and found.config == run.config
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_load_base_gives_the_untuned_model(trained: tuple[RunFolder, dict]) -> None:
    run, _ = trained
    found = load(run.path, "base")
    plain = StableDiffusion(path=run.config.base.path).load()
    assert found.step == 0 and torch.equal(found.base.unet.conv_in.weight, plain.unet.conv_in.weight)


def test_load_weights_brings_other_weights_into_the_same_model(trained: tuple[RunFolder, dict]) -> None:
    run, state = trained
    found = load(run.path, "base")
    assert load_weights(run, "best", found.base) == 7
    assert torch.equal(trainable_state(found.base)["unet.conv_in.weight"], state["unet.conv_in.weight"])


def test_load_refuses_a_base_that_changed_since(trained: tuple[RunFolder, dict]) -> None:
    run, _ = trained
    scheduler = Path(run.config.base.path) / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.012", "0.013"))
    with pytest.raises(UserError, match="was trained on another base than the one now at base.path"):
        load(run.path)


def test_load_follows_a_base_that_moved_with_its_content(trained: tuple[RunFolder, dict], tmp_path: Path) -> None:
    run, _ = trained
    moved = Path(run.config.base.path).rename(tmp_path / "elsewhere")
    plain = to_plain(run.config)
    plain["base"]["path"] = str(moved)
    edit(run, config=plain)
    assert load(run.path).step == 7


def test_load_names_weights_that_are_not_there_and_the_status(trained: tuple[RunFolder, dict]) -> None:
    run, _ = trained
    with pytest.raises(UserError, match=r"final\.safetensors does not exist; the run is 'running'"):
        load(run.path, "final")


def test_load_names_a_file_of_weights_that_is_cut_off(trained: tuple[RunFolder, dict]) -> None:
    run, _ = trained
    path = run.path / "checkpoints" / "best.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"best\.safetensors must be a whole safetensors file"):
        load(run.path)


def test_load_names_a_safetensors_file_that_another_program_wrote(trained: tuple[RunFolder, dict]) -> None:
    run, state = trained
    files.write_tensors(run.path / "checkpoints" / "best.safetensors", state, {"format": "pt"})
    with pytest.raises(UserError, match=r"best\.safetensors"):
        load(run.path)


def test_save_weights_keeps_the_old_file_when_the_disk_is_full(trained: tuple[RunFolder, dict], monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = trained
    base = load(run.path).base
    path = run.path / "checkpoints" / "best.safetensors"
    before = path.read_bytes()
    monkeypatch.setattr(files.os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_weights(run, "best", base, 9)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["best.safetensors"]


def test_save_weights_gives_the_same_bytes_for_the_same_weights(trained: tuple[RunFolder, dict]) -> None:
    run, _ = trained
    base = load(run.path).base
    first, second = (save_weights(run, name, base, 7).read_bytes() for name in ("best", "final"))
    assert first == second


def test_resume_state_is_none_until_there_is_one(config: Config) -> None:
    run = open_run(config, **DIGESTS)
    assert run.resume_state is None
    (run.path / "checkpoints").mkdir()
    (run.path / "checkpoints" / "last.ckpt").write_bytes(b"x")
    assert run.resume_state == run.path / "checkpoints" / "last.ckpt"


# --- metrics.csv ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def metrics(tmp_path: Path) -> MetricsFile:
    return MetricsFile(tmp_path / "metrics.csv")


def test_metrics_append_writes_rows_at_once(metrics: MetricsFile) -> None:
    metrics.append(1, {"train/loss": 0.5})
    metrics.append(2, {"train/loss": 0.25})
    assert metrics.path.read_text().splitlines() == ["step,train/loss", "1,0.5", "2,0.25"]


def test_metrics_append_of_a_new_column_keeps_the_old_rows(metrics: MetricsFile) -> None:
    metrics.append(1, {"train/loss": 0.5})
    metrics.append(1, {"score/drift": 0.1})
    metrics.append(2, {"train/loss": 0.25})
    assert metrics.path.read_text().splitlines() == ["step,train/loss,score/drift", "1,0.5,", "1,,0.1", "2,0.25,"]


def test_metrics_append_goes_on_with_the_columns_of_an_earlier_process(metrics: MetricsFile) -> None:
    metrics.append(1, {"train/loss": 0.5, "score/drift": 0.1})
    MetricsFile(metrics.path).append(2, {"score/drift": 0.2})
    assert metrics.path.read_text().splitlines() == ["step,train/loss,score/drift", "1,0.5,0.1", "2,,0.2"]


def test_metrics_truncate_drops_what_came_after_the_step(metrics: MetricsFile) -> None:
    for step in range(1, 12):
        metrics.append(step, {"train/loss": step / 2})
    metrics.truncate(9)
    assert [int(row["step"]) for row in metrics.read()] == list(range(1, 10))


def test_metrics_truncate_keeps_all_rows_of_its_step(metrics: MetricsFile) -> None:
    metrics.append(3, {"train/loss": 0.5})
    metrics.append(3, {"score/drift": 0.1})
    metrics.truncate(3)
    assert len(metrics.read()) == 2


def test_metrics_truncate_below_zero_empties_the_file(metrics: MetricsFile) -> None:
    metrics.append(0, {"score/drift": 0.1})
    metrics.truncate(-1)
    assert metrics.read() == []


def test_metrics_append_after_truncate_writes_readable_rows(metrics: MetricsFile) -> None:
    metrics.append(0, {"score/drift": 0.1})
    metrics.truncate(-1)
    again = MetricsFile(metrics.path)
    again.append(1, {"train/loss": 0.5})
    assert [{key: value for key, value in row.items() if value} for row in again.read()] == [{"step": "1", "train/loss": "0.5"}]


def test_metrics_file_that_is_missing_reads_as_empty(metrics: MetricsFile) -> None:
    assert metrics.read() == []


@pytest.mark.parametrize("cut", range(1, 14))
def test_metrics_read_leaves_out_a_last_line_that_was_cut_off(metrics: MetricsFile, cut: int) -> None:
    r"""Wherever a crash cut the last line, "2,0.25,0.125\r\n", its beginning must not pass for numbers that were measured."""
    metrics.append(1, {"train/loss": 0.5, "score/drift": 0.75})
    metrics.append(2, {"train/loss": 0.25, "score/drift": 0.125})
    metrics.path.write_bytes(metrics.path.read_bytes()[:-cut])
    whole = {"step": "2", "train/loss": "0.25", "score/drift": "0.125"}
    assert [row for row in metrics.read() if row["step"] != "1"] in ([], [whole])


def test_metrics_continued_after_a_cut_off_line_hold_whole_rows_only(metrics: MetricsFile) -> None:
    metrics.append(1, {"train/loss": 0.5, "score/drift": 0.75})
    metrics.append(2, {"train/loss": 0.25, "score/drift": 0.125})
    metrics.path.write_bytes(metrics.path.read_bytes()[:-9])
    again = MetricsFile(metrics.path)
    again.truncate(2)
    again.append(2, {"train/loss": 0.25, "score/drift": 0.125})
    rows = [(row["step"], row["train/loss"], row["score/drift"]) for row in again.read()]
    assert rows == [("1", "0.5", "0.75"), ("2", "0.25", "0.125")]


def test_metrics_new_column_on_a_full_disk_loses_no_row(metrics: MetricsFile, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics.append(1, {"train/loss": 0.5})
    before = metrics.path.read_bytes()
    monkeypatch.setattr(files.os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        metrics.append(2, {"score/drift": 0.1})
    assert metrics.path.read_bytes() == before
