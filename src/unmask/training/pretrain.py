"""Starts and resumes runs. A run trains a model on text, by a recipe and a budget, and writes a run directory."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shlex
import shutil
import time
import tomllib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from unmask.core import files
from unmask.core.config import dump_config
from unmask.core.distributed import (
    DistributedContext,
    Facts,
    compare_ranks,
    device_note,
    differences,
    ending_together,
    init_distributed,
    load_warning,
)
from unmask.core.errors import RecipeError, RunError, StoreError
from unmask.core.files import RunLayout, default_cache
from unmask.core.hardware import cores
from unmask.core.plugins import address_marks, code_marks, is_marked
from unmask.core.quantities import Quantity
from unmask.core.remote import UPLOADS, is_remote, require_public, scheme_of
from unmask.core.remote.upload import RunUpload, check_upload, fetch_run
from unmask.data.inputs import sends_requests
from unmask.data.sources import open_text, open_valid, require_field_used
from unmask.evaluation.minimal_pairs import MinimalPair, read_pairs, to_jsonl
from unmask.models.model import Model, load, save_model
from unmask.models.parallel import compare_weights
from unmask.objectives.word_boost import resolve_word_list
from unmask.training import checkpoint
from unmask.training.callbacks import PreparedRun, describe_early_stop, run_training, should_stop_early
from unmask.training.display import Display, Summary, first_sample, show_log
from unmask.training.environment import (
    determinism_key,
    held_out_shards,
    load_run_tokenizer,
    move_texts,
    read_environment,
    reopen_text,
    reopen_valid,
    text_facts_of_ranks,
    write_environment,
)
from unmask.training.estimate import CostEstimate, check_free_space, estimate_cost
from unmask.training.estimate.from_budget import choose_vocabulary, fit_to_budget
from unmask.training.estimate.memory import check_memory
from unmask.training.estimate.probe import measure, try_steps
from unmask.training.loggers import check_installed, discard_after
from unmask.training.loop import Signals, StopReason, TrainState
from unmask.training.plan import (
    Measured,
    Plan,
    check_budget,
    extend_plan,
    limit_pairs,
    limit_validation,
    make_plan,
    with_times,
)
from unmask.training.recipe import (
    Recipe,
    change_recipe,
    check_unchanged,
    explicit_keys,
    load_recipe,
    read_marks,
    read_recipe,
    write_recipe,
)
from unmask.training.runs import flatten, require_run_format, run_lock
from unmask.training.setup import (
    RunComponents,
    adapt_to_corpus,
    adapt_to_text,
    as_model,
    build_components,
    check_unknown,
    prepare_corpus,
    with_vocab_size,
)
from unmask.training.warm_start import DECIDED, WarmStart

_log = logging.getLogger("unmask")
_RECOVERY_SECONDS = 60.0
_FEW_STEPS = 10  # a probe would take longer than a run of fewer steps


@dataclass(frozen=True)
class LaunchOptions:
    """Options of `launch` that don't change the run."""

    dry_run: bool = False  # return after the cost estimate; write nothing but the cache
    verify: bool = False  # read all bytes of the text and of the token cache, instead of comparing sizes and times
    replace: bool = False  # replace a folder whose start was interrupted before anything could be resumed


@dataclass(frozen=True)
class Result:
    """The result of a run."""

    run: Path | None  # None for a dry run
    model: Model | None
    forecast: CostEstimate | None
    summary: Summary | None
    finished_before: bool = False
    stop: StopReason | None = None  # requested during the last step or after it, so that the run is finished


# Starting -------------------------------------------------------------------------------------------------------------


