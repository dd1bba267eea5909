"""Room card: what belongs in the blanks.

Comes in: a Model and text with one or more [MASK]. Goes out: for each mask the likeliest pieces with their
probabilities and the text as it would read. Called by: unmask.fill, `unmask fill`, the demo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unmask.bundle import Model
from unmask.errors import ModelError

MASK = "[MASK]"


@dataclass(frozen=True)
class Candidate:
    """A piece for one mask: `token` is the vocabulary's piece, `text` the text with that mask filled."""

    token: str
    id: int
    probability: float
    text: str


@dataclass(frozen=True)
class MaskAnswer:
    """One mask: its slot in the model's ids (special tokens counted, as transformers counts) and its candidates."""

    position: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Filled:
    """One text and the answers for its masks, in the order of the text."""

    text: str
    masks: tuple[MaskAnswer, ...]


def fill(model: Model, text: str | Sequence[str], top: int = 5) -> list[Filled]:
    """Fill every [MASK] of one text or of several; masks of one text are answered together, each on its own.

    A text longer than the model's context is answered in windows around its masks.

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
            f"top = {top} of {model.tokenizer.size} pieces", next="ask for 1 or more, at most the vocabulary"
        )
    asked: list[tuple[list[int], list[int]]] = []
    for number, one in enumerate(texts):
        ids = _ids(model, one)
        at = [slot for slot, id_ in enumerate(ids) if id_ == model.tokenizer.mask_id]
        if not at:
            raise ModelError(
                "there is no [MASK] in the text",
                where=f"text {number + 1}: {one[:60]!r}" if len(texts) > 1 else repr(one[:60]),
                next='write [MASK] where something is to be filled in: "The cat sat on the [MASK]."',
            )
        asked.append((ids, at))
    windows = [_window(ids, slot, model) for ids, at in asked for slot in at]
    answers = model.log_probabilities([ids for ids, _ in windows], [[slot] for _, slot in windows])
    filled: list[Filled] = []
    done = 0
    for one, (_, at) in zip(texts, asked, strict=True):
        masks: list[MaskAnswer] = []
        for order, slot in enumerate(at):
            values, ids = answers[done][0][: model.tokenizer.size].exp().topk(top)  # rows beyond have no piece
            done += 1
            pairs = zip(ids.tolist(), values.tolist(), strict=True)
            masks.append(MaskAnswer(slot, tuple(_candidate(model, one, order, id_, p) for id_, p in pairs)))
        filled.append(Filled(one, tuple(masks)))
    return filled


def _ids(model: Model, text: str) -> list[int]:
    # A model that others made may call its mask <mask>; a person writes [MASK] all the same.
    text = text.replace(MASK, model.tokenizer.id_to_token(model.tokenizer.mask_id))
    encoded = model.tokenizer.encode(text, model.words, specials_in_text=True)
    ids, _ = model.tokenizer.framed(encoded.ids, encoded.marks)
    return np.asarray(ids).tolist()


def _window(ids: list[int], slot: int, model: Model) -> tuple[list[int], int]:
    """The ids around one mask that the model's context holds, framed anew where they were cut."""
    context = model.context
    if len(ids) <= context:
        return ids, slot
    frame = model.tokenizer.frame
    inner, place, room = (ids[1:-1], slot - 1, context - 2) if frame else (ids, slot, context)
    first = min(max(0, place - room // 2), len(inner) - room)
    cut = inner[first : first + room]
    return ([frame[0], *cut, frame[1]], place - first + 1) if frame else (cut, place - first)


def _candidate(model: Model, text: str, order: int, id_: int, probability: float) -> Candidate:
    """The candidate with the text it makes; a piece that continues a word is joined to what stands before it."""
    token = model.tokenizer.id_to_token(id_)
    parts = text.replace(model.tokenizer.id_to_token(model.tokenizer.mask_id), MASK).split(MASK)
    before, after = MASK.join(parts[: order + 1]), MASK.join(parts[order + 1 :])
    if token.startswith("##"):
        return Candidate(token, id_, probability, before.rstrip(" ") + token[2:] + after)
    # A byte-level piece is not its own text, and may bring the space that parts it from the word before.
    shown = model.tokenizer.decode([id_], skip_specials=False)
    if shown != token and shown.startswith(" ") and before.endswith(" "):
        shown = shown[1:]
    return Candidate(token, id_, probability, before + shown + after)
