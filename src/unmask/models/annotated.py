"""Room card: the net of the annotated masked-language-model tutorial (labml.ai), weight for weight.

Comes in: a Batch. Goes out: one vector per slot; from the head, logits at the asked positions. Called by: build, for
the recipe `seed`, and through the Encoder and Head contracts by everyone.

Token vectors × √width plus fixed sinusoids (no dropout there); pre-norm blocks with biases, ReLU, and dropout on
attention, on the hidden layer and on what is added; a final norm; an untied output. 812,355 parameters at 67 pieces.

Initial weights are what the tutorial's run starts from: torch's own defaults (token vectors normal with deviation 1),
and all blocks copies of one. Its Xavier initialisation stands in the encoder-decoder class, which that experiment
never makes.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unmask.core.errors import RecipeError
from unmask.core.types import Batch
from unmask.models.attention import AttentionPlan, attention, plan_attention
from unmask.models.layers import working_dtype


@dataclass(frozen=True)
class TutorialConfig:
    """The shape of the tutorial's net."""

    kind: Literal["tutorial"] = "tutorial"
    num_hidden_layers: int = 6
    hidden_size: int = 128
    num_attention_heads: int = 8
    intermediate_size: int = 256
    dropout: float = 0.1
    max_position_embeddings: int = 5000  # tokens of a text

    def __post_init__(self) -> None:
        for name in (
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise RecipeError(f"`{name}` is {getattr(self, name)}", location=name, hint="give at least 1")
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 2:
            raise RecipeError(
                f"a width of {self.hidden_size} can't be cut into {self.num_attention_heads} heads, or into sines and cosines",
                location="num_attention_heads",
                hint=f"choose an even `hidden_size` that is a multiple of {self.num_attention_heads}",
            )
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"`dropout` is {self.dropout}", location="dropout", hint="give a share from 0 to below 1")

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def attention_dropout(self) -> float:
        """The same dropout, also on attention."""
        return self.dropout


class TutorialAttention(nn.Module):
    """Multi-head attention with biases."""

    def __init__(self, settings: TutorialConfig) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (
            nn.Linear(settings.hidden_size, settings.hidden_size) for _ in range(4)
        )
        self._heads = (settings.num_attention_heads, settings.head_width)
        self._dropout = settings.dropout

    def forward(self, hidden_TD: Float[Tensor, "T D"], layout: AttentionPlan) -> Float[Tensor, "T D"]:
        """Each slot's view of its own text."""
        q_THK, k_THK, v_THK = (
            linear(hidden_TD).unflatten(-1, self._heads) for linear in (self.query, self.key, self.value)
        )
        dropout = self._dropout if self.training else 0.0
        return self.output(attention(q_THK, k_THK, v_THK, layout, dropout=dropout).flatten(1))


class TutorialFeedForward(nn.Module):
    """Two linear maps with a ReLU between."""

    def __init__(self, settings: TutorialConfig) -> None:
        super().__init__()
        self.input = nn.Linear(settings.hidden_size, settings.intermediate_size)
        self.output = nn.Linear(settings.intermediate_size, settings.hidden_size)
        self._dropout = settings.dropout

    def forward(self, hidden_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Each row for itself."""
        return self.output(F.dropout(F.relu(self.input(hidden_TD)), self._dropout, self.training))


class TutorialBlock(nn.Module):
    """Attention, then the feed-forward net, each normalised before and added after."""

    def __init__(self, settings: TutorialConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(settings.hidden_size)
        self.attention = TutorialAttention(settings)
        self.mlp_norm = nn.LayerNorm(settings.hidden_size)
        self.mlp = TutorialFeedForward(settings)
        self._dropout = settings.dropout

    def forward(self, hidden_TD: Float[Tensor, "T D"], layout: AttentionPlan) -> Float[Tensor, "T D"]:
        """The residual stream after this block."""
        seen_TD = self.attention(self.attention_norm(hidden_TD), layout)
        hidden_TD = hidden_TD + F.dropout(seen_TD, self._dropout, self.training)
        inner_TD = self.mlp(self.mlp_norm(hidden_TD))
        return hidden_TD + F.dropout(inner_TD, self._dropout, self.training)


def sinusoids(longest: int, width: int) -> Float[Tensor, "S D"]:
    """Fixed positions: sine in the even columns, cosine in the odd ones (arXiv 1706.03762, section 3.5)."""
    position_S1 = torch.arange(longest, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * -(math.log(10_000.0) / width))
    angle = position_S1 * frequency
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)


class TutorialEncoder(nn.Module):
    """The tutorial's embedding and encoder; initial weights from torch's generator, which the caller seeds."""

    position_SD: Tensor

    def __init__(self, settings: TutorialConfig, vocabulary: int) -> None:
        super().__init__()
        self.settings = settings
        self.width = settings.hidden_size
        self.vocabulary = vocabulary
        self.token_embedding = nn.Parameter(torch.randn(vocabulary, settings.hidden_size))
        block = TutorialBlock(settings)
        self.blocks = nn.ModuleList(copy.deepcopy(block) for _ in range(settings.num_hidden_layers))
        self.final_norm = nn.LayerNorm(settings.hidden_size)
        self.register_buffer(
            "position_SD", sinusoids(settings.max_position_embeddings, settings.hidden_size), persistent=False
        )

    def forward(self, batch: Batch) -> Float[Tensor, "T D"]:
        """One vector per slot, in the batch's order."""
        settings = self.settings
        assert batch.tokens == 0 or batch.max_seqlen <= max(settings.max_position_embeddings, batch.filler), (
            "a text beyond `max_position_embeddings`"
        )
        dropout = settings.dropout if self.training else 0.0
        dtype = working_dtype(self.token_embedding)
        layout = plan_attention(batch, dtype=dtype, dropout=dropout, head_width=settings.head_width)
        token_TD = F.embedding(layout.arranged(batch.ids_T), self.token_embedding)
        position_T = layout.position_T.clamp_max(
            settings.max_position_embeddings - 1
        )  # only a filler text can be longer
        hidden_TD = token_TD * math.sqrt(settings.hidden_size) + self.position_SD.index_select(0, position_T)
        for block in self.blocks:
            hidden_TD = block(hidden_TD, layout)
        return layout.restored(self.final_norm(hidden_TD))


class TutorialHead(nn.Module):
    """A linear map to the vocabulary with a bias, not tied to the token table."""

    def __init__(self, settings: TutorialConfig, vocabulary: int) -> None:
        super().__init__()
        self.decoder = nn.Linear(settings.hidden_size, vocabulary)

    def forward(self, hidden_MD: Float[Tensor, "M D"], token_table_VD: Float[Tensor, "V D"]) -> Float[Tensor, "M V"]:
        """Logits over the vocabulary."""
        del token_table_VD
        return self.decoder(hidden_MD)