def launch(
    texts: Sequence[str | Path],
    *,
    recipe: str | Path | Recipe = "tiny",
    out: str | Path,
    settings: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    display: Display | None = None,
    start: WarmStart | None = None,
    options: LaunchOptions = LaunchOptions(),
) -> Result:
    """Starts a run.

    Args:
        texts: paths, or the texts themselves.
        recipe: name, path or recipe.
        out: directory of the run; it must not exist yet.
        settings: `key=value` strings; they take precedence over the recipe.
        overrides: values of command-line options by dotted key; they take precedence over `settings`.
        display: display of the progress.
        start: a model to start from; it determines encoder and tokenizer.
        options: options that don't change the run.
    """
    run, display = Path(out), display or Display()
    if os.path.lexists(run) and not (options.dry_run or options.replace):
        raise RunError(
            "output path already exists",
            location=str(run),
            hint=f"choose another --out, take a new one beside it (--exist-ok new), or continue that run: "
            f"unmask pretrain --resume {run}",
        )
    with _session(display) as signals:
        # The recipe becomes final in four steps: settings, warm start, data, measured time.
        explicit = None  # of a complete recipe, all settings are explicit
        if not isinstance(recipe, Recipe):
            explicit = explicit_keys(recipe, settings, overrides)
            recipe = load_recipe(recipe, settings, overrides, DECIDED if start else ())
        requested = recipe = with_start_and_paths(recipe, start)
        source, valid = open_text(texts, recipe.data), open_valid(recipe.data)
        require_field_used(recipe.data.field, [source, *valid.values()], given="data.field" in (overrides or {}))
        pairs = _open_pairs(recipe)
        context = _init_context(recipe, run, dry_run=options.dry_run)
        verify = options.verify and context.is_main_process
        compare_ranks(context, text_facts_of_ranks(source, valid))
        recipe, source, shrinks = adapt_to_text(recipe, source, explicit)
        recipe = choose_vocabulary(recipe, context, explicit)
        corpus = prepare_corpus(recipe, source, display.progress, verify=verify, shrinks=shrinks)
        compare_ranks(context, {"tokenizer": {"fingerprint": corpus.tokenizer.fingerprint}})
        check_unknown(recipe, source, corpus)
        recipe = fit_to_budget(recipe, corpus, context, explicit)
        recipe = adapt_to_corpus(recipe, corpus, explicit)
        recipe = with_vocab_size(recipe, corpus.tokenizer, start)
        check_memory(recipe, recipe.init.vocab_size or corpus.tokenizer.size, context)
        components = build_components(recipe, source, corpus, context, valid_sources=valid, warm_start=start)
        recipe, plan, estimate = _make_plan(recipe, components, pairs, display, None if options.dry_run else run)
        if context.is_main_process:
            display.estimate(estimate)
            display.sample(*first_sample(recipe, components))
            if warning := check_free_space(run, estimate):
                _log.warning(warning)
        if options.dry_run:
            return Result(None, None, estimate, None)
        signals.start_deferring()  # before anything is written, so that the run can be resumed
        prepared = PreparedRun(run, recipe, plan, components, estimate, pairs)
        if context.is_main_process:
            if options.replace:
                shutil.rmtree(run)
            _create_folder(run)
        with _locked(run):
            if context.is_main_process:
                _write_start(prepared, texts, start, requested)
            context.barrier()
            return _train(prepared, TrainState(), display, signals)


def with_start_and_paths(recipe: Recipe, start: WarmStart | None) -> Recipe:
    """Returns the recipe with model and tokenizer of the warm start, absolute paths and the words of its word list.

    A run can then be resumed from any working directory, even if the word list has changed.
    """
    if start:
        recipe = start.apply_to(recipe, default_cache())
    elif recipe.init.required:
        raise RecipeError(
            f"the recipe `{recipe.name}` needs a model to start from",
            hint="name it: --from MODEL; or use another recipe: unmask recipe list",
        )
    check_installed(recipe.train.loggers)
    stages = tuple(replace(stage, objective=resolve_word_list(stage.objective)) for stage in recipe.stage)
    return replace(recipe, data=recipe.data.absolute(), objective=resolve_word_list(recipe.objective), stage=stages)


def _init_context(recipe: Recipe, run: Path, *, dry_run: bool) -> DistributedContext:
    """Sets up device and ranks, logs notes about the machine, and checks that the run directory can be written."""
    train = recipe.train
    context = init_distributed(
        train.precision,
        train.threads,
        train.device,
        facts={"recipe": flatten(tomllib.loads(dump_config(recipe)))},
        join_seconds=train.join_timeout.number,
    )
    for note in filter(None, (load_warning(context), device_note(context))):
        _log.info(note)  # before this process causes load itself
    if context.is_main_process and not dry_run:
        files.check_writable(run)
        if recipe.train.upload:
            check_upload(recipe.train.upload)
    return context


