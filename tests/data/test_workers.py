"""Building a corpus: the same bytes whoever does the work and however often it was killed; nothing half-made."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from unmask.core.errors import StoreError, TextError
from unmask.core.quantities import Fraction
from unmask.data.prepare import Build, TokenizedCorpus, build_in, no_progress, prepare
from unmask.data.settings import DataConfig, HeldOutConfig
from unmask.data.sources import MemorySource, open_source
from unmask.tokenization.settings import CharacterConfig, FileTokenizerConfig, WordPieceConfig

LETTERS = CharacterConfig()
WORDS = [
    "the",
    "a",
    "of",
    "cat",
    "dog",
    "sat",
    "on",
    "mat.",
    "ran.",
    "home,",
    "and",
    "then",
    "said:",
    "“no!”",
    "12",
    "x",
]


def documents(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 40))) for _ in range(count)]


def write_texts(folder: Path, files: int = 6, each: int = 40) -> list[str]:
    folder.mkdir()
    for number in range(files):
        text = "\n\n".join(documents(each, seed=number))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return [str(folder)]


def tree(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def build(folder: Path, texts: list[str], settings: DataConfig, workers: int, unit_bytes: int | None = None) -> Path:
    work = folder / "work"
    work.mkdir(parents=True)
    source = open_source(texts, settings)
    return build_in(work, Build(folder / "text", source, settings, no_progress, None, workers, unit_bytes))


def texts_of(corpus: TokenizedCorpus) -> list[str]:
    shards = (corpus.train, corpus.held_out)
    return [
        corpus.tokenizer.decode(one.ids(document, 0, length))
        for one in shards
        for document, length in enumerate(one.lengths.tolist())
    ]


def test_the_bytes_do_not_depend_on_who_does_the_work(tmp_path: Path) -> None:
    settings = DataConfig(tokenizer=WordPieceConfig(vocab_size=60, max_train_chars=4_000), drop_duplicates=True)
    texts = write_texts(tmp_path / "texts")
    trees = [tree(build(tmp_path / str(workers), texts, settings, workers, unit_bytes=10_000)) for workers in (1, 2)]
    assert trees[0] == trees[1]
    assert sum("shard" in name for name in trees[0]) > 3, "several units"
    whole = tree(build(tmp_path / "whole", texts, settings, 1))
    facts = [json.loads(corpus["meta/facts.json"]) for corpus in (trees[0], whole)]
    assert facts[0] == facts[1], "units change where the shards end, and nothing else"


def test_an_error_in_a_worker_is_raised_in_the_parent(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    (tmp_path / "texts" / "3.txt").write_bytes(b"good\n\nb\xffd\n")
    settings = DataConfig(tokenizer=LETTERS)
    with pytest.raises(TextError, match="not UTF-8") as caught:
        build(tmp_path / "built", texts, settings, 2, unit_bytes=10_000)
    assert "3.txt" in caught.value.location


BUILD = """
import sys
from pathlib import Path
from unmask.data.sources import open_source
from unmask.data.prepare import prepare
from unmask.data.settings import DataConfig
from unmask.tokenization.settings import WordPieceConfig
settings = DataConfig(tokenizer=WordPieceConfig(vocab_size=60))
print("begins", flush=True)
prepare(open_source([sys.argv[1]], settings), settings, Path(sys.argv[2]), workers=2)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_build_does_not_affect_the_next_one(tmp_path: Path) -> None:
    (texts,) = write_texts(tmp_path / "texts", files=3, each=300)
    settings = DataConfig(tokenizer=WordPieceConfig(vocab_size=60))
    whole = prepare(open_source([texts], settings), settings, tmp_path / "whole").folder.parent
    for number, seconds in enumerate((0.02, 0.25, 0.6)):
        cache = tmp_path / str(number)
        command = [sys.executable, "-c", BUILD, texts, str(cache)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "begins\n"
            time.sleep(seconds)
            process.kill()
        second = prepare(open_source([texts], settings), settings, cache).folder.parent
        assert second.name == whole.name and tree(second) == tree(whole)
        assert {path.name for path in cache.iterdir()} == {second.name, f".{second.name}.lock"}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")
def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    (texts,) = write_texts(tmp_path / "texts")
    program = f"""
import time
from unmask.data.sources import open_source
from unmask.data.settings import DataConfig
from unmask.data.workers import Workers
settings = DataConfig()
with Workers(open_source([{texts!r}], settings), settings, 2, 2) as workers:
    workers.start()
    print(*[process.pid for process in workers.processes], flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2 and all(Path(f"/proc/{pid}").exists() for pid in pids)
        process.kill()
    for _ in range(3000):  # it may still be starting: it ends when it first listens
        if not any(_is_running(pid) for pid in pids):
            return
        time.sleep(0.02)
    raise AssertionError("a worker outlived its parent")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


FULL = """
import resource, sys
from pathlib import Path
from unmask.data.sources import open_source
from unmask.data.prepare import prepare
from unmask.data.settings import DataConfig
from unmask.tokenization.settings import CharacterConfig
settings = DataConfig(tokenizer=CharacterConfig())
source = open_source([sys.argv[1]], settings)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    prepare(source, settings, Path(sys.argv[2]))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are a matter of Unix")
def test_a_full_disk_is_named_and_leaves_nothing_half_made(tmp_path: Path) -> None:
    (texts,) = write_texts(tmp_path / "texts", files=2, each=400)
    cache = tmp_path / "cache"
    for limit in (1_000, 100_000):
        command = [sys.executable, "-c", FULL, texts, str(cache), str(limit)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert output.startswith(StoreError.__name__) and str(cache) in output and "UNMASK_CACHE" in output
        assert all(path.name.startswith(".") and path.suffix == ".lock" for path in cache.iterdir())
    settings = DataConfig(tokenizer=LETTERS)
    assert prepare(open_source([texts], settings), settings, cache).train.documents


def test_copies_are_dropped(tmp_path: Path) -> None:
    texts = documents(150)
    several = [*texts[:100], texts[3], *texts[100:], texts[3], texts[140], texts[0]]
    settings = DataConfig(tokenizer=LETTERS, drop_duplicates=True)
    for by in ("hash", "tail"):
        chosen = replace(settings, held_out=HeldOutConfig(by, Fraction(0.1)))  # type: ignore[arg-type]
        corpus = prepare(MemorySource(several), chosen, tmp_path)
        assert corpus.facts["duplicates"] == 4 == len(several) - len(texts)
        assert any("4 duplicate documents" in sentence for sentence in corpus.notes)
        if by == "hash":
            assert sorted(texts_of(corpus)) == sorted(set(texts)), "each once"
        else:
            assert sum(map(len, texts_of(corpus))) == sum(map(len, texts))
    kept = prepare(MemorySource(several), replace(settings, drop_duplicates=False), tmp_path)
    assert sorted(texts_of(kept)) == sorted(several) and kept.facts["duplicates"] == 0


def test_lines_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(120)) + '{"text": \nnothing\n')
    settings = DataConfig(tokenizer=LETTERS, errors="skip")
    corpus = prepare(open_source([file], settings), settings, tmp_path / "cache")
    assert corpus.facts["left_out"] == 2 and corpus.facts["documents"] == 120
    assert any("2 lines or rows that could not be read" in sentence for sentence in corpus.notes)


