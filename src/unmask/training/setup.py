"""Room card: what a run asks of its model.

Comes in: a Recipe, the tokenizer, the corpus. Goes out: the objective; where it asks about pairs of segments, how they
are drawn, and a judge that has frozen some of the held-out text; refusals before anything is trained. Called by:
workshop, cli.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from unmask import __version__
from unmask.core import rng
from unmask.core.distributed import DistributedContext, matmul_rate
from unmask.core.errors import RecipeError, TextError, TokenizerError
from unmask.core.files import default_cache
from unmask.core.plugins import PluginObjectiveConfig, PluginSamplerConfig, describe, make
from unmask.core.types import SENTENCE_START, WORD_START, Objective, ObjectiveContext, Source
from unmask.data.loader import PairSampling, StageLoader
from unmask.data.prepare import TokenizedCorpus, places, prepare
from unmask.data.sentence_pairs import PairKind, require_pairs
from unmask.data.sources import FileSource
from unmask.evaluation.masked_lm import (
    Document,
    EvalSet,
    build_eval_set,
    documents_of_shards,
    documents_of_source,
    evaluate,
)
from unmask.evaluation.sentence_pairs import PairJudge
from unmask.evaluation.validation import SetValidation, Validation
from unmask.models import build_model, build_pair, flops_per_token, products
from unmask.models.attention import backend_of
from unmask.models.bert import BertConfig, SentencePairHead
from unmask.models.model import Model
from unmask.objectives.masking import Integers
from unmask.objectives.mlm import MaskedLMObjective
from unmask.objectives.sentence_pairs import BertPretrainingConfig, BertPretrainingObjective
from unmask.objectives.word_boost import preferred
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.words import WordsRule
from unmask.training import checkpoint
from unmask.training.display import Display, Preview, TokenView, token_views
from unmask.training.estimate import FULL, QUICK, CostEstimate, disk_bytes, measure_step_time, memory_bytes
from unmask.training.loop import EMA, TrainLoopInputs, TrainModule, TrainState
from unmask.training.optim import Optimizer, build_optimizer, decay_in_words, rate_factor
from unmask.training.plan import SHORTEST, Measured, Plan
from unmask.training.recipe import Recipe
from unmask.training.warm_start import WarmStart


def build_objective(recipe: Recipe, tokenizer: Tokenizer, words: WordsRule, say: Callable[[str], object]) -> Objective:
    """What the recipe asks of the model: masked tokens, those and pairs, or an objective from outside."""
    settings = recipe.objective
    if isinstance(settings, PluginObjectiveConfig):
        return make(settings, ObjectiveContext(tokenizer, recipe.model.hidden_size))
    mlm = MaskedLMObjective(
        settings, tokenizer.mask_id, tokenizer.regular_token_ids, preferred(settings, tokenizer, words, say)
    )
    if not isinstance(settings, BertPretrainingConfig):
        return mlm
    torch.manual_seed(rng.integer(recipe.seed, "pair weights"))  # the others are those of a run without this head
    return BertPretrainingObjective(settings, mlm, build_pair(recipe.model))


def check_pairs(recipe: Recipe) -> None:
    """Refuse an encoder that can't tell two segments apart, and samples that are none, before any text is read."""
    settings, encoder = recipe.objective, recipe.model
    if not isinstance(settings, BertPretrainingConfig):
        return
    if not isinstance(encoder, BertConfig) or encoder.type_vocab_size < 2 or encoder.model_type != "bert":
        kind = encoder.kind if not isinstance(encoder, BertConfig) else f"{encoder.type_vocab_size} segment(s)"
        raise RecipeError(
            f"the objective asks about two segments, and this encoder ({kind}) has no segments to tell them apart",
            location=f"objective.kind = mlm+pairs, pair_task = {settings.pair_task}",
            hint="take model.kind=bert, as in --recipe bert-mini, or train on masks alone: objective.kind=mlm",
        )
    if isinstance(recipe.data.sampler, PluginSamplerConfig):
        raise RecipeError(
            f"the objective reads pairs, and `{recipe.data.sampler.kind}` cuts windows",
            location="data.sampler",
            hint="leave the sampler out: pairs are cut by the house",
        )
    for number, stage in enumerate(recipe.stage):
        if stage.max_seq_len < SHORTEST + 2:
            raise RecipeError(
                f"length = {stage.max_seq_len} leaves no room for two segments",
                location=f"stage.{number}",
                hint=f"use {SHORTEST + 2} or more",
            )


def pairs_of(objective: Objective, recipe: Recipe) -> PairSampling | None:
    """How the objective's samples are drawn, where they are pairs."""
    if objective.sampler == "windows":
        return None
    kind = cast("PairKind", objective.sampler)
    settings = recipe.objective
    return (
        PairSampling(kind, settings.short_seq_prob)
        if isinstance(settings, BertPretrainingConfig)
        else PairSampling(kind)
    )


