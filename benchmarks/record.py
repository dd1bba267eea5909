"""Checks and packs entries of the records: the training time to a fixed loss (records/RULES.md).

    python benchmarks/record.py make records/cpu-2core/2026-12-01-muon RUN RUN RUN --about "what is new" --author NAME
    python benchmarks/record.py check records/cpu-2core/2026-12-01-muon [--text tinyshakespeare.txt] [--json]

`check` ends with exit code 3 if the entry breaks a rule, and with 2 if it can't be read.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import shutil
import statistics
import sys
import tempfile
import tomllib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import tomli_w

from unmask.core import files
from unmask.core.config import build_config, closest_match, load_toml
from unmask.core.distributed import init_distributed
from unmask.core.errors import DamagedError, RecipeError, RunError, TextError, UnmaskError
from unmask.core.files import RunLayout
from unmask.core.format import join_names
from unmask.core.hardware import cores
from unmask.data.sources import FileSource, open_text
from unmask.evaluation.masked_lm import build_eval_set, documents_from_shards, evaluate
from unmask.models.model import load
from unmask.training.environment import load_run_tokenizer, read_environment, reopen_text
from unmask.training.loggers import read_log
from unmask.training.plan import Plan
from unmask.training.recipe import Recipe, load_recipe, read_recipe
from unmask.training.setup import prepare_corpus

TRACKS = Path(__file__).parents[1] / "records" / "tracks.toml"
ENTRY, README = "entry.toml", "README.md"
RUN_FILES = (RunLayout.RECIPE, RunLayout.ENVIRONMENT, RunLayout.LOG)
FAILED = 3  # exit code

_CLOCK = 0.02  # seconds; times in the log are rounded and read one after the other
_SPEED = 0.01  # relative difference between a log line's tokens per second and its other figures
_EQUAL = 1e-6  # relative difference of figures that don't depend on the machine
_REEVALUATED = 5e-3  # relative difference of a loss in float32 and in the precision of the run


# Files ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Track:
    """One track: what every entry has in common."""

    about: str
    text: str  # name of the text file
    bytes: int  # its size
    sha256: str  # its digest
    digest: str  # its digest as unmask writes it to env.json
    held_out_digest: str  # digest of the held-out text in env.json
    held_out_tokens: int  # without [UNK]
    held_out_characters: int  # without those of [UNK]
    tokenizer: str  # fingerprint of the tokenizer in env.json
    masked_tokens: int  # number of masked held-out tokens
    unigram_loss: float  # nats per masked token, of the token frequencies in the training text
    device: str
    threads: int  # maximum
    ranks: int
    seeds: tuple[int, ...]
    target_bits_per_character: float | None = None  # None: the track is closed

    def bits_per_character(self, loss: float) -> float:
        """Return bits per character for nats per masked token."""
        return loss * self.held_out_tokens / self.held_out_characters / math.log(2)


@dataclass(frozen=True)
class EntryRun:
    """What an entry states about one of its runs."""

    seed: int
    step: int  # of the first validation at or below the target
    seconds: float  # until then
    bits_per_character: float  # at that step
    reevaluated: bool  # whether `make` evaluated the last checkpoint again
    sha256: Mapping[str, str]  # file -> digest


@dataclass(frozen=True)
class Entry:
    """Content of entry.toml."""

    track: str
    about: str
    author: str
    date: str
    target_bits_per_character: float
    seconds: float  # median of the runs
    run: tuple[EntryRun, ...]


@dataclass(frozen=True)
class Run:
    """The files of one run."""

    folder: Path
    recipe: Recipe
    plan: Plan
    environment: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]

    @property
    def validations(self) -> list[Mapping[str, Any]]:
        """The log lines with a validation."""
        return [line for line in self.log if "validation" in line]

    def first_at(self, target: float) -> Mapping[str, Any] | None:
        """Return the log line of the first validation at or below a target in bits per character, without bounds."""
        reached = (line for line in self.validations if line["validation"]["bits_per_character"] <= target)
        return next(reached, None)


def read_tracks(path: Path) -> dict[str, Track]:
    """Return the tracks of a file by name."""
    return {name: build_config(Track, tree, f"{path} [{name}]") for name, tree in load_toml(path).items()}


def open_track(name: str, path: Path) -> tuple[Track, float]:
    """Return a track and its target.

    Raises:
        RecipeError: there is no such track, or it has no target yet.
    """
    tracks = read_tracks(path)
    if name not in tracks:
        near = closest_match(name, tracks)
        raise RecipeError(
            f"unknown track {name!r}" + (f": did you mean {near!r}?" if near else ""),
            location=str(path),
            hint=f"use {join_names(list(tracks))}: name the folder above the entry like the track, or give --track",
        )
    target = tracks[name].target_bits_per_character
    if target is None:
        raise RecipeError(
            f"track {name!r} has no target yet, so no entry can be checked",
            location=str(path),
            hint="set target_bits_per_character of the track",
        )
    return tracks[name], target


def read_run_files(folder: Path) -> Run:
    """Read recipe, environment and log of a run.

    Raises:
        UnmaskError: a file is missing or damaged.
    """
    recipe, plan = read_recipe(folder)
    log = list(read_log(folder / RunLayout.LOG))
    for number, line in enumerate(log, 1):
        result = line.get("validation", {"loss": 0.0, "bits_per_character": 0.0, "masked_tokens": 0, "unigram_loss": 0})
        names = ("loss", "bits_per_character", "masked_tokens", "unigram_loss")
        numbers = [line.get("seconds"), line.get("training_seconds"), line.get("tokens"), *map(result.get, names)]
        if any(not isinstance(value, int | float) for value in numbers):
            raise DamagedError(
                "invalid log line: expected tokens, seconds, training_seconds and a loss, all finite",
                location=f"{folder / RunLayout.LOG}, line {number}",
                hint="restore the file from the run",
            )
    return Run(folder, recipe, plan, read_environment(folder), log)


def read_entry(folder: Path) -> Entry:
    """Read entry.toml.

    Raises:
        RunError: the folder is no entry.
    """
    path = folder / ENTRY
    if not path.is_file():
        raise RunError("not an entry: entry.toml is missing", location=str(folder), hint="make one: record.py make")
    return build_config(Entry, load_toml(path), str(path))


@contextmanager
def damage_reported(folder: Path) -> Generator[None]:
    """Turn exceptions of files with an unexpected structure into errors.

    Raises:
        DamagedError: a file has an unexpected structure.
    """
    try:
        yield
    except UnmaskError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        message = f"a file is damaged: {type(error).__name__}: {error}"
        raise DamagedError(message, location=str(folder), hint="restore the files as unmask wrote them") from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_folder(seed: int) -> str:
    """Return the name of a run's folder in an entry."""
    return f"seed-{seed}"


