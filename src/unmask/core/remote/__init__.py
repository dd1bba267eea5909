"""Objects of stores: s3://, gs://, hf:// and https:// addresses. `remote.upload` has the copy of a run.

A text is copied to the cache once and then read as a local file, because a build reads it up to four times. A copy is
identified by the address and by what the store says about the object: entity tag, else time and size.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import ipaddress
import logging
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeVar
from urllib.parse import unquote, urlsplit

from unmask.core.errors import DamagedError, RecipeError, StoreError, TextError, UnmaskError
from unmask.core.files import (
    RunLayout,
    default_cache,
    digest,
    file_digest,
    read_json,
    wrap_os_errors,
    write_json,
)
from unmask.core.format import HIDDEN, masked
from unmask.core.format import size as in_words
from unmask.core.types import ProgressCallback

STEP: Final = "step-"  # beginning of the names of step folders
UPLOADS: Final = ("s3", "gs", "hf")  # schemes of stores that can be written
PROBE: Final = ".writable"  # object that is written and deleted to see whether an address can be written
SESSION: Final = ".session"  # object with the random name of the process that uploads a run
OBJECTS: Final = "objects"  # directory of the cache with copies of objects
_PACKAGES: Final = {  # scheme -> module that reads it, and what installs it
    "s3": ("s3fs", "unmask[s3]"),
    "gs": ("gcsfs", "gcsfs"),
    "hf": ("huggingface_hub", "huggingface_hub"),
    "https": ("aiohttp", "aiohttp"),
    "http": ("aiohttp", "aiohttp"),
}
_CREDENTIALS: Final = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket, FSSPEC_S3_ANON=true",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS; for a public bucket, FSSPEC_GS_TOKEN=anon",
    "hf": "set HF_TOKEN",
}
_REMOTE: Final = re.compile(rf"({'|'.join(_PACKAGES)})://", re.IGNORECASE)
_HTTP: Final = ("http", "https")
_PATTERN: Final = re.compile(r"[*?\[]")
_INVALID: Final = re.compile(r"[\s\"<>`]")  # where an address in a text ends
_IDENTITIES: Final = ("ETag", "etag", "blob_id", "md5Hash", "Content-MD5", "LastModified", "Last-Modified", "updated")
_DELAYS: Final = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each further try
_CHUNK_BYTES: Final = 8 << 20
MAX_OBJECTS: Final = 100_000  # of one address
_MAX_REASON: Final = 300  # characters
_LONGEST_NAME: Final = 150  # bytes of a file name
_FINAL: Final = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError)
_STORES: Final = ("aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "google", "httpx", "huggingface_hub", "s3fs")

_log = logging.getLogger("unmask")
_progress: ContextVar[ProgressCallback | None] = ContextVar("progress of downloads", default=None)
_given: dict[str, str] = {}  # addresses by their form without credentials; never written to a file
_SEVERAL: Final = ""  # in place of an address
T = TypeVar("T")


# Addresses ------------------------------------------------------------------------------------------------------------


def is_remote(name: object) -> bool:
    """Return whether a name is the address of an object or of several: its scheme is that of a store."""
    return isinstance(name, str) and _REMOTE.match(name) is not None


def require_public(address: str, location: str) -> None:
    """Check that an address has no credentials, because it is written to a file.

    Raises:
        RecipeError: it has user, password or a token.
    """
    if not is_remote(address):
        return
    if problem := _problem(address):
        hint = "write %22, %3C, %3E, %60 or %20 in a name; the port of a server is a number"
        raise RecipeError(f"invalid address: {problem}", location=location, hint=hint)
    if masked(address) != address:
        raise RecipeError(
            f"this address has credentials, which would be written to the run: {address}",
            location=location,
            hint="remove them from the address and set the environment variables of the store",
        )


def _problem(address: str) -> str:
    """Return what is invalid in an address, without its text, which may have credentials; "" if nothing is."""
    if _INVALID.search(address):
        return "it has a space, a quotation mark or an angle bracket"
    try:
        _ = urlsplit(address).port if scheme_of(address) in _HTTP else None
    except ValueError:
        return "its server or port is not valid"
    return ""


def scheme_of(address: str) -> str:
    """Return the scheme of an address in lower case; of another text, a string that is no scheme."""
    return address.partition("://")[0].lower()


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


# Errors and retries ---------------------------------------------------------------------------------------------------


def _status(error: BaseException) -> int:
    status = getattr(error, "status", None)
    return status if isinstance(status, int) else 0


def _is_of_store(error: BaseException) -> bool:
    """Return whether an error comes from a store or the network, and not from this program."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _STORES


