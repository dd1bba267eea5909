"""Runs a study: trains every variant with every seed, measures it, and writes results that a later start continues."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, Final, TypeGuard, cast

import torch

from unmask.checks.studies.measures import MEASURES, FinishedRun, StudyText, prompt_points
from unmask.checks.studies.results import by_variant, judge, summarize, table, write_plot
from unmask.checks.studies.settings import Study, VariantConfig
from unmask.core import files
from unmask.core.config import dump_config
from unmask.core.distributed import DistributedContext, init_distributed, load_warning
from unmask.core.errors import RecipeError, RunError, Stopped, StoreError, TextError, UnmaskError
from unmask.core.files import RunLayout
from unmask.core.hardware import cores, processor_name
from unmask.core.quantities import Quantity
from unmask.core.version import __version__
from unmask.data.sources import open_text
from unmask.models.model import Model
from unmask.tokenization.analysis import first_texts
from unmask.training.api import run_pretraining
from unmask.training.demo import python_documentation
from unmask.training.display import Display
from unmask.training.loggers import read_log
from unmask.training.loop import StopReason, TrainLoopInputs, TrainState, train
from unmask.training.plan import EveryConfig, Measured, Plan, StagePlan, make_plan
from unmask.training.recipe import Recipe, read_recipe
from unmask.training.setup import RunComponents, build_components, prepare_corpus

RESULT: Final = "result.json"
TABLE: Final = "table.md"
PLOT: Final = "plot.svg"
_WORK: Final = ".unmask-study"  # texts and runs, until the study is complete; no folder of a user has this name
_RUN_KEYS: Final = frozenset({"key", "variant", "seed", "steps", "tokens", "measures", "curve"})  # of a stored run
_MAX_TEST: Final = 100_000  # characters that no run sees
_FEWEST_CHARACTERS: Final = 2000
_TEST_SHARE: Final = 20  # one document in so many, or that part of the end of a text
_LONGEST_WORD: Final = 1000  # characters; in a script without spaces, a text is divided within one
_UPDATE_SECONDS: Final = 0.25
_SWEEP: Final = 100_000  # steps of a plan in which few steps are timed, at the progress of the middle of a stage


def run_study(
    study: Study, texts: Sequence[Path] = (), *, out: Path, command: str = "", display: Display | None = None
) -> dict[str, Any]:
    """Run what a study lacks, and return its results, which are also written to `out`.

    Runs that `out` has are kept if their recipe, text and version are the same. Without `texts`, the documentation of
    Python is used.

    Raises:
        RunError: `out` has results of another study, or other files.
        TextError: the text can't be read, or is too short.
        Stopped: a signal stopped a run; the next start continues it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("a study runs in one process", location="WORLD_SIZE", hint="start it without torchrun")
    earlier = _earlier(study, out)
    base = study.recipe(study.config.variant[0], study.seeds[0])
    text = read_text(texts, base, study.max_characters)
    context = init_distributed(base.train.precision, base.train.threads, base.train.device)
    display = display or Display()
    if warning := load_warning(context):
        display.message(f"warning: {warning}")
    session = _Session(study, text, out / _WORK, context, display)
    created = next((path for path in (*reversed(session.work.parents), session.work) if not path.exists()), None)
    try:
        session.write_texts()
        session.calibrate(earlier.get("calibration") or {})
        result = _facts(session, texts, command)
        _run_missing(session, result, earlier.get("runs", []), out)
    except UnmaskError as error:
        has_checkpoint = any(session.work.glob(f"*/{RunLayout.LATEST}"))
        can_go_on = has_checkpoint and isinstance(error, StoreError | RunError)  # a full disk, a run that diverged
        if created and not can_go_on and not (out / RESULT).exists():  # the first run was refused
            _remove(session.work, created)
        raise
    files.write_text(out / TABLE, table(study, result))
    groups = by_variant(study, result["runs"])
    if not write_plot(out / PLOT, groups, study.config.plot) and importlib.util.find_spec("matplotlib") is None:
        display.message("no plot: matplotlib is not installed (pip install 'unmask[studies]')")
    shutil.rmtree(session.work, ignore_errors=True)
    return result


