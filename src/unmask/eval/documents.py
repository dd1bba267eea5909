"""Room card: text that a model is judged by, as tokens in hand.

Comes in: a source of text or token shards, a tokenizer, the rule that says where words start. Goes out: its documents
as tokens, and how much of the source that is: all of it, or what its first so many characters hold. Called by: workshop
(the held-out text, validation sets), evaluate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from unmask.contracts import Passage, Source
from unmask.errors import TextError
from unmask.eval.heldout import Document
from unmask.text.shards import Shards
from unmask.text.tokenizer import Tokenizer
from unmask.text.words import WordsRule

_BATCH_CHARACTERS: Final = 1_000_000  # encoded at a time; what an encoding holds is many times its text
_BATCH_PASSAGES: Final = 8192


@dataclass(frozen=True)
class Gathered:
    """Documents in hand, and what of the source they are."""

    documents: Sequence[Document]
    characters: int  # of the source, what parts its documents included
    whole: bool  # whether the source was read to its end


def documents_of_source(
    source: Source, tokenizer: Tokenizer, words: WordsRule, at_most: float = float("inf")
) -> Gathered:
    """The first `at_most` characters of a source as tokens; memory is bounded by them.

    Raises:
        TextError: the text can't be read.
    """
    documents: list[Document] = []
    open_pieces: list[Document] = []  # of a document whose end has not come yet
    taken, whole = 0, True
    for held in _batches(source):
        last: list[Passage] = []
        for passage in held:
            left = at_most - taken
            if passage.characters > left:
                passage, whole = passage._replace(text=passage.text[: int(left)], characters=int(left)), False
            last.append(passage)
            taken += passage.characters
            if not whole:
                break
        for passage, encoded in zip(last, tokenizer.encode_batch([one.text for one in last], words), strict=True):
            open_pieces.append(Document(encoded.ids, encoded.marks, passage.characters, encoded.characters_unknown))
            if passage.last or (not whole and passage is last[-1]):
                documents.append(_joined(open_pieces))
                open_pieces = []
        if not whole:
            break
    return Gathered([one for one in documents if one.characters], taken, whole)


def _batches(source: Source) -> Iterator[list[Passage]]:
    """The passages of a source, some at a time."""
    held: list[Passage] = []
    size = 0
    for part in source.parts():
        for passage in source.documents(part):
            held.append(passage)
            size += len(passage.text)
            if size >= _BATCH_CHARACTERS or len(held) >= _BATCH_PASSAGES:
                yield held
                held, size = [], 0
    yield held


def documents_of_shards(shards: Shards) -> list[Document]:
    """The documents of a shard set with something in them, in hand.

    Raises:
        TextError: there is nothing in it.
    """
    characters, unknown = shards.characters_N.tolist(), shards.unknown_characters_N.tolist()
    lengths = shards.lengths_N.tolist()
    documents = [
        Document(shards.ids(number, 0, length), shards.marks(number, 0, length), characters[number], unknown[number])
        for number, length in enumerate(lengths)
    ]
    if not any(lengths):
        raise TextError("the held-out text is empty", next="hold out more: --set text.held_out.share=10%")
    return documents


def _joined(pieces: Sequence[Document]) -> Document:
    """The passages of one document as one."""
    if len(pieces) == 1:
        return pieces[0]
    return Document(
        np.concatenate([piece.ids for piece in pieces]),
        np.concatenate([piece.marks for piece in pieces]),
        sum(piece.characters for piece in pieces),
        sum(piece.unknown_characters for piece in pieces),
    )
