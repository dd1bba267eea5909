"""Stopping and going on: 10 steps are 5 steps, a stop and 5 steps, bit for bit; a kill loses nothing that was saved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unmask.core.errors import DamagedError, RunError, StoreError
from unmask.training.display import Summary
from unmask.training.display.plain import SilentDisplay
from unmask.training.pretrain import launch, resume

SMALL = [
    "data.tokenizer.kind=characters", "model.num_hidden_layers=2", "model.hidden_size=32", "model.num_attention_heads=2",
    "model.intermediate_size=48", "model.attention_dropout=0.1", "model.embedding_dropout=0.1",
    "train.every.log=2 steps", "train.every.validate=5 steps", "train.every.save=5 steps", "train.threads=1",
    "stage=[{until = '50%', max_seq_len = 24, batch_size = '512 tokens'}, {until = '100%', max_seq_len = 48, batch_size = '512 tokens'}]",
]  # fmt: skip


def weights(run: Path) -> dict[str, torch.Tensor]:
    step = run / "latest"
    return {
        **load_file(step / "model.safetensors"),
        **load_file(step / "resume" / "weights.safetensors"),
        **load_file(step / "resume" / "optimizer.safetensors"),
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def lines(run: Path) -> list[dict[str, object]]:
    """The log without what a clock says."""
    clock = {"seconds", "tokens_per_second", "training_seconds", "phase_seconds"}
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clock} for line in log]


class StopsAt(SilentDisplay):
    """Asks this process to stop, as a person would, after a given step."""

    def __init__(self, step: int, number: int) -> None:
        self._step, self._number = step, number

    def step(self, state) -> None:
        if state.step == self._step:
            os.kill(os.getpid(), self._number)


@pytest.fixture(scope="module")
def undisturbed(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    launch([prose], recipe="tiny", out=run, settings=[*SMALL, "train.budget=10 steps"])
    return run


@pytest.mark.parametrize(
    ("number", "code", "at"), [(signal.SIGINT, 130, 4), (signal.SIGTERM, 75, 6), (signal.SIGUSR1, 75, 3)]
)
def test_ten_is_a_stop_and_the_rest(
    undisturbed: Path, prose: Path, tmp_path: Path, number: int, code: int, at: int
) -> None:
    from unmask.core.errors import Stopped

    run = tmp_path / "run"
    with pytest.raises(Stopped) as stopped:
        launch([prose], recipe="tiny", out=run, settings=[*SMALL, "train.budget=10 steps"], display=StopsAt(at, number))
    assert stopped.value.exit_code == code and at <= stopped.value.step <= at + 1
    assert (run / "latest").exists()
    resume(run)
    assert same(weights(run), weights(undisturbed))
    assert lines(run) == lines(undisturbed)


def test_a_kill_loses_only_what_was_not_saved(undisturbed: Path, prose: Path, tmp_path: Path) -> None:
    """A process that is killed after a save: what it logged since moves aside, and the rest is done again, the same."""
    run = tmp_path / "run"
    program = f"""
import os, signal
from pathlib import Path
from unmask.training.pretrain import launch
from unmask.training.display.plain import SilentDisplay
class Kill(SilentDisplay):
    def step(self, standing):
        if standing.step == 9: os.kill(os.getpid(), signal.SIGKILL)
settings = {[*SMALL, "train.budget=10 steps"]!r}
launch([Path({str(prose)!r})], recipe="tiny", out=Path({str(run)!r}), settings=settings, display=Kill())
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [line["step"] for line in lines(run)][-1] == 8
    resume(run)
    assert same(weights(run), weights(undisturbed)) and lines(run) == lines(undisturbed)
    discarded = [json.loads(line) for line in (run / "discarded.jsonl").read_text().splitlines()]
    assert [line["step"] for line in discarded] == [6, 8]


def test_a_finished_run_says_so_and_can_be_prolonged(undisturbed: Path, prose: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch([prose], recipe="tiny", out=run, settings=[*SMALL, "train.budget=6 steps"])
    before = weights(run)
    assert resume(run).finished_before and same(weights(run), before)
    result = resume(run, budget="+4 steps")
    assert isinstance(result.summary, Summary) and result.summary.steps == 10
    assert [line["step"] for line in lines(run) if "loss" in line][-1] == 10
    assert resume(run).finished_before
    with pytest.raises(Exception, match="no more than"):
        resume(run, budget="10 steps")


def test_what_may_not_change_is_refused_with_what_may(undisturbed: Path) -> None:
    with pytest.raises(RunError, match=r"train\.every, train\.keep_last, preview"):
        resume(undisturbed, settings=["objective.mask_rate=0.3"], budget="+1 steps")


def test_a_changed_corpus_is_refused(prose: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_bytes(prose.read_bytes())
    launch([copy], recipe="tiny", out=tmp_path / "run", settings=[*SMALL, "train.budget=2 steps"])
    with copy.open("a") as file:
        file.write("\n\nOne more document.\n")
    before = (tmp_path / "run" / "recipe.toml").read_bytes()
    with pytest.raises(RunError, match=r"copy\.txt"):
        resume(tmp_path / "run", budget="+1 steps")
    assert (tmp_path / "run" / "recipe.toml").read_bytes() == before


@pytest.mark.parametrize("file", ["model.safetensors", "resume/optimizer.safetensors", "resume/state.json"])
@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_a_damaged_checkpoint_is_named(undisturbed: Path, tmp_path: Path, file: str, harm: str) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)
    victim = run / "latest" / file
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data if harm == "flip" else data[:-3])
    with pytest.raises(DamagedError, match=Path(file).name):
        resume(run, budget="+1 steps")


def test_other_versions_are_named(undisturbed: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)
    environment = json.loads((run / "env.json").read_text())
    environment["determinism"]["torch"] = "1.0"
    (run / "env.json").write_text(json.dumps(environment))
    with pytest.raises(RunError, match=r"torch: '1\.0' then"):
        resume(run, budget="+1 steps")
    assert resume(run, budget="+1 steps", allow_different_environment=True).summary is not None
    assert json.loads((run / "env.json").read_text())["resumed_in_different_environment"]


def test_an_existing_out_is_refused_and_names_resume(undisturbed: Path, prose: Path) -> None:
    with pytest.raises(RunError, match="--resume"):
        launch([prose], recipe="tiny", out=undisturbed, settings=SMALL)


def test_a_place_that_cannot_be_written(prose: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="--out"):
        launch([prose], recipe="tiny", out=tmp_path / "file" / "run", settings=SMALL)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file"]


def test_resuming_costs_the_same_after_many_steps(prose: Path, tmp_path: Path) -> None:
    """No replay: the cursor is one integer, and the millionth sample is found as fast as the first."""
    from unmask.data.sampling import WindowSampler

    lengths = torch.randint(1, 400, (2000,)).numpy()
    cutter = WindowSampler(lengths, 64, seed=1)
    begin = time.perf_counter()
    late = cutter.cut(epoch=10**6, sample=cutter.count(0) - 1)
    assert late.tokens > 0 and time.perf_counter() - begin < 1.0
