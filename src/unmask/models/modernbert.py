"""Room card: the modern encoder, weight for weight the ModernBertForMaskedLM of `transformers` (arXiv 2412.13663).

Comes in: a Batch. Goes out: one vector per slot; from the head, logits at the asked positions. Called by: build, and
through the Encoder and Head contracts by everyone.

No biases; a norm after the embedding and none before attention in block 0; every `global_attn_every_n_layers`-th block, from the
first, sees the whole text and turns by `global_rope_theta`, the others see a local window and turn by `local_rope_theta`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unmask.core.errors import ModelError, RecipeError
from unmask.core.types import Batch
from unmask.models.attention import AttentionPlan, attention, plan_attention
from unmask.models.layers import GeGLU, LayerNorm, Rotary, matrix, turn, working_dtype


@dataclass(frozen=True)
class ModernBertConfig:
    """The shape of a modern encoder; all that a ModernBERT config.json can say and a recipe would want to."""

    kind: Literal["modernbert"] = "modernbert"
    num_hidden_layers: int = 4
    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 384  # of each half of the gated net
    global_attn_every_n_layers: int = 3
    local_attention: int = 128  # tokens in all: 64 to each side
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0
    max_position_embeddings: int = 8192  # tokens of a text
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0  # above 0, attention takes the padded path
    mlp_dropout: float = 0.0
    tie_word_embeddings: bool = True  # the decoder is the token table; untied, the head has a table of its own

    def __post_init__(self) -> None:
        for name in (
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "global_attn_every_n_layers",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise RecipeError(f"`{name}` is {getattr(self, name)}", location=name, hint="give at least 1")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise RecipeError(
                f"a width of {self.hidden_size} can't be cut into {self.num_attention_heads} heads of an even width",
                location="num_attention_heads",
                hint=f"choose `hidden_size` as a multiple of {2 * self.num_attention_heads}, or fewer heads",
            )
        if self.local_attention < 2 or self.local_attention % 2:
            raise RecipeError(
                f"a local window of {self.local_attention} tokens has no two equal sides",
                location="local_attention",
                hint="give an even number of tokens, such as 128",
            )
        for name in ("global_rope_theta", "local_rope_theta", "layer_norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise RecipeError(f"`{name}` is {getattr(self, name)}", location=name, hint="give a number above 0")
        for name in ("embedding_dropout", "attention_dropout", "mlp_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(
                    f"`{name}` is {getattr(self, name)}", location=name, hint="give a share from 0 to below 1"
                )

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    def sees_all(self, layer: int) -> bool:
        """Whether this layer sees the whole text."""
        return layer % self.global_attn_every_n_layers == 0

    @property
    def output_deviation(self) -> float:
        """Of the weights that write into the residual stream: smaller, the more layers write (as in GPT-2)."""
        return self.initializer_range / math.sqrt(2 * self.num_hidden_layers)


class ModernBertAttention(nn.Module):
    """Multi-head attention with rotary positions."""

    def __init__(self, settings: ModernBertConfig, layer: int) -> None:
        super().__init__()
        width, deviation = settings.hidden_size, settings.initializer_range
        self.query = matrix(width, width, deviation)
        self.key = matrix(width, width, deviation)
        self.value = matrix(width, width, deviation)
        self.output = matrix(width, width, settings.output_deviation)
        self._heads = (settings.num_attention_heads, settings.head_width)
        self._window = None if settings.sees_all(layer) else settings.local_attention
        self._dropout = settings.attention_dropout

    def forward(
        self, hidden_TD: Float[Tensor, "T D"], layout: AttentionPlan, turns: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "T D"]:
        """Each slot's view of its own text."""
        hidden_TD = hidden_TD.to(working_dtype(hidden_TD))  # cast once, not once per matrix
        q_THK = turn(self.query(hidden_TD).unflatten(-1, self._heads), turns)
        k_THK = turn(self.key(hidden_TD).unflatten(-1, self._heads), turns)
        v_THK = self.value(hidden_TD).unflatten(-1, self._heads)
        dropout = self._dropout if self.training else 0.0
        seen_TD = attention(q_THK, k_THK, v_THK, layout, self._window, dropout).flatten(1)
        return F.dropout(self.output(seen_TD), dropout)


