"""Room card: which pieces a Unigram tokenizer has, and how likely each is.

Comes in: a sample of text and settings. Goes out: a model of the tokenizers library, the same in every process, or a
TokenizerError that says how many pieces the text gives. Called by: tokenizer.

The method is that of Kudo (2018, arXiv 1804.10959, section 3.2): from all frequent substrings of words, expectation
maximisation and pruning in turn. The trainer of the tokenizers library isn't used: it walks through a hash table whose
order is drawn anew in each process and adds floating-point numbers in that order on several threads, so that scores,
numbering and now and then pieces differ. Here words come in a fixed order, numbers are added one after the other, and
scores are rounded, so that the last bit of another processor's logarithm is not seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import models

from unmask.text.lattice import Edges, Lattice, Substrings, frequent_substrings, inner_edges
from unmask.text.preparation import META, normalizer_of, pre_tokenizer_of
from unmask.text.vocabulary import UNKNOWN, Progress, UnigramSettings, round_below, sample_blocks, too_few
from unmask.text.words import codes

_COVERAGE: Final = 0.9999  # of the sample's characters; the others are [UNK]
_SEEDS: Final = 8  # candidates for each piece that is wanted; sentencepiece begins with a million
_FEWEST_SEEDS: Final = 20_000
_SHRINK: Final = 0.65  # of the candidates stay in each round; sentencepiece's 0.75 needs half as many rounds again
_SURPLUS: Final = 1.1  # rounds end at this many times the pieces that are wanted, the rest goes by likelihood
_STEPS: Final = 2  # of expectation maximisation in each round
_LEAST: Final = 0.5  # expected count of a piece that stays
_LONGEST_TYPE: Final = 48  # characters; a longer run (Chinese between two marks) is learnt from in parts
_MOST_CHARACTERS: Final = 3_000_000  # of different words: the commonest; about 0.6 GB while it learns
_DECIMALS: Final = 6
_CODES: Final = 0x110000


@dataclass(frozen=True)
class _Laid:
    """Words laid end to end, a border after each and in the place of each character that is left out."""

    alphabet: list[int]  # code points, the commonest first
    letters_N: NDArray[np.int64]  # 1 and above: a character of the alphabet; 0: a border
    times_N: NDArray[np.float64]  # how often the sample has the word


@dataclass(frozen=True)
class _Candidates:
    """Single characters in the order of the alphabet, then frequent substrings."""

    place_P: NDArray[np.int64]  # where the words have it
    length_P: NDArray[np.int64]
    counts_P: NDArray[np.float64]


def train_unigram(texts: Iterable[str], settings: UnigramSettings, progress: Progress | None) -> models.Model:
    """Special pieces, then pieces from the likeliest to the rarest, with their log probabilities.

    Raises:
        TokenizerError: the text can't give as many pieces as asked.
    """
    words, times = _word_counts(texts, settings, progress)
    laid = _lay(words, times, settings)
    levels = frequent_substrings(laid.letters_N, laid.times_N, settings.longest_piece, settings.minimum_count)
    found = _candidates(laid, levels, settings)
    room = settings.vocab - len(settings.specials)
    if len(found.place_P) < room:
        given = len(settings.specials) + len(found.place_P)
        raise too_few(settings.vocab, given, _fitting(words, times, settings, given))
    scores_P = _prune(laid, found, _edges(levels, found), room, progress)
    pieces = _spelled(laid, found, np.flatnonzero(scores_P > -np.inf))
    scores = scores_P[scores_P > -np.inf].round(_DECIMALS).tolist()
    ordered = sorted(zip(pieces, scores, strict=True), key=lambda entry: (-entry[1], entry[0]))
    vocabulary = [(piece, 0.0) for piece in settings.specials] + ordered
    return models.Unigram(vocabulary, unk_id=settings.specials.index(UNKNOWN), byte_fallback=False)


def _fitting(words: Sequence[str], times: Sequence[int], settings: UnigramSettings, given: int) -> int:
    """A round number of pieces that the text does give; 0: none."""
    fits = round_below(given)
    while fits > len(settings.specials):
        smaller = replace(settings, vocab=fits)  # with fewer characters in its alphabet
        laid = _lay(words, times, smaller)
        levels = frequent_substrings(laid.letters_N, laid.times_N, settings.longest_piece, settings.minimum_count)
        if len(_candidates(laid, levels, smaller).place_P) >= fits - len(settings.specials):
            return fits
        fits = round_below(fits - 1)
    return 0


def _word_counts(
    texts: Iterable[str], settings: UnigramSettings, progress: Progress | None
) -> tuple[list[str], list[int]]:
    """The sample's words with the space before them, the commonest first."""
    normalizer, pre_tokenizer = normalizer_of(settings), pre_tokenizer_of(settings)
    counts: Counter[str] = Counter()
    for block in sample_blocks(texts, settings, progress):
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(block)):
            if len(word) <= _LONGEST_TYPE:
                counts[word] += 1
            else:
                counts.update(word[at : at + _LONGEST_TYPE] for at in range(0, len(word), _LONGEST_TYPE))
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    room = np.cumsum([len(word) for word, _ in ordered]) <= _MOST_CHARACTERS
    kept = ordered[: int(room.sum())]
    return [word for word, _ in kept], [count for _, count in kept]


