"""Predicts the tokens at [MASK] positions of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from unmask.core.errors import ModelError
from unmask.core.types import WORD_START
from unmask.models.model import Model, require_masked_lm
from unmask.tokenization.analysis import TokenFormatter, TokenText
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.words import is_spaced_letter

MASK = "[MASK]"
_LETTERS = "aeinorst가나다라이"  # almost every vocabulary has one of them as a token that begins a word


@dataclass(frozen=True)
class Candidate:
    """A prediction for one mask: the token, its probability, and the text with that mask filled."""

    token_str: str
    id: int
    score: float
    sequence: str
    shown: str  # token for display: ␣ for a space, ⟨E5 A4⟩ for bytes that are not a complete character


@dataclass(frozen=True)
class MaskPrediction:
    """The candidates for one mask. `position` counts special tokens, as in transformers."""

    position: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class FillMaskResult:
    """A text and the predictions for its masks, in the order of the text."""

    text: str
    masks: tuple[MaskPrediction, ...]

    def __repr__(self) -> str:
        """Return the text, and a line with the candidates of each mask."""
        lines = [
            "  " + ", ".join(f"{candidate.shown!r} {candidate.score:.1%}" for candidate in mask.candidates)
            for mask in self.masks
        ]
        return "\n".join([f"FillMaskResult({self.text!r}:", *lines]) + ")"


def fill(model: Model, text: str | Sequence[str], top: int = 5) -> list[FillMaskResult]:
    """Predict every [MASK] of one or several texts. Masks of one text are predicted independently in one pass.

    A text longer than the model's context is split into windows around its masks. Special tokens are never candidates.
    For a mask directly after a letter ("서울[MASK]"), tokens that begin a word are not candidates either. Probabilities
    are not renormalized over the candidates.

    Args:
        model: Model to use, as returned by `unmask.load`.
        text: One or several texts, each with at least one [MASK].
        top: Number of candidates per mask.

    Raises:
        ModelError: the model makes no masked predictions, a text has no [MASK], or `top` is below 1 or above the
            vocabulary size.
    """
    require_masked_lm(model, "fill masks")
    texts = [text] if isinstance(text, str) else list(text)
    check_top(model, top)
    formatter, mask_id = TokenFormatter.of(model.tokenizer), model.tokenizer.mask_id
    gaps: list[Gap] = []  # of all texts
    ids: list[list[int]] = []
    positions: list[list[int]] = []
    for number, (prompt, encoded) in enumerate(zip(texts, encode_texts(model, texts, formatter), strict=True)):
        masks = [position for position, id_ in enumerate(encoded) if id_ == mask_id]
        if not masks:
            shown = repr(prompt[:60])
            raise no_mask_error(f"text {number + 1}: {shown}" if len(texts) > 1 else shown)
        gaps += gaps_of(model, number, prompt, masks)
        for window, at in _windows(encoded, masks, model):
            ids.append(window)
            positions.append(at)
    first = [0, *accumulate(map(len, positions))]  # gap of the first position of each sequence
    found: list[list[MaskPrediction]] = [[] for _ in texts]
    for sequences, rows_MV in model.log_probability_batches(ids, positions):
        of_rows = [gap for sequence in sequences for gap in gaps[first[sequence] : first[sequence + 1]]]
        for gap, best in zip(of_rows, _best(rows_MV, of_rows, top, formatter), strict=True):
            found[gap.text].append(_prediction(model, gap, best, formatter))
    return [
        FillMaskResult(prompt, tuple(sorted(masks, key=lambda mask: mask.position)))
        for prompt, masks in zip(texts, found, strict=True)
    ]


def no_mask_error(location: str) -> ModelError:
    """Return the error for a text without [MASK]."""
    return ModelError(
        "there is no [MASK] in the text",
        location=location,
        hint='write [MASK] where a token is to be predicted: "The cat sat on the [MASK]."',
    )


@dataclass(frozen=True)
class Gap:
    """A mask in one of several texts, and the text around it."""

    text: int
    position: int  # counts special tokens
    before: str
    after: str

    def is_attached(self, formatter: TokenFormatter) -> bool:
        """Whether a token that begins a word can't follow: before the mask is a letter of a script with spaces."""
        if not self.before or self.before[-1].isspace() or self.before.endswith(MASK):
            return False
        return not formatter.prefix or is_spaced_letter(self.before[-1])


def gaps_of(model: Model, number: int, text: str, positions: Sequence[int]) -> list[Gap]:
    """Return the masks of a text, which is number `number` of several; `positions` count special tokens."""
    parts = text.replace(model.tokenizer.id_to_token(model.tokenizer.mask_id), MASK).split(MASK)
    return [
        Gap(number, position, MASK.join(parts[: index + 1]), MASK.join(parts[index + 1 :]))
        for index, position in enumerate(positions)
    ]


def check_top(model: Model, top: int) -> None:
    """Check a number of candidates.

    Raises:
        ModelError: it is below 1 or above the vocabulary size.
    """
    if not 1 <= top <= model.tokenizer.size:
        raise ModelError(
            f"invalid top: got {top}, expected 1 to {model.tokenizer.size}",
            hint="choose at least 1 and at most the vocabulary size",
        )


