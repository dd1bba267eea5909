"""Room card: all ways to write words with pieces.

Comes in: words laid end to end as numbers of letters, 0 between them. Goes out: their frequent substrings, and a
Lattice that knows how often each piece is expected and which way to write a word is best. Called by: unigram.

Numbers are added in a fixed order on one thread: the same bits in every process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import models

from unmask.tokenization.normalization import META, normalizer_of, pre_tokenizer_of
from unmask.tokenization.settings import UNKNOWN, Progress, UnigramConfig, round_below, sample_blocks, too_few
from unmask.tokenization.words import codes

Floats = NDArray[np.float64]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Substrings:
    """Frequent substrings of one length, and where the words have them."""

    length: int
    counts_S: Floats
    place_S: Places  # where the words first have each
    apart_S: NDArray[np.bool_]  # False: it is always followed by the same letter, so the longer one says as much
    at_E: Places  # every place of the words where one of them begins ...
    which_E: Places  # ... and which


def frequent_substrings(letters_N: Places, times_N: Floats, longest: int, minimum: int) -> list[Substrings]:
    """Level by level: a substring can only be frequent where the one without its last letter is."""
    letters = int(letters_N.max(initial=0))
    at_E = np.flatnonzero(letters_N)
    which_E = letters_N[at_E] - 1
    counts_S = _sums(which_E, times_N[at_E], letters)
    place_S = np.zeros(letters, dtype=np.int64)
    levels = [Substrings(1, counts_S, place_S, np.ones(letters, dtype=bool), at_E, which_E)]
    for length in range(2, longest + 1):
        before = levels[-1]
        next_E = letters_N[before.at_E + length - 1]  # every word ends with a 0, so this stays within
        goes_on = next_E > 0
        at_E = before.at_E[goes_on]
        keys_E = before.which_E[goes_on] * (letters + 1) + next_E[goes_on]
        keys_S, first_S, which_E = np.unique(keys_E, return_index=True, return_inverse=True)
        counts_S = _sums(which_E, times_N[at_E], len(keys_S))
        often_S = counts_S >= minimum
        if not often_S.any():
            break
        parent_S = keys_S // (letters + 1)
        before.apart_S[parent_S[counts_S == before.counts_S[parent_S]]] = False
        number_S = np.cumsum(often_S) - 1
        stays_E = often_S[which_E]
        place_S, counts_S = at_E[first_S[often_S]], counts_S[often_S]
        apart_S = np.ones(len(place_S), dtype=bool)
        levels.append(Substrings(length, counts_S, place_S, apart_S, at_E[stays_E], number_S[which_E[stays_E]]))
    return levels


def _sums(which_E: NDArray[np.integer[Any]], weight_E: Floats, size: int) -> Floats:
    """Weights added up in their order."""
    return np.bincount(which_E, weights=weight_E, minlength=size).astype(np.float64)


@dataclass(frozen=True)
class Edges:
    """Pieces as steps from one place to another, in an order that lets a walk go depth by depth."""

    start_E: NDArray[np.int32]
    end_E: NDArray[np.int32]
    piece_E: NDArray[np.int32]

    def only(self, stays_E: NDArray[np.bool_]) -> Edges:
        """Some of them."""
        return Edges(self.start_E[stays_E], self.end_E[stays_E], self.piece_E[stays_E])

    def __len__(self) -> int:
        return len(self.start_E)


class Lattice:
    """Words as places from one border to the next, and the pieces that lead from place to place."""

    def __init__(self, border_N: NDArray[np.bool_], edges: Edges) -> None:
        """`border_N` is True at the end of each word, which is no place of another."""
        places_N = np.arange(len(border_N))
        began_N = np.maximum.accumulate(np.where(np.append(True, border_N[:-1]), places_N, 0))
        self._depth_N = (places_N - began_N).astype(np.int32)
        self._border_N = border_N
        self.begin_N = began_N == places_N
        ends = np.flatnonzero(border_N)
        self.word_end_N = ends[np.searchsorted(ends, places_N)].astype(np.int32)
        order_E = np.lexsort((edges.end_E, self._depth_N[edges.end_E]))
        self._take(Edges(edges.start_E[order_E], edges.end_E[order_E], edges.piece_E[order_E]))

    def _take(self, edges: Edges) -> None:
        """Edges by the depth of their end; and the order of a walk back, by the depth of their start."""
        self.edges = edges
        depth_E = self._depth_N[edges.end_E]
        self._levels = _slices(depth_E)
        self._back_E = np.lexsort((edges.start_E, -self._depth_N[edges.start_E])).astype(np.int32)
        self._back_levels = _slices(self._depth_N[edges.start_E[self._back_E]])

    def keep(self, alive_P: NDArray[np.bool_]) -> None:
        """Forget the pieces that are no more."""
        self._take(self.edges.only(alive_P[self.edges.piece_E]))

    def expected(self, weight_P: Floats, times_N: Floats) -> tuple[Floats, float]:
        """How often each piece is expected where word ends have these times; and the words' log likelihood."""
        start_E, end_E, piece_E = self.edges.start_E, self.edges.end_E, self.edges.piece_E
        chance_E = weight_P[piece_E]
        before_N = self.begin_N.astype(np.float64)
        for level in self._levels:
            reached, firsts = _groups(end_E[level])
            before_N[reached] = np.add.reduceat(before_N[start_E[level]] * chance_E[level], firsts)
        after_N = self._border_N.astype(np.float64)
        for level in self._back_levels:
            at = self._back_E[level]
            reached, firsts = _groups(start_E[at])
            after_N[reached] = np.add.reduceat(after_N[end_E[at]] * chance_E[at], firsts)
        total_N = np.where(self._border_N, before_N, 1.0)
        share_N = (times_N / total_N)[self.word_end_N]
        counted_E = before_N[start_E] * chance_E * after_N[end_E] * share_N[start_E]
        counts_P = _sums(piece_E, counted_E, len(weight_P))
        return counts_P, float((times_N * np.log(total_N))[self._border_N].sum())

    def best(self, score_P: Floats) -> Floats:
        """For each place the score of the best way from the begin of its word."""
        start_E, end_E = self.edges.start_E, self.edges.end_E
        score_E = score_P[self.edges.piece_E]
        best_N = np.where(self.begin_N, 0.0, -np.inf)
        for level in self._levels:
            reached, firsts = _groups(end_E[level])
            best_N[reached] = np.maximum.reduceat(best_N[start_E[level]] + score_E[level], firsts)
        return best_N


