"""Latents and text embeddings by content: what is kept is what would be computed, and nothing else is ever served."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dreambooth.adapters.methods import trainable_state
from dreambooth.adapters.token_rows import open_own_rows
from dreambooth.base.stable_diffusion import StableDiffusionModel
from dreambooth.caches import Caches, DiskStore, MemoryStore, make_caches, module_digest, text_learns
from dreambooth.config import Config, fingerprint, to_plain
from dreambooth.data import DreamBoothData, ImageSet, pixels_digest
from dreambooth.module import DreamBoothModule
from dreambooth.photos import to_pixel_values, to_uint8

ROOM = 10**7


def images(count: int, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    pixels = to_uint8(torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1)
    return to_pixel_values(pixels).contiguous(), [pixels_digest(own) for own in pixels]


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["memory", "disk"])
def caches(request: pytest.FixtureRequest, shared_base: StableDiffusionModel, tmp_path: Path) -> Caches:
    return make_caches(shared_base, request.param, tmp_path / "caches", ROOM)


def test_latents_are_those_of_the_base_with_the_noise_of_the_step(caches: Caches) -> None:
    pixels, contents = images(3)
    for step in range(2):  # the second time from the store, with other noise
        alone = [caches.base.encode_images(pixels[k : k + 1], noise(3, step)[k : k + 1]) for k in range(3)]
        assert torch.equal(caches.latents(pixels, contents, noise(3, step)), torch.cat(alone))
    assert (caches.computed, caches.found) == (3, 3)


def test_latents_do_not_depend_on_the_rest_of_the_batch(caches: Caches) -> None:
    pixels, contents = images(3)
    whole = caches.latents(pixels, contents, noise(3))
    assert torch.equal(caches.latents(pixels[1:2], None, noise(3)[1:2])[0], whole[1])


def test_latents_follow_the_content_and_not_the_place_in_the_batch(caches: Caches) -> None:
    pixels, contents = images(4)
    first, order = caches.latents(pixels, contents, noise(4)), [2, 0, 3, 1]
    again = caches.latents(pixels[order], [contents[k] for k in order], noise(4)[order])
    assert torch.equal(again, first[order]) and caches.found == 4


def test_latents_do_not_depend_on_the_layout_of_the_pixels_in_memory(shared_base: StableDiffusionModel) -> None:
    """What a loader makes of (H, W, 3) arrays lies channel by channel in memory, which convolutions answer with other last bits."""
    caches, pixels = make_caches(shared_base, "off", Path(), ROOM), images(2)[0]
    strided = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert strided.stride() != pixels.stride() and torch.equal(strided, pixels)
    assert torch.equal(caches.latents(strided, None, noise(2)), caches.latents(pixels, None, noise(2)))


def test_embeddings_are_those_of_the_base_each_prompt_encoded_once(caches: Caches) -> None:
    prompts = ["a dog", "a photo of a dog", "a dog"]
    found = caches.embeddings(prompts)
    assert all(torch.equal(found[k], caches.base.encode_prompts([prompt])[0]) for k, prompt in enumerate(prompts))
    assert torch.equal(caches.embeddings(prompts[::-1]), found.flip(0)) and caches.computed == 2


def test_embeddings_are_never_kept_while_a_token_learns(fresh_base: StableDiffusionModel) -> None:
    caches = make_caches(fresh_base, "memory", Path(), ROOM)
    rows = open_own_rows(fresh_base, "sks")
    rows.rows.requires_grad_(True)
    fresh_base.learned = tuple(name for name, p in fresh_base.named_parameters() if p is rows.rows)
    before = caches.embeddings(["a sks dog"])
    assert text_learns(fresh_base) and before.requires_grad
    with torch.no_grad():
        rows.rows += 1.0
    assert not torch.equal(caches.embeddings(["a sks dog"]), before) and caches.found == 0


def test_digest_of_pixels_tells_photo_flip_crop_and_size_apart() -> None:
    pixels = to_uint8(images(1)[0])[0]
    views = [pixels, pixels[:, ::-1], pixels[:, 1:], pixels.reshape(32, 128, 3), to_uint8(images(1, seed=1)[0])[0]]
    assert len({pixels_digest(view.copy()) for view in views}) == len(views)


def test_off_keeps_nothing(shared_base: StableDiffusionModel, tmp_path: Path) -> None:
    caches, (pixels, contents) = make_caches(shared_base, "off", tmp_path, ROOM), images(2)
    assert torch.equal(caches.latents(pixels, contents, noise(2)), caches.latents(pixels, contents, noise(2)))
    assert (caches.computed, caches.found) == (4, 0) and not list(tmp_path.iterdir())


def test_float16_keeps_half_and_gives_the_same_from_the_first_time_on(shared_base: StableDiffusionModel) -> None:
    caches, (pixels, contents) = make_caches(shared_base, "memory", Path(), ROOM, "float16"), images(2)
    first = caches.latents(pixels, contents, noise(2))
    assert torch.equal(caches.latents(pixels, contents, noise(2)), first) and first.dtype == torch.float32
    exact = shared_base.encode_images(pixels, noise(2))
    assert not torch.equal(first, exact)
    torch.testing.assert_close(first, exact, atol=1e-2, rtol=1e-2)


def test_memory_drops_what_was_used_longest_ago() -> None:
    store, entry = MemoryStore(max_bytes=80), {"x": torch.zeros(10)}  # 40 bytes each
    for key in "ab":
        store.put(key, entry)
    store.get("a")
    store.put("c", entry)
    assert [key for key in "abc" if store.get(key)] == ["a", "c"] and store.bytes == 80


def test_memory_never_holds_more_than_its_room() -> None:
    store = MemoryStore(max_bytes=100)
    for k in range(50):
        store.put(str(k % 7), {"x": torch.zeros(k % 13)})
        assert store.bytes == sum(entry["x"].numel() * 4 for entry in store.entries.values()) <= 100


def test_disk_serves_a_later_process(shared_base: StableDiffusionModel, tmp_path: Path) -> None:
    pixels, contents = images(2)
    first = make_caches(shared_base, "disk", tmp_path, ROOM).latents(pixels, contents, noise(2))
    later = make_caches(shared_base, "disk", tmp_path, ROOM)
    assert torch.equal(later.latents(pixels, contents, noise(2)), first) and (later.computed, later.found) == (0, 2)


def test_disk_writes_no_more_than_its_room(tmp_path: Path) -> None:
    for _ in range(2):  # the second store counts what the first wrote
        store = DiskStore(tmp_path, max_bytes=1000)
        for k in range(10):
            store.put(f"{k:04d}", {"x": torch.zeros(100)})
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def damage_cut_off(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def damage_one_bit(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def damage_other_entry(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def damage_foreign_file(path: Path, other: Path) -> None:
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path)


def damage_text(path: Path, other: Path) -> None:
    path.write_text("not a tensor")


@pytest.mark.parametrize("damage", [damage_cut_off, damage_one_bit, damage_other_entry, damage_foreign_file, damage_text])
def test_disk_never_serves_a_damaged_or_foreign_entry(shared_base: StableDiffusionModel, tmp_path: Path, damage: Callable) -> None:
    pixels, contents = images(2)
    right = make_caches(shared_base, "disk", tmp_path, ROOM).latents(pixels, contents, noise(2))
    paths = sorted(tmp_path.rglob("*.safetensors"))
    damage(paths[0], paths[1])
    for computed in (1, 0):  # computed again, and whole from then on
        caches = make_caches(shared_base, "disk", tmp_path, ROOM)
        assert torch.equal(caches.latents(pixels, contents, noise(2)), right) and caches.computed == computed


def test_disk_of_another_autoencoder_is_not_used(shared_base: StableDiffusionModel, fresh_base: StableDiffusionModel, tmp_path: Path) -> None:
    pixels, contents = images(1)
    make_caches(shared_base, "disk", tmp_path, ROOM).latents(pixels, contents, noise(1))
    with torch.no_grad():
        next(fresh_base.vae.parameters()).mul_(1.5)
    other = make_caches(fresh_base, "disk", tmp_path, ROOM)
    assert torch.equal(other.latents(pixels, contents, noise(1)), fresh_base.encode_images(pixels, noise(1))) and other.found == 0


def test_module_digest_changes_with_a_weight_and_with_the_scale(fresh_base: StableDiffusionModel) -> None:
    digests = [module_digest(fresh_base.vae)]
    fresh_base.vae.register_to_config(scaling_factor=0.5)
    digests.append(module_digest(fresh_base.vae))
    with torch.no_grad():
        next(fresh_base.vae.parameters()).flatten()[0] += 1e-6
    digests.append(module_digest(fresh_base.vae))
    assert len(set(digests)) == 3


def test_autocast_has_entries_of_its_own(shared_base: StableDiffusionModel) -> None:
    caches, (pixels, contents) = make_caches(shared_base, "memory", Path(), ROOM), images(1)
    caches.latents(pixels, contents, noise(1))
    with torch.autocast("cpu", torch.bfloat16):
        caches.latents(pixels, contents, noise(1))
    assert caches.found == 0


HARD = {  # all that could confuse a cache
    "data.flip": True,
    "data.crop": "random",
    "data.buckets": True,
    "data.batch_size": 2,
    "prior.batch_size": 1,
    "trainer.accumulate_grad_batches": 2,
    "trainer.max_steps": 5,
    "optim.learning_rate": 1e-3,
}


def trained(config: Config, sets: tuple[ImageSet, ImageSet]) -> tuple[list[float], dict[str, torch.Tensor], Caches]:
    """The loss of every batch of a short training, the learned weights, and the caches."""
    base = config.base.load()
    module = DreamBoothModule(config, base, config.method.attach(base, "sks", "dog", config.seed))
    losses, step = [], module.training_step
    module.training_step = lambda batch, batch_idx: losses.append(step(batch, batch_idx)) or losses[-1]
    trainer = pl.Trainer(
        max_steps=config.trainer.max_steps,
        accumulate_grad_batches=config.trainer.accumulate_grad_batches,
        **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
    )
    trainer.fit(module, DreamBoothData(config, *sets))
    return [float(loss) for loss in losses], {k: v.clone() for k, v in trainable_state(base).items()}, module.caches


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_training_with_a_cache_equals_training_without_bit_for_bit(make_config: Callable[..., Config], kind: str) -> None:
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((64, 64), (64, 64), (65, 110), (64, 110))]
    sets = ImageSet(photos, [f"a sks dog {k}" for k in range(4)]), ImageSet(photos[:2], ["a dog 0", "a dog 1"])
    losses, state, caches = trained(make_config(HARD | {"data.cache": kind}), sets)
    plain_losses, plain_state, off = trained(make_config(HARD | {"data.cache": "off"}), sets)
    assert len(losses) == 10 and losses == plain_losses
    assert state.keys() == plain_state.keys() and all(torch.equal(state[name], plain_state[name]) for name in state)
    assert off.found == 0 and caches.found > 10 and caches.computed + caches.found == off.computed


def test_fingerprint_does_not_ask_where_latents_are_kept(make_config: Callable[..., Config]) -> None:
    names = {
        fingerprint(to_plain(make_config({"data.cache": kind, "data.cache_mb": size}))) for kind, size in (("off", 1), ("memory", 2), ("disk", 3))
    }
    assert len(names) == 1
    assert fingerprint(to_plain(make_config({"data.cache_dtype": "float16"}))) not in names  # rounding does change the result
