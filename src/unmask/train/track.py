"""Room card: the log, which is the truth of a run.

Comes in: a step and what was measured there. Goes out: one line of log.jsonl, on the disk before the call returns. The
bar, the table and every report only repeat it. Called by: pretrain's duties.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from unmask import store
from unmask.errors import DamagedError

LOG, DISCARDED, CRASH = "log.jsonl", "discarded.jsonl", "crash.txt"


class JsonLines:
    """A Sink: one JSON object a line. The log holds whole lines only, even where the disk is full."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with store.saying_where(path):
            self._file = path.open("ab", buffering=0)

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """Append one line and hand it to the system at once: a kill after this call does not lose it.

        Raises:
            StoreError: there is no room for it; the lines before stand.
        """
        line = _json_line({"step": step, **metrics}).encode()
        with store.saying_where(self._path):
            whole = os.fstat(self._file.fileno()).st_size
            try:
                left = memoryview(line)
                while left:  # a disk that is nearly full takes a part
                    left = left[self._file.write(left) :]
            except OSError:
                self._file.truncate(whole)
                raise

    def sync(self) -> None:
        """Force what was written to the disk."""
        with store.saying_where(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        if not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()


def plain(value: Any) -> Any:
    """A measurement as the log has it and as it will be read back: names are text, what is no finite number is null."""
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in cast("Sequence[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json_line(value: Mapping[str, Any]) -> str:
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False) + "\n"


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
            file.writelines(_json_line(line) for line in gone)
    whole = "".join(_json_line(line) for line in keep)
    if not log.is_file() or log.read_text(encoding="utf-8", errors="replace") != whole:
        store.write_text(log, whole)
    return len(gone)
