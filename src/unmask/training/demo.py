"""Room card: the English that every Python installation carries.

Comes in: nothing; the standard library is read as source, never imported or run. Goes out: documents: the language
reference's topics (pydoc_data.topics) and the docstrings of each module, doctest lines left out. Called by: the demo,
the verb audit.
"""

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

from unmask.core.errors import RunError
from unmask.models.fill_mask import FillMaskResult, fill
from unmask.models.model import load
from unmask.training.display import Display
from unmask.training.pretrain import Result, launch
from unmask.training.recipe import RECIPE, load_recipe
from unmask.training.runs import refuse_in_use

_FEWEST_CHARACTERS = 200
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def english_of_python(most_characters: float = float("inf")) -> list[str]:
    """Documents in a fixed order, the same for every run of one Python version; no more once there are so many."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    documents = list(_topics(folder))
    characters = sum(map(len, documents))
    for file in sorted(folder.rglob("*.py")):
        if characters >= most_characters:
            break
        if _LEFT_OUT & set(file.relative_to(folder).parts) or file.parent.name == "pydoc_data":
            continue
        text = "\n\n".join(_docstrings(file))
        if len(text) >= _FEWEST_CHARACTERS:
            documents.append(text)
            characters += len(text)
    return documents


def _parsed(file: Path) -> ast.Module | None:
    """A source file as a tree; None where this Python can't parse it (old code that some distributions carry)."""
    try:
        with warnings.catch_warnings():  # invalid escapes in others' docstrings are no news here
            warnings.simplefilter("ignore")
            return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return None


def _topics(folder: Path) -> Iterator[str]:
    """The language reference, topic by topic: a dictionary of texts, read without running it."""
    tree = _parsed(folder / "pydoc_data" / "topics.py")
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            texts = [value.value for value in node.value.values if isinstance(value, ast.Constant)]
            yield from (_prose(text) for text in texts if isinstance(text, str))


def _docstrings(file: Path) -> Iterator[str]:
    """The docstrings of a module and all in it, in the order of the file."""
    tree = _parsed(file)
    if tree is None:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = ast.get_docstring(node)
            if found and len(prose := _prose(found)) > 30:
                yield prose


def _prose(text: str) -> str:
    """Without doctests, whose lines are no English, and with paragraphs on lines of their own."""
    lines = [line.strip() for line in inspect.cleandoc(text).splitlines()]
    kept = [line for line in lines if not line.startswith((">>>", "..."))]
    return "\n".join(kept).strip()


MARK: Final = "demonstration"  # the name of a demo's recipe: a person's own run of the recipe `demo` is not replaced
SENTENCES: Final[tuple[tuple[str, str], ...]] = (
    ("If the argument is omitted, the [MASK] value is used.", "default"),
    ("Return the number of [MASK] in the list.", "items"),
    ("A TypeError is [MASK] if the argument is not a string.", "raised"),
    ("Open the file and [MASK] its contents.", "read"),
    ("Return True if the object is an [MASK] of the class.", "instance"),
)
"""Fixed sentences and the word that belongs in each; none of them stands in the training text as it is."""


@dataclass(frozen=True)
class Demo:
    """What the demonstration made: the run, the answers, and how many of the right words were among the first five."""

    result: Result
    filled: tuple[FillMaskResult, ...]
    right: int


def demo(
    out: str | Path = "runs/demo", *, display: Display | None = None, overrides: Mapping[str, Any] | None = None
) -> Demo:
    """Pretrain on the standard library's English, then fill five masks. An earlier demo in `out` is replaced.

    Raises:
        RunError: `out` holds something that no demo made, or one is at work there.
    """
    folder = Path(out)
    recipe = replace(load_recipe("demo", (), overrides), name=MARK)
    with _earlier_set_aside(folder):
        result = launch(list(english_of_python()), recipe=recipe, out=folder, display=display)
    filled = tuple(fill(load(folder), [sentence for sentence, _ in SENTENCES], top=5))
    right = sum(
        word in {candidate.token_str for candidate in one.masks[0].candidates}
        for one, (_, word) in zip(filled, SENTENCES, strict=True)
    )
    return Demo(result, filled, right)


@contextmanager
def _earlier_set_aside(folder: Path) -> Generator[None]:
    """An earlier demo goes when the new one has begun to be written; until then it comes back, whatever happens."""
    aside = folder.with_name(f".{folder.name}.earlier")
    if aside.exists() and not os.path.lexists(folder):  # a kill came before the new one had begun
        aside.rename(folder)
    if not os.path.lexists(folder):
        yield
        return
    recipe = folder / RECIPE
    if not (recipe.is_file() and f'name = "{MARK}"' in recipe.read_text(encoding="utf-8")):
        raise RunError("this folder was not made by a demo", location=str(folder), hint="choose another --out")
    refuse_in_use(folder)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    try:
        yield
    finally:
        if folder.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(folder)
