"""Atomic writes of files and directories, digests, manifests, and the cache directory.

A file or directory appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import stat
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

from safetensors import SafetensorError

from unmask.core.errors import DamagedError, ModelError, StoreError, UnmaskError

_CHUNK_BYTES = 1 << 22
_LONGEST_NAME = 200  # bytes; file systems allow 255, and a temporary name has a suffix
_MAX_NAME_BYTES = 255
# Largest files that are read into memory. Parsed JSON takes up to 30 times its size.
MAX_CONFIG_BYTES: Final = 1 << 24  # config.json; the largest on the Hugging Face Hub have 2 MB, with names of labels
MAX_TOKENIZER_BYTES: Final = 1 << 26  # tokenizer.json; 33 MB for 256,000 tokens
MAX_HEADER_BYTES: Final = 1 << 24  # of a safetensors file: names and shapes of 100,000 tensors
MAX_RECIPE_BYTES: Final = 1 << 24  # recipe.toml, with the words of a word list
MAX_MANIFEST_BYTES: Final = 1 << 24  # digests.json: 100,000 files
MAX_JSON_BYTES: Final = 1 << 28  # other JSON files; env.json has a line for each file of the text
MAX_LOG_BYTES: Final = 1 << 31  # log.jsonl: three million lines


class RunLayout:
    """Names of the files and directories of a run and of the checkpoints in it."""

    RECIPE: Final = "recipe.toml"
    ENVIRONMENT: Final = "env.json"
    TEXTS: Final = "texts.jsonl"  # the texts of a run that was given text in memory
    PAIRS: Final = "pairs.jsonl"  # the minimal pairs that the model is evaluated on during training
    LOG: Final = "log.jsonl"
    DISCARDED: Final = "discarded.jsonl"  # log lines after the step from which the run was resumed
    CRASH: Final = "crash.txt"
    LOCK: Final = "lock"
    LATEST: Final = "latest"  # a link to the last step directory
    BEST: Final = "best"
    KEPT: Final = "chck_"  # beginning of the names of models kept at a number of words, as BabyLM names them
    RUN_TOKENIZER: Final = "tokenizer"  # a copy of the tokenizer that the run was started with
    START: Final = "start"  # the model that the run was initialized from

    # In a checkpoint directory: the files of a model ...
    CONFIG: Final = "config.json"
    WEIGHTS: Final = "model.safetensors"
    TOKENIZER: Final = "tokenizer.json"
    CARD: Final = "card.json"
    OBJECTIVE: Final = "objective.safetensors"
    DIGESTS: Final = "digests.json"
    # ... and the directory with the state that a resumed run needs.
    RESUME: Final = "resume"

    README: Final = "README.md"  # the model card of an export
    PICKLED: Final = ".metadata"  # of a checkpoint of torch.distributed.checkpoint in its own format, which is refused


def digest(*parts: bytes | str) -> str:
    """Return a 128-bit hexadecimal digest of the parts; the length of each part is digested too."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def file_digest(path: Path) -> str:
    """Return the 128-bit digest of a file."""
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or directory to the disk; does nothing for directories on systems that don't support it."""
    # Windows syncs only files opened for writing, and directories can't be opened there at all.
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
    """Convert OSError into StoreError, with the path and a hint.

    Raises:
        StoreError: the block raised an OSError.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps errors of the system, such as a full disk
        reason = getattr(error, "strerror", None) or str(error).removeprefix("Error while serializing: ")
        raise StoreError(
            f"can't write: {reason}",
            location=str(getattr(error, "filename", None) or path),
            hint="choose another directory (--out), free disk space, or fix the permissions",
        ) from error


def check_writable(folder: Path) -> None:
    """Check that a directory can be created and written, and leave nothing behind.

    Raises:
        StoreError: the directory can't be created or written.
    """
    created: list[Path] = []
    try:
        with wrap_os_errors(folder):
            for place in [*reversed(folder.parents), folder]:
                if not os.path.lexists(place):
                    place.mkdir()
                    created.append(place)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
    finally:
        for place in reversed(created):
            place.rmdir()


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically: it is written under another name, synced and renamed."""
    with wrap_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(_hidden_name(path.name, str(os.getpid())))
        try:
            temporary.write_text(text, encoding="utf-8")
            _sync(temporary)
            os.replace(temporary, path)
        except BaseException:  # for example a full disk
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def _hidden_name(name: str, suffix: str) -> str:
    """Return the name of a temporary file beside a file; of a long name, a part and a digest."""
    data = os.fsencode(name)
    if len(data) > _LONGEST_NAME:
        name = f"{data[: _LONGEST_NAME // 2].decode('utf-8', 'ignore')}-{hashlib.sha256(data).hexdigest()[:16]}"
    return f".{name}.{suffix}"


