"""Attention weights of one sequence, against `output_attentions` of transformers for each family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM

from unmask.models import EncoderConfig, build_model
from unmask.models.annotated import TutorialConfig
from unmask.models.attention import attention_weights
from unmask.models.bert import BertConfig
from unmask.models.model import Model, save_model
from unmask.models.modernbert import ModernBertConfig
from unmask.models.neomme import NeoMMEConfig
from unmask.tokenization.settings import CharacterConfig
from unmask.tokenization.tokenizer import train_tokenizer

SHAPES = [
    BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=32),
    ModernBertConfig(
        num_hidden_layers=4, hidden_size=32, num_attention_heads=2, intermediate_size=32, local_attention=16,
        global_attn_every_n_layers=2,
    ),
    NeoMMEConfig(
        num_hidden_layers=4, hidden_size=32, embedding_rank=16, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=32, global_attn_every_n_layers=2, sliding_window=4, long_sliding_window=9,
    ),
]  # fmt: skip
LENGTHS = (1, 40, 150)  # a batch of 150 tokens is rounded by added samples


def build(shape: EncoderConfig) -> Model:
    torch.manual_seed(5)
    tokenizer = train_tokenizer(["the cat sat on the mat and looked at the moon. " * 4], CharacterConfig())
    encoder, head = build_model(shape, tokenizer.size)
    with torch.no_grad():  # larger weights, so that attention is far from uniform
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return Model(encoder.eval(), head.eval(), tokenizer, shape, {"context": 200, "words": "spaces"})


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.kind)
def test_weights_are_those_of_transformers(shape: EncoderConfig, tmp_path: Path) -> None:
    model = build(shape)
    save_model(tmp_path / "model", model)
    peer = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    draw = np.random.default_rng(2)
    for length in LENGTHS:
        ids = draw.integers(0, model.tokenizer.size, length).tolist()
        with torch.no_grad():
            expected = peer(input_ids=torch.tensor([ids]), output_attentions=True).attentions
        weights = attention_weights(model.encoder, ids)
        assert weights.shape == (shape.num_hidden_layers, shape.num_attention_heads, length, length)
        assert (weights - torch.cat(expected)).abs().max() < 1e-5
        if length > 1:
            assert weights.std() > 0.3 / length, "weights that are all equal would show nothing"


def test_recording_leaves_the_hidden_states_alone() -> None:
    model = build(TutorialConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=16))
    ids = list(range(9))
    before = model.log_probabilities([ids], [[3]])[0]
    weights = attention_weights(model.encoder, ids, is_causal=True)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 9))
    assert weights.triu(1).abs().max() == 0, "with causal attention, no token attends to a later one"
    assert torch.equal(model.log_probabilities([ids], [[3]])[0], before)
