"""Room card: sentences to compare two programs on.

Comes in: a model, and the run that made it if there is one. Goes out: texts and where they are from: what the run held
out, as far as the cache still has it; else sentences of several languages, those that the tokenizer knows. Called by:
exporting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from unmask import store
from unmask.bundle import Model
from unmask.errors import UnmaskError
from unmask.text.building import FACTS, TOLD
from unmask.text.cache import default_cache
from unmask.text.shards import open_shards

_TEXTS: Final = 12
_TOKENS: Final = 512  # of a text, at most: longer than four local windows
_UNKNOWN: Final = 0.2  # of a sentence's tokens, at most
_FEWEST: Final = 2

SENTENCES: Final = (
    "The old man walked down to the river before the sun was up, and nobody saw him come back.",
    'It isn\'t what she said (in 1997, at least): "No more than 3.5 % of them know."',
    "그는 어제 서울에서 친구를 만나 늦게까지 이야기를 나누었다.",
    "이 영화는 처음부터 끝까지 지루했지만, 음악만은 정말 좋았어요!",
    "他昨天在北京的图书馆里读了一整天的书。",
    "東京では昨日から雨が降り続いているので、電車が遅れています。",
    "Der Fluss führt seit gestern Hochwasser, und die Brücke ist gesperrt.",
    "La bibliothèque où j'ai travaillé cet été n'ouvre qu'à dix heures.",
    "Библиотека закрыта до понедельника, потому что меняют крышу.",
    "كان الطقس جميلا أمس فذهبنا إلى البحر مع الأصدقاء.",
    "El tren de las nueve salió tarde porque había nieve en las vías.",
    "def mean(values):\n    return sum(values) / len(values)",
    "ACGTACGGTTAACCGATCGATTACAGGCATGAGCCACCGCG",
)


def sample(model: Model, run: Path | None) -> tuple[list[str], str]:
    """Texts, and where they are from."""
    if run is not None and (held := _held_out(model, run)):
        return held, "texts that the run held out"
    known = [text for text in SENTENCES if _is_known(model, text)]
    if len(known) >= _FEWEST:
        return known, "sentences of several languages"
    return _from_pieces(model), "texts put together from its own pieces"


def _held_out(model: Model, run: Path) -> list[str]:
    """What the run held out, found in the cache by the facts that the run wrote down."""
    try:
        facts: Any = store.read_json(run / "env.json")["text"]["facts"]
        for told in sorted(default_cache().glob(f"*/{TOLD}/{FACTS}")):
            if store.read_json(told) == facts:
                shards = open_shards(told.parent.parent / "held-out")
                break
        else:
            return []
        if shards.tokenizer_fingerprint != model.tokenizer.fingerprint:
            return []
        longest_first = np.argsort(-shards.lengths_N, kind="stable")[:_TEXTS].tolist()
        ids = [shards.ids(one, 0, min(int(shards.lengths_N[one]), _TOKENS)) for one in longest_first]
    except (UnmaskError, OSError, KeyError, TypeError):  # of another version, or gone: other sentences do as well
        return []
    return [text for one in ids if (text := model.tokenizer.decode(one)).strip()]


def _is_known(model: Model, text: str) -> bool:
    ids = model.tokenizer.encode(text, model.words).ids
    return len(ids) > 0 and float((ids == model.tokenizer.unknown_id).mean()) <= _UNKNOWN


def _from_pieces(model: Model) -> list[str]:
    """Texts of pieces that stand evenly spread in the vocabulary."""
    ordinary_N = model.tokenizer.ordinary_N
    spread = ordinary_N[np.linspace(0, len(ordinary_N) - 1, 8 * _TEXTS).astype(np.int64)]
    return [text for row in spread.reshape(_TEXTS, 8) if (text := model.tokenizer.decode(row)).strip()]
