"""Room card: the verb text build: shards ahead of a run.

Comes in: text, a recipe, perhaps a tokenizer. Goes out: the corpus in the cache, where a later pretrain with the same
settings finds it; what was made. Called by: door.
"""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from unmask.cli.answer import Debug, Json, print_json
from unmask.cli.pretrain import TEXT, Errors, Field, Rule
from unmask.cli.recipe import Settings
from unmask.cli.tokenizer import TokenizerAt, tokenizer_at

BUILD_EXAMPLES = """\
[bold]Examples[/bold]

unmask text build notes/ --recipe modern-tiny
unmask text build notes.txt --tokenizer pieces --json
unmask text build notes.txt --set text.tokenizer.vocab=16384
"""


def build(
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
    from unmask.blueprint import load_recipe
    from unmask.origin import open_text
    from unmask.text.corpus import default_cache, prepare
    from unmask.train.show import for_stream

    flags = {"text.errors": errors, "text.document": document, "text.field": field}
    overrides: dict[str, Any] = {key: value for key, value in flags.items() if value is not None}
    if tokenizer is not None:
        overrides |= {"text.tokenizer.kind": "file", "text.tokenizer.path": str(tokenizer_at(tokenizer))}
    chosen = load_recipe(recipe, settings or (), overrides).text
    begun = time.perf_counter()
    source = open_text(texts, chosen)
    display = for_stream(sys.stderr)
    made: list[str] = []

    def progress(stage: str, share: float) -> None:
        made.append(stage) if stage not in made else None
        display.preparing(stage, share)

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
    for sentence in corpus.said:
        print(sentence)
    print(f"shards: {corpus.folder}")
    if was_there:
        print(f"they were there already; looking at them took {seconds:.1f} s")
    else:
        characters = int(corpus.facts["characters"])
        tokens = corpus.train.tokens + corpus.held_out.tokens
        speed = f"{tokens / seconds:,.0f} tokens/s, {characters / seconds / 1e6:.1f} M characters/s"
        print(f"made in {seconds:.1f} s: {speed}")
