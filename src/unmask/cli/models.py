"""Commands on trained models: fill, export, import and serve."""

from __future__ import annotations

import codecs
import contextlib
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

import typer

from unmask.cli.errors import print_error
from unmask.cli.options import (
    MODEL_HELP,
    Force,
    Json,
    JsonList,
    ModelPath,
    OutputPath,
    check_utf8,
    complete_model,
    delayed_progress,
    open_display,
    open_model,
    print_json,
)
from unmask.core.errors import ModelError, TextError, UnmaskError

if TYPE_CHECKING:
    from unmask.hub.to_hf import Exported
    from unmask.models.fill_mask import FillMaskResult
    from unmask.models.joint_fill import JointFillResult
    from unmask.models.model import Model

# fill ---------------------------------------------------------------------------------------------------------------

FILL_EXAMPLES = """\
[bold]Examples[/bold]

unmask fill runs/demo "Return the \\[MASK] of the list."
unmask fill runs/demo "The \\[MASK] of the \\[MASK]." --top 3 --json
unmask fill runs/demo --file sentences.txt             one text per line
cat sentences.txt | unmask fill runs/demo
unmask fill runs/demo "\\[MASK]*2 of the \\[MASK]." --joint beam
unmask fill runs/demo "The \\[MASK] sat." --words 3
"""
_BAR_WIDTH = 30
_SEVERAL_MASKS = re.compile(r"\[MASK\]\*\d")
_BATCH = 64  # texts that are filled together
_READ_BYTES = 1 << 16
_LONGEST_LINE = 1 << 24  # bytes


def fill(
    model: ModelPath,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="Texts with \\[MASK]; standard input is read if there is none, or for -."),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="File of texts, one per line.")] = None,
    top: Annotated[int, typer.Option(help="Number of tokens to show for each mask.")] = 5,
    strict: Annotated[
        bool, typer.Option("--strict", help="Print nothing if one text can't be filled.", show_default=False)
    ] = False,
    joint: Annotated[
        Literal["best-first", "beam"] | None,
        typer.Option(
            help="Fill all masks of a text jointly, ranked by joint log-probability: from left to right (beam), or the "
            "most certain mask first (best-first). \\[MASK]*3 is three masks in a row.",
            show_default="each mask by itself",
        ),
    ] = None,
    beam_size: Annotated[
        int | None, typer.Option(help="Number of fillings that a joint search keeps.", show_default="10")
    ] = None,
    words: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Fill each \\[MASK] with a whole word of 1 to K tokens, jointly; the order is beam unless --joint is "
            "given. Numbers of tokens have equal weight: log-probabilities are not divided by length.",
            show_default="one token",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    r"""Fill every \[MASK] of a text with the most probable tokens.

    Every text and every line gets one answer, in order. A text that can't be filled gets an error instead, and the
    exit code is 2 at the end. A blank line gets an empty answer.
    """
    given = [_Prompt(check_utf8(text)) for text in texts or [] if text != "-"]
    read_input = (not texts and file is None) or "-" in (texts or [])
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(_open(file)) if file is not None else None
        loaded = open_model(model)
        filler = _filler(loaded, top, joint, beam_size, words)
        if read_input and sys.stdin.isatty() and not as_json:
            _fill_interactively(filler)
            return
        batches = itertools.chain(
            [given],
            _batches(opened, str(file)) if opened else (),
            _batches(sys.stdin.buffer, "standard input") if read_input else (),
        )
        if strict:
            batches = iter([list(itertools.chain.from_iterable(batches))])
        count, failed = _print_answers(
            (pair for batch in batches for pair in _answers(filler, batch, strict=strict)), filler, as_json=as_json
        )
    if not count:
        raise TextError("no text was given", hint='give a text with [MASK]: "The cat sat on the [MASK]."')
    if failed:
        raise typer.Exit(UnmaskError.exit_code)


@dataclass(frozen=True)
class _Filler:
    """The function that fills texts, and the one that returns the result of a blank text."""

    fill: Callable[[Sequence[str]], Sequence[FillMaskResult | JointFillResult]]
    blank: Callable[[str], FillMaskResult | JointFillResult]


