"""Room card: what a run was started with: its text, its machine, its versions.

Comes in: what a person gave as text; a run's folder. Goes out: the Source that was meant; RUN/env.json and, for texts
that were in memory, RUN/texts.jsonl, so that the run can go on when its process is gone; the same Source again, or what
is no longer the same. Called by: pretrain.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from unmask import __version__
from unmask.core import files
from unmask.core.distributed import DistributedContext
from unmask.core.errors import DamagedError, RunError, TextError
from unmask.core.plugins import PluginSourceConfig, plugin_facts
from unmask.core.types import Source
from unmask.data.settings import DataConfig
from unmask.data.sources import FileSource, MemorySource, absolute, open_outside, open_source
from unmask.tokenization.words import version
from unmask.training.recipe import Recipe
from unmask.training.setup import Workshop

ENVIRONMENT, TEXTS = "env.json", "texts.jsonl"
_PACKAGES = ("torch", "numpy", "tokenizers", "safetensors")
_NEEDED = (("determinism", "threads"), ("text", "paths"), ("text", "fingerprint"), ("text", "tokenizer"))


def open_text_again(run: Path, environment: Mapping[str, Any], settings: DataConfig) -> Source:
    """The text that a run was started with.

    Raises:
        TextError: a file is gone or can't be read.
        RunError: the text has changed, or the run has lost the texts that it kept.
    """
    then = environment["text"]
    if isinstance(settings.source, PluginSourceConfig):
        source: Source = open_outside(settings.source, then["paths"])
    elif then["paths"]:
        source = open_source(then["paths"], settings)
    else:
        kept = run / TEXTS
        if not kept.is_file():
            raise RunError("the run's text is gone", location=str(kept), hint="restore this file, or start a new run")
        source = MemorySource(_read_texts(kept), settings.unicode)
    if source.fingerprint != then["fingerprint"]:
        raise RunError(
            "the text is not what this run was started with",
            location=", ".join(then["paths"]) or str(run / TEXTS),
            hint="bring the old text back, or start a new run on the new one",
        )
    return source


def open_valid(settings: DataConfig) -> dict[str, FileSource]:
    """The further texts that validations measure, by name.

    Raises:
        TextError: one of them is missing, or its first bytes can't be read.
    """
    opened: dict[str, FileSource] = {}
    for name, path in settings.valid.items():
        source = opened[name] = open_source([path], settings)
        try:
            source.check()
        except TextError as error:
            where = f"data.valid.{name}: {error.location or path}"
            raise TextError(error.message, location=where, hint=error.hint) from error
    return opened


def open_valid_again(environment: Mapping[str, Any], settings: DataConfig) -> dict[str, FileSource]:
    """The further texts that a run was started with.

    Raises:
        TextError: one of them is gone or can't be read.
        RunError: one of them has changed.
    """
    then = environment["text"].get("valid", {})
    paths = {name: then[name]["path"] if name in then else path for name, path in settings.valid.items()}
    opened = open_valid(replace(settings, valid=paths))
    for name, source in opened.items():
        if name not in then or source.fingerprint != then[name]["fingerprint"]:
            raise RunError(
                f"the validation text `{name}` is not what this run was started with",
                location=paths[name],
                hint="bring the old text back, or start a new run on the new one",
            )
    return opened


def _read_texts(path: Path) -> list[str]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:  # not JSON, or not UTF-8
        raise DamagedError(
            f"a line of this file is not JSON: {error}",
            location=str(path),
            hint="restore this file, or start a new run",
        ) from error


def determinism_key(world: DistributedContext, recipe: Recipe) -> dict[str, Any]:
    """What the bits of a run depend on beside its recipe and text; the code of a person's own is part of it."""
    versions = {name: metadata.version(name) for name in _PACKAGES}
    own = {f"{kind.role} {kind.kind}": plugin_facts(kind)["digest"] for kind in recipe.outside}
    if segmenter := version(recipe.data.words):
        own[f"data.words {recipe.data.words}"] = segmenter
    return {**world.describe(), **versions, "python": platform.python_version(), "unmask": __version__, **own}


def write_environment(run: Path, workshop: Workshop, texts: Sequence[str | Path], flops_per_second: float) -> None:
    """RUN/env.json, and RUN/texts.jsonl where the texts are in no file."""
    if isinstance(workshop.source, MemorySource):
        files.write_text(run / TEXTS, "".join(json.dumps(str(text)) + "\n" for text in texts))
    told = {
        "determinism": determinism_key(workshop.world, workshop.recipe),
        "outside": {kind.role: plugin_facts(kind) for kind in workshop.recipe.outside},
        "platform": platform.platform(),
        "command": sys.argv,
        "back_ends": workshop.back_ends(),
        "matmul_flops_per_second": flops_per_second,
        "text": {
            "paths": _paths(workshop.source, texts),
            "fingerprint": workshop.source.fingerprint,
            "valid": {
                name: {"path": absolute(text.paths[0]), "fingerprint": text.fingerprint}
                for name, text in workshop.valid.items()
            },
            "tokenizer": workshop.tokenizer.fingerprint,
            "facts": workshop.corpus.facts,
        },
    }
    files.write_json(run / ENVIRONMENT, told)


def _paths(source: Source, texts: Sequence[str | Path]) -> list[str]:
    """What opens the source again, whatever the working folder; nothing where the texts are in memory."""
    if isinstance(source, FileSource):
        return [absolute(path) for path in source.paths]  # standard input by now has a file
    return [] if isinstance(source, MemorySource) else [str(Path(text).absolute()) for text in texts]


def read_environment(run: Path) -> dict[str, Any]:
    """RUN/env.json.

    Raises:
        DamagedError: it is missing, cut short, or lacks what resuming needs.
    """
    path = run / ENVIRONMENT
    environment = files.read_json(path)
    for table, key in _NEEDED:
        try:
            environment[table][key]
        except (KeyError, TypeError) as error:
            what = f"not the env.json of a run: there is no {table}.{key}"
            raise DamagedError(what, location=str(path), hint="restore it, or start a new run") from error
    return environment
