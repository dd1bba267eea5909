"""Room card: whether `transformers` sees in a folder what we see.

Comes in: a folder that was just written, the model that it is of, texts. Goes out: how far ids and logits are apart at
most; a refusal where that is too far. Called by: exporting.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from unmask.core import files
from unmask.core.errors import ModelError, UnmaskError
from unmask.core.files import default_cache
from unmask.core.types import SPECIAL, Sample, logits_at, pack
from unmask.data.prepare import FACTS, META
from unmask.data.shards import open_shards
from unmask.models.bert import BertConfig
from unmask.models.model import CONFIG, Model

TOLERANCE: Final = 1e-4  # of a logit in float32
_LONGEST: Final = 512
_REPORT: Final = "please report it, with this message; --unverified writes the folder all the same"


@dataclass(frozen=True)
class Parity:
    """What was compared, and how far the two were apart at most."""

    architecture: str
    texts: int
    tokens: int
    logits: float  # without a head: of the encoder's vectors
    pair: float | None  # of the pair head's logits, or of what its pooler gives; None: there is none
    source: str  # where the texts are from
    transformers: str  # its version


@torch.inference_mode()
def compare(folder: Path, model: Model, texts: Sequence[str], source: str) -> Parity:
    """Open the folder with `transformers` and compare ids and, in float32, logits.

    Raises:
        ModelError: they differ, or the folder opens with tensors missing; with where and by how much.
    """
    import transformers

    architecture = str(files.read_json(folder / CONFIG)["architectures"][0])
    with _quietly():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        _compare_ids(tokenizer, model, texts)
        theirs, report = getattr(transformers, architecture).from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    lost = {name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind]}
    if not (architecture.endswith("Model") and model.pair is None):
        _refuse_lost(lost)
    else:  # a pooler that the model never had begins anew there, which its vectors don't depend on
        _refuse_lost({name for name in lost if not str(name).startswith("pooler.")})
    theirs.eval()
    largest, largest_pair, tokens = 0.0, 0.0, 0
    given = _framed(model, texts)
    for text in given:
        ours, ours_pair = _ours(model, text, architecture)
        others, others_pair = _theirs(theirs, model, text, architecture)
        largest = max(largest, float((ours - others).abs().max()))
        if ours_pair is not None and others_pair is not None:
            largest_pair = max(largest_pair, float((ours_pair - others_pair).abs().max()))
        tokens += len(text.ids)
    pair = largest_pair if model.pair is not None else None
    for what, difference in (("logits", largest), ("the pair head's logits", largest_pair)):
        if not difference <= TOLERANCE:
            raise ModelError(
                f"{what} differ by {difference:.2g} from those of `transformers`, more than {TOLERANCE:g}",
                location=architecture,
                hint=_REPORT,
            )
    return Parity(architecture, len(given), tokens, largest, pair, source, transformers.__version__)


@contextmanager
def _quietly() -> Generator[None]:
    """Without the progress bars and remarks of `transformers`."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _refuse_lost(names: set[Any]) -> None:
    if names:
        some = ", ".join(sorted(map(str, names))[:5])
        raise ModelError(f"`transformers` doesn't find its tensors in what was written: {some}", hint=_REPORT)


def _compare_ids(tokenizer: Any, model: Model, texts: Sequence[str]) -> None:
    """Ids of each text, and of each with a mask in its middle."""
    mask = model.tokenizer.id_to_token(model.tokenizer.mask_id)
    for text in texts:
        words = text.split(" ")
        words[len(words) // 2] = mask
        for one in (text, " ".join(words)):
            encoded = model.tokenizer.encode(one, model.words, specials_in_text=True)
            ours = model.tokenizer.add_special_tokens(encoded.ids, encoded.marks)[0].tolist()
            theirs = list(tokenizer(one)["input_ids"])
            if ours != theirs:
                place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), -1)
                raise ModelError(
                    f"AutoTokenizer gives other ids: at {place}, {theirs[place : place + 5]} where ours are "
                    f"{ours[place : place + 5]}",
                    location=repr(one[:60]),
                    hint=_REPORT,
                )


def _framed(model: Model, texts: Sequence[str]) -> list[Sample]:
    """Each text as the model reads it, cut to what it holds; with segments also every two of them together."""
    room = min(model.context, _LONGEST) - (2 if model.tokenizer.cls_sep_ids else 0)
    inner = [model.tokenizer.encode(text, model.words).ids[: max(1, room)] for text in texts]
    framed: list[Sample] = []
    for ids in inner:
        whole, _ = model.tokenizer.add_special_tokens(ids, np.zeros(len(ids), np.uint8))
        framed.append(_text(whole, None))
    if model.pair is not None and model.tokenizer.cls_sep_ids is not None:
        first, last = model.tokenizer.cls_sep_ids
        half = max(1, (room - 1) // 2)
        for a, b in zip(inner[::2], inner[1::2], strict=False):
            ids = np.concatenate([[first], a[:half], [last], b[:half], [last]])
            framed.append(_text(ids, np.arange(len(ids)) > len(a[:half]) + 1))
    return framed


def _text(ids: Any, segment: Any) -> Sample:
    kinds = np.zeros(len(ids), np.int64) if segment is None else segment.astype(np.int64)
    return Sample(ids.astype(np.int64), np.full(len(ids), SPECIAL, np.uint8), token_type_ids=kinds)


def _ours(model: Model, text: Sample, architecture: str) -> tuple[Tensor, Tensor | None]:
    batch = pack([text])
    hidden_TD: Tensor = model.encoder(batch)
    pair: Any = model.pair
    if architecture.endswith("Model"):
        return hidden_TD, None if pair is None else pair.pooler(hidden_TD[:1]).tanh()
    logits_TV = logits_at(model.encoder, model.head, batch, torch.arange(len(text.ids)))
    return logits_TV, None if pair is None else pair(hidden_TD, batch)


def _theirs(theirs: Any, model: Model, text: Sample, architecture: str) -> tuple[Tensor, Tensor | None]:
    given = {"input_ids": torch.from_numpy(text.ids)[None], "attention_mask": torch.ones(1, len(text.ids)).long()}
    if (
        text.token_type_ids is not None
        and isinstance(model.settings, BertConfig)
        and model.settings.model_type == "bert"
    ):
        given["token_type_ids"] = torch.from_numpy(text.token_type_ids)[None]
    out = theirs(**given)
    if architecture.endswith("Model"):
        return out.last_hidden_state[0], getattr(out, "pooler_output", None)
    if model.pair is not None:
        return out.prediction_logits[0], out.seq_relationship_logits
    return out.logits[0], None


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
        facts: Any = files.read_json(run / "env.json")["text"]["facts"]
        for told in sorted(default_cache().glob(f"*/{META}/{FACTS}")):
            if files.read_json(told) == facts:
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
    regular_token_ids = model.tokenizer.regular_token_ids
    spread = regular_token_ids[np.linspace(0, len(regular_token_ids) - 1, 8 * _TEXTS).astype(np.int64)]
    return [text for row in spread.reshape(_TEXTS, 8) if (text := model.tokenizer.decode(row)).strip()]
