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
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import skip_init

from unmask.core.errors import ModelError, RecipeError
from unmask.core.types import Batch
from unmask.models.attention import Layout, arrange, attend
from unmask.models.layers import matrix, working_dtype


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


@dataclass(frozen=True)
class Family:
    """What a family of classic encoders calls its classes and its tensors."""

    masked: str  # the class with the masked-language-model head
    alone: str  # the class of the encoder alone
    prefix: str  # of the encoder's tensors, where a head stands beside it
    head: Mapping[str, str]  # their part -> ours; each has a weight and a bias
    bias: str  # of the decoder
    decoder: str  # its weight and, tied to `bias`, its bias once more
    with_pair: str = ""
    pair: Mapping[str, str] = field(default_factory=dict[str, str])


def _roberta(name: str) -> Family:
    head = {"lm_head.dense": "head.dense", "lm_head.layer_norm": "head.norm"}
    return Family(f"{name}ForMaskedLM", f"{name}Model", "roberta.", head, "lm_head.bias", "lm_head.decoder")


# model_type -> what it calls things
FAMILIES: Final[Mapping[str, Family]] = {
    "bert": Family(
        masked="BertForMaskedLM",
        alone="BertModel",
        prefix="bert.",
        head={
            "cls.predictions.transform.dense": "head.dense",
            "cls.predictions.transform.LayerNorm": "head.norm",
        },
        bias="cls.predictions.bias",
        decoder="cls.predictions.decoder",
        with_pair="BertForPreTraining",
        pair={"bert.pooler.dense": "pair.pooler", "cls.seq_relationship": "pair.relation"},
    ),
    "roberta": _roberta("Roberta"),
    "xlm-roberta": _roberta("XLMRoberta"),
}

# their part -> ours; each has a weight and a bias
_OF_A_BLOCK: Final[Mapping[str, str]] = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "feed_forward.input",
    "output.dense": "feed_forward.output",
    "output.LayerNorm": "feed_forward_norm",
}
_TABLES: Final[Mapping[str, str]] = {
    "embeddings.word_embeddings.weight": "encoder.token_table",
    "embeddings.position_embeddings.weight": "encoder.position_table",
    "embeddings.token_type_embeddings.weight": "encoder.segment_table",
}

# their key -> our field
_KEYS: Final[Mapping[str, str]] = {
    "hidden_size": "width",
    "intermediate_size": "feed_forward",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "type_vocab_size": "segments",
    "layer_norm_eps": "norm_epsilon",
    "initializer_range": "initial_deviation",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "tie_word_embeddings": "tied",
}
# what a BERT config may say and we can't hold: their key -> the only value that we do
_FIXED: Final[Mapping[str, object]] = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
_ROBERTA_PAD: Final = 1
# what a config means where it leaves a key out (configuration_bert.py and configuration_roberta.py, 4.57 and 5.23)
_ABSENT: Final[Mapping[str, Any]] = {
    **_FIXED,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "tie_word_embeddings": True,
}


def table(settings: ClassicSettings, *, pair: bool) -> dict[str, tuple[str, ...]]:
    """Their names -> ours (encoder, head and pair head told apart by prefix), spelled out for each layer."""
    family = FAMILIES[settings.family]
    linear = {f"{family.prefix}embeddings.LayerNorm": "encoder.embedding_norm"}
    for layer in range(settings.layers):
        linear |= {
            f"{family.prefix}encoder.layer.{layer}.{theirs}": f"encoder.blocks.{layer}.{ours}"
            for theirs, ours in _OF_A_BLOCK.items()
        }
    linear |= {**family.head, **(family.pair if pair else {})}
    names = {f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in linear.items() for part in ("weight", "bias")}
    tables = {f"{family.prefix}{theirs}": ours for theirs, ours in _TABLES.items()}
    whole = {theirs: (ours,) for theirs, ours in {**tables, **names, family.bias: "head.bias"}.items()}
    if not settings.tied:  # version 5 then reads the decoder's own bias, version 4 the one beside it
        whole |= {f"{family.decoder}.weight": ("head.decoder",), f"{family.decoder}.bias": ("head.bias",)}
    return whole


def tied(settings: ClassicSettings) -> Mapping[str, str]:
    """Their names for what is another tensor once more -> that other one's."""
    family = FAMILIES[settings.family]
    if not settings.tied:
        return {}
    table = f"{family.prefix}embeddings.word_embeddings.weight"
    return {f"{family.decoder}.weight": table, f"{family.decoder}.bias": family.bias}


def ignored(settings: ClassicSettings) -> tuple[str, ...]:
    """The numbers 0, 1, 2 …, which older versions wrote among the weights."""
    return (f"{FAMILIES[settings.family].prefix}embeddings.position_ids",)


def whole(settings: ClassicSettings) -> str:
    """The classes that hold encoder and head, for a message."""
    family = FAMILIES[settings.family]
    return " or ".join(name for name in (family.masked, family.with_pair) if name)


def has_pair(tensors: Mapping[str, object], settings: ClassicSettings) -> bool:
    """Whether a file holds any part of a pair head."""
    return any(name.startswith(tuple(f"{theirs}." for theirs in FAMILIES[settings.family].pair)) for name in tensors)


def config(settings: ClassicSettings, ids: Mapping[str, int | None], *, pair: bool) -> dict[str, Any]:
    """All of config.json but the size of the vocabulary; `ids` has pad_token_id, cls_token_id and sep_token_id."""
    family = FAMILIES[settings.family]
    said = {"architectures": [family.with_pair if pair else family.masked], "model_type": settings.family}
    said |= {theirs: getattr(settings, ours) for theirs, ours in _KEYS.items()}
    said |= {"max_position_embeddings": settings.longest + settings.first_position, **_FIXED}
    if settings.family == "bert":
        return said | {"pad_token_id": ids["pad_token_id"]}
    # Their positions are counted from this number, whatever the tokenizer pads with.
    said |= {"pad_token_id": settings.first_position - 1}
    return said | {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}


def settings_of(said: Mapping[str, Any]) -> ClassicSettings:
    """The settings that a config.json of these model_types means.

    Raises:
        ModelError: a variant that isn't held here; the key is named.
    """
    config = {**_ABSENT, **said}
    for key, only in _FIXED.items():
        if config[key] != only:
            raise ModelError(
                f"`{key}` = {config[key]!r} is not held here, only {only!r}",
                where=f"config.json: {key}",
                next="give a BERT or RoBERTa folder without it, or a model of `unmask pretrain`",
            )
    family = config["model_type"]
    first = 0 if family == "bert" else config.get("pad_token_id", _ROBERTA_PAD) + 1
    return ClassicSettings(
        **{ours: config[theirs] for theirs, ours in _KEYS.items()},
        longest=config["max_position_embeddings"] - first,
        family=family,
        first_position=first,
    )
