"""Room card: the verb export.

Comes in: a run or a model's folder, a place to write. Goes out: a folder that `transformers` opens, and what was
compared before it was written. Called by: door.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from unmask.cli.answer import Debug, Json, print_json

EXAMPLES = """\
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
    from unmask.hf.exporting import export as write

    done = write(model, out, force=force, unverified=unverified, only=only)
    if as_json:
        print_json(asdict(done))
        return
    for sentence in done.said:
        print(sentence)
    if done.parity is None:
        print("unverified: nothing was compared with transformers")
    else:
        pair = "" if done.parity.pair is None else f", of the pair head {done.parity.pair:.1e}"
        print(f"compared  {done.parity.texts} texts, {done.parity.tokens:,} tokens: {done.parity.source}")
        print(f"apart     {done.parity.logits:.1e} at most{pair} (transformers {done.parity.transformers}, float32)")
    print(f"written   {done.path}: {done.architecture}, with a model card in README.md")
