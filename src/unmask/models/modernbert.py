"""ModernBERT, with the same weights as ModernBertForMaskedLM of `transformers` (arXiv 2412.13663).

There are no biases except in the decoder. The embedding is normalized, so block 0 has no norm before attention. Every
`global_attn_every_n_layers`-th block, starting with the first, has global attention with `global_rope_theta`. The other
blocks have a local window and `local_rope_theta`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from unmask.core.config import require
from unmask.core.errors import ModelError, RecipeError
from unmask.core.types import Batch
from unmask.models.attention import AttentionPlan, attention, plan_attention
from unmask.models.layers import (
    EncoderModule,
    GeGLU,
    HeadModule,
    LayerNorm,
    RotaryEmbedding,
    compute_dtype,
    initialized_embedding,
    initialized_linear,
    rotate,
)


@dataclass(frozen=True)
class ModernBertConfig:
    """Architecture of a ModernBERT encoder. The fields are those of config.json that can differ between models."""

    kind: Literal["modernbert"] = "modernbert"  # ModernBERT (arXiv 2412.13663).
    num_hidden_layers: int = 4  # Number of layers.
    hidden_size: int = 256  # Width of the token vectors.
    num_attention_heads: int = 4  # Number of attention heads per layer; it divides `hidden_size`.
    intermediate_size: int = 384  # Width of each half of the GeGLU (arXiv 2002.05202).
    # [layers] Interval of layers that attend to the whole sequence, from the first layer on.
    global_attn_every_n_layers: int = 3
    local_attention: int = 128  # [tokens] Window of the other layers, half of it on each side.
    # Base of the rotary embedding with global attention (RoFormer, arXiv 2104.09864).
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0  # Base of the rotary embedding with local attention.
    max_position_embeddings: int = 8192  # [tokens] Maximum length of a sequence.
    layer_norm_eps: float = 1e-5  # Constant that is added to the variance in each norm.
    initializer_range: float = 0.02  # Standard deviation of the initial weights.
    embedding_dropout: float = 0.0  # Dropout after the embedding.
    attention_dropout: float = 0.0  # Dropout on attention weights; above 0, attention uses the padded backend.
    mlp_dropout: float = 0.0  # Dropout inside the feed-forward network.
    tie_word_embeddings: bool = True  # Whether the decoder of the head is the token embedding.

    def __post_init__(self) -> None:
        require(
            self,
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "global_attn_every_n_layers",
            "max_position_embeddings",
            min=1,
        )
        if self.hidden_size % (2 * self.num_attention_heads):
            raise RecipeError(
                f"hidden_size = {self.hidden_size} can't be split into num_attention_heads = "
                f"{self.num_attention_heads} heads of even width",
                location="num_attention_heads",
                hint=f"set hidden_size to a multiple of {2 * self.num_attention_heads}, or use fewer heads",
            )
        if self.local_attention < 2 or self.local_attention % 2:
            raise RecipeError(
                f"invalid local_attention: got {self.local_attention}, expected an even number of tokens",
                location="local_attention",
                hint="set it to an even number, such as 128",
            )
        require(self, "global_rope_theta", "local_rope_theta", above=0, below=math.inf)
        require(self, "layer_norm_eps", "initializer_range", above=0, below=math.inf)
        require(self, "embedding_dropout", "attention_dropout", "mlp_dropout", min=0, below=1)

    @property
    def head_width(self) -> int:
        """Dimensions of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def has_global_attention(self, layer: int) -> bool:
        """Whether a layer attends to the whole sequence."""
        return layer % self.global_attn_every_n_layers == 0

    @property
    def output_std(self) -> float:
        """Standard deviation of the weights that write into the residual stream, scaled by depth as in GPT-2."""
        return self.initializer_range / math.sqrt(2 * self.num_hidden_layers)


