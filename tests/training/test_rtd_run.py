"""Runs of replaced token detection: resuming bit for bit, Muon for the generator, refusals before text is read."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from unmask.core.errors import RecipeError, Stopped
from unmask.models import build_model
from unmask.models.bert import BertConfig
from unmask.models.electra import build_electra
from unmask.training.display import Display
from unmask.training.loop import TrainModule
from unmask.training.optim import Optimizer, OptimizerConfig
from unmask.training.pretrain import launch, resume

SMALL = [
    "data.tokenizer={kind = 'characters'}",
    "model={kind = 'bert', num_hidden_layers = 2, hidden_size = 32, num_attention_heads = 2, intermediate_size = 32, "
    "max_position_embeddings = 64, hidden_dropout = 0.1}",
    "objective={kind = 'rtd', mask_rate = 0.2, generator_width = 0.5, generator_depth = 0.5}",
    "train.every.log=1 steps", "train.every.validate=4 steps", "train.every.save=4 steps", "train.threads=1",
    "stage=[{until = '50%', max_seq_len = 24, batch_size = '512 tokens'}, "
    "{until = '100%', max_seq_len = 48, batch_size = '512 tokens'}]",
    "train.micro_batch_size=200 tokens", "train.budget=8 steps", "train.ema_decay=0.9", "preview.num_samples=1",
]  # fmt: skip


class StopsAt(Display):
    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, state) -> None:
        if state.step == self._step:
            signal.raise_signal(signal.SIGINT)


def log(run: Path) -> list[dict[str, Any]]:
    clock = {"seconds", "tokens_per_second", "training_seconds", "phase_seconds", "data_wait_fraction"}
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


def test_a_resumed_run_is_bit_identical(prose: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    launch([prose], recipe="tiny", out=whole, settings=SMALL)
    with pytest.raises(Stopped):
        launch([prose], recipe="tiny", out=run, settings=SMALL, display=StopsAt(5))
    resume(run)
    assert log(run) == log(whole)
    step = (whole / "latest").resolve()
    optimized = load_file(step / "resume" / "optimizer.safetensors")
    assert any(name.startswith("parts.generator.") for name in optimized)
    assert not any(name.startswith("head.") for name in optimized), "the vocabulary head is not trained"
    names = [path.relative_to(step) for path in step.rglob("*.safetensors")]
    assert {name.name for name in names} >= {"objective.safetensors", "ema.safetensors", "model.safetensors"}
    for name in names:
        first, second = load_file(run / "latest" / name), load_file(whole / "latest" / name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name


def test_muon_optimizes_the_matrices_of_the_generator() -> None:
    shape = BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48)
    module = TrainModule(*build_model(shape, 40), build_electra(shape, 40, 0.5, 1.0))
    algorithms = Optimizer(module, OptimizerConfig()).algorithms()
    assert set(algorithms) == {name for name, _ in module.named_parameters()}
    for name, parameter in module.parts.named_parameters():
        is_matrix = parameter.ndim == 2 and name != "discriminator.classifier.weight"
        assert algorithms[f"parts.{name}"] == ("muon" if is_matrix else "adam"), name
    alone = nn.ModuleDict({"encoder": module.encoder, "head": module.head})
    before, after = (Optimizer(each, OptimizerConfig()).flops for each in (alone, module))
    assert before < after < 2 * before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model={kind = 'neomme', num_hidden_layers = 1, hidden_size = 16}", "got neomme"),
        ("model={kind = 'tutorial', hidden_size = 16}", "got tutorial"),
        ("objective={kind = 'rtd', generator_width = 2.0}", "invalid generator_width: got 2"),
    ],
)
def test_what_it_cannot_train_is_refused(setting: str, message: str, prose: Path, tmp_path: Path) -> None:
    settings = ["objective.kind=rtd", "objective.mask_token_rate=1", "objective.random_token_rate=0",
                "objective.keep_rate=0", "train.budget=2 steps", setting]  # fmt: skip
    with pytest.raises(RecipeError, match=message):
        launch([prose], recipe="tiny", out=tmp_path / "run", settings=settings)
    assert not (tmp_path / "run").exists()
