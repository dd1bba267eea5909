"""Work units of tokenization, run in this process or in worker processes.

A unit is a few neighboring parts of a source. Its files depend on its parts alone, never on the number of workers.
Workers are separate programs that exchange lines of JSON with their parent and never import torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import tomllib
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, TextIO, TypeVar

import numpy as np
from numpy.typing import NDArray

import unmask
from unmask.core import errors, rng
from unmask.core.config import build_config, dump_config
from unmask.core.errors import UnmaskError, WorkerError
from unmask.core.files import wrap_os_errors
from unmask.core.hardware import cores
from unmask.core.types import SourceShard
from unmask.data.readers.documents import PART_BYTES
from unmask.data.settings import DataConfig
from unmask.data.shards import NumberFile, ShardFiles, ShardWriter, map_numbers
from unmask.data.sources import BaseSource, FileSource, SourceRecipe, kind_of
from unmask.data.split import (
    REPORT_CHARACTERS,
    CharCounter,
    CountCallback,
    DocumentSlice,
    SplitName,
    measure_documents,
    number_documents,
    slice_documents,
)
from unmask.tokenization.fast_encode import CachedEncoder
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.words import WordsRule

MAX_UNIT_BYTES: Final = 64_000_000  # of text: about half a minute of work and 50 MB of shards
MIN_UNIT_BYTES: Final = 4_000_000  # less is not worth starting a process for
TARGET_UNITS: Final = 16  # between the two limits: enough that several workers end at about the same time
SPLITS: Final[tuple[SplitName, SplitName]] = ("train", "held-out")
_BATCH_CHARACTERS: Final = 1_000_000  # encoded at a time; an encoding takes many times the memory of its text
_BATCH_CHUNKS: Final = 8192

Message = dict[str, Any]  # plain values, for JSON


@dataclass(frozen=True)
class WorkUnit:
    """Neighboring parts of a source."""

    number: int
    parts: tuple[SourceShard, ...]


@dataclass(frozen=True)
class Task:
    """A unit and its inputs. Tasks are sent to workers as JSON, so they contain plain values only."""

    unit: int
    parts: Sequence[SourceShard]
    folder: str  # contains the files of this unit and the columns of all documents
    first_document: int = 0  # index among all documents; like the fields below, set after the survey
    documents: Sequence[int] = ()  # number of documents of each part
    shares: Sequence[float] = ()  # fraction of each part that the tokenizer is trained on
    words: WordsRule = "spaces"
    tokenizer: str = ""  # folder of the tokenizer
    by_chunks: bool = True

    def to_json(self) -> Message:
        """Return the task as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, message: Message) -> Task:
        """Return the task from the plain values of `to_json`."""
        task = cls(**message)
        return replace(task, parts=[SourceShard(*part) for part in task.parts])

    def file(self, ending: str) -> Path:
        """Return the path of a file of this unit."""
        return Path(self.folder) / f"unit-{self.unit:05d}.{ending}"


