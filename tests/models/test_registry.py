from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unmask.core.types import Text, pack
from unmask.models import EncoderSettings, build, flops_per_token, parameters, parameters_beside_the_table, products
from unmask.models.annotated import TutorialSettings
from unmask.models.bert import ClassicSettings
from unmask.models.modernbert import ModernSettings

SHAPES: list[EncoderSettings] = [
    ModernSettings(),
    ModernSettings(layers=1, width=32, heads=2, feed_forward=40, global_every=1),
    ClassicSettings(),
    ClassicSettings(layers=1, width=16, heads=4, feed_forward=24, longest=9, segments=3),
    TutorialSettings(),
    TutorialSettings(layers=1, width=16, heads=2, feed_forward=24),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parameters_are_those_of_the_modules(shape: EncoderSettings):
    modules = build(shape, 100)
    counted = sum(p.numel() for module in modules for p in module.parameters())
    assert parameters(shape, 100) == counted
    assert parameters_beside_the_table(shape, 100) == counted - modules[0].get_parameter("token_table").numel()


def test_flops_count_matrices_attention_and_the_asked_share():
    shape = ModernSettings(layers=2, width=8, heads=1, feed_forward=10, global_every=2, local_window=4)
    matrices = 2 * 2 * (4 * 64 + 3 * 80)
    attention = 4 * 8 * (16 + 4)
    head = 2 * (64 + 8 * 100)
    assert flops_per_token(shape, 100, 16, 0.25) == 3 * (matrices + attention + 0.25 * head)


@pytest.mark.parametrize(
    "shape",
    [
        TutorialSettings(layers=2, width=32, heads=2, feed_forward=40, dropout=0.0),
        ClassicSettings(layers=2, width=32, heads=2, feed_forward=40),
        ModernSettings(layers=2, width=32, heads=2, feed_forward=40, global_every=1),
    ],
    ids=lambda shape: shape.kind,
)
def test_flops_of_a_step_are_those_that_torch_counts(shape: EncoderSettings):
    """To the last one, forward and backward, for texts of one length and no local window."""
    encoder, head = build(shape, 50)
    ids = torch.arange(24).numpy()
    batch = pack([Text(ids, ids.astype("uint8") * 0)] * 3)
    # torch doesn't know what the CPU's fused attention kernel costs
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        head(encoder(batch)[::2], encoder.token_table).sum().backward()
    assert 72 * flops_per_token(shape, 50, 24, 0.5) == counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_the_forward_without_attention(shape: EncoderSettings):
    operations = sum(2 * rows * inner * columns for rows, inner, columns in products(shape, 100, 1000, 150))
    assert 3 * operations == pytest.approx(1000 * flops_per_token(shape, 100, 0, 0.15))
