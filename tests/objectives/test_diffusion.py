"""Masked diffusion: the number of masked tokens is uniform, and the weighted loss is a bound per token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from unmask.core.types import SPECIAL, Batch, MaskedBatch, Sample, pack
from unmask.objectives.cross_entropy import TokenLosses
from unmask.objectives.diffusion import MaskedDiffusionConfig, MaskedDiffusionObjective

MASK = 4


def batch_of(lengths: list[int]) -> Batch:
    """Texts between two special tokens, with this many tokens besides."""
    samples = []
    for number, length in enumerate(lengths):
        flags = np.zeros(length + 2, np.uint8)
        flags[[0, -1]] = SPECIAL
        samples.append(Sample(np.arange(5, length + 7), flags, epoch=1, number=number))
    return pack(samples)


def masked_counts(masked: MaskedBatch) -> np.ndarray:
    sequence_M = torch.searchsorted(masked.batch.cu_seqlens, masked.positions_M, right=True) - 1
    return torch.bincount(sequence_M, minlength=masked.batch.num_samples).numpy()


def test_the_number_of_masked_tokens_is_uniform() -> None:
    masked = MaskedDiffusionObjective(MaskedDiffusionConfig(), MASK).corrupt(batch_of([10] * 4000), seed=5)
    counts = np.bincount(masked_counts(masked), minlength=11)
    assert counts[0] == 0
    # Consecutive samples have evenly spread rates, so the counts vary less than those of independent draws.
    assert np.abs(counts[1:] - 400).max() <= 10
    assert (masked.batch.ids_T[masked.positions_M] == MASK).all()


def test_each_token_is_masked_equally_often() -> None:
    masked = MaskedDiffusionObjective(MaskedDiffusionConfig(), MASK).corrupt(batch_of([9] * 6000), seed=5)
    rate_9 = np.bincount(masked.positions_M % 11, minlength=11)[1:-1] / 6000
    assert rate_9 == pytest.approx(np.full(9, 5 / 9), abs=0.03)  # the mean of k / 9


class ConstantLoss(nn.Module):
    """Both encoder and head: every label has a loss of log 50."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Parameter(torch.zeros(50, 8))

    def forward(self, batch: Batch, positions_M: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(positions_M), 8)

    def features(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        return hidden_MD

    def decoder_parameters(self, token_embedding_VD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return token_embedding_VD, torch.zeros(50)


def test_the_bound_of_a_constant_loss_is_that_loss_in_every_sample() -> None:
    objective, model = MaskedDiffusionObjective(MaskedDiffusionConfig(), MASK), ConstantLoss()
    for lengths in ([1], [7, 30], [40] * 5):
        masked = objective.corrupt(batch_of(lengths), seed=2)
        loss = objective.loss(model, model, masked)
        assert masked.denominators == {"diffusion": sum(lengths)}
        assert float(loss.sums["diffusion"].detach()) / sum(lengths) == pytest.approx(math.log(50), rel=1e-5)
        bound, count = loss.metrics["bound"]
        assert float(bound) / count == pytest.approx(math.log(50), rel=1e-5)
        total, count = loss.metrics["loss"]
        assert count == len(masked.positions_M) and float(total) / count == pytest.approx(math.log(50), rel=1e-5)


def test_the_bound_is_the_mean_over_all_orders_of_unmasking(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a loss that depends on the number of masked tokens alone, it is the mean loss of a random order."""
    of_count = {k: 1.0 + 0.3 * k for k in range(1, 9)}  # nats of a token if k are masked

    def losses(encoder, head, batch, positions_M, labels_M, weights_M) -> TokenLosses:
        sequence_M = torch.searchsorted(batch.cu_seqlens, positions_M, right=True) - 1
        counts = torch.bincount(sequence_M)
        nats_M = torch.tensor([of_count[int(counts[sequence])] for sequence in sequence_M])
        return TokenLosses((nats_M * weights_M).sum(), nats_M, nats_M > 0)

    monkeypatch.setattr("unmask.objectives.diffusion.token_losses", losses)
    objective = MaskedDiffusionObjective(MaskedDiffusionConfig(), MASK)
    masked = objective.corrupt(batch_of([8] * 4000), seed=2)
    loss = objective.loss(nn.Identity(), nn.Identity(), masked)
    in_random_order = sum(of_count.values()) / 8  # one token after another, k = 8 … 1 of them still masked
    assert float(loss.sums["diffusion"].detach()) / masked.num_maskable == pytest.approx(in_random_order, rel=0.01)


def test_a_lowest_rate_and_equal_weights() -> None:
    settings = MaskedDiffusionConfig(min_mask_rate=0.5, weighted=False)
    masked = MaskedDiffusionObjective(settings, MASK).corrupt(batch_of([100] * 200), seed=1)
    counts = masked_counts(masked)
    assert counts.min() > 50 and counts.max() == 100 and counts.mean() == pytest.approx(75.5, abs=1)
    assert masked.denominators == {"diffusion": len(masked.positions_M)}
    assert settings.masked_fraction == 0.75
