"""TO WRITE."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from unmask.core.errors import TokenizerError

if TYPE_CHECKING:
    from unmask.models.model import Model
    from unmask.tokenization.tokenizer import Tokenizer


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text.", show_default=False)]


def open_model(path: str | Path) -> Model:
    """`unmask.load`, which says on standard error where a run's best model is not its last step."""
    from unmask.models.model import last_step, load

    model = load(path)
    last = last_step(Path(path)) if model.card.get("step") and Path(model.path) != Path(path) else None
    if last is not None and last != model.card["step"]:
        step = f"step {model.card['step']:,}, the best of this run by validation"
        print(f"this is {step}; the last is {last:,}", file=sys.stderr)
    return model


def print_json(value: Any) -> None:
    """A value on standard output; other letters than ASCII as they are where the output can hold them."""
    holds_all = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(value, indent=2, ensure_ascii=not holds_all, default=str))


Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
]

Budget = Annotated[
    str | None,
    typer.Option(help='How long: "300 s", "120 steps", "2M tokens", "3 epochs".', show_default="the recipe's"),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Processor threads; they decide the bits.", show_default="all cores")
]
TEXT = typer.Argument(
    metavar="TEXT", help="Files, folders, patterns, dataset:NAME, - for standard input; TEXT:0.7 gives weights."
)
Texts = Annotated[list[Path] | None, TEXT]
Errors = Annotated[
    Literal["strict", "replace", "skip"] | None,
    typer.Option(
        help="Unreadable text: refuse; replace (bytes alone, by U+FFFD); skip, counted.", show_default="strict"
    ),
]
Rule = Annotated[
    Literal["blank-line", "line", "file"] | None,
    typer.Option(help="What a document of plain text is.", show_default="blank-line"),
]
Field = Annotated[
    str | None, typer.Option(help="Where the text of a .jsonl line or a table stands.", show_default="text")
]
Valid = Annotated[
    list[str] | None,
    typer.Option("--valid", metavar="NAME=TEXT", help="Measure this text too at each validation; may be repeated."),
]

TOKENIZER_HELP = "A folder or file with a tokenizer.json, a run, or a model."
TokenizerAt = Annotated[
    Path | None, typer.Option(help=TOKENIZER_HELP, show_default="the recipe's, trained on the text")
]


def tokenizer_at(path: Path) -> Path:
    """Where the tokenizer of a file, a folder, a run or a model stands.

    Raises:
        TokenizerError: there is nothing at this path.
        ModelError: a run that has no model yet.
    """
    if path.is_dir() and not (path / "tokenizer.json").is_file() and (path / "recipe.toml").is_file():
        from unmask.models.model import find_checkpoint

        return find_checkpoint(path)
    if not os.path.lexists(path):
        raise TokenizerError(
            "there is nothing at this path", location=str(path), hint="give a folder with a tokenizer.json"
        )
    return path


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file, a folder, a run or a model."""
    from unmask.tokenization.tokenizer import Tokenizer

    return Tokenizer.load(tokenizer_at(path))
