"""Where a model is right and how well it knows it: accuracy and loss by group of masked tokens, and calibration.

The tokens are those of the frozen evaluation set that `masked_lm.evaluate` judges, and all numbers come from the same
forward pass.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from unmask.core.distributed import DistributedContext, init_distributed
from unmask.core.types import SPECIAL, WORD_START, MaskedBatch
from unmask.data.inputs import Texts
from unmask.data.settings import DocumentRule, ErrorsRule
from unmask.evaluation.masked_lm import EvalResult, evaluate, unigram_losses
from unmask.evaluation.validation import read_eval_text
from unmask.models.model import Model
from unmask.tokenization.tokenizer import Tokenizer


def _band_names(lasts: Sequence[int]) -> tuple[str, ...]:
    firsts = (1, *(last + 1 for last in lasts))
    bands = [f"{first:,} to {last:,}" for first, last in zip(firsts, lasts, strict=False)]
    return (*bands, f"{firsts[-1]:,} and above")


CALIBRATION_BINS: Final = 15  # as Guo et al. 2017, table 1
_RANK_BANDS: Final = (10, 100, 1_000, 10_000)  # last rank of each band
_POSITION_BANDS: Final = (8, 32, 128, 512)  # last position of each band
_PLACES: Final = ("whole word", "first token of a word", "inner token of a word")
_CHARACTERS: Final = ("letters", "digits", "punctuation", "other")
_INPUTS: Final = ("[MASK]", "random token", "unchanged")
_GROUPS: Final = {
    "by_frequency": _band_names(_RANK_BANDS),
    "by_place_in_word": _PLACES,
    "by_position": _band_names(_POSITION_BANDS),
    "by_characters": _CHARACTERS,
    "by_input": _INPUTS,
}
_BLOCK_LOGITS: Final = 1 << 22  # 16 MB in float32


@dataclass(frozen=True)
class GroupResult:
    """A model's result on a group of masked tokens."""

    name: str
    masked_tokens: int
    loss: float  # nats per masked token
    unigram_loss: float  # the same of the unigram baseline
    accuracy: float


@dataclass(frozen=True)
class CalibrationBin:
    """Masked tokens whose most probable token has a probability in (lower, upper]."""

    lower: float
    upper: float
    masked_tokens: int
    confidence: float  # mean probability of the most probable token
    accuracy: float  # share of them whose most probable token is right


@dataclass(frozen=True)
class Calibration:
    """Agreement of probabilities with frequencies (Guo et al. 2017, arXiv 1706.04599, section 2).

    The confidence of a prediction is the probability of the most probable token. A model is calibrated if a share c of
    the predictions with confidence c is right.
    """

    error: float  # expected calibration error: |accuracy - confidence| of a bin, averaged over the masked tokens
    confidence: float  # mean; above the accuracy, the model is overconfident
    bins: tuple[CalibrationBin, ...]  # of equal width; empty ones are left out


@dataclass(frozen=True)
class EvalDetails:
    """A model's result by group of masked tokens, and its calibration. Groups without a token are left out."""

    # By rank of the token's frequency in the evaluated text, special tokens aside: rank 1 is the most frequent one.
    by_frequency: tuple[GroupResult, ...]
    by_place_in_word: tuple[GroupResult, ...]  # a word of one token, first or inner token of a longer word
    by_position: tuple[GroupResult, ...]  # in the sequence, counted from 1 at its first token, which may be [CLS]
    by_characters: tuple[GroupResult, ...]  # letters; else digits; else punctuation and symbols; else other
    by_input: tuple[GroupResult, ...]  # what the model reads in place of the token
    calibration: Calibration


@dataclass(frozen=True, kw_only=True)
class DetailedEvalResult(EvalResult):
    """A model's result on an evaluation set, with its details."""

    details: EvalDetails

    def __repr__(self) -> str:
        """Return the results in four lines."""
        calibration = self.details.calibration
        return (
            f"{super().__repr__()[:-1]}\n  expected calibration error: {calibration.error:.2%}; mean confidence "
            f"{calibration.confidence:.1%})"
        )


