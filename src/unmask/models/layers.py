"""Room card: the parts that the modern encoder is made of.

Comes in: hidden vectors, one row per slot. Goes out: the same, normalised, turned by position, or passed through a
gated feed-forward net. Called by: modern.

Q, K and V, and the two halves of the gated net, are matrices of their own in memory: Muon orthogonalises each apart.
One fused product of their concatenation gains little (forward and backward, one thread, apart against fused: 4,096
tokens, width 256: 63 against 78 ms in float32, 27 against 29 in bfloat16 once the input is cast once and not per
matrix; 8,192 tokens, width 128: 58 against 44 and 31 against 28).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import skip_init


def working_dtype(parameter: Tensor) -> torch.dtype:
    """The number format that matrix products have here: autocast's where it is on, else the parameter's."""
    kind = parameter.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype


def matrix(inputs: int, outputs: int, deviation: float) -> nn.Linear:
    """A linear map without bias; normal draws, cut at two deviations, from torch's generator."""
    linear = cast("nn.Linear", skip_init(nn.Linear, inputs, outputs, bias=False))
    nn.init.trunc_normal_(linear.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    return linear


class LayerNorm(nn.Module):
    """Layer normalisation with a scale and no bias."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self._epsilon = epsilon

    def forward(self, hidden_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Mean 0 and variance 1 in each row, then the scale."""
        return F.layer_norm(hidden_TD, self.weight.shape, self.weight, eps=self._epsilon)


class Rotary:
    """Rotary positions (arXiv 2104.09864, rotate-half form): float32 tables, made once per theta.

    They always hold all positions: were they made for what a batch needs, a resumed run could make them in another size
    than the undisturbed one, and vectorised cosines may differ in the last bit with the size.
    """

    def __init__(self, head_width: int, longest: int) -> None:
        self._head_width = head_width
        self._longest = longest
        self._tables: dict[tuple[float, torch.device], tuple[Tensor, Tensor]] = {}

    def turns(
        self, position_T: Int[Tensor, "T"], theta: float, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "T 1 K"], Float[Tensor, "T 1 K"]]:
        """Cosine and signed sine for each slot, shared by all layers and heads."""
        key = (theta, position_T.device)
        if key not in self._tables:
            self._tables[key] = self._make(self._longest, theta, position_T.device)
        cos_SK, sin_SK = self._tables[key]
        return tuple(table.index_select(0, position_T).to(dtype)[:, None] for table in (cos_SK, sin_SK))  # pyright: ignore[reportReturnType]

    def _make(self, length: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
        width = self._head_width
        # On the CPU and in transformers' order of operations, so that both have the same bits. Never in inference mode:
        # its tensors could not be used in a later training step.
        with torch.inference_mode(False):
            frequency = 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
            angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
            cos, sin = angle.cos(), angle.sin()
            return torch.cat((cos, cos), -1).to(device), torch.cat((-sin, sin), -1).to(device)


def turn(x_THK: Float[Tensor, "T H K"], turns: tuple[Tensor, Tensor]) -> Float[Tensor, "T H K"]:
    """Turn each pair (k, k + K/2) by the angle of its slot."""
    cos_TK, sin_TK = turns
    return torch.addcmul(x_THK * cos_TK, x_THK.roll(x_THK.shape[-1] // 2, -1), sin_TK)


class GeGLU(nn.Module):
    """gelu(x · input) × (x · gate) · output (arXiv 2002.05202)."""

    def __init__(
        self, width: int, intermediate_size: int, deviation: float, output_deviation: float, dropout: float
    ) -> None:
        super().__init__()
        self.input = matrix(width, intermediate_size, deviation)
        self.gate = matrix(width, intermediate_size, deviation)
        self.output = matrix(intermediate_size, width, output_deviation)
        self._dropout = dropout

    def forward(self, hidden_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Each row for itself."""
        hidden_TD = hidden_TD.to(working_dtype(hidden_TD))  # cast once, not once per matrix
        inner_TF = F.gelu(self.input(hidden_TD)) * self.gate(hidden_TD)
        return self.output(F.dropout(inner_TF, self._dropout, self.training))
