"""Room card: rows of the ecosystem's data sets.

Comes in: the id of a data set, or a folder that `save_to_disk` made, the name of its column. Goes out: the text of each
row, None for a row that was left out; a digest of the column; or a TextError, fast where the hub can't be reached.
Called by: sources, listing.

The library `datasets` takes a second to import, so it is imported only where a data set is asked for.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from unmask.core.errors import TextError
from unmask.data.readers.tables import Rows, no_field, require_text_type, texts_of
from unmask.data.settings import ErrorsRule

PREFIX: Final = "dataset:"
_REACH_SECONDS: Final = 5.0
_BATCH_ROWS: Final = 256
_DEFAULT_SPLIT: Final = "train"


class Name(NamedTuple):
    """dataset:NAME[#CONFIG][@SPLIT], taken apart."""

    name: str
    config: str | None
    split: str | None


def parse(text: str) -> Name:
    """Take `dataset:NAME[#CONFIG][@SPLIT]` apart.

    Raises:
        TextError: there is no name.
    """
    rest, at, split = text.removeprefix(PREFIX).partition("@")
    name, hash_, config = rest.partition("#")
    if not name or (at and not split) or (hash_ and not config):
        raise TextError(
            "the name of a data set is missing, or that of its configuration or split",
            location=text,
            hint="write dataset:NAME, dataset:NAME@SPLIT or dataset:NAME#CONFIG@SPLIT",
        )
    return Name(name, config or None, split or None)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` made this folder."""
    saved = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return saved or (folder / "dataset_dict.json").is_file()


@functools.lru_cache(maxsize=8)
def open_dataset(text: str) -> Any:
    """The `datasets.Dataset` of dataset:NAME[#CONFIG][@SPLIT], NAME being an id or a folder.

    Raises:
        TextError: there is none of that name, it can't be read, or the hub can't be reached.
    """
    wanted = parse(text)
    folder = Path(wanted.name)
    found = _saved(folder) if is_saved(folder) else _from_hub(text, wanted)
    if not hasattr(found, "column_names") or isinstance(found, dict):  # several splits
        names = list(found)
        split = wanted.split or (_DEFAULT_SPLIT if _DEFAULT_SPLIT in names else names[0] if len(names) == 1 else "")
        if split not in names:
            raise TextError(
                f"there is no split `{split}`" if split else "it has several splits, and none is called train",
                location=text,
                hint=f"choose one: {', '.join(f'{PREFIX}{wanted.name}@{name}' for name in names)}",
            )
        found = found[split]
    elif wanted.split and is_saved(folder):
        raise TextError("this data set has no splits", location=text, hint=f"leave out @{wanted.split}")
    return found


def _saved(folder: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # damaged files raise whatever Arrow, JSON and the library raise
        what = f"this data set can't be read: {_first_line(error)}"
        raise TextError(what, location=str(folder), hint="save it anew with save_to_disk") from error


def _from_hub(text: str, wanted: Name) -> Any:
    import datasets

    if wanted.name.startswith((".", "/", "~")) or wanted.name.count("/") > 1 or "\\" in wanted.name:
        what = "this folder is no data set that save_to_disk made" if os.path.isdir(wanted.name) else "there is none"
        raise TextError(what, location=text, hint="give the folder's files as they are: unmask pretrain FOLDER")
    with _without_waiting() as why_offline:
        try:
            return datasets.load_dataset(wanted.name, wanted.config, split=wanted.split or _DEFAULT_SPLIT)
        except Exception as error:  # the library raises whatever its readers and the network raise
            elsewhere = (
                "fetch it where there is a network and copy it here (datasets.load_dataset(...).save_to_disk(FOLDER), "
                "then unmask pretrain FOLDER), or give text files"
            )
            if why_offline:
                what = f"the data set `{wanted.name}` is not in the local cache, and the hub can't be reached"
                raise TextError(f"{what} ({why_offline})", location=text, hint=elsewhere) from error
            what = f"the data set `{wanted.name}` can't be read: {_first_line(error)}"
            mend = "check its id, and choose #CONFIG and @SPLIT as its page names them; or " + elsewhere
            raise TextError(what, location=text, hint=mend) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _without_waiting() -> Generator[str]:
    """Ask once whether the hub answers; where it doesn't, look only at what is here, instead of retrying for minutes.

    The library reads HF_HUB_OFFLINE when it is imported, so that what it read is set here for as long as it takes.
    """
    import datasets.config
    import huggingface_hub.constants

    libraries: list[Any] = [datasets.config, huggingface_hub.constants]
    before = [library.HF_HUB_OFFLINE for library in libraries]
    why = "HF_HUB_OFFLINE is set" if any(before) else _unreachable()
    try:
        for library, was in zip(libraries, before, strict=True):
            library.HF_HUB_OFFLINE = bool(why) or was
        yield why
    finally:
        for library, was in zip(libraries, before, strict=True):
            library.HF_HUB_OFFLINE = was


def _unreachable() -> str:
    """Why the hub can't be reached, or nothing where it can."""
    import huggingface_hub

    try:  # any answer will do; the session knows of proxies
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_REACH_SECONDS)
    except Exception as error:  # of whichever library the hub's client stands on
        return _first_line(error)
    return ""


def column_of(text: str, field: str) -> Any:
    """The data set as Arrow tables of this one column.

    Raises:
        TextError: there is no such column, or it holds no text.
    """
    found = open_dataset(text)
    if field not in found.column_names:
        raise no_field(field, found.column_names, text, "column")
    schema = found.features.arrow_schema
    require_text_type(field, schema.field(field).type, schema, text)
    return found.with_format("arrow", columns=[field])


def dataset_rows(text: str, field: str, errors: ErrorsRule, first: int, last: int) -> Rows:
    """The column of the rows [first, last).

    Raises:
        TextError: a row holds no text; by "skip", only what can't be read at all.
    """
    column = column_of(text, field)
    for row in range(first, last, _BATCH_ROWS):
        values = column[row : min(last, row + _BATCH_ROWS)][field]
        yield from texts_of(values, row, text, field, errors)


def column_digest(text: str, field: str) -> str:
    """A digest of the column's content, the same wherever and however often it was saved."""
    column = column_of(text, field)
    state, lengths = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    for row in range(0, len(column), _BATCH_ROWS):
        import pyarrow as pa

        values = column[row : row + _BATCH_ROWS][field].cast(pa.large_binary()).to_pylist()
        lengths.update(",".join(str(-1 if value is None else len(value)) for value in values).encode() + b",")
        state.update(b"".join(value for value in values if value))
    return lengths.hexdigest() + state.hexdigest()
