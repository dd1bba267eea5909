"""Unigram trainer (Kudo 2018, arXiv 1804.10959): candidate tokens, their lattice, and pruning by likelihood.

The trainer of the `tokenizers` library sums floating-point numbers in a different order in each process. Here the order
is fixed, on one thread, so the scores are bit-identical in every process.

Words are concatenated as letter ids, with 0 after each. Suffixes of arrays: N positions in the words, S substrings, E
edges (occurrences of candidates), P candidate tokens.
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

from unmask.core.types import ProgressCallback
from unmask.tokenization.normalization import META, normalizer_of, pre_tokenizer_of
from unmask.tokenization.settings import UNKNOWN, UnigramConfig, round_below, sample_blocks, too_few
from unmask.tokenization.words import codes

Floats = NDArray[np.float64]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Substrings:
    """Frequent substrings of one length, and where they occur."""

    length: int
    counts_S: Floats
    place_S: Places  # position of the first occurrence
    is_maximal_S: NDArray[np.bool_]  # False: always followed by the same letter, so a longer substring is equivalent
    at_E: Places  # position of each occurrence
    which_E: Places  # substring of each occurrence


def frequent_substrings(letters_N: Places, times_N: Floats, longest: int, minimum: int) -> list[Substrings]:
    """Return the frequent substrings by length.

    Each length extends the one before: a substring is frequent only if the one without its last letter is.
    """
    letters = int(letters_N.max(initial=0))
    at_E = np.flatnonzero(letters_N)
    which_E = letters_N[at_E] - 1
    counts_S = _sums(which_E, times_N[at_E], letters)
    place_S = np.zeros(letters, dtype=np.int64)
    levels = [Substrings(1, counts_S, place_S, np.ones(letters, dtype=bool), at_E, which_E)]
    for length in range(2, longest + 1):
        before = levels[-1]
        next_E = letters_N[before.at_E + length - 1]  # every word ends with 0, so this is within bounds
        continues_E = next_E > 0
        at_E = before.at_E[continues_E]
        keys_E = before.which_E[continues_E] * (letters + 1) + next_E[continues_E]
        keys_S, first_S, which_E = np.unique(keys_E, return_index=True, return_inverse=True)
        counts_S = _sums(which_E, times_N[at_E], len(keys_S))
        is_frequent_S = counts_S >= minimum
        if not is_frequent_S.any():
            break
        parent_S = keys_S // (letters + 1)
        before.is_maximal_S[parent_S[counts_S == before.counts_S[parent_S]]] = False
        number_S = np.cumsum(is_frequent_S) - 1
        stays_E = is_frequent_S[which_E]
        place_S, counts_S = at_E[first_S[is_frequent_S]], counts_S[is_frequent_S]
        is_maximal_S = np.ones(len(place_S), dtype=bool)
        levels.append(Substrings(length, counts_S, place_S, is_maximal_S, at_E[stays_E], number_S[which_E[stays_E]]))
    return levels


def _sums(which_E: NDArray[np.integer[Any]], weight_E: Floats, size: int) -> Floats:
    """Return the sums of weights, added in their order."""
    return np.bincount(which_E, weights=weight_E, minlength=size).astype(np.float64)


@dataclass(frozen=True)
class Edges:
    """Occurrences of candidates as edges between positions, ordered by depth."""

    start_E: NDArray[np.int32]
    end_E: NDArray[np.int32]
    candidate_E: NDArray[np.int32]

    def only(self, stays_E: NDArray[np.bool_]) -> Edges:
        """Return a selection of the edges."""
        return Edges(self.start_E[stays_E], self.end_E[stays_E], self.candidate_E[stays_E])

    def __len__(self) -> int:
        return len(self.start_E)


class Lattice:
    """The segmentations of words: positions up to a border, and edges for the candidates between them."""

    def __init__(self, border_N: NDArray[np.bool_], edges: Edges) -> None:
        """Create a lattice of these edges; `border_N` is True at the end of each word."""
        places_N = np.arange(len(border_N))
        began_N = np.maximum.accumulate(np.where(np.append(True, border_N[:-1]), places_N, 0))
        self._depth_N = (places_N - began_N).astype(np.int32)
        self._border_N = border_N
        self.begin_N = began_N == places_N
        ends = np.flatnonzero(border_N)
        self.word_end_N = ends[np.searchsorted(ends, places_N)].astype(np.int32)
        order_E = np.lexsort((edges.end_E, self._depth_N[edges.end_E]))
        self._take(Edges(edges.start_E[order_E], edges.end_E[order_E], edges.candidate_E[order_E]))

    def _take(self, edges: Edges) -> None:
        """Store edges by the depth of their end, and their order by the depth of their start for the backward pass."""
        self.edges = edges
        depth_E = self._depth_N[edges.end_E]
        self._levels = _slices(depth_E)
        self._back_E = np.lexsort((edges.start_E, -self._depth_N[edges.start_E])).astype(np.int32)
        self._back_levels = _slices(self._depth_N[edges.start_E[self._back_E]])

    def keep(self, is_kept_P: NDArray[np.bool_]) -> None:
        """Drop the edges of candidates that were pruned."""
        self._take(self.edges.only(is_kept_P[self.edges.candidate_E]))

    def expected(self, weight_P: Floats, times_N: Floats) -> tuple[Floats, float]:
        """Return the expected count of each candidate and the log likelihood of the words.

        Args:
            weight_P: probability of each candidate.
            times_N: count of each word, stored at the position of its end.
        """
        start_E, end_E, candidate_E = self.edges.start_E, self.edges.end_E, self.edges.candidate_E
        probability_E = weight_P[candidate_E]
        before_N = self.begin_N.astype(np.float64)
        for level in self._levels:
            reached, firsts = _groups(end_E[level])
            before_N[reached] = np.add.reduceat(before_N[start_E[level]] * probability_E[level], firsts)
        after_N = self._border_N.astype(np.float64)
        for level in self._back_levels:
            at = self._back_E[level]
            reached, firsts = _groups(start_E[at])
            after_N[reached] = np.add.reduceat(after_N[end_E[at]] * probability_E[at], firsts)
        total_N = np.where(self._border_N, before_N, 1.0)
        share_N = (times_N / total_N)[self.word_end_N]
        counted_E = before_N[start_E] * probability_E * after_N[end_E] * share_N[start_E]
        counts_P = _sums(candidate_E, counted_E, len(weight_P))
        return counts_P, float((times_N * np.log(total_N))[self._border_N].sum())

    def best(self, score_P: Floats) -> Floats:
        """Return, for each position, the score of the best segmentation from the start of its word (Viterbi)."""
        start_E, end_E = self.edges.start_E, self.edges.end_E
        score_E = score_P[self.edges.candidate_E]
        best_N = np.where(self.begin_N, 0.0, -np.inf)
        for level in self._levels:
            reached, firsts = _groups(end_E[level])
            best_N[reached] = np.maximum.reduceat(best_N[start_E[level]] + score_E[level], firsts)
        return best_N


def _slices(depth_E: NDArray[np.int32]) -> list[slice]:
    """Return the runs of equal depth."""
    edges = [0, *(np.flatnonzero(np.diff(depth_E)) + 1).tolist(), len(depth_E)]
    return [slice(first, last) for first, last in pairwise(edges) if last > first]


def _groups(place_E: NDArray[np.int32]) -> tuple[NDArray[np.int32], Places]:
    """Return the distinct values of a sorted array, and the index of the first of each."""
    firsts = np.append(0, np.flatnonzero(np.diff(place_E)) + 1)
    return place_E[firsts], firsts


def inner_edges(edges: Edges, place_S: Places, length_S: Places) -> tuple[NDArray[np.bool_], Edges, Places]:
    """Return the lattice of substrings of the words, without the edge that spans a whole substring.

    Args:
        edges: edges of the words, by start.
        place_S: position of each substring.
        length_S: length of each substring.

    Returns:
        Borders and edges of the concatenated substrings, and the position of the end of each.
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
        parts.append(
            Edges(start.astype(np.int32), (start + length[fits]).astype(np.int32), edges.candidate_E[at][fits])
        )
    joined = (np.concatenate([getattr(part, name) for part in parts]) for name in ("start_E", "end_E", "candidate_E"))
    return border_N, Edges(*joined), base_S + length_S


