"""Attention over packed sequences: variable-length, padded or eager, with the same result.

`plan_attention` is called once per forward pass, `attention` once per layer. Sequences don't see each other, and no
T x T mask is ever built. `backend_of` chooses the backend by device, dtype and dropout alone:

- "variable-length": FlashAttention over cumulative sequence lengths; CUDA, half precision, no dropout.
- "padded": sequences of similar length side by side in buckets, with `scaled_dot_product_attention`; everything else.
- "eager": the same buckets, with two matrix products and a softmax; half precision on a CPU, where the fused kernel is
  2 to 5 times slower (4,096 tokens, 4 heads x 64, forward and backward, one thread: sequences of 32 tokens 41 against
  8 ms, of 128 tokens 56 against 22 ms; at 512 tokens they are equal. In float32 the fused kernel is always faster).

Sequences are sorted by length once, before the first layer, so that every bucket is a contiguous slice. If its
sequences are equally long, which is usual in training, the bucket is a mere reshape.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from unmask.core.types import Batch

Backend = Literal["variable-length", "padded", "eager"]
MaskKey = tuple[int, int | None, torch.dtype]  # bucket, half of the local window, dtype

MAX_PADDING = 0.15  # padded query-key pairs of a bucket, relative to its real ones
_SPARE_PAIRS = 4096  # padding that is cheaper than one more bucket, while it is below 1 % of the batch
_MIN_UNIFORM_TOKENS = 1024  # this many tokens in equally long sequences get a bucket without mask: a reshape
_BLOCK = 64  # with a local window, sequences longer than five blocks are split; a block sees itself and its neighbors
_MAX_EAGER_KEYS = 512  # beyond this, the fused kernel is as fast and doesn't store S x S probabilities
_MASKED_SCORE = -1e30  # finite, so that a padded query that sees no key is not NaN (its gradient would be 0 x NaN)
_HALF = (torch.bfloat16, torch.float16)
_NO_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True, eq=False)
class Bucket:
    """Consecutive sequences of similar length, padded to `padded` tokens each."""

    lengths: tuple[int, ...]
    padded: int
    index_T: Tensor | None  # index of each token among sequences x padded; None: equally long, nothing is padded
    length_N: Tensor | None  # the lengths on the device, if they differ

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return sum(self.lengths)


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """The order and the buckets of a batch's sequences while the layers run."""

    backend: Backend
    lengths: tuple[int, ...]  # of the sequences, in the order of the plan
    cu_seqlens: Int[Tensor, "B1"]
    position_T: Int[Tensor, "T"]  # position of each token within its sequence
    max_seqlen: int
    order_T: Int[Tensor, "T"] | None  # index in the batch of each token of the plan; None: the same order
    inverse_T: Int[Tensor, "T"] | None
    buckets: tuple[Bucket, ...]  # none for "variable-length"
    masks: dict[MaskKey, Tensor | None] = field(default_factory=dict, repr=False, compare=False)

    def to_plan_order(self, x_T: Tensor) -> Tensor:
        """Reorder values of the batch's tokens to the order of the plan."""
        return x_T if self.order_T is None else x_T.index_select(0, self.order_T)

    def to_batch_order(self, x_T: Tensor) -> Tensor:
        """Reorder values from the order of the plan to that of the batch."""
        return x_T if self.inverse_T is None else x_T.index_select(0, self.inverse_T)


