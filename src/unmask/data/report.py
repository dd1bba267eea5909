"""Room card: which characters a text has.

Comes in: text, passage by passage. Goes out: how often each character occurs, the text's size in UTF-8, its scripts,
and the characters that stand outside the main one. Called by: report.

What a letter is called in Unicode begins with its script ("HANGUL SYLLABLE GA"), which is all that is needed here.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from unmask.core import rng
from unmask.core.errors import TextError, TokenizerError
from unmask.core.types import WORD_START, DocumentChunk, InputGroup, Source
from unmask.data.prepare import CorpusGroup
from unmask.data.sampling import MixedText, Mixture, WindowSampler, is_weighted
from unmask.data.settings import DataConfig
from unmask.data.split import LEFT_OUT, DocumentStats, Progress, Split, divide, survey
from unmask.tokenization.tokenizer import Encoded, Tokenizer, train_tokenizer
from unmask.tokenization.words import WordsRule, codes, detect_words

_BLOCK_CHARACTERS: Final = 1 << 20  # counted at a time: a count costs as much as so many characters
_REPLACEMENT: Final = 0xFFFD
_ORDINARY_CONTROLS: Final = (0x09, 0x0A, 0x0D)


@dataclass(frozen=True)
class Foreign:
    """A character outside the main script."""

    character: str
    name: str
    count: int


class Letters:
    """Counts of characters: 8 bytes for each that Unicode can have, whatever the size of the text."""

    def __init__(self) -> None:
        self._counts_C: NDArray[np.int64] = np.zeros(0x110000, dtype=np.int64)
        self._held: list[str] = []
        self._size = 0

    def add(self, text: str) -> None:
        """Count the characters of a text."""
        self._held.append(text)
        self._size += len(text)
        if self._size >= _BLOCK_CHARACTERS:
            self._count()

    def _count(self) -> None:
        self._counts_C += np.bincount(codes("".join(self._held)), minlength=len(self._counts_C))
        self._held, self._size = [], 0

    @property
    def counts_C(self) -> Int[np.ndarray, "C"]:
        """How often each code point occurs."""
        if self._held:
            self._count()
        return self._counts_C

    @property
    def distinct(self) -> int:
        """How many different characters there are."""
        return int(np.count_nonzero(self.counts_C))

    @property
    def utf8_bytes(self) -> int:
        """Bytes of the text as UTF-8."""
        counts_C = self.counts_C
        return sum(int(counts_C[first:].sum()) for first in (0, 0x80, 0x800, 0x10000))

    @property
    def replaced(self) -> int:
        """How often U+FFFD stands where something couldn't be decoded."""
        return int(self.counts_C[_REPLACEMENT])

    @property
    def controls(self) -> int:
        """Control characters other than tabs and line ends."""
        below = int(self.counts_C[:0x20].sum()) + int(self.counts_C[0x7F:0xA0].sum())
        return below - sum(int(self.counts_C[code]) for code in _ORDINARY_CONTROLS)

    def scripts(self) -> dict[str, float]:
        """The share of each script among all letters, the largest first."""
        found: Counter[str] = Counter()
        for code in np.flatnonzero(self.counts_C).tolist():
            if script := _script(chr(code)):
                found[script] += int(self.counts_C[code])
        total = max(1, found.total())
        return {script: count / total for script, count in found.most_common()}

    def foreign(self, most: int) -> tuple[Foreign, ...]:
        """The most frequent characters beyond ASCII that are no letters of the main script."""
        main = next(iter(self.scripts()), "")
        present = [code for code in np.flatnonzero(self.counts_C).tolist() if code >= 0x80]
        outside = [code for code in present if _script(chr(code)) != main and chr(code).isprintable()]
        outside.sort(key=lambda code: (-int(self.counts_C[code]), code))
        return tuple(
            Foreign(chr(code), unicodedata.name(chr(code), f"U+{code:04X}"), int(self.counts_C[code]))
            for code in outside[:most]
        )


