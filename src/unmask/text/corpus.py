"""Room card: a source made ready for training.

Comes in: a Source, TextSettings, a cache folder. Goes out: a Corpus: token shards for training and for validation, the
tokenizer, what was decided and in which words to say it. Called by: pretrain.

What is made stands in the cache under a digest of the text, the settings and the tokenizer, so a second run starts at
once. The tokenizer learns from training text only.
"""

from __future__ import annotations

import fcntl
import json
import os
import unicodedata
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import numpy as np
import tokenizers

from unmask import rng
from unmask.contracts import Source
from unmask.errors import DamagedError, StoreError, TextError
from unmask.store import DIGESTS, check_seal, digest, new_folder, read_json, saying_where, seal, write_json
from unmask.text.settings import TextSettings
from unmask.text.shards import EncodedPassage, Shards, open_shards, write_shards
from unmask.text.sources import FileSource, MemorySource
from unmask.text.survey import Division, Progress, Side, Stretch, Survey, divide, side, survey
from unmask.text.tokenizer import Tokenizer, TokenizerSettings, WordPieceSettings, train_tokenizer
from unmask.text.words import WordsRule, detect_words

__all__ = ["Corpus", "default_cache", "open_source", "places", "prepare", "quiet"]

_FORMAT: Final = "corpus-2"
_TOLD: Final = "told"  # the folder of the tokenizer and the facts
_FACTS: Final = "facts.json"
_BATCH_CHARACTERS: Final = 1_000_000  # encoded at a time; what an encoding holds is many times its text
_BATCH_PASSAGES: Final = 8192

Facts = dict[str, str | int | float]


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


def quiet(stage: str, share: float) -> None:
    """Progress that nobody watches."""


