"""Room card: the modern encoder, weight for weight the ModernBertForMaskedLM of `transformers` (arXiv 2412.13663).

Comes in: a Batch. Goes out: one vector per slot; from the head, logits at the asked positions. Called by: build, and
through the Encoder and Head contracts by everyone.

No biases; a norm after the embedding and none before attention in block 0; every `global_every`-th block, from the
first, sees the whole text and turns by `global_theta`, the others see a local window and turn by `local_theta`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unmask.contracts import Batch
from unmask.errors import RecipeError
from unmask.nn.attention import Layout, arrange, attend
from unmask.nn.layers import GeGLU, LayerNorm, Rotary, matrix, turn, working_dtype


@dataclass(frozen=True)
class ModernSettings:
    """The shape of a modern encoder; all that a ModernBERT config.json can say and a recipe would want to."""

    kind: Literal["modern"] = "modern"
    layers: int = 4
    width: int = 256
    heads: int = 4
    feed_forward: int = 384  # of each half of the gated net
    global_every: int = 3
    local_window: int = 128  # tokens in all: 64 to each side
    global_theta: float = 160_000.0
    local_theta: float = 10_000.0
    longest: int = 8192  # tokens of a text
    norm_epsilon: float = 1e-5
    initial_deviation: float = 0.02
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0  # above 0, attention takes the padded path
    feed_forward_dropout: float = 0.0
    tied: bool = True  # the decoder is the token table; untied, the head has a table of its own

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "feed_forward", "global_every", "longest"):
            if getattr(self, name) < 1:
                raise RecipeError(f"`{name}` is {getattr(self, name)}", where=name, next="give at least 1")
        if self.width % (2 * self.heads):
            raise RecipeError(
                f"a width of {self.width} can't be cut into {self.heads} heads of an even width",
                where="heads",
                next=f"choose `width` as a multiple of {2 * self.heads}, or fewer heads",
            )
        if self.local_window < 2 or self.local_window % 2:
            raise RecipeError(
                f"a local window of {self.local_window} tokens has no two equal sides",
                where="local_window",
                next="give an even number of tokens, such as 128",
            )
        for name in ("global_theta", "local_theta", "norm_epsilon", "initial_deviation"):
            if not 0 < getattr(self, name) < math.inf:
                raise RecipeError(f"`{name}` is {getattr(self, name)}", where=name, next="give a number above 0")
        for name in ("embedding_dropout", "attention_dropout", "feed_forward_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(
                    f"`{name}` is {getattr(self, name)}", where=name, next="give a share from 0 to below 1"
                )

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    def sees_all(self, layer: int) -> bool:
        """Whether this layer sees the whole text."""
        return layer % self.global_every == 0

    @property
    def output_deviation(self) -> float:
        """Of the weights that write into the residual stream: smaller, the more layers write (as in GPT-2)."""
        return self.initial_deviation / math.sqrt(2 * self.layers)


class Attention(nn.Module):
    """Multi-head attention with rotary positions."""

    def __init__(self, settings: ModernSettings, layer: int) -> None:
        super().__init__()
        width, deviation = settings.width, settings.initial_deviation
        self.query = matrix(width, width, deviation)
        self.key = matrix(width, width, deviation)
        self.value = matrix(width, width, deviation)
        self.output = matrix(width, width, settings.output_deviation)
        self._heads = (settings.heads, settings.head_width)
        self._window = None if settings.sees_all(layer) else settings.local_window
        self._dropout = settings.attention_dropout

    def forward(
        self, hidden_TD: Float[Tensor, "T D"], layout: Layout, turns: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "T D"]:
        """Each slot's view of its own text."""
        hidden_TD = hidden_TD.to(working_dtype(hidden_TD))  # cast once, not once per matrix
        q_THK = turn(self.query(hidden_TD).unflatten(-1, self._heads), turns)
        k_THK = turn(self.key(hidden_TD).unflatten(-1, self._heads), turns)
        v_THK = self.value(hidden_TD).unflatten(-1, self._heads)
        dropout = self._dropout if self.training else 0.0
        seen_TD = attend(q_THK, k_THK, v_THK, layout, self._window, dropout).flatten(1)
        return F.dropout(self.output(seen_TD), dropout)


