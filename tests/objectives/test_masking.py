"""Properties of masking, tested on random samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unmask.core.errors import RecipeError
from unmask.core.types import SPECIAL, WORD_START, Sample, pack
from unmask.objectives.masking import MAX_SPAN_WORDS, MaskingConfig, PackedSequences, corrupt_tokens, select_positions
from unmask.objectives.mlm import MaskedLMConfig, MaskedLMObjective

MASK, ORDINARY = 4, np.arange(5, 1000)


def text(rng: np.random.Generator, length: int, number: int, special_share: float = 0.1) -> Sample:
    marks = np.where(rng.random(length) < 0.6, WORD_START, 0).astype(np.uint8)
    special = rng.random(length) < special_share
    marks[special] = SPECIAL
    ids = np.where(special, 1, rng.integers(5, 1000, length))
    return Sample(ids, marks, epoch=3, number=number)


def packed_of(samples: list[Sample]) -> PackedSequences:
    batch = pack(samples)
    return PackedSequences.from_batch(batch)


lengths = st.lists(st.integers(1, 90), min_size=1, max_size=12)


@settings(max_examples=120, deadline=None)
@given(
    lengths,
    st.integers(0, 2**32),
    st.sampled_from([0.05, 0.15, 0.4, 1.0]),
    st.sampled_from(["token", "whole-word", "span", "ngram"]),
    st.booleans(),
)
def test_counts_specials_and_order(sizes: list[int], seed: int, rate: float, how: str, boosts: bool) -> None:
    """The count is ⌊r·n + u⌋ tokens; words and spans differ from r·n by at most the longest, or one alone is masked."""
    rng = np.random.default_rng(seed)
    samples = [text(rng, n, i) for i, n in enumerate(sizes)]
    packed = packed_of(samples)
    boosted_T = rng.random(sum(sizes)) < 0.2 if boosts else None
    positions_M = select_positions(packed, MaskingConfig(mask_rate=rate, mask_unit=how), seed, boosted_T=boosted_T)
    assert (np.diff(positions_M) > 0).all(), "ascending, without repeats"
    assert not (packed.token_flags_T[positions_M] & SPECIAL).any()
    for b, one in enumerate(samples):
        n = int(((one.token_flags & SPECIAL) == 0).sum())
        masked_count = int(((positions_M >= packed.cu_seqlens[b]) & (positions_M < packed.cu_seqlens[b + 1])).sum())
        assert (masked_count >= 1) == (n >= 1)
        if how == "token":
            assert masked_count in {
                max(min(n, 1), int(np.floor(rate * n))),
                max(min(n, 1), min(n, int(np.floor(rate * n)) + 1)),
            }
            continue
        words = words_of(one)
        longest = max((len(word) for word in words), default=0)
        if how != "whole-word":
            longest *= min(MAX_SPAN_WORDS, max(1, int(rate * len(words))))
        assert abs(masked_count - rate * n) <= longest + 1e-6 or 1 <= masked_count <= longest


def words_of(one: Sample) -> list[list[int]]:
    words: list[list[int]] = []
    fresh = True
    for i, mark in enumerate(one.token_flags):
        if mark & SPECIAL:
            fresh = True
            continue
        if fresh or mark & WORD_START:
            words.append([])
        words[-1].append(i)
        fresh = False
    return words


def copies(sizes: list[int], special: set[int], count: int) -> tuple[PackedSequences, np.ndarray]:
    """Return `count` samples of one text with words of these sizes, and the first token of each word in a sample.

    A special token follows the words with the numbers in `special`.
    """
    flags: list[int] = []
    firsts: list[int] = []
    for number, size in enumerate(sizes):
        firsts.append(len(flags))
        flags += [WORD_START] + [0] * (size - 1) + [SPECIAL] * (number in special)
    keys = np.stack([np.zeros(count, int), np.arange(count)], axis=1)
    bounds = np.arange(count + 1) * len(flags)
    return PackedSequences(np.tile(np.array(flags, np.uint8), count), bounds, keys), np.array(firsts)


def frequencies(positions_M: np.ndarray, packed: PackedSequences, firsts: np.ndarray) -> np.ndarray:
    """Return how often each word is masked, by its first token."""
    is_masked = np.zeros(len(packed.token_flags_T), bool)
    is_masked[positions_M] = True
    return is_masked.reshape(len(packed.sample_keys_B2), -1)[:, firsts].mean(axis=0)


COPIES = 1500
SIX_ERRORS = 6 * 0.5 / COPIES**0.5  # six standard errors of a frequency of one half, which has the largest


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=20),
    st.sets(st.integers(0, 19), max_size=4),
    st.sampled_from(["token", "whole-word", "span", "ngram"]),
    st.floats(0.05, 1.0),
    st.integers(0, 2**32),
)
@example([1, 3, 3, 7], set[int](), "whole-word", 0.05, 3)
@example([2, 1, 6, 1, 1], {1}, "span", 0.1, 3)
def test_every_word_of_a_text_has_the_same_chance(
    sizes: list[int], special: set[int], how: str, rate: float, seed: int
) -> None:
    """It is r, or one in the number of units if that is more, whatever the words' sizes and places are."""
    packed, firsts = copies(sizes, special, COPIES)
    positions_M = select_positions(packed, MaskingConfig(mask_rate=rate, mask_unit=how), seed)
    units = sum(sizes) if how == "token" else len(sizes)
    chance = max(rate, 1 / units)
    error = 6 * (chance * (1 - chance) / COPIES) ** 0.5 + 1e-9
    # The chance of a false alarm in all examples is below 1e-4.
    assert np.abs(frequencies(positions_M, packed, firsts) - chance).max() < error
    masked = len(positions_M) / COPIES
    longest = 1 if how == "token" else max(sizes) * (1 if how == "whole-word" else max(1, int(rate * len(sizes))))
    assert abs(masked - chance * sum(sizes)) < 6 * longest / COPIES**0.5 + 1e-9, "the quota is met in the mean"


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["token", "whole-word"]), st.floats(1.0, 60.0), st.integers(0, 2**32))
def test_boosted_words_have_exactly_the_factor(how: str, factor: float, seed: int) -> None:
    """The chances are c and min(1, f·c) for words of every size, with a mean of r·n masked tokens."""
    sizes = [1, 5, 2, 3, 1, 1, 4, 2, 7, 1, 3, 2, 1, 6, 1, 2]
    packed, firsts = copies(sizes, {3}, COPIES)
    number_T = np.repeat(np.arange(len(sizes)), [size + (i == 3) for i, size in enumerate(sizes)])
    boosted = np.isin(np.arange(len(sizes)), [0, 6, 11])  # sizes 1, 4 and 2
    rule = MaskingConfig(mask_rate=0.25, mask_unit=how, boost_factor=factor)
    positions_M = select_positions(packed, rule, seed, boosted_T=np.tile(boosted[number_T], COPIES))
    quota, tokens = 0.25 * sum(sizes), np.array(sizes)
    chance = quota / (tokens[~boosted].sum() + factor * tokens[boosted].sum())
    if factor * chance >= 1:
        chance = (quota - tokens[boosted].sum()) / tokens[~boosted].sum()
    expected = np.where(boosted, min(1.0, factor * chance), chance)
    measured = frequencies(positions_M, packed, firsts)
    assert np.abs(measured - expected).max() < SIX_ERRORS
    assert (measured[boosted] == 1.0).all() == (factor * chance >= 1 or bool(expected[boosted].min() == 1.0))
    assert abs(len(positions_M) / COPIES - quota) < 6 * 7 / COPIES**0.5


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(0, 2**32), st.sampled_from(["whole-word", "span", "ngram"]))
def test_words_are_masked_whole(sizes: list[int], seed: int, how: str) -> None:
    rng = np.random.default_rng(seed)
    samples = [text(rng, n, i) for i, n in enumerate(sizes)]
    packed = packed_of(samples)
    at = set(select_positions(packed, MaskingConfig(mask_rate=0.3, mask_unit=how), seed).tolist())
    for b, one in enumerate(samples):
        for word in words_of(one):
            masked_count = [packed.cu_seqlens[b] + i in at for i in word]
            assert all(masked_count) or not any(masked_count)


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(0, 2**32), st.sampled_from(["token", "whole-word", "span", "ngram"]), st.randoms())
def test_a_mask_does_not_depend_on_the_batch(sizes: list[int], seed: int, how: str, shuffler) -> None:
    """Alone, together or in another order: a sample of an epoch has one mask and one set of replacements."""
    rng = np.random.default_rng(seed)
    samples = [text(rng, n, i) for i, n in enumerate(sizes)]
    objective = MaskedLMObjective(
        MaskedLMConfig(mask_rate=0.3, mask_unit=how), MASK, ORDINARY, [(8,), (9, 10), (11, 12, 13)]
    )
    alone = {t.number: objective.corrupt(pack([t]), seed) for t in samples}
    shuffler.shuffle(samples)
    together = objective.corrupt(pack(samples), seed)
    for b, one in enumerate(samples):
        first, last = together.batch.offsets[b], together.batch.offsets[b + 1]
        assert (together.batch.ids_T[first:last] == alone[one.number].batch.ids_T).all()
        inside = (together.positions_M >= first) & (together.positions_M < last)
        assert (together.positions_M[inside] - first == alone[one.number].positions_M).all()


