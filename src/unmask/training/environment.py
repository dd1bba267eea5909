"""The environment of a run: its text, tokenizer, machine and versions, written at the start and read by a resume.

RUN/env.json contains the facts, RUN/tokenizer the tokenizer, and RUN/texts.jsonl the texts that were passed as strings.
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

from unmask.core import files
from unmask.core.distributed import DistributedContext
from unmask.core.errors import DamagedError, RunError
from unmask.core.files import RunLayout
from unmask.core.plugins import PluginSourceConfig, plugin_facts
from unmask.core.version import __version__
from unmask.data.settings import DataConfig
from unmask.data.sources import BaseSource, FileSource, MemorySource, open_plugin, open_source, open_valid
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.words import version
from unmask.training.recipe import Recipe
from unmask.training.runs import RUN_FORMAT
from unmask.training.setup import RunComponents, attention_backend

_PACKAGES = ("torch", "numpy", "tokenizers", "safetensors")
_REQUIRED = (("determinism", "threads"), ("text", "paths"), ("text", "fingerprint"), ("text", "tokenizer"))
_TEXT_CHANGED_HINT = "restore the original text, or start a new run on the new one"


def write_environment(
    run: Path, recipe: Recipe, components: RunComponents, texts: Sequence[str | Path], flops_per_second: float
) -> None:
    """Writes RUN/env.json, the tokenizer and, for texts in memory, the texts. A resume needs them."""
    source, corpus = components.source, components.corpus
    if isinstance(source, MemorySource):
        files.write_text(run / RunLayout.TEXTS, "".join(json.dumps(str(text)) + "\n" for text in texts))
    with files.atomic_directory(run / RunLayout.RUN_TOKENIZER) as folder:
        corpus.tokenizer.save(folder)
    environment = {
        "format": RUN_FORMAT,
        "determinism": determinism_key(components.context, recipe),
        "plugins": {p.role: plugin_facts(p) for p in recipe.plugins if p.changes_results},
        "platform": platform.platform(),
        "command": sys.argv,
        "back_ends": {"attention": attention_backend(recipe, components.context)},
        "matmul_flops_per_second": flops_per_second,
        "text": {
            "paths": list(source.paths),
            "fingerprint": source.fingerprint,
            "valid": {
                name: {"path": text.paths[0], "fingerprint": text.fingerprint}
                for name, text in components.valid_sources.items()
            },
            "tokenizer": corpus.tokenizer.fingerprint,
            "held_out_shards": str((corpus.folder / "held-out").absolute()),  # read by export, for sample texts
            "facts": corpus.facts,
        },
    }
    files.write_json(run / RunLayout.ENVIRONMENT, environment)


def determinism_key(context: DistributedContext, recipe: Recipe) -> dict[str, Any]:
    """Returns what the results of a run depend on besides its recipe and text: machine, versions, plugin code."""
    versions = {name: metadata.version(name) for name in _PACKAGES}
    code = {f"{p.role} {p.kind}": plugin_facts(p)["digest"] for p in recipe.plugins if p.changes_results}
    if segmenter := version(recipe.data.words):
        code[f"data.words {recipe.data.words}"] = segmenter
    return {**context.describe(), **versions, "python": platform.python_version(), "unmask": __version__, **code}


def read_environment(run: Path) -> dict[str, Any]:
    """Returns the content of RUN/env.json.

    Raises:
        DamagedError: the file is missing, truncated, or lacks a value that a resume needs.
    """
    path = run / RunLayout.ENVIRONMENT
    environment = files.read_json(path)
    for table, key in _REQUIRED:
        try:
            environment[table][key]
        except (KeyError, TypeError) as error:
            message = f"invalid env.json: {table}.{key} is missing"
            raise DamagedError(message, location=str(path), hint="restore the file, or start a new run") from error
    return environment


def reopen_text(run: Path, environment: Mapping[str, Any], settings: DataConfig, *, verify: bool = False) -> BaseSource:
    """Reopens the text of a run.

    Args:
        run: Folder of the run.
        environment: Content of its env.json.
        settings: Settings of the data section.
        verify: Whether to read all bytes; otherwise a file with unchanged size and time counts as unchanged.

    Raises:
        TextError: a file is missing or can't be read.
        RunError: the text has changed, or texts.jsonl is missing.
    """
    text = environment["text"]
    if isinstance(settings.source, PluginSourceConfig):
        source: BaseSource = open_plugin(settings.source, text["paths"])
    elif text["paths"]:
        source = open_source(text["paths"], settings)
    else:
        path = run / RunLayout.TEXTS
        if not path.is_file():
            raise RunError("the texts of the run are missing", location=str(path), hint="restore the file")
        source = MemorySource(_read_texts(path), settings.unicode)
    if verify:
        source.verify()
    if source.fingerprint != text["fingerprint"]:
        location = ", ".join(text["paths"]) or str(run / RunLayout.TEXTS)
        raise RunError("the text has changed since the run was started", location=location, hint=_TEXT_CHANGED_HINT)
    return source


def reopen_valid(
    environment: Mapping[str, Any], settings: DataConfig, *, verify: bool = False
) -> dict[str, FileSource]:
    """Reopens the validation texts of a run, by name.

    Raises:
        TextError: a file is missing or can't be read.
        RunError: a text has changed.
    """
    texts = environment["text"].get("valid", {})
    paths = {name: texts[name]["path"] if name in texts else path for name, path in settings.valid.items()}
    sources = open_valid(replace(settings, valid=paths))
    for name, source in sources.items():
        if verify:
            source.verify()
        if name not in texts or source.fingerprint != texts[name]["fingerprint"]:
            raise RunError(
                f"the validation text `{name}` has changed since the run was started",
                location=paths[name],
                hint=_TEXT_CHANGED_HINT,
            )
    return sources


def load_run_tokenizer(run: Path, environment: Mapping[str, Any]) -> Tokenizer:
    """Loads the tokenizer of a run from RUN/tokenizer or, if that is missing, from the last checkpoint.

    Raises:
        DamagedError: the tokenizer is missing or has changed.
    """
    folder = run / RunLayout.RUN_TOKENIZER
    if not (folder / RunLayout.TOKENIZER).is_file():
        folder = files.read_pointer(run / RunLayout.LATEST) or folder
    if not (folder / RunLayout.TOKENIZER).is_file():
        raise DamagedError("the tokenizer of the run is missing", location=str(folder), hint="restore the folder")
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint != environment["text"]["tokenizer"]:
        raise DamagedError(
            "the tokenizer of the run has changed since it was written",
            location=str(folder / RunLayout.TOKENIZER),
            hint="restore the file from a copy, or from another checkpoint of the run",
        )
    return tokenizer


def _read_texts(path: Path) -> list[str]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:  # not JSON, or not UTF-8
        raise DamagedError(
            f"a line is not JSON: {error}", location=str(path), hint="restore the file, or start a new run"
        ) from error
