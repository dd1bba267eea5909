"""Configs of all tokenizers ([data.tokenizer] of a recipe), and helpers that the trainers share.

The helpers are the default special tokens, the sample of training text and the errors about the vocabulary size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from unmask.core.config import require
from unmask.core.errors import TokenizerError
from unmask.core.types import ProgressCallback

PREFIX: Final = "##"  # prefix of tokens that continue a word
LONGEST_WORD: Final = 100  # characters; a longer word becomes [UNK]
UNKNOWN: Final = "[UNK]"
MASK: Final = "[MASK]"
SPECIALS: Final = ("[PAD]", UNKNOWN, "[CLS]", "[SEP]", MASK)
BYTES: Final = 256
SPECIALS_AT: Final = "data.tokenizer.special_tokens"
VOCABULARY_AT: Final = "data.tokenizer.vocab_size"
_BLOCK_CHARACTERS: Final = 1 << 18


@dataclass(frozen=True)
class WordPieceConfig:
    """Train WordPiece, as in BERT: words and parts of words."""

    kind: Literal["wordpiece"] = "wordpiece"  # Kind of tokenizer.
    vocab_size: int = 8192  # [tokens] Size of the vocabulary, special tokens included.
    lowercase: bool = False  # Whether text is lowercased.
    strip_accents: bool = False  # Whether accents are removed. Independent of `lowercase`, unlike in BERT.
    clean_text: bool = True  # Whether control characters are removed and every white space becomes a space.
    handle_chinese_chars: bool = True  # Whether each Han character is a word.
    special_tokens: tuple[str, ...] = SPECIALS  # Special tokens, which get the first ids. [MASK] is necessary.
    min_frequency: int = 2  # [occurrences] Minimum count of a character, or of a pair that is merged.
    # [characters] Maximum size of the sample of the training text that the tokenizer is trained on.
    max_train_chars: int = 20_000_000

    def __post_init__(self) -> None:
        require(self, "vocab_size", min=len(self.special_tokens) + 1)
        require(self, "min_frequency", "max_train_chars", min=1)


@dataclass(frozen=True)
class ByteBpeConfig:
    """Train byte-level BPE, as in RoBERTa and ModernBERT: frequent pairs are merged, no character is unknown."""

    kind: Literal["bpe"] = "bpe"  # Kind of tokenizer.
    vocab_size: int = 8192  # [tokens] Size of the vocabulary, special tokens and the 256 bytes included.
    lowercase: bool = False  # Whether text is lowercased.
    strip_accents: bool = False  # Whether accents are removed. Independent of `lowercase`, unlike in BERT.
    clean_text: bool = False  # Whether control characters are removed and every white space becomes a space.
    special_tokens: tuple[str, ...] = SPECIALS  # Special tokens, which get the first ids. [MASK] is necessary.
    min_frequency: int = 2  # [occurrences] Minimum count of a pair that is merged.
    # [characters] Maximum size of the sample of the training text that the tokenizer is trained on.
    max_train_chars: int = 20_000_000

    def __post_init__(self) -> None:
        require(self, "vocab_size", min=len(self.special_tokens) + BYTES)
        require(self, "min_frequency", "max_train_chars", min=1)


@dataclass(frozen=True)
class UnigramConfig:
    """Train Unigram, as in ALBERT, T5 and XLM-R: tokens of the highest likelihood (Kudo 2018, arXiv 1804.10959)."""

    kind: Literal["unigram"] = "unigram"  # Kind of tokenizer.
    vocab_size: int = 8192  # [tokens] Size of the vocabulary, special tokens included.
    lowercase: bool = False  # Whether text is lowercased.
    strip_accents: bool = False  # Whether accents are removed. Independent of `lowercase`, unlike in BERT.
    clean_text: bool = True  # Whether control characters are removed and every white space becomes a space.
    special_tokens: tuple[str, ...] = SPECIALS  # Special tokens, which get the first ids. [MASK] is necessary.
    min_frequency: int = 2  # [occurrences] Minimum count of a character, or of a token in the sample.
    max_token_length: int = 16  # [characters] Maximum length of a token.
    # [characters] Maximum size of the sample of the training text that the tokenizer is trained on.
    max_train_chars: int = 10_000_000

    def __post_init__(self) -> None:
        require(self, "vocab_size", min=len(self.special_tokens) + 1)
        require(self, "min_frequency", "max_token_length", "max_train_chars", min=1)


@dataclass(frozen=True)
class ByteConfig:
    """One token for each byte of UTF-8, as in ByT5: nothing is learned, nothing is unknown, sequences are long."""

    kind: Literal["bytes"] = "bytes"  # Kind of tokenizer.
    lowercase: bool = False  # Whether text is lowercased.
    strip_accents: bool = False  # Whether accents are removed. Independent of `lowercase`, unlike in BERT.
    clean_text: bool = False  # Whether control characters are removed and every white space becomes a space.
    special_tokens: tuple[str, ...] = SPECIALS  # Special tokens, which get the first ids. [MASK] is necessary.


@dataclass(frozen=True)
class CharacterConfig:
    """One token for each character, white space included."""

    kind: Literal["characters"] = "characters"  # Kind of tokenizer.
    lowercase: bool = False  # Whether text is lowercased.
    strip_accents: bool = False  # Whether accents are removed. Independent of `lowercase`, unlike in BERT.
    clean_text: bool = False  # Whether control characters are removed and every white space becomes a space.
    special_tokens: tuple[str, ...] = SPECIALS  # Special tokens, which get the first ids. [MASK] is necessary.
    min_frequency: int = 1  # [occurrences] Minimum count of a character; rarer ones are [UNK].

    def __post_init__(self) -> None:
        require(self, "min_frequency", min=1)


@dataclass(frozen=True)
class FileTokenizerConfig:
    """Load an existing tokenizer: a tokenizer.json, or a directory with one."""

    kind: Literal["file"]  # Kind of tokenizer.
    path: Path  # A tokenizer.json, or a directory with one.


@dataclass(frozen=True)
class ExtendedTokenizerConfig:
    """Load an existing WordPiece or BPE tokenizer and add tokens learned from the text."""

    kind: Literal["extended"]  # Kind of tokenizer.
    path: Path  # Existing tokenizer: a tokenizer.json, or a directory with one.
    num_new_tokens: int  # [tokens] Number of tokens to learn from the text and add.
    min_frequency: int = 2  # [occurrences] Minimum count of a word, a character or a pair.
    # [characters] Maximum size of the sample of the training text that the tokenizer is trained on.
    max_train_chars: int = 20_000_000

    def __post_init__(self) -> None:
        require(self, "num_new_tokens", "min_frequency", "max_train_chars", min=1)


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


def check_specials(settings: TrainedConfig) -> None:
    """Check that the special tokens are distinct and include the necessary ones.

    Raises:
        TokenizerError: a token occurs twice, or [MASK] is missing, or [UNK] where the kind needs it.
    """
    needed = (MASK,) if isinstance(settings, ByteBpeConfig | ByteConfig) else (UNKNOWN, MASK)
    missing = [name for name in needed if name not in settings.special_tokens]
    if missing or len(set(settings.special_tokens)) < len(settings.special_tokens):
        raise TokenizerError(
            f"special_tokens lacks {' and '.join(missing)}" if missing else "special_tokens lists a token twice",
            location=SPECIALS_AT,
            hint='write, for example, special_tokens = ["[UNK]", "[MASK]"]',
        )


class VocabSizeError(TokenizerError):
    """The vocabulary size is too large for the text; `largest` is a size that works, or 0."""

    largest = 0


def too_few(wanted: int, given: int, fits: int) -> VocabSizeError:
    """Return the error for a vocabulary size that is too large; `fits` is a size that works, or 0."""
    if not fits:
        return VocabSizeError(
            "no tokens can be learned from this text",
            location=VOCABULARY_AT,
            hint="add text, or set data.tokenizer.kind = 'characters'",
        )
    error = VocabSizeError(
        f"vocabulary size {wanted:,} is too large: this text gives {given:,} tokens",
        location=VOCABULARY_AT,
        hint=f"--set {VOCABULARY_AT}={fits}, or add text",
    )
    error.largest = fits
    return error


def round_below(number: int) -> int:
    """Return the number rounded down to two significant digits."""
    step = 10 ** max(0, len(str(number)) - 2)
    return number // step * step


def sample_blocks(texts: Iterable[str], settings: SampledConfig, on_progress: ProgressCallback | None) -> Iterator[str]:
    """Yield the first `max_train_chars` characters of the texts, in blocks that keep all threads of a trainer busy.

    `on_progress` covers reading only: the library's trainers report no progress.
    """
    return blocks_of(texts, settings.max_train_chars, on_progress, "training the tokenizer")


def blocks_of(
    texts: Iterable[str], max_characters: int, on_progress: ProgressCallback | None, stage: str
) -> Iterator[str]:
    """Yield the first `max_characters` characters in blocks of lines; `on_progress` gets fractions up to 0.5."""
    block, size, left = list[str](), 0, max_characters
    for text in texts:
        if left <= 0:
            break
        for first in range(0, min(len(text), left), _BLOCK_CHARACTERS):
            block.append(text[first : min(first + _BLOCK_CHARACTERS, left)])
            size += len(block[-1])
            if size >= _BLOCK_CHARACTERS:
                yield "\n".join(block)
                if on_progress is not None:
                    on_progress(stage, 0.5 * (1 - max(0, left - first) / max_characters))
                block, size = [], 0
        left -= len(text)
    if block:
        yield "\n".join(block)
