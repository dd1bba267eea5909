"""Room card: what a run was started with: its text, its machine, its versions.

Comes in: what a person gave as text; a run's folder. Goes out: the Source that was meant; RUN/env.json and, for texts
that were in memory, RUN/texts.jsonl, so that the run can go on when its process is gone; the same Source again, or what
is no longer the same. Called by: pretrain.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from unmask import __version__, store
from unmask.contracts import Source
from unmask.errors import DamagedError, RecipeError, RunError, TextError
from unmask.text.corpus import open_source
from unmask.text.settings import TextSettings
from unmask.text.sources import MemorySource
from unmask.workshop import Workshop
from unmask.world import World

ENVIRONMENT, TEXTS = "env.json", "texts.jsonl"
_PACKAGES = ("torch", "numpy", "tokenizers", "safetensors")
_NEEDED = (("bits", "threads"), ("text", "paths"), ("text", "fingerprint"), ("text", "tokenizer"))
_LONGEST_NAME = 255  # bytes that a file's name may have almost everywhere


def open_text(texts: Sequence[str | Path], settings: TextSettings) -> Source:
    """Files and folders; or the texts themselves, one document each, where one of them can't be meant as a path.

    Raises:
        RecipeError: nothing was given.
        TextError: paths among texts; or, now or on reading, text that can't be read.
    """
    if not texts:
        raise RecipeError("no text was given", next="name text files or folders: unmask pretrain notes.txt")
    if not any(_is_prose(text) for text in texts):
        return open_source([Path(text) for text in texts], settings)
    for text in texts:
        if isinstance(text, Path) or (len(text) <= _LONGEST_NAME and os.path.isfile(text)):
            raise TextError(
                "a file among texts that are given as they are",
                where=str(text),
                next="give paths alone, or texts alone",
            )
    return MemorySource([str(text) for text in texts])


def _is_prose(text: str | Path) -> bool:
    """Whether this is no path: it is blank, has lines, or has spaces where nothing of that name exists."""
    if isinstance(text, Path):
        return False
    if not text.strip() or "\n" in text or len(text) > 16 * _LONGEST_NAME:
        return True
    # Not Path.exists, which raises where a name is too long to be one.
    return len(text.split()) > 1 and not text.endswith((".txt", ".gz")) and not os.path.exists(text)


def open_text_again(run: Path, environment: Mapping[str, Any], settings: TextSettings) -> Source:
    """The text that a run was started with.

    Raises:
        TextError: a file is gone or can't be read.
        RunError: the text has changed, or the run has lost the texts that it kept.
    """
    then = environment["text"]
    if then["paths"]:
        source: Source = open_source([Path(path) for path in then["paths"]], settings)
    else:
        kept = run / TEXTS
        if not kept.is_file():
            raise RunError("the run's text is gone", where=str(kept), next="restore this file, or start a new run")
        source = MemorySource(_read_texts(kept))
    if source.fingerprint != then["fingerprint"]:
        raise RunError(
            "the text is not what this run was started with",
            where=", ".join(then["paths"]) or str(run / TEXTS),
            next="bring the old text back, or start a new run on the new one",
        )
    return source


def _read_texts(path: Path) -> list[str]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:  # not JSON, or not UTF-8
        raise DamagedError(
            f"a line of this file is not JSON: {error}", where=str(path), next="restore this file, or start a new run"
        ) from error


def bits(world: World) -> dict[str, Any]:
    """What the bits of a run depend on beside its recipe and text."""
    versions = {name: metadata.version(name) for name in _PACKAGES}
    return {**world.facts(), **versions, "python": platform.python_version(), "unmask": __version__}


def write_environment(run: Path, workshop: Workshop, texts: Sequence[str | Path], flops_per_second: float) -> None:
    """RUN/env.json, and RUN/texts.jsonl where the texts are in no file."""
    in_memory = isinstance(workshop.source, MemorySource)
    if in_memory:
        store.write_text(run / TEXTS, "".join(json.dumps(str(text)) + "\n" for text in texts))
    told = {
        "bits": bits(workshop.world),
        "platform": platform.platform(),
        "command": sys.argv,
        "back_ends": workshop.back_ends(),
        "matmul_flops_per_second": flops_per_second,
        "text": {
            "paths": [] if in_memory else [str(Path(text).absolute()) for text in texts],
            "fingerprint": workshop.source.fingerprint,
            "tokenizer": workshop.tokenizer.fingerprint,
            "facts": workshop.corpus.facts,
        },
    }
    store.write_json(run / ENVIRONMENT, told)


def read_environment(run: Path) -> dict[str, Any]:
    """RUN/env.json.

    Raises:
        DamagedError: it is missing, cut short, or lacks what resuming needs.
    """
    path = run / ENVIRONMENT
    environment = store.read_json(path)
    for table, key in _NEEDED:
        try:
            environment[table][key]
        except (KeyError, TypeError) as error:
            what = f"not the env.json of a run: there is no {table}.{key}"
            raise DamagedError(what, where=str(path), next="restore it, or start a new run") from error
    return environment
