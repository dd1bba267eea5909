"""Libraries that load an export: their predictions and vectors are those of unmask."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import unmask
from unmask.models import build_model
from unmask.models.bert import BertConfig
from unmask.models.model import Model, save_model
from unmask.models.modernbert import ModernBertConfig
from unmask.tokenization.tokenizer import Tokenizer

BERT = BertConfig(
    num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48, max_position_embeddings=64
)
MODERNBERT = ModernBertConfig(
    num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48, local_attention=8
)
PROMPTS = {
    "english": ("the cat [MASK] on the mat .", "[MASK] dog ran over the [MASK] .", "she gave him a [MASK]"),
    "korean": ("고양이가 [MASK] 위에 앉아서", "[MASK] 언덕을 넘어 [MASK] .", "그녀는 그에게 [MASK]"),
}
CASES = [(kind, language) for kind in ("character", "wordpiece", "bpe", "unigram") for language in PROMPTS]


@pytest.fixture(scope="session")
def exported(tokenizers: dict[tuple[str, str], Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """One folder per tokenizer and language; BERT and ModernBERT in turn."""
    folders: dict[Any, Path] = {}
    for number, case in enumerate(CASES):
        tokenizer = tokenizers[case]
        torch.manual_seed(number)
        shape = BERT if number % 2 else MODERNBERT
        encoder, head = build_model(shape, tokenizer.size)
        with torch.no_grad():
            for parameter in (*encoder.parameters(), *head.parameters()):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            # Special tokens are never masked in training, so no trained model predicts them.
            head.get_parameter("bias")[list(tokenizer.special_ids)] = -20.0
        folder = tmp_path_factory.mktemp("models")
        save_model(folder / "source", Model(encoder.eval(), head.eval(), tokenizer, shape, {"context": 64}))
        unmask.export(folder / "source", folder / "exported")
        folders[case] = folder / "exported"
    return folders


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_pipeline_gives_the_five_predictions_of_fill(case: tuple[str, str], exported: dict[Any, Path]) -> None:
    from transformers import pipeline

    hf_pipeline = pipeline("fill-mask", model=str(exported[case]), device="cpu")
    model = unmask.load(exported[case])
    mask = model.tokenizer.id_to_token(model.tokenizer.mask_id)
    for prompt in PROMPTS[case[1]]:
        (filled,) = unmask.fill(model, prompt)
        predictions = hf_pipeline(prompt.replace("[MASK]", mask))
        predictions = predictions if isinstance(predictions[0], list) else [predictions]
        assert len(predictions) == len(filled.masks)
        for mask_prediction, expected in zip(filled.masks, predictions, strict=True):
            candidates = mask_prediction.candidates
            assert [candidate.id for candidate in candidates] == [entry["token"] for entry in expected]
            scores = [entry["score"] for entry in expected]
            assert [candidate.score for candidate in candidates] == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_sentence_transformers_encodes(case: tuple[str, str], exported: dict[Any, Path]) -> None:
    from sentence_transformers import SentenceTransformer

    transformer = SentenceTransformer(str(exported[case]), device="cpu")
    texts = [re.sub(r" *\[MASK\] *", " ", prompt) for prompt in PROMPTS[case[1]]]
    vectors = np.asarray(transformer.encode(texts))
    assert vectors.shape == (3, 32) and np.isfinite(vectors).all()
    # the mean of unmask's hidden states, padding left out
    model = unmask.load(exported[case])
    encoded = model.tokenizer.encode(texts[0])
    from unmask.core.types import Sample, pack

    with torch.no_grad():
        hidden = model.encoder(pack([Sample(*model.tokenizer.add_special_tokens(encoded.ids, encoded.marks))]))
    np.testing.assert_allclose(vectors[0], hidden.mean(0).numpy(), atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_trainer_fine_tunes(case: tuple[str, str], exported: dict[Any, Path], tmp_path: Path) -> None:
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(exported[case])
    model = AutoModelForSequenceClassification.from_pretrained(exported[case], num_labels=2)
    texts = [prompt.replace("[MASK]", "") for prompt in PROMPTS[case[1]]] * 4
    rows = [{**tokenizer(text, truncation=True), "labels": number % 2} for number, text in enumerate(texts)]
    before = model.base_model.get_input_embeddings().weight.detach().clone()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True,
            save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, learning_rate=1e-3, logging_steps=1,
        ),
        train_dataset=rows,  # pyright: ignore[reportArgumentType]
        data_collator=DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert not torch.equal(before, model.base_model.get_input_embeddings().weight)
