"""The [data] section of a recipe: how text is read, split, tokenized and sampled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from dataclasses import field as default
from typing import Literal

from unmask.core.errors import RecipeError
from unmask.core.plugins import PluginSamplerConfig, PluginSourceConfig
from unmask.core.quantities import Fraction, Quantity
from unmask.core.remote import require_public
from unmask.tokenization.settings import (
    ExtendedTokenizerConfig,
    FileTokenizerConfig,
    TokenizerConfig,
    WordPieceConfig,
)
from unmask.tokenization.words import WordsRule

DocumentRule = Literal["blank-line", "line", "file"]
ErrorsRule = Literal["strict", "replace", "skip"]
UnicodeForm = Literal["NFC", "NFKC", "none"]
QuotingRule = Literal["csv", "none"]
_NAME = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class HeldOutConfig:
    """The part of the text that is held out for validation."""

    # hash: whole documents, by the hash of their text; tail: the end of each document; auto: hash from 100 documents.
    method: Literal["auto", "hash", "tail"] = "auto"
    # [fraction of the characters] Size; auto: hash 1% of the text, tail 10% of each document.
    fraction: Fraction | Literal["auto"] = "auto"
    # [characters] Maximum size; with hash only.
    max_size: Quantity = default(default_factory=lambda: Quantity(2_000_000, "characters"))

    def __post_init__(self) -> None:
        self.max_size.require("characters")
        if isinstance(self.fraction, Fraction) and not 0 < self.fraction.fraction < 1:
            raise RecipeError(
                f"invalid fraction: got {self.fraction}, expected more than 0% and less than 100%",
                location="fraction",
                hint="set a fraction such as 1%",
            )


@dataclass(frozen=True)
class FilesConfig:
    """Text from the files and datasets that are named on the command line."""

    kind: Literal["files"] = "files"  # Files and datasets.


@dataclass(frozen=True)
class WindowsConfig:
    """Samples that are windows of a document, as long as the stage's `max_seq_len`."""

    kind: Literal["windows"] = "windows"  # Windows of a document.


@dataclass(frozen=True)
class DataConfig:
    """How text is read, split, tokenized and sampled."""

    # Unit of plain text that is one document; blank-line: a paragraph; auto: a file of code, else a paragraph.
    document: Literal["auto", "blank-line", "line", "file"] = "auto"
    # What a word is, for whole-word masking; auto: characters for Chinese and Japanese, else spaces.
    words: Literal["auto", WordsRule] = "auto"
    # Bytes that are not UTF-8 and malformed rows; strict: an error; replace: U+FFFD; skip: the line is left out.
    errors: ErrorsRule = "strict"
    field: str = "text"  # Field of a .jsonl line; column of .csv, .tsv, .parquet and datasets.
    # Quotes in .csv and .tsv; csv: they enclose cells; none: they are ordinary characters, each line is a row.
    quoting: QuotingRule = "csv"
    unicode: UnicodeForm = "NFC"  # Unicode normalization form of the text.
    drop_duplicates: bool = False  # Whether documents are skipped whose text occurred before.
    # [fraction of the characters] Largest fraction of unknown characters that a run starts with.
    max_unknown: Fraction = Fraction(0.2)
    valid: Mapping[str, str] = default(default_factory=dict[str, str])  # Additional validation texts: name = path.
    # The part of the text that is held out for validation.
    held_out: HeldOutConfig = default(default_factory=HeldOutConfig)
    # Tokenizer to train or to load (docs/tokenizers.md).
    tokenizer: TokenizerConfig = default(default_factory=WordPieceConfig)
    source: FilesConfig | PluginSourceConfig = default(default_factory=FilesConfig)  # Where text comes from.
    # How documents become samples.
    sampler: WindowsConfig | PluginSamplerConfig = default(default_factory=WindowsConfig)

    def __post_init__(self) -> None:
        for name in self.valid:
            if not _NAME.fullmatch(name):
                raise RecipeError(
                    f"invalid name of a validation text: {name!r}",
                    location="valid",
                    hint="use letters, digits, - and _, as in --valid news=valid_news.txt",
                )
            require_public(self.valid[name], f"valid.{name}")

    @property
    def rule(self) -> DocumentRule:
        """The unit of plain text that is one document; a row of a table is always one document."""
        return "blank-line" if self.document == "auto" else self.document

    def absolute(self) -> DataConfig:
        """Return the settings with an absolute path of the tokenizer."""
        if not isinstance(self.tokenizer, FileTokenizerConfig | ExtendedTokenizerConfig):
            return self
        return replace(self, tokenizer=replace(self.tokenizer, path=self.tokenizer.path.absolute()))
