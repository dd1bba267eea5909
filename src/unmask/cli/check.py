"""Room card: the verb check.

Comes in: an objective, cutter or source of a person's own, "package.module:Name". Goes out: which promises it keeps and
which not, each with what was seen. Called by: door.
"""

from __future__ import annotations

import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from unmask.cli.answer import Debug, Json, print_json

if TYPE_CHECKING:
    from unmask.conformance.check import Checked

BROKEN = 2  # the exit code where a law is broken: a person can mend it
EXAMPLES = """\
[bold]Examples[/bold]

unmask check mylab.spans:Spans
unmask check mylab.spans:Spans --settings mean_words=4
unmask check mylab.logs:LogLines access.log            a source, with what it shall read
"""


def check(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="package.module:Name of a class of your own.")],
    texts: Annotated[list[Path] | None, typer.Argument(metavar="[TEXT]...", help="What a source shall read.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--settings", metavar="KEY=VALUE", help="One of its settings; may be repeated.")
    ] = None,
    role: Annotated[
        Literal["objective", "cutter", "source"] | None,
        typer.Option(help="What it shall be.", show_default="told by its methods"),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check an objective, a cutter or a source of your own by the laws that ours keep.

    The module is imported, which runs it. Exit code 2 where a law is broken.
    """
    from unmask.conformance.check import check as checked_by_laws

    checked = checked_by_laws(kind, settings or (), texts or (), role or "")
    if as_json:
        print_json({**asdict(checked), "passed": checked.passed})
    else:
        _print(checked)
    if not checked.passed:
        raise typer.Exit(BROKEN)


def _print(checked: Checked) -> None:
    yes, no = ("✓", "✗") if (sys.stdout.encoding or "").lower().startswith("utf") else ("ok", "NO")
    print(checked.said)
    for line in checked.settings.splitlines()[1:]:
        print(f"  {line}")
    print()
    wide = max(len(verdict.law) for verdict in checked.verdicts)
    for verdict in checked.verdicts:
        print(f"{yes if verdict.passed else no:<2} {verdict.law:<{wide}}  {verdict.sentence.splitlines()[0]}")
        if verdict.detail:
            print(textwrap.indent(textwrap.fill(verdict.detail, 110), "     "))
    kept = sum(verdict.passed for verdict in checked.verdicts)
    print(f"\n{kept} of {len(checked.verdicts)} laws are kept")
    if not checked.passed:
        first = next(verdict for verdict in checked.verdicts if not verdict.passed)
        print(f'  next:  mend "{first.law}" first, then check again; docs/extending.md has an example that keeps all')
