"""Room card: masked language modelling (arXiv 1810.04805, section 3.1).

Comes in: a Batch. Goes out: a Puzzle (what is hidden and asked), then a Loss (cross-entropy summed over what was asked;
the vocabulary head never sees another slot). Called by: the loop through the Objective contract; eval/heldout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from unmask.core import rng
from unmask.core.types import SPECIAL, Batch, LossSums, MaskedBatch, logits_at
from unmask.objectives.masking import MaskingConfig, PackedSequences, corrupt_tokens, select_positions
from unmask.objectives.word_boost import WordMatcher


@dataclass(frozen=True)
class MaskedLMConfig(MaskingConfig):
    """Masked language modelling, alone."""

    kind: Literal["mlm"] = "mlm"

    @property
    def masked_fraction(self) -> float:
        """Share of the tokens that is asked about, by which costs are forecast."""
        return self.mean_rate


class MaskedLMObjective:
    """The objective: asks by `masking`, answers by cross-entropy."""

    loss_weights: Mapping[str, float] = {"mlm": 1.0}
    metrics: Sequence[str] = ("loss", "accuracy", "mask_rate")
    sampler = "windows"
    fills = True

    def __init__(
        self,
        settings: MaskingConfig,
        mask_id: int,
        regular_token_ids: NDArray[np.integer[Any]],
        preferred: Sequence[Sequence[int]] = (),
    ) -> None:
        """`preferred` are the ids of words that are asked `settings.boost_factor` times as often."""
        self._settings = settings
        self._mask_id = mask_id
        self._regular_token_ids = regular_token_ids
        self._preference = WordMatcher(preferred) if preferred else None
        self.modules = nn.Module()

    def corrupt(self, batch: Batch, seed: int) -> MaskedBatch:
        """Hide what the rule chooses; pure in the seed, the progress and each text's (epoch, number)."""
        packed = PackedSequences(batch.token_flags_T.numpy(), np.asarray(batch.offsets), batch.sample_keys_B2.numpy())
        ids_T = batch.ids_T.numpy()
        preferred_T = self._preference.slots(ids_T, packed) if self._preference else None
        positions_M = select_positions(packed, self._settings, seed, batch.progress, preferred_T)
        hidden_T = corrupt_tokens(
            ids_T,
            positions_M,
            packed,
            self._settings,
            seed,
            mask_id=self._mask_id,
            regular_token_ids=self._regular_token_ids,
        )
        return masked_batch(
            batch,
            hidden_T,
            positions_M,
            ids_T[positions_M],
            rng.uniform(seed, "chance", *packed.draw_keys(positions_M)),
        )

    def loss(self, encoder: nn.Module, head: nn.Module, masked: MaskedBatch) -> LossSums:
        """Sum of the cross-entropy over the asked slots, in nats; accuracy beside it."""
        logits_MV = logits_at(encoder, head, masked.batch, masked.positions_M)
        nats_M = F.cross_entropy(logits_MV, masked.labels_M, reduction="none")
        right = (logits_MV.detach().argmax(-1) == masked.labels_M).sum()
        asked = masked.denominators["mlm"]
        return LossSums(
            sums={"mlm": (nats_M * masked.weights_M).sum()},
            metrics={
                "loss": (nats_M.detach().sum(), asked),
                "accuracy": (right, asked),
                "mask_rate": (torch.tensor(float(asked)), masked.num_maskable),
            },
        )


def masked_batch(
    batch: Batch,
    hidden_T: NDArray[np.int64],
    positions_M: NDArray[np.integer[Any]],
    labels_M: NDArray[np.integer[Any]],
    chance_M: NDArray[np.float64],
) -> MaskedBatch:
    """The puzzle that shows `hidden_T` in place of the batch's ids and asks about `positions_M`, all weights one."""
    return MaskedBatch(
        batch=replace(batch, ids_T=torch.from_numpy(hidden_T)),
        positions_M=torch.from_numpy(positions_M.astype(np.int64)),
        labels_M=torch.from_numpy(labels_M.astype(np.int64)),
        weights_M=torch.ones(len(positions_M)),
        chance_M=torch.from_numpy(chance_M.astype(np.float32)),
        denominators={"mlm": len(positions_M)},
        num_maskable=int(((batch.token_flags_T & SPECIAL) == 0).sum()),
    )
