"""The exceptions of the package.

    UnmaskError                 the user can fix it: exit code 2, no traceback
    ├── RecipeError             an invalid recipe or option
    ├── TextError               missing, empty, binary, undecodable or too little text
    ├── TokenizerError          a tokenizer that can't be trained or doesn't fit
    ├── ModelError              a directory without a model, or a model that doesn't fit
    ├── DamagedError            a file that was changed or cut short after it was written
    ├── RunError                a run that exists already or can't be resumed
    ├── WorkerError             a worker process that failed
    ├── StoreError              a directory that can't be written
    └── RequestError            a request to `unmask serve` that is not valid
    Interrupted                 a signal stopped the run before its first step: exit code 130 or 75
    Stopped                     a signal stopped the run after a checkpoint was saved: exit code 130 or 75

Any other exception is an internal error: exit code 1. Its traceback is in the run's crash.txt.
"""

from __future__ import annotations

from typing import Final, Self

from unmask.core.format import masked

CRASH_NOTE: Final = "traceback written to "  # begins the note of an internal error that names the crash file


class UnmaskError(ValueError):
    """An error that the user can fix: what happened, where, and a hint; without credentials of addresses."""

    exit_code = 2

    def __init__(self, message: str, *, location: str = "", hint: str = "") -> None:
        message, location, hint = map(masked, (message, location, hint))
        self.message, self.location, self.hint = message, location, hint
        lines = [message]
        if location:
            lines.append(f"  location: {location}")
        if hint:
            lines.append(f"  hint: {hint}")
        super().__init__("\n".join(lines))

    def at(self, location: str | None = None, hint: str | None = None) -> Self:
        """Return a copy with another location or hint; None keeps the present one."""
        return type(self)(
            self.message,
            location=self.location if location is None else location,
            hint=self.hint if hint is None else hint,
        )


class RecipeError(UnmaskError):
    """An invalid recipe or option."""


class TextError(UnmaskError):
    """Text that can't be read, or too little of it."""


class TokenizerError(UnmaskError):
    """A tokenizer that can't be trained, or lacks something that is needed."""


class ModelError(UnmaskError):
    """A directory that contains no model, or a model that doesn't support the operation."""


class DamagedError(UnmaskError):
    """A file that is missing, cut short or changed since it was written."""


class RunError(UnmaskError):
    """A run directory that exists already, or a run that can't be resumed."""


class WorkerError(UnmaskError):
    """A worker process that ended before its work was done."""


class StoreError(UnmaskError):
    """A file or directory that can't be written."""


class RequestError(UnmaskError):
    """A request to the server that is not valid, or larger than allowed."""


class Interrupted(Exception):
    """A signal stopped the run before its first step. `exit_code` is 130 after Ctrl-C, 75 after SIGTERM or SIGUSR1."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__("stopped before the first step; nothing was written")


class Stopped(Exception):
    """A signal stopped the run after a checkpoint was saved. `exit_code` is as in `Interrupted`."""

    def __init__(self, exit_code: int, run: str, step: int) -> None:
        self.exit_code, self.run, self.step = exit_code, run, step
        super().__init__(f"stopped and saved at step {step}; resume the run with unmask.resume({run!r})")
