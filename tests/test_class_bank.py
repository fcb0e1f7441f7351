"""The class bank: which images, each with a seed of its own, shared by what is equal, continued after a kill, never taken for another."""

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth import class_bank
from dreambooth.base.stable_diffusion import StableDiffusionModel
from dreambooth.claims import alone_in
from dreambooth.class_bank import ClassBank, draw_bank, drawn_digest, plan, recipe_digest
from dreambooth.class_images import bank_digest, complete_bank, read_user_bank, still_to_draw, to_draw, wants_class_images
from dreambooth.config import Config
from dreambooth.errors import UserError
from dreambooth.generation import read_recipe

MakeConfig = Callable[..., Config]
BANK = {"prior.num_images": 5, "prior.prompts": ["a photo of a {subject}", "a {subject} on the grass"], "sampling.batch_size": 2}


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    return make_config(BANK)


@pytest.fixture
def drawn(config: Config, shared_base: StableDiffusionModel) -> ClassBank:
    return draw_bank(config, shared_base, "digest")


def folder(bank: ClassBank) -> Path:
    return bank.images[0].parent


def pixels(bank: ClassBank) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in bank.images]).astype(int)


def contents(bank: ClassBank) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bank.images}


def count_draws(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts of the images that are really drawn from now on."""
    drawn: list[str] = []

    def generate(base: object, prompts: list[str], *rest: object) -> np.ndarray:
        drawn.extend(prompts)
        return original(base, prompts, *rest)

    original = class_bank.generate
    monkeypatch.setattr(class_bank, "generate", generate)
    return drawn


def test_draw_bank_draws_the_number_of_images_that_was_asked_for(drawn: ClassBank) -> None:
    assert [path.name for path in drawn.images] == [f"{k:05d}.png" for k in range(5)]
    assert sorted(os.listdir(folder(drawn))) == [*(f"{k:05d}.png" for k in range(6)), "manifest.json"]  # whole batches


def test_draw_bank_takes_the_prompts_in_turn_with_the_class_and_without_the_identifier(drawn: ClassBank) -> None:
    assert drawn.captions == ["a photo of a dog", "a dog on the grass"] * 2 + ["a photo of a dog"]


def test_draw_bank_draws_images_of_the_training_resolution_that_differ(drawn: ClassBank) -> None:
    images = pixels(drawn)
    assert images.shape == (5, 64, 64, 3)
    assert len({image.tobytes() for image in images}) == 5


def test_draw_bank_writes_what_made_it(config: Config, drawn: ClassBank) -> None:
    manifest = json.loads((folder(drawn) / "manifest.json").read_text())
    assert manifest["base_digest"] == "digest" and manifest["resolution"] == 64
    assert manifest["sampling"] == {"sampler": "ddim", "steps": 2, "guidance_scale": 7.5, "guidance_rescale": 0.0}
    assert manifest["prompts"] == ["a photo of a dog", "a dog on the grass"] and manifest["seed"] == 0


def test_draw_bank_writes_prompt_key_and_base_into_each_image(config: Config, drawn: ClassBank) -> None:
    recipes = [read_recipe(path) for path in drawn.images]
    assert recipes == [{"prompt": item.prompt, "key": list(item.key), "base_digest": "digest"} for item in plan(config)]


def test_draw_bank_lies_beside_the_runs_and_is_named_by_its_content(config: Config, drawn: ClassBank) -> None:
    assert folder(drawn) == Path(config.output_dir) / "class_banks" / f"dog-{recipe_digest(config, 'digest')[:12]}"
    assert drawn.digest == drawn_digest(config, "digest")


def test_plan_gives_each_image_a_key_of_its_own(config: Config) -> None:
    assert len({item.key for item in plan(config)}) == 5


def test_plan_of_more_images_begins_with_the_plan_of_fewer(make_config: MakeConfig) -> None:
    assert plan(make_config(BANK | {"prior.num_images": 9}))[:5] == plan(make_config(BANK))


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_draw_bank_image_k_is_the_same_whatever_the_batch_size(
    make_config: MakeConfig, shared_base: StableDiffusionModel, drawn: ClassBank, tmp_path: Path, batch_size: int
) -> None:
    """To one of 255 levels: a matrix product may round otherwise in a batch of another size."""
    other = make_config(BANK | {"sampling.batch_size": batch_size, "output_dir": str(tmp_path / "other")})
    bank = draw_bank(other, shared_base, "digest")
    assert bank.digest == drawn.digest
    assert np.abs(pixels(bank) - pixels(drawn)).max() <= 1


def test_draw_bank_again_draws_nothing(config: Config, shared_base: StableDiffusionModel, drawn: ClassBank, monkeypatch: pytest.MonkeyPatch) -> None:
    draws, before = count_draws(monkeypatch), contents(drawn)
    again = draw_bank(config, shared_base, "digest")
    assert draws == [] and contents(again) == before and again.digest == drawn.digest


@pytest.mark.parametrize("spoil", ["delete", "truncate", "empty"])
def test_draw_bank_after_a_kill_draws_only_what_is_missing(
    config: Config, shared_base: StableDiffusionModel, drawn: ClassBank, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    draws, before, path = count_draws(monkeypatch), contents(drawn), drawn.images[3]
    if spoil == "delete":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 0 if spoil == "empty" else path.stat().st_size // 2])
    again = draw_bank(config, shared_base, "digest")
    assert draws == ["a photo of a dog", "a dog on the grass"]  # its whole batch, so that it comes back to the bit
    assert contents(again) == before


def test_draw_bank_with_the_same_batches_draws_the_same_bytes(config: Config, shared_base: StableDiffusionModel, drawn: ClassBank) -> None:
    before = contents(drawn)
    for path in drawn.images:
        path.unlink()
    assert contents(draw_bank(config, shared_base, "digest")) == before


def test_draw_bank_knows_a_png_that_was_cut_off_anywhere(drawn: ClassBank, tmp_path: Path) -> None:
    """Only bytes that hold no pixel, some checksums at the very end, may be missing."""
    data, path, whole = drawn.images[0].read_bytes(), tmp_path / "cut.png", pixels(drawn)[0]
    for size in {0, 1, 7, 8, 20, 33, 60, *range(100, len(data), 997), *range(len(data) - 64, len(data), 4)}:
        path.write_bytes(data[:size])
        assert not class_bank._is_whole(path) or np.array_equal(np.asarray(Image.open(path)), whole), (
            f"{size} of {len(data)} bytes passed for an image"
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"prior.prompts": ["a photo of the {subject}"]},
        {"sampling.sampler": "euler"},
        {"sampling.steps": 3},
        {"sampling.guidance_scale": 2.0},
        {"data.resolution": 32},
        {"subject.class_noun": "cat"},
        {"prior.seed": 1},
    ],
    ids=str,
)
def test_recipe_digest_differs_for_another_recipe(make_config: MakeConfig, changes: dict) -> None:
    assert recipe_digest(make_config(BANK | changes), "digest") != recipe_digest(make_config(BANK), "digest")


def test_recipe_digest_differs_for_another_base(config: Config) -> None:
    assert recipe_digest(config, "digest") != recipe_digest(config, "other")


@pytest.mark.parametrize(
    "changes",
    [{"optim.learning_rate": 1.0}, {"prior.weight": 0.3}, {"prior.batch_size": 2}, {"subject.identifier": "ohwx"}, {"trainer.max_steps": 7}]
    + [{"seed": 1}, {"prior.num_images": 6}, {"sampling.batch_size": 3}],
    ids=str,
)
def test_recipe_digest_is_shared_by_the_runs_of_a_sweep(make_config: MakeConfig, changes: dict) -> None:
    assert recipe_digest(make_config(BANK | changes), "digest") == recipe_digest(make_config(BANK), "digest")


def test_draw_bank_of_another_recipe_is_another_folder(make_config: MakeConfig, shared_base: StableDiffusionModel, drawn: ClassBank) -> None:
    before = contents(drawn)
    other = draw_bank(make_config(BANK | {"sampling.steps": 1, "prior.num_images": 1}), shared_base, "digest")
    assert folder(other) != folder(drawn) and contents(drawn) == before


def test_draw_bank_refuses_a_manifest_that_was_tampered_with(config: Config, shared_base: StableDiffusionModel, drawn: ClassBank) -> None:
    path = folder(drawn) / "manifest.json"
    path.write_text(path.read_text().replace("a photo of a dog", "a photo of a cat"))
    with pytest.raises(UserError, match=f"^{folder(drawn)} holds class images of another recipe: its 'prompts' is not what"):
        draw_bank(config, shared_base, "digest")


def test_draw_bank_refuses_a_manifest_that_is_no_json(config: Config, shared_base: StableDiffusionModel, drawn: ClassBank) -> None:
    (folder(drawn) / "manifest.json").write_text('{"format": 1, "ima')
    with pytest.raises(UserError, match=str(folder(drawn))):
        draw_bank(config, shared_base, "digest")


def test_draw_bank_tells_how_far_it_is(config: Config, shared_base: StableDiffusionModel) -> None:
    told = []
    draw_bank(config, shared_base, "digest", lambda done, total: told.append((done, total)))
    assert told == [(0, 5), (2, 5), (4, 5), (5, 5)]


def test_read_user_bank_captions_every_image_with_the_first_class_prompt(make_config: MakeConfig, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for k in range(4):
        Image.fromarray(rng.integers(0, 256, (80, 70, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")
    bank = read_user_bank(make_config(BANK | {"prior.class_dir": str(tmp_path)}))
    assert bank.captions == ["a photo of a dog"] * 4 and len(bank.images) == 4


def test_read_user_bank_digest_is_that_of_the_contents(make_config: MakeConfig, tmp_path: Path) -> None:
    rng, digests = np.random.default_rng(0), []
    images = [Image.fromarray(rng.integers(0, 256, (80, 70, 3), dtype=np.uint8)) for _ in range(3)]
    for name, chosen in (("a", images), ("b", images), ("c", images[:2])):
        (tmp_path / name).mkdir()
        for k, image in enumerate(chosen):
            image.save(tmp_path / name / f"{k}.png")
        digests.append(read_user_bank(make_config(BANK | {"prior.class_dir": str(tmp_path / name)})).digest)
    assert digests[0] == digests[1] != digests[2]


def test_read_user_bank_names_the_setting_when_the_folder_is_missing(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^prior.class_dir"):
        read_user_bank(make_config(BANK | {"prior.class_dir": str(tmp_path / "nowhere")}))


def test_wants_class_images_only_where_the_prior_does(make_config: MakeConfig) -> None:
    wanted = {
        "class_images": {},
        "none": {"prior.name": "none"},
        "own photos": {"prior.name": "self_distilled"},
        "bank": {"prior.name": "self_distilled", "prior.images": "class"},
    }
    assert [name for name, changes in wanted.items() if wants_class_images(make_config(changes))] == ["class_images", "bank"]


def test_manifest_holds_the_hash_of_every_image_as_it_was_drawn(drawn: ClassBank) -> None:
    recorded = json.loads((folder(drawn) / "manifest.json").read_text())["sha256"]
    assert recorded == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder(drawn).glob("*.png"))}


@pytest.mark.parametrize("other", ["a photo from elsewhere", "another image of the bank", "the same picture, saved again"])
def test_draw_bank_refuses_an_image_that_was_put_there_by_hand(
    config: Config, shared_base: StableDiffusionModel, drawn: ClassBank, other: str
) -> None:
    path = drawn.images[2]
    if other == "a photo from elsewhere":
        Image.new("RGB", (64, 64), "red").save(path)
    elif other == "another image of the bank":
        shutil.copy(drawn.images[3], path)
    else:
        Image.open(path).convert("RGB").save(path)
    with pytest.raises(UserError, match=rf"^{path} must be the image that the base drew .*; delete the file to have it drawn again"):
        draw_bank(config, shared_base, "digest")


def test_draw_bank_draws_an_image_again_after_the_foreign_one_was_deleted(
    config: Config, shared_base: StableDiffusionModel, drawn: ClassBank
) -> None:
    before = contents(drawn)
    drawn.images[2].unlink()
    assert contents(draw_bank(config, shared_base, "digest")) == before
    recorded = json.loads((folder(drawn) / "manifest.json").read_text())["sha256"]
    assert recorded["00002.png"] == hashlib.sha256(drawn.images[2].read_bytes()).hexdigest()


def test_draw_bank_draws_an_image_again_whose_hash_was_not_written_before_the_kill(
    config: Config, shared_base: StableDiffusionModel, drawn: ClassBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(drawn) / "manifest.json"
    found = json.loads(path.read_text())
    del found["sha256"]["00003.png"]
    path.write_text(json.dumps(found))
    draws = count_draws(monkeypatch)
    draw_bank(config, shared_base, "digest")
    assert draws == ["a photo of a dog", "a dog on the grass"]


def test_draw_bank_of_two_at_once_is_drawn_once(
    config: Config, shared_base: StableDiffusionModel, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits for the first, though it would draw in batches of another size, and finds all there that it wants."""
    draws, banks, original = [], [], class_bank.generate

    def slow(base: object, prompts: list[str], *rest: object) -> np.ndarray:
        draws.append(list(prompts))
        time.sleep(0.05)
        with only_one:  # torch modules are not made for two threads; what is tested is the bank
            return original(base, prompts, *rest)

    only_one = threading.Lock()
    monkeypatch.setattr(class_bank, "generate", slow)
    configs = [config, make_config(BANK | {"sampling.batch_size": 3})]
    threads = [threading.Thread(target=lambda own=own: banks.append(draw_bank(own, shared_base, "digest"))) for own in configs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(map(len, draws)) == 6 and len(banks) == 2 and banks[0].digest == banks[1].digest
    assert sorted(os.listdir(folder(banks[0]))) == [*(f"{k:05d}.png" for k in range(6)), "manifest.json"]
    draw_bank(config, shared_base, "digest")  # refuses what is not as it was recorded


def _hold(bank: str, entered: object, leave: object) -> None:
    with alone_in(Path(bank), "draws"):
        entered.set()
        leave.wait(60)


def test_a_killed_process_leaves_no_lock_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("fork")
    entered, leave = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path / "bank"), entered, leave))
    holder.start()
    assert entered.wait(60)
    threading.Timer(0.1, holder.kill).start()
    start = time.perf_counter()
    with alone_in(tmp_path / "bank", "draws"):
        waited = time.perf_counter() - start
    holder.join(60)
    assert 0.05 < waited < 30 and "waiting for the process that draws" in capsys.readouterr().out


