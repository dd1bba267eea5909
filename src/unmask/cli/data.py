"""Room card: the verb look: what a text is like.

Comes in: text, a recipe, perhaps a tokenizer. Goes out: a report, with bars and colours in a terminal, in plain lines
in a pipe, or as JSON. Called by: door.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.cli.options import (
    TEXT,
    Debug,
    Errors,
    Field,
    Json,
    Rule,
    Settings,
    TokenizerAt,
    open_tokenizer,
    print_json,
    tokenizer_at,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from unmask.data.report import Example, Report
    from unmask.training.display import Display


INSPECT_EXAMPLES = """\
[bold]Examples[/bold]

unmask data inspect notes.txt
unmask data inspect notes/ --recipe char --seed 3
unmask data inspect "posts/*.jsonl.gz" --field body --errors skip
unmask data inspect notes.txt --tokenizer runs/notes/latest --json
"""
_HISTOGRAM_WIDTH = 30
_BLOCKS = " ▏▎▍▌▋▊▉█"
_PATIENCE_SECONDS = 2.0
_LABEL = 12


def inspect(
    texts: Annotated[list[Path], TEXT],
    recipe: Annotated[str, typer.Option(help="Whose settings are meant: a shipped recipe or a TOML file.")] = "tiny",
    tokenizer: TokenizerAt = None,
    seed: Annotated[int, typer.Option(help="Which documents are shown.")] = 0,
    settings: Settings = None,
    errors: Errors = None,
    document: Rule = None,
    field: Field = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a text is like before anything is trained on it.

    Sizes, copies, lengths of documents, characters, what would be held out, what the tokenizer makes of it, windows per
    stage, and five documents as cut. Nothing is written.
    """
    from unmask.data.report import look as look_at
    from unmask.data.sources import open_text
    from unmask.training.pretrain import for_stream
    from unmask.training.recipe import load_recipe

    flags = {"data.errors": errors, "data.document": document, "data.field": field}
    whole = load_recipe(recipe, settings or (), {key: value for key, value in flags.items() if value is not None})
    given = None if tokenizer is None else open_tokenizer(tokenizer)
    source = open_text(texts, whole.data)
    display = for_stream(sys.stderr)
    try:
        report = look_at(
            source,
            whole.data,
            [stage.max_seq_len for stage in whole.stage],
            patient(display),
            seed=seed,
            tokenizer=given,
        )
    finally:
        display.close()
    if as_json:
        print_json(asdict(report))
    else:
        _print(report)


def patient(display: Display) -> Callable[[str, float], None]:
    """Progress that is shown once it has taken two seconds."""
    began = time.monotonic()

    def progress(what: str, share: float) -> None:
        if time.monotonic() - began >= _PATIENCE_SECONDS:
            display.progress(what, share)

    return progress