class ModernBertAttention(nn.Module):
    """Multi-head self-attention with rotary embedding."""

    def __init__(self, settings: ModernBertConfig, layer: int) -> None:
        super().__init__()
        width, std = settings.hidden_size, settings.initializer_range
        self.query = initialized_linear(width, width, std)
        self.key = initialized_linear(width, width, std)
        self.value = initialized_linear(width, width, std)
        self.output = initialized_linear(width, width, settings.output_std)
        self._heads = (settings.num_attention_heads, settings.head_width)
        self._window = None if settings.has_global_attention(layer) else settings.local_attention
        self._dropout = settings.attention_dropout

    def forward(
        self,
        hidden_TD: Float[Tensor, "T D"],
        plan: AttentionPlan,
        cos_sin: tuple[Tensor, Tensor],
        rows_M: Int[Tensor, "M"] | None,
    ) -> Float[Tensor, "N D"]:
        """Return the attention output, or these rows of it. Attention never crosses a sequence or the local window."""
        hidden_TD = hidden_TD.to(compute_dtype(hidden_TD))  # cast once, not once per matrix
        q_THK = rotate(self.query(hidden_TD).unflatten(-1, self._heads), cos_sin)
        k_THK = rotate(self.key(hidden_TD).unflatten(-1, self._heads), cos_sin)
        v_THK = self.value(hidden_TD).unflatten(-1, self._heads)
        dropout = self._dropout if self.training else 0.0
        attended_TD = attention(q_THK, k_THK, v_THK, plan, self._window, dropout).flatten(1)
        attended_ND = attended_TD if rows_M is None else attended_TD.index_select(0, rows_M)
        return F.dropout(self.output(attended_ND), dropout)


class ModernBertBlock(nn.Module):
    """Attention and GeGLU, each after a norm and with a residual connection (pre-norm)."""

    def __init__(self, settings: ModernBertConfig, layer: int) -> None:
        super().__init__()
        # The embedding is normalized already, so block 0 has no norm before attention.
        self.attention_norm = LayerNorm(settings.hidden_size, settings.layer_norm_eps) if layer else nn.Identity()
        self.attention = ModernBertAttention(settings, layer)
        self.mlp_norm = LayerNorm(settings.hidden_size, settings.layer_norm_eps)
        self.mlp = GeGLU(
            settings.hidden_size,
            settings.intermediate_size,
            settings.initializer_range,
            settings.output_std,
            settings.mlp_dropout,
        )
        self.theta = settings.global_rope_theta if settings.has_global_attention(layer) else settings.local_rope_theta

    def forward(
        self,
        hidden_TD: Float[Tensor, "T D"],
        plan: AttentionPlan,
        cos_sin: tuple[Tensor, Tensor],
        rows_M: Int[Tensor, "M"] | None = None,
    ) -> Float[Tensor, "N D"]:
        """Return the hidden states after the block, or these rows of them."""
        attended_ND = self.attention(self.attention_norm(hidden_TD), plan, cos_sin, rows_M)
        hidden_ND = (hidden_TD if rows_M is None else hidden_TD.index_select(0, rows_M)) + attended_ND
        return hidden_ND + self.mlp(self.mlp_norm(hidden_ND))


