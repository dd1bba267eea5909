"""Models kept at numbers of words: each once, at the first step that reaches it, also in a resumed run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

import unmask
from unmask.core.errors import RecipeError, Stopped
from unmask.core.quantities import Quantity
from unmask.training.display import Display
from unmask.training.kept_models import KeptModels, kept_name
from unmask.training.plan import Plan, StagePlan
from unmask.training.pretrain import launch, resume
from unmask.training.recipe import load_recipe

SETTINGS = [
    "model.num_hidden_layers=1", "model.hidden_size=16", "model.num_attention_heads=2", "model.intermediate_size=16",
    "data.tokenizer.kind=characters", "train.threads=1", "train.budget=6 steps", "preview.num_samples=0",
    "train.every.validate=6 steps", "train.every.save=1 steps", "train.keep_last=100",
    "stage=[{until = '50%', max_seq_len = 16, batch_size = '2k tokens'}, {max_seq_len = 64, batch_size = '4k tokens'}]",
]  # fmt: skip
KEEP = 'train.keep_at=["500 words", "1k words", "3k words", "1M words"]'


def words(*numbers: int) -> list[Quantity]:
    return [Quantity(number, "words") for number in numbers]


def plan_of(*stages: tuple[int, int]) -> Plan:
    """A plan of (steps, tokens of a step)."""
    firsts = [sum(steps for steps, _ in stages[:number]) for number in range(len(stages))]
    return Plan(tuple(StagePlan(64, size, first, n, 0.0) for first, (n, size) in zip(firsts, stages, strict=True)))


# The counter ----------------------------------------------------------------------------------------------------------


@given(
    numbers=st.sets(st.integers(1, 40_000), min_size=1, max_size=12).map(sorted),
    steps=st.lists(st.integers(1, 900), min_size=1, max_size=60),
    stops=st.sets(st.integers(0, 59)),
)
def test_each_model_is_kept_once_at_the_first_step_that_reaches_it(
    numbers: list[int], steps: list[int], stops: set[int]
) -> None:
    plan, epoch = plan_of((20, 400), (40, 500)), (1_000, 800)

    def new(tokens: int) -> KeptModels:
        return KeptModels(words(*numbers), plan, epoch, 700, tokens)

    kept, tokens, found = new(0), 0, dict[str, float]()
    reached = [0.0]
    for step, size in enumerate(steps):
        if step in stops:  # a resumed run knows only its tokens
            kept = new(tokens)
        tokens += size
        reached.append(kept.words_seen(tokens))
        for name in kept.reached(tokens, is_last=False):
            assert name not in found
            found[name] = reached[-1]
    expected = {
        kept_name(number): after
        for number in numbers
        for before, after in pairwise(reached)
        if before < number <= after
    }
    assert found == expected
    assert all(before < after for before, after in pairwise(reached))


def test_words_seen_are_epochs_of_each_stage_times_the_words_of_the_text() -> None:
    # Two epochs of 1,000 tokens in the first stage; the second stage has fewer special tokens.
    kept = KeptModels(words(1), plan_of((20, 100), (40, 100)), (1_000, 800), 700, 0)
    assert kept.words_seen(500) == 350 and kept.words_seen(2_000) == 1_400
    assert kept.words_seen(2_400) == 1_750
    assert kept.words_seen(2_000 + 8_000) == 1_400 + 7_000, "a last stage that a larger budget prolongs"


def test_a_run_that_goes_back_keeps_a_model_again() -> None:
    kept = KeptModels(words(300, 700), plan_of((10, 100)), (1_000,), 1_000, 0)
    assert kept.reached(800, is_last=False) == ["chck_300", "chck_700"]
    kept.go_back(400)
    assert kept.reached(800, is_last=False) == ["chck_700"]


def test_the_last_step_keeps_a_model_of_which_little_is_missing() -> None:
    kept = KeptModels(words(990, 1_000, 1_019, 1_021), plan_of((10, 100)), (1_000,), 1_000, 0)
    assert kept.reached(900, is_last=False) == []
    assert kept.reached(1_000, is_last=True) == ["chck_990", "chck_1k", "chck_1019"], (
        "of 1,021 words 2.06 % are missing"
    )
    assert "doesn't reach chck_1021" in kept.describe()


@pytest.mark.parametrize(
    ("number", "name"),
    [(1_000_000, "chck_1M"), (100_000_000, "chck_100M"), (10**9, "chck_1000M"), (500_000, "chck_500k"), (7, "chck_7")],
)
def test_folders_have_the_names_of_babylm(number: int, name: str) -> None:
    assert kept_name(number) == name


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ('["1M tokens"]', "got 1M tokens, expected a whole number of words"),
        ('["0 words"]', "got 0 words"),
        ('["0.5 words"]', "got 0.5 words"),
        ('["2M words", "1M words"]', "2M words, 1M words don't rise"),
        ('["1M words", "1000k words"]', "don't rise"),
        ("[" + ", ".join(f'"{n} words"' for n in range(1, 1_003)) + "]", "got 1,002 numbers of words"),
        ("[5]", "needs a unit"),
    ],
)
def test_invalid_numbers_are_refused(value: str, says: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe("tiny", [f"train.keep_at={value}"])
    assert says in str(refused.value) and "keep_at" in str(refused.value)


@pytest.mark.parametrize("name", ["babylm-1m", "babylm-10m"])
def test_the_recipes_keep_the_models_that_babylm_asks_for(name: str) -> None:
    recipe = load_recipe(name)
    names = [kept_name(round(quantity.number)) for quantity in recipe.train.keep_at]
    assert names[:10] == [f"chck_{n}M" for n in range(1, 11)] and recipe.train.budget == Quantity(10, "epochs")
    assert names[10:] == ([f"chck_{n}M" for n in range(20, 101, 10)] if name == "babylm-10m" else [])


# Runs -----------------------------------------------------------------------------------------------------------------


class Messages(Display):
    """Collects messages; stops the process's training after a step."""

    def __init__(self, stop_at: int = 0) -> None:
        self.messages: list[str] = []
        self.folders: list[str] = []
        self._stop_at = stop_at

    def message(self, message: str) -> None:
        self.messages.append(message)

    def saved(self, folder: Path) -> None:
        self.folders.append(folder.name)

    def step(self, state) -> None:
        if state.step == self._stop_at:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def whole(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Messages]:
    run, display = tmp_path_factory.mktemp("kept") / "run", Messages()
    launch([prose], recipe="tiny", out=run, settings=[*SETTINGS, KEEP], display=display)
    return run, display


