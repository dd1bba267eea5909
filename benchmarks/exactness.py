"""How exact is exact? Three tables of differences that should be zero, or rounding.

- 10 steps against 5 steps, a stop and 5 steps: weights and optimizer, bit for bit.
- One step dealt in other micro-batches: the largest difference of any weight, float32, no dropout.
- Logits of a step folder, ours against `transformers`, on real lines of the text, both families of words.

    python benchmarks/exactness.py TEXT [--results benchmarks/results/exactness.json]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

import unmask
from unmask.core.errors import Stopped
from unmask.training.display.plain import SilentDisplay
from unmask.training.loop import TrainState
from unmask.training.pretrain import launch, resume

SHAPE = [
    "model.num_hidden_layers=3",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.intermediate_size=96",
]
STAGES = "stage=[{until = '50%', max_seq_len = 64, batch_size = '4k tokens'}, {until = '100%', max_seq_len = 192, batch_size = '4k tokens'}]"
FIXED = [*SHAPE, STAGES, "data.tokenizer.kind=characters", "train.every.save=1 steps"]


class StopsAt(SilentDisplay):
    """Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, state: TrainState) -> None:
        if state.step == self._step:
            os.kill(os.getpid(), signal.SIGINT)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer of a run's latest step."""
    resume_folder = run / "latest" / "resume"
    return load_file(resume_folder / "weights.safetensors") | {
        f"optimizer {name}": tensor for name, tensor in load_file(resume_folder / "optimizer.safetensors").items()
    }


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], prefix: str = "") -> float:
    """The largest difference of any number whose tensor's name begins so."""
    assert first.keys() == second.keys()
    return max(float((first[n] - second[n]).abs().max()) for n in first if n.startswith(prefix))


def resumed(text: Path, folder: Path, precision: str) -> dict[str, Any]:
    """10 = 5 + a stop + 5, with dropout, across a change of stage."""
    fixed = [*FIXED, f"train.precision={precision}", "train.budget=10 steps", "model.mlp_dropout=0.1"]
    launch([text], recipe="tiny", out=folder / "whole", settings=fixed)
    try:
        launch([text], recipe="tiny", out=folder / "stopped", settings=fixed, display=StopsAt(5))
    except Stopped as stop:
        at = stop.step
    resume(folder / "stopped")
    whole, stopped = tensors(folder / "whole"), tensors(folder / "stopped")
    equal = all(torch.equal(whole[name], stopped[name]) for name in whole)
    return {"precision": precision, "stopped_at": at, "tensors": len(whole), "bit_identical": equal}


def accumulated(text: Path, folder: Path) -> list[dict[str, Any]]:
    """The same step in 1, 2, 4 and 8 micro-batches."""
    runs: dict[int, dict[str, torch.Tensor]] = {}
    for parts in (1, 2, 4, 8):
        settings = [*FIXED, "train.precision=float32", "train.budget=2 steps", "optimizer.kind=adam",
                    "optimizer.eps=1e-2", f"train.micro_batch_size={4400 // parts} tokens"]  # fmt: skip
        launch([text], recipe="tiny", out=folder / f"micro-{parts}", settings=settings)
        runs[parts] = {name: t for name, t in tensors(folder / f"micro-{parts}").items() if "optimizer" not in name}
    return [{"micro_batches": parts, "largest_difference": difference(runs[1], run)} for parts, run in runs.items()]


def parity(text: Path, folder: Path, kind: str) -> dict[str, Any]:
    """Largest difference of logits between `unmask` and `transformers` on 32 real lines."""
    pieces = ["data.tokenizer.kind=wordpiece", "data.tokenizer.vocab_size=1000"] if kind == "wordpiece" else []
    out = folder / f"parity-{kind}"
    launch([text], recipe="tiny", out=out, settings=[*FIXED, *pieces, "train.budget=30 steps"])
    model = unmask.load(out)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(out / "latest").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "latest")
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if len(line) > 20][:32]
    ids = [tokenizer(line)["input_ids"] for line in lines]
    encoded = [model.tokenizer.encode(line) for line in lines]
    ours = [model.tokenizer.add_special_tokens(one.ids, one.marks)[0].tolist() for one in encoded]
    mine = model.log_probabilities(ids, [list(range(len(one))) for one in ids])
    with torch.inference_mode():
        other = [theirs(torch.tensor([one])).logits[0].log_softmax(-1) for one in ids]
    largest = max(float((a - b).abs().max()) for a, b in zip(mine, other, strict=True))
    return {"tokenizer": kind, "lines": len(lines), "same_ids": ours == ids, "largest_difference": largest}


def main() -> int:
    """Run all three, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: dict[str, Any] = {
            "date": date.today().isoformat(),
            "command": f"python benchmarks/exactness.py {given.text.name}",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "resume": [resumed(given.text, folder / precision, precision) for precision in ("float32", "bfloat16")],
            "accumulation": accumulated(given.text, folder),
            "parity": [parity(given.text, folder, kind) for kind in ("characters", "wordpiece")],
        }
    print(json.dumps(found, indent=1))
    if given.results:
        given.results.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
