"""Replaced token detection: the encoder learns which tokens a small generator replaced (ELECTRA, arXiv 2003.10555).

Some tokens are masked, the generator predicts them, and a sample of its prediction replaces each. The encoder, which is
the discriminator, classifies every token as original or replaced. A sampled token that equals the original one counts
as original. The loss is that of the generator plus a weight times that of the discriminator (section 3.1). The
discriminator's gradients don't reach the generator through the samples.

Samples are pure: `corrupt` draws one uniform number for each masked position, and the sampled token is where the
cumulative distribution of the generator's prediction exceeds it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unmask.core import rng
from unmask.core.config import require
from unmask.core.types import SPECIAL, Batch, LossSums, MaskedBatch, round_size
from unmask.objectives.cross_entropy import TokenLosses, linear_cross_entropy
from unmask.objectives.masking import Integers, MaskingConfig, PackedSequences
from unmask.objectives.mlm import MaskedLMObjective, token_metrics

_BLOCK_LOGITS = 1 << 19  # as in cross_entropy.py
_GPU_BLOCK_LOGITS = 1 << 26
_LARGEST_DRAW = np.float32(1 - 2**-24)  # rounding to float32 must not give 1


@dataclass(frozen=True)
class ReplacedTokenConfig(MaskingConfig):
    """Replaced token detection."""

    kind: Literal["rtd"] = "rtd"  # Replaced token detection (ELECTRA, arXiv 2003.10555).
    # [fraction of masked tokens] Tokens that are replaced by [MASK] for the generator; the three rates sum to 1.
    mask_token_rate: float = 1.0
    # [fraction of masked tokens] Tokens that are replaced by a random regular token for the generator.
    random_token_rate: float = 0.0
    keep_rate: float = 0.0  # [fraction of masked tokens] Tokens that the generator predicts but sees.
    discriminator_loss_weight: float = 50.0  # Weight of the discriminator's loss; that of the generator's loss is 1.
    # [fraction of the encoder's] Width of the generator: heads, hidden size and feed-forward network; 1/4 to 1/2.
    generator_width: float = 0.25
    generator_depth: float = 1.0  # [fraction of the encoder's] Number of layers of the generator.

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "discriminator_loss_weight", above=0, below=math.inf, hint="choose a number above 0, e.g. 50")
        require(self, "generator_width", "generator_depth", above=0, max=1, hint="choose a fraction up to 1, e.g. 0.25")


class ReplacedTokenObjective:
    """Masked language modeling of a generator, and binary classification of all maskable tokens by the encoder."""

    metrics: Sequence[str] = (
        *MaskedLMObjective.metrics, "rtd_loss", "rtd_accuracy", "rtd_replaced", "rtd_found",
    )  # fmt: skip
    sampler = "windows"
    validates = "own"  # the encoder has no trained vocabulary head

    def __init__(
        self,
        settings: ReplacedTokenConfig,
        mlm: MaskedLMObjective,
        modules: nn.Module,
        regular_token_ids: Integers,
        vocab_size: int,
    ) -> None:
        """Create the objective.

        Args:
            settings: Settings of the objective.
            mlm: Objective that masks tokens for the generator.
            modules: Module with a `generator` and a `discriminator` (models/electra.py).
            regular_token_ids: Ids that may replace a token.
            vocab_size: Number of rows of the token embedding.
        """
        self.loss_weights: Mapping[str, float] = {"mlm": 1.0, "rtd": settings.discriminator_loss_weight}
        self.modules = modules
        self._mlm = mlm
        excluded_V = torch.ones(vocab_size, dtype=torch.bool)
        excluded_V[torch.from_numpy(regular_token_ids.astype(np.int64))] = False
        modules.register_buffer("excluded_V", excluded_V, persistent=False)  # moves to the device with the modules

    def corrupt(self, batch: Batch, seed: int) -> MaskedBatch:
        """Return the masked batch for the generator, with one uniform draw for each masked position."""
        masked = self._mlm.corrupt(batch, seed)
        key = PackedSequences.from_batch(batch).draw_keys(masked.positions_M.numpy())
        draws_M = np.minimum(rng.uniform(seed, "replacement", *key).astype(np.float32), _LARGEST_DRAW)
        return replace(
            masked,
            draws_M=torch.from_numpy(draws_M),
            denominators={**masked.denominators, "rtd": masked.num_maskable},
        )

    def loss(self, encoder: nn.Module, head: nn.Module, masked: MaskedBatch) -> LossSums:
        """Return the summed cross-entropies of generator and discriminator in nats. `head` is not used."""
        losses, sampled_M = self._generate(encoder, masked)
        sums_of = self._discriminate(encoder, masked, sampled_M)
        count = masked.num_maskable
        names = ("rtd_loss", "rtd_accuracy", "rtd_replaced", "rtd_found")
        metrics = {name: (value.detach(), count) for name, value in zip(names, sums_of, strict=True)}
        return LossSums(
            sums={"mlm": losses.total, "rtd": sums_of[0]}, metrics={**token_metrics(losses, masked), **metrics}
        )

    def _generate(self, encoder: nn.Module, masked: MaskedBatch) -> tuple[TokenLosses, Int[Tensor, "M"]]:
        """Return the generator's cross-entropies, and a token sampled from its prediction at each masked position."""
        assert masked.draws_M is not None, "corrupt draws a number for each masked position"
        modules = cast("Any", self.modules)
        generator = modules.generator
        count = len(masked.positions_M)
        positions_R = F.pad(masked.positions_M, (0, round_size(count) - count))
        features_RD: Tensor = generator.features(encoder, masked.batch, positions_R)
        weight_VD, bias_V = cast("Tensor", encoder.token_embedding), cast("Tensor", generator.bias)
        losses = TokenLosses(*linear_cross_entropy(features_RD, weight_VD, bias_V, masked.labels_M))
        return losses, sample_tokens(features_RD, weight_VD, bias_V, masked.draws_M, modules.excluded_V)

    def _discriminate(
        self, encoder: nn.Module, masked: MaskedBatch, sampled_M: Int[Tensor, "M"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return cross-entropy, correct tokens, replaced tokens and found ones, summed over the maskable tokens."""
        batch, count = masked.batch, masked.num_maskable
        replaced_T = batch.ids_T.index_copy(0, masked.positions_M, sampled_M)
        is_replaced_T = torch.zeros_like(batch.ids_T, dtype=torch.bool)
        is_replaced_T = is_replaced_T.index_copy(0, masked.positions_M, sampled_M != masked.labels_M)
        # The size is known on the host, so that a GPU doesn't have to be waited for.
        maskable_N = torch.nonzero_static((batch.token_flags_T & SPECIAL) == 0, size=count)[:, 0]
        positions_R = F.pad(maskable_N, (0, round_size(count) - count))
        hidden_RD: Tensor = encoder(replace(batch, ids_T=replaced_T), positions_R)
        logits_N: Tensor = cast("Any", self.modules).discriminator(hidden_RD)[:count].float()
        is_replaced_N = is_replaced_T.index_select(0, maskable_N)
        nats = F.binary_cross_entropy_with_logits(logits_N, is_replaced_N.float(), reduction="sum")
        is_positive_N = logits_N.detach() > 0
        found = (is_positive_N & is_replaced_N).sum()
        return nats, (is_positive_N == is_replaced_N).sum(), is_replaced_N.sum(), found


@torch.no_grad()
def sample_tokens(
    features_RD: Float[Tensor, "R D"],
    weight_VD: Float[Tensor, "V D"],
    bias_V: Float[Tensor, "V"],
    draws_M: Float[Tensor, "M"],
    excluded_V: Bool[Tensor, "V"],
) -> Int[Tensor, "M"]:
    """Return a token for each draw: the first whose cumulative probability exceeds it.

    The distribution is the softmax of the decoder's logits without the excluded tokens. Logits are computed in blocks,
    in autocast's dtype if it is enabled, and everything else in float32. Rows beyond the draws are not used.
    """
    device_type = features_RD.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else features_RD.dtype
    weight_DV = weight_VD.to(dtype).T
    bias_V = bias_V.masked_fill(excluded_V, -math.inf)
    rows = max(1, (_GPU_BLOCK_LOGITS if features_RD.is_cuda else _BLOCK_LOGITS) // len(weight_VD))
    sampled_M = torch.empty(len(draws_M), dtype=torch.int64, device=features_RD.device)
    for first in range(0, len(draws_M), rows):
        draws_B1 = draws_M[first : first + rows, None]
        features_BD = features_RD[first : first + len(draws_B1)].to(dtype)
        with torch.autocast(device_type, enabled=False):
            probabilities_BV = ((features_BD @ weight_DV).float() + bias_V).softmax(-1)
        cumulative_BV = probabilities_BV.cumsum(-1)
        total_B1 = cumulative_BV[:, -1:]
        # Rounding must not give the total, which no cumulative probability exceeds.
        target_B1 = torch.minimum(draws_B1 * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
        sampled_M[first : first + rows] = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]
    return sampled_M
