"""Writing checkpoints in a thread while training goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Final

_log = logging.getLogger("unmask")
WRITER_THREAD: Final = "unmask-checkpoint"


class CheckpointWriter:
    """Writes one checkpoint after the other in a thread. Its methods are called by one thread."""

    def __init__(self) -> None:
        self._writing: Future[Path] | None = None
        self._thread: threading.Thread | None = None
        self._writes: SimpleQueue[tuple[Callable[[], Path], Future[Path]] | None] = SimpleQueue()

    def start(self, write: Callable[[], Path]) -> None:
        """Begins to write a checkpoint. `finished` must have reported the one before: one copy is in memory at a time.

        Args:
            write: Function that writes it and returns its folder; it must not read what training changes.
        """
        assert self._writing is None, "one checkpoint at a time"
        if self._thread is None:
            # Python waits for the threads of an executor when it ends, also after a second Ctrl-C; not for a daemon.
            self._thread = threading.Thread(target=self._work, name=WRITER_THREAD, daemon=True)
            self._thread.start()
        self._writing = Future()
        self._writes.put((write, self._writing))

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

    def close(self, *, waits: bool = True) -> None:
        """Ends the thread after the checkpoint that is being written; an error of it becomes a warning.

        Args:
            waits: Whether to wait for it. If not, it may be lost.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            if waits:
                self.finished(wait=True)
        except Exception as error:  # must not replace the error that ended the run
            _log.warning(f"the last checkpoint is not saved: {error}")
        finally:
            self._writes.put(None)
        if waits:
            thread.join()

    def _work(self) -> None:
        while task := self._writes.get():
            write, writing = task
            try:
                writing.set_result(write())
            except BaseException as error:  # raised where the result is read
                writing.set_exception(error)
