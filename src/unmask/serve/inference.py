"""What the API computes: each function takes a model and a request, checks its work, and calls the library."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import torch

from unmask.core.errors import ModelError, RequestError, UnmaskError
from unmask.core.files import RunLayout
from unmask.core.format import count
from unmask.core.keywords import in_keywords
from unmask.evaluation.scoring import score
from unmask.hub.from_hf import load
from unmask.models.attention import attention_weights
from unmask.models.embed import embed
from unmask.models.fill_mask import MASK, encode_texts, fill
from unmask.models.generate import GenerationState, generate_steps
from unmask.models.joint_fill import fill_jointly, search_tokens
from unmask.models.model import Model, predicts_masked_tokens
from unmask.serve.requests import (
    MAX_ATTENTION_TOKENS,
    MAX_MASKS,
    AttentionAnswer,
    AttentionRequest,
    EmbedAnswer,
    EmbedRequest,
    Endpoint,
    FillAnswer,
    FillRequest,
    GenerateLine,
    GenerateRequest,
    ModelInfo,
    ModelsAnswer,
    ScoreAnswer,
    ScoreRequest,
    TokenizeAnswer,
    TokenizedText,
    TokenizeRequest,
    WordInfo,
)
from unmask.tokenization.analysis import TokenFormatter, TokenInfo, list_tokens
from unmask.tokenization.words import WordsRule, word_starts

# Work of a request in tokens that the encoder processes. A model of 1M parameters in its layers takes about two
# seconds for the first bound on one core, a BERT of base size about ten for the second.
_MAX_TOKENS: Final = 400_000
_MAX_PRODUCTS: Final = 1e12  # tokens × parameters of the layers
_MAX_OPEN: Final = 4  # models in memory
_MAX_LISTED: Final = 200  # models and steps of one run


# Models -------------------------------------------------------------------------------------------------------------


class Models:
    """The models that requests can name: those of the command line, and the steps of their runs.

    A step is opened when a request names it. The models used last are kept in memory. Only the worker thread calls
    this class, after it was created.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open the models of the command line.

        Raises:
            UnmaskError: a path has no model, or one that can't be used.
        """
        self._runs: dict[str, Path] = {}
        for path in paths:
            folder = Path(os.path.abspath(path))
            is_step = (folder.parent / RunLayout.RECIPE).is_file()
            name = f"{folder.parent.name}/{folder.name}" if is_step else folder.name
            names = itertools.chain([name], (f"{name} ({number})" for number in itertools.count(2)))
            self._runs[next(each for each in names if each not in self._runs)] = path
        self._open: dict[str, Model] = {}
        for name in self._runs:
            self.get(name)

    @property
    def first(self) -> tuple[str, ...]:
        """Names of the models of the command line."""
        return tuple(self._runs)

    def get(self, name: str) -> Model:
        """Return the model with a name, opened if it is not in memory; "" names the first one.

        Raises:
            UnmaskError: there is no model with this name, or it can't be opened.
        """
        name = name or self.first[0]
        model = self._open.pop(name, None)
        if model is None:
            path = self._paths().get(name)
            if path is None:
                raise RequestError(f"unknown model {name[:100]!r}", hint="use a name that /models lists")
            model = load(path)
        self._open[name] = model  # the last one is the one used last
        while len(self._open) > _MAX_OPEN:
            del self._open[next(iter(self._open))]
        return model

    def answer(self) -> ModelsAnswer:
        """Return all models and steps, with facts about those in memory."""
        return ModelsAnswer(tuple(self._info(name) for name in self._paths()), self.first)

    def _paths(self) -> dict[str, Path]:
        """Return the path of each model by its name. A run that trains has new steps each time."""
        paths: dict[str, Path] = {}
        for name, path in self._runs.items():
            paths[name] = path
            if (path / RunLayout.RECIPE).is_file():
                steps = [*sorted(path.glob("step-*")), *sorted(path.glob(f"{RunLayout.KEPT}*"))][-_MAX_LISTED:]
                paths |= {f"{name}/{step.name}": step for step in steps if (step / RunLayout.CONFIG).is_file()}
        return paths

    def _info(self, name: str) -> ModelInfo:
        model, group = self._open.get(name), name.partition("/")[0]
        if model is None:
            return ModelInfo(name, group, None, None, None, None, None, ())
        settings = model.settings
        parameters = sum(parameter.numel() for parameter in model.encoder.parameters())
        facts = [
            settings.kind,
            f"{settings.num_hidden_layers} layers of width {model.encoder.hidden_size}",
            f"{count(parameters)} parameters",
            f"{model.tokenizer.size:,} tokens ({model.tokenizer.model_type})",
        ]
        loss = (model.card.get("validation") or {}).get("loss")
        if isinstance(loss, float):
            facts.append(f"validation loss {loss:.3f} at step {model.card.get('step', 0):,}")
        return ModelInfo(
            name,
            group,
            ", ".join(facts),
            model.context,
            settings.num_hidden_layers,
            settings.num_attention_heads,
            predicts_masked_tokens(model),
            model.notes,
        )


# Bounds -------------------------------------------------------------------------------------------------------------


def _check_work(model: Model, tokens: int) -> None:
    """Check the number of tokens that the encoder has to process for a request.

    Raises:
        RequestError: there are too many for this model.
    """
    parameters = sum(parameter.numel() for parameter in model.encoder.blocks.parameters())
    limit = min(_MAX_TOKENS, int(_MAX_PRODUCTS / max(1, parameters)))
    if tokens > limit:
        message = f"this request takes {tokens:,} tokens of computation, and at most {limit:,} are allowed"
        raise RequestError(message, hint="shorten the text, or use fewer masks")


def _encoded_lengths(model: Model, texts: Sequence[str]) -> list[int]:
    return [len(ids) for ids in encode_texts(model, texts, TokenFormatter.of(model.tokenizer))]


# Endpoints ----------------------------------------------------------------------------------------------------------


def fill_texts(model: Model, request: FillRequest) -> FillAnswer:
    """Fill the masks of texts."""
    texts = request.texts
    if request.words is not None and request.joint is None:
        raise RequestError("`words` needs a joint search", hint='set "joint" to "beam" or "best-first"')
    mask = model.tokenizer.id_to_token(model.tokenizer.mask_id)
    masks = [text.count(MASK) + (text.count(mask) if mask != MASK else 0) for text in texts]
    if sum(masks) > MAX_MASKS:
        message = f"the request has {sum(masks):,} masks, and at most {MAX_MASKS} are allowed"
        raise RequestError(message, hint="use fewer masks")
    lengths = _encoded_lengths(model, texts)
    if request.joint is None:
        windows = [
            length if length <= model.context else of_text * model.context
            for length, of_text in zip(lengths, masks, strict=True)
        ]
        _check_work(model, sum(windows))
        return FillAnswer(tuple(fill(model, texts, request.top)))
    _check_work(model, sum(search_tokens(model, text, request.beam_size, request.words) for text in texts))
    found = fill_jointly(
        model, texts, request.top, method=request.joint, beam_size=request.beam_size, words=request.words
    )
    return FillAnswer(tuple(found))


def score_texts(model: Model, request: ScoreRequest) -> ScoreAnswer:
    """Score texts. Each token is one pass over its text."""
    _check_work(model, sum(length * min(length, model.context) for length in _encoded_lengths(model, request.texts)))
    return ScoreAnswer(tuple(score(model, request.texts, request.method)))


def generate_lines(model: Model, request: GenerateRequest) -> Iterator[GenerateLine]:
    """Yield one line for each step of a generation."""
    length = sum(_encoded_lengths(model, [request.prefix, request.suffix])) + request.length
    num_steps = (request.steps or request.length) * (1 + (request.sweeps or 1) * (request.order == "gibbs"))
    _check_work(model, length * num_steps)
    states = generate_steps(
        model,
        request.prefix,
        request.suffix,
        length=request.length,
        seed=request.seed,
        order=request.order,
        steps=request.steps,
        schedule=request.schedule,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        sweeps=request.sweeps,
    )
    yield from map(_line, states)


def _line(state: GenerationState) -> GenerateLine:
    step = len(state.steps[0])
    segments = tuple(state.segments())
    if step < state.num_steps:
        return GenerateLine(step, state.num_steps, segments)
    (generation,) = state.generations()
    return GenerateLine(step, state.num_steps, segments, generation.text, generation.log_probability)


def embed_texts(model: Model, request: EmbedRequest) -> EmbedAnswer:
    """Compute a vector of each text."""
    _check_work(model, sum(_encoded_lengths(model, request.texts)))
    vectors = embed(model, request.texts, pooling=request.pooling, last_layers=request.last_layers)
    return EmbedAnswer(tuple(tuple(vector) for vector in vectors.tolist()))


def tokenize_texts(model: Model, request: TokenizeRequest) -> TokenizeAnswer:
    """Split texts into tokens and words."""
    return TokenizeAnswer(tuple(_tokenized(model, text) for text in request.texts))


def _tokenized(model: Model, text: str) -> TokenizedText:
    mask = model.tokenizer.id_to_token(model.tokenizer.mask_id)
    prompt = text if mask == MASK else text.replace(MASK, mask)
    tokens = list_tokens(model.tokenizer, prompt, model.words, is_prompt=True)
    if len(mask) != len(MASK):  # offsets are those of the prompt
        tokens = _moved(tokens, text, mask)
    words = tuple(_word(first, last, tokens, model) for first, last in _word_spans(text, model.words, mask))
    return TokenizedText(tuple(tokens), words)


def _moved(tokens: Sequence[TokenInfo], text: str, mask: str) -> list[TokenInfo]:
    """Return tokens of a text in which `mask` stands for [MASK], with the offsets of the text."""
    at: list[int] = []  # character of the text for each character of the prompt
    parts = text.split(MASK)
    first = 0
    for number, part in enumerate(parts):
        at += range(first, first + len(part))
        first += len(part)
        if number + 1 < len(parts):
            at += [first, *[first + len(MASK) - 1] * (len(mask) - 1)]
            first += len(MASK)
    at.append(len(text))
    return [
        TokenInfo(
            token.id, token.token, token.display, at[token.first], at[token.last - 1] + 1 if token.last else 0,
            token.starts_word, token.starts_sentence, token.is_special,
        )
        for token in tokens
    ]  # fmt: skip


def _word_spans(text: str, rule: WordsRule, mask: str) -> Iterator[tuple[int, int]]:
    """Yield the characters [first, last) of each word, of each [MASK] and of each mask token of the model, in order."""
    begin = 0
    for number, part in enumerate(re.split(f"({re.escape(MASK)}|{re.escape(mask)})", text)):
        if number % 2:  # what separates the parts
            yield begin, begin + len(part)
        else:
            starts = np.flatnonzero(word_starts(part, rule)).tolist()
            for first, last in pairwise([*starts, len(part)]):  # none in a part without words
                yield begin + first, begin + first + len(part[first:last].rstrip())
        begin += len(part)


def _word(first: int, last: int, tokens: Sequence[TokenInfo], model: Model) -> WordInfo:
    inside = [token for token in tokens if token.first < last and token.last > first]
    unknown = model.tokenizer.unknown_id
    return WordInfo(
        first,
        last,
        max(1, len(inside)),
        any(token.id == model.tokenizer.mask_id for token in inside),
        not inside or any(token.id == unknown for token in inside),
    )


def attend(model: Model, request: AttentionRequest) -> AttentionAnswer:
    """Compute the attention of a text."""
    formatter = TokenFormatter.of(model.tokenizer)
    (ids,) = encode_texts(model, [request.text], formatter)
    longest = min(MAX_ATTENTION_TOKENS, model.settings.max_position_embeddings)
    if not 1 <= len(ids) <= longest:
        raise RequestError(
            f"the text has {len(ids):,} tokens, and attention is shown for 1 to {longest}",
            hint="shorten the text" if ids else "give a text",
        )
    layers, heads = model.settings.num_hidden_layers, model.settings.num_attention_heads
    for name, value, size in (("layer", request.layer, layers), ("head", request.head, heads)):
        if value >= size:
            raise RequestError(
                f"invalid {name}: got {value}, expected 0 to {size - 1}", hint=f"the model has {size}, counted from 0"
            )
    weights_LHSS = attention_weights(model.encoder.eval(), ids, is_causal=model.is_causal)
    places_S = torch.arange(len(ids))
    distance_SS = (places_S[:, None] - places_S).abs()
    distances_LH = (weights_LHSS * distance_SS).sum(-1).mean(-1)
    return AttentionAnswer(
        tuple(map(formatter.display, ids)),
        _rounded(weights_LHSS[request.layer, request.head].tolist()),
        _rounded(distances_LH.tolist()),
    )


def _rounded(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(value, 4) for value in row) for row in rows)


def in_request_words(error: UnmaskError) -> UnmaskError:
    """Return an error that names the keys of a request instead of options of the command line."""
    named = in_keywords(error)
    return named.at(location="" if isinstance(error, ModelError) else None)


ENDPOINTS: Final = (
    Endpoint("/fill", FillRequest, FillAnswer, fill_texts),
    Endpoint("/score", ScoreRequest, ScoreAnswer, score_texts),
    Endpoint("/generate", GenerateRequest, GenerateLine, generate_lines, is_stream=True),
    Endpoint("/embed", EmbedRequest, EmbedAnswer, embed_texts),
    Endpoint("/tokenize", TokenizeRequest, TokenizeAnswer, tokenize_texts),
    Endpoint("/attention", AttentionRequest, AttentionAnswer, attend),
)