def _slices(depth_E: NDArray[np.int32]) -> list[slice]:
    """Runs of equal depth."""
    edges = [0, *(np.flatnonzero(np.diff(depth_E)) + 1).tolist(), len(depth_E)]
    return [slice(first, last) for first, last in pairwise(edges) if last > first]


def _groups(place_E: NDArray[np.int32]) -> tuple[NDArray[np.int32], Places]:
    """Different places of a sorted list, and where each begins in it."""
    firsts = np.append(0, np.flatnonzero(np.diff(place_E)) + 1)
    return place_E[firsts], firsts


def inner_edges(edges: Edges, place_S: Places, length_S: Places) -> tuple[NDArray[np.bool_], Edges, Places]:
    """A lattice of stretches of the words themselves, without the edge that is the whole stretch.

    `edges` are those of the words, by start. Goes out: borders and edges of the stretches laid end to end, and the
    place of each stretch's end.
    """
    base_S = np.concatenate([[0], np.cumsum(length_S + 1)[:-1]])
    border_N = np.zeros(int((length_S + 1).sum()), dtype=bool)
    border_N[base_S + length_S] = True
    parts: list[Edges] = []
    for offset in range(int(length_S.max(initial=0))):
        within = np.flatnonzero(length_S > offset)
        place = place_S[within] + offset
        first, last = np.searchsorted(edges.start_E, place), np.searchsorted(edges.start_E, place, side="right")
        many = last - first
        which = np.repeat(within, many)
        at = np.arange(len(which)) - np.repeat(np.cumsum(many) - many, many) + np.repeat(first, many)
        length = edges.end_E[at] - edges.start_E[at]
        fits = (offset + length <= length_S[which]) & (length < length_S[which])
        start = (base_S[which] + offset)[fits]
        parts.append(Edges(start.astype(np.int32), (start + length[fits]).astype(np.int32), edges.piece_E[at][fits]))
    joined = (np.concatenate([getattr(part, name) for part in parts]) for name in ("start_E", "end_E", "piece_E"))
    return border_N, Edges(*joined), base_S + length_S


