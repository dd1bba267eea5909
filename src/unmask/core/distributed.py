"""Device, precision, threads and ranks of a process, and sums over ranks.

Device, precision and threads are chosen from facts about the machine, never from timing or load. They are recorded in
env.json.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from unmask.core.errors import RecipeError
from unmask.core.hardware import cores, has_bfloat16, keep_freed_memory, processor_name

Precision = Literal["auto", "bfloat16", "float32"]
Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True)
class DistributedContext:
    """Device, precision, threads and rank of this process."""

    device: torch.device
    precision: Literal["bfloat16", "float32"]
    threads: int
    rank: int = 0
    ranks: int = 1

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

    def sum_gradients(self, module: nn.Module) -> None:
        """Sum the gradients over all ranks; every rank has already divided by the counts of all ranks.

        A parameter that has a gradient on no rank, because the objective of a stage doesn't train it, gets none.
        """
        if self.ranks == 1:
            return
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        is_missing = [parameter.grad is None for parameter in parameters]
        # Every rank must reduce the same tensors. The last one counts the ranks that have a gradient.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        ranks_P = torch.tensor([not missing for missing in is_missing]).to(gradients[0])
        flat_N = torch.cat([*(gradient.reshape(-1) for gradient in gradients), ranks_P])
        distributed.all_reduce(flat_N)
        *summed, ranks_P = flat_N.split([*(gradient.numel() for gradient in gradients), len(parameters)])
        ranks = ranks_P.tolist() if any(is_missing) else [1.0] * len(parameters)  # reading them waits for a GPU
        for parameter, gradient, total, count in zip(parameters, gradients, summed, ranks, strict=True):
            parameter.grad = gradient.copy_(total.view_as(gradient)) if count else None

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
    precision: Precision = "auto", threads: int | Literal["auto"] = "auto", device: Device = "auto"
) -> DistributedContext:
    """Choose device and precision, start the process group under torchrun, and set threads and determinism.

    "auto" is a CUDA device if there is one, otherwise the CPU. Apple's GPU ("mps") has to be requested: it is
    implemented but untested.

    Raises:
        RecipeError: there are more threads than cores, the CPU has no bfloat16 instructions, or the device is missing.
    """
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank, local_ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    kind = _device_kind(device, ranks)
    cuda = kind == "cuda"
    torch_device = torch.device("cuda", local_rank) if cuda else torch.device(kind)
    if cuda:
        torch.cuda.set_device(torch_device)
    if ranks > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if cuda else "gloo")
        atexit.register(_destroy_process_group)
    available = max(1, cores() // local_ranks)
    num_threads = available if threads == "auto" else threads
    if not 1 <= num_threads <= cores():
        raise RecipeError(
            f"invalid threads: got {num_threads}, expected 1 to {cores()}",
            location="train.threads",
            hint=f'choose 1 to {cores()}, or "auto"',
        )
    torch.set_num_threads(num_threads)
    if kind == "cpu":
        keep_freed_memory()
        # Only the CPU guarantees bit-identical results. Filling uninitialized memory only costs time.
        # use_deterministic_algorithms(True) would also load torch's compiler, to configure it, and take a second.
        torch.set_deterministic_debug_mode("error")
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    fast = cuda or (kind == "cpu" and has_bfloat16())
    if precision == "bfloat16" and not fast:
        raise RecipeError(
            "this CPU has no bfloat16 instructions, so bfloat16 would be slower than float32"
            if kind == "cpu"
            else "bfloat16 is untested on this device",
            location="train.precision",
            hint='use "float32" or "auto"',
        )
    resolved = "bfloat16" if fast and precision != "float32" else "float32"
    return DistributedContext(device=torch_device, precision=resolved, threads=num_threads, rank=rank, ranks=ranks)


def _destroy_process_group() -> None:
    """Destroy the process group: its threads may abort the process when the interpreter exits."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


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
