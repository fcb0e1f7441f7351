"""Methods: identity when attached, gradients exactly where declared, plain modules again when merged, learned tensors there and back."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dreambooth.adapters import Full, TokenRows, load_trainable_state, trainable_state
from dreambooth.base.stable_diffusion import StableDiffusion, StableDiffusionModel
from dreambooth.errors import UserError

PROMPTS = ["a photo of sks dog", "a photo of a dog"]
VARIANTS = [(False, False), (True, False), (False, True), (True, True)]
T = torch.tensor([10, 700])
NOISY = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def output(base: StableDiffusionModel) -> Tensor:
    return base.predict(NOISY, T, base.encode_prompts(PROMPTS))


def attached(base: StableDiffusionModel, text: bool = True, token: bool = True) -> StableDiffusionModel:
    Full(train_text_encoder=text, train_token=token).attach(base, "sks")
    return base


def train_a_little(base: StableDiffusionModel, steps: int = 3) -> None:
    """Moves all that learns, by AdamW with weight decay, which would also move a row that gets no gradient."""
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        base.predict(NOISY, T, base.encode_prompts(PROMPTS)).pow(2).mean().backward()
        optimizer.step()


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize(("text", "token"), VARIANTS)
def test_full_attach_changes_no_output(fresh_base: StableDiffusionModel, text: bool, token: bool) -> None:
    before = output(fresh_base)
    assert torch.equal(output(attached(fresh_base, text, token)), before)


@pytest.mark.parametrize(("text", "token"), VARIANTS)
def test_full_attach_opens_exactly_what_it_declares(fresh_base: StableDiffusionModel, text: bool, token: bool) -> None:
    groups = Full(train_text_encoder=text, train_token=token).attach(fresh_base, "sks")
    declared = {id(p) for group in groups for p in group.parameters}
    assert {id(p) for p in fresh_base.parameters() if p.requires_grad} == declared
    assert [group.part for group in groups] == ["unet"] + ["text_encoder"] * text + ["token"] * token
    assert len(declared) == sum(len(group.parameters) for group in groups)  # none in two groups


def test_full_attach_opens_every_weight_of_the_unet(fresh_base: StableDiffusionModel) -> None:
    attached(fresh_base, False, False)
    assert all(p.requires_grad for p in fresh_base.unet.parameters())
    assert not any(p.requires_grad for part in (fresh_base.vae, fresh_base.text_encoder) for p in part.parameters())


def test_full_attach_keeps_the_vocabulary_frozen(fresh_base: StableDiffusionModel) -> None:
    attached(fresh_base, True, False)
    assert not fresh_base.text_encoder.get_input_embeddings().weight.requires_grad


def test_full_attach_freezes_what_an_earlier_method_left_open(fresh_base: StableDiffusionModel) -> None:
    fresh_base.requires_grad_(True)
    attached(fresh_base, False, False)
    assert not any(p.requires_grad for p in fresh_base.vae.parameters())


@pytest.mark.parametrize(("text", "token"), VARIANTS)
def test_full_every_declared_parameter_gets_a_gradient_that_can_move_it(fresh_base: StableDiffusionModel, text: bool, token: bool) -> None:
    base = attached(fresh_base, text, token)
    before = snapshot(base)
    train_a_little(base, steps=2)
    still = {name for name, p in base.named_parameters() if p.requires_grad and torch.equal(p, before[name])}
    assert still == set()


@pytest.mark.parametrize(("text", "token"), VARIANTS)
def test_full_training_moves_nothing_that_is_frozen(fresh_base: StableDiffusionModel, text: bool, token: bool) -> None:
    base = attached(fresh_base, text, token)
    before = snapshot(base)
    train_a_little(base)
    assert {name for name, p in base.named_parameters() if not p.requires_grad and not torch.equal(p, before[name])} == set()


def test_token_rows_learn_the_identifier_and_leave_every_other_word_bit_for_bit(fresh_base: StableDiffusionModel) -> None:
    before = fresh_base.text_encoder.get_input_embeddings().weight.detach().clone()
    base = attached(fresh_base, False, True)
    token_ids = base.token_id("sks")
    train_a_little(base)
    Full().merge(base)
    after = base.text_encoder.get_input_embeddings().weight
    changed = [row for row in range(len(before)) if not torch.equal(after[row], before[row])]
    assert changed == token_ids


def test_token_rows_of_a_word_of_several_tokens_learn_them_all(fresh_base: StableDiffusionModel) -> None:
    ids = fresh_base.token_id("qyx")
    assert len(ids) == 3
    before = fresh_base.text_encoder.get_input_embeddings().weight.detach().clone()
    Full(train_text_encoder=False, train_token=True).attach(fresh_base, "qyx")
    optimizer = torch.optim.SGD([p for p in fresh_base.parameters() if p.requires_grad], lr=10.0)
    fresh_base.predict(NOISY, T, fresh_base.encode_prompts(["a qyx dog"] * 2)).pow(2).mean().backward()
    optimizer.step()
    Full().merge(fresh_base)
    after = fresh_base.text_encoder.get_input_embeddings().weight
    assert sorted(row for row in range(len(before)) if not torch.equal(after[row], before[row])) == sorted(set(ids))


@pytest.mark.parametrize("token_ids", [[2], [4, 2], [2, 2]], ids=["one", "two", "the same twice"])
def test_token_rows_forward_is_that_of_the_embedding_they_merge_to(token_ids: list[int]) -> None:
    torch.manual_seed(0)
    rows = TokenRows(nn.Embedding(6, 3).requires_grad_(False), token_ids)
    with torch.no_grad():
        rows.rows += torch.randn_like(rows.rows)
    ids = torch.tensor([[0, 1, 2], [4, 2, 5]])
    attached_output = rows(ids).detach()
    merged = rows.merged()
    assert type(merged) is nn.Embedding and torch.equal(merged(ids), attached_output)


def test_token_rows_gradient_is_that_of_the_whole_embedding_at_its_row() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(6, 3)
    ids, pull = torch.tensor([[0, 2, 2], [4, 2, 5]]), torch.randn(2, 3, 3)
    (table(ids) * pull).sum().backward()
    rows = TokenRows(nn.Embedding.from_pretrained(table.weight.detach().clone()), [2])
    (rows(ids) * pull).sum().backward()
    torch.testing.assert_close(rows.rows.grad[0], table.weight.grad[2])


@pytest.mark.parametrize(("text", "token"), VARIANTS)
def test_full_merge_keeps_the_output_of_what_was_learned(fresh_base: StableDiffusionModel, text: bool, token: bool) -> None:
    base = attached(fresh_base, text, token)
    start = output(base)
    train_a_little(base)
    learned = output(base)
    Full(train_text_encoder=text, train_token=token).merge(base)
    assert torch.equal(output(base), learned) and not torch.equal(learned, start)


def test_full_merge_leaves_plain_modules_that_save_and_load(fresh_base: StableDiffusionModel, tmp_path: Path) -> None:
    base = attached(fresh_base)
    train_a_little(base)
    learned = output(base)
    Full().merge(base)
    assert type(base.text_encoder.get_input_embeddings()) is nn.Embedding
    assert not any(isinstance(module, TokenRows) for module in base.modules())
    reloaded = StableDiffusion(path=str(base.save(tmp_path / "tuned"))).load()
    torch.testing.assert_close(output(reloaded), learned, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("text", "token"), VARIANTS)
def test_trainable_state_brings_what_was_learned_to_a_fresh_base(tiny_folder: Callable[..., Path], text: bool, token: bool) -> None:
    trained, other = (attached(StableDiffusion(path=str(tiny_folder())).load(), text, token) for _ in range(2))
    train_a_little(trained)
    assert not torch.equal(output(other), output(trained))
    load_trainable_state(other, trainable_state(trained), "best.safetensors")
    assert torch.equal(output(other), output(trained))


def test_trainable_state_is_what_learns_and_carries_no_gradient(fresh_base: StableDiffusionModel) -> None:
    base = attached(fresh_base)
    state = trainable_state(base)
    assert state.keys() == {name for name, p in base.named_parameters() if p.requires_grad}
    assert not any(tensor.requires_grad for tensor in state.values())


def test_load_trainable_state_does_not_tie_the_model_to_the_tensors_given(fresh_base: StableDiffusionModel) -> None:
    base = attached(fresh_base, False, False)
    state = {name: tensor.clone() for name, tensor in trainable_state(base).items()}
    load_trainable_state(base, state, "x")
    next(iter(state.values())).add_(1.0)
    assert not torch.equal(next(iter(trainable_state(base).values())), next(iter(state.values())))


def test_load_trainable_state_refuses_a_missing_tensor_by_name(fresh_base: StableDiffusionModel) -> None:
    base = attached(fresh_base, False, False)
    state = trainable_state(base)
    lost = "unet.conv_in.weight"
    del state[lost]
    with pytest.raises(UserError, match=f"^runs/x/best.safetensors must hold exactly .* the first {lost}"):
        load_trainable_state(base, state, "runs/x/best.safetensors")


def test_load_trainable_state_refuses_a_tensor_that_it_does_not_know(fresh_base: StableDiffusionModel) -> None:
    base = attached(fresh_base, False, False)
    with pytest.raises(UserError, match="1 that differ, the first unet.odd"):
        load_trainable_state(base, trainable_state(base) | {"unet.odd": torch.zeros(1)}, "x")


def test_load_trainable_state_refuses_another_shape_by_name_and_changes_nothing(fresh_base: StableDiffusionModel) -> None:
    base = attached(fresh_base, False, False)
    before = snapshot(base)
    state = {name: tensor + 1 for name, tensor in trainable_state(base).items()}
    state["unet.conv_in.bias"] = state["unet.conv_in.bias"][:1]  # broadcasting would let it through
    with pytest.raises(UserError, match="1 that differ, the first unet.conv_in.bias"):
        load_trainable_state(base, state, "x")
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_load_trainable_state_refuses_the_tensors_of_another_variant(fresh_base: StableDiffusionModel, tiny_folder: Callable[..., Path]) -> None:
    other = attached(StableDiffusion(path=str(tiny_folder())).load(), False, True)
    with pytest.raises(UserError, match="must hold exactly the tensors"):
        load_trainable_state(attached(fresh_base, False, False), trainable_state(other), "x")


def test_full_trains_a_base_of_the_second_family(tiny_folder: Callable[..., Path]) -> None:
    base = StableDiffusion(path=str(tiny_folder("sd2", "v_prediction"))).load()
    before = output(base)
    assert torch.equal(output(attached(base)), before)
    train_a_little(base, 1)
    assert not torch.equal(output(base), before)
