"""Fill-mask predictions (several masks, long texts, continued words), and loading and saving of models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import unmask
from unmask.core.errors import DamagedError, ModelError
from unmask.models import build_model
from unmask.models.model import Model, save_model
from unmask.models.modernbert import ModernBertConfig
from unmask.tokenization.settings import (
    ByteBpeConfig,
    ByteConfig,
    CharacterConfig,
    UnigramConfig,
    WordPieceConfig,
)
from unmask.tokenization.tokenizer import train_tokenizer

TEXT = (
    "the player plays and the walker walks . playing and walking are played and walked by players and walkers . " * 30
)


@pytest.fixture(scope="module", params=["wordpiece", "characters"])
def model(request: pytest.FixtureRequest) -> Model:
    settings = WordPieceConfig(vocab_size=50) if request.param == "wordpiece" else CharacterConfig()
    tokenizer = train_tokenizer([TEXT], settings)
    torch.manual_seed(1)
    shape = ModernBertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48)
    encoder, head = build_model(shape, tokenizer.size)
    return Model(encoder, head, tokenizer, shape, {"context": 24, "words": "spaces"})


def test_several_masks_in_one_text(model: Model) -> None:
    text = "the [MASK] and the [MASK] ."
    one = unmask.fill(model, text, top=4)[0]
    assert one.text == text and len(one.masks) == 2
    for order, mask in enumerate(one.masks):
        probabilities = [candidate.score for candidate in mask.candidates]
        assert probabilities == sorted(probabilities, reverse=True) and len(probabilities) == 4
        for candidate in mask.candidates:
            assert candidate.sequence.count("[MASK]") == 1
            assert model.tokenizer.token_to_id(candidate.token_str) == candidate.id
            if not candidate.token_str.startswith("##"):
                parts = text.split("[MASK]")
                assert candidate.sequence == (
                    "[MASK]".join(parts[: order + 1]) + candidate.token_str + "[MASK]".join(parts[order + 1 :])
                )


def test_scores_equal_log_probabilities(model: Model) -> None:
    one = unmask.fill(model, "the [MASK] walks", top=3)[0].masks[0]
    encoded = model.tokenizer.encode("the [MASK] walks", "spaces", specials_in_text=True)
    ids, _ = model.tokenizer.add_special_tokens(encoded.ids, encoded.marks)
    assert ids[one.position] == model.tokenizer.mask_id
    row = model.log_probabilities([ids.tolist()], [[one.position]])[0][0]
    assert row.exp().sum() == pytest.approx(1.0, abs=1e-5)
    assert [row.exp()[c.id].item() for c in one.candidates] == pytest.approx([c.score for c in one.candidates])
    regular_token_ids = torch.from_numpy(model.tokenizer.regular_token_ids)
    assert one.candidates[0].id == int(regular_token_ids[row[regular_token_ids].argmax()])


def test_a_token_that_continues_a_word_is_joined(model: Model) -> None:
    if model.tokenizer.token_to_id("##ing") is None and model.tokenizer.cls_sep_ids is not None:
        pieces = [p for p in ("##s", "##er", "##ed") if model.tokenizer.token_to_id(p) is not None]
    else:
        pieces = ["##ing"] if model.tokenizer.token_to_id("##ing") is not None else []
    everything = unmask.fill(model, "play [MASK] now", top=model.tokenizer.size)[0].masks[0].candidates
    for candidate in everything:
        if candidate.token_str in pieces:
            assert candidate.sequence == f"play{candidate.token_str[2:]} now"


def test_special_tokens_are_not_predicted(model: Model) -> None:
    candidates = unmask.fill(model, "play [MASK] now", top=model.tokenizer.size)[0].masks[0].candidates
    assert {one.id for one in candidates} == set(model.tokenizer.regular_token_ids.tolist())


def test_a_text_longer_than_the_context_is_windowed(model: Model) -> None:
    long = "and the walker walks " * 40 + "[MASK]" + " by players and walkers" * 40
    filled = unmask.fill(model, [long, "a short [MASK]"], top=2)
    assert len(filled[0].masks) == 1 and filled[0].masks[0].position > 24 and len(filled[1].masks) == 1
    near = "and the walker walks " * 30 + "[MASK]" + " by players and walkers" * 35
    assert unmask.fill(model, near, top=2)[0].masks[0].candidates[0].score == pytest.approx(
        filled[0].masks[0].candidates[0].score, rel=1e-4
    ), "only what stands around the mask within the context counts"


@pytest.mark.parametrize("text", ["no blank here", ["fine [MASK]", "not fine"], ""])
def test_no_mask_is_refused(model: Model, text: str | list[str]) -> None:
    with pytest.raises(ModelError, match=r"no \[MASK\] in the text"):
        unmask.fill(model, text)


@pytest.mark.parametrize("top", [0, -1, 10**6])
def test_top_has_limits(model: Model, top: int) -> None:
    with pytest.raises(ModelError, match="top"):
        unmask.fill(model, "a [MASK]", top=top)


def test_invalid_ids_and_positions_are_refused(model: Model) -> None:
    size = model.tokenizer.size
    wrong = [
        ([[size]], [[0]], "invalid id"),
        ([[-1]], [[0]], "invalid id"),
        ([[1, 2]], [[2]], "invalid position: got 2"),
        ([[]], [[]], "is empty"),
        ([[1]], [[0], [0]], "invalid positions: got 2 lists for 1 sequences"),
    ]
    for ids, at, words in wrong:
        with pytest.raises(ModelError, match=words):
            model.log_probabilities(ids, at)
    assert [tuple(t.shape) for t in model.log_probabilities([[1, 2, 3], [1]], [[0, 0, 2], []])] == [
        (3, size),
        (0, size),
    ]


def test_a_sequence_does_not_depend_on_its_neighbors(model: Model) -> None:
    ids = [list(range(1, n)) for n in (4, 20, 9, 13)]
    together = model.log_probabilities(ids, [[1]] * 4)
    for one, answer in zip(ids, together, strict=True):
        torch.testing.assert_close(model.log_probabilities([one], [[1]])[0], answer, rtol=0, atol=1e-5)


def test_a_saved_model_predicts_the_same(model: Model, tmp_path: Path) -> None:
    save_model(tmp_path / "m", model)
    assert sorted(file.name for file in (tmp_path / "m").iterdir()) == [
        "card.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    again = unmask.load(tmp_path / "m")
    assert again.context == 24 and again.settings == model.settings
    assert unmask.fill(again, "the [MASK] walks") == unmask.fill(model, "the [MASK] walks")


def test_transformers_loads_a_saved_model_with_equal_logits(model: Model, tmp_path: Path) -> None:
    """No missing weights, and the same logits."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    save_model(tmp_path / "m", model)
    hf_model, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = AutoTokenizer.from_pretrained(tmp_path / "m")("the player walks and plays")["input_ids"]
    with torch.no_grad():
        logits = hf_model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
    predicted = model.log_probabilities([ids], [list(range(len(ids)))])[0]
    torch.testing.assert_close(predicted, logits, rtol=0, atol=1e-4)


