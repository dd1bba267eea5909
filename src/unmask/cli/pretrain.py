"""Commands that train: pretrain and demo."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from unmask.cli.models import print_predictions
from unmask.cli.options import (
    AllowCode,
    Budget,
    DocumentRule,
    Errors,
    Field,
    Json,
    OptionalTexts,
    Settings,
    Threads,
    complete_model,
    complete_recipe,
    path_or_address,
    print_json,
)
from unmask.core.errors import RecipeError, RunError

if TYPE_CHECKING:
    from unmask.training.display import Display
    from unmask.training.pretrain import Result


PRETRAIN_EXAMPLES = """\
[bold]Examples[/bold]

unmask pretrain notes.txt
unmask pretrain notes/ --budget "30 min" --out runs/notes
unmask pretrain "posts/**/*.jsonl.zst" --field body       read a field of each line; also .csv, .tsv and .parquet
unmask pretrain notes.txt:0.7 dataset:imdb:0.3            take 70 % of the tokens from your notes
zcat notes.gz | unmask pretrain -                         read standard input
unmask pretrain play.txt --recipe char --set stage.0.max_seq_len=64
unmask pretrain notes.txt --dry-run                       print only the cost estimate
unmask pretrain notes.txt --valid news=valid_news.txt     validate on another text too
unmask pretrain law.txt --from runs/notes                 continue from the weights of a model
unmask pretrain law.txt --from bert/ --extend-vocabulary 2000 --valid general=wiki.txt
unmask pretrain --resume runs/notes                       resume a stopped run, bit for bit
unmask pretrain --resume runs/notes --budget "+1 epoch"   prolong a finished run
unmask pretrain "s3://bucket/*.txt.gz" --set train.upload=s3://bucket/runs/notes
unmask pretrain --resume notes/ --text new/notes.txt      resume a run whose text was moved
"""
DEMO_EXAMPLES = """\
[bold]Examples[/bold]

unmask demo
unmask demo --budget "60 s" --out runs/short
"""

RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="Recipe: a shipped name or a TOML file.",
        autocompletion=complete_recipe,
        show_default="tiny; with a time as --budget: auto; with --from: continue",
    ),
]
RunFolder = Annotated[
    Path | None, typer.Option("--out", help="Folder of the run; it must not exist.", show_default="runs/RECIPE-N")
]
ExistOk = Annotated[
    Literal["resume", "new"] | None,
    typer.Option(
        help="What to do if OUT exists: resume continues the same run, new takes OUT-2, OUT-3, ….", show_default="error"
    ),
]
Seed = Annotated[int | None, typer.Option(help="Random seed.", show_default="the recipe's")]
FromModel = Annotated[
    Any,
    typer.Option(
        "--from",
        metavar="MODEL",
        help="Model whose weights, architecture and tokenizer the run starts from: a folder, or an address such as "
        "s3://BUCKET/NAME.",
        parser=path_or_address,
        autocompletion=complete_model,
    ),
]
ExtendVocabulary = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Number of tokens to learn from the text and add; needs --from."),
]
Resume = Annotated[
    Any,  # a path or an address
    typer.Option(
        metavar="RUN",
        help="Run to resume or to prolong, or the address of its copy (train.upload).",
        autocompletion=complete_model,
        parser=path_or_address,
    ),
]
MovedTexts = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="TEXT", help="New path of a text that was moved; needs --resume; may be repeated."),
]
AllowDifferentEnvironment = Annotated[
    bool,
    typer.Option(
        "--allow-different-environment",
        help="Resume on another machine or with other versions, so not bit for bit; needs --resume.",
    ),
]
ValidationTexts = Annotated[
    list[str] | None,
    typer.Option("--valid", metavar="NAME=TEXT", help="Further text to validate on; may be repeated."),
]
AllowUnknown = Annotated[
    bool,
    typer.Option(
        "--allow-unknown", help="Train even if the tokenizer can't spell more than 20 % of the characters of the text."
    ),
]
Verify = Annotated[
    bool,
    typer.Option("--verify", help="Compare all bytes of the text and of the token cache, not only sizes and times."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the cost estimate and stop.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the folder of the run.")]


def pretrain(
    texts: OptionalTexts = None,
    recipe: RecipeOption = None,
    budget: Budget = None,
    out: RunFolder = None,
    exist_ok: ExistOk = None,
    seed: Seed = None,
    settings: Settings = None,
    start: FromModel = None,
    extend_vocabulary: ExtendVocabulary = None,
    resume: Resume = None,
    moved_texts: MovedTexts = None,
    allow_different_environment: AllowDifferentEnvironment = False,
    allow_code: AllowCode = False,
    threads: Threads = None,
    errors: Errors = None,
    document: DocumentRule = None,
    field: Field = None,
    valid: ValidationTexts = None,
    allow_unknown: AllowUnknown = False,
    dry_run: DryRun = False,
    verify: Verify = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pretrain an encoder on text, or resume a run.

    Options take precedence over --set, and --set over the recipe. Ctrl-C saves a checkpoint; --resume goes on from it.
    """
    if resume is None:
        _check_needs_resume(allow_different_environment=allow_different_environment, moved_texts=moved_texts)
    else:
        _check_not_with_resume({
            "TEXT": texts, "--recipe": recipe, "--out": out, "--exist-ok": exist_ok, "--seed": seed, "--from": start,
            "--threads": threads, "--errors": errors, "--document": document, "--dry-run": dry_run or None,
            "--field": field, "--extend-vocabulary": extend_vocabulary, "--allow-unknown": allow_unknown or None,
        })  # fmt: skip
    from unmask.core.plugins import code_allowed
    from unmask.report.write import report_at_end
    from unmask.training import api
    from unmask.training import pretrain as training

    display = _display(as_json=as_json, quiet=quiet)
    with code_allowed(allow_code), report_at_end(display.message) as ended:
        if resume is not None:
            result = training.resume(
                resume,
                budget=budget,
                settings=settings or (),
                display=display,
                allow_different_environment=allow_different_environment,
                verify=verify,
                texts=moved_texts or (),
                valid=_parse_valid(valid or ()),
            )
        else:
            result = api.run_pretraining(
                texts or [],
                recipe=recipe,
                budget=budget,
                out=out,
                exist_ok=exist_ok,
                seed=seed,
                settings=settings,
                start=start,
                extend_vocabulary=extend_vocabulary,
                threads=threads,
                errors=errors,
                document=document,
                field=field,
                valid=_parse_valid(valid or ()),
                allow_unknown=allow_unknown,
                dry_run=dry_run,
                verify=verify,
                display=display,
            )
        ended(None if result.finished_before else result.run)
    if _is_main_process():
        _print_result(result, as_json=as_json, quiet=quiet)


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run; replaces an earlier demo.")] = Path("runs/demo"),
    budget: Budget = None,
    threads: Threads = None,
) -> None:
    """Pretrain on the documentation of Python for a few minutes, then fill masks."""
    from unmask.report.write import report_at_end
    from unmask.training.demo import demo as run_demo

    overrides = _without_none({"train.budget": budget, "train.threads": threads})
    display = _display(as_json=False, quiet=False)
    with report_at_end(display.message) as ended:
        result = run_demo(out, display=display, overrides=overrides)
        ended(result.result.run)
    print()
    print_predictions(result.filled)
    print(f"\nthe correct word is among the first five in {result.num_correct} of {len(result.filled)} sentences")
    _print_next_commands([
        f'unmask fill {_quoted(out)} "Return the [MASK] of the list."',
        f"unmask evaluate {_quoted(out)} --text FILE",
        'unmask pretrain FILE --budget "10 min"',
    ])  # fmt: skip