class ModernBertBlock(nn.Module):
    """Attention, then the gated net, each normalised before and added after."""

    def __init__(self, settings: ModernBertConfig, layer: int) -> None:
        super().__init__()
        # The embedding is normalised already, so block 0 has no norm before attention.
        self.attention_norm = LayerNorm(settings.hidden_size, settings.layer_norm_eps) if layer else nn.Identity()
        self.attention = ModernBertAttention(settings, layer)
        self.mlp_norm = LayerNorm(settings.hidden_size, settings.layer_norm_eps)
        self.mlp = GeGLU(
            settings.hidden_size,
            settings.intermediate_size,
            settings.initializer_range,
            settings.output_deviation,
            settings.mlp_dropout,
        )
        self.theta = settings.global_rope_theta if settings.sees_all(layer) else settings.local_rope_theta

    def forward(
        self, hidden_TD: Float[Tensor, "T D"], layout: AttentionPlan, turns: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "T D"]:
        """The residual stream after this block."""
        hidden_TD = hidden_TD + self.attention(self.attention_norm(hidden_TD), layout, turns)
        return hidden_TD + self.mlp(self.mlp_norm(hidden_TD))


class ModernBertEncoder(nn.Module):
    """ModernBertModel: initial weights are drawn from torch's generator, which the caller seeds."""

    def __init__(self, settings: ModernBertConfig, vocabulary: int) -> None:
        super().__init__()
        self.settings = settings
        self.width = settings.hidden_size
        self.vocabulary = vocabulary
        self.token_embedding = nn.Parameter(
            matrix(settings.hidden_size, vocabulary, settings.initializer_range).weight.detach()
        )
        self.embedding_norm = LayerNorm(settings.hidden_size, settings.layer_norm_eps)
        self.blocks = nn.ModuleList(ModernBertBlock(settings, layer) for layer in range(settings.num_hidden_layers))
        self.final_norm = LayerNorm(settings.hidden_size, settings.layer_norm_eps)
        self._rotary = Rotary(settings.head_width, settings.max_position_embeddings)

    def forward(self, batch: Batch) -> Float[Tensor, "T D"]:
        """One vector per slot, in the batch's order."""
        settings = self.settings
        dropout = settings.attention_dropout if self.training else 0.0
        dtype = working_dtype(self.token_embedding)
        layout = plan_attention(batch, dtype=dtype, dropout=dropout, head_width=settings.head_width)
        hidden_TD = self.embedding_norm(F.embedding(layout.arranged(batch.ids_T), self.token_embedding))
        hidden_TD = F.dropout(hidden_TD, settings.embedding_dropout, self.training)
        thetas = {block.theta for block in self.blocks if isinstance(block, ModernBertBlock)}
        turns = {theta: self._rotary.turns(layout.position_T, theta, dtype) for theta in thetas}
        for block in self.blocks:
            assert isinstance(block, ModernBertBlock)
            hidden_TD = block(hidden_TD, layout, turns[block.theta])
        return layout.restored(self.final_norm(hidden_TD))


class ModernBertHead(nn.Module):
    """Dense, GELU, norm, and a decoder with a bias of its own: the token table, or a table of its own if untied."""

    def __init__(self, settings: ModernBertConfig, vocabulary: int) -> None:
        super().__init__()
        self.dense = matrix(settings.hidden_size, settings.hidden_size, settings.output_deviation)
        self.norm = LayerNorm(settings.hidden_size, settings.layer_norm_eps)
        self.bias = nn.Parameter(Tensor(vocabulary).zero_())
        own = (
            None
            if settings.tie_word_embeddings
            else matrix(settings.hidden_size, vocabulary, settings.initializer_range)
        )
        self.decoder = None if own is None else nn.Parameter(own.weight.detach())

    def forward(self, hidden_MD: Float[Tensor, "M D"], token_table_VD: Float[Tensor, "V D"]) -> Float[Tensor, "M V"]:
        """Logits over the vocabulary."""
        decoder_VD = token_table_VD if self.decoder is None else self.decoder
        return F.linear(self.norm(F.gelu(self.dense(hidden_MD))), decoder_VD, self.bias)


