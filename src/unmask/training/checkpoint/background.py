"""Writing checkpoints in a thread while training goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from unmask.core.errors import UnmaskError

_log = logging.getLogger("unmask")
WRITER_THREAD: Final = "unmask-checkpoint"


class CheckpointWriter:
    """Writes one checkpoint after the other in a thread. Its methods are called by one thread."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=WRITER_THREAD)
        self._writing: Future[Path] | None = None

    def start(self, write: Callable[[], Path]) -> None:
        """Begins to write a checkpoint. `finished` must have reported the one before: one copy is in memory at a time.

        Args:
            write: Function that writes it and returns its folder; it must not read what training changes.
        """
        assert self._writing is None, "one checkpoint at a time"
        self._writing = self._executor.submit(write)

    def finished(self, *, wait: bool = False) -> Path | None:
        """Returns the folder of the checkpoint that was started last, once, when it is complete; else None.

        Args:
            wait: Whether to wait until it is complete.

        Raises:
            StoreError: it could not be written. Reported once, too.
        """
        writing = self._writing
        if writing is None or not (wait or writing.done()):
            return None
        try:
            return writing.result()
        finally:
            if writing.done():  # an interrupt may end the wait
                self._writing = None

    def close(self) -> None:
        """Waits for the checkpoint that is being written; an error of it becomes a warning."""
        try:
            self.finished(wait=True)
        except (UnmaskError, OSError, RuntimeError) as error:
            _log.warning(f"the last checkpoint is not saved: {error}")
        finally:
            self._executor.shutdown()
