"""The copy of a run in a store that is slow, or whose upload was interrupted at any file. The store is a folder."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

import unmask
from unmask.core.errors import StoreError, TextError, UnmaskError
from unmask.core.files import last_step, write_manifest, write_pointer, write_text
from unmask.core.remote import SESSION, Store, upload
from unmask.core.remote.upload import RunUpload, fetch_run
from unmask.training.callbacks import RunCallbacks
from unmask.training.display import Display

SMALL = {
    "model": {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32},
    "train": {"every": {"save": "2 steps", "validate": "2 steps"}, "threads": 1, "report": False},
}


class LocalStore(Store):
    """A store whose objects are the files of a local folder: s3:///folder/run is /folder/run."""

    seconds = 0.0  # that each copy takes

    def __init__(self, address: str, kind: type[UnmaskError] = TextError) -> None:
        self.address, self.kind = address, kind
        self._files = LocalFileSystem(auto_mkdir=True, use_listings_cache=False, skip_instance_cache=True)
        self._path = address.partition("://")[2]
        self._scheme, self._is_http = "s3", False
        self.copied = list[str]()
        self.before: Callable[[str], None] = lambda name: None  # each copy

    def put(self, file: Path, name: str) -> None:
        self.before(name)
        self.copied.append(name)
        time.sleep(self.seconds)
        super().put(file, name)


@pytest.fixture(autouse=True)
def local_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "Store", LocalStore)


def start_upload(run: Path, bucket: Path, keep: int) -> tuple[RunUpload, LocalStore]:
    started = RunUpload(run, f"s3://{bucket}", keep)
    store: Any = started._store
    return started, store