# Checks ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """Result of one check; no problems: it passes."""

    check: str
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """Results of all checks of an entry, and the measured times."""

    entry: str
    track: str
    target_bits_per_character: float
    seconds: float | None  # median, from the logs; None: a run doesn't reach the target
    stated_seconds: float
    runs: tuple[dict[str, Any], ...]
    findings: tuple[Finding, ...]

    @property
    def passes(self) -> bool:
        """Whether no check has a problem."""
        return not any(finding.problems for finding in self.findings)


def check(folder: Path, tracks: Path = TRACKS, text: Path | None = None) -> Report:
    """Check an entry against the rules.

    Args:
        folder: Folder of the entry.
        tracks: File with the tracks.
        text: The text itself, to compare its bytes too.

    Raises:
        UnmaskError: a file of the entry is missing or damaged, or the track is unknown or closed.
    """
    entry = read_entry(folder)
    track, target = open_track(entry.track, tracks)
    with damage_reported(folder):
        runs = [read_run_files(folder / run_folder(run.seed)) for run in entry.run]
        findings = check_runs(folder, entry, track, runs, text)
        findings.append(Finding("time", tuple(time_problems(entry, target, runs))))
        rows = tuple(describe_run(run, target) for run in runs)
    reached = [row["seconds"] for row in rows]
    median = None if None in reached or not reached else statistics.median(reached)
    return Report(str(folder), entry.track, target, median, entry.seconds, rows, tuple(findings))


def check_runs(folder: Path, entry: Entry, track: Track, runs: Sequence[Run], text: Path | None) -> list[Finding]:
    """Return the results of all checks that don't depend on the target."""
    logs = [f"{run.folder.name}: {problem}" for run in runs for problem in log_problems(run)]
    masks = [f"{run.folder.name}: {problem}" for run in runs for problem in mask_problems(track, run)]
    return [
        Finding("files", tuple(file_problems(folder, entry))),
        Finding("text", tuple(text_problems(track, runs, text))),
        Finding("machine", tuple(machine_problems(track, runs))),
        Finding("seeds", tuple(seed_problems(track, entry, runs))),
        Finding("recipe", tuple(recipe_problems(folder, runs))),
        Finding("log", tuple(logs)),
        Finding("masks", tuple(masks)),
    ]


