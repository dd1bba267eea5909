"""Room card: shares and amounts, the numbers of a recipe that carry a unit.

Comes in: text, "60%" or "64k tokens". Goes out: a Share or an Amount, and the text again. k, M and B are powers of ten;
seconds, minutes and hours all become seconds. Called by: recipe, which hands them on to every room with settings.
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
_SHARE = re.compile(rf"\s*({_NUMBER})\s*%\s*")
_AMOUNT = re.compile(rf"\s*(\+?)\s*({_NUMBER})\s*([kMB](?![A-Za-z]))?\s*([A-Za-z]*)\s*")
_POWERS = {"k": 3, "M": 6, "B": 9}
_SECONDS = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1),
    **dict.fromkeys(("min", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hour", "hours"), 3600),
}
_COUNTED = ("steps", "tokens", "epochs", "texts", "characters")
_UNITS = dict.fromkeys(_SECONDS, "seconds") | {
    form: unit for unit in _COUNTED for form in (unit, unit.removesuffix("s"))
}
UNIT_EXAMPLES = "300 s, 120 steps, 2M tokens or 3 epochs"


def closest_match(word: str, known: Iterable[str]) -> str:
    """The known word most like `word`, or an empty string where none is near."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), "")


def _plain(number: Decimal) -> str:
    """A decimal number in full, without an exponent or zeros that say nothing."""
    return format(number.normalize(), "f")


def _exact(number: float) -> Decimal:
    """The shortest decimal number that stands for this float, so that what is printed reads back as the same float."""
    return Decimal(repr(number))


@dataclass(frozen=True)
class Fraction:
    """A part of a whole, written in per cent: "60%"."""

    fraction: float

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise RecipeError(f"a share lies between 0% and 100%, not {self.fraction:.6%}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "60%".

        Raises:
            RecipeError: it is not a number of per cent from 0 to 100.
        """
        match = _SHARE.fullmatch(text)
        if not match:
            raise RecipeError(f"`{text}` is not a share", hint='write a share in per cent: "60%"')
        number = Decimal(match[1])
        if number > 100:
            raise RecipeError(f"a share lies between 0% and 100%, not {text.strip()}")
        return cls(float(number / 100))

    def __str__(self) -> str:
        return f"{_plain(_exact(self.fraction) * 100)}%"


@dataclass(frozen=True)
class Quantity:
    """A number with its unit."""

    number: float
    unit: str  # seconds, steps, tokens, epochs, texts or characters
    relative: bool = False  # on top of what was done: "+1 epoch"

    def __post_init__(self) -> None:
        assert self.unit == "seconds" or self.unit in _COUNTED, f"units are canonical plurals, not {self.unit!r}"
        assert self.number >= 0 and math.isfinite(self.number), f"an amount is finite and not negative: {self.number}"

    @classmethod
    def parse(cls, text: str, *, relative: bool = False) -> Self:
        """Read "300 s", "1.5 epochs", "64k tokens", "2 h"; k, M and B are powers of ten; "+1 epoch" where `relative`.

        Raises:
            RecipeError: no number, no unit, a unit that is not known, or a plus where none has a meaning.
        """
        match = _AMOUNT.fullmatch(text)
        if not match:
            raise RecipeError(f"`{text}` is not an amount", hint=f"write a number and a unit: {UNIT_EXAMPLES}")
        plus, digits, power, word = match.groups()
        if not word:
            raise RecipeError(f"`{text.strip()}` needs a unit: {UNIT_EXAMPLES}", hint="add the unit that you mean")
        unit = _UNITS.get(word.lower())
        if unit is None:
            near = closest_match(word.lower(), _UNITS)
            known = f"the units are s, min, h, {', '.join(_COUNTED)}; k, M and B stand before one, as in 2M tokens"
            raise RecipeError(f"unknown unit `{word}`" + (f": did you mean `{near}`?" if near else ""), hint=known)
        if plus and not relative:
            raise RecipeError(
                f"`{text.strip()}` adds to something", hint="leave out the plus; it prolongs a run: --resume"
            )
        number = float(Decimal(digits) * 10 ** _POWERS.get(power or "", 0) * _SECONDS.get(word.lower(), 1))
        if not math.isfinite(number):
            raise RecipeError(f"`{text.strip()}` is too large to count", hint="write a smaller number")
        return cls(number, unit, bool(plus))

    def require(self, *units: str) -> Self:
        """This amount, where its unit is one of `units`.

        Raises:
            RecipeError: it is counted in something else.
        """
        if self.unit not in units:
            raise RecipeError(
                f"`{self}` is not an amount of {' or '.join(units)}", hint=f"count it in {' or '.join(units)}"
            )
        return self

    def __str__(self) -> str:
        number, unit = _exact(self.number), self.unit
        if unit == "seconds":
            # Whole hours and, from ten on, whole minutes: 300 s and 10 min are how people say it. A float's remainder
            # is exact, and so is the quotient of a number that Decimal's 28 digits can hold.
            whole = {size for size in (3600, 60) if 0 < self.number < 1e18 and self.number % size == 0}
            unit = "h" if 3600 in whole else "min" if 60 in whole and self.number >= 600 else "s"
            text = _plain(number / _SECONDS[unit])
        else:
            forms = [_plain(number), *(_plain(number.scaleb(-power)) + name for name, power in _POWERS.items())]
            text = min(forms, key=len)
            unit = unit.removesuffix("s") if text == "1" else unit
        return f"{'+' * self.relative}{text} {unit}"
