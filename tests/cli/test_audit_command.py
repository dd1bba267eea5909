"""The verb audit: what it prints, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SMALL = ("--text", "cat.txt", "--recipe", "small.toml", "--samples", "256", "--workers", "0", "--length", "64")
CALLABLE = """
import torch

def hide(ids):
    asked = (torch.rand(ids.shape) < 0.15) & (ids > 4)
    return torch.where(asked, 4, ids), torch.where(asked, ids, -100)

def hide_all(ids):
    return ids, ids
"""


def test_ours_passes_in_plain_lines(unmask) -> None:
    code, out, _ = unmask("audit", *SMALL)
    assert code == 0, out
    lines = out.splitlines()
    assert "15%" not in lines[0] and "80%/10%/10% promised" in lines[0]
    assert any(line.startswith("ok        rate ") for line in lines)
    assert lines[-1].startswith("all is well") and "[" not in lines[-1]


def test_json_says_all_and_ends_with_1_where_something_was_found(unmask) -> None:
    code, out, _ = unmask("audit", "transformers:seeded", *SMALL, "--json")
    told = json.loads(out)
    assert code == 1 and not told["passed"]
    assert "repeats between ranks" in told["found"]
    assert {"name", "verdict", "says", "measured", "chance"} <= set(told["findings"][0])
    assert told["claims"]["rate"] == 0.15 and told["versions"]["transformers"]


def test_a_callable_of_ones_own_is_judged_by_what_is_claimed(
    unmask, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "own_masks_of_test.py").write_text(CALLABLE)
    monkeypatch.syspath_prepend(place)
    code, out, _ = unmask("audit", "own_masks_of_test:hide", *SMALL, "--split", "100/0/0")
    assert code == 0, out
    code, out, _ = unmask("audit", "own_masks_of_test:hide", *SMALL, "--rate", "0.3")
    assert code == 1 and "FOUND     rate " in out and "FOUND     masked " in out


def test_what_a_person_can_mend_is_said(refused, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "more_masks_of_test.py").write_text(CALLABLE)
    monkeypatch.syspath_prepend(place)
    refused("audit", "transformers:whole-words", *SMALL, says="did you mean `whole-word`?")
    refused("audit", "more_masks_of_test:hide_al", *SMALL, says="did you mean `hide_all`?")
    refused("audit", "no_such_module_here:hide", *SMALL, says="there is no module `no_such_module_here`")
    refused("audit", "mine", *SMALL, says="package.module:name")
    refused("audit", *SMALL, "--split", "80/20", says="--split 80/10/10")
    refused("audit", *SMALL, "--samples", "3", says="give")
