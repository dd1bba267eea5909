"""The API through a real server: answers of the library, bounds of its own document, bad requests, other origins."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

import unmask
from unmask.core.errors import ModelError, RequestError
from unmask.models.attention import attention_weights
from unmask.models.joint_fill import search_tokens
from unmask.models.model import Model
from unmask.serve.app import Worker, plain
from unmask.serve.inference import ENDPOINTS, Models, tokenize_texts
from unmask.serve.requests import TokenizeRequest, build_request
from unmask.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tests.serve.conftest import Server, StartServer

TEXT = "the cat sat on the [MASK] ."
GOOD: dict[str, dict[str, Any]] = {
    "/fill": {"texts": [TEXT]},
    "/score": {"texts": ["the cat"]},
    "/generate": {"prefix": "the", "length": 2},
    "/embed": {"texts": ["the cat"]},
    "/tokenize": {"texts": ["the cat"]},
    "/attention": {"text": "the cat"},
}


@pytest.fixture(scope="module")
def model(served_run: Path) -> Model:
    return unmask.load(served_run)


# Answers ------------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_library(server: Server, model: Model) -> None:
    texts = [TEXT, "the [MASK] [MASK] looked"]
    as_json = lambda value: json.loads(json.dumps(plain(value)))  # noqa: E731
    assert server.post("/fill", {"texts": texts, "top": 3})[1]["results"] == as_json(unmask.fill(model, texts, 3))
    joint = server.post("/fill", {"texts": texts, "joint": "beam", "words": 2, "beam_size": 4})[1]["results"]
    assert joint == as_json(unmask.fill_jointly(model, texts, method="beam", words=2, beam_size=4))
    scores = server.post("/score", {"texts": ["the cat sat"], "method": "original"})[1]["results"]
    assert scores == as_json(unmask.score(model, "the cat sat", "original"))
    vectors = server.post("/embed", {"texts": ["the cat", "달을"], "pooling": "cls"})[1]["vectors"]
    assert np.allclose(vectors, unmask.embed(model, ["the cat", "달을"], pooling="cls"), atol=1e-6)


def test_attention_is_that_of_one_head_with_distances_of_all(server: Server, model: Model) -> None:
    answer = server.post("/attention", {"text": "the cat [MASK]", "layer": 1, "head": 1})[1]
    assert answer["tokens"] == ["[CLS]", "the", "cat", "[MASK]", "[SEP]"]
    ids = [model.tokenizer.token_to_id(token) for token in answer["tokens"]]
    weights = attention_weights(model.encoder, [id for id in ids if id is not None])
    assert np.allclose(answer["weights"], weights[1, 1], atol=1e-4)
    places = np.arange(5)
    distances = (weights.numpy() * np.abs(places[:, None] - places)).sum(-1).mean(-1)
    assert np.allclose(answer["distances"], distances, atol=1e-3)


def test_words_and_tokens_have_places_in_the_text(server: Server) -> None:
    text = "the cat, 고양이가 🙂 [MASK]s"
    (result,) = server.post("/tokenize", {"texts": [text]})[1]["results"]
    shown = [text[word["first"] : word["last"]] for word in result["words"]]
    assert shown == ["the", "cat", ",", "고양이가", "🙂", "[MASK]", "s"]
    assert [word["is_mask"] for word in result["words"]] == [False] * 5 + [True, False]
    by_word = {name: word["num_tokens"] for name, word in zip(shown, result["words"], strict=True)}
    assert by_word["the"] == 1 and by_word["고양이가"] >= 1 and result["words"][4]["is_unknown"]
    assert all(text[token["first"] : token["last"]] for token in result["tokens"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the cat [MASK]", ["the", "cat", "[MASK]"]),
        ("[MASK] [MASK][MASK] ", ["[MASK]", "[MASK]", "[MASK]"]),
        ("", []),
        (" \n", []),
    ],
)
def test_masks_need_no_words_around_them(server: Server, text: str, words: list[str]) -> None:
    status, answer = server.post("/tokenize", {"texts": [text]})
    assert status == 200
    assert [text[word["first"] : word["last"]] for word in answer["results"][0]["words"]] == words


def test_places_are_right_with_another_mask_token(model: Model) -> None:
    """A RoBERTa has <mask>, which is shorter than [MASK]."""
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "<mask>": 1, "the": 2, "cat": 3}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<unk>", "<mask>"])
    other = replace(model, tokenizer=Tokenizer(inner))
    text = "the [MASK] cat<mask> dog"
    (result,) = tokenize_texts(other, TokenizeRequest((text,))).results
    shown = ["the", "[MASK]", "cat", "<mask>", "dog"]
    assert [text[token.first : token.last] for token in result.tokens] == shown
    assert [text[word.first : word.last] for word in result.words] == shown
    assert [word.is_mask for word in result.words] == [False, True, False, True, False]
    assert [word.is_unknown for word in result.words] == [False, False, False, False, True]


def test_the_work_of_a_search_is_known_before_it_begins(model: Model) -> None:
    tokens = 2 + 4  # with [CLS] and [SEP]
    assert search_tokens(model, "the [MASK] the [MASK]", beam_size=5) == tokens * (1 + 5)
    with_words = search_tokens(model, "the [MASK] the [MASK]", beam_size=5, words=2)
    assert with_words == tokens * 6 + 2 * (tokens + 1) * 11 + (tokens + 2) * 16


def test_generation_comes_step_by_step_and_lets_others_in_between(server: Server, model: Model) -> None:
    response = server.send(
        "POST", "/generate", json.dumps({"prefix": "the cat", "length": 50, "seed": 3}).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    assert response.getheader("Content-Type", "").startswith("application/x-ndjson")
    lines, before_fill = [json.loads(response.readline())], list[int]()

    def read() -> None:
        lines.extend(json.loads(line) for line in response)

    reader = threading.Thread(target=read)
    reader.start()
    assert server.post("/fill", {"texts": [TEXT]})[0] == 200
    before_fill.append(len(lines))
    reader.join(timeout=60)
    assert before_fill[0] < 50, "the other request had to wait for the whole generation"
    assert [line["step"] for line in lines] == list(range(1, 51)) and all(line["steps"] == 50 for line in lines)
    (expected,) = unmask.generate(model, "the cat", length=50, seed=3)
    assert lines[-1]["text"] == expected.text and lines[0]["text"] is None
    assert lines[-1]["log_probability"] == pytest.approx(expected.log_probability)
    assert sum(segment["text"].count("_") for segment in lines[9]["segments"] if segment["state"] == "mask") == 40


def test_a_client_that_goes_away_stops_its_generation(server: Server) -> None:
    body = json.dumps({"length": 60}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
    assert connection.getresponse().readline()
    connection.close()
    assert server.post("/fill", {"texts": [TEXT]})[0] == 200


def test_steps_of_a_run_are_models(server: Server, served_run: Path) -> None:
    listed = server.get("/models")
    names = [one["name"] for one in listed["models"]]
    assert listed["first"] == ["cats", "cats/step-0000003"]
    assert names == ["cats", "cats/step-0000003", "cats/step-0000006"]
    assert listed["models"][0]["layers"] == 2 and "validation loss" in listed["models"][0]["description"]
    found = server.post("/fill", {"texts": [TEXT], "model": "cats/step-0000003"})[1]["results"]
    assert found == plain(unmask.fill(unmask.load(served_run / "step-0000003"), TEXT))
    assert found != server.post("/fill", {"texts": [TEXT], "model": "cats/step-0000006"})[1]["results"]


# The document -------------------------------------------------------------------------------------------------------


def test_every_model_has_a_name_of_its_own(served_run: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "cats (2)", served_run, tmp_path / "a" / "cats"]
    for path in (paths[0], paths[2]):
        shutil.copytree(served_run / "best", path)
    models = Models(paths)
    assert models.first == ("cats (2)", "cats", "cats (3)")
    assert [models.get(name).path for name in models.first] == [Models([path]).get("").path for path in paths]


def test_a_computation_that_has_begun_is_not_refused_when_many_wait() -> None:
    async def check() -> None:
        worker, end = Worker(), threading.Event()
        waiting = [asyncio.create_task(worker.run(end.wait, 60)) for _ in range(64)]
        await asyncio.sleep(0)  # so that they wait
        with pytest.raises(HTTPException, match="64 requests are waiting already"):
            await worker.run(int)
        next_step = asyncio.create_task(worker.run(int, is_next_step=True))
        await asyncio.sleep(0)
        end.set()
        assert await next_step == 0 and all(await asyncio.gather(*waiting))

    asyncio.run(check())


def test_the_document_describes_every_endpoint_and_refers_to_what_it_has(server: Server) -> None:
    document = server.get("/openapi.json")
    assert document["openapi"].startswith("3.1") and set(document["paths"]) == {"/models", *GOOD}
    schemas = document["components"]["schemas"]
    references = set[str]()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            references.update([value["$ref"]] if "$ref" in value else [])
            for entry in value.values():
                walk(entry)
        elif isinstance(value, list):
            for entry in value:
                walk(entry)

    walk(document)
    assert references == {f"#/components/schemas/{name}" for name in schemas}
    for endpoint in ENDPOINTS:
        properties = schemas[endpoint.request.__name__]["properties"]
        assert all(properties[name].get("description") for name in properties), "each key has a meaning"


def beyond(schema: dict[str, Any]) -> list[Any]:
    """Values that a schema excludes, each for one of its bounds."""
    values: list[Any] = [{}, True]
    values += [schema["minimum"] - 1] if "minimum" in schema else []
    values += [schema["exclusiveMinimum"]] if "exclusiveMinimum" in schema else []
    values += [schema["maximum"] + 1] if "maximum" in schema else []
    values += ["a" * (schema["maxLength"] + 1)] if "maxLength" in schema else []
    values += [[], ["a"] * (schema["maxItems"] + 1), [3]] if "maxItems" in schema else []
    if "maxLength" in schema.get("items", {}):
        values.append(["a" * (schema["items"]["maxLength"] + 1)])
    values += ["nothing"] if "enum" in json.dumps(schema) else []
    return values


@pytest.mark.parametrize("path", GOOD)
def test_bounds_of_the_document_are_enforced(server: Server, path: str) -> None:
    schemas = server.get("/openapi.json")["components"]["schemas"]
    request = next(endpoint.request.__name__ for endpoint in ENDPOINTS if endpoint.path == path)
    response = server.send("POST", path, json.dumps(GOOD[path]).encode(), {"Content-Type": "application/json"})
    assert response.status == 200, response.read()
    for name, schema in schemas[request]["properties"].items():
        for value in beyond(schema):
            status, answer = server.post(path, {**GOOD[path], name: value})
            assert status == 400 and name in answer["error"] and answer["hint"], (name, value, answer)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(["texts", "text", "model", "top", "temperature", "length", "joint", "layer", "seed", "words"])


@given(st.sampled_from(ENDPOINTS), json_values | st.dictionaries(keys, json_values, max_size=4))
def test_any_json_is_a_request_or_a_clear_error(endpoint: Any, values: Any) -> None:
    try:
        built = build_request(endpoint.request, values)
    except RequestError as error:
        assert error.hint and "Traceback" not in error.message
    else:
        assert isinstance(built, endpoint.request)


# Bad requests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "values", "says"),
    [
        ("/fill", {"texts": ["[MASK] " * 1000]}, "the request has 1,000 masks, and at most 100 are allowed"),
        ("/fill", {"texts": ["[MASK]*1000"], "joint": "beam"}, "1,000 masks"),
        ("/fill", {"texts": ["no mask"]}, "there is no [MASK] in the text"),
        ("/fill", {"texts": [TEXT], "words": 2}, "`words` needs a joint search"),
        ("/fill", {"texts": [" ".join(["[MASK]"] * 4)], "joint": "beam", "words": 6}, "expected at most 100"),
        ("/fill", {"text": TEXT}, "did you mean `texts`?"),
        ("/fill", {"texts": [TEXT], "model": "../../etc"}, "unknown model '../../etc'"),
        ("/score", {"texts": ["the cat " * 1200] * 4}, "tokens of computation, and at most"),
        ("/score", {"texts": ["  "]}, "the text is blank"),
        ("/generate", {"length": 200, "prefix": "the"}, "can't be generated"),
        ("/generate", {"prefix": TEXT}, "contains [MASK]"),
        ("/attention", {"text": "the cat " * 100}, "attention is shown for 1 to 100"),
        ("/attention", {"text": "the", "head": 2}, "invalid head: got 2, expected 0 to 1"),
        ("/embed", {"texts": ["the"], "last_layers": 9}, "invalid last_layers: got 9"),
        ("/tokenize", ["the"], "not a JSON object"),
        ("/tokenize", {"texts": ["a", None]}, "null in a list"),
        ("/tokenize", {"texts": ["\ud800"]}, "lone surrogate"),
    ],
)
def test_a_bad_request_is_named(server: Server, path: str, values: object, says: str) -> None:
    status, answer = server.post(path, values)
    assert status == 400 and says in answer["error"] and answer["hint"], answer
    assert set(answer) == {"error", "hint"} and "--" not in answer["error"] + answer["hint"]


@pytest.mark.parametrize(
    ("body", "kind", "status", "says"),
    [
        (b"{", "application/json", 400, "not JSON"),
        (b"\xff", "application/json", 400, "not JSON"),
        (b"[" * 60_000, "application/json", 400, "not JSON"),
        (b'{"texts": ["a"], "top": ' + b"9" * 5000 + b"}", "application/json", 400, "not JSON"),
        (b'{"temperature": ' + b"9" * 400 + b"}", "application/json", 400, "number is too large"),
        (b"{}", "text/plain", 415, "unsupported content type"),
        (b'{"texts": ["' + b"a" * 100_000 + b'"]}', "application/json", 413, "larger than 65,536 bytes"),
    ],
)
def test_a_body_that_is_no_request_is_refused(server: Server, body: bytes, kind: str, status: int, says: str) -> None:
    path = "/generate" if b"temperature" in body else "/fill"
    response = server.send("POST", path, body, {"Content-Type": kind})
    answer = json.loads(response.read())
    assert response.status == status and says in answer["error"] and answer["hint"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/static/..%2fapp.py", 404),
        ("GET", "/static/x.js", 404),
        ("GET", "/fill", 405),
    ],
)
def test_other_addresses_are_errors_in_json(server: Server, method: str, path: str, status: int) -> None:
    response = server.send(method, path)
    assert response.status == status and set(json.loads(response.read())) == {"error", "hint"}


# Other origins ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "localhost:80@evil.example"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Origin": "https://127.0.0.1"},
    ],
)
def test_other_hosts_and_origins_are_refused(server: Server, headers: dict[str, str]) -> None:
    body = json.dumps(GOOD["/fill"]).encode()
    for method, path, content in (("GET", "/", None), ("GET", "/models", None), ("POST", "/fill", body)):
        response = server.send(method, path, content, {"Content-Type": "application/json", **headers})
        answer = json.loads(response.read())
        assert response.status == 403 and answer["hint"], answer
        assert response.getheader("Access-Control-Allow-Origin") is None


def test_the_own_origin_is_accepted_under_both_names_and_answers_are_protected(server: Server) -> None:
    for name in ("127.0.0.1", "localhost"):
        host = f"{name}:{server.port}"
        response = server.send("GET", "/", None, {"Host": host, "Origin": f"http://{host}"})
        assert response.status == 200
        policy = response.getheader("Content-Security-Policy", "")
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert response.getheader("X-Content-Type-Options") == "nosniff"
        page = response.read().decode()
        assert "<style" not in page and " style=" not in page and "<script>" not in page and "//" not in page


# The command --------------------------------------------------------------------------------------------------------


def unmask_serve(*arguments: str | Path, before: str = "") -> subprocess.CompletedProcess[str]:
    script = f"import sys\n{before}\nsys.argv = ['unmask', 'serve', *sys.argv[1:]]\nfrom unmask.cli import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_busy_port_is_named_with_the_next_free_one(served_run: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        result = unmask_serve(served_run, "--port", str(port))
    assert result.returncode == 2 and result.stdout == ""
    assert f"port {port} is in use" in result.stderr and "Traceback" not in result.stderr
    offered = int(result.stderr.rpartition("--port ")[2])
    assert offered > port or offered == 0


def test_a_missing_package_is_named_with_the_line_that_installs_it(served_run: Path) -> None:
    result = unmask_serve(served_run, "--port", "0", before="sys.modules['starlette'] = None")
    assert result.returncode == 2 and 'pip install "unmask[serve]"' in result.stderr


def test_a_path_without_a_model_is_an_error(tmp_path: Path, served_run: Path) -> None:
    with pytest.raises(ModelError, match="the path doesn't exist"):
        Models([served_run, tmp_path / "no-run"])


def test_ctrl_c_ends_the_server(served_run: Path, start_server: StartServer) -> None:
    started = start_server(served_run, served_run)
    assert started.get("/models")["first"] == ["cats", "cats (2)"]
    assert started.stop() == (0, "")
