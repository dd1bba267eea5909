"""A model with its tokenizer: loading, saving and log-probabilities.

`transformers` opens the saved directory too. `card.json` stores the facts for which `config.json` has no key.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from unmask.core import files
from unmask.core.errors import DamagedError, ModelError, RunError, UnmaskError
from unmask.core.files import RunLayout
from unmask.core.format import count
from unmask.core.types import SPECIAL, Sample, logits_at, pack
from unmask.models import EncoderConfig, EncoderModule, HeadModule, build_model, build_pair, electra, least_weights
from unmask.models.bert import BertConfig
from unmask.models.hf_format import (
    States,
    encoder_only,
    encoder_prefix,
    from_hf_config,
    from_hf_tensors,
    hf_head_names,
    to_hf_config,
    to_hf_tensors,
    vocab_size_of,
)
from unmask.models.modernbert import ModernBertConfig
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.words import WordsRule

_BATCH_TOKENS = 8192
_SPARE_NUMBERS = 1 << 26  # 256 MiB in float32
_WITHOUT_MASKS = ("causal", "rtd")  # objectives
_MAX_RETRIES = 100  # a read is repeated if a training run replaced the directory meanwhile
# Replacing the best model takes two renames. Between them, its path doesn't exist.
_RENAME_RETRIES, _RENAME_SECONDS = 5, 0.005
_MODEL_HINT = "give a run of `unmask pretrain`, one of its step folders, or a model saved by transformers"


class ModelCard(TypedDict, total=False):
    """Contents of card.json: how a model was trained. Other models have no card, or one with only `imported`."""

    unmask: str  # version of unmask
    recipe: str
    seed: int
    context: int  # maximum sequence length in training, in tokens
    words: WordsRule
    document: str  # rule that splits the training text into documents
    step: int
    tokens: int
    words_seen: int  # words between spaces, counted again in each epoch; in the cards of train.keep_at only
    text_fingerprint: str
    validation: dict[str, Any] | None
    objective: str  # kind of the objective that was trained last, e.g. "mlm"
    imported: dict[str, Any]


@dataclass(frozen=True)
class Model:
    """An encoder with its vocabulary head and tokenizer, in float32.

    A BERT model may have a sentence pair head, which returns two logits for each sequence:
    `model.pair(model.encoder(batch), batch)`. A model that was trained to detect replaced tokens has an untrained
    vocabulary head. If it is a BERT, it may have a discriminator head, which returns one logit for each token:
    `model.discriminator(model.encoder(batch))`.
    """

    encoder: EncoderModule
    head: HeadModule
    tokenizer: Tokenizer
    settings: EncoderConfig
    card: ModelCard = field(default_factory=ModelCard)
    path: str = ""
    pair: nn.Module | None = None
    notes: tuple[str, ...] = ()  # what was converted, left out or initialized when the model was read
    discriminator: nn.Module | None = None

    def __repr__(self) -> str:
        """Return name, sizes, tokenizer and validation loss in three lines."""
        settings, tokenizer = self.settings, self.tokenizer
        modules = [module for module in (self.encoder, self.discriminator or self.head, self.pair) if module]
        parameters = {id(tensor): tensor.numel() for module in modules for tensor in module.parameters()}
        lines = [
            f"Model({self.path!r}: {settings.kind}, {settings.num_hidden_layers} layers, "
            f"hidden size {settings.hidden_size}, {count(sum(parameters.values()))} parameters",
            f"  tokenizer: {tokenizer.model_type}, {tokenizer.size:,} tokens; context: {self.context:,} tokens",
        ]
        loss = (self.card.get("validation") or {}).get("loss")
        if isinstance(loss, float):
            lines.append(f"  validation loss: {loss:.3f} at step {self.card.get('step', 0):,}")
        return "\n".join(lines) + ")"

    @property
    def context(self) -> int:
        """Maximum sequence length in training, special tokens included; without a card, the encoder's maximum."""
        return self.card.get("context") or self.settings.max_position_embeddings

    @property
    def words(self) -> WordsRule:
        """Rule that split the training text into words."""
        return self.card.get("words", "spaces")

    @property
    def is_causal(self) -> bool:
        """Whether each token attends only to itself and to the tokens before it: the last objective was "causal"."""
        return self.card.get("objective") == "causal"

    def log_probabilities(self, ids: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return log-probabilities over the vocabulary at the given positions: n x V in float32 for each sequence.

        Args:
            ids: Token ids of each sequence. No special tokens are added, and nothing is masked.
            positions: Positions in each sequence, counted from 0. A list may be empty or repeat a position.

        Raises:
            ModelError: an id is not in the vocabulary, a position is outside its sequence, or a sequence is empty or
                too long.
        """
        results: list[Tensor] = [torch.empty(0)] * len(ids)
        for numbers, rows_MV in self.log_probability_batches(ids, positions):
            for number, rows_NV in zip(numbers, rows_MV.split([len(positions[i]) for i in numbers]), strict=True):
                results[number] = rows_NV
        return results

    def log_probability_batches(
        self, ids: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield the log-probabilities of batches of sequences: numbers of the sequences, and the rows of all positions.

        The arguments and errors are those of `log_probabilities`. Batches are sorted by sequence length.
        """
        if len(ids) != len(positions):
            raise ModelError(
                f"invalid positions: got {len(positions)} lists for {len(ids)} sequences",
                hint="give one list of positions per sequence",
            )
        for number, (sequence, at) in enumerate(zip(ids, positions, strict=True)):
            self._check(number, sequence, at)
        group, tokens = list[int](), 0
        for number in sorted(range(len(ids)), key=lambda number: len(ids[number])):
            if group and tokens + len(ids[number]) > _BATCH_TOKENS:
                yield group, self._forward([ids[i] for i in group], [positions[i] for i in group])
                group, tokens = [], 0
            group.append(number)
            tokens += len(ids[number])
        if group:
            yield group, self._forward([ids[i] for i in group], [positions[i] for i in group])

    def _check(self, number: int, ids: Sequence[int], positions: Sequence[int]) -> None:
        location, vocab_size = f"sequence {number}", self.encoder.vocab_size
        if not len(ids):
            raise ModelError("the sequence is empty", location=location, hint="give at least one id")
        if len(ids) > self.settings.max_position_embeddings:
            raise ModelError(
                f"the sequence has {len(ids)} tokens, but the encoder supports at most "
                f"{self.settings.max_position_embeddings}",
                location=location,
                hint="split it into shorter sequences",
            )
        if min(ids) < 0 or max(ids) >= vocab_size:
            invalid = next(i for i in ids if not 0 <= i < vocab_size)
            raise ModelError(
                f"invalid id: got {invalid}, expected 0 to {vocab_size - 1}",
                location=location,
                hint="encode the text with this model's tokenizer",
            )
        if len(positions) and not (min(positions) >= 0 and max(positions) < len(ids)):
            invalid = max(positions) if min(positions) >= 0 else min(positions)
            raise ModelError(
                f"invalid position: got {invalid}, expected 0 to {len(ids) - 1}",
                location=location,
                hint="count positions from 0",
            )

    @torch.inference_mode()
    def _forward(self, ids: list[Sequence[int]], positions: list[Sequence[int]]) -> Tensor:
        for module in (self.encoder, self.head):
            if module.training:
                module.eval()
        samples = [
            Sample(np.asarray(sequence, np.int64), np.full(len(sequence), SPECIAL, np.uint8)) for sequence in ids
        ]
        batch = replace(pack(samples), is_causal=self.is_causal)
        positions_M = torch.tensor(
            [batch.offsets[b] + p for b, at in enumerate(positions) for p in at], dtype=torch.int64
        )
        device = next(self.encoder.parameters()).device
        logits_MV = logits_at(self.encoder, self.head, batch.to(device), positions_M.to(device))
        return logits_MV.log_softmax(-1).cpu()


def predicts_masked_tokens(model: Model) -> bool:
    """Return whether the last objective of a model's training was one that predicts masked tokens."""
    return model.card.get("objective") not in _WITHOUT_MASKS


def require_masked_lm(model: Model, what: str) -> None:
    """Check that a model predicts masked tokens. `what` names what needs it, for the error: "fill masks".

    Raises:
        ModelError: the last objective of its training was "causal" or "rtd", or as for `require_token_before`.
    """
    require_token_before(model)
    if not predicts_masked_tokens(model):
        objective = model.card.get("objective")
        raise ModelError(
            f"this model can't {what}: the objective {objective!r} trains no predictions for masked tokens",
            location=model.path,
            hint="use a model that was trained last with objective.kind=mlm",
        )


def require_token_before(model: Model) -> None:
    """Check that a token stands before a text's first one, for a model that predicts each token from the one before.

    Raises:
        ModelError: the model is such a model, and its tokenizer puts no token such as [CLS] before a text.
    """
    if model.encoder.label_offset and not model.tokenizer.frame.before:
        raise ModelError(
            "the model predicts each token from the one before it, and the tokenizer puts none before a text",
            location=model.path,
            hint="use a tokenizer with a token such as [CLS], or another objective",
        )


def save_model(directory: Path, model: Model, *, only_encoder: bool = False) -> None:
    """Write a model in the format of `transformers`, and card.json.

    Tensors are sorted by name, so that equal models are saved as equal bytes. With `only_encoder`, only the encoder is
    written, as BertModel or its counterpart. A model with a discriminator is written without its vocabulary head, which
    is not trained: a BERT as ElectraForPreTraining, a ModernBERT as the encoder alone.
    """
    with files.wrap_os_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        pair = None if model.pair is None else model.pair.state_dict()
        tensors = to_hf_tensors(States(model.encoder.state_dict(), model.head.state_dict(), pair), model.settings)
        roles = {name: model.tokenizer.role_id(f"{name}_token") for name in _ROLES}
        ids = {name: role_id for name, role_id in roles.items() if role_id is not None}
        hf_config = to_hf_config(model.settings, model.encoder.vocab_size, ids, pair=pair is not None)
        if only_encoder or (model.discriminator is not None and not isinstance(model.settings, BertConfig)):
            tensors, hf_config = encoder_only(tensors, hf_config, model.settings)
        elif model.discriminator is not None:
            tensors = electra.to_hf_tensors(tensors, model.discriminator.state_dict())
        if isinstance(model.settings, BertConfig) and model.discriminator is not None:
            hf_config = electra.to_hf_config(hf_config, only_encoder=only_encoder)
        cpu_tensors = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
        files.save_tensors(cpu_tensors, directory / RunLayout.WEIGHTS, metadata={"format": "pt"})
        files.write_json(directory / RunLayout.CONFIG, hf_config)
        inputs = _BERT_INPUTS if _has_token_types(model.settings) else _INPUTS
        model.tokenizer.save(directory, inputs=inputs, longest=model.context)
        files.write_json(directory / RunLayout.CARD, model.card)


_ROLES = ("pad", "unk", "cls", "sep", "mask")
_INPUTS = ("input_ids", "attention_mask")  # arguments of forward() in transformers; ModernBERT takes no token types
_BERT_INPUTS = ("input_ids", "token_type_ids", "attention_mask")


def _has_token_types(settings: EncoderConfig) -> bool:
    """Whether the model distinguishes token types. RoBERTa has only one."""
    return isinstance(settings, BertConfig) and settings.type_vocab_size > 1 and settings.model_type == "bert"


def follow(latest: Path) -> Path:
    """Return the step folder that a run's `latest` points to.

    `latest` is a symbolic link, or a text file with the name where links can't be created. If the run was copied
    without keeping links, it is the folder itself.

    Raises:
        DamagedError: the step folder doesn't exist.
    """
    directory = files.read_pointer(latest)
    if directory is None:
        return latest
    if not directory.is_dir():
        raise DamagedError(
            f"`latest` points to {directory.name}, which doesn't exist",
            location=str(latest),
            hint=f"restore that directory, or point to another step: {how_to_point(latest.parent, 'step-…')}",
        )
    return directory


def how_to_point(run: Path, step: str) -> str:
    """Return the shell command that points a run's `latest` to a step, for error messages."""
    return f"echo {step} > {run / RunLayout.LATEST}" if os.name == "nt" else f"ln -sfn {step} {run / RunLayout.LATEST}"


def best_of(run: Path) -> Path | None:
    """Return the directory of a run's best model, or None. While it is being replaced, return the previous one."""
    best = run / RunLayout.BEST
    return next((directory for directory in (best, files.set_aside(best)) if directory.is_dir()), None)


def find_checkpoint(path: str | Path) -> Path:
    """Return the model directory for a path: a run's best model, else its last step; for other paths, the path.

    Raises:
        ModelError: there is no model, or it is a checkpoint with pickles.
    """
    directory = Path(path)
    if not os.path.exists(directory):  # Path.exists raises if a name is too long
        raise ModelError("the path doesn't exist", location=str(directory), hint=_MODEL_HINT)
    best = best_of(directory)
    if best is not None and not (directory / RunLayout.CONFIG).is_file():
        directory = best
    elif os.path.lexists(directory / RunLayout.LATEST):
        directory = follow(directory / RunLayout.LATEST)
    elif directory.name == RunLayout.LATEST and directory.is_file():
        directory = follow(directory)
    files.refuse_pickled(directory)
    if not (directory / RunLayout.CONFIG).is_file():
        is_run = (directory / RunLayout.RECIPE).is_file()
        raise ModelError(
            "the run has not saved a step yet" if is_run else "the directory has no model: config.json is missing",
            location=str(directory),
            hint=f"continue it: unmask pretrain --resume {directory}" if is_run else _MODEL_HINT,
        )
    return directory


def load(path: str | Path, *, read_tokenizer: TokenizerReader | None = None) -> Model:
    """Load a model from a run, a step folder, or a directory saved by `transformers`.

    Args:
        path: The run or directory.
        read_tokenizer: Function that reads the tokenizer of a directory without card.json, with notes.

    Raises:
        ModelError: there is no model, its architecture is not supported, or the tokenizer doesn't match it.
        DamagedError: a file was truncated or changed; it is named.
    """
    for _ in range(_MAX_RETRIES):
        directory = _find_with_retries(path)
        before = _identity(directory)
        try:
            model = _open(directory, read_tokenizer)
        except (UnmaskError, OSError):
            if _identity(directory) == before and _find_with_retries(path) == directory:
                raise
        else:
            if _identity(directory) == before:  # otherwise optional files may have been missing
                return model
    return _open(_find_with_retries(path), read_tokenizer)


def _open(directory: Path, read_tokenizer: TokenizerReader | None) -> Model:
    is_foreign = not (directory / RunLayout.CARD).is_file()
    return open_checkpoint(directory, read_tokenizer=(is_foreign and read_tokenizer) or _read_tokenizer)


def _find_with_retries(path: str | Path) -> Path:
    """Return find_checkpoint(path), retried in case a run's best model is being replaced."""
    for _ in range(_RENAME_RETRIES):
        try:
            return find_checkpoint(path)
        except ModelError:
            time.sleep(_RENAME_SECONDS)
    return find_checkpoint(path)


def _identity(directory: Path) -> tuple[int, int, int] | None:
    """Return device, inode and time of a directory, which change if it is replaced or its files are removed."""
    try:
        stat = directory.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns  # inode numbers are reused


class Weights(NamedTuple):
    """Tensors under their names in `transformers`, the matching config, and notes on their conversion."""

    tensors: Mapping[str, Tensor]
    settings: EncoderConfig
    notes: Sequence[str] = ()


TokenizerReader = Callable[[Path], tuple[Tokenizer, Sequence[str]]]
WeightsReader = Callable[[Path, EncoderConfig, int], Weights]


def _read_tokenizer(directory: Path) -> tuple[Tokenizer, Sequence[str]]:
    return Tokenizer.load(directory), ()


def _read_weights(directory: Path, settings: EncoderConfig, vocab_size: int) -> Weights:
    """Read model.safetensors in float32."""
    path = directory / RunLayout.WEIGHTS
    if not path.is_file():
        raise ModelError(
            "model.safetensors is missing",
            location=str(directory),
            hint="save the model with safe_serialization=True: pickle files (.bin) are never read",
        )
    files.check_tensor_header(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise DamagedError(
            f"the file can't be read as safetensors: {error}",
            location=str(path),
            hint="restore it from a copy or another step",
        ) from error
    return Weights({name: as_float32(tensor, name, path) for name, tensor in tensors.items()}, settings)


def as_float32(tensor: Tensor, name: str, path: Path) -> Tensor:
    """Return a tensor in float32; position ids and other integers of 64 bits stay integers.

    Raises:
        ModelError: the tensor is quantized, or has NaN or infinite numbers, in its own format or in float32.
    """
    if not tensor.is_floating_point():
        if tensor.dtype == torch.int64:
            return tensor
        raise ModelError(
            f"`{name}` has the format {str(tensor.dtype).removeprefix('torch.')}: quantized weights are not supported",
            location=str(path),
            hint="use the checkpoint in float32, bfloat16 or float16",
        )
    converted = tensor.float()
    if (num_invalid := converted.numel() - int(converted.isfinite().sum())) > 0:
        overflows = "" if not tensor.isfinite().all() else " in float32"
        raise ModelError(
            f"`{name}` has {num_invalid:,} numbers of {tensor.numel():,} that are NaN or infinite{overflows}",
            location=str(path),
            hint="use another copy or an earlier step of this model",
        )
    return converted


def open_checkpoint(
    directory: Path,
    hf_config: Mapping[str, Any] | None = None,
    *,
    read_tokenizer: TokenizerReader = _read_tokenizer,
    read_weights: WeightsReader = _read_weights,
) -> Model:
    """Load a model from its directory. Every tensor must be present, known and of the expected shape.

    Args:
        directory: Directory with config.json, weights and tokenizer.
        hf_config: Contents of config.json; read from the directory if None.
        read_tokenizer: Function that reads the tokenizer, with notes on its conversion.
        read_weights: Function that reads the weights, given config and vocabulary size. It may add missing tensors and
            change the config.

    Raises:
        ModelError: the architecture is not supported, or tokenizer or weights don't match it.
        DamagedError: a file was truncated or changed; it is named.
    """
    if (directory / RunLayout.DIGESTS).is_file():
        files.verify_manifest(directory)
    if hf_config is None:
        hf_config = cast("Mapping[str, Any]", files.read_json(directory / RunLayout.CONFIG, files.MAX_CONFIG_BYTES))
    try:
        settings, vocab_size = from_hf_config(hf_config), vocab_size_of(hf_config)
    except ModelError as error:
        raise error.at(location=str(directory / error.location)) from error
    tokenizer, notes = read_tokenizer(directory)
    if tokenizer.size > vocab_size:
        raise ModelError(
            f"the tokenizer has {tokenizer.size} tokens, but the embedding has only {vocab_size}",
            location=str(directory),
            hint="use the tokenizer that this model was trained with",
        )
    weights = read_weights(directory, settings, vocab_size)
    card: Any = files.read_json(directory / RunLayout.CARD) if (directory / RunLayout.CARD).is_file() else {}
    if not isinstance(card, dict):
        raise DamagedError(
            "the file is not a JSON object",
            location=str(directory / RunLayout.CARD),
            hint="restore it from a copy, or remove it",
        )
    is_discriminator = cast("ModelCard", card).get("objective") == "rtd"
    encoder, head, pair, discriminator = _build(
        weights, vocab_size, directory / RunLayout.WEIGHTS, is_discriminator=is_discriminator
    )
    encoder.label_offset = int(card.get("objective") in ("mntp", "causal"))
    return Model(
        encoder,
        head,
        tokenizer,
        weights.settings,
        cast("ModelCard", card),
        str(directory),
        pair,
        (*notes, *weights.notes, *untrained_heads(cast("ModelCard", card))),
        discriminator,
    )


def check_size(settings: EncoderConfig, vocab_size: int, tensors: Mapping[str, Tensor], location: str) -> None:
    """Check that the file has about as many numbers as the encoder's matrices, before memory for them is allocated.

    Raises:
        ModelError: config.json describes a far larger encoder. Other differences are reported tensor by tensor.
    """
    expected = least_weights(settings, vocab_size)
    found = sum(tensor.numel() for tensor in tensors.values())
    if expected > found + _SPARE_NUMBERS:
        raise ModelError(
            f"the weights don't match config.json: its encoder has {expected:,} numbers or more, the file {found:,}",
            location=location,
            hint=_MODEL_HINT,
        )


def untrained_heads(card: ModelCard) -> list[str]:
    """Return the notes of an import that say which heads have initial weights. Training removes them from the card."""
    imported: Any = card.get("imported")
    notes: Any = cast("Mapping[str, Any]", imported).get("notes") if isinstance(imported, dict) else None
    known = cast("Sequence[Any]", notes) if isinstance(notes, list) else ()
    return [note for note in known if isinstance(note, str) and note.startswith("initialized ")]


def _build(
    weights: Weights, vocab_size: int, path: Path, *, is_discriminator: bool
) -> tuple[EncoderModule, HeadModule, nn.Module | None, nn.Module | None]:
    """Return encoder, vocabulary head, sentence pair head and discriminator head with these weights.

    Args:
        weights: The weights.
        vocab_size: Size of the token embedding.
        path: Path that is named in errors.
        is_discriminator: Whether the vocabulary head may be missing, as after replaced token detection. It then has
            initial weights from torch's generator.
    """
    location = str(path if path.is_file() else path.parent)
    settings, tensors, discriminator_state, has_head = weights.settings, weights.tensors, None, True
    if is_discriminator and isinstance(settings, BertConfig | ModernBertConfig):
        tensors, discriminator_state = electra.split_hf_tensors(tensors, encoder_prefix(settings))
        head_names = hf_head_names(settings)
        if not head_names & tensors.keys():
            tensors, has_head = tensors | dict.fromkeys(head_names, torch.empty(0)), False
    try:
        states = from_hf_tensors(tensors, settings)
    except ModelError as error:
        raise error.at(location=location) from error
    check_size(settings, vocab_size, tensors, location)
    encoder, head = build_model(settings, vocab_size)
    pair = None if states.pair is None else build_pair(settings)
    discriminator = None
    if discriminator_state is not None:
        discriminator = electra.DiscriminatorHead(electra.require_electra_encoder(settings))
    try:
        all_states = states.encoder, states.head if has_head else None, states.pair, discriminator_state
        for module, state in zip((encoder, head, pair, discriminator), all_states, strict=True):
            if module is not None and state is not None:
                module.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(
            f"the weights don't match config.json: {error}", location=location, hint=_MODEL_HINT
        ) from error
    for module in (encoder, head, pair, discriminator):
        if module is not None:
            module.eval()
    return encoder, head, pair, discriminator


def check_output_directory(out: Path, source: Path, *, force: bool) -> Path:
    """Return `out` if a model can be written there: it doesn't exist, or is a model and `force` is set.

    Raises:
        RunError: `out` exists, or is or contains the source.
        StoreError: `out` can't be written.
    """
    target, source_path = out.absolute(), source.absolute().resolve()
    if target.resolve() in (source_path, *source_path.parents):
        raise RunError("the output is or contains the input", location=str(out), hint="choose another directory")
    if os.path.lexists(target):
        if not force:
            raise RunError(
                "the output exists already; nothing was written",
                location=str(out),
                hint="choose another directory, or replace this one with --force (force=True)",
            )
        if not target.is_dir() or (any(target.iterdir()) and not (target / RunLayout.CONFIG).is_file()):
            raise RunError(
                "the output exists and is not a model directory, so it is not replaced",
                location=str(out),
                hint="choose another directory, or remove this one",
            )
    else:
        files.check_writable(target)
    return out
