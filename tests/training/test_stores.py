"""Texts and runs in object stores, against a real local server of S3 and real HTTP servers."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import unmask
from unmask.core import remote
from unmask.core.errors import DamagedError, ModelError, RecipeError, RunError, StoreError, TextError, UnmaskError
from unmask.core.files import default_cache, last_step, write_manifest, write_pointer, write_text
from unmask.core.format import masked
from unmask.core.remote import SESSION, Store, require_public, shown_downloads
from unmask.core.remote.upload import RunUpload, check_upload, fetch_model, fetch_run
from unmask.data.settings import DataConfig
from unmask.data.sources import FileSource, open_source
from unmask.training.display import Display
from unmask.training.recipe import TrainConfig, read_recipe, write_recipe

pytestmark = pytest.mark.slow

pytest.importorskip("s3fs", reason='object stores need: pip install "unmask[s3]"')
pytest.importorskip("moto", reason="the local S3 server needs: pip install moto[server]")

SECRET = "wJalrXUtnFEMI"
MEGABYTE = 1 << 20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A process of moto's S3 server."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def wait(self) -> None:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"{self.address}/moto-api/data.json", timeout=5):
                    return
            except OSError:
                assert self.process.poll() is None, "the server ended"
                time.sleep(0.1)
        pytest.fail("the server doesn't answer")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def environment() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield patch


@pytest.fixture(scope="module")
def server(environment: pytest.MonkeyPatch) -> Iterator[Server]:
    started = Server(free_port())
    environment.setenv("AWS_ENDPOINT_URL", started.address)
    try:
        started.wait()
        yield started
    finally:
        started.end()


@pytest.fixture(scope="module")
def store(server: Server) -> Any:
    import s3fs

    return s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)


NUMBERS = itertools.count()


@pytest.fixture
def bucket(store: Any) -> str:
    name = f"bucket-{next(NUMBERS)}"
    store.mkdir(name)
    return name


class Proxy:
    """Forwards connections to a server, and counts bytes; after a number of them it cuts all and refuses some.

    Args:
        target: address of the server.
        limit: bytes of its answers after which connections are cut.
        refusals: connections that are refused then.
        limit_sent: bytes of requests after which connections are cut.
    """

    def __init__(self, target: str, limit: int, refusals: int = 1, limit_sent: int = 1 << 40) -> None:
        host, port = target.removeprefix("http://").split(":")
        self._target, self.left, self.passed, self.cuts = (host, int(port)), limit, 0, 0
        self._limit_sent, self.sent = limit_sent, 0
        self.refusals = refusals
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.cuts and self.refusals:  # the server is away
                self.refusals -= 1
                client.close()
                continue
            above = socket.create_connection(self._target)
            self._ends += [client, above]
            threading.Thread(target=self._copy, args=(client, above, False), daemon=True).start()
            threading.Thread(target=self._copy, args=(above, client, True), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                target.sendall(data)
                if counts:
                    self.passed += len(data)
                    self.left -= len(data)
                else:
                    self.sent += len(data)
                if (self.left <= 0 or self.sent > self._limit_sent) and not self.cuts:
                    self.cuts = 1
                    self._cut(*self._ends)
                    break
        except OSError:
            pass
        self._cut(source, target)

    @staticmethod
    def _cut(*ends: socket.socket) -> None:
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        for end in self._ends:
            end.close()


# Addresses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:secret@host/a.txt", "https://***@host/a.txt"),
        (
            "https://me:p%40ss@host:8000/a@b.txt?sig=abc&versionId=3",
            "https://***@host:8000/a@b.txt?sig=***&versionId=3",
        ),
        ("https://host/a.txt?abcdef", "https://host/a.txt?***"),
        ("s3://bucket/part-?.txt", "s3://bucket/part-?.txt"),
        ("s3://key:secret@bucket/a.txt?token=x", "s3://***@bucket/a.txt?token=***"),
        ("can't open https://u:p@host/x?key=1: 403", "can't open https://***@host/x?key=***: 403"),
        ("C:/notes.txt", "C:/notes.txt"),
        ("https://me:p'ss@host/a", "https://***@host/a"),
        ("https://host/a?fn=UTF-8''n.txt&sig=abc", "https://host/a?fn=***&sig=***"),
        ("https://me:pa/ss@host/a", "https://***@host/a"),
        ("https://host/a.txt#access_token=abc", "https://host/a.txt#***"),
        ("s3://bucket/a#1.txt", "s3://bucket/a#1.txt"),
        ("https://[::1]:8000/a@b.txt", "https://[::1]:8000/a@b.txt"),
    ],
)
def test_credentials_of_an_address_are_hidden(address: str, shown: str) -> None:
    assert masked(address) == shown
    assert masked(shown) == shown, "also when it is hidden twice"


def test_an_address_with_credentials_is_not_written_to_a_recipe() -> None:
    require_public("s3://bucket/a.txt", "data.valid.news")
    with pytest.raises(RecipeError, match=r"credentials") as caught:
        DataConfig(valid={"news": "https://me:secret@host/a.txt"})
    assert "secret" not in str(caught.value) and "valid.news" in str(caught.value)


# Texts ----------------------------------------------------------------------------------------------------------------


def texts_of(source: FileSource) -> list[str]:
    return [chunk.text for part in source.parts() for chunk in source.documents(part)]


def test_texts_of_a_bucket_are_read_as_files_are(store: Any, bucket: str, tmp_path: Path) -> None:
    import gzip

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a" / "2.txt.gz").write_bytes(gzip.compress(b"three\n"))
    (tmp_path / "a" / "code.bin").write_bytes(b"\0")
    store.put(str(tmp_path / "a"), f"{bucket}/a", recursive=True)
    local = open_source([tmp_path / "a" / "1.txt", tmp_path / "a" / "2.txt.gz"], DataConfig())
    stages: dict[str, list[float]] = {}
    with shown_downloads(lambda stage, fraction: stages.setdefault(stage, []).append(fraction)):
        for name in ("a", "a/*.t*", "a/?.txt*"):
            there = open_source([f"s3://{bucket}/{name}"], DataConfig())
            assert texts_of(there) == texts_of(local) == ["one", "two", "three"]
            assert there.fingerprint == local.fingerprint
            assert there.paths == [f"s3://{bucket}/{name}"]
    assert stages == {f"downloading s3://{bucket}/a": [pytest.approx(10 / 36, abs=0.1), 1.0]}, "once, with progress"
    store.pipe(f"{bucket}/a/1.txt", b"new\n")
    assert texts_of(open_source([f"s3://{bucket}/a"], DataConfig())) == ["new", "three"], "a change is noticed"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("s3://no-such-bucket/a.txt", "no such object or bucket"),
        ("s3://{bucket}/none.txt", "no such object or bucket"),
        ("s3://{bucket}/*.txt", "no object matches this address"),
        ("s3:///", "invalid address"),
        ("https://host/a::file:///etc/passwd", "invalid address"),
        ("http://example.com/a.txt", "got http, expected https"),
        ("https://host:port/a.txt", "its server or port"),
        ("https://***@host/a.txt", "the credentials of this address were not stored"),
    ],
)
def test_an_address_without_an_object_is_an_error(bucket: str, name: str, message: str) -> None:
    with pytest.raises(TextError, match=re.escape(message)) as caught:
        open_source([name.format(bucket=bucket)], DataConfig()).check()
    assert caught.value.hint and (name.split("/")[-1] in caught.value.location or ":port" in name)


def test_a_download_goes_on_after_the_server_was_away(
    server: Server, store: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = b"a cat sat on the mat and looked at the moon\n"
    text = line * (20 * MEGABYTE // len(line))
    store.pipe(f"{bucket}/long.txt", text)
    proxy = Proxy(server.address, 12 * MEGABYTE)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    monkeypatch.setattr(remote, "_DELAYS", (0.1,) * 5)
    try:
        source = open_source([f"s3://{bucket}/long.txt"], DataConfig())
        copy = Path(source.parts()[0].path)
    finally:
        proxy.close()
    assert copy.read_bytes() == text
    assert proxy.cuts == 1 and proxy.refusals == 0, "the connection was cut, and refused once"
    assert proxy.passed < 29 * MEGABYTE, "the first eight megabytes were not downloaded again"


# HTTP -----------------------------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves one text; the first answer to each GET ends after half of it."""

    protocol_version = "HTTP/1.1"
    text = b"a cat sat on the mat and looked at the moon\n" * 20_000
    has_ranges, always_cuts, asked = True, False, list[tuple[str, str]]()

    def do_HEAD(self) -> None:
        self._answer(0, is_head=True)

    def do_GET(self) -> None:
        start = self.headers.get("Range", "bytes=0-") if self.has_ranges else "bytes=0-"
        self.asked.append((self.headers.get("Range", ""), self.headers.get("Authorization", "")))
        self._answer(int(start.removeprefix("bytes=").split("-")[0]))

    def _answer(self, start: int, *, is_head: bool = False) -> None:
        if "a.txt" not in self.path or "wrong" in self.path:
            self.send_response(403 if "wrong" in self.path else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = self.text[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"one"')
        self.end_headers()
        if not is_head:
            self.close_connection = True
            self.wfile.write(body[: len(body) // 2] if len(self.asked) == 1 or self.always_cuts else body)
            parts = list[Path]()
            deadline = time.monotonic() + 30
            while len(self.asked) == 1 and time.monotonic() < deadline and not any(p.stat().st_size for p in parts):
                time.sleep(0.02)  # until the client has stored some of it
                parts = [part for part in default_cache().rglob(".part") if part.exists()]

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""


@pytest.fixture(params=[True, False], ids=["with ranges", "without ranges"])
def site(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_DELAYS", (0.01,) * 5)
    monkeypatch.setattr(Handler, "has_ranges", request.param)
    monkeypatch.setattr(Handler, "asked", [])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_text_of_a_web_server_is_completed_after_a_cut(site: str) -> None:
    source = open_source([f"http://me:{SECRET}@{site}/a.txt?token={SECRET}"], DataConfig())
    copy = Path(source.parts()[0].path)
    assert copy.read_bytes() == Handler.text
    assert len(Handler.asked) == 2 and all(login.startswith("Basic ") for _, login in Handler.asked)
    assert re.fullmatch(r"bytes=[1-9]\d+-", Handler.asked[1][0]), "from where the first answer ended"
    assert source.paths == [f"http://***@{site}/a.txt?token=***"]
    records = [file.read_text() for file in default_cache().rglob("*.json")]
    assert records and not any(SECRET in record for record in records)


@pytest.mark.parametrize("site", [False], indirect=True)
def test_a_server_that_always_breaks_off_is_given_up(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "always_cuts", True)
    with pytest.raises(TextError, match="can't reach this address"):
        open_source([f"http://{site}/a.txt"], DataConfig()).check()
    assert len(Handler.asked) <= 12


def test_addresses_that_differ_in_what_is_hidden_are_different(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "asked", [("", "")])  # no cut
    first, second = (open_source([f"http://{site}/a.txt?id={number}"], DataConfig()).parts()[0] for number in (1, 2))
    assert first.path != second.path and len(Handler.asked) == 3
    with pytest.raises(TextError, match="several addresses differ"):
        open_source([f"http://{site}/a.txt?id=***"], DataConfig()).check()


@pytest.mark.parametrize(("name", "message"), [("none.txt", "no such object"), ("wrong/a.txt", "no access")])
def test_a_web_server_that_refuses_is_named_without_credentials(site: str, name: str, message: str) -> None:
    with pytest.raises(UnmaskError, match=message) as caught:
        open_source([f"http://me:{SECRET}@{site}/{name}?token={SECRET}"], DataConfig()).check()
    assert SECRET not in str(caught.value) and name in caught.value.location


def test_a_server_that_is_down_is_an_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(remote, "_DELAYS", (0.01, 0.02))
    with pytest.raises(TextError, match="can't reach this address") as caught:
        open_source([f"http://me:{SECRET}@127.0.0.1:{free_port()}/a.txt"], DataConfig()).check()
    assert caplog.text.count("trying again in") == 2
    assert SECRET not in caplog.text + str(caught.value)


# Runs -----------------------------------------------------------------------------------------------------------------

SMALL = {
    "model": {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32},
    "train": {"every": {"save": "2 steps", "validate": "2 steps"}, "threads": 1, "report": False},
}


def train(text: str | Path, out: Path, address: str, display: Display | None = None, start: str | None = None) -> None:
    settings = {**SMALL, "train": {**SMALL["train"], "upload": address}}
    if start:
        del settings["model"]
    recipe = "continue" if start else "char"
    unmask.pretrain([text], recipe=recipe, budget="6 steps", out=out, settings=settings, display=display, start=start)


def tree(folder: Path) -> dict[str, bytes]:
    """The files of a run that are uploaded."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if not name.startswith(("lock", "latest"))}


def objects(store: Any, address: str) -> dict[str, bytes]:
    below = address.removeprefix("s3://") + "/"
    names = {path: path.removeprefix(below) for path in store.find(below)}
    return {name: store.cat_file(path) for path, name in names.items() if name != SESSION}


@pytest.mark.parametrize("site", [True], indirect=True)
def test_no_file_and_no_message_of_a_run_has_credentials(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address, run = f"http://me:{SECRET}@{site}/a.txt?token={SECRET}", tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["unmask", "pretrain", address])
    monkeypatch.setattr(Handler, "text", Handler.text[:88_000])
    unmask.pretrain([address], recipe="char", budget="4 steps", out=run, settings=SMALL)
    written = {name: content for name, content in tree(tmp_path).items() if SECRET.encode() in content}
    assert list(written) == [] and b"http://***@" in (run / "env.json").read_bytes()
    monkeypatch.setattr(remote, "_given", {})  # as in another process
    with pytest.raises(TextError, match="credentials of this address were not stored") as caught:
        unmask.resume(run, budget="+1 step")
    assert "texts=" in caught.value.hint
    unmask.resume(run, budget="+1 step", texts=[address])
    shown = capsys.readouterr()
    assert "downloaded http://***@" in shown.out and SECRET not in shown.out + shown.err


@pytest.fixture(scope="module")
def uploaded(store: Any, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Address and folder of a run of a text in a bucket."""
    store.mkdir("runs")
    store.put(str(prose), "runs/texts/prose.txt")
    folder = tmp_path_factory.mktemp("uploaded") / "run"
    train("s3://runs/texts/prose.txt", folder, "s3://runs/first")
    return "s3://runs/first", folder


def test_a_checkpoint_with_pickles_is_not_downloaded(store: Any, bucket: str, tmp_path: Path) -> None:
    for name in ("step-0000004/.metadata", "recipe.toml", "config.json"):
        store.pipe(f"{bucket}/run/{name}", b"{}")
    for fetch in (fetch_model, lambda address: fetch_run(address, tmp_path / "run")):
        with pytest.raises(ModelError, match="is a pickle, which runs code when it is opened") as caught:
            fetch(f"s3://{bucket}/run")
        assert caught.value.location == f"s3://{bucket}/run/step-0000004/.metadata"
    assert list(tmp_path.iterdir()) == []


def test_the_store_has_the_run(store: Any, uploaded: tuple[str, Path]) -> None:
    address, folder = uploaded
    there = objects(store, address)
    assert there == tree(folder)
    steps = {name.partition("/")[0] for name in there if name.startswith("step-")}
    assert steps == {"step-0000004", "step-0000006"}, "as many as train.keep_last"
    assert json.loads(there["env.json"])["text"]["paths"] == ["s3://runs/texts/prose.txt"]


@pytest.mark.parametrize("name", ["", "/step-0000004"])
def test_a_run_starts_with_a_model_of_the_store_and_is_uploaded(
    store: Any, uploaded: tuple[str, Path], bucket: str, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:  # fmt: skip
    (start, original), address, run = uploaded, f"s3://{bucket}/second", tmp_path / "run"
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    train(prose, run, address, start=start + name)
    expected = original / (name.strip("/") or "best")
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (run / "start" / file).read_bytes() == (expected / file).read_bytes()
    assert read_recipe(run)[0].init.model == start + name
    assert json.loads((run / "log.jsonl").read_text().splitlines()[0])["step"] == 0, "the start was validated"
    assert objects(store, address) == tree(run)
    (copy,) = (tmp_path / "cache" / "objects").glob("model-*")
    before = copy.stat().st_mtime_ns
    shutil.rmtree(run)
    shutil.rmtree(tmp_path / "cache" / "start")
    monkeypatch.chdir(tmp_path)
    unmask.resume(address, budget="+2 steps", display=None, texts=[prose])
    assert objects(store, address) == tree(Path("runs/second")), "resumed elsewhere, without the first model"
    train(prose, run, f"s3://{bucket}/third", start=start + name)
    assert copy.stat().st_mtime_ns == before, "downloaded once"


@pytest.mark.parametrize(
    ("address", "kind", "message"),
    [
        ("s3://no-such-bucket/run", ModelError, "no such object or bucket"),
        ("s3://runs/none", ModelError, "no model at this address"),
        ("s3://runs/texts", ModelError, "no model at this address"),
        ("https://host/run", RecipeError, "a model can't be read from https://"),
        (f"s3://me:{SECRET}@bucket/run", RecipeError, "this address has credentials"),
    ],
)
def test_an_address_without_a_model_is_an_error(
    uploaded: tuple[str, Path], prose: Path, tmp_path: Path, address: str, kind: type[UnmaskError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        unmask.pretrain([prose], out=tmp_path / "run", start=address)
    assert SECRET not in str(caught.value) and caught.value.hint
    assert not (tmp_path / "run").exists()


def test_a_damaged_model_of_the_store_is_refused(
    store: Any, uploaded: tuple[str, Path], bucket: str, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    store.put(str(uploaded[1] / "best"), f"{bucket}/model", recursive=True)
    weights = bytearray(store.cat_file(f"{bucket}/model/model.safetensors"))
    weights[-1] ^= 1
    store.pipe(f"{bucket}/model/model.safetensors", bytes(weights))
    with pytest.raises(DamagedError, match="has changed since it was written"):
        unmask.pretrain([prose], out=tmp_path / "run", start=f"s3://{bucket}/model")
    assert not list((tmp_path / "cache").rglob("config.json")), "the copy is not kept"


def test_weights_in_other_formats_are_not_downloaded(
    store: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    for name in ("config.json", "pytorch_model.bin", "onnx/model.onnx"):
        store.pipe(f"{bucket}/model/{name}", b"{}")
    with pytest.raises(ModelError, match="no weights in safetensors"):
        fetch_model(f"s3://{bucket}/model")
    assert not list((tmp_path / "cache").rglob("*.json"))
    store.pipe(f"{bucket}/model/model.safetensors", b"{}")
    assert set(tree(fetch_model(f"s3://{bucket}/model"))) == {"config.json", "model.safetensors"}


def test_a_run_of_the_store_is_resumed_on_another_machine(
    store: Any, uploaded: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = uploaded
    store.rm(f"{address}/step-0000006/card.json")  # as if the upload of the last step had been cut
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RecipeError, match="has not given on this machine: s3://runs/texts"):
        unmask.resume(address, display=None)
    with pytest.raises(RecipeError, match="has not given on this machine: s3://runs/first"):
        unmask.resume("runs/first", display=None)
    shutil.rmtree("runs")
    unmask.resume(address, display=None, texts=["s3://runs/texts/prose.txt"])
    there = Path("runs/first")
    assert (there / "step-0000006" / "model.safetensors").read_bytes() == (
        folder / "step-0000006" / "model.safetensors"
    ).read_bytes()
    assert (there / "recipe.toml").read_bytes() == (folder / "recipe.toml").read_bytes()
    assert objects(store, address) == tree(there), "and the store has the new step"
    with pytest.raises(RunError, match="the folder for the downloaded run exists"):
        unmask.resume(address, display=None)


def test_a_run_from_elsewhere_uploads_nothing(
    store: Any, uploaded: tuple[str, Path], bucket: str, tmp_path: Path
) -> None:
    """As if its recipe had named another bucket, with a valid digest."""
    run = tmp_path / "run"
    shutil.copytree(uploaded[1], run, symlinks=True)
    recipe, plan = read_recipe(run)
    changed = replace(recipe, train=replace(recipe.train, upload=f"s3://{bucket}/loot"))
    write_recipe(run, changed, plan)
    with pytest.raises(RecipeError, match="has not given on this machine") as caught:
        unmask.resume(run, display=None)
    assert "train.upload" in caught.value.hint and store.find(bucket) == []


def test_the_copy_of_another_run_is_not_touched(
    store: Any, uploaded: tuple[str, Path], bucket: str, tmp_path: Path
) -> None:
    run, address = tmp_path / "run", f"s3://{bucket}/other"
    shutil.copytree(uploaded[1], run, symlinks=True)
    for name in ("env.json", "recipe.toml", "step-0000001/card.json", "step-0000002/card.json"):
        store.pipe(f"{bucket}/other/{name}", b"{}")
    before = objects(store, address)
    with pytest.raises(RunError, match="not those of this run"):
        unmask.resume(run, settings=[f"train.upload={address}"], display=None)
    upload = RunUpload(run, address, keep=2)
    upload.copy()
    assert upload.error and "not those of this run" in upload.error.message
    assert objects(store, address) == before
    check_upload(uploaded[0], run)  # its own copy


def test_a_folder_is_deleted_by_its_name(store: Any, bucket: str) -> None:
    for name in ("exp1/step-1/a", "exp[1]/step-1/a", "exp[1]/step-12/a"):
        store.pipe(f"{bucket}/{name}", b"x")
    Store(f"s3://{bucket}/exp[1]", StoreError).remove_folder("step-1")
    assert store.find(bucket) == [f"{bucket}/exp1/step-1/a", f"{bucket}/exp[1]/step-12/a"]
    with pytest.raises(RecipeError, match="not a pattern"):
        TrainConfig(upload="s3://bucket/exp[1]")


def test_a_model_without_digests_is_copied(store: Any, bucket: str, tmp_path: Path) -> None:
    for name in ("start/card.json", "start/config.json", "recipe.toml", "report.html"):
        write_text(tmp_path / name, name)
    upload = RunUpload(tmp_path, f"s3://{bucket}/run", keep=2)
    upload.copy()
    assert upload.error is None
    assert set(objects(store, f"s3://{bucket}/run")) == {"start/card.json", "start/config.json", "recipe.toml"}
    marker = f"{bucket}/marked/"  # as the console of a store makes for an empty folder
    store.call_s3("put_object", Bucket=bucket, Key="marked/", Body=b"")
    assert store.exists(marker)
    check_upload(f"s3://{bucket}/marked")


class Vandal(Display):
    """Deletes a bucket at a step."""

    def __init__(self, store: Any, bucket: str) -> None:
        super().__init__()
        self._store, self._bucket = store, bucket

    def step(self, state: Any) -> None:
        while state.step == 3 and self._store.exists(self._bucket):
            with contextlib.suppress(OSError):  # an upload came between
                self._store.rm(self._bucket, recursive=True)


def test_a_bucket_that_vanishes_does_not_stop_the_run(
    store: Any, bucket: str, prose: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, address = tmp_path / "run", f"s3://{bucket}/run"
    with pytest.raises(StoreError, match="files of the run are not uploaded") as caught:
        train(prose, run, address, Vandal(store, bucket))
    assert "no such object or bucket" in str(caught.value) and address in caught.value.location
    assert f'unmask.resume("{run}")' in caught.value.hint
    assert "failure 1 of this upload, training goes on" in caplog.text
    assert unmask.Run(run).status == "finished", "the run itself is complete"
    store.mkdir(bucket)
    unmask.resume(run, display=None)
    assert objects(store, address) == tree(run)


class Owner(Display):
    """Takes the rights on all buckets away, at a step."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._server = server

    def allow(self, requests: str) -> None:
        """Let the server answer so many requests without rights."""
        address = f"{self._server.address}/moto-api/reset-auth"
        request = urllib.request.Request(address, requests.encode(), {"Content-Type": "text/plain"}, method="POST")
        urllib.request.urlopen(request, timeout=5).close()

    def step(self, state: Any) -> None:
        if state.step == 3:
            self.allow("0")


def test_rights_that_are_taken_away_do_not_stop_the_run(
    server: Server, store: Any, bucket: str, prose: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, address, owner = tmp_path / "run", f"s3://{bucket}/run", Owner(server)
    try:
        with pytest.raises(StoreError, match="files of the run are not uploaded") as caught:
            train(prose, run, address, owner)
        with pytest.raises(StoreError, match="no access to this address") as refused:
            check_upload(address, run)
    finally:
        owner.allow("inf")
    assert "no access to this address" in str(caught.value) and "training goes on" in caplog.text
    assert "trying again" not in caplog.text, "another try would not help"
    assert "AWS_ACCESS_KEY_ID" in refused.value.hint
    assert not any(secret in caplog.text + str(caught.value) + str(refused.value) for secret in (SECRET, "AKIAEXAMPLE"))
    assert unmask.Run(run).status == "finished"
    unmask.resume(run, display=None)
    assert objects(store, address) == tree(run)


def test_what_was_deleted_in_the_store_is_copied_again(store: Any, bucket: str, tmp_path: Path) -> None:
    """A bucket that vanished and was created again, while one process trains."""
    for name in ("best/card.json", "best/config.json", "env.json", "recipe.toml", "log.jsonl"):
        write_text(tmp_path / name, name)
    address = f"s3://{bucket}/run"
    upload = RunUpload(tmp_path, address, keep=2)
    upload.copy()
    store.rm(bucket, recursive=True)
    upload.copy()
    assert upload.error and "no such object or bucket" in upload.error.message
    store.mkdir(bucket)
    upload.copy()
    assert upload.error is None and objects(store, address) == tree(tmp_path)


def test_a_run_that_went_back_is_copied_with_the_steps_it_has(store: Any, bucket: str, tmp_path: Path) -> None:
    """More steps than `keep`, because the run may have to go back to the first one; and after it did, only that one."""
    run, address = tmp_path / "run", f"s3://{bucket}/run"
    for name in ("step-0000004", "step-0000008", "step-0000009"):
        write_text(run / name / "card.json", name)
        write_manifest(run / name)
        write_pointer(run / "latest", name)
    write_text(run / "env.json", '{"id": "one"}')
    write_text(run / "recipe.toml", "seed = 1\n")
    upload = RunUpload(run, address, keep=1)
    upload.copy()
    assert upload.error is None and objects(store, address) == tree(run)
    fetch_run(address, tmp_path / "elsewhere")
    assert tree(tmp_path / "elsewhere") == tree(run) and last_step(tmp_path / "elsewhere") == 9
    write_pointer(run / "latest", "step-0000004")
    for name in ("step-0000008", "step-0000009"):
        shutil.rmtree(run / name)
    write_text(run / "step-0000004" / "card.json", "lower rates")
    write_manifest(run / "step-0000004")
    RunUpload(run, address, keep=3).copy()  # also by a new process
    assert objects(store, address) == tree(run)


def test_of_two_processes_that_continue_a_run_the_later_one_uploads(store: Any, bucket: str, tmp_path: Path) -> None:
    """On two machines, with other steps."""
    address, uploads = f"s3://{bucket}/run", list[RunUpload]()
    for name, numbers in (("first", (10, 20)), ("second", (10, 15))):
        write_text(tmp_path / name / "env.json", '{"id": "abc"}')
        for number in numbers:
            step = f"step-{number:07d}"
            write_text(tmp_path / name / step / "card.json", f"{name} {number}")
            write_manifest(tmp_path / name / step)
            write_pointer(tmp_path / name / "latest", step)
        uploads.append(RunUpload(tmp_path / name, address, keep=2))
    first, second = uploads
    first.copy()
    assert first.error is None and objects(store, address) == tree(tmp_path / "first")
    second.copy()
    assert second.error is None and objects(store, address) == tree(tmp_path / "second")
    write_text(tmp_path / "first" / "log.jsonl", "{}\n")
    first.copy()
    assert first.error and "another process continues this run" in first.error.message
    assert "--set train.upload=ADDRESS" in first.error.hint
    second.copy()
    assert second.error is None and objects(store, address) == tree(tmp_path / "second"), "untouched"


def test_another_run_that_took_the_address_meanwhile_is_not_touched(store: Any, bucket: str, tmp_path: Path) -> None:
    write_text(tmp_path / "env.json", '{"id": "one"}')
    upload = RunUpload(tmp_path, f"s3://{bucket}/run", keep=2)
    upload.copy()
    store.rm(bucket, recursive=True)
    upload.copy()
    store.mkdir(bucket)
    store.pipe(f"{bucket}/run/env.json", b'{"id": "two"}')
    write_text(tmp_path / "log.jsonl", "{}\n")
    upload.copy()
    assert upload.error and "not those of this run" in upload.error.message
    assert objects(store, f"s3://{bucket}/run") == {"env.json": b'{"id": "two"}'}


def test_an_upload_waits_longer_from_try_to_try_and_goes_on(
    server: Server, store: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    write_text(tmp_path / "recipe.toml", "seed = 1\n" * 1_000)
    proxy = Proxy(server.address, 1, refusals=7)  # cut at the first answer; the library itself tries twice
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    monkeypatch.setattr(remote, "_DELAYS", (0.1, 0.2, 0.3, 0.4, 0.5))
    upload = RunUpload(tmp_path, f"s3://{bucket}/run", keep=2)
    upload.copy()
    proxy.close()
    assert upload.error is None and objects(store, f"s3://{bucket}/run") == tree(tmp_path)
    delays = re.findall(r"trying again in ([\d.]+) s", caplog.text)
    assert len(delays) >= 3 and delays[:3] == ["0.1", "0.2", "0.3"]


def test_an_upload_that_failed_goes_on_with_the_file_that_failed(
    server: Server, store: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three large files: the connection breaks off in the last one."""
    step, size = tmp_path / "step-0000001", MEGABYTE
    for name in ("a", "b", "c"):
        write_text(step / name, name * size)
    write_text(step / "card.json", "{}")
    proxy = Proxy(server.address, 1 << 40, refusals=1_000, limit_sent=2 * size + size // 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    monkeypatch.setattr(remote, "_DELAYS", ())
    upload = RunUpload(tmp_path, f"s3://{bucket}/run", keep=2)
    upload.copy()
    assert upload.error and set(objects(store, f"s3://{bucket}/run")) == {"step-0000001/a", "step-0000001/b"}
    proxy.refusals, before = 0, proxy.sent
    upload.copy()
    proxy.close()
    assert upload.error is None and objects(store, f"s3://{bucket}/run") == tree(tmp_path)
    assert size <= proxy.sent - before < 1.5 * size, "one file of three"


def test_a_relative_folder_stays_the_same_folder(
    store: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "runs" / "notes" / "recipe.toml", "seed = 1\n")
    monkeypatch.chdir(tmp_path)
    upload = RunUpload(Path("runs/notes"), f"s3://{bucket}/run", keep=2)
    monkeypatch.chdir(tmp_path / "runs")
    upload.copy()
    assert upload.error is None and objects(store, f"s3://{bucket}/run") == {"recipe.toml": b"seed = 1\n"}
    store.rm(bucket, recursive=True)
    upload.copy()
    assert upload.error and upload.error.hint.endswith("--resume runs/notes"), "named as it was given"


@pytest.mark.parametrize(
    ("address", "kind", "message"),
    [
        ("s3://no-such-bucket/run", StoreError, "no such object or bucket"),
        ("s3://runs/texts", RunError, "there are objects at this address already"),
        ("https://host/run", RecipeError, "invalid upload"),
        (f"s3://me:{SECRET}@bucket/run", RecipeError, "this address has credentials"),
    ],
)
def test_an_upload_that_can_not_work_is_an_error_before_the_run(
    uploaded: tuple[str, Path], prose: Path, tmp_path: Path, address: str, kind: type[UnmaskError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        train(prose, tmp_path / "run", address)
    assert SECRET not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_address_without_a_run_is_an_error(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="no run at this address"):
        unmask.resume(f"s3://{bucket}/run", display=None)
    assert list(tmp_path.iterdir()) == []


def test_a_step_is_complete_if_its_card_is_there(
    server: Server, store: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tmp_path / "step-0000001"
    for name in ("card.json", "config.json", "model.safetensors", "resume/state.json", "resume/weights.safetensors"):
        write_text(step / name, name * 100)
    write_manifest(step / "resume")
    write_manifest(step)
    write_text(tmp_path / "recipe.toml", "seed = 1\n")
    monkeypatch.setattr(remote, "_DELAYS", ())
    counts = set[int]()
    for limit in range(500, 10_000, 1_000):  # bytes of answers after which the server is away
        proxy, address = Proxy(server.address, limit, refusals=1_000), f"s3://{bucket}/{limit}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        upload = RunUpload(tmp_path, address, keep=2)
        upload.copy()
        there = objects(store, address)
        counts.add(len(there))
        assert "step-0000001/card.json" not in there or there == tree(tmp_path)
        proxy.refusals, proxy.left = 0, 1 << 40  # the server is back
        upload.copy()
        assert upload.error is None and objects(store, address) == tree(tmp_path)
        proxy.close()
    assert len(counts) > 3, "uploads were cut at different files"
