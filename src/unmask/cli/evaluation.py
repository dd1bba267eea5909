"""Commands that judge a model: evaluate and score."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

import typer

from unmask.cli.errors import print_error
from unmask.cli.options import (
    Errors,
    Field,
    Json,
    ModelPath,
    check_utf8,
    delayed_progress,
    open_display,
    open_model,
    path_or_address,
    print_json,
)
from unmask.core.errors import RecipeError, StoreError, TextError
from unmask.core.files import check_writable, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from unmask.evaluation.details import Calibration, EvalDetails, GroupResult
    from unmask.evaluation.masked_lm import EvalResult
    from unmask.evaluation.minimal_pairs import MinimalPairs, MinimalPairsResult, PairAccuracy
    from unmask.evaluation.scoring import Score, TextScore, WordUnits
    from unmask.models.model import Model

_BAR_WIDTH = 20


# evaluate -----------------------------------------------------------------------------------------------------------

_HIGH_UNKNOWN = 0.01  # share of unknown characters above which `evaluate` warns, as `pretrain` does
EVALUATE_EXAMPLES = """\
[bold]Examples[/bold]

unmask evaluate runs/notes --text valid.txt
unmask evaluate runs/notes --text a.txt --text b.txt --json
unmask evaluate runs/notes --text valid.txt --details       by frequency, position, …; and calibration
unmask evaluate runs/notes --pairs blimp --errors skip      minimal pairs; three pairs of BLiMP are identical
unmask evaluate runs/notes --pairs pairs.tsv --method within-word
"""


Details = Annotated[
    bool,
    typer.Option(
        "--details",
        help="Results by frequency, place in the word, position, characters and input, and calibration.",
        show_default=False,
    ),
]
Predictions = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="JSON file to write: the preferred sentence of each pair, by --method, else original.",
        show_default=False,
    ),
]
EvaluatedTexts = Annotated[
    list[Any] | None,  # paths and addresses
    typer.Option("--text", metavar="FILE", help="Text to evaluate on; may be repeated.", parser=path_or_address),
]
MaxSize = Annotated[
    str | None,
    typer.Option(metavar="AMOUNT", help='Amount of text to read, such as "2M characters".', show_default="all"),
]


def evaluate(
    model: ModelPath,
    texts: EvaluatedTexts = None,
    pairs: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Minimal pairs: a .jsonl file as of BLiMP, a .tsv file, or their folder."),
    ] = None,
    subset: Annotated[
        int | None, typer.Option(help="Number of minimal pairs of each paradigm.", show_default="all")
    ] = None,
    method: Annotated[
        Literal["both", "original", "within-word"],
        typer.Option(help="Pseudo-log-likelihood that judges minimal pairs, as in unmask score."),
    ] = "both",
    predictions: Predictions = None,
    details: Details = False,
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
    max_size: MaxSize = None,
    as_json: Json = False,
) -> None:
    """Evaluate a model on text that it was not trained on, with 15 % of the tokens masked, or on minimal pairs.

    The masks depend on the text only, not on the model's training. Bits per character compare only between models with
    the same tokenizer. Of a minimal pair, a model should find the acceptable sentence more probable.
    """
    from unmask.evaluation.details import evaluate_details
    from unmask.evaluation.validation import evaluate_text

    _check_inputs(
        texts,
        pairs,
        predictions,
        of_text={
            "--details": details or None, "--length": length, "--document": document, "--field": field,
            "--max-size": max_size,
        },
        of_pairs={"--subset": subset, "--method": None if method == "both" else method},
    )  # fmt: skip
    found = None if pairs is None else _read_pairs(pairs, subset, errors)
    opened = open_model(model)
    result = None
    if texts:
        with open_display(sys.stderr):  # shows downloads
            result = (evaluate_details if details else evaluate_text)(
                opened,
                texts,
                length=length,
                document=document,
                errors=errors or "strict",
                field=field,
                max_size=max_size,
            )
        _warn_unknown(result.unknown_character_share)
    if found is not None:
        _note_causal(opened)
    judged = None if found is None else _evaluate_pairs(opened, found, method)
    if judged is not None and predictions is not None:
        _write_predictions(predictions, judged)
    if as_json:
        tree: dict[str, Any] = {} if result is None else asdict(result)
        if judged is not None:
            tree["pairs"] = judged.summary()
        print_json(tree)
        return
    if result is not None:
        _print_text_result(result)
    if judged is not None:
        _print_pairs_result(judged)


def _note_causal(model: Model) -> None:
    if model.is_causal:
        print("note: the model is causal; the scores are log-likelihoods from left to right", file=sys.stderr)


def _warn_unknown(share: float) -> None:
    if share > _HIGH_UNKNOWN:
        about_others = "the results are about the others"
        print_error("warning:", f"the tokenizer can't spell {share:.1%} of the characters; {about_others}")


def _check_inputs(
    texts: Sequence[Path] | None,
    pairs: Path | None,
    predictions: Path | None,
    *,
    of_text: Mapping[str, object],
    of_pairs: Mapping[str, object],
) -> None:
    if not texts and pairs is None:
        raise RecipeError(
            "there is nothing to evaluate on", location="unmask evaluate", hint="give --text FILE, --pairs PATH or both"
        )
    groups = (
        (of_text, not texts, "text", "--text FILE"),
        ({"--predictions": predictions, **of_pairs}, pairs is None, "minimal pairs", "--pairs PATH"),
    )
    for options, is_missing, what, needed in groups:
        for option, value in options.items():
            if is_missing and value is not None:
                raise RecipeError(
                    f"{option} is an option of {what}, of which there is none",
                    location=option if value is True else f"{option} {value}",
                    hint=f"remove it, or add {needed}",
                )
    if predictions is not None:
        of_folder = pairs.iterdir() if pairs is not None and pairs.is_dir() else ()
        inputs = [path for path in (pairs, *of_folder, *(texts or ())) if path is not None and path.exists()]
        if predictions.is_file() and any(predictions.samefile(path) for path in inputs):
            raise StoreError(
                "the output is the input", location=f"--predictions {predictions}", hint="choose another file"
            )
        if predictions.exists() and not predictions.is_file():  # a device would be replaced by a file
            raise StoreError(
                "the path is a directory or a device",
                location=f"--predictions {predictions}",
                hint="name a file to write",
            )
        check_writable(predictions.absolute().parent)


def _print_text_result(result: EvalResult) -> None:
    from unmask.evaluation.details import DetailedEvalResult

    print(f"loss                {result.loss:.4f} nats per masked token")
    print(f"unigram loss        {result.unigram_loss:.4f} (baseline: predicts the token frequencies of this text)")
    print(f"accuracy            {result.accuracy:.2%} of {result.masked_tokens:,} masked tokens")
    print(f"bits per character  {result.bits_per_character:.4f}")
    print(f"unknown             {result.unknown_share:.3%} of the tokens, not masked")
    print(f"sequence length     {result.length} tokens at most")
    if isinstance(result, DetailedEvalResult):
        print_details(result.details)


def _read_pairs(path: Path, subset: int | None, errors: Errors) -> MinimalPairs:
    from unmask.evaluation.minimal_pairs import read_pairs

    if errors == "replace":
        raise RecipeError(
            "minimal pairs have no bytes to replace", location="--errors replace", hint="use --errors skip or strict"
        )
    return read_pairs(path, subset, errors or "strict")


def _evaluate_pairs(
    model: Model, found: MinimalPairs, method: Literal["both", "original", "within-word"]
) -> MinimalPairsResult:
    from unmask.evaluation.minimal_pairs import evaluate_minimal_pairs

    with open_display(sys.stderr) as display:
        return evaluate_minimal_pairs(model, found, method, on_progress=delayed_progress(display))


def _write_predictions(file: Path, judged: MinimalPairsResult) -> None:
    from unmask.evaluation.minimal_pairs import predictions

    write_json(file, predictions(judged.methods.get("original") or judged.methods["within-word"]))


def _print_pairs_result(judged: MinimalPairsResult) -> None:
    """Print a table of accuracies by field and paradigm: with bars in a terminal, plain lines in a pipe."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    first = next(iter(judged.methods.values()))
    groups = {"paradigm": first.paradigms, "field": first.fields, "": {"overall": first.overall}}
    for title, names in groups.items():
        if not names:
            continue
        rows: list[tuple[str, list[PairAccuracy]]] = []
        for name in names:
            columns = [
                {"overall": each.overall} if not title else each.fields if title == "field" else each.paradigms
                for each in judged.methods.values()
            ]
            rows.append((name, [column[name] for column in columns]))
        _print_accuracies(console, title, list(judged.methods), rows)
    print(f"pairs               {judged.pairs:,} of {judged.paradigms} paradigms; overall is the mean over paradigms")
    if judged.left_out:
        print(f"left out            {judged.left_out:,} line{'s' * (judged.left_out != 1)} without a minimal pair")
    if judged.unknown:
        print(
            f"unknown             {judged.unknown:,} pairs that can't be compared (by [UNK], or without a token): ties"
        )
    print(f"fewer tokens        {judged.length_accuracy:.1%} (baseline: all tokens are equally probable)")


