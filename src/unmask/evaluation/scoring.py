"""Pseudo-log-likelihood of texts: how probable a model finds each token, word and text.

Each token is masked in turn and predicted from the rest of the text. With "original" (Salazar et al. 2020, section 2)
only this token is masked. The tokens of one word then give each other away: "souvenir" as so ##uven ##ir scores far
too well. With "within-word" (Kauf and Ivanova 2023, PLL-word-l2r) the later tokens of the same word are masked too. By
the chain rule, the tokens of a word then add up to the log-probability of the word.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray

from unmask.core.distributed import DistributedContext, init_distributed
from unmask.core.errors import TextError
from unmask.core.types import SPECIAL, WORD_START, Batch, ProgressCallback, logits_at
from unmask.models.model import Model, require_masked_lm, require_token_before
from unmask.tokenization.normalization import without_specials
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.words import WordsRule, word_starts

Method = Literal["original", "within-word"]
WordUnits = WordsRule | Literal["tokenizer"]
METHODS: Final[tuple[Method, ...]] = ("original", "within-word")

_BATCH_TOKENS: Final = 4096  # larger batches are not faster on a CPU
_COPIED_TOKENS: Final = 1 << 20  # of the masked copies of a text that are in memory together: 8 MB
_BATCH_LOGITS: Final = 1 << 24  # 64 MB of float32
_ENCODED: Final = 1024  # texts that are encoded together


@dataclass(frozen=True)
class TokenScore:
    """A token and its log-probability in nats; None for [UNK], which is never predicted."""

    token: str
    log_probability: float | None
    surprisal: float | None  # bits


@dataclass(frozen=True)
class WordScore:
    """A word of the text: sums over its tokens. None if the whole word is [UNK]."""

    word: str
    log_probability: float | None  # nats
    surprisal: float | None  # bits
    tokens: tuple[TokenScore, ...]


@dataclass(frozen=True)
class Score:
    """Sums over the tokens of one or several texts, without [UNK]."""

    log_probability: float  # nats
    surprisal: float  # bits
    pseudo_perplexity: float  # per word
    bits_per_character: float
    num_words: int
    num_tokens: int
    characters: int  # without those of [UNK]
    unknown_tokens: int


@dataclass(frozen=True)
class TextScore(Score):
    """A text, its score and its words."""

    text: str
    words: tuple[WordScore, ...]

    def __repr__(self) -> str:
        """Return the text, its score and the surprisal of each word, in three lines."""
        words = ", ".join(
            f"{word.word} {'?' if word.surprisal is None else f'{word.surprisal:.1f}'}" for word in self.words
        )
        return (
            f"TextScore({self.text[:60]!r}: {self.log_probability:.2f} nats\n"
            f"  {self.bits_per_character:.3f} bits per character, pseudo-perplexity {self.pseudo_perplexity:,.1f} per "
            f"word\n  bits: {words})"
        )


def score(
    model: Model,
    texts: str | Sequence[str],
    method: Method = "within-word",
    *,
    words: WordUnits | None = None,
    context: DistributedContext | None = None,
    on_progress: ProgressCallback | None = None,
) -> list[TextScore]:
    """Return the pseudo-log-likelihood of one or several texts, with the scores of their words and tokens.

    What compares between models: with "within-word" and the same rule for words, every word of the text is hidden as a
    whole, whatever its tokens are. Pseudo-perplexity per word and bits per character then divide by numbers of the text
    alone, and compare between tokenizers under three conditions. No token is [UNK] (`unknown_tokens` is 0). Neither
    tokenizer drops case or accents. The texts fit into the context of both models. One advantage remains: the number of
    masks tells the model how many tokens the word has, and a tokenizer with shorter tokens tells more. With "original",
    scores compare only between models with the same tokenizer. No pseudo-perplexity compares with the perplexity of a
    causal model, because a word is predicted from both sides.

    A text that is longer than the model's context is split: each word is predicted from the window around it.

    A model that was trained last with objective "causal" has no masked predictions. Its scores are log-likelihoods from
    left to right, whatever the method.

    Args:
        model: Model to use, as returned by `unmask.load`.
        texts: One or several texts. "[MASK]" in them is plain text.
        method: "within-word" masks a token and the later tokens of its word, "original" masks the token alone.
        words: What a word is: a rule as in `data.words`, or "tokenizer" for the units of the tokenizer's
            pre-tokenizer, as in minicons. Default: the rule that the model was trained with.
        context: Device to compute on; default: as chosen for training.
        on_progress: Called with a name and the fraction that is done.

    Raises:
        TextError: no token of a text can be scored.
        ModelError: the model was trained last to detect replaced tokens, or it predicts each token from the one before
            it and its tokenizer puts none before a text.
    """
    listed = [texts] if isinstance(texts, str) else list(texts)
    rule = model.words if words is None or words == "tokenizer" else words
    encoded = [*encode(model, listed, words)]
    for number, (text, each) in enumerate(zip(listed, encoded, strict=True)):
        if problem := _problem(text, each):
            raise TextError(
                problem,
                location=f"text {number + 1}: {text[:60]!r}" if len(listed) > 1 else repr(text[:60]),
                hint="give text that the tokenizer can encode",
            )
    found = score_tokens(model, encoded, (method,), context or init_distributed("float32"), on_progress)
    return [
        _text_score(model.tokenizer, text, each, nats[method], rule)
        for text, each, nats in zip(listed, encoded, found, strict=True)
    ]


def unscorable(model: Model, texts: Sequence[str], words: WordUnits | None = None) -> dict[int, str]:
    """Return the texts that can't be scored, by their number from 0, with the reason."""
    problems = (_problem(text, each) for text, each in zip(texts, encode(model, texts, words), strict=True))
    return {number: problem for number, problem in enumerate(problems) if problem}


