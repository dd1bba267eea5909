"""Room card: the log, which is the truth of a run.

Comes in: a step and what was measured there. Goes out: one line of log.jsonl, on the disk before the call returns. The
bar, the table and every report only repeat it. Called by: pretrain's duties.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from unmask import store
from unmask.errors import DamagedError

LOG, DISCARDED = "log.jsonl", "discarded.jsonl"


class JsonLines:
    """A Sink: one JSON object a line."""

    def __init__(self, path: Path) -> None:
        with store.saying_where(path):
            self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """Append one line and hand it to the system at once: a kill after this call does not lose it."""
        with store.saying_where(Path(self._file.name)):
            self._file.write(json.dumps({"step": step, **metrics}, ensure_ascii=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Force what was written to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        if not self._file.closed:
            self.sync()
            self._file.close()


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log; a last line that a kill cut short is left out.

    Raises:
        DamagedError: a line in the middle that isn't JSON or names no step; file and line are named.
    """
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            yield _measured(line)
        except ValueError as error:
            if number == len(lines) - 1:  # no line end after it: the write was cut
                return
            raise DamagedError(
                "no line of a log", where=f"{path}, line {number + 1}", next="mend or remove that line"
            ) from error


def _measured(line: str) -> dict[str, Any]:
    """A line as JSON; a ValueError where it is none, or doesn't say of which step it is."""
    found: Any = json.loads(line)
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        raise ValueError(line)
    return cast("dict[str, Any]", found)


def discard_after(folder: Path, step: int) -> int:
    """Move log lines of steps that will be done again to discarded.jsonl, so that the log has each step once.

    Returns:
        How many lines were moved.
    """
    log = folder / LOG
    lines = list(read_log(log))
    keep = [line for line in lines if line["step"] <= step]
    gone = [line for line in lines if line["step"] > step]
    if gone:
        with store.saying_where(folder / DISCARDED), (folder / DISCARDED).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in gone)
    whole = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in keep)
    if not log.is_file() or log.read_text(encoding="utf-8", errors="replace") != whole:
        store.write_text(log, whole)
    return len(gone)
