"""The contract of every method: identity at the start, only what it declares moves, its file is all of it, merging and resuming change nothing."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

import train as script
from dreambooth.adapters.methods import let_learn, load_trainable_state, trainable_state
from dreambooth.base.stable_diffusion import StableDiffusionModel
from dreambooth.config import Config
from dreambooth.data import DreamBoothData, ImageSet
from dreambooth.module import DreamBoothModule

STEPS, BOUNDARY = 4, 2  # of a run; where the text encoder stops, or the inversion ends
UNET = r"^unet\."
TEXT = r"^text_encoder\.(?!.*token_embedding)"
ROWS = r"^text_encoder\..*token_embedding\.rows$"
LORA = r"\.lora_(A|B|magnitude_vector)\.default\.weight$"
KV = r"^unet\..*\.attn2\.to_(k|v)\.weight$"


class Case(NamedTuple):
    """A method with its settings, and by what names its parameters are known: an independent statement of what it trains."""

    settings: dict[str, object]
    declares: str  # a pattern that finds the names of all that learns, and no other
    is_additive: bool = False


CASES = {
    "full": Case({"name": "full", "train_text_encoder": False, "train_token": False}, UNET),
    "full with text encoder until a step": Case(
        {"name": "full", "train_text_encoder": True, "train_token": True, "text_encoder_stop_step": BOUNDARY}, f"{UNET}|{TEXT}|{ROWS}"
    ),
    "lora": Case(
        {"name": "lora", "rank": 2, "alpha": 3.0, "train_text_encoder": False, "train_token": False, "dropout": 0.2}, f"^unet.*{LORA}", True
    ),
    "lora with text encoder until a step": Case(
        {"name": "lora", "rank": 2, "train_text_encoder": True, "train_token": True, "text_encoder_stop_step": BOUNDARY}, f"{LORA}|{ROWS}", True
    ),
    "dora": Case({"name": "lora", "rank": 2, "use_dora": True, "train_text_encoder": True, "train_token": False, "init": "kaiming"}, LORA, True),
    "lora of convolutions": Case(
        {"name": "lora", "rank": 2, "target_modules": ["conv1", "proj_in", "to_q"], "train_text_encoder": False, "train_token": False}, LORA, True
    ),
    "keys and values": Case({"name": "cross_attention_kv"}, f"{KV}|{ROWS}"),
    "textual inversion of the own row": Case({"name": "textual_inversion"}, ROWS, True),
    "textual inversion of three vectors": Case({"name": "textual_inversion", "num_vectors": 3}, ROWS, True),
    "pivotal tuning, then lora": Case(
        {"name": "pivotal_tuning", "inversion_steps": BOUNDARY, "lora": {"rank": 2, "train_text_encoder": True}}, f"{LORA}|{ROWS}", True
    ),
    "pivotal tuning, then full": Case({"name": "pivotal_tuning", "inversion_steps": BOUNDARY, "then": "full"}, f"{UNET}|{ROWS}"),
}
NEW_WORD = {"textual inversion of the own row", "textual inversion of three vectors", "pivotal tuning, then lora", "pivotal tuning, then full"}
PRIORS = {"class images": {}, "no prior": {"prior.name": "none"}, "self-distilled": {"prior.name": "self_distilled"}}
every_case = pytest.mark.parametrize("name", CASES)
T = torch.tensor([10, 700])


@pytest.fixture
def configured(make_config: Callable[..., Config]) -> Callable[..., Config]:
    """Gives `configured("lora", {...})`: a run of a case in which all that could remember something is on."""

    def make(name: str, changes: dict[str, object] | None = None) -> Config:
        method = {f"method.{key}": value for key, value in CASES[name].settings.items()}
        hard = {
            "trainer.max_steps": STEPS,
            "trainer.eval_every": STEPS,
            "trainer.accelerator": "cpu",
            "trainer.ema_decay": 0.6,
            "data.crop": "random",
            "data.flip": True,
            "data.batch_size": 2,
            "prior.batch_size": 1,
            "optim.schedule": "cosine",
            "optim.warmup_steps": 1,
            "optim.weight_decay": 0.1,
            **{f"optim.{part}learning_rate": 1e-2 for part in ("", "text_encoder_", "token_")},
        }
        return make_config(hard | method | (changes or {}))

    return make


def attached(config: Config) -> tuple[StableDiffusionModel, list]:
    base = config.base.load()
    return base, config.method.attach(base, config.subject.identifier, config.subject.class_noun, config.seed)


def images(count: int, seed: int) -> list[Image.Image]:
    numbers = np.random.default_rng(seed).integers(0, 256, (count, 80, 96, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in numbers]


class Fitted(NamedTuple):
    module: DreamBoothModule
    optimizer: torch.optim.Optimizer
    losses: list[float]


class Watch(pl.Callback):
    """Notes the losses and writes the state after each step."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.losses = folder, []

    def on_train_batch_end(self, trainer: pl.Trainer, module: DreamBoothModule, outputs: dict, *args: object) -> None:
        self.losses.append(float(outputs["loss"]))
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def fit(config: Config, folder: Path | None = None, state: Path | None = None) -> Fitted:
    """Trains as train.py does, without evaluation."""
    base, groups = attached(config)
    prior = None
    if config.prior.name != "none":
        prior = ImageSet(images(3, 1), ["a photo of a dog"] * 3)
    data = DreamBoothData(config, ImageSet(images(3, 0), ["a photo of a sks dog"] * 3), prior)
    module, watch = DreamBoothModule(config, base, groups), Watch(folder)
    trainer = script.make_trainer(config, [], [watch])
    trainer.fit(module, data, ckpt_path=state, weights_only=True)
    return Fitted(module, trainer.optimizers[0], watch.losses)


