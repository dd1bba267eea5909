"""Frozen evaluation sets for masked language modeling: loss, accuracy and bits per character.

A document is masked as a whole, with a fixed seed and a rate of 15 %, and then split into sequences. The masked tokens
and their replacements are therefore the same at every sequence length, for every run, recipe and seed.

Sentence pairs have evaluation sets of their own, with loss and accuracy. They are drawn once with a fixed seed and
masked at 15 %. They are the same for all runs with the same tokenizer and length, at any seed, mask rate and loss
weight. Half of the pairs have label 0, so chance is an accuracy of 50 %. With 2,048 pairs, its standard error is 1.1
percentage points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from unmask.core.distributed import DistributedContext
from unmask.core.errors import TextError
from unmask.core.types import SPECIAL, Batch, DocumentChunk, MaskedBatch, Sample, Source, logits_at, pack
from unmask.data.loader import read_sample
from unmask.data.sampling import eval_windows
from unmask.data.sentence_pairs import PairKind, PairSampler
from unmask.data.shards import Shards
from unmask.data.split import number_documents
from unmask.data.workers import batch_by_characters
from unmask.objectives.masking import Integers, MaskingConfig, PackedSequences, corrupt_tokens, select_positions
from unmask.objectives.mlm import masked_batch
from unmask.objectives.sentence_pairs import pair_loss
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.words import WordsRule

EVAL_SEED: Final = 20181011  # date of BERT's arXiv submission; changing it makes results incomparable
EVAL_MASKING: Final = MaskingConfig()  # 15 % of single tokens, 80/10/10
_BATCH_TOKENS: Final = 16_384


@dataclass(frozen=True)
class Document:
    """Token ids and flags of a document, without [CLS] and [SEP], and its length in characters."""

    ids: NDArray[np.integer[Any]]
    token_flags: NDArray[np.uint8]
    characters: int
    unknown_characters: int = 0


@dataclass(frozen=True)
class EvalSet:
    """Frozen masked batches, and statistics of their text."""

    batches: tuple[MaskedBatch, ...]
    length: int
    masked_tokens: int
    tokens: int  # without [UNK]
    characters: int  # without those of [UNK]
    unknown_share: float  # share of [UNK] among the tokens
    unigram_loss: float  # nats per masked token under the unigram distribution of the training text
    unknown_character_share: float = 0.0  # of the characters, those that the tokenizer reads as [UNK] or drops


@dataclass(frozen=True)
class EvalResult:
    """A model's result on an evaluation set."""

    loss: float  # nats per masked token
    accuracy: float
    bits_per_character: float
    unigram_loss: float
    masked_tokens: int
    length: int
    unknown_share: float  # share of [UNK] among the tokens
    unknown_character_share: float = 0.0  # share of the characters that are [UNK] or dropped

    def __repr__(self) -> str:
        """Return the results in three lines."""
        return (
            f"{type(self).__name__}(loss {self.loss:.3f} nats per masked token (unigram baseline "
            f"{self.unigram_loss:.3f}), accuracy {self.accuracy:.1%}\n"
            f"  bits per character: {self.bits_per_character:.3f}; unknown: {self.unknown_share:.1%} of the tokens, "
            f"{self.unknown_character_share:.1%} of the characters\n"
            f"  masked tokens: {self.masked_tokens:,}; sequences of at most {self.length:,} tokens)"
        )


def build_eval_set(
    documents: Sequence[Document], tokenizer: Tokenizer, length: int, counts_V: NDArray[np.integer[Any]]
) -> EvalSet:
    """Mask 15 % of every document, then split it into sequences of at most `length` tokens.

    Args:
        documents: Documents to evaluate on. At least one of their tokens must be maskable.
        tokenizer: The model's tokenizer.
        length: Maximum length of a sequence in tokens, special tokens included.
        counts_V: Count of each token id in the training text, for the unigram loss with add-one smoothing.

    Raises:
        TextError: no token of the documents can be masked.
    """
    num_special_tokens = tokenizer.num_special_tokens()
    samples: list[Sample] = []
    targets: list[tuple[Integers, Integers]] = []  # masked positions within the sample, and their labels
    for number, document in enumerate(documents):
        if not len(document.ids):
            continue
        packed = PackedSequences(document.token_flags, np.array([0, len(document.ids)]), np.array([[0, number]]))
        positions_M = select_positions(packed, EVAL_MASKING, EVAL_SEED)
        corrupted = corrupt_tokens(
            document.ids,
            positions_M,
            packed,
            EVAL_MASKING,
            EVAL_SEED,
            mask_id=tokenizer.mask_id,
            regular_token_ids=tokenizer.regular_token_ids,
        )
        for spec in eval_windows(np.array([len(document.ids)]), length - num_special_tokens):
            first, last = spec.spans[0].first, spec.spans[0].last
            samples.append(
                Sample(*tokenizer.add_special_tokens(corrupted[first:last], document.token_flags[first:last]))
            )
            window_M = positions_M[(positions_M >= first) & (positions_M < last)]
            targets.append((window_M - first + len(tokenizer.frame.before), document.ids[window_M].astype(np.int64)))
    batches = tuple(_masked_batches(samples, targets))
    labels = np.concatenate([labels for _, labels in targets]) if targets else np.empty(0, np.int64)
    if not len(labels):
        raise TextError(
            "no token of the evaluation text can be masked: the tokenizer encodes all of it as [UNK]",
            hint="give more text, or text that the tokenizer can encode",
        )
    tokens = sum(len(document.ids) for document in documents)
    characters = sum(document.characters for document in documents)
    unknown_characters = sum(document.unknown_characters for document in documents)
    unknown = sum(int((document.token_flags & SPECIAL).astype(bool).sum()) for document in documents)
    return EvalSet(
        batches=batches,
        length=length,
        masked_tokens=len(labels),
        tokens=tokens - unknown,
        characters=characters - unknown_characters,
        unknown_share=unknown / tokens,
        unigram_loss=float(unigram_losses(counts_V, tokenizer)[labels].mean()),
        unknown_character_share=unknown_characters / max(1, characters),
    )


