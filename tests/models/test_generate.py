"""Iterative unmasking: schedules, sampling, orders, log-probabilities, and the text around the generated tokens."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unmask
from unmask.core.errors import ModelError, RecipeError
from unmask.core.types import SPECIAL, Sample, logits_at, pack
from unmask.models import build_model
from unmask.models.generate import GenerateConfig, Generation, sample_tokens, segments
from unmask.models.model import Model
from unmask.models.modernbert import ModernBertConfig
from unmask.tokenization.settings import (
    ByteBpeConfig,
    ByteConfig,
    CharacterConfig,
    TokenizerConfig,
    UnigramConfig,
    WordPieceConfig,
)
from unmask.tokenization.tokenizer import train_tokenizer

TEXT = "the cat sat on the mat . the players play and the walkers walk . 서울에 간다 . " * 40
KINDS = [
    WordPieceConfig(vocab_size=60),
    ByteBpeConfig(vocab_size=300),
    UnigramConfig(vocab_size=60),
    ByteConfig(),
    CharacterConfig(),
]


def build(kind: TokenizerConfig, context: int = 48, vocab_size: int | None = None) -> Model:
    tokenizer = train_tokenizer([TEXT], kind)
    torch.manual_seed(1)
    shape = ModernBertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=32)
    encoder, head = build_model(shape, vocab_size or tokenizer.size)
    with torch.no_grad():  # so that the predictions differ from token to token
        for parameter in encoder.parameters():
            parameter.mul_(3)
    return Model(encoder, head, tokenizer, shape, {"context": context, "words": "spaces"})


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.kind)
def model(request: pytest.FixtureRequest) -> Model:
    return build(request.param)


@pytest.fixture(scope="module")
def characters() -> Model:
    return build(CharacterConfig())


# Schedules and sampling ----------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.data(), st.sampled_from(["cosine", "linear"]))
def test_a_schedule_sets_every_token_once(length: int, data: st.DataObject, schedule: str) -> None:
    steps = data.draw(st.integers(1, length))
    counts = GenerateConfig(steps=steps, schedule=schedule).counts(length)  # pyright: ignore[reportArgumentType]
    assert sum(counts) == length and len(counts) == steps and min(counts) >= 1
    if schedule == "linear" and length % steps == 0:
        assert counts == [length // steps] * steps
    if schedule == "cosine" and steps * steps <= length:  # enough tokens for every step of the formula
        left = length - np.cumsum(counts)
        expected = [length * math.cos(math.pi * (step + 1) / (2 * steps)) for step in range(steps)]
        assert np.abs(left - expected).max() <= 1 + 1e-6


def test_the_cosine_schedule_sets_few_tokens_at_first() -> None:
    assert GenerateConfig(steps=4).counts(16) == [1, 3, 5, 7]
    assert GenerateConfig(steps=4, schedule="linear").counts(16) == [4, 4, 4, 4]
    assert GenerateConfig().counts(5) == [1, 1, 1, 1, 1]


def reference_probabilities(logs: list[float], config: GenerateConfig) -> list[float]:
    """Temperature, top-k and top-p as plain sums over sorted tokens."""
    weights = [math.exp(log / config.temperature) for log in logs]
    ranked = sorted(range(len(logs)), key=lambda id_: -weights[id_])
    if config.top_k is not None:
        lowest = weights[ranked[min(config.top_k, len(ranked)) - 1]]
        ranked = [id_ for id_ in ranked if weights[id_] >= lowest]
    total, kept, mass = sum(weights[id_] for id_ in ranked), list[int](), 0.0
    for id_ in ranked:
        if mass < config.top_p:
            kept.append(id_)
            mass += weights[id_] / total
    total = sum(weights[id_] for id_ in kept)
    return [weights[id_] / total if id_ in kept else 0.0 for id_ in range(len(logs))]


@settings(deadline=None)
@given(
    st.lists(st.integers(-24, 0).map(lambda number: number / 4), min_size=1, max_size=12, unique=True),
    st.floats(0.2, 3),
    st.none() | st.integers(1, 13),
    st.sampled_from([0.113, 0.512, 0.907, 1.0]),
)
def test_tokens_are_sampled_with_their_probabilities(
    logs: list[float], temperature: float, top_k: int | None, top_p: float
) -> None:
    config = GenerateConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    draws = torch.arange(4000, dtype=torch.float64) / 4000
    ids = sample_tokens(torch.tensor([logs]).expand(4000, -1), draws, config)
    shares = np.bincount(ids.numpy(), minlength=len(logs)) / 4000
    assert np.abs(shares - reference_probabilities(logs, config)).max() <= 2 / 4000


def test_extreme_draws_give_possible_tokens() -> None:
    rows = torch.tensor([[-math.inf, -1.0, -2.0, -math.inf]]).expand(2, -1)
    draws = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample_tokens(rows, draws, GenerateConfig()).tolist() == [1, 2]
    assert sample_tokens(rows, draws, GenerateConfig(temperature=1e-300)).tolist() == [1, 1]


# Generation ----------------------------------------------------------------------------------------------------------


def replay(model: Model, generation: Generation, prefix: list[int], suffix: list[int]) -> tuple[list[int], float]:
    """The final ids and the log-probability of a text, computed step by step, one forward pass for each step."""
    frame, mask_id = model.tokenizer.frame, model.tokenizer.mask_id
    ids = [mask_id] * len(generation.ids)
    logs = [0.0] * len(ids)
    for step in generation.steps:
        for position in step.positions:
            ids[position] = mask_id
        first = len(frame.before) + len(prefix)
        sequence = [*frame.before, *prefix, *ids, *suffix, *frame.after]
        (rows,) = model.log_probabilities([sequence], [[first + position for position in step.positions]])
        for position, id_, row in zip(step.positions, step.ids, rows, strict=True):
            ids[position], logs[position] = id_, row[id_].item()
    return ids, sum(logs)


@pytest.mark.parametrize("order", ["confidence", "random", "gibbs", "left-to-right"])
@pytest.mark.parametrize("steps", [None, 3])
def test_log_probabilities_are_those_of_the_steps(characters: Model, order: str, steps: int | None) -> None:
    encode = characters.tokenizer.encode
    found = unmask.generate(characters, "the cat ", " mat", length=9, num=3, order=order, steps=steps, seed=4)
    for generation in found:
        ids, log_probability = replay(
            characters, generation, encode("the cat ").ids.tolist(), encode(" mat").ids.tolist()
        )
        assert tuple(ids) == generation.ids
        assert log_probability == pytest.approx(generation.log_probability, abs=1e-4)


def test_each_order_sets_every_position(characters: Model) -> None:
    for order, sweeps in (("confidence", None), ("random", None), ("gibbs", None), ("gibbs", 3)):
        (one,) = unmask.generate(characters, length=10, order=order, sweeps=sweeps, steps=4)
        times = 1 + (sweeps or 1) * (order == "gibbs")
        assert len(one.steps) == 4 * times
        for sweep in range(times):
            positions = [position for step in one.steps[4 * sweep : 4 * sweep + 4] for position in step.positions]
            assert sorted(positions) == list(range(10))
    first, second = unmask.generate(characters, length=10, num=2, order="random")
    assert [step.positions for step in first.steps] != [step.positions for step in second.steps]


def test_left_to_right_follows_the_text(characters: Model) -> None:
    for one in unmask.generate(characters, "the ", length=10, num=2, order="left-to-right", steps=4):
        assert [position for step in one.steps for position in step.positions] == list(range(10))
        assert len(one.steps) == 4


def causal(model: Model) -> Model:
    """A copy that predicts each token from those before it, as a model trained with that objective."""
    encoder = copy.deepcopy(model.encoder)
    encoder.label_offset = 1
    return replace(model, encoder=encoder, card={**model.card, "objective": "causal"})


def test_a_causal_model_continues_a_text(model: Model) -> None:
    found = unmask.generate(causal(model), "the cat ", length=8, num=3, seed=2)
    for one in found:
        assert [step.positions for step in one.steps] == [(position,) for position in range(8)]
        # One pass over the whole text with causal attention gives the probability of each token after those before it.
        (ids,) = model.tokenizer.encode_prompts(["the cat " + model.tokenizer.id_to_token(model.tokenizer.mask_id)])
        given = [*model.tokenizer.frame.before, *ids[:-1]]
        batch = replace(
            pack([Sample(np.array([*given, *one.ids]), np.full(len(given) + 8, SPECIAL, np.uint8))]), is_causal=True
        )
        with torch.inference_mode():
            logits = logits_at(model.encoder, model.head, batch, torch.arange(len(given) - 1, len(given) + 7))
        logs = logits.log_softmax(-1)[range(8), one.ids]
        assert one.log_probability == pytest.approx(logs.sum().item(), abs=1e-4)
    assert len({one.ids for one in found}) == 3
    (shorter,) = unmask.generate(causal(model), "the cat ", length=5, seed=2)
    assert shorter.ids == found[0].ids[:5]  # what follows is not seen


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"order": "random"}, "can't take order"),
        ({"steps": 4}, "can't take steps"),
        ({"suffix": "mat"}, "can't take suffix"),
    ],
)
def test_a_causal_model_has_one_order_and_no_suffix(characters: Model, options: dict[str, object], says: str) -> None:
    with pytest.raises(ModelError, match=f"from left to right.*{says}") as caught:
        unmask.generate(causal(characters), "the ", length=8, **options)  # pyright: ignore[reportArgumentType]
    assert caught.value.hint


def test_a_position_is_sampled_again_with_another_draw(characters: Model) -> None:
    (one,) = unmask.generate(characters, "the ", length=1, order="gibbs", sweeps=20)
    assert len({step.ids for step in one.steps}) > 3


def test_the_most_confident_tokens_are_set_first(characters: Model) -> None:
    mask_id, frame = characters.tokenizer.mask_id, characters.tokenizer.frame
    (one,) = unmask.generate(characters, length=12, steps=4, top_k=1)
    ids = [mask_id] * 12
    allowed = torch.from_numpy(characters.tokenizer.regular_token_ids)
    for step in one.steps:
        masked = [position for position, id_ in enumerate(ids) if id_ == mask_id]
        (rows,) = characters.log_probabilities(
            [[*frame.before, *ids, *frame.after]], [[len(frame.before) + position for position in masked]]
        )
        highest = rows[:, allowed].max(dim=1)
        confident = highest.values.topk(len(step.positions)).indices.tolist()
        assert {masked[row] for row in confident} == set(step.positions)
        for position, id_ in zip(step.positions, step.ids, strict=True):
            assert id_ == allowed[highest.indices[masked.index(position)]]
            ids[position] = id_


def test_special_tokens_are_never_generated(model: Model) -> None:
    found = unmask.generate(model, "the", "mat", length=20, num=6, temperature=3.0, steps=5)
    generated = {id_ for one in found for id_ in one.ids}
    assert len(generated) > 20
    assert generated <= set(model.tokenizer.regular_token_ids.tolist())


@pytest.mark.parametrize("order", ["confidence", "random", "gibbs", "left-to-right"])
def test_a_sample_depends_on_seed_and_number_only(model: Model, order: str) -> None:
    one, *others = unmask.generate(model, "the", length=8, num=5, seed=3, order=order)
    assert [one.ids] == [each.ids for each in unmask.generate(model, "the", length=8, seed=3, order=order)]
    assert len({each.ids for each in [one, *others]}) == 5
    assert one.ids != unmask.generate(model, "the", length=8, seed=4, order=order)[0].ids


def test_predictions_are_computed_in_parts() -> None:
    """With 100,000 rows in the embedding, 90 of 400 rows of predictions are computed together."""
    model = build(WordPieceConfig(vocab_size=60), context=256, vocab_size=100_000)
    found = unmask.generate(model, length=200, num=2, steps=1, top_k=1)
    frame, mask_id = model.tokenizer.frame, model.tokenizer.mask_id
    sequence = [*frame.before, *[mask_id] * 200, *frame.after]
    (rows,) = model.log_probabilities([sequence], [list(range(1, 201))])
    allowed = torch.from_numpy(model.tokenizer.regular_token_ids)
    expected = allowed[rows[:, allowed].argmax(dim=1)].tolist()
    assert [list(one.ids) for one in found] == [expected, expected]


def test_progress_is_reported(characters: Model) -> None:
    seen: list[float] = []
    unmask.generate(characters, length=4, on_progress=lambda task, fraction: seen.append(fraction))
    assert seen == [0.25, 0.5, 0.75, 1.0]


# Text ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefix", "suffix"), [("", ""), ("the cat ", " the mat ."), ("서울", ""), ("", "mat")])
def test_characters_are_joined_as_they_are(characters: Model, prefix: str, suffix: str) -> None:
    for one in unmask.generate(characters, prefix, suffix, length=9, num=4):
        assert one.text == prefix + "".join(one.tokens) + suffix


@pytest.mark.parametrize(("prefix", "suffix"), [("", ""), ("the cat", "the mat ."), ("the ", " mat"), ("서울", "")])
def test_the_text_has_the_tokens_of_the_model(model: Model, prefix: str, suffix: str) -> None:
    tokenizer = model.tokenizer
    for one in unmask.generate(model, prefix, suffix, length=6, num=8):
        assert one.text.startswith(prefix.rstrip(" ")) and one.text.endswith(suffix)
        middle = one.text.removeprefix(prefix.rstrip(" ")).removesuffix(suffix)
        letters = "".join(middle.split())
        decoded = "".join(tokenizer.decode(one.ids).split())
        assert letters == (decoded if prefix else decoded.removeprefix("##")) or one.tokens[0].startswith("##")


def test_words_are_separated_by_spaces() -> None:
    model = build(WordPieceConfig(vocab_size=60))
    formatter_texts = set[str]()
    for one in unmask.generate(model, "the cat", "the mat .", length=1, num=60, temperature=3.0):
        (token,) = one.tokens
        formatter_texts.add(one.text)
        if token.startswith("##"):
            assert one.text == f"the cat{token[2:]} the mat ."
        elif token == ".":
            assert one.text == "the cat. the mat ."
        else:
            assert one.text == f"the cat {token} the mat ."
    assert len(formatter_texts) > 5


def test_a_space_before_the_masks_is_not_doubled() -> None:
    for kind in (ByteBpeConfig(vocab_size=300), UnigramConfig(vocab_size=60)):
        model = build(kind)
        plain, spaced = (
            unmask.generate(model, text, length=1, num=200, temperature=3.0) for text in ("the cat", "the cat ")
        )
        assert [one.text for one in plain] == [one.text for one in spaced]
        assert any(one.text.startswith("the cat ") for one in plain)


def test_segments_add_up_to_the_text(model: Model) -> None:
    for order in ("confidence", "gibbs"):
        (one,) = unmask.generate(model, "the cat", "the mat .", length=7, order=order, steps=3)
        steps = list(segments(model, one))
        assert len(steps) == len(one.steps)
        assert "".join(segment.text for segment in steps[-1]) == one.text or "\ufffd" in one.text
        assert any(segment.state == "mask" for segment in steps[0])
        assert all(any(segment.state == "new" for segment in step) for step in steps)
        assert not any(segment.state == "mask" for segment in steps[-1])


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"length": 0}, "invalid length: got 0"),
        ({"length": 47}, "47 tokens can't be generated"),
        ({"num": 0}, "invalid num: got 0"),
        ({"num": 10**9}, "invalid num"),
        ({"steps": 0}, "invalid steps: got 0"),
        ({"steps": 21}, "invalid steps: got 21, expected 1 to 20"),
        ({"temperature": 0.0}, "invalid temperature: got 0.0"),
        ({"temperature": -1.0}, "invalid temperature"),
        ({"temperature": math.nan}, "invalid temperature"),
        ({"temperature": math.inf}, "invalid temperature"),
        ({"top_p": 0.0}, "invalid top_p: got 0.0"),
        ({"top_p": 1.5}, "invalid top_p: got 1.5"),
        ({"top_p": math.nan}, "invalid top_p"),
        ({"top_k": 0}, "invalid top_k: got 0"),
        ({"sweeps": 2}, "only the order 'gibbs' has sweeps"),
        ({"order": "gibbs", "sweeps": 0}, "invalid sweeps: got 0"),
        ({"prefix": "a [MASK]"}, r"the prefix contains \[MASK\]"),
        ({"suffix": "[MASK] b"}, r"the suffix contains \[MASK\]"),
    ],
)
def test_invalid_options_are_named(characters: Model, options: dict[str, object], says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        unmask.generate(characters, **options)  # pyright: ignore[reportArgumentType]
    assert caught.value.hint


def test_the_whole_context_can_be_generated(characters: Model) -> None:
    (one,) = unmask.generate(characters, length=46, steps=2)
    assert len(one.ids) == 46
    with pytest.raises(ModelError, match="43 tokens can't be generated") as caught:
        unmask.generate(characters, "the ", length=43)
    assert caught.value.hint == "reduce length to 42"
    with pytest.raises(ModelError, match="1 tokens can't be generated") as caught:
        unmask.generate(characters, "the " * 20, length=1)
    assert caught.value.hint == "shorten the given text"


def test_an_unknown_keyword_is_named(characters: Model) -> None:
    with pytest.raises(RecipeError, match="unknown keyword `temprature`") as caught:
        unmask.generate(characters, temprature=0.5)  # pyright: ignore[reportCallIssue]
    assert "temperature" in caught.value.hint


@pytest.mark.parametrize("objective", ["causal", "rtd"])
def test_a_model_without_masked_predictions_is_refused(characters: Model, objective: str) -> None:
    other = replace(characters, card={**characters.card, "objective": objective})
    calls = [
        lambda: unmask.fill(other, "a [MASK]"),
        lambda: unmask.fill_jointly(other, "a [MASK]"),
    ]
    if objective == "rtd":  # a causal model generates, but fills nothing
        calls.append(lambda: unmask.generate(other))
    for call in calls:
        with pytest.raises(ModelError, match=f"this model can't .*: the objective '{objective}' trains no predictions"):
            call()
    trained = replace(characters, card={**characters.card, "objective": "mlm"})
    assert unmask.fill(trained, "a [MASK]") == unmask.fill(characters, "a [MASK]")