MODEL_TYPE: Final = "modernbert"
ARCHITECTURE: Final = "ModernBertForMaskedLM"

# their tensor -> ours, stacked in this order; {layer} stands for every layer
_ENCODER: Final[Mapping[str, tuple[str, ...]]] = {
    "model.embeddings.tok_embeddings.weight": ("token_embedding",),
    "model.embeddings.norm.weight": ("embedding_norm.weight",),
    "model.layers.{layer}.attn_norm.weight": ("blocks.{layer}.attention_norm.weight",),
    "model.layers.{layer}.attn.Wqkv.weight": (
        "blocks.{layer}.attention.query.weight",
        "blocks.{layer}.attention.key.weight",
        "blocks.{layer}.attention.value.weight",
    ),
    "model.layers.{layer}.attn.Wo.weight": ("blocks.{layer}.attention.output.weight",),
    "model.layers.{layer}.mlp_norm.weight": ("blocks.{layer}.mlp_norm.weight",),
    "model.layers.{layer}.mlp.Wi.weight": (
        "blocks.{layer}.mlp.input.weight",
        "blocks.{layer}.mlp.gate.weight",
    ),
    "model.layers.{layer}.mlp.Wo.weight": ("blocks.{layer}.mlp.output.weight",),
    "model.final_norm.weight": ("final_norm.weight",),
}
_HEAD: Final[Mapping[str, tuple[str, ...]]] = {
    "head.dense.weight": ("dense.weight",),
    "head.norm.weight": ("norm.weight",),
    "decoder.bias": ("bias",),
}
PREFIX: Final = "model."  # of the encoder's tensors, where a head stands beside it
ENCODER_ALONE: Final = "ModernBertModel"
_DECODER: Final = "decoder.weight"
_NOT_IN_LAYER_0: Final = "attn_norm"
_TIED: Final[Mapping[str, str]] = {_DECODER: "model.embeddings.tok_embeddings.weight"}

# their key -> our field
_KEYS: Final[Mapping[str, str]] = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "local_attention": "local_attention",
    "norm_eps": "layer_norm_eps",
    "initializer_range": "initializer_range",
    "embedding_dropout": "embedding_dropout",
    "attention_dropout": "attention_dropout",
    "mlp_dropout": "mlp_dropout",
    "tie_word_embeddings": "tie_word_embeddings",
}
# what a ModernBERT config may say and we can't hold: their key -> the only value that we do
_FIXED: Final[Mapping[str, object]] = {
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
}
# what a ModernBERT config means where it leaves a key out (configuration_modernbert.py, versions 4.57 and 5.23)
_ABSENT: Final[Mapping[str, Any]] = {
    **_FIXED,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "max_position_embeddings": 8192,
    "local_attention": 128,
    "norm_eps": 1e-5,
    "initializer_range": 0.02,
    "embedding_dropout": 0.0,
    "attention_dropout": 0.0,
    "mlp_dropout": 0.0,
    "tie_word_embeddings": True,
    "global_rope_theta": 160_000.0,
    "local_rope_theta": 10_000.0,
    "global_attn_every_n_layers": 3,
    "layer_types": None,
    "rope_parameters": None,
    "rope_scaling": None,
}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_NEXT: Final = "give a ModernBERT folder without these, or a model of `unmask pretrain`"


def tied(settings: ModernBertConfig) -> Mapping[str, str]:
    """Their names for what is another tensor once more -> that other one's."""
    return _TIED if settings.tie_word_embeddings else {}


