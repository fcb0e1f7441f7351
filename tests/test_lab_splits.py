"""What pretraining may see: held-out classes, contexts and identities never come out of its stream, and its words are known beforehand."""

from collections import Counter

import pytest
import torch

from dreambooth.errors import ConfigError
from dreambooth.lab.identities import ACCESSORIES, COLORS, SURFACES, identity
from dreambooth.lab.splits import (
    HELD_OUT_CLASSES,
    HELD_OUT_CONTEXTS,
    KINDS,
    RARE_TOKENS,
    TRAINED_CLASSES,
    TRAINED_CONTEXTS,
    draw_training_item,
    is_held_out,
    prompts,
    true_scene,
    vocabulary,
)
from dreambooth.lab.world import CLASSES, CONTEXTS, caption, render

COUNT = 4000
STREAM = [draw_training_item(index) for index in range(COUNT)]


def share(count: int) -> float:
    return count / COUNT


def test_splits_part_all_classes_and_contexts() -> None:
    assert sorted(TRAINED_CLASSES + HELD_OUT_CLASSES) == sorted(CLASSES)
    assert sorted(TRAINED_CONTEXTS + HELD_OUT_CONTEXTS) == sorted(CONTEXTS)


def test_splits_hold_out_and_train_at_least_two_of_the_new() -> None:
    assert TRAINED_CLASSES[:10] == CLASSES[:10] and TRAINED_CONTEXTS[:12] == CONTEXTS[:12]
    assert min(len(TRAINED_CLASSES) - 10, len(HELD_OUT_CLASSES), len(TRAINED_CONTEXTS) - 12, len(HELD_OUT_CONTEXTS)) >= 2


def test_is_held_out_covers_the_subjects_of_the_experiments() -> None:
    assert all(is_held_out(seed) for seed in (900, 913, 921, 931, 999))
    assert not any(is_held_out(seed) for seed in (0, 899, 1000, 100_000))


def test_stream_yields_nothing_that_is_held_out() -> None:
    for subject, context, _, words in STREAM:
        assert subject.class_noun in TRAINED_CLASSES and context in TRAINED_CONTEXTS and not is_held_out(subject.seed)
        assert not any(name in words for name in (*HELD_OUT_CLASSES, *HELD_OUT_CONTEXTS))


def test_stream_yields_all_that_is_trained() -> None:
    assert {item.subject.class_noun for item in STREAM} == set(TRAINED_CLASSES)
    assert {item.context for item in STREAM} == set(TRAINED_CONTEXTS)
    assert {item.subject.accessory for item in STREAM} == {None, *ACCESSORIES}
    assert {item.subject.surface for item in STREAM} == {None, *SURFACES}


def test_stream_is_a_function_of_the_index() -> None:
    assert [draw_training_item(index) for index in (7, 3, 7)] == [STREAM[7], STREAM[3], STREAM[7]]


def test_stream_shows_each_subject_and_each_view_about_once() -> None:
    assert len({item.seed for item in STREAM}) == COUNT
    assert len({(item.subject.class_noun, item.subject.seed) for item in STREAM}) > 0.99 * COUNT


def test_stream_captions_vary_as_the_odds_say() -> None:
    counts = Counter(
        word
        for item in STREAM
        for word, holds in {
            "color": item.subject.main_color in item.caption.split(),
            "context": item.caption.endswith(item.context),
            "photo": item.caption.startswith("a photo of "),
            "accessory": item.subject.accessory is not None,
            "surface": item.subject.surface is not None,
        }.items()
        if holds
    )
    found = [share(counts[word]) for word in ("color", "context", "photo", "accessory", "surface")]
    assert found == pytest.approx([0.4, 0.85, 0.8, 0.2, 0.1], abs=0.03)


def test_stream_captions_name_accessory_and_surface_always() -> None:
    for subject, _, _, words in STREAM:
        assert subject.accessory is None or ACCESSORIES[subject.accessory] in words
        assert subject.surface is None or f" {subject.surface} " in words
        assert subject.class_noun in words.split()


def test_stream_captions_hold_no_rare_token_and_only_known_words() -> None:
    used = {word for item in STREAM for word in item.caption.split()}
    assert not used & set(RARE_TOKENS)
    assert used <= set(vocabulary())


def test_stream_items_render() -> None:
    subject, context, seed, _ = STREAM[0]
    assert torch.equal(render([subject], [context], [seed]), render([draw_training_item(0).subject], [context], [seed]))


def test_captions_fit_the_sixteen_tokens_of_the_lab_when_each_word_is_one() -> None:
    longest = max(
        len(caption(identity("car", 0, accessory=accessory, surface=surface), context, color=True).split())
        for accessory in ACCESSORIES
        for surface in SURFACES
        for context in CONTEXTS
    )
    assert longest + 2 <= 16  # and the two that begin and end a prompt


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_hold_the_place_of_the_subject_once(kind: str) -> None:
    found = prompts(kind)
    assert len(found) == len(set(found)) and all(prompt.count("{subject}") == 1 for prompt in found)
    assert {word for prompt in found for word in prompt.format(subject="sks robot").split()} <= set(vocabulary())


def test_prompts_cover_the_world() -> None:
    assert [len(prompts(kind)) for kind in KINDS] == [len(CONTEXTS), len(COLORS) + len(SURFACES), len(ACCESSORIES)]


def test_prompts_of_an_unknown_kind_name_the_kinds() -> None:
    with pytest.raises(ConfigError, match="kind must be a kind of prompt of the lab's world, got 'style'; choose one of recontext"):
        prompts("style")


@pytest.mark.parametrize(
    ("template", "extra", "context"),
    [
        ("a photo of a {subject} in a cave", {}, "in a cave"),
        ("a photo of an orange {subject}", {"main_color": "orange"}, None),
        ("a photo of a spotted {subject}", {"surface": "spotted"}, None),
        ("a photo of a {subject} with a flag", {"accessory": "flag"}, None),
    ],
)
def test_true_scene_is_what_the_prompt_asks_for(template: str, extra: dict[str, str], context: str | None) -> None:
    assert true_scene(template, "robot", 913) == (identity("robot", 913, **extra), context)


def test_true_scene_of_every_prompt_has_that_caption() -> None:
    for kind in KINDS:
        for template in prompts(kind):
            subject, context = true_scene(template, "robot", 913)
            names_color = f" {subject.main_color} " in template
            assert caption(subject, context, color=names_color) == template.format(subject="robot")


def test_true_scene_refuses_another_prompt() -> None:
    with pytest.raises(ConfigError, match="template must be a prompt of the lab's world, got 'a robot'"):
        true_scene("a robot", "robot", 1)


def test_vocabulary_has_every_word_once_and_the_rare_tokens() -> None:
    words = vocabulary()
    assert words == sorted(set(words)) and set(RARE_TOKENS) <= set(words)
    assert {word for context in CONTEXTS for word in context.split()} | set(CLASSES) | set(COLORS) <= set(words)
