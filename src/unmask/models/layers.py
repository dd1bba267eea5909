"""Building blocks of the encoders: base classes, initialized linear maps, norms, rotary embedding, feed-forward.

Q, K and V, and the two halves of a GeGLU, are separate matrices, because Muon orthogonalizes each of them separately.
A fused product of the concatenated matrices would gain little. Time of forward and backward on one thread, separate
against fused, with the bfloat16 input cast once and not once per matrix:

- 4,096 tokens, width 256: 63 against 78 ms in float32, 27 against 29 ms in bfloat16
- 8,192 tokens, width 128: 58 against 44 ms in float32, 31 against 28 ms in bfloat16
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from unmask.core.errors import RecipeError
from unmask.core.types import Batch
from unmask.models.attention import exclude_from_compilation


class EncoderModule(nn.Module):
    """Base class of the encoders: maps a batch to one vector per token. Attention never crosses a sequence."""

    settings: Any  # the encoder's config
    hidden_size: int
    vocab_size: int  # size of the token embedding, which may be larger than the tokenizer's vocabulary
    token_embedding: nn.Parameter  # (vocab_size, hidden_size); in NeoMME (vocab_size, embedding_rank)
    blocks: nn.ModuleList
    label_offset: int = 0  # 1 if a hidden state predicts the token after it (objectives/causal.py)

    if TYPE_CHECKING:

        def __call__(self, batch: Batch, positions_M: Tensor | None = None) -> Tensor:
            """Return one vector per token, (T, hidden_size), in the order of the batch, or those at positions."""
            ...

    def forward(self, batch: Batch, positions_M: Int[Tensor, "M"] | None = None) -> Float[Tensor, "N D"]:
        """Return one vector per token, in the order of the batch, or only the vectors at positions, in their order.

        For positions, BERT and ModernBERT compute what follows attention in the last layer at these positions alone.
        """
        if batch.ids_T.device.type == "cpu":  # only a CPU compiles matrix products for each shape
            hidden_ND = self.encode(batch.rounded(), positions_M)
            return hidden_ND if positions_M is not None else hidden_ND[: batch.tokens]
        return self.encode(batch, positions_M)

    def encode(self, batch: Batch, positions_M: Int[Tensor, "M"] | None) -> Float[Tensor, "N D"]:
        """Return the vectors that `forward` returns, of a batch whose number of tokens is round."""
        raise NotImplementedError

    def compile_blocks(self) -> None:
        """Compile the blocks with torch.compile when they are first called, for batches of any size.

        Raises:
            RecipeError: torch finds no compiler.
        """
        try:
            torch.compile(F.gelu)(torch.zeros(8, device=self.token_embedding.device))
        except Exception as error:  # without a compiler, torch raises errors of several private classes
            reason = str(error).strip().partition("\n")[0]
            raise RecipeError(
                f"torch.compile doesn't work here: {reason}",
                location="train.compile",
                hint="install a C++ compiler (on a GPU also triton), or set train.compile=false",
            ) from error
        exclude_from_compilation()
        for block in self.blocks:
            block.compile(dynamic=True)

    def matrix_parameters(self) -> Iterator[Tensor]:
        """Yield the weight matrices that Muon optimizes: those of the blocks, without the embeddings."""
        yield from _matrices(self.blocks)

    def head_matrices(self) -> Iterator[Tensor]:
        """Yield the matrices of queries, keys and values: their rows belong to heads of `settings.head_width` rows."""
        for name, parameter in self.blocks.named_parameters():
            if parameter.ndim == 2 and name.split(".")[-2] in ("query", "key", "value"):
                yield parameter

    def position_parameters(self) -> Iterator[Tensor]:
        """Yield the learned position embeddings. Their learning rate can be scaled separately."""
        yield from ()


class HeadModule(nn.Module):
    """Base class of the vocabulary heads: maps vectors at masked positions to logits over the vocabulary."""

    if TYPE_CHECKING:

        def __call__(self, hidden_MD: Tensor, token_embedding_VD: Tensor) -> Tensor:
            """Return logits, (M, vocab_size)."""
            ...

    def features(self, hidden_MD: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
        """Return what the decoder maps to logits."""
        raise NotImplementedError

    def decoder_parameters(self, token_embedding_VD: Float[Tensor, "V D"]) -> tuple[Tensor, Tensor]:
        """Return weight (V, D) and bias (V) of the decoder."""
        raise NotImplementedError

    def forward(
        self, hidden_MD: Float[Tensor, "M D"], token_embedding_VD: Float[Tensor, "V D"]
    ) -> Float[Tensor, "M V"]:
        """Return logits over the vocabulary."""
        return F.linear(self.features(hidden_MD), *self.decoder_parameters(token_embedding_VD))

    def matrix_parameters(self) -> Iterator[Tensor]:
        """Yield the weight matrices that Muon optimizes. The decoder is not one of them."""
        yield from ()


def _matrices(module: nn.Module) -> Iterator[Tensor]:
    yield from (parameter for parameter in module.parameters() if parameter.ndim == 2)


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with a parameter: autocast's dtype if enabled, else the parameter's."""
    device_type = parameter.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else parameter.dtype


def initialized_linear(in_features: int, out_features: int, std: float, *, bias: bool = False) -> nn.Linear:
    """Return a linear map with weights drawn from torch's generator (normal, truncated at 2 std) and zero bias."""
    # The weight is drawn once: nn.Linear itself would first draw from another distribution.
    linear = nn.Linear(in_features, out_features, bias=bias, device="meta")
    linear = linear.to_empty(device=torch.get_default_device())
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def initialized_embedding(num_embeddings: int, width: int, std: float) -> nn.Parameter:
    """Return an embedding matrix (num_embeddings, width), drawn like the weights of a linear map."""
    return nn.Parameter(initialized_linear(width, num_embeddings, std).weight.detach())


