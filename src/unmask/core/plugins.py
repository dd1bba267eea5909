"""Plugins: classes outside this package that a recipe names as "package.module:Name".

A plugin is an objective, a sampler, a source or a metric logger. Its module is imported when a recipe that names it
is built. Python's import path applies; the current directory is searched last. An instance is created as
`Name(settings, context)`: `settings` is the frozen dataclass `Name.Settings`, filled from the recipe, and `context` is
one of the `...Context` classes of `unmask.core.types`. A class without `Settings` has no settings.

The recipe of a run may come from elsewhere, together with the folder of the run. Building it imports only modules that
this user's own recipes have named, unless `code_allowed` says otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import importlib
import inspect
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Final, cast

from unmask.core.errors import RecipeError, UnmaskError
from unmask.core.files import default_cache
from unmask.core.quantities import closest_match

_NAME: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_EXAMPLE: Final = "mylab.spans:Spans"


@dataclass(frozen=True)
class NoConfig:
    """The settings of a class without `Settings`."""


@dataclass(frozen=True)
class PluginConfig:
    """The name of a plugin and its settings, as a recipe has them; there is a subclass for each plugin type."""

    kind: str
    settings: Any

    role: ClassVar[str] = ""
    methods: ClassVar[tuple[str, ...]] = ()  # that the class must have
    attributes: ClassVar[tuple[str, ...]] = ()  # that an instance must have
    changes_results: ClassVar[bool] = True  # whether another version of its code may give another model


@dataclass(frozen=True)
class PluginObjectiveConfig(PluginConfig):
    """An objective (`types.Objective`); its context is `types.ObjectiveContext`."""

    role = "objective"
    methods = ("corrupt", "loss")
    attributes = ("loss_weights", "metrics", "sampler", "modules")

    @property
    def masked_fraction(self) -> float:
        """Expected fraction of tokens that are masked, for cost estimates; 1 if the settings don't define it."""
        return float(getattr(self.settings, "masked_fraction", 1.0))


@dataclass(frozen=True)
class PluginSamplerConfig(PluginConfig):
    """A sampler (`types.Sampler`); its context is `types.SamplerContext`."""

    role = "sampler"
    methods = ("count", "spec")


@dataclass(frozen=True)
class PluginSourceConfig(PluginConfig):
    """A source (`types.Source`); its context is `types.SourceContext`."""

    role = "source"
    methods = ("parts", "documents")
    attributes = ("fingerprint",)


@dataclass(frozen=True)
class PluginLoggerConfig(PluginConfig):
    """A metric logger (`types.MetricLogger`); its context is `types.LoggerContext`."""

    role = "logger"
    methods = ("write", "close")
    changes_results = False


PLUGIN_TYPES: Final[Mapping[str, type[PluginConfig]]] = {
    plugin.role: plugin
    for plugin in (PluginObjectiveConfig, PluginSamplerConfig, PluginSourceConfig, PluginLoggerConfig)
}


@dataclass(frozen=True)
class LoadedModule:
    """A module that was imported for a recipe, with its file as it was at that moment."""

    module: ModuleType
    file: str  # "" if it has none, as in a notebook
    digest: str  # of the bytes of the file


_modules: dict[str, LoadedModule] = {}


# Permission ---------------------------------------------------------------------------------------------------------

_KEY: Final = "plugins.key"  # file in the cache; in a cache that several users share, the first one's
_KEY_BYTES: Final = 32
_is_code_allowed: ContextVar[bool] = ContextVar("is_code_allowed", default=False)
_marks: ContextVar[Mapping[str, object] | None] = ContextVar("marks", default=None)  # None: any module is imported


@contextmanager
def code_allowed(allowed: bool) -> Generator[None]:
    """Allow the block to import every plugin that the recipe of a run names, if `allowed`."""
    token = _is_code_allowed.set(allowed or _is_code_allowed.get())
    try:
        yield
    finally:
        _is_code_allowed.reset(token)


@contextmanager
def only_marked(marks: Mapping[str, object]) -> Generator[None]:
    """Let the block import only plugins with a valid mark, and modules that this process has imported already."""
    token = _marks.set(None if _is_code_allowed.get() else marks)
    try:
        yield
    finally:
        _marks.reset(token)


def code_marks(plugins: Sequence[PluginConfig]) -> dict[str, str]:
    """Return a mark of each plugin, which only this user can make; nothing if the cache can't be written."""
    key = _read_key(create=True) if plugins else b""
    return {plugin.kind: _mark(key, plugin.kind) for plugin in plugins} if key else {}


def address_marks(addresses: Sequence[str]) -> dict[str, str]:
    """Return a mark of each address, like those of `code_marks`."""
    key = _read_key(create=True) if addresses else b""
    return {address: _mark(key, f"address\0{address}") for address in addresses} if key else {}


def is_marked(address: str, marks: Mapping[str, object]) -> bool:
    """Return whether `address_marks` of this user made the mark of an address."""
    mark, key = marks.get(address), _read_key()
    expected = _mark(key, f"address\0{address}").encode()
    return bool(key) and isinstance(mark, str) and hmac.compare_digest(_bytes(mark), expected)


