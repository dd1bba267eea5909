"""Room card: trees of TOML values, laid one on another.

Comes in: what recipes say, from the lowest that is extended to the one that was asked for, and what a person sets by
hand. Goes out: one tree, which knows how high each key was laid. Called by: recipe (which hands merge and apply_set
on), blueprint.
"""

from __future__ import annotations

import dataclasses
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

from unmask.core.errors import RecipeError
from unmask.core.plugins import NoConfig, PluginConfig, find, is_outside, settings_class, wrap_plugin_errors
from unmask.core.quantities import UNIT_EXAMPLES, Fraction, Quantity, closest_match

Tree = dict[str, Any]  # what TOML reads as: tables, lists, texts, numbers, true and false
_TOP: Final = 1 << 30  # the layer of all that is set by hand, above every recipe


class LayeredTable(Tree):
    """A table that remembers in which layer each key was given: `build` leaves out what lies below another kind."""

    def __init__(self, table: Tree) -> None:
        super().__init__(table)
        self.layers: dict[str, int] = {key: layer_of(table, key) for key in table}

    def set(self, key: str, value: Any, layer: int) -> None:
        if key != "kind" or self.get(key) != value:  # who repeats the kind chooses none
            self.layers[key] = layer
        self[key] = value


def layer_of(table: Tree, key: str) -> int:
    """In which layer a key was given; 0 in a table that nothing was laid on, and for a key that isn't there."""
    return table.layers.get(key, 0) if isinstance(table, LayeredTable) else 0


def merge(base: Tree, over: Tree, layer: int = 0) -> Tree:
    """`over` laid on `base`: tables key by key, all else replaced, lists whole.

    `layer` is the layer that `over` is; without one, the next above all of `base`.
    """
    merged = LayeredTable(base)
    layer = layer or 1 + max(merged.layers.values(), default=0)
    for key, value in over.items():
        below = base.get(key)
        both_tables = isinstance(below, dict) and isinstance(value, dict)
        packed = merge(cast("Tree", below), cast("Tree", value), layer) if both_tables else value
        merged.set(key, packed, layer)
    return merged


def apply_set(tree: Tree, text: str) -> Tree:
    """The tree with one `key=value` laid on it; the right side is read as TOML and, where that fails, as a string.

    Keys are dotted; a whole number is an entry of a list, counted from 0: `stage.1.max_seq_len=256` is the second stage.

    Raises:
        RecipeError: no "=", no key, a list entry that isn't there, or a key below something that is no table.
    """
    key, equals, right = text.partition("=")
    where = f"--set {text}"
    if not equals or not all(part.strip() for part in key.split(".")):
        raise RecipeError(
            "a setting is a dotted key, = and a value", location=where, hint='--set "train.every.save=20 steps"'
        )
    right = right.strip()
    try:
        read = tomllib.loads(f"value = {right}")
    except tomllib.TOMLDecodeError:
        read = {}
    value: Any = read["value"] if set(read) == {"value"} else right
    return assign(tree, key, value, where)


def assign(tree: Tree, key: str, value: Any, where: str) -> Tree:
    """The tree with a value at a dotted key; `where` is what a person wrote to say so.

    Raises:
        RecipeError: a list entry that isn't there, or a key below something that is no table.
    """
    return cast("Tree", _assigned(tree, [part.strip() for part in key.split(".")], 0, value, where))


