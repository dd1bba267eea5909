"""Three tables of differences that should be zero or rounding errors.

- Resuming: 10 steps against 5 steps, a stop and 5 steps; weights and optimizer state must be bit-identical.
- Gradient accumulation: the same steps in other micro-batches; largest difference of a weight, float32, no dropout.
- Parity: logits of a checkpoint in unmask and in `transformers`, on lines of the text, for two kinds of tokenizers.

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
from unmask.training.display import Display
from unmask.training.loop import TrainState
from unmask.training.pretrain import launch, resume

SHAPE = [
    "model.num_hidden_layers=3",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.intermediate_size=96",
]
STAGES = (
    "stage=[{until = '50%', max_seq_len = 64, batch_size = '4k tokens'}, "
    "{until = '100%', max_seq_len = 192, batch_size = '4k tokens'}]"
)
FIXED = [*SHAPE, STAGES, "data.tokenizer.kind=characters", "train.every.save=1 steps"]


class StopsAt(Display):
    """Sends SIGINT to this process after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, state: TrainState) -> None:
        if state.step == self._step:
            os.kill(os.getpid(), signal.SIGINT)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Returns weights and optimizer state of the last checkpoint of a run."""
    resume_folder = run / "latest" / "resume"
    return load_file(resume_folder / "weights.safetensors") | {
        f"optimizer {name}": tensor for name, tensor in load_file(resume_folder / "optimizer.safetensors").items()
    }


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], prefix: str = "") -> float:
    """Returns the largest difference in tensors whose names begin with `prefix`."""
    assert first.keys() == second.keys()
    return max(float((first[n] - second[n]).abs().max()) for n in first if n.startswith(prefix))


def resumed(text: Path, folder: Path, precision: str) -> dict[str, Any]:
    """Compares 10 steps with 5 steps, a stop and 5 steps, with dropout and a change of stage."""
    fixed = [*FIXED, f"train.precision={precision}", "train.budget=10 steps", "model.mlp_dropout=0.1"]
    launch([text], recipe="tiny", out=folder / "whole", settings=fixed)
    stopped_at = 0
    try:
        launch([text], recipe="tiny", out=folder / "stopped", settings=fixed, display=StopsAt(5))
    except Stopped as stop:
        stopped_at = stop.step
    resume(folder / "stopped")
    whole, stopped = tensors(folder / "whole"), tensors(folder / "stopped")
    equal = all(torch.equal(whole[name], stopped[name]) for name in whole)
    return {"precision": precision, "stopped_at": stopped_at, "tensors": len(whole), "bit_identical": equal}


def accumulated(text: Path, folder: Path) -> list[dict[str, Any]]:
    """Compares the same steps in 1, 2, 4 and 8 micro-batches."""
    runs: dict[int, dict[str, torch.Tensor]] = {}
    for parts in (1, 2, 4, 8):
        settings = [*FIXED, "train.precision=float32", "train.budget=2 steps", "optimizer.kind=adam",
                    "optimizer.eps=1e-2", f"train.micro_batch_size={4400 // parts} tokens"]  # fmt: skip
        launch([text], recipe="tiny", out=folder / f"micro-{parts}", settings=settings)
        runs[parts] = {name: t for name, t in tensors(folder / f"micro-{parts}").items() if "optimizer" not in name}
    return [{"micro_batches": parts, "largest_difference": difference(runs[1], run)} for parts, run in runs.items()]


def parity(text: Path, folder: Path, kind: str) -> dict[str, Any]:
    """Returns the largest difference of log-probabilities between unmask and transformers on 32 lines."""
    tokens = ["data.tokenizer.kind=wordpiece", "data.tokenizer.vocab_size=1000"] if kind == "wordpiece" else []
    out = folder / f"parity-{kind}"
    launch([text], recipe="tiny", out=out, settings=[*FIXED, *tokens, "train.budget=30 steps"])
    model = unmask.load(out)
    reference = transformers.AutoModelForMaskedLM.from_pretrained(out / "latest").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "latest")
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if len(line) > 20][:32]
    ids = [tokenizer(line)["input_ids"] for line in lines]
    encoded = [model.tokenizer.encode(line) for line in lines]
    own_ids = [model.tokenizer.add_special_tokens(one.ids, one.marks)[0].tolist() for one in encoded]
    log_probabilities = model.log_probabilities(ids, [list(range(len(one))) for one in ids])
    with torch.inference_mode():
        expected = [reference(torch.tensor([one])).logits[0].log_softmax(-1) for one in ids]
    largest = max(float((a - b).abs().max()) for a, b in zip(log_probabilities, expected, strict=True))
    return {"tokenizer": kind, "lines": len(lines), "same_ids": own_ids == ids, "largest_difference": largest}


def main() -> int:
    """Runs all three, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text file")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results: dict[str, Any] = {
            "date": date.today().isoformat(),
            "command": f"python benchmarks/exactness.py {arguments.text.name}",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "resume": [resumed(arguments.text, folder / precision, precision) for precision in ("float32", "bfloat16")],
            "accumulation": accumulated(arguments.text, folder),
            "parity": [parity(arguments.text, folder, kind) for kind in ("characters", "wordpiece")],
        }
    print(json.dumps(results, indent=1))
    if arguments.results:
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
