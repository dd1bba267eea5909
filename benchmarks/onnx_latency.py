"""Time of the ONNX graph beside PyTorch and unmask: one text at a time and a batch, one thread, in turns.

    python benchmarks/onnx_latency.py runs/english --text enwiki/valid.txt --results benchmarks/results/onnx.json

The texts are cut to the same number of tokens, so nothing is padded. All of them compute logits at every position, as
transformers.js does; "unmask, one mask" computes them at one position of each text only. Times are processor time,
which other processes change little, and medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers

from unmask.core.hardware import processor_name
from unmask.core.types import SPECIAL, Sample, logits_at, pack
from unmask.core.version import __version__
from unmask.hub.from_hf import load
from unmask.hub.onnx import GRAPH, QUANTIZED, open_session, run_session
from unmask.hub.to_hf import export

SHAPES = ((1, 32), (1, 128), (16, 128))  # texts, tokens
ROUNDS = 15


def main() -> int:
    """Measure all shapes, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="text whose tokens are processed")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results", type=Path, help="JSON file to write")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        began = time.process_time()
        exported = export(given.model, folder, format="onnx", int8=True)
        seconds = time.process_time() - began
        model = load(folder)
        peer = getattr(transformers, exported.architecture).from_pretrained(folder, dtype=torch.float32).eval()
        sessions = [open_session(folder / name) for name in (GRAPH, QUANTIZED)]
        ids = model.tokenizer.encode(given.text.read_text(encoding="utf-8")[:200_000]).ids
        rows: list[dict[str, Any]] = []
        for texts, tokens in SHAPES:
            length = min(tokens, model.context)
            batch_BS = ids[: texts * length].reshape(texts, length)
            packed = pack([Sample(row, np.full(length, SPECIAL, np.uint8)) for row in batch_BS])
            inputs = {"input_ids": torch.from_numpy(batch_BS), "attention_mask": torch.ones(texts, length).long()}
            every, one = torch.arange(texts * length), torch.arange(texts) * length + length // 2

            def by_session(number: int, batch: Any = batch_BS) -> Callable[[], object]:
                return lambda: run_session(sessions[number], list(batch), 0)

            def by_unmask(positions: Any, batch: Any = packed) -> Callable[[], object]:
                return lambda: logits_at(model.encoder, model.head, batch, positions)

            work: dict[str, Callable[[], object]] = {
                "onnxruntime": by_session(0),
                "onnxruntime, int8": by_session(1),
                "transformers": lambda inputs=inputs: peer(**inputs).logits,
                "unmask": by_unmask(every),
                "unmask, one mask": by_unmask(one),
            }
            taken: dict[str, list[float]] = {name: [] for name in work}
            with torch.inference_mode():
                for turn in range(given.rounds + 2):  # two rounds to warm up
                    for name, run in work.items():
                        begin = time.process_time()
                        run()
                        if turn >= 2:
                            taken[name].append(time.process_time() - begin)
            milliseconds = {name: 1000 * median(times) for name, times in taken.items()}
            rows.append({"texts": texts, "tokens": length, "milliseconds": milliseconds})
    names = list(rows[0]["milliseconds"])
    print(f"| texts × tokens | {' | '.join(names)} |\n| --- |{' ---: |' * len(names)}")
    for row in rows:
        cells = " | ".join(f"{row['milliseconds'][name]:.2f} ms" for name in names)
        print(f"| {row['texts']} × {row['tokens']} | {cells} |")
    if given.results:
        whole = {
            "date": date.today().isoformat(),
            "command": f"python benchmarks/onnx_latency.py RUN --text {given.text.name} --rounds {given.rounds}",
            "unmask": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": {"processor": processor_name(), "threads": 1},
            "model": repr(replace(model, path="RUN")),
            "export_seconds": round(seconds, 1),
            "graph": asdict(exported.graph) if exported.graph else None,
            "rows": rows,
        }
        given.results.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
