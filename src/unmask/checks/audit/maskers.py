"""Samples of an audit, and maskers of every kind behind one interface: objectives, collators, callables.

All texts are concatenated, and samples are cut at random places, so that a small text gives enough of them.
Half of the samples have the full length, half have mixed lengths. A word cut by the edge of a sample is a word there.

An audit uses inputs and outputs only. Attributes of a masker are read for what it claims, never for what it does.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple, Protocol, cast

import numpy as np
import tokenizers
from jaxtyping import Bool, Int
from numpy.typing import NDArray

from unmask.checks.audit.settings import AuditConfig, Claims, Units
from unmask.core import rng
from unmask.core.errors import RecipeError, TextError
from unmask.core.quantities import closest_match
from unmask.core.types import SPECIAL, WORD_START, Objective, Sample, pack
from unmask.objectives.masking import MaskingConfig
from unmask.tokenization.tokenizer import Encoded, Tokenizer
from unmask.tokenization.words import WordsRule

MAX_CHARACTERS: Final = 2_000_000  # of the texts; more text gives no more information
_CHARACTERS_PER_BATCH: Final = 100_000  # of the texts that are encoded together
_MIN_SAMPLES: Final = 4  # samples that the texts must fill


class Row(NamedTuple):
    """One sample, as a masker gets it."""

    number: int
    ids: NDArray[np.int64]
    token_flags: NDArray[np.uint8]
    special_mask: NDArray[np.bool_]  # [CLS] and [SEP] that were added
    offsets: NDArray[np.int64]  # (n, 2) characters of the text; 0 and 0 for [CLS] and [SEP]


@dataclass(frozen=True)
class AuditSamples:
    """Samples by number: ((rank * rounds + round) * loaders + loader) * batch + slot."""

    rows: tuple[Row, ...]
    length_N: Int[np.ndarray, "N"]
    full_N: Bool[np.ndarray, "N"]
    ids_NS: Int[np.ndarray, "N S"]  # -1 beyond the end of a sample
    maskable_NS: Bool[np.ndarray, "N S"]
    unknown_NS: Bool[np.ndarray, "N S"]
    word_NS: Int[np.ndarray, "N S"]  # number of the word within the sample; -1 for special tokens


def make_samples(
    texts: Sequence[str], tokenizer: Tokenizer, words: WordsRule, settings: AuditConfig, *, can_pad: bool
) -> AuditSamples:
    """Cut samples from texts; those of one batch have the same length if `can_pad` is false.

    Raises:
        TextError: the texts are too short.
    """
    stream = _Stream(_encoded(texts, tokenizer, words, settings.samples * settings.length))
    num_special_tokens = tokenizer.num_special_tokens()
    inside = settings.length - num_special_tokens
    if len(stream.ids) < _MIN_SAMPLES * inside:
        raise TextError(
            f"{len(stream.ids):,} tokens are too few to audit a masker",
            hint=f"give texts of {_MIN_SAMPLES * inside:,} tokens or more, or use shorter samples: --length",
        )
    count = settings.ranks * settings.batches * settings.batch
    number_N = np.arange(count)
    round_N, slot_N = number_N // (settings.batch * settings.loaders) % settings.rounds, number_N % settings.batch
    full_N = round_N % 2 == 0
    # The same lengths for every loader and rank: otherwise two with the same random stream would diverge.
    drawn_N = 1 + rng.below(inside, settings.seed, "audit length", round_N, slot_N if can_pad else 0)
    size_N = np.where(full_N, inside, drawn_N)
    first_N = rng.below(len(stream.ids) - size_N + 1, settings.seed, "audit place", number_N)
    rows = tuple(
        stream.row(number, first, size, tokenizer)
        for number, first, size in zip(number_N.tolist(), first_N.tolist(), size_N.tolist(), strict=True)
    )
    return _to_arrays(rows, full_N, settings.length, tokenizer.unknown_id)


def _encoded(texts: Sequence[str], tokenizer: Tokenizer, words: WordsRule, min_tokens: int) -> list[Encoded]:
    """Encode texts until there are enough tokens."""
    encoded: list[Encoded] = []
    tokens, first = 0, 0
    while first < len(texts) and tokens < min_tokens:
        last, characters = first, 0
        while last < len(texts) and (last == first or characters < _CHARACTERS_PER_BATCH):
            characters += len(texts[last])
            last += 1
        new = [one for one in tokenizer.encode_batch(list(texts[first:last]), words) if len(one.ids)]
        tokens, first = tokens + sum(len(one.ids) for one in new), last
        encoded += new
    return encoded


class _Stream:
    """The tokens of all texts, concatenated."""

    def __init__(self, encoded: Sequence[Encoded]) -> None:
        self.ids = np.concatenate([np.zeros(0, np.int64), *(one.ids for one in encoded)])
        self.token_flags = np.concatenate([np.zeros(0, np.uint8), *(one.marks for one in encoded)])
        firsts = np.cumsum([0, *(len(one.ids) for one in encoded)])[:-1]
        self.token_flags[firsts] |= np.uint8(WORD_START)  # white space at the start belongs to no earlier word
        self.offsets = np.concatenate([np.zeros((0, 2), np.int64), *(one.offsets for one in encoded)])

    def row(self, number: int, first: int, size: int, tokenizer: Tokenizer) -> Row:
        span = slice(first, first + size)
        ids, flags = tokenizer.add_special_tokens(self.ids[span], self.token_flags[span])
        edge = len(tokenizer.frame.before)
        special_mask = np.ones(len(ids), dtype=bool)
        special_mask[edge : edge + size] = False
        offsets = np.zeros((len(ids), 2), dtype=np.int64)
        offsets[edge : edge + size] = self.offsets[span]
        return Row(number, ids, flags, special_mask, offsets)


def _to_arrays(rows: tuple[Row, ...], full_N: NDArray[np.bool_], length: int, unknown: int | None) -> AuditSamples:
    shape = (len(rows), length)
    ids_NS = np.full(shape, -1, dtype=np.int32)
    flags_NS = np.full(shape, SPECIAL, dtype=np.uint8)
    for row in rows:
        ids_NS[row.number, : len(row.ids)] = row.ids
        flags_NS[row.number, : len(row.ids)] = row.token_flags
    maskable_NS = (flags_NS & SPECIAL) == 0
    begins_NS = maskable_NS & ((flags_NS & WORD_START) != 0)
    begins_NS[:, 0] |= maskable_NS[:, 0]
    begins_NS[:, 1:] |= maskable_NS[:, 1:] & ~maskable_NS[:, :-1]
    word_NS = np.where(maskable_NS, np.cumsum(begins_NS, axis=1) - 1, -1).astype(np.int32)
    length_N: NDArray[np.integer[Any]] = np.array([len(row.ids) for row in rows], dtype=np.int64)
    unknown_NS = np.zeros(shape, dtype=bool) if unknown is None else ids_NS == unknown
    return AuditSamples(rows, length_N, full_N, ids_NS, maskable_NS, unknown_NS, word_NS)


# Maskers --------------------------------------------------------------------------------------------------------------


IGNORED: Final = -100  # the label of tokens that are not masked, as in PyTorch's cross_entropy


class Masked(NamedTuple):
    """A batch as a masker returns it."""

    shown_BS: NDArray[np.int64]
    label_BS: NDArray[np.int64]
    begins_B: NDArray[np.int64]  # position of each sample's first token: 0, or more with padding on the left


class Masker(Protocol):
    """Masks batches of samples; every rank gets a copy."""

    @property
    def name(self) -> str:
        """Name in the report."""
        ...

    @property
    def claims(self) -> Claims:
        """Claimed rate, replacement and units."""
        ...

    @property
    def can_pad(self) -> bool:
        """Whether the samples of a batch may have different lengths."""
        ...

    def mask(self, rows: Sequence[Row], epoch: int) -> Masked:
        """Mask one batch."""
        ...


@dataclass
class ObjectiveMasker:
    """An objective of this package or a plugin; samples have the keys that they would have in training."""

    objective: Objective
    seed: int
    name: str = "unmask"
    claims: Claims = field(default_factory=Claims)
    progress: float = 0.0  # fraction of the run, for masking rates that change
    can_pad: bool = True

    def mask(self, rows: Sequence[Row], epoch: int) -> Masked:
        """Pack the samples, corrupt them, and pad them."""
        batch = pack([Sample(row.ids, row.token_flags, epoch, row.number) for row in rows])
        batch = replace(batch, progress=self.progress)
        masked = self.objective.corrupt(batch, self.seed)
        label_T = np.full(len(batch.ids_T), IGNORED, dtype=np.int64)
        label_T[masked.positions_M.numpy()] = masked.labels_M.numpy()
        shown_T = masked.batch.ids_T.numpy()
        shape = (len(rows), batch.max_seqlen)
        shown_BS, label_BS = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
        for number, row in enumerate(rows):
            span = slice(batch.offsets[number], batch.offsets[number] + len(row.ids))
            shown_BS[number, : len(row.ids)], label_BS[number, : len(row.ids)] = shown_T[span], label_T[span]
        return Masked(shown_BS, label_BS, np.zeros(len(rows), np.int64))


@dataclass
class CallableMasker:
    """A callable that takes ids (batch × length, padded at the end) and returns (inputs, labels)."""

    function: Callable[[Any], Any]
    padding_id: int | None
    name: str = "a callable"
    claims: Claims = field(default_factory=Claims)

    @property
    def can_pad(self) -> bool:
        """Whether the tokenizer has a padding token."""
        return self.padding_id is not None

    def mask(self, rows: Sequence[Row], epoch: int) -> Masked:
        """Mask one batch."""
        import torch

        longest = max(len(row.ids) for row in rows)
        ids_BS = np.full((len(rows), longest), self.padding_id or 0, dtype=np.int64)
        for number, row in enumerate(rows):
            ids_BS[number, : len(row.ids)] = row.ids
        output: Any = self.function(torch.from_numpy(ids_BS))
        return _read(output, rows, longest, self.name, "right")


@dataclass
class CollatorMasker:
    """A data collator: takes features and returns a mapping with input_ids and labels."""

    collator: Callable[[Any], Any]
    name: str = "a data collator"
    claims: Claims = field(default_factory=Claims)

    @property
    def _needs_offsets(self) -> bool:
        return bool(getattr(self.collator, "whole_word_mask", False))

    @property
    def can_pad(self) -> bool:
        """False with offsets, which `transformers` doesn't pad: it raises an error for several lengths."""
        tokenizer: Any = getattr(self.collator, "tokenizer", None)
        return not self._needs_offsets and getattr(tokenizer, "pad_token", None) is not None

    def mask(self, rows: Sequence[Row], epoch: int) -> Masked:
        """Mask one batch; the features are those of a tokenizer with return_special_tokens_mask=True."""
        features: list[dict[str, Any]] = []
        for row in rows:
            feature: dict[str, Any] = {"input_ids": row.ids.tolist()}
            feature["attention_mask"] = [1] * len(row.ids)
            feature["special_tokens_mask"] = row.special_mask.astype(int).tolist()
            if self._needs_offsets:
                feature["offset_mapping"] = [tuple(pair) for pair in row.offsets.tolist()]
            features.append(feature)
        side = str(getattr(getattr(self.collator, "tokenizer", None), "padding_side", "right"))
        return _read(self.collator(features), rows, max(len(row.ids) for row in rows), self.name, side)


