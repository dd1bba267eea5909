"""Commands on text before training: inspect and prepare."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from unmask.cli.options import (
    DataOptions,
    DocumentRule,
    Errors,
    Field,
    Json,
    RecipeName,
    Settings,
    Texts,
    TokenizerPath,
    delayed_progress,
    load_recipe_with,
    open_display,
    open_tokenizer,
    print_json,
)
from unmask.core.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from unmask.data.report import Example, Report


# inspect ------------------------------------------------------------------------------------------------------------

INSPECT_EXAMPLES = """\
[bold]Examples[/bold]

unmask data inspect notes.txt
unmask data inspect notes/ --recipe char --seed 3
unmask data inspect "posts/*.jsonl.gz" --field body --errors skip
unmask data inspect notes.txt --tokenizer runs/notes/latest --json
"""
_BAR_WIDTH = 30
_LABEL_WIDTH = 12
_MAX_SCRIPTS = 6
_MIN_SCRIPT_SHARE = 0.0005


def inspect_data(
    texts: Texts,
    recipe: RecipeName = "tiny",
    tokenizer: TokenizerPath = None,
    seed: Annotated[int, typer.Option(help="Random seed for the choice of example documents.")] = 0,
    settings: Settings = None,
    errors: Errors = None,
    document: DocumentRule = None,
    field: Field = None,
    as_json: Json = False,
) -> None:
    """Report on text before training: sizes, duplicates, document lengths, scripts, tokens and five examples.

    The report also shows the size of the held-out text and the number of sequences per stage. Nothing is written.
    """
    from dataclasses import replace

    from unmask.data.advice import adapt, may_shrink
    from unmask.data.report import inspect_text
    from unmask.data.sources import open_text, require_field_used
    from unmask.training.recipe import explicit_keys

    options = DataOptions(errors, document, field)
    resolved = load_recipe_with(recipe, settings, options)
    explicit = None if tokenizer else explicit_keys(recipe, settings or (), options.overrides())
    loaded = None if tokenizer is None else open_tokenizer(tokenizer)
    with open_display(sys.stderr) as display:
        opened = open_text(texts, resolved.data)
        require_field_used(resolved.data.field, [opened], given=field is not None)
        source, config, choices = adapt(opened, resolved.data, explicit)
        report = inspect_text(
            source,
            config,
            [stage.max_seq_len for stage in resolved.stage],
            delayed_progress(display),
            seed=seed,
            tokenizer=loaded,
            shrinks=may_shrink(config, explicit),
        )
    report = replace(report, choices=(*map(str, choices), *report.choices))
    if as_json:
        print_json(asdict(report))
    else:
        _print_report(report)


def _print_report(report: Report) -> None:
    """Print the report: with bars and colors in a terminal, in plain lines in a pipe."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for label, value in _summary(report):
        console.print(Text.assemble((f"{label:<{_LABEL_WIDTH}} ", "dim"), value))
        if label == "lengths":
            for line in _histogram(report, console):
                console.print(line)
    for choice in report.choices:
        console.print(Text.assemble((f"{'chosen':<{_LABEL_WIDTH}} ", "dim"), choice))
    if report.examples:
        documents = "document" + "s" * (len(report.examples) > 1)
        console.print(Text(f"\n{len(report.examples)} {documents} as tokenized", "bold"))
        console.print(Text("a space before each word, · between the tokens of a word", "dim"))
    for example in report.examples:
        console.print(Text(f"\ndocument {example.document:,}, {example.characters:,} characters", "dim"))
        console.print(_tokenized(example))
    if report.warnings:
        console.print()
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}", "yellow"))


def _summary(report: Report) -> Iterator[tuple[str, str]]:
    """Yield the label and the text of each line."""
    from unmask.core.format import count, size, visible
    from unmask.tokenization.words import describe_words

    yield "documents", f"{report.documents:,}"
    yield "characters", f"{report.characters:,} ({size(report.bytes)} as UTF-8)"
    for text in report.texts:
        weight = f", weight {text.weight:g}" if text.weight else ""
        yield "", f"{text.name}: {text.documents:,} documents, {text.characters:,} characters{weight}"
    copies = report.copies
    if copies.documents:
        share = f"{copies.documents:,} documents ({copies.share:.1%}), {copies.characters:,} characters"
        yield "duplicates", f'{share}; the most frequent {copies.most:,} times: "{visible(copies.example)}"'
    else:
        yield "duplicates", "none"
    lengths = report.lengths
    spread = f"80 % between {lengths.tenth:,} and {lengths.ninetieth:,}, maximum {lengths.longest:,}"
    yield "lengths", f"median {lengths.median:,} characters, {spread}"
    yield "words", describe_words(report.words) + (" (chosen by script)" if report.words_by == "auto" else "")
    shares = {script: share for script, share in report.alphabet.scripts.items() if share >= _MIN_SCRIPT_SHARE}
    scripts = [f", {script.title()} {share:.1%}" for script, share in shares.items()]
    yield "alphabet", f"{report.alphabet.distinct:,} distinct characters{''.join(scripts[:_MAX_SCRIPTS])}"
    if foreign := "  ".join(f"{letter.character} {count(letter.count)}" for letter in report.alphabet.foreign):
        yield "", f"from other scripts: {foreign}"
    if held_out := report.held_out:
        method = "selected by a hash of the text" if held_out.by == "hash" else f"the last {held_out.share} of each"
        yield "held out", f"{held_out.documents:,} documents, {method}; {held_out.characters:,} characters"
    if tokenizer := report.tokenizer:
        trained = f" trained on {count(tokenizer.sample_characters)} characters" if tokenizer.trained else ""
        rates = f"{tokenizer.characters_per_token:.2f} characters per token, {tokenizer.unknown_share:.3%} [UNK]"
        yield "tokenizer", f"{tokenizer.kind}, {tokenizer.vocabulary:,} tokens{trained}; {rates}"
    for stage in report.stages:
        windows = f"about {count(stage.windows)} sequences of {stage.tokens_per_window:.0f} tokens"
        yield f"length {stage.length}", f"{windows}, {count(stage.epoch_tokens)} tokens per epoch{_repeats(stage.seen)}"


