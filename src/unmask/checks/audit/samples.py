"""Samples of an audit: windows of the texts with their special tokens, words and offsets.

All texts are concatenated, and samples are cut at random places, so that a small text gives enough of them.
Half of the samples have the full length, half have mixed lengths. A word cut by the edge of a sample is a word there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import NDArray

from unmask.checks.audit.settings import AuditConfig
from unmask.core import rng
from unmask.core.errors import TextError
from unmask.core.types import SPECIAL, WORD_START
from unmask.tokenization.tokenizer import Encoded, Tokenizer
from unmask.tokenization.words import WordsRule

MAX_CHARACTERS: Final = 2_000_000  # of the texts; more text gives no more information
_CHARACTERS_PER_BATCH: Final = 100_000  # of the texts that are encoded together
_MIN_SAMPLES: Final = 4  # samples that the texts must fill


class Row(NamedTuple):
    """One sample, as a masker gets it."""

    number: int
    ids: NDArray[np.int64]
    token_flags: NDArray[np.uint8]
    special_mask: NDArray[np.bool_]  # [CLS] and [SEP] that were added
    offsets: NDArray[np.int64]  # (n, 2) characters of the text; 0 and 0 for [CLS] and [SEP]


@dataclass(frozen=True)
class AuditSamples:
    """Samples by number: ((rank * rounds + round) * loaders + loader) * batch + slot."""

    rows: tuple[Row, ...]
    length_N: Int[np.ndarray, "N"]
    full_N: Bool[np.ndarray, "N"]
    ids_NS: Int[np.ndarray, "N S"]  # -1 beyond the end of a sample
    maskable_NS: Bool[np.ndarray, "N S"]
    unknown_NS: Bool[np.ndarray, "N S"]
    word_NS: Int[np.ndarray, "N S"]  # number of the word within the sample; -1 for special tokens


def make_samples(
    texts: Sequence[str], tokenizer: Tokenizer, words: WordsRule, settings: AuditConfig, *, can_pad: bool
) -> AuditSamples:
    """Cut samples from texts; those of one batch have the same length if `can_pad` is false.

    Raises:
        TextError: the texts are too short.
    """
    stream = _Stream(_encoded(texts, tokenizer, words, settings.samples * settings.length))
    num_special_tokens = tokenizer.num_special_tokens()
    inside = settings.length - num_special_tokens
    if len(stream.ids) < _MIN_SAMPLES * inside:
        raise TextError(
            f"{len(stream.ids):,} tokens are too few to audit a masker",
            hint=f"give texts of {_MIN_SAMPLES * inside:,} tokens or more, or use shorter samples: --length",
        )
    count = settings.ranks * settings.batches * settings.batch
    number_N = np.arange(count)
    round_N, slot_N = number_N // (settings.batch * settings.loaders) % settings.rounds, number_N % settings.batch
    full_N = round_N % 2 == 0
    # The same lengths for every loader and rank: otherwise two with the same random stream would diverge.
    drawn_N = 1 + rng.below(inside, settings.seed, "audit length", round_N, slot_N if can_pad else 0)
    size_N = np.where(full_N, inside, drawn_N)
    first_N = rng.below(len(stream.ids) - size_N + 1, settings.seed, "audit place", number_N)
    rows = tuple(
        stream.row(number, first, size, tokenizer)
        for number, first, size in zip(number_N.tolist(), first_N.tolist(), size_N.tolist(), strict=True)
    )
    return _to_arrays(rows, full_N, settings.length, tokenizer.unknown_id)


def _encoded(texts: Sequence[str], tokenizer: Tokenizer, words: WordsRule, min_tokens: int) -> list[Encoded]:
    """Encode texts until there are enough tokens."""
    encoded: list[Encoded] = []
    tokens, first = 0, 0
    while first < len(texts) and tokens < min_tokens:
        last, characters = first, 0
        while last < len(texts) and (last == first or characters < _CHARACTERS_PER_BATCH):
            characters += len(texts[last])
            last += 1
        new = [one for one in tokenizer.encode_batch(list(texts[first:last]), words) if len(one.ids)]
        tokens, first = tokens + sum(len(one.ids) for one in new), last
        encoded += new
    return encoded


class _Stream:
    """The tokens of all texts, concatenated."""

    def __init__(self, encoded: Sequence[Encoded]) -> None:
        self.ids = np.concatenate([np.zeros(0, np.int64), *(one.ids for one in encoded)])
        self.token_flags = np.concatenate([np.zeros(0, np.uint8), *(one.marks for one in encoded)])
        firsts = np.cumsum([0, *(len(one.ids) for one in encoded)])[:-1]
        self.token_flags[firsts] |= np.uint8(WORD_START)  # white space at the start belongs to no earlier word
        self.offsets = np.concatenate([np.zeros((0, 2), np.int64), *(one.offsets for one in encoded)])

    def row(self, number: int, first: int, size: int, tokenizer: Tokenizer) -> Row:
        span = slice(first, first + size)
        ids, flags = tokenizer.add_special_tokens(self.ids[span], self.token_flags[span])
        edge = len(tokenizer.frame.before)
        special_mask = np.ones(len(ids), dtype=bool)
        special_mask[edge : edge + size] = False
        offsets = np.zeros((len(ids), 2), dtype=np.int64)
        offsets[edge : edge + size] = self.offsets[span]
        return Row(number, ids, flags, special_mask, offsets)


def _to_arrays(rows: tuple[Row, ...], full_N: NDArray[np.bool_], length: int, unknown: int | None) -> AuditSamples:
    shape = (len(rows), length)
    ids_NS = np.full(shape, -1, dtype=np.int32)
    flags_NS = np.full(shape, SPECIAL, dtype=np.uint8)
    for row in rows:
        ids_NS[row.number, : len(row.ids)] = row.ids
        flags_NS[row.number, : len(row.ids)] = row.token_flags
    maskable_NS = (flags_NS & SPECIAL) == 0
    begins_NS = maskable_NS & ((flags_NS & WORD_START) != 0)
    begins_NS[:, 0] |= maskable_NS[:, 0]
    begins_NS[:, 1:] |= maskable_NS[:, 1:] & ~maskable_NS[:, :-1]
    word_NS = np.where(maskable_NS, np.cumsum(begins_NS, axis=1) - 1, -1).astype(np.int32)
    length_N: NDArray[np.integer[Any]] = np.array([len(row.ids) for row in rows], dtype=np.int64)
    unknown_NS = np.zeros(shape, dtype=bool) if unknown is None else ids_NS == unknown
    return AuditSamples(rows, length_N, full_N, ids_NS, maskable_NS, unknown_NS, word_NS)