def _alphabet(words: Sequence[str], times: Sequence[int], settings: UnigramSettings) -> list[int]:
    """Code points that get a piece of their own: 99.99 % of the sample, at most half of the vocabulary; always "▁"."""
    if not words:
        return []
    lengths = [len(word) for word in words]
    weights = np.repeat(np.array(times, dtype=np.float64), lengths)
    counts_C = np.bincount(codes("".join(words)), weights=weights, minlength=1)
    found_C = np.flatnonzero(counts_C >= settings.minimum_count)
    found_C = found_C[np.argsort(-counts_C[found_C], kind="stable")]
    before_C = np.cumsum(counts_C[found_C]) - counts_C[found_C]
    found_C = found_C[before_C < _COVERAGE * counts_C.sum()]
    alphabet: list[int] = found_C[: settings.vocab // 2].tolist()
    if alphabet and ord(META) not in alphabet:  # rare without spaces, yet it begins every text: never unknown
        return [ord(META), *alphabet[: max(1, settings.vocab // 2 - 1)]]
    return alphabet


def _lay(words: Sequence[str], times: Sequence[int], settings: UnigramSettings) -> _Laid:
    alphabet = _alphabet(words, times, settings)
    number_C = np.zeros(_CODES, dtype=np.int64)
    number_C[alphabet] = np.arange(1, len(alphabet) + 1)
    number_C[0] = 0  # stands between the words
    lengths = np.array([len(word) + 1 for word in words], dtype=np.int64)
    letters_N = number_C[codes("".join(f"{word}\0" for word in words))]
    return _Laid(alphabet, letters_N, np.repeat(np.array(times, dtype=np.float64), lengths))


def _candidates(laid: _Laid, levels: Sequence[Substrings], settings: UnigramSettings) -> _Candidates:
    """All single characters, and the substrings that stand for most characters of the sample."""
    joined = [(level, np.flatnonzero(level.apart_S)) for level in levels[1:]]
    place_P = np.concatenate([np.zeros(0, np.int64), *(level.place_S[which] for level, which in joined)])
    length_P = np.concatenate([np.zeros(0, np.int64), *(np.full(len(which), level.length) for level, which in joined)])
    counts_P = np.concatenate([np.zeros(0), *(level.counts_S[which] for level, which in joined)])
    order_P = np.lexsort((place_P, length_P, -counts_P * length_P))[: max(_SEEDS * settings.vocab, _FEWEST_SEEDS)]
    return _Candidates(
        np.concatenate([levels[0].place_S, place_P[order_P]]),
        np.concatenate([np.ones(len(laid.alphabet), np.int64), length_P[order_P]]),
        np.concatenate([levels[0].counts_S, counts_P[order_P]]),
    )


def _edges(levels: Sequence[Substrings], found: _Candidates) -> Edges:
    """Every place of the words where a candidate stands, by place."""
    parts: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]] = []
    for level in levels:
        number_S = np.full(len(level.counts_S), -1, dtype=np.int32)
        chosen = np.flatnonzero(found.length_P == level.length)
        if level.length == 1:
            number_S[:] = np.arange(len(number_S))
        else:
            by_place = np.argsort(level.place_S)  # a substring is known by where it first stands
            number_S[by_place[np.searchsorted(level.place_S[by_place], found.place_P[chosen])]] = chosen
        piece_E = number_S[level.which_E]
        start_E = level.at_E[piece_E >= 0].astype(np.int32)
        parts.append((start_E, start_E + np.int32(level.length), piece_E[piece_E >= 0]))
    start_E, end_E, piece_E = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order_E = np.argsort(start_E, kind="stable")
    return Edges(start_E[order_E], end_E[order_E], piece_E[order_E])


def _spelled(laid: _Laid, found: _Candidates, which: NDArray[np.int64]) -> list[str]:
    letters = np.array(laid.alphabet, dtype=np.uint32)
    pieces: list[str] = []
    for piece in which.tolist():
        if piece < len(laid.alphabet):
            pieces.append(chr(laid.alphabet[piece]))
            continue
        first = int(found.place_P[piece])
        numbers_N = laid.letters_N[first : first + int(found.length_P[piece])]
        pieces.append(letters[numbers_N - 1].tobytes().decode("utf-32-le"))
    return pieces


def _prune(laid: _Laid, found: _Candidates, edges: Edges, room: int, progress: Progress | None) -> NDArray[np.float64]:
    """The log probability of each candidate that stays; minus infinity for the others."""
    letters = len(laid.alphabet)
    border, inner, end_S = inner_edges(edges, found.place_P[letters:], found.length_P[letters:])
    own, words = Lattice(border, inner), Lattice(laid.letters_N == 0, edges)
    times_N = np.where(laid.letters_N == 0, laid.times_N, 0.0)
    characters = float(laid.times_N[laid.letters_N > 0].sum())
    alive_P = np.ones(len(found.counts_P), dtype=bool)
    scores_P = np.log(np.maximum(found.counts_P, _LEAST) / found.counts_P.sum())
    level = 3.0  # nats per character, so that the chance of a long word is still a number
    rounds = max(1.0, np.log(len(alive_P) / (_SURPLUS * room)) / -np.log(_SHRINK))
    done = 0
    while True:
        counts_P = found.counts_P
        for _ in range(_STEPS):
            weight_P = np.where(alive_P, np.exp(scores_P + level * found.length_P), 0.0)
            counts_P, likelihood = words.expected(weight_P, times_N)
            level -= likelihood / characters
            scores_P = _scores(counts_P, alive_P)
        done += 1
        if progress is not None:
            progress("training the tokenizer", min(0.99, 0.5 + 0.5 * done / (rounds + 1)))
        is_last = int(alive_P.sum()) <= _SURPLUS * room
        wanted = room if is_last else max(room, int(_SHRINK * alive_P.sum()), int(_SURPLUS * room))
        if int(alive_P.sum()) <= room:
            return np.where(alive_P, scores_P, -np.inf)
        # What the sample would lose: each time that the piece stands in it, the best other way to write it.
        other_S = own.best(scores_P)[end_S]
        score_S = np.where(alive_P, scores_P, 0.0)[letters:]
        loss_S = np.where(counts_P[letters:] < _LEAST, 0.0, counts_P[letters:] * (score_S - other_S))
        loss_S = np.where(alive_P[letters:], loss_S, -np.inf)
        order_S = np.argsort(-loss_S.round(_DECIMALS), kind="stable")
        alive_P[letters + order_S[max(0, wanted - letters) :]] = False
        words.keep(alive_P)
        own.keep(alive_P)


def _scores(counts_P: NDArray[np.float64], alive_P: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Log probabilities under a sparse prior, as in sentencepiece: small counts weigh less than they are."""
    counts_P = np.where(alive_P, np.maximum(counts_P, _LEAST), 1.0)
    return np.where(alive_P, _digamma(counts_P) - _digamma(np.array([counts_P[alive_P].sum()])), -np.inf)


def _digamma(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The derivative of log gamma, by recurrence up to 6 and a series above: nine digits."""
    shift = np.zeros_like(x)
    for _ in range(6):
        shift = np.where(x < 6, shift - 1 / x, shift)
        x = np.where(x < 6, x + 1, x)
    inverse = 1 / (x * x)
    return shift + np.log(x) - 0.5 / x - inverse * (1 / 12 - inverse * (1 / 120 - inverse / 252))
