"""Numbers with a unit: fractions such as "60%" and quantities such as "64k tokens".

The suffixes k, M and B are powers of ten. Minutes and hours are converted to seconds.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Self

from unmask.core.errors import RecipeError

_NUMBER = r"[0-9][0-9_]*(?:\.[0-9][0-9_]*)?(?:[eE][+-]?[0-9]+)?"
_FRACTION = re.compile(rf"\s*({_NUMBER})\s*%\s*")
_QUANTITY = re.compile(rf"\s*(\+?)\s*({_NUMBER})\s*([kMB](?![A-Za-z]))?\s*([A-Za-z]*)\s*")
_POWERS = {"k": 3, "M": 6, "B": 9}
_SECONDS = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1),
    **dict.fromkeys(("min", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hour", "hours"), 3600),
}
_COUNTABLE_UNITS = ("steps", "tokens", "epochs", "texts", "characters", "words")
_UNITS = dict.fromkeys(_SECONDS, "seconds") | {
    form: unit for unit in _COUNTABLE_UNITS for form in (unit, unit.removesuffix("s"))
}
UNIT_EXAMPLES = "300 s, 120 steps, 2M tokens or 3 epochs"


def closest_match(word: str, known: Iterable[str]) -> str:
    """Return the known word that is most similar to `word`, or "" if none is close."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), "")


def _plain(number: Decimal) -> str:
    """Return a decimal number without exponent and trailing zeros."""
    return format(number.normalize(), "f")


def _exact(number: float) -> Decimal:
    """Return the shortest decimal number that converts back to the same float."""
    return Decimal(repr(number))


@dataclass(frozen=True)
class Fraction:
    """A part of a whole, written in percent: "60%"."""

    fraction: float

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise RecipeError(
                f"invalid fraction: got {self.fraction:.6%}, expected 0% to 100%",
                hint='write a percentage such as "10%"',
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse "60%".

        Raises:
            RecipeError: the text is not a percentage from 0 to 100.
        """
        match = _FRACTION.fullmatch(text)
        if not match:
            raise RecipeError(f"`{text}` is not a percentage", hint='write a percentage such as "10%"')
        number = Decimal(match[1])
        if number > 100:
            raise RecipeError(
                f"invalid fraction: got {text.strip()}, expected 0% to 100%", hint='write a percentage such as "10%"'
            )
        return cls(float(number / 100))

    def __str__(self) -> str:
        return f"{_plain(_exact(self.fraction) * 100)}%"


@dataclass(frozen=True)
class Quantity:
    """A number with a unit."""

    number: float
    unit: str  # seconds, steps, tokens, epochs, texts, characters or words
    relative: bool = False  # in addition to what a run has done: "+1 epoch"

    def __post_init__(self) -> None:
        assert self.unit == "seconds" or self.unit in _COUNTABLE_UNITS, (
            f"units are canonical plurals, not {self.unit!r}"
        )
        assert self.number >= 0 and math.isfinite(self.number), f"a quantity is finite and not negative: {self.number}"

    @classmethod
    def parse(cls, text: str, *, relative: bool = False) -> Self:
        """Parse "300 s", "1.5 epochs", "64k tokens" or "2 h"; with `relative` also "+1 epoch".

        Raises:
            RecipeError: the number or the unit is missing, the unit is unknown, or a plus is not allowed.
        """
        match = _QUANTITY.fullmatch(text)
        if not match:
            raise RecipeError(f"`{text}` is not a quantity", hint=f"write a number and a unit: {UNIT_EXAMPLES}")
        plus, digits, power, word = match.groups()
        if not word:
            raise RecipeError(f"`{text.strip()}` needs a unit: {UNIT_EXAMPLES}", hint="add a unit")
        unit = _UNITS.get(word.lower())
        if unit is None:
            near = closest_match(word.lower(), _UNITS)
            known = (
                f"use one of s, min, h, {', '.join(_COUNTABLE_UNITS)}; k, M and B go before the unit, as in 2M tokens"
            )
            raise RecipeError(f"unknown unit `{word}`" + (f": did you mean `{near}`?" if near else ""), hint=known)
        if plus and not relative:
            raise RecipeError(f"`{text.strip()}` has a plus, which is for --resume only", hint="remove the plus")
        number = float(Decimal(digits) * 10 ** _POWERS.get(power or "", 0) * _SECONDS.get(word.lower(), 1))
        if not math.isfinite(number):
            raise RecipeError(f"`{text.strip()}` is too large", hint="use a smaller number")
        return cls(number, unit, bool(plus))

    def require(self, *units: str) -> Self:
        """Return this quantity if its unit is one of `units`.

        Raises:
            RecipeError: it has another unit.
        """
        if self.unit not in units:
            raise RecipeError(
                f"`{self}` is not a number of {' or '.join(units)}", hint=f"give a number of {' or '.join(units)}"
            )
        return self

    def __str__(self) -> str:
        number, unit = _exact(self.number), self.unit
        if unit == "seconds":
            # Whole hours, whole minutes from 10 min on, otherwise seconds: "300 s", "10 min", "2 h". The remainder of
            # a float is exact; so is the quotient of a number that fits into the 28 digits of Decimal.
            divisors = {size for size in (3600, 60) if 0 < self.number < 1e18 and self.number % size == 0}
            unit = "h" if 3600 in divisors else "min" if 60 in divisors and self.number >= 600 else "s"
            text = _plain(number / _SECONDS[unit])
        else:
            forms = [_plain(number), *(_plain(number.scaleb(-power)) + name for name, power in _POWERS.items())]
            text = min(forms, key=len)
            unit = unit.removesuffix("s") if text == "1" else unit
        return f"{'+' * self.relative}{text} {unit}"
