"""Texts in three scripts, and tokenizers of several kinds."""

from __future__ import annotations

import random
from functools import cache

from unmask.tokenization.settings import ByteBpeConfig, CharacterConfig, WordPieceConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer

ENGLISH = (
    "the cat sat on the mat, and looked at the unbelievable moonlight.",
    "a dog ran over the hillside to meet the old grandfather!",
    "she gave him a handwritten book about the wandering birds of the north;",
    "the ship came homeward with salt and silver, wine and candlelight.",
    "we walked alongside the riverbank until the afternoon was gone.",
)
KOREAN = (
    "고양이가 매트 위에 앉아서 달을 바라보았다.",
    "강아지는 언덕을 넘어 할아버지를 만나러 달려갔다!",
    "그녀는 그에게 북쪽의 새들에 관한 책을 주었습니다.",
    "우리는 빛이 사라질 때까지 강가를 따라 걸었어요.",
)
CHINESE = (
    "猫坐在垫子上，看着月亮。",
    "一只狗跑过山去见那位老人！",
    "她给了他一本关于北方鸟类的书。",
    "我们沿着河走，直到光线消失。",
)
SENTENCES = {"english": ENGLISH, "korean": KOREAN, "chinese": CHINESE}
WORDPIECES = {"english": 110, "korean": 110, "chinese": 50}


def documents(language: str) -> list[str]:
    """Return 160 documents of 3 to 10 sentences, always the same."""
    choice = random.Random(5)
    return [" ".join(choice.choices(SENTENCES[language], k=choice.randint(3, 10))) for _ in range(160)]


@cache
def trained(language: str, kind: str) -> Tokenizer:
    """Return a tokenizer trained on the documents, so small that many words have several tokens."""
    settings = {
        "wordpiece": WordPieceConfig(vocab_size=WORDPIECES[language], min_frequency=1),
        "bpe": ByteBpeConfig(vocab_size=330, min_frequency=1),
        "characters": CharacterConfig(),
    }
    return train_tokenizer(documents(language), settings[kind])
