"""Room card: words of Chinese and Japanese, by a dictionary.

Comes in: stretches of letters and the name of a segmenter. Goes out: how long each word is; which versions that depends
on. Called by: words; corpus and origin, which keep the versions.

- jieba: Chinese. `rjieba`, jieba's dictionary and model in Rust (6 M characters/s; jieba itself 0.5 M).
- sudachi: Japanese. `sudachipy` with `sudachidict-small`, its shortest units ("A": 国家|公務|員, 読み|まし|た), which
  are nearest to those that Japanese BERTs were masked by (UniDic's short units); 0.24 M characters/s.

Both are extras: nothing else needs them, and both work without a network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module, metadata
from typing import Any, Final, Literal, cast

from unmask.errors import RecipeError

Segmenter = Literal["jieba", "sudachi"]

_PACKAGES: Final[Mapping[Segmenter, tuple[str, ...]]] = {
    "jieba": ("rjieba",),
    "sudachi": ("sudachipy", "sudachidict-small"),
}
_EXTRAS: Final[Mapping[Segmenter, str]] = {"jieba": "chinese", "sudachi": "japanese"}
_LONGEST: Final = 4096  # characters cut at a time: sudachi takes 49,149 bytes, and no sentence is so long


def version(rule: str) -> str:
    """What the words of a rule depend on beside us; nothing, where it is no segmenter.

    Raises:
        RecipeError: it is not installed.
    """
    for segmenter, packages in _PACKAGES.items():
        if rule == segmenter:
            try:
                return " ".join(f"{name}-{metadata.version(name)}" for name in packages)
            except metadata.PackageNotFoundError as error:
                raise _missing(segmenter) from error
    return ""


def word_lengths(segmenter: Segmenter, letters: str) -> list[int]:
    """How many characters each word of a stretch of letters has.

    Raises:
        RecipeError: the segmenter is not installed.
    """
    cut = _opened(segmenter)
    if len(letters) <= _LONGEST:
        return cut(letters)
    return [size for at in range(0, len(letters), _LONGEST) for size in cut(letters[at : at + _LONGEST])]


@cache
def _opened(segmenter: Segmenter) -> Callable[[str], list[int]]:
    """The segmenter with its dictionary, opened once in a process."""
    try:
        return _jieba() if segmenter == "jieba" else _sudachi()
    except ImportError as error:
        raise _missing(segmenter) from error


def _jieba() -> Callable[[str], list[int]]:
    cut = cast("Callable[[str], list[str]]", import_module("rjieba").cut)
    return lambda letters: list(map(len, cut(letters)))


def _sudachi() -> Callable[[str], list[int]]:
    sudachipy = import_module("sudachipy")
    import_module("sudachidict_small")  # else its absence shows as a file that isn't there
    tokenize: Any = sudachipy.Dictionary(dict="small").tokenizer(mode=sudachipy.SplitMode.A).tokenize
    return lambda letters: [morpheme.end() - morpheme.begin() for morpheme in tokenize(letters)]


def _missing(segmenter: Segmenter) -> RecipeError:
    return RecipeError(
        f'`text.words = "{segmenter}"` needs {" and ".join(_PACKAGES[segmenter])}, which is not installed',
        next=f'pip install "unmask[{_EXTRAS[segmenter]}]", or choose text.words = "characters"',
    )