class ModernBertEncoder(EncoderModule):
    """ModernBertModel. Initial weights come from torch's default generator, which the caller seeds."""

    settings: ModernBertConfig

    def __init__(self, settings: ModernBertConfig, vocab_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.hidden_size = settings.hidden_size
        self.vocab_size = vocab_size
        self.token_embedding = initialized_embedding(vocab_size, settings.hidden_size, settings.initializer_range)
        self.embedding_norm = LayerNorm(settings.hidden_size, settings.layer_norm_eps)
        self.blocks = nn.ModuleList(ModernBertBlock(settings, layer) for layer in range(settings.num_hidden_layers))
        self.final_norm = LayerNorm(settings.hidden_size, settings.layer_norm_eps)
        self._rotary = RotaryEmbedding(settings.head_width, settings.max_position_embeddings)

    def encode(self, batch: Batch, positions_M: Int[Tensor, "M"] | None = None) -> Float[Tensor, "N D"]:
        """Return one vector per token, in the order of the batch, or those at positions."""
        plan = self.plan(batch)
        blocks = cast("list[ModernBertBlock]", list(self.blocks))
        return run_blocks(blocks, self.embed(batch, plan), plan, self._rotary, self.final_norm, positions_M)

    def plan(self, batch: Batch) -> AttentionPlan:
        """Return how attention is computed for a batch."""
        dropout = self.settings.attention_dropout if self.training else 0.0
        dtype = compute_dtype(self.token_embedding)
        return plan_attention(batch, dtype=dtype, dropout=dropout, head_width=self.settings.head_width)

    def embed(self, batch: Batch, plan: AttentionPlan) -> Float[Tensor, "T D"]:
        """Return the normalized embedding of each token, in plan order."""
        hidden_TD = self.embedding_norm(F.embedding(plan.to_plan_order(batch.ids_T), self.token_embedding))
        return F.dropout(hidden_TD, self.settings.embedding_dropout, self.training)


def run_blocks(
    blocks: Sequence[ModernBertBlock],
    hidden_TD: Float[Tensor, "T D"],
    plan: AttentionPlan,
    rotary: RotaryEmbedding,
    final_norm: nn.Module,
    positions_M: Int[Tensor, "M"] | None,
) -> Float[Tensor, "N D"]:
    """Return the normalized output of all blocks in the order of the batch, or only at positions."""
    dtype = compute_dtype(hidden_TD)
    cos_sin = {theta: rotary.cos_sin(plan.position_T, theta, dtype) for theta in {block.theta for block in blocks}}
    *earlier, last = blocks
    for block in earlier:
        hidden_TD = block(hidden_TD, plan, cos_sin[block.theta])
    rows_M = None if positions_M is None else plan.rows_of(positions_M)
    hidden_ND = final_norm(last(hidden_TD, plan, cos_sin[last.theta], rows_M))
    return plan.to_batch_order(hidden_ND) if rows_M is None else hidden_ND


class ModernBertHead(HeadModule):
    """Dense layer, GELU, norm and decoder with a bias. The decoder's weight is the token embedding if tied."""

    def __init__(self, settings: ModernBertConfig, vocab_size: int) -> None:
        super().__init__()
        self.dense = initialized_linear(settings.hidden_size, settings.hidden_size, settings.output_std)
        self.norm = LayerNorm(settings.hidden_size, settings.layer_norm_eps)
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


# Hugging Face format

MODEL_TYPE: Final = "modernbert"
MASKED_LM_CLASS: Final = "ModernBertForMaskedLM"
ENCODER_CLASS: Final = "ModernBertModel"
PREFIX: Final = "model."  # prefix of the encoder's tensors in a model with a head

# name in transformers -> names here, concatenated in this order; {layer} is the number of a layer
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
_DECODER: Final = "decoder.weight"
_NOT_IN_LAYER_0: Final = "attn_norm"
_TIED: Final[Mapping[str, str]] = {_DECODER: "model.embeddings.tok_embeddings.weight"}

# Fields of ModernBertConfig with the same value in config.json; layer_norm_eps has another name there. The fields of
# rotary embedding and global attention are left out, because versions 4 and 5 write them differently.
_FIELDS: Final = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "local_attention",
    "layer_norm_eps",
    "initializer_range",
    "embedding_dropout",
    "attention_dropout",
    "mlp_dropout",
    "tie_word_embeddings",
)
_RENAMED: Final = {"layer_norm_eps": "norm_eps"}
# Keys of config.json with a single supported value.
_REQUIRED: Final[Mapping[str, object]] = {
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
}
# Defaults of keys that a config.json leaves out (configuration_modernbert.py, versions 4.57 and 5.23).
_DEFAULTS: Final[Mapping[str, Any]] = {
    **_REQUIRED,
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


def tied_hf_tensors(settings: ModernBertConfig) -> Mapping[str, str]:
    """Map the name of each tied copy in `transformers` to the name of the tensor that it copies."""
    return _TIED if settings.tie_word_embeddings else {}


def hf_tensor_names(settings: ModernBertConfig) -> dict[str, tuple[str, ...]]:
    """Map each tensor name of `transformers` to names here, which start with "encoder." or "head."."""
    encoder: dict[str, tuple[str, ...]] = {}
    for hf_name, names in _ENCODER.items():
        for layer in range(settings.num_hidden_layers) if "{layer}" in hf_name else [0]:
            if layer or _NOT_IN_LAYER_0 not in hf_name:
                encoder[hf_name.format(layer=layer)] = tuple(f"encoder.{name.format(layer=layer)}" for name in names)
    head = _HEAD if settings.tie_word_embeddings else {**_HEAD, _DECODER: ("decoder",)}
    return encoder | {hf_name: tuple(f"head.{name}" for name in names) for hf_name, names in head.items()}


def to_hf_config(settings: ModernBertConfig, ids: Mapping[str, int | None]) -> dict[str, Any]:
    """Return config.json without vocab_size. `ids` has the keys pad_token_id, cls_token_id and sep_token_id."""
    thetas = {_FULL: settings.global_rope_theta, _SLIDING: settings.local_rope_theta}
    version_5 = {
        "layer_types": [
            _FULL if settings.has_global_attention(layer) else _SLIDING for layer in range(settings.num_hidden_layers)
        ],
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()},
    }
    version_4 = {
        "global_attn_every_n_layers": settings.global_attn_every_n_layers,
        "global_rope_theta": settings.global_rope_theta,
        "local_rope_theta": settings.local_rope_theta,
        "layer_norm_eps": settings.layer_norm_eps,
    }
    return (
        {"architectures": [MASKED_LM_CLASS], "model_type": MODEL_TYPE}
        | {_RENAMED.get(name, name): getattr(settings, name) for name in _FIELDS}
        | {**_REQUIRED, "initializer_cutoff_factor": 2.0}
        | version_5
        | version_4
        | dict(ids)
        | {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}
    )


