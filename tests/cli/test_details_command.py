"""`unmask evaluate --details`: the same results in a terminal, in a pipe and as JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import unmask as library

Command = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]
GROUPS = ("by_frequency", "by_place_in_word", "by_position", "by_characters", "by_input")


def test_details_are_tables_in_a_pipe(unmask: Command, run: Path) -> None:
    code, out, err = unmask("evaluate", "run", "--text", "cat.txt", "--details")
    assert code == 0, err
    assert "\x1b" not in out and "█" not in out
    plain = unmask("evaluate", "run", "--text", "cat.txt")[1]
    assert out.startswith(plain), "details follow the results, which don't change"
    rows = {line.split("  ")[0] for line in out.removeprefix(plain).splitlines()}
    assert {"frequency rank", "1 to 10", "place in word", "inner token of a word", "letters", "[MASK]"} <= rows
    assert {"confidence", "expected calibration error", "mean confidence"} <= rows


def test_details_as_json_are_those_of_the_library(unmask: Command, run: Path) -> None:
    code, out, err = unmask("evaluate", "run", "--text", "cat.txt", "--details", "--json")
    assert code == 0, err
    tree = json.loads(out)
    details = tree.pop("details")
    assert tree == json.loads(unmask("evaluate", "run", "--text", "cat.txt", "--json")[1])
    assert set(details) == {*GROUPS, "calibration"}
    for name in GROUPS:
        assert sum(group["masked_tokens"] for group in details[name]) == tree["masked_tokens"]
        assert {"name", "masked_tokens", "loss", "unigram_loss", "accuracy"} == set(details[name][0])
    found = library.evaluate_details(library.load(run), [Path("cat.txt")]).details.calibration
    assert details["calibration"]["error"] == pytest.approx(found.error)
    assert [one["masked_tokens"] for one in details["calibration"]["bins"]] == [one.masked_tokens for one in found.bins]


def test_details_need_a_text(refused: Refused, run: Path, place: Path) -> None:
    (place / "pairs.tsv").write_text("The cat sat.\tThe cat sit.\n")
    refused("evaluate", "run", "--pairs", "pairs.tsv", "--details", says=("--details is an option of text", "--text"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pty")
def test_a_terminal_of_80_columns_shows_bars_and_no_broken_line(run: Path, place: Path) -> None:
    import pty

    command = [sys.executable, "-m", "unmask", "evaluate", "run", "--text", "cat.txt", "--details"]
    main_end, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm-256color", "NO_COLOR": "1"}
    with subprocess.Popen(command, stdout=terminal, stderr=subprocess.DEVNULL, cwd=place, env=environment) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                part = os.read(main_end, 4096)
            except OSError:  # the other end is closed
                break
            shown += part
        assert process.wait() == 0, shown.decode()
    os.close(main_end)
    lines = re.sub(r"\x1b\[[\d;]*m", "", shown.decode()).replace("\r", "").splitlines()
    (row,) = [line for line in lines if line.startswith("inner token of a word ")]
    assert row.count("%") == 2 and max(map(len, lines[lines.index("") :])) <= 80, "the tables begin after a blank line"
    assert any("█" in line or "▏" in line for line in lines if line.startswith(("letters", "unchanged")))
