"""Room card: units of work, here or in processes of their own.

Comes in: a source, tasks. Goes out: the answer to each task, in order, whoever did it. Called by: corpus.

A worker is a fresh interpreter (`python -m unmask.text.workers`), never a fork. It is told by lines of JSON how to open
the source and what to do, and answers likewise. Its input is a pipe that the parent holds: where the parent is gone,
however it ended, the pipe closes and the worker ends at once, in the middle of a word if need be.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, TextIO

import unmask
from unmask import errors
from unmask.contracts import Source
from unmask.errors import TextError, UnmaskError
from unmask.machine import cores
from unmask.recipe import build, dump
from unmask.text.opening import SourceRecipe
from unmask.text.settings import TextSettings
from unmask.text.sources import FileSource
from unmask.text.units import Hand, Result, Task

WorkersWanted = int | Literal["all cores"]
_SINGLE: Final = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class Workers:
    """Does tasks; use it as a context, since it may hold processes."""

    def __init__(self, source: Source, settings: TextSettings, wanted: WorkersWanted, units: int) -> None:
        self._hand = Hand(source)
        limit = cores() if wanted == "all cores" else wanted
        # A source in memory, or of a person's own, can't be opened elsewhere.
        self.count = min(limit, units) if isinstance(source, FileSource) else 1
        self.processes: list[Process] = []
        self._inbox: queue.SimpleQueue[tuple[int, Result | None]] = queue.SimpleQueue()
        if self.count > 1 and isinstance(source, FileSource):
            recipe = SourceRecipe(source.paths, settings)
            self._hello = {"paths": recipe.paths, "settings": dump(settings)}

    @property
    def hand(self) -> Hand:
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
            [sys.executable, "-P", "-m", "unmask.text.workers"],
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
            next="see above what it said; where it said nothing, the machine may be short of memory",
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
        return {"kind": type(error).__name__, "what": error.what, "where": error.where, "next": error.next}
    return {"kind": "", "what": "".join(traceback.format_exception(error))}


def _error_of(told: Result) -> Exception:
    kind = getattr(errors, told["kind"], None) if told["kind"] else None
    if isinstance(kind, type) and issubclass(kind, UnmaskError):
        return kind(told["what"], where=told["where"], next=told["next"])
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
    settings = build(TextSettings, tomllib.loads(hello["settings"]), "the parent's settings")
    hand = Hand(SourceRecipe(tuple(hello["paths"]), settings).open())
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
