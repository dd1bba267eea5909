"""Heads have the weights and logits of the classes of transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unmask.core.errors import ModelError
from unmask.hub.from_hf import open_model
from unmask.models.model import Model
from unmask.tokenization.tokenizer import Tokenizer
from unmask.training.finetuning.encode import encode_texts, packed
from unmask.training.finetuning.examples import Example
from unmask.training.finetuning.heads import (
    Classifier,
    HeadShape,
    Kind,
    build_classifier,
    has_token_types,
    save_classifier,
    supported,
    with_pooler,
)
from unmask.training.finetuning.settings import Pooling

CASES: list[tuple[str, Kind, Pooling]] = [
    ("bert", "SequenceClassification", "cls"),
    ("bert-pair", "SequenceClassification", "cls"),
    ("roberta", "SequenceClassification", "cls"),
    ("modernbert", "SequenceClassification", "cls"),
    ("modernbert", "SequenceClassification", "mean"),
    ("bert", "TokenClassification", "cls"),
    ("roberta", "TokenClassification", "cls"),
    ("modernbert", "TokenClassification", "cls"),
]
TEXTS = ("the film was good", "we saw music today and the story was awful and dull and bad", "fine")


def build(model: Model, kind: Kind, pooling: Pooling, outputs: int = 3) -> tuple[Classifier, list[str]]:
    torch.manual_seed(3)
    parts = copy.deepcopy((model.encoder, model.head, model.pair))
    classifier, notes = build_classifier(*parts, HeadShape(kind, outputs, 0.1, pooling))
    with torch.no_grad():
        classifier.head.classifier.bias.add_(torch.randn(outputs))
    return classifier.eval(), notes


def hf_model(folder: Path, architecture: str) -> Any:
    import transformers

    model, report = getattr(transformers, architecture).from_pretrained(
        folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.eval()


@torch.inference_mode()
def scores(classifier: Classifier, tokenizer: Tokenizer, examples: list[Example]) -> list[Tensor]:
    """Scores of a packed batch, split into those of each example: of all its tokens, or of the text."""
    import numpy as np

    types = has_token_types(classifier.encoder.settings)
    data = encode_texts(
        examples, np.zeros(len(examples), np.int64), tokenizer, 64, token_types=types, on_progress=lambda _: None
    )
    batch, positions_M, _ = packed(data.sequences)
    if classifier.kind == "TokenClassification":
        return list(classifier(batch, torch.arange(batch.tokens)).split(batch.cu_seqlens.diff().tolist()))
    return list(classifier(batch, positions_M))


@pytest.mark.parametrize(("name", "kind", "pooling"), CASES)
@torch.inference_mode()
def test_logits_are_those_of_transformers(
    models: dict[str, Path], tmp_path: Path, name: str, kind: Kind, pooling: Pooling
) -> None:
    from transformers import AutoTokenizer

    model = open_model(models[name])
    classifier, _ = build(model, kind, pooling)
    tokenizer = model.tokenizer
    architecture = save_classifier(tmp_path, classifier, tokenizer, ("x", "y", "z"), dropout=0.1, longest=32)
    expected = hf_model(tmp_path, architecture)
    assert expected.config.id2label == {0: "x", 1: "y", 2: "z"}
    auto_tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert auto_tokenizer.model_max_length == 32
    found = scores(classifier, tokenizer, [Example((text,), ("x",), "") for text in TEXTS])
    inputs = auto_tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    logits = expected(**inputs).logits
    for number, score in enumerate(found):
        reference = logits[number] if kind == "SequenceClassification" else logits[number, : len(score)]
        assert torch.allclose(score, reference, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "modernbert"])
@torch.inference_mode()
def test_logits_of_pairs_are_those_of_transformers(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    model = open_model(models[name])
    classifier, _ = build(model, "SequenceClassification", "cls")
    architecture = save_classifier(tmp_path, classifier, model.tokenizer, ("x", "y", "z"), dropout=0.1, longest=32)
    expected = hf_model(tmp_path, architecture)
    auto_tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    pairs = [(TEXTS[0], TEXTS[2]), (TEXTS[2], TEXTS[1])]
    found = scores(classifier, model.tokenizer, [Example(pair, ("x",), "") for pair in pairs])
    for pair, score in zip(pairs, found, strict=True):
        assert torch.allclose(score, expected(**auto_tokenizer(*pair, return_tensors="pt")).logits[0], atol=1e-5)


@pytest.mark.parametrize("name", ["bert-pair", "modernbert"])
def test_pretrained_layers_are_loaded_where_transformers_loads_them(models: dict[str, Path], name: str) -> None:
    import transformers

    architecture = "BertForSequenceClassification" if name == "bert-pair" else "ModernBertForSequenceClassification"
    expected = getattr(transformers, architecture).from_pretrained(models[name], local_files_only=True)
    classifier, notes = build(open_model(models[name]), "SequenceClassification", "cls", outputs=2)
    assert notes == []
    layers = expected.bert.pooler if name == "bert-pair" else expected.head
    for tensor_name, tensor in classifier.head.transform.state_dict().items():
        assert torch.equal(tensor, layers.state_dict()[tensor_name])


@pytest.mark.parametrize("architecture", ["BertModel", "BertForSequenceClassification"])
def test_a_pooler_without_a_head_for_pairs_is_kept(models: dict[str, Path], tmp_path: Path, architecture: str) -> None:
    import transformers

    source = getattr(transformers, architecture).from_pretrained(models["bert-pair"], local_files_only=True)
    source.save_pretrained(tmp_path)
    open_model(models["bert-pair"]).tokenizer.save(tmp_path)
    classifier, notes = build(with_pooler(open_model(tmp_path)), "SequenceClassification", "cls")
    assert notes == []
    pooler = source.pooler if architecture == "BertModel" else source.bert.pooler
    for name, tensor in classifier.head.transform.state_dict().items():
        assert torch.equal(tensor, pooler.state_dict()[name])
    assert with_pooler(open_model(models["bert"])).pair is None


def test_a_new_pooler_is_noted(models: dict[str, Path]) -> None:
    _, notes = build(open_model(models["bert"]), "SequenceClassification", "cls")
    assert notes == ["initialized the pooler: the model was pretrained without one"]
    assert build(open_model(models["bert"]), "TokenClassification", "cls")[1] == []


def test_architectures_without_a_class_are_errors(models: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="no class for classification with a model of kind 'neomme'"):
        supported(open_model(models["neomme"]).settings, "x", None)
    with pytest.raises(ModelError, match="first token, not the mean"):
        supported(open_model(models["bert"]).settings, "x", "mean")
