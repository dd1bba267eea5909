"""Masking: selects the tokens to predict and corrupts the input (80/10/10).

Every random draw is a hash of (seed, epoch, sample number, offset in the sequence). It doesn't depend on batching,
workers, ranks or earlier draws.

The rule is BERT's (arXiv 1810.04805, section 3.1 and appendix A.1) with an exact count: of n maskable tokens at mask
rate r, ⌊r·n + u⌋ are selected, where u is one uniform draw per sequence. The mean rate is then r at any length.
At least one token is selected if n >= 1. Word boundaries come from the text. Spans follow SpanBERT (arXiv 1907.10529,
section 3.1), n-grams follow ALBERT (arXiv 1909.11942, section 3.1), and a falling mask rate follows arXiv 2305.15096.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unmask.core import rng
from unmask.core.config import require
from unmask.core.errors import RecipeError
from unmask.core.types import SPECIAL, WORD_START, Batch, runs

MaskUnit = Literal["token", "whole-word", "span", "ngram"]
Integers = NDArray[np.integer[Any]]

SPAN_STOP_RATE = 0.2  # of SpanBERT's geometric distribution of lengths; the mean is 3.8 words with at most 10
MAX_SPAN_WORDS = 10
MAX_BOOSTED_WORDS = 10_000  # a run stores them in its recipe.toml
_MIN_PROBABILITY = 1e-9  # keeps the odds of units with p = 1 finite, so that they are still ordered by their draws


@dataclass(frozen=True)
class MaskingConfig:
    """Which tokens are masked, and what replaces them: [MASK], a random regular token, or the token itself."""

    # [fraction of maskable tokens] Mask rate; with `final_mask_rate`, that of the first step (arXiv 2202.08005).
    mask_rate: float = 0.15
    # [fraction of maskable tokens] Rate that is reached linearly over the tokens of the plan (arXiv 2305.15096).
    final_mask_rate: float | Literal["constant"] = "constant"
    # Unit of selection; span: SpanBERT, arXiv 1907.10529, section 3.1. ngram: ALBERT, arXiv 1909.11942, section 3.1.
    mask_unit: MaskUnit = "token"
    max_ngram: int = 3  # [words] Maximum length of an n-gram; with `mask_unit = "ngram"` only.
    boosted_words: Path | tuple[str, ...] = ()  # Words to mask more often: a list, or a file with one word per line.
    boost_factor: float = 3.0  # Factor on the mask rate of boosted words, relative to other words.
    # [fraction of masked tokens] Tokens that are replaced by [MASK]; the three rates sum to 1.
    mask_token_rate: float = 0.8
    random_token_rate: float = 0.1  # [fraction of masked tokens] Tokens that are replaced by a random regular token.
    keep_rate: float = 0.1  # [fraction of masked tokens] Tokens that are predicted but not replaced.

    def __post_init__(self) -> None:
        require(self, "mask_rate", above=0, max=1, hint="choose a rate above 0 and at most 1; BERT's is 0.15")
        if self.final_mask_rate != "constant":
            require(self, "final_mask_rate", above=0, max=1, hint="choose a rate above 0 and at most 1")
        rates = (self.mask_token_rate, self.random_token_rate, self.keep_rate)
        if min(rates) < 0.0 or abs(sum(rates) - 1.0) > 1e-9:
            raise RecipeError(
                f"mask_token_rate + random_token_rate + keep_rate = {sum(rates):g}, expected 1",
                hint="set three rates of at least 0 that sum to 1; BERT's are 0.8, 0.1 and 0.1",
            )
        require(self, "max_ngram", min=1, max=MAX_SPAN_WORDS, hint=f"choose 1 to {MAX_SPAN_WORDS} words; ALBERT's is 3")
        require(self, "boost_factor", min=1, below=math.inf, hint="choose a number of at least 1, e.g. 3")
        if isinstance(self.boosted_words, tuple) and len(self.boosted_words) > MAX_BOOSTED_WORDS:
            raise RecipeError(
                f"invalid boosted_words: got {len(self.boosted_words):,} words, expected at most {MAX_BOOSTED_WORDS:,}",
                location="boosted_words",
                hint="shorten the list",
            )

    @property
    def masked_fraction(self) -> float:
        """Mean mask rate over the whole run, for cost estimates."""
        return (self.rate_at(0.0) + self.rate_at(1.0)) / 2

    def rate_at(self, progress: float) -> float:
        """Return the mask rate after a fraction of the planned tokens."""
        return (
            self.mask_rate
            if self.final_mask_rate == "constant"
            else self.mask_rate + (self.final_mask_rate - self.mask_rate) * progress
        )


@dataclass(frozen=True)
class PackedSequences:
    """Concatenated sequences as numpy arrays. `sample_keys_B2` has the epoch and number of each sample."""

    token_flags_T: NDArray[np.uint8]
    cu_seqlens: Integers
    sample_keys_B2: Integers

    @classmethod
    def from_batch(cls, batch: Batch) -> PackedSequences:
        """Return views of the tensors of a batch, which must be on the CPU."""
        return cls(batch.token_flags_T.numpy(), np.asarray(batch.offsets), batch.sample_keys_B2.numpy())

    def sequence_T(self) -> Integers:
        """Return the index of each token's sequence."""
        return np.repeat(np.arange(len(self.cu_seqlens) - 1), np.diff(self.cu_seqlens))

    def draw_keys(self, positions_M: Integers) -> tuple[Integers, Integers, Integers]:
        """Return epoch, sample number and offset of each position: the key of its random draws."""
        sequence_M = np.searchsorted(self.cu_seqlens, positions_M, side="right") - 1
        keys_M2 = self.sample_keys_B2[sequence_M]
        return keys_M2[:, 0], keys_M2[:, 1], positions_M - self.cu_seqlens[sequence_M]


