"""Lists the settings of every run, corpus, mask, model and schedule that is digested."""

from __future__ import annotations

from typing import NamedTuple

from unmask.core.distributed import has_bfloat16
from unmask.core.quantities import Fraction

HAS_BFLOAT16 = has_bfloat16()
BFLOAT16 = "bfloat16"  # in the name of each case that needs it


class Run(NamedTuple):
    """A run of `unmask pretrain`."""

    recipe: str
    settings: list[str]
    text: str = "prose"
    start: str = ""  # another run of this table, whose model is trained further
    new_tokens: int = 0  # added to that model's vocabulary


# Runs ---------------------------------------------------------------------------------------------------------------

FIXED = [
    "train.budget=10 steps", "train.every.log=1 steps", "train.every.validate=5 steps", "train.every.save=10 steps",
    "train.threads=1", "train.precision=float32",
]  # fmt: skip
BERT = [
    "model.num_hidden_layers=2", "model.hidden_size=32", "model.num_attention_heads=2", "model.intermediate_size=48",
]  # fmt: skip
# The initialization "pair-matching" needs two heads of width 32.
WIDE_BERT = [
    "model.num_hidden_layers=2", "model.hidden_size=64", "model.num_attention_heads=2", "model.intermediate_size=96",
]  # fmt: skip
MODERNBERT = [*BERT, "model.num_hidden_layers=4", "model.local_attention=16"]
ONE_STAGE = ["stage.0.max_seq_len=48", "stage.0.batch_size=512 tokens"]
TWO_STAGES = [
    "stage.0.max_seq_len=32", "stage.0.batch_size=512 tokens",
    "stage.1.max_seq_len=64", "stage.1.batch_size=768 tokens",
]  # fmt: skip
THREE_STAGES = [
    "stage.0.max_seq_len=16", "stage.0.batch_size=128 tokens",
    "stage.1.max_seq_len=32", "stage.1.batch_size=256 tokens",
    "stage.2.max_seq_len=64", "stage.2.batch_size=512 tokens",
]  # fmt: skip
HELD_OUT = ["data.held_out.fraction=10%"]
WORDPIECE_TEXT = [*HELD_OUT, "data.tokenizer.vocab_size=300"]
BYTE_TEXT = [*HELD_OUT, "data.tokenizer.vocab_size=400"]


def _bert(*settings: str) -> Run:
    return Run("bert-mini", [*FIXED, *BERT, *TWO_STAGES, *WORDPIECE_TEXT, *settings])


def _modernbert(*settings: str) -> Run:
    return Run("tiny", [*FIXED, *MODERNBERT, *TWO_STAGES, *WORDPIECE_TEXT, *settings])


def _continued(start: str, *settings: str, new_tokens: int = 0) -> Run:
    return Run("continue", [*FIXED, *ONE_STAGE, *HELD_OUT, *settings], "other", start, new_tokens)


