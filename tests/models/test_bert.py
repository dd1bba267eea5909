from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.core.errors import RecipeError
from unmask.core.types import Batch, Sample, pack
from unmask.models import EncoderModule, HeadModule, build_model, build_pair
from unmask.models.bert import BertConfig

SMALL = BertConfig(
    num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48, max_position_embeddings=64
)


def text(length: int, number: int, segments: bool = False) -> Sample:
    draw = np.random.default_rng(number)
    segment = (np.arange(length) > length // 2).astype(np.int64) if segments else None
    return Sample(draw.integers(1, 40, length), np.zeros(length, np.uint8), number=number, token_type_ids=segment)


def gradients(batch: Batch, threads: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    encoder, head = build_model(SMALL, 40)
    pair = build_pair(SMALL)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        hidden_TD = encoder(batch)
        positions_M = torch.arange(0, batch.tokens, 7)
        logits_MV = head(hidden_TD.index_select(0, positions_M), encoder.token_embedding)
        (logits_MV.logsumexp(-1).sum() + pair(hidden_TD, batch)[:, 0].sum()).backward()
    finally:
        torch.set_num_threads(before)
    named = [item for module in (encoder, head, pair) for item in module.named_parameters()]
    return {name: p.grad for name, p in named if p.grad is not None}


def test_interface_and_shapes():
    encoder, head = build_model(SMALL, 40)
    assert isinstance(encoder, EncoderModule) and isinstance(head, HeadModule)
    assert encoder.token_embedding.shape == (40, 32) and len(encoder.blocks) == 2
    hidden_TD = encoder(pack([text(9, 1), text(4, 2)]))
    assert hidden_TD.shape == (13, 32) and hidden_TD.dtype == torch.float32
    assert head(hidden_TD[[3, 7]], encoder.token_embedding).shape == (2, 40)


@pytest.mark.parametrize("segments", [False, True])
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(2, 64), min_size=1, max_size=9))
def test_a_sequence_does_not_depend_on_its_neighbors(segments: bool, lengths: list[int]) -> None:
    torch.manual_seed(1)
    encoder, pair = build_model(SMALL, 40)[0].eval(), build_pair(SMALL)
    samples = [text(length, number, segments) for number, length in enumerate(lengths)]
    batch = pack(samples)
    with torch.no_grad():
        hidden_TD = encoder(batch)
        pairs_B2 = pair(hidden_TD, batch)
        assert pairs_B2.shape == (len(lengths), 2)
        for one, row_SD, pair_2 in zip(samples, hidden_TD.split(lengths), pairs_B2, strict=True):
            alone = pack([one])
            alone_SD = encoder(alone)
            torch.testing.assert_close(row_SD, alone_SD, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(pair_2, pair(alone_SD, alone)[0], atol=1e-5, rtol=1e-5)


def test_missing_token_types_equal_token_type_0():
    torch.manual_seed(1)
    encoder = build_model(SMALL, 40)[0].eval()
    none = text(20, 3)
    zeros = Sample(none.ids, none.token_flags, token_type_ids=np.zeros(20, np.int64))
    ones = Sample(none.ids, none.token_flags, token_type_ids=np.ones(20, np.int64))
    with torch.no_grad():
        assert torch.equal(encoder(pack([none])), encoder(pack([zeros])))
        assert not torch.allclose(encoder(pack([none])), encoder(pack([ones])), atol=1e-3)


def test_every_parameter_has_a_finite_gradient():
    batch = pack([text(n, n, segments=True) for n in (30, 3, 64, 2, 17)])
    found = gradients(batch)
    encoder, head = build_model(SMALL, 40)
    modules = (encoder, head, build_pair(SMALL))
    assert set(found) == {name for module in modules for name, _ in module.named_parameters()}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


def test_gradients_are_bit_identical():
    batch = pack([text(n, n, segments=True) for n in (50, 50, 31, 9)])
    first, second = gradients(batch, threads=2), gradients(batch, threads=2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.use_deterministic_algorithms(True)
    try:
        assert gradients(batch)
    finally:
        torch.use_deterministic_algorithms(False)


def test_initial_weights_have_berts_distribution_and_depend_on_the_seed():
    states: list[dict[str, torch.Tensor]] = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        states.append(build_model(SMALL, 400)[0].state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["token_embedding"], states[2]["token_embedding"])
    for name, tensor in states[0].items():
        if "norm" in name:
            assert (tensor == name.endswith("weight")).all(), name
        elif name.endswith("bias"):
            assert not tensor.any(), name
        else:
            assert tensor.abs().max() <= 0.04 and 0.01 < tensor.std() < 0.025, name


def test_matrix_parameters_exclude_embeddings():
    encoder, head = build_model(SMALL, 40)
    named = [
        (f"{module}.{name}", p)
        for module, part in (("encoder", encoder), ("head", head))
        for name, p in part.named_parameters()
    ]
    matrices = [*encoder.matrix_parameters(), *head.matrix_parameters()]
    selected = {name for name, parameter in named if any(parameter is matrix for matrix in matrices)}
    assert len(selected) == 2 * 6 + 1 and "head.dense.weight" in selected
    assert {name for name, p in named if p.ndim == 2} - selected == {
        "encoder.token_embedding", "encoder.position_embedding", "encoder.token_type_embedding",
    }  # fmt: skip
    assert [parameter is encoder.position_embedding for parameter in encoder.position_parameters()] == [True]


def test_dropout_is_active_only_in_training():
    torch.manual_seed(0)
    dropping = BertConfig(
        num_hidden_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=48,
        hidden_dropout=0.3,
        attention_dropout=0.3,
    )
    encoder = build_model(dropping, 40)[0]
    batch = pack([text(30, 0)])
    with torch.no_grad():
        assert not torch.equal(encoder(batch), encoder(batch))
        encoder.eval()
        assert torch.equal(encoder(batch), encoder(batch))


def test_autocast_is_close_to_float32():
    torch.manual_seed(0)
    encoder, head = build_model(SMALL, 40)
    batch = pack([text(n, n) for n in (64, 31, 31)])
    with torch.no_grad():
        full = head(encoder(batch), encoder.token_embedding)
        with torch.autocast("cpu", torch.bfloat16):
            half = head(encoder(batch), encoder.token_embedding)
    torch.testing.assert_close(half.float(), full, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("invalid", "where"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "num_attention_heads"),
        ({"type_vocab_size": 0}, "type_vocab_size"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps"),
        ({"hidden_dropout": 1.0}, "hidden_dropout"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
    ],
)
def test_an_invalid_config_is_refused_with_a_hint(invalid: dict[str, float], where: str):
    with pytest.raises(RecipeError) as refused:
        BertConfig(**invalid)  # pyright: ignore[reportArgumentType]
    assert refused.value.location == where
    assert refused.value.hint
