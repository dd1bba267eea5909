"""Device, precision, threads and ranks of a process, sums over ranks, and comparisons of ranks.

Device, precision and threads are chosen from facts about the machine, never from timing or load. They are recorded in
env.json. Before the ranks compute together, they exchange facts and errors as JSON in the key-value store of their
launch, so that a rank that differs, fails or is missing ends all of them with a message instead of a hang.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

import torch
import torch.distributed as distributed
from torch import Tensor

from unmask.core.errors import Interrupted, RecipeError, RunError, Stopped, UnmaskError
from unmask.core.files import digest
from unmask.core.format import masked
from unmask.core.hardware import cores, has_bfloat16, keep_freed_memory, processor_name
from unmask.core.version import __version__

Precision = Literal["auto", "bfloat16", "float32"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Facts = Mapping[str, Any]
"""JSON values by name, which are equal on all ranks."""

JOIN_SECONDS: Final = 600.0  # how long a rank waits for the others at the start, by default
# A rank waits this long in a reduction. Rank 0 alone writes checkpoints, and the other ranks wait for it.
COLLECTIVE_SECONDS: Final = 1800.0
_PREPARATION_SECONDS: Final = 7 * 86_400.0  # one rank may tokenize a long text, and the others wait for it
# Between two requests of a rank that waits: a tenth of the time it has waited, within these limits. So 1,000 ranks that
# wait for a text send 1,000 small requests per second. The store's own wait() prints a warning whenever it times out,
# and without timeouts Python would handle no signal meanwhile.
_POLL_SECONDS: Final = (0.02, 1.0)
_REASON_SECONDS: Final = 1.0  # that an error of another rank may take to arrive
_VERDICT_SECONDS: Final = 5.0  # that rank 0 may take to say which ranks are missing
_ANNOUNCE_SECONDS: Final = 10.0  # to tell an error to ranks that were not joined yet


@dataclass(frozen=True)
class DistributedContext:
    """Device, precision, threads and rank of this process."""

    device: torch.device
    precision: Literal["bfloat16", "float32"]
    threads: int
    rank: int = 0
    ranks: int = 1
    local_ranks: int = 1  # ranks of this machine, which share its memory

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context that computes matrix products in the run's precision; all else stays float32."""
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return each value summed over all ranks, the same on every rank. Counts are exact up to 2**53."""
        if self.ranks == 1:
            return list(values)
        total_N = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        distributed.all_reduce(total_N)
        return total_N.tolist()

    def sum_tensors(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return each tensor summed over all ranks, which have the same names and shapes."""
        if self.ranks > 1:
            for name in sorted(tensors):
                distributed.all_reduce(tensors[name])
        return tensors

    def largest(self, value: int) -> int:
        """Return the largest of the values of all ranks."""
        if self.ranks == 1:
            return value
        largest = torch.tensor(int(value), device=self.device)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        return int(largest)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.ranks > 1:
            distributed.barrier()

    def describe(self) -> dict[str, Any]:
        """Return the facts on which results depend bit by bit; a resumed run requires the same ones."""
        return {
            "device": self.device.type,
            "device_name": torch.cuda.get_device_name() if self.device.type == "cuda" else processor_name(),
            "precision": self.precision,
            "threads": self.threads,
            "ranks": self.ranks,
        }


