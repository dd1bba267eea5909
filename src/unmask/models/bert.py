"""Room card: the classic encoder, weight for weight the BertForPreTraining of `transformers` (arXiv 1810.04805).

Comes in: a Batch; segments from its `token_type_ids_T`, where None means segment 0 everywhere. Goes out: one vector per slot;
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
from unmask.models.attention import AttentionPlan, attention, plan_attention
from unmask.models.layers import matrix, working_dtype


@dataclass(frozen=True)
class BertConfig:
    """The shape of a classic encoder; all that a BERT config.json can say and a recipe would want to."""

    kind: Literal["bert"] = "bert"
    num_hidden_layers: int = 4
    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    max_position_embeddings: int = 512  # tokens of a text: positions are learned, so there are no more than these
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    init: Literal["normal", "neighbor-attention", "pair-matching"] = (
        "normal"  # where heads look at first: see nn/beginning
    )
    hidden_dropout: float = 0.0  # on the embedding and on what a block adds; BERT's own is 0.1
    attention_dropout: float = 0.0  # above 0, attention takes the padded path; BERT's own is 0.1
    tie_word_embeddings: bool = True  # the decoder is the token table; untied, the head has a table of its own
    model_type: Literal["bert", "roberta", "xlm-roberta"] = "bert"  # whose class and names its folders carry
    position_offset: int = 0  # row of the position table for a text's first token; RoBERTa: its padding's id + 1, so 2

    def __post_init__(self) -> None:
        for name in (
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        ):
            if getattr(self, name) < 1:
                raise RecipeError(f"`{name}` is {getattr(self, name)}", location=name, hint="give at least 1")
        if (self.position_offset == 0) != (self.model_type == "bert") or self.position_offset < 0:
            raise RecipeError(
                f"`position_offset` is {self.position_offset} in a net of the family {self.model_type!r}",
                location="position_offset",
                hint="give 0 for bert; for roberta and xlm-roberta the id of their padding + 1, which is 2 in theirs",
            )
        if self.hidden_size % self.num_attention_heads:
            raise RecipeError(
                f"a width of {self.hidden_size} can't be cut into {self.num_attention_heads} heads",
                location="num_attention_heads",
                hint=f"choose `hidden_size` as a multiple of {self.num_attention_heads}, or fewer heads",
            )
        for name in ("layer_norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise RecipeError(f"`{name}` is {getattr(self, name)}", location=name, hint="give a number above 0")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(
                    f"`{name}` is {getattr(self, name)}", location=name, hint="give a share from 0 to below 1"
                )

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads


def _linear(inputs: int, outputs: int, deviation: float) -> nn.Linear:
    """A linear map; normal draws, cut at two deviations as in BERT's own code, and a bias of zeros."""
    linear = cast("nn.Linear", skip_init(nn.Linear, inputs, outputs))
    nn.init.trunc_normal_(linear.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    nn.init.zeros_(linear.bias)
    return linear


def _table(rows: int, width: int, deviation: float) -> nn.Parameter:
    """A table that is indexed, drawn as the matrices are."""
    return nn.Parameter(matrix(width, rows, deviation).weight.detach())


class BertAttention(nn.Module):
    """Multi-head attention with biases."""

    def __init__(self, settings: BertConfig) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (
            _linear(settings.hidden_size, settings.hidden_size, settings.initializer_range) for _ in range(4)
        )
        self._heads = (settings.num_attention_heads, settings.head_width)
        self._dropout = settings.attention_dropout

    def forward(self, hidden_TD: Float[Tensor, "T D"], layout: AttentionPlan) -> Float[Tensor, "T D"]:
        """Each slot's view of its own text."""
        hidden_TD = hidden_TD.to(working_dtype(hidden_TD))  # cast once, not once per matrix
        q_THK, k_THK, v_THK = (
            linear(hidden_TD).unflatten(-1, self._heads) for linear in (self.query, self.key, self.value)
        )
        dropout = self._dropout if self.training else 0.0
        return self.output(attention(q_THK, k_THK, v_THK, layout, dropout=dropout).flatten(1))


class BertFeedForward(nn.Module):
    """Two linear maps with a GELU between."""

    def __init__(self, settings: BertConfig) -> None:
        super().__init__()
        self.input = _linear(settings.hidden_size, settings.intermediate_size, settings.initializer_range)
        self.output = _linear(settings.intermediate_size, settings.hidden_size, settings.initializer_range)

    def forward(self, hidden_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Each row for itself."""
        return self.output(F.gelu(self.input(hidden_TD)))


class BertBlock(nn.Module):
    """Attention, then the feed-forward net, each added first and normalised after."""

    def __init__(self, settings: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(settings)
        self.attention_norm = nn.LayerNorm(settings.hidden_size, settings.layer_norm_eps)
        self.mlp = BertFeedForward(settings)
        self.mlp_norm = nn.LayerNorm(settings.hidden_size, settings.layer_norm_eps)
        self._dropout = settings.hidden_dropout

    def forward(self, hidden_TD: Float[Tensor, "T D"], layout: AttentionPlan) -> Float[Tensor, "T D"]:
        """The normalised vectors after this block."""
        seen_TD = F.dropout(self.attention(hidden_TD, layout), self._dropout, self.training)
        hidden_TD = self.attention_norm(hidden_TD + seen_TD)
        inner_TD = F.dropout(self.mlp(hidden_TD), self._dropout, self.training)
        return self.mlp_norm(hidden_TD + inner_TD)


class BertEncoder(nn.Module):
    """BertModel without its pooler: initial weights are drawn from torch's generator, which the caller seeds."""

    def __init__(self, settings: BertConfig, vocabulary: int) -> None:
        super().__init__()
        self.settings = settings
        self.width = settings.hidden_size
        self.vocabulary = vocabulary
        deviation = settings.initializer_range
        self.token_embedding = _table(vocabulary, settings.hidden_size, deviation)
        self.position_embedding = _table(
            settings.position_offset + settings.max_position_embeddings, settings.hidden_size, deviation
        )
        self.token_type_embedding = _table(settings.type_vocab_size, settings.hidden_size, deviation)
        self.embedding_norm = nn.LayerNorm(settings.hidden_size, settings.layer_norm_eps)
        self.blocks = nn.ModuleList(BertBlock(settings) for _ in range(settings.num_hidden_layers))

    def forward(self, batch: Batch) -> Float[Tensor, "T D"]:
        """One vector per slot, in the batch's order."""
        settings = self.settings
        assert batch.tokens == 0 or batch.max_seqlen <= max(settings.max_position_embeddings, batch.filler), (
            "a text beyond `max_position_embeddings`"
        )
        dropout = settings.attention_dropout if self.training else 0.0
        dtype = working_dtype(self.token_embedding)
        layout = plan_attention(batch, dtype=dtype, dropout=dropout, head_width=settings.head_width)
        # In BERT's order of addition, so that both have the same bits.
        hidden_TD = F.embedding(layout.arranged(batch.ids_T), self.token_embedding)
        if batch.token_type_ids_T is None:
            hidden_TD = hidden_TD + self.token_type_embedding[0]
        else:
            hidden_TD = hidden_TD + F.embedding(layout.arranged(batch.token_type_ids_T), self.token_type_embedding)
        position_T = layout.position_T.clamp_max(
            settings.max_position_embeddings - 1
        )  # only a filler text can be longer
        hidden_TD = hidden_TD + F.embedding(position_T + settings.position_offset, self.position_embedding)
        hidden_TD = self.embedding_norm(hidden_TD)
        hidden_TD = F.dropout(hidden_TD, settings.hidden_dropout, self.training)
        for block in self.blocks:
            hidden_TD = block(hidden_TD, layout)
        return layout.restored(hidden_TD)


class BertHead(nn.Module):
    """Dense, GELU, norm, and a decoder with a bias of its own: the token table, or a table of its own if untied."""

    def __init__(self, settings: BertConfig, vocabulary: int) -> None:
        super().__init__()
        self.dense = _linear(settings.hidden_size, settings.hidden_size, settings.initializer_range)
        self.norm = nn.LayerNorm(settings.hidden_size, settings.layer_norm_eps)
        self.bias = nn.Parameter(Tensor(vocabulary).zero_())
        self.decoder = (
            None
            if settings.tie_word_embeddings
            else _table(vocabulary, settings.hidden_size, settings.initializer_range)
        )

    def forward(self, hidden_MD: Float[Tensor, "M D"], token_table_VD: Float[Tensor, "V D"]) -> Float[Tensor, "M V"]:
        """Logits over the vocabulary."""
        decoder_VD = token_table_VD if self.decoder is None else self.decoder
        return F.linear(self.norm(F.gelu(self.dense(hidden_MD))), decoder_VD, self.bias)


class SentencePairHead(nn.Module):
    """The pooler, dense and tanh on each text's first slot, and the two-way choice that BERT reads from it.

    In a model trained by BERT's own rule the first logit says that the second segment follows the first one.
    """

    def __init__(self, settings: BertConfig) -> None:
        super().__init__()
        self.pooler = _linear(settings.hidden_size, settings.hidden_size, settings.initializer_range)
        self.classifier = _linear(settings.hidden_size, 2, settings.initializer_range)

    def forward(self, hidden_TD: Float[Tensor, "T D"], batch: Batch) -> Float[Tensor, "B 2"]:
        """Two logits for each text, the filler left out."""
        first_BD = hidden_TD.index_select(0, batch.cu_seqlens[: batch.num_samples])
        return self.classifier(self.pooler(first_BD).tanh())


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
        pair={"bert.pooler.dense": "pair.pooler", "cls.seq_relationship": "pair.classifier"},
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
    "intermediate.dense": "mlp.input",
    "output.dense": "mlp.output",
    "output.LayerNorm": "mlp_norm",
}
_TABLES: Final[Mapping[str, str]] = {
    "embeddings.word_embeddings.weight": "encoder.token_embedding",
    "embeddings.position_embeddings.weight": "encoder.position_embedding",
    "embeddings.token_type_embeddings.weight": "encoder.token_type_embedding",
}

# their key -> our field
_KEYS: Final[Mapping[str, str]] = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "layer_norm_eps",
    "initializer_range": "initializer_range",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "tie_word_embeddings": "tie_word_embeddings",
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


def table(settings: BertConfig, *, pair: bool) -> dict[str, tuple[str, ...]]:
    """Their names -> ours (encoder, head and pair head told apart by prefix), spelled out for each layer."""
    family = FAMILIES[settings.model_type]
    linear = {f"{family.prefix}embeddings.LayerNorm": "encoder.embedding_norm"}
    for layer in range(settings.num_hidden_layers):
        linear |= {
            f"{family.prefix}encoder.layer.{layer}.{theirs}": f"encoder.blocks.{layer}.{ours}"
            for theirs, ours in _OF_A_BLOCK.items()
        }
    linear |= {**family.head, **(family.pair if pair else {})}
    names = {f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in linear.items() for part in ("weight", "bias")}
    tables = {f"{family.prefix}{theirs}": ours for theirs, ours in _TABLES.items()}
    whole = {theirs: (ours,) for theirs, ours in {**tables, **names, family.bias: "head.bias"}.items()}
    if not settings.tie_word_embeddings:  # version 5 then reads the decoder's own bias, version 4 the one beside it
        whole |= {f"{family.decoder}.weight": ("head.decoder",), f"{family.decoder}.bias": ("head.bias",)}
    return whole


def tied(settings: BertConfig) -> Mapping[str, str]:
    """Their names for what is another tensor once more -> that other one's."""
    family = FAMILIES[settings.model_type]
    if not settings.tie_word_embeddings:
        return {}
    table = f"{family.prefix}embeddings.word_embeddings.weight"
    return {f"{family.decoder}.weight": table, f"{family.decoder}.bias": family.bias}


def ignored(settings: BertConfig) -> tuple[str, ...]:
    """The numbers 0, 1, 2 …, which older versions wrote among the weights."""
    return (f"{FAMILIES[settings.model_type].prefix}embeddings.position_ids",)


def whole(settings: BertConfig) -> str:
    """The classes that hold encoder and head, for a message."""
    family = FAMILIES[settings.model_type]
    return " or ".join(name for name in (family.masked, family.with_pair) if name)


def has_pair(tensors: Mapping[str, object], settings: BertConfig) -> bool:
    """Whether a file holds any part of a pair head."""
    return any(
        name.startswith(tuple(f"{theirs}." for theirs in FAMILIES[settings.model_type].pair)) for name in tensors
    )


def config(settings: BertConfig, ids: Mapping[str, int | None], *, pair: bool) -> dict[str, Any]:
    """All of config.json but the size of the vocabulary; `ids` has pad_token_id, cls_token_id and sep_token_id."""
    family = FAMILIES[settings.model_type]
    said = {"architectures": [family.with_pair if pair else family.masked], "model_type": settings.model_type}
    said |= {theirs: getattr(settings, ours) for theirs, ours in _KEYS.items()}
    said |= {"max_position_embeddings": settings.max_position_embeddings + settings.position_offset, **_FIXED}
    if settings.model_type == "bert":
        return said | {"pad_token_id": ids["pad_token_id"]}
    # Their positions are counted from this number, whatever the tokenizer pads with.
    said |= {"pad_token_id": settings.position_offset - 1}
    return said | {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}


def settings_of(said: Mapping[str, Any]) -> BertConfig:
    """The settings that a config.json of these model_types means.

    Raises:
        ModelError: a variant that isn't held here; the key is named.
    """
    config = {**_ABSENT, **said}
    for key, only in _FIXED.items():
        if config[key] != only:
            raise ModelError(
                f"`{key}` = {config[key]!r} is not held here, only {only!r}",
                location=f"config.json: {key}",
                hint="give a BERT or RoBERTa folder without it, or a model of `unmask pretrain`",
            )
    family = config["model_type"]
    first = 0 if family == "bert" else config.get("pad_token_id", _ROBERTA_PAD) + 1
    return BertConfig(
        **{ours: config[theirs] for theirs, ours in _KEYS.items()},
        max_position_embeddings=config["max_position_embeddings"] - first,
        model_type=family,
        position_offset=first,
    )
