"""Room card: the verb evaluate.

Comes in: a model and text files. Goes out: loss, accuracy and bits per character on frozen masks. Called by: door.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from unmask.cli.answer import Debug, Json, open_model, print_json

EXAMPLES = """\
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
    at_most: Annotated[
        str | None,
        typer.Option(metavar="AMOUNT", help='Read no further: "2M characters".', show_default="all of it"),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Judge a model by text that it has not seen: 15 % of it is hidden, the same letters for every model.

    Bits per character compare models of one tokenizer only.
    """
    from unmask.amounts import Amount
    from unmask.eval.evaluate import evaluate_text
    from unmask.world import discover

    held = evaluate_text(
        open_model(model),
        texts,
        world=discover("float32"),
        length=length,
        document=document,
        errors=errors,
        field=field,
        at_most=Amount.parse(at_most).require("characters").number if at_most else float("inf"),
    )
    if as_json:
        print_json(asdict(held))
        return
    print(f"loss                {held.loss:.4f} nats per hidden token")
    print(f"unigram loss        {held.unigram_loss:.4f} (a guess that knows how often each token stands in this text)")
    print(f"accuracy            {held.accuracy:.2%} of {held.asked:,} hidden tokens")
    print(f"bits per character  {held.bits_per_character:.4f}")
    print(f"unknown tokens      {held.unknown_share:.3%} (left out)")
    print(f"text length         {held.length} slots at most")