def init_distributed(
    precision: Precision = "auto",
    threads: int | Literal["auto"] = "auto",
    device: Device = "auto",
    *,
    facts: Mapping[str, Facts] | None = None,
    join_seconds: float = JOIN_SECONDS,
) -> DistributedContext:
    """Choose device and precision, start the process group under torchrun, and set threads and determinism.

    "auto" is a CUDA device if there is one, otherwise the CPU. Apple's GPU ("mps") has to be requested: it is
    implemented but untested.

    Args:
        precision: data type of matrix products.
        threads: number of CPU threads.
        device: device type.
        facts: what must be equal on all ranks besides versions and device, by topic.
        join_seconds: how long to wait for the other ranks.

    Raises:
        RecipeError: there are more threads than cores, the CPU has no bfloat16 instructions, or the device is missing.
        RunError: a rank is missing, has failed, or differs from rank 0.
    """
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank, local_ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    kind = _device_kind(device, ranks)
    cuda = kind == "cuda"
    resolved = _resolve_precision(precision, kind)
    num_threads = max(1, cores() // local_ranks) if threads == "auto" else threads
    if not 1 <= num_threads <= cores():
        raise RecipeError(
            f"invalid threads: got {num_threads}, expected 1 to {cores()}",
            location="train.threads",
            hint=f'choose 1 to {cores()}, or "auto"',
        )
    torch_device = torch.device("cuda", local_rank) if cuda else torch.device(kind)
    if cuda:
        torch.cuda.set_device(torch_device)
    if ranks > 1 and not distributed.is_initialized():
        versions = {"unmask": __version__, "torch": torch.__version__}
        machine = {"device": kind, "precision": resolved}
        _join(rank, ranks, join_seconds, {"versions": versions, "machine": machine, **(facts or {})})
        timeout = timedelta(seconds=COLLECTIVE_SECONDS)
        backend = "nccl" if cuda else "gloo"
        assert _launch is not None
        with lost_ranks_explained():
            distributed.init_process_group(backend, store=_launch.store, rank=rank, world_size=ranks, timeout=timeout)
        atexit.register(_destroy_process_group)
    torch.set_num_threads(num_threads)
    if kind == "cpu":
        keep_freed_memory()
        # Only the CPU guarantees bit-identical results. Filling uninitialized memory only costs time.
        # use_deterministic_algorithms(True) would also load torch's compiler, to configure it, and take a second.
        torch.set_deterministic_debug_mode("error")
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    return DistributedContext(torch_device, resolved, num_threads, rank, ranks, local_ranks)


def _resolve_precision(precision: Precision, kind: str) -> Literal["bfloat16", "float32"]:
    """Return the precision that a recipe's precision means on a device type."""
    fast = kind == "cuda" or (kind == "cpu" and has_bfloat16())
    if precision == "bfloat16" and not fast:
        raise RecipeError(
            "this CPU has no bfloat16 instructions, so bfloat16 would be slower than float32"
            if kind == "cpu"
            else "bfloat16 is untested on this device",
            location="train.precision",
            hint='use "float32" or "auto"',
        )
    return "bfloat16" if fast and precision != "float32" else "float32"


def _destroy_process_group() -> None:
    """Destroy the process group: its threads may abort the process when the interpreter exits."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


# Ranks of one launch ------------------------------------------------------------------------------------------------


class _Launch:
    """The key-value store that the ranks of a launch share."""

    def __init__(self, store: Any, rank: int, ranks: int) -> None:
        self.store, self.rank, self.ranks = store, rank, ranks
        self._comparisons = 0

    def announce(self, error: BaseException) -> None:
        """Tell the other ranks why this rank ends, unless another rank was first."""
        text, where = (error.message, error.location) if isinstance(error, UnmaskError) else (_in_one_line(error), "")
        reason = f"rank {self.rank} on {socket.gethostname()} stopped: {text}" + (f" ({where})" if where else "")
        with contextlib.suppress(RuntimeError):  # the store may have ended with rank 0
            self.store.compare_set(_FAILED, "", reason)
            for number in (self._comparisons - 1, self._comparisons):  # at which other ranks may wait
                for key in (f"{number}-complete", f"{number}-verdict"):
                    self.store.compare_set(key, "", _FAILED)

    def reason(self, seconds: float = 0.0) -> str:
        """Return why another rank ended, or "" if none says so within some seconds."""
        return self._wait(_FAILED, seconds)

    def compare(self, topics: Mapping[str, Facts], seconds: float) -> None:
        """Wait for all ranks, and compare their facts with those of rank 0.

        Rank 0 reads the facts of all ranks, and the others read what it found: some requests of each rank, however long
        they wait.

        Raises:
            RunError: on every rank: a rank is missing, has failed, or differs.
        """
        number = self._comparisons
        self._comparisons += 1
        texts = {topic: json.dumps(dict(facts), default=str) for topic, facts in topics.items()}
        for topic, text in texts.items():  # read only if they differ: a recipe of 1,000 ranks is some MB
            self.store.set(f"{number}-{topic}-{self.rank}", text)
        self.store.set(f"{number}-{self.rank}", json.dumps({topic: digest(text) for topic, text in texts.items()}))
        if self.store.add(f"{number}-count", 1) == self.ranks:
            self.store.compare_set(f"{number}-complete", "", _EQUAL)
        if self.rank == 0:
            error = self._judge(number, list(texts), seconds)
            verdict = json.dumps([error.message, error.hint]) if error else _EQUAL
            verdict = self.store.compare_set(f"{number}-verdict", "", verdict).decode()
        else:
            verdict = self._wait(f"{number}-verdict", seconds + _VERDICT_SECONDS)
        if verdict == _FAILED:
            raise self._failed()
        if not verdict:
            raise _missing(self.ranks, seconds, self._first_absent(number))  # rank 0, or it came later than this rank
        if verdict != _EQUAL:
            message, hint = json.loads(verdict)
            raise RunError(message, location=_RANKS, hint=hint)

    def _judge(self, number: int, topics: Sequence[str], seconds: float) -> RunError | None:
        """Wait for the facts of all ranks; return what is wrong with them, or None."""
        keys = [f"{number}-{rank}" for rank in range(self.ranks)]
        complete = self._wait(f"{number}-complete", seconds)
        if complete == _FAILED:
            return self._failed()
        if not complete:
            return _missing(self.ranks, seconds, self._absent(number))
        digests = [json.loads(value) for value in self.store.multi_get(keys)]
        for rank, other in enumerate(digests):
            if other.keys() != digests[0].keys():
                return RunError(
                    f"rank {rank} runs another command than rank 0, or doesn't see its files",
                    location=_RANKS,
                    hint="start all ranks with the same command, on a disk that all of them see",
                )
        for topic in topics:
            for rank, other in enumerate(digests):
                if other[topic] != digests[0][topic]:
                    first, there = (json.loads(self.store.get(f"{number}-{topic}-{each}")) for each in (0, rank))
                    return _differing(topic, rank, first, there)
        return None

    def _absent(self, number: int) -> list[int]:
        """Return the ranks that have not begun a comparison."""
        return [rank for rank in range(self.ranks) if not self.store.check([f"{number}-{rank}"])]

    def _first_absent(self, number: int) -> list[int]:
        """Return the first rank that has not begun a comparison, if any, after some requests."""
        low, high = 0, self.ranks
        while high - low > 1:
            middle = (low + high) // 2
            is_complete = self.store.check([f"{number}-{rank}" for rank in range(low, middle)])
            low, high = (middle, high) if is_complete else (low, middle)
        return [] if self.store.check([f"{number}-{low}"]) else [low]

    def _failed(self) -> RunError:
        return RunError(self.reason(), location=_RANKS, hint="fix what that rank reports, and start all ranks again")

    def _wait(self, key: str, seconds: float) -> str:
        """Return the value of a key as soon as it is set, or "" if it isn't within some seconds."""
        begin = time.monotonic()
        while not self.store.check([key]):
            waited = time.monotonic() - begin
            if waited >= seconds:
                return ""
            time.sleep(min(max(waited / 10, _POLL_SECONDS[0]), _POLL_SECONDS[1], seconds - waited))
        return self.store.get(key).decode()


def _in_one_line(error: BaseException) -> str:
    """Return the class and the first line of an error."""
    lines = masked(str(error)).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".removesuffix(": ")


_launch: _Launch | None = None  # of this process, which belongs to one launch
_FAILED: Final = "failed"  # key of the reason, and value of a key that a failed rank would have set
_EQUAL: Final = "equal"
_RANKS: Final = "the ranks of this launch"


def _join(rank: int, ranks: int, seconds: float, topics: Mapping[str, Facts]) -> None:
    """Connect to the store of the launch and compare the ranks.

    Raises:
        RunError: the store can't be reached, or a rank is missing, has failed, or differs.
    """
    launch = _connect(rank, ranks, seconds)
    with lost_ranks_explained():
        launch.compare(topics, seconds)


def _connect(rank: int, ranks: int, seconds: float) -> _Launch:
    """Return the launch that this process belongs to.

    Raises:
        RunError: its store can't be reached, or torchrun may change the number of ranks.
    """
    global _launch
    if _launch is None:
        _require_fixed_ranks()
        try:
            meet: Any = distributed.rendezvous  # pyright: ignore[reportPrivateImportUsage]
            store, _, _ = next(meet("env://", timeout=timedelta(seconds=seconds)))
        except (RuntimeError, ValueError, OSError) as error:  # a variable is missing, or the address doesn't answer
            address = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
            raise RunError(
                f"rank {rank} of {ranks} can't reach the other ranks: {str(error).splitlines()[0]}",
                location=f"MASTER_ADDR and MASTER_PORT: {address}",
                hint="start the ranks with torchrun, and check that its --rdzv-endpoint can be reached from here",
            ) from error
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        prefixed: Any = distributed.PrefixStore  # pyright: ignore[reportPrivateImportUsage]
        _launch = _Launch(prefixed(f"unmask-{restarts}", store), rank, ranks)
    return _launch


def _require_fixed_ranks() -> None:
    """Refuse `torchrun --nnodes MIN:MAX`.

    When a machine comes or goes, torchrun starts the ranks again, but TORCHELASTIC_RESTART_COUNT stays the same. The
    ranks would then read the facts and errors of those before them. The range is not in the environment, but in the
    command of torchrun, which Linux shows, or in PET_NNODES.

    Raises:
        RunError: the number of machines is a range.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    command = list[str]()
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
    given = [os.environ.get("PET_NNODES", "")]
    given += [argument.removeprefix("--nnodes=") for argument in command if argument.startswith("--nnodes=")]
    given += [value for name, value in pairwise(command) if name == "--nnodes"]
    least, _, most = given[-1].partition(":")
    if most and least != most:
        raise RunError(
            f"a number of machines that changes is not supported: --nnodes {given[-1]}",
            location="torchrun",
            hint="give one number, such as --nnodes 2; for another number later, start again with --resume",
        )


def _missing(ranks: int, seconds: float, missing: Sequence[int]) -> RunError:
    named = f": {', '.join(map(str, missing[:5]))}{', …' * (len(missing) > 5)} did not come" if missing else ""
    return RunError(
        f"the {ranks} ranks did not meet within {seconds:g} s{named}",
        location=_RANKS,
        hint="read the messages of the missing ranks, start all of them, or set a longer train.join_timeout",
    )


def _differing(topic: str, rank: int, first: Facts, there: Facts) -> RunError:
    """Return the error for a rank whose facts differ from those of rank 0."""
    name = next(name for name in {**first, **there} if first.get(name) != there.get(name))
    one, other = (repr(facts[name]) if name in facts else "nothing" for facts in (first, there))
    return RunError(
        f"rank {rank} differs from rank 0 in the {topic}: `{name}` is {one} on rank 0 and {other} on rank {rank}",
        location=_RANKS,
        hint="start all ranks with the same version of unmask, the same command, and the same files",
    )


def compare_ranks(context: DistributedContext, topics: Mapping[str, Facts]) -> None:
    """Wait for all ranks, however long one of them prepares the text, and compare facts with those of rank 0.

    Raises:
        RunError: a rank has failed or differs; the same error on every rank names it.
    """
    if context.ranks > 1 and _launch is not None:
        with lost_ranks_explained():
            _launch.compare(topics, _PREPARATION_SECONDS)


@contextmanager
def ending_together() -> Generator[None]:
    """Tell the other ranks why this one ends, by an error or an interrupt; they end with a message that names it."""
    try:
        with lost_ranks_explained():
            yield
    except (Interrupted, Stopped):  # all ranks stop together after the same step
        raise
    except (Exception, KeyboardInterrupt) as error:
        rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if ranks > 1:
            with contextlib.suppress(RunError):
                _connect(rank, ranks, _ANNOUNCE_SECONDS).announce(error)
        raise


@contextmanager
def lost_ranks_explained() -> Generator[None]:
    """Convert the error of a lost connection to the error of the rank that ended.

    Raises:
        RunError: another rank ended while this one waited for it.
    """
    try:
        yield
    except RuntimeError as error:
        if _launch is None or not _is_lost_connection(error):
            raise
        reason = ""
        with contextlib.suppress(RuntimeError):
            reason = _launch.reason(_REASON_SECONDS)
        lost = f"rank {_launch.rank} lost the connection to another rank, which ended or was killed"
        raise RunError(
            f"{reason or lost}; the connection ended with {_in_one_line(error)}",
            location=_RANKS,
            hint="read the message of that rank, then start all ranks again with --resume",
        ) from error


def _is_lost_connection(error: RuntimeError) -> bool:
    """Return whether a collective operation failed; gloo's errors have no class of their own."""
    text = str(error)
    return isinstance(error, distributed.DistError) or any(
        part in text for part in ("gloo", "Connection closed by peer", "Connection reset by peer")
    )


# Device ---------------------------------------------------------------------------------------------------------------


def _device_kind(device: Device, ranks: int) -> Literal["cpu", "cuda", "mps"]:
    """Return the device type that a recipe's device means on this machine."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    is_available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available() and ranks == 1,
    }
    if not is_available[device]:
        message = (
            "several ranks on Apple's GPU are not supported"
            if device == "mps" and ranks > 1
            else f"there is no {device} device"
        )
        raise RecipeError(message, location="train.device", hint='use "auto" or "cpu"')
    return device


def device_note(context: DistributedContext) -> str:
    """Return a note if Apple's GPU is used or left unused, otherwise ""."""
    if context.device.type == "mps":
        return "Apple's GPU (mps) is untested: watch the loss, and expect no bit-identical resume"
    if context.device.type == "cpu" and torch.backends.mps.is_available():
        return 'the GPU (mps) is not used, because it is untested; use it with --set train.device="mps"'
    return ""


def load_warning(context: DistributedContext) -> str:
    """Return a warning if the cores were busy in the last minute: two threads on two busy cores are slower than one."""
    if context.device.type != "cpu" or context.threads == 1 or not hasattr(os, "getloadavg"):
        return ""
    busy = os.getloadavg()[0]
    if busy < 0.7 * cores():
        return ""
    return (
        f"{busy:.1f} of {cores()} cores were busy in the last minute; if other processes go on, the run will be "
        "slower, and --threads 1 may be faster"
    )


def matmul_rate(shapes: Iterable[tuple[int, int, int]], context: DistributedContext, seconds: float = 0.15) -> float:
    """Measure the FLOP/s of matrix products of these shapes (rows, inner, columns)."""
    dtype = torch.bfloat16 if context.precision == "bfloat16" else torch.float32
    pairs = [
        (torch.randn(m, k, device=context.device, dtype=dtype), torch.randn(k, n, device=context.device, dtype=dtype))
        for m, k, n in shapes
    ]
    work = sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in pairs)

    def run() -> float:
        begin = time.perf_counter()
        for a, b in pairs:
            torch.mm(a, b)
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        elif context.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter() - begin

    run()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        times.append(run())
    return work / min(times)


def differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """Return the facts of this machine that differ from those with which a run was started."""
    names = sorted(set(now) | set(then))
    return [
        f"{name}: {then.get(name)!r} at the start, {now.get(name)!r} now"
        for name in names
        if now.get(name) != then.get(name)
    ]
