"""Room card: ModernBERT's names for our tensors and settings, as tables.

Comes in: the settings of a modern encoder, or the config.json of a ModernBertForMaskedLM. Goes out: their names for our
tensors; their config.json, with the keys of version 5 of `transformers` and those that version 4 and serving programs
read; the settings that a config.json means. Called by: names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

from unmask.errors import ModelError
from unmask.nn.modern import ModernSettings

MODEL_TYPE: Final = "modernbert"
ARCHITECTURE: Final = "ModernBertForMaskedLM"

# their tensor -> ours, stacked in this order; {layer} stands for every layer
_ENCODER: Final[Mapping[str, tuple[str, ...]]] = {
    "model.embeddings.tok_embeddings.weight": ("token_table",),
    "model.embeddings.norm.weight": ("embedding_norm.weight",),
    "model.layers.{layer}.attn_norm.weight": ("blocks.{layer}.attention_norm.weight",),
    "model.layers.{layer}.attn.Wqkv.weight": (
        "blocks.{layer}.attention.query.weight",
        "blocks.{layer}.attention.key.weight",
        "blocks.{layer}.attention.value.weight",
    ),
    "model.layers.{layer}.attn.Wo.weight": ("blocks.{layer}.attention.output.weight",),
    "model.layers.{layer}.mlp_norm.weight": ("blocks.{layer}.feed_forward_norm.weight",),
    "model.layers.{layer}.mlp.Wi.weight": (
        "blocks.{layer}.feed_forward.input.weight",
        "blocks.{layer}.feed_forward.gate.weight",
    ),
    "model.layers.{layer}.mlp.Wo.weight": ("blocks.{layer}.feed_forward.output.weight",),
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
    "hidden_size": "width",
    "intermediate_size": "feed_forward",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "max_position_embeddings": "longest",
    "local_attention": "local_window",
    "norm_eps": "norm_epsilon",
    "initializer_range": "initial_deviation",
    "embedding_dropout": "embedding_dropout",
    "attention_dropout": "attention_dropout",
    "mlp_dropout": "feed_forward_dropout",
    "tie_word_embeddings": "tied",
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


def tied(settings: ModernSettings) -> Mapping[str, str]:
    """Their names for what is another tensor once more -> that other one's."""
    return _TIED if settings.tied else {}


def table(settings: ModernSettings) -> dict[str, tuple[str, ...]]:
    """Their names -> ours (encoder and head told apart by prefix), spelled out for each layer."""
    encoder: dict[str, tuple[str, ...]] = {}
    for theirs, ours in _ENCODER.items():
        for layer in range(settings.layers) if "{layer}" in theirs else [0]:
            if layer or _NOT_IN_LAYER_0 not in theirs:
                encoder[theirs.format(layer=layer)] = tuple(f"encoder.{name.format(layer=layer)}" for name in ours)
    head = _HEAD if settings.tied else {**_HEAD, _DECODER: ("decoder",)}
    return encoder | {theirs: tuple(f"head.{name}" for name in ours) for theirs, ours in head.items()}


def config(settings: ModernSettings, ids: Mapping[str, int | None]) -> dict[str, Any]:
    """All of config.json but the size of the vocabulary; `ids` has pad_token_id, cls_token_id and sep_token_id."""
    thetas = {_FULL: settings.global_theta, _SLIDING: settings.local_theta}
    version_5 = {
        "layer_types": [_FULL if settings.sees_all(layer) else _SLIDING for layer in range(settings.layers)],
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()},
    }
    version_4 = {
        "global_attn_every_n_layers": settings.global_every,
        "global_rope_theta": settings.global_theta,
        "local_rope_theta": settings.local_theta,
        "layer_norm_eps": settings.norm_epsilon,
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


def settings_of(said: Mapping[str, Any]) -> ModernSettings:
    """The settings that a config.json of this model_type means.

    Raises:
        ModelError: a variant that isn't held here; the key is named.
    """
    config = {**_ABSENT, **said}

    def refuse(key: str) -> ModelError:
        return ModelError(f"`{key}` = {config[key]!r} is not held here", where=f"config.json: {key}", next=_NEXT)

    for key, only in _FIXED.items():
        if config[key] != only:
            raise refuse(key)
    if config["rope_scaling"] is not None:
        raise refuse("rope_scaling")
    fields = {ours: config[theirs] for theirs, ours in _KEYS.items()}
    # Version 4's null for the local theta means the global one.
    local_theta = config["local_rope_theta"]
    thetas = {
        _FULL: config["global_rope_theta"],
        _SLIDING: config["global_rope_theta"] if local_theta is None else local_theta,
    }
    for name, rope in cast("dict[str, dict[str, Any] | None]", config["rope_parameters"] or {}).items():
        if name not in thetas or (rope is not None and rope.get("rope_type", "default") != "default"):
            raise refuse("rope_parameters")
        if rope is not None and "rope_theta" in rope:
            thetas[name] = rope["rope_theta"]
    return ModernSettings(
        **fields,
        global_every=_global_every(config, refuse("layer_types")),
        global_theta=float(thetas[_FULL]),
        local_theta=float(thetas[_SLIDING]),
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
