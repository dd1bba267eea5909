"""How long until 2.99 nats? The tutorial's net (`seed`) against our best (`char`) on the same frozen characters.

Both recipes hold out the same last tenth of the corpus and are asked about the same characters, hidden in the same
way: a document's mask is drawn once for the whole document, before it is cut to each recipe's own length. Each trains
on its own full plan, one after the other, on a machine that should do nothing else. Seconds are training seconds:
data, forward, backward and optimizer. Validation, which is frequent until the target is passed so that the passing is
seen, is left out of both.

    python benchmarks/time_to_loss.py tinyshakespeare.txt --results benchmarks/results/time_to_loss.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from unmask import __version__
from unmask.core.distributed import init_distributed, load_warning
from unmask.data.sources import open_source
from unmask.training.display.plain import SilentDisplay
from unmask.training.loop import Callback, TrainState, train
from unmask.training.plan import due, make_plan
from unmask.training.recipe import load_recipe
from unmask.training.setup import Workshop

TARGET_NATS = 2.99
LOOK_EVERY_STEPS = {"seed": 100, "char": 4}  # until the target is passed


def race(name: str, text: Path, settings: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Train one recipe on its full plan; its figures, and the characters that it was asked for, sorted."""
    recipe = load_recipe(name, settings)
    world = init_distributed(recipe.train.precision, recipe.train.threads)
    workshop = Workshop(recipe, open_source([text], recipe.data), world, SilentDisplay())
    every = recipe.train.every
    plan = make_plan(
        recipe.stage, recipe.train.budget, every, [feed.epoch_tokens for feed in workshop.feeds], workshop.probe()
    )
    print(
        f"{name}: {workshop.parameters:,} parameters, {plan.steps} steps, about {plan.seconds:.0f} s planned",
        flush=True,
    )
    curve: list[dict[str, float]] = []
    passed: dict[str, float] = {}
    usual = due(every.validate, plan)

    def look(now: TrainState) -> None:
        found = workshop.validate(workshop.learner, len(plan.stages) - 1)
        point = {
            "step": now.step,
            "training_seconds": now.training_seconds,
            "loss": found.loss,
            "accuracy": found.accuracy,
        }
        curve.append(point)
        if not passed and found.loss <= TARGET_NATS:
            passed.update(point)
            print(
                f"  passes {TARGET_NATS} nats after {now.training_seconds:.2f} s of training, step {now.step}",
                flush=True,
            )
        if usual(now.step, now.tokens, 0.0):
            where = f"  {now.training_seconds:6.1f} s  step {now.step}"
            print(f"{where}  loss {found.loss:.4f}  accuracy {found.accuracy:.1%}", flush=True)

    def wanted(step: int, tokens: int, since: float) -> bool:
        return usual(step, tokens, since) or (not passed and step % LOOK_EVERY_STEPS[name] == 0)

    state = TrainState()
    train(workshop.training(plan), state, [Callback(wanted, look)], lambda: 0)
    frozen = workshop.frozen(workshop.lengths[-1])
    answers = sorted(workshop.tokenizer.id_to_token(int(answer)) for one in frozen.puzzles for answer in one.labels_M)
    return {
        "recipe": name,
        "parameters": workshop.parameters,
        "steps": plan.steps,
        "tokens": state.tokens,
        "training_seconds": state.training_seconds,
        "phase_seconds": state.phase_seconds,
        "seconds_to_target": crossing(curve),
        "final_loss": curve[-1]["loss"],
        "final_accuracy": curve[-1]["accuracy"],
        "asked": frozen.masked_tokens,
        "unigram_loss": frozen.unigram_loss,
        "world": world.describe(),
        "stages": [asdict(stage) for stage in plan.stages],
        "curve": curve,
    }, answers


def crossing(curve: list[dict[str, float]]) -> float | None:
    """Training seconds at the target: on the straight line between the last look above it and the first below.

    `seed` is looked at less often than `char`; without the line its figure would be late by up to 100 steps.
    """
    for above, below in pairwise(curve):
        if below["loss"] <= TARGET_NATS:
            share = (above["loss"] - TARGET_NATS) / (above["loss"] - below["loss"])
            return above["training_seconds"] + share * (below["training_seconds"] - above["training_seconds"])
    return None


def main() -> int:
    """Race both, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="the corpus: tinyshakespeare.txt, 1,115,394 characters")
    parser.add_argument("--results", type=Path, help="write figures and curves here as JSON")
    parser.add_argument("--only", choices=["seed", "char"], help="one recipe alone")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="change a setting of both recipes")
    given = parser.parse_args()
    names = [given.only] if given.only else ["char", "seed"]
    if warning := load_warning(init_distributed()):
        print(f"warning: {warning}", file=sys.stderr)
    began, load = time.time(), os.getloadavg()[0]
    runs = {name: race(name, given.text, given.settings) for name in names}
    if len(runs) == 2:
        asked = [answers for _, answers in runs.values()]
        assert asked[0] == asked[1], "both are asked about the same characters"
    figures = {name: figure for name, (figure, _) in runs.items()}
    to_target = f"to {TARGET_NATS} nats"
    print(f"\n{'':6} {'parameters':>11} {to_target:>13} {'trained':>9} {'final loss':>11} {'accuracy':>9}")
    for name, figure in figures.items():
        reached = figure["seconds_to_target"]
        shown = f"{reached:.2f} s" if reached is not None else "not reached"
        print(f"{name:6} {figure['parameters']:>11,} {shown:>13} {figure['training_seconds']:>7.0f} s "
              f"{figure['final_loss']:>11.4f} {figure['final_accuracy']:>9.1%}")  # fmt: skip
    ratio = None
    if len(figures) == 2 and all(figure["seconds_to_target"] for figure in figures.values()):
        ratio = figures["seed"]["seconds_to_target"] / figures["char"]["seconds_to_target"]
        print(f"\nchar is {ratio:.1f} times sooner")
    if given.results:
        given.results.parent.mkdir(parents=True, exist_ok=True)
        whole = {
            "date": date.today().isoformat(),
            "command": " ".join(["python", *sys.argv[:1], given.text.name, *(f"--set {s}" for s in given.settings)]),
            "unmask": __version__,
            "torch": torch.__version__,
            "load_before": load,
            "wall_seconds": round(time.time() - began, 1),
            "target_nats": TARGET_NATS,
            "times_sooner": ratio,
            "runs": figures,
        }
        given.results.write_text(json.dumps(whole, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
