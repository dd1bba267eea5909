"""`unmask audit`: output and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SMALL = ("--text", "cat.txt", "--recipe", "small.toml", "--samples", "256", "--workers", "0", "--length", "64")
CALLABLE = """
import torch

def mask(ids):
    masked = (torch.rand(ids.shape) < 0.15) & (ids > 4)
    return torch.where(masked, 4, ids), torch.where(masked, ids, -100)

def mask_all(ids):
    return ids, ids
"""


def test_the_masking_of_a_recipe_passes_in_plain_lines(unmask) -> None:
    code, out, _ = unmask("audit", *SMALL)
    assert code == 0, out
    lines = out.splitlines()
    assert "15%" not in lines[0] and "80%/10%/10%;" in lines[0]
    assert any(line.startswith("pass      rate ") for line in lines)
    assert lines[-1].startswith("all checks passed") and "[" not in lines[-1]


def test_json_has_every_field_and_exit_code_3_if_a_check_fails(unmask) -> None:
    code, out, _ = unmask("audit", "transformers:seeded", *SMALL, "--json")
    report = json.loads(out)
    assert code == 3 and not report["passed"]
    assert "repeats between ranks" in report["failed"]
    assert {"name", "verdict", "detail", "measured", "p_value"} <= set(report["findings"][0])
    assert report["claims"]["rate"] == 0.15 and report["versions"]["transformers"]


def test_a_callable_is_audited_against_the_claims_of_the_options(
    unmask, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "own_masks_of_test.py").write_text(CALLABLE)
    monkeypatch.syspath_prepend(place)
    code, out, _ = unmask("audit", "own_masks_of_test:mask", *SMALL, "--split", "100/0/0")
    assert code == 0, out
    code, out, _ = unmask("audit", "own_masks_of_test:mask", *SMALL, "--rate", "0.3")
    assert code == 3 and "FAIL      rate " in out and "FAIL      masked " in out


def test_user_errors(refused, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "more_masks_of_test.py").write_text(CALLABLE)
    monkeypatch.syspath_prepend(place)
    refused("audit", "transformers:whole-words", *SMALL, says="did you mean `whole-word`?")
    refused("audit", "more_masks_of_test:mask_al", *SMALL, says="did you mean `mask_all`?")
    refused("audit", "no_such_module_here:mask", *SMALL, says="there is no module `no_such_module_here`")
    refused("audit", "mine", *SMALL, says="package.module:name")
    refused("audit", *SMALL, "--split", "80/20", says="--split 80/10/10")
    refused("audit", *SMALL, "--samples", "3", says="give")
