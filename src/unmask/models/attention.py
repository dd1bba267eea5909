"""Attention over packed sequences: variable-length, padded or eager, with the same result.

`plan_attention` is called once per forward pass, `attention` once per layer. Attention never crosses a sequence, and no
T x T mask is built. `backend_of` chooses the backend by device, dtype and dropout alone:

- "variable-length": FlashAttention over cumulative sequence lengths; CUDA, half precision, no dropout.
- "padded": `scaled_dot_product_attention` over buckets of sequences of similar length; all other cases.
- "eager": the same buckets, with two matrix products and a softmax; half precision on a CPU, where the fused kernel is
  2 to 5 times slower (4,096 tokens, 4 heads x 64, forward and backward, one thread: sequences of 32 tokens 41 against
  8 ms, of 128 tokens 56 against 22 ms; at 512 tokens they are equal. In float32 the fused kernel is always faster).

Sequences are sorted by length once, before the first layer, so that every bucket is a contiguous slice. In training,
the sequences of a bucket are usually equally long. Building the bucket is then only a reshape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from unmask.core.types import SPECIAL, Batch, Sample, pack

Backend = Literal["variable-length", "padded", "eager"]
MaskKey = tuple[int, int | None, torch.dtype]  # bucket number, half of the local window, dtype

MAX_PADDING = 0.15  # maximum ratio of padded to real query-key pairs in a bucket
_SPARE_PAIRS = 4096  # padded pairs that cost less than one more bucket; limited to 1 % of the pairs of the batch
_MIN_UNIFORM_TOKENS = 1024  # equally long sequences with this many tokens get a bucket of their own, without mask
_BLOCK = 64  # minimum block size of local attention in tokens; sequences longer than five blocks are split
_MAX_EAGER_KEYS = 512  # beyond this, the fused kernel is as fast and doesn't store S x S probabilities
_MASKED_SCORE = -1e30  # finite, so that a padded query without keys is not NaN (its gradient would be 0 x NaN)
_HALF = (torch.bfloat16, torch.float16)
_NO_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True, eq=False)
class Bucket:
    """Consecutive sequences of similar length, padded to `padded` tokens each."""

    lengths: tuple[int, ...]
    padded: int
    index_T: Tensor | None  # index of each token in the flattened (sequences x padded); None: nothing is padded
    length_N: Tensor | None  # `lengths` as a tensor on the device; None if all are equal

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return sum(self.lengths)


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Order and buckets of a batch's sequences during one forward pass."""

    backend: Backend
    lengths: tuple[int, ...]  # of the sequences, in plan order
    cu_seqlens: Int[Tensor, "B1"]
    position_T: Int[Tensor, "T"]  # position of each token within its sequence
    max_seqlen: int
    order_T: Int[Tensor, "T"] | None  # batch index of each token in plan order; None: the orders are equal
    inverse_T: Int[Tensor, "T"] | None
    buckets: tuple[Bucket, ...]  # empty for "variable-length"
    is_causal: bool = False
    masks: dict[MaskKey, Tensor | None] = field(default_factory=dict, repr=False, compare=False)

    def to_plan_order(self, x_T: Tensor) -> Tensor:
        """Return per-token values, given in batch order, in plan order."""
        return x_T if self.order_T is None else x_T.index_select(0, self.order_T)

    def to_batch_order(self, x_T: Tensor) -> Tensor:
        """Return per-token values, given in plan order, in batch order."""
        return x_T if self.inverse_T is None else x_T.index_select(0, self.inverse_T)

    def rows_of(self, positions_M: Int[Tensor, "M"]) -> Int[Tensor, "M"]:
        """Return the plan indices of tokens that are given by their batch indices."""
        return positions_M if self.inverse_T is None else self.inverse_T.index_select(0, positions_M)

    def at(self, x_T: Tensor, positions_M: Int[Tensor, "M"] | None) -> Tensor:
        """Return per-token values, given in plan order, at positions of the batch; None: all, in batch order."""
        return self.to_batch_order(x_T) if positions_M is None else x_T.index_select(0, self.rows_of(positions_M))


def backend_of(device: torch.device, dtype: torch.dtype, dropout: float = 0.0, head_width: int = 64) -> Backend:
    """Return the attention backend for a device, dtype of the queries, attention dropout and head width.

    FlashAttention supports head widths that are multiples of 8 up to 256, on compute capability 8.0 and later.
    """
    if dropout > 0 or dtype not in _HALF:
        return "padded"
    if device.type == "cpu":
        return "eager"
    is_supported = head_width % 8 == 0 and head_width <= 256
    if device.type == "cuda" and is_supported and torch.cuda.get_device_capability(device) >= (8, 0):
        return "variable-length"
    return "padded"


