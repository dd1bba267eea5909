"""Room card: how a corpus is made.

Comes in: a source, settings, a tokenizer or none, an empty folder. Goes out: the folder filled: the tokenizer and what
was decided, the shards of both sides. Called by: corpus.

Three passes over the text, each unit by unit: a survey (length and hash of each document), the tokenizer's sample, the
encoding. Between them stands a decision that needs all documents: what is held out. Its columns lie in files.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import unicodedata
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Final, cast

import tokenizers
from filelock import FileLock, Timeout

from unmask.core.errors import DamagedError, StoreError, TextError
from unmask.core.files import (
    DIGESTS,
    atomic_directory,
    digest,
    read_json,
    verify_manifest,
    wrap_os_errors,
    write_json,
    write_manifest,
)
from unmask.core.plugins import PluginSourceConfig, plugin_facts
from unmask.core.types import InputGroup, Source
from unmask.data.settings import DataConfig, FilesConfig, WindowsConfig
from unmask.data.shards import Shards, append, gather, mapped, merge, open_shards
from unmask.data.sources import FileSource, MemorySource
from unmask.data.split import DocumentStats, Progress, Split, SplitName, divide, sizes_of
from unmask.data.workers import SIDES, Result, Task, Workers, WorkersWanted, units_of, written_of
from unmask.tokenization.fast_encode import CachedEncoder
from unmask.tokenization.settings import ExtendedTokenizerConfig, FileTokenizerConfig, WordPieceConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer
from unmask.tokenization.words import WordsRule, detect_words, in_words, version

META: Final = "told"  # the folder of the tokenizer and the facts
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
    settings: DataConfig
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
        words: WordsRule = detect_words(found.sample) if build.settings.words == "auto" else build.settings.words
        tokenizer = build.tokenizer
        if tokenizer is None:
            tokenizer = _trained(build, workers, tasks, division, kept)
        tokenizer.save(build.folder / META)
        by_chunks = CachedEncoder(tokenizer, words).agrees(found.sample.split("\n")[:_COMPARED_LINES])
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
    write_json(build.folder / META / FACTS, facts)
    write_json(build.folder / META / DOCUMENTS, list(chain.from_iterable(one["train"]["documents"] for one in answers)))
    write_manifest(build.folder / META)
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


def _joined(work: Path, tasks: Sequence[Task], surveyed: Sequence[Result]) -> DocumentStats:
    """What was found in all units, as one."""
    for name in ("lengths", "hashes"):
        append(work / name, [task.file(name) for task in tasks])
    characters = sum(one["characters"] for one in surveyed)
    sample = surveyed[0]["sample"] if surveyed else ""
    return DocumentStats(mapped(work / "lengths"), mapped(work / "hashes", "<u8"), characters, sample)


def _informed(tasks: Sequence[Task], surveyed: Sequence[Result]) -> list[Task]:
    """The tasks, each with its place among all documents."""
    firsts = accumulate((sum(one["documents"]) for one in surveyed), initial=0)
    return [
        replace(task, first_document=first, documents=one["documents"])
        for task, one, first in zip(tasks, surveyed, firsts, strict=False)
    ]


def _trained(build: Build, workers: Workers, tasks: Sequence[Task], division: Split, kept: int) -> Tokenizer:
    """A tokenizer that has learnt from training text: all of it, or as much as it looks at."""
    settings = build.settings.tokenizer
    wanted = getattr(settings, "max_train_chars", kept)
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


def _with_shares(source: Source, tasks: Sequence[Task], division: Split, wanted: int, kept: int) -> list[Task]:
    """The tasks, each with how much of its parts the tokenizer learns from: of weighted texts as their weights are."""
    parts = sum(len(task.parts) for task in tasks)
    shares = [wanted / max(1, kept)] * parts
    groups: Sequence[InputGroup] = getattr(source, "groups", ())
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


def _gathered(build: Build, answers: Sequence[Result], tokenizer: Tokenizer) -> dict[SplitName, Shards]:
    """The shards of both sides, of all units."""
    sides: dict[SplitName, Shards] = {}
    for which in SIDES:
        written = [written_of(answer, which) for answer in answers]
        if which == "held-out" and len(written) > 1:  # a little from each unit
            written = [merge(build.folder / _WORK / "held-out", written, tokenizer.size)]
        (build.folder / which).mkdir()
        gather(build.folder / which, written, tokenizer.size, tokenizer.fingerprint)
        sides[which] = Shards(build.folder / which)
    return sides


def _require_tokens(sides: dict[SplitName, Shards], source: Source) -> None:
    if not sides["train"].tokens:
        raise TextError(
            "there is no text left to train on",
            location=places(source),
            hint="give more text, or hold out less: --set data.held_out.fraction=5%",
        )
    if not sides["held-out"].tokens:
        raise TextError(
            "there is no text to hold out for validation",
            location=places(source),
            hint="give more text, or hold out more: --set data.held_out.fraction=20%",
        )


def places(source: Source) -> str:
    """Where a source's text lies, for a message: its first files, and how many more there are."""
    files = list(dict.fromkeys(part.path for part in source.parts()))
    further = len(files) - 3
    return ", ".join(files[:4]) if further <= 1 else f"{', '.join(files[:3])} and {further} more"


