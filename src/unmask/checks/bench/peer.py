"""The same work by `transformers`, if it is installed: Trainer, data collator, fill-mask pipeline.

It runs in a process of its own, because settings of this process would change its speed: unmask lets malloc keep freed
memory, which made the Trainer 1.4 times as fast (`bert-mini`), and uses deterministic algorithms.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np

import unmask
from unmask.checks.bench.peer_process import PeerSetup, Rows
from unmask.checks.bench.timing import Work
from unmask.checks.bench.work import BenchedRecipe
from unmask.core import files
from unmask.core.files import RunLayout
from unmask.core.types import Batch
from unmask.hub.parity import quiet_transformers
from unmask.models.fill_mask import MASK
from unmask.models.hf_format import to_hf_config
from unmask.models.model import save_model

NOT_INSTALLED: Final = "not installed"
_BATCHES: Final = 64  # of different text for the Trainer
_REASON_LENGTH: Final = 100  # characters


class PeerError(Exception):
    """`transformers` failed; the message says why."""


def installed_version(name: str) -> str:
    """Return the version of a package, or NOT_INSTALLED if it can't be imported."""
    try:
        return str(importlib.import_module(name).__version__)
    except ImportError:
        return NOT_INSTALLED


def missing_class(benched: BenchedRecipe) -> str:
    """Return why `transformers` can't do the work of a recipe, or "" if it can; it is installed."""
    import transformers

    if benched.has_pairs:
        return "sentence pairs: not compared"
    hf_config = to_hf_config(benched.recipe.model, benched.components.vocab_size, {})
    with quiet_transformers():
        known = any(hasattr(transformers, name) for name in hf_config.get("architectures", ()))
    return "" if known else "no such class"


class Peer:
    """A process with a model of `transformers`; a context manager that ends it.

    The model has the weights and the tokenizer of a recipe's model. Between its turns, the process waits for input.
    """

    def __init__(self, benched: BenchedRecipe, folder: Path) -> None:
        """Writes the model to a folder and starts the process."""
        save_model(folder, benched.model())
        context = benched.context
        setup = PeerSetup(
            folder=str(folder),
            architecture=str(files.read_json(folder / RunLayout.CONFIG)["architectures"][0]),
            device=str(context.device),
            threads=context.threads,
            precision=context.precision,
            mask_rate=benched.masked_fraction,
        )
        paths = [str(Path(unmask.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._messages = folder / "messages.txt"
        with self._messages.open("w", encoding="utf-8") as messages:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "unmask.checks.bench.peer_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
                encoding="utf-8",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        self._send(asdict(setup))

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def training_work(self, blocks: Rows, batch_rows: int) -> Work:
        """Return steps of the Trainer on rows of equal length, `batch_rows` per step; the unit is a token."""
        return self._work("training", blocks=blocks, batch_rows=batch_rows)

    def masking_work(self, batches: Sequence[Batch]) -> Work:
        """Return padding and masking by the data collator, of the rows of these batches; the unit is a row."""
        return self._work("masking", batches=[rows_of(batch) for batch in batches])

    def fill_work(self, sentences: Sequence[str]) -> Work:
        """Return predictions by the fill-mask pipeline, all sentences in one batch; the unit is a sentence."""
        return self._work("filling", sentences=list(sentences), mask=MASK)

    def _work(self, name: str, **inputs: Any) -> Work:
        """Prepare work, in place of the work that was prepared before.

        Raises:
            PeerError: it fails, as the returned function may.
        """
        self._ask({"work": name, "inputs": inputs})
        return lambda seconds: self._ask({"seconds": seconds})["times"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdout is not None
        self._send(request)
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(self._end())
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"failed: {answer['error'][:_REASON_LENGTH]}")
        return answer

    def _send(self, message: dict[str, Any]) -> None:
        """Send one line; a process that has ended is noticed when its answer is read."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _end(self) -> str:
        """Return how the process ended, and its last line on standard error."""
        code = self._process.wait()
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        lines = self._messages.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how}: {last[:_REASON_LENGTH]}" if last else how


# Rows -----------------------------------------------------------------------------------------------------------------


def rows_of(batch: Batch) -> list[list[int]]:
    """Return the token ids of each sample of a batch, special tokens included."""
    ids, offsets = batch.ids_T.tolist(), batch.offsets
    return [ids[first:last] for first, last in pairwise(offsets)]


def blocks_of(benched: BenchedRecipe) -> tuple[Rows, int]:
    """Return training rows for the Trainer, and the number of rows per step.

    Samples are concatenated and cut to rows of the full length, as run_mlm.py of `transformers` does, so that no row is
    padded. A short text is repeated until it fills one step.
    """
    length = benched.length
    batch_rows = max(1, benched.batch_tokens // length)
    ids = np.concatenate([batch.ids_T.numpy() for batch in benched.batches(_BATCHES)])
    blocks = np.resize(ids, (max(batch_rows, len(ids) // length), length))
    return blocks.tolist(), batch_rows