def _open_pairs(recipe: Recipe) -> tuple[MinimalPair, ...]:
    """Reads the minimal pairs of a recipe.

    Raises:
        TextError: there are no pairs, or one is malformed.
        RecipeError: an objective makes no predictions of tokens.
    """
    settings = recipe.train.evaluate
    if not settings.pairs:
        return ()
    if any(objective.kind == "rtd" for objective in recipe.objectives):
        raise RecipeError(
            "minimal pairs need predictions of tokens, which objective.kind = rtd doesn't train",
            location="train.evaluate.pairs",
            hint="remove train.evaluate, or train with objective.kind=mlm",
        )
    found = read_pairs(Path(settings.pairs), settings.subset or None, settings.errors)
    left_out = f"; {found.left_out:,} lines are left out" if found.left_out else ""
    _log.info(f"minimal pairs: {len(found.pairs):,} from {settings.pairs}{left_out}")
    return found.pairs


def _make_plan(
    recipe: Recipe, components: RunComponents, pairs: Sequence[MinimalPair], display: Display, run: Path | None
) -> tuple[Recipe, Plan, CostEstimate]:
    """Measures a run; returns its recipe with affordable validations, its plan and its cost.

    `run` is its directory, next to which a checkpoint is written and deleted again; None writes it elsewhere.
    """
    folder, budget = None, recipe.train.budget
    if run is not None:
        folder = next(parent for parent in run.absolute().parents if parent.is_dir())
    if folder and budget.unit == "steps" and budget.number < _FEW_STEPS:
        measured = try_steps(recipe, components)
    else:
        measured = measure(recipe, components, pairs=pairs, on_probe=display.probe, folder=folder)
    recipe = _with_affordable_validation(recipe, measured)
    epoch_tokens = [loader.epoch_tokens for loader in components.loaders]
    train = recipe.train
    plan = make_plan(recipe.stage, train.budget, train.every, epoch_tokens, measured, train.evaluate.every)
    return recipe, plan, estimate_cost(recipe, plan, components, measured.memory)


def _with_affordable_validation(recipe: Recipe, measured: Measured) -> Recipe:
    """Returns the recipe with fewer validations if they would use too much of a budget in seconds."""
    train = recipe.train
    every, note = limit_validation(train.every, train.budget, measured)
    pairs_every, pairs_note = limit_pairs(train.evaluate.every, train.budget, measured.pairs_seconds)
    for each in filter(None, (note, pairs_note)):
        _log.info(each)
    return replace(recipe, train=replace(train, every=every, evaluate=replace(train.evaluate, every=pairs_every)))


def _create_folder(run: Path) -> None:
    with files.wrap_os_errors(run):
        run.mkdir(parents=True)


def _write_start(
    prepared: PreparedRun, texts: Sequence[str | Path], start: WarmStart | None, requested: Recipe
) -> None:
    """Writes recipe.toml, env.json and the model that the run starts from."""
    run, recipe = prepared.folder, prepared.recipe
    try:
        write_recipe(run, recipe, prepared.plan)
        if prepared.pairs:
            files.write_text(run / RunLayout.PAIRS, to_jsonl(prepared.pairs))
        if start:  # so that the run can restart, and be compared with its start, without the original
            save_model(run / RunLayout.START, start.model)
        write_environment(run, recipe, prepared.components, texts, prepared.estimate.flops_per_second)
        # The settings before text and time changed them: a second start is compared with it.
        environment = read_environment(run)
        environment |= {"requested": tomllib.loads(dump_config(requested)), "id": secrets.token_hex(16)}
        environment["code"] |= address_marks(_addresses(recipe, environment))
        files.write_json(run / RunLayout.ENVIRONMENT, environment)
    except StoreError:  # an incomplete directory can't be resumed and would block another attempt
        shutil.rmtree(run, ignore_errors=True)
        raise


# Resuming -------------------------------------------------------------------------------------------------------------