def test_a_run_keeps_the_models_of_its_steps(prose: Path, whole: tuple[Path, Messages]) -> None:
    run, display = whole
    text = prose.read_text(encoding="utf-8")
    (line,) = [message for message in display.messages if message.startswith("words: ") and "training text" in message]
    counted = int(line.split()[1].replace(",", ""))
    facts = json.loads((run / "env.json").read_text())["text"]
    assert 0.9 * len(text.split()) < counted < len(text.split()), facts
    assert "doesn't reach chck_1M" in line
    names = [name for name in display.folders if name.startswith("chck_")]
    assert names == ["chck_500", "chck_1k", "chck_3k"] and not (run / "chck_1M").exists()
    steps = {json.loads((path / "card.json").read_text())["step"]: path for path in run.glob("step-*")}
    for name, number in zip(names, (500, 1_000, 3_000), strict=True):
        card = json.loads((run / name / "card.json").read_text())
        assert card["words_seen"] >= number
        # A word of this text has about five tokens, so a step of 4k tokens has at most 1,000 words.
        assert card["words_seen"] < number + 1_000
        saved = load_file(steps[card["step"]] / "model.safetensors")
        kept = load_file(run / name / "model.safetensors")
        assert saved.keys() == kept.keys() and all(torch.equal(saved[key], kept[key]) for key in kept)
        assert not (run / name / "resume").exists()


def test_transformers_and_unmask_open_a_kept_model(whole: tuple[Path, Messages]) -> None:
    folder = whole[0] / "chck_3k"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    logits = AutoModelForMaskedLM.from_pretrained(folder)(**tokenizer("the c[MASK]t", return_tensors="pt")).logits
    model = unmask.load(folder)
    (filled,) = unmask.fill(model, "the c[MASK]t", top=1)
    place = tokenizer("the c[MASK]t")["input_ids"].index(tokenizer.mask_token_id)
    best = int(logits[0, place, model.tokenizer.regular_token_ids].argmax())
    assert filled.masks[0].candidates[0].shown == model.tokenizer.id_to_token(model.tokenizer.regular_token_ids[best])


def test_an_extended_run_may_keep_further_models(whole: tuple[Path, Messages], tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole[0], tmp_path / "run", symlinks=True))
    before = (run / "chck_3k" / "card.json").stat().st_mtime_ns
    display = Messages()
    more = 'train.keep_at=["3k words", "4500 words", "5k words"]'
    resume(run, budget="+2 steps", settings=[more], display=display)
    assert [name for name in display.folders if name.startswith("chck_")] == ["chck_4500", "chck_5k"]
    assert (run / "chck_3k" / "card.json").stat().st_mtime_ns == before and (run / "chck_500").is_dir()


@pytest.mark.parametrize("loses", [False, True], ids=["stopped", "with its last checkpoints lost"])
def test_a_resumed_run_keeps_the_same_models(
    prose: Path, whole: tuple[Path, Messages], tmp_path: Path, loses: bool
) -> None:
    run = tmp_path / "run"
    settings = [*SETTINGS, KEEP]
    stopped = Messages(stop_at=json.loads((whole[0] / "chck_1k" / "card.json").read_text())["step"])
    with pytest.raises(Stopped):
        launch([prose], recipe="tiny", out=run, settings=settings, display=stopped)
    before = [name for name in stopped.folders if name.startswith("chck_")]
    assert before[0] == "chck_500" and "chck_3k" not in before
    if (
        loses
    ):  # as after a crash long after the last checkpoint: these steps are taken again, and their models kept again
        for path in sorted(run.glob("step-*"))[1:]:
            shutil.rmtree(path)
        (run / "latest").unlink()
        (run / "latest").symlink_to("step-0000001")
    again = Messages()
    resume(run, display=again)
    after = [name for name in again.folders if name.startswith("chck_")]
    whole_names = [name for name in whole[1].folders if name.startswith("chck_")]
    assert after == (whole_names if loses else [name for name in whole_names if name not in before])
    for name in whole_names:
        one, other = (load_file(folder / name / "model.safetensors") for folder in (run, whole[0]))
        assert all(torch.equal(one[key], other[key]) for key in other)
        cards = [json.loads((folder / name / "card.json").read_text()) for folder in (run, whole[0])]
        assert cards[0]["step"] == cards[1]["step"] and cards[0]["words_seen"] == cards[1]["words_seen"]
