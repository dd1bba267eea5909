"""Saving and loading of models, and their exchange with transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import unmask
from unmask.core.errors import ModelError
from unmask.core.types import Sample, pack
from unmask.models import EncoderConfig, build_model, build_pair
from unmask.models.bert import BertConfig
from unmask.models.model import Model, load, save_model
from unmask.models.modernbert import ModernBertConfig
from unmask.tokenization.settings import WordPieceConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer

BERT = BertConfig(
    num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48, max_position_embeddings=64
)
MODERNBERT = ModernBertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48)
LINES = ["the cat sat on the mat", "a dog ran over the hill to meet the old man and the ship came home with salt"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(LINES * 20, WordPieceConfig(vocab_size=70))


def model(shape: EncoderConfig, tokenizer: Tokenizer, rows: int = 0, *, pair: bool = False) -> Model:
    torch.manual_seed(3)
    encoder, head = build_model(shape, rows or tokenizer.size)
    return Model(encoder.eval(), head.eval(), tokenizer, shape, pair=build_pair(shape).eval() if pair else None)


def framed(tokenizer: Tokenizer) -> list[Sample]:
    return [Sample(*tokenizer.add_special_tokens(one.ids, one.marks)) for one in map(tokenizer.encode, LINES)]


@pytest.mark.parametrize("shape", [BERT, MODERNBERT], ids=["bert", "modernbert"])
def test_transformers_loads_a_saved_model_with_equal_logits(
    shape: EncoderConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    saved = model(shape, tokenizer, rows=80)
    save_model(tmp_path, saved)
    hf_model, report = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    is_bert = isinstance(shape, BertConfig)
    assert ("token_type_ids" in hf_tokenizer.model_input_names) is is_bert
    given = hf_tokenizer(LINES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = hf_model.eval()(**given).logits.log_softmax(-1)
    texts = framed(tokenizer)
    answers = saved.log_probabilities([t.ids.tolist() for t in texts], [list(range(len(t.ids))) for t in texts])
    for row, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        assert given["input_ids"][row, : len(text.ids)].tolist() == text.ids.tolist()
        torch.testing.assert_close(answer, logits[row, : len(text.ids)], atol=1e-4, rtol=0)
    if is_bert:
        second = hf_tokenizer(*LINES)["token_type_ids"]
        assert sorted(set(second)) == [0, 1], "the second segment of a pair has token type 1"


@pytest.mark.parametrize("pair", [False, True])
def test_a_bert_model_is_loaded_as_it_was_saved(pair: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    saved = model(BERT, tokenizer, pair=pair)
    save_model(tmp_path / "one", saved)
    loaded = load(tmp_path / "one")
    assert (loaded.pair is not None) is pair and loaded.settings == BERT
    save_model(tmp_path / "two", loaded)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    (architecture,) = json.loads((tmp_path / "one" / "config.json").read_text())["architectures"]
    assert architecture == ("BertForPreTraining" if pair else "BertForMaskedLM")
    if saved.pair is not None and loaded.pair is not None:
        batch = pack(framed(tokenizer))
        with torch.no_grad():
            assert torch.equal(saved.pair(saved.encoder(batch), batch), loaded.pair(loaded.encoder(batch), batch))


def test_special_tokens_with_other_names(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(LINES * 20, WordPieceConfig(vocab_size=70))
    renamed = json.loads(tokenizer.to_json().replace("[PAD]", "<empty>").replace("[MASK]", "<gap>"))
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(renamed))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<empty>", "mask_token": "<gap>"}))
    saved = model(BERT, Tokenizer.load(folder))
    save_model(tmp_path / "model", saved)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["pad_token_id"] == 0


def test_fill_with_a_model_saved_by_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForPreTraining, PreTrainedTokenizerFast

    BertForPreTraining(
        BertConfig(vocab_size=72, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path)
    (tmp_path / "own.json").write_text(tokenizer.to_json())
    PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "own.json"), mask_token="[MASK]").save_pretrained(tmp_path)
    opened = load(tmp_path)
    assert opened.context == 512 and opened.pair is not None
    (answer,) = unmask.fill(opened, "the cat [MASK] on the mat")
    assert len(answer.masks[0].candidates) == 5


def test_missing_heads_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(tmp_path, model(BERT, tokenizer, pair=True))
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: t for name, t in tensors.items() if not name.startswith("cls.seq")}, weights)
    with pytest.raises(ModelError, match=r"lacks cls\.seq_relationship") as refused:
        load(tmp_path)
    assert refused.value.location == str(weights)
    save_file({name: t for name, t in tensors.items() if not name.startswith("cls.")}, weights)
    with pytest.raises(ModelError, match="no masked language modeling head"):
        load(tmp_path)
