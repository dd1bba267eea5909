"""Pseudo-log-likelihood beside minicons: the same figures, and the speed of both in one run.

    python benchmarks/scoring.py figures tests/evaluation/minicons.json
    python benchmarks/scoring.py speed runs/notes blimp --results benchmarks/results/scoring.json

"figures" scores texts with small models, whose weights are given by a formula, and writes the log-probability of each
token by minicons. tests/evaluation/test_scoring.py compares unmask with them. "speed" exports a model and scores both
sentences of minimal pairs in turns, with the same sentences and threads; ratios are medians over rounds.

minicons 0.3.39 calls a method that transformers 5 has removed; it is restored here. It isn't a dependency of unmask:

    pip install --no-deps minicons==0.3.39 wonderwords pillow pandas
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tokenizers
import torch

from unmask.core import rng
from unmask.core.config import build_config
from unmask.core.distributed import init_distributed
from unmask.core.version import __version__
from unmask.evaluation.minimal_pairs import evaluate_minimal_pairs, read_pairs
from unmask.evaluation.scoring import Method, score
from unmask.hub.from_hf import load
from unmask.hub.to_hf import export
from unmask.models import build_model
from unmask.models.bert import BertConfig
from unmask.models.model import Model, save_model
from unmask.models.modernbert import ModernBertConfig
from unmask.tokenization.settings import ByteBpeConfig, WordPieceConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer

METRICS: dict[Method, str] = {"original": "original", "within-word": "within_word_l2r"}
TEXTS = (
    "the cat sat on the mat and looked at the moon .",
    "A dog ran over the hills, to meet the oldest men.",
    "she hasn't given him 2 unbelievable books about seabirds!",
    "Salt",
)
SHAPE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
BERT = {**SHAPE, "max_position_embeddings": 64}
CASES: dict[str, tuple[type[BertConfig] | type[ModernBertConfig], dict[str, Any], str]] = {
    "bert": (BertConfig, BERT, "wordpiece"),
    "modernbert": (ModernBertConfig, SHAPE, "wordpiece"),
    "roberta": (BertConfig, {**BERT, "type_vocab_size": 1, "model_type": "roberta", "position_offset": 1}, "bytes"),
}
SEED = 13
ROUNDS = 5


# Models whose weights are given by a formula --------------------------------------------------------------------------


def open_case(name: str, tokenizer: Tokenizer) -> Model:
    """Return the model of a case. Its weights are uniform numbers that are functions of their names and indices."""
    kind, settings, _ = CASES[name]
    config = build_config(kind, settings, name)
    encoder, head = build_model(config, tokenizer.size)
    with torch.no_grad():
        for part, module in (("encoder", encoder), ("head", head)):
            for key, parameter in module.named_parameters():
                draws = rng.uniform(SEED, f"{part}.{key}", np.arange(parameter.numel()))
                values = torch.from_numpy(draws - 0.5).float().view_as(parameter)
                parameter.copy_(1 + 0.4 * values if "norm" in key and key.endswith("weight") else 1.2 * values)
    return Model(encoder.eval(), head.eval(), tokenizer, config, {"context": 64})


def train_tokenizers() -> dict[str, str]:
    """Return small tokenizers as JSON: WordPiece, and a byte-level BPE with the pre-tokenizer of RoBERTa."""
    text = [*TEXTS, *(text.lower() for text in TEXTS)] * 10
    by_bytes = json.loads(train_tokenizer(text, ByteBpeConfig(vocab_size=320)).to_json())
    by_bytes["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "wordpiece": train_tokenizer(text, WordPieceConfig(vocab_size=120)).to_json(),
        "bytes": json.dumps(by_bytes),
    }


# minicons -------------------------------------------------------------------------------------------------------------


def open_minicons(folder: Path) -> Any:
    """Return minicons' scorer of a folder that transformers opens."""
    from minicons import scorer
    from transformers import PreTrainedTokenizerBase

    def encode(self: Any, texts: Sequence[str], **options: Any) -> Any:
        return self(texts, **options)

    PreTrainedTokenizerBase.batch_encode_plus = encode  # pyright: ignore[reportAttributeAccessIssue]
    return scorer.MaskedLMScorer(str(folder), "cpu")


