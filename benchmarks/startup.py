"""How long does a run take to start on a large text, after its first start?

The text is repeated, in another order of its documents each time, to a file of `--bytes`. A run of a tiny model is
started on it, which reads the text, trains a BPE tokenizer and writes the token shards. A second run is started by two
ranks (torchrun, gloo). Then both are resumed, by one process and by two ranks, and once with `--verify`. Measured are
the seconds from the start of the command to the start of training and to the end of its first step, in each rank.
Without `--keep` all files are deleted.

    python benchmarks/startup.py enwiki/train.txt.gz --results benchmarks/results/startup.json
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

SETTINGS = [
    "data.tokenizer={kind = 'bpe', vocab_size = 2000, max_train_chars = 2_000_000}", "train.keep_best=false",
    "model.num_hidden_layers=1", "model.hidden_size=32", "model.num_attention_heads=2", "model.intermediate_size=48",
    "stage=[{until = '100%', max_seq_len = 64, batch_size = '1024 tokens'}]", "train.threads=1", "train.budget=2 steps",
]  # fmt: skip


def write_text(source: Path, target: Path, size: int) -> None:
    """Write the documents of a text in a new order each time, until the file has this size."""
    data = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
    documents = [document.strip() for document in data.decode().split("\n\n") if document.strip()]
    draw = random.Random(1)
    with target.open("w", encoding="utf-8") as file:
        while target.stat().st_size < size:
            draw.shuffle(documents)
            for document in documents:
                file.write(document + "\n\n")
                if file.tell() >= size:
                    break
            file.flush()


def child(texts: list[str], run: str, *, verify: bool) -> None:
    """Start or resume the run in this process and print the seconds of this rank."""
    from unmask.training.display import Display
    from unmask.training.loop import TrainState
    from unmask.training.pretrain import launch, resume

    begin = float(os.environ["STARTUP_BEGIN"])
    seconds: dict[str, float] = {}

    class Timer(Display):
        def train_start(self, *_: Any) -> None:
            seconds["training starts"] = round(time.time() - begin, 2)

        def step(self, state: TrainState) -> None:
            seconds.setdefault("first step done", round(time.time() - begin, 2))

    if texts:
        launch([*texts], recipe="tiny", out=run, settings=SETTINGS, display=Timer())
    else:
        resume(run, budget="+2 steps", display=Timer(), verify=verify)
    print(json.dumps({"rank": int(os.environ.get("RANK", "0")), **seconds}), flush=True)


def measure(environment: Mapping[str, str], arguments: list[str], ranks: int = 1) -> list[dict[str, float]]:
    """The seconds of each rank of a child."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*launcher, __file__, "--child", *arguments],
        env={**os.environ, **environment, "STARTUP_BEGIN": str(time.time())},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = re.findall(r"{[^}]*}", done.stdout)  # two ranks may write at once
    return sorted(map(json.loads, found), key=lambda line: line["rank"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("--bytes", type=int, default=2_000_000_000)
    parser.add_argument("--repeats", type=int, default=3, help="Resumes of each kind.")
    parser.add_argument("--keep", type=Path, help="Folder to work in and to leave; default: a temporary one.")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--verify", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        child([str(chosen.text)] if chosen.text else [], chosen.folder, verify=chosen.verify)
        return
    from unmask.core.hardware import cores, processor_name
    from unmask.core.version import __version__

    with tempfile.TemporaryDirectory() as name:
        folder = chosen.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        text = folder / "text.txt"
        runs = {ranks: ["--folder", str(folder / f"run-{ranks}")] for ranks in (1, 2)}
        if not text.exists():
            write_text(chosen.text, text, chosen.bytes)
        environment = {"UNMASK_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        results: dict[str, Any] = {
            "date": date.today().isoformat(),
            "machine": processor_name(),
            "cores": cores(),
            "python": platform.python_version(),
            "unmask": __version__,
            "command": " ".join(["python", "benchmarks/startup.py", *(Path(word).name for word in sys.argv[1:])]),
            "text bytes": text.stat().st_size,
            "seconds": {},
        }

        def record(what: str, lines: list[dict[str, float]]) -> None:
            results["seconds"].setdefault(what, []).append(lines)
            print(what, json.dumps(lines), f"load {os.getloadavg()[0]:.1f}", flush=True)

        names = {1: "one process", 2: "two ranks"}
        for ranks, run in runs.items():
            if not Path(run[1]).exists():
                record(f"start, {names[ranks]}", measure(environment, [str(text), *run], ranks))
        for _ in range(chosen.repeats):
            for ranks, run in runs.items():
                record(f"resume, {names[ranks]}", measure(environment, run, ranks))
        record("resume with --verify, one process", measure(environment, [*runs[1], "--verify"]))
    if chosen.results:
        chosen.results.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
