"""NeoMME for text, with the same weights as NeoMMEForMaskedLM of `transformers` (models/neomme/modeling_neomme.py).

The token embedding is factorized (ALBERT, arXiv 1909.11942), and the head uses both of its factors again. No norm has a
scale. A block mixes the embedding into the input of its attention, and the first and the last layer with global
attention add an embedding of the token to its value. The patch embedding of NeoMME, for images, is not used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
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
    RotaryEmbedding,
    SquaredReLU,
    compute_dtype,
    normal_linear,
    rms_norm,
    rotate_part,
)


@dataclass(frozen=True)
class NeoMMEConfig:
    """Architecture of a NeoMME encoder. The fields are those of config.json that can differ between models."""

    kind: Literal["neomme"] = "neomme"  # NeoMME for text (class NeoMMEForMaskedLM of transformers 5.23).
    num_hidden_layers: int = 4  # Number of layers.
    hidden_size: int = 256  # Width of the token vectors.
    embedding_rank: int = 128  # Width of the token embedding before its projection to `hidden_size`.
    num_attention_heads: int = 4  # Number of attention heads per layer.
    num_key_value_heads: int = 1  # Number of heads of keys and values; it divides `num_attention_heads`.
    head_dim: int = 64  # Width of one attention head.
    intermediate_size: int = 896  # Width of the feed-forward network.
    # [layers] Interval of layers that attend to the whole sequence; the last layer always does.
    global_attn_every_n_layers: int = 6
    sliding_window: int = 256  # [tokens] Window on each side in the first, third, fifth … of the other layers.
    long_sliding_window: int = 1024  # [tokens] Window on each side in the second, fourth, sixth … of the other layers.
    global_rope_theta: float = 1_000_000.0  # Base of the rotary embedding with global attention.
    local_rope_theta: float = 10_000.0  # Base of the rotary embedding with a window.
    max_position_embeddings: int = 8192  # [tokens] Maximum length of a sequence.
    norm_eps: float = 1e-6  # Constant that is added to the mean square in each norm.
    initializer_range: float = 0.02  # Standard deviation of the initial weights of linear maps.
    attention_dropout: float = 0.0  # Dropout on attention weights; above 0, attention uses the padded backend.

    def __post_init__(self) -> None:
        require(self, *_SIZES, *_PATTERN, min=1)
        heads = self.num_attention_heads
        for name, is_valid, expected in (
            ("num_key_value_heads", heads % self.num_key_value_heads == 0, f"a divisor of {heads} heads"),
            ("head_dim", self.head_dim % 16 == 0, "a multiple of 16, such as 64"),
        ):
            if not is_valid:
                got = f"invalid {name}: got {getattr(self, name)}, expected {expected}"
                raise RecipeError(got, location=name, hint=f"set it to {expected}")
        require(self, "global_rope_theta", "local_rope_theta", above=0, below=math.inf)
        require(self, "norm_eps", "initializer_range", above=0, below=math.inf)
        require(self, "attention_dropout", min=0, below=1)

    @property
    def head_width(self) -> int:
        """Dimensions of one attention head."""
        return self.head_dim

    @property
    def windows(self) -> list[int | None]:
        """Number of tokens that each layer attends to on each side; None: the whole sequence."""
        interval, last = self.global_attn_every_n_layers, self.num_hidden_layers
        windows: list[int | None] = []
        for layer in range(1, last + 1):
            local = len(windows) - windows.count(None)  # layers with a window before this one
            is_global = layer % interval == 0 or layer == last
            windows.append(None if is_global else self.long_sliding_window if local % 2 else self.sliding_window)
        return windows

    @property
    def value_embedding_layers(self) -> set[int]:
        """Indexes of the layers that add the value embedding: the first and the last with global attention."""
        windows = self.windows
        return {windows.index(None), len(windows) - 1}

    @property
    def residual_multiplier(self) -> float:
        """Factor on the output of attention and feed-forward network: 1 / sqrt(2 * layers)."""
        return (2 * self.num_hidden_layers) ** -0.5


class NeoMMEAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) without the direction of each token's own value, and with a gate."""

    def __init__(self, settings: NeoMMEConfig, window: int | None) -> None:
        super().__init__()
        width, std, head_dim = settings.hidden_size, settings.initializer_range, settings.head_dim
        heads, kv_heads = settings.num_attention_heads, settings.num_key_value_heads
        self.query = normal_linear(width, heads * head_dim, std)
        self.key = normal_linear(width, kv_heads * head_dim, std)
        self.value = normal_linear(width, kv_heads * head_dim, std)
        self.gate = normal_linear(width, heads * head_dim, std)
        self.output = normal_linear(heads * head_dim, width, 0.0)
        self.alpha = nn.Parameter(torch.zeros(heads))
        self._settings = settings
        self._window = None if window is None else 2 * window

    def forward(
        self, hidden_TD: Tensor, plan: AttentionPlan, cos_sin: tuple[Tensor, Tensor], value_TE: Tensor | None
    ) -> Float[Tensor, "T D"]:
        """Return the attention output. `value_TE` is the value embedding of each token, or None in other layers."""
        settings = self._settings
        hidden_TD = hidden_TD.to(compute_dtype(hidden_TD))  # cast once, not once per matrix
        q_THK, k_TGK, v_TGK = (
            linear(hidden_TD).unflatten(-1, (-1, settings.head_dim)) for linear in (self.query, self.key, self.value)
        )
        q_THK = rotate_part(rms_norm(q_THK, settings.norm_eps), cos_sin)
        k_TGK = rotate_part(rms_norm(k_TGK, settings.norm_eps), cos_sin)
        if value_TE is not None:
            v_TGK = v_TGK + value_TE.to(v_TGK.dtype).view_as(v_TGK)
        groups = settings.num_attention_heads // settings.num_key_value_heads
        k_THK, v_THK = (x_TGK.repeat_interleave(groups, 1) if groups > 1 else x_TGK for x_TGK in (k_TGK, v_TGK))
        dropout = settings.attention_dropout if self.training else 0.0
        attended_THK = attention(q_THK, k_THK, v_THK, plan, self._window, dropout)
        own_THK = F.normalize(v_THK.float(), dim=-1).to(attended_THK.dtype)
        share_TH1 = self.alpha.tanh().to(own_THK.dtype)[:, None] * (attended_THK * own_THK).sum(-1, keepdim=True)
        attended_TE = (attended_THK - share_TH1 * own_THK).flatten(1)
        return self.output(attended_TE * self.gate(hidden_TD).sigmoid())


