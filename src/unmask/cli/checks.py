"""Room card: the verb audit.

Comes in: a masker (ours by a recipe, one of transformers, a callable of a person's own), text and a tokenizer. Goes
out: a table of what was found. Called by: door.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from unmask.cli.options import Debug, Errors, Field, Json, Rule, Settings, TokenizerAt, open_tokenizer, print_json
from unmask.core.errors import RecipeError

if TYPE_CHECKING:
    from unmask.checks.audit.maskers import Collator, Function, ObjectiveMasker
    from unmask.checks.audit.settings import AuditReport, Claims
    from unmask.checks.plugins import CheckReport
    from unmask.tokenization.tokenizer import Tokenizer
    from unmask.tokenization.words import WordsRule
    from unmask.training.recipe import Recipe


FOUND = 1  # the exit code where something was found
OURS = "ours"
_ENGLISH_CHARACTERS = 1_000_000  # gathered within 2 s, they give a vocabulary of 8,192
AUDIT_EXAMPLES = """\
[bold]Examples[/bold]

unmask audit                                             our own masking, on the English that every Python carries
unmask audit --recipe tiny --set objective.mask_unit=whole-word --text notes.txt --tokenizer runs/notes/latest
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
    from unmask.checks.audit import audit as judge
    from unmask.checks.audit.settings import AuditConfig
    from unmask.cli.data import patient
    from unmask.tokenization.words import detect_words
    from unmask.training.pretrain import for_stream
    from unmask.training.recipe import load_recipe

    watched = AuditConfig(samples, length, min(16, max(2, samples // 64)), epochs, workers, ranks, seed, seeds)
    flags = {"data.errors": errors, "data.document": document, "data.field": field}
    whole = load_recipe(recipe, settings or (), {key: value for key, value in flags.items() if value is not None})
    display = for_stream(sys.stderr)
    try:
        shown = patient(display)
        texts = _texts(text or [], whole)
        opened = _tokenizer(tokenizer, texts, whole, shown)
        rule = whole.data.words
        words = detect_words("".join(texts)[:200_000]) if rule == "auto" else rule
        taken = _masker(masker, whole, opened, words, seed, progress, display.message)
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
        _print_audit(report)


def _texts(named: Sequence[str], recipe: Recipe) -> list[str]:
    """The beginning of what was named, else of Python's own English."""
    from unmask.checks.audit.samples import MOST_CHARACTERS
    from unmask.data.sources import open_source
    from unmask.tokenization.analysis import some_text
    from unmask.training.demo import english_of_python

    if named:
        return list(some_text(open_source(named, recipe.data), MOST_CHARACTERS))
    return english_of_python(_ENGLISH_CHARACTERS)


def _tokenizer(path: Path | None, texts: Sequence[str], recipe: Recipe, progress: Any) -> Tokenizer:
    from unmask.tokenization.tokenizer import train_tokenizer

    if path is not None:
        return open_tokenizer(path)
    return train_tokenizer(iter(texts), recipe.data.tokenizer, progress)


def _masker(
    name: str,
    recipe: Recipe,
    tokenizer: Tokenizer,
    words: WordsRule,
    seed: int,
    progress: float,
    say: Callable[[str], object],
) -> ObjectiveMasker | Function | Collator:
    """The masker that a person named."""
    from unmask.checks.audit.maskers import LIBRARY, ObjectiveMasker, claims_of_settings, library_collator, masker_of
    from unmask.checks.audit.settings import Claims
    from unmask.core.plugins import find_object
    from unmask.objectives.masking import MaskingConfig

    if name == OURS:
        from unmask.training.setup import build_objective

        asked = recipe.objective
        claims = claims_of_settings(asked, progress) if isinstance(asked, MaskingConfig) else Claims()
        objective = build_objective(recipe, tokenizer, words, say)
        return ObjectiveMasker(objective, recipe.seed, f"unmask, recipe {recipe.name}", claims, progress)
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
            raise RecipeError(f"`{split}` is no split", location="--split", hint="write three shares: --split 80/10/10")
        changed.update(zip(("mask", "random", "keep"), shares, strict=True))
    if units is not None:
        changed["units"] = units
    return replace(own, **changed)


def _print_audit(report: AuditReport) -> None:
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


BROKEN = 2  # the exit code where a law is broken: a person can mend it
CHECK_EXAMPLES = """\
[bold]Examples[/bold]

unmask check-plugin mylab.spans:Spans
unmask check-plugin mylab.spans:Spans --settings mean_words=4
unmask check-plugin mylab.logs:LogLines access.log            a source, with what it shall read
"""


def check_plugin_command(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="package.module:Name of a class of your own.")],
    texts: Annotated[list[Path] | None, typer.Argument(metavar="[TEXT]...", help="What a source shall read.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--settings", metavar="KEY=VALUE", help="One of its settings; may be repeated.")
    ] = None,
    role: Annotated[
        Literal["objective", "sampler", "source"] | None,
        typer.Option(help="What it shall be.", show_default="told by its methods"),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check an objective, a sampler or a source of your own by the laws that ours keep.

    The module is imported, which runs it. Exit code 2 where a law is broken.
    """
    from unmask.checks.plugins import check_plugin as checked_by_laws

    checked = checked_by_laws(kind, settings or (), texts or (), role or "")
    if as_json:
        print_json({**asdict(checked), "passed": checked.passed})
    else:
        _print_check(checked)
    if not checked.passed:
        raise typer.Exit(BROKEN)


def _print_check(checked: CheckReport) -> None:
    yes, no = ("✓", "✗") if (sys.stdout.encoding or "").lower().startswith("utf") else ("ok", "NO")
    print(checked.notes)
    for line in checked.settings.splitlines()[1:]:
        print(f"  {line}")
    print()
    wide = max(len(verdict.check) for verdict in checked.results)
    for verdict in checked.results:
        print(f"{yes if verdict.passed else no:<2} {verdict.check:<{wide}}  {verdict.sentence.splitlines()[0]}")
        if verdict.detail:
            print(textwrap.indent(textwrap.fill(verdict.detail, 110), "     "))
    kept = sum(verdict.passed for verdict in checked.results)
    print(f"\n{kept} of {len(checked.results)} laws are kept")
    if not checked.passed:
        first = next(verdict for verdict in checked.results if not verdict.passed)
        print(f'  next:  mend "{first.check}" first, then check again; docs/extending.md has an example that keeps all')