# a bank that grows


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the images that are drawn from now on; each image is its key's, and no model is asked."""
    numbers: list[int] = []

    def generate(base: object, prompts: list[str], keys: list[tuple[int, ...]], sampling: object, resolution: int) -> np.ndarray:
        numbers.extend(key[-1] for key in keys)
        # what is drawn beside an image shows in its last bits, as it does in a real model
        level = len(keys) * 1000 + sum(key[-1] for key in keys)
        return np.stack([np.random.default_rng([*key, level]).integers(0, 256, (resolution, resolution, 3), dtype=np.uint8) for key in keys])

    monkeypatch.setattr(class_bank, "generate", generate)
    return numbers


def test_runs_with_other_training_seeds_share_a_bank(make_config: MakeConfig, made: list[int]) -> None:
    banks = [draw_bank(make_config(BANK | {"seed": seed}), None, "digest") for seed in (0, 1)]
    assert banks[0] == banks[1] and made == [0, 1, 2, 3, 4, 5]
    assert bank_digest(make_config(BANK | {"seed": 1}), "digest", None) == bank_digest(make_config(BANK), "digest", None)


def test_another_prior_seed_is_another_bank_with_other_images(make_config: MakeConfig, made: list[int]) -> None:
    first, second = (draw_bank(make_config(BANK | {"prior.seed": seed}), None, "digest") for seed in (0, 1))
    assert folder(first) != folder(second) and (pixels(first) != pixels(second)).any(axis=(1, 2, 3)).all()