def _filler(
    model: Model, top: int, joint: Literal["best-first", "beam"] | None, beam_size: int | None, words: int | None
) -> _Filler:
    """Return the filler for the options of `fill`.

    Raises:
        ModelError: an option is out of its range or needs another one, or the model makes no masked predictions.
    """
    from unmask.models import fill_mask, joint_fill
    from unmask.models.model import require_masked_lm

    require_masked_lm(model, "fill masks")
    if joint is None and words is None:
        fill_mask.check_top(model, top)
        if beam_size is not None:
            raise ModelError("--beam-size needs a joint search", hint="add --joint beam, or leave --beam-size out")

        def fill_each(texts: Sequence[str]) -> Sequence[FillMaskResult]:
            if any(_SEVERAL_MASKS.search(text) for text in texts):
                print("note: [MASK]*2 is two masks with --joint only; here it is one mask and *2", file=sys.stderr)
            return fill_mask.fill(model, texts, top)

        return _Filler(fill_each, lambda text: fill_mask.FillMaskResult(text, ()))
    size = joint_fill.BEAM_SIZE if beam_size is None else beam_size
    joint_fill.check_search(top, size, words)

    def fill_jointly(texts: Sequence[str]) -> Sequence[JointFillResult]:
        with open_display(sys.stderr) as display:
            return joint_fill.fill_jointly(
                model,
                texts,
                top,
                method=joint or "beam",
                beam_size=size,
                words=words,
                on_progress=delayed_progress(display),
            )

    return _Filler(fill_jointly, lambda text: joint_fill.JointFillResult(text, ()))


def _print_answers(
    answers: Iterable[tuple[_Prompt, FillMaskResult | JointFillResult | UnmaskError]],
    filler: _Filler,
    *,
    as_json: bool,
) -> tuple[int, int]:
    """Print answers as they come; return the number of texts that aren't blank, and of errors."""
    count = failed = 0
    items = JsonList()
    for prompt, answer in answers:
        count += not prompt.is_blank
        failed += isinstance(answer, UnmaskError)
        if as_json:
            is_error = isinstance(answer, UnmaskError)
            items.print(_as_json(filler.blank(prompt.text), answer) if is_error else asdict(answer))
        elif isinstance(answer, UnmaskError):
            sys.stdout.flush()  # so that errors and answers keep their order in a file that receives both
            print_error("error:", str(answer))
        else:
            _print_result(answer)
    if as_json:
        items.end()
    return count, failed


@dataclass(frozen=True)
class _Prompt:
    """A text to fill; `location` names the line of a file. A line that can't be decoded has an error."""

    text: str
    location: str = ""
    error: UnmaskError | None = None

    @property
    def is_blank(self) -> bool:
        """Whether this is a blank line. A blank argument is an error instead."""
        return bool(self.location) and not self.text.strip()


def _answers(
    filler: _Filler, prompts: Sequence[_Prompt], *, strict: bool
) -> Iterator[tuple[_Prompt, FillMaskResult | JointFillResult | UnmaskError]]:
    """Yield the answer or the error of each prompt.

    Raises:
        UnmaskError: with `strict`, the error of the first prompt that can't be filled, before any answer.
    """

    def answer(prompt: _Prompt) -> FillMaskResult | JointFillResult | UnmaskError:
        try:
            return filler.fill([prompt.text])[0]
        except UnmaskError as error:
            return error.at(location=f"{prompt.location}: {error.location}") if prompt.location else error

    results: list[FillMaskResult | JointFillResult | UnmaskError | None] = [
        prompt.error or (filler.blank(prompt.text) if prompt.is_blank else None) for prompt in prompts
    ]
    rest = [prompt for prompt, result in zip(prompts, results, strict=True) if result is None]
    try:
        filled = iter([*filler.fill([prompt.text for prompt in rest])] if rest else [])
    except UnmaskError:  # one by one, to see which of them
        filled = map(answer, rest)
    found = [next(filled) if result is None else result for result in results]
    if strict and (error := next((result for result in found if isinstance(result, UnmaskError)), None)):
        raise error
    yield from zip(prompts, found, strict=True)


def _as_json(blank: FillMaskResult | JointFillResult, error: UnmaskError) -> dict[str, Any]:
    return {**asdict(blank), "error": error.message, "location": error.location, "hint": error.hint}


def _fill_interactively(filler: _Filler) -> None:
    """Fill the masks of each line that is typed; print errors instead of ending the session."""
    print("type one text with [MASK] per line; Ctrl-D ends", file=sys.stderr)
    for line in sys.stdin:
        if line.strip():
            try:
                _print_result(filler.fill([line.rstrip("\n")])[0])
            except UnmaskError as error:
                print_error("error:", str(error))