def unigram_losses(counts_V: NDArray[np.integer[Any]], tokenizer: Tokenizer) -> NDArray[np.float64]:
    """Return the nats of each token id under the unigram distribution of counts, with add-one smoothing.

    Special tokens have 0: they are never masked.
    """
    smoothed = (counts_V + 1)[tokenizer.regular_token_ids]
    unigram_V = np.zeros(len(counts_V))
    unigram_V[tokenizer.regular_token_ids] = -np.log(smoothed / smoothed.sum())
    return unigram_V


def _masked_batches(samples: Sequence[Sample], targets: Sequence[tuple[Integers, Integers]]) -> Iterator[MaskedBatch]:
    """Yield batches of samples of similar length. The longest come first, so that a lack of memory shows early."""
    order = sorted((i for i in range(len(samples)) if len(targets[i][0])), key=lambda i: (-len(samples[i].ids), i))
    while order:
        group = [order.pop(0)]
        tokens = len(samples[group[0]].ids)
        while order and tokens + len(samples[order[0]].ids) <= _BATCH_TOKENS:
            tokens += len(samples[order[0]].ids)
            group.append(order.pop(0))
        batch = pack([samples[i] for i in group])
        positions_M = np.concatenate([targets[i][0] + batch.offsets[b] for b, i in enumerate(group)])
        labels_M = np.concatenate([targets[i][1] for i in group])
        yield masked_batch(batch, batch.ids_T.numpy(), positions_M, labels_M)


@torch.inference_mode()
def evaluate(
    encoder: nn.Module,
    head: nn.Module,
    eval_set: EvalSet,
    context: DistributedContext,
    on_batch: Callable[[MaskedBatch, Tensor], None] | None = None,
) -> EvalResult:
    """Return the result over all masked tokens. The batches are distributed over the ranks.

    `on_batch` is called with each batch of this rank and its logits, (M, V) in float32.
    """
    encoder.eval()
    head.eval()
    nats = correct = 0.0
    for masked in eval_set.batches[context.rank :: context.ranks]:
        on_device = masked.to(context.device)
        with context.autocast():
            logits_MV = logits_at(encoder, head, on_device.batch, on_device.positions_M)
        nats += float(F.cross_entropy(logits_MV, on_device.labels_M, reduction="sum"))
        correct += float((logits_MV.argmax(-1) == on_device.labels_M).sum())
        if on_batch:
            on_batch(masked, logits_MV)
    nats, correct = context.sum([nats, correct])
    loss = nats / eval_set.masked_tokens
    return EvalResult(
        loss=loss,
        accuracy=correct / eval_set.masked_tokens,
        bits_per_character=loss * eval_set.tokens / eval_set.characters / math.log(2),
        unigram_loss=eval_set.unigram_loss,
        masked_tokens=eval_set.masked_tokens,
        length=eval_set.length,
        unknown_share=eval_set.unknown_share,
        unknown_character_share=eval_set.unknown_character_share,
    )


@dataclass(frozen=True)
class SourceDocuments:
    """Tokenized documents from the beginning of a source."""

    documents: Sequence[Document]
    characters: int  # number of characters read, document separators included
    complete: bool  # whether the whole source was read


def documents_from_source(
    source: Source, tokenizer: Tokenizer, words: WordsRule, max_characters: float = float("inf")
) -> SourceDocuments:
    """Return the tokenized documents in the first `max_characters` characters of a source.

    Raises:
        TextError: the text can't be read.
    """
    documents: list[Document] = []
    open_document: list[Document] = []  # chunks of the current document, until its last chunk has been read
    characters, complete = 0, True
    all_chunks = (chunk for _, chunk in number_documents(source, source.parts()))
    for chunks in batch_by_characters(all_chunks, lambda chunk: len(chunk.text)):
        batch: list[DocumentChunk] = []
        for chunk in chunks:
            remaining = max_characters - characters
            if chunk.characters > remaining:
                chunk = chunk._replace(text=chunk.text[: int(remaining)], characters=int(remaining))
                complete = False
            batch.append(chunk)
            characters += chunk.characters
            if not complete:
                break
        encodings = tokenizer.encode_batch([chunk.text for chunk in batch], words)
        for chunk, encoded in zip(batch, encodings, strict=True):
            open_document.append(Document(encoded.ids, encoded.marks, chunk.characters, encoded.characters_unknown))
            if chunk.last or (not complete and chunk is batch[-1]):
                documents.append(_join(open_document))
                open_document = []
        if not complete:
            break
    return SourceDocuments([document for document in documents if document.characters], characters, complete)


