"""Folders from elsewhere: no code of theirs is imported, no name leads out of them, and their sizes are bounded."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from unmask.core import files, plugins
from unmask.core.errors import DamagedError, ModelError, RecipeError
from unmask.core.files import default_cache, read_json, verify_manifest, write_manifest
from unmask.hub.from_hf import import_model, open_model
from unmask.models.model import load
from unmask.tokenization.tokenizer import Tokenizer
from unmask.training.recipe import load_recipe

Command = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]
LOGGER = """\
from pathlib import Path

Path("imported.txt").write_text("code ran")

class Lines:
    def __init__(self, settings, context): ...
    def write(self, step, metrics): ...
    def close(self): ...
"""


@pytest.fixture
def foreign(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose recipe names a module in the working folder, and that another user has started."""
    Path("foreign_logger.py").write_text(LOGGER)
    recipe = (run / "recipe.toml").read_text().partition("\n")[2]
    assert "loggers = []" in recipe
    (run / "recipe.toml").write_text(recipe.replace("loggers = []", 'loggers = ["foreign_logger:Lines"]'))
    environment = read_json(run / "env.json")
    (run / "env.json").write_text(json.dumps(environment | {"code": {"foreign_logger:Lines": "0" * 64}}))
    monkeypatch.setattr(plugins, "_modules", dict(plugins._modules))
    return run


def forget() -> None:
    """Make the next import of the module the first one."""
    sys.modules.pop("foreign_logger", None)
    plugins._modules.pop("foreign_logger", None)
    Path("imported.txt").unlink(missing_ok=True)


def test_a_run_from_elsewhere_imports_no_code(refused: Refused, unmask: Command, foreign: Path) -> None:
    resume = ("pretrain", "--resume", "run", "--budget", "+1 steps")
    for command in (resume, ("report", "run"), ("doctor", "run")):
        says = ("names code", "foreign_logger:Lines", "--allow-code")
        refused(*command, says=says)
    assert unmask("fill", "run", "The [MASK]at")[0] == 0
    assert unmask("runs", ".")[0] == 0
    assert not Path("imported.txt").exists()
    assert unmask(*resume, "--allow-code")[0] == 0
    assert Path("imported.txt").exists()
    forget()
    assert unmask(*resume)[0] == 0, "the permission stays with the run"
    forget()
    (default_cache() / "plugins.key").unlink()
    refused("pretrain", "--resume", "run", "--budget", "+1 steps", says="names code")
    assert not Path("imported.txt").exists()


def test_a_recipe_of_the_command_line_may_import_code(place: Path) -> None:
    (place / "own_logger.py").write_text(LOGGER)
    (place / "own.toml").write_text('extends = "tiny"\n[train]\nloggers = ["own_logger:Lines"]\n')
    assert load_recipe("own.toml").plugins


def test_the_key_is_private(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(place / "cache"))
    plugin = plugins.PluginLoggerConfig("some:Name", None)
    marks = plugins.code_marks([plugin])
    assert marks == plugins.code_marks([plugin]) and plugins.code_marks([]) == {}
    assert os.name == "nt" or (place / "cache" / "plugins.key").stat().st_mode & 0o077 == 0
    monkeypatch.setenv("UNMASK_CACHE", str(place / "other"))
    assert marks != plugins.code_marks([plugin]), "another user makes other marks"
    (place / "cache").chmod(0o700)
    (place / "file").write_text("")
    monkeypatch.setenv("UNMASK_CACHE", str(place / "file"))
    assert plugins.code_marks([plugin]) == {}, "without a cache there is no mark"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes of files")
@pytest.mark.parametrize("change", ["mode", "link", "pipe", "folder", "short"])
def test_a_key_that_others_may_know_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(place / "cache"))
    address = "s3://bucket/run"
    marks, key = plugins.address_marks([address]), place / "cache" / "plugins.key"
    assert plugins.is_marked(address, marks) and list(key.parent.iterdir()) == [key], "no other file is left"
    if change == "mode":
        key.chmod(0o640)
    elif change == "short":
        key.write_bytes(b"")
    else:
        key.rename(place / "moved.key")
        makers: dict[str, Callable[[], object]] = {
            "link": lambda: key.symlink_to(place / "moved.key"),
            "pipe": lambda: os.mkfifo(key, 0o600),
            "folder": key.mkdir,
        }
        makers[change]()
    assert not plugins.is_marked(address, marks), "with the right mark"
    assert not plugins.is_marked("\ud800", {"\ud800": "\ud800"}), "half of a surrogate pair, as JSON may have"
    assert plugins.address_marks([address]) == {}, "and no mark is made with it"


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root gives files to another user")
def test_users_who_share_a_cache_have_keys_of_their_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(place / "cache"))
    address, key = "s3://bucket/run", place / "cache" / "plugins.key"
    others = plugins.address_marks([address])
    os.chown(key, 1234, 1234)
    assert not plugins.is_marked(address, others), "the key of another user is not used, though root can read it"
    own = plugins.address_marks([address])
    assert own != others and plugins.is_marked(address, own)
    assert sorted(path.name for path in key.parent.iterdir()) == ["plugins-0.key", "plugins.key"]
    os.chown(key.with_name("plugins-0.key"), 1234, 1234)
    assert not plugins.is_marked(address, own) and plugins.address_marks([address]) == {}


