"""Tensor names and config.json of `transformers`: conversion in both directions.

ModernBERT is written as ModernBertForMaskedLM (modernbert.py), NeoMME as NeoMMEForMaskedLM (neomme.py). BERT is written
as BertForMaskedLM, or as BertForPreTraining if it has a sentence pair head. RoBERTa and XLM-R are written as
RobertaForMaskedLM and XLMRobertaForMaskedLM (bert.py), a BERT with a discriminator head as ElectraForPreTraining
(electra.py). The tutorial's model has no class in `transformers`. It is written with this package's tensor names and
with a model type that `transformers` rejects.
"""

from __future__ import annotations

import dataclasses
import reprlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from unmask.core.errors import ModelError, RecipeError
from unmask.core.format import join_names
from unmask.models import EncoderConfig, bert, electra, modernbert, neomme
from unmask.models.annotated import TutorialConfig
from unmask.models.bert import BertConfig
from unmask.models.modernbert import ModernBertConfig
from unmask.models.neomme import NeoMMEConfig

TUTORIAL_TYPE: Final = "unmask-seed"
HFModelConfig = ModernBertConfig | BertConfig | NeoMMEConfig

MAX_SIZE: Final = 2**31 - 1  # of a dimension or a count in config.json
_NULLABLE: Final = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id",
                    "local_rope_theta", "layer_types", "rope_parameters", "rope_scaling", "per_layer_config",
                    "residual_multiplier",
                    "architectures", "quantization_config")  # fmt: skip
# Lists with an entry for each layer, and tables with a row for each position, are not in the file of weights.
_HIGHEST: Final = {"num_hidden_layers": 1000, "max_position_embeddings": 1 << 18}
# Types of the keys that are read.
_TYPES: Final[Sequence[tuple[Sequence[str], tuple[type, ...], str]]] = (
    (("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
      "type_vocab_size", "vocab_size", "global_attn_every_n_layers", "local_attention", "pad_token_id", "bos_token_id",
      "eos_token_id", "cls_token_id", "sep_token_id", "position_offset", "embedding_rank", "head_dim",
      "num_key_value_heads", "embedding_size", "patch_size", "sliding_window", "long_sliding_window"), (int,),
     "an integer of 32 bits"),
    (("layer_norm_eps", "norm_eps", "initializer_range", "hidden_dropout_prob", "attention_probs_dropout_prob",
      "embedding_dropout", "attention_dropout", "mlp_dropout", "global_rope_theta", "local_rope_theta",
      "residual_multiplier"),
     (int, float), "a finite number"),
    (("tie_word_embeddings", "is_decoder", "add_cross_attention", "norm_bias", "attention_bias", "mlp_bias",
      "classifier_bias", "decoder_bias"), (bool,), "true or false"),
    (("hidden_act", "hidden_activation", "classifier_activation", "position_embedding_type", "model_type"), (str,),
     "a string"),
    (("architectures", "layer_types"), (list,), "a list"),
    (("rope_parameters", "rope_scaling", "per_layer_config"), (dict,), "an object"),
)  # fmt: skip


class States(NamedTuple):
    """State dicts of a model's modules; `pair` is None without a sentence pair head."""

    encoder: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    pair: Mapping[str, Tensor] | None = None


def to_hf_tensors(states: States, settings: EncoderConfig) -> dict[str, Tensor]:
    """Return the tensors of model.safetensors, without tied copies. The tutorial's model keeps its own names."""
    tensors = {f"encoder.{name}": tensor for name, tensor in states.encoder.items()}
    tensors |= {f"head.{name}": tensor for name, tensor in states.head.items()}
    tensors |= {f"pair.{name}": tensor for name, tensor in (states.pair or {}).items()}
    if isinstance(settings, TutorialConfig):
        return tensors
    hf_names = hf_tensor_names(settings, pair=states.pair is not None)
    assert {name for names in hf_names.values() for name in names} == set(tensors), (
        "a tensor has no name in transformers"
    )
    hf_tensors: dict[str, Tensor] = {}
    saved_names: set[str] = set()
    for hf_name, names in hf_names.items():
        tensor = tensors[names[0]] if len(names) == 1 else torch.cat([tensors[name] for name in names])
        # safetensors can't save tensors that share memory.
        hf_tensors[hf_name] = tensor.clone() if saved_names & set(names) else tensor
        saved_names |= set(names)
    return hf_tensors | (neomme.image_tensors(settings) if isinstance(settings, NeoMMEConfig) else {})