def default_cache() -> Path:
    """$UNMASK_CACHE, else $XDG_CACHE_HOME/unmask, else ~/.cache/unmask."""
    if own := os.environ.get("UNMASK_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unmask"


def open_source(paths: Sequence[Path], settings: TextSettings) -> FileSource:
    """The source of these files and folders."""
    return FileSource(paths, settings.rule, settings.errors)


def prepare(
    source: Source,
    settings: TextSettings,
    cache: Path,
    progress: Progress = quiet,
    tokenizer: Tokenizer | None = None,
) -> Corpus:
    """Tokenize a source, or open what an earlier call made of it.

    Args:
        source: the text.
        settings: how it is read.
        cache: where the result is kept.
        progress: told what is being done and which share of it is.
        tokenizer: one that exists; without it one is trained on the training text.

    Raises:
        TextError: text that can't be read, or nothing to train on or to hold out.
        TokenizerError: the text gives fewer pieces than the vocabulary asks for.
        DamagedError: a file of the cache is not what was written.
        StoreError: the cache can't be written.
    """
    if isinstance(source, FileSource | MemorySource):
        source.check()
    given = "trained" if tokenizer is None else tokenizer.fingerprint
    versions = f"{_FORMAT} tokenizers-{tokenizers.__version__} unicode-{unicodedata.unidata_version}"
    folder = cache / digest(versions, source.fingerprint, repr(settings), given)
    with _alone(folder):
        if not all((folder / name / DIGESTS).is_file() for name in (_TOLD, "train", "held-out")):
            _make(folder, source, settings, progress, tokenizer)
        return _open(folder, source)


@contextmanager
def _alone(folder: Path) -> Generator[None]:
    """Wait until no other process (another rank, another run) makes the same corpus."""
    try:
        with saying_where(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder.parent / f".{folder.name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    except StoreError as error:
        raise StoreError(
            error.what, where=error.where, next="set UNMASK_CACHE to a folder that you may write"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _make(
    folder: Path, source: Source, settings: TextSettings, progress: Progress, tokenizer: Tokenizer | None
) -> None:
    """Survey, divide, train the tokenizer, write both sides: all of it, or nothing."""
    found = survey(source, progress)
    division = divide(found, settings.held_out)
    words: WordsRule = detect_words(found.sample) if settings.words == "by-script" else settings.words
    with new_folder(folder) as aside:
        if tokenizer is None:
            progress("training the tokenizer", 0.0)
            tokenizer = train_tokenizer(_sample(source, found, division, settings.tokenizer), settings.tokenizer)
            progress("training the tokenizer", 1.0)
        tokenizer.save(aside / _TOLD)
        sides: dict[Side, Shards] = {}
        for which in cast("tuple[Side, Side]", ("train", "held-out")):
            stretches = _watched(side(source, found, division, which), found, division, which, progress)
            encoded = _encoded(stretches, tokenizer, words)
            write_shards(aside / which, encoded, tokenizer.size, tokenizer.fingerprint)
            sides[which] = open_shards(aside / which)
        _require_tokens(sides, source)
        facts: Facts = {
            "documents": found.documents,
            "characters": found.characters,
            "words": words,
            "words_by": settings.words,
            "held_out_by": division.by,
            "held_out_share": str(division.share),
            "held_out_digest": division.digest,
            "tokenizer": tokenizer.fingerprint,
            "vocabulary": tokenizer.size,
        }
        for which, shards in sides.items():
            name = which.replace("-", "_")
            facts |= {f"{name}_documents": shards.documents, f"{name}_characters": shards.characters}
            facts |= {f"{name}_tokens": shards.tokens, f"{name}_unknown_characters": shards.unknown_characters}
        write_json(aside / _TOLD / _FACTS, facts)
        seal(aside / _TOLD)


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
    first = [part.path for part in source.parts()[:4]]
    further = len(source.parts()) - 3
    return ", ".join(first) if further <= 1 else f"{', '.join(first[:3])} and {further} more"


def _open(folder: Path, source: Source) -> Corpus:
    """What an earlier call made."""
    check_seal(folder / _TOLD)
    facts = cast("Facts", read_json(folder / _TOLD / _FACTS))
    tokenizer = Tokenizer.load(folder / _TOLD)
    train, held_out = open_shards(folder / "train"), open_shards(folder / "held-out")
    for shards in (train, held_out):
        if shards.tokenizer_fingerprint != tokenizer.fingerprint:
            raise DamagedError(
                "this tokenizer is not the one that its shards were made with",
                where=str(folder / _TOLD),
                next=f"remove {folder}; it is made anew from the text",
            )
    words = cast("WordsRule", facts["words"])
    fingerprint = digest(source.fingerprint, json.dumps(facts, sort_keys=True), tokenizer.fingerprint)
    return Corpus(train, held_out, tokenizer, words, facts, _sentences(facts, source), fingerprint)


def _sentences(facts: Facts, source: Source) -> list[str]:
    """What was found and decided, as a person would say it."""
    what = source.said if isinstance(source, FileSource | MemorySource) else "documents are as the source gives them"
    size = f"{facts['documents']:,} documents, {facts['characters']:,} characters"
    if facts["held_out_by"] == "hash":
        held = f"{facts['held_out_documents']:,} documents, chosen by the hash of their text"
    else:
        held = f"the last {facts['held_out_share']} of every document"
    reason = " (what its script asks for)" if facts["words_by"] == "by-script" else ""
    how = "each character is one" if facts["words"] == "characters" else "runs between spaces, punctuation apart"
    unknown = int(facts["train_unknown_characters"]) / max(1, int(facts["train_characters"]))
    return [
        f"text: {size}; {what} (text.document)",
        f"held out: {held}; {facts['held_out_characters']:,} characters (text.held_out)",
        f"words: {how}{reason} (text.words)",
        f"tokens: {facts['train_tokens']:,} to train on, {facts['held_out_tokens']:,} held out, of a vocabulary of "
        f"{facts['vocabulary']:,}; {unknown:.3%} of the characters are [UNK]",
    ]


def _sample(source: Source, found: Survey, division: Division, settings: TokenizerSettings) -> Iterator[str]:
    """Training text for the tokenizer: all of it, or passages drawn evenly where there is more than it looks at."""
    size = int(division.first_held_N.sum())
    wanted = settings.sample_characters if isinstance(settings, WordPieceSettings) else size
    share = wanted / max(1, size)
    stretches = side(source, found, division, "train")
    if share >= 1:
        yield from (stretch.text for stretch in stretches)
        return
    drawn_N = rng.uniform(0, "tokenizer sample", np.arange(found.documents)) < share
    for stretch in stretches:
        # Further pieces of a long document are drawn one by one: they are long, so there are few of them.
        later = stretch.piece and rng.uniform(0, "tokenizer sample", stretch.document, stretch.piece)[0] < share
        if later or (not stretch.piece and drawn_N[stretch.document]):
            yield stretch.text


def _watched(
    stretches: Iterable[Stretch], found: Survey, division: Division, which: Side, progress: Progress
) -> Iterator[Stretch]:
    """The same stretches, with a word on how far they are."""
    kept = int(division.first_held_N.sum())
    total = kept if which == "train" else int(found.lengths_N.sum()) - kept
    done = reported = 0
    for stretch in stretches:
        yield stretch
        done += len(stretch.text)
        if done - reported >= _BATCH_CHARACTERS:
            reported = done
            progress(f"tokenizing ({which})", min(0.99, done / max(1, total)))
    progress(f"tokenizing ({which})", 1.0)


def _encoded(stretches: Iterable[Stretch], tokenizer: Tokenizer, words: WordsRule) -> Iterator[EncodedPassage]:
    """Stretches as tokens, encoded some at a time."""
    held: list[Stretch] = []
    size = 0
    for stretch in stretches:
        held.append(stretch)
        size += len(stretch.text)
        if size >= _BATCH_CHARACTERS or len(held) >= _BATCH_PASSAGES:
            yield from _encode(held, tokenizer, words)
            held, size = [], 0
    yield from _encode(held, tokenizer, words)


def _encode(held: Sequence[Stretch], tokenizer: Tokenizer, words: WordsRule) -> Iterator[EncodedPassage]:
    encodings = tokenizer.encode_batch([stretch.text for stretch in held], words)
    for stretch, encoded in zip(held, encodings, strict=True):
        yield EncodedPassage(encoded.ids, encoded.marks, stretch.characters, encoded.characters_unknown, stretch.last)
