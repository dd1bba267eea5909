"""Room card: which tokenizers there are, as a person says it.

Comes in: the [data.tokenizer] table of a recipe. Goes out: frozen settings of each kind, and what all kinds share:
their special pieces, the sample that they learn from. Called by: settings, tokenizer and the rooms that train each
kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from unmask.core.errors import RecipeError, TokenizerError

PREFIX: Final = "##"  # of a piece that continues a word
LONGEST_WORD: Final = 100  # characters; a longer word becomes [UNK]
UNKNOWN: Final = "[UNK]"
MASK: Final = "[MASK]"
SPECIALS: Final = ("[PAD]", UNKNOWN, "[CLS]", "[SEP]", MASK)
BYTES: Final = 256
SPECIALS_AT: Final = "data.tokenizer.special_tokens"
VOCABULARY_AT: Final = "data.tokenizer.vocab_size"
_BLOCK_CHARACTERS: Final = 1 << 18

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class WordPieceConfig:
    """Pieces of words, as in BERT."""

    kind: Literal["wordpiece"] = "wordpiece"
    vocab_size: int = 8192  # pieces, special ones included
    lowercase: bool = False
    strip_accents: bool = False
    clean_text: bool = True  # control characters out, every white space becomes a space
    handle_chinese_chars: bool = True  # each Han character is a word
    special_tokens: tuple[str, ...] = SPECIALS
    min_frequency: int = 2  # of a character, or of a pair of pieces that becomes one
    max_train_chars: int = 20_000_000  # of training text that is looked at; 3-7 s for 20 MB

    def __post_init__(self) -> None:
        _at_least(self, vocab_size=len(self.special_tokens) + 1, min_frequency=1, max_train_chars=1)


@dataclass(frozen=True)
class ByteBpeConfig:
    """Pieces made by joining frequent pairs of bytes, as in RoBERTa and ModernBERT: nothing is unknown."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: int = 8192  # pieces, special ones and the 256 bytes included
    lowercase: bool = False
    strip_accents: bool = False
    clean_text: bool = False
    special_tokens: tuple[str, ...] = SPECIALS
    min_frequency: int = 2  # of a pair of pieces that becomes one
    max_train_chars: int = 20_000_000

    def __post_init__(self) -> None:
        _at_least(self, vocab_size=len(self.special_tokens) + BYTES, min_frequency=1, max_train_chars=1)


@dataclass(frozen=True)
class UnigramConfig:
    """Pieces that make the text likeliest, as in ALBERT, T5 and XLM-R (Kudo 2018, arXiv 1804.10959)."""

    kind: Literal["unigram"] = "unigram"
    vocab_size: int = 8192  # pieces, special ones included
    lowercase: bool = False
    strip_accents: bool = False
    clean_text: bool = True  # control characters out, every white space becomes a space
    special_tokens: tuple[str, ...] = SPECIALS
    min_frequency: int = 2  # of a character, or of a piece in the sample
    max_token_length: int = 16  # characters
    max_train_chars: int = 10_000_000

    def __post_init__(self) -> None:
        _at_least(self, vocab_size=len(self.special_tokens) + 1, min_frequency=1, max_token_length=1, max_train_chars=1)


@dataclass(frozen=True)
class ByteConfig:
    """Every byte of UTF-8 is a piece, as in ByT5: nothing to learn, nothing unknown, long texts."""

    kind: Literal["bytes"] = "bytes"
    lowercase: bool = False
    strip_accents: bool = False
    clean_text: bool = False
    special_tokens: tuple[str, ...] = SPECIALS


@dataclass(frozen=True)
class CharacterConfig:
    """Every character is a piece, white space too."""

    kind: Literal["characters"] = "characters"
    lowercase: bool = False
    strip_accents: bool = False
    clean_text: bool = False
    special_tokens: tuple[str, ...] = SPECIALS
    min_frequency: int = 1

    def __post_init__(self) -> None:
        _at_least(self, min_frequency=1)


