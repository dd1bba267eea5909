"""Masked diffusion: a different mask rate for each sequence, and a bound on the likelihood of the text.

In each sequence of n maskable tokens, k are replaced by [MASK], where k is uniform over 1 to n, and the loss of each is
weighted by n / k. The mean over k is then an upper bound on the negative log-likelihood of the whole sequence: the
masked diffusion bound (MDLM, arXiv 2406.07524) of a process that unmasks one token at a time, which is also that of
order-agnostic autoregressive models (arXiv 2110.02037, section 3). Divided by n it is in nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import nn

from unmask.core import rng
from unmask.core.config import require
from unmask.core.types import SPECIAL, Batch, LossSums, MaskedBatch
from unmask.objectives.cross_entropy import token_losses
from unmask.objectives.masking import PackedSequences
from unmask.objectives.mlm import masked_batch, token_metrics

_GOLDEN_RATIO = 0.6180339887498949  # consecutive samples get rates that are evenly spread over the interval


@dataclass(frozen=True)
class MaskedDiffusionConfig:
    """Masked diffusion."""

    kind: Literal["diffusion"] = "diffusion"  # Masked diffusion: uniform mask rates (MDLM, arXiv 2406.07524).
    # [fraction of maskable tokens] Lowest mask rate. Above 0, the loss is no longer a bound, but varies less.
    min_mask_rate: float = 0.0
    # Whether the loss of a sequence is divided by its mask rate, as in the bound; false: all masked tokens count alike.
    weighted: bool = True

    def __post_init__(self) -> None:
        require(self, "min_mask_rate", min=0, below=1, hint="choose a rate of at least 0 and below 1, e.g. 0.1")

    @property
    def masked_fraction(self) -> float:
        """Mean mask rate, for cost estimates."""
        return (1 + self.min_mask_rate) / 2


class MaskedDiffusionObjective:
    """Masks a uniformly drawn number of tokens of each sequence."""

    loss_weights: Mapping[str, float] = {"diffusion": 1.0}
    metrics: Sequence[str] = ("loss", "accuracy", "mask_rate", "bound")
    sampler = "windows"
    validates = "both"  # evaluation/validation.py

    def __init__(self, settings: MaskedDiffusionConfig, mask_id: int) -> None:
        self._settings = settings
        self._mask_id = mask_id
        self.modules = nn.Module()

    def corrupt(self, batch: Batch, seed: int) -> MaskedBatch:
        """Return the masked batch; the masked tokens of a sequence are those with the smallest draws."""
        packed = PackedSequences.from_batch(batch)
        ids_T, sequence_T = batch.ids_T.numpy(), packed.sequence_T()
        maskable = np.flatnonzero((packed.token_flags_T & SPECIAL) == 0)
        count_B = np.bincount(sequence_T[maskable], minlength=batch.num_samples)
        rate_B = self._rates(packed, seed)
        masked_B = np.maximum(np.ceil(rate_B * count_B), np.minimum(count_B, 1)).astype(np.int64)
        draw_N = rng.uniform(seed, "mask", *packed.draw_keys(maskable))
        order_N = np.lexsort((draw_N, sequence_T[maskable]))
        first_B = np.cumsum(count_B) - count_B
        sequence_N = sequence_T[maskable][order_N]
        is_masked_N = np.arange(len(order_N)) - first_B[sequence_N] < masked_B[sequence_N]
        positions_M = np.sort(maskable[order_N[is_masked_N]])
        corrupted_T = ids_T.astype(np.int64)
        corrupted_T[positions_M] = self._mask_id
        sequence_M = sequence_T[positions_M]
        weights_M = (count_B[sequence_M] / masked_B[sequence_M]).astype(np.float32)
        masked = masked_batch(batch, corrupted_T, positions_M, ids_T[positions_M])
        return replace(
            masked,
            denominators={"diffusion": masked.num_maskable if self._settings.weighted else len(positions_M)},
            weights_M=torch.from_numpy(weights_M),
        )

    def _rates(self, packed: PackedSequences, seed: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Return the mask rate of each sequence, uniform from the lowest rate (exclusive) to 1."""
        epoch_B, number_B = packed.sample_keys_B2[:, 0], packed.sample_keys_B2[:, 1]
        draw_B = 1.0 - (rng.uniform(seed, "rate", epoch_B) + _GOLDEN_RATIO * number_B) % 1.0
        return self._settings.min_mask_rate + (1.0 - self._settings.min_mask_rate) * draw_B

    def loss(self, encoder: nn.Module, head: nn.Module, masked: MaskedBatch) -> LossSums:
        """Return the summed cross-entropy in nats, weighted if the settings say so. `bound` is always weighted."""
        assert masked.weights_M is not None
        weights_M = masked.weights_M if self._settings.weighted else None
        losses = token_losses(encoder, head, masked.batch, masked.positions_M, masked.labels_M, weights_M)
        bound = (losses.nats_M * masked.weights_M).sum()
        metrics = {**token_metrics(losses, masked), "bound": (bound, masked.num_maskable)}
        return LossSums(sums={"diffusion": losses.total}, metrics=metrics)
