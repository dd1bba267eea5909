"""Resuming: 10 steps equal 5 steps, a stop and 5 steps, bit for bit; a killed process loses nothing that was saved."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unmask.core.errors import DamagedError, RunError, StoreError
from unmask.training.display import Display, Summary
from unmask.training.pretrain import launch, resume
from unmask.training.runs import RUN_FORMAT

SMALL = [
    "data.tokenizer.kind=characters", "model.num_hidden_layers=2", "model.hidden_size=32",
    "model.num_attention_heads=2", "model.intermediate_size=48", "model.attention_dropout=0.1",
    "model.embedding_dropout=0.1",
    "train.every.log=2 steps", "train.every.validate=5 steps", "train.every.save=5 steps", "train.threads=1",
    "stage=[{until = '50%', max_seq_len = 24, batch_size = '512 tokens'}, "
    "{until = '100%', max_seq_len = 48, batch_size = '512 tokens'}]",
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
    """Returns the log without times."""
    clock = {"seconds", "tokens_per_second", "training_seconds", "phase_seconds", "data_wait_fraction"}
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clock} for line in log]


class StopsAt(Display):
    """Sends a signal to this process after a given step."""

    def __init__(self, step: int, number: int) -> None:
        self._step, self._number = step, number

    def step(self, state) -> None:
        if state.step == self._step:
            os.kill(os.getpid(), self._number)


@pytest.fixture(scope="module")
def uninterrupted(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    launch([prose], recipe="tiny", out=run, settings=[*SMALL, "train.budget=10 steps"])
    return run


@pytest.mark.parametrize(
    ("number", "code", "step"), [(signal.SIGINT, 130, 4), (signal.SIGTERM, 75, 6), (signal.SIGUSR1, 75, 3)]
)
def test_a_stopped_and_resumed_run_is_bit_identical(
    uninterrupted: Path, prose: Path, tmp_path: Path, number: int, code: int, step: int
) -> None:
    from unmask.core.errors import Stopped

    run = tmp_path / "run"
    with pytest.raises(Stopped) as stopped:
        launch(
            [prose], recipe="tiny", out=run, settings=[*SMALL, "train.budget=10 steps"], display=StopsAt(step, number)
        )
    assert stopped.value.exit_code == code and step <= stopped.value.step <= step + 1
    assert (run / "latest").exists()
    resume(run)
    assert same(weights(run), weights(uninterrupted))
    assert lines(run) == lines(uninterrupted)


def test_a_killed_process_loses_only_what_was_not_saved(uninterrupted: Path, prose: Path, tmp_path: Path) -> None:
    """Log lines after the last checkpoint move to discarded.jsonl, and the repeated steps give the same bits."""
    run = tmp_path / "run"
    program = f"""
import os, signal
from pathlib import Path
from unmask.training.pretrain import launch
from unmask.training.display import Display
class Kill(Display):
    def step(self, state):
        if state.step == 9: os.kill(os.getpid(), signal.SIGKILL)
settings = {[*SMALL, "train.budget=10 steps", "train.background_save=false"]!r}
launch([Path({str(prose)!r})], recipe="tiny", out=Path({str(run)!r}), settings=settings, display=Kill())
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [line["step"] for line in lines(run)][-1] == 8
    resume(run)
    assert same(weights(run), weights(uninterrupted)) and lines(run) == lines(uninterrupted)
    discarded = [json.loads(line) for line in (run / "discarded.jsonl").read_text().splitlines()]
    assert [line["step"] for line in discarded] == [6, 8]


def test_a_finished_run_can_be_extended(uninterrupted: Path, prose: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch([prose], recipe="tiny", out=run, settings=[*SMALL, "train.budget=6 steps"])
    before = weights(run)
    assert resume(run).finished_before and same(weights(run), before)
    result = resume(run, budget="+4 steps")
    assert isinstance(result.summary, Summary) and result.summary.steps == 10
    assert [line["step"] for line in lines(run) if "loss" in line][-1] == 10
    assert resume(run).finished_before
    with pytest.raises(Exception, match="does not exceed"):
        resume(run, budget="10 steps")


def test_a_setting_that_may_not_change_is_refused(uninterrupted: Path) -> None:
    with pytest.raises(RunError, match=r"train\.every, train\.keep_last, train\.report, train\.upload, preview"):
        resume(uninterrupted, settings=["objective.mask_rate=0.3"], budget="+1 steps")


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
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_checkpoint_is_named(uninterrupted: Path, tmp_path: Path, file: str, damage: str) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run, symlinks=True)
    damaged = run / "latest" / file
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data if damage == "flip" else data[:-3])
    with pytest.raises(DamagedError, match=Path(file).name):
        resume(run, budget="+1 steps")


