"""Room card: the English that every Python installation carries.

Comes in: nothing; the standard library is read as source, never imported or run. Goes out: documents: the language
reference's topics (pydoc_data.topics) and the docstrings of each module, doctest lines left out. Called by: the demo,
the verb audit.
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

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
