"""Conformance checks of plugins. The built-in classes pass the same checks."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from unmask.checks.plugins.fixtures import (
    Check,
    CheckResult,
    LoggerFixture,
    SamplerFixture,
    SourceFixture,
    objective_context,
    objective_fixture,
    require,
    run_checks,
    sampler_contexts,
)
from unmask.checks.plugins.second_process import result_digest
from unmask.checks.plugins.suites import LOGGER_CHECKS, OBJECTIVE_CHECKS, SAMPLER_CHECKS, SOURCE_CHECKS
from unmask.core.config import Tree, apply_set, build_plugin, dump_config
from unmask.core.errors import RecipeError
from unmask.core.plugins import PLUGIN_TYPES, PluginConfig, describe, find, make
from unmask.core.types import LoggerContext, MetricLogger, Objective, Sampler, SamplerContext, Source, SourceContext

_CHILD: Final = "from unmask.checks.plugins.second_process import answer_parent; answer_parent()"
_CHILD_SECONDS: Final = 300
_SECOND_PROCESS: Final = "results are the same in another process"


@dataclass(frozen=True)
class CheckReport:
    """The results of all checks of a plugin."""

    role: str
    kind: str
    notes: str  # which code was checked
    settings: str  # as TOML
    results: Sequence[CheckResult]

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return all(result.passed for result in self.results)


def role_of(kind: str) -> str:
    """Return the plugin type of a class, recognized by its methods.

    Raises:
        RecipeError: the class can't be imported, or has the methods of no plugin type.
    """
    cls = find(kind, PluginConfig)
    for role, plugin in PLUGIN_TYPES.items():
        if all(callable(getattr(cls, method, None)) for method in plugin.methods):
            return role
    required = "; ".join(f"{plugin.role}: {' and '.join(plugin.methods)}" for plugin in PLUGIN_TYPES.values())
    raise RecipeError(
        f"`{kind}` has the methods of no plugin type",
        location=kind,
        hint=f"add the methods of its type ({required}), or name the type, as in --role sampler",
    )


def check_plugin(name: str, settings: Sequence[str] = (), paths: Sequence[Path] = (), role: str = "") -> CheckReport:
    """Run all checks of a plugin.

    Args:
        name: "package.module:Name".
        settings: `key=value` texts, as for `--set`, relative to the table of the plugin.
        paths: files for a source to read.
        role: "objective", "sampler", "source" or "logger"; by default recognized by the methods of the class.

    Raises:
        RecipeError: the plugin can't be imported or created, lacks a method, or has an invalid setting.
    """
    tree: Tree = {"kind": name}
    for text in settings:
        tree = apply_set(tree, text)
    paths = tuple(path.absolute() for path in paths)
    config = build_plugin(PLUGIN_TYPES[role or role_of(name)], tree, name, settings)
    if paths and config.role != "source":
        raise RecipeError(
            f"only a source reads TEXT, and `{name}` is a {config.role}", hint="remove the TEXT arguments"
        )
    with _one_thread(), tempfile.TemporaryDirectory() as folder:
        results = _run_suite(config, paths, Path(folder))
        if config.role != "logger":
            results.append(_check_second_process(config, paths))
        return CheckReport(config.role, name, describe(config), dump_config(config), results)


@contextmanager
def _one_thread() -> Generator[None]:
    # Matrices this small are slower on several threads, by ten times if other processes are busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run_suite(config: PluginConfig, paths: tuple[Path, ...], folder: Path) -> list[CheckResult]:
    """Run the checks of a plugin type. A plugin that can't be created is one error, not one for each check."""
    if config.role == "objective":
        objective: Objective = make(config, objective_context())
        return run_checks(OBJECTIVE_CHECKS, objective_fixture(objective))
    if config.role == "sampler":

        def create_sampler(context: SamplerContext) -> Sampler:
            return make(config, context)

        contexts = sampler_contexts()
        create_sampler(contexts[0])
        return run_checks(SAMPLER_CHECKS, SamplerFixture(create_sampler, contexts))
    if config.role == "logger":

        def create_logger(context: LoggerContext) -> MetricLogger:
            return make(config, context)

        fixture = LoggerFixture(create_logger, folder)
        create_logger(fixture.context()).close()
        return run_checks(LOGGER_CHECKS, fixture)
    make(config, SourceContext(paths))
    return run_checks(SOURCE_CHECKS, SourceFixture(*_source_variants(config, paths, folder)))


CreateSource = Callable[[], Source]


def _source_variants(
    config: PluginConfig, paths: tuple[Path, ...], folder: Path
) -> tuple[CreateSource, list[tuple[str, CreateSource]]]:
    """Return functions that create the source: unchanged, and with one setting or one text changed."""

    def create(settings: Any, paths: tuple[Path, ...]) -> CreateSource:
        return lambda: make(dataclasses.replace(config, settings=settings), SourceContext(paths))

    variants: list[tuple[str, CreateSource]] = []
    for field in dataclasses.fields(config.settings):
        value = getattr(config.settings, field.name)
        changed = (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else value
        if changed != value:
            try:
                settings = dataclasses.replace(config.settings, **{field.name: changed})
            except Exception:  # the plugin refuses the value
                continue
            variants.append((f"{field.name} = {changed}", create(settings, paths)))
    for number, path in enumerate(path for path in paths if path.is_file()):
        lines = path.read_bytes().splitlines()
        longer = folder / f"{number}-{path.name}"
        longer.write_bytes(
            b"\n".join([*lines, *lines[-1:], b""])
        )  # the last line repeated, so that a table stays valid
        swapped = tuple(longer if other == path else other for other in paths)
        variants.append((f"one more line in {path.name}", create(config.settings, swapped)))
    return create(config.settings, paths), variants


def _check_second_process(config: PluginConfig, paths: tuple[Path, ...]) -> CheckResult:
    """Compare the results with those of a child process in which Python's hashes have another seed."""

    def compare(config: PluginConfig) -> None:
        task = {
            "role": config.role,
            "toml": dump_config(config),
            "paths": [str(path) for path in paths],
            "path": sys.path,
        }
        child = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=json.dumps(task),
            env={**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            encoding="utf-8",
            timeout=_CHILD_SECONDS,
            check=False,
        )
        lines = child.stderr.strip().splitlines()
        require(child.returncode == 0, f"the other process failed: {lines[-1] if lines else 'without a message'}")
        require(
            result_digest(config, paths) == child.stdout.split()[-1],
            "another process got other results: do they depend on hash(), the order of a set, the time or the process?",
        )

    check: Check[PluginConfig] = Check(
        _SECOND_PROCESS, "A new Python process gets the same results: a run may resume in another process.", compare
    )
    return run_checks([check], config)[0]
