"""Room card: the ecosystem's names for our tensors and settings, as tables.

Comes in: our state, or the tensors and config.json of a folder that `transformers` or we have written. Goes out: the
other one. Called by: bundle, hf.

A modern encoder is written as ModernBertForMaskedLM, with the keys of version 5 of `transformers` and those that
version 4 and serving programs read. The tutorial's net has no class there: it keeps our names, under a model_type
that `transformers` refuses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor

from unmask.errors import ModelError, RecipeError
from unmask.nn.build import EncoderSettings
from unmask.nn.modern import ModernSettings
from unmask.nn.tutorial import TutorialSettings

SEED_TYPE: Final = "unmask-seed"
MODERN_TYPE: Final = "modernbert"

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
_NOT_IN_LAYER_0: Final = "attn_norm"
_TIED: Final = "decoder.weight"  # never written; read only to see that it is what it is tied to
_TABLE: Final = "model.embeddings.tok_embeddings.weight"

# their key -> our field
_MODERN_KEYS: Final[Mapping[str, str]] = {
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
}
# what a ModernBERT config may say and we can't hold: their key -> the only value that we do
_MODERN_FIXED: Final[Mapping[str, object]] = {
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
    "tie_word_embeddings": True,
}
# what a ModernBERT config means where it leaves a key out (configuration_modernbert.py, versions 4.57 and 5.23)
_MODERN_ABSENT: Final[Mapping[str, Any]] = {
    **_MODERN_FIXED,
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
    "global_rope_theta": 160_000.0,
    "local_rope_theta": 10_000.0,
    "global_attn_every_n_layers": 3,
    "layer_types": None,
    "rope_parameters": None,
    "rope_scaling": None,
}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_NEXT: Final = "give a ModernBERT folder without these, or a model of `unmask pretrain`"


def _table(layers: int) -> dict[str, tuple[str, ...]]:
    """Their names -> ours (encoder and head told apart by prefix), spelled out for each layer."""
    encoder: dict[str, tuple[str, ...]] = {}
    for theirs, ours in _ENCODER.items():
        for layer in range(layers) if "{layer}" in theirs else [0]:
            if layer or _NOT_IN_LAYER_0 not in theirs:
                encoder[theirs.format(layer=layer)] = tuple(f"encoder.{name.format(layer=layer)}" for name in ours)
    return encoder | {theirs: tuple(f"head.{name}" for name in ours) for theirs, ours in _HEAD.items()}


def to_ecosystem(
    encoder_state: Mapping[str, Tensor], head_state: Mapping[str, Tensor], settings: EncoderSettings
) -> dict[str, Tensor]:
    """The tensors of model.safetensors: ModernBertForMaskedLM's without the tied decoder; our own for the tutorial."""
    ours = {f"encoder.{name}": tensor for name, tensor in encoder_state.items()}
    ours |= {f"head.{name}": tensor for name, tensor in head_state.items()}
    if isinstance(settings, TutorialSettings):
        return ours
    table = _table(settings.layers)
    assert {name for names in table.values() for name in names} == set(ours), (
        "a tensor that has no name in the ecosystem"
    )
    return {
        theirs: ours[names[0]] if len(names) == 1 else torch.cat([ours[name] for name in names])
        for theirs, names in table.items()
    }


