"""Do Ray and an object store change a byte? Prepares a text on a cluster of Ray, and trains from and to an S3 bucket.

- Ray: tokenizes a text by the local engine, and again by a cluster of two workers, of which one is killed at a task.
  All files of the two caches are compared.
- S3: trains on a local text without an interruption. Then trains on the same text in a bucket of a local S3 server
  (moto), with the run uploaded to the bucket, and ends it by SIGTERM after half of the steps. Meanwhile, the server
  stops for a second every other second. The local folder is deleted, the run is resumed from the bucket, and weights,
  optimizer and log are compared with those of the local run.

    python benchmarks/remote.py wiki.txt --results benchmarks/results/remote.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from unmask.checks.verify import CLOCKS
from unmask.core.files import file_digest
from unmask.core.hardware import processor_name
from unmask.core.version import __version__

STEPS = 40
SETTINGS = (
    "train.every={log = '1 steps', validate = '10 steps', save = '5 steps'}", "train.report=false", "train.threads=1",
    "stage=[{max_seq_len = 64, batch_size = '4_096 tokens'}]",
)  # fmt: skip
UNMASK = [sys.executable, "-m", "unmask"]


def run(command: list[str], environment: Mapping[str, str]) -> float:
    """Run a command and return how many seconds it took."""
    begin = time.monotonic()
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return round(time.monotonic() - begin, 1)


def run_half(command: list[str], folder: Path, environment: Mapping[str, str]) -> float:
    """Run a training command, end it by SIGTERM after half of its steps, and return how many seconds it took."""
    begin, log = time.monotonic(), folder / "log.jsonl"
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) > STEPS // 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    if process.returncode != os.EX_TEMPFAIL:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{err[-3000:]}")
    return round(time.monotonic() - begin, 1)


def free_port() -> int:
    """Return a port that no server uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Ray ------------------------------------------------------------------------------------------------------------------


def kill_a_busy_worker(cluster: int, killed: list[int], is_done: threading.Event) -> None:
    """Kill the first process of a session that is seen at a task of the build."""
    while not is_done.wait(0.05):
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                is_worker = entry.name.isdecimal() and os.getsid(int(entry.name)) == cluster
                if is_worker and b"_run_row" in (entry / "cmdline").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
                    killed.append(int(entry.name))
                    return


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of each file below a folder."""
    return {str(path.relative_to(folder)): file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def compare_ray(text: Path, folder: Path) -> dict[str, Any]:
    """Prepare a text locally and on a cluster of Ray, of which a worker is killed; return what came of it."""
    port = free_port()
    cluster = [str(Path(sys.executable).parent / "ray"), "start", "--head", f"--port={port}", "--num-cpus=2",
               "--include-dashboard=false", "--disable-usage-stats", "--block"]  # fmt: skip
    head = subprocess.Popen(cluster, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    killed, is_done = list[int](), threading.Event()
    try:
        for _ in range(600):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        time.sleep(5)  # the port answers before the workers can be used
        prepare = [*UNMASK, "data", "prepare", str(text), "--recipe", "tiny"]
        seconds = {"local": run(prepare, {"UNMASK_CACHE": str(folder / "local")})}
        killer = threading.Thread(target=kill_a_busy_worker, args=(head.pid, killed, is_done))
        killer.start()
        on_cluster = [*prepare, "--engine", "ray", "--address", "auto"]
        try:
            seconds["ray"] = run(on_cluster, {"UNMASK_CACHE": str(folder / "ray")})
        finally:
            is_done.set()
            killer.join()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGTERM)
        head.wait()
    made = {name: digests(folder / name) for name in ("local", "ray")}
    return {
        "bytes of text": text.stat().st_size, "files": len(made["local"]),
        "bytes of files": sum(path.stat().st_size for path in (folder / "local").rglob("*") if path.is_file()),
        "workers killed": len(killed), "seconds": seconds, "equal": made["local"] == made["ray"] != {},
    }  # fmt: skip


# S3 -------------------------------------------------------------------------------------------------------------------


@contextmanager
def server(port: int) -> Iterator[Any]:
    """Yield the process of moto's S3 server, which runs until the block ends."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/data.json", timeout=5):
                break
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


