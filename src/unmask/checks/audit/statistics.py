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
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from unmask.checks.audit.replay import MaskingRecord
from unmask.checks.audit.samples import AuditSamples
from unmask.checks.audit.settings import AuditConfig, Claims
from unmask.tokenization.tokenizer import Tokenizer

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


@dataclass(frozen=True)
class Observations:
    """Everything that an audit may look at."""

    material: AuditSamples
    visits: MaskingRecord
    tokenizer: Tokenizer
    claims: Claims
    settings: AuditConfig

    @cached_property
    def original_VS(self) -> Int[np.ndarray, "V S"]:
        """The ids that went in; -1 beyond a sample's end."""
        return self.material.ids_NS[self.visits.row_V]

    @cached_property
    def askable_VS(self) -> Bool[np.ndarray, "V S"]:
        """Whether each slot holds an ordinary piece."""
        return self.material.askable_NS[self.visits.row_V]

    @cached_property
    def word_VS(self) -> Int[np.ndarray, "V S"]:
        """The word of each slot, numbered within its sample; -1 for what can't be asked."""
        return self.material.word_NS[self.visits.row_V]

    @cached_property
    def full_V(self) -> Bool[np.ndarray, "V"]:
        """Whether a sample fills all slots."""
        return self.material.full_N[self.visits.row_V]

    @cached_property
    def asked_VS(self) -> Bool[np.ndarray, "V S"]:
        """Whether each slot is asked about."""
        return self.visits.asked_VS

    @cached_property
    def fair_VS(self) -> Bool[np.ndarray, "V S"]:
        """Asked about, and an ordinary piece: what rates and splits are counted over."""
        return self.asked_VS & self.askable_VS

    @cached_property
    def cluster_V(self) -> Int[np.ndarray, "V"]:
        """What might have been drawn together has one number."""
        return self.visits.cluster_V(self.settings)

    @cached_property
    def askable_V(self) -> Int[np.ndarray, "V"]:
        """Ordinary pieces of each sample."""
        return self.askable_VS.sum(axis=1)

    @cached_property
    def asked_V(self) -> Int[np.ndarray, "V"]:
        """Ordinary pieces that are asked, of each sample."""
        return self.fair_VS.sum(axis=1)

    @cached_property
    def words_V(self) -> Int[np.ndarray, "V"]:
        """Words of each sample."""
        return self.word_VS.max(axis=1) + 1

    @cached_property
    def long_V(self) -> Bool[np.ndarray, "V"]:
        """Samples long enough that the promised rate asks one piece or more, so that "at least one" changes nothing."""
        return self.askable_V * self.claims.rate >= 1.0

    @cached_property
    def rate(self) -> Share:
        """The realised rate over samples that are long enough."""
        return self.rate_over(self.long_V)

    @cached_property
    def slack(self) -> float:
        """Tokens of a sample by which whole words may miss their number: half a word."""
        if self.claims.units == "tokens":
            return 0.0
        return 0.5 * float(self.askable_V.sum()) / max(1, int(self.words_V.sum()))

    def rate_over(self, held_V: Bool[np.ndarray, "V"]) -> Share:
        """The realised rate over some of the visits."""
        return clustered(self.asked_V[held_V], self.askable_V[held_V], self.cluster_V[held_V])

    @cached_property
    def size_VS(self) -> Int[np.ndarray, "V S"]:
        """Tokens of the word that each slot belongs to; 0 for what can't be asked."""
        most = int(self.words_V.max(initial=0)) + 1
        visits, slots = np.nonzero(self.askable_VS)
        key = visits * most + self.word_VS[visits, slots]
        size_VS = np.zeros(self.askable_VS.shape, dtype=np.int64)
        size_VS[visits, slots] = np.bincount(key)[key]
        return size_VS

    def rate_of_size(self, held_V: Bool[np.ndarray, "V"]) -> Float[np.ndarray, "N"]:
        """The realised rate of tokens in words of each size, over some of the visits; 0 where there is no such word."""
        size_VS, most = self.size_VS[held_V], int(self.size_VS.max(initial=0)) + 1
        of = np.bincount(size_VS.ravel(), minlength=most)
        hits = np.bincount(size_VS.ravel(), weights=self.fair_VS[held_V].ravel(), minlength=most)
        return np.where(of > 0, hits / np.maximum(of, 1), 0.0)