def documents_from_shards(shards: Shards) -> list[Document]:
    """Return the tokenized documents of token shards.

    Raises:
        TextError: all documents are empty.
    """
    characters, unknown = shards.document_characters.tolist(), shards.document_unknown_characters.tolist()
    lengths = shards.lengths.tolist()
    documents = [
        Document(
            shards.ids(number, 0, length), shards.token_flags(number, 0, length), characters[number], unknown[number]
        )
        for number, length in enumerate(lengths)
    ]
    if not any(lengths):
        raise TextError("the held-out text is empty", hint="hold out more: --set data.held_out.fraction=10%")
    return documents


def _join(chunks: Sequence[Document]) -> Document:
    """Return the concatenation of the chunks of one document."""
    if len(chunks) == 1:
        return chunks[0]
    return Document(
        np.concatenate([chunk.ids for chunk in chunks]),
        np.concatenate([chunk.token_flags for chunk in chunks]),
        sum(chunk.characters for chunk in chunks),
        sum(chunk.unknown_characters for chunk in chunks),
    )


# Sentence pairs -------------------------------------------------------------------------------------------------------


MAX_PAIRS: Final = 2048


@dataclass(frozen=True)
class PairEvalSet:
    """Frozen batches of sentence pairs with masked tokens."""

    batches: tuple[Batch, ...]
    length: int
    pairs: int


@dataclass(frozen=True)
class PairEvalResult:
    """A model's result on frozen pairs."""

    loss: float  # nats per pair
    accuracy: float
    pairs: int
    length: int
    # accuracy by sequence length of the current stage; empty in the last stage
    earlier: Mapping[int, float] = field(default_factory=dict[int, float])


def build_pair_eval_set(shards: Shards, tokenizer: Tokenizer, length: int, kind: PairKind) -> PairEvalSet:
    """Return masked pairs of at most `length` tokens, special tokens included, drawn from held-out documents.

    Raises:
        TextError: too few documents have two sentences.
    """
    try:
        pairs = PairSampler(shards, length - tokenizer.num_special_tokens(2), EVAL_SEED, kind)
    except TextError as error:
        raise TextError(
            f"not enough held-out text for sentence pairs: {error.message}",
            location="data.held_out",
            hint="hold out more: --set data.held_out.fraction=20%",
        ) from error
    samples = [read_sample(shards, spec, tokenizer) for spec in pairs.specs(0, 0, min(pairs.count(0), MAX_PAIRS))]
    samples.sort(key=lambda sample: (-len(sample.ids), sample.number))
    groups: list[list[Sample]] = []
    remaining = 0
    for sample in samples:
        if len(sample.ids) > remaining:
            groups.append([])
            remaining = _BATCH_TOKENS
        groups[-1].append(sample)
        remaining -= len(sample.ids)
    return PairEvalSet(tuple(_masked(group, tokenizer) for group in groups), length, len(samples))


def _masked(samples: Sequence[Sample], tokenizer: Tokenizer) -> Batch:
    batch = pack(samples)
    packed = PackedSequences.from_batch(batch)
    positions_M = select_positions(packed, EVAL_MASKING, EVAL_SEED)
    ids_T = corrupt_tokens(
        batch.ids_T.numpy(),
        positions_M,
        packed,
        EVAL_MASKING,
        EVAL_SEED,
        mask_id=tokenizer.mask_id,
        regular_token_ids=tokenizer.regular_token_ids,
    )
    return replace(batch, ids_T=torch.from_numpy(ids_T))


@torch.inference_mode()
def evaluate_pairs(
    encoder: nn.Module, pair_head: nn.Module, eval_set: PairEvalSet, context: DistributedContext
) -> PairEvalResult:
    """Return mean loss and accuracy over all pairs. The batches are distributed over the ranks."""
    encoder.eval()
    pair_head.eval()
    nats = correct = 0.0
    for cpu_batch in eval_set.batches[context.rank :: context.ranks]:
        batch = cpu_batch.to(context.device)
        with context.autocast():
            batch_nats, batch_correct = pair_loss(pair_head, encoder(batch), batch)
        nats, correct = nats + float(batch_nats), correct + float(batch_correct)
    nats, correct = context.sum([nats, correct])
    return PairEvalResult(nats / eval_set.pairs, correct / eval_set.pairs, eval_set.pairs, eval_set.length)
