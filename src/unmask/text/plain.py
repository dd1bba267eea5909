"""Room card: plain chunks, encoded without offsets.

Comes in: chunks of a space (or line feed) and letters, numbers, perhaps punctuation. Goes out: their rows for the
table, and which of them are better looked at closely. Called by: encoder.

Which tokens start words can be read off the pieces: where pieces carry the space before their word, by that; with
WordPiece, by what continues a word, since in such chunks its words are ours (rule "spaces"). Nothing else needs to be
known of a plain chunk, so that Korean, a quarter of whose chunks are new, is learnt without asking for offsets.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np
import tokenizers
from numpy.typing import NDArray

from unmask.contracts import WORD_START
from unmask.text.chunks import ENDS_AT_SPACE, LEAD, LED_BY_LINE, LED_BY_SPACE, NUMBER, Rows, flags_of
from unmask.text.structure import leading_space, lines_are_spaces
from unmask.text.tokenizer import Tokenizer
from unmask.text.words import CLOSERS, FULL_STOPS, KOREAN_ENDINGS, STOPS, KindsOfCharacters, codes

_BLOCK_CHARACTERS: Final = 1 << 12  # of chunks that are encoded as one text
_LETTER, _PUNCTUATION, _SPACE, _LINE, _OTHER = 1, 2, 3, 4, 5  # kinds of characters; 0: not looked up yet
_ENDS: Final = np.array([ord(character) for character in STOPS.replace(".", "")], dtype=np.uint32)
_LOOKED_AT: Final = np.array([ord(character) for character in CLOSERS + "."], dtype=np.uint32)  # may end nothing
_KOREAN: Final = np.array([ord(character) for character in KOREAN_ENDINGS], dtype=np.uint32)
_HAN: Final = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2FA1F))


def _kind(code: int) -> int:
    character = chr(code)
    if character in " \n":
        return _SPACE if character == " " else _LINE
    if character.isalnum():  # WordPiece also parts ideographs, which the rule "spaces" doesn't
        return _OTHER if any(first <= code <= last for first, last in _HAN) else _LETTER
    if "!" <= character <= "~":
        return _PUNCTUATION
    # WordPiece parts what Unicode calls punctuation; of it, these end sentences within a chunk.
    return _PUNCTUATION if unicodedata.category(character)[0] == "P" and character not in FULL_STOPS else _OTHER


_kinds = KindsOfCharacters(_kind)


def blocks(lengths: Sequence[int], characters: int) -> list[int]:
    """How many neighbouring chunks to join to each text, so that it has about so many characters."""
    sizes, size, room = list[int](), 0, characters
    for length in lengths:
        size, room = size + 1, room - length
        if room <= 0:
            sizes.append(size)
            size, room = 0, characters
    return [*sizes, size] if size else sizes


def texts_of(chunks: Sequence[str], sizes: Sequence[int]) -> list[str]:
    """Neighbouring chunks joined, so many to each text."""
    bounds = itertools.accumulate(sizes, initial=0)
    return ["".join(chunks[first:last]) for first, last in itertools.pairwise(bounds)]


class PlainWords:
    """Encodes plain words with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self._starts_V = _starting(tokenizer)
        self._unknown_id = -1 if tokenizer.unknown_id is None else tokenizer.unknown_id
        # WordPiece parts punctuation from letters as the rule for words does, and an unknown word is one token.
        self._is_wordpiece = not leading_space(tokenizer.to_json())
        self._lines_are_spaces = lines_are_spaces(tokenizer.to_json())

    @property
    def can(self) -> bool:
        """Whether its pieces say where words start."""
        return self._starts_V is not None

    def sorted_out(self, chunks: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The numbers of chunks that can be encoded here, and how many words each of them is."""
        sizes_C = np.fromiter(map(len, chunks), dtype=np.int64, count=len(chunks))
        text = "".join(chunks)
        if not text:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        codes_N = codes(text)
        kinds_N = _kinds(codes_N)
        if self._is_wordpiece:  # a sentence may end within 갔다.그는
            ends = np.flatnonzero((kinds_N[1:-1] == _PUNCTUATION) & (kinds_N[2:] != _SPACE)) + 1
            kinds_N[ends[np.isin(codes_N[ends - 1], _KOREAN)]] = _OTHER
        within_N1 = np.append(0, np.cumsum((kinds_N == _LETTER) | (self._is_wordpiece & (kinds_N == _PUNCTUATION))))
        starts_N = kinds_N == _PUNCTUATION
        starts_N[1:] |= (kinds_N[1:] == _LETTER) & (kinds_N[:-1] != _LETTER)
        words_N1 = np.append(0, np.cumsum(starts_N))
        ends_C = np.cumsum(sizes_C)
        first_C = ends_C - sizes_C
        begins_C = kinds_N[np.minimum(first_C, len(kinds_N) - 1)]
        is_led_C = (begins_C == _SPACE) | (self._lines_are_spaces & (begins_C == _LINE))
        plain = np.flatnonzero(is_led_C & (sizes_C > 1) & (within_N1[ends_C] - within_N1[first_C] == sizes_C - 1))
        return plain, (words_N1[ends_C] - words_N1[first_C])[plain]

    def rows(self, chunks: Sequence[str], words_C: NDArray[np.int64]) -> tuple[Rows, NDArray[np.bool_]]:
        """Rows of chunks of so many words, and whether each row is right; what isn't must be encoded otherwise."""
        assert self._starts_V is not None, "pieces that say where words start"
        sizes = blocks([len(chunk) for chunk in chunks], _BLOCK_CHARACTERS)
        texts = texts_of(chunks, sizes)
        encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        good_C = np.ones(len(chunks), dtype=np.bool_)
        parts: list[NDArray[np.int32]] = []
        counts: list[NDArray[np.int64]] = []
        first = 0
        for encoding, size in zip(encodings, sizes, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            starts = np.flatnonzero(self._starts_V[ids])
            unknown = np.flatnonzero(ids == self._unknown_id)
            until_C = np.cumsum(words_C[first : first + size])
            is_clear = len(starts) == until_C[-1] and starts[0] == 0 and (self._is_wordpiece or not len(unknown))
            if is_clear:
                parts.append(ids)
                begins = starts[np.append(0, until_C[:-1])]
                counts.append(np.diff(begins, append=len(ids)))
                good_C[first + np.searchsorted(begins, unknown, side="right") - 1] = False
            else:  # a word that is several to this tokenizer
                counts.append(np.zeros(size, dtype=np.int64))
                good_C[first : first + size] = False
            first += size
        ids = np.concatenate([np.zeros(0, dtype=np.int32), *parts])
        tokens_C = np.concatenate([np.zeros(0, dtype=np.int64), *counts])
        marks = self._starts_V[ids].view(np.uint8) * np.uint8(WORD_START)
        marks[(np.cumsum(tokens_C) - tokens_C)[tokens_C > 0]] |= np.uint8(LEAD)
        first_C, last_C = (codes("".join([chunk[end] for chunk in chunks])) for end in (0, -1))
        flags_C = np.full(len(chunks), LED_BY_SPACE, dtype=np.uint8)
        flags_C[first_C == ord("\n")] |= LED_BY_LINE
        flags_C[np.isin(last_C, _ENDS)] |= ENDS_AT_SPACE
        flags_C[[chunk[1].isdecimal() for chunk in chunks]] |= NUMBER
        for number in np.flatnonzero(np.isin(last_C, _LOOKED_AT)).tolist():
            flags_C[number] = flags_of(chunks[number])
        return Rows(ids, marks, tokens_C, np.zeros(len(chunks), dtype=np.int64), flags_C), good_C


def _starting(tokenizer: Tokenizer) -> NDArray[np.bool_] | None:
    """Which pieces start a word that stands alone behind a space; None where pieces don't say."""
    told = tokenizer.to_json()
    space = leading_space(told)
    model = cast("dict[str, Any]", json.loads(told))["model"]
    if not space and model["type"] != "WordPiece":
        return None
    starts_V = np.zeros(tokenizer.size, dtype=np.bool_)
    for piece, number in tokenizers.Tokenizer.from_str(told).get_vocab(with_added_tokens=True).items():
        starts_V[number] = (
            piece.startswith(space) if space else not piece.startswith(model["continuing_subword_prefix"])
        )
    return starts_V
