"""Room card: which tokens are hidden, and behind what.

Comes in: ids and marks of texts laid end to end, the (epoch, number) of each text, a seed. Goes out: the asked slots
and the corrupted ids. Every draw is a hash of (seed, epoch, number, offset in the text): nothing depends on how texts
were batched, on workers, ranks or what was drawn before. Called by: objectives, and eval/heldout with the house's
constant.

The rule is that of BERT (arXiv 1810.04805, section 3.1 and appendix A.1), made exact: of the n askable tokens of a
text at rate r, floor(r·n + u) are asked, with one uniform u of that text, so that the mean rate is r at any length;
at least one where n >= 1. Whole words follow the words of the text, spans follow SpanBERT (arXiv 1907.10529, section
3.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unmask import rng
from unmask.contracts import SPECIAL, WORD_START
from unmask.errors import RecipeError

Choose = Literal["token", "word", "span"]
Integers = NDArray[np.integer[Any]]

SPAN_STOP = 0.2  # SpanBERT's geometric distribution over words: mean 3.8 after the cut at 10
SPAN_MOST = 10


@dataclass(frozen=True)
class MaskingSettings:
    """What is asked, and what stands in its place: [MASK], a random ordinary token, or the token itself."""

    rate: float = 0.15
    choose: Choose = "token"
    mask: float = 0.8
    random: float = 0.1
    keep: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 < self.rate <= 1.0:
            raise RecipeError(
                f"rate = {self.rate} is no share of the tokens", next="choose 0 < rate <= 1; BERT's is 0.15"
            )
        shares = (self.mask, self.random, self.keep)
        if min(shares) < 0.0 or abs(sum(shares) - 1.0) > 1e-9:
            raise RecipeError(
                f"mask + random + keep = {sum(shares):g}, not 1",
                next="give three shares >= 0 that sum to 1; BERT's are 0.8, 0.1 and 0.1",
            )


@dataclass(frozen=True)
class Laid:
    """Texts laid end to end, as the masking sees them. `key_B2` holds what tells one text's draws from another's."""

    marks_T: NDArray[np.uint8]
    starts_B1: Integers
    key_B2: Integers

    def text_T(self) -> Integers:
        """The text that each slot belongs to."""
        return np.repeat(np.arange(len(self.starts_B1) - 1), np.diff(self.starts_B1))

    def key_at(self, at_M: Integers) -> tuple[Integers, Integers, Integers]:
        """Epoch, number and offset of each slot: the arguments of its draws."""
        text_M = np.searchsorted(self.starts_B1, at_M, side="right") - 1
        return self.key_B2[text_M, 0], self.key_B2[text_M, 1], at_M - self.starts_B1[text_M]


def choose(laid: Laid, settings: MaskingSettings, seed: int) -> Integers:
    """The slots that are asked about, ascending."""
    askable_T = (laid.marks_T & SPECIAL) == 0
    text_T = laid.text_T()
    askable_B = np.bincount(text_T[askable_T], minlength=len(laid.key_B2))
    luck_B = rng.uniform(seed, "count", laid.key_B2[:, 0], laid.key_B2[:, 1])
    quota_B = np.floor(settings.rate * askable_B + luck_B).astype(np.int64)
    quota_B = np.minimum(np.maximum(quota_B, askable_B > 0), askable_B)

    # A unit is what is taken whole: a token, or the askable tokens of a word. Its draw is that of its first token.
    if settings.choose == "token":
        first_U = np.flatnonzero(askable_T)
        size_U = np.ones(len(first_U), dtype=np.int64)
    else:
        first_U, size_U = _words(laid, askable_T)
    text_U = text_T[first_U]
    draw_U = rng.uniform(seed, "mask", *laid.key_at(first_U))
    order_U = np.lexsort((draw_U, text_U))
    if settings.choose == "span":
        stop_U = rng.uniform(seed, "span", *laid.key_at(first_U))
        taken_U = _take_spans(text_U, first_U, size_U, order_U, quota_B, _span_words(stop_U))
    else:
        taken_U = np.zeros(len(first_U), dtype=bool)
        taken_U[order_U] = _take_units(text_U[order_U], size_U[order_U], quota_B)
    first_taken, size_taken = first_U[taken_U], size_U[taken_U]
    within = np.arange(size_taken.sum()) - np.repeat(np.cumsum(size_taken) - size_taken, size_taken)
    return np.repeat(first_taken, size_taken) + within


def hide(
    ids_T: Integers,
    at_M: Integers,
    laid: Laid,
    settings: MaskingSettings,
    seed: int,
    *,
    mask_id: int,
    ordinary_N: Integers,
) -> NDArray[np.int64]:
    """A copy of the ids with each asked one replaced, by one draw per asked token: the three cases are disjoint."""
    key = laid.key_at(at_M)
    action_M = rng.uniform(seed, "action", *key)
    random_M = ordinary_N[rng.below(len(ordinary_N), seed, "random", *key)]
    hidden_T = ids_T.astype(np.int64)
    hidden_T[at_M] = np.select(
        [action_M < settings.mask, action_M < settings.mask + settings.random], [mask_id, random_M], hidden_T[at_M]
    )
    return hidden_T


def _words(laid: Laid, askable_T: NDArray[np.bool_]) -> tuple[Integers, Integers]:
    """First slot and number of askable slots of each word; a special token or the edge of a text ends a word."""
    begins_T = (laid.marks_T & WORD_START) != 0
    begins_T[laid.starts_B1[:-1]] = True
    begins_T[1:] |= ~askable_T[:-1]
    first_U = np.flatnonzero(begins_T & askable_T)
    ends_T = begins_T | ~askable_T
    edges = np.append(np.flatnonzero(ends_T), len(askable_T))
    size_U = edges[np.searchsorted(edges, first_U, side="right")] - first_U
    return first_U, size_U


def _take_units(text_U: Integers, size_U: Integers, quota_B: Integers) -> NDArray[np.bool_]:
    """Units in the order of their draws, text by text, each taken if it still fits into its text's quota.

    Round by round, vectorised over all texts: of the units that fit, the longest run that fits together is taken. Where
    not even one fits, the first of the order is taken, so that a text with something askable asks something.
    """
    taken_U = np.zeros(len(text_U), dtype=bool)
    left_B = quota_B.copy()
    while True:
        fits = np.flatnonzero(~taken_U & (size_U <= left_B[text_U]))
        if not len(fits):
            break
        text, total = text_U[fits], np.cumsum(size_U[fits])
        first_of_text = np.searchsorted(text, text)
        total -= total[first_of_text] - size_U[fits][first_of_text]
        run = total <= left_B[text]
        taken_U[fits[run]] = True
        left_B -= np.bincount(text[run], weights=size_U[fits[run]], minlength=len(left_B)).astype(np.int64)
    nothing_B = (quota_B > 0) & (left_B == quota_B)
    texts, first = np.unique(text_U, return_index=True)
    taken_U[first[nothing_B[texts]]] = True
    return taken_U


def _span_words(stop_U: NDArray[np.float64]) -> Integers:
    """Geometric span lengths in words from uniform draws, cut at SPAN_MOST."""
    return np.minimum(np.floor(np.log1p(-stop_U) / np.log1p(-SPAN_STOP)).astype(np.int64) + 1, SPAN_MOST)


def _take_spans(
    text_U: Integers, first_U: Integers, size_U: Integers, order_U: Integers, quota_B: Integers, words_U: Integers
) -> NDArray[np.bool_]:
    """Runs of words in the order of their draws while they fit, cut short at a taken word or a special token."""
    taken_U = np.zeros(len(text_U), dtype=bool)
    left_B = quota_B.copy()
    joined_U = np.append((first_U[1:] == first_U[:-1] + size_U[:-1]) & (text_U[1:] == text_U[:-1]), False)
    gap_at = np.flatnonzero(~joined_U)
    run_end_U = gap_at[np.searchsorted(gap_at, np.arange(len(text_U)))] + 1
    for unit in order_U:
        text = text_U[unit]
        if not left_B[text] or taken_U[unit]:
            continue
        span = slice(unit, min(unit + words_U[unit], run_end_U[unit]))
        if taken_U[span].any():
            span = slice(unit, unit + int(taken_U[span].argmax()))
        # A span that does not fit is shortened by whole words; a text's first keeps one word, whatever its size.
        fit = int(np.searchsorted(np.cumsum(size_U[span]), left_B[text], side="right"))
        if not fit and left_B[text] < quota_B[text]:
            continue
        span = slice(unit, unit + max(fit, 1))
        taken_U[span] = True
        left_B[text] = max(0, left_B[text] - size_U[span].sum())
    return taken_U