def save(run: Path, step: int, state: str = "", keep: int = 0) -> None:
    """Write a step as a run does; delete all but the last `keep` ones."""
    folder = run / f"step-{step:07d}"
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("config.json", "model.safetensors", "card.json", "resume/weights.safetensors"):
        write_text(folder / name, f"{name} of step {step}")
    write_text(folder / "resume" / "state.json", f"state of step {step} {state}")
    write_manifest(folder / "resume")
    write_manifest(folder)
    write_pointer(run / "latest", folder.name)
    for old in sorted(run.glob("step-*"))[:-keep] if keep else ():
        shutil.rmtree(old)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write_text(folder / "env.json", '{"id": "one"}')
    write_text(folder / "recipe.toml", "seed = 1\n")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """The files of a run that are uploaded, or of its copy."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if not name.startswith(("lock", "latest", SESSION))}


def complete_steps(bucket: Path) -> list[int]:
    return sorted(int(card.parent.name.removeprefix("step-")) for card in bucket.glob("step-*/card.json"))


def test_a_slow_upload_does_not_delete_the_only_complete_step(run: Path, tmp_path: Path) -> None:
    """While the first file of a step is copied, the run saves two more and deletes all that the pass began with."""
    bucket = tmp_path / "bucket"
    save(run, 100)
    started, store = start_upload(run, bucket, keep=2)
    started.copy()
    save(run, 200)
    save(run, 300, keep=2)

    def save_meanwhile(name: str) -> None:
        if name.startswith("step-"):
            store.before = lambda name: None
            save(run, 400, keep=2)
            save(run, 500, keep=2)

    store.before = save_meanwhile
    started.copy()
    assert started.error is None and complete_steps(bucket) == [100]
    fetch_run(f"s3://{bucket}", tmp_path / "elsewhere")
    assert last_step(tmp_path / "elsewhere") == 100
    started.copy()
    assert started.error is None and tree(bucket) == tree(run) and complete_steps(bucket) == [400, 500]


@pytest.mark.parametrize("is_new", [False, True])
def test_objects_that_the_store_lost_are_sent_again(run: Path, tmp_path: Path, *, is_new: bool) -> None:
    """One object was deleted and one cut short, while card and digests of the step are still there."""
    bucket = tmp_path / "bucket"
    save(run, 100)
    started, _ = start_upload(run, bucket, keep=2)
    started.copy()
    (bucket / "step-0000100" / "config.json").unlink()
    (bucket / "step-0000100" / "model.safetensors").write_text("mod")
    if is_new:
        started, _ = start_upload(run, bucket, keep=2)
    started.copy()
    assert started.error is None and tree(bucket) == tree(run)


def test_shards_of_more_ranks_do_not_stay_in_a_step_that_is_written_again(run: Path, tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    save(run, 100)
    write_text(run / "step-0000100" / "resume" / "shard-00003.safetensors", "rows of rank 2")
    write_manifest(run / "step-0000100" / "resume")
    started, _ = start_upload(run, bucket, keep=2)
    started.copy()
    assert tree(bucket) == tree(run)
    save(run, 100, "after a rollback on fewer ranks")
    started.copy()
    assert started.error is None and tree(bucket) == tree(run)


def test_the_last_step_is_copied_first(run: Path, tmp_path: Path) -> None:
    """Each pass takes so long that the run deletes a step meanwhile, but the last one is there in time."""
    bucket = tmp_path / "bucket"
    started, store = start_upload(run, bucket, keep=2)
    there = list[list[int]]()
    for step in (100, 300, 500):

        def save_meanwhile(name: str, number: int = step) -> None:
            if name == f"step-{number:07d}/model.safetensors":
                save(run, number + 200, keep=2)

        save(run, step)
        save(run, step + 100, keep=2)
        store.before = save_meanwhile
        started.copy()
        assert started.error is None
        there.append(complete_steps(bucket))
    assert there == [[200], [200, 400], [400, 600]], "as many as are kept"
    assert len(list(bucket.glob("step-*/config.json"))) == 2, "and no part of another"


def test_an_upload_ends_although_a_step_of_the_run_is_incomplete(run: Path, tmp_path: Path) -> None:
    """As after a deletion that failed."""
    save(run, 100)
    save(run, 200)
    (run / "step-0000100" / "card.json").unlink()
    started, store = start_upload(run, tmp_path / "bucket", keep=2)
    started.start()
    started.close()
    assert started.error is None and complete_steps(tmp_path / "bucket") == [200]
    assert not any(name.startswith("step-0000100") for name in store.copied)


@pytest.mark.parametrize("is_new", [False, True], ids=["same process", "new process"])
def test_a_step_that_a_rollback_wrote_again_is_uploaded(run: Path, tmp_path: Path, is_new: bool) -> None:
    """Only the state in resume/ differs: card, weights and top-level digests are equal."""
    bucket = tmp_path / "bucket"
    save(run, 100)
    started, store = start_upload(run, bucket, keep=1)
    started.copy()
    save(run, 100, "with half of the learning rate")
    if is_new:
        started, store = start_upload(run, bucket, keep=1)
    store.copied.clear()
    started.copy()
    assert started.error is None and tree(bucket) == tree(run)
    steps = [name for name in store.copied if name.startswith("step-")]
    assert steps == ["step-0000100/resume/digests.json", "step-0000100/resume/state.json"], "in a short time"


def test_a_folder_that_was_being_deleted_or_copied_is_left_out(run: Path, tmp_path: Path) -> None:
    """The card is deleted first, then the other files by name."""
    save(run, 100)
    save(run, 200)
    for name in ("best", "chck_1M", "tokenizer"):
        for file in ("config.json", "model.safetensors", "card.json"):
            write_text(run / name / file, file)
        write_manifest(run / name)
    (run / "tokenizer" / "card.json").unlink()
    (run / "tokenizer" / "config.json").unlink()
    write_manifest(run / "tokenizer")
    bucket = tmp_path / "bucket"
    start_upload(run, bucket, keep=2)[0].copy()
    for name in ("step-0000100", "best", "chck_1M"):
        cut = tmp_path / name
        shutil.copytree(bucket, cut)
        (cut / name / "card.json").unlink()
        rest = {file: content for file, content in tree(bucket).items() if not file.startswith(f"{name}/")}
        for number, file in enumerate(sorted(file for file in (cut / name).rglob("*") if file.is_file())):
            there = tmp_path / f"{name} without {number}"
            fetch_run(f"s3://{cut}", there)
            assert tree(there) == rest and last_step(there) == 200
            file.unlink()


def train(text: Path, out: Path, bucket: Path, display: Display | None = None, **options: Any) -> None:
    settings = {**SMALL, "train": {**SMALL["train"], "upload": f"s3://{bucket}", **options}}
    unmask.pretrain([text], recipe="char", budget="6 steps", out=out, settings=settings, display=display)


def test_a_best_model_that_was_not_uploaded_in_time_is_replaced(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The store has an incomplete best/, and a step whose state has the loss of the best model before that one."""
    bucket = tmp_path / "notes"
    train(prose, tmp_path / "run", bucket)
    shutil.rmtree(bucket / "step-0000006")
    (bucket / "best" / "card.json").unlink()
    step = bucket / "step-0000004"
    state = json.loads((step / "resume" / "state.json").read_text())
    state["best"] = {"step": 2, "loss": 0.0}  # lower than any that follows
    write_text(step / "resume" / "state.json", json.dumps(state))
    write_manifest(step / "resume")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    unmask.resume(f"s3://{bucket}", display=None)
    assert "left out, because their copies are incomplete: best" in caplog.text
    assert "the best model, of step 2 with loss 0.0000, is missing" in caplog.text
    there = Path("runs/notes")
    assert json.loads((there / "best" / "card.json").read_text())["step"] == 6
    assert json.loads((there / "latest" / "resume" / "state.json").read_text())["best"]["step"] == 6
    assert tree(bucket) == tree(there)


