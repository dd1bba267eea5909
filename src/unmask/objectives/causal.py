"""Causal language modeling: each token is predicted from the tokens before it, with causal attention.

It is here for comparison and as a first stage before masked language modeling (arXiv 2507.00994). A model whose last
stage is causal has no masked predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
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
        packed = with_context_only(PackedSequences.from_batch(batch))
        ids_T, positions_M = batch.ids_T.numpy(), select_positions(packed, self._rate, seed)
        masked = masked_batch(replace(batch, is_causal=True), ids_T, positions_M, ids_T[positions_M])
        return replace(
            masked,
            denominators={"causal": len(positions_M)},
            num_maskable=int(((packed.token_flags_T & SPECIAL) == 0).sum()),
        )

    def loss(self, encoder: nn.Module, head: nn.Module, masked: MaskedBatch) -> LossSums:
        """Return the summed cross-entropy of the labels in nats, each predicted one position earlier."""
        losses = token_losses(encoder, head, masked.batch, masked.positions_M - 1, masked.labels_M)
        return LossSums(sums={"causal": losses.total}, metrics=token_metrics(losses, masked))


def with_context_only(packed: PackedSequences) -> PackedSequences:
    """Return sequences whose first token can't be selected, because no token precedes it."""
    token_flags_T = packed.token_flags_T.copy()
    token_flags_T[np.asarray(packed.cu_seqlens[:-1])] |= SPECIAL
    return replace(packed, token_flags_T=token_flags_T)
