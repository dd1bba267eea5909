"""Does each shipped shape train at its full size? Two real optimizer steps of each, and what they need of memory.

Every recipe is built in a process of its own, with the vocabulary that it names, and goes twice through the training
loop: masks, forward, backward, clipping, the recipe's own optimizer, at the rates that its schedule gives. A step is
small (2,048 tokens in texts of the last stage's length) so that the largest shape ends within minutes on two cores;
the recipe's own batches are dealt in micro-batches of up to `train.micro_batch_size` and need more memory for activations.
The ids are synthetic, drawn with frequencies that fall as 1 ÷ rank: this asks whether it runs, not whether it learns.

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

from unmask import __version__
from unmask.core import rng
from unmask.core.config import shipped_recipes
from unmask.core.distributed import init_distributed, load_warning
from unmask.core.hardware import processor_name
from unmask.core.types import SPECIAL, WORD_START, Batch, Sample, pack
from unmask.models import build_model, flops_per_token
from unmask.objectives.mlm import MaskedLMConfig, MaskedLMObjective
from unmask.training.loop import Callback, MetricAccumulator, TrainLoopInputs, TrainModule, TrainState, train
from unmask.training.optim import build_optimizer, rate_factor
from unmask.training.plan import Plan, StagePlan, always
from unmask.training.recipe import load_recipe

CLS, SEP, MASK, SPECIALS = 2, 3, 4, 5
STEPS = 2


class Synthetic:
    """A feed of texts of one length, their ids drawn by a seed and the step's cursor."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self._length = length
        chances = 1 / np.arange(1, vocabulary - SPECIALS + 1)
        self._edges = np.cumsum(chances / chances.sum())
        self._most = vocabulary - 1

    def first_cursor(self, stage: int) -> int:
        """Where a stage's order begins."""
        return 0

    def step(self, cursor: int, tokens: int, rank: int, ranks: int) -> tuple[list[Batch], int]:
        """One micro-batch of as many texts as these tokens fill."""
        draw = np.random.default_rng(cursor)
        texts: list[Sample] = []
        for number in range(cursor, cursor + max(1, tokens // self._length)):
            ids = np.minimum(SPECIALS + self._edges.searchsorted(draw.random(self._length)), self._most)
            ids[[0, -1]] = CLS, SEP
            marks = np.full(self._length, WORD_START, np.uint8)
            marks[[0, -1]] = SPECIAL
            texts.append(Sample(ids, marks, number=number))
        return [pack(texts)], cursor + len(texts)


def peak_bytes() -> int | None:
    """The most memory that this process ever held; None where the system doesn't count it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def two_steps(name: str, tokens: int, settings: list[str]) -> dict[str, Any]:
    """Build a recipe at full size and take two steps."""
    recipe = load_recipe(name, settings)
    assert isinstance(recipe.objective, MaskedLMConfig), "only masks are asked here"
    vocabulary, length = int(recipe.data.tokenizer.vocab_size), recipe.stage[-1].max_seq_len  # type: ignore[union-attr]
    world = init_distributed(recipe.train.precision, recipe.train.threads)
    before = peak_bytes()
    began = time.perf_counter()
    torch.manual_seed(rng.integer(recipe.seed, "weights"))
    encoder, head = build_model(recipe.model, vocabulary)
    objective = MaskedLMObjective(recipe.objective, MASK, np.arange(SPECIALS, vocabulary))
    learner = TrainModule(encoder.to(world.device), head.to(world.device), objective)
    optimizer = build_optimizer(learner, recipe.optimizer, bf16=world.precision == "bfloat16")
    plan = Plan((StagePlan(length, tokens, 0, STEPS, 0.0),))
    built = time.perf_counter() - began
    losses: list[float] = []
    seconds: list[float] = []

    def look(now: TrainState) -> None:
        losses.append(now.window.mean("loss"))
        seconds.append(now.training_seconds - sum(seconds))
        now.window = MetricAccumulator()

    def factor(progress: float, step: int) -> float:
        return rate_factor(recipe.lr_schedule, progress, step, recipe.model.hidden_size)

    feeds = [Synthetic(vocabulary, length)]
    training = TrainLoopInputs(learner, objective, feeds, optimizer, factor, plan, world, recipe.seed)
    state = TrainState()
    train(training, state, [Callback(always, look)], lambda: 0)
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    flops = flops_per_token(recipe.model, vocabulary, length, recipe.objective.mask_rate)
    return {
        "recipe": name,
        "parameters": sum(parameter.numel() for parameter in learner.parameters()),
        "vocabulary": vocabulary,
        "length": length,
        "tokens_per_step": state.tokens // STEPS,
        "flops_per_token": flops,
        "build_seconds": round(built, 2),
        "step_seconds": [round(one, 2) for one in seconds],
        "losses": [round(loss, 4) for loss in losses],
        "start_bytes": before,  # Python, torch and this package
        "peak_bytes": peak_bytes(),
        "device": world.device.type,
        "precision": world.precision,
        "threads": world.threads,
    }


def table(found: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| recipe | parameters | vocabulary | length | FLOPs per token | seconds per step | losses | peak memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in found:
        peak = f"{one['peak_bytes'] / 1e9:.2f} GB" if one["peak_bytes"] else "not counted here"
        steps = ", ".join(f"{seconds:.1f}" for seconds in one["step_seconds"])
        losses = ", ".join(f"{loss:.2f}" for loss in one["losses"])
        lines.append(
            f"| `{one['recipe']}` | {one['parameters'] / 1e6:.1f}M | {one['vocabulary']:,} | {one['length']} | "
            f"{one['flops_per_token'] / 1e6:,.0f}M | {steps} | {losses} | {peak} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Each recipe in a process of its own, a table, a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="default: all bert-* and modern-*")
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--threads", default="auto")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--here", action="store_true", help="one recipe in this process, its figures as JSON")
    given = parser.parse_args()
    settings = [f"train.threads={given.threads}"]
    if given.here:
        print(json.dumps(two_steps(given.recipes[0], given.tokens, settings)))
        return 0
    names = given.recipes or [name for name in shipped_recipes() if name.startswith(("bert-", "modern-"))]
    if warning := load_warning(init_distributed()):
        print(warning, file=sys.stderr)
    found: list[dict[str, Any]] = []
    for name in names:
        command = [sys.executable, __file__, name, "--here", "--tokens", str(given.tokens), "--threads", given.threads]
        found.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
        print(table(found[-1:]).rpartition("\n")[2], flush=True)
    found.sort(key=lambda one: (one["recipe"].partition("-")[0], one["parameters"]))
    print(f"\n{table(found)}")
    if given.results:
        whole = {
            "date": date.today().isoformat(),
            "command": "python benchmarks/full_size.py " + " ".join(sys.argv[1:]),
            "ids": "synthetic",
            "processor": processor_name(),
            "torch": torch.__version__,
            "unmask": __version__,
            "recipes": found,
        }
        given.results.write_text(json.dumps(whole, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
