"""Room card: how text is read, as a person says it.

Comes in: the [data] table of a recipe. Goes out: frozen settings. Called by: sources, survey, corpus, blueprint.
"""

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
_NAME = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class HeldOutConfig:
    """What validation sees and training doesn't."""

    method: Literal["auto", "hash", "tail"] = "auto"  # hash from 100 documents on, else tail
    fraction: Fraction | Literal["auto"] = "auto"  # 1% of all characters by hash, 10% of each document's by tail
    max_size: Quantity = default(default_factory=lambda: Quantity(2_000_000, "characters"))  # by hash only

    def __post_init__(self) -> None:
        self.max_size.require("characters")
        if isinstance(self.fraction, Fraction) and not 0 < self.fraction.fraction < 1:
            raise RecipeError(
                f"a share of {self.fraction} leaves nothing on one side",
                hint="hold out more than 0% and less than 100%",
            )


@dataclass(frozen=True)
class FilesConfig:
    """Text from what is named on the command line."""

    kind: Literal["files"] = "files"


@dataclass(frozen=True)
class WindowsConfig:
    """Samples are windows of a document, as long as the stage says."""

    kind: Literal["windows"] = "windows"


@dataclass(frozen=True)
class DataConfig:
    """How text is read."""

    document: Literal["auto", "blank-line", "line", "file"] = "auto"  # *.txt: blank-line; tables: a row
    words: Literal["auto", WordsRule] = "auto"  # characters for Chinese and Japanese
    errors: ErrorsRule = "strict"  # replace: U+FFFD for bytes that are not UTF-8; skip: leave out and count
    field: str = "text"  # of a .jsonl line; the column of .csv, .tsv, .parquet and data sets
    unicode: UnicodeForm = "NFC"
    drop_duplicates: bool = False  # documents whose text was seen before
    valid: Mapping[str, str] = default(default_factory=dict[str, str])  # name -> text that is measured beside held-out
    held_out: HeldOutConfig = default(default_factory=HeldOutConfig)
    tokenizer: TokenizerConfig = default(default_factory=WordPieceConfig)
    source: FilesConfig | PluginSourceConfig = default(default_factory=FilesConfig)
    sampler: WindowsConfig | PluginSamplerConfig = default(default_factory=WindowsConfig)

    def __post_init__(self) -> None:
        for name in self.valid:
            if not _NAME.fullmatch(name):
                raise RecipeError(
                    f"`{name}` is no name for a validation text",
                    location="valid",
                    hint="use letters, digits, - and _, as in --valid news=valid_news.txt",
                )

    @property
    def rule(self) -> DocumentRule:
        """What a document of plain text is; a row of a table is one document whatever this says."""
        return "blank-line" if self.document == "auto" else self.document

    def absolute(self) -> DataConfig:
        """The same, but that a tokenizer's path no longer depends on the working folder."""
        if not isinstance(self.tokenizer, FileTokenizerConfig | ExtendedTokenizerConfig):
            return self
        return replace(self, tokenizer=replace(self.tokenizer, path=self.tokenizer.path.absolute()))
