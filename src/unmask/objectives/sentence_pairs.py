"""BERT's pretraining objective: masked language modeling and sentence pair classification.

The pair task is next sentence prediction (arXiv 1810.04805, section 3.1) or sentence order prediction (ALBERT, arXiv
1909.11942, section 3.1). As in BERT, pairs are classified from the [CLS] vector of the corrupted input. The two tasks
have the same loss and differ only in how pairs are sampled (data/sentence_pairs.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.core.config import require
from unmask.core.types import Batch, LossSums, MaskedBatch
from unmask.objectives.masking import MaskingConfig
from unmask.objectives.mlm import MaskedLMObjective

PairTask = Literal["next-sentence", "sentence-order"]


@dataclass(frozen=True)
class BertPretrainingConfig(MaskingConfig):
    """Masked language modeling and sentence pair classification, trained jointly."""

    kind: Literal["mlm+pairs"] = "mlm+pairs"  # Masked language modeling and sentence pairs.
    # Task; next-sentence: BERT, arXiv 1810.04805, section 3.1. sentence-order: ALBERT, arXiv 1909.11942, section 3.1.
    pair_task: PairTask = "next-sentence"
    pair_loss_weight: float = 1.0  # Weight of the pair loss; the weight of the MLM loss is 1.
    # [fraction of pairs] Pairs that are cut to a random length, as training on short input.
    short_seq_prob: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            "pair_loss_weight",
            above=0,
            below=math.inf,
            hint="choose a number above 0, or set objective.kind=mlm to train without pairs",
        )
        require(self, "short_seq_prob", min=0, max=1, hint="choose a number from 0 to 1; BERT's is 0.1")


class BertPretrainingObjective:
    """Masked language modeling as in MaskedLMObjective, and classification of samples with pair labels."""

    metrics: Sequence[str] = (*MaskedLMObjective.metrics, "pair_loss", "pair_accuracy")

    def __init__(self, settings: BertPretrainingConfig, mlm: MaskedLMObjective, head: nn.Module) -> None:
        """`head` returns two logits for each sample: `head(hidden_TD, batch)`."""
        self.loss_weights: Mapping[str, float] = {**mlm.loss_weights, "pair": settings.pair_loss_weight}
        self.sampler: str = settings.pair_task
        self.modules = head
        self._mlm = mlm

    def corrupt(self, batch: Batch, seed: int) -> MaskedBatch:
        """Return the masked batch of MaskedLMObjective, with the number of pairs as a second denominator."""
        masked = self._mlm.corrupt(batch, seed)
        return replace(
            masked,
            denominators={**masked.denominators, "pair": 0 if batch.pair_labels_B is None else batch.num_samples},
        )

    def loss(self, encoder: nn.Module, head: nn.Module, masked: MaskedBatch) -> LossSums:
        """Return the sums of both cross-entropies, in nats."""
        hidden_TD: Tensor = encoder(masked.batch)
        mlm = self._mlm.loss(_PrecomputedEncoder(hidden_TD, encoder), head, masked)
        nats, correct = pair_loss(self.modules, hidden_TD, masked.batch)
        count = masked.denominators["pair"]
        return LossSums(
            sums={**mlm.sums, "pair": nats},
            metrics={**mlm.metrics, "pair_loss": (nats.detach(), count), "pair_accuracy": (correct, count)},
        )


def pair_loss(pair_head: nn.Module, hidden_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of the pair labels and the number of correct predictions; 0 without labels."""
    logits_B2: Tensor = pair_head(hidden_TD, batch).float()
    if batch.pair_labels_B is None:
        no_loss = logits_B2.sum() * 0.0  # gives every weight a gradient of 0
        return no_loss, torch.zeros((), device=logits_B2.device)
    correct = (logits_B2.detach().argmax(-1) == batch.pair_labels_B).sum()
    return F.cross_entropy(logits_B2, batch.pair_labels_B, reduction="sum"), correct


class _PrecomputedEncoder(nn.Module):
    """Encoder that returns precomputed hidden states, so that both tasks share one forward pass."""

    def __init__(self, hidden_TD: Tensor, encoder: nn.Module) -> None:
        super().__init__()
        self._hidden_TD = hidden_TD
        # The tuple prevents nn.Module from registering the parameter a second time.
        self._token_embedding = (cast("nn.Parameter", encoder.token_embedding),)

    @property
    def token_embedding(self) -> nn.Parameter:
        """The encoder's token embedding."""
        return self._token_embedding[0]

    def forward(self, batch: Batch, positions_M: Tensor) -> Tensor:
        """Return the precomputed hidden states at positions."""
        return self._hidden_TD.index_select(0, positions_M)
