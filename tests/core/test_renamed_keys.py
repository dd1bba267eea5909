"""Every former key and value of a recipe gives an error with its present name."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unmask.core.config import build_config
from unmask.core.errors import RecipeError
from unmask.core.renamed_keys import renamed_key, renamed_value
from unmask.training.recipe import Recipe, load_recipe

SECTIONS = {
    "text": "data",
    "encoder": "model",
    "optimiser": "optimizer",
    "schedule": "lr_schedule",
    "show": "preview",
    "start": "init",
}
KEYS = {
    "encoder.attention_dropout": "model.attention_dropout",
    "encoder.beginning": "model.init",
    "encoder.dropout": "model.dropout",
    "encoder.embedding_dropout": "model.embedding_dropout",
    "encoder.family": "model.model_type",
    "encoder.feed_forward": "model.intermediate_size",
    "encoder.feed_forward_dropout": "model.mlp_dropout",
    "encoder.first_position": "model.position_offset",
    "encoder.global_every": "model.global_attn_every_n_layers",
    "encoder.global_theta": "model.global_rope_theta",
    "encoder.heads": "model.num_attention_heads",
    "encoder.hidden_dropout": "model.hidden_dropout",
    "encoder.initial_deviation": "model.initializer_range",
    "encoder.kind": "model.kind",
    "encoder.layers": "model.num_hidden_layers",
    "encoder.local_theta": "model.local_rope_theta",
    "encoder.local_window": "model.local_attention",
    "encoder.longest": "model.max_position_embeddings",
    "encoder.norm_epsilon": "model.layer_norm_eps",
    "encoder.segments": "model.type_vocab_size",
    "encoder.tied": "model.tie_word_embeddings",
    "encoder.width": "model.hidden_size",
    "objective.choose": "objective.mask_unit",
    "objective.keep": "objective.keep_rate",
    "objective.longest_ngram": "objective.max_ngram",
    "objective.mask": "objective.mask_token_rate",
    "objective.pair": "objective.pair_task",
    "objective.pair_weight": "objective.pair_loss_weight",
    "objective.prefer": "objective.boosted_words",
    "objective.prefer_factor": "objective.boost_factor",
    "objective.random": "objective.random_token_rate",
    "objective.rate": "objective.mask_rate",
    "objective.rate_end": "objective.final_mask_rate",
    "objective.short": "objective.short_seq_prob",
    "optimiser.beta_1": "optimizer.beta1",
    "optimiser.beta_2": "optimizer.beta2",
    "optimiser.clip": "optimizer.max_grad_norm",
    "optimiser.epsilon": "optimizer.eps",
    "optimiser.kind": "optimizer.kind",
    "optimiser.matrix_rate": "optimizer.muon_lr",
    "optimiser.momentum": "optimizer.momentum",
    "optimiser.position_factor": "optimizer.position_embedding_lr_scale",
    "optimiser.rate": "optimizer.lr",
    "optimiser.weight_decay": "optimizer.weight_decay",
    "schedule.decay": "lr_schedule.decay",
    "schedule.floor": "lr_schedule.min_lr_ratio",
    "schedule.kind": "lr_schedule.kind",
    "schedule.warmup": "lr_schedule.warmup",
    "schedule.warmup_steps": "lr_schedule.warmup_steps",
    "show.characters": "preview.max_chars",
    "show.lines": "preview.num_samples",
    "show.prompts": "preview.prompts",
    "stage.batch": "stage.batch_size",
    "stage.length": "stage.max_seq_len",
    "start.model": "init.model",
    "start.needed": "init.required",
    "start.rows": "init.vocab_size",
    "text.cutter": "data.sampler",
    "text.cutter.kind": "data.sampler.kind",
    "text.document": "data.document",
    "text.drop_duplicates": "data.drop_duplicates",
    "text.errors": "data.errors",
    "text.field": "data.field",
    "text.held_out": "data.held_out",
    "text.held_out.at_most": "data.held_out.max_size",
    "text.held_out.by": "data.held_out.method",
    "text.held_out.share": "data.held_out.fraction",
    "text.source": "data.source",
    "text.source.kind": "data.source.kind",
    "text.tokenizer": "data.tokenizer",
    "text.tokenizer.clean_text": "data.tokenizer.clean_text",
    "text.tokenizer.handle_chinese_chars": "data.tokenizer.handle_chinese_chars",
    "text.tokenizer.kind": "data.tokenizer.kind",
    "text.tokenizer.longest_piece": "data.tokenizer.max_token_length",
    "text.tokenizer.lowercase": "data.tokenizer.lowercase",
    "text.tokenizer.minimum_count": "data.tokenizer.min_frequency",
    "text.tokenizer.path": "data.tokenizer.path",
    "text.tokenizer.pieces": "data.tokenizer.num_new_tokens",
    "text.tokenizer.sample_characters": "data.tokenizer.max_train_chars",
    "text.tokenizer.specials": "data.tokenizer.special_tokens",
    "text.tokenizer.strip_accents": "data.tokenizer.strip_accents",
    "text.tokenizer.vocab": "data.tokenizer.vocab_size",
    "text.unicode": "data.unicode",
    "text.valid": "data.valid",
    "text.words": "data.words",
    "train.average": "train.ema_decay",
    "train.keep": "train.keep_last",
    "train.micro_batch": "train.micro_batch_size",
    "train.sinks": "train.loggers",
    "train.stop_after": "train.early_stopping_patience",
}
VALUES = [
    ("data.document", "by-ending", "auto"),
    ("data.words", "by-script", "auto"),
    ("data.unicode", "as-is", "none"),
    ("data.held_out.method", "count-decides", "auto"),
    ("data.held_out.fraction", "by-rule", "auto"),
    ("model.kind", "classic", "bert"),
    ("model.kind", "modern", "modernbert"),
    ("model.init", "random", "normal"),
    ("model.init", "beside", "neighbor-attention"),
    ("model.init", "pairs", "pair-matching"),
    ("objective.kind", "bert", "mlm+pairs"),
    ("objective.mask_unit", "word", "whole-word"),
    ("lr_schedule.kind", "stable", "wsd"),
    ("train.device", "by-machine", "auto"),
    ("train.precision", "by-machine", "auto"),
    ("train.threads", "all", "auto"),
    ("train.early_stopping_patience", "never", 0),
    ("train.early_stopping_patience", "3 validations without gain", 3),
]


def tree_of(key: str, value: Any) -> dict[str, Any]:
    """Return the table with one value at a dotted key; `stage` is a list."""
    first, _, rest = key.partition(".")
    if first == "stage":
        return {"stage": [tree_of(rest, value)]}
    return {first: tree_of(rest, value) if rest else value}


def heading(key: str) -> str:
    section, _, name = key.rpartition(".")
    return f"[[{section}]] {name}" if section == "stage" else f"[{section}] {name}"


def refusal(tree: dict[str, Any]) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        build_config(Recipe, tree, "old.toml")
    return caught.value


def keys_of(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a config class, those of all members of a union included."""
    for field in dataclasses.fields(config):
        yield f"{prefix}{field.name}"
        members = [typing.get_type_hints(config)[field.name]]
        while members:
            member = members.pop()
            if isinstance(member, types.UnionType) or typing.get_origin(member) in (typing.Union, tuple):
                members += typing.get_args(member)
            elif dataclasses.is_dataclass(member):
                yield from keys_of(member, f"{prefix}{field.name}.")


