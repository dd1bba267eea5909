"""Masking: selects the tokens to predict and corrupts the input (80/10/10).

Every random draw is a hash of (seed, epoch, sample number, offset in the sequence). It doesn't depend on batching,
workers, ranks or earlier draws.

The unit of selection is a token, a word or a span of words. Word boundaries come from the text. At mask rate r, every
unit of a sequence is selected with the same chance r, so the mean number of masked tokens is r·n for n maskable tokens.
That is BERT's rule (arXiv 1810.04805, section 3.1 and appendix A.1) with less variance. The sampling design is
systematic sampling with chances p_i (Madow 1949, Ann. Math. Statist. 20): the units are put in order, and unit i is
selected if an integer lies in (p_1 + … + p_{i-1} + u, p_1 + … + p_i + u], with one uniform draw u per sequence. The
chances are exact, and ⌊Σp + u⌋ units are selected: of n tokens, ⌊r·n + u⌋.

Units are ordered by size, ties at random. Units at equal distances of an ascending order are a good sample of the
sizes: the number of masked tokens differs from r·n by at most the longest unit. In 126 WordPiece tokens of English
Wikipedia at 15 %, 18.9 tokens are masked with a standard deviation of 1.4 (whole words), 2.0 (n-grams) and 4.0 (spans);
independent draws of whole words have 5.0. The cost: two units next to each other in this order are rarely masked
together, e.g. the two longest words of a sequence. The cube method (Deville and Tillé 2004, Biometrika 91) avoids this,
but processes one unit after the other.

At least one unit is selected in a sequence that has any: if Σp < 1, all chances are divided by Σp. A sequence of fewer
than 1/r words then has the chance 1 / words, again the same for each.

Spans follow SpanBERT (arXiv 1907.10529, section 3.1), n-grams follow ALBERT (arXiv 1909.11942, section 3.1), and a
falling mask rate follows arXiv 2305.15096.
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
# Sums of chances are integers, multiples of 2**-40: exact, so that a mask doesn't depend on the batch.
_FIXED_POINT_BITS = 40


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
    weights_T: NDArray[np.floating[Any]] | None = None,
) -> Integers:
    """Return the positions to mask in ascending order. `boosted_T` marks the tokens of boosted words.

    A unit with a boosted word is selected `settings.boost_factor` times as often as the other units of its sequence.
    With `weights_T`, the masked tokens of a sequence are drawn one by one, each with a chance proportional to its
    weight among those that are left (Efraimidis and Spirakis 2006); the unit must be a token.
    """
    maskable_T = (packed.token_flags_T & SPECIAL) == 0
    sequence_T = packed.sequence_T()
    rate = settings.rate_at(progress)
    if settings.mask_unit == "token":
        first_U = np.flatnonzero(maskable_T)
        size_U = np.ones(len(first_U), dtype=np.int64)
    else:
        first_U, size_U = word_units(packed, maskable_T)
        if settings.mask_unit != "whole-word":
            span_draw_U = rng.uniform(seed, "span", *packed.draw_keys(first_U))
            first_U, size_U = _join_words(
                first_U, size_U, sequence_T[first_U], span_draw_U, _length_chances(settings), rate
            )
    sequence_U = sequence_T[first_U]
    draw_U = rng.uniform(seed, "mask", *packed.draw_keys(first_U))
    if weights_T is not None:
        assert settings.mask_unit == "token", "weights are those of tokens"
        draw_U = -np.log1p(-draw_U) / weights_T[first_U]  # the smallest of exponential draws with these rates
    units_B = np.bincount(sequence_U, minlength=len(packed.sample_keys_B2))
    if boosted_T is None:
        is_boosted_U = np.zeros(len(first_U), dtype=bool)
        total_B = rate * units_B.astype(np.float64)
        chance_U = np.full(len(first_U), rate)
    else:
        boosted_T1 = np.concatenate([[0], np.cumsum(boosted_T)])
        is_boosted_U = boosted_T1[first_U + size_U] > boosted_T1[first_U]
        chance_U = _boosted_chances(sequence_U, size_U, is_boosted_U, rate, settings.boost_factor, len(units_B))
        total_B = np.bincount(sequence_U, weights=chance_U, minlength=len(units_B)).astype(np.float64)
    selected_U = _select_units(
        sequence_U,
        stratum_U=2 * size_U + is_boosted_U,
        chance_U=chance_U / np.minimum(total_B, 1.0)[sequence_U],
        draw_U=draw_U,
        total_B=total_B,
        start_B=rng.uniform(seed, "count", packed.sample_keys_B2[:, 0], packed.sample_keys_B2[:, 1]),
    )
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


def _select_units(
    sequence_U: Integers,
    *,
    stratum_U: Integers,
    chance_U: NDArray[np.float64],
    draw_U: NDArray[np.float64],
    total_B: NDArray[np.float64],
    start_B: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Return which units are selected by systematic sampling in the order of (sequence, stratum, draw).

    The units of a stratum have the same chance. Of those of a stratum in random order, systematic sampling selects a
    random subset, so the units with the smallest draws are taken. Then only sums of whole strata are needed, and if
    a sequence has one stratum (tokens), its ⌊total + u⌋ smallest draws are selected.

    Args:
        sequence_U: sequence of each unit, ascending.
        stratum_U: stratum of each unit within its sequence, at least 0.
        chance_U: chance of each unit; at least 1 in total in each sequence with any.
        draw_U: draw of each unit, which orders those of a stratum.
        total_B: sum of the chances of each sequence, before it was raised to 1.
        start_B: uniform draw u of each sequence.
    """
    selected_U = np.zeros(len(sequence_U), dtype=bool)
    if not len(sequence_U):
        return selected_U
    key_U = sequence_U * (int(stratum_U.max()) + 1) + stratum_U
    order_U = np.lexsort((draw_U, key_U))
    key_U = key_U[order_U]
    first_G = np.flatnonzero(np.concatenate([[True], key_U[1:] != key_U[:-1]]))  # G: strata
    size_G = np.diff(np.append(first_G, len(key_U)))
    sequence_G = sequence_U[order_U[first_G]]
    is_last_G = np.append(sequence_G[1:] != sequence_G[:-1], True)

    scale = float(1 << _FIXED_POINT_BITS)
    sum_G = np.cumsum(np.rint(size_G * chance_U[order_U[first_G]] * scale).astype(np.int64))
    first_stratum_G = np.searchsorted(sequence_G, sequence_G)
    sum_G -= np.concatenate([[0], sum_G])[first_stratum_G]  # exact, also if the sum over sequences wraps around
    selected_G = (sum_G + (start_B * scale).astype(np.int64)[sequence_G]) >> _FIXED_POINT_BITS
    units_B = np.bincount(sequence_U, minlength=len(total_B))
    quota_B = np.clip(np.floor(total_B + start_B).astype(np.int64), np.minimum(units_B, 1), units_B)
    selected_G = np.where(is_last_G, quota_B[sequence_G], np.minimum(selected_G, quota_B[sequence_G]))
    selected_G[1:] -= np.where(is_last_G[:-1], 0, selected_G[:-1])  # from sums to the number of each stratum
    rank_U = np.arange(len(key_U)) - np.repeat(first_G, size_G)
    selected_U[order_U] = rank_U < np.repeat(selected_G, size_G)
    return selected_U