def _read(output: Any, rows: Sequence[Row], longest: int, name: str, side: str) -> Masked:
    """Convert the output of a masker to arrays.

    Raises:
        RecipeError: the output is not a masked batch.
    """
    if isinstance(output, Mapping) or hasattr(output, "keys"):
        mapping = cast("Mapping[str, Any]", output)
        output = (mapping.get("input_ids"), mapping.get("labels"))
    problem = ""
    if not (isinstance(output, tuple | list) and len(cast("Sequence[Any]", output)) == 2):
        problem = f"it returned a {type(output).__name__}"
        shown_BS = label_BS = np.zeros((0, 0), np.int64)
    else:
        shown_BS, label_BS = (_array(value) for value in cast("Sequence[Any]", output))
        for name_of_array, array in (("inputs", shown_BS), ("labels", label_BS)):
            if array.ndim != 2 or len(array) != len(rows) or array.shape[1] < longest:
                problem = f"its {name_of_array} have the shape {array.shape}, expected {len(rows)} × {longest}"
            elif not np.issubdtype(array.dtype, np.integer):
                problem = f"its {name_of_array} are {array.dtype}, expected integers"
        if not problem and shown_BS.shape != label_BS.shape:
            problem = f"its inputs are {shown_BS.shape} and its labels {label_BS.shape}"
    if problem:
        raise RecipeError(
            f"this is not a masker: {problem}",
            location=name,
            hint="take ids (batch × length) and return integer inputs and labels of that shape, with the label "
            f"{IGNORED} for tokens that are not masked",
        )
    lengths = np.array([len(row.ids) for row in rows])
    begins_B = shown_BS.shape[1] - lengths if side == "left" else np.zeros(len(rows), np.int64)
    return Masked(shown_BS.astype(np.int64), label_BS.astype(np.int64), begins_B)


