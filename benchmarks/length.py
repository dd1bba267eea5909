"""What does a token of a longer sequence cost? Training speed against sequence length, with full and local attention.

Trains a ModernBERT with steps of one micro-batch (16,384 tokens) of sequences of each length. With "full", each layer
attends to the whole sequence; with "local", every third layer does, as in ModernBERT, and the others attend to 64
tokens on each side. The lengths are measured in turns. Documents are joined until they are as long as the longest
sequence, so nothing is padded.

    python benchmarks/length.py enwiki/valid.txt --results benchmarks/results/length.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

from unmask.checks.bench.timing import OtherProcesses, in_turns
from unmask.checks.bench.work import open_recipe, training_work
from unmask.core.version import __version__

LENGTHS = (128, 512, 2048, 8192)
TOKENS = 16_384  # of a step
CHARACTERS = 1_700_000
PER_TOKEN = 8  # characters: more than a token has
KINDS = {"full": 1, "local": 3}  # every so many layers attend to the whole sequence


def main() -> int:
    """Measure all lengths, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text to train on")
    parser.add_argument("--recipe", default="tiny", help="a recipe with model.kind=modernbert")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each length and kind")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="setting, KEY=VALUE")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    given = parser.parse_args()
    text = given.text.read_text(encoding="utf-8")[:CHARACTERS]
    size = LENGTHS[-1] * PER_TOKEN
    texts = [text[first : first + size] for first in range(0, len(text), size)]
    others, work, flops = OtherProcesses(), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, interval in KINDS.items():
            for length in LENGTHS:
                name = f"{kind} {length}"
                stage = f"stage=[{{max_seq_len = {length}, batch_size = '{TOKENS} tokens'}}]"
                settings = [stage, f"model.global_attn_every_n_layers={interval}", *given.settings]
                benched = open_recipe(given.recipe, texts, Path(folder), settings=settings, threads=given.threads)
                work[name], flops[name] = training_work(benched), benched.flops_per_token
                described = benched.context.describe()
        rounds = in_turns(work, given.seconds)
    base = f"full {LENGTHS[0]}"
    rows = [
        {
            "attention": name.split()[0],
            "length": int(name.split()[1]),
            "tokens_per_second": rounds.rate(name),
            "flops_per_token": flops[name],
            "relative": sorted(rounds.ratios(name, base))[len(rounds.seconds[name]) // 2],
        }
        for name in work
    ]
    print("| attention | length | tokens/s | against full 128 |\n| --- | ---: | ---: | ---: |")
    for row in rows:
        print(f"| {row['attention']} | {row['length']:,} | {row['tokens_per_second']:,.0f} | {row['relative']:.2f} |")
    if given.results:
        whole = {
            "date": date.today().isoformat(),
            "command": f"python benchmarks/length.py {given.text.name} --seconds {given.seconds:g}",
            "unmask": __version__,
            "torch": torch.__version__,
            "machine": described,
            "recipe": given.recipe,
            "cores_used_by_others": others.cores_used(),
            "rows": rows,
        }
        given.results.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
