"""Statistics of an audit: proportions with standard errors, p-values, and the observations that they come from.

Draws for one sample are not independent (quotas, whole words, spans), and a masker that repeats itself draws the same
in another epoch, worker or rank. So counts are summed over everything that may have been drawn together: a cluster is
one slot of one batch, in all epochs, workers and ranks. The standard error comes from the scatter of these sums. It is
valid whatever the masker does within a cluster.

Suffixes of arrays: V occurrences (a sample in one epoch), N samples, S positions, C clusters, P pairs, W words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Num

from unmask.checks.audit.replay import MaskingRecord
from unmask.checks.audit.samples import AuditSamples
from unmask.checks.audit.settings import AuditConfig, Claims
from unmask.tokenization.tokenizer import Tokenizer

Side = Literal["both", "above"]


class Proportion(NamedTuple):
    """A proportion with its standard error."""

    value: float
    error: float
    hits: int
    of: int


def cluster_proportion(
    hits_V: Num[np.ndarray, "V"], of_V: Num[np.ndarray, "V"], cluster_V: Int[np.ndarray, "V"]
) -> Proportion:
    """Return hits / of; the error is that of the ratio estimator of survey sampling, from the scatter of clusters."""
    hits_C = np.bincount(cluster_V, weights=hits_V)
    of_C = np.bincount(cluster_V, weights=of_V)
    total = float(of_C.sum())
    if not total:
        return Proportion(0.0, 0.0, 0, 0)
    value = float(hits_C.sum()) / total
    used = of_C > 0
    clusters = int(used.sum())
    scatter = float(np.square(hits_C[used] - value * of_C[used]).sum())
    error = math.sqrt(scatter * clusters / max(1, clusters - 1)) / total
    return Proportion(value, error, int(hits_C.sum()), int(total))


def p_value(value: float, error: float, expected: float, tolerance: float = 0.0, side: Side = "both") -> float:
    """Return the probability of a value at least as far beyond the tolerance, by the normal distribution."""
    beyond = (value - expected if side == "above" else abs(value - expected)) - tolerance
    if beyond <= 1e-12:
        return 1.0
    if expected in (0.0, 1.0) and not tolerance:  # a single case contradicts the claim
        return 0.0
    if not error:
        return 0.0
    tail = math.erfc(beyond / error / math.sqrt(2.0))
    return tail if side == "both" else tail / 2.0


def poisson_tail(count: int, mean: float) -> float:
    """Return the probability of `count` or more in a Poisson distribution."""
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


def chernoff_bound(measured: float, expected: float, draws: float) -> float:
    """Return a bound of the probability that a fraction of independent draws is at least as far from its mean.

    It is 2·exp(-draws · KL(measured ‖ expected)) and holds for any number of draws (Chernoff 1952, Hoeffding 1963).
    """
    divergence = 0.0
    for part, mean in ((measured, expected), (1.0 - measured, 1.0 - expected)):
        if part > 1e-12:
            divergence += part * math.log(part / mean) if mean > 0.0 else math.inf
    return min(1.0, 2.0 * math.exp(-draws * max(divergence, 0.0)))


def combinations(of: int, choose: int) -> float:
    """Return the binomial coefficient; infinity if it is too large for a float."""
    if not 0 <= choose <= of:
        return 1.0
    logarithm = math.lgamma(of + 1) - math.lgamma(choose + 1) - math.lgamma(of - choose + 1)
    return math.exp(logarithm) if logarithm < 700.0 else math.inf


@dataclass(frozen=True)
class Observations:
    """Everything that the checks of an audit read."""

    samples: AuditSamples
    record: MaskingRecord
    tokenizer: Tokenizer
    claims: Claims
    settings: AuditConfig

    @cached_property
    def original_VS(self) -> Int[np.ndarray, "V S"]:
        """The ids that the masker got; -1 beyond the end of a sample."""
        return self.samples.ids_NS[self.record.row_V]

    @cached_property
    def maskable_VS(self) -> Bool[np.ndarray, "V S"]:
        """Whether each position has a regular token."""
        return self.samples.maskable_NS[self.record.row_V]

    @cached_property
    def word_VS(self) -> Int[np.ndarray, "V S"]:
        """The number of each position's word within its sample; -1 for special tokens."""
        return self.samples.word_NS[self.record.row_V]

    @cached_property
    def full_V(self) -> Bool[np.ndarray, "V"]:
        """Whether a sample has the full length."""
        return self.samples.full_N[self.record.row_V]

    @cached_property
    def masked_VS(self) -> Bool[np.ndarray, "V S"]:
        """Whether each position has a label."""
        return self.record.masked_VS

    @cached_property
    def counted_VS(self) -> Bool[np.ndarray, "V S"]:
        """Whether each position has a label and a regular token: rates and splits are computed from these."""
        return self.masked_VS & self.maskable_VS

    @cached_property
    def cluster_V(self) -> Int[np.ndarray, "V"]:
        """The cluster of each occurrence."""
        return self.record.cluster_V(self.settings)

    @cached_property
    def maskable_V(self) -> Int[np.ndarray, "V"]:
        """Number of regular tokens of each sample."""
        return self.maskable_VS.sum(axis=1)

    @cached_property
    def masked_V(self) -> Int[np.ndarray, "V"]:
        """Number of masked regular tokens of each sample."""
        return self.counted_VS.sum(axis=1)

    @cached_property
    def words_V(self) -> Int[np.ndarray, "V"]:
        """Number of words of each sample."""
        return self.word_VS.max(axis=1) + 1

    @cached_property
    def long_V(self) -> Bool[np.ndarray, "V"]:
        """Whether the claimed rate masks at least one token or word of a sample: "at least one" then has no effect."""
        return (self.maskable_V if self.claims.units == "tokens" else self.words_V) * self.claims.rate >= 1.0

    @cached_property
    def rate(self) -> Proportion:
        """The measured rate over samples that are long enough."""
        return self.rate_over(self.long_V)

    def rate_over(self, selected_V: Bool[np.ndarray, "V"]) -> Proportion:
        """Return the measured rate over some occurrences."""
        return cluster_proportion(self.masked_V[selected_V], self.maskable_V[selected_V], self.cluster_V[selected_V])

    @cached_property
    def size_VS(self) -> Int[np.ndarray, "V S"]:
        """Number of tokens of each position's word; 0 for special tokens."""
        most = int(self.words_V.max(initial=0)) + 1
        occurrences, positions = np.nonzero(self.maskable_VS)
        key = occurrences * most + self.word_VS[occurrences, positions]
        size_VS = np.zeros(self.maskable_VS.shape, dtype=np.int64)
        size_VS[occurrences, positions] = np.bincount(key)[key]
        return size_VS
