"""Room card: what a kind from outside gives, as one digest, here and in another process.

Comes in: a kind with its settings, for a source its paths; in the other process, the same as JSON. Goes out: the
digest. Called by: check, and the process that it starts.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tomllib
from pathlib import Path
from typing import Any, cast

from unmask.checks.plugins.fixtures import SEED, cutter_cases, objective_tools, sample_texts
from unmask.checks.plugins.suites import read
from unmask.core.config import build_plugin
from unmask.core.plugins import PLUGIN_TYPES, PluginConfig, make
from unmask.core.types import Objective, Sampler, Source, SourceContext, pack


def result_digest(outside: PluginConfig, paths: tuple[Path, ...]) -> str:
    """A digest of what the kind gives: a puzzle, an epoch of cuts, or a fingerprint with all passages."""
    told: Any
    if outside.role == "objective":
        objective: Objective = make(outside, objective_tools())
        masked = objective.corrupt(pack(sample_texts()), SEED)
        told = [
            masked.batch.ids_T.tolist(),
            masked.positions_M.tolist(),
            masked.weights_M.tolist(),
            masked.chance_M.tolist(),
        ]
    elif outside.role == "sampler":
        cutters: list[Sampler] = [make(outside, tools) for tools in cutter_cases()]
        told = [[cutter.cut(1, sample) for sample in range(cutter.count(1))] for cutter in cutters]
    else:
        source: Source = make(outside, SourceContext(paths))
        told = [source.fingerprint, list(read(source).values())]
    return hashlib.sha256(repr(told).encode("utf-8", "surrogatepass")).hexdigest()


def answer_parent() -> None:
    """Print the digest of the task on standard input: the other process of a check."""
    task = cast("dict[str, Any]", json.load(sys.stdin))
    sys.path[:] = task["path"]
    outside = build_plugin(PLUGIN_TYPES[task["role"]], tomllib.loads(task["toml"]), "the parent process")
    print(result_digest(outside, tuple(Path(path) for path in task["paths"])))
