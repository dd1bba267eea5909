"""Room card: the verb runs.

Comes in: a folder of runs. Goes out: a table of what became of them and in what they differ, a part per tokenizer.
Called by: door.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.cli.options import Debug, Json, print_json

if TYPE_CHECKING:
    from unmask.training.runs import RunSummary


RUNS_EXAMPLES = """\
[bold]Examples[/bold]

unmask runs
unmask runs experiments --json
unmask runs runs/notes          one run alone
"""
_COLUMNS = ("run", "recipe", "state", "step", "tokens", "loss", "accuracy", "bits/char", "best", "time")
_LEFT = ("run", "recipe", "state")
_PIPE_WIDTH = 1000  # a pipe has no width; programs and people cut its lines themselves


def runs(
    folder: Annotated[Path, typer.Argument(help="Where the runs are, or one run.")] = Path("runs"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List runs, newest first: state, last and best validation, time, and the settings in which they differ.

    Runs of different tokenizers stand in tables of their own: neither loss nor bits per character compare between them.
    """
    from unmask.training.runs import differing, runs_in

    pasts = runs_in(folder)
    differ = differing(pasts)
    if as_json:
        print_json([_as_json(past, differ) for past in pasts])
        return
    if not pasts:
        print(f"no runs in {folder}")
        return
    groups: dict[str, list[RunSummary]] = {}
    for past in pasts:  # a group stands where its newest run does
        groups.setdefault(past.tokenizer, []).append(past)
    damaged = groups.pop("", [])
    for tokenizer, group in groups.items():
        print(f"tokenizer {tokenizer} ({group[0].tokenizer_kind})")
        settings = [[_value(past, key) for key in differ] for past in group]
        _print_table([_row(past, folder) for past in group], settings, differ)
        print()
    if len(groups) > 1:
        print("Losses and bits per character compare within one tokenizer only.")
    for past in damaged:
        print(f"{_name(past, folder)}: {past.state}: {' '.join(past.problem.split())}")


def _as_json(past: RunSummary, differ: Sequence[str]) -> dict[str, Any]:
    told = asdict(past)
    told["settings"] = {key: told["settings"][key] for key in differ if key in told["settings"]}
    return told


def _name(past: RunSummary, folder: Path) -> str:
    return str(past.run.relative_to(folder)) if past.run != folder else str(past.run)


def _row(past: RunSummary, folder: Path) -> list[str]:
    from unmask.core.format import count, duration

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        _name(past, folder),
        past.recipe,
        past.state,
        f"{past.step:,}" + ("" if past.steps is None else f"/{past.steps:,}"),
        "" if past.tokens is None else count(past.tokens),
        shown(past.loss, ".3f"),
        shown(past.accuracy, ".1%"),
        shown(past.bits_per_character, ".3f"),
        "" if past.best_loss is None else f"{past.best_loss:.3f} at {past.best_step:,}",
        "" if past.seconds is None else duration(past.seconds),
    ]


def _value(past: RunSummary, key: str) -> str:
    value = past.settings.get(key, "")
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


def _print_table(rows: Sequence[list[str]], settings: Sequence[list[str]], differ: Sequence[str]) -> None:
    """The figures in columns; what differs in further columns where they fit, else in lines of their own."""
    from rich.cells import cell_len

    def padded(text: str, wide: int, left: bool) -> str:
        gap = " " * (wide - cell_len(text))
        return text + gap if left else gap + text

    def lines(columns: Sequence[str], table: Sequence[Sequence[str]]) -> list[str]:
        wide = [max(cell_len(text) for text in (name, *(row[i] for row in table))) for i, name in enumerate(columns)]
        left = [name in _LEFT or name in differ for name in columns]
        return ["  ".join(map(padded, row, wide, left)).rstrip() for row in (columns, *table)]

    whole = lines([*_COLUMNS, *differ], [[*row, *more] for row, more in zip(rows, settings, strict=True)])
    width = shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else _PIPE_WIDTH
    if max(map(cell_len, whole)) <= width:
        print("\n".join(whole))
        return
    head, *body = lines(_COLUMNS, rows)
    print(head)
    for line, values in zip(body, settings, strict=True):
        print(line)
        print("    " + " · ".join(f"{key} {value}" for key, value in zip(differ, values, strict=True) if value))
