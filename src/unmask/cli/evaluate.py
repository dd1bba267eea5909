"""Room card: the verb evaluate.

Comes in: a model and text files. Goes out: loss, accuracy and bits per character on frozen masks. Called by: door.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from unmask.cli.answer import Debug, Json, print_json

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
        typer.Option(help="What a document is.", show_default="what it was in training, else blank-line"),
    ] = None,
    errors: Annotated[
        Literal["strict", "replace"], typer.Option(help="Bytes that are not UTF-8: refuse, or replace.")
    ] = "strict",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Judge a model by text that it has not seen: 15 % of it is hidden, the same letters for every model.

    Bits per character compare models of one tokenizer only.
    """
    from unmask.bundle import load
    from unmask.eval.evaluate import evaluate_text
    from unmask.world import discover

    held = evaluate_text(load(model), texts, world=discover("float32"), length=length, document=document, errors=errors)
    if as_json:
        print_json(asdict(held))
        return
    print(f"loss                {held.loss:.4f} nats per hidden token")
    print(f"unigram loss        {held.unigram_loss:.4f} (a guess that knows how often each token stands in this text)")
    print(f"accuracy            {held.accuracy:.2%} of {held.asked:,} hidden tokens")
    print(f"bits per character  {held.bits_per_character:.4f}")
    print(f"unknown tokens      {held.unknown_share:.3%} (left out)")
    print(f"text length         {held.length} slots at most")
