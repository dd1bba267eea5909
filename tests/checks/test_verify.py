"""A run is trained again in a new process: everything is equal, and what was changed is named."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from unmask.checks.verify import Verification, verify
from unmask.cli import main
from unmask.core import files
from unmask.core.errors import DamagedError, RunError
from unmask.training.pretrain import launch

pytestmark = pytest.mark.slow

SETTINGS = [
    "data.tokenizer.kind=characters", "model.num_hidden_layers=1", "model.hidden_size=32",
    "model.num_attention_heads=2", "model.intermediate_size=32", "model.mlp_dropout=0.1", "train.threads=1",
    "train.ema_decay=0.9", "train.every.log=1 steps", "train.every.validate=3 steps", "train.every.save=3 steps",
    "train.report=false", "train.budget=6 steps", "stage=[{max_seq_len = 32, batch_size = '512 tokens'}]",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("verified") / "run"
    launch([prose], recipe="tiny", out=run, settings=SETTINGS)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))


def repeat(run: Path, **options: Any) -> Verification:
    return verify(run, on_progress=lambda what, fraction: None, **options)


def test_a_run_is_reproduced(trained: Path) -> None:
    found = repeat(trained)
    assert (found.first_step, found.last_step, found.environment) == (3, 6, [])
    assert found.is_reproduced, found.comparisons
    compared = {each.name: each.compared for each in found.comparisons}
    assert compared["weights"] == compared["weight average"] > 5 and compared["optimizer state"] > 5
    assert compared["log"] > 20 and compared["training state"] > 10
    assert sorted(path.name for path in trained.glob("step-*")) == ["step-0000003", "step-0000006"], "only read"


def test_changes_are_found_and_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The repetition begins at the start of the run, and stops at a checkpoint before its end."""
    resume = run / "step-0000003" / "resume"
    tensors = load_file(resume / "optimizer.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(".momentum"))
    tensors[name][0, 0] += 0.25
    save_file(tensors, resume / "optimizer.safetensors")
    for folder in (resume, resume.parent):
        files.write_manifest(folder)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    lines[1]["loss"] += 1e-9
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "argv", ["unmask", "verify", str(run), "--from", "0", "--to", "3", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    found = json.loads(capfd.readouterr().out)
    assert ended.value.code == 3 and not found["is_reproduced"] and found["first_step"] == 0
    compared = {each["name"]: each for each in found["comparisons"]}
    differing = {name for name, each in compared.items() if each["equal"] < each["compared"]}
    assert differing == {"optimizer state", "log"}
    assert compared["optimizer state"]["first"] == f"{name}: up to 0.25"
    assert compared["log"]["compared"] - compared["log"]["equal"] == 1
    assert compared["log"]["first"].startswith("line 2 of step 2: loss: ")


class Deleting:
    """Saves as a run does, and deletes old checkpoints, as soon as `verify` has begun to copy one of them."""

    def __init__(self, run: Path, steps: int) -> None:
        self._run, self._steps = run, steps
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        self._folders = set(Path(tempfile.gettempdir()).glob("unmask-verify-*"))
        self._thread.start()

    def _work(self) -> None:
        while True:  # until some of the files are copied
            begun = [*set(Path(tempfile.gettempdir()).glob("unmask-verify-*")) - self._folders]
            if any(folder.rglob("step-*/*") for folder in begun):
                break
        for step in sorted(self._run.glob("step-*"))[: self._steps]:
            shutil.rmtree(step)

    def join(self) -> None:
        self._thread.join()


def test_a_checkpoint_that_is_deleted_meanwhile_is_replaced_by_one_that_is_there(run: Path) -> None:
    for folder in (run / "step-0000003", run / "step-0000003" / "resume"):  # takes long enough to copy
        (folder / "a-large-file").write_bytes(bytes(100_000_000))
        files.write_manifest(folder)
    deleting = Deleting(run, 1)
    deleting.start()
    found = repeat(run)
    deleting.join()
    assert not (run / "step-0000003").exists()
    assert (found.first_step, found.last_step) == (0, 6) and found.is_reproduced, found.comparisons


def test_a_named_checkpoint_that_is_deleted_meanwhile_is_an_error(run: Path) -> None:
    for folder in (run / "step-0000003", run / "step-0000003" / "resume"):
        (folder / "a-large-file").write_bytes(bytes(100_000_000))
        files.write_manifest(folder)
    deleting = Deleting(run, 1)
    deleting.start()
    with pytest.raises(RunError, match="no checkpoint of step 3; it has those of 6") as caught:
        repeat(run, first_step=3)
    deleting.join()
    assert "train.keep_last" in caught.value.hint


def test_intervals_in_seconds_are_no_difference(prose: Path, tmp_path: Path) -> None:
    """The run logs after each step and validates after every second one, and its repetition after other steps."""
    run = tmp_path / "run"
    settings = [*SETTINGS, "train.every.log=0.001 s", "train.every.validate=0.001 s"]
    launch([prose], recipe="tiny", out=run, settings=settings)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["step"] not in (2, 3)]  # as if these steps had been faster
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    found = repeat(run, first_step=0)
    assert found.is_reproduced, found.comparisons
    compared = {each.name: each.compared for each in found.comparisons}
    assert compared["log"] > 10 and compared["training state"] > 3
    assert found.left_out == [
        "1 log lines of training: train.every.log is in seconds, so the repetition wrote 3 after other steps",
        "0 log lines of validation: train.every.validate is in seconds, so the repetition wrote 1 after other steps",
    ]
    kept[0]["loss"] += 1e-9
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    found = repeat(run, first_step=0)
    assert [each.name for each in found.comparisons if not each.is_equal] == ["log"], "a change is still found"


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize(
    ("name", "target", "says"),
    [
        ("step-0000003/resume/optimizer.safetensors", "/dev/zero", "a device or a pipe"),
        ("step-0000003/model.safetensors", __file__, "invalid file size"),
        ("step-0000003/not-named", "/dev/zero", ""),
        ("tokenizer/more", "/usr/share", "leads out of the run"),
        ("tokenizer/again", ".", "to another folder"),
        ("texts.jsonl", __file__, "leads out of the run"),
    ],
)
def test_a_link_of_a_run_from_elsewhere_is_not_followed(run: Path, name: str, target: str, says: str) -> None:
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(target)
    if not says:
        assert repeat(run).is_reproduced, "what the digests don't name is not copied"
        return
    with pytest.raises(DamagedError, match=says) as caught:
        repeat(run)
    assert caught.value.location == str(run / name)


def test_a_change_of_the_run_after_the_span_is_named_as_a_possible_reason(run: Path) -> None:
    environment = json.loads((run / "env.json").read_text())
    changes = {"resumed_in_different_environment": ["ranks: 2 at the start, 1 now"], "extended": {"steps": 6}}
    (run / "env.json").write_text(json.dumps(environment | changes))
    assert repeat(run).possible_reasons == []
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    lines[-1]["tokens"] += 1
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = repeat(run).possible_reasons
    assert "ranks: 2 at the start, 1 now" in first and "extended to 6 steps" in second


def test_what_can_t_be_verified_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no checkpoint of step 4; it has those of 3, 6"):
        repeat(run, last_step=4)
    with pytest.raises(RunError, match="from step 6 to step 3 is empty"):
        repeat(run, first_step=6, last_step=3)
    environment = json.loads((run / "env.json").read_text())
    environment["determinism"]["torch"] = "1.0"
    (run / "env.json").write_text(json.dumps(environment))
    with pytest.raises(RunError, match="could not be trained again: results would not be bit-identical"):
        repeat(run)
    found = repeat(run, allow_different_environment=True)
    assert found.is_reproduced and "torch: '1.0' at the start" in found.environment[0]
    for folder in run.glob("step-*"):
        shutil.rmtree(folder)
    os.unlink(run / "latest")
    with pytest.raises(RunError, match="no checkpoint to compare with"):
        repeat(run)
