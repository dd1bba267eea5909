"""`unmask generate`, and joint filling with `unmask fill`: output in pipes and terminals, JSON, and bad input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]


def succeed(unmask: Command, *arguments: str) -> str:
    code, out, err = unmask(*arguments)
    assert code == 0, err
    return out


@pytest.fixture
def in_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output is written as to a terminal with colors."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def change_card(run: Path, **facts: str) -> None:
    """Change card.json of the best model, whose digests are then left out."""
    (run / "best" / "digests.json").unlink()
    card = run / "best" / "card.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), **facts}))


# generate ------------------------------------------------------------------------------------------------------------


def test_each_text_is_a_line(unmask: Command, run: Path) -> None:
    arguments = ("generate", str(run), "The cat ", "--suffix", " log.", "--length", "6", "--num", "3")
    lines = succeed(unmask, *arguments).splitlines()
    assert len(lines) == 3 and len(set(lines)) == 3
    assert all(line.startswith("The cat ") and line.endswith(" log.") and len(line) == 19 for line in lines)
    assert succeed(unmask, *arguments).splitlines() == lines
    assert succeed(unmask, *arguments, "--seed", "1").splitlines() != lines


def test_json_has_the_steps(unmask: Command, run: Path) -> None:
    options = ("--length", "6", "--steps", "3", "--order", "gibbs", "--sweeps", "2", "--num", "2")
    found = json.loads(succeed(unmask, "generate", str(run), "The ", *options, "--json"))
    assert [set(one) for one in found] == [
        {"text", "prefix", "suffix", "ids", "tokens", "log_probability", "steps"}
    ] * 2
    for one in found:
        assert one["text"] == "The " + "".join(one["tokens"]) and len(one["steps"]) == 9
        assert one["log_probability"] < 0
        assert sum(len(step["positions"]) for step in one["steps"]) == 18
    assert succeed(unmask, "generate", str(run), "The ", *options).splitlines() == [one["text"] for one in found]


def test_steps_are_lines_in_a_pipe(unmask: Command, run: Path) -> None:
    out = succeed(unmask, "generate", str(run), "The ", "--length", "4", "--schedule", "linear", "--show-steps")
    *steps, last = out.splitlines()
    assert [line[:8] for line in steps] == [f"step {number}  " for number in (1, 2, 3, 4)]
    assert [line[8:].count("_") for line in steps] == [3, 2, 1, 0]
    assert steps[-1][8:] == last and last.startswith("The ")


@pytest.mark.usefixtures("in_terminal")
def test_new_tokens_are_colored_in_a_terminal(unmask: Command, run: Path) -> None:
    options = ("--length", "5", "--steps", "2", "--show-steps", "--num", "2")
    out = succeed(unmask, "generate", str(run), "The ", *options)
    assert len(re.findall(r"\x1b\[1;32m", out)) >= 4, "new tokens are bold green"
    lines = plain(out).splitlines()
    assert [line.split()[0] for line in lines] == ["1/2", "step", "step", "The", "2/2", "step", "step", "The"]
    assert re.fullmatch(r"1/2  log-probability -\d+\.\d\d, -\d+\.\d\d per token", lines[0])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--length", "31"), ("31 tokens can't be generated", "context of the model is 32", "reduce --length to 30")),
        (("--length", "0"), "invalid --length: got 0"),
        (("--num", "0"), "invalid --num: got 0"),
        (("--suffix", "\udcff"), "text is not UTF-8"),
        (("--temperature", "0"), "invalid --temperature: got 0.0, expected a number above 0"),
        (("--temperature", "nan"), "invalid --temperature: got nan"),
        (("--top-p", "0"), "invalid --top-p: got 0.0, expected above 0 and at most 1"),
        (("--top-p", "1.01"), "invalid --top-p: got 1.01"),
        (("--top-k", "0"), "invalid --top-k: got 0"),
        (("--steps", "21"), "invalid --steps: got 21, expected 1 to 20"),
        (("--sweeps", "2"), ("only the order 'gibbs' has --sweeps", '--order "gibbs"')),
        (("a [MASK]",), "the prefix contains [MASK]"),
    ],
)
def test_invalid_options_are_named(refused: Refused, run: Path, options: tuple[str, ...], says: str) -> None:
    refused("generate", str(run), *options, says=says)


@pytest.mark.parametrize("objective", ["causal", "rtd"])
def test_a_model_without_masked_predictions_is_refused(
    unmask: Command, refused: Refused, run: Path, objective: str
) -> None:
    change_card(run, objective=objective)
    if objective == "rtd":
        refused("generate", str(run), says=("this model can't generate text", "'rtd'", "objective.kind=mlm"))
    else:  # it continues a text
        assert succeed(unmask, "generate", str(run), "The ", "--length", "4").startswith("The ")
        refused("generate", str(run), "--suffix", "a", says=("a causal model generates from left to right", "--suffix"))
    refused("fill", str(run), "a [MASK]", says=("this model can't fill masks", f"'{objective}'"))
    refused("fill", str(run), "a [MASK]", "--joint", "beam", says=("this model can't fill masks", f"'{objective}'"))


def test_a_model_without_a_mask_token_is_refused(refused: Refused, run: Path) -> None:
    (run / "best" / "digests.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = run / "best" / name
        file.write_text(file.read_text().replace("[MASK]", "[GAP]").replace('"mask_token"', '"gap_token"'))
    refused("generate", str(run), says="this tokenizer has no mask token")
    refused("fill", str(run), "a [MASK]", "--joint", "beam", says="this tokenizer has no mask token")


# fill --joint --------------------------------------------------------------------------------------------------------


def test_joint_fillings_are_lines_in_a_pipe(unmask: Command, run: Path) -> None:
    for method in ("beam", "best-first"):
        out = succeed(unmask, "fill", str(run), "The [MASK]*3 sat on [MASK].", "--joint", method, "--top", "4")
        text, *lines, empty = out.splitlines()
        assert text == "The [MASK]*3 sat on [MASK]." and empty == "" and len(lines) == 4
        scores = [float(line.split()[0]) for line in lines]
        assert scores == sorted(scores, reverse=True) and scores[0] < 0
        assert all(re.fullmatch(r" +-\d+\.\d\d  The ... sat on .\.", line) for line in lines)


def test_joint_json_has_tokens_and_errors(unmask: Command, run: Path) -> None:
    Path("prompts.txt").write_text("a [MASK] b[MASK]\n\nno mask\n")
    code, out, _ = unmask("fill", str(run), "--file", "prompts.txt", "--joint", "beam", "--top", "2", "--json")
    assert code == 2
    filled, blank, failed = json.loads(out)
    assert [set(one) for one in filled["fillings"]] == [{"tokens", "ids", "groups", "log_probability", "sequence"}] * 2
    assert len(filled["fillings"][0]["ids"]) == 2
    assert blank == {"text": "", "fillings": []}
    assert failed["fillings"] == [] and "no [MASK]" in failed["error"] and "line 3" in failed["location"]


def test_whole_words(unmask: Command, run: Path) -> None:
    out = succeed(unmask, "fill", str(run), "The [MASK] sat.", "--words", "3", "--top", "40", "--json")
    fillings = json.loads(out)[0]["fillings"]
    assert {len(one["ids"]) for one in fillings} >= {1, 2}
    assert all(re.fullmatch(r"The (\w+|\S) sat\.", one["sequence"]) for one in fillings)


@pytest.mark.usefixtures("in_terminal")
def test_groups_are_shown_in_a_terminal(unmask: Command, run: Path) -> None:
    out = succeed(unmask, "fill", str(run), "The [MASK]*2 s[MASK]t", "--joint", "best-first", "--top", "2")
    text, *lines = plain(out).splitlines()
    assert text == "The [MASK]*2 s[MASK]t"
    assert all(re.fullmatch(r" +-\d+\.\d\d  .. … .", line) for line in lines[:2]) and "\x1b[32m" in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("nothing here", "--joint", "beam"), ("no [MASK]", "nothing here")),
        (("a [MASK]", "--beam-size", "3"), ("--beam-size needs a joint search", "--joint beam")),
        (("a [MASK]", "--joint", "beam", "--beam-size", "0"), "invalid --beam-size: got 0, expected 1 to 1,000"),
        (("a [MASK]", "--words", "0"), "invalid --words: got 0"),
        (("a [MASK]", "--joint", "beam", "--top", "0"), "invalid --top: got 0"),
        (("[MASK]*40", "--joint", "beam"), "the text has 42 tokens"),
        (("[MASK] [MASK] [MASK] [MASK]", "--words", "4"), "256 combinations"),
    ],
)
def test_invalid_searches_are_named(refused: Refused, run: Path, options: tuple[str, ...], says: str) -> None:
    refused("fill", str(run), *options, says=says)
