"""Room card: what passes between rooms.

Comes in: nothing. Goes out: the data (Text, Cut, Batch, Puzzle, Loss) and the protocols (Encoder, Head, Objective,
Sampler, Source, Sink) that every other room speaks. Called by: everyone from floor 1 up.

Shape legend (the only one in the house):
  B texts · T token slots, all texts laid end to end · M positions asked about · S slots of one text, at most
  D width · H heads · K head width · F feed-forward width · V vocabulary · L layers · N anything else
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


WORD_START = 1  # bits of token_flags_T
SENTENCE_START = 2
SPECIAL = 4

FILLER_ID = 0  # what a filler text consists of; nothing asks about it and no other text sees it


class TokenSpan(NamedTuple):
    """Tokens [first, last) of one document, in segment 0 or 1."""

    document: int
    first: int
    last: int
    segment: int = 0


@dataclass(frozen=True)
class SampleSpec:
    """One sample before its ids are fetched: its spans, its place in the order and a label (of a pair), if any."""

    epoch: int
    number: int
    spans: tuple[TokenSpan, ...]
    pair_label: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the documents in it (special tokens that frame it are not counted)."""
        return sum(span.last - span.first for span in self.spans)


@dataclass(frozen=True)
class Sample:
    """One sample with its special tokens: a window, a document, a pair. The unit of masking, order and attention."""

    ids: NDArray[np.integer[Any]]  # (n,)
    token_flags: NDArray[np.uint8]  # (n,) bits WORD_START, SENTENCE_START, SPECIAL
    epoch: int = 0
    number: int = 0
    token_type_ids: NDArray[np.integer[Any]] | None = None  # (n,) 0 or 1
    pair_label: int | None = None


