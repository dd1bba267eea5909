"""Heads for sequence and token classification, with the same weights as their classes in `transformers`.

- BertForSequenceClassification: pooler (dense layer and tanh on the first token), dropout, linear map. The pooler is
  that of the sentence pair head, if the model has one.
- RobertaForSequenceClassification, XLMRobertaForSequenceClassification: dropout, dense layer, tanh, dropout, linear
  map.
- ModernBertForSequenceClassification and ModernBertForTokenClassification: dense layer, GELU and norm of the masked
  language modeling head, dropout, linear map.
- BertForTokenClassification and those of RoBERTa and XLM-R: dropout, linear map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from unmask.core import files
from unmask.core.errors import ModelError
from unmask.core.files import RunLayout
from unmask.core.types import Batch
from unmask.hub.from_hf import read_tensors
from unmask.models import EncoderConfig, EncoderModule, HeadModule
from unmask.models.bert import BertConfig, SentencePairHead
from unmask.models.hf_format import hf_tensor_names, to_hf_config
from unmask.models.layers import initialized_linear
from unmask.models.model import Model
from unmask.models.modernbert import ModernBertConfig, ModernBertHead
from unmask.tokenization.tokenizer import Tokenizer
from unmask.training.finetuning.settings import Pooling

Supported = BertConfig | ModernBertConfig
Kind = Literal["SequenceClassification", "TokenClassification"]
_CLASSES: Final = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
_POOLER: Final = ".pooler.dense."
_ROLES: Final = ("pad", "unk", "cls", "sep", "mask")


def supported(settings: EncoderConfig, path: str, pooling: Pooling | None) -> tuple[Supported, Pooling]:
    """Return the settings of an encoder that has classes for classification, and the vector of a text.

    Raises:
        ModelError: `transformers` has no such class for this architecture, or BERT should use the mean.
    """
    if not isinstance(settings, BertConfig | ModernBertConfig):
        raise ModelError(
            f"transformers has no class for classification with a model of kind {settings.kind!r}",
            location=path,
            hint="use a BERT, RoBERTa, XLM-R or ModernBERT model",
        )
    if isinstance(settings, BertConfig):
        if pooling == "mean":
            raise ModelError(
                "BERT's class for sequence classification uses the first token, not the mean",
                location="--pooling mean",
                hint="leave it out, or use a ModernBERT model",
            )
        return settings, "cls"
    return settings, pooling or "mean"


def with_pooler(model: Model) -> Model:
    """Return a BERT model with the pooler in its folder, if it was left out because there is no sentence pair head.

    BertModel and BertForSequenceClassification have a pooler without the classifier of pairs.
    """
    if model.pair is not None or not isinstance(model.settings, BertConfig) or model.settings.model_type != "bert":
        return model
    tensors, _ = read_tensors(Path(model.path))
    found = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if _POOLER in f".{name}"}
    if set(found) != {"weight", "bias"}:
        return model
    pair = SentencePairHead(model.settings)
    pair.pooler.load_state_dict(found)
    return replace(model, pair=pair)


class _Pooler(nn.Module):
    """Dense layer and tanh; RoBERTa also has dropout before it."""

    def __init__(self, dense: nn.Linear, dropout: float) -> None:
        super().__init__()
        self.dense = dense
        self._dropout = dropout

    def forward(self, hidden_MD: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
        """Return the pooled vectors."""
        return self.dense(F.dropout(hidden_MD, self._dropout, self.training)).tanh()


class _PredictionHead(nn.Module):
    """Dense layer, GELU and norm of ModernBERT's head for masked language modeling."""

    def __init__(self, head: ModernBertHead) -> None:
        super().__init__()
        self.dense, self.norm = head.dense, head.norm

    def forward(self, hidden_MD: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
        """Return the vectors that the linear map takes."""
        return self.norm(F.gelu(self.dense(hidden_MD)))


class ClassificationHead(nn.Module):
    """The layers between the vector of a text or token and its scores."""

    def __init__(self, transform: nn.Module, classifier: nn.Linear, dropout: float) -> None:
        super().__init__()
        self.transform, self.classifier = transform, classifier
        self._dropout = dropout

    def matrix_parameters(self) -> Iterator[Tensor]:
        """Yield no matrix: AdamW optimizes all of them."""
        yield from ()

    def forward(self, hidden_MD: Float[Tensor, "M D"]) -> Float[Tensor, "M C"]:
        """Return scores in float32."""
        return self.classifier(F.dropout(self.transform(hidden_MD), self._dropout, self.training)).float()


class Classifier(nn.Module):
    """An encoder with a classification head."""

    def __init__(self, encoder: EncoderModule, head: ClassificationHead, kind: Kind, pooling: Pooling) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.kind: Kind = kind
        self.pooling: Pooling = pooling

    def forward(self, batch: Batch, positions_M: Int[Tensor, "M"]) -> Float[Tensor, "M C"]:
        """Return scores at positions; with pooling "mean", of each sequence."""
        if self.kind == "TokenClassification" or self.pooling == "cls":
            return self.head(self.encoder(batch, positions_M))
        hidden_TD = self.encoder(batch)
        lengths_B = batch.cu_seqlens.diff().long()
        sequence_T = torch.repeat_interleave(torch.arange(batch.num_samples, device=hidden_TD.device), lengths_B)
        sum_BD = hidden_TD.new_zeros(batch.num_samples, hidden_TD.shape[1]).index_add(0, sequence_T, hidden_TD)
        return self.head(sum_BD / lengths_B[:, None])


@dataclass(frozen=True)
class HeadShape:
    """What a head is built for."""

    kind: Kind
    outputs: int
    dropout: float
    pooling: Pooling


def build_classifier(
    encoder: EncoderModule, head: HeadModule, pair: nn.Module | None, shape: HeadShape
) -> tuple[Classifier, list[str]]:
    """Return an encoder with a new head that begins with the layers of the other heads, and notes on new weights.

    New weights come from torch's default generator, which the caller seeds.
    """
    settings: Supported = encoder.settings
    width, std = settings.hidden_size, settings.initializer_range
    notes: list[str] = []
    if isinstance(settings, ModernBertConfig):
        transform, std = _PredictionHead(cast("ModernBertHead", head)), width**-0.5
    elif shape.kind == "TokenClassification":
        transform = nn.Identity()
    elif isinstance(pair, SentencePairHead):
        transform = _Pooler(pair.pooler, 0.0)
    else:
        dense = initialized_linear(width, width, std, bias=True)
        transform = _Pooler(dense, shape.dropout if settings.model_type != "bert" else 0.0)
        notes.append("initialized the pooler: the model was pretrained without one")
    classifier = initialized_linear(width, shape.outputs, std, bias=True)
    return Classifier(
        encoder, ClassificationHead(transform, classifier, shape.dropout), shape.kind, shape.pooling
    ), notes


# Hugging Face format ------------------------------------------------------------------------------------------------


def class_name(settings: Supported, kind: Kind) -> str:
    """Return the name of the class in `transformers`."""
    return (_CLASSES[settings.model_type] if isinstance(settings, BertConfig) else "ModernBert") + f"For{kind}"


def _head_names(settings: Supported, kind: Kind) -> dict[str, str]:
    """Map the prefixes of tensor names in `transformers` to those in `ClassificationHead`."""
    if isinstance(settings, ModernBertConfig):
        return {"head.dense": "transform.dense", "head.norm": "transform.norm", "classifier": "classifier"}
    if kind == "TokenClassification":
        return {"classifier": "classifier"}
    if settings.model_type == "bert":
        return {"bert.pooler.dense": "transform.dense", "classifier": "classifier"}
    return {"classifier.dense": "transform.dense", "classifier.out_proj": "classifier"}


def _hf_tensors(classifier: Classifier) -> dict[str, Tensor]:
    settings: Supported = classifier.encoder.settings
    states = {f"encoder.{name}": tensor for name, tensor in classifier.encoder.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    for hf_name, names in hf_tensor_names(settings, pair=False).items():
        if names[0].startswith("encoder."):
            parts = [states[name] for name in names]
            tensors[hf_name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    head = classifier.head.state_dict()
    for hf_prefix, prefix in _head_names(settings, classifier.kind).items():
        parts = [name.removeprefix(f"{prefix}.") for name in head if name.startswith(f"{prefix}.")]
        tensors |= {f"{hf_prefix}.{part}": head[f"{prefix}.{part}"] for part in parts}
    return tensors


def save_classifier(
    folder: Path, classifier: Classifier, tokenizer: Tokenizer, labels: Sequence[str], *, dropout: float, longest: int
) -> str:
    """Write a model in the format of `transformers`; without labels, it is a regression. Return the class's name."""
    settings: Supported = classifier.encoder.settings
    ids = {name: id for name in _ROLES if (id := tokenizer.role_id(f"{name}_token")) is not None}
    names = list(labels) or ["score"]
    name = class_name(settings, classifier.kind)
    hf_config: Mapping[str, Any] = {
        **to_hf_config(settings, classifier.encoder.vocab_size, ids),
        "architectures": [name],
        "id2label": {str(number): label for number, label in enumerate(names)},
        "label2id": {label: number for number, label in enumerate(names)},
        "classifier_dropout": dropout,
    }
    if classifier.kind == "SequenceClassification":
        hf_config |= {"problem_type": "single_label_classification" if labels else "regression"}
        hf_config |= {"classifier_pooling": classifier.pooling} if isinstance(settings, ModernBertConfig) else {}
    tensors = _hf_tensors(classifier)
    cpu_tensors = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    files.save_tensors(cpu_tensors, folder / RunLayout.WEIGHTS, metadata={"format": "pt"})
    files.write_json(folder / RunLayout.CONFIG, hf_config)
    inputs = (
        ("input_ids", "token_type_ids", "attention_mask")
        if has_token_types(settings)
        else ("input_ids", "attention_mask")
    )
    tokenizer.save(folder, inputs=inputs, longest=longest)
    return name


def has_token_types(settings: Supported) -> bool:
    """Return whether the model distinguishes the two texts of a pair. RoBERTa and ModernBERT don't."""
    return isinstance(settings, BertConfig) and settings.type_vocab_size > 1 and settings.model_type == "bert"
