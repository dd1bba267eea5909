"""Does training on short sequences first, or a falling mask rate, lower the loss at equal training time?

Compares variants of a base recipe at a mask rate of 30 %: one stage at the full length (that of the last stage of the
recipe), two stages (70 % of the tokens at a quarter of the length), and three (60 % at an eighth, 30 % at a quarter,
10 % at the full length). Mask rates are compared with three stages: 30 %, 15 %, and 30 % to 5 %. A recipe has no mask
rate per stage, so the last of them falls linearly over the planned tokens (objective.final_mask_rate); its mean is
17.5 %. All stages have the batch size of the recipe's last stage, so only the length differs.

Each run has the same training seconds: data, forward, backward and optimizer, without validation. They are converted to
steps before the first run, from steps of all stages that are timed in turns. The loss is that of the held-out text at
the full length, after the last step.

    python benchmarks/curriculum.py tinyshakespeare.txt --recipe char --seconds 120 \
        --results benchmarks/results/curriculum_char.json
    python benchmarks/curriculum.py enwiki/train.txt.gz --recipe tiny --seconds 600 \
        --results benchmarks/results/curriculum_tiny.json
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from unmask.core.distributed import DistributedContext, init_distributed, load_warning
from unmask.core.errors import RecipeError, UnmaskError
from unmask.core.quantities import Fraction, Quantity
from unmask.core.version import __version__
from unmask.data.prepare import TokenizedCorpus
from unmask.data.sources import BaseSource, open_text
from unmask.evaluation.masked_lm import evaluate
from unmask.objectives.masking import MaskingConfig
from unmask.training.loop import Callback, TrainState, train
from unmask.training.plan import EveryConfig, Measured, Plan, StageConfig, StagePlan, due, make_plan
from unmask.training.recipe import Recipe, load_recipe
from unmask.training.setup import RunComponents, build_components, prepare_corpus

WARM_UP_STEPS, TIMED_STEPS, ROUNDS = 5, 5, 7  # of the calibration, for each length and mask rate
VALIDATIONS = 10  # points of a curve
PLOT_COLUMNS, PLOT_LINES = 64, 16
PLOT_FROM = 0.2  # of the training time; before it, losses are too high for the plot
MAX_DEVIATION = 0.05  # of the training seconds from those that were asked for, without a warning

ONE = ((1.0, 1),)
TWO = ((0.7, 4), (1.0, 1))
THREE = ((0.6, 8), (0.9, 4), (1.0, 1))


@dataclass(frozen=True)
class Variant:
    """A curriculum: for each stage its end as a fraction of the tokens, and the divisor of the full length."""

    stages: tuple[tuple[float, int], ...]
    mask_rate: float = 0.30
    final_mask_rate: float | None = None  # None: constant

    def apply_to(self, base: Recipe, seed: int) -> Recipe:
        """Return the base recipe with this curriculum.

        Raises:
            RecipeError: the objective of the recipe has no mask rate.
        """
        if not isinstance(base.objective, MaskingConfig):
            raise RecipeError(
                "the objective has no mask rate", location="objective", hint="use kind = mlm or mlm+pairs"
            )
        last = base.stage[-1]
        size = Quantity(last.batch_tokens, "tokens")
        stages = tuple(
            StageConfig(Fraction(until), last.max_seq_len // divisor, size) for until, divisor in self.stages
        )
        final = "constant" if self.final_mask_rate is None else self.final_mask_rate
        objective = replace(base.objective, mask_rate=self.mask_rate, final_mask_rate=final)
        return replace(base, seed=seed, stage=stages, objective=objective)


VARIANTS = {
    "one-stage": Variant(ONE),
    "two-stages": Variant(TWO),
    "three-stages": Variant(THREE),
    "mask-15": Variant(THREE, 0.15),
    "mask-30-to-5": Variant(THREE, 0.30, 0.05),
}


@dataclass(frozen=True)
class Study:
    """What all runs share."""

    base: Recipe
    source: BaseSource
    corpus: TokenizedCorpus
    context: DistributedContext

    def components(self, recipe: Recipe) -> RunComponents:
        """Return new components of a run: random weights of the recipe's seed."""
        return build_components(recipe, self.source, self.corpus, self.context, valid_sources={})