# Ten steps of every shipped recipe with a small model. Model class, tokenizer, objective, optimizer, schedule and
# initialization are those of the recipe.
RECIPES = {
    "auto": Run("auto", [*FIXED, *MODERNBERT, *TWO_STAGES, *WORDPIECE_TEXT, "train.choose_model_size=false"]),
    "babylm-10m": Run("babylm-10m", [*FIXED, *MODERNBERT, *TWO_STAGES, *WORDPIECE_TEXT, "train.keep_at=['50 words']"]),
    "babylm-1m": Run("babylm-1m", [*FIXED, *MODERNBERT, *TWO_STAGES, *WORDPIECE_TEXT, "train.keep_at=['50 words']"]),
    "bert-base": Run("bert-base", [*FIXED, *BERT, *TWO_STAGES, *WORDPIECE_TEXT]),
    "bert-medium": Run("bert-medium", [*FIXED, *BERT, *TWO_STAGES, *WORDPIECE_TEXT]),
    "bert-mini": Run("bert-mini", [*FIXED, *BERT, *TWO_STAGES, *WORDPIECE_TEXT]),
    "bert-mini-pairs": Run("bert-mini-pairs", [*FIXED, *WIDE_BERT, *ONE_STAGE, *WORDPIECE_TEXT]),
    "bert-original": Run("bert-original", [*FIXED, *BERT, *TWO_STAGES, *WORDPIECE_TEXT]),
    "bert-small": Run("bert-small", [*FIXED, *BERT, *TWO_STAGES, *WORDPIECE_TEXT]),
    "bert-tiny": Run("bert-tiny", [*FIXED, *BERT, *TWO_STAGES, *WORDPIECE_TEXT]),
    "char": Run("char", [*FIXED, *MODERNBERT, *THREE_STAGES], "play"),
    "electra-mini": Run("electra-mini", [*FIXED, *WIDE_BERT, *ONE_STAGE, *WORDPIECE_TEXT]),
    "demo": Run("demo", [*FIXED, *MODERNBERT, *TWO_STAGES, *WORDPIECE_TEXT]),
    "modern-base": Run("modern-base", [*FIXED, *MODERNBERT, *TWO_STAGES, *BYTE_TEXT]),
    "modern-small": Run("modern-small", [*FIXED, *MODERNBERT, *TWO_STAGES, *BYTE_TEXT]),
    "modern-tiny": Run("modern-tiny", [*FIXED, *MODERNBERT, *TWO_STAGES, *BYTE_TEXT]),
    "seed": Run("seed", [*FIXED, *BERT, "stage.0.max_seq_len=32", "stage.0.batch_size=16 texts"], "play"),
    "tiny": Run("tiny", [*FIXED, *MODERNBERT, *TWO_STAGES, *WORDPIECE_TEXT]),
    "tiny-adaptive": Run("tiny-adaptive", [*FIXED, *MODERNBERT, *TWO_STAGES, *WORDPIECE_TEXT]),
    "tiny-causal-first": Run("tiny-causal-first", [*FIXED, *MODERNBERT, *THREE_STAGES, *WORDPIECE_TEXT]),
    "tiny-diffusion": Run("tiny-diffusion", [*FIXED, *MODERNBERT, *TWO_STAGES, *WORDPIECE_TEXT]),
    "tiny-mntp": Run("tiny-mntp", [*FIXED, *MODERNBERT, *TWO_STAGES, *WORDPIECE_TEXT]),
    "continue": _continued("bert-mini"),
}

# Settings that no shipped recipe has.
VARIANTS = {
    "ema": _modernbert("train.ema_decay=0.9"),
    "micro-batches": _bert("train.micro_batch_size=200 tokens"),
    "dropout": _modernbert(
        "model.attention_dropout=0.1", "model.embedding_dropout=0.1", "model.mlp_dropout=0.1",
        "train.every.log=2 steps", "train.ema_decay=0.9", "train.every.save=4 steps",
    ),
    "final-mask-rate": _bert("objective.final_mask_rate=0.1"),
    "whole-word": _bert("objective.mask_unit=whole-word", "objective.mask_rate=0.2"),
    "span": _modernbert("objective.mask_unit=span"),
    "ngram": _modernbert("objective.mask_unit=ngram", "objective.max_ngram=4"),
    "boosted-words": _bert(
        "objective.mask_unit=whole-word", "objective.boosted_words=['river', 'winter']", "objective.boost_factor=4"
    ),
    "sentence-order": _bert(
        "objective.kind=mlm+pairs", "objective.pair_task=sentence-order", "objective.pair_loss_weight=2.0"
    ),
    "untied": _bert("model.tie_word_embeddings=false", "model.init=normal"),
    "roberta": _bert("model.model_type=roberta", "model.position_offset=2"),
    "cosine": _modernbert(
        "lr_schedule.kind=cosine", "lr_schedule.min_lr_ratio=0.1", "optimizer.kind=adamw", "optimizer.weight_decay=0.1"
    ),
    "adam": _bert("optimizer.kind=adam", "optimizer.lr=1e-3", "optimizer.max_grad_norm=0.5"),
    "another-seed": _modernbert("seed=18"),
    "tokens-as-budget": _modernbert("train.budget=5k tokens"),
    "epochs-as-budget": _modernbert("train.budget=0.2 epochs"),
    "early-stopping": _modernbert(
        "train.early_stopping_patience=1", "train.every.validate=1 steps", "optimizer.lr=0.5", "optimizer.muon_lr=0.5"
    ),
    "lower-case": _modernbert(
        "data.tokenizer.lowercase=true", "data.tokenizer.strip_accents=true", "data.unicode=NFKC"
    ),
    "extended-vocabulary": _continued("bert-mini", new_tokens=20),
    "continued-modernbert": _continued("modern-tiny"),
    "continued-pairs": _continued("bert-mini-pairs", "objective.kind=mlm+pairs"),
}  # fmt: skip
if HAS_BFLOAT16:  # an error on other machines
    VARIANTS |= {
        "bfloat16-modernbert": _modernbert("train.precision=bfloat16"),
        "bfloat16-bert": _bert("train.precision=bfloat16"),
    }
