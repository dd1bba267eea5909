"""Room card: write whole or not at all.

Comes in: paths and what should stand there. Goes out: files and folders that are complete whenever they can be seen,
digests, and readers that notice a flipped bit. Called by: shards, bundle, checkpoint, pretrain.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from unmask.core.errors import DamagedError, StoreError

_CHUNK_BYTES = 1 << 22
_LONGEST_NAME_BYTES = 1 << 10
DIGESTS = "digests.json"


def digest(*parts: bytes | str) -> str:
    """A 128-bit hexadecimal digest of the parts, each set off from the next by its length."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def file_digest(path: Path) -> str:
    """The 128-bit digest of a file's bytes, read in pieces."""
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def _sync(path: Path) -> None:
    """Force a file or folder to the disk; folders can't be synced on every system, and there it does nothing."""
    # Windows syncs only what was opened for writing; a folder can be opened for reading alone, and there not even that.
    try:
        handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():
            raise
    finally:
        os.close(handle)


@contextmanager
def wrap_os_errors(path: Path) -> Generator[None]:
    """Turn the system's refusal to write into a message that names the place and the mend."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system said, a full disk for one
        reason = getattr(error, "strerror", None) or str(error).removeprefix("Error while serializing: ")
        raise StoreError(
            f"can't write here: {reason}",
            location=str(getattr(error, "filename", None) or path),
            hint="choose another place (--out), make room on the disk, or give yourself the right to write there",
        ) from error


def check_writable(folder: Path) -> None:
    """Refuse a place that can't be written before any work is done; what the check makes it takes away again.

    Raises:
        StoreError: a folder of this name can't be made, or nothing can be written in it.
    """
    made: list[Path] = []
    try:
        with wrap_os_errors(folder):
            for place in [*reversed(folder.parents), folder]:
                if not os.path.lexists(place):
                    place.mkdir()
                    made.append(place)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
    finally:
        for place in reversed(made):
            place.rmdir()


def write_text(path: Path, text: str) -> None:
    """Replace a small file by another, whole: written aside, synced, renamed."""
    with wrap_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.write_text(text, encoding="utf-8")
            _sync(aside)
            os.replace(aside, path)
        except BaseException:  # what a full disk took of it would lie about for ever
            aside.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def write_json(path: Path, value: object) -> None:
    """`write_text` of a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file's value.

    Raises:
        DamagedError: it is missing, cut short or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        what = f"this file can't be read: {error.strerror or error}"
        raise DamagedError(what, location=str(path), hint=_REPLACE_IT) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedError(f"not readable as JSON: {error}", location=str(path), hint=_REPLACE_IT) from error


_REPLACE_IT = "restore this file from a copy, or remove the folder it is in and make it anew"


@contextmanager
def atomic_directory(path: Path) -> Generator[Path]:
    """A folder to fill that appears under its name only when the block ends well; one that stood there is replaced.

    A kill at any moment leaves either the old folder or the new one under the name. What a kill left aside is removed
    by the next call for the same name.
    """
    with wrap_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        old = set_aside(path)
        for leftover in path.parent.glob(f".{path.name}.aside-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        aside = path.parent / f".{path.name}.aside-{os.getpid()}"
        aside.mkdir()
        try:
            yield aside
            for file in sorted(aside.rglob("*")):
                _sync(file)
            _sync(aside)
            if path.exists():  # os.rename onto a folder that is not empty fails
                os.rename(path, old)
            os.rename(aside, path)
            _sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            if old.exists() and not path.exists():
                os.rename(old, path)
            shutil.rmtree(aside, ignore_errors=True)
            raise


def set_aside(path: Path) -> Path:
    """Where `atomic_directory` puts the folder that it is about to replace, for the moment between its two renames."""
    return path.parent / f".{path.name}.aside-old"


def recover(path: Path) -> None:
    """Put back a folder that a kill between the two renames of `atomic_directory` left aside."""
    if set_aside(path).exists() and not path.exists():
        os.rename(set_aside(path), path)


def write_pointer(link: Path, target: str) -> bool:
    """Make `link` name `target` (relative to the link's folder), replacing what it named before in one step.

    Returns:
        Whether it is a symbolic link. Where none can be made (a file system or an account without them; Windows, where
        none can be replaced in one step) it is a small file with the name in it; `pointed` reads both.
    """
    with wrap_os_errors(link):
        aside = link.with_name(f".{link.name}.{os.getpid()}")
        aside.unlink(missing_ok=True)
        linked = os.name != "nt"
        if linked:
            try:
                aside.symlink_to(target)
            except (OSError, NotImplementedError):
                linked = False
        if linked:
            os.replace(aside, link)
            _sync(link.parent)
        else:
            write_text(link, target + "\n")
    return linked


def read_pointer(link: Path) -> Path | None:
    """What `point` made `link` name, whether or not it exists; None where this is neither a link nor such a file."""
    if link.is_symlink():
        return link.parent / link.readlink()
    if link.is_file() and link.stat().st_size <= _LONGEST_NAME_BYTES:
        name = link.read_text(encoding="utf-8", errors="replace").strip()
        if name and Path(name).name == name:
            return link.parent / name
    return None


def write_manifest(folder: Path) -> None:
    """Write down size and digest of the files of a folder, so that `verify_manifest` can find damage later.

    Folders inside have seals of their own: a step folder without its resume/ is still a whole model.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != DIGESTS)
    entries = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "digest": file_digest(file)}
        for file in files
    }
    write_json(folder / DIGESTS, entries)


def verify_manifest(folder: Path) -> None:
    """Compare a sealed folder with what was written down.

    Raises:
        DamagedError: a file is missing, cut short or changed; it is named.
    """
    entries: Mapping[str, Mapping[str, Any]] = read_json(folder / DIGESTS)
    if not all(set(entry) == {"bytes", "digest"} for entry in entries.values()):
        raise DamagedError("not the seal that was written", location=str(folder / DIGESTS), hint=_REPLACE_IT)
    for name, entry in entries.items():
        file = folder / name
        if not file.is_file():
            raise DamagedError("a file of this folder is missing", location=str(file), hint=_REPLACE_IT)
        if file.stat().st_size != entry["bytes"]:
            raise DamagedError(
                f"this file holds {file.stat().st_size:,} bytes where {entry['bytes']:,} were written",
                location=str(file),
                hint=_REPLACE_IT,
            )
        if file_digest(file) != entry["digest"]:
            raise DamagedError(
                "the bytes of this file have changed since writing", location=str(file), hint=_REPLACE_IT
            )


def default_cache() -> Path:
    """$UNMASK_CACHE, else $XDG_CACHE_HOME/unmask, else ~/.cache/unmask."""
    if own := os.environ.get("UNMASK_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unmask"
