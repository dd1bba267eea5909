"""Room card: masked language modelling (arXiv 1810.04805, section 3.1).

Comes in: a Batch. Goes out: a Puzzle (what is hidden and asked), then a Loss (cross-entropy summed over what was asked;
the vocabulary head never sees another slot). Called by: the loop through the Objective contract; eval/heldout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from unmask.core import rng
from unmask.core.types import SPECIAL, Batch, Loss, Puzzle, logits_at
from unmask.objectives.masking import Laid, MaskingSettings, choose, hide
from unmask.objectives.word_boost import Preference


@dataclass(frozen=True)
class MlmSettings(MaskingSettings):
    """Masked language modelling, alone."""

    kind: Literal["mlm"] = "mlm"

    @property
    def asked_share(self) -> float:
        """Share of the tokens that is asked about, by which costs are forecast."""
        return self.mean_rate


class Mlm:
    """The objective: asks by `masking`, answers by cross-entropy."""

    terms: Mapping[str, float] = {"mlm": 1.0}
    metrics: Sequence[str] = ("loss", "accuracy", "rate")
    cutter = "windows"
    fills = True

    def __init__(
        self,
        settings: MaskingSettings,
        mask_id: int,
        ordinary_N: NDArray[np.integer[Any]],
        preferred: Sequence[Sequence[int]] = (),
    ) -> None:
        """`preferred` are the ids of words that are asked `settings.prefer_factor` times as often."""
        self._settings = settings
        self._mask_id = mask_id
        self._ordinary_N = ordinary_N
        self._preference = Preference(preferred) if preferred else None
        self.parts = nn.Module()

    def corrupt(self, batch: Batch, seed: int) -> Puzzle:
        """Hide what the rule chooses; pure in the seed, the progress and each text's (epoch, number)."""
        laid = Laid(batch.marks_T.numpy(), np.asarray(batch.starts), batch.sample_B2.numpy())
        ids_T = batch.ids_T.numpy()
        preferred_T = self._preference.slots(ids_T, laid) if self._preference else None
        at_M = choose(laid, self._settings, seed, batch.progress, preferred_T)
        hidden_T = hide(ids_T, at_M, laid, self._settings, seed, mask_id=self._mask_id, ordinary_N=self._ordinary_N)
        return puzzle(batch, hidden_T, at_M, ids_T[at_M], rng.uniform(seed, "chance", *laid.key_at(at_M)))

    def loss(self, encoder: nn.Module, head: nn.Module, puzzle: Puzzle) -> Loss:
        """Sum of the cross-entropy over the asked slots, in nats; accuracy beside it."""
        logits_MV = logits_at(encoder, head, puzzle.batch, puzzle.at_M)
        nats_M = F.cross_entropy(logits_MV, puzzle.answer_M, reduction="none")
        right = (logits_MV.detach().argmax(-1) == puzzle.answer_M).sum()
        asked = puzzle.counts["mlm"]
        return Loss(
            sums={"mlm": (nats_M * puzzle.weight_M).sum()},
            seen={
                "loss": (nats_M.detach().sum(), asked),
                "accuracy": (right, asked),
                "rate": (torch.tensor(float(asked)), puzzle.askable),
            },
        )


def puzzle(
    batch: Batch,
    hidden_T: NDArray[np.int64],
    at_M: NDArray[np.integer[Any]],
    answer_M: NDArray[np.integer[Any]],
    chance_M: NDArray[np.float64],
) -> Puzzle:
    """The puzzle that shows `hidden_T` in place of the batch's ids and asks about `at_M`, all weights one."""
    return Puzzle(
        batch=replace(batch, ids_T=torch.from_numpy(hidden_T)),
        at_M=torch.from_numpy(at_M.astype(np.int64)),
        answer_M=torch.from_numpy(answer_M.astype(np.int64)),
        weight_M=torch.ones(len(at_M)),
        chance_M=torch.from_numpy(chance_M.astype(np.float32)),
        counts={"mlm": len(at_M)},
        askable=int(((batch.marks_T & SPECIAL) == 0).sum()),
    )
