"""Recipes as trees of TOML values: loading, `extends`, `--set`, and building frozen dataclasses from them.

A config class is a frozen dataclass. Its fields are plain TOML types, other config classes, or unions of config
classes that differ in a `kind` field. Building is strict: an unknown key, kind or type is an error that names the file
or option, the key, and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import tomli_w

from unmask.core.errors import DamagedError, RecipeError
from unmask.core.files import MAX_RECIPE_BYTES, read_text
from unmask.core.plugins import NoConfig, PluginConfig, find, is_plugin_name, settings_class, wrap_plugin_errors
from unmask.core.quantities import UNIT_EXAMPLES, Fraction, Quantity, closest_match
from unmask.core.renamed_keys import renamed_key, renamed_value

Tree = dict[str, Any]  # a parsed TOML table: tables, lists, strings, numbers and booleans
Config = TypeVar("Config")
PluginKind = TypeVar("PluginKind", bound=PluginConfig)


@dataclass(frozen=True)
class Override:
    """A value that a command-line option sets, and the option as it was written, for error messages."""

    value: Any
    option: str


# Validation of config classes ---------------------------------------------------------------------------------------


def require(
    config: object,
    *fields: str,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    below: float | None = None,
    hint: str = "",
) -> None:
    """Check that numeric fields of a config lie in a range; NaN lies in none.

    Raises:
        RecipeError: the value of a field is outside the range.
    """
    for field in fields:
        value = getattr(config, field)
        is_valid = (
            (min is None or value >= min)
            and (max is None or value <= max)
            and (above is None or value > above)
            and (below is None or value < below)
            and not math.isnan(value)
        )
        if not is_valid:
            expected = _range_text(min, max, above, below)
            raise RecipeError(
                f"invalid {field}: got {value}, expected {expected}",
                location=field,
                hint=hint or f"set {field} to a number that is {expected}",
            )


def _range_text(min: float | None, max: float | None, above: float | None, below: float | None) -> str:
    bounds = [
        "" if min is None else f"at least {min:g}",
        "" if above is None else f"above {above:g}",
        "" if max is None else f"at most {max:g}",
        "" if below is None else "finite" if math.isinf(below) else f"below {below:g}",
    ]
    return " and ".join(filter(None, bounds))


# Layers -------------------------------------------------------------------------------------------------------------

_TOP_LAYER: Final = 1 << 30  # the layer of command-line settings, above every recipe


class LayeredTable(Tree):
    """A table that records in which layer each key was set, so that keys of a replaced `kind` can be dropped."""

    def __init__(self, table: Tree) -> None:
        super().__init__(table)
        self.layers: dict[str, int] = {key: layer_of(table, key) for key in table}

    def set(self, key: str, value: Any, layer: int) -> None:
        """Set a key in a layer; setting `kind` to its present value does not move it to another layer."""
        if key != "kind" or self.get(key) != value:
            self.layers[key] = layer
        self[key] = value


def layer_of(table: Tree, key: str) -> int:
    """Return the layer in which a key was set; 0 for a plain table or a missing key."""
    return table.layers.get(key, 0) if isinstance(table, LayeredTable) else 0


def merge(base: Tree, over: Tree, layer: int = 0) -> Tree:
    """Return `base` updated by `over`: tables are merged key by key, lists and other values are replaced.

    `layer` is the layer of `over`; by default the next one above all layers of `base`.
    """
    merged = LayeredTable(base)
    layer = layer or 1 + max(merged.layers.values(), default=0)
    for key, value in over.items():
        base_value = base.get(key)
        both_tables = isinstance(base_value, dict) and isinstance(value, dict)
        value = merge(cast("Tree", base_value), cast("Tree", value), layer) if both_tables else value
        merged.set(key, value, layer)
    return merged


def apply_set(tree: Tree, text: str) -> Tree:
    """Return the tree with one `key=value` applied; a value that is not valid TOML is a string.

    Keys are dotted. A number is an index into a list, from 0: `stage.1.max_seq_len=256` changes the second stage.

    Raises:
        RecipeError: no "=", no key, an index beyond the list, or a key inside a value that is not a table.
    """
    key, equals, right = text.partition("=")
    option = f"--set {text}"
    if not equals or not all(part.strip() for part in key.split(".")):
        raise RecipeError(
            f"invalid setting: got {text!r}, expected key=value with a dotted key",
            location=option,
            hint='write it as in --set "train.every.save=20 steps"',
        )
    right = right.strip()
    try:
        parsed = tomllib.loads(f"value = {right}")
    except (ValueError, RecursionError):  # not TOML, or an integer of more digits than Python reads
        parsed = {}
    value: Any = parsed["value"] if set(parsed) == {"value"} else right
    return assign(tree, key, value, option)


def assign(tree: Tree, key: str, value: Any, option: str) -> Tree:
    """Return the tree with a value at a dotted key; `option` is the command-line option that sets it, as written.

    Raises:
        RecipeError: an index beyond the list, or a key inside a value that is not a table.
    """
    return cast("Tree", _assign(tree, [part.strip() for part in key.split(".")], 0, value, option))


def _assign(node: Any, path: Sequence[str], depth: int, value: Any, option: str) -> Any:
    """Return `node`, the value at the first `depth` parts of the path, with the value at the whole path set."""
    prefix = ".".join(path[:depth])
    if depth == len(path):
        both_tables = isinstance(node, dict) and isinstance(value, dict)
        return merge(cast("Tree", node), cast("Tree", value), _TOP_LAYER) if both_tables else value
    part = path[depth]
    if isinstance(node, list):
        entries = cast("list[Any]", node)
        if not part.isdecimal() or int(part) >= len(entries):
            count, fix = f"{len(entries)} entries, counted from 0", f"one of {prefix}.0 to {prefix}.{len(entries) - 1}"
            if len(entries) < 2:
                count = "one entry, which is number 0" if entries else "no entries"
                fix = f"{prefix}.0, or the whole list: {prefix}=[...]" if entries else f"the whole list: {prefix}=[...]"
            raise RecipeError(
                f"there is no `{prefix}.{part}`: `{prefix}` has {count}", location=option, hint=f"set {fix}"
            )
        index = int(part)
        entry = _assign(entries[index], path, depth + 1, value, option)
        return [*entries[:index], entry, *entries[index + 1 :]]
    if not isinstance(node, dict):
        raise RecipeError(
            f"`{prefix}` is not a table: it has no key `{part}`", location=option, hint=f"set `{prefix}` itself"
        )
    table = cast("Tree", node)
    if part not in table and depth + 1 < len(path) and path[depth + 1].isdecimal():
        name = ".".join(path[: depth + 1])
        raise RecipeError(
            f"there is no list `{name}` in this recipe", location=option, hint=f"set the whole list: {name}=[...]"
        )
    assigned = LayeredTable(table)
    assigned.set(part, _assign(table.get(part, {}), path, depth + 1, value, option), _TOP_LAYER)
    return assigned


# Files --------------------------------------------------------------------------------------------------------------


def load_toml(path: Path | Traversable) -> Tree:
    """Parse a TOML file.

    Raises:
        RecipeError: the file can't be read or is not TOML; the line is named.
    """
    try:
        text = read_text(path, MAX_RECIPE_BYTES) if isinstance(path, Path) else path.read_text(encoding="utf-8")
    except DamagedError as error:
        reason = error.message.replace("this file", "this recipe")
        raise RecipeError(reason, location=str(path), hint="check the path") from error
    except UnicodeDecodeError as error:
        message = f"this recipe is not UTF-8 text (byte {error.start})"
        raise RecipeError(message, location=str(path), hint="save it as UTF-8") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        # The exception has line numbers as attributes from Python 3.14 on; before, they are in the message only.
        match = re.search(r" \(at line (\d+), column \d+\)$", str(error))
        line = int(match[1]) if match else text.count("\n") + 1
        reason = str(error).partition(" (at ")[0]
        raise RecipeError(
            f"invalid TOML: {reason}", location=f"{path}, line {line}", hint="correct that line"
        ) from error
    except (ValueError, RecursionError) as error:  # Python reads no integer of more than 4,300 digits
        too_much = "an integer has too many digits" if isinstance(error, ValueError) else "tables are nested too deeply"
        raise RecipeError(f"invalid TOML: {too_much}", location=str(path), hint="shorten it") from error


def _shipped_folder() -> Traversable:
    return resources.files("unmask.training.recipes")


def _names(folder: Traversable) -> list[str]:
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with the package, sorted."""
    return _names(_shipped_folder())