def plan_attention(
    batch: Batch, *, dtype: torch.dtype = torch.float32, dropout: float = 0.0, head_width: int = 64
) -> AttentionPlan:
    """Return the attention plan of one forward pass. `dtype` is that of the queries."""
    device = batch.ids_T.device
    backend = backend_of(device, dtype, dropout, head_width)
    lengths = [last - first for first, last in pairwise(batch.offsets)]
    sequences = list(range(len(lengths)))
    descending = all(length >= following for length, following in pairwise(lengths))
    ascending = all(length <= following for length, following in pairwise(lengths))
    order_T = inverse_T = None
    cu_seqlens = batch.cu_seqlens
    if backend != "variable-length" and not (descending or ascending):
        sequences.sort(key=lambda sequence: -lengths[sequence])
        starts = torch.tensor([batch.offsets[sequence] for sequence in sequences])
        lengths = [lengths[sequence] for sequence in sequences]
        counts = torch.tensor(lengths)
        firsts = counts.cumsum(0) - counts
        order_T = torch.arange(batch.offsets[-1]) + torch.repeat_interleave(starts - firsts, counts)
        inverse_T = torch.empty_like(order_T)
        inverse_T[order_T] = torch.arange(len(order_T))
        order_T, inverse_T = order_T.to(device), inverse_T.to(device)
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        descending = True
    tokens = batch.offsets[-1]
    first_T = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=tokens)
    return AttentionPlan(
        backend=backend,
        lengths=tuple(lengths),
        cu_seqlens=cu_seqlens,
        position_T=torch.arange(tokens, device=device) - first_T,
        max_seqlen=batch.max_seqlen,
        order_T=order_T,
        inverse_T=inverse_T,
        buckets=() if backend == "variable-length" else _buckets(lengths, descending, device),
        is_causal=batch.is_causal,
    )


def _buckets(lengths: Sequence[int], descending: bool, device: torch.device) -> tuple[Bucket, ...]:
    """Return buckets of consecutive sequences. `lengths` must be sorted, in descending or ascending order."""
    sizes = _bucket_sizes(lengths if descending else lengths[::-1])
    buckets: list[Bucket] = []
    first = 0
    for size in sizes if descending else reversed(sizes):
        bucket_lengths = tuple(lengths[first : first + size])
        first += size
        padded = max(bucket_lengths)
        index_T = length_N = None
        if min(bucket_lengths) < padded:
            length_N = torch.tensor(bucket_lengths)
            column = torch.arange(padded)
            index_T = (column < length_N[:, None]).flatten().nonzero()[:, 0].to(device)
            length_N = length_N.to(device)
        buckets.append(Bucket(bucket_lengths, padded, index_T, length_N))
    return tuple(buckets)


