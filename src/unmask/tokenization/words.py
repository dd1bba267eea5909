"""Finds where words and sentences start in a text, for each rule of `data.words`.

Two rules need no dictionary:

- spaces: a run of letters, marks and numbers is a word. Every other visible character is a separate word.
- characters: every visible character is a word.

Two rules segment runs that contain Han or kana with a dictionary. Other text is split as under "spaces". Both rules are
optional extras and work offline:

- jieba: Chinese, with `rjieba`, jieba's dictionary and model in Rust (6 M characters/s; jieba itself 0.5 M).
- sudachi: Japanese, with `sudachipy` and `sudachidict-small`, in its shortest units ("A": 国家|公務|員, 読み|まし|た).
  These are closest to the units that Japanese BERTs mask (UniDic's short units). 0.24 M characters/s.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module, metadata
from typing import Any, Final, Literal, cast

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from unmask.core.errors import RecipeError

Segmenter = Literal["jieba", "sudachi"]
WordsRule = Literal["spaces", "characters", "jieba", "sudachi"]

_SPACE, _LETTER, _APART, _MARK = 1, 2, 3, 4  # 0: not looked up yet
_UNSPACED: Final = (  # Han, Hiragana, Katakana: first and last code point of their blocks
    (0x3040, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),
    (0x20000, 0x323AF),
)
_WIDE: Final = "".join(f"{chr(first)}-{chr(last)}" for first, last in (*_UNSPACED, (0x3000, 0x303F), (0xFF00, 0xFF60)))
_FALSE_SPACE: Final = re.compile(f"(?<=[{_WIDE}]) (?! )|(?<! ) (?=[{_WIDE}])")
_UNSPACED_SHARE: Final = 0.30


def codes(text: str) -> NDArray[np.uint32]:
    """Return the code point of each character; a lone surrogate becomes a question mark."""
    return np.frombuffer(text.encode("utf-32-le", errors="replace"), dtype=np.uint32)


def is_letter(character: str) -> bool:
    """Return whether a character belongs to a run that is one word under "spaces": a letter or a number."""
    return _kind(ord(character)) == _LETTER


def is_spaced_letter(character: str) -> bool:
    """Return whether a character is a letter, mark or number of a script with spaces: not Han, Hiragana or Katakana."""
    return _kind(ord(character)) in (_LETTER, _MARK) and not any(
        first <= ord(character) <= last for first, last in _UNSPACED
    )


def without_false_spaces(text: str) -> str:
    """Remove single spaces beside Han, kana and full-width signs: a WordPiece decoder writes them between all words."""
    return _FALSE_SPACE.sub("", text)


def _kind(code: int) -> int:
    character = chr(code)
    category = unicodedata.category(character)
    if character.isspace() or category in ("Zs", "Zl", "Zp", "Cc"):
        return _SPACE
    if category[0] == "M" or category == "Cf":
        return _MARK
    return _APART if category[0] in "PS" else _LETTER


class CharacterKinds:
    """A lookup table from code points to kinds, filled on first use, so that importing it costs nothing."""

    def __init__(self, kind_of: Callable[[int], int]) -> None:
        """Create an empty table; `kind_of` returns the kind of a code point, at least 1."""
        self._kind_of = kind_of
        self._table: NDArray[np.uint8] = np.zeros(0x110000, dtype=np.uint8)

    def __call__(self, code_points: NDArray[np.uint32]) -> NDArray[np.uint8]:
        """Return the kind of each code point."""
        kinds = self._table[code_points]
        if not kinds.all():
            for code in np.unique(code_points[kinds == 0]).tolist():
                self._table[code] = self._kind_of(code)
            kinds = self._table[code_points]
        return kinds


_kinds = CharacterKinds(_kind)


def white_space(text: str) -> Bool[np.ndarray, "N"]:
    """Return whether each character is white space or a control character, and so belongs to no word."""
    return _kinds(codes(text)) == _SPACE


def word_starts(text: str, rule: WordsRule) -> Bool[np.ndarray, "N"]:
    """Return whether a word starts at each character of the text."""
    kinds = _kinds(codes(text))
    marks = kinds == _MARK
    if marks.any():
        # A combining mark takes the kind of its base character. On white space or nothing it counts as a letter.
        base = np.maximum.accumulate(np.where(marks, -1, np.arange(len(kinds))))
        base_kinds = np.where(base < 0, _SPACE, kinds[base])
        effective = np.where(marks & (base_kinds == _SPACE), _LETTER, base_kinds)
        alone = marks & (base_kinds == _SPACE)
        alone[1:] &= ~marks[:-1]
    else:
        effective, alone = kinds, marks
    if rule == "characters":
        return ((kinds != _SPACE) & ~marks) | alone
    letters = effective == _LETTER
    starts = letters & ~marks
    starts[1:] &= ~letters[:-1]
    if rule != "spaces":
        starts |= _dictionary_starts(text, rule, letters) & ~marks
    return starts | (kinds == _APART) | alone


def detect_words(sample: str) -> WordsRule:
    """Return the rule for the script of a text: "characters" if over 30 % of it is Han, Hiragana or Katakana."""
    code_points = codes(sample)
    code_points = code_points[_kinds(code_points) != _SPACE]
    unspaced = sum(int(((code_points >= first) & (code_points <= last)).sum()) for first, last in _UNSPACED)
    return "characters" if unspaced > _UNSPACED_SHARE * len(code_points) else "spaces"


def describe_words(rule: WordsRule) -> str:
    """Return what a word is under a rule, for display."""
    if rule == "characters":
        return "each character"
    by_spaces = "runs between spaces, punctuation apart"
    return by_spaces if rule == "spaces" else f"{by_spaces}, Han and kana by {version(rule)}"


# ---- Sentences

CLOSERS: Final = "\"'”’»)]}」』）】"  # may appear between the end of a sentence and the white space
STOPS: Final = ".!?…"  # end a sentence before white space
FULL_STOPS: Final = "。！？｡"  # end a sentence anywhere
KOREAN_ENDINGS: Final = "다요죠까"
_CLOSERS: Final = re.escape(CLOSERS)
# The first set lets the regex engine skip to the candidates: 14 ns a character instead of 46.
_SENTENCE_ENDS = re.compile(
    rf"""[{STOPS}{FULL_STOPS}\n](?:
        (?<=[{STOPS}])(?P<more_stops>[{STOPS}]*)[{_CLOSERS}]*\s+
    |   (?<=[{FULL_STOPS}])[{FULL_STOPS}]*[{_CLOSERS}]*\s*
    |   (?<=[가-힣][{KOREAN_ENDINGS}][.!?])[.!?]*(?=[가-힣])
    |   (?<=\n)\s*
    )""",
    re.VERBOSE,
)
_LETTERS: Final = "A-Za-zÀ-ÖØ-öø-ɏͰ-ϿЀ-ӿ"  # of scripts that have initials: Latin, Greek, Cyrillic
_ABBREVIATIONS: Final = (
    "Mr Mrs Ms Dr Prof St Mt Gen Col Maj Capt Lt Cmdr Sgt Rev Hon Gov Sen Rep Pres Jr Sr Inc Ltd Co Corp Bros Univ "
    "Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec vs etc cf al ca approx resp ie eg esp"
)
_BEFORE_NUMBERS: Final = "No no Nos nos Vol vol Vols vols p pp Fig fig Figs figs Art art Sec sec Ch ch Eq eq Op op"
_ABBREVIATED = re.compile(
    rf"""(?<![{_LETTERS}\d])(?:
        (?:[{_LETTERS}]\.)+[{_LETTERS}]
    |   (?!I)[A-ZÀ-ÖØ-ÞΑ-ΩЀ-Я]
    |   {_ABBREVIATIONS.replace(" ", "|")}
    |   (?P<number>{_BEFORE_NUMBERS.replace(" ", "|")})
    )\Z
    |   (?:\A|(?<=\n))\d{{1,3}}\Z""",
    re.VERBOSE,
)
_LONGEST_ABBREVIATION: Final = 16  # characters; only this many before a stop are checked
Stop = Literal["end", "end unless a number follows", "no end"]


def classify_stop(text: str, at: int) -> Stop:
    """Return whether the "." at this index ends a sentence if white space follows it, possibly after closing marks."""
    if at and text[at - 1] in STOPS:  # one of several stops
        return "end"
    match = _ABBREVIATED.search(text, max(0, at - _LONGEST_ABBREVIATION), at)
    if match is None:
        return "end"
    return "no end" if match["number"] is None else "end unless a number follows"


def sentence_starts(text: str) -> Bool[np.ndarray, "N"]:
    """Return whether a sentence starts at each character of the text."""
    starts = np.zeros(len(text), dtype=bool)
    first = len(text) - len(text.lstrip())
    ends = [first]
    for match in _SENTENCE_ENDS.finditer(text, first):
        end = match.end()
        if match["more_stops"] == "" and text[match.start()] == "." and "\n" not in match[0]:
            stop = classify_stop(text, match.start())
            if stop == "no end" or (stop != "end" and text[end : end + 1].isdecimal()):
                continue
        ends.append(end)
    indices = np.array(ends, dtype=np.int64)
    starts[indices[indices < len(text)]] = True
    return starts


# ---- Segmenters

_PACKAGES: Final[Mapping[Segmenter, tuple[str, ...]]] = {
    "jieba": ("rjieba",),
    "sudachi": ("sudachipy", "sudachidict-small"),
}
_EXTRAS: Final[Mapping[Segmenter, str]] = {"jieba": "chinese", "sudachi": "japanese"}
_MAX_CHARACTERS: Final = 4096  # per call: sudachi accepts 49,149 bytes, and no sentence is as long as this


def version(rule: str) -> str:
    """Return the names and versions of the packages that a rule depends on; empty for "spaces" and "characters".

    Raises:
        RecipeError: a package is not installed.
    """
    for segmenter, packages in _PACKAGES.items():
        if rule == segmenter:
            try:
                return " ".join(f"{name}-{metadata.version(name)}" for name in packages)
            except metadata.PackageNotFoundError as error:
                raise _not_installed(segmenter) from error
    return ""


def word_lengths(segmenter: Segmenter, letters: str) -> list[int]:
    """Return the number of characters of each word in a run of letters.

    Raises:
        RecipeError: the segmenter is not installed.
    """
    segment = _load_segmenter(segmenter)
    if len(letters) <= _MAX_CHARACTERS:
        return segment(letters)
    return [
        size for at in range(0, len(letters), _MAX_CHARACTERS) for size in segment(letters[at : at + _MAX_CHARACTERS])
    ]


def _dictionary_starts(text: str, segmenter: Segmenter, letters: Bool[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
    """Return where a segmenter starts words: only in runs of letters, next to Han or kana."""
    code_points = codes(text)
    unspaced = np.zeros(len(code_points), dtype=bool)
    for first, last in _UNSPACED:
        unspaced |= (code_points >= first) & (code_points <= last)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], letters, [False]]).view(np.int8)))
    counts = np.concatenate([[0], np.cumsum(unspaced & letters)])
    has_unspaced = counts[edges[1::2]] > counts[edges[::2]]
    plain = code_points.tobytes().decode("utf-32-le")  # the same text with a question mark for each lone surrogate
    starts = np.zeros(len(code_points) + 1, dtype=bool)
    for first, end in zip(edges[::2][has_unspaced].tolist(), edges[1::2][has_unspaced].tolist(), strict=True):
        at = first
        for length in word_lengths(segmenter, plain[first:end]):
            starts[at] = True
            at += length
        assert at == end, f"{segmenter} dropped letters of {plain[first:end]!r}"
    starts = starts[:-1]
    starts[1:] &= unspaced[1:] | unspaced[:-1]
    return starts & letters


@cache
def _load_segmenter(segmenter: Segmenter) -> Callable[[str], list[int]]:
    """Load a segmenter and its dictionary, once per process."""
    try:
        return _load_jieba() if segmenter == "jieba" else _load_sudachi()
    except ImportError as error:
        raise _not_installed(segmenter) from error


def _load_jieba() -> Callable[[str], list[int]]:
    cut = cast("Callable[[str], list[str]]", import_module("rjieba").cut)
    return lambda letters: list(map(len, cut(letters)))


def _load_sudachi() -> Callable[[str], list[int]]:
    sudachipy = import_module("sudachipy")
    import_module("sudachidict_small")  # without this, a missing package shows as a missing file
    tokenize: Any = sudachipy.Dictionary(dict="small").tokenizer(mode=sudachipy.SplitMode.A).tokenize
    return lambda letters: [morpheme.end() - morpheme.begin() for morpheme in tokenize(letters)]


def _not_installed(segmenter: Segmenter) -> RecipeError:
    return RecipeError(
        f'`data.words = "{segmenter}"` needs {" and ".join(_PACKAGES[segmenter])}, which is not installed',
        hint=f'pip install "unmask[{_EXTRAS[segmenter]}]", or choose data.words = "characters"',
    )
