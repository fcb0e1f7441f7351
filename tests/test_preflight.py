"""What is said and refused before a run costs anything, and what is said after ten steps."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import run
from tiny_pipelines import build_tokenizer

from dreambooth.base.protocol import BaseModel
from dreambooth.base.stable_diffusion import StableDiffusion
from dreambooth.caches import make_caches
from dreambooth.config import Config, fingerprint, to_plain
from dreambooth.data import DreamBoothData, ImageSet, subject_set
from dreambooth.encoders import ClipDino
from dreambooth.errors import ConfigError, UserError
from dreambooth.first_steps import TimeLeft, duration, time_left
from dreambooth.interop.names import joepenna_name
from dreambooth.memory import Memory, estimate
from dreambooth.memory_cuts import CUTS, find_cuts
from dreambooth.metrics_csv import MetricsFile
from dreambooth.preflight import before_loading, cache_needed, check_disk, check_memory, disk_needed, prompt_findings, require_writable
from dreambooth.subject_photos import SubjectPhotos

MEGA = 10**6
WORDS = ["photo", "dog", "robot", "beach", "jungle", "mountain", "backpack", "teapot", "qzv", "sks"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_tokenizer(tmp_path_factory.mktemp("tokens"), WORDS)


def findings(config: Config, tokenizer: Any, *prompts: str) -> list[str]:
    return prompt_findings(config, tokenizer, prompts)


@pytest.mark.parametrize(("word", "told"), [("qzvy", "3 tokens, qz + v + y"), ("dog", "common word"), ("sks", "it means something: a rifle")])
def test_preflight_warns_of_an_identifier_that_is_not_free(make_config: Callable[..., Config], tokenizer: Any, word: str, told: str) -> None:
    (sentence,) = findings(make_config({"subject.identifier": word}), tokenizer, f"a photo of a {word} dog")
    assert told in sentence and sentence.startswith("subject.identifier") and "python -m dreambooth tokens" in sentence


def test_preflight_has_nothing_to_say_of_a_rare_token(make_config: Callable[..., Config], tokenizer: Any) -> None:
    assert findings(make_config({"subject.identifier": "qzv"}), tokenizer, "a photo of a qzv dog", "a photo of a robot") == []


@pytest.mark.parametrize(("name", "part"), [("textual_inversion", "method"), ("pivotal_tuning", "method.inversion")])
@pytest.mark.parametrize(
    ("word", "setting"), [("<rex>", {}), ("<rex>", {"new_token": True}), ("sks", {"num_vectors": 2}), ("sks", {"new_token": True})]
)
def test_preflight_leaves_a_word_that_becomes_a_token_of_its_own(
    make_config: Callable[..., Config], tokenizer: Any, name: str, part: str, word: str, setting: dict[str, Any]
) -> None:
    """Asked for, or with new_token=null where the word is split or stands for several vectors."""
    settings = {f"{part}.{key}": value for key, value in setting.items()}
    config = make_config({"subject.identifier": word, "method.name": name, "trainer.max_steps": 10} | settings)
    assert findings(config, tokenizer, f"a photo of a {word} dog") == []


@pytest.mark.parametrize(("name", "part"), [("textual_inversion", "method"), ("pivotal_tuning", "method.inversion")])
@pytest.mark.parametrize(("word", "setting", "told"), [("sks", {}, "a rifle"), ("qzvy", {"new_token": False}, "3 tokens")])
def test_preflight_warns_of_a_word_whose_own_rows_learn(
    make_config: Callable[..., Config], tokenizer: Any, name: str, part: str, word: str, setting: dict[str, Any], told: str
) -> None:
    settings = {f"{part}.{key}": value for key, value in setting.items()}
    config = make_config({"subject.identifier": word, "method.name": name, "trainer.max_steps": 10} | settings)
    (sentence,) = findings(config, tokenizer, f"a photo of a {word} dog")
    assert told in sentence


def test_preflight_warns_of_a_prompt_without_the_class(make_config: Callable[..., Config], tokenizer: Any) -> None:
    config = make_config({"subject.identifier": "qzv"})
    (sentence,) = findings(config, tokenizer, "a photo of a qzv", "a qzv dog", "qzv dogs", "qzv on the moon")
    assert "'a photo of a qzv' (and 1 more) names qzv without its class, dog" in sentence


@pytest.mark.parametrize("prompt", ["a photo of qzv, smiling", "a photo (qzv)", "QZV.", "qzv's photo"])
def test_preflight_sees_the_word_beside_marks(make_config: Callable[..., Config], tokenizer: Any, prompt: str) -> None:
    (sentence,) = findings(make_config({"subject.identifier": "qzv"}), tokenizer, prompt, "a photo of qzvx")
    assert f"the prompt {prompt!r} names qzv without its class" in sentence


def test_preflight_refuses_a_prompt_that_is_too_long_before_any_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StableDiffusion, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match="tokens long"):
        run(f"evaluation.final_prompts=['{{subject}} {'on the moon ' * 40}']", f"output_dir={tmp_path}")


def test_preflight_says_which_scorers_are_missing(make_config: Callable[..., Config], tmp_path: Path) -> None:
    config = make_config({"subject.identifier": "purple"})
    config.encoders = ClipDino(clip_path=str(tmp_path / "none"))
    assert any("no scores" in line and "encoders.clip_path" in line for line in before_loading(config, ["a photo of a purple dog"]))


def test_preflight_loads_the_tokenizer_that_the_model_comes_with(tiny_folder: Callable[..., Path], shared_base: BaseModel) -> None:
    own = StableDiffusion(path=str(tiny_folder())).load_tokenizer()
    assert own.get_vocab() == shared_base.tokenizer.get_vocab() and own.model_max_length == shared_base.tokenizer.model_max_length == 77


def test_require_writable_refuses_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("x")
    with pytest.raises(UserError, match=r"^output_dir must be a folder that can be written into"):
        require_writable(tmp_path / "runs")


def test_require_writable_makes_the_folder_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "runs")
    assert list((tmp_path / "a" / "runs").iterdir()) == []


def test_disk_needed_adds_up_by_hand(make_config: Callable[..., Config]) -> None:
    config = make_config({"trainer.max_steps": 250, "trainer.eval_every": 100, "wandb.mode": "disabled"})
    disk = disk_needed(config, Memory(9, 100, 200, 0, 10, 5, 6), class_images=3)
    picture = 64 * 64 * 3
    selection, final = 4 * 2 + 8, 4 * 4 + 8 + 3 * 2  # the recipe's prompts x images, the class, other classes
    evaluations = 4  # at 0, 100, 200 and 250
    assert disk.checkpoints == 2 * 100 + 100 + 2 * 310  # best, final, one of them anew; two states of weights, moments and average
    assert disk.pictures == 2 * picture * (evaluations * selection + 3 * final)
    assert (disk.class_images, disk.wandb) == (3 * picture, 0)


def test_disk_needed_counts_the_whole_checkpoints_of_a_run_that_is_shared_out(make_config: Callable[..., Config]) -> None:
    shared = make_config({"trainer.sharding": True, "trainer.devices": 4})
    assert (
        disk_needed(shared, Memory(9, 25, 50, 0, 0, 5, 6), 0).checkpoints
        == disk_needed(make_config(), Memory(9, 100, 200, 0, 0, 5, 6), 0).checkpoints
    )


def written_cache(config: Config, base: BaseModel, photos: SubjectPhotos, class_images: int) -> int:
    """Bytes that the cache of a whole run leaves in its folder, by asking for all its samples."""
    noise = np.random.default_rng(1).integers(0, 256, (class_images, 64, 64, 3), dtype=np.uint8)
    bank = ImageSet([Image.fromarray(image) for image in noise], [f"a dog {k}" for k in range(class_images)])
    folder = Path(config.output_dir) / "caches"
    caches = make_caches(base, "disk", folder, config.data.cache_mb * MEGA, config.data.cache_dtype)
    for batch in DreamBoothData(config, subject_set(photos, False), bank).train_dataloader():
        latents = base.latent_shape(*batch.pixel_values.shape[-2:])
        caches.latents(batch.pixel_values, batch.contents, torch.zeros(len(batch.prompts), *latents))
        caches.embeddings(batch.prompts)
    return sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))


@pytest.mark.parametrize("changes", [{}, {"data.flip": True}, {"data.crop": "random"}, {"data.buckets": True}, {"data.cache_dtype": "float16"}])
def test_cache_needed_is_what_the_cache_of_a_run_writes(make_config: Callable[..., Config], shared_base: BaseModel, changes: dict) -> None:
    settings = {"data.cache": "disk", "data.batch_size": 2, "prior.batch_size": 2, "trainer.max_steps": 40}
    config, rng = make_config(settings | changes), np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in ((96, 64, 3), (64, 96, 3), (64, 97, 3))]
    photos = SubjectPhotos(images, list("abc"), "", [], "", captions=["a", "b", "c"])
    needed = cache_needed(config, shared_base, photos, 4, [*photos.captions, *(f"a dog {k}" for k in range(4))])
    written = written_cache(config, shared_base, photos, 4)
    least = 0.4 if config.data.crop == "random" else 0.75  # crops of images this small come again
    assert least * needed <= written <= needed


def test_cache_needed_is_bounded_by_what_is_left_of_cache_mb(make_config: Callable[..., Config], shared_base: BaseModel) -> None:
    photos = SubjectPhotos([Image.new("RGB", (64, 64))], ["a"], "", [], "", captions=["a"])
    config = make_config({"data.cache": "disk", "data.cache_mb": 1, "trainer.max_steps": 10**5, "data.crop": "random"})
    assert cache_needed(config, shared_base, photos, 0, []) == MEGA
    entry = Path(config.output_dir) / "caches" / "ab" / "abc.safetensors"
    entry.parent.mkdir(parents=True)
    entry.write_bytes(b"x" * 400_000)
    assert cache_needed(config, shared_base, photos, 0, []) == MEGA - 400_000
    assert cache_needed(make_config({"data.cache": "memory"}), shared_base, photos, 0, []) == 0
    disk = disk_needed(config, Memory(0, 0, 0, 0, 0, 0, 0), 0, cache=600_000)
    assert disk.cache == 600_000 and "cache 1 MB" in disk.describe() and disk.total == sum(disk[:-1]) + 600_000


def test_check_disk_refuses_a_disk_that_is_too_full(make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int = 2 * 10**9

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage())
    config, memory = make_config(), Memory(0, 300 * MEGA, 600 * MEGA, 0, 0, 0, 0)
    with pytest.raises(UserError, match=r"^output_dir must be on a disk with 2\.\d+ GB free for this run \(checkpoints 2\.70 GB"):
        check_disk(config, tmp_path, memory, 0)
    (tmp_path / "last.ckpt").write_bytes(b"\0" * MEGA)
    with (tmp_path / "last.ckpt").open("r+b") as file:
        file.truncate(900 * MEGA)  # sparse: what a run wrote before it was cut off
    assert check_disk(config, tmp_path, memory, 0).startswith("disk: at most 2.7")


def test_check_memory_says_the_parts_of_a_run_that_fits(make_config: Callable[..., Config], shared_base: BaseModel) -> None:
    memory, (line,) = check_memory(make_config(), shared_base, "cpu", available=10**9)
    assert memory == estimate(make_config(), shared_base)
    assert all(part in line for part in ("weights", "gradients", "optimizer", "activations", "1.00 GB can be had"))


def test_check_memory_warns_with_the_cuts_that_make_it_fit(make_config: Callable[..., Config], shared_base: BaseModel) -> None:
    config = make_config({"trainer.ema_decay": 0.9})
    total = estimate(config, shared_base).total
    _, (_, warning) = check_memory(config, shared_base, "cpu", available=total)
    assert warning.startswith("warning: it may run out of memory") and "saves" in warning and warning.endswith("which fits")


def test_check_memory_refuses_what_cannot_fit_by_far(make_config: Callable[..., Config], shared_base: BaseModel) -> None:
    config = make_config()
    total = estimate(config, shared_base).total
    with pytest.raises(UserError, match=r"must fit into the .* method=lora .*still too much: take a larger machine"):
        check_memory(config, shared_base, "cpu", available=total // 20)


def test_cuts_save_what_a_run_with_them_needs_less(make_config: Callable[..., Config], shared_base: BaseModel) -> None:
    config = make_config({"trainer.ema_decay": 0.9})
    own = estimate(config, shared_base).total
    by_hand = {
        "method=lora": {"trainer.ema_decay": 0.9, "method.name": "lora", "method.train_token": False},
        "sampling.batch_size=1": {"trainer.ema_decay": 0.9, "sampling.batch_size": 1},
        "trainer.ema_decay=null": {},
    }
    found = {cut.words: cut for cut in find_cuts(config, shared_base, "cpu", room=0)}
    assert "method=lora" in found
    for words in found.keys() & by_hand.keys():
        assert found[words].saved == own - estimate(make_config(by_hand[words]), shared_base).total
    together = [cut.together for cut in found.values()]
    assert together == sorted(together, reverse=True) and together[0] < own


def test_cuts_of_several_gpus_share_out_what_learns(make_config: Callable[..., Config], shared_base: BaseModel) -> None:
    changes = {word: change for word, _, change in CUTS}
    share, others = changes["trainer.sharding=true"], (changes["optim=adamw8bit"], changes["method=lora"])
    for given, can in (({"trainer.devices": 2}, True), ({}, False), ({"trainer.devices": 2, "method.name": "lora"}, False)):
        config = make_config(given)
        share(config)
        assert config.trainer.sharding is can
        before = to_plain(config)
        if can:  # what excludes it is not advised beside it
            [change(config) for change in others]
            assert to_plain(config) == before


def test_cuts_change_nothing_of_the_config_that_they_are_found_for(make_config: Callable[..., Config], shared_base: BaseModel) -> None:
    config = make_config()
    before = copy.deepcopy(to_plain(config))
    find_cuts(config, shared_base, "cpu", room=0)
    assert to_plain(config) == before


def test_cuts_of_a_cpu_name_nothing_that_needs_a_gpu(make_config: Callable[..., Config], shared_base: BaseModel) -> None:
    found = {cut.words for cut in find_cuts(make_config(), shared_base, "cpu", room=0)}
    assert found and not found & {words for words, needs_gpu, _ in CUTS if needs_gpu}


def test_rehearsal_fails_at_step_0_where_the_state_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pytorch_lightning as pl

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", full_disk)
    with pytest.raises(OSError, match="No space"):
        run("prior=none", "trainer.max_steps=1", "trainer.eval_every=1", f"output_dir={tmp_path}")
    (folder,) = (tmp_path / "default").iterdir()
    assert not [row for row in MetricsFile(folder / "metrics.csv").read() if row.get("train/loss")]
    assert not list(folder.rglob("rehearsal*")) and not (folder / "scores.json").exists()


def test_time_left_adds_steps_evaluations_and_final_scores(make_config: Callable[..., Config]) -> None:
    config = make_config({"trainer.max_steps": 250, "trainer.eval_every": 100})
    final = 4 * 4 + 8 + 3 * 2  # images of the final plan
    left = time_left(config, 10, 0.5, [20.0, 40.0], images=15)  # 2 s an image
    assert left == {"training": 120.0, "evaluations": 3 * 30.0, "final scores": 3 * final * 2.0}


def test_time_left_counts_no_evaluation_that_is_done(make_config: Callable[..., Config]) -> None:
    config = make_config({"trainer.max_steps": 300, "trainer.eval_every": 100})
    assert time_left(config, 205, 1.0, [7.0], images=1)["evaluations"] == 7.0


def told_after(config: Config, steps: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What TimeLeft writes in so many steps of 2 s each, of which the evaluation at step 5 takes 100 s more."""
    clock, lines = SimpleNamespace(now=1000.0), []
    monkeypatch.setattr("dreambooth.first_steps.time.perf_counter", lambda: clock.now)
    monkeypatch.setattr("dreambooth.first_steps.tqdm.write", lines.append)
    selection = SimpleNamespace(seconds=[100.0], plan=[None] * 16)
    watch = TimeLeft(SimpleNamespace(record={"seconds": {"loading": 60.0, "training": 5.0}}), config, selection)
    watch.on_train_start(SimpleNamespace(global_step=0), None)
    clock.now += 100.0  # the evaluation at step 0
    for step in range(1, steps + 1):
        clock.now += 2.0
        if step == 5:
            clock.now += 100.0
            selection.seconds.append(100.0)
        watch.on_train_batch_end(SimpleNamespace(global_step=step), None)
    return lines


