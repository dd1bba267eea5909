"""Masked tokens and sentence pairs: two loss terms with separate counts, from one forward pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unmask.core.errors import RecipeError
from unmask.core.types import SPECIAL, WORD_START, Sample, pack
from unmask.models import build_model, build_pair
from unmask.models.bert import BertConfig
from unmask.objectives.mlm import MaskedLMConfig, MaskedLMObjective
from unmask.objectives.sentence_pairs import BertPretrainingConfig, BertPretrainingObjective

SHAPE = BertConfig(
    num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=24, max_position_embeddings=40
)
MASK, ORDINARY = 4, np.arange(5, 40)


def pair(number: int, label: int | None, sizes: tuple[int, int] = (6, 9)) -> Sample:
    draw = np.random.default_rng(number)
    a, b = (draw.integers(5, 40, size) for size in sizes)
    ids = np.concatenate([[2], a, [3], b, [3]])
    marks = np.full(len(ids), WORD_START, dtype=np.uint8)
    marks[[0, len(a) + 1, -1]] = SPECIAL
    segment = np.repeat([0, 1], [len(a) + 2, len(b) + 1])
    return Sample(ids, marks, 1, number, segment if label is not None else None, label)


def objective(**settings: float) -> BertPretrainingObjective:
    torch.manual_seed(2)
    return BertPretrainingObjective(
        BertPretrainingConfig(**settings), MaskedLMObjective(MaskedLMConfig(), MASK, ORDINARY), build_pair(SHAPE)
    )  # type: ignore[arg-type]


def test_each_term_is_the_same_as_alone() -> None:
    torch.manual_seed(1)
    encoder, head = build_model(SHAPE, 40)
    both = objective()
    samples = [pair(number, number % 2) for number in range(6)]
    batch = pack(samples)
    masked = both.corrupt(batch, seed=3)
    assert masked.denominators == {"mlm": len(masked.positions_M), "pair": 6} and both.loss_weights == {
        "mlm": 1.0,
        "pair": 1.0,
    }
    assert not (batch.token_flags_T[masked.positions_M] & SPECIAL).any(), "[CLS] and [SEP] are not masked"
    calls = list[int]()
    hook = encoder.register_forward_hook(lambda *_: calls.append(1))
    loss = both.loss(encoder, head, masked)
    hook.remove()
    assert len(calls) == 1
    alone = MaskedLMObjective(MaskedLMConfig(), MASK, ORDINARY)
    mlm_loss = alone.loss(encoder, head, alone.corrupt(batch, seed=3))
    assert torch.equal(loss.sums["mlm"], mlm_loss.sums["mlm"])
    assert set(loss.metrics) == set(both.metrics) and both.sampler == "next-sentence"
    logits_B2 = both.modules(encoder(masked.batch), masked.batch)
    assert logits_B2.shape == (6, 2)
    labels = torch.tensor([text.pair_label for text in samples])
    torch.testing.assert_close(loss.sums["pair"], F.cross_entropy(logits_B2, labels, reduction="sum"))
    assert loss.metrics["pair_accuracy"] == (int((logits_B2.argmax(-1) == labels).sum()), 6)
    assert loss.metrics["pair_loss"][1] == 6 and loss.metrics["loss"][1] == len(masked.positions_M)
    sum(loss.sums.values(), torch.zeros(())).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in both.modules.parameters())


def test_token_types_change_the_output() -> None:
    encoder, _ = build_model(SHAPE, 40)
    both, text = objective(), pair(1, 0)
    assert text.token_type_ids is not None
    turned = Sample(text.ids, text.token_flags, 1, 1, 1 - text.token_type_ids, 0)
    with torch.no_grad():
        one, other = (both.modules(encoder(batch := pack([each])), batch) for each in (text, turned))
    assert not torch.allclose(one, other)


def test_samples_without_pair_labels_train_masked_tokens_only() -> None:
    encoder, head = build_model(SHAPE, 40)
    both = objective(pair_loss_weight=0.5)
    masked = both.corrupt(pack([pair(1, None)]), seed=3)
    loss = both.loss(encoder, head, masked)
    assert (
        masked.denominators["pair"] == 0
        and float(loss.sums["pair"].detach()) == 0.0
        and both.loss_weights["pair"] == 0.5
    )
    sum(loss.sums.values(), torch.zeros(())).backward()
    gradients = [parameter.grad for parameter in both.modules.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients), "all ranks sum the same tensors"


@pytest.mark.parametrize(
    "invalid",
    [{"short_seq_prob": -0.1}, {"short_seq_prob": 1.5}, {"pair_loss_weight": 0.0}, {"pair_loss_weight": math.nan}],
)
def test_invalid_settings_are_refused(invalid: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=next(iter(invalid))):
        BertPretrainingConfig(**invalid)  # type: ignore[arg-type]
