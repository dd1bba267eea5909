"""Room card: the verbs that train: pretrain and demo.

Comes in: text files, a recipe, a budget, or a run to go on with. Goes out: a run on disk, what a person sees of it, the
next commands to try. Called by: door.
"""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.cli.models import print_filled
from unmask.cli.options import (
    Budget,
    Debug,
    Errors,
    Field,
    Json,
    Rule,
    Settings,
    Texts,
    Threads,
    Valid,
    print_json,
)
from unmask.core.errors import RecipeError, RunError

if TYPE_CHECKING:
    from unmask.training.display import Display
    from unmask.training.pretrain import Result
    from unmask.training.warm_start import WarmStart


PRETRAIN_EXAMPLES = """\
[bold]Examples[/bold]

unmask pretrain notes.txt
unmask pretrain notes/ --budget "30 min" --out runs/notes
unmask pretrain "posts/**/*.jsonl.zst" --field body       a field of each line; also .csv, .tsv and .parquet
unmask pretrain notes.txt:0.7 dataset:imdb:0.3            seven tokens in ten from your notes
zcat notes.gz | unmask pretrain -                         standard input
unmask pretrain play.txt --recipe char --set stage.0.max_seq_len=64
unmask pretrain notes.txt --dry-run                       the forecast alone
unmask pretrain notes.txt --valid news=valid_news.txt     measure a text of yours at each validation
unmask pretrain law.txt --from runs/notes                 go on from a model, ours or one of transformers
unmask pretrain law.txt --from bert/ --extend-vocabulary 2000 --valid general=wiki.txt
unmask pretrain --resume runs/notes                       go on, bit for bit
unmask pretrain --resume runs/notes --budget "+1 epoch"   prolong a run
"""
DEMO_EXAMPLES = """\
[bold]Examples[/bold]

unmask demo
unmask demo --budget "60 s" --out runs/short
"""


def pretrain(
    texts: Texts = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="A shipped recipe's name or a TOML file.", show_default="tiny; with --from: continue"),
    ] = None,
    budget: Budget = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder; it must not exist.", show_default="runs/RECIPE-N")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of every draw.", show_default="the recipe's")] = None,
    settings: Settings = None,
    start: Annotated[
        Path | None,
        typer.Option("--from", metavar="MODEL", help="Begin with this model's weights, encoder and tokenizer."),
    ] = None,
    extend_vocabulary: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --from: add N pieces learnt from the text.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with a run that stopped.")] = None,
    allow_different_environment: Annotated[
        bool,
        typer.Option("--allow-different-environment", help="With --resume: accept a machine that computes other bits."),
    ] = False,
    threads: Threads = None,
    errors: Errors = None,
    document: Rule = None,
    field: Field = None,
    valid: Valid = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the forecast and stop.")] = False,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the run's folder alone.")] = False,
    debug: Debug = False,
) -> None:
    """Pretrain an encoder on text, or go on with a run.

    An explicit flag beats --set, which beats the recipe. Ctrl-C saves and names the command that resumes.
    """
    overrides: dict[str, Any] = {
        "train.budget": budget, "seed": seed, "train.threads": threads, "data.errors": errors,
        "data.document": document, "data.field": field,
    }  # fmt: skip
    if valid:
        overrides["data.valid"] = _named(valid)
    if resume is None:
        if allow_different_environment:
            raise RunError(
                "--allow-different-environment says how to resume",
                hint="name the run: --resume RUN --allow-different-environment",
            )
    else:
        _refuse_with_resume({
            "TEXT": texts, "--recipe": recipe, "--out": out, "--seed": seed, "--threads": threads, "--errors": errors,
            "--document": document, "--field": field, "--valid": valid, "--dry-run": dry_run or None,
            "--from": start, "--extend-vocabulary": extend_vocabulary,
        })  # fmt: skip
    from unmask.training.pretrain import launch
    from unmask.training.pretrain import resume as go_on

    display = _display(as_json=as_json, quiet=quiet)
    if resume is not None:
        result = go_on(
            resume,
            budget=budget,
            settings=settings or (),
            display=display,
            allow_different_environment=allow_different_environment,
        )
    else:
        name = recipe or ("continue" if start else "tiny")
        result = launch(
            texts or [],
            recipe=name,
            out=out or _free_folder(Path(name).stem),
            settings=settings or (),
            overrides={key: value for key, value in overrides.items() if value is not None},
            display=display,
            dry_run=dry_run,
            start=_start(start, extend_vocabulary),
        )
    if _first_rank():
        _print_result(result, as_json=as_json, quiet=quiet)


