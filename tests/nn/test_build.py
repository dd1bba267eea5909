from __future__ import annotations

import pytest
import torch

from unmask.nn import EncoderSettings, ModernSettings, TutorialSettings, build, flops_per_token, parameters

SHAPES: list[EncoderSettings] = [
    ModernSettings(),
    ModernSettings(layers=1, width=32, heads=2, feed_forward=40, global_every=1),
    TutorialSettings(),
    TutorialSettings(layers=1, width=16, heads=2, feed_forward=24),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parameters_are_those_of_the_modules(shape: EncoderSettings):
    modules = build(shape, 100)
    assert parameters(shape, 100) == sum(p.numel() for module in modules for p in module.parameters())


def test_flops_count_matrices_attention_and_the_asked_share():
    shape = ModernSettings(layers=2, width=8, heads=1, feed_forward=10, global_every=2, local_window=4)
    matrices = 2 * 2 * (4 * 64 + 3 * 80)
    attention = 4 * 8 * (16 + 4)
    head = 2 * (64 + 8 * 100)
    assert flops_per_token(shape, 100, 16, 0.25) == 3 * (matrices + attention + 0.25 * head)


def test_flops_of_a_forward_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    from unmask.contracts import Text as Sample
    from unmask.contracts import pack

    shape = TutorialSettings(layers=2, width=32, heads=2, feed_forward=40, dropout=0.0)
    encoder, head = build(shape, 50)
    ids = torch.arange(24).numpy()
    batch = pack([Sample(ids, ids.astype("uint8") * 0)] * 3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head(encoder(batch)[::2], encoder.token_table)
    # torch doesn't know the CPU's fused attention kernel
    counted = counter.get_total_flops() + 72 * 2 * 4 * 24 * 32
    assert 72 * flops_per_token(shape, 50, 24, 0.5) / 3 == counted
