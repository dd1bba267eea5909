"""Room card: the verb import.

Comes in: a folder that others have written. Goes out: a folder of ours, and what was converted or begun anew. Called
by: door.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.cli.answer import Debug, Json, print_json

EXAMPLES = """\
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
    from unmask.hf.importing import import_model

    model = import_model(folder, out, force=force, seed=seed)
    if as_json:
        print_json(
            {"path": model.path, "kind": model.settings.kind, "said": model.said, "vocabulary": model.tokenizer.size}
        )
        return
    for sentence in model.said:
        print(sentence)
    shape = f"{model.settings.layers} layers of {model.settings.width}, {model.tokenizer.size:,} pieces"
    print(f"written   {model.path}: {model.settings.kind}, {shape}")