def _script(character: str) -> str:
    """The script of a letter; an empty string for what is none."""
    if not character.isalpha():
        return ""
    name = unicodedata.name(character, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
    script = name.partition(" ")[0].partition("-")[0]
    return "HAN" if script in ("CJK", "IDEOGRAPHIC") else script


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

    def __init__(self, source: Source, found: DocumentStats, seed: int, wanted: int, progress: Progress) -> None:
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
        self.max_train_chars = 0
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
        if self.max_train_chars + len(text) <= 2 * self._wanted:
            self.sample.append(text)
            self.max_train_chars += len(text)

    def _remember(self, document: int, text: str) -> None:
        if document in self._shown:
            self.shown[document] = text[:_EXAMPLE_CHARACTERS]
        if document == self._copied:
            self.copy = text[:_QUOTED_CHARACTERS]

    def _documents(self, source: Source) -> Iterator[tuple[int, DocumentChunk]]:
        """All passages with the number of their document, text by text."""
        parts = list(source.parts())
        groups: Sequence[InputGroup] = getattr(source, "groups", ()) or (InputGroup("text", 0.0, len(parts)),)
        document = part = 0
        for group in groups:
            first, characters = document, 0
            for one in parts[part : part + group.parts]:
                for passage in source.documents(one):
                    if document >= self._found.documents:
                        raise TextError("the text has changed while it was read", hint="start again")
                    yield document, passage
                    characters += passage.characters
                    document += passage.last
            part += group.parts
            self.texts.append(NamedText(group.name, group.weight, document - first, characters))
            self.groups.append(CorpusGroup(group.name, group.weight, first, document))


def _most_copied(found: DocumentStats) -> int:
    """The first document of the text that occurs most often; -1 where all differ."""
    full = np.flatnonzero(found.lengths_N)
    _, first, count = np.unique(found.hashes_N[full], return_index=True, return_counts=True)
    if not len(count) or count.max() < 2:
        return -1
    return int(full[first[np.argmax(count)]])


SAMPLE_CHARACTERS: Final = 3_000_000  # which a tokenizer of 8,192 pieces learns from within a second
_SAMPLE_PER_PIECE: Final = 200  # a larger vocabulary needs more text
_EXAMPLE_PIECES: Final = 80
_FOREIGN: Final = 12
_BATCH_CHARACTERS: Final = 1_000_000
# From where on something is worth a word.
_MANY_COPIES: Final = 0.05
_MANY_UNKNOWN: Final = 0.01
_SHORT_CHARACTERS: Final = 20
_LITTLE_CHARACTERS: Final = 1_000_000


@dataclass(frozen=True)
class Copies:
    """Documents whose text was there before, character for character."""

    documents: int
    share: float
    characters: int
    most: int  # how often the most frequent text occurs
    example: str  # how that one begins


@dataclass(frozen=True)
class Bin:
    """Documents of `first` to `last` characters."""

    first: int
    last: int
    documents: int
    characters: int


@dataclass(frozen=True)
class Lengths:
    """How long documents are, in characters."""

    mean: float
    median: int
    tenth: int  # a tenth of them is at most so long
    ninetieth: int
    longest: int
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Alphabet:
    """Which characters there are."""

    distinct: int
    scripts: Mapping[str, float]  # share of all letters
    foreign: tuple[Foreign, ...]
    replaced: int  # U+FFFD
    controls: int


@dataclass(frozen=True)
class HeldOutLook:
    """What validation would see."""

    by: str
    share: str
    documents: int
    characters: int


@dataclass(frozen=True)
class TokenizerLook:
    """What a tokenizer makes of a sample."""

    kind: str
    vocabulary: int
    trained: bool  # on the sample, where none was given
    max_train_chars: int
    characters_per_token: float
    unknown_share: float  # of the sample's characters


@dataclass(frozen=True)
class StageLook:
    """One stage of the recipe: about so many windows an epoch, special tokens counted."""

    length: int
    windows: int
    tokens_per_window: float
    epoch_tokens: int
    seen: Mapping[str, float]  # how often an epoch shows each text, where they have weights


@dataclass(frozen=True)
class Piece:
    """A token, as the text that it stands for."""

    text: str
    starts_word: bool
    is_unknown: bool


@dataclass(frozen=True)
class Example:
    """How a document begins, in pieces."""

    document: int
    characters: int
    pieces: tuple[Piece, ...]
    is_whole: bool


@dataclass(frozen=True)
class Report:
    """What a text is like."""

    documents: int
    characters: int
    bytes: int
    texts: tuple[NamedText, ...]  # where there are several
    copies: Copies
    lengths: Lengths
    alphabet: Alphabet
    words: WordsRule
    words_by: str
    held_out: HeldOutLook | None
    tokenizer: TokenizerLook | None
    stages: tuple[StageLook, ...]
    examples: tuple[Example, ...]
    left_out: int  # lines that could not be read
    warnings: tuple[str, ...]


def look(
    source: Source,
    settings: DataConfig,
    lengths: Sequence[int],
    progress: Progress,
    *,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> Report:
    """Read a text and say what it is like.

    Args:
        source: the text.
        settings: how it is read, and which tokenizer is trained where none is given.
        lengths: slots of a text in each stage, special tokens included.
        progress: told what is being done and which share of it is.
        seed: which documents are shown.
        tokenizer: one that exists.

    Raises:
        TextError: the text can't be read, or holds nothing.
    """
    found = survey(source, progress)
    if not int(found.lengths_N.sum()):
        raise TextError("there is no text: nothing but white space", hint="give some text")
    words: WordsRule = detect_words(found.sample) if settings.words == "auto" else settings.words
    wanted = max(SAMPLE_CHARACTERS, _SAMPLE_PER_PIECE * getattr(settings.tokenizer, "vocab_size", 0))
    read = Reading(source, found, seed, wanted, progress)
    warnings: list[str] = []
    try:
        division = divide(found, settings.held_out, drop_duplicates=settings.drop_duplicates)
    except TextError as error:
        division = None
        warnings.append(f"nothing can be held out: {error.message}")
    trained = tokenizer is None
    try:
        if tokenizer is None:
            progress("training the tokenizer on a sample", 0.0)
            tokenizer = train_tokenizer(iter(read.sample), settings.tokenizer)
            progress("training the tokenizer on a sample", 1.0)
    except TokenizerError as error:
        progress("training the tokenizer on a sample", 1.0)
        warnings.append(
            f"no such tokenizer can be trained on {read.max_train_chars:,} characters of this text: {error.message}"
            + (f": {error.hint}" if error.hint else "")
        )
    seen = None if tokenizer is None else _tokenized(read.sample, tokenizer, words, settings, trained)
    stages: tuple[StageLook, ...] = ()
    if tokenizer is not None and seen is not None:
        num_special_tokens = 2 if tokenizer.cls_sep_ids else 0
        tokens_N = _tokens(found, division, seen)
        stages = tuple(_stage(tokens_N, read.groups, length, num_special_tokens) for length in lengths)
    report = Report(
        documents=found.documents,
        characters=found.characters,
        bytes=read.letters.utf8_bytes + found.characters - int(found.lengths_N.sum()),  # line ends take a byte each
        texts=tuple(read.texts) if len(read.texts) > 1 else (),
        copies=_copies(found, read.copy),
        lengths=_lengths(found.lengths_N),
        alphabet=_alphabet(read.letters),
        words=words,
        words_by=settings.words,
        held_out=_held_out(found, division),
        tokenizer=seen,
        stages=stages,
        examples=() if tokenizer is None else tuple(_examples(read, found, tokenizer, words)),
        left_out=sum(getattr(source, "left_out", {}).values()),
        warnings=(),
    )
    return replace(report, warnings=(*warnings, *_warnings(report, settings, lengths)))


def _copies(found: DocumentStats, example: str) -> Copies:
    full = found.lengths_N > 0
    lengths_K, hashes_K = found.lengths_N[full], found.hashes_N[full]
    _, first, count = np.unique(hashes_K, return_index=True, return_counts=True)
    documents = len(hashes_K) - len(first)
    characters = int(lengths_K.sum()) - int(lengths_K[first].sum())
    most = int(count.max()) if len(count) else 0
    return Copies(documents, documents / max(1, len(hashes_K)), characters, most, example)


def _lengths(lengths_N: Int[np.ndarray, "N"]) -> Lengths:
    edges = [0, 1]
    while edges[-1] <= int(lengths_N.max()):
        edges.append(edges[-1] * 3 if len(edges) % 2 == 0 else edges[-2] * 10)
    held_N = np.searchsorted(np.array(edges), lengths_N, side="right") - 1
    documents_B = np.bincount(held_N, minlength=len(edges))
    characters_B = np.bincount(held_N, weights=lengths_N, minlength=len(edges))
    filled = np.flatnonzero(documents_B).tolist()
    bins = tuple(
        Bin(edges[at], edges[at + 1] - 1, int(documents_B[at]), int(characters_B[at]))
        for at in range(filled[0], filled[-1] + 1)
    )
    tenth, median, ninetieth = (int(value) for value in np.quantile(lengths_N, (0.1, 0.5, 0.9), method="lower"))
    return Lengths(float(lengths_N.mean()), median, tenth, ninetieth, int(lengths_N.max()), bins)


def _alphabet(letters: Letters) -> Alphabet:
    return Alphabet(letters.distinct, letters.scripts(), letters.foreign(_FOREIGN), letters.replaced, letters.controls)


def _held_out(found: DocumentStats, division: Split | None) -> HeldOutLook | None:
    if division is None:
        return None
    left_N = np.where(division.first_held_N == LEFT_OUT, 0, found.lengths_N - division.first_held_N)
    return HeldOutLook(division.by, str(division.share), int((left_N > 0).sum()), int(left_N.sum()))


def _tokenized(
    sample: Sequence[str], tokenizer: Tokenizer, words: WordsRule, settings: DataConfig, trained: bool
) -> TokenizerLook:
    """What the tokenizer makes of the sample, some of it at a time."""
    tokens = unknown = size = waiting = 0
    held: list[str] = []
    for number, text in enumerate(sample, start=1):
        held.append(text)
        waiting += len(text)
        if waiting >= _BATCH_CHARACTERS or number == len(sample):
            for encoded in tokenizer.encode_batch(held, words):
                tokens += len(encoded.ids)
                unknown += encoded.characters_unknown
            size, waiting, held = size + waiting, 0, []
    kind = settings.tokenizer.kind if trained else "given"
    return TokenizerLook(kind, tokenizer.size, trained, size, size / max(1, tokens), unknown / max(1, size))


def _tokens(found: DocumentStats, division: Split | None, seen: TokenizerLook) -> NDArray[np.int64]:
    """About how many tokens each document has to train on."""
    characters_N = found.lengths_N if division is None else np.maximum(division.first_held_N, 0)
    return np.ceil(characters_N / seen.characters_per_token).astype(np.int64)


def _stage(tokens_N: NDArray[np.int64], groups: Sequence[MixedText], length: int, num_special_tokens: int) -> StageLook:
    inside = length - num_special_tokens
    seen: dict[str, float] = {}
    windows = WindowSampler(tokens_N, inside, 0).count(0)
    epoch = int(tokens_N.sum()) + num_special_tokens * windows
    if is_weighted(groups):
        mixture = Mixture(tokens_N, groups, inside, 0, num_special_tokens=num_special_tokens, stride=1)
        epoch = mixture.epoch_tokens
        seen = mixture.seen(epoch)
    return StageLook(length, windows, epoch / max(1, windows), epoch, seen)


def _examples(read: Reading, found: DocumentStats, tokenizer: Tokenizer, words: WordsRule) -> Iterator[Example]:
    for document in sorted(read.shown):
        text = read.shown[document]
        encoded = tokenizer.encode(text, words)
        length = int(found.lengths_N[document])
        whole = len(encoded.ids) <= _EXAMPLE_PIECES and length <= len(text)
        yield Example(document, length, tuple(_pieces(text, encoded, tokenizer)), whole)


def _pieces(text: str, encoded: Encoded, tokenizer: Tokenizer) -> Iterator[Piece]:
    """The text that each token stands for; of tokens that share a character, the first has it."""
    rows = zip(encoded.ids.tolist(), encoded.marks.tolist(), encoded.offsets.tolist(), strict=True)
    done = 0
    for id, marks, (first, last) in list(rows)[:_EXAMPLE_PIECES]:
        yield Piece(text[max(first, done) : last], bool(marks & WORD_START), id == tokenizer.unknown_id)
        done = max(done, last)


def _warnings(report: Report, settings: DataConfig, lengths: Sequence[int]) -> Iterator[str]:
    """What a person should know before training."""
    if report.left_out:
        yield f"{report.left_out:,} lines could not be read and were left out"
    copies = report.copies
    if copies.share > _MANY_COPIES and not settings.drop_duplicates:
        yield (
            f"{copies.share:.0%} of the documents are copies of others: leave them out with "
            "--set data.drop_duplicates=true"
        )
    if report.lengths.median < _SHORT_CHARACTERS:
        yield (
            f"half of the documents have at most {report.lengths.median} characters: there is little context to learn "
            "from; is a document what it should be (data.document)?"
        )
    if report.documents == 1:
        yield "all of the text is one document"
    if report.alphabet.replaced:
        yield f"{report.alphabet.replaced:,} times U+FFFD stands for what could not be decoded"
    if report.alphabet.controls:
        yield f"{report.alphabet.controls:,} control characters other than tabs and line ends"
    if report.characters < _LITTLE_CHARACTERS:
        yield f"{report.characters:,} characters are little: a model of any size will come to know them by heart"
    if report.tokenizer and report.tokenizer.unknown_share > _MANY_UNKNOWN:
        yield (
            f"{report.tokenizer.unknown_share:.1%} of the characters are [UNK], which is never asked about: take a "
            "tokenizer that spells everything, e.g. --set data.tokenizer.kind=bpe"
        )
    for stage, length in zip(report.stages, lengths, strict=False):
        if stage.epoch_tokens < length:
            yield f"all that there is to train on is shorter than one text of {length} slots"
