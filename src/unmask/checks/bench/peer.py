"""The same work by `transformers`, if it is installed: Trainer, data collator, fill-mask pipeline."""

from __future__ import annotations

import importlib
import random
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from unmask.checks.bench.timing import Work, repeated
from unmask.checks.bench.work import BenchedRecipe
from unmask.core import files
from unmask.core.distributed import DistributedContext
from unmask.core.files import RunLayout
from unmask.core.types import Batch
from unmask.hub.parity import quiet_transformers
from unmask.models.fill_mask import MASK
from unmask.models.hf_format import to_hf_config
from unmask.models.model import save_model

NOT_INSTALLED: Final = "not installed"
_MANY_STEPS: Final = 10**9  # a callback stops the Trainer
_LR: Final = 1e-5  # low, so that the weights stay finite however long the Trainer is timed
_BATCHES: Final = 64  # of different text for the Trainer

Rows = Sequence[Sequence[int]]


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
    with quiet():
        known = any(hasattr(transformers, name) for name in hf_config.get("architectures", ()))
    return "" if known else "no such class"


@contextmanager
def quiet() -> Generator[None]:
    """Turn off the output and warnings of transformers, and restore the global random numbers after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # transformers doesn't need them, and they take time
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _quietly(work: Work) -> Work:
    def run(seconds: float) -> list[float]:
        with quiet():
            return work(seconds)

    return run


class Peer:
    """A model of `transformers` with the weights and the tokenizer of a recipe's model."""

    def __init__(self, benched: BenchedRecipe, folder: Path) -> None:
        """Writes the model to a folder and opens its tokenizer with `transformers`."""
        import transformers

        save_model(folder, benched.model())
        self._folder = folder
        self._context: DistributedContext = benched.context
        self._mask_rate = benched.recipe.objective.masked_fraction
        self._architecture = str(files.read_json(folder / RunLayout.CONFIG)["architectures"][0])
        with quiet():
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def _model(self) -> Any:
        import transformers

        with quiet():
            model = getattr(transformers, self._architecture).from_pretrained(
                self._folder, local_files_only=True, dtype=torch.float32
            )
        return model.to(self._context.device)

    def _collator(self) -> Any:
        import transformers

        return transformers.DataCollatorForLanguageModeling(self._tokenizer, mlm_probability=self._mask_rate)

    def training_work(self, blocks: Rows, batch_rows: int) -> Work:
        """Return steps of the Trainer with AdamW; the unit is a token. The first step of a call is not timed.

        Args:
            blocks: token ids of the training rows, all of the same length.
            batch_rows: rows of a step.
        """
        import transformers

        context = self._context
        with quiet():
            arguments = transformers.TrainingArguments(
                output_dir=str(self._folder / "trainer"),
                max_steps=_MANY_STEPS,
                per_device_train_batch_size=batch_rows,
                learning_rate=_LR,
                use_cpu=context.device.type == "cpu",
                bf16=context.precision == "bfloat16",
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_drop_last=True,
                dataloader_pin_memory=context.device.type == "cuda",
            )
            trainer = transformers.Trainer(
                model=self._model(),
                args=arguments,
                train_dataset=[{"input_ids": list(block)} for block in blocks],  # pyright: ignore[reportArgumentType]
                data_collator=self._collator(),
            )
            trainer.remove_callback(transformers.PrinterCallback)
            clock = _clock(context.device, arguments.train_batch_size * len(blocks[0]))
            trainer.add_callback(clock)

        def run(seconds: float) -> list[float]:
            clock.start(seconds)
            trainer.train()
            return clock.times

        return _quietly(run)

    def masking_work(self, batches: Sequence[Batch]) -> Work:
        """Return padding and masking by the data collator, of the rows of these batches; the unit is a row."""
        features = [[{"input_ids": ids} for ids in rows_of(batch)] for batch in batches]
        collator, following = self._collator(), cycle(features)

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

        return _quietly(run)

    def fill_work(self, sentences: Sequence[str]) -> Work:
        """Return predictions by the fill-mask pipeline, all sentences in one batch; the unit is a sentence."""
        import transformers

        with quiet():
            pipeline = transformers.pipeline(
                "fill-mask", model=self._model().eval(), tokenizer=self._tokenizer, device=self._context.device
            )
        texts = [sentence.replace(MASK, self._tokenizer.mask_token) for sentence in sentences]
        return _quietly(repeated(lambda: pipeline(texts, top_k=5, batch_size=len(texts)), len(texts)))


def _clock(device: torch.device, step_tokens: int) -> Any:
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
            if device.type == "cuda":
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