def select_positions(
    packed: PackedSequences,
    settings: MaskingConfig,
    seed: int,
    progress: float = 0.0,
    boosted_T: NDArray[np.bool_] | None = None,
) -> Integers:
    """Return the positions to mask in ascending order. `boosted_T` marks the tokens of boosted words."""
    maskable_T = (packed.token_flags_T & SPECIAL) == 0
    sequence_T = packed.sequence_T()
    maskable_B = np.bincount(sequence_T[maskable_T], minlength=len(packed.sample_keys_B2))
    draw_B = rng.uniform(seed, "count", packed.sample_keys_B2[:, 0], packed.sample_keys_B2[:, 1])
    quota_B = np.floor(settings.rate_at(progress) * maskable_B + draw_B).astype(np.int64)
    quota_B = np.minimum(np.maximum(quota_B, maskable_B > 0), maskable_B)

    # A unit is a token or all maskable tokens of a word. It is selected as a whole, by the draw of its first token.
    if settings.mask_unit == "token":
        first_U = np.flatnonzero(maskable_T)
        size_U = np.ones(len(first_U), dtype=np.int64)
    else:
        first_U, size_U = word_units(packed, maskable_T)
    sequence_U = sequence_T[first_U]
    draw_U = rng.uniform(seed, "mask", *packed.draw_keys(first_U))
    if boosted_T is not None:
        draw_U = _boost(draw_U, sequence_U, size_U, quota_B, boosted_T[first_U], settings.boost_factor)
    if settings.mask_unit in ("span", "ngram"):
        length_U = _span_lengths(rng.uniform(seed, "span", *packed.draw_keys(first_U)), settings)
        is_adjacent_U = (first_U[1:] == first_U[:-1] + size_U[:-1]) & (sequence_U[1:] == sequence_U[:-1])
        draw_U = _min_over_spans(draw_U, length_U, is_adjacent_U)
    order_U = np.lexsort((draw_U, sequence_U))  # stable: the words of one span keep their order
    selected_U = np.zeros(len(first_U), dtype=bool)
    selected_U[order_U] = _select_units(sequence_U[order_U], size_U[order_U], quota_B)
    return runs(first_U[selected_U].astype(np.int64), size_U[selected_U].astype(np.int64))


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
    """Return a copy of the ids with masked tokens replaced. One draw per token decides between the three cases."""
    key = packed.draw_keys(positions_M)
    action_M = rng.uniform(seed, "action", *key)
    random_M = regular_token_ids[rng.below(len(regular_token_ids), seed, "random", *key)]
    corrupted_T = ids_T.astype(np.int64)
    corrupted_T[positions_M] = np.select(
        [action_M < settings.mask_token_rate, action_M < settings.mask_token_rate + settings.random_token_rate],
        [mask_id, random_M],
        corrupted_T[positions_M],
    )
    return corrupted_T


def word_units(packed: PackedSequences, maskable_T: NDArray[np.bool_]) -> tuple[Integers, Integers]:
    """Return the first position and the number of maskable tokens of each word.

    Words end at special tokens and at the end of a sequence.
    """
    starts_T = (packed.token_flags_T & WORD_START) != 0
    starts_T[packed.cu_seqlens[:-1]] = True
    starts_T[1:] |= ~maskable_T[:-1]
    first_U = np.flatnonzero(starts_T & maskable_T)
    boundaries = np.append(np.flatnonzero(starts_T | ~maskable_T), len(maskable_T))
    size_U = boundaries[np.searchsorted(boundaries, first_U, side="right")] - first_U
    return first_U, size_U


