"""The meaning of recipe keys, read from the comments at the fields of the config classes.

A comment stands above its field, behind it, or both. `[unit]` at its beginning names the unit: `# [tokens] Window.`
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, cast, get_args, get_origin, get_type_hints

import tomli_w

from unmask.core.config import dump_config, to_toml
from unmask.core.plugins import PluginConfig
from unmask.core.quantities import Fraction, Quantity

_FIELD: Final = re.compile(r" {4}(\w+): .*?(?:  # (?:(?:fmt|type|noqa|pyright|pragma)\b.*|(.*)))?")
_TYPES: Final[Mapping[Any, str]] = {
    bool: "boolean", int: "integer", float: "number", str: "string", Path: "path", Fraction: "percentage",
    Quantity: "quantity",
}  # fmt: skip
_UNIT: Final = re.compile(r"\[([^\]]+)\] (.*)")
_WIDTH: Final = 100  # columns of TOML with comments


@functools.cache
def meanings(config: type) -> Mapping[str, str]:
    """Return the comment at each field of a config class, inherited fields included; "" for a field without one."""
    found = dict.fromkeys((field.name for field in dataclasses.fields(config) if field.init), "")
    for cls in reversed(config.__mro__):
        try:
            lines = textwrap.dedent(inspect.getsource(cls)).splitlines() if dataclasses.is_dataclass(cls) else []
        except (OSError, TypeError):  # a class without a source file
            lines = []
        above = list[str]()
        for line in lines:
            if line.startswith("    # "):
                above.append(line[6:])
                continue
            match = _FIELD.fullmatch(line)
            if match and match[1] in found and match[1] in inspect.get_annotations(cls):
                found[match[1]] = " ".join(filter(None, [*above, match[2]]))
            above.clear()
    return found


# TOML with comments ---------------------------------------------------------------------------------------------------


def dump_commented(config: object) -> str:
    """Return a config as `dump_config` does, with the meaning of each key as a comment."""
    comments, lines, section = dict(_comments(config)), list[str](), ""
    for line in dump_config(config).splitlines():
        header = re.fullmatch(r"\[\[?([^\[\]]+)\]\]?", line)
        section = header[1] if header else section
        key = "" if header else line.partition(" = ")[0]
        comment = comments.get(section if header else f"{section}.{key}".lstrip("."), "")
        if comment and not header and not line.endswith(("[", "{")) and len(f"{line}  # {comment}") <= _WIDTH:
            lines.append(f"{line}  # {comment}")
            continue
        if comment:
            for paragraph in comment.split("\n"):
                lines += textwrap.wrap(paragraph, _WIDTH, initial_indent="# ", subsequent_indent="# ")
        lines.append(line)
    return "\n".join(lines) + "\n"


def _comments(config: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the meaning of each value of a config, and those of its sections."""
    if name:
        yield name, " ".join((type(config).__doc__ or "").partition("\n\n")[0].split())
    for key, meaning in meanings(type(config)).items():
        value, inside = getattr(config, key), f"{name}.{key}" if name else key
        if isinstance(value, tuple):  # tables in a list stand on one line each, so their keys are described above it
            kinds = dict.fromkeys(type(entry) for entry in cast("tuple[Any, ...]", value) if _is_table(type(entry)))
            keys = [f"{name}: {text}" for kind in kinds for name, text in meanings(kind).items() if text]
            yield inside, "\n".join([meaning, *keys])
        elif _is_table(type(value)):
            yield from _comments(value.settings if isinstance(value, PluginConfig) else value, inside)
        else:
            yield inside, meaning


# The page -------------------------------------------------------------------------------------------------------------


def reference(config: type) -> str:
    """Return a Markdown page with all keys of a config class and of those inside it."""
    sections: dict[type, tuple[str, str]] = {}
    for name, cls, of in _sections(config):
        sections.setdefault(cls, (name, of))  # a class with several places is described at the first
    return "\n".join(line for cls, (name, of) in sections.items() for line in _section(name, cls, of))


def _sections(config: type, name: str = "", of: str = "") -> Iterator[tuple[str, type, str]]:
    """Yield the name and class of each table, and "list" for the tables of a list."""
    yield name, config, of
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        inside = f"{name}.{field.name}" if name else field.name
        for member in _members(hints[field.name]):
            is_list = get_origin(member) is tuple
            for table in _members(get_args(member)[0]) if is_list else [member]:
                if _is_table(table) and not issubclass(table, PluginConfig):
                    yield from _sections(table, inside, "list" if is_list else "")


def _members(hint: Any) -> list[Any]:
    """Return the members of a union, or the type itself."""
    if get_origin(hint) in (Union, UnionType):
        return [inner for member in get_args(hint) if member is not NoneType for inner in _members(member)]
    return [hint]


def _is_table(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) and hint not in _TYPES


def _section(name: str, config: type, of: str) -> Iterator[str]:
    hints = get_type_hints(config)
    kind = f' with `kind = "{get_args(hints["kind"])[0]}"`' if len(get_args(hints.get("kind"))) == 1 else ""
    heading = f"`[[{name}]]`" if of else f"`[{name}]`"
    yield from (f"## {heading if name else 'Top of the file'}{kind}", "", inspect.cleandoc(config.__doc__ or ""), "")
    yield from ("| key | type | default | unit | meaning |", "| --- | --- | --- | --- | --- |")
    for field in dataclasses.fields(config):
        if field.init:
            match = _UNIT.fullmatch(meanings(config)[field.name])
            unit, meaning = (match[1], match[2]) if match else ("", meanings(config)[field.name])
            cells = [f"`{field.name}`", _type_text(hints[field.name]), _default(field), unit, meaning]
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _type_text(hint: Any) -> str:
    """Return the type of a key, with the allowed values."""
    names = list[str]()
    for member in _members(hint):
        if get_origin(member) is Literal:
            names += [f"`{_toml_text(choice)}`" for choice in get_args(member)]
        elif get_origin(member) is tuple:
            entry = _type_text(get_args(member)[0])
            plural = f"{entry[:-1]}ies" if entry.endswith("y") else f"{entry}s"
            names.append(f"list of {plural if entry.isalpha() else entry}")
        elif isinstance(member, type) and issubclass(member, PluginConfig):
            names.append("a plugin")
        else:
            names.append(_TYPES.get(member, "table"))
    names = list(dict.fromkeys(names))
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _default(field: dataclasses.Field[Any]) -> str:
    """Return the default of a key as TOML; that of a table stands in its own section."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return "required"
    if value is None:
        return "none"
    value = to_toml(value)
    if isinstance(value, dict):
        kind = cast("dict[str, Any]", value).get("kind")
        return f"`kind = {_toml_text(kind)}`" if kind else "its defaults" if value else "`{}`"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "one, with its defaults"
    return f"`{_toml_text(value)}`"


def _toml_text(value: Any) -> str:
    """Return a value as TOML on one line."""
    text = tomli_w.dumps({"x": value}).partition("= ")[2]
    return re.sub(r",\]$", "]", re.sub(r"\s*\n\s*", " ", text).strip()).replace("[ ", "[").replace(", ]", "]")
