"""Writes docs/images/session.svg: a real `unmask pretrain` in a terminal, from its first estimate to its results.

    python benchmarks/session_svg.py TEXT [--recipe char] [--budget "60 s"] [--out docs/images/session.svg]

The run uses the live display on a terminal of 100 columns that is recorded; its output is replayed to the rows that
remain on the screen, and Rich writes them as SVG.
"""

from __future__ import annotations

import argparse
import io
import re
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

import unmask
from unmask.core.keywords import python_words
from unmask.training.display.live import LiveDisplay

WIDTH, HEIGHT = 100, 40
TOKEN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+")
STYLE = re.compile(r"\x1b\[[0-9;]*m")


def screen(output: str) -> list[str]:
    """The rows that are on the screen at the end, with their styles: what Rich redraws in place is erased."""
    rows, at = [""], 0
    for token in TOKEN.findall(output):
        if token == "\n":
            at += 1
            rows += [""] * (at - len(rows) + 1)
        elif token.startswith("\x1b[") and token.endswith("A"):
            at -= int(token[2:-1] or 1)
        elif token.startswith("\x1b[") and token.endswith("K"):
            rows[at] = ""
        elif not token.startswith("\x1b[") or STYLE.fullmatch(token):
            rows[at] += "" if token == "\r" else token
    return rows


def session(text: Path, recipe: str, budget: str) -> list[str]:
    """The rows of a run on a text."""
    stream = io.StringIO()
    console = Console(
        file=stream, width=WIDTH, height=HEIGHT, force_terminal=True, color_system="truecolor", legacy_windows=False
    )
    with tempfile.TemporaryDirectory() as folder:
        display = LiveDisplay(console, python_words)
        unmask.pretrain(str(text), recipe=recipe, budget=budget, out=f"{folder}/play", display=display)
        return [row.replace(folder, "runs") for row in screen(stream.getvalue())]


def to_svg(rows: list[str], title: str) -> str:
    """The rows as SVG, in the fonts of the reader's machine: Rich's own names a font on a server."""
    recorded = Console(file=io.StringIO(), width=WIDTH, record=True, force_terminal=True, color_system="truecolor")
    for row in rows:
        recorded.print(Text.from_ansi(row), no_wrap=True, crop=True)
    svg = recorded.export_svg(title=title)
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code", "ui-monospace, Menlo, Consolas")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--recipe", default="char")
    parser.add_argument("--budget", default="60 s")
    parser.add_argument("--out", type=Path, default=Path("docs/images/session.svg"))
    options = parser.parse_args()
    rows = session(options.text, options.recipe, options.budget)
    begin = next(number for number, row in enumerate(rows) if STYLE.sub("", row).strip() == "estimate")
    rows = [row for row in rows[begin:] if not STYLE.sub("", row).startswith("saved ")]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    command = f'unmask pretrain {options.text.name} --recipe {options.recipe} --budget "{options.budget}"'
    options.out.write_text(to_svg(rows, command))
    print(f"{options.out}: {options.out.stat().st_size:,} bytes, {len(rows)} rows")


if __name__ == "__main__":
    main()