# Ranks ----------------------------------------------------------------------------------------------------------------


def main(folder: Path, text: Path) -> None:
    """Make all runs of two ranks; write the exit codes, and what the store has when each rank ends."""
    from test_ranks import StopsAt, run_ranks  # pyright: ignore  # this file is a program now, its folder is searched

    def work(rank: int, place: Path, stop: int, fails: int | None) -> None:
        upload.Store, LocalStore.seconds = LocalStore, 0.15 if fails is None else 0.0
        if fails == rank:

            def fail(self: RunCallbacks, *, waits: bool = True) -> None:
                raise StoreError("the log can't be written")

            RunCallbacks.close = fail
        try:
            train(text, place / "run", place / "bucket", StopsAt(stop), parallel="fsdp")
        finally:
            facts = {"steps": complete_steps(place / "bucket"), "seconds": time.monotonic()}
            write_text(place / f"{rank}.json", json.dumps(facts))

    codes = {
        name: run_ranks(folder, name, 2, lambda rank: work(rank, folder / name, stop, fails))  # noqa: B023
        for name, stop, fails in (
            ("stopped", 3, None),
            ("finished", 0, None),
            ("rank-1-fails", 3, 1),
            ("rank-0-fails", 0, 0),
        )
    }
    (folder / "codes.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def ranks(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, __file__, str(folder), str(prose)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code", "steps"), [("stopped", 75, [2, 4]), ("finished", 0, [4, 6])])
def test_all_ranks_wait_for_the_upload(ranks: Path, name: str, code: int, steps: list[int]) -> None:
    """torchrun kills rank 0 thirty seconds after another rank has ended with an error."""
    assert json.loads((ranks / "codes.json").read_text())[name] == [code, code]
    for rank in range(2):
        facts = json.loads((ranks / name / f"{rank}.json").read_text())
        assert facts["steps"] == steps, f"when rank {rank} ended"


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_fails_at_the_end_ends_all(ranks: Path, number: int) -> None:
    facts = [json.loads((ranks / f"rank-{number}-fails" / f"{rank}.json").read_text()) for rank in range(2)]
    assert json.loads((ranks / "codes.json").read_text())[f"rank-{number}-fails"] == [2, 2]
    assert abs(facts[0]["seconds"] - facts[1]["seconds"]) < 30
    reason = f"rank {number} on {socket.gethostname()} stopped: the log can't be written"
    other = (ranks / f"rank-{number}-fails-{1 - number}.txt").read_text()
    assert reason in " ".join(other.split()), "as the other rank says"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
