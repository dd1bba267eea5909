"""`CachedEncoder`: encodes many texts with the results of `Tokenizer.encode`, and caches the tokens of chunks.

Texts are split into chunks, before spaces or Han characters. A table stores the tokens of each chunk, and flags that
show whether a sentence starts after it. Plain chunks are encoded without offsets (`PlainWords`), the others with them.

Suffixes of arrays: B texts, K chunks in texts, C distinct chunks, T tokens, N characters, V vocabulary.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, cast

import numpy as np
import tokenizers
from jaxtyping import Int, UInt8
from numpy.typing import NDArray

from unmask.core.types import SENTENCE_START, SPECIAL, WORD_START, runs
from unmask.tokenization.normalization import leading_space, lines_are_spaces, splits_at_lines, without_specials
from unmask.tokenization.tokenizer import Tokenizer, token_marks
from unmask.tokenization.words import (
    CLOSERS,
    FULL_STOPS,
    KOREAN_ENDINGS,
    STOPS,
    CharacterKinds,
    WordsRule,
    classify_stop,
    codes,
)

LEAD: Final = 128  # mark of the token that starts a sentence if its chunk does
# Flags of a chunk:
ENDS_AT_SPACE: Final = 1  # a sentence starts after the chunk if white space follows
ENDS_ANYWHERE: Final = 2  # a sentence starts after the chunk
AFTER_SPACE: Final = 4  # begins with a space or a line feed
OPEN_END: Final = 8  # inseparable from the next chunk: its end is invisible, or has no token
OPEN_START: Final = 16  # inseparable from the previous chunk: nothing visible follows its space
AFTER_LINE: Final = 32  # begins with a line feed, so a sentence starts with the chunk
UNLESS_NUMBER: Final = 64  # no sentence starts after the chunk if a number follows
NUMBER: Final = 128  # begins with a digit, after its space or line feed
_HAN: Final = "\u3400-\u4dbf\u4e00-\u9fff"  # characters that BERT's normalizer isolates and NFC does not change
HAN_CUTS: Final = re.compile(rf"(?<=\S)(?= \S|[{_HAN}])")
HAN_AND_LINE_CUTS: Final = re.compile(rf"(?<=\S)(?=[ \n]\S|[{_HAN}])")
STARTS_WITH_HAN: Final = re.compile(f"[{_HAN}]")
_INITIAL_SIZE: Final = 1 << 10
_CONTROLS: Final = (*range(0x20), *range(0x7F, 0xA0))
_SPACES: Final = (0x20, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
INVISIBLE: Final = frozenset(["", *map(chr, _CONTROLS), *map(chr, _SPACES)])  # white space, control characters, nothing
_AT_BEGINNING: Final = {" ": AFTER_SPACE, "\n": AFTER_SPACE | AFTER_LINE}
_AT_END: Final = {
    **dict.fromkeys(INVISIBLE, OPEN_END),
    **dict.fromkeys(FULL_STOPS, ENDS_ANYWHERE),
    **dict.fromkeys(STOPS, ENDS_AT_SPACE),
}
_STOP_FLAGS: Final = {"end": ENDS_AT_SPACE, "no end": 0, "end unless a number follows": ENDS_AT_SPACE | UNLESS_NUMBER}


class EncodedTexts(NamedTuple):
    """The tokens of several texts, concatenated."""

    ids: Int[np.ndarray, "T"]
    marks: UInt8[np.ndarray, "T"]
    num_tokens: Int[np.ndarray, "B"]  # of each text
    num_unknown: Int[np.ndarray, "B"]  # characters of each text that became [UNK]


class ChunkTokens(NamedTuple):
    """The concatenated tokens of chunks, and the flags and counts of each chunk."""

    ids: NDArray[np.int32]
    marks: NDArray[np.uint8]
    tokens_C: NDArray[np.int64]
    unknown_C: NDArray[np.int64]
    flags_C: NDArray[np.uint8]

    def concatenate(self, other: ChunkTokens) -> ChunkTokens:
        """Return these chunks, followed by others."""
        return ChunkTokens(
            np.concatenate([self.ids, other.ids]),
            np.concatenate([self.marks, other.marks]),
            np.concatenate([self.tokens_C, other.tokens_C]),
            np.concatenate([self.unknown_C, other.unknown_C]),
            np.concatenate([self.flags_C, other.flags_C]),
        )

    def select(self, chunks: NDArray[np.int64]) -> ChunkTokens:
        """Return the chunks of these numbers, in this order."""
        tokens_C = self.tokens_C[chunks]
        first_C = (np.cumsum(self.tokens_C) - self.tokens_C)[chunks]
        place_T = runs(first_C, tokens_C)
        return ChunkTokens(
            self.ids[place_T], self.marks[place_T], tokens_C, self.unknown_C[chunks], self.flags_C[chunks]
        )


class ChunkTable:
    """A growing table of chunks, addressed by number."""

    def __init__(self) -> None:
        self.count = self.tokens = 0
        self._first_C, self._tokens_C, self._unknown_C, self.uses_C = (
            np.zeros(_INITIAL_SIZE, dtype=np.int64) for _ in range(4)
        )
        self.flags_C: NDArray[np.uint8] = np.zeros(_INITIAL_SIZE, dtype=np.uint8)
        self._ids, self._marks = np.zeros(_INITIAL_SIZE, dtype=np.int32), np.zeros(_INITIAL_SIZE, dtype=np.uint8)

    def add(self, encoded: ChunkTokens) -> int:
        """Append chunks and return the number of the first."""
        number, used = self.count, self.tokens
        self.count, self.tokens = number + len(encoded.tokens_C), used + len(encoded.ids)
        for name in ("_first_C", "_tokens_C", "_unknown_C", "uses_C", "flags_C"):
            setattr(self, name, _grow(getattr(self, name), self.count))
        self._ids, self._marks = _grow(self._ids, self.tokens), _grow(self._marks, self.tokens)
        self._ids[used : self.tokens], self._marks[used : self.tokens] = encoded.ids, encoded.marks
        span = slice(number, self.count)
        self._first_C[span] = used + np.cumsum(encoded.tokens_C) - encoded.tokens_C
        self._tokens_C[span], self._unknown_C[span], self.flags_C[span] = (
            encoded.tokens_C,
            encoded.unknown_C,
            encoded.flags_C,
        )
        self.uses_C[span] = 0
        return number

    def content(self) -> ChunkTokens:
        """Return all chunks of the table."""
        chunks, tokens = slice(0, self.count), slice(0, self.tokens)
        known = (self._tokens_C[chunks], self._unknown_C[chunks], self.flags_C[chunks])
        return ChunkTokens(self._ids[tokens], self._marks[tokens], *known)

    def truncate(self, count: int, tokens: int) -> None:
        """Shrink the table to an earlier size."""
        self.count, self.tokens = count, tokens

    def assemble(self, numbers_K: NDArray[np.int64], first_B: NDArray[np.int64]) -> EncodedTexts:
        """Return the tokens of texts, from the numbers of their chunks and the index of each text's first chunk."""
        tokens_K, flags_K = self._tokens_C[numbers_K], self.flags_C[numbers_K]
        after_space_K = (flags_K & AFTER_SPACE) // AFTER_SPACE  # as the bit ENDS_AT_SPACE
        before_number_K = (flags_K[:-1] & UNLESS_NUMBER) // UNLESS_NUMBER & flags_K[1:] // NUMBER  # as in "No. 5"
        starts_K = np.ones(len(numbers_K), dtype=np.bool_)
        starts_K[1:] = (flags_K[:-1] & (ENDS_ANYWHERE | after_space_K[1:] & ~before_number_K)) | (
            flags_K[1:] & AFTER_LINE
        ) != 0
        starts_K[first_B] = True
        place_T = runs(self._first_C[numbers_K], tokens_K)
        marks = self._marks[place_T]
        leads_T = (marks >= LEAD) & np.repeat(starts_K, tokens_K)
        marks &= np.uint8(LEAD - 1)
        marks |= leads_T.view(np.uint8) * np.uint8(SENTENCE_START)
        self.uses_C[: self.count] += np.bincount(numbers_K, minlength=self.count)
        unknown_B = np.add.reduceat(self._unknown_C[numbers_K], first_B)
        return EncodedTexts(self._ids[place_T], marks, np.add.reduceat(tokens_K, first_B), unknown_B)