def _problem(text: str, encoded: EncodedText) -> str:
    """Return why a text can't be scored; an empty string if it can."""
    if not text.strip():
        return "the text is blank"
    if not encoded.is_scored.any():
        return "no token of the text can be scored: all of it is [UNK], or dropped by the tokenizer"
    return ""


def total(scores: Sequence[TextScore]) -> Score:
    """Return the sums over several texts."""
    return _score(
        sum(score.log_probability for score in scores),
        num_words=sum(score.num_words for score in scores),
        num_tokens=sum(score.num_tokens for score in scores),
        characters=sum(score.characters for score in scores),
        unknown_tokens=sum(score.unknown_tokens for score in scores),
    )


def _score(nats: float, *, num_words: int, num_tokens: int, characters: int, unknown_tokens: int) -> Score:
    return Score(
        log_probability=nats,
        surprisal=_bits(nats),
        pseudo_perplexity=_perplexity(nats, num_words),
        bits_per_character=_bits(nats) / max(1, characters),
        num_words=num_words,
        num_tokens=num_tokens,
        characters=characters,
        unknown_tokens=unknown_tokens,
    )


def _bits(log_probability: float) -> float:
    return -log_probability / math.log(2)


def _perplexity(log_probability: float, words: int) -> float:
    exponent = -log_probability / max(1, words)
    return math.exp(exponent) if exponent < 700 else math.inf


# Tokens and words -----------------------------------------------------------------------------------------------------


class EncodedText(NamedTuple):
    """The tokens of a text, without special tokens around it."""

    ids: NDArray[np.int64]  # (n,)
    is_scored: NDArray[np.bool_]  # (n,) False for [UNK]
    word_ends: NDArray[np.int64]  # (n,) for each token the end of its word: the token after the last one of the word
    offsets: NDArray[np.int64]  # (n, 2) characters [first, last) of each token
    characters_unknown: int

    @property
    def word_firsts(self) -> NDArray[np.int64]:
        """First token of each word, ascending."""
        return np.flatnonzero(np.diff(self.word_ends, prepend=-1))


