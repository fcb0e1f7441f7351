"""Which words are rare, and what a word splits into: on a tokenizer whose merges are known, and on the lab's."""

from pathlib import Path
from typing import Any

import pytest
from tiny_pipelines import WORDS, build_tokenizer

from dreambooth.__main__ import main
from dreambooth.lab.splits import RARE_TOKENS
from dreambooth.tokens import judge, rare_tokens

LATE = ["qzv", "jxk", "sks", "zoo", "bbc", "vwqx"]  # the last words to be merged: two rare ones, a rifle, a word, a channel, one of four letters


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_tokenizer(tmp_path_factory.mktemp("tokens"), [*(word for word in WORDS if word not in LATE), *LATE])


def test_judge_calls_a_late_single_token_rare(tokenizer: Any) -> None:
    verdict = judge(tokenizer, "qzv")
    assert (verdict.kind, verdict.ids, verdict.pieces) == ("rare", [tokenizer.get_vocab()["qzv</w>"]], ["qzv"])


def test_judge_shows_what_a_word_splits_into(tokenizer: Any) -> None:
    verdict = judge(tokenizer, "qzvy")  # qzv is a token at the end of a word only, y</w> is a letter
    assert (verdict.kind, verdict.pieces) == ("several", ["qz", "v", "y"])
    assert "3 tokens, qz + v + y" in verdict.sentence


def test_judge_calls_two_words_several_tokens(tokenizer: Any) -> None:
    assert judge(tokenizer, "qzv jxk").kind == "several"


def test_judge_calls_an_early_token_common(tokenizer: Any) -> None:
    assert judge(tokenizer, "dog").kind == "common"


def test_judge_calls_a_single_letter_common(tokenizer: Any) -> None:
    assert judge(tokenizer, "z").kind == "common"


def test_judge_calls_an_english_word_common_however_late_it_is(tokenizer: Any) -> None:
    assert judge(tokenizer, "zoo").kind == "common"


@pytest.mark.parametrize(("word", "meaning"), [("sks", "a rifle"), ("SKS", "a rifle"), ("bbc", "a broadcaster")])
def test_judge_says_what_a_rare_token_means(tokenizer: Any, word: str, meaning: str) -> None:
    verdict = judge(tokenizer, word)
    assert verdict.kind == "meaning" and meaning in verdict.sentence


def test_judge_lets_an_added_token_be(tokenizer: Any, tmp_path: Path) -> None:
    own = build_tokenizer(tmp_path)
    own.add_tokens("<rex>")
    assert judge(own, "<rex>").kind == "rare" and judge(tokenizer, "<rex>").kind == "several"


def test_rare_tokens_are_the_late_ones_without_a_meaning(tokenizer: Any) -> None:
    assert [word for word, _ in rare_tokens(tokenizer, 100)] == ["qzv", "jxk"]


def test_rare_tokens_may_be_longer_on_request(tokenizer: Any) -> None:
    assert [word for word, _ in rare_tokens(tokenizer, 100, longest=4)] == ["qzv", "jxk", "vwqx"]


def test_rare_tokens_are_drawn_by_the_seed_in_the_order_of_their_ids(tokenizer: Any) -> None:
    draws = {seed: rare_tokens(tokenizer, 2, seed, longest=4) for seed in range(8)}
    assert draws[3] == rare_tokens(tokenizer, 2, 3, longest=4)
    assert len(set(map(tuple, draws.values()))) > 1
    assert all(found == sorted(found, key=lambda token: token.token_id) and len(found) == 2 for found in draws.values())


def test_tokens_command_lists_the_words_that_the_lab_keeps_free(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokens"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert listed == list(RARE_TOKENS)


def test_tokens_command_judges_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokens", "--word", "sks", "robot", "xqzw"]) == 0
    rare, common, several = capsys.readouterr().out.splitlines()
    assert "single token" in rare and "common word" in common and "tokens, " in several


def test_tokens_command_reads_any_base(tiny_folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokens", "--base", str(tiny_folder()), "--longest", "6", "--count", "3"]) == 0
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert 0 < len(words) <= 3 and set(words) <= set(WORDS[-20:])


def test_tokens_command_names_a_base_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokens", "--base", "no/such/folder"]) == 2
    assert "base.path" in capsys.readouterr().err