@pytest.mark.parametrize("how", ["token", "whole-word", "span", "ngram"])
def test_the_mean_rate(how: str) -> None:
    rng = np.random.default_rng(0)
    samples = [text(rng, 64, i) for i in range(3000)]
    packed = packed_of(samples)
    maskable = int(((packed.token_flags_T & SPECIAL) == 0).sum())
    realised = len(select_positions(packed, MaskingConfig(mask_rate=0.15, mask_unit=how), 1)) / maskable
    # Four standard errors of 3,000 draws: one token at most for tokens, else a scatter of a few tokens per sample.
    scatter = {"token": 0.29, "whole-word": 3, "span": 8, "ngram": 5}[how]
    assert abs(realised - 0.15) < 4 * scatter * 3000**0.5 / maskable


def test_short_sequences_keep_the_mean_rate() -> None:
    samples = [Sample(np.full(7, 9), np.full(7, WORD_START, np.uint8), 0, i) for i in range(20_000)]
    realised = len(select_positions(packed_of(samples), MaskingConfig(mask_rate=0.5), 3)) / 140_000
    assert abs(realised - 0.5) < 4 * 0.5 * 20_000**0.5 / 140_000


def test_the_split_is_80_10_10_and_disjoint() -> None:
    samples = [Sample(np.full(500, 7), np.full(500, WORD_START, np.uint8), 1, i) for i in range(400)]
    packed = packed_of(samples)
    rule = MaskingConfig(mask_rate=0.5)
    positions_M = select_positions(packed, rule, 5)
    ids_T = np.full(200_000, 7)
    hidden_T = corrupt_tokens(ids_T, positions_M, packed, rule, 5, mask_id=MASK, regular_token_ids=ORDINARY)
    untouched = np.delete(hidden_T, positions_M)
    assert (untouched == 7).all()
    masked_count = hidden_T[positions_M]
    error = 4 * (0.25 / len(positions_M)) ** 0.5
    assert abs((masked_count == MASK).mean() - 0.8) < error
    # The random token may be the original, as in BERT: one time in 995.
    assert abs((masked_count == 7).mean() - (0.1 + 0.1 / 995)) < error
    drawn = masked_count[(masked_count != MASK) & (masked_count != 7)]
    assert set(drawn.tolist()) <= set(ORDINARY.tolist()) and len(set(drawn.tolist())) > 990


