"""Room card: the verb fill, and how answers are painted.

Comes in: a model and texts with [MASK], from arguments, a file or standard input. Goes out: for each mask the likeliest
pieces, with bars in a terminal, plain in a pipe, or as JSON. Called by: door; pretrain (the demo's answers).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from unmask.cli.errors import complain
from unmask.cli.options import Debug, Json, open_model, print_json
from unmask.core.errors import TextError, UnmaskError

if TYPE_CHECKING:
    from unmask.models.fill_mask import FillMaskResult
    from unmask.models.model import Model


FILL_EXAMPLES = """\
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

    from unmask.models.fill_mask import fill as answers

    opened = open_model(model)
    if from_input and sys.stdin.isatty() and not as_json:
        _converse(opened, top)
        return
    if from_input:
        given += _lines(sys.stdin.buffer.read(), "standard input")
    if not given:
        raise TextError("there is no text", hint='give one with [MASK] in it: "The cat sat on the [MASK]."')
    filled = answers(opened, given, top)
    if as_json:
        print_json([asdict(one) for one in filled])
    else:
        print_filled(filled)


def _converse(model: Model, top: int) -> None:
    """Answer each line that is typed; a text that can't be answered ends nothing."""
    from unmask.models.fill_mask import fill as answers

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
        raise TextError(
            f"this file can't be read: {error.strerror}", location=str(file), hint="check the path"
        ) from error


