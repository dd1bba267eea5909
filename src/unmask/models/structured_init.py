"""Structured initialization of BertEncoder: some attention heads start with a useful pattern.

With random position embeddings, BERT must learn from text alone which tokens are neighbors. Until then, its loss stays
near the unigram loss. `init_neighbor_attention` initializes some dimensions of the position embedding with sinusoids
(arXiv 1706.03762, section 3.5). Token and token type embeddings are zero in these dimensions. In the lower half of the
blocks, each head attends to a fixed offset: from position i to i - 1, i + 1, i - 2 and so on. Initial weights that
resemble trained ones are known to help with little data (mimetic initialization, arXiv 2305.09828). These weights are
trained like all others, and the result is an ordinary BERT.

For sentence pairs, the model must also learn whether two segments share words. `init_pair_matching` initializes some
heads to attend to the same token at other positions and to copy the segment code from there. In the last block, one
head pools these codes over the first segment and one over the second. The overlap of the segments is then a linear
function of the first token's vector.
"""

from __future__ import annotations

import math
from typing import Final, cast

import torch
from torch import nn

from unmask.core.errors import RecipeError
from unmask.models.bert import BertAttention, BertBlock, BertEncoder

_POSITION_FRACTION: Final = 4  # the position embedding takes hidden_size / 4 dimensions
_MAX_FREQUENCY: Final = 2.5  # radians per position; below pi, so that the offsets -1 and +1 differ
_FREQUENCY_RANGE: Final = 30.0  # ratio of the highest frequency to the lower limit of the frequencies
_OFFSET_LOGIT: Final = 12.0  # attention logit of the token at the offset; that token gets 90 % of the attention

_SEGMENT_DIMS: Final = 8  # dimensions of the segment code and of its copy
_SAME_TOKEN: Final = 2.0  # gain for an equal token in a same-token head
_SAME_POSITION: Final = 4.0  # gain against an equal position; without it, a token would attend to itself
_SAME_SEGMENT: Final = 6.0  # half the logit difference between the pooled segment and the other one
_POOLED_STD: Final = 0.5  # standard deviation of the output weights of a pooling head


