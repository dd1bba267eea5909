r"""How well do the vectors of a masked language model find a text? Beside tf-idf, an untrained model and chance.

Two tasks on held-out articles (a title line, one paragraph per line, a blank line between articles):

- halves: the first half of a paragraph, by words, finds its second half among the second halves of all paragraphs.
- titles: the title of an article finds its first paragraph among the first paragraphs of all articles.

tf-idf counts words, or characters in groups of 2 to 4. "untrained" is a model of the same size with initial weights.
"centered" subtracts the mean of the searched vectors from both sides.

    python benchmarks/embeddings.py english=runs/english,enwiki/valid.txt korean=runs/korean,kowiki/valid.txt \
        --results benchmarks/results/embeddings.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer

from unmask.core.hardware import processor_name
from unmask.core.version import __version__
from unmask.hub.from_hf import load
from unmask.models import build_model
from unmask.models.embed import embed
from unmask.models.model import Model

MIN_WORDS = 40  # of a paragraph that is split
HALVES = 1000  # paragraphs, equally spaced
SEED = 0


class Task(NamedTuple):
    """Queries, and the texts of which number i belongs to query i."""

    queries: list[str]
    texts: list[str]


def read_tasks(file: Path) -> dict[str, Task]:
    """Return the tasks that the articles of a file give."""
    articles = [article.split("\n") for article in file.read_text(encoding="utf-8").strip().split("\n\n")]
    paragraphs = [words for _, *lines in articles for line in lines if len(words := line.split()) >= MIN_WORDS]
    chosen = [paragraphs[at] for at in np.linspace(0, len(paragraphs) - 1, min(HALVES, len(paragraphs))).astype(int)]
    halves = Task([" ".join(w[: len(w) // 2]) for w in chosen], [" ".join(w[len(w) // 2 :]) for w in chosen])
    titled = [(lines[0], lines[1]) for lines in articles if len(lines) > 1]
    return {"halves": halves, "titles": Task([title for title, _ in titled], [text for _, text in titled])}


def judged(queries_ND: Any, texts_ND: Any) -> dict[str, float]:
    """Return accuracy, its standard error, and mean reciprocal rank. Equal cosines count against the query."""
    cosines_NN = np.asarray(queries_ND @ texts_ND.T)
    ranks = (cosines_NN >= np.diag(cosines_NN)[:, None]).sum(1)
    accuracy = float((ranks == 1).mean())
    error = math.sqrt(accuracy * (1 - accuracy) / len(ranks))
    return {"accuracy": accuracy, "standard_error": error, "reciprocal_rank": float((1 / ranks).mean())}


def centered(queries_ND: NDArray[np.float32], texts_ND: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
    """Return the vectors minus the mean of the texts, of length 1."""
    moved = [each_ND - texts_ND.mean(0) for each_ND in (queries_ND, texts_ND)]
    return tuple(each_ND / np.linalg.norm(each_ND, axis=1, keepdims=True) for each_ND in moved)


def by_tf_idf(task: Task, analyzer: str, ngrams: tuple[int, int]) -> dict[str, float]:
    """Judge tf-idf vectors; the weights are those of the searched texts."""
    vectorizer = TfidfVectorizer(analyzer=analyzer, ngram_range=ngrams, sublinear_tf=True)
    texts = vectorizer.fit_transform(task.texts)
    return judged(vectorizer.transform(task.queries).toarray(), texts.toarray())


def untrained(model: Model) -> Model:
    """Return a model of the same size with initial weights."""
    torch.manual_seed(SEED)
    encoder, head = build_model(model.settings, model.encoder.vocab_size)
    return replace(model, encoder=encoder.eval(), head=head.eval())


def rows_of(task: Task, model: Model) -> list[dict[str, Any]]:
    """Judge every way to make vectors on a task."""
    rows: list[dict[str, Any]] = [
        {"vectors": "chance", "accuracy": 1 / len(task.texts)},
        {"vectors": "tf-idf of words", **by_tf_idf(task, "word", (1, 1))},
        {"vectors": "tf-idf of characters", **by_tf_idf(task, "char_wb", (2, 4))},
    ]
    layers = model.settings.num_hidden_layers
    ways = [("mean", count) for count in sorted({1, min(2, layers), layers})] + [("cls", 1)]
    for name, opened in (("untrained", untrained(model)), ("trained", model)):
        for pooling, count in ways if name == "trained" else ways[:1]:
            queries, texts = (embed(opened, side, pooling=pooling, last_layers=count) for side in task)
            shown = f"{name}, {pooling}, last {count}"
            rows.append({"vectors": shown, **judged(queries, texts)})
            rows.append({"vectors": f"{shown}, centered", **judged(*centered(queries, texts))})
    return rows


def describe(model: Model, file: Path) -> Mapping[str, Any]:
    """Return the facts on a model and its text."""
    validation = model.card.get("validation") or {}
    return {
        "model": repr(replace(model, path="RUN")),
        "tokens_trained": model.card.get("tokens"),
        "loss": validation.get("loss"),
        "text": f"{file.parent.name}/{file.name}",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge all models, print tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="NAME=MODEL,TEXT")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for entry in given.models:
        name, _, paths = entry.partition("=")
        run, text = map(Path, paths.split(","))
        model, tasks = load(run), read_tasks(text)
        results[name] = {**describe(model, text), "tasks": {}}
        for title, task in tasks.items():
            rows = rows_of(task, model)
            results[name]["tasks"][title] = {"texts": len(task.texts), "rows": rows}
            print(f"\n{name}, {title}, {len(task.texts):,} texts\n\n| vectors | accuracy | reciprocal rank |")
            print("| --- | ---: | ---: |")
            for row in rows:
                error = f" ± {row['standard_error']:.1%}" if "standard_error" in row else ""
                print(f"| {row['vectors']} | {row['accuracy']:.1%}{error} | {row.get('reciprocal_rank', 0):.3f} |")
    if given.results:
        names = " ".join(f"{entry.partition('=')[0]}=RUN,TEXT" for entry in given.models)
        whole = {
            "date": date.today().isoformat(),
            "command": f"python benchmarks/embeddings.py {names}",
            "unmask": __version__,
            "torch": torch.__version__,
            "machine": {"processor": processor_name(), "threads": 1},
            "models": results,
        }
        given.results.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
