"""Reads Hugging Face datasets, from the Hub or from directories that `save_to_disk` wrote.

Without a network, errors appear within seconds. The library `datasets` takes a second to import, so it is imported on
first use.
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
    """The parts of dataset:NAME[#CONFIG][@SPLIT]."""

    name: str
    config: str | None
    split: str | None


def parse(text: str) -> Name:
    """Parse `dataset:NAME[#CONFIG][@SPLIT]`.

    Raises:
        TextError: the name, configuration or split is empty.
    """
    rest, at, split = text.removeprefix(PREFIX).partition("@")
    name, hash_, config = rest.partition("#")
    if not name or (at and not split) or (hash_ and not config):
        raise TextError(
            "invalid dataset: the name, configuration or split is empty",
            location=text,
            hint="write dataset:NAME, dataset:NAME@SPLIT or dataset:NAME#CONFIG@SPLIT",
        )
    return Name(name, config or None, split or None)


def is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote this directory."""
    saved = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return saved or (folder / "dataset_dict.json").is_file()


@functools.lru_cache(maxsize=8)
def open_dataset(text: str) -> Any:
    """Return the `datasets.Dataset` of dataset:NAME[#CONFIG][@SPLIT], where NAME is an id or a directory.

    Raises:
        TextError: the dataset doesn't exist or can't be read, or the Hub can't be reached.
    """
    wanted = parse(text)
    folder = Path(wanted.name)
    dataset = _load_saved(folder) if is_saved(folder) else _load_from_hub(text, wanted)
    if not hasattr(dataset, "column_names") or isinstance(dataset, dict):  # several splits
        names = list(dataset)
        split = wanted.split or (_DEFAULT_SPLIT if _DEFAULT_SPLIT in names else names[0] if len(names) == 1 else "")
        if split not in names:
            raise TextError(
                f"there is no split `{split}`" if split else "the dataset has several splits and none is named train",
                location=text,
                hint=f"choose one: {', '.join(f'{PREFIX}{wanted.name}@{name}' for name in names)}",
            )
        dataset = dataset[split]
    elif wanted.split and is_saved(folder):
        raise TextError("this dataset has no splits", location=text, hint=f"remove @{wanted.split}")
    return dataset


def _load_saved(folder: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # damaged files raise whatever Arrow, JSON and the library raise
        message = f"can't read this dataset: {_first_line(error)}"
        raise TextError(message, location=str(folder), hint="write it again with save_to_disk") from error


def _load_from_hub(text: str, wanted: Name) -> Any:
    import datasets

    if wanted.name.startswith((".", "/", "~")) or wanted.name.count("/") > 1 or "\\" in wanted.name:
        message = "not a directory of save_to_disk" if os.path.isdir(wanted.name) else "no such directory"
        raise TextError(message, location=text, hint="name text files or their directory: unmask pretrain FOLDER")
    with _without_retries() as why_offline:
        try:
            return datasets.load_dataset(wanted.name, wanted.config, split=wanted.split or _DEFAULT_SPLIT)
        except Exception as error:  # the library raises whatever its readers and the network raise
            alternative = (
                "download it on a machine with a network, copy it (datasets.load_dataset(...).save_to_disk(FOLDER)) "
                "and run unmask pretrain FOLDER, or name text files"
            )
            if why_offline:
                message = f"dataset `{wanted.name}` is not in the local cache, and the Hub can't be reached"
                raise TextError(f"{message} ({why_offline})", location=text, hint=alternative) from error
            message = f"can't read dataset `{wanted.name}`: {_first_line(error)}"
            hint = "check its id, #CONFIG and @SPLIT on its page, or " + alternative
            raise TextError(message, location=text, hint=hint) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _without_retries() -> Generator[str]:
    """Probe the Hub once; without an answer, read only the local cache instead of retrying for minutes.

    Yields the reason why the Hub can't be reached, or an empty text. The library reads HF_HUB_OFFLINE on
    import, so its copies of the variable are set here and restored.
    """
    import datasets.config
    import huggingface_hub.constants

    libraries: list[Any] = [datasets.config, huggingface_hub.constants]
    before = [library.HF_HUB_OFFLINE for library in libraries]
    why = "HF_HUB_OFFLINE is set" if any(before) else _unreachable()
    try:
        for library, previous in zip(libraries, before, strict=True):
            library.HF_HUB_OFFLINE = bool(why) or previous
        yield why
    finally:
        for library, previous in zip(libraries, before, strict=True):
            library.HF_HUB_OFFLINE = previous


def _unreachable() -> str:
    """Return the reason why the Hub can't be reached; empty if it can."""
    import huggingface_hub

    try:  # any answer is enough; the session uses proxies
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_REACH_SECONDS)
    except Exception as error:  # depends on the HTTP library that the client uses
        return _first_line(error)
    return ""


def column_of(text: str, field: str) -> Any:
    """Return the dataset as Arrow tables of one column.

    Raises:
        TextError: there is no such column, or it has no text type.
    """
    dataset = open_dataset(text)
    if field not in dataset.column_names:
        raise no_field(field, dataset.column_names, text, "column")
    schema = dataset.features.arrow_schema
    require_text_type(field, schema.field(field).type, schema, text)
    return dataset.with_format("arrow", columns=[field])


def dataset_rows(text: str, field: str, errors: ErrorsRule, first: int, last: int) -> Rows:
    """Yield the column of the rows [first, last).

    Raises:
        TextError: a row has no text; under "skip", only if the dataset can't be read.
    """
    column = column_of(text, field)
    for row in range(first, last, _BATCH_ROWS):
        values = column[row : min(last, row + _BATCH_ROWS)][field]
        yield from texts_of(values, row, text, field, errors)


def dataset_files(text: str) -> list[Path]:
    """Return the Arrow files that a dataset is mapped from; empty if it is in memory."""
    return [Path(entry["filename"]) for entry in open_dataset(text).cache_files]


def column_digest(text: str, field: str) -> str:
    """Return a digest of the column's content, which does not depend on how the dataset was saved."""
    column = column_of(text, field)
    state, lengths = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    for row in range(0, len(column), _BATCH_ROWS):
        import pyarrow as pa

        values = column[row : row + _BATCH_ROWS][field].cast(pa.large_binary()).to_pylist()
        lengths.update(",".join(str(-1 if value is None else len(value)) for value in values).encode() + b",")
        state.update(b"".join(value for value in values if value))
    return lengths.hexdigest() + state.hexdigest()
