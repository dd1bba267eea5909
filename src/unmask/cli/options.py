"""Options and helpers that several commands share."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, cast

import typer

from unmask.core.config import Override
from unmask.core.errors import TextError, TokenizerError
from unmask.core.files import RunLayout

if TYPE_CHECKING:
    from unmask.core.types import ProgressCallback
    from unmask.data.settings import DataConfig
    from unmask.models.model import Model
    from unmask.tokenization.tokenizer import Tokenizer
    from unmask.training.display import Display
    from unmask.training.recipe import Recipe


# Completion in a shell ----------------------------------------------------------------------------------------------

RUNS = "runs"  # the folder of runs
_MODEL_FILES = (RunLayout.RECIPE, "config.json")
_MAX_FOLDERS = 1000  # looked at for one completion


def complete_model(incomplete: str) -> list[str]:
    """Return the runs and models that begin so, in runs/ and in the folder of the word.

    If there are none, the shell offers files.
    """
    folders = [Path(RUNS), Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent]
    names: dict[str, None] = {}
    for folder in folders:
        with contextlib.suppress(OSError):
            for path in itertools.islice(folder.iterdir(), _MAX_FOLDERS):
                if str(path).startswith(incomplete) and any((path / name).is_file() for name in _MODEL_FILES):
                    names[str(path)] = None
    return sorted(names)


def complete_recipe(incomplete: str) -> list[str]:
    """Return the shipped recipes and the TOML files that begin so."""
    from unmask.core.config import shipped_recipes

    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    with contextlib.suppress(OSError):
        files = sorted(str(path) for path in itertools.islice(folder.glob("*.toml"), _MAX_FOLDERS))
        return [name for name in (*shipped_recipes(), *files) if name.startswith(incomplete)]
    return []


# Arguments and options ----------------------------------------------------------------------------------------------


def path_or_address(text: str) -> Path | str:
    """Return a path; the address of an object, such as s3://bucket/notes.txt, stays a string."""
    from unmask.core.remote import is_remote

    return text if is_remote(text) else Path(text)


TEXT = typer.Argument(
    metavar="TEXT",
    help="Files, folders, patterns, dataset:NAME, addresses such as s3://BUCKET/NAME, or - for standard input; "
    "TEXT:0.7 sets a weight.",
    parser=path_or_address,
)
Texts = Annotated[list[Any], TEXT]  # paths and addresses
OptionalTexts = Annotated[list[Any] | None, TEXT]
MODEL_HELP = "Run, step folder, or folder saved by transformers."
ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model)]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        help="Import the plugins that the run's recipe names, also if the run came from elsewhere.",
        show_default=False,
    ),
]
OutputPath = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing model at OUT.", show_default=False)]
TOKENIZER_HELP = "Run, model, tokenizer.json, or folder with one."
TokenizerPath = Annotated[
    Path | None,
    typer.Option(help=TOKENIZER_HELP, show_default="the recipe's, trained on the text", autocompletion=complete_model),
]

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one setting of the recipe; may be repeated."),
]
RecipeName = Annotated[
    str,
    typer.Option(help="Recipe with the settings: a shipped name or a TOML file.", autocompletion=complete_recipe),
]
Budget = Annotated[
    str | None,
    typer.Option(
        help='Length of training: "300 s", "120 steps", "2M tokens", "3 epochs". Seconds cover training, validation '
        "and saving; reading the text, training the tokenizer and a probe of at most a tenth of them come on top.",
        show_default="the recipe's",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Number of CPU threads; equal results need the same number.", show_default="all cores"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.", show_default=False)]

Errors = Annotated[
    Literal["strict", "replace", "skip"] | None,
    typer.Option(
        help="Handling of undecodable bytes and malformed rows: strict stops, replace inserts U+FFFD for bytes, "
        "skip leaves out and counts.",
        show_default="strict",
    ),
]
DocumentRule = Annotated[
    Literal["blank-line", "line", "file"] | None,
    typer.Option("--document", help="Unit of plain text that is one document.", show_default="blank-line"),
]
Field = Annotated[
    str | None, typer.Option(help="Name of the JSON field or table column that contains the text.", show_default="text")
]


