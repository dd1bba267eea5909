"""A full disk, and one without symbolic links: checkpoints are kept, and the resumed run gives the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unmask import load
from unmask.core.errors import DamagedError, StoreError
from unmask.models.model import follow
from unmask.training.display import Display
from unmask.training.estimate import check_free_space
from unmask.training.loggers import JsonlLogger, read_log
from unmask.training.loop import TrainState
from unmask.training.pretrain import LaunchOptions, launch, resume

try:
    import resource
except ImportError:  # Windows
    resource = None

SMALL = [
    "data.tokenizer.kind=characters", "model.num_hidden_layers=1", "model.hidden_size=16",
    "model.num_attention_heads=2", "model.intermediate_size=16", "train.every.log=1 steps",
    "train.every.validate=4 steps", "train.every.save=4 steps",
    "train.threads=1", "stage=[{max_seq_len = 32, batch_size = '256 tokens'}]", "train.budget=10 steps",
    "train.ema_decay=0.9", "preview.num_samples=0",
    "train.background_save=false",  # what is saved when the disk becomes full must not depend on the machine's speed
]  # fmt: skip


def weights(run: Path) -> dict[str, torch.Tensor]:
    step = follow(run / "latest")
    files = ("model", "resume/weights", "resume/optimizer", "resume/ema")
    return {
        f"{file} {name}": value for file in files for name, value in load_file(step / f"{file}.safetensors").items()
    }


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_log(run / "log.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def uninterrupted(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    launch([prose], recipe="tiny", out=run, settings=SMALL)
    return run


@pytest.mark.skipif(resource is None, reason="this system has no limits to set")
def test_a_full_disk_loses_nothing_that_was_saved(prose: Path, tmp_path: Path, uninterrupted: Path) -> None:
    """From step 6 on, a real process can write no long file: saving step 8 fails, and that of the last step ends it."""
    run = tmp_path / "run"
    program = f"""
import resource
from pathlib import Path
from unmask.cli.errors import handle_errors
from unmask.training.pretrain import launch
from unmask.training.display import Display
from unmask.training.estimate import check_free_space
run = Path({str(run)!r})
class Fills(Display):
    def step(self, standing):
        if standing.step == 6:
            most = (run / "log.jsonl").stat().st_size + 4000
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
handle_errors(lambda: launch([Path({str(prose)!r})], recipe="tiny", out=run, settings={SMALL!r}, display=Fills()))()
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=120)
    err = " ".join(done.stderr.split())
    assert err.startswith("error: can't write: I/O error: File too large"), done.stderr
    assert f"then resume (saved checkpoints are intact): unmask pretrain --resume {run}" in err
    check_resume(run, uninterrupted)


def check_resume(run: Path, uninterrupted: Path) -> None:
    """The last checkpoint is complete, nothing incomplete is left, and the resumed run gives the same bits."""
    assert (run / "latest").readlink().name == "step-0000004" and load(run).card["step"] == 4
    assert not list(run.glob(".*")) and not (run / "lock").exists() and not (run / "crash.txt").exists()
    assert (run / "log.jsonl").read_text().endswith("}\n"), "complete lines only"
    resume(run)
    assert same(run, uninterrupted) and losses(run) == losses(uninterrupted)


class Limits(Display):
    """Limits the file size of this process from a given event on."""

    def __init__(self, event: str, limit_bytes: Callable[[], int]) -> None:
        self._event, self._limit_bytes = event, limit_bytes
        self._old_limit: tuple[int, int] | None = None

    def step(self, state: TrainState) -> None:
        if f"step {state.step}" == self._event:
            self._limit()

    def sample(self, text: str, tokens: object) -> None:
        if self._event == "the sample":
            self._limit()

    def close(self) -> None:
        if self._old_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, self._old_limit)

    def _limit(self) -> None:
        self._old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._limit_bytes(), self._old_limit[1]))