def _lines(content: bytes, where: str) -> list[str]:
    """The lines that hold something."""
    try:
        # Not splitlines, which also cuts at U+2028, U+0085 and form feeds.
        lines = [line.removesuffix("\r") for line in content.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise TextError(
            "this text is not UTF-8", location=f"{where}, byte {error.start}", hint="convert it: iconv -t UTF-8"
        ) from error
    return [line for line in lines if line.strip()]


def _checked(text: str) -> str:
    """An argument that is text: bytes that aren't UTF-8 reach a program as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError("this text is not UTF-8", location=ascii(text[:60]), hint="give it in UTF-8") from error
    return text


def print_filled(filled: Sequence[FillMaskResult]) -> None:
    """Answers for a person: bars in a terminal, the filled texts in a pipe."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.text import Text

    from unmask.core.format import visible

    console = Console(highlight=False, soft_wrap=True)
    for one in filled:
        console.print(Text(visible(one.text), "bold"))
        for number, mask in enumerate(one.masks, start=1):
            if len(one.masks) > 1:
                console.print(Text(f"  [MASK] {number}", "dim"))
            pieces = [visible(candidate.shown) for candidate in mask.candidates]
            wide = max(cell_len(piece) for piece in pieces)
            for piece, candidate in zip(pieces, mask.candidates, strict=True):
                line = Text(f"    {piece}{' ' * (wide - cell_len(piece))}  {candidate.score:>6.1%}  ")
                bar = _bar(candidate.score) if console.is_terminal else visible(candidate.sequence)
                console.print(line.append(bar, "green" if console.is_terminal else ""))
        print()


def _bar(share: float) -> str:
    eighths = round(share * _BAR * 8)
    return "█" * (eighths // 8) + _BLOCKS[eighths % 8].strip()


EVALUATE_EXAMPLES = """\
[bold]Examples[/bold]

unmask evaluate runs/notes --text valid.txt
unmask evaluate runs/notes --text a.txt --text b.txt --json
"""


def evaluate(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A run, one of its step folders, or a folder that transformers saved."),
    ],
    texts: Annotated[list[Path], typer.Option("--text", metavar="FILE", help="Text to judge by; may be repeated.")],
    length: Annotated[
        int | None, typer.Option(help="Slots of a text, special tokens included.", show_default="the model's context")
    ] = None,
    document: Annotated[
        Literal["blank-line", "line", "file"] | None,
        typer.Option(help="What a document of plain text is.", show_default="what it was in training, else blank-line"),
    ] = None,
    errors: Annotated[
        Literal["strict", "replace", "skip"],
        typer.Option(help="Bytes that are not UTF-8 and broken rows: refuse, replace, or skip."),
    ] = "strict",
    field: Annotated[str, typer.Option(help="Where the text of a .jsonl line or a table stands.")] = "text",
    max_size: Annotated[
        str | None,
        typer.Option(metavar="AMOUNT", help='Read no further: "2M characters".', show_default="all of it"),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Judge a model by text that it has not seen: 15 % of it is hidden, the same letters for every model.

    Bits per character compare models of one tokenizer only.
    """
    from unmask.core.distributed import init_distributed
    from unmask.core.quantities import Quantity
    from unmask.evaluation.validation import evaluate_text

    held = evaluate_text(
        open_model(model),
        texts,
        world=init_distributed("float32"),
        length=length,
        document=document,
        errors=errors,
        field=field,
        max_size=Quantity.parse(max_size).require("characters").number if max_size else float("inf"),
    )
    if as_json:
        print_json(asdict(held))
        return
    print(f"loss                {held.loss:.4f} nats per hidden token")
    print(f"unigram loss        {held.unigram_loss:.4f} (a guess that knows how often each token stands in this text)")
    print(f"accuracy            {held.accuracy:.2%} of {held.masked_tokens:,} hidden tokens")
    print(f"bits per character  {held.bits_per_character:.4f}")
    print(f"unknown tokens      {held.unknown_share:.3%} (left out)")
    print(f"text length         {held.length} slots at most")


EXPORT_EXAMPLES = """\
[bold]Examples[/bold]

unmask export runs/notes notes-bert
unmask export runs/notes notes-bert --force          replace what stands there
unmask export runs/notes notes-encoder --only encoder
"""


def export(
    model: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run, one of its step folders, or a folder that transformers saved."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    force: Annotated[
        bool, typer.Option("--force", help="Replace a model that stands at OUT.", show_default=False)
    ] = False,
    unverified: Annotated[
        bool,
        typer.Option("--unverified", help="Compare nothing with transformers; the card says so.", show_default=False),
    ] = False,
    only: Annotated[
        Literal["all", "encoder"], typer.Option(help="All the model has, or its encoder without heads (BertModel).")
    ] = "all",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model for the rest of the ecosystem, with a model card, once transformers sees the same in it."""
    from unmask.hub.to_hf import export as write

    done = write(model, out, force=force, unverified=unverified, only=only)
    if as_json:
        print_json(asdict(done))
        return
    for sentence in done.notes:
        print(sentence)
    if done.parity is None:
        print("unverified: nothing was compared with transformers")
    else:
        pair = "" if done.parity.pair is None else f", of the pair head {done.parity.pair:.1e}"
        print(f"compared  {done.parity.texts} texts, {done.parity.tokens:,} tokens: {done.parity.source}")
        print(f"apart     {done.parity.logits:.1e} at most{pair} (transformers {done.parity.transformers}, float32)")
    print(f"written   {done.path}: {done.architecture}, with a model card in README.md")


IMPORT_EXAMPLES = """\
[bold]Examples[/bold]

unmask import ./bert-base-uncased models/bert
unmask fill models/bert "The cat sat on the \\[MASK]."
"""


def import_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A BERT, RoBERTa, XLM-R or ModernBERT folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    force: Annotated[
        bool, typer.Option("--force", help="Replace a model that stands at OUT.", show_default=False)
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the initial weights of heads that FOLDER lacks.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Open a model of others and write it as one of ours, which transformers opens too; pickles are never read."""
    from unmask.hub.from_hf import import_model

    model = import_model(folder, out, force=force, seed=seed)
    if as_json:
        print_json(
            {"path": model.path, "kind": model.settings.kind, "notes": model.notes, "vocabulary": model.tokenizer.size}
        )
        return
    for sentence in model.notes:
        print(sentence)
    shape = (
        f"{model.settings.num_hidden_layers} layers of {model.settings.hidden_size}, {model.tokenizer.size:,} pieces"
    )
    print(f"written   {model.path}: {model.settings.kind}, {shape}")
