"""Tokenizers of every kind in two languages, trained once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from unmask.tokenization.settings import ByteBpeConfig, CharacterConfig, UnigramConfig, WordPieceConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer

ENGLISH = (
    "the cat sat on the mat and looked at the moon .",
    "a dog ran over the hill to meet the old man .",
    "she gave him a book about the birds of the north .",
    "the ship came home with salt and silver and wine .",
)
KOREAN = (
    "고양이가 매트 위에 앉아서 달을 바라보았다 .",
    "개가 언덕을 넘어 늙은 사람을 만나러 달려갔다 .",
    "그녀는 그에게 북쪽의 새들에 대한 책을 주었다 .",
    "배가 소금과 은과 포도주를 싣고 집으로 돌아왔다 .",
)
LINES = {"english": ENGLISH, "korean": KOREAN}
KINDS = {
    "character": CharacterConfig(min_frequency=1),
    "wordpiece": WordPieceConfig(vocab_size=100),
    "bpe": ByteBpeConfig(vocab_size=320),
    "unigram": UnigramConfig(vocab_size=90),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizers() -> dict[tuple[str, str], Tokenizer]:
    return {
        (kind, language): train_tokenizer(lines * 20, settings)
        for kind, settings in KINDS.items()
        for language, lines in LINES.items()
    }
