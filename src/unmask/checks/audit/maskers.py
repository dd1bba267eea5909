"""Room card: maskers of every make, behind one door.

Comes in: an objective of ours, a data collator of transformers, a callable. Goes out: a Masker: rows of a batch in,
what the encoder would see and what is asked out, padded. Called by: judge, play, cli.

Nothing but inputs and outputs is looked at; a masker's attributes are read for what it claims, never for what it does.
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
from numpy.typing import NDArray

from unmask.checks.audit.samples import Row
from unmask.checks.audit.settings import Claims, Units
from unmask.core.errors import RecipeError
from unmask.core.quantities import closest_match
from unmask.core.types import Objective, Sample, pack
from unmask.objectives.masking import MaskingConfig
from unmask.tokenization.tokenizer import Tokenizer

IGNORED: Final = -100  # the label of what is not asked, as in PyTorch's cross-entropy


class Masked(NamedTuple):
    """A batch as a masker gives it back."""

    shown_BS: NDArray[np.int64]
    label_BS: NDArray[np.int64]
    begins_B: NDArray[np.int64]  # the slot where each sample begins: 0, or more where padding comes first


class Masker(Protocol):
    """Rows in, a masked batch out; a copy of it is made for every rank."""

    @property
    def name(self) -> str:
        """What a report calls it."""
        ...

    @property
    def claims(self) -> Claims:
        """What it promises."""
        ...

    @property
    def pads(self) -> bool:
        """Whether samples of several lengths may stand in a batch."""
        ...

    def mask(self, rows: Sequence[Row], epoch: int) -> Masked:
        """One batch."""
        ...


@dataclass
class ObjectiveMasker:
    """Our own masking: an objective's `corrupt`, on texts that carry their epoch and number as a feed's do."""

    objective: Objective
    seed: int
    name: str = "unmask"
    claims: Claims = field(default_factory=Claims)
    progress: float = 0.0  # of the run, for a rate that changes over it
    pads: bool = True

    def mask(self, rows: Sequence[Row], epoch: int) -> Masked:
        """Texts laid end to end, corrupted, and laid out again."""
        batch = pack([Sample(row.ids, row.marks, epoch, row.number) for row in rows])
        batch = replace(batch, progress=self.progress)
        masked = self.objective.corrupt(batch, self.seed)
        label_T = np.full(len(batch.ids_T), IGNORED, dtype=np.int64)
        label_T[masked.positions_M.numpy()] = masked.labels_M.numpy()
        shown_T = masked.batch.ids_T.numpy()
        shape = (len(rows), batch.max_seqlen)
        shown_BS, label_BS = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
        for number, row in enumerate(rows):
            here = slice(batch.offsets[number], batch.offsets[number] + len(row.ids))
            shown_BS[number, : len(row.ids)], label_BS[number, : len(row.ids)] = shown_T[here], label_T[here]
        return Masked(shown_BS, label_BS, np.zeros(len(rows), np.int64))


@dataclass
class Function:
    """A callable: a tensor of ids (samples × slots, padded at the end) in, (inputs, labels) out."""

    function: Callable[[Any], Any]
    padding_id: int | None
    name: str = "a callable"
    claims: Claims = field(default_factory=Claims)

    @property
    def pads(self) -> bool:
        """Where the tokenizer has a piece for it."""
        return self.padding_id is not None

    def mask(self, rows: Sequence[Row], epoch: int) -> Masked:
        """One batch."""
        import torch

        longest = max(len(row.ids) for row in rows)
        ids_BS = np.full((len(rows), longest), self.padding_id or 0, dtype=np.int64)
        for number, row in enumerate(rows):
            ids_BS[number, : len(row.ids)] = row.ids
        given: Any = self.function(torch.from_numpy(ids_BS))
        return _read(given, rows, longest, self.name, "right")


@dataclass
class Collator:
    """A data collator: features of samples in, a mapping with input_ids and labels out."""

    collator: Callable[[Any], Any]
    name: str = "a data collator"
    claims: Claims = field(default_factory=Claims)

    @property
    def _offsets(self) -> bool:
        return bool(getattr(self.collator, "whole_word_mask", False))

    @property
    def pads(self) -> bool:
        """Not with offsets, which `transformers` doesn't pad: a batch of several lengths is an error there."""
        tokenizer: Any = getattr(self.collator, "tokenizer", None)
        return not self._offsets and getattr(tokenizer, "pad_token", None) is not None

    def mask(self, rows: Sequence[Row], epoch: int) -> Masked:
        """Features as a tokenizer gives them when it is asked for the mask of special pieces."""
        features: list[dict[str, Any]] = []
        for row in rows:
            feature: dict[str, Any] = {"input_ids": row.ids.tolist()}
            feature["attention_mask"] = [1] * len(row.ids)
            feature["special_tokens_mask"] = row.framing.astype(int).tolist()
            if self._offsets:
                feature["offset_mapping"] = [tuple(pair) for pair in row.offsets.tolist()]
            features.append(feature)
        side = str(getattr(getattr(self.collator, "tokenizer", None), "padding_side", "right"))
        return _read(self.collator(features), rows, max(len(row.ids) for row in rows), self.name, side)