def resume(
    run: str | Path,
    *,
    budget: str | None = None,
    settings: Sequence[str] = (),
    display: Display | None = None,
    allow_different_environment: bool = False,
    verify: bool = False,
    texts: str | Path | Sequence[str | Path] = (),
    valid: Mapping[str, str | Path] | None = None,
) -> Result:
    """Resumes a run that was stopped or killed, or extends a finished one; the results are bit-identical.

    Args:
        run: directory of the run, or the address of its copy in an object store, which is downloaded to runs/.
        budget: a new total ("2 epochs") or an addition ("+1 epoch").
        settings: `key=value` strings for `train.every`, `train.keep_last`, `train.keep_at`,
            `train.early_stopping_patience`, `train.loggers`, `train.report` and `preview`; nothing else may change.
        display: display of the progress.
        allow_different_environment: resume although machine or versions differ; the results will differ too.
        verify: read all bytes of the text and of the token cache, instead of comparing sizes and times.
        texts: new paths of a text that was moved, or its strings again; the content must be equal.
        valid: new paths of validation texts that were moved, by name.

    Raises:
        RunError: text, machine or a setting differs from the start of the run; the difference is named.
    """
    folder, display = Path(run), display or Display()
    with _session(display) as signals:
        if is_remote(run):
            folder, settings = _download(str(run)), [f"train.upload={run}", *settings]
        recipe, plan = _open_run(folder)
        recipe = change_recipe(recipe, settings)
        _check_address(folder, recipe, settings)
        moved = None
        if texts or valid:  # also for a finished run, which may be extended later
            with _locked(folder):
                named = [texts] if isinstance(texts, str | Path) else list(texts)
                moved = move_texts(folder, read_environment(folder), recipe.data, named, valid)
        extension = None if budget is None else Quantity.parse(budget, relative=True)
        if extension is not None:
            check_budget(extension, where=f"--budget {budget}")
            if is_restarted() and _is_extended(folder, str(budget), plan):
                extension = None  # before the ranks were restarted, this command extended the plan already
        if extension is None and (reason := _why_finished(folder, recipe, plan)):
            _log.info(f"{folder} {reason}")
            _complete_upload(folder, recipe)
            return Result(folder, load(folder), None, None, finished_before=True)
        with _locked(folder):
            check_installed(recipe.train.loggers)
            environment = moved or read_environment(folder)
            unnamed = _remote_texts(recipe, environment, texts, valid)
            _require_marked(folder, unnamed, "--text ADDRESS, --valid NAME=ADDRESS")
            facts = {"run": _run_facts(folder, recipe, plan)}
            context, changes = _restore_context(folder, recipe, environment, allow_different_environment, facts)
            components = _restore_components(folder, recipe, environment, context, display, verify=verify)
            pairs = read_pairs(folder / RunLayout.PAIRS).pairs if recipe.train.evaluate.pairs else ()
            if extension is not None:
                if extension.unit == "seconds" and not plan.seconds:  # a run of few steps, which was not probed
                    times = measure(recipe, components, pairs=pairs, on_probe=display.probe, folder=folder)
                    plan = with_times(plan, times)
                plan = extend_plan(
                    plan,
                    extension,
                    every=recipe.train.every,
                    epoch_tokens=components.loaders[-1].epoch_tokens,
                    pairs_every=recipe.train.evaluate.every,
                )
            state = _load_state(folder, recipe, components)
            prepared = PreparedRun(folder, recipe, plan, components, estimate_cost(recipe, plan, components), pairs)
            signals.start_deferring()  # before anything is written
            if context.is_main_process:
                extended = {"budget": budget, "steps": plan.steps} if extension is not None else None
                _write_resume(prepared, state, environment, changes, extended)
            _log.info(f"resuming at step {state.step} of {plan.steps}")
            return _train(prepared, state, display, signals)


