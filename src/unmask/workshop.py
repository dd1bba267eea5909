"""Room card: the parts of a run, joined.

Comes in: a Recipe, a source of text, the machine. Goes out: a Workshop: corpus, learner, objective, optimiser, feeds,
frozen validation, panel, and the functions over them that a run needs (validate, save, probe, forecast). Called by:
pretrain.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unmask import __version__, rng
from unmask.blueprint import Recipe
from unmask.bundle import Model
from unmask.contracts import SENTENCE_START, WORD_START, Learner, Source
from unmask.errors import TextError
from unmask.eval.heldout import Document, Frozen, evaluate, freeze
from unmask.nn import ModernSettings, build, flops_per_token
from unmask.nn.attention import backend_of
from unmask.objectives.masking import Integers
from unmask.objectives.mlm import Mlm
from unmask.optim import Optimiser, build_optimiser
from unmask.schedule import rate_factor
from unmask.text.corpus import Corpus, default_cache, places, prepare
from unmask.text.shards import Shards
from unmask.train import checkpoint
from unmask.train.feed import StageFeed
from unmask.train.forecast import disk_bytes, memory_bytes, probe
from unmask.train.loop import Standing, Training
from unmask.train.panel import Panel, Seen, as_seen
from unmask.train.plan import SHORTEST, Measured, Plan
from unmask.train.show import Display, Forecast, Validation
from unmask.world import World, matmul_rate


class Workshop:
    """Everything that a run works with. Building it reads and tokenizes the text; it writes to the cache alone."""

    def __init__(self, recipe: Recipe, source: Source, world: World, display: Display) -> None:
        self.recipe = recipe
        self.source = source
        self.world = world
        self.corpus: Corpus = prepare(source, recipe.text, default_cache(), display.preparing)
        for sentence in self.corpus.said:
            display.say(sentence)
        _require_one_text(self.corpus, source, recipe)
        self.tokenizer = self.corpus.tokenizer
        self.vocabulary = self.tokenizer.size
        torch.manual_seed(rng.integer(recipe.seed, "weights"))
        encoder, head = build(recipe.encoder, self.vocabulary)
        self.objective = Mlm(recipe.objective, self.tokenizer.mask_id, self.tokenizer.ordinary_N)
        self.learner = Learner(encoder.to(world.device), head.to(world.device), self.objective)
        self.optimiser = self.build_optimiser(self.learner)
        self.feeds = [
            StageFeed(
                self.corpus.train, self.tokenizer, stage.length, round(recipe.train.micro_batch.number), recipe.seed
            )
            for stage in recipe.stage
        ]
        self._frozen: dict[int, Frozen] = {}

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
        return flops_per_token(self.recipe.encoder, self.vocabulary, self.lengths[stage], self.recipe.objective.rate)

    def training(self, plan: Plan) -> Training:
        """What the loop is given."""
        width = self.recipe.encoder.width

        def factor(progress: float, step: int) -> float:
            return rate_factor(self.recipe.schedule, progress, step, width)

        return Training(
            self.learner, self.objective, self.feeds, self.optimiser, factor, plan, self.world, self.recipe.seed
        )

    @cached_property
    def _documents(self) -> list[Document]:
        return documents_of(self.corpus.held_out)

    def frozen(self, length: int) -> Frozen:
        """The held-out set, cut at this length; made once."""
        if length not in self._frozen:
            self._frozen[length] = freeze(self._documents, self.tokenizer, length, self.corpus.train.counts_V)
        return self._frozen[length]

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
        )

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
        """The learner as a model in hand."""
        return Model(learner.encoder, learner.head, self.tokenizer, self.recipe.encoder, card, path)

    def save(self, run: Path, learner: Learner, optimiser: Optimiser, standing: Standing) -> Path:
        """A step folder."""
        model = self.model(learner, self.card(standing))
        return checkpoint.save(run, model, learner.state_dict(), optimiser, standing, self.recipe.train.keep)

    def probe(self) -> Measured:
        """Seconds per step, validation and save on this machine."""
        return probe(
            self.training(Plan(())),
            self.recipe.stage,
            self.build_optimiser,
            lambda learner: self.validate(learner, 0),
            lambda folder, learner, optimiser: self.save(folder, learner, optimiser, Standing()),
        )

    def forecast(self, plan: Plan) -> Forecast:
        """What the plan will cost here."""
        recipe = self.recipe
        micro_tokens = round(recipe.train.micro_batch.number)
        planned = [stage.steps * stage.batch_tokens for stage in plan.stages]
        longest = planned.index(max(planned))  # the stage that most of the time goes to
        shapes = _shapes(recipe, self.vocabulary, min(plan.stages[longest].batch_tokens, micro_tokens))
        return Forecast(
            recipe=recipe.name,
            parameters=self.parameters,
            flops_per_token=sum(tokens * self.flops_per_token(stage) for stage, tokens in enumerate(planned))
            / sum(planned),
            documents=self.corpus.train.documents,
            corpus_tokens=self.corpus.train.tokens,
            plan=plan,
            epochs=sum(
                stage.steps * stage.batch_tokens / feed.epoch_tokens
                for stage, feed in zip(plan.stages, self.feeds, strict=True)
            ),
            flops_per_second=matmul_rate(shapes, self.world),
            memory_bytes=memory_bytes(
                self.parameters,
                recipe.encoder.width,
                recipe.encoder.layers,
                min(micro_tokens, max(stage.batch_tokens for stage in plan.stages)),
                self.vocabulary,
                recipe.objective.rate,
            ),
            disk_bytes=disk_bytes(self.parameters, recipe.train.keep, self.corpus.train.tokens, self.vocabulary),
            device=self.world.facts()["device_name"],
            precision=self.world.precision,
            threads=self.world.threads,
            optimiser=self._optimiser_in_words(),
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


def documents_of(shards: Shards) -> list[Document]:
    """The documents of a shard set with something in them, in hand."""
    characters, unknown = shards.characters_N.tolist(), shards.unknown_characters_N.tolist()
    lengths = shards.lengths_N.tolist()
    documents = [
        Document(shards.ids(number, 0, length), shards.marks(number, 0, length), characters[number], unknown[number])
        for number, length in enumerate(lengths)
    ]
    if not any(lengths):
        raise TextError("the held-out text is empty", next="hold out more: --set text.held_out.share=10%")
    return documents


def _from_a_beginning(document: Document) -> Integers:
    """The ids of a document from its first sentence or, failing that, word: a held-out tail begins anywhere."""
    for mark in (SENTENCE_START, WORD_START):
        begins = np.flatnonzero(document.marks & mark)
        if len(begins):
            return document.ids[begins[0] :]
    return document.ids


def _shapes(recipe: Recipe, vocabulary: int, tokens: int) -> list[tuple[int, int, int]]:
    """The matrix products of one forward pass: projections, feed-forward, head."""
    width, inner = recipe.encoder.width, recipe.encoder.feed_forward
    gated = isinstance(recipe.encoder, ModernSettings)
    layer = [(tokens, width, width)] * 4 + [(tokens, width, 2 * inner if gated else inner), (tokens, inner, width)]
    asked = max(1, round(tokens * recipe.objective.rate))
    dense = [(asked, width, width)] if gated else []
    return layer * recipe.encoder.layers + dense + [(asked, width, vocabulary)]
