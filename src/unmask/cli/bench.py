"""The command that measures the speed of unmask on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmask.cli.options import (
    DataOptions,
    DocumentRule,
    Errors,
    Field,
    Json,
    OptionalTexts,
    Settings,
    Threads,
    open_display,
    print_json,
)

if TYPE_CHECKING:
    from unmask.checks.bench import BenchedModel, BenchReport, Row

BENCH_EXAMPLES = """\
[bold]Examples[/bold]

unmask bench                                   two minutes, on the documentation of Python
unmask bench notes.txt --recipe bert-mini
unmask bench --recipe tiny --recipe mine.toml --seconds 5 --json > bench.json
"""


def run_bench(
    texts: OptionalTexts = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Recipe to measure: a shipped name or a TOML file; may be repeated.",
            show_default="tiny, char and bert-mini",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time per measurement in seconds.")] = 2.0,
    settings: Settings = None,
    threads: Threads = None,
    errors: Errors = None,
    document: DocumentRule = None,
    field: Field = None,
    as_json: Json = False,
) -> None:
    """Measure training, data preparation, masking and filling on this machine, beside transformers if it is installed.

    Without TEXT, the documentation of Python is used; of a longer text, the first million characters. The two
    libraries work in turns, and ratios are medians. Stop other programs first: they make the speeds too low.
    """
    from unmask.checks.bench import RECIPES, bench
    from unmask.core.errors import TextError

    names = list(dict.fromkeys(recipe or RECIPES))
    with open_display(sys.stderr) as display:
        documents = _bench_texts(texts or [], DataOptions(errors, document, field))
        try:
            report = bench(
                documents,
                names,
                seconds=seconds,
                settings=settings or (),
                threads=threads,
                message=display.message,
            )
        except TextError as error:  # its location is the memory, in which the text is
            raise error.at(location=", ".join(map(str, texts or ["documentation of Python"]))) from error
    if as_json:
        print_json(asdict(report))
    else:
        _print_report(report)


def _bench_texts(names: Sequence[Path], options: DataOptions) -> list[str]:
    """Return the beginning of the named texts; without names, the documentation of Python."""
    from unmask.checks.bench import MAX_CHARACTERS
    from unmask.data.sources import open_source, require_field_used
    from unmask.tokenization.analysis import first_texts
    from unmask.training.demo import python_documentation

    if not names:
        return python_documentation(MAX_CHARACTERS)
    source = open_source(names, options.config())
    require_field_used(options.config().field, [source], given=options.field is not None)
    return list(first_texts(source, MAX_CHARACTERS))


def _print_report(report: BenchReport) -> None:
    """Print a table in a terminal, plain lines in a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    header = [*_machine(report), *map(_model, report.models)]
    columns = ("recipe", "measurement", "unmask", "of the ceiling", "transformers", "unmask ÷ transformers")
    cells = [_cells(row) for row in report.rows]
    if not console.is_terminal:
        for line in header:
            print(line)
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        for line in (columns, *cells):
            print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
        for warning in report.warnings:
            print(f"warning: {warning}")
        return
    for line in header:
        console.print(Text(line, "dim"))
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row, line in zip(report.rows, cells, strict=True):
        style = "" if row.transformers is not None or not row.missing else "dim"
        table.add_row(*line[:4], Text(line[4], style), line[5])
    console.print(table)
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}", "yellow"))


def _machine(report: BenchReport) -> list[str]:
    """Return the facts about machine and text as lines."""
    threads = f"{report.threads} thread{'s' * (report.threads != 1)}"
    device = f", device {report.device}" if report.device != report.processor else ""
    versions = {"unmask": report.unmask, "torch": report.torch, "transformers": report.transformers,
                "accelerate": report.accelerate, "Python": report.python}  # fmt: skip
    return [
        f"{report.date}  {report.processor}, {report.cores} cores, {report.system}{device}",
        f"{threads}, {report.precision}; " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"text: {report.documents:,} documents, {report.characters:,} characters; "
        f"{report.seconds:g} s per measurement, in turns",
    ]


def _model(model: BenchedModel) -> str:
    from unmask.core.format import count

    return (
        f"{model.recipe}: {model.kind}, {count(model.parameters)} parameters, {model.vocab_size:,} tokens in the "
        f"vocabulary, steps of {model.batch_tokens:,} tokens, sequences of {model.max_seq_len}"
    )


def _cells(row: Row) -> tuple[str, ...]:
    """Return the cells of a row: recipe, measurement, speed, share of the ceiling, peer, ratio with its range."""
    from unmask.core.format import rate

    share = "" if row.share is None or row.ceiling is None else f"{row.share:.0%} of {rate(row.ceiling)}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    if row.ratio_range is not None:
        ratio += f" ({row.ratio_range[0]:.2f} to {row.ratio_range[1]:.2f})"
    return row.recipe, row.measurement, row.value, share, row.peer, ratio
