"""`unmask recipe show` prints the size of the model, and its output is a valid recipe."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from unmask.core.config import shipped_recipes
from unmask.core.reference import reference
from unmask.models import flops_per_token, num_parameters
from unmask.tokenization.settings import WordPieceConfig
from unmask.tokenization.tokenizer import train_tokenizer
from unmask.training.recipe import Recipe, load_recipe

Command = Callable[..., tuple[int, str, str]]


def size_of(unmask: Command, *arguments: str) -> dict[str, object]:
    code, out, err = unmask("recipe", "show", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)["size"]


def test_the_output_is_a_recipe_with_comments(unmask: Command) -> None:
    code, out, _ = unmask("recipe", "show", "bert-mini")
    first, *stages = out.partition("\n\n")[0].splitlines()
    assert code == 0 and out.startswith("# 11,201,594 parameters")
    assert "for 30,522 tokens (data.tokenizer.vocab_size)" in first and "without the token embedding" in first
    assert [line.partition(":")[0] for line in stages] == ["# stage 0, sequences of 128", "# stage 1, sequences of 512"]
    assert all("FLOPs per training token" in line for line in stages)
    Path("bert-mini-of-mine.toml").write_text(out)
    mine, shipped = load_recipe("bert-mini-of-mine.toml"), load_recipe("bert-mini")
    assert (mine.model, mine.stage, mine.data, mine.train) == (
        shipped.model, shipped.stage, shipped.data, shipped.train,
    )  # fmt: skip


@pytest.mark.parametrize("name", [*shipped_recipes(), "logged.toml"])
def test_the_comments_change_nothing(unmask: Command, name: str) -> None:
    Path("logged.toml").write_text(
        'extends = "bert-mini-pairs"\n[data]\nvalid = { news = "news.txt" }\n[train]\nloggers = ["tensorboard"]\n'
        '[preview]\nprompts = ["[a]\\nb # [MASK]"]\n[data.tokenizer]\nkind = "unigram"\n'
    )
    code, out, _ = unmask("recipe", "show", name, "--set", "seed=3")
    assert code == 0 and "seed = 3  # Seed of initial weights, order of samples, masks and dropout.\n" in out
    plain = unmask("recipe", "show", name, "--set", "seed=3", "--plain")[1]
    assert "#" not in plain.replace("b # [MASK]", "") and tomllib.loads(out) == tomllib.loads(plain)
    comments = [line for line in out.partition("\n\n")[2].splitlines() if line.startswith("#")]
    assert max(map(len, comments)) <= 100
    Path("mine.toml").write_text(out)
    assert load_recipe("mine.toml") == load_recipe(name, ["seed=3"])


def test_the_settings_of_a_plugin_have_comments(unmask: Command, tmp_path: Path) -> None:
    (tmp_path / "described.py").write_text(
        "from dataclasses import dataclass\n\n\nclass Rows:\n    @dataclass(frozen=True)\n    class Settings:\n"
        "        width: int = 3  # [tokens] Width of a row.\n        plain: int = 4\n\n"
        "    def count(self): ...\n\n    def spec(self): ...\n"
    )
    code, out, err = unmask("recipe", "show", "tiny", "--set", "data.sampler.kind=described:Rows")
    assert code == 0, err
    assert "width = 3  # [tokens] Width of a row.\nplain = 4\n" in out


def test_every_key_is_described() -> None:
    sections = reference(Recipe)
    undescribed = [line for line in sections.splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert not undescribed, "write a comment at the field"
    for key in ("lr", "vocab_size", "max_ngram", "global_rope_theta", "until", "num_new_tokens"):
        assert f"| `{key}` |" in sections
    assert '## `[data.tokenizer]` with `kind = "extended"`' in sections and "## `[[stage]]`" in sections


def test_the_page_is_up_to_date(unmask: Command) -> None:
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    code, out, _ = unmask("recipe", "reference")
    assert code == 0
    assert page.read_text(encoding="utf-8") == out, "write it anew: unmask recipe reference > docs/recipes.md"


@pytest.mark.parametrize("name", ["bert-base", "modern-base"])
def test_the_size_for_programs(unmask: Command, name: str) -> None:
    recipe = load_recipe(name)
    vocab_size = {"bert-base": 30_522, "modern-base": 50_368}[name]
    size = size_of(unmask, name)
    assert size["vocab_size"] == vocab_size
    assert size["parameters"] == num_parameters(recipe.model, vocab_size)
    assert size["non_embedding_parameters"] == num_parameters(recipe.model, vocab_size) - 768 * vocab_size
    rate = recipe.objective.masked_fraction
    assert size["stage"] == [
        {
            "max_seq_len": stage.max_seq_len,
            "flops_per_token": flops_per_token(recipe.model, vocab_size, stage.max_seq_len, rate),
        }
        for stage in recipe.stage
    ]


def test_the_sizes_are_those_of_the_papers(unmask: Command) -> None:
    """Without the pooler, which masked-language modeling doesn't use; with it BERT-base has the 110M of the paper."""

    def millions(name: str) -> float:
        return round(float(str(size_of(unmask, name)["parameters"])) / 1e6, 1)

    assert {name: millions(f"bert-{name}") for name in ("tiny", "mini", "small", "medium", "base")} == {
        "tiny": 4.4, "mini": 11.2, "small": 28.8, "medium": 41.4, "base": 109.5,
    }  # fmt: skip
    assert millions("modern-base") == 149.7


def test_a_vocabulary_that_depends_on_the_text(unmask: Command, tmp_path: Path) -> None:
    seed = size_of(unmask, "seed")
    assert seed["vocab_size"] == 100 and "depends on the text" in str(seed["vocab_size_from"])
    per_token = 2 * 128 + 1  # its embedding, its weights in the decoder and a bias
    assert seed["parameters_per_token"] == per_token
    assert seed["parameters"] == 812_355 + (100 - 67) * per_token
    assert "257 for each further token" in unmask("recipe", "show", "seed")[1].partition("\n")[0]
    assert size_of(unmask, "tiny", "--set", "data.tokenizer.kind=bytes")["vocab_size"] == 261

    tokenizer = train_tokenizer(["the cat sat on the mat"] * 9, WordPieceConfig(vocab_size=25))
    tokenizer.save(tmp_path)
    readable = size_of(
        unmask, "tiny", "--set", f"data.tokenizer={{kind = 'file', path = '{tmp_path / 'tokenizer.json'}'}}"
    )
    assert readable["vocab_size"] == 25
    missing = size_of(unmask, "tiny", "--set", "data.tokenizer={kind = 'file', path = 'gone.json'}")
    assert "assumed" in str(missing["vocab_size_from"]) and "gone.json" in str(missing["vocab_size_from"])
