"""The copy of a run in a store: written while the run is trained, and downloaded to resume it elsewhere."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shlex
import threading
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final, cast

from unmask.core.errors import ModelError, RunError, StoreError, UnmaskError
from unmask.core.files import (
    RunLayout,
    atomic_directory,
    default_cache,
    digest,
    last_step,
    pickled_error,
    verify_manifest,
    wrap_os_errors,
    write_pointer,
)
from unmask.core.format import join_names, masked
from unmask.core.remote import (
    MAX_OBJECTS,
    OBJECTS,
    PROBE,
    SESSION,
    STEP,
    RemoteObject,
    Store,
    reporter,
    require_space,
)

_log = logging.getLogger("unmask")
_NOT_COPIED: Final = frozenset({RunLayout.LOCK, RunLayout.LATEST, "report.html"})
_NEVER_READ: Final = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pb", ".pt", ".pth", ".tflite")
_LAST: Final = (RunLayout.DIGESTS, RunLayout.CARD)  # of a folder, in this order: a card says that it is complete


class _Vanished(Exception):
    """A file was replaced or deleted while its folder was copied."""


class _SupersededError(StoreError):
    """Another process has begun to upload the run after this one."""


class RunUpload:
    """Copies a run to a store, in a background thread while it is trained.

    A pass copies what has changed: first all but the steps, then each complete step. The last step is the first of
    them, because the run may delete the earlier ones meanwhile. The last file of a folder is its card.json: a step
    without one is incomplete. A step that the run has deleted is deleted in the store too, once `keep` later ones are
    complete there. At most one pass waits, however many steps are saved meanwhile. A pass that fails is repeated after
    the next save; it goes on with the file that failed. What was deleted in the store meanwhile is copied again. Of
    several processes that continue one run, the last one that began uploads it: two of them would delete each other's
    steps.

    Args:
        run: directory of the run.
        address: address of its copy.
        keep: number of steps that are kept there at least; all that the run has are.
    """

    def __init__(self, run: Path, address: str, keep: int) -> None:
        # The named folder is shown; the absolute one is read, also if the program changes its working folder.
        self._named, self._run, self.address, self._keep = run, run.absolute(), address, keep
        self._store = Store(address, StoreError)
        self._copied: dict[str, tuple[int, int]] = {}  # size and time of each file when it was copied
        self._objects: dict[str, int | None] = {}  # sizes of all objects, at the beginning of a pass
        self._sent: dict[str, tuple[int, int]] = {}  # likewise of the files of folders that are not complete yet
        self._changed, self._is_ending = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._failures, self._is_own = 0, False  # whether the address was seen to be empty or to have this run
        self._session, self._has_begun = secrets.token_hex(16).encode(), False
        self.error: StoreError | None = None  # of the last pass

    def start(self) -> None:
        """Start the thread; it copies at once."""
        self._thread.start()
        self.notify()

    def notify(self) -> None:
        """Let the thread copy what has changed; returns at once."""
        self._changed.set()

    def close(self) -> None:
        """Copy what has changed since the last pass and end the thread; `error` says what could not be copied."""
        if self._thread.is_alive():
            _log.info(f"uploading the rest of the run to {masked(self.address)}")
            self._is_ending = True
            self.notify()
            self._thread.join()

    def _work(self) -> None:
        is_last = False
        while not is_last or self._changed.is_set():  # set by a last pass in which a file was replaced
            self._changed.wait()
            self._changed.clear()
            is_last = self._is_ending
            self.copy()
            if self.error is not None:
                _log.warning(f"{self.error.message}; failure {self._failures} of this upload, training goes on")

    def copy(self) -> None:
        """Copy what has changed; an error is kept in `error`."""
        try:
            self._copy()
            self.error = None
        except Exception as error:  # training must go on
            self._failures += 1
            reason = error.message if isinstance(error, UnmaskError) else f"{type(error).__name__}: {error}"
            missing = list[str]()
            with contextlib.suppress(OSError):  # the run itself may be gone
                missing = self._missing()
            folders = join_names(list(dict.fromkeys(name.partition("/")[0] for name in missing)))
            self.error = StoreError(
                f"{len(missing):,} files of the run are not uploaded ({folders}): {masked(reason)}",
                location=self.address,
                hint=error.hint
                if isinstance(error, _SupersededError)
                else "upload them when the store can be written: "
                f"unmask pretrain --resume {shlex.quote(str(self._named))}",
            )

    def _missing(self) -> list[str]:
        """Return the files of the run that are not in the store as they are now."""
        missing: list[str] = []
        for name in [name for folder in self._folders() for name in self._names(folder)]:
            with contextlib.suppress(_Vanished):
                if self._copied.get(name) != self._facts(name):
                    missing.append(name)
        return missing

    def _copy(self) -> None:
        if not self._is_own:
            _require_own(self._store, self._run)
            self._is_own = True
        objects = self._objects = {one.path: one.size for one in self._store.list()}
        if RunLayout.ENVIRONMENT in objects and not _is_copy(self._store, self._run):
            raise _of_others(self._store, self._run)  # another run has got the address meanwhile
        self._check_session()
        for known in (self._copied, self._sent):
            for name in [name for name, (size, _) in known.items() if objects.get(name) != size]:
                del known[name]
        if RunLayout.ENVIRONMENT not in objects and (self._run / RunLayout.ENVIRONMENT).is_file():
            self._put(RunLayout.ENVIRONMENT)  # first, because it says whose copy this is
        folders = self._folders()
        steps = [folder for folder in folders if folder.startswith(STEP)]
        there = {name.partition("/")[0] for name in objects if name.startswith(STEP)}
        if discarded := self._discarded(there):
            # The run went back to an earlier step. A download begins with the last step, so they go first, but not
            # before the earlier step is there: with its log, it is the state of the run at any moment.
            if not self._copy_folders(steps):
                return
            for name in discarded:
                self._store.remove_folder(name)
        self._copy_folders(folders)
        self._remove_outdated()

    def _remove_outdated(self) -> None:
        """Delete the steps in the store that the run has no longer, but the last `keep` complete ones."""
        names = {one.path for one in self._store.list() if one.path.startswith(STEP)}
        there = {name.partition("/")[0] for name in names}
        complete = sorted(step for step in there if f"{step}/{RunLayout.CARD}" in names)
        for step in sorted(there - set(complete[-self._keep :]) - set(self._folders())):
            self._store.remove_folder(step)

    def _check_session(self) -> None:
        """Write the name of this process to the store, in the first pass; check in later ones that it is there.

        Raises:
            _SupersededError: the name of another process is there.
        """
        named = self._store.get(SESSION) if self._has_begun else None
        if named is None:  # or the objects were deleted meanwhile
            self._store.put_bytes(self._session, SESSION)
            self._has_begun = True
        elif named != self._session:
            raise _SupersededError(
                "another process continues this run, and uploads it to the same address",
                location=self.address,
                hint="stop one of them; if this one is to go on, resume it with another address: "
                f"unmask pretrain --resume {shlex.quote(str(self._named))} --set train.upload=ADDRESS",
            )

    def _discarded(self, there: set[str]) -> list[str]:
        """Return those of the steps in the store that are later than the last step of the run."""
        last = last_step(self._run)  # of a step that is just being replaced, the folder may be missing
        numbers = {name: name.removeprefix(STEP) for name in there}
        found = [name for name, number in numbers.items() if number.isdecimal() and int(number) > (last or 0)]
        return [] if last is None else sorted(found)

    def _copy_folders(self, folders: Sequence[str]) -> bool:
        """Copy what has changed in some folders; return whether all are in the store."""
        is_complete = True
        for folder in folders:
            try:
                self._copy_folder(folder)
            except (_Vanished, FileNotFoundError):  # the next pass copies what replaced it
                self.notify()
                is_complete = False
        return is_complete

    def _folders(self) -> list[str]:
        """Return the names of the run's folders in the order of copying: "" for its own files, then its complete steps.

        The last step is the first of them.
        """
        names = sorted(path.name for path in self._run.iterdir() if path.is_dir() and not path.is_symlink())
        steps = [name for name in names if name.startswith(STEP)]
        complete = [name for name in steps if (self._run / name / RunLayout.CARD).is_file()]
        return [*(name for name in names if not name.startswith((".", STEP))), "", *reversed(complete)]

    def _names(self, folder: str) -> list[str]:
        """Return the files of a folder in the order of copying, as names below the run."""
        root = self._run / folder
        found = root.rglob("*") if folder else root.iterdir()
        names = [path.relative_to(self._run).as_posix() for path in found if path.is_file() and not path.is_symlink()]
        last = [f"{folder}/{name}" for name in _LAST]
        first = [name for name in sorted(names) if name not in last and not PurePosixPath(name).name.startswith(".")]
        return [name for name in first if name not in _NOT_COPIED] + [name for name in last if name in names]

    def _facts(self, name: str) -> tuple[int, int]:
        try:
            status = (self._run / name).stat()
        except FileNotFoundError as error:
            raise _Vanished from error
        return status.st_size, status.st_mtime_ns

    def _copy_folder(self, folder: str) -> None:
        names = self._names(folder)
        facts = {name: self._facts(name) for name in names}
        changed = [name for name in names if self._copied.get(name) != facts[name]]
        card = f"{folder}/{RunLayout.CARD}"
        if folder.startswith(STEP) and card not in names:  # the run has deleted it, or does so now
            raise _Vanished
        if not changed:
            return
        if card not in names:
            for name in changed:
                self._put(name)
                self._copied[name] = facts[name]
            return
        equal = {name for name in self._equal(folder) if name in facts and self._objects.get(name) == facts[name][0]}
        outdated = [name for name in self._objects if name.startswith(f"{folder}/") and name not in facts]
        if outdated or not equal.issuperset(names):
            self._sent |= {name: facts[name] for name in names if name in equal}
            content = (self._run / card).read_bytes()
            self._store.remove(card)  # the folder is incomplete until its new card is there
            self._copied = {name: known for name, known in self._copied.items() if name not in names}
            for name in names:
                if name != card and self._sent.get(name) != facts[name]:
                    self._put(name)
                    self._sent[name] = facts[name]
            if any(self._facts(name) != facts[name] for name in names):  # replaced meanwhile: perhaps a mixture
                raise _Vanished
            for name in outdated:  # such as the shards of more ranks, from which the step can't be resumed
                self._store.remove(name)
            self._store.put_bytes(content, card)
        self._copied |= facts
        self._sent = {name: known for name, known in self._sent.items() if name not in facts}

    def _put(self, name: str) -> None:
        try:
            self._store.put(self._run / name, name)
        except StoreError as error:
            if not (self._run / name).exists():  # rather than an object or a bucket
                raise _Vanished from error
            raise

    def _equal(self, folder: str) -> set[str]:
        """Return the files of a folder with the same content in the store, by the digests there; none without a card.

        A step that is written again after a return to it differs in the training state only. Its weights stay.
        """
        card = f"{folder}/{RunLayout.CARD}"
        known = self._store.get(card)
        if known is None:
            return set()
        equal = {card} if known == (self._run / card).read_bytes() else set[str]()
        for place in (folder, f"{folder}/{RunLayout.RESUME}"):
            name = f"{place}/{RunLayout.DIGESTS}"
            if not (self._run / name).is_file() or (there := self._store.get(name)) is None:
                continue
            own = (self._run / name).read_bytes()
            if there == own:
                equal.add(name)
            known_entries = _entries(there)
            equal |= {f"{place}/{file}" for file, entry in _entries(own).items() if known_entries.get(file) == entry}
        return equal


def check_upload(address: str, run: Path | None = None) -> None:
    """Check that a run can be copied to an address: it can be written and is empty, or has a copy of this run.

    Args:
        address: address of the copy.
        run: directory of the run; None if it is new.

    Raises:
        StoreError: it can't be written.
        RunError: it has other objects.
    """
    store = Store(address, StoreError)
    _require_own(store, run)
    store.put_bytes(b"", PROBE)
    store.remove(PROBE)


def _require_own(store: Store, run: Path | None) -> None:
    """Check that a store has nothing below its address but a copy of this run, known by the `id` in env.json.

    Raises:
        RunError: it has other objects.
    """
    if store.list() and (run is None or not _is_copy(store, run)):
        raise _of_others(store, run)


def _is_copy(store: Store, run: Path) -> bool:
    """Return whether the env.json of a store is that of a run."""
    there = store.get(RunLayout.ENVIRONMENT)
    if there is None or not (run / RunLayout.ENVIRONMENT).is_file():
        return False
    own = (run / RunLayout.ENVIRONMENT).read_bytes()
    return there == own or _identity(there) == _identity(own) != ""


def _of_others(store: Store, run: Path | None) -> RunError:
    return RunError(
        "there are objects at this address already" + ("" if run is None else ", and not those of this run"),
        location=store.address,
        hint=f"choose another train.upload, or continue that run: unmask pretrain --resume {store.address}",
    )


def _identity(environment: bytes) -> str:
    """Return the random name of a run; "" if there is none."""
    name = _entries(environment).get("id")
    return name if isinstance(name, str) else ""


def _entries(content: bytes) -> dict[str, object]:
    """Return the entries of a JSON object; none if the content is none."""
    try:
        entries: Any = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, object]", entries) if isinstance(entries, dict) else {}


def fetch_model(address: str) -> Path:
    """Return a copy, in the cache, of a model: a folder, or of a run the best model, else the last complete step.

    Raises:
        ModelError: there is no model at the address, its weights are not in safetensors, it has pickles of
            `torch.distributed.checkpoint`, or the store can't be read.
        DamagedError: a file is not what the digests of its folder say.
        StoreError: the cache can't be written.
    """
    from filelock import FileLock

    store = Store(address, ModelError)
    objects = _objects(store)
    if len(objects) > MAX_OBJECTS:
        message = f"too many objects: {len(objects):,}, expected at most {MAX_OBJECTS:,}"
        raise ModelError(message, location=address, hint="name the folder of the model itself")
    folder = ""
    if RunLayout.RECIPE in objects and RunLayout.CONFIG not in objects:
        complete = {name.removesuffix(f"/{RunLayout.CARD}") for name in objects if name.endswith(f"/{RunLayout.CARD}")}
        steps = sorted(name for name in complete if name.startswith(STEP))
        best = next((name for name in (RunLayout.BEST, *reversed(steps)) if name in complete), "")
        if not best:
            hint = "name another address, or wait until a step of this run is uploaded"
            raise ModelError("the run at this address has no complete model", location=address, hint=hint)
        folder = f"{best}/"
    resume = f"{folder}{RunLayout.RESUME}/"
    wanted = [one for name, one in objects.items() if name.startswith(folder) and not name.startswith(resume)]
    if not any(PurePosixPath(one.path).name == RunLayout.CONFIG for one in wanted):
        hint = "name the folder of a model or of a run"
        raise ModelError("no model at this address: config.json is missing", location=address, hint=hint)
    # Weights in other formats are often several times as large as those that are read.
    wanted = [one for one in wanted if PurePosixPath(one.path).suffix.lower() not in _NEVER_READ]
    if not any(one.path.endswith(".safetensors") for one in wanted):
        hint = "save it with safe_serialization=True: pickles (.bin, .pt) can run code and are never read"
        raise ModelError("the model at this address has no weights in safetensors", location=address, hint=hint)
    identity = digest(masked(address), *(f"{one.path} {one.size} {one.identity}" for one in wanted))
    target = default_cache() / OBJECTS / f"model-{identity}"
    with wrap_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):  # ranks that need the same model wait for it
            is_known = all(one.identity for one in wanted)  # else its content may have changed
            if not (is_known and target.is_dir()):
                with atomic_directory(target) as aside:
                    _download(store, wanted, aside, folder)
                _log.info(f"downloaded the model of {masked(address)} to {target}")
    return target


def _objects(store: Store) -> dict[str, RemoteObject]:
    """Return the objects of a store by name.

    Raises:
        ModelError: one is a pickle of `torch.distributed.checkpoint`.
    """
    objects = {one.path: one for one in store.list()}
    if pickled := next((name for name in objects if PurePosixPath(name).name == RunLayout.PICKLED), ""):
        raise pickled_error(f"{store.address}/{pickled}")
    return objects


def _download(store: Store, wanted: Sequence[RemoteObject], folder: Path, below: str = "") -> None:
    """Write the objects, whose names begin with `below`, to a folder, and compare them with the digests among them."""
    total, done = sum(one.size or 0 for one in wanted), 0
    require_space(folder, total)
    for one in wanted:
        target = folder / one.path.removeprefix(below)
        if not target.resolve().is_relative_to(folder.resolve()):
            location = f"{store.address}/{one.path}"
            raise store.kind("invalid name of an object", location=location, hint="remove it")
        target.parent.mkdir(parents=True, exist_ok=True)
        store.download(one, target, reporter(store.address, done, total))
        done += one.size or 0
    for manifest in sorted(folder.rglob(RunLayout.DIGESTS)):
        verify_manifest(manifest.parent)


def fetch_run(address: str, folder: Path) -> None:
    """Download a run: its settings, its best model, its log and its complete steps, to which it may have to go back.

    Raises:
        RunError: the folder exists, or there is no run at the address.
        ModelError: there is a pickle of `torch.distributed.checkpoint`.
        DamagedError: a file is not what the run's digests say.
        StoreError: the disk can't be written.
    """
    if os.path.lexists(folder):
        hint = f"continue that copy: unmask pretrain --resume {shlex.quote(str(folder))}; or work in another directory"
        raise RunError("the folder for the downloaded run exists", location=str(folder), hint=hint)
    store = Store(address, RunError)
    objects = _objects(store)
    if RunLayout.RECIPE not in objects:
        raise RunError("no run at this address", location=address, hint="check the address")
    folders = {name.partition("/")[0] for name in objects if "/" in name}
    complete = {each for each in folders if f"{each}/{RunLayout.CARD}" in objects}
    steps = sorted(each for each in complete if each.startswith(STEP))
    # A model folder without a card was being copied or deleted when the run ended.
    left_out = {
        each
        for each in folders - complete
        if each.startswith((STEP, RunLayout.KEPT)) or each == RunLayout.BEST or f"{each}/{RunLayout.CONFIG}" in objects
    }
    if left_out:
        _log.info(f"left out, because their copies are incomplete: {join_names(sorted(left_out))}")
    wanted = [one for name, one in objects.items() if name.partition("/")[0] not in left_out]
    with atomic_directory(folder) as aside:
        _download(store, wanted, aside)
        if steps:
            write_pointer(aside / RunLayout.LATEST, steps[-1])
    _log.info(f"downloaded the run to {folder}: {steps[-1] if steps else 'no step was saved'}")