def _grow(array: NDArray[Any], needed: int) -> NDArray[Any]:
    """Return the array with at least this length; the new part is zero."""
    if needed <= len(array):
        return array
    return np.concatenate([array, np.zeros(max(needed, 2 * len(array)) - len(array), dtype=array.dtype)])


def flags_of(chunk: str) -> int:
    """Return the flags of a chunk that follow from its text."""
    flags = _AT_BEGINNING.get(chunk[:1], 0)
    has_space = flags != 0
    begins = chunk[has_space : has_space + 1]
    if begins in INVISIBLE:
        flags |= OPEN_START
    elif has_space and begins.isdecimal():
        flags |= NUMBER
    last = len(chunk)
    if chunk[-1:] in CLOSERS:
        last = len(chunk.rstrip(CLOSERS))
        if chunk[last - 1 : last] in INVISIBLE:
            return flags
    if chunk[last - 1 : last] == ".":
        return flags | _STOP_FLAGS[classify_stop(chunk, last - 1)]
    return flags | _AT_END.get(chunk[last - 1 : last], 0)


def isolates_han(tokenizer_json: str) -> bool:
    """Return whether every Han character is a separate pre-token, so that a text may be split before it."""
    spec = cast("dict[str, Any]", json.loads(tokenizer_json))
    normalizer, pre_tokenizer = spec["normalizer"] or {}, spec["pre_tokenizer"] or {}
    if pre_tokenizer.get("type") == "BertPreTokenizer":
        return any(step.get("handle_chinese_chars", False) for step in normalizer.get("normalizers", [normalizer]))
    return pre_tokenizer.get("type") == "Split" and pre_tokenizer.get("pattern") == {"Regex": r"[\s\S]"}


