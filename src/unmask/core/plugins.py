"""Room card: kinds from outside: a person's own objective, sampler or source, named "package.module:Name".

Comes in: such a name, the settings that stood beside it in a recipe, the tools that its protocol promises. Goes out:
the class, found and checked; an instance; which file was imported and its digest; in which of a person's files an error
arose. Nothing is imported before a recipe names it; what it names is run. Called by: recipe (which walks the settings),
blueprint, workshop, origin, conformance, cli.

A class `Name` is made as `Name(settings, tools)`. Its settings are the frozen dataclass `Name.Settings`; a class
without one takes none. Modules are found as Python finds them and, last of all, in the current folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Final, cast

from unmask.core.errors import RecipeError, UnmaskError
from unmask.core.quantities import closest_match

_NAME: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_WHERE_MODULES_ARE: Final = "modules are found where Python finds them and in the current folder"
SAMPLE: Final = "mylab.spans:Spans"


@dataclass(frozen=True)
class NoConfig:
    """What a class without `Settings` is given."""


@dataclass(frozen=True)
class PluginConfig:
    """A kind from outside with its settings, as a recipe holds it; the subclasses say what it shall be."""

    kind: str
    settings: Any

    role: ClassVar[str] = ""
    methods: ClassVar[tuple[str, ...]] = ()  # what the class must have before it is made
    attributes: ClassVar[tuple[str, ...]] = ()  # what an instance must have


@dataclass(frozen=True)
class PluginObjectiveConfig(PluginConfig):
    """An objective (contracts.Objective), made with contracts.ObjectiveContext."""

    role = "objective"
    methods = ("corrupt", "loss")
    attributes = ("loss_weights", "metrics", "sampler", "modules", "fills")

    @property
    def masked_fraction(self) -> float:
        """Share of the tokens that it asks about, by which costs are forecast; all where its settings don't say."""
        return float(getattr(self.settings, "masked_fraction", 1.0))


@dataclass(frozen=True)
class PluginSamplerConfig(PluginConfig):
    """A sampler (contracts.Cutter), made with contracts.SamplerContext."""

    role = "sampler"
    methods = ("count", "cut")


@dataclass(frozen=True)
class PluginSourceConfig(PluginConfig):
    """A source (contracts.Source), made with contracts.SourceContext."""

    role = "source"
    methods = ("parts", "documents")
    attributes = ("fingerprint",)


PLUGIN_TYPES: Final[Mapping[str, type[PluginConfig]]] = {
    role.role: role for role in (PluginObjectiveConfig, PluginSamplerConfig, PluginSourceConfig)
}


@dataclass(frozen=True)
class LoadedModule:
    """A module that was imported for a recipe, as it was at that moment."""

    module: ModuleType
    file: str  # "" where it has none, as in a notebook
    digest: str  # of the file's bytes


_found: dict[str, LoadedModule] = {}


# Finding ------------------------------------------------------------------------------------------------------------


def is_outside(kind: object) -> bool:
    """Whether a kind is written as one from outside."""
    return isinstance(kind, str) and ":" in kind


def find(kind: str, role: type[PluginConfig]) -> type:
    """The class that a kind names; its module is imported, which runs it.

    Raises:
        RecipeError: no such module or class, an error in the module (its file and line), or a class that is not what
            its role asks for.
    """
    if not _NAME.fullmatch(kind):
        raise RecipeError(f"`{kind}` does not name a class", hint=f"write it as package.module:Name, e.g. {SAMPLE}")
    module_name, _, name = kind.partition(":")
    found = _imported(module_name, kind)
    place = found.file or module_name
    cls: Any = getattr(found.module, name, None)
    if cls is None:
        near = closest_match(name, [known for known, value in vars(found.module).items() if inspect.isclass(value)])
        raise RecipeError(
            f"there is no `{name}` in {place}" + (f": did you mean `{near}`?" if near else ""),
            hint="name a class of that module",
        )
    what = f"`{name}` in {place} is no {role.role}"
    if not inspect.isclass(cls):
        raise RecipeError(f"{what}: it is a {type(cls).__name__}, not a class", hint="name the class, not what it made")
    missing = [method for method in role.methods if not callable(getattr(cls, method, None))]
    if missing:
        raise RecipeError(f"{what}: it has no {_listed(missing)}", hint=_suite(role, kind))
    return cls


def find_object(name: str) -> Any:
    """What "package.module:name" names, be it a function, a class or an instance; its module is imported.

    Raises:
        RecipeError: no such module or name, or an error in the module (its file and line).
    """
    if not _NAME.fullmatch(name):
        raise RecipeError(f"`{name}` names nothing", hint="write it as package.module:name, e.g. mylab.masks:hide")
    module_name, _, wanted = name.partition(":")
    found = _imported(module_name, name)
    if not hasattr(found.module, wanted):
        near = closest_match(wanted, [known for known in vars(found.module) if not known.startswith("_")])
        raise RecipeError(
            f"there is no `{wanted}` in {found.file or module_name}" + (f": did you mean `{near}`?" if near else ""),
            hint="name something of that module",
        )
    return getattr(found.module, wanted)


