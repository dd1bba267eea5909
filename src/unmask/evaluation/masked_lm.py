"""Room card: held-out loss on frozen masks.

Comes in: held-out documents, a tokenizer. Goes out: a Frozen set of puzzles, and what a model makes of it: loss,
accuracy, bits per character, beside the unigram loss that a model must pass before it has learnt anything about
context. Called by: pretrain (validation), `unmask evaluate`.

A document is hidden once as a whole, with a constant of the house for a seed and always at 15 %, and only then cut
into windows: the asked characters and what stands in their place are the same at every length, for every run, recipe
and seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from unmask.core.distributed import DistributedContext
from unmask.core.errors import TextError
from unmask.core.types import SPECIAL, DocumentChunk, MaskedBatch, Sample, Source, logits_at, pack
from unmask.data.sampling import frozen
from unmask.data.shards import Shards
from unmask.objectives.masking import Integers, MaskingConfig, PackedSequences, corrupt_tokens, select_positions
from unmask.objectives.mlm import masked_batch
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.words import WordsRule

EVAL_SEED = 20181011  # the day BERT was submitted to arXiv; frozen, or no two results compare
EVAL_MASKING = MaskingConfig()  # 15 %, tokens, 80/10/10
_BATCH_TOKENS = 16_384


@dataclass(frozen=True)
class Document:
    """A held-out document: ordinary ids and marks without framing, and the characters of its text."""

    ids: NDArray[np.integer[Any]]
    marks: NDArray[np.uint8]
    characters: int
    unknown_characters: int = 0


@dataclass(frozen=True)
class EvalSet:
    """Puzzles that never change, and what is known of their text."""

    puzzles: tuple[MaskedBatch, ...]
    length: int
    masked_tokens: int
    tokens: int  # askable ones: [UNK] is left out
    characters: int  # likewise
    unknown_share: float  # of the tokens
    unigram_loss: float  # nats per asked token under the training text's unigram distribution


@dataclass(frozen=True)
class EvalResult:
    """What a model made of a frozen set."""

    loss: float  # nats per asked token
    accuracy: float
    bits_per_character: float
    unigram_loss: float
    masked_tokens: int
    length: int
    unknown_share: float


def build_eval_set(
    documents: Sequence[Document], tokenizer: Tokenizer, length: int, counts_V: NDArray[np.integer[Any]]
) -> EvalSet:
    """Hide 15 % of every document, then cut at `length` slots (special tokens included).

    Args:
        documents: at least one token to ask about among them.
        tokenizer: of the model.
        length: slots of a text, framing included.
        counts_V: how often each id stands in the training text, for the unigram loss (one is added to each).

    Raises:
        TextError: nothing in the documents can be asked about.
    """
    num_special_tokens = 2 if tokenizer.cls_sep_ids else 0
    texts: list[Sample] = []
    asked: list[tuple[Integers, Integers]] = []
    for number, document in enumerate(documents):
        if not len(document.ids):
            continue
        packed = PackedSequences(document.marks, np.array([0, len(document.ids)]), np.array([[0, number]]))
        positions_M = select_positions(packed, EVAL_MASKING, EVAL_SEED)
        hidden = corrupt_tokens(
            document.ids,
            positions_M,
            packed,
            EVAL_MASKING,
            EVAL_SEED,
            mask_id=tokenizer.mask_id,
            regular_token_ids=tokenizer.regular_token_ids,
        )
        for cut in frozen(np.array([len(document.ids)]), length - num_special_tokens):
            first, last = cut.spans[0].first, cut.spans[0].last
            ids, marks = tokenizer.add_special_tokens(hidden[first:last], document.marks[first:last])
            texts.append(Sample(ids, marks))
            inside = positions_M[(positions_M >= first) & (positions_M < last)]
            asked.append((inside - first + num_special_tokens // 2, document.ids[inside].astype(np.int64)))
    masked_batches = tuple(_packed(texts, asked))
    answer_N = np.concatenate([a for _, a in asked]) if asked else np.empty(0, np.int64)
    if not len(answer_N):
        raise TextError(
            "the held-out text has nothing to ask about: the tokenizer knows none of it",
            hint="give more text, or text that the tokenizer knows",
        )
    ordinary = (counts_V + 1)[tokenizer.regular_token_ids]
    unigram_V = np.zeros(len(counts_V))
    unigram_V[tokenizer.regular_token_ids] = -np.log(ordinary / ordinary.sum())
    slots = sum(len(document.ids) for document in documents)
    unknown = sum(int((document.marks & SPECIAL).astype(bool).sum()) for document in documents)
    return EvalSet(
        puzzles=masked_batches,
        length=length,
        masked_tokens=len(answer_N),
        tokens=slots - unknown,
        characters=sum(document.characters - document.unknown_characters for document in documents),
        unknown_share=unknown / slots,
        unigram_loss=float(unigram_V[answer_N].mean()),
    )


def _packed(texts: Sequence[Sample], asked: Sequence[tuple[Integers, Integers]]) -> list[MaskedBatch]:
    """Batches of texts of like length, longest first, so that a set too large for memory fails at once."""
    order = sorted((i for i in range(len(texts)) if len(asked[i][0])), key=lambda i: (-len(texts[i].ids), i))
    masked_batches: list[MaskedBatch] = []
    while order:
        group = [order.pop(0)]
        tokens = len(texts[group[0]].ids)
        while order and tokens + len(texts[order[0]].ids) <= _BATCH_TOKENS:
            tokens += len(texts[order[0]].ids)
            group.append(order.pop(0))
        batch = pack([texts[i] for i in group])
        positions_M = np.concatenate([asked[i][0] + batch.offsets[b] for b, i in enumerate(group)])
        labels_M = np.concatenate([asked[i][1] for i in group])
        masked_batches.append(
            masked_batch(batch, batch.ids_T.numpy(), positions_M, labels_M, np.zeros(len(positions_M)))
        )
    return masked_batches


@torch.inference_mode()
def evaluate(encoder: nn.Module, head: nn.Module, held: EvalSet, world: DistributedContext) -> EvalResult:
    """Mean loss and accuracy over everything asked; ranks share the puzzles."""
    encoder.eval()
    head.eval()
    nats = right = 0.0
    for one in held.puzzles[world.rank :: world.ranks]:
        here = one.to(world.device)
        with world.autocast():
            logits_MV = logits_at(encoder, head, here.batch, here.positions_M)
        nats += float(F.cross_entropy(logits_MV, here.labels_M, reduction="sum"))
        right += float((logits_MV.argmax(-1) == here.labels_M).sum())
    nats, right = world.sum([nats, right])
    loss = nats / held.masked_tokens
    return EvalResult(
        loss=loss,
        accuracy=right / held.masked_tokens,
        bits_per_character=loss * held.tokens / held.characters / math.log(2),
        unigram_loss=held.unigram_loss,
        masked_tokens=held.masked_tokens,
        length=held.length,
        unknown_share=held.unknown_share,
    )


_BATCH_CHARACTERS: Final = 1_000_000  # encoded at a time; what an encoding holds is many times its text
_BATCH_PASSAGES: Final = 8192


@dataclass(frozen=True)
class Gathered:
    """Documents in hand, and what of the source they are."""

    documents: Sequence[Document]
    characters: int  # of the source, what parts its documents included
    whole: bool  # whether the source was read to its end


def documents_of_source(
    source: Source, tokenizer: Tokenizer, words: WordsRule, max_size: float = float("inf")
) -> Gathered:
    """The first `max_size` characters of a source as tokens; memory is bounded by them.

    Raises:
        TextError: the text can't be read.
    """
    documents: list[Document] = []
    open_pieces: list[Document] = []  # of a document whose end has not come yet
    taken, whole = 0, True
    for held in _batches(source):
        last: list[DocumentChunk] = []
        for passage in held:
            left = max_size - taken
            if passage.characters > left:
                passage, whole = passage._replace(text=passage.text[: int(left)], characters=int(left)), False
            last.append(passage)
            taken += passage.characters
            if not whole:
                break
        for passage, encoded in zip(last, tokenizer.encode_batch([one.text for one in last], words), strict=True):
            open_pieces.append(Document(encoded.ids, encoded.marks, passage.characters, encoded.characters_unknown))
            if passage.last or (not whole and passage is last[-1]):
                documents.append(_joined(open_pieces))
                open_pieces = []
        if not whole:
            break
    return Gathered([one for one in documents if one.characters], taken, whole)


def _batches(source: Source) -> Iterator[list[DocumentChunk]]:
    """The passages of a source, some at a time."""
    held: list[DocumentChunk] = []
    size = 0
    for part in source.parts():
        for passage in source.documents(part):
            held.append(passage)
            size += len(passage.text)
            if size >= _BATCH_CHARACTERS or len(held) >= _BATCH_PASSAGES:
                yield held
                held, size = [], 0
    yield held


def documents_of_shards(shards: Shards) -> list[Document]:
    """The documents of a shard set with something in them, in hand.

    Raises:
        TextError: there is nothing in it.
    """
    characters, unknown = shards.characters_N.tolist(), shards.unknown_characters_N.tolist()
    lengths = shards.lengths_N.tolist()
    documents = [
        Document(shards.ids(number, 0, length), shards.marks(number, 0, length), characters[number], unknown[number])
        for number, length in enumerate(lengths)
    ]
    if not any(lengths):
        raise TextError("the held-out text is empty", hint="hold out more: --set data.held_out.fraction=10%")
    return documents


def _joined(pieces: Sequence[Document]) -> Document:
    """The passages of one document as one."""
    if len(pieces) == 1:
        return pieces[0]
    return Document(
        np.concatenate([piece.ids for piece in pieces]),
        np.concatenate([piece.marks for piece in pieces]),
        sum(piece.characters for piece in pieces),
        sum(piece.unknown_characters for piece in pieces),
    )
