"""Statistics of an audit: proportions with standard errors, p-values, and the observations that they come from.

Draws for one sample are not independent (quotas, whole words, spans), and a masker that repeats itself draws the same
in another epoch, worker or rank. So counts are summed over everything that may have been drawn together: a cluster is
one slot of one batch, in all epochs, workers and ranks. The standard error comes from the scatter of these sums. It is
valid whatever the masker does within a cluster.

A masker runs over the samples in every epoch, rank and worker. Each rank has a copy of the masker and a DataLoader over
its own samples, in the same order in every epoch, so that repeated masks appear at the same place. Ranks run one after
the other in this process. The global generators of torch, numpy and random are seeded before each rank and restored
afterwards.

Suffixes of arrays: V occurrences (a sample in one epoch), N samples, S positions, C clusters, P pairs, W words.
"""

from __future__ import annotations

import contextlib
import copy
import math
import multiprocessing
import random
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, Num
from torch.utils.data import DataLoader, Dataset

from unmask.checks.audit.maskers import IGNORED, AuditSamples, Masked, Masker, Row
from unmask.checks.audit.settings import AuditConfig, Claims
from unmask.core import rng
from unmask.core.errors import RecipeError
from unmask.core.types import ProgressCallback
from unmask.tokenization.tokenizer import Tokenizer

_REPORT_EVERY: Final = 8  # batches


@dataclass(frozen=True)
class MaskingRecord:
    """The outputs of a masker, one entry for each occurrence of a sample."""

    row_V: Int[np.ndarray, "V"]
    epoch_V: Int[np.ndarray, "V"]
    rank_V: Int[np.ndarray, "V"]
    worker_V: Int[np.ndarray, "V"]
    round_V: Int[np.ndarray, "V"]
    slot_V: Int[np.ndarray, "V"]
    shown_VS: Int[np.ndarray, "V S"]
    label_VS: Int[np.ndarray, "V S"]  # IGNORED beyond the end of a sample
    padding_V: Int[np.ndarray, "V"]  # number of padding positions
    padding_masked_V: Int[np.ndarray, "V"]

    @property
    def masked_VS(self) -> Bool[np.ndarray, "V S"]:
        """Whether each position has a label."""
        return self.label_VS != IGNORED

    def cluster_V(self, settings: AuditConfig) -> Int[np.ndarray, "V"]:
        """Return the cluster of each occurrence: a round and a slot, in any epoch, worker and rank."""
        return self.round_V * settings.batch + self.slot_V


class _Rows(Dataset[Row]):
    """The samples of one rank."""

    def __init__(self, rows: tuple[Row, ...]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]


class _Collate:
    """The collate function of a DataLoader: calls the masker in this process or in a worker."""

    def __init__(self, masker: Masker) -> None:
        self.masker, self.epoch = masker, 0

    def __call__(self, rows: list[Row]) -> Masked:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a masker has already warned when it was created
            return self.masker.mask(rows, self.epoch)


def replay(
    masker: Masker, samples: AuditSamples, settings: AuditConfig, progress: ProgressCallback | None = None
) -> MaskingRecord:
    """Mask all samples in every epoch and rank.

    Raises:
        RecipeError: the masker returns something else than a masked batch, or can't be copied to a rank or worker.
    """
    length = samples.ids_NS.shape[1]
    per_rank = settings.batches * settings.batch
    count = per_rank * settings.ranks * settings.epochs
    number_V = np.arange(count)
    rank_V, within = np.divmod(number_V, per_rank * settings.epochs)
    epoch_V, within = np.divmod(within, per_rank)
    batch_V, slot_V = np.divmod(within, settings.batch)
    shown_VS = np.full((count, length), -1, dtype=np.int32)
    label_VS = np.full((count, length), IGNORED, dtype=np.int32)
    padding_V, padding_masked_V = np.zeros(count, np.int64), np.zeros(count, np.int64)
    occurrence = 0
    with _preserve_generators():
        for rank in range(settings.ranks):
            rows = samples.rows[rank * per_rank : (rank + 1) * per_rank]
            collate = _Collate(_copy(masker))
            _seed(settings.seed if settings.seeds == "alike" else rng.integer(settings.seed, "audit rank", rank))
            loader: DataLoader[Row] = DataLoader(
                _Rows(rows),
                batch_sampler=[
                    list(range(number * settings.batch, (number + 1) * settings.batch))
                    for number in range(settings.batches)
                ],
                num_workers=settings.workers,
                collate_fn=collate,
            )
            for epoch in range(settings.epochs):
                collate.epoch = epoch
                for batch in _batches(loader, masker.name):
                    for slot, (shown, label) in enumerate(zip(batch.shown_BS, batch.label_BS, strict=True)):
                        begin = int(batch.begins_B[slot])
                        size = len(samples.rows[_row(occurrence, per_rank, settings)].ids)
                        is_masked = label != IGNORED
                        shown_VS[occurrence, :size] = np.clip(shown[begin : begin + size], -1, 2**31 - 1)
                        label_VS[occurrence, :size] = np.clip(label[begin : begin + size], -(2**31), 2**31 - 1)
                        padding_V[occurrence] = len(label) - size
                        padding_masked_V[occurrence] = int(is_masked.sum()) - int(is_masked[begin : begin + size].sum())
                        occurrence += 1
                    if progress and occurrence // settings.batch % _REPORT_EVERY == 0:
                        progress("masking", occurrence / count)
    assert occurrence == count, f"{occurrence} of {count} samples came back"
    return MaskingRecord(
        row_V=rank_V * per_rank + within,
        epoch_V=epoch_V,
        rank_V=rank_V,
        worker_V=batch_V % settings.loaders,
        round_V=batch_V // settings.loaders,
        slot_V=slot_V,
        shown_VS=shown_VS,
        label_VS=label_VS,
        padding_V=padding_V,
        padding_masked_V=padding_masked_V,
    )


