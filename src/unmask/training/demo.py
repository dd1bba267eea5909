"""`unmask demo`: pretrains on the documentation of Python's standard library and fills masks in fixed sentences."""

from __future__ import annotations

import ast
import inspect
import os
import shutil
import sysconfig
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from unmask.core.config import load_toml
from unmask.core.errors import RecipeError, RunError
from unmask.core.files import RunLayout
from unmask.models.fill_mask import FillMaskResult, fill
from unmask.models.model import load
from unmask.training.display import Display
from unmask.training.pretrain import Result, launch
from unmask.training.recipe import load_recipe
from unmask.training.runs import check_not_in_use

_MIN_CHARS = 200  # of a document
_MIN_DOCSTRING_CHARS = 31
_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


# Corpus ---------------------------------------------------------------------------------------------------------------


def python_documentation(max_chars: float = float("inf")) -> list[str]:
    """Returns the English text of the standard library as documents: language reference and docstrings.

    The files are parsed, never imported. Documents and their order depend only on the Python version. Reading stops
    after the file in which `max_chars` characters are reached.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    documents = list(_topics(folder))
    characters = sum(map(len, documents))
    for file in sorted(folder.rglob("*.py")):
        if characters >= max_chars:
            break
        if _EXCLUDED & set(file.relative_to(folder).parts) or file.parent.name == "pydoc_data":
            continue
        text = "\n\n".join(_docstrings(file))
        if len(text) >= _MIN_CHARS:
            documents.append(text)
            characters += len(text)
    return documents


def _parse(file: Path) -> ast.Module | None:
    """Parses a source file. Returns None if it is invalid: some distributions ship old code."""
    try:
        with warnings.catch_warnings():  # docstrings of the standard library may contain invalid escapes
            warnings.simplefilter("ignore")
            return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return None


def _topics(folder: Path) -> Iterator[str]:
    """Yields the topics of the language reference, which are the values of a dictionary."""
    tree = _parse(folder / "pydoc_data" / "topics.py")
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            texts = [value.value for value in node.value.values if isinstance(value, ast.Constant)]
            yield from (_without_doctests(text) for text in texts if isinstance(text, str))


def _docstrings(file: Path) -> Iterator[str]:
    """Yields the docstrings of a module and of its classes and functions."""
    tree = _parse(file)
    if tree is None:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = _without_doctests(ast.get_docstring(node) or "")
            if len(docstring) >= _MIN_DOCSTRING_CHARS:
                yield docstring


def _without_doctests(text: str) -> str:
    lines = [line.strip() for line in inspect.cleandoc(text).splitlines()]
    kept = [line for line in lines if not line.startswith((">>>", "..."))]
    return "\n".join(kept).strip()


# Demo -----------------------------------------------------------------------------------------------------------------

RECIPE_NAME: Final = "demonstration"  # no other run has this name, not even with recipe `demo`: none is replaced
SENTENCES: Final[tuple[tuple[str, str], ...]] = (
    ("If the argument is omitted, the [MASK] value is used.", "default"),
    ("Return the number of [MASK] in the list.", "items"),
    ("A TypeError is [MASK] if the argument is not a string.", "raised"),
    ("Open the file and [MASK] its contents.", "read"),
    ("Return True if the object is an [MASK] of the class.", "instance"),
)
"""Sentences and the correct word for each mask. None of the sentences occurs in the training text."""


@dataclass(frozen=True)
class DemoResult:
    """Result of a demo: the run, its predictions, and how many correct words are among the first five predictions."""

    result: Result
    filled: tuple[FillMaskResult, ...]
    num_correct: int


def demo(
    out: str | Path = "runs/demo", *, display: Display | None = None, overrides: Mapping[str, Any] | None = None
) -> DemoResult:
    """Pretrains on the documentation of Python, then fills five masks. An earlier demo in `out` is replaced.

    Raises:
        RunError: `out` exists and is not the run of a demo, or another process works on it.
    """
    folder = Path(out)
    recipe = replace(load_recipe("demo", (), overrides), name=RECIPE_NAME)
    with _replace_earlier_demo(folder):
        result = launch(python_documentation(), recipe=recipe, out=folder, display=display)
    filled = tuple(fill(load(folder), [sentence for sentence, _ in SENTENCES], top=5))
    num_correct = sum(
        word in {candidate.token_str for candidate in prediction.masks[0].candidates}
        for prediction, (_, word) in zip(filled, SENTENCES, strict=True)
    )
    return DemoResult(result, filled, num_correct)


@contextmanager
def _replace_earlier_demo(folder: Path) -> Generator[None]:
    """Renames an earlier demo, and deletes it once the new run exists; if it doesn't, restores the earlier demo."""
    aside = folder.with_name(f".{folder.name}.earlier")
    if aside.exists() and not os.path.lexists(folder):  # the last demo was killed before its run existed
        aside.rename(folder)
    if not os.path.lexists(folder):
        yield
        return
    if not _is_demo(folder):
        raise RunError("this folder is not the run of a demo", location=str(folder), hint="choose another --out")
    check_not_in_use(folder)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    try:
        yield
    finally:
        if folder.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(folder)


def _is_demo(folder: Path) -> bool:
    """Returns whether a folder is the run of an earlier demo, by the name in its recipe."""
    recipe = folder / RunLayout.RECIPE
    try:
        return recipe.is_file() and load_toml(recipe).get("name") == RECIPE_NAME
    except RecipeError:
        return False
