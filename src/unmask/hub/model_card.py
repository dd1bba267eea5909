"""Writes the model card: the README.md of an exported model."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import tomli_w
import torch

from unmask.core import files
from unmask.core.errors import UnmaskError
from unmask.core.files import RunLayout
from unmask.hub.parity import Parity
from unmask.models.model import Model
from unmask.models.neomme import NeoMMEConfig

Table = Mapping[str, Any]
_METRICS: Final = {
    "loss": "loss (nats per masked token)",
    "unigram_loss": "unigram loss (baseline without context)",
    "bits_per_character": "bits per character (comparable within one tokenizer only)",
    "unknown_share": "share of unknown tokens",
}
_OBJECTIVES: Final = {  # those that are not masked-language modeling
    "rtd": "replaced token detection (ELECTRA)",
    "causal": "causal language modeling",
    "mntp": "masked next token prediction and causal language modeling (GPT-BERT)",
    "diffusion": "masked diffusion",
}
_TAGS: Final = {"rtd": "replaced-token-detection", "causal": "causal-language-modeling"}
_TEXT_FACTS: Final = {"train_documents": "documents", "train_characters": "characters", "train_tokens": "tokens"}


@dataclass(frozen=True)
class FormatCard:
    """What the model card says about a format that is added to that of transformers."""

    library: str  # library_name of the card
    usage: str  # Markdown
    facts: Table  # rows on its comparison


def model_card(
    name: str,
    model: Model,
    run: Path | None,
    architecture: str,
    parity: Parity | None,
    format_card: FormatCard | None = None,
) -> str:
    """Return the text of README.md.

    Args:
        name: Name of the exported folder.
        model: Exported model.
        run: Folder of its run, if it exists.
        architecture: Class of transformers that loads the folder.
        parity: Result of the comparison with transformers; None without a comparison.
        format_card: Facts on a format that is added to that of transformers.
    """
    recipe, environment = _read_recipe(run), _read_environment(run)
    parts = [
        _front_matter(model, architecture, format_card),
        f"# {name}",
        _description(model, architecture),
        "## Usage",
        _usage(model, architecture) if format_card is None else format_card.usage,
        "## Training",
        _table(_training(model, recipe, environment)),
        "## Evaluation",
        _evaluation(model),
        "## Verification",
        _verification(parity, environment, {} if format_card is None else format_card.facts),
        "## License",
        "Not stated. The publisher of this model has to name a license that the training text allows.",
    ]
    if recipe:
        toml = tomli_w.dumps(_without_directories(recipe))
        parts += [
            "## Recipe",
            f"<details><summary>All settings of the run</summary>\n\n```toml\n{toml}```\n\n</details>",
        ]
    return "\n\n".join(parts) + "\n"


def _front_matter(model: Model, architecture: str, format_card: FormatCard | None) -> str:
    is_filled = not architecture.endswith("Model") and model.discriminator is None
    task = "fill-mask" if is_filled else "feature-extraction"
    library = "transformers" if format_card is None else format_card.library
    lines = ["---", f"library_name: {library}", f"pipeline_tag: {task}"]
    if task == "fill-mask":
        lines.append(f"mask_token: {json.dumps(_mask_token(model))}")
    tag = _TAGS.get(_objective(model), "masked-language-modeling")
    return "\n".join([*lines, "tags:", f"- {tag}", "- unmask", "---"])


def _objective(model: Model) -> str:
    return model.card.get("objective", "mlm")


def _detects_replaced(model: Model) -> bool:
    return _objective(model) == "rtd"


def _mask_token(model: Model) -> str:
    return model.tokenizer.id_to_token(model.tokenizer.mask_id)


def _description(model: Model, architecture: str) -> str:
    settings = model.settings
    heads = [model.head, model.pair] if not _detects_replaced(model) else [model.discriminator]
    modules = [model.encoder, *(head for head in heads if head is not None)]
    parameters = sum(p.numel() for module in modules for p in module.parameters())
    facts = {
        "class": f"`{architecture}` of `transformers`, without remote code",
        "parameters": f"{parameters:,}" + (" (heads included)" if architecture.endswith("Model") else ""),
        "layers": f"{settings.num_hidden_layers}",
        "hidden size": f"{settings.hidden_size}, {settings.num_attention_heads} attention heads",
        "context": f"{model.context:,} tokens",
        "vocabulary": f"{model.tokenizer.size:,} tokens",
    }
    objective = _OBJECTIVES.get(_objective(model), "masked-language modeling")
    if _objective(model) == "causal":
        facts["attention"] = f"causal in training; `{architecture}` attends to both sides"
    return f"An encoder pretrained by {objective} with `unmask`.\n\n" + _table(facts)


def _usage(model: Model, architecture: str) -> str:
    prompt = json.dumps(f"The cat sat on the {_mask_token(model)}.")
    if architecture.endswith("Model"):
        code = (
            "from transformers import AutoModel, AutoTokenizer\n\n"
            'tokenizer, model = (kind.from_pretrained("FOLDER") for kind in (AutoTokenizer, AutoModel))\n'
            'hidden_states = model(**tokenizer("The cat sat on the mat.", return_tensors="pt")).last_hidden_state'
        )
    elif model.discriminator is not None:
        code = (
            "from transformers import AutoModelForPreTraining, AutoTokenizer\n\n"
            'tokenizer, model = (kind.from_pretrained("FOLDER") for kind in (AutoTokenizer, AutoModelForPreTraining))\n'
            'logits = model(**tokenizer("The cat sat on the mat.", return_tensors="pt")).logits  # positive: replaced'
        )
    else:
        code = f'from transformers import pipeline\n\nfill = pipeline("fill-mask", model="FOLDER")\nfill({prompt})'
    if isinstance(model.settings, NeoMMEConfig):  # sentence-transformers needs an image processor for it
        return f"```python\n{code}\n```"
    vectors = (
        "from sentence_transformers import SentenceTransformer\n\n"
        "# Mean pooling; the model has not been trained for sentence similarity.\n"
        'SentenceTransformer("FOLDER").encode(["a text", "another"])'
    )
    return f"```python\n{code}\n```\n\n```python\n{vectors}\n```"


def _training(model: Model, recipe: Table, environment: Table) -> dict[str, str]:
    card = model.card
    facts: dict[str, str] = {}
    if imported := card.get("imported"):
        facts["imported from"] = f"a folder named `{imported['from']}`"
        facts["conversions"] = "; ".join(imported["notes"]) or "none"
    if start := recipe.get("init", {}).get("model"):
        facts["continued from"] = f"a folder named `{Path(start).name}`"
    for key, label in {"recipe": "recipe", "seed": "seed", "text_fingerprint": "text fingerprint"}.items():
        if key in card:
            facts[label] = f"`{card[key]}`"
    text_facts = cast("Table", environment.get("text", {})).get("facts", {})
    for key, unit in _TEXT_FACTS.items():
        if key in text_facts:
            facts[f"training text, {unit}"] = f"{text_facts[key]:,}"
    if recipe:
        facts["budget"] = str(recipe.get("train", {}).get("budget", "unknown"))
        stages = [stage.get("objective") or recipe.get("objective", {}) for stage in recipe.get("stage", [{}])]
        for number, settings in enumerate(stages):
            described = ", ".join(f"{key} {value}" for key, value in settings.items() if not isinstance(value, dict))
            if all(settings == stages[0] for settings in stages):
                facts["objective"] = described
            else:
                facts[f"objective of stage {number}"] = described
    if "step" in card and "tokens" in card:
        facts["trained for"] = f"{card['step']:,} steps, {card['tokens']:,} tokens"
    return facts or {"origin": "unknown: the folder contains no facts about a run"}


def _evaluation(model: Model) -> str:
    validation = model.card.get("validation") or {}
    results = {"": validation, **{f", on {name}": result for name, result in (validation.get("sets") or {}).items()}}
    facts = {
        f"{_METRICS.get(key, key.replace('_', ' '))}{text}": f"{value:.4f}"
        for text, result in results.items()
        for key, value in result.items()
        if isinstance(value, float)
    }
    if not facts:
        return "None: the folder contains no validation results."
    own: Table = validation.get("objective") or {}
    if _objective(model) == "causal":
        facts = {"loss (nats per token)": f"{own['loss']:.4f}", "accuracy": f"{own['accuracy']:.4f}"} if own else {}
        return "On held-out text. Each token is predicted from the tokens before it.\n\n" + _table(facts)
    if _detects_replaced(model):
        facts |= {key.replace("_", " "): f"{value:.4f}" for key, value in own.items() if key.startswith("rtd_")}
        return "On held-out text. Loss and accuracy of masked tokens are those of the generator.\n\n" + _table(facts)
    return "On held-out text, with 15 % of the tokens masked.\n\n" + _table(facts)


def _verification(parity: Parity | None, environment: Table, more: Table) -> str:
    recorded = cast("Table", environment.get("determinism", {}))
    versions = {name: str(recorded[name]) for name in ("unmask", "torch", "tokenizers", "python") if name in recorded}
    versions["torch, at export"] = torch.__version__
    if parity is None:
        return "**Unverified**: this folder was not compared with `transformers`.\n\n" + _table({**more, **versions})
    outputs = "hidden states" if parity.architecture.endswith("Model") else "logits"
    facts = {
        "compared with": f"`transformers` {parity.transformers}, float32",
        "texts": f"{parity.source}: {parity.texts} texts, {parity.tokens:,} tokens; all token ids are equal",
        f"largest difference of {outputs}": f"{parity.logits:.1e} (limit {parity.limit:.2g})",
    }
    if parity.pair is not None:
        facts["largest difference of the pair head"] = f"{parity.pair:.1e}"
    return _table({**facts, **more, **versions})


def _table(facts: Table) -> str:
    cells = {key: str(value).replace("|", r"\|") for key, value in facts.items()}
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {cell} |" for key, cell in cells.items())])


def _read_recipe(run: Path | None) -> dict[str, Any]:
    """Return the recipe of a run; empty if it can't be read, so that the export doesn't fail."""
    try:
        return {} if run is None else tomllib.loads((run / RunLayout.RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _read_environment(run: Path | None) -> Table:
    """Return env.json of a run; empty if it can't be read."""
    try:
        environment: Any = {} if run is None else files.read_json(run / RunLayout.ENVIRONMENT)
    except UnmaskError:
        return {}
    return cast("Table", environment) if isinstance(environment, dict) else {}


def _without_directories(value: Any) -> Any:
    """Return settings with every path reduced to its last part: directories of the author's machine are private."""
    if isinstance(value, dict):
        return {key: _without_directories(inner) for key, inner in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_without_directories(inner) for inner in cast("Sequence[Any]", value)]
    is_path = isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("./", "../", "~")))
    return Path(value).name if is_path else value