def _find(name: str, base: Path | None, shipped: Traversable) -> Path | Traversable:
    """Return the file of a recipe, given by name or path; relative paths start at the directory `base`."""
    names = _names(shipped)
    if name in names:
        return shipped / f"{name}.toml"
    path = (base or Path()) / name
    if os.path.isfile(path):  # Path.is_file raises if the name is too long
        return path
    near = closest_match(name, names)
    raise RecipeError(
        f"unknown recipe `{name}`" + (f": did you mean `{near}`?" if near else ""),
        location=str(path) if name.endswith(".toml") else "",
        hint=f"use one of {', '.join(names) or '(no shipped recipes)'}, or the path of a TOML file",
    )


def resolve_recipe(name_or_path: str | Path, *, shipped: Traversable | None = None, own: bool = False) -> Tree:
    """Load a recipe and merge it over the recipes that it `extends`.

    With `own`, the shipped recipes are left out: the tree has the user's keys only.

    A shipped name takes precedence over a file of the same name; write ./name for the file. A relative path in
    `extends` starts at the directory of the file that contains it.

    Raises:
        RecipeError: an unknown recipe (the nearest name is given), invalid TOML, or recipes that extend each other.
    """
    folder = _shipped_folder() if shipped is None else shipped
    name, base, chain, trees = str(name_or_path), None, list[str](), list[Tree]()
    if isinstance(name_or_path, Path) and name_or_path.is_file():  # an existing Path is never a shipped name
        name = str(name_or_path.absolute())
    while True:
        file = _find(name, base, folder)
        location = str(file.resolve() if isinstance(file, Path) else file)
        if location in chain:
            cycle = " -> ".join(Path(link).name for link in [*chain[chain.index(location) :], location])
            raise RecipeError(
                f"these recipes extend each other: {cycle}", location=location, hint="remove one `extends`"
            )
        chain.append(location)
        tree = load_toml(file)
        parent = tree.pop("extends", None)
        is_shipped = file.name in [f"{known}.toml" for known in _names(folder)] and file == folder / file.name
        if not (own and is_shipped):
            trees.append(tree)
        if parent is None:
            break
        if not isinstance(parent, str):
            raise RecipeError(
                f"invalid extends: got {_toml(parent)}, expected the name of one recipe",
                location=f"{location}: extends",
                hint='write extends = "tiny"',
            )
        name, base = parent, file.parent if isinstance(file, Path) else None
    merged: Tree = {}
    for tree in reversed(trees):
        merged = merge(merged, tree)
    return merged


