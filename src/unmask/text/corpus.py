"""Room card: a source made ready for training.

Comes in: a Source, TextSettings, a cache folder. Goes out: a Corpus: token shards for training and for validation, the
tokenizer, what was decided and in which words to say it. Called by: pretrain, `unmask text build`.

What is made stands in the cache under a digest of the text, the settings and the tokenizer, so a second run starts at
once. The same text and settings give the same bytes, however many processes make them and however often they were
killed at it. The tokenizer learns from training text only.
"""

from __future__ import annotations

import json
import os
import socket
import time
import unicodedata
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

import tokenizers
from filelock import FileLock, Timeout

from unmask import outside
from unmask.contracts import Group, Source
from unmask.errors import DamagedError, StoreError
from unmask.store import DIGESTS, check_seal, digest, new_folder, read_json, saying_where
from unmask.text.building import DOCUMENTS, FACTS, TOLD, Build, Facts, make, places
from unmask.text.cache import default_cache
from unmask.text.opening import open_source
from unmask.text.segmenter import version
from unmask.text.settings import FilesSettings, TextSettings, WindowsSettings
from unmask.text.shards import Shards, open_shards
from unmask.text.sources import FileSource, MemorySource
from unmask.text.survey import Progress
from unmask.text.tokenizer import ExtendedTokenizerSettings, FileTokenizerSettings, Tokenizer, WordPieceSettings
from unmask.text.words import WordsRule, in_words
from unmask.text.workers import WorkersWanted

__all__ = ["Corpus", "CorpusGroup", "default_cache", "folder_of", "open_source", "places", "prepare", "quiet"]

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
class Corpus:
    """Text made ready for training."""

    train: Shards
    held_out: Shards
    tokenizer: Tokenizer
    words: WordsRule
    facts: Facts  # what was found and decided
    said: Sequence[str]  # the same, in sentences
    fingerprint: str  # changes with the text, what was decided, or the tokenizer
    groups: Sequence[CorpusGroup]
    folder: Path


def quiet(stage: str, share: float) -> None:
    """Progress that nobody watches."""


def prepare(
    source: Source,
    settings: TextSettings,
    cache: Path,
    progress: Progress = quiet,
    tokenizer: Tokenizer | None = None,
    workers: WorkersWanted = "all cores",
) -> Corpus:
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
    if tokenizer is None and isinstance(settings.tokenizer, FileTokenizerSettings):
        tokenizer = Tokenizer.load(Path(settings.tokenizer.path))
    folder = folder_of(source, settings, cache, tokenizer)
    try:
        with _alone(folder, progress):
            if not all((folder / name / DIGESTS).is_file() for name in (TOLD, "train", "held-out")):
                with new_folder(folder) as aside:
                    make(Build(aside, source, settings, progress, tokenizer, workers))
            return _open(folder, source)
    except StoreError as error:
        raise StoreError(
            error.what,
            where=error.where,
            next=f"make room in {cache}, or set UNMASK_CACHE to a folder that you may write and that has room",
        ) from error


def folder_of(source: Source, settings: TextSettings, cache: Path, tokenizer: Tokenizer | None) -> Path:
    """Where a corpus stands: called after all that decides its bytes."""
    # What else settings say decides how the corpus is read, not what it is.
    decisive = replace(settings, valid={}, source=FilesSettings(), cutter=WindowsSettings())
    given = "trained"
    if isinstance(settings.tokenizer, ExtendedTokenizerSettings) and tokenizer is None:
        given = f"extended {_told_of(Tokenizer.load(settings.tokenizer.path))}"
        decisive = replace(decisive, tokenizer=replace(settings.tokenizer, path=Path()))
    if tokenizer is not None:
        given = _told_of(tokenizer)
        decisive = replace(decisive, tokenizer=WordPieceSettings())
    # A source of a person's own may keep its fingerprint when its code changes; nobody would look for that.
    code = outside.facts(settings.source)["digest"] if isinstance(settings.source, outside.OutsideSource) else "ours"
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
    with saying_where(folder.parent):
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
        with saying_where(folder.parent):
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


def _open(folder: Path, source: Source) -> Corpus:
    """What an earlier call made."""
    check_seal(folder / TOLD)
    facts = cast("Facts", read_json(folder / TOLD / FACTS))
    tokenizer = Tokenizer.load(folder / TOLD)
    train, held_out = open_shards(folder / "train"), open_shards(folder / "held-out")
    for shards in (train, held_out):
        if shards.tokenizer_fingerprint != tokenizer.fingerprint:
            raise DamagedError(
                "this tokenizer is not the one that its shards were made with",
                where=str(folder / TOLD),
                next=f"remove {folder}; it is made anew from the text",
            )
    return Corpus(
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
    documents: list[int] = read_json(folder / TOLD / DOCUMENTS)
    groups: Sequence[Group] = getattr(source, "groups", (Group(places(source), 0.0, len(documents)),))
    found: list[CorpusGroup] = []
    part = first = 0
    for name, weight, parts in groups:
        last = first + sum(documents[part : part + parts])
        found.append(CorpusGroup(name, weight, first, last))
        part, first = part + parts, last
    return found


def _sentences(facts: Facts, source: Source) -> list[str]:
    """What was found and decided, as a person would say it."""
    what = source.said if isinstance(source, FileSource | MemorySource) else "documents are as the source gives them"
    size = f"{facts['documents']:,} documents, {facts['characters']:,} characters"
    if facts["held_out_by"] == "hash":
        held = f"{facts['held_out_documents']:,} documents, chosen by the hash of their text"
    else:
        held = f"the last {facts['held_out_share']} of every document"
    reason = " (what its script asks for)" if facts["words_by"] == "by-script" else ""
    how = in_words(cast("WordsRule", facts["words"]))
    unknown = int(facts["train_unknown_characters"]) / max(1, int(facts["train_characters"]))
    said = [f"text: {size}; {what} (text.document)"]
    if facts["left_out"]:
        said.append(f"left out: {facts['left_out']:,} lines or rows that could not be read (text.errors = skip)")
    if facts["drop_duplicates"]:
        said.append(f"left out: {facts['duplicates']:,} documents whose text was there before (text.drop_duplicates)")
    said += [
        f"held out: {held}; {facts['held_out_characters']:,} characters (text.held_out)",
        f"words: {how}{reason} (text.words)",
        f"tokens: {facts['train_tokens']:,} to train on, {facts['held_out_tokens']:,} held out, of a vocabulary of "
        f"{facts['vocabulary']:,}; {unknown:.3%} of the characters are [UNK]",
    ]
    if facts["encoded_by"] == "texts-after-all":
        said.append("this tokenizer doesn't part text at spaces as its settings promise; the text was encoded whole")
    return said
