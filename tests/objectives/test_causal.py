"""Causal language modeling and masked next tokens: equal to transformers, and the future is invisible."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig as HFBertConfig
from transformers import BertLMHeadModel

from unmask.core.types import SPECIAL, Batch, Sample, logits_at, pack
from unmask.models import EncoderConfig, build_model
from unmask.models.bert import BertConfig
from unmask.models.hf_format import States, to_hf_tensors
from unmask.models.modernbert import ModernBertConfig
from unmask.models.neomme import NeoMMEConfig
from unmask.objectives.causal import CausalLMConfig, CausalLMObjective, MaskedNextTokenConfig, MaskedNextTokenObjective
from unmask.objectives.mlm import MaskedLMObjective

VOCABULARY, MASK = 40, 4
SHAPES: list[EncoderConfig] = [
    BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48),
    ModernBertConfig(
        num_hidden_layers=3, hidden_size=32, num_attention_heads=2, intermediate_size=48, local_attention=8
    ),
    NeoMMEConfig(num_hidden_layers=3, hidden_size=32, num_attention_heads=2, num_key_value_heads=1),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=["bert", "modernbert", "neomme"])


def batch_of(lengths: list[int], seed: int = 0) -> Batch:
    draw = np.random.default_rng(seed)
    samples = []
    for number, length in enumerate(lengths):
        flags = np.zeros(length, np.uint8)
        flags[[0, -1]] = SPECIAL
        samples.append(Sample(draw.integers(5, VOCABULARY, length), flags, number=number))
    return pack(samples)


def mntp(**rates: float) -> MaskedNextTokenObjective:
    settings = MaskedNextTokenConfig(**rates)  # type: ignore[arg-type]
    return MaskedNextTokenObjective(settings, MaskedLMObjective(settings, MASK, np.arange(5, VOCABULARY)))


@shapes
def test_a_token_does_not_see_those_after_it(shape: EncoderConfig) -> None:
    torch.manual_seed(1)
    encoder, _ = build_model(shape, VOCABULARY)
    with torch.no_grad():
        for parameter in encoder.parameters():  # NeoMME's output matrices are 0 at first
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    batch = replace(batch_of([30, 7]), is_causal=True)
    changed_T = batch.ids_T.clone()
    changed_T[20] = (changed_T[20] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = encoder.eval()(batch), encoder(replace(batch, ids_T=changed_T))
        both_sides = encoder(replace(batch, ids_T=changed_T, is_causal=False))
    torch.testing.assert_close(before[:20], after[:20])
    assert not torch.allclose(before[20:30], after[20:30])
    torch.testing.assert_close(before[30:], after[30:])
    assert not torch.allclose(before[:20], both_sides[:20])


def test_the_loss_is_that_of_transformers() -> None:
    torch.manual_seed(1)
    shape = replace(SHAPES[0], hidden_dropout=0.0, attention_dropout=0.0)
    encoder, head = build_model(shape, VOCABULARY)
    hf = BertLMHeadModel(
        HFBertConfig(
            vocab_size=VOCABULARY, num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48,
            is_decoder=True,
        )
    ).eval()  # fmt: skip
    tensors = to_hf_tensors(States(encoder.state_dict(), head.state_dict(), None), shape)
    missing, unexpected = hf.load_state_dict(tensors, strict=False)
    assert not unexpected and all("decoder" in name or "position_ids" in name for name in missing)
    hf.tie_weights()
    batch = batch_of([12, 25])
    objective = CausalLMObjective(CausalLMConfig())
    masked = objective.corrupt(batch, seed=3)
    assert torch.equal(masked.batch.ids_T, batch.ids_T) and masked.batch.is_causal
    assert masked.denominators == {"causal": 10 + 23} and masked.num_maskable == 33
    loss = objective.loss(encoder.eval(), head.eval(), masked)
    expected, correct = 0.0, 0
    with torch.no_grad():
        for ids in batch.ids_T.split([12, 25]):
            logits = hf(ids[None]).logits[0, :-2]  # the last token, [SEP], is not predicted
            expected += float(F.cross_entropy(logits, ids[1:-1], reduction="sum"))
            correct += int((logits.argmax(-1) == ids[1:-1]).sum())
    assert float(loss.sums["causal"].detach()) == pytest.approx(expected, rel=1e-5)
    assert int(loss.metrics["accuracy"][0]) == correct


def test_the_first_token_of_a_text_without_cls_is_not_predicted() -> None:
    samples = [Sample(np.arange(5, 15), np.zeros(10, np.uint8), number=n) for n in range(3)]
    masked = CausalLMObjective(CausalLMConfig()).corrupt(pack(samples), seed=1)
    assert masked.positions_M.tolist() == [n for n in range(30) if n % 10]


@pytest.mark.parametrize("fraction", [0.15, 0.5])
def test_a_fraction_of_the_tokens_can_be_predicted(fraction: float) -> None:
    objective = CausalLMObjective(CausalLMConfig(predicted_fraction=fraction))
    masked = objective.corrupt(batch_of([102] * 50), seed=1)
    assert len(masked.positions_M) == pytest.approx(fraction * 5000, rel=0.02)


def test_causal_steps_are_a_function_of_the_step() -> None:
    objective = mntp(causal_fraction=0.25)
    batch = batch_of([40, 40])
    causal = [objective.corrupt(replace(batch, step=step), 7).batch.is_causal for step in range(2000)]
    assert sum(causal) / 2000 == pytest.approx(0.25, abs=0.03)
    alone = pack([Sample(np.arange(5, 30), np.zeros(25, np.uint8), number=9)])
    assert causal[:50] == [objective.corrupt(replace(alone, step=step), 7).batch.is_causal for step in range(50)]


@shapes
def test_a_masked_token_is_predicted_one_position_earlier(shape: EncoderConfig) -> None:
    torch.manual_seed(1)
    encoder, head = build_model(shape, VOCABULARY)
    objective = mntp(mask_rate=0.3, causal_fraction=0.0)
    masked = objective.corrupt(batch_of([20, 33]), seed=2)
    encoder.eval(), head.eval()
    with torch.no_grad():
        loss = objective.loss(encoder, head, masked)
        shifted = logits_at(encoder, head, masked.batch, masked.positions_M - 1)
        encoder.label_offset = 1  # how a loaded model does it
        assert torch.equal(logits_at(encoder, head, masked.batch, masked.positions_M), shifted)
    expected = F.cross_entropy(shifted, masked.labels_M, reduction="sum")
    torch.testing.assert_close(loss.sums["mntp"], expected)
    assert loss.metrics["masked_loss"][1] == len(masked.positions_M) and loss.metrics["causal_loss"][1] == 0


def test_boosted_words_are_masked_more_often() -> None:
    settings = MaskedNextTokenConfig(mask_rate=0.1, causal_fraction=0.0, boosted_words=("a",), boost_factor=5)
    objective = MaskedNextTokenObjective(settings, MaskedLMObjective(settings, MASK, np.arange(5, VOCABULARY), [(7,)]))
    batch = batch_of([202] * 40)
    words = replace(batch, token_flags_T=batch.token_flags_T | 1)  # each token is a word
    masked = objective.corrupt(words, seed=2)
    share = float((masked.labels_M == 7).double().mean())
    assert share > 3 * float((batch.ids_T == 7).double().mean())
    assert torch.equal(masked.batch.token_flags_T, words.token_flags_T)
