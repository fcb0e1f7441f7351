"""The contract of every method: identity at the start, only what it declares moves, its file is all of it, merging and resuming change nothing."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from method_cases import BOUNDARY, CASES, NEW_WORD, PRIORS, STEPS, Fitted, attached, fit, moved, output, settings, snapshot
from torch import Tensor

import train as script
from dreambooth.adapters.methods import load_trainable_state, trainable_state
from dreambooth.base.stable_diffusion import StableDiffusionModel
from dreambooth.config import Config
from dreambooth.module import DreamBoothModule

every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def configured(make_config: Callable[..., Config]) -> Callable[..., Config]:
    """Gives `configured("lora", {...})`: a run of a case in which all that could remember something is on."""
    return lambda name, changes=None: make_config(settings(name) | (changes or {}))


def move_a_little(base: StableDiffusionModel) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in trainable_state(base).values():
            tensor += 0.02 * torch.randn(tensor.shape, generator=generator)


@every_case
def test_method_changes_no_output_when_it_is_attached(configured, name: str) -> None:
    config = configured(name)
    plain, (base, _) = config.base.load(), attached(config)
    found, expected = output(base), output(plain)
    if name in NEW_WORD:  # the word starts as the class noun, as often as it has vectors
        expected = output(plain, "dog " * getattr(config.method, "num_vectors", 1) + "dog")
    torch.testing.assert_close(found, expected, atol=1e-6 if CASES[name].settings.get("use_dora") else 0, rtol=0)


@every_case
def test_method_declares_what_it_says(configured, name: str) -> None:
    base, groups = attached(configured(name))
    declared = {id(p) for group in groups for p in group.parameters}
    names = {key for key, p in base.named_parameters() if id(p) in declared}
    assert names == {key for key, _ in base.named_parameters() if re.search(CASES[name].declares, key)} == set(trainable_state(base))
    assert len(declared) == sum(len(group.parameters) for group in groups)  # none in two groups
    assert {key for key, p in base.named_parameters() if p.requires_grad} == names


@every_case
@pytest.mark.parametrize("prior", PRIORS)
def test_method_trains_all_that_it_declares_and_nothing_else(configured, name: str, prior: str) -> None:
    config = configured(name, PRIORS[prior] | {"trainer.ema_decay": None})
    before = snapshot(attached(config)[0])
    fitted = fit(config)
    changed = moved(before, snapshot(fitted.module.base))
    assert changed == {key for key in before if re.search(CASES[name].declares, key)}
    assert len(fitted.losses) == STEPS and np.isfinite(fitted.losses).all()


@every_case
def test_method_file_brings_all_that_was_learned_to_a_fresh_base(configured, name: str) -> None:
    config = configured(name)
    (trained, _), (other, _) = attached(config), attached(config)
    move_a_little(trained)
    assert not torch.equal(output(other), output(trained))
    load_trainable_state(other, trainable_state(trained), "best.safetensors")
    assert torch.equal(output(other), output(trained))


@every_case
def test_method_merged_is_the_attached_model_in_plain_modules(configured, name: str) -> None:
    config = configured(name)
    plain, (base, _) = config.base.load(), attached(config)
    move_a_little(base)
    learned = output(base)
    config.method.merge(base)
    torch.testing.assert_close(output(base), learned, atol=1e-5, rtol=1e-5)
    assert [type(module) for module in base.modules()] == [type(module) for module in plain.modules()]
    assert base.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.is_additive])
def test_method_taken_off_leaves_the_base_as_it_was(configured, name: str) -> None:
    config = configured(name)
    plain, (base, _) = config.base.load(), attached(config)
    move_a_little(base)
    config.method.detach(base)
    assert torch.equal(output(base), output(plain))
    assert moved(snapshot(plain), snapshot(base)) == set() and base.state_dict().keys() == plain.state_dict().keys()
    assert base.tokenizer.get_vocab() == plain.tokenizer.get_vocab() and base.text_encoder.config.vocab_size == len(plain.tokenizer)
    assert trainable_state(base) == {}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.is_additive])
def test_method_that_changes_the_base_itself_cannot_be_taken_off(configured, name: str) -> None:
    config = configured(name)
    base, _ = attached(config)
    with pytest.raises(ValueError, match="trains the base's own weights"):
        config.method.detach(base)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Fitted, Path]]:
    """Gives `straight(config, name, prior)`: the uninterrupted run of a case, done once, and where it wrote its state after each step."""
    done: dict[tuple[str, str], tuple[Fitted, Path]] = {}

    def run(config: Config, name: str, prior: str) -> tuple[Fitted, Path]:
        if (name, prior) not in done:
            folder = tmp_path_factory.mktemp("states")
            done[name, prior] = fit(config, folder), folder
        return done[name, prior]

    return run


@pytest.mark.parametrize(
    ("name", "prior", "cut"),
    [(name, prior, BOUNDARY) for name in CASES for prior in ("class images", "self-distilled")]
    + [(name, "class images", cut) for name in CASES if "until" in name or "pivotal" in name for cut in (1, 3)],
)
def test_method_continued_at_a_step_equals_a_straight_run_bit_for_bit(configured, straight, name: str, prior: str, cut: int) -> None:
    """With random crops, flips, buckets, dropout, a schedule and EMA on."""
    whole, folder = straight(configured(name, PRIORS[prior]), name, prior)
    rest = fit(configured(name, PRIORS[prior]), state=folder / f"{cut}.ckpt")
    assert rest.losses == whole.losses[cut:]
    assert moved(snapshot(whole.module.base), snapshot(rest.module.base)) == set()
    for ours, theirs in zip(rest.module.averaged.ema.shadow_params, whole.module.averaged.ema.shadow_params, strict=True):
        assert torch.equal(ours, theirs)


class Notebook(pl.Callback):
    """Keeps copies of the learned tensors and of the learning rates at each step."""

    def __init__(self) -> None:
        self.pages: list[dict[str, Tensor]] = []
        self.rates: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: DreamBoothModule, *args: object) -> None:
        self.pages.append({key: tensor.clone() for key, tensor in trainable_state(module.base).items()})
        self.rates.append({group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups})

    def on_train_end(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        self.pages.append({key: tensor.clone() for key, tensor in trainable_state(module.base).items()})


def noted(config: Config, monkeypatch: pytest.MonkeyPatch) -> Notebook:
    notebook, make = Notebook(), script.make_trainer
    monkeypatch.setattr(script, "make_trainer", lambda config, loggers, callbacks: make(config, loggers, [*callbacks, notebook]))
    fit(config)
    return notebook


@pytest.mark.parametrize("name", [name for name in CASES if "until" in name])
def test_text_encoder_stops_for_good_at_its_step(configured, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """No weight decay and no momentum moves it afterwards, though it had both."""
    pages = noted(configured(name, {"optim.schedule": "constant"}), monkeypatch).pages
    text = {key for key in pages[0] if key.startswith("text_encoder.")}
    assert moved(pages[BOUNDARY - 1], pages[BOUNDARY]) == set(pages[0])
    for step in range(BOUNDARY, STEPS):
        assert moved(pages[step], pages[step + 1]) == set(pages[0]) - text


@pytest.mark.parametrize("name", [name for name in CASES if "pivotal" in name])
def test_pivotal_tuning_moves_the_word_first_and_then_the_rest(configured, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pages = noted(configured(name, {"optim.schedule": "constant", "optim.warmup_steps": 0}), monkeypatch).pages
    rows = {key for key in pages[0] if key.endswith("token_embedding.rows")}
    for step in range(STEPS):
        changed = moved(pages[step], pages[step + 1])
        assert changed <= (rows if step < BOUNDARY else set(pages[0]) - rows) and changed


def test_pivotal_tuning_warms_each_part_up_from_where_it_begins(configured, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = noted(configured("pivotal tuning, then lora", {"optim.schedule": "constant"}), monkeypatch).rates
    assert [page["token"] for page in rates] == pytest.approx([5e-3, 1e-2, 0, 0])
    assert [page["unet"] for page in rates] == pytest.approx([0, 0, 5e-3, 1e-2])


def test_stopped_text_encoder_adds_nothing_to_the_gradient_norm(configured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping must not count gradients that move nothing: the rest would learn less than it does without a text encoder."""
    seen: list[set[str]] = []

    class Grads(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, module: DreamBoothModule, *args: object) -> None:
            seen.append({key.split(".")[0] for key, p in module.base.named_parameters() if p.grad is not None})

    make = script.make_trainer
    monkeypatch.setattr(script, "make_trainer", lambda config, loggers, callbacks: make(config, loggers, [*callbacks, Grads()]))
    fit(configured("full with text encoder until a step"))
    assert seen == [{"unet", "text_encoder"}] * BOUNDARY + [{"unet"}] * (STEPS - BOUNDARY)
