"""Commands that check masking code, runs and this machine: audit of maskers, plugins, repeated runs, speed."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from unmask.cli.options import (
    AllowCode,
    DataOptions,
    DocumentRule,
    Errors,
    Field,
    Json,
    OptionalTexts,
    Settings,
    Threads,
    TokenizerPath,
    complete_model,
    complete_recipe,
    delayed_progress,
    is_unicode_output,
    load_recipe_with,
    open_display,
    open_tokenizer,
    print_json,
)
from unmask.core.errors import RecipeError

if TYPE_CHECKING:
    from unmask.checks.audit.maskers import CallableMasker, CollatorMasker, ObjectiveMasker
    from unmask.checks.audit.settings import AuditReport, Claims
    from unmask.checks.bench import BenchedModel, BenchReport, Row
    from unmask.checks.plugins import CheckReport
    from unmask.checks.verify import Verification
    from unmask.core.types import ProgressCallback
    from unmask.tokenization.tokenizer import Tokenizer
    from unmask.tokenization.words import WordsRule
    from unmask.training.recipe import Recipe

# audit --------------------------------------------------------------------------------------------------------------

CHECK_FAILED = 3  # exit code: everything ran, and a check failed; 2 is an error of the user
OWN_MASKER = "unmask"  # the masker of a recipe
AUDIT_EXAMPLES = """\
[bold]Examples[/bold]

unmask audit                                             audit unmask's masking on the documentation of Python
unmask audit --recipe tiny --set objective.mask_unit=whole-word --text notes.txt --tokenizer runs/notes/latest
unmask audit transformers:whole-word --text notes.txt --tokenizer my-tokenizer
unmask audit mylab.masks:mask_tokens --text notes.txt --tokenizer my-tokenizer --rate 0.3 --split 100/0/0 --json

