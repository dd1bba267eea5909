"""Room card: the verbs on tokenizers: train, look, compare.

Comes in: text, settings, tokenizers. Goes out: a tokenizer's folder; a text as it is cut, its words in colours; a table
of what each tokenizer makes of each text. Called by: door.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from unmask.cli.options import TOKENIZER_HELP, Debug, Errors, Field, Json, Rule, open_tokenizer, print_json
from unmask.core.errors import RecipeError, RunError, TextError, TokenizerError

if TYPE_CHECKING:
    from unmask.data.sources import FileSource
    from unmask.tokenization.analysis import Cut


TRAIN_TOKENIZER_EXAMPLES = """\
[bold]Examples[/bold]

unmask tokenizer train notes.txt --vocab-size 120 --out words
unmask tokenizer train notes.txt --kind bpe --vocab-size 400 --set lowercase=true --out pieces
unmask tokenizer train notes.txt --kind bytes --out bytes
"""
SHOW_TOKENIZER_EXAMPLES = """\
[bold]Examples[/bold]

unmask tokenizer show pieces "An unbelievable story."
unmask tokenizer show runs/notes --file notes.txt --json
"""
COMPARE_TOKENIZERS_EXAMPLES = """\
[bold]Examples[/bold]

unmask tokenizer compare words pieces bytes --text notes.txt
"""
_COLOURS = ("cyan", "yellow", "green", "magenta")
_NO_WIDTH = 1000  # a pipe has none; programs and people cut its lines themselves

Words = Annotated[
    Literal["auto", "spaces", "characters", "jieba", "sudachi"],
    typer.Option(help="What a word is (data.words of a recipe)."),
]


def train_tokenizer(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT", help="Text files or folders, as pretrain takes them.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    kind: Annotated[
        Literal["wordpiece", "bpe", "unigram", "bytes", "characters"], typer.Option(help="The kind of tokenizer.")
    ] = "wordpiece",
    vocab_size: Annotated[
        int | None, typer.Option(help="Pieces, special ones included.", show_default="the kind's: 8192")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting of the kind; may be repeated."),
    ] = None,
    errors: Errors = None,
    document: Rule = None,
    field: Field = None,
    debug: Debug = False,
) -> None:
    """Train a tokenizer: a folder that transformers, tokenizers and data.tokenizer.path open."""
    from unmask.core.files import atomic_directory
    from unmask.tokenization.analysis import some_text
    from unmask.tokenization.settings import VOCABULARY_AT
    from unmask.tokenization.tokenizer import train_tokenizer

    if os.path.lexists(out):
        raise RunError("this exists already", location=str(out), hint="name another folder with --out, or remove it")
    chosen = _settings(kind, vocab_size, settings or [])
    source = _source(texts, errors, document, field)
    most = getattr(chosen, "max_train_chars", sys.maxsize)
    try:
        with _progress() as progress:
            tokenizer = train_tokenizer(some_text(source, most), chosen, progress)
    except TokenizerError as error:  # which speaks of a recipe's keys
        following = error.hint.replace(f"--set {VOCABULARY_AT}=", "--vocab-size ").replace(
            "kind = 'characters'", "--kind characters"
        )
        where, following = (
            text.replace("data.tokenizer.vocab_size", "--vocab-size").replace("data.tokenizer.", "--")
            for text in (error.location, following)
        )
        raise TokenizerError(error.message, location=where, hint=following) from error
    with atomic_directory(out) as aside:
        tokenizer.save(aside)
    print(f"{out}: {kind}, {tokenizer.size:,} pieces")


def show_tokenizer(
    tokenizer: Annotated[Path, typer.Argument(metavar="TOKENIZER", help=TOKENIZER_HELP)],
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="The text to cut.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file whose beginning is cut.")] = None,
    characters: Annotated[int, typer.Option(min=1, help="How much of a file is cut.")] = 1000,
    words: Words = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show how a text is cut: pieces parted by |, words by a middle dot, in turn in another colour."""
    from unmask.tokenization.analysis import cuts, some_text
    from unmask.tokenization.settings import MASK
    from unmask.tokenization.words import detect_words

    opened = open_tokenizer(tokenizer)
    if (text is None) == (file is None):
        raise RecipeError("give a text or a file, one of them", hint='unmask tokenizer show TOKENIZER "some text"')
    given = text if text is not None else "\n".join(some_text(_source([str(file)]), characters))
    if not given.strip():
        raise TextError("there is no text", location=str(file or ""), hint="give some letters to cut")
    if text is not None:  # a prompt: its [MASK] is the mask, whatever the tokenizer calls it
        given = given.replace(MASK, opened.id_to_token(opened.mask_id))
    rule = detect_words(given) if words == "auto" else words
    found = cuts(opened, given, rule, is_prompt=text is not None)
    if as_json:
        print_json({"text": given, "tokens": [asdict(cut) for cut in found]})
        return
    _paint(found)