def pause(process: Any, seconds: float, is_done: threading.Event) -> None:
    """Stop the server again and again, so that requests wait."""
    while not is_done.wait(seconds):
        process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        process.send_signal(signal.SIGCONT)


def compare_s3(text: Path, folder: Path) -> dict[str, Any]:
    """Train from and to a bucket, lose the folder, resume from the bucket; compare with an uninterrupted local run."""
    import s3fs

    os.environ |= {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "example",
                   "AWS_DEFAULT_REGION": "us-east-1", "AWS_CONFIG_FILE": os.devnull,
                   "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip
    options = [word for setting in SETTINGS for word in ("--set", setting)]
    pretrain, cache = [*UNMASK, "pretrain"], {"UNMASK_CACHE": str(folder / "cache")}
    steps = ["--budget", f"{STEPS} steps"]
    local, copy = folder / "local-run", folder / "copy"
    seconds = {"local": run([*pretrain, str(text), *steps, "--out", str(local), *options], cache)}
    port = free_port()
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    with server(port) as process:
        store: Any = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
        store.mkdir("bucket")
        store.put(str(text), "bucket/texts/text.txt")
        address, upload = "s3://bucket/texts/text.txt", "s3://bucket/runs/copy"
        is_done = threading.Event()
        pauses = threading.Thread(target=pause, args=(process, 1.0, is_done))
        pauses.start()
        first = [*pretrain, address, *steps, "--out", str(copy), *options, "--set", f"train.upload={upload}"]
        try:
            seconds["first half, from and to the bucket"] = run_half(first, copy, cache)
        finally:
            is_done.set()
            pauses.join()
        objects = len(store.find("bucket/runs/copy"))
        shutil.rmtree(copy)
        shutil.rmtree(folder / "cache")
        os.chdir(folder)
        seconds["second half, resumed from the bucket"] = run([*pretrain, "--resume", upload, "--text", address], cache)
        final = {name.removeprefix("bucket/runs/copy/"): store.cat(name) for name in store.find("bucket/runs/copy")}
    resumed = folder / "runs" / "copy"
    paths = {name: resumed / name for name in final if (resumed / name).is_file()}
    uploaded = [name for name, path in paths.items() if path.read_bytes() == final[name]]
    return {"bytes of text": text.stat().st_size, "objects after half of the steps": objects, "objects": len(final),
            "objects equal to the local file": len(uploaded), "seconds": seconds,
            "objects unlike it": sorted(final.keys() - set(uploaded)),
            "differences": list(differences(local, resumed))}  # fmt: skip


def differences(first: Path, second: Path) -> Iterator[str]:
    """Yield what differs in the last checkpoints and the logs of two runs."""
    for name in ("model", "resume/weights", "resume/optimizer"):
        one, other = (load_file(each / "latest" / f"{name}.safetensors") for each in (first, second))
        if one.keys() != other.keys() or not all(torch.equal(tensor, other[key]) for key, tensor in one.items()):
            yield name
    logs = [[json.loads(line) for line in (each / "log.jsonl").read_text().splitlines()] for each in (first, second)]
    without = [[{key: line[key] for key in line if key not in CLOCKS} for line in log] for log in logs]
    if without[0] != without[1]:
        yield "log"


def main() -> int:
    """Run both parts, print what came of them, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text to tokenize and train on")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    given = parser.parse_args()
    facts = {"date": date.today().isoformat(), "command": " ".join(["python", *sys.argv]), "unmask": __version__}
    results: dict[str, Any] = {**facts, "processor": processor_name(), "steps": STEPS}
    out = given.results and given.results.absolute()
    with tempfile.TemporaryDirectory() as name:
        for part, compare in (("ray", compare_ray), ("s3", compare_s3)):
            (Path(name) / part).mkdir()
            results[part] = compare(given.text.absolute(), Path(name) / part)
            print(json.dumps({part: results[part]}, indent=1), flush=True)
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    is_same = results["ray"]["equal"] and results["ray"]["workers killed"] == 1 and not results["s3"]["differences"]
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