def test_groups_are_counted_in_documents_to_train_on(tmp_path: Path) -> None:
    paths: list[str] = []
    for number, weight in enumerate((0.7, 0.3)):
        (tmp_path / f"{number}.txt").write_text("\n\n".join(f"{number} {text}" for text in documents(90, number)))
        paths.append(f"{tmp_path / str(number)}.txt:{weight}")
    settings = DataConfig(tokenizer=LETTERS)
    corpus = prepare(open_source(paths, settings), settings, tmp_path / "cache")
    assert [group.weight for group in corpus.groups] == [0.7, 0.3]
    assert corpus.groups[0].first_document == 0 and corpus.groups[-1].last_document == corpus.train.documents
    assert corpus.groups[0].last_document == corpus.groups[1].first_document
    for number, group in enumerate(corpus.groups):
        for document in range(group.first_document, group.last_document):
            assert corpus.tokenizer.decode(corpus.train.ids(document, 0, 1)) == str(number)
    alone = prepare(MemorySource(documents(120)), settings, tmp_path / "cache")
    assert [group[1:] if isinstance(group, tuple) else group.weight for group in alone.groups] == [0.0]


def test_the_cache_folder_depends_on_what_decides_the_bytes(tmp_path: Path) -> None:
    source = MemorySource(documents(150))
    settings = DataConfig(tokenizer=LETTERS)
    corpus = prepare(source, settings, tmp_path)
    assert prepare(source, replace(settings, valid={"news": "news.txt"}), tmp_path).folder == corpus.folder
    for name in ("one", "two"):
        corpus.tokenizer.save(tmp_path / name)
    files = [replace(settings, tokenizer=FileTokenizerConfig("file", tmp_path / name)) for name in ("one", "two")]
    folders = {prepare(source, one, tmp_path).folder for one in files}
    assert folders == {corpus.folder}, "the content of the file counts, not its path, nor whether it was trained here"
    other = replace(LETTERS, min_frequency=400)
    prepare(source, replace(settings, tokenizer=other), tmp_path).tokenizer.save(tmp_path / "two")
    assert prepare(source, files[1], tmp_path).folder not in folders


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_documents(tmp_path: Path) -> None:
    def peak_bytes(count: int, attempt: int) -> int:
        file = tmp_path / f"{count}.txt"
        file.write_text("".join(f"w{number % 977}\n" for number in range(count)))
        output = subprocess.run(
            [sys.executable, "-c", MEMORY, str(file), str(tmp_path / f"cache{attempt}")],
            capture_output=True,
            text=True,
            check=True,
        )
        return int(output.stdout) * 1024

    for attempt in range(3):  # what threads hold by chance on a busy machine comes and goes; what documents cost stays
        grown = peak_bytes(60_000, attempt) - peak_bytes(10_000, attempt)
        if grown < 32 * 50_000 + 2_000_000:
            return
    raise AssertionError(f"{grown / 50_000:.1f} bytes for each document, where 32 and 2 MB of chance were allowed")


