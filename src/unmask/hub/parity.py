"""Compares the token ids and logits of a model with those of transformers on its exported folder."""

from __future__ import annotations

import math
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
from unmask.core.files import RunLayout
from unmask.core.format import join_names
from unmask.core.types import SPECIAL, Sample, logits_at, pack
from unmask.data.shards import open_shards
from unmask.models.bert import BertConfig
from unmask.models.model import Model

TOLERANCE: Final = 1e-4  # of a logit in float32
# Of the largest logit. A model whose logits reached 30 differed by 6e-5 between onnxruntime and PyTorch. On other
# texts, its float32 logits were 5e-5 off those in float64, and those of onnxruntime 4e-5.
_RELATIVE_TOLERANCE: Final = 1e-5
_MAX_LENGTH: Final = 512
_NAMES_SHOWN: Final = 5
_REPORT: Final = "report this message; --unverified writes the folder without the comparison"


@dataclass(frozen=True)
class Parity:
    """Result of a comparison with transformers: its extent and the largest differences."""

    architecture: str
    texts: int
    tokens: int
    logits: float  # largest difference of logits; of hidden states for an encoder without heads
    limit: float  # of this difference
    pair: float | None  # of the pair head's logits, or of its pooler's output; None without a pair head
    source: str  # description of the texts
    transformers: str  # version


def tolerance(largest: float) -> float:
    """Return how much the outputs of two implementations may differ in float32, by the largest output."""
    return max(TOLERANCE, _RELATIVE_TOLERANCE * largest) if math.isfinite(largest) else TOLERANCE


@torch.inference_mode()
def compare(folder: Path, model: Model, texts: Sequence[str], source: str) -> Parity:
    """Load a folder with transformers and compare its token ids and float32 logits with those of a model.

    Raises:
        ModelError: ids differ, logits differ by more than `tolerance`, or transformers doesn't find all tensors.
    """
    import transformers

    architecture = str(files.read_json(folder / RunLayout.CONFIG)["architectures"][0])
    if not hasattr(transformers, architecture):
        raise ModelError(
            f"transformers {transformers.__version__} has no {architecture}",
            hint="install a later version: pip install --upgrade transformers; or skip the comparison: --unverified "
            "(unverified=True)",
        )
    with quiet_transformers():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        _compare_ids(tokenizer, model, texts)
        hf_model, report = getattr(transformers, architecture).from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    unmatched = {name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind]}
    if architecture.endswith("Model") and model.pair is None:
        # transformers adds a pooler with random weights, on which the hidden states don't depend.
        unmatched = {name for name in unmatched if not str(name).startswith("pooler.")}
    if unmatched:
        names = join_names(sorted(map(str, unmatched)), _NAMES_SHOWN)
        raise ModelError(f"transformers doesn't find its tensors in the export: {names}", hint=_REPORT)
    hf_model.eval()
    logits, pair, tokens = _Difference(), _Difference(), 0
    samples = _samples(model, texts)
    for sample in samples:
        output, pair_output = _model_output(model, sample, architecture)
        hf_output, hf_pair_output = _hf_output(hf_model, model, sample, architecture)
        logits.add(output, hf_output)
        if pair_output is not None and hf_pair_output is not None:
            pair.add(pair_output, hf_pair_output)
        tokens += len(sample.ids)
    for name, found in (("logits", logits), ("logits of the pair head", pair)):
        if not found.largest <= found.limit:
            raise ModelError(
                f"{name} differ from those of transformers by {found.largest:.2g}, more than {found.limit:.2g}",
                location=architecture,
                hint=_REPORT,
            )
    of_pair = pair.largest if model.pair is not None else None
    return Parity(
        architecture, len(samples), tokens, logits.largest, logits.limit, of_pair, source, transformers.__version__
    )