def units_of(parts: Sequence[SourceShard], unit_bytes: int | None = None) -> list[WorkUnit]:
    """Group neighboring parts into units of at most `unit_bytes`; a larger part is a separate unit.

    The default depends on the text alone, because the shards must not depend on the number of workers. Any text
    that is worth several workers has a dozen units or more.
    """
    sizes = list(map(_bytes, parts))
    if unit_bytes is None:
        unit_bytes = min(MAX_UNIT_BYTES, max(MIN_UNIT_BYTES, sum(sizes) // TARGET_UNITS))
    units: list[list[SourceShard]] = []
    size = 0
    for part, part_bytes in zip(parts, sizes, strict=True):
        if not units or size + part_bytes > unit_bytes:
            units.append([])
            size = 0
        units[-1].append(part)
        size += part_bytes
    return [WorkUnit(number, tuple(unit)) for number, unit in enumerate(units)]


def _bytes(part: SourceShard) -> int:
    """Return the size of a part; parts of a dataset are ranges of rows, of about PART_BYTES each."""
    return PART_BYTES if kind_of(part.path) == "dataset" else part.last_byte - part.first_byte


class TaskRunner:
    """Runs the stages "survey", "sample" and "encode" on units of one source."""

    def __init__(self, source: BaseSource) -> None:
        self._source = source
        self._encoder: tuple[Tokenizer, CachedEncoder] | None = None  # the cache of chunks is shared by all units

    def run(self, stage: str, task: Task, report: CountCallback) -> Message:
        """Run a stage on a unit and return its result as plain values.

        Raises:
            TextError: the text can't be read.
            StoreError: the files can't be written.
        """
        stages: Mapping[str, Callable[[Task, CountCallback], Message]] = {
            "survey": self._survey,
            "sample": self._write_sample,
            "encode": self._encode,
        }
        with wrap_os_errors(Path(task.folder)):
            return stages[stage](task, report)

    def _survey(self, task: Task, report: CountCallback) -> Message:
        """Write length and hash of each document of the unit."""
        documents: list[int] = []
        counter = CharCounter(report) if task.unit == 0 else CharCounter(report, 0)
        lengths, hashes = NumberFile(task.file("lengths")), NumberFile(task.file("hashes"), "<u8")
        try:
            for part in task.parts:
                documents.append(0)
                for length, hash_ in measure_documents(self._source.documents(part), counter):
                    documents[-1] += 1
                    lengths.add(length)
                    hashes.add(hash_)
            lengths.close()
            hashes.close()
        finally:
            lengths.abandon()
            hashes.abandon()
        counter.report()
        left_out = self._source.left_out
        return {
            "documents": documents,
            "characters": counter.characters,
            "sample": counter.sample,
            "left_out": sum(left_out.get(part, 0) for part in task.parts),
        }

    def sample(self, task: Task, report: CountCallback) -> Iterator[str]:
        """Yield training text for the tokenizer: documents drawn uniformly, from each part its share."""
        done = 0
        first = 0
        is_drawn, block = np.zeros(0, dtype=np.bool_), 0
        for part, documents, share in zip(task.parts, task.documents, task.shares, strict=True):
            for chunk in _slices(self._source, task, [part], first, documents):
                document = task.first_document + first + chunk.document
                done += len(chunk.text)
                if done >= REPORT_CHARACTERS:
                    report(done)
                    done = 0
                if chunk.side != "train" or not share:
                    continue
                if not block <= document < block + len(is_drawn):
                    block = document
                    numbers = np.arange(document, document + _BATCH_CHUNKS)
                    is_drawn = rng.uniform(0, "tokenizer sample", numbers) < share
                # Later chunks of a document are drawn one by one: they are long, so there are few of them.
                if share >= 1 or (
                    rng.uniform(0, "tokenizer sample", document, chunk.number)[0] < share
                    if chunk.number
                    else is_drawn[document - block]
                ):
                    yield chunk.text
            first += documents
            is_drawn = is_drawn[:0]
        report(done)

    def _write_sample(self, task: Task, report: CountCallback) -> Message:
        with task.file("sample").open("w", encoding="utf-8", newline="\n") as file:
            for text in self.sample(task, report):
                file.write(json.dumps(text) + "\n")
        return {}

    def _encode(self, task: Task, report: CountCallback) -> Message:
        """Write the unit's shards of both splits and count the documents of each part in them."""
        tokenizer, encoder = self._load_encoder(task)
        writers = {split: ShardWriter(task.file(split), tokenizer.size) for split in SPLITS}
        documents: dict[SplitName, list[int]] = {split: [] for split in SPLITS}
        with writers["train"].closing(), writers["held-out"].closing():
            first = 0
            for part, count in zip(task.parts, task.documents, strict=True):
                for counts in documents.values():
                    counts.append(0)
                slices = _slices(self._source, task, [part], first, count)
                for batch in batch_by_characters(slices, lambda chunk: len(chunk.text)):
                    for split in SPLITS:
                        chunks = [chunk for chunk in batch if chunk.side == split]
                        if chunks:
                            documents[split][-1] += _write(writers[split], encoder, chunks)
                    report(sum(len(chunk.text) for chunk in batch))
                first += count
            files = {split: writers[split].finish() for split in SPLITS}
        return {split: {"files": list(files[split]), "documents": documents[split]} for split in SPLITS}

    def _load_encoder(self, task: Task) -> tuple[Tokenizer, CachedEncoder]:
        if self._encoder is None:
            tokenizer = Tokenizer.load(Path(task.tokenizer))
            self._encoder = tokenizer, CachedEncoder(tokenizer, task.words, by_chunks=task.by_chunks)
        return self._encoder


def _slices(
    source: BaseSource, task: Task, parts: Sequence[SourceShard], first: int, count: int
) -> Iterator[DocumentSlice]:
    """Yield the text of some parts of a unit, divided between the splits."""
    begin = task.first_document + first
    columns: list[NDArray[np.int64]] = [
        map_numbers(Path(task.folder) / name)[begin : begin + count] for name in ("lengths", "first-held")
    ]
    return slice_documents(number_documents(source, parts), *columns)


T = TypeVar("T")


def batch_by_characters(items: Iterable[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
    """Group items into batches of about a million characters, or of 8,192 items if these are short."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += characters(item)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_CHUNKS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(writer: ShardWriter, encoder: CachedEncoder, batch: Sequence[DocumentSlice]) -> int:
    """Encode and write chunks of one split; return the number of documents that end in them."""
    encoded = encoder.encode([chunk.text for chunk in batch])
    characters = np.array([chunk.characters for chunk in batch], dtype=np.int64)
    is_last = np.array([chunk.last for chunk in batch], dtype=np.bool_)
    writer.write(encoded.ids, encoded.marks, encoded.num_tokens, characters, encoded.num_unknown, is_last)
    return int(is_last.sum())


def shard_files(result: Message, split: SplitName) -> ShardFiles:
    """Return the shards of one split from the result of the stage "encode"."""
    return ShardFiles(*result[split]["files"])


WorkerCount = int | Literal["all cores"]
SINGLE_THREAD: Final = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class WorkerPool(ABC):
    """Runs tasks; a context manager that ends what it started."""

    local: TaskRunner  # in this process
    count: int  # tasks that run at the same time; 1: in this process

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @abstractmethod
    def run(self, stage: str, tasks: Sequence[Task], report: Callable[[int], None]) -> list[Message]:
        """Run a stage on all tasks; `report` is called with the number of characters done since its last call."""


class Workers(WorkerPool):
    """Runs tasks in this process or in worker processes; a context manager that ends the processes."""

    def __init__(self, source: BaseSource, settings: DataConfig, count: WorkerCount, units: int) -> None:
        self.local = TaskRunner(source)
        limit = cores() if count == "all cores" else count
        # A source in memory or of a plugin can't be opened by another process.
        self.count = min(limit, units) if isinstance(source, FileSource) else 1
        self.processes: list[WorkerProcess] = []
        self._inbox: queue.SimpleQueue[tuple[int, Message | None]] = queue.SimpleQueue()
        if self.count > 1 and isinstance(source, FileSource):
            recipe = SourceRecipe(source.names, settings)
            self._setup = {"paths": recipe.paths, "settings": dump_config(settings)}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.end()

    def start(self) -> None:
        """Start the worker processes, if several are needed; the first call of `run` does this, too."""
        if self.count > 1 and not self.processes:
            self.processes += [WorkerProcess(number, self._setup, self._inbox) for number in range(self.count)]

    def run(self, stage: str, tasks: Sequence[Task], report: Callable[[int], None]) -> list[Message]:
        """Run a stage on all tasks; `report` is called with the number of characters done since its last call.

        Raises:
            UnmaskError: the error of the first task that failed.
            WorkerError: a worker process ended.
        """
        if self.count == 1:
            return [self.local.run(stage, task, report) for task in tasks]
        self.start()
        results: dict[int, Message] = {}
        failures: dict[int, Message] = {}
        waiting = iter(range(len(tasks)))
        busy: dict[int, int] = {}

        def send_next(number: int) -> None:
            index = None if failures else next(waiting, None)
            if index is not None:
                busy[number] = index
                self.processes[number].send({"stage": stage, "task": tasks[index].to_json()})

        for number in range(self.count):
            send_next(number)
        while busy:
            number, message = self._inbox.get()
            if message is None:
                raise self.processes[number].exit_error()
            if "characters" in message:
                report(message["characters"])
                continue
            index = busy.pop(number)
            (failures if "error" in message else results)[index] = message
            send_next(number)
        if failures:
            raise decode_error(failures[min(failures)]["error"])
        return [results[index]["result"] for index in range(len(tasks))]


class WorkerProcess:
    """A worker process, controlled by its parent."""

    def __init__(self, number: int, setup: Message, inbox: queue.SimpleQueue[tuple[int, Message | None]]) -> None:
        package_parent = str(Path(unmask.__file__).parent.parent)
        paths = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "unmask.data.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, **SINGLE_THREAD, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self._reader = threading.Thread(target=self._listen, args=(number, inbox), daemon=True)
        self._reader.start()
        self.send(setup)

    def _listen(self, number: int, inbox: queue.SimpleQueue[tuple[int, Message | None]]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            inbox.put((number, json.loads(line)))
        inbox.put((number, None))

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def send(self, message: Message) -> None:
        """Send one line; a process that has ended is noticed when the end of its output is read."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def exit_error(self) -> WorkerError:
        """Return the error for a process that has ended."""
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return WorkerError(
            f"a worker process that was tokenizing {how}",
            hint="read its messages above; if there are none, check that the machine has enough memory",
        )

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def encode_error(error: BaseException) -> Message:
    """Return an error as plain values."""
    if isinstance(error, UnmaskError):
        return {
            "type": type(error).__name__,
            "message": error.message,
            "location": error.location,
            "hint": error.hint,
        }
    return {"type": "", "message": "".join(traceback.format_exception(error))}


def decode_error(message: Message) -> Exception:
    """Return the error from the plain values of `encode_error`."""
    kind = getattr(errors, message["type"], None) if message["type"] else None
    if isinstance(kind, type) and issubclass(kind, UnmaskError):
        return kind(message["message"], location=message["location"], hint=message["hint"])
    return RuntimeError(f"in a worker process:\n{message['message']}")


def serve() -> None:
    """Run tasks until standard input ends."""
    with contextlib.suppress(ValueError, OSError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keeps output of libraries out of the messages
    requests: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    setup = requests.get()
    settings = build_config(DataConfig, tomllib.loads(setup["settings"]), "the parent's settings")
    runner = TaskRunner(SourceRecipe(tuple(setup["paths"]), settings).open())
    while True:
        request = requests.get()
        try:
            task = Task.from_json(request["task"])
            result = runner.run(request["stage"], task, lambda count: _send(output, {"characters": count}))
            message = {"result": result}
        except Exception as error:
            message = {"error": encode_error(error)}
        _send(output, message)


def _read_requests(requests: queue.SimpleQueue[Message]) -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    os._exit(0)  # without waiting for the other thread: the parent has ended, and its files are not needed


def _send(output: TextIO, message: Message) -> None:
    output.write(json.dumps(message) + "\n")
    output.flush()


if __name__ == "__main__":
    serve()
