"""Computes the results of a plugin as one digest, in this process and in a child process."""

from __future__ import annotations

import hashlib
import json
import sys
import tomllib
from pathlib import Path
from typing import Any, cast

from unmask.checks.plugins.fixtures import SEED, objective_context, sampler_contexts, text_samples
from unmask.checks.plugins.suites import read_source
from unmask.core.config import build_plugin
from unmask.core.plugins import PLUGIN_TYPES, PluginConfig, make
from unmask.core.types import Objective, Sampler, Source, SourceContext, pack


def result_digest(config: PluginConfig, paths: tuple[Path, ...]) -> str:
    """Return the digest of a masked batch, of the samples of an epoch, or of a fingerprint and all chunks."""
    result: Any
    if config.role == "objective":
        objective: Objective = make(config, objective_context())
        masked = objective.corrupt(pack(text_samples()), SEED)
        result = [masked.batch.ids_T.tolist(), masked.positions_M.tolist()]
    elif config.role == "sampler":
        samplers: list[Sampler] = [make(config, context) for context in sampler_contexts()]
        result = [[sampler.spec(1, sample) for sample in range(sampler.count(1))] for sampler in samplers]
    else:
        source: Source = make(config, SourceContext(paths))
        result = [source.fingerprint, list(read_source(source).values())]
    return hashlib.sha256(repr(result).encode("utf-8", "surrogatepass")).hexdigest()


def answer_parent() -> None:
    """Read a task from standard input and print its digest; the main function of the child process."""
    task = cast("dict[str, Any]", json.load(sys.stdin))
    sys.path[:] = task["path"]
    config = build_plugin(PLUGIN_TYPES[task["role"]], tomllib.loads(task["toml"]), "the parent process")
    print(result_digest(config, tuple(Path(path) for path in task["paths"])))
