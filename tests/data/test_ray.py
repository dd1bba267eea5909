"""Tokenization by workers of Ray: the bytes of the local build, whatever happens to a worker."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from unmask.core.errors import TextError, WorkerError
from unmask.core.files import write_text
from unmask.data.prepare import Build, build_in, no_progress, prepare
from unmask.data.ray_engine import RayConfig
from unmask.data.settings import DataConfig
from unmask.data.sources import MemorySource, open_source
from unmask.tokenization.settings import CharacterConfig, WordPieceConfig

pytest.importorskip("ray", reason='Ray needs: pip install "unmask[ray]"')
# Of Ray itself: sockets and files that it closes when the process ends.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
]

WORDS = ["the", "a", "of", "cat", "dog", "sat", "on", "mat.", "ran.", "home,", "and", "then", "said:", "“no!”", "12"]
SETTINGS = DataConfig(tokenizer=WordPieceConfig(vocab_size=60, max_train_chars=4_000), drop_duplicates=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster of two workers; the value is its address."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limits = {"num_cpus": 2, "object_store_memory": 100 << 20}
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", **limits)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    for number in range(6):
        draw = random.Random(number)
        documents = [" ".join(draw.choices(WORDS, k=draw.randint(1, 40))) for _ in range(40)]
        write_text(folder / f"{number}.txt", "\n\n".join(documents))
    return folder


def build(folder: Path, texts: Path, workers: int | RayConfig, progress=no_progress) -> dict[str, bytes]:
    work = folder / "work"
    work.mkdir(parents=True)
    source = open_source([texts], SETTINGS)
    build_in(work, Build(folder / "text", source, SETTINGS, progress, None, workers, unit_bytes=5_000))
    return tree(folder)


def tree(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def kill_a_busy_worker(killed: list[int], is_done: threading.Event) -> None:
    """Kill the first worker of this process's cluster that is seen at a task."""
    while not is_done.wait(0.02):
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdecimal() or b"_run_row" not in (entry / "cmdline").read_bytes():
                    continue
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]  # raylet, started by this process
                grandparent = (Path("/proc") / parent / "stat").read_text().rpartition(")")[2].split()[1]
                if int(grandparent) == os.getpid():
                    os.kill(int(entry.name), signal.SIGKILL)
                    killed.append(int(entry.name))
                    return
            except (OSError, ValueError):
                continue


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="workers are found in /proc")
def test_a_killed_worker_changes_no_byte(cluster: str, texts: Path, tmp_path: Path) -> None:
    killed, is_done = list[int](), threading.Event()
    killer = threading.Thread(target=kill_a_busy_worker, args=(killed, is_done))
    killer.start()
    stages = list[tuple[str, float]]()
    made = build(tmp_path / "ray", texts, RayConfig(), lambda *stage: stages.append(stage))
    is_done.set()
    killer.join()
    assert killed, "a worker was killed at a task"
    assert made == build(tmp_path / "local", texts, 1)
    assert sum("shard" in name for name in made) > 3, "several units"
    for stage in ("reading the text", "tokenizing"):
        fractions = [fraction for name, fraction in stages if name == stage]
        assert len(fractions) > 3 and fractions == sorted(fractions) and fractions[-1] == 1.0


def test_a_file_that_a_worker_lacks_is_named_with_the_host(cluster: str, texts: Path, tmp_path: Path) -> None:
    def lose(stage: str, fraction: float) -> None:
        if stage == "training the tokenizer":
            (texts / "3.txt").unlink(missing_ok=True)

    with pytest.raises(TextError, match="missing on a worker") as caught:
        build(tmp_path / "built", texts, RayConfig(), lose)
    assert f"3.txt on the machine {socket.gethostname()}" in caught.value.location
    assert "same paths" in caught.value.hint


def test_relative_paths_are_those_of_the_command(
    cluster: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of a cluster run in the folder in which it was started."""
    monkeypatch.chdir(tmp_path)
    made = build(Path("ray"), Path("texts"), RayConfig())
    assert made == build(tmp_path / "local", texts, 1)


def test_an_error_of_a_worker_keeps_its_class(cluster: str, texts: Path, tmp_path: Path) -> None:
    (texts / "3.txt").write_bytes(b"good\n\nb\xffd\n")
    with pytest.raises(TextError, match="not UTF-8") as caught:
        build(tmp_path / "built", texts, RayConfig())
    assert "3.txt" in caught.value.location


def test_texts_in_memory_are_refused(tmp_path: Path) -> None:
    settings = DataConfig(tokenizer=CharacterConfig())
    with pytest.raises(WorkerError, match="texts in memory") as caught:
        prepare(MemorySource(["one", "two"] * 20), settings, tmp_path, workers=RayConfig())
    assert "--engine ray" in caught.value.hint


def command(*arguments: str, before: str = "pass", cache: Path) -> subprocess.CompletedProcess[str]:
    program = f"import sys; sys.argv[0] = 'unmask'; {before}; from unmask.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "data", "prepare", *arguments],
        env={**os.environ, "UNMASK_CACHE": str(cache)},
        capture_output=True,
        text=True,
    )


def test_the_command_prepares_on_a_running_cluster(cluster: str, texts: Path, tmp_path: Path) -> None:
    arguments = [str(texts), "--recipe", "char", "--json"]
    made = command(*arguments, "--engine", "ray", "--address", cluster, cache=tmp_path / "ray")
    assert made.returncode == 0, made.stderr
    facts = json.loads(made.stdout)
    assert not facts["was_cached"] and facts["documents"] == 6
    prepare_locally = command(*arguments, cache=tmp_path / "local")
    name = Path(facts["folder"]).parent.name
    assert tree(tmp_path / "ray" / name) == tree(tmp_path / "local" / name) != {}, prepare_locally.stderr


@pytest.mark.parametrize(
    ("options", "before", "message"),
    [
        (("--address", "auto"), "", "--address needs --engine ray"),
        (("--engine", "ray", "--address", "127.0.0.1:1"), "", "no Ray cluster answers"),
        (("--engine", "ray", "--address", "ray://head:10001"), "", "invalid address: got ray://head:10001"),
        (("--engine", "ray"), "sys.modules['ray'] = None", 'pip install "unmask[ray]"'),
    ],
)
def test_without_a_cluster_the_command_names_what_is_missing(
    texts: Path, tmp_path: Path, options: tuple[str, ...], before: str, message: str
) -> None:
    done = command(str(texts), "--recipe", "char", *options, before=before or "pass", cache=tmp_path / "cache")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "hint:" in done.stderr and "Traceback" not in done.stderr
    assert not [file for file in tree(tmp_path / "cache") if "unit" in file], "no shard was written"
