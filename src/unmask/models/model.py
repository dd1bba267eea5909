"""Room card: a model on disk and in hand.

Comes in: a folder (a run, a step of it, or one made by `transformers`), or the modules of a run. Goes out: a Model
(encoder, head, tokenizer, card), and its folder: the very folder that `transformers` opens, with our own notes in
card.json. Called by: unmask.load, checkpoint, use/, eval/, hf.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unmask.core import files
from unmask.core.errors import DamagedError, ModelError, RunError, UnmaskError
from unmask.core.types import SPECIAL, Sample, logits_at, pack
from unmask.models import EncoderConfig, build_model, build_pair
from unmask.models.bert import BertConfig
from unmask.models.hf_format import (
    States,
    config,
    encoder_alone,
    from_ecosystem,
    settings_of,
    to_ecosystem,
    vocabulary_of,
)
from unmask.tokenization.tokenizer import Tokenizer

LATEST, BEST = "latest", "best"
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "card.json"
_BATCH_TOKENS = 8192
_REPLACED_AT_MOST = 100  # times while it is read: each time it really was, so this ends only a fight that nobody wins
_MOMENTS, _MOMENT_SECONDS = 5, 0.005  # between two renames there is no best model under its name
_NEXT_A_MODEL = "give a run of `unmask pretrain`, one of its step folders, or a folder that transformers saved"


@dataclass
class Model:
    """An encoder with its vocabulary head and its tokenizer, ready to answer; float32, no dropout.

    A classic one may have a pair head, which reads two logits from each text: `pair(encoder(batch), batch)`.
    """

    encoder: nn.Module
    head: nn.Module
    tokenizer: Tokenizer
    settings: EncoderConfig
    card: dict[str, Any] = field(default_factory=dict)
    path: str = ""
    pair: nn.Module | None = None
    notes: tuple[str, ...] = ()  # of a folder of others: what was converted, left out or begun anew

    @property
    def context(self) -> int:
        """Slots of the longest text it was trained on, special tokens included (without a card: what it can hold)."""
        return int(self.card.get("context") or self.settings.max_position_embeddings)

    @property
    def words(self) -> Any:
        """How words are told apart in its text: "spaces" or "characters"."""
        return self.card.get("words", "spaces")

    def log_probabilities(self, ids: Sequence[Sequence[int]], at: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probabilities over the vocabulary at the positions asked, n × V float32 for each text.

        Args:
            ids: the ids of each text as they are; nothing is added, nothing hidden.
            at: the positions asked about in each, 0-based; none or repeated ones are fine.

        Raises:
            ModelError: an id beyond the vocabulary, a position outside its text, a text that is empty or too long.
        """
        if len(ids) != len(at):
            raise ModelError(
                f"{len(ids)} texts but positions for {len(at)}", hint="give one list of positions per text"
            )
        vocabulary = int(cast(Any, self.encoder).vocabulary)
        for number, (one, places) in enumerate(zip(ids, at, strict=True)):
            self._check(number, one, places, vocabulary)
        answers: list[Tensor] = [torch.empty(0)] * len(ids)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        group: list[int] = []
        for place, i in enumerate(order):
            group.append(i)
            full = (
                place + 1 == len(order) or sum(len(ids[j]) for j in group) + len(ids[order[place + 1]]) > _BATCH_TOKENS
            )
            if full:
                for j, answer in zip(group, self._answer([ids[j] for j in group], [at[j] for j in group]), strict=True):
                    answers[j] = answer
                group = []
        return answers

    def _check(self, number: int, ids: Sequence[int], at: Sequence[int], vocabulary: int) -> None:
        where = f"text {number}"
        if not len(ids):
            raise ModelError("a text without ids", location=where, hint="give at least one id")
        if len(ids) > self.settings.max_position_embeddings:
            raise ModelError(
                f"{len(ids)} ids where the encoder holds {self.settings.max_position_embeddings}",
                location=where,
                hint="cut the text in windows",
            )
        if min(ids) < 0 or max(ids) >= vocabulary:
            culprit = next(i for i in ids if not 0 <= i < vocabulary)
            raise ModelError(
                f"id {culprit} is beyond the vocabulary of {vocabulary}",
                location=where,
                hint="make the ids with this model's own tokenizer",
            )
        if len(at) and not (min(at) >= 0 and max(at) < len(ids)):
            culprit = max(at) if min(at) >= 0 else min(at)
            raise ModelError(
                f"position {culprit} of a text of {len(ids)} ids", location=where, hint="positions start at 0"
            )

    @torch.inference_mode()
    def _answer(self, ids: list[Sequence[int]], at: list[Sequence[int]]) -> list[Tensor]:
        self.encoder.eval()
        self.head.eval()
        texts = [Sample(np.asarray(one, np.int64), np.full(len(one), SPECIAL, np.uint8)) for one in ids]
        batch = pack(texts)
        positions_M = torch.tensor(
            [batch.offsets[b] + p for b, places in enumerate(at) for p in places], dtype=torch.int64
        )
        device = next(self.encoder.parameters()).device
        logits_MV = logits_at(self.encoder, self.head, batch.to(device), positions_M.to(device))
        return list(logits_MV.log_softmax(-1).cpu().split([len(places) for places in at]))


