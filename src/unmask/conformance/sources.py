"""Room card: what contracts.Source promises, law by law.

Comes in: ways to make the source, and variants of it whose text or settings differ. Goes out: SOURCE_LAWS, judged by
laws.judge. Called by: check, tests/contracts.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from unmask.conformance.laws import Law, is_a, law, require
from unmask.contracts import Part, Passage, Source

SOURCE_LAWS: Final[list[Law[SourceSubject]]] = []
PASSAGE_CHARACTERS: Final = 1_000_000
MOST_CHARACTERS: Final = 5_000_000  # read of a part, at most: laws that hold so far hold
_PARTS: Final = 20

Read = dict[Part, list[Passage]]


@dataclass(frozen=True)
class SourceSubject:
    """A source, as it is made, and others that differ from it by a setting or by their text."""

    source_of: Callable[[], Source]
    variants: Sequence[tuple[str, Callable[[], Source]]] = ()  # what is different, and the source that has it


def read(source: Source, *, backwards: bool = False) -> Read:
    """The passages of each part, of each as far as the laws look."""
    parts = list(source.parts())[:_PARTS]
    found = {part: _passages(source, part) for part in (reversed(parts) if backwards else parts)}
    return {part: found[part] for part in parts}


def _passages(source: Source, part: Part) -> list[Passage]:
    held: list[Passage] = []
    characters = 0
    for passage in source.documents(part):
        held.append(passage)
        characters += len(passage.text)
        if characters > MOST_CHARACTERS:
            break
    return held


def _whole(source: Source, part: Part, held: Sequence[Passage]) -> bool:
    return sum(len(passage.text) for passage in held) <= MOST_CHARACTERS


@law(SOURCE_LAWS)
def parts_come_in_a_fixed_order(subject: SourceSubject) -> None:
    """`parts` gives the same pieces in the same order each time, each once, at least one."""
    source = subject.source_of()
    first = list(source.parts())
    require(bool(first), "there is no part")
    wrong = [type(part).__name__ for part in first if not is_a(part, Part)]
    require(not wrong, f"a part is a {wrong[:1]}, not a unmask.contracts.Part")
    require(len(set(first)) == len(first), "a part comes twice")
    require(first == list(source.parts()), "another order the second time")
    require(first == list(subject.source_of().parts()), "another order from a source made anew")


@law(SOURCE_LAWS)
def documents_are_the_same_each_time(subject: SourceSubject) -> None:
    """A part's passages are the same whenever they are read, whatever was read before, also from a source made anew."""
    source = subject.source_of()
    first = read(source)
    require(read(source) == first, "the second reading gave other passages than the first")
    require(read(source, backwards=True) == first, "read with the last part first, the passages are others")
    require(read(subject.source_of()) == first, "a source made anew gives other passages")


@law(SOURCE_LAWS)
def passages_come_in_order(subject: SourceSubject) -> None:
    """Documents of a part are numbered from 0 on, their passages too, and the last passage of each says so."""
    source = subject.source_of()
    for part, passages in read(source).items():
        document = piece = 0
        for number, passage in enumerate(passages):
            require(is_a(passage, Passage), f"{part.path}: `documents` gives a {type(passage).__name__}")
            place = f"{part.path}, passage {number}"
            wanted, got = (document, piece), (passage.document, passage.piece)
            require(got == wanted, f"{place}: document and piece are {got} where {wanted} come next")
            document, piece = (document + 1, 0) if passage.last else (document, piece + 1)
        ended = not passages or passages[-1].last or not _whole(source, part, passages)
        require(ended, f"{part.path}: the last document never ends (`last` is false)")


@law(SOURCE_LAWS)
def text_is_text(subject: SourceSubject) -> None:
    """Text can be written as UTF-8, is NFC, and there is some that is not blank."""
    seen = False
    for part, passages in read(subject.source_of()).items():
        for number, passage in enumerate(passages):
            place = f"{part.path}, passage {number}"
            require(is_a(passage.text, str), f"{place}: `text` is a {type(passage.text).__name__}")
            lone = [letter for letter in passage.text if "\ud800" <= letter <= "\udfff"]
            require(not lone, f"{place}: half of a surrogate pair, {lone[:1]!r}, which is no character")
            normal = unicodedata.is_normalized("NFC", passage.text)
            require(normal, f'{place}: not NFC; give unicodedata.normalize("NFC", text)')
            seen = seen or bool(passage.text.strip())
    require(seen, "there is nothing but white space")


@law(SOURCE_LAWS)
def passages_are_bounded(subject: SourceSubject) -> None:
    """No passage is longer than a million characters, and each says for how many it stands."""
    for part, passages in read(subject.source_of()).items():
        for number, passage in enumerate(passages):
            place, size = f"{part.path}, passage {number}", len(passage.text)
            require(size <= PASSAGE_CHARACTERS, f"{place}: {size:,} characters; give a document in several passages")
            told = passage.characters
            require(type(told) is int and told >= 0, f"{place}: `characters` is {told!r}")
            require(bool(told) or not size, f"{place}: stands for 0 characters and has {size}")


@law(SOURCE_LAWS)
def a_fingerprint_is_stable(subject: SourceSubject) -> None:
    """The fingerprint is a text that stays, before and after reading and for a source made anew."""
    source = subject.source_of()
    first = source.fingerprint
    require(is_a(first, str) and bool(first), f"`fingerprint` is {first!r}")
    read(source)
    require(source.fingerprint == first, "reading the source changed its fingerprint")
    require(subject.source_of().fingerprint == first, "a source made anew has another fingerprint")


@law(SOURCE_LAWS)
def a_fingerprint_changes_with_the_text(subject: SourceSubject) -> None:
    """Where a setting or a file gives other text, the fingerprint is another: caches and resuming go by it."""
    source = subject.source_of()
    seen = {source.fingerprint: ("as it is", list(read(source).values()))}
    for what, source_of in subject.variants:
        try:
            source = source_of()
            fingerprint, texts = source.fingerprint, list(read(source).values())
        except Exception:  # what is refused, in whatever way, nobody can train on
            continue
        before = seen.setdefault(fingerprint, (what, texts))
        require(before[1] == texts, f"one fingerprint for two texts: {before[0]}, and {what}")
