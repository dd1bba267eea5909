"""Room card: the verb audit.

Comes in: a masker (ours by a recipe, one of transformers, a callable of a person's own), text and a tokenizer. Goes
out: a table of what was found. Called by: door.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from unmask.cli.answer import Debug, Json, print_json
from unmask.cli.pretrain import Errors, Field, Rule
from unmask.cli.recipe import Settings
from unmask.cli.tokenizer import TokenizerAt, open_tokenizer
from unmask.errors import RecipeError

if TYPE_CHECKING:
    from unmask.audit.maskers import Collator, Function, Ours
    from unmask.audit.report import AuditReport
    from unmask.audit.settings import Claims
    from unmask.blueprint import Recipe
    from unmask.text.tokenizer import Tokenizer
    from unmask.text.words import WordsRule

FOUND = 1  # the exit code where something was found
OURS = "ours"
_ENGLISH_CHARACTERS = 1_000_000  # gathered within 2 s, they give a vocabulary of 8,192
EXAMPLES = """\
[bold]Examples[/bold]

unmask audit                                             our own masking, on the English that every Python carries
unmask audit --recipe tiny --set objective.choose=word --text notes.txt --tokenizer runs/notes/latest
unmask audit transformers:whole-word --text notes.txt --tokenizer pieces
unmask audit mylab.masks:hide --text notes.txt --tokenizer pieces --rate 0.3 --split 100/0/0 --json