def save_tensors(tensors: Mapping[str, Any], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors with the permissions of any new file; safetensors alone writes mode 0600."""
    # Imported here: it imports torch, which costs a second.
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    path.chmod(mode)


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_text(path: Path, max_bytes: int) -> str:
    """Return the content of a regular file in UTF-8; a byte order mark at its start is skipped.

    A device or a pipe under the name of a file would never end.

    Raises:
        DamagedError: the file can't be read, is larger than `max_bytes`, or is no regular file.
        UnicodeDecodeError: it is not UTF-8.
    """
    try:
        require_regular(path)
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        message = f"can't read this file: {error.strerror or error}"
        raise DamagedError(message, location=str(path), hint=_RESTORE) from error
    if len(data) > max_bytes:
        message = f"this file is too large: {path.stat().st_size:,} bytes, expected at most {max_bytes:,}"
        raise DamagedError(message, location=str(path), hint=_RESTORE)
    return data.decode("utf-8-sig")


def require_regular(path: Path) -> None:
    """Check that a path is a regular file, or a link to one.

    Raises:
        DamagedError: it is a device, a pipe or a folder.
        OSError: it doesn't exist.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise DamagedError(f"can't read this file: it is {kind}", location=str(path), hint=_RESTORE)


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file; a byte order mark at its start is skipped.

    Raises:
        DamagedError: the file is missing, too large, cut short or not JSON.
    """
    try:
        return json.loads(read_text(path, max_bytes))
    except UnmaskError:  # a ValueError too
        raise
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, or an integer of too many digits
        raise DamagedError(f"invalid JSON: {error}", location=str(path), hint=_RESTORE) from error


def check_tensor_header(path: Path) -> None:
    """Check the size of the header of a safetensors file before it is read.

    Raises:
        DamagedError: the file is no regular file, or claims a header of more than MAX_HEADER_BYTES.
    """
    try:
        require_regular(path)
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
    except OSError as error:
        message = f"can't read this file: {error.strerror or error}"
        raise DamagedError(message, location=str(path), hint=_RESTORE) from error
    if size > MAX_HEADER_BYTES:
        raise DamagedError(
            f"not a safetensors file, or damaged: its header would have {size:,} bytes, expected at most "
            f"{MAX_HEADER_BYTES:,}",
            location=str(path),
            hint=_RESTORE,
        )


def refuse_pickled(folder: Path) -> None:
    """Check that a directory is no checkpoint of `torch.distributed.checkpoint` in its own format.

    Raises:
        ModelError: it has the file `.metadata`, which is a pickle.
    """
    if (folder / RunLayout.PICKLED).is_file():
        raise pickled_error(str(folder / RunLayout.PICKLED))


def pickled_error(location: str) -> ModelError:
    """Return the error for a `.metadata` file."""
    return ModelError(
        f"a checkpoint of torch.distributed.checkpoint with {RunLayout.PICKLED} is not read: that file is a pickle, "
        "which runs code when it is opened",
        location=location,
        hint="if you trust its author, convert it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
        "FOLDER FILE; load FILE into a model of transformers, and import what its save_pretrained writes",
    )


def leaves(folder: Path, path: Path) -> bool:
    """Return whether a path in a folder is or goes through a symbolic link to a place outside of it.

    In the cache of the Hugging Face Hub, `snapshots/REVISION` has links to `blobs`, which belong to the same model.
    """
    real = folder.resolve()
    inside = [real, *([real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [])]
    return not any(path.resolve().is_relative_to(place) for place in inside)


_RESTORE = "restore the file from a backup, or delete its directory and create it again"


@contextmanager
def atomic_directory(path: Path) -> Generator[Path]:
    """Yield a directory to fill that gets its name only when the block succeeds; an existing one is replaced.

    A kill at any moment leaves the old or the new directory under the name. Leftovers are removed by the next call for
    the same name.
    """
    with wrap_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        old = set_aside(path)
        prefix = _hidden_name(path.name, "aside-")  # not a pattern: the name may have "*" or "["
        for leftover in [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]:
            if not _is_of_other_process(leftover.name.removeprefix(prefix)):
                shutil.rmtree(leftover, ignore_errors=True)
        temporary = path.parent / f"{prefix}{os.getpid()}"
        temporary.mkdir()
        try:
            yield temporary
            for file in sorted(temporary.rglob("*")):
                _sync(file)
            _sync(temporary)
            if path.exists():  # os.rename fails if the target is a directory with files
                os.rename(path, old)
            os.rename(temporary, path)
            _sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            if old.exists() and not path.exists():
                os.rename(old, path)
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _is_of_other_process(suffix: str) -> bool:
    """Return whether the suffix of a temporary directory is the number of another process that still runs."""
    if not suffix.isdecimal() or int(suffix) == os.getpid() or os.name == "nt":
        return False
    try:
        os.kill(int(suffix), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def set_aside(path: Path) -> Path:
    """Return the path of a replaced directory between the two renames of `atomic_directory`."""
    return path.parent / _hidden_name(path.name, "aside-old")


def recover(path: Path) -> None:
    """Restore a directory after a kill between the two renames of `atomic_directory`."""
    if set_aside(path).exists() and not path.exists():
        os.rename(set_aside(path), path)


def write_pointer(link: Path, target: str) -> bool:
    """Make `link` point to `target` (relative to the link's directory), atomically.

    Returns:
        Whether it is a symbolic link. On Windows, and where links can't be created, it is a small file that contains
        the name; `read_pointer` reads both.
    """
    with wrap_os_errors(link):
        temporary = link.with_name(_hidden_name(link.name, str(os.getpid())))
        temporary.unlink(missing_ok=True)
        is_link = os.name != "nt"
        if is_link:
            try:
                temporary.symlink_to(target)
            except (OSError, NotImplementedError):
                is_link = False
        if is_link:
            os.replace(temporary, link)
            _sync(link.parent)
        else:
            write_text(link, target + "\n")
    return is_link


def read_pointer(link: Path) -> Path | None:
    """Return the target of a pointer, which may not exist; None if this is neither a link nor a pointer file."""
    if link.is_symlink():
        return link.parent / link.readlink()
    if link.is_file() and link.stat().st_size <= _MAX_NAME_BYTES + len("\r\n"):
        name = link.read_text(encoding="utf-8", errors="replace").strip()
        if _is_plain_name(name):
            return link.parent / name
    return None


def _is_plain_name(name: str) -> bool:
    """Return whether a text is the name of a file or folder, without a path that leads elsewhere."""
    is_short = len(name.encode(errors="replace")) <= _MAX_NAME_BYTES
    return is_short and Path(name).name == name and name not in ("", "..") and "\0" not in name


def last_step(run: Path) -> int | None:
    """Return the step number that a run's `latest` points to, or None if it can't be read."""
    directory = read_pointer(run / RunLayout.LATEST)
    number = directory.name.removeprefix("step-") if directory else ""
    return int(number) if number.isdecimal() else None


def write_manifest(folder: Path) -> None:
    """Write sizes and digests of the files of a directory, for `verify_manifest`.

    Each subdirectory has its own manifest: a checkpoint without its resume/ is still a complete model.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != RunLayout.DIGESTS)
    entries = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "digest": file_digest(file)}
        for file in files
    }
    write_json(folder / RunLayout.DIGESTS, entries)


