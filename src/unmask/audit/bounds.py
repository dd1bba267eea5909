"""Room card: how likely is that by chance?

Comes in: counts, and which of them were drawn together. Goes out: a share with its standard error; the chance of a
deviation as large under the promise. Called by: the judging modules of audit.

Draws of one sample are not independent (a quota, whole words, spans), and a masker that repeats itself draws the same
again in another epoch, worker or rank. So what is counted is summed over all that might have been drawn together (a
cluster: one place of the order in every epoch, worker and rank), and the error comes from how far these sums scatter.
That holds whatever the masker does inside a cluster.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int, Num

Side = Literal["both", "above"]


class Share(NamedTuple):
    """Hits among so many, with one standard error."""

    share: float
    error: float
    hits: int
    of: int


def clustered(hits_V: Num[np.ndarray, "V"], of_V: Num[np.ndarray, "V"], cluster_V: Int[np.ndarray, "V"]) -> Share:
    """The share of all hits, its error from the scatter of clusters (the ratio estimator of survey sampling)."""
    hits_C = np.bincount(cluster_V, weights=hits_V)
    of_C = np.bincount(cluster_V, weights=of_V)
    total = float(of_C.sum())
    if not total:
        return Share(0.0, 0.0, 0, 0)
    share = float(hits_C.sum()) / total
    held = of_C > 0
    clusters = int(held.sum())
    scatter = float(np.square(hits_C[held] - share * of_C[held]).sum())
    error = math.sqrt(scatter * clusters / max(1, clusters - 1)) / total
    return Share(share, error, int(hits_C.sum()), int(total))


def chance_of(share: float, error: float, expected: float, tolerance: float = 0.0, side: Side = "both") -> float:
    """The chance of a share at least so far beyond the tolerance, by the normal distribution."""
    beyond = (share - expected if side == "above" else abs(share - expected)) - tolerance
    if beyond <= 1e-12:
        return 1.0
    if expected in (0.0, 1.0) and not tolerance:  # what has no chance at all
        return 0.0
    if not error:
        return 0.0
    tail = math.erfc(beyond / error / math.sqrt(2.0))
    return tail if side == "both" else tail / 2.0


def poisson_tail(count: int, mean: float) -> float:
    """The chance of `count` or more where `mean` are expected."""
    if count <= 0:
        return 1.0
    if mean <= 0.0:
        return 0.0
    if count <= mean:
        return 1.0
    term = math.exp(-mean + count * math.log(mean) - math.lgamma(count + 1))
    total, k = term, count
    while term > total * 1e-12 and k < count + 10_000:
        k += 1
        term *= mean / k
        total += term
    return min(1.0, total)


def combinations(of: int, choose: int) -> float:
    """How many ways there are to choose; infinity where a float can't hold it."""
    if not 0 <= choose <= of:
        return 1.0
    logarithm = math.lgamma(of + 1) - math.lgamma(choose + 1) - math.lgamma(of - choose + 1)
    return math.exp(logarithm) if logarithm < 700.0 else math.inf