MEMORY = """
import sys, threading, time
from pathlib import Path
from unmask.data.sources import open_source
from unmask.data.prepare import prepare
from unmask.data.settings import DataConfig
from unmask.tokenization.settings import CharacterConfig
from unmask.data.loader import StageLoader
from unmask.data.sampling import WindowSampler
def now():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
peak = [0]
def watch():
    while True:
        peak[0] = max(peak[0], now())
        time.sleep(0.05)
threading.Thread(target=watch, daemon=True).start()
settings = DataConfig(document="line", tokenizer=CharacterConfig())
corpus = prepare(open_source([sys.argv[1]], settings), settings, Path(sys.argv[2]))
sampler = WindowSampler(corpus.train.lengths, 14, 1)
StageLoader(corpus.train, corpus.tokenizer, sampler, 4096).step(0, 4096, 0, 1)
print(peak[0])
"""


def test_the_process_that_holds_the_lock_is_named(tmp_path: Path) -> None:
    source, settings = MemorySource(documents(150)), DataConfig(tokenizer=LETTERS)
    folder = prepare(source, settings, tmp_path).folder.parent
    holder = f"""
import time
from filelock import FileLock
with FileLock({str(tmp_path / f".{folder.name}.lock")!r}):
    print("held", flush=True)
    time.sleep(2.5)
"""
    (tmp_path / f".{folder.name}.owner").write_text(json.dumps({"pid": os.getpid(), "host": "here"}))
    stages: list[str] = []
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        prepare(source, settings, tmp_path, lambda stage, share: stages.append(stage))
    assert stages and f"process {os.getpid()} on here" in stages[0]