# Calibration ----------------------------------------------------------------------------------------------------------


def single_stages(recipe: Recipe) -> list[Recipe]:
    """Return one recipe for each stage, with the mean mask rate of that stage."""
    assert isinstance(recipe.objective, MaskingConfig)
    recipes: list[Recipe] = []
    for begin, stage in zip([0.0, *(stage.until.fraction for stage in recipe.stage)], recipe.stage, strict=False):
        rate = recipe.objective.rate_at((begin + stage.until.fraction) / 2)
        objective = replace(recipe.objective, mask_rate=round(rate, 6), final_mask_rate="constant")
        recipes.append(replace(recipe, stage=(replace(stage, until=Fraction(1.0)),), objective=objective))
    return recipes


def zero(progress: float, step: int) -> float:
    """Return the factor on the learning rate while steps are timed: without a warm-up, weights could diverge."""
    return 0.0


def step_seconds(study: Study, recipes: Sequence[Recipe]) -> list[float]:
    """Return the training seconds of a step of each recipe, which has one stage: the median of several rounds.

    The recipes are timed in turns, so that a busy moment of the machine affects all of them.
    """
    timers = [study.components(recipe).training for recipe in recipes]
    timers = [replace(timer, lr_factor=zero) for timer in timers]
    means: list[list[float]] = [[] for _ in recipes]
    cursors = [0] * len(recipes)
    for number in range(ROUNDS + 1):
        steps = TIMED_STEPS if number else WARM_UP_STEPS
        for index, (timer, recipe) in enumerate(zip(timers, recipes, strict=True)):
            stage = recipe.stage[0]
            # The plan has one step that is never run: the first one would start at the first sample again.
            plan = Plan((StagePlan(stage.max_seq_len, stage.batch_tokens, 0, steps + 1, 0.0),))
            state = TrainState(step=1, cursor=cursors[index])
            train(timer, plan, state)
            cursors[index] = state.cursor
            if number:
                means[index].append(state.training_seconds / steps)
    return [statistics.median(each) for each in means]


def make_plans(study: Study, variants: Mapping[str, Variant], seconds: float) -> dict[str, Plan]:
    """Return a plan of `seconds` training seconds for each variant."""
    recipes = {name: variant.apply_to(study.base, study.base.seed) for name, variant in variants.items()}
    timed = {repr(part): part for recipe in recipes.values() for part in single_stages(recipe)}
    measured = dict(zip(timed, step_seconds(study, list(timed.values())), strict=True))
    plans: dict[str, Plan] = {}
    for name, recipe in recipes.items():
        times = Measured(tuple(measured[repr(part)] for part in single_stages(recipe)))
        epoch_tokens = [loader.epoch_tokens for loader in study.components(recipe).loaders]
        plans[name] = make_plan(recipe.stage, Quantity(seconds, "seconds"), EveryConfig(), epoch_tokens, times)
    return plans


# Runs -----------------------------------------------------------------------------------------------------------------


