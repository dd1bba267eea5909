"""Adaptive masking: the rate stays, badly predicted tokens are masked more often, and the state is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.core.errors import RecipeError
from unmask.core.types import SPECIAL, Batch, Sample, pack
from unmask.models import build_model
from unmask.models.modernbert import ModernBertConfig
from unmask.objectives.adaptive import AdaptiveMaskingConfig, AdaptiveMaskingObjective
from unmask.objectives.mlm import MaskedLMObjective

VOCABULARY, MASK = 30, 4
ORDINARY = np.arange(5, VOCABULARY)


def objective_of(**options: float) -> AdaptiveMaskingObjective:
    settings = AdaptiveMaskingConfig(**options)  # type: ignore[arg-type]
    return AdaptiveMaskingObjective(settings, MaskedLMObjective(settings, MASK, ORDINARY), VOCABULARY)


def batch_of(texts: int, length: int, step: int = 0) -> Batch:
    """Texts that alternate between two tokens, 10 and 11, between special tokens."""
    flags = np.zeros(length + 2, np.uint8)
    flags[[0, -1]] = SPECIAL
    ids = np.concatenate(([2], 10 + np.arange(length) % 2, [3]))
    batch = pack([Sample(ids, flags, number=number) for number in range(texts)])
    object.__setattr__(batch, "step", step)
    return batch


def counts(masked: list[int], correct: list[int]) -> dict[str, torch.Tensor]:
    statistics = torch.zeros(2, VOCABULARY)
    statistics[0, 10:12], statistics[1, 10:12] = torch.tensor(masked), torch.tensor(correct)
    return {"statistics_2V": statistics}


def share_of_11(objective: AdaptiveMaskingObjective, step: int) -> tuple[float, float]:
    """Return the share of token 11 among the masked tokens, and the mask rate."""
    masked = objective.corrupt(batch_of(400, 50, step), seed=3)
    return float((masked.labels_M == 11).double().mean()), len(masked.positions_M) / masked.num_maskable


def test_at_first_all_tokens_are_masked_alike() -> None:
    share, rate = share_of_11(objective_of(mask_rate=0.2), 0)
    assert share == pytest.approx(0.5, abs=0.03) and rate == pytest.approx(0.2, abs=1e-3)


def test_results_change_the_masks_of_the_interval_after_the_next() -> None:
    objective = objective_of(mask_rate=0.2, update_every=2, update_rate=1.0, min_weight=0.1)
    objective.adapt(0, counts([50, 50], [50, 0]))
    assert share_of_11(objective, 1)[0] == pytest.approx(0.5, abs=0.03), "the interval has not ended"
    objective.adapt(1, counts([50, 50], [50, 0]))  # token 10 is always right, 11 never
    assert share_of_11(objective, 2)[0] == share_of_11(objective, 3)[0] == pytest.approx(0.5, abs=0.03)
    share, rate = share_of_11(objective, 4)
    assert share > 0.8 and rate == pytest.approx(0.2, abs=1e-3)
    objective.adapt(2, counts([10, 10], [0, 10]))
    objective.adapt(3, counts([10, 10], [0, 10]))  # now 11 is right
    assert share_of_11(objective, 4)[0] == share, "the masks of an interval don't change"
    assert share_of_11(objective, 6)[0] < 0.2


def test_a_token_that_was_not_masked_keeps_its_weight() -> None:
    objective = objective_of(update_every=1, update_rate=1.0, min_weight=0.1)
    objective.adapt(0, counts([40, 0], [39, 0]))
    weights = objective.modules.get_buffer("weights_2V")[0]
    assert weights[11] == 1 and weights[20] == 1


@settings(max_examples=30, deadline=None)
@given(
    masked=st.lists(st.integers(0, 100), min_size=2, max_size=2),
    share=st.lists(st.floats(0, 1), min_size=2, max_size=2),
    lowest=st.floats(0.01, 1),
)
def test_weights_are_in_their_range(masked: list[int], share: list[float], lowest: float) -> None:
    objective = objective_of(update_every=1, min_weight=lowest)
    for step in range(4):
        objective.adapt(step, counts(masked, [int(n * s) for n, s in zip(masked, share, strict=True)]))
    weights = objective.modules.get_buffer("weights_2V")
    assert weights.isfinite().all() and weights.min() >= lowest - 1e-6 and weights.max() <= 1 + 1e-6


def test_a_tokens_chance_is_proportional_to_its_weight_at_a_low_rate() -> None:
    objective = objective_of(mask_rate=0.02, update_every=1)
    objective.modules.get_buffer("weights_2V")[:, 10] = 0.25
    share, _ = share_of_11(objective, 0)
    assert share == pytest.approx(0.8, abs=0.05)


def test_the_loss_counts_masked_and_correct_tokens_by_id() -> None:
    torch.manual_seed(1)
    shape = ModernBertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16)
    encoder, head = build_model(shape, VOCABULARY)
    objective = objective_of(mask_rate=0.3)
    masked = objective.corrupt(batch_of(5, 20), seed=3)
    loss = objective.loss(encoder.eval(), head.eval(), masked)
    masked_V, correct_V = loss.statistics["statistics_2V"]
    assert torch.equal(masked_V, torch.bincount(masked.labels_M, minlength=VOCABULARY).float())
    assert correct_V.sum() == loss.metrics["accuracy"][0] and (correct_V <= masked_V).all()
    assert loss.statistics.keys() == objective.no_statistics().keys()


@pytest.mark.parametrize("setting", [{"mask_unit": "whole-word"}, {"boosted_words": ("a",)}])
def test_other_ways_to_select_tokens_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="single tokens"):
        AdaptiveMaskingConfig(**setting)  # type: ignore[arg-type]
