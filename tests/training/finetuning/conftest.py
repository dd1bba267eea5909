"""Small models of each architecture, and labeled data that a small model can learn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unmask.models import EncoderConfig, build_model, build_pair
from unmask.models.bert import BertConfig
from unmask.models.model import Model, save_model
from unmask.models.modernbert import ModernBertConfig
from unmask.models.neomme import NeoMMEConfig
from unmask.tokenization.settings import WordPieceConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer

GOOD, BAD = ("good", "fine", "great", "lovely"), ("bad", "poor", "awful", "dull")
NEUTRAL = ("the", "film", "music", "story", "was", "and", "we", "saw", "it", "today")
BERT = BertConfig(
    num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=48, max_position_embeddings=64
)
ROBERTA = replace(BERT, model_type="roberta", position_offset=1, type_vocab_size=1)
MODERNBERT = ModernBertConfig(
    num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48, local_attention=8,
    max_position_embeddings=64,
)  # fmt: skip
NEOMME = NeoMMEConfig(
    num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=48, head_dim=16, embedding_rank=16
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def wordpiece() -> Tokenizer:
    lines = [" ".join((*GOOD, *BAD, *NEUTRAL)), "abcdefghijklmnopqrstuvwxyz 0123456789 . , ! ?"]
    return train_tokenizer(lines * 20, WordPieceConfig(vocab_size=120))


def saved(folder: Path, settings: EncoderConfig, tokenizer: Tokenizer, *, pair: bool = False) -> Path:
    """A folder with a model of random weights; norms and biases are random too."""
    torch.manual_seed(1)
    encoder, head = build_model(settings, tokenizer.size)
    pair_head = build_pair(settings).eval() if pair else None
    with torch.no_grad():
        for module in (encoder, head, pair_head):
            for parameter in module.parameters() if module is not None else ():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    save_model(folder, Model(encoder.eval(), head.eval(), tokenizer, settings, {"context": 32}, pair=pair_head))
    return folder


@pytest.fixture(scope="session")
def models(wordpiece: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    kinds: dict[str, EncoderConfig] = {
        "bert": BERT, "bert-pair": BERT, "roberta": ROBERTA, "modernbert": MODERNBERT, "neomme": NEOMME,
    }  # fmt: skip
    return {
        name: saved(folder / name, settings, wordpiece, pair=name == "bert-pair") for name, settings in kinds.items()
    }


def reviews(count: int, seed: int) -> list[tuple[str, str]]:
    """Labels and texts: one word of each text decides."""
    draw = random.Random(seed)
    rows: list[tuple[str, str]] = []
    for _ in range(count):
        label = draw.choice(("neg", "pos"))
        words = [draw.choice(NEUTRAL) for _ in range(4)]
        words.insert(draw.randrange(5), draw.choice(GOOD if label == "pos" else BAD))
        rows.append((label, " ".join(words)))
    return rows


def write_rows(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Path:
    path.write_text("".join("\t".join(row) + "\n" for row in [header, *rows]), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reviews")
    sizes = {"train": 200, "valid": 40, "test": 60}
    return {
        name: write_rows(folder / f"{name}.tsv", ("label", "text"), reviews(size, number))
        for number, (name, size) in enumerate(sizes.items())
    }
