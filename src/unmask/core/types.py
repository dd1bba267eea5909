"""Data that passes between packages (samples, batches, masked batches, losses) and the protocols of plugins.

Shape suffixes of tensors:
  B samples · T tokens of a batch, all samples concatenated · M masked positions · S tokens per sample, padded
  D hidden size · H attention heads · K head size · F feed-forward size · V vocabulary · L layers · N anything else
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ProgressCallback = Callable[[str, float], None]  # called with the name of a stage and the fraction of it that is done

# Bits of token_flags
WORD_START = 1
SENTENCE_START = 2
SPECIAL = 4  # a special token, [UNK] included: never masked


# Samples and batches ------------------------------------------------------------------------------------------------


class TokenSpan(NamedTuple):
    """Tokens [first, last) of one document, in segment 0 or 1 of a sample."""

    document: int
    first: int
    last: int
    segment: int = 0


@dataclass(frozen=True)
class SampleSpec:
    """A sample before its token ids are read: spans of documents, its key, and the label of a sentence pair."""

    epoch: int
    number: int
    spans: tuple[TokenSpan, ...]
    pair_label: int | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens, without [CLS] and [SEP]."""
        return sum(span.last - span.first for span in self.spans)


@dataclass(frozen=True)
class Sample:
    """Token ids of one sequence with its special tokens: the unit of masking, order and attention."""

    ids: NDArray[np.integer[Any]]  # (n,)
    token_flags: NDArray[np.uint8]  # (n,) bits WORD_START, SENTENCE_START, SPECIAL
    epoch: int = 0
    number: int = 0
    token_type_ids: NDArray[np.integer[Any]] | None = None  # (n,) 0 or 1
    pair_label: int | None = None


