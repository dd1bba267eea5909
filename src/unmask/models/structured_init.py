"""Room card: first weights of a classic encoder whose heads know at birth where to look.

Comes in: a BertEncoder with random weights. Goes out: the same one, some of them replaced. Called by: classic.

Where learned positions begin as noise, a classic net has to find out from text alone which slot is beside which, and
stays near the unigram line until it has. Here the position table begins as waves (arXiv 1706.03762, section 3.5) in
dimensions of their own, which tokens and segments leave empty at first, and each head of the lower half of the blocks
begins with a distance of its own: slot i asks for slot i - 1, i + 1, i - 2 and so on. That first weights shaped like
trained ones help on small data is known (mimetic initialisation, arXiv 2305.09828). All of it is learned on like any
other weight, and what comes out is an ordinary BERT.

Whether two segments speak of one thing is harder still: the same words have to be met in both, and nothing rewards a
net for half of that. So for pairs some heads begin by asking for their own token elsewhere, and write down in which
segment they found it; in the last block one head gathers what the first segment's slots wrote, and one the second's.
From there the first slot can read, by a linear map, how much the two have in common.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, cast

import torch
from torch import nn

from unmask.core.errors import RecipeError

if TYPE_CHECKING:
    from unmask.models.bert import BertAttention, BertBlock, BertEncoder


_SHARE: Final = 4  # a quarter of the width is the positions'
_FASTEST: Final = 2.5  # radians from slot to slot: less than half a turn, so that left and right differ
_SPREAD: Final = 30.0  # how many times slower the slowest wave is
_AT_DISTANCE: Final = 12.0  # logit of the slot at a head's distance: nine tenths of its attention go there

_MARKS: Final = 8  # dimensions of a segment's mark, and as many of what a head saw
_SAME_TOKEN: Final = 2.0  # gain of an equal token in the head that looks for one
_SAME_SLOT: Final = 4.0  # and of an equal position, against it: a slot would find itself
_SAME_SEGMENT: Final = 6.0  # half the difference of logits between the segment that a head gathers and the other one
_TOLD: Final = 0.5  # deviation of the weights by which what was gathered is told


@torch.no_grad()
def init_neighbor_attention(encoder: BertEncoder) -> None:
    """Replace the positions, and the queries and keys of the lower half of the blocks.

    Raises:
        RecipeError: a head, or a quarter of the width, can't hold one wave.
    """
    settings = encoder.settings
    if min(settings.hidden_size // _SHARE, settings.head_width) < 2:
        raise RecipeError(
            f"a width of {settings.hidden_size} in {settings.num_attention_heads} heads is too small to begin with heads that look beside",
            location="model.init",
            hint=f"give it a width of {2 * _SHARE} and heads of 2 or more, or say init=normal",
        )
    speed_W = _speeds(encoder)
    angle_PW = torch.arange(len(encoder.position_embedding))[:, None] * speed_W
    own = 2 * len(speed_W)
    encoder.token_embedding[:, :own] = 0.0
    encoder.token_type_embedding[:, :own] = 0.0
    encoder.position_embedding[:, own:] = 0.0
    amplitude = math.sqrt(2) * settings.initializer_range  # the deviation of a wave is then that of the other tables
    encoder.position_embedding[:, 0:own:2] = amplitude * angle_PW.sin()
    encoder.position_embedding[:, 1:own:2] = amplitude * angle_PW.cos()
    for layer in range((settings.num_hidden_layers + 1) // 2):
        _ask_beside(_attention(encoder, layer), speed_W, settings.num_attention_heads)


@torch.no_grad()
def init_pair_matching(encoder: BertEncoder) -> None:
    """After init_neighbor_attention: let half the heads of its last block look for their own token, and the last block compare.

    Raises:
        RecipeError: too few blocks, heads, segments or dimensions for that.
    """
    settings = encoder.settings
    own = 2 * len(_speeds(encoder))
    fits = (
        min(settings.num_hidden_layers, settings.num_attention_heads, settings.type_vocab_size) > 1
        and settings.head_width >= 4 * _MARKS
    )
    if not fits:
        raise RecipeError(
            "this encoder is too small to begin with heads for pairs",
            location="model.init",
            hint=f"give it two layers, two heads of a width of {4 * _MARKS} and two segments, or say init=neighbor-attention",
        )
    mark = slice(own, own + _MARKS)
    saw = slice(own + _MARKS, own + 2 * _MARKS)
    encoder.token_embedding[:, own : saw.stop] = 0.0
    encoder.token_type_embedding[:2] = 0.0
    encoder.token_type_embedding[0, mark] = settings.initializer_range
    encoder.token_type_embedding[1, mark] = -settings.initializer_range
    middle, last = (
        _attention(encoder, layer)
        for layer in ((settings.num_hidden_layers + 1) // 2 - 1, settings.num_hidden_layers - 1)
    )
    for head in range(settings.num_attention_heads // 2, settings.num_attention_heads):
        _init_same_token_head(_Head(middle, head, settings.head_width), mark, saw)
    for head, sign in ((0, 1.0), (1, -1.0)):
        _init_segment_pooling_head(_Head(last, head, settings.head_width), sign, mark, saw)


def _speeds(encoder: BertEncoder) -> torch.Tensor:
    """Radians from slot to slot of each wave."""
    settings = encoder.settings
    waves = min(settings.hidden_size // _SHARE, settings.head_width) // 2
    return _FASTEST * _SPREAD ** (-torch.arange(waves) / waves)


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


def _ask_beside(attention: BertAttention, speed_W: torch.Tensor, heads: int) -> None:
    """Let head h ask for the slot at its distance: -1, +1, -2, +2 and so on."""
    waves = len(speed_W)
    head_width = len(attention.query.weight) // heads
    gain = math.sqrt(_AT_DISTANCE * math.sqrt(head_width) / (2 * waves))
    even_W = 2 * torch.arange(waves)
    for number in range(heads):
        head = _Head(attention, number, head_width)
        distance = (number // 2 + 1) * (1 if number % 2 else -1)
        cos_W, sin_W = gain * (speed_W * distance).cos(), gain * (speed_W * distance).sin()
        head.query_KD[: 2 * waves] = 0.0
        head.key_KD[: 2 * waves] = 0.0
        # The query holds the waves of slot i + distance, made of those of slot i; the key those of its own slot.
        head.query_KD[even_W, even_W], head.query_KD[even_W, even_W + 1] = cos_W, sin_W
        head.query_KD[even_W + 1, even_W], head.query_KD[even_W + 1, even_W + 1] = -sin_W, cos_W
        head.key_KD[even_W, even_W] = head.key_KD[even_W + 1, even_W + 1] = torch.full((waves,), gain)


def _init_same_token_head(head: _Head, mark: slice, saw: slice) -> None:
    """Let a head look for its own token in other slots, and write the mark of the segment it looked at."""
    tokens = head.width * 3 // 4
    places = min(head.width - tokens, mark.start)
    room = head.query_KD.shape[1] - saw.stop
    basis_KD = nn.init.orthogonal_(torch.empty(tokens, room))
    head.query_KD.zero_()
    head.key_KD.zero_()
    head.query_KD[:tokens, saw.stop :] = head.key_KD[:tokens, saw.stop :] = math.sqrt(_SAME_TOKEN) * basis_KD
    head.query_KD[tokens : tokens + places, :places] = -math.sqrt(_SAME_SLOT) * torch.eye(places)
    head.key_KD[tokens : tokens + places, :places] = math.sqrt(_SAME_SLOT) * torch.eye(places)
    head.value_KD[:_MARKS] = 0.0
    head.value_KD[:_MARKS, mark] = torch.eye(_MARKS)
    head.output_DK[:, :_MARKS] = 0.0
    head.output_DK[saw] = 0.0
    head.output_DK[saw, :_MARKS] = torch.eye(_MARKS)


def _init_segment_pooling_head(head: _Head, sign: float, mark: slice, saw: slice) -> None:
    """Let a head look at all slots of one segment, whoever asks, and tell what they saw."""
    head.query_KD[:_MARKS] = 0.0
    head.query_bias_K[:_MARKS] = sign
    head.key_KD[:_MARKS] = 0.0
    head.key_KD[:_MARKS, mark] = _SAME_SEGMENT / _MARKS * math.sqrt(head.width) / 2 * torch.eye(_MARKS)
    head.value_KD[:_MARKS] = 0.0
    head.value_KD[:_MARKS, saw] = torch.eye(_MARKS)
    nn.init.normal_(head.output_DK[:, :_MARKS], std=_TOLD)
