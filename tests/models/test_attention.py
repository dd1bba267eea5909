from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.core.types import Batch, Sample, pack
from unmask.models.attention import WASTE, AttentionPlan, attention, backend_of, padded_pairs, plan_attention
from unmask.models.modernbert import ModernBertConfig, ModernBertEncoder

LENGTHS = st.lists(st.integers(1, 400), min_size=1, max_size=60)


def batch_of(lengths: list[int], *, filler: int = 0, look: str = "both", vocabulary: int = 50) -> Batch:
    draw = np.random.default_rng(sum(lengths))
    texts = [Sample(draw.integers(0, vocabulary, n), np.zeros(n, np.uint8), number=i) for i, n in enumerate(lengths)]
    return pack(texts, slots=sum(lengths) + filler, look=look)  # pyright: ignore[reportArgumentType]


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, window: int | None) -> torch.Tensor:
    """Each text for itself, in so many words."""
    out = torch.zeros_like(v)
    for first, last in itertools.pairwise(batch.offsets[: batch.num_samples + 1]):
        place = torch.arange(last - first)
        apart = place[:, None] - place
        seen = torch.ones_like(apart, dtype=torch.bool) if window is None else apart.abs() <= window // 2
        seen = seen & (apart >= 0) if batch.look == "left" else seen
        scores = torch.einsum("qhk,jhk->hqj", q[first:last], k[first:last]) * q.shape[-1] ** -0.5
        chance = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[first:last] = torch.einsum("hqj,jhk->qhk", chance, v[first:last])
    return out


def attended(layout: AttentionPlan, qkv: list[torch.Tensor], window: int | None) -> torch.Tensor:
    q, k, v = (layout.arranged(x) for x in qkv)
    return layout.restored(attention(q, k, v, layout, window))


MIXES = [[64] * 8, [64] * 20 + [7, 3], [5, 400, 17, 64, 64, 200, 33], [700, 690, 12], [1], [321, 650, 650]]


@pytest.mark.parametrize("lengths", MIXES, ids=str)
@pytest.mark.parametrize("window", [None, 128, 16])
@pytest.mark.parametrize("look", ["both", "left"])
@pytest.mark.parametrize("filler", [0, 9])
def test_every_layout_equals_each_text_for_itself(lengths: list[int], window: int | None, look: str, filler: int):
    torch.manual_seed(0)
    batch = batch_of(lengths, look=look, filler=filler)
    slots = batch.offsets[-1]
    qkv = [torch.randn(slots, 2, 8, requires_grad=True) for _ in range(3)]
    real = torch.randn(slots, 2, 8)
    real[batch.tokens :] = 0
    mine = attended(plan_attention(batch), qkv, window)
    grads = torch.autograd.grad((mine * real).sum(), qkv)
    want = plain(qkv[0], qkv[1], qkv[2], batch, window)
    want_grads = torch.autograd.grad((want * real).sum(), qkv)
    torch.testing.assert_close(mine, want, atol=1e-5, rtol=1e-4)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(grad, want_grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lengths", MIXES, ids=str)
@pytest.mark.parametrize("window", [None, 128])
def test_half_precision_on_a_cpu_is_the_same_attention(lengths: list[int], window: int | None):
    torch.manual_seed(0)
    batch = batch_of(lengths, filler=5)
    qkv = [torch.randn(batch.offsets[-1], 2, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    layout = plan_attention(batch, dtype=torch.bfloat16)
    assert layout.backend == "eager"
    mine = attended(layout, qkv, window)
    full = [x.detach().float().requires_grad_() for x in qkv]
    want = plain(full[0], full[1], full[2], batch, window)
    torch.testing.assert_close(mine.float(), want, atol=0.03, rtol=0.03)
    weight = torch.randn_like(want)
    for grad, want_grad in zip(
        torch.autograd.grad((mine * weight).sum(), qkv), torch.autograd.grad((want * weight).sum(), full), strict=True
    ):
        assert torch.isfinite(grad).all()
        torch.testing.assert_close(grad.float(), want_grad, atol=0.1, rtol=0.1)


def test_one_long_text_among_short_ones_pays_for_itself_alone():
    layout = plan_attention(batch_of([8] * 32 + [512] + [8] * 32))
    assert padded_pairs(layout) <= 1.3 * layout.attended_pairs
    assert layout.attended_pairs == 512**2 + 64 * 8**2


@given(LENGTHS)
@settings(max_examples=60, deadline=None)
def test_padding_stays_small_and_the_order_can_be_undone(lengths: list[int]):
    batch = batch_of(lengths, filler=len(lengths) % 3)
    layout = plan_attention(batch)
    assert padded_pairs(layout) <= (1 + 2 * WASTE) * layout.attended_pairs
    assert sum(bucket.slots for bucket in layout.buckets) == sum(lengths)
    x_T = torch.arange(batch.offsets[-1])
    assert torch.equal(layout.restored(layout.arranged(x_T)), x_T)
    place = [i for n in [*lengths, batch.filler] for i in range(n)]
    assert layout.restored(layout.position_T).tolist() == place


@pytest.mark.parametrize("lengths", [[128] * 64, [128] * 64 + [100], [100] + [128] * 64])
def test_equally_long_texts_are_reshaped_and_never_copied(lengths: list[int]):
    layout = plan_attention(batch_of(lengths))
    assert layout.order_T is None
    assert {(len(bucket.lengths), bucket.place_T is None) for bucket in layout.buckets} >= {(64, True)}


def test_a_local_window_spares_long_texts_the_square():
    layout = plan_attention(batch_of([1024] * 4))
    assert padded_pairs(layout, 128) == 4 * 1024 * 192
    assert padded_pairs(layout) == 4 * 1024**2


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(5, 400), min_size=2, max_size=8))
def test_the_neighbours_of_a_text_do_not_matter(lengths: list[int]):
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
    batch = batch_of(lengths, filler=3)
    with torch.no_grad():
        together = encoder(batch)
        for first, last in itertools.pairwise(batch.offsets[: batch.num_samples + 1]):
            alone = pack([Sample(batch.ids_T[first:last].numpy(), batch.token_flags_T[first:last].numpy())])
            torch.testing.assert_close(together[first:last], encoder(alone), atol=1e-5, rtol=0)


def test_dropout_is_drawn_from_the_generator_that_the_loop_seeds():
    batch = batch_of([30, 17, 30])
    layout = plan_attention(batch, dropout=0.5)
    q, k, v = torch.randn(3, 77, 2, 8)
    outs: list[torch.Tensor] = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(attention(q, k, v, layout, dropout=0.5))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_the_way_taken_follows_from_facts():
    cpu = torch.device("cpu")
    assert backend_of(cpu, torch.float32) == "padded"
    assert backend_of(cpu, torch.bfloat16) == "eager"
    assert backend_of(cpu, torch.bfloat16, dropout=0.1) == "padded"
    assert backend_of(torch.device("cuda"), torch.float32) == "padded"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("look", ["both", "left"])
def test_variable_length_attention_on_a_gpu_is_the_same(window: int | None, look: str):
    batch = batch_of([5, 400, 17, 64, 300], look=look).to("cuda")
    qkv = [torch.randn(batch.offsets[-1], 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    layout = plan_attention(batch, dtype=torch.bfloat16)
    assert layout.backend == "variable-length"
    want = plain(qkv[0].float(), qkv[1].float(), qkv[2].float(), batch.to("cpu"), window)
    torch.testing.assert_close(attended(layout, qkv, window).float(), want, atol=0.03, rtol=0.03)
