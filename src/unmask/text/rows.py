"""Room card: the text of each row of a table; here, of a .jsonl file.

Comes in: a file, the name of its field. Goes out: the text of each row, None for a row that was left out; or a
TextError that names the file, the line and the mend; and what all tables say alike. Called by: sources, separated,
arrow, datasets.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from unmask.errors import TextError
from unmask.text.settings import ErrorsRule
from unmask.text.streams import line_number, lines

SKIP: Final = "or leave such rows out: --errors skip"
_NAMES_SHOWN: Final = 20

Rows = Iterator[str | None]
Where = Callable[[], str]


def json_rows(path: Path, field: str, errors: ErrorsRule, first: int = 0, last: int | None = None) -> Rows:
    """The field of each line of a .jsonl file's bytes [first, last), which are whole lines.

    Raises:
        TextError: a line is not JSON or lacks the field; by "skip", only what can't be read at all.
    """
    decode = json.JSONDecoder().decode
    for number, line in enumerate(lines(path, first, last)):
        try:
            value = decode(line.decode())
            text = value[field]
            if type(text) is str and b"\\u" not in line:  # what follows is for the rest: it costs a third of the time
                yield text
                continue
        except (ValueError, TypeError, KeyError, RecursionError):
            if line.isspace():
                continue
        where = partial(_line_of, path, first, number)
        yield or_none(partial(_json_text, line, field, errors, path, where), errors)


def _line_of(path: Path, first: int, number: int) -> str:
    return f"{path}, line {line_number(path, first) + number:,}"


def or_none(read: Callable[[], str], errors: ErrorsRule) -> str | None:
    """What is read; by "skip", None in the place of a TextError."""
    if errors != "skip":
        return read()
    try:
        return read()
    except TextError:
        return None


def _json_text(line: bytes, field: str, errors: ErrorsRule, path: Path, where: Where) -> str:
    try:
        value = json.loads(line.decode("utf-8", "replace" if errors == "replace" else "strict"))
    except UnicodeDecodeError as error:
        what = f"not UTF-8: {error.reason} at byte {error.start:,} of this line (0x{line[error.start]:02x})"
        mend = "save it as UTF-8, as with iconv -f CP1252 -t UTF-8; or let such bytes become U+FFFD: --errors replace; "
        raise TextError(what, where=where(), next=mend + SKIP) from error
    except (ValueError, RecursionError) as error:
        what = f"this line is not JSON: {str(error) or 'it is nested too deep'}"
        raise TextError(what, where=where(), next="repair it, " + SKIP) from error
    if not isinstance(value, dict):
        what = f"this line holds {_kind(value)}, not an object with fields"
        raise TextError(what, where=where(), next=f'give each line the form {{"{field}": "..."}}, ' + SKIP)
    found: Any = value
    for name in [field] if field in value else field.split("."):
        if not isinstance(found, dict) or name not in found:
            raise no_field(field, list(value), where(), "field", may_skip=True)
        found = found[name]
    return text_of(found, field, errors, where)


def _kind(value: object) -> str:
    """What JSON calls a value."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    named: tuple[tuple[type, str], ...] = ((str, "a string"), (list, "a list"), (dict, "an object"))
    return next((name for kind, name in named if isinstance(value, kind)), f"a {type(value).__name__}")


def text_of(value: object, field: str, errors: ErrorsRule, where: Where) -> str:
    """What a row holds, where it is text.

    Raises:
        TextError: it is none: null, a number, bytes that are not UTF-8, half of a surrogate pair.
    """
    rule = "replace" if errors == "replace" else "strict"
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8", rule)
        if isinstance(value, str):
            if rule == "strict":
                value.encode()
                return value
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    except UnicodeError as error:
        raise TextError(
            f"`{field}` holds what is no character: {error}",
            where=where(),
            next="repair it, let it become U+FFFD (--errors replace), " + SKIP,
        ) from error
    raise TextError(f"`{field}` holds {_kind(value)}, no text", where=where(), next="repair it, " + SKIP)


def no_field(field: str, names: Sequence[str], where: str, what: str, *, may_skip: bool = False) -> TextError:
    """The refusal of a field or column that isn't there; those that are, are named."""
    near = difflib.get_close_matches(field, names, n=1, cutoff=0.6)
    shown = ", ".join(f"`{name}`" for name in names[:_NAMES_SHOWN]) or "none"
    further = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    hint = f": did you mean `{near[0]}`?" if near else ""
    return TextError(
        f"there is no {what} `{field}`{hint}",
        where=where,
        next=f"choose one with --field (those that exist: {shown}{further})" + (f", {SKIP}" if may_skip else ""),
    )