def _open_run(run: Path) -> tuple[Recipe, Plan]:
    """Returns recipe and plan of a run; restores a checkpoint that was being replaced when the run was killed.

    Rank 0, which has the lock, restores it; the others wait until it is there.

    Raises:
        RunError: another version wrote the run, or another process uses it.
        DamagedError: its recipe was changed.
    """
    require_run_format(run)
    if os.environ.get("RANK", "0") == "0":
        if checkpoint.replaced_checkpoints(run):
            with run_lock(run):
                checkpoint.recover_checkpoints(run)
    else:
        end = time.monotonic() + _RECOVERY_SECONDS
        while (
            checkpoint.replaced_checkpoints(run) and time.monotonic() < end
        ):  # then the missing checkpoint is an error
            time.sleep(0.1)
    recipe, plan = read_recipe(run)
    check_unchanged(run)
    return recipe, plan


def _check_address(run: Path, recipe: Recipe, settings: Sequence[str]) -> None:
    """Checks the address to which a resumed run is uploaded.

    Raises:
        RecipeError: it comes from the run, and this user has not given it.
        StoreError: it was given now, and can't be written or has another run.
    """
    address = recipe.train.upload
    if not address:
        return
    if not any(text.partition("=")[0].strip() == "train.upload" for text in settings):
        _require_marked(run, [address], "--set train.upload=ADDRESS, or --set train.upload='' for none")
    elif os.environ.get("RANK", "0") == "0":
        check_upload(address, run)


def _require_marked(run: Path, addresses: Sequence[str], options: str) -> None:
    """Checks that this user gave the addresses of a run, because a run from elsewhere may name any.

    Raises:
        RecipeError: one has no valid mark.
    """
    marks = read_marks(run)
    if unknown := [address for address in addresses if not is_marked(address, marks)]:
        raise RecipeError(
            f"this run names an address that this user has not given on this machine: {unknown[0]}",
            location=str(run),
            hint=f"if you trust it, name it again: unmask pretrain --resume {shlex.quote(str(run))} {options}",
        )


def _remote_texts(
    recipe: Recipe, environment: Mapping[str, Any], texts: object = (), valid: Mapping[str, object] | None = None
) -> list[str]:
    """Returns the addresses of a run's texts, and its datasets of the Hub, without those that were named now."""
    text = environment["text"]
    places = {name: [path] for name, path in recipe.data.valid.items()}
    for name, facts in text.get("valid", {}).items():
        places.setdefault(name, []).append(facts["path"])
    named = [path for name, paths in places.items() if name not in (valid or {}) for path in paths]
    return [path for path in (*(() if texts else text["paths"]), *named) if sends_requests(path)]


def _addresses(recipe: Recipe, environment: Mapping[str, Any]) -> list[str]:
    """Returns all addresses that a run reads or writes."""
    return [*filter(None, [recipe.train.upload]), *_remote_texts(recipe, environment)]


def _download(address: str) -> Path:
    """Downloads the copy of a run to runs/NAME."""
    require_public(address, "--resume")
    if scheme_of(address) not in UPLOADS:
        hint = f"name an address that begins with {' or '.join(f'{scheme}://' for scheme in UPLOADS)}"
        raise RunError("a run can't be resumed from this kind of address", location=address, hint=hint)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        hint = f"download it first, in one process: unmask pretrain --resume {address}"
        raise RunError("several processes can't download one run", location=address, hint=hint)
    folder = Path("runs") / (PurePosixPath(address).name or "run")
    fetch_run(address, folder)
    return folder


def _complete_upload(run: Path, recipe: Recipe) -> None:
    """Uploads what is missing of a finished run.

    Raises:
        StoreError: a file could not be uploaded.
    """
    if recipe.train.upload and os.environ.get("RANK", "0") == "0":
        upload = RunUpload(run, recipe.train.upload, recipe.train.keep_last)
        upload.copy()
        if upload.error:
            raise upload.error
        _log.info(f"uploaded to {recipe.train.upload}")


