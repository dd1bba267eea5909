"""CPU cores, CPU model and bfloat16 support, without importing torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor_line(name: str) -> str:
    """Return a field of /proc/cpuinfo; "" on other systems than Linux."""
    description = Path("/proc/cpuinfo")
    if not description.is_file():
        return ""
    for line in description.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""


def has_bfloat16() -> bool:
    """Return whether the CPU has bfloat16 instructions (avx512_bf16, amx_bf16); without them bfloat16 is slow."""
    return bool({"avx512_bf16", "amx_bf16"} & set(_processor_line("flags").split()))


def processor_name() -> str:
    """Return the name of the CPU model."""
    return _processor_line("model name") or platform.processor() or platform.machine()
