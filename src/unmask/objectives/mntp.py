"""Masked next token prediction, mixed with causal language modeling (GPT-BERT, arXiv 2410.24159).

The token at a masked position is predicted from the hidden state one position before it, as a causal model predicts the
next token. One model then serves both tasks: in some steps tokens are masked and attention is bidirectional, in the
others nothing is masked and attention is causal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from unmask.core import rng
from unmask.core.config import require
from unmask.core.types import Batch, LossSums, MaskedBatch
from unmask.objectives.causal import CausalLMConfig, CausalLMObjective, without_first_tokens
from unmask.objectives.cross_entropy import token_losses
from unmask.objectives.masking import MaskingConfig
from unmask.objectives.mlm import MaskedLMObjective, token_metrics


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
