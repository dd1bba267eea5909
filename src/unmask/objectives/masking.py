"""Room card: which tokens are hidden, and behind what.

Comes in: ids and marks of texts laid end to end, the (epoch, number) of each text, a seed, how far the run is. Goes
out: the asked slots and the corrupted ids. Every draw is a hash of (seed, epoch, number, offset in the text): nothing
depends on how texts were batched, on workers, ranks or what was drawn before. Called by: objectives, and eval/heldout
with the house's constant.

The rule is that of BERT (arXiv 1810.04805, section 3.1 and appendix A.1), made exact: of the n askable tokens of a
text at rate r, floor(r·n + u) are asked, with one uniform u of that text, so that the mean rate is r at any length;
at least one where n >= 1. Whole words follow the words of the text, spans follow SpanBERT (arXiv 1907.10529, section
3.1), n-grams ALBERT (arXiv 1909.11942, section 3.1), a falling rate arXiv 2305.15096.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unmask.core import rng
from unmask.core.errors import RecipeError
from unmask.core.types import SPECIAL, WORD_START

MaskUnit = Literal["token", "whole-word", "span", "ngram"]
Integers = NDArray[np.integer[Any]]

SPAN_STOP = 0.2  # SpanBERT's geometric distribution over words: mean 3.8 after the cut at 10
SPAN_MOST = 10
LONGEST_LIST = 10_000  # words that are asked more often; a run keeps them in its recipe.toml
_NEARLY_NEVER = 1e-9  # keeps the odds of what is sure to be asked finite, so that draws still order it


@dataclass(frozen=True)
class MaskingConfig:
    """What is asked, and what stands in its place: [MASK], a random ordinary token, or the token itself."""

    mask_rate: float = 0.15
    final_mask_rate: float | Literal["constant"] = (
        "constant"  # a straight line over the plan's tokens leads from rate to it
    )
    mask_unit: MaskUnit = "token"
    max_ngram: int = 3  # words; of "ngram" alone
    boosted_words: Path | tuple[str, ...] = ()  # words asked more often: a list, or a file with one in each line
    boost_factor: float = 3.0  # how many times as often as the other words of their text
    mask_token_rate: float = 0.8
    random_token_rate: float = 0.1
    keep_rate: float = 0.1

    def __post_init__(self) -> None:
        for name in ("mask_rate", "final_mask_rate"):
            rate = getattr(self, name)
            if rate != "constant" and not 0.0 < rate <= 1.0:
                raise RecipeError(
                    f"{name} = {rate} is no share of the tokens",
                    location=name,
                    hint="choose 0 < mask_rate <= 1; BERT's is 0.15",
                )
        shares = (self.mask_token_rate, self.random_token_rate, self.keep_rate)
        if min(shares) < 0.0 or abs(sum(shares) - 1.0) > 1e-9:
            raise RecipeError(
                f"mask_token_rate + random_token_rate + keep_rate = {sum(shares):g}, not 1",
                hint="give three shares >= 0 that sum to 1; BERT's are 0.8, 0.1 and 0.1",
            )
        if not 1 <= self.max_ngram <= SPAN_MOST:
            raise RecipeError(
                f"max_ngram = {self.max_ngram}",
                location="max_ngram",
                hint=f"give 1 to {SPAN_MOST} words; ALBERT's is 3",
            )
        if not (self.boost_factor >= 1.0 and math.isfinite(self.boost_factor)):
            raise RecipeError(
                f"boost_factor = {self.boost_factor} does not ask more often",
                location="boost_factor",
                hint="give a number >= 1, e.g. 3",
            )
        if isinstance(self.boosted_words, tuple) and len(self.boosted_words) > LONGEST_LIST:
            raise RecipeError(
                f"{len(self.boosted_words):,} words to boost",
                location="boosted_words",
                hint=f"give {LONGEST_LIST:,} at most",
            )

    @property
    def mean_rate(self) -> float:
        """The mean over a plan."""
        return (self.rate_at(0.0) + self.rate_at(1.0)) / 2

    def rate_at(self, progress: float) -> float:
        """The rate where this share of the planned tokens is done."""
        return (
            self.mask_rate
            if self.final_mask_rate == "constant"
            else self.mask_rate + (self.final_mask_rate - self.mask_rate) * progress
        )


@dataclass(frozen=True)
class PackedSequences:
    """Texts laid end to end, as the masking sees them. `sample_keys_B2` holds what tells one text's draws from another's."""

    token_flags_T: NDArray[np.uint8]
    cu_seqlens: Integers
    sample_keys_B2: Integers

    def text_T(self) -> Integers:
        """The text that each slot belongs to."""
        return np.repeat(np.arange(len(self.cu_seqlens) - 1), np.diff(self.cu_seqlens))

    def draw_keys(self, positions_M: Integers) -> tuple[Integers, Integers, Integers]:
        """Epoch, number and offset of each slot: the arguments of its draws."""
        text_M = np.searchsorted(self.cu_seqlens, positions_M, side="right") - 1
        return self.sample_keys_B2[text_M, 0], self.sample_keys_B2[text_M, 1], positions_M - self.cu_seqlens[text_M]


def select_positions(
    packed: PackedSequences,
    settings: MaskingConfig,
    seed: int,
    progress: float = 0.0,
    preferred_T: NDArray[np.bool_] | None = None,
) -> Integers:
    """The slots that are asked about, ascending; `preferred_T` are those of words that are asked more often."""
    askable_T = (packed.token_flags_T & SPECIAL) == 0
    text_T = packed.text_T()
    askable_B = np.bincount(text_T[askable_T], minlength=len(packed.sample_keys_B2))
    luck_B = rng.uniform(seed, "count", packed.sample_keys_B2[:, 0], packed.sample_keys_B2[:, 1])
    quota_B = np.floor(settings.rate_at(progress) * askable_B + luck_B).astype(np.int64)
    quota_B = np.minimum(np.maximum(quota_B, askable_B > 0), askable_B)

    # A unit is what is taken whole: a token, or the askable tokens of a word. Its draw is that of its first token.
    if settings.mask_unit == "token":
        first_U = np.flatnonzero(askable_T)
        size_U = np.ones(len(first_U), dtype=np.int64)
    else:
        first_U, size_U = words_of(packed, askable_T)
    text_U = text_T[first_U]
    draw_U = rng.uniform(seed, "mask", *packed.draw_keys(first_U))
    if preferred_T is not None:
        draw_U = _drawn_earlier(draw_U, text_U, size_U, quota_B, preferred_T[first_U], settings.boost_factor)
    if settings.mask_unit in ("span", "ngram"):
        length_U = _run_words(rng.uniform(seed, "span", *packed.draw_keys(first_U)), settings)
        is_joined_U = (first_U[1:] == first_U[:-1] + size_U[:-1]) & (text_U[1:] == text_U[:-1])
        draw_U = _of_runs(draw_U, length_U, is_joined_U)
    order_U = np.lexsort((draw_U, text_U))  # stable: the words of one run keep their order
    taken_U = np.zeros(len(first_U), dtype=bool)
    taken_U[order_U] = _take_units(text_U[order_U], size_U[order_U], quota_B)
    first_taken, size_taken = first_U[taken_U], size_U[taken_U]
    within = np.arange(size_taken.sum()) - np.repeat(np.cumsum(size_taken) - size_taken, size_taken)
    return np.repeat(first_taken, size_taken) + within


def corrupt_tokens(
    ids_T: Integers,
    positions_M: Integers,
    packed: PackedSequences,
    settings: MaskingConfig,
    seed: int,
    *,
    mask_id: int,
    regular_token_ids: Integers,
) -> NDArray[np.int64]:
    """A copy of the ids with each asked one replaced, by one draw per asked token: the three cases are disjoint."""
    key = packed.draw_keys(positions_M)
    action_M = rng.uniform(seed, "action", *key)
    random_M = regular_token_ids[rng.below(len(regular_token_ids), seed, "random", *key)]
    hidden_T = ids_T.astype(np.int64)
    hidden_T[positions_M] = np.select(
        [action_M < settings.mask_token_rate, action_M < settings.mask_token_rate + settings.random_token_rate],
        [mask_id, random_M],
        hidden_T[positions_M],
    )
    return hidden_T


def words_of(packed: PackedSequences, askable_T: NDArray[np.bool_]) -> tuple[Integers, Integers]:
    """First slot and number of askable slots of each word; a special token or the edge of a text ends a word."""
    begins_T = (packed.token_flags_T & WORD_START) != 0
    begins_T[packed.cu_seqlens[:-1]] = True
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


def _drawn_earlier(
    draw_U: NDArray[np.float64],
    text_U: Integers,
    size_U: Integers,
    quota_B: Integers,
    is_preferred_U: NDArray[np.bool_],
    factor: float,
) -> NDArray[np.float64]:
    """Draws whose order takes preferred units `factor` times as often as the others of their text, or always.

    Order sampling (Rosén 1997, J. Statist. Plann. Inference 62): each unit shall be taken with a chance p, whose sum
    over a text is its quota; by the order of u/(1-u) ÷ p/(1-p) it very nearly is. Where all chances are alike, the
    order is that of the draws.
    """
    many_B = np.bincount(text_U[is_preferred_U], weights=size_U[is_preferred_U], minlength=len(quota_B))
    others_B = np.bincount(text_U, weights=size_U, minlength=len(quota_B)) - many_B
    chance_B = quota_B / np.maximum(others_B + factor * many_B, 1)
    always_B = factor * chance_B >= 1
    chance_B = np.where(always_B, (quota_B - many_B) / np.maximum(others_B, 1), chance_B)
    more_B = np.where(always_B, 1.0, factor * chance_B)
    chance_U = np.where(is_preferred_U, more_B[text_U], chance_B[text_U])
    chance_U = np.clip(chance_U, _NEARLY_NEVER, 1 - _NEARLY_NEVER)
    return draw_U / (1 - draw_U) * ((1 - chance_U) / chance_U)


def _run_words(draw_U: NDArray[np.float64], settings: MaskingConfig) -> Integers:
    """How many words a run has, from uniform draws: SpanBERT's, or ALBERT's 1 ÷ n of the n-grams."""
    if settings.mask_unit == "span":
        return np.minimum(np.floor(np.log1p(-draw_U) / np.log1p(-SPAN_STOP)).astype(np.int64) + 1, SPAN_MOST)
    until_N = np.cumsum(1 / np.arange(1, settings.max_ngram + 1))
    return np.searchsorted(until_N[:-1] / until_N[-1], draw_U, side="right") + 1


def _of_runs(draw_U: NDArray[np.float64], length_U: Integers, is_joined_U: NDArray[np.bool_]) -> NDArray[np.float64]:
    """For each word the earliest draw of the runs that it lies in; a run ends at a special token and with its text.

    A run starts at every word. Taking words by these draws takes run after run, which may overlap, without a loop over
    them: with it, choosing spans in 128 texts of 128 slots took 13 ms, and takes 5 ms so.
    """
    earliest_U, reaches_U = draw_U.copy(), np.ones(len(draw_U), dtype=bool)
    for further in range(1, min(int(length_U.max(initial=1)), len(draw_U))):
        # Whether the run that starts so many words before still goes on here.
        reaches_U = reaches_U[:-1] & is_joined_U[further - 1 :] & (length_U[:-further] > further)
        earliest_U[further:] = np.minimum(earliest_U[further:], np.where(reaches_U, draw_U[:-further], np.inf))
    return earliest_U
