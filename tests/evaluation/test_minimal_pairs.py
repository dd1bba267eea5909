"""Minimal pairs: reading, accuracies with ties, intervals, predictions, and the learning curve of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unmask.core.distributed import DistributedContext
from unmask.core.errors import RecipeError, TextError
from unmask.core.quantities import Fraction, Quantity
from unmask.evaluation.minimal_pairs import (
    MinimalPair,
    MinimalPairs,
    MinimalPairsResult,
    evaluate_minimal_pairs,
    predictions,
    read_pairs,
    to_jsonl,
    wilson,
)
from unmask.evaluation.scoring import METHODS, score
from unmask.models import build_model
from unmask.models.model import Model
from unmask.models.modernbert import ModernBertConfig
from unmask.tokenization.settings import CharacterConfig, WordPieceConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer
from unmask.training.loggers import read_log
from unmask.training.plan import EveryConfig, Measured, StageConfig, limit_pairs, make_plan
from unmask.training.pretrain import launch, resume

ONE_THREAD = DistributedContext(torch.device("cpu"), "float32", 1)
LINES = ("the cat sat on the mat and looked at the moon .", "a dog ran over the hill to meet the old man .")
PAIRS = [
    MinimalPair("the cat sat .", "cat the sat .", "order", "syntax"),
    MinimalPair("the dog ran .", "ran the dog .", "order", "syntax"),
    MinimalPair("the man sat .", "sat man the .", "order", "syntax"),
    MinimalPair("the cat sat on the mat .", "the mat sat on the cat .", "animacy", "semantics"),
]
RUN = [
    "data.tokenizer={kind = 'wordpiece', vocab_size = 60}", "data.document=line",
    "data.held_out={method = 'tail', fraction = '10%'}", "model.num_hidden_layers=1",
    "model.hidden_size=16", "model.num_attention_heads=2", "model.intermediate_size=16",
    "stage=[{max_seq_len = 24, batch_size = '8 texts'}]", "train.threads=1", "train.budget=6 steps",
    "train.every={log = '1 steps', validate = '3 steps', save = '3 steps'}",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(LINES * 20, WordPieceConfig(vocab_size=70))


def model_of(tokenizer: Tokenizer, *, constant: bool = False) -> Model:
    torch.manual_seed(5)
    shape = ModernBertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16)
    encoder, head = build_model(shape, tokenizer.size)
    with torch.no_grad():
        for parameter in (*encoder.parameters(), *head.parameters()):
            parameter.zero_() if constant else parameter.add_(torch.randn_like(parameter) * 0.3)
    return Model(encoder.eval(), head.eval(), tokenizer, shape, {"context": 64})


def judge(model: Model, pairs: Any, **options: Any) -> MinimalPairsResult:
    return evaluate_minimal_pairs(model, pairs, context=ONE_THREAD, **options)


# Accuracies -----------------------------------------------------------------------------------------------------------


def test_a_constant_model_gets_exactly_one_half(tokenizer: Tokenizer) -> None:
    """All scores are equal if the sentences have equal numbers of tokens: every pair is a tie."""
    result = judge(model_of(tokenizer, constant=True), PAIRS)
    assert result.length_accuracy == 0.5
    for method in result.methods.values():
        for each in (method.overall, *method.fields.values(), *method.paradigms.values()):
            assert each.accuracy == 0.5 and each.ties == each.pairs
        assert all(not entry["pred"] for entry in predictions(method)["order"]["predictions"])


def test_pairs_may_be_a_path_or_a_list_of_sentences(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = model_of(tokenizer)
    (tmp_path / "pairs.tsv").write_text("".join(f"{pair.good}\t{pair.bad}\n" for pair in PAIRS) + "a\ta\n")
    by_list = judge(model, [(pair.good, pair.bad) for pair in PAIRS])
    by_path = judge(model, tmp_path / "pairs.tsv", errors="skip")
    assert by_list.pairs == by_path.pairs == len(PAIRS) and (by_list.left_out, by_path.left_out) == (0, 1)
    for method, result in judge(model, [replace(pair, paradigm="pairs") for pair in PAIRS]).methods.items():
        assert result.overall == by_list.methods[method].overall == by_path.methods[method].overall
    few = judge(model, str(tmp_path / "pairs.tsv"), method="original", subset=2, errors="skip")
    assert few.pairs == 2 and list(few.methods) == ["original"]
    assert (
        judge(model, MinimalPairs(tuple(PAIRS)), subset=1).pairs == len({pair.paradigm for pair in PAIRS}) < len(PAIRS)
    )
    assert repr(few).startswith("MinimalPairsResult(2 pairs of 1 paradigms\n  original: ")


def test_a_constant_model_prefers_fewer_tokens_and_the_baseline_says_so(tokenizer: Tokenizer) -> None:
    uneven = [*PAIRS, MinimalPair("the cat sat", "the cat sat on the mat", "length")]
    result = judge(model_of(tokenizer, constant=True), uneven)
    assert {each.overall.accuracy for each in result.methods.values()} == {result.length_accuracy}
    assert result.length_accuracy == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_the_sentence_with_the_higher_score_is_preferred(tokenizer: Tokenizer) -> None:
    model = model_of(tokenizer)
    result = judge(model, PAIRS)
    for method in METHODS:
        good, bad = (
            [found.log_probability for found in score(model, texts, method, context=ONE_THREAD)]
            for texts in ([pair.good for pair in PAIRS], [pair.bad for pair in PAIRS])
        )
        scores = result.methods[method].scores
        assert [each.good for each in scores] == pytest.approx(good, abs=1e-4)
        assert [each.bad for each in scores] == pytest.approx(bad, abs=1e-4)
        correct = [g > b for g, b in zip(good, bad, strict=True)]
        paradigms = result.methods[method].paradigms
        assert paradigms["order"].accuracy == pytest.approx(sum(correct[:3]) / 3)
        assert paradigms["animacy"].accuracy == float(correct[3])
        overall = result.methods[method].overall
        assert overall.accuracy == pytest.approx((sum(correct[:3]) / 3 + correct[3]) / 2), "the mean over paradigms"
        assert overall.interval[0] < overall.accuracy < overall.interval[1]
        written = predictions(result.methods[method])["order"]["predictions"]
        assert [each["pred"] for each in written] == [
            pair.good if is_correct else pair.bad for pair, is_correct in zip(PAIRS[:3], correct[:3], strict=True)
        ]
        assert [each["id"] for each in written] == ["order_0", "order_1", "order_2"]


def test_a_sentence_without_a_token_is_not_preferred() -> None:
    model = model_of(train_tokenizer(LINES * 20, WordPieceConfig(vocab_size=60)))
    result = judge(model, [MinimalPair("\u200b", "the cat sat", "dropped"), MinimalPair("the", "\u200b", "dropped")])
    assert result.unknown == 2 and result.length_accuracy == 0.5
    assert {each.overall.accuracy for each in result.methods.values()} == {0.5}


@given(st.permutations(range(len(PAIRS))), st.booleans())
def test_swapping_the_sentences_mirrors_the_accuracy(order: list[int], swap: bool) -> None:
    tokenizer = train_tokenizer(LINES * 20, CharacterConfig(min_frequency=1))
    model = model_of(tokenizer)
    pairs = [PAIRS[number] for number in order]
    swapped = [replace(pair, good=pair.bad, bad=pair.good) for pair in pairs] if swap else pairs
    first, second = judge(model, PAIRS, method="original"), judge(model, swapped, method="original")
    for name, accuracy in first.methods["original"].paradigms.items():
        other = second.methods["original"].paradigms[name].accuracy
        assert other == pytest.approx(1 - accuracy.accuracy if swap else accuracy.accuracy)


def test_pairs_with_unequal_numbers_of_unknown_tokens_are_ties(tokenizer: Tokenizer) -> None:
    pairs = [MinimalPair("the cat sat", "the 漢 sat", "one"), MinimalPair("the 漢 sat", "a 漢 sat", "both")]
    result = judge(model_of(tokenizer), pairs)
    assert result.unknown == 1
    for method in result.methods.values():
        assert method.paradigms["one"].ties == 1 and method.paradigms["one"].accuracy == 0.5
        assert method.paradigms["both"].ties == 0


@given(st.integers(1, 500).flatmap(lambda count: st.tuples(st.integers(0, 2 * count), st.just(count))))
def test_the_interval_contains_the_fraction_and_shrinks(drawn: tuple[int, int]) -> None:
    halves, count = drawn
    fraction = halves / (2 * count)
    low, high = wilson(fraction, count)
    assert 0 <= low <= fraction + 1e-12 and fraction - 1e-12 <= high <= 1 and low < high
    more = wilson(fraction, 4 * count)
    assert more[1] - more[0] < high - low
    assert wilson(1 - fraction, count) == pytest.approx((1 - high, 1 - low))


def test_the_interval_is_that_of_the_paper() -> None:
    assert wilson(0.5, 100) == pytest.approx((0.4038315, 0.5961685), abs=1e-6)


# Reading --------------------------------------------------------------------------------------------------------------


def test_pairs_are_read_from_json_lines_and_tsv(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"sentence_good": "A b.", "sentence_bad": "B a.", "field": "syntax/semantics", "UID": "order"}\n\n'
        '{"sentence_good": "C d.", "sentence_bad": "D c."}\n'
    )
    (tmp_path / "b.tsv").write_text("sentence_good\tsentence_bad\r\nE f.\tF e.\r\n")
    (tmp_path / "notes.txt").write_text("not read")
    found = read_pairs(tmp_path).pairs
    assert found == (
        MinimalPair("A b.", "B a.", "order", "syntax_semantics"),
        MinimalPair("C d.", "D c.", "a"),
        MinimalPair("E f.", "F e.", "b"),
    )
    (tmp_path / "copy.jsonl").write_text(to_jsonl(found))
    assert read_pairs(tmp_path / "copy.jsonl").pairs == found


def test_a_subset_has_evenly_spaced_pairs_of_each_paradigm(tmp_path: Path) -> None:
    for name, count in (("long", 10), ("short", 2)):
        (tmp_path / f"{name}.tsv").write_text("".join(f"good {i}\tbad {i}\n" for i in range(count)))
    assert [pair.good for pair in read_pairs(tmp_path, 4).pairs] == [
        "good 0", "good 2", "good 5", "good 7", "good 0", "good 1",
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="got 0, expected at least 1"):
        read_pairs(tmp_path, 0)


MALFORMED = {
    "identical": ("jsonl", '{"sentence_good": "A.", "sentence_bad": "A."}', "identical: 'A.'"),
    "missing key": ("jsonl", '{"sentence_good": "A."}', "no `sentence_bad`"),
    "not a text": ("jsonl", '{"sentence_good": "A.", "sentence_bad": 3}', "got 3, expected a sentence"),
    "blank": ("jsonl", '{"sentence_good": " ", "sentence_bad": "A."}', "expected a sentence"),
    "not JSON": ("jsonl", "A.\tB.", "not JSON"),
    "surrogate": ("jsonl", '{"sentence_good": "A.", "sentence_bad": "\\ud800"}', "invalid character"),
    "a list": ("jsonl", '["A.", "B."]', "not a JSON object"),
    "deep": ("jsonl", "[" * 100_000, "not JSON"),
    "three columns": ("tsv", "A.\tB.\tC.", "3 columns"),
    "one column": ("tsv", "A.", "1 columns"),
    "empty cell": ("tsv", "A.\t", "a sentence is empty"),
    "identical cells": ("tsv", "A.\tA.", "identical"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_line_is_named_or_left_out(case: str, tmp_path: Path) -> None:
    suffix, line, message = MALFORMED[case]
    good = '{"sentence_good": "A b.", "sentence_bad": "B a."}' if suffix == "jsonl" else "A b.\tB a."
    file = tmp_path / f"pairs.{suffix}"
    file.write_text(f"{good}\n{line}\n")
    with pytest.raises(TextError) as raised:
        read_pairs(file)
    assert message in raised.value.message and raised.value.location == f"{file}, line 2" and raised.value.hint
    found = read_pairs(file, errors="skip")
    assert len(found.pairs) == 1 and found.left_out == 1
    file.write_text(line)
    with pytest.raises(TextError, match="no minimal pairs: 1 malformed lines were left out"):
        read_pairs(file, errors="skip")


def test_bytes_and_long_lines_can_be_left_out(tmp_path: Path) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_bytes(b"A b.\tB a.\n\xff\tc\n" + b"a" * (5 << 20) + b"\nC d.\tD c.\n")
    found = read_pairs(file, errors="skip")
    assert [pair.good for pair in found.pairs] == ["A b.", "C d."] and found.left_out == 2
    file.write_bytes(b"a" * (1 << 20) + b"b\nC d.\tD c.\n" + b"a" * (2 << 20))
    assert [pair.good for pair in read_pairs(file, errors="skip").pairs] == ["C d."]


def test_paths_without_pairs_are_refused(tmp_path: Path) -> None:
    for path, content, message in (
        (tmp_path / "missing", None, "doesn't exist"),
        (tmp_path / "pairs.csv", b"a,b", "unknown format `.csv`"),
        (tmp_path / "empty.jsonl", b"\n", "no minimal pairs"),
        (tmp_path / "bytes.tsv", b"a\tb\n\xff\tc\n", "not UTF-8"),
        (tmp_path / "long.tsv", b"a" * (1 << 21), "more than 1,048,576 bytes"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(TextError, match=message) as raised:
            read_pairs(path)
        assert str(path) in raised.value.location and raised.value.hint
    (tmp_path / "folder").mkdir()
    with pytest.raises(TextError, match="no minimal pairs"):
        read_pairs(tmp_path / "folder")


# During training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, pairs, and a run that is evaluated on them."""
    home = tmp_path_factory.mktemp("curve")
    (home / "text.txt").write_text("\n".join(LINES * 60))
    (home / "pairs.jsonl").write_text(to_jsonl(PAIRS))
    launch([home / "text.txt"], out=home / "run", settings=[*RUN, evaluates(home)])
    return home