def _restore_context(
    run: Path, recipe: Recipe, environment: Mapping[str, Any], allow_changes: bool, compared: Mapping[str, Facts]
) -> tuple[DistributedContext, list[str]]:
    """Sets up device and ranks as at the start of the run; returns the context and what is different now.

    Another number of ranks is allowed: sums have other last digits, and samples and masks are the same. `compared` has
    the facts that all ranks share.

    Raises:
        RunError: results would not be bit-identical, and `allow_changes` is not set; or a rank differs.
    """
    facts, train = environment["determinism"], recipe.train
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    is_resized = ranks != int(facts.get("ranks", 1))
    threads = "auto" if is_resized and train.threads == "auto" else min(int(facts["threads"]), cores())
    context = init_distributed(
        train.precision, threads, train.device, facts=compared, join_seconds=train.join_timeout.number
    )
    changes = differences(determinism_key(context, recipe), facts)
    allowed = ("ranks:", "threads:") if is_resized else ()
    refused = [change for change in changes if not change.startswith(allowed)] if allowed else changes
    if is_resized:
        _log.info(
            f"resuming on {ranks} processes instead of {facts.get('ranks', 1)}: samples and masks are the same, and "
            "the last digits of results may differ"
        )
    if refused and not allow_changes:
        raise RunError(
            "results would not be bit-identical on this machine: " + "; ".join(refused),
            location=str(run / RunLayout.ENVIRONMENT),
            hint="resume where the run was started, or accept other results with --allow-different-environment",
        )
    return context, changes


def _restore_components(
    run: Path,
    recipe: Recipe,
    environment: Mapping[str, Any],
    context: DistributedContext,
    display: Display,
    *,
    verify: bool,
) -> RunComponents:
    """Opens the text of the run again and builds its components.

    Raises:
        RunError: the text has changed.
        DamagedError: the tokenizer of the run or a file of the cache has changed.
    """
    verify = verify and context.is_main_process
    source = reopen_text(run, environment, recipe.data, verify=verify)
    valid = reopen_valid(run, environment, recipe.data, verify=verify)
    compare_ranks(context, text_facts_of_ranks(source, valid))
    tokenizer = load_run_tokenizer(run, environment)
    corpus = prepare_corpus(recipe, source, display.progress, tokenizer, verify=verify)
    # Without a checkpoint the weights are initialized again, like at the start.
    start = None if os.path.lexists(run / RunLayout.LATEST) else WarmStart.of_run(run, recipe)
    return build_components(recipe, source, corpus, context, valid_sources=valid, warm_start=start)


def _load_state(run: Path, recipe: Recipe, components: RunComponents) -> TrainState:
    """Restores weights, optimizer and state of the last step, if any.

    The copy of a run may have no best model, because its upload was interrupted. The state then has none either, and
    the next validation keeps one.
    """
    if not os.path.lexists(run / RunLayout.LATEST):
        return TrainState()
    state, context = checkpoint.load(run, components.training), components.context
    lacks_best = recipe.train.keep_best and not (run / RunLayout.BEST / RunLayout.CARD).is_file()
    if state.best and context.largest(context.is_main_process and lacks_best):
        _log.warning(
            f"the best model, of step {state.best['step']:,} with loss {state.best['loss']:.4f}, is missing; the next "
            "validation keeps a best model"
        )
        state.best = None
    return state


def _run_facts(run: Path, recipe: Recipe, plan: Plan) -> Facts:
    """Returns what all ranks must see of a run: its recipe and plan, and its last checkpoint."""
    facts = {**flatten(tomllib.loads(dump_config(recipe))), **_plan_facts(plan)}
    if not os.path.lexists(run / RunLayout.LATEST):
        return facts
    folder = checkpoint.latest(run)
    manifest = folder / RunLayout.RESUME / RunLayout.DIGESTS
    return {**facts, "latest": folder.name, "checkpoint": files.file_digest(manifest) if manifest.is_file() else ""}


def _plan_facts(plan: Plan) -> Facts:
    return {f"plan.{key}": value for key, value in flatten(json.loads(json.dumps(asdict(plan)))).items()}


def is_restarted() -> bool:
    """Returns whether torchrun has started its processes again after one of them ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _is_extended(run: Path, budget: str, plan: Plan) -> bool:
    """Returns whether the last extension of a run's plan had this budget."""
    return read_environment(run).get("extended") == {"budget": budget, "steps": plan.steps}