def _without_none(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides that are not None: the options on the command line."""
    return {key: value for key, value in overrides.items() if value is not None}


def _display(*, as_json: bool, quiet: bool) -> Display:
    """Return the display of a run; with --json it writes to standard error."""
    from unmask.training.display.live import display_for

    return display_for(sys.stderr if as_json else sys.stdout, quiet=quiet or not _is_main_process())


def _is_main_process() -> bool:
    # Read from the environment, because importing torch for this would delay every error.
    return os.environ.get("RANK", "0") == "0"


def _check_needs_resume(*, allow_different_environment: bool, moved_texts: Sequence[str] | None) -> None:
    """Check that a new run has no option that only a resumed run has.

    Raises:
        RunError: such an option has a value.
    """
    if allow_different_environment:
        raise RunError(
            "--allow-different-environment needs --resume",
            hint="name the run: --resume RUN --allow-different-environment",
        )
    if moved_texts:
        raise RunError(
            "--text needs --resume: it names the new path of a run's text",
            hint="name the text without an option: unmask pretrain TEXT",
        )


def _check_not_with_resume(options: Mapping[str, Any]) -> None:
    """Check that no option contradicts the recipe of the run to resume.

    Raises:
        RunError: an option has a value.
    """
    for name, value in options.items():
        if value not in (None, []):
            raise RunError(
                f"{name} can't be combined with --resume: the run keeps its own settings",
                hint="remove it; --resume accepts --budget, --set, --verify, --allow-code and "
                "--allow-different-environment, and --text and --valid for a text that was moved",
            )


def _parse_valid(options: Sequence[str]) -> dict[str, str]:
    """Return the texts of `--valid NAME=TEXT` by name.

    Raises:
        RecipeError: a name is missing or occurs twice.
    """
    texts: dict[str, str] = {}
    for option in options:
        name, _, text = option.partition("=")
        location = f"--valid {option}"
        if not name or not text:
            raise RecipeError(
                "validation text without a name", location=location, hint="name it: --valid news=news.txt"
            )
        if name in texts:
            raise RecipeError(f"duplicate name `{name}`", location=location, hint="give each text its own name")
        texts[name] = text
    return texts


def _print_result(result: Result, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json({
            "run": result.run,
            "finished_before": result.finished_before,
            "forecast": asdict(result.forecast) if result.forecast else None,
            "summary": asdict(result.summary) if result.summary else None,
        })  # fmt: skip
    elif result.run is None:
        print("\ndry run: nothing was written")
    elif quiet:
        print(result.run)
    elif not result.finished_before:
        from unmask.models.model import predicts_masked_tokens

        run = _quoted(result.run)
        uses = [f'unmask fill {run} "a sentence with a [MASK] in it"', f"unmask evaluate {run} --text FILE"]
        if result.model is not None and not predicts_masked_tokens(result.model):
            uses = [f"unmask export {run} FOLDER"]
        _print_next_commands([*uses, f'unmask pretrain --resume {run} --budget "+1 epoch"'])


def _print_next_commands(commands: Sequence[str]) -> None:
    print("\nnext:")
    for command in commands:
        print(f"  {command}")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