def evaluates(home: Path, every: str = "2 steps") -> str:
    return f"train.evaluate={{pairs = '{home / 'pairs.jsonl'}', every = '{every}', subset = 2}}"


def curve(run: Path) -> list[dict[str, Any]]:
    lines = [line for line in read_log(run / "log.jsonl") if "pairs" in line]
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines]


def test_a_run_logs_the_accuracy_against_the_words_seen(home: Path) -> None:
    lines = curve(home / "run")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line["pairs"]["pairs"] == 3 for line in lines), "two pairs of a paradigm"
    words_per_token = {round(line["words"] / line["tokens"], 2) for line in lines}
    assert len(words_per_token) == 1 and 0.5 < words_per_token.pop() < 1
    assert read_pairs(home / "run" / "pairs.jsonl").pairs == read_pairs(home / "pairs.jsonl", 2).pairs


def test_the_last_evaluation_is_that_of_the_saved_model(home: Path) -> None:
    from unmask.models.model import load

    model = load(home / "run" / "latest")
    found = judge(model, list(read_pairs(home / "run" / "pairs.jsonl").pairs))
    assert json.loads(json.dumps(found.summary())) == curve(home / "run")[-1]["pairs"]


def test_a_resumed_run_logs_the_same(home: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(home / "run", tmp_path / "run", symlinks=True))
    expected = curve(run)
    shutil.rmtree(run / "step-0000006")
    (run / "latest").unlink()
    (run / "latest").symlink_to("step-0000003")
    resume(run)
    assert curve(run) == expected


