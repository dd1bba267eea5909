"""Runs a masker over the samples of an audit, in every epoch, rank and worker.

Each rank has a copy of the masker and a DataLoader over its own samples, in the same order in every epoch, so that
repeated masks appear at the same place. Ranks run one after the other in this process. The global generators of torch,
numpy and random are seeded before each rank and restored afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import random
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch.utils.data import DataLoader, Dataset

from unmask.checks.audit.maskers import IGNORED, Masked, Masker
from unmask.checks.audit.samples import AuditSamples, Row
from unmask.checks.audit.settings import AuditConfig
from unmask.core import rng
from unmask.core.errors import RecipeError
from unmask.core.types import ProgressCallback

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
