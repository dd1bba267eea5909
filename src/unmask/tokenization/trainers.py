"""Trainers for byte-level BPE, WordPiece, bytes and characters, each reproducible in every process.

The library's BPE trainer is reproducible. Its alphabet is the 256 bytes in a fixed order, its counts are integers, and
ties are broken by the ids of the tokens. This holds for version 0.23.3; a test trains in processes with different hash
seeds and thread counts.
Its WordPiece trainer is not. `train_wordpiece` fixes the alphabet and the order of the vocabulary around it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import models, pre_tokenizers, trainers

from unmask.core.types import ProgressCallback
from unmask.tokenization.normalization import normalizer_of, pre_tokenizer_of
from unmask.tokenization.settings import (
    BYTES,
    LONGEST_WORD,
    PREFIX,
    UNKNOWN,
    ByteBpeConfig,
    ByteConfig,
    CharacterConfig,
    WordPieceConfig,
    round_below,
    sample_blocks,
    too_few,
)
from unmask.tokenization.words import codes


def train_bpe(texts: Iterable[str], settings: ByteBpeConfig, on_progress: ProgressCallback | None) -> models.Model:
    """Train byte-level BPE: special tokens, the 256 bytes, then merged pairs, the most frequent first.

    Raises:
        VocabSizeError: the text gives fewer tokens than `vocab_size`.
    """
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = normalizer_of(settings), pre_tokenizer_of(settings)
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=settings.min_frequency,
        show_progress=False,
        special_tokens=list(settings.special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    trained.train_from_iterator(sample_blocks(texts, settings, on_progress), trainer)
    size = trained.get_vocab_size()
    if size < settings.vocab_size:
        # A smaller vocabulary is a prefix of this one. Special tokens and bytes always exist.
        raise too_few(settings.vocab_size, size, max(round_below(size), len(settings.special_tokens) + BYTES))
    model = json.loads(trained.to_str())["model"]
    return models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]])


def byte_vocabulary(settings: ByteConfig) -> models.Model:
    """Return a model of the special tokens and the 256 bytes in order: byte-level BPE without merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_of().__getitem__)
    return models.BPE({token: number for number, token in enumerate([*settings.special_tokens, *letters])}, [])


