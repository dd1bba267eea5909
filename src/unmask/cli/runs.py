"""Commands on runs: a table of states, results and differing settings; a comparison of two groups; a report."""

from __future__ import annotations

import math
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.cli.options import RUNS, AllowCode, Json, complete_model, delayed_progress, open_display, print_json
from unmask.core.errors import RecipeError

if TYPE_CHECKING:
    from unmask.training.runs import GroupComparison, GroupDifference, RunSummary

RUNS_EXAMPLES = """\
[bold]Examples[/bold]

unmask runs
unmask runs experiments --json
unmask runs --columns run,loss,optimizer.lr,seed
unmask runs runs/notes          one run only
unmask runs --compare base-1 wide-1               groups: all runs that differ from these in the seed only
unmask runs --compare "base-*" "wide-*" --json    patterns of names
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
    folder: Annotated[Path, typer.Argument(help="Folder of runs, or one run.", autocompletion=complete_model)] = Path(
        RUNS
    ),
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Columns to print, separated by commas: names of results or dotted keys of settings.",
            show_default="those that fit",
        ),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B",
            help="Compare two groups of runs in FOLDER, each named by a run (all that differ from it in the seed only) "
            "or a pattern.",
            show_default="list the runs",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List runs, newest first: state, last and best validation, time, and the settings that differ.

    There is one table per tokenizer, because losses and bits per character don't compare across tokenizers.
    With --compare, a difference counts if it exceeds twice its standard deviation over the seeds.
    """
    from unmask.training.runs import compare_runs, find_runs

    if compare is not None:
        if columns is not None:
            raise RecipeError(
                "--columns can't be combined with --compare", location=f"--columns {columns}", hint="leave it out"
            )
        comparison = compare_runs(folder, *compare)
        if as_json:
            print_json(_comparison_json(comparison))
        else:
            _print_comparison(comparison)
        return

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


# Comparison -----------------------------------------------------------------------------------------------------------

_COMPARED_COLUMNS = ("measure", "A", "B", "B − A", "95 % interval", "2 × noise", "")


def _comparison_json(comparison: GroupComparison) -> dict[str, Any]:
    groups = {"A": comparison.first, "B": comparison.second}
    return {
        "groups": {
            name: [{"run": str(run.run), "seed": run.settings.get("seed")} for run in group]
            for name, group in groups.items()
        },
        "is_paired": comparison.is_paired,
        "settings": {
            key: {name: group[0].settings.get(key) for name, group in groups.items()} for key in comparison.settings
        },
        "differences": [{**asdict(each), "differs": each.differs} for each in comparison.differences],
        "left_out": [{"run": str(run.run), "state": run.state} for run in comparison.left_out],
    }


def _print_comparison(comparison: GroupComparison) -> None:
    """Print the groups and one row per measure: a table in a terminal, plain columns in a pipe."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table

    from unmask.core.format import join_names, visible

    for name, group in (("A", comparison.first), ("B", comparison.second)):
        seeds = ", ".join(str(run.settings.get("seed")) for run in group)
        plural = "s" * (len(group) != 1)
        names = join_names([visible(run.run.name) for run in group])
        print(f"{name}  {names}  ({len(group)} run{plural}, seed{plural} {seeds})")
    for key in comparison.settings:
        print(f"{key}: {_setting(comparison.first[0], key)} in A, {_setting(comparison.second[0], key)} in B")
    for run in comparison.left_out:
        print(f"left out: {visible(run.run.name)} is {run.state}")
    print()
    rows = [_compared_cells(each) for each in comparison.differences]
    console = Console(highlight=False, soft_wrap=True)
    if console.is_terminal:
        table = Table(box=None, pad_edge=False)
        for number, title in enumerate(_COMPARED_COLUMNS):
            table.add_column(title, justify="right" if 0 < number < len(_COMPARED_COLUMNS) - 1 else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    else:
        lines = [_COMPARED_COLUMNS, *rows]
        widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            cells = (cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True))
            print("  ".join(cells).rstrip())
    print()
    method = "seed by seed" if comparison.is_paired else "of independent runs"
    print(f"± is a standard error; noise is the standard deviation of the difference of two runs, {method}")


def _compared_cells(row: GroupDifference) -> tuple[str, ...]:
    decimals = 1 if row.measure == "seconds" else 4
    means = tuple(_mean(values, decimals) for values in (row.first, row.second))
    interval = noise = verdict = ""
    if row.interval is not None and row.noise is not None:
        interval = f"{row.interval[0]:+.{decimals}f} to {row.interval[1]:+.{decimals}f}"
        noise = f"{2 * row.noise:.{decimals}f}"
        verdict = "differs" if row.differs else "within noise"
    else:
        verdict = "one seed: no noise known"
    return row.measure.replace("_", " "), *means, f"{row.difference:+.{decimals}f}", interval, noise, verdict


def _mean(values: Sequence[float], decimals: int) -> str:
    """Return the mean and its standard error."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{decimals}f}{error}"


# report ---------------------------------------------------------------------------------------------------------------

REPORT_EXAMPLES = """\
[bold]Examples[/bold]

unmask report runs/notes                             writes runs/notes/report.html
unmask report runs/a runs/b --out compare.html       overlays the curves of several runs
unmask report runs/notes --finetuned results/reviews adds the scores of `unmask finetune`
"""


def report_runs(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs; they may still be training.")],
    out: Annotated[
        Path | None,
        typer.Option(help="HTML file to write.", show_default="RUN/report.html; for several runs report.html"),
    ] = None,
    finetuned: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder with results of unmask finetune; may be repeated.",
            show_default="those in or beside the run, and in models/",
        ),
    ] = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Write a report of runs: one HTML page with curves, sentences over time, details, settings and versions.

    The page needs no server and no network. Curves of several runs are overlaid, with the settings that differ.
    """
    from unmask.core.plugins import code_allowed
    from unmask.report.write import write_report

    start = time.monotonic()
    with open_display(sys.stderr) as display, code_allowed(allow_code):
        path = write_report(runs, out, finetuned=finetuned or (), on_progress=delayed_progress(display))
    if as_json:
        seconds = round(time.monotonic() - start, 3)
        print_json({"report": path, "runs": runs, "bytes": path.stat().st_size, "seconds": seconds})
        return
    from unmask.core.format import size

    print(f"report: {path} ({size(path.stat().st_size)})")