def save_model(folder: Path, model: Model, *, only_encoder: bool = False) -> None:
    """Fill a folder with the files that `transformers` opens, and card.json.

    Tensors carry the ecosystem's names and are written in one sorted order, without metadata that would differ from
    process to process. With `only_encoder` they are those of BertModel or its like, which has no head for masks.
    """
    with files.wrap_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        pair = None if model.pair is None else model.pair.state_dict()
        tensors = to_ecosystem(States(model.encoder.state_dict(), model.head.state_dict(), pair), model.settings)
        ids = {name: found for name in _ROLES if (found := model.tokenizer.role_id(f"{name}_token")) is not None}
        vocabulary = int(cast(Any, model.encoder).vocabulary)
        description = config(model.settings, vocabulary, ids, pair=pair is not None)
        if only_encoder:
            tensors, description = encoder_alone(tensors, description, model.settings)
        ready = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
        save_file(ready, folder / WEIGHTS, metadata={"format": "pt"})
        files.write_json(folder / CONFIG, description)
        inputs = _CLASSIC_INPUTS if _takes_segments(model.settings) else _INPUTS
        model.tokenizer.save(folder, inputs=inputs, longest=model.context)
        files.write_json(folder / CARD, model.card)


_ROLES = ("pad", "unk", "cls", "sep", "mask")
_INPUTS = ("input_ids", "attention_mask")  # what a forward takes there; the modern one refuses segments
_CLASSIC_INPUTS = ("input_ids", "token_type_ids", "attention_mask")


def _takes_segments(settings: EncoderConfig) -> bool:
    """Whether a pair's second text is told apart: RoBERTa has one segment, and no row for a second."""
    return isinstance(settings, BertConfig) and settings.type_vocab_size > 1 and settings.model_type == "bert"


def follow(latest: Path) -> Path:
    """The step folder that a run's `latest` is.

    That is a symbolic link, a small file with its name where links can't be made, or the folder itself where copying
    made it one.

    Raises:
        DamagedError: the step folder that it names is gone.
    """
    folder = files.read_pointer(latest)
    if folder is None:
        return latest
    if not folder.is_dir():
        raise DamagedError(
            f"the step that `latest` names is gone: {folder.name}",
            location=str(latest),
            hint=f"restore that folder, or name another of this run: {how_to_point(latest.parent, 'step-…')}",
        )
    return folder


def last_step(run: Path) -> int | None:
    """The number of a run's last step, if its `latest` says."""
    folder = files.read_pointer(run / LATEST)
    number = folder.name.removeprefix("step-") if folder else ""
    return int(number) if number.isdecimal() else None


def how_to_point(run: Path, step: str) -> str:
    """The command that makes a run's `latest` name a step, for a message."""
    return f"echo {step} > {run / LATEST}" if os.name == "nt" else f"ln -sfn {step} {run / LATEST}"


def best_of(run: Path) -> Path | None:
    """The folder of a run's best model by validation, if there is one; while it is being replaced, the old one."""
    return next((place for place in (run / BEST, files.set_aside(run / BEST)) if place.is_dir()), None)


def find_checkpoint(path: str | Path) -> Path:
    """The model folder that a path means: a run's best model, else its latest step; or the folder itself.

    Raises:
        ModelError: there is no model there.
    """
    folder = Path(path)
    if not os.path.exists(folder):  # Path.exists raises where a name is too long to be one
        raise ModelError("there is nothing at this path", location=str(folder), hint=_NEXT_A_MODEL)
    best = best_of(folder)
    if best is not None and not (folder / CONFIG).is_file():
        folder = best
    elif os.path.lexists(folder / LATEST):
        folder = follow(folder / LATEST)
    elif folder.name == LATEST and folder.is_file():
        folder = follow(folder)
    if not (folder / CONFIG).is_file():
        is_run = (folder / "recipe.toml").is_file()
        raise ModelError(
            "this run has not saved a step yet" if is_run else "this folder holds no model: there is no config.json",
            location=str(folder),
            hint=f"continue it: unmask pretrain --resume {folder}" if is_run else _NEXT_A_MODEL,
        )
    return folder