_COVERAGE: Final = 0.9999  # of the sample's characters; the others are [UNK]
_SEEDS: Final = 8  # candidates for each piece that is wanted; sentencepiece begins with a million
_FEWEST_SEEDS: Final = 20_000
_SHRINK: Final = 0.65  # of the candidates stay in each round; sentencepiece's 0.75 needs half as many rounds again
_SURPLUS: Final = 1.1  # rounds end at this many times the pieces that are wanted, the rest goes by likelihood
_STEPS: Final = 2  # of expectation maximisation in each round
_LEAST: Final = 0.5  # expected count of a piece that stays
_LONGEST_TYPE: Final = 48  # characters; a longer run (Chinese between two marks) is learnt from in parts
_MOST_CHARACTERS: Final = 3_000_000  # of different words: the commonest; about 0.6 GB while it learns
_DECIMALS: Final = 6
_CODES: Final = 0x110000


@dataclass(frozen=True)
class _Laid:
    """Words laid end to end, a border after each and in the place of each character that is left out."""

    alphabet: list[int]  # code points, the commonest first
    letters_N: NDArray[np.int64]  # 1 and above: a character of the alphabet; 0: a border
    times_N: NDArray[np.float64]  # how often the sample has the word


@dataclass(frozen=True)
class _Candidates:
    """Single characters in the order of the alphabet, then frequent substrings."""

    place_P: NDArray[np.int64]  # where the words have it
    length_P: NDArray[np.int64]
    counts_P: NDArray[np.float64]


def train_unigram(texts: Iterable[str], settings: UnigramConfig, progress: Progress | None) -> models.Model:
    """Special pieces, then pieces from the likeliest to the rarest, with their log probabilities.

    Raises:
        TokenizerError: the text can't give as many pieces as asked.
    """
    words, times = _word_counts(texts, settings, progress)
    packed = _lay(words, times, settings)
    levels = frequent_substrings(packed.letters_N, packed.times_N, settings.max_token_length, settings.min_frequency)
    found = _candidates(packed, levels, settings)
    room = settings.vocab_size - len(settings.special_tokens)
    if len(found.place_P) < room:
        given = len(settings.special_tokens) + len(found.place_P)
        raise too_few(settings.vocab_size, given, _fitting(words, times, settings, given))
    scores_P = _prune(packed, found, _edges(levels, found), room, progress)
    pieces = _spelled(packed, found, np.flatnonzero(scores_P > -np.inf))
    scores = scores_P[scores_P > -np.inf].round(_DECIMALS).tolist()
    ordered = sorted(zip(pieces, scores, strict=True), key=lambda entry: (-entry[1], entry[0]))
    vocabulary = [(piece, 0.0) for piece in settings.special_tokens] + ordered
    return models.Unigram(vocabulary, unk_id=settings.special_tokens.index(UNKNOWN), byte_fallback=False)


def _fitting(words: Sequence[str], times: Sequence[int], settings: UnigramConfig, given: int) -> int:
    """A round number of pieces that the text does give; 0: none."""
    fits = round_below(given)
    while fits > len(settings.special_tokens):
        smaller = replace(settings, vocab_size=fits)  # with fewer characters in its alphabet
        packed = _lay(words, times, smaller)
        levels = frequent_substrings(
            packed.letters_N, packed.times_N, settings.max_token_length, settings.min_frequency
        )
        if len(_candidates(packed, levels, smaller).place_P) >= fits - len(settings.special_tokens):
            return fits
        fits = round_below(fits - 1)
    return 0


