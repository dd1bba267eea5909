"""Requests and answers of the API: dataclasses with bounds, their validation, and the OpenAPI document.

The bounds of a field are keywords of JSON Schema in its metadata. `build_request` checks them, and `openapi` writes
them into the document, so the two can't differ. The meaning of a field is the comment at it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Final, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from unmask.core.config import build_config
from unmask.core.errors import RecipeError, RequestError
from unmask.core.reference import meanings
from unmask.core.version import __version__
from unmask.evaluation.scoring import Method, TextScore
from unmask.models.fill_mask import FillMaskResult
from unmask.models.generate import OrderRule, ScheduleRule, Segment
from unmask.models.joint_fill import JointFillResult, JointMethod
from unmask.tokenization.analysis import TokenInfo

MAX_BODY_BYTES: Final = 1 << 16
MAX_CHARACTERS: Final = 10_000  # of one text
MAX_TEXTS: Final = 32
MAX_MASKS: Final = 100  # of all texts of a request
MAX_ATTENTION_TOKENS: Final = 100  # special tokens included
_LONGEST_NAME: Final = 1000

Request = TypeVar("Request")


def _bounded(default: Any = dataclasses.MISSING, **bounds: Any) -> Any:
    """Return a dataclass field whose metadata are keywords of JSON Schema."""
    return field(default=default, metadata=bounds)


def _texts() -> Any:
    return _bounded(minItems=1, maxItems=MAX_TEXTS, items={"maxLength": MAX_CHARACTERS})


def _model() -> Any:
    return _bounded("", maxLength=_LONGEST_NAME)


# Requests -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FillRequest:
    """Predict every [MASK] of one or several texts."""

    texts: tuple[str, ...] = _texts()  # Texts with [MASK]; in a joint search, [MASK]*3 is three masks in a row.
    model: str = _model()  # Name of a model in /models; empty: the first one.
    top: int = _bounded(5, minimum=1, maximum=50)  # Number of candidates or fillings.
    joint: JointMethod | None = None  # Order of a joint search; none: each mask by itself.
    beam_size: int = _bounded(10, minimum=1, maximum=50)  # Number of fillings that a joint search keeps.
    # Maximum number of tokens of a whole word for each [MASK], in a joint search; none: one token.
    words: int | None = _bounded(None, minimum=1, maximum=6)


@dataclass(frozen=True)
class ScoreRequest:
    """Compute the surprisal of texts, their words and tokens."""

    texts: tuple[str, ...] = _texts()  # Texts; [MASK] in them is plain text.
    model: str = _model()  # Name of a model in /models; empty: the first one.
    method: Method = "within-word"  # Pseudo-log-likelihood; with within-word, later tokens of a word are masked too.


@dataclass(frozen=True)
class GenerateRequest:
    """Generate text by iterative unmasking. The answer is one line of JSON for each step."""

    prefix: str = _bounded("", maxLength=MAX_CHARACTERS)  # Text before the generated tokens.
    suffix: str = _bounded("", maxLength=MAX_CHARACTERS)  # Text after them.
    model: str = _model()  # Name of a model in /models; empty: the first one.
    length: int = _bounded(20, minimum=1, maximum=200)  # Number of tokens to generate.
    order: OrderRule | None = None  # Order of the positions; none: confidence, or left-to-right for a causal model.
    # Number of steps of a pass over all masks; none: one token per step.
    steps: int | None = _bounded(None, minimum=1, maximum=200)
    schedule: ScheduleRule = "cosine"  # Number of tokens left masked after each step.
    temperature: float = _bounded(1.0, exclusiveMinimum=0, maximum=100)  # Divisor of the logits.
    top_k: int | None = _bounded(None, minimum=1, maximum=1_000_000)  # Sample from the most probable tokens only.
    top_p: float = _bounded(1.0, exclusiveMinimum=0, maximum=1)  # Probability that the sampled tokens add up to.
    sweeps: int | None = _bounded(None, minimum=1, maximum=10)  # Passes after the first, in order gibbs.
    seed: int = _bounded(0, minimum=0, maximum=2**31 - 1)  # Random seed.


@dataclass(frozen=True)
class EmbedRequest:
    """Compute a vector of each text."""

    texts: tuple[str, ...] = _texts()  # Texts.
    model: str = _model()  # Name of a model in /models; empty: the first one.
    pooling: Literal["mean", "cls"] = "mean"  # Mean of the tokens, or the first token.
    last_layers: int = _bounded(1, minimum=1, maximum=100)  # Number of last layers to average.


@dataclass(frozen=True)
class TokenizeRequest:
    """Split texts into tokens and words."""

    texts: tuple[str, ...] = _texts()  # Texts; [MASK] in them is the mask token.
    model: str = _model()  # Name of a model in /models; empty: the first one.


@dataclass(frozen=True)
class AttentionRequest:
    """Compute the attention weights of one head, and the mean distance of attention of every head."""

    text: str = _bounded(maxLength=MAX_CHARACTERS)  # Text of up to 100 tokens; [MASK] in it is the mask token.
    model: str = _model()  # Name of a model in /models; empty: the first one.
    layer: int = _bounded(0, minimum=0, maximum=1000)  # Number of the layer, from 0.
    head: int = _bounded(0, minimum=0, maximum=1000)  # Number of the head, from 0.


# Answers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelInfo:
    """A model that requests can name. Facts are null until a request has opened it."""

    name: str
    group: str  # name of the run or folder that it belongs to
    description: str | None
    context: int | None  # tokens
    layers: int | None
    heads: int | None
    predicts_masks: bool | None  # false for a causal model and for a discriminator
    notes: tuple[str, ...]  # what was converted or is untrained


@dataclass(frozen=True)
class ModelsAnswer:
    """The models that requests can name. `first` are those of the command line."""

    models: tuple[ModelInfo, ...]
    first: tuple[str, ...]


@dataclass(frozen=True)
class FillAnswer:
    """Candidates of each mask, or fillings of all masks in a joint search, for each text."""

    results: tuple[FillMaskResult | JointFillResult, ...]


@dataclass(frozen=True)
class ScoreAnswer:
    """Surprisal of each text."""

    results: tuple[TextScore, ...]


@dataclass(frozen=True)
class GenerateLine:
    """The text after one step. The last line has `text` and `log_probability`."""

    step: int  # from 1
    steps: int
    segments: tuple[Segment, ...]  # each mask is shown as "_"
    text: str | None = None
    log_probability: float | None = None


@dataclass(frozen=True)
class EmbedAnswer:
    """One vector for each text."""

    vectors: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class WordInfo:
    """A word of a text, or a [MASK]: characters [first, last) of the text."""

    first: int
    last: int
    num_tokens: int
    is_mask: bool
    is_unknown: bool  # whether a token of it is [UNK]


@dataclass(frozen=True)
class TokenizedText:
    """Tokens and words of a text."""

    tokens: tuple[TokenInfo, ...]
    words: tuple[WordInfo, ...]


@dataclass(frozen=True)
class TokenizeAnswer:
    """Tokens and words of each text."""

    results: tuple[TokenizedText, ...]


@dataclass(frozen=True)
class AttentionAnswer:
    """Attention of one head: row i has the weights of token i on all tokens."""

    tokens: tuple[str, ...]  # special tokens included
    weights: tuple[tuple[float, ...], ...]
    distances: tuple[tuple[float, ...], ...]  # for each layer and head, mean distance in tokens, weighted by attention


@dataclass(frozen=True)
class ErrorAnswer:
    """What was wrong, and what to do."""

    error: str
    hint: str


# Validation ---------------------------------------------------------------------------------------------------------


def build_request(request: type[Request], values: object) -> Request:
    """Build a request from parsed JSON. A key with the value null is left out.

    Raises:
        RequestError: a key is unknown or missing, or a value has a wrong type or is out of its bounds.
    """
    if not isinstance(values, dict):
        raise RequestError("the body is not a JSON object", hint='send an object such as {"texts": ["…"]}')
    tree = {key: value for key, value in cast("Mapping[str, Any]", values).items() if value is not None}
    for name, value in tree.items():
        if None in (value if isinstance(value, list) else ()):
            raise RequestError(f"invalid {name}: got null in a list", hint=f"remove it from {name}")
        if isinstance(value, dict):
            raise RequestError(f"invalid {name}: got an object", hint=f"set {name} to a plain value or a list")
    try:
        built = build_config(request, tree, "", section="request")
    except RecipeError as error:
        named = error.message if error.location in error.message else f"{error.location}: {error.message}"
        raise RequestError(named, hint=error.hint) from error
    except OverflowError as error:  # an integer that no float can hold
        raise RequestError("a number is too large", hint="use a smaller number") from error
    for each in dataclasses.fields(cast("Any", built)):
        _check_bounds(each.name, getattr(built, each.name), each.metadata)
    return built


def _check_bounds(name: str, value: Any, bounds: Mapping[str, Any]) -> None:
    if isinstance(value, tuple):
        entries = cast("tuple[Any, ...]", value)
        if not bounds["minItems"] <= len(entries) <= bounds["maxItems"]:
            got = f"invalid {name}: got {len(entries):,} entries, expected {bounds['minItems']} to {bounds['maxItems']}"
            raise RequestError(got, hint="send them in several requests" if entries else f"give at least one of {name}")
        for number, entry in enumerate(entries, start=1):
            _check_bounds(f"entry {number} of {name}", entry, bounds["items"])
    elif isinstance(value, str):
        longest = bounds.get("maxLength")
        if longest is not None and len(value) > longest:
            got = f"{name} has {len(value):,} characters, expected at most {longest:,}"
            raise RequestError(got, hint="shorten the text")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise RequestError(f"{name} is not Unicode text: it has a lone surrogate", hint="send it as UTF-8")
    elif value is not None:
        lowest, above, highest = (bounds.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))
        too_low = (lowest is not None and value < lowest) or (above is not None and value <= above)
        if too_low or (highest is not None and value > highest):
            expected = f"{lowest} to {highest}" if above is None else f"above {above} and at most {highest}"
            raise RequestError(f"invalid {name}: got {value}, expected {expected}", hint="use a number in this range")


# OpenAPI ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Endpoint:
    """An address of the API: a request that is sent there by POST, and what answers it."""

    path: str
    request: type
    answer: type
    run: Callable[..., Any]  # (model, request) -> answer, or an iterator of answers
    is_stream: bool = False


def openapi(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of the API."""
    schemas: dict[str, Any] = {}
    error = {"description": "The request is not valid, or too large.", **_content(ErrorAnswer, schemas)}
    models = {"description": _about(ModelsAnswer), **_content(ModelsAnswer, schemas)}
    paths: dict[str, Any] = {
        "/models": {"get": {"summary": "List the models and steps.", "responses": {"200": models}}},
    }
    for endpoint in endpoints:
        media = "application/x-ndjson" if endpoint.is_stream else "application/json"
        answer = {"description": _about(endpoint.answer), **_content(endpoint.answer, schemas, media)}
        paths[endpoint.path] = {
            "post": {
                "summary": _about(endpoint.request),
                "requestBody": {"required": True, **_content(endpoint.request, schemas)},
                "responses": {"200": answer, "4XX": error},
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "unmask", "version": __version__, "description": "Masked language models on this machine."},
        "paths": paths,
        "components": {"schemas": dict(sorted(schemas.items()))},
    }


