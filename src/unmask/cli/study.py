"""Commands on studies: list, show and run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.cli.errors import exit_code_of, print_error
from unmask.cli.options import Json, Settings, print_json

if TYPE_CHECKING:
    from unmask.checks.studies import Study

SHOW_STUDY_EXAMPLES = """\
[bold]Examples[/bold]

unmask study show mask-rate
"""
RUN_STUDY_EXAMPLES = """\
[bold]Examples[/bold]

unmask study run mask-rate --quick                  at most three minutes, on the documentation of Python
unmask study run mask-rate --text notes.txt         the full study on your text
unmask study run mask-rate --text notes.txt --seeds 5    adds seeds to it
"""
StudyName = Annotated[
    str, typer.Argument(metavar="NAME|FILE", help="Study: a shipped name or a study.toml.", show_default=False)
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Run with a small budget and one seed; nothing is judged.", show_default=False)
]


def list_studies(as_json: Json = False) -> None:
    """List the studies that are shipped with unmask."""
    from unmask.checks.studies import load_study, shipped_studies

    questions = {name: load_study(name).config.question for name in shipped_studies()}
    if as_json:
        print_json([{"name": name, "question": question} for name, question in questions.items()])
        return
    width = max(map(len, questions))
    for name, question in questions.items():
        print(f"{name:<{width}}  {question}")


def show_study(name: StudyName, as_json: Json = False) -> None:
    """Show a study: question, variants, what is measured, budget, and the figures that are expected."""
    from unmask.checks.studies import load_study
    from unmask.core.config import to_toml

    study = load_study(name)
    config = study.config
    if as_json:
        print_json({"name": study.name, **to_toml(config)})
        return
    print(config.question)
    print(f"source    {config.source}")
    print(f"recipe    {config.recipe}" + "".join(f", {setting}" for setting in config.settings))
    print(f"budget    {config.budget}{_clock(study)} per run, {config.seeds} seeds")
    print(f"quick     {config.quick.budget}, {config.quick.seeds} seed{'s' * (config.quick.seeds != 1)}")
    print(f"measures  {', '.join(config.measures)}")
    print("variants")
    width = max(len(variant.name) for variant in config.variant)
    for variant in config.variant:
        recipe = [f"recipe {variant.recipe}"] if variant.recipe else []
        budget = [f"budget {variant.budget}"] if variant.budget else []
        print(f"  {variant.name:<{width}}  {', '.join([*recipe, *budget, *variant.settings]) or 'as the recipe'}")
    for expected in config.expected:
        sign = "÷" if expected.kind == "ratio" else "−"
        print(f"expected  {expected.measure}: {expected.variant} {sign} {expected.against} {expected.bounds}")
        print(f"          {expected.basis}")


def _clock(study: Study) -> str:
    return " of processor time" if study.budget.unit == "seconds" else ""


def run_study(
    name: StudyName,
    quick: Quick = False,
    texts: Annotated[
        list[Path] | None,
        typer.Option("--text", metavar="TEXT", help="Text to train on; may be repeated.", show_default="Python's docs"),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Number of seeds of each variant.", show_default="the study's")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help='Length of each run: "60 s", "500 steps", "2M tokens".', show_default="the study's"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results.", show_default="studies/NAME or studies/NAME-quick")
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Run a study: train each variant with each seed, and write result.json, table.md and plot.svg.

    The same command continues a study that was stopped. A difference between variants counts if it exceeds twice its
    standard deviation over the seeds. Budgets in seconds are processor time.
    """
    from unmask.checks.studies import load_study
    from unmask.checks.studies import run_study as run
    from unmask.core.errors import Interrupted, Stopped
    from unmask.training.display.live import display_for

    study = load_study(name, quick=quick, seeds=seeds, budget=budget, settings=settings or ())
    folder = out or Path("studies") / (f"{study.name}-quick" if quick else study.name)
    display = display_for(sys.stderr)
    try:
        result = run(study, texts or (), out=folder, command=_command(), display=display)
    except (Stopped, Interrupted, KeyboardInterrupt) as stopped:
        display.close()
        print_error("stopped:", "the runs so far are kept\n  hint: the same command continues the study")
        raise typer.Exit(exit_code_of(stopped)) from stopped
    finally:
        display.close()
    if as_json:
        print_json(result)
    else:
        _print_result(study, result, folder)


def _command() -> str:
    """Return the command line with names instead of absolute paths."""
    return shlex.join(["unmask", *(Path(part).name if Path(part).is_absolute() else part for part in sys.argv[1:])])


def _print_result(study: Study, result: Mapping[str, Any], folder: Path) -> None:
    """Print tables in a terminal, plain lines in a pipe."""
    from rich.console import Console
    from rich.table import Table

    from unmask.checks.studies import PLOT, RESULT, TABLE
    from unmask.checks.studies.results import expected_cells, measure_cells

    console = Console(highlight=False, soft_wrap=True)
    for measure, rows in result["summary"].items():
        cells = measure_cells(measure, rows, list(result["variants"]))
        _print_rows(console, Table(title=measure, title_justify="left", box=None), cells)
    expected = expected_cells(result["expected"])
    if expected:
        header = ("expected", "bounds", "measured", "verdict")
        _print_rows(console, Table(box=None), [header, *(row[:4] for row in expected)])
    if study.quick:
        print("a quick run shows that the study works, and no more: nothing is judged")
    written = [file for file in (RESULT, TABLE, PLOT) if (folder / file).exists()]
    print(f"written to {folder}: {', '.join(written)}")


def _print_rows(console: Any, table: Any, rows: Sequence[Sequence[str]]) -> None:
    header, *cells = rows
    if console.is_terminal:
        for column in header:
            table.add_column(column, justify="left" if column == header[0] else "right")
        for row in cells:
            table.add_row(*row)
        console.print(table)
        print()
        return
    if table.title:
        print(table.title)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    print()
