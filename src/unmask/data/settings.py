"""Room card: how text is read, as a person says it.

Comes in: the [text] table of a recipe. Goes out: frozen settings. Called by: sources, survey, corpus, blueprint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from dataclasses import field as default
from typing import Literal

from unmask.core.errors import RecipeError
from unmask.core.plugins import OutsideCutter, OutsideSource
from unmask.core.quantities import Amount, Share
from unmask.tokenization.settings import (
    ExtendedTokenizerSettings,
    FileTokenizerSettings,
    TokenizerSettings,
    WordPieceSettings,
)
from unmask.tokenization.words import WordsRule

DocumentRule = Literal["blank-line", "line", "file"]
ErrorsRule = Literal["strict", "replace", "skip"]
UnicodeForm = Literal["NFC", "NFKC", "as-is"]
_NAME = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class HeldOutSettings:
    """What validation sees and training doesn't."""

    by: Literal["count-decides", "hash", "tail"] = "count-decides"  # hash from 100 documents on, else tail
    share: Share | Literal["by-rule"] = "by-rule"  # 1% of all characters by hash, 10% of each document's by tail
    at_most: Amount = default(default_factory=lambda: Amount(2_000_000, "characters"))  # by hash only

    def __post_init__(self) -> None:
        self.at_most.require("characters")
        if isinstance(self.share, Share) and not 0 < self.share.fraction < 1:
            raise RecipeError(
                f"a share of {self.share} leaves nothing on one side",
                next="hold out more than 0% and less than 100%",
            )


@dataclass(frozen=True)
class FilesSettings:
    """Text from what is named on the command line."""

    kind: Literal["files"] = "files"


@dataclass(frozen=True)
class WindowsSettings:
    """Samples are windows of a document, as long as the stage says."""

    kind: Literal["windows"] = "windows"


@dataclass(frozen=True)
class TextSettings:
    """How text is read."""

    document: Literal["by-ending", "blank-line", "line", "file"] = "by-ending"  # *.txt: blank-line; tables: a row
    words: Literal["by-script", WordsRule] = "by-script"  # characters for Chinese and Japanese
    errors: ErrorsRule = "strict"  # replace: U+FFFD for bytes that are not UTF-8; skip: leave out and count
    field: str = "text"  # of a .jsonl line; the column of .csv, .tsv, .parquet and data sets
    unicode: UnicodeForm = "NFC"
    drop_duplicates: bool = False  # documents whose text was seen before
    valid: Mapping[str, str] = default(default_factory=dict[str, str])  # name -> text that is measured beside held-out
    held_out: HeldOutSettings = default(default_factory=HeldOutSettings)
    tokenizer: TokenizerSettings = default(default_factory=WordPieceSettings)
    source: FilesSettings | OutsideSource = default(default_factory=FilesSettings)
    cutter: WindowsSettings | OutsideCutter = default(default_factory=WindowsSettings)

    def __post_init__(self) -> None:
        for name in self.valid:
            if not _NAME.fullmatch(name):
                raise RecipeError(
                    f"`{name}` is no name for a validation text",
                    where="valid",
                    next="use letters, digits, - and _, as in --valid news=valid_news.txt",
                )

    @property
    def rule(self) -> DocumentRule:
        """What a document of plain text is; a row of a table is one document whatever this says."""
        return "blank-line" if self.document == "by-ending" else self.document

    def absolute(self) -> TextSettings:
        """The same, but that a tokenizer's path no longer depends on the working folder."""
        if not isinstance(self.tokenizer, FileTokenizerSettings | ExtendedTokenizerSettings):
            return self
        return replace(self, tokenizer=replace(self.tokenizer, path=self.tokenizer.path.absolute()))
