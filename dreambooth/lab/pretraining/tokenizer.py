"""The lab's CLIP tokenizer: every word of the world is one token, the rare words too, and any other text is spelled in pieces."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

MAX_TOKENS = 24  # the longest caption has 16 with both marks; a rare word and an adjective or two still fit
START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-'"
WORD_END = "</w>"


def merge_rules(words: Sequence[str]) -> list[tuple[str, str]]:
    """Returns byte-pair merges after which each of the words is one symbol; the same for the same set of words.

    The most frequent neighbours are joined first, the alphabetically first of equals, until no word is in pieces. The tokenizer replays
    the rules in this order, so it arrives at the same whole words.
    """
    pieces = [[*word[:-1], word[-1] + WORD_END] for word in sorted(set(words))]
    rules = []
    while True:
        counts = Counter(pair for word in pieces for pair in zip(word, word[1:], strict=False))
        if not counts:
            return rules
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        rules.append(best)
        pieces = [_join(word, best) for word in pieces]


def _join(word: list[str], pair: tuple[str, str]) -> list[str]:
    """Returns the pieces of a word with each occurrence of the pair joined, from the left."""
    joined, place = [], 0
    while place < len(word):
        is_pair = tuple(word[place : place + 2]) == pair
        joined.append("".join(pair) if is_pair else word[place])
        place += 2 if is_pair else 1
    return joined


def build_tokenizer(words: Sequence[str], max_tokens: int = MAX_TOKENS) -> Any:
    """Returns a transformers CLIPTokenizer in which each of the words is one token.

    Args:
        words: lower case, of the letters a-z, digits and , . - '.
        max_tokens: length of a padded prompt, with both marks.
    """
    from transformers import CLIPTokenizer

    rules = merge_rules(words)
    symbols = [START, END, *LETTERS, *(letter + WORD_END for letter in LETTERS), *("".join(rule) for rule in rules)]
    vocab = {symbol: number for number, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocab, merges=rules, bos_token=START, eos_token=END, unk_token=END, pad_token=END, model_max_length=max_tokens)


def save_tokenizer(tokenizer: Any, folder: Any) -> None:
    """Writes the tokenizer with the names that old and new tools read: tokenizer.json, vocab.json and merges.txt."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def token_ids(tokenizer: Any, captions: Sequence[str]) -> Any:
    """Returns padded ids (N, L) int64 of captions, none of which may be too long."""
    import torch

    distinct = list(dict.fromkeys(captions))
    rows = tokenizer(distinct, padding="max_length", max_length=tokenizer.model_max_length, truncation=False).input_ids
    numbers = {words: number for number, words in enumerate(distinct)}
    return torch.tensor(rows)[torch.tensor([numbers[words] for words in captions])]
