"""The text of a run: file names and texts are distinguished, and a resumed run opens the same text again."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from unmask.core.errors import DamagedError, RecipeError, RunError, Stopped, TextError, UnmaskError
from unmask.data.settings import DataConfig
from unmask.data.sources import FileSource, MemorySource, absolute, open_text
from unmask.tokenization.tokenizer import Tokenizer
from unmask.training.display import Display
from unmask.training.environment import reopen_text
from unmask.training.loop import TrainState
from unmask.training.pretrain import launch, resume

SETTINGS = DataConfig(document="line")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my notes").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    return tmp_path


@pytest.mark.parametrize(
    "texts",
    [
        ["b.txt"],
        ["my notes"],
        ["my notes:0.5", "b.txt:0.5"],
        ["*.txt"],
        ["all my */**/new ones.jsonl.gz"],
        ["dataset:some one/set"],
        [Path("a sentence that is a path")],
        ["absent"],
    ],
)
def test_names(texts: list[str | Path]) -> None:
    assert isinstance(open_text(texts, SETTINGS), FileSource)


@pytest.mark.parametrize("texts", [["a sentence."], ["two\nlines"], ["", "b"], ["we met at 3:15, at 4:30"]])
def test_texts(texts: list[str]) -> None:
    source = open_text(texts, SETTINGS)
    assert isinstance(source, MemorySource)
    assert len(list(source.documents(source.parts()[0]))) == len(texts)


def test_names_among_texts() -> None:
    for texts in (["b.txt", "and a sentence"], [Path("absent"), "and a sentence"]):
        with pytest.raises(TextError, match="file names and texts are mixed"):
            open_text(texts, SETTINGS)
    with pytest.raises(RecipeError, match="no text was given"):
        open_text([], SETTINGS)


@pytest.mark.parametrize("texts", [["my notes:3", "b.txt:1"], ["*.txt"], ["."]])
def test_the_same_text_again_in_another_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    source = open_text(texts, SETTINGS)
    assert isinstance(source, FileSource)
    paths = [absolute(path) for path in source.paths]
    environment = {"text": {"paths": paths, "fingerprint": source.fingerprint}}
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert reopen_text(place, environment, SETTINGS).fingerprint == source.fingerprint
    (place / "b.txt").write_text("changed")
    with pytest.raises(RunError, match="has changed since the run was started"):
        reopen_text(place, environment, SETTINGS)


SMALL = [
    "data.tokenizer={kind = 'wordpiece', vocab_size = 60}", "data.held_out={method = 'tail', fraction = '20%'}",
    "model.num_hidden_layers=1", "model.hidden_size=16", "model.num_attention_heads=2", "model.intermediate_size=16",
    "stage=[{until = '100%', max_seq_len = 16, batch_size = '20 texts'}]", "train.every.log=1 steps",
    "train.budget=8 steps", "train.every.save=4 steps", "train.threads=1",
]  # fmt: skip


class StopsAt(Display):
    """Sends this process a signal after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, state: TrainState) -> None:
        if state.step == self._step:
            signal.raise_signal(signal.SIGINT)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def write_old(path: Path, text: str, seconds_ago: int = 60) -> None:
    """Write a file and date it back, so that its digest is cached."""
    path.write_text(text)
    at = path.stat().st_mtime_ns - seconds_ago * 10**9
    os.utime(path, ns=(at, at))


def lines(word: str) -> str:
    return "\n\n".join(f"the {word} of number {number} is like the {word} of {number * 7}" for number in range(150))


def untrainable(*_: object) -> Tokenizer:
    raise AssertionError("a resume trains no tokenizer")


@pytest.mark.parametrize("keeps_steps", [True, False])
def test_a_run_owns_its_tokenizer(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, keeps_steps: bool
) -> None:
    """With an empty cache and no trainer a run is resumed bit for bit, also before its first checkpoint."""
    write_old(place / "b.txt", lines("cat"))
    launch(["b.txt"], out=place / "whole", settings=SMALL)
    with pytest.raises(Stopped):
        launch(["b.txt"], out=place / "run", settings=SMALL, display=StopsAt(5))
    run = place / "run"
    if not keeps_steps:
        for path in [*run.glob("step-*"), run / "best"]:
            shutil.rmtree(path, ignore_errors=True)
        (run / "latest").unlink()
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("unmask.data.prepare.train_fitting", untrainable)
    resume(run)
    assert losses(run) == losses(place / "whole") and len(losses(run)) == 8
    weights = [(folder / "latest" / "model.safetensors").read_bytes() for folder in (run, place / "whole")]
    assert weights[0] == weights[1]


def test_a_tokenizer_that_is_missing_or_changed(place: Path) -> None:
    write_old(place / "b.txt", lines("cat"))
    launch(["b.txt"], out=place / "run", settings=SMALL)
    shutil.rmtree(place / "run" / "tokenizer")
    resume(place / "run", budget="+1 steps")  # with the tokenizer of the last checkpoint
    (place / "run" / "tokenizer").mkdir()
    shutil.copy(place / "run" / "latest" / "tokenizer.json", place / "run" / "tokenizer")
    file = place / "run" / "tokenizer" / "tokenizer.json"
    config = file.with_name("tokenizer_config.json")
    config.write_text('{"pad_token": "the"}')
    with pytest.raises(DamagedError, match=r"special tokens that tokenizer_config.json gives .* have changed"):
        resume(place / "run", budget="+1 steps")
    config.unlink()
    file.write_text(file.read_text().replace('"the"', '"eht"'))
    with pytest.raises(DamagedError, match="files of the tokenizer of the run have changed"):
        resume(place / "run", budget="+1 steps")


