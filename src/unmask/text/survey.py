"""Room card: how much text there is, and which of it is held out.

Comes in: a source, the settings of what is held out. Goes out: a Survey (24 bytes per document), a Division of every
document into training and held-out characters, and the text of either side. Called by: corpus.

By "hash", whole documents are held out: in the order of the hash of their text, each that fits into what may be held
out; copies of one text fall on one side. By "tail", the last part of every document is held out, for corpora of few
documents.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from unmask.contracts import Passage, Source
from unmask.errors import TextError
from unmask.recipe import Share
from unmask.text.settings import HeldOutSettings

FEW_DOCUMENTS: Final = 100  # below, one document more or less would decide what is measured
_SHARES: Final = {"hash": Share(0.01), "tail": Share(0.10)}
_SAMPLE_CHARACTERS: Final = 1_000_000
_REPORT_CHARACTERS: Final = 1_000_000

Side = Literal["train", "held-out"]
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Survey:
    """What one pass over a source found."""

    lengths_N: Int[np.ndarray, "N"]  # characters of each document's text
    hashes_N: NDArray[np.uint64]  # of each document's text
    characters: int  # of all documents, what parts them included
    sample: str  # how the text begins

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.lengths_N)


@dataclass(frozen=True)
class Division:
    """From which character on each document is held out: from the first, from its end (not at all), or in between."""

    by: Literal["hash", "tail"]
    share: Share
    first_held_N: Int[np.ndarray, "N"]

    @property
    def digest(self) -> str:
        """The same for two divisions that hold out the same characters of the same documents."""
        return hashlib.blake2b(np.ascontiguousarray(self.first_held_N, "<i8").data, digest_size=8).hexdigest()


class Stretch(NamedTuple):
    """Part of a document that lies on one side."""

    document: int
    piece: int
    text: str
    characters: int
    last: bool  # whether the document's part on this side ends here


def _numbered(source: Source) -> Iterator[tuple[int, Passage]]:
    """All passages, with the number of their document among all parts."""
    document = 0
    for part in source.parts():
        for passage in source.documents(part):
            yield document, passage
            document += passage.last


def survey(source: Source, progress: Progress) -> Survey:
    """Read everything once.

    Raises:
        TextError: something can't be read.
    """
    lengths, hashes = array("q"), array("Q")
    characters, reported, length = 0, 0, 0
    sample: list[str] = []
    state = hashlib.blake2b(digest_size=8)
    total_bytes = sum(part.last_byte - part.first_byte for part in source.parts())
    for _, passage in _numbered(source):
        if characters < _SAMPLE_CHARACTERS:
            sample.append(passage.text)
        state.update(passage.text.encode("utf-8", "surrogatepass"))
        length += len(passage.text)
        characters += passage.characters
        if characters - reported >= _REPORT_CHARACTERS:
            reported = characters
            # Bytes and characters are not the same, least of all in a packed file; the end is reported below.
            progress("reading the text", min(0.99, characters / max(1, total_bytes)))
        if passage.last:
            lengths.append(length)
            hashes.append(int.from_bytes(state.digest(), "little"))
            length, state = 0, hashlib.blake2b(digest_size=8)
    progress("reading the text", 1.0)
    return Survey(
        np.array(lengths, dtype=np.int64),
        np.array(hashes, dtype=np.uint64),
        characters,
        "\n".join(sample)[:_SAMPLE_CHARACTERS],
    )


def divide(found: Survey, settings: HeldOutSettings) -> Division:
    """Decide for every document what of it is held out.

    Raises:
        TextError: by hash, nothing would be left to train on.
    """
    by = settings.by
    if by == "count-decides":
        by = "hash" if found.documents >= FEW_DOCUMENTS else "tail"
    share = settings.share if isinstance(settings.share, Share) else _SHARES[by]
    lengths_N = found.lengths_N
    if by == "tail":
        # Rounded first: 100 × (1 - 0.07) is 92.99999999999999 in floating point.
        kept_N = np.floor(np.round(lengths_N * (1 - share.fraction), 6)).astype(np.int64)
        return Division(by, share, kept_N)
    full_N = lengths_N > 0
    distinct_K, group_N = np.unique(found.hashes_N[full_N], return_inverse=True)
    if len(distinct_K) < 2:
        raise TextError(
            f"there is nothing to divide by hash: {found.documents:,} documents, {len(distinct_K)} of them different",
            next="hold out the end of every document (--set text.held_out.by=tail), or make documents smaller "
            "(--set text.document=line)",
        )
    sizes_K = np.bincount(group_N.ravel(), weights=lengths_N[full_N])
    held_K = _fitting(sizes_K.astype(np.int64), min(share.fraction * found.characters, settings.at_most.number))
    first_held_N = lengths_N.copy()
    first_held_N[full_N] = np.where(held_K[group_N.ravel()], 0, lengths_N[full_N])
    return Division(by, share, first_held_N)


def _fitting(sizes_K: Int[np.ndarray, "K"], most: float) -> NDArray[np.bool_]:
    """Which groups are held out: in their order, each that fits into what is left of `most`; at least one, never all.

    Where none fits, it is the smallest: something must be measured, and the least text is lost to training that way.
    """
    held_K = np.zeros(len(sizes_K), dtype=np.bool_)
    left = most
    waiting = np.flatnonzero(sizes_K <= left)
    while len(waiting):
        # All up to the first that doesn't fit, at once; that one is passed over, and so is all that can't fit any more.
        sums = np.cumsum(sizes_K[waiting])
        fitting = int(np.searchsorted(sums, left, side="right"))
        held_K[waiting[:fitting]] = True
        left -= int(sums[fitting - 1])
        waiting = waiting[fitting + 1 :]
        waiting = waiting[sizes_K[waiting] <= left]
    if not held_K.any():
        held_K[np.argmin(sizes_K)] = True
    if held_K.all():
        held_K[-1] = False
    return held_K


def side(source: Source, found: Survey, division: Division, which: Side) -> Iterator[Stretch]:
    """The text of one side, document by document; a document with nothing on this side is left out.

    Both sides together have all characters of the source; what parts two documents goes with the end of the first.

    Raises:
        TextError: the text is no longer what the survey found.
    """
    position = 0
    for document, passage in _numbered(source):
        if document >= found.documents or position + len(passage.text) > found.lengths_N[document]:
            raise TextError("the text has changed while it was read", next="start again")
        whole, held_from = int(found.lengths_N[document]), int(division.first_held_N[document])
        end = position + len(passage.text)
        cut = min(max(held_from - position, 0), len(passage.text))
        is_split = held_from < whole
        if which == "train" and whole and (position < held_from or not is_split):
            characters = passage.characters if not is_split or end <= held_from else cut
            is_last = end >= held_from if is_split else passage.last
            yield Stretch(document, passage.piece, passage.text[:cut], characters, is_last)
        elif which == "held-out" and is_split and (end > held_from or passage.last):
            characters = passage.characters - (cut if position < held_from else 0)
            yield Stretch(document, passage.piece, passage.text[cut:], characters, passage.last)
        position = 0 if passage.last else end