def _mark(key: bytes, kind: str) -> str:
    return hmac.digest(key, _bytes(kind), "sha256").hex()


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")  # JSON may have half of a surrogate pair


def _read_key(*, create: bool = False) -> bytes:
    """Return the random key of this user; b"" if there is none, or it can't be read."""
    path = _key_path()
    if create and not os.path.lexists(path):
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_private(temporary, secrets.token_bytes(_KEY_BYTES))
            _place_key(temporary, path)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    try:
        # The file that is checked is the one that is read: no link, and opened once. A pipe doesn't make it wait.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return b""
            if os.name == "posix" and (status.st_uid != os.getuid() or status.st_mode & 0o077):
                return b""  # others may know it
            key = file.read(_KEY_BYTES + 1)
    except OSError:
        return b""
    return key if len(key) == _KEY_BYTES else b""


def _key_path() -> Path:
    """Return the path of this user's key; the name has the user's number if another user has the plain one."""
    path = default_cache() / _KEY
    if os.name == "posix":
        with contextlib.suppress(OSError):
            if os.lstat(path).st_uid != os.getuid():
                return path.with_name(f"plugins-{os.getuid()}.key")
    return path


def _write_private(path: Path, data: bytes) -> None:
    """Write a new file that this user alone can read."""
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(data)


