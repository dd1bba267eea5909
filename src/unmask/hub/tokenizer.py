"""Loads the tokenizer of a Hugging Face folder, from tokenizer.json or, with transformers, from older files."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers import processors

from unmask.core.errors import TokenizerError
from unmask.core.files import RunLayout
from unmask.hub.parity import quiet_transformers
from unmask.tokenization.tokenizer import Tokenizer

# Files of a tokenizer without tokenizer.json. AutoTokenizer makes an empty tokenizer if none exists.
_OLDER_FILES: Final = ("vocab.txt", "vocab.json", "*.model", "*.spm")


def load_tokenizer(folder: Path) -> tuple[Tokenizer, list[str]]:
    """Load the tokenizer of a folder; also return notes on what was converted.

    Raises:
        TokenizerError: there is no tokenizer, it can't be read or converted, or it has no mask token.
    """
    notes: list[str] = []
    if (folder / RunLayout.TOKENIZER).is_file():
        tokenizer = Tokenizer.load(folder)
    else:
        tokenizer = _convert(folder)
        notes.append(f"{RunLayout.TOKENIZER} was made by transformers from older files of the tokenizer")
    if (with_template := _with_cls_and_sep(tokenizer)) is not None:
        notes.append(f"{RunLayout.TOKENIZER} added no special tokens: it now adds CLS and SEP")
        return with_template, notes
    return tokenizer, notes


def _convert(folder: Path) -> Tokenizer:
    """Convert older files of a tokenizer with transformers."""
    if not any(file for pattern in _OLDER_FILES for file in folder.glob(pattern)):
        raise TokenizerError(
            f"no tokenizer found: neither {RunLayout.TOKENIZER} nor {', '.join(_OLDER_FILES)}",
            location=str(folder),
            hint="copy the files of the tokenizer into this folder",
        )
    if importlib.util.find_spec("transformers") is None:
        raise TokenizerError(
            f"this tokenizer has no {RunLayout.TOKENIZER}, and its conversion needs transformers",
            location=str(folder),
            hint='install it: pip install "unmask[hub]"',
        )
    import transformers

    auto_class: Any = transformers.AutoTokenizer
    with tempfile.TemporaryDirectory() as converted, quiet_transformers():
        try:
            auto_class.from_pretrained(folder, local_files_only=True).save_pretrained(converted)
        except Exception as error:  # transformers and tokenizers raise many types
            raise TokenizerError(
                f"transformers can't load this tokenizer: {error}",
                location=str(folder),
                hint=f"check its files, or add a {RunLayout.TOKENIZER}",
            ) from error
        if not (Path(converted) / RunLayout.TOKENIZER).is_file():
            raise TokenizerError(
                f"transformers has no fast version of this tokenizer, so it can't write {RunLayout.TOKENIZER}",
                location=str(folder),
                hint="install sentencepiece and try again, or use another checkpoint",
            )
        try:
            tokenizer = Tokenizer.load(Path(converted))
        except TokenizerError as error:
            raise error.at(location=str(folder)) from None
    if not len(tokenizer.regular_token_ids):  # transformers doesn't report files that don't fit the class
        raise TokenizerError(
            "transformers made a tokenizer without regular tokens from this folder",
            location=str(folder),
            hint="check that the files of the tokenizer fit tokenizer_class in tokenizer_config.json",
        )
    return tokenizer


def _with_cls_and_sep(tokenizer: Tokenizer) -> Tokenizer | None:
    """Return the tokenizer with a post-processor that adds CLS and SEP; None if it has one or lacks these tokens."""
    if json.loads(tokenizer.to_json()).get("post_processor") is not None or tokenizer.cls_sep_ids is None:
        return None
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    cls_id, sep_id = tokenizer.cls_sep_ids
    first, last = tokenizer.id_to_token(cls_id), tokenizer.id_to_token(sep_id)
    inner.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(first, cls_id), (last, sep_id)],
    )
    return tokenizer.with_json(inner.to_str())
