"""A rate that changes over a run: what it is at each step, what is realised, that a stop changes nothing."""

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
from unmask.core.types import SPECIAL, WORD_START, Text, pack
from unmask.objectives.mlm import Mlm, MlmSettings
from unmask.training.display.plain import SilentDisplay
from unmask.training.pretrain import launch, resume

FALLING = MlmSettings(rate=0.30, rate_end=0.15)
SMALL = [
    "text.tokenizer.kind=characters", "encoder.layers=1", "encoder.width=16", "encoder.heads=1",
    "encoder.feed_forward=24", "train.threads=1", "train.micro_batch=512 tokens", "objective.rate=0.6",
    "objective.rate_end=0.2", "train.every.log=1 steps", "train.every.validate=100%", "train.every.save=4 steps",
    "stage=[{until = '50%', length = 32, batch = '1024 tokens'}, {until = '100%', length = 64, batch = '1024 tokens'}]",
    "train.budget=8 steps", "show.lines=0",
]  # fmt: skip


@given(
    st.floats(0.01, 1.0),
    st.one_of(st.just("constant"), st.floats(0.01, 1.0)),
    st.lists(st.floats(0, 1), min_size=2, max_size=9),
)
def test_the_rate_is_a_straight_line(rate: float, end: float | str, places: list[float]) -> None:
    rule = MlmSettings(rate=rate, rate_end=end)
    last = rate if end == "constant" else end
    assert rule.rate_at(0.0) == rate and rule.rate_at(1.0) == pytest.approx(last)
    rates = [rule.rate_at(place) for place in sorted(places)]
    assert rates == sorted(rates, reverse=last < rate) or np.ptp(rates) < 1e-12
    assert rule.asked_share == pytest.approx((rate + last) / 2)


@pytest.mark.parametrize("how", ["token", "word", "span", "ngram"])
def test_what_is_asked_follows_it(how: str) -> None:
    texts = [Text(np.full(61, 9), np.full(61, WORD_START, np.uint8), 0, i) for i in range(1000)]
    objective, batch = Mlm(replace(FALLING, choose=how), 4, np.arange(5, 30)), pack(texts)
    assert batch.progress == 0.0
    for progress, rate in ((0.0, 0.30), (0.5, 0.225), (0.9, 0.165), (1.0, 0.15)):
        puzzle = objective.corrupt(replace(batch, progress=progress), 5)
        error = 4 * 0.5 * 1000**0.5 / puzzle.askable  # of 1,000 draws u, each of which moves one token at most
        assert abs(len(puzzle.at_M) / puzzle.askable - rate) < error
        assert puzzle.batch.progress == progress, "it travels with the batch"
        again = objective.corrupt(replace(batch, progress=progress), 5)
        assert (again.at_M == puzzle.at_M).all() and (again.batch.ids_T == puzzle.batch.ids_T).all()


def test_a_lower_rate_asks_a_part_of_what_a_higher_one_asks() -> None:
    """Draws don't depend on the progress: of single tokens, those asked late were asked early, too."""
    marks = np.full(400, WORD_START, np.uint8)
    marks[[0, 399]] = SPECIAL
    batch = pack([Text(np.full(400, 9), marks, 1, 2)])
    objective = Mlm(FALLING, 4, np.arange(5, 30))
    early, late = (set(objective.corrupt(replace(batch, progress=p), 5).at_M.tolist()) for p in (0.0, 1.0))
    assert late < early


class StopsAt(SilentDisplay):
    """Asks this process to stop, as a person would, after a given step."""

    def step(self, standing) -> None:
        if standing.step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_realises_it_and_resumes_in_the_middle(prose: Path, tmp_path: Path) -> None:
    """Step k of 8 asks at 0.6 − 0.4 · k ÷ 8, stopped or not, in two micro-batches or one."""
    launch([prose], recipe="tiny", out=tmp_path / "whole", settings=SMALL)
    launch([prose], recipe="tiny", out=tmp_path / "at-once", settings=[*SMALL, "train.micro_batch=2k tokens"])
    with pytest.raises(Stopped):
        launch([prose], recipe="tiny", out=tmp_path / "parted", settings=SMALL, display=StopsAt())
    resume(tmp_path / "parted")
    logged = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("whole", "parted", "at-once")
    ]
    steps = [[(line["step"], line["rate"], line["loss"]) for line in log if "rate" in line] for log in logged]
    assert steps[0] == steps[1] and len(steps[0]) == 8
    assert [one[:2] for one in steps[0]] == [one[:2] for one in steps[2]]
    assert [one[2] for one in steps[0]] == pytest.approx([one[2] for one in steps[2]], rel=1e-3)
    for step, rate, _ in steps[0]:
        assert rate == pytest.approx(0.6 - 0.4 * (step - 1) / 8, abs=4 * 0.5 * 32**0.5 / 1000)  # 32 texts at most