_PLAIN_BLOCK_CHARACTERS: Final = 1 << 12  # characters of the chunks that are joined to one text
_LETTER, _PUNCTUATION, _SPACE, _PLAIN_LINE, _OTHER = 1, 2, 3, 4, 5  # kinds of characters; 0: not looked up yet
_ENDS: Final = np.array([ord(character) for character in STOPS.replace(".", "")], dtype=np.uint32)
_CHECKED: Final = np.array([ord(character) for character in CLOSERS + "."], dtype=np.uint32)  # may not end a sentence
_KOREAN: Final = np.array([ord(character) for character in KOREAN_ENDINGS], dtype=np.uint32)
_PLAIN_HAN: Final = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2FA1F))


def _kind(code: int) -> int:
    character = chr(code)
    if character in " \n":
        return _SPACE if character == " " else _PLAIN_LINE
    if character.isalnum():  # WordPiece also isolates Han characters, the rule "spaces" doesn't
        return _OTHER if any(first <= code <= last for first, last in _PLAIN_HAN) else _LETTER
    if "!" <= character <= "~":
        return _PUNCTUATION
    # WordPiece isolates Unicode punctuation. FULL_STOPS also end sentences within a chunk.
    return _PUNCTUATION if unicodedata.category(character)[0] == "P" and character not in FULL_STOPS else _OTHER


_kinds = CharacterKinds(_kind)


def block_sizes(lengths: Sequence[int], characters: int) -> list[int]:
    """Return how many neighboring chunks to join to each text, for texts of about `characters` characters."""
    sizes, size, left = list[int](), 0, characters
    for length in lengths:
        size, left = size + 1, left - length
        if left <= 0:
            sizes.append(size)
            size, left = 0, characters
    return [*sizes, size] if size else sizes


def join_chunks(chunks: Sequence[str], sizes: Sequence[int]) -> list[str]:
    """Join neighboring chunks to texts of these sizes."""
    bounds = itertools.accumulate(sizes, initial=0)
    return ["".join(chunks[first:last]) for first, last in itertools.pairwise(bounds)]


