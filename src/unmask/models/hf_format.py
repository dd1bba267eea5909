"""Room card: the ecosystem's names for our tensors and settings, both ways.

Comes in: our states, or the tensors and config.json of a folder that `transformers` or we have written. Goes out: the
other one. Called by: bundle.

A modern encoder is written as ModernBertForMaskedLM (names_modern), a classic one as BertForMaskedLM, with its pair
head as BertForPreTraining, or as RobertaForMaskedLM or XLMRobertaForMaskedLM (names_bert). The tutorial's net has no
class there: it keeps our names, under a model_type that `transformers` refuses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from unmask.core.errors import ModelError, RecipeError
from unmask.models import EncoderConfig, bert, modernbert
from unmask.models.annotated import TutorialConfig
from unmask.models.bert import BertConfig
from unmask.models.modernbert import ModernBertConfig

SEED_TYPE: Final = "unmask-seed"


class States(NamedTuple):
    """What a model's modules hold; `pair` is None where there is no pair head."""

    encoder: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    pair: Mapping[str, Tensor] | None = None


def to_ecosystem(states: States, settings: EncoderConfig) -> dict[str, Tensor]:
    """The tensors of model.safetensors, without what is tied to another; in our own names for the tutorial's net."""
    ours = {f"encoder.{name}": tensor for name, tensor in states.encoder.items()}
    ours |= {f"head.{name}": tensor for name, tensor in states.head.items()}
    ours |= {f"pair.{name}": tensor for name, tensor in (states.pair or {}).items()}
    if isinstance(settings, TutorialConfig):
        return ours
    table = table_of(settings, pair=states.pair is not None)
    assert {name for names in table.values() for name in names} == set(ours), (
        "a tensor that has no name in the ecosystem"
    )
    written: dict[str, Tensor] = {}
    taken: set[str] = set()
    for theirs, names in table.items():
        one = ours[names[0]] if len(names) == 1 else torch.cat([ours[name] for name in names])
        written[theirs] = one.clone() if taken & set(names) else one  # no file holds the same memory twice
        taken |= set(names)
    return written