def _read(given: Any, rows: Sequence[Row], longest: int, name: str, side: str) -> Masked:
    """What a masker gave back, as arrays.

    Raises:
        RecipeError: it is something else.
    """
    if isinstance(given, Mapping) or hasattr(given, "keys"):
        held = cast("Mapping[str, Any]", given)
        given = (held.get("input_ids"), held.get("labels"))
    wrong = ""
    if not (isinstance(given, tuple | list) and len(cast("Sequence[Any]", given)) == 2):
        wrong = f"it gave a {type(given).__name__}"
        shown_BS = label_BS = np.zeros((0, 0), np.int64)
    else:
        shown_BS, label_BS = (_array(one) for one in cast("Sequence[Any]", given))
        for what, array in (("inputs", shown_BS), ("labels", label_BS)):
            if array.ndim != 2 or len(array) != len(rows) or array.shape[1] < longest:
                wrong = f"its {what} have the shape {array.shape} where {len(rows)} × {longest} went in"
            elif not np.issubdtype(array.dtype, np.integer):
                wrong = f"its {what} are {array.dtype}"
        if not wrong and shown_BS.shape != label_BS.shape:
            wrong = f"its inputs are {shown_BS.shape} and its labels {label_BS.shape}"
    if wrong:
        raise RecipeError(
            f"this is no masker: {wrong}",
            location=name,
            hint="it takes ids (samples × slots) and gives inputs and labels of that shape, whole numbers, with labels "
            f"{IGNORED} where nothing is asked",
        )
    lengths = np.array([len(row.ids) for row in rows])
    begins_B = shown_BS.shape[1] - lengths if side == "left" else np.zeros(len(rows), np.int64)
    return Masked(shown_BS.astype(np.int64), label_BS.astype(np.int64), begins_B)


def _array(value: Any) -> NDArray[Any]:
    return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)


def masker_of(
    given: Any, tokenizer: Tokenizer, seed: int, claims: Claims | None = None
) -> ObjectiveMasker | Function | Collator:
    """The door that fits what was given: an objective, a data collator of transformers, or any callable.

    Raises:
        RecipeError: it is none of these.
    """
    if isinstance(given, ObjectiveMasker | Function | Collator):
        return given
    name = str(getattr(given, "__qualname__", type(given).__qualname__))
    if hasattr(given, "corrupt") and hasattr(given, "loss_weights"):
        return ObjectiveMasker(given, seed, name, claims or Claims())
    if isinstance(given, type) or not callable(given):
        what = "a class" if isinstance(given, type) else f"a {type(given).__name__}"
        raise RecipeError(
            f"this is no masker: it is {what}",
            location=name,
            hint="give a callable (inputs -> inputs, labels), a data collator or an objective: what was made, not its "
            "class",
        )
    classes = inspect.getmro(cast("type", type(given)))
    if any(one.__module__.partition(".")[0] == "transformers" for one in classes):
        return Collator(given, name, claims or claims_of_collator(given))
    return Function(given, tokenizer.role_id("pad_token"), name, claims or Claims())


def claims_of_settings(settings: MaskingConfig, progress: float = 0.0) -> Claims:
    """What our own settings promise where this share of a run is done."""
    units: dict[str, Units] = {"token": "tokens", "whole-word": "words"}
    return Claims(
        rate=settings.rate_at(progress),
        mask=settings.mask_token_rate,
        random=settings.random_token_rate,
        keep=settings.keep_rate,
        units=units.get(settings.mask_unit, "spans"),
        even=not settings.boosted_words,
    )


def claims_of_collator(collator: Any) -> Claims:
    """What a collator's own attributes promise once it is made."""
    plain = Claims()
    mask = float(getattr(collator, "mask_replace_prob", plain.mask))
    random = float(getattr(collator, "random_replace_prob", plain.random))
    return Claims(
        rate=float(getattr(collator, "mlm_probability", None) or plain.rate),
        mask=mask,
        random=random,
        keep=max(0.0, 1.0 - mask - random),
        units="words" if getattr(collator, "whole_word_mask", False) else "tokens",
    )


LIBRARY: Final = "transformers"
VARIANTS: Final = ("whole-word", "seeded")
_ROLES: Final = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def library_collator(name: str, tokenizer: Tokenizer, seed: int) -> Collator:
    """`DataCollatorForLanguageModeling` as `transformers[:whole-word][,seeded]` says.

    Raises:
        RecipeError: there is no such variant, or the library isn't installed.
    """
    library, _, said = name.partition(":")
    variants = said.split(",") if said else []
    for variant in variants:
        if variant not in VARIANTS:
            near = closest_match(variant, list(VARIANTS))
            raise RecipeError(
                f"there is no variant `{variant}`" + (f": did you mean `{near}`?" if near else ""),
                location=name,
                hint=f"choose of {', '.join(VARIANTS)}, as in {LIBRARY}:whole-word,seeded",
            )
    if importlib.util.find_spec(LIBRARY) is None:
        raise RecipeError(
            f"{LIBRARY} is not installed", location=library, hint='install it: python -m pip install "unmask[hub]"'
        )
    from transformers import DataCollatorForLanguageModeling

    options: dict[str, Any] = {}
    if "whole-word" in variants:
        options["whole_word_mask"] = True
    if "seeded" in variants:
        options["seed"] = seed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that whole words are always hidden behind [MASK]: it stands in the claims
        made = DataCollatorForLanguageModeling(fast_tokenizer(tokenizer), **options)
    return Collator(made, name, claims_of_collator(made))


def fast_tokenizer(tokenizer: Tokenizer) -> Any:
    """Ours as one of `transformers`, with equal ids."""
    from transformers import PreTrainedTokenizerFast

    roles = {role: tokenizer.id_to_token(number) for role in _ROLES if (number := tokenizer.role_id(role)) is not None}
    inner: Any = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    return PreTrainedTokenizerFast(tokenizer_object=inner, **roles)
