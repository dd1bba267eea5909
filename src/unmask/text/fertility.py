"""Room card: how a tokenizer cuts a text, in numbers.

Comes in: a tokenizer and some text. Goes out: tokens per word, characters per token, what it can't spell, how fast it
is; and its cuts with their words. Called by: `unmask tokenizer`.

Words are those of the text, so that tokenizers compare; a token of several words (Chinese) makes less than one of each.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from unmask.contracts import SENTENCE_START, SPECIAL, WORD_START, Source
from unmask.text.spelling import Reader
from unmask.text.tokenizer import Tokenizer
from unmask.text.words import WordsRule, word_starts


@dataclass(frozen=True)
class Measured:
    """A text by a tokenizer."""

    characters: int
    words: int
    tokens: int
    tokens_per_word: float
    characters_per_token: float
    unknown_share: float  # of the characters
    tokens_per_second: float  # ids, marks and offsets
    vocabulary: int


@dataclass(frozen=True)
class Cut:
    """One token of a text."""

    id: int
    piece: str  # as the vocabulary has it
    shown: str  # for a person
    first: int  # characters of the text [first, last)
    last: int
    starts_word: bool
    starts_sentence: bool
    is_special: bool


def some_text(source: Source, most_characters: int) -> Iterator[str]:
    """The first passages of a source, so many characters at most."""
    left = most_characters
    for part in source.parts():
        for passage in source.documents(part):
            yield passage.text[:left]
            left -= len(passage.text)
            if left <= 0:
                return


def measure(tokenizer: Tokenizer, texts: Iterable[str], rule: WordsRule) -> Measured:
    """Counts over all texts; the clock runs while they are encoded, on the threads that the library takes."""
    held = [text for text in texts if text]
    if held:
        tokenizer.encode(held[0][:1000], rule)  # the first call pays for tables
    began = time.perf_counter()
    encoded = tokenizer.encode_batch(held, rule)
    seconds = time.perf_counter() - began
    characters, tokens = sum(map(len, held)), sum(len(one.ids) for one in encoded)
    words = sum(int(word_starts(text, rule).sum()) for text in held)
    return Measured(
        characters=characters,
        words=words,
        tokens=tokens,
        tokens_per_word=tokens / max(1, words),
        characters_per_token=characters / max(1, tokens),
        unknown_share=sum(one.characters_unknown for one in encoded) / max(1, characters),
        tokens_per_second=tokens / max(seconds, 1e-9),
        vocabulary=tokenizer.size,
    )


def cuts(tokenizer: Tokenizer, text: str, rule: WordsRule, *, is_prompt: bool) -> list[Cut]:
    """The tokens of a text; special pieces in it are that in a prompt, letters in a text to learn from."""
    encoded, reader = tokenizer.encode(text, rule, specials_in_text=is_prompt), Reader(tokenizer)
    return [
        Cut(
            id,
            tokenizer.id_to_token(id),
            reader.shown(id),
            first,
            last,
            bool(mark & WORD_START),
            bool(mark & SENTENCE_START),
            bool(mark & SPECIAL),
        )
        for id, (first, last), mark in zip(
            encoded.ids.tolist(), encoded.offsets.tolist(), np.asarray(encoded.marks).tolist(), strict=True
        )
    ]
