"""Room card: the command `unmask`: it parses, calls and prints; the work is done downstairs.

Comes in: a command line. Goes out: results on standard output, messages on standard error, an exit code: 0 done, 2 what
the person can mend, 1 a fault of ours, 130 or 75 a run that was stopped and saved. Called by: people, `python -m
unmask`. Nothing heavy is imported before a verb needs it, so that `unmask --help` comes at once.
"""

from unmask.cli.door import main

__all__ = ["main"]
