"""Room card: the verbs of the command `unmask`.

Comes in: a command line. Goes out: the verb's work and its exit code. Called by: the command, `python -m unmask`.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from unmask.cli import audit, check, evaluate, export, fill, import_, look, pretrain, recipe, runs, text, tokenizer
from unmask.cli.answer import answered, debug_everywhere

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
app.command("pretrain", epilog=pretrain.PRETRAIN_EXAMPLES)(answered(pretrain.pretrain))
app.command("fill", epilog=fill.EXAMPLES)(answered(fill.fill))
app.command("evaluate", epilog=evaluate.EXAMPLES)(answered(evaluate.evaluate))
app.command("export", epilog=export.EXAMPLES)(answered(export.export))
app.command("import", epilog=import_.EXAMPLES)(answered(import_.import_))
app.command("audit", epilog=audit.EXAMPLES)(answered(audit.audit))
app.command("check", epilog=check.EXAMPLES)(answered(check.check))
app.command("runs", epilog=runs.EXAMPLES)(answered(runs.runs))
app.command("demo", epilog=pretrain.DEMO_EXAMPLES)(answered(pretrain.demo))
_recipes = typer.Typer(no_args_is_help=True, help="List, show and check recipes.", rich_markup_mode="rich")
_recipes.command("list")(answered(recipe.list_recipes))
_recipes.command("show", epilog=recipe.SHOW_EXAMPLES)(answered(recipe.show))
_recipes.command("check", epilog=recipe.CHECK_EXAMPLES)(answered(recipe.check))
app.add_typer(_recipes, name="recipe")
_texts = typer.Typer(
    no_args_is_help=True, help="Look at text, and prepare it, before training on it.", rich_markup_mode="rich"
)
_texts.command("look", epilog=look.EXAMPLES)(answered(look.look))
_texts.command("build", epilog=text.BUILD_EXAMPLES)(answered(text.build))
app.add_typer(_texts, name="text")
_tokenizers = typer.Typer(no_args_is_help=True, help="Train, look at and compare tokenizers.", rich_markup_mode="rich")
_tokenizers.command("train", epilog=tokenizer.TRAIN_EXAMPLES)(answered(tokenizer.train))
_tokenizers.command("look", epilog=tokenizer.LOOK_EXAMPLES)(answered(tokenizer.look))
_tokenizers.command("compare", epilog=tokenizer.COMPARE_EXAMPLES)(answered(tokenizer.compare))
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
