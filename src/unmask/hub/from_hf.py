"""Room card: the tensors of a folder that others have written.

Comes in: a folder with safetensors, in one file or in several. Goes out: float32 tensors under the names that
nn/names.py knows, and in sentences what was converted, left out or is to be begun anew. Called by: importing.

Pickles are never read. Older names (gamma, beta), encoders without a prefix (BertModel saved alone), heads of tasks and
half precision are known; any other tensor without a place is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unmask.core import files
from unmask.core.errors import DamagedError, ModelError
from unmask.hub.tokenizer import open_tokenizer
from unmask.models import build_model, build_pair
from unmask.models.annotated import TutorialConfig
from unmask.models.bert import BertConfig
from unmask.models.hf_format import (
    SEED_TYPE,
    States,
    from_ecosystem,
    has_pair,
    prefix_of,
    settings_of,
    table_of,
    tied_of,
    to_ecosystem,
    vocabulary_of,
)
from unmask.models.model import CARD, CONFIG, WEIGHTS, Model, find_checkpoint, free_place, load, save_model
from unmask.models.modernbert import ModernBertConfig

INDEX: Final = "model.safetensors.index.json"
_PICKLES: Final = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt*", "*.h5", "*.msgpack")
_OLDER: Final = ((".gamma", ".weight"), (".beta", ".bias"))
_BARE: Final = ("embeddings.", "encoder.", "pooler.", "layers.", "final_norm.")
_OF_TASKS: Final = ("classifier.", "qa_outputs.", "score.")
_COUNTERS: Final = ("position_ids", "token_type_ids", "inv_freq")  # 0, 1, 2 … and what follows from settings alone
_SHOWN: Final = 5

Settings = ModernBertConfig | BertConfig


def read(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Every tensor of a folder in float32 under its own name, and what is to be said of them.

    Raises:
        ModelError: there are no safetensors; a pickle beside is named, with what to do.
        DamagedError: a file is missing or can't be read; it is named.
    """
    tensors: dict[str, Tensor] = {}
    for file in _files(folder):
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise DamagedError(
                f"not readable as safetensors: {error}",
                location=str(file),
                hint="restore it from a copy, or fetch it anew",
            ) from error
    formats = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()})
    said = [f"weights in {', '.join(formats)} were read as float32"] if formats not in ([], ["float32"]) else []
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}, said


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        places: Any = files.read_json(folder / INDEX)
        try:
            names = sorted({str(name) for name in cast("Mapping[str, str]", places["weight_map"]).values()})
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedError("no index of weights", location=str(folder / INDEX), hint="fetch it anew") from error
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise DamagedError(
                    f"a file of weights that {INDEX} names is not here",
                    location=str(folder / name),
                    hint="copy or fetch it, so that all stand in one folder",
                )
        return [folder / name for name in names]
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"the weights here are no safetensors ({', '.join(pickles[:_SHOWN])}); pickles are programs, never read",
            location=str(folder),
            hint="if you trust who made them: AutoModelForMaskedLM.from_pretrained(FOLDER).save_pretrained(OTHER) in "
            "`transformers`, with the tokenizer's files beside, then import OTHER",
        )
    raise ModelError(
        f"there are no weights here: neither {WEIGHTS} nor {INDEX}",
        location=str(folder),
        hint="give a folder that `save_pretrained` of transformers wrote",
    )


def named_anew(tensors: Mapping[str, Tensor], settings: Settings) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the names of a model with heads; what has no part in one is left out and said."""
    prefix = prefix_of(settings)
    is_bare = not any(name.startswith(prefix) for name in tensors)
    named: dict[str, Tensor] = {}
    left: list[str] = []
    older = False
    for name, tensor in tensors.items():
        known = name
        for old, new in _OLDER:
            if known.endswith(old):
                known, older = known.removesuffix(old) + new, True
        if is_bare and known.startswith(_BARE):
            known = prefix + known
        if known.rpartition(".")[2] in _COUNTERS:
            continue
        if _is_of_a_task(known, settings):
            left.append(name)
        else:
            named[known] = tensor
    said = ["older names of tensors (gamma, beta) were read as weight and bias"] if older else []
    if left:
        said.append(f"left out, for masks need it not: {_some(left)}")
    return named, said


def _is_of_a_task(name: str, settings: Settings) -> bool:
    """Whether a tensor belongs to a head that neither masks nor pairs need; RoBERTa's pooler is one."""
    if name.startswith(_OF_TASKS):
        return True
    return isinstance(settings, BertConfig) and settings.model_type != "bert" and name.startswith("roberta.pooler.")


