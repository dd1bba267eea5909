"""Room card: all ways to write words with pieces.

Comes in: words laid end to end as numbers of letters, 0 between them. Goes out: their frequent substrings, and a
Lattice that knows how often each piece is expected and which way to write a word is best. Called by: unigram.

Numbers are added in a fixed order on one thread: the same bits in every process.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