def test_a_model_saved_by_transformers_can_be_loaded(model: Model, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    save_model(tmp_path / "predicted", model)
    AutoModelForMaskedLM.from_pretrained(tmp_path / "predicted").save_pretrained(tmp_path / "hf_model")
    AutoTokenizer.from_pretrained(tmp_path / "predicted").save_pretrained(tmp_path / "hf_model")
    again = unmask.load(tmp_path / "hf_model")
    assert not again.card and again.tokenizer.size == model.tokenizer.size
    ids = [list(range(1, 20))]
    torch.testing.assert_close(
        again.log_probabilities(ids, [[3]])[0], model.log_probabilities(ids, [[3]])[0], rtol=0, atol=1e-6
    )


def test_a_directory_without_a_model_is_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the path doesn't exist"):
        unmask.load(tmp_path / "none")
    with pytest.raises(ModelError, match=r"config\.json"):
        unmask.load(tmp_path)
    save_model(tmp_path / "m", model)
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(DamagedError, match=r"model\.safetensors"):
        unmask.load(tmp_path / "m")
    weights.unlink()
    with pytest.raises(ModelError, match="pickle files"):
        unmask.load(tmp_path / "m")


# What a filled text reads like, for every kind -----------------------------------------------------------------------

SPOKEN = "the cat sat on the mat . 서울에 간다 . 서울은 크다 . 집에서 간다 . 天氣很好，我們去公園。 " * 40
SENTENCES = (
    "sat on the [MASK].",
    "[MASK] cat sat",
    "서울[MASK] 간다",
    "[MASK]에서 간다",
    "天[MASK]很好",
    "on [MASK] [MASK] .",
)


@pytest.fixture(
    scope="module",
    params=[
        WordPieceConfig(vocab_size=60),
        ByteBpeConfig(vocab_size=330),
        UnigramConfig(vocab_size=60),
        ByteConfig(),
        CharacterConfig(),
    ],
    ids=lambda value: value.kind,
)
def speaker(request: pytest.FixtureRequest) -> Model:
    tokenizer = train_tokenizer([SPOKEN], request.param)
    torch.manual_seed(1)
    shape = ModernBertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16)
    encoder, head = build_model(shape, tokenizer.size)
    return Model(encoder, head, tokenizer, shape, {"context": 64, "words": "spaces"})


