"""Room card: inputs and outputs side by side.

Comes in: material and visits. Goes out: Scene: what was there, what is seen, what is asked, slot by slot, as the
judging modules read it. Called by: judge, which hands it to rates, replacement, wholeness and repeats.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from unmask.audit.bounds import Share, clustered
from unmask.audit.material import Material
from unmask.audit.play import Visits
from unmask.audit.settings import AuditSettings, Claims
from unmask.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Scene:
    """Everything that an audit may look at."""

    material: Material
    visits: Visits
    tokenizer: Tokenizer
    claims: Claims
    settings: AuditSettings

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