@torch.no_grad()
def output(base: StableDiffusionModel, words: str = "sks dog") -> Tensor:
    base.eval()
    noisy = torch.randn(2, base.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return base.predict(noisy, T, base.encode_prompts([f"a photo of a {words}", "a photo of a dog"]))


def snapshot(base: StableDiffusionModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in base.named_parameters()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


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
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Fitted, Path]]:
    """Uninterrupted runs by case, with the states they wrote after each step."""
    return {}


@pytest.mark.parametrize(
    ("name", "cut"), [(name, BOUNDARY) for name in CASES] + [(name, cut) for name in CASES if "until" in name or "pivotal" in name for cut in (1, 3)]
)
def test_method_continued_at_a_step_equals_a_straight_run_bit_for_bit(configured, straight, tmp_path: Path, name: str, cut: int) -> None:
    if name not in straight:
        straight[name] = fit(configured(name), tmp_path), tmp_path
    whole, folder = straight[name]
    rest = fit(configured(name), state=folder / f"{cut}.ckpt")
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


OBJECTIVES: dict[str, dict[str, object]] = {  # on a base that predicts the noise, but for the last
    "epsilon": {"objective.name": "epsilon"},
    "velocity": {"objective.name": "velocity"},
    "sample": {"objective.name": "sample"},
    "all that an objective can do": {
        "objective.name": "velocity",
        "objective.weighting": "min_snr",
        "objective.noise_offset": 0.1,
        "objective.input_perturbation": 0.1,
        "objective.huber_delta": 0.1,
        "objective.min_timestep": 100,
        "objective.max_timestep": 900,
    },
    "zero terminal SNR": {"objective.zero_terminal_snr": True, "objective.weighting": "capped_velocity"},
}
LAB_CASES = ("full", "lora", "keys and values", "textual inversion of three vectors", "pivotal tuning, then lora")


def two_steps(config: Config, base: StableDiffusionModel, groups: list) -> list[float]:
    """Takes the first step of a run and the one at the boundary, without Lightning; returns their losses."""
    side = config.data.resolution
    pictures = [image.resize((side, side)) for image in images(6, 0)]
    prior = ImageSet(pictures[3:], ["a photo of a dog"] * 3) if config.prior.class_samples else None
    data, module = DreamBoothData(config, ImageSet(pictures[:3], ["a photo of a sks dog"] * 3), prior), DreamBoothModule(config, base, groups)
    module.log_dict = lambda *args, **kwargs: None  # there is no trainer to log to
    optimizer, losses = config.optim.build(groups), []
    for step, batch in enumerate(data.train_dataloader()):
        if step in (0, BOUNDARY):
            let_learn(groups, step)
            optimizer.zero_grad()
            loss = module.training_step(batch, step)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


def keeps_the_contract(config: Config, case: Case, is_new_word: bool) -> None:
    """Attached it changes nothing; two steps move what it declares and nothing else; its file is all of it; merged it is the same model."""
    plain, (base, groups), (other, _) = config.base.load(), attached(config), attached(config)
    for each in (plain, base, other):
        config.objective.prepare(each)
    words = f"{config.subject.class_noun} " * getattr(config.method, "num_vectors", 1) + "dog" if is_new_word else "sks dog"
    assert torch.allclose(output(base), output(plain, words), atol=1e-6, rtol=0)
    before = snapshot(base)
    losses = two_steps(config, base, groups)
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert moved(before, snapshot(base)) == {key for key in before if re.search(case.declares, key)}
    load_trainable_state(other, trainable_state(base), "best.safetensors")
    learned = output(base)
    assert torch.equal(output(other), learned) and not torch.equal(learned, output(plain))
    config.method.merge(base)
    torch.testing.assert_close(output(base), learned, atol=2e-5, rtol=1e-5)
    assert base.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("prior", ["class images", "no prior"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@every_case
def test_method_keeps_its_contract_with_every_objective_and_prior(configured, tiny_folder, name: str, objective: str, prior: str) -> None:
    base = {"base.path": str(tiny_folder(prediction_type="v_prediction"))} if "zero" in objective else {}
    rates = {f"optim.{part}learning_rate": 1e-3 for part in ("", "text_encoder_", "token_")}
    config = configured(name, OBJECTIVES[objective] | PRIORS[prior] | base | rates | {"data.batch_size": 1})
    keeps_the_contract(config, CASES[name], name in NEW_WORD)


@pytest.mark.parametrize("name", LAB_CASES)
def test_method_keeps_its_contract_on_the_lab(configured, name: str) -> None:
    rates = {f"optim.{part}learning_rate": 1e-4 for part in ("", "text_encoder_", "token_")}
    keeps_the_contract(
        configured(name, {"base.path": "lab", "data.subject_dir": None, "subject.class_noun": "robot", "data.batch_size": 1} | rates),
        CASES[name],
        name in NEW_WORD,
    )