# Building -----------------------------------------------------------------------------------------------------------


def build_config(
    config: type[Config],
    tree: Tree,
    source: str,
    settings: Sequence[str] = (),
    options: Mapping[str, str] | None = None,
    *,
    section: str = "",
) -> Config:
    """Build a config class from a tree of TOML values; missing keys get their defaults.

    Args:
        config: the class to build.
        tree: the values.
        source: the file of the tree, for error messages.
        settings: the `--set` texts that were applied to the tree, for error messages.
        options: dotted key -> the command-line option that set it, as written, for error messages.
        section: name of the recipe section that the tree contains, as in "data.tokenizer"; "" for a whole recipe.

    Raises:
        RecipeError: an unknown or missing key, a wrong type, an unknown choice, or a value that the class rejects.
    """
    return cast("Config", _build_table((config,), tree, _Location(source, tuple(settings), options or {}, section)))


def build_plugin(plugin: type[PluginKind], tree: Tree, source: str, settings: Sequence[str] = ()) -> PluginKind:
    """Build the config of a plugin from its table, `kind` included.

    Raises:
        RecipeError: as for `build_config`; or `kind` does not name a class of this plugin type.
    """
    return cast("PluginKind", _build_plugin(plugin, tree, _Location(source, tuple(settings), {})))


