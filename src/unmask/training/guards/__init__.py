"""Guards of a run: jumps of the loss, a disk that becomes full, and the return to an earlier checkpoint."""

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

from unmask.core import files
from unmask.core.errors import StoreError
from unmask.core.files import RunLayout
from unmask.core.format import size
from unmask.training.loop import IsDue
from unmask.training.plan import Plan

ROLLBACK_LR_FACTOR: Final = 0.5  # on the learning rates, after each return to an earlier checkpoint

# Jumps of the loss ----------------------------------------------------------------------------------------------------

_WINDOW: Final = 20  # log lines
_MIN_LINES: Final = 8  # before the first warning: at the start and after a border of stages, the loss falls quickly
_DEVIATIONS: Final = 6.0
_NORMAL: Final = 1.4826  # standard deviation of a normal distribution / its median absolute deviation
# As in `unmask doctor`: nats by which the loss of a healthy run never jumps, and the standard deviation of the loss of
# single tokens, which makes lines of few tokens noisy.
_MIN_JUMP: Final = 0.5
_LOSS_SPREAD: Final = 2.5


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
            limit = max(_MIN_JUMP, _DEVIATIONS * spread, _DEVIATIONS * _LOSS_SPREAD / math.sqrt(masked))
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


# Going back -----------------------------------------------------------------------------------------------------------


def earlier_step(run: Path, step: int, is_due: IsDue) -> int:
    """Returns the number of the last checkpoint before a step; 0 if there is none.

    Checkpoints at the interval of the run come first. Those that a signal left are at any step, and a run that was
    stopped and resumed should go back to the same step as one that was not.
    """
    earlier = [number for number, _ in _checkpoints(run) if number < step]
    return max([number for number in earlier if is_due(number, math.inf)] or earlier, default=0)


def outdated_checkpoints(run: Path, step: int, keep: int, is_due: IsDue) -> list[Path]:
    """Returns the folders of the checkpoints that are deleted when that of a step is complete.

    Of those at the interval of the run, to which it goes back, `keep` are kept. Those that a signal left are only for
    resuming: `keep` are kept until the next one at the interval, and longer only if there would be fewer than `keep`.
    """
    folders = dict(sorted(_checkpoints(run)))
    at_interval = [number for number in folders if is_due(number, math.inf)]
    others = [number for number in folders if number not in at_interval]
    kept = set(at_interval[-keep:])
    kept |= set(others[-keep:] if step in others else others[::-1][: max(keep - len(kept), 0)])
    return [folder for number, folder in folders.items() if number not in kept and number != step]


def make_latest(run: Path, step: int) -> None:
    """Points `latest` to the checkpoint of a step, and then deletes those of later steps.

    A kill between the two leaves checkpoints that the next call deletes.
    """
    for number, folder in _checkpoints(run):
        if number == step:
            files.write_pointer(run / RunLayout.LATEST, folder.name)
    for number, folder in _checkpoints(run):
        if number > step:
            shutil.rmtree(folder, ignore_errors=True)


def recover_checkpoints(run: Path) -> None:
    """Restores a checkpoint that was being replaced when the run was killed. No other process may use the run."""
    for folder in replaced_checkpoints(run):
        files.recover(folder)


def replaced_checkpoints(run: Path) -> list[Path]:
    """Returns the checkpoints whose replacement was interrupted between two renames of `files.atomic_directory`."""
    numbers = [path.name.split(".")[1] for path in run.glob(".step-*.aside-old")]
    return [run / name for name in numbers if not (run / name).exists()]


def _checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Returns number and folder of each checkpoint of a run."""
    folders = [folder for folder in run.glob("step-*") if folder.name.removeprefix("step-").isdecimal()]
    return [(int(folder.name.removeprefix("step-")), folder) for folder in folders if folder.is_dir()]