def evaluate_details(
    model: Model,
    texts: Texts,
    *,
    context: DistributedContext | None = None,
    length: int | None = None,
    document: DocumentRule | None = None,
    errors: ErrorsRule = "strict",
    field: str | None = None,
    max_size: str | float | None = None,
) -> DetailedEvalResult:
    """Return a model's result on text as `evaluate` does, also by group of masked tokens, with its calibration.

    Args:
        model: Model to evaluate, as returned by `unmask.load`.
        texts: Paths of text files or directories, or the texts themselves, as for `unmask.pretrain`.
        context: Device to compute on; default: as chosen for training.
        length: Maximum sequence length in tokens; default: that of the model's training.
        document: Rule that splits the text into documents; default: that of the training text, or "blank-line".
        errors: What to do with undecodable bytes or malformed rows.
        field: Name of the field or column with the text, for tables; default: "text".
        max_size: Amount of text to read, such as "2M characters"; default: all.

    Raises:
        TextError: the text can't be read, or none of its tokens can be masked.
        ModelError: `length` is below 3 or above the encoder's maximum.
    """
    context = context or init_distributed("float32")
    text = read_eval_text(model, texts, length=length, document=document, errors=errors, field=field, max_size=max_size)
    details = DetailCounter(model.tokenizer, text.counts_V)
    encoder, head = model.encoder.to(context.device), model.head.to(context.device)
    result = evaluate(encoder, head, text.eval_set, context, on_batch=details.add)
    return details.result(result, context)


class DetailCounter:
    """Sums the results of masked tokens by group. `add` is an `on_batch` of `masked_lm.evaluate`."""

    def __init__(self, tokenizer: Tokenizer, counts_V: NDArray[np.integer[Any]]) -> None:
        """`counts_V` is the count of each token id in the evaluated text."""
        self._mask_id = tokenizer.mask_id
        self._unigram_V = unigram_losses(counts_V, tokenizer)
        self._rank_band_V = _rank_bands(counts_V, tokenizer)
        self._characters_V = _character_classes(counts_V, tokenizer)
        # Sums over tokens, with a row per group: count, nats, nats of the unigram baseline, correct predictions.
        self._sums = {name: np.zeros((len(groups), 4)) for name, groups in _GROUPS.items()}
        self._bins = np.zeros((CALIBRATION_BINS, 3))  # count, confidence, correct predictions

    def add(self, masked: MaskedBatch, logits_MV: Tensor) -> None:
        """Add the masked tokens of a batch. `masked` is on the CPU; the logits may be on another device."""
        nats_M, confidence_M, is_correct_M = _judge(logits_MV, masked.labels_M)
        labels_M = masked.labels_M.numpy()
        values_M4 = np.stack([np.ones(len(labels_M)), nats_M, self._unigram_V[labels_M], is_correct_M], 1)
        groups = {
            "by_frequency": self._rank_band_V[labels_M],
            "by_place_in_word": _places(masked),
            "by_position": np.searchsorted(_POSITION_BANDS, _positions(masked)),
            "by_characters": self._characters_V[labels_M],
            "by_input": self._inputs(masked),
        }
        for name, group_M in groups.items():
            np.add.at(self._sums[name], group_M, values_M4)
        # A confidence on a border belongs to the bin below it: (0, 1/15], (1/15, 2/15], …
        bin_M = np.ceil(confidence_M * CALIBRATION_BINS).astype(np.int64).clip(1, CALIBRATION_BINS) - 1
        np.add.at(self._bins, bin_M, np.stack([np.ones(len(labels_M)), confidence_M, is_correct_M], 1))

    def result(self, result: EvalResult, context: DistributedContext) -> DetailedEvalResult:
        """Return the details beside the result of the same evaluation, summed over the ranks."""
        tables = [*self._sums.values(), self._bins]
        flat = np.array(context.sum(np.concatenate([table.ravel() for table in tables]).tolist()))
        ends = np.cumsum([table.size for table in tables])
        *sums, bins = (part.reshape(table.shape) for part, table in zip(np.split(flat, ends[:-1]), tables, strict=True))
        groups = [tuple(_group_results(names, table)) for names, table in zip(_GROUPS.values(), sums, strict=True)]
        return DetailedEvalResult(**vars(result), details=EvalDetails(*groups, calibration=_calibration(bins)))

    def _inputs(self, masked: MaskedBatch) -> NDArray[np.int64]:
        """Return for each masked token what the model reads in its place: an index into `_INPUTS`."""
        read_M, labels_M = masked.batch.ids_T[masked.positions_M].numpy(), masked.labels_M.numpy()
        return np.where(read_M == self._mask_id, 0, np.where(read_M == labels_M, 2, 1))


