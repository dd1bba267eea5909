"""Causal language modeling: each token is predicted from the tokens before it, with causal attention.

It is here for comparison and as a first stage before masked language modeling (arXiv 2507.00994). A model whose last
stage is causal has no masked predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from unmask.core.config import require
from unmask.core.types import SPECIAL, Batch, LossSums, MaskedBatch
from unmask.objectives.cross_entropy import token_losses
from unmask.objectives.masking import MaskingConfig, PackedSequences, select_positions
from unmask.objectives.mlm import masked_batch, token_metrics


@dataclass(frozen=True)
class CausalLMConfig:
    """Causal language modeling."""

    kind: Literal["causal"] = "causal"  # Causal language modeling: the next token, with causal attention.
    # [fraction of tokens] Tokens that are predicted; below 1 for comparisons with masked language modeling.
    predicted_fraction: float = 1.0

    def __post_init__(self) -> None:
        require(self, "predicted_fraction", above=0, max=1, hint="choose a fraction above 0 and at most 1")

    @property
    def masked_fraction(self) -> float:
        """Fraction of the tokens that the head predicts, for cost estimates."""
        return self.predicted_fraction


class CausalLMObjective:
    """Predicts regular tokens from the tokens before them. Nothing is masked."""

    loss_weights: Mapping[str, float] = {"causal": 1.0}
    metrics: Sequence[str] = ("loss", "accuracy", "mask_rate")
    sampler = "windows"
    validates = "own"  # evaluation/objectives.py
    label_offset = 1

    def __init__(self, settings: CausalLMConfig) -> None:
        self._rate = MaskingConfig(mask_rate=settings.predicted_fraction)
        self.modules = nn.Module()

    def corrupt(self, batch: Batch, seed: int) -> MaskedBatch:
        """Return the batch with unchanged ids; the labels are the regular tokens that have a token before them."""
        selectable = without_first_tokens(batch)
        ids_T = batch.ids_T.numpy()
        positions_M = select_positions(PackedSequences.from_batch(selectable), self._rate, seed)
        masked = masked_batch(selectable, ids_T, positions_M, ids_T[positions_M])
        return replace(masked, batch=replace(batch, is_causal=True), denominators={"causal": len(positions_M)})

    def loss(self, encoder: nn.Module, head: nn.Module, masked: MaskedBatch) -> LossSums:
        """Return the summed cross-entropy of the labels in nats, each predicted one position earlier."""
        losses = token_losses(encoder, head, masked.batch, masked.positions_M - 1, masked.labels_M)
        return LossSums(sums={"causal": losses.total}, metrics=token_metrics(losses, masked))


def without_first_tokens(batch: Batch) -> Batch:
    """Return a batch whose sequences have a first token that can't be selected, because no token precedes it."""
    first_B = torch.tensor(batch.offsets[:-1], dtype=torch.int64)
    return replace(batch, token_flags_T=batch.token_flags_T.index_fill(0, first_B, SPECIAL))
