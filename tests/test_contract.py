"""One contract on the lab's own base, for every method with every objective and every prior.

Attached it changes nothing; two steps move what it declares and nothing else; its checkpoint is all of it; merged it is the same model.
"""

import copy
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from method_cases import BOUNDARY, CASES, NEW_WORD, PRIORS, attach, data_of, images, output, settings
from torch import Tensor

from dreambooth.adapters.methods import ParamGroup, let_learn
from dreambooth.base.stable_diffusion import StableDiffusion, StableDiffusionModel
from dreambooth.config import Config, to_plain
from dreambooth.module import DreamBoothModule
from dreambooth.runs import RunFolder, load_weights, save_weights

NOUN = "robot"
LAB = {  # a quarter of the lab's pixels: its networks are whole, and a step costs a tenth of a second
    "base.path": "lab",
    "data.subject_dir": None,
    "subject.class_noun": NOUN,
    "data.resolution": 32,
    "data.batch_size": 1,
    **{f"optim.{part}learning_rate": 1e-3 for part in ("", "text_encoder_", "token_")},
}
EVERYTHING: dict[str, object] = {
    "objective.weighting": "min_snr",
    "objective.noise_offset": 0.1,
    "objective.input_perturbation": 0.1,
    "objective.huber_delta": 0.1,
    "objective.min_timestep": 100,
    "objective.max_timestep": 900,
}
OBJECTIVES: dict[str, dict[str, object]] = {name: {"objective.name": name} for name in ("follow_base", "epsilon", "velocity", "sample")}
OPTIONS = {
    "all that an objective can do": {"objective.name": "velocity", **EVERYTHING},
    "zero terminal SNR": {"objective.zero_terminal_snr": True, "objective.weighting": "capped_velocity"},
}
METHODS = ("full", "lora", "keys and values", "textual inversion of three vectors", "pivotal tuning, then lora")  # each choice of the config
PRODUCT = [(name, objective, prior) for name in METHODS for objective in OBJECTIVES for prior in PRIORS]
PRODUCT += [(name, option, "class images") for name in CASES for option in OPTIONS]


@pytest.fixture(scope="module")
def lab() -> StableDiffusionModel:
    """The lab's own base, loaded once: tests train copies of it."""
    return StableDiffusion(path="lab").load()


@pytest.fixture(scope="module")
def untuned(lab) -> Callable[[str], Tensor]:
    """Gives `untuned("robot")`: what the lab's base predicts for a prompt with these words in the subject's place."""
    return cache(lambda words: output(lab, words, NOUN))


@pytest.fixture(scope="module")
def receivers() -> dict[str, StableDiffusionModel]:
    """By case, a base with the method attached that takes up the checkpoints of all its trainings, one over the other."""
    return {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract")


def copied(lab: StableDiffusionModel) -> StableDiffusionModel:
    """Returns a base of its own; what no method may change is shared, and the contract would see it change."""
    return copy.deepcopy(lab, {id(part): part for part in (lab.vae, lab.tokenizer, lab.scheduler)})


def output_of(base: StableDiffusionModel) -> Tensor:
    return output(base, f"sks {NOUN}", NOUN)


def whole_state(base: StableDiffusionModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in base.state_dict().items()}


def two_steps(config: Config, base: StableDiffusionModel, groups: list[ParamGroup]) -> list[float]:
    """Takes the first step of a run and the one at the boundary, without Lightning; returns their losses."""
    data, module, losses = data_of(config, images(3, 0)), DreamBoothModule(config, base, groups), []
    module.log_dict = lambda *args, **kwargs: None  # there is no trainer to log to
    module.on_train_start()
    optimizer = config.optim.build(groups)
    for step, batch in enumerate(data.train_dataloader()):
        if step in (0, BOUNDARY):
            assert int(batch.is_prior.sum()) == config.prior.class_samples
            let_learn(groups, step)
            optimizer.zero_grad()
            loss = module.training_step(batch, step)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("name", "objective", "prior"), PRODUCT, ids=[" | ".join(row) for row in PRODUCT])
def test_method_keeps_its_contract_with_every_objective_and_prior(
    make_config: Callable[..., Config], lab, untuned, receivers, folder: Path, name: str, objective: str, prior: str
) -> None:
    config = make_config(settings(name) | LAB | (OBJECTIVES | OPTIONS)[objective] | PRIORS[prior])
    base = copied(lab)
    config.objective.prepare(base)
    groups = attach(config, base)
    start = untuned(f"{NOUN} " * getattr(config.method, "num_vectors", 1) + NOUN if name in NEW_WORD else f"sks {NOUN}")
    torch.testing.assert_close(output_of(base), start, atol=1e-6, rtol=0)

    before = whole_state(base)
    losses = two_steps(config, base, groups)
    learned, after = output_of(base), whole_state(base)
    assert len(losses) == 2 and np.isfinite(losses).all() and float((learned - start).abs().max()) > 1e-3
    assert {key for key in before if not torch.equal(before[key], after[key])} == {key for key in before if re.search(CASES[name].declares, key)}

    if name not in receivers:
        receivers[name] = copied(lab)
        attach(config, receivers[name])
    run = RunFolder(folder, {"config": to_plain(config), "digests": {}, "status": "running"})
    save_weights(run, "final", base, 2)
    assert load_weights(run, "final", receivers[name]) == 2
    assert torch.equal(output_of(receivers[name]), learned)

    config.method.merge(base)
    torch.testing.assert_close(output_of(base), learned, atol=2e-5, rtol=1e-5)
    assert base.state_dict().keys() == lab.state_dict().keys()
    assert [type(module) for module in base.modules()] == [type(module) for module in lab.modules()]