@dataclass(frozen=True)
class FileTokenizerConfig:
    """A tokenizer that exists: a tokenizer.json, or a folder with one."""

    kind: Literal["file"]
    path: Path


@dataclass(frozen=True)
class ExtendedTokenizerConfig:
    """A WordPiece or BPE tokenizer that exists, with more pieces learnt from the text."""

    kind: Literal["extended"]
    path: Path  # of the one that exists
    num_new_tokens: int  # new ones
    min_frequency: int = 2  # of a word, a character or a pair
    max_train_chars: int = 20_000_000

    def __post_init__(self) -> None:
        _at_least(self, num_new_tokens=1, min_frequency=1, max_train_chars=1)


TokenizerConfig = (
    WordPieceConfig
    | ByteBpeConfig
    | UnigramConfig
    | ByteConfig
    | CharacterConfig
    | FileTokenizerConfig
    | ExtendedTokenizerConfig
)
TrainedConfig = WordPieceConfig | ByteBpeConfig | UnigramConfig | ByteConfig | CharacterConfig
SampledConfig = WordPieceConfig | ByteBpeConfig | UnigramConfig


def _at_least(settings: object, **least: int) -> None:
    for name, bound in least.items():
        if getattr(settings, name) < bound:
            raise RecipeError(f"`{name}` is {getattr(settings, name)}", location=name, hint=f"give {bound} or more")


def check_specials(settings: TrainedConfig) -> None:
    """Refuse special pieces that a model can't do without, or that stand there twice.

    Raises:
        TokenizerError: they lack [MASK], or [UNK] where the kind needs one.
    """
    needed = (MASK,) if isinstance(settings, ByteBpeConfig | ByteConfig) else (UNKNOWN, MASK)
    missing = [name for name in needed if name not in settings.special_tokens]
    if missing or len(set(settings.special_tokens)) < len(settings.special_tokens):
        raise TokenizerError(
            f"the special pieces lack {' and '.join(missing)}" if missing else "a special piece stands there twice",
            location=SPECIALS_AT,
            hint='write them as in special_tokens = ["[UNK]", "[MASK]"]',
        )


def too_few(wanted: int, given: int, fits: int) -> TokenizerError:
    """A vocabulary that the text can't give; `fits` is a number that it can, 0 where there is none."""
    if not fits:
        return TokenizerError(
            "this text gives no pieces", location=VOCABULARY_AT, hint="give more text, or kind = 'characters'"
        )
    return TokenizerError(
        f"a vocabulary of {wanted:,} is more than this text can give: {given:,} pieces",
        location=VOCABULARY_AT,
        hint=f"--set {VOCABULARY_AT}={fits}, or more text",
    )


def round_below(number: int) -> int:
    """The number with all but its first two digits zero."""
    step = 10 ** max(0, len(str(number)) - 2)
    return number // step * step


def sample_blocks(texts: Iterable[str], settings: SampledConfig, progress: Progress | None) -> Iterator[str]:
    """The first `max_train_chars` of the texts, in blocks that keep the trainer's threads busy.

    `progress` hears of feeding alone: what a trainer does afterwards can't be watched.
    """
    return blocks_of(texts, settings.max_train_chars, progress, "training the tokenizer")


def blocks_of(texts: Iterable[str], characters: int, progress: Progress | None, stage: str) -> Iterator[str]:
    """The first so many characters of texts in blocks of lines; `progress` hears of it up to one half."""
    held, size, room = list[str](), 0, characters
    for text in texts:
        if room <= 0:
            break
        for first in range(0, min(len(text), room), _BLOCK_CHARACTERS):
            held.append(text[first : min(first + _BLOCK_CHARACTERS, room)])
            size += len(held[-1])
            if size >= _BLOCK_CHARACTERS:
                yield "\n".join(held)
                if progress is not None:
                    progress(stage, 0.5 * (1 - max(0, room - first) / characters))
                held, size = [], 0
        room -= len(text)
    if held:
        yield "\n".join(held)
