"""Training time to a validation loss of 2.99 nats: recipe `seed` (the tutorial model) against recipe `char`.

Both recipes hold out the last tenth of the corpus and are evaluated on the same masked characters: the mask of a
document is drawn before it is cut into sequences. Each recipe trains on its full plan, one after the other, on a
machine without other load. Times are training seconds: data, forward, backward and optimizer, without validation.
Until the target is reached, validations are frequent.

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

from unmask.core.distributed import init_distributed, load_warning
from unmask.core.version import __version__
from unmask.data.sources import open_source
from unmask.training.estimate.probe import measure
from unmask.training.loop import Callback, TrainState, train
from unmask.training.plan import due, make_plan
from unmask.training.recipe import load_recipe
from unmask.training.setup import build_components, prepare_corpus, validate

TARGET_NATS = 2.99
VALIDATE_EVERY_STEPS = {"seed": 100, "char": 4}  # until the target is reached


def train_recipe(name: str, text: Path, settings: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Trains one recipe on its full plan; returns its results and the masked characters, sorted."""
    recipe = load_recipe(name, settings)
    context = init_distributed(recipe.train.precision, recipe.train.threads)
    source, every = open_source([text], recipe.data), recipe.train.every
    corpus = prepare_corpus(recipe, source, lambda stage, fraction: None)
    components = build_components(recipe, source, corpus, context, valid_sources={})
    epoch_tokens = [loader.epoch_tokens for loader in components.loaders]
    plan = make_plan(recipe.stage, recipe.train.budget, every, epoch_tokens, measure(recipe, components))
    print(
        f"{name}: {components.num_parameters:,} parameters, {plan.steps} steps, about {plan.seconds:.0f} s planned",
        flush=True,
    )
    curve: list[dict[str, float]] = []
    usual = due(every.validate, plan)

    def is_reached() -> bool:
        return bool(curve) and min(point["loss"] for point in curve) <= TARGET_NATS

    def record(state: TrainState) -> None:
        was_reached = is_reached()
        result = validate(components, components.training.module, len(plan.stages) - 1)
        curve.append({
            "step": state.step,
            "training_seconds": state.training_seconds,
            "loss": result.loss,
            "accuracy": result.accuracy,
        })  # fmt: skip
        where = f"  {state.training_seconds:6.1f} s  step {state.step}"
        if is_reached() and not was_reached:
            print(f"{where}  reaches {TARGET_NATS} nats", flush=True)
        if usual(state.step, 0.0):
            print(f"{where}  loss {result.loss:.4f}  accuracy {result.accuracy:.1%}", flush=True)

    def is_due(step: int, since: float) -> bool:
        return usual(step, since) or (not is_reached() and step % VALIDATE_EVERY_STEPS[name] == 0)

    state = TrainState()
    train(components.training, plan, state, [Callback(is_due, record)])
    eval_set = components.validator.eval_set(recipe.stage[-1].max_seq_len)
    labels = sorted(corpus.tokenizer.id_to_token(int(label)) for batch in eval_set.batches for label in batch.labels_M)
    return {
        "recipe": name,
        "parameters": components.num_parameters,
        "steps": plan.steps,
        "tokens": state.tokens,
        "training_seconds": state.training_seconds,
        "phase_seconds": state.phase_seconds,
        "seconds_to_target": seconds_to_target(curve),
        "final_loss": curve[-1]["loss"],
        "final_accuracy": curve[-1]["accuracy"],
        "masked_tokens": eval_set.masked_tokens,
        "unigram_loss": eval_set.unigram_loss,
        "device": context.describe(),
        "stages": [asdict(stage) for stage in plan.stages],
        "curve": curve,
    }, labels


def seconds_to_target(curve: list[dict[str, float]]) -> float | None:
    """Returns the training seconds at the target, interpolated between the validations before and after it.

    `seed` is validated less often than `char`; without interpolation its time would be up to 100 steps late.
    """
    for above, below in pairwise(curve):
        if below["loss"] <= TARGET_NATS:
            share = (above["loss"] - TARGET_NATS) / (above["loss"] - below["loss"])
            return above["training_seconds"] + share * (below["training_seconds"] - above["training_seconds"])
    return None


def main() -> int:
    """Trains both recipes, prints a table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="corpus: tinyshakespeare.txt, 1,115,394 characters")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    parser.add_argument("--only", choices=["seed", "char"], help="train one recipe only")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], help="setting of both recipes, KEY=VALUE"
    )
    given = parser.parse_args()
    names = [given.only] if given.only else ["char", "seed"]
    if warning := load_warning(init_distributed()):
        print(f"warning: {warning}", file=sys.stderr)
    began, load = time.time(), os.getloadavg()[0]
    runs = {name: train_recipe(name, given.text, given.settings) for name in names}
    if len(runs) == 2:
        first, second = (labels for _, labels in runs.values())
        assert first == second, "both recipes are evaluated on the same characters"
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
        print(f"\nchar is {ratio:.1f} times faster")
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
            "speedup": ratio,
            "runs": figures,
        }
        given.results.write_text(json.dumps(whole, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
