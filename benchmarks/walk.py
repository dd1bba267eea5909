"""Keeps the annotated walk in docs/walk true: its quotations, outputs, figures and translation.

    python benchmarks/walk.py               # rewrites code, outputs and figures
    python benchmarks/walk.py --check       # lists what differs and writes nothing; the exit code is 1 if anything does
    python benchmarks/walk.py --translated  # also notes that the Korean prose is that of the English page

The chapters are one session: all Python blocks share their names, all commands one directory. In a page,

- a block after `<!-- source: objectives/mlm.py MaskedLMObjective.loss -->` is that object of src/unmask, or the file if
  no object is named. Ranges of lines may follow, as the beginnings of their first and last line: `"def" -> "return"`.
- a ```python block without such a line is executed. If a ```text block follows, it is what the block printed.
- a ```console block has the commands after `$ ` and what they print.

A page in docs/walk/ko has the same blocks in the same order. Only its prose is written by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import re
import shlex
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "unmask"
README, README_KO = ROOT / "README.md", ROOT / "README.ko.md"
WALK = ROOT / "docs" / "walk"
MARKER = re.compile(r"<!-- source: (\S+)(?: ([\w.]+))?((?: \"[^\"]+\"(?: -> \"[^\"]+\")?)*) -->")
RANGE = re.compile(r"\"([^\"]+)\"(?: -> \"([^\"]+)\")?")
STAMP = re.compile(r"<!-- translated from ([0-9a-f]{12}) -->\n")
NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?|-?\d+e[+-]?\d+")
PERCENT = re.compile(rf"({NUMBER.pattern})%")
VARIES = "numbers vary"  # in the title of an output: what training changed, so another machine prints other digits


# Pages ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its info string and lines, and the index of the line with its opening fence."""

    info: str
    lines: tuple[str, ...]
    fence: int
    marker: str  # the comment before it, if it quotes source code

    @property
    def language(self) -> str:
        return self.info.partition(" ")[0]

    @property
    def is_run(self) -> bool:
        return not self.marker and self.language in ("python", "console")


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    found: list[Block] = []
    lines, fence = page.splitlines(), -1
    for index, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if fence < 0:
            fence = index
            continue
        before = lines[fence - 1] if fence else ""
        marker = before if before.startswith("<!-- source:") else ""
        found.append(Block(lines[fence].removeprefix("```"), tuple(lines[fence + 1 : index]), fence, marker))
        fence = -1
    assert fence < 0, f"the block at line {fence + 1} is not closed"
    return found


def with_blocks(page: str, new: Sequence[Block]) -> str:
    """Return a page with other blocks in place of its own, in order."""
    lines = page.splitlines()
    for old, block in reversed(list(zip(blocks(page), new, strict=True))):
        lines[old.fence : old.fence + len(old.lines) + 2] = [f"```{block.info}", *block.lines, "```"]
    return "\n".join(lines) + "\n"


def prose_digest(page: str) -> str:
    """Return a digest of a page without the lines of its blocks."""
    bare = with_blocks(page, [Block("", (), block.fence, "") for block in blocks(page)])
    return hashlib.sha256(bare.encode()).hexdigest()[:12]


def chapters() -> list[str]:
    """Return the file names of the pages, in order."""
    return ["index.md", *sorted(path.name for path in WALK.glob("[0-9]*.md"))]


# Quoted code ----------------------------------------------------------------------------------------------------------


def quoted(marker: str) -> tuple[str, list[str]]:
    """Return the title and the lines that a comment names.

    Raises:
        LookupError: the file has no such object, or the object no such line.
    """
    match = MARKER.fullmatch(marker)
    assert match, f"not understood: {marker}"
    file, name, ranges = match.groups()
    text = (SOURCE / file).read_text(encoding="utf-8")
    lines = _object(text, name) if name else text.splitlines()
    kept: list[str] = []
    after = 0
    for first, last in RANGE.findall(ranges):
        begin = _line(lines, first, after, marker)
        end = _line(lines, last, begin + 1, marker) if last else begin
        if kept and begin > after:
            kept.append(" " * (len(lines[begin]) - len(lines[begin].lstrip())) + "...")
        kept += lines[begin : end + 1]
        after = end + 1
    body = textwrap.dedent("\n".join(kept or lines)).splitlines()
    return f"{file}: {name}" if name else file, body


