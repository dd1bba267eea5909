"""What would a step cost on 8, 64 and 1,024 GPUs? Arithmetic with constants, of which the host's are measured here.

For BERT-Base, ModernBERT-large and an encoder of 7B parameters it prints, for each number of GPUs: tokens of a step,
computation, communication of DDP and of FSDP, the host's work on the data, bytes read, memory per rank and the size of
a checkpoint. GPU and network are those of data sheets: nothing of the tables was run on a GPU.

    python benchmarks/scale.py --results benchmarks/results/scale.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from unmask.core.distributed import DistributedContext
from unmask.core.hardware import processor_name
from unmask.core.quantities import Quantity
from unmask.core.types import Sample, pack
from unmask.core.version import __version__
from unmask.data.loader import assign_microbatches
from unmask.data.sampling import WindowSampler
from unmask.models import EncoderConfig, flops_per_token, num_parameters
from unmask.models.bert import BertConfig
from unmask.models.modernbert import ModernBertConfig
from unmask.objectives.mlm import MaskedLMConfig, MaskedLMObjective
from unmask.training.estimate.memory import required_bytes, training_bytes
from unmask.training.plan import StageConfig
from unmask.training.recipe import load_recipe

# Of an H100 SXM (data sheet: 989 TFLOP/s in bfloat16, NVLink 900 GB/s in both directions) with one 400 Gbit/s adapter.
PEAK_FLOPS, NVLINK, NETWORK, PER_NODE = 989e12, 450e9, 50e9, 8
EFFICIENCY, LINK_EFFICIENCY = 0.40, 0.70  # assumed shares of the peak; 40 % is the goal, not a measurement
GPUS, NODE_DISK = (8, 64, 1024), 2e9  # bytes/s of a shared file system, assumed
FLOAT, TOKEN_BYTES = 4, 3  # gradients and weights travel in float32; an id of two bytes and a byte of flags


@dataclass(frozen=True)
class Scenario:
    """A model, and the tokens of a step on each number of GPUs."""

    name: str
    model: EncoderConfig
    vocab_size: int
    length: int
    mask_rate: float
    optimizer_tensors: int  # of the size of the weights: 2 for AdamW, about 1 for Muon
    tokens: tuple[int, ...]
    micro_tokens: int


BERT_BASE = BertConfig(num_hidden_layers=12, hidden_size=768, num_attention_heads=12, intermediate_size=3072)
LARGE = ModernBertConfig(num_hidden_layers=28, hidden_size=1024, num_attention_heads=16, intermediate_size=2624)
BILLIONS = ModernBertConfig(num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, intermediate_size=11_008)
SCENARIOS = (
    Scenario("BERT-Base", BERT_BASE, 30_522, 512, 0.15, 2, (2**19, 2**21, 2**22), 2**15),
    Scenario("ModernBERT-large", LARGE, 50_368, 1024, 0.30, 1, (2**19, 2**21, 2**22), 2**14),
    Scenario("7B encoder", BILLIONS, 65_536, 1024, 0.30, 1, (2**20, 2**22, 2**24), 2**12),
)


# Measured on this machine ---------------------------------------------------------------------------------------------


def order_seconds(length: int, tokens: int, ranks: int) -> float:
    """Measure the processor time in which a rank draws a step's samples and assigns them to all ranks."""
    documents = np.random.default_rng(0).lognormal(6.0, 1.0, 400_000).astype(np.int64) + 1
    sampler = WindowSampler(documents, length - 2, seed=1)
    begin = time.process_time()
    specs = sampler.specs(0, 0, min(sampler.count(0), 2 * tokens // length))
    lengths = [spec.tokens + 2 for spec in specs]
    drawn = time.process_time() - begin
    used = int(np.searchsorted(np.cumsum(lengths), tokens)) + 1
    begin = time.process_time()
    assign_microbatches(lengths[:used], ranks, max(length, tokens // ranks))
    return drawn * min(1.0, used / len(lengths)) + time.process_time() - begin


def masked_tokens_per_second(length: int) -> float:
    """Measure with how many tokens per second one core packs and masks samples."""
    draw = np.random.default_rng(0)
    objective = MaskedLMObjective(MaskedLMConfig(), 4, np.arange(5, 30_000))
    samples = [
        Sample(draw.integers(5, 30_000, length), np.zeros(length, dtype=np.uint8), 0, number) for number in range(64)
    ]
    tokens, begin = 0, time.process_time()
    while time.process_time() - begin < 1.0:
        tokens += objective.corrupt(pack(samples), 1).batch.tokens
    return tokens / (time.process_time() - begin)


def write_rate() -> float:
    """Measure the bytes per second with which a safetensors file of 400 MB is written and synced."""
    tensors = {"weights": torch.zeros(100_000_000)}
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        save_file(tensors, Path(folder) / "weights.safetensors")
        with (Path(folder) / "weights.safetensors").open("rb") as file:
            os.fsync(file.fileno())
        return 4e8 / (time.perf_counter() - begin)


# Computed -------------------------------------------------------------------------------------------------------------


def ring_seconds(size: float, gpus: int, passes: int) -> float:
    """Return the seconds in which a ring sends `size` bytes `passes` times; all-reduce takes 2 passes, all-gather 1."""
    rate = LINK_EFFICIENCY * (NVLINK if gpus <= PER_NODE else NETWORK)
    return passes * size * (gpus - 1) / gpus / rate


def row(scenario: Scenario, gpus: int, tokens: int) -> dict[str, float | int | str]:
    """Return what a step costs."""
    parameters = num_parameters(scenario.model, scenario.vocab_size)
    per_token = flops_per_token(scenario.model, scenario.vocab_size, scenario.length, scenario.mask_rate)
    compute = per_token * tokens / gpus / (EFFICIENCY * PEAK_FLOPS)
    micro = min(scenario.micro_tokens, tokens // gpus)
    # DDP sums gradients once a step, while the last backward pass goes on: two thirds of a micro-batch's computation.
    # FSDP gathers the weights twice for each micro-batch and scatters the sums of gradients once a step; all of it can
    # overlap. Until the last micro-batch, gradients are whole on each rank.
    micros = -(-tokens // (gpus * micro))
    ddp, fsdp = (ring_seconds(FLOAT * parameters, gpus, passes) for passes in (2, 2 * micros + 1))
    recipe = load_recipe("modern-base")
    stage = StageConfig(max_seq_len=scenario.length, batch_size=Quantity.parse(f"{micro} tokens"))
    recipe = replace(recipe, model=scenario.model, stage=(stage,))
    context = DistributedContext(torch.device("cuda"), "bfloat16", 1)
    needed, states = (
        required_bytes(recipe, scenario.vocab_size, context, micro),
        training_bytes(parameters, has_ema=False),
    )
    whole_gradients = FLOAT * parameters if micros > 1 else 0
    checkpoint = FLOAT * parameters * (2 + scenario.optimizer_tensors)  # the model, and the state of a resume
    return {
        "model": scenario.name, "parameters": parameters, "GPUs": gpus, "tokens of a step": tokens,
        "micro-batches": micros, "compute ms": 1e3 * compute, "DDP ms": 1e3 * ddp,
        "DDP exposed ms": 1e3 * max(0.0, ddp - compute / micros * 2 / 3), "FSDP ms": 1e3 * fsdp,
        "FSDP exposed ms": 1e3 * max(0.0, fsdp - compute),
        "order ms": 1e3 * order_seconds(scenario.length, tokens, gpus),
        "read MB/s": TOKEN_BYTES * tokens / max(compute, ddp) / 1e6,
        "DDP GB": needed / 1e9, "FSDP GB": (needed - states * (1 - 1 / gpus) + whole_gradients) / 1e9,
        "checkpoint GB": checkpoint / 1e9, "checkpoint s": checkpoint / NODE_DISK,
    }  # fmt: skip


def main() -> int:
    """Measure the host's constants, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="JSON file to write")
    given = parser.parse_args()
    torch.set_num_threads(1)
    measured = {
        "masked tokens/s of a core": masked_tokens_per_second(512),
        "written bytes/s": write_rate(),
    }
    rows = [row(each, gpus, tokens) for each in SCENARIOS for gpus, tokens in zip(GPUS, each.tokens, strict=True)]
    for name, value in measured.items():
        print(f"{name}: {value:,.0f}")
    print(" | ".join(rows[0]))
    for each in rows:
        print(
            " | ".join(
                f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
                for value in each.values()
            )
        )
    if given.results:
        facts = {"date": date.today().isoformat(), "command": " ".join(["python", *sys.argv]), "unmask": __version__}
        assumed = {
            "peak FLOP/s": PEAK_FLOPS,
            "efficiency": EFFICIENCY,
            "link bytes/s in a node": NVLINK,
            "link bytes/s between nodes": NETWORK,
            "link efficiency": LINK_EFFICIENCY,
            "disk bytes/s": NODE_DISK,
        }
        results = {**facts, "processor": processor_name(), "assumed": assumed, "measured": measured, "rows": rows}
        given.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