def _place_key(temporary: Path, path: Path) -> None:
    """Give the key its name, unless another process was faster."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    except OSError:  # a file system without links
        _write_private(path, temporary.read_bytes())


def _require_permission(module: str, kind: str) -> None:
    """Check that a module may be imported.

    Raises:
        RecipeError: the recipe of a run names it, and no recipe of this user did.
    """
    marks = _marks.get()
    if marks is None or module in sys.modules:
        return
    mark, key = marks.get(kind), _read_key()
    if not (key and isinstance(mark, str) and hmac.compare_digest(_bytes(mark), _mark(key, kind).encode())):
        raise RecipeError(
            f"this run names code, and was not started by this user on this machine: `{kind}` is not imported",
            hint="read that code; if you trust it, add --allow-code (in Python, import its module first)",
        )


# Import -------------------------------------------------------------------------------------------------------------


def is_plugin_name(kind: object) -> bool:
    """Return whether a kind names a plugin and not a class of this package."""
    return isinstance(kind, str) and ":" in kind


def find(kind: str, plugin: type[PluginConfig]) -> type:
    """Import the class that a kind names.

    Raises:
        RecipeError: the module or class doesn't exist, the module raises an error (its file and line are given), or
            the class lacks a method that its plugin type requires.
    """
    if not _NAME.fullmatch(kind):
        raise RecipeError(
            f"invalid plugin name: got `{kind}`, expected package.module:Name", hint=f"write it like {_EXAMPLE}"
        )
    module_name, _, name = kind.partition(":")
    loaded = _import(module_name, kind)
    file = loaded.file or module_name
    cls: Any = getattr(loaded.module, name, None)
    if cls is None:
        near = closest_match(name, [known for known, value in vars(loaded.module).items() if inspect.isclass(value)])
        raise RecipeError(
            f"there is no `{name}` in {file}" + (f": did you mean `{near}`?" if near else ""),
            hint="name a class of that module",
        )
    if not inspect.isclass(cls):
        raise RecipeError(
            f"`{name}` in {file} is a {type(cls).__name__}, not a class", hint="name the class, not an instance of it"
        )
    missing = [method for method in plugin.methods if not callable(getattr(cls, method, None))]
    if missing:
        raise RecipeError(
            f"`{name}` in {file} is not a valid {plugin.role}: it lacks {_names(missing)}", hint=_advice(plugin, kind)
        )
    return cls


def find_object(name: str) -> Any:
    """Import the object that "package.module:name" names: a function, a class or an instance.

    Raises:
        RecipeError: the module or name doesn't exist, or the module raises an error (its file and line are given).
    """
    if not _NAME.fullmatch(name):
        raise RecipeError(
            f"invalid name: got `{name}`, expected package.module:name", hint="write it like mylab.masks:mask"
        )
    module_name, _, attribute = name.partition(":")
    loaded = _import(module_name, name)
    if not hasattr(loaded.module, attribute):
        near = closest_match(attribute, [known for known in vars(loaded.module) if not known.startswith("_")])
        raise RecipeError(
            f"there is no `{attribute}` in {loaded.file or module_name}"
            + (f": did you mean `{near}`?" if near else ""),
            hint="name an attribute of that module",
        )
    return getattr(loaded.module, attribute)


def _import(name: str, kind: str) -> LoadedModule:
    """Import a module once, and record the digest of its file."""
    if name in _modules:
        return _modules[name]
    _require_permission(name, kind)
    directory = os.getcwd()
    if not {"", directory} & set(sys.path):
        sys.path.append(directory)  # last, so that no file in it shadows an installed module
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not (name == missing or name.startswith(f"{missing}.")):
            raise _plugin_error(error, f"can't import `{kind}`") from error
        near = closest_match(name, [file.stem for file in Path(directory).glob("*.py")]) if "." not in name else ""
        raise RecipeError(
            f"there is no module `{missing}`" + (f": did you mean `{near}`?" if near else ""),
            hint=f"install it, or change to its directory: Python's import path and {directory} were searched",
        ) from error
    except UnmaskError:
        raise
    except (Exception, SystemExit) as error:
        raise _plugin_error(error, f"can't import `{kind}`") from error
    file = str(getattr(module, "__file__", None) or "")
    file = os.path.abspath(file) if file else ""
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if os.path.isfile(file) else ""
    return _modules.setdefault(name, LoadedModule(module, file, digest))


def settings_class(cls: type) -> type:
    """Return the frozen dataclass `cls.Settings`, or `NoConfig` if there is none.

    Raises:
        RecipeError: `Settings` is not a frozen dataclass.
    """
    settings: Any = getattr(cls, "Settings", NoConfig)
    parameters = getattr(settings, "__dataclass_params__", None)
    if not (inspect.isclass(settings) and dataclasses.is_dataclass(settings) and getattr(parameters, "frozen", False)):
        raise RecipeError(
            f"`{cls.__name__}.Settings` in {_file_of(cls)} is not a frozen dataclass",
            hint="decorate it with @dataclass(frozen=True), with a default for each field",
        )
    return settings


def wrap_plugin_errors(message: str, call: Callable[[], Any], cls: type) -> Any:
    """Return `call()`; errors of plugin code become a RecipeError with file and line.

    Raises:
        UnmaskError: `call` raised it.
        RecipeError: `call` raised another exception.
    """
    try:
        return call()
    except UnmaskError:
        raise
    except (Exception, SystemExit) as error:
        raise _plugin_error(error, message, _file_of(cls)) from error


# Instances ----------------------------------------------------------------------------------------------------------


def make(config: PluginConfig, context: object) -> Any:
    """Create an instance of a plugin.

    Raises:
        RecipeError: the constructor fails, or the instance lacks an attribute that its plugin type requires.
    """
    plugin = type(config)
    cls = find(config.kind, plugin)
    instance = wrap_plugin_errors(f"can't create `{config.kind}`", lambda: cls(config.settings, context), cls)

    def missing_attributes() -> list[str]:
        return [name for name in plugin.attributes if not hasattr(instance, name)]

    missing = wrap_plugin_errors(f"can't read the attributes of `{config.kind}`", missing_attributes, cls)
    if missing:
        message = f"`{cls.__name__}` in {_file_of(cls)} is not a valid {plugin.role}: it lacks {_names(missing)}"
        raise RecipeError(message, location=config.kind, hint=_advice(plugin, config.kind))
    return instance


# Descriptions -------------------------------------------------------------------------------------------------------


def plugin_facts(config: PluginConfig) -> dict[str, str]:
    """Return the facts about a plugin that a run records: name, file of its module and digest of that file."""
    loaded = _import(config.kind.partition(":")[0], config.kind)
    return {"kind": config.kind, "file": loaded.file, "digest": loaded.digest}


def describe(config: PluginConfig) -> str:
    """Return a sentence about the code that a recipe runs."""
    file = plugin_facts(config)["file"] or "no file"
    return f"plugin ({config.role}): {config.kind} from {file}"


def user_frame(error: BaseException) -> str:
    """Return file, line and function of the innermost frame of an error in plugin code, or "" if there is none.

    Modules in the directory of a plugin count as plugin code, except in directories of installed packages.
    """
    files = {loaded.file for loaded in _modules.values() if loaded.file}
    directories = {os.path.dirname(file) for file in files if "-packages" not in file}
    location = ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        file = os.path.abspath(code.co_filename)
        if file in files or os.path.dirname(file) in directories:
            location = f"{code.co_filename}, line {trace.tb_lineno}, in {code.co_name}"
        trace = trace.tb_next
    return location


def _plugin_error(error: BaseException, message: str, file: str = "") -> RecipeError:
    """Return the RecipeError for an exception in plugin code, with file and line."""
    location = file
    if isinstance(error, SyntaxError):
        location = f"{error.filename}, line {error.lineno}"
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith(("<", os.path.dirname(__file__), str(importlib.__file__))):
            location = f"{name}, line {trace.tb_lineno}"
        trace = trace.tb_next
    reason = error.msg if isinstance(error, SyntaxError) else str(error)
    # The place is in the message, because the location will be the key of the recipe that names the plugin.
    text = f"{message}: {type(error).__name__}: {reason}" + (f"\n  in: {location}" if location else "")
    return RecipeError(text, hint="correct that line; --debug shows the traceback")


def _file_of(cls: type) -> str:
    module = sys.modules.get(cls.__module__)
    return str(cast("Any", getattr(module, "__file__", None)) or cls.__module__)


def _advice(plugin: type[PluginConfig], kind: str) -> str:
    return f"run unmask check-plugin {kind} --role {plugin.role}; docs/extending.md has an example"


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
