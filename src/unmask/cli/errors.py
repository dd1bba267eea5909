"""Room card: how a verb ends: errors become messages and exit codes.

Comes in: a verb's function. Goes out: the same function, which lets no traceback through unless --debug asks for it.
Called by: door, for every verb.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec

import typer

from unmask.core.errors import Stopped, UnmaskError

if TYPE_CHECKING:
    pass


Arguments = ParamSpec("Arguments")

INTERRUPTED, FAULT = 130, 1
debug_everywhere: list[bool] = []  # filled by `unmask --debug VERB`


def handle_errors(verb: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """The verb, whose errors end it with a message and the right exit code."""

    @functools.wraps(verb)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        debug = bool(kwargs.get("debug") or debug_everywhere)
        try:
            verb(*args, **kwargs)
            sys.stdout.flush()
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except BrokenPipeError as error:  # nobody reads any more, as in `unmask recipe show tiny | head`
            _forget_output()
            raise typer.Exit(0) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error
        except Exception as error:
            if debug:
                traceback.print_exc()
            raise typer.Exit(report_error(error)) from error

    return run


def report_error(error: Exception) -> int:
    """Say what happened on standard error; the exit code."""
    if isinstance(error, UnmaskError):
        complain("error:", str(error))
        return error.exit_code
    if isinstance(error, Stopped):
        complain(
            "stopped:", f"saved at step {error.step:,}\n  next:  unmask pretrain --resume {shlex.quote(error.run)}"
        )
        return error.exit_code
    # A signal that came before there was anything to save: train.signals.Interrupted, told by its exit code, because
    # importing it would make every small error wait for torch.
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        complain("stopped:", str(error).removeprefix("stopped "))
        return code
    crash_file = getattr(error, "crash_file", None)
    from unmask.core.plugins import user_frame

    if place := user_frame(error):
        kept = crash_file or "--debug shows it"
        complain(
            "a fault in your module:",
            f"{type(error).__name__}: {error}\n  where: {place}\n  next:  mend it; the whole traceback: {kept}",
        )
        return FAULT
    kept = (
        f"the traceback is in {crash_file}" if crash_file else "run the same command with --debug to see the traceback"
    )
    complain("a fault of ours:", f"{type(error).__name__}: {error}\n  next:  {kept}; please report it")
    return FAULT


def complain(label: str, message: str) -> None:
    """A message on standard error, its label red in a terminal."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, highlight=False, soft_wrap=True).print(Text.assemble((label, "bold red"), " ", message))


def _forget_output() -> None:
    """Let the interpreter's last flush go nowhere, or it would complain about the pipe once more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