class NeoMMEBlock(nn.Module):
    """Attention and feed-forward network, each after a norm and with a scaled residual connection."""

    def __init__(self, settings: NeoMMEConfig, layer: int) -> None:
        super().__init__()
        self.window = settings.windows[layer]
        self.attention = NeoMMEAttention(settings, self.window)
        self.mlp = SquaredReLU(settings.hidden_size, settings.intermediate_size, settings.initializer_range)
        # Factors on the hidden states and on the embedding in the input of attention.
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0]))
        self._eps, self._multiplier = settings.norm_eps, settings.residual_multiplier

    def forward(
        self, hidden_TD: Float[Tensor, "T D"], embedding_TD: Float[Tensor, "T D"], *attention_inputs: Any
    ) -> Float[Tensor, "T D"]:
        """Return the hidden states after the block; `attention_inputs` are those of NeoMMEAttention."""
        mixed_TD = self.lambdas[0] * hidden_TD + self.lambdas[1] * embedding_TD
        attended_TD = self.attention(rms_norm(mixed_TD, self._eps), *attention_inputs)
        hidden_TD = hidden_TD + self._multiplier * attended_TD
        return hidden_TD + self._multiplier * self.mlp(rms_norm(hidden_TD, self._eps))


class NeoMMEEncoder(EncoderModule):
    """NeoMMEModel for text. Initial weights come from torch's default generator, which the caller seeds."""

    settings: NeoMMEConfig

    def __init__(self, settings: NeoMMEConfig, vocab_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.hidden_size = settings.hidden_size
        self.vocab_size = vocab_size
        rank, head_dim = settings.embedding_rank, settings.head_dim
        self.token_embedding = nn.Parameter(normal_linear(rank, vocab_size, rank**-0.5).weight.detach())
        self.embedding_projection = normal_linear(rank, settings.hidden_size, settings.initializer_range)
        self.value_embedding = nn.Parameter(torch.zeros(vocab_size, settings.num_key_value_heads * head_dim))
        self.blocks = nn.ModuleList(NeoMMEBlock(settings, layer) for layer in range(settings.num_hidden_layers))
        longest = settings.max_position_embeddings
        self._global_rotary = RotaryEmbedding(head_dim // 4, longest)
        self._local_rotary = RotaryEmbedding(head_dim, longest)

    def matrix_parameters(self) -> Iterator[Tensor]:
        """Yield the weight matrices of the blocks and the projection of the token embedding."""
        # Loss after 150 steps (2 layers, width 128, one seed) with the projection in Muon 4.82, in AdamW 5.00.
        yield from super().matrix_parameters()
        yield self.embedding_projection.weight

    def encode(self, batch: Batch, positions_M: Int[Tensor, "M"] | None = None) -> Float[Tensor, "N D"]:
        """Return one vector per token, in the order of the batch, or those at positions."""
        settings = self.settings
        dropout = settings.attention_dropout if self.training else 0.0
        dtype = compute_dtype(self.token_embedding)
        plan = plan_attention(batch, dtype=dtype, dropout=dropout, head_width=settings.head_dim)
        ids_T = plan.to_plan_order(batch.ids_T)
        hidden_TD = self.embedding_projection(F.embedding(ids_T, self.token_embedding))
        hidden_TD = embedding_TD = rms_norm(hidden_TD.to(self.token_embedding.dtype), settings.norm_eps)
        value_TE = F.embedding(ids_T, self.value_embedding)
        global_cos_sin = self._global_rotary.cos_sin(plan.position_T, settings.global_rope_theta, dtype)
        local_cos_sin = self._local_rotary.cos_sin(plan.position_T, settings.local_rope_theta, dtype)
        adds_value = settings.value_embedding_layers
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, NeoMMEBlock)
            cos_sin = global_cos_sin if block.window is None else local_cos_sin
            hidden_TD = block(hidden_TD, embedding_TD, plan, cos_sin, value_TE if layer in adds_value else None)
        return plan.at(rms_norm(hidden_TD, settings.norm_eps), positions_M)


class NeoMMEHead(HeadModule):
    """Projection to `embedding_rank` and decoder: both matrices of the encoder's token embedding, without biases."""

    def __init__(self, encoder: NeoMMEEncoder) -> None:
        super().__init__()
        # The tuple prevents nn.Module from registering the encoder's matrix a second time.
        self._projections = (encoder.embedding_projection,)

    def features(self, hidden_MD: Float[Tensor, "M D"]) -> Float[Tensor, "M R"]:
        """Return what the decoder maps to logits, of width `embedding_rank`."""
        return hidden_MD @ self._projections[0].weight

    def decoder_parameters(self, token_embedding_VD: Float[Tensor, "V R"]) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the decoder. The bias is 0."""
        return token_embedding_VD, token_embedding_VD.new_zeros(len(token_embedding_VD))


# Hugging Face format

MODEL_TYPE: Final = "neomme"
MASKED_LM_CLASS: Final = "NeoMMEForMaskedLM"
ENCODER_CLASS: Final = "NeoMMEModel"
PREFIX: Final = "model."  # prefix of the encoder's tensors in a model with a head
IMAGE_PREFIX: Final = "model.patch_embeddings."  # of the tensors that only images use

# name in transformers, after the prefix -> name here; {layer} is the number of a layer
_ENCODER: Final[Mapping[str, str]] = {
    "embed_tokens.word_embeddings.weight": "token_embedding",
    "embed_tokens.embedding_projection.weight": "embedding_projection.weight",
    "value_embeddings.weight": "value_embedding",
    "layers.{layer}.lambdas": "blocks.{layer}.lambdas",
    "layers.{layer}.self_attn.q_proj.weight": "blocks.{layer}.attention.query.weight",
    "layers.{layer}.self_attn.k_proj.weight": "blocks.{layer}.attention.key.weight",
    "layers.{layer}.self_attn.v_proj.weight": "blocks.{layer}.attention.value.weight",
    "layers.{layer}.self_attn.output_projection.gate_proj.weight": "blocks.{layer}.attention.gate.weight",
    "layers.{layer}.self_attn.output_projection.o_proj.weight": "blocks.{layer}.attention.output.weight",
    "layers.{layer}.self_attn.exclusive_self_attention.alpha": "blocks.{layer}.attention.alpha",
    "layers.{layer}.mlp.up_proj.weight": "blocks.{layer}.mlp.input.weight",
    "layers.{layer}.mlp.down_proj.weight": "blocks.{layer}.mlp.output.weight",
}
_COPIES: Final = ("lm_head.weight", "unembedding_projection.weight")  # of the first two tensors above

# Fields of NeoMMEConfig with the same value in config.json.
_SIZES: Final = ("num_hidden_layers", "hidden_size", "embedding_rank", "num_attention_heads", "num_key_value_heads",
                 "head_dim", "intermediate_size", "max_position_embeddings")  # fmt: skip
_FIELDS: Final = (*_SIZES, "norm_eps", "initializer_range", "attention_dropout")
_PATTERN: Final = ("sliding_window", "long_sliding_window", "global_attn_every_n_layers")
# Keys of config.json with a single supported value.
_REQUIRED: Final[Mapping[str, object]] = {
    "patch_size": 1, "hidden_act": "relu2", "mlp_bias": False, "attention_bias": False, "tie_word_embeddings": True,
    "rope_theta": None, "rope_scaling": None,
}  # fmt: skip
_LAYERS: Final = ("residual_multiplier", "layer_types", "per_layer_config", "rope_parameters")
# Layer type in transformers -> field of NeoMMEConfig with its rope_theta, and its partial_rotary_factor.
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ROPE: Final = {_FULL: ("global_rope_theta", 0.25), _SLIDING: ("local_rope_theta", 1.0)}


def tied_hf_tensors(settings: NeoMMEConfig) -> Mapping[str, str]:
    """Map the name of each tied copy in `transformers` to the name of the tensor that it copies."""
    return dict(zip(_COPIES, (PREFIX + hf_name for hf_name in _ENCODER), strict=False))


def hf_tensor_names(settings: NeoMMEConfig) -> dict[str, tuple[str, ...]]:
    """Map each tensor name of `transformers` to the name here, which starts with "encoder." or "head."."""
    return {
        PREFIX + hf_name.format(layer=layer): (f"encoder.{name.format(layer=layer)}",)
        for hf_name, name in _ENCODER.items()
        for layer in range(settings.num_hidden_layers)
    }


def image_tensors(settings: NeoMMEConfig) -> dict[str, Tensor]:
    """Return the tensors of the class in `transformers` that only images use, for patches of one pixel, as zeros."""
    width = settings.hidden_size
    shapes = {"norm.weight": (3,), "norm.bias": (3,), "up_proj.weight": (2 * width, 3),
              "down_proj.weight": (width, 2 * width), "down_proj.bias": (width,)}  # fmt: skip
    return {IMAGE_PREFIX + name: torch.zeros(shape) for name, shape in shapes.items()}


def _layer_types(settings: NeoMMEConfig) -> list[str]:
    return [_FULL if window is None else _SLIDING for window in settings.windows]


def to_hf_config(settings: NeoMMEConfig, ids: Mapping[str, int | None]) -> dict[str, Any]:
    """Return config.json without vocab_size. `ids` has the key pad_token_id."""
    return {
        "architectures": [MASKED_LM_CLASS],
        "model_type": MODEL_TYPE,
        **{name: getattr(settings, name) for name in (*_FIELDS, *_PATTERN, "residual_multiplier")},
        **{key: value for key, value in _REQUIRED.items() if value is not None},
        "layer_types": _layer_types(settings),
        "per_layer_config": {str(layer): {"sliding_window": window} for layer, window in enumerate(settings.windows)},
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": getattr(settings, name), "partial_rotary_factor": part}
            for kind, (name, part) in _ROPE.items()
        },
        **dict.fromkeys(("document_token_id", "image_token_id")),
        "pad_token_id": ids["pad_token_id"],
    }


def from_hf_config(hf_config: Mapping[str, Any]) -> NeoMMEConfig:
    """Return the NeoMMEConfig for a config.json of this model type.

    Raises:
        ModelError: a key has a value that is not supported.
    """
    # transformers reads these two keys and doesn't write them.
    values: dict[str, Any] = {"long_sliding_window": 1024, "global_attn_every_n_layers": 6, **hf_config}

    def unsupported(key: str) -> ModelError:
        without = "for text alone (patch_size = 1)" if key == "patch_size" else "without it"
        hint = f"use a NeoMME model {without}, or a model of `unmask pretrain`"
        return ModelError(f"unsupported {key}: {values[key]!r}", location=f"config.json: {key}", hint=hint)

    for key in (*_REQUIRED, *_FIELDS, *_PATTERN, *_LAYERS):
        if values.get(key) is None and _REQUIRED.get(key, "") is not None:
            raise ModelError(f"missing {key}", location="config.json", hint="save the model with transformers again")
        if key in _REQUIRED and values.get(key) != _REQUIRED[key]:
            raise unsupported(key)
    thetas: dict[str, Any] = {}
    for kind, (name, part) in _ROPE.items():
        rope = dict((values["rope_parameters"] or {}).get(kind) or {})
        theta = rope.pop("rope_theta", None)
        if rope != {"rope_type": "default", "partial_rotary_factor": part} or type(theta) not in (int, float):
            raise unsupported("rope_parameters")
        thetas[name] = float(theta)
    config = NeoMMEConfig(**{name: values[name] for name in (*_FIELDS, *_PATTERN)}, **thetas)
    if not math.isclose(values["residual_multiplier"], config.residual_multiplier):
        raise unsupported("residual_multiplier")
    intervals = (config.global_attn_every_n_layers, *range(1, config.num_hidden_layers + 1))
    configs = (replace(config, global_attn_every_n_layers=interval) for interval in intervals)
    config = next((config for config in configs if _layer_types(config) == values["layer_types"]), None)
    if config is None:
        raise unsupported("layer_types")
    given = {int(n): changed for n, changed in (values["per_layer_config"] or {}).items()}  # such as "03"
    per_layer = [{"sliding_window": config.sliding_window, **given.pop(n, {})} for n in range(len(config.windows))]
    local = [changed["sliding_window"] for changed in per_layer if changed["sliding_window"] is not None]
    config = replace(config, **dict(zip(("sliding_window", "long_sliding_window"), local, strict=False)))
    if given or per_layer != [{"sliding_window": window} for window in config.windows]:
        raise unsupported("per_layer_config")
    return config