def _array(value: Any) -> NDArray[Any]:
    return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)


def open_masker(
    masker: Any, tokenizer: Tokenizer, seed: int, claims: Claims | None = None
) -> ObjectiveMasker | CallableMasker | CollatorMasker:
    """Wrap an objective, a data collator of transformers, or any callable.

    Raises:
        RecipeError: the object is none of these.
    """
    if isinstance(masker, ObjectiveMasker | CallableMasker | CollatorMasker):
        return masker
    name = str(getattr(masker, "__qualname__", type(masker).__qualname__))
    if hasattr(masker, "corrupt") and hasattr(masker, "loss_weights"):
        return ObjectiveMasker(masker, seed, name, claims or Claims())
    if isinstance(masker, type) or not callable(masker):
        kind = "class" if isinstance(masker, type) else type(masker).__name__
        raise RecipeError(
            f"this is not a masker: it is of type {kind}",
            location=name,
            hint="give a callable (ids -> inputs, labels), a data collator or an objective: an instance, not its class",
        )
    classes = inspect.getmro(cast("type", type(masker)))
    if any(cls.__module__.partition(".")[0] == "transformers" for cls in classes):
        return CollatorMasker(masker, name, claims or claims_of_collator(masker))
    return CallableMasker(masker, tokenizer.role_id("pad_token"), name, claims or Claims())


