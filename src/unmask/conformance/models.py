"""Room card: a small model to try an objective with.

Comes in: an objective, a shape, texts. Goes out: an ObjectiveSubject. Called by: check, tests. A module of its own,
because encoders take as long to import as torch itself, 2 s, and the other process of a check needs none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unmask.conformance import samples
from unmask.conformance.objectives import ObjectiveSubject
from unmask.contracts import Objective, Text
from unmask.nn import EncoderSettings, ModernSettings, build

ENCODER = ModernSettings(layers=2, width=samples.WIDTH, heads=2, feed_forward=24, local_window=16)


def objective_subject(
    objective: Objective,
    shape: EncoderSettings = ENCODER,
    tried_on: Sequence[Text] | None = None,
    vocabulary: int | None = None,
    seed: int = samples.SEED,
) -> ObjectiveSubject:
    """An objective with a small model and texts to be tried on."""
    size = samples.tokenizer().size if vocabulary is None else vocabulary
    torch.manual_seed(1)
    encoder, head = build(shape, size)
    return ObjectiveSubject(
        objective, encoder, head, tried_on or samples.texts(), samples.nothing_askable(), seed, size
    )