def encode(model: Model, texts: Sequence[str], words: WordUnits | None = None) -> Iterator[EncodedText]:
    """Yield the tokens of each text and the words that they belong to. The arguments are those of `score`."""
    rule = model.words if words is None or words == "tokenizer" else words
    by_tokenizer = None
    if words == "tokenizer":
        by_tokenizer = tokenizers.Tokenizer.from_str(without_specials(model.tokenizer.to_json()))
        by_tokenizer.encode_special_tokens = True
    for first in range(0, len(texts), _ENCODED):
        part = texts[first : first + _ENCODED]
        units = by_tokenizer.encode_batch(part, add_special_tokens=False) if by_tokenizer else [None] * len(part)
        for encoded, unit in zip(model.tokenizer.encode_batch(part, rule), units, strict=True):
            ids = encoded.ids.astype(np.int64)
            is_first = (encoded.marks & WORD_START).astype(bool)
            if unit is not None:
                numbers = np.array([-1 if number is None else number for number in unit.word_ids], np.int64)
                is_first = np.diff(numbers, prepend=-2) != 0
            yield EncodedText(
                ids,
                ~(encoded.marks & SPECIAL).astype(bool),
                _word_ends(is_first),
                encoded.offsets,
                encoded.characters_unknown,
            )


def _word_ends(is_first: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the end of each token's word. Tokens before the first word are a unit of their own."""
    count = len(is_first)
    firsts = np.flatnonzero(is_first)
    if not len(firsts) or firsts[0] != 0:
        firsts = np.concatenate([[0], firsts])
    lengths = np.diff(firsts, append=count)
    return np.repeat(firsts + lengths, lengths)[:count].astype(np.int64)


def _text_score(
    tokenizer: Tokenizer, text: str, encoded: EncodedText, nats: NDArray[np.float64], rule: WordsRule
) -> TextScore:
    """Return the score of a text from the log-probability of each of its tokens."""
    starts = np.concatenate([[0], np.cumsum(word_starts(text, rule))])
    words: list[WordScore] = []
    num_words = 0
    for first in encoded.word_firsts.tolist():
        last = int(encoded.word_ends[first])
        is_scored = encoded.is_scored[first:last]
        begin, end = int(encoded.offsets[first:last, 0].min()), int(encoded.offsets[first:last, 1].max())
        tokens = tuple(
            TokenScore(tokenizer.id_to_token(id), value if scored else None, _bits(value) if scored else None)
            for id, value, scored in zip(
                encoded.ids[first:last].tolist(), nats[first:last].tolist(), is_scored.tolist(), strict=True
            )
        )
        sum_nats = float(nats[first:last][is_scored].sum()) if is_scored.any() else None
        num_words += int(starts[end] - starts[begin]) if is_scored.any() else 0
        bits = None if sum_nats is None else _bits(sum_nats)
        words.append(WordScore(text[begin:end].strip() or text[begin:end], sum_nats, bits, tokens))
    sums = _score(
        float(nats[encoded.is_scored].sum()),
        num_words=num_words,
        num_tokens=int(encoded.is_scored.sum()),
        characters=len(text) - encoded.characters_unknown,
        unknown_tokens=int((~encoded.is_scored).sum()),
    )
    return TextScore(**vars(sums), text=text, words=tuple(words))


# Log-probabilities ----------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Copies of one window of a text, each with other tokens masked."""

    text: int
    numbers: NDArray[np.int64]  # (rows,) of the masks among all masks of the text
    ids: NDArray[np.int64]  # (rows, length) with special tokens and masks
    positions: NDArray[np.int64]  # (rows,) of the predicted token in the window, special tokens included
    labels: NDArray[np.int64]  # (rows,) its id

    def split(self, count: int) -> tuple[_Rows, _Rows]:
        """Return the first `count` rows and the rest."""
        first, rest = (
            _Rows(self.text, self.numbers[part], self.ids[part], self.positions[part], self.labels[part])
            for part in (slice(count), slice(count, None))
        )
        return first, rest


def score_tokens(
    model: Model,
    texts: Sequence[EncodedText],
    methods: Sequence[Method],
    context: DistributedContext,
    on_progress: ProgressCallback | None = None,
) -> list[Mapping[Method, NDArray[np.float64]]]:
    """Return the log-probability of each token of each text in nats, by method; 0 for [UNK]. Computes in float32.

    The last token of a word is masked alone by both methods: it is computed once.

    Raises:
        ModelError: as for `score`.
    """
    if model.is_causal:
        require_token_before(model)
    else:
        require_masked_lm(model, "score texts")
    for module in (model.encoder.to(context.device), model.head.to(context.device)):
        if module.training:
            module.eval()
    if model.is_causal:
        return [dict.fromkeys(methods, nats) for nats in _score_causal(model, texts, on_progress)]
    masks = [_masks(text, methods) for text in texts]
    values = [np.zeros(len(of_text)) for of_text in masks]
    # Texts of similar length are in one batch; the longest come last, as a progress by tokens expects.
    order = sorted(range(len(texts)), key=lambda number: len(texts[number].ids))
    rows = (row for number in order for row in _rows(model, number, texts[number], masks[number]))
    planned = sum(len(of_text) * min(len(text.ids), model.context) for text, of_text in zip(texts, masks, strict=True))
    done = 0
    for batch in _batches(rows, model.encoder.vocab_size):
        found = _predict(model, batch, context)
        first = 0
        for row in batch:
            values[row.text][row.numbers] = found[first : first + len(row.numbers)]
            first += len(row.numbers)
            done += row.ids.size
        if on_progress:
            on_progress("scoring", min(1.0, done / max(1, planned)))
    results: list[Mapping[Method, NDArray[np.float64]]] = []
    for text, of_text, nats in zip(texts, masks, values, strict=True):
        by_method: dict[Method, NDArray[np.float64]] = {}
        for method in methods:
            by_method[method] = np.zeros(len(text.ids))
            wanted = _keys(_masks(text, (method,)), text)
            by_method[method][text.is_scored] = nats[np.searchsorted(_keys(of_text, text), wanted)]
        results.append(by_method)
    return results


def _score_causal(
    model: Model, texts: Sequence[EncodedText], on_progress: ProgressCallback | None
) -> list[NDArray[np.float64]]:
    """Return the log-probability of each token of each text given the tokens before it; 0 for [UNK].

    One pass computes as many tokens of a text as their logits fit in a batch. Of a text that is longer than the
    context, windows overlap by half: each token but the first ones has at least half of the context before it.
    """
    before, after = model.tokenizer.frame.before, model.tokenizer.frame.after
    length = model.context - len(before) - len(after)
    most = max(1, _BATCH_LOGITS // model.encoder.vocab_size)
    parts: list[tuple[int, int, NDArray[np.int64]]] = []  # text, first token of the window, tokens to predict
    for number, text in enumerate(texts):
        wanted, done = np.flatnonzero(text.is_scored), 0
        for start in range(0, max(1, len(text.ids) - length // 2), max(1, length // 2)):
            numbers = wanted[(wanted >= done) & (wanted < start + length)]
            done = start + length
            parts += [(number, start, numbers[each : each + most]) for each in range(0, len(numbers), most)]
    values = [np.zeros(len(text.ids)) for text in texts]
    totals = np.cumsum([len(numbers) for _, _, numbers in parts])
    first = done = 0
    while first < len(parts):
        last = max(first + 1, int(np.searchsorted(totals, done + most, "right")))
        batch, first = parts[first:last], last
        ids = [[*before, *texts[number].ids[start : start + length].tolist(), *after] for number, start, _ in batch]
        positions = [(numbers - start + len(before)).tolist() for _, start, numbers in batch]
        for (number, _, numbers), rows_NV in zip(batch, model.log_probabilities(ids, positions), strict=True):
            labels_N = torch.from_numpy(texts[number].ids[numbers].astype(np.int64))
            values[number][numbers] = rows_NV.gather(1, labels_N[:, None]).squeeze(1).double().numpy()
        done = int(totals[last - 1])
        if on_progress:
            on_progress("scoring", done / int(totals[-1]))
    return values


def _masks(text: EncodedText, methods: Sequence[Method]) -> NDArray[np.int64]:
    """Return the masks of a text, (n, 2) in ascending order: the tokens [first, last). The first one is predicted."""
    numbers = np.arange(len(text.ids))
    ends = [text.word_ends if method == "within-word" else numbers + 1 for method in methods]
    masks = np.concatenate([np.stack([numbers, each], 1)[text.is_scored] for each in ends])
    return np.unique(masks, axis=0).reshape(-1, 2)


def _keys(masks: NDArray[np.int64], text: EncodedText) -> NDArray[np.int64]:
    """Return one number for each mask, in the order of the masks."""
    return masks[:, 0] * (len(text.ids) + 1) + masks[:, 1]


def _rows(model: Model, number: int, text: EncodedText, masks: NDArray[np.int64]) -> Iterator[_Rows]:
    """Yield the masked copies of a text, or of the windows of a text that is longer than the context."""
    before, after = model.tokenizer.frame.before, model.tokenizer.frame.after
    length = model.context - len(before) - len(after)
    for start, of_window in _windows(text, masks, length):
        ids = text.ids[start : start + length]
        framed = np.concatenate([before, ids, after]).astype(np.int64)
        places = np.arange(len(framed))
        most = max(1, _COPIED_TOKENS // len(framed))
        for numbers in (of_window[first : first + most] for first in range(0, len(of_window), most)):
            positions, ends = (masks[numbers] - start + len(before)).T
            ends = np.minimum(ends, len(before) + len(ids))
            is_masked = (places >= positions[:, None]) & (places < ends[:, None])
            copies = np.where(is_masked, model.tokenizer.mask_id, framed)
            yield _Rows(number, numbers, copies, positions, text.ids[masks[numbers, 0]])


def _windows(text: EncodedText, masks: NDArray[np.int64], length: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield the first token of each window and the numbers of the masks whose tokens are predicted in it.

    A text of up to `length` tokens is one window. A longer one has a window around each word or, if the word is longer
    than half of a window, around each of its tokens.
    """
    count = len(text.ids)
    if count <= length or not len(masks):
        if len(masks):
            yield 0, np.arange(len(masks))
        return
    word_ends = text.word_ends[masks[:, 0]]
    for numbers in np.split(np.arange(len(masks)), np.flatnonzero(np.diff(word_ends)) + 1):
        first, last = int(masks[numbers[0], 0]), int(word_ends[numbers[0]])
        if last - first <= length // 2:
            yield _around((first + last) // 2, count, length), numbers
        else:
            for one in numbers:
                yield _around(int(masks[one, 0]), count, length), np.array([one])


def _around(center: int, count: int, length: int) -> int:
    """Return the first token of the window of `length` tokens around a token, within `count` tokens."""
    return min(max(0, center - length // 2), count - length)


def _batches(rows: Iterator[_Rows], vocab_size: int) -> Iterator[list[_Rows]]:
    """Yield batches of rows, limited in tokens and in logits."""
    limit = max(1, _BATCH_LOGITS // vocab_size)
    batch, tokens, count = list[_Rows](), 0, 0
    for rest in rows:
        part = rest
        while len(part.ids):
            length = part.ids.shape[1]
            fitting = min((_BATCH_TOKENS - tokens) // length, limit - count)
            if fitting < 1 and batch:
                yield batch
                batch, tokens, count = [], 0, 0
                continue
            taken, part = part.split(max(1, fitting))
            batch.append(taken)
            tokens, count = tokens + taken.ids.size, count + len(taken.ids)
    if batch:
        yield batch


@torch.inference_mode()
def _predict(model: Model, rows: Sequence[_Rows], context: DistributedContext) -> NDArray[np.float64]:
    """Return the log-probability of the label of each row. The head gets the predicted positions only."""
    lengths = np.concatenate([np.full(len(row.ids), row.ids.shape[1]) for row in rows])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids_T = torch.from_numpy(np.concatenate([row.ids.ravel() for row in rows]))
    batch = Batch(
        ids_T=ids_T,
        cu_seqlens=torch.from_numpy(offsets.astype(np.int32)),
        offsets=tuple(offsets.tolist()),
        max_seqlen=int(lengths.max()),
        token_flags_T=torch.full((len(ids_T),), SPECIAL, dtype=torch.uint8),
        sample_keys_B2=torch.zeros((len(lengths), 2), dtype=torch.int64),
    ).to(context.device)
    at = np.concatenate([row.positions for row in rows]) + offsets[:-1]
    labels_M = torch.from_numpy(np.concatenate([row.labels for row in rows])).to(context.device)
    logits_MV = logits_at(model.encoder, model.head, batch, torch.from_numpy(at).to(context.device))
    label_logits_M = logits_MV.gather(1, labels_M[:, None]).squeeze(1)
    return (label_logits_M - logits_MV.logsumexp(-1)).double().cpu().numpy()