def _byte_of() -> dict[str, int]:
    """Return the byte of each letter in byte-level tokens (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_of()

_COVERAGE: Final = 0.9999  # of the sample; this takes 440 different characters for English Wikipedia, 6,400 for Korean
_SPACE: Final = 0x20
_CODES: Final = 0x110000


def train_wordpiece(
    texts: Iterable[str], settings: WordPieceConfig, on_progress: ProgressCallback | None = None
) -> list[str]:
    """Return the vocabulary in order: the special tokens, then by count in the sample, then alphabetically.

    Raises:
        VocabSizeError: the text gives fewer tokens than `vocab_size`.
    """
    normalizer = normalizer_of(settings)
    blocks = [normalizer.normalize_str(block) for block in sample_blocks(texts, settings, on_progress)]
    tokens = _wordpieces(blocks, settings)
    if len(tokens) < settings.vocab_size:
        # A smaller vocabulary may have fewer characters, so a size is tested before it is suggested.
        fits = round_below(len(tokens))
        while (
            fits > len(settings.special_tokens) and len(_wordpieces(blocks, replace(settings, vocab_size=fits))) < fits
        ):
            fits = round_below(fits - 1)
        raise too_few(settings.vocab_size, len(tokens), fits if fits > len(settings.special_tokens) else 0)
    return tokens


def choose_characters(texts: Iterable[str], settings: CharacterConfig) -> list[str]:
    """Return the special tokens, then the characters by count, then by code point."""
    counts = np.zeros(_CODES, dtype=np.int64)
    normalizer = normalizer_of(settings)
    for text in texts:
        present, times = np.unique(codes(normalizer.normalize_str(text)), return_counts=True)
        counts[present] += times
    return [*settings.special_tokens, *(chr(code) for code in _by_count(counts, settings.min_frequency))]


def _by_count(counts: NDArray[np.int64], minimum: int) -> list[int]:
    """Return the code points with at least `minimum` occurrences, the most frequent first, then by number."""
    frequent = np.flatnonzero(counts >= max(1, minimum))
    return frequent[np.argsort(-counts[frequent], kind="stable")].tolist()


def _wordpieces(blocks: Sequence[str], settings: WordPieceConfig) -> list[str]:
    """Return at most `vocab_size` tokens in order; fewer if the text gives no more.

    The most frequent characters come first, until they cover 99.99 % of the sample or fill half of the vocabulary. A
    letter takes two tokens, with and without "##". Merged tokens compete by count with further standalone characters
    (Han, punctuation), so that Chinese keeps its characters and Korean its words. Other characters fill the rest.
    """
    counts = np.zeros(_CODES, dtype=np.int64)
    for block in blocks:
        counts += np.bincount(codes(block), minlength=_CODES)
    counts[[code for code in np.flatnonzero(counts).tolist() if chr(code).isspace()]] = 0
    alphabet, standalone, spare = _alphabet(counts, settings)
    if not alphabet:
        return list(settings.special_tokens)
    is_kept = np.zeros(_CODES, dtype=bool)
    is_kept[[ord(token) for token in alphabet if len(token) == 1]] = True
    cleaned = [_keep_alphabet(block, is_kept) for block in blocks]
    merged = _merge(cleaned, alphabet, settings)
    frequency = _count_tokens(cleaned, alphabet + merged)
    frequency |= {token: int(counts[ord(token)]) if len(token) == 1 else 0 for token in standalone + spare}
    further = sorted(set(merged) | set(standalone), key=lambda token: (-frequency[token], token))
    chosen = [*alphabet, *further, *spare][: settings.vocab_size - len(settings.special_tokens)]
    return [*settings.special_tokens, *sorted(chosen, key=lambda token: (-frequency[token], token))]


def _alphabet(counts: NDArray[np.int64], settings: WordPieceConfig) -> tuple[list[str], list[str], list[str]]:
    """Return the tokens of the alphabet, further standalone characters, and tokens of all other characters."""
    alphabet, standalone, spare = list[str](), list[str](), list[str]()
    pre_tokenizer, normalizer = pre_tokenizers.BertPreTokenizer(), normalizer_of(settings)
    is_full, covered, enough = False, 0, _COVERAGE * int(counts.sum())
    for code in _by_count(counts, settings.min_frequency):
        character = chr(code)
        is_standalone = len(pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(f"a{character}a"))) > 1
        tokens = [character] if is_standalone else [character, PREFIX + character]
        is_full = is_full or covered >= enough or len(alphabet) + len(tokens) > settings.vocab_size // 2
        covered += int(counts[code])
        if not is_full:
            alphabet += tokens
        elif is_standalone:
            standalone += tokens
        else:
            spare += tokens
    return alphabet, standalone, spare


def _keep_alphabet(block: str, is_kept: NDArray[np.bool_]) -> str:
    """Return the text with a space for every character outside the alphabet."""
    code_points = codes(block)
    return np.where(is_kept[code_points], code_points, np.uint32(_SPACE)).tobytes().decode("utf-32-le")


def _merge(cleaned: Sequence[str], alphabet: Sequence[str], settings: WordPieceConfig) -> list[str]:
    """Return the tokens that the library's trainer merges from an alphabet."""
    trained = tokenizers.Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=settings.vocab_size - len(settings.special_tokens),
        min_frequency=settings.min_frequency,
        show_progress=False,
        special_tokens=list(alphabet),  # fixes their ids, and thereby how ties are broken
        continuing_subword_prefix=PREFIX,
    )
    trained.train_from_iterator(cleaned, trainer)
    known = set(alphabet) | set(settings.special_tokens)
    return [token for token in trained.get_vocab() if token not in known]


def _count_tokens(cleaned: Sequence[str], tokens: Sequence[str]) -> dict[str, int]:
    """Return how often each token occurs in the sample."""
    vocabulary = {token: number for number, token in enumerate((UNKNOWN, *tokens))}
    counting = tokenizers.Tokenizer(
        models.WordPiece(
            vocabulary, unk_token=UNKNOWN, continuing_subword_prefix=PREFIX, max_input_chars_per_word=LONGEST_WORD
        )
    )
    counting.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts = np.zeros(len(vocabulary), dtype=np.int64)
    for first in range(0, len(cleaned), 8):  # a few at a time: an encoding takes many times the memory of its text
        for encoding in counting.encode_batch_fast(list(cleaned[first : first + 8])):
            counts += np.bincount(np.array(encoding.ids, dtype=np.int64), minlength=len(vocabulary))
    return {token: int(counts[number]) for token, number in vocabulary.items()}
