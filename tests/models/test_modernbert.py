from __future__ import annotations

import numpy as np
import pytest
import torch

from unmask.core.errors import RecipeError
from unmask.core.types import Sample, pack
from unmask.models import EncoderModule, HeadModule, build_model
from unmask.models.modernbert import ModernBertConfig

SMALL = ModernBertConfig(
    num_hidden_layers=3, hidden_size=32, num_attention_heads=2, intermediate_size=48, global_attn_every_n_layers=2
)


def gradients(threads: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    encoder, head = build_model(SMALL, 40)
    draw = np.random.default_rng(0)
    batch = pack([Sample(draw.integers(0, 40, n), np.zeros(n, np.uint8)) for n in (50, 50, 31, 9)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        hidden_TD = encoder(batch)
        positions_M = torch.arange(0, 140, 7)
        head(hidden_TD.index_select(0, positions_M), encoder.token_embedding).logsumexp(-1).sum().backward()
    finally:
        torch.set_num_threads(before)
    return {name: p.grad for name, p in (*encoder.named_parameters(), *head.named_parameters()) if p.grad is not None}


def test_interface_and_shapes():
    encoder, head = build_model(SMALL, 40)
    assert isinstance(encoder, EncoderModule)
    assert isinstance(head, HeadModule)
    assert encoder.token_embedding.shape == (40, 32)
    assert len(encoder.blocks) == 3


def test_gradients_are_bit_identical():
    first, second = gradients(2), gradients(2)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_deterministic_algorithms_are_supported():
    torch.use_deterministic_algorithms(True)
    try:
        assert gradients(1)
    finally:
        torch.use_deterministic_algorithms(False)


def test_every_parameter_has_a_gradient():
    encoder, head = build_model(SMALL, 40)
    names = {name for module in (encoder, head) for name, _ in module.named_parameters()}
    assert set(gradients(1)) == names


def test_initial_weights_depend_on_the_seed():
    states: list[dict[str, torch.Tensor]] = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        states.append(build_model(SMALL, 40)[0].state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["token_embedding"], states[2]["token_embedding"])
    assert states[0]["token_embedding"].abs().max() <= 0.04
    assert states[0]["blocks.1.attention.output.weight"].abs().max() <= 0.04 / 6**0.5


def test_autocast_is_close_to_float32():
    torch.manual_seed(0)
    encoder, _ = build_model(SMALL, 40)
    batch = pack([Sample(np.arange(n) % 40, np.zeros(n, np.uint8)) for n in (200, 31, 31)])
    with torch.no_grad():
        full = encoder(batch)
        with torch.autocast("cpu", torch.bfloat16):
            half = encoder(batch)
    torch.testing.assert_close(half.float(), full, atol=0.05, rtol=0.05)


def test_training_after_inference_mode():
    encoder, _ = build_model(SMALL, 40)
    batch = pack([Sample(np.arange(20), np.zeros(20, np.uint8))])
    with torch.inference_mode():
        encoder(batch)
    encoder(batch).sum().backward()


@pytest.mark.parametrize(
    ("invalid", "where"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "num_attention_heads"),
        ({"hidden_size": 36, "num_attention_heads": 4}, "num_attention_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"local_attention": 127}, "local_attention"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps"),
        ({"attention_dropout": 1.0}, "attention_dropout"),
    ],
)
def test_an_invalid_config_is_refused_with_a_hint(invalid: dict[str, float], where: str):
    with pytest.raises(RecipeError) as refused:
        ModernBertConfig(**invalid)  # pyright: ignore[reportArgumentType]
    assert refused.value.location == where
    assert refused.value.hint