def write_figures(file: Path) -> None:
    """Write the figures of minicons."""
    stored = train_tokenizers()
    cases: dict[str, Any] = {}
    for name, (_, _, kind) in CASES.items():
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(stored[kind]))
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder), open_case(name, tokenizer))
            peer = open_minicons(Path(folder))
            cases[name] = {"tokenizer": kind, "log_probabilities": {}}
            for method, metric in METRICS.items():
                rows = peer.compute_stats(peer.prepare_text(list(TEXTS), PLL_metric=metric))
                cases[name]["log_probabilities"][method] = [[round(value, 6) for value in row] for row in rows]
    versions = {package: importlib.metadata.version(package) for package in ("minicons", "transformers", "torch")}
    tree = {"made_by": "python benchmarks/scoring.py figures FILE", **versions, "texts": TEXTS,
            "tokenizers": {kind: json.loads(text) for kind, text in stored.items()}, "cases": cases}  # fmt: skip
    file.write_text(json.dumps(tree, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


# Speed ----------------------------------------------------------------------------------------------------------------


def compare_speed(given: argparse.Namespace) -> None:
    """Print and write the seconds of both, in turns, and the largest difference of their scores."""
    pairs = read_pairs(given.pairs, given.subset, "skip").pairs
    sentences = [sentence for pair in pairs for sentence in (pair.good, pair.bad)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        export(given.model, folder)
        model, peer = load(folder), open_minicons(folder)
        context = init_distributed("float32", given.threads)

        def by_minicons(method: Method) -> list[float]:
            scores: list[float] = []
            for first in range(0, len(sentences), given.batch):
                part = sentences[first : first + given.batch]
                scores += peer.sequence_score(part, reduction=lambda x: x.sum(0).item(), PLL_metric=METRICS[method])
            return scores

        def by_unmask(method: Method) -> list[float]:
            return [
                each.log_probability for each in score(model, sentences, method, words="tokenizer", context=context)
            ]

        work: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "original": (lambda: by_unmask("original"), lambda: by_minicons("original")),
            "within-word": (lambda: by_unmask("within-word"), lambda: by_minicons("within-word")),
            "both, of minimal pairs": (
                lambda: evaluate_minimal_pairs(model, pairs, context=context),
                lambda: (by_minicons("original"), by_minicons("within-word")),
            ),
        }
        differences = {
            method: float(np.abs(np.array(by_unmask(method)) - np.array(by_minicons(method))).max())
            for method in METRICS
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
        for _ in range(given.rounds):
            for name, (mine, other) in work.items():
                seconds[name].append((_seconds(mine), _seconds(other)))
        described = context.describe()
    rows = [
        {
            "work": name,
            "unmask_seconds": median(mine for mine, _ in taken),
            "minicons_seconds": median(other for _, other in taken),
            "ratio": median(other / mine for mine, other in taken),
            "ratios": sorted(round(other / mine, 2) for mine, other in taken),
        }
        for name, taken in seconds.items()
    ]
    print(f"{len(sentences):,} sentences, largest difference {max(differences.values()):.1e} nats")
    print("| work | unmask s | minicons s | ratio |\n| --- | ---: | ---: | ---: |")
    for row in rows:
        print(f"| {row['work']} | {row['unmask_seconds']:.2f} | {row['minicons_seconds']:.2f} | {row['ratio']:.2f} |")
    if given.results:
        whole = {
            "date": date.today().isoformat(),
            "command": f"python benchmarks/scoring.py speed {given.model.name} {given.pairs.name} "
            f"--subset {given.subset} --threads {given.threads} --batch {given.batch}",
            "unmask": __version__,
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
            "minicons": importlib.metadata.version("minicons"),
            "machine": described,
            "model": repr(model),
            "sentences": len(sentences),
            "largest_difference": differences,
            "rows": rows,
        }
        given.results.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> int:
    """Run one of the two subcommands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    figures = commands.add_parser("figures", help="write minicons' figures of small models")
    figures.add_argument("file", type=Path)
    speed = commands.add_parser("speed", help="measure both in turns")
    speed.add_argument("model", type=Path)
    speed.add_argument("pairs", type=Path, help="minimal pairs, as for unmask evaluate --pairs")
    speed.add_argument("--subset", type=int, default=5, help="pairs of each paradigm")
    speed.add_argument("--batch", type=int, default=8, help="sentences per call of minicons")
    speed.add_argument("--threads", type=int, default=1)
    speed.add_argument("--rounds", type=int, default=ROUNDS)
    speed.add_argument("--results", type=Path, help="JSON file to write")
    given = parser.parse_args()
    if given.command == "figures":
        write_figures(given.file)
    else:
        compare_speed(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
