"""Former names of recipe keys and values; errors about an unknown key or value mention the present name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

# Former name -> present name, one level at a time: `encoder.width` becomes `model.width`, then `model.hidden_size`.
_KEYS: Final[Mapping[str, str]] = {
    "text": "data",
    "encoder": "model",
    "optimiser": "optimizer",
    "schedule": "lr_schedule",
    "show": "preview",
    "start": "init",
    "data.cutter": "data.sampler",
    "data.held_out.at_most": "data.held_out.max_size",
    "data.held_out.by": "data.held_out.method",
    "data.held_out.share": "data.held_out.fraction",
    "data.tokenizer.longest_piece": "data.tokenizer.max_token_length",
    "data.tokenizer.minimum_count": "data.tokenizer.min_frequency",
    "data.tokenizer.pieces": "data.tokenizer.num_new_tokens",
    "data.tokenizer.sample_characters": "data.tokenizer.max_train_chars",
    "data.tokenizer.specials": "data.tokenizer.special_tokens",
    "data.tokenizer.vocab": "data.tokenizer.vocab_size",
    "init.needed": "init.required",
    "init.rows": "init.vocab_size",
    "lr_schedule.floor": "lr_schedule.min_lr_ratio",
    "model.beginning": "model.init",
    "model.family": "model.model_type",
    "model.feed_forward": "model.intermediate_size",
    "model.feed_forward_dropout": "model.mlp_dropout",
    "model.first_position": "model.position_offset",
    "model.global_every": "model.global_attn_every_n_layers",
    "model.global_theta": "model.global_rope_theta",
    "model.heads": "model.num_attention_heads",
    "model.initial_deviation": "model.initializer_range",
    "model.layers": "model.num_hidden_layers",
    "model.local_theta": "model.local_rope_theta",
    "model.local_window": "model.local_attention",
    "model.longest": "model.max_position_embeddings",
    "model.norm_epsilon": "model.layer_norm_eps",
    "model.segments": "model.type_vocab_size",
    "model.tied": "model.tie_word_embeddings",
    "model.width": "model.hidden_size",
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
    "optimizer.beta_1": "optimizer.beta1",
    "optimizer.beta_2": "optimizer.beta2",
    "optimizer.clip": "optimizer.max_grad_norm",
    "optimizer.epsilon": "optimizer.eps",
    "optimizer.matrix_rate": "optimizer.muon_lr",
    "optimizer.position_factor": "optimizer.position_embedding_lr_scale",
    "optimizer.rate": "optimizer.lr",
    "preview.characters": "preview.max_chars",
    "preview.lines": "preview.num_samples",
    "stage.batch": "stage.batch_size",
    "stage.length": "stage.max_seq_len",
    "train.average": "train.ema_decay",
    "train.keep": "train.keep_last",
    "train.micro_batch": "train.micro_batch_size",
    "train.sinks": "train.loggers",
    "train.stop_after": "train.early_stopping_patience",
}

# Present key -> former value -> present value. "<N>" stands for a number.
_VALUES: Final[Mapping[str, Mapping[str, Any]]] = {
    "data.document": {"by-ending": "auto"},
    "data.held_out.fraction": {"by-rule": "auto"},
    "data.held_out.method": {"count-decides": "auto"},
    "data.unicode": {"as-is": "none"},
    "data.words": {"by-script": "auto"},
    "lr_schedule.kind": {"stable": "wsd"},
    "model.init": {"random": "normal", "beside": "neighbor-attention", "pairs": "pair-matching"},
    "model.kind": {"classic": "bert", "modern": "modernbert"},
    "objective.kind": {"bert": "mlm+pairs"},
    "objective.mask_unit": {"word": "whole-word"},
    "train.device": {"by-machine": "auto"},
    "train.early_stopping_patience": {"never": 0, "<N> validations without gain": "<N>"},
    "train.precision": {"by-machine": "auto"},
    "train.threads": {"all": "auto"},
}


def renamed_key(path: Sequence[str]) -> str:
    """Return the present dotted name of a key, or "" where no part of it was renamed."""
    present = ""
    for part in path:
        key = f"{present}.{part}".lstrip(".")
        present = _KEYS.get(key, key)
    return "" if present == ".".join(path) else present


def renamed_value(key: str, value: object) -> str | int | None:
    """Return the present form of a value of a key, or None where it was not renamed."""
    if not isinstance(value, str):
        return None
    number = re.match(r"\d+ ", value)
    pattern = f"<N> {value[number.end() :]}" if number else value
    present = _VALUES.get(key, {}).get(pattern)
    return int(value.split()[0]) if present == "<N>" else present
