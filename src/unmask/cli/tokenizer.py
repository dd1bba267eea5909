"""Commands on tokenizers: train, show and compare."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from unmask.cli.options import (
    TOKENIZER_HELP,
    DataOptions,
    DocumentRule,
    Errors,
    Field,
    Json,
    open_tokenizer,
    print_json,
)
from unmask.core.errors import RecipeError, RunError, TextError, TokenizerError

if TYPE_CHECKING:
    from unmask.core.types import ProgressCallback
    from unmask.tokenization.analysis import TokenInfo
    from unmask.tokenization.settings import TrainedConfig


TRAIN_TOKENIZER_EXAMPLES = """\
[bold]Examples[/bold]

unmask tokenizer train notes.txt --vocab-size 120 --out words
unmask tokenizer train notes.txt --kind bpe --vocab-size 400 --set lowercase=true --out bpe
unmask tokenizer train notes.txt --kind bytes --out bytes
"""
SHOW_TOKENIZER_EXAMPLES = """\
[bold]Examples[/bold]

unmask tokenizer show bpe "An unbelievable story."
unmask tokenizer show runs/notes --file notes.txt --json
"""
COMPARE_TOKENIZERS_EXAMPLES = """\
[bold]Examples[/bold]

unmask tokenizer compare words bpe bytes --text notes.txt
"""
_COLORS = ("cyan", "yellow", "green", "magenta")
_PIPE_WIDTH = 1000  # a pipe has no width: lines are not wrapped
_DETECT_CHARACTERS = 200_000  # enough to recognize the script

Words = Annotated[
    Literal["auto", "spaces", "characters", "jieba", "sudachi"],
    typer.Option(help="Method of word segmentation; `data.words` in a recipe."),
]


def train_tokenizer(
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT", help="Files, folders or patterns, as for pretrain.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    kind: Annotated[
        Literal["wordpiece", "bpe", "unigram", "bytes", "characters"], typer.Option(help="Kind of tokenizer.")
    ] = "wordpiece",
    vocab_size: Annotated[
        int | None,
        typer.Option(help="Number of tokens, special tokens included.", show_default="8192 where the kind has one"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one setting of the kind; may be repeated."),
    ] = None,
    errors: Errors = None,
    document: DocumentRule = None,
    field: Field = None,
) -> None:
    """Train a tokenizer and write a folder that transformers, tokenizers and data.tokenizer.path load."""
    from unmask.core.files import atomic_directory
    from unmask.data.sources import open_source
    from unmask.tokenization import tokenizer as tokenization
    from unmask.tokenization.analysis import first_texts
    from unmask.tokenization.settings import SPECIALS_AT, VocabSizeError

    if os.path.lexists(out):
        raise RunError("this path exists", location=str(out), hint="give another folder with --out, or remove this one")
    config = _tokenizer_config(kind, vocab_size, settings or [])
    source = open_source(texts, DataOptions(errors, document, field).config())
    max_characters = getattr(config, "max_train_chars", sys.maxsize)
    try:
        with _progress_line() as progress:
            tokenizer = tokenization.train_tokenizer(first_texts(source, max_characters), config, progress)
    except VocabSizeError as error:  # its location and hint refer to a recipe
        if not error.largest:
            raise error.at(location="--kind", hint="add text, or use --kind characters") from None
        hint = f"use --vocab-size {error.largest}, or add text"
        raise error.at(location="--vocab-size", hint=hint) from None
    except TokenizerError as error:
        if error.location != SPECIALS_AT:
            raise
        raise error.at(location="--set special_tokens") from None
    with atomic_directory(out) as folder:
        tokenizer.save(folder)
    print(f"{out}: {kind}, {tokenizer.size:,} tokens")


def show_tokenizer(
    tokenizer: Annotated[Path, typer.Argument(metavar="TOKENIZER", help=TOKENIZER_HELP)],
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="Text to tokenize.")] = None,
    file: Annotated[Path | None, typer.Option(help="File whose beginning is tokenized.")] = None,
    characters: Annotated[int, typer.Option(min=1, help="Number of characters to read from a file.")] = 1000,
    words: Words = "auto",
    as_json: Json = False,
) -> None:
    """Show the tokens of a text: | between the tokens of a word, · between words, colors that alternate by word."""
    from unmask.data.sources import open_source
    from unmask.tokenization.analysis import first_texts, list_tokens
    from unmask.tokenization.settings import MASK

    loaded = open_tokenizer(tokenizer)
    if file is not None and text is None:
        content = "\n".join(first_texts(open_source([file], DataOptions().config()), characters))
    elif text is not None and file is None:
        # In a prompt [MASK] is the mask token, whatever its name in the tokenizer; in a file it is text.
        content = text.replace(MASK, loaded.id_to_token(loaded.mask_id))
    else:
        raise RecipeError("expected either a text or --file", hint='unmask tokenizer show TOKENIZER "some text"')
    if not content.strip():
        raise TextError("the text is empty", location=str(file or ""), hint="give a text that is not blank")
    tokens = list_tokens(loaded, content, _word_rule(words, content), is_prompt=text is not None)
    if as_json:
        print_json({"text": content, "tokens": [asdict(token) for token in tokens]})
    else:
        _print_tokens(tokens)


def compare_tokenizers(
    tokenizers: Annotated[list[Path], typer.Argument(metavar="TOKENIZER...", help=TOKENIZER_HELP)],
    texts: Annotated[list[str], typer.Option("--text", metavar="FILE", help="Text to tokenize; may be repeated.")],
    characters: Annotated[int, typer.Option(min=1, help="Number of characters to read from each text.")] = 1_000_000,
    words: Words = "auto",
    errors: Errors = None,
    document: DocumentRule = None,
    field: Field = None,
    as_json: Json = False,
) -> None:
    """Compare tokenizers on texts: tokens per word, characters per token, unknown characters and speed."""
    from unmask.data.sources import open_source
    from unmask.tokenization.analysis import first_texts, measure_tokenizer

    loaded = [(str(path), open_tokenizer(path)) for path in tokenizers]
    config = DataOptions(errors, document, field).config()
    rows: list[dict[str, Any]] = []
    for text in texts:
        sample = list(first_texts(open_source([text], config), characters))
        if not any(part.strip() for part in sample):
            raise TextError("the text is empty", location=text, hint="give a file with text in it")
        rule = _word_rule(words, "".join(sample)[:_DETECT_CHARACTERS])
        for name, tokenizer in loaded:
            stats = measure_tokenizer(tokenizer, sample, rule)
            rows.append({"text": text, "tokenizer": name, "words_by": rule, **asdict(stats)})
    if as_json:
        print_json(rows)
    else:
        _print_comparison(rows)


def _tokenizer_config(kind: str, vocab_size: int | None, settings: Sequence[str]) -> TrainedConfig:
    """Return the config of a kind of tokenizer, changed by --vocab-size and --set."""
    from unmask.core.config import apply_set, build_config
    from unmask.tokenization.settings import (
        ByteBpeConfig,
        ByteConfig,
        CharacterConfig,
        UnigramConfig,
        WordPieceConfig,
    )

    kinds: list[type[Any]] = [WordPieceConfig, ByteBpeConfig, UnigramConfig, ByteConfig, CharacterConfig]
    config_class = next(entry for entry in kinds if entry.kind == kind)
    tree: Any = {"kind": kind} if vocab_size is None else {"kind": kind, "vocab_size": vocab_size}
    for setting in settings:
        tree = apply_set(tree, setting)
    if tree["kind"] != kind:
        raise RecipeError("conflicting kinds", location=f"--set kind={tree['kind']}", hint=f"use --kind {tree['kind']}")
    if vocab_size is not None and not hasattr(config_class, "vocab_size"):
        raise RecipeError(
            f"the vocabulary size of kind `{kind}` is fixed", location="--vocab-size", hint="remove --vocab-size"
        )
    return build_config(
        config_class,
        tree,
        "the command line",
        settings,
        {"vocab_size": "--vocab-size"},
        section="data.tokenizer",  # former names of keys are reported with the present ones
    )


def _word_rule(words: Words, text: str) -> Any:
    """Return the method of word segmentation, detected from the text for "auto"."""
    from unmask.tokenization.words import detect_words

    return detect_words(text) if words == "auto" else words


@contextmanager
def _progress_line() -> Generator[ProgressCallback]:
    """Yield a callback that updates one line in a terminal and does nothing in a pipe."""
    from rich.console import Console
    from rich.status import Status

    console = Console(stderr=True)
    status = Status("training the tokenizer", console=console)
    if console.is_terminal:
        status.start()
    try:
        yield lambda task, fraction: status.update(f"{task} {fraction:.0%}")
    finally:
        status.stop()


def _print_tokens(tokens: Sequence[TokenInfo]) -> None:
    """Print the tokens on one line."""
    from rich.console import Console
    from rich.text import Text

    from unmask.core.format import visible

    line, word = Text(), -1
    for number, token in enumerate(tokens):
        word += token.starts_word
        if number:
            line.append(" · " if token.starts_word else "|", "dim")
        color = _COLORS[max(0, word) % len(_COLORS)]
        line.append(visible(token.display), f"bold reverse {color}" if token.is_special else color)
    Console(highlight=False, soft_wrap=True).print(line)


def _print_comparison(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPE_WIDTH)
    table = Table(box=None, pad_edge=False)
    for column in ("text", "tokenizer"):
        table.add_column(column, overflow="fold")
    for column in ("vocabulary", "tokens/word", "characters/token", "unknown", "tokens/s", "characters"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["text"]),
            str(row["tokenizer"]),
            f"{row['vocabulary']:,}",
            f"{row['tokens_per_word']:.3f}",
            f"{row['characters_per_token']:.2f}",
            f"{row['unknown_share']:.3%}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['characters']:,}",
        )
    console.print(table)