def from_hf_config(hf_config: Mapping[str, Any]) -> ModernBertConfig:
    """Return the ModernBertConfig for a config.json of this model type.

    Raises:
        ModelError: a key has a value that is not supported.
    """
    values = {**_DEFAULTS, **hf_config}

    def unsupported(key: str) -> ModelError:
        return ModelError(
            f"unsupported {key}: {values[key]!r}",
            location=f"config.json: {key}",
            hint="use a ModernBERT model without it, or a model of `unmask pretrain`",
        )

    for key, required in _REQUIRED.items():
        if values[key] != required:
            raise unsupported(key)
    if values["rope_scaling"] is not None:
        raise unsupported("rope_scaling")
    # In version 4, null as the local theta stands for the global theta.
    local_rope_theta = values["local_rope_theta"]
    thetas = {
        _FULL: values["global_rope_theta"],
        _SLIDING: values["global_rope_theta"] if local_rope_theta is None else local_rope_theta,
    }
    for name, rope in cast("dict[str, Any]", values["rope_parameters"] or {}).items():
        if (
            name not in thetas
            or not isinstance(rope, dict | None)
            or not set(rope or ()) <= {"rope_type", "rope_theta"}
        ):
            raise unsupported("rope_parameters")
        theta = (rope or {}).get("rope_theta", thetas[name])
        if (rope or {}).get("rope_type", "default") != "default" or type(theta) not in (int, float):
            raise unsupported("rope_parameters")
        thetas[name] = theta
    return ModernBertConfig(
        **{name: values[_RENAMED.get(name, name)] for name in _FIELDS},
        global_attn_every_n_layers=_global_interval(values, unsupported("layer_types")),
        global_rope_theta=float(thetas[_FULL]),
        local_rope_theta=float(thetas[_SLIDING]),
    )


def _global_interval(values: Mapping[str, Any], error: ModelError) -> int:
    """Return the interval of layers with global attention. `layer_types` takes precedence over the interval's key."""
    interval = values["global_attn_every_n_layers"]
    layer_types = cast("list[str] | None", values["layer_types"])
    if layer_types is None:
        return interval
    layers = values["num_hidden_layers"]
    for candidate in (interval, *range(1, min(layers, len(layer_types)) + 1)):
        if candidate < 1 or len(layer_types) != layers:
            continue
        if layer_types == [_SLIDING if layer % candidate else _FULL for layer in range(layers)]:
            return candidate
    raise error
