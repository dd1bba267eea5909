"""Room card: which tokens start words and sentences.

Comes in: a text, the characters that each of its tokens stands for, a rule. Goes out: a mark for each token. Called by:
tokenizer.

A token starts a word where the first of its characters that is no white space does, or where a word starts in what the
normaliser took away before it; one that begins within a character of the token before it (its further bytes) starts
none. So the tokens from one start to the next stand for exactly one word; or, where a token holds characters of several
words, for whole neighbouring ones.
A piece of nothing but a space starts the word after it, in a tokenizer whose pieces carry the space before them: else
the shape of a word that is hidden could be seen from what is left before it.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int, UInt8

from unmask.contracts import SENTENCE_START, WORD_START
from unmask.text.words import WordsRule, sentence_starts, white_space, word_starts


def token_marks(
    text: str, offsets: Int[np.ndarray, "N 2"], rule: WordsRule, space_N: Bool[np.ndarray, "N"]
) -> UInt8[np.ndarray, "N"]:
    """The bits WORD_START and SENTENCE_START of each token; `space_N` are pieces of only the space before a word."""
    marks = np.zeros(len(offsets), dtype=np.uint8)
    visible = np.flatnonzero(~white_space(text))
    if not len(offsets) or not len(visible):
        return marks
    last_N = np.maximum.accumulate(offsets[:, 1])
    end_N = np.concatenate([[0], last_N[:-1]])  # of the token before
    shares_N, first_N = offsets[:, 0] < end_N, np.maximum(offsets[:, 0], end_N)
    order_N = np.searchsorted(visible, first_N)
    seen_N = visible[np.minimum(order_N, len(visible) - 1)]  # the first visible character from there on
    holds_N = (order_N < len(visible)) & (seen_N < last_N)
    before_N = np.concatenate([[0], np.maximum.accumulate(np.where(holds_N, last_N, 0))[:-1]])
    for starts, bit in ((word_starts(text, rule), WORD_START), (sentence_starts(text), SENTENCE_START)):
        counted = np.concatenate([[0], np.cumsum(starts)])
        at_N = holds_N & ~shares_N & (counted[seen_N + 1] > counted[before_N])
        led_N = np.append(space_N[:-1] & ~holds_N[:-1] & at_N[1:], False)
        at_N[1:] &= ~led_N[:-1]
        marks[at_N | led_N] |= bit
    return marks