_COVERAGE: Final = 0.9999  # fraction of the characters in the sample; the others are [UNK]
_SEEDS: Final = 8  # candidates per wanted token; sentencepiece starts with a million
_FEWEST_SEEDS: Final = 20_000
_SHRINK: Final = 0.65  # fraction of candidates kept in a round; sentencepiece's 0.75 takes 1.5 times as many rounds
_SURPLUS: Final = 1.1  # the last round starts at or below this multiple of the wanted tokens
_STEPS: Final = 2  # steps of expectation maximization in each round
_LEAST: Final = 0.5  # minimum expected count of a kept token
_LONGEST_TYPE: Final = 48  # characters; a longer run (Chinese between punctuation) is split
_MAX_CHARACTERS: Final = 3_000_000  # total length of the distinct words that are used; 0.6 GB during training
_DECIMALS: Final = 6
_CODES: Final = 0x110000


@dataclass(frozen=True)
class _Words:
    """Words as concatenated letter ids, with a border after each and instead of each character outside the alphabet."""

    alphabet: list[int]  # code points, the most frequent first
    letters_N: NDArray[np.int64]  # from 1: a character of the alphabet; 0: a border
    times_N: NDArray[np.float64]  # count of the word in the sample


@dataclass(frozen=True)
class _Candidates:
    """Single characters in the order of the alphabet, then frequent substrings."""

    place_P: NDArray[np.int64]  # position of an occurrence
    length_P: NDArray[np.int64]
    counts_P: NDArray[np.float64]


