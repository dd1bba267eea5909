"""Do others see what we see? One row for each tokenizer, language and kind of encoder.

Each model is trained for a moment on the text of its language, exported, and opened by `transformers`: the largest
difference of a logit on held-out text, and for how many masks `pipeline("fill-mask")` gives the same five pieces in the
same order as `unmask fill`. `largest_probability_difference` compares the five place by place: where it is at the last
bit, answers that differ are ties.

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
from unmask.hub.parity import sample
from unmask.models.model import Model
from unmask.training.display.plain import SilentDisplay

KINDS = ("characters", "wordpiece", "bpe", "unigram")
WORDS = 24  # of a prompt
TOP = 5
MASK = "[MASK]"


def prompts(texts: list[str]) -> Iterator[str]:
    """From each text its first words, one of them hidden: the second, the fifth, the eighth …"""
    for text in texts:
        words = text.split()[:WORDS]
        for place in range(1, len(words), 3):
            yield " ".join([*words[:place], MASK, *words[place + 1 :]])


def agreement(folder: Path, model: Model, texts: list[str]) -> tuple[int, int, float]:
    """Masks whose five answers are the same, all masks, and the largest difference of an answer's probability."""
    theirs = pipeline("fill-mask", model=str(folder), device="cpu")
    mask = model.tokenizer.id_to_token(model.tokenizer.mask_id)
    asked = list(prompts(texts))
    same, largest = 0, 0.0
    for prompt, filled in zip(asked, unmask.fill(model, asked, TOP), strict=True):
        ours = filled.masks[0].candidates
        others: Any = theirs(prompt.replace(MASK, mask), top_k=TOP)
        same += [one.id for one in ours] == [one["token"] for one in others]
        # Place by place, whatever stands there: where two answers are as good as equal, their order means nothing.
        differences = (abs(one.score - two["score"]) for one, two in zip(ours, others, strict=True))
        largest = max(largest, *differences)
    return same, len(asked), largest


def row(text: Path, language: str, recipe: str, kind: str, budget: str, vocab: int, place: Path) -> dict[str, Any]:
    sizes = [] if kind == "characters" else [f"data.tokenizer.vocab_size={vocab}"]
    run = place / f"{recipe}-{language}-{kind}"
    settings = [f"data.tokenizer.kind={kind}", *sizes]
    unmask.pretrain(text, recipe=recipe, budget=budget, out=run, settings=settings, display=SilentDisplay())
    out = place / f"{run.name}-exported"
    done = unmask.export(run, out)
    assert done.parity is not None
    model = unmask.load(out)
    texts, _ = sample(model, run)
    same, asked, largest = agreement(out, model, texts)
    return {
        "recipe": recipe,
        "class": done.architecture,
        "tokenizer": kind,
        "language": language,
        "texts": done.parity.texts,
        "tokens": done.parity.tokens,
        "largest_logit_difference": done.parity.logits,
        "masks": asked,
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
                    one = row(Path(text), language, recipe, kind, given.budget, given.vocab_size, Path(folder))
                    rows.append(one)
                    print(
                        f"{one['class']:<22} {kind:<11} {language:<9} {one['largest_logit_difference']:.1e}  "
                        f"{one['same_five_answers']:>4} of {one['masks']} masks",
                        flush=True,
                    )
    told = {
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
    given.results.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
