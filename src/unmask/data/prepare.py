"""Prepares a source for training: token shards of both splits, cached by content.

A build makes three passes over the text, unit by unit: the survey (length and hash of each document), the tokenizer's
training sample, and the encoding. The split comes after the survey and is the only step that needs all documents.

The cache has one folder for each text, identified by its content and by the settings and versions that affect the
shards. In it are one folder for each tokenizer, and an index from tokenizer settings to the trained tokenizer. So a
trained tokenizer and an equal one from a file share their shards.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
import unicodedata
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Final, cast

import tokenizers
from filelock import FileLock, Timeout

from unmask.core.errors import DamagedError, StoreError, TextError, TokenizerError
from unmask.core.files import (
    RunLayout,
    atomic_directory,
    digest,
    read_json,
    verify_manifest,
    wrap_os_errors,
    write_json,
    write_manifest,
)
from unmask.core.plugins import PluginSourceConfig, plugin_facts
from unmask.core.quantities import Fraction
from unmask.core.types import ProgressCallback
from unmask.data.advice import train_fitting
from unmask.data.ray_engine import RayConfig, RayWorkers
from unmask.data.settings import DataConfig
from unmask.data.shards import Shards, append_files, finish_folder, map_numbers, merge, open_shards
from unmask.data.sources import BaseSource
from unmask.data.split import DocumentStats, Split, SplitName, divide, train_sizes
from unmask.data.workers import SPLITS, Message, Task, WorkerCount, WorkerPool, Workers, shard_files, units_of
from unmask.tokenization.fast_encode import CachedEncoder
from unmask.tokenization.settings import ExtendedTokenizerConfig, FileTokenizerConfig
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.words import WordsRule, describe_words, detect_words, version

META: Final = "meta"  # folder of the tokenizer and the facts
FACTS: Final = "facts.json"
DOCUMENTS: Final = "documents.json"  # training documents of each part of the source
INDEX: Final = "tokenizers.json"  # digest of tokenizer settings -> folder
_FORMAT: Final = "corpus-5"
_SMALLER: Final = " smaller"
_COMPARED_LINES: Final = 500
_LOCK_POLL_SECONDS: Final = 2.0

Facts = dict[str, str | int | float]


@dataclass(frozen=True)
class CorpusGroup:
    """The training documents of one of the named texts."""

    name: str
    weight: float  # 0 without a weight
    first_document: int  # index in TokenizedCorpus.train
    last_document: int  # exclusive


@dataclass(frozen=True)
class TokenizedCorpus:
    """A text as token shards, ready for training."""

    train: Shards
    held_out: Shards
    tokenizer: Tokenizer
    words: WordsRule
    facts: Facts  # counts and decisions
    notes: Sequence[str]  # the facts as sentences
    fingerprint: str  # digest of the text, the decisions and the tokenizer
    groups: Sequence[CorpusGroup]
    folder: Path


def no_progress(stage: str, fraction: float) -> None:
    """Ignore progress."""


def prepare(
    source: BaseSource,
    settings: DataConfig,
    cache: Path,
    progress: ProgressCallback = no_progress,
    tokenizer: Tokenizer | None = None,
    workers: WorkerCount | RayConfig = "all cores",
    *,
    verify: bool = False,
    shrinks: bool = False,
) -> TokenizedCorpus:
    """Tokenize a source, or open the result of an earlier call.

    Args:
        source: the text, opened with these settings.
        settings: how the text is read and split, and which tokenizer is trained.
        cache: directory of the results.
        progress: called with the stage and its completed fraction.
        tokenizer: existing tokenizer; by default, one is trained on the training split.
        workers: number of processes for long texts, or where Ray runs the work; without effect on the result.
        verify: whether to read all bytes of the text and the cached shards, instead of comparing sizes and times.
        shrinks: whether the trained vocabulary may be smaller than its setting, if the text gives no more.

    Raises:
        TextError: the text can't be read, or one of the splits is empty.
        TokenizerError: the text yields fewer tokens than the vocabulary size.
        DamagedError: a file of the cache has changed since it was written.
        StoreError: the cache can't be written.
        WorkerError: a worker process ended, or Ray has no cluster.
    """
    source.check()
    if tokenizer is None and isinstance(settings.tokenizer, FileTokenizerConfig):
        tokenizer = Tokenizer.load(Path(settings.tokenizer.path))
    if verify:
        source.verify()
    request = "" if tokenizer else _tokenizer_request(settings)
    # A smaller vocabulary is indexed by another name, so that an explicit size never finds it.
    requests = [request, request + _SMALLER] if request and shrinks else [request]
    folder = text_folder(source, settings, cache)
    if _find(folder, tokenizer, requests) is None:
        # Cached digests are checked by size and time only. A build reads all bytes anyway, so it recomputes them.
        source.verify()
        folder = text_folder(source, settings, cache)
    try:
        with _exclusive(folder, progress):
            corpus = _find(folder, tokenizer, requests)
            is_built = corpus is None
            if corpus is None:
                corpus = _build(Build(folder, source, settings, progress, tokenizer, workers, shrinks=shrinks))
            if request and is_built:
                size = read_json(corpus / META / FACTS)["vocabulary"]
                request += _SMALLER if shrinks and size < getattr(settings.tokenizer, "vocab_size", 0) else ""
                write_json(folder / INDEX, {**_read_index(folder), request: corpus.name})
            return _open(corpus, source, verify=verify or is_built)
    except StoreError as error:
        raise StoreError(
            error.message,
            location=error.location,
            hint=f"free disk space in {cache}, or set UNMASK_CACHE to a writable directory with more of it",
        ) from error


# Folder names ---------------------------------------------------------------------------------------------------------


def text_folder(source: BaseSource, settings: DataConfig, cache: Path) -> Path:
    """Return the cache folder of a text, named by everything that affects the shards except the tokenizer."""
    held_out = settings.held_out
    fraction = held_out.fraction.fraction if isinstance(held_out.fraction, Fraction) else held_out.fraction
    decisions = {
        "words": settings.words,
        "segmenter": version(settings.words) or "",
        "drop_duplicates": settings.drop_duplicates,
        "held_out": [held_out.method, fraction, held_out.max_size.number],
        # A plugin may keep its fingerprint although its code changes.
        "plugin": plugin_facts(settings.source)["digest"] if isinstance(settings.source, PluginSourceConfig) else "",
    }
    versions = f"{_FORMAT} tokenizers-{tokenizers.__version__} unicode-{unicodedata.unidata_version}"
    return cache / digest(versions, source.fingerprint, json.dumps(decisions, sort_keys=True))


def _tokenizer_request(settings: DataConfig) -> str:
    """Return a digest of the settings that a tokenizer is trained with."""
    wanted = asdict(settings.tokenizer)
    if isinstance(settings.tokenizer, ExtendedTokenizerConfig):
        wanted["path"] = _tokenizer_digest(Tokenizer.load(settings.tokenizer.path))
    return digest(json.dumps(wanted, sort_keys=True))


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return a digest of everything that affects the ids and token flags of a tokenizer."""
    roles = [tokenizer.role_id(role) for role in ("unk_token", "cls_token", "sep_token", "mask_token")]
    return digest(tokenizer.fingerprint, json.dumps([roles, list(tokenizer.special_ids)]))


