"""Room card: what a run asks of its model.

Comes in: a Recipe, the tokenizer, the corpus. Goes out: the objective; where it asks about pairs of segments, how they
are drawn, and a judge that has frozen some of the held-out text; refusals before anything is trained. Called by:
workshop, cli.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch

from unmask import rng
from unmask.blueprint import Recipe
from unmask.contracts import Objective, ObjectiveTools, Source
from unmask.errors import RecipeError, TextError, TokenizerError
from unmask.eval.pairs import FrozenPairs, evaluate_pairs, freeze_pairs
from unmask.nn import ClassicSettings, build_pair
from unmask.objectives.mlm import Mlm
from unmask.objectives.pair import BertSettings, MlmWithPairs
from unmask.objectives.preference import preferred
from unmask.outside import OutsideCutter, OutsideObjective, make
from unmask.text.corpus import Corpus, places
from unmask.text.pairs import PairKind, require_pairs
from unmask.text.tokenizer import Tokenizer
from unmask.text.words import WordsRule
from unmask.train.feed import PairSampling
from unmask.train.learner import Learner
from unmask.train.plan import SHORTEST
from unmask.train.show import PairValidation
from unmask.world import World


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


class PairJudge:
    """Asks a learner about frozen pairs of the held-out text."""

    def __init__(self, kind: str, corpus: Corpus, lengths: Sequence[int], world: World) -> None:
        """`lengths` are those of the stages.

        Raises:
            TextError: too few held-out documents have two sentences.
        """
        self._kind: PairKind = cast("PairKind", kind)
        self._corpus, self._lengths, self._world = corpus, lengths, world
        self._frozen: dict[int, FrozenPairs] = {}
        self.frozen(lengths[-1])  # now, and not when hours have gone into training

    def frozen(self, length: int) -> FrozenPairs:
        """Pairs of at most this length; made once."""
        if length not in self._frozen:
            self._frozen[length] = freeze_pairs(self._corpus.held_out, self._corpus.tokenizer, length, self._kind)
        return self._frozen[length]

    def validation(self, learner: Learner, stage: int) -> PairValidation:
        """The pairs at the last stage's length and, in an earlier stage, also at that stage's."""
        here = {
            length: evaluate_pairs(learner.encoder, learner.parts, self.frozen(length), self._world)
            for length in {self._lengths[-1], self._lengths[stage]}
        }
        last = here.pop(self._lengths[-1])
        return PairValidation(last.loss, last.accuracy, last.pairs, {n: found.accuracy for n, found in here.items()})
