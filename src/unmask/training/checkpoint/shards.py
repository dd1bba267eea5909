"""The tensors in `resume/`: one safetensors file of each kind, or, of a sharded run, one of each kind and rank.

The files of ranks are written by PyTorch's `HuggingFaceStorageWriter` and have its names and metadata: the header of a
file says which rows of a tensor it has. Its consolidation is not used: in torch 2.13 it makes zeros of tensors without
dimensions, such as AdamW's step number, and of the rows of a missing file.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import torch
import torch.distributed as distributed
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unmask.core import files
from unmask.core.distributed import DistributedContext
from unmask.core.errors import DamagedError, StoreError
from unmask.core.format import visible
from unmask.models.parallel import held_rows, is_sharded, to_cpu
from unmask.training.guards import is_disk_full

WEIGHTS: Final = "weights"
OPTIMIZER: Final = "optimizer"
EMA: Final = "ema"
KINDS: Final = (WEIGHTS, OPTIMIZER, EMA)
"""Kinds of tensors, in the order of the files of a rank."""

_INDEX: Final = "shards.json"  # the shapes of the whole tensors by kind and name
_HINT: Final = "resume from another step folder"
_LONGEST_PATH: Final = 4096  # bytes
_SAVE_SECONDS: Final = 86_400.0  # for rank 0 to complete a folder; the end of a rank closes its connections
_DISK_SECONDS: Final = 60.0  # after which NFS, by default, shows each machine what another one has created


class Part(NamedTuple):
    """The rows of a tensor that a rank writes, on the CPU."""

    rows: Tensor
    first: int  # number of the first row
    shape: tuple[int, ...]  # of the whole tensor


def parts_of(tensors: Mapping[str, Tensor], context: DistributedContext, *, copies: bool) -> dict[str, Part]:
    """Returns the part of each tensor that this rank writes: of one that isn't sharded, rank 0 writes all.

    With `copies`, the parts don't share the memory of the tensors.
    """
    parts: dict[str, Part] = {}
    for name, tensor in tensors.items():
        is_written = is_sharded(tensor) or context.is_main_process
        rows = to_cpu(tensor, copies=copies) if is_written else torch.empty(0)
        parts[name] = Part(rows, held_rows(tensor)[0], tuple(tensor.shape))
    return parts


# Writing --------------------------------------------------------------------------------------------------------------


class WriterGroup:
    """The messages of the ranks while their threads write a checkpoint; the main threads train meanwhile.

    All ranks create it, and call its methods, in the same order. gloo sends the messages, also if NCCL trains.
    """

    def __init__(self, context: DistributedContext) -> None:
        self._context = context
        self._has_shared = self._has_failed = False  # in this checkpoint
        self._group: Any = distributed.new_group(backend="gloo", timeout=timedelta(seconds=_SAVE_SECONDS))

    def share(self, path: Path | None) -> Path | None:
        """Returns the path that rank 0 gives; None if it has none."""
        text = os.fsencode(os.path.abspath(path)) if path else b""
        sent = torch.frombuffer(bytearray(text.ljust(_LONGEST_PATH, b"\0")), dtype=torch.uint8)
        distributed.broadcast(sent, 0, group=self._group)
        self._has_shared, self._has_failed = True, False
        received = sent.numpy().tobytes().rstrip(b"\0")
        return Path(os.fsdecode(received)) if received else None

    def agree(self, error: Exception | None, location: str) -> None:
        """Raises an error on every rank if one has an error, once all ranks have called this.

        Args:
            error: Error of this rank, which is raised again; None if it has none.
            location: What the others could not write.

        Raises:
            OtherRankError: another rank has failed; its cause is a full disk if that is what all failed ranks have.
        """
        codes = torch.zeros(self._context.ranks, dtype=torch.int32)
        codes[self._context.rank] = error_code(error)
        distributed.all_reduce(codes, group=self._group)
        self._has_failed = bool(codes.any())
        raise_together(error, codes.tolist(), "its part of a checkpoint", location)

    def finish(self, error: Exception | None, location: str) -> None:
        """Raises an error on every rank if rank 0 could not complete the folder. The last message of a checkpoint.

        Args:
            error: Error of rank 0, wherever it came from. None on the other ranks.
            location: The folder.

        Raises:
            OtherRankError: on the other ranks.
        """
        has_shared, self._has_shared = self._has_shared, False
        if error is not None and has_shared and self._has_failed:
            return  # all ranks know
        if not has_shared:
            self.share(None)  # the other ranks wait for a folder, and then for what rank 0 agrees to
        self.agree(error, location)


_FULL_DISK: Final = 1
_OTHER_ERROR: Final = 2


def error_code(error: Exception | None) -> int:
    """Returns 0 without an error, 1 if the disk is full, and 2 for another error."""
    if error is None:
        return 0
    return _FULL_DISK if isinstance(error, StoreError) and is_disk_full(error) else _OTHER_ERROR


def raise_together(error: Exception | None, codes: Sequence[int], what: str, location: str) -> None:
    """Raises the error of this rank, or one that names the ranks that failed, so that all ranks do the same next.

    Args:
        error: Error of this rank, if any.
        codes: `error_code` of each rank.
        what: What a rank could not write, as in "its part of a checkpoint".
        location: Path for the error.

    Raises:
        OtherRankError: another rank has failed.
    """
    worst = max(codes)
    if error is not None and error_code(error) == worst:
        raise error
    if worst:
        ranks = [rank for rank, code in enumerate(codes) if code == worst]
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if worst == _FULL_DISK else None
        raise OtherRankError(
            f"rank {', '.join(map(str, ranks))} could not write {what}{': its disk is full' if full else ''}",
            location=location,
            hint="free disk space" if full else "read the message of that rank; all ranks need a disk that they share",
        ) from full


def write_together(folder: Path | None, parts: Mapping[str, Mapping[str, Part]], rank: int, group: WriterGroup) -> None:
    """Writes the files of all ranks to a folder of rank 0; every rank calls this, and returns when all are written.

    Args:
        folder: Folder to write to; read on rank 0 only. None: rank 0 could not create it.
        parts: What this rank writes, by kind and name.
        rank: Number of this rank.
        group: Messages of the ranks.

    Raises:
        StoreError: on every rank: one could not write.
    """
    shared, error = group.share(folder), cast("Exception | None", None)
    try:
        if shared is not None:
            with files.wrap_os_errors(shared):
                _wait_for(shared)
                _write(shared, parts, rank)
    except Exception as caught:  # the other ranks must learn of any; after an interrupt, they notice that this one ends
        error = caught
    group.agree(error, str(shared or "the folder of a checkpoint"))


class OtherRankError(StoreError):
    """Other ranks could not write their parts of a checkpoint; their own messages say why."""


def _wait_for(folder: Path) -> None:
    """Waits until this rank sees the folder that rank 0 has created.

    Raises:
        StoreError: it doesn't: the ranks write to different disks.
    """
    end = time.monotonic() + _DISK_SECONDS
    while not folder.is_dir():
        if time.monotonic() > end:
            raise StoreError(
                "this rank does not see the folder of a checkpoint that rank 0 has created",
                location=str(folder),
                hint="write the run to a disk that all ranks share (--out), or use --set train.parallel=ddp",
            )
        time.sleep(_DISK_SECONDS / 100)


def _write(folder: Path, parts: Mapping[str, Mapping[str, Part]], rank: int) -> None:
    # Imported here: it takes more than a second.
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    rows: dict[str, Tensor] = {}
    items: list[WriteItem] = []
    numbers: dict[str, int] = {}
    for number, kind in enumerate(parts, start=1):
        for name, part in parts[kind].items():
            full_name = f"{kind}.{name}"
            numbers[full_name] = number
            if part.rows.numel():
                offsets = torch.Size([part.first, *(0 for _ in part.shape[1:])] if part.shape else [])
                chunk = ChunkStorageMetadata(offsets, part.rows.shape)
                data = TensorWriteData(chunk, TensorProperties(dtype=part.rows.dtype), torch.Size(part.shape))
                items.append(WriteItem(MetadataIndex(full_name, offsets), WriteItemType.SHARD, tensor_data=data))
                rows[full_name] = part.rows
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=numbers, save_distributed=True)
    writer.per_thread_copy_ahead = 0  # the tensors are on the CPU already
    plan = writer.prepare_local_plan(SavePlan(items))
    # What it does for the plans of all ranks, which this rank knows: it numbers their files.
    plan = writer.prepare_global_plan([plan] * (rank + 1))[rank]
    writer.write_data(plan, cast("Any", _Rows(rows))).wait()


class _Rows:
    """The part of a `SavePlanner` that a storage writer uses."""

    def __init__(self, rows: Mapping[str, Tensor]) -> None:
        self._rows = rows

    def resolve_data(self, write_item: Any) -> Tensor:
        """Returns the tensor that is written."""
        return self._rows[write_item.index.fqn]


def write_index(folder: Path, parts: Mapping[str, Mapping[str, Part]]) -> None:
    """Writes the shapes of the whole tensors, so that missing rows are noticed."""
    shapes = {kind: {name: list(part.shape) for name, part in named.items()} for kind, named in parts.items()}
    files.write_json(folder / _INDEX, shapes)


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    """Rows of a tensor in a file."""

    path: Path
    file: Any  # an open safetensors file
    name: str  # in the file
    first: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def end(self) -> int:
        """The number of the row after the last one."""
        return self.first + (self.shape[0] if self.shape else 1)

    def read(self, first: int, end: int) -> Tensor:
        """Returns those of the rows from `first` to before `end` that are in this file."""
        with _named(self.path):
            if not self.shape:
                return self.file.get_tensor(self.name)
            return self.file.get_slice(self.name)[max(first - self.first, 0) : max(end - self.first, 0)]


class SavedTensors:
    """Tensors of one kind in `resume/`, in one file or in one of each rank, which are read one after the other."""

    def __init__(self, chunks: Mapping[str, Sequence[_Chunk]], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._chunks, self._shapes = chunks, shapes

    def __iter__(self) -> Iterator[str]:
        """Returns an iterator over the names."""
        return iter(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a whole tensor."""
        return self._shapes[name]

    def whole(self, name: str) -> Tensor:
        """Returns a whole tensor."""
        shape = self._shapes[name]
        return self.rows(name, 0, shape[0] if shape else 1)

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Returns the rows of a tensor from `first` to before `end`.

        Raises:
            DamagedError: a file can't be read.
        """
        chunks = self._chunks[name]
        found = [chunk.read(first, end) for chunk in chunks if max(first, chunk.first) < min(end, chunk.end)]
        if not found:  # a rank may hold no row of a small tensor
            return chunks[0].read(0, 0)
        return found[0] if len(found) == 1 else torch.cat(found)


@contextmanager
def open_tensors(resume: Path, kind: str) -> Generator[SavedTensors]:
    """Opens the tensors of a kind in a folder `resume/`, whatever number of ranks wrote them.

    Raises:
        DamagedError: a file is missing or invalid, or the files of the ranks don't fit together; the error names it.
    """
    with ExitStack() as stack:
        if not is_written_by_ranks(resume):
            path = file_of(resume, kind)
            chunks = {chunk.name: [chunk] for chunk in _chunks_of_file(path, stack, None)}
            yield SavedTensors(chunks, {name: chunk.shape for name, (chunk,) in chunks.items()})
            return
        kinds, shapes = _read_index(resume, kind)
        found: dict[str, list[_Chunk]] = {name: [] for name in shapes}
        for path in sorted(resume.glob(f"shard-*-model-{kinds.index(kind) + 1:05d}-of-{len(kinds):05d}.safetensors")):
            for chunk in _chunks_of_file(path, stack, f"{kind}."):
                name = chunk.name.removeprefix(f"{kind}.")
                if name not in found:
                    raise _misfit(path, f"`{name}` is not in {_INDEX}")
                found[name].append(chunk)
        for name, shape in shapes.items():
            _check_fit(name, shape, found[name], resume)
        yield SavedTensors(found, shapes)


def file_of(resume: Path, kind: str) -> Path:
    """Returns the path of the file of a kind, if the ranks don't write files of their own."""
    return resume / f"{kind}.safetensors"