def compare_tokenizers(
    tokenizers: Annotated[list[Path], typer.Argument(metavar="TOKENIZER...", help=TOKENIZER_HELP)],
    texts: Annotated[list[str], typer.Option("--text", metavar="FILE", help="A text to cut; may be repeated.")],
    characters: Annotated[int, typer.Option(min=1, help="How much of each text is read.")] = 1_000_000,
    words: Words = "auto",
    errors: Errors = None,
    document: Rule = None,
    field: Field = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare tokenizers: tokens per word, characters per token, unknown characters, speed, per text."""
    from unmask.tokenization.analysis import measure, some_text
    from unmask.tokenization.words import detect_words

    opened = [(str(path), open_tokenizer(path)) for path in tokenizers]
    rows: list[dict[str, Any]] = []
    for text in texts:
        held = list(some_text(_source([text], errors, document, field), characters))
        if not any(one.strip() for one in held):
            raise TextError("there is no text", location=text, hint="give a file with text in it")
        rule = detect_words("".join(held)[:200_000]) if words == "auto" else words
        for name, tokenizer in opened:
            rows.append({"text": text, "tokenizer": name, "words_by": rule, **asdict(measure(tokenizer, held, rule))})
    if as_json:
        print_json(rows)
        return
    _print_table(rows)


def _settings(kind: str, vocab_size: int | None, sets: Sequence[str]) -> Any:
    """The settings of a kind, with what was changed on the command line."""
    from unmask.core.config import apply_set, build_config
    from unmask.tokenization.settings import (
        ByteBpeConfig,
        ByteConfig,
        CharacterConfig,
        UnigramConfig,
        WordPieceConfig,
    )

    kinds: list[type[Any]] = [WordPieceConfig, ByteBpeConfig, UnigramConfig, ByteConfig, CharacterConfig]
    chosen = next(one for one in kinds if one.kind == kind)
    tree: Any = {"kind": kind} if vocab_size is None else {"kind": kind, "vocab_size": vocab_size}
    for text in sets:
        tree = apply_set(tree, text)
    if tree["kind"] != kind:
        raise RecipeError("the kind is said twice", location="--set kind", hint=f"use --kind {tree['kind']} alone")
    if vocab_size is not None and not hasattr(chosen, "vocab_size"):
        raise RecipeError(
            f"a tokenizer of {kind} has no size to choose", location="--vocab-size", hint="leave --vocab-size out"
        )
    return build_config(chosen, tree, "the command line", sets, {"vocab_size": "--vocab-size"})


def _source(texts: Sequence[str], errors: Errors = None, document: Rule = None, field: Field = None) -> FileSource:
    from unmask.data.settings import DataConfig
    from unmask.data.sources import open_source

    plain = DataConfig()
    return open_source(
        texts,
        replace(
            plain,
            errors=errors or plain.errors,
            document=document or plain.document,
            field=plain.field if field is None else field,
        ),
    )


@contextmanager
def _progress() -> Generator[Callable[[str, float], None]]:
    """A line in a terminal; nothing in a pipe."""
    from rich.console import Console
    from rich.status import Status

    console = Console(stderr=True)
    status = Status("training the tokenizer", console=console)
    if console.is_terminal:
        status.start()
    try:
        yield lambda what, share: status.update(f"{what} {share:.0%}")
    finally:
        status.stop()


def _paint(found: Sequence[Cut]) -> None:
    """The tokens on one line."""
    from rich.console import Console
    from rich.text import Text

    from unmask.core.format import visible

    console = Console(highlight=False, soft_wrap=True)
    line, word = Text(), -1
    for number, cut in enumerate(found):
        word += cut.starts_word
        if number:
            line.append(" · " if cut.starts_word else "|", "dim")
        colour = _COLOURS[max(0, word) % len(_COLOURS)]
        line.append(visible(cut.shown), f"bold reverse {colour}" if cut.is_special else colour)
    console.print(line)


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_NO_WIDTH)
    table = Table(box=None, pad_edge=False)
    for column in ("text", "tokenizer"):
        table.add_column(column, overflow="fold")
    for column in ("pieces", "tokens/word", "characters/token", "unknown", "tokens/s", "characters"):
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
