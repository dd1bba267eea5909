"""Falling mask rate: its value at each step, the masked fraction, and resuming."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.core.errors import Stopped
from unmask.core.types import SPECIAL, WORD_START, Sample, pack
from unmask.objectives.mlm import MaskedLMConfig, MaskedLMObjective
from unmask.training.display import Display
from unmask.training.pretrain import launch, resume

FALLING = MaskedLMConfig(mask_rate=0.30, final_mask_rate=0.15)
SMALL = [
    "data.tokenizer.kind=characters", "model.num_hidden_layers=1", "model.hidden_size=16",
    "model.num_attention_heads=1", "model.intermediate_size=24", "train.threads=1",
    "train.micro_batch_size=512 tokens", "objective.mask_rate=0.6", "objective.final_mask_rate=0.2",
    "train.every.log=1 steps", "train.every.validate=100%", "train.every.save=4 steps",
    "stage=[{until = '50%', max_seq_len = 32, batch_size = '1024 tokens'}, "
    "{until = '100%', max_seq_len = 64, batch_size = '1024 tokens'}]",
    "train.budget=8 steps", "preview.num_samples=0",
]  # fmt: skip


@given(
    st.floats(0.01, 1.0),
    st.one_of(st.just("constant"), st.floats(0.01, 1.0)),
    st.lists(st.floats(0, 1), min_size=2, max_size=9),
)
def test_the_rate_is_linear(rate: float, end: float | str, places: list[float]) -> None:
    rule = MaskedLMConfig(mask_rate=rate, final_mask_rate=end)
    last = rate if end == "constant" else end
    assert rule.rate_at(0.0) == rate and rule.rate_at(1.0) == pytest.approx(last)
    rates = [rule.rate_at(place) for place in sorted(places)]
    assert rates == sorted(rates, reverse=last < rate) or np.ptp(rates) < 1e-12
    assert rule.masked_fraction == pytest.approx((rate + last) / 2)


@pytest.mark.parametrize("how", ["token", "whole-word", "span", "ngram"])
def test_the_masked_fraction_follows_the_rate(how: str) -> None:
    texts = [Sample(np.full(61, 9), np.full(61, WORD_START, np.uint8), 0, i) for i in range(1000)]
    objective, batch = MaskedLMObjective(replace(FALLING, mask_unit=how), 4, np.arange(5, 30)), pack(texts)
    assert batch.progress == 0.0
    for progress, rate in ((0.0, 0.30), (0.5, 0.225), (0.9, 0.165), (1.0, 0.15)):
        masked = objective.corrupt(replace(batch, progress=progress), 5)
        longest = {"token": 1, "whole-word": 1, "ngram": 3, "span": 10}[how]
        # Four standard errors of 1,000 samples, in each of which the count differs by at most the longest unit.
        error = 4 * 0.5 * longest * 1000**0.5 / masked.num_maskable
        assert abs(len(masked.positions_M) / masked.num_maskable - rate) < error
        assert masked.batch.progress == progress, "the masked batch keeps it"
        repeated = objective.corrupt(replace(batch, progress=progress), 5)
        assert (repeated.positions_M == masked.positions_M).all() and (repeated.batch.ids_T == masked.batch.ids_T).all()


def test_a_lower_rate_masks_a_subset() -> None:
    """Draws don't depend on the progress: single tokens that are masked late would have been masked early."""
    marks = np.full(400, WORD_START, np.uint8)
    marks[[0, 399]] = SPECIAL
    batch = pack([Sample(np.full(400, 9), marks, 1, 2)])
    objective = MaskedLMObjective(FALLING, 4, np.arange(5, 30))
    early, late = (set(objective.corrupt(replace(batch, progress=p), 5).positions_M.tolist()) for p in (0.0, 1.0))
    assert late < early


class StopsAt(Display):
    """Sends this process an interrupt after a given step."""

    def step(self, state) -> None:
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_has_the_rates_and_resumes_with_them(prose: Path, tmp_path: Path) -> None:
    """Step k of 8 has the rate 0.6 − 0.4 · k ÷ 8, interrupted or not, in one or two micro-batches."""
    launch([prose], recipe="tiny", out=tmp_path / "whole", settings=SMALL)
    launch([prose], recipe="tiny", out=tmp_path / "at-once", settings=[*SMALL, "train.micro_batch_size=2k tokens"])
    with pytest.raises(Stopped):
        launch([prose], recipe="tiny", out=tmp_path / "parted", settings=SMALL, display=StopsAt())
    resume(tmp_path / "parted")
    logged = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("whole", "parted", "at-once")
    ]
    steps = [[(line["step"], line["mask_rate"], line["loss"]) for line in log if "mask_rate" in line] for log in logged]
    assert steps[0] == steps[1] and len(steps[0]) == 8
    assert [one[:2] for one in steps[0]] == [one[:2] for one in steps[2]]
    assert [one[2] for one in steps[0]] == pytest.approx([one[2] for one in steps[2]], rel=1e-3)
    for step, rate, _ in steps[0]:
        assert rate == pytest.approx(0.6 - 0.4 * (step - 1) / 8, abs=4 * 0.5 * 32**0.5 / 1000)  # 32 texts at most
