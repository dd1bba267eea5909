"""BERT (arXiv 1810.04805), RoBERTa and XLM-R, with the same weights as their classes in `transformers`.

Token, position and token type embeddings are added and normalized. Blocks are post-norm, with biases everywhere, and
the decoder is tied to the token embedding. The sentence pair head (pooler and classifier) is a separate module, because
masked language modeling doesn't use it. In `transformers`, a model with it is BertForPreTraining, one without it
BertForMaskedLM. RoBERTa (arXiv 1907.11692) and XLM-R are the same network with an offset in the position embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from unmask.core.config import require
from unmask.core.errors import ModelError, RecipeError
from unmask.core.types import Batch
from unmask.models.attention import AttentionPlan, attention, plan_attention
from unmask.models.layers import (
    EncoderModule,
    HeadModule,
    compute_dtype,
    initialized_embedding,
    initialized_linear,
)


@dataclass(frozen=True)
class BertConfig:
    """Architecture of a BERT encoder. The fields are those of config.json that can differ between models."""

    kind: Literal["bert"] = "bert"  # BERT (arXiv 1810.04805).
    num_hidden_layers: int = 4  # Number of layers.
    hidden_size: int = 256  # Width of the token vectors.
    num_attention_heads: int = 4  # Number of attention heads per layer; it divides `hidden_size`.
    intermediate_size: int = 1024  # Width of the feed-forward network.
    max_position_embeddings: int = 512  # [tokens] Maximum length of a sequence.
    type_vocab_size: int = 2  # Number of token types (segments).
    layer_norm_eps: float = 1e-12  # Constant that is added to the variance in each norm.
    initializer_range: float = 0.02  # Standard deviation of the initial weights.
    # Initial weights; the other two give some attention heads a useful pattern (models/structured_init.py).
    init: Literal["normal", "neighbor-attention", "pair-matching"] = "normal"
    hidden_dropout: float = 0.0  # Dropout after the embedding and after each sublayer; 0.1 in BERT.
    # Dropout on attention weights; above 0, attention uses the padded backend; 0.1 in BERT.
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = True  # Whether the decoder of the head is the token embedding.
    model_type: Literal["bert", "roberta", "xlm-roberta"] = "bert"  # Class and tensor names in `transformers`.
    position_offset: int = 0  # Index of the first position embedding in use; in RoBERTa the padding id + 1, usually 2.

    def __post_init__(self) -> None:
        require(
            self,
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
            min=1,
        )
        if (self.position_offset == 0) != (self.model_type == "bert") or self.position_offset < 0:
            raise RecipeError(
                f"invalid position_offset: got {self.position_offset} for model_type = {self.model_type!r}",
                location="position_offset",
                hint="set it to 0 for bert, and to the padding id + 1 for roberta and xlm-roberta (2 in their models)",
            )
        if self.hidden_size % self.num_attention_heads:
            raise RecipeError(
                f"hidden_size = {self.hidden_size} is not divisible by num_attention_heads = "
                f"{self.num_attention_heads}",
                location="num_attention_heads",
                hint=f"set hidden_size to a multiple of {self.num_attention_heads}, or use fewer heads",
            )
        require(self, "layer_norm_eps", "initializer_range", above=0, below=math.inf)
        require(self, "hidden_dropout", "attention_dropout", min=0, below=1)

    @property
    def head_width(self) -> int:
        """Dimensions of one attention head."""
        return self.hidden_size // self.num_attention_heads


def _linear(in_features: int, out_features: int, std: float) -> nn.Linear:
    return initialized_linear(in_features, out_features, std, bias=True)


class BertAttention(nn.Module):
    """Multi-head self-attention with biases."""

    def __init__(self, settings: BertConfig) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (
            _linear(settings.hidden_size, settings.hidden_size, settings.initializer_range) for _ in range(4)
        )
        self._heads = (settings.num_attention_heads, settings.head_width)
        self._dropout = settings.attention_dropout

    def forward(
        self, hidden_TD: Float[Tensor, "T D"], plan: AttentionPlan, rows_M: Int[Tensor, "M"] | None
    ) -> Float[Tensor, "N D"]:
        """Return the attention output, or these rows of it. Attention never crosses a sequence."""
        hidden_TD = hidden_TD.to(compute_dtype(hidden_TD))  # cast once, not once per matrix
        q_THK, k_THK, v_THK = (
            linear(hidden_TD).unflatten(-1, self._heads) for linear in (self.query, self.key, self.value)
        )
        dropout = self._dropout if self.training else 0.0
        attended_TD = attention(q_THK, k_THK, v_THK, plan, dropout=dropout).flatten(1)
        return self.output(attended_TD if rows_M is None else attended_TD.index_select(0, rows_M))


class BertFeedForward(nn.Module):
    """Two linear maps with a GELU in between."""

    def __init__(self, settings: BertConfig) -> None:
        super().__init__()
        self.input = _linear(settings.hidden_size, settings.intermediate_size, settings.initializer_range)
        self.output = _linear(settings.intermediate_size, settings.hidden_size, settings.initializer_range)

    def forward(self, hidden_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Apply the network to each vector."""
        return self.output(F.gelu(self.input(hidden_TD)))