def _print_accuracies(
    console: Console, title: str, methods: Sequence[str], rows: Sequence[tuple[str, Sequence[PairAccuracy]]]
) -> None:
    from rich.table import Table
    from rich.text import Text

    from unmask.core.format import bar, visible

    header = [title, *(column for method in methods for column in (method, "95 %")), "pairs", "ties"]
    lines = [
        [
            visible(name),
            *(
                text
                for each in accuracies
                for text in (f"{each.accuracy:.1%}", f"{each.interval[0]:.0%} to {each.interval[1]:.0%}")
            ),
            f"{accuracies[0].pairs:,}",
            " ".join(f"{each.ties:,}" for each in accuracies),
        ]
        for name, accuracies in rows
    ]
    if not console.is_terminal:
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        for line in (header, *lines):
            print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
        print()
        return
    table = Table(box=None, pad_edge=False)
    for name in (*header, ""):
        table.add_column(name)
    for line, (_, accuracies) in zip(lines, rows, strict=True):
        last = accuracies[-1]
        style = "green" if last.interval[0] > 0.5 else "red" if last.interval[1] < 0.5 else "dim"
        table.add_row(*map(Text, line), Text(bar(last.accuracy, _BAR_WIDTH), style))  # names may have [brackets]
    console.print(table)
    print()