_FORMAT: Final = "corpus-4"
_PATIENCE_SECONDS: Final = 2.0


@dataclass(frozen=True)
class CorpusGroup:
    """One of the texts that a person named."""

    name: str
    weight: float  # 0: none was given
    first_document: int  # of Corpus.train
    last_document: int  # the first that is not its own any more


@dataclass(frozen=True)
class TokenizedCorpus:
    """Text made ready for training."""

    train: Shards
    held_out: Shards
    tokenizer: Tokenizer
    words: WordsRule
    facts: Facts  # what was found and decided
    notes: Sequence[str]  # the same, in sentences
    fingerprint: str  # changes with the text, what was decided, or the tokenizer
    groups: Sequence[CorpusGroup]
    folder: Path


def quiet(stage: str, share: float) -> None:
    """Progress that nobody watches."""


def prepare(
    source: Source,
    settings: DataConfig,
    cache: Path,
    progress: Progress = quiet,
    tokenizer: Tokenizer | None = None,
    workers: WorkersWanted = "all cores",
) -> TokenizedCorpus:
    """Tokenize a source, or open what an earlier call made of it.

    Args:
        source: the text, opened with these settings.
        settings: how it is read.
        cache: where the result is kept.
        progress: told what is being done and which share of it is.
        tokenizer: one that exists; without it one is trained on the training text.
        workers: processes that work at once where the text is long; the result is the same.

    Raises:
        TextError: text that can't be read, or nothing to train on or to hold out.
        TokenizerError: the text gives fewer pieces than the vocabulary asks for.
        DamagedError: a file of the cache is not what was written.
        StoreError: the cache can't be written.
    """
    if isinstance(source, FileSource | MemorySource):
        source.check()
    if tokenizer is None and isinstance(settings.tokenizer, FileTokenizerConfig):
        tokenizer = Tokenizer.load(Path(settings.tokenizer.path))
    folder = folder_of(source, settings, cache, tokenizer)
    try:
        with _alone(folder, progress):
            if not all((folder / name / DIGESTS).is_file() for name in (META, "train", "held-out")):
                with atomic_directory(folder) as aside:
                    make(Build(aside, source, settings, progress, tokenizer, workers))
            return _open(folder, source)
    except StoreError as error:
        raise StoreError(
            error.message,
            location=error.location,
            hint=f"make room in {cache}, or set UNMASK_CACHE to a folder that you may write and that has room",
        ) from error


def folder_of(source: Source, settings: DataConfig, cache: Path, tokenizer: Tokenizer | None) -> Path:
    """Where a corpus stands: called after all that decides its bytes."""
    # What else settings say decides how the corpus is read, not what it is.
    decisive = replace(settings, valid={}, source=FilesConfig(), sampler=WindowsConfig())
    given = "trained"
    if isinstance(settings.tokenizer, ExtendedTokenizerConfig) and tokenizer is None:
        given = f"extended {_told_of(Tokenizer.load(settings.tokenizer.path))}"
        decisive = replace(decisive, tokenizer=replace(settings.tokenizer, path=Path()))
    if tokenizer is not None:
        given = _told_of(tokenizer)
        decisive = replace(decisive, tokenizer=WordPieceConfig())
    # A source of a person's own may keep its fingerprint when its code changes; nobody would look for that.
    code = plugin_facts(settings.source)["digest"] if isinstance(settings.source, PluginSourceConfig) else "ours"
    versions = f"{_FORMAT} tokenizers-{tokenizers.__version__} unicode-{unicodedata.unidata_version}"
    decided = [versions, source.fingerprint, code, repr(decisive), given]
    if segmenter := version(settings.words):
        decided.append(segmenter)
    return cache / digest(*decided)