def _imported(name: str, kind: str) -> LoadedModule:
    """The module, imported at most once; what its file held is remembered."""
    if name in _found:
        return _found[name]
    here = os.getcwd()
    if not {"", here} & set(sys.path):
        sys.path.append(here)  # last, so that nothing here stands in for a module of Python's or an installed one
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not (name == missing or name.startswith(f"{missing}.")):
            raise _fault(error, f"`{kind}` can't be imported") from error
        near = closest_match(name, [file.stem for file in Path(here).glob("*.py")]) if "." not in name else ""
        raise RecipeError(
            f"there is no module `{missing}`" + (f": did you mean `{near}`?" if near else ""),
            hint=f"{_WHERE_MODULES_ARE} ({here}): install it, or go to the folder that holds it",
        ) from error
    except UnmaskError:
        raise
    except (Exception, SystemExit) as error:  # whatever the module does when it is run
        raise _fault(error, f"`{kind}` can't be imported") from error
    file = str(getattr(module, "__file__", None) or "")
    file = os.path.abspath(file) if file else ""
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if os.path.isfile(file) else ""
    return _found.setdefault(name, LoadedModule(module, file, digest))


def settings_class(cls: type) -> type:
    """The frozen dataclass that a class's settings are.

    Raises:
        RecipeError: `Settings` is something else.
    """
    settings: Any = getattr(cls, "Settings", NoConfig)
    parameters = getattr(settings, "__dataclass_params__", None)
    if not (inspect.isclass(settings) and dataclasses.is_dataclass(settings) and getattr(parameters, "frozen", False)):
        raise RecipeError(
            f"`{cls.__name__}.Settings` in {_file_of(cls)} is no frozen dataclass",
            hint="write @dataclass(frozen=True) above it, with a default for each field",
        )
    return settings


def wrap_plugin_errors(what: str, made: Callable[[], Any], cls: type) -> Any:
    """What `made()` gives; an error in a person's own code becomes one that names file and line.

    Raises:
        UnmaskError: its own, as it is; any other as a RecipeError.
    """
    try:
        return made()
    except UnmaskError:
        raise
    except (Exception, SystemExit) as error:
        raise _fault(error, what, _file_of(cls)) from error


# Making -------------------------------------------------------------------------------------------------------------


def make(outside: PluginConfig, tools: object) -> Any:
    """An instance of the class that a recipe names.

    Raises:
        RecipeError: it can't be made, or is not what its role asks for.
    """
    role = type(outside)
    cls = find(outside.kind, role)
    made = wrap_plugin_errors(f"`{outside.kind}` can't be made", lambda: cls(outside.settings, tools), cls)

    def lacking() -> list[str]:
        return [name for name in role.attributes if not hasattr(made, name)]

    missing = wrap_plugin_errors(f"`{outside.kind}` can't be asked what it is", lacking, cls)
    if missing:
        what = f"`{cls.__name__}` in {_file_of(cls)} is no {role.role}: it has no {_listed(missing)}"
        raise RecipeError(what, location=outside.kind, hint=_suite(role, outside.kind))
    return made


# Telling ------------------------------------------------------------------------------------------------------------


def plugin_facts(outside: PluginConfig) -> dict[str, str]:
    """What a run remembers of a kind from outside: its name, the module's file and the digest of what stood there."""
    found = _imported(outside.kind.partition(":")[0], outside.kind)
    return {"kind": outside.kind, "file": found.file, "digest": found.digest}


def describe(outside: PluginConfig) -> str:
    """Which code a recipe runs, in a sentence."""
    place = plugin_facts(outside)["file"] or "no file"
    return f"{outside.role}: {outside.kind}, code of your own that this recipe runs, from {place}"


def user_frame(error: BaseException) -> str:
    """File, line and function of the innermost frame of an error that lies in a person's own module, if any does.

    What lies beside such a module is a person's own as well, except where packages are installed.
    """
    files = {found.file for found in _found.values() if found.file}
    folders = {os.path.dirname(file) for file in files if "-packages" not in file}
    place = ""
    step = error.__traceback__
    while step is not None:
        at = os.path.abspath(step.tb_frame.f_code.co_filename)
        if at in files or os.path.dirname(at) in folders:
            place = f"{step.tb_frame.f_code.co_filename}, line {step.tb_lineno}, in {step.tb_frame.f_code.co_name}"
        step = step.tb_next
    return place


def _fault(error: BaseException, what: str, file: str = "") -> RecipeError:
    """An error of code that is not ours, with its own file and line."""
    where = file
    if isinstance(error, SyntaxError):
        where = f"{error.filename}, line {error.lineno}"
    step = error.__traceback__
    while step is not None:
        at = step.tb_frame.f_code.co_filename
        if not at.startswith(("<", os.path.dirname(__file__), str(importlib.__file__))):
            where = f"{at}, line {step.tb_lineno}"
        step = step.tb_next
    reason = error.msg if isinstance(error, SyntaxError) else str(error)
    message = f"{what}: {type(error).__name__}: {reason}" + (f"\n  at:    {where}" if where else "")
    return RecipeError(message, hint="mend that line; --debug shows the whole traceback")


def _file_of(cls: type) -> str:
    module = sys.modules.get(cls.__module__)
    return str(cast("Any", getattr(module, "__file__", None)) or cls.__module__)


def _suite(role: type[PluginConfig], kind: str) -> str:
    return f"`unmask check-plugin {kind} --role {role.role}` says what is missing; docs/extending.md has an example"


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