def is_written_by_ranks(resume: Path) -> bool:
    """Returns whether each rank wrote its own files to a folder `resume/`."""
    return (resume / _INDEX).is_file()


def kinds_in(resume: Path) -> list[str]:
    """Returns the kinds of tensors in a folder `resume/`.

    Raises:
        DamagedError: the index of the files of ranks is damaged.
    """
    if not is_written_by_ranks(resume):
        return [kind for kind in KINDS if file_of(resume, kind).is_file()]
    return _read_index(resume, WEIGHTS)[0]


def _read_index(resume: Path, kind: str) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """Returns the kinds of tensors, and the shapes of those of one kind."""
    path = resume / _INDEX
    index: Any = files.read_json(path)
    try:
        shapes = {str(name): tuple(int(size) for size in shape) for name, shape in index[kind].items()}
        kinds = [str(each) for each in index]
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DamagedError(f"no shapes of `{kind}` in this file", location=str(path), hint=_HINT) from error
    if unknown := [each for each in kinds if each not in KINDS]:
        message = f"unknown kind of tensors: got `{visible(unknown[0])}`, expected one of {', '.join(KINDS)}"
        raise DamagedError(message, location=str(path), hint=_HINT)
    return kinds, shapes


def _chunks_of_file(path: Path, stack: ExitStack, prefix: str | None) -> list[_Chunk]:
    """Opens a file and returns what it has; with a prefix, it is one of the files that ranks write."""
    files.check_tensor_header(path)
    with _named(path):
        file: Any = stack.enter_context(safe_open(path, framework="pt"))
        names: list[str] = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        firsts = dict.fromkeys(names, 0)
        if prefix is not None:
            metadata: Any = json.loads((file.metadata() or {})["DCP_SHARDING_INFO"])
            offsets = {name: [int(offset) for offset in metadata[name]["saved_offsets"]] for name in names}
            for name, shape in shapes.items():
                if not name.startswith(prefix) or len(offsets[name]) != len(shape) or any(offsets[name][1:]):
                    raise _misfit(path, f"`{name}` does not consist of rows")
            firsts = {name: offsets[name][0] if offsets[name] else 0 for name in names}
        dtypes = {name: str(file.get_slice(name).get_dtype()) for name in names}
    return [_Chunk(path, file, name, firsts[name], shapes[name], dtypes[name]) for name in names]


