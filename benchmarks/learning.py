"""How much sooner does a recipe reach the loss that the Trainer of `transformers` reaches in its whole time?

Trains BERT with the Trainer, once for each learning rate: AdamW, linear decay over the time, 15 % masked, rows of 128
tokens without padding, as in run_mlm.py. Then trains the recipe with the same tokenizer for the same time, validated
often. Both are evaluated on the same masked tokens of a text that neither is trained on.

The clock is processor time divided by threads, so other processes don't change the result. It counts data, forward,
backward and optimizer, without validation and without building model and tokenizer. The Trainer's steps are counted
beforehand from the speed of its first steps.

    python benchmarks/learning.py enwiki/train.txt.gz --valid enwiki/valid.txt --seconds 600 \
        --results benchmarks/results/learning.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from unmask.core.distributed import DistributedContext, init_distributed
from unmask.core.quantities import Quantity
from unmask.core.version import __version__
from unmask.data.sources import open_source, open_text
from unmask.evaluation.masked_lm import EvalSet, build_eval_set, evaluate
from unmask.evaluation.validation import documents_from_source
from unmask.hub.parity import quiet_transformers
from unmask.models.hf_format import to_hf_config
from unmask.models.model import load, save_model
from unmask.training.estimate.probe import measure
from unmask.training.loop import Callback, TrainState, train
from unmask.training.plan import make_plan
from unmask.training.recipe import Recipe, load_recipe
from unmask.training.setup import RunComponents, as_model, build_components, prepare_corpus

ROWS, LENGTH, MASK_RATE = 32, 128, 0.15  # of the Trainer's steps
WARM_UP_STEPS, TIMED_STEPS = 4, 12
WARM_UP = 0.06  # fraction of the Trainer's steps with a rising rate, as in RoBERTa
EARLY, EARLY_EVERY, EVERY = 0.25, 0.01, 0.15  # validations of the recipe, in fractions of its steps


def clock(context: DistributedContext) -> float:
    """Return seconds of processor time for each thread."""
    return time.process_time() / context.threads


class Steps(transformers.TrainerCallback):
    """Times the steps of a Trainer, and stops it after the given seconds."""

    def __init__(self, context: DistributedContext, seconds: float) -> None:
        self.context, self.seconds, self.times = context, seconds, list[float]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Start the clock."""
        self.begin = clock(self.context)
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Record a step."""
        self.times.append(clock(self.context) - self.begin)
        if self.times[-1] >= self.seconds:  # the Trainer itself has set it after the last step
            control.should_training_stop = True
        return control


def train_bert(
    folder: Path, rows: list[list[int]], rate: float, steps: int, seconds: float, context: DistributedContext
) -> tuple[Any, Steps]:
    """Train a new BERT with the Trainer; return the model and the times of its steps."""
    transformers.set_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertForMaskedLM(transformers.BertConfig.from_pretrained(folder))
    times = Steps(context, seconds)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=ROWS,
            learning_rate=rate,
            lr_scheduler_type="linear",
            warmup_steps=round(WARM_UP * steps),
            weight_decay=0.01,
            bf16=context.precision == "bfloat16",
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            dataloader_drop_last=True,
        ),
        train_dataset=[{"input_ids": row} for row in rows],  # pyright: ignore[reportArgumentType]
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASK_RATE),
        callbacks=[times],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return model, times


def trainer_run(
    folder: Path, rows: list[list[int]], rate: float, seconds: float, eval_set: EvalSet, context: DistributedContext
) -> dict[str, Any]:
    """Train BERT for the given seconds with one learning rate and evaluate it."""
    _, first = train_bert(folder, rows, rate, WARM_UP_STEPS + TIMED_STEPS, math.inf, context)
    spent = [
        after - before
        for before, after in zip(first.times[WARM_UP_STEPS - 1 :], first.times[WARM_UP_STEPS:], strict=False)
    ]
    steps = round(seconds / median(spent))
    model, times = train_bert(folder, rows, rate, steps, seconds * 1.05, context)
    model.save_pretrained(folder)
    loaded = load(folder)
    result = evaluate(loaded.encoder, loaded.head, eval_set, context)
    return {
        "rate": rate,
        "steps": len(times.times),
        "planned_steps": steps,
        "tokens": len(times.times) * ROWS * LENGTH,
        "seconds": times.times[-1],
        "loss": result.loss,
        "accuracy": result.accuracy,
        "bits_per_character": result.bits_per_character,
    }


def blocks(components: RunComponents, tokens: int) -> list[list[int]]:
    """Return rows of full length with at least so many tokens of the training text, or all of it."""
    loader, ids = components.loaders[-1], list[int]()
    cursor = 0
    while len(ids) < min(tokens, loader.epoch_tokens):
        batches, cursor = loader.step(cursor, ROWS * LENGTH, 0, 1)
        for batch in batches:
            ids += batch.ids_T.tolist()
    return [ids[first : first + LENGTH] for first in range(0, len(ids) - LENGTH, LENGTH)]


def recipe_run(recipe: Recipe, components: RunComponents, seconds: float, eval_set: EvalSet) -> dict[str, Any]:
    """Train the recipe for the given seconds and evaluate it often."""
    context, curve = components.context, list[dict[str, float]]()
    epoch_tokens = [loader.epoch_tokens for loader in components.loaders]
    begin = clock(context)
    measured = replace(measure(recipe, components), validate_seconds=0.0, save_seconds=0.0)
    probed = clock(context) - begin
    plan = make_plan(recipe.stage, Quantity(seconds, "seconds"), recipe.train.every, epoch_tokens, measured)
    evaluating, begin = 0.0, clock(context)

    def record(state: TrainState) -> None:
        nonlocal evaluating
        now = clock(context)
        with components.training.eval_module() as module:
            result = evaluate(module.encoder, module.head, eval_set, context)
        curve.append({
            "step": state.step,
            "tokens": state.tokens,
            "seconds": now - begin - evaluating,
            "loss": result.loss,
            "accuracy": result.accuracy,
            "bits_per_character": result.bits_per_character,
        })  # fmt: skip
        evaluating += clock(context) - now

    def is_due(step: int, since: float) -> bool:
        every = max(1, round(plan.steps * (EARLY_EVERY if step <= EARLY * plan.steps else EVERY)))
        return step % every == 0 or step == plan.steps

    train(components.training, plan, TrainState(), [Callback(is_due, record)])
    return {"recipe": recipe.name, "probe_seconds": probed, **curve[-1], "curve": curve}


def seconds_to(curve: list[dict[str, float]], bits: float) -> float | None:
    """Return the seconds at which a curve reaches these bits per character, interpolated; None: never."""
    for before, after in zip([None, *curve], curve, strict=False):
        if after["bits_per_character"] <= bits:
            if before is None:
                return after["seconds"]
            share = (before["bits_per_character"] - bits) / (before["bits_per_character"] - after["bits_per_character"])
            return before["seconds"] + share * (after["seconds"] - before["seconds"])
    return None


def main() -> int:
    """Train everything, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text to train on")
    parser.add_argument("--valid", type=Path, required=True, help="text to evaluate on")
    parser.add_argument("--recipe", default="tiny", help="a name or a file")
    parser.add_argument("--seconds", type=float, default=600.0, help="training seconds of each run")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3], help="of the Trainer")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--characters", type=float, default=300_000, help="of the text to evaluate on")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    given = parser.parse_args()
    recipe = load_recipe(given.recipe, [f"train.threads={given.threads}"])
    bert = load_recipe("bert-mini", [])
    context = init_distributed(recipe.train.precision, given.threads)
    source = open_source([given.text], recipe.data)
    corpus = prepare_corpus(recipe, source, lambda stage, fraction: None)
    tokenizer, counts = corpus.tokenizer, corpus.train.token_counts
    held_out = documents_from_source(open_text([given.valid], recipe.data), tokenizer, corpus.words, given.characters)
    components = build_components(recipe, source, corpus, context, valid_sources={})
    print(f"{recipe.name}: {components.num_parameters:,} parameters, {given.threads} threads, {context.precision}")

    length = recipe.stage[-1].max_seq_len
    fast = recipe_run(recipe, components, given.seconds, build_eval_set(held_out.documents, tokenizer, length, counts))
    print(f"{recipe.name}: {fast['bits_per_character']:.4f} bits/character after {fast['seconds']:.0f} s", flush=True)

    trainers: list[dict[str, Any]] = []
    eval_set = build_eval_set(held_out.documents, tokenizer, LENGTH, counts)
    needed = int(given.seconds * 20_000 * given.threads)  # tokens: more than the Trainer can see
    with tempfile.TemporaryDirectory() as name, quiet_transformers():
        folder = Path(name)
        save_model(folder, as_model(recipe, components, components.training.module, TrainState()))
        config = to_hf_config(bert.model, tokenizer.size, {})
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": tokenizer.size}), encoding="utf-8")
        rows = blocks(components, needed)
        for rate in given.rates:
            trainers.append(trainer_run(folder, rows, rate, given.seconds, eval_set, context))
            run = trainers[-1]
            print(
                f"Trainer {rate:g}: {run['bits_per_character']:.4f} bits/character, {run['tokens']:,} tokens",
                flush=True,
            )
    best = min(trainers, key=lambda run: run["bits_per_character"])
    reached = seconds_to(fast["curve"], best["bits_per_character"])
    ratio = best["seconds"] / reached if reached else None
    shown = f"{reached:.1f} s, {ratio:.1f} times sooner" if reached and ratio else "never"
    print(
        f"{recipe.name} reaches the Trainer's best, {best['bits_per_character']:.4f} (rate {best['rate']:g}): {shown}"
    )
    if given.results:
        whole = {
            "date": date.today().isoformat(),
            "command": f"python benchmarks/learning.py {given.text.name} --valid {given.valid.name} "
            f"--recipe {given.recipe} --seconds {given.seconds:g} --threads {given.threads} "
            f"--rates {' '.join(f'{rate:g}' for rate in given.rates)} --characters {given.characters:g}",
            "unmask": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": context.describe(),
            "load_after": os.getloadavg()[0],
            "seconds_to_trainer": reached,
            "times_sooner": ratio,
            "trainer": trainers,
            "run": fast,
        }
        given.results.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