def _line(lines: Sequence[str], beginning: str, after: int, marker: str) -> int:
    for index in range(after, len(lines)):
        if lines[index].lstrip().startswith(beginning):
            return index
    raise LookupError(f"no line begins with {beginning!r}: {marker}")


def _object(text: str, name: str) -> list[str]:
    """Return the lines of a class, function or method, without its docstring."""
    import ast

    body: list[ast.stmt] = ast.parse(text).body
    node: ast.stmt | None = None
    for part in name.split("."):
        node = next((one for one in body if getattr(one, "name", None) == part), None)
        if node is None:
            raise LookupError(f"no {name}")
        body = getattr(node, "body", [])
    assert node is not None
    first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
    lines = text.splitlines()[first - 1 : node.end_lineno]
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        del lines[body[0].lineno - first : (body[0].end_lineno or 0) - first + 1]
        if not lines[body[0].lineno - first].strip():
            del lines[body[0].lineno - first]
    return lines


# Running --------------------------------------------------------------------------------------------------------------


def run(pages: Mapping[str, str], folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the pages with quoted code and new outputs, and the names that their blocks left."""
    names: dict[str, Any] = {}
    with contextlib.chdir(folder):
        new = {name: with_blocks(page, _run_page(page, name, names)) for name, page in pages.items()}
    return new, names


def _run_page(page: str, name: str, names: dict[str, Any]) -> list[Block]:
    new: list[Block] = []
    printed: list[str] | None = None  # of the block before, until a ```text block shows it
    for block in blocks(page):
        lines, info = list(block.lines), block.info
        if block.marker:
            title, lines = quoted(block.marker)
            info = f'{block.language} title="{title}"'
        elif block.language == "python":
            # Blank lines before it, so that a traceback names the page's own line.
            program = "\n" * (block.fence + 1) + "\n".join(block.lines)
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(program, name, "exec"), names)
            printed = out.getvalue().splitlines()
        elif block.language == "console":
            lines = [line for command in _commands(block) for line in (f"$ {command}", *_command(command))]
        elif block.language == "text" and printed is not None:
            lines = printed
        if block.language != "python" or block.marker:
            assert not printed or block.language == "text", f"{name}: an output is not shown"
            printed = None
        new.append(Block(info, tuple(line.rstrip() for line in lines), block.fence, block.marker))
    return new


def _commands(block: Block) -> Iterator[str]:
    yield from (line.removeprefix("$ ") for line in block.lines if line.startswith("$ "))


def _command(command: str) -> list[str]:
    """Return what an `unmask` command prints."""
    from unmask.cli import main

    out = io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        patch.object(sys, "argv", shlex.split(command)),
        contextlib.suppress(SystemExit),
    ):
        main()
    return out.getvalue().rstrip().splitlines()


# Translation ----------------------------------------------------------------------------------------------------------


def translation(page: str, original: str, *, translated: bool) -> str:
    """Return a translated page with the blocks of the original."""
    filled = with_blocks(page, blocks(original))
    if translated:
        filled = STAMP.sub("", filled, count=1)
        filled = f"<!-- translated from {prose_digest(original)} -->\n{filled}"
    return filled


def outline(page: str) -> list[str]:
    """Return what a page and its translation must have in common: headings by level, figures, links to source."""
    bare = with_blocks(page, [Block("", (), block.fence, "") for block in blocks(page)])
    headings = [match[1] for match in re.finditer(r"^(#+) ", bare, re.MULTILINE)]
    figures = [Path(match[1]).name for match in re.finditer(r"!\[[^]]*\]\(([^)]+)\)", bare)]
    return [*headings, *figures]


# Comparison -----------------------------------------------------------------------------------------------------------


def differences(shown: str, new: str) -> list[str]:
    """Return a line for each block of a page that differs. Numbers with a fraction may differ a little."""
    found: list[str] = []
    for old, block in zip(blocks(shown), blocks(new), strict=True):
        varies = VARIES in block.info or block.language == "console"
        equal = old.info == block.info and (
            old.lines == block.lines
            if block.marker
            else _about_equal("\n".join(old.lines), "\n".join(block.lines), varies=varies)
        )
        if not equal:
            found.append(
                f"line {old.fence + 1}: shown is\n  {chr(10).join(old.lines)}\nnow it is\n  " + "\n".join(block.lines)
            )
    return found


def _about_equal(shown: str, new: str, *, varies: bool) -> bool:
    """Return whether two outputs have the same words, and numbers that are as close as another machine's."""
    relative, absolute, points = (0.7, 1.0, 15.0) if varies else (2e-3, 2e-3, 2e-3)  # points: of numbers in percent
    texts = [" ".join(NUMBER.sub("#", text).split()) for text in (shown, new)]
    found = [
        [[float(number) for number in pattern.findall(text)] for text in (shown, new)] for pattern in (NUMBER, PERCENT)
    ]
    percents = [set(numbers) for numbers in found[1]]
    return texts[0] == texts[1] and all(
        math.isclose(one, other, rel_tol=relative, abs_tol=points if one in percents[0] else absolute)
        for one, other in zip(*found[0], strict=True)
    )


def translation_problems(page: str, translated: str, name: str, translated_name: str) -> list[str]:
    """Return where a translation lacks what it must have in common with its page."""
    found: list[str] = []
    if outline(translated) != outline(page):
        found.append(f"{translated_name}: headings or figures are not those of {name}")
    if [(block.info, block.lines) for block in blocks(translated)] != [(one.info, one.lines) for one in blocks(page)]:
        found.append(f"{translated_name}: blocks are not those of {name}; run benchmarks/walk.py")
    stamp = STAMP.match(translated)
    if stamp is None or stamp[1] != prose_digest(page):
        found.append(
            f"{translated_name}: the text of {name} changed; translate it, then benchmarks/walk.py --translated"
        )
    return found


def problems(pages: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Return what is wrong with the pages and their translations, given the pages as they are after a new run."""
    found: list[str] = []
    for name, page in pages.items():
        found += [f"docs/walk/{name}, {difference}" for difference in differences(page, new[name])]
        path = WALK / "ko" / name
        if not path.is_file():
            found.append(f"docs/walk/ko/{name} is missing")
            continue
        found += translation_problems(
            page, path.read_text(encoding="utf-8"), f"docs/walk/{name}", f"docs/walk/ko/{name}"
        )
    return found


# Figures --------------------------------------------------------------------------------------------------------------

BLUE, ORANGE, GRAY, GREEN = "#3b6ea5", "#d9822b", "#d9d9d9", "#4f9a5b"


def counts(names: Mapping[str, Any], axes: Any) -> None:
    """Chapter 2: how many tokens are masked, by an exact count and by a coin for each token."""
    np, exact, coins = names["np"], names["counts"], names["coins"].sum(1)
    values = np.arange(0, coins.max() + 1)
    for shift, given, name, color in ((-0.2, exact, "⌊r·n + u⌋", BLUE), (0.2, coins, "a coin for each token", ORANGE)):
        axes.bar(values + shift, [np.mean(given == value) for value in values], 0.4, label=name, color=color)
    axes.set(xlabel="masked tokens of 32", ylabel="share of epochs", xticks=values)
    axes.legend(frameon=False)


def masks(names: Mapping[str, Any], axes: Any) -> None:
    """Chapter 3: what replaces the tokens of one line in each epoch."""
    np, encoded, objective, tokenizer = (names[name] for name in ("np", "encoded", "objective", "tokenizer"))
    grid = np.zeros((40, len(encoded.ids)))
    for epoch in range(len(grid)):
        masked = objective.corrupt(names["pack"]([names["Sample"](encoded.ids, encoded.marks, epoch, 0)]), 17)
        new = masked.batch.ids_T[masked.positions_M]
        case = np.where(new == tokenizer.mask_id, 1, np.where(new == masked.labels_M, 3, 2))
        grid[epoch, masked.positions_M] = case
    _cells(axes, grid, [GRAY, BLUE, ORANGE, GREEN])
    axes.set(ylabel="epoch", xticks=range(grid.shape[1]), xticklabels=list(names["line"].replace(" ", "␣")))
    for color, name in ((BLUE, "[MASK]"), (ORANGE, "random"), (GREEN, "kept")):
        axes.plot([], [], "s", color=color, label=name)
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def packing(names: Mapping[str, Any], axes: Any) -> None:
    """Chapter 4: the influence of each token on each vector, for packed and for joined sequences."""
    for one, matrix, title in zip(
        axes, (names["packed_influence"], names["joined_influence"]), ("packed", "joined to one sequence"), strict=True
    ):
        one.imshow(matrix.numpy() > 1e-4, cmap=_colors([GRAY, BLUE]), vmin=0, vmax=1, interpolation="nearest")
        one.set(title=title, xlabel="masked token", ylabel="changed vector")


def waves(names: Mapping[str, Any], axes: Any) -> None:
    """Chapter 5: the position vectors."""
    axes.imshow(names["table"].numpy(), cmap="RdBu", aspect="auto", interpolation="nearest")
    axes.set(xlabel="dimension", ylabel="position")


def plateau(names: Mapping[str, Any], axes: Any) -> None:
    """Chapter 8: losses of the two runs, the unigram line, and what can be known."""
    for name, label, color in (("farm", "the run", BLUE), ("slow", "a tenth of the learning rate", ORANGE)):
        log = [entry for entry in names["unmask"].Run(f"runs/{name}").log() if "validation" in entry]
        axes.plot([e["step"] for e in log], [e["validation"]["loss"] for e in log], color=color, label=label)
    for value, text, side in (
        (log[0]["validation"]["unigram_loss"], "unigram", "bottom"),
        (names["place_only"], "places known", "bottom"),
        (names["everything"], "all that can be known", "top"),
    ):
        axes.axhline(value, color="black", linestyle=":", linewidth=0.8)
        axes.annotate(text, (150, value), ha="right", va=side, fontsize=8)
    axes.set(xlabel="step", ylabel="loss on held-out sentences", ylim=(0, None))
    axes.legend(frameon=False)


def shakespeare(names: Mapping[str, Any], axes: Any) -> None:
    """Chapter 8: the measured curve of the tutorial's model on Tiny Shakespeare."""
    run = json.loads((ROOT / "benchmarks" / "results" / "time_to_loss.json").read_text(encoding="utf-8"))["runs"][
        "seed"
    ]
    axes.plot([e["step"] for e in run["curve"]], [e["loss"] for e in run["curve"]], color=BLUE, marker=".")
    axes.axhline(run["unigram_loss"], color="black", linestyle=":", linewidth=0.8)
    axes.annotate("unigram", (2000, run["unigram_loss"]), ha="right", va="bottom", fontsize=8)
    axes.set(xlabel="step", ylabel="loss")


def attention(names: Mapping[str, Any], axes: Any) -> None:
    """Chapter 11: attention weights of the masked food in the trained model, for each head."""
    model, torch = names["model"], names["torch"]
    encoded = model.tokenizer.encode("the young cow likes [MASK] today.", specials_in_text=True)
    batch = names["pack"]([names["Sample"](encoded.ids, encoded.marks)])
    place, rows, labels = encoded.ids.tolist().index(model.tokenizer.mask_id), [], []
    heads = (model.settings.num_attention_heads, model.settings.head_width)

    def look(number: int) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Any, ...]) -> None:
            hidden = inputs[0][: len(encoded.ids)]  # the rest of a batch of round size has no meaning
            query, key = (linear(hidden).unflatten(-1, heads) for linear in (module.query, module.key))
            weights = (torch.einsum("qhk,shk->hqs", query, key) / heads[1] ** 0.5).softmax(-1)
            rows.extend(weights[:, place])
            labels.extend(f"layer {number + 1}, head {head + 1}" for head in range(heads[0]))

        return hook

    hooks = [b.attention.register_forward_pre_hook(look(number)) for number, b in enumerate(model.encoder.blocks)]
    with torch.no_grad():
        model.encoder(batch)
    for one in hooks:
        one.remove()
    axes.imshow(torch.stack(rows).numpy(), cmap="Blues", aspect="auto", interpolation="nearest", vmin=0)
    tokens = [model.tokenizer.id_to_token(int(id)) for id in encoded.ids]
    axes.set(xticks=range(len(tokens)), xticklabels=tokens, yticks=range(len(rows)), yticklabels=labels)