def _select_units(sequence_U: Integers, size_U: Integers, quota_B: Integers) -> NDArray[np.bool_]:
    """Return which units are selected: in order, those that fit into the remaining quota of their sequence.

    The computation is vectorized over sequences and runs in rounds. Of the units that fit singly, each round selects
    the longest prefix that fits in total. If no unit of a sequence fits, its first unit is selected.
    """
    selected_U = np.zeros(len(sequence_U), dtype=bool)
    remaining_B = quota_B.copy()
    while True:
        fits = np.flatnonzero(~selected_U & (size_U <= remaining_B[sequence_U]))
        if not len(fits):
            break
        sequence, total = sequence_U[fits], np.cumsum(size_U[fits])
        first_of_sequence = np.searchsorted(sequence, sequence)
        total -= total[first_of_sequence] - size_U[fits][first_of_sequence]
        prefix = total <= remaining_B[sequence]
        selected_U[fits[prefix]] = True
        sizes = np.bincount(sequence[prefix], weights=size_U[fits[prefix]], minlength=len(remaining_B))
        remaining_B -= sizes.astype(np.int64)
    is_empty_B = (quota_B > 0) & (remaining_B == quota_B)
    sequences, first = np.unique(sequence_U, return_index=True)
    selected_U[first[is_empty_B[sequences]]] = True
    return selected_U


def _boost(
    draw_U: NDArray[np.float64],
    sequence_U: Integers,
    size_U: Integers,
    quota_B: Integers,
    is_boosted_U: NDArray[np.bool_],
    factor: float,
) -> NDArray[np.float64]:
    """Return sort keys that select boosted units `factor` times as often as others of their sequence, or always.

    Order sampling (Rosén 1997, J. Statist. Plann. Inference 62): each unit has an inclusion probability p, and their
    sum over a sequence is the quota. Selecting units in the order of u/(1-u) / (p/(1-p)) closely approximates these
    probabilities. If all of them are equal, the order is that of the draws.
    """
    boosted_B = np.bincount(sequence_U[is_boosted_U], weights=size_U[is_boosted_U], minlength=len(quota_B))
    others_B = np.bincount(sequence_U, weights=size_U, minlength=len(quota_B)) - boosted_B
    probability_B = quota_B / np.maximum(others_B + factor * boosted_B, 1)
    is_certain_B = factor * probability_B >= 1
    probability_B = np.where(is_certain_B, (quota_B - boosted_B) / np.maximum(others_B, 1), probability_B)
    boosted_probability_B = np.where(is_certain_B, 1.0, factor * probability_B)
    probability_U = np.where(is_boosted_U, boosted_probability_B[sequence_U], probability_B[sequence_U])
    probability_U = np.clip(probability_U, _MIN_PROBABILITY, 1 - _MIN_PROBABILITY)
    return draw_U / (1 - draw_U) * ((1 - probability_U) / probability_U)


def _span_lengths(draw_U: NDArray[np.float64], settings: MaskingConfig) -> Integers:
    """Return span lengths in words for uniform draws: SpanBERT's distribution, or ALBERT's 1/n for n-grams."""
    if settings.mask_unit == "span":
        lengths_U = np.floor(np.log1p(-draw_U) / np.log1p(-SPAN_STOP_RATE)).astype(np.int64) + 1
        return np.minimum(lengths_U, MAX_SPAN_WORDS)
    cumulative_N = np.cumsum(1 / np.arange(1, settings.max_ngram + 1))
    return np.searchsorted(cumulative_N[:-1] / cumulative_N[-1], draw_U, side="right") + 1


def _min_over_spans(
    draw_U: NDArray[np.float64], length_U: Integers, is_adjacent_U: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return for each word the smallest draw of the spans that contain it.

    A span starts at every word and ends early at a special token or at the end of its sequence. Selecting words in the
    order of these draws selects span after span, with overlaps. A loop over spans would be slower: 13 ms instead of
    5 ms for 128 sequences of 128 tokens.
    """
    smallest_U, reaches_U = draw_U.copy(), np.ones(len(draw_U), dtype=bool)
    for distance in range(1, min(int(length_U.max(initial=1)), len(draw_U))):
        # Whether the span that starts `distance` words earlier reaches this word.
        reaches_U = reaches_U[:-1] & is_adjacent_U[distance - 1 :] & (length_U[:-distance] > distance)
        smallest_U[distance:] = np.minimum(smallest_U[distance:], np.where(reaches_U, draw_U[:-distance], np.inf))
    return smallest_U