@dataclass(frozen=True)
class _Location:
    """The place of a value, for error messages."""

    source: str
    settings: tuple[str, ...]
    options: Mapping[str, str]
    section: str = ""
    key: str = ""  # dotted, below the section

    def inside(self, name: str | int) -> _Location:
        return dataclasses.replace(self, key=f"{self.key}.{name}" if self.key else str(name))

    @property
    def name(self) -> str:
        return self.key or self.section or "value"

    @property
    def path(self) -> list[str]:
        """The parts of the key in a recipe, without indices into lists."""
        return [part for part in f"{self.section}.{self.key}".split(".") if part and not part.isdecimal()]

    def error(self, message: str, hint: str = "") -> RecipeError:
        return RecipeError(message, location=self._text(), hint=hint)

    def value_error(self, value: Any, message: str, hint: str) -> RecipeError:
        """Return the error of an invalid value; a former value is reported with its present form."""
        present = renamed_value(".".join(self.path), value)
        if present is not None:
            return self.error(f"`{self.name} = {_toml(value)}` is now `{_toml(present)}`", "change it")
        return self.error(message, hint)

    def _text(self) -> str:
        for key, option in self.options.items():  # an option overrides --set
            if f"{self.key}.".startswith(f"{key}."):
                return option
        for text in reversed(self.settings):  # the last one that set this key or a table around it
            name = text.partition("=")[0].strip()
            if f"{self.key}.".startswith(f"{name}."):
                return f"--set {text}: {self.key}"
        return ": ".join(filter(None, (self.source, self.key)))


def _build_table(members: Sequence[Any], tree: Tree, at: _Location) -> Any:
    """Build one of the config classes `members`, selected by `kind`; the first one where there is no `kind`."""
    builtin = [member for member in members if not issubclass(member, PluginConfig)]
    plugins = [member for member in members if issubclass(member, PluginConfig)]
    if "kind" in tree and plugins and is_plugin_name(tree["kind"]):
        return _build_plugin(plugins[0], tree, at)
    if not builtin:
        raise at.error("`kind` does not name a plugin", 'set kind = "package.module:Name"')
    config = builtin[0]
    if "kind" in tree and len(members) > 1:
        matching = [member for member in builtin if tree["kind"] in _kinds(member)]
        if not matching:
            kinds = [kind for member in builtin for kind in _kinds(member)]
            _choose(kinds, tree["kind"], at.inside("kind"), or_plugin=bool(plugins))
        config = matching[0]
        known = {field.name for field in dataclasses.fields(config)}
        foreign = {field.name for member in builtin for field in dataclasses.fields(member)} - known
        foreign |= set(tree) - known if plugins else set()  # the keys of a plugin aren't known here
        tree = _drop_replaced(tree, foreign)
    return _build(config, tree, at)


@functools.cache  # evaluating the annotations takes most of the time of a load
def _hints(config: Any) -> dict[str, Any]:
    return get_type_hints(config)


def _kinds(member: Any) -> tuple[str, ...]:
    return get_args(_hints(member).get("kind", Literal["kind"]))


def _drop_replaced(tree: Tree, foreign: Collection[str]) -> Tree:
    """Return the table without foreign keys from a layer below the one that set `kind`."""
    return {k: v for k, v in tree.items() if k not in foreign or layer_of(tree, k) >= layer_of(tree, "kind")}


def _build_plugin(plugin: type[PluginConfig], tree: Tree, at: _Location) -> PluginConfig:
    """Build the config of a plugin; its own settings are built like any config."""
    kind = cast("str", tree["kind"])
    try:
        cls = find(kind, plugin)
        settings_type = settings_class(cls)
        hints: dict[str, Any] = wrap_plugin_errors(
            f"can't read the types of `{cls.__name__}.Settings`", lambda: get_type_hints(settings_type), cls
        )
    except RecipeError as error:
        raise at.inside("kind").error(error.message, error.hint) from error
    tree = _drop_replaced(tree, set(tree) - set(hints) - {"kind"})
    if "kind" not in hints:
        tree = {key: value for key, value in tree.items() if key != "kind"}
    settings = _build(settings_type, tree, at, kind, cls)
    try:
        to_toml(settings)
    except AssertionError as error:
        raise at.error(
            f"`{cls.__name__}.Settings`: {error}", "use values that TOML has: numbers, strings, lists"
        ) from error
    return plugin(kind, settings)


