"""Room card: what belongs in the blanks.

Comes in: a Model and text with one or more [MASK]. Goes out: for each mask the likeliest pieces with their
probabilities and the text as it would read. Called by: unmask.fill, `unmask fill`, the demo.
"""

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
from unmask.tokenization.words import is_letter, stands_without_spaces

MASK = "[MASK]"
_LETTERS = "aeinorst가나다라이"  # one of them is a piece that begins a word in almost every vocabulary


@dataclass(frozen=True)
class Candidate:
    """A piece for one mask: `token` is the vocabulary's piece, `text` the text with that mask filled."""

    token_str: str
    id: int
    score: float
    sequence: str
    shown: str  # the piece for a person: ␣ for its space, ⟨E5 A4⟩ for bytes that are no letter by themselves


@dataclass(frozen=True)
class MaskPrediction:
    """One mask: its slot in the model's ids (special tokens counted, as transformers counts) and its candidates."""

    position: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class FillMaskResult:
    """One text and the answers for its masks, in the order of the text."""

    text: str
    masks: tuple[MaskPrediction, ...]


def fill(model: Model, text: str | Sequence[str], top: int = 5) -> list[FillMaskResult]:
    """Fill every [MASK] of one text or of several; masks of one text are answered together, each on its own.

    A text longer than the model's context is answered in windows around its masks. A mask right behind a letter
    ("서울[MASK]") is filled with pieces that go on there; those that begin a new word are left out, as special pieces
    are everywhere, and the others keep their probabilities.

    Args:
        model: what `unmask.load` gave.
        text: one text or several, each with at least one [MASK].
        top: candidates per mask.

    Raises:
        ModelError: a text without [MASK] (its number is named), `top` below 1 or above the vocabulary.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not 1 <= top <= model.tokenizer.size:
        raise ModelError(
            f"top = {top} of {model.tokenizer.size} pieces", hint="ask for 1 or more, at most the vocabulary"
        )
    reader = TokenFormatter(model.tokenizer)
    asked: list[tuple[list[int], list[int]]] = []
    for number, one in enumerate(texts):
        ids = _ids(model, one, reader)
        at = [slot for slot, id_ in enumerate(ids) if id_ == model.tokenizer.mask_id]
        if not at:
            raise ModelError(
                "there is no [MASK] in the text",
                location=f"text {number + 1}: {one[:60]!r}" if len(texts) > 1 else repr(one[:60]),
                hint='write [MASK] where something is to be filled in: "The cat sat on the [MASK]."',
            )
        asked.append((ids, at))
    windows = [_window(ids, slot, model) for ids, at in asked for slot in at]
    answers = iter(model.log_probabilities([ids for ids, _ in windows], [[slot] for _, slot in windows]))
    filled: list[FillMaskResult] = []
    for one, (_, at) in zip(texts, asked, strict=True):
        masks = [
            MaskPrediction(slot, _best(model, one, order, next(answers)[0], top, reader))
            for order, slot in enumerate(at)
        ]
        filled.append(FillMaskResult(one, tuple(masks)))
    return filled


def _best(
    model: Model, text: str, order: int, row_V: Tensor, top: int, reader: TokenFormatter
) -> tuple[Candidate, ...]:
    """The likeliest pieces for one mask, each with the text that it makes."""
    tokenizer = model.tokenizer
    parts = text.replace(tokenizer.id_to_token(tokenizer.mask_id), MASK).split(MASK)
    before, after = MASK.join(parts[: order + 1]), MASK.join(parts[order + 1 :])
    allowed_V = torch.from_numpy(_allowed(model, before, reader))
    chances_V = row_V[: tokenizer.size].exp()  # rows beyond have no piece
    found = torch.where(allowed_V, chances_V, -1.0).topk(min(top, int(allowed_V.sum())))
    return tuple(
        Candidate(
            tokenizer.id_to_token(id_),
            id_,
            chance,
            _filled(before, after, reader.read(id_), tokenizer.mask_takes_space, reader),
            reader.shown(id_),
        )
        for id_, chance in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    )


def _ids(model: Model, text: str, reader: TokenFormatter) -> list[int]:
    # A model that others made may call its mask <mask>; a person writes [MASK] all the same.
    tokenizer = model.tokenizer
    text = text.replace(MASK, tokenizer.id_to_token(tokenizer.mask_id))
    encoded = tokenizer.encode(text, specials_in_text=True)  # ids depend on no rule for words, nor on its package
    ids = _continued(tokenizer, text) if reader.prefix else encoded.ids
    framed, _ = tokenizer.add_special_tokens(ids, np.zeros(len(ids), dtype=np.uint8))
    return framed.tolist()


def _continued(tokenizer: Tokenizer, text: str) -> NDArray[np.int64]:
    """The ids of a text whose letters right behind a mask continue its word: 에서 of "[MASK]에서" is ##에서.

    The tokenizer would take them for a new word, which the model has never seen there. So they are encoded behind a
    letter, which is taken away again.
    """
    first, *others = text.split(tokenizer.id_to_token(tokenizer.mask_id))
    parts = [tokenizer.encode(first, specials_in_text=True).ids]
    for part in others:
        ids = tokenizer.encode(part, specials_in_text=True).ids
        if part and is_letter(part[0]) and not stands_without_spaces(part[0]):
            for letter in _LETTERS:
                behind = tokenizer.encode(letter + part, specials_in_text=True)
                if len(behind.ids) > 1 and behind.offsets[0].tolist() == [0, 1] and not behind.marks[1] & WORD_START:
                    ids = behind.ids[1:]
                    break
        parts += [np.array([tokenizer.mask_id], dtype=np.int64), ids]
    return np.concatenate(parts)


def _window(ids: list[int], slot: int, model: Model) -> tuple[list[int], int]:
    """The ids around one mask that the model's context holds, framed anew where they were cut."""
    context = model.context
    if len(ids) <= context:
        return ids, slot
    frame = model.tokenizer.cls_sep_ids
    inner, place, room = (ids[1:-1], slot - 1, context - 2) if frame else (ids, slot, context)
    first = min(max(0, place - room // 2), len(inner) - room)
    cut = inner[first : first + room]
    return ([frame[0], *cut, frame[1]], place - first + 1) if frame else (cut, place - first)


def _allowed(model: Model, before: str, reader: TokenFormatter) -> NDArray[np.bool_]:
    """Which pieces can stand behind this text: ordinary ones; right behind a letter, none that begins a new word."""
    allowed_V = np.zeros(model.tokenizer.size, dtype=bool)
    allowed_V[model.tokenizer.regular_token_ids] = True
    is_glued = bool(before) and not before[-1].isspace() and not before.endswith(MASK)
    if is_glued and (not reader.prefix or is_letter(before[-1])):
        goes_on_V = allowed_V & ~reader.begins_word_V
        return goes_on_V if goes_on_V.any() else allowed_V
    return allowed_V


def _filled(before: str, after: str, piece: TokenText, takes_space: bool, reader: TokenFormatter) -> str:
    """The text with a piece in the place of a mask: one space where there should be one, none where not."""
    if piece.stand == "after-space":
        gap = "" if not before or before[-1].isspace() else " "
        return before + gap + piece.letters + after
    if piece.stand == "joins" and (takes_space or reader.prefix):
        return before.rstrip(" ") + piece.letters + after
    gap = " " if reader.prefix and reader.needs_space(before, piece) else ""
    return before + gap + piece.letters + after
