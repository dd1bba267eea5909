"""Predicts the tokens at [MASK] positions of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.core.errors import ModelError
from unmask.core.types import WORD_START
from unmask.models.model import Model
from unmask.tokenization.analysis import TokenFormatter, TokenText
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.words import is_letter, is_unspaced

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
        ModelError: a text has no [MASK], or `top` is below 1 or above the vocabulary size.
    """
    texts = [text] if isinstance(text, str) else list(text)
    check_top(model, top)
    formatter, mask_id = TokenFormatter.of(model.tokenizer), model.tokenizer.mask_id
    encoded: list[tuple[list[int], list[int]]] = []  # ids and positions of masks
    for number, prompt in enumerate(texts):
        ids = _encode(model, prompt, formatter)
        positions = [position for position, id_ in enumerate(ids) if id_ == mask_id]
        if not positions:
            raise ModelError(
                "there is no [MASK] in the text",
                location=f"text {number + 1}: {prompt[:60]!r}" if len(texts) > 1 else repr(prompt[:60]),
                hint='write [MASK] where a token is to be predicted: "The cat sat on the [MASK]."',
            )
        encoded.append((ids, positions))
    windows = [_window(ids, position, model) for ids, positions in encoded for position in positions]
    outputs = iter(model.log_probabilities([ids for ids, _ in windows], [[position] for _, position in windows]))
    results: list[FillMaskResult] = []
    for prompt, (_, positions) in zip(texts, encoded, strict=True):
        masks = [
            MaskPrediction(position, _candidates(model, prompt, index, next(outputs)[0], top, formatter))
            for index, position in enumerate(positions)
        ]
        results.append(FillMaskResult(prompt, tuple(masks)))
    return results


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


def _candidates(
    model: Model, text: str, index: int, log_probabilities_V: Tensor, top: int, formatter: TokenFormatter
) -> tuple[Candidate, ...]:
    """Return the most probable tokens for mask number `index` of a text."""
    tokenizer = model.tokenizer
    parts = text.replace(tokenizer.id_to_token(tokenizer.mask_id), MASK).split(MASK)
    before, after = MASK.join(parts[: index + 1]), MASK.join(parts[index + 1 :])
    allowed_V = torch.from_numpy(_allowed(model, before, formatter))
    probabilities_V = log_probabilities_V[: tokenizer.size].exp()  # the embedding may be larger than the vocabulary
    best = torch.where(allowed_V, probabilities_V, -1.0).topk(min(top, int(allowed_V.sum())))
    return tuple(
        Candidate(
            tokenizer.id_to_token(id_),
            id_,
            probability,
            _join(before, after, formatter.read(id_), tokenizer.mask_takes_space, formatter),
            formatter.display(id_),
        )
        for id_, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )


def _encode(model: Model, text: str, formatter: TokenFormatter) -> list[int]:
    # An imported model may have another mask token, e.g. <mask>. In the text, it is always [MASK].
    tokenizer = model.tokenizer
    text = text.replace(MASK, tokenizer.id_to_token(tokenizer.mask_id))
    # Ids don't depend on the word rule. Without it, the word segmenter's package need not be installed.
    if formatter.prefix:
        ids = _encode_continuations(tokenizer, text)
    else:
        ids = tokenizer.encode(text, specials_in_text=True).ids
    with_special, _ = tokenizer.add_special_tokens(ids, np.zeros(len(ids), dtype=np.uint8))
    return with_special.tolist()


def _encode_continuations(tokenizer: Tokenizer, text: str) -> NDArray[np.int64]:
    """Return the ids of a text. Letters directly after a mask are encoded as a continuation of its word.

    In "[MASK]에서", 에서 must be encoded as ##에서. The tokenizer would encode it as a new word, which never directly
    follows a mask in training. Therefore it is encoded after a letter, and the letter's token is removed.
    """
    first, *others = text.split(tokenizer.id_to_token(tokenizer.mask_id))
    parts = [tokenizer.encode(first, specials_in_text=True).ids]
    for part in others:
        ids = tokenizer.encode(part, specials_in_text=True).ids
        if part and is_letter(part[0]) and not is_unspaced(part[0]):
            for letter in _LETTERS:
                encoded = tokenizer.encode(letter + part, specials_in_text=True)
                starts_with_letter = len(encoded.ids) > 1 and encoded.offsets[0].tolist() == [0, 1]
                if starts_with_letter and not encoded.marks[1] & WORD_START:
                    ids = encoded.ids[1:]
                    break
        parts += [np.array([tokenizer.mask_id], dtype=np.int64), ids]
    return np.concatenate(parts)


def _window(ids: list[int], position: int, model: Model) -> tuple[list[int], int]:
    """Return a window of ids around one mask, at most `model.context` long, and the position of the mask in it."""
    context = model.context
    if len(ids) <= context:
        return ids, position
    before, after = model.tokenizer.frame.before, model.tokenizer.frame.after
    inner, center = ids[len(before) : len(ids) - len(after)], position - len(before)
    length = context - len(before) - len(after)
    first = min(max(0, center - length // 2), len(inner) - length)
    window = inner[first : first + length]
    return [*before, *window, *after], center - first + len(before)


def _allowed(model: Model, before: str, formatter: TokenFormatter) -> NDArray[np.bool_]:
    """Return which tokens can follow a text: regular tokens; directly after a letter, only those inside a word."""
    allowed_V = np.zeros(model.tokenizer.size, dtype=bool)
    allowed_V[model.tokenizer.regular_token_ids] = True
    is_attached = bool(before) and not before[-1].isspace() and not before.endswith(MASK)
    if is_attached and (not formatter.prefix or is_letter(before[-1])):
        continuing_V = allowed_V & ~formatter.begins_word_V
        return continuing_V if continuing_V.any() else allowed_V
    return allowed_V


def _join(before: str, after: str, token: TokenText, takes_space: bool, formatter: TokenFormatter) -> str:
    """Return the text with a token in place of a mask, with one space before the token if it needs one."""
    if token.spacing == "after-space":
        gap = "" if not before or before[-1].isspace() else " "
        return before + gap + token.letters + after
    if token.spacing == "joins" and (takes_space or formatter.prefix):
        return before.rstrip(" ") + token.letters + after
    gap = " " if formatter.prefix and formatter.needs_space(before, token) else ""
    return before + gap + token.letters + after
