"""Helpers that all packages share: errors, range checks of configs, joined names and bars."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from unmask.core.config import require
from unmask.core.errors import RecipeError, TextError
from unmask.core.format import bar, join_names


def test_at_replaces_location_and_hint_and_keeps_the_class() -> None:
    error = TextError("no text", location="a.txt", hint="add text")
    assert str(error) == "no text\n  location: a.txt\n  hint: add text"
    moved = error.at(location="b.txt")
    assert type(moved) is TextError and (moved.message, moved.location, moved.hint) == ("no text", "b.txt", "add text")
    assert error.at(hint="").hint == "" and error.location == "a.txt"


@dataclass(frozen=True)
class Rates:
    lr: float = 0.5
    size: int = 3


@pytest.mark.parametrize(
    ("value", "bounds", "expected"),
    [
        (0.0, {"above": 0}, "above 0"),
        (-1.0, {"min": 0, "below": 1}, "at least 0 and below 1"),
        (1.0, {"min": 0, "below": 1}, "at least 0 and below 1"),
        (2.0, {"min": 0, "max": 1}, "at least 0 and at most 1"),
        (math.nan, {"above": 0}, "above 0"),
        (math.inf, {"above": 0, "below": math.inf}, "above 0 and finite"),
    ],
)
def test_a_value_outside_its_range_is_refused(value: float, bounds: dict[str, float], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        require(Rates(lr=value), "lr", **bounds)  # type: ignore[arg-type]
    assert caught.value.message == f"invalid lr: got {value}, expected {expected}"
    assert caught.value.location == "lr" and caught.value.hint == f"set lr to a number that is {expected}"


def test_a_value_inside_its_range_is_accepted() -> None:
    require(Rates(), "lr", "size", above=0)
    require(Rates(lr=0.0), "lr", min=0, below=1)
    require(Rates(lr=math.inf), "lr", above=0)


@pytest.mark.parametrize(
    ("names", "limit", "text"),
    [
        ([], 3, ""),
        (["a"], 3, "a"),
        (["a", "b"], 3, "a and b"),
        (["a", "b", "c"], 3, "a, b and c"),
        (["a", "b", "c", "d"], 3, "a, b, c and 1 more"),
        ([str(n) for n in range(2000)], 2, "0, 1 and 1,998 more"),
    ],
)
def test_names_are_joined_up_to_a_limit(names: list[str], limit: int, text: str) -> None:
    assert join_names(names, limit) == text


def test_a_bar_has_eighths_of_a_character() -> None:
    assert [bar(fraction, 4) for fraction in (0.0, 0.5, 1.0, 2.0)] == ["", "██", "████", "████"]
    assert bar(5 / 32, 4) == "▋" and bar(9 / 32, 4) == "█▏"
