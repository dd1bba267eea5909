"""Each planted fault is found, and only it; what keeps its promises passes."""

from __future__ import annotations

import importlib
import json
import math
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unmask
from unmask.checks.audit.maskers import ObjectiveMasker, claims_of_settings, fast_tokenizer, library_collator
from unmask.checks.audit.settings import AuditConfig, Claims
from unmask.checks.audit.statistics import chance_of, combinations, poisson_tail
from unmask.core.errors import RecipeError, TextError
from unmask.objectives.masking import MaskUnit
from unmask.objectives.mlm import MaskedLMConfig, MaskedLMObjective
from unmask.tokenization.tokenizer import Tokenizer

# Tests are imported as single files; what stands beside them is found by its folder.
sys.path.insert(0, str(Path(__file__).parent))
planted: Any = importlib.import_module("planted")
texts: Any = importlib.import_module("texts")


@pytest.fixture(scope="module")
def english() -> list[str]:
    return texts.documents("english")


@pytest.fixture(scope="module")
def pieces(english: list[str]) -> Tokenizer:
    """A WordPiece tokenizer that cuts many words in several pieces."""
    return texts.trained("english", "wordpiece")


ALONE = AuditConfig(workers=0, samples=512)
FAULTS: list[tuple[str, dict[str, Any], set[str]]] = [
    ("AsksCls", {}, {"specials asked"}),
    ("AsksPadding", {}, {"padding asked"}),
    ("DrawsSpecials", {}, {"specials drawn"}),
    ("DrawsStrangers", {}, {"unknown ids"}),
    ("SameEveryEpoch", {}, {"repeats between epochs"}),
    ("SameInEveryRank", {}, {"repeats between ranks"}),
    ("WrongLabels", {}, {"labels"}),
    ("ChangesUnasked", {}, {"unasked changed"}),
    ("LeavesRowsOut", {}, {"nothing asked"}),
    ("NeverFirst", {}, {"rate by position"}),
    ("FewerOfShort", {}, {"rate by length"}),
    ("Honest", {"rate": 0.16}, {"rate"}),
    ("Honest", {}, set()),
]


@pytest.mark.parametrize(("name", "options", "found"), FAULTS, ids=lambda value: str(value))
def test_a_planted_fault_is_found_and_only_it(
    english: list[str], pieces: Tokenizer, name: str, options: dict[str, Any], found: set[str]
) -> None:
    long = AuditConfig(workers=0, samples=1024) if found & {"rate by length", "rate", "nothing asked"} else ALONE
    report = unmask.audit(getattr(planted, name)(pieces, **options), english, pieces, settings=long)
    assert set(report.found) == found, [finding for finding in report.findings if finding.verdict == "found"]
    assert report.passed is not bool(found)


def test_a_split_of_81_10_9_is_found_and_only_it(english: list[str], pieces: Tokenizer) -> None:
    report = unmask.audit(
        planted.Honest(pieces, split=(0.81, 0.10)), english, pieces, settings=AuditConfig(workers=0, samples=3072)
    )
    assert set(report.found) == {"masked", "kept"}
    assert report["masked"].measured == pytest.approx(0.81, abs=0.006)


def test_workers_that_draw_alike_are_found_and_only_they(english: list[str], pieces: Tokenizer) -> None:
    report = unmask.audit(
        planted.SameInEveryWorker(pieces), english, pieces, settings=AuditConfig(workers=2, samples=512)
    )
    assert set(report.found) == {"repeats between workers"}


def test_a_word_in_part_is_found_and_only_it(english: list[str], pieces: Tokenizer) -> None:
    claims = Claims(mask=1.0, random=0.0, keep=0.0, units="words")
    for forgets, found in ((0.02, {"words in part"}), (0.0, set[str]())):
        masker = planted.HalfWords(pieces, forgets)
        report = unmask.audit(masker, english, pieces, claims=claims, settings=ALONE)
        # A word cut by the edge of a sample begins with a continuation, which this masker asks on its own: whole still.
        assert set(report.found) == found, report.findings


def test_neighbours_hidden_together_are_found_where_words_are_promised(english: list[str], pieces: Tokenizer) -> None:
    spans = MaskedLMObjective(MaskedLMConfig(mask_unit="span"), pieces.mask_id, pieces.regular_token_ids)
    report = unmask.audit(spans, english, pieces, claims=Claims(units="words"), settings=ALONE)
    assert "words together" in report.found


@pytest.mark.parametrize("language", ["english", "korean", "chinese"])
@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "characters"])
def test_ours_passes_however_words_and_tokens_are_cut(language: str, kind: str) -> None:
    documents = texts.documents(language)
    tokenizer = texts.trained(language, kind)
    choices: tuple[MaskUnit, ...] = ("token", "whole-word", "span", "ngram")
    for choose in choices:
        ours = MaskedLMConfig(mask_unit=choose)
        masker = ObjectiveMasker(
            MaskedLMObjective(ours, tokenizer.mask_id, tokenizer.regular_token_ids), 17, claims=claims_of_settings(ours)
        )
        report = unmask.audit(masker, documents, tokenizer, settings=AuditConfig(workers=0, samples=256))
        assert report.passed, [finding for finding in report.findings if finding.verdict == "found"]
        assert report.false_alarm < 1e-4


