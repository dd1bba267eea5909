"""Statistics of a text (`unmask data inspect`): documents, copies, characters, tokens, examples and warnings."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from unmask.core import rng
from unmask.core.errors import TextError, TokenizerError
from unmask.core.types import WORD_START, DocumentChunk, InputGroup, ProgressCallback
from unmask.data.advice import (
    MANY_UNKNOWN,
    script_of,
    spelling_kind,
    text_facts,
    train_fitting,
    unknown_warning,
    vocabulary_choice,
)
from unmask.data.prepare import CorpusGroup, join_stats
from unmask.data.sampling import MixedText, MixtureSampler, WindowSampler, is_weighted
from unmask.data.settings import DataConfig
from unmask.data.sources import BaseSource
from unmask.data.split import LEFT_OUT, DocumentStats, Split, divide
from unmask.data.workers import Task, TaskRunner
from unmask.tokenization.tokenizer import Encoded, Tokenizer
from unmask.tokenization.words import WordsRule, codes, detect_words

_BLOCK_CHARACTERS: Final = 1 << 20  # counted at once: the fixed cost of a count equals that of this many characters
_REPLACEMENT: Final = 0xFFFD
_ORDINARY_CONTROLS: Final = (0x09, 0x0A, 0x0D)


@dataclass(frozen=True)
class Foreign:
    """A frequent character outside the main script."""

    character: str
    name: str
    count: int


class CharacterCounts:
    """Counts of characters, in 9 MB of memory for any size of text."""

    def __init__(self) -> None:
        self._counts: NDArray[np.int64] = np.zeros(0x110000, dtype=np.int64)
        self._pending: list[str] = []
        self._size = 0

    def add(self, text: str) -> None:
        """Count the characters of a text."""
        self._pending.append(text)
        self._size += len(text)
        if self._size >= _BLOCK_CHARACTERS:
            self._count()

    def _count(self) -> None:
        self._counts += np.bincount(codes("".join(self._pending)), minlength=len(self._counts))
        self._pending, self._size = [], 0

    @property
    def counts(self) -> Int[np.ndarray, "C"]:
        """Number of occurrences of each code point."""
        if self._pending:
            self._count()
        return self._counts

    @property
    def distinct(self) -> int:
        """Number of different characters."""
        return int(np.count_nonzero(self.counts))

    @property
    def utf8_bytes(self) -> int:
        """Bytes of the text in UTF-8."""
        counts = self.counts
        return sum(int(counts[first:].sum()) for first in (0, 0x80, 0x800, 0x10000))

    @property
    def replaced(self) -> int:
        """Number of U+FFFD, which replaces undecodable bytes."""
        return int(self.counts[_REPLACEMENT])

    @property
    def controls(self) -> int:
        """Number of control characters other than tabs and line ends."""
        below = int(self.counts[:0x20].sum()) + int(self.counts[0x7F:0xA0].sum())
        return below - sum(int(self.counts[code]) for code in _ORDINARY_CONTROLS)

    def scripts(self) -> dict[str, float]:
        """Return the fraction of each script among all letters, the largest first."""
        totals: Counter[str] = Counter()
        for code in np.flatnonzero(self.counts).tolist():
            if script := script_of(chr(code)):
                totals[script] += int(self.counts[code])
        total = max(1, totals.total())
        return {script: count / total for script, count in totals.most_common()}

    def foreign(self, limit: int) -> tuple[Foreign, ...]:
        """Return the most frequent non-ASCII characters outside the main script."""
        main = next(iter(self.scripts()), "")
        present = [code for code in np.flatnonzero(self.counts).tolist() if code >= 0x80]
        outside = [code for code in present if script_of(chr(code)) != main and chr(code).isprintable()]
        outside.sort(key=lambda code: (-int(self.counts[code]), code))
        return tuple(
            Foreign(chr(code), unicodedata.name(chr(code), f"U+{code:04X}"), int(self.counts[code]))
            for code in outside[:limit]
        )


_EXAMPLES: Final = 5
_EXAMPLE_CHARACTERS: Final = 2_000
_QUOTED_CHARACTERS: Final = 60
_REPORT_CHARACTERS: Final = 1_000_000


@dataclass(frozen=True)
class NamedText:
    """One of several input texts."""

    name: str
    weight: float  # 0 without a weight
    documents: int
    characters: int


class TextReader:
    """Second pass over a text, run by the constructor: counts characters, draws a sample and examples."""

    def __init__(
        self, source: BaseSource, stats: DocumentStats, seed: int, wanted: int, progress: ProgressCallback
    ) -> None:
        """Read the source and draw a sample of about `wanted` characters."""
        self.letters = CharacterCounts()
        self.sample: list[str] = []
        self.beginnings: dict[int, str] = {}  # document -> beginning of its text
        self.copy = ""
        self.texts: list[NamedText] = []
        self.groups: list[CorpusGroup] = []
        self._stats, self._wanted = stats, wanted
        whole = int(stats.lengths.sum())
        share = wanted / whole
        is_drawn = rng.uniform(seed, "look", np.arange(stats.documents)) < share
        full = np.flatnonzero(stats.lengths)
        chosen = rng.permute(np.arange(min(_EXAMPLES, len(full))), len(full), seed, "look") if len(full) else full
        self._shown = set(full[chosen].tolist())
        self.sample_characters = 0
        self._copied = _most_copied(stats)
        done = reported = 0
        for document, chunk in self._documents(source):
            self.letters.add(chunk.text)
            # Later chunks of a document are drawn one by one: they are long, so there are few of them.
            if share >= 1 or (
                rng.uniform(seed, "look", document, chunk.number)[0] < share if chunk.number else is_drawn[document]
            ):
                self._take(chunk.text)
            if not chunk.number:
                self._remember(document, chunk.text)
            done += len(chunk.text)
            if done - reported >= _REPORT_CHARACTERS:
                reported = done
                progress("counting characters", min(0.99, done / whole))
        progress("counting characters", 1.0)
        if not self.sample:
            self.sample.append(stats.sample)

    def _take(self, text: str) -> None:
        """Add a text to the sample, which is limited to twice the wanted size."""
        if self.sample_characters + len(text) <= 2 * self._wanted:
            self.sample.append(text)
            self.sample_characters += len(text)

    def _remember(self, document: int, text: str) -> None:
        if document in self._shown:
            self.beginnings[document] = text[:_EXAMPLE_CHARACTERS]
        if document == self._copied:
            self.copy = text[:_QUOTED_CHARACTERS]

    def _documents(self, source: BaseSource) -> Iterator[tuple[int, DocumentChunk]]:
        """Yield all chunks with the number of their document, input by input."""
        parts = list(source.parts())
        groups: Sequence[InputGroup] = source.groups
        document = part = 0
        for group in groups:
            first, characters = document, 0
            for shard in parts[part : part + group.parts]:
                for chunk in source.documents(shard):
                    if document >= self._stats.documents:
                        raise TextError("the text changed while it was read", hint="run the command again")
                    yield document, chunk
                    characters += chunk.characters
                    document += chunk.last
            part += group.parts
            self.texts.append(NamedText(group.name, group.weight, document - first, characters))
            self.groups.append(CorpusGroup(group.name, group.weight, first, document))


def _most_copied(stats: DocumentStats) -> int:
    """Return the first document of the most frequent text; -1 if all are distinct."""
    full = np.flatnonzero(stats.lengths)
    _, first, count = np.unique(stats.hashes[full], return_index=True, return_counts=True)
    if not len(count) or count.max() < 2:
        return -1
    return int(full[first[np.argmax(count)]])


SAMPLE_CHARACTERS: Final = 3_000_000  # enough for a tokenizer of 8,192 tokens, which then trains within a second
_SAMPLE_PER_TOKEN: Final = 200  # a larger vocabulary needs more text
_EXAMPLE_TOKENS: Final = 80
_FOREIGN: Final = 12
_BATCH_CHARACTERS: Final = 1_000_000
# Thresholds of the warnings.
_MANY_COPIES: Final = 0.05
_SHORT_CHARACTERS: Final = 20
_LITTLE_CHARACTERS: Final = 1_000_000


@dataclass(frozen=True)
class Copies:
    """Exact copies of earlier documents."""

    documents: int
    share: float
    characters: int
    most: int  # occurrences of the most frequent text
    example: str  # beginning of the most frequent text


@dataclass(frozen=True)
class Bin:
    """Documents of `first` to `last` characters."""

    first: int
    last: int
    documents: int
    characters: int


@dataclass(frozen=True)
class Lengths:
    """Lengths of documents in characters."""

    mean: float
    median: int
    tenth: int  # 10 % of the documents are at most this long
    ninetieth: int
    longest: int
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Alphabet:
    """Characters of the text."""

    distinct: int
    scripts: Mapping[str, float]  # fraction of all letters
    foreign: tuple[Foreign, ...]
    replaced: int  # U+FFFD
    controls: int


@dataclass(frozen=True)
class HeldOutStats:
    """The held-out text."""

    by: str
    share: str
    documents: int
    characters: int


@dataclass(frozen=True)
class TokenizedSample:
    """Statistics of a tokenizer on the sample."""

    kind: str
    vocabulary: int
    trained: bool  # whether it was trained on the sample
    sample_characters: int
    characters_per_token: float
    unknown_share: float  # fraction of the characters of the sample


@dataclass(frozen=True)
class StageStats:
    """Estimates for one stage of the recipe, with special tokens."""

    length: int
    windows: int
    tokens_per_window: float
    epoch_tokens: int
    seen: Mapping[str, float]  # epochs of each input per epoch, if the inputs have weights


@dataclass(frozen=True)
class ExampleToken:
    """The text of a token."""

    text: str
    starts_word: bool
    is_unknown: bool


@dataclass(frozen=True)
class Example:
    """The tokens at the beginning of a document."""

    document: int
    characters: int
    tokens: tuple[ExampleToken, ...]
    is_whole: bool


@dataclass(frozen=True)
class Report:
    """Statistics of a text."""

    documents: int
    characters: int
    bytes: int
    texts: tuple[NamedText, ...]  # empty for a single text
    copies: Copies
    lengths: Lengths
    alphabet: Alphabet
    words: WordsRule
    words_by: str
    held_out: HeldOutStats | None
    tokenizer: TokenizedSample | None
    stages: tuple[StageStats, ...]
    examples: tuple[Example, ...]
    left_out: int  # skipped lines and rows
    choices: tuple[str, ...]  # settings that were chosen because of the text, each with its reason
    warnings: tuple[str, ...]


def survey(source: BaseSource, progress: ProgressCallback) -> DocumentStats:
    """Read everything once and return the statistics of all documents.

    Raises:
        TextError: the text can't be read.
    """
    parts = tuple(source.parts())
    total_bytes = sum(part.last_byte - part.first_byte for part in parts)
    done = 0

    def report(characters: int) -> None:
        nonlocal done
        done += characters
        # Progress is characters ÷ bytes. They differ, mostly in compressed files, so the end is reported separately.
        progress("reading the text", min(0.99, done / max(1, total_bytes)))

    with TemporaryDirectory() as folder:
        task = Task(0, parts, folder)
        stats = join_stats(Path(folder), [task], [TaskRunner(source).run("survey", task, report)])
        stats = replace(stats, lengths=np.array(stats.lengths), hashes=np.array(stats.hashes))
    progress("reading the text", 1.0)
    return stats


def inspect_text(
    source: BaseSource,
    settings: DataConfig,
    lengths: Sequence[int],
    progress: ProgressCallback,
    *,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    shrinks: bool = False,
) -> Report:
    """Read a text and return its statistics.

    Args:
        source: the text.
        settings: how the text is read, and which tokenizer is trained.
        lengths: maximum sequence length of each stage, with special tokens.
        progress: called with the stage and its completed fraction.
        seed: random seed of the sample and the examples.
        tokenizer: existing tokenizer; by default, one is trained on a sample.
        shrinks: whether the trained vocabulary may be smaller than its setting, if the text gives no more.

    Raises:
        TextError: the text can't be read, or is empty.
    """
    stats = survey(source, progress)
    if not int(stats.lengths.sum()):
        raise TextError("the text is empty or blank", hint="name a text with characters other than white space")
    words: WordsRule = detect_words(stats.sample) if settings.words == "auto" else settings.words
    wanted = max(SAMPLE_CHARACTERS, _SAMPLE_PER_TOKEN * getattr(settings.tokenizer, "vocab_size", 0))
    reader = TextReader(source, stats, seed, wanted, progress)
    warnings: list[str] = []
    try:
        split = divide(stats, settings.held_out, drop_duplicates=settings.drop_duplicates)
    except TextError as error:
        split = None
        warnings.append(error.message)
    trained = tokenizer is None
    choice = None
    try:
        if tokenizer is None:
            progress("training the tokenizer on a sample", 0.0)
            tokenizer = train_fitting(lambda: iter(reader.sample), settings.tokenizer, shrinks=shrinks)
            choice = vocabulary_choice(settings, tokenizer.size)
            progress("training the tokenizer on a sample", 1.0)
    except TokenizerError as error:
        progress("training the tokenizer on a sample", 1.0)
        warnings.append(
            f"can't train this tokenizer on {reader.sample_characters:,} characters of this text: {error.message}"
            + (f": {error.hint}" if error.hint else "")
        )
    seen = None if tokenizer is None else _tokenized(reader.sample, tokenizer, words, settings, trained)
    stages: tuple[StageStats, ...] = ()
    if tokenizer is not None and seen is not None:
        num_special_tokens = tokenizer.num_special_tokens()
        tokens = _tokens(stats, split, seen)
        stages = tuple(_stage(tokens, reader.groups, length, num_special_tokens) for length in lengths)
    report = Report(
        documents=stats.documents,
        characters=stats.characters,
        bytes=reader.letters.utf8_bytes + stats.characters - int(stats.lengths.sum()),  # a line end is one byte
        texts=tuple(reader.texts) if len(reader.texts) > 1 else (),
        copies=_copies(stats, reader.copy),
        lengths=_lengths(stats.lengths),
        alphabet=_alphabet(reader.letters),
        words=words,
        words_by=settings.words,
        held_out=_held_out(stats, split),
        tokenizer=seen,
        stages=stages,
        examples=() if tokenizer is None else tuple(_examples(reader, stats, tokenizer, words)),
        left_out=sum(source.left_out.values()),
        choices=() if choice is None else (str(choice),),
        warnings=(),
    )
    if seen is not None and seen.unknown_share > MANY_UNKNOWN:
        facts, kind = text_facts(source), settings.tokenizer.kind if trained else "file"
        fix = f"use --set data.tokenizer.kind={spelling_kind(facts, kind)}"
        warnings.append(f"{unknown_warning(seen.unknown_share, kind, facts)}; {fix}")
    return replace(report, warnings=(*source.warnings, *warnings, *_warnings(report, settings, lengths)))


def _copies(stats: DocumentStats, example: str) -> Copies:
    full = stats.lengths > 0
    lengths, hashes = stats.lengths[full], stats.hashes[full]
    _, first, count = np.unique(hashes, return_index=True, return_counts=True)
    documents = len(hashes) - len(first)
    characters = int(lengths.sum()) - int(lengths[first].sum())
    most = int(count.max()) if len(count) else 0
    return Copies(documents, documents / max(1, len(hashes)), characters, most, example)


def _lengths(lengths: Int[np.ndarray, "N"]) -> Lengths:
    edges = [0, 1]
    while edges[-1] <= int(lengths.max()):
        edges.append(edges[-1] * 3 if len(edges) % 2 == 0 else edges[-2] * 10)
    bin_of = np.searchsorted(np.array(edges), lengths, side="right") - 1
    documents = np.bincount(bin_of, minlength=len(edges))
    characters = np.bincount(bin_of, weights=lengths, minlength=len(edges))
    filled = np.flatnonzero(documents).tolist()
    bins = tuple(
        Bin(edges[at], edges[at + 1] - 1, int(documents[at]), int(characters[at]))
        for at in range(filled[0], filled[-1] + 1)
    )
    tenth, median, ninetieth = (int(value) for value in np.quantile(lengths, (0.1, 0.5, 0.9), method="lower"))
    return Lengths(float(lengths.mean()), median, tenth, ninetieth, int(lengths.max()), bins)


def _alphabet(letters: CharacterCounts) -> Alphabet:
    return Alphabet(letters.distinct, letters.scripts(), letters.foreign(_FOREIGN), letters.replaced, letters.controls)


def _held_out(stats: DocumentStats, split: Split | None) -> HeldOutStats | None:
    if split is None:
        return None
    held = np.where(split.first_held == LEFT_OUT, 0, stats.lengths - split.first_held)
    return HeldOutStats(split.by, str(split.share), int((held > 0).sum()), int(held.sum()))


def _tokenized(
    sample: Sequence[str], tokenizer: Tokenizer, words: WordsRule, settings: DataConfig, trained: bool
) -> TokenizedSample:
    """Encode the sample in batches and return its statistics."""
    tokens = unknown = size = pending = 0
    batch: list[str] = []
    for number, text in enumerate(sample, start=1):
        batch.append(text)
        pending += len(text)
        if pending >= _BATCH_CHARACTERS or number == len(sample):
            for encoded in tokenizer.encode_batch(batch, words):
                tokens += len(encoded.ids)
                unknown += encoded.characters_unknown
            size, pending, batch = size + pending, 0, []
    kind = settings.tokenizer.kind if trained else "given"
    return TokenizedSample(kind, tokenizer.size, trained, size, size / max(1, tokens), unknown / max(1, size))


def _tokens(stats: DocumentStats, split: Split | None, seen: TokenizedSample) -> NDArray[np.int64]:
    """Estimate the training tokens of each document."""
    characters = stats.lengths if split is None else np.maximum(split.first_held, 0)
    return np.ceil(characters / seen.characters_per_token).astype(np.int64)


def _stage(tokens: NDArray[np.int64], groups: Sequence[MixedText], length: int, num_special_tokens: int) -> StageStats:
    inside = length - num_special_tokens
    seen: dict[str, float] = {}
    windows = WindowSampler(tokens, inside, 0).count(0)
    epoch = int(tokens.sum()) + num_special_tokens * windows
    if is_weighted(groups):
        mixture = MixtureSampler(tokens, groups, inside, 0, num_special_tokens=num_special_tokens, stride=1)
        epoch = mixture.epoch_tokens(num_special_tokens)
        seen = mixture.epochs_by_text(epoch)
    return StageStats(length, windows, epoch / max(1, windows), epoch, seen)


def _examples(reader: TextReader, stats: DocumentStats, tokenizer: Tokenizer, words: WordsRule) -> Iterator[Example]:
    for document in sorted(reader.beginnings):
        text = reader.beginnings[document]
        encoded = tokenizer.encode(text, words)
        length = int(stats.lengths[document])
        whole = len(encoded.ids) <= _EXAMPLE_TOKENS and length <= len(text)
        yield Example(document, length, tuple(_example_tokens(text, encoded, tokenizer)), whole)


def _example_tokens(text: str, encoded: Encoded, tokenizer: Tokenizer) -> Iterator[ExampleToken]:
    """Yield the text of each token; a character of several tokens appears in the first."""
    rows = zip(encoded.ids.tolist(), encoded.marks.tolist(), encoded.offsets.tolist(), strict=True)
    done = 0
    for id, marks, (first, last) in list(rows)[:_EXAMPLE_TOKENS]:
        yield ExampleToken(text[max(first, done) : last], bool(marks & WORD_START), id == tokenizer.unknown_id)
        done = max(done, last)


def _warnings(report: Report, settings: DataConfig, lengths: Sequence[int]) -> Iterator[str]:
    """Yield warnings about the text and the settings."""
    if report.left_out:
        yield f"{report.left_out:,} lines or rows were skipped"
    copies = report.copies
    if copies.share > _MANY_COPIES and not settings.drop_duplicates:
        yield (f"{copies.share:.0%} of the documents are copies: drop them with --set data.drop_duplicates=true")
    if report.lengths.median < _SHORT_CHARACTERS:
        yield (
            f"half of the documents have at most {report.lengths.median} characters, which gives little context: "
            "check data.document"
        )
    if report.documents == 1:
        yield "the text is a single document"
    if report.alphabet.replaced:
        yield f"the text contains U+FFFD {report.alphabet.replaced:,} times, which replaces undecodable bytes"
    if report.alphabet.controls:
        yield f"the text contains {report.alphabet.controls:,} control characters other than tabs and line ends"
    if report.characters < _LITTLE_CHARACTERS:
        yield f"the text has only {report.characters:,} characters: a model of any size will overfit"
    for stage, length in zip(report.stages, lengths, strict=False):
        if stage.epoch_tokens < length:
            yield f"the training text is shorter than one sequence of {length} tokens"