Exit code 0 if all checks pass, 3 if a check fails, 2 for an error in the command.
"""
_ENGLISH_CHARACTERS = 1_000_000  # read within 2 s; enough for a vocabulary of 8,192
_DETECT_CHARACTERS = 200_000  # enough to recognize the script
_SYMBOLS = {"pass": ("✓", "green"), "fail": ("✗", "bold red"), "info": ("·", "dim"), "skipped": ("–", "dim")}
_LABELS = {"pass": "pass", "fail": "FAIL", "info": "info", "skipped": "skipped"}


def audit_masker(
    masker: Annotated[
        str,
        typer.Argument(
            metavar="[MASKER]", help="Masker: unmask, transformers\\[:whole-word]\\[,seeded], or package.module:name."
        ),
    ] = OWN_MASKER,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", metavar="FILE", help="Text to mask; may be repeated.", show_default="documentation of Python"
        ),
    ] = None,
    tokenizer: TokenizerPath = None,
    recipe: Annotated[str, typer.Option(help="Recipe with the masking and the tokenizer.")] = "tiny",
    settings: Settings = None,
    train_fraction: Annotated[
        float, typer.Option(help="Training progress, 0 to 1, for masking rates that change in training.")
    ] = 0.0,
    samples: Annotated[int, typer.Option(help="Number of samples to mask per epoch.")] = 2048,
    length: Annotated[int, typer.Option(help="Length of a sample in tokens, special tokens included.")] = 128,
    epochs: Annotated[int, typer.Option(help="Number of times that each sample is masked.")] = 2,
    workers: Annotated[int, typer.Option(help="Number of DataLoader processes per rank; 0 for none.")] = 2,
    ranks: Annotated[int, typer.Option(help="Number of ranks, run one after the other on different samples.")] = 2,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    seeds: Annotated[
        Literal["apart", "alike"],
        typer.Option(help="Seeds of the global generators in the ranks: different (apart) or equal."),
    ] = "apart",
    rate: Annotated[
        float | None, typer.Option(help="Claimed masking rate.", show_default="the masker's, else 0.15")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="M/R/K",
            help="Claimed percentages of [MASK], random and kept tokens.",
            show_default="the masker's, else 80/10/10",
        ),
    ] = None,
    units: Annotated[
        Literal["tokens", "words", "spans"] | None,
        typer.Option(help="Claimed unit that is masked as a whole.", show_default="the masker's, else tokens"),
    ] = None,
    errors: Errors = None,
    document: DocumentRule = None,
    field: Field = None,
    as_json: Json = False,
) -> None:
    """Audit a masker by its inputs and outputs: masking rate, split, special tokens, whole words and repeats.

    A callable takes a tensor of ids and returns (inputs, labels), with label -100 for tokens that aren't masked. Its
    module is imported. Repeating a command repeats its numbers.
    """
    from unmask.checks.audit import audit
    from unmask.checks.audit.settings import AuditConfig
    from unmask.tokenization.words import detect_words

    config = AuditConfig(samples, length, min(16, max(2, samples // 64)), epochs, workers, ranks, seed, seeds)
    resolved = load_recipe_with(recipe, settings, DataOptions(errors, document, field))
    with open_display(sys.stderr) as display:
        on_progress = delayed_progress(display)
        texts = _audit_texts(text or [], resolved)
        loaded = _audit_tokenizer(tokenizer, texts, resolved, on_progress)
        rule = resolved.data.words
        words = detect_words("".join(texts)[:_DETECT_CHARACTERS]) if rule == "auto" else rule
        opened_masker = _open_masker(masker, resolved, loaded, words, seed, train_fraction)
        opened_masker.claims = _claims(opened_masker.claims, rate, split, units)
        report = audit(opened_masker, texts, loaded, settings=config, words=words, progress=on_progress)
    if as_json:
        print_json({**asdict(report), "passed": report.passed, "failed": report.failed,
                    "false_alarm": report.false_alarm})  # fmt: skip
    else:
        _print_audit(report)
    if not report.passed:
        raise typer.Exit(CHECK_FAILED)


def _audit_texts(names: Sequence[str], recipe: Recipe) -> list[str]:
    """Return the beginning of the named texts; without names, the documentation of Python."""
    from unmask.checks.audit.maskers import MAX_CHARACTERS
    from unmask.data.sources import open_source
    from unmask.tokenization.analysis import first_texts
    from unmask.training.demo import python_documentation

    if names:
        return list(first_texts(open_source(names, recipe.data), MAX_CHARACTERS))
    return python_documentation(_ENGLISH_CHARACTERS)


def _audit_tokenizer(
    path: Path | None, texts: Sequence[str], recipe: Recipe, on_progress: ProgressCallback
) -> Tokenizer:
    from unmask.tokenization.tokenizer import train_tokenizer

    if path is not None:
        return open_tokenizer(path)
    return train_tokenizer(iter(texts), recipe.data.tokenizer, on_progress)


def _open_masker(
    name: str, recipe: Recipe, tokenizer: Tokenizer, words: WordsRule, seed: int, train_fraction: float
) -> ObjectiveMasker | CallableMasker | CollatorMasker:
    """Return the masker that is named on the command line."""
    from unmask.checks.audit.maskers import (
        LIBRARY,
        ObjectiveMasker,
        claims_of_config,
        open_masker,
        transformers_collator,
    )
    from unmask.checks.audit.settings import Claims
    from unmask.core.plugins import find_object
    from unmask.objectives.masking import MaskingConfig

    if name == OWN_MASKER:
        from unmask.objectives.word_boost import resolve_word_list
        from unmask.training.setup import build_objective

        masking = recipe.objective
        claims = claims_of_config(masking, train_fraction) if isinstance(masking, MaskingConfig) else Claims()
        recipe = replace(recipe, objective=resolve_word_list(recipe.objective))
        objective = build_objective(recipe.objective, recipe, tokenizer, words)
        return ObjectiveMasker(objective, recipe.seed, f"unmask, recipe {recipe.name}", claims, train_fraction)
    if name.partition(":")[0] == LIBRARY:
        return transformers_collator(name, tokenizer, seed)
    return open_masker(find_object(name), tokenizer, recipe.seed)


def _claims(claims: Claims, rate: float | None, split: str | None, units: str | None) -> Claims:
    """Return the claims, changed by --rate, --split and --units."""
    changes: dict[str, Any] = {}
    if rate is not None:
        changes["rate"] = rate
    if split is not None:
        try:
            shares = [float(part) / 100.0 for part in split.split("/")]
        except ValueError:
            shares = []
        if len(shares) != 3:
            raise RecipeError(
                f"invalid split: got {split}, expected three percentages",
                location="--split",
                hint="write it as --split 80/10/10",
            )
        changes.update(zip(("mask", "random", "keep"), shares, strict=True))
    if units is not None:
        changes["units"] = units
    return replace(claims, **changes)


def _print_audit(report: AuditReport) -> None:
    """Print a table in a terminal, plain lines in a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    claims = report.claims
    title = (
        f"{report.masker}: claims {claims.rate:.4g} of the {claims.units}, "
        f"{claims.mask:.0%}/{claims.random:.0%}/{claims.keep:.0%}; {report.samples:,} samples, "
        f"{report.settings.epochs} epochs, {report.settings.workers} workers, {report.settings.ranks} ranks, "
        f"{report.vocab_size:,} tokens in the vocabulary, words by {report.words}"
    )
    failed = f"{len(report.failed)} failed: {', '.join(report.failed)}" if report.failed else "all checks passed"
    result = f"{failed} (chance that a correct masker fails: {report.false_alarm:.0e})"
    if not console.is_terminal:
        print(title)
        for finding in report.findings:
            print(f"{_LABELS[finding.verdict]:<9} {finding.name:<24} {finding.detail}")
        for note in report.notes:
            print(f"note: {note}")
        print(result)
        return
    console.print(Text(title, "bold"))
    table = Table(box=None, pad_edge=False)
    for column in ("", "check", "result"):
        table.add_column(column, overflow="fold")
    for finding in report.findings:
        symbol, style = _SYMBOLS[finding.verdict]
        table.add_row(
            Text(symbol if is_unicode_output() else _LABELS[finding.verdict], style),
            Text(finding.name, style),
            Text(finding.detail, style if finding.verdict == "fail" else ""),
        )
    console.print(table)
    for note in report.notes:
        console.print(Text(f"note: {note}", "yellow"))
    console.print(Text(result, "bold red" if report.failed else "bold green"))


