"""Room card: where words and sentences start.

Comes in: text and a rule. Goes out: for each character, whether a word or a sentence starts there. Called by:
tokenizer, which turns it into marks of tokens, and corpus, which asks what rule a text needs.

Words belong to the text, not to the tokenizer. By "spaces": a run of letters, marks and numbers is a word (in Korean an
eojeol), and every other visible character is a word of its own. By "characters": every visible character is a word. In
both, a combining mark or a joiner belongs to the character before it, and white space starts nothing.

A sentence starts at the first visible character, after a line end, after one of . ! ? … that white space follows
(closing quotes and brackets may stand between), and after 。 ！ ？ even without it. "Dr. Who" is taken for two
sentences: a list of abbreviations would belong to one language.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final, Literal

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

WordsRule = Literal["spaces", "characters"]

_SPACE, _LETTER, _APART, _MARK = 1, 2, 3, 4  # 0: not looked up yet
_KIND_OF_CODE = np.zeros(0x110000, dtype=np.uint8)
_SENTENCE_ENDS = re.compile(
    r"""[.!?…]+["'”’»)\]}」』）】]*\s+   # an end, what closes after it, white space
    |   [。！？]+["'”’»)\]}」』）】]*\s*  # ends that no space need follow
    |   \n\s*""",
    re.VERBOSE,
)
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


def _kinds(codes_N: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """What each character is; the table is filled as characters are met, so that importing this costs nothing."""
    kinds_N = _KIND_OF_CODE[codes_N]
    if not kinds_N.all():
        for code in np.unique(codes_N[kinds_N == 0]).tolist():
            _KIND_OF_CODE[code] = _kind(code)
        kinds_N = _KIND_OF_CODE[codes_N]
    return kinds_N


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
    starts_N = (taken_N == _LETTER) & ~marks_N
    starts_N[1:] &= taken_N[:-1] != _LETTER
    return starts_N | (kinds_N == _APART) | alone_N


def sentence_starts(text: str) -> Bool[np.ndarray, "N"]:
    """Whether a sentence starts at each character of the text."""
    starts_N = np.zeros(len(text), dtype=bool)
    first = len(text) - len(text.lstrip())
    ends = [match.end() for match in _SENTENCE_ENDS.finditer(text, first)]
    at_N = np.array([first, *ends], dtype=np.int64)
    starts_N[at_N[at_N < len(text)]] = True
    return starts_N


def detect_words(sample: str) -> WordsRule:
    """The rule that a text's script needs: "characters" where over 30 % of it is Han, Hiragana or Katakana."""
    codes_N = codes(sample)
    codes_N = codes_N[_kinds(codes_N) != _SPACE]
    unspaced = sum(int(((codes_N >= first) & (codes_N <= last)).sum()) for first, last in _UNSPACED)
    return "characters" if unspaced > _UNSPACED_SHARE * len(codes_N) else "spaces"
