"""Results of models that are validated by their own objective."""

from __future__ import annotations

import math

from unmask.evaluation.masked_lm import EvalSet
from unmask.evaluation.validation import own_result


def test_an_objective_needs_no_accuracy() -> None:
    """A plugin objective must have a metric "loss" and may have no other."""
    eval_set = EvalSet((), length=8, masked_tokens=3, tokens=20, characters=40, unknown_share=0.0, unigram_loss=2.0)
    result = own_result(eval_set, {"loss": math.log(2)})
    assert result.loss == math.log(2) and result.bits_per_character == 0.5 and math.isnan(result.accuracy)
