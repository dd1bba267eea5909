"""Recipes: quantities, merging, validation, and the round trip through TOML."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.core.config import apply_set, build_config, dump_config, load_toml, merge, resolve_recipe, shipped_recipes
from unmask.core.errors import RecipeError
from unmask.core.quantities import Fraction, Quantity


@dataclass(frozen=True)
class Hash:
    kind: Literal["hash"] = "hash"
    share: Fraction = Fraction(0.01)
    max_size: Quantity = Quantity(2e6, "characters")


@dataclass(frozen=True)
class Tail:
    kind: Literal["tail"] = "tail"
    share: Fraction = Fraction(0.1)


@dataclass(frozen=True)
class Stage:
    until: Fraction = Fraction(1.0)
    length: int = 128

    def __post_init__(self) -> None:
        if self.length < 1:
            raise RecipeError("a stage is at least one token long", hint="give a length")


@dataclass(frozen=True)
class Text:
    words: Literal["spaces", "characters"] = "spaces"
    held_out: Hash | Tail = field(default_factory=Hash)
    folder: Path = Path("shards")


@dataclass(frozen=True)
class Sample:
    name: str
    seed: int = 0
    bf16: bool = False
    rate: float = 0.3
    betas: tuple[float, float] = (0.9, 0.95)
    save: Fraction | Quantity = Quantity(600.0, "seconds")
    text: Text = field(default_factory=Text)
    stage: tuple[Stage, ...] = (Stage(),)
    weights: dict[str, float] = field(default_factory=dict[str, float])
    note: str | None = None


WHERE = "my.toml"


def refusal(tree: dict[str, Any], sets: tuple[str, ...] = ()) -> str:
    with pytest.raises(RecipeError) as caught:
        build_config(Sample, {"name": "x"} | tree, WHERE, sets)
    return str(caught.value)


# Fractions and quantities


@pytest.mark.parametrize(
    ("text", "number", "unit", "again"),
    [
        ("300 s", 300, "seconds", "300 s"),
        ("10 minutes", 600, "seconds", "10 min"),
        ("30min", 1800, "seconds", "30 min"),
        ("1.5 h", 5400, "seconds", "90 min"),
        ("2 hours", 7200, "seconds", "2 h"),
        ("64k tokens", 64_000, "tokens", "64k tokens"),
        ("2B tokens", 2_000_000_000, "tokens", "2B tokens"),
        ("65_536 tokens", 65_536, "tokens", "65536 tokens"),
        ("1.5M characters", 1_500_000, "characters", "1.5M characters"),
        ("1.5 epochs", 1.5, "epochs", "1.5 epochs"),
        ("1 step", 1, "steps", "1 step"),
        ("8 texts", 8, "texts", "8 texts"),
    ],
)
def test_quantities_are_parsed_and_written(text: str, number: float, unit: str, again: str) -> None:
    amount = Quantity.parse(text)
    assert (amount.number, amount.unit, str(amount)) == (number, unit, again)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("300", "needs a unit: 300 s, 120 steps, 2M tokens or 3 epochs"),
        ("2M", "needs a unit"),
        ("5 tokns", "did you mean `tokens`?"),
        ("5 parsecs", "unknown unit `parsecs`"),
        ("64ktokens", "unknown unit `ktokens`"),
        ("many", "is not a quantity"),
        ("-3 steps", "is not a quantity"),
        ("+1 epoch", "--resume"),
        ("1e400 s", "too large"),
    ],
)
def test_invalid_quantities_are_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Quantity.parse(text)
    assert message in str(caught.value)


def test_a_plus_makes_a_relative_quantity_if_allowed() -> None:
    amount = Quantity.parse("+1 epoch", relative=True)
    assert amount == Quantity(1.0, "epochs", relative=True)
    assert str(amount) == "+1 epoch"
    assert not Quantity.parse("1 epoch", relative=True).relative


def test_a_quantity_with_another_unit_is_refused() -> None:
    assert Quantity.parse("8 texts").require("tokens", "texts").number == 8
    with pytest.raises(RecipeError, match="`10 s` is not a number of tokens or texts"):
        Quantity.parse("10 s").require("tokens", "texts")


@given(st.floats(0, 1))
def test_a_fraction_reads_back(fraction: float) -> None:
    assert Fraction.parse(str(Fraction(fraction))) == Fraction(fraction)


@given(st.floats(0, 1e300), st.sampled_from(["seconds", "steps", "tokens", "epochs", "texts", "characters"]))
def test_a_quantity_reads_back(number: float, unit: str) -> None:
    assert Quantity.parse(str(Quantity(number, unit))) == Quantity(number, unit)


@pytest.mark.parametrize("text", ["60", "101%", "-1%", "half"])
def test_invalid_fractions_are_refused(text: str) -> None:
    assert str(Fraction.parse("60 %")) == "60%"
    with pytest.raises(RecipeError):
        Fraction.parse(text)


# Files


def test_a_syntax_error_names_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("seed = 1\nrate = = 2\n")
    with pytest.raises(RecipeError, match=r"bad\.toml, line 2"):
        load_toml(file)
    file.write_text("seed = 1\nstage = [")
    with pytest.raises(RecipeError, match=r"bad\.toml, line 2"):
        load_toml(file)
    file.write_bytes(b"name = '\xff'")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_toml(file)


def test_extends_is_followed_through_files_and_shipped_recipes(tmp_path: Path) -> None:
    shipped, mine = tmp_path / "shipped", tmp_path / "mine"
    shipped.mkdir()
    mine.mkdir()
    (shipped / "tiny.toml").write_text('seed = 1\n[text]\nwords = "spaces"\n[[stage]]\nlength = 1\n[[stage]]\n')
    (shipped / "small.toml").write_text('extends = "tiny"\nrate = 0.2\n')
    (mine / "own.toml").write_text('extends = "small"\nseed = 2\n[[stage]]\nlength = 9\n')
    (mine / "last.toml").write_text('extends = "own.toml"\n[text]\nfolder = "f"\n')
    whole = resolve_recipe(mine / "last.toml", shipped=shipped)
    assert whole == {"seed": 2, "rate": 0.2, "text": {"words": "spaces", "folder": "f"}, "stage": [{"length": 9}]}
    assert resolve_recipe("tiny", shipped=shipped)["seed"] == 1
    with pytest.raises(RecipeError, match="did you mean `small`") as caught:
        resolve_recipe("smal", shipped=shipped)
    assert "small, tiny" in str(caught.value)
    (mine / "own.toml").write_text('extends = "last.toml"')
    with pytest.raises(RecipeError, match=r"last\.toml -> own\.toml -> last\.toml"):
        resolve_recipe(mine / "last.toml", shipped=shipped)
    (mine / "own.toml").write_text("extends = 3")
    with pytest.raises(RecipeError, match="got 3, expected the name of one recipe"):
        resolve_recipe(mine / "own.toml", shipped=shipped)


def test_shipped_recipes_resolve() -> None:
    assert shipped_recipes() == sorted(shipped_recipes())
    for name in shipped_recipes():
        assert "extends" not in resolve_recipe(name)


def test_merge_updates_tables_and_replaces_lists() -> None:
    base = {"a": {"kind": "x", "old": 1}, "list": [1, 2], "b": {"c": 1, "d": {"e": 2}}}
    over = {"a": {"kind": "y", "new": 2}, "list": [3], "b": {"d": {"f": 3}}}
    merged = {"a": {"kind": "y", "old": 1, "new": 2}, "list": [3], "b": {"c": 1, "d": {"e": 2, "f": 3}}}
    assert merge(base, over) == merged
    assert merge(base, {"a": {"kind": "x", "new": 2}})["a"] == {"kind": "x", "old": 1, "new": 2}
    assert base["list"] == [1, 2], "merge does not change its arguments"


# Kinds


def held_out(*layers: dict[str, Any], sets: tuple[str, ...] = ()) -> Hash | Tail:
    """Build `text.held_out` from layers, the lowest first, and --set texts."""
    tree: dict[str, Any] = {"name": "x"}
    for layer in layers:
        tree = merge(tree, {"text": {"held_out": layer}})
    for text in sets:
        tree = apply_set(tree, text)
    return build_config(Sample, tree, WHERE, sets).text.held_out


HASH = {"kind": "hash", "share": "3%", "max_size": "5 characters"}
AS_HASH = Hash(share=Fraction(0.03), max_size=Quantity(5, "characters"))


@pytest.mark.parametrize(
    ("layers", "sets", "expected"),
    [
        # Keys of the former kind in a lower layer are dropped; keys of both kinds stay.
        ([HASH, {"kind": "tail"}], (), Tail(share=Fraction(0.03))),
        ([HASH], ("text.held_out.kind=tail",), Tail(share=Fraction(0.03))),
        ([HASH], ('text={held_out={kind="tail"}}',), Tail(share=Fraction(0.03))),
        ([HASH, {"kind": "tail"}, {"kind": "tail", "share": "4%"}], (), Tail(share=Fraction(0.04))),
        ([{"max_size": "5 characters"}, {"kind": "tail"}], (), Tail()),
        ([HASH, {"kind": "tail"}], ("seed=2",), Tail(share=Fraction(0.03))),
        # Back to the first kind with --set: the recipe's keys for it apply.
        ([HASH], ("text.held_out.kind=tail", "text.held_out.kind=hash"), AS_HASH),
        # The same kind once more changes nothing.
        ([HASH, {"kind": "hash"}], (), AS_HASH),
    ],
)
def test_a_changed_kind_drops_keys_of_the_former_kind(
    layers: list[dict[str, Any]], sets: tuple[str, ...], expected: Hash | Tail
) -> None:
    assert held_out(*layers, sets=sets) == expected


@pytest.mark.parametrize(
    ("layers", "sets"),
    [
        ([{"kind": "tail", "max_size": "5 characters"}], ()),
        ([HASH, {"kind": "tail", "max_size": "6 characters"}], ()),
        ([HASH, {"kind": "tail"}, {"max_size": "6 characters"}], ()),
        ([HASH], ("text.held_out.kind=tail", "text.held_out.max_size=6 characters")),
        ([HASH], ("text.held_out.max_size=6 characters", "text.held_out.kind=tail")),
        ([HASH, {"kind": "tail"}], ("text.held_out.max_size=6 characters",)),
        ([HASH], ('text.held_out={kind="tail", max_size="6 characters"}',)),
        ([{"kind": "tail", "max_size": "5 characters"}, {"kind": "tail"}], ()),
    ],
)
def test_keys_set_with_a_kind_must_belong_to_it(layers: list[dict[str, Any]], sets: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError, match="unknown key `max_size` of kind `tail`"):
        held_out(*layers, sets=sets)


def test_keys_of_no_kind_are_refused_in_every_layer() -> None:
    with pytest.raises(RecipeError, match="unknown key `shrae` of kind `tail`: did you mean `share`"):
        held_out({"kind": "hash", "shrae": "3%"}, {"kind": "tail"})


def test_a_kind_that_is_a_plain_choice_drops_no_key() -> None:
    @dataclass(frozen=True)
    class Schedule:
        kind: Literal["stable", "cosine"] = "stable"
        warmup: Fraction = Fraction(0.02)

    tree = merge({"kind": "stable", "warmup": "0.1%"}, {"kind": "cosine"})
    assert build_config(Schedule, tree, WHERE) == Schedule("cosine", Fraction(0.001))
    tree = apply_set(apply_set({}, "warmup=3%"), "kind=cosine")
    assert build_config(Schedule, tree, WHERE) == Schedule("cosine", Fraction(0.03))


# --set


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.every.save=20 steps", {"train": {"every": {"save": "20 steps"}}}),
        ("seed = 17", {"seed": 17}),
        ("rate=0.5", {"rate": 0.5}),
        ("bf16=true", {"bf16": True}),
        ("name=a = b", {"name": "a = b"}),
        ("name=", {"name": ""}),
        ('text={words="spaces"}', {"text": {"words": "spaces"}}),
        ("betas=[1, 2]", {"betas": [1, 2]}),
    ],
)
def test_set_parses_toml_or_takes_a_string(text: str, expected: dict[str, Any]) -> None:
    assert apply_set({}, text) == expected


def test_set_reaches_into_lists_and_tables() -> None:
    tree = {
        "stage": [{"length": 1, "until": "60%"}, {"length": 2}],
        "text": {"held_out": {"kind": "hash", "max_size": "x"}},
    }
    assert apply_set(tree, "stage.1.length=256")["stage"] == [tree["stage"][0], {"length": 256}]
    assert apply_set(tree, "text.held_out.kind=tail")["text"] == {"held_out": {"kind": "tail", "max_size": "x"}}
    assert tree["stage"][1] == {"length": 2}, "apply_set does not change its argument"
    for text, message in {
        "stage.2.length=3": "2 entries, counted from 0",
        "stage.one.length=3": "no `stage.one`",
        "stage.1.length.x=3": "not a table: it has no key `x`",
        "plan.0.x=3": "no list `plan`",
        "seed": "expected key=value with a dotted key",
        "a..b=1": "expected key=value with a dotted key",
    }.items():
        with pytest.raises(RecipeError) as caught:
            apply_set(tree, text)
        assert message in str(caught.value)
        assert f"--set {text}" in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "have", "hint"),
    [
        ([], "`stage` has no entries", "set the whole list: stage=[...]"),
        ([{}], "`stage` has one entry, which is number 0", "set stage.0, or the whole list: stage=[...]"),
        ([{}, {}, {}], "`stage` has 3 entries, counted from 0", "set one of stage.0 to stage.2"),
    ],
)
def test_a_missing_list_entry_is_reported(entries: list[dict[str, Any]], have: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        apply_set({"stage": entries}, "stage.3.length=8")
    assert caught.value.message == f"there is no `stage.3`: {have}" and caught.value.hint == hint


# Validation


def test_a_whole_recipe_is_built() -> None:
    tree = tomllib.loads("""
        name = "mine"
        rate = 1
        save = "5%"
        betas = [0, 0.5]
        weights = { mlm = 1, pair = 0.5 }
        text = { words = "characters", held_out = { kind = "tail", share = "10%" } }
        [[stage]]
        until = "60%"
        [[stage]]
        length = 512
    """)
    built = build_config(Sample, tree, WHERE)
    assert built == Sample(
        name="mine",
        rate=1.0,
        save=Fraction(0.05),
        betas=(0.0, 0.5),
        weights={"mlm": 1.0, "pair": 0.5},
        text=Text(words="characters", held_out=Tail(share=Fraction(0.1))),
        stage=(Stage(until=Fraction(0.6)), Stage(length=512)),
    )
    assert isinstance(built.rate, float)


def test_without_a_kind_the_first_of_a_union_is_built() -> None:
    assert build_config(Sample, {"name": "x", "text": {"held_out": {"share": "2%"}}}, WHERE).text.held_out == Hash(
        share=Fraction(0.02)
    )


@pytest.mark.parametrize(
    ("tree", "messages"),
    [
        ({"sed": 1}, ["unknown key `sed`: did you mean `seed`?", "my.toml: sed"]),
        ({"zzz": 1}, ["unknown key `zzz`\n", "use one of these keys: name, seed, bf16"]),
        ({"seed": "1"}, ['invalid seed: got "1", expected an integer', "my.toml: seed"]),
        ({"seed": True}, ["got true, expected an integer"]),
        ({"seed": 1.5}, ["got 1.5, expected an integer"]),
        ({"bf16": 1}, ["got 1, expected true or false"]),
        ({"rate": True}, ["got true, expected a number"]),
        ({"rate": float("nan")}, ["got nan, expected a number"]),
        ({"name": 3}, ["got 3, expected a string"]),
        ({"betas": [0.1]}, ["got a list of 1, expected a list of 2", "my.toml: betas"]),
        ({"betas": [0.1, "x"]}, ['invalid betas.1: got "x", expected a number', "my.toml: betas.1"]),
        ({"stage": {"length": 3}}, ["invalid stage: got a table, expected a list"]),
        ({"stage": [{}, {"lenght": 3}]}, ["did you mean `length`?", "my.toml: stage.1.lenght"]),
        ({"stage": [{"length": 0}]}, ["at least one token", "my.toml: stage.0", "give a length"]),
        ({"stage": [{"until": 60}]}, ["got 60, expected a percentage", "stage.0.until"]),
        ({"text": 3}, ["got 3, expected a table"]),
        ({"text": {"words": "space"}}, ['unknown choice "space": did you mean "spaces"?', '"spaces", "characters"']),
        ({"text": {"held_out": {"kind": "tial"}}}, ['did you mean "tail"?', "text.held_out.kind"]),
        ({"text": {"held_out": {"kind": "tail", "max_size": "3 texts"}}}, ["unknown key `max_size` of kind `tail`"]),
        ({"text": {"held_out": "hash"}}, ['got "hash", expected a table']),
        ({"save": "10"}, ["needs a unit", "my.toml: save"]),
        ({"save": 10}, ['got 10, expected a percentage such as "60%" or a quantity']),
        ({"save": "101%"}, ["got 101%, expected 0% to 100%"]),
        ({"weights": {"mlm": "x"}}, ['got "x", expected a number', "weights.mlm"]),
    ],
)
def test_errors_name_the_value_and_a_hint(tree: dict[str, Any], messages: list[str]) -> None:
    text = refusal(tree)
    for message in messages:
        assert message in text


def test_a_missing_key_is_named() -> None:
    with pytest.raises(RecipeError, match="`name` is missing"):
        build_config(Sample, {}, WHERE)


def test_an_error_of_set_names_its_option() -> None:
    sets = ("seed=2", "stage.0.length=0")
    assert "--set stage.0.length=0: stage.0.length" in refusal({"stage": [{"length": "x"}]}, sets)
    assert "my.toml: rate" in refusal({"rate": "x"}, sets)


def test_an_error_of_an_option_names_the_option() -> None:
    flags = {"seed": "--seed x", "stage": "--stage 3"}
    for tree, where in (({"seed": "x"}, "--seed x"), ({"stage": 3}, "--stage 3"), ({"rate": "x"}, "my.toml: rate")):
        with pytest.raises(RecipeError) as caught:
            build_config(Sample, {"name": "x"} | tree, WHERE, ("seed=2", "stage=[]"), flags)
        assert caught.value.location == where


# The round trip

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
floats = st.floats(allow_nan=False)
shares = st.builds(Fraction, st.floats(0, 1))
amounts = st.builds(Quantity, st.floats(0, 1e12), st.sampled_from(["seconds", "tokens", "steps"]))
samples = st.builds(
    Sample,
    name=names,
    seed=st.integers(),
    bf16=st.booleans(),
    rate=floats,
    betas=st.tuples(floats, floats),
    save=st.one_of(shares, amounts),
    text=st.builds(
        Text,
        words=st.sampled_from(["spaces", "characters"]),
        held_out=st.one_of(st.builds(Hash, share=shares, max_size=amounts), st.builds(Tail, share=shares)),
    ),
    stage=st.lists(st.builds(Stage, until=shares, length=st.integers(1, 4096)), max_size=3).map(tuple),
    weights=st.dictionaries(names, floats, max_size=3),
    note=st.one_of(st.none(), names),
)


@given(samples)
def test_a_dumped_config_builds_the_same(sample: Sample) -> None:
    assert build_config(Sample, tomllib.loads(dump_config(sample)), WHERE) == sample


def test_a_dump_has_every_value() -> None:
    written = tomllib.loads(dump_config(Sample(name="x")))
    assert written["text"]["held_out"] == {"kind": "hash", "share": "1%", "max_size": "2M characters"}
    assert written["save"] == "10 min"
    assert set(written) == {"name", "seed", "bf16", "rate", "betas", "save", "text", "stage", "weights"}


def test_recipes_are_read_without_torch() -> None:
    script = "import sys, unmask.core.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
