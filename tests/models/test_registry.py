from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unmask.core.types import Sample, pack
from unmask.models import (
    EncoderConfig,
    build_model,
    flops_per_token,
    non_embedding_parameters,
    num_parameters,
    products,
)
from unmask.models.annotated import TutorialConfig
from unmask.models.bert import BertConfig
from unmask.models.modernbert import ModernBertConfig

SHAPES: list[EncoderConfig] = [
    ModernBertConfig(),
    ModernBertConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=40, global_attn_every_n_layers=1
    ),
    BertConfig(),
    BertConfig(
        num_hidden_layers=1,
        hidden_size=16,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=9,
        type_vocab_size=3,
    ),
    TutorialConfig(),
    TutorialConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=24),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parameter_counts_equal_those_of_the_modules(shape: EncoderConfig):
    modules = build_model(shape, 100)
    counted = sum(p.numel() for module in modules for p in module.parameters())
    assert num_parameters(shape, 100) == counted
    assert non_embedding_parameters(shape, 100) == counted - modules[0].get_parameter("token_embedding").numel()


def test_flops_count_matrices_attention_and_masked_tokens():
    shape = ModernBertConfig(
        num_hidden_layers=2,
        hidden_size=8,
        num_attention_heads=1,
        intermediate_size=10,
        global_attn_every_n_layers=2,
        local_attention=4,
    )
    every_token = 2 * (4 * 64 + 3 * 80 + 3 * 64)
    attention = 4 * 8 * (16 + 4)
    masked = 2 * (64 + 3 * 80 + 64 + 8 * 100)  # output and feed-forward network of the last layer, and the head
    assert flops_per_token(shape, 100, 16, 0.25) == 3 * (every_token + attention + 0.25 * masked)


@pytest.mark.parametrize(
    "shape",
    [
        TutorialConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=40, dropout=0.0),
        BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=40),
        ModernBertConfig(
            num_hidden_layers=2,
            hidden_size=32,
            num_attention_heads=2,
            intermediate_size=40,
            global_attn_every_n_layers=1,
        ),
    ],
    ids=lambda shape: shape.kind,
)
def test_flops_of_a_step_equal_those_that_torch_counts(shape: EncoderConfig):
    """Exactly, forward and backward, for sequences of one length without a local window."""
    encoder, head = build_model(shape, 50)
    ids = torch.arange(24).numpy()
    batch = pack([Sample(ids, ids.astype("uint8") * 0)] * 3)
    # torch doesn't count the FLOPs of the CPU's fused attention kernel
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        head(encoder(batch, torch.arange(0, 72, 2)), encoder.token_embedding).sum().backward()
    assert 72 * flops_per_token(shape, 50, 24, 0.5) == counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_have_the_flops_of_a_forward_pass_without_attention(shape: EncoderConfig):
    operations = sum(2 * rows * inner * columns for rows, inner, columns in products(shape, 100, 1000, 150))
    assert 3 * operations == pytest.approx(1000 * flops_per_token(shape, 100, 0, 0.15))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vectors_at_positions_are_those_of_the_whole_batch(shape: EncoderConfig):
    """Also if attention sorts the sequences by length; gradients too, and the order and repeats of positions."""
    encoder = build_model(shape, 50)[0].eval()
    generator = np.random.default_rng(0)
    samples = [Sample(generator.integers(0, 50, n), np.zeros(n, np.uint8)) for n in (5, 9, 7, 3)]
    batch, positions_M = pack(samples), torch.tensor([20, 3, 3, 23, 0])
    gradients = []
    for hidden_MD in (encoder(batch, positions_M), encoder(batch).index_select(0, positions_M)):
        assert hidden_MD.shape == (5, encoder.hidden_size)
        parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
        weights_MD = torch.arange(hidden_MD.numel()).view_as(hidden_MD) / hidden_MD.numel()
        gradients.append([hidden_MD, *torch.autograd.grad((hidden_MD * weights_MD).sum(), parameters)])
    for some, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(some, whole, rtol=1e-4, atol=1e-5)