Exit code 1 where something was found, 0 where all is well.
"""
_MARKS = {"well": ("✓", "green"), "found": ("✗", "bold red"), "noted": ("·", "dim"), "untested": ("–", "dim")}
_PLAIN = {"well": "ok", "found": "FOUND", "noted": "noted", "untested": "untested"}


def audit(
    masker: Annotated[
        str,
        typer.Argument(
            metavar="[MASKER]", help="ours, transformers[:whole-word][,seeded], or package.module:name of a callable."
        ),
    ] = OURS,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="FILE", help="Text to mask; may be repeated.", show_default="Python's own"),
    ] = None,
    tokenizer: TokenizerAt = None,
    recipe: Annotated[str, typer.Option(help="Whose masking and tokenizer are meant.")] = "tiny",
    settings: Settings = None,
    progress: Annotated[float, typer.Option(help="Where in a run, 0 to 1: for a rate that changes over it.")] = 0.0,
    samples: Annotated[int, typer.Option(help="How many samples are masked in each epoch.")] = 2048,
    length: Annotated[int, typer.Option(help="Slots of a sample, special pieces included.")] = 128,
    epochs: Annotated[int, typer.Option(help="How often each sample is masked.")] = 2,
    workers: Annotated[int, typer.Option(help="Processes of each rank's DataLoader; 0 for none.")] = 2,
    ranks: Annotated[int, typer.Option(help="Ranks, one after the other, each with samples of its own.")] = 2,
    seed: Annotated[int, typer.Option(help="Of all that the audit draws, and of what it seeds.")] = 0,
    seeds: Annotated[
        Literal["apart", "alike"], typer.Option(help="Whether ranks seed the global generators each for itself.")
    ] = "apart",
    rate: Annotated[
        float | None, typer.Option(help="The rate that is promised.", show_default="the masker's own, else 0.15")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="M/R/K", help="Masked, random, kept.", show_default="the masker's own, else 80/10/10"),
    ] = None,
    units: Annotated[
        Literal["tokens", "words", "spans"] | None,
        typer.Option(help="What is promised to be hidden whole.", show_default="the masker's own, else tokens"),
    ] = None,
    errors: Errors = None,
    document: Rule = None,
    field: Field = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Judge a masker by its inputs and outputs alone: rates, split, special pieces, whole words, repeats.

    A callable takes a tensor of ids and gives (inputs, labels), labels -100 where nothing is asked. Naming one imports
    its module, which runs it. The same command finds the same, number for number.
    """
    from unmask.audit.judge import audit as judge
    from unmask.audit.settings import AuditSettings
    from unmask.blueprint import load_recipe
    from unmask.cli.look import patient
    from unmask.text.words import detect_words
    from unmask.train.show import for_stream

    watched = AuditSettings(samples, length, min(16, max(2, samples // 64)), epochs, workers, ranks, seed, seeds)
    flags = {"text.errors": errors, "text.document": document, "text.field": field}
    whole = load_recipe(recipe, settings or (), {key: value for key, value in flags.items() if value is not None})
    display = for_stream(sys.stderr)
    try:
        shown = patient(display)
        texts = _texts(text or [], whole)
        opened = _tokenizer(tokenizer, texts, whole, shown)
        rule = whole.text.words
        words = detect_words("".join(texts)[:200_000]) if rule == "by-script" else rule
        taken = _masker(masker, whole, opened, words, seed, progress, display.say)
        taken.claims = _claims(taken.claims, rate, split, units)
        report = judge(taken, texts, opened, settings=watched, words=words, progress=shown)
    finally:
        display.close()
    _tell(report, as_json)
    if not report.passed:
        raise typer.Exit(FOUND)


def _tell(report: AuditReport, as_json: bool) -> None:
    if as_json:
        print_json({**asdict(report), "passed": report.passed, "found": report.found,
                    "false_alarm": report.false_alarm})  # fmt: skip
    else:
        _print(report)


def _texts(named: Sequence[str], recipe: Recipe) -> list[str]:
    """The beginning of what was named, else of Python's own English."""
    from unmask.audit.material import MOST_CHARACTERS
    from unmask.text.fertility import some_text
    from unmask.text.library import english_of_python
    from unmask.text.opening import open_source

    if named:
        return list(some_text(open_source(named, recipe.text), MOST_CHARACTERS))
    return english_of_python(_ENGLISH_CHARACTERS)


def _tokenizer(path: Path | None, texts: Sequence[str], recipe: Recipe, progress: Any) -> Tokenizer:
    from unmask.text.tokenizer import train_tokenizer

    if path is not None:
        return open_tokenizer(path)
    return train_tokenizer(iter(texts), recipe.text.tokenizer, progress)


def _masker(
    name: str,
    recipe: Recipe,
    tokenizer: Tokenizer,
    words: WordsRule,
    seed: int,
    progress: float,
    say: Callable[[str], object],
) -> Ours | Function | Collator:
    """The masker that a person named."""
    from unmask.audit.library import LIBRARY, library_collator
    from unmask.audit.maskers import Ours, claims_of_settings, masker_of
    from unmask.audit.settings import Claims
    from unmask.objectives.masking import MaskingSettings
    from unmask.outside import find_object

    if name == OURS:
        from unmask.questions import build_objective

        asked = recipe.objective
        claims = claims_of_settings(asked, progress) if isinstance(asked, MaskingSettings) else Claims()
        objective = build_objective(recipe, tokenizer, words, say)
        return Ours(objective, recipe.seed, f"unmask, recipe {recipe.name}", claims, progress)
    if name.partition(":")[0] == LIBRARY:
        return library_collator(name, tokenizer, seed)
    return masker_of(find_object(name), tokenizer, recipe.seed)


def _claims(own: Claims, rate: float | None, split: str | None, units: str | None) -> Claims:
    changed: dict[str, Any] = {}
    if rate is not None:
        changed["rate"] = rate
    if split is not None:
        parts = split.split("/")
        try:
            shares = [float(part) / 100.0 for part in parts]
        except ValueError:
            shares = []
        if len(shares) != 3:
            raise RecipeError(f"`{split}` is no split", where="--split", next="write three shares: --split 80/10/10")
        changed.update(zip(("mask", "random", "keep"), shares, strict=True))
    if units is not None:
        changed["units"] = units
    return replace(own, **changed)


def _print(report: AuditReport) -> None:
    """A table in a terminal, plain lines in a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    claims = report.claims
    head = (
        f"{report.masker}: {claims.rate:.4g} of the {claims.units}, "
        f"{claims.mask:.0%}/{claims.random:.0%}/{claims.keep:.0%} promised; {report.samples:,} samples, "
        f"{report.settings.epochs} epochs, {report.settings.workers} workers, {report.settings.ranks} ranks, "
        f"{report.pieces:,} pieces, words by {report.words}"
    )
    found = f"{len(report.found)} found: {', '.join(report.found)}" if report.found else "all is well"
    tail = f"{found} (a masker that keeps its promises fails by chance in {report.false_alarm:.0e} of all audits)"
    if not console.is_terminal:
        print(head)
        for finding in report.findings:
            print(f"{_PLAIN[finding.verdict]:<9} {finding.name:<24} {finding.says}")
        for note in report.notes:
            print(f"note: {note}")
        print(tail)
        return
    console.print(Text(head, "bold"))
    table = Table(box=None, pad_edge=False)
    for column in ("", "what", "seen"):
        table.add_column(column, overflow="fold")
    holds_all = (sys.stdout.encoding or "").lower().startswith("utf")
    for finding in report.findings:
        mark, style = _MARKS[finding.verdict]
        table.add_row(Text(mark if holds_all else _PLAIN[finding.verdict], style), Text(finding.name, style),
                      Text(finding.says, style if finding.verdict == "found" else ""))  # fmt: skip
    console.print(table)
    for note in report.notes:
        console.print(Text(f"note: {note}", "yellow"))
    console.print(Text(tail, "bold red" if report.found else "bold green"))
