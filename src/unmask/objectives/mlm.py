"""Masked language modeling (arXiv 1810.04805, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unmask.core.types import SPECIAL, Batch, LossSums, MaskedBatch
from unmask.objectives.cross_entropy import TokenLosses, token_losses
from unmask.objectives.masking import Integers, MaskingConfig, PackedSequences, corrupt_tokens, select_positions
from unmask.objectives.word_boost import WordMatcher


@dataclass(frozen=True)
class MaskedLMConfig(MaskingConfig):
    """Masked language modeling without a second task."""

    kind: Literal["mlm"] = "mlm"  # Masked language modeling (BERT, arXiv 1810.04805, section 3.1).


class MaskedLMObjective:
    """Masks tokens and computes the cross-entropy of their predictions."""

    loss_weights: Mapping[str, float] = {"mlm": 1.0}
    metrics: Sequence[str] = ("loss", "accuracy", "mask_rate")
    sampler = "windows"

    def __init__(
        self,
        settings: MaskingConfig,
        mask_id: int,
        regular_token_ids: Integers,
        boosted_ids: Sequence[Sequence[int]] = (),
    ) -> None:
        """`boosted_ids` are the token ids of words that are masked `settings.boost_factor` times as often."""
        self._settings = settings
        self._mask_id = mask_id
        self._regular_token_ids = regular_token_ids
        self._boosted_words = WordMatcher(boosted_ids) if boosted_ids else None
        self.modules = nn.Module()

    def corrupt(self, batch: Batch, seed: int) -> MaskedBatch:
        """Return the masked batch: a pure function of the seed, the progress and each sample's (epoch, number)."""
        return self.mask(batch, seed)

    def mask(self, batch: Batch, seed: int, weights_T: NDArray[np.floating[Any]] | None = None) -> MaskedBatch:
        """Return the masked batch; with `weights_T`, tokens are selected by these weights (`select_positions`)."""
        packed = PackedSequences.from_batch(batch)
        ids_T = batch.ids_T.numpy()
        boosted_T = self._boosted_words.find(ids_T, packed) if self._boosted_words else None
        positions_M = select_positions(packed, self._settings, seed, batch.progress, boosted_T, weights_T)
        corrupted_T = corrupt_tokens(
            ids_T,
            positions_M,
            packed,
            self._settings,
            seed,
            mask_id=self._mask_id,
            regular_token_ids=self._regular_token_ids,
        )
        return masked_batch(batch, corrupted_T, positions_M, ids_T[positions_M])

    def loss(self, encoder: nn.Module, head: nn.Module, masked: MaskedBatch) -> LossSums:
        """Return the summed cross-entropy over the masked tokens, in nats, and the metrics."""
        losses = token_losses(encoder, head, masked.batch, masked.positions_M, masked.labels_M)
        return LossSums(sums={"mlm": losses.total}, metrics=token_metrics(losses, masked))


def token_metrics(losses: TokenLosses, masked: MaskedBatch) -> dict[str, tuple[Tensor, int]]:
    """Return the metrics of all objectives that predict tokens: `loss`, `accuracy` and `mask_rate`."""
    count = len(masked.positions_M)
    return {
        "loss": (losses.nats_M.sum() if masked.weights_M is not None else losses.total.detach(), count),
        "accuracy": (losses.correct_M.sum(), count),
        "mask_rate": (torch.tensor(float(count)), masked.num_maskable),
    }


def masked_batch(batch: Batch, ids_T: NDArray[Any], positions_M: NDArray[Any], labels_M: NDArray[Any]) -> MaskedBatch:
    """Return a masked batch with the corrupted ids `ids_T` in place of the original ones."""
    return MaskedBatch(
        batch=replace(batch, ids_T=torch.from_numpy(ids_T)),
        positions_M=torch.from_numpy(positions_M.astype("int64")),
        labels_M=torch.from_numpy(labels_M.astype("int64")),
        denominators={"mlm": len(positions_M)},
        num_maskable=int(((batch.token_flags_T & SPECIAL) == 0).sum()),
    )