def test_other_versions_are_refused(uninterrupted: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run, symlinks=True)
    environment = json.loads((run / "env.json").read_text())
    environment["determinism"]["torch"] = "1.0"
    (run / "env.json").write_text(json.dumps(environment))
    with pytest.raises(RunError, match=r"torch: '1\.0' at the start"):
        resume(run, budget="+1 steps")
    assert resume(run, budget="+1 steps", allow_different_environment=True).summary is not None
    assert json.loads((run / "env.json").read_text())["resumed_in_different_environment"]


def write_old_run(run: Path) -> Path:
    """Writes files of a run as unmask 0.1 wrote them before run format 2: other keys, and no format number."""
    step = run / "step-0000004"
    (step / "resume").mkdir(parents=True)
    (run / "recipe.toml").write_text('[text]\nerrors = "strict"\n\n[encoder]\nwidth = 32\n\n[plan]\nstages = []\n')
    bits = {"device": "cpu", "threads": 1, "unmask": "0.1.0"}
    text = {"paths": ["prose.txt"], "fingerprint": "0" * 32, "tokenizer": "0" * 32}
    (run / "env.json").write_text(json.dumps({"bits": bits, "text": text}))
    (step / "resume" / "state.json").write_text(json.dumps({"step": 4, "window": {}, "rate": 0.1}))
    (run / "latest").symlink_to(step.name)
    return run


def test_a_run_of_an_earlier_format_is_refused(tmp_path: Path) -> None:
    run = write_old_run(tmp_path / "run")
    with pytest.raises(RunError, match="run format 1 is not supported") as refused:
        resume(run)
    assert refused.value.hint == "start a new run; fill, evaluate, export and --from still open the models of this one"
    assert not (run / "lock").exists()


def test_a_run_that_an_earlier_commit_has_saved_goes_on(tmp_path: Path) -> None:
    """tests/training/stored has a run after 6 of 10 steps, and the losses of the commit that wrote it."""
    stored = Path(__file__).parent / "stored"
    run = Path(shutil.copytree(stored / "run", tmp_path / "run", symlinks=True))
    resume(run, allow_different_environment=True)  # another machine
    expected = json.loads((stored / "expected.json").read_text())["losses"]
    losses = {str(line["step"]): line["loss"] for line in lines(run) if "loss" in line}
    assert [losses[step] for step in expected] == pytest.approx(list(expected.values()), rel=1e-5)


def test_a_state_of_another_version_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run, symlinks=True)
    shutil.copy(write_old_run(tmp_path / "old") / "latest" / "resume" / "state.json", run / "latest" / "resume")
    with pytest.raises(DamagedError, match="invalid training state") as refused:
        resume(run)
    assert "state.json" in refused.value.location and "env.json" in refused.value.hint


def test_the_state_file_has_these_keys(uninterrupted: Path) -> None:
    """The keys are a file format: change RUN_FORMAT with them."""
    state = json.loads((uninterrupted / "latest" / "resume" / "state.json").read_text())
    assert list(state) == [
        "step", "cursor", "tokens", "seconds", "phase_seconds", "metrics", "learning_rate", "grad_norm", "validation",
        "best", "validations_without_gain",
    ]  # fmt: skip
    assert list(state["metrics"]) == ["sums", "counts", "tokens", "samples", "seconds", "data_wait_seconds"]
    assert json.loads((uninterrupted / "env.json").read_text())["format"] == RUN_FORMAT == 4


def test_an_existing_output_path_is_refused(uninterrupted: Path, prose: Path) -> None:
    with pytest.raises(RunError, match="--resume"):
        launch([prose], recipe="tiny", out=uninterrupted, settings=SMALL)


def test_an_output_path_that_cannot_be_written(prose: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="--out"):
        launch([prose], recipe="tiny", out=tmp_path / "file" / "run", settings=SMALL)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file"]


def test_resuming_takes_the_same_time_after_many_steps(prose: Path, tmp_path: Path) -> None:
    """Nothing is replayed: the cursor is one integer, and the millionth sample is found as fast as the first."""
    from unmask.data.sampling import WindowSampler

    lengths = torch.randint(1, 400, (2000,)).numpy()
    cutter = WindowSampler(lengths, 64, seed=1)
    begin = time.perf_counter()
    late = cutter.specs(10**6, cutter.count(0) - 1, cutter.count(0))[0]
    assert late.tokens > 0 and time.perf_counter() - begin < 1.0