def from_ecosystem(
    tensors: Mapping[str, Tensor], settings: EncoderSettings
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The states of encoder and head.

    Raises:
        ModelError: a tensor is missing, unknown, or a decoder isn't tied to the token table; each is named.
    """
    if isinstance(settings, TutorialSettings):
        ours = dict(tensors)
        unknown = sorted(name for name in ours if not name.startswith(("encoder.", "head.")))
        _refuse([], unknown)
    else:
        table = _table(settings.layers)
        _refuse([name for name in table if name not in tensors], sorted(set(tensors) - set(table) - {_TIED}))
        if _TIED in tensors and not torch.equal(tensors[_TIED], tensors[_TABLE]):
            raise ModelError("the decoder is not tied to the token table", where=_TIED, next=_NEXT)
        ours: dict[str, Tensor] = {}
        for theirs, names in table.items():
            ours |= zip(names, tensors[theirs].chunk(len(names)), strict=True)
    states = {"encoder": dict[str, Tensor](), "head": dict[str, Tensor]()}
    for name, tensor in ours.items():
        room, _, rest = name.partition(".")
        states[room][rest] = tensor
    return states["encoder"], states["head"]


def _refuse(missing: list[str], unknown: list[str]) -> None:
    for what, names in (("lacks", missing), ("holds what this architecture has no place for:", unknown)):
        if names:
            some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ModelError(
                f"the file {what} {some}",
                next="give a ModernBertForMaskedLM (with its head), or a model of `unmask pretrain`",
            )


def config(settings: EncoderSettings, vocabulary: int, tokenizer_ids: Mapping[str, int]) -> dict[str, Any]:
    """config.json. `tokenizer_ids` has the ids of those of pad, unk, cls, sep and mask that the tokenizer has."""
    ids = {f"{name}_token_id": tokenizer_ids.get(name) for name in ("pad", "cls", "sep")}
    if isinstance(settings, TutorialSettings):
        shape = dataclasses.asdict(settings)
        del shape["kind"]
        return {"model_type": SEED_TYPE, "vocab_size": vocabulary, "tie_word_embeddings": False} | shape | ids
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
        {"architectures": ["ModernBertForMaskedLM"], "model_type": MODERN_TYPE, "vocab_size": vocabulary}
        | {theirs: getattr(settings, ours) for theirs, ours in _MODERN_KEYS.items()}
        | {**_MODERN_FIXED, "initializer_cutoff_factor": 2.0}
        | version_5
        | version_4
        | ids
        | {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}
    )


def settings_of(config: Mapping[str, Any]) -> EncoderSettings:
    """The settings that a config.json means, whether we, version 4 or version 5 of `transformers` wrote it.

    Raises:
        ModelError: another architecture, or one of its variants that isn't held here; the key is named.
    """
    if not isinstance(config, dict):
        raise ModelError("config.json holds no table of settings", where="config.json", next="restore it from a copy")
    kind = config.get("model_type")
    try:
        if kind == SEED_TYPE:
            names = [field.name for field in dataclasses.fields(TutorialSettings) if field.name != "kind"]
            return TutorialSettings(**{name: config[name] for name in names})
        if kind == MODERN_TYPE:
            return _modern_settings({**_MODERN_ABSENT, **config})
    except RecipeError as error:
        raise ModelError(error.what, where=f"config.json: {error.where}", next=_NEXT) from error
    except (KeyError, TypeError, AttributeError) as error:
        message = f"config.json can't be read as a {kind} model: {type(error).__name__} {error}"
        raise ModelError(message, where="config.json", next="restore it from a copy") from error
    raise ModelError(
        f"a model of type {kind!r} is not held here",
        where="config.json: model_type",
        next=f"give a {MODERN_TYPE} folder",
    )


def vocabulary_of(config: Mapping[str, Any]) -> int:
    """The rows of the token table that a config.json means.

    Raises:
        ModelError: it doesn't say.
    """
    rows = config.get("vocab_size")
    if not isinstance(rows, int) or rows < 1:
        raise ModelError(
            f"`vocab_size` is {rows!r}", where="config.json: vocab_size", next="restore config.json from a copy"
        )
    return rows


def _modern_settings(config: Mapping[str, Any]) -> ModernSettings:
    def refuse(key: str) -> ModelError:
        return ModelError(f"`{key}` = {config[key]!r} is not held here", where=f"config.json: {key}", next=_NEXT)

    for key, only in _MODERN_FIXED.items():
        if config[key] != only:
            raise refuse(key)
    if config["rope_scaling"] is not None:
        raise refuse("rope_scaling")
    fields = {ours: config[theirs] for theirs, ours in _MODERN_KEYS.items()}
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