def _row(occurrence: int, per_rank: int, settings: AuditConfig) -> int:
    rank, within = divmod(occurrence, per_rank * settings.epochs)
    return rank * per_rank + within % per_rank


def _batches(loader: DataLoader[Row], name: str) -> Generator[Masked]:
    """Yield the batches of a loader.

    Raises:
        RecipeError: the masker can't be sent to worker processes.
    """
    with warnings.catch_warnings():
        # Python 3.12 and later warn about any fork in a process with threads; DataLoader workers allow it.
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        try:
            iterator: Any = iter(loader)
        except Exception as error:  # pickling fails in many ways
            if multiprocessing.get_start_method() == "fork" or not loader.num_workers:
                raise
            raise RecipeError(
                f"this masker can't be sent to a worker process: {error}",
                location=name,
                hint="define it at the top level of a module, or use --workers 0",
            ) from error
        yield from iterator


def _copy(masker: Masker) -> Masker:
    try:
        return copy.deepcopy(masker)
    except Exception as error:  # any exception of foreign code
        raise RecipeError(
            f"this masker can't be copied, and each rank needs its own copy: {error}",
            location=masker.name,
            hint="make its state copyable, or use one rank: --ranks 1",
        ) from error


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # the global generator, which some collators use
    random.seed(seed)


