"""Command on runs: a table of their states, results and differing settings."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.cli.options import Json, print_json

if TYPE_CHECKING:
    from unmask.training.runs import RunSummary


RUNS_EXAMPLES = """\
[bold]Examples[/bold]

unmask runs
unmask runs experiments --json
unmask runs runs/notes          one run only
"""
_COLUMNS = ("run", "recipe", "state", "step", "tokens", "loss", "accuracy", "bits/char", "best", "time")
_LEFT_ALIGNED = ("run", "recipe", "state")
_PIPE_WIDTH = 1000  # a pipe has no width: lines are not wrapped


def list_runs(
    folder: Annotated[Path, typer.Argument(help="Folder of runs, or one run.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List runs, newest first: state, last and best validation, time, and the settings that differ.

    There is one table per tokenizer, because losses and bits per character don't compare across tokenizers.
    """
    from unmask.training.runs import differing_settings, find_runs

    runs = find_runs(folder)
    keys = differing_settings(runs)
    if as_json:
        print_json([_to_json(run, keys) for run in runs])
        return
    if not runs:
        print(f"no runs in {folder}")
        return
    groups: dict[str, list[RunSummary]] = {}
    for run in runs:  # groups are ordered by their newest run
        groups.setdefault(run.tokenizer, []).append(run)
    damaged = groups.pop("", [])
    for tokenizer, group in groups.items():
        print(f"tokenizer {tokenizer} ({group[0].tokenizer_kind})")
        settings = [[_setting(run, key) for key in keys] for run in group]
        _print_table([_cells(run, folder) for run in group], settings, keys)
        print()
    if len(groups) > 1:
        print("Losses and bits per character compare only within one tokenizer.")
    for run in damaged:
        print(f"{_name(run, folder)}: {run.state}: {' '.join(run.problem.split())}")


def _to_json(run: RunSummary, keys: Sequence[str]) -> dict[str, Any]:
    fields = asdict(run)
    fields["settings"] = {key: fields["settings"][key] for key in keys if key in fields["settings"]}
    return fields


def _name(run: RunSummary, folder: Path) -> str:
    return str(run.run.relative_to(folder)) if run.run != folder else str(run.run)


def _cells(run: RunSummary, folder: Path) -> list[str]:
    """Return the cells of a run in the order of the columns; unknown values are empty."""
    from unmask.core.format import count, duration

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        _name(run, folder),
        run.recipe,
        run.state,
        f"{run.step:,}" + ("" if run.steps is None else f"/{run.steps:,}"),
        "" if run.tokens is None else count(run.tokens),
        shown(run.loss, ".3f"),
        shown(run.accuracy, ".1%"),
        shown(run.bits_per_character, ".3f"),
        "" if run.best_loss is None else f"{run.best_loss:.3f} at {run.best_step:,}",
        "" if run.seconds is None else duration(run.seconds),
    ]


def _setting(run: RunSummary, key: str) -> str:
    value = run.settings.get(key, "")
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


def _print_table(rows: Sequence[list[str]], settings: Sequence[list[str]], keys: Sequence[str]) -> None:
    """Print the results in columns; the settings follow in further columns if they fit, else on separate lines."""
    from rich.cells import cell_len

    def padded(text: str, width: int, is_left: bool) -> str:
        gap = " " * (width - cell_len(text))
        return text + gap if is_left else gap + text

    def lines(columns: Sequence[str], table: Sequence[Sequence[str]]) -> list[str]:
        widths = [max(cell_len(text) for text in (name, *(row[i] for row in table))) for i, name in enumerate(columns)]
        is_left = [name in _LEFT_ALIGNED or name in keys for name in columns]
        return ["  ".join(map(padded, row, widths, is_left)).rstrip() for row in (columns, *table)]

    full = lines([*_COLUMNS, *keys], [[*row, *values] for row, values in zip(rows, settings, strict=True)])
    width = shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else _PIPE_WIDTH
    if max(map(cell_len, full)) <= width:
        print("\n".join(full))
        return
    header, *body = lines(_COLUMNS, rows)
    print(header)
    for line, values in zip(body, settings, strict=True):
        print(line)
        print("    " + " · ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True) if value))
