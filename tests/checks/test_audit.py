"""Each planted fault is found, and no other; maskers whose claims are true pass."""

from __future__ import annotations

import importlib
import json
import math
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unmask
from unmask.checks.audit.maskers import ObjectiveMasker, claims_of_config, fast_tokenizer, transformers_collator
from unmask.checks.audit.settings import AuditConfig, Claims
from unmask.checks.audit.statistics import chernoff_bound, combinations, p_value, poisson_tail
from unmask.core.errors import RecipeError, TextError
from unmask.objectives.masking import MaskUnit
from unmask.objectives.mlm import MaskedLMConfig, MaskedLMObjective
from unmask.tokenization.tokenizer import Tokenizer

# pytest imports tests as single files: modules beside them are found by their directory.
sys.path.insert(0, str(Path(__file__).parent))
planted: Any = importlib.import_module("planted")
texts: Any = importlib.import_module("texts")


@pytest.fixture(scope="module")
def english() -> list[str]:
    return texts.documents("english")


@pytest.fixture(scope="module")
def tokenizer(english: list[str]) -> Tokenizer:
    """A WordPiece tokenizer that divides many words into several tokens."""
    return texts.trained("english", "wordpiece")


ALONE = AuditConfig(workers=0, samples=512)
FAULTS: list[tuple[str, dict[str, Any], set[str]]] = [
    ("MasksCls", {}, {"special tokens masked"}),
    ("MasksPadding", {}, {"padding masked"}),
    ("DrawsSpecials", {}, {"special tokens drawn"}),
    ("DrawsInvalidIds", {}, {"invalid ids"}),
    ("SameEveryEpoch", {}, {"repeats between epochs"}),
    ("SameInEveryRank", {}, {"repeats between ranks"}),
    ("WrongLabels", {}, {"labels"}),
    ("ChangesUnmasked", {}, {"unmasked changed"}),
    ("SkipsSamples", {}, {"samples without masks"}),
    ("NeverFirst", {}, {"rate by position"}),
    ("FewerInShort", {}, {"rate by length"}),
    ("Honest", {"rate": 0.16}, {"rate"}),
    ("Honest", {}, set()),
]


@pytest.mark.parametrize(("name", "options", "found"), FAULTS, ids=lambda value: str(value))
def test_a_planted_fault_is_found_and_no_other(
    english: list[str], tokenizer: Tokenizer, name: str, options: dict[str, Any], found: set[str]
) -> None:
    long = (
        AuditConfig(workers=0, samples=1024) if found & {"rate by length", "rate", "samples without masks"} else ALONE
    )
    report = unmask.audit(getattr(planted, name)(tokenizer, **options), english, tokenizer, settings=long)
    assert set(report.failed) == found, [finding for finding in report.findings if finding.verdict == "fail"]
    assert report.passed is not bool(found)


def test_a_split_of_81_10_9_is_found_and_no_other_fault(english: list[str], tokenizer: Tokenizer) -> None:
    report = unmask.audit(
        planted.Honest(tokenizer, split=(0.81, 0.10)), english, tokenizer, settings=AuditConfig(workers=0, samples=3072)
    )
    assert set(report.failed) == {"masked", "kept"}
    assert report["masked"].measured == pytest.approx(0.81, abs=0.006)


def test_workers_with_equal_masks_are_found_and_no_other_fault(english: list[str], tokenizer: Tokenizer) -> None:
    report = unmask.audit(
        planted.SameInEveryWorker(tokenizer), english, tokenizer, settings=AuditConfig(workers=2, samples=512)
    )
    assert set(report.failed) == {"repeats between workers"}


def test_a_partial_word_is_found_and_no_other_fault(english: list[str], tokenizer: Tokenizer) -> None:
    claims = Claims(mask=1.0, random=0.0, keep=0.0, units="words")
    for miss_rate, found in ((0.02, {"partial words"}), (0.0, set[str]())):
        masker = planted.HalfWords(tokenizer, miss_rate)
        report = unmask.audit(masker, english, tokenizer, claims=claims, settings=ALONE)
        # A word cut by the edge of a sample begins with a continuation, which this masker masks alone: still whole.
        assert set(report.failed) == found, report.findings