def _is_transient(error: BaseException) -> bool:
    """Return whether another try may succeed."""
    if isinstance(error, _FINAL) or re.search("Credential|Profile|Validation|Token|NotFound", type(error).__name__):
        return False
    return not 400 <= _status(error) < 500 or _status(error) in (408, 429)


def _explained(error: BaseException, address: str, kind: type[UnmaskError]) -> UnmaskError:
    """Return the error for a store that refused or could not be reached."""
    scheme, shown = scheme_of(address), masked(address)
    reason = (masked(str(error)).strip().splitlines() or [type(error).__name__])[0][:_MAX_REASON]
    if isinstance(error, FileNotFoundError) or _status(error) == 404 or "NotFound" in type(error).__name__:
        return kind(f"no such object or bucket: {reason}", location=shown, hint="check the address")
    if isinstance(error, PermissionError) or _status(error) in (401, 403) or not _is_transient(error):
        hint = _CREDENTIALS.get(scheme, "check the credentials")
        return kind(f"no access to this address: {reason}", location=shown, hint=hint)
    hint = "check the network and the address, then run the command again; it goes on where it was interrupted"
    return kind(f"can't reach this address: {reason}", location=shown, hint=hint)


def _wait(error: Exception, attempt: int, address: str, kind: type[UnmaskError]) -> None:
    """Wait before the next try; raise the error if it is final or the tries are used up.

    Raises:
        UnmaskError: of class `kind`.
        Exception: the error itself, if it doesn't come from the store.
    """
    if not _is_of_store(error):
        raise error
    if not _is_transient(error) or attempt >= len(_DELAYS):
        raise _explained(error, address, kind) from None  # the text of the error itself may have credentials
    reason = _explained(error, address, kind).message
    _log.warning(f"{masked(address)}: {reason}; trying again in {_DELAYS[attempt]:g} s")
    time.sleep(_DELAYS[attempt])


def _retried(action: Callable[[], T], address: str, kind: type[UnmaskError]) -> T:
    """Return the result of an action on a store; it is tried again after errors that may pass."""
    attempt = 0
    while True:
        try:
            return action()
        except Exception as error:
            _wait(error, attempt, address, kind)
        attempt += 1


# Stores ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoteObject:
    """An object of a store."""

    address: str
    path: str  # the name that its file system uses
    size: int | None  # bytes; None if the server doesn't say
    identity: str  # changes with the content; "" if the store says nothing about it


