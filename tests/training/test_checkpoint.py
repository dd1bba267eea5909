"""Checkpoints in the background and in shards: equal bits, kills, full disks, files that don't fit, refused pickles."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

import unmask
from unmask.cli.errors import report_error
from unmask.core import files
from unmask.core.distributed import DistributedContext
from unmask.core.errors import DamagedError, ModelError, StoreError
from unmask.hub.from_hf import open_model
from unmask.training import checkpoint
from unmask.training.checkpoint import read_state, shards
from unmask.training.checkpoint.background import CheckpointWriter
from unmask.training.checkpoint.shards import KINDS, open_tensors
from unmask.training.display import Display
from unmask.training.pretrain import launch, resume

try:
    import resource
except ImportError:  # Windows
    resource = None

pytestmark = pytest.mark.slow

SMALL = [
    "data.tokenizer.kind=characters", "model.num_hidden_layers=2", "model.hidden_size=32",
    "model.num_attention_heads=2", "model.intermediate_size=48", "train.ema_decay=0.9", "train.precision=float32",
    "train.every.log=1 steps", "train.every.validate=4 steps", "train.every.save=2 steps", "train.threads=1",
    "train.keep_last=9", "train.budget=6 steps", "optimizer.eps=1e-3", "train.report=false", "preview.num_samples=0",
    "stage=[{max_seq_len = 32, batch_size = '256 tokens'}]",
]  # fmt: skip
CLOCKS = {"seconds", "training_seconds", "phase_seconds", "tokens_per_second", "data_wait_fraction"}


ONE_PROCESS = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # a warning of dcp.save and dcp.load


class Fills(Display):
    """Leaves no space for a checkpoint to this process from step 3 on, and maybe none for the log either."""

    def __init__(self, run: Path, until: int | None = None, *, fills_log: bool = False, starts: bool = True) -> None:
        self._run, self._until, self._fills_log, self._starts = run, until, fills_log, starts
        self.messages: list[str] = []

    def step(self, state: Any) -> None:
        if state.step == 3 and self._starts:
            while not (self._run / "latest").exists():  # the first checkpoint may not be written yet
                pass
            most = (self._run / "log.jsonl").stat().st_size + 10 if self._fills_log else 20_000
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        elif state.step == self._until:
            time.sleep(0.5)  # a checkpoint in the background is begun, and then has failed
            while list(self._run.glob(".step-*")):
                pass
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def message(self, message: str) -> None:
        self.messages.append(message)


@contextlib.contextmanager
def filling_after_the_parts() -> Iterator[None]:
    """Leaves no space to a process once the ranks have written their parts of the checkpoint at step 4."""
    save_model = checkpoint.save_model

    def fill_and_save(folder: Path, model: Any) -> None:
        if "step-0000004" in folder.name:
            assert list((folder / "resume").glob("shard-*")), "the parts are written"
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        save_model(folder, model)

    checkpoint.save_model = fill_and_save
    yield
    checkpoint.save_model = save_model


def main(folder: Path, text: Path) -> None:
    """Makes all runs on several ranks, in processes that are forked from this one, and writes the exit codes."""
    from test_ranks import run_ranks  # pyright: ignore  # this file is a program now, and its folder is searched

    def pretrain(name: str, *more: str, display: Display | None = None) -> None:
        settings = [*SMALL, "train.parallel=fsdp", *more]
        launch([text], recipe="tiny", out=folder / name, settings=settings, display=display)

    def fill(name: str, filled: int, *more: str, until: int | None = None, **options: bool) -> int:
        display = Fills(folder / name, until, **options)
        return run_ranks(
            folder, name, 2, lambda rank: pretrain(name, *more, display=display if rank == filled else None)
        )

    codes = {"sharded": run_ranks(folder, "sharded", 2, lambda rank: pretrain("sharded"))}
    codes["at once"] = run_ranks(folder, "at once", 2, lambda rank: pretrain("at once", "train.background_save=false"))
    shutil.copytree(folder / "sharded", folder / "resumed", symlinks=True)
    codes["resumed"] = run_ranks(folder, "resumed", 4, lambda rank: resume(folder / "resumed", budget="+2 steps"))
    shutil.copytree(folder / "sharded", folder / "damaged", symlinks=True)
    path = step(folder / "damaged", 6) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    codes["damaged"] = run_ranks(folder, "damaged", 2, lambda rank: resume(folder / "damaged", budget="+2 steps"))
    if resource is not None:
        codes["full"] = fill("full", 1)
        at_once = "train.background_save=false"
        codes["full for a while"] = fill("full for a while", 1, at_once, until=5)
        codes["full in the background"] = fill("full in the background", 1, until=5)
        codes["rank 0 full for a while"] = fill("rank 0 full for a while", 0, at_once, until=5)
        with filling_after_the_parts():
            codes["rank 0 full after the parts"] = fill("rank 0 full after the parts", 0, until=5, starts=False)
        codes["log full for a while"] = fill("log full for a while", 0, at_once, until=5, fills_log=True)
    (folder / "codes.json").write_text(json.dumps(codes))


def step(run: Path, number: int) -> Path:
    return run / f"step-{number:07d}"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = dict(load_file(folder / "model.safetensors"))
    for kind in KINDS:
        with open_tensors(folder / "resume", kind) as saved:
            found |= {f"{kind} {name}": saved.whole(name) for name in saved}
    return found


def same(first: Path, second: Path) -> bool:
    one, other = tensors(first), tensors(second)
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def log(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def without_clocks(path: Path) -> dict[str, Any]:
    state = json.loads(path.read_text())
    state["metrics"] = {
        name: value for name, value in state["metrics"].items() if name not in (*CLOCKS, "data_wait_seconds")
    }
    return {name: value for name, value in state.items() if name not in CLOCKS}


@pytest.fixture(scope="module")
def at_once(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that waits for each checkpoint."""
    run = tmp_path_factory.mktemp("runs") / "at-once"
    launch([prose], recipe="tiny", out=run, settings=[*SMALL, "train.background_save=false"])
    return run