@torch.inference_mode()
def _judge(logits_MV: Tensor, labels_M: Tensor) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the nats of each label, the probability of the most probable token, and whether it is the label."""
    rows = max(1, _BLOCK_LOGITS // logits_MV.shape[1])
    nats, confidences, correct = list[Tensor](), list[Tensor](), list[Tensor]()
    for block_BV, labels_B in zip(logits_MV.split(rows), labels_M.to(logits_MV.device).split(rows), strict=True):
        nats.append(F.cross_entropy(block_BV, labels_B, reduction="none"))
        highest_B, best_B = block_BV.max(-1)
        confidences.append((highest_B - block_BV.logsumexp(-1)).exp())
        correct.append(best_B == labels_B)
    nats_M, confidence_M, is_correct_M = (
        torch.cat(parts).double().cpu().numpy() for parts in (nats, confidences, correct)
    )
    return nats_M, confidence_M, is_correct_M


def _positions(masked: MaskedBatch) -> NDArray[np.int64]:
    """Return the position of each masked token in its sequence, counted from 1."""
    offsets, positions_M = np.array(masked.batch.offsets), masked.positions_M.numpy()
    return positions_M - offsets[np.searchsorted(offsets, positions_M, side="right") - 1] + 1


def _places(masked: MaskedBatch) -> NDArray[np.int64]:
    """Return the place of each masked token in its word: an index into `_PLACES`.

    A word that continues in the next sequence ends with this one.
    """
    flags_T, positions_M = masked.batch.token_flags_T.numpy(), masked.positions_M.numpy()
    starts_T = (flags_T & (WORD_START | SPECIAL)) != 0
    ends_T = np.append(starts_T[1:], True)
    ends_T[np.array(masked.batch.offsets[1:]) - 1] = True
    is_first_M = starts_T[positions_M]
    return np.where(~is_first_M, 2, np.where(ends_T[positions_M], 0, 1))


def _rank_bands(counts_V: NDArray[np.integer[Any]], tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Return the band of each token id by its frequency rank. Of equal counts, the lower id has the lower rank."""
    ids = tokenizer.regular_token_ids
    ranks_V = np.full(len(counts_V), len(counts_V))
    ranks_V[ids[np.argsort(-counts_V[ids], kind="stable")]] = np.arange(1, len(ids) + 1)
    return np.searchsorted(_RANK_BANDS, ranks_V)


def _character_classes(counts_V: NDArray[np.integer[Any]], tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Return the class of each token id that occurs: an index into `_CHARACTERS`."""
    classes_V = np.full(len(counts_V), len(_CHARACTERS) - 1)
    for token_id in np.flatnonzero(counts_V).tolist():
        classes_V[token_id] = _character_class(tokenizer.decode([token_id]))
    return classes_V


def _character_class(text: str) -> int:
    """Return an index into `_CHARACTERS`. The prefix ## of WordPiece doesn't change the class."""
    if "\ufffd" in text:  # bytes that are not a whole character
        return 3
    categories = {unicodedata.category(character)[0] for character in text}
    for number, members in enumerate(("LM", "N", "PS")):
        if categories & set(members):
            return number
    return 3


def _group_results(names: Sequence[str], sums: NDArray[Any]) -> Iterator[GroupResult]:
    """Yield the result of each group with a token."""
    for name, (count, nats, unigram, correct) in zip(names, sums.tolist(), strict=True):
        if count:
            yield GroupResult(name, round(count), nats / count, unigram / count, correct / count)


def _calibration(bins: NDArray[Any]) -> Calibration:
    """Return the calibration from the count, the summed confidence and the correct predictions of each bin."""
    count, confidence, correct = bins.T
    total = float(count.sum())
    filled = [
        CalibrationBin(
            lower=number / CALIBRATION_BINS,
            upper=(number + 1) / CALIBRATION_BINS,
            masked_tokens=round(count[number]),
            confidence=float(confidence[number] / count[number]),
            accuracy=float(correct[number] / count[number]),
        )
        for number in np.flatnonzero(count).tolist()
    ]
    error = float(np.abs(correct - confidence).sum()) / total
    return Calibration(error, float(confidence.sum()) / total, tuple(filled))
