"""Room card: the verbs of the command `unmask`.

Comes in: a command line. Goes out: the verb's work and its exit code. Called by: the command, `python -m unmask`.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from unmask.cli.checks import AUDIT_EXAMPLES, CHECK_EXAMPLES, audit, check_plugin_command
from unmask.cli.data import INSPECT_EXAMPLES, PREPARE_EXAMPLES, inspect, prepare
from unmask.cli.errors import debug_everywhere, handle_errors
from unmask.cli.models import (
    EVALUATE_EXAMPLES,
    EXPORT_EXAMPLES,
    FILL_EXAMPLES,
    IMPORT_EXAMPLES,
    evaluate,
    export,
    fill,
    import_,
)
from unmask.cli.pretrain import DEMO_EXAMPLES, PRETRAIN_EXAMPLES, demo, pretrain
from unmask.cli.recipe import CHECK_RECIPE_EXAMPLES, SHOW_RECIPE_EXAMPLES, check_recipe, list_recipes, show_recipe
from unmask.cli.runs import RUNS_EXAMPLES, runs
from unmask.cli.tokenizer import (
    COMPARE_TOKENIZERS_EXAMPLES,
    SHOW_TOKENIZER_EXAMPLES,
    TRAIN_TOKENIZER_EXAMPLES,
    compare_tokenizers,
    show_tokenizer,
    train_tokenizer,
)

_EPILOG = """\
[bold]Begin here[/bold]

unmask demo                                   a model within a few minutes
unmask pretrain notes.txt --budget "10 min"   a model from your own text
unmask fill runs/demo "Return the \\[MASK] of the list."

Each verb explains itself: unmask pretrain --help
"""

app = typer.Typer(
    name="unmask",
    help="Raw text in; a pretrained masked-language-model encoder out.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.command("pretrain", epilog=PRETRAIN_EXAMPLES)(handle_errors(pretrain))
app.command("fill", epilog=FILL_EXAMPLES)(handle_errors(fill))
app.command("evaluate", epilog=EVALUATE_EXAMPLES)(handle_errors(evaluate))
app.command("export", epilog=EXPORT_EXAMPLES)(handle_errors(export))
app.command("import", epilog=IMPORT_EXAMPLES)(handle_errors(import_))
app.command("audit", epilog=AUDIT_EXAMPLES)(handle_errors(audit))
app.command("check-plugin", epilog=CHECK_EXAMPLES)(handle_errors(check_plugin_command))
app.command("runs", epilog=RUNS_EXAMPLES)(handle_errors(runs))
app.command("demo", epilog=DEMO_EXAMPLES)(handle_errors(demo))
_recipes = typer.Typer(no_args_is_help=True, help="List, show and check recipes.", rich_markup_mode="rich")
_recipes.command("list")(handle_errors(list_recipes))
_recipes.command("show", epilog=SHOW_RECIPE_EXAMPLES)(handle_errors(show_recipe))
_recipes.command("check", epilog=CHECK_RECIPE_EXAMPLES)(handle_errors(check_recipe))
app.add_typer(_recipes, name="recipe")
_texts = typer.Typer(
    no_args_is_help=True, help="Look at text, and prepare it, before training on it.", rich_markup_mode="rich"
)
_texts.command("inspect", epilog=INSPECT_EXAMPLES)(handle_errors(inspect))
_texts.command("prepare", epilog=PREPARE_EXAMPLES)(handle_errors(prepare))
app.add_typer(_texts, name="data")
_tokenizers = typer.Typer(no_args_is_help=True, help="Train, look at and compare tokenizers.", rich_markup_mode="rich")
_tokenizers.command("train", epilog=TRAIN_TOKENIZER_EXAMPLES)(handle_errors(train_tokenizer))
_tokenizers.command("show", epilog=SHOW_TOKENIZER_EXAMPLES)(handle_errors(show_tokenizer))
_tokenizers.command("compare", epilog=COMPARE_TOKENIZERS_EXAMPLES)(handle_errors(compare_tokenizers))
app.add_typer(_tokenizers, name="tokenizer")


def _say_version(wanted: bool) -> None:
    if wanted:
        from unmask import __version__

        print(f"unmask {__version__}")
        raise typer.Exit


@app.callback()
def _before(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", show_default=False)] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_say_version, is_eager=True, show_default=False),
    ] = False,
) -> None:
    if debug:
        debug_everywhere.append(True)


def main() -> None:
    """Run the command line of this process and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a text may hold what this terminal can't show
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="unmask")


__all__ = ["main"]