class Store:
    """The file system of an address.

    Args:
        address: address of an object, a pattern of objects, or the beginning of their names.
        kind: class of the errors.

    Raises:
        RecipeError: the package for this kind of store is not installed.
        UnmaskError: of class `kind`: the address is not valid.
    """

    def __init__(self, address: str, kind: type[UnmaskError] = TextError) -> None:
        self.address, self.kind, scheme = address, kind, scheme_of(address)
        if problem := _problem(address):
            hint = f"write {scheme}://HOST/PATH; in a name, write %20 for a space and %22 for a quotation mark"
            raise kind(f"invalid address: {problem}", location=f"{scheme}://{HIDDEN}", hint=hint)
        if scheme == "http" and not _is_loopback(urlsplit(address).hostname or ""):
            raise kind("invalid scheme: got http, expected https", location=address, hint="write https://")
        if "::" in address or not address.partition("://")[2].strip("/"):
            raise kind("invalid address", location=address, hint=f"write {scheme}://NAME/PATH")
        module, extra = _PACKAGES[scheme]
        try:
            importlib.import_module(module)
        except ImportError as error:
            message = f"{scheme}:// needs a package that is not installed: {module}"
            raise RecipeError(message, location=address, hint=f'pip install "{extra}"') from error
        import fsspec

        options: dict[str, Any] = {}
        if scheme == "s3":  # this module retries; three layers of retries would take minutes
            limits = {"total_max_attempts": 1}
            options["config_kwargs"] = {"retries": limits, "connect_timeout": 10, "read_timeout": 60}
        self._files: Any = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)  # pyright: ignore[reportUnknownMemberType]
        if scheme == "s3":
            self._files.retries = 1
        self._is_http = scheme in _HTTP
        self._path = address if self._is_http else address.partition("://")[2].rstrip("/")
        self._scheme = scheme

    def find(self, is_read: Callable[[str], bool]) -> list[RemoteObject]:
        """Return the object of this name, the objects that a pattern matches, or those below a name that are read.

        Raises:
            UnmaskError: there is none, or the store can't be read.
        """
        objects = _retried(lambda: self._find(is_read), self.address, self.kind)
        if not objects:
            raise self.kind("no object matches this address", location=self.address, hint="check the address")
        if len(objects) > MAX_OBJECTS:
            message = f"too many objects: {len(objects):,}, expected at most {MAX_OBJECTS:,}"
            raise self.kind(message, location=self.address, hint="narrow the pattern, or join the files")
        return sorted(objects, key=lambda one: one.path)

    def _find(self, is_read: Callable[[str], bool]) -> list[RemoteObject]:
        if not self._is_http and _PATTERN.search(self._path):
            found: dict[str, Any] = self._files.glob(self._path, detail=True)
        else:
            info = self._info(self._path)
            if info["type"] != "directory":
                return [self._object(self._path, info)]
            listed: dict[str, Any] = self._files.find(self._path, detail=True)
            found = {path: facts for path, facts in listed.items() if is_read(PurePosixPath(path).name)}
        files = {path: facts for path, facts in found.items() if facts["type"] == "file" and facts["size"]}
        return [self._object(path, facts) for path, facts in files.items()]

    def _info(self, path: str) -> dict[str, Any]:
        try:
            info: dict[str, Any] = self._files.info(path)
        except FileNotFoundError as error:
            if self._is_http and error.__cause__ is not None:  # fsspec reports any error so
                raise error.__cause__ from None
            raise
        self._check_redirect(str(info.get("url") or path))
        return info

    def _check_redirect(self, url: str) -> None:
        """Check that a web server led to no address that could not be given itself.

        Raises:
            UnmaskError: it led from https:// to http://, or from this machine to another by http://.
        """
        target = urlsplit(url)
        if (
            self._is_http
            and target.scheme != "https"
            and (self._scheme == "https" or not _is_loopback(target.hostname or ""))
        ):
            message = f"the server leads to an address without https: {masked(url)}"
            raise self.kind(message, location=self.address, hint="name the address of the object itself")

    def _object(self, path: str, info: dict[str, Any]) -> RemoteObject:
        known = next((f"{key} {info[key]}" for key in _IDENTITIES if info.get(key)), "")
        address = path if self._is_http else f"{self._scheme}://{path}"
        return RemoteObject(address, path, info.get("size"), known)

    def refresh(self, one: RemoteObject) -> RemoteObject:
        """Return what the store says about an object now."""
        return _retried(lambda: self._object(one.path, self._info(one.path)), one.address, self.kind)

    def read(self, one: RemoteObject, offset: int) -> Iterator[tuple[int, bytes]]:
        """Yield the bytes of an object from an offset, each chunk with its position.

        After an error that may pass, reading goes on at the same position, or at 0 if the server can't continue.

        Raises:
            UnmaskError: the store can't be read.
        """
        attempt, far = 0, offset
        while True:
            try:
                for position, chunk in self._read(one, offset):
                    yield position, chunk
                    offset = position + len(chunk)
                    if offset > far:  # a server that always begins again and always breaks off makes no progress
                        far, attempt = offset, 0
                if one.size is None or offset == one.size:
                    return
                raise OSError(f"got {offset:,} bytes, expected {one.size:,}")
            except Exception as error:
                _wait(error, attempt, one.address, self.kind)
            attempt += 1

    def _read(self, one: RemoteObject, offset: int) -> Iterator[tuple[int, bytes]]:
        if not self._is_http:
            while one.size is not None and offset < one.size:
                chunk = self._files.cat_file(one.path, start=offset, end=min(offset + _CHUNK_BYTES, one.size))
                yield offset, chunk
                offset += len(chunk)
            return
        headers = {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        with self._files.open(one.path, block_size=0, size=one.size or -1, headers=headers) as stream:
            self._check_redirect(str(stream.r.url))
            if stream.r.status != 206:
                offset = 0
            while chunk := stream.read(_CHUNK_BYTES):
                yield offset, chunk
                offset += len(chunk)

    # Below the address, as the copy of a run

    def list(self) -> list[RemoteObject]:
        """Return the objects below the address; their paths are relative to it."""
        found = _retried(lambda: self._files.find(self._path, detail=True), self.address, self.kind)
        below = f"{self._path}/"
        hidden = ("/", f"/{PROBE}", f"/{SESSION}")  # a console marks folders with "NAME/"
        return [
            replace(self._object(path, facts), path=path.removeprefix(below))
            for path, facts in sorted(found.items())
            if path.startswith(below) and not path.endswith(hidden)
        ]

    def put(self, file: Path, name: str) -> None:
        """Copy a file to an object below the address."""
        target = f"{self._path}/{name}"
        _retried(lambda: self._files.put_file(str(file), target), f"{self.address}/{name}", self.kind)

    def put_bytes(self, data: bytes, name: str) -> None:
        """Write an object below the address."""
        _retried(lambda: self._files.pipe_file(f"{self._path}/{name}", data), f"{self.address}/{name}", self.kind)

    def get(self, name: str) -> bytes | None:
        """Return the bytes of a small object below the address; None if there is none."""

        def get() -> bytes | None:
            with contextlib.suppress(FileNotFoundError):
                return self._files.cat_file(f"{self._path}/{name}")
            return None

        return _retried(get, f"{self.address}/{name}", self.kind)

    def remove(self, name: str) -> None:
        """Delete an object below the address; it may be gone already."""

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(f"{self._path}/{name}")

        _retried(remove, f"{self.address}/{name}", self.kind)

    def remove_folder(self, name: str) -> None:
        """Delete all objects below a name, the card first."""
        self.remove(f"{name}/{RunLayout.CARD}")

        below = f"{self._path}/{name}/"
        found = _retried(lambda: self._files.find(f"{self._path}/{name}"), f"{self.address}/{name}", self.kind)
        for path in found:  # one by one, because fsspec takes the name of a folder for a pattern
            if path.startswith(below) and not path.endswith("/"):
                self.remove(path.removeprefix(f"{self._path}/"))

    def download(self, one: RemoteObject, file: Path, report: Callable[[int], None]) -> None:
        """Write an object below the address to a file."""
        there = replace(one, path=f"{self._path}/{one.path}")
        with file.open("wb") as target:
            for position, chunk in self.read(there, 0):
                target.seek(position)
                target.write(chunk)
                report(position + len(chunk))


# Downloads ------------------------------------------------------------------------------------------------------------


@contextmanager
def shown_downloads(progress: ProgressCallback) -> Generator[None]:
    """Report the progress of downloads in this block."""
    token = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(token)


def fetch(address: str, is_read: Callable[[str], bool]) -> list[Path]:
    """Return local copies of the objects of an address, in order of their names; missing ones are downloaded.

    Args:
        address: an object, a pattern, or the beginning of the names of several.
        is_read: whether an object of this name is one, for the beginning of several names.

    Raises:
        TextError: there is no such object, or the store can't be read.
        StoreError: the cache can't be written.
    """
    if HIDDEN not in address:
        store = Store(address)
        if _given.setdefault(masked(address), address) != address:
            _given[masked(address)] = _SEVERAL
    elif address not in _given:
        raise TextError(
            "the credentials of this address were not stored", location=address, hint="name the address again"
        )
    elif _given[address] == _SEVERAL:
        message = "several addresses differ only in what is hidden here"
        raise TextError(message, location=address, hint="name the addresses again, in a new process")
    else:
        store = Store(_given[address])
    objects = store.find(is_read)
    total = sum(one.size or 0 for one in objects)
    done, copies = 0, list[Path]()
    for one in objects:
        copies.append(_copy(store, one, reporter(address, done, total)))
        done += one.size or 0
    return copies


def reporter(address: str, before: int, total: int) -> Callable[[int], None]:
    """Return a function that reports the progress of a download; it takes the bytes of one object that are done."""
    progress, stage = _progress.get(), f"downloading {masked(address)}"

    def report(done: int) -> None:
        if progress is not None:
            progress(stage, min(1.0, (before + done) / total) if total else 1 - 1 / (1 + done / _CHUNK_BYTES))

    return report


def _copy(store: Store, one: RemoteObject, report: Callable[[int], None]) -> Path:
    """Return the copy of an object in the cache."""
    from filelock import FileLock

    named = re.sub(r"//[^/@]*@", "//", one.address)  # a query may name the content, user and password don't
    folder = default_cache() / OBJECTS / digest(named, one.identity, str(one.size))
    file, record = folder / _file_name(one), folder / "object.json"
    with wrap_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # ranks and runs that need the same object wait for it
            if not (one.identity and _is_intact(file, record)):
                content = _download(store, one, folder / ".part", report)
                (folder / ".part").replace(file)
                facts = {"address": masked(one.address), "identity": one.identity, "digest": content}
                write_json(record, facts | {"bytes": file.stat().st_size, "mtime_ns": file.stat().st_mtime_ns})
                _log.info(f"downloaded {masked(one.address)} ({in_words(file.stat().st_size)}) to {file}")
    return file


def _is_intact(file: Path, record: Path) -> bool:
    """Return whether a copy is what was downloaded; its bytes are read only if its time has changed."""
    if not (file.is_file() and record.is_file()):
        return False
    status = file.stat()
    try:
        facts = read_json(record)
        size, mtime_ns, content = facts["bytes"], facts["mtime_ns"], facts["digest"]
    except (DamagedError, KeyError, TypeError):  # it is downloaded again
        return False
    return status.st_size == size and (status.st_mtime_ns == mtime_ns or file_digest(file) == content)


def require_space(folder: Path, needed: int) -> None:
    """Check that a download fits on the disk.

    Raises:
        StoreError: it doesn't.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        message = f"not enough space: {in_words(needed)} are needed, {in_words(free)} are free"
        raise StoreError(message, location=str(folder), hint="free disk space, or set UNMASK_CACHE")


def _download(store: Store, one: RemoteObject, part: Path, report: Callable[[int], None]) -> str:
    """Write an object to a file, from where an earlier download ended; return the digest of its bytes.

    Raises:
        TextError: the store can't be read, or the object changed meanwhile.
        StoreError: the disk is too small.
    """
    begun = part.stat().st_size if part.is_file() and one.identity and one.size else 0
    require_space(part.parent, (one.size or 0) - begun)
    with part.open("r+b" if begun else "w+b") as file:
        state = hashlib.blake2b(digest_size=16)
        at = 0
        while begun and (chunk := file.read(_CHUNK_BYTES)):
            state.update(chunk)
            at += len(chunk)
        for position, chunk in store.read(one, at) if at != one.size else ():
            if position != at:  # the server can't continue in the middle
                file.seek(position)
                file.truncate()
                state = hashlib.blake2b(digest_size=16)
            file.write(chunk)
            file.flush()
            state.update(chunk)
            at = position + len(chunk)
            report(at)
    if store.refresh(one).identity != one.identity:
        part.unlink()
        raise TextError(
            "this object changed while it was downloaded", location=one.address, hint="run the command again"
        )
    return state.hexdigest()


def _file_name(one: RemoteObject) -> str:
    """Return a name for the copy of an object, with its extension."""
    path = urlsplit(one.path).path if "://" in one.path else one.path
    name = re.sub(r"[^\w.+@=-]", "_", unquote(PurePosixPath(path).name)).lstrip(".") or "object"
    if len(name.encode()) > _LONGEST_NAME:
        name = digest(name) + "".join(PurePosixPath(name).suffixes[-2:])[-20:]
    return name
