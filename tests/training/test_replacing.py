"""A model that is loaded while it is replaced: the old or the new one, never a mixture, and no error."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from unmask.models import build_model
from unmask.models.model import Model, load
from unmask.models.modernbert import ModernBertConfig
from unmask.tokenization.settings import WordPieceConfig
from unmask.tokenization.tokenizer import train_tokenizer
from unmask.training.checkpoint import save_best

SHAPE = ModernBertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16)


def test_the_best_model_can_be_loaded_while_it_is_replaced(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 20, WordPieceConfig(vocab_size=24))

    def constant(value: float) -> Model:
        encoder, head = build_model(SHAPE, tokenizer.size)
        for parameter in [*encoder.parameters(), *head.parameters()]:
            torch.nn.init.constant_(parameter, value)
        return Model(encoder, head, tokenizer, SHAPE)

    models, done = [constant(0.25), constant(0.5)], threading.Event()
    save_best(tmp_path, models[0])

    def replace() -> None:
        for turn in range(60):
            save_best(tmp_path, models[turn % 2])
        done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    seen: set[float] = set()
    while not done.is_set():
        opened = load(tmp_path)
        values = {value for parameter in opened.encoder.parameters() for value in parameter.unique().tolist()}
        assert len(values) == 1, "of one save"
        seen |= values
    writer.join()
    assert seen <= {0.25, 0.5} and seen