def train_once(study: Study, recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """Train one run and return its figures and its curve, whose seconds are the planned ones.

    They were measured in turns, so they stay comparable if the machine is busy during one of the runs.
    """
    components = study.components(recipe)
    eval_set = components.validator.eval_set(recipe.stage[-1].max_seq_len)
    module, curve = components.training.eval_module, list[dict[str, float]]()

    def record(state: TrainState) -> None:
        result = evaluate(module.encoder, module.head, eval_set, study.context)
        curve.append({
            "step": state.step,
            "training_seconds": round(plan.training_seconds(state.step), 3),
            "loss": result.loss,
            "accuracy": result.accuracy,
            "bits_per_character": result.bits_per_character,
        })  # fmt: skip

    state = TrainState()
    train(components.training, plan, state, [Callback(due(Fraction(1 / VALIDATIONS), plan), record)])
    return {
        "seed": recipe.seed,
        "steps": plan.steps,
        "tokens": state.tokens,
        "training_seconds": state.training_seconds,
        "loss": curve[-1]["loss"],
        "accuracy": curve[-1]["accuracy"],
        "bits_per_character": curve[-1]["bits_per_character"],
        "unigram_loss": eval_set.unigram_loss,
        "masked_tokens": eval_set.masked_tokens,
        "curve": curve,
    }


def train_all(
    study: Study, variants: Mapping[str, Variant], plans: Mapping[str, Plan], seeds: Sequence[int], seconds: float
) -> dict[str, list[dict[str, Any]]]:
    """Train all variants with all seeds and print a line for each run. Each seed starts with another variant."""
    names, runs = list(variants), {name: list[dict[str, Any]]() for name in variants}
    for number, seed in enumerate(seeds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            run = train_once(study, variants[name].apply_to(study.base, seed), plans[name])
            runs[name].append(run)
            took = f"{run['steps']:,} steps  {run['training_seconds']:.1f} s"
            print(f"{name:14} seed {seed}  {took}  loss {run['loss']:.4f}", flush=True)
            if abs(run["training_seconds"] - seconds) > MAX_DEVIATION * seconds:
                print(f"warning: {run['training_seconds']:.1f} s of training instead of {seconds:g} s", file=sys.stderr)
    return runs


# Results --------------------------------------------------------------------------------------------------------------


def summarize(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Return mean figures of each variant, and the loss minus that of the first variant, seed by seed."""
    reference = [run["loss"] for run in next(iter(runs.values()))]
    summary: dict[str, dict[str, float]] = {}
    for name, group in runs.items():
        losses = [run["loss"] for run in group]
        differences = [loss - other for loss, other in zip(losses, reference, strict=True)]
        summary[name] = {
            "loss": statistics.fmean(losses),
            "lowest": min(losses),
            "highest": max(losses),
            "difference": statistics.fmean(differences),
            "difference_lowest": min(differences),
            "difference_highest": max(differences),
            "bits_per_character": statistics.fmean(run["bits_per_character"] for run in group),
            "accuracy": statistics.fmean(run["accuracy"] for run in group),
            "tokens": statistics.fmean(run["tokens"] for run in group),
            "training_seconds": statistics.fmean(run["training_seconds"] for run in group),
        }
    return summary


def print_table(summary: Mapping[str, Mapping[str, float]]) -> None:
    """Print one line per variant as a Markdown table; the lowest loss is bold."""
    best = min(figures["loss"] for figures in summary.values())
    header = ("variant", "loss", "from – to", f"against {next(iter(summary))}", "bits/character", "accuracy", "tokens",
              "seconds")  # fmt: skip
    lines = [header, ("---", *["---:"] * (len(header) - 1))]
    for name, row in summary.items():
        loss = f"{row['loss']:.4f}"
        lines.append((
            name,
            f"**{loss}**" if row["loss"] == best else loss,
            f"{row['lowest']:.4f} – {row['highest']:.4f}",
            f"{row['difference']:+.4f} ({row['difference_lowest']:+.4f} to {row['difference_highest']:+.4f})",
            f"{row['bits_per_character']:.4f}",
            f"{row['accuracy']:.2%}",
            f"{row['tokens'] / 1e6:.2f}M",
            f"{row['training_seconds']:.1f}",
        ))  # fmt: skip
    print("", *(f"| {' | '.join(line)} |" for line in lines), sep="\n")


def mean_curve(runs: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return (training seconds, loss) at each validation, averaged over the runs."""
    points = zip(*(run["curve"] for run in runs), strict=True)
    return [
        (statistics.fmean(p["training_seconds"] for p in each), statistics.fmean(p["loss"] for p in each))
        for each in points
    ]


def plot(curves: Mapping[str, Sequence[tuple[float, float]]]) -> list[str]:
    """Return a plot of curves as lines of text; each curve has a letter, and # marks points of several curves."""
    end = max(x for curve in curves.values() for x, _ in curve)
    kept = {name: [point for point in curve if point[0] >= PLOT_FROM * end] for name, curve in curves.items()}
    losses = [y for curve in kept.values() for _, y in curve]
    low, span = min(losses), (max(losses) - min(losses)) or 1.0
    cells = [[" "] * PLOT_COLUMNS for _ in range(PLOT_LINES)]
    letters = dict(zip(kept, "abcdefghijklmnopqrstuvwxyz", strict=False))
    for name, curve in kept.items():
        for (x, y), (next_x, next_y) in pairwise([*curve, curve[-1]]):
            first, last = round(x / end * (PLOT_COLUMNS - 1)), round(next_x / end * (PLOT_COLUMNS - 1))
            for column in range(first, max(last, first + 1)):
                share = (column - first) / max(last - first, 1)
                line = round((1 - (y + share * (next_y - y) - low) / span) * (PLOT_LINES - 1))
                cells[line][column] = letters[name] if cells[line][column] in (" ", letters[name]) else "#"
    lines = [
        f"{low + span * (1 - number / (PLOT_LINES - 1)):8.3f} |{''.join(row).rstrip()}"
        for number, row in enumerate(cells)
    ]
    return [
        *lines,
        " " * 9 + "+" + "-" * PLOT_COLUMNS,
        " " * 10 + "0" + f"{end:.1f} training seconds".rjust(PLOT_COLUMNS - 1),
        "loss at the full length: " + ", ".join(f"{letter} {name}" for name, letter in letters.items()),
    ]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text to train on")
    parser.add_argument("--recipe", default="tiny", help="base recipe: a name or a file")
    parser.add_argument("--seconds", type=float, default=120.0, help="training seconds of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds")
    parser.add_argument("--only", choices=VARIANTS, action="append", help="variant to train; may be repeated")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="setting of all runs, KEY=VALUE")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    return parser.parse_args(arguments)


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Train all variants, print table and plot, and return the results."""
    base = load_recipe(given.recipe, given.settings)
    variants = {name: variant for name, variant in VARIANTS.items() if not given.only or name in given.only}
    context = init_distributed(base.train.precision, base.train.threads, base.train.device)
    if warning := load_warning(context):
        print(f"warning: {warning}", file=sys.stderr)
    load = os.getloadavg()[0]
    source = open_text([given.text], base.data)
    corpus = prepare_corpus(base, source, lambda stage, fraction: None)
    study = Study(base, source, corpus, context)
    plans = make_plans(study, variants, given.seconds)
    for name, plan in plans.items():
        stages = ", ".join(
            f"{stage.steps:,} × {stage.max_seq_len} tokens at {stage.seconds_per_step * 1000:.1f} ms"
            for stage in plan.stages
        )
        print(f"{name:14} steps: {stages}", flush=True)
    runs = train_all(study, variants, plans, given.seeds, given.seconds)
    summary = summarize(runs)
    print_table(summary)
    picture = plot({name: mean_curve(group) for name, group in runs.items()})
    print("", *picture, sep="\n")
    return {
        "date": date.today().isoformat(),
        "unmask": __version__,
        "torch": torch.__version__,
        "machine": context.describe(),
        "load_before": load,
        "text": {"name": given.text.name, "fingerprint": source.fingerprint, "tokenizer": corpus.tokenizer.fingerprint},
        "recipe": base.name,
        "seconds": given.seconds,
        "seeds": given.seeds,
        "full_length": base.stage[-1].max_seq_len,
        "batch_tokens": base.stage[-1].batch_tokens,
        "plans": {name: [asdict(stage) for stage in plan.stages] for name, plan in plans.items()},
        "summary": summary,
        "plot": picture,
        "runs": runs,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the variants and write the results; return the exit code."""
    given = parse_arguments(arguments)
    try:
        results = compare(given)
    except UnmaskError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if given.results:
        parts = list(sys.argv[1:] if arguments is None else arguments)
        named = [Path(part).name if Path(part).is_absolute() else part for part in parts]
        command = shlex.join(["python", "benchmarks/curriculum.py", *named])
        given.results.parent.mkdir(parents=True, exist_ok=True)
        whole = json.dumps({"command": command, **results}, indent=1)
        given.results.write_text(whole + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