def _word_counts(
    texts: Iterable[str], settings: UnigramConfig, progress: Progress | None
) -> tuple[list[str], list[int]]:
    """The sample's words with the space before them, the commonest first."""
    normalizer, pre_tokenizer = normalizer_of(settings), pre_tokenizer_of(settings)
    counts: Counter[str] = Counter()
    for block in sample_blocks(texts, settings, progress):
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(block)):
            if len(word) <= _LONGEST_TYPE:
                counts[word] += 1
            else:
                counts.update(word[at : at + _LONGEST_TYPE] for at in range(0, len(word), _LONGEST_TYPE))
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    room = np.cumsum([len(word) for word, _ in ordered]) <= _MOST_CHARACTERS
    kept = ordered[: int(room.sum())]
    return [word for word, _ in kept], [count for _, count in kept]


def _alphabet(words: Sequence[str], times: Sequence[int], settings: UnigramConfig) -> list[int]:
    """Code points that get a piece of their own: 99.99 % of the sample, at most half of the vocabulary; always "▁"."""
    if not words:
        return []
    lengths = [len(word) for word in words]
    weights = np.repeat(np.array(times, dtype=np.float64), lengths)
    counts_C = np.bincount(codes("".join(words)), weights=weights, minlength=1)
    found_C = np.flatnonzero(counts_C >= settings.min_frequency)
    found_C = found_C[np.argsort(-counts_C[found_C], kind="stable")]
    before_C = np.cumsum(counts_C[found_C]) - counts_C[found_C]
    found_C = found_C[before_C < _COVERAGE * counts_C.sum()]
    alphabet: list[int] = found_C[: settings.vocab_size // 2].tolist()
    if alphabet and ord(META) not in alphabet:  # rare without spaces, yet it begins every text: never unknown
        return [ord(META), *alphabet[: max(1, settings.vocab_size // 2 - 1)]]
    return alphabet


def _lay(words: Sequence[str], times: Sequence[int], settings: UnigramConfig) -> _Laid:
    alphabet = _alphabet(words, times, settings)
    number_C = np.zeros(_CODES, dtype=np.int64)
    number_C[alphabet] = np.arange(1, len(alphabet) + 1)
    number_C[0] = 0  # stands between the words
    lengths = np.array([len(word) + 1 for word in words], dtype=np.int64)
    letters_N = number_C[codes("".join(f"{word}\0" for word in words))]
    return _Laid(alphabet, letters_N, np.repeat(np.array(times, dtype=np.float64), lengths))


def _candidates(packed: _Laid, levels: Sequence[Substrings], settings: UnigramConfig) -> _Candidates:
    """All single characters, and the substrings that stand for most characters of the sample."""
    joined = [(level, np.flatnonzero(level.apart_S)) for level in levels[1:]]
    place_P = np.concatenate([np.zeros(0, np.int64), *(level.place_S[which] for level, which in joined)])
    length_P = np.concatenate([np.zeros(0, np.int64), *(np.full(len(which), level.length) for level, which in joined)])
    counts_P = np.concatenate([np.zeros(0), *(level.counts_S[which] for level, which in joined)])
    order_P = np.lexsort((place_P, length_P, -counts_P * length_P))[: max(_SEEDS * settings.vocab_size, _FEWEST_SEEDS)]
    return _Candidates(
        np.concatenate([levels[0].place_S, place_P[order_P]]),
        np.concatenate([np.ones(len(packed.alphabet), np.int64), length_P[order_P]]),
        np.concatenate([levels[0].counts_S, counts_P[order_P]]),
    )


def _edges(levels: Sequence[Substrings], found: _Candidates) -> Edges:
    """Every place of the words where a candidate stands, by place."""
    parts: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]] = []
    for level in levels:
        number_S = np.full(len(level.counts_S), -1, dtype=np.int32)
        chosen = np.flatnonzero(found.length_P == level.length)
        if level.length == 1:
            number_S[:] = np.arange(len(number_S))
        else:
            by_place = np.argsort(level.place_S)  # a substring is known by where it first stands
            number_S[by_place[np.searchsorted(level.place_S[by_place], found.place_P[chosen])]] = chosen
        piece_E = number_S[level.which_E]
        start_E = level.at_E[piece_E >= 0].astype(np.int32)
        parts.append((start_E, start_E + np.int32(level.length), piece_E[piece_E >= 0]))
    start_E, end_E, piece_E = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order_E = np.argsort(start_E, kind="stable")
    return Edges(start_E[order_E], end_E[order_E], piece_E[order_E])


def _spelled(packed: _Laid, found: _Candidates, which: NDArray[np.int64]) -> list[str]:
    letters = np.array(packed.alphabet, dtype=np.uint32)
    pieces: list[str] = []
    for piece in which.tolist():
        if piece < len(packed.alphabet):
            pieces.append(chr(packed.alphabet[piece]))
            continue
        first = int(found.place_P[piece])
        numbers_N = packed.letters_N[first : first + int(found.length_P[piece])]
        pieces.append(letters[numbers_N - 1].tobytes().decode("utf-32-le"))
    return pieces


def _prune(
    packed: _Laid, found: _Candidates, edges: Edges, room: int, progress: Progress | None
) -> NDArray[np.float64]:
    """The log probability of each candidate that stays; minus infinity for the others."""
    letters = len(packed.alphabet)
    border, inner, end_S = inner_edges(edges, found.place_P[letters:], found.length_P[letters:])
    own, words = Lattice(border, inner), Lattice(packed.letters_N == 0, edges)
    times_N = np.where(packed.letters_N == 0, packed.times_N, 0.0)
    characters = float(packed.times_N[packed.letters_N > 0].sum())
    alive_P = np.ones(len(found.counts_P), dtype=bool)
    scores_P = np.log(np.maximum(found.counts_P, _LEAST) / found.counts_P.sum())
    level = 3.0  # nats per character, so that the chance of a long word is still a number
    rounds = max(1.0, np.log(len(alive_P) / (_SURPLUS * room)) / -np.log(_SHRINK))
    done = 0
    while True:
        counts_P = found.counts_P
        for _ in range(_STEPS):
            weight_P = np.where(alive_P, np.exp(scores_P + level * found.length_P), 0.0)
            counts_P, likelihood = words.expected(weight_P, times_N)
            level -= likelihood / characters
            scores_P = _scores(counts_P, alive_P)
        done += 1
        if progress is not None:
            progress("training the tokenizer", min(0.99, 0.5 + 0.5 * done / (rounds + 1)))
        is_last = int(alive_P.sum()) <= _SURPLUS * room
        wanted = room if is_last else max(room, int(_SHRINK * alive_P.sum()), int(_SURPLUS * room))
        if int(alive_P.sum()) <= room:
            return np.where(alive_P, scores_P, -np.inf)
        # What the sample would lose: each time that the piece stands in it, the best other way to write it.
        other_S = own.best(scores_P)[end_S]
        score_S = np.where(alive_P, scores_P, 0.0)[letters:]
        loss_S = np.where(counts_P[letters:] < _LEAST, 0.0, counts_P[letters:] * (score_S - other_S))
        loss_S = np.where(alive_P[letters:], loss_S, -np.inf)
        order_S = np.argsort(-loss_S.round(_DECIMALS), kind="stable")
        alive_P[letters + order_S[max(0, wanted - letters) :]] = False
        words.keep(alive_P)
        own.keep(alive_P)


def _scores(counts_P: NDArray[np.float64], alive_P: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Log probabilities under a sparse prior, as in sentencepiece: small counts weigh less than they are."""
    counts_P = np.where(alive_P, np.maximum(counts_P, _LEAST), 1.0)
    return np.where(alive_P, _digamma(counts_P) - _digamma(np.array([counts_P[alive_P].sum()])), -np.inf)


def _digamma(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The derivative of log gamma, by recurrence up to 6 and a series above: nine digits."""
    shift = np.zeros_like(x)
    for _ in range(6):
        shift = np.where(x < 6, shift - 1 / x, shift)
        x = np.where(x < 6, x + 1, x)
    inverse = 1 / (x * x)
    return shift + np.log(x) - 0.5 / x - inverse * (1 / 12 - inverse * (1 / 120 - inverse / 252))