@pytest.mark.parametrize("sentence", SENTENCES)
def test_spaces_around_a_mask(speaker: Model, sentence: str) -> None:
    (one,) = unmask.fill(speaker, [sentence], top=speaker.tokenizer.size)
    before, after = sentence.split("[MASK]", 1)
    for candidate in one.masks[0].candidates:
        letters = candidate.shown.removeprefix("##").strip("␣")
        assert candidate.sequence.startswith(before.rstrip(" ")) and candidate.sequence.endswith(after)
        assert letters in candidate.sequence and (not letters or "  " not in candidate.sequence)
        assert not set(candidate.shown) & set("Ġ▁")
        if candidate.shown.startswith("␣") and before and letters:
            assert candidate.sequence == f"{before.rstrip(' ')} {letters}{after}"


def test_a_word_with_its_space(speaker: Model) -> None:
    (one,) = unmask.fill(speaker, "sat on the [MASK].", top=speaker.tokenizer.size)
    texts = {candidate.shown: candidate.sequence for candidate in one.masks[0].candidates}
    is_spelled = speaker.tokenizer.size in (261, 5 + len(set(SPOKEN)))  # bytes or characters
    assert texts["c" if is_spelled else "␣cat" if "␣cat" in texts else "cat"] == (
        "sat on the c." if is_spelled else "sat on the cat."
    )
    assert not any("\ufffd" in shown for shown in texts), "bytes that are no letter are shown as numbers"


def test_a_mask_after_a_letter_continues_the_word(speaker: Model) -> None:
    candidates = unmask.fill(speaker, "서울[MASK] 간다", top=speaker.tokenizer.size)[0].masks[0].candidates
    assert candidates and all(candidate.sequence.startswith("서울") for candidate in candidates)
    assert not any(candidate.shown.startswith("␣") and len(candidate.shown) > 1 for candidate in candidates)
    texts = {candidate.sequence for candidate in candidates}
    assert "서울에 간다" in texts or "⟨EC⟩" in {candidate.shown for candidate in candidates}
    if speaker.tokenizer.token_to_id("##에") is not None:
        assert not any(candidate.token_str == "cat" for candidate in candidates), "a new word needs a space"


def test_letters_after_a_mask_continue_its_word(speaker: Model) -> None:
    tokenizer = speaker.tokenizer
    following = tokenizer.token_to_id("##에")
    if following is None:
        encoded = tokenizer.encode("[MASK]에 간다", specials_in_text=True)
        assert not tokenizer.id_to_token(int(encoded.ids[1])).startswith(("▁", "Ġ"))
        ids = encoded.ids
    else:
        ids = np.array([tokenizer.mask_id, following, *tokenizer.encode("간다").ids])
    framed, _ = tokenizer.add_special_tokens(ids, np.zeros(len(ids), dtype=np.uint8))
    row = speaker.log_probabilities([framed.tolist()], [[1]])[0][0].exp()
    answered = unmask.fill(speaker, "[MASK]에 간다", top=3)[0].masks[0].candidates
    assert [one.score for one in answered] == pytest.approx([row[one.id].item() for one in answered], rel=1e-4)
