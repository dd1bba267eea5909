"""Room card: attention among texts that lie end to end.

Comes in: a Batch (once per forward: `arrange`), then the queries, keys and values of each layer. Goes out: what each
slot attends to, in the same rows; no text ever sees another, and no T × T mask is ever made. Called by: modern,
tutorial.

Three ways to the same numbers; `backend_of` says which one is taken, from the device, the number format and dropout
alone:

- "variable-length": FlashAttention over the starts of the texts; CUDA, half precision, no dropout.
- "padded": texts of similar length side by side in buckets, and `scaled_dot_product_attention`; everything else.
- "eager": the same buckets, with two matrix products and a softmax; half precision on a CPU, where the fused
  kernel is 2 to 5 times slower (4,096 tokens, 4 heads × 64, forward and backward, one thread: 32-token texts 41
  against 8 ms, 128-token texts 56 against 22 ms; at 512 they meet. In float32 the fused kernel wins at every length).

Texts are put in the order of their length once, at the encoder's door, so that every bucket is a run of neighbours: a
slice, and where its texts are equally long (the usual case in training) a mere reshape.
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
MaskKey = tuple[int, int | None, torch.dtype]  # bucket, how far a slot sees, number format

WASTE = 0.15  # of a bucket's pairs of slots may be padding
_SPARE_PAIRS = 4096  # padding that costs less than a bucket of its own, as long as it is under 1 % of the batch
_RUN_SLOTS = 1024  # so many slots of equally long texts are a bucket of their own: a reshape, no mask
_BLOCK = 64  # under a local window, texts longer than five blocks are cut into blocks that see their neighbours
_WRITTEN_OUT_KEYS = 512  # beyond, the fused kernel is as fast and doesn't keep S × S probabilities
_HIDDEN = -1e30  # finite, so that a padded row that sees nothing is not NaN (its gradient would be 0 × NaN)
_HALF = (torch.bfloat16, torch.float16)
_NO_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True, eq=False)
class Bucket:
    """Neighbouring texts of similar length, padded to `padded` slots each."""

    lengths: tuple[int, ...]
    padded: int
    place_T: Tensor | None  # where each of its slots stands among texts × padded; None: equally long, nothing is padded
    length_N: Tensor | None  # the lengths on the device, where they differ

    @property
    def slots(self) -> int:
        """Slots that hold a token."""
        return sum(self.lengths)


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """How the texts of a batch lie while the layers run; the filler text, if any, stays last and attends to nothing."""

    backend: Backend
    look: Literal["both", "left"]
    lengths: tuple[int, ...]  # of the texts as they lie, the filler not counted
    cu_seqlens: Int[Tensor, "B1"]
    position_T: Int[Tensor, "T"]  # of each slot within its text
    max_seqlen: int
    filler: int
    order_T: Int[Tensor, "T"] | None  # slot of the batch that each slot comes from; None: as in the batch
    back_T: Int[Tensor, "T"] | None
    buckets: tuple[Bucket, ...]  # none for "variable-length"
    masks: dict[MaskKey, Tensor | None] = field(default_factory=dict, repr=False, compare=False)

    @property
    def attended_pairs(self) -> int:
        """Pairs of slots of one text, summed over texts: what full attention is bound to cost."""
        return sum(length * length for length in self.lengths)

    def arranged(self, x_T: Tensor) -> Tensor:
        """Rows of the batch in the order of this layout."""
        return x_T if self.order_T is None else x_T.index_select(0, self.order_T)

    def restored(self, x_T: Tensor) -> Tensor:
        """Rows of this layout in the order of the batch."""
        return x_T if self.back_T is None else x_T.index_select(0, self.back_T)


def backend_of(device: torch.device, dtype: torch.dtype, dropout: float = 0.0, head_width: int = 64) -> Backend:
    """The way that attention takes on this device, for queries of this number format and this dropout on attention.

    FlashAttention takes head widths that are multiples of 8 up to 256, on compute capability 8.0 and later.
    """
    if dropout > 0 or dtype not in _HALF:
        return "padded"
    if device.type == "cpu":
        return "eager"
    fits = head_width % 8 == 0 and head_width <= 256
    if device.type == "cuda" and fits and torch.cuda.get_device_capability(device) >= (8, 0):
        return "variable-length"
    return "padded"


def plan_attention(
    batch: Batch, *, dtype: torch.dtype = torch.float32, dropout: float = 0.0, head_width: int = 64
) -> AttentionPlan:
    """How the texts of a batch lie while the layers run; made once per forward.

    `dtype` is the number format of the queries to come, `dropout` what `attend` will be asked for.
    """
    device = batch.ids_T.device
    backend = backend_of(device, dtype, dropout, head_width)
    lengths = [last - first for first, last in pairwise(batch.offsets)]
    filler = lengths.pop() if batch.filler else 0
    texts = list(range(len(lengths)))
    descending = all(one >= other for one, other in pairwise(lengths))
    ascending = all(one <= other for one, other in pairwise(lengths))
    order_T = back_T = None
    cu_seqlens = batch.cu_seqlens
    if backend != "variable-length" and not (descending or ascending):
        texts.sort(key=lambda text: -lengths[text])
        starts = torch.tensor([batch.offsets[text] for text in texts] + [batch.offsets[-1] - filler])
        lengths = [lengths[text] for text in texts]
        counts = torch.tensor([*lengths, filler])
        firsts = counts.cumsum(0) - counts
        order_T = torch.arange(batch.offsets[-1]) + torch.repeat_interleave(starts - firsts, counts)
        back_T = torch.empty_like(order_T)
        back_T[order_T] = torch.arange(len(order_T))
        order_T, back_T = order_T.to(device), back_T.to(device)
        ends = accumulate([*lengths, filler] if filler else lengths)
        cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=device)
        descending = True
    slots = batch.offsets[-1]
    first_T = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=slots)
    return AttentionPlan(
        backend=backend,
        look=batch.look,
        lengths=tuple(lengths),
        cu_seqlens=cu_seqlens,
        position_T=torch.arange(slots, device=device) - first_T,
        max_seqlen=batch.max_seqlen,
        filler=filler,
        order_T=order_T,
        back_T=back_T,
        buckets=() if backend == "variable-length" else _buckets(lengths, descending, device),
    )


def _buckets(lengths: Sequence[int], descending: bool, device: torch.device) -> tuple[Bucket, ...]:
    """Buckets of neighbours, in the order of the texts."""
    sizes = _group(lengths if descending else lengths[::-1])
    buckets: list[Bucket] = []
    first = 0
    for size in sizes if descending else reversed(sizes):
        inside = tuple(lengths[first : first + size])
        first += size
        padded = max(inside)
        place_T = length_N = None
        if min(inside) < padded:
            length_N = torch.tensor(inside)
            column = torch.arange(padded)
            place_T = (column < length_N[:, None]).flatten().nonzero()[:, 0].to(device)
            length_N = length_N.to(device)
        buckets.append(Bucket(inside, padded, place_T, length_N))
    return tuple(buckets)


def _group(lengths: Sequence[int]) -> list[int]:
    """How many texts go into each bucket, the lengths given in descending order; greedy from the longest."""
    spare = min(_SPARE_PAIRS, sum(length * length for length in lengths) // 100)
    sizes: list[int] = []
    first = 0
    while first < len(lengths):
        longest = lengths[first]
        pairs, stop = 0, first
        while stop < len(lengths):
            is_run = lengths[stop] < longest == lengths[stop - 1] and (stop - first) * longest >= _RUN_SLOTS
            grown = pairs + lengths[stop] ** 2
            padding = (stop + 1 - first) * longest**2 - grown
            if is_run or padding > max(WASTE * grown, spare):
                break
            pairs, stop = grown, stop + 1
        sizes.append(stop - first)
        first = stop
    return sizes


def _block_of(padded: int, half: int | None) -> int | None:
    """The block that texts of this padded length are cut into under a local window; None: they are left whole."""
    if half is None:
        return None
    block = max(half, _BLOCK)
    return block if padded > 5 * block else None


def _half_of(window: int | None, padded: int) -> int | None:
    """How far a slot sees to either side, None where that is all of its text."""
    return None if window is None or padded <= window // 2 + 1 else window // 2


def padded_pairs(layout: AttentionPlan, window: int | None = None) -> int:
    """Pairs of slots for which a layer computes a score, padding included; compare with `layout.attended_pairs`."""
    if layout.backend == "variable-length":
        widest = layout.max_seqlen if window is None else 2 * (window // 2) + 1
        return sum(length * min(length, widest) for length in layout.lengths)
    pairs = 0
    for bucket in layout.buckets:
        block = _block_of(bucket.padded, _half_of(window, bucket.padded))
        each = bucket.padded**2 if block is None else -(-bucket.padded // block) * 3 * block**2
        pairs += len(bucket.lengths) * each
    return pairs


def attention(
    q_THK: Float[Tensor, "T H K"],
    k_THK: Float[Tensor, "T H K"],
    v_THK: Float[Tensor, "T H K"],
    layout: AttentionPlan,
    window: int | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "T H K"]:
    """Softmax attention of each slot to the slots of its own text, rows in the order of the layout.

    With `window`, slot i sees slot j iff |i − j| ≤ window // 2 (ModernBERT's 128 is 64 to each side); where the batch
    looks "left", iff also j ≤ i. Scores are scaled by K ** −0.5. The filler's rows are zero (but for
    "variable-length").
    """
    if layout.backend == "variable-length":
        assert dropout == 0, "variable-length attention has no dropout: say so to arrange()"
        reach = -1 if window is None else window // 2
        # A constant length keeps compiled graphs and launches few; the next power of two is nearly one.
        longest = max(128, 1 << (layout.max_seqlen - 1).bit_length())
        cu_seqlens = layout.cu_seqlens
        sides = (reach, 0 if layout.look == "left" else reach)
        return varlen_attn(q_THK, k_THK, v_THK, cu_seqlens, cu_seqlens, longest, longest, window_size=sides)  # pyright: ignore[reportReturnType]
    sizes = [bucket.slots for bucket in layout.buckets] + ([layout.filler] if layout.filler else [])
    # split, not slices: its gradient is one cat, where slices would each make a T × H × K of zeros
    parts = list(zip(*(x_THK.split(sizes) for x_THK in (q_THK, k_THK, v_THK)), strict=True))
    outs = [_attend_bucket(parts[number], layout, number, window, dropout) for number in range(len(layout.buckets))]
    if layout.filler:
        outs.append(torch.zeros_like(parts[-1][2]))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _attend_bucket(
    qkv: tuple[Tensor, Tensor, Tensor], layout: AttentionPlan, number: int, window: int | None, dropout: float
) -> Tensor:
    bucket = layout.buckets[number]
    texts, padded = len(bucket.lengths), bucket.padded
    heads, head_width = qkv[0].shape[1:]
    q_NSHK, k_NSHK, v_NSHK = (_pad(x_THK, bucket) for x_THK in qkv)
    half = _half_of(window, padded)
    block = _block_of(padded, half)
    key = (number, half, q_NSHK.dtype)
    if key not in layout.masks:
        layout.masks[key] = _mask(bucket, layout.look, half, block, q_NSHK)
    mask = layout.masks[key]
    if block is not None:
        # [texts · blocks, block, H, K] for the queries, three blocks wide for keys and values
        blocks = -(-padded // block)
        behind = blocks * block - padded
        q_NSHK = F.pad(q_NSHK, (0, 0, 0, 0, 0, behind)).reshape(texts * blocks, block, heads, head_width)
        k_NSHK, v_NSHK = (_neighbours(x_NSHK, block, behind) for x_NSHK in (k_NSHK, v_NSHK))
    q_NHSK, k_NHSK, v_NHSK = (x_NSHK.transpose(1, 2) for x_NSHK in (q_NSHK, k_NSHK, v_NSHK))
    if layout.backend == "eager" and k_NHSK.shape[2] <= _WRITTEN_OUT_KEYS and dropout == 0:
        out_NHSK = _written_out(q_NHSK, k_NHSK, v_NHSK, mask)
    else:
        # cuDNN's kernel can give NaN gradients under a mask at length % 128 == 64 (pytorch#196678)
        with sdpa_kernel(_NO_CUDNN) if q_NHSK.is_cuda else nullcontext():
            out_NHSK = F.scaled_dot_product_attention(q_NHSK, k_NHSK, v_NHSK, attn_mask=mask, dropout_p=dropout)
    out_NSHK = out_NHSK.transpose(1, 2)
    if block is not None:
        out_NSHK = out_NSHK.reshape(texts, -1, heads, head_width)[:, :padded]
    out_THK = out_NSHK.reshape(texts * padded, heads, head_width)
    return out_THK if bucket.place_T is None else out_THK.index_select(0, bucket.place_T)


def _pad(x_THK: Tensor, bucket: Bucket) -> Tensor:
    """The slots of a bucket as [texts, padded, H, K]; zeros where there is none."""
    shape = (len(bucket.lengths), bucket.padded, *x_THK.shape[1:])
    if bucket.place_T is None:
        return x_THK.reshape(shape)
    empty = x_THK.new_zeros(shape[0] * shape[1], *shape[2:])
    return empty.index_copy(0, bucket.place_T, x_THK).view(shape)


def _neighbours(x_NSHK: Tensor, block: int, behind: int) -> Tensor:
    """Each block with the one before and the one after it: [texts · blocks, 3 · block, H, K]."""
    texts, _, heads, head_width = x_NSHK.shape
    wide = F.pad(x_NSHK, (0, 0, 0, 0, block, behind + block)).reshape(texts, -1, block, heads, head_width)
    return torch.cat((wide[:, :-2], wide[:, 1:-1], wide[:, 2:]), 2).reshape(-1, 3 * block, heads, head_width)


def _mask(bucket: Bucket, look: str, half: int | None, block: int | None, like: Tensor) -> Tensor | None:
    """What is added to a bucket's scores, broadcast over [texts (· blocks), H, queries, keys]; None: all is seen."""
    if bucket.length_N is None and half is None and look == "both":
        return None
    device = like.device
    blocks = 1 if block is None else -(-bucket.padded // block)
    first_C = torch.arange(blocks, device=device)[:, None] * (block or 0)
    i_CQ1 = (first_C + torch.arange(block or bucket.padded, device=device))[..., None]
    from_K = (0, bucket.padded) if block is None else (-block, 2 * block)
    j_C1K = (first_C + torch.arange(*from_K, device=device))[:, None]
    length_N = torch.tensor([bucket.padded], device=device) if bucket.length_N is None else bucket.length_N
    seen = (j_C1K >= 0) & (j_C1K < length_N[:, None, None, None])
    if half is not None:
        seen = seen & ((i_CQ1 - j_C1K).abs() <= half)
    if look == "left":
        seen = seen & (j_C1K <= i_CQ1)
    if block is not None:
        seen = seen.expand(len(bucket.lengths), -1, -1, -1)
    seen = seen.reshape(-1, 1, *seen.shape[2:])
    hidden = torch.finfo(like.dtype).min if like.dtype == torch.float16 else _HIDDEN
    return torch.zeros(seen.shape, dtype=like.dtype, device=device).masked_fill_(~seen, hidden)


def _written_out(q_NHSK: Tensor, k_NHSK: Tensor, v_NHSK: Tensor, mask: Tensor | None) -> Tensor:
    texts, heads, slots, head_width = q_NHSK.shape
    flat = (texts * heads, -1, head_width)
    scores = torch.bmm((q_NHSK * head_width**-0.5).reshape(flat), k_NHSK.reshape(flat).transpose(1, 2))
    if mask is not None:
        scores = (scores.view(texts, heads, slots, -1) + mask).view(texts * heads, slots, -1)
    return torch.bmm(scores.softmax(-1), v_NHSK.reshape(flat)).view(texts, heads, slots, head_width)
