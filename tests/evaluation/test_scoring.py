"""Pseudo-log-likelihood: the figures of minicons, a plain computation, what the scores of words and texts add up to."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unmask
from unmask.core.distributed import DistributedContext
from unmask.core.errors import ModelError, TextError
from unmask.evaluation import scoring
from unmask.evaluation.scoring import METHODS, Method, TextScore, total
from unmask.models import build_model
from unmask.models.model import Model
from unmask.models.modernbert import ModernBertConfig
from unmask.tokenization.settings import ByteBpeConfig, CharacterConfig, UnigramConfig, WordPieceConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer
from unmask.tokenization.words import word_starts

ROOT = Path(__file__).parents[2]
STORED = json.loads((ROOT / "tests" / "evaluation" / "minicons.json").read_text(encoding="utf-8"))
LINES = ("the cat sat on the mat and looked at the moon .", "a dog ran over the hill to meet the old man .")
KINDS = {
    "characters": CharacterConfig(min_frequency=1),
    "wordpiece": WordPieceConfig(vocab_size=70),
    "bpe": ByteBpeConfig(vocab_size=290),
    "unigram": UnigramConfig(vocab_size=60),
}


ONE_THREAD = DistributedContext(torch.device("cpu"), "float32", 1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def score(model: Model, texts: str | Sequence[str], method: Method = "within-word", **options: Any) -> list[TextScore]:
    return scoring.score(model, texts, method, context=ONE_THREAD, **options)


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    specification = importlib.util.spec_from_file_location("scoring", ROOT / "benchmarks" / "scoring.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["scoring"] = module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["scoring"]


def random_model(tokenizer: Tokenizer, context: int = 64, **card: Any) -> Model:
    torch.manual_seed(5)
    shape = ModernBertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48)
    encoder, head = build_model(shape, tokenizer.size)
    with torch.no_grad():
        for parameter in (*encoder.parameters(), *head.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    encoder.label_offset = int(card.get("objective") in ("causal", "mntp"))
    return Model(encoder.eval(), head.eval(), tokenizer, shape, {"context": context, **card})  # pyright: ignore


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {kind: random_model(train_tokenizer(LINES * 20, config)) for kind, config in KINDS.items()}


# Against minicons and a plain computation -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", STORED["cases"])
def test_each_token_has_the_score_of_minicons(benchmark: ModuleType, name: str, method: Method) -> None:
    case = STORED["cases"][name]
    inner = tokenizers.Tokenizer.from_str(json.dumps(STORED["tokenizers"][case["tokenizer"]]))
    model = benchmark.open_case(name, Tokenizer(inner))
    scores = score(model, STORED["texts"], method, words="tokenizer")
    for found, expected in zip(scores, case["log_probabilities"][method], strict=True):
        mine = [token.log_probability for word in found.words for token in word.tokens]
        assert mine == pytest.approx(expected, abs=1e-4)
        assert found.log_probability == pytest.approx(sum(expected), abs=1e-4)


def test_the_stored_figures_tell_the_methods_apart() -> None:
    for case in STORED["cases"].values():
        sums = [[sum(row) for row in case["log_probabilities"][method]] for method in METHODS]
        assert max(abs(a - b) for a, b in zip(*sums, strict=True)) > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_each_token_is_predicted_with_its_mask_alone(models: dict[str, Model], kind: str, method: Method) -> None:
    """The batched scores equal those of one sequence at a time."""
    model = models[kind]
    for found in score(model, ["the cat sat on the moon .", "mat"], method):
        encoded = model.tokenizer.encode(found.text, model.words)
        ends = [int(end) for word in _word_ranges(encoded.marks) for end in [word[1]] * (word[1] - word[0])]
        before, after = model.tokenizer.frame.before, model.tokenizer.frame.after
        tokens = [token for word in found.words for token in word.tokens]
        assert len(tokens) == len(encoded.ids)
        for at, token in enumerate(tokens):
            last = ends[at] if method == "within-word" else at + 1
            ids = [*before, *encoded.ids.tolist(), *after]
            ids[len(before) + at : len(before) + last] = [model.tokenizer.mask_id] * (last - at)
            (rows_NV,) = model.log_probabilities([ids], [[len(before) + at]])
            assert token.log_probability == pytest.approx(float(rows_NV[0, encoded.ids[at]]), abs=2e-5)


def _word_ranges(marks: np.ndarray) -> list[tuple[int, int]]:
    firsts = [at for at in range(len(marks)) if at == 0 or marks[at] & 1]
    return list(zip(firsts, [*firsts[1:], len(marks)], strict=True))


# What adds up ---------------------------------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from(["the", "cat", "moon", "hilltop", ".", "don't", "over"]), min_size=1, max_size=12)


# "hilltop" alone is [UNK] for WordPiece, and can't be scored.
TEXTS = st.lists(WORDS.map(lambda words: " ".join(["the", *words])), min_size=1, max_size=4)


@given(TEXTS, st.sampled_from(METHODS), st.sampled_from(sorted(KINDS)))
@settings(max_examples=12, deadline=None)
def test_texts_are_the_sums_of_words_and_words_of_tokens(
    models: dict[str, Model], texts: list[str], method: Method, kind: str
) -> None:
    scores = score(models[kind], texts, method)
    for text, found in zip(texts, scores, strict=True):
        words = [word for word in found.words if word.log_probability is not None]
        for word in words:
            tokens = [token.log_probability for token in word.tokens if token.log_probability is not None]
            assert word.log_probability == pytest.approx(sum(tokens))
            assert word.surprisal == pytest.approx(-sum(tokens) / math.log(2))
        assert found.log_probability == pytest.approx(sum(word.log_probability or 0.0 for word in words))
        assert found.surprisal == pytest.approx(found.bits_per_character * found.characters)
        assert math.log2(found.pseudo_perplexity) == pytest.approx(found.surprisal / found.num_words)
        if not found.unknown_tokens:
            assert found.num_words == word_starts(text, "spaces").sum()
            assert found.characters == len(text)
    summed = total(scores)
    assert summed.surprisal == pytest.approx(sum(found.surprisal for found in scores))
    assert summed.num_words == sum(found.num_words for found in scores)


def test_words_of_one_token_have_one_score_by_both_methods(models: dict[str, Model]) -> None:
    scores = [score(models["wordpiece"], LINES[0], method)[0] for method in METHODS]
    for original, within in zip(scores[0].words, scores[1].words, strict=True):
        if len(original.tokens) == 1:
            assert original == within
    assert any(len(word.tokens) > 1 for word in scores[0].words), "the text has a word of several tokens"
    assert scores[0].log_probability != scores[1].log_probability


def test_a_score_does_not_depend_on_the_other_texts(models: dict[str, Model]) -> None:
    model = models["bpe"]
    together = score(model, [*LINES, *LINES[::-1], "the mat"])
    alone = score(model, LINES[0])[0]
    assert together[0].log_probability == together[3].log_probability == pytest.approx(alone.log_probability, abs=1e-4)


# Long texts -----------------------------------------------------------------------------------------------------------


def test_a_long_text_is_scored_in_windows_around_its_words() -> None:
    """Words near the middle of a window of the whole context see the same tokens as in a text of their own."""
    tokenizer = train_tokenizer(LINES * 20, CharacterConfig(min_frequency=1))
    model = random_model(tokenizer, context=24)
    text = " ".join(LINES) + " mooooooooooooooooooooooooooooooooooooon"
    found = score(model, text)[0]
    assert found.num_tokens == len(tokenizer.encode(text).ids) > 100
    length = 24 - tokenizer.num_special_tokens()
    word = next(word for word in found.words if word.word == "looked")
    first = text.index(" looked") if word.tokens[0].token == " " else text.index("looked")
    start = first + len(word.tokens) // 2 - length // 2
    inside = score(model, text[start : start + length])[0]
    same = next(each for each in inside.words if each.word == "looked")
    assert word.log_probability == pytest.approx(same.log_probability, abs=1e-4)
    assert found.words[-1].word.startswith("mooo"), "a word may be longer than the context"
    assert all(token.log_probability is not None for token in found.words[-1].tokens)


# [UNK] and bad input --------------------------------------------------------------------------------------------------


def test_unknown_tokens_are_reported_and_not_scored(models: dict[str, Model]) -> None:
    known, unknown = score(models["wordpiece"], ["the cat sat", "the 漢 sat"])
    assert known.unknown_tokens == 0 and unknown.unknown_tokens == 1
    assert [word.surprisal is None for word in unknown.words] == [False, True, False]
    assert unknown.num_words == 2 and unknown.characters == len("the 漢 sat") - 1
    with pytest.raises(TextError, match=r"all of it is \[UNK\]") as raised:
        score(models["wordpiece"], ["the cat", "漢"])
    assert "text 2" in raised.value.location and raised.value.hint
    with pytest.raises(TextError, match="blank"):
        score(models["wordpiece"], "  ")


def test_the_mask_token_in_a_text_is_plain_text(models: dict[str, Model]) -> None:
    text = "the [MASK] sat"
    for words in (None, "tokenizer"):
        found = score(models["bpe"], text, words=words)[0]
        assert found.num_tokens == len(models["bpe"].tokenizer.encode(text).ids) > 3


@pytest.mark.parametrize("objective", ["causal", "mntp"])
def test_a_model_that_predicts_the_next_token_is_scored_from_the_position_before(objective: str) -> None:
    tokenizer = train_tokenizer(LINES * 20, WordPieceConfig(vocab_size=70))
    model = random_model(tokenizer, objective=objective)
    found = score(model, ["the cat sat on the mat", "the cat sat on the moon"], "original")
    first = [[token.log_probability for word in each.words for token in word.tokens][:3] for each in found]
    if objective == "causal":
        assert first[0] == pytest.approx(first[1], abs=1e-5), "tokens to the right are not seen"
    else:
        assert first[0] != pytest.approx(first[1], abs=1e-5)
    plain = score(random_model(tokenizer), "the cat sat on the mat", "original")[0]
    assert plain.log_probability != pytest.approx(found[0].log_probability, abs=1e-3)


@pytest.mark.parametrize("repeats", [1, 40])
def test_a_causal_model_is_scored_in_windows_that_overlap_by_half(repeats: int) -> None:
    """Each token has the probability that the text before it gives, of which at least half of the context is seen."""
    tokenizer = train_tokenizer(LINES * 20, WordPieceConfig(vocab_size=70))
    model = random_model(tokenizer, objective="causal")
    text = " ".join(LINES * repeats)
    ids = tokenizer.encode(text).ids.tolist()
    before, length = tokenizer.frame.before, model.context - len([*tokenizer.frame.before, *tokenizer.frame.after])
    assert (len(ids) > 3 * length) == (repeats > 1)
    found = score(model, [text, "the cat"], "within-word")[0]
    tokens = [token.log_probability for word in found.words for token in word.tokens]
    half = length // 2
    for number in range(0, len(ids), 7):
        start = 0 if number < length else (number - length) // half * half + half
        sequence = [*before, *ids[start : number + 1]]
        row = model.log_probabilities([sequence], [[len(sequence) - 1]])[0][0]
        assert tokens[number] == pytest.approx(row[ids[number]].item(), abs=1e-5)
        assert number < length or half <= number - start < length


def test_a_next_token_model_needs_a_token_before_the_text() -> None:
    tokenizer = train_tokenizer(LINES * 20, CharacterConfig(min_frequency=1))
    spec = json.loads(tokenizer.to_json())
    spec["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    bare = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)))
    with pytest.raises(ModelError, match="puts none before a text"):
        score(random_model(bare, objective="causal"), "the cat")


def test_a_discriminator_has_no_scores(models: dict[str, Model]) -> None:
    with pytest.raises(ModelError, match="can't score texts"):
        score(random_model(models["bpe"].tokenizer, objective="rtd"), "the cat")


def test_the_public_function_returns_the_same(models: dict[str, Model]) -> None:
    assert unmask.score(models["unigram"], LINES[0], context=ONE_THREAD) == score(models["unigram"], [LINES[0]])
    assert "pseudo-perplexity" in repr(score(models["unigram"], LINES[0])[0])
