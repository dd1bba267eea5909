"""Room card: a masker at work.

Comes in: material, a masker. Goes out: Visits: what it showed and asked of every sample, in every epoch, by every rank
and worker. Called by: judge.

Each rank has a copy of the masker as it was given and a real DataLoader over its own samples, in the same order in
every epoch, so that what repeats is seen at its own place. Ranks play one after the other in this process; global
generators (torch, numpy, random) are seeded before each and put back afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import random
import warnings
from collections.abc import Callable, Generator
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

Progress = Callable[[str, float], None]
_TOLD_EVERY: Final = 8  # batches


@dataclass(frozen=True)
class MaskingRecord:
    """What a masker did; one line for each time that a sample was masked."""

    row_V: Int[np.ndarray, "V"]
    epoch_V: Int[np.ndarray, "V"]
    rank_V: Int[np.ndarray, "V"]
    worker_V: Int[np.ndarray, "V"]
    turn_V: Int[np.ndarray, "V"]
    seat_V: Int[np.ndarray, "V"]
    shown_VS: Int[np.ndarray, "V S"]
    label_VS: Int[np.ndarray, "V S"]  # IGNORED beyond a sample's end
    padding_V: Int[np.ndarray, "V"]  # slots of padding beside it
    padding_asked_V: Int[np.ndarray, "V"]

    @property
    def asked_VS(self) -> Bool[np.ndarray, "V S"]:
        """Whether each slot was asked about."""
        return self.label_VS != IGNORED

    def cluster_V(self, settings: AuditConfig) -> Int[np.ndarray, "V"]:
        """One number for all that might have been drawn together: a turn and a seat, in any epoch, worker, rank."""
        return self.turn_V * settings.batch + self.seat_V


class _Rows(Dataset[Row]):
    """The samples of one rank."""

    def __init__(self, rows: tuple[Row, ...]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]


class _Collate:
    """The masker as a loader calls it, in this process or in a worker."""

    def __init__(self, masker: Masker) -> None:
        self.masker, self.epoch = masker, 0

    def __call__(self, rows: list[Row]) -> Masked:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a masker warns of, it says once where it is made
            return self.masker.mask(rows, self.epoch)


def replay(
    masker: Masker, material: AuditSamples, settings: AuditConfig, progress: Progress | None = None
) -> MaskingRecord:
    """Have a masker mask everything, epoch after epoch, in every rank.

    Raises:
        RecipeError: what it gives is no masked batch, or it can't be copied to a rank or a worker.
    """
    slots = material.ids_NS.shape[1]
    per_rank = settings.places * settings.batch
    count = per_rank * settings.ranks * settings.epochs
    number_V = np.arange(count)
    rank_V, within = np.divmod(number_V, per_rank * settings.epochs)
    epoch_V, within = np.divmod(within, per_rank)
    place_V, seat_V = np.divmod(within, settings.batch)
    shown_VS = np.full((count, slots), -1, dtype=np.int32)
    label_VS = np.full((count, slots), IGNORED, dtype=np.int32)
    padding_V, padding_asked_V = np.zeros(count, np.int64), np.zeros(count, np.int64)
    at = 0
    with _generators_kept():
        for rank in range(settings.ranks):
            rows = material.rows[rank * per_rank : (rank + 1) * per_rank]
            collate = _Collate(_copied(masker))
            _seed(settings.seed if settings.seeds == "alike" else rng.integer(settings.seed, "audit rank", rank))
            loader: DataLoader[Row] = DataLoader(
                _Rows(rows),
                batch_sampler=[  # any iterable of batches will do
                    list(range(place * settings.batch, (place + 1) * settings.batch))
                    for place in range(settings.places)
                ],
                num_workers=settings.workers,
                collate_fn=collate,
            )
            for epoch in range(settings.epochs):
                collate.epoch = epoch
                for masked in _batches(loader, masker.name):
                    for seat, (shown, label) in enumerate(zip(masked.shown_BS, masked.label_BS, strict=True)):
                        begin, size = int(masked.begins_B[seat]), len(material.rows[_row(at, per_rank, settings)].ids)
                        asked = label != IGNORED
                        shown_VS[at, :size] = np.clip(shown[begin : begin + size], -1, 2**31 - 1)
                        label_VS[at, :size] = np.clip(label[begin : begin + size], -(2**31), 2**31 - 1)
                        padding_V[at] = len(label) - size
                        padding_asked_V[at] = int(asked.sum()) - int(asked[begin : begin + size].sum())
                        at += 1
                    if progress and at // settings.batch % _TOLD_EVERY == 0:
                        progress("masking", at / count)
    assert at == count, f"{at} of {count} samples came back"
    return MaskingRecord(
        row_V=rank_V * per_rank + within,
        epoch_V=epoch_V,
        rank_V=rank_V,
        worker_V=place_V % settings.lanes,
        turn_V=place_V // settings.lanes,
        seat_V=seat_V,
        shown_VS=shown_VS,
        label_VS=label_VS,
        padding_V=padding_V,
        padding_asked_V=padding_asked_V,
    )


def _row(visit: int, per_rank: int, settings: AuditConfig) -> int:
    rank, within = divmod(visit, per_rank * settings.epochs)
    return rank * per_rank + within % per_rank


def _batches(loader: DataLoader[Row], name: str) -> Generator[Masked]:
    """What a loader gives; where workers can't be sent the masker, a word about it."""
    with warnings.catch_warnings():
        # Python 3.12 and later warn of any fork beside threads; a loader's workers are made for it.
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        try:
            iterator: Any = iter(loader)
        except Exception as error:  # what can't be sent fails in many ways
            if multiprocessing.get_start_method() == "fork" or not loader.num_workers:
                raise
            raise RecipeError(
                f"this masker can't be sent to a worker process: {error}",
                location=name,
                hint="define it at the top of a module, or take --workers 0",
            ) from error
        yield from iterator


def _copied(masker: Masker) -> Masker:
    try:
        return copy.deepcopy(masker)
    except Exception as error:  # whatever a stranger's object does when it is copied
        raise RecipeError(
            f"this masker can't be copied, as each rank needs its own: {error}",
            location=masker.name,
            hint="let its state be copied, or watch one rank: --ranks 1",
        ) from error


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # the global one, which some collators draw from
    random.seed(seed)


@contextlib.contextmanager
def _generators_kept() -> Generator[None]:
    """The global generators afterwards as they were."""
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])