@torch.no_grad()
def init_neighbor_attention(encoder: BertEncoder) -> None:
    """Initialize the position embedding, and query and key of each head in the lower half of the blocks.

    Raises:
        RecipeError: a head, or a quarter of the width, has less than two dimensions.
    """
    settings = encoder.settings
    if min(settings.hidden_size // _POSITION_FRACTION, settings.head_width) < 2:
        raise RecipeError(
            f"hidden_size = {settings.hidden_size} with num_attention_heads = {settings.num_attention_heads} is too "
            "small for init=neighbor-attention",
            location="model.init",
            hint=f"use a hidden_size of at least {2 * _POSITION_FRACTION} and heads of at least 2 dimensions, or "
            "set init=normal",
        )
    frequency_W = _frequencies(encoder)
    angle_PW = torch.arange(len(encoder.position_embedding))[:, None] * frequency_W
    dims = 2 * len(frequency_W)
    encoder.token_embedding[:, :dims] = 0.0
    encoder.token_type_embedding[:, :dims] = 0.0
    encoder.position_embedding[:, dims:] = 0.0
    amplitude = math.sqrt(2) * settings.initializer_range  # the same standard deviation as in the other embeddings
    encoder.position_embedding[:, 0:dims:2] = amplitude * angle_PW.sin()
    encoder.position_embedding[:, 1:dims:2] = amplitude * angle_PW.cos()
    for layer in range((settings.num_hidden_layers + 1) // 2):
        _init_offset_heads(_attention(encoder, layer), frequency_W, settings.num_attention_heads)


@torch.no_grad()
def init_pair_matching(encoder: BertEncoder) -> None:
    """Initialize same-token heads in the middle block and segment-pooling heads in the last block.

    `init_neighbor_attention` must have been applied before.

    Raises:
        RecipeError: the encoder has too few blocks, heads, token types or dimensions.
    """
    settings = encoder.settings
    dims = 2 * len(_frequencies(encoder))
    is_large_enough = (
        min(settings.num_hidden_layers, settings.num_attention_heads, settings.type_vocab_size) > 1
        and settings.head_width >= 4 * _SEGMENT_DIMS
    )
    if not is_large_enough:
        raise RecipeError(
            "the encoder is too small for init=pair-matching",
            location="model.init",
            hint=f"use at least two layers, two heads of {4 * _SEGMENT_DIMS} dimensions and type_vocab_size=2, or set "
            "init=neighbor-attention",
        )
    segment = slice(dims, dims + _SEGMENT_DIMS)
    copied = slice(dims + _SEGMENT_DIMS, dims + 2 * _SEGMENT_DIMS)
    encoder.token_embedding[:, dims : copied.stop] = 0.0
    encoder.token_type_embedding[:2] = 0.0
    encoder.token_type_embedding[0, segment] = settings.initializer_range
    encoder.token_type_embedding[1, segment] = -settings.initializer_range
    middle, last = (
        _attention(encoder, layer)
        for layer in ((settings.num_hidden_layers + 1) // 2 - 1, settings.num_hidden_layers - 1)
    )
    for head in range(settings.num_attention_heads // 2, settings.num_attention_heads):
        _init_same_token_head(_Head(middle, head, settings.head_width), segment, copied)
    for head, sign in ((0, 1.0), (1, -1.0)):
        _init_segment_pooling_head(_Head(last, head, settings.head_width), sign, segment, copied)


def _frequencies(encoder: BertEncoder) -> torch.Tensor:
    """Return the frequency of each sinusoid in radians per position."""
    settings = encoder.settings
    waves = min(settings.hidden_size // _POSITION_FRACTION, settings.head_width) // 2
    return _MAX_FREQUENCY * _FREQUENCY_RANGE ** (-torch.arange(waves) / waves)


def _attention(encoder: BertEncoder, layer: int) -> BertAttention:
    return cast("BertBlock", encoder.blocks[layer]).attention


class _Head:
    """Views of one head's weights."""

    def __init__(self, attention: BertAttention, head: int, width: int) -> None:
        rows = slice(head * width, (head + 1) * width)
        self.width = width
        self.query_KD, self.key_KD, self.value_KD = (
            linear.weight[rows] for linear in (attention.query, attention.key, attention.value)
        )
        self.query_bias_K = attention.query.bias[rows]
        self.output_DK = attention.output.weight[:, rows]


def _init_offset_heads(attention: BertAttention, frequency_W: torch.Tensor, heads: int) -> None:
    """Initialize head h to attend to a fixed offset: -1, +1, -2, +2 and so on."""
    waves = len(frequency_W)
    head_width = len(attention.query.weight) // heads
    gain = math.sqrt(_OFFSET_LOGIT * math.sqrt(head_width) / (2 * waves))
    even_W = 2 * torch.arange(waves)
    for number in range(heads):
        head = _Head(attention, number, head_width)
        offset = (number // 2 + 1) * (1 if number % 2 else -1)
        cos_W, sin_W = gain * (frequency_W * offset).cos(), gain * (frequency_W * offset).sin()
        head.query_KD[: 2 * waves] = 0.0
        head.key_KD[: 2 * waves] = 0.0
        # The query rotates the sinusoids of position i to those of i + offset; the key doesn't rotate them.
        head.query_KD[even_W, even_W], head.query_KD[even_W, even_W + 1] = cos_W, sin_W
        head.query_KD[even_W + 1, even_W], head.query_KD[even_W + 1, even_W + 1] = -sin_W, cos_W
        head.key_KD[even_W, even_W] = head.key_KD[even_W + 1, even_W + 1] = torch.full((waves,), gain)


def _init_same_token_head(head: _Head, segment: slice, copied: slice) -> None:
    """Initialize a head to attend to equal tokens at other positions and to copy the segment code from there."""
    token_dims = head.width * 3 // 4
    position_dims = min(head.width - token_dims, segment.start)
    free_dims = head.query_KD.shape[1] - copied.stop
    basis_KD = nn.init.orthogonal_(torch.empty(token_dims, free_dims))
    head.query_KD.zero_()
    head.key_KD.zero_()
    head.query_KD[:token_dims, copied.stop :] = head.key_KD[:token_dims, copied.stop :] = (
        math.sqrt(_SAME_TOKEN) * basis_KD
    )
    positions = slice(token_dims, token_dims + position_dims)
    head.query_KD[positions, :position_dims] = -math.sqrt(_SAME_POSITION) * torch.eye(position_dims)
    head.key_KD[positions, :position_dims] = math.sqrt(_SAME_POSITION) * torch.eye(position_dims)
    head.value_KD[:_SEGMENT_DIMS] = 0.0
    head.value_KD[:_SEGMENT_DIMS, segment] = torch.eye(_SEGMENT_DIMS)
    head.output_DK[:, :_SEGMENT_DIMS] = 0.0
    head.output_DK[copied] = 0.0
    head.output_DK[copied, :_SEGMENT_DIMS] = torch.eye(_SEGMENT_DIMS)


def _init_segment_pooling_head(head: _Head, sign: float, segment: slice, copied: slice) -> None:
    """Initialize a head to attend to all tokens of one segment and to output the mean of their copied codes."""
    head.query_KD[:_SEGMENT_DIMS] = 0.0
    head.query_bias_K[:_SEGMENT_DIMS] = sign
    head.key_KD[:_SEGMENT_DIMS] = 0.0
    key_gain = _SAME_SEGMENT / _SEGMENT_DIMS * math.sqrt(head.width) / 2
    head.key_KD[:_SEGMENT_DIMS, segment] = key_gain * torch.eye(_SEGMENT_DIMS)
    head.value_KD[:_SEGMENT_DIMS] = 0.0
    head.value_KD[:_SEGMENT_DIMS, copied] = torch.eye(_SEGMENT_DIMS)
    nn.init.normal_(head.output_DK[:, :_SEGMENT_DIMS], std=_POOLED_STD)