def test_time_left_is_told_once_after_ten_steps_without_the_evaluations_in_between(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({"trainer.max_steps": 110, "trainer.eval_every": 110})
    assert told_after(config, 9, monkeypatch) == []
    (line,) = told_after(config, 30, monkeypatch)
    assert "training 3 min" in line and "at 0.50 steps a second" in line and "costs" not in line  # 100 steps of 2 s


def test_time_left_gives_the_cost_of_the_whole_run(make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config({"trainer.max_steps": 110, "trainer.eval_every": 110, "price_per_hour": 2.0})
    (line,) = told_after(config, 12, monkeypatch)
    spent, left = 60 + 220, 200 + 100 + 3 * 30 * 100 / 16  # loading, ten steps and two evaluations; steps, one evaluation, final pictures
    assert f"costs about {2.0 * (spent + left) / 3600:.2f} at 2 an hour" in line


def test_price_is_no_science_and_never_negative(make_config: Callable[..., Config]) -> None:
    plain, paid = (to_plain(make_config({"price_per_hour": price})) for price in (None, 0.79))
    assert fingerprint(plain) == fingerprint(paid)
    with pytest.raises(ConfigError, match="price_per_hour"):
        make_config({"price_per_hour": -1.0})


@pytest.mark.parametrize(("seconds", "told"), [(35.4, "35 s"), (89, "89 s"), (725, "12 min"), (12000, "3 h 20 min")])
def test_duration_is_told_for_people(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_joepenna_name_says_what_is_in_the_file(make_config: Callable[..., Config], tmp_path: Path) -> None:
    config = make_config({"subject.identifier": "ohwx", "subject.class_noun": "old man", "group": "my faces"})
    for name in ("000.png", "001.png", "held_out/000.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    record = {"started": "2022-11-11T08:09:10+00:00", "config": to_plain(config)}
    name = joepenna_name(SimpleNamespace(path=tmp_path, record=record, config=config), 3000)
    assert name == "2022-11-11T08-09-10_my_faces_03000_steps_2_training_images_ohwx_token_old_man_class_word.safetensors"
