"""`unmask recipe show` says how large a recipe's model is, and what it prints is a recipe still."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from unmask.models import flops_per_token, parameters
from unmask.tokenization.settings import WordPieceConfig
from unmask.tokenization.tokenizer import train_tokenizer
from unmask.training.recipe import load_recipe

Command = Callable[..., tuple[int, str, str]]


def size_of(unmask: Command, *arguments: str) -> dict[str, object]:
    code, out, err = unmask("recipe", "show", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)["size"]


def test_what_is_shown_is_a_recipe_below_comments(unmask: Command) -> None:
    code, out, _ = unmask("recipe", "show", "bert-mini")
    first, *stages = [line for line in out.splitlines() if line.startswith("#")]
    assert code == 0 and out.startswith("# 11,201,594 parameters")
    assert "with 30,522 pieces (data.tokenizer.vocab_size)" in first and "without the token table" in first
    assert [line.partition(":")[0] for line in stages] == ["# stage 0, texts of 128", "# stage 1, texts of 512"]
    assert all("FLOPs per training token" in line for line in stages)
    Path("bert-mini-of-mine.toml").write_text(out)
    mine, shipped = load_recipe("bert-mini-of-mine.toml"), load_recipe("bert-mini")
    assert (mine.model, mine.stage, mine.data, mine.train) == (
        shipped.model, shipped.stage, shipped.data, shipped.train,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["bert-base", "modern-base"])
def test_the_size_for_programs(unmask: Command, name: str) -> None:
    recipe = load_recipe(name)
    pieces = {"bert-base": 30_522, "modern-base": 50_368}[name]
    size = size_of(unmask, name)
    assert size["vocabulary"] == pieces
    assert size["parameters"] == parameters(recipe.model, pieces)
    assert size["parameters_beside_the_table"] == parameters(recipe.model, pieces) - 768 * pieces
    rate = recipe.objective.masked_fraction
    assert size["stage"] == [
        {"length": stage.max_seq_len, "flops_per_token": flops_per_token(recipe.model, pieces, stage.max_seq_len, rate)}
        for stage in recipe.stage
    ]


def test_the_sizes_are_those_of_the_papers(unmask: Command) -> None:
    """Without the pooler, which training on masks alone lacks; with it BERT-base has the 110M that the paper names."""

    def millions(name: str) -> float:
        return round(float(str(size_of(unmask, name)["parameters"])) / 1e6, 1)

    assert {name: millions(f"bert-{name}") for name in ("tiny", "mini", "small", "medium", "base")} == {
        "tiny": 4.4, "mini": 11.2, "small": 28.8, "medium": 41.4, "base": 109.5,
    }  # fmt: skip
    assert millions("modern-base") == 149.7


def test_a_vocabulary_that_only_the_text_decides(unmask: Command, tmp_path: Path) -> None:
    seed = size_of(unmask, "seed")
    assert seed["vocabulary"] == 100 and "the text decides" in str(seed["vocabulary_from"])
    per_piece = 2 * 128 + 1  # a row of the table, a row of the decoder and its bias
    assert seed["parameters_per_piece"] == per_piece
    assert seed["parameters"] == 812_355 + (100 - 67) * per_piece
    assert "257 for each one more" in unmask("recipe", "show", "seed")[1].partition("\n")[0]
    assert size_of(unmask, "tiny", "--set", "data.tokenizer.kind=bytes")["vocabulary"] == 261

    tokenizer = train_tokenizer(["the cat sat on the mat"] * 9, WordPieceConfig(vocab_size=25))
    tokenizer.save(tmp_path)
    here = size_of(unmask, "tiny", "--set", f"data.tokenizer={{kind = 'file', path = '{tmp_path / 'tokenizer.json'}'}}")
    assert here["vocabulary"] == 25
    gone = size_of(unmask, "tiny", "--set", "data.tokenizer={kind = 'file', path = 'gone.json'}")
    assert "assumed" in str(gone["vocabulary_from"]) and "gone.json" in str(gone["vocabulary_from"])
