"""Room card: models of others, opened.

Comes in: a folder that `transformers` has written (BERT, RoBERTa, XLM-R or ModernBERT, with or without heads), or one
of ours. Goes out: a Model, with what was converted or begun anew in `said`; or the same as a folder of ours. Called by:
unmask.import_model, `unmask import`, pretrain (--from).

All that can be told without weights is told first: architecture, shape, tokenizer. Nothing runs before all fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import torch

from unmask import bundle, store
from unmask.bundle import CARD, CONFIG, Model
from unmask.errors import DamagedError, ModelError
from unmask.hf.place import free_place
from unmask.hf.vocabulary import open_tokenizer
from unmask.hf.weights import completed, named_anew, read, tie_as_found
from unmask.nn import ClassicSettings, build, build_pair
from unmask.nn.names import SEED_TYPE, States, from_ecosystem, has_pair, settings_of, to_ecosystem, vocabulary_of
from unmask.nn.tutorial import TutorialSettings

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
    place = bundle.find(folder)
    description = _description(place)
    if (place / CARD).is_file() and not _is_alone(description):
        return bundle.load(folder)
    if (place / store.DIGESTS).is_file():
        store.check_seal(place)
    try:
        settings, rows = settings_of(description), vocabulary_of(description)
    except ModelError as error:
        raise ModelError(error.what, where=str(place / error.where), next=error.next) from error
    if isinstance(settings, TutorialSettings):
        raise ModelError(f"a {SEED_TYPE} folder without its card", where=str(place), next="restore it from a copy")
    tokenizer, said = open_tokenizer(place)
    if tokenizer.size > rows:
        raise ModelError(
            f"the tokenizer has {tokenizer.size} pieces and the weights {rows} rows",
            where=str(place),
            next="use the tokenizer that this model was trained with",
        )
    try:
        tensors, told = read(place)
        said += told
        tensors, told = named_anew(tensors, settings)
        said += told
        settings, told = tie_as_found(tensors, settings)
        said += told
        encoder, head = build(settings, rows)
        pair = build_pair(settings) if has_pair(tensors, settings) else None
        states = States(encoder.state_dict(), head.state_dict(), None if pair is None else pair.state_dict())
        tensors, told = completed(tensors, settings, to_ecosystem(states, settings))
        for module, state in zip((encoder, head, pair), from_ecosystem(tensors, settings), strict=True):
            if module is not None and state is not None:
                module.load_state_dict(state)
                module.eval()
    except ModelError as error:
        raise ModelError(
            error.what, where=error.where if "/" in error.where else str(place), next=error.next
        ) from error
    said += told
    if rows > tokenizer.size:
        said.append(f"{rows - tokenizer.size} rows beyond the tokenizer's {tokenizer.size:,} pieces are kept")
    if isinstance(settings, ClassicSettings) and settings.family != "bert":
        padding, counted = tokenizer.role_id("pad_token"), settings.first_position - 1
        if padding != counted:
            said.append(
                f"the tokenizer pads with {padding}, and positions are counted from {counted}, as config.json says"
            )
    card: Any = store.read_json(place / CARD) if (place / CARD).is_file() else {}
    if not isinstance(card, dict):
        raise DamagedError(
            "no card that we wrote", where=str(place / CARD), next="restore it from a copy, or remove it"
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
    card = model.card or {"imported": {"from": source.name, "said": list(model.said)}}
    model = replace(model, card=card, path=str(place))
    with store.new_folder(place) as aside:
        bundle.save(aside, model)
        store.seal(aside)
    return model


def _description(place: Path) -> Mapping[str, Any]:
    """config.json; the oldest say their architecture and not their type."""
    description: Any = store.read_json(place / CONFIG)
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