@pytest.fixture(scope="module")
def ranks(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs on several ranks that share the weights."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, __file__, str(folder), str(prose)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads((folder / "codes.json").read_text())
    printed = {path.name: path.read_text()[-2000:] for path in folder.glob("*.txt")}
    assert codes.pop("full", [2, 2]) == codes.pop("damaged") == [2, 2] and not any(map(sum, codes.values())), (
        codes,
        printed,
    )
    return folder


@pytest.fixture(scope="module")
def sharded(ranks: Path) -> Path:
    """A run on two ranks, with checkpoints in the background."""
    return ranks / "sharded"


# In the background ----------------------------------------------------------------------------------------------------


def test_checkpoints_in_the_background_have_the_same_bits(prose: Path, tmp_path: Path, at_once: Path) -> None:
    threads: list[bool] = []

    class Watches(Display):
        def saved(self, folder: Path) -> None:
            threads.append(any(each.name.startswith("unmask-checkpoint") for each in threading.enumerate()))

    run = tmp_path / "run"
    launch([prose], recipe="tiny", out=run, settings=SMALL, display=Watches())
    assert threads == [True] * 3
    assert [path.name for path in sorted(run.glob("step-*"))] == [step(run, number).name for number in (2, 4, 6)]
    for number in (2, 4, 6):
        assert same(step(run, number), step(at_once, number)), number
        first, second = (without_clocks(step(each, number) / "resume" / "state.json") for each in (run, at_once))
        assert first == second and first["step"] == number
    assert log(run) == log(at_once)
    assert not list(run.glob(".*"))
    assert not any(thread.name.startswith("unmask-checkpoint") for thread in threading.enumerate())


def test_a_kill_while_a_checkpoint_is_written_loses_only_this_one(prose: Path, tmp_path: Path) -> None:
    """The model is large enough that the write takes longer than a look at the folder, which a thread takes."""
    run, large = tmp_path / "run", [*SMALL, "model.hidden_size=128", "model.intermediate_size=256"]
    program = f"""
import os, signal, threading
from pathlib import Path
from unmask.training.pretrain import launch
run = Path({str(run)!r})
def kill():
    while not list(run.glob(".step-0000004.aside-*/resume/weights.safetensors")): pass
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill, daemon=True).start()
launch([Path({str(prose)!r})], recipe="tiny", out=run, settings={large!r})
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(run.glob(".step-0000004.aside-*")) and not step(run, 4).exists()
    assert (run / "latest").readlink().name == "step-0000002" and unmask.load(run / "latest").card["step"] == 2
    resume(run)
    launch([prose], recipe="tiny", out=tmp_path / "whole", settings=large)
    assert same(step(run, 6), step(tmp_path / "whole", 6)) and log(run) == log(tmp_path / "whole")
    assert not list(run.glob(".*"))


@pytest.mark.skipif(resource is None, reason="this system has no limits to set")
def test_a_full_disk_is_reported_by_the_next_steps(prose: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    display, allowed = Fills(run), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(StoreError, match="File too large") as caught:
            launch([prose], recipe="tiny", out=run, settings=[*SMALL, "train.keep_best=false"], display=display)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert "resume (saved checkpoints are intact)" in caught.value.hint
    assert any("step 4: the checkpoint is not saved" in message for message in display.messages), display.messages
    assert (run / "latest").readlink().name == "step-0000002" and not list(run.glob(".*"))


def test_a_writer_writes_in_its_own_thread_and_reports_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer, goes_on = CheckpointWriter(), threading.Event()
    names: list[str] = []

    def write() -> Path:
        names.append(threading.current_thread().name)
        assert goes_on.wait(10)
        return tmp_path

    def fail() -> Path:
        raise StoreError("no space", location=str(tmp_path), hint="free some")

    assert writer.finished(wait=True) is None
    writer.start(write)
    assert writer.finished() is None
    with pytest.raises(AssertionError, match="one checkpoint at a time"):
        writer.start(write)
    goes_on.set()
    assert writer.finished(wait=True) == tmp_path and writer.finished() is None
    assert names[0].startswith("unmask-checkpoint")
    writer.start(fail)
    with pytest.raises(StoreError, match="no space"):
        writer.finished(wait=True)
    assert writer.finished() is None
    writer.start(lambda: tmp_path / str(1 // 0))
    writer.close()  # does not replace the error that ended the run
    assert "the last checkpoint is not saved: integer division" in caplog.text
    goes_on.clear()
    writer.start(write)
    (thread,) = [each for each in threading.enumerate() if each.name == names[0]]
    writer.close(waits=False)  # after a second Ctrl-C; nor does Python wait for daemons
    assert thread.daemon and thread.is_alive()
    goes_on.set()
    thread.join(10)
    assert not thread.is_alive()


# Shards ---------------------------------------------------------------------------------------------------------------


def test_each_rank_writes_its_rows_and_transformers_opens_the_whole(sharded: Path) -> None:
    from transformers import AutoModelForMaskedLM

    names = [f"shard-{rank:05d}-model-{kind:05d}-of-00003.safetensors" for rank in (1, 2) for kind in (1, 2, 3)]
    assert sorted(path.name for path in (step(sharded, 6) / "resume").iterdir()) == sorted(
        [*names, "digests.json", "shards.json", "state.json"]
    )
    model = AutoModelForMaskedLM.from_pretrained(sharded / "latest")
    own = unmask.load(sharded / "latest")
    with open_tensors(step(sharded, 6) / "resume", "ema") as saved:
        name = "encoder.token_embedding"
        whole = saved.whole(name)
    assert torch.equal(model.get_input_embeddings().weight, whole)
    assert torch.equal(own.encoder.state_dict()[name.removeprefix("encoder.")], whole)
    for rank in (1, 2):
        with safe_open(step(sharded, 6) / "resume" / names[3 * rank - 1], framework="pt") as file:
            assert len(file.get_tensor(f"ema.{name}")) == len(whole) // 2
    assert not list(sharded.rglob(".metadata"))


@ONE_PROCESS
def test_torch_reads_the_shards(sharded: Path) -> None:
    folder = step(sharded, 6) / "resume"
    with open_tensors(folder, "weights") as saved:
        expected = {f"weights.{name}": saved.whole(name) for name in saved}
    read = {name: torch.full_like(tensor, torch.nan) for name, tensor in expected.items()}
    dcp.load(read, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.items())


def test_shards_in_the_background_have_the_same_bits(ranks: Path, sharded: Path) -> None:
    for number in (2, 4, 6):
        assert same(step(ranks / "at once", number), step(sharded, number)), number
    assert log(ranks / "at once") == log(sharded)


def test_shards_are_resumed_on_any_number_of_ranks(ranks: Path, tmp_path: Path, at_once: Path) -> None:
    """From 2 ranks to 4 to 1."""
    run, one = tmp_path / "run", tmp_path / "one"
    shutil.copytree(ranks / "resumed", run, symlinks=True)
    shutil.copytree(at_once, one, symlinks=True)
    assert len(list((step(run, 8) / "resume").glob("shard-*-model-00001-of-00003.safetensors"))) == 4
    resume(run, budget="+2 steps")
    assert (step(run, 10) / "resume" / "weights.safetensors").is_file()
    for _ in range(2):
        resume(one, budget="+2 steps")
    after, expected = tensors(step(run, 10)), tensors(step(one, 10))
    assert after.keys() == expected.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5, msg=lambda text, n=name: n + text)
    assert float(after["optimizer encoder.embedding_norm.weight.step"]) == 10


@pytest.mark.skipif(resource is None, reason="this system has no limits to set")
def test_a_rank_that_can_not_write_ends_all_and_the_last_checkpoint_is_whole(ranks: Path) -> None:
    first, second = (" ".join((ranks / f"full-{rank}.txt").read_text().split()) for rank in (0, 1))
    assert "error: rank 1 could not write its part of a checkpoint" in first and "Traceback" not in first + second
    assert "hint: free disk space, then resume (saved checkpoints are intact)" in first
    assert "error: can't write: File too large" in second and "saved checkpoints are intact" in second
    run = ranks / "full"
    assert (run / "latest").readlink().name == "step-0000002" and not list(run.glob(".*"))
    assert unmask.load(run / "latest").card["step"] == 2


@pytest.mark.skipif(resource is None, reason="this system has no limits to set")
@pytest.mark.parametrize(
    "name",
    [
        "full for a while", "full in the background", "rank 0 full for a while", "rank 0 full after the parts",
        "log full for a while",
    ],
)  # fmt: skip
def test_all_ranks_go_on_when_the_disk_of_one_is_full(ranks: Path, sharded: Path, name: str) -> None:
    run = ranks / name
    assert [path.name for path in sorted(run.glob("step-*"))] == ["step-0000002", "step-0000006"]
    assert same(step(run, 6), step(sharded, 6)) and log(run) == log(sharded)
    assert not list(run.glob(".*"))


def test_a_damaged_file_that_one_rank_reads_ends_all(ranks: Path) -> None:
    printed = [" ".join((ranks / f"damaged-{rank}.txt").read_text().split()) for rank in (0, 1)]
    named = [rank for rank in (0, 1) if "content of this file has changed" in printed[rank]]
    assert len(named) == 1 and "model.safetensors" in printed[named[0]], "each file is read once"
    assert f"rank {named[0]} found a damaged file" in printed[1 - named[0]]


SECOND = "shard-00002-model-00001-of-00003.safetensors"


def is_missing(resume: Path) -> None:
    (resume / SECOND).unlink()


def is_of_another_step(resume: Path) -> None:
    shutil.copy(resume.parents[1] / "step-0000002" / "resume" / SECOND, resume / SECOND)


def is_missing_in_the_manifest_too(resume: Path) -> None:
    (resume / SECOND).unlink()
    files.write_manifest(resume)


def is_there_twice(resume: Path) -> None:
    shutil.copy(resume / SECOND, resume / SECOND.replace("00002", "00003", 1))
    files.write_manifest(resume)


def change_rows(resume: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with safe_open(resume / SECOND, framework="pt") as file:
        metadata, rows = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    rows["weights.encoder.token_embedding"] = change(rows["weights.encoder.token_embedding"]).contiguous()
    save_file(rows, resume / SECOND, metadata)
    files.write_manifest(resume)


def has_fewer_columns(resume: Path) -> None:
    change_rows(resume, lambda rows: rows[:, :-1])


def has_fewer_rows(resume: Path) -> None:
    change_rows(resume, lambda rows: rows[:-1])


def has_more_rows(resume: Path) -> None:
    change_rows(resume, lambda rows: torch.cat([rows, rows]))


def has_another_type(resume: Path) -> None:
    change_rows(resume, torch.Tensor.half)


def has_no_row_numbers(resume: Path) -> None:
    save_file(load_file(resume / SECOND), resume / SECOND)
    files.write_manifest(resume)


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (is_missing, SECOND, "a file of this directory is missing"),
        (is_of_another_step, SECOND, "the content of this file has changed"),
        (is_missing_in_the_manifest_too, "resume", "row 19 of `encoder.token_embedding` is in no file"),
        (is_there_twice, SECOND.replace("00002", "00003", 1), "are in another file too"),
        (has_fewer_columns, SECOND, "has the shape .*, expected rows of"),
        (has_fewer_rows, "resume", "row .* of `encoder.token_embedding` is in no file"),
        (has_more_rows, SECOND, "`encoder.token_embedding` has row"),
        (has_another_type, SECOND, "`encoder.token_embedding` is F16, and F32 in shard-00001"),
        (has_no_row_numbers, SECOND, "the rows in this file are not named"),
    ],
)
def test_files_that_do_not_fit_together_are_named(
    sharded: Path, tmp_path: Path, damage: Callable[[Path], None], file: str, message: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(sharded, run, symlinks=True)
    damage(step(run, 6) / "resume")
    with pytest.raises(DamagedError, match=message) as caught:
        resume(run, budget="+1 steps")
    assert Path(caught.value.location).name == file
    assert report_error(caught.value) == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"weights": {"a": [float("inf")]}}, "no shapes of `weights`"),
        ({"weights": {"a": [2]}, "more": {}}, "unknown kind of tensors: got `more`"),
        ([], "no shapes of `weights`"),
    ],
)
def test_an_impossible_index_of_shards_is_named(tmp_path: Path, content: Any, says: str) -> None:
    files.write_json(tmp_path / "shards.json", content)
    with pytest.raises(DamagedError, match=says), open_tensors(tmp_path, "weights"):
        pass


@pytest.mark.parametrize(
    "change",
    [{"metrics": []}, {"metrics": None}, {"step": float("inf")}, {"guards": {"skipped_steps": float("inf")}}],
    ids=str,
)
def test_an_impossible_training_state_is_named(at_once: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    state = step(at_once, 6) / "resume" / "state.json"
    files.write_json(tmp_path / "resume" / "state.json", files.read_json(state) | change)
    with pytest.raises(DamagedError, match="invalid training state"):
        read_state(tmp_path)


def test_a_rank_without_the_shared_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_DISK_SECONDS", 0.1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        group = shards.WriterGroup(DistributedContext(torch.device("cpu"), "float32", 1))
        with pytest.raises(StoreError, match="does not see the folder of a checkpoint") as caught:
            shards.write_together(tmp_path / "run", {}, 0, group)
    finally:
        torch.distributed.destroy_process_group()
    assert "a disk that all ranks share" in caught.value.hint and list(tmp_path.iterdir()) == []


# Pickles --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A checkpoint that torch.distributed.checkpoint wrote in its own format."""
    folder = tmp_path / "pickled"
    dcp.save({"weight": torch.zeros(2)}, checkpoint_id=str(folder), no_dist=True)
    assert (folder / ".metadata").is_file()
    return folder


@ONE_PROCESS
def test_a_checkpoint_with_pickles_is_refused_by_name(
    pickled: Path, prose: Path, tmp_path: Path, at_once: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(at_once, run, symlinks=True)
    model = tmp_path / "model"
    shutil.copytree(run / "best", model)
    for place in (model, run / "latest" / "resume"):
        shutil.copy(pickled / ".metadata", place)
    refused: list[tuple[Path, Callable[[], object]]] = [
        (pickled, lambda: unmask.load(pickled)),
        (pickled, lambda: open_model(pickled)),
        (pickled, lambda: resume(pickled)),
        (model, lambda: unmask.load(model)),
        (model, lambda: unmask.pretrain(prose, start=model, out=tmp_path / "new", budget="1 steps", display=None)),
        (run / "step-0000006" / "resume", lambda: resume(run, budget="+9 steps")),
    ]
    for folder, use in refused:
        with pytest.raises(ModelError, match="is a pickle, which runs code when it is opened") as caught:
            use()
        assert caught.value.location.endswith("/.metadata") and Path(caught.value.location).parent.samefile(folder)
        assert "format_utils dcp_to_torch" in caught.value.hint
        assert report_error(caught.value) == 2
    assert not (tmp_path / "new").exists()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