@dataclass(frozen=True)
class Batch:
    """Samples packed end to end."""

    ids_T: Int[Tensor, "T"]  # int64
    cu_seqlens: Int[Tensor, "B1"]  # int32: sample b has the tokens [cu_seqlens[b], cu_seqlens[b + 1])
    offsets: tuple[int, ...]  # the numbers of cu_seqlens on the host, so that reading them doesn't wait for a GPU
    max_seqlen: int
    token_flags_T: UInt8[Tensor, "T"]
    sample_keys_B2: Int[Tensor, "B 2"]  # epoch and number of each sample: the key of its random draws
    token_type_ids_T: Int[Tensor, "T"] | None = None
    pair_labels_B: Int[Tensor, "B"] | None = None
    progress: float = 0.0  # fraction of the planned tokens that were processed before this step, for schedules
    step: int = 0  # number of steps before this one
    is_causal: bool = False  # whether each token attends only to itself and to the tokens before it

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.offsets[-1]

    def rounded(self) -> Batch:
        """Return the batch with samples of meaningless tokens at its end, so that its number of tokens is round."""
        import torch
        import torch.nn.functional as F

        size, tokens, longest = round_size(self.tokens), self.tokens, self.max_seqlen
        if size == tokens:
            return self
        ends = (*range(tokens + longest, size, longest), size)  # no added sample is longer than the others
        token_types_T, labels_B = self.token_type_ids_T, self.pair_labels_B
        return replace(
            self,
            ids_T=F.pad(self.ids_T, (0, size - tokens)),
            cu_seqlens=torch.cat((self.cu_seqlens, self.cu_seqlens.new_tensor(ends))),
            offsets=(*self.offsets, *ends),
            token_flags_T=F.pad(self.token_flags_T, (0, size - tokens), value=SPECIAL),
            sample_keys_B2=F.pad(self.sample_keys_B2, (0, 0, 0, len(ends)), value=-1),
            token_type_ids_T=None if token_types_T is None else F.pad(token_types_T, (0, size - tokens)),
            pair_labels_B=None if labels_B is None else F.pad(labels_B, (0, len(ends))),
        )

    def pinned(self) -> Batch:
        """Return a copy in page-locked memory."""
        from torch import Tensor

        return replace(
            self, **{name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, Tensor)}
        )

    def to(self, device: torch.device | str) -> Batch:
        """Return a copy on another device; the copy is asynchronous if the memory is pinned."""
        if str(device) == "cpu":
            return self
        from torch import Tensor

        moved = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def round_size(size: int) -> int:
    """Round a number of rows up, by at most 1/31, to a number whose binary digits after the first five or six are 0.

    On a CPU, bfloat16 matrix products of a new shape are compiled and kept. Batches of 2,048 to 2,111 tokens would have
    64 shapes for each matrix: steps took 16 % longer, and memory grew by 750 MB in 100 steps.
    """
    unit = 1 << max(0, size.bit_length() - 6)
    return -(-size // unit) * unit


def pack(samples: Sequence[Sample]) -> Batch:
    """Concatenate samples to a batch, in the given order."""
    import torch

    assert samples, "a batch has at least one sample"
    lengths = [len(sample.ids) for sample in samples]
    offsets = (0, *np.cumsum(lengths).tolist())
    token_type_ids_T = pair_labels_B = None
    if samples[0].token_type_ids is not None:
        token_type_ids = [sample.token_type_ids for sample in samples if sample.token_type_ids is not None]
        token_type_ids_T = torch.from_numpy(np.concatenate(token_type_ids).astype(np.int64))
    if samples[0].pair_label is not None:
        pair_labels_B = torch.tensor([sample.pair_label for sample in samples], dtype=torch.int64)
    return Batch(
        ids_T=torch.from_numpy(np.concatenate([sample.ids for sample in samples]).astype(np.int64)),
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
        offsets=offsets,
        max_seqlen=max(lengths),
        token_flags_T=torch.from_numpy(np.concatenate([sample.token_flags for sample in samples]).astype(np.uint8)),
        sample_keys_B2=torch.tensor([(sample.epoch, sample.number) for sample in samples], dtype=torch.int64),
        token_type_ids_T=token_type_ids_T,
        pair_labels_B=pair_labels_B,
    )


@dataclass(frozen=True)
class MaskedBatch:
    """A corrupted batch with its labels. Everything random was drawn here; a loss draws only dropout."""

    batch: Batch  # with the ids that the encoder gets
    positions_M: Int[Tensor, "M"]  # int64, ascending: the positions at which the loss predicts a token
    labels_M: Int[Tensor, "M"]  # int64: the original ids at these positions
    denominators: Mapping[str, int]  # loss term -> the number by which its sum is divided: {"mlm": M, "pair": B}
    num_maskable: int  # positions that could have been masked: the exact masking rate is M / num_maskable
    weights_M: Float[Tensor, "M"] | None = None  # float32: factor on the loss of each position; None: 1
    draws_M: Float[Tensor, "M"] | None = None  # float32: a uniform draw in [0, 1) for each position; None: not needed

    def pinned(self) -> MaskedBatch:
        """Return a copy in page-locked memory."""
        return replace(
            self, batch=self.batch.pinned(), **{name: value.pin_memory() for name, value in self._tensors().items()}
        )

    def to(self, device: torch.device | str) -> MaskedBatch:
        """Return a copy on another device."""
        if str(device) == "cpu":
            return self
        moved = {name: value.to(device, non_blocking=True) for name, value in self._tensors().items()}
        return replace(self, batch=self.batch.to(device), **moved)

    def _tensors(self) -> dict[str, Tensor]:
        from torch import Tensor

        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class LossSums:
    """Sums over a micro-batch, not means: the loop divides once, by the counts of all micro-batches and ranks."""

    sums: Mapping[str, Tensor]  # loss term -> scalar with gradient
    metrics: Mapping[str, tuple[Tensor, int]] = field(default_factory=dict)  # metric -> (sum, count)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)  # sums for `AdaptiveObjective.adapt`


def logits_at(encoder: nn.Module, head: nn.Module, batch: Batch, positions_M: Int[Tensor, "M"]) -> Float[Tensor, "M V"]:
    """Return float32 logits over the vocabulary at the given positions of a batch.

    The head gets the hidden states at these positions only, in training and evaluation, so that a tensor of shape
    T × V never exists. An encoder that was trained to predict the next token has `label_offset` 1: its hidden state
    before a position predicts the token there.
    """
    hidden_MD: Tensor = encoder(batch, positions_M - getattr(encoder, "label_offset", 0))
    logits_MV: Tensor = head(hidden_MD, encoder.token_embedding)
    return logits_MV.float()


class VocabularyHead(Protocol):
    """The last layers of a masked language model: some layers, then a linear decoder.

    A head is called as `head(hidden_MD, token_embedding_VD)` and returns logits, (M, V).
    """

    def features(self, hidden_MD: Tensor) -> Tensor:
        """Return what the decoder maps to logits, (M, D)."""
        ...

    def decoder_parameters(self, token_embedding_VD: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight (V, D) and bias (V) of the decoder. A tied decoder has the token embedding as its weight."""
        ...


def runs(first: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return first, first + 1, ... (`count` numbers) for each entry, concatenated."""
    before = np.cumsum(count) - count
    return np.arange(int(count.sum())) + np.repeat(first - before, count)


# Objectives ---------------------------------------------------------------------------------------------------------


class Vocabulary(Protocol):
    """Tokens and their ids."""

    @property
    def size(self) -> int:
        """Number of ids: they are 0 to size - 1."""
        ...

    @property
    def mask_id(self) -> int:
        """Id of [MASK]."""
        ...

    @property
    def regular_token_ids(self) -> NDArray[np.int64]:
        """Ids of all tokens but special ones: the ids that may replace a token."""
        ...

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, or None if it is not in the vocabulary."""
        ...

    def id_to_token(self, id: int) -> str:
        """Return the token of an id."""
        ...


@dataclass(frozen=True)
class ObjectiveContext:
    """The second argument of a plugin objective's constructor."""

    vocabulary: Vocabulary
    hidden_size: int  # of the encoder, for objectives with modules of their own


class Objective(Protocol):
    """Corrupts batches and computes the loss.

    Two attributes are optional. `validates` says how a run is validated: "masked-lm" (default) on frozen masked tokens,
    "own" by the metrics of the objective, or "both". `label_offset` is 1 if a hidden state predicts the token after it.
    """

    loss_weights: Mapping[str, float]  # loss term -> its weight in the loss of a step
    metrics: Sequence[str]  # names of the metrics in LossSums; one is "loss", the cross-entropy in nats
    sampler: str  # kind of samples: "windows", or pairs with labels: "next-sentence", "sentence-order"
    modules: nn.Module  # its parameters, saved as objective.safetensors; an empty module if it has none

    def corrupt(self, batch: Batch, seed: int) -> MaskedBatch:
        """Return the masked batch: a pure function of the seed and of the key (epoch, number) of each sample.

        No generator may be used. A schedule is a function of `batch.progress`.
        """
        ...

    def loss(self, encoder: nn.Module, head: nn.Module, masked: MaskedBatch) -> LossSums:
        """Return sums over the masked positions."""
        ...


@runtime_checkable
class AdaptiveObjective(Protocol):
    """An objective whose `corrupt` also depends on the results of earlier steps, kept in buffers of its `modules`."""

    def no_statistics(self) -> dict[str, Tensor]:
        """Return the statistics of a rank without samples: tensors of zeros."""
        ...

    def adapt(self, step: int, statistics: Mapping[str, Tensor]) -> None:
        """Process the statistics of a step, counted from 0, summed over micro-batches and ranks.

        The batch of the next step may be corrupted already: a step may only change that of the step after the next.
        """
        ...


# Samplers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplerContext:
    """The second argument of a plugin sampler's constructor."""

    lengths: NDArray[np.integer[Any]]  # tokens of each document; may be 0
    length: int  # maximum number of tokens of a sample, without special tokens
    seed: int


class Sampler(Protocol):
    """Divides documents into samples: a pure function of epoch and sample, with a known number of samples."""

    def count(self, epoch: int) -> int:
        """Return the number of samples of an epoch."""
        ...

    def spec(self, epoch: int, sample: int) -> SampleSpec:
        """Return sample `sample` of an epoch, 0 <= sample < count(epoch)."""
        ...


# Sources ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceContext:
    """The second argument of a plugin source's constructor."""

    paths: tuple[Path, ...]  # the TEXT arguments, as absolute paths; may be empty


class SourceShard(NamedTuple):
    """A part of a source that one worker reads: a file, or a range of its bytes."""

    path: str
    first_byte: int
    last_byte: int


class DocumentChunk(NamedTuple):
    """Up to about a million characters of one document; longer documents come in several chunks, in order."""

    document: int  # number of the document within the shard
    number: int  # of the chunk within the document
    text: str  # NFC
    characters: int  # characters of the source that the chunk covers, with the line ends before the next chunk
    last: bool  # whether this is the last chunk of the document


class InputGroup(NamedTuple):
    """A TEXT argument of the command line: some consecutive shards of a source."""

    name: str
    weight: float  # fraction of the training tokens; 0.0: no weight was given
    parts: int  # number of shards


class Source(Protocol):
    """Provides documents.

    Two attributes are optional. `groups` is a sequence of `InputGroup` that covers the shards in order. `left_out` maps
    a shard to the number of malformed rows that were skipped, complete once all its documents have been read.
    """

    @property
    def fingerprint(self) -> str:
        """A string that changes if the text, or a setting that divides it into documents, changes."""
        ...

    def parts(self) -> Sequence[SourceShard]:
        """Return the shards, in a fixed order."""
        ...

    def documents(self, part: SourceShard) -> Iterator[DocumentChunk]:
        """Yield the chunks of one shard, in order."""
        ...


# Loggers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoggerContext:
    """The second argument of a plugin logger's constructor."""

    run: Path  # directory of the run
    lines: Sequence[Mapping[str, Any]]  # lines of log.jsonl so far, which a resumed run does not write again
    recipe: str  # the recipe as TOML


class MetricLogger(Protocol):
    """Receives the lines of the log."""

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """Write one line."""
        ...

    def close(self) -> None:
        """Complete the output; no line follows."""
        ...
