"""Adaptive masking: tokens that the model predicts badly are masked more often (AMLM, arXiv 2510.20475).

Each token of the vocabulary has a weight. In a sequence, the chance to be masked is proportional to the weight, and the
mask rate stays that of the recipe. The weights follow the accuracy of the model's own predictions. They change once
every `update_every` steps, from the results of the steps before, and are saved in checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from unmask.core.config import require
from unmask.core.errors import RecipeError
from unmask.core.types import Batch, LossSums, MaskedBatch
from unmask.objectives.cross_entropy import token_losses
from unmask.objectives.masking import MaskingConfig
from unmask.objectives.mlm import MaskedLMObjective, token_metrics

_PRIOR = 2.0  # predictions with the mean accuracy of all tokens, which rare tokens start from


@dataclass(frozen=True)
class AdaptiveMaskingConfig(MaskingConfig):
    """Masked language modeling, with a mask rate for each token of the vocabulary."""

    # Masked language modeling in which badly predicted tokens are masked more often (AMLM, arXiv 2510.20475).
    kind: Literal["adaptive"] = "adaptive"
    update_every: int = 200  # [steps] Interval between changes of the weights.
    update_rate: float = 0.8  # Share of the latest accuracy in a new weight; the rest is the weight before.
    min_weight: float = 0.05  # Lowest weight of a token; the highest is 1.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_unit != "token" or self.boosted_words:
            raise RecipeError(
                "adaptive masking selects single tokens, by the model's own errors",
                location="boosted_words" if self.boosted_words else "mask_unit",
                hint="remove this setting, or set objective.kind=mlm",
            )
        require(self, "update_every", min=1)
        require(self, "update_rate", above=0, max=1, hint="choose a share above 0 and at most 1")
        require(self, "min_weight", above=0, max=1, hint="choose a weight above 0 and at most 1")


class AdaptiveMaskingObjective:
    """Masked language modeling whose masks depend on the accuracy for each token."""

    loss_weights: Mapping[str, float] = {"mlm": 1.0}
    metrics: Sequence[str] = ("loss", "accuracy", "mask_rate")
    sampler = "windows"

    def __init__(self, settings: AdaptiveMaskingConfig, mlm: MaskedLMObjective, vocab_size: int) -> None:
        """`mlm` masks the tokens, by the weights of this objective."""
        self._settings = settings
        self._mlm = mlm
        # The batch of the next step may be masked before a step has ended. So the results of an interval of steps
        # change the masks of the interval after the next, and two rows are needed: for even and for odd intervals.
        self.modules = nn.Module()
        self.modules.register_buffer("weights_2V", torch.ones(2, vocab_size))
        self.modules.register_buffer("statistics_2V", torch.zeros(2, vocab_size))  # masked, correct in this interval

    def corrupt(self, batch: Batch, seed: int) -> MaskedBatch:
        """Return the masked batch: a function of seed, keys, progress and of the weights of the step's interval."""
        interval = batch.step // self._settings.update_every
        weights_V = self._buffer("weights_2V")[interval % 2].cpu().numpy()
        return self._mlm.mask(batch, seed, weights_V[batch.ids_T.numpy()])

    def loss(self, encoder: nn.Module, head: nn.Module, masked: MaskedBatch) -> LossSums:
        """Return the summed cross-entropy in nats, the metrics, and counts of masked and correct tokens by id."""
        losses = token_losses(encoder, head, masked.batch, masked.positions_M, masked.labels_M)
        outcome_2M = torch.stack((torch.ones_like(losses.nats_M), losses.correct_M.float()))
        statistics_2V = self._buffer("statistics_2V").new_zeros(self._buffer("statistics_2V").shape)
        statistics_2V.index_add_(1, masked.labels_M, outcome_2M)
        return LossSums(
            sums={"mlm": losses.total},
            metrics=token_metrics(losses, masked),
            statistics={"statistics_2V": statistics_2V},
        )

    def no_statistics(self) -> dict[str, Tensor]:
        """Return counts of 0."""
        return {"statistics_2V": torch.zeros_like(self._buffer("statistics_2V"))}

    @torch.no_grad()
    def adapt(self, step: int, statistics: Mapping[str, Tensor]) -> None:
        """Add the counts of a step; after the last step of an interval, compute the weights of the one after the next.

        A new weight is a moving average of 1 − accuracy, relative to the highest, and at least `min_weight`.
        """
        settings = self._settings
        total_2V = self._buffer("statistics_2V").add_(statistics["statistics_2V"])
        if (step + 1) % settings.update_every:
            return
        weights_2V = self._buffer("weights_2V")
        interval = step // settings.update_every
        masked_V, correct_V = total_2V
        accuracy = correct_V.sum() / masked_V.sum().clamp(min=1)
        error_V = 1 - (correct_V + _PRIOR * accuracy) / (masked_V + _PRIOR)
        error_V = error_V / error_V.max().clamp(min=1e-6)
        earlier_V = weights_2V[(interval + 1) % 2]
        new_V = torch.lerp(earlier_V, error_V, settings.update_rate).clamp(min=settings.min_weight)
        weights_2V[interval % 2] = torch.where(masked_V > 0, new_V, earlier_V)
        total_2V.zero_()

    def _buffer(self, name: str) -> Tensor:
        return cast("Tensor", getattr(self.modules, name))
