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
from unmask.core.distributed import World, matmul_rate
from unmask.core.errors import RecipeError, TextError, TokenizerError
from unmask.core.files import default_cache
from unmask.core.plugins import OutsideCutter, OutsideObjective, make, said
from unmask.core.types import SENTENCE_START, WORD_START, Objective, ObjectiveTools, Source
from unmask.data.loader import PairSampling, StageFeed
from unmask.data.prepare import Corpus, places, prepare
from unmask.data.sentence_pairs import PairKind, require_pairs
from unmask.data.sources import FileSource
from unmask.evaluation.masked_lm import Document, Frozen, documents_of_shards, documents_of_source, evaluate, freeze
from unmask.evaluation.sentence_pairs import PairJudge
from unmask.evaluation.validation import SetValidation, Validation
from unmask.models import build, build_pair, flops_per_token, products
from unmask.models.attention import backend_of
from unmask.models.bert import ClassicSettings, PairHead
from unmask.models.model import Model
from unmask.objectives.masking import Integers
from unmask.objectives.mlm import Mlm
from unmask.objectives.sentence_pairs import BertSettings, MlmWithPairs
from unmask.objectives.word_boost import preferred
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.words import WordsRule
from unmask.training import checkpoint
from unmask.training.display import Display, Panel, Seen, as_seen
from unmask.training.estimate import PLANNED, TOLD, Forecast, disk_bytes, memory_bytes, probe
from unmask.training.loop import Average, Learner, Standing, Training
from unmask.training.optim import Optimiser, build_optimiser, decay_in_words, rate_factor
from unmask.training.plan import SHORTEST, Measured, Plan
from unmask.training.recipe import Recipe
from unmask.training.warm_start import Start


def build_objective(recipe: Recipe, tokenizer: Tokenizer, words: WordsRule, say: Callable[[str], object]) -> Objective:
    """What the recipe asks of the model: masked tokens, those and pairs, or an objective from outside."""
    settings = recipe.objective
    if isinstance(settings, OutsideObjective):
        return make(settings, ObjectiveTools(tokenizer, recipe.encoder.width))
    mlm = Mlm(settings, tokenizer.mask_id, tokenizer.ordinary_N, preferred(settings, tokenizer, words, say))
    if not isinstance(settings, BertSettings):
        return mlm
    torch.manual_seed(rng.integer(recipe.seed, "pair weights"))  # the others are those of a run without this head
    return MlmWithPairs(settings, mlm, build_pair(recipe.encoder))


def check_pairs(recipe: Recipe) -> None:
    """Refuse an encoder that can't tell two segments apart, and samples that are none, before any text is read."""
    settings, encoder = recipe.objective, recipe.encoder
    if not isinstance(settings, BertSettings):
        return
    if not isinstance(encoder, ClassicSettings) or encoder.segments < 2 or encoder.family != "bert":
        kind = encoder.kind if not isinstance(encoder, ClassicSettings) else f"{encoder.segments} segment(s)"
        raise RecipeError(
            f"the objective asks about two segments, and this encoder ({kind}) has no segments to tell them apart",
            where=f"objective.kind = bert, pair = {settings.pair}",
            next="take encoder.kind=classic, as in --recipe bert-mini, or train on masks alone: objective.kind=mlm",
        )
    if isinstance(recipe.text.cutter, OutsideCutter):
        raise RecipeError(
            f"the objective reads pairs, and `{recipe.text.cutter.kind}` cuts windows",
            where="text.cutter",
            next="leave the cutter out: pairs are cut by the house",
        )
    for number, stage in enumerate(recipe.stage):
        if stage.length < SHORTEST + 2:
            raise RecipeError(
                f"length = {stage.length} leaves no room for two segments",
                where=f"stage.{number}",
                next=f"use {SHORTEST + 2} or more",
            )


def pairs_of(objective: Objective, recipe: Recipe) -> PairSampling | None:
    """How the objective's samples are drawn, where they are pairs."""
    if objective.cutter == "windows":
        return None
    kind = cast("PairKind", objective.cutter)
    settings = recipe.objective
    return PairSampling(kind, settings.short) if isinstance(settings, BertSettings) else PairSampling(kind)


