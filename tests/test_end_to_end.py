"""The main job on the lab, a few steps long: what lies in the run folder, and all that takes it up afterwards."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import wandb
from PIL import Image
from safetensors.torch import load_file
from small_runs import composed, make_photos, run, typed, weights
from wandb_records import read_offline_run

import evaluate as evaluate_script
import generate as generate_script
from dreambooth import cli
from dreambooth.__main__ import main as command
from dreambooth.config import EvaluateConfig, GenerateConfig, Sampling, Tracking, to_plain
from dreambooth.dashboard import workspace
from dreambooth.errors import UserError
from dreambooth.generation import read_recipe
from dreambooth.metrics_csv import MetricsFile
from dreambooth.report.data import read_study
from dreambooth.runs import RunFolder, load

LAB = ("trainer.max_steps=4", "trainer.eval_every=2", "wandb.mode=offline")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run on the built-in base and subject."""
    folder = run(*LAB, f"output_dir={tmp_path_factory.mktemp('lab')}")
    wandb.finish()  # as train.py does after each job
    return folder


def test_run_folder_says_what_was_done(done: RunFolder) -> None:
    record = json.loads((done.path / "run.json").read_text())
    assert record["status"] == "done" and record["error"] is None and record["steps"] == 4
    assert record["config"]["trainer"]["max_steps"] == 4 and record["config"]["optim"]["learning_rate"] == 4e-4
    assert all(len(record["digests"][key]) == 64 for key in ("base", "photos", "class_images"))
    assert record["versions"]["torch"] and record["peak_memory_bytes"] > 1e8
    assert {"class images", "training", "evaluation while training", "final scores"} <= record["seconds"].keys()


def test_metrics_hold_every_loss_and_every_evaluation(done: RunFolder) -> None:
    rows = MetricsFile(done.path / "metrics.csv").read()
    losses = {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]}
    scores = {int(row["step"]): float(row["score/identity_fidelity"]) for row in rows if row["score/identity_fidelity"]}
    assert sorted(losses) == [1, 2, 3, 4] and sorted(scores) == [0, 2, 4]
    first = next(row for row in rows if row["train/loss"])
    assert float(first["train/loss"]) == pytest.approx(float(first["train/subject_loss"]) + float(first["train/prior_loss"]), rel=1e-6)


def test_scores_have_a_row_an_arm_with_intervals_and_references(done: RunFolder) -> None:
    scores = json.loads((done.path / "scores.json").read_text())
    rows = {row["arm"]: row for row in scores["rows"]}
    assert rows["base"]["step"] == 0 and rows["best"]["step"] == done.record["best_step"]
    interval = rows["best"]["identity_fidelity_interval"]
    assert interval["low"] <= rows["best"]["identity_fidelity"] <= interval["high"] and interval["unit"] == "prompt" and interval["n"] == 4
    assert scores["references"]["ground_truth"]["identity_fidelity"] > 0.7
    assert "sha256" in scores["evaluator"]


def test_per_image_scores_average_to_the_scores(done: RunFolder) -> None:
    table = pd.read_parquet(done.path / "scores.parquet")
    row = next(row for row in json.loads((done.path / "scores.json").read_text())["rows"] if row["arm"] == "best")
    best = table[table.arm == "best"]
    assert best[best.kind == "subject"].identity.mean() == pytest.approx(row["identity_fidelity"], abs=1e-5)
    assert best[best.kind == "class"].identity.mean() == pytest.approx(row["drift"], abs=1e-5)


def test_samples_carry_their_recipe(done: RunFolder) -> None:
    images = sorted((done.path / "samples" / "step-000002").glob("subject-*.png"))
    recipe = read_recipe(images[0])
    assert recipe["step"] == 2 and "sks dog" in recipe["prompt"] and recipe["run"] == done.path.name


def test_evaluations_draw_with_the_same_noise_at_every_step(done: RunFolder) -> None:
    steps = [sorted((done.path / "samples" / f"step-{step:06d}").glob("*.png")) for step in (0, 2, 4)]
    assert [[path.name for path in step] for step in steps[1:]] == [[path.name for path in steps[0]]] * 2
    assert all(read_recipe(a)["key"] == read_recipe(b)["key"] for a, b in zip(steps[0], steps[2], strict=True))


def test_grid_shows_the_photos_and_every_arm(done: RunFolder) -> None:
    with Image.open(done.path / "samples" / "final_grid.png") as grid:
        assert grid.width > 900 and grid.height > 400


