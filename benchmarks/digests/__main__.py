"""Digests every number that unmask computes, to show that a change of the code changed none.

The numbers are losses, weights, optimizer states and logs of short runs of all recipes, shards, vocabularies, masked
batches, evaluation sets, audits, random draws, schedules and plans.

    python benchmarks/digests --compare                         # with benchmarks/results/digests.json
    python benchmarks/digests --results before.json             # before your change, on your machine
    python benchmarks/digests --compare before.json             # after it
    python benchmarks/digests --only draws plans --compare      # a part, in seconds

One thread, one minute. With --compare the exit code is 1 if a digest differs. Processors and versions of PyTorch round
matrix products differently, so the stored digests hold for the machine that digests.json names.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "digests.json"
PARTS = ("golden", "runs", "shards", "masks", "audits", "models", "draws", "plans")
Digests = dict[str, dict[str, str]]  # part -> name -> digest

# torch and tokenizers read these when they are imported.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TERM": "dumb", "LC_ALL": "C.UTF-8"}


@contextlib.contextmanager
def temporary_home() -> Iterator[Path]:
    """Makes a directory the home, the cache and the working directory, and removes it at the end."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="digests-") as folder:
        os.environ |= {"HOME": folder, "XDG_CACHE_HOME": f"{folder}/cache", "TMPDIR": folder}
        tempfile.tempdir = None  # read TMPDIR again
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def compute(place: Path, parts: Sequence[str]) -> Digests:
    """Returns all digests of these parts."""
    import adapter
    import torch
    import values

    os.environ[adapter.CACHE_VARIABLE] = str(place / "cache" / "unmask")
    torch.set_num_threads(1)
    digests: Digests = {part: {} for part in parts}
    last, start = "", time.perf_counter()
    for part, name, digest in values.compute(place, parts):
        assert digests[part].get(name, digest) == digest, f"two values are named {name}"
        digests[part][name] = digest
        if (case := "/".join(name.split("/")[:2])) != last:
            print(f"{time.perf_counter() - start:7.1f} s  {case}", file=sys.stderr)
            last = case
    return digests


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Returns a line for each digest that differs, is missing or is new."""
    lines = [f"differs: {name}" for name in sorted(before.keys() & after.keys()) if before[name] != after[name]]
    lines += [f"missing: {name}" for name in sorted(before.keys() - after.keys())]
    return lines + [f"new: {name}" for name in sorted(after.keys() - before.keys())]


def flat(digests: Digests, parts: Sequence[str]) -> dict[str, str]:
    """Returns the digests of these parts that this machine can compute."""
    import values

    return {
        name: digest for part in parts for name, digest in digests.get(part, {}).items() if values.is_available(name)
    }


def groups(digests: Mapping[str, str]) -> dict[str, tuple[int, str]]:
    """Returns number and combined digest of each group; a name starts with its group."""
    found: dict[str, list[str]] = {}
    for name in sorted(digests):
        found.setdefault(name.partition("/")[0], []).append(f"{name} {digests[name]}")
    return {
        group: (len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]) for group, lines in found.items()
    }


def machine() -> dict[str, Any]:
    """Returns what the bits of a floating-point result depend on."""
    import torch

    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = (named or [processor])[0]
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"processor": processor, "cores": os.cpu_count(), "instructions": instructions}


def versions() -> dict[str, str]:
    """Returns the versions that the digests were computed with."""
    found = {"python": platform.python_version()}
    for name in ("torch", "numpy", "tokenizers", "rjieba", "SudachiPy", "SudachiDict-small"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str:
    """Returns the commit of the imported package, or an empty string outside a repository."""
    import unmask

    folder = Path(unmask.__file__).parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return ""


def write(path: Path, digests: Digests) -> None:
    """Writes digests with date, machine, versions and command."""
    content = {
        "date": date.today().isoformat(),
        "command": "python benchmarks/digests " + " ".join(sys.argv[1:]),
        "commit": commit(),
        **machine(),
        "versions": versions(),
        "count": sum(map(len, digests.values())),
        "digests": {part: dict(sorted(entries.items())) for part, entries in digests.items()},
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def report(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Prints a table of all groups: number of digests, how many changed, combined digest before and after."""
    old, new = groups(before), groups(after)
    print("| group | digests | changed | before | after |\n| --- | --- | --- | --- | --- |")
    for group in dict.fromkeys([*old, *new]):
        names = {name for name in {*before, *after} if name.partition("/")[0] == group}
        changed = sum(before.get(name) != after.get(name) for name in names)
        first, last = (f"`{table[group][1]}`" if group in table else "–" for table in (old, new))
        print(f"| {group} | {len(names)} | {changed} | {first} | {last} |")


def main() -> int:
    """Computes digests; writes them, compares them or prints one for each group."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/digests", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, metavar="FILE", help="JSON file to write.")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="?",
        const=RESULTS,
        metavar="FILE",
        help=f"JSON file to compare with ({RESULTS.name}).",
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS) + ".")
    options = parser.parse_args()
    stored = json.loads(options.compare.read_text(encoding="utf-8")) if options.compare else {}
    results = options.results.absolute() if options.results else None
    with temporary_home() as place:
        digests = compute(place, options.only)
    if results:
        write(results, digests)
    after = flat(digests, options.only)
    if not options.compare:
        for group, (count, digest) in groups(after).items():
            print(f"{digest}  {count:4}  {group}")
        return 0
    before = flat(stored["digests"], options.only)
    here = {**machine(), "versions": versions()}
    for name in here:
        if stored.get(name) != here[name]:
            print(f"note: {name}: {stored.get(name)} in {options.compare.name}, {here[name]} here", file=sys.stderr)
    report(before, after)
    lines = differences(before, after)
    print("\n".join(lines) or f"all {len(before)} digests are equal to those of {options.compare.name}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
