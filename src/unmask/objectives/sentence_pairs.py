"""Room card: BERT's two tasks at once: masked tokens, and a question about each text's two segments.

Comes in: a Batch of pairs with their labels. Goes out: a Puzzle that asks both, then a Loss of two terms, each a sum
with a count of its own, from one forward of the encoder. Called by: the loop through the Objective contract.

The question is next sentence prediction (arXiv 1810.04805, section 3.1) or the order of two segments (ALBERT, arXiv
1909.11942, section 3.1): which of the two is up to the sampler (text/pairs). It is put to the corrupted text, as in
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
from unmask.core.types import Batch, LossSums, MaskedBatch
from unmask.objectives.masking import MaskingConfig
from unmask.objectives.mlm import MaskedLMObjective

PairTask = Literal["next-sentence", "sentence-order"]


@dataclass(frozen=True)
class BertPretrainingConfig(MaskingConfig):
    """Masked language modelling and a question about two segments, trained jointly."""

    kind: Literal["mlm+pairs"] = "mlm+pairs"
    pair_task: PairTask = "next-sentence"
    pair_loss_weight: float = 1.0  # of the question's loss, beside 1 for the masked tokens
    short_seq_prob: float = 0.1  # share of the pairs that are cut to a random length, so that later use may be short

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.pair_loss_weight < float("inf"):
            raise RecipeError(
                f"pair_loss_weight = {self.pair_loss_weight}",
                hint="give a number above 0; without pairs, set kind = mlm",
            )
        if not 0.0 <= self.short_seq_prob <= 1.0:
            raise RecipeError(
                f"short_seq_prob = {self.short_seq_prob} is no share of the pairs", hint="choose 0 to 1; BERT's is 0.1"
            )

    @property
    def masked_fraction(self) -> float:
        """Share of the tokens that is asked about, by which costs are forecast."""
        return self.mean_rate


class BertPretrainingObjective:
    """The objective: what Mlm asks, and one question of each text that has a label."""

    metrics: Sequence[str] = (*MaskedLMObjective.metrics, "pair_loss", "pair_accuracy")
    fills = True

    def __init__(self, settings: BertPretrainingConfig, mlm: MaskedLMObjective, head: nn.Module) -> None:
        """`head` gives two logits for each text: `head(hidden_TD, batch)`."""
        self.loss_weights: Mapping[str, float] = {**mlm.loss_weights, "pair": settings.pair_loss_weight}
        self.sampler: str = settings.pair_task
        self.modules = head
        self._mlm = mlm

    def corrupt(self, batch: Batch, seed: int) -> MaskedBatch:
        """Hide tokens as Mlm does; the labels are the batch's own."""
        masked = self._mlm.corrupt(batch, seed)
        return replace(
            masked,
            denominators={**masked.denominators, "pair": 0 if batch.pair_labels_B is None else batch.num_samples},
        )

    def loss(self, encoder: nn.Module, head: nn.Module, masked: MaskedBatch) -> LossSums:
        """Sums of both cross-entropies, in nats."""
        hidden_TD: Tensor = encoder(masked.batch)
        mlm = self._mlm.loss(_Encoded(hidden_TD, encoder), head, masked)
        nats, right = pair_loss(self.modules, hidden_TD, masked.batch)
        asked = masked.denominators["pair"]
        return LossSums(
            sums={**mlm.sums, "pair": nats},
            metrics={**mlm.metrics, "pair_loss": (nats.detach(), asked), "pair_accuracy": (right, asked)},
        )


def pair_loss(parts: nn.Module, hidden_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The cross-entropy of a batch's labels, summed, and how many were right; 0 and 0 where it has none."""
    logits_B2: Tensor = parts(hidden_TD, batch).float()
    if batch.pair_labels_B is None:
        return logits_B2.sum() * 0.0, torch.zeros(
            (), device=logits_B2.device
        )  # every weight gets a gradient all the same
    pair_labels_B = batch.pair_labels_B[: batch.num_samples]
    right = (logits_B2.detach().argmax(-1) == pair_labels_B).sum()
    return F.cross_entropy(logits_B2, pair_labels_B, reduction="sum"), right


class _Encoded(nn.Module):
    """An encoder that has read its batch already: both questions take one forward."""

    def __init__(self, hidden_TD: Tensor, encoder: nn.Module) -> None:
        super().__init__()
        self._hidden_TD = hidden_TD
        self._table = (cast("nn.Parameter", encoder.token_embedding),)  # in a tuple: a parameter of the encoder alone

    @property
    def token_embedding(self) -> nn.Parameter:
        """The encoder's own."""
        return self._table[0]

    def forward(self, batch: Batch) -> Tensor:
        """What the encoder said."""
        return self._hidden_TD