def _colors(colors: Sequence[str]) -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap(list(colors))


def _cells(axes: Any, grid: Any, colors: Sequence[str]) -> None:
    axes.imshow(grid, cmap=_colors(colors), vmin=0, vmax=len(colors) - 1, aspect="auto", interpolation="nearest")


FIGURES: dict[str, tuple[Callable[[Mapping[str, Any], Any], None], int, tuple[float, float]]] = {
    "counts": (counts, 1, (5.0, 2.4)),
    "masks": (masks, 1, (6.4, 4.0)),
    "packing": (packing, 2, (6.4, 3.2)),
    "sinusoids": (waves, 1, (5.0, 3.0)),
    "plateau": (plateau, 1, (5.6, 3.0)),
    "shakespeare": (shakespeare, 1, (5.6, 2.4)),
    "attention": (attention, 1, (6.4, 2.8)),
}


def draw(names: Mapping[str, Any], folder: Path) -> None:
    """Draw the figures of the chapters from the tensors that their blocks left."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    mpl.rcParams.update(
        {"svg.hashsalt": "walk", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
         "axes.spines.right": False}
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    for name, (figure, columns, size) in FIGURES.items():
        canvas, axes = pyplot.subplots(1, columns, figsize=size, layout="constrained")
        figure(names, axes)
        canvas.savefig(
            folder / f"{name}.svg", metadata={"Date": None, "Creator": None}, facecolor="white", bbox_inches="tight"
        )
        pyplot.close(canvas)


# Command --------------------------------------------------------------------------------------------------------------


def main() -> int:
    """Rewrite the walk, or report what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="report differences, write nothing")
    parser.add_argument("--translated", action="store_true", help="note that the translations are up to date")
    given = parser.parse_args()
    pages = {name: (WALK / name).read_text(encoding="utf-8") for name in chapters()}
    with tempfile.TemporaryDirectory() as folder:
        new, names = run(pages, Path(folder))
        if given.check:
            found = problems(pages, new)
            print("\n".join(found) or "the walk is up to date")
            return int(bool(found))
        with contextlib.chdir(folder):
            draw(names, WALK / "figures")
    for name, page in new.items():
        (WALK / name).write_text(page, encoding="utf-8")
    translations = {WALK / "ko" / name: page for name, page in new.items()}
    translations[README_KO] = README.read_text(encoding="utf-8")
    for path, page in translations.items():
        if path.is_file():
            text = translation(path.read_text(encoding="utf-8"), page, translated=given.translated)
            path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
