"""Room card: BERT's two tasks at once: masked tokens, and a question about each text's two segments.

Comes in: a Batch of pairs with their labels. Goes out: a Puzzle that asks both, then a Loss of two terms, each a sum
with a count of its own, from one forward of the encoder. Called by: the loop through the Objective contract.

The question is next sentence prediction (arXiv 1810.04805, section 3.1) or the order of two segments (ALBERT, arXiv
1909.11942, section 3.1): which of the two is up to the cutter (text/pairs). It is put to the corrupted text, as in
BERT, and answered from [CLS] by the head that transformers calls pooler and seq_relationship.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.core.errors import RecipeError
from unmask.core.types import Batch, Loss, Puzzle
from unmask.objectives.masking import MaskingSettings
from unmask.objectives.mlm import Mlm

PairTask = Literal["next-sentence", "sentence-order"]


@dataclass(frozen=True)
class BertSettings(MaskingSettings):
    """Masked language modelling and a question about two segments, trained jointly."""

    kind: Literal["bert"] = "bert"
    pair: PairTask = "next-sentence"
    pair_weight: float = 1.0  # of the question's loss, beside 1 for the masked tokens
    short: float = 0.1  # share of the pairs that are cut to a random length, so that later use may be short

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.pair_weight < float("inf"):
            raise RecipeError(
                f"pair_weight = {self.pair_weight}", next="give a number above 0; without pairs, set kind = mlm"
            )
        if not 0.0 <= self.short <= 1.0:
            raise RecipeError(f"short = {self.short} is no share of the pairs", next="choose 0 to 1; BERT's is 0.1")

    @property
    def asked_share(self) -> float:
        """Share of the tokens that is asked about, by which costs are forecast."""
        return self.mean_rate


class MlmWithPairs:
    """The objective: what Mlm asks, and one question of each text that has a label."""

    metrics: Sequence[str] = (*Mlm.metrics, "pair_loss", "pair_accuracy")
    fills = True

    def __init__(self, settings: BertSettings, mlm: Mlm, head: nn.Module) -> None:
        """`head` gives two logits for each text: `head(hidden_TD, batch)`."""
        self.terms: Mapping[str, float] = {**mlm.terms, "pair": settings.pair_weight}
        self.cutter: str = settings.pair
        self.parts = head
        self._mlm = mlm

    def corrupt(self, batch: Batch, seed: int) -> Puzzle:
        """Hide tokens as Mlm does; the labels are the batch's own."""
        puzzle = self._mlm.corrupt(batch, seed)
        return replace(puzzle, counts={**puzzle.counts, "pair": 0 if batch.label_B is None else batch.texts})

    def loss(self, encoder: nn.Module, head: nn.Module, puzzle: Puzzle) -> Loss:
        """Sums of both cross-entropies, in nats."""
        hidden_TD: Tensor = encoder(puzzle.batch)
        mlm = self._mlm.loss(_Encoded(hidden_TD, encoder), head, puzzle)
        nats, right = pair_loss(self.parts, hidden_TD, puzzle.batch)
        asked = puzzle.counts["pair"]
        return Loss(
            sums={**mlm.sums, "pair": nats},
            seen={**mlm.seen, "pair_loss": (nats.detach(), asked), "pair_accuracy": (right, asked)},
        )


def pair_loss(parts: nn.Module, hidden_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The cross-entropy of a batch's labels, summed, and how many were right; 0 and 0 where it has none."""
    logits_B2: Tensor = parts(hidden_TD, batch).float()
    if batch.label_B is None:
        return logits_B2.sum() * 0.0, torch.zeros(
            (), device=logits_B2.device
        )  # every weight gets a gradient all the same
    label_B = batch.label_B[: batch.texts]
    right = (logits_B2.detach().argmax(-1) == label_B).sum()
    return F.cross_entropy(logits_B2, label_B, reduction="sum"), right


class _Encoded(nn.Module):
    """An encoder that has read its batch already: both questions take one forward."""

    def __init__(self, hidden_TD: Tensor, encoder: nn.Module) -> None:
        super().__init__()
        self._hidden_TD = hidden_TD
        self._table = (cast("nn.Parameter", encoder.token_table),)  # in a tuple: a parameter of the encoder alone

    @property
    def token_table(self) -> nn.Parameter:
        """The encoder's own."""
        return self._table[0]

    def forward(self, batch: Batch) -> Tensor:
        """What the encoder said."""
        return self._hidden_TD