class _Difference:
    """The largest difference of outputs from those of transformers so far; NaN if any output is NaN."""

    def __init__(self) -> None:
        self.largest = self._size = 0.0

    @property
    def limit(self) -> float:
        return tolerance(self._size)

    def add(self, output: Tensor, expected: Tensor) -> None:
        """Compare two outputs."""
        # torch's maximum keeps NaN, which Python's max drops.
        self.largest = float(torch.maximum(torch.tensor(self.largest), (output - expected).abs().max()))
        self._size = max(self._size, float(output.abs().max()))


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Turn off the progress bars and warnings of transformers."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def _compare_ids(tokenizer: Any, model: Model, texts: Sequence[str]) -> None:
    """Compare the ids of each text, and of each text with a mask in its middle."""
    mask = model.tokenizer.id_to_token(model.tokenizer.mask_id)
    for text in texts:
        words = text.split(" ")
        words[len(words) // 2] = mask
        for variant in (text, " ".join(words)):
            encoded = model.tokenizer.encode(variant, model.words, specials_in_text=True)
            ids = model.tokenizer.add_special_tokens(encoded.ids, encoded.marks)[0].tolist()
            hf_ids = list(tokenizer(variant)["input_ids"])
            if ids != hf_ids:
                place = next((i for i, (a, b) in enumerate(zip(ids, hf_ids, strict=False)) if a != b), -1)
                raise ModelError(
                    f"AutoTokenizer gives other ids at position {place}: got {hf_ids[place : place + 5]}, "
                    f"expected {ids[place : place + 5]}",
                    location=repr(variant[:60]),
                    hint=_REPORT,
                )


def _samples(model: Model, texts: Sequence[str]) -> list[Sample]:
    """Return each text as a sample, cut to the model's context; with a pair head also pairs of two texts."""
    max_tokens = min(model.context, _MAX_LENGTH) - model.tokenizer.num_special_tokens()
    encoded = [model.tokenizer.encode(text, model.words).ids[: max(1, max_tokens)] for text in texts]
    samples: list[Sample] = []
    for ids in encoded:
        with_special, _ = model.tokenizer.add_special_tokens(ids, np.zeros(len(ids), np.uint8))
        samples.append(_sample(with_special, np.zeros(len(with_special), np.int64)))
    if model.pair is not None and model.tokenizer.frame.pair is not None:
        before, between, after = model.tokenizer.frame.pair
        half = max(1, (max_tokens - len(between)) // 2)
        for first, second in zip(encoded[::2], encoded[1::2], strict=False):
            ids = np.concatenate([before, first[:half], between, second[:half], after])
            second_type = np.arange(len(ids)) >= len(before) + len(first[:half]) + len(between)
            samples.append(_sample(ids, second_type))
    return samples


def _sample(ids: Any, token_type_ids: Any) -> Sample:
    flags = np.full(len(ids), SPECIAL, np.uint8)
    return Sample(ids.astype(np.int64), flags, token_type_ids=token_type_ids.astype(np.int64))


def _model_output(model: Model, sample: Sample, architecture: str) -> tuple[Tensor, Tensor | None]:
    """Return logits and pair logits; of an encoder without heads, hidden states and the pooler's output."""
    batch = pack([sample])
    hidden_TD: Tensor = model.encoder(batch)
    pair: Any = model.pair
    if architecture.endswith("Model"):
        return hidden_TD, None if pair is None else pair.pooler(hidden_TD[:1]).tanh()
    if model.discriminator is not None:
        return model.discriminator(hidden_TD), None
    logits_TV = logits_at(model.encoder, model.head, batch, torch.arange(len(sample.ids)))
    return logits_TV, None if pair is None else pair(hidden_TD, batch)


def _hf_output(hf_model: Any, model: Model, sample: Sample, architecture: str) -> tuple[Tensor, Tensor | None]:
    """Return the outputs that correspond to `_model_output`, of the transformers model."""
    ids = torch.from_numpy(sample.ids)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    is_bert = isinstance(model.settings, BertConfig) and model.settings.model_type == "bert"
    if is_bert and sample.token_type_ids is not None:
        inputs["token_type_ids"] = torch.from_numpy(sample.token_type_ids)[None]
    output = hf_model(**inputs)
    if architecture.endswith("Model"):
        return output.last_hidden_state[0], getattr(output, "pooler_output", None)
    if model.pair is not None:
        return output.prediction_logits[0], output.seq_relationship_logits
    return output.logits[0], None


# Sample texts -------------------------------------------------------------------------------------------------------

_TEXTS: Final = 12
_MAX_UNKNOWN: Final = 0.2  # of the tokens of a sentence
_MIN_SENTENCES: Final = 2
_GENERATED_TOKENS: Final = 8  # per text

SENTENCES: Final = (
    "The old man walked down to the river before the sun was up, and no one saw him come back.",
    'It isn\'t what she wrote (in 1997, at least): "No more than 3.5 % of them know."',
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


def sample_texts(model: Model, run: Path | None) -> tuple[list[str], str]:
    """Return texts for a comparison and their description.

    The texts are held-out texts of the run. Without these, they are SENTENCES that the tokenizer covers or, if there
    are too few, texts made of tokens.
    """
    if run is not None and (held_out := _held_out(model, run)):
        return held_out, "held-out texts of the run"
    known = [text for text in SENTENCES if _is_known(model, text)]
    if len(known) >= _MIN_SENTENCES:
        return known, "sentences in several languages"
    return _generated_texts(model), "texts made of tokens of the vocabulary"


def _held_out(model: Model, run: Path) -> list[str]:
    """Return the longest held-out documents of a run; none if its token shards are gone or of another tokenizer."""
    try:
        shards = open_shards(Path(files.read_json(run / RunLayout.ENVIRONMENT)["text"]["held_out_shards"]))
        if shards.tokenizer_fingerprint != model.tokenizer.fingerprint:
            return []
        documents = np.argsort(-shards.lengths, kind="stable")[:_TEXTS].tolist()
        ids = [shards.ids(number, 0, min(int(shards.lengths[number]), _MAX_LENGTH)) for number in documents]
    except (UnmaskError, OSError, KeyError, TypeError):  # the cache was cleared, or another version wrote the run
        return []
    return [text for document in ids if (text := model.tokenizer.decode(document)).strip()]


def _is_known(model: Model, text: str) -> bool:
    """Return whether at most 20 % of the tokens of a text are unknown."""
    ids = model.tokenizer.encode(text, model.words).ids
    return len(ids) > 0 and float((ids == model.tokenizer.unknown_id).mean()) <= _MAX_UNKNOWN


def _generated_texts(model: Model) -> list[str]:
    """Return texts made of tokens at equal distances in the vocabulary."""
    regular_ids = model.tokenizer.regular_token_ids
    chosen = regular_ids[np.linspace(0, len(regular_ids) - 1, _GENERATED_TOKENS * _TEXTS).astype(np.int64)]
    rows = chosen.reshape(_TEXTS, _GENERATED_TOKENS)
    return [text for row in rows if (text := model.tokenizer.decode(row)).strip()]
