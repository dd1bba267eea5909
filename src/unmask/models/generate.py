"""Generates text by iterative unmasking: [MASK] tokens are replaced by sampled tokens, some in each step.

A causal model predicts each token from those before it, so it generates from left to right, one token per step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Literal, TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from unmask.core import rng
from unmask.core.errors import ModelError
from unmask.core.types import ProgressCallback
from unmask.models.fill_mask import MASK
from unmask.models.model import Model, require_masked_lm, require_token_before
from unmask.tokenization.analysis import TokenFormatter

OrderRule = Literal["confidence", "random", "gibbs", "left-to-right"]
ScheduleRule = Literal["cosine", "linear"]
SegmentState = Literal["given", "set", "new", "mask"]
MAX_SAMPLES = 1000
_MAX_SWEEPS = 1000
_BATCH_NUMBERS = 1 << 24  # log-probabilities that are computed together: 64 MB in float32


class GenerateOptions(TypedDict, total=False):
    """Keywords of `generate` that are fields of GenerateConfig."""

    order: OrderRule | None
    steps: int | None
    schedule: ScheduleRule
    temperature: float
    top_k: int | None
    top_p: float
    sweeps: int | None


@dataclass(frozen=True)
class GenerateConfig:
    """Order in which masks are replaced, and the distribution that tokens are sampled from.

    Raises:
        ModelError: a value is out of its range.
    """

    order: OrderRule | None = None  # None: "confidence"; for a causal model, "left-to-right"
    steps: int | None = None  # of a pass over all masks; None: one token per step
    schedule: ScheduleRule = "cosine"  # number of tokens left masked after each step
    temperature: float = 1.0
    top_k: int | None = None  # None: all tokens
    top_p: float = 1.0
    sweeps: int | None = None  # passes of Gibbs sampling after the first pass; None: 1 in the order "gibbs"

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise _invalid("--temperature", self.temperature, "a number above 0", "use 1 for the model's probabilities")
        if not 0 < self.top_p <= 1:
            raise _invalid("--top-p", self.top_p, "above 0 and at most 1", "use 1 to keep all tokens")
        if self.top_k is not None and self.top_k < 1:
            raise _invalid("--top-k", self.top_k, "at least 1", "leave it out to keep all tokens")
        if self.sweeps is not None and self.order != "gibbs":
            raise ModelError(
                "only the order 'gibbs' has --sweeps", hint='leave --sweeps out, or choose --order "gibbs"'
            )
        if self.sweeps is not None and not 1 <= self.sweeps <= _MAX_SWEEPS:
            raise _invalid("--sweeps", self.sweeps, f"1 to {_MAX_SWEEPS:,}", "choose a number in this range")

    @property
    def num_sweeps(self) -> int:
        """Number of passes after the first."""
        return (1 if self.sweeps is None else self.sweeps) if self.order == "gibbs" else 0

    def counts(self, length: int) -> list[int]:
        """Return the number of tokens that each step of the first pass sets, at least 1; their sum is `length`.

        After step t of T, length · f(t / T) tokens are left masked, rounded up, with f(r) = cos(πr / 2) for "cosine"
        and 1 - r for "linear" (MaskGIT, arXiv 2202.04200, section 3.3).

        Raises:
            ModelError: there are fewer than 1 or more than `length` steps.
        """
        steps = length if self.steps is None else self.steps
        if not 1 <= steps <= length:
            hint = "leave it out to set one token per step"
            raise _invalid("--steps", steps, f"1 to {length}, the number of generated tokens", hint)
        left = [length]
        for step in range(1, steps + 1):
            fraction = step / steps
            masked = math.cos(math.pi * fraction / 2) if self.schedule == "cosine" else 1 - fraction
            rounded = math.ceil(round(length * masked, 9))  # without the error of a cosine that should be 0
            left.append(min(max(rounded, steps - step), left[-1] - 1))
        return [before - after for before, after in pairwise(left)]


def _invalid(option: str, value: object, expected: str, hint: str) -> ModelError:
    return ModelError(f"invalid {option}: got {value}, expected {expected}", hint=hint)


@dataclass(frozen=True)
class GenerationStep:
    """The tokens that one step set. Positions count the generated tokens from 0."""

    positions: tuple[int, ...]  # ascending
    ids: tuple[int, ...]
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class Generation:
    """A generated text."""

    text: str  # prefix, generated text and suffix
    prefix: str
    suffix: str
    ids: tuple[int, ...]  # of the generated tokens
    tokens: tuple[str, ...]
    # Sum of the logarithms of the probabilities that the model gave the tokens when they were set, before temperature,
    # top-k and top-p. With one token per step it is the joint log-probability in that order.
    log_probability: float
    steps: tuple[GenerationStep, ...]

    def __repr__(self) -> str:
        """Return the text, the number of tokens and the log-probability."""
        return f"Generation({self.text!r}, {len(self.ids)} tokens, log-probability {self.log_probability:.2f})"


def generate(
    model: Model,
    prefix: str = "",
    suffix: str = "",
    *,
    length: int = 20,
    num: int = 1,
    seed: int = 0,
    on_progress: ProgressCallback | None = None,
    **options: Unpack[GenerateOptions],
) -> list[Generation]:
    """Generate text after a prefix, or between a prefix and a suffix, by iterative unmasking.

    The masks between the two texts are replaced step by step. Special tokens, [UNK] and [MASK] are never generated. The
    order "confidence" samples a token for every mask in each step and sets the most probable ones (MaskGIT, arXiv
    2202.04200, section 3.2). "random" sets tokens at random positions. "gibbs" continues after a random pass: each
    sweep masks all positions again, in random order, and samples them given the others (arXiv 1902.04094).
    "left-to-right" sets them in the order of the text: the only order of a model whose last objective was "causal".

    A random draw depends on the seed and the numbers of sample, step and position only. A sample is the same for any
    `num`, up to rounding of the model's logits.

    Args:
        model: Model to use, as returned by `unmask.load`.
        prefix: Text before the generated tokens.
        suffix: Text after the generated tokens.
        length: Number of tokens to generate.
        num: Number of texts to generate; they are computed together.
        seed: Random seed.
        on_progress: Function that is called with the name of the task and the fraction done.
        options: Fields of GenerateConfig: order, steps, schedule, temperature, top_k, top_p, sweeps.

    Raises:
        ModelError: the model was trained last to detect replaced tokens, the text is longer than its context, an option
            is out of its range, or a causal model is given a suffix, another order or a number of steps.
    """
    state: GenerationState | None = None
    for state in generate_steps(model, prefix, suffix, length=length, num=num, seed=seed, **options):
        if on_progress is not None:
            on_progress("generating", len(state.steps[0]) / state.num_steps)
    assert state is not None, "there is at least one step"
    return state.generations()


@dataclass(frozen=True, eq=False)
class GenerationState:
    """The texts that are being generated, after a step. The next step changes it, so read it before."""

    model: Model
    prompt: _Prompt
    num_steps: int  # of the whole generation
    ids_SN: NDArray[np.int64]  # of S texts of N tokens
    log_probabilities_SN: NDArray[np.float64]
    steps: list[list[GenerationStep]]  # of each text, so far

    def generations(self) -> list[Generation]:
        """Return the texts."""
        return [
            Generation(
                _text(self.model, self.prompt, ids),
                self.prompt.prefix,
                self.prompt.suffix,
                tuple(ids),
                _tokens(self.model, ids),
                float(self.log_probabilities_SN[sample].sum()),
                tuple(self.steps[sample]),
            )
            for sample, ids in enumerate(self.ids_SN.tolist())
        ]

    def segments(self, sample: int = 0) -> list[Segment]:
        """Return a text in segments. Each mask is shown as "_"."""
        new = set(self.steps[sample][-1].positions)
        return _segments(self.model, self.prompt, self.ids_SN[sample].tolist(), new, mask="_")


def generate_steps(
    model: Model,
    prefix: str = "",
    suffix: str = "",
    *,
    length: int = 20,
    num: int = 1,
    seed: int = 0,
    **options: Unpack[GenerateOptions],
) -> Iterator[GenerationState]:
    """Yield the texts that `generate` returns after each of its steps. Arguments and errors are those of `generate`."""
    settings = _settings_for(model, suffix, GenerateConfig(**options))
    if not 1 <= num <= MAX_SAMPLES:
        raise _invalid("--num", num, f"1 to {MAX_SAMPLES:,}", "choose a number in this range")
    prompt = _encode_prompt(model, prefix, suffix, length)
    counts, mask_id = settings.counts(length), model.tokenizer.mask_id
    moves = [None] * len(counts) if settings.order == "confidence" else _moves(settings, counts, num, seed)
    ids_SN = np.full((num, length), mask_id)
    log_probabilities_SN = np.zeros((num, length))
    steps: list[list[GenerationStep]] = [[] for _ in range(num)]
    for number, move_SK in enumerate(moves):
        positions_SK = np.nonzero(ids_SN == mask_id)[1].reshape(num, -1) if move_SK is None else move_SK
        np.put_along_axis(ids_SN, positions_SK, mask_id, axis=1)
        draws_SK = rng.uniform(seed, "generate token", number, np.arange(num)[:, None], positions_SK)
        tokens_SK, logs_SK = _sample(model, prompt, ids_SN, positions_SK, draws_SK, settings)
        if move_SK is None:
            best_SK = np.sort(np.argsort(-logs_SK, axis=1, kind="stable")[:, : counts[number]], axis=1)
            positions_SK = np.take_along_axis(positions_SK, best_SK, axis=1)
            tokens_SK, logs_SK = (np.take_along_axis(each_SK, best_SK, axis=1) for each_SK in (tokens_SK, logs_SK))
        np.put_along_axis(ids_SN, positions_SK, tokens_SK, axis=1)
        np.put_along_axis(log_probabilities_SN, positions_SK, logs_SK, axis=1)
        for sample, (positions, tokens) in enumerate(zip(positions_SK.tolist(), tokens_SK.tolist(), strict=True)):
            steps[sample].append(GenerationStep(tuple(positions), tuple(tokens), _tokens(model, tokens)))
        yield GenerationState(model, prompt, len(moves), ids_SN, log_probabilities_SN, steps)


def _settings_for(model: Model, suffix: str, settings: GenerateConfig) -> GenerateConfig:
    """Return the settings with the order that a model has by default.

    Raises:
        ModelError: as for `generate`.
    """
    if not model.is_causal:
        require_masked_lm(model, "generate text")
        return replace(settings, order=settings.order or "confidence")
    require_token_before(model)
    for option, is_given in (
        ("--order", settings.order not in (None, "left-to-right")),
        ("--steps", settings.steps is not None),
        ("--suffix", bool(suffix)),
    ):
        if is_given:
            raise ModelError(
                f"a causal model generates from left to right, one token per step: it can't take {option}",
                location=model.path,
                hint=f"leave {option} out, or use a model that was trained last with objective.kind=mlm",
            )
    return replace(settings, order="left-to-right")


def _tokens(model: Model, ids: Sequence[int]) -> tuple[str, ...]:
    return tuple(map(model.tokenizer.id_to_token, ids))


@dataclass(frozen=True)
class _Prompt:
    """The texts around the generated tokens, and their ids with special tokens."""

    prefix: str
    suffix: str
    before: list[int]
    after: list[int]
    prefix_ids: list[int]  # without special tokens of the frame
    suffix_ids: list[int]


def _encode_prompt(model: Model, prefix: str, suffix: str, length: int) -> _Prompt:
    """Encode prefix, masks and suffix together, so that spaces between them are tokenized as in training.

    Raises:
        ModelError: `length` is below 1, a text has a [MASK], or all together are longer than the model's context.
    """
    tokenizer, context = model.tokenizer, model.context
    if length < 1:
        raise _invalid("--length", length, "at least 1", "give the number of tokens to generate")
    mask = tokenizer.id_to_token(tokenizer.mask_id)
    for name, text in (("prefix", prefix), ("suffix", suffix)):
        if MASK in text or mask in text:
            raise ModelError(
                f"the {name} contains {MASK}",
                location=repr(text[:60]),
                hint="remove it, or predict it with the command `fill`",
            )
    (ids,) = tokenizer.encode_prompts([prefix + mask + suffix])
    first = ids.index(tokenizer.mask_id)
    framed = [*tokenizer.frame.before, *ids, *tokenizer.frame.after]
    available = context - (len(framed) - 1)
    if length > available:
        parts = "the given text with its special tokens has"
        raise ModelError(
            f"{length:,} tokens can't be generated: {parts} {len(framed) - 1:,}, and the context of the model is "
            f"{context:,} tokens",
            hint=f"reduce --length to {available}" if available > 0 else "shorten the given text",
        )
    at = len(tokenizer.frame.before) + first
    return _Prompt(prefix, suffix, framed[:at], framed[at + 1 :], ids[:first], ids[first + 1 :])


def _moves(settings: GenerateConfig, counts: Sequence[int], num: int, seed: int) -> list[NDArray[np.int64]]:
    """Return the positions that each step sets in each sample, (S, K), ascending.

    Each pass has every position once, in random order or from left to right. A sweep of Gibbs sampling has as many
    steps as the first pass, of equal size.
    """
    length = sum(counts)
    if settings.order == "left-to-right":
        return [np.tile(part, (num, 1)) for part in np.split(np.arange(length), np.cumsum(counts)[:-1])]
    moves: list[NDArray[np.int64]] = []
    for sweep in range(1 + settings.num_sweeps):
        order_SN = np.stack(
            [
                np.argsort(rng.permute(np.arange(length), length, seed, "generate order", sweep, sample))
                for sample in range(num)
            ]
        )
        parts = np.split(order_SN, np.cumsum(counts)[:-1], axis=1)
        moves += parts if sweep == 0 else np.array_split(order_SN, len(counts), axis=1)
    return [np.sort(positions_SK, axis=1) for positions_SK in moves]


def _sample(
    model: Model,
    prompt: _Prompt,
    ids_SN: NDArray[np.int64],
    positions_SK: NDArray[np.int64],
    draws_SK: NDArray[np.float64],
    settings: GenerateConfig,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return a sampled token for each of K positions of each sample, and its log-probability under the model."""
    formatter = TokenFormatter.of(model.tokenizer)
    unpredicted = torch.from_numpy(formatter.unpredicted_ids[0])
    num, count = positions_SK.shape
    tokens_SK = np.zeros((num, count), dtype=np.int64)
    logs_SK = np.zeros((num, count))
    most = max(1, _BATCH_NUMBERS // model.encoder.vocab_size)  # rows
    columns = min(count, most)
    rows = max(1, most // columns)
    for block in (slice(first, first + columns) for first in range(0, count, columns)):
        for part in (slice(first, first + rows) for first in range(0, num, rows)):
            sequences = [[*prompt.before, *ids, *prompt.after] for ids in ids_SN[part].tolist()]
            positions = (positions_SK[part, block] + len(prompt.before)).tolist()
            for numbers, log_probabilities_MV in model.log_probability_batches(sequences, positions):
                at = (part.start + np.array(numbers), block)
                rows_MV = log_probabilities_MV[:, : formatter.size]  # the embedding may be larger than the vocabulary
                rows_MV = rows_MV.index_fill(1, unpredicted, -torch.inf)
                tokens_M = sample_tokens(rows_MV, torch.from_numpy(draws_SK[at].reshape(-1)), settings)
                tokens_SK[at] = tokens_M.reshape(len(numbers), -1).numpy()
                logs_SK[at] = rows_MV.gather(1, tokens_M[:, None]).double().reshape(len(numbers), -1).numpy()
    return tokens_SK, logs_SK


@torch.inference_mode()
def sample_tokens(
    log_probabilities_MV: Float[Tensor, "M V"], draws_M: Float[Tensor, "M"], settings: GenerateConfig
) -> Int[Tensor, "M"]:
    """Return one id per row, by inversion: the first whose cumulative probability exceeds a uniform draw in [0, 1).

    Temperature is applied first, then top-k, then top-p: the smallest set of tokens whose probability is at least
    `top_p` (arXiv 1904.09751, section 3.1). Tokens as probable as the last one of the top k are kept, too.
    """
    scaled_MV = log_probabilities_MV.double()
    scaled_MV = (scaled_MV - scaled_MV.max(dim=1, keepdim=True).values) / settings.temperature
    if settings.top_k is not None and settings.top_k < scaled_MV.shape[1]:
        lowest_M1 = scaled_MV.topk(settings.top_k, dim=1).values[:, -1:]
        scaled_MV = scaled_MV.masked_fill(scaled_MV < lowest_M1, -torch.inf)
    probabilities_MV = scaled_MV.softmax(dim=1)
    if settings.top_p < 1:
        highest = probabilities_MV.sort(dim=1, descending=True, stable=True)
        before_MV = highest.values.cumsum(dim=1) - highest.values
        kept_MV = highest.values.masked_fill(before_MV >= settings.top_p, 0.0)
        probabilities_MV = torch.zeros_like(probabilities_MV).scatter(1, highest.indices, kept_MV)
    cumulative_MV = probabilities_MV.cumsum(dim=1)
    ids_M = (cumulative_MV <= draws_M[:, None] * cumulative_MV[:, -1:]).sum(dim=1)
    # A product that rounds to the whole sum exceeds every token: the last possible one is meant.
    last_M = (probabilities_MV > 0).long().cumsum(dim=1).argmax(dim=1)
    return torch.minimum(ids_M, last_M)


# Text ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """A part of a text that is being generated."""

    text: str
    state: SegmentState  # given: prefix or suffix; set: in an earlier step; new: in this step; mask: not yet


def segments(model: Model, generation: Generation) -> Iterator[list[Segment]]:
    """Yield the text after each step in segments. Masks of a tokenizer of single characters are shown as "_"."""
    prompt = _encode_prompt(model, generation.prefix, generation.suffix, len(generation.ids))
    ids = [model.tokenizer.mask_id] * len(generation.ids)
    mask = "_" if all(len(token) == 1 for token in generation.tokens) else None
    for step in generation.steps:
        for position, id_ in zip(step.positions, step.ids, strict=True):
            ids[position] = id_
        yield _segments(model, prompt, ids, set(step.positions), mask)


def _segments(model: Model, prompt: _Prompt, ids: Sequence[int], new: set[int], mask: str | None) -> list[Segment]:
    """Return a text in segments.

    Args:
        model: the model.
        prompt: the text around the generated tokens.
        ids: the generated tokens and masks.
        new: positions that the last step set.
        mask: what is shown for each mask; None: the mask token.
    """
    mask_id = model.tokenizer.mask_id
    states: list[SegmentState] = [
        "mask" if id_ == mask_id else "new" if position in new else "set" for position, id_ in enumerate(ids)
    ]
    found: list[Segment] = []
    first, text = 0, _continuation(model, prompt, [])
    for state, group in groupby(states):
        last = first + len(list(group))
        longer = _continuation(model, prompt, ids[:last])
        # A last character of which bytes were missing may be complete now.
        shown = longer.removeprefix(text if longer.startswith(text) else text.rstrip("\ufffd"))
        found.append(Segment(mask * (last - first) if state == "mask" and mask is not None else shown, state))
        first, text = last, longer
    before, after = _around(model, prompt, ids)
    return [segment for segment in (Segment(before, "given"), *found, Segment(after, "given")) if segment.text]


def _text(model: Model, prompt: _Prompt, ids: Sequence[int]) -> str:
    """Return prefix, generated tokens and suffix as text, with the spaces of the tokenizer's decoder between them."""
    before, after = _around(model, prompt, ids)
    return before + _continuation(model, prompt, ids) + after


def _around(model: Model, prompt: _Prompt, ids: Sequence[int]) -> tuple[str, str]:
    """Return prefix and suffix as they are beside generated text: without doubled spaces, with missing ones."""
    prefix = prompt.prefix.rstrip(" ") if _decodes_spaces(model) else prompt.prefix
    decode = TokenFormatter.of(model.tokenizer).decode
    text = decode([*prompt.prefix_ids, *ids], skip_specials=False)
    whole = decode([*prompt.prefix_ids, *ids, *prompt.suffix_ids], skip_specials=False)
    is_apart = whole[len(text) :].startswith(" ") and not prompt.suffix[:1].isspace()
    return prefix, (" " if is_apart else "") + prompt.suffix


def _decodes_spaces(model: Model) -> bool:
    """Return whether the space before a word belongs to its token, or comes from the decoder."""
    return model.tokenizer.mask_takes_space or bool(TokenFormatter.of(model.tokenizer).prefix)


def _continuation(model: Model, prompt: _Prompt, ids: Sequence[int]) -> str:
    """Return generated tokens as text that continues the prefix, with the space before it if there is one."""
    formatter, both = TokenFormatter.of(model.tokenizer), [*prompt.prefix_ids, *ids]
    prefix, whole = (formatter.decode(each, skip_specials=False) for each in (prompt.prefix_ids, both))
    text = whole[len(prefix) :]
    if prompt.prefix.endswith(" ") and not text.startswith(" "):  # beside Han, the space of the prefix stays
        decode = model.tokenizer.decode
        plain = decode(both, skip_specials=False)[len(decode(prompt.prefix_ids, skip_specials=False)) :]
        text = (" " if plain.startswith(" ") else "") + text
    if not prompt.prefix_ids:
        text = text.removeprefix(formatter.prefix)  # the decoder removes "##" from all tokens but the first
    before = prompt.prefix.rstrip(" ")
    is_at_start = not before or (bool(formatter.prefix) and before[-1].isspace())
    return text.removeprefix(" ") if is_at_start and _decodes_spaces(model) else text
