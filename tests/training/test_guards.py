"""Guards: steps that are not finite are skipped, a run goes back and learns slower, jumps of the loss, a full disk."""

from __future__ import annotations

import ast
import contextlib
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from unmask.checks.doctor.run import examine_run
from unmask.checks.verify import verify
from unmask.core.errors import RunError, Stopped, StoreError
from unmask.models import build_model
from unmask.models.modernbert import ModernBertConfig
from unmask.report.collect import collect
from unmask.training.checkpoint import earlier_steps, outdated_checkpoints
from unmask.training.display import Display
from unmask.training.guards import DiskWatch, LossSpikes
from unmask.training.loop import EMA, Diverged, TrainModule, TrainState
from unmask.training.optim import Optimizer, OptimizerConfig
from unmask.training.plan import Plan, StagePlan
from unmask.training.pretrain import launch, resume
from unmask.training.runs import find_runs

try:
    import resource
except ImportError:  # Windows
    resource = None

pytestmark = pytest.mark.slow

SMALL = [
    "data.tokenizer.kind=characters", "model.num_hidden_layers=1", "model.hidden_size=16",
    "model.num_attention_heads=2", "model.intermediate_size=16", "train.every.log=1 steps",
    "train.every.validate=12 steps", "train.every.save=4 steps", "train.threads=1", "train.budget=12 steps",
    "stage=[{max_seq_len = 32, batch_size = '256 tokens'}]", "train.ema_decay=0.9", "train.report=false",
    "preview.num_samples=0", "train.precision=float32", "lr_schedule.warmup=0%", "lr_schedule.decay=0%",
]  # fmt: skip
# Objectives that fail at given steps, or as soon as the weights have moved so far that the learning rate was too high.
FAULTS = """
import os
from dataclasses import dataclass

import torch

from unmask.objectives.adaptive import AdaptiveMaskingConfig, AdaptiveMaskingObjective
from unmask.objectives.mlm import MaskedLMConfig, MaskedLMObjective

@dataclass(frozen=True)
class Settings:
    steps: tuple[int, ...] = ()
    most: float = 1e9
    how: str = "loss"  # loss: infinite, with a finite gradient; gradient: NaN, with a finite loss; spike: 3 nats more

def fail(settings, sums, head, masked):
    bias = float(head.bias.detach().abs().max())
    if masked.batch.step + 1 in settings.steps and os.environ.get("RANK", "1") == "1" or bias > settings.most:
        if settings.how == "loss":
            sums.sums["mlm"] = sums.sums["mlm"] + torch.inf
        elif settings.how == "spike":
            value, count = sums.metrics["loss"]
            sums.metrics["loss"] = (value + 3 * count, count)
        else:
            sums.sums["mlm"].register_hook(lambda gradient: gradient * torch.nan)
    return sums

class Fails(MaskedLMObjective):
    Settings = Settings

    def __init__(self, settings, tools):
        super().__init__(MaskedLMConfig(), tools.vocabulary.mask_id, tools.vocabulary.regular_token_ids)
        self.faults = settings

    def loss(self, encoder, head, masked):
        return fail(self.faults, super().loss(encoder, head, masked), head, masked)

class FailsAdaptive(AdaptiveMaskingObjective):
    Settings = Settings

    def __init__(self, settings, tools):
        mlm = MaskedLMObjective(MaskedLMConfig(), tools.vocabulary.mask_id, tools.vocabulary.regular_token_ids)
        super().__init__(AdaptiveMaskingConfig(update_every=100), mlm, tools.vocabulary.size)
        self.faults = settings

    def loss(self, encoder, head, masked):
        return fail(self.faults, super().loss(encoder, head, masked), head, masked)
"""


