"""The project speaks the field's language: words that it has given up stay out of names, docstrings, help and messages.

Words in identifiers are the parts between underscores and capital letters. The random streams' names, digest salts and
file formats are data: they stand in `ALLOWED` with the place where they may be used.
"""

from __future__ import annotations

import ast
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "unmask"
MODULES = sorted(SOURCE.rglob("*.py"))

# A banned word and what is said instead.
BANNED = {
    "anew": "again",
    "askable": "maskable",
    "asked": "masked, selected",
    "asks": "masks, selects",
    "door": "entry point",
    "doors": "entry points",
    "duties": "callbacks",
    "duty": "callback",
    "ecosystem": "Hugging Face, transformers",
    "floor": "layer, minimum",
    "floors": "layers",
    "house": "this project",
    "nobody": "no one is addressed in reference text",
    "optimiser": "optimizer",
    "ours": "unmask's",
    "piece": "token",
    "pieces": "tokens",
    "puzzle": "masked batch",
    "puzzles": "masked batches",
    "room": "module",
    "rooms": "modules",
    "said": "notes, description",
    "somebody": "the user",
    "theirs": "of transformers",
    "told": "reported, metadata",
    "workshop": "components",
}
PHRASES = ["a person", "of ours", "in hand", "room card", "called by:", "comes in:", "goes out:"]

# Places where a banned word is right: (path below src/unmask, the whole line contains this text).
ALLOWED = [
    ("data/sentence_pairs.py", '"piece"'),  # the name of a random stream: data
    ("data/sentence_pairs.py", "floor(s / 2)"),  # the mathematical function
    ("checks/plugins/fixtures.py", "Nobody knew what to say"),  # a line of the text that plugins are checked with
    ("core/renamed_keys.py", '": "'),  # former names of settings, which errors translate
]


def parts(identifier: str) -> list[str]:
    """`numMaskable_T` as its words in lower case."""
    return [word.lower() for word in re.findall(r"WordPiece|[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)]


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything that the module itself names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.lineno, node.target.id


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string and comment: docstrings, messages, help, reasons."""
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type in (tokenize.STRING, tokenize.COMMENT):
                for offset, line in enumerate(token.string.splitlines()):
                    yield token.start[0] + offset, line


def occurrences(path: Path) -> Iterator[tuple[int, str]]:
    """Line and word of every banned word in a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for line, name in identifiers(tree):
        yield from ((line, word) for word in parts(name) if word in BANNED)
    for line, text in texts(path):
        lowered = text.lower()
        yield from ((line, word) for word in re.findall(r"[a-z]+", lowered) if word in BANNED)
        yield from ((line, phrase) for phrase in PHRASES if re.search(rf"\b{re.escape(phrase)}", lowered))


def is_allowed(path: Path, line: int) -> bool:
    text = path.read_text(encoding="utf-8").splitlines()[line - 1]
    return any(path.relative_to(SOURCE).as_posix() == place and words in text for place, words in ALLOWED)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_speaks_the_fields_language(path: Path) -> None:
    found = [
        f"line {line}: `{word}`: say {BANNED.get(word, 'it plainly')}"
        for line, word in occurrences(path)
        if not is_allowed(path, line)
    ]
    assert not found, "\n".join(found)


def test_each_exception_is_needed() -> None:
    for place, words in ALLOWED:
        lines = [line for line, _ in occurrences(SOURCE / place)]
        text = (SOURCE / place).read_text(encoding="utf-8").splitlines()
        assert any(words in text[line - 1] for line in lines), f"{place} has no `{words}` any more"


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        'def lay_pieces(askable_T):  # a floor\n    """Tells a person."""\n    told = 1\n    hidden_size = 2\n'
    )
    assert Counter(word for _, word in occurrences(module)) == Counter(
        ["pieces", "askable", "floor", "a person", "told"]
    )


if __name__ == "__main__":  # how many there are: python tests/repository/test_words.py
    print(Counter(word for path in MODULES for _, word in occurrences(path)))
