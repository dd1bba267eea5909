"""ELECTRA (arXiv 2003.10555): a generator that shares the embeddings of an encoder, and a discriminator head.

The encoder of a run is the discriminator, a BERT or ModernBERT encoder. The generator is a smaller encoder of the same
kind. It gets the encoder's embeddings by a linear projection, and the decoder of its vocabulary head is the encoder's
token embedding (section 3.2). For BERT, the generator has the weights of ElectraForMaskedLM of `transformers`, and
encoder and discriminator head have those of ElectraForPreTraining.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, cast

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from unmask.core.errors import ModelError, RecipeError
from unmask.core.types import Batch
from unmask.models import bert, modernbert
from unmask.models.annotated import TutorialConfig
from unmask.models.bert import BertBlock, BertConfig, BertEncoder
from unmask.models.layers import LayerNorm, RotaryEmbedding, initialized_linear
from unmask.models.modernbert import ModernBertBlock, ModernBertConfig, ModernBertEncoder
from unmask.models.neomme import NeoMMEConfig

ElectraEncoderConfig = BertConfig | ModernBertConfig
AnyEncoderConfig = ElectraEncoderConfig | NeoMMEConfig | TutorialConfig


def generator_config(settings: ElectraEncoderConfig, width: float, depth: float) -> ElectraEncoderConfig:
    """Return the architecture of a generator for an encoder.

    Heads keep their width, so the hidden size is that of the rounded number of heads, and the feed-forward network is
    scaled with it.

    Args:
        settings: Architecture of the encoder.
        width: Fraction of the encoder's heads, 0 to 1.
        depth: Fraction of the encoder's layers, 0 to 1.
    """
    heads = max(1, round(width * settings.num_attention_heads))
    return replace(
        settings,
        num_hidden_layers=max(1, round(depth * settings.num_hidden_layers)),
        hidden_size=heads * settings.head_width,
        num_attention_heads=heads,
        intermediate_size=max(1, settings.intermediate_size * heads // settings.num_attention_heads),
    )


class Generator(nn.Module):
    """Masked language model without embeddings of its own. Weights are drawn from torch's default generator."""

    def __init__(self, settings: ElectraEncoderConfig, encoder: ElectraEncoderConfig, vocab_size: int) -> None:
        """Create the modules of a generator.

        Args:
            settings: Architecture of the generator.
            encoder: Architecture of the encoder whose embeddings it shares.
            vocab_size: Number of rows of the token embedding.
        """
        super().__init__()
        width, shared_width, std = settings.hidden_size, encoder.hidden_size, encoder.initializer_range
        # The embeddings are normalized. With this standard deviation their projections have a variance of about 1 too.
        self.projection = initialized_linear(shared_width, width, shared_width**-0.5, bias=True)
        if isinstance(settings, BertConfig):
            self.blocks = nn.ModuleList(BertBlock(settings) for _ in range(settings.num_hidden_layers))
            self.final_norm = nn.Identity()
        else:
            layers = range(settings.num_hidden_layers)
            self.blocks = nn.ModuleList(ModernBertBlock(settings, layer) for layer in layers)
            self.final_norm = LayerNorm(width, settings.layer_norm_eps)
            self._rotary = RotaryEmbedding(settings.head_width, settings.max_position_embeddings)
        self.dense = initialized_linear(width, shared_width, std, bias=True)
        self.norm = nn.LayerNorm(shared_width, encoder.layer_norm_eps)
        self.bias = nn.Parameter(Tensor(vocab_size).zero_())

    def matrix_parameters(self) -> Iterator[Tensor]:
        """Yield the weight matrices that Muon optimizes."""
        yield from (parameter for parameter in self.parameters() if parameter.ndim == 2)

    def head_matrices(self) -> Iterator[Tensor]:
        """Yield the matrices of queries, keys and values, whose heads are as wide as those of the encoder."""
        for name, parameter in self.blocks.named_parameters():
            if parameter.ndim == 2 and name.split(".")[-2] in ("query", "key", "value"):
                yield parameter

    def features(
        self, encoder: BertEncoder | ModernBertEncoder, batch: Batch, positions_M: Int[Tensor, "M"]
    ) -> Float[Tensor, "M D"]:
        """Return what the decoder maps to logits: D is the width of the encoder."""
        if batch.ids_T.device.type == "cpu":  # as in EncoderModule.forward
            batch = batch.rounded()
        plan = encoder.plan(batch)
        hidden_TG = self.projection(encoder.embed(batch, plan))
        if isinstance(encoder, BertEncoder):
            hidden_MG = bert.run_blocks(self.blocks, hidden_TG, plan, positions_M)
        else:
            blocks = cast("list[ModernBertBlock]", list(self.blocks))
            hidden_MG = modernbert.run_blocks(blocks, hidden_TG, plan, self._rotary, self.final_norm, positions_M)
        return self.norm(F.gelu(self.dense(hidden_MG)))


