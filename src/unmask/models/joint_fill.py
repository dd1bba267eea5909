"""Fills several masks of a text jointly, ranked by joint log-probability.

A masked language model gives no joint distribution of several masks, but it gives one for each order: each mask is
filled given the tokens of the masks before it in the order, and the logarithms of these probabilities are added. Two
orders are available. "beam" goes from left to right. "best-first" continues each filling at the mask of which the model
is most certain: the one whose most probable token has the highest probability.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, count, pairwise, product
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from unmask.core.errors import ModelError
from unmask.core.types import ProgressCallback
from unmask.models.fill_mask import MASK, encode_texts, gaps_of, join_token, no_mask_error
from unmask.models.model import Model, require_masked_lm
from unmask.tokenization.analysis import TokenFormatter, TokenText
from unmask.tokenization.words import WordsRule, is_spaced_letter, white_space, word_starts

JointMethod = Literal["best-first", "beam"]
BEAM_SIZE = 10
_MAX_FILLINGS = 1000
_MAX_MASKS = 100  # of a text
_MAX_COMBINATIONS = 100  # of numbers of tokens, with `words`
_BATCH_NUMBERS = 1 << 24  # log-probabilities that are computed together: 64 MB in float32
_GROUP = re.compile(r"(?:\[MASK\](?:\*\d{1,6})?)+")
_COUNT = re.compile(r"\[MASK\](?:\*(\d+))?")


@dataclass(frozen=True)
class JointFilling:
    """A token for every mask of a text, in the order of the text."""

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    groups: tuple[str, ...]  # text of the tokens of each group: masks with nothing between them
    log_probability: float  # natural logarithm of the joint probability
    sequence: str  # the text with all masks filled


@dataclass(frozen=True)
class JointFillResult:
    """A text and the most probable fillings of its masks."""

    text: str
    fillings: tuple[JointFilling, ...]

    def __repr__(self) -> str:
        """Return the text, and a line for each filling."""
        lines = [f"  {filling.log_probability:.2f} {filling.sequence!r}" for filling in self.fillings]
        return "\n".join([f"JointFillResult({self.text!r}:", *lines]) + ")"


def fill_jointly(
    model: Model,
    text: str | Sequence[str],
    top: int = 5,
    *,
    method: JointMethod = "beam",
    beam_size: int = BEAM_SIZE,
    words: int | None = None,
    on_progress: ProgressCallback | None = None,
) -> list[JointFillResult]:
    """Fill all masks of each text jointly; return the fillings with the highest joint log-probability.

    `[MASK]*3` in a text is a group of three masks in a row. Candidates are those of `fill`. The search keeps the
    `beam_size` most probable fillings after each mask. With V tokens and m masks, a beam of V ** (m - 1) is exhaustive.

    With `words`, each single [MASK] is one whole word: 1 to `words` masks are tried, and only tokens that form one word
    are candidates, also in groups. Joint log-probabilities are not normalized by the number of tokens: for each number,
    the probabilities of all fillings add up to at most 1, so words of all lengths compete with equal prior weight. A
    mean per token would favor words of many tokens, whose last tokens follow from the first.

    Args:
        model: Model to use, as returned by `unmask.load`.
        text: One or several texts, each with at least one [MASK].
        top: Maximum number of fillings of each text.
        method: Order in which masks are filled: left to right, or the most certain mask first.
        beam_size: Number of fillings that are kept after each mask.
        words: Maximum number of tokens of a word; None fills each [MASK] with one token.
        on_progress: Function that is called with the name of the task and the fraction done.

    Raises:
        ModelError: the model makes no masked predictions, a text has no [MASK] or too many, it is longer than the
            model's context, or an argument is out of its range.
    """
    require_masked_lm(model, "fill masks")
    check_search(top, beam_size, words)
    texts = [text] if isinstance(text, str) else list(text)
    prompts = [list(_prompts(model, one, words)) for one in texts]  # all are checked before any is filled
    total = sum(len(prompt.positions) for of_text in prompts for prompt in of_text)
    done = count(1)

    def advance() -> None:
        if on_progress is not None:
            on_progress("filling masks", next(done) / total)

    settings = _Search(method, beam_size, advance)
    return [
        JointFillResult(one, _best(model, of_text, top, settings, is_words=words is not None))
        for one, of_text in zip(texts, prompts, strict=True)
    ]


def check_search(top: int, beam_size: int, words: int | None) -> None:
    """Check the settings of a search.

    Raises:
        ModelError: a number is out of its range.
    """
    limits = (("--top", top, _MAX_FILLINGS), ("--beam-size", beam_size, _MAX_FILLINGS), ("--words", words, _MAX_MASKS))
    for option, value, most in limits:
        if value is not None and not 1 <= value <= most:
            raise ModelError(
                f"invalid {option}: got {value}, expected 1 to {most:,}", hint="choose a number in this range"
            )


def search_tokens(model: Model, text: str, beam_size: int, words: int | None = None) -> int:
    """Return the maximum number of tokens that the encoder processes in a search; arguments are those of the search.

    Raises:
        ModelError: as for `fill_jointly`.
    """
    check_search(1, beam_size, words)
    return sum(
        len(prompt.ids) * (1 + beam_size * (len(prompt.positions) - 1)) for prompt in _prompts(model, text, words)
    )


# Prompts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prompt:
    """A text with a certain number of masks in each group."""

    parts: Sequence[str]  # texts around the groups
    sizes: Sequence[int]  # number of masks of each group
    ids: Sequence[int]
    positions: Sequence[int]  # of all masks in `ids`
    is_attached: Sequence[bool]  # for each mask, whether it continues a word

    def groups(self, ids: Sequence[int]) -> list[Sequence[int]]:
        """Return the ids of all masks, by group."""
        return [ids[first:last] for first, last in pairwise(accumulate(self.sizes, initial=0))]


def _prompts(model: Model, text: str, words: int | None) -> Iterator[_Prompt]:
    """Yield a text with each combination of numbers of masks, encoded.

    Raises:
        ModelError: there is no [MASK], there are too many masks or combinations, or the text exceeds the context.
    """
    location, tokenizer = repr(text[:60]), model.tokenizer
    normal = text.replace(tokenizer.id_to_token(tokenizer.mask_id), MASK)
    parts = _GROUP.split(normal)
    sizes: list[Sequence[int]] = []
    for group in _GROUP.findall(normal):
        size = sum(int(number or 1) for number in _COUNT.findall(group))
        if not 1 <= size <= _MAX_MASKS:
            raise ModelError(
                f"{group[:30]} is {size:,} masks, expected 1 to {_MAX_MASKS}",
                location=location,
                hint="use fewer masks" if size else f"write {MASK} or {MASK}*2",
            )
        sizes.append(range(1, words + 1) if words is not None and group == MASK else (size,))
    if not sizes:
        raise no_mask_error(location)
    num_combinations, most = math.prod(map(len, sizes)), sum(map(max, sizes))
    if most > _MAX_MASKS:
        raise ModelError(
            f"the text has up to {most} masks, expected at most {_MAX_MASKS}", location=location, hint="use fewer masks"
        )
    if num_combinations > _MAX_COMBINATIONS:
        raise ModelError(
            f"up to {words} tokens for each {MASK} are {num_combinations:,} combinations, expected at most "
            f"{_MAX_COMBINATIONS}",
            location=location,
            hint="reduce --words, or the number of masks",
        )
    combinations = list(product(*sizes))
    expanded = ["".join(map("".join, zip(parts, (MASK * n for n in [*ns, 0]), strict=True))) for ns in combinations]
    formatter = TokenFormatter.of(tokenizer)
    for prompt, ns, ids in zip(expanded, combinations, encode_texts(model, expanded, formatter), strict=True):
        if len(ids) > model.context:
            raise ModelError(
                f"the text has {len(ids):,} tokens, and the context of the model is {model.context:,}",
                location=location,
                hint="shorten the text" if words is None else "shorten the text, or reduce --words",
            )
        positions = [position for position, id_ in enumerate(ids) if id_ == tokenizer.mask_id]
        attached = [gap.is_attached(formatter) for gap in gaps_of(model, 0, prompt, positions)]
        yield _Prompt(parts, ns, ids, positions, attached)


# Search -------------------------------------------------------------------------------------------------------------


class _Search(NamedTuple):
    method: JointMethod
    beam_size: int
    advance: Callable[[], None]  # called after each mask


class _Hypothesis(NamedTuple):
    log_probability: float
    ids: tuple[int, ...]  # of each mask; -1: not filled yet


def _best(
    model: Model, prompts: Sequence[_Prompt], top: int, settings: _Search, *, is_words: bool
) -> tuple[JointFilling, ...]:
    """Return the best fillings of a text, whose prompts differ in the number of masks."""
    formatter, rule = TokenFormatter.of(model.tokenizer), model.words
    keep = max(top, settings.beam_size) * (4 if is_words else 1)  # some sequences of bytes turn out to be no word
    found: list[tuple[_Hypothesis, _Prompt]] = []
    for prompt in prompts:
        allowed = _word_tokens(formatter, prompt, rule) if is_words else _tokens(formatter, prompt)
        for hypothesis in _search(model, prompt, allowed, settings, keep):
            groups = zip(prompt.groups(hypothesis.ids), prompt.parts, strict=False)
            if not is_words or all(_is_word(model, before, ids, rule) for ids, before in groups):
                found.append((hypothesis, prompt))
    found.sort(key=lambda pair: (-pair[0].log_probability, pair[0].ids))
    return tuple(_filling(model, hypothesis, prompt) for hypothesis, prompt in found[:top])


@torch.inference_mode()
def _search(
    model: Model,
    prompt: _Prompt,
    allowed_KV: Sequence[Bool[Tensor, "V"]],
    settings: _Search,
    keep_last: int,
) -> list[_Hypothesis]:
    """Return the most probable fillings that a beam search finds.

    Args:
        model: the model.
        prompt: the text, with K masks.
        allowed_KV: for each mask, whether each token is a candidate.
        settings: order of the masks, and number of fillings to keep after each mask but the last.
        keep_last: number of fillings to return.
    """
    num_masks = len(prompt.positions)
    hypotheses = [_Hypothesis(0.0, (-1,) * num_masks)]
    for step in range(num_masks):
        keep = keep_last if step == num_masks - 1 else settings.beam_size
        scores_K, places_K3 = torch.zeros(0), torch.zeros((0, 3), dtype=torch.int64)
        for numbers, masks, rows_MV in _predictions(model, prompt, hypotheses, allowed_KV, settings.method):
            before_M = torch.tensor([hypotheses[number].log_probability for number in numbers])
            scores_MV = before_M[:, None] + rows_MV
            best = scores_MV.flatten().topk(min(keep, scores_MV.numel()))
            rows_K, ids_K = best.indices // scores_MV.shape[1], best.indices % scores_MV.shape[1]
            places = torch.stack((torch.tensor(numbers)[rows_K], torch.tensor(masks)[rows_K], ids_K), 1)
            merged_K, places_K3 = torch.cat((scores_K, best.values)), torch.cat((places_K3, places))
            highest = merged_K.topk(min(keep, len(merged_K)))
            scores_K, places_K3 = highest.values, places_K3[highest.indices]
        hypotheses = [
            _Hypothesis(score, (*hypotheses[number].ids[:mask], id_, *hypotheses[number].ids[mask + 1 :]))
            for score, (number, mask, id_) in zip(scores_K.tolist(), places_K3.tolist(), strict=True)
            if score > -math.inf
        ]
        settings.advance()
    return hypotheses


def _predictions(
    model: Model,
    prompt: _Prompt,
    hypotheses: Sequence[_Hypothesis],
    allowed_KV: Sequence[Bool[Tensor, "V"]],
    method: JointMethod,
) -> Iterator[tuple[list[int], list[int], Tensor]]:
    """Yield numbers of hypotheses, the mask that each one fills next, and log-probabilities of the candidates there."""
    size = len(allowed_KV[0])
    open_masks = [[mask for mask, id_ in enumerate(one.ids) if id_ < 0] for one in hypotheses]
    if method == "beam":
        open_masks = [masks[:1] for masks in open_masks]
    most = max(1, _BATCH_NUMBERS // (model.encoder.vocab_size * max(map(len, open_masks), default=1)))
    for first in range(0, len(hypotheses), most):
        masks_of = open_masks[first : first + most]
        sequences = [_filled(prompt, one.ids, model.tokenizer.mask_id) for one in hypotheses[first : first + most]]
        positions = [[prompt.positions[mask] for mask in masks] for masks in masks_of]
        for numbers, rows_MV in model.log_probability_batches(sequences, positions):
            masks = [mask for number in numbers for mask in masks_of[number]]
            allowed_MV = torch.stack([allowed_KV[mask] for mask in masks])
            rows_MV = rows_MV[:, :size].masked_fill(~allowed_MV, -torch.inf)
            ends = [0, *accumulate(len(masks_of[number]) for number in numbers)]
            highest_M = rows_MV.max(dim=1).values
            chosen = [start + int(highest_M[start:end].argmax()) for start, end in pairwise(ends)]
            yield [first + number for number in numbers], [masks[row] for row in chosen], rows_MV[chosen]


def _filled(prompt: _Prompt, ids: Sequence[int], mask_id: int) -> list[int]:
    filled = list(prompt.ids)
    for position, id_ in zip(prompt.positions, ids, strict=True):
        filled[position] = mask_id if id_ < 0 else id_
    return filled


# Candidates ---------------------------------------------------------------------------------------------------------


def _tokens(formatter: TokenFormatter, prompt: _Prompt) -> list[Bool[Tensor, "V"]]:
    """Return, for each mask, whether each token is a candidate of `fill`."""
    allowed = [torch.ones(formatter.size, dtype=torch.bool) for _ in formatter.unpredicted_ids]
    for allowed_V, unpredicted in zip(allowed, formatter.unpredicted_ids, strict=True):
        allowed_V[torch.from_numpy(unpredicted)] = False
    return [allowed[is_attached] for is_attached in prompt.is_attached]


class _WordTokens(NamedTuple):
    """For each id, whether the token can begin or continue a word, and whether a space precedes it."""

    first_V: Bool[Tensor, "V"]
    next_V: Bool[Tensor, "V"]
    after_space_V: Bool[Tensor, "V"]


@lru_cache(maxsize=8)
def _word_parts(formatter: TokenFormatter, rule: WordsRule) -> _WordTokens:
    tokens = [formatter.read(id_) for id_ in range(formatter.size)]
    letters = [token.letters for token in tokens]
    is_partial_V = np.array([one.startswith("⟨") and one.endswith("⟩") for one in letters])  # bytes of a character
    after_space_V = np.array([token.spacing == "after-space" for token in tokens])
    joins_V = np.array([token.spacing == "joins" for token in tokens])
    is_predicted_V = np.ones(formatter.size, dtype=bool)
    is_predicted_V[formatter.unpredicted_ids[0]] = False
    # A dictionary divides whole words only.
    static: WordsRule = "characters" if rule == "characters" else "spaces"
    begins_V = is_predicted_V & (is_partial_V | _are_words(letters, static))
    continues_V = is_predicted_V & (is_partial_V | _are_words([f"a{one}" for one in letters], static)) & ~after_space_V
    if formatter.prefix:
        begins_V, continues_V = begins_V & ~joins_V, continues_V & joins_V
    return _WordTokens(*map(torch.from_numpy, (begins_V, continues_V, after_space_V)))


def _are_words(texts: Sequence[str], rule: WordsRule) -> NDArray[np.bool_]:
    """Return whether each text is exactly one word, without space."""
    joined = "\n".join([*texts, ""])
    starts, spaces = word_starts(joined, rule), white_space(joined)
    lengths = np.array([len(text) + 1 for text in texts])
    firsts = np.cumsum(lengths) - lengths
    num_starts, num_spaces = np.add.reduceat(starts.astype(int), firsts), np.add.reduceat(spaces.astype(int), firsts)
    return starts[firsts] & (num_starts == 1) & (num_spaces == 1)  # the space is the line end


def _word_tokens(formatter: TokenFormatter, prompt: _Prompt, rule: WordsRule) -> list[Bool[Tensor, "V"]]:
    """Return, for each mask, whether each token can be at this place of the word that its group is."""
    parts = _word_parts(formatter, rule)
    allowed: list[Tensor] = []
    for before, size in zip(prompt.parts, prompt.sizes, strict=False):
        if before and is_spaced_letter(before[-1]):
            first_V = parts.next_V
        elif not parts.after_space_V.any() or not before:
            first_V = parts.first_V
        else:  # the token has a space exactly if the text has one
            has_space = before[-1].isspace()
            first_V = parts.first_V & (parts.after_space_V if has_space else ~parts.after_space_V)
        allowed += [first_V, *[parts.next_V] * (size - 1)]
    return allowed


def _is_word(model: Model, before: str, ids: Sequence[int], rule: WordsRule) -> bool:
    """Return whether tokens form one word, or continue the one before them. Incomplete characters form none."""
    letters = _text_of(model, ids).letters
    return bool(_are_words([before[-1] + letters if before and is_spaced_letter(before[-1]) else letters], rule)[0])


# Text ---------------------------------------------------------------------------------------------------------------


def _filling(model: Model, hypothesis: _Hypothesis, prompt: _Prompt) -> JointFilling:
    tokenizer, formatter = model.tokenizer, TokenFormatter.of(model.tokenizer)
    text, groups = prompt.parts[0], list[str]()
    for ids, part in zip(prompt.groups(hypothesis.ids), prompt.parts[1:], strict=True):
        group = _text_of(model, ids)
        groups.append(group.letters)
        text = join_token(text, part, group, tokenizer.mask_takes_space, formatter)
    tokens = tuple(map(tokenizer.id_to_token, hypothesis.ids))
    return JointFilling(tokens, hypothesis.ids, tuple(groups), hypothesis.log_probability, text)


def _text_of(model: Model, ids: Sequence[int]) -> TokenText:
    """Return consecutive tokens as text, with the spacing of the first one."""
    formatter = TokenFormatter.of(model.tokenizer)
    tokens = [formatter.read(id_) for id_ in ids]
    if len(ids) == 1:
        return tokens[0]
    letters = formatter.decode(ids)
    if "\ufffd" in letters:
        return TokenText("".join(token.letters for token in tokens), tokens[0].spacing)
    if tokens[0].spacing == "after-space":
        letters = letters.removeprefix(" ")
    elif tokens[0].spacing == "joins":
        letters = letters.removeprefix(formatter.prefix)
    return TokenText(letters, tokens[0].spacing)