class Messages(Display):
    """Keeps messages; sends SIGTERM after a given step, and calls a function after each one."""

    def __init__(self, stop: int = 0, after_step: Callable[[int], None] = lambda step: None) -> None:
        self.messages: list[str] = []
        self._stop, self._after_step = stop, after_step

    def message(self, message: str) -> None:
        self.messages.append(message)

    def step(self, state: TrainState) -> None:
        if state.step == self._stop:
            os.kill(os.getpid(), signal.SIGTERM)
        self._after_step(state.step)

    def find(self, *parts: str) -> list[str]:
        return [message for message in self.messages if all(part in message for part in parts)]


@pytest.fixture(autouse=True)
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faults.py").write_text(FAULTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "faults", raising=False)


def failing(name: str = "Fails", **settings: object) -> str:
    return (
        f"objective={{kind = 'faults:{name}', {', '.join(f'{key} = {json.dumps(settings[key])}' for key in settings)}}}"
    )


def pretrain(text: Path, run: Path, *settings: str, display: Display | None = None) -> None:
    launch([text], recipe="tiny", out=run, settings=[*SMALL, *settings], display=display)


def log(run: Path, key: str = "tokens") -> list[dict[str, Any]]:
    """Returns the log without times."""
    clock = {"seconds", "tokens_per_second", "training_seconds", "phase_seconds", "data_wait_fraction"}
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clock} for line in lines if key in line]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name} {key}": tensor
        for name in ("weights", "optimizer", "ema")
        for key, tensor in load_file(folder / "resume" / f"{name}.safetensors").items()
    }


def state(run: Path) -> dict[str, Any]:
    return json.loads((run / "latest" / "resume" / "state.json").read_text())


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Skipped steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "how"), [("Fails", "loss"), ("Fails", "gradient"), ("FailsAdaptive", "loss")])
def test_a_step_that_is_not_finite_changes_nothing(prose: Path, tmp_path: Path, name: str, how: str) -> None:
    """Weights, optimizer, average and the statistics of adaptive masking stay as they are, and only the data go on."""
    settings = ["train.every.save=1 steps", "train.keep_last=9", "train.budget=5 steps", "train.every.log=2 steps"]
    settings.append(failing(name, steps=[3], how=how))
    display = Messages()
    pretrain(prose, tmp_path / "whole", *settings, display=display)
    assert display.find("step 4: skipped 1 step since the last line")
    assert not (tmp_path / "whole" / "step-0000003").exists(), "put off: its weights are those of step 2"
    run = tmp_path / "run"
    with pytest.raises(Stopped):  # after step 3, which is skipped
        pretrain(prose, run, *settings, display=Messages(stop=2))
    assert same(tensors(run / "step-0000003"), tensors(run / "step-0000002"))
    assert state(run)["guards"]["skipped_steps"] == 1 and state(run)["cursor"] > 0
    resume(run)
    assert not same(tensors(run / "step-0000004"), tensors(run / "step-0000002"))
    assert same(tensors(run / "latest"), tensors(tmp_path / "whole" / "latest")) and log(run) == log(tmp_path / "whole")
    lines = log(run, "loss")
    assert [(line["step"], line.get("skipped_steps", 0)) for line in lines] == [(2, 0), (4, 1), (5, 0)]
    assert all(line["loss"] is not None and line["grad_norm"] is not None for line in lines)
    assert len({line["samples"] for line in lines}) == 3, "the samples of the skipped step are not repeated"


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_on_a_device_a_step_is_skipped_without_the_host(kind: str) -> None:
    """What a GPU computes, on a CPU: with `applies` true the bits are those without it; with false nothing moves."""
    torch.manual_seed(1)
    settings = ModernBertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16)
    module = TrainModule(*build_model(settings, 30), torch.nn.Identity())
    ema = EMA(copy.deepcopy(module), 0.9)
    config = OptimizerConfig(kind=kind)  # pyright: ignore[reportArgumentType]
    other = copy.deepcopy(module)
    other_ema = copy.deepcopy(ema)
    optimizers = [Optimizer(each, config) for each in (module, other)]

    def snapshot(optimizer: Optimizer, each: TrainModule, average: EMA) -> dict[str, torch.Tensor]:
        found = {**optimizer.state_tensors(), **each.state_dict()}
        found |= {f"average {name}": tensor for name, tensor in average.state_dict().items()}
        return {name: tensor.clone() for name, tensor in found.items()}

    for step in range(4):
        torch.manual_seed(step)
        for first, second in zip(module.parameters(), other.parameters(), strict=True):
            first.grad = torch.randn_like(first)
            second.grad = first.grad.clone()
        if step == 2:  # skipped on the device, and not tried at all by the other one
            next(module.parameters()).grad[0] = torch.nan
            norm = optimizers[0].clip()
            before = snapshot(optimizers[0], module, ema)
            optimizers[0].step(0.7, norm.isfinite())
            ema.update(module, step, norm.isfinite())
            assert not norm.isfinite() and same(snapshot(optimizers[0], module, ema), before)
            continue
        norm = optimizers[0].clip()
        optimizers[1].clip()
        optimizers[0].step(0.7, norm.isfinite())
        optimizers[1].step(0.7)
        ema.update(module, step, norm.isfinite())
        other_ema.update(other, step)
    assert same(snapshot(optimizers[0], module, ema), snapshot(optimizers[1], other, other_ema))


