"""Public functions: arguments of a wrong type are errors, and errors name keywords instead of command-line options."""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import numbers
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from unmask.core.errors import RecipeError, UnmaskError

P = ParamSpec("P")
R = TypeVar("R")

_HINTS = {
    "budget": 'give a number with its unit: budget="10 min", "200 steps", "2M tokens" or "3 epochs"',
    "pairs": 'give a path, or a list of pairs: [("The cat sits.", "The cat sit.")]',
    "max_size": 'give an amount with its unit: max_size="2M characters"',
    "model": 'load it: unmask.load("runs/notes")',
    "texts": "give paths of text files or folders, or the texts as strings",
    "settings": 'give a dictionary: settings={"train.keep_last": 3}',
    "valid": 'give a dictionary: valid={"news": "news.txt"}',
    "display": "leave it out, or pass None to show nothing",
}
_NAMES = {
    str: "a string", Path: "a path", int: "a whole number", float: "a number", bool: "True or False",
    Mapping: "a dictionary", Sequence: "a list", Iterable: "an iterable", Callable: "a function",
    types.NoneType: "None", dict: "a dictionary",
}  # fmt: skip


# Arguments ------------------------------------------------------------------------------------------------------------


def public(function: Callable[P, R], name: str) -> Callable[P, R]:
    """Return the function `unmask.NAME`, which checks the types of its arguments and raises errors that name keywords.

    Keywords that are declared as Unpack[TypedDict] are shown as parameters by `help` and by notebooks.
    """
    parameters, hints = _parameters(function)
    positional = [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for keyword, value in (*zip(positional, args, strict=False), *kwargs.items()):
            _check(name, keyword, value, hints)
        try:
            return function(*args, **kwargs)
        except UnmaskError as error:
            raise in_keywords(error).with_traceback(error.__traceback__) from error.__cause__

    checked.__signature__ = inspect.signature(function).replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
    return checked


def _parameters(function: Callable[..., Any]) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """Return the parameters of a function, with those of an Unpack[TypedDict], and their types."""
    hints = get_type_hints(function)
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        table = next(iter(get_args(hints.get(parameter.name))), None)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and is_typeddict(table):
            options = get_type_hints(table)
            del hints[parameter.name]
            hints.update(options)
            for name, kind in options.items():
                keyword = inspect.Parameter.KEYWORD_ONLY
                parameters.append(inspect.Parameter(name, keyword, default=_default(name, kind), annotation=kind))
        else:
            parameters.append(parameter)
    hints.pop("return", None)
    return parameters, hints


def _default(name: str, kind: Any) -> Any:
    return False if kind is bool else "auto" if name == "display" else None


def _check(function: str, name: str, value: Any, hints: Mapping[str, Any]) -> None:
    location = f"unmask.{function}"
    if name not in hints:
        close = difflib.get_close_matches(name, hints, 1)
        hint = f"did you mean `{close[0]}`?" if close else f"use one of: {', '.join(hints)}"
        raise RecipeError(f"unknown keyword `{name}`", location=location, hint=hint)
    if not _fits(value, hints[name]):
        expected = " or ".join(dict.fromkeys(_describe(hints[name])))
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
        raise RecipeError(
            f"invalid {name}: got {shown} ({type(value).__name__}), expected {expected}",
            location=location,
            hint=_HINTS.get(name, f"pass {name} as {expected}"),
        )


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value has a type. Elements are checked in lists and dictionaries, which aren't consumed."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if kind in (int, float):
        return not isinstance(value, bool) and isinstance(value, numbers.Integral if kind is int else numbers.Real)
    base = origin or kind
    if base is Any or not isinstance(base, type):
        return True
    if base in (Sequence, Iterable) and isinstance(value, str | bytes | Mapping):
        return False  # its elements would be letters, numbers or keys
    if not isinstance(value, base):
        return False
    if base is Mapping and inner:
        entries = cast("Mapping[Any, Any]", value)
        return all(_fits(key, inner[0]) and _fits(entry, inner[1]) for key, entry in entries.items())
    if inner and isinstance(value, list | tuple):
        return all(_fits(entry, inner[0]) for entry in cast("Sequence[Any]", value))
    return True


def _describe(kind: Any) -> list[str]:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return [name for one in inner for name in _describe(one)]
    if origin is Literal:
        return [repr(one) for one in inner]
    base = origin or kind
    name = _NAMES.get(base) or f"a {getattr(base, '__name__', base)}"
    element = inner[0] if inner and base in (Sequence, Iterable) else None
    if element is None:
        return [name]
    return [f"{name} of {'strings' if str in (element, *get_args(element)) else 'values'}"]


# Settings -------------------------------------------------------------------------------------------------------------


def setting_texts(settings: Mapping[str, Any] | Sequence[str] | None) -> list[str]:
    """Return settings as `key=value` texts. A dictionary may have dotted keys, tables inside tables, or both.

    Raises:
        RecipeError: a value has no counterpart in TOML.
    """
    if settings is None:
        return []
    if isinstance(settings, Mapping):
        return [f"{key}={_toml(value, key)}" for key, value in _leaves(settings)]
    return list(settings)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(cast("Mapping[str, Any]", value), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _toml(value: Any, key: str) -> str:
    if hasattr(value, "item") and not isinstance(value, str):  # a number of numpy or torch
        value = value.item()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        entries = cast("Mapping[str, Any]", value).items()
        return "{" + ", ".join(f"{json.dumps(name)} = {_toml(entry, key)}" for name, entry in entries) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(entry, key) for entry in cast("Sequence[Any]", value)) + "]"
    if value is None or isinstance(value, bytes) or callable(value):
        raise RecipeError(
            f"invalid value of `{key}`: got {value!r} ({type(value).__name__})",
            location="settings",
            hint="leave the key out, or give a number, a string, a list or a dictionary",
        )
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


# Errors ---------------------------------------------------------------------------------------------------------------

_SWITCHES = {
    "force", "unverified", "verify", "dry_run", "allow_different_environment", "allow_unknown", "strict", "int8",
}  # fmt: skip
_RENAMED = {"set": "settings", "from": "start", "text": "texts"}
# A word after an option is its value if it is in capitals, quoted, a number or one of these.
_WORDS = "strict|replace|skip|blank-line|line|file|resume|new|encoder|hf|onnx"
_VALUE = rf"""(?P<value>"[^"]*"|[A-Z][A-Z_]*\b|\d[\w./]*|(?:{_WORDS})\b)"""
_OPTION = re.compile(rf"(?<![\w-])--(?P<name>[a-z][a-z-]*[a-z0-9])(?:[ =]{_VALUE})?(?:\s\((?P<python>\w+=True)\))?")
_SET = re.compile(r"""(?<![\w-])--set (?P<key>[a-z_][\w.]*)=(?P<value>[^"'\s,;()]*[^"'\s,;().])""")
_SET_QUOTED = re.compile(r"""(?<![\w-])--set (?P<quote>["'])(?P<key>[a-z_][\w.]*)=(?P<value>[^"']+)(?P=quote)""")
_VALID = re.compile(r"(?<![\w-])--valid (?P<name>[\w-]+)=(?P<text>[\w./-]+)")
_RECIPE = re.compile(r"(?<![\w-])--(?P<name>recipe|role) (?P<value>[\w-]+)")
_RESUME = re.compile(r"""unmask pretrain --resume (?P<run>'[^']*'|[^\s;,()]+)(?: --budget (?P<budget>"[^"]*"))?""")


def in_keywords(error: UnmaskError) -> UnmaskError:
    """Return an error whose message, location and hint name the keywords of Python instead of options."""
    return type(error)(
        python_words(error.message),
        location=_python_location(error.location),
        hint=python_words(error.hint),
    )


def python_words(text: str) -> str:
    """Return a text with keywords in place of the options of the command line: `force=True` for `--force`."""
    text = _RESUME.sub(_resume_call, text)
    for pattern in (_SET_QUOTED, _SET):
        text = pattern.sub(lambda match: f'settings={{"{match["key"]}": {_literal(match["value"])}}}', text)
    text = _VALID.sub(lambda match: f'valid={{"{match["name"]}": "{match["text"]}"}}', text)
    text = _RECIPE.sub(lambda match: f'{match["name"]}="{match["value"]}"', text)
    return _OPTION.sub(_keyword, text)


def _python_location(location: str) -> str:
    """Return a location; an option there is followed by its whole value, as the user wrote it."""
    match = re.fullmatch(r"--([a-z-]+) (.+?)(: [a-z_][\w.]*)?", location, re.DOTALL)  # the key follows the value
    if match is None:
        return python_words(location)
    name = match[1].replace("-", "_")
    value = match[2].strip('"')
    if name == "set":
        key, _, right = value.partition("=")
        return f'settings={{"{key}": {_literal(right)}}}{match[3] or ""}'
    shown = json.dumps(value, ensure_ascii=False) if name in _HINTS else _literal(value)
    return f"{_RENAMED.get(name, name)}={shown}{match[3] or ''}"


def _resume_call(match: re.Match[str]) -> str:
    run = match["run"].strip("'")
    return f'unmask.resume("{run}", budget={match["budget"]})' if match["budget"] else f'unmask.resume("{run}")'


def _keyword(match: re.Match[str]) -> str:
    name = match["name"].replace("-", "_")
    if name in _SWITCHES:
        return f"{name}=True"
    name = _RENAMED.get(name, name)
    value = match["value"]
    if value is None:
        return name
    return f"{name}={value if value.isupper() or value.startswith(chr(34)) else _literal(value)}"


def _literal(text: str) -> str:
    """Return a value of the command line as Python writes it."""
    text = text.strip().strip('"')
    if text in ("true", "false"):
        return text.capitalize()
    if re.fullmatch(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", text) or text == "[...]":
        return text
    return f'"{text}"'