def _remove(work: Path, created: Path) -> None:
    """Remove a folder, and those above it up to `created` that are empty then."""
    shutil.rmtree(work, ignore_errors=True)
    with contextlib.suppress(OSError):  # not empty, or it could not be created
        for folder in work.parents:
            if folder.is_relative_to(created):
                folder.rmdir()


def _run_missing(session: _Session, result: dict[str, Any], earlier: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Run what `earlier` runs lack, and write `result` after each run; earlier runs of further seeds are kept."""
    study = session.study
    variants = {variant.name: variant for variant in study.config.variant}
    done = {
        run["key"]: run
        for run in earlier
        if run["variant"] in variants and run["key"] == session.key(variants[run["variant"]], run["seed"])
    }
    if replaced := len(earlier) - len(done):
        session.display.message(
            f"warning: {replaced} earlier runs have another recipe, text or version; they are replaced"
        )
    jobs = [(variant, seed) for seed in study.seeds for variant in _rotated(study.config.variant, seed - 1)]
    missing = {key: job for job in jobs if (key := session.key(*job)) not in done}
    for number, key in enumerate([None, *missing]):
        if key is not None:
            done[key] = session.run(*missing[key], key, f"{number} of {len(missing)}")
        groups = by_variant(study, list(done.values()))
        result |= {
            "calibration": session.calibration,
            "seeds": sorted({run["seed"] for run in done.values()}),
            "runs": [run for group in groups.values() for run in group],
            "summary": summarize(groups, study.config.measures),
            "expected": judge(study, groups),
        }
        if done:
            files.write_json(out / RESULT, result)
        if key is not None:  # only now that the result can't be lost, whatever signal comes
            session.end(done[key], f"{number} of {len(missing)}")


def _rotated(variants: Sequence[VariantConfig], by: int) -> list[VariantConfig]:
    """Return the variants, starting with another one for each seed: a slow change of the machine affects all."""
    by %= len(variants)
    return [*variants[by:], *variants[:by]]


def _earlier(study: Study, out: Path) -> dict[str, Any]:
    """Return the results in a folder; nothing if it doesn't exist or is empty.

    Raises:
        RunError: it has results of another study, or other files.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return {}
    path = out / RESULT
    if not path.is_file() and not (out / _WORK).is_dir():
        raise RunError("this path exists and has no results of a study", location=str(out), hint="choose another --out")
    result = files.read_json(path) if path.is_file() else {}
    if not _is_result(result):
        raise RunError("this file has no results of a study", location=str(path), hint="choose another --out")
    if result and (result.get("study"), result.get("quick")) != (study.name, study.quick):
        raise RunError(
            f"this folder has results of the study `{result.get('study')}`{' (quick)' * bool(result.get('quick'))}, "
            f"not of `{study.name}`{' (quick)' * study.quick}",
            location=str(out),
            hint="choose another --out",
        )
    return result


def _is_result(result: Any) -> TypeGuard[dict[str, Any]]:
    """Return whether a JSON value can be what `run_study` stored."""
    if not isinstance(result, dict):
        return False
    tree = cast("dict[str, Any]", result)
    runs, calibration = tree.get("runs", []), tree.get("calibration", {})
    return (
        isinstance(runs, list)
        and isinstance(calibration, dict)
        and all(isinstance(run, dict) and run.keys() >= _RUN_KEYS for run in cast("list[Any]", runs))
    )


def _facts(session: _Session, texts: Sequence[Path], command: str) -> dict[str, Any]:
    study, text, context = session.study, session.text, session.context
    documents = [*text.train, *text.test]
    return {
        "study": study.name,
        "quick": study.quick,
        "question": study.config.question,
        "source": study.config.source,
        "recipe": study.config.recipe,
        "settings": [*study.config.settings, *study.settings],
        "variants": {variant.name: list(variant.settings) for variant in study.config.variant},
        "budget": str(study.budget),
        "text": {
            "name": ", ".join(path.name for path in texts) or "documentation of Python",
            "documents": len(documents),
            "characters": sum(map(len, documents)),
            "test_characters": sum(map(len, text.test)),
            "digest": files.digest(*documents),
        },
        "versions": {"unmask": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {
            "processor": processor_name(),
            "cores": cores(),
            "system": platform.system(),
            **{name: value for name, value in context.describe().items() if name != "ranks"},
        },
        "command": command,
        "date": date.today().isoformat(),
    }


# Text -----------------------------------------------------------------------------------------------------------------


def read_text(paths: Sequence[Path], recipe: Recipe, max_characters: int) -> StudyText:
    """Return the documents of a study, split into those of the runs and those that no run sees.

    Raises:
        TextError: the text can't be read, or has fewer than 2,000 characters.
    """
    if paths:
        documents = list(first_texts(open_text(list(paths), recipe.data), max_characters))
    else:
        documents = python_documentation(max_characters)
    documents = [document for document in documents if document.strip()]
    if (characters := sum(map(len, documents))) < _FEWEST_CHARACTERS:
        raise TextError(
            f"not enough text for a study: {characters:,} characters, expected at least {_FEWEST_CHARACTERS:,}",
            location=", ".join(map(str, paths)),
            hint="give more text",
        )
    if len(documents) < 2 * _TEST_SHARE:
        longest = max(range(len(documents)), key=lambda number: len(documents[number]))
        whole = documents[longest]
        wanted = len(whole) - min(len(whole) // _TEST_SHARE, _MAX_TEST)
        spaces = [whole.rfind(space, max(0, wanted - _LONGEST_WORD), wanted) for space in " \n"]
        end = max(spaces) + 1 or wanted
        documents[longest] = whole[:end]
        return StudyText(documents, [whole[end:]])
    train_documents: list[str] = []
    test: list[str] = []
    for number, document in enumerate(documents):
        is_test = number % _TEST_SHARE == _TEST_SHARE - 1 and sum(map(len, test)) < _MAX_TEST
        (test if is_test else train_documents).append(document)
    return StudyText(train_documents, test)


# Runs -----------------------------------------------------------------------------------------------------------------


class _RunDisplay(Display):
    """Shows how far a run is; keeps its warnings."""

    def __init__(self, outer: Display, name: str) -> None:
        self.warnings: list[str] = []
        self._outer, self._name = outer, name
        self._steps, self._shown = 1, 0.0

    def message(self, message: str) -> None:
        """Keeps a warning; other messages are about a single run."""
        if message.startswith("warning: "):
            self.warnings.append(message.removeprefix("warning: "))

    def train_start(self, plan: Plan, state: TrainState, flops_per_token: float, flops_per_second: float) -> None:
        """Is called before the first step."""
        self._steps = plan.steps

    def step(self, state: TrainState) -> None:
        """Shows the progress."""
        if (now := time.monotonic()) - self._shown >= _UPDATE_SECONDS:
            self._shown = now
            self._outer.progress(self._name, min(state.step / self._steps, 0.999))


@dataclass
class _Session:
    """One execution of a study."""

    study: Study
    text: StudyText
    work: Path
    context: DistributedContext
    display: Display
    calibration: dict[str, Any] = field(default_factory=dict[str, Any])  # key; steps, step_seconds by variant

    def write_texts(self) -> None:
        """Write the text of the runs and the unseen text."""
        with files.wrap_os_errors(self.work):
            self.work.mkdir(parents=True, exist_ok=True)
        for name, documents in (("train", self.text.train), ("test", self.text.test)):
            lines = (json.dumps({"text": document}) + "\n" for document in documents)
            files.write_text(self.work / f"{name}.jsonl", "".join(lines))

    def calibrate(self, earlier: Mapping[str, Any]) -> None:
        """Convert budgets in seconds to steps, or take those of an earlier start with the same recipes."""
        timed = [each for each in self.study.config.variant if self.study.budget_of(each).unit == "seconds"]
        if not timed:
            return
        recipes = {variant.name: self.study.recipe(variant, self.study.seeds[0]) for variant in timed}
        key = files.digest(*map(dump_config, recipes.values()), *self.text.train, __version__)
        if earlier.get("key") == key:
            self.calibration = dict(earlier)
            return
        timed_steps = steps_of_seconds(
            recipes, self.work / "train.jsonl", self.context, self.study.quick, self.display.progress
        )
        self.calibration = {"key": key, **timed_steps}

    def recipe(self, variant: VariantConfig, seed: int) -> Recipe:
        """Return the recipe of a run; its budget is in steps if it was in seconds."""
        steps = self.calibration.get("steps", {}).get(variant.name)
        return self.study.recipe(variant, seed, None if steps is None else Quantity(steps, "steps"))

    def key(self, variant: VariantConfig, seed: int) -> str:
        """Return a digest of everything that the results of a run depend on, besides the machine."""
        recipe = dump_config(self.recipe(variant, seed))
        measured = repr((self.study.probe, self.study.config.prompt, sorted(self.study.config.measures)))
        return files.digest(recipe, measured, __version__, *self.text.train, *self.text.test)[:16]

    def run(self, variant: VariantConfig, seed: int, key: str, place: str) -> dict[str, Any]:
        """Train and measure one variant with one seed; continue a run that was stopped. Its folder is kept."""
        folder, display = self.work / key, _RunDisplay(self.display, f"{variant.name}, seed {seed} ({place})")
        if folder.exists() and not os.path.lexists(folder / RunLayout.LATEST):  # stopped before its first checkpoint
            shutil.rmtree(folder)
        began, processor = time.perf_counter(), time.process_time()
        trained = run_pretraining(
            [self.work / "train.jsonl"],
            recipe=self.recipe(variant, seed),
            out=folder,
            exist_ok="resume",
            display=display,
        )
        if trained.stop and trained.summary:  # the run is finished, the study is not
            raise Stopped(trained.stop.exit_code, str(folder), trained.summary.steps)
        seconds, processor = time.perf_counter() - began, time.process_time() - processor
        assert isinstance(trained.model, Model)
        curve = self._curve(folder, variant)
        finished = FinishedRun(
            folder=folder,
            model=trained.model,
            curve=curve,
            text=self.text,
            test_file=self.work / "test.jsonl",
            probe=self.study.probe,
            threads=self.context.threads,
            context=self.context,
        )
        measures = {measure: MEASURES[measure].compute(finished) for measure in self.study.config.measures}
        return {
            "key": key,
            "variant": variant.name,
            "seed": seed,
            "steps": curve[-1]["step"],
            "tokens": curve[-1]["tokens"],
            "seconds": round(seconds, 2),
            "processor_seconds": round(processor, 2),
            "measures": measures,
            "curve": curve,
            "warnings": display.warnings,
        }

    def end(self, result: Mapping[str, Any], place: str) -> None:
        """Delete the folder of a run whose result is stored, and show the result."""
        name = f"{result['variant']}, seed {result['seed']} ({place})"
        shutil.rmtree(self.work / result["key"])
        measure, value = next(iter(result["measures"].items()))
        self.display.progress(name, 1.0)
        self.display.message(f"{name}: {measure} {'–' if value is None else f'{value:.4f}'}")

    def _curve(self, folder: Path, variant: VariantConfig) -> list[dict[str, Any]]:
        """Return the validations of a run, with the tokens that it had processed and predicted.

        Where steps were timed for all variants in turns, the training seconds are computed from these times.
        """
        lines = list(read_log(folder / RunLayout.LOG))
        times = self.calibration.get("step_seconds", {}).get(variant.name)
        _, plan = read_recipe(folder)
        if times:
            stages = zip(plan.stages, times, strict=True)
            plan = replace(plan, stages=tuple(replace(stage, seconds_per_step=each) for stage, each in stages))
        points: list[dict[str, Any]] = []
        for line in lines:
            if "validation" not in line:
                continue
            validation = line["validation"]
            predicted = sum(each.get("masked_tokens", 0) for each in lines if each["step"] <= line["step"])
            points.append({
                "step": line["step"],
                "tokens": line["tokens"],
                "predicted": predicted,
                "training_seconds": plan.training_seconds(line["step"]) if times else line["training_seconds"],
                **{name: validation[name] for name in ("loss", "accuracy", "bits_per_character", "unigram_loss")},
                "pair_accuracy": (validation.get("pair") or {}).get("accuracy"),
            })  # fmt: skip
        if prompt := self.study.config.prompt:
            checkpoints = {int(path.name.removeprefix("step-")): path for path in sorted(folder.glob("step-*"))}
            probabilities = prompt_points(checkpoints, prompt)
            points = [{**point, "prompt": probabilities.get(point["step"])} for point in points]
        return points


# Equal seconds --------------------------------------------------------------------------------------------------------


def steps_of_seconds(
    recipes: Mapping[str, Recipe],
    text: Path,
    context: DistributedContext,
    quick: bool,
    on_progress: Callable[[str, float], None],
) -> dict[str, dict[str, Any]]:
    """Return `steps`, the number of steps of each recipe for its budget in seconds, and `step_seconds` of its stages.

    Steps of all stages of all recipes are timed in turns, and the median of several rounds counts, so that a busy
    moment of the machine affects all of them. The clock is the processor time of this process, which other processes
    hardly change; with one thread, it is the time of an idle machine. On a GPU it is the time.
    """
    timers: list[_StageTimer] = []
    components: dict[str, RunComponents] = {}
    for name, recipe in recipes.items():
        source = open_text([text], recipe.data)
        corpus = prepare_corpus(recipe, source, on_progress)
        components[name] = build_components(recipe, source, corpus, context, valid_sources={})
        starts = [0.0, *(stage.until.fraction for stage in recipe.stage)]
        for number, stage in enumerate(recipe.stage):
            middle = (starts[number] + stage.until.fraction) / 2
            timers.append(_StageTimer(name, components[name].training, number, recipe, middle))
    rounds, steps = (3, 4) if quick else (15, 6)
    for number in range(rounds + 1):
        on_progress("timing steps of all variants", number / (rounds + 1))
        for timer in timers:
            timer.run(steps, is_warm_up=number == 0)
    on_progress("timing steps of all variants", 1.0)
    steps_of: dict[str, int] = {}
    step_seconds: dict[str, list[float]] = {}
    for name, recipe in recipes.items():
        times = step_seconds[name] = [statistics.median(timer.seconds) for timer in timers if timer.name == name]
        epoch_tokens = [loader.epoch_tokens for loader in components[name].loaders]
        plan = make_plan(recipe.stage, recipe.train.budget, EveryConfig(), epoch_tokens, Measured(tuple(times)))
        steps_of[name] = plan.steps
    return {"steps": steps_of, "step_seconds": step_seconds}


class _StageTimer:
    """Times steps of one stage of a recipe, with weights that stay as they are."""

    def __init__(self, name: str, training: TrainLoopInputs, number: int, recipe: Recipe, middle: float) -> None:
        self.name = name
        self.seconds: list[float] = []  # per step, of each round
        stage = recipe.stage[number]
        self._training = replace(
            training,
            objectives=[training.objectives[number]],
            loaders=[training.loaders[number]],
            lr_factor=_zero,  # without a warm-up, weights could diverge
        )
        self._plan = Plan((StagePlan(stage.max_seq_len, stage.batch_tokens, 0, _SWEEP, 0.0),))
        # The first step of a plan would start at the first sample again.
        self._state = TrainState(step=max(1, round(middle * _SWEEP)))

    def run(self, steps: int, *, is_warm_up: bool) -> None:
        """Run some steps and keep their mean time, unless they warm up."""
        last = self._state.step + steps - 1

        def stop() -> StopReason | None:
            return StopReason.TERMINATED if self._state.step >= last else None

        clock = time.process_time if self._training.context.device.type == "cpu" else time.perf_counter
        began, before = clock(), self._state.step
        train(self._training, self._plan, self._state, stop_requested=stop, prefetch=False)
        if not is_warm_up:
            self.seconds.append((clock() - began) / (self._state.step - before))


def _zero(progress: float, step: int) -> float:
    return 0.0