# Going back -----------------------------------------------------------------------------------------------------------

# The bias of the decoder moves by the learning rate in each step. With 0.01 it is too large in steps 8, 9 and 10; after
# the return to step 4 with 0.005, it is so from step 11 on.
BACK = ["optimizer.lr=1e-2", "train.max_skipped_steps=3", failing(most=0.067)]
SHORT = [*BACK, "train.budget=10 steps"]


@pytest.fixture(scope="module")
def gone_back(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("back")
    with contextlib.chdir(folder):
        (folder / "faults.py").write_text(FAULTS)
        pretrain(prose, folder / "run", *SHORT, display=(display := Messages()))
    (folder / "messages.txt").write_text("\n".join(display.messages))
    return folder / "run"


def test_a_run_goes_back_and_learns_slower(gone_back: Path) -> None:
    lines = log(gone_back, "loss")
    assert [line["step"] for line in lines] == list(range(1, 11)), "no step is logged twice"
    assert [line["learning_rate"] for line in lines] == [0.01] * 4 + [0.005] * 6
    times = [json.loads(line) for line in (gone_back / "log.jsonl").read_text().splitlines()]
    assert all(line["training_seconds"] <= line["seconds"] for line in times), "both with the discarded steps"
    rollback = {"from_step": 8, "to_step": 4, "learning_rate_scale": 0.5}
    assert [line.get("rollback") for line in lines] == [None] * 4 + [rollback] + [None] * 5
    discarded = [json.loads(line) for line in (gone_back / "discarded.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("skipped_steps", 0)) for line in discarded] == [
        (5, 0),
        (6, 0),
        (7, 0),
        (8, 1),
        (9, 1),
    ]
    # The same samples again, so that each still counts once in an epoch.
    assert [line["samples"] for line in lines[4:7]] == [line["samples"] for line in discarded[:3]]
    guards = {"skipped_steps": 3, "skipping_since": None, "rollbacks": 1, "lr_scale": 0.5}
    assert state(gone_back)["guards"] == {**guards, "lowest_loss": state(gone_back)["best"]["loss"]}
    said = (gone_back.parent / "messages.txt").read_text()
    assert (
        "3 steps in a row, up to step 10: going back to the checkpoint of step 4, with learning rates times 0.5" in said
    )


@pytest.mark.parametrize("stops", [(5,), (5, 8)])
def test_a_run_that_is_stopped_before_it_goes_back_ends_alike(
    prose: Path, tmp_path: Path, gone_back: Path, stops: tuple[int, ...]
) -> None:
    """Stopped after step 6, and again after step 9 while steps are skipped. Both go back to step 4, which is kept."""
    run = tmp_path / "run"
    for stop in stops:
        with pytest.raises(Stopped):
            if stop == stops[0]:
                pretrain(prose, run, *SHORT, "train.keep_last=1", display=Messages(stop))
            else:
                resume(run, display=Messages(stop))
    assert sorted(path.name for path in run.glob("step-*")) == [f"step-{step + 1:07d}" for step in (3, *stops)]
    assert stops == (5,) or state(run)["guards"]["skipping_since"] == 8
    resume(run)
    assert same(tensors(run / "latest"), tensors(gone_back / "latest")) and log(run) == log(gone_back)


def test_a_run_that_is_killed_after_it_went_back_ends_alike(prose: Path, tmp_path: Path, gone_back: Path) -> None:
    run = tmp_path / "run"
    program = f"""
import os, signal
from pathlib import Path
from unmask.training.display import Display
from unmask.training.pretrain import launch
class Kill(Display):
    def train_start(self, plan, state, *rates):
        self.went_back = state.rollbacks
    def step(self, state):
        if self.went_back and state.step == 6: os.kill(os.getpid(), signal.SIGKILL)
launch([Path({str(prose)!r})], recipe="tiny", out=Path({str(run)!r}), settings={[*SMALL, *SHORT]!r}, display=Kill())
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (run / "latest").readlink().name == "step-0000004" and state(run)["guards"]["lr_scale"] == 0.5
    resume(run)
    assert same(tensors(run / "latest"), tensors(gone_back / "latest")) and log(run) == log(gone_back)


def test_runs_that_skip_and_go_back_are_verified(prose: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["optimizer.lr=1e-2", "train.max_skipped_steps=2", "train.budget=9 steps", "train.keep_last=9"]
    pretrain(prose, run, *settings, failing(most=0.057, steps=[6]))
    assert sum(line.get("skipped_steps", 0) for line in log(run)) == 1 and state(run)["guards"]["rollbacks"] == 1
    found = verify(run, first_step=4, last_step=8, on_progress=lambda what, fraction: None)
    assert found.is_reproduced, found.comparisons
    with pytest.raises(RunError, match="between steps 0 and 8 the run went back to an earlier checkpoint"):
        verify(run, first_step=0, last_step=8, on_progress=lambda what, fraction: None)
    found = {each.name: each for each in examine_run(run, lambda what, fraction: None)}
    assert "in the lines of steps 6; the run went back" in found["skipped steps"].figure
    # Step 6 was skipped twice, and two steps before the return.
    assert found["skipped steps"].values == {"skipped_steps": 4, "rollbacks": 1}
    (report,) = collect([run])
    assert (report.skipped_steps, report.rollbacks, report.loss_spikes) == (4, 1, 0)
    (summary,) = find_runs(run)
    assert (summary.state, summary.step) == ("finished", 9)


def test_a_kill_while_the_checkpoint_is_written_again(prose: Path, tmp_path: Path, gone_back: Path) -> None:
    """Between two renames, the folder that `latest` names is missing; the old one is restored."""
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        pretrain(prose, run, *SHORT, display=Messages(3))
    os.rename(run / "step-0000004", run / ".step-0000004.aside-old")
    resume(run)
    assert same(tensors(run / "latest"), tensors(gone_back / "latest")) and log(run) == log(gone_back)
    assert not list(run.glob(".*"))


@pytest.mark.parametrize(
    ("steps", "keep", "kept"),
    [
        ([4, 6, 8], 2, [4, 8]),  # 6 was left by a signal; the run may have to go back to 4
        ([4, 5, 6, 7], 2, [4, 6, 7]),  # a signal leaves 7 now
        ([4, 8, 10, 12], 2, [8, 12]),
        ([3, 4], 2, [3, 4]),
        ([3], 1, [3]),
    ],
)
def test_checkpoints_of_signals_replace_none_of_the_interval(
    tmp_path: Path, steps: list[int], keep: int, kept: list[int]
) -> None:
    for step in steps:
        (tmp_path / f"step-{step:07d}").mkdir()
    outdated = outdated_checkpoints(tmp_path, steps[-1], keep, lambda step, seconds: step % 4 == 0)
    assert [int(path.name[5:]) for path in outdated] == [step for step in steps if step not in kept]


def test_a_run_goes_back_a_few_times_only(prose: Path, tmp_path: Path) -> None:
    """Step 8 fails at all rates. The log of the steps in between is discarded, and its counts are in the checkpoint."""
    run, display = tmp_path / "run", Messages()
    settings = ["optimizer.lr=1e-2", "train.max_skipped_steps=1", "train.max_rollbacks=2", failing(steps=[8])]
    with pytest.raises(Diverged, match="after going back to a checkpoint 2 times") as caught:
        pretrain(prose, run, *settings, display=display)
    assert "--set optimizer.lr=0.00125 --set optimizer.muon_lr=0.00175" in caught.value.hint, "half of a quarter"
    assert [len(display.find(f"rollback {n} of at most 2")) for n in (1, 2, 3)] == [1, 1, 0]
    assert state(run)["guards"]["lr_scale"] == 0.25 and all(
        torch.isfinite(each).all() for each in tensors(run / "latest").values()
    )
    assert len(log(run, "rollback")) == 1
    found = {each.name: each for each in examine_run(run, lambda what, fraction: None)}
    assert found["skipped steps"].values == {"skipped_steps": 2, "rollbacks": 2}
    (report,) = collect([run])
    assert (report.skipped_steps, report.rollbacks) == (2, 2)


def test_discarded_steps_neither_end_the_run_nor_leave_models(prose: Path, tmp_path: Path) -> None:
    """The best model of all steps stays, and patience and kept models start again from the checkpoint."""
    run, saved = tmp_path / "run", list[str]()

    class Saved(Messages):
        def saved(self, folder: Path) -> None:
            saved.append(folder.name)

    patience = ["train.every.validate=1 steps", "train.early_stopping_patience=2", 'train.keep_at=["300 words"]']
    pretrain(prose, run, *SHORT, *patience, display=(display := Saved()))
    assert display.find("going back to the checkpoint of step 4")
    assert saved.count("chck_300") == 2, "in step 5 of both timelines"
    texts = [(run / f"{name}.jsonl").read_text() for name in ("log", "discarded")]
    every = [json.loads(line) for text in texts for line in text.splitlines()]
    losses = {line["validation"]["loss"]: line["step"] for line in every if "validation" in line}
    again = [line["validation"]["loss"] for line in log(run, "validation") if 4 < line["step"] < 8]
    assert min(again) > min(losses), "slower than before, which is no reason to stop"
    assert not log(run, "ended_early") and state(run)["step"] == 10
    (summary,) = find_runs(run)
    best = state(run)["best"]
    assert (summary.best_loss, summary.best_step) == (best["loss"], best["step"]) == min(losses.items())
    assert json.loads((run / "best" / "card.json").read_text())["step"] == best["step"]


def test_skipped_steps_use_up_no_patience(prose: Path, tmp_path: Path) -> None:
    """The checkpoint of step 5 is put off to step 8, also if the run is stopped meanwhile."""
    settings = ["train.every.validate=1 steps", "train.early_stopping_patience=3", "train.every.save=5 steps"]
    settings += ["train.budget=9 steps", "train.keep_last=9", failing(steps=[4, 5, 6, 7])]
    pretrain(prose, tmp_path / "whole", *settings)
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        pretrain(prose, run, *settings, display=Messages(stop=5))
    resume(run)
    assert state(run)["step"] == 9 and log(run) == log(tmp_path / "whole")
    assert [len(list(each.glob("step-0000008"))) for each in (run, tmp_path / "whole")] == [1, 1]


def test_without_an_earlier_checkpoint_the_run_ends(prose: Path, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="no checkpoint before step 1 to go back to"):
        pretrain(prose, tmp_path / "run", failing(most=-1.0))
    assert len(log(tmp_path / "run", "skipped_steps")) == 9, "the tenth ends the run"
    with pytest.raises(Diverged, match="no checkpoint before step 8 to go back to") as caught:
        pretrain(prose, tmp_path / "one", failing(steps=[9]), "train.max_skipped_steps=1", "train.keep_last=1")
    assert caught.value.hint.endswith("--set train.keep_last=2"), "the weights of step 8 are those that failed"
    with pytest.raises(Diverged, match="in 10 steps in a row, up to step 10"):
        pretrain(prose, tmp_path / "never", failing(most=-1.0), "train.max_rollbacks=0")


def damage(checkpoint: Path) -> None:
    """Changes a byte of a checkpoint, once it is complete."""
    while not checkpoint.is_dir():
        time.sleep(0.01)
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


def test_a_run_goes_back_to_a_checkpoint_that_is_intact(prose: Path, tmp_path: Path, gone_back: Path) -> None:
    run = tmp_path / "run"
    display = Messages(after_step=lambda step: damage(run / "step-0000006") if step == 7 else None)
    pretrain(prose, run, *SHORT, "train.every.save=2 steps", display=display)
    assert display.find("the checkpoint of step 6 is damaged: the content of this file has changed")
    assert display.find("going back to the checkpoint of step 4")
    assert same(tensors(run / "latest"), tensors(gone_back / "latest")) and log(run) == log(gone_back)


def test_a_run_without_an_intact_checkpoint_ends_and_deletes_nothing(prose: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def after_step(step: int) -> None:
        for saved in (4, 6) if step == 7 else ():
            damage(run / f"step-{saved:07d}")

    display = Messages(after_step=after_step)
    with pytest.raises(Diverged, match="up to step 10, and no checkpoint before step 7 is intact: the cont") as caught:
        pretrain(prose, run, *SHORT, "train.every.save=2 steps", display=display)
    assert caught.value.location.endswith("step-0000006/model.safetensors") and "from a copy" in caught.value.hint
    assert [len(display.find(f"the checkpoint of step {step} is damaged")) for step in (4, 6)] == [1, 1]
    assert sorted(path.name for path in run.glob("step-*")) == ["step-0000004", "step-0000006"]
    assert (run / "latest").readlink().name == "step-0000006" and not (run / "discarded.jsonl").exists()
    assert [line["step"] for line in log(run, "loss")] == list(range(1, 10))


def test_checkpoints_of_the_interval_are_tried_first(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"step-{step:07d}").mkdir()
    assert earlier_steps(tmp_path, 10, lambda step, seconds: step % 4 == 0) == [8, 4, 6, 2]
    assert earlier_steps(tmp_path, 2, lambda step, seconds: True) == []


class Uneven(Messages):
    """Damages a checkpoint after step 7; then the return to an earlier one takes rank 1 100 seconds longer."""

    def __init__(self, damaged: Path | None) -> None:
        super().__init__(after_step=lambda step: damage(damaged) if damaged and step == 7 else None)

    def train_start(self, plan: Plan, state: TrainState, flops_per_token: float, flops_per_second: float) -> None:
        state.seconds += 100.0 * int(os.environ["RANK"]) * state.rollbacks


def main(folder: Path, text: Path) -> None:
    """Makes runs of two ranks that skip a step and go back; only rank 1 has a loss that is not finite in step 2."""
    from test_ranks import run_ranks

    settings = ["optimizer.lr=1e-2", "train.max_skipped_steps=2", "train.budget=9 steps", "train.every.save=2 steps"]
    settings += ["train.micro_batch_size=128 tokens", failing(most=0.057, steps=[2]), "train.every.validate=40 s"]
    for kind in ("ddp", "fsdp"):

        def work(rank: int, kind: str = kind) -> None:
            display = Uneven(folder / kind / "step-0000006" if rank == 0 else None)
            pretrain(text, folder / kind, *settings, f"train.parallel={kind}", display=display)

        codes = run_ranks(folder, kind, 2, work)
        assert codes == [0, 0], [path.read_text() for path in folder.glob(f"{kind}-*.txt")]


def test_two_ranks_skip_and_go_back_together(prose: Path, tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path), str(prose)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    for run in (tmp_path / "ddp", tmp_path / "fsdp"):
        lines = log(run, "loss")
        assert [line["step"] for line in lines] == list(range(1, 10))
        assert [line["step"] for line in lines if "skipped_steps" in line] == [2]
        assert [line["rollback"] for line in lines if "rollback" in line] == [
            {"from_step": 8, "to_step": 4, "learning_rate_scale": 0.5}
        ]
    first, second = (load_file(tmp_path / kind / "latest" / "model.safetensors") for kind in ("ddp", "fsdp"))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-5)


# Jumps of the loss ----------------------------------------------------------------------------------------------------


def test_a_jump_of_the_loss_is_named_once(prose: Path, tmp_path: Path) -> None:
    run, display = tmp_path / "run", Messages()
    settings = ["train.budget=24 steps", failing(steps=[15, 16, 21], how="spike")]
    with pytest.raises(Stopped):
        pretrain(prose, run, *settings, display=Messages(stop=13))
    resume(run, display=display)  # the lines before are known from the log
    assert [line["step"] for line in log(run, "loss_spike")] == [15, 21], "steps 15 and 16 are one"
    found = {each.name: each for each in examine_run(run, lambda what, fraction: None)}
    assert found["loss spikes"].figure.endswith("in the lines of steps 15, 21")
    assert all(2 < line["loss_spike"] < 4 for line in log(run, "loss_spike"))
    assert len(display.find("nats above the median of the lines before")) == 2


def curve(steps: range, seed: int, border: int = 10**9, plateau: float = 2.0) -> Iterator[dict[str, Any]]:
    """Losses that fall from 9 to a plateau, with noise, and rise by 0.4 where the sequences become longer."""
    draw = random.Random(seed)
    for step in steps:
        loss = plateau + 7 * 0.9**step + (0.4 if step > border else 0.0) + draw.gauss(0, 0.05)
        yield {"step": step, "loss": loss, "masked_tokens": 3000}


@pytest.mark.parametrize("seed", range(10))
def test_no_false_alarm(seed: int) -> None:
    """Not at the start, in noise, where a stage or an objective begins at another level, or in lines without a loss."""
    plan = Plan((StagePlan(32, 256, 0, 100, 0.0), StagePlan(64, 256, 100, 200, 0.0)))
    spikes = LossSpikes(plan)
    lines = [*curve(range(1, 101), seed), *curve(range(101, 301), seed + 100, border=0, plateau=6.0)]
    assert not any(map(spikes.add, lines))
    assert not spikes.add({"step": 301, "loss": None, "masked_tokens": 0})
    assert not spikes.add({"step": 301, "validation": {"loss": 99.0}})
    assert spikes.add({"step": 301, "loss": 8.5, "masked_tokens": 3000}) > 1.5
    assert not spikes.add({"step": 302, "loss": 8.6, "masked_tokens": 3000}), "the same spike"


# Disk -----------------------------------------------------------------------------------------------------------------


def limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def no_limit_after() -> Iterator[None]:
    yield
    if resource is not None:
        limit(resource.RLIM_INFINITY)


@pytest.mark.skipif(resource is None, reason="this system has no limits to set")
@pytest.mark.parametrize("spare", [3000, 20])
@pytest.mark.usefixtures("no_limit_after")
def test_a_full_disk_costs_a_checkpoint_and_no_more(prose: Path, tmp_path: Path, spare: int) -> None:
    """Steps 6 to 10 can't save; with 20 spare bytes, not even log lines are written. Nothing is missing in the end."""
    run, seen = tmp_path / "run", dict[int, list[str]]()

    def after_step(step: int) -> None:
        seen[step] = sorted(path.name for path in run.iterdir() if "step-" in path.name)
        if step == 6:
            limit((run / "log.jsonl").stat().st_size + spare)
        if step == 11:
            limit(resource.RLIM_INFINITY)

    settings = ["train.every.validate=4 steps", "train.background_save=false"]
    settings.append('train.keep_at=["300 words", "500 words"]')
    pretrain(prose, tmp_path / "whole", *settings)
    pretrain(prose, run, *settings, display=(display := Messages(after_step=after_step)))
    assert seen[9] == ["step-0000004"], "the last good one, and no part of that of step 8"
    assert display.find(
        "step 8: the checkpoint is not saved", "the last checkpoint is that of step 4; training goes on"
    )
    assert display.find("step 8: the best model is not saved")
    assert display.find("step 9: the model chck_500 is not kept (can't write: ", "training goes on without it")
    assert [(each / "chck_500").exists() for each in (run, tmp_path / "whole")] == [False, True]
    assert (run / "chck_300").is_dir()
    assert bool(display.find("log lines wait until the disk has space")) == (spare == 20)
    assert same(tensors(run / "latest"), tensors(tmp_path / "whole" / "latest")) and log(run) == log(tmp_path / "whole")
    assert not list(run.glob(".*"))


@pytest.mark.skipif(resource is None, reason="this system has no limits to set")
@pytest.mark.usefixtures("no_limit_after")
def test_the_last_checkpoint_must_be_saved(prose: Path, tmp_path: Path) -> None:
    """Also that of a run that is stopped by a signal."""
    run = tmp_path / "run"
    full = Messages(after_step=lambda step: limit(3000) if step == 6 else None)
    with pytest.raises(StoreError, match="File too large") as caught:
        pretrain(prose, run, "train.background_save=false", display=full)
    assert "saved checkpoints are intact" in caught.value.hint
    limit(resource.RLIM_INFINITY)
    full = Messages(6, after_step=lambda step: limit(3000) if step == 6 else None)
    with pytest.raises(StoreError, match="File too large"):
        pretrain(prose, tmp_path / "stopped", "train.background_save=false", display=full)


def test_a_disk_that_becomes_full_is_named_once_until_it_recovers(tmp_path: Path) -> None:
    (tmp_path / "step-0000001").mkdir()
    (tmp_path / "step-0000001" / "weights").write_bytes(b"0" * 1000)
    watch = DiskWatch(tmp_path, 10**18)
    assert "the next 2 checkpoints need 2,000,000,000 GB" in watch.warning()
    assert watch.warning() == ""
    watch.measure(tmp_path / "step-0000001")
    assert watch.warning() == "" and shutil.disk_usage(tmp_path).free > 2000
    assert DiskWatch(tmp_path / "gone", 10**18).warning() == "", "the next save says what is wrong"


# Clock ----------------------------------------------------------------------------------------------------------------


def test_training_reads_no_clock_that_can_jump() -> None:
    """Budgets, intervals and times come from monotonic clocks. TensorBoard dates its points, in one place."""
    clocks = {f"{module}.{name}" for module in ("datetime", "datetime.datetime") for name in ("now", "utcnow", "today")}
    clocks |= {"time.time", "time.time_ns", "date.today", "datetime.date.today"}
    source = Path(sys.modules["unmask.training"].__file__ or "").parent
    found = [
        f"{path.name}: {ast.unparse(node)}"
        for path in source.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in clocks
    ]
    assert found == ["loggers.py: time.time"]


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    main(Path(sys.argv[1]), Path(sys.argv[2]))