def from_hf_tensors(hf_tensors: Mapping[str, Tensor], settings: EncoderConfig) -> States:
    """Return the state dicts of encoder and head, and of the sentence pair head if the file has one.

    Raises:
        ModelError: tensors are missing or unknown, or differ although config.json ties them. They are named.
    """
    if isinstance(settings, TutorialConfig):
        tensors = dict(hf_tensors)
        unknown = sorted(name for name in tensors if not name.startswith(("encoder.", "head.")))
        _check_tensor_names([], unknown, TUTORIAL_TYPE)
    else:
        tensors = _rename(hf_tensors, settings)
    modules: dict[str, dict[str, Tensor]] = {"encoder": {}, "head": {}, "pair": {}}
    for name, tensor in tensors.items():
        module, _, rest = name.partition(".")
        modules[module][rest] = tensor
    return States(modules["encoder"], modules["head"], modules["pair"] or None)


def encoder_only(
    hf_tensors: Mapping[str, Tensor], hf_config: Mapping[str, Any], settings: EncoderConfig
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and config.json of the encoder alone, in the format of its class, such as BertModel."""
    assert not isinstance(settings, TutorialConfig)
    prefix = encoder_prefix(settings)
    if isinstance(settings, BertConfig):
        name = bert.HF_NAMES[settings.model_type].encoder_class
    else:
        name = _family(settings).ENCODER_CLASS
    encoder = {
        hf_name.removeprefix(prefix): tensor for hf_name, tensor in hf_tensors.items() if hf_name.startswith(prefix)
    }
    return encoder, {**hf_config, "architectures": [name]}


def _family(settings: ModernBertConfig | NeoMMEConfig) -> Any:
    """Return the module of a model family without a sentence pair head."""
    return modernbert if isinstance(settings, ModernBertConfig) else neomme


def encoder_prefix(settings: HFModelConfig) -> str:
    """Return the prefix of the encoder's tensor names in a model with a head."""
    return bert.HF_NAMES[settings.model_type].prefix if isinstance(settings, BertConfig) else _family(settings).PREFIX


def hf_tensor_names(settings: HFModelConfig, *, pair: bool) -> dict[str, tuple[str, ...]]:
    """Map each tensor name of `transformers` to the names here whose tensors are concatenated to it."""
    if isinstance(settings, BertConfig):
        return bert.hf_tensor_names(settings, pair=pair)
    assert not pair, "only BERT has a sentence pair head"
    return _family(settings).hf_tensor_names(settings)


def hf_head_names(settings: HFModelConfig) -> set[str]:
    """Return the names in `transformers` of the vocabulary head's tensors."""
    names = hf_tensor_names(settings, pair=False)
    return {hf_name for hf_name, own in names.items() if own[0].startswith("head.")}


def tied_hf_tensors(settings: HFModelConfig) -> Mapping[str, str]:
    """Map the name of each tied copy in `transformers` to the name of the tensor that it copies."""
    if isinstance(settings, BertConfig):
        return bert.tied_hf_tensors(settings)
    return _family(settings).tied_hf_tensors(settings)


def is_ignored(hf_name: str, settings: HFModelConfig) -> bool:
    """Whether a tensor of `transformers` is left out: position ids of old versions, and weights for images."""
    if isinstance(settings, BertConfig):
        return hf_name in bert.ignored_hf_tensors(settings)
    return isinstance(settings, NeoMMEConfig) and hf_name.startswith(neomme.IMAGE_PREFIX)


def has_pair_head(hf_tensors: Mapping[str, object], settings: HFModelConfig) -> bool:
    """Whether a file has any tensor of a sentence pair head."""
    return isinstance(settings, BertConfig) and bert.has_pair_head(hf_tensors, settings)


def _rename(hf_tensors: Mapping[str, Tensor], settings: HFModelConfig) -> dict[str, Tensor]:
    hf_names, tied = hf_tensor_names(settings, pair=has_pair_head(hf_tensors, settings)), tied_hf_tensors(settings)
    is_bert = isinstance(settings, BertConfig)
    expected = bert.hf_class_names(settings) if is_bert else _family(settings).MASKED_LM_CLASS
    missing = [name for name in hf_names if name not in hf_tensors]
    head = [hf_name for hf_name, names in hf_names.items() if names[0].startswith("head.")]
    if head and set(head) <= set(missing):  # a tied head of NeoMME has no tensors of its own
        raise ModelError(
            f"the file has no masked language modeling head: it lacks {', '.join(head)}",
            hint=f"use a {expected} with its head, or initialize a new head with `unmask import FOLDER OUT`",
        )
    unknown = sorted(set(hf_tensors) - set(hf_names) - set(tied))
    _check_tensor_names(missing, [name for name in unknown if not is_ignored(name, settings)], expected)
    for name, other in tied.items():
        if name in hf_tensors and not torch.equal(hf_tensors[name], hf_tensors[other]):
            raise ModelError(
                f"the decoder is not tied to the token embedding: `{name}` differs from `{other}`",
                location=name,
                hint="convert the model with `unmask import FOLDER OUT`, which keeps an untied decoder (not of NeoMME)",
            )
    tensors: dict[str, Tensor] = {}
    for hf_name, names in hf_names.items():
        tensors |= zip(names, hf_tensors[hf_name].chunk(len(names)), strict=True)
    return tensors


def _check_tensor_names(missing: Sequence[str], unknown: Sequence[str], expected: str) -> None:
    """Raise ModelError if tensors are missing or unknown. `expected` is the class name for the hint."""
    for problem, names in (("lacks", missing), ("has tensors that this architecture doesn't have:", unknown)):
        if names:
            raise ModelError(
                f"the file {problem} {join_names(names, 5)}",
                hint=f"use a {expected} with its head, or a model of `unmask pretrain`",
            )


def to_hf_config(
    settings: EncoderConfig, vocab_size: int, special_ids: Mapping[str, int], *, pair: bool = False
) -> dict[str, Any]:
    """Return config.json. `special_ids` maps pad, unk, cls, sep and mask, if they exist, to their ids."""
    ids = {f"{name}_token_id": special_ids.get(name) for name in ("pad", "cls", "sep")}
    if isinstance(settings, ModernBertConfig | NeoMMEConfig):
        hf_config = _family(settings).to_hf_config(settings, ids)
    elif isinstance(settings, BertConfig):
        hf_config = bert.to_hf_config(settings, ids, pair=pair)
    else:
        fields = dataclasses.asdict(settings)
        del fields["kind"]
        hf_config = {"model_type": TUTORIAL_TYPE, "tie_word_embeddings": False} | fields | ids
    return hf_config | {"vocab_size": vocab_size}


def from_hf_config(hf_config: Mapping[str, Any]) -> EncoderConfig:
    """Return the encoder config for a config.json of unmask or of `transformers` 4 or 5.

    Raises:
        ModelError: the architecture or the value of a key is not supported; the key is named.
    """
    if not isinstance(hf_config, dict):
        raise ModelError("config.json is not a JSON object", location="config.json", hint="restore it from a copy")
    model_type = hf_config.get("model_type")
    _check_types(hf_config)
    try:
        if model_type == TUTORIAL_TYPE:
            names = [field.name for field in dataclasses.fields(TutorialConfig) if field.name != "kind"]
            return TutorialConfig(**{name: hf_config[name] for name in names})
        if model_type == modernbert.MODEL_TYPE:
            return modernbert.from_hf_config(hf_config)
        if model_type == neomme.MODEL_TYPE:
            return neomme.from_hf_config(hf_config)
        if model_type == electra.MODEL_TYPE:
            return electra.from_hf_config(hf_config)
        if isinstance(model_type, str) and model_type in bert.HF_NAMES:
            return bert.from_hf_config(hf_config)
    except RecipeError as error:
        hint = "correct config.json, or use a model of `unmask pretrain`"
        raise ModelError(error.message, location=f"config.json: {error.location}", hint=hint) from error
    except ModelError:  # a ValueError too
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        message = f"config.json can't be read as a {model_type} model: {type(error).__name__} {error}"
        raise ModelError(message, location="config.json", hint="restore it from a copy") from error
    supported = ", ".join([*bert.HF_NAMES, electra.MODEL_TYPE, modernbert.MODEL_TYPE, neomme.MODEL_TYPE])
    raise ModelError(
        f"unsupported model type: {model_type!r}",
        location="config.json: model_type",
        hint=f"use a model of one of these types: {supported}",
    )


def _check_types(hf_config: Mapping[str, Any]) -> None:
    """Check the types of the keys that are read, as strictly as the config classes of `transformers` 5.

    Raises:
        ModelError: a value has another type, or a number is not finite. The key is named.
    """
    for keys, types, expected in _TYPES:
        for key in keys:
            value = hf_config.get(key)
            if key not in hf_config or (value is None and key in _NULLABLE):
                continue
            is_valid = isinstance(value, types) and (bool in types or not isinstance(value, bool))
            if is_valid and isinstance(value, int | float) and not isinstance(value, bool):
                is_valid = abs(value) <= (MAX_SIZE if float not in types else sys.float_info.max)
            if not is_valid:
                raise ModelError(
                    f"invalid {key}: got {reprlib.repr(value)}, expected {expected}",
                    location=f"config.json: {key}",
                    hint="correct config.json, or restore it from a copy",
                )
    for key, highest in _HIGHEST.items():
        if (number := hf_config.get(key) or 0) > highest:
            raise ModelError(
                f"invalid {key}: got {number:,}, expected at most {highest:,}",
                location=f"config.json: {key}",
                hint="correct config.json, or restore it from a copy",
            )


def vocab_size_of(hf_config: Mapping[str, Any]) -> int:
    """Return the vocabulary size in a config.json.

    Raises:
        ModelError: it is missing or not a positive integer.
    """
    vocab_size = hf_config.get("vocab_size")
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or not 1 <= vocab_size <= MAX_SIZE:
        raise ModelError(
            f"invalid vocab_size: got {vocab_size!r}, expected a positive integer",
            location="config.json: vocab_size",
            hint="restore config.json from a copy",
        )
    return vocab_size
