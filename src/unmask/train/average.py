"""Room card: an average of the weights of all steps, the latest weighing most.

Comes in: a learner after each optimiser step, its decay. Goes out: a second learner that holds the average, which is
what a validation judges and a model folder saves; the raw weights go on being trained. Called by: loop, workshop.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from unmask.train.learner import Learner


class Average:
    """An exponential moving average in float32: average ← average + (1 − d) · (weights − average).

    With n steps averaged before, d is min(decay, (1 + n) ÷ (10 + n)): early on the average looks back over about n ÷ 9
    steps instead of 1 ÷ (1 − decay), so that it forgets the random start at once and a run of any length can be judged
    from its first validation. (Dividing by 1 − decayⁿ instead would weigh all early steps alike: after 100 steps the
    first, with its random weights, as much as the last.) n is the step, so that nothing but the average is kept.
    """

    def __init__(self, learner: Learner, decay: float) -> None:
        assert 0 < decay < 1, f"an average with a decay of {decay}"
        self.decay = decay
        self.learner = copy.deepcopy(learner).float()
        self.learner.requires_grad_(False)

    def decay_at(self, step: int) -> float:
        """The decay after step `step`, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, learner: Learner, step: int) -> None:
        """Take in the weights as they are after step `step`, counted from 0."""
        share = 1 - self.decay_at(step)
        for mine, theirs in zip(self.learner.parameters(), learner.parameters(), strict=True):
            mine.lerp_(theirs.to(mine.dtype), share)
        for mine, theirs in zip(self.learner.buffers(), learner.buffers(), strict=True):
            mine.copy_(theirs)  # what is no weight is taken as it is

    def state_dict(self) -> dict[str, Tensor]:
        """The average, named as the learner names its weights; live tensors, not copies."""
        return self.learner.state_dict()
