"""The environment of a run: its text, tokenizer, machine and versions, written at the start and read by a resume.

RUN/env.json contains the facts, RUN/tokenizer the tokenizer, and RUN/texts.jsonl the texts that were passed as strings.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, cast

from unmask.core import files
from unmask.core.distributed import DistributedContext
from unmask.core.errors import DamagedError, RunError, TextError
from unmask.core.files import RunLayout
from unmask.core.format import masked
from unmask.core.plugins import PluginSourceConfig, code_marks, plugin_facts
from unmask.core.version import __version__
from unmask.data.readers.hf_datasets import PREFIX
from unmask.data.settings import DataConfig
from unmask.data.sources import (
    BaseSource,
    FileSource,
    MemorySource,
    open_plugin,
    open_source,
    open_text,
    open_valid,
    weighted,
)
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.words import version
from unmask.training.recipe import Recipe
from unmask.training.runs import RUN_FORMAT
from unmask.training.setup import RunComponents, attention_backend

_PACKAGES = ("torch", "numpy", "tokenizers", "safetensors")
_FACTS = ("documents", "characters", "tokens", "unknown_characters")
# What readers of env.json rely on. A list is one of strings.
_EXPECTED: dict[str, type] = {
    "command": list,
    "platform": str,
    "determinism": dict,
    "determinism.threads": int,
    "text": dict,
    "text.paths": list,
    "text.fingerprint": str,
    "text.tokenizer": str,
    "text.facts": dict,
    "text.facts.characters": int,
    "text.facts.vocabulary": int,
    **{f"text.facts.{part}_{name}": int for part in ("train", "held_out") for name in _FACTS},
}
_KINDS = {list: "a list of strings", str: "a string", dict: "a table", int: "a count"}
_RESTORE = "restore the file, or start a new run"
_MOST_TOKENS = 2**24  # of a vocabulary, whose tokenizer.json may have 64 MiB
_MOST_CHARACTERS = 2**48  # more than the largest corpora have
_MAX_COMPARED_FILES = 1_000  # of which ranks compare each one
AnySource = TypeVar("AnySource", bound=BaseSource)
_Facts = Mapping[str, Any]  # the facts of one text, as `_text_facts` returns them


def write_environment(
    run: Path, recipe: Recipe, components: RunComponents, texts: Sequence[str | Path], flops_per_second: float
) -> None:
    """Writes RUN/env.json, the tokenizer and, for texts in memory, the texts. A resume needs them."""
    source, corpus = components.source, components.corpus
    if isinstance(source, MemorySource):
        _write_texts(run, texts)
    with files.atomic_directory(run / RunLayout.RUN_TOKENIZER) as folder:
        corpus.tokenizer.save(folder)
    environment = {
        "format": RUN_FORMAT,
        "determinism": determinism_key(components.context, recipe),
        "plugins": {p.role: plugin_facts(p) for p in recipe.plugins if p.changes_results},
        "code": code_marks(recipe.plugins),  # lets this user resume the run without --allow-code
        "platform": platform.platform(),
        "command": list(map(masked, sys.argv)),  # without credentials of addresses
        "back_ends": {"attention": attention_backend(recipe, components.context)},
        "matmul_flops_per_second": flops_per_second,
        "text": {
            "paths": list(source.paths),
            **_text_facts(source),
            "valid": {
                name: {"path": text.paths[0], **_text_facts(text)} for name, text in components.valid_sources.items()
            },
            "tokenizer": corpus.tokenizer.fingerprint,
            "held_out_shards": held_out_shards(components),
            "facts": corpus.facts,
        },
    }
    files.write_json(run / RunLayout.ENVIRONMENT, environment)


def held_out_shards(components: RunComponents) -> str:
    """Returns the folder with the held-out tokens in the cache; an export reads it for sample texts."""
    return str((components.corpus.folder / "held-out").absolute())


def _text_facts(source: BaseSource) -> dict[str, Any]:
    """Returns what a later text is compared with; the name and digest of each file show the first difference."""
    facts: dict[str, Any] = {"fingerprint": source.fingerprint}
    if isinstance(source, FileSource):
        facts["files"] = [[_file_name(entry), digest] for entry, digest in source.digests.items()]
    return facts


def text_facts_of_ranks(source: BaseSource, valid: Mapping[str, BaseSource]) -> dict[str, dict[str, Any]]:
    """Returns what all ranks must read: the digest of each file, so that a difference names it, and fingerprints."""
    entries = list(source.digests.items()) if isinstance(source, FileSource) else []
    digests = {_file_name(entry): digest for entry, digest in entries[:_MAX_COMPARED_FILES]}
    others = {f"--valid {name}": text.fingerprint for name, text in valid.items()}
    return {"text": {**digests, "fingerprint": source.fingerprint, **others}}


def _file_name(entry: str) -> str:
    """Returns the name of a file without its directory; a dataset keeps its name."""
    return entry if entry.startswith(PREFIX) else Path(entry).name


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
        DamagedError: the file is missing or truncated, or a value is missing or of another type; the error names it.
    """
    path = run / RunLayout.ENVIRONMENT
    environment = files.read_json(path)
    for key, expected in _EXPECTED.items():
        value: Any = environment
        for name in key.split("."):
            value = cast("dict[str, Any]", value).get(name) if isinstance(value, dict) else None
        items = cast("list[Any]", value) if isinstance(value, list) else []
        limit = _MOST_TOKENS if key.endswith("vocabulary") else _MOST_CHARACTERS
        is_impossible = isinstance(value, int) and not 0 <= value <= limit
        if type(value) is not expected or is_impossible or not all(isinstance(item, str) for item in items):
            problem = "is missing" if value is None else f"is not {_KINDS[expected]}"
            message = f"invalid env.json: {key} {problem}"
            raise DamagedError(message, location=str(path), hint=_RESTORE)
    try:
        json.dumps(environment, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:  # it could be neither written again nor shown
        raise DamagedError(f"invalid env.json: {error}", location=str(path), hint=_RESTORE) from error
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
    if text["paths"]:
        location = ", ".join(text["paths"])

        def reopen() -> BaseSource:
            if isinstance(settings.source, PluginSourceConfig):
                return open_plugin(settings.source, text["paths"])
            return open_source(text["paths"], settings)
    else:
        location = str(run / RunLayout.TEXTS)

        def reopen() -> BaseSource:
            if isinstance(settings.source, PluginSourceConfig):
                return open_plugin(settings.source, ())
            return MemorySource(_read_texts(run / RunLayout.TEXTS), settings.unicode)

    options = " ".join(["--text NEW"] * min(3, len(text["paths"]) or 1)) + " ..." * (len(text["paths"]) > 3)
    moved = _resume_with(run, options)
    source = _reopen(reopen, moved, verify=verify)
    if difference := _difference(text, source):
        raise RunError(
            f"the text has changed since the run was started: {difference}", location=location, hint=_changed(moved)
        )
    return source


def reopen_valid(
    run: Path, environment: Mapping[str, Any], settings: DataConfig, *, verify: bool = False
) -> dict[str, FileSource]:
    """Reopens the validation texts of a run, by name.

    Raises:
        TextError: a file is missing or can't be read.
        RunError: a text has changed.
    """
    texts, sources = environment["text"].get("valid", {}), dict[str, FileSource]()
    for name, path in settings.valid.items():
        moved = _resume_with(run, f"--valid {name}=NEW")
        place = texts[name]["path"] if name in texts else path
        one = replace(settings, valid={name: place})
        sources[name] = source = _reopen(lambda one=one, name=name: open_valid(one)[name], moved, verify=verify)
        if difference := _difference(texts.get(name, {}), source):
            message = f"the validation text `{name}` has changed since the run was started: {difference}"
            raise RunError(message, location=place, hint=_changed(moved))
    return sources


def _resume_with(run: Path, options: str) -> str:
    return f"unmask pretrain --resume {shlex.quote(str(run))} {options}"


def _changed(moved: str) -> str:
    return f"restore the text or env.json, or name an unchanged copy of the text: {moved}"


def _reopen(open_it: Callable[[], AnySource], moved: str, *, verify: bool) -> AnySource:
    """Opens a text of the run and computes its fingerprint; `moved` is the command for a text that was moved."""
    try:
        source = open_it()
        if verify:
            source.verify()
        _ = source.fingerprint  # it opens the files
    except TextError as error:
        raise error.at(
            hint=f"restore the text or env.json or, if the text was moved, name its new path: {moved}"
        ) from error
    return source


def move_texts(
    run: Path,
    environment: dict[str, Any],
    settings: DataConfig,
    texts: Sequence[str | Path] = (),
    valid: Mapping[str, str | Path] | None = None,
) -> dict[str, Any]:
    """Replaces the paths of a run's texts by new ones with equal content, also in its env.json.

    Args:
        run: Folder of the run.
        environment: Content of its env.json.
        settings: Settings of the data section.
        texts: New paths of the text, or the texts that were passed as strings; none if they have not moved.
        valid: New paths of validation texts by name.

    Returns:
        The new content of env.json.

    Raises:
        TextError: a file is missing or can't be read.
        RunError: a text is not the text of the run; the first difference is named.
    """
    text = dict(environment["text"])
    if texts:
        source = open_text(texts, settings)
        if difference := _difference(text, source):
            raise RunError(
                f"this is not the text of the run: {difference}",
                location=source.location,
                hint="name an unchanged copy of the run's text, or start a new run on this text",
            )
        text["paths"] = list(source.paths)
        if isinstance(source, MemorySource) and _is_main_process():
            _write_texts(run, texts)
    known = text["valid"] = dict(text.get("valid", {}))
    for name, path in (valid or {}).items():
        if name not in known:
            names = ", ".join(known)
            raise RunError(
                f"the run has no validation text `{name}`",
                location=f"--valid {name}={path}",
                hint=f"use one of {names}" if names else "remove --valid",
            )
        source = open_valid(replace(settings, valid={name: str(path)}))[name]
        if difference := _difference(known[name], source):
            raise RunError(
                f"this is not the validation text `{name}` of the run: {difference}",
                location=str(path),
                hint="name an unchanged copy of that text, or start a new run on this text",
            )
        known[name] = {**known[name], "path": source.paths[0]}
    changed = {**environment, "text": text}
    if _is_main_process():
        files.write_json(run / RunLayout.ENVIRONMENT, changed)
    return changed


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"  # before the ranks are set up


def _difference(expected: _Facts, source: BaseSource) -> str:
    """Returns the first difference between a text of the run and a source; "" if their fingerprints are equal."""
    if source.fingerprint == expected.get("fingerprint"):
        return ""
    if isinstance(source, MemorySource) and expected.get("paths"):
        return "it was passed as strings, and the text of the run is in files"
    if isinstance(source, FileSource) and expected.get("paths") == []:
        return "it is in files, and the text of the run was passed as strings"
    if not isinstance(source, FileSource) or "files" not in expected:
        return "its content differs"
    known, given = expected["files"], [(_file_name(entry), digest) for entry, digest in source.digests.items()]
    if len(known) != len(given):
        missing = [name for name, digest in known if digest not in {digest for _, digest in given}]
        additional = [name for name, digest in given if digest not in {digest for _, digest in known}]
        named = f": `{missing[0]}` is missing" if missing else f": `{additional[0]}` is new" if additional else ""
        return f"it has {len(given):,} file{'s' * (len(given) != 1)}, not {len(known):,}{named}"
    for (old_name, old), (name, digest) in zip(known, given, strict=True):
        if old == digest:
            continue
        if digest in [other for _, other in known] and old in [other for _, other in given]:
            return f"its files have another order: `{name}` comes before `{old_name}`"
        old_kind, kind = old.partition(":")[0], digest.partition(":")[0]
        if old_kind != kind:
            return f"`{name}` is read as {kind}, and the run's `{old_name}` as {old_kind}"
        return f"the content of `{name}` differs from that of the run's `{old_name}`"
    weights = [[weighted(name)[1] for name in paths] for paths in (expected.get("paths", ()), source.paths)]
    if weights[0] != weights[1]:
        return f"its weights differ: {_weights(weights[1])} instead of {_weights(weights[0])}"
    return "the settings that split it into documents differ"


def _weights(weights: Sequence[float | None]) -> str:
    return ", ".join("none" if weight is None else f"{weight:g}" for weight in weights) or "none"


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
    if (stored := environment["text"]["tokenizer"]) != tokenizer.fingerprint:
        # The digest of tokenizer.json alone stands for the usual special tokens.
        is_same_file = files.digest(tokenizer.to_json()) == stored
        changed = "the special tokens that tokenizer_config.json gives to" if is_same_file else "the files of"
        raise DamagedError(
            f"{changed} the tokenizer of the run have changed since it was started",
            location=str(folder),
            hint="restore the folder from a copy, or copy the tokenizer's files of a checkpoint of the run into it",
        )
    return tokenizer


def _write_texts(run: Path, texts: Sequence[str | Path]) -> None:
    files.write_text(run / RunLayout.TEXTS, "".join(json.dumps(str(text)) + "\n" for text in texts))


def _read_texts(path: Path) -> list[str]:
    if not path.is_file():
        raise RunError(
            "the texts of the run are missing",
            location=str(path),
            hint="restore the file, or pass the same texts: unmask.resume(run, texts=[...])",
        )
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:  # not JSON, or not UTF-8
        raise DamagedError(
            f"a line is not JSON: {error}", location=str(path), hint="restore the file, or start a new run"
        ) from error