def test_epochs_and_seeds_mask_differently() -> None:
    base = Sample(np.full(300, 7), np.full(300, WORD_START, np.uint8), 0, 11)
    later = Sample(base.ids, base.token_flags, 1, 11)
    rule = MaskingConfig()
    first, second = select_positions(packed_of([base]), rule, 1), select_positions(packed_of([later]), rule, 1)
    other_seed = select_positions(packed_of([base]), rule, 2)
    assert set(first.tolist()) != set(second.tolist()) and set(first.tolist()) != set(other_seed.tolist())


def test_spans_have_the_lengths_of_spanbert() -> None:
    """A geometric distribution up to 10 words with a mean of 3.8; at a low rate few of them are adjacent."""
    packed, _ = copies([1] * 2000, set(), 500)
    hit = np.zeros(1_000_000, bool)
    hit[select_positions(packed, MaskingConfig(mask_unit="span", mask_rate=0.02), 0)] = True
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], hit.view(np.int8), [0]]))))[::2]
    expected = 0.8 ** np.arange(MAX_SPAN_WORDS)
    expected /= expected.sum()
    shares = np.array([(runs == n).mean() for n in range(1, MAX_SPAN_WORDS + 1)])
    touching = 0.02  # spans beside each other look like one
    assert np.abs(shares - expected).max() < touching + 5 * (0.25 / len(runs)) ** 0.5
    assert 3.8 * 0.96 < runs.mean() < 3.8 * (1 + touching) * 1.04


