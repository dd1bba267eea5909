"""Room card: words of Chinese and Japanese, by a dictionary.

Comes in: stretches of letters and the name of a segmenter. Goes out: how long each word is; which versions that depends
on. Called by: words; corpus and origin, which keep the versions.

- jieba: Chinese. `rjieba`, jieba's dictionary and model in Rust (6 M characters/s; jieba itself 0.5 M).
- sudachi: Japanese. `sudachipy` with `sudachidict-small`, its shortest units ("A": 国家|公務|員, 読み|まし|た), which
  are nearest to those that Japanese BERTs were masked by (UniDic's short units); 0.24 M characters/s.

Both are extras: nothing else needs them, and both work without a network.
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
        f'`data.words = "{segmenter}"` needs {" and ".join(_PACKAGES[segmenter])}, which is not installed',
        hint=f'pip install "unmask[{_EXTRAS[segmenter]}]", or choose data.words = "characters"',
    )


WordsRule = Literal["spaces", "characters", "jieba", "sudachi"]

_SPACE, _LETTER, _APART, _MARK = 1, 2, 3, 4  # 0: not looked up yet
CLOSERS: Final = "\"'”’»)]}」』）】"  # what may stand between the end of a sentence and the white space
STOPS: Final = ".!?…"  # end a sentence where white space follows
FULL_STOPS: Final = "。！？｡"  # end one whatever follows
KOREAN_ENDINGS: Final = "다요죠까"
_SENTENCE_ENDS = re.compile(
    rf"""(?P<stops>[{STOPS}]+)[{re.escape(CLOSERS)}]*\s+
    |   [{FULL_STOPS}]+[{re.escape(CLOSERS)}]*\s*
    |   (?<=[가-힣][{KOREAN_ENDINGS}])[.!?]+(?=[가-힣])
    |   \n\s*""",
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
_LONGEST_ABBREVIATION: Final = 16  # characters; of a longer run, its last letters tell
Stop = Literal["end", "end unless a number follows", "no end"]
_UNSPACED: Final = (  # Han, Hiragana, Katakana: first and last code point of their blocks
    (0x3040, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),
    (0x20000, 0x323AF),
)
_UNSPACED_SHARE: Final = 0.30


def codes(text: str) -> NDArray[np.uint32]:
    """The code point of each character; half a surrogate pair becomes that of a question mark."""
    return np.frombuffer(text.encode("utf-32-le", errors="replace"), dtype=np.uint32)


def is_letter(character: str) -> bool:
    """Whether this character is part of a run that is a word, by "spaces": a letter or a number."""
    return _kind(ord(character)) == _LETTER


def stands_without_spaces(character: str) -> bool:
    """Whether it is Han, Hiragana or Katakana, which are written without spaces between words."""
    return any(first <= ord(character) <= last for first, last in _UNSPACED)


def _kind(code: int) -> int:
    character = chr(code)
    category = unicodedata.category(character)
    if character.isspace() or category in ("Zs", "Zl", "Zp", "Cc"):
        return _SPACE
    if category[0] == "M" or category == "Cf":
        return _MARK
    return _APART if category[0] in "PS" else _LETTER


class KindsOfCharacters:
    """A table from code points to kinds, filled as characters are met: importing it costs nothing."""

    def __init__(self, kind_of: Callable[[int], int]) -> None:
        """`kind_of` gives each code point a kind from 1 on."""
        self._kind_of = kind_of
        self._kind_of_code: NDArray[np.uint8] = np.zeros(0x110000, dtype=np.uint8)

    def __call__(self, codes_N: NDArray[np.uint32]) -> NDArray[np.uint8]:
        """What each character is."""
        kinds_N = self._kind_of_code[codes_N]
        if not kinds_N.all():
            for code in np.unique(codes_N[kinds_N == 0]).tolist():
                self._kind_of_code[code] = self._kind_of(code)
            kinds_N = self._kind_of_code[codes_N]
        return kinds_N


_kinds = KindsOfCharacters(_kind)


def white_space(text: str) -> Bool[np.ndarray, "N"]:
    """Whether each character lies in no word: white space and control characters."""
    return _kinds(codes(text)) == _SPACE


def word_starts(text: str, rule: WordsRule) -> Bool[np.ndarray, "N"]:
    """Whether a word starts at each character of the text."""
    kinds_N = _kinds(codes(text))
    marks_N = kinds_N == _MARK
    if marks_N.any():
        # A mark takes the kind of what it stands on; on white space or nothing it counts as a letter.
        at_N = np.maximum.accumulate(np.where(marks_N, -1, np.arange(len(kinds_N))))
        carrier_N = np.where(at_N < 0, _SPACE, kinds_N[at_N])
        taken_N = np.where(marks_N & (carrier_N == _SPACE), _LETTER, carrier_N)
        alone_N = marks_N & (carrier_N == _SPACE)
        alone_N[1:] &= ~marks_N[:-1]
    else:
        taken_N, alone_N = kinds_N, marks_N
    if rule == "characters":
        return ((kinds_N != _SPACE) & ~marks_N) | alone_N
    is_letter_N = taken_N == _LETTER
    starts_N = is_letter_N & ~marks_N
    starts_N[1:] &= ~is_letter_N[:-1]
    if rule != "spaces":
        starts_N |= _segmented(text, rule, is_letter_N) & ~marks_N
    return starts_N | (kinds_N == _APART) | alone_N


def _segmented(text: str, segmenter: Segmenter, is_letter_N: Bool[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
    """Whether a segmenter starts a word at each character: inside runs of letters, beside Han or kana."""
    codes_N = codes(text)
    unspaced_N = np.zeros(len(codes_N), dtype=bool)
    for first, last in _UNSPACED:
        unspaced_N |= (codes_N >= first) & (codes_N <= last)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_letter_N, [False]]).view(np.int8)))
    before_N1 = np.concatenate([[0], np.cumsum(unspaced_N & is_letter_N)])
    has_R = before_N1[edges[1::2]] > before_N1[edges[::2]]
    plain = codes_N.tobytes().decode("utf-32-le")  # the same text, but that half a surrogate pair is a question mark
    cuts = np.zeros(len(codes_N) + 1, dtype=bool)
    for first, end in zip(edges[::2][has_R].tolist(), edges[1::2][has_R].tolist(), strict=True):
        at = first
        for length in word_lengths(segmenter, plain[first:end]):
            cuts[at] = True
            at += length
        assert at == end, f"{segmenter} left out letters of {plain[first:end]!r}"
    cuts = cuts[:-1]
    cuts[1:] &= unspaced_N[1:] | unspaced_N[:-1]
    return cuts & is_letter_N


def in_words(rule: WordsRule) -> str:
    """What a word is, for a person."""
    if rule == "characters":
        return "each character is one"
    by_spaces = "runs between spaces, punctuation apart"
    return by_spaces if rule == "spaces" else f"{by_spaces}, Han and kana by {version(rule)}"


def stop_at(text: str, at: int) -> Stop:
    """What the . at this place does to its sentence, if white space follows it, perhaps after what closes."""
    if at and text[at - 1] in STOPS:  # one of several
        return "end"
    found = _ABBREVIATED.search(text, max(0, at - _LONGEST_ABBREVIATION), at)
    if found is None:
        return "end"
    return "no end" if found["number"] is None else "end unless a number follows"


def sentence_starts(text: str) -> Bool[np.ndarray, "N"]:
    """Whether a sentence starts at each character of the text."""
    starts_N = np.zeros(len(text), dtype=bool)
    first = len(text) - len(text.lstrip())
    ends = [first]
    for match in _SENTENCE_ENDS.finditer(text, first):
        end = match.end()
        if match["stops"] == "." and "\n" not in match[0]:
            stop = stop_at(text, match.start())
            if stop == "no end" or (stop != "end" and text[end : end + 1].isdecimal()):
                continue
        ends.append(end)
    at_N = np.array(ends, dtype=np.int64)
    starts_N[at_N[at_N < len(text)]] = True
    return starts_N


def detect_words(sample: str) -> WordsRule:
    """The rule that a text's script needs: "characters" where over 30 % of it is Han, Hiragana or Katakana."""
    codes_N = codes(sample)
    codes_N = codes_N[_kinds(codes_N) != _SPACE]
    unspaced = sum(int(((codes_N >= first) & (codes_N <= last)).sum()) for first, last in _UNSPACED)
    return "characters" if unspaced > _UNSPACED_SHARE * len(codes_N) else "spaces"