def load(path: str | Path) -> Model:
    """Open a run, a step folder or a plain folder made by `transformers`.

    Raises:
        ModelError: no model there, of an architecture that isn't held here, or a tokenizer that doesn't fit it.
        DamagedError: a file was cut short or changed; it is named.
    """
    for _ in range(_REPLACED_AT_MOST):
        folder = _settled(path)
        before = _identity(folder)
        try:
            model = _opened(folder)
        except (UnmaskError, OSError):
            if _identity(folder) == before and _settled(path) == folder:
                raise
        else:
            if _identity(folder) == before:  # else files may have been gone that a folder can do without
                return model
    return _opened(_settled(path))


def _settled(path: str | Path) -> Path:
    """`find`, once more where it met the moment in which a run's best model is replaced."""
    for _ in range(_MOMENTS):
        try:
            return find_checkpoint(path)
        except ModelError:
            time.sleep(_MOMENT_SECONDS)
    return find_checkpoint(path)


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """What tells a folder from one that has taken its name, and from itself while its files are removed."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns  # a number is soon given to a new folder


def _opened(folder: Path) -> Model:
    if (folder / files.DIGESTS).is_file():
        files.verify_manifest(folder)
    description = files.read_json(folder / CONFIG)
    try:
        settings, vocabulary = settings_of(description), vocabulary_of(description)
    except ModelError as error:
        raise ModelError(error.message, location=str(folder / error.location), hint=error.hint) from error
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ModelError(
            "there is no model.safetensors in this folder",
            location=str(folder),
            hint="save it again with safe_serialization=True: pickles (.bin) are never read",
        )
    tokenizer = Tokenizer.load(folder)
    if tokenizer.size > vocabulary:
        raise ModelError(
            f"the tokenizer has {tokenizer.size} pieces and the weights {vocabulary} rows",
            location=str(folder),
            hint="use the tokenizer that this model was trained with",
        )
    encoder, head, pair = _filled(settings, vocabulary, weights)
    card: Any = files.read_json(folder / CARD) if (folder / CARD).is_file() else {}
    if not isinstance(card, dict):
        raise DamagedError(
            "no card that we wrote", location=str(folder / CARD), hint="restore it from a copy, or remove it"
        )
    return Model(encoder, head, tokenizer, settings, cast("dict[str, Any]", card), str(folder), pair)


def _filled(settings: EncoderConfig, vocabulary: int, weights: Path) -> tuple[nn.Module, nn.Module, nn.Module | None]:
    """Encoder, head and pair head, if any, filled strictly: a missing, foreign or misshapen tensor is an error."""
    try:
        tensors: Mapping[str, Tensor] = load_file(weights)
    except SafetensorError as error:
        raise DamagedError(
            f"not readable as safetensors: {error}",
            location=str(weights),
            hint="restore it from a copy or another step",
        ) from error
    try:
        states = from_ecosystem({name: t.float() for name, t in tensors.items()}, settings)
    except ModelError as error:
        raise ModelError(error.message, location=str(weights), hint=error.hint) from error
    encoder, head = build_model(settings, vocabulary)
    pair = None if states.pair is None else build_pair(settings)
    try:
        for module, state in zip((encoder, head, pair), states, strict=True):
            if module is not None and state is not None:
                module.load_state_dict(state)
                module.eval()
    except RuntimeError as error:
        raise ModelError(
            f"the weights don't fit the configuration: {error}", location=str(weights), hint=_NEXT_A_MODEL
        ) from error
    return encoder, head, pair


def free_place(out: Path, source: Path, *, force: bool) -> Path:
    """The place to write, which is free, or holds a model that `force` lets go.

    Raises:
        RunError: something stands there, or the source would be overwritten.
        StoreError: nothing can be written there.
    """
    target, read = out.absolute(), source.absolute()
    if target.resolve() == read.resolve() or target.resolve() in read.resolve().parents:
        raise RunError("what is read stands there itself", location=str(out), hint="name another folder to write")
    if os.path.lexists(target):
        if not force:
            raise RunError(
                "something stands here already, and nothing was written",
                location=str(out),
                hint="name another folder, or replace this one with --force (force=True)",
            )
        if not target.is_dir() or (any(target.iterdir()) and not (target / CONFIG).is_file()):
            raise RunError(
                "what stands here is no model folder, and is not replaced",
                location=str(out),
                hint="name another folder, or remove this one yourself",
            )
    else:
        files.check_writable(target)
    return out
