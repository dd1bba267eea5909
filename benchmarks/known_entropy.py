"""Compares a model's loss with the best possible loss on a language of known entropy.

The text resembles DNA: each of the letters A, C, G, T is drawn from a table, given the three letters before it. Because
the table is known, so is the loss of the best possible model. Given the input of the model (visible letters, [MASK],
random letters), the posterior of a masked letter follows exactly from the forward-backward recursion over the 64
triples. It is computed on the evaluation set of the model itself. One approximation remains: the posterior treats
masked letters as independent draws, although their number per sequence is fixed.

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
from unmask.evaluation.masked_lm import EVAL_MASKING, EvalSet, build_eval_set, documents_from_shards, evaluate
from unmask.models.model import load
from unmask.training.display.live import display_for
from unmask.training.pretrain import launch
from unmask.training.recipe import read_recipe

LETTERS = "ACGT"
ORDER = 3  # number of letters that the next one depends on
LINE = 256  # letters of a document, which is one sequence in the last stage of `char`
BURN_IN = 64  # letters discarded before a line, so that its beginning has the stationary distribution
SETTINGS = [
    "data.document=line",
    "data.held_out={method = 'hash', fraction = '2%', max_size = '200k characters'}",
    f"stage.2.max_seq_len={LINE}",
]

Floats = NDArray[np.float64]


def table(seed: int) -> Floats:
    """Return P(d | a, b, c), indexed [a, b, c, d]; uneven, so that there is something to learn."""
    return np.random.default_rng(seed).dirichlet([0.4] * 4, size=(4, 4, 4))


def write(path: Path, table_abcd: Floats, lines: int, seed: int) -> None:
    """Write lines of LINE letters each."""
    draw = np.random.default_rng(seed)
    letters_NS = np.empty((lines, BURN_IN + LINE), dtype=np.int64)
    letters_NS[:, :ORDER] = draw.integers(0, 4, (lines, ORDER))
    sums = table_abcd.cumsum(-1)
    for position in range(ORDER, letters_NS.shape[1]):
        a, b, c = letters_NS[:, position - 3], letters_NS[:, position - 2], letters_NS[:, position - 1]
        letters_NS[:, position] = (draw.random((lines, 1)) > sums[a, b, c][:, :3]).sum(-1)
    rows = np.frombuffer(LETTERS.encode(), dtype="S1")[letters_NS[:, BURN_IN:]]
    path.write_bytes(b"\n".join(row.tobytes() for row in rows) + b"\n")


def stationary(table_abcd: Floats) -> Floats:
    """Return the stationary distribution of triples."""
    frequency_abc = np.full((4, 4, 4), 1 / 64)
    for _ in range(2000):
        frequency_abc = np.einsum("abc,abcd->bcd", frequency_abc, table_abcd)
    return frequency_abc / frequency_abc.sum()


def letter_entropy(table_abcd: Floats) -> float:
    """Return the entropy rate: nats per letter, given all letters before it."""
    logs = np.log(np.maximum(table_abcd, 1e-300))
    return float(-(stationary(table_abcd)[..., None] * table_abcd * logs).sum())


def posterior(input_S: NDArray[np.int64], masked_S: NDArray[np.bool_], table_abcd: Floats, rate: float) -> Floats:
    """Return the posterior of the letter at every position of one sequence, S x 4, given the whole input.

    `input_S` holds 0 to 3 for a letter and 4 for [MASK]. As for a model, it is known only of the predicted position
    that it is masked; a letter elsewhere may be a random replacement.
    """
    same = np.eye(4)
    # Rows: input; columns: original letter. A masked letter becomes [MASK], stays, or becomes a random letter.
    given_masked = np.vstack(
        [EVAL_MASKING.keep_rate * same + EVAL_MASKING.random_token_rate / 4, np.full(4, EVAL_MASKING.mask_token_rate)]
    )
    given_any = np.vstack([(1 - rate) * same, np.zeros(4)]) + rate * given_masked
    emission_S4 = given_any[input_S]
    positions = len(input_S)
    # Of the triple that ends at a position, without the emission of its last letter.
    before = np.empty((positions, 4, 4, 4))
    after = np.ones((positions, 4, 4, 4))
    filtered = stationary(table_abcd)  # of the first triple, with the emissions of its first two letters
    filtered = filtered * emission_S4[0][:, None, None] * emission_S4[1][None, :, None]
    for position in range(2, positions):
        before[position] = filtered / filtered.sum()
        filtered = before[position] * emission_S4[position]
        if position + 1 < positions:
            filtered = np.einsum("abc,abcd->bcd", filtered, table_abcd)
    for position in range(positions - 2, 1, -1):
        following = emission_S4[position + 1] * after[position + 1]
        after[position] = np.einsum("abcd,bcd->abc", table_abcd, following)
        after[position] /= after[position].max()
    posterior_S4 = np.empty((positions, 4))
    for position in range(2, positions):
        posterior_S4[position] = (before[position] * after[position]).sum((0, 1))
    # The first two positions follow from the first triple, each without its own emission.
    triple = stationary(table_abcd) * emission_S4[2] * after[2]
    posterior_S4[0] = (triple * emission_S4[1][None, :, None]).sum((1, 2))
    posterior_S4[1] = (triple * emission_S4[0][:, None, None]).sum((0, 2))
    posterior_S4 *= np.where(masked_S[:, None], given_masked[input_S], emission_S4)
    return posterior_S4 / posterior_S4.sum(-1, keepdims=True)


def best_loss(eval_set: EvalSet, ids: NDArray[np.int64], mask_id: int, table_abcd: Floats) -> float:
    """Return nats per masked letter of the best possible model; `ids` are the token ids of A, C, G, T."""
    code_of = np.full(int(max(ids.max(), mask_id)) + 1, -1)
    code_of[ids], code_of[mask_id] = np.arange(4), 4
    nats = 0.0
    for masked in eval_set.batches:
        input_T = code_of[masked.batch.ids_T.numpy()]
        masked_T = np.zeros(len(input_T), dtype=bool)
        masked_T[masked.positions_M.numpy()] = True
        label_T = np.zeros(len(input_T), dtype=np.int64)
        label_T[masked.positions_M.numpy()] = code_of[masked.labels_M.numpy()]
        for first, last in zip(masked.batch.offsets[:-1], masked.batch.offsets[1:], strict=True):
            posterior_S4 = posterior(input_T[first:last], masked_T[first:last], table_abcd, EVAL_MASKING.mask_rate)
            at = np.flatnonzero(masked_T[first:last])
            nats -= float(np.log(posterior_S4[at, label_T[first:last][at]]).sum())
    return nats / eval_set.masked_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="300 s")
    parser.add_argument("--megabytes", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--threads", type=int, default=0, help="number of CPU threads; 0: all cores")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/known_entropy.json"))
    options = parser.parse_args()
    probabilities = table(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        text, run = Path(folder) / "letters.txt", Path(folder) / "run"
        write(text, probabilities, round(options.megabytes * 1e6 / (LINE + 1)), options.seed)
        overrides: dict[str, Any] = {"train.budget": options.budget}
        if options.threads:
            overrides["train.threads"] = options.threads
        training_run = launch(
            [text], recipe="char", out=run, settings=SETTINGS, overrides=overrides, display=display_for(sys.stdout)
        )
        model = load(run)
        recipe, plan = read_recipe(run)
        corpus = prepare(open_source([text], recipe.data), recipe.data, default_cache())
    eval_set = build_eval_set(documents_from_shards(corpus.held_out), model.tokenizer, LINE, corpus.train.token_counts)
    evaluated = evaluate(model.encoder, model.head, eval_set, init_distributed("float32", recipe.train.threads))
    ids = np.array([model.tokenizer.token_to_id(letter) for letter in LETTERS])
    best = best_loss(eval_set, ids, model.tokenizer.mask_id, probabilities)
    result = {
        "date": date.today().isoformat(),
        "command": " ".join(sys.argv),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "entropy_of_a_letter_given_those_before": letter_entropy(probabilities),
        "unigram_loss": evaluated.unigram_loss,
        "loss": evaluated.loss,
        "best_possible_loss": best,
        "masked_tokens": evaluated.masked_tokens,
        "steps": plan.steps,
        "tokens": training_run.summary.tokens if training_run.summary else 0,
        "training_seconds": training_run.summary.training_seconds if training_run.summary else math.nan,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nunigram loss            {evaluated.unigram_loss:.4f} nats")
    print(f"model                   {evaluated.loss:.4f}, after {result['training_seconds']:.0f} s of training")
    print(f"best possible loss      {best:.4f}")
    print(f"entropy rate            {result['entropy_of_a_letter_given_those_before']:.4f}")


if __name__ == "__main__":
    main()
