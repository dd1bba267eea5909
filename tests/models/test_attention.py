from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unmask.core.types import Batch, Sample, pack
from unmask.models.attention import MAX_PADDING, AttentionPlan, attention, backend_of, plan_attention
from unmask.models.modernbert import ModernBertConfig, ModernBertEncoder

LENGTHS = st.lists(st.integers(1, 400), min_size=1, max_size=60)


def batch_of(lengths: list[int], vocabulary: int = 50) -> Batch:
    draw = np.random.default_rng(sum(lengths))
    samples = [Sample(draw.integers(0, vocabulary, n), np.zeros(n, np.uint8), number=i) for i, n in enumerate(lengths)]
    return pack(samples)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int | None) -> torch.Tensor:
    """Reference: attention of each sequence by itself, causal if the batch says so."""
    out = torch.zeros_like(v)
    for first, last in itertools.pairwise(batch.offsets[: batch.num_samples + 1]):
        position = torch.arange(last - first)
        distance = position[:, None] - position
        visible = torch.ones_like(distance, dtype=torch.bool) if window is None else distance.abs() <= window // 2
        if batch.is_causal:
            visible = visible & (distance >= 0)
        scores = torch.einsum("qhk,jhk->hqj", q[first:last], k[first:last]) * q.shape[-1] ** -0.5
        probabilities = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        out[first:last] = torch.einsum("hqj,jhk->qhk", probabilities, v[first:last])
    return out


def padded_pairs(plan: AttentionPlan) -> int:
    """Query-key pairs of all buckets, padding included."""
    return sum(len(bucket.lengths) * bucket.padded**2 for bucket in plan.buckets)


def attended_pairs(plan: AttentionPlan) -> int:
    """Query-key pairs within the sequences."""
    return sum(length**2 for length in plan.lengths)


def counted_flops(plan: AttentionPlan, window: int | None) -> int:
    q, k, v = torch.randn(3, sum(plan.lengths), 2, 8)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        attention(q, k, v, plan, window)
    return counter.get_total_flops()


def attended(plan: AttentionPlan, qkv: list[torch.Tensor], window: int | None) -> torch.Tensor:
    q, k, v = (plan.to_plan_order(x) for x in qkv)
    return plan.to_batch_order(attention(q, k, v, plan, window))


MIXES = [[64] * 8, [64] * 20 + [7, 3], [5, 400, 17, 64, 64, 200, 33], [700, 690, 12], [1], [321, 650, 650]]


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("lengths", MIXES, ids=str)
@pytest.mark.parametrize("window", [None, 128, 16])
def test_attention_in_a_batch_equals_attention_of_each_sequence(
    lengths: list[int], window: int | None, is_causal: bool
):
    torch.manual_seed(0)
    batch = replace(batch_of(lengths), is_causal=is_causal)
    qkv = [torch.randn(batch.tokens, 2, 8, requires_grad=True) for _ in range(3)]
    weight = torch.randn(batch.tokens, 2, 8)
    result = attended(plan_attention(batch), qkv, window)
    grads = torch.autograd.grad((result * weight).sum(), qkv)
    expected = reference(qkv[0], qkv[1], qkv[2], batch, window)
    expected_grads = torch.autograd.grad((expected * weight).sum(), qkv)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("lengths", MIXES, ids=str)