def _open(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise TextError(f"can't read this file: {error.strerror}", location=str(file), hint="check the path") from error


def _batches(stream: BinaryIO, source: str) -> Iterator[list[_Prompt]]:
    """Yield the lines of a stream as they come; a line that is not UTF-8 has an error.

    Raises:
        TextError: a line is too long, or the stream can't be read.
    """
    rest, number = b"", 0
    while True:
        try:
            chunk = stream.read1(_READ_BYTES)  # pyright: ignore[reportAttributeAccessIssue] (waits for one byte only)
        except OSError as error:
            raise TextError(f"can't read: {error.strerror}", location=source, hint="check the path") from error
        # Not splitlines, which also splits at U+2028, U+0085 and form feeds.
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _LONGEST_LINE:
            where = f"{source}, line {number + len(lines) + 1}"
            raise TextError(f"the line has more than {_LONGEST_LINE:,} bytes", location=where, hint="break the line")
        if not chunk and rest:
            lines, rest = [rest], b""
        for first in range(0, len(lines), _BATCH):
            batch = lines[first : first + _BATCH]
            yield [_prompt(line, source, number + at) for at, line in enumerate(batch, start=1)]
            number += len(batch)
        if not chunk:
            return


def _prompt(line: bytes, source: str, number: int) -> _Prompt:
    data, location = line.removesuffix(b"\r"), f"{source}, line {number}"
    if number == 1:
        data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return _Prompt(data.decode("utf-8"), location)
    except UnicodeDecodeError as error:
        where = f"{location}, byte {error.start}"
        problem = TextError("text is not UTF-8", location=where, hint="convert it: iconv -t UTF-8")
        return _Prompt(data.decode("utf-8", errors="replace"), location, problem)


def _print_result(result: FillMaskResult | JointFillResult) -> None:
    from unmask.models.fill_mask import FillMaskResult

    if isinstance(result, FillMaskResult):
        print_predictions([result])
    else:
        _print_fillings(result)


def _print_fillings(result: JointFillResult) -> None:
    """Print joint log-probabilities: with the filled tokens in a terminal, with the filled texts in a pipe."""
    from rich.console import Console
    from rich.text import Text

    from unmask.core.format import visible

    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(visible(result.text), "bold"))
    if not result.fillings and result.text.strip():
        console.print("    no filling was found")
    for filling in result.fillings:
        line = Text(f"  {filling.log_probability:>8.2f}  ")
        if console.is_terminal:
            line.append_text(Text(" … ").join(Text(visible(group), "green") for group in filling.groups))
        else:
            line.append(visible(filling.sequence))
        console.print(line)
    print()


def print_predictions(results: Sequence[FillMaskResult]) -> None:
    """Print the predictions of each mask: with bars in a terminal, with the filled texts in a pipe."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.text import Text

    from unmask.core.format import bar, visible

    console = Console(highlight=False, soft_wrap=True)
    for result in results:
        console.print(Text(visible(result.text), "bold"))
        for number, mask in enumerate(result.masks, start=1):
            if len(result.masks) > 1:
                console.print(Text(f"  [MASK] {number}", "dim"))
            tokens = [visible(candidate.shown) for candidate in mask.candidates]
            width = max(cell_len(token) for token in tokens)
            for token, candidate in zip(tokens, mask.candidates, strict=True):
                line = Text(f"    {token}{' ' * (width - cell_len(token))}  {candidate.score:>6.1%}  ")
                if console.is_terminal:
                    line.append(bar(candidate.score, _BAR_WIDTH), "green")
                else:
                    line.append(visible(candidate.sequence))
                console.print(line)
        print()


# export and import --------------------------------------------------------------------------------------------------

EXPORT_EXAMPLES = """\
[bold]Examples[/bold]

unmask export runs/notes notes-bert
unmask export runs/notes notes-bert --force          replace an existing model
unmask export runs/notes notes-encoder --only encoder
unmask export runs/notes notes-onnx --format onnx --int8
unmask export runs/notes notes-vectors --format sentence-transformers
"""
IMPORT_EXAMPLES = """\
[bold]Examples[/bold]