def test_another_experiment_takes_a_run_that_is_done(done: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    taken = run(*LAB, f"output_dir={done.path.parents[1]}", "group=other")
    assert f"done before: {taken.path} (taken from {done.path})" in capsys.readouterr().out
    assert taken.path == done.path.parents[1] / "other" / done.path.name and taken.config.group == "other"
    assert (taken.path / "scores.json").read_bytes() == (done.path / "scores.json").read_bytes()
    wandb.finish()
    own, shown = (read_offline_run(path) for path in (done.path, taken.path))
    assert (shown["group"], shown["name"]) == ("other", own["name"])
    assert _scalars(shown) == _scalars(own) and len(_scalars(own)) > 20
    keys = {key for row in shown["history"] for key in row}
    assert {"samples/selection.count", "final/grid.count"} <= keys and any(key.startswith("final/scores.") for key in keys)
    shutil.rmtree(taken.path.parent)


def _scalars(mirror: dict) -> dict[tuple[int, str], float]:
    """Returns what a W&B run holds by step and name, without Lightning's own numbers and what is not finite."""
    return {
        (row["trainer/global_step"], key): row[key]
        for row in mirror["history"]
        for key in row
        if key.startswith(("train/", "score/")) and isinstance(row[key], float) and np.isfinite(row[key])
    }


def test_wandb_mirror_holds_scalars_config_group_grids_and_table(done: RunFolder) -> None:
    mirror = read_offline_run(done.path)
    logged = {key.partition(".")[0] for row in mirror["history"] for key in row}  # an image or a table is several keys: name.path, name.width
    assert mirror["group"] == "default" and mirror["project"] == "dreambooth" and mirror["name"] == done.path.name
    assert mirror["config"]["optim"]["learning_rate"] == 4e-4
    assert {"train/loss", "score/identity_fidelity", "samples/selection", "final/scores", "final/grid"} <= logged


def test_dashboard_draws_only_what_a_run_logged(done: RunFolder) -> None:
    spec = workspace(read_study([done.path.parent]), Tracking(mode="online", entity="lab"))._to_model().model_dump(by_alias=True)
    mirror = read_offline_run(done.path)
    logged = {key.partition(".")[0] for row in [*mirror["history"], mirror["summary"]] for key in row}
    drawn = set(re.findall(r"(?:train|score|samples|final)/[a-z0-9_/]+", str(spec)))
    assert {"train/prior_loss", "score/drift", "samples/selection", "final/grid", "final/best/drift"} <= drawn
    assert drawn <= logged, sorted(drawn - logged)


def test_same_command_again_skips_what_is_done(done: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    before = (done.path / "run.json").read_text()
    again = run(*LAB, f"output_dir={done.path.parents[1]}")
    assert again.path == done.path and "done before" in capsys.readouterr().out
    assert (done.path / "run.json").read_text() == before


def test_evaluate_gives_the_scores_of_the_run_again(done: RunFolder) -> None:
    before = json.loads((done.path / "scores.json").read_text())
    evaluate_script.evaluate(EvaluateConfig(run=str(done.path), accelerator="cpu"))
    assert json.loads((done.path / "scores.json").read_text()) == before


def test_evaluate_on_other_prompts_leaves_the_scores_of_the_run(done: RunFolder) -> None:
    before = (done.path / "scores.json").read_text()
    config = EvaluateConfig(run=str(done.path), arms=["best"], prompts=["a photo of a {subject} on the beach"], images=3, accelerator="cpu")
    scores = evaluate_script.evaluate(config)
    assert scores["evaluation"]["final_prompts"] == ["a photo of a {subject} on the beach"]
    assert scores["rows"][0]["identity_fidelity_interval"]["low"] is None  # one prompt gives no interval
    assert (done.path / "scores.json").read_text() == before and len(list(done.path.glob("scores-*.json"))) == 1


def test_generate_draws_the_same_image_for_the_same_seed(done: RunFolder, tmp_path: Path) -> None:
    one = GenerateConfig(run=str(done.path), prompt="a photo of a {subject}", images=1, output=str(tmp_path / "a"), sampling=Sampling(steps=2))
    two = GenerateConfig(run=str(done.path), prompt="a photo of a {subject}", images=3, output=str(tmp_path / "b"), sampling=Sampling(steps=2))
    first, second = generate_script.draw(one)[0], generate_script.draw(two)[0]
    assert np.abs(np.asarray(Image.open(first)).astype(int) - np.asarray(Image.open(second))).max() <= 1
    assert read_recipe(first)["prompt"] == "a photo of a sks dog"


def test_generate_warns_when_the_prompt_forgets_the_class_noun(done: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate_script.draw(GenerateConfig(run=str(done.path), prompt="a photo of sks", images=1, output=str(tmp_path), sampling=Sampling(steps=2)))
    assert "does not name 'dog'" in capsys.readouterr().out


def test_exported_folder_is_the_tuned_model_in_a_stock_pipeline(done: RunFolder, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    assert command(["export", str(done.path), str(tmp_path / "model"), "--dtype", "fp32"]) == 0
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    ours = load(done.path, "best").base
    prompts = ["a photo of a sks dog in the snow"]
    ids = stock.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(stock.text_encoder(ids)[0], ours.encode_prompts(prompts))
    theirs = stock.unet.state_dict()
    assert [name for name, tensor in ours.unet.state_dict().items() if not torch.equal(tensor, theirs[name])] == []


def test_export_to_a_single_file_is_read_back_and_checked(done: RunFolder, tmp_path: Path) -> None:
    assert command(["export", str(done.path), str(tmp_path / "model.safetensors")]) == 0
    assert any(key.startswith("model.diffusion_model.") for key in load_file(tmp_path / "model.safetensors"))


def test_training_moved_the_declared_parts_and_nothing_else(done: RunFolder) -> None:
    parts = {name.split(".")[0] for name in weights(done)}
    assert parts == {"unet", "text_encoder"} and any(name.endswith("token_embedding.rows") for name in weights(done))


def test_real_photos_on_a_diffusers_folder_run_to_the_end(tiny_folder, tmp_path: Path) -> None:
    real = Path(__file__).resolve().parents[2] / "shared" / "dreambench" / "dog6"
    photos = real if real.is_dir() else make_photos(tmp_path / "photos", 5, (640, 512))
    words = ["prior.num_images=2", "sampling.steps=2", "trainer.max_steps=2", "evaluation.class_images=1", "evaluation.final_images=1"]
    result = typed(f"base.path={tiny_folder()}", f"data.subject_dir={photos}", "subject.class_noun=dog", f"output_dir={tmp_path}", *words)
    assert result.returncode == 0, result.stderr
    done = RunFolder(next((tmp_path / "default").iterdir()), {})
    assert json.loads((done.path / "run.json").read_text())["status"] == "done"
    assert json.loads((done.path / "scores.json").read_text())["missing"]  # no CLIP and DINO here: pictures, and it says so
    assert "no scores" in result.stdout and "python generate.py" in result.stdout


def test_multirun_trains_every_job_skips_what_is_done_and_outlives_a_failure(tiny_folder, tmp_path: Path) -> None:
    words = ["-m", f"base.path={tiny_folder()}", f"data.subject_dir={make_photos(tmp_path / 'photos')}", "subject.class_noun=dog"]
    words += [
        f"output_dir={tmp_path / 'runs'}",
        "prior=none",
        "sampling.steps=1",
        "evaluation.class_images=1",
        "evaluation.final_images=1",
        "wandb.mode=disabled",
    ]
    first = typed(*words, "optim.learning_rate=1e-4,-1,2e-4", "trainer.max_steps=1")
    assert first.returncode == 1 and "optim.learning_rate must be 0 or more" in first.stderr
    assert len(list((tmp_path / "runs" / "default").iterdir())) == 2
    second = typed(*words, "optim.learning_rate=1e-4,2e-4", "trainer.max_steps=1,2")
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("done before: ") == 2
    records = [json.loads(path.read_text()) for path in (tmp_path / "runs" / "default").glob("*/run.json")]
    assert sorted((r["config"]["optim"]["learning_rate"], r["steps"]) for r in records) == [(1e-4, 1), (1e-4, 2), (2e-4, 1), (2e-4, 2)]


def test_full_disk_is_one_sentence_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("dreambooth.files.shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="output_dir must be on a disk with .* GB free"):
        run(*LAB, "wandb.mode=disabled", "prior=none", f"output_dir={tmp_path}")


def test_disk_that_fills_up_in_the_middle_is_one_sentence_and_the_run_goes_on_later(
    tiny_folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = [f"base.path={tiny_folder()}", f"data.subject_dir={make_photos(tmp_path / 'photos')}", "subject.class_noun=dog", "prior=none"]
    words += [f"output_dir={tmp_path / 'runs'}", "trainer.max_steps=2", "trainer.eval_every=1"]

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device", "best.safetensors")

    with monkeypatch.context() as patched, pytest.raises(OSError) as caught:
        patched.setattr("safetensors.torch.save_file", full)
        run(*words)
    assert "got a full disk" in cli.explain(caught.value)
    failed = next((tmp_path / "runs" / "default").iterdir())
    assert "full disk" in json.loads((failed / "run.json").read_text())["error"]
    assert run(*words).status == "done"


def test_loss_that_is_not_finite_stops_the_run_naming_the_step(tiny_folder, tmp_path: Path) -> None:
    words = [f"base.path={tiny_folder()}", f"data.subject_dir={make_photos(tmp_path / 'photos')}", "subject.class_noun=dog", "prior=none"]
    with pytest.raises(UserError, match="the loss must stay finite, at step"):
        run(*words, "optim.learning_rate=1e30", "trainer.max_steps=20", "trainer.eval_every=20", f"output_dir={tmp_path / 'runs'}")


def test_seed_zero_is_a_seed(tiny_folder, tmp_path: Path) -> None:
    assert to_plain(composed("seed=0"))["seed"] == 0 and composed("evaluation.seed=0").evaluation.seed == 0
