"""Turns labeled examples into sequences of token ids with labels at some positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.core.errors import ModelError, TextError
from unmask.core.types import SPECIAL, Batch, Sample, pack
from unmask.tokenization.tokenizer import Tokenizer
from unmask.training.finetuning.examples import Example

_BATCH: Final = 1_024  # texts that are encoded together
_MAX_CHARACTERS_PER_TOKEN: Final = 200  # what lies further behind in a text is cut off before it is encoded
MAX_EVAL_TOKENS: Final = 16_384

Labels = NDArray[np.int64] | NDArray[np.float32]


@dataclass(frozen=True)
class LabeledSequence:
    """A sequence with labels: one at its first token for a text, one at the first token of each word for words."""

    sample: Sample
    positions: NDArray[np.int64]  # in the sequence
    labels: Labels
    rows: NDArray[np.int64]  # of each label: its number in the whole data set


@dataclass(frozen=True)
class LabeledData:
    """The sequences of a file, and the labels of all its rows: texts, or the words of all sentences."""

    sequences: tuple[LabeledSequence, ...]
    labels: Labels
    sentence_starts: NDArray[np.int64]  # number of the first row of each example
    num_cut: int = 0  # examples longer than the maximum, of which the end is not read

    def batches(self) -> Iterator[list[LabeledSequence]]:
        """Yield all sequences in batches of similar length, the longest first."""
        order = sorted(self.sequences, key=lambda sequence: -len(sequence.sample.ids))
        batch, tokens = list[LabeledSequence](), 0
        for sequence in order:
            if batch and tokens + len(sequence.sample.ids) > MAX_EVAL_TOKENS:
                yield batch
                batch, tokens = [], 0
            batch.append(sequence)
            tokens += len(sequence.sample.ids)
        if batch:
            yield batch


def packed(sequences: Sequence[LabeledSequence]) -> tuple[Batch, Tensor, Tensor]:
    """Return sequences as a batch, the positions of its labels (M), and the labels (M)."""
    batch = pack([sequence.sample for sequence in sequences])
    positions = [sequence.positions + start for sequence, start in zip(sequences, batch.offsets, strict=False)]
    labels_M = torch.from_numpy(np.concatenate([sequence.labels for sequence in sequences]))
    return batch, torch.from_numpy(np.concatenate(positions)), labels_M


def encode_texts(
    examples: Sequence[Example],
    labels: Labels,
    tokenizer: Tokenizer,
    longest: int,
    *,
    token_types: bool,
    on_progress: Callable[[float], None],
) -> LabeledData:
    """Encode texts or pairs as `AutoTokenizer` does, cut to `longest` tokens, the longer text of a pair first.

    Raises:
        ModelError: the examples are pairs, and the tokenizer doesn't separate two texts.
        TextError: an example has no token.
    """
    is_pair = len(examples[0].texts) == 2
    frame = (tokenizer.frame.before, tokenizer.frame.after)
    if is_pair:
        if tokenizer.frame.pair is None:
            raise ModelError(
                "the tokenizer of this model puts nothing between two texts",
                hint="use a model whose tokenizer has [SEP], or join the texts and choose --task classify",
            )
        frame = tokenizer.frame.pair
    limit = longest - sum(map(len, frame))
    sequences: list[LabeledSequence] = []
    num_cut = 0
    for first in range(0, len(examples), _BATCH):
        group = examples[first : first + _BATCH]
        columns = zip(*(example.texts for example in group), strict=True)
        cut = [[text[: _MAX_CHARACTERS_PER_TOKEN * longest] for text in column] for column in columns]
        encoded = zip(*(tokenizer.encode_prompts(column) for column in cut), strict=True)
        for number, (example, parts) in enumerate(zip(group, encoded, strict=True), first):
            lengths = _cut_lengths([len(part) for part in parts], limit)
            num_cut += sum(lengths) < sum(map(len, parts))
            ids, types = _framed([part[:length] for part, length in zip(parts, lengths, strict=True)], frame)
            if not ids:
                raise TextError(
                    "the tokenizer encodes this text as no token", location=example.location, hint="remove the row"
                )
            sample = _sample(ids, types if is_pair and token_types else None)
            row = np.array([number])
            sequences.append(LabeledSequence(sample, np.zeros(1, np.int64), labels[row], row))
        on_progress((first + len(group)) / len(examples))
    return LabeledData(tuple(sequences), labels, np.arange(len(examples)), num_cut)


def _cut_lengths(lengths: Sequence[int], limit: int) -> list[int]:
    """Return the lengths to which one or two texts are cut, as by the strategy "longest_first" of `tokenizers`."""
    if sum(lengths) <= limit:
        return list(lengths)
    if len(lengths) == 1:
        return [limit]
    shorter, longer = sorted(lengths)
    kept = (shorter, limit - shorter) if shorter <= limit // 2 else (limit // 2, limit - limit // 2)
    kept = (kept[0], min(longer, kept[1]))
    return list(kept) if lengths[0] <= lengths[1] else [kept[1], kept[0]]


def _framed(parts: Sequence[list[int]], frame: Sequence[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    """Return ids and token types of texts with the special tokens before, between and after them."""
    ids, types = [*frame[0]], [0] * len(frame[0])
    for number, (part, after) in enumerate(zip(parts, frame[1:], strict=True)):
        ids += [*part, *after]
        types += [number] * (len(part) + len(after))
    return ids, types


def _sample(ids: Sequence[int], types: Sequence[int] | None = None) -> Sample:
    # Nothing is masked, so the flags don't matter.
    flags = np.full(len(ids), SPECIAL, np.uint8)
    return Sample(np.array(ids, np.int64), flags, token_type_ids=None if types is None else np.array(types, np.int64))


def encode_words(
    examples: Sequence[Example],
    label_ids: Mapping[str, int],
    tokenizer: Tokenizer,
    longest: int,
    *,
    on_progress: Callable[[float], None],
) -> LabeledData:
    """Encode sentences, joined by spaces, with the label of each word at its first token.

    A sentence longer than `longest` tokens becomes several sequences. A word without a token (of characters that the
    tokenizer drops) is in no sequence.
    """
    before, after = list(tokenizer.frame.before), list(tokenizer.frame.after)
    limit = longest - len(before) - len(after)
    sequences: list[LabeledSequence] = []
    starts, num_words, labels = list[int](), 0, list[NDArray[np.int64]]()
    for begin in range(0, len(examples), _BATCH):
        group = examples[begin : begin + _BATCH]
        encodings = tokenizer.encode_batch([" ".join(example.texts) for example in group])
        for example, encoded in zip(group, encodings, strict=True):
            starts.append(num_words)
            labels.append(np.array([label_ids[label] for label in example.labels], np.int64))
            first_tokens = _first_tokens(example.texts, encoded.offsets)
            for first, last in _windows(len(encoded.ids), first_tokens[first_tokens >= 0], limit):
                words = np.flatnonzero((first_tokens >= first) & (first_tokens < last))
                sample = _sample([*before, *encoded.ids[first:last].tolist(), *after])
                positions = first_tokens[words] - first + len(before)
                sequences.append(LabeledSequence(sample, positions, labels[-1][words], words + num_words))
            num_words += len(example.texts)
        on_progress((begin + len(group)) / len(examples))
    return LabeledData(tuple(sequences), np.concatenate(labels), np.array(starts, np.int64))


def _first_tokens(words: Sequence[str], offsets_N2: NDArray[Any]) -> NDArray[np.int64]:
    """Return the first token of each word of a text joined by spaces; -1 for a word without one of its own."""
    tokens: list[int] = []
    offsets, token, begin = offsets_N2.tolist(), 0, 0
    for word in words:
        # Empty tokens, and those of the space before the word, don't belong to it.
        while token < len(offsets) and (offsets[token][1] <= begin or offsets[token][0] == offsets[token][1]):
            token += 1
        is_own = token < len(offsets) and offsets[token][0] < begin + len(word) and token not in tokens[-1:]
        tokens.append(token if is_own else -1)
        begin += len(word) + 1
    return np.array(tokens, np.int64)


def _windows(length: int, starts: NDArray[np.int64], limit: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of at most `limit` tokens that begin at words and together contain the first token of each."""
    first = 0
    while len(starts) and first < length:
        last = min(length, first + limit)
        if last < length:  # end before a word, unless this word is longer than the limit
            inside = starts[(starts > first) & (starts <= last)]
            last = int(inside[-1]) if len(inside) else last
        yield first, last
        after = starts[starts >= last]
        first = int(after[0]) if len(after) else length