def _about(cls: type) -> str:
    return " ".join((cls.__doc__ or "").partition("\n\n")[0].split())


def _content(cls: type, schemas: dict[str, Any], media: str = "application/json") -> dict[str, Any]:
    return {"content": {media: {"schema": _schema(cls, schemas)}}}


_TYPES: Final[Mapping[Any, str]] = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}


def _schema(hint: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of a type; dataclasses are added to `schemas` and referred to."""
    if dataclasses.is_dataclass(hint):
        cls = cast("type", hint)
        if cls.__name__ not in schemas:
            schemas[cls.__name__] = {}  # so that a class that contains itself would end
            schemas[cls.__name__] = _object(cls, schemas)
        return {"$ref": f"#/components/schemas/{cls.__name__}"}
    if get_origin(hint) in (Union, UnionType):
        return {"anyOf": [_schema(member, schemas) for member in get_args(hint)]}
    if get_origin(hint) is Literal:
        return {"type": "string", "enum": list(get_args(hint))}
    if get_origin(hint) is tuple:
        return {"type": "array", "items": _schema(get_args(hint)[0], schemas)}
    return {"type": _TYPES[hint]}


def _object(cls: type, schemas: dict[str, Any]) -> dict[str, Any]:
    hints, about = get_type_hints(cls), meanings(cls)
    properties: dict[str, Any] = {}
    for each in dataclasses.fields(cls):
        properties[each.name] = dict(_property(each, _schema(hints[each.name], schemas), about[each.name]))
    return {
        "type": "object",
        "description": _about(cls),
        "properties": properties,
        "required": [each.name for each in dataclasses.fields(cls) if each.default is dataclasses.MISSING],
        "additionalProperties": False,
    }


def _property(each: dataclasses.Field[Any], schema: dict[str, Any], about: str) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a property: type, bounds, default and description."""
    bounds = dict(each.metadata)
    items = bounds.pop("items", None)
    yield from schema.items()
    if items is not None:
        yield "items", {**schema["items"], **items}
    yield from bounds.items()
    if each.default is not dataclasses.MISSING:
        yield "default", each.default
    if about:
        yield "description", about