def _told_of(tokenizer: Tokenizer) -> str:
    """What decides the ids and marks that a tokenizer gives."""
    roles = [tokenizer.role_id(role) for role in ("unk_token", "cls_token", "sep_token", "mask_token")]
    return f"{tokenizer.fingerprint} {roles} {tokenizer.special_ids}"


@contextmanager
def _alone(folder: Path, progress: Progress) -> Generator[None]:
    """Wait until no other process (another rank, another run) makes the same corpus."""
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    owner = folder.parent / f".{folder.name}.owner"
    with wrap_os_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        begun, share = time.monotonic(), 0.0
        while True:
            try:
                lock.acquire(timeout=_PATIENCE_SECONDS)
                break
            except Timeout:
                share = 1 - 60 / (60 + time.monotonic() - begun)  # nobody knows when; it moves, ever slower
                progress(f"waiting for {_owner(owner)}, which prepares the same text", share)
        if share:
            progress(f"waiting for {_owner(owner)}, which prepares the same text", 1.0)
    try:
        with wrap_os_errors(folder.parent):
            owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _owner(file: Path) -> str:
    """The process that holds a lock, as far as it has said who it is."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        return f"process {told['pid']} on {told['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _open(folder: Path, source: Source) -> TokenizedCorpus:
    """What an earlier call made."""
    verify_manifest(folder / META)
    facts = cast("Facts", read_json(folder / META / FACTS))
    tokenizer = Tokenizer.load(folder / META)
    train, held_out = open_shards(folder / "train"), open_shards(folder / "held-out")
    for shards in (train, held_out):
        if shards.tokenizer_fingerprint != tokenizer.fingerprint:
            raise DamagedError(
                "this tokenizer is not the one that its shards were made with",
                location=str(folder / META),
                hint=f"remove {folder}; it is made anew from the text",
            )
    return TokenizedCorpus(
        train,
        held_out,
        tokenizer,
        cast("WordsRule", facts["words"]),
        facts,
        _sentences(facts, source),
        digest(source.fingerprint, json.dumps(facts, sort_keys=True), tokenizer.fingerprint),
        _groups(folder, source),
        folder,
    )


def _groups(folder: Path, source: Source) -> list[CorpusGroup]:
    """The texts as the source names them now, by the documents that each part gave."""
    documents: list[int] = read_json(folder / META / DOCUMENTS)
    groups: Sequence[InputGroup] = getattr(source, "groups", (InputGroup(places(source), 0.0, len(documents)),))
    found: list[CorpusGroup] = []
    part = first = 0
    for name, weight, parts in groups:
        last = first + sum(documents[part : part + parts])
        found.append(CorpusGroup(name, weight, first, last))
        part, first = part + parts, last
    return found


def _sentences(facts: Facts, source: Source) -> list[str]:
    """What was found and decided, as a person would say it."""
    what = source.notes if isinstance(source, FileSource | MemorySource) else "documents are as the source gives them"
    size = f"{facts['documents']:,} documents, {facts['characters']:,} characters"
    if facts["held_out_by"] == "hash":
        held = f"{facts['held_out_documents']:,} documents, chosen by the hash of their text"
    else:
        held = f"the last {facts['held_out_share']} of every document"
    reason = " (what its script asks for)" if facts["words_by"] == "auto" else ""
    how = in_words(cast("WordsRule", facts["words"]))
    unknown = int(facts["train_unknown_characters"]) / max(1, int(facts["train_characters"]))
    said = [f"text: {size}; {what} (data.document)"]
    if facts["left_out"]:
        said.append(f"left out: {facts['left_out']:,} lines or rows that could not be read (data.errors = skip)")
    if facts["drop_duplicates"]:
        said.append(f"left out: {facts['duplicates']:,} documents whose text was there before (data.drop_duplicates)")
    said += [
        f"held out: {held}; {facts['held_out_characters']:,} characters (data.held_out)",
        f"words: {how}{reason} (data.words)",
        f"tokens: {facts['train_tokens']:,} to train on, {facts['held_out_tokens']:,} held out, of a vocabulary of "
        f"{facts['vocabulary']:,}; {unknown:.3%} of the characters are [UNK]",
    ]
    if facts["encoded_by"] == "texts-after-all":
        said.append("this tokenizer doesn't part text at spaces as its settings promise; the text was encoded whole")
    return said