def test_a_smaller_count_takes_the_first_images_of_a_larger_bank(make_config: MakeConfig, made: list[int]) -> None:
    large = draw_bank(make_config(BANK | {"prior.num_images": 9}), None, "digest")
    made.clear()
    small = draw_bank(make_config(BANK | {"prior.num_images": 3}), None, "digest")
    assert made == [] and small.images == large.images[:3] and small.captions == large.captions[:3]
    assert small.digest != large.digest


def test_growing_draws_only_what_is_missing(make_config: MakeConfig, made: list[int]) -> None:
    small = draw_bank(make_config(BANK | {"prior.num_images": 4}), None, "digest")
    before = contents(small)
    made.clear()
    large = draw_bank(make_config(BANK | {"prior.num_images": 8}), None, "digest")
    assert made == [4, 5, 6, 7] and contents(large).items() >= before.items()
    assert len(json.loads((folder(large) / "manifest.json").read_text())["sha256"]) == 8


@pytest.mark.parametrize("course", [[8], [3, 8], [5, 7, 8], [1, 2, 3, 11]], ids=str)
def test_an_image_is_the_same_to_the_bit_however_the_bank_came_to_it(
    make_config: MakeConfig, made: list[int], tmp_path: Path, course: list[int]
) -> None:
    """An image depends on its batch in its last bits: so a batch is always the same one, and whole."""
    at_once = draw_bank(make_config(BANK | {"prior.num_images": 8, "output_dir": str(tmp_path / "at once")}), None, "digest")
    for count in course:
        draw_bank(make_config(BANK | {"prior.num_images": count}), None, "digest")
    assert contents(draw_bank(make_config(BANK | {"prior.num_images": 8}), None, "digest")) == contents(at_once)