def test_a_text_is_compared_by_size_and_time_and_on_request_by_all_bytes(place: Path) -> None:
    path = place / "b.txt"
    write_old(path, lines("cat"))
    launch(["b.txt"], out=place / "run", settings=SMALL)
    os.utime(path)  # another time, the same bytes
    resume(place / "run", budget="+1 steps")
    write_old(path, lines("cat"), 30)
    resume(place / "run", budget="+1 steps")
    at = path.stat().st_mtime_ns
    path.write_text(lines("dog"))
    with pytest.raises(RunError, match="the text has changed"):
        resume(place / "run", budget="+1 steps")
    os.utime(path, ns=(at, at))  # other bytes of the same size and time
    resume(place / "run", budget="+1 steps")
    with pytest.raises(RunError, match="the text has changed"):
        resume(place / "run", budget="+1 steps", verify=True)
    write_old(path, lines("cat"), 30)
    resume(place / "run", budget="+1 steps", verify=True)


def start_and_stop(texts: list[str | Path], run: Path, *settings: str) -> None:
    with pytest.raises(Stopped):
        launch(texts, out=run, settings=[*SMALL, *settings], display=StopsAt(5))


def test_a_run_that_was_moved_with_its_texts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint of the error is followed; the next resume needs no option, and an emptied cache is filled again."""
    texts, valid = ["b.txt:2", "parts:1"], "data.valid={cows='cows.txt'}"
    (place / "parts").mkdir()
    for name in ("b", "parts/1", "parts/2", "cows"):
        write_old(place / f"{name}.txt", lines(name))
    launch(texts, out=place / "whole", settings=[*SMALL, valid])
    start_and_stop([*texts], place / "run", valid)
    (place / "new").mkdir()
    for name in ("run", "b.txt", "parts", "cows.txt"):
        shutil.move(place / name, place / "new" / name)
    monkeypatch.setenv("UNMASK_CACHE", str(place / "another cache"))
    new, run = place / "new", place / "new" / "run"
    moved = [f"{new}/b.txt:2", f"{new}/p*s/*.txt:1"]

    def refused(says: str, hint: str, **options: object) -> None:
        with pytest.raises(UnmaskError) as error:
            resume(run, **options)  # type: ignore[arg-type]
        assert says in str(error.value) and hint in error.value.hint

    refused("no such file", f"unmask pretrain --resume {run} --text NEW --text NEW")
    refused("it has 2 files, not 3: `2.txt` is missing", "unchanged copy", texts=[moved[0], f"{new}/parts/1.txt:1"])
    refused("another order: `1.txt` comes before `b.txt`", "unchanged copy", texts=[moved[1], moved[0]])
    refused("its weights differ: 1, 1 instead of 2, 1", "unchanged copy", texts=[f"{new}/b.txt:1", moved[1]])
    refused("the content of `cows.txt` differs from that of the run's `b.txt`", "unchanged copy",
            texts=[f"{new}/cows.txt:2", moved[1]])  # fmt: skip
    refused("it was passed as strings", "unchanged copy", texts=["a sentence."])
    refused("cows.txt", f"unmask pretrain --resume {run} --valid cows=NEW", texts=moved)
    refused("this is not the validation text `cows`", "unchanged copy", valid={"cows": new / "b.txt"})
    resume(run, valid={"cows": new / "cows.txt"})
    assert losses(run) == losses(place / "whole") and len(losses(run)) == 8
    environment = json.loads((run / "env.json").read_text())["text"]
    assert environment["paths"] == moved
    assert environment["held_out_shards"].startswith(str(place / "another cache"))
    resume(run, budget="+1 steps")
    (new / "parts" / "1.txt").write_text("changed")
    refused("since the run was started: the content of `1.txt` differs", "--text NEW", budget="+1 steps")


def test_the_strings_of_a_run_again(place: Path) -> None:
    texts = [lines("cat"), lines("dog")]
    start_and_stop([*texts], place / "run")
    (place / "run" / "texts.jsonl").unlink()
    with pytest.raises(RunError, match="texts of the run are missing"):
        resume(place / "run")
    with pytest.raises(RunError, match="not the text of the run: its content differs"):
        resume(place / "run", texts=texts[:1])
    write_old(place / "b.txt", texts[0])
    with pytest.raises(RunError, match="it is in files"):
        resume(place / "run", texts=place / "b.txt")
    resume(place / "run", texts=texts)
    resume(place / "run", budget="+1 steps")


def test_the_text_of_a_finished_run_moves(place: Path) -> None:
    write_old(place / "b.txt", lines("cat"))
    launch(["b.txt"], out=place / "run", settings=SMALL)
    shutil.move(place / "b.txt", place / "c.txt")
    assert resume(place / "run", texts="c.txt").finished_before
    resume(place / "run", budget="+1 steps")