def _print(report: Report) -> None:
    """The report for a person: bars in a terminal, plain lines in a pipe."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for label, value in _rows(report):
        console.print(Text.assemble((f"{label:<{_LABEL}} ", "dim"), value))
        if label == "lengths":
            for line in _histogram(report, console):
                console.print(line)
    if report.examples:
        several = "s as they are" if len(report.examples) > 1 else " as it is"
        console.print(Text(f"\n{len(report.examples)} document{several} cut", "bold"))
        console.print(Text("a space before each word, · between the pieces of one", "dim"))
    for example in report.examples:
        console.print(Text(f"\ndocument {example.document:,}, {example.characters:,} characters", "dim"))
        console.print(_cut(example))
    if report.warnings:
        console.print()
    for warning in report.warnings:
        console.print(Text(f"note: {warning}", "yellow"))


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    """Label and words of each line."""
    from unmask.core.format import count, size, visible
    from unmask.tokenization.words import in_words

    yield "documents", f"{report.documents:,}"
    yield "characters", f"{report.characters:,} ({size(report.bytes)} as UTF-8)"
    for text in report.texts:
        weight = f", weight {text.weight:g}" if text.weight else ""
        yield "", f"{text.name}: {text.documents:,} documents, {text.characters:,} characters{weight}"
    copies = report.copies
    if copies.documents:
        often = f'the most frequent {copies.most:,} times: "{visible(copies.example)}"'
        yield (
            "copies",
            f"{copies.documents:,} documents ({copies.share:.1%}), {copies.characters:,} characters; {often}",
        )
    else:
        yield "copies", "no document occurs twice"
    one = report.lengths
    most = f"eight of ten between {one.tenth:,} and {one.ninetieth:,}, the longest {one.longest:,}"
    yield "lengths", f"{one.median:,} characters in the median, {most}"
    yield "words", in_words(report.words) + (" (what its script asks for)" if report.words_by == "auto" else "")
    scripts = [f"{name.title()} {share:.1%}" for name, share in report.alphabet.scripts.items() if share >= 0.0005]
    yield "letters", f"{report.alphabet.distinct:,} different characters" + "".join(f", {one}" for one in scripts[:6])
    if foreign := "  ".join(f"{one.character} {count(one.count)}" for one in report.alphabet.foreign):
        yield "", f"beside its main script: {foreign}"
    if held := report.held_out:
        by = "chosen by the hash of their text" if held.by == "hash" else f"the last {held.share} of each"
        yield "held out", f"{held.documents:,} documents, {by}; {held.characters:,} characters"
    if found := report.tokenizer:
        yield (
            "tokenizer",
            (
                f"{found.kind} of {found.vocabulary:,}"
                + (f", trained on {count(found.max_train_chars)} characters" if found.trained else "")
                + f": {found.characters_per_token:.2f} characters per token, {found.unknown_share:.3%} [UNK]"
            ),
        )
    for stage in report.stages:
        yield (
            f"length {stage.length}",
            (
                f"about {count(stage.windows)} windows of {stage.tokens_per_window:.0f} tokens, "
                f"{count(stage.epoch_tokens)} tokens an epoch" + _seen(stage.seen)
            ),
        )


def _seen(seen: Mapping[str, float]) -> str:
    return "".join(f", {name} {times:.2g} times" for name, times in seen.items())


def _histogram(report: Report, console: Console) -> list[Text]:
    """How many documents have how many characters, a line each."""
    from rich.text import Text

    bins = report.lengths.bins
    most = max(one.documents for one in bins)
    wide = max(len(f"{one.first:,} to {one.last:,}") for one in bins)
    lines: list[Text] = []
    for one in bins:
        share = one.characters / max(1, sum(other.characters for other in bins))
        bar = _bar(one.documents / most) if console.is_terminal else ""
        words = f"{f'{one.first:,} to {one.last:,}':>{wide}}  {one.documents:>9,}  {share:>6.1%} of the characters  "
        lines.append(Text.assemble(" " * (_LABEL + 1), words.rstrip() + "  " * bool(bar), (bar, "green")))
    return lines


def _bar(share: float) -> str:
    eighths = round(share * _HISTOGRAM_WIDTH * 8)
    return "█" * (eighths // 8) + _BLOCKS[eighths % 8].strip()


def _cut(example: Example) -> Text:
    """The pieces of a document: a space before a word, · inside it; colours alternate from word to word."""
    from rich.text import Text

    from unmask.core.format import visible

    line, word = Text(), 0
    for number, piece in enumerate(example.pieces):
        word += piece.starts_word
        if number:
            line.append(" " if piece.starts_word else "·", "dim")
        shown = visible(piece.text).replace(" ", "␣") or "…"
        line.append(shown, "red reverse" if piece.is_unknown else "cyan" if word % 2 else "")
    return line if example.is_whole else line.append(" …", "dim")


PREPARE_EXAMPLES = """\
[bold]Examples[/bold]

unmask data prepare notes/ --recipe modern-tiny
unmask data prepare notes.txt --tokenizer pieces --json
unmask data prepare notes.txt --set data.tokenizer.vocab_size=16384
"""


def prepare(
    texts: Annotated[list[str], TEXT],
    recipe: Annotated[str, typer.Option(help="Whose settings are meant: a shipped recipe or a TOML file.")] = "tiny",
    tokenizer: TokenizerAt = None,
    settings: Settings = None,
    errors: Errors = None,
    document: Rule = None,
    field: Field = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tokenize text into the cache; a pretrain with the same settings then starts at once.

    The cache is $UNMASK_CACHE, else ~/.cache/unmask. All cores work where the text is long.
    """
    from unmask.core.files import default_cache
    from unmask.data.prepare import prepare
    from unmask.data.sources import open_text
    from unmask.training.pretrain import for_stream
    from unmask.training.recipe import load_recipe

    flags = {"data.errors": errors, "data.document": document, "data.field": field}
    overrides: dict[str, Any] = {key: value for key, value in flags.items() if value is not None}
    if tokenizer is not None:
        overrides |= {"data.tokenizer.kind": "file", "data.tokenizer.path": str(tokenizer_at(tokenizer))}
    chosen = load_recipe(recipe, settings or (), overrides).data
    begun = time.perf_counter()
    source = open_text(texts, chosen)
    display = for_stream(sys.stderr)
    made: list[str] = []

    def progress(stage: str, share: float) -> None:
        made.append(stage) if stage not in made else None
        display.progress(stage, share)

    try:
        corpus = prepare(source, chosen, default_cache(), progress)
    finally:
        display.close()
    seconds = time.perf_counter() - begun
    was_there = "tokenizing" not in made
    if as_json:
        print_json(
            {
                "folder": str(corpus.folder),
                "was_there": was_there,
                "seconds": round(seconds, 2),
                "groups": [group.__dict__ for group in corpus.groups],
                **corpus.facts,
            }
        )
        return
    for sentence in corpus.notes:
        print(sentence)
    print(f"shards: {corpus.folder}")
    if was_there:
        print(f"they were there already; looking at them took {seconds:.1f} s")
    else:
        characters = int(corpus.facts["characters"])
        tokens = corpus.train.tokens + corpus.held_out.tokens
        speed = f"{tokens / seconds:,.0f} tokens/s, {characters / seconds / 1e6:.1f} M characters/s"
        print(f"made in {seconds:.1f} s: {speed}")
