"""The checks of an audit: masking rate, replacement, special tokens, whole words, repeats."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import NDArray

from unmask.checks.audit.settings import SIGNIFICANCE, Finding, must_be_zero, skipped
from unmask.checks.audit.statistics import (
    Observations,
    chernoff_bound,
    cluster_proportion,
    combinations,
    p_value,
    poisson_tail,
)

_BINS: Final = 4  # length groups
_EDGE: Final = 2  # positions at each end that the detail lists
_MIN_CLUSTERS: Final = 50  # with fewer clusters the normal distribution is not used


def rate_findings(obs: Observations) -> Iterator[Finding]:
    """Yield the checks of masking rates."""
    yield _rate(obs)
    yield _unmasked(obs)
    yield _by_length(obs)
    yield _by_position(obs)


def _rate(obs: Observations) -> Finding:
    rate, expected = obs.rate, obs.claims.rate
    if not rate.of:
        return skipped("rate", f"no sample is long enough for a rate of {expected:g}")
    p = p_value(rate.value, rate.error, expected)
    detail = f"{rate.value:.3%} ± {rate.error:.3%} of {rate.of:,} tokens are masked, {expected:.4g} claimed"
    return Finding("rate", "fail" if p < SIGNIFICANCE else "pass", detail, rate.value, expected, rate.error,
                   rate.hits, rate.of, p)  # fmt: skip


def _unmasked(obs: Observations) -> Finding:
    """Check the number of samples without a mask; independent draws leave some of the short samples unmasked."""
    some_V = obs.maskable_V > 0
    empty = int((some_V & (obs.masked_V == 0)).sum())
    draws_V = obs.maskable_V if obs.claims.units == "tokens" else obs.words_V
    rate = min(obs.claims.rate, max(obs.rate.value, 1e-9))
    none_V = np.where(some_V, (1.0 - rate) ** draws_V, 0.0)
    repeats = obs.settings.loaders * obs.settings.ranks * obs.settings.epochs
    # A masker that repeats itself leaves the same samples unmasked again, so they count once.
    p = poisson_tail(empty // repeats, float(none_V.sum()) / repeats)
    explained = float(none_V.sum())
    detail = f"{empty:,} of {int(some_V.sum()):,} samples have no mask; independent draws give {explained:,.1f}"
    verdict = "fail" if p < SIGNIFICANCE else "pass"
    return Finding("samples without masks", verdict, detail, float(empty), explained, None, empty, int(some_V.sum()), p)


def _by_length(obs: Observations) -> Finding:
    long = obs.maskable_V[obs.long_V]
    if not len(long) or not obs.rate.hits:
        return skipped("rate by length", "no sample is long enough")
    edges = np.unique(np.quantile(long[~obs.full_V[obs.long_V]], np.linspace(0, 1, _BINS + 1)).astype(np.int64))
    worst, parts = 1.0, list[str]()
    for first, last in itertools.pairwise(edges.tolist()):
        selected_V = obs.long_V & (obs.maskable_V >= first) & (obs.maskable_V < last) & ~obs.full_V
        rate = obs.rate_over(selected_V)
        if len(np.unique(obs.cluster_V[selected_V])) < _MIN_CLUSTERS:
            continue
        p = p_value(rate.value, float(np.hypot(rate.error, obs.rate.error)), obs.rate.value)
        worst = min(worst, p)
        parts.append(f"{first}-{last - 1}: {rate.value:.2%}")
    short_V = ~obs.long_V & (obs.maskable_V > 0)
    if short_V.any():
        parts.insert(0, f"under {edges[0]}: {obs.rate_over(short_V).value:.2%} (not checked)")
    p = min(1.0, worst * max(1, len(parts)))
    detail = "by tokens of the sample: " + ", ".join(parts)
    return Finding("rate by length", "fail" if p < SIGNIFICANCE else "pass", detail, p_value=p)


def _by_position(obs: Observations) -> Finding:
    """Compare the rate at each position of full samples with the rate of all.

    One position has few masked tokens, for which the normal distribution gives false alarms. The bound that replaces it
    holds for independent draws; fewer draws are counted if the clusters scatter more than independent draws.
    """
    full_V = obs.full_V
    if len(np.unique(obs.cluster_V[full_V])) < _MIN_CLUSTERS or not obs.rate.hits:
        return skipped("rate by position", "too few full samples")
    counted_VS, maskable_VS, cluster_V = obs.counted_VS[full_V], obs.maskable_VS[full_V], obs.cluster_V[full_V]
    overall = obs.rate_over(full_V)
    positions = np.flatnonzero(maskable_VS.any(axis=0))
    rates: dict[int, float] = {}
    worst, worst_position = 1.0, int(positions[0])
    for position in positions.tolist():
        expected_V = overall.value * maskable_VS[:, position]
        excess = cluster_proportion(counted_VS[:, position] - expected_V, maskable_VS[:, position], cluster_V)
        rates[position] = excess.value + overall.value
        variance = overall.value * (1.0 - overall.value) / excess.of
        draws = excess.of * min(1.0, variance / max(excess.error**2, 1e-12))
        p = chernoff_bound(rates[position], overall.value, draws)
        if p < worst:
            worst, worst_position = p, position
    p = min(1.0, worst * len(positions))
    edges = [*positions[:_EDGE].tolist(), *positions[-_EDGE:].tolist()]
    detail = ", ".join(f"position {position}: {rates[position]:.2%}" for position in edges)
    detail = f"{detail}; all: {overall.value:.2%}; least likely: position {worst_position}, {rates[worst_position]:.2%}"
    verdict = "fail" if p < SIGNIFICANCE else "pass"
    return Finding("rate by position", verdict, detail, rates[worst_position], overall.value, p_value=p)


_MAX_OVERLAP: Final = 0.05  # masks overlap a little if rates differ between words or positions: other checks find that
_MAX_OVERLAP_BOOSTED: Final = 0.5  # boosted words are masked repeatedly, as claimed
_MIN_PAIRS: Final = 16
_SAFETY_FACTOR: Final = 2.0  # equal masks may be this much likelier than if all placements were equally likely


def repeat_findings(obs: Observations) -> Iterator[Finding]:
    """Yield the checks of masks that are drawn repeatedly."""
    record, settings = obs.record, obs.settings
    full_V = obs.full_V
    for name, repeats, column, reason in (
        ("repeats between epochs", settings.epochs, record.epoch_V, "there was one epoch"),
        ("repeats between workers", settings.loaders, record.worker_V, "there was at most one worker"),
        ("repeats between ranks", settings.ranks, record.rank_V, "there was one rank"),
    ):
        if repeats < 2:
            yield skipped(name, reason)
            continue
        # Group occurrences that agree in all else: in (epoch, rank, worker, round, slot) but for this column.
        parts = [record.epoch_V, record.rank_V, record.worker_V]
        rest = [part for part in parts if part is not column]
        order = np.lexsort((column, record.slot_V, record.round_V, *rest))
        groups = order[full_V[order]].reshape(-1, repeats)
        yield _pairs(obs, name, np.concatenate([groups[:, pair] for pair in itertools.combinations(range(repeats), 2)]))


def _pairs(obs: Observations, name: str, pair_P2: Int[np.ndarray, "P 2"]) -> Finding:
    first_PS, second_PS = obs.counted_VS[pair_P2[:, 0]], obs.counted_VS[pair_P2[:, 1]]
    some_P = first_PS.any(axis=1) & second_PS.any(axis=1)
    pair_P2, first_PS, second_PS = pair_P2[some_P], first_PS[some_P], second_PS[some_P]
    if len(pair_P2) < _MIN_PAIRS:
        return skipped(name, f"there are only {len(pair_P2)} pairs of full samples")
    equal = int((first_PS == second_PS).all(axis=1).sum())
    by_chance = _SAFETY_FACTOR * sum(1.0 / ways for ways in _ways(obs, pair_P2[:, 0]))
    cluster_P = obs.cluster_V[pair_P2[:, 0]]
    clusters = len(np.unique(cluster_P))
    # All pairs of a cluster may repeat for one reason, so a cluster counts once.
    fraction = clusters / len(pair_P2)
    p_equal = poisson_tail(int(np.ceil(equal * fraction)), by_chance * fraction)

    maskable_PS = obs.maskable_VS[pair_P2[:, 0]] & obs.maskable_VS[pair_P2[:, 1]]
    first_P, second_P = (first_PS & maskable_PS).sum(axis=1), (second_PS & maskable_PS).sum(axis=1)
    size_P = np.maximum(1, maskable_PS.sum(axis=1))
    expected_P = first_P * second_P / size_P
    range_P = np.minimum(first_P, second_P) - expected_P
    excess_P = (first_PS & second_PS).sum(axis=1) - expected_P
    overlap = cluster_proportion(excess_P, range_P, cluster_P)
    tolerance = _MAX_OVERLAP if obs.claims.uniform else _MAX_OVERLAP_BOOSTED
    # If everything is masked, all masks are equal.
    can_differ = len(np.unique(cluster_P[range_P >= 1.0])) >= _MIN_PAIRS
    p_overlap = p_value(overlap.value, overlap.error, 0.0, tolerance, side="above") if can_differ else 1.0
    p = min(1.0, 2.0 * min(p_equal, p_overlap))
    detail = f"{equal:,} of {len(pair_P2):,} pairs have equal masks; overlap {overlap.value:+.2%} ± {overlap.error:.2%}"
    return Finding(name, "fail" if p < SIGNIFICANCE else "pass", detail, overlap.value, 0.0, overlap.error,
                   equal, len(pair_P2), p)  # fmt: skip


def _ways(obs: Observations, occurrence_P: Int[np.ndarray, "P"]) -> Iterator[float]:
    """Yield a lower bound of the number of ways to place the runs of masked words, for each occurrence.

    A unit of the masker may be as long as a run that it masks (a line, a sentence). So only as many places are counted
    as runs of that length fit into the sample.
    """
    for occurrence in occurrence_P.tolist():
        words = obs.word_VS[occurrence]
        touched: Bool[np.ndarray, "W"] = np.zeros(int(obs.words_V[occurrence]) + 1, dtype=bool)
        touched[words[obs.counted_VS[occurrence]]] = True
        runs = int((touched[:-1] & ~touched[1:]).sum())
        yield combinations((len(touched) - 1) * runs // max(1, int(touched.sum())), runs)


_MIN_MASKED: Final = 200  # tokens, or words of one size


def replacement_findings(obs: Observations) -> Iterator[Finding]:
    """Yield the checks of replaced tokens, special tokens and labels."""
    special_VS, changed_VS = _special(obs), obs.record.shown_VS != obs.original_VS
    drawn_VS = obs.counted_VS & changed_VS & (obs.record.shown_VS != obs.tokenizer.mask_id)
    known = _known(obs)
    inside_VS = (obs.record.shown_VS >= 0) & (obs.record.shown_VS < len(known))
    invalid_VS = drawn_VS & ~(inside_VS & known[np.where(inside_VS, obs.record.shown_VS, 0)])
    specials_drawn = int((drawn_VS & special_VS).sum())
    yield from _split(obs, changed_VS, specials_drawn)
    drawn = int(drawn_VS.sum())
    yield must_be_zero("special tokens drawn", specials_drawn, drawn, "random tokens are special tokens")
    yield must_be_zero("invalid ids", int(invalid_VS.sum()), drawn, "random tokens are ids without a token")
    real_VS = obs.original_VS >= 0
    unknown_VS = obs.samples.unknown_NS[obs.record.row_V]
    special_in_VS = real_VS & ~obs.maskable_VS & ~unknown_VS
    yield must_be_zero("special tokens masked", int((obs.masked_VS & special_in_VS).sum()), int(special_in_VS.sum()),
                       "special tokens are masked")  # fmt: skip
    unknown, masked = int(unknown_VS.sum()), int((obs.masked_VS & unknown_VS).sum())
    yield (
        Finding(
            "[UNK] masked", "info", f"{masked:,} of {unknown:,} unknown tokens are masked", count=masked, of=unknown
        )
        if unknown
        else skipped("[UNK] masked", "the texts have no unknown token")
    )
    padding = int(obs.record.padding_V.sum())
    yield (
        must_be_zero("padding masked", int(obs.record.padding_masked_V.sum()), padding, "padding positions are masked")
        if padding
        else skipped("padding masked", "no batch was padded")
    )
    wrong = int((obs.masked_VS & real_VS & (obs.record.label_VS != obs.original_VS)).sum())
    yield must_be_zero("labels", wrong, int(obs.masked_VS.sum()), "labels are not the original id")
    unmasked_VS = real_VS & ~obs.masked_VS
    changed = int((unmasked_VS & changed_VS).sum())
    yield must_be_zero("unmasked changed", changed, int(unmasked_VS.sum()), "tokens that are not masked were changed")


def _special(obs: Observations) -> Bool[np.ndarray, "V S"]:
    """Return whether each output position has a special token."""
    return np.isin(obs.record.shown_VS, list(obs.tokenizer.special_ids))


def _known(obs: Observations) -> NDArray[np.bool_]:
    """Return which ids have a token."""
    known = np.zeros(obs.tokenizer.size, dtype=bool)
    known[obs.tokenizer.regular_token_ids] = True
    known[list(obs.tokenizer.special_ids)] = True
    return known


def _split(obs: Observations, changed_VS: Bool[np.ndarray, "V S"], specials_drawn: int) -> Iterator[Finding]:
    claims, counted_VS = obs.claims, obs.counted_VS
    masked_V = obs.masked_V
    names = ("masked", "random", "kept")
    if int(masked_V.sum()) < _MIN_MASKED:
        yield from (skipped(name, f"there are only {int(masked_V.sum())} masked tokens") for name in names)
        return
    pool, mask_drawn = len(obs.tokenizer.regular_token_ids), 0
    if specials_drawn:
        pool, mask_drawn = pool + len(obs.tokenizer.special_ids), 1
    mask_token_VS = obs.record.shown_VS == obs.tokenizer.mask_id
    expected = (
        claims.mask + claims.random * mask_drawn / pool,
        claims.random * (1.0 - (1 + mask_drawn) / pool),
        claims.keep + claims.random / pool,
    )
    outcomes = (counted_VS & mask_token_VS, counted_VS & changed_VS & ~mask_token_VS, counted_VS & ~changed_VS)
    for name, expected_value, outcome_VS in zip(names, expected, outcomes, strict=True):
        part = cluster_proportion(outcome_VS.sum(axis=1), masked_V, obs.cluster_V)
        p = p_value(part.value, part.error, expected_value)
        detail = f"{part.value:.3%} ± {part.error:.3%} of {part.of:,} masked tokens, {expected_value:.3%} expected"
        yield Finding(name, "fail" if p < SIGNIFICANCE else "pass", detail, part.value, expected_value, part.error,
                      part.hits, part.of, p)  # fmt: skip


_SIZES: Final = ((1, 1), (2, 3), (4, 7), (8, 10_000))
_MAX_TOGETHER: Final = 0.02  # fraction of neighbors that another rule of words may take for one word


def word_findings(obs: Observations) -> Iterator[Finding]:
    """Yield the checks of whole words."""
    most = int(obs.words_V.max(initial=0)) + 1
    occurrences, positions = np.nonzero(obs.maskable_VS)
    key = occurrences * most + obs.word_VS[occurrences, positions]
    shape = (len(obs.words_V), most)
    size_VW = np.bincount(key, minlength=shape[0] * most).reshape(shape)
    masked_VW = np.bincount(key, weights=obs.counted_VS[occurrences, positions], minlength=shape[0] * most).reshape(
        shape
    )
    hit_VW = masked_VW > 0
    multi_VW = hit_VW & (size_VW > 1)
    partial_VW = multi_VW & (masked_VW < size_VW)
    num_partial, num_multi = int(partial_VW.sum()), int(multi_VW.sum())
    is_claimed = obs.claims.units != "tokens"
    name = "partial words"
    detail = f"{num_partial:,} of {num_multi:,} masked words of several tokens are masked only in part"
    if not num_multi:
        yield skipped(name, "no word of several tokens was masked")
    elif is_claimed:
        yield Finding(
            name, "fail" if num_partial else "pass", detail, num_partial / num_multi, 0.0, 0.0, num_partial, num_multi
        )
    else:
        yield Finding(name, "info", detail, num_partial / num_multi, count=num_partial, of=num_multi)

    yield _by_size(obs)

    both_V = (hit_VW[:, :-1] & hit_VW[:, 1:]).sum(axis=1)
    before_V = (hit_VW[:, :-1] & (size_VW[:, 1:] > 0)).sum(axis=1)
    after = cluster_proportion(both_V, before_V, obs.cluster_V)
    rate = float(hit_VW.sum()) / max(1, int((size_VW > 0).sum()))
    if not after.of or rate >= 1.0:
        yield skipped("words together", "no masked word has a word after it")
        return
    excess = max(0.0, (after.value - rate) / (1.0 - rate))
    error = after.error / (1.0 - rate)
    detail = (
        f"after a masked word {after.value:.2%} of the words are masked, of all {rate:.2%}: {excess:.2%} go together"
    )
    if obs.claims.units != "words":
        yield Finding("words together", "info", detail, excess, standard_error=error, count=after.hits, of=after.of)
        return
    p = p_value(excess, error, 0.0, _MAX_TOGETHER, side="above")
    yield Finding("words together", "fail" if p < SIGNIFICANCE else "pass", detail, excess, 0.0, error,
                  after.hits, after.of, p)  # fmt: skip


def _by_size(obs: Observations) -> Finding:
    """Compare the rate in words of several sizes with that of all tokens of the same samples.

    If every word of a sample has the same chance, the expected number of masked tokens in words of one size is the
    fraction of such tokens times the number of masked tokens, whatever the chance is and however words are drawn.
    """
    share_V = obs.masked_V / np.maximum(obs.maskable_V, 1)
    parts, tested = list[str](), list[Finding]()
    for first, last in _SIZES:
        selected_VS = (obs.size_VS >= first) & (obs.size_VS <= last) & obs.long_V[:, None]
        of_V, hits_V = selected_VS.sum(axis=1), (obs.counted_VS & selected_VS).sum(axis=1)
        of, words = int(of_V.sum()), float((obs.counted_VS[selected_VS] / obs.size_VS[selected_VS]).sum())
        if not of:
            continue
        measured, expected = float(hits_V.sum()) / of, float((share_V * of_V).sum()) / of
        label = f"{first}" if first == last else f"{first}-{last}" if last < 100 else f"{first} or more"
        parts.append(f"{label}: {measured:.2%}")
        if words < _MIN_MASKED or len(np.unique(obs.cluster_V[of_V > 0])) < _MIN_CLUSTERS:
            parts[-1] += " (not checked)"
            continue
        error = cluster_proportion(hits_V - share_V * of_V, of_V, obs.cluster_V).error
        p = p_value(measured - expected, error, 0.0, 1e-9)
        tested.append(Finding("rate by word", "pass", "", measured, expected, error, int(hits_V.sum()), of, p))
    detail = "by tokens of the word: " + ", ".join(parts)
    if not obs.claims.uniform:
        return Finding("rate by word", "info", detail)
    if not tested:
        return skipped("rate by word", f"there are fewer than {_MIN_MASKED} masked words of any size")
    worst = min(tested, key=lambda finding: finding.p_value or 0.0)
    p = min(1.0, (worst.p_value or 0.0) * len(tested))
    return replace(worst, verdict="fail" if p < SIGNIFICANCE else "pass", detail=detail, p_value=p)