def tie_as_found(tensors: Mapping[str, Tensor], settings: Settings) -> tuple[Settings, list[str]]:
    """Settings whose decoder is tied only where the file's is: `transformers`, too, believes the tensors."""
    apart = [
        name
        for name, other in tied_of(settings).items()
        if name.endswith(".weight") and {name, other} <= set(tensors) and not torch.equal(tensors[name], tensors[other])
    ]
    if not apart:
        return settings, []
    return replace(settings, tie_word_embeddings=False), [
        f"config.json ties the decoder and the weights don't ({apart[0]}): kept apart"
    ]


def completed(
    tensors: Mapping[str, Tensor], settings: Settings, initial: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors with the heads that they lack, taken from `initial`, which has every tensor.

    Raises:
        ModelError: a tensor of the encoder is missing, one has no place, or one has another shape; each is named.
    """
    whole, tied, said = dict(tensors), tied_of(settings), list[str]()
    ours = table_of(settings, pair=has_pair(tensors, settings))
    biases = [theirs for theirs, names in ours.items() if names == ("head.bias",)]
    biases += [name for name, other in tied.items() if other in biases]
    if known := [name for name in reversed(biases) if name in whole]:  # version 5 reads the one of the decoder
        if any(not torch.equal(whole[name], whole[known[0]]) for name in known):
            said.append(f"of two biases of the decoder, {known[0]} was taken, as `transformers` does")
        whole |= dict.fromkeys(biases, whole[known[0]])
    for name, other in tied.items():  # a table may stand under the decoder's name alone
        if other not in whole and name in whole:
            whole[other] = whole[name]
    missing = [name for name in ours if name not in whole]
    refuse = [name for name in missing if ours[name][0].startswith("encoder.")]
    _refuse("the weights lack", refuse, "fetch the folder anew; config.json may mean another shape")
    _refuse(
        "the weights hold what this architecture has no place for:",
        sorted(set(whole) - set(ours) - set(tied)),
        "give a BERT, RoBERTa or ModernBERT folder as `transformers` writes it",
    )
    for name in ours:
        if name in whole and whole[name].shape != initial[name].shape:
            found, meant = (" × ".join(map(str, t.shape)) for t in (whole[name], initial[name]))
            raise ModelError(
                f"`{name}` is {found} where config.json means {meant}",
                location=name,
                hint="config.json is not of these weights",
            )
    whole |= {name: initial[name] for name in missing}
    heads = {"the masked-language-model head": "head.", "the pair head": "pair."}
    for head, room in heads.items():
        begun = [name for name in missing if ours[name][0].startswith(room)]
        if begun:
            share = "" if len(begun) == sum(names[0].startswith(room) for names in ours.values()) else " (in part)"
            said.append(f"{head}{share} is not in the weights and begins anew: {_some(begun)}")
    return whole, said


def _refuse(what: str, names: Sequence[str], next: str) -> None:
    if names:
        raise ModelError(f"{what} {_some(names)}", hint=next)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


_TYPES: Final = (("ModernBert", "modernbert"), ("XLMRoberta", "xlm-roberta"), ("Roberta", "roberta"), ("Bert", "bert"))


def open_model(folder: str | Path) -> Model:
    """Open a model for training it on or for writing it in another form; `said` tells what was not simply read.

    Args:
        folder: a run, a step folder, or what `transformers` saved. Heads that it lacks get initial weights from torch's
            generator, which the caller seeds.

    Raises:
        ModelError: an architecture or a setting that isn't held here, weights that don't fit it, pickles; each by name.
        TokenizerError: no tokenizer, or one that can't be read.
        DamagedError: a file is missing or not what was written.
    """
    place = find_checkpoint(folder)
    description = _description(place)
    if (place / CARD).is_file() and not _is_alone(description):
        return load(folder)
    if (place / files.DIGESTS).is_file():
        files.verify_manifest(place)
    try:
        settings, rows = settings_of(description), vocabulary_of(description)
    except ModelError as error:
        raise ModelError(error.message, location=str(place / error.location), hint=error.hint) from error
    if isinstance(settings, TutorialConfig):
        raise ModelError(f"a {SEED_TYPE} folder without its card", location=str(place), hint="restore it from a copy")
    tokenizer, said = open_tokenizer(place)
    if tokenizer.size > rows:
        raise ModelError(
            f"the tokenizer has {tokenizer.size} pieces and the weights {rows} rows",
            location=str(place),
            hint="use the tokenizer that this model was trained with",
        )
    try:
        tensors, told = read(place)
        said += told
        tensors, told = named_anew(tensors, settings)
        said += told
        settings, told = tie_as_found(tensors, settings)
        said += told
        encoder, head = build_model(settings, rows)
        pair = build_pair(settings) if has_pair(tensors, settings) else None
        states = States(encoder.state_dict(), head.state_dict(), None if pair is None else pair.state_dict())
        tensors, told = completed(tensors, settings, to_ecosystem(states, settings))
        for module, state in zip((encoder, head, pair), from_ecosystem(tensors, settings), strict=True):
            if module is not None and state is not None:
                module.load_state_dict(state)
                module.eval()
    except ModelError as error:
        raise ModelError(
            error.message, location=error.location if "/" in error.location else str(place), hint=error.hint
        ) from error
    said += told
    if rows > tokenizer.size:
        said.append(f"{rows - tokenizer.size} rows beyond the tokenizer's {tokenizer.size:,} pieces are kept")
    if isinstance(settings, BertConfig) and settings.model_type != "bert":
        padding, counted = tokenizer.role_id("pad_token"), settings.position_offset - 1
        if padding != counted:
            said.append(
                f"the tokenizer pads with {padding}, and positions are counted from {counted}, as config.json says"
            )
    card: Any = files.read_json(place / CARD) if (place / CARD).is_file() else {}
    if not isinstance(card, dict):
        raise DamagedError(
            "no card that we wrote", location=str(place / CARD), hint="restore it from a copy, or remove it"
        )
    return Model(encoder, head, tokenizer, settings, cast("dict[str, Any]", card), str(place), pair, tuple(said))


def import_model(folder: str | Path, out: str | Path, *, force: bool = False, seed: int = 0) -> Model:
    """Write what others have made as a folder of ours, which `transformers` opens too.

    Args:
        folder: a BERT, RoBERTa, XLM-R or ModernBERT folder.
        out: where the model is to stand; not overwritten without `force`.
        seed: of the initial weights of heads that the folder lacks.

    Raises:
        RunError: `out` exists.
        ModelError, TokenizerError, DamagedError: as `open_model`.
        StoreError: `out` can't be written.
    """
    place = free_place(Path(out), Path(folder), force=force)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_model(folder)
    source = Path(model.path).resolve()
    card = model.card or {"imported": {"from": source.name, "notes": list(model.notes)}}
    model = replace(model, card=card, path=str(place))
    with files.atomic_directory(place) as aside:
        save_model(aside, model)
        files.write_manifest(aside)
    return model


def _description(place: Path) -> Mapping[str, Any]:
    """config.json; the oldest say their architecture and not their type."""
    description: Any = files.read_json(place / CONFIG)
    if isinstance(description, dict) and "model_type" not in description:
        architecture = str((cast("Mapping[str, Any]", description).get("architectures") or [""])[0])
        for beginning, kind in _TYPES:
            if architecture.startswith(beginning):
                return {**cast("Mapping[str, Any]", description), "model_type": kind}
    return cast("Mapping[str, Any]", description)


def _is_alone(description: Mapping[str, Any]) -> bool:
    """Whether a folder says that it holds an encoder without its heads."""
    architectures = description.get("architectures") if isinstance(description, dict) else None
    return bool(architectures) and str(cast("list[Any]", architectures)[0]).endswith("Model")
