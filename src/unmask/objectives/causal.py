"""Causal language modeling: each token is predicted from the tokens before it, with causal attention.

It is here for comparison and as a first stage before masked language modeling (arXiv 2507.00994). A model whose last
stage is causal has no masked predictions.

It can be mixed with masked next token prediction (GPT-BERT, arXiv 2410.24159). The token at a masked position is
predicted from the hidden state one position before it, as a causal model predicts the next token. One model then
serves both tasks: in some steps tokens are masked and attention is bidirectional, in the others nothing is masked and
attention is causal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from unmask.core import rng
from unmask.core.config import require
from unmask.core.types import SPECIAL, Batch, LossSums, MaskedBatch
from unmask.objectives.cross_entropy import token_losses
from unmask.objectives.masking import MaskingConfig, PackedSequences, select_positions
from unmask.objectives.mlm import MaskedLMObjective, masked_batch, token_metrics


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
    validates = "own"  # evaluation/validation.py
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


# Mixed with masked next token prediction ------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskedNextTokenConfig(MaskingConfig):
    """Masked next token prediction, mixed with causal language modeling."""

    # Masked next token prediction: masked tokens are predicted one position earlier (GPT-BERT, arXiv 2410.24159).
    kind: Literal["mntp"] = "mntp"
    causal_fraction: float = 0.5  # [fraction of steps] Steps of causal language modeling; GPT-BERT's is 1/16 to 1/2.

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "causal_fraction", min=0, below=1, hint="choose 0 to below 1, or set objective.kind=causal")

    @property
    def masked_fraction(self) -> float:
        """Mean fraction of the tokens that the head predicts, for cost estimates."""
        return self.causal_fraction + (1 - self.causal_fraction) * super().masked_fraction


class MaskedNextTokenObjective:
    """Predicts each label from the hidden state before it. Whether a step is causal depends on its number alone."""

    loss_weights: Mapping[str, float] = {"mntp": 1.0}
    metrics: Sequence[str] = (
        "loss", "accuracy", "mask_rate", "masked_loss", "masked_accuracy", "causal_loss", "causal_accuracy",
    )  # fmt: skip
    sampler = "windows"
    label_offset = 1

    def __init__(self, settings: MaskedNextTokenConfig, mlm: MaskedLMObjective) -> None:
        """`mlm` masks the tokens of the steps that aren't causal."""
        self._settings = settings
        self._mlm = mlm
        self._causal = CausalLMObjective(CausalLMConfig())
        self.modules = nn.Module()

    def corrupt(self, batch: Batch, seed: int) -> MaskedBatch:
        """Return a masked batch or, in a causal step, the batch with unchanged ids."""
        if rng.uniform(seed, "causal step", batch.step)[0] < self._settings.causal_fraction:
            masked = self._causal.corrupt(batch, seed)
        else:
            masked = self._mlm.corrupt(without_first_tokens(batch), seed)
            masked = replace(masked, batch=replace(masked.batch, token_flags_T=batch.token_flags_T))
        return replace(masked, denominators={"mntp": len(masked.positions_M)})

    def loss(self, encoder: nn.Module, head: nn.Module, masked: MaskedBatch) -> LossSums:
        """Return the summed cross-entropy of the labels in nats, each predicted one position earlier."""
        losses = token_losses(encoder, head, masked.batch, masked.positions_M - 1, masked.labels_M)
        metrics = token_metrics(losses, masked)
        zero = losses.total.detach() * 0
        for task, is_task in (("masked", not masked.batch.is_causal), ("causal", masked.batch.is_causal)):
            for name in ("loss", "accuracy"):
                metrics[f"{task}_{name}"] = metrics[name] if is_task else (zero, 0)
        return LossSums(sums={"mntp": losses.total}, metrics=metrics)
