"""Times several kinds of work in turns, so that a change of the machine's speed affects all of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

Work = Callable[[float], list[float]]
"""Repeats some work for about the given seconds, at least once; returns the seconds per unit of each repetition."""

ROUNDS: Final = 5
_MIN_ROUNDS: Final = 3
_MAX_OVERRUN: Final = 2.0  # times the given seconds, after which slow work gets fewer rounds


@dataclass(frozen=True)
class Rounds:
    """Median seconds per unit of each kind of work, one entry per round."""

    seconds: Mapping[str, tuple[float, ...]]

    def rate(self, name: str) -> float:
        """Return the median of the units per second."""
        return 1.0 / median(self.seconds[name])

    def ratios(self, name: str, other: str) -> list[float]:
        """Return how many times as fast `name` is as `other`, one entry per round, in ascending order."""
        return sorted(b / a for a, b in zip(self.seconds[name], self.seconds[other], strict=True))


def in_turns(work: Mapping[str, Work], seconds: float) -> Rounds:
    """Run each work for about `seconds`, divided into rounds: A B A B and so on, after one repetition of each.

    Args:
        work: work by name, in the order of a round.
        seconds: time for each work. Work whose repetitions take longer is repeated once in at least three rounds.
    """
    for run in work.values():
        run(0.0)
    taken: dict[str, list[float]] = {name: [] for name in work}
    begin = time.perf_counter()
    for number in range(ROUNDS):
        if number >= _MIN_ROUNDS and time.perf_counter() - begin > _MAX_OVERRUN * seconds * len(work):
            break
        for name, run in work.items():
            taken[name].append(median(run(seconds / ROUNDS)))
    return Rounds({name: tuple(entries) for name, entries in taken.items()})


def repeated(work: Callable[[], object], units: float = 1.0) -> Work:
    """Return the `Work` that calls a function, which processes `units` units per call."""

    def run(seconds: float) -> list[float]:
        times: list[float] = []
        begin = last = time.perf_counter()
        while not times or last - begin < seconds:
            work()
            now = time.perf_counter()
            times.append((now - last) / units)
            last = now
        return times

    return run


class OtherProcesses:
    """Measures how many cores other processes use, on Linux; elsewhere the result is None."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._busy, self._own = _busy_seconds(), sum(os.times()[:4])

    def cores_used(self) -> float | None:
        """Return the mean number of cores that other processes have used since this object was created."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        other = (busy - self._busy) - (sum(os.times()[:4]) - self._own)
        return max(0.0, other / (time.perf_counter() - self._begin))


def _busy_seconds() -> float | None:
    """Return the seconds that the cores of this process have been busy since the machine was started."""
    statistics = Path("/proc/stat")
    if not statistics.is_file() or not hasattr(os, "sched_getaffinity"):
        return None
    names = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = [line.split() for line in statistics.read_text(encoding="ascii").splitlines()]
    # user nice system idle iowait irq softirq steal: all but idle and iowait; steal is time of other virtual machines.
    ticks = [[int(field) for field in line[1:9]] for line in lines if line and line[0] in names]
    if not ticks:
        return None
    return sum(sum(line) - line[3] - line[4] for line in ticks) / os.sysconf("SC_CLK_TCK")