def _boosted_chances(
    sequence_U: Integers, size_U: Integers, is_boosted_U: NDArray[np.bool_], rate: float, factor: float, sequences: int
) -> NDArray[np.float64]:
    """Return the chance of each unit: c or, if it is boosted, min(1, factor·c). The mean of masked tokens is r·n."""
    boosted_B = np.bincount(sequence_U[is_boosted_U], weights=size_U[is_boosted_U], minlength=sequences)
    tokens_B = np.bincount(sequence_U, weights=size_U, minlength=sequences)
    others_B = tokens_B - boosted_B
    chance_B = rate * tokens_B / np.maximum(others_B + factor * boosted_B, 1)
    is_certain_B = factor * chance_B >= 1
    chance_B = np.where(is_certain_B, (rate * tokens_B - boosted_B) / np.maximum(others_B, 1), chance_B)
    boosted_chance_B = np.where(is_certain_B, 1.0, factor * chance_B)
    return np.where(is_boosted_U, boosted_chance_B[sequence_U], chance_B[sequence_U])


def _length_chances(settings: MaskingConfig) -> NDArray[np.float64]:
    """Return the chances of spans of 1, 2, … words: SpanBERT's geometric distribution, or ALBERT's 1/n for n-grams."""
    if settings.mask_unit == "span":
        # Normalized over 1 to 10 words, which has SpanBERT's mean of 3.8; a minimum with 10 would have a mean of 4.5.
        chance_N = (1 - SPAN_STOP_RATE) ** np.arange(MAX_SPAN_WORDS)
    else:
        chance_N = 1 / np.arange(1, settings.max_ngram + 1)
    return chance_N / chance_N.sum()


def _join_words(
    first_U: Integers,
    size_U: Integers,
    sequence_U: Integers,
    draw_U: NDArray[np.float64],
    chance_N: NDArray[np.float64],
    rate: float,
) -> tuple[Integers, Integers]:
    """Return the first position and the number of tokens of consecutive spans that every word is in one of.

    The lengths are a stationary renewal process (Cox 1962, Renewal Theory, chapter 5): drawn from `chance_N`, except
    that the first span of a sequence is the rest of one that began before it. So a span begins at any word with the
    same chance. A span has at most r·n of the n words of its sequence, else one could exceed the quota of a short text.
    It ends early at a special token and at the end of its sequence.
    """
    first_word_U = np.searchsorted(sequence_U, sequence_U)
    words_U = np.searchsorted(sequence_U, sequence_U, side="right") - first_word_U
    longest_U = np.clip((rate * words_U).astype(np.int64), 1, len(chance_N))
    below_N1 = np.concatenate([[0.0], np.cumsum(chance_N)])
    length_U = np.searchsorted(below_N1[1:], draw_U * below_N1[longest_U], side="right") + 1

    starts = np.flatnonzero(first_word_U == np.arange(len(sequence_U)))
    longest_B1 = longest_U[starts][:, None]
    # A rest of k words is as likely as a length of k or more.
    rest_BN = np.cumsum(np.maximum(below_N1[longest_B1] - below_N1[:-1], 0.0), axis=1)
    length_U[starts] = (draw_U[starts][:, None] * rest_BN[:, -1:] >= rest_BN).sum(axis=1) + 1
    length_U = np.minimum(length_U, longest_U)  # a rounded product may reach the end of the last interval

    end_U = np.cumsum(length_U)
    end_U += first_word_U - (end_U - length_U)[first_word_U]  # index of the word after the span
    is_start_U = np.ones(len(sequence_U), dtype=bool)
    is_start_U[1:] = (first_U[1:] != first_U[:-1] + size_U[:-1]) | (sequence_U[1:] != sequence_U[:-1])
    is_start_U[end_U[end_U < first_word_U + words_U]] = True
    begin_S = np.flatnonzero(is_start_U)
    return first_U[begin_S], np.add.reduceat(size_U, begin_S) if len(begin_S) else size_U
