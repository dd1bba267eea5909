"""Room card: what a masker is shown.

Comes in: texts, a tokenizer, the audit's settings. Goes out: Material: samples with their special pieces, words and
offsets, half of them full, half of mixed lengths; which batch of which rank and worker holds them. Called by: judge.

All text is laid end to end and samples are cut from it at places that a hash draws, so that a small text gives as many
as are wanted. A sample's words are those of the text (text/words); one that the edge of a sample cuts is a word there.
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

MOST_CHARACTERS: Final = 2_000_000  # of the text; read beyond this, it gives nothing new
_ENCODED_AT_ONCE: Final = 100_000  # characters
_SAMPLES_OF_TEXT: Final = 4  # samples that a text must fill


class Row(NamedTuple):
    """One sample, as a masker may see it."""

    number: int
    ids: NDArray[np.int64]
    marks: NDArray[np.uint8]
    framing: NDArray[np.bool_]  # the special pieces that were set around it
    offsets: NDArray[np.int64]  # (n, 2) characters of the text, 0 and 0 for special pieces around it


@dataclass(frozen=True)
class AuditSamples:
    """Samples by their number: ((rank · turns + turn) · lanes + lane) · batch + seat."""

    rows: tuple[Row, ...]
    length_N: Int[np.ndarray, "N"]
    full_N: Bool[np.ndarray, "N"]
    ids_NS: Int[np.ndarray, "N S"]  # -1 where a sample has ended
    askable_NS: Bool[np.ndarray, "N S"]
    unknown_NS: Bool[np.ndarray, "N S"]
    word_NS: Int[np.ndarray, "N S"]  # number of its word within the sample; -1 for what can't be asked


def make_material(
    texts: Sequence[str], tokenizer: Tokenizer, words: WordsRule, settings: AuditConfig, *, pads: bool
) -> AuditSamples:
    """Cut samples from texts; where a masker can't pad (`pads` is False), those of one batch are equally long.

    Raises:
        TextError: the texts fill only a few samples.
    """
    stream = _Stream(_encoded(texts, tokenizer, words, settings.samples * settings.length))
    num_special_tokens = 2 if tokenizer.cls_sep_ids else 0
    inside = settings.length - num_special_tokens
    if len(stream.ids) < _SAMPLES_OF_TEXT * inside:
        raise TextError(
            f"{len(stream.ids):,} tokens are too few to judge a masker by",
            hint=f"give a text of {_SAMPLES_OF_TEXT * inside:,} tokens or more, or shorten the samples with --length",
        )
    count = settings.ranks * settings.places * settings.batch
    number_N = np.arange(count)
    turn_N, seat_N = number_N // (settings.batch * settings.lanes) % settings.turns, number_N % settings.batch
    full_N = turn_N % 2 == 0
    # The same lengths for every lane and rank: only then do two that draw from one stream stay in step.
    drawn_N = 1 + rng.below(inside, settings.seed, "audit length", turn_N, seat_N if pads else 0)
    size_N = np.where(full_N, inside, drawn_N)
    first_N = rng.below(len(stream.ids) - size_N + 1, settings.seed, "audit place", number_N)
    rows = tuple(
        stream.row(number, first, size, tokenizer)
        for number, first, size in zip(number_N.tolist(), first_N.tolist(), size_N.tolist(), strict=True)
    )
    return _laid_out(rows, full_N, settings.length, tokenizer.unknown_id)


def _encoded(texts: Sequence[str], tokenizer: Tokenizer, words: WordsRule, enough: int) -> list[Encoded]:
    """The first texts that hold so many tokens, or all of them."""
    done: list[Encoded] = []
    tokens, first = 0, 0
    while first < len(texts) and tokens < enough:
        last, characters = first, 0
        while last < len(texts) and (last == first or characters < _ENCODED_AT_ONCE):
            characters += len(texts[last])
            last += 1
        some = [one for one in tokenizer.encode_batch(list(texts[first:last]), words) if len(one.ids)]
        tokens, first = tokens + sum(len(one.ids) for one in some), last
        done += some
    return done


class _Stream:
    """All tokens of all texts, end to end."""

    def __init__(self, encoded: Sequence[Encoded]) -> None:
        self.ids = np.concatenate([np.zeros(0, np.int64), *(one.ids for one in encoded)])
        self.marks = np.concatenate([np.zeros(0, np.uint8), *(one.marks for one in encoded)])
        firsts = np.cumsum([0, *(len(one.ids) for one in encoded)])[:-1]
        self.marks[firsts] |= np.uint8(WORD_START)  # white space at a text's head belongs to no word of the one before
        self.offsets = np.concatenate([np.zeros((0, 2), np.int64), *(one.offsets for one in encoded)])

    def row(self, number: int, first: int, size: int, tokenizer: Tokenizer) -> Row:
        here = slice(first, first + size)
        ids, marks = tokenizer.add_special_tokens(self.ids[here], self.marks[here])
        edge = (len(ids) - size) // 2
        num_special_tokens = np.ones(len(ids), dtype=bool)
        num_special_tokens[edge : edge + size] = False
        offsets = np.zeros((len(ids), 2), dtype=np.int64)
        offsets[edge : edge + size] = self.offsets[here]
        return Row(number, ids, marks, num_special_tokens, offsets)


def _laid_out(rows: tuple[Row, ...], full_N: NDArray[np.bool_], slots: int, unknown: int | None) -> AuditSamples:
    shape = (len(rows), slots)
    ids_NS = np.full(shape, -1, dtype=np.int32)
    marks_NS = np.full(shape, SPECIAL, dtype=np.uint8)
    for row in rows:
        ids_NS[row.number, : len(row.ids)] = row.ids
        marks_NS[row.number, : len(row.ids)] = row.marks
    askable_NS = (marks_NS & SPECIAL) == 0
    begins_NS = askable_NS & ((marks_NS & WORD_START) != 0)
    begins_NS[:, 0] |= askable_NS[:, 0]
    begins_NS[:, 1:] |= askable_NS[:, 1:] & ~askable_NS[:, :-1]
    word_NS = np.where(askable_NS, np.cumsum(begins_NS, axis=1) - 1, -1).astype(np.int32)
    length_N: NDArray[np.integer[Any]] = np.array([len(row.ids) for row in rows], dtype=np.int64)
    unknown_NS = np.zeros(shape, dtype=bool) if unknown is None else ids_NS == unknown
    return AuditSamples(rows, length_N, full_N, ids_NS, askable_NS, unknown_NS, word_NS)
