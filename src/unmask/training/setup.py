"""Builds the components of a run: tokenized corpus, model, objective, optimizer, data loaders and validator."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from unmask.core import rng
from unmask.core.distributed import DistributedContext
from unmask.core.errors import RecipeError, TextError, TokenizerError
from unmask.core.files import default_cache
from unmask.core.plugins import PluginObjectiveConfig, PluginSamplerConfig, describe, make
from unmask.core.types import Objective, ObjectiveContext, ProgressCallback
from unmask.core.version import __version__
from unmask.data.advice import (
    LONG_RUN,
    MANY_UNKNOWN,
    Choice,
    adapt,
    fitting_kind,
    is_set,
    may_shrink,
    spelling_kind,
    text_facts,
    unknown_warning,
    vocabulary_choice,
)
from unmask.data.loader import PairSampling, StageLoader, build_sampler
from unmask.data.prepare import TokenizedCorpus, prepare
from unmask.data.sentence_pairs import PairKind, require_pairs
from unmask.data.sources import BaseSource, FileSource
from unmask.evaluation.validation import Validation, Validator, label_offset
from unmask.models import build_model, build_pair
from unmask.models.attention import backend_of
from unmask.models.bert import BertConfig, SentencePairHead
from unmask.models.electra import ElectraModules, build_electra, require_electra_encoder
from unmask.models.model import Model, ModelCard
from unmask.models.parallel import share
from unmask.objectives import ObjectiveConfig
from unmask.objectives.adaptive import AdaptiveMaskingConfig, AdaptiveMaskingObjective
from unmask.objectives.causal import CausalLMConfig, CausalLMObjective, MaskedNextTokenConfig, MaskedNextTokenObjective
from unmask.objectives.diffusion import MaskedDiffusionConfig, MaskedDiffusionObjective
from unmask.objectives.mlm import MaskedLMObjective
from unmask.objectives.rtd import ReplacedTokenConfig, ReplacedTokenObjective
from unmask.objectives.sentence_pairs import BertPretrainingConfig, BertPretrainingObjective
from unmask.objectives.word_boost import tokenize_boosted_words
from unmask.tokenization.settings import ExtendedTokenizerConfig, SampledConfig
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.words import WordsRule
from unmask.training.loop import EMA, TrainLoopInputs, TrainModule, TrainState
from unmask.training.optim import Optimizer, lr_factor_at
from unmask.training.plan import MIN_SEQ_LEN
from unmask.training.recipe import Recipe
from unmask.training.warm_start import WarmStart

_log = logging.getLogger("unmask")

_FILLED = 0.99  # of the tokens
_LENGTH_STEP = 8


@dataclass(frozen=True)
class RunComponents:
    """The components of a run. Building them writes only to the cache."""

    source: BaseSource
    valid_sources: Mapping[str, FileSource]  # further validation texts, by name
    corpus: TokenizedCorpus
    training: TrainLoopInputs
    loaders: tuple[StageLoader, ...]  # one per stage; the same as in `training`
    validator: Validator

    @property
    def context(self) -> DistributedContext:
        """Device and ranks."""
        return self.training.context

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of all ranks; tied weights count once."""
        return sum(parameter.numel() for parameter in self.training.module.parameters() if parameter.requires_grad)

    @property
    def vocab_size(self) -> int:
        """Size of the token embedding, which may exceed the number of tokens of the tokenizer."""
        return self.training.module.encoder.vocab_size


def prepare_corpus(
    recipe: Recipe,
    source: BaseSource,
    on_progress: ProgressCallback,
    tokenizer: Tokenizer | None = None,
    *,
    verify: bool = False,
    shrinks: bool = False,
) -> TokenizedCorpus:
    """Reads, splits and tokenizes the text of a run; trains a tokenizer if none is given.

    Raises:
        RecipeError: the model doesn't fit the objective or, for sentence pairs, the sampler or a stage doesn't.
        TextError: the text can't be read or split.
    """
    check_pairs(recipe)
    if any(isinstance(objective, ReplacedTokenConfig) for objective in recipe.objectives):
        require_electra_encoder(recipe.model)
    for plugin in recipe.plugins:
        _log.info(describe(plugin))
    corpus = prepare(source, recipe.data, default_cache(), on_progress, tokenizer, verify=verify, shrinks=shrinks)
    for note in corpus.notes:
        _log.info(note)
    return corpus


