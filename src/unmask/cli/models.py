"""Commands on trained models: fill, evaluate, export and import."""

from __future__ import annotations

import codecs
import contextlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

import typer

from unmask.cli.errors import print_error
from unmask.cli.options import (
    MODEL_HELP,
    Errors,
    Field,
    Force,
    Json,
    JsonList,
    ModelPath,
    OutputPath,
    open_model,
    print_json,
)
from unmask.core.errors import TextError, UnmaskError

if TYPE_CHECKING:
    from unmask.models.fill_mask import FillMaskResult
    from unmask.models.model import Model


# fill ---------------------------------------------------------------------------------------------------------------

FILL_EXAMPLES = """\
[bold]Examples[/bold]

unmask fill runs/demo "Return the \\[MASK] of the list."
unmask fill runs/demo "The \\[MASK] of the \\[MASK]." --top 3 --json
unmask fill runs/demo --file sentences.txt             one text per line
cat sentences.txt | unmask fill runs/demo
"""
_BAR_WIDTH = 30
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
    as_json: Json = False,
) -> None:
    r"""Fill every \[MASK] of a text with the most probable tokens.

    Every text and every line gets one answer, in order. A text that can't be filled gets an error instead, and the
    exit code is 2 at the end. A blank line gets an empty answer.
    """
    from unmask.models.fill_mask import check_top

    given = [_Prompt(_check_utf8(text)) for text in texts or [] if text != "-"]
    read_input = (not texts and file is None) or "-" in (texts or [])
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(_open(file)) if file is not None else None
        loaded = open_model(model)
        check_top(loaded, top)
        if read_input and sys.stdin.isatty() and not as_json:
            _fill_interactively(loaded, top)
            return
        batches = itertools.chain(
            [given],
            _batches(opened, str(file)) if opened else (),
            _batches(sys.stdin.buffer, "standard input") if read_input else (),
        )
        if strict:
            batches = iter([list(itertools.chain.from_iterable(batches))])
        count, failed = _print_answers(
            (pair for batch in batches for pair in _answers(loaded, batch, top, strict=strict)), as_json=as_json
        )
    if not count:
        raise TextError("no text was given", hint='give a text with [MASK]: "The cat sat on the [MASK]."')
    if failed:
        raise typer.Exit(UnmaskError.exit_code)


def _print_answers(
    answers: Iterable[tuple[_Prompt, FillMaskResult | UnmaskError]], *, as_json: bool
) -> tuple[int, int]:
    """Print answers as they come; return the number of texts that aren't blank, and of errors."""
    count = failed = 0
    items = JsonList()
    for prompt, answer in answers:
        count += not prompt.is_blank
        failed += isinstance(answer, UnmaskError)
        if as_json:
            items.print(asdict(answer) if not isinstance(answer, UnmaskError) else _as_json(prompt, answer))
        elif isinstance(answer, UnmaskError):
            sys.stdout.flush()  # so that errors and answers keep their order in a file that receives both
            print_error("error:", str(answer))
        else:
            print_predictions([answer])
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
    model: Model, prompts: Sequence[_Prompt], top: int, *, strict: bool
) -> Iterator[tuple[_Prompt, FillMaskResult | UnmaskError]]:
    """Yield the answer or the error of each prompt.

    Raises:
        UnmaskError: with `strict`, the error of the first prompt that can't be filled, before any answer.
    """
    from unmask.models.fill_mask import FillMaskResult
    from unmask.models.fill_mask import fill as fill_mask

    def answer(prompt: _Prompt) -> FillMaskResult | UnmaskError:
        try:
            return fill_mask(model, prompt.text, top)[0]
        except UnmaskError as error:
            return error.at(location=f"{prompt.location}: {error.location}") if prompt.location else error

    results: list[FillMaskResult | UnmaskError | None] = [
        prompt.error or (FillMaskResult(prompt.text, ()) if prompt.is_blank else None) for prompt in prompts
    ]
    rest = [prompt for prompt, result in zip(prompts, results, strict=True) if result is None]
    try:
        filled = iter([*fill_mask(model, [prompt.text for prompt in rest], top)] if rest else [])
    except UnmaskError:  # one by one, to see which of them
        filled = map(answer, rest)
    found = [next(filled) if result is None else result for result in results]
    if strict and (error := next((result for result in found if isinstance(result, UnmaskError)), None)):
        raise error
    yield from zip(prompts, found, strict=True)