class BertBlock(nn.Module):
    """Attention and feed-forward network, each followed by a residual connection and a norm (post-norm)."""

    def __init__(self, settings: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(settings)
        self.attention_norm = nn.LayerNorm(settings.hidden_size, settings.layer_norm_eps)
        self.mlp = BertFeedForward(settings)
        self.mlp_norm = nn.LayerNorm(settings.hidden_size, settings.layer_norm_eps)
        self._dropout = settings.hidden_dropout

    def forward(
        self, hidden_TD: Float[Tensor, "T D"], plan: AttentionPlan, rows_M: Int[Tensor, "M"] | None = None
    ) -> Float[Tensor, "N D"]:
        """Return the hidden states after the block, or these rows of them."""
        attended_ND = F.dropout(self.attention(hidden_TD, plan, rows_M), self._dropout, self.training)
        hidden_ND = hidden_TD if rows_M is None else hidden_TD.index_select(0, rows_M)
        hidden_ND = self.attention_norm(hidden_ND + attended_ND)
        inner_ND = F.dropout(self.mlp(hidden_ND), self._dropout, self.training)
        return self.mlp_norm(hidden_ND + inner_ND)


class BertEncoder(EncoderModule):
    """BertModel without its pooler. Initial weights come from torch's default generator, which the caller seeds."""

    settings: BertConfig

    def __init__(self, settings: BertConfig, vocab_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.hidden_size = settings.hidden_size
        self.vocab_size = vocab_size
        std = settings.initializer_range
        self.token_embedding = initialized_embedding(vocab_size, settings.hidden_size, std)
        self.position_embedding = initialized_embedding(
            settings.position_offset + settings.max_position_embeddings, settings.hidden_size, std
        )
        self.token_type_embedding = initialized_embedding(settings.type_vocab_size, settings.hidden_size, std)
        self.embedding_norm = nn.LayerNorm(settings.hidden_size, settings.layer_norm_eps)
        self.blocks = nn.ModuleList(BertBlock(settings) for _ in range(settings.num_hidden_layers))

    def position_parameters(self) -> Iterator[Tensor]:
        """Yield the position embedding."""
        yield self.position_embedding

    def encode(self, batch: Batch, positions_M: Int[Tensor, "M"] | None = None) -> Float[Tensor, "N D"]:
        """Return one vector per token, or those at positions. Without token types, all are 0."""
        plan = self.plan(batch)
        return run_blocks(self.blocks, self.embed(batch, plan), plan, positions_M)

    def plan(self, batch: Batch) -> AttentionPlan:
        """Return how attention is computed for a batch."""
        assert batch.max_seqlen <= self.settings.max_position_embeddings, "a sequence exceeds max_position_embeddings"
        dropout = self.settings.attention_dropout if self.training else 0.0
        dtype = compute_dtype(self.token_embedding)
        return plan_attention(batch, dtype=dtype, dropout=dropout, head_width=self.settings.head_width)

    def embed(self, batch: Batch, plan: AttentionPlan) -> Float[Tensor, "T D"]:
        """Return the normalized sum of the embeddings of each token, in plan order."""
        settings = self.settings
        # Added in the order of transformers' BERT, so that both have the same bits.
        hidden_TD = F.embedding(plan.to_plan_order(batch.ids_T), self.token_embedding)
        if batch.token_type_ids_T is None:
            hidden_TD = hidden_TD + self.token_type_embedding[0]
        else:
            token_type_ids_T = plan.to_plan_order(batch.token_type_ids_T)
            hidden_TD = hidden_TD + F.embedding(token_type_ids_T, self.token_type_embedding)
        hidden_TD = hidden_TD + F.embedding(plan.position_T + settings.position_offset, self.position_embedding)
        return F.dropout(self.embedding_norm(hidden_TD), settings.hidden_dropout, self.training)


def run_blocks(
    blocks: nn.ModuleList, hidden_TD: Float[Tensor, "T D"], plan: AttentionPlan, positions_M: Int[Tensor, "M"] | None
) -> Float[Tensor, "N D"]:
    """Return the output of all blocks in the order of the batch, or only at positions."""
    *earlier, last = blocks
    for block in earlier:
        hidden_TD = block(hidden_TD, plan)
    rows_M = None if positions_M is None else plan.rows_of(positions_M)
    hidden_ND = last(hidden_TD, plan, rows_M)
    return plan.to_batch_order(hidden_ND) if rows_M is None else hidden_ND


class BertHead(HeadModule):
    """Dense layer, GELU, norm and decoder with a bias. The decoder's weight is the token embedding if tied."""

    def __init__(self, settings: BertConfig, vocab_size: int) -> None:
        super().__init__()
        self.dense = _linear(settings.hidden_size, settings.hidden_size, settings.initializer_range)
        self.norm = nn.LayerNorm(settings.hidden_size, settings.layer_norm_eps)
        self.bias = nn.Parameter(Tensor(vocab_size).zero_())
        self.decoder = (
            None
            if settings.tie_word_embeddings
            else initialized_embedding(vocab_size, settings.hidden_size, settings.initializer_range)
        )

    def matrix_parameters(self) -> Iterator[Tensor]:
        """Yield the matrix of the dense layer."""
        yield self.dense.weight

    def features(self, hidden_MD: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
        """Return what the decoder maps to logits."""
        return self.norm(F.gelu(self.dense(hidden_MD)))

    def decoder_parameters(self, token_embedding_VD: Float[Tensor, "V D"]) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the decoder."""
        return token_embedding_VD if self.decoder is None else self.decoder, self.bias


class SentencePairHead(nn.Module):
    """Pooler (dense layer and tanh on the first token of each sequence) and binary classifier.

    With the pair labels of BERT, the first logit belongs to label 0, "the second segment follows the first".
    """

    def __init__(self, settings: BertConfig) -> None:
        super().__init__()
        self.pooler = _linear(settings.hidden_size, settings.hidden_size, settings.initializer_range)
        self.classifier = _linear(settings.hidden_size, 2, settings.initializer_range)

    def forward(self, hidden_TD: Float[Tensor, "T D"], batch: Batch) -> Float[Tensor, "B 2"]:
        """Return two logits for each sequence."""
        first_BD = hidden_TD.index_select(0, batch.cu_seqlens[:-1])
        return self.classifier(self.pooler(first_BD).tanh())


# Hugging Face format


@dataclass(frozen=True)
class HFNames:
    """Class and tensor names of a model type in `transformers`."""

    masked_lm_class: str
    encoder_class: str
    prefix: str  # prefix of the encoder's tensors in a model with a head
    head: Mapping[str, str]  # prefix in transformers -> prefix here; each has a weight and a bias
    bias: str  # name of the decoder's bias
    decoder: str  # prefix of the decoder's weight and of a copy of its bias
    pretraining_class: str = ""  # class with the sentence pair head; "": none
    pair: Mapping[str, str] = field(default_factory=dict[str, str])


def _roberta(name: str) -> HFNames:
    head = {"lm_head.dense": "head.dense", "lm_head.layer_norm": "head.norm"}
    return HFNames(f"{name}ForMaskedLM", f"{name}Model", "roberta.", head, "lm_head.bias", "lm_head.decoder")


HF_NAMES: Final[Mapping[str, HFNames]] = {
    "bert": HFNames(
        masked_lm_class="BertForMaskedLM",
        encoder_class="BertModel",
        prefix="bert.",
        head={
            "cls.predictions.transform.dense": "head.dense",
            "cls.predictions.transform.LayerNorm": "head.norm",
        },
        bias="cls.predictions.bias",
        decoder="cls.predictions.decoder",
        pretraining_class="BertForPreTraining",
        pair={"bert.pooler.dense": "pair.pooler", "cls.seq_relationship": "pair.classifier"},
    ),
    "roberta": _roberta("Roberta"),
    "xlm-roberta": _roberta("XLMRoberta"),
}

# prefix in transformers -> prefix here; each has a weight and a bias
_BLOCK: Final[Mapping[str, str]] = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "mlp.input",
    "output.dense": "mlp.output",
    "output.LayerNorm": "mlp_norm",
}
_EMBEDDINGS: Final[Mapping[str, str]] = {
    "embeddings.word_embeddings.weight": "encoder.token_embedding",
    "embeddings.position_embeddings.weight": "encoder.position_embedding",
    "embeddings.token_type_embeddings.weight": "encoder.token_type_embedding",
}

# Fields of BertConfig with the same value in config.json; two of them have another name there (_RENAMED).
# max_position_embeddings is left out, because config.json adds position_offset to it.
_FIELDS: Final = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "type_vocab_size",
    "layer_norm_eps",
    "initializer_range",
    "hidden_dropout",
    "attention_dropout",
    "tie_word_embeddings",
)
_RENAMED: Final = {"hidden_dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob"}
# Keys of config.json with a single supported value.
_REQUIRED: Final[Mapping[str, object]] = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
_ROBERTA_PAD: Final = 1
# Defaults of keys that a config.json leaves out (configuration_bert.py and configuration_roberta.py, 4.57 and 5.23).
_DEFAULTS: Final[Mapping[str, Any]] = {
    **_REQUIRED,
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


def hf_tensor_names(settings: BertConfig, *, pair: bool) -> dict[str, tuple[str, ...]]:
    """Map each tensor name of `transformers` to a name here, which starts with "encoder.", "head." or "pair."."""
    hf = HF_NAMES[settings.model_type]
    linear = {f"{hf.prefix}embeddings.LayerNorm": "encoder.embedding_norm"}
    for layer in range(settings.num_hidden_layers):
        linear |= {
            f"{hf.prefix}encoder.layer.{layer}.{hf_name}": f"encoder.blocks.{layer}.{name}"
            for hf_name, name in _BLOCK.items()
        }
    linear |= {**hf.head, **(hf.pair if pair else {})}
    names = {f"{hf_name}.{part}": f"{name}.{part}" for hf_name, name in linear.items() for part in ("weight", "bias")}
    embeddings = {f"{hf.prefix}{hf_name}": name for hf_name, name in _EMBEDDINGS.items()}
    tensors = {hf_name: (name,) for hf_name, name in {**embeddings, **names, hf.bias: "head.bias"}.items()}
    if not settings.tie_word_embeddings:  # transformers 5 reads `decoder.bias`, transformers 4 the bias next to it
        tensors |= {f"{hf.decoder}.weight": ("head.decoder",), f"{hf.decoder}.bias": ("head.bias",)}
    return tensors


def tied_hf_tensors(settings: BertConfig) -> Mapping[str, str]:
    """Map the name of each tied copy in `transformers` to the name of the tensor that it copies."""
    hf = HF_NAMES[settings.model_type]
    if not settings.tie_word_embeddings:
        return {}
    return {f"{hf.decoder}.weight": f"{hf.prefix}embeddings.word_embeddings.weight", f"{hf.decoder}.bias": hf.bias}


def ignored_hf_tensors(settings: BertConfig) -> tuple[str, ...]:
    """Return the names of buffers that old versions of `transformers` saved: the position ids 0, 1, 2 …."""
    return (f"{HF_NAMES[settings.model_type].prefix}embeddings.position_ids",)


def hf_class_names(settings: BertConfig) -> str:
    """Return the names of the classes with a head, for error messages."""
    hf = HF_NAMES[settings.model_type]
    return " or ".join(name for name in (hf.masked_lm_class, hf.pretraining_class) if name)


def has_pair_head(tensors: Mapping[str, object], settings: BertConfig) -> bool:
    """Whether a file has any tensor of a sentence pair head."""
    prefixes = tuple(f"{hf_name}." for hf_name in HF_NAMES[settings.model_type].pair)
    return any(name.startswith(prefixes) for name in tensors)


def to_hf_config(settings: BertConfig, ids: Mapping[str, int | None], *, pair: bool) -> dict[str, Any]:
    """Return config.json without vocab_size. `ids` has the keys pad_token_id, cls_token_id and sep_token_id."""
    hf = HF_NAMES[settings.model_type]
    hf_config: dict[str, Any] = {
        "architectures": [hf.pretraining_class if pair else hf.masked_lm_class],
        "model_type": settings.model_type,
    }
    hf_config |= {_RENAMED.get(name, name): getattr(settings, name) for name in _FIELDS}
    hf_config |= {"max_position_embeddings": settings.max_position_embeddings + settings.position_offset, **_REQUIRED}
    if settings.model_type == "bert":
        return hf_config | {"pad_token_id": ids["pad_token_id"]}
    # In RoBERTa, the first position is pad_token_id + 1. The key follows the offset, not the tokenizer's padding id.
    hf_config |= {"pad_token_id": settings.position_offset - 1}
    return hf_config | {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}


def from_hf_config(hf_config: Mapping[str, Any]) -> BertConfig:
    """Return the BertConfig for a config.json of one of these model types.

    Raises:
        ModelError: a key has a value that is not supported.
    """
    values = {**_DEFAULTS, **hf_config}
    for key, required in _REQUIRED.items():
        if values[key] != required:
            raise ModelError(
                f"unsupported {key}: got {values[key]!r}, expected {required!r}",
                location=f"config.json: {key}",
                hint="use a BERT or RoBERTa model without it, or a model of `unmask pretrain`",
            )
    model_type = values["model_type"]
    pad_id = values.get("pad_token_id", _ROBERTA_PAD)
    if model_type != "bert" and (pad_id is None or pad_id < 0):
        raise ModelError(
            f"unsupported pad_token_id: got {pad_id!r}, expected a token id, from which positions are counted",
            location="config.json: pad_token_id",
            hint="set it to the padding id of the checkpoint, usually 1",
        )
    offset = 0 if model_type == "bert" else pad_id + 1
    return BertConfig(
        **{name: values[_RENAMED.get(name, name)] for name in _FIELDS},
        max_position_embeddings=values["max_position_embeddings"] - offset,
        model_type=model_type,
        position_offset=offset,
    )
