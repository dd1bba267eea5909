"""The model of the annotated masked language model tutorial (labml.ai), with the same weights.

The input is the token embedding times sqrt(hidden_size) plus fixed sinusoidal positions, without dropout. Blocks are
pre-norm, with biases, ReLU, and dropout on attention, on the inner layer and on the output of each sublayer. A final
norm and an untied decoder follow. With 67 tokens, the model has 812,355 parameters.

Initial weights are those of the tutorial's training run: torch's defaults (token embedding normal with standard
deviation 1), and all blocks start as copies of one block. The tutorial's Xavier initialization is part of its
encoder-decoder class, which that run doesn't use.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from unmask.core.config import require
from unmask.core.errors import RecipeError
from unmask.core.types import Batch
from unmask.models.attention import AttentionPlan, attention, plan_attention
from unmask.models.layers import EncoderModule, HeadModule, compute_dtype


@dataclass(frozen=True)
class TutorialConfig:
    """Architecture of the tutorial's model."""

    kind: Literal["tutorial"] = "tutorial"  # Model of the annotated tutorial (labml.ai).
    num_hidden_layers: int = 6  # Number of layers.
    hidden_size: int = 128  # Width of the token vectors.
    num_attention_heads: int = 8  # Number of attention heads per layer; it divides `hidden_size`.
    intermediate_size: int = 256  # Width of the feed-forward network.
    dropout: float = 0.1  # Dropout on attention, inside the feed-forward network and after each sublayer.
    max_position_embeddings: int = 5000  # [tokens] Maximum length of a sequence.

    def __post_init__(self) -> None:
        require(
            self,
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            min=1,
        )
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 2:
            raise RecipeError(
                f"hidden_size = {self.hidden_size} is odd, or not divisible by num_attention_heads = "
                f"{self.num_attention_heads}",
                location="num_attention_heads",
                hint=f"set hidden_size to an even multiple of {self.num_attention_heads}",
            )
        require(self, "dropout", min=0, below=1)

    @property
    def head_width(self) -> int:
        """Dimensions of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def attention_dropout(self) -> float:
        """Dropout on attention, equal to `dropout`."""
        return self.dropout


class TutorialAttention(nn.Module):
    """Multi-head self-attention with biases."""

    def __init__(self, settings: TutorialConfig) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (
            nn.Linear(settings.hidden_size, settings.hidden_size) for _ in range(4)
        )
        self._heads = (settings.num_attention_heads, settings.head_width)
        self._dropout = settings.dropout

    def forward(self, hidden_TD: Float[Tensor, "T D"], plan: AttentionPlan) -> Float[Tensor, "T D"]:
        """Return the attention output. Attention never crosses a sequence."""
        q_THK, k_THK, v_THK = (
            linear(hidden_TD).unflatten(-1, self._heads) for linear in (self.query, self.key, self.value)
        )
        dropout = self._dropout if self.training else 0.0
        return self.output(attention(q_THK, k_THK, v_THK, plan, dropout=dropout).flatten(1))


class TutorialFeedForward(nn.Module):
    """Two linear maps with a ReLU in between."""

    def __init__(self, settings: TutorialConfig) -> None:
        super().__init__()
        self.input = nn.Linear(settings.hidden_size, settings.intermediate_size)
        self.output = nn.Linear(settings.intermediate_size, settings.hidden_size)
        self._dropout = settings.dropout

    def forward(self, hidden_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Apply the network to each vector."""
        return self.output(F.dropout(F.relu(self.input(hidden_TD)), self._dropout, self.training))


class TutorialBlock(nn.Module):
    """Attention and feed-forward network, each after a norm and with a residual connection (pre-norm)."""

    def __init__(self, settings: TutorialConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(settings.hidden_size)
        self.attention = TutorialAttention(settings)
        self.mlp_norm = nn.LayerNorm(settings.hidden_size)
        self.mlp = TutorialFeedForward(settings)
        self._dropout = settings.dropout

    def forward(self, hidden_TD: Float[Tensor, "T D"], plan: AttentionPlan) -> Float[Tensor, "T D"]:
        """Return the hidden states after the block."""
        attended_TD = self.attention(self.attention_norm(hidden_TD), plan)
        hidden_TD = hidden_TD + F.dropout(attended_TD, self._dropout, self.training)
        inner_TD = self.mlp(self.mlp_norm(hidden_TD))
        return hidden_TD + F.dropout(inner_TD, self._dropout, self.training)


def sinusoids(length: int, width: int) -> Float[Tensor, "S D"]:
    """Return sinusoidal position vectors: sine in even, cosine in odd dimensions (arXiv 1706.03762, section 3.5)."""
    position_S1 = torch.arange(length, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * -(math.log(10_000.0) / width))
    angle = position_S1 * frequency
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)


class TutorialEncoder(EncoderModule):
    """The tutorial's encoder. Initial weights come from torch's default generator, which the caller seeds."""

    settings: TutorialConfig
    position_SD: Tensor

    def __init__(self, settings: TutorialConfig, vocab_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.hidden_size = settings.hidden_size
        self.vocab_size = vocab_size
        self.token_embedding = nn.Parameter(torch.randn(vocab_size, settings.hidden_size))
        block = TutorialBlock(settings)
        self.blocks = nn.ModuleList(copy.deepcopy(block) for _ in range(settings.num_hidden_layers))
        self.final_norm = nn.LayerNorm(settings.hidden_size)
        self.register_buffer(
            "position_SD", sinusoids(settings.max_position_embeddings, settings.hidden_size), persistent=False
        )

    def encode(self, batch: Batch, positions_M: Int[Tensor, "M"] | None = None) -> Float[Tensor, "N D"]:
        """Return one vector per token, in the order of the batch, or those at positions."""
        settings = self.settings
        assert batch.max_seqlen <= settings.max_position_embeddings, "a sequence exceeds max_position_embeddings"
        dropout = settings.dropout if self.training else 0.0
        dtype = compute_dtype(self.token_embedding)
        plan = plan_attention(batch, dtype=dtype, dropout=dropout, head_width=settings.head_width)
        token_TD = F.embedding(plan.to_plan_order(batch.ids_T), self.token_embedding)
        position_TD = self.position_SD.index_select(0, plan.position_T)
        hidden_TD = token_TD * math.sqrt(settings.hidden_size) + position_TD
        for block in self.blocks:
            hidden_TD = block(hidden_TD, plan)
        return plan.at(self.final_norm(hidden_TD), positions_M)


class TutorialHead(HeadModule):
    """Linear decoder with a bias, not tied to the token embedding."""

    def __init__(self, settings: TutorialConfig, vocab_size: int) -> None:
        super().__init__()
        self.decoder = nn.Linear(settings.hidden_size, vocab_size)

    def features(self, hidden_MD: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
        """Return the hidden states: nothing precedes the decoder."""
        return hidden_MD

    def decoder_parameters(self, token_embedding_VD: Float[Tensor, "V D"]) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the decoder."""
        return self.decoder.weight, self.decoder.bias