def _as_json(prompt: _Prompt, error: UnmaskError) -> dict[str, Any]:
    return {"text": prompt.text, "masks": [], "error": error.message, "location": error.location, "hint": error.hint}


def _fill_interactively(model: Model, top: int) -> None:
    """Fill the masks of each line that is typed; print errors instead of ending the session."""
    from unmask.models.fill_mask import fill as fill_mask

    print("type one text with [MASK] per line; Ctrl-D ends", file=sys.stderr)
    for line in sys.stdin:
        if line.strip():
            try:
                print_predictions(fill_mask(model, line.rstrip("\n"), top))
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


def _check_utf8(text: str) -> str:
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


# evaluate -----------------------------------------------------------------------------------------------------------

_HIGH_UNKNOWN = 0.01  # share of unknown characters above which `evaluate` warns, as `pretrain` does
EVALUATE_EXAMPLES = """\
[bold]Examples[/bold]

unmask evaluate runs/notes --text valid.txt
unmask evaluate runs/notes --text a.txt --text b.txt --json
"""


def evaluate(
    model: ModelPath,
    texts: Annotated[list[Path], typer.Option("--text", metavar="FILE", help="Text to evaluate on; may be repeated.")],
    length: Annotated[
        int | None,
        typer.Option(
            help="Maximum sequence length in tokens, special tokens included.", show_default="the model's context"
        ),
    ] = None,
    document: Annotated[
        Literal["blank-line", "line", "file"] | None,
        typer.Option(help="Unit of plain text that is one document.", show_default="as in training, else blank-line"),
    ] = None,
    errors: Errors = None,
    field: Field = None,
    max_size: Annotated[
        str | None,
        typer.Option(metavar="AMOUNT", help='Amount of text to read, such as "2M characters".', show_default="all"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a model on text that it was not trained on, with 15 % of the tokens masked.

    The masks depend on the text only, not on the model's training. Bits per character compare only between models with
    the same tokenizer.
    """
    from unmask.evaluation.validation import evaluate_text

    result = evaluate_text(
        open_model(model),
        texts,
        length=length,
        document=document,
        errors=errors or "strict",
        field=field,
        max_size=max_size,
    )
    if result.unknown_character_share > _HIGH_UNKNOWN:
        print_error(
            "warning:",
            f"the tokenizer can't spell {result.unknown_character_share:.1%} of the characters; the results are about "
            "the others",
        )
    if as_json:
        print_json(asdict(result))
        return
    print(f"loss                {result.loss:.4f} nats per masked token")
    print(f"unigram loss        {result.unigram_loss:.4f} (baseline: predicts the token frequencies of this text)")
    print(f"accuracy            {result.accuracy:.2%} of {result.masked_tokens:,} masked tokens")
    print(f"bits per character  {result.bits_per_character:.4f}")
    print(f"unknown             {result.unknown_share:.3%} of the tokens, not masked")
    print(f"sequence length     {result.length} tokens at most")


# export and import --------------------------------------------------------------------------------------------------

EXPORT_EXAMPLES = """\
[bold]Examples[/bold]

unmask export runs/notes notes-bert
unmask export runs/notes notes-bert --force          replace an existing model
unmask export runs/notes notes-encoder --only encoder
"""
IMPORT_EXAMPLES = """\
[bold]Examples[/bold]

unmask import ./bert-base-uncased models/bert
unmask fill models/bert "The cat sat on the \\[MASK]."
"""


def export_model(
    model: Annotated[Path, typer.Argument(metavar="RUN", help=MODEL_HELP)],
    out: OutputPath,
    force: Force = False,
    unverified: Annotated[
        bool,
        typer.Option(
            "--unverified", help="Skip the comparison with transformers; the model card says so.", show_default=False
        ),
    ] = False,
    only: Annotated[
        Literal["all", "encoder"], typer.Option(help="Part to write: the whole model, or the encoder without heads.")
    ] = "all",
    as_json: Json = False,
) -> None:
    """Write a model in the Hugging Face format, with a model card, after comparing its logits with transformers."""
    from unmask.hub.to_hf import export

    result = export(model, out, force=force, unverified=unverified, only=only)
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
    print(f"written     {result.path}: {result.architecture}, with a model card in README.md")


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
