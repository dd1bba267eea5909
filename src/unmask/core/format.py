"""Numbers, sizes, durations, lists, bars and addresses as text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Final

HIDDEN: Final = "***"  # stands for user, password or token of an address
_ADDRESS: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]{0,15}://[^\s\"<>`]*[^\s'\"<>`:;,.)]")
_HARMLESS: Final = frozenset({"versionid", "generation", "revision", "download", "dl", "raw"})  # keys of a query
# Control characters of eight bits also begin commands to a terminal, and bidirectional ones change the order of a line.
_CONTROLS: Final[Mapping[int, str]] = (
    {code: chr(0x2400 + code) for code in range(32)}
    | dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")
    | {9: "⇥", 10: "⏎", 127: "␡", 0x2028: "⏎", 0x2029: "⏎"}
)


def visible(text: str) -> str:
    """Return the text on one line; line ends, tabs, control and bidirectional characters become visible symbols."""
    return text.translate(_CONTROLS)


def count(number: float) -> str:
    """Return a count in at most four digits: 812, 9,400, 64.1k, 1.48M."""
    if number < 9999.5:
        return f"{number:,.0f}"
    rounded = float(f"{number:.3g}")
    power, name = next((power, name) for power, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if rounded >= power)
    return _three_digits(rounded / power) + name


def _three_digits(number: float) -> str:
    return f"{number:.3g}" if number < 999.5 else f"{number:,.0f}"


def rate(operations_per_second: float) -> str:
    """Return FLOP/s with a unit."""
    unit, name = (1e12, "TFLOP/s") if operations_per_second >= 1e12 else (1e9, "GFLOP/s")
    return f"{_three_digits(operations_per_second / unit)} {name}"


def size(number: float) -> str:
    """Return a number of bytes with a unit, in powers of ten."""
    for power, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= power:
            return f"{_three_digits(number / power)} {name}"
    return f"{number:.0f} bytes"


def duration(seconds: float) -> str:
    """Return a duration in at most two units; "?" if it is not finite."""
    if not math.isfinite(seconds):
        return "?"
    rounded = round(seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60} s" if rounded % 60 else f"{rounded // 60} min"
    minutes = round(seconds / 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min" if minutes else f"{hours} h"


def number(metrics: Mapping[str, object], name: str) -> float:
    """Return a number of a log line; NaN if the line has none."""
    value = metrics.get(name)
    return float(value) if isinstance(value, int | float) else float("nan")


def join_names(names: Sequence[str], limit: int = 3) -> str:
    """Join the first names for a message: "a, b and 3 more"; the last two by "and" where all are shown."""
    shown, more = list(names[:limit]), len(names) - limit
    if more > 0:
        return f"{', '.join(shown)} and {more:,} more"
    return ", ".join(shown[:-1]) + f" and {shown[-1]}" if len(shown) > 1 else "".join(shown)


def bar(fraction: float, width: int) -> str:
    """Return a horizontal bar of at most `width` characters, to an eighth of a character."""
    eighths = round(max(0.0, min(1.0, fraction)) * width * 8)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def sparkline(values: Sequence[float], width: int) -> str:
    """Return the last values as small bars; the largest one has full height."""
    last = [value for value in values if value == value][-width:]
    if len(last) < 2:
        return ""
    low, high = min(last), max(last)
    span = (high - low) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[round((value - low) / span * 7)] for value in last)


def masked(text: str) -> str:
    """Return a text with *** for user, password and tokens of all addresses in it."""
    return _ADDRESS.sub(lambda match: _masked_address(match[0]), text)


def _masked_address(address: str) -> str:
    scheme, _, rest = address.partition("://")
    host = re.split("[/?#]", rest, maxsplit=1)[0]
    if "@" not in host and ":" in host and not re.search(r"(:\d*|\])$", host):
        host = rest  # no port follows the colon, so it is a password with one of these characters
    start = ""
    if "@" in host:
        start = f"{HIDDEN}@"
        rest = rest[host.rindex("@") + 1 :]
    is_web = scheme.lower() in ("http", "https")
    rest, hash_mark, fragment = rest.partition("#")
    rest, mark, query = rest.partition("?")
    if mark and ("=" in query or is_web):  # elsewhere, ? is a part of a pattern
        query = "&".join(_masked_parameter(parameter) for parameter in query.split("&"))
    if fragment and ("=" in fragment or is_web):  # elsewhere, # is a part of a name
        fragment = HIDDEN
    return f"{scheme}://{start}{rest}{mark}{query}{hash_mark}{fragment}"


def _masked_parameter(parameter: str) -> str:
    key, equals, _ = parameter.partition("=")
    if not equals:
        return HIDDEN if parameter else ""
    return parameter if key.lower() in _HARMLESS else f"{key}={HIDDEN}"