def file_problems(folder: Path, entry: Entry) -> list[str]:
    """Compare the files of an entry with the digests in entry.toml."""
    problems: list[str] = []
    readme = folder / README
    if not readme.is_file() or not readme.read_text(encoding="utf-8").strip():
        problems.append(f"{README} is missing or empty: describe there what is new")
    for run in entry.run:
        for name in RUN_FILES:
            path = folder / run_folder(run.seed) / name
            if not path.is_file():
                problems.append(f"{path.relative_to(folder)} is missing")
            elif run.sha256.get(name) != file_sha256(path):
                problems.append(f"{path.relative_to(folder)} has changed since the entry was made")
    return problems


def text_problems(track: Track, runs: Sequence[Run], text: Path | None) -> list[str]:
    """Compare text, held-out part and tokenizer of the runs with the track, and the bytes of `text` if it is given."""
    problems: list[str] = []
    if text is not None:
        size, sha256 = text.stat().st_size if text.is_file() else 0, file_sha256(text) if text.is_file() else ""
        if (size, sha256) != (track.bytes, track.sha256):
            problems.append(f"{text.name} is another text: {size:,} bytes, SHA-256 {sha256}")
        elif list(FileSource([text], "file", "strict").digests.values()) != [track.digest]:
            problems.append(f"{text.name}: this version of unmask computes another digest than the track has")
    for run in runs:
        facts, name = run.environment["text"], run.folder.name
        digests = [digest for _, digest in facts.get("files", [])]
        if digests != [track.digest]:
            problems.append(f"{name}: text {join_names(digests) or 'in memory'} instead of {track.digest}")
        if facts.get("valid"):
            problems.append(f"{name}: has further validation texts: {join_names(list(facts['valid']))}")
        held_out = facts.get("facts", {}).get("held_out_digest")
        if held_out != track.held_out_digest:
            problems.append(f"{name}: held-out text {held_out} instead of {track.held_out_digest}")
        if facts["tokenizer"] != track.tokenizer:
            problems.append(f"{name}: tokenizer {facts['tokenizer']} instead of {track.tokenizer}")
    return problems


def machine_problems(track: Track, runs: Sequence[Run]) -> list[str]:
    """Compare the machines of the runs with the track and with each other."""
    problems: list[str] = []
    for run in runs:
        machine, name = run.environment["determinism"], run.folder.name
        if (machine.get("device"), machine.get("ranks")) != (track.device, track.ranks):
            problems.append(
                f"{name}: {machine.get('ranks')} × {machine.get('device')} instead of {track.ranks} × {track.device}"
            )
        if machine["threads"] > track.threads:
            problems.append(f"{name}: {machine['threads']} threads, {track.threads} are allowed")
        if run.environment.get("resumed_in_different_environment"):
            problems.append(f"{name}: was resumed in another environment")
        first = runs[0].environment["determinism"]
        differing = [key for key in {**first, **machine} if machine.get(key) != first.get(key)]
        if differing:
            problems.append(f"{name}: differs from {runs[0].folder.name} in {join_names(differing)}")
    return problems


def seed_problems(track: Track, entry: Entry, runs: Sequence[Run]) -> list[str]:
    """Check that there is one run for each seed of the track."""
    stated, used = sorted(run.seed for run in entry.run), sorted(run.recipe.seed for run in runs)
    if stated == used == sorted(track.seeds):
        return []
    return [f"seeds {used} in the recipes, {stated} in {ENTRY}, {sorted(track.seeds)} in the track"]