def test_ours_passes_in_workers_and_gives_the_same_numbers_again(english: list[str], pieces: Tokenizer) -> None:
    ours = MaskedLMConfig(mask_rate=0.3, final_mask_rate=0.15, mask_unit="whole-word")
    settings = AuditConfig(workers=2, samples=256)
    reports = [
        unmask.audit(
            ObjectiveMasker(
                MaskedLMObjective(ours, pieces.mask_id, pieces.regular_token_ids),
                17,
                claims=claims_of_settings(ours, 1.0),
                progress=1.0,
            ),
            english,
            pieces,
            settings=settings,
        )
        for _ in range(2)
    ]
    assert reports[0] == reports[1] and reports[0].passed
    assert reports[0].claims.rate == 0.15
    json.dumps(asdict(reports[0]))


def test_the_global_generators_are_left_as_they_were(english: list[str], pieces: Tokenizer) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    unmask.audit(planted.Honest(pieces), english, pieces, settings=AuditConfig(workers=0, samples=64))
    assert torch.equal(torch.rand(1), expected)


# The collators of transformers ---------------------------------------------------------------------------------------


def test_the_plain_collator_draws_special_pieces(english: list[str], pieces: Tokenizer) -> None:
    report = unmask.audit(library_collator("transformers", pieces, 0), english, pieces, settings=ALONE)
    assert set(report.found) == {"specials drawn"}
    assert report["repeats between ranks"].verdict == "well"


def test_a_collator_is_known_by_its_class_and_its_own_claims(english: list[str], pieces: Tokenizer) -> None:
    from transformers import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(
        fast_tokenizer(pieces), mlm_probability=0.3, mask_replace_prob=1.0, random_replace_prob=0.0
    )
    report = unmask.audit(collator, english, pieces, settings=ALONE)
    assert report.claims == Claims(rate=0.3, mask=1.0, random=0.0, keep=0.0)
    assert report.passed and report.masker == "DataCollatorForLanguageModeling"


def test_ranks_that_seed_alike_draw_alike(english: list[str], pieces: Tokenizer) -> None:
    settings = AuditConfig(workers=0, samples=512, seeds="alike")
    report = unmask.audit(library_collator("transformers", pieces, 0), english, pieces, settings=settings)
    assert "repeats between ranks" in report.found


def test_a_seeded_collator_repeats_itself_in_workers(english: list[str], pieces: Tokenizer) -> None:
    settings = AuditConfig(workers=2, samples=512)
    report = unmask.audit(library_collator("transformers:seeded", pieces, 0), english, pieces, settings=settings)
    assert {"repeats between epochs", "repeats between ranks"} <= set(report.found)
    assert report["repeats between epochs"].count == report["repeats between epochs"].of
    assert report["repeats between workers"].verdict == "well"


@pytest.mark.parametrize(("language", "kind"), [("english", "bpe"), ("chinese", "characters")])
def test_a_line_is_one_word_to_the_whole_word_collator(language: str, kind: str) -> None:
    documents = texts.documents(language)
    tokenizer = texts.trained(language, kind)
    with warnings.catch_warnings(record=True):
        collator = library_collator("transformers:whole-word", tokenizer, 0)
    report = unmask.audit(collator, documents, tokenizer, settings=ALONE)
    assert {"nothing asked", "words together"} <= set(report.found)
    assert report.notes


# Bad input ------------------------------------------------------------------------------------------------------------


def test_what_is_no_masker_is_refused(english: list[str], pieces: Tokenizer) -> None:
    short = AuditConfig(workers=0, samples=64)
    for masker, says in (
        (planted.gives_nothing_useful, "it gave a Tensor"),
        (planted.Honest, "it is a class"),
        (lambda ids: (ids[:, 1:], ids), "the shape"),
        (lambda ids: (ids, ids.float()), "labels are float32"),
        (3, "it is a int"),
    ):
        with pytest.raises(RecipeError, match=says):
            unmask.audit(masker, english, pieces, settings=short)
    with pytest.raises(TextError, match="too few to judge"):
        unmask.audit(planted.Honest(pieces), ["a cat"], pieces, settings=short)
    with pytest.raises(RecipeError, match="seeded"):
        library_collator("transformers:seded", pieces, 0)
    with pytest.raises(RecipeError, match="no batch to each worker"):
        AuditConfig(samples=16)
    with pytest.raises(RecipeError, match="memory"):
        AuditConfig(samples=1_000_000)


# Bounds ---------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.floats(0.01, 30.0))
@settings(max_examples=60, deadline=None)
def test_the_tail_of_the_poisson_distribution_is_no_less_than_it_is(count: int, mean: float) -> None:
    exact = 1.0 - sum(math.exp(-mean + k * math.log(mean) - math.lgamma(k + 1)) for k in range(count))
    assert poisson_tail(count, mean) >= exact - 1e-9


def test_chances_are_those_of_the_normal_distribution() -> None:
    assert chance_of(0.16, 0.01, 0.15) == pytest.approx(0.3173, abs=1e-4)
    assert chance_of(0.16, 0.01, 0.15, side="above") == pytest.approx(0.1587, abs=1e-4)
    assert chance_of(0.16, 0.01, 0.15, tolerance=0.02) == 1.0
    assert chance_of(0.001, 0.01, 0.0) == 0.0, "what is promised never to happen"
    assert combinations(52, 5) == pytest.approx(2_598_960)
    assert combinations(10_000, 5_000) == math.inf