unmask import ./bert-base-uncased models/bert
unmask fill models/bert "The cat sat on the \\[MASK]."
"""


def export_model(
    model: Annotated[Path, typer.Argument(metavar="RUN", help=MODEL_HELP)],
    out: OutputPath,
    format: Annotated[
        Literal["hf", "onnx", "sentence-transformers"],
        typer.Option(
            help="hf: for transformers; onnx adds a graph for onnxruntime and transformers.js; sentence-transformers "
            "adds mean pooling."
        ),
    ] = "hf",
    int8: Annotated[
        bool, typer.Option("--int8", help="Add a graph with weights of 8 bits to onnx.", show_default=False)
    ] = False,
    force: Force = False,
    unverified: Annotated[
        bool,
        typer.Option(
            "--unverified", help="Skip the comparison with transformers; the model card says so.", show_default=False
        ),
    ] = False,
    only: Annotated[
        Literal["all", "encoder"],
        typer.Option(help="Part to write: the whole model, or the encoder without heads, for vectors."),
    ] = "all",
    as_json: Json = False,
) -> None:
    """Write a model in the Hugging Face format, with a model card, after comparing its logits with transformers."""
    from unmask.hub.to_hf import export

    with open_display(sys.stderr) as display:
        result = export(
            model,
            out,
            format=format,
            force=force,
            unverified=unverified,
            only=only,
            int8=int8,
            on_progress=delayed_progress(display),
        )
    if as_json:
        print_json(asdict(result))
        return
    for note in result.notes:
        print(note)
    if result.parity is None:
        print("unverified: not compared with transformers")
    else:
        parity = result.parity
        pair = "" if parity.pair is None else f", pair head {parity.pair:.1e}"
        print(f"compared    {parity.texts} texts, {parity.tokens:,} tokens ({parity.source})")
        print(f"difference  at most {parity.logits:.1e}{pair} (transformers {parity.transformers}, float32)")
    _print_format(result)
    print(f"written     {result.path}: {result.architecture}, with a model card in README.md")


def _print_format(result: Exported) -> None:
    """Print what was written beside the format of transformers, and how it was compared."""
    from unmask.core.format import size
    from unmask.hub.onnx import GRAPH, QUANTIZED, describe_int8

    if (graph := result.graph) is not None:
        print(f"{GRAPH}: {size(graph.bytes)}; {', '.join(graph.inputs)} -> {graph.output}")
        print(f"difference  at most {graph.difference:.1e} (onnxruntime {graph.onnxruntime} and PyTorch, float32)")
        if graph.int8 is not None:
            print(f"{QUANTIZED}: {size(graph.int8.bytes)}; {describe_int8(graph.int8)}")
    if (vectors := result.vectors) is not None:
        print(f"vectors     differ by at most {vectors.difference:.1e} from sentence-transformers")


def import_model(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="BERT, RoBERTa, XLM-R, ModernBERT or NeoMME folder.")
    ],
    out: OutputPath,
    force: Force = False,
    seed: Annotated[int, typer.Option(help="Random seed for the weights of heads that FOLDER lacks.")] = 0,
    as_json: Json = False,
) -> None:
    """Convert a Hugging Face model to a folder that unmask and transformers load. Pickles are never read."""
    from unmask.hub import from_hf

    model = from_hf.import_model(folder, out, force=force, seed=seed)
    settings, vocab_size = model.settings, model.tokenizer.size
    if as_json:
        print_json({"path": model.path, "kind": settings.kind, "notes": model.notes, "vocab_size": vocab_size})
        return
    for note in model.notes:
        print(note)
    shape = f"{settings.num_hidden_layers} layers, hidden size {settings.hidden_size}, {vocab_size:,} tokens"
    print(f"written     {model.path}: {settings.kind}, {shape}")


# serve ----------------------------------------------------------------------------------------------------------------

SERVE_EXAMPLES = """\
[bold]Examples[/bold]

unmask serve runs/demo --open
unmask serve runs/demo runs/notes                two models side by side
unmask serve runs/demo --port 8766
"""


def serve_models(
    model: ModelPath,
    other: Annotated[
        Path | None,
        typer.Argument(
            metavar="OTHER", help=f"Second model. {MODEL_HELP}", show_default="none", autocompletion=complete_model
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on the loopback address 127.0.0.1; 0 for any free one.")
    ] = 8765,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.", show_default=False)] = False,
) -> None:
    """Serve a page to try models in a browser, and a JSON API, on this machine only. Ctrl-C ends it.

    The page fills masks, shows surprisal and attention, generates text, and compares models and the steps of a run. The
    API is described at /openapi.json.
    """
    from unmask.serve import bind_port

    paths = [path for path in (model, other) if path is not None]
    with bind_port(port) as listener:
        serve, open_browser = _import_server()

        def on_start(address: str) -> None:
            print(address, flush=True)
            if sys.stdout.isatty():
                print("Ctrl-C ends the server", file=sys.stderr)
            if open_page:
                open_browser(address)

        if sys.stderr.isatty():
            print(f"opening {' and '.join(map(str, paths))}", file=sys.stderr)
        serve(paths, listener, on_start)


def _import_server() -> tuple[Callable[..., None], Callable[[str], None]]:
    """Return the functions that serve models and open a browser.

    Raises:
        RecipeError: a package is not installed.
    """
    from unmask.core.errors import RecipeError

    try:
        from unmask.serve.app import open_browser, serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise RecipeError(f"{error.name} is not installed", hint='install it: pip install "unmask[serve]"') from error
    return serve, open_browser