def _repeats(repeats: Mapping[str, float]) -> str:
    return "".join(f", {name} {times:.2g} times" for name, times in repeats.items())


def _histogram(report: Report, console: Console) -> list[Text]:
    """Return one line per bin of document lengths."""
    from rich.text import Text

    from unmask.core.format import bar

    bins = report.lengths.bins
    largest = max(entry.documents for entry in bins)
    total = max(1, sum(entry.characters for entry in bins))
    ranges = [f"{entry.first:,} to {entry.last:,}" for entry in bins]
    width = max(map(len, ranges))
    lines: list[Text] = []
    for entry, limits in zip(bins, ranges, strict=True):
        words = f"{limits:>{width}}  {entry.documents:>9,}  {entry.characters / total:>6.1%} of the characters"
        line = Text(" " * (_LABEL_WIDTH + 1) + words)
        if console.is_terminal:
            line.append("  " + bar(entry.documents / largest, _BAR_WIDTH), "green")
        lines.append(line)
    return lines


def _tokenized(example: Example) -> Text:
    """Return the tokens of a document: a space before each word, · within it; colors alternate between words."""
    from rich.text import Text

    from unmask.core.format import visible

    line, word = Text(), 0
    for number, token in enumerate(example.tokens):
        word += token.starts_word
        if number:
            line.append(" " if token.starts_word else "·", "dim")
        shown = visible(token.text).replace(" ", "␣") or "…"
        line.append(shown, "red reverse" if token.is_unknown else "cyan" if word % 2 else "")
    return line if example.is_whole else line.append(" …", "dim")


# prepare ------------------------------------------------------------------------------------------------------------

PREPARE_EXAMPLES = """\
[bold]Examples[/bold]

unmask data prepare notes/ --recipe modern-tiny
unmask data prepare notes.txt --tokenizer my-tokenizer --json
unmask data prepare notes.txt --set data.tokenizer.vocab_size=16384
unmask data prepare "s3://bucket/*.txt.gz"                  copy the objects to the cache first
unmask data prepare notes/ --engine ray --address auto      tokenize on a cluster of Ray
"""
Engine = Annotated[
    Literal["local", "ray"], typer.Option(help="What tokenizes: processes of this machine, or workers of Ray.")
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Cluster of Ray: auto or HOST:PORT; all its machines need text and cache under the same paths.",
        show_default="a cluster of this machine, for this command",
    ),
]


def prepare_data(
    texts: Texts,
    recipe: RecipeName = "tiny",
    tokenizer: TokenizerPath = None,
    settings: Settings = None,
    errors: Errors = None,
    document: DocumentRule = None,
    field: Field = None,
    engine: Engine = "local",
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Tokenize text into the cache; pretrain with the same settings reads it from there.

    The cache is $UNMASK_CACHE, or ~/.cache/unmask. Long texts are tokenized on all cores, or by the workers of Ray; the
    result is the same.
    """
    if address is not None and engine != "ray":
        raise RecipeError("--address needs --engine ray", location=f"--address {address}", hint="add --engine ray")
    from unmask.core.files import default_cache
    from unmask.data.advice import adapt, may_shrink, vocabulary_choice
    from unmask.data.prepare import prepare
    from unmask.data.ray_engine import RayConfig
    from unmask.data.sources import open_text, require_field_used
    from unmask.training.recipe import explicit_keys

    data = DataOptions(errors, document, field, tokenizer)
    config = load_recipe_with(recipe, settings, data).data
    start = time.perf_counter()
    explicit = explicit_keys(recipe, settings or (), data.overrides())
    tasks: set[str] = set()
    with open_display(sys.stderr) as display:

        def progress(task: str, fraction: float) -> None:
            tasks.add(task)
            display.progress(task, fraction)

        opened = open_text(texts, config)
        require_field_used(config.field, [opened], given=field is not None)
        source, config, choices = adapt(opened, config, explicit)
        workers = RayConfig(address or "") if engine == "ray" else "all cores"
        shrinks = may_shrink(config, explicit)
        corpus = prepare(source, config, default_cache(), progress, workers=workers, shrinks=shrinks)
    choice = vocabulary_choice(config, corpus.tokenizer.size)
    choices += [choice] if choice else []
    seconds = time.perf_counter() - start
    was_cached = "tokenizing" not in tasks
    if as_json:
        print_json({
            "folder": str(corpus.folder),
            "was_cached": was_cached,
            "seconds": round(seconds, 2),
            "groups": [group.__dict__ for group in corpus.groups],
            "choices": [str(choice) for choice in choices],
            **corpus.facts,
        })  # fmt: skip
        return
    for note in [*choices, *corpus.notes]:
        print(note)
    print(f"shards: {corpus.folder}")
    if was_cached:
        print(f"found in the cache, checked in {seconds:.1f} s")
    else:
        characters = int(corpus.facts["characters"])
        tokens = corpus.train.tokens + corpus.held_out.tokens
        speed = f"{tokens / seconds:,.0f} tokens/s, {characters / seconds / 1e6:.1f} M characters/s"
        print(f"tokenized in {seconds:.1f} s: {speed}")