# score --------------------------------------------------------------------------------------------------------------

SCORE_EXAMPLES = """\
[bold]Examples[/bold]

unmask score runs/notes "The cat sat on the mat."
unmask score runs/notes "The cat sat." "The cat sit." --by text
unmask score runs/notes --file sentences.txt --json          one text per line
unmask score runs/notes --file sentences.txt --errors skip   leaves out lines that can't be scored
unmask score runs/notes --file novel.txt --document file     one text, in windows around each word
"""


def score(
    model: ModelPath,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="Texts to score.")] = None,
    file: Annotated[Path | None, typer.Option(help="File of texts.")] = None,
    method: Annotated[
        Literal["original", "within-word"],
        typer.Option(help="Masks: of a token alone, or also of the later tokens of its word."),
    ] = "within-word",
    words: Annotated[
        Literal["spaces", "characters", "jieba", "sudachi", "tokenizer"] | None,
        typer.Option(
            help="What a word is; tokenizer: the units of its pre-tokenizer, as in minicons.",
            show_default="as in training",
        ),
    ] = None,
    by: Annotated[
        Literal["text", "word", "token"] | None,
        typer.Option(help="Units to print; JSON has all of them.", show_default="word, for --file text"),
    ] = None,
    document: Annotated[
        Literal["blank-line", "line", "file"] | None,
        typer.Option(help="Unit of --file that is one text.", show_default="line"),
    ] = None,
    errors: Annotated[
        Literal["strict", "replace", "skip"] | None,
        typer.Option(
            help="Handling of texts that can't be scored and of undecodable bytes: strict stops, replace inserts "
            "U+FFFD for bytes, skip leaves out and counts.",
            show_default="strict",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how probable a model finds texts, their words and their tokens: the pseudo-log-likelihood.

    Each token is masked and predicted from the rest of the text. Surprisal is in bits. With within-word scores,
    pseudo-perplexity per word and bits per character compare between tokenizers, if nothing is [UNK].
    """
    from unmask.evaluation.scoring import score as score_texts
    from unmask.evaluation.scoring import total

    listed = [_GivenText(check_utf8(text), f"text {number}") for number, text in enumerate(texts or [], start=1)]
    if file is not None:
        listed += _read_texts(file, document or "line", errors)
    elif document is not None:
        raise RecipeError(
            "--document is an option of --file, which is not given",
            location=f"--document {document}",
            hint="remove it, or add --file FILE",
        )
    if not listed:
        raise RecipeError("no text was given", location="unmask score", hint="give a TEXT, or --file FILE")
    opened = open_model(model)
    listed, left_out = _scorable(opened, listed, words, errors)
    _note_causal(opened)
    with open_display(sys.stderr) as display:
        scores = score_texts(
            opened, [each.text for each in listed], method, words=words, on_progress=delayed_progress(display)
        )
    if as_json:
        print_json({
            "method": method,
            "texts": [
                {"text": each.text, "line": each.line, **asdict(scored)}
                for each, scored in zip(listed, scores, strict=True)
            ],
            "total": {"texts": len(scores), **asdict(total(scores))},
            "left_out": [{"place": each.place, "line": each.line, "problem": each.problem} for each in left_out],
        })  # fmt: skip
        return
    unit = by or ("text" if file is not None else "word")
    for each in scores:
        _print_score(each, unit)
    if len(scores) > 1:
        print(f"{len(scores):,} texts: {_figures(total(scores))}")


MAX_SCORED_TEXTS: Final = 1_000_000  # of a file, which are in memory together
MAX_SCORED_CHARACTERS: Final = 1 << 26


class _GivenText(NamedTuple):
    """A text, where it is given, and why it can't be scored, if it can't."""

    text: str
    place: str
    line: int | None = None  # of its file; None if it is an argument, or a document of several lines
    problem: str = ""


def _read_texts(file: Path, document: Literal["blank-line", "line", "file"], errors: Errors) -> list[_GivenText]:
    """Return the documents of a file; lines of plain text with their numbers.

    Raises:
        TextError: the file can't be read, or has too many texts or characters.
    """
    from unmask.cli.options import DataOptions
    from unmask.data.inputs import kind_of
    from unmask.data.sources import open_source

    config = DataOptions(errors, document).config()
    source = open_source([file], config)
    paths = list(dict.fromkeys(part.path for part in source.parts()))
    by_line = document == "line" and all(kind_of(path) == "text" for path in paths)
    if by_line:  # whole files, because a reader of lines doesn't count blank lines and those that it leaves out
        rule = "replace" if errors == "skip" else config.errors
        source = open_source(paths, replace(config, document="file", errors=rule))
    texts: list[_GivenText] = []
    counts, characters, lines = Counter[str](), 0, 0  # documents of each file
    for part in source.parts():
        chunks, prefix = list[str](), f"{part.path}, " if len(paths) > 1 else ""
        for chunk in source.documents(part):
            chunks.append(chunk.text)
            characters += len(chunk.text)
            lines += chunk.text.count("\n") if by_line else 0
            if characters > MAX_SCORED_CHARACTERS or max(lines, len(texts)) > MAX_SCORED_TEXTS:
                raise TextError(
                    f"more than {MAX_SCORED_TEXTS:,} texts or {MAX_SCORED_CHARACTERS:,} characters",
                    location=part.path,
                    hint="split the file",
                )
            if not chunk.last:
                continue
            whole, chunks = "".join(chunks), []
            counts[part.path] += 1
            if not by_line:
                texts.append(_GivenText(whole, f"{prefix}document {counts[part.path]}"))
                continue
            for number, line in enumerate(whole.split("\n"), start=1):
                problem = "the line is not UTF-8, or has U+FFFD" if errors == "skip" and "\ufffd" in line else ""
                texts.append(_GivenText(line, f"{prefix}line {number}", number, problem))
    if unread := sum(source.left_out.values()):
        print_error("warning:", f"left out {unread:,} lines or rows that can't be read")
    return [each for each in texts if each.text.strip()]


_SHOWN = 10  # texts that are left out


def _scorable(
    model: Model, texts: Sequence[_GivenText], words: WordUnits | None, errors: Errors
) -> tuple[list[_GivenText], list[_GivenText]]:
    """Return the texts that can be scored, and those that are left out, which are named on standard error.

    Raises:
        TextError: a text can't be scored and `errors` is not "skip", or none can be scored.
    """
    from unmask.evaluation.scoring import unscorable

    problems = unscorable(model, [each.text for each in texts], words)
    judged = [each._replace(problem=each.problem or problems.get(number, "")) for number, each in enumerate(texts)]
    left_out = [each for each in judged if each.problem]
    if not left_out:
        return judged, []
    first = left_out[0]
    if errors != "skip":
        raise TextError(
            first.problem,
            location=f"{first.place}: {first.text[:60]!r}",
            hint="give text that the tokenizer can encode"
            + (", or leave out such texts: --errors skip" if len(left_out) < len(judged) else ""),
        )
    if len(left_out) == len(judged):
        raise TextError(
            f"no text is left: {len(left_out):,} of {len(judged):,} can't be scored",
            location=f"{first.place}: {first.text[:60]!r}",
            hint="give text that the tokenizer can encode",
        )
    names = ", ".join(each.place for each in left_out[:_SHOWN]) + ", …" * (len(left_out) > _SHOWN)
    print_error("warning:", f"left out {len(left_out):,} of {len(judged):,} texts, which can't be scored: {names}")
    return [each for each in judged if not each.problem], left_out


def _figures(result: Score) -> str:
    unknown = f", {result.unknown_tokens:,} tokens are [UNK]" if result.unknown_tokens else ""
    return (
        f"{result.log_probability:,.3f} nats, {result.surprisal:,.2f} bits, "
        f"{result.bits_per_character:.4f} bits per character, "
        f"pseudo-perplexity {result.pseudo_perplexity:,.1f} per word "
        f"({result.num_words:,} words, {result.num_tokens:,} tokens{unknown})"
    )


def _print_score(result: TextScore, unit: Literal["text", "word", "token"]) -> None:
    """Print a text and the surprisal of its words or tokens: with bars in a terminal."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.text import Text

    from unmask.core.format import bar, visible

    console = Console(highlight=False, soft_wrap=True)
    if unit == "text":
        line = Text(f"{result.log_probability:>12,.3f}  {result.surprisal:>10,.2f}  ")
        console.print(line.append(visible(result.text), "bold"))
        return
    console.print(Text(visible(result.text), "bold"))
    entries = (
        [(word.word, word.surprisal) for word in result.words]
        if unit == "word"
        else [(token.token, token.surprisal) for word in result.words for token in word.tokens]
    )
    shown = [(visible(name), bits) for name, bits in entries]
    width, most = max(cell_len(name) for name, _ in shown), max((bits or 0.0) for _, bits in shown)
    for name, bits in shown:
        line = Text(f"  {name}{' ' * (width - cell_len(name))}  {'[UNK]' if bits is None else f'{bits:.2f}':>7}")
        if console.is_terminal and bits is not None:
            line.append("  ").append(bar(bits / max(most, 1e-9), _BAR_WIDTH), _style(bits))
        console.print(line)
    print(f"  {_figures(result)}\n")


def _style(bits: float) -> str:
    """Return a color for a surprisal: a word with less than 4 bits is among the 16 likeliest."""
    return "green" if bits < 4 else "yellow" if bits < 10 else "red"


# evaluate --details ---------------------------------------------------------------------------------------------------

_CALIBRATION_BAR = 10
_GROUP_COLUMNS = ("tokens", "share", "accuracy", "loss", "unigram")
_BIN_COLUMNS = ("tokens", "share", "mean", "accuracy", "difference")


def print_details(details: EvalDetails) -> None:
    """Print a table for each kind of group, and the reliability table: with colors in a terminal, plain in a pipe."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    tables = {
        "frequency rank": details.by_frequency,
        "place in word": details.by_place_in_word,
        "position": details.by_position,
        "characters": details.by_characters,
        "input": details.by_input,
    }
    for title, groups in tables.items():
        total = sum(group.masked_tokens for group in groups)
        rows = [_group_row(group, total) for group in groups]
        _print_table(console, title, _GROUP_COLUMNS, rows, [group.accuracy for group in groups])
    _print_calibration(console, details.calibration)


def _group_row(group: GroupResult, total: int) -> tuple[str, ...]:
    return (
        group.name,
        f"{group.masked_tokens:,}",
        f"{group.masked_tokens / total:.1%}",
        f"{group.accuracy:.2%}",
        f"{group.loss:.4f}",
        f"{group.unigram_loss:.4f}",
    )


def _print_calibration(console: Console, calibration: Calibration) -> None:
    total = sum(one.masked_tokens for one in calibration.bins)
    rows = [
        (
            f"{one.lower:.1%} to {one.upper:.1%}",
            f"{one.masked_tokens:,}",
            f"{one.masked_tokens / total:.1%}",
            f"{one.confidence:.2%}",
            f"{one.accuracy:.2%}",
            f"{100 * (one.accuracy - one.confidence):+.2f}",
        )
        for one in calibration.bins
    ]
    accuracies = [one.accuracy for one in calibration.bins]
    _print_table(console, "confidence", _BIN_COLUMNS, rows, accuracies)
    print(f"\nexpected calibration error  {calibration.error:.2%}")
    print(f"mean confidence             {calibration.confidence:.2%} (probability of the most probable token)")


def _print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]], accuracies: Sequence[float]
) -> None:
    """Print a table whose first column names the rows. A terminal also shows the accuracies as bars."""
    from rich.table import Table
    from rich.text import Text

    from unmask.core.format import bar

    print()
    if not console.is_terminal:
        lines = [(title, *columns), *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for name, *cells in lines:
            padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
            print(f"{name:<{widths[0]}}  {'  '.join(padded)}")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(title, header_style="bold", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", header_style="dim")
    table.add_column("")
    for (name, *cells), accuracy in zip(rows, accuracies, strict=True):
        table.add_row(name, *cells, Text(bar(accuracy, _CALIBRATION_BAR), "green"))
    console.print(table)