class DiscriminatorHead(nn.Module):
    """Binary classifier of tokens: dense layer, GELU and a linear map to one logit, which is positive if replaced."""

    def __init__(self, settings: ElectraEncoderConfig) -> None:
        super().__init__()
        width, std = settings.hidden_size, settings.initializer_range
        self.dense = initialized_linear(width, width, std, bias=True)
        self.classifier = initialized_linear(width, 1, std, bias=True)

    def forward(self, hidden_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
        """Return the logit of each vector."""
        return self.classifier(F.gelu(self.dense(hidden_ND))).squeeze(-1)


class ElectraModules(nn.Module):
    """The trained modules of replaced token detection besides the encoder: generator and discriminator head."""

    def __init__(self, generator: Generator, discriminator: DiscriminatorHead) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator

    def matrix_parameters(self) -> Iterator[Tensor]:
        """Yield the weight matrices that Muon optimizes; the classifier is not one of them."""
        yield from self.generator.matrix_parameters()
        yield self.discriminator.dense.weight

    def head_matrices(self) -> Iterator[Tensor]:
        """Yield the matrices whose rows belong to attention heads."""
        yield from self.generator.head_matrices()


def build_electra(settings: AnyEncoderConfig, vocab_size: int, width: float, depth: float) -> ElectraModules:
    """Return generator and discriminator head for an encoder, with weights from torch's default generator.

    Args:
        settings: Architecture of the encoder.
        vocab_size: Number of rows of its token embedding.
        width: Width of the generator as a fraction of the encoder's.
        depth: Number of layers of the generator as a fraction of the encoder's.

    Raises:
        RecipeError: the encoder is neither BERT nor ModernBERT.
    """
    encoder = require_electra_encoder(settings)
    generator = generator_config(encoder, width, depth)
    return ElectraModules(Generator(generator, encoder, vocab_size), DiscriminatorHead(encoder))


def require_electra_encoder(settings: AnyEncoderConfig) -> ElectraEncoderConfig:
    """Return the architecture of an encoder that replaced token detection can train.

    Raises:
        RecipeError: the encoder is neither BERT nor ModernBERT.
    """
    if isinstance(settings, ModernBertConfig) or (isinstance(settings, BertConfig) and settings.model_type == "bert"):
        return settings
    kind = settings.model_type if isinstance(settings, BertConfig) else settings.kind
    raise RecipeError(
        f"replaced token detection needs an encoder of kind bert or modernbert, got {kind}",
        location="objective.kind = rtd",
        hint="set model.kind=bert, as in --recipe electra-mini, or train on masked tokens: objective.kind=mlm",
    )


# Hugging Face format

MODEL_TYPE: Final = "electra"
DISCRIMINATOR_CLASS: Final = "ElectraForPreTraining"
ENCODER_CLASS: Final = "ElectraModel"
PREFIX: Final = "electra."  # prefix of the encoder's tensors in a model with a head
TASK_HEADS: Final = ("discriminator_predictions.", "generator_predictions.", "generator_lm_head.")

_BERT_PREFIX: Final = bert.HF_NAMES["bert"].prefix
_HEAD: Final[Mapping[str, str]] = {  # name in transformers -> name in DiscriminatorHead
    f"discriminator_predictions.{hf_name}.{part}": f"{name}.{part}"
    for hf_name, name in {"dense": "dense", "dense_prediction": "classifier"}.items()
    for part in ("weight", "bias")
}
# Defaults of keys that a config.json leaves out, where they differ from BERT's (configuration_electra.py, 5.23).
_DEFAULTS: Final[Mapping[str, int]] = {
    "embedding_size": 128,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}


def to_hf_config(bert_config: Mapping[str, Any], *, only_encoder: bool) -> dict[str, Any]:
    """Return config.json of a discriminator for that of a BERT model with the same encoder."""
    return {
        **bert_config,
        "architectures": [ENCODER_CLASS if only_encoder else DISCRIMINATOR_CLASS],
        "model_type": MODEL_TYPE,
        "embedding_size": bert_config["hidden_size"],
    }


def from_hf_config(hf_config: Mapping[str, Any]) -> BertConfig:
    """Return the BertConfig of the encoder for a config.json of ELECTRA.

    Raises:
        ModelError: a key has a value that is not supported.
    """
    values = {**_DEFAULTS, **hf_config}
    if values["embedding_size"] != values["hidden_size"]:
        raise ModelError(
            f"unsupported embedding_size: got {values['embedding_size']}, expected hidden_size = "
            f"{values['hidden_size']}",
            location="config.json: embedding_size",
            hint="use an ELECTRA model whose embedding is as wide as its layers, such as one of base size",
        )
    return bert.from_hf_config({**values, "model_type": "bert"})


def to_hf_tensors(bert_tensors: Mapping[str, Tensor], discriminator: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of ElectraForPreTraining.

    Args:
        bert_tensors: Tensors of BertForMaskedLM with the same encoder; its head is left out.
        discriminator: State of the discriminator head.
    """
    encoder = {
        PREFIX + name.removeprefix(_BERT_PREFIX): tensor
        for name, tensor in bert_tensors.items()
        if name.startswith(_BERT_PREFIX)
    }
    return encoder | {hf_name: discriminator[name] for hf_name, name in _HEAD.items()}


def split_hf_tensors(
    hf_tensors: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Return the encoder's tensors under the names of a model with a head, and the state of the discriminator head.

    Args:
        hf_tensors: Tensors of ElectraForPreTraining, of its encoder alone, or of ModernBertModel.
        prefix: Prefix of the encoder's tensors in a model of the encoder's kind with a head.

    Returns:
        Both; None without a discriminator head.
    """
    head = {name: hf_tensors[hf_name] for hf_name, name in _HEAD.items() if hf_name in hf_tensors}
    encoder = {name: tensor for name, tensor in hf_tensors.items() if name not in _HEAD}
    has_prefix = any(name.startswith(prefix) for name in encoder)
    named = {name if has_prefix else prefix + name.removeprefix(PREFIX): tensor for name, tensor in encoder.items()}
    return named, head or None