def recipe_problems(folder: Path, runs: Sequence[Run]) -> list[str]:
    """Check that all runs have the entry's recipe but for the seed, the same plan, random weights and no plugin."""
    shared, problems = load_recipe(folder / RunLayout.RECIPE), list[str]()
    for run in runs:
        name, recipe = run.folder.name, run.recipe
        for field in dataclasses.fields(Recipe):
            if field.name != "seed" and getattr(recipe, field.name) != getattr(shared, field.name):
                problems.append(f"{name}: [{field.name}] differs from {RunLayout.RECIPE} of the entry")
        steps = [(stage.steps, stage.batch_tokens, stage.max_seq_len) for stage in run.plan.stages]
        if steps != [(stage.steps, stage.batch_tokens, stage.max_seq_len) for stage in runs[0].plan.stages]:
            problems.append(f"{name}: its plan differs from that of {runs[0].folder.name}")
        if recipe.init.model or recipe.init.required:
            problems.append(f"{name}: starts from a model, not from random weights")
        if recipe.train.budget.unit == "seconds":
            problems.append(f"{name}: has a budget in seconds, whose plan depends on the machine")
        if run.recipe.plugins or run.environment.get("plugins"):
            problems.append(f"{name}: runs a plugin, whose code is not part of unmask")
    return problems


def log_problems(run: Run) -> list[str]:
    """Check that steps, tokens and times of a log only grow and agree with each other and with the plan."""
    problems: list[str] = []
    if not run.validations:
        problems.append("the log has no validation")
    for before, after in pairwise(run.log):
        problems += [
            f"{name} falls from {before[name]} to {after[name]} at step {after['step']}"
            for name in ("step", "tokens", "seconds", "training_seconds")
            if after[name] < before[name]
        ]
    for line in run.log:
        step = int(line["step"])
        if line["training_seconds"] > line["seconds"] + _CLOCK:
            problems.append(f"step {step}: more seconds of training than of the run")
        phases = line.get("phase_seconds")
        if phases and abs(sum(phases.values()) - line["training_seconds"]) > _CLOCK:
            problems.append(f"step {step}: the phases don't add up to training_seconds")
        if step > run.plan.steps:
            problems.append(f"step {step}: the plan has {run.plan.steps} steps")
        elif line["tokens"] < planned_tokens(run.plan, step):
            problems.append(f"step {step}: {line['tokens']:,} tokens, {planned_tokens(run.plan, step):,} are planned")
    lines = [line for line in run.log if "tokens_per_second" in line]
    for before, after in pairwise([{"tokens": 0, "seconds": 0.0}, *lines]):
        least = (after["tokens"] - before["tokens"]) / max(after["tokens_per_second"], 1e-9)
        if after["seconds"] - before["seconds"] < least * (1 - _SPEED) - _CLOCK:
            problems.append(f"step {after['step']}: seconds contradict tokens_per_second")
    return problems


def planned_tokens(plan: Plan, steps: int) -> int:
    """Return the least number of tokens of the first steps of a plan."""
    return sum(stage.batch_tokens * max(0, min(stage.steps, steps - stage.first_step)) for stage in plan.stages)


def mask_problems(track: Track, run: Run) -> list[str]:
    """Check that every validation was on the frozen masks, and that bits per character follow from the loss."""
    problems: list[str] = []
    for line in run.validations:
        result, step = line["validation"], line["step"]
        if result["masked_tokens"] != track.masked_tokens:
            problems.append(f"step {step}: {result['masked_tokens']:,} masked tokens, not {track.masked_tokens:,}")
        if not math.isclose(result["unigram_loss"], track.unigram_loss, rel_tol=_EQUAL):
            problems.append(f"step {step}: unigram loss {result['unigram_loss']:.6f}, not {track.unigram_loss:.6f}")
        if not math.isclose(result["bits_per_character"], track.bits_per_character(result["loss"]), rel_tol=_EQUAL):
            problems.append(f"step {step}: bits per character don't follow from the loss")
    return problems


def time_problems(entry: Entry, target: float, runs: Sequence[Run]) -> list[str]:
    """Compare the stated times with the first validation at or below the target."""
    problems: list[str] = []
    if entry.target_bits_per_character != target:
        problems.append(f"the target of the track is {target}, not {entry.target_bits_per_character}")
    for stated, run in zip(entry.run, runs, strict=True):
        line, name = run.first_at(target), run.folder.name
        if line is None:
            problems.append(f"{name}: never reaches {target} bits per character")
            continue
        measured = (line["step"], line["seconds"], line["validation"]["bits_per_character"])
        if (stated.step, stated.seconds, stated.bits_per_character) != measured:
            problems.append(
                f"{name}: {stated.seconds} s at step {stated.step} are stated, the log says {measured[1]} s at step "
                f"{measured[0]}"
            )
    if entry.run and entry.seconds != statistics.median(run.seconds for run in entry.run):
        problems.append(f"{entry.seconds} s are stated, which is not the median of the runs")
    return problems


