"""The moving average of the weights: its formula, that it is validated and saved, and that it resumes exactly."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from unmask import load
from unmask.core.errors import RecipeError, Stopped
from unmask.models import build_model
from unmask.models.modernbert import ModernBertConfig
from unmask.objectives.mlm import MaskedLMConfig, MaskedLMObjective
from unmask.training.display import Display
from unmask.training.loop import EMA, TrainModule
from unmask.training.pretrain import launch, resume
from unmask.training.recipe import TrainConfig

SMALL = [
    "data.tokenizer.kind=characters", "model.num_hidden_layers=1", "model.hidden_size=16",
    "model.num_attention_heads=2", "model.intermediate_size=16", "train.every.log=2 steps",
    "train.every.validate=3 steps", "train.every.save=4 steps",
    "train.threads=1", "stage=[{max_seq_len = 32, batch_size = '256 tokens'}]", "train.budget=8 steps",
    "train.ema_decay=0.9",
    "train.keep_last=9",
]  # fmt: skip


def build_module() -> TrainModule:
    torch.manual_seed(1)
    encoder, head = build_model(
        ModernBertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16), 30
    )
    return TrainModule(encoder, head, MaskedLMObjective(MaskedLMConfig(), 4, np.arange(5, 30)).modules)


def test_the_average_follows_its_formula() -> None:
    """Compared with float64: early on d = (1 + n) / (10 + n), later the decay."""
    trained = build_module()
    average = EMA(copy.deepcopy(trained), 0.7)
    reference = {name: value.double() for name, value in trained.state_dict().items()}
    for step in range(40):
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(trained, step)
        decay = min(0.7, (1 + step) / (10 + step))
        for name, value in trained.state_dict().items():
            reference[name] = decay * reference[name] + (1 - decay) * value.double()
    assert average.decay_at(0) == 0.1 and average.decay_at(39) == 0.7
    for name, value in average.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), reference[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [1.0, -0.1, 1.5])
def test_an_invalid_decay_is_refused(decay: float) -> None:
    with pytest.raises(RecipeError, match="ema_decay"):
        TrainConfig(ema_decay=decay)


class Stops(Display):
    """Sends SIGINT to this process after step 5."""

    def step(self, state) -> None:
        if state.step == 5:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)


def test_the_average_is_validated_saved_and_resumed_exactly(prose: Path, tmp_path: Path) -> None:
    whole, cut, raw = tmp_path / "whole", tmp_path / "cut", tmp_path / "raw"
    launch([prose], recipe="tiny", out=whole, settings=SMALL)
    with pytest.raises(Stopped):
        launch([prose], recipe="tiny", out=cut, settings=SMALL, display=Stops())
    resume(cut)
    launch([prose], recipe="tiny", out=raw, settings=[*SMALL, "train.ema_decay=0"])
    files = ["model.safetensors", "resume/weights.safetensors", "resume/ema.safetensors"]
    for file in files:
        one, other = load_file(whole / "latest" / file), load_file(cut / "latest" / file)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), file
    # The average has no effect on training: the raw weights are those of a run without it.
    trained = load_file(whole / "latest" / "resume" / "weights.safetensors")
    plain = load_file(raw / "latest" / "resume" / "weights.safetensors")
    assert all(torch.equal(trained[name], plain[name]) for name in plain)
    assert not (raw / "latest" / "resume" / "ema.safetensors").exists()
    # `load` returns the average, and validations used it.
    held = load_file(whole / "latest" / "resume" / "ema.safetensors")
    model = load(whole / "latest")
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, held[f"encoder.{name}"]), name
    losses = {run: [line["validation"]["loss"] for line in lines(run) if "validation" in line] for run in (whole, raw)}
    assert losses[whole] != losses[raw]


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
