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
unmask runs --columns run,loss,optimizer.lr,seed
unmask runs runs/notes          one run only
"""
_COLUMNS = ("run", "recipe", "state", "step", "tokens", "loss", "accuracy", "bits/char", "best", "time")
_LEFT_ALIGNED = ("run", "recipe", "state")
# In a narrow terminal, columns are chosen in this order; "settings" stands for those that differ.
_FIRST = ("run", "state", "loss", "recipe", "settings", "bits/char", "step", "time", "accuracy", "tokens", "best")
# Settings that are often varied come first, then the others in the order of the recipe.
_OFTEN_VARIED = (
    "text", "model.kind", "model.hidden_size", "model.num_hidden_layers", "objective.kind", "objective.mask_rate",
    "objective.mask_unit", "optimizer.lr", "optimizer.muon_lr", "train.budget", "seed",
)  # fmt: skip
_MAX_SETTINGS = 4  # in a table
_MAX_VALUE = 24  # characters of a setting's value


def list_runs(
    folder: Annotated[Path, typer.Argument(help="Folder of runs, or one run.")] = Path("runs"),
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Columns to print, separated by commas: names of results or dotted keys of settings.",
            show_default="those that fit",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List runs, newest first: state, last and best validation, time, and the settings that differ.

    There is one table per tokenizer, because losses and bits per character don't compare across tokenizers.
    """
    from unmask.training.runs import find_runs

    runs = find_runs(folder)
    chosen = _parse_columns(columns, runs) if columns is not None else None
    if as_json:
        keys = _differing(runs)
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
        _print_table(group, folder, chosen)
        print()
    if len(groups) > 1:
        print("Losses and bits per character compare only within one tokenizer.")
    for run in damaged:
        print(f"{_name(run, folder)}: {run.state}: {' '.join(run.problem.split())}")


def _parse_columns(text: str, runs: Sequence[RunSummary]) -> list[str]:
    """Return the names of columns that a user lists.

    Raises:
        RecipeError: a name is neither a column nor a setting of a run.
    """
    from unmask.core.config import closest_match
    from unmask.core.errors import RecipeError

    known = [*_COLUMNS, *dict.fromkeys(key for run in runs for key in run.settings)]
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if runs and name not in known:
            near = closest_match(name, known)
            raise RecipeError(
                f"unknown column {name!r}" + (f": did you mean {near!r}?" if near else ""),
                location="--columns",
                hint=f"use {', '.join(_COLUMNS)}, or a key of `unmask recipe reference`",
            )
    if not names:
        raise RecipeError("no column is named", location="--columns", hint=f"use {', '.join(_COLUMNS)}")
    return names


def _differing(runs: Sequence[RunSummary]) -> list[str]:
    """Return the settings in which runs differ: first those that vary within a recipe, and those often varied."""
    from unmask.training.runs import differing_settings

    def rank(key: str) -> tuple[bool, int]:
        values = {(run.recipe, str(run.settings.get(key))) for run in runs if run.settings}
        follows_from_recipe = len(values) == len({recipe for recipe, _ in values})
        return follows_from_recipe, _OFTEN_VARIED.index(key) if key in _OFTEN_VARIED else len(_OFTEN_VARIED)

    return sorted(differing_settings(runs), key=rank)  # otherwise in the order of the recipe


def _to_json(run: RunSummary, keys: Sequence[str]) -> dict[str, Any]:
    fields = asdict(run)
    fields["settings"] = {key: fields["settings"][key] for key in keys if key in fields["settings"]}
    return fields


def _name(run: RunSummary, folder: Path) -> str:
    from unmask.core.format import visible

    return visible(str(run.run.relative_to(folder)) if run.run != folder else str(run.run))


def _cells(run: RunSummary, folder: Path) -> dict[str, str]:
    """Return the cell of each column of _COLUMNS; unknown values are empty."""
    from unmask.core.format import count, duration

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    cells = (
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
    )
    return dict(zip(_COLUMNS, cells, strict=True))


def _setting(run: RunSummary, key: str) -> str:
    value = run.settings.get(key, "")
    text = ("true" if value else "false") if isinstance(value, bool) else str(value)
    return text if len(text) <= _MAX_VALUE else text[: _MAX_VALUE - 1] + "…"


def _print_table(group: Sequence[RunSummary], folder: Path, chosen: Sequence[str] | None) -> None:
    """Print one line per run: the chosen columns or, by default, as many as the terminal holds."""
    from rich.cells import cell_len

    # A setting that only some kinds of model have says nothing about the others.
    keys = [key for key in _differing(group) if all(key in run.settings for run in group)]
    rows = [_cells(run, folder) | {key: _setting(run, key) for key in run.settings} for run in group]
    names = list(chosen or (*_COLUMNS, *keys[:_MAX_SETTINGS]))
    titles = {name: name for name in names}
    widths = {name: max(cell_len(row.get(name, "")) for row in rows) for name in names}

    def width(of: Sequence[str]) -> int:
        return sum(max(widths[name], cell_len(titles[name])) + 2 for name in of) - 2

    if chosen is None and sys.stdout.isatty():  # a pipe has no width
        shorts = [name.rpartition(".")[2] for name in names]
        titles = {name: short if shorts.count(short) == 1 else name for name, short in zip(names, shorts, strict=True)}
        order = [one for name in _FIRST for one in (keys[:_MAX_SETTINGS] if name == "settings" else (name,))]
        fitting: list[str] = []
        for name in order:
            if width([*fitting, name]) <= shutil.get_terminal_size((100, 24)).columns:
                fitting.append(name)
        names = [name for name in names if name in fitting]
    for row in ({name: titles[name] for name in names}, *rows):
        cells: list[str] = []
        for name in names:
            text = row.get(name, "")
            gap = " " * (max(widths[name], cell_len(titles[name])) - cell_len(text))
            cells.append(text + gap if name in _LEFT_ALIGNED or name not in _COLUMNS else gap + text)
        print("  ".join(cells).rstrip())
    if chosen is None and (hidden := [key for key in keys if key not in names]):
        more = f" and {len(hidden) - 2} more" if len(hidden) > 2 else ""
        print(f"  also different: {', '.join(hidden[:2])}{more}")
