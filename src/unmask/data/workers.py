"""Room card: the pieces of work that a corpus is made in.

Comes in: a source, some of its parts, what was decided before. Goes out: files of one unit: the numbers of its
documents, its text for the tokenizer, its shards. Called by: workers, in this process or another; corpus.

What a unit gives depends on its parts alone, never on who works on it or how many do.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, TextIO

import numpy as np
from numpy.typing import NDArray

import unmask
from unmask.core import errors, rng
from unmask.core.config import build_config, dump_config
from unmask.core.errors import TextError, UnmaskError
from unmask.core.files import wrap_os_errors
from unmask.core.hardware import cores
from unmask.core.types import Source, SourceShard
from unmask.data.readers.documents import PART_BYTES
from unmask.data.settings import DataConfig
from unmask.data.shards import NumberFile, ShardWriter, Written, mapped
from unmask.data.sources import FileSource, SourceRecipe, kind_of
from unmask.data.split import (
    REPORT_CHARACTERS,
    CharCounter,
    DocumentSlice,
    SplitName,
    Tell,
    measured,
    numbered,
    stretches,
)
from unmask.tokenization.fast_encode import CachedEncoder
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.words import WordsRule

LARGEST_UNIT_BYTES: Final = 64_000_000  # of text: half a minute of work or so, and 50 MB of shards
SMALLEST_UNIT_BYTES: Final = 4_000_000  # less would not be worth a process
UNITS: Final = 16  # between the two: so many, that several workers end at about the same time
SIDES: Final[tuple[SplitName, SplitName]] = ("train", "held-out")
_BATCH_CHARACTERS: Final = 1_000_000  # encoded at a time; what an encoding holds is many times its text
_BATCH_PASSAGES: Final = 8192

Result = dict[str, Any]


@dataclass(frozen=True)
class WorkUnit:
    """Neighbouring parts of a source."""

    number: int
    parts: tuple[SourceShard, ...]


@dataclass(frozen=True)
class Task:
    """What is to be done with a unit. It goes to another process as JSON, so it holds plain values only."""

    unit: int
    parts: Sequence[SourceShard]
    folder: str  # where its files are written, and where those of all documents lie
    first_document: int = 0  # of all documents; what follows is known after the survey
    documents: Sequence[int] = ()  # of each part
    shares: Sequence[float] = ()  # of each part: how much of it the tokenizer learns from
    words: WordsRule = "spaces"
    by_chunks: bool = True

    def to_json(self) -> Result:
        """As it is sent."""
        return asdict(self)

    @classmethod
    def from_json(cls, told: Result) -> Task:
        """As it was sent."""
        task = cls(**told)
        return replace(task, parts=[SourceShard(*part) for part in task.parts])

    def file(self, ending: str) -> Path:
        """A file of this unit."""
        return Path(self.folder) / f"unit-{self.unit:05d}.{ending}"


def units_of(parts: Sequence[SourceShard], unit_bytes: int | None = None) -> list[WorkUnit]:
    """Neighbouring parts, together up to so many bytes; a larger one stands alone.

    By itself it makes a dozen units or more of any text that is worth several workers: all that decides is the text,
    since the shards of a corpus must not depend on who made them.
    """
    sizes = list(map(_bytes, parts))
    if unit_bytes is None:
        unit_bytes = min(LARGEST_UNIT_BYTES, max(SMALLEST_UNIT_BYTES, sum(sizes) // UNITS))
    units: list[list[SourceShard]] = []
    size = 0
    for part, own in zip(parts, sizes, strict=True):
        if not units or size + own > unit_bytes:
            units.append([])
            size = 0
        units[-1].append(part)
        size += own
    return [WorkUnit(number, tuple(held)) for number, held in enumerate(units)]


def _bytes(part: SourceShard) -> int:
    """How large a part is; those of a data set are counted in rows, and made about equally large."""
    return PART_BYTES if kind_of(part.path) == "dataset" else part.last_byte - part.first_byte


class TaskRunner:
    """Works on units of one source. The work: "survey", "sample", "encode"."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._encoder: tuple[Tokenizer, CachedEncoder] | None = None  # remembers words from unit to unit

    def do(self, work: str, task: Task, tell: Tell) -> Result:
        """Do a piece of work; the answer holds plain values only.

        Raises:
            TextError: text that can't be read.
            StoreError: files that can't be written.
        """
        doing: Mapping[str, Callable[[Task, Tell], Result]] = {
            "survey": self._survey,
            "sample": self._write_sample,
            "encode": self._encode,
        }
        with wrap_os_errors(Path(task.folder)):
            return doing[work](task, tell)

    def _survey(self, task: Task, tell: Tell) -> Result:
        """Length and hash of each document of the unit, in files."""
        documents: list[int] = []
        noted = CharCounter(tell) if task.unit == 0 else CharCounter(tell, 0)
        lengths, hashes = NumberFile(task.file("lengths")), NumberFile(task.file("hashes"), "<u8")
        try:
            for part in task.parts:
                documents.append(0)
                for length, hash_ in measured(self._source.documents(part), noted):
                    documents[-1] += 1
                    lengths.add(length)
                    hashes.add(hash_)
            lengths.close()
            hashes.close()
        finally:
            lengths.abandon()
            hashes.abandon()
        noted.tell()
        left_out: Mapping[SourceShard, int] = getattr(self._source, "left_out", {})
        return {
            "documents": documents,
            "characters": noted.characters,
            "sample": noted.sample,
            "left_out": sum(left_out.get(part, 0) for part in task.parts),
        }

    def sample(self, task: Task, tell: Tell) -> Iterator[str]:
        """Training text for the tokenizer: of each part all, or as much as its share, drawn evenly."""
        done = 0
        first = 0
        drawn_N, block = np.zeros(0, dtype=np.bool_), 0
        for part, documents, share in zip(task.parts, task.documents, task.shares, strict=True):
            for stretch in _stretches(self._source, task, [part], first, documents):
                document = task.first_document + first + stretch.document
                done += len(stretch.text)
                if done >= REPORT_CHARACTERS:
                    tell(done)
                    done = 0
                if stretch.side != "train" or not share:
                    continue
                if not block <= document < block + len(drawn_N):
                    block = document
                    asked = np.arange(document, document + _BATCH_PASSAGES)
                    drawn_N = rng.uniform(0, "tokenizer sample", asked) < share
                # Further pieces of a long document are drawn one by one: they are long, so there are few of them.
                if share >= 1 or (
                    rng.uniform(0, "tokenizer sample", document, stretch.piece)[0] < share
                    if stretch.piece
                    else drawn_N[document - block]
                ):
                    yield stretch.text
            first += documents
            drawn_N = drawn_N[:0]
        tell(done)

    def _write_sample(self, task: Task, tell: Tell) -> Result:
        with task.file("sample").open("w", encoding="utf-8", newline="\n") as file:
            for text in self.sample(task, tell):
                file.write(json.dumps(text) + "\n")
        return {}

    def _encode(self, task: Task, tell: Tell) -> Result:
        """The unit's shards of both sides, and how many documents each part has on them."""
        tokenizer, encoder = self._encoder_of(task)
        writers = {which: ShardWriter(task.file(which), tokenizer.size) for which in SIDES}
        documents: dict[SplitName, list[int]] = {which: [] for which in SIDES}
        with writers["train"].closing(), writers["held-out"].closing():
            first = 0
            for part, count in zip(task.parts, task.documents, strict=True):
                for counts in documents.values():
                    counts.append(0)
                for batch in _batches(_stretches(self._source, task, [part], first, count)):
                    for which in SIDES:
                        mine = [stretch for stretch in batch if stretch.side == which]
                        if mine:
                            documents[which][-1] += _write(writers[which], encoder, mine)
                    tell(sum(len(stretch.text) for stretch in batch))
                first += count
            written = {which: writers[which].finish() for which in SIDES}
        return {which: {"written": list(written[which]), "documents": documents[which]} for which in SIDES}

    def _encoder_of(self, task: Task) -> tuple[Tokenizer, CachedEncoder]:
        if self._encoder is None:
            tokenizer = Tokenizer.load(tokenizer_folder(Path(task.folder)))
            self._encoder = tokenizer, CachedEncoder(tokenizer, task.words, by_chunks=task.by_chunks)
        return self._encoder


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer stands that units are encoded with."""
    return folder.parent / "told"


def _stretches(
    source: Source, task: Task, parts: Sequence[SourceShard], first: int, count: int
) -> Iterator[DocumentSlice]:
    """The text of some parts of a unit, divided."""
    begin = task.first_document + first
    columns: list[NDArray[np.int64]] = [
        mapped(Path(task.folder) / name)[begin : begin + count] for name in ("lengths", "first-held")
    ]
    return stretches(numbered(source, parts), *columns)


def _batches(all_stretches: Iterable[DocumentSlice]) -> Iterator[list[DocumentSlice]]:
    """Some at a time."""
    held: list[DocumentSlice] = []
    size = 0
    for stretch in all_stretches:
        held.append(stretch)
        size += len(stretch.text)
        if size >= _BATCH_CHARACTERS or len(held) >= _BATCH_PASSAGES:
            yield held
            held, size = [], 0
    if held:
        yield held


def _write(writer: ShardWriter, encoder: CachedEncoder, batch: Sequence[DocumentSlice]) -> int:
    """Encode stretches of one side and write them; how many documents ended."""
    encoded = encoder.encode([stretch.text for stretch in batch])
    characters_B = np.array([stretch.characters for stretch in batch], dtype=np.int64)
    last_B = np.array([stretch.last for stretch in batch], dtype=np.bool_)
    numbers_B3 = np.stack([encoded.tokens_B, characters_B, encoded.unknown_B], axis=1)
    writer.write(encoded.ids, encoded.marks, numbers_B3, last_B)
    return int(last_B.sum())


def written_of(result: Result, which: SplitName) -> Written:
    """What a unit wrote for a side."""
    return Written(*result[which]["written"])


WorkersWanted = int | Literal["all cores"]
_SINGLE: Final = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class Workers:
    """Does tasks; use it as a context, since it may hold processes."""

    def __init__(self, source: Source, settings: DataConfig, wanted: WorkersWanted, units: int) -> None:
        self._hand = TaskRunner(source)
        limit = cores() if wanted == "all cores" else wanted
        # A source in memory, or of a person's own, can't be opened elsewhere.
        self.count = min(limit, units) if isinstance(source, FileSource) else 1
        self.processes: list[Process] = []
        self._inbox: queue.SimpleQueue[tuple[int, Result | None]] = queue.SimpleQueue()
        if self.count > 1 and isinstance(source, FileSource):
            recipe = SourceRecipe(source.paths, settings)
            self._hello = {"paths": recipe.paths, "settings": dump_config(settings)}

    @property
    def hand(self) -> TaskRunner:
        """The one that works in this process."""
        return self._hand

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.end()

    def start(self) -> None:
        """Start the processes, if there are to be any; `do` does it where it wasn't done."""
        if self.count > 1 and not self.processes:
            self.processes += [Process(number, self._hello, self._inbox) for number in range(self.count)]

    def do(self, work: str, tasks: Sequence[Task], tell: Callable[[int], None]) -> list[Result]:
        """Do this work for every task; `tell` learns of characters that are done.

        Raises:
            UnmaskError: what the first of the tasks that failed raised.
        """
        if self.count == 1:
            return [self._hand.do(work, task, tell) for task in tasks]
        self.start()
        answers: dict[int, Result] = {}
        failed: dict[int, Result] = {}
        waiting = iter(range(len(tasks)))
        busy: dict[int, int] = {}

        def give(number: int) -> None:
            index = None if failed else next(waiting, None)
            if index is not None:
                busy[number] = index
                self.processes[number].send({"work": work, "task": tasks[index].to_json()})

        for number in range(self.count):
            give(number)
        while busy:
            number, message = self._inbox.get()
            if message is None:
                raise self.processes[number].gone()
            if "did" in message:
                tell(message["did"])
                continue
            index = busy.pop(number)
            (failed if "error" in message else answers)[index] = message
            give(number)
        if failed:
            raise _error_of(failed[min(failed)]["error"])
        return [answers[index]["answer"] for index in range(len(tasks))]