@pytest.mark.parametrize(("former", "present"), KEYS.items())
def test_a_former_key_is_reported_with_its_present_name(former: str, present: str) -> None:
    error = refusal(tree_of(former, 1))
    assert error.message == f"`{heading(former)}` is now `{heading(present)}`"
    assert error.hint == "rename it" and error.location.startswith("old.toml: ")


def in_present_section(former: str) -> str:
    first, _, rest = former.partition(".")
    return f"{SECTIONS.get(first, first)}.{rest}"


@pytest.mark.parametrize(
    ("former", "present"), [pair for pair in KEYS.items() if in_present_section(pair[0]) != pair[1]]
)
def test_a_former_key_in_a_present_section_is_reported_too(former: str, present: str) -> None:
    error = refusal(tree_of(in_present_section(former), 1))
    assert error.message.endswith(f"` is now `{heading(present)}`")


@pytest.mark.parametrize(("former", "present"), SECTIONS.items())
def test_an_empty_former_section_is_reported(former: str, present: str) -> None:
    assert refusal({former: {}}).message == f"`[{former}]` is now `[{present}]`"


@pytest.mark.parametrize(("key", "former", "present"), VALUES)
def test_a_former_value_is_reported_with_its_present_form(key: str, former: str, present: str | int) -> None:
    tree = tree_of(key, former)
    error = refusal({"model": {"kind": "bert", "init": former}} if key == "model.init" else tree)
    shown = f'"{present}"' if isinstance(present, str) else str(present)
    assert error.message == f'`{key} = "{former}"` is now `{shown}`'
    assert error.hint == "change it" and error.location == f"old.toml: {key}"
    assert renamed_value(key, present) is None


def test_set_names_the_option_that_has_a_former_key() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny", ["seed=3", "encoder.width=96"])
    assert caught.value.message == "`[encoder] width` is now `[model] hidden_size`"
    assert caught.value.location == "--set encoder.width=96: encoder.width"


def test_the_present_names_exist() -> None:
    known = set(keys_of(Recipe)) | {"data.source.kind", "data.sampler.kind"}
    assert set(KEYS.values()) <= known
    assert {key for key, _, _ in VALUES} <= known
    assert not [key for key in known if renamed_key(key.split("."))], "no present key is a former one"


def test_a_plugin_may_use_a_former_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rates.py").write_text(
        "from dataclasses import dataclass\n"
        "class Own:\n"
        "    @dataclass(frozen=True)\n"
        "    class Settings:\n"
        "        speed: float = 0.1\n"
        "    def corrupt(self): ...\n"
        "    def loss(self): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    error = refusal({"objective": {"kind": "own_rates:Own", "rate": 0.2}})
    assert error.message.startswith("unknown key `rate` of kind `own_rates:Own`")