def _assigned(below: Any, path: Sequence[str], depth: int, value: Any, where: str) -> Any:
    """What `below`, found after `depth` parts of the path, becomes once the value stands at the end of the path."""
    done = ".".join(path[:depth])
    if depth == len(path):
        both_tables = isinstance(below, dict) and isinstance(value, dict)
        return merge(cast("Tree", below), cast("Tree", value), _TOP) if both_tables else value
    part = path[depth]
    if isinstance(below, list):
        entries = cast("list[Any]", below)
        if not part.isdecimal() or int(part) >= len(entries):
            have, mend = f"{len(entries)} entries, counted from 0", f"one of {done}.0 to {done}.{len(entries) - 1}"
            if len(entries) < 2:
                have = "one entry, which is number 0" if entries else "no entry"
                mend = f"{done}.0, or the whole list: {done}=[...]" if entries else f"the whole list: {done}=[...]"
            raise RecipeError(f"there is no `{done}.{part}`: `{done}` has {have}", location=where, hint=f"set {mend}")
        at = int(part)
        return [*entries[:at], _assigned(entries[at], path, depth + 1, value, where), *entries[at + 1 :]]
    if not isinstance(below, dict):
        raise RecipeError(
            f"`{done}` is a single value: it has no `{part}`", location=where, hint=f"set `{done}` itself"
        )
    table = cast("Tree", below)
    if part not in table and depth + 1 < len(path) and path[depth + 1].isdecimal():
        listed = ".".join(path[: depth + 1])
        raise RecipeError(
            f"there is no list `{listed}` in this recipe", location=where, hint=f"set it whole: {listed}=[...]"
        )
    assigned = LayeredTable(table)
    assigned.set(part, _assigned(table.get(part, {}), path, depth + 1, value, where), _TOP)
    return assigned


Settings = TypeVar("Settings")
PluginKind = TypeVar("PluginKind", bound=PluginConfig)


# TOML on disk -------------------------------------------------------------------------------------------------------


def load_toml(path: Path | Traversable) -> Tree:
    """A TOML file's tables.

    Raises:
        RecipeError: it can't be read, or is not TOML; the line is named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise RecipeError(f"this recipe can't be read: {reason}", location=str(path), hint="check the path") from error
    except UnicodeDecodeError as error:
        message = f"this recipe is not UTF-8 text (byte {error.start})"
        raise RecipeError(message, location=str(path), hint="save it as UTF-8") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r" \(at line (\d+), column \d+\)$", str(error))
        line = int(found[1]) if found else text.count("\n") + 1
        reason = str(error).partition(" (at ")[0]
        raise RecipeError(f"not TOML: {reason}", location=f"{path}, line {line}", hint="mend that line") from error


def _shipped_folder() -> Traversable:
    return resources.files("unmask.training.recipes")


def _names(folder: Traversable) -> list[str]:
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def shipped_recipes() -> list[str]:
    """The names of the recipes that come with the package, sorted."""
    return _names(_shipped_folder())


def _find(name: str, beside: Path | None, shipped: Traversable) -> Path | Traversable:
    """The file that a recipe's name or path means; a relative path starts at the folder `beside`."""
    names = _names(shipped)
    if name in names:
        return shipped / f"{name}.toml"
    path = (beside or Path()) / name
    if os.path.isfile(path):  # Path.is_file raises where a name is too long to be one
        return path
    near = closest_match(name, names)
    raise RecipeError(
        f"unknown recipe `{name}`" + (f": did you mean `{near}`?" if near else ""),
        location=str(path) if name.endswith(".toml") else "",
        hint=f"name one of {', '.join(names) or 'none that are shipped'}, or a TOML file that exists",
    )


def resolve_recipe(name_or_path: str | Path, *, shipped: Traversable | None = None) -> Tree:
    """A recipe with all that it `extends` laid under it.

    A shipped name wins over a file of the same name; write ./name for the file. A path in `extends` starts at the
    folder of the file that it stands in.

    Raises:
        RecipeError: unknown recipe (the nearest is named), not TOML, or recipes that extend each other in a circle.
    """
    folder = _shipped_folder() if shipped is None else shipped
    name, beside, chain, below = str(name_or_path), None, list[str](), list[Tree]()
    if isinstance(name_or_path, Path) and name_or_path.is_file():  # a path in hand is never a shipped name
        name = str(name_or_path.absolute())
    while True:
        file = _find(name, beside, folder)
        place = str(file.resolve() if isinstance(file, Path) else file)
        if place in chain:
            circle = " -> ".join(Path(link).name for link in [*chain[chain.index(place) :], place])
            raise RecipeError(f"these recipes extend each other: {circle}", location=place, hint="break the circle")
        chain.append(place)
        tree = load_toml(file)
        parent = tree.pop("extends", None)
        below.append(tree)
        if parent is None:
            break
        if not isinstance(parent, str):
            raise RecipeError("`extends` names one recipe", location=f"{place}: extends", hint='write extends = "tiny"')
        name, beside = parent, file.parent if isinstance(file, Path) else None
    whole: Tree = {}
    for tree in reversed(below):
        whole = merge(whole, tree)
    return whole