@torch.inference_mode()
def _best(
    log_probabilities_MV: Tensor, gaps: Sequence[Gap], top: int, formatter: TokenFormatter
) -> list[tuple[list[int], list[float]]]:
    """Return the ids and the probabilities of the most probable tokens for each row. The rows are overwritten."""
    is_attached = [gap.is_attached(formatter) for gap in gaps]
    best: list[tuple[list[int], list[float]]] = [([], [])] * len(gaps)
    for kind, unpredicted in enumerate(formatter.unpredicted_ids):
        rows = [row for row, attached in enumerate(is_attached) if attached == kind]
        if rows:
            # The embedding may be larger than the vocabulary.
            log_probabilities_RV = log_probabilities_MV[:, : formatter.size]
            if len(rows) < len(gaps):
                log_probabilities_RV = log_probabilities_RV[rows]
            log_probabilities_RV.index_fill_(1, torch.from_numpy(unpredicted), -torch.inf)
            highest = log_probabilities_RV.topk(min(top, formatter.size - len(unpredicted)))
            for row, *entry in zip(rows, highest.indices.tolist(), highest.values.exp().tolist(), strict=True):
                best[row] = (entry[0], entry[1])
    return best


def _prediction(
    model: Model, gap: Gap, best: tuple[list[int], list[float]], formatter: TokenFormatter
) -> MaskPrediction:
    tokenizer = model.tokenizer
    takes_space = tokenizer.mask_takes_space
    return MaskPrediction(
        gap.position,
        tuple(
            Candidate(
                tokenizer.id_to_token(id_),
                id_,
                probability,
                join_token(gap.before, gap.after, formatter.read(id_), takes_space, formatter),
                formatter.display(id_),
            )
            for id_, probability in zip(*best, strict=True)
        ),
    )


def encode_texts(model: Model, texts: Sequence[str], formatter: TokenFormatter) -> list[list[int]]:
    """Return the ids of each text, special tokens included.

    An imported model may have another mask token, e.g. <mask>. In the text, it is always [MASK].
    """
    tokenizer = model.tokenizer
    mask = tokenizer.id_to_token(tokenizer.mask_id)
    prompts = [text.replace(MASK, mask) for text in texts]
    encoded = _encode_continuations(tokenizer, prompts) if formatter.prefix else tokenizer.encode_prompts(prompts)
    before, after = tokenizer.frame.before, tokenizer.frame.after
    return [[*before, *ids, *after] for ids in encoded]


def _encode_continuations(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text. Letters directly after a mask are encoded as a continuation of its word.

    In "[MASK]에서", 에서 must be encoded as ##에서. The tokenizer would encode it as a new word, which never directly
    follows a mask in training. Therefore it is encoded after a letter, and the letter's token is removed.
    """
    mask = tokenizer.id_to_token(tokenizer.mask_id)
    split = [text.split(mask) for text in texts]
    encoded = iter(tokenizer.encode_prompts([part for parts in split for part in parts]))
    results: list[list[int]] = []
    for _, *others in split:
        ids = list(next(encoded))
        for part in others:
            part_ids = next(encoded)
            if part and is_spaced_letter(part[0]):
                part_ids = _continuation(tokenizer, part) or part_ids
            ids += [tokenizer.mask_id, *part_ids]
        results.append(ids)
    return results


def _continuation(tokenizer: Tokenizer, part: str) -> list[int] | None:
    """Return the ids of a text that continues a word; None if no token of a single letter comes before it."""
    for letter in _LETTERS:
        encoded = tokenizer.encode(letter + part, specials_in_text=True)
        starts_with_letter = len(encoded.ids) > 1 and encoded.offsets[0].tolist() == [0, 1]
        if starts_with_letter and not encoded.marks[1] & WORD_START:
            return encoded.ids[1:].tolist()
    return None


def _windows(ids: list[int], positions: list[int], model: Model) -> list[tuple[list[int], list[int]]]:
    """Return windows of ids, each with the positions of masks in it, which together are all masks in order.

    A text within the context is one window. A longer one has a window around each mask.
    """
    context = model.context
    if len(ids) <= context:
        return [(ids, positions)]
    before, after = model.tokenizer.frame.before, model.tokenizer.frame.after
    inner, length = ids[len(before) : len(ids) - len(after)], context - len(before) - len(after)
    windows: list[tuple[list[int], list[int]]] = []
    for position in positions:
        center = position - len(before)
        first = min(max(0, center - length // 2), len(inner) - length)
        windows.append(([*before, *inner[first : first + length], *after], [center - first + len(before)]))
    return windows


def join_token(before: str, after: str, token: TokenText, takes_space: bool, formatter: TokenFormatter) -> str:
    """Return the text with a token in place of a mask, with one space before the token if it needs one."""
    if token.spacing == "after-space":
        gap = "" if not before or before[-1].isspace() else " "
        return before + gap + token.letters + after
    if token.spacing == "joins" and (takes_space or formatter.prefix):
        return before.rstrip(" ") + token.letters + after
    gap = " " if formatter.prefix and formatter.needs_space(before, token) else ""
    return before + gap + token.letters + after