def test_a_bank_that_is_large_enough_waits_for_no_other_process(make_config: MakeConfig, made: list[int]) -> None:
    bank = draw_bank(make_config(BANK), None, "digest")
    with alone_in(folder(bank), "draws"):
        assert draw_bank(make_config(BANK | {"prior.num_images": 3}), None, "digest").images == bank.images[:3]


def test_growing_refuses_an_image_that_was_put_there_by_hand(make_config: MakeConfig, made: list[int]) -> None:
    small = draw_bank(make_config(BANK), None, "digest")
    Image.new("RGB", (64, 64), "red").save(small.images[1])
    with pytest.raises(UserError, match=rf"^{small.images[1]} must be the image that the base drew"):
        draw_bank(make_config(BANK | {"prior.num_images": 9}), None, "digest")


def test_still_to_draw_counts_whole_batches_and_leaves_out_what_is_there(make_config: MakeConfig, made: list[int]) -> None:
    small, large = make_config(BANK), make_config(BANK | {"prior.num_images": 9})
    assert still_to_draw(small, "digest", None) == 6 and still_to_draw(make_config({"prior.name": "none"}), "digest", None) == 0
    draw_bank(small, None, "digest")
    assert still_to_draw(small, "digest", None) == 0 and still_to_draw(large, "digest", None) == 4