@pytest.mark.skipif(resource is None, reason="this system has no limits to set")
def test_a_full_disk_leaves_complete_log_lines(prose: Path, tmp_path: Path, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    display = Limits("step 6", lambda: (run / "log.jsonl").stat().st_size + 20)
    with pytest.raises(StoreError, match="File too large") as caught:
        launch([prose], recipe="tiny", out=run, settings=SMALL, display=display)
    assert str(run / "log.jsonl") in caught.value.location and f"--resume {run}" in caught.value.hint
    check_resume(run, uninterrupted)


@pytest.mark.skipif(resource is None, reason="this system has no limits to set")
def test_a_full_disk_before_the_first_checkpoint(prose: Path, tmp_path: Path, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    display = Limits("step 2", lambda: (run / "log.jsonl").stat().st_size + 20)
    with pytest.raises(StoreError, match="File too large") as caught:
        launch([prose], recipe="tiny", out=run, settings=SMALL, display=display)
    assert f"from step 0, because no checkpoint was saved): unmask pretrain --resume {run}" in caught.value.hint
    resume(run)
    assert same(run, uninterrupted)


def test_free_space_is_compared_with_the_estimate(prose: Path, tmp_path: Path) -> None:
    options = LaunchOptions(dry_run=True)
    estimate = launch([prose], recipe="tiny", out=tmp_path / "a" / "run", settings=SMALL, options=options).forecast
    assert estimate is not None and 0 < estimate.checkpoint_bytes < estimate.disk_bytes
    assert check_free_space(tmp_path / "a" / "run", estimate) == ""
    assert "train.keep_last" in check_free_space(tmp_path, replace(estimate, disk_bytes=10**18))
    with pytest.raises(StoreError, match=r"one checkpoint needs about 1,000,000,000 GB, and .* are free"):
        check_free_space(tmp_path, replace(estimate, checkpoint_bytes=10**18))


@pytest.mark.skipif(resource is None, reason="this system has no limits to set")
def test_a_run_that_could_not_start_leaves_nothing(prose: Path, tmp_path: Path) -> None:
    """recipe.toml can't be written: the directory is removed, because it could not be resumed."""
    with pytest.raises(StoreError, match="File too large"):
        launch([prose], recipe="tiny", out=tmp_path / "run", settings=SMALL, display=Limits("the sample", lambda: 300))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(resource is None, reason="this system has no limits to set")
def test_a_log_line_is_complete_or_absent(tmp_path: Path) -> None:
    log = JsonlLogger(tmp_path / "log.jsonl")
    log.write(1, {"loss": 2.5, "earlier": {128: float("nan")}})
    before = (tmp_path / "log.jsonl").read_bytes()
    assert json.loads(before) == {"step": 1, "loss": 2.5, "earlier": {"128": None}}, "JSON has no NaN"
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, allowed[1]))
    try:
        with pytest.raises(StoreError, match="free disk space"):
            log.write(2, {"loss": 2.4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    log.write(3, {"loss": 2.3})
    log.close()
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 3]


class Messages(Display):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, message: str) -> None:
        self.messages.append(message)


def test_a_disk_without_symbolic_links(
    prose: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the system refuses symbolic links, `latest` is a text file, and a message says so."""

    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    run, display = tmp_path / "run", Messages()
    launch([prose], recipe="tiny", out=run, settings=[*SMALL, "train.budget=6 steps"], display=display)
    assert any("text file" in message for message in display.messages)
    assert (run / "latest").is_file() and (run / "latest").read_text() == "step-0000006\n"
    assert load(run / "latest").card["step"] == 6
    resume(run, budget="10 steps")
    assert (run / "latest").read_text() == "step-0000010\n" and load(run).card["step"] in (4, 8, 10)
    (run / "latest").write_text("step-0000099\n")
    with pytest.raises(DamagedError, match="step-0000099"):
        load(run / "latest")
    (run / "latest").write_text("step-0000010\n")
    monkeypatch.undo()
    resume(run, budget="+1 steps")
    assert (run / "latest").is_symlink(), "a link again, now that links work"
