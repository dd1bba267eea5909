"""Runs commands and turns errors into messages and exit codes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer

from unmask.core.errors import CRASH_NOTE, Interrupted, Stopped, UnmaskError

INTERRUPTED, TERMINATED, INTERNAL_ERROR = 130, 75, 1  # exit codes
_NAMES = ("SIGTERM", "SIGUSR1")  # Windows has no SIGUSR1

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", show_default=False)]


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGUSR1. It is raised where Ctrl-C would be, so that temporary files are removed."""

    exit_code = TERMINATED


@contextmanager
def _signals() -> Generator[None]:
    """Raise Terminated on SIGTERM and SIGUSR1, which would end the process at once. Training handles them itself."""
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
        handlers = {number: signal.signal(number, _terminate) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that Python didn't set


def _terminate(number: int, frame: FrameType | None) -> None:
    for name in _NAMES:  # schedulers repeat a signal; a second one would interrupt the removal of temporary files
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    raise Terminated


def exit_code_of(stop: BaseException) -> int:
    """Return the exit code of a command that a signal stopped: 130 after Ctrl-C, else 75."""
    return getattr(stop, "exit_code", INTERRUPTED)


def handle_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that reports its errors and exits with the right code; adds the option `--debug`.

    The option is accepted before and after the name of the command.
    """

    @functools.wraps(command)
    def run(*args: Any, debug: bool = False, context: typer.Context | None = None, **kwargs: Any) -> None:
        if context is not None:
            debug = debug or bool(context.find_root().params.get("debug"))
        try:
            with _signals():
                command(*args, **kwargs)
                sys.stdout.flush()
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except BrokenPipeError as error:  # the reader has closed the pipe, as in `unmask recipe show tiny | head`
            _discard_output()
            raise typer.Exit(0) from error
        except SystemExit as error:
            if not isinstance(error.__context__, BrokenPipeError):
                raise
            raise typer.Exit(0) from error  # rich exits with 1 if the reader has closed the pipe
        except KeyboardInterrupt as error:
            how = "SIGTERM or SIGUSR1" if isinstance(error, Terminated) else "Ctrl-C"
            print_error("stopped:", f"by {how}, before the command was done")
            raise typer.Exit(exit_code_of(error)) from error
        except Exception as error:
            if debug:
                traceback.print_exc()
            raise typer.Exit(report_error(error)) from error

    # typer reads the options from the signature.
    signature = inspect.signature(command, eval_str=True)
    added = [
        inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug),
        inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
    ]
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {**command.__annotations__, "debug": Debug, "context": typer.Context}
    return run


def report_error(error: Exception) -> int:
    """Print an error to standard error and return the exit code."""
    if isinstance(error, UnmaskError):
        print_error("error:", str(error))
        return error.exit_code
    if isinstance(error, Stopped):
        command = f"unmask pretrain --resume {shlex.quote(error.run)}"
        print_error("stopped:", f"saved at step {error.step:,}\n  hint: {command}")
        return error.exit_code
    if isinstance(error, Interrupted):
        print_error("stopped:", str(error).removeprefix("stopped "))
        return error.exit_code
    from unmask.core.plugins import user_frame

    notes = [note.removeprefix(CRASH_NOTE) for note in getattr(error, "__notes__", []) if note.startswith(CRASH_NOTE)]
    traceback_at = f"the traceback is in {notes[0]}" if notes else "add --debug to see the traceback"
    summary = f"{type(error).__name__}: {error}"
    if place := user_frame(error):
        print_error("plugin error:", f"{summary}\n  location: {place}\n  hint: fix the plugin; {traceback_at}")
    else:
        print_error("internal error:", f"{summary}\n  hint: report this error; {traceback_at}")
    return INTERNAL_ERROR


def print_error(label: str, message: str) -> None:
    """Print a message to standard error; the label is red in a terminal."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, highlight=False, soft_wrap=True).print(Text.assemble((label, "bold red"), " ", message))


def _discard_output() -> None:
    """Redirect standard output to the null device: the interpreter's last flush would report the closed pipe again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