def test_spans_favor_no_place() -> None:
    """Neighbors are masked together equally often at the edges and in the middle of a text."""
    packed, _ = copies([1] * 30, set(), 20_000)
    hit = np.zeros(600_000, bool)
    hit[select_positions(packed, MaskingConfig(mask_unit="span", mask_rate=0.2), 4)] = True
    together = (hit.reshape(20_000, 30)[:, 1:] & hit.reshape(20_000, 30)[:, :-1]).mean(axis=0)
    assert np.abs(together - together.mean()).max() < 5 * (together.mean() / 20_000) ** 0.5
    assert together.mean() > 0.1, "by chance it would be 0.04"


def test_spans_of_a_short_text_leave_most_of_it() -> None:
    """A span has at most r·n of the n words: of twelve words at 25 %, never more than two spans of three."""
    packed, _ = copies([1] * 12, set(), 2000)
    positions_M = select_positions(packed, MaskingConfig(mask_unit="span", mask_rate=0.25), 1)
    assert np.bincount(positions_M // 12, minlength=2000).max() <= 6


@pytest.mark.parametrize(("longest", "mean"), [(1, 1.0), (2, 4 / 3), (3, 18 / 11), (5, 300 / 137)])
def test_ngrams_have_the_lengths_of_albert(longest: int, mean: float) -> None:
    """p(n) is (1 ÷ n) ÷ Σ 1 ÷ k, so the mean is N ÷ Σ 1 ÷ k; at a low rate few of them are adjacent."""
    samples = [Sample(np.full(2000, 7), np.full(2000, WORD_START, np.uint8), 0, i) for i in range(100)]
    hit = np.zeros(200_000, bool)
    hit[
        select_positions(packed_of(samples), MaskingConfig(mask_rate=0.01, mask_unit="ngram", max_ngram=longest), 0)
    ] = True
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], hit.view(np.int8), [0]]))))[::2]
    touching = 1 + 0.01 * longest  # runs beside each other look like one
    assert mean * 0.94 < runs.mean() < mean * touching * 1.06
    shares = [(runs == n).mean() for n in range(1, longest + 1)]
    assert shares == sorted(shares, reverse=True), "short ones are commoner"


def test_spans_end_at_special_tokens_and_sequence_ends() -> None:
    """Every second token is special: no span has more than one word, and the count is still reached."""
    marks = np.tile(np.array([WORD_START, SPECIAL], np.uint8), 50)
    samples = [Sample(np.full(100, 7), marks, 0, i) for i in range(20)]
    packed = packed_of(samples)
    positions_M = select_positions(packed, MaskingConfig(mask_rate=0.5, mask_unit="ngram"), 0)
    assert not (packed.token_flags_T[positions_M] & SPECIAL).any() and len(positions_M) == 20 * 25


def test_special_tokens_alone_are_not_masked() -> None:
    special = Sample(np.array([2, 1, 3]), np.full(3, SPECIAL, np.uint8))
    masked = MaskedLMObjective(MaskedLMConfig(), MASK, ORDINARY).corrupt(pack([special]), 0)
    assert masked.denominators == {"mlm": 0} and (masked.batch.ids_T.numpy() == special.ids).all()


@pytest.mark.parametrize(
    "invalid",
    [
        {"mask_rate": 0.0},
        {"mask_rate": 1.5},
        {"final_mask_rate": 0.0},
        {"mask_token_rate": 0.9},
        {"mask_token_rate": -0.1, "keep_rate": 1.0},
        {"max_ngram": 0},
        {"boost_factor": 0.5},
        {"boosted_words": ("apple",) * 10_001},
    ],
)
def test_invalid_settings_are_refused(invalid: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="hint:"):
        MaskingConfig(**invalid)