def describe_run(run: Run, target: float) -> dict[str, Any]:
    """Return the figures of one run for the table."""
    line, machine = run.first_at(target), run.environment["determinism"]
    return {
        "seed": run.recipe.seed,
        "step": line["step"] if line else None,
        "seconds": line["seconds"] if line else None,
        "training_seconds": line["training_seconds"] if line else None,
        "bits_per_character": line["validation"]["bits_per_character"] if line else None,
        "steps": run.plan.steps,
        "device": machine.get("device_name"),
        "threads": machine["threads"],
        "matmul_flops_per_second": run.environment.get("matmul_flops_per_second"),
    }


# Packing --------------------------------------------------------------------------------------------------------------


def reevaluate(run: Run, text: Path | None) -> bool:
    """Evaluate the last checkpoint of a run again, in float32, and compare it with the last validation of the log.

    Returns:
        False if the checkpoint or the text is not there.

    Raises:
        RunError: the loss differs from that of the log.
    """
    if not (run.folder / RunLayout.LATEST).exists() or not run.validations:
        return False
    paths = [text] if text else [Path(path) for path in run.environment["text"]["paths"]]
    if not paths or not all(path.is_file() for path in paths):
        return False
    data = run.recipe.data
    source = open_text(paths, data) if text else reopen_text(run.folder, run.environment, data)
    if source.fingerprint != run.environment["text"]["fingerprint"]:
        raise TextError("this is not the text of the run", location=str(text), hint="name the text of the track")
    threads = min(run.environment["determinism"]["threads"], cores())
    context = init_distributed("float32", threads, run.recipe.train.device)
    tokenizer = load_run_tokenizer(run.folder, run.environment)
    corpus = prepare_corpus(run.recipe, source, lambda stage, fraction: None, tokenizer)
    length = run.recipe.stage[-1].max_seq_len
    documents = documents_from_shards(corpus.held_out)
    eval_set = build_eval_set(documents, tokenizer, length, corpus.train.token_counts)
    model = load(run.folder / RunLayout.LATEST)
    result = evaluate(model.encoder.to(context.device), model.head.to(context.device), eval_set, context)
    logged = run.validations[-1]["validation"]["loss"]
    if not math.isclose(result.loss, logged, rel_tol=_REEVALUATED):
        raise RunError(
            f"the last checkpoint has a loss of {result.loss:.4f}, its log says {logged:.4f}",
            location=str(run.folder),
            hint="pack the run as unmask wrote it",
        )
    return True