INTERRUPTED = VARIANTS["dropout"]  # stopped in its first stage, resumed, then prolonged
WEIGHTED = _modernbert()  # on two texts with weights
FURTHER_TEXT = _modernbert()  # with a validation text of its own

# The runs of tests/training/test_golden.py.
_GOLDEN = ["train.budget=50 steps", "train.every.log=1 steps", "train.threads=1"]
GOLDEN = {
    "seed": Run("seed", ["train.every.validate=50 steps", *_GOLDEN], "play"),
    "modernbert": Run("tiny", [
        "data.tokenizer.kind=characters", "data.document=file", "model.num_hidden_layers=3", "model.hidden_size=48",
        "model.num_attention_heads=3", "model.intermediate_size=64", "model.local_attention=16",
        "train.precision=float32", "objective.mask_unit=whole-word", "objective.mask_rate=0.2",
        "stage=[{until = '50%', max_seq_len = 32, batch_size = '1k tokens'}, "
        "{until = '100%', max_seq_len = 64, batch_size = '1k tokens'}]",
        *_GOLDEN,
    ], "play"),
    "bert": Run("tiny", [
        "data.tokenizer.kind=characters", "data.document=file",
        "model={kind = 'bert', num_hidden_layers = 2, hidden_size = 32}",
        "model.num_attention_heads=2", "model.intermediate_size=64", "optimizer.kind=adamw", "train.precision=float32",
        "stage=[{max_seq_len = 32, batch_size = '512 tokens'}]", *_GOLDEN,
    ], "play"),
}  # fmt: skip

# Corpora ------------------------------------------------------------------------------------------------------------

_WORDPIECE = "data.tokenizer.vocab_size=300"
# A text and settings on top of those of the recipe `tiny`.
CORPORA = {
    "wordpiece": ("prose", [_WORDPIECE]),
    "bpe": ("prose", ["data.tokenizer={kind = 'bpe', vocab_size = 400}"]),
    "unigram": ("prose", ["data.tokenizer={kind = 'unigram', vocab_size = 200}"]),
    "characters": ("prose", ["data.tokenizer.kind=characters"]),
    "bytes": ("prose", ["data.tokenizer.kind=bytes"]),
    "lower-case": ("prose", [_WORDPIECE, "data.tokenizer.lowercase=true", "data.tokenizer.strip_accents=true"]),
    "drop-duplicates": ("duplicates", [_WORDPIECE, "data.drop_duplicates=true"]),
    "document-line": ("prose", [_WORDPIECE, "data.document=line"]),
    "document-file": ("folder", [_WORDPIECE, "data.document=file"]),
    "held-out-tail": ("prose", [_WORDPIECE, "data.held_out.method=tail", "data.held_out.fraction=20%"]),
    "folder": ("folder", [_WORDPIECE]),
    "tokenizer-sample": ("folder", [_WORDPIECE, "data.tokenizer.max_train_chars=20_000"]),
    "broken-bytes": ("broken", [_WORDPIECE, "data.errors=replace"]),
    "jsonl": ("jsonl", [_WORDPIECE]),
    "nested-jsonl": ("nested-jsonl", [_WORDPIECE, "data.field=body.text"]),
    "csv": ("csv", [_WORDPIECE]),
    "tsv": ("tsv", [_WORDPIECE]),
    "parquet": ("parquet", [_WORDPIECE]),
    "gz": ("gz", [_WORDPIECE]),
    "korean": ("korean", ["data.tokenizer.vocab_size=200"]),
    "korean-unigram": ("korean", ["data.tokenizer={kind = 'unigram', vocab_size = 150}"]),
    "chinese": ("chinese", ["data.tokenizer.vocab_size=110"]),
    "chinese-jieba": ("chinese", ["data.tokenizer.vocab_size=110", "data.words=jieba"]),
    "japanese-sudachi": ("japanese", ["data.tokenizer.vocab_size=110", "data.words=sudachi"]),
    "japanese-bytes-sudachi": ("japanese", ["data.tokenizer.kind=bytes", "data.words=sudachi"]),
}
SEVERAL_WORKERS = ("folder", [_WORDPIECE])  # tokenized by one process and by two
WORD_RULES = ("spaces", "characters", "jieba", "sudachi")
INSPECT = ["data", "inspect", "--set", _WORDPIECE, "--json"]

# Masks --------------------------------------------------------------------------------------------------------------

