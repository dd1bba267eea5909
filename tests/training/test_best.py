"""The best model by validation is kept, and a run may stop early when validations no longer improve."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unmask import load
from unmask.core import files
from unmask.core.errors import DamagedError, RecipeError, RunError, Stopped
from unmask.training.display import Display
from unmask.training.loop import TrainState
from unmask.training.pretrain import launch, resume
from unmask.training.recipe import TrainConfig

# Learning rates that rise to the end, far too high: the loss falls for some steps, then rises to a multiple.
UNSTABLE = [
    "data.tokenizer.kind=characters", "model.num_hidden_layers=1", "model.hidden_size=16",
    "model.num_attention_heads=2", "model.intermediate_size=16", "train.every.log=4 steps",
    "train.every.validate=1 steps", "train.every.save=5 steps",
    "train.threads=1", "stage=[{max_seq_len = 32, batch_size = '256 tokens'}]", "seed=2",
    "optimizer.lr=3.0", "optimizer.muon_lr=3.0",
    "lr_schedule.warmup=100%", "lr_schedule.decay=0%",
]  # fmt: skip


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["validation"]["loss"] for line in lines(run) if "validation" in line}


def without_clock(run: Path) -> list[dict]:
    clock = {"seconds", "tokens_per_second", "training_seconds", "phase_seconds", "data_wait_fraction"}
    return [{name: value for name, value in line.items() if name not in clock} for line in lines(run)]


def same(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class StopsAt(Display):
    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, state) -> None:
        if state.step == self._step:
            os.kill(os.getpid(), signal.SIGINT)


class Messages(Display):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, message: str) -> None:
        self.messages.append(message)


@pytest.fixture(scope="module")
def unstable(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    model = launch([prose], recipe="tiny", out=run, settings=[*UNSTABLE, "train.budget=12 steps"]).model
    assert model and model.card == load(run).card and model.card["step"] != 12, "the best model, as load returns it"
    return run


def test_the_best_is_the_step_of_the_lowest_validation_loss(unstable: Path) -> None:
    by_step = losses(unstable)
    best = min(by_step, key=by_step.__getitem__)
    assert best != 12, "else the test shows nothing"
    card = json.loads((unstable / "best" / "card.json").read_text())
    assert card["step"] == best and card["validation"]["loss"] == by_step[best]
    files.verify_manifest(unstable / "best")
    assert not (unstable / "best" / "resume").exists()
    model = load(unstable)
    assert model.card["step"] == best and Path(model.path) == unstable / "best"
    assert load(unstable / "latest").card["step"] == 12


def test_the_best_and_the_last_model_are_equal_if_the_last_step_is_the_best(prose: Path, tmp_path: Path) -> None:
    stable = [text for text in UNSTABLE if "optimizer" not in text and "schedule" not in text]
    launch([prose], recipe="tiny", out=tmp_path / "run", settings=[*stable, "train.budget=4 steps"])
    assert json.loads((tmp_path / "run" / "best" / "card.json").read_text())["step"] == 4
    assert same(tmp_path / "run" / "best" / "model.safetensors", tmp_path / "run" / "latest" / "model.safetensors")


def test_keep_best_false_keeps_no_best_model(prose: Path, tmp_path: Path) -> None:
    settings = [*UNSTABLE, "train.budget=3 steps", "train.keep_best=false"]
    launch([prose], recipe="tiny", out=tmp_path / "run", settings=settings)
    assert not (tmp_path / "run" / "best").exists() and load(tmp_path / "run").card["step"] == 3


def test_a_resumed_run_keeps_the_same_best(prose: Path, tmp_path: Path, unstable: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        launch([prose], recipe="tiny", out=run, settings=[*UNSTABLE, "train.budget=12 steps"], display=StopsAt(7))
    resume(run)
    assert without_clock(run) == without_clock(unstable)
    assert same(run / "best" / "model.safetensors", unstable / "best" / "model.safetensors")
    assert (run / "best" / "card.json").read_bytes() == (unstable / "best" / "card.json").read_bytes()


def test_a_kill_while_the_best_is_replaced_leaves_the_old_one_whole(unstable: Path, tmp_path: Path) -> None:
    """Killed before the two renames, and between them: `load` opens the old model, and resuming repairs the run."""
    run = tmp_path / "run"
    shutil.copytree(unstable, run, symlinks=True)
    before = load_file(run / "best" / "model.safetensors")
    for moment in ("writing", "between"):
        program = (
            "import os, signal, sys\nfrom pathlib import Path\nfrom unmask.core import files\n"
            "best = Path(sys.argv[1]) / 'best'\n"
            "if sys.argv[2] == 'between':\n"
            "    rename = os.rename\n"
            "    def kill(a, b):\n"
            "        if Path(b) == best: os.kill(os.getpid(), signal.SIGKILL)\n"
            "        rename(a, b)\n"
            "    os.rename = kill\n"
            "with files.atomic_directory(best) as folder:\n"
            "    (folder / 'model.safetensors').write_text('half')\n"
            "    if sys.argv[2] == 'writing': os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        done = subprocess.run([sys.executable, "-c", program, str(run), moment], check=False, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert (run / "best").exists() == (moment == "writing")
        model = load(run)
        after = load_file(Path(model.path) / "model.safetensors")
        assert all(torch.equal(before[name], after[name]) for name in before)
    resume(run, budget="+1 steps")
    assert not list(run.glob(".*")), "no temporary directories are left"
    files.verify_manifest(run / "best")


def test_a_damaged_best_is_named(unstable: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(unstable, run, symlinks=True)
    damaged = run / "best" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    with pytest.raises(DamagedError, match=r"best/model\.safetensors"):
        load(run)


# Early stopping -----------------------------------------------------------------------------------------------------


def test_validations_without_gain_are_counted() -> None:
    state = TrainState()
    for step, (loss, improved, without_gain) in enumerate(
        [(3.0, True, 0), (3.0, False, 1), (float("nan"), False, 2), (2.9, True, 0), (3.1, False, 1)]
    ):
        state.step = step
        assert state.record_validation(loss) is improved and state.without_gain == without_gain
    assert state.best == {"step": 3, "loss": 2.9}


def test_a_patience_below_zero_is_refused() -> None:
    with pytest.raises(RecipeError, match="invalid early_stopping_patience: got -1"):
        TrainConfig(early_stopping_patience=-1)


def first_early_stop(by_step: dict[int, float], patience: int) -> int:
    """Returns the step at which a run with this patience stops, from the losses of a run without."""
    best, without = float("inf"), 0
    for step, loss in by_step.items():
        best, without = (loss, 0) if loss < best else (best, without + 1)
        if without == patience:
            return step
    raise AssertionError("never")


def test_early_stopping_and_its_count_survive_a_resume(prose: Path, tmp_path: Path, unstable: Path) -> None:
    ends_at = first_early_stop(losses(unstable), 3)
    assert 3 < ends_at < 12, "else the test shows nothing"
    early = [*UNSTABLE, "train.budget=12 steps", "train.early_stopping_patience=3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    summary = launch([prose], recipe="tiny", out=whole, settings=early).summary
    assert summary and summary.steps == ends_at and summary.early == "3 validations without gain"
    assert lines(whole)[-1]["ended_early"] == "3 validations without gain"
    assert losses(whole) == {step: loss for step, loss in losses(unstable).items() if step <= ends_at}
    assert load(whole / "latest").card["step"] == ends_at
    assert load(whole).card["step"] == summary.best_step

    with pytest.raises(Stopped):  # between validations without gain
        launch([prose], recipe="tiny", out=cut, settings=early, display=StopsAt(ends_at - 2))
    resume(cut)
    assert without_clock(cut) == without_clock(whole)
    assert same(cut / "latest" / "resume" / "weights.safetensors", whole / "latest" / "resume" / "weights.safetensors")

    display = Messages()
    assert resume(whole, display=display).finished_before
    assert "ended early" in display.messages[0] and "train.early_stopping_patience=0" in display.messages[0]
    resume(whole, settings=["train.early_stopping_patience=0"])
    assert losses(whole) == losses(unstable)
    assert same(
        whole / "latest" / "resume" / "weights.safetensors", unstable / "latest" / "resume" / "weights.safetensors"
    )


def test_a_setting_that_may_not_change_is_refused(unstable: Path) -> None:
    with pytest.raises(RunError, match=r"train\.early_stopping_patience, train\.loggers"):
        resume(unstable, settings=["train.ema_decay=0.9"], budget="+1 steps")