def without_folders(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of env.json with names of files instead of paths on this machine."""
    text = {name: value for name, value in environment["text"].items() if name != "held_out_shards"}
    text["paths"] = [Path(path).name for path in text["paths"]]
    command = [Path(part).name if Path(part).is_absolute() else part for part in environment.get("command", [])]
    return {**environment, "command": command, "text": text}


def copy_run(run: Run, entry: Path) -> dict[str, str]:
    """Copy the files of a run into an entry; return the digests of the files."""
    folder = entry / run_folder(run.recipe.seed)
    folder.mkdir()
    for name in (RunLayout.RECIPE, RunLayout.LOG):
        shutil.copyfile(run.folder / name, folder / name)
    files.write_json(folder / RunLayout.ENVIRONMENT, without_folders(run.environment))
    return {name: file_sha256(folder / name) for name in RUN_FILES}


def make(
    folder: Path, runs: Sequence[Path], *, about: str, author: str, track_name: str, tracks: Path, text: Path | None
) -> Report:
    """Pack runs as an entry. The entry is written only if it passes all checks.

    Args:
        folder: Folder of the entry; it must not exist.
        runs: Folders of the runs, one for each seed of the track.
        about: What is new, for README.md.
        author: Name of the author.
        track_name: Name of the track.
        tracks: File with the tracks.
        text: The text, if it is not where the runs read it.

    Raises:
        UnmaskError: a run can't be read or doesn't reach the target, or the entry exists.
    """
    if folder.exists():
        raise RunError("the entry exists already", location=str(folder), hint="choose another name, or delete it")
    _, target = open_track(track_name, tracks)
    with damage_reported(folder):
        read = sorted((read_run_files(path) for path in runs), key=lambda run: run.recipe.seed)
    if len({run.recipe.seed for run in read}) < len(read):
        raise RunError(
            "two runs have the same seed", location=join_names(list(map(str, runs))), hint="run each seed once"
        )
    with tempfile.TemporaryDirectory() as temporary, damage_reported(folder):
        packed = Path(temporary) / folder.name
        packed.mkdir()
        stated = []
        for run in read:
            line = run.first_at(target)
            if line is None:
                raise RunError(
                    f"the run never reaches {target} bits per character",
                    location=str(run.folder),
                    hint="train longer, or with another recipe",
                )
            reached = (int(line["step"]), line["seconds"], line["validation"]["bits_per_character"])
            stated.append(EntryRun(run.recipe.seed, *reached, reevaluate(run, text), copy_run(run, packed)))
        median = statistics.median(run.seconds for run in stated)
        today = date.today().isoformat()
        entry = Entry(track_name, about, author, today, target, median, tuple(stated))
        files.write_text(packed / ENTRY, tomli_w.dumps(json.loads(json.dumps(asdict(entry)))))
        tree = tomllib.loads((read[0].folder / RunLayout.RECIPE).read_text(encoding="utf-8"))
        shared = {key: value for key, value in tree.items() if key not in ("seed", "plan")}
        files.write_text(packed / RunLayout.RECIPE, tomli_w.dumps(shared))
        files.write_text(packed / README, f"# {folder.name}\n\n{about}\n\n{author}, {today}\n")
        report = check(packed, tracks, text)
        if report.passes:
            with files.atomic_directory(folder) as written:
                shutil.copytree(packed, written, dirs_exist_ok=True)
    return dataclasses.replace(report, entry=str(folder))


# Command line ---------------------------------------------------------------------------------------------------------


def table(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of the table of runs."""

    def shown(value: float | None, form: str) -> str:
        return "not reached" if value is None else format(value, form)

    header = ("seed", "step", "seconds", "training seconds", "bits per character", "device", "threads", "TFLOP/s")
    rows = [
        (
            str(row["seed"]),
            f"{shown(row['step'], ',')} of {row['steps']:,}",
            shown(row["seconds"], ".2f"),
            shown(row["training_seconds"], ".2f"),
            shown(row["bits_per_character"], ".4f"),
            str(row["device"]),
            str(row["threads"]),
            "" if row["matmul_flops_per_second"] is None else f"{row['matmul_flops_per_second'] / 1e12:.2f}",
        )
        for row in report.runs
    ]
    return header, rows


def print_report(report: Report) -> None:
    """Print a table in a terminal, plain lines in a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    header, rows = table(report)
    print(f"{report.entry}: track {report.track}, target {report.target_bits_per_character} bits per character")
    if console.is_terminal:
        styled = Table(box=None, pad_edge=False)
        for name in header:
            styled.add_column(name, overflow="fold")
        for row in rows:
            styled.add_row(*row)
        console.print(styled)
    else:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    for finding in report.findings:
        console.print(Text(f"{finding.check}: {'fails' if finding.problems else 'passes'}",
                           "red" if finding.problems else "green"))  # fmt: skip
        for problem in finding.problems:
            print(f"  {problem}")
    seconds = "not reached by all runs" if report.seconds is None else f"{report.seconds:.2f} s"
    print(f"time, median: {seconds}; stated: {report.stated_seconds:.2f} s")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="check an entry")
    making = commands.add_parser("make", help="pack runs as an entry")
    for command in (checking, making):
        command.add_argument("entry", type=Path, help="folder of the entry, below that of its track")
        command.add_argument("--text", type=Path, help="text of the track")
        command.add_argument("--tracks", type=Path, default=TRACKS, help="file with the tracks")
        command.add_argument("--json", action="store_true", help="print JSON")
    making.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, one for each seed")
    making.add_argument("--about", required=True, help="description of what is new, for README.md")
    making.add_argument("--author", required=True, help="name of the author")
    making.add_argument("--track", help="name of the track; default: the folder above the entry")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check or pack an entry and print the report; return the exit code."""
    given = parse_arguments(arguments)
    try:
        if given.command == "make":
            report = make(
                given.entry,
                given.runs,
                about=given.about,
                author=given.author,
                track_name=given.track or given.entry.absolute().parent.name,
                tracks=given.tracks,
                text=given.text,
            )
        else:
            report = check(given.entry, given.tracks, given.text)
    except UnmaskError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if given.json:
        print(json.dumps({**asdict(report), "passes": report.passes}, indent=1))
    else:
        print_report(report)
    return 0 if report.passes else FAILED


if __name__ == "__main__":
    sys.exit(main())