@pytest.mark.parametrize("name", ["..", "../run", "a" * 300, "a\0b", "."])
def test_a_pointer_names_a_folder_beside_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "latest").write_text(name)
    assert files.read_pointer(tmp_path / "latest") is None


# Names and links ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/passwd", "a/b", "..", ""])
def test_names_of_a_manifest_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.txt").write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("x")
    write_manifest(folder)
    entries = read_json(folder / "digests.json")
    files.write_json(folder / "digests.json", {name: entries["a.txt"]})
    with pytest.raises(DamagedError, match="invalid manifest"):
        verify_manifest(folder)


@pytest.fixture
def model(run: Path, place: Path) -> Path:
    """A folder as transformers saves it."""
    (place / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run / "latest" / name, place / "model")
    return place / "model"


def test_links_of_a_model_folder(model: Path, place: Path) -> None:
    secret = place / "secret"
    secret.write_text("password: 1234")
    for name, error in (("model.safetensors", DamagedError), ("config.json", DamagedError)):
        (model / name).rename(place / name)
        (model / name).symlink_to(secret)
        with pytest.raises(error) as refused:
            open_model(model)
        assert "1234" not in str(refused.value)
        (model / name).unlink()
        (model / name).symlink_to(place / name)  # as in the cache of the Hub
    assert open_model(model).tokenizer.size


def test_a_copied_module_leads_nowhere_else(model: Path, place: Path) -> None:
    (place / "secret").write_text("password: 1234")
    kind = "sentence_transformers.models"
    entries = [{"path": "", "type": f"{kind}.Transformer"}, {"path": "1_Pooling", "type": f"{kind}.Pooling"}]
    (model / "modules.json").write_text(json.dumps(entries))
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").symlink_to(place / "secret")
    with pytest.raises(ModelError, match="leads out of the folder"):
        import_model(model, place / "out")
    assert not (place / "out").exists()
    snapshot, blobs = place / "hub" / "snapshots" / "abc", place / "hub" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    model.rename(snapshot)
    (snapshot / "1_Pooling" / "config.json").unlink()
    (blobs / "0").write_text("{}")
    (snapshot / "1_Pooling" / "config.json").symlink_to(Path("../../../blobs/0"))
    import_model(snapshot, place / "out")
    assert (place / "out" / "1_Pooling" / "config.json").read_text() == "{}"


# Sizes ----------------------------------------------------------------------------------------------------------------


def enlarge(path: Path, size: int) -> None:
    """Make a file larger without writing its bytes."""
    with path.open("r+b") as file:
        file.truncate(size)


def test_sizes_are_bounded(model: Path, place: Path) -> None:
    for name, limit in (("config.json", files.MAX_CONFIG_BYTES), ("tokenizer.json", files.MAX_TOKENIZER_BYTES)):
        before = (model / name).read_bytes()
        enlarge(model / name, limit + 1)
        with pytest.raises(DamagedError, match=rf"too large.*at most {limit:,}"):
            Tokenizer.load(model) if name == "tokenizer.json" else open_model(model)
        (model / name).write_bytes(before)
    weights = model / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes((1 << 40).to_bytes(8, "little") + before[8:])
    with pytest.raises(DamagedError, match="header would have 1,099,511,627,776 bytes"):
        open_model(model)
    weights.write_bytes(before)
    enlarge(place / "small.toml", files.MAX_RECIPE_BYTES + 1)
    with pytest.raises(RecipeError, match="too large"):
        load_recipe("small.toml")
    write_manifest(model)
    enlarge(model / "digests.json", files.MAX_MANIFEST_BYTES + 1)
    with pytest.raises(DamagedError, match="too large"):
        load(model)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("hidden_size", 1 << 20, "the weights don't match config.json"),
        ("vocab_size", 1 << 30, "the weights don't match config.json"),
        ("intermediate_size", 1 << 30, "the weights don't match config.json"),
        ("num_hidden_layers", 1 << 30, "invalid num_hidden_layers"),
        ("max_position_embeddings", 1 << 30, "invalid max_position_embeddings"),
    ],
)
def test_a_config_that_claims_terabytes(model: Path, key: str, value: int, says: str) -> None:
    config = read_json(model / "config.json") | {key: value}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=says):
        open_model(model)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_a_pipe_is_not_read(model: Path) -> None:
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    with pytest.raises(DamagedError, match="a device or a pipe"):
        read_json(model / "config.json")