@pytest.mark.parametrize("window", [None, 128])
def test_half_precision_on_a_cpu_equals_the_reference(lengths: list[int], window: int | None, is_causal: bool):
    torch.manual_seed(0)
    batch = replace(batch_of(lengths), is_causal=is_causal)
    qkv = [torch.randn(batch.offsets[-1], 2, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    plan = plan_attention(batch, dtype=torch.bfloat16)
    assert plan.backend == "eager"
    result = attended(plan, qkv, window)
    full = [x.detach().float().requires_grad_() for x in qkv]
    expected = reference(full[0], full[1], full[2], batch, window)
    torch.testing.assert_close(result.float(), expected, atol=0.03, rtol=0.03)
    weight = torch.randn_like(expected)
    for grad, expected_grad in zip(
        torch.autograd.grad((result * weight).sum(), qkv),
        torch.autograd.grad((expected * weight).sum(), full),
        strict=True,
    ):
        assert torch.isfinite(grad).all()
        torch.testing.assert_close(grad.float(), expected_grad, atol=0.1, rtol=0.1)


def test_one_long_sequence_does_not_pad_short_ones():
    plan = plan_attention(batch_of([8] * 32 + [512] + [8] * 32))
    assert padded_pairs(plan) <= 1.3 * attended_pairs(plan)
    assert attended_pairs(plan) == 512**2 + 64 * 8**2


@given(LENGTHS)
@settings(max_examples=60, deadline=None)
def test_padding_is_bounded_and_the_order_is_reversible(lengths: list[int]):
    batch = batch_of(lengths)
    plan = plan_attention(batch)
    assert padded_pairs(plan) <= (1 + 2 * MAX_PADDING) * attended_pairs(plan)
    assert sum(bucket.tokens for bucket in plan.buckets) == sum(lengths)
    x_T = torch.arange(batch.offsets[-1])
    assert torch.equal(plan.to_batch_order(plan.to_plan_order(x_T)), x_T)
    position = [i for n in lengths for i in range(n)]
    assert plan.to_batch_order(plan.position_T).tolist() == position


@pytest.mark.parametrize("lengths", [[128] * 64, [128] * 64 + [100], [100] + [128] * 64])
def test_equally_long_sequences_are_reshaped_without_copies(lengths: list[int]):
    plan = plan_attention(batch_of(lengths))
    assert plan.order_T is None
    assert {(len(bucket.lengths), bucket.index_T is None) for bucket in plan.buckets} >= {(64, True)}


def test_cost_of_a_local_window_is_linear():
    plan = plan_attention(batch_of([1024] * 4))
    whole, local = (counted_flops(plan, window) for window in (None, 128))
    assert local / whole == pytest.approx(192 / 1024)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(5, 400), min_size=2, max_size=8))
def test_a_sequence_does_not_depend_on_its_neighbors(lengths: list[int]):
    torch.manual_seed(1)
    shape = ModernBertConfig(
        num_hidden_layers=3,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=48,
        global_attn_every_n_layers=2,
        local_attention=64,
    )
    encoder = ModernBertEncoder(shape, 50).eval()
    batch = batch_of(lengths)
    with torch.no_grad():
        together = encoder(batch)
        for first, last in itertools.pairwise(batch.offsets[: batch.num_samples + 1]):
            alone = pack([Sample(batch.ids_T[first:last].numpy(), batch.token_flags_T[first:last].numpy())])
            torch.testing.assert_close(together[first:last], encoder(alone), atol=1e-5, rtol=0)


def test_dropout_uses_torchs_generator():
    batch = batch_of([30, 17, 30])
    plan = plan_attention(batch, dropout=0.5)
    q, k, v = torch.randn(3, 77, 2, 8)
    outs: list[torch.Tensor] = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(attention(q, k, v, plan, dropout=0.5))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_backend_depends_on_device_dtype_and_dropout():
    cpu = torch.device("cpu")
    assert backend_of(cpu, torch.float32) == "padded"
    assert backend_of(cpu, torch.bfloat16) == "eager"
    assert backend_of(cpu, torch.bfloat16, dropout=0.1) == "padded"
    assert backend_of(torch.device("cuda"), torch.float32) == "padded"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 128])
def test_variable_length_attention_on_a_gpu_equals_the_reference(window: int | None):
    batch = batch_of([5, 400, 17, 64, 300]).to("cuda")
    qkv = [torch.randn(batch.offsets[-1], 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    plan = plan_attention(batch, dtype=torch.bfloat16)
    assert plan.backend == "variable-length"
    expected = reference(qkv[0].float(), qkv[1].float(), qkv[2].float(), batch.to("cpu"), window)
    torch.testing.assert_close(attended(plan, qkv, window).float(), expected, atol=0.03, rtol=0.03)
