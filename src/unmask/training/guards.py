"""Guards of a run: jumps of the loss, and a disk that becomes full."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, Final

from safetensors import SafetensorError

from unmask.core.errors import StoreError
from unmask.core.format import size
from unmask.training.plan import Plan

ROLLBACK_LR_FACTOR: Final = 0.5  # on the learning rates, after each return to an earlier checkpoint

# Jumps of the loss ----------------------------------------------------------------------------------------------------

_WINDOW: Final = 20  # log lines
_MIN_LINES: Final = 8  # before the first warning: at the start and after a border of stages, the loss falls quickly
_DEVIATIONS: Final = 6.0
_NORMAL: Final = 1.4826  # standard deviation of a normal distribution / its median absolute deviation
MIN_JUMP: Final = 0.5  # nats; between two log lines, the loss of a healthy run moves by hundredths
_LOSS_SPREAD: Final = 2.5  # nats; standard deviation of the loss of single tokens: lines of few tokens are noisy


def smallest_jump(masked_tokens: float) -> float:
    """Returns by how many nats the loss of a log line of so many masked tokens must rise to be more than noise."""
    return max(MIN_JUMP, _DEVIATIONS * _LOSS_SPREAD / math.sqrt(masked_tokens))


class LossSpikes:
    """Finds log lines whose loss lies far above that of the lines before, in the same stage."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._stage, self._in_spike = -1, False

    def add(self, line: Mapping[str, Any]) -> float:
        """Adds a line of the log; returns by how many nats it exceeds the median before, if a spike begins, else 0.

        A spike ends with the first line that is not far above the median. Lines of validations are ignored.
        """
        loss, masked = line.get("loss"), line.get("masked_tokens")
        if not isinstance(loss, int | float) or not math.isfinite(loss) or not masked:
            return 0.0
        stage = self._plan.stage_at(max(int(line["step"]) - 1, 0))
        if stage != self._stage:  # other lengths or another objective: another level of the loss
            self._losses.clear()
            self._stage, self._in_spike = stage, False
        rise, limit = 0.0, math.inf
        if len(self._losses) >= _MIN_LINES:
            middle = median(self._losses)
            spread = _NORMAL * median(abs(each - middle) for each in self._losses)
            limit = max(_DEVIATIONS * spread, smallest_jump(masked))
            rise = loss - middle
        begins, self._in_spike = rise > limit and not self._in_spike, rise > limit
        self._losses.append(loss)
        return round(rise, 4) if begins else 0.0


# Disk -----------------------------------------------------------------------------------------------------------------

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHECKPOINTS_AHEAD: Final = 2


def is_disk_full(error: StoreError) -> bool:
    """Returns whether a file could not be written because the disk, a quota or a limit of file sizes is used up."""
    cause = error.__cause__
    if isinstance(cause, SafetensorError):  # it has the message of the system only
        return any(os.strerror(number) in str(cause) for number in _FULL)
    return isinstance(cause, OSError) and cause.errno in _FULL


class DiskWatch:
    """Compares the free space of a run's disk with the size of its next checkpoints."""

    def __init__(self, run: Path, checkpoint_bytes: int) -> None:
        """`checkpoint_bytes` is an estimate, which holds until the first checkpoint is measured."""
        self._run, self._checkpoint_bytes = run, checkpoint_bytes
        self._is_low = False

    def measure(self, checkpoint: Path) -> None:
        """Takes the size of a checkpoint for that of the next ones."""
        self._checkpoint_bytes = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())

    def warning(self) -> str:
        """Returns a warning if two checkpoints don't fit; an empty string if they do, or if it was warned already.

        It is returned again after the space had sufficed meanwhile.
        """
        try:
            free = shutil.disk_usage(self._run).free
        except OSError:  # the next save says what is wrong
            return ""
        needed = _CHECKPOINTS_AHEAD * self._checkpoint_bytes
        was_low, self._is_low = self._is_low, free < needed
        if was_low or not self._is_low:
            return ""
        return (
            f"disk space is getting low: {size(free)} are free at {self._run}, and the next {_CHECKPOINTS_AHEAD} "
            f"checkpoints need {size(needed)}; free disk space"
        )
