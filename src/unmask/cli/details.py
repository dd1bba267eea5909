"""Output of `unmask evaluate --details`: results by group of masked tokens, and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from unmask.evaluation.details import Calibration, EvalDetails, GroupResult

Details = Annotated[
    bool,
    typer.Option(
        "--details",
        help="Results by frequency, place in the word, position, characters and input, and calibration.",
        show_default=False,
    ),
]
_BAR_WIDTH = 10
_GROUP_COLUMNS = ("tokens", "share", "accuracy", "loss", "unigram")
_BIN_COLUMNS = ("tokens", "share", "mean", "accuracy", "difference")


def print_details(details: EvalDetails) -> None:
    """Print a table for each kind of group, and the reliability table: with colors in a terminal, plain in a pipe."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    tables = {
        "frequency rank": details.by_frequency,
        "place in word": details.by_place_in_word,
        "position": details.by_position,
        "characters": details.by_characters,
        "input": details.by_input,
    }
    for title, groups in tables.items():
        total = sum(group.masked_tokens for group in groups)
        rows = [_group_row(group, total) for group in groups]
        _print_table(console, title, _GROUP_COLUMNS, rows, [group.accuracy for group in groups])
    _print_calibration(console, details.calibration)


def _group_row(group: GroupResult, total: int) -> tuple[str, ...]:
    return (
        group.name,
        f"{group.masked_tokens:,}",
        f"{group.masked_tokens / total:.1%}",
        f"{group.accuracy:.2%}",
        f"{group.loss:.4f}",
        f"{group.unigram_loss:.4f}",
    )


def _print_calibration(console: Console, calibration: Calibration) -> None:
    total = sum(one.masked_tokens for one in calibration.bins)
    rows = [
        (
            f"{one.lower:.1%} to {one.upper:.1%}",
            f"{one.masked_tokens:,}",
            f"{one.masked_tokens / total:.1%}",
            f"{one.confidence:.2%}",
            f"{one.accuracy:.2%}",
            f"{100 * (one.accuracy - one.confidence):+.2f}",
        )
        for one in calibration.bins
    ]
    accuracies = [one.accuracy for one in calibration.bins]
    _print_table(console, "confidence", _BIN_COLUMNS, rows, accuracies)
    print(f"\nexpected calibration error  {calibration.error:.2%}")
    print(f"mean confidence             {calibration.confidence:.2%} (probability of the most probable token)")


def _print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]], accuracies: Sequence[float]
) -> None:
    """Print a table whose first column names the rows. A terminal also shows the accuracies as bars."""
    from rich.table import Table
    from rich.text import Text

    from unmask.core.format import bar

    print()
    if not console.is_terminal:
        lines = [(title, *columns), *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for name, *cells in lines:
            padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
            print(f"{name:<{widths[0]}}  {'  '.join(padded)}")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(title, header_style="bold", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", header_style="dim")
    table.add_column("")
    for (name, *cells), accuracy in zip(rows, accuracies, strict=True):
        table.add_row(name, *cells, Text(bar(accuracy, _BAR_WIDTH), "green"))
    console.print(table)
