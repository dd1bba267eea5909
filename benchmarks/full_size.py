"""Trains each shipped recipe at full size for two optimizer steps, and measures time and memory.

Every recipe is built in a process of its own with its vocabulary size. The steps include masking, forward and backward
pass, gradient clipping and the recipe's optimizer and learning-rate schedule. A step is small (2,048 tokens in
sequences of the last stage's length), so that the largest model finishes within minutes on two cores. Training with the
recipe's own batches uses micro-batches of up to `train.micro_batch_size` and needs more memory for activations. The ids
are synthetic, with frequencies proportional to 1/rank: this tests that a model trains, not that it learns.

    python benchmarks/full_size.py                      every bert-* and modern-* recipe
    python benchmarks/full_size.py bert-base --threads 1
    python benchmarks/full_size.py --results benchmarks/results/full_size.json
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unmask.core import rng
from unmask.core.config import shipped_recipes
from unmask.core.distributed import init_distributed, load_warning
from unmask.core.hardware import processor_name
from unmask.core.types import SPECIAL, WORD_START, Batch, Sample, pack
from unmask.core.version import __version__
from unmask.models import build_model, flops_per_token
from unmask.objectives.mlm import MaskedLMConfig, MaskedLMObjective
from unmask.training.loop import LogCallback, MetricAccumulator, TrainLoopInputs, TrainModule, TrainState, train
from unmask.training.optim import Optimizer, lr_factor_at
from unmask.training.plan import Plan, StagePlan, always
from unmask.training.recipe import load_recipe

CLS, SEP, MASK, SPECIALS = 2, 3, 4, 5
STEPS = 2


class SyntheticLoader:
    """A data loader with sequences of one length, drawn with the cursor as seed."""

    def __init__(self, vocab_size: int, length: int) -> None:
        self._length = length
        frequencies = 1 / np.arange(1, vocab_size - SPECIALS + 1)
        self._edges = np.cumsum(frequencies / frequencies.sum())
        self._last_id = vocab_size - 1

    def first_cursor(self, stage: int) -> int:
        """Return the first cursor of a stage."""
        return 0

    def step(self, cursor: int, tokens: int, rank: int, ranks: int) -> tuple[list[Batch], int]:
        """Return one micro-batch with this number of tokens, and the next cursor."""
        draw = np.random.default_rng(cursor)
        samples: list[Sample] = []
        for number in range(cursor, cursor + max(1, tokens // self._length)):
            ids = np.minimum(SPECIALS + self._edges.searchsorted(draw.random(self._length)), self._last_id)
            ids[[0, -1]] = CLS, SEP
            token_flags = np.full(self._length, WORD_START, np.uint8)
            token_flags[[0, -1]] = SPECIAL
            samples.append(Sample(ids, token_flags, number=number))
        return [pack(samples)], cursor + len(samples)


def peak_bytes() -> int | None:
    """Return the peak memory of this process; None if the system doesn't report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def two_steps(name: str, tokens: int, settings: list[str]) -> dict[str, Any]:
    """Build a recipe at full size and train two steps."""
    recipe = load_recipe(name, settings)
    assert isinstance(recipe.objective, MaskedLMConfig), "only masked language modeling is supported here"
    vocab_size, length = int(recipe.data.tokenizer.vocab_size), recipe.stage[-1].max_seq_len  # type: ignore[union-attr]
    context = init_distributed(recipe.train.precision, recipe.train.threads)
    before = peak_bytes()
    start = time.perf_counter()
    torch.manual_seed(rng.integer(recipe.seed, "weights"))
    encoder, head = build_model(recipe.model, vocab_size)
    objective = MaskedLMObjective(recipe.objective, MASK, np.arange(SPECIALS, vocab_size))
    module = TrainModule(encoder.to(context.device), head.to(context.device), objective.modules)
    optimizer = Optimizer(module, recipe.optimizer, bf16=context.precision == "bfloat16")
    plan = Plan((StagePlan(length, tokens, 0, STEPS, 0.0),))
    built = time.perf_counter() - start
    losses: list[float] = []
    seconds: list[float] = []

    def log(now: TrainState, metrics: MetricAccumulator) -> None:
        losses.append(metrics.mean("loss"))
        seconds.append(now.training_seconds - sum(seconds))

    def factor(progress: float, step: int) -> float:
        return lr_factor_at(recipe.lr_schedule, progress, step, recipe.model.hidden_size)

    loaders = [SyntheticLoader(vocab_size, length)]
    training = TrainLoopInputs(module, [objective], loaders, optimizer, factor, context, recipe.seed)
    state = TrainState()
    train(training, plan, state, log=LogCallback(always, log))
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    flops = flops_per_token(recipe.model, vocab_size, length, recipe.objective.mask_rate)
    return {
        "recipe": name,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "vocabulary": vocab_size,
        "length": length,
        "tokens_per_step": state.tokens // STEPS,
        "flops_per_token": flops,
        "build_seconds": round(built, 2),
        "step_seconds": [round(step, 2) for step in seconds],
        "losses": [round(loss, 4) for loss in losses],
        "start_bytes": before,  # Python, torch and this package
        "peak_bytes": peak_bytes(),
        "device": context.device.type,
        "precision": context.precision,
        "threads": context.threads,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| recipe | parameters | vocabulary | length | FLOPs per token | seconds per step | losses | peak memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        peak = f"{result['peak_bytes'] / 1e9:.2f} GB" if result["peak_bytes"] else "not measured"
        steps = ", ".join(f"{seconds:.1f}" for seconds in result["step_seconds"])
        losses = ", ".join(f"{loss:.2f}" for loss in result["losses"])
        lines.append(
            f"| `{result['recipe']}` | {result['parameters'] / 1e6:.1f}M | {result['vocabulary']:,} | "
            f"{result['length']} | {result['flops_per_token'] / 1e6:,.0f}M | {steps} | {losses} | {peak} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run each recipe in a process of its own, print a table and write a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="default: all bert-* and modern-*")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--threads", default="auto")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--in-process", action="store_true", help="run one recipe in this process and print JSON")
    options = parser.parse_args()
    settings = [f"train.threads={options.threads}"]
    if options.in_process:
        print(json.dumps(two_steps(options.recipes[0], options.tokens, settings)))
        return 0
    names = options.recipes or [name for name in shipped_recipes() if name.startswith(("bert-", "modern-"))]
    if warning := load_warning(init_distributed()):
        print(warning, file=sys.stderr)
    results: list[dict[str, Any]] = []
    for name in names:
        command = [
            sys.executable,
            __file__,
            name,
            "--in-process",
            "--tokens",
            str(options.tokens),
            "--threads",
            options.threads,
        ]
        results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
        print(table(results[-1:]).rpartition("\n")[2], flush=True)
    results.sort(key=lambda result: (result["recipe"].partition("-")[0], result["parameters"]))
    print(f"\n{table(results)}")
    if options.results:
        report = {
            "date": date.today().isoformat(),
            "command": "python benchmarks/full_size.py " + " ".join(sys.argv[1:]),
            "ids": "synthetic",
            "processor": processor_name(),
            "torch": torch.__version__,
            "unmask": __version__,
            "recipes": results,
        }
        options.results.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