def require_corpus_of_pairs(corpus: Corpus, source: Source, kind: PairKind) -> str:
    """Refuse text or a tokenizer that gives no pairs; else how many documents take part, in a sentence."""
    if corpus.tokenizer.frame is None:
        raise TokenizerError(
            "this tokenizer has no [CLS] and [SEP], which a pair of segments is set between",
            where="text.tokenizer",
            next="take one that has them, or train on masks alone: objective.kind=mlm",
        )
    try:
        require_pairs(corpus.train, kind)
    except TextError as error:
        raise TextError(error.what, where=places(source), next=error.next) from error
    having, documents = int((corpus.train.sentences_N > 1).sum()), corpus.train.documents
    left = f"; the other {documents - having:,} are left out" if having < documents else ""
    return f"pairs ({kind}): from {having:,} documents of two sentences or more{left}"


class Workshop:
    """Everything that a run works with. Building it reads and tokenizes the text; it writes to the cache alone."""

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        world: World,
        display: Display,
        valid: Mapping[str, FileSource] | None = None,
        start: Start | None = None,
    ) -> None:
        """`valid` are further texts that each validation measures, by name; `start` is a model to go on from."""
        self.recipe = recipe
        self.source = source
        self.valid: Mapping[str, FileSource] = valid or {}
        self.world = world
        self._say = display.say
        check_pairs(recipe)
        for kind in recipe.outside:
            display.say(said(kind))
        self.corpus: Corpus = prepare(source, recipe.text, default_cache(), display.preparing)
        for sentence in self.corpus.said:
            display.say(sentence)
        _require_one_text(self.corpus, source, recipe)
        self.tokenizer = self.corpus.tokenizer
        torch.manual_seed(rng.integer(recipe.seed, "weights"))
        if start:
            encoder, head = start.modules(self.tokenizer)
        else:
            encoder, head = build(recipe.encoder, recipe.start.rows or self.tokenizer.size)
        self.vocabulary = int(cast(Any, encoder).vocabulary)  # rows of its table; some may have no piece
        if recipe.start.model:
            self.recipe = recipe = replace(recipe, start=replace(recipe.start, rows=self.vocabulary))
        self.objective = build_objective(recipe, self.tokenizer, self.corpus.words, display.say)
        if start and start.model.pair is not None and isinstance(self.objective.parts, PairHead):
            self.objective.parts.load_state_dict(start.model.pair.state_dict())
        self.objective.parts.to(world.device)
        self.learner = Learner(encoder.to(world.device), head.to(world.device), self.objective)
        self.optimiser = self.build_optimiser(self.learner)
        self.average = Average(self.learner, recipe.train.average) if recipe.train.average else None
        self._pairs = pairs_of(self.objective, recipe)
        if self._pairs:
            display.say(require_corpus_of_pairs(self.corpus, source, self._pairs.kind))
        self.feeds = [
            StageFeed(
                self.corpus.train,
                self.tokenizer,
                stage.length,
                round(recipe.train.micro_batch.number),
                recipe.seed,
                self.corpus.groups,
                cutter if isinstance(cutter := recipe.text.cutter, OutsideCutter) else self._pairs,
            )
            for stage in recipe.stage
        ]
        self._frozen: dict[int, Frozen] = {}
        is_of_pairs = isinstance(self.objective, MlmWithPairs)
        self._judge = PairJudge(self.objective.cutter, self.corpus, self.lengths, world) if is_of_pairs else None
        self._sets = {name: self._frozen_set(name, text, display) for name, text in self.valid.items()}

    def build_optimiser(self, learner: Learner) -> Optimiser:
        """A fresh optimiser for a learner, as the recipe says."""
        return build_optimiser(learner, self.recipe.optimiser, bf16=self.world.precision == "bfloat16")

    @property
    def parameters(self) -> int:
        """Trainable numbers; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.learner.parameters())

    @property
    def lengths(self) -> list[int]:
        """Text lengths of the stages, in slots."""
        return [stage.length for stage in self.recipe.stage]

    def flops_per_token(self, stage: int) -> float:
        """Floating-point operations of training per token at a stage's length."""
        recipe = self.recipe
        return flops_per_token(recipe.encoder, self.vocabulary, self.lengths[stage], recipe.objective.asked_share)

    def training(self, plan: Plan) -> Training:
        """What the loop is given."""
        width = self.recipe.encoder.width

        def factor(progress: float, step: int) -> float:
            return rate_factor(self.recipe.schedule, progress, step, width)

        return Training(
            self.learner,
            self.objective,
            self.feeds,
            self.optimiser,
            factor,
            plan,
            self.world,
            self.recipe.seed,
            self.average,
        )

    @cached_property
    def _documents(self) -> list[Document]:
        return documents_of_shards(self.corpus.held_out)

    def frozen(self, length: int) -> Frozen:
        """The held-out set, cut at this length; made once."""
        if length not in self._frozen:
            self._frozen[length] = freeze(self._documents, self.tokenizer, length, self.corpus.train.counts_V)
        return self._frozen[length]

    def _frozen_set(self, name: str, source: Source, display: Display) -> Frozen:
        """One of the further texts, hidden and cut like the held-out set at the last stage's length."""
        most = self.recipe.text.held_out.at_most
        gathered = documents_of_source(source, self.tokenizer, self.corpus.words, most.number)
        size = f"{gathered.characters:,} characters"
        reach = "all of it" if gathered.whole else f"its first {most} (text.held_out.at_most)"
        display.say(f"validation on {name}: {reach}; {size}")
        try:
            return freeze(gathered.documents, self.tokenizer, self.lengths[-1], self.corpus.train.counts_V)
        except TextError as error:
            raise TextError(error.what, where=f"text.valid.{name}: {places(source)}", next=error.next) from error

    def validate(self, learner: Learner, stage: int) -> Validation:
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

    def _validated(self, learner: Learner, held: Frozen) -> SetValidation:
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
    def panel(self) -> Panel:
        """The prompts that are shown at each validation."""
        show = self.recipe.show
        prompts: Sequence[str] = show.prompts
        if not prompts:
            starts = [_from_a_beginning(document)[: self.lengths[-1]] for document in self._documents[: show.lines]]
            prompts = [self.tokenizer.decode(ids.tolist())[: show.characters].strip() for ids in starts]
        return Panel(prompts, self.tokenizer, self.corpus.words, self.lengths[-1])

    def _optimiser_in_words(self) -> str:
        taken = list(self.optimiser.taken_by().values())
        muon, kind = taken.count("muon"), self.recipe.optimiser.kind
        return f"Muon for {muon} matrices, AdamW for the other {len(taken) - muon} tensors" if muon else kind

    def back_ends(self) -> dict[str, str]:
        """Which road attention takes here."""
        encoder = self.recipe.encoder
        dtype = torch.bfloat16 if self.world.precision == "bfloat16" else torch.float32
        return {"attention": backend_of(self.world.device, dtype, encoder.attention_dropout, encoder.head_width)}

    def text_as_seen(self) -> tuple[str, list[Seen]]:
        """The first text of the order, and what the model will see of it."""
        feed = self.feeds[0]
        batches, _ = feed.step(0, 1, 0, 1)
        original = batches[0].ids_T.tolist()
        puzzle = self.objective.corrupt(batches[0], self.recipe.seed)
        return self.tokenizer.decode(original[: puzzle.batch.starts[1]]), as_seen(puzzle, original, self.tokenizer)

    def card(self, standing: Standing) -> dict[str, Any]:
        """What is ours to say of a model: how it was made, how far, how good."""
        return {
            "unmask": __version__,
            "recipe": self.recipe.name,
            "seed": self.recipe.seed,
            "context": max(self.lengths),
            "words": self.corpus.words,
            "document": self.recipe.text.rule,
            "step": standing.step,
            "tokens": standing.tokens,
            "text_fingerprint": self.corpus.fingerprint,
            "validation": standing.validation,
        }

    def model(self, learner: Learner, card: dict[str, Any], path: str = "") -> Model:
        """A learner as a model in hand."""
        pair = learner.parts if isinstance(learner.parts, PairHead) else None
        return Model(learner.encoder, learner.head, self.tokenizer, self.recipe.encoder, card, path, pair)

    def save(self, run: Path, training: Training, standing: Standing) -> Path:
        """A step folder."""
        model = self.model(training.judged, self.card(standing))
        return checkpoint.save(run, model, training, standing, self.recipe.train.keep, self._say)

    def save_best(self, run: Path, training: Training, standing: Standing) -> Path:
        """The model as it is judged now, in the place of the best one."""
        return checkpoint.save_best(run, self.model(training.judged, self.card(standing)), training.judged.parts)

    def probe(self) -> Measured:
        """Seconds per step, validation and save on this machine."""

        def validate(folder: Path, training: Training) -> None:
            self.validate(training.judged, 0)
            if self.recipe.train.keep_best and self.world.first:  # as if each validation were the best so far
                self.save_best(folder, training, Standing())

        def save(folder: Path, training: Training) -> None:
            self.save(folder, training, Standing())

        care = PLANNED if self.recipe.train.budget.unit == "seconds" else TOLD
        return probe(self.training(Plan(())), self.recipe.stage, self.build_optimiser, validate, save, care)

    def forecast(self, plan: Plan) -> Forecast:
        """What the plan will cost here."""
        recipe = self.recipe
        micro_tokens = round(recipe.train.micro_batch.number)
        planned = [stage.steps * stage.batch_tokens for stage in plan.stages]
        longest = planned.index(max(planned))  # the stage that most of the time goes to
        tokens = min(plan.stages[longest].batch_tokens, micro_tokens)
        asked = max(1, round(tokens * recipe.objective.asked_share))
        shapes = products(recipe.encoder, self.vocabulary, tokens, asked)
        averaged = recipe.train.average > 0
        return Forecast(
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
                recipe.encoder.width,
                recipe.encoder.layers,
                min(micro_tokens, max(stage.batch_tokens for stage in plan.stages)),
                self.vocabulary,
                recipe.objective.asked_share,
                averaged=averaged,
            ),
            disk_bytes=disk_bytes(
                self.parameters,
                recipe.train.keep,
                self.corpus.train.tokens,
                self.vocabulary,
                averaged=averaged,
                best=recipe.train.keep_best,
            ),
            device=self.world.facts()["device_name"],
            precision=self.world.precision,
            threads=self.world.threads,
            optimiser=self._optimiser_in_words(),
            patience=recipe.train.patience,
            decay=decay_in_words(recipe.schedule),
        )


def _require_one_text(corpus: Corpus, source: Source, recipe: Recipe) -> None:
    """Refuse a corpus that doesn't fill one text of the shortest stage: the budget would go to a few words."""
    framing = 2 if corpus.tokenizer.frame else 0
    number, shortest = min(enumerate(recipe.stage), key=lambda numbered: numbered[1].length)
    has = corpus.train.tokens + framing
    if has < shortest.length:
        shorten = f", or shorten the stage: --set stage.{number}.length={has}" if has >= SHORTEST else ""
        raise TextError(
            f"all that there is to train on, {corpus.train.tokens:,} tokens, is shorter than one text of "
            f"stage.{number}, which takes {shortest.length - framing:,}",
            where=places(source),
            next=f"give more text{shorten}",
        )


def _from_a_beginning(document: Document) -> Integers:
    """The ids of a document from its first sentence or, failing that, word: a held-out tail begins anywhere."""
    for mark in (SENTENCE_START, WORD_START):
        begins = np.flatnonzero(document.marks & mark)
        if len(begins):
            return document.ids[begins[0] :]
    return document.ids