def _build(config: Any, tree: Tree, at: _Location, kind: str = "", cls: type = NoConfig) -> Any:
    """Build the dataclass `config` from its table; `kind` and `cls` are those of a plugin."""
    fields = [field for field in dataclasses.fields(config) if field.init]
    hints, known = _hints(config), [field.name for field in fields]
    for key in tree:
        if key not in known:
            raise _unknown_key(key, tree[key], at, known, kind or (_kinds(config)[0] if "kind" in known else ""))
    values = {key: _convert(hints[key], value, at.inside(key)) for key, value in tree.items()}
    for field in fields:
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if field.name not in values and not has_default:
            raise at.inside(field.name).error(
                f"`{field.name}` is missing", f"set it to {_type_name(hints[field.name])}"
            )
    try:
        return (
            wrap_plugin_errors(f"`{kind}` refuses its settings", lambda: config(**values), cls)
            if kind
            else config(**values)
        )
    except RecipeError as error:  # its location names a field of the config
        raise (at.inside(error.location) if error.location else at).error(error.message, error.hint) from error


def _unknown_key(key: str, value: Any, at: _Location, known: Sequence[str], kind: str) -> RecipeError:
    """Return the error of an unknown key; a former key is reported with its present name."""
    inside = at.inside(key)
    if not is_plugin_name(kind) and not renamed_key(at.path):
        # For a former section its first key is reported, so that one message has both new names.
        places = [inside]
        while isinstance(value, dict) and value:
            name, value = next(iter(cast("Tree", value).items()))
            places.append(places[-1].inside(name))
        for place in reversed(places):
            if present := renamed_key(place.path):
                return place.error(f"`{_heading(place.path)}` is now `{_heading(present.split('.'))}`", "rename it")
    near = closest_match(key, known)
    message = f"unknown key `{key}`{f' of kind `{kind}`' if kind else ''}"
    hint = f"use one of these keys: {', '.join(known)}" if known else "remove it: there are no keys here"
    return inside.error(message + (f": did you mean `{near}`?" if near else ""), hint)


def _heading(path: Sequence[str]) -> str:
    """Return a key as a TOML file shows it: "[model] hidden_size"."""
    section, key = (path[:-1], path[-1]) if len(path) > 1 else (path, "")
    name = ".".join(section)
    return f"{f'[[{name}]]' if name == 'stage' else f'[{name}]'} {key}".rstrip()


def _choose(choices: Sequence[Any], value: Any, at: _Location, *, or_plugin: bool = False) -> Any:
    """Return the value if it is one of the choices."""
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    near = (
        closest_match(value, [choice for choice in choices if isinstance(choice, str)])
        if isinstance(value, str)
        else ""
    )
    message = f"unknown choice {_toml(value)}" + (f": did you mean {_toml(near)}?" if near else "")
    plugin = ", or a class of your own: package.module:Name" if or_plugin else ""
    raise at.value_error(value, message, f"choose one of {', '.join(map(_toml, choices))}{plugin}")


