"""Commands on sentence vectors: embed and search."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from unmask.cli.options import (
    DataOptions,
    Errors,
    Field,
    Json,
    ModelPath,
    check_utf8,
    delayed_progress,
    open_display,
    open_model,
    print_json,
)
from unmask.core.errors import DamagedError, ModelError, RecipeError, StoreError, TextError
from unmask.core.files import check_writable, wrap_os_errors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from unmask.models.model import Model

    Vectors = NDArray[np.float32]

EMBED_EXAMPLES = """\
[bold]Examples[/bold]

unmask embed runs/notes "A cat sat." "A dog ran." "It rained."      cosines between the texts
unmask embed runs/notes --file notes.txt --out notes.npy
unmask embed runs/notes --file notes.txt --out notes.jsonl --pooling cls --last-layers 2
"""
SEARCH_EXAMPLES = """\
[bold]Examples[/bold]

unmask search runs/notes "A cat sat on a mat." --file notes.txt
unmask search runs/notes "A cat sat on a mat." --file notes.txt --vectors notes.npy --top 10
"""
MAX_TEXTS: Final = 1_000_000
MAX_CHARACTERS: Final = 1 << 28  # of all texts together
_MATRIX_TEXTS: Final = 12  # the most whose cosines are printed as a table
_CHECKED: Final = 8  # vectors of a file that are computed again
_TOLERANCE: Final = 1e-3
_BAR_WIDTH: Final = 20

PoolingOption = Annotated[
    Literal["mean", "cls"], typer.Option("--pooling", help="Vector of a text: mean of its tokens, or \\[CLS].")
]
LastLayers = Annotated[int, typer.Option(metavar="K", help="Number of last layers whose hidden states are averaged.")]
Document = Annotated[Literal["blank-line", "line", "file"], typer.Option(help="Unit of --file that is one text.")]


# embed --------------------------------------------------------------------------------------------------------------


def embed_texts(
    model: ModelPath,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="Texts to embed.")] = None,
    file: Annotated[Path | None, typer.Option(help="File of texts.")] = None,
    pooling: PoolingOption = "mean",
    last_layers: LastLayers = 1,
    out: Annotated[
        Path | None, typer.Option(help="File to write: .npy, or .jsonl with the texts.", show_default="none")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.", show_default=False)] = False,
    document: Document = "line",
    field: Field = None,
    errors: Errors = None,
    as_json: Json = False,
) -> None:
    r"""Compute one vector for each text: the mean hidden state of its tokens, or that of \[CLS], of length 1.

    Blank lines are left out. Without --out, a terminal shows the cosines between the texts, and a pipe receives one
    JSON object per text. The vectors are those of the export to sentence-transformers.
    """
    from unmask.models.embed import embed

    _check_out(out, file, force=force)
    listed = [*map(check_utf8, texts or []), *_read_texts(file, DataOptions(errors, document, field))]
    if not listed:
        raise RecipeError("no text was given", location="unmask embed", hint="give a TEXT, or --file FILE")
    opened = open_model(model)
    with open_display(sys.stderr) as display:
        vectors_ND = embed(
            opened, listed, pooling=pooling, last_layers=last_layers, on_progress=delayed_progress(display)
        )
    if out is None:
        _print_vectors(listed, vectors_ND, as_json=as_json)
        return
    _write(out, listed, vectors_ND)
    count, size = vectors_ND.shape
    if as_json:
        print_json({"path": str(out), "texts": count, "size": size, "pooling": pooling, "last_layers": last_layers})
    else:
        layers = "the last layer" if last_layers == 1 else f"the last {last_layers} layers"
        print(f"written  {out}: {count:,} vectors of {size:,} numbers ({pooling} of {layers})")


def _check_out(out: Path | None, file: Path | None, *, force: bool) -> None:
    if out is None:
        return
    location = f"--out {out}"
    if out.suffix not in (".npy", ".jsonl"):
        raise RecipeError(f"unknown format {out.suffix!r}", location=location, hint="name a .npy or a .jsonl file")
    if file is not None and out.exists() and file.exists() and out.samefile(file):
        raise StoreError("the output is the input", location=location, hint="choose another file")
    if os.path.lexists(out) and not (force and out.is_file()):
        raise StoreError("the path exists already", location=location, hint="choose another file, or add --force")
    check_writable(out.absolute().parent)


def _read_texts(file: Path | None, options: DataOptions) -> list[str]:
    """Return the documents of a file that aren't blank.

    Raises:
        TextError: the file can't be read, or has too many texts or characters.
    """
    from unmask.data.sources import open_source

    texts: list[str] = []
    if file is None:
        return texts
    characters = 0
    source = open_source([file], options.config())
    parts = source.parts()
    with open_display(sys.stderr) as display:
        progress = delayed_progress(display)
        for number, part in enumerate(parts, start=1):
            for text in _documents(source.documents(part)):
                texts.append(text)
                characters += len(text)
                if len(texts) > MAX_TEXTS or characters > MAX_CHARACTERS:
                    raise TextError(
                        f"more than {MAX_TEXTS:,} texts or {MAX_CHARACTERS:,} characters",
                        location=str(file),
                        hint="split the file",
                    )
            progress("reading texts", number / len(parts))
    return texts


def _documents(chunks: Iterator[Any]) -> Iterator[str]:
    """Yield the documents that consist of chunks, without blank ones."""
    parts = list[str]()
    for chunk in chunks:
        parts.append(chunk.text)
        if chunk.last:
            text = "".join(parts).strip()
            parts = []
            if text:
                yield text


def _write(out: Path, texts: Sequence[str], vectors_ND: Vectors) -> None:
    """Write vectors under another name, then rename the file."""
    import numpy as np

    temporary = out.with_name(f".{out.name[:100]}.{os.getpid()}")
    with wrap_os_errors(out):
        try:
            if out.suffix == ".npy":
                with temporary.open("wb") as stream:
                    np.save(stream, vectors_ND)
            else:
                with temporary.open("w", encoding="utf-8") as lines:
                    lines.writelines(f"{_line(text, row)}\n" for text, row in zip(texts, vectors_ND, strict=True))
            os.replace(temporary, out)
        except BaseException:  # for example a full disk
            temporary.unlink(missing_ok=True)
            raise


def _line(text: str, vector_D: Vectors) -> str:
    """Return a text with its vector as JSON; each number is the shortest one that is equal in float32."""
    return json.dumps({"text": text, "vector": _numbers(vector_D)}, ensure_ascii=False)


def _numbers(vector_D: Vectors) -> list[float]:
    return [float(str(number)) for number in vector_D]


def _print_vectors(texts: Sequence[str], vectors_ND: Vectors, *, as_json: bool) -> None:
    """Print cosines as a table in a terminal, and JSON elsewhere."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from unmask.core.format import visible

    if as_json:
        print_json([{"text": text, "vector": _numbers(row)} for text, row in zip(texts, vectors_ND, strict=True)])
        return
    console = Console(highlight=False)
    if not (console.is_terminal and 2 <= len(texts) <= _MATRIX_TEXTS):
        for text, row in zip(texts, vectors_ND, strict=True):
            print(_line(text, row))
        return
    table = Table(box=None, pad_edge=False, title="cosines", title_justify="left")
    table.add_column("")
    for number in range(1, len(texts) + 1):
        table.add_column(str(number), justify="right")
    table.add_column("", no_wrap=True, overflow="ellipsis")
    for number, (text, row) in enumerate(zip(texts, vectors_ND @ vectors_ND.T, strict=True), start=1):
        cells = [Text(f"{cosine:.3f}", "dim" if at == number else "") for at, cosine in enumerate(row, start=1)]
        table.add_row(str(number), *cells, Text(visible(text), "bold"))
    console.print(table)


