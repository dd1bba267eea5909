"""TO WRITE."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_CONTROLS = {code: chr(0x2400 + code) for code in range(32)} | {9: "⇥", 10: "⏎", 127: "␡"}


def visible(text: str) -> str:
    """The text on one line: line ends, tabs and control characters as signs, so that none acts on the terminal."""
    return text.translate(_CONTROLS)


def count(number: float) -> str:
    """A count in at most four digits: 812, 9,400, 64.1k, 1.48M."""
    if number < 9999.5:
        return f"{number:,.0f}"
    rounded = float(f"{number:.3g}")
    power, name = next((power, name) for power, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if rounded >= power)
    return _three_digits(rounded / power) + name


def _three_digits(number: float) -> str:
    return f"{number:.3g}" if number < 999.5 else f"{number:,.0f}"


def rate(operations_per_second: float) -> str:
    """Floating-point operations per second with their unit."""
    unit, name = (1e12, "TFLOP/s") if operations_per_second >= 1e12 else (1e9, "GFLOP/s")
    return f"{_three_digits(operations_per_second / unit)} {name}"


def size(number: float) -> str:
    """Bytes in powers of ten."""
    for power, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= power:
            return f"{_three_digits(number / power)} {name}"
    return f"{number:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds as people say them, in two units at most; "?" where they aren't known."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(seconds / 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min" if minutes else f"{hours} h"


def number(metrics: Mapping[str, object], name: str) -> float:
    """A number of a log line; NaN where the line has none."""
    value = metrics.get(name)
    return float(value) if isinstance(value, int | float) else float("nan")


def sparkline(values: Sequence[float], width: int) -> str:
    """The last values as small bars, the largest of them full."""
    last = [value for value in values if value == value][-width:]
    if len(last) < 2:
        return ""
    low, high = min(last), max(last)
    span = (high - low) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[round((value - low) / span * 7)] for value in last)
