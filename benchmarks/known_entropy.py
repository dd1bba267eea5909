"""A language whose entropy is known: how close does a model come to the best that any model could reach?

The text is DNA-like: letters A, C, G, T, each drawn from a table by the three before it. Because the table is known,
the loss of the best possible model is too: given everything that the model sees (the letters left, [MASK], letters that
were exchanged), the posterior of a hidden letter follows exactly by the forward-backward recursion over the 64 triples.
It is computed on the very puzzles that the model is judged by; only that the number of asked letters per text is fixed
(and not drawn letter by letter) is left out of account.

    python benchmarks/known_entropy.py [--budget "300 s"] [--megabytes 8]
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unmask.core.distributed import init_distributed
from unmask.core.files import default_cache
from unmask.data.prepare import prepare
from unmask.data.sources import open_source
from unmask.evaluation.masked_lm import EVAL_MASKING, Document, build_eval_set, evaluate
from unmask.models.model import load
from unmask.training.pretrain import for_stream, launch
from unmask.training.recipe import read_recipe

LETTERS = "ACGT"
ORDER = 3  # letters that the next one depends on
LINE = 256  # letters of a document; the last stage of `char` holds a whole one
BURN_IN = 64  # letters thrown away before a line begins, so that every line begins as any other place
SETTINGS = [
    "data.document=line",
    "data.held_out={method = 'hash', fraction = '2%', max_size = '200k characters'}",
    f"stage.2.max_seq_len={LINE}",
]

Floats = NDArray[np.float64]


def table(seed: int) -> Floats:
    """P(d | a, b, c), indexed [a, b, c, d]: uneven, so that there is something to learn."""
    return np.random.default_rng(seed).dirichlet([0.4] * 4, size=(4, 4, 4))


def write(path: Path, chances_abcd: Floats, lines: int, seed: int) -> None:
    """So many lines of LINE letters each."""
    draw = np.random.default_rng(seed)
    letters_NS = np.empty((lines, BURN_IN + LINE), dtype=np.int64)
    letters_NS[:, :ORDER] = draw.integers(0, 4, (lines, ORDER))
    sums = chances_abcd.cumsum(-1)
    for place in range(ORDER, letters_NS.shape[1]):
        a, b, c = letters_NS[:, place - 3], letters_NS[:, place - 2], letters_NS[:, place - 1]
        letters_NS[:, place] = (draw.random((lines, 1)) > sums[a, b, c][:, :3]).sum(-1)
    rows = np.frombuffer(LETTERS.encode(), dtype="S1")[letters_NS[:, BURN_IN:]]
    path.write_bytes(b"\n".join(row.tobytes() for row in rows) + b"\n")


def stationary(chances_abcd: Floats) -> Floats:
    """How often each triple stands anywhere in the text."""
    often_abc = np.full((4, 4, 4), 1 / 64)
    for _ in range(2000):
        often_abc = np.einsum("abc,abcd->bcd", often_abc, chances_abcd)
    return often_abc / often_abc.sum()


def letter_entropy(chances_abcd: Floats) -> float:
    """Nats per letter, given all letters before it: the entropy rate."""
    logs = np.log(np.maximum(chances_abcd, 1e-300))
    return float(-(stationary(chances_abcd)[..., None] * chances_abcd * logs).sum())


def posterior(seen_S: NDArray[np.int64], asked_S: NDArray[np.bool_], chances_abcd: Floats, rate: float) -> Floats:
    """The best guess of the letter at every slot of one text, S × 4, from all that is seen.

    `seen_S` holds 0 to 3 for a letter and 4 for [MASK]. That a slot is asked is known at that slot alone, as it is to a
    model; elsewhere a letter may be one that was exchanged.
    """
    same = np.eye(4)
    # Rows: what is seen; columns: what stands there. Asked: hidden, or a letter that was kept or drawn.
    of_asked = np.vstack(
        [EVAL_MASKING.keep_rate * same + EVAL_MASKING.random_token_rate / 4, np.full(4, EVAL_MASKING.mask_token_rate)]
    )
    of_any = np.vstack([(1 - rate) * same, np.zeros(4)]) + rate * of_asked
    emission_S4 = of_any[seen_S]
    slots = len(seen_S)
    before = np.empty((slots, 4, 4, 4))  # of the triple that ends at a slot, its own letter not looked at
    after = np.ones((slots, 4, 4, 4))
    looked = stationary(chances_abcd)  # the first triple: its first two letters are looked at here
    looked = looked * emission_S4[0][:, None, None] * emission_S4[1][None, :, None]
    for place in range(2, slots):
        before[place] = looked / looked.sum()
        looked = before[place] * emission_S4[place]
        if place + 1 < slots:
            looked = np.einsum("abc,abcd->bcd", looked, chances_abcd)
    for place in range(slots - 2, 1, -1):
        onward = emission_S4[place + 1] * after[place + 1]
        after[place] = np.einsum("abcd,bcd->abc", chances_abcd, onward)
        after[place] /= after[place].max()
    guess_S4 = np.empty((slots, 4))
    for place in range(2, slots):
        guess_S4[place] = (before[place] * after[place]).sum((0, 1))
    # The first two slots are read off the first triple, each without its own emission.
    triple = stationary(chances_abcd) * emission_S4[2] * after[2]
    guess_S4[0] = (triple * emission_S4[1][None, :, None]).sum((1, 2))
    guess_S4[1] = (triple * emission_S4[0][:, None, None]).sum((0, 2))
    guess_S4 *= np.where(asked_S[:, None], of_asked[seen_S], emission_S4)
    return guess_S4 / guess_S4.sum(-1, keepdims=True)


def best_loss(frozen: Any, ids: NDArray[np.int64], mask_id: int, chances_abcd: Floats) -> float:
    """Nats per asked letter of the best possible model on these puzzles; `ids` are those of A, C, G, T."""
    code_of = np.full(int(max(ids.max(), mask_id)) + 1, -1)
    code_of[ids], code_of[mask_id] = np.arange(4), 4
    nats = 0.0
    for masked in frozen.puzzles:
        seen_T = code_of[masked.batch.ids_T.numpy()]
        asked_T = np.zeros(len(seen_T), dtype=bool)
        asked_T[masked.positions_M.numpy()] = True
        answer_T = np.zeros(len(seen_T), dtype=np.int64)
        answer_T[masked.positions_M.numpy()] = code_of[masked.labels_M.numpy()]
        for first, last in zip(masked.batch.starts[:-1], masked.batch.starts[1:], strict=True):
            guess_S4 = posterior(seen_T[first:last], asked_T[first:last], chances_abcd, EVAL_MASKING.mask_rate)
            at = np.flatnonzero(asked_T[first:last])
            nats -= float(np.log(guess_S4[at, answer_T[first:last][at]]).sum())
    return nats / frozen.asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="300 s")
    parser.add_argument("--megabytes", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/known_entropy.json"))
    chosen = parser.parse_args()
    chances = table(chosen.seed)
    with tempfile.TemporaryDirectory() as folder:
        text, run = Path(folder) / "letters.txt", Path(folder) / "run"
        write(text, chances, round(chosen.megabytes * 1e6 / (LINE + 1)), chosen.seed)
        overrides: dict[str, Any] = {"train.budget": chosen.budget}
        if chosen.threads:
            overrides["train.threads"] = chosen.threads
        made = launch(
            [text], recipe="char", out=run, settings=SETTINGS, overrides=overrides, display=for_stream(sys.stdout)
        )
        model = load(run)
        recipe, plan = read_recipe(run)
        corpus = prepare(open_source([text], recipe.data), recipe.data, default_cache())
    held = corpus.held_out
    documents = [
        Document(held.ids(number, 0, int(length)), held.marks(number, 0, int(length)), int(length))
        for number, length in enumerate(held.lengths_N)
    ]
    frozen = build_eval_set(documents, model.tokenizer, LINE, corpus.train.counts_V)
    found = evaluate(model.encoder, model.head, frozen, init_distributed("float32", recipe.train.threads))
    ids = np.array([model.tokenizer.token_to_id(letter) for letter in LETTERS])
    best = best_loss(frozen, ids, model.tokenizer.mask_id, chances)
    result = {
        "date": date.today().isoformat(),
        "command": " ".join(sys.argv),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "entropy_of_a_letter_given_those_before": letter_entropy(chances),
        "unigram_loss": found.unigram_loss,
        "loss": found.loss,
        "best_possible_loss": best,
        "asked": found.masked_tokens,
        "steps": plan.steps,
        "tokens": made.summary.tokens if made.summary else 0,
        "training_seconds": made.summary.training_seconds if made.summary else math.nan,
    }
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    chosen.results.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nunigram loss            {found.unigram_loss:.4f} nats")
    print(f"this model              {found.loss:.4f}, after {result['training_seconds']:.0f} s of training")
    print(f"the best possible       {best:.4f}")
    print(f"letter, given the past  {result['entropy_of_a_letter_given_those_before']:.4f}")


if __name__ == "__main__":
    main()