def _convert(hint: Any, value: Any, at: _Location) -> Any:
    """Convert a TOML value to the type of a field."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, UnionType):
        return _convert_union([member for member in get_args(hint) if member is not NoneType], value, at)
    if dataclasses.is_dataclass(hint) and hint not in (Fraction, Quantity) and isinstance(value, dict):
        return _build_table((hint,), cast("Tree", value), at)
    if get_origin(hint) is Literal:
        return _choose(get_args(hint), value, at)
    if get_origin(hint) is tuple and isinstance(value, list):
        return _convert_list(get_args(hint), cast("list[Any]", value), at)
    if (get_origin(hint) or hint) in (dict, Mapping) and isinstance(value, dict):
        inner = get_args(hint)[1]
        return {key: _convert(inner, entry, at.inside(key)) for key, entry in cast("Tree", value).items()}
    if hint in (Fraction, Quantity) and isinstance(value, str):
        try:
            return hint.parse(value)
        except RecipeError as error:
            raise at.error(error.message, error.hint) from error
    if hint is Quantity and type(value) in (int, float):
        raise at.error(f"`{value}` needs a unit: {UNIT_EXAMPLES}", f'write it in quotes, as in "{value} steps"')
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) in (int, float) and not math.isnan(value):
        return float(value)
    if type(value) is hint and hint in (bool, int, str):
        return value
    raise _wrong_type(value, _type_name(hint), at)


def _wrong_type(value: Any, expected: str, at: _Location, hint: str = "") -> RecipeError:
    message = f"invalid {at.name}: got {_toml(value)}, expected {expected}"
    return at.value_error(value, message, hint or f"set it to {expected}")


def _convert_union(members: Sequence[Any], value: Any, at: _Location) -> Any:
    """Convert a value to the member of a union that accepts it."""
    tables = [member for member in members if dataclasses.is_dataclass(member) and member not in (Fraction, Quantity)]
    if is_plugin_name(value) and any(issubclass(cast("type", member), PluginConfig) for member in tables):
        value = {"kind": value}
    if isinstance(value, dict) and tables:
        return _build_table(tables, cast("Tree", value), at)
    plain = [member for member in members if member not in tables]
    if Fraction in plain and isinstance(value, str) and value.rstrip().endswith("%"):
        others = [_type_name(member) for member in plain if member not in (Fraction, Quantity)]
        try:
            return Fraction.parse(value)
        except RecipeError as error:
            raise at.error(error.message, " or ".join([error.hint, *others])) from error
    elif Fraction in plain and Quantity in plain and isinstance(value, str):
        plain.remove(Fraction)
    errors: list[RecipeError] = []
    for member in plain:
        try:
            return _convert(member, value, at)
        except RecipeError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    kinds = [kind for member in tables for kind in _kinds(member)] if len(tables) > 1 else []
    hint = f"set {at.key}.kind to one of {', '.join(map(_toml, kinds))}" if kinds else ""
    raise _wrong_type(value, " or ".join(dict.fromkeys(map(_type_name, members))), at, hint)


def _convert_list(hints: tuple[Any, ...], value: list[Any], at: _Location) -> tuple[Any, ...]:
    """Convert a TOML list to a tuple."""
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = (hints[0],) * len(value)
    if len(hints) != len(value):
        raise at.error(
            f"invalid {at.name}: got a list of {len(value)}, expected a list of {len(hints)}",
            f"give {len(hints)} entries",
        )
    pairs = zip(hints, value, strict=True)
    return tuple(_convert(hint, entry, at.inside(index)) for index, (hint, entry) in enumerate(pairs))


_TYPE_NAMES: Final[Mapping[Any, str]] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    Path: "a path in quotes",
    Fraction: 'a percentage such as "60%"',
    Quantity: 'a quantity such as "300 s"',
    list: "a list",
    tuple: "a list",
    dict: "a table",
    Mapping: "a table",
}


def _type_name(hint: Any) -> str:
    """Return the name of a type for error messages."""
    if get_origin(hint) is Literal:
        choices = [_toml(choice) for choice in get_args(hint)]
        return "one of " + ", ".join(choices) if len(choices) > 1 else choices[0]
    origin = get_origin(hint) or hint
    names = [name for known, name in _TYPE_NAMES.items() if isinstance(origin, type) and issubclass(origin, known)]
    return "a table" if dataclasses.is_dataclass(hint) and origin not in _TYPE_NAMES else (names or ["a value"])[0]


def _toml(value: Any) -> str:
    """Return a value as TOML writes it; tables and lists are only named."""
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    return tomli_w.dumps({"": value}).partition("= ")[2].strip()


# Writing ------------------------------------------------------------------------------------------------------------


def dump_config(config: object) -> str:
    """Return a config as TOML with every value: `build_config(type(x), tomllib.loads(dump_config(x)), "")` equals x."""
    return tomli_w.dumps(cast("Tree", to_toml(config)))


def to_toml(value: Any) -> Any:
    """Return a value of a config as a TOML value; fields that are None are left out, so None must be their default."""
    if isinstance(value, Fraction | Quantity | Path):
        return str(value)
    if isinstance(value, PluginConfig):
        return {"kind": value.kind, **to_toml(value.settings)}
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return {name: to_toml(entry) for name, entry in fields.items() if entry is not None}
    if isinstance(value, Mapping):
        return {key: to_toml(entry) for key, entry in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, tuple | list):
        return [to_toml(entry) for entry in cast("Sequence[Any]", value)]
    assert isinstance(value, bool | int | float | str), f"a recipe can't contain {value!r}"
    return value