def normal_linear(in_features: int, out_features: int, std: float) -> nn.Linear:
    """Return a linear map without bias and with weights drawn from torch's generator (normal); std 0 gives zeros."""
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear = linear.to_empty(device=torch.get_default_device())
    nn.init.normal_(linear.weight, std=std) if std else nn.init.zeros_(linear.weight)
    return linear


def rms_norm(x: Float[Tensor, "*T D"], eps: float) -> Float[Tensor, "*T D"]:
    """Divide each vector by its root mean square (RMSNorm, arXiv 1910.07467, without scale), in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalization with a scale and no bias."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self._eps = eps

    def forward(self, hidden_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Normalize each vector to mean 0 and variance 1, then scale it."""
        return F.layer_norm(hidden_TD, self.weight.shape, self.weight, eps=self._eps)


class RotaryEmbedding:
    """Rotary position embedding (arXiv 2104.09864, rotate-half form) with float32 tables, computed once per theta.

    The tables always cover all positions. If their size depended on the batch, it could differ between a resumed and an
    uninterrupted run, and the last bit of a vectorized cosine may depend on the size.
    """

    def __init__(self, head_width: int, max_position_embeddings: int) -> None:
        self._head_width = head_width
        self._max_position_embeddings = max_position_embeddings
        self._tables: dict[tuple[float, torch.device], tuple[Tensor, Tensor]] = {}

    def cos_sin(
        self, position_T: Int[Tensor, "T"], theta: float, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "T 1 K"], Float[Tensor, "T 1 K"]]:
        """Return cosine and signed sine for each token. All heads and all layers with the same theta share them."""
        key = (theta, position_T.device)
        if key not in self._tables:
            self._tables[key] = self._compute(theta, position_T.device)
        cos_SK, sin_SK = self._tables[key]
        return tuple(table.index_select(0, position_T).to(dtype)[:, None] for table in (cos_SK, sin_SK))  # pyright: ignore[reportReturnType]

    def _compute(self, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
        width = self._head_width
        # Computed on the CPU and in transformers' order of operations, so that both have the same bits. Inference
        # mode is off, because tensors created in it can't be used in a later training step.
        with torch.inference_mode(False):
            frequency = 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
            angle = torch.arange(self._max_position_embeddings, dtype=torch.float32)[:, None] * frequency
            cos, sin = angle.cos(), angle.sin()
            return torch.cat((cos, cos), -1).to(device), torch.cat((-sin, sin), -1).to(device)


def rotate(x_THK: Float[Tensor, "T H K"], cos_sin: tuple[Tensor, Tensor]) -> Float[Tensor, "T H K"]:
    """Rotate each pair of dimensions (k, k + K/2) by the angle of its token's position."""
    return cast("Tensor", _Rotation.apply(x_THK, *cos_sin))


class _Rotation(torch.autograd.Function):
    """Rotation whose gradient is the opposite rotation: 1.3 instead of 2.2 ms for 2,048 tokens and width 256."""

    @staticmethod
    def forward(ctx: Any, x_THK: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
        """Return the rotated vectors."""
        ctx.save_for_backward(cos_T1K, sin_T1K)
        return (x_THK * cos_T1K).addcmul_(x_THK.roll(x_THK.shape[-1] // 2, -1), sin_T1K)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the vectors."""
        cos_T1K, sin_T1K = ctx.saved_tensors
        gradient_THK = grad_outputs[0]
        rolled_THK = gradient_THK.roll(gradient_THK.shape[-1] // 2, -1)
        return (gradient_THK * cos_T1K).addcmul_(rolled_THK, sin_T1K, value=-1), None, None


def rotate_part(x_THK: Float[Tensor, "T H K"], cos_sin: tuple[Tensor, Tensor]) -> Float[Tensor, "T H K"]:
    """Rotate the first dimensions of each head, as many as the cosines have (partial rotary embedding)."""
    rotated = cos_sin[0].shape[-1]
    if rotated == x_THK.shape[-1]:
        return rotate(x_THK, cos_sin)
    return torch.cat((rotate(x_THK[..., :rotated], cos_sin), x_THK[..., rotated:]), -1)


class GeGLU(nn.Module):
    """Gated feed-forward network: output(gelu(input(x)) * gate(x)) (arXiv 2002.05202)."""

    def __init__(self, width: int, intermediate_size: int, std: float, output_std: float, dropout: float) -> None:
        super().__init__()
        self.input = initialized_linear(width, intermediate_size, std)
        self.gate = initialized_linear(width, intermediate_size, std)
        self.output = initialized_linear(intermediate_size, width, output_std)
        self._dropout = dropout

    def forward(self, hidden_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Apply the network to each vector."""
        hidden_TD = hidden_TD.to(compute_dtype(hidden_TD))  # cast once, not once per matrix
        inner_TF = F.gelu(self.input(hidden_TD)) * self.gate(hidden_TD)
        return self.output(F.dropout(inner_TF, self._dropout, self.training))


class SquaredReLU(nn.Module):
    """Feed-forward network output(relu(input(x)) ** 2) (Primer, arXiv 2109.08668); the output is 0 at first."""

    def __init__(self, width: int, intermediate_size: int, std: float) -> None:
        super().__init__()
        self.input = normal_linear(width, intermediate_size, std)
        self.output = normal_linear(intermediate_size, width, 0.0)

    def forward(self, hidden_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Apply the network to each vector."""
        return self.output(F.relu(self.input(hidden_TD)).square())
