"""Measures how fast text becomes shards, relative to the tokenizers library on the same text in memory.

`fast` is `encode_batch_fast` on the documents, a million characters at a time, which gives ids only. `pass` is the
encoding of the same text by unmask: reading, NFC, ids, word and sentence marks, shards. `build` is all of `prepare`
with an existing tokenizer: statistics, split, `pass`, digests. Each is measured with one core and with all cores, in
turn in every round, on an otherwise idle machine. The best of all rounds is reported.

    python benchmarks/shards.py wiki.txt --results benchmarks/results/shards.json
    python benchmarks/shards.py wiki.txt --documents 1000000      also measures memory per document
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import tokenizers

from unmask.core.hardware import cores, processor_name
from unmask.core.version import __version__
from unmask.data.loader import StageLoader, build_sampler
from unmask.data.prepare import Build, build_in, prepare
from unmask.data.settings import DataConfig
from unmask.data.sources import open_source
from unmask.tokenization.settings import ByteBpeConfig, CharacterConfig, UnigramConfig, WordPieceConfig
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.tokenizer import train_tokenizer as train
from unmask.tokenization.words import detect_words

KINDS = {"wordpiece": WordPieceConfig(), "bpe": ByteBpeConfig(), "unigram": UnigramConfig()}
SAMPLE_CHARACTERS = 5_000_000
BATCH_CHARACTERS = 1_000_000


def batches(texts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def one_round(folder: Path, threads: int) -> dict[str, float]:
    """Return the seconds of each method and the tokens, in this process and its workers."""
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    inner.encode_special_tokens = True
    files = sorted((folder / "texts").iterdir())
    tokens = 0
    start = time.perf_counter()
    seconds = 0.0
    for file in files:
        documents = file.read_text(encoding="utf-8").split("\n\n")
        for batch in batches(documents):
            start = time.perf_counter()
            encoded = inner.encode_batch_fast(batch, add_special_tokens=False)
            seconds += time.perf_counter() - start
            tokens += sum(map(len, encoded))
    at: dict[tuple[str, float], float] = {}
    settings = DataConfig()
    source = open_source([str(folder / "texts")], settings)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        work = Path(place) / "work"
        work.mkdir()
        start = time.perf_counter()
        build_in(
            work,
            Build(
                Path(place) / "text",
                source,
                settings,
                lambda stage, share: at.setdefault((stage, share), time.perf_counter()),
                Tokenizer.load(folder / "tokenizer"),
                threads,
            ),
        )
        build = time.perf_counter() - start
    return {
        "tokens": tokens,
        "fast": seconds,
        "pass": at["tokenizing", 1.0] - at["reading the text", 1.0],
        "build": build,
    }


def measure(text: Path, kind: str, rounds: int) -> dict[str, Any]:
    """Return the figures of one text."""
    whole = text.read_text(encoding="utf-8")
    tokenizer = train([whole[:SAMPLE_CHARACTERS]], KINDS[kind])
    figures: dict[str, Any] = {
        "text": text.name,
        "megabytes": round(len(whole.encode()) / 1e6, 1),
        "tokenizer": kind,
        "words": detect_words(whole[:1_000_000]),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save(folder / "tokenizer")
        (folder / "texts").mkdir()
        documents = whole.split("\n\n")
        count = 4 * cores()
        for number in range(count):
            part = documents[number * len(documents) // count : (number + 1) * len(documents) // count]
            (folder / "texts" / f"{number:03d}.txt").write_text("\n\n".join(part), encoding="utf-8")
        del whole, documents
        best: dict[int, dict[str, float]] = {}
        for _ in range(rounds):
            for threads in sorted({1, cores()}):
                environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
                command = [sys.executable, __file__, str(folder), "--one", str(threads)]
                output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
                result = json.loads(output)
                known = best.setdefault(threads, result)
                best[threads] = {key: min(known[key], result[key]) for key in result}
    for threads, result in best.items():
        tokens = result["tokens"]
        figures[f"{threads} cores" if threads > 1 else "1 core"] = {
            **{f"{way} tokens/s": round(tokens / result[way]) for way in ("fast", "pass", "build")},
            **{f"{way} MB/s": round(figures["megabytes"] / result[way], 2) for way in ("fast", "pass", "build")},
            "pass ÷ fast": round(result["fast"] / result["pass"], 2),
            "build ÷ fast": round(result["fast"] / result["build"], 2),
        }
    return figures


def peak_of(lines: Path, cache: Path) -> int:
    """Return the peak of anonymous memory, in bytes, of building and reading a corpus of these lines."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            peak[0] = max(peak[0], 1024 * int(status.partition("RssAnon:")[2].split()[0]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    settings = DataConfig(document="line", tokenizer=CharacterConfig(), drop_duplicates=True)
    corpus = prepare(open_source([str(lines)], settings), settings, cache)
    for length in (16, 32, 64):
        sampler = build_sampler(corpus.train, corpus.tokenizer, length, 1)
        StageLoader(corpus.train, corpus.tokenizer, sampler, 4096).step(0, 4096, 0, 1)
    done.set()
    watcher.join()
    return peak[0]


def memory(documents: int) -> dict[str, Any]:
    """Return the memory of builds with this many one-word lines, and with three times as many."""
    peaks: list[int] = []
    with tempfile.TemporaryDirectory() as name:
        for count in (documents, 3 * documents):
            lines = Path(name) / f"{count}.txt"
            with lines.open("w", encoding="utf-8") as file:
                file.writelines(f"w{number}\n" for number in range(count))
            command = [sys.executable, __file__, str(lines), "--peak", str(Path(name) / str(count))]
            peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    each = (peaks[1] - peaks[0]) / (2 * documents)
    return {"documents": [documents, 3 * documents], "peak bytes": peaks, "bytes per document": round(each, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["wordpiece"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--documents", type=int, default=0)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(one_round(chosen.texts[0], chosen.one)))
        return
    if chosen.peak:
        print(peak_of(chosen.texts[0], chosen.peak))
        return
    results = {
        "date": date.today().isoformat(),
        "machine": processor_name(),
        "cores": cores(),
        "python": platform.python_version(),
        "unmask": __version__,
        "tokenizers": metadata.version("tokenizers"),
        "command": " ".join(["python", "benchmarks/shards.py", *(Path(word).name for word in sys.argv[1:])]),
        "speed": [],
    }
    for text in chosen.texts:
        for kind in chosen.kinds:
            results["speed"].append(measure(text, kind, chosen.rounds))
            print(json.dumps(results["speed"][-1], ensure_ascii=False, indent=2), flush=True)
    if chosen.documents:
        results["memory"] = memory(chosen.documents)
        print(json.dumps(results["memory"]))
    if chosen.results:
        chosen.results.write_text(json.dumps(results, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
