"""Room card: what the machine is, told without PyTorch.

Comes in: nothing. Goes out: its cores, its processor. Called by: world, workers of the text.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor_line(name: str) -> str:
    """One field of Linux's description of the processor; empty elsewhere."""
    description = Path("/proc/cpuinfo")
    if not description.is_file():
        return ""
    for line in description.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself (avx512_bf16, amx_bf16); elsewhere it would be slow."""
    return bool({"avx512_bf16", "amx_bf16"} & set(_processor_line("flags").split()))


def processor_name() -> str:
    """What the processor calls itself."""
    return _processor_line("model name") or platform.processor() or platform.machine()