# Settings in hand ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where in which text a value stands, for the message that refuses it."""

    where: str
    sets: tuple[str, ...]
    flags: Mapping[str, str]
    key: str = ""

    def inside(self, name: str | int) -> _Place:
        return dataclasses.replace(self, key=f"{self.key}.{name}" if self.key else str(name))

    def error(self, what: str, next: str = "") -> RecipeError:
        for key, text in self.flags.items():  # a flag beats what was set
            if f"{self.key}.".startswith(f"{key}."):
                return RecipeError(what, location=text, hint=next)
        for text in reversed(self.sets):  # the last one to touch this key, or a table around it, is to blame
            name = text.partition("=")[0].strip()
            if f"{self.key}.".startswith(f"{name}."):
                return RecipeError(what, location=f"--set {text}: {self.key}", hint=next)
        return RecipeError(what, location=": ".join(filter(None, (self.where, self.key))), hint=next)


_SPOKEN: Final[Mapping[Any, str]] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
    Path: "a path in quotes",
    Fraction: 'a share such as "60%"',
    Quantity: 'an amount such as "300 s"',
    list: "a list",
    tuple: "a list",
    dict: "a table",
    Mapping: "a table",
}


def _spoken(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(_shown(choice) for choice in get_args(hint))
    origin = get_origin(hint) or hint
    near = [_SPOKEN[known] for known in _SPOKEN if isinstance(origin, type) and issubclass(origin, known)]
    return "a table" if dataclasses.is_dataclass(hint) and origin not in _SPOKEN else (near or ["a value"])[0]


def _shown(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    return tomli_w.dumps({"": value}).partition("= ")[2].strip()


def build_config(
    settings: type[Settings],
    tree: Tree,
    where: str,
    sets: Sequence[str] = (),
    flags: Mapping[str, str] | None = None,
) -> Settings:
    """The settings that a tree of TOML values says, defaults filled in.

    `where` names the file; `sets` are the `--set` texts that were laid on it and `flags` the options that stand for a
    dotted key, as a person wrote them, so that a message can name the one at fault.

    Raises:
        RecipeError: an unknown or missing key, a wrong type, an unknown choice, or what the settings themselves refuse.
    """
    return cast("Settings", _table((settings,), tree, _Place(where, tuple(sets), flags or {})))


def build_plugin(role: type[PluginKind], tree: Tree, where: str, sets: Sequence[str] = ()) -> PluginKind:
    """A kind from outside and its settings, from a table of its own.

    Raises:
        RecipeError: as by `build`; or the kind names nothing that can be what `role` says.
    """
    return cast("PluginKind", _from_plugin(role, tree, _Place(where, tuple(sets), {})))


def _kinds(member: Any) -> tuple[str, ...]:
    return get_args(get_type_hints(member).get("kind", Literal["kind"]))


def _table(members: Sequence[Any], tree: Tree, place: _Place) -> Any:
    """One of the dataclasses `members`, chosen by the table's `kind`; without one, the first."""
    inside = [member for member in members if not issubclass(member, PluginConfig)]
    outside = [member for member in members if issubclass(member, PluginConfig)]
    chosen = inside[0]
    if "kind" in tree and outside and is_outside(tree["kind"]):
        return _from_plugin(outside[0], tree, place)
    if "kind" in tree and len(members) > 1:
        fitting = [member for member in inside if tree["kind"] in _kinds(member)]
        if not fitting:
            kinds = [kind for member in inside for kind in _kinds(member)]
            _choice(kinds, tree["kind"], place.inside("kind"), or_outside=bool(outside))
        chosen = fitting[0]
        known = {field.name for field in dataclasses.fields(chosen)}
        others = {field.name for member in inside for field in dataclasses.fields(member)} - known
        others |= set(tree) - known if outside else set()  # nobody knows here what a kind from outside was given
        tree = _above_its_kind(tree, others)
    return _filled(chosen, tree, place)


def _above_its_kind(tree: Tree, others: Collection[str]) -> Tree:
    """The table without what another kind was given in a recipe below the one that chose this kind."""
    return {k: v for k, v in tree.items() if k not in others or layer_of(tree, k) >= layer_of(tree, "kind")}


def _from_plugin(member: type[PluginConfig], tree: Tree, place: _Place) -> PluginConfig:
    """A kind from outside and its own settings, walked as any other's."""
    kind = cast("str", tree["kind"])
    try:
        cls = find(kind, member)
        chosen = settings_class(cls)
        hints: dict[str, Any] = wrap_plugin_errors(
            f"the types of `{cls.__name__}.Settings` can't be read", lambda: get_type_hints(chosen), cls
        )
    except RecipeError as error:
        raise place.inside("kind").error(error.message, error.hint) from error
    tree = _above_its_kind(tree, set(tree) - set(hints) - {"kind"})
    if "kind" not in hints:
        tree = {key: value for key, value in tree.items() if key != "kind"}
    settings = _filled(chosen, tree, place, kind, cls)
    try:
        _written(settings)
    except AssertionError as error:
        raise place.error(
            f"`{cls.__name__}.Settings`: {error}", "hold what TOML holds: numbers, texts, lists"
        ) from error
    return member(kind, settings)


def _filled(chosen: Any, tree: Tree, place: _Place, kind: str = "", cls: type = NoConfig) -> Any:
    """The dataclass `chosen` with what its table says; `kind` and its class are given for one from outside."""
    fields = [field for field in dataclasses.fields(chosen) if field.init]
    hints, known = get_type_hints(chosen), [field.name for field in fields]
    for key in tree:
        if key not in known:
            near = closest_match(key, known)
            whose = kind or (_kinds(chosen)[0] if "kind" in known else "")
            what = f"unknown key `{key}`{f' of kind `{whose}`' if whose else ''}"
            keys = f"the keys here are {', '.join(known)}" if known else "there are no keys here"
            raise place.inside(key).error(what + (f": did you mean `{near}`?" if near else ""), next=keys)
    values = {key: _value(hints[key], value, place.inside(key)) for key, value in tree.items()}
    for field in fields:
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if field.name not in values and not has_default:
            raise place.inside(field.name).error(
                f"`{field.name}` is missing", next=f"give {_spoken(hints[field.name])}"
            )
    try:
        return (
            wrap_plugin_errors(f"the settings of `{kind}` are refused", lambda: chosen(**values), cls)
            if kind
            else chosen(**values)
        )
    except RecipeError as error:
        # Settings may say in `where` which of their own fields is at fault.
        raise (place.inside(error.location) if error.location else place).error(error.message, error.hint) from error


def _choice(choices: Sequence[Any], value: Any, place: _Place, *, or_outside: bool = False) -> Any:
    """The value, where it is one of the choices."""
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    near = (
        closest_match(value, [choice for choice in choices if isinstance(choice, str)])
        if isinstance(value, str)
        else ""
    )
    what = f"unknown choice {_shown(value)}" + (f": did you mean {_shown(near)}?" if near else "")
    own = ", or name a class of your own: package.module:Name" if or_outside else ""
    raise place.error(what, next=f"choose one of {', '.join(map(_shown, choices))}{own}")


def _value(hint: Any, value: Any, place: _Place) -> Any:
    """A TOML value as the type that a field asks for."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, UnionType):
        return _either([member for member in get_args(hint) if member is not NoneType], value, place)
    if dataclasses.is_dataclass(hint) and hint not in (Fraction, Quantity) and isinstance(value, dict):
        return _table((hint,), cast("Tree", value), place)
    if get_origin(hint) is Literal:
        return _choice(get_args(hint), value, place)
    if get_origin(hint) is tuple and isinstance(value, list):
        return _entries(get_args(hint), cast("list[Any]", value), place)
    if (get_origin(hint) or hint) in (dict, Mapping) and isinstance(value, dict):
        inner = get_args(hint)[1]
        return {key: _value(inner, entry, place.inside(key)) for key, entry in cast("Tree", value).items()}
    if hint in (Fraction, Quantity) and isinstance(value, str):
        try:
            return hint.parse(value)
        except RecipeError as error:
            raise place.error(error.message, error.hint) from error
    if hint is Quantity and type(value) in (int, float):
        raise place.error(f"`{value}` needs a unit: {UNIT_EXAMPLES}", next=f'write it in quotes, as in "{value} steps"')
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) in (int, float) and not math.isnan(value):
        return float(value)
    if type(value) is hint and hint in (bool, int, str):
        return value
    raise place.error(f"{_shown(value)} is not {_spoken(hint)}", next=f"write {_spoken(hint)}")


def _either(members: Sequence[Any], value: Any, place: _Place) -> Any:
    """A value as the member of a union that it is meant as."""
    tables = [member for member in members if dataclasses.is_dataclass(member) and member not in (Fraction, Quantity)]
    if isinstance(value, dict) and tables:
        return _table(tables, cast("Tree", value), place)
    plain = [member for member in members if member not in tables]
    if Fraction in plain and Quantity in plain and isinstance(value, str):
        plain.remove(Quantity if value.rstrip().endswith("%") else Fraction)
    refused: list[RecipeError] = []
    for member in plain:
        try:
            return _value(member, value, place)
        except RecipeError as error:
            refused.append(error)
    if len(refused) == 1:
        raise refused[0]
    wanted = " or ".join(map(_spoken, members))
    raise place.error(f"{_shown(value)} is not {wanted}", next=refused[-1].hint if refused else f"write {wanted}")


def _entries(hints: tuple[Any, ...], value: list[Any], place: _Place) -> tuple[Any, ...]:
    """A TOML list as a tuple."""
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = (hints[0],) * len(value)
    if len(hints) != len(value):
        raise place.error(f"a list of {len(value)} where {len(hints)} belong", next=f"write {len(hints)} entries")
    pairs = zip(hints, value, strict=True)
    return tuple(_value(hint, entry, place.inside(index)) for index, (hint, entry) in enumerate(pairs))


def dump_config(settings: object) -> str:
    """TOML text of every value, defaults filled in: `build(type(x), tomllib.loads(dump(x)), "")` equals x."""
    return tomli_w.dumps(cast("Tree", _written(settings)))


def _written(value: Any) -> Any:
    """A settings value as TOML holds it; a field that is None is left out, so None must be its default."""
    if isinstance(value, Fraction | Quantity | Path):
        return str(value)
    if isinstance(value, PluginConfig):
        return {"kind": value.kind, **_written(value.settings)}
    if dataclasses.is_dataclass(value):
        held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return {name: _written(entry) for name, entry in held.items() if entry is not None}
    if isinstance(value, Mapping):
        return {key: _written(entry) for key, entry in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, tuple | list):
        return [_written(entry) for entry in cast("Sequence[Any]", value)]
    assert isinstance(value, bool | int | float | str), f"a recipe can't hold {value!r}"
    return value