def claims_of_config(settings: MaskingConfig, progress: float = 0.0) -> Claims:
    """Return the claims of a masking config after a fraction of the run."""
    units: dict[str, Units] = {"token": "tokens", "whole-word": "words"}
    return Claims(
        rate=settings.rate_at(progress),
        mask=settings.mask_token_rate,
        random=settings.random_token_rate,
        keep=settings.keep_rate,
        units=units.get(settings.mask_unit, "spans"),
        uniform=not settings.boosted_words,
    )


def claims_of_collator(collator: Any) -> Claims:
    """Return the claims that a collator's attributes make."""
    defaults = Claims()
    mask = float(getattr(collator, "mask_replace_prob", defaults.mask))
    random = float(getattr(collator, "random_replace_prob", defaults.random))
    return Claims(
        rate=float(getattr(collator, "mlm_probability", None) or defaults.rate),
        mask=mask,
        random=random,
        keep=max(0.0, 1.0 - mask - random),
        units="words" if getattr(collator, "whole_word_mask", False) else "tokens",
    )


LIBRARY: Final = "transformers"
VARIANTS: Final = ("whole-word", "seeded")
_ROLES: Final = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def transformers_collator(name: str, tokenizer: Tokenizer, seed: int) -> CollatorMasker:
    """Create the `DataCollatorForLanguageModeling` that `transformers[:whole-word][,seeded]` names.

    Raises:
        RecipeError: the variant is unknown, or transformers is not installed.
    """
    library, _, options_text = name.partition(":")
    variants = options_text.split(",") if options_text else []
    for variant in variants:
        if variant not in VARIANTS:
            near = closest_match(variant, list(VARIANTS))
            raise RecipeError(
                f"there is no variant `{variant}`" + (f": did you mean `{near}`?" if near else ""),
                location=name,
                hint=f"choose from {', '.join(VARIANTS)}, as in {LIBRARY}:whole-word,seeded",
            )
    if importlib.util.find_spec(LIBRARY) is None:
        raise RecipeError(
            f"{LIBRARY} is not installed", location=library, hint='run python -m pip install "unmask[hub]"'
        )
    from transformers import DataCollatorForLanguageModeling

    options: dict[str, Any] = {}
    if "whole-word" in variants:
        options["whole_word_mask"] = True
    if "seeded" in variants:
        options["seed"] = seed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that whole words are always replaced by [MASK]: the claims have it
        collator = DataCollatorForLanguageModeling(fast_tokenizer(tokenizer), **options)
    return CollatorMasker(collator, name, claims_of_collator(collator))


def fast_tokenizer(tokenizer: Tokenizer) -> Any:
    """Return the tokenizer as a `PreTrainedTokenizerFast` of `transformers`, with the same ids."""
    from transformers import PreTrainedTokenizerFast

    roles = {role: tokenizer.id_to_token(number) for role in _ROLES if (number := tokenizer.role_id(role)) is not None}
    inner: Any = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    return PreTrainedTokenizerFast(tokenizer_object=inner, **roles)
