"""Room card: how a corpus is made.

Comes in: a source, settings, a tokenizer or none, an empty folder. Goes out: the folder filled: the tokenizer and what
was decided, the shards of both sides. Called by: corpus.

Three passes over the text, each unit by unit: a survey (length and hash of each document), the tokenizer's sample, the
encoding. Between them stands a decision that needs all documents: what is held out. Its columns lie in files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Final

from unmask.contracts import Group, Source
from unmask.errors import TextError
from unmask.store import seal, write_json
from unmask.text.arrays import append, mapped
from unmask.text.encoder import Encoder
from unmask.text.segmenter import version
from unmask.text.settings import TextSettings
from unmask.text.shards import Shards
from unmask.text.survey import Division, Progress, Side, Survey, divide, sizes_of
from unmask.text.tokenizer import Tokenizer, train_tokenizer
from unmask.text.units import SIDES, Result, Task, units_of, written_of
from unmask.text.words import WordsRule, detect_words
from unmask.text.workers import Workers, WorkersWanted
from unmask.text.writing import gather, merge

TOLD: Final = "told"  # the folder of the tokenizer and the facts
FACTS: Final = "facts.json"
DOCUMENTS: Final = "documents.json"  # to train on, of each part of the source
_WORK: Final = "work"
_COMPARED_LINES: Final = 500

Facts = dict[str, str | int | float]


@dataclass(frozen=True)
class Build:
    """What a corpus is made of."""

    folder: Path
    source: Source
    settings: TextSettings
    progress: Progress
    tokenizer: Tokenizer | None
    workers: WorkersWanted
    unit_bytes: int | None = None  # by the text's size


def make(build: Build) -> None:
    """Survey, divide, train the tokenizer, write both sides.

    Raises:
        TextError: text that can't be read, or nothing to train on or to hold out.
        TokenizerError: the text gives fewer pieces than the vocabulary asks for.
    """
    work = build.folder / _WORK
    work.mkdir()
    units = units_of(build.source.parts(), build.unit_bytes)
    with Workers(build.source, build.settings, build.workers, len(units)) as workers:
        tasks = [Task(unit.number, unit.parts, str(work)) for unit in units]
        surveyed = _surveyed(build, workers, tasks)
        found = _joined(work, tasks, surveyed)
        division = divide(found, build.settings.held_out, drop_duplicates=build.settings.drop_duplicates, folder=work)
        tasks = _informed(tasks, surveyed)
        kept = int(sizes_of(division.first_held_N, [0, found.documents])[0])
        words: WordsRule = detect_words(found.sample) if build.settings.words == "by-script" else build.settings.words
        tokenizer = build.tokenizer
        if tokenizer is None:
            tokenizer = _trained(build, workers, tasks, division, kept)
        tokenizer.save(build.folder / TOLD)
        by_chunks = Encoder(tokenizer, words).agrees(found.sample.split("\n")[:_COMPARED_LINES])
        tasks = [replace(task, words=words, by_chunks=by_chunks) for task in tasks]
        total = int(found.lengths_N.sum())
        answers = workers.do("encode", tasks, _teller(build.progress, "tokenizing", total))
        build.progress("tokenizing", 1.0)
    sides = _gathered(build, answers, tokenizer)
    _require_tokens(sides, build.source)
    facts: Facts = {
        "documents": found.documents,
        "characters": found.characters,
        "left_out": sum(one["left_out"] for one in surveyed),
        "drop_duplicates": build.settings.drop_duplicates,
        "duplicates": division.duplicates,
        "words": words,
        "words_by": build.settings.words,
        "held_out_by": division.by,
        "held_out_share": str(division.share),
        "held_out_digest": division.digest,
        "tokenizer": tokenizer.fingerprint,
        "vocabulary": tokenizer.size,
        "encoded_by": ("chunks" if tokenizer.splits_at_spaces else "texts") if by_chunks else "texts-after-all",
    }
    if segmenter := version(words):
        facts["segmenter"] = segmenter
    for which, shards in sides.items():
        name = which.replace("-", "_")
        facts |= {f"{name}_documents": shards.documents, f"{name}_characters": shards.characters}
        facts |= {f"{name}_tokens": shards.tokens, f"{name}_unknown_characters": shards.unknown_characters}
    write_json(build.folder / TOLD / FACTS, facts)
    write_json(build.folder / TOLD / DOCUMENTS, list(chain.from_iterable(one["train"]["documents"] for one in answers)))
    seal(build.folder / TOLD)
    del found, division  # what is mapped can't be removed everywhere
    shutil.rmtree(work)


def _teller(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    done = 0

    def tell(characters: int) -> None:
        nonlocal done
        done += characters
        progress(stage, min(0.99, done / max(1, total)))

    return tell


def _surveyed(build: Build, workers: Workers, tasks: Sequence[Task]) -> list[Result]:
    # Bytes and characters are not the same, least of all in a packed file.
    total_bytes = sum(part.last_byte - part.first_byte for task in tasks for part in task.parts)
    surveyed = workers.do("survey", tasks, _teller(build.progress, "reading the text", total_bytes))
    build.progress("reading the text", 1.0)
    return surveyed


def _joined(work: Path, tasks: Sequence[Task], surveyed: Sequence[Result]) -> Survey:
    """What was found in all units, as one."""
    for name in ("lengths", "hashes"):
        append(work / name, [task.file(name) for task in tasks])
    characters = sum(one["characters"] for one in surveyed)
    sample = surveyed[0]["sample"] if surveyed else ""
    return Survey(mapped(work / "lengths"), mapped(work / "hashes", "<u8"), characters, sample)


def _informed(tasks: Sequence[Task], surveyed: Sequence[Result]) -> list[Task]:
    """The tasks, each with its place among all documents."""
    firsts = accumulate((sum(one["documents"]) for one in surveyed), initial=0)
    return [
        replace(task, first_document=first, documents=one["documents"])
        for task, one, first in zip(tasks, surveyed, firsts, strict=False)
    ]


def _trained(build: Build, workers: Workers, tasks: Sequence[Task], division: Division, kept: int) -> Tokenizer:
    """A tokenizer that has learnt from training text: all of it, or as much as it looks at."""
    settings = build.settings.tokenizer
    wanted = getattr(settings, "sample_characters", kept)
    tasks = _with_shares(build.source, tasks, division, wanted, kept)
    stage = "training the tokenizer"
    build.progress(stage, 0.0)
    if workers.count == 1:
        texts = chain.from_iterable(workers.hand.sample(task, _nothing) for task in tasks)
    else:
        workers.do("sample", tasks, _nothing)
        texts = chain.from_iterable(_read_sample(task) for task in tasks)
    tokenizer = train_tokenizer(texts, settings, build.progress)
    build.progress(stage, 1.0)
    return tokenizer


def _nothing(characters: int) -> None:
    """The tokenizer itself tells how far it is."""


def _with_shares(source: Source, tasks: Sequence[Task], division: Division, wanted: int, kept: int) -> list[Task]:
    """The tasks, each with how much of its parts the tokenizer learns from: of weighted texts as their weights are."""
    parts = sum(len(task.parts) for task in tasks)
    shares = [wanted / max(1, kept)] * parts
    groups: Sequence[Group] = getattr(source, "groups", ())
    total = sum(group.weight for group in groups)
    if total:
        documents = list(accumulate(chain.from_iterable(task.documents for task in tasks), initial=0))
        borders = list(accumulate((group.parts for group in groups), initial=0))
        sizes = sizes_of(division.first_held_N, [documents[border] for border in borders])
        shares = list(
            chain.from_iterable(
                [wanted * group.weight / total / max(1, size)] * group.parts
                for group, size in zip(groups, sizes, strict=True)
            )
        )
    firsts = accumulate((len(task.parts) for task in tasks), initial=0)
    return [
        replace(task, shares=shares[first : first + len(task.parts)])
        for task, first in zip(tasks, firsts, strict=False)
    ]


def _read_sample(task: Task) -> Iterator[str]:
    with task.file("sample").open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
    task.file("sample").unlink()


def _gathered(build: Build, answers: Sequence[Result], tokenizer: Tokenizer) -> dict[Side, Shards]:
    """The shards of both sides, of all units."""
    sides: dict[Side, Shards] = {}
    for which in SIDES:
        written = [written_of(answer, which) for answer in answers]
        if which == "held-out" and len(written) > 1:  # a little from each unit
            written = [merge(build.folder / _WORK / "held-out", written, tokenizer.size)]
        (build.folder / which).mkdir()
        gather(build.folder / which, written, tokenizer.size, tokenizer.fingerprint)
        sides[which] = Shards(build.folder / which)
    return sides


def _require_tokens(sides: dict[Side, Shards], source: Source) -> None:
    if not sides["train"].tokens:
        raise TextError(
            "there is no text left to train on",
            where=places(source),
            next="give more text, or hold out less: --set text.held_out.share=5%",
        )
    if not sides["held-out"].tokens:
        raise TextError(
            "there is no text to hold out for validation",
            where=places(source),
            next="give more text, or hold out more: --set text.held_out.share=20%",
        )


def places(source: Source) -> str:
    """Where a source's text lies, for a message: its first files, and how many more there are."""
    files = list(dict.fromkeys(part.path for part in source.parts()))
    further = len(files) - 3
    return ", ".join(files[:4]) if further <= 1 else f"{', '.join(files[:3])} and {further} more"