class PlainWords:
    """Encodes chunks of plain words without offsets: word starts are read from the tokens."""

    def __init__(self, tokenizer: Tokenizer, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self._starts_V = _starting_tokens(tokenizer)
        self._unknown_id = -1 if tokenizer.unknown_id is None else tokenizer.unknown_id
        # WordPiece separates punctuation from letters like the rule for words, and an unknown word is one token.
        self._is_wordpiece = not leading_space(tokenizer.to_json())
        self._lines_are_spaces = lines_are_spaces(tokenizer.to_json())

    @property
    def is_available(self) -> bool:
        """Whether the tokens show where words start."""
        return self._starts_V is not None

    def find_plain(self, chunks: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the numbers of plain chunks, and how many words each of them has."""
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
        has_space_C = (begins_C == _SPACE) | (self._lines_are_spaces & (begins_C == _PLAIN_LINE))
        plain = np.flatnonzero(has_space_C & (sizes_C > 1) & (within_N1[ends_C] - within_N1[first_C] == sizes_C - 1))
        return plain, (words_N1[ends_C] - words_N1[first_C])[plain]

    def encode(self, chunks: Sequence[str], words_C: NDArray[np.int64]) -> tuple[ChunkTokens, NDArray[np.bool_]]:
        """Encode chunks with known numbers of words; also return whether the result of each chunk is valid."""
        assert self._starts_V is not None, "the tokens must show where words start"
        sizes = block_sizes([len(chunk) for chunk in chunks], _PLAIN_BLOCK_CHARACTERS)
        texts = join_chunks(chunks, sizes)
        encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        is_valid_C = np.ones(len(chunks), dtype=np.bool_)
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
                is_valid_C[first + np.searchsorted(begins, unknown, side="right") - 1] = False
            else:  # the tokenizer splits a word differently
                counts.append(np.zeros(size, dtype=np.int64))
                is_valid_C[first : first + size] = False
            first += size
        ids = np.concatenate([np.zeros(0, dtype=np.int32), *parts])
        tokens_C = np.concatenate([np.zeros(0, dtype=np.int64), *counts])
        marks = self._starts_V[ids].view(np.uint8) * np.uint8(WORD_START)
        marks[(np.cumsum(tokens_C) - tokens_C)[tokens_C > 0]] |= np.uint8(LEAD)
        first_C, last_C = (codes("".join([chunk[end] for chunk in chunks])) for end in (0, -1))
        flags_C = np.full(len(chunks), AFTER_SPACE, dtype=np.uint8)
        flags_C[first_C == ord("\n")] |= AFTER_LINE
        flags_C[np.isin(last_C, _ENDS)] |= ENDS_AT_SPACE
        flags_C[[chunk[1].isdecimal() for chunk in chunks]] |= NUMBER
        for number in np.flatnonzero(np.isin(last_C, _CHECKED)).tolist():
            flags_C[number] = flags_of(chunks[number])
        return ChunkTokens(ids, marks, tokens_C, np.zeros(len(chunks), dtype=np.int64), flags_C), is_valid_C


def _starting_tokens(tokenizer: Tokenizer) -> NDArray[np.bool_] | None:
    """Return which tokens start a word after a space; None if the tokens don't show it."""
    tokenizer_json = tokenizer.to_json()
    space = leading_space(tokenizer_json)
    model = cast("dict[str, Any]", json.loads(tokenizer_json))["model"]
    if not space and model["type"] != "WordPiece":
        return None
    starts_V = np.zeros(tokenizer.size, dtype=np.bool_)
    for token, id in tokenizers.Tokenizer.from_str(tokenizer_json).get_vocab(with_added_tokens=True).items():
        starts_V[id] = token.startswith(space) if space else not token.startswith(model["continuing_subword_prefix"])
    return starts_V


_CHUNKS_KEPT: Final = 1 << 19  # about 120 MB
_TOKENS_KEPT: Final = 1 << 22  # 20 MB
_LONGEST_KEPT: Final = 48  # characters; longer chunks rarely recur
_BLOCK_CHARACTERS: Final = 1 << 13  # characters of the new chunks that are joined to one text
_COMPARED_CHARACTERS: Final = 100_000
_SPACER: Final = "a"
_LINE: Final = " \n"  # a line feed in texts that are split at spaces: the next chunk keeps it and takes no space
_NO_CHUNK: Final = -1
_MISSING: Final = -1
_TEMPORARY: Final = -2  # chunks that are not kept are numbered from here downwards

Numbers = NDArray[np.int64]


class _TokensWithOffsets(NamedTuple):
    """Tokens of texts. Offsets refer to the texts joined by line feeds."""

    ids: NDArray[np.int32]
    marks: NDArray[np.uint8]
    offsets: Numbers


class _ChunkedTexts(NamedTuple):
    """Texts as numbers of chunks."""

    numbers_K: Numbers
    first_B: Numbers  # index of the first chunk of each text


class CachedEncoder:
    """Encodes texts with the results of `Tokenizer.encode`, and caches the tokens of chunks."""

    def __init__(self, tokenizer: Tokenizer, words: WordsRule, *, by_chunks: bool = True) -> None:
        """Create an encoder with an empty cache; `by_chunks=False` disables the cache."""
        self._tokenizer = tokenizer
        self._words: WordsRule = words
        self._inner = tokenizers.Tokenizer.from_str(without_specials(tokenizer.to_json()))
        self._inner.encode_special_tokens = True  # "[MASK]" in a text is encoded as plain text
        self._plain = PlainWords(tokenizer, self._inner)
        self._special_V = np.zeros(tokenizer.size, dtype=np.uint8)
        self._special_V[list(tokenizer.special_ids)] = SPECIAL
        space = leading_space(tokenizer.to_json())
        self._space_id = tokenizer.token_to_id(space) if space else None
        self.by_chunks = by_chunks and tokenizer.splits_at_spaces and not tokenizer.drops_characters
        self._splits_han = words == "characters" and isolates_han(tokenizer.to_json())
        self._splits_lines = self.by_chunks and splits_at_lines(tokenizer.to_json())
        self._table = ChunkTable()
        self._after_space: dict[str, int] = {}  # chunks after a space (not in the key) or with a line feed first
        self._literal: dict[str, int] = {}  # other chunks
        self._temporary: list[ChunkTokens] = []  # chunks of the current texts that are not kept

    def agrees(self, texts: Iterable[str]) -> bool:
        """Return whether the results equal those of the tokenizer on the first 100,000 characters of texts."""
        compared, left = list[str](), _COMPARED_CHARACTERS
        for text in texts:
            compared.append(text[:left])
            left -= len(text)
            if left <= 0:
                break
        actual, expected = self.encode(compared), self._tokenizer.encode_batch(compared, self._words)
        ids, marks = ([getattr(encoding, name) for encoding in expected] for name in ("ids", "marks"))
        return actual.num_tokens.tolist() == list(map(len, ids)) and (
            not compared
            or (np.array_equal(actual.ids, np.concatenate(ids)) and np.array_equal(actual.marks, np.concatenate(marks)))
        )

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts independently of each other."""
        if not self.by_chunks or not texts:
            encoded = self._encode_chunks(texts, is_whole=True)
            return EncodedTexts(encoded.ids, encoded.marks, encoded.tokens_C, encoded.unknown_C)
        self._evict()
        numbers_K, first_B = self._chunk(texts)
        kept = self._table.count, self._table.tokens
        for chunk_tokens in self._temporary:
            self._table.add(chunk_tokens)
        self._temporary.clear()
        is_temporary_K = numbers_K <= _TEMPORARY
        numbers_K[is_temporary_K] = kept[0] + (_TEMPORARY - numbers_K[is_temporary_K])
        encoded = self._table.assemble(numbers_K, first_B)
        self._table.truncate(*kept)
        return encoded

    def _evict(self) -> None:
        """Halve a full table: drop chunks that were used once, then the least frequent ones."""
        table = self._table
        if table.count <= _CHUNKS_KEPT and table.tokens <= _TOKENS_KEPT:
            return
        uses_C = table.uses_C[: table.count]
        chosen = np.argsort(-uses_C, kind="stable")[: table.count // 2]
        chosen = np.sort(chosen[uses_C[chosen] > 1])
        numbers_C = np.full(table.count, _MISSING)
        numbers_C[chosen] = np.arange(len(chosen))
        self._table = ChunkTable()
        self._table.add(table.content().select(chosen))
        for known in (self._after_space, self._literal):
            kept = [(chunk, number) for chunk, old in known.items() if (number := int(numbers_C[old])) != _MISSING]
            known.clear()
            known.update(kept)

    def _chunk(self, texts: Sequence[str]) -> _ChunkedTexts:
        """Split texts into chunks; a text without valid splits becomes one chunk."""
        if self._splits_han:
            cuts = HAN_AND_LINE_CUTS if self._splits_lines else HAN_CUTS
            parts = [cuts.split(text) for text in texts]
            chunked = self._join_inseparable(self._look_up(parts, ""), parts, "")
        else:
            marked = [text.replace("\n", _LINE) for text in texts] if self._splits_lines else texts
            parts = [text.split(" ") for text in marked]
            chunked = self._join_inseparable(self._look_up(parts, " "), parts, " ")
        invalid_B = np.logical_or.reduceat(self._is_inseparable(chunked), chunked.first_B)
        if not invalid_B.any():
            return chunked
        chosen = np.flatnonzero(invalid_B).tolist()
        first = self._add_temporary(
            self._encode_chunks([texts[number] for number in chosen], is_whole=True)._replace(
                flags_C=np.zeros(len(chosen), dtype=np.uint8)
            )
        )
        numbers = np.split(chunked.numbers_K, chunked.first_B[1:])
        for index, text in enumerate(chosen):
            numbers[text] = np.array([first - index])
        sizes_B = np.array([len(part) for part in numbers])
        return _ChunkedTexts(np.concatenate(numbers), np.cumsum(sizes_B) - sizes_B)

    def _look_up(self, texts: Sequence[Sequence[str]], space: str) -> _ChunkedTexts:
        """Return the numbers of the parts of texts; `space` precedes all parts of a text except the first."""
        every = list(itertools.chain.from_iterable(texts))
        sizes_B = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        first_B = np.cumsum(sizes_B) - sizes_B
        if not space:
            return _ChunkedTexts(self._numbers_of(self._literal, every, ""), first_B)
        firsts = [parts[0] for parts in texts]
        heads_B = self._numbers_of(self._literal, firsts, "")
        for first in first_B.tolist():
            every[first] = "a"  # a known chunk; its number is replaced below
        numbers_K = self._numbers_of(self._after_space, every, space)
        numbers_K[first_B] = heads_B
        return _ChunkedTexts(numbers_K, first_B)

    def _is_inseparable(self, chunked: _ChunkedTexts) -> NDArray[np.bool_]:
        """Return whether each chunk is inseparable from the one before it in its text."""
        flags_K = self._table.flags_C[np.maximum(chunked.numbers_K, 0)]
        is_temporary_K = chunked.numbers_K <= _TEMPORARY
        if is_temporary_K.any():
            flags_W = np.concatenate([chunk_tokens.flags_C for chunk_tokens in self._temporary])
            flags_K[is_temporary_K] = flags_W[_TEMPORARY - chunked.numbers_K[is_temporary_K]]
        inseparable_K = (flags_K & OPEN_START) != 0
        inseparable_K[1:] |= (flags_K[:-1] & OPEN_END) != 0
        inseparable_K[chunked.first_B] = False
        return inseparable_K

    def _join_inseparable(self, chunked: _ChunkedTexts, texts: Sequence[Sequence[str]], space: str) -> _ChunkedTexts:
        """Return the texts with inseparable chunks joined."""
        inseparable_K = self._is_inseparable(chunked)
        if not inseparable_K.any():
            return chunked
        every = list(itertools.chain.from_iterable(texts))
        is_first_K = np.zeros(len(inseparable_K), dtype=np.bool_)
        is_first_K[chunked.first_B] = True
        edges = np.flatnonzero(np.diff(np.concatenate([[False], inseparable_K, [False]]).astype(np.int8))).reshape(
            -1, 2
        )
        spans = [(begin - 1, end) for begin, end in edges.tolist()]
        joined = ["".join(_with_space(every[begin:end], space, is_first=is_first_K[begin])) for begin, end in spans]
        numbers_K = chunked.numbers_K.copy()
        numbers_K[[begin for begin, _ in spans]] = self._numbers_of(self._literal, joined, "")
        before_K1 = np.append(0, np.cumsum(~inseparable_K))
        return _ChunkedTexts(numbers_K[~inseparable_K], before_K1[chunked.first_B])

    def _add_temporary(self, encoded: ChunkTokens) -> int:
        """Add chunks for the current texts only and return the number of the first; further numbers decrease."""
        number = _TEMPORARY - sum(len(waiting.tokens_C) for waiting in self._temporary)
        self._temporary.append(encoded)
        return number

    def _numbers_of(self, known: dict[str, int], chunks: Sequence[str], space: str) -> Numbers:
        """Return the number of each chunk; encode new ones, with `space` before them."""
        numbers = map(known.get, chunks, itertools.repeat(_MISSING))
        numbers_K = np.fromiter(numbers, dtype=np.int64, count=len(chunks))
        missing = np.flatnonzero(numbers_K == _MISSING).tolist()
        if not missing:
            return numbers_K
        unknown = [chunks[index] for index in missing]
        new = dict.fromkeys(unknown)
        long = [chunk for chunk in new if len(chunk) > _LONGEST_KEPT]
        for chunk in long:
            del new[chunk]
        if new:
            first = self._table.add(self._encode_chunks(_with_space(list(new), space)))
            known.update(zip(new, range(first, first + len(new)), strict=True))
        if long:  # added here for the lookup, and removed below
            first = self._add_temporary(self._encode_chunks(_with_space(long, space)))
            known.update(zip(long, range(first, first - len(long), -1), strict=True))
        numbers_K[missing] = list(map(known.__getitem__, unknown))
        for chunk in long:
            del known[chunk]
        return numbers_K

    def _encode_chunks(self, chunks: Sequence[str], *, is_whole: bool = False) -> ChunkTokens:
        """Encode chunks for the table; with `is_whole` they are texts, and keep their sentence marks."""
        if is_whole or self._words != "spaces" or not self._plain.is_available:
            return self._encode_with_offsets(chunks, is_whole)
        plain, words_C = self._plain.find_plain(chunks)
        chosen: list[int] = plain.tolist()
        encoded, is_valid_C = self._plain.encode([chunks[number] for number in chosen], words_C)
        is_other_C = np.ones(len(chunks), dtype=np.bool_)
        is_other_C[plain[is_valid_C]] = False
        others = np.flatnonzero(is_other_C)
        place = np.zeros(len(chunks), dtype=np.int64)
        place[plain] = np.arange(len(plain))
        place[others] = len(plain) + np.arange(len(others))
        rest = self._encode_with_offsets([chunks[number] for number in others.tolist()], is_whole)
        return encoded.concatenate(rest).select(place)

    def _encode_with_offsets(self, chunks: Sequence[str], is_whole: bool) -> ChunkTokens:
        """Encode chunks and find word starts by the offsets of the tokens."""
        if is_whole:
            joinable, alone = list[int](), list(range(len(chunks)))
        else:
            joinable, alone = self._split_joinable(chunks)
        # In a joined text, an open chunk changes the marks of the text after it. A spacer absorbs the change.
        closed = [number for number in alone if chunks[number][-1:] not in INVISIBLE]
        opened = [number for number in alone if chunks[number][-1:] in INVISIBLE]
        order = [*closed, *joinable, *itertools.chain.from_iterable((number, _NO_CHUNK) for number in opened)]
        packed = [chunks[number] if number != _NO_CHUNK else _SPACER for number in order]
        sizes = (
            [1] * len(closed)
            + block_sizes([len(chunks[number]) for number in joinable], _BLOCK_CHARACTERS)
            + [1] * (2 * len(opened))
        )
        encoded = self._split_tokens(packed, sizes, self._encode_texts(join_chunks(packed, sizes)), is_whole)
        place = np.zeros(len(chunks) + 1, dtype=np.int64)  # _NO_CHUNK is the last
        place[order] = np.arange(len(order))
        # A few visible characters have no token, which only encoding shows: encode the chunks after them again.
        affected = [
            order[at + 1]
            for at in np.flatnonzero(encoded.flags_C[:-1] & OPEN_END).tolist()
            if order[at + 1] != _NO_CHUNK
        ]
        if affected:
            packed, sizes = [chunks[number] for number in affected], [1] * len(affected)
            encoded = encoded.concatenate(self._split_tokens(packed, sizes, self._encode_singly(packed), is_whole))
            place[affected] = len(order) + np.arange(len(affected))
        return encoded.select(place[:-1])

    def _split_joinable(self, chunks: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return the numbers of chunks that may be joined without changing their tokens, and of the others."""
        joinable, alone = list[int](), list[int]()
        starts_with_han = STARTS_WITH_HAN.match
        for number, chunk in enumerate(chunks):
            has_space = chunk[:1] == " " or (chunk[:1] == "\n" and self._splits_lines)
            begins = chunk[1:2] not in INVISIBLE if has_space else self._splits_han and starts_with_han(chunk)
            (joinable if begins and chunk[-1] not in INVISIBLE else alone).append(number)
        return joinable, alone

    def _encode_texts(self, texts: Sequence[str]) -> _TokensWithOffsets:
        """Encode texts; find the marks of all at once, as lines of one text."""
        encodings = self._inner.encode_batch(texts, add_special_tokens=False)
        tokens_B = np.fromiter(map(len, encodings), dtype=np.int64, count=len(texts))
        every, count = itertools.chain.from_iterable, int(tokens_B.sum())
        ids = np.fromiter(every(encoding.ids for encoding in encodings), dtype=np.int32, count=count)
        flat = np.fromiter(every(every(encoding.offsets for encoding in encodings)), dtype=np.int64, count=2 * count)
        offsets = flat.reshape(-1, 2) + np.repeat(_text_starts(texts), tokens_B)[:, None]
        space_T = ids == (-1 if self._space_id is None else self._space_id)
        space_T[np.cumsum(tokens_B)[tokens_B > 0] - 1] = False  # a space at the end of a text starts no word
        marks = token_marks("\n".join(texts), offsets, self._words, space_T)
        return _TokensWithOffsets(ids, marks | self._special_V[ids], offsets)

    def _encode_singly(self, texts: Sequence[str]) -> _TokensWithOffsets:
        """Encode texts with `Tokenizer.encode_batch`, which takes 0.2 ms for each text."""
        encodings = self._tokenizer.encode_batch(texts, self._words)
        starts = _text_starts(texts).tolist()
        offsets = [encoding.offsets + start for encoding, start in zip(encodings, starts, strict=True)]
        ids = np.concatenate([encoding.ids for encoding in encodings]).astype(np.int32)
        return _TokensWithOffsets(
            ids, np.concatenate([encoding.marks for encoding in encodings]), np.concatenate(offsets)
        )

    def _split_tokens(
        self, chunks: Sequence[str], sizes: Sequence[int], tokens: _TokensWithOffsets, is_whole: bool
    ) -> ChunkTokens:
        """Assign the tokens of texts to their chunks; each text has `sizes` chunks."""
        ids, marks, offsets = tokens
        gaps_C = np.zeros(len(chunks), dtype=np.int64)
        gaps_C[np.cumsum(np.array(sizes, dtype=np.int64))[:-1]] = 1  # the line feed before the next text
        ends_C = np.cumsum(gaps_C + np.fromiter(map(len, chunks), dtype=np.int64, count=len(chunks)))
        last_T = np.maximum.accumulate(offsets[:, 1])
        tokens_C = np.bincount(np.searchsorted(ends_C, last_T), minlength=len(chunks))
        until_C = np.cumsum(tokens_C)
        first_C = until_C - tokens_C
        flags_C = np.fromiter(map(flags_of, chunks), dtype=np.uint8, count=len(chunks))
        flags_C[(tokens_C == 0) | (np.append(0, last_T)[until_C] < ends_C)] |= OPEN_END
        unknown_T1 = np.zeros(len(ids) + 1, dtype=np.int64)
        if self._tokenizer.unknown_id is not None:
            lengths_T = offsets[:, 1] - offsets[:, 0]
            unknown_T1[1:] = np.cumsum(np.where(ids == self._tokenizer.unknown_id, lengths_T, 0))
        if not is_whole:
            # The first word start is also the sentence start of the chunk: only white space precedes it.
            starting = np.append(np.flatnonzero(marks & WORD_START), len(ids))
            lead_C = starting[np.searchsorted(starting[:-1], first_C)]
            lead = lead_C[((flags_C & OPEN_START) == 0) & (lead_C < until_C)]
            marks[lead] = (marks[lead] & np.uint8(255 - SENTENCE_START)) | np.uint8(LEAD)
        unknown_C = unknown_T1[until_C] - unknown_T1[first_C]
        if self._tokenizer.drops_characters:
            unknown_C += np.fromiter(map(self._tokenizer.count_dropped, chunks), dtype=np.int64, count=len(chunks))
        return ChunkTokens(ids, marks, tokens_C, unknown_C, flags_C)


def _with_space(parts: Sequence[str], space: str, *, is_first: bool = False) -> list[str]:
    """Return parts with `space` before them, unless they begin with a line feed; `is_first`: the text begins here."""
    spaced = [part if part[:1] == "\n" else space + part for part in parts]
    return [parts[0], *spaced[1:]] if is_first else spaced


def _text_starts(texts: Sequence[str]) -> Numbers:
    """Return the offset of each text in all texts joined by line feeds."""
    sizes_B = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)) + 1
    return np.cumsum(sizes_B) - sizes_B