class ModernBlock(nn.Module):
    """Attention, then the gated net, each normalised before and added after."""

    def __init__(self, settings: ModernSettings, layer: int) -> None:
        super().__init__()
        # The embedding is normalised already, so block 0 has no norm before attention.
        self.attention_norm = LayerNorm(settings.width, settings.norm_epsilon) if layer else nn.Identity()
        self.attention = Attention(settings, layer)
        self.feed_forward_norm = LayerNorm(settings.width, settings.norm_epsilon)
        self.feed_forward = GeGLU(
            settings.width,
            settings.feed_forward,
            settings.initial_deviation,
            settings.output_deviation,
            settings.feed_forward_dropout,
        )
        self.theta = settings.global_theta if settings.sees_all(layer) else settings.local_theta

    def forward(
        self, hidden_TD: Float[Tensor, "T D"], layout: Layout, turns: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "T D"]:
        """The residual stream after this block."""
        hidden_TD = hidden_TD + self.attention(self.attention_norm(hidden_TD), layout, turns)
        return hidden_TD + self.feed_forward(self.feed_forward_norm(hidden_TD))


class ModernEncoder(nn.Module):
    """ModernBertModel: initial weights are drawn from torch's generator, which the caller seeds."""

    def __init__(self, settings: ModernSettings, vocabulary: int) -> None:
        super().__init__()
        self.settings = settings
        self.width = settings.width
        self.vocabulary = vocabulary
        self.token_table = nn.Parameter(matrix(settings.width, vocabulary, settings.initial_deviation).weight.detach())
        self.embedding_norm = LayerNorm(settings.width, settings.norm_epsilon)
        self.blocks = nn.ModuleList(ModernBlock(settings, layer) for layer in range(settings.layers))
        self.final_norm = LayerNorm(settings.width, settings.norm_epsilon)
        self._rotary = Rotary(settings.head_width, settings.longest)

    def forward(self, batch: Batch) -> Float[Tensor, "T D"]:
        """One vector per slot, in the batch's order."""
        settings = self.settings
        dropout = settings.attention_dropout if self.training else 0.0
        dtype = working_dtype(self.token_table)
        layout = arrange(batch, dtype=dtype, dropout=dropout, head_width=settings.head_width)
        hidden_TD = self.embedding_norm(F.embedding(layout.arranged(batch.ids_T), self.token_table))
        hidden_TD = F.dropout(hidden_TD, settings.embedding_dropout, self.training)
        thetas = {block.theta for block in self.blocks if isinstance(block, ModernBlock)}
        turns = {theta: self._rotary.turns(layout.position_T, theta, dtype) for theta in thetas}
        for block in self.blocks:
            assert isinstance(block, ModernBlock)
            hidden_TD = block(hidden_TD, layout, turns[block.theta])
        return layout.restored(self.final_norm(hidden_TD))


class ModernHead(nn.Module):
    """Dense, GELU, norm, and a decoder with a bias of its own: the token table, or a table of its own if untied."""

    def __init__(self, settings: ModernSettings, vocabulary: int) -> None:
        super().__init__()
        self.dense = matrix(settings.width, settings.width, settings.output_deviation)
        self.norm = LayerNorm(settings.width, settings.norm_epsilon)
        self.bias = nn.Parameter(Tensor(vocabulary).zero_())
        own = None if settings.tied else matrix(settings.width, vocabulary, settings.initial_deviation)
        self.decoder = None if own is None else nn.Parameter(own.weight.detach())

    def forward(self, hidden_MD: Float[Tensor, "M D"], token_table_VD: Float[Tensor, "V D"]) -> Float[Tensor, "M V"]:
        """Logits over the vocabulary."""
        decoder_VD = token_table_VD if self.decoder is None else self.decoder
        return F.linear(self.norm(F.gelu(self.dense(hidden_MD))), decoder_VD, self.bias)