def _check_fit(name: str, shape: tuple[int, ...], chunks: list[_Chunk], resume: Path) -> None:
    """Checks that chunks are all rows of a tensor, each once, and sorts them.

    Raises:
        DamagedError: a row is missing or there twice, or a chunk has another shape or type.
    """
    chunks.sort(key=lambda chunk: chunk.first)
    expected, rows = 0, shape[0] if shape else 1
    for chunk in chunks:
        if chunk.shape[1:] != shape[1:] or len(chunk.shape) != len(shape):
            raise _misfit(chunk.path, f"`{name}` has the shape {chunk.shape}, expected rows of {shape}")
        if chunk.dtype != chunks[0].dtype:
            raise _misfit(chunk.path, f"`{name}` is {chunk.dtype}, and {chunks[0].dtype} in {chunks[0].path.name}")
        if chunk.first < expected:
            raise _misfit(chunk.path, f"rows {chunk.first} to {expected - 1} of `{name}` are in another file too")
        if chunk.first > expected or chunk.end > rows:
            break
        expected = chunk.end
    if not chunks or expected != rows:
        wrong = next((chunk for chunk in chunks if chunk.end > rows), None)
        if wrong:
            raise _misfit(wrong.path, f"`{name}` has row {wrong.end - 1}, expected {rows} rows")
        raise _misfit(resume, f"row {expected} of `{name}` is in no file")


def _misfit(path: Path, problem: str) -> DamagedError:
    return DamagedError(f"the files of the ranks don't fit together: {problem}", location=str(path), hint=_HINT)


@contextmanager
def _named(path: Path) -> Generator[None]:
    """Converts the errors of an invalid file to one that names it."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"invalid safetensors file: {error}", location=str(path), hint=_HINT) from error
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise DamagedError(
            f"the rows in this file are not named: {type(error).__name__}: {error}", location=str(path), hint=_HINT
        ) from error