def backend_of(device: torch.device, dtype: torch.dtype, dropout: float = 0.0, head_width: int = 64) -> Backend:
    """Return the backend for queries of this dtype on this device, given the dropout on attention.

    FlashAttention takes head widths that are multiples of 8 up to 256, on compute capability 8.0 and later.
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
    """Plan the attention of one forward pass, for queries of this dtype and this dropout on attention."""
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
    )


def _buckets(lengths: Sequence[int], descending: bool, device: torch.device) -> tuple[Bucket, ...]:
    """Return buckets of consecutive sequences; `lengths` are sorted, descending or ascending."""
    sizes = _group(lengths if descending else lengths[::-1])
    buckets: list[Bucket] = []
    first = 0
    for size in sizes if descending else reversed(sizes):
        inside = tuple(lengths[first : first + size])
        first += size
        padded = max(inside)
        index_T = length_N = None
        if min(inside) < padded:
            length_N = torch.tensor(inside)
            column = torch.arange(padded)
            index_T = (column < length_N[:, None]).flatten().nonzero()[:, 0].to(device)
            length_N = length_N.to(device)
        buckets.append(Bucket(inside, padded, index_T, length_N))
    return tuple(buckets)


def _group(lengths: Sequence[int]) -> list[int]:
    """Return the number of sequences of each bucket, for descending lengths; greedy from the longest."""
    spare = min(_SPARE_PAIRS, sum(length * length for length in lengths) // 100)
    sizes: list[int] = []
    first = 0
    while first < len(lengths):
        longest = lengths[first]
        pairs, stop = 0, first
        while stop < len(lengths):
            is_uniform = lengths[stop] < longest == lengths[stop - 1]
            ends_uniform = is_uniform and (stop - first) * longest >= _MIN_UNIFORM_TOKENS
            grown = pairs + lengths[stop] ** 2
            padding = (stop + 1 - first) * longest**2 - grown
            if ends_uniform or padding > max(MAX_PADDING * grown, spare):
                break
            pairs, stop = grown, stop + 1
        sizes.append(stop - first)
        first = stop
    return sizes


def _block_of(padded: int, half: int | None) -> int | None:
    """Return the block size into which sequences of this padded length are split; None: they are not split."""
    if half is None:
        return None
    block = max(half, _BLOCK)
    return block if padded > 5 * block else None


def _half_of(window: int | None, padded: int) -> int | None:
    """Return how far a token sees to either side; None: to the ends of its sequence."""
    return None if window is None or padded <= window // 2 + 1 else window // 2


def attention(
    q_THK: Float[Tensor, "T H K"],
    k_THK: Float[Tensor, "T H K"],
    v_THK: Float[Tensor, "T H K"],
    plan: AttentionPlan,
    window: int | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "T H K"]:
    """Softmax attention of each token to the tokens of its sequence, in the order of the plan.

    With `window`, token i sees token j if |i - j| <= window // 2: ModernBERT's 128 is 64 to each side. Scores are
    scaled by K ** -0.5.
    """
    if plan.backend == "variable-length":
        assert dropout == 0, "variable-length attention has no dropout: pass it to plan_attention()"
        reach = -1 if window is None else window // 2
        # A power of two keeps the number of different launches small.
        max_seqlen = max(128, 1 << (plan.max_seqlen - 1).bit_length())
        cu_seqlens, sides = plan.cu_seqlens, (reach, reach)
        return varlen_attn(q_THK, k_THK, v_THK, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=sides)  # pyright: ignore[reportReturnType]
    sizes = [bucket.tokens for bucket in plan.buckets]
    # split, not slices: its gradient is one cat, where slices would each allocate a T x H x K tensor of zeros
    parts = list(zip(*(x_THK.split(sizes) for x_THK in (q_THK, k_THK, v_THK)), strict=True))
    outs = [_attend_bucket(parts[number], plan, number, window, dropout) for number in range(len(plan.buckets))]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _attend_bucket(
    qkv: tuple[Tensor, Tensor, Tensor], plan: AttentionPlan, number: int, window: int | None, dropout: float
) -> Tensor:
    bucket = plan.buckets[number]
    sequences, padded = len(bucket.lengths), bucket.padded
    heads, head_width = qkv[0].shape[1:]
    q_NSHK, k_NSHK, v_NSHK = (_pad(x_THK, bucket) for x_THK in qkv)
    half = _half_of(window, padded)
    block = _block_of(padded, half)
    key = (number, half, q_NSHK.dtype)
    if key not in plan.masks:
        plan.masks[key] = _mask(bucket, half, block, q_NSHK)
    mask = plan.masks[key]
    if block is not None:
        # [sequences * blocks, block, H, K] for the queries, three blocks wide for keys and values
        blocks = -(-padded // block)
        behind = blocks * block - padded
        q_NSHK = F.pad(q_NSHK, (0, 0, 0, 0, 0, behind)).reshape(sequences * blocks, block, heads, head_width)
        k_NSHK, v_NSHK = (_with_neighbors(x_NSHK, block, behind) for x_NSHK in (k_NSHK, v_NSHK))
    q_NHSK, k_NHSK, v_NHSK = (x_NSHK.transpose(1, 2) for x_NSHK in (q_NSHK, k_NSHK, v_NSHK))
    if plan.backend == "eager" and k_NHSK.shape[2] <= _MAX_EAGER_KEYS and dropout == 0:
        out_NHSK = _eager(q_NHSK, k_NHSK, v_NHSK, mask)
    else:
        # cuDNN's kernel can give NaN gradients under a mask at length % 128 == 64 (pytorch#196678)
        with sdpa_kernel(_NO_CUDNN) if q_NHSK.is_cuda else nullcontext():
            out_NHSK = F.scaled_dot_product_attention(q_NHSK, k_NHSK, v_NHSK, attn_mask=mask, dropout_p=dropout)
    out_NSHK = out_NHSK.transpose(1, 2)
    if block is not None:
        out_NSHK = out_NSHK.reshape(sequences, -1, heads, head_width)[:, :padded]
    out_THK = out_NSHK.reshape(sequences * padded, heads, head_width)
    return out_THK if bucket.index_T is None else out_THK.index_select(0, bucket.index_T)


def _pad(x_THK: Tensor, bucket: Bucket) -> Tensor:
    """Return the tokens of a bucket as [sequences, padded, H, K], padded with zeros."""
    shape = (len(bucket.lengths), bucket.padded, *x_THK.shape[1:])
    if bucket.index_T is None:
        return x_THK.reshape(shape)
    empty = x_THK.new_zeros(shape[0] * shape[1], *shape[2:])
    return empty.index_copy(0, bucket.index_T, x_THK).view(shape)


def _with_neighbors(x_NSHK: Tensor, block: int, behind: int) -> Tensor:
    """Return each block with the one before and the one after it: [sequences * blocks, 3 * block, H, K]."""
    sequences, _, heads, head_width = x_NSHK.shape
    wide = F.pad(x_NSHK, (0, 0, 0, 0, block, behind + block)).reshape(sequences, -1, block, heads, head_width)
    return torch.cat((wide[:, :-2], wide[:, 1:-1], wide[:, 2:]), 2).reshape(-1, 3 * block, heads, head_width)


def _mask(bucket: Bucket, half: int | None, block: int | None, like: Tensor) -> Tensor | None:
    """Return the additive mask of a bucket, broadcast over [sequences (* blocks), H, queries, keys]; None: no mask."""
    if bucket.length_N is None and half is None:
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