def _grow_and_tell(config: Config, log: str) -> None:
    """Draws a bank slowly, in a process of its own, and writes down the number of every image that it really draws."""

    def generate(base: object, prompts: list[str], keys: list[tuple[int, ...]], sampling: object, resolution: int) -> np.ndarray:
        with open(log, "a") as file:
            file.write("".join(f"{key[-1]}\n" for key in keys))
        time.sleep(0.02)
        return np.stack([np.random.default_rng(key).integers(0, 256, (resolution, resolution, 3), dtype=np.uint8) for key in keys])

    class_bank.generate = generate
    draw_bank(config, None, "digest")


def test_processes_that_grow_a_bank_at_once_draw_no_image_twice(make_config: MakeConfig, tmp_path: Path) -> None:
    context, log = multiprocessing.get_context("fork"), tmp_path / "drawn"
    configs = [make_config(BANK | {"prior.num_images": count, "seed": count}) for count in (4, 12, 8)]
    processes = [context.Process(target=_grow_and_tell, args=(config, str(log))) for config in configs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(map(int, log.read_text().split())) == list(range(12))
    where = next(Path(configs[0].output_dir).glob("class_banks/*"))
    assert sorted(os.listdir(where)) == [*(f"{k:05d}.png" for k in range(12)), "manifest.json"]
    recorded = json.loads((where / "manifest.json").read_text())["sha256"]
    assert recorded == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in where.glob("*.png")}


