"""Room card: what can go wrong, drawn as a tree.

Comes in: nothing. Goes out: exceptions whose message says what, where and what next. Called by: everyone.

    UnmaskError                 a person can mend it: exit code 2, no traceback
    ├── RecipeError             unknown recipe, key, value, unit; a stage that is never reached
    ├── TextError               missing, empty, binary, undecodable or too little text
    ├── TokenizerError          a vocabulary that the text can't give; a piece that is not there
    ├── ModelError              a folder that is no model, ids beyond the vocabulary, no [MASK] in the text
    ├── DamagedError            a file whose bytes are not those that were written
    ├── RunError                an output that exists, a run that can't be resumed as asked
    └── StoreError              a folder that can't be written
    Stopped                     a signal asked the run to stop; it was saved: exit code 130 or 75

Anything else that escapes is a fault of ours: exit code 1, traceback kept in the run's crash.txt.
"""

from __future__ import annotations


class UnmaskError(ValueError):
    """What a person can mend: `what` went wrong, `where` it did and what to do `next`."""

    exit_code = 2

    def __init__(self, message: str, *, location: str = "", hint: str = "") -> None:
        self.message, self.location, self.hint = message, location, hint
        lines = [message]
        if location:
            lines.append(f"  where: {location}")
        if hint:
            lines.append(f"  next:  {hint}")
        super().__init__("\n".join(lines))


class RecipeError(UnmaskError):
    """A recipe or an option that does not say what it should."""


class TextError(UnmaskError):
    """Text that can't be read, or too little of it."""


class TokenizerError(UnmaskError):
    """A tokenizer that can't be trained or lacks what is asked of it."""


class ModelError(UnmaskError):
    """A folder that is no model, or a question that this model can't answer."""


class DamagedError(UnmaskError):
    """A file whose bytes are not those that were written."""


class RunError(UnmaskError):
    """A run that exists where none should, or can't go on as asked."""


class StoreError(UnmaskError):
    """A place that can't be written."""


class Stopped(Exception):
    """The run was asked to stop by a signal and was saved; `exit_code` is 130 (Ctrl-C) or 75 (SIGTERM, SIGUSR1)."""

    def __init__(self, exit_code: int, run: str, step: int) -> None:
        self.exit_code, self.run, self.step = exit_code, run, step
        super().__init__(f"stopped and saved at step {step}")