def test_words_that_must_fit_into_a_quota_are_found(english: list[str], tokenizer: Tokenizer) -> None:
    """The rule of BERT's code: short words fit more often, so they are masked more often."""
    claims = Claims(mask=1.0, random=0.0, keep=0.0, units="words")
    report = unmask.audit(planted.FitsQuota(tokenizer), english, tokenizer, claims=claims, settings=ALONE)
    assert set(report.failed) == {"rate by word"}
    finding = report["rate by word"]
    assert finding.p_value is not None and finding.p_value < 1e-12
    boosted = replace(claims, uniform=False)
    allowed = unmask.audit(planted.FitsQuota(tokenizer), english, tokenizer, claims=boosted, settings=ALONE)
    assert allowed["rate by word"].verdict == "info", "words that are boosted may differ"


def test_neighbors_masked_together_are_found_if_words_are_claimed(english: list[str], tokenizer: Tokenizer) -> None:
    spans = MaskedLMObjective(MaskedLMConfig(mask_unit="span"), tokenizer.mask_id, tokenizer.regular_token_ids)
    report = unmask.audit(spans, english, tokenizer, claims=Claims(units="words"), settings=ALONE)
    assert "words together" in report.failed


@pytest.mark.parametrize("language", ["english", "korean", "chinese"])
@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "characters"])
def test_masking_of_unmask_passes_for_every_unit_and_tokenizer(language: str, kind: str) -> None:
    documents = texts.documents(language)
    tokenizer = texts.trained(language, kind)
    choices: tuple[MaskUnit, ...] = ("token", "whole-word", "span", "ngram")
    for choose in choices:
        config = MaskedLMConfig(mask_unit=choose)
        masker = ObjectiveMasker(
            MaskedLMObjective(config, tokenizer.mask_id, tokenizer.regular_token_ids),
            17,
            claims=claims_of_config(config),
        )
        report = unmask.audit(masker, documents, tokenizer, settings=AuditConfig(workers=0, samples=256))
        assert report.passed, [finding for finding in report.findings if finding.verdict == "fail"]
        assert report.false_alarm < 1e-4


def test_masking_of_unmask_passes_in_workers_and_is_reproducible(english: list[str], tokenizer: Tokenizer) -> None:
    config = MaskedLMConfig(mask_rate=0.3, final_mask_rate=0.15, mask_unit="whole-word")
    settings = AuditConfig(workers=2, samples=256)
    reports = [
        unmask.audit(
            ObjectiveMasker(
                MaskedLMObjective(config, tokenizer.mask_id, tokenizer.regular_token_ids),
                17,
                claims=claims_of_config(config, 1.0),
                progress=1.0,
            ),
            english,
            tokenizer,
            settings=settings,
        )
        for _ in range(2)
    ]
    assert reports[0] == reports[1] and reports[0].passed
    assert reports[0].claims.rate == 0.15
    json.dumps(asdict(reports[0]))


def test_the_global_generators_are_restored(english: list[str], tokenizer: Tokenizer) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    unmask.audit(planted.Honest(tokenizer), english, tokenizer, settings=AuditConfig(workers=0, samples=64))
    assert torch.equal(torch.rand(1), expected)


# The collators of transformers ---------------------------------------------------------------------------------------


def test_the_plain_collator_draws_special_tokens(english: list[str], tokenizer: Tokenizer) -> None:
    report = unmask.audit(transformers_collator("transformers", tokenizer, 0), english, tokenizer, settings=ALONE)
    assert set(report.failed) == {"special tokens drawn"}
    assert report["repeats between ranks"].verdict == "pass"


def test_a_collator_is_recognized_by_its_class_with_its_claims(english: list[str], tokenizer: Tokenizer) -> None:
    from transformers import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(
        fast_tokenizer(tokenizer), mlm_probability=0.3, mask_replace_prob=1.0, random_replace_prob=0.0
    )
    report = unmask.audit(collator, english, tokenizer, settings=ALONE)
    assert report.claims == Claims(rate=0.3, mask=1.0, random=0.0, keep=0.0)
    assert report.passed and report.masker == "DataCollatorForLanguageModeling"


