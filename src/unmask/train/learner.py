"""Room card: the one module of a run.

Comes in: encoder, head, objective. Goes out: a Learner, whose parameters are all that is trained. Called by: workshop,
the loop, the average.
"""

from __future__ import annotations

from torch import nn

from unmask.contracts import Loss, Objective, Puzzle


class Learner(nn.Module):
    """The one module of a run: encoder, head, the objective's parts. Sharding, clipping and the optimiser see this."""

    def __init__(self, encoder: nn.Module, head: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.parts = objective.parts
        self._objective = objective

    def forward(self, puzzle: Puzzle) -> Loss:
        """The objective's sums for one micro-batch."""
        return self._objective.loss(self.encoder, self.head, puzzle)
