"""Sentence vectors: the hidden states of an encoder, pooled over the tokens of a text, and nearest neighbors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unmask.core.errors import ModelError, TextError
from unmask.core.types import SPECIAL, Batch, ProgressCallback, Sample, pack
from unmask.models import EncoderModule
from unmask.models.attention import AttentionPlan
from unmask.models.layers import rms_norm
from unmask.models.model import Model
from unmask.models.neomme import NeoMMEConfig

Pooling = Literal["mean", "cls"]

_BATCH_TOKENS: Final = 4096
_ENCODED: Final = 1024  # texts that are encoded and sorted by length together
_SMALLEST_NORM: Final = 1e-12  # as in torch's `normalize`


def embed(
    model: Model,
    texts: str | Sequence[str],
    *,
    pooling: Pooling = "mean",
    last_layers: int = 1,
    on_progress: ProgressCallback | None = None,
) -> NDArray[np.float32]:
    """Return one vector of length 1 for each text: N × hidden size in float32.

    The vectors are those of sentence-transformers with mean or CLS pooling and normalization: special tokens count, and
    "[MASK]" in a text is the special token. A text longer than the model's context is split into windows of about equal
    length, without overlap; its vector is pooled over all of them. The vectors of a masked language model have not been
    trained for similarity.

    Args:
        model: Model to use, as returned by `unmask.load`.
        texts: One or several texts.
        pooling: "mean" for the mean over all tokens, "cls" for the first token, [CLS].
        last_layers: Number of last layers whose hidden states are averaged; each passes the encoder's final norm.
        on_progress: Function that is called with the name of the task and the fraction done.

    Raises:
        ModelError: attention was causal in training, `last_layers` is not 1 to the number of layers, or the tokenizer
            adds no [CLS].
        TextError: a text has no tokens.
    """
    listed = [texts] if isinstance(texts, str) else list(texts)
    _check(model, pooling, last_layers)
    vectors_ND = np.empty((len(listed), model.settings.hidden_size), np.float32)
    for first in range(0, len(listed), _ENCODED):
        part = listed[first : first + _ENCODED]
        sums_PD = torch.zeros(len(part), model.settings.hidden_size)
        done = 0
        windows = _windows(model, part, first)
        for batch, of_text_W in _batches(windows):
            sums_PD.index_add_(0, of_text_W, _pooled_sums(model.encoder, batch, pooling, last_layers))
            done += batch.num_samples
            if on_progress is not None:
                on_progress("embedding texts", (first + len(part) * done / len(windows)) / len(listed))
        # The direction of a sum is that of the mean.
        norms_P1 = torch.linalg.vector_norm(sums_PD, dim=-1, keepdim=True).clamp_min(_SMALLEST_NORM)
        vectors_ND[first : first + len(part)] = (sums_PD / norms_P1).numpy()
    return vectors_ND


def _check(model: Model, pooling: Pooling, last_layers: int) -> None:
    layers = model.settings.num_hidden_layers
    if model.is_causal:
        raise ModelError(
            "this model can't embed texts: the objective 'causal' trains each token to see only the tokens before it",
            location=model.path,
            hint="use a model that was trained last with objective.kind=mlm",
        )
    if not 1 <= last_layers <= layers:
        raise ModelError(
            f"invalid last_layers: got {last_layers}, expected 1 to {layers}",
            hint=f"choose at most the {layers} layers of the model",
        )
    if pooling == "cls" and not model.tokenizer.frame.before:
        raise ModelError(
            "the tokenizer of this model adds no [CLS] before a text", location=model.path, hint="use the pooling mean"
        )


class _Window(NamedTuple):
    """Ids of a part of a text, special tokens included, and the number of the text."""

    text: int
    ids: NDArray[np.int64]


def _windows(model: Model, texts: Sequence[str], first: int) -> list[_Window]:
    """Return the windows of texts, which are those from number `first` on, in order of length.

    Raises:
        TextError: a text has no tokens.
    """
    tokenizer = model.tokenizer
    before, after = (np.array(ids, np.int64) for ids in (tokenizer.frame.before, tokenizer.frame.after))
    longest = max(1, model.context - len(before) - len(after))
    windows: list[_Window] = []
    for number, ids in enumerate(tokenizer.encode_prompts(texts)):
        if not ids:
            raise TextError(
                "the text has no tokens",
                location=f"text {first + number + 1}: {texts[number][:60]!r}",
                hint="leave empty texts out",
            )
        parts = np.array_split(np.array(ids, np.int64), -(-len(ids) // longest))
        windows += [_Window(number, np.concatenate([before, part, after])) for part in parts]
    return sorted(windows, key=lambda window: len(window.ids))


def _batches(windows: Sequence[_Window]) -> Iterator[tuple[Batch, Tensor]]:
    """Yield batches of windows, and the number of the text of each window."""
    first = tokens = 0
    for end, window in enumerate((*windows, None)):
        if window is None or (tokens and tokens + len(window.ids) > _BATCH_TOKENS):
            group = windows[first:end]
            samples = [Sample(ids, np.full(len(ids), SPECIAL, np.uint8)) for _, ids in group]
            yield pack(samples), torch.tensor([text for text, _ in group])
            first, tokens = end, 0
        tokens += len(window.ids) if window is not None else 0


@torch.inference_mode()
def _pooled_sums(encoder: EncoderModule, batch: Batch, pooling: Pooling, last_layers: int) -> Tensor:
    """Return the sum of the hidden states of each sequence, or the hidden state of its first token: B × D."""
    encoder.eval()
    device = next(encoder.parameters()).device
    hidden_TD = _hidden_states(encoder, batch.to(device), last_layers).cpu()
    if pooling == "cls":
        return hidden_TD[list(batch.offsets[:-1])]
    lengths_B = batch.cu_seqlens.long().diff()
    sequences_T = torch.repeat_interleave(torch.arange(batch.num_samples), lengths_B)
    return torch.zeros(batch.num_samples, hidden_TD.shape[-1]).index_add_(0, sequences_T, hidden_TD)


def _hidden_states(encoder: EncoderModule, batch: Batch, last_layers: int) -> Tensor:
    """Return the mean of the hidden states after the last layers, in float32 and in the order of the batch."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[object, ...], output: Tensor) -> None:
        plan = next(argument for argument in arguments if isinstance(argument, AttentionPlan))
        kept.append(plan.to_batch_order(_final_norm(encoder, output))[: batch.tokens])

    # The encoder itself returns the hidden states after the last layer.
    hooks = [block.register_forward_hook(keep) for block in encoder.blocks[len(encoder.blocks) - last_layers : -1]]
    try:
        hidden_TD = encoder(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([*kept, hidden_TD]).mean(0).float() if kept else hidden_TD.float()


def _final_norm(encoder: EncoderModule, hidden_TD: Tensor) -> Tensor:
    """Return hidden states of an inner layer, normalized like those of the last one; BERT's are normalized already."""
    if isinstance(encoder.settings, NeoMMEConfig):
        return rms_norm(hidden_TD, encoder.settings.norm_eps)
    final_norm: nn.Module | None = getattr(encoder, "final_norm", None)
    return hidden_TD if final_norm is None else final_norm(hidden_TD)


class Neighbor(NamedTuple):
    """A vector near a query: its number, counted from 0, and the cosine of the angle between both."""

    number: int
    cosine: float


def nearest(vectors_ND: NDArray[np.float32], query_D: NDArray[np.float32], top: int) -> list[Neighbor]:
    """Return the vectors with the largest cosines to a query, the nearest first. All vectors have length 1."""
    cosines_N = vectors_ND @ query_D
    best = np.argsort(-cosines_N, kind="stable")[:top]
    return [Neighbor(int(number), float(cosines_N[number])) for number in best]