def test_ranks_with_equal_seeds_draw_equal_masks(english: list[str], tokenizer: Tokenizer) -> None:
    settings = AuditConfig(workers=0, samples=512, seeds="alike")
    report = unmask.audit(transformers_collator("transformers", tokenizer, 0), english, tokenizer, settings=settings)
    assert "repeats between ranks" in report.failed


def test_a_seeded_collator_repeats_itself_in_workers(english: list[str], tokenizer: Tokenizer) -> None:
    settings = AuditConfig(workers=2, samples=512)
    report = unmask.audit(
        transformers_collator("transformers:seeded", tokenizer, 0), english, tokenizer, settings=settings
    )
    assert {"repeats between epochs", "repeats between ranks"} <= set(report.failed)
    assert report["repeats between epochs"].count == report["repeats between epochs"].of
    assert report["repeats between workers"].verdict == "pass"


@pytest.mark.parametrize(("language", "kind"), [("english", "bpe"), ("chinese", "characters")])
def test_a_line_is_one_word_for_the_whole_word_collator(language: str, kind: str) -> None:
    documents = texts.documents(language)
    tokenizer = texts.trained(language, kind)
    with warnings.catch_warnings(record=True):
        collator = transformers_collator("transformers:whole-word", tokenizer, 0)
    report = unmask.audit(collator, documents, tokenizer, settings=ALONE)
    assert {"samples without masks", "words together"} <= set(report.failed)
    assert report.notes


# Bad input ------------------------------------------------------------------------------------------------------------


def test_other_objects_are_refused(english: list[str], tokenizer: Tokenizer) -> None:
    short = AuditConfig(workers=0, samples=64)
    for masker, says in (
        (planted.without_labels, "it returned a Tensor"),
        (planted.Honest, "it is of type class"),
        (lambda ids: (ids[:, 1:], ids), "the shape"),
        (lambda ids: (ids, ids.float()), "labels are float32"),
        (3, "it is of type int"),
    ):
        with pytest.raises(RecipeError, match=says):
            unmask.audit(masker, english, tokenizer, settings=short)
    with pytest.raises(TextError, match="too few to audit"):
        unmask.audit(planted.Honest(tokenizer), ["a cat"], tokenizer, settings=short)
    with pytest.raises(RecipeError, match="seeded"):
        transformers_collator("transformers:seded", tokenizer, 0)
    with pytest.raises(RecipeError, match="too few for a batch of each worker"):
        AuditConfig(samples=16)
    with pytest.raises(RecipeError, match="memory"):
        AuditConfig(samples=1_000_000)


# Bounds ---------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.floats(0.01, 30.0))
@settings(max_examples=60, deadline=None)
def test_the_tail_of_the_poisson_distribution_is_not_underestimated(count: int, mean: float) -> None:
    exact = 1.0 - sum(math.exp(-mean + k * math.log(mean) - math.lgamma(k + 1)) for k in range(count))
    assert poisson_tail(count, mean) >= exact - 1e-9


@given(st.integers(1, 80), st.floats(0.01, 0.99), st.data())
@settings(max_examples=60, deadline=None)
def test_the_bound_of_a_binomial_tail_is_not_exceeded(draws: int, rate: float, data: st.DataObject) -> None:
    """Compared with the exact sum of the tail on the side of the count, of which the bound has two."""
    count = data.draw(st.integers(0, draws))
    side = range(count, draws + 1) if count >= rate * draws else range(count + 1)
    exact = sum(math.comb(draws, k) * rate**k * (1 - rate) ** (draws - k) for k in side)
    bound = chernoff_bound(count / draws, rate, draws)
    assert bound == 1.0 or 2 * exact <= bound + 1e-9
    assert chernoff_bound(rate, rate, draws) == 1.0


def test_p_values_are_those_of_the_normal_distribution() -> None:
    assert p_value(0.16, 0.01, 0.15) == pytest.approx(0.3173, abs=1e-4)
    assert p_value(0.16, 0.01, 0.15, side="above") == pytest.approx(0.1587, abs=1e-4)
    assert p_value(0.16, 0.01, 0.15, tolerance=0.02) == 1.0
    assert p_value(0.001, 0.01, 0.0) == 0.0, "a single case contradicts a claim of 0"
    assert combinations(52, 5) == pytest.approx(2_598_960)
    assert combinations(10_000, 5_000) == math.inf