def _read_index(folder: Path) -> Mapping[str, str]:
    if not (folder / INDEX).is_file():
        return {}
    return read_json(folder / INDEX)


def _find(folder: Path, tokenizer: Tokenizer | None, requests: Sequence[str]) -> Path | None:
    """Return the complete corpus with this tokenizer, or with the one trained for a request; else None."""
    index = _read_index(folder)
    names = [_tokenizer_digest(tokenizer)] if tokenizer else [index[one] for one in requests if one in index]
    return next((folder / name for name in names if _is_complete(folder / name)), None)


def _is_complete(corpus: Path) -> bool:
    return all((corpus / name / RunLayout.DIGESTS).is_file() for name in (META, *SPLITS))


@contextmanager
def _exclusive(folder: Path, progress: ProgressCallback) -> Generator[None]:
    """Wait until no other process (another rank, another run) prepares the same text."""
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    owner = folder.parent / f".{folder.name}.owner"
    with wrap_os_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        start, fraction = time.monotonic(), 0.0
        while True:
            try:
                lock.acquire(timeout=_LOCK_POLL_SECONDS)
                break
            except Timeout:
                fraction = 1 - 60 / (60 + time.monotonic() - start)  # approaches 1, the rest is unknown
                progress(f"waiting for {_read_owner(owner)}, which prepares the same text", fraction)
        if fraction:
            progress(f"waiting for {_read_owner(owner)}, which prepares the same text", 1.0)
    try:
        with wrap_os_errors(folder.parent):
            owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _read_owner(file: Path) -> str:
    """Return a description of the process that holds the lock."""
    try:
        owner = json.loads(file.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


# Building -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """The inputs of a build."""

    folder: Path  # cache folder of the text
    source: BaseSource
    settings: DataConfig
    progress: ProgressCallback
    tokenizer: Tokenizer | None
    workers: WorkerCount | RayConfig
    unit_bytes: int | None = None  # the default depends on the size of the text
    shrinks: bool = False  # whether the vocabulary may be smaller than its setting


def _build(build: Build) -> Path:
    """Build a corpus in a folder that appears when it is complete; the caller holds the lock of the text."""
    folder = build.folder
    work = folder.parent / f".{folder.name}.work"
    with wrap_os_errors(work):
        if work.exists():  # left by a process that was killed
            shutil.rmtree(work)
        work.mkdir(parents=True)
        try:
            return build_in(work, build)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            with contextlib.suppress(OSError):  # absent, or not empty
                folder.rmdir()


def build_in(work: Path, build: Build) -> Path:
    """Survey, split, train the tokenizer if there is none, and encode both splits.

    Args:
        work: empty folder for temporary files, on the file system of the cache.
        build: inputs of the build.

    Returns:
        The folder of the corpus, named by its tokenizer.

    Raises:
        TextError: the text can't be read, or one of the splits is empty.
        TokenizerError: the text yields fewer tokens than the vocabulary size.
    """
    settings = build.settings
    units = units_of(build.source.parts(), build.unit_bytes)
    with _open_workers(build, len(units)) as workers:
        tasks = [Task(unit.number, unit.parts, str(work)) for unit in units]
        surveyed = _survey(build, workers, tasks)
        stats = join_stats(work, tasks, surveyed)
        split = divide(stats, settings.held_out, drop_duplicates=settings.drop_duplicates, folder=work)
        tasks = _add_documents(tasks, surveyed)
        train_characters = int(train_sizes(split.first_held, [0, stats.documents])[0])
        words: WordsRule = detect_words(stats.sample) if settings.words == "auto" else settings.words
        tokenizer = build.tokenizer or _train(build, workers, tasks, split, train_characters)
        corpus = build.folder / _tokenizer_digest(tokenizer)
        if _is_complete(corpus):  # built before with an equal tokenizer from a file, or trained with other settings
            return corpus
        tokenizer.save(work / "tokenizer")
        by_chunks = CachedEncoder(tokenizer, words).agrees(stats.sample.split("\n")[:_COMPARED_LINES])
        tasks = [replace(task, words=words, tokenizer=str(work / "tokenizer"), by_chunks=by_chunks) for task in tasks]
        total = int(stats.lengths.sum())
        encoded = workers.run("encode", tasks, _reporter(build.progress, "tokenizing", total))
        build.progress("tokenizing", 1.0)
    facts: Facts = {
        "documents": stats.documents,
        "characters": stats.characters,
        "left_out": sum(result["left_out"] for result in surveyed),
        "drop_duplicates": settings.drop_duplicates,
        "duplicates": split.duplicates,
        "words": words,
        "words_by": settings.words,
        "held_out_by": split.by,
        "held_out_share": str(split.share),
        "held_out_digest": split.digest,
        "tokenizer": tokenizer.fingerprint,
        "vocabulary": tokenizer.size,
        "encoded_by": ("chunks" if tokenizer.splits_at_spaces else "texts") if by_chunks else "texts-after-all",
    }
    if segmenter := version(words):
        facts["segmenter"] = segmenter
    del stats, split  # Windows can't remove a file that is mapped
    with atomic_directory(corpus) as aside:
        _write_corpus(aside, work, build, encoded, tokenizer, facts)
    return corpus


def _open_workers(build: Build, units: int) -> WorkerPool:
    if isinstance(build.workers, RayConfig):
        return RayWorkers(build.source, build.settings, build.workers, units)
    return Workers(build.source, build.settings, build.workers, units)


def _write_corpus(
    folder: Path, work: Path, build: Build, encoded: Sequence[Message], tokenizer: Tokenizer, facts: Facts
) -> None:
    shards = _gather(folder, work, encoded, tokenizer)
    _require_tokens(shards, build.source)
    for split, own in shards.items():
        name = split.replace("-", "_")
        facts |= {f"{name}_documents": own.documents, f"{name}_characters": own.characters}
        facts |= {f"{name}_tokens": own.tokens, f"{name}_unknown_characters": own.unknown_characters}
    tokenizer.save(folder / META)
    write_json(folder / META / FACTS, facts)
    write_json(folder / META / DOCUMENTS, list(chain.from_iterable(part["train"]["documents"] for part in encoded)))
    write_manifest(folder / META)


def _reporter(progress: ProgressCallback, stage: str, total: int) -> Callable[[int], None]:
    done = 0

    def report(characters: int) -> None:
        nonlocal done
        done += characters
        progress(stage, min(0.99, done / max(1, total)))

    return report


def _survey(build: Build, workers: WorkerPool, tasks: Sequence[Task]) -> list[Message]:
    # Progress is characters ÷ bytes. They differ, mostly in compressed files, so the end is reported separately.
    total_bytes = sum(part.last_byte - part.first_byte for task in tasks for part in task.parts)
    surveyed = workers.run("survey", tasks, _reporter(build.progress, "reading the text", total_bytes))
    build.progress("reading the text", 1.0)
    return surveyed


def join_stats(work: Path, tasks: Sequence[Task], surveyed: Sequence[Message]) -> DocumentStats:
    """Return the statistics of all units, mapped from files in `work`."""
    for name in ("lengths", "hashes"):
        append_files(work / name, [task.file(name) for task in tasks])
    characters = sum(result["characters"] for result in surveyed)
    sample = surveyed[0]["sample"] if surveyed else ""
    return DocumentStats(map_numbers(work / "lengths"), map_numbers(work / "hashes", "<u8"), characters, sample)


def _add_documents(tasks: Sequence[Task], surveyed: Sequence[Message]) -> list[Task]:
    """Return the tasks with their first document and the number of documents of each part."""
    firsts = accumulate((sum(result["documents"]) for result in surveyed), initial=0)
    return [
        replace(task, first_document=first, documents=result["documents"])
        for task, result, first in zip(tasks, surveyed, firsts, strict=False)
    ]


def _train(build: Build, workers: WorkerPool, tasks: Sequence[Task], split: Split, train_characters: int) -> Tokenizer:
    """Train a tokenizer on a sample of the training split, or on all of it."""
    settings = build.settings.tokenizer
    wanted = getattr(settings, "max_train_chars", train_characters)
    tasks = _add_shares(build.source, tasks, split, wanted, train_characters)
    stage = "training the tokenizer"
    build.progress(stage, 0.0)

    def read() -> Iterator[str]:
        if workers.count == 1:
            return chain.from_iterable(workers.local.sample(task, _ignore) for task in tasks)
        workers.run("sample", tasks, _ignore)
        return chain.from_iterable(_read_sample(task) for task in tasks)

    try:
        tokenizer = train_fitting(read, settings, build.progress, shrinks=build.shrinks)
    except TokenizerError as error:
        place = build.source.location
        raise error.at(location=f"{place}: {error.location}" if error.location else place) from error
    build.progress(stage, 1.0)
    return tokenizer


def _ignore(characters: int) -> None:
    """Ignore the progress of sampling: the trainer reports progress."""


def _add_shares(
    source: BaseSource, tasks: Sequence[Task], split: Split, wanted: int, train_characters: int
) -> list[Task]:
    """Return the tasks with the fraction of each part to train the tokenizer on, by the weights of the texts."""
    parts = sum(len(task.parts) for task in tasks)
    shares = [wanted / max(1, train_characters)] * parts
    groups = source.groups
    total = sum(group.weight for group in groups)
    if total:
        documents = list(accumulate(chain.from_iterable(task.documents for task in tasks), initial=0))
        borders = list(accumulate((group.parts for group in groups), initial=0))
        sizes = train_sizes(split.first_held, [documents[border] for border in borders])
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


def _gather(folder: Path, work: Path, encoded: Sequence[Message], tokenizer: Tokenizer) -> dict[SplitName, Shards]:
    """Move the shards of all units to the folders of the two splits."""
    shards: dict[SplitName, Shards] = {}
    for split in SPLITS:
        files = [shard_files(result, split) for result in encoded]
        if split == "held-out" and len(files) > 1:  # each unit has little of it
            files = [merge(work / "held-out", files, tokenizer.size)]
        (folder / split).mkdir()
        finish_folder(folder / split, files, tokenizer.size, tokenizer.fingerprint)
        shards[split] = Shards(folder / split)
    return shards


def _require_tokens(shards: Mapping[SplitName, Shards], source: BaseSource) -> None:
    if not shards["train"].tokens:
        raise TextError(
            "there is no text left to train on",
            location=source.location,
            hint="add text, or hold out less: --set data.held_out.fraction=5%",
        )
    if not shards["held-out"].tokens:
        raise TextError(
            "there is no text to hold out for validation",
            location=source.location,
            hint="add text, or hold out more: --set data.held_out.fraction=20%",
        )


# Opening --------------------------------------------------------------------------------------------------------------


def _open(folder: Path, source: BaseSource, *, verify: bool) -> TokenizedCorpus:
    """Open a complete corpus."""
    verify_manifest(folder / META)
    facts = cast("Facts", read_json(folder / META / FACTS))
    tokenizer = Tokenizer.load(folder / META)
    train, held_out = (open_shards(folder / split, verify=verify) for split in SPLITS)
    for shards in (train, held_out):
        if shards.tokenizer_fingerprint != tokenizer.fingerprint:
            raise DamagedError(
                "the shards were written with another tokenizer than the one stored with them",
                location=str(folder / META),
                hint=f"remove {folder}, and it will be built again from the text",
            )
    return TokenizedCorpus(
        train,
        held_out,
        tokenizer,
        cast("WordsRule", facts["words"]),
        facts,
        _notes(facts, source),
        digest(source.fingerprint, json.dumps(facts, sort_keys=True), tokenizer.fingerprint),
        _groups(folder, source),
        folder,
    )


def _groups(folder: Path, source: BaseSource) -> list[CorpusGroup]:
    """Return the texts with the current names of the source, and their training documents."""
    documents: list[int] = read_json(folder / META / DOCUMENTS)
    groups: list[CorpusGroup] = []
    part = first = 0
    for name, weight, parts in source.groups:
        last = first + sum(documents[part : part + parts])
        groups.append(CorpusGroup(name, weight, first, last))
        part, first = part + parts, last
    return groups


def _notes(facts: Mapping[str, Any], source: BaseSource) -> list[str]:
    """Return the counts and decisions as sentences."""
    size = f"{facts['documents']:,} documents, {facts['characters']:,} characters"
    if facts["held_out_by"] == "hash":
        held_out = f"{facts['held_out_documents']:,} documents, chosen by the hash of their text"
    else:
        held_out = f"the last {facts['held_out_share']} of every document"
    reason = " (chosen by its script)" if facts["words_by"] == "auto" else ""
    words = describe_words(cast("WordsRule", facts["words"]))
    unknown = facts["train_unknown_characters"] / max(1, facts["train_characters"])
    notes = [f"text: {size}; {source.notes} (data.document)", *source.warnings]
    if facts["left_out"]:
        notes.append(f"skipped: {facts['left_out']:,} lines or rows that could not be read (data.errors = skip)")
    if facts["drop_duplicates"]:
        notes.append(f"skipped: {facts['duplicates']:,} duplicate documents (data.drop_duplicates)")
    notes += [
        f"held out: {held_out}; {facts['held_out_characters']:,} characters (data.held_out)",
        f"words: {words}{reason} (data.words)",
        f"tokens: {facts['train_tokens']:,} for training, {facts['held_out_tokens']:,} held out; vocabulary size "
        f"{facts['vocabulary']:,}; {unknown:.3%} of the characters are [UNK]",
    ]
    if facts["encoded_by"] == "texts-after-all":
        notes.append(
            "whole texts were encoded, because this tokenizer does not split text at spaces as its settings imply"
        )
    return notes