# search -------------------------------------------------------------------------------------------------------------


def search_texts(
    model: ModelPath,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="Text whose neighbors are searched.")],
    file: Annotated[Path, typer.Option(help="File of texts.")],
    top: Annotated[int, typer.Option(min=1, help="Number of texts to show.")] = 5,
    vectors: Annotated[
        Path | None,
        typer.Option(metavar="X.npy", help="Vectors of the file by unmask embed.", show_default="computed"),
    ] = None,
    pooling: PoolingOption = "mean",
    last_layers: LastLayers = 1,
    document: Document = "line",
    field: Field = None,
    errors: Errors = None,
    as_json: Json = False,
) -> None:
    """Find the texts of a file whose vectors have the largest cosines to that of a query.

    The vectors have not been trained for similarity, and the words of a text find it more often. Texts are numbered
    from 1; blank lines are left out. Stored vectors must have been computed with the same options: a few of them are
    computed again and compared.
    """
    from unmask.models.embed import embed, nearest

    texts = _read_texts(file, DataOptions(errors, document, field))
    opened = open_model(model)
    with open_display(sys.stderr) as display:
        progress = delayed_progress(display)
        if vectors is None:
            vectors_ND = embed(opened, texts, pooling=pooling, last_layers=last_layers, on_progress=progress)
        else:
            vectors_ND = _read_vectors(vectors, opened, len(texts))
            chosen = list(range(0, len(texts), -(-len(texts) // _CHECKED)))
            again = embed(opened, [texts[at] for at in chosen], pooling=pooling, last_layers=last_layers)
            _check_vectors(vectors, chosen, vectors_ND[chosen], again)
        (query_D,) = embed(opened, [check_utf8(query)], pooling=pooling, last_layers=last_layers)
    found = nearest(vectors_ND, query_D, top)
    rows = [{"number": near.number + 1, "cosine": near.cosine, "text": texts[near.number]} for near in found]
    if as_json:
        print_json({"query": query, "texts": len(texts), "nearest": rows})
    else:
        _print_neighbors(rows)


def _read_vectors(path: Path, model: Model, count: int) -> Vectors:
    """Open a .npy file of vectors without reading all of it.

    Raises:
        DamagedError: the file can't be read as an array of numbers.
        ModelError: its shape isn't that of the texts and the model.
    """
    import numpy as np

    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise TextError(f"can't read: {error.strerror or error}", location=str(path), hint="check the path") from error
    except (ValueError, SyntaxError, TokenError, TypeError, OverflowError) as error:  # of numpy, about a damaged header
        raise DamagedError(
            f"this is not an array of numbers: {error}",
            location=str(path),
            hint="write it again: unmask embed MODEL --file FILE --out X.npy",
        ) from error
    expected = (count, model.settings.hidden_size)
    if found.shape != expected or found.dtype != np.float32:
        raise ModelError(
            f"invalid vectors: got {' × '.join(map(str, found.shape))} in {found.dtype}, expected "
            f"{expected[0]} texts × {expected[1]} in float32",
            location=str(path),
            hint="write them again with this model, file and --document",
        )
    return found


def _check_vectors(path: Path, numbers: Sequence[int], stored_KD: Vectors, again_KD: Vectors) -> None:
    """Raise ModelError if stored vectors aren't those of the texts."""
    differences = abs(stored_KD - again_KD).max(axis=1)
    if not (differences <= _TOLERANCE).all():
        wrong = next(at for at, difference in zip(numbers, differences, strict=True) if not difference <= _TOLERANCE)
        raise ModelError(
            f"the vector of text {wrong + 1} is another one than this model computes",
            location=str(path),
            hint="write the vectors again with this model, file and options",
        )


def _print_neighbors(rows: Sequence[dict[str, Any]]) -> None:
    """Print neighbors: with bars and shortened texts in a terminal, as lines in a pipe."""
    from rich.console import Console
    from rich.text import Text

    from unmask.core.format import bar, visible

    console = Console(highlight=False)
    width = max(len(f"{row['number']:,}") for row in rows)
    for row in rows:
        line = Text(f"{row['cosine']:.3f}  ")
        if console.is_terminal:
            line.append(f"{bar(row['cosine'], _BAR_WIDTH):<{_BAR_WIDTH}}  ", "green")
        line.append(f"{row['number']:>{width},}  ", "dim").append(visible(row["text"]))
        console.print(line, no_wrap=True, overflow="ellipsis" if console.is_terminal else "ignore", crop=False)