def require_corpus_of_pairs(corpus: TokenizedCorpus, source: Source, kind: PairKind) -> str:
    """Refuse text or a tokenizer that gives no pairs; else how many documents take part, in a sentence."""
    if corpus.tokenizer.cls_sep_ids is None:
        raise TokenizerError(
            "this tokenizer has no [CLS] and [SEP], which a pair of segments is set between",
            location="data.tokenizer",
            hint="take one that has them, or train on masks alone: objective.kind=mlm",
        )
    try:
        require_pairs(corpus.train, kind)
    except TextError as error:
        raise TextError(error.message, location=places(source), hint=error.hint) from error
    having, documents = int((corpus.train.sentences_N > 1).sum()), corpus.train.documents
    left = f"; the other {documents - having:,} are left out" if having < documents else ""
    return f"pairs ({kind}): from {having:,} documents of two sentences or more{left}"


class Workshop:
    """Everything that a run works with. Building it reads and tokenizes the text; it writes to the cache alone."""

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        world: DistributedContext,
        display: Display,
        valid: Mapping[str, FileSource] | None = None,
        start: WarmStart | None = None,
    ) -> None:
        """`valid` are further texts that each validation measures, by name; `start` is a model to go on from."""
        self.recipe = recipe
        self.source = source
        self.valid: Mapping[str, FileSource] = valid or {}
        self.world = world
        self._say = display.message
        check_pairs(recipe)
        for kind in recipe.outside:
            display.message(describe(kind))
        self.corpus: TokenizedCorpus = prepare(source, recipe.data, default_cache(), display.progress)
        for sentence in self.corpus.notes:
            display.message(sentence)
        _require_one_text(self.corpus, source, recipe)
        self.tokenizer = self.corpus.tokenizer
        torch.manual_seed(rng.integer(recipe.seed, "weights"))
        if start:
            encoder, head = start.modules(self.tokenizer)
        else:
            encoder, head = build_model(recipe.model, recipe.init.vocab_size or self.tokenizer.size)
        self.vocabulary = int(cast(Any, encoder).vocabulary)  # rows of its table; some may have no piece
        if recipe.init.model:
            self.recipe = recipe = replace(recipe, init=replace(recipe.init, vocab_size=self.vocabulary))
        self.objective = build_objective(recipe, self.tokenizer, self.corpus.words, display.message)
        if start and start.model.pair is not None and isinstance(self.objective.modules, SentencePairHead):
            self.objective.modules.load_state_dict(start.model.pair.state_dict())
        self.objective.modules.to(world.device)
        self.learner = TrainModule(encoder.to(world.device), head.to(world.device), self.objective)
        self.optimizer = self.build_optimizer(self.learner)
        self.ema = EMA(self.learner, recipe.train.ema_decay) if recipe.train.ema_decay else None
        self._pairs = pairs_of(self.objective, recipe)
        if self._pairs:
            display.message(require_corpus_of_pairs(self.corpus, source, self._pairs.kind))
        self.feeds = [
            StageLoader(
                self.corpus.train,
                self.tokenizer,
                stage.max_seq_len,
                round(recipe.train.micro_batch_size.number),
                recipe.seed,
                self.corpus.groups,
                cutter if isinstance(cutter := recipe.data.sampler, PluginSamplerConfig) else self._pairs,
            )
            for stage in recipe.stage
        ]
        self._frozen: dict[int, EvalSet] = {}
        is_of_pairs = isinstance(self.objective, BertPretrainingObjective)
        self._judge = PairJudge(self.objective.sampler, self.corpus, self.lengths, world) if is_of_pairs else None
        self._sets = {name: self._frozen_set(name, text, display) for name, text in self.valid.items()}

    def build_optimizer(self, learner: TrainModule) -> Optimizer:
        """A fresh optimizer for a learner, as the recipe says."""
        return build_optimizer(learner, self.recipe.optimizer, bf16=self.world.precision == "bfloat16")

    @property
    def parameters(self) -> int:
        """Trainable numbers; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.learner.parameters())

    @property
    def lengths(self) -> list[int]:
        """Text lengths of the stages, in slots."""
        return [stage.max_seq_len for stage in self.recipe.stage]

    def flops_per_token(self, stage: int) -> float:
        """Floating-point operations of training per token at a stage's length."""
        recipe = self.recipe
        return flops_per_token(recipe.model, self.vocabulary, self.lengths[stage], recipe.objective.masked_fraction)

    def training(self, plan: Plan) -> TrainLoopInputs:
        """What the loop is given."""
        width = self.recipe.model.hidden_size

        def factor(progress: float, step: int) -> float:
            return rate_factor(self.recipe.lr_schedule, progress, step, width)

        return TrainLoopInputs(
            self.learner,
            self.objective,
            self.feeds,
            self.optimizer,
            factor,
            plan,
            self.world,
            self.recipe.seed,
            self.ema,
        )

    @cached_property
    def _documents(self) -> list[Document]:
        return documents_of_shards(self.corpus.held_out)

    def frozen(self, length: int) -> EvalSet:
        """The held-out set, cut at this length; made once."""
        if length not in self._frozen:
            self._frozen[length] = build_eval_set(self._documents, self.tokenizer, length, self.corpus.train.counts_V)
        return self._frozen[length]

    def _frozen_set(self, name: str, source: Source, display: Display) -> EvalSet:
        """One of the further texts, hidden and cut like the held-out set at the last stage's length."""
        most = self.recipe.data.held_out.max_size
        gathered = documents_of_source(source, self.tokenizer, self.corpus.words, most.number)
        size = f"{gathered.characters:,} characters"
        reach = "all of it" if gathered.whole else f"its first {most} (data.held_out.max_size)"
        display.message(f"validation on {name}: {reach}; {size}")
        try:
            return build_eval_set(gathered.documents, self.tokenizer, self.lengths[-1], self.corpus.train.counts_V)
        except TextError as error:
            raise TextError(error.message, location=f"data.valid.{name}: {places(source)}", hint=error.hint) from error

    def validate(self, learner: TrainModule, stage: int) -> Validation:
        """Held-out loss at the last stage's length and, in an earlier stage, also at that stage's."""
        here = {
            length: evaluate(learner.encoder, learner.head, self.frozen(length), self.world)
            for length in {self.lengths[-1], self.lengths[stage]}
        }
        last = here[self.lengths[-1]]
        return Validation(
            loss=last.loss,
            accuracy=last.accuracy,
            bits_per_character=last.bits_per_character,
            unigram_loss=last.unigram_loss,
            length=last.length,
            earlier={length: found.loss for length, found in here.items() if length != last.length},
            sets={name: self._validated(learner, held) for name, held in self._sets.items()},
            pair=self._judge.validation(learner.encoder, learner.parts, stage) if self._judge else None,
        )

    def _validated(self, learner: TrainModule, held: EvalSet) -> SetValidation:
        found = evaluate(learner.encoder, learner.head, held, self.world)
        return SetValidation(**{field.name: getattr(found, field.name) for field in fields(SetValidation)})

    def seen(self, plan: Plan) -> dict[str, float]:
        """How often each text is seen in the whole plan, by its name."""
        times: dict[str, float] = {}
        for stage, feed in zip(plan.stages, self.feeds, strict=True):
            for name, seen in feed.seen(stage.steps * stage.batch_tokens).items():
                times[name] = times.get(name, 0.0) + seen
        return times

    @cached_property
    def panel(self) -> Preview:
        """The prompts that are shown at each validation."""
        show = self.recipe.preview
        prompts: Sequence[str] = show.prompts
        if not prompts:
            starts = [
                _from_a_beginning(document)[: self.lengths[-1]] for document in self._documents[: show.num_samples]
            ]
            prompts = [self.tokenizer.decode(ids.tolist())[: show.max_chars].strip() for ids in starts]
        return Preview(prompts, self.tokenizer, self.corpus.words, self.lengths[-1])

    def _optimizer_in_words(self) -> str:
        taken = list(self.optimizer.taken_by().values())
        muon, kind = taken.count("muon"), self.recipe.optimizer.kind
        return f"Muon for {muon} matrices, AdamW for the other {len(taken) - muon} tensors" if muon else kind

    def back_ends(self) -> dict[str, str]:
        """Which road attention takes here."""
        encoder = self.recipe.model
        dtype = torch.bfloat16 if self.world.precision == "bfloat16" else torch.float32
        return {"attention": backend_of(self.world.device, dtype, encoder.attention_dropout, encoder.head_width)}

    def text_as_seen(self) -> tuple[str, list[TokenView]]:
        """The first text of the order, and what the model will see of it."""
        feed = self.feeds[0]
        batches, _ = feed.step(0, 1, 0, 1)
        original = batches[0].ids_T.tolist()
        masked = self.objective.corrupt(batches[0], self.recipe.seed)
        return self.tokenizer.decode(original[: masked.batch.offsets[1]]), token_views(masked, original, self.tokenizer)

    def card(self, state: TrainState) -> dict[str, Any]:
        """What is ours to say of a model: how it was made, how far, how good."""
        return {
            "unmask": __version__,
            "recipe": self.recipe.name,
            "seed": self.recipe.seed,
            "context": max(self.lengths),
            "words": self.corpus.words,
            "document": self.recipe.data.rule,
            "step": state.step,
            "tokens": state.tokens,
            "text_fingerprint": self.corpus.fingerprint,
            "validation": state.validation,
        }

    def model(self, learner: TrainModule, card: dict[str, Any], path: str = "") -> Model:
        """A learner as a model in hand."""
        pair = learner.parts if isinstance(learner.parts, SentencePairHead) else None
        return Model(learner.encoder, learner.head, self.tokenizer, self.recipe.model, card, path, pair)

    def save(self, run: Path, training: TrainLoopInputs, state: TrainState) -> Path:
        """A step folder."""
        model = self.model(training.judged, self.card(state))
        return checkpoint.save(run, model, training, state, self.recipe.train.keep_last, self._say)

    def save_best(self, run: Path, training: TrainLoopInputs, state: TrainState) -> Path:
        """The model as it is judged now, in the place of the best one."""
        return checkpoint.save_best(run, self.model(training.judged, self.card(state)), training.judged.parts)

    def probe(self) -> Measured:
        """Seconds per step, validation and save on this machine."""

        def validate(folder: Path, training: TrainLoopInputs) -> None:
            self.validate(training.judged, 0)
            if self.recipe.train.keep_best and self.world.is_main_process:  # as if each validation were the best so far
                self.save_best(folder, training, TrainState())

        def save(folder: Path, training: TrainLoopInputs) -> None:
            self.save(folder, training, TrainState())

        care = FULL if self.recipe.train.budget.unit == "seconds" else QUICK
        return measure_step_time(self.training(Plan(())), self.recipe.stage, self.build_optimizer, validate, save, care)

    def forecast(self, plan: Plan) -> CostEstimate:
        """What the plan will cost here."""
        recipe = self.recipe
        micro_tokens = round(recipe.train.micro_batch_size.number)
        planned = [stage.steps * stage.batch_tokens for stage in plan.stages]
        longest = planned.index(max(planned))  # the stage that most of the time goes to
        tokens = min(plan.stages[longest].batch_tokens, micro_tokens)
        asked = max(1, round(tokens * recipe.objective.masked_fraction))
        shapes = products(recipe.model, self.vocabulary, tokens, asked)
        averaged = recipe.train.ema_decay > 0
        return CostEstimate(
            recipe=recipe.name,
            parameters=self.parameters,
            flops_per_token=sum(tokens * self.flops_per_token(stage) for stage, tokens in enumerate(planned))
            / sum(planned),
            documents=self.corpus.train.documents,
            corpus_tokens=self.corpus.train.tokens,
            plan=plan,
            epochs=tuple(tokens / feed.epoch_tokens for tokens, feed in zip(planned, self.feeds, strict=True)),
            texts_seen=self.seen(plan),
            flops_per_second=matmul_rate(shapes, self.world),
            memory_bytes=memory_bytes(
                self.parameters,
                recipe.model.hidden_size,
                recipe.model.num_hidden_layers,
                min(micro_tokens, max(stage.batch_tokens for stage in plan.stages)),
                self.vocabulary,
                recipe.objective.masked_fraction,
                averaged=averaged,
            ),
            disk_bytes=disk_bytes(
                self.parameters,
                recipe.train.keep_last,
                self.corpus.train.tokens,
                self.vocabulary,
                averaged=averaged,
                best=recipe.train.keep_best,
            ),
            device=self.world.describe()["device_name"],
            precision=self.world.precision,
            threads=self.world.threads,
            optimizer=self._optimizer_in_words(),
            patience=recipe.train.early_stopping_patience,
            decay=decay_in_words(recipe.lr_schedule),
        )


def _require_one_text(corpus: TokenizedCorpus, source: Source, recipe: Recipe) -> None:
    """Refuse a corpus that doesn't fill one text of the shortest stage: the budget would go to a few words."""
    num_special_tokens = 2 if corpus.tokenizer.cls_sep_ids else 0
    number, shortest = min(enumerate(recipe.stage), key=lambda numbered: numbered[1].max_seq_len)
    has = corpus.train.tokens + num_special_tokens
    if has < shortest.max_seq_len:
        shorten = f", or shorten the stage: --set stage.{number}.max_seq_len={has}" if has >= SHORTEST else ""
        raise TextError(
            f"all that there is to train on, {corpus.train.tokens:,} tokens, is shorter than one text of "
            f"stage.{number}, which takes {shortest.max_seq_len - num_special_tokens:,}",
            location=places(source),
            hint=f"give more text{shorten}",
        )


def _from_a_beginning(document: Document) -> Integers:
    """The ids of a document from its first sentence or, failing that, word: a held-out tail begins anywhere."""
    for mark in (SENTENCE_START, WORD_START):
        begins = np.flatnonzero(document.marks & mark)
        if len(begins):
            return document.ids[begins[0] :]
    return document.ids