class Process:
    """One worker, seen from the parent."""

    def __init__(self, number: int, hello: Result, inbox: queue.SimpleQueue[tuple[int, Result | None]]) -> None:
        here = str(Path(unmask.__file__).parent.parent)
        paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "unmask.data.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, **_SINGLE, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self._reader = threading.Thread(target=self._listen, args=(number, inbox), daemon=True)
        self._reader.start()
        self.send(hello)

    def _listen(self, number: int, inbox: queue.SimpleQueue[tuple[int, Result | None]]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            inbox.put((number, json.loads(line)))
        inbox.put((number, None))

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def send(self, message: Result) -> None:
        """One line; a worker that is gone is noticed when its answer doesn't come."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def gone(self) -> TextError:
        """Why there is no answer."""
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return TextError(
            f"a process that worked on the text {how}",
            hint="see above what it said; where it said nothing, the machine may be short of memory",
        )

    def end(self) -> None:
        """Stop it, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _told(error: BaseException) -> Result:
    if isinstance(error, UnmaskError):
        return {"kind": type(error).__name__, "what": error.message, "where": error.location, "next": error.hint}
    return {"kind": "", "what": "".join(traceback.format_exception(error))}


def _error_of(told: Result) -> Exception:
    kind = getattr(errors, told["kind"], None) if told["kind"] else None
    if isinstance(kind, type) and issubclass(kind, UnmaskError):
        return kind(told["what"], location=told["where"], hint=told["next"])
    return RuntimeError(f"in a worker process:\n{told['what']}")


def serve() -> None:
    """Be a worker until standard input ends."""
    with contextlib.suppress(ValueError, OSError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent decides
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    requests: queue.SimpleQueue[Result] = queue.SimpleQueue()
    threading.Thread(target=_hear, args=(requests,), daemon=True).start()
    hello = requests.get()
    settings = build_config(DataConfig, tomllib.loads(hello["settings"]), "the parent's settings")
    hand = TaskRunner(SourceRecipe(tuple(hello["paths"]), settings).open())
    while True:
        request = requests.get()
        try:
            task = Task.from_json(request["task"])
            answer = {"answer": hand.do(request["work"], task, lambda did: _say(answers, {"did": did}))}
        except Exception as error:
            answer = {"error": _told(error)}
        _say(answers, answer)


def _hear(requests: queue.SimpleQueue[Result]) -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    os._exit(0)  # at once, whatever the other thread does: nobody waits for it, and what it writes is in nobody's way


def _say(answers: TextIO, message: Any) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    serve()