# check-plugin -------------------------------------------------------------------------------------------------------

CHECK_PLUGIN_EXAMPLES = """\
[bold]Examples[/bold]

unmask check-plugin mylab.spans:Spans
unmask check-plugin mylab.spans:Spans --settings mean_words=4
unmask check-plugin mylab.logs:LogLines access.log            a source, with the text that it reads
"""
_TEXT_WIDTH = 110


def check_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Class of the plugin: package.module:Name.")],
    texts: Annotated[list[Path] | None, typer.Argument(metavar="[TEXT]...", help="Text for a source to read.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--settings", metavar="KEY=VALUE", help="Setting of the plugin; may be repeated."),
    ] = None,
    role: Annotated[
        Literal["objective", "sampler", "source", "logger"] | None,
        typer.Option(help="Type of the plugin.", show_default="recognized by its methods"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a plugin (objective, sampler, source or logger) against the rules that unmask's own classes follow.

    The module of the plugin is imported. Exit code 0 if all checks pass, 3 if a check
    fails, 2 for an error in the command.
    """
    from unmask.checks import plugins

    report = plugins.check_plugin(name, settings or (), texts or (), role or "")
    if as_json:
        print_json({**asdict(report), "passed": report.passed})
    else:
        _print_checks(report)
    if not report.passed:
        raise typer.Exit(CHECK_FAILED)


def _print_checks(report: CheckReport) -> None:
    passed, failed = ("✓", "✗") if is_unicode_output() else ("ok", "NO")
    print(report.notes)
    for line in report.settings.splitlines()[1:]:
        print(f"  {line}")
    print()
    width = max(len(result.check) for result in report.results)
    for result in report.results:
        symbol = passed if result.passed else failed
        print(f"{symbol:<2} {result.check:<{width}}  {result.sentence.splitlines()[0]}")
        if result.detail:
            print(textwrap.indent(textwrap.fill(result.detail, _TEXT_WIDTH), "     "))
    print(f"\n{sum(result.passed for result in report.results)} of {len(report.results)} checks passed")
    if not report.passed:
        first = next(result for result in report.results if not result.passed)
        print(f'  hint: fix "{first.check}" first, then check again; docs/extending.md has a complete example')


# verify -------------------------------------------------------------------------------------------------------------

VERIFY_EXAMPLES = """\
[bold]Examples[/bold]

unmask verify runs/notes                       from the last but one checkpoint to the last
unmask verify runs/notes --from 0              the whole run
unmask verify runs/notes --json

Exit code 0 if everything is equal, 3 if something differs, 2 for an error in the command.
"""


def verify_run(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", autocompletion=complete_model)],
    first: Annotated[
        int | None,
        typer.Option(
            "--from",
            min=0,
            help="Step of the checkpoint to begin with; 0 is the start of the run.",
            show_default="the last but one",
        ),
    ] = None,
    last: Annotated[
        int | None,
        typer.Option("--to", min=1, help="Step of the checkpoint to compare with.", show_default="the last"),
    ] = None,
    allow_different_environment: Annotated[
        bool,
        typer.Option(
            "--allow-different-environment",
            help="Compare although machine or versions differ; last digits will differ too.",
            show_default=False,
        ),
    ] = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Verify that a run can be repeated: train a part of it again in a new process and compare every bit.

    Weights, optimizer state, training state (learning rate, number of the next sample) and log are compared. The run
    is only read, and may go on meanwhile.
    """
    from unmask.checks.verify import verify
    from unmask.core.plugins import code_allowed

    with open_display(sys.stderr) as display, code_allowed(allow_code):
        found = verify(
            run,
            first_step=first,
            last_step=last,
            allow_different_environment=allow_different_environment,
            allow_code=allow_code,
            on_progress=delayed_progress(display),
        )
    if as_json:
        print_json({**asdict(found), "is_reproduced": found.is_reproduced})
    else:
        _print_verification(found)
    if not found.is_reproduced:
        raise typer.Exit(CHECK_FAILED)


def _print_verification(found: Verification) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    unicode = is_unicode_output()
    ranks = f", {found.ranks} ranks" if found.ranks > 1 else ""
    console.print(f"steps {found.first_step:,} to {found.last_step:,} trained again in {found.seconds:.0f} s{ranks}")
    for each in found.comparisons:
        symbol, style = _SYMBOLS["pass" if each.is_equal else "fail"]
        mark = symbol if unicode else ("pass" if each.is_equal else "FAIL")
        counted = f"{each.equal:,} of {each.compared:,} equal"
        first = f"; first difference: {each.first}" if each.first else ""
        console.print(f"{mark} {each.name:<16} {counted}{first}", style=style, markup=False)
    for change in found.environment:
        console.print(f"different now: {change}", markup=False)
    for what in found.left_out:
        console.print(f"not compared: {what}", markup=False)
    for reason in found.possible_reasons:
        console.print(f"possible reason: {reason}", markup=False)
    console.print("reproduced, bit for bit" if found.is_reproduced else "not reproduced")


# bench ----------------------------------------------------------------------------------------------------------------

BENCH_EXAMPLES = """\
[bold]Examples[/bold]

unmask bench                                   two minutes, on the documentation of Python
unmask bench notes.txt --recipe bert-mini
unmask bench --recipe tiny --recipe mine.toml --seconds 5 --json > bench.json
"""


def run_bench(
    texts: OptionalTexts = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Recipe to measure: a shipped name or a TOML file; may be repeated.",
            show_default="tiny, char and bert-mini",
            autocompletion=complete_recipe,
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time per measurement in seconds.")] = 2.0,
    settings: Settings = None,
    threads: Threads = None,
    errors: Errors = None,
    document: DocumentRule = None,
    field: Field = None,
    as_json: Json = False,
) -> None:
    """Measure training, data preparation, masking and filling on this machine, beside transformers if it is installed.

    Without TEXT, the documentation of Python is used; of a longer text, the first million characters. The two
    libraries work in turns, and ratios are medians. Stop other programs first: they make the speeds too low.
    """
    from unmask.checks.bench import RECIPES, bench
    from unmask.core.errors import TextError

    names = list(dict.fromkeys(recipe or RECIPES))
    with open_display(sys.stderr) as display:
        documents = _bench_texts(texts or [], DataOptions(errors, document, field))
        try:
            report = bench(
                documents,
                names,
                seconds=seconds,
                settings=settings or (),
                threads=threads,
                message=display.message,
            )
        except TextError as error:  # its location is the memory, in which the text is
            raise error.at(location=", ".join(map(str, texts or ["documentation of Python"]))) from error
    if as_json:
        print_json(asdict(report))
    else:
        _print_report(report)


def _bench_texts(names: Sequence[Path], options: DataOptions) -> list[str]:
    """Return the beginning of the named texts; without names, the documentation of Python."""
    from unmask.checks.bench import MAX_CHARACTERS
    from unmask.data.sources import open_source, require_field_used
    from unmask.tokenization.analysis import first_texts
    from unmask.training.demo import python_documentation

    if not names:
        return python_documentation(MAX_CHARACTERS)
    source = open_source(names, options.config())
    require_field_used(options.config().field, [source], given=options.field is not None)
    return list(first_texts(source, MAX_CHARACTERS))


def _print_report(report: BenchReport) -> None:
    """Print a table in a terminal, plain lines in a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    header = [*_machine(report), *map(_model, report.models)]
    columns = ("recipe", "measurement", "unmask", "of the ceiling", "transformers", "unmask ÷ transformers")
    cells = [_cells(row) for row in report.rows]
    if not console.is_terminal:
        for line in header:
            print(line)
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        for line in (columns, *cells):
            print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
        for warning in report.warnings:
            print(f"warning: {warning}")
        return
    for line in header:
        console.print(Text(line, "dim"))
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row, line in zip(report.rows, cells, strict=True):
        style = "" if row.transformers is not None or not row.missing else "dim"
        table.add_row(*line[:4], Text(line[4], style), line[5])
    console.print(table)
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}", "yellow"))


def _machine(report: BenchReport) -> list[str]:
    """Return the facts about machine and text as lines."""
    threads = f"{report.threads} thread{'s' * (report.threads != 1)}"
    device = f", device {report.device}" if report.device != report.processor else ""
    versions = {"unmask": report.unmask, "torch": report.torch, "transformers": report.transformers,
                "accelerate": report.accelerate, "Python": report.python}  # fmt: skip
    return [
        f"{report.date}  {report.processor}, {report.cores} cores, {report.system}{device}",
        f"{threads}, {report.precision}; " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"text: {report.documents:,} documents, {report.characters:,} characters; "
        f"{report.seconds:g} s per measurement, in turns",
    ]


def _model(model: BenchedModel) -> str:
    from unmask.core.format import count

    return (
        f"{model.recipe}: {model.kind}, {count(model.parameters)} parameters, {model.vocab_size:,} tokens in the "
        f"vocabulary, steps of {model.batch_tokens:,} tokens, sequences of {model.max_seq_len}"
    )


def _cells(row: Row) -> tuple[str, ...]:
    """Return the cells of a row: recipe, measurement, speed, share of the ceiling, peer, ratio with its range."""
    from unmask.core.format import rate

    share = "" if row.share is None or row.ceiling is None else f"{row.share:.0%} of {rate(row.ceiling)}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    if row.ratio_range is not None:
        ratio += f" ({row.ratio_range[0]:.2f} to {row.ratio_range[1]:.2f})"
    return row.recipe, row.measurement, row.value, share, row.peer, ratio