def demo(
    out: Annotated[Path, typer.Option(help="The run's folder; an earlier demo there is replaced.")] = Path("runs/demo"),
    budget: Budget = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Pretrain on the English that every Python carries, a few minutes on two cores, and fill masks."""
    from unmask.training.demo import demo as run_demo

    overrides = {"train.budget": budget, "train.threads": threads}
    chosen = {key: value for key, value in overrides.items() if value is not None}
    made = run_demo(out, display=_display(as_json=False, quiet=False), overrides=chosen)
    print()
    print_filled(made.filled)
    print(f"\nthe right word is among the first five in {made.right} of {len(made.filled)} sentences")
    _print_next([
        f'unmask fill {_quoted(out)} "Return the [MASK] of the list."',
        f"unmask evaluate {_quoted(out)} --text FILE",
        'unmask pretrain FILE --budget "10 min"',
    ])  # fmt: skip


def _start(model: Path | None, pieces: int | None) -> WarmStart | None:
    """What --from and --extend-vocabulary say."""
    if model is None:
        if pieces:
            what = "--extend-vocabulary adds to the vocabulary of a model"
            mend = "name the model: --from MODEL; else set the size: --set data.tokenizer.vocab_size=8192"
            raise RecipeError(what, hint=mend)
        return None
    from unmask.training.warm_start import WarmStart

    return WarmStart.open(model, pieces or 0)


def _display(*, as_json: bool, quiet: bool) -> Display:
    """Progress goes where results don't."""
    from unmask.training.pretrain import for_stream

    return for_stream(sys.stderr if as_json else sys.stdout, quiet=quiet or not _first_rank())


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _refuse_with_resume(given: Mapping[str, Any]) -> None:
    """A run remembers what it was started with: what would contradict it is refused."""
    for name, value in given.items():
        if value not in (None, []):
            raise RunError(
                f"{name} can't be given together with --resume: the run remembers what it was started with",
                hint="leave it out; beside --budget, --set and --allow-different-environment nothing may change",
            )


def _named(valid: Sequence[str]) -> dict[str, str]:
    """NAME=TEXT, each name once."""
    named: dict[str, str] = {}
    for given in valid:
        name, equals, path = given.partition("=")
        if not equals or not path or not name:
            what = "a validation text without a name"
            raise RecipeError(what, location=f"--valid {given}", hint="name it: --valid news=news.txt")
        if name in named:
            raise RecipeError(
                f"`{name}` names two texts", location=f"--valid {given}", hint="give each a name of its own"
            )
        named[name] = path
    return named


def _free_folder(name: str) -> Path:
    """runs/NAME-1, or the first number that is free."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("several ranks need one folder", hint="name it: --out RUN")
    return next(path for number in itertools.count(1) if not (path := Path("runs") / f"{name}-{number}").exists())


def _print_result(result: Result, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json({
            "run": result.run,
            "finished_before": result.finished_before,
            "forecast": asdict(result.forecast) if result.forecast else None,
            "summary": asdict(result.summary) if result.summary else None,
        })  # fmt: skip
    elif result.run is None:
        print("\nThis was the forecast; nothing was written.")
    elif quiet:
        print(result.run)
    elif not result.finished_before:
        run = _quoted(result.run)
        _print_next([
            f'unmask fill {run} "a text of yours with a [MASK] in it"',
            f"unmask evaluate {run} --text FILE",
            f'unmask pretrain --resume {run} --budget "+1 epoch"',
        ])  # fmt: skip


def _print_next(commands: list[str]) -> None:
    print("\nnext:")
    for command in commands:
        print(f"  {command}")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
