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

    method: Literal["auto", "hash", "tail"] = "auto"  # auto: hash from 100 documents on, else tail
    fraction: Fraction | Literal["auto"] = "auto"  # auto: hash 1% of all characters, tail 10% of each document
    max_size: Quantity = default(default_factory=lambda: Quantity(2_000_000, "characters"))  # hash only

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

    kind: Literal["files"] = "files"


@dataclass(frozen=True)
class WindowsConfig:
    """Samples that are windows of a document, as long as the stage's `max_seq_len`."""

    kind: Literal["windows"] = "windows"


@dataclass(frozen=True)
class DataConfig:
    """How text is read, split, tokenized and sampled."""

    document: Literal["auto", "blank-line", "line", "file"] = "auto"  # unit that is one document; auto: blank-line
    words: Literal["auto", WordsRule] = "auto"  # auto: characters for Chinese and Japanese, else spaces
    errors: ErrorsRule = "strict"  # replace: U+FFFD for bytes that are not UTF-8; skip: skip and count
    field: str = "text"  # field of a .jsonl line; column of .csv, .tsv, .parquet and datasets
    quoting: QuotingRule = "csv"  # for .csv and .tsv; none: quotes are ordinary characters, each line is a row
    unicode: UnicodeForm = "NFC"
    drop_duplicates: bool = False  # skip documents whose text occurred before
    valid: Mapping[str, str] = default(default_factory=dict[str, str])  # name -> additional validation text
    held_out: HeldOutConfig = default(default_factory=HeldOutConfig)
    tokenizer: TokenizerConfig = default(default_factory=WordPieceConfig)
    source: FilesConfig | PluginSourceConfig = default(default_factory=FilesConfig)
    sampler: WindowsConfig | PluginSamplerConfig = default(default_factory=WindowsConfig)

    def __post_init__(self) -> None:
        for name in self.valid:
            if not _NAME.fullmatch(name):
                raise RecipeError(
                    f"invalid name of a validation text: {name!r}",
                    location="valid",
                    hint="use letters, digits, - and _, as in --valid news=valid_news.txt",
                )

    @property
    def rule(self) -> DocumentRule:
        """The unit of plain text that is one document; a row of a table is always one document."""
        return "blank-line" if self.document == "auto" else self.document

    def absolute(self) -> DataConfig:
        """Return the settings with an absolute path of the tokenizer."""
        if not isinstance(self.tokenizer, FileTokenizerConfig | ExtendedTokenizerConfig):
            return self
        return replace(self, tokenizer=replace(self.tokenizer, path=self.tokenizer.path.absolute()))
