"""Room card: the verb fill, and how answers are painted.

Comes in: a model and texts with [MASK], from arguments, a file or standard input. Goes out: for each mask the likeliest
pieces, with bars in a terminal, plain in a pipe, or as JSON. Called by: door; pretrain (the demo's answers).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmask.cli.answer import Debug, Json, complain, open_model, print_json
from unmask.errors import TextError, UnmaskError

if TYPE_CHECKING:
    from unmask.bundle import Model
    from unmask.use.fill import Filled

EXAMPLES = """\
[bold]Examples[/bold]

unmask fill runs/demo "Return the \\[MASK] of the list."
unmask fill runs/demo "The \\[MASK] of the \\[MASK]." --top 3 --json
unmask fill runs/demo --file questions.txt             one text a line
cat questions.txt | unmask fill runs/demo
"""
_BAR = 30
_BLOCKS = " ▏▎▍▌▋▊▉█"


def fill(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A run, one of its step folders, or a folder that transformers saved."),
    ],
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT", help="Texts with \\[MASK]; without any, or with -: the lines of standard input."
        ),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file of texts, one a line.")] = None,
    top: Annotated[int, typer.Option(help="Pieces shown for each mask.")] = 5,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    r"""Fill every \[MASK] of a text with the pieces that the model holds likeliest."""
    given = [_checked(text) for text in texts or [] if text != "-"]
    from_input = (not texts and file is None) or "-" in (texts or [])
    if file is not None:
        given += _lines(_read(file), str(file))

    from unmask.use.fill import fill as answers

    opened = open_model(model)
    if from_input and sys.stdin.isatty() and not as_json:
        _converse(opened, top)
        return
    if from_input:
        given += _lines(sys.stdin.buffer.read(), "standard input")
    if not given:
        raise TextError("there is no text", next='give one with [MASK] in it: "The cat sat on the [MASK]."')
    filled = answers(opened, given, top)
    if as_json:
        print_json([asdict(one) for one in filled])
    else:
        print_filled(filled)


def _converse(model: Model, top: int) -> None:
    """Answer each line that is typed; a text that can't be answered ends nothing."""
    from unmask.use.fill import fill as answers

    print("one text a line, with [MASK] in it; Ctrl-D ends", file=sys.stderr)
    for line in sys.stdin:
        if line.strip():
            try:
                print_filled(answers(model, line.rstrip("\n"), top))
            except UnmaskError as error:
                complain("error:", str(error))


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise TextError(f"this file can't be read: {error.strerror}", where=str(file), next="check the path") from error


def _lines(content: bytes, where: str) -> list[str]:
    """The lines that hold something."""
    try:
        # Not splitlines, which also cuts at U+2028, U+0085 and form feeds.
        lines = [line.removesuffix("\r") for line in content.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise TextError(
            "this text is not UTF-8", where=f"{where}, byte {error.start}", next="convert it: iconv -t UTF-8"
        ) from error
    return [line for line in lines if line.strip()]


def _checked(text: str) -> str:
    """An argument that is text: bytes that aren't UTF-8 reach a program as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError("this text is not UTF-8", where=ascii(text[:60]), next="give it in UTF-8") from error
    return text


def print_filled(filled: Sequence[Filled]) -> None:
    """Answers for a person: bars in a terminal, the filled texts in a pipe."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.text import Text

    from unmask.train.figures import visible

    console = Console(highlight=False, soft_wrap=True)
    for one in filled:
        console.print(Text(visible(one.text), "bold"))
        for number, mask in enumerate(one.masks, start=1):
            if len(one.masks) > 1:
                console.print(Text(f"  [MASK] {number}", "dim"))
            pieces = [visible(candidate.shown) for candidate in mask.candidates]
            wide = max(cell_len(piece) for piece in pieces)
            for piece, candidate in zip(pieces, mask.candidates, strict=True):
                line = Text(f"    {piece}{' ' * (wide - cell_len(piece))}  {candidate.probability:>6.1%}  ")
                bar = _bar(candidate.probability) if console.is_terminal else visible(candidate.text)
                console.print(line.append(bar, "green" if console.is_terminal else ""))
        print()


def _bar(share: float) -> str:
    eighths = round(share * _BAR * 8)
    return "█" * (eighths // 8) + _BLOCKS[eighths % 8].strip()