def train_unigram(texts: Iterable[str], settings: UnigramConfig, on_progress: ProgressCallback | None) -> models.Model:
    """Train a Unigram model: special tokens, then tokens by decreasing log probability.

    Raises:
        VocabSizeError: the text gives fewer tokens than `vocab_size`.
    """
    words, times = _word_counts(texts, settings, on_progress)
    packed = _concatenate(words, times, settings)
    levels = frequent_substrings(packed.letters_N, packed.times_N, settings.max_token_length, settings.min_frequency)
    candidates = _candidates(packed, levels, settings)
    wanted = settings.vocab_size - len(settings.special_tokens)
    if len(candidates.place_P) < wanted:
        given = len(settings.special_tokens) + len(candidates.place_P)
        raise too_few(settings.vocab_size, given, _feasible_size(words, times, settings, given))
    scores_P = _prune(packed, candidates, _edges(levels, candidates), wanted, on_progress)
    tokens = _token_texts(packed, candidates, np.flatnonzero(scores_P > -np.inf))
    scores = scores_P[scores_P > -np.inf].round(_DECIMALS).tolist()
    ordered = sorted(zip(tokens, scores, strict=True), key=lambda entry: (-entry[1], entry[0]))
    vocabulary = [(token, 0.0) for token in settings.special_tokens] + ordered
    return models.Unigram(vocabulary, unk_id=settings.special_tokens.index(UNKNOWN), byte_fallback=False)


def _feasible_size(words: Sequence[str], times: Sequence[int], settings: UnigramConfig, given: int) -> int:
    """Return a round vocabulary size that works for the text; 0 if there is none."""
    fits = round_below(given)
    while fits > len(settings.special_tokens):
        smaller = replace(settings, vocab_size=fits)  # with fewer characters in its alphabet
        packed = _concatenate(words, times, smaller)
        levels = frequent_substrings(
            packed.letters_N, packed.times_N, settings.max_token_length, settings.min_frequency
        )
        if len(_candidates(packed, levels, smaller).place_P) >= fits - len(settings.special_tokens):
            return fits
        fits = round_below(fits - 1)
    return 0