def table(settings: ModernBertConfig) -> dict[str, tuple[str, ...]]:
    """Their names -> ours (encoder and head told apart by prefix), spelled out for each layer."""
    encoder: dict[str, tuple[str, ...]] = {}
    for theirs, ours in _ENCODER.items():
        for layer in range(settings.num_hidden_layers) if "{layer}" in theirs else [0]:
            if layer or _NOT_IN_LAYER_0 not in theirs:
                encoder[theirs.format(layer=layer)] = tuple(f"encoder.{name.format(layer=layer)}" for name in ours)
    head = _HEAD if settings.tie_word_embeddings else {**_HEAD, _DECODER: ("decoder",)}
    return encoder | {theirs: tuple(f"head.{name}" for name in ours) for theirs, ours in head.items()}


def config(settings: ModernBertConfig, ids: Mapping[str, int | None]) -> dict[str, Any]:
    """All of config.json but the size of the vocabulary; `ids` has pad_token_id, cls_token_id and sep_token_id."""
    thetas = {_FULL: settings.global_rope_theta, _SLIDING: settings.local_rope_theta}
    version_5 = {
        "layer_types": [_FULL if settings.sees_all(layer) else _SLIDING for layer in range(settings.num_hidden_layers)],
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()},
    }
    version_4 = {
        "global_attn_every_n_layers": settings.global_attn_every_n_layers,
        "global_rope_theta": settings.global_rope_theta,
        "local_rope_theta": settings.local_rope_theta,
        "layer_norm_eps": settings.layer_norm_eps,
    }
    return (
        {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE}
        | {theirs: getattr(settings, ours) for theirs, ours in _KEYS.items()}
        | {**_FIXED, "initializer_cutoff_factor": 2.0}
        | version_5
        | version_4
        | dict(ids)
        | {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}
    )


def settings_of(said: Mapping[str, Any]) -> ModernBertConfig:
    """The settings that a config.json of this model_type means.

    Raises:
        ModelError: a variant that isn't held here; the key is named.
    """
    config = {**_ABSENT, **said}

    def refuse(key: str) -> ModelError:
        return ModelError(f"`{key}` = {config[key]!r} is not held here", location=f"config.json: {key}", hint=_NEXT)

    for key, only in _FIXED.items():
        if config[key] != only:
            raise refuse(key)
    if config["rope_scaling"] is not None:
        raise refuse("rope_scaling")
    fields = {ours: config[theirs] for theirs, ours in _KEYS.items()}
    # Version 4's null for the local theta means the global one.
    local_rope_theta = config["local_rope_theta"]
    thetas = {
        _FULL: config["global_rope_theta"],
        _SLIDING: config["global_rope_theta"] if local_rope_theta is None else local_rope_theta,
    }
    for name, rope in cast("dict[str, dict[str, Any] | None]", config["rope_parameters"] or {}).items():
        if name not in thetas or (rope is not None and rope.get("rope_type", "default") != "default"):
            raise refuse("rope_parameters")
        if rope is not None and "rope_theta" in rope:
            thetas[name] = rope["rope_theta"]
    return ModernBertConfig(
        **fields,
        global_attn_every_n_layers=_global_every(config, refuse("layer_types")),
        global_rope_theta=float(thetas[_FULL]),
        local_rope_theta=float(thetas[_SLIDING]),
    )


def _global_every(config: Mapping[str, Any], refusal: ModelError) -> int:
    """The distance between global layers that the list of layers shows; the number beside it, where both agree."""
    said = int(config["global_attn_every_n_layers"])
    shown = cast("list[str] | None", config["layer_types"])
    if shown is None:
        return said
    layers = config["num_hidden_layers"]
    for every in (said, *range(1, layers + 1)):
        if shown == [_SLIDING if layer % every else _FULL for layer in range(layers)]:
            return every
    raise refusal