def test_evaluating_pairs_does_not_change_training(home: Path, tmp_path: Path) -> None:
    launch([home / "text.txt"], out=tmp_path / "run", settings=RUN)
    losses = [
        [line["loss"] for line in read_log(run / "log.jsonl") if "learning_rate" in line]
        for run in (home / "run", tmp_path / "run")
    ]
    assert losses[0] == losses[1] and not curve(tmp_path / "run")


def test_invalid_pairs_end_a_run_before_anything_is_written(home: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"sentence_good": "A.", "sentence_bad": "A."}\n')
    with pytest.raises(TextError, match="identical"):
        launch([home / "text.txt"], out=tmp_path / "run", settings=[*RUN, evaluates(tmp_path)])
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match="expected a fraction, steps or seconds"):
        launch([home / "text.txt"], out=tmp_path / "run", settings=[*RUN, evaluates(home, "2 epochs")])
    with pytest.raises(RecipeError, match="minimal pairs need predictions of tokens"):
        launch([home / "text.txt"], out=tmp_path / "run", settings=[*RUN, evaluates(home), "objective={kind = 'rtd'}"])


def test_a_budget_in_seconds_includes_the_evaluations() -> None:
    stages, every = (
        (StageConfig(batch_size=Quantity(1000, "tokens")),),
        EveryConfig(validate=Fraction(1.0), save=Fraction(1.0)),
    )
    budget, measured = Quantity(100, "seconds"), Measured((1.0,), 0.0, 0.0, pairs_seconds=2.0)
    made = make_plan(stages, budget, every, [100_000], measured, Fraction(0.1))
    assert (made.steps, made.overhead_seconds, made.pairs_seconds) == (80, 20.0, 2.0)
    assert limit_pairs(Fraction(0.1), budget, 2.0) == (Fraction(0.1), "")
    interval, note = limit_pairs(Fraction(0.1), budget, 7.0)
    assert interval == Fraction(0.5) and "2 instead of 10 times" in note
    assert limit_pairs(Quantity(5, "steps"), budget, 50.0)[1] == ""
