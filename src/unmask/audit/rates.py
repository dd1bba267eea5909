"""Room card: how many are asked, where, and of which samples.

Comes in: a Scene. Goes out: findings: rate, nothing asked, rate by length, rate by position. Called by: judge.

Whole words can't meet a number of tokens exactly: where a masker claims them, it may miss by half a word a sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Final

import numpy as np

from unmask.audit.bounds import chance_of, clustered, poisson_tail
from unmask.audit.report import CHANCE, Finding, untested
from unmask.audit.scene import Scene

_BINS: Final = 4  # of length
_EDGE: Final = 2  # slots at each end that are told by themselves
_FEWEST: Final = 50  # clusters in which the normal distribution is trusted
_POSITION_TOLERANCE: Final = 0.05  # of the rate, where words are hidden whole: their sizes don't explain all


def rate_findings(scene: Scene) -> Iterator[Finding]:
    """What the rates tell."""
    yield _rate(scene)
    yield _nothing(scene)
    yield _by_length(scene)
    yield _by_position(scene)


def _rate(scene: Scene) -> Finding:
    share, expected = scene.rate, scene.claims.rate
    if not share.of:
        return untested("rate", f"no sample is long enough for a rate of {expected:g}")
    mean = share.of / int(scene.long_V.sum())
    chance = chance_of(share.share, share.error, expected, scene.slack / mean)
    says = f"{share.share:.3%} ± {share.error:.3%} of {share.of:,} tokens are asked, {expected:.4g} promised"
    return Finding("rate", "found" if chance < CHANCE else "well", says, share.share, expected, share.error,
                   share.hits, share.of, chance)  # fmt: skip


def _nothing(scene: Scene) -> Finding:
    """Samples that teach nothing; independent draws leave some, which short samples explain."""
    some_V = scene.askable_V > 0
    empty = int((some_V & (scene.asked_V == 0)).sum())
    draws_V = scene.askable_V if scene.claims.units == "tokens" else scene.words_V
    rate = min(scene.claims.rate, max(scene.rate.share, 1e-9))
    alone_V = np.where(some_V, (1.0 - rate) ** draws_V, 0.0)
    lanes = scene.settings.lanes * scene.settings.ranks * scene.settings.epochs
    # What repeats itself leaves the same samples empty again, so only one of its visits counts.
    chance = poisson_tail(empty // lanes, float(alone_V.sum()) / lanes)
    explained = float(alone_V.sum())
    says = f"{empty:,} of {int(some_V.sum()):,} samples have nothing asked; independent draws leave {explained:,.1f}"
    return Finding("nothing asked", "found" if chance < CHANCE else "well", says, float(empty), explained, None,
                   empty, int(some_V.sum()), chance)  # fmt: skip


def _by_length(scene: Scene) -> Finding:
    long = scene.askable_V[scene.long_V]
    if not len(long) or not scene.rate.hits:
        return untested("rate by length", "no sample is long enough")
    edges = np.unique(np.quantile(long[~scene.full_V[scene.long_V]], np.linspace(0, 1, _BINS + 1)).astype(np.int64))
    worst, said = 1.0, list[str]()
    for first, last in itertools.pairwise(edges.tolist()):
        held_V = scene.long_V & (scene.askable_V >= first) & (scene.askable_V < last) & ~scene.full_V
        share = scene.rate_over(held_V)
        if len(np.unique(scene.cluster_V[held_V])) < _FEWEST:
            continue
        mean = share.of / int(held_V.sum())
        slack = scene.slack * (1.0 / mean + scene.long_V.sum() / scene.rate.of)
        chance = chance_of(share.share, float(np.hypot(share.error, scene.rate.error)), scene.rate.share, slack)
        worst = min(worst, chance)
        said.append(f"{first}-{last - 1}: {share.share:.2%}")
    short_V = ~scene.long_V & (scene.askable_V > 0)
    if short_V.any():
        said.insert(0, f"under {edges[0]}: {scene.rate_over(short_V).share:.2%} (not judged)")
    chance = min(1.0, worst * max(1, len(said)))
    return Finding("rate by length", "found" if chance < CHANCE else "well", "tokens of a sample " + ", ".join(said),
                   chance=chance)  # fmt: skip


def _by_position(scene: Scene) -> Finding:
    """The rate at each slot of full samples against the rate of all; the first and last slots are told.

    A word that the edge of a sample cuts is short, and short words fit more often: where whole words are hidden, what
    is expected at a slot is the rate of words as long as those that stand there.
    """
    full_V = scene.full_V
    if len(np.unique(scene.cluster_V[full_V])) < _FEWEST or not scene.rate.hits:
        return untested("rate by position", "too few full samples")
    fair_VS, askable_VS, cluster_V = scene.fair_VS[full_V], scene.askable_VS[full_V], scene.cluster_V[full_V]
    overall = scene.rate_over(full_V)
    expected_VS = np.full(fair_VS.shape, overall.share)
    tolerance = 0.0
    if scene.claims.units != "tokens":
        size_VS = scene.size_VS[full_V]
        expected_VS = scene.rate_of_size(full_V)[size_VS]
        tolerance = _POSITION_TOLERANCE * overall.share
    slots = np.flatnonzero(askable_VS.any(axis=0))
    at: dict[int, float] = {}
    worst, worst_slot = 1.0, int(slots[0])
    for slot in slots.tolist():
        expected_V = expected_VS[:, slot] * askable_VS[:, slot]
        beyond = clustered(fair_VS[:, slot] - expected_V, askable_VS[:, slot], cluster_V)
        at[slot] = beyond.share + float(expected_V.sum()) / beyond.of
        chance = chance_of(beyond.share, max(beyond.error, 1.0 / beyond.of), 0.0, tolerance or 1e-9)
        if chance < worst:
            worst, worst_slot = chance, slot
    chance = min(1.0, worst * len(slots))
    told = [*slots[:_EDGE].tolist(), *slots[-_EDGE:].tolist()]
    says = ", ".join(f"slot {slot}: {at[slot]:.2%}" for slot in told)
    says = f"{says}; of all {overall.share:.2%}; least likely: slot {worst_slot}, {at[worst_slot]:.2%}"
    if scene.claims.units == "spans":  # an edge is reached from one side only
        return Finding("rate by position", "noted", says)
    verdict = "found" if chance < CHANCE else "well"
    return Finding("rate by position", verdict, says, at[worst_slot], overall.share, chance=chance)
