"""Compares exported models with transformers, one row per tokenizer, language and kind of encoder.

Each model is trained briefly on the text of its language, exported, and loaded by transformers. A row has the largest
difference of a logit on held-out text, and the number of masks for which `pipeline("fill-mask")` predicts the same five
tokens in the same order as `unmask fill`. `largest_probability_difference` compares the five rank by rank. If it is at
the last bit of float32, different predictions are ties.

    python benchmarks/parity.py english=TEXT korean=TEXT [--budget "200 steps"] [--recipe tiny --recipe bert-tiny]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import pipeline
from transformers.utils import logging

import unmask
from unmask.hub.parity import sample_texts
from unmask.models.model import Model
from unmask.training.display import Display

KINDS = ("characters", "wordpiece", "bpe", "unigram")
WORDS = 24  # per prompt
TOP = 5
MASK = "[MASK]"


def prompts(texts: list[str]) -> Iterator[str]:
    """Yield the beginning of each text with one masked word: the second, the fifth, the eighth and so on."""
    for text in texts:
        words = text.split()[:WORDS]
        for place in range(1, len(words), 3):
            yield " ".join([*words[:place], MASK, *words[place + 1 :]])


def agreement(folder: Path, model: Model, texts: list[str]) -> tuple[int, int, float]:
    """Return the masks with equal predictions, all masks, and the largest difference of a probability."""
    hf_pipeline = pipeline("fill-mask", model=str(folder), device="cpu")
    mask = model.tokenizer.id_to_token(model.tokenizer.mask_id)
    all_prompts = list(prompts(texts))
    same, largest = 0, 0.0
    for prompt, filled in zip(all_prompts, unmask.fill(model, all_prompts, TOP), strict=True):
        candidates = filled.masks[0].candidates
        expected: Any = hf_pipeline(prompt.replace(MASK, mask), top_k=TOP)
        same += [candidate.id for candidate in candidates] == [entry["token"] for entry in expected]
        # Compared rank by rank, because the order of two equal probabilities means nothing.
        pairs = zip(candidates, expected, strict=True)
        differences = (abs(candidate.score - entry["score"]) for candidate, entry in pairs)
        largest = max(largest, *differences)
    return same, len(all_prompts), largest


def row(text: Path, language: str, recipe: str, kind: str, budget: str, vocab: int, place: Path) -> dict[str, Any]:
    sizes = [] if kind == "characters" else [f"data.tokenizer.vocab_size={vocab}"]
    run = place / f"{recipe}-{language}-{kind}"
    settings = [f"data.tokenizer.kind={kind}", *sizes]
    unmask.pretrain(text, recipe=recipe, budget=budget, out=run, settings=settings, display=Display())
    out = place / f"{run.name}-exported"
    done = unmask.export(run, out)
    assert done.parity is not None
    model = unmask.load(out)
    texts, _ = sample_texts(model, run)
    same, masks, largest = agreement(out, model, texts)
    return {
        "recipe": recipe,
        "class": done.architecture,
        "tokenizer": kind,
        "language": language,
        "texts": done.parity.texts,
        "tokens": done.parity.tokens,
        "largest_logit_difference": done.parity.logits,
        "masks": masks,
        "same_five_answers": same,
        "largest_probability_difference": largest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="LANGUAGE=TEXT")
    parser.add_argument("--budget", default="200 steps")
    parser.add_argument("--recipe", action="append", help="default: tiny and bert-tiny")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/parity.json"))
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for recipe in given.recipe or ["tiny", "bert-tiny"]:
            for named in given.texts:
                language, _, text = named.partition("=")
                for kind in KINDS:
                    result = row(Path(text), language, recipe, kind, given.budget, given.vocab_size, Path(folder))
                    rows.append(result)
                    print(
                        f"{result['class']:<22} {kind:<11} {language:<9} {result['largest_logit_difference']:.1e}  "
                        f"{result['same_five_answers']:>4} of {result['masks']} masks",
                        flush=True,
                    )
    results = {
        "date": date.today().isoformat(),
        "versions": {
            "unmask": unmask.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "budget": given.budget,
        "rows": rows,
    }
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
