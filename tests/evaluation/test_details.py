"""Results by group of masked tokens add up to the whole; calibration is that of known probabilities."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.core.distributed import DistributedContext, init_distributed
from unmask.core.types import SPECIAL, WORD_START
from unmask.evaluation.details import DetailCounter, EvalDetails, evaluate_details
from unmask.evaluation.masked_lm import Document, EvalSet, build_eval_set, evaluate
from unmask.evaluation.validation import evaluate_text
from unmask.models import build_model
from unmask.models.model import Model
from unmask.models.modernbert import ModernBertConfig
from unmask.tokenization.settings import ByteBpeConfig, CharacterConfig, WordPieceConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer

SENTENCES = [
    f"In {1900 + i} the kings, {i % 7} of them, {'slept' if i % 3 else 'walked'} unhappily." for i in range(90)
]
TEXT = "\n".join(SENTENCES)
SETTINGS = [WordPieceConfig(vocab_size=90), ByteBpeConfig(vocab_size=290), CharacterConfig()]
GROUPS = ("by_frequency", "by_place_in_word", "by_position", "by_characters", "by_input")


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda settings: settings.kind)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train_tokenizer([TEXT], request.param)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Model:
    torch.manual_seed(1)
    encoder, head = build_model(
        ModernBertConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=32),
        tokenizer.size,
    )
    return Model(encoder, head, tokenizer, encoder.settings, {"context": 48})


@pytest.fixture(scope="module")
def context() -> DistributedContext:
    return init_distributed("float32", 1)


def eval_set_of(tokenizer: Tokenizer, length: int = 48) -> tuple[EvalSet, np.ndarray]:
    documents = []
    for first in range(0, len(SENTENCES), 30):
        text = "\n".join(SENTENCES[first : first + 30])
        encoded = tokenizer.encode(text, "spaces")
        documents.append(Document(encoded.ids, encoded.marks, len(text), encoded.characters_unknown))
    counts = sum(np.bincount(one.ids, minlength=tokenizer.size) for one in documents)
    assert isinstance(counts, np.ndarray)
    return build_eval_set(documents, tokenizer, length, counts), counts


def test_groups_add_up_to_the_whole_which_is_that_of_evaluate(model: Model, context: DistributedContext) -> None:
    plain = evaluate_text(model, [TEXT], context=context)
    result = evaluate_details(model, [TEXT], context=context)
    assert {name: value for name, value in asdict(result).items() if name != "details"} == asdict(plain)
    for name in GROUPS:
        groups = getattr(result.details, name)
        assert len(groups) > 1 or (name == "by_place_in_word" and model.tokenizer.size < 60), "a group of its own"
        tokens = [group.masked_tokens for group in groups]
        assert sum(tokens) == plain.masked_tokens
        for value in ("loss", "accuracy", "unigram_loss"):
            mean = np.average([getattr(group, value) for group in groups], weights=tokens)
            assert mean == pytest.approx(getattr(plain, value), rel=1e-5), (name, value)
    bins = result.details.calibration.bins
    assert sum(one.masked_tokens for one in bins) == plain.masked_tokens
    mean = np.average([one.accuracy for one in bins], weights=[one.masked_tokens for one in bins])
    assert mean == pytest.approx(plain.accuracy)


def test_groups_are_those_of_a_plain_loop(tokenizer: Tokenizer, model: Model, context: DistributedContext) -> None:
    eval_set, counts = eval_set_of(tokenizer)
    details = details_of(model, eval_set, counts, context)
    order = sorted(tokenizer.regular_token_ids.tolist(), key=lambda token: (-counts[token], token))
    expected: dict[str, dict[str, int]] = {name: {} for name in GROUPS}
    for masked in eval_set.batches:
        batch = masked.batch
        flags, read = batch.token_flags_T.tolist(), batch.ids_T.tolist()
        for b in range(batch.num_samples):
            first, last = batch.offsets[b], batch.offsets[b + 1]
            for at, label in zip(masked.positions_M.tolist(), masked.labels_M.tolist(), strict=True):
                if not first <= at < last:
                    continue
                is_last = at + 1 == last or flags[at + 1] & (WORD_START | SPECIAL)
                place = "whole word" if is_last else "first token of a word"
                rank, position = order.index(label) + 1, at - first + 1
                found = {
                    "by_frequency": band(rank, [10, 100, 1_000]),
                    "by_place_in_word": place if flags[at] & WORD_START else "inner token of a word",
                    "by_position": band(position, [8, 32, 128]),
                    "by_characters": characters(tokenizer.decode([label])),
                    "by_input": "[MASK]"
                    if read[at] == tokenizer.mask_id
                    else ("unchanged" if read[at] == label else "random token"),
                }
                for name, group in found.items():
                    expected[name][group] = expected[name].get(group, 0) + 1
    for name in GROUPS:
        assert {group.name: group.masked_tokens for group in getattr(details, name)} == expected[name]


def band(number: int, lasts: list[int]) -> str:
    first = 1
    for last in lasts:
        if number <= last:
            return f"{first:,} to {last:,}"
        first = last + 1
    raise AssertionError(number)


def characters(text: str) -> str:
    """The class of an ASCII token."""
    if "\ufffd" in text:
        return "other"
    if any(one.isalpha() for one in text):
        return "letters"
    if any(one.isdigit() for one in text):
        return "digits"
    return "punctuation" if text.strip() else "other"


def details_of(model: Model, eval_set: EvalSet, counts: np.ndarray, context: DistributedContext) -> EvalDetails:
    counter = DetailCounter(model.tokenizer, counts)
    result = evaluate(model.encoder, model.head, eval_set, context, on_batch=counter.add)
    return counter.result(result, context).details


def test_a_constant_model_has_the_unigram_loss_and_one_bin(context: DistributedContext) -> None:
    """A head that ignores the encoder predicts the frequencies: one confidence, right as often as the first token."""
    tokenizer = train_tokenizer([TEXT], SETTINGS[0])
    eval_set, counts = eval_set_of(tokenizer)
    encoder, head = build_model(
        ModernBertConfig(
            num_hidden_layers=1,
            hidden_size=32,
            num_attention_heads=2,
            intermediate_size=32,
            tie_word_embeddings=False,
        ),
        tokenizer.size,
    )
    shares = np.zeros(tokenizer.size)
    shares[tokenizer.regular_token_ids] = counts[tokenizer.regular_token_ids] + 1
    shares /= shares.sum()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.bias.copy_(torch.from_numpy(np.log(shares + 1e-30)))
    details = details_of(Model(encoder, head, tokenizer, encoder.settings), eval_set, counts, context)
    for name in GROUPS:
        for group in getattr(details, name):
            assert group.loss == pytest.approx(group.unigram_loss, rel=1e-4)
            assert name != "by_frequency" or not group.name.startswith("11 ") or group.accuracy == 0
    labels = torch.cat([masked.labels_M for masked in eval_set.batches]).numpy()
    accuracy, confidence = (labels == shares.argmax()).mean(), shares.max()
    (one,) = details.calibration.bins
    assert one.lower < confidence <= one.upper and one.masked_tokens == len(labels)
    assert one.confidence == pytest.approx(confidence, rel=1e-4) and one.accuracy == pytest.approx(accuracy)
    assert details.calibration.error == pytest.approx(abs(accuracy - confidence), abs=1e-5)


@settings(max_examples=40)
@given(seed=st.integers(0, 1 << 32), sharpness=st.sampled_from([0.1, 1.0, 3.0, 30.0]), overconfidence=st.booleans())
def test_calibration_is_that_of_the_probabilities(seed: int, sharpness: float, overconfidence: bool) -> None:
    """Labels that are drawn from a model's own probabilities leave an error of sampling noise only."""
    tokenizer = train_tokenizer([TEXT], SETTINGS[2])
    eval_set, counts = eval_set_of(tokenizer)
    generator = np.random.default_rng(seed)
    counter = DetailCounter(tokenizer, counts)
    confidences, correct = [], []
    masked_tokens = 0
    for masked in eval_set.batches:
        labels = masked.labels_M.numpy()
        # A token's probabilities, permuted so that its label is a draw from them.
        logits = sharpness * generator.standard_normal((len(labels), tokenizer.size))
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        for row, label in enumerate(labels.tolist()):
            drawn = generator.choice(tokenizer.size, p=probabilities[row])
            logits[row, [drawn, label]] = logits[row, [label, drawn]]
            confidences.append(probabilities[row].max())
            correct.append(drawn == probabilities[row].argmax())
        masked_tokens += len(labels)
        counter.add(masked, torch.from_numpy(4 * logits if overconfidence else logits).float())
    model = build_model(
        ModernBertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=1, intermediate_size=16),
        tokenizer.size,
    )
    world = init_distributed("float32", 1)
    calibration = counter.result(evaluate(*model, eval_set, world), world).details.calibration
    # The expected error of 15 bins is at most 0.5 √(15 / n), and its standard deviation 0.5 / √n.
    noise = 0.5 * (math.sqrt(15) + 5) / math.sqrt(masked_tokens)
    if overconfidence:
        assert sharpness == 30.0 or calibration.confidence > np.mean(confidences)
        assert calibration.error >= calibration.confidence - np.mean(correct) - 1e-5
        return
    assert calibration.confidence == pytest.approx(np.mean(confidences), rel=1e-4)
    assert calibration.error < noise
    bins = np.ceil(np.array(confidences) * 15)
    gaps = [
        abs(np.sum(np.where(bins == one, confidences, 0)) - np.sum(correct, where=bins == one)) for one in set(bins)
    ]
    assert calibration.error == pytest.approx(sum(gaps) / masked_tokens, abs=1e-4)
    assert abs(calibration.confidence - np.mean(correct)) <= calibration.error + 1e-6, "the error is at least this"


def test_a_file_is_evaluated_like_its_text(model: Model, context: DistributedContext, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    from_file = evaluate_details(model, [tmp_path / "a.txt"], context=context, max_size="1k characters")
    from_text = evaluate_details(model, [TEXT], context=context, max_size=1_000)
    assert from_file == from_text and "calibration error" in repr(from_file)