def encoder_alone(
    tensors: Mapping[str, Tensor], said: Mapping[str, Any], settings: EncoderConfig
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config.json of the encoder without its heads (BertModel), under the names of that class."""
    assert not isinstance(settings, TutorialConfig)
    prefix, name = prefix_of(settings), modernbert.ENCODER_ALONE
    if isinstance(settings, BertConfig):
        name = bert.FAMILIES[settings.model_type].alone
    inside = {theirs.removeprefix(prefix): tensor for theirs, tensor in tensors.items() if theirs.startswith(prefix)}
    return inside, {**said, "architectures": [name]}


def prefix_of(settings: ModernBertConfig | BertConfig) -> str:
    """What their names for the encoder's tensors begin with, where a head stands beside it."""
    is_classic = isinstance(settings, BertConfig)
    return bert.FAMILIES[settings.model_type].prefix if is_classic else modernbert.PREFIX


def from_ecosystem(tensors: Mapping[str, Tensor], settings: EncoderConfig) -> States:
    """The states of encoder and head, and of a pair head where the file holds one.

    Raises:
        ModelError: a tensor is missing, unknown, or not tied to what it should be; each is named.
    """
    if isinstance(settings, TutorialConfig):
        ours = dict(tensors)
        _refuse([], sorted(name for name in ours if not name.startswith(("encoder.", "head."))), SEED_TYPE)
    else:
        ours = _in_our_names(tensors, settings)
    rooms: dict[str, dict[str, Tensor]] = {"encoder": {}, "head": {}, "pair": {}}
    for name, tensor in ours.items():
        room, _, rest = name.partition(".")
        rooms[room][rest] = tensor
    return States(rooms["encoder"], rooms["head"], rooms["pair"] or None)


def table_of(settings: ModernBertConfig | BertConfig, *, pair: bool) -> dict[str, tuple[str, ...]]:
    """Their names -> ours, stacked in this order."""
    if isinstance(settings, ModernBertConfig):
        assert not pair, "only the classic encoder has a pair head"
        return modernbert.table(settings)
    return bert.table(settings, pair=pair)


def tied_of(settings: ModernBertConfig | BertConfig) -> Mapping[str, str]:
    """Their names for what is another tensor once more -> that other one's."""
    return modernbert.tied(settings) if isinstance(settings, ModernBertConfig) else bert.tied(settings)


def has_pair(tensors: Mapping[str, object], settings: ModernBertConfig | BertConfig) -> bool:
    """Whether a file holds any part of a pair head."""
    return isinstance(settings, BertConfig) and bert.has_pair(tensors, settings)


def _in_our_names(tensors: Mapping[str, Tensor], settings: ModernBertConfig | BertConfig) -> dict[str, Tensor]:
    table, tied = table_of(settings, pair=has_pair(tensors, settings)), tied_of(settings)
    is_modern = isinstance(settings, ModernBertConfig)
    ignored = () if is_modern else bert.ignored(settings)
    whole = modernbert.ARCHITECTURE if is_modern else bert.whole(settings)
    missing = [name for name in table if name not in tensors]
    head = [theirs for theirs, names in table.items() if names[0].startswith("head.")]
    if set(head) <= set(missing):
        raise ModelError(
            f"the file holds no masked-language-model head: it lacks {', '.join(head)}",
            hint=f"give a {whole}, with its head, or let `unmask import FOLDER OUT` begin a new one",
        )
    _refuse(missing, sorted(set(tensors) - set(table) - set(tied) - set(ignored)), whole)
    for name, other in tied.items():
        if name in tensors and not torch.equal(tensors[name], tensors[other]):
            raise ModelError(
                f"the decoder is not tied to the token table: `{name}` is not `{other}`",
                location=name,
                hint="open it with `unmask import FOLDER OUT`, which keeps an untied decoder",
            )
    ours: dict[str, Tensor] = {}
    for theirs, names in table.items():
        ours |= zip(names, tensors[theirs].chunk(len(names)), strict=True)
    return ours


def _refuse(missing: Sequence[str], unknown: Sequence[str], whole: str) -> None:
    for what, names in (("lacks", missing), ("holds what this architecture has no place for:", unknown)):
        if names:
            some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ModelError(
                f"the file {what} {some}", hint=f"give a {whole} (with its head), or a model of `unmask pretrain`"
            )


def config(
    settings: EncoderConfig, vocabulary: int, tokenizer_ids: Mapping[str, int], *, pair: bool = False
) -> dict[str, Any]:
    """config.json. `tokenizer_ids` has the ids of those of pad, unk, cls, sep and mask that the tokenizer has."""
    ids = {f"{name}_token_id": tokenizer_ids.get(name) for name in ("pad", "cls", "sep")}
    if isinstance(settings, ModernBertConfig):
        shape = modernbert.config(settings, ids)
    elif isinstance(settings, BertConfig):
        shape = bert.config(settings, ids, pair=pair)
    else:
        ours = dataclasses.asdict(settings)
        del ours["kind"]
        shape = {"model_type": SEED_TYPE, "tie_word_embeddings": False} | ours | ids
    return shape | {"vocab_size": vocabulary}


def settings_of(config: Mapping[str, Any]) -> EncoderConfig:
    """The settings that a config.json means, whether we, version 4 or version 5 of `transformers` wrote it.

    Raises:
        ModelError: another architecture, or one of its variants that isn't held here; the key is named.
    """
    if not isinstance(config, dict):
        raise ModelError(
            "config.json holds no table of settings", location="config.json", hint="restore it from a copy"
        )
    kind = config.get("model_type")
    try:
        if kind == SEED_TYPE:
            names = [field.name for field in dataclasses.fields(TutorialConfig) if field.name != "kind"]
            return TutorialConfig(**{name: config[name] for name in names})
        if kind == modernbert.MODEL_TYPE:
            return modernbert.settings_of(config)
        if kind in bert.FAMILIES:
            return bert.settings_of(config)
    except RecipeError as error:
        following = "give a shape that can be, or a model of `unmask pretrain`"
        raise ModelError(error.message, location=f"config.json: {error.location}", hint=following) from error
    except (KeyError, TypeError, AttributeError) as error:
        message = f"config.json can't be read as a {kind} model: {type(error).__name__} {error}"
        raise ModelError(message, location="config.json", hint="restore it from a copy") from error
    raise ModelError(
        f"a model of type {kind!r} is not held here",
        location="config.json: model_type",
        hint=f"give a folder of one of these types: {', '.join([*bert.FAMILIES, modernbert.MODEL_TYPE])}",
    )


def vocabulary_of(config: Mapping[str, Any]) -> int:
    """The rows of the token table that a config.json means.

    Raises:
        ModelError: it doesn't say.
    """
    rows = config.get("vocab_size")
    if not isinstance(rows, int) or rows < 1:
        raise ModelError(
            f"`vocab_size` is {rows!r}", location="config.json: vocab_size", hint="restore config.json from a copy"
        )
    return rows
