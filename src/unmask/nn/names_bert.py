"""Room card: the names of BERT, RoBERTa and XLM-R for our tensors and settings, as tables.

Comes in: the settings of a classic encoder, or the config.json of a BertForMaskedLM, BertForPreTraining,
RobertaForMaskedLM or XLMRobertaForMaskedLM. Goes out: their names for our tensors, with those of the pair head where
there is one; their config.json; the settings that a config.json means. Called by: names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from unmask.errors import ModelError
from unmask.nn.classic import ClassicSettings


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
