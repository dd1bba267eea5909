"""Room card: a model's README, made from its run.

Comes in: a model, its run if that still stands, what was compared. Goes out: README.md with what the model is, how to
use it, what it was made from, how good it is, and what is left for the person to say. Called by: exporting.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import tomli_w
import torch

from unmask.core import files
from unmask.core.errors import UnmaskError
from unmask.hub.parity import TOLERANCE, Parity
from unmask.models.model import Model

Table = Mapping[str, Any]
_MEASURES: Final = {
    "loss": "loss, nats per hidden token",
    "unigram_loss": "loss of knowing no context",
    "bits_per_character": "bits per character (compare within one tokenizer only)",
}


def model_card(name: str, model: Model, run: Path | None, architecture: str, parity: Parity | None) -> str:
    """The whole README.md."""
    recipe, environment = _recipe(run), _environment(run)
    parts = [
        _front(model, architecture),
        f"# {name}",
        _what(model, architecture),
        "## Use",
        _use(model, architecture),
        "## Made from",
        _table(_origin(model, recipe, environment)),
        "## Results",
        _results(model),
        "## Checked",
        _checked(parity, environment),
        "## Licence",
        "Not stated here: who publishes this model says under which terms, and whether the text allows it.",
    ]
    if recipe:
        toml = tomli_w.dumps(_without_paths(recipe))
        parts += [
            "## Recipe",
            f"<details><summary>All settings of the run</summary>\n\n```toml\n{toml}```\n\n</details>",
        ]
    return "\n\n".join(parts) + "\n"


def _front(model: Model, architecture: str) -> str:
    task = "feature-extraction" if architecture.endswith("Model") else "fill-mask"
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task}"]
    if task == "fill-mask":
        lines.append(f"mask_token: {json.dumps(_mask(model))}")
    return "\n".join([*lines, "tags:", "- masked-language-modeling", "- unmask", "---"])


def _mask(model: Model) -> str:
    return model.tokenizer.id_to_token(model.tokenizer.mask_id)


def _what(model: Model, architecture: str) -> str:
    settings = model.settings
    modules = [model.encoder, model.head, *([] if model.pair is None else [model.pair])]
    parameters = sum(p.numel() for module in modules for p in module.parameters())
    facts = {
        "class": f"`{architecture}` of `transformers`, without remote code",
        "parameters": f"{parameters:,}" + (" (with the heads)" if architecture.endswith("Model") else ""),
        "layers × width": f"{settings.num_hidden_layers} × {settings.hidden_size}, {settings.num_attention_heads} heads",
        "context": f"{model.context:,} tokens",
        "vocabulary": f"{model.tokenizer.size:,} pieces",
    }
    return "An encoder pretrained by masking, made with `unmask`.\n\n" + _table(facts)


def _use(model: Model, architecture: str) -> str:
    prompt = json.dumps(f"The cat sat on the {_mask(model)}.")
    if architecture.endswith("Model"):
        code = (
            "from transformers import AutoModel, AutoTokenizer\n\n"
            'tokenizer, model = (kind.from_pretrained("FOLDER") for kind in (AutoTokenizer, AutoModel))\n'
            'vectors = model(**tokenizer("The cat sat on the mat.", return_tensors="pt")).last_hidden_state'
        )
    else:
        code = f'from transformers import pipeline\n\nfill = pipeline("fill-mask", model="FOLDER")\nfill({prompt})'
    vectors = (
        "from sentence_transformers import SentenceTransformer\n\n"
        'SentenceTransformer("FOLDER").encode(["a text", "another"])  # the mean of its vectors; not trained for it'
    )
    return f"```python\n{code}\n```\n\n```python\n{vectors}\n```"


def _origin(model: Model, recipe: Table, environment: Table) -> dict[str, str]:
    card = model.card
    facts: dict[str, str] = {}
    if imported := card.get("imported"):
        facts["imported from"] = f"a folder called `{imported['from']}`"
        facts["converted"] = "; ".join(imported["notes"]) or "nothing"
    if start := recipe.get("init", {}).get("model"):
        facts["continued from"] = f"a folder called `{Path(start).name}`"
    for key, label in {"recipe": "recipe", "seed": "seed", "text_fingerprint": "text (fingerprint)"}.items():
        if key in card:
            facts[label] = f"`{card[key]}`"
    seen = cast("Table", environment.get("text", {})).get("facts", {})
    for key, unit in {
        "train_documents": "documents",
        "train_characters": "characters",
        "train_tokens": "tokens",
    }.items():
        if key in seen:
            facts[f"training text, {unit}"] = f"{seen[key]:,}"
    if recipe:
        facts["budget"] = str(recipe.get("train", {}).get("budget", "not said"))
        objective = recipe.get("objective", {})
        facts["objective"] = ", ".join(
            f"{key} {value}" for key, value in objective.items() if not isinstance(value, dict)
        )
    if "step" in card:
        facts["trained for"] = f"{card['step']:,} steps, {card['tokens']:,} tokens"
    return facts or {"origin": "not known: the folder says nothing of a run"}


def _results(model: Model) -> str:
    found = model.card.get("validation") or {}
    named = {"": found, **{f", on {name}": result for name, result in (found.get("sets") or {}).items()}}
    facts = {
        f"{_MEASURES.get(key, key.replace('_', ' '))}{where}": f"{value:.4f}"
        for where, result in named.items()
        for key, value in result.items()
        if isinstance(value, float)
    }
    if not facts:
        return "None: no validation is written down beside this model."
    return "On text held out from training, 15 % of it hidden.\n\n" + _table(facts)


def _checked(parity: Parity | None, environment: Table) -> str:
    made = cast("Table", environment.get("determinism", {}))
    versions = {name: str(made[name]) for name in ("unmask", "torch", "tokenizers", "python") if name in made}
    versions["torch, on writing"] = torch.__version__
    if parity is None:
        return "**Unverified**: this folder was written without comparing it with `transformers`.\n\n" + _table(
            versions
        )
    what = "vectors" if parity.architecture.endswith("Model") else "logits"
    facts = {
        "compared with": f"`transformers` {parity.transformers}, float32",
        "on": f"{parity.source}: {parity.texts} texts, {parity.tokens:,} tokens; ids are equal",
        f"largest difference of {what}": f"{parity.logits:.1e} (at most {TOLERANCE:g} is written)",
    }
    if parity.pair is not None:
        facts["largest difference of the pair head"] = f"{parity.pair:.1e}"
    return _table({**facts, **versions})


def _table(facts: Table) -> str:
    cells = {key: str(value).replace("|", r"\|") for key, value in facts.items()}
    rows = [f"| {key} | {cell} |" for key, cell in cells.items()]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def _recipe(run: Path | None) -> dict[str, Any]:
    """A run's recipe, if it can be read: a card is no reason to fail."""
    try:
        return {} if run is None else tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _environment(run: Path | None) -> Table:
    try:
        found: Any = {} if run is None else files.read_json(run / "env.json")
    except UnmaskError:
        return {}
    return cast("Table", found) if isinstance(found, dict) else {}


def _without_paths(value: Any) -> Any:
    """Settings whose paths are cut to their last part: where a person's files lie is nobody's concern."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in cast("Sequence[Any]", value)]
    is_path = isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("./", "../", "~")))
    return Path(value).name if is_path else value