@dataclass(frozen=True)
class DataOptions:
    """Command-line options for reading and tokenizing text; None stands for the value of the recipe."""

    errors: Errors = None
    document: DocumentRule = None
    field: Field = None
    tokenizer: Path | None = None  # the option's value; `find_tokenizer` resolves it

    def overrides(self) -> dict[str, Any]:
        """Return the options that are not None, by recipe key."""
        overrides: dict[str, Any] = {
            "data.errors": self.errors,
            "data.document": self.document,
            "data.field": self.field,
        }
        if self.tokenizer is not None:
            option = f"--tokenizer {self.tokenizer}"
            overrides["data.tokenizer.kind"] = Override("file", option)
            overrides["data.tokenizer.path"] = Override(str(find_tokenizer(self.tokenizer)), option)
        return {key: value for key, value in overrides.items() if value is not None}

    def config(self) -> DataConfig:
        """Return the default settings of `[data]`, changed by these options."""
        from unmask.data.settings import DataConfig

        default = DataConfig()
        return replace(
            default,
            errors=self.errors or default.errors,
            document=self.document or default.document,
            field=default.field if self.field is None else self.field,
        )


def load_recipe_with(recipe: str, settings: list[str] | None, data: DataOptions) -> Recipe:
    """Load a recipe, changed by --set and then by the data options."""
    from unmask.training.recipe import load_recipe

    return load_recipe(recipe, settings or (), data.overrides())


# Models and tokenizers ----------------------------------------------------------------------------------------------


def open_model(path: str | Path) -> Model:
    """Load a model; print notes to standard error on untrained heads, ids, and a best step that is not the last."""
    from unmask.core.files import last_step
    from unmask.hub.from_hf import load

    model = load(path)
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr)
    step = model.card.get("step")
    last = last_step(Path(path)) if step and Path(model.path) != Path(path) else None
    if step and last is not None and last != step:
        print(f"using step {step:,}, the best by validation; the last step is {last:,}", file=sys.stderr)
    return model


def find_tokenizer(path: Path) -> Path:
    """Return the path of a tokenizer; for a run, its best or last checkpoint.

    Raises:
        TokenizerError: the path doesn't exist.
        ModelError: the path is a run without a checkpoint.
    """
    if path.is_dir() and not (path / RunLayout.TOKENIZER).is_file() and (path / RunLayout.RECIPE).is_file():
        from unmask.models.model import find_checkpoint

        return find_checkpoint(path)
    if not os.path.lexists(path):
        raise TokenizerError("no such file or folder", location=str(path), hint="give a folder with a tokenizer.json")
    return path


def open_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a file, a folder, a run or a model."""
    from unmask.tokenization.tokenizer import Tokenizer

    return Tokenizer.load(find_tokenizer(path))


# Text ----------------------------------------------------------------------------------------------------------------


def check_utf8(text: str) -> str:
    """Return a command-line argument that is valid UTF-8, also in a locale whose encoding is not UTF-8.

    Python decodes bytes that don't fit the locale to lone surrogates.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode("utf-8")
        except UnicodeDecodeError as error:
            raise TextError("text is not UTF-8", location=ascii(text[:60]), hint="encode the text as UTF-8") from error
    return text


# Output -------------------------------------------------------------------------------------------------------------

_PROGRESS_DELAY_SECONDS = 2.0


def print_json(value: Any) -> None:
    """Print a value as JSON; NaN and infinity are null, and non-ASCII is escaped if the output isn't Unicode."""
    print(_json(value))


class JsonList:
    """Prints a list as JSON, each item when it is known; the whole is what `print_json` prints of the list."""

    def __init__(self) -> None:
        self._is_empty = True

    def print(self, value: Any) -> None:
        """Print the next item."""
        text = "  " + _json(value).replace("\n", "\n  ")
        print(f"{'[' if self._is_empty else ','}\n{text}", end="", flush=True)
        self._is_empty = False

    def end(self) -> None:
        """Print the end of the list."""
        print("[]" if self._is_empty else "\n]")


def _json(value: Any) -> str:
    return json.dumps(_finite(value), indent=2, ensure_ascii=not is_unicode_output(), default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    """Return a value with null in place of NaN and infinity, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in cast("Sequence[Any]", value)]
    return value


def is_unicode_output() -> bool:
    """Return whether standard output can encode every character."""
    return (sys.stdout.encoding or "").lower().startswith("utf")


@contextmanager
def open_display(stream: TextIO) -> Generator[Display]:
    """Yield the display for a stream; it shows log messages too, and is closed at the end."""
    from unmask.training.display import show_log
    from unmask.training.display.live import display_for

    display = display_for(stream)
    with show_log(display):
        yield display


def delayed_progress(display: Display) -> ProgressCallback:
    """Return a progress callback that shows nothing during the first two seconds."""
    start = time.monotonic()

    def progress(task: str, fraction: float) -> None:
        if time.monotonic() - start >= _PROGRESS_DELAY_SECONDS:
            display.progress(task, fraction)

    return progress
