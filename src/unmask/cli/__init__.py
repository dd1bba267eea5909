"""The command line of unmask: its commands, in groups, and the entry point."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from unmask.cli.checks import (
    AUDIT_EXAMPLES,
    BENCH_EXAMPLES,
    CHECK_PLUGIN_EXAMPLES,
    VERIFY_EXAMPLES,
    audit_masker,
    check_plugin,
    run_bench,
    verify_run,
)
from unmask.cli.data import INSPECT_EXAMPLES, PREPARE_EXAMPLES, inspect_data, prepare_data
from unmask.cli.doctor import DOCTOR_EXAMPLES, doctor
from unmask.cli.embed import EMBED_EXAMPLES, SEARCH_EXAMPLES, embed_texts, search_texts
from unmask.cli.errors import Debug, handle_errors
from unmask.cli.evaluation import EVALUATE_EXAMPLES, SCORE_EXAMPLES, evaluate, score
from unmask.cli.finetune import FINETUNE_EXAMPLES, finetune_model
from unmask.cli.generate import GENERATE_EXAMPLES, generate_text
from unmask.cli.models import (
    EXPORT_EXAMPLES,
    FILL_EXAMPLES,
    IMPORT_EXAMPLES,
    SERVE_EXAMPLES,
    export_model,
    fill,
    import_model,
    serve_models,
)
from unmask.cli.pretrain import DEMO_EXAMPLES, PRETRAIN_EXAMPLES, demo, pretrain
from unmask.cli.recipe import (
    CHECK_RECIPE_EXAMPLES,
    SHOW_RECIPE_EXAMPLES,
    check_recipe,
    list_recipes,
    show_recipe,
    show_reference,
)
from unmask.cli.runs import REPORT_EXAMPLES, RUNS_EXAMPLES, list_runs, report_runs
from unmask.cli.study import RUN_STUDY_EXAMPLES, SHOW_STUDY_EXAMPLES, list_studies, run_study, show_study
from unmask.cli.tokenizer import (
    COMPARE_TOKENIZERS_EXAMPLES,
    SHOW_TOKENIZER_EXAMPLES,
    TRAIN_TOKENIZER_EXAMPLES,
    compare_tokenizers,
    show_tokenizer,
    train_tokenizer,
)

_EPILOG = """\
[bold]First steps[/bold]

unmask demo                                   train a model within a few minutes
unmask pretrain notes.txt --budget "10 min"   train a model on your text
unmask fill runs/demo "Return the \\[MASK] of the list."
unmask --install-completion                   complete commands, runs and recipes in your shell (Tab)

Help for one command: unmask pretrain --help
"""
_TRAIN, _USE, _PREPARE, _CHECK = "Training", "Trained models", "Data, tokenizers and recipes", "Checks"

app = typer.Typer(
    name="unmask",
    help="Pretrain BERT and ModernBERT encoders from raw text.",
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _add(group: typer.Typer, name: str, command: Callable[..., None], examples: str = "", panel: str = "") -> None:
    group.command(name, epilog=examples or None, rich_help_panel=panel or None)(handle_errors(command))


def _add_group(name: str, description: str) -> typer.Typer:
    group = typer.Typer(no_args_is_help=True, help=description, rich_markup_mode="rich")
    app.add_typer(group, name=name, rich_help_panel=_PREPARE)
    return group


_add(app, "pretrain", pretrain, PRETRAIN_EXAMPLES, _TRAIN)
_add(app, "demo", demo, DEMO_EXAMPLES, _TRAIN)
_add(app, "runs", list_runs, RUNS_EXAMPLES, _TRAIN)
_add(app, "report", report_runs, REPORT_EXAMPLES, _TRAIN)
_add(app, "fill", fill, FILL_EXAMPLES, _USE)
_add(app, "generate", generate_text, GENERATE_EXAMPLES, _USE)
_add(app, "evaluate", evaluate, EVALUATE_EXAMPLES, _USE)
_add(app, "score", score, SCORE_EXAMPLES, _USE)
_add(app, "finetune", finetune_model, FINETUNE_EXAMPLES, _USE)
_add(app, "embed", embed_texts, EMBED_EXAMPLES, _USE)
_add(app, "search", search_texts, SEARCH_EXAMPLES, _USE)
_add(app, "export", export_model, EXPORT_EXAMPLES, _USE)
_add(app, "import", import_model, IMPORT_EXAMPLES, _USE)
_add(app, "serve", serve_models, SERVE_EXAMPLES, _USE)
_add(app, "doctor", doctor, DOCTOR_EXAMPLES, _CHECK)
_add(app, "audit", audit_masker, AUDIT_EXAMPLES, _CHECK)
_add(app, "verify", verify_run, VERIFY_EXAMPLES, _CHECK)
_add(app, "check-plugin", check_plugin, CHECK_PLUGIN_EXAMPLES, _CHECK)
_add(app, "bench", run_bench, BENCH_EXAMPLES, _CHECK)

_data = _add_group("data", "Inspect and prepare text before training.")
_add(_data, "inspect", inspect_data, INSPECT_EXAMPLES)
_add(_data, "prepare", prepare_data, PREPARE_EXAMPLES)

_tokenizers = _add_group("tokenizer", "Train, show and compare tokenizers.")
_add(_tokenizers, "train", train_tokenizer, TRAIN_TOKENIZER_EXAMPLES)
_add(_tokenizers, "show", show_tokenizer, SHOW_TOKENIZER_EXAMPLES)
_add(_tokenizers, "compare", compare_tokenizers, COMPARE_TOKENIZERS_EXAMPLES)

_recipes = _add_group("recipe", "List, show and check recipes; print the reference of their keys.")
_add(_recipes, "list", list_recipes)
_add(_recipes, "show", show_recipe, SHOW_RECIPE_EXAMPLES)
_add(_recipes, "check", check_recipe, CHECK_RECIPE_EXAMPLES)
_add(_recipes, "reference", show_reference)

_studies = _add_group("study", "List, show and run studies of objectives, mask rates and lengths.")
_add(_studies, "list", list_studies)
_add(_studies, "show", show_study, SHOW_STUDY_EXAMPLES)
_add(_studies, "run", run_study, RUN_STUDY_EXAMPLES)


def _print_version(value: bool) -> None:
    if value:
        from unmask.core.version import __version__

        print(f"unmask {__version__}")
        raise typer.Exit


@app.callback()
def options_of_all_commands(
    debug: Debug = False,  # read by `handle_errors` from the context
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True, show_default=False
        ),
    ] = False,
) -> None:
    """Accept the options that precede the name of a command."""


def main() -> None:
    """Run the command line of this process and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # text may contain characters that this terminal can't encode
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="unmask")


__all__ = ["main"]
