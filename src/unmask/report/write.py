"""Writes reports: on request, and at the end of each run that trains (`train.report`)."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, ParamSpec

from unmask.core import files
from unmask.core.errors import RunError, Stopped, UnmaskError
from unmask.core.files import RunLayout
from unmask.data.prepare import no_progress
from unmask.models.model import Model
from unmask.report import charts
from unmask.report.collect import collect
from unmask.report.page import render
from unmask.training import api
from unmask.training.display import Display
from unmask.training.recipe import read_recipe

NAME: Final = "report.html"
_MAX_RUNS: Final = 24
_MAX_VALIDATION_SECONDS: Final = 0.5  # of a run whose details are computed at its end
_INSTALL: Final = 'pip install "unmask[report]"'

P = ParamSpec("P")


# On request -----------------------------------------------------------------------------------------------------------


def write_report(
    runs: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    finetuned: Sequence[str | Path] = (),
    on_progress: Callable[[str, float], None] | None = None,
) -> Path:
    """Write a report of runs, one HTML page that needs no server and no network, and return its path.

    Args:
        runs: Folder of a run, or of several, which are compared. A run may still be training.
        out: File to write; default: report.html in the folder of the run, for several runs in the current directory.
        finetuned: Folders with results of `unmask.finetune`, besides those in the run, beside it, and in models/.
        on_progress: Called with a task and the fraction of it that is done.

    Raises:
        RunError: a folder is not a run, its log is empty, or the package that draws the charts is not installed.
        StoreError: the file can't be written.
    """
    folders = [Path(run) for run in ([runs] if isinstance(runs, str | Path) else runs)]
    if not 1 <= len(folders) <= _MAX_RUNS:
        raise RunError(f"got {len(folders)} runs, expected 1 to {_MAX_RUNS}", hint="name fewer runs")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise RunError("a run is named twice", location=", ".join(map(str, folders)), hint="name each run once")
    if not charts.is_installed():
        raise RunError(f"{charts.PACKAGE}, which draws the charts, is not installed", hint=f"run {_INSTALL}")
    target = Path(out) if out is not None else (folders[0] / NAME if len(folders) == 1 else Path(NAME))
    if target.is_dir() or target.suffix not in (".html", ".htm"):
        raise RunError("the report is an HTML file", location=str(target), hint="name a file: --out report.html")
    files.check_writable(target.absolute().parent)
    named = [Path(folder) for folder in finetuned]
    files.write_text(target, render(collect(folders, finetuned=named, on_progress=on_progress or no_progress)))
    return target


# At the end of a run --------------------------------------------------------------------------------------------------


@contextmanager
def report_at_end(show: Callable[[str], None]) -> Generator[Callable[[Path | None], None]]:
    """Yields a function that writes the report of the run that the block has trained; a signal needs no call.

    Nothing is written if the recipe says so, if the report is newer than the log, or by ranks other than 0. A failure
    is shown and never raised.

    Args:
        show: Shows one line: the path of the report, or why there is none.
    """
    try:
        yield lambda run: None if run is None else _write_at_end(run, show)
    except Stopped as stopped:
        _write_at_end(Path(stopped.run), show)
        raise


def _write_at_end(run: Path, show: Callable[[str], None]) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        if not read_recipe(run)[0].train.report or _is_newer(run / NAME, run / RunLayout.LOG):
            return
        if not charts.is_installed():
            show(f"report: not written; {_INSTALL} installs what it needs, --set train.report=false turns it off")
            return
        is_alone = os.environ.get("WORLD_SIZE", "1") == "1"  # other ranks would have to evaluate too
        seconds = _MAX_VALIDATION_SECONDS if is_alone else -1.0
        files.write_text(run / NAME, render(collect([run], max_validation_seconds=seconds)))
        show(f"report: {run / NAME}")
    except UnmaskError as error:
        show(f"report: not written: {str(error).splitlines()[0]}")
    except Exception as error:  # such as out of memory on a GPU: the model is saved, so the run has not failed
        show(f"report: not written: {type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _is_newer(file: Path, other: Path) -> bool:
    return file.is_file() and file.stat().st_mtime_ns > other.stat().st_mtime_ns


def reported(train: Callable[P, Model | None]) -> Callable[P, Model | None]:
    """Return `pretrain` or `resume` of `training.api` so that it writes the report of the run at its end."""

    @functools.wraps(train)
    def trained(*args: P.args, **options: P.kwargs) -> Model | None:
        display = options.get("display", "auto")
        show = print if display == "auto" else display.message if isinstance(display, Display) else _show_nothing
        with report_at_end(show) as ended:
            model = train(*args, **options)
            ended(None if model is None else _run_of(Path(model.path)))
        return model

    return trained


def _show_nothing(line: str) -> None:
    """Show nothing, as `display=None` says."""


def _run_of(model: Path) -> Path | None:
    """Return the run of a model that was just trained: its folder, or the one that contains it."""
    return next((folder for folder in (model, model.parent) if (folder / RunLayout.RECIPE).is_file()), None)


pretrain, resume = reported(api.pretrain), reported(api.resume)
