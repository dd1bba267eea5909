"""The process in which `transformers` works, with the defaults of torch: `python -m unmask.checks.bench.peer_process`.

Messages are lines of JSON on standard input and output. The first one has the fields of `PeerSetup`. Then
`{"work": NAME, "inputs": {...}}` prepares some work, and `{"seconds": S}` repeats it for S seconds and is answered with
the seconds per unit of each repetition. The process ends when standard input ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Final

import torch

from unmask.checks.bench.timing import Work, repeated

_MANY_STEPS: Final = 10**9  # a callback stops the Trainer
_LR: Final = 1e-5  # low, so that the weights stay finite however long the Trainer is timed

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class PeerSetup:
    """The model of `transformers`, and how it is run."""

    folder: str  # of model and tokenizer
    architecture: str  # class of the model
    device: str
    threads: int
    precision: str
    mask_rate: float


def _model(setup: PeerSetup) -> Any:
    import transformers

    model = getattr(transformers, setup.architecture).from_pretrained(
        setup.folder, local_files_only=True, dtype=torch.float32
    )
    return model.to(setup.device)


def _tokenizer(setup: PeerSetup) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(setup.folder, local_files_only=True)


def _collator(setup: PeerSetup) -> Any:
    import transformers

    return transformers.DataCollatorForLanguageModeling(_tokenizer(setup), mlm_probability=setup.mask_rate)


def training_work(setup: PeerSetup, blocks: Rows, batch_rows: int) -> Work:
    """Return steps of the Trainer with AdamW; the unit is a token. The first step of a call is not timed.

    Args:
        setup: the model.
        blocks: token ids of the training rows, all of the same length.
        batch_rows: rows of a step.
    """
    import transformers

    arguments = transformers.TrainingArguments(
        output_dir=os.path.join(setup.folder, "trainer"),
        max_steps=_MANY_STEPS,
        per_device_train_batch_size=batch_rows,
        learning_rate=_LR,
        use_cpu=setup.device == "cpu",
        bf16=setup.precision == "bfloat16",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=setup.device.startswith("cuda"),
    )
    trainer = transformers.Trainer(
        model=_model(setup),
        args=arguments,
        train_dataset=[{"input_ids": list(block)} for block in blocks],  # pyright: ignore[reportArgumentType]
        data_collator=_collator(setup),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    clock = _clock(setup.device, arguments.train_batch_size * len(blocks[0]))
    trainer.add_callback(clock)

    def run(seconds: float) -> list[float]:
        clock.start(seconds)
        trainer.train()
        return clock.times

    return run


def masking_work(setup: PeerSetup, batches: Sequence[Rows]) -> Work:
    """Return padding and masking of these rows by the data collator; the unit is a row."""
    features = [[{"input_ids": ids} for ids in rows] for rows in batches]
    collator, following = _collator(setup), cycle(features)

    def run(seconds: float) -> list[float]:
        times: list[float] = []
        begin = last = time.perf_counter()
        while not times or last - begin < seconds:
            rows = next(following)
            collator(rows)
            now = time.perf_counter()
            times.append((now - last) / len(rows))
            last = now
        return times

    return run


def fill_work(setup: PeerSetup, sentences: Sequence[str], mask: str) -> Work:
    """Return predictions by the fill-mask pipeline, all sentences in one batch; the unit is a sentence.

    `mask` is the mask token in the sentences.
    """
    import transformers

    tokenizer = _tokenizer(setup)
    pipeline = transformers.pipeline("fill-mask", model=_model(setup).eval(), tokenizer=tokenizer, device=setup.device)
    texts = [sentence.replace(mask, tokenizer.mask_token) for sentence in sentences]
    return repeated(lambda: pipeline(texts, top_k=5, batch_size=len(texts)), len(texts))


def _clock(device: str, step_tokens: int) -> Any:
    """Return a callback of the Trainer that times its steps and stops it."""
    import transformers

    class Clock(transformers.TrainerCallback):
        """Times steps: `times` are seconds per token."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def start(self, seconds: float) -> None:
            """Forget all steps, and stop the Trainer after these seconds, but after two steps at the earliest."""
            self.times, self._seconds, self._first, self._last = [], seconds, None, 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            """Record a step."""
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            now = time.perf_counter()
            if self._first is None:
                self._first = now
            else:
                self.times.append((now - self._last) / step_tokens)
            self._last = now
            control.should_training_stop = bool(self.times) and now - self._first >= self._seconds
            return control

    return Clock()


# Messages -------------------------------------------------------------------------------------------------------------

_WORK: Final[Mapping[str, Callable[..., Work]]] = {
    "training": training_work,
    "masking": masking_work,
    "filling": fill_work,
}


def serve() -> None:
    """Answer messages until standard input ends."""
    with contextlib.suppress(ValueError, OSError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the parent decides
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keeps output of libraries out of the messages
    requests: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    setup = PeerSetup(**requests.get())
    torch.set_num_threads(setup.threads)
    work: Work | None = None
    while True:
        request, answer = requests.get(), dict[str, Any]()
        try:
            if "work" in request:
                work = None  # frees the memory of the last work first
                work = _WORK[request["work"]](setup, **request["inputs"])
            else:
                assert work is not None, "work is prepared before it is repeated"
                answer["times"] = work(request["seconds"])
        except Exception as error:
            answer["error"] = " ".join(f"{type(error).__name__}: {error}".split())
        print(json.dumps(answer), file=output, flush=True)


def _read_requests(requests: queue.SimpleQueue[Mapping[str, Any]]) -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    os._exit(0)  # at once, also in the middle of some work: the parent has ended


if __name__ == "__main__":
    serve()