def test_progress_goes_on_over_the_classes(make_config: MakeConfig, made: list[int]) -> None:
    told: list[tuple[int, int]] = []
    extra = {"identifier": "ohwx", "class_noun": "teapot", "subject_dir": "photos"}
    config = make_config(BANK | {"prior.num_images": 2, "extra_subjects": [extra]})
    bank = complete_bank(config, None, "digest", None, lambda done, total: told.append((done, total)))
    assert told == [(0, 4), (2, 4), (2, 4), (4, 4)]
    assert bank.captions == ["a photo of a dog", "a dog on the grass", "a photo of a teapot", "a teapot on the grass"]
    assert bank.nouns == ["dog"] * 2 + ["teapot"] * 2 and bank.digest == bank_digest(config, "digest", None)


def own_images(where: Path, count: int) -> Path:
    where.mkdir()
    rng = np.random.default_rng(1)
    for k in range(count):
        Image.fromarray(rng.integers(0, 256, (80, 70, 3), dtype=np.uint8)).save(where / f"{k}.png")
    return where


@pytest.mark.parametrize(("count", "top_up", "expected"), [(3, False, 0), (3, True, 2), (5, True, 0), (7, True, 0)])
def test_to_draw_is_what_the_users_images_lack(make_config: MakeConfig, tmp_path: Path, count: int, top_up: bool, expected: int) -> None:
    config = make_config(BANK | {"prior.class_dir": str(own_images(tmp_path / "own", count)), "prior.top_up": top_up})
    assert to_draw(config, read_user_bank(config)) == ({"dog": expected} if expected else {})


def test_to_draw_is_all_without_own_images_and_nothing_without_class_images(make_config: MakeConfig) -> None:
    assert to_draw(make_config(BANK), None) == {"dog": 5} and to_draw(make_config({"prior.name": "none"}), None) == {}


def test_complete_bank_puts_the_users_images_first_and_tops_up_with_drawn_ones(
    make_config: MakeConfig, shared_base: StableDiffusionModel, tmp_path: Path
) -> None:
    config = make_config(BANK | {"prior.class_dir": str(own_images(tmp_path / "own", 3)), "prior.top_up": True})
    own = read_user_bank(config)
    bank = complete_bank(config, shared_base, "digest", own)
    assert bank.images[:3] == own.images and [path.name for path in bank.images[3:]] == ["00000.png", "00001.png"]
    assert bank.captions == ["a photo of a dog"] * 3 + ["a photo of a dog", "a dog on the grass"]
    assert bank.digest == bank_digest(config, "digest", own)


def test_complete_bank_of_enough_own_images_is_theirs(make_config: MakeConfig, shared_base: StableDiffusionModel, tmp_path: Path) -> None:
    config = make_config(BANK | {"prior.class_dir": str(own_images(tmp_path / "own", 3))})
    own = read_user_bank(config)
    assert complete_bank(config, shared_base, "digest", own) is own and bank_digest(config, "digest", own) == own.digest


def test_complete_bank_without_own_images_is_the_drawn_one(config: Config, shared_base: StableDiffusionModel, drawn: ClassBank) -> None:
    assert complete_bank(config, shared_base, "digest", None) == drawn and bank_digest(config, "digest", None) == drawn.digest


def test_complete_bank_and_its_digest_are_none_without_class_images(make_config: MakeConfig, shared_base: StableDiffusionModel) -> None:
    config = make_config({"prior.name": "self_distilled"})
    assert complete_bank(config, shared_base, "digest", read_user_bank(config)) is None and bank_digest(config, "digest", None) == "none"


def test_bank_digest_of_a_topped_up_bank_differs_with_either_part(make_config: MakeConfig, tmp_path: Path) -> None:
    folders = [own_images(tmp_path / name, count) for name, count in (("a", 3), ("b", 2))]
    configs = [make_config(BANK | {"prior.class_dir": str(path), "prior.top_up": True}) for path in folders]
    digests = {bank_digest(config, base, read_user_bank(config)) for config in configs for base in ("digest", "other")}
    assert len(digests) == 4