def _bucket_sizes(lengths: Sequence[int]) -> list[int]:
    """Return the number of sequences in each bucket, filled greedily. `lengths` must be in descending order."""
    spare = min(_SPARE_PAIRS, sum(length * length for length in lengths) // 100)
    sizes: list[int] = []
    first = 0
    while first < len(lengths):
        longest = lengths[first]
        pairs, stop = 0, first
        while stop < len(lengths):
            is_uniform = lengths[stop] < longest == lengths[stop - 1]
            ends_uniform = is_uniform and (stop - first) * longest >= _MIN_UNIFORM_TOKENS
            new_pairs = pairs + lengths[stop] ** 2
            padding = (stop + 1 - first) * longest**2 - new_pairs
            if ends_uniform or padding > max(MAX_PADDING * new_pairs, spare):
                break
            pairs, stop = new_pairs, stop + 1
        sizes.append(stop - first)
        first = stop
    return sizes


def _block_size(padded: int, half: int | None) -> int | None:
    """Return the block size of local attention at this padded length; None: sequences are not split into blocks."""
    if half is None:
        return None
    block = max(half, _BLOCK)
    return block if padded > 5 * block else None


def _half_window(window: int | None, padded: int) -> int | None:
    """Return the number of tokens attended to on each side; None: all tokens of the sequence."""
    return None if window is None or padded <= window // 2 + 1 else window // 2


def exclude_from_compilation() -> None:
    """Make torch.compile leave attention out of its graphs, which would be compiled again for each batch layout."""
    global _attend
    _attend = cast("Callable[..., Tensor]", torch.compiler.disable(_attend_all))


def attention(
    q_THK: Float[Tensor, "T H K"],
    k_THK: Float[Tensor, "T H K"],
    v_THK: Float[Tensor, "T H K"],
    plan: AttentionPlan,
    window: int | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "T H K"]:
    """Return softmax attention of each token over the tokens of its sequence, in plan order.

    With `window`, token i attends to token j if |i - j| <= window // 2. A window of 128, as in ModernBERT, covers 64
    tokens on each side. In a causal plan, it also needs j <= i. Scores are scaled by K ** -0.5.
    """
    return _attend(q_THK, k_THK, v_THK, plan, window, dropout)


def _attend_all(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, plan: AttentionPlan, window: int | None, dropout: float
) -> Tensor:
    weights = _recorded.get()
    if weights is not None:
        weights.append(_weights(q_THK, k_THK, plan, window))
    if plan.backend == "variable-length":
        from torch.nn.attention.varlen import varlen_attn  # loads the compiler, which takes a second

        assert dropout == 0, "variable-length attention has no dropout: pass it to plan_attention()"
        reach = -1 if window is None else window // 2
        # Rounded up to a power of two, so that there are few different kernel launches.
        max_seqlen = max(128, 1 << (plan.max_seqlen - 1).bit_length())
        cu_seqlens, sides = plan.cu_seqlens, (reach, 0 if plan.is_causal else reach)
        return varlen_attn(q_THK, k_THK, v_THK, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=sides)  # pyright: ignore[reportReturnType]
    sizes = [bucket.tokens for bucket in plan.buckets]
    # split instead of slices: its gradient is one cat, while each slice would allocate T x H x K zeros
    parts = list(zip(*(x_THK.split(sizes) for x_THK in (q_THK, k_THK, v_THK)), strict=True))
    outs = [_attend_bucket(parts[number], plan, number, window, dropout) for number in range(len(plan.buckets))]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


_attend: Callable[..., Tensor] = _attend_all


def _attend_bucket(
    qkv: tuple[Tensor, Tensor, Tensor], plan: AttentionPlan, number: int, window: int | None, dropout: float
) -> Tensor:
    bucket = plan.buckets[number]
    sequences, padded = len(bucket.lengths), bucket.padded
    heads, head_width = qkv[0].shape[1:]
    q_NSHK, k_NSHK, v_NSHK = (_pad(x_THK, bucket) for x_THK in qkv)
    half = _half_window(window, padded)
    block = _block_size(padded, half)
    key = (number, half, q_NSHK.dtype)
    if key not in plan.masks:
        plan.masks[key] = _mask(bucket, half, block, q_NSHK, is_causal=plan.is_causal)
    mask = plan.masks[key]
    if block is not None:
        # Queries are [sequences * blocks, block, H, K]; keys and values are three blocks wide.
        blocks = -(-padded // block)
        padding = blocks * block - padded
        q_NSHK = F.pad(q_NSHK, (0, 0, 0, 0, 0, padding)).reshape(sequences * blocks, block, heads, head_width)
        k_NSHK, v_NSHK = (_with_neighbors(x_NSHK, block, padding) for x_NSHK in (k_NSHK, v_NSHK))
    q_NHSK, k_NHSK, v_NHSK = (x_NSHK.transpose(1, 2) for x_NSHK in (q_NSHK, k_NSHK, v_NSHK))
    if plan.backend == "eager" and k_NHSK.shape[2] <= _MAX_EAGER_KEYS and dropout == 0:
        out_NHSK = _eager(q_NHSK, k_NHSK, v_NHSK, mask)
    else:
        # cuDNN's kernel can return NaN gradients with a mask if length % 128 == 64 (pytorch#196678)
        with sdpa_kernel(_NO_CUDNN) if q_NHSK.is_cuda else nullcontext():
            out_NHSK = F.scaled_dot_product_attention(q_NHSK, k_NHSK, v_NHSK, attn_mask=mask, dropout_p=dropout)
    out_NSHK = out_NHSK.transpose(1, 2)
    if block is not None:
        out_NSHK = out_NSHK.reshape(sequences, -1, heads, head_width)[:, :padded]
    out_THK = out_NSHK.reshape(sequences * padded, heads, head_width)
    return out_THK if bucket.index_T is None else out_THK.index_select(0, bucket.index_T)


def _pad(x_THK: Tensor, bucket: Bucket) -> Tensor:
    """Return a bucket's tokens as [sequences, padded, H, K], padded with zeros."""
    shape = (len(bucket.lengths), bucket.padded, *x_THK.shape[1:])
    if bucket.index_T is None:
        return x_THK.reshape(shape)
    zeros = x_THK.new_zeros(shape[0] * shape[1], *shape[2:])
    return zeros.index_copy(0, bucket.index_T, x_THK).view(shape)


def _with_neighbors(x_NSHK: Tensor, block: int, padding: int) -> Tensor:
    """Return each block between its two neighbors: [sequences * blocks, 3 * block, H, K].

    `padding` is the number of tokens missing from the last block of each sequence.
    """
    sequences, _, heads, head_width = x_NSHK.shape
    wide = F.pad(x_NSHK, (0, 0, 0, 0, block, padding + block)).reshape(sequences, -1, block, heads, head_width)
    return torch.cat((wide[:, :-2], wide[:, 1:-1], wide[:, 2:]), 2).reshape(-1, 3 * block, heads, head_width)


def _mask(bucket: Bucket, half: int | None, block: int | None, like: Tensor, *, is_causal: bool) -> Tensor | None:
    """Return the additive mask of a bucket, broadcast over [sequences (* blocks), H, queries, keys]; None: no mask."""
    if bucket.length_N is None and half is None and not is_causal:
        return None
    device = like.device
    blocks = 1 if block is None else -(-bucket.padded // block)
    first_C = torch.arange(blocks, device=device)[:, None] * (block or 0)
    i_CQ1 = (first_C + torch.arange(block or bucket.padded, device=device))[..., None]
    from_K = (0, bucket.padded) if block is None else (-block, 2 * block)
    j_C1K = (first_C + torch.arange(*from_K, device=device))[:, None]
    length_N = torch.tensor([bucket.padded], device=device) if bucket.length_N is None else bucket.length_N
    visible = (j_C1K >= 0) & (j_C1K < length_N[:, None, None, None])
    if half is not None:
        visible = visible & ((i_CQ1 - j_C1K).abs() <= half)
    if is_causal:
        visible = visible & (j_C1K <= i_CQ1)
    if block is not None:
        visible = visible.expand(len(bucket.lengths), -1, -1, -1)
    visible = visible.reshape(-1, 1, *visible.shape[2:])
    masked_score = torch.finfo(like.dtype).min if like.dtype == torch.float16 else _MASKED_SCORE
    return torch.zeros(visible.shape, dtype=like.dtype, device=device).masked_fill_(~visible, masked_score)


def _eager(q_NHSK: Tensor, k_NHSK: Tensor, v_NHSK: Tensor, mask: Tensor | None) -> Tensor:
    sequences, heads, queries, head_width = q_NHSK.shape
    flat = (sequences * heads, -1, head_width)
    scores = torch.bmm((q_NHSK * head_width**-0.5).reshape(flat), k_NHSK.reshape(flat).transpose(1, 2))
    if mask is not None:
        scores = (scores.view(sequences, heads, queries, -1) + mask).view(sequences * heads, queries, -1)
    return torch.bmm(scores.softmax(-1), v_NHSK.reshape(flat)).view(sequences, heads, queries, head_width)


# Weights of one sequence --------------------------------------------------------------------------------------------

# The weights of each layer, while `attention_weights` computes them. The encoders don't return them, because no other
# caller needs them and a packed batch has none of one shape.
_recorded: ContextVar[list[Tensor] | None] = ContextVar("attention weights", default=None)


@torch.inference_mode()
def attention_weights(encoder: nn.Module, ids: Sequence[int], *, is_causal: bool = False) -> Float[Tensor, "L H S S"]:
    """Return the attention weights of each layer and head for one sequence, in float32 and without dropout.

    The weight [l, h, i, j] is the fraction of attention that token i pays to token j in head h of layer l. Each row
    adds up to 1. Memory grows with the square of the sequence length.

    Args:
        encoder: Encoder in evaluation mode.
        ids: Token ids with special tokens; at most as many as the encoder has positions.
        is_causal: Whether each token attends only to itself and to the tokens before it.
    """
    batch = pack([Sample(np.asarray(ids, np.int64), np.full(len(ids), SPECIAL, np.uint8))])
    weights: list[Tensor] = []
    token = _recorded.set(weights)
    try:
        encoder(replace(batch, is_causal=is_causal).to(next(encoder.parameters()).device))
    finally:
        _recorded.reset(token)
    return torch.stack(weights).cpu()


def _weights(q_THK: Tensor, k_THK: Tensor, plan: AttentionPlan, window: int | None) -> Float[Tensor, "H S S"]:
    """Return the softmax weights of the first sequence; after it, the batch has samples that only round its size."""
    length = plan.lengths[0]
    q_HSK, k_HSK = (x_THK[:length].float().transpose(0, 1) for x_THK in (q_THK, k_THK))
    scores_HSS = (q_HSK * q_HSK.shape[-1] ** -0.5) @ k_HSK.transpose(1, 2)
    distance_SS = torch.arange(length)[:, None] - torch.arange(length)  # of query and key
    half = _half_window(window, length)
    hidden_SS = torch.zeros_like(distance_SS, dtype=torch.bool) if half is None else distance_SS.abs() > half
    if plan.is_causal:
        hidden_SS |= distance_SS < 0
    return scores_HSS.masked_fill(hidden_SS.to(scores_HSS.device), -torch.inf).softmax(-1)
