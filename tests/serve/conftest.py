"""A small run of English and Korean text, and the server as a process."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from unmask.training.pretrain import launch

RECIPE = """\
about = "Small enough for a test."
[data]
document = "line"
held_out = { method = "tail", fraction = "10%" }
tokenizer = { kind = "wordpiece", vocab_size = 60 }
[model]
kind = "bert"
num_hidden_layers = 2
hidden_size = 32
num_attention_heads = 2
intermediate_size = 32
max_position_embeddings = 256
[[stage]]
max_seq_len = 64
batch_size = "500 tokens"
[train]
budget = "6 steps"
every = { log = "2 steps", validate = "3 steps", save = "3 steps" }
threads = 1
"""
TEXT = "the cat sat on the mat and looked at the moon .\n고양이가 매트 위에 앉아 달을 보았다 .\n" * 40


@pytest.fixture(scope="session")
def served_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two steps; read-only."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "small.toml").write_text(RECIPE)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    launch([folder / "text.txt"], recipe=folder / "small.toml", out=folder / "cats")
    return folder / "cats"


@dataclass
class Server:
    """A process of `unmask serve`, and requests to it."""

    process: subprocess.Popen[str]
    port: int
    arguments: Sequence[str | Path]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> http.client.HTTPResponse:
        """Send a request and return the response, whose body is not read yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body, {"Connection": "close", **(headers or {})})
        return connection.getresponse()

    def post(self, path: str, values: object) -> tuple[int, Any]:
        """Post JSON; return status and parsed answer."""
        response = self.send("POST", path, json.dumps(values).encode(), {"Content-Type": "application/json"})
        return response.status, json.loads(response.read())

    def get(self, path: str) -> Any:
        response = self.send("GET", path)
        assert response.status == 200
        return json.loads(response.read())

    def stop(self, signal_number: int = signal.SIGINT) -> tuple[int, str]:
        """Stop it, by default as Ctrl-C does; return the exit code and what it wrote to standard error."""
        self.process.send_signal(signal_number)
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors

    def start_again(self) -> None:
        """Start it again on its port, after it was stopped."""
        self.process = start(*self.arguments, port=self.port).process


StartServer = Callable[..., Server]


def start(*arguments: str | Path, port: int = 0) -> Server:
    """Start a server and wait until it accepts connections."""
    command = [sys.executable, "-m", "unmask", "serve", *map(str, arguments), "--port", str(port)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line.startswith("http://127.0.0.1:"), process.stderr.read()
    return Server(process, int(line.rstrip().rstrip("/").rpartition(":")[2]), arguments)


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """Starts servers with the arguments of the command, on a port. Those that a test leaves running are ended."""
    started: list[Server] = []

    def start_another(*arguments: str | Path, port: int = 0) -> Server:
        started.append(start(*arguments, port=port))
        return started[-1]

    yield start_another
    for one in started:
        if one.process.poll() is None:
            one.stop()


@pytest.fixture(scope="session")
def server(served_run: Path) -> Iterator[Server]:
    """A server of the run and of its first step, shared by all tests."""
    started = start(served_run, served_run / "step-0000003")
    yield started
    started.stop()