def _write_resume(
    prepared: PreparedRun,
    state: TrainState,
    environment: dict[str, Any],
    changes: list[str],
    extended: Mapping[str, Any] | None,
) -> None:
    """Removes the leftovers of a crash, and writes the recipe, the plan and the changes of the environment."""
    run, recipe = prepared.folder, prepared.recipe
    discarded = discard_after(run, state.step or -1)  # step 0 is validated again
    if discarded:
        _log.info(f"moved {discarded} log lines of steps that were not saved to discarded.jsonl")
    if extended:  # before the plan: with another plan, this record means nothing
        environment["extended"] = dict(extended)
        files.write_json(run / RunLayout.ENVIRONMENT, environment)
    write_recipe(run, recipe, prepared.plan)
    shards = held_out_shards(prepared.components)
    if changes:
        earlier = environment.get("resumed_in_different_environment", [])
        environment["resumed_in_different_environment"] = [*earlier, *changes]
        environment["determinism"] = determinism_key(prepared.components.context, recipe)
    # The user allowed this code and these addresses, or named new ones.
    marks = code_marks(recipe.plugins) | address_marks(_addresses(recipe, environment))
    is_old = "id" not in environment
    environment.setdefault("id", secrets.token_hex(16))
    if is_old or changes or environment["text"].get("held_out_shards") != shards or environment.get("code") != marks:
        environment["text"]["held_out_shards"] = shards  # the cache may have moved
        environment["code"] = marks
        files.write_json(run / RunLayout.ENVIRONMENT, environment)
    with contextlib.suppress(FileNotFoundError):  # the report of an earlier crash
        os.replace(run / RunLayout.CRASH, run / f"earlier-{RunLayout.CRASH}")


def _why_finished(run: Path, recipe: Recipe, plan: Plan) -> str:
    """Returns why a run has no steps left and how to extend it, or "" if it has some."""
    if not os.path.lexists(run / RunLayout.LATEST):
        return ""
    state = checkpoint.read_state(checkpoint.latest(run))
    if state.step >= plan.steps:
        return f'is finished: {plan.steps} steps. A larger budget extends it, such as "+1 epoch".'
    if should_stop_early(recipe, state):
        early = f"ended early at step {state.step} of {plan.steps}: {describe_early_stop(recipe)}"
        return f"{early}. Continue it with --set train.early_stopping_patience=0."
    return ""


# Starting and resuming ------------------------------------------------------------------------------------------------


def _train(prepared: PreparedRun, state: TrainState, display: Display, signals: Signals) -> Result:
    training = prepared.components.training
    compare_ranks(training.context, {"plan": _plan_facts(prepared.plan)})
    optimizer = {f"optimizer.{name}": tensor for name, tensor in training.optimizer.state_tensors().items()}
    average = {f"average.{name}": tensor for name, tensor in training.ema.state_dict().items()} if training.ema else {}
    compare_weights(training.context, training.parallelism, {**training.module.state_dict(), **optimizer, **average})
    summary = run_training(prepared, state, display, signals)
    model = _final_model(prepared, state)
    return Result(prepared.folder, model, prepared.estimate, summary, stop=signals.stop_requested())


def _final_model(prepared: PreparedRun, state: TrainState) -> Model:
    """Returns the model that `unmask.load` opens: the best by validation. Ranks other than 0 return the last one."""
    run, recipe, components = prepared.folder, prepared.recipe, prepared.components
    # A best model of this step may be older: of the time before a return to an earlier checkpoint.
    last_loss = state.validation["loss"] if state.validation else None
    last_is_best = state.best is None or (state.best["step"] == state.step and state.best["loss"] == last_loss)
    with components.training.eval_module() as module:
        last = as_model(recipe, components, module, state, str(run))
    if recipe.train.keep_best and not last_is_best and components.context.is_main_process:
        return load(run)
    return last


@contextmanager
def _session(display: Display) -> Generator[Signals]:
    """Shows log messages on the display, handles signals, and tells other ranks of an error."""
    with show_log(display), Signals() as signals, ending_together():
        yield signals


def _locked(run: Path) -> contextlib.AbstractContextManager[None]:
    """Keeps other processes from working on a run; rank 0 holds the lock for all ranks."""
    return run_lock(run) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext()
