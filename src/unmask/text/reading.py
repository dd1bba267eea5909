"""Room card: a second reading of a text, for what the survey doesn't look at.

Comes in: a source and its Survey. Goes out: its characters, a sample of about so many of them, how some documents
begin, the sizes of several texts. In memory are the sample and counts, whatever the text's size. Called by: report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from unmask import rng
from unmask.contracts import Group, Passage, Source
from unmask.errors import TextError
from unmask.text.corpus import CorpusGroup
from unmask.text.letters import Letters
from unmask.text.survey import Progress, Survey

_EXAMPLES: Final = 5
_EXAMPLE_CHARACTERS: Final = 2_000
_QUOTED_CHARACTERS: Final = 60
_REPORT_CHARACTERS: Final = 1_000_000


@dataclass(frozen=True)
class NamedText:
    """One of several texts."""

    name: str
    weight: float  # 0: none was given
    documents: int
    characters: int


class Reading:
    """One more reading of a text that was surveyed; the whole of it happens when this is made."""

    def __init__(self, source: Source, found: Survey, seed: int, wanted: int, progress: Progress) -> None:
        """`wanted` is the characters of the sample, about; `seed` says which documents are drawn."""
        self.letters = Letters()
        self.sample: list[str] = []
        self.shown: dict[int, str] = {}  # document -> how it begins
        self.copy = ""
        self.texts: list[NamedText] = []
        self.groups: list[CorpusGroup] = []
        self._found, self._wanted = found, wanted
        whole = int(found.lengths_N.sum())
        share = wanted / whole
        drawn_N = rng.uniform(seed, "look", np.arange(found.documents)) < share
        full = np.flatnonzero(found.lengths_N)
        chosen = rng.permute(np.arange(min(_EXAMPLES, len(full))), len(full), seed, "look") if len(full) else full
        self._shown = set(full[chosen].tolist())
        self.sample_characters = 0
        self._copied = _most_copied(found)
        done = reported = 0
        for document, passage in self._documents(source):
            self.letters.add(passage.text)
            # Further pieces of a long document are drawn one by one: they are long, so there are few of them.
            if share >= 1 or (
                rng.uniform(seed, "look", document, passage.piece)[0] < share if passage.piece else drawn_N[document]
            ):
                self._take(passage.text)
            if not passage.piece:
                self._remember(document, passage.text)
            done += len(passage.text)
            if done - reported >= _REPORT_CHARACTERS:
                reported = done
                progress("looking at its characters", min(0.99, done / whole))
        progress("looking at its characters", 1.0)
        if not self.sample:
            self.sample.append(found.sample)

    def _take(self, text: str) -> None:
        """Into the sample, which a chance of the draw doesn't make more than twice as large as it should be."""
        if self.sample_characters + len(text) <= 2 * self._wanted:
            self.sample.append(text)
            self.sample_characters += len(text)

    def _remember(self, document: int, text: str) -> None:
        if document in self._shown:
            self.shown[document] = text[:_EXAMPLE_CHARACTERS]
        if document == self._copied:
            self.copy = text[:_QUOTED_CHARACTERS]

    def _documents(self, source: Source) -> Iterator[tuple[int, Passage]]:
        """All passages with the number of their document, text by text."""
        parts = list(source.parts())
        groups: Sequence[Group] = getattr(source, "groups", ()) or (Group("text", 0.0, len(parts)),)
        document = part = 0
        for group in groups:
            first, characters = document, 0
            for one in parts[part : part + group.parts]:
                for passage in source.documents(one):
                    if document >= self._found.documents:
                        raise TextError("the text has changed while it was read", next="start again")
                    yield document, passage
                    characters += passage.characters
                    document += passage.last
            part += group.parts
            self.texts.append(NamedText(group.name, group.weight, document - first, characters))
            self.groups.append(CorpusGroup(group.name, group.weight, first, document))


def _most_copied(found: Survey) -> int:
    """The first document of the text that occurs most often; -1 where all differ."""
    full = np.flatnonzero(found.lengths_N)
    _, first, count = np.unique(found.hashes_N[full], return_index=True, return_counts=True)
    if not len(count) or count.max() < 2:
        return -1
    return int(full[first[np.argmax(count)]])
