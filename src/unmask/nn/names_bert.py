"""Room card: BERT's names for our tensors and settings, as tables.

Comes in: the settings of a classic encoder, or the config.json of a BertForMaskedLM or BertForPreTraining. Goes out:
their names for our tensors, with those of the pair head where there is one; their config.json; the settings that a
config.json means. Called by: names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from unmask.errors import ModelError
from unmask.nn.classic import ClassicSettings

MODEL_TYPE: Final = "bert"
ARCHITECTURE: Final = "BertForMaskedLM"
WITH_PAIR: Final = "BertForPreTraining"

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
    "bert.embeddings.word_embeddings.weight": "encoder.token_table",
    "bert.embeddings.position_embeddings.weight": "encoder.position_table",
    "bert.embeddings.token_type_embeddings.weight": "encoder.segment_table",
}
_HEAD: Final[Mapping[str, str]] = {
    "cls.predictions.transform.dense": "head.dense",
    "cls.predictions.transform.LayerNorm": "head.norm",
}
_PAIR: Final[Mapping[str, str]] = {"bert.pooler.dense": "pair.pooler", "cls.seq_relationship": "pair.relation"}
TIED: Final[Mapping[str, str]] = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
IGNORED: Final = ("bert.embeddings.position_ids",)  # 0, 1, 2 …, which older versions wrote among the weights

# their key -> our field
_KEYS: Final[Mapping[str, str]] = {
    "hidden_size": "width",
    "intermediate_size": "feed_forward",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "max_position_embeddings": "longest",
    "type_vocab_size": "segments",
    "layer_norm_eps": "norm_epsilon",
    "initializer_range": "initial_deviation",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
# what a BERT config may say and we can't hold: their key -> the only value that we do
_FIXED: Final[Mapping[str, object]] = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
# what a BERT config means where it leaves a key out (configuration_bert.py, versions 4.57 and 5.23)
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
}


def table(layers: int, *, pair: bool) -> dict[str, tuple[str, ...]]:
    """Their names -> ours (encoder, head and pair head told apart by prefix), spelled out for each layer."""
    linear = {"bert.embeddings.LayerNorm": "encoder.embedding_norm"}
    for layer in range(layers):
        linear |= {
            f"bert.encoder.layer.{layer}.{theirs}": f"encoder.blocks.{layer}.{ours}"
            for theirs, ours in _OF_A_BLOCK.items()
        }
    linear |= _HEAD | (_PAIR if pair else {})
    names = {f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in linear.items() for part in ("weight", "bias")}
    return {theirs: (ours,) for theirs, ours in {**_TABLES, **names, "cls.predictions.bias": "head.bias"}.items()}


def has_pair(tensors: Mapping[str, object]) -> bool:
    """Whether a file holds any part of a pair head."""
    return any(name.startswith(tuple(f"{theirs}." for theirs in _PAIR)) for name in tensors)


def config(settings: ClassicSettings, ids: Mapping[str, int | None], *, pair: bool) -> dict[str, Any]:
    """All of config.json but the size of the vocabulary; `ids` has pad_token_id."""
    return (
        {"architectures": [WITH_PAIR if pair else ARCHITECTURE], "model_type": MODEL_TYPE}
        | {theirs: getattr(settings, ours) for theirs, ours in _KEYS.items()}
        | {**_FIXED, "pad_token_id": ids["pad_token_id"]}
    )


def settings_of(said: Mapping[str, Any]) -> ClassicSettings:
    """The settings that a config.json of this model_type means.

    Raises:
        ModelError: a variant that isn't held here; the key is named.
    """
    config = {**_ABSENT, **said}
    for key, only in _FIXED.items():
        if config[key] != only:
            raise ModelError(
                f"`{key}` = {config[key]!r} is not held here, only {only!r}",
                where=f"config.json: {key}",
                next="give a BERT folder without it, or a model of `unmask pretrain`",
            )
    return ClassicSettings(**{ours: config[theirs] for theirs, ours in _KEYS.items()})
