"""Room card: how a run learns that it should stop.

Comes in: SIGINT (Ctrl-C), SIGTERM, SIGUSR1 (what schedulers send), on Windows Ctrl-Break. Goes out: while the text is
prepared, an exception at once; while the run trains, a wish that the loop reads between steps, so that it ends after a
whole step and is saved. Called by: pretrain.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from unmask.train.loop import INTERRUPTED, TERMINATED


class Interrupted(Exception):
    """A signal came before there was anything to save."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__("stopped before the first step; nothing was written")


class Signals:
    """A context in which signals are answered; outside the main thread (a notebook's worker, say) it does nothing."""

    def __init__(self) -> None:
        self._wish = 0
        self._training = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK") if hasattr(signal, name)]
            for number in (getattr(signal, name) for name in names):
                self._before[number] = signal.signal(number, self._answer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def remember_from_now_on(self) -> None:
        """From here on a signal is a wish; there is something to save."""
        self._training = True

    def wish(self) -> int:
        """0, INTERRUPTED or TERMINATED."""
        return self._wish

    def _answer(self, number: int, frame: FrameType | None) -> None:
        code = INTERRUPTED if number == signal.SIGINT else TERMINATED
        if not self._training:
            raise Interrupted(code)
        if self._wish == INTERRUPTED == code:  # a second Ctrl-C means now
            raise KeyboardInterrupt
        self._wish = code