def read_manifest(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """Return size (`bytes`) and `digest` of the files of a directory, by plain names.

    Raises:
        DamagedError: the manifest is missing or invalid.
    """
    entries: Any = read_json(folder / RunLayout.DIGESTS, MAX_MANIFEST_BYTES)
    if not isinstance(entries, dict) or not all(
        itertools.starmap(_is_entry, cast("Mapping[Any, Any]", entries).items())
    ):
        raise DamagedError("invalid manifest", location=str(folder / RunLayout.DIGESTS), hint=_RESTORE)
    return cast("Mapping[str, Mapping[str, Any]]", entries)


def verify_manifest(folder: Path, *, digest_up_to: int | None = None, digested: Collection[str] | None = None) -> None:
    """Compare the files of a directory with its manifest.

    Args:
        folder: The directory.
        digest_up_to: Of files larger than this number of bytes, only the size is compared.
        digested: Names of the files whose digests are compared; None: all.

    Raises:
        DamagedError: a file is missing, cut short or changed; the location names it.
    """
    for name, entry in read_manifest(folder).items():
        file = folder / name
        if not file.is_file():
            raise DamagedError("a file of this directory is missing", location=str(file), hint=_RESTORE)
        if file.stat().st_size != entry["bytes"]:
            raise DamagedError(
                f"invalid file size: got {file.stat().st_size:,} bytes, expected {entry['bytes']:,}",
                location=str(file),
                hint=_RESTORE,
            )
        is_small = digest_up_to is None or entry["bytes"] <= digest_up_to
        if is_small and (digested is None or name in digested) and file_digest(file) != entry["digest"]:
            raise DamagedError(
                "the content of this file has changed since it was written", location=str(file), hint=_RESTORE
            )


def _is_entry(name: str, entry: Any) -> bool:
    """Return whether an entry of a manifest has the name of a file in the same folder, its size and its digest."""
    has_facts = isinstance(entry, dict) and {key: type(value) for key, value in cast("Any", entry).items()} == _FACTS
    return has_facts and _is_plain_name(name)


_FACTS: Final = {"bytes": int, "digest": str}


class DigestCache:
    """Digests of files, cached in a JSON file and valid while paths, sizes and modification times are the same."""

    # A file that changes twice within one tick of the file system's clock keeps its modification time. So a digest is
    # cached only if the file was unchanged for longer than the coarsest clock in use, FAT's two seconds.
    _COARSEST_CLOCK_NS = 2_000_000_000

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, Any] = {}
        self._is_changed = False
        with contextlib.suppress(DamagedError):  # missing or damaged: all digests are computed again
            entries = read_json(path)
            self._entries = entries if isinstance(entries, dict) else {}

    def get(self, key: str, files: Sequence[Path]) -> str | None:
        """Return the digest of a key, or None if there is none or one of its files has changed.

        Raises:
            OSError: a file can't be read.
        """
        entry = self._entries.get(key)
        if not files or not isinstance(entry, dict) or entry.get("files") != self._facts(files):
            return None
        return str(entry["digest"])

    def set(self, key: str, files: Sequence[Path], digest: str, *, since_ns: int) -> None:
        """Cache the digest of files, whose computation started at `since_ns`.

        Raises:
            OSError: a file can't be read.
        """
        facts = self._facts(files)
        if files and max(fact[2] for fact in facts) + self._COARSEST_CLOCK_NS < since_ns:
            self._entries[key] = {"files": facts, "digest": digest}
            self._is_changed = True

    def save(self) -> None:
        """Write the cache; errors are ignored, because a missing cache costs only time."""
        if self._is_changed:
            with contextlib.suppress(StoreError):
                write_json(self._path, self._entries)
            self._is_changed = False

    def _facts(self, files: Sequence[Path]) -> list[list[Any]]:
        """Return absolute path, size and modification time of each file, as lists as in JSON."""
        stats = [(os.path.abspath(file), file.stat()) for file in files]
        return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def default_cache() -> Path:
    """Return $UNMASK_CACHE, or $XDG_CACHE_HOME/unmask, or ~/.cache/unmask."""
    if own := os.environ.get("UNMASK_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unmask"