@dataclass(frozen=True)
class Batch:
    """Texts laid end to end; `starts` are the numbers of `cu_seqlens` on the host, so that nothing waits for a GPU."""

    ids_T: Int[Tensor, "T"]  # int64
    cu_seqlens: Int[Tensor, "B1"]  # int32, cumulative: text b holds slots [starts[b], starts[b + 1])
    offsets: tuple[int, ...]
    max_seqlen: int
    token_flags_T: UInt8[Tensor, "T"]
    sample_keys_B2: Int[Tensor, "B 2"]  # epoch and number of each text: the key of every draw
    token_type_ids_T: Int[Tensor, "T"] | None = None
    pair_labels_B: Int[Tensor, "B"] | None = None
    look: Literal["both", "left"] = "both"
    filler: int = 0  # slots of the filler text that ends the batch (0: there is none)
    progress: float = 0.0  # the share of the planned tokens that lies before its step: what a schedule goes by

    @property
    def num_samples(self) -> int:
        """Texts, the filler text not counted."""
        return len(self.offsets) - 1 - (1 if self.filler else 0)

    @property
    def tokens(self) -> int:
        """Slots that hold a real token."""
        return self.offsets[-1] - self.filler

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device (asynchronously, where its memory is pinned)."""
        if str(device) == "cpu":
            return self
        from torch import Tensor

        moved = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def pack(texts: Sequence[Sample], *, slots: int | None = None, look: Literal["both", "left"] = "both") -> Batch:
    """Lay texts end to end, in the order given; with `slots`, a filler text of its own brings them to that number.

    Trailing padding must be a sequence of its own: rows beyond the last start have NaN gradients in variable-length
    attention (pytorch#176793). This and `unpack` are the only places that make or undo the layout.
    """
    import torch

    assert texts, "a batch holds at least one text"
    lengths = [len(text.ids) for text in texts]
    filler = 0 if slots is None else slots - sum(lengths)
    assert filler >= 0, f"{sum(lengths)} tokens do not fit in {slots} slots"
    ids = np.concatenate([text.ids for text in texts] + [np.full(filler, FILLER_ID)]).astype(np.int64)
    marks = np.concatenate([text.token_flags for text in texts] + [np.full(filler, SPECIAL)]).astype(np.uint8)
    samples = [(text.epoch, text.number) for text in texts]
    if filler:
        lengths.append(filler)
        samples.append((0, 0))
    starts = (0, *np.cumsum(lengths).tolist())
    token_type_ids_T = pair_labels_B = None
    if texts[0].token_type_ids is not None:
        segments = [text.token_type_ids for text in texts if text.token_type_ids is not None]
        token_type_ids_T = torch.from_numpy(np.concatenate([*segments, np.zeros(filler)]).astype(np.int64))
    if texts[0].pair_label is not None:
        pair_labels_B = torch.tensor([text.pair_label for text in texts] + [-1] * (filler > 0), dtype=torch.int64)
    return Batch(
        ids_T=torch.from_numpy(ids),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        offsets=starts,
        max_seqlen=max(lengths),
        token_flags_T=torch.from_numpy(marks),
        sample_keys_B2=torch.tensor(samples, dtype=torch.int64),
        token_type_ids_T=token_type_ids_T,
        pair_labels_B=pair_labels_B,
        look=look,
        filler=filler,
    )


def unpack(x_TN: Tensor, batch: Batch) -> list[Tensor]:
    """The rows of each text, the filler left out: the inverse of `pack` for anything that has a row per slot."""
    return [x_TN[batch.offsets[b] : batch.offsets[b + 1]] for b in range(batch.num_samples)]


@dataclass(frozen=True)
class MaskedBatch:
    """A corrupted batch and what is asked of it. All that is random was drawn here; a loss draws only dropout."""

    batch: Batch  # ids_T as the encoder sees them
    positions_M: Int[Tensor, "M"]  # slots asked about, ascending
    labels_M: Int[Tensor, "M"]  # the original ids
    weights_M: Float[Tensor, "M"]
    chance_M: Float[Tensor, "M"]  # one uniform draw per asked slot, for objectives that sample
    denominators: Mapping[str, int]  # term -> what its sum is divided by, e.g. {"mlm": M, "pair": B}
    num_maskable: int  # slots that might have been asked about: the realised rate is M ÷ askable

    def to(self, device: torch.device | str) -> MaskedBatch:
        """The same puzzle on another device."""
        if str(device) == "cpu":
            return self
        names = ("positions_M", "labels_M", "weights_M", "chance_M")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, batch=self.batch.to(device), **moved)


@dataclass(frozen=True)
class LossSums:
    """Sums, not means: the loop divides once, by the counts of all micro-batches and ranks."""

    sums: Mapping[str, Tensor]  # term -> scalar with gradient
    metrics: Mapping[str, tuple[Tensor, int]] = field(
        default_factory=dict
    )  # metric -> (sum, count); adds over anything


@runtime_checkable
class Encoder(Protocol):
    """Ids in, one vector per slot out. Texts of a batch never see each other."""

    width: int
    vocabulary: int

    @property
    def token_embedding(self) -> nn.Parameter:
        """The embedding matrix, vocabulary × width, for tying."""
        ...

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """What sharding and compilation wrap."""
        ...

    def __call__(self, batch: Batch) -> Float[Tensor, "T D"]:
        """One vector per slot."""
        ...


@runtime_checkable
class Head(Protocol):
    """Vectors at the asked positions in, logits over the vocabulary out; never called with all T slots."""

    def __call__(self, hidden_MD: Float[Tensor, "M D"], token_embedding_VD: Tensor) -> Float[Tensor, "M V"]:
        """Logits at the asked positions."""
        ...


class Vocabulary(Protocol):
    """The pieces that ids stand for."""

    @property
    def size(self) -> int:
        """Ids run from 0 to size - 1."""
        ...

    @property
    def mask_id(self) -> int:
        """The id of [MASK]."""
        ...

    @property
    def regular_token_ids(self) -> NDArray[np.int64]:
        """The ids that may stand in another's place: all but special pieces."""
        ...

    def token_to_id(self, piece: str) -> int | None:
        """The id of a piece, or None where there is no such piece."""
        ...

    def id_to_token(self, id: int) -> str:
        """The piece of an id."""
        ...


@dataclass(frozen=True)
class ObjectiveContext:
    """What an objective from outside is made with, beside its settings."""

    vocabulary: Vocabulary
    width: int  # of the encoder's vectors, for an objective with parts of its own


@dataclass(frozen=True)
class SamplerContext:
    """What a sampler from outside is made with, beside its settings."""

    lengths_N: Int[np.ndarray, "N"]  # tokens of each document; some may have none
    length: int  # tokens that a sample may hold, special pieces not counted
    seed: int


@dataclass(frozen=True)
class SourceContext:
    """What a source from outside is made with, beside its settings."""

    paths: tuple[Path, ...]  # what was given as TEXT, absolute; may be empty


class Objective(Protocol):
    """What is hidden, what is asked, what it costs."""

    loss_weights: Mapping[str, float]  # name -> weight in the step's loss
    metrics: Sequence[str]  # the names in a loss's `seen`; "loss" is one, nats over what was asked
    sampler: str  # what its samples are: "windows"; "next-sentence" or "sentence-order", pairs with labels
    modules: nn.Module  # its own parameters, saved as objective.safetensors (an empty module where it has none)
    fills: bool  # whether encoder + head answer masks

    def corrupt(self, batch: Batch, seed: int) -> MaskedBatch:
        """Pure: draws are a function of the seed and each text's (epoch, number), never of a generator.

        What changes over a run is a function of `batch.progress`.
        """
        ...

    def loss(self, encoder: nn.Module, head: nn.Module, masked: MaskedBatch) -> LossSums:
        """Sums over what was asked."""
        ...


class Sampler(Protocol):
    """Cuts documents into samples: pure, on anchors that make the number of samples of an epoch known."""

    def count(self, epoch: int) -> int:
        """Samples in this epoch."""
        ...

    def cut(self, epoch: int, sample: int) -> SampleSpec:
        """Sample `sample` of this epoch, 0 <= sample < count(epoch)."""
        ...


class SourceShard(NamedTuple):
    """A piece of a source that one worker reads: a file, or a range of its bytes."""

    path: str
    first_byte: int
    last_byte: int


class DocumentChunk(NamedTuple):
    """Up to about a million characters of one document; longer documents come in several, in order."""

    document: int  # number of the document within the source
    piece: int  # 0 for the first passage of a document
    text: str  # NFC
    characters: int  # of the source's text that it stands for, the line ends that part it from the next included
    last: bool  # whether the document ends here


class InputGroup(NamedTuple):
    """One of the texts that a person named: so many of a source's parts, in order."""

    name: str
    weight: float  # share of the training tokens that it shall have; 0.0: no weight was given
    parts: int


class Source(Protocol):
    """Where documents come from.

    A source of several texts may say so in `groups` (a sequence of Group that covers its parts in order); one that
    leaves out what it can't read counts it in `left_out` (a mapping from Part to a number, complete for a part when its
    `documents` have been read to the end).
    """

    @property
    def fingerprint(self) -> str:
        """Changes when the text or the settings that cut it into documents change."""
        ...

    def parts(self) -> Sequence[SourceShard]:
        """In a fixed order."""
        ...

    def documents(self, part: SourceShard) -> Iterator[DocumentChunk]:
        """The passages of one part, in order."""
        ...


class MetricLogger(Protocol):
    """Where measurements go."""

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """One line; written before the call returns."""
        ...

    def close(self) -> None:
        """Nothing comes after this."""
        ...


def logits_at(encoder: nn.Module, head: nn.Module, batch: Batch, positions_M: Int[Tensor, "M"]) -> Float[Tensor, "M V"]:
    """Logits over the vocabulary at the asked slots, float32: the only road from a batch to a distribution.

    The head never meets another slot, in training or evaluation, so that nothing of size T × V is ever made.
    """
    hidden_TD: Tensor = encoder(batch)
    logits_MV: Tensor = head(hidden_TD.index_select(0, positions_M), encoder.token_embedding)
    return logits_MV.float()


def runs(first_N: NDArray[np.int64], count_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers first, first + 1, ... of each of several runs, end to end."""
    before_N = np.cumsum(count_N) - count_N
    return np.arange(int(count_N.sum())) + np.repeat(first_N - before_N, count_N)