def _word_counts(
    texts: Iterable[str], settings: UnigramConfig, on_progress: ProgressCallback | None
) -> tuple[list[str], list[int]]:
    """Return the distinct words of the sample (with the space before each) and their counts, by frequency."""
    normalizer, pre_tokenizer = normalizer_of(settings), pre_tokenizer_of(settings)
    counts: Counter[str] = Counter()
    for block in sample_blocks(texts, settings, on_progress):
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(block)):
            if len(word) <= _LONGEST_TYPE:
                counts[word] += 1
            else:
                counts.update(word[at : at + _LONGEST_TYPE] for at in range(0, len(word), _LONGEST_TYPE))
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    fits = np.cumsum([len(word) for word, _ in ordered]) <= _MAX_CHARACTERS
    kept = ordered[: int(fits.sum())]
    return [word for word, _ in kept], [count for _, count in kept]


def _alphabet(words: Sequence[str], times: Sequence[int], settings: UnigramConfig) -> list[int]:
    """Return the code points of the alphabet: 99.99 % of the sample, at most half of the vocabulary, and "▁"."""
    if not words:
        return []
    lengths = [len(word) for word in words]
    weights = np.repeat(np.array(times, dtype=np.float64), lengths)
    counts_C = np.bincount(codes("".join(words)), weights=weights, minlength=1)
    frequent_C = np.flatnonzero(counts_C >= settings.min_frequency)
    frequent_C = frequent_C[np.argsort(-counts_C[frequent_C], kind="stable")]
    before_C = np.cumsum(counts_C[frequent_C]) - counts_C[frequent_C]
    frequent_C = frequent_C[before_C < _COVERAGE * counts_C.sum()]
    alphabet: list[int] = frequent_C[: settings.vocab_size // 2].tolist()
    if alphabet and ord(META) not in alphabet:  # rare in text without spaces, but every text begins with it
        return [ord(META), *alphabet[: max(1, settings.vocab_size // 2 - 1)]]
    return alphabet


def _concatenate(words: Sequence[str], times: Sequence[int], settings: UnigramConfig) -> _Words:
    alphabet = _alphabet(words, times, settings)
    number_C = np.zeros(_CODES, dtype=np.int64)
    number_C[alphabet] = np.arange(1, len(alphabet) + 1)
    number_C[0] = 0  # separates the words
    lengths = np.array([len(word) + 1 for word in words], dtype=np.int64)
    letters_N = number_C[codes("".join(f"{word}\0" for word in words))]
    return _Words(alphabet, letters_N, np.repeat(np.array(times, dtype=np.float64), lengths))


def _candidates(packed: _Words, levels: Sequence[Substrings], settings: UnigramConfig) -> _Candidates:
    """Return all single characters, and the substrings that cover most characters of the sample."""
    longer = [(level, np.flatnonzero(level.is_maximal_S)) for level in levels[1:]]
    place_P = np.concatenate([np.zeros(0, np.int64), *(level.place_S[which] for level, which in longer)])
    length_P = np.concatenate([np.zeros(0, np.int64), *(np.full(len(which), level.length) for level, which in longer)])
    counts_P = np.concatenate([np.zeros(0), *(level.counts_S[which] for level, which in longer)])
    order_P = np.lexsort((place_P, length_P, -counts_P * length_P))[: max(_SEEDS * settings.vocab_size, _FEWEST_SEEDS)]
    return _Candidates(
        np.concatenate([levels[0].place_S, place_P[order_P]]),
        np.concatenate([np.ones(len(packed.alphabet), np.int64), length_P[order_P]]),
        np.concatenate([levels[0].counts_S, counts_P[order_P]]),
    )


def _edges(levels: Sequence[Substrings], candidates: _Candidates) -> Edges:
    """Return every occurrence of every candidate, by position."""
    parts: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]] = []
    for level in levels:
        number_S = np.full(len(level.counts_S), -1, dtype=np.int32)
        chosen = np.flatnonzero(candidates.length_P == level.length)
        if level.length == 1:
            number_S[:] = np.arange(len(number_S))
        else:
            by_place = np.argsort(level.place_S)  # the first occurrence identifies a substring
            number_S[by_place[np.searchsorted(level.place_S[by_place], candidates.place_P[chosen])]] = chosen
        candidate_E = number_S[level.which_E]
        start_E = level.at_E[candidate_E >= 0].astype(np.int32)
        parts.append((start_E, start_E + np.int32(level.length), candidate_E[candidate_E >= 0]))
    start_E, end_E, candidate_E = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order_E = np.argsort(start_E, kind="stable")
    return Edges(start_E[order_E], end_E[order_E], candidate_E[order_E])


def _token_texts(packed: _Words, candidates: _Candidates, chosen: NDArray[np.int64]) -> list[str]:
    """Return the texts of the chosen candidates."""
    letters = np.array(packed.alphabet, dtype=np.uint32)
    tokens: list[str] = []
    for number in chosen.tolist():
        if number < len(packed.alphabet):
            tokens.append(chr(packed.alphabet[number]))
            continue
        first = int(candidates.place_P[number])
        ids_N = packed.letters_N[first : first + int(candidates.length_P[number])]
        tokens.append(letters[ids_N - 1].tobytes().decode("utf-32-le"))
    return tokens


def _prune(
    packed: _Words, candidates: _Candidates, edges: Edges, target: int, on_progress: ProgressCallback | None
) -> NDArray[np.float64]:
    """Return the log probability of each kept candidate; minus infinity for the others."""
    letters = len(packed.alphabet)
    border, inner, end_S = inner_edges(edges, candidates.place_P[letters:], candidates.length_P[letters:])
    substrings, words = Lattice(border, inner), Lattice(packed.letters_N == 0, edges)
    times_N = np.where(packed.letters_N == 0, packed.times_N, 0.0)
    characters = float(packed.times_N[packed.letters_N > 0].sum())
    is_kept_P = np.ones(len(candidates.counts_P), dtype=bool)
    scores_P = np.log(np.maximum(candidates.counts_P, _LEAST) / candidates.counts_P.sum())
    level = 3.0  # nats per character; scales probabilities so that those of long words don't underflow
    rounds = max(1.0, np.log(len(is_kept_P) / (_SURPLUS * target)) / -np.log(_SHRINK))
    done = 0
    while True:
        counts_P = candidates.counts_P
        for _ in range(_STEPS):
            weight_P = np.where(is_kept_P, np.exp(scores_P + level * candidates.length_P), 0.0)
            counts_P, likelihood = words.expected(weight_P, times_N)
            level -= likelihood / characters
            scores_P = _scores(counts_P, is_kept_P)
        done += 1
        if on_progress is not None:
            on_progress("training the tokenizer", min(0.99, 0.5 + 0.5 * done / (rounds + 1)))
        is_last = int(is_kept_P.sum()) <= _SURPLUS * target
        wanted = target if is_last else max(target, int(_SHRINK * is_kept_P.sum()), int(_SURPLUS * target))
        if int(is_kept_P.sum()) <= target:
            return np.where(is_kept_P, scores_P, -np.inf)
        # Loss of likelihood without the candidate: each occurrence falls back to its best other segmentation.
        other_S = substrings.best(scores_P)[end_S]
        score_S = np.where(is_kept_P, scores_P, 0.0)[letters:]
        loss_S = np.where(counts_P[letters:] < _LEAST, 0.0, counts_P[letters:] * (score_S - other_S))
        loss_S = np.where(is_kept_P[letters:], loss_S, -np.inf)
        order_S = np.argsort(-loss_S.round(_DECIMALS), kind="stable")
        is_kept_P[letters + order_S[max(0, wanted - letters) :]] = False
        words.keep(is_kept_P)
        substrings.keep(is_kept_P)


def _scores(counts_P: NDArray[np.float64], is_kept_P: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return log probabilities under a sparse prior, as in sentencepiece: it reduces small counts."""
    counts_P = np.where(is_kept_P, np.maximum(counts_P, _LEAST), 1.0)
    return np.where(is_kept_P, _digamma(counts_P) - _digamma(np.array([counts_P[is_kept_P].sum()])), -np.inf)


def _digamma(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the derivative of log gamma, by recurrence up to 6 and a series above (nine digits)."""
    shift = np.zeros_like(x)
    for _ in range(6):
        shift = np.where(x < 6, shift - 1 / x, shift)
        x = np.where(x < 6, x + 1, x)
    inverse = 1 / (x * x)
    return shift + np.log(x) - 0.5 / x - inverse * (1 / 12 - inverse * (1 / 120 - inverse / 252))
