"""Room card: the classic encoder, weight for weight the BertForPreTraining of `transformers` (arXiv 1810.04805).

Comes in: a Batch; segments from its `segment_T`, where None means segment 0 everywhere. Goes out: one vector per slot;
from the head, logits at the asked positions; from the pair head, two logits per text. Called by: build, and through the
Encoder and Head contracts by everyone.

Token, position and segment vectors are added and normalised; every block adds first and normalises after, with biases
everywhere; the decoder is tied to the token table. The pair head (the pooler and what reads it) is a module of its own,
since training on masks alone has no use for it: without one a model is what `transformers` calls BertForMaskedLM.
RoBERTa (arXiv 1907.11692) and XLM-R are the same net whose texts begin at a later row of the position table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import skip_init

from unmask.contracts import Batch
from unmask.errors import RecipeError
from unmask.nn.attention import Layout, arrange, attend
from unmask.nn.beginning import look_across, look_beside
from unmask.nn.layers import matrix, working_dtype


@dataclass(frozen=True)
class ClassicSettings:
    """The shape of a classic encoder; all that a BERT config.json can say and a recipe would want to."""

    kind: Literal["classic"] = "classic"
    layers: int = 4
    width: int = 256
    heads: int = 4
    feed_forward: int = 1024
    longest: int = 512  # tokens of a text: positions are learned, so there are no more than these
    segments: int = 2
    norm_epsilon: float = 1e-12
    initial_deviation: float = 0.02
    beginning: Literal["random", "beside", "pairs"] = "random"  # where heads look at first: see nn/beginning
    hidden_dropout: float = 0.0  # on the embedding and on what a block adds; BERT's own is 0.1
    attention_dropout: float = 0.0  # above 0, attention takes the padded path; BERT's own is 0.1
    tied: bool = True  # the decoder is the token table; untied, the head has a table of its own
    family: Literal["bert", "roberta", "xlm-roberta"] = "bert"  # whose class and names its folders carry
    first_position: int = 0  # row of the position table for a text's first token; RoBERTa: its padding's id + 1, so 2

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "feed_forward", "longest", "segments"):
            if getattr(self, name) < 1:
                raise RecipeError(f"`{name}` is {getattr(self, name)}", where=name, next="give at least 1")
        if (self.first_position == 0) != (self.family == "bert") or self.first_position < 0:
            raise RecipeError(
                f"`first_position` is {self.first_position} in a net of the family {self.family!r}",
                where="first_position",
                next="give 0 for bert; for roberta and xlm-roberta the id of their padding + 1, which is 2 in theirs",
            )
        if self.width % self.heads:
            raise RecipeError(
                f"a width of {self.width} can't be cut into {self.heads} heads",
                where="heads",
                next=f"choose `width` as a multiple of {self.heads}, or fewer heads",
            )
        for name in ("norm_epsilon", "initial_deviation"):
            if not 0 < getattr(self, name) < math.inf:
                raise RecipeError(f"`{name}` is {getattr(self, name)}", where=name, next="give a number above 0")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(
                    f"`{name}` is {getattr(self, name)}", where=name, next="give a share from 0 to below 1"
                )

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.width // self.heads


def _linear(inputs: int, outputs: int, deviation: float) -> nn.Linear:
    """A linear map; normal draws, cut at two deviations as in BERT's own code, and a bias of zeros."""
    linear = cast("nn.Linear", skip_init(nn.Linear, inputs, outputs))
    nn.init.trunc_normal_(linear.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    nn.init.zeros_(linear.bias)
    return linear


def _table(rows: int, width: int, deviation: float) -> nn.Parameter:
    """A table that is indexed, drawn as the matrices are."""
    return nn.Parameter(matrix(width, rows, deviation).weight.detach())


class ClassicAttention(nn.Module):
    """Multi-head attention with biases."""

    def __init__(self, settings: ClassicSettings) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (
            _linear(settings.width, settings.width, settings.initial_deviation) for _ in range(4)
        )
        self._heads = (settings.heads, settings.head_width)
        self._dropout = settings.attention_dropout

    def forward(self, hidden_TD: Float[Tensor, "T D"], layout: Layout) -> Float[Tensor, "T D"]:
        """Each slot's view of its own text."""
        hidden_TD = hidden_TD.to(working_dtype(hidden_TD))  # cast once, not once per matrix
        q_THK, k_THK, v_THK = (
            linear(hidden_TD).unflatten(-1, self._heads) for linear in (self.query, self.key, self.value)
        )
        dropout = self._dropout if self.training else 0.0
        return self.output(attend(q_THK, k_THK, v_THK, layout, dropout=dropout).flatten(1))


class ClassicFeedForward(nn.Module):
    """Two linear maps with a GELU between."""

    def __init__(self, settings: ClassicSettings) -> None:
        super().__init__()
        self.input = _linear(settings.width, settings.feed_forward, settings.initial_deviation)
        self.output = _linear(settings.feed_forward, settings.width, settings.initial_deviation)

    def forward(self, hidden_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Each row for itself."""
        return self.output(F.gelu(self.input(hidden_TD)))


class ClassicBlock(nn.Module):
    """Attention, then the feed-forward net, each added first and normalised after."""

    def __init__(self, settings: ClassicSettings) -> None:
        super().__init__()
        self.attention = ClassicAttention(settings)
        self.attention_norm = nn.LayerNorm(settings.width, settings.norm_epsilon)
        self.feed_forward = ClassicFeedForward(settings)
        self.feed_forward_norm = nn.LayerNorm(settings.width, settings.norm_epsilon)
        self._dropout = settings.hidden_dropout

    def forward(self, hidden_TD: Float[Tensor, "T D"], layout: Layout) -> Float[Tensor, "T D"]:
        """The normalised vectors after this block."""
        seen_TD = F.dropout(self.attention(hidden_TD, layout), self._dropout, self.training)
        hidden_TD = self.attention_norm(hidden_TD + seen_TD)
        inner_TD = F.dropout(self.feed_forward(hidden_TD), self._dropout, self.training)
        return self.feed_forward_norm(hidden_TD + inner_TD)


class ClassicEncoder(nn.Module):
    """BertModel without its pooler: initial weights are drawn from torch's generator, which the caller seeds."""

    def __init__(self, settings: ClassicSettings, vocabulary: int) -> None:
        super().__init__()
        self.settings = settings
        self.width = settings.width
        self.vocabulary = vocabulary
        deviation = settings.initial_deviation
        self.token_table = _table(vocabulary, settings.width, deviation)
        self.position_table = _table(settings.first_position + settings.longest, settings.width, deviation)
        self.segment_table = _table(settings.segments, settings.width, deviation)
        self.embedding_norm = nn.LayerNorm(settings.width, settings.norm_epsilon)
        self.blocks = nn.ModuleList(ClassicBlock(settings) for _ in range(settings.layers))
        if settings.beginning != "random":
            look_beside(self)
        if settings.beginning == "pairs":
            look_across(self)

    def forward(self, batch: Batch) -> Float[Tensor, "T D"]:
        """One vector per slot, in the batch's order."""
        settings = self.settings
        assert batch.tokens == 0 or batch.longest <= max(settings.longest, batch.filler), "a text beyond `longest`"
        dropout = settings.attention_dropout if self.training else 0.0
        dtype = working_dtype(self.token_table)
        layout = arrange(batch, dtype=dtype, dropout=dropout, head_width=settings.head_width)
        # In BERT's order of addition, so that both have the same bits.
        hidden_TD = F.embedding(layout.arranged(batch.ids_T), self.token_table)
        if batch.segment_T is None:
            hidden_TD = hidden_TD + self.segment_table[0]
        else:
            hidden_TD = hidden_TD + F.embedding(layout.arranged(batch.segment_T), self.segment_table)
        position_T = layout.position_T.clamp_max(settings.longest - 1)  # only a filler text can be longer
        hidden_TD = hidden_TD + F.embedding(position_T + settings.first_position, self.position_table)
        hidden_TD = self.embedding_norm(hidden_TD)
        hidden_TD = F.dropout(hidden_TD, settings.hidden_dropout, self.training)
        for block in self.blocks:
            hidden_TD = block(hidden_TD, layout)
        return layout.restored(hidden_TD)


class ClassicHead(nn.Module):
    """Dense, GELU, norm, and a decoder with a bias of its own: the token table, or a table of its own if untied."""

    def __init__(self, settings: ClassicSettings, vocabulary: int) -> None:
        super().__init__()
        self.dense = _linear(settings.width, settings.width, settings.initial_deviation)
        self.norm = nn.LayerNorm(settings.width, settings.norm_epsilon)
        self.bias = nn.Parameter(Tensor(vocabulary).zero_())
        self.decoder = None if settings.tied else _table(vocabulary, settings.width, settings.initial_deviation)

    def forward(self, hidden_MD: Float[Tensor, "M D"], token_table_VD: Float[Tensor, "V D"]) -> Float[Tensor, "M V"]:
        """Logits over the vocabulary."""
        decoder_VD = token_table_VD if self.decoder is None else self.decoder
        return F.linear(self.norm(F.gelu(self.dense(hidden_MD))), decoder_VD, self.bias)


class PairHead(nn.Module):
    """The pooler, dense and tanh on each text's first slot, and the two-way choice that BERT reads from it.

    In a model trained by BERT's own rule the first logit says that the second segment follows the first one.
    """

    def __init__(self, settings: ClassicSettings) -> None:
        super().__init__()
        self.pooler = _linear(settings.width, settings.width, settings.initial_deviation)
        self.relation = _linear(settings.width, 2, settings.initial_deviation)

    def forward(self, hidden_TD: Float[Tensor, "T D"], batch: Batch) -> Float[Tensor, "B 2"]:
        """Two logits for each text, the filler left out."""
        first_BD = hidden_TD.index_select(0, batch.starts_B1[: batch.texts])
        return self.relation(self.pooler(first_BD).tanh())
