"""The command that examines a text before training, or a run after it."""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.cli.options import (
    AllowCode,
    DataOptions,
    DocumentRule,
    Errors,
    Field,
    Json,
    Settings,
    TokenizerPath,
    complete_model,
    complete_recipe,
    delayed_progress,
    find_tokenizer,
    is_unicode_output,
    load_recipe_with,
    open_display,
    open_tokenizer,
    print_json,
)
from unmask.core.errors import RecipeError, RunError, UnmaskError
from unmask.core.files import RunLayout

if TYPE_CHECKING:
    from unmask.checks.doctor import Finding
    from unmask.core.types import ProgressCallback

DOCTOR_EXAMPLES = """\
[bold]Examples[/bold]

unmask doctor notes.txt                           before training
unmask doctor notes.txt --budget "10 min"         also what this budget reaches: tokenizes the text and times steps
unmask doctor runs/notes                          after training, or meanwhile
unmask doctor notes.txt --json --strict           for programs; exit code 1 if there is a problem
"""
PROBLEM = 1  # exit code with --strict
_SYMBOLS = {"ok": ("✓", "green"), "note": ("!", "yellow"), "problem": ("✗", "bold red")}
_INDENT = " " * 10
_WIDTH = 110


def doctor(
    targets: Annotated[
        list[Path],
        typer.Argument(
            metavar="TEXT…|RUN",
            help="Files, folders, patterns, dataset:NAME, or - for standard input; or one run.",
            autocompletion=complete_model,
        ),
    ],
    budget: Annotated[
        str | None,
        typer.Option(help='Length of training to estimate: "10 min", "3 epochs".', show_default="not estimated"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Recipe with the settings: a shipped name or a TOML file.",
            show_default="tiny; for a budget in seconds auto",
            autocompletion=complete_recipe,
        ),
    ] = None,
    tokenizer: TokenizerPath = None,
    settings: Settings = None,
    errors: Errors = None,
    document: DocumentRule = None,
    field: Field = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with code 1 if there is a problem.", show_default=False)
    ] = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Examine a text before training, or a run: findings, each with its figure and a command that acts on it.

    Nothing is changed. With --budget, the text is tokenized and steps are timed, as `unmask pretrain --dry-run` does.
    The exit code is 0, also if there are problems.
    """
    run = _the_run(targets)
    options = DataOptions(errors, document, field, tokenizer)
    if run is not None:
        _check_for_texts({
            "--budget": budget, "--recipe": recipe, "--set": settings, "--tokenizer": tokenizer, "--errors": errors,
            "--document": document, "--field": field,
        })  # fmt: skip
    elif budget is not None:
        _check_budget(budget)  # before the text is read
    with open_display(sys.stderr) as display:
        progress = delayed_progress(display)
        if run is None:
            from unmask.data.sources import store_standard_input

            names = store_standard_input(targets)  # the text is read several times
            findings = _text_findings(names, recipe or "tiny", tokenizer, settings, options, progress)
            if budget is not None and all(each.name != "encoding" or each.severity == "ok" for each in findings):
                findings.append(_budget(names, budget, recipe, settings, options))
        else:
            from unmask.checks.doctor.run import examine_run
            from unmask.core.plugins import code_allowed

            with code_allowed(allow_code):
                findings = examine_run(run, progress)
    if as_json:
        print_json({"target": [str(target) for target in targets], "findings": [asdict(each) for each in findings]})
    else:
        _print_findings(findings)
    if strict and any(each.severity == "problem" for each in findings):
        raise typer.Exit(PROBLEM)


def _the_run(targets: Sequence[Path]) -> Path | None:
    """Return the run to examine; None if the targets are texts.

    Raises:
        RunError: a run is named beside something else, or a folder of runs or a model is named.
    """
    names = (RunLayout.RECIPE, RunLayout.ENVIRONMENT, RunLayout.LOG)
    runs = [target for target in targets if any((target / name).is_file() for name in names)]
    if runs and len(targets) > 1:
        raise RunError(
            f"a run is examined alone: got {len(targets)} names",
            location=str(runs[0]),
            hint=f"name only the run: unmask doctor {shlex.quote(str(runs[0]))}",
        )
    for folder in targets if not runs else ():
        if inside := min(folder.glob(f"*/{RunLayout.RECIPE}"), default=None):
            raise RunError(
                "this folder contains runs, and one is examined at a time",
                location=str(folder),
                hint=f"name a run: unmask doctor {shlex.quote(str(inside.parent))}",
            )
    if models := [target for target in targets if not runs and (target / RunLayout.CONFIG).is_file()]:
        parent = models[0].absolute().parent
        is_of_run = (parent / RunLayout.RECIPE).is_file()
        raise RunError(
            "this is a model, and neither a text nor a run",
            location=str(models[0]),
            hint=f"examine its run: unmask doctor {shlex.quote(str(parent))}" if is_of_run else "name a text or a run",
        )
    return runs[0] if runs else None


def _check_budget(budget: str) -> None:
    """Check that a budget is a quantity of training.

    Raises:
        RecipeError: it isn't.
    """
    from unmask.core.quantities import Quantity
    from unmask.training.plan import check_budget

    try:
        check_budget(Quantity.parse(budget))
    except RecipeError as error:
        raise error.at(location=f"--budget {budget}") from error


def _check_for_texts(options: Mapping[str, Any]) -> None:
    """Check that no option of a text is given for a run.

    Raises:
        RunError: an option has a value.
    """
    for name, value in options.items():
        if value not in (None, []):
            raise RunError(
                f"{name} can't be combined with a run, which has its own settings", hint="remove it, or name a text"
            )


def _text_findings(
    texts: Sequence[str],
    recipe: str,
    tokenizer: Path | None,
    settings: list[str] | None,
    options: DataOptions,
    progress: ProgressCallback,
) -> list[Finding]:
    from unmask.checks.doctor.text import examine_text
    from unmask.training.recipe import explicit_keys

    resolved = load_recipe_with(recipe, settings, options)
    explicit = None if tokenizer else explicit_keys(recipe, settings or (), options.overrides())
    loaded = None if tokenizer is None else open_tokenizer(tokenizer)
    return examine_text(texts, resolved, explicit, progress, loaded)


def _budget(
    texts: Sequence[str], budget: str, recipe: str | None, settings: list[str] | None, options: DataOptions
) -> Finding:
    """Return what the budget reaches, by a dry run."""
    from unmask.checks.doctor.text import budget_finding, refused_finding
    from unmask.training.api import run_pretraining

    more: list[str] = []
    if options.tokenizer is not None:
        path = json.dumps(str(find_tokenizer(options.tokenizer)), ensure_ascii=False)
        more.append(f'data.tokenizer={{kind = "file", path = {path}}}')
    try:
        result = run_pretraining(
            texts,
            dry_run=True,
            recipe=recipe,
            budget=budget,
            settings=[*(settings or ()), *more],
            errors=options.errors,
            document=options.document,
            field=options.field,
            display=None,
        )
    except UnmaskError as error:  # such as a budget that is too short for one validation
        return refused_finding(error, texts, budget)
    assert result.forecast is not None
    return budget_finding(result.forecast, texts)


def _print_findings(findings: Sequence[Finding]) -> None:
    """Print findings, each with its reason and its command unless it is ok: with colors in a terminal."""
    from rich.console import Console
    from rich.text import Text

    from unmask.core.format import visible

    console = Console(highlight=False, soft_wrap=True)
    width = max(len(each.name) for each in findings)
    columns = min(console.width, _WIDTH) if console.is_terminal else _WIDTH
    for each in findings:
        symbol, style = _SYMBOLS[each.severity]
        label = symbol if console.is_terminal and is_unicode_output() else each.severity
        head = f"{label:<8}  {each.name:<{width}}  "
        lines = textwrap.wrap(visible(each.figure), max(30, columns - len(head)), break_long_words=False) or [""]
        console.print(Text.assemble((head, style), lines[0]))
        for line in lines[1:]:
            console.print(" " * len(head) + line, markup=False)
        if each.severity != "ok":
            for line in textwrap.wrap(each.why, max(30, columns - len(_INDENT))):
                console.print(Text(_INDENT + line, "dim"))
            console.print(Text(f"{_INDENT}{each.command}", "cyan"))
    counts = {level: sum(each.severity == level for each in findings) for level in ("problem", "note", "ok")}
    print(", ".join(_counted(level, number) for level, number in counts.items()))


def _counted(level: Any, number: int) -> str:
    return f"{number} {level}{'s' * (level != 'ok' and number != 1)}"