@contextlib.contextmanager
def _preserve_generators() -> Generator[None]:
    """Restore the global generators at the end."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


# Statistics -----------------------------------------------------------------------------------------------------------


Side = Literal["both", "above"]


class Proportion(NamedTuple):
    """A proportion with its standard error."""

    value: float
    error: float
    hits: int
    of: int


def cluster_proportion(
    hits_V: Num[np.ndarray, "V"], of_V: Num[np.ndarray, "V"], cluster_V: Int[np.ndarray, "V"]
) -> Proportion:
    """Return hits / of; the error is that of the ratio estimator of survey sampling, from the scatter of clusters."""
    hits_C = np.bincount(cluster_V, weights=hits_V)
    of_C = np.bincount(cluster_V, weights=of_V)
    total = float(of_C.sum())
    if not total:
        return Proportion(0.0, 0.0, 0, 0)
    value = float(hits_C.sum()) / total
    used = of_C > 0
    clusters = int(used.sum())
    scatter = float(np.square(hits_C[used] - value * of_C[used]).sum())
    error = math.sqrt(scatter * clusters / max(1, clusters - 1)) / total
    return Proportion(value, error, int(hits_C.sum()), int(total))


def p_value(value: float, error: float, expected: float, tolerance: float = 0.0, side: Side = "both") -> float:
    """Return the probability of a value at least as far beyond the tolerance, by the normal distribution."""
    beyond = (value - expected if side == "above" else abs(value - expected)) - tolerance
    if beyond <= 1e-12:
        return 1.0
    if expected in (0.0, 1.0) and not tolerance:  # a single case contradicts the claim
        return 0.0
    if not error:
        return 0.0
    tail = math.erfc(beyond / error / math.sqrt(2.0))
    return tail if side == "both" else tail / 2.0


def poisson_tail(count: int, mean: float) -> float:
    """Return the probability of `count` or more in a Poisson distribution."""
    if count <= 0:
        return 1.0
    if mean <= 0.0:
        return 0.0
    if count <= mean:
        return 1.0
    term = math.exp(-mean + count * math.log(mean) - math.lgamma(count + 1))
    total, k = term, count
    while term > total * 1e-12 and k < count + 10_000:
        k += 1
        term *= mean / k
        total += term
    return min(1.0, total)


def chernoff_bound(measured: float, expected: float, draws: float) -> float:
    """Return a bound of the probability that a fraction of independent draws is at least as far from its mean.

    It is 2·exp(-draws · KL(measured ‖ expected)) and holds for any number of draws (Chernoff 1952, Hoeffding 1963).
    """
    divergence = 0.0
    for part, mean in ((measured, expected), (1.0 - measured, 1.0 - expected)):
        if part > 1e-12:
            divergence += part * math.log(part / mean) if mean > 0.0 else math.inf
    return min(1.0, 2.0 * math.exp(-draws * max(divergence, 0.0)))


def combinations(of: int, choose: int) -> float:
    """Return the binomial coefficient; infinity if it is too large for a float."""
    if not 0 <= choose <= of:
        return 1.0
    logarithm = math.lgamma(of + 1) - math.lgamma(choose + 1) - math.lgamma(of - choose + 1)
    return math.exp(logarithm) if logarithm < 700.0 else math.inf


@dataclass(frozen=True)
class Observations:
    """Everything that the checks of an audit read."""

    samples: AuditSamples
    record: MaskingRecord
    tokenizer: Tokenizer
    claims: Claims
    settings: AuditConfig

    @cached_property
    def original_VS(self) -> Int[np.ndarray, "V S"]:
        """The ids that the masker got; -1 beyond the end of a sample."""
        return self.samples.ids_NS[self.record.row_V]

    @cached_property
    def maskable_VS(self) -> Bool[np.ndarray, "V S"]:
        """Whether each position has a regular token."""
        return self.samples.maskable_NS[self.record.row_V]

    @cached_property
    def word_VS(self) -> Int[np.ndarray, "V S"]:
        """The number of each position's word within its sample; -1 for special tokens."""
        return self.samples.word_NS[self.record.row_V]

    @cached_property
    def full_V(self) -> Bool[np.ndarray, "V"]:
        """Whether a sample has the full length."""
        return self.samples.full_N[self.record.row_V]

    @cached_property
    def masked_VS(self) -> Bool[np.ndarray, "V S"]:
        """Whether each position has a label."""
        return self.record.masked_VS

    @cached_property
    def counted_VS(self) -> Bool[np.ndarray, "V S"]:
        """Whether each position has a label and a regular token: rates and splits are computed from these."""
        return self.masked_VS & self.maskable_VS

    @cached_property
    def cluster_V(self) -> Int[np.ndarray, "V"]:
        """The cluster of each occurrence."""
        return self.record.cluster_V(self.settings)

    @cached_property
    def maskable_V(self) -> Int[np.ndarray, "V"]:
        """Number of regular tokens of each sample."""
        return self.maskable_VS.sum(axis=1)

    @cached_property
    def masked_V(self) -> Int[np.ndarray, "V"]:
        """Number of masked regular tokens of each sample."""
        return self.counted_VS.sum(axis=1)

    @cached_property
    def words_V(self) -> Int[np.ndarray, "V"]:
        """Number of words of each sample."""
        return self.word_VS.max(axis=1) + 1

    @cached_property
    def long_V(self) -> Bool[np.ndarray, "V"]:
        """Whether the claimed rate masks at least one token or word of a sample: "at least one" then has no effect."""
        return (self.maskable_V if self.claims.units == "tokens" else self.words_V) * self.claims.rate >= 1.0

    @cached_property
    def rate(self) -> Proportion:
        """The measured rate over samples that are long enough."""
        return self.rate_over(self.long_V)

    def rate_over(self, selected_V: Bool[np.ndarray, "V"]) -> Proportion:
        """Return the measured rate over some occurrences."""
        return cluster_proportion(self.masked_V[selected_V], self.maskable_V[selected_V], self.cluster_V[selected_V])

    @cached_property
    def size_VS(self) -> Int[np.ndarray, "V S"]:
        """Number of tokens of each position's word; 0 for special tokens."""
        most = int(self.words_V.max(initial=0)) + 1
        occurrences, positions = np.nonzero(self.maskable_VS)
        key = occurrences * most + self.word_VS[occurrences, positions]
        size_VS = np.zeros(self.maskable_VS.shape, dtype=np.int64)
        size_VS[occurrences, positions] = np.bincount(key)[key]
        return size_VS