def adapt_to_text(
    recipe: Recipe, source: BaseSource, explicit: Collection[str] | None
) -> tuple[Recipe, BaseSource, bool]:
    """Returns recipe and source with the settings that fit the text, and whether the vocabulary may shrink.

    Settings whose keys are in `explicit` are kept; None stands for all keys.
    """
    source, data, choices = adapt(source, recipe.data, explicit)
    for choice in choices:
        _log.info(str(choice))
    return replace(recipe, data=data), source, may_shrink(data, explicit)


def adapt_to_corpus(recipe: Recipe, corpus: TokenizedCorpus, explicit: Collection[str] | None) -> Recipe:
    """Returns the recipe with the size of the trained vocabulary, and with stages that the documents fill.

    A position beyond the longest document is never trained. A stage is shortened if it is more than twice as long as
    the documents that have 99 % of the tokens.
    """
    if explicit is None:
        return recipe
    if choice := vocabulary_choice(recipe.data, corpus.tokenizer.size):
        _log.info(str(choice))
        sized = cast("SampledConfig", recipe.data.tokenizer)
        tokenizer = replace(sized, vocab_size=corpus.tokenizer.size)
        recipe = replace(recipe, data=replace(recipe.data, tokenizer=tokenizer))
    has_pairs = any(isinstance(objective, BertPretrainingConfig) for objective in recipe.objectives)
    if has_pairs or isinstance(recipe.data.sampler, PluginSamplerConfig):
        return recipe
    filled = _filled_length(corpus.train.lengths) + corpus.tokenizer.num_special_tokens()
    length = max(MIN_SEQ_LEN, -(-filled // _LENGTH_STEP) * _LENGTH_STEP)
    stages = list(recipe.stage)
    for number, stage in enumerate(stages):
        key = f"stage.{number}.max_seq_len"
        if stage.max_seq_len > 2 * length and not is_set(explicit, key):
            stages[number] = replace(stage, max_seq_len=length)
            reason = f"documents of at most {filled} tokens have {_FILLED:.0%} of the text"
            what = f"stage {number}: sequences of at most {length} tokens instead of {stage.max_seq_len}"
            _log.info(str(Choice(what, reason, f"{key}={stage.max_seq_len}")))
    return replace(recipe, stage=tuple(stages))


def _filled_length(lengths: NDArray[np.int64]) -> int:
    """Returns the length of the documents that have 99 % of the tokens: no longer document is needed for them."""
    ordered = np.sort(np.asarray(lengths))
    tokens = np.cumsum(ordered)
    return int(ordered[np.searchsorted(tokens, _FILLED * tokens[-1])])


def check_unknown(recipe: Recipe, source: BaseSource, corpus: TokenizedCorpus) -> None:
    """Warns about characters that the tokenizer can't spell.

    Raises:
        TokenizerError: there are more of them than `data.max_unknown`.
    """
    share = int(corpus.facts["train_unknown_characters"]) / max(1, int(corpus.facts["train_characters"]))
    if share <= MANY_UNKNOWN:
        return
    facts, kind = text_facts(source), recipe.data.tokenizer.kind
    message = unknown_warning(share, kind, facts)
    fitting = spelling_kind(facts, kind)
    fix = f"use a tokenizer that spells this text: --set data.tokenizer.kind={fitting}"
    if recipe.init.model:
        # Words between spaces can be added to a vocabulary; runs without a space can't.
        has_words = fitting_kind(facts, "bpe")[0] in ("bpe", "unigram") and facts.mean_run < LONG_RUN
        is_extensible = has_words and not isinstance(recipe.data.tokenizer, ExtendedTokenizerConfig)
        fix = f"train a new model without --from: --recipe tiny --set data.tokenizer.kind={fitting}"
        fix += ", or add tokens to the model's: --extend-vocabulary 1000" if is_extensible else ""
    if share > recipe.data.max_unknown.fraction:
        raise TokenizerError(message, location=source.location, hint=f"{fix}; or train anyway: --allow-unknown")
    _log.warning(f"{message}; {fix}")


def build_components(
    recipe: Recipe,
    source: BaseSource,
    corpus: TokenizedCorpus,
    context: DistributedContext,
    *,
    valid_sources: Mapping[str, FileSource],
    warm_start: WarmStart | None = None,
) -> RunComponents:
    """Builds model, objective, optimizer, data loaders and validator.

    Raises:
        TextError: the text is shorter than one sequence or has too few sentence pairs, or a validation text can't be
            used.
        TokenizerError: the tokenizer lacks the special tokens that sentence pairs need.
        RecipeError: an objective doesn't fit the model, the tokenizer, the other objectives or minimal pairs.
    """
    _require_one_sequence(corpus, source, recipe)
    module, objectives = build_train_module(recipe, corpus, context, warm_start)
    if recipe.train.evaluate.pairs and any(map(label_offset, objectives)) and not corpus.tokenizer.frame.before:
        raise RecipeError(
            "minimal pairs need a token such as [CLS] before a text to score its first word in a stage that predicts "
            "the next token, and the tokenizer puts none there",
            location="train.evaluate.pairs",
            hint="remove train.evaluate, use another tokenizer, or train with objective.kind=mlm",
        )
    pairs = pair_sampling(recipe, objectives)
    kinds: list[PairKind] = [each.kind for each in pairs if each]
    for kind in dict.fromkeys(kinds):
        _log.info(require_corpus_of_pairs(corpus, source, kind))
    loaders = build_loaders(recipe, corpus, pairs)
    validated = [each.sampler for each in objectives if isinstance(each, BertPretrainingObjective)]

    def lr_factor(progress: float, step: int) -> float:
        return lr_factor_at(recipe.lr_schedule, progress, step, recipe.model.hidden_size)

    parallelism = share(recipe.train.parallel, context, module, objectives)
    training = TrainLoopInputs(
        module=module,
        objectives=objectives,
        loaders=loaders,
        parallelism=parallelism,
        optimizer=Optimizer(module, recipe.optimizer, bf16=context.precision == "bfloat16"),
        lr_factor=lr_factor,
        context=context,
        seed=recipe.seed,
        ema=EMA(parallelism.copy(module), recipe.train.ema_decay) if recipe.train.ema_decay else None,
        max_skipped_steps=recipe.train.max_skipped_steps,
    )
    validator = Validator(
        corpus,
        [stage.max_seq_len for stage in recipe.stage],
        context,
        objectives,
        valid_sources=valid_sources,
        max_size=recipe.data.held_out.max_size,
        pair_kind=cast("PairKind", validated[0]) if validated else None,
    )
    return RunComponents(source, valid_sources, corpus, training, loaders, validator)


def build_train_module(
    recipe: Recipe, corpus: TokenizedCorpus, context: DistributedContext, warm_start: WarmStart | None
) -> tuple[TrainModule, tuple[Objective, ...]]:
    """Builds encoder, head and the objective of each stage on the device, with random weights or a warm start's.

    Raises:
        RecipeError: two objectives have modules of their own.
    """
    tokenizer = corpus.tokenizer
    # Weights are drawn from torch's generator in the order of construction: the seed must directly precede it.
    torch.manual_seed(rng.integer(recipe.seed, "weights"))
    if warm_start:
        encoder, head = warm_start.modules(tokenizer)
    else:
        encoder, head = build_model(recipe.model, recipe.init.vocab_size or tokenizer.size)
    distinct: list[ObjectiveConfig | PluginObjectiveConfig] = []
    for settings in recipe.objectives:
        if settings not in distinct:
            distinct.append(settings)
    built = [build_objective(settings, recipe, tokenizer, corpus.words) for settings in distinct]
    parts = _own_modules(built)
    if warm_start and warm_start.model.pair is not None and isinstance(parts, SentencePairHead):
        parts.load_state_dict(warm_start.model.pair.state_dict())
    parts.to(context.device)
    if all(isinstance(settings, ReplacedTokenConfig) for settings in recipe.objectives):
        head.requires_grad_(False)  # not trained: with weight decay, it would depend on the number of ranks
    encoder = encoder.to(context.device)
    if recipe.train.compile:
        encoder.compile_blocks()
    objectives = tuple(built[distinct.index(settings)] for settings in recipe.objectives)
    return TrainModule(encoder, head.to(context.device), parts), objectives


def _own_modules(objectives: Sequence[Objective]) -> nn.Module:
    """Returns the modules of the only objective that has some; an empty module if there is none."""
    with_modules = [objective for objective in objectives if objective.modules.state_dict()]
    if len(with_modules) > 1:
        raise RecipeError(
            f"{len(with_modules)} objectives have weights or statistics of their own, expected at most one",
            location="stage",
            hint="give the stages the same objective, or objectives without modules such as mlm and causal",
        )
    return with_modules[0].modules if with_modules else objectives[0].modules


def build_objective(
    settings: ObjectiveConfig | PluginObjectiveConfig, recipe: Recipe, tokenizer: Tokenizer, words: WordsRule
) -> Objective:
    """Builds an objective of a recipe.

    Raises:
        RecipeError: the tokenizer or the encoder doesn't fit the objective.
    """
    if isinstance(settings, PluginObjectiveConfig):
        return make(settings, ObjectiveContext(tokenizer, recipe.model.hidden_size))
    if isinstance(settings, CausalLMConfig):
        return CausalLMObjective(settings)
    if isinstance(settings, MaskedDiffusionConfig):
        return MaskedDiffusionObjective(settings, tokenizer.mask_id)
    if isinstance(settings, MaskedNextTokenConfig) and not tokenizer.frame.before:
        raise RecipeError(
            "the tokenizer puts no token such as [CLS] before a text, so the first token can't be predicted",
            location="objective.kind = mntp",
            hint="use another tokenizer, or objective.kind=mlm",
        )
    mlm = MaskedLMObjective(
        settings, tokenizer.mask_id, tokenizer.regular_token_ids, tokenize_boosted_words(settings, tokenizer, words)
    )
    if isinstance(settings, MaskedNextTokenConfig):
        return MaskedNextTokenObjective(settings, mlm)
    if isinstance(settings, AdaptiveMaskingConfig):
        return AdaptiveMaskingObjective(settings, mlm, recipe.init.vocab_size or tokenizer.size)
    if isinstance(settings, ReplacedTokenConfig):
        # A separate seed: the encoder's weights are the same as without a generator.
        torch.manual_seed(rng.integer(recipe.seed, "electra weights"))
        vocab_size = recipe.init.vocab_size or tokenizer.size
        modules = build_electra(recipe.model, vocab_size, settings.generator_width, settings.generator_depth)
        return ReplacedTokenObjective(settings, mlm, modules, tokenizer.regular_token_ids, vocab_size)
    if not isinstance(settings, BertPretrainingConfig):
        return mlm
    # A separate seed: the other weights are the same with and without a pair head.
    torch.manual_seed(rng.integer(recipe.seed, "pair weights"))
    return BertPretrainingObjective(settings, mlm, build_pair(recipe.model))


def build_loaders(
    recipe: Recipe, corpus: TokenizedCorpus, pairs: Sequence[PairSampling | None]
) -> tuple[StageLoader, ...]:
    """Builds the data loader of each stage, which returns sentence pairs or windows.

    Raises:
        RecipeError: texts have weights, but the samples are not windows.
        TextError: the documents have too few sentence pairs.
    """
    sampler = recipe.data.sampler
    return tuple(
        StageLoader(
            corpus.train,
            corpus.tokenizer,
            build_sampler(
                corpus.train,
                corpus.tokenizer,
                stage.max_seq_len,
                recipe.seed,
                groups=corpus.groups,
                other=sampler if isinstance(sampler, PluginSamplerConfig) else stage_pairs,
            ),
            round(recipe.train.micro_batch_size.number),
            [group.name for group in corpus.groups],
        )
        for stage, stage_pairs in zip(recipe.stage, pairs, strict=True)
    )


def with_vocab_size(recipe: Recipe, tokenizer: Tokenizer, warm_start: WarmStart | None) -> Recipe:
    """Returns the recipe, with `init.vocab_size` set if the run starts from a model."""
    if warm_start is None:
        return recipe
    return replace(recipe, init=replace(recipe.init, vocab_size=warm_start.vocab_size(tokenizer)))


# Sentence pairs -------------------------------------------------------------------------------------------------------


def check_pairs(recipe: Recipe) -> None:
    """Checks, before any text is read, that model, sampler and stages fit an objective on sentence pairs.

    Raises:
        RecipeError: one of them doesn't fit.
    """
    encoder = recipe.model
    settings = next((each for each in recipe.objectives if isinstance(each, BertPretrainingConfig)), None)
    if settings is None:
        return
    if not isinstance(encoder, BertConfig) or encoder.type_vocab_size < 2 or encoder.model_type != "bert":
        kind = (
            f"type_vocab_size = {encoder.type_vocab_size}"
            if isinstance(encoder, BertConfig)
            else f"kind = {encoder.kind}"
        )
        raise RecipeError(
            f"sentence pairs need an encoder with two token types, but this model has fewer ({kind})",
            location=f"objective.kind = mlm+pairs, pair_task = {settings.pair_task}",
            hint="set model.kind=bert, as in --recipe bert-mini, or train on masks only: objective.kind=mlm",
        )
    if isinstance(recipe.data.sampler, PluginSamplerConfig):
        raise RecipeError(
            f"the objective needs sentence pairs, but the sampler `{recipe.data.sampler.kind}` returns windows",
            location="data.sampler",
            hint="remove the sampler",
        )
    for number, stage in enumerate(recipe.stage):
        if stage.max_seq_len < MIN_SEQ_LEN + 2:
            raise RecipeError(
                f"invalid max_seq_len: got {stage.max_seq_len}, expected at least {MIN_SEQ_LEN + 2} for sentence pairs",
                location=f"stage.{number}",
                hint=f"set it to {MIN_SEQ_LEN + 2} or more",
            )


def pair_sampling(recipe: Recipe, objectives: Sequence[Objective]) -> tuple[PairSampling | None, ...]:
    """Returns how each stage samples sentence pairs, or None if its objective reads windows."""

    def of_stage(settings: ObjectiveConfig | PluginObjectiveConfig, objective: Objective) -> PairSampling | None:
        if objective.sampler == "windows":
            return None
        kind = cast("PairKind", objective.sampler)
        if isinstance(settings, BertPretrainingConfig):
            return PairSampling(kind, settings.short_seq_prob)
        return PairSampling(kind)

    return tuple(map(of_stage, recipe.objectives, objectives))


def require_corpus_of_pairs(corpus: TokenizedCorpus, source: BaseSource, kind: PairKind) -> str:
    """Checks that a corpus has sentence pairs; returns a message with the number of documents that have pairs.

    Raises:
        TextError: too few documents have two sentences.
        TokenizerError: the tokenizer adds no token between two texts.
    """
    if corpus.tokenizer.frame.pair is None:
        raise TokenizerError(
            "the tokenizer adds no token between two texts, such as [SEP], which sentence pairs need",
            location="data.tokenizer",
            hint="use a tokenizer that adds one, or train on masks only: objective.kind=mlm",
        )
    try:
        require_pairs(corpus.train, kind)
    except TextError as error:
        raise error.at(location=source.location) from error
    used, documents = int((corpus.train.sentences > 1).sum()), corpus.train.documents
    unused = f"; the other {documents - used:,} are not used" if used < documents else ""
    return f"pairs ({kind}): from {used:,} documents of two sentences or more{unused}"


# Using the components -------------------------------------------------------------------------------------------------


def validate(components: RunComponents, module: TrainModule, stage: int) -> Validation:
    """Evaluates a module on all validation sets of the run."""
    offset = label_offset(components.training.objectives[stage])
    # A tokenizer may put no token before a text. Then no hidden state comes before the first token.
    module.encoder.label_offset = offset if components.corpus.tokenizer.frame.before else 0
    return components.validator.validate(module.encoder, module.head, stage, module.parts)


def as_model(
    recipe: Recipe,
    components: RunComponents,
    module: TrainModule,
    state: TrainState,
    path: str = "",
    *,
    stage: int = -1,
) -> Model:
    """Returns a module that was trained up to a stage as a `Model`, with the tokenizer and facts about its training."""
    module.encoder.label_offset = label_offset(components.training.objectives[stage])
    card: ModelCard = {
        "unmask": __version__,
        "recipe": recipe.name,
        "seed": recipe.seed,
        "context": max(stage.max_seq_len for stage in recipe.stage),
        "words": components.corpus.words,
        "document": recipe.data.rule,
        "step": state.step,
        "tokens": state.tokens,
        "text_fingerprint": components.corpus.fingerprint,
        "validation": state.validation,
        "objective": recipe.objectives[stage].kind,
    }
    pair = module.parts if isinstance(module.parts, SentencePairHead) else None
    discriminator = None
    if card.get("objective") == "rtd" and isinstance(module.parts, ElectraModules):
        discriminator = module.parts.discriminator
    return Model(
        module.encoder,
        module.head,
        components.corpus.tokenizer,
        recipe.model,
        card,
        path,
        pair,
        discriminator=discriminator,
    )


def attention_backend(recipe: Recipe, context: DistributedContext) -> str:
    """Returns the name of the attention implementation that this device uses."""
    dtype = torch.bfloat16 if context.precision == "bfloat16" else torch.float32
    return backend_of(context.device, dtype, recipe.model.attention_dropout, recipe.model.head_width)


def _require_one_sequence(corpus: TokenizedCorpus, source: BaseSource, recipe: Recipe) -> None:
    """Checks that the corpus fills one sequence of the shortest stage; less would be repeated all the time."""
    num_special_tokens = corpus.tokenizer.num_special_tokens()
    number, shortest = min(enumerate(recipe.stage), key=lambda numbered: numbered[1].max_seq_len)
    longest = corpus.train.tokens + num_special_tokens
    if longest < shortest.max_seq_len:
        shorten = f", or shorten the stage: --set stage.{number}.max_seq_len={longest}"
        raise TextError(
            f"not enough training text: {corpus.train.tokens:,} tokens, but stage {number} needs at least "
            f"{shortest.max_seq_len - num_special_tokens:,} for one sequence",
            location=source.location,
            hint=f"add text{shorten if longest >= MIN_SEQ_LEN else ''}",
        )