# Settings on top of the objective of the recipe `tiny`.
MASKS = {
    "token": ["objective.mask_rate=0.15"],
    "token-40": ["objective.mask_rate=0.4"],
    "rates": [
        "objective.mask_rate=0.3", "objective.mask_token_rate=0.5", "objective.random_token_rate=0.3",
        "objective.keep_rate=0.2",
    ],
    "whole-word": ["objective.mask_unit=whole-word", "objective.mask_rate=0.15"],
    "whole-word-40": ["objective.mask_unit=whole-word", "objective.mask_rate=0.4"],
    "span": ["objective.mask_unit=span", "objective.mask_rate=0.15"],
    "span-40": ["objective.mask_unit=span", "objective.mask_rate=0.4"],
    "ngram": ["objective.mask_unit=ngram", "objective.mask_rate=0.2"],
    "ngram-6": ["objective.mask_unit=ngram", "objective.max_ngram=6", "objective.mask_rate=0.3"],
    "final-mask-rate": ["objective.mask_unit=span", "objective.mask_rate=0.3", "objective.final_mask_rate=0.1"],
    "boosted-words": ["objective.boosted_words=['river', 'winter', 'the captain']", "objective.boost_factor=3"],
    "boosted-whole-words": [
        "objective.mask_unit=whole-word", "objective.boosted_words=['river', 'winter']", "objective.boost_factor=8",
    ],
}  # fmt: skip
_PAIRS = [
    "objective.kind=mlm+pairs",
    "model={kind = 'bert', num_hidden_layers = 1, hidden_size = 16, num_attention_heads = 2, intermediate_size = 16}",
]
PAIRS = {
    "next-sentence": [*_PAIRS, "objective.pair_task=next-sentence"],
    "next-sentence-short": [*_PAIRS, "objective.pair_task=next-sentence", "objective.short_seq_prob=0.5"],
    "sentence-order": [*_PAIRS, "objective.pair_task=sentence-order"],
}
PAIR_TASKS = ("next-sentence", "sentence-order")
AUDITS = {
    "token": ["--set", "objective.mask_rate=0.15"],
    "whole-word": ["--set", "objective.mask_unit=whole-word", "--set", "objective.mask_rate=0.2"],
    "span": ["--set", "objective.mask_unit=span"],
    "ngram": ["--set", "objective.mask_unit=ngram"],
    "final-mask-rate": ["--set", "objective.final_mask_rate=0.1", "--train-fraction", "0.5"],
}
AUDIT_OPTIONS = ["--samples", "256", "--length", "64", "--workers", "0", "--ranks", "2", "--seed", "3", "--json"]

# Models and schedules -----------------------------------------------------------------------------------------------

# Each is a whole [model]; those of model_type "bert" have a sentence-pair head.
_SMALL = "hidden_size = 32, num_attention_heads = 2, intermediate_size = 48, max_position_embeddings = 64"
MODELS = {
    "modernbert": f"model={{kind = 'modernbert', num_hidden_layers = 4, {_SMALL}, local_attention = 16}}",
    "modernbert-untied": f"model={{kind = 'modernbert', num_hidden_layers = 2, {_SMALL}, tie_word_embeddings = false, "
    "global_attn_every_n_layers = 1}",
    "bert": f"model={{kind = 'bert', num_hidden_layers = 3, {_SMALL}}}",
    "bert-neighbor-attention": f"model={{kind = 'bert', num_hidden_layers = 3, {_SMALL}, init = 'neighbor-attention'}}",
    "bert-pair-matching": "model={kind = 'bert', num_hidden_layers = 4, hidden_size = 64, num_attention_heads = 2, "
    "intermediate_size = 48, max_position_embeddings = 64, init = 'pair-matching'}",
    "bert-untied": f"model={{kind = 'bert', num_hidden_layers = 2, {_SMALL}, tie_word_embeddings = false}}",
    "roberta": f"model={{kind = 'bert', num_hidden_layers = 2, {_SMALL}, model_type = 'roberta', position_offset = 2}}",
    "tutorial": f"model={{kind = 'tutorial', num_hidden_layers = 2, {_SMALL}}}",
}
SCHEDULES = {
    "wsd": {"kind": "wsd", "warmup": Fraction(0.1), "decay": Fraction(0.4)},
    "wsd-min-lr": {"kind": "wsd", "warmup": Fraction(0.02), "decay": Fraction(0.2), "min_lr_ratio": 0.1},
    "linear": {"kind": "linear", "warmup": Fraction(0.06)},
    "cosine": {"kind": "cosine", "warmup": Fraction(0.05), "min_lr_ratio": 0.05},
    "noam": {"kind": "noam", "warmup_steps": 40},
}
