"""Room card: what contracts.Objective promises, law by law.

Comes in: an objective, an encoder and a head, texts, a seed. Goes out: OBJECTIVE_LAWS, judged by laws.judge. Called by:
check, tests/contracts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from unmask.conformance.laws import Broken, Law, generators, is_a, law, require
from unmask.contracts import SPECIAL, Batch, Loss, Objective, Puzzle, Text, pack

OBJECTIVE_LAWS: Final[list[Law[ObjectiveSubject]]] = []
_OF_SLOTS: Final = ("at_M", "answer_M", "weight_M", "chance_M")
_FILLER_SLOTS: Final = 11
_NEAR: Final = 1e-4  # relative; sums in float32 differ in their last digits by how texts were batched


@dataclass(frozen=True)
class ObjectiveSubject:
    """An objective and what it is tried on: texts with something askable, and one with nothing but special pieces."""

    objective: Objective
    encoder: nn.Module
    head: nn.Module
    texts: Sequence[Text]
    nothing: Text
    seed: int
    vocabulary: int

    def batch(self, *, slots: int = 0) -> Batch:
        """All texts in their order; with `slots`, a filler text of so many ends it."""
        return pack(self.texts, slots=sum(len(text.ids) for text in self.texts) + slots if slots else None)

    def puzzle(self) -> Puzzle:
        """All texts, corrupted."""
        return self.objective.corrupt(self.batch(), self.seed)

    def loss(self, puzzle: Puzzle) -> Loss:
        """The loss without dropout."""
        self.encoder.eval()
        self.head.eval()
        self.objective.parts.eval()
        return self.objective.loss(self.encoder, self.head, puzzle)

    def backward(self, puzzle: Puzzle) -> list[Tensor]:
        """The gradients of every parameter, after all sums went back through the model in training."""
        modules = (self.encoder, self.head, self.objective.parts)
        for module in modules:
            module.train()
            module.zero_grad(set_to_none=True)
        loss = self.objective.loss(self.encoder, self.head, puzzle)
        total = sum(loss.sums.values(), torch.zeros(()))
        require(bool(total.requires_grad) or not len(puzzle.at_M), "the sums have no gradient: was something detached?")
        if total.requires_grad:
            total.backward()
        found = [parameter.grad for module in modules for parameter in module.parameters()]
        return [gradient for gradient in found if gradient is not None]


def _same(one: Puzzle, other: Puzzle) -> str:
    """The name of what differs between two puzzles, or nothing."""
    if not torch.equal(one.batch.ids_T, other.batch.ids_T):
        return "batch.ids_T"
    for name in _OF_SLOTS:
        if not torch.equal(getattr(one, name), getattr(other, name)):
            return name
    return "" if dict(one.counts) == dict(other.counts) and one.askable == other.askable else "counts"


def _rows(puzzle: Puzzle, text: int) -> dict[str, list[Any]]:
    """What a puzzle holds of one of its texts, as if it lay alone."""
    first, last = puzzle.batch.starts[text], puzzle.batch.starts[text + 1]
    inside_M = (puzzle.at_M >= first) & (puzzle.at_M < last)
    rows = {name: getattr(puzzle, name)[inside_M].tolist() for name in _OF_SLOTS}
    rows["at_M"] = [slot - first for slot in rows["at_M"]]
    return {"ids_T": puzzle.batch.ids_T[first:last].tolist(), **rows}


@law(OBJECTIVE_LAWS)
def says_what_it_is(subject: ObjectiveSubject) -> None:
    """`terms`, `metrics`, `cutter`, `parts` and `fills` are what the loop reads from them."""
    objective = subject.objective
    weights = dict(objective.terms)
    require(bool(weights), "`terms` is empty: name one, as in {'mlm': 1.0}")
    require(
        all(math.isfinite(w) and w > 0 for w in weights.values()), f"`terms` has a weight that is no share: {weights}"
    )
    require("loss" in objective.metrics, f'`metrics` has no "loss", which every display shows: {objective.metrics}')
    require(is_a(objective.parts, nn.Module), "`parts` is no torch.nn.Module; an empty nn.Module() will do")
    require(is_a(objective.fills, bool), "`fills` is neither True nor False")
    known = ("windows", "next-sentence", "sentence-order")
    require(objective.cutter in known, f"`cutter` is {objective.cutter!r}; there are {', '.join(known)}")


@law(OBJECTIVE_LAWS)
def corrupt_is_pure(subject: ObjectiveSubject) -> None:
    """A batch and a seed always give the same puzzle; the batch stays as it was and no generator moves."""
    batch, before = subject.batch(), generators()
    ids_T = batch.ids_T.clone()
    first = subject.objective.corrupt(batch, subject.seed)
    require(torch.equal(batch.ids_T, ids_T), "the ids of the batch were changed in place: work on a clone")
    after = generators()
    moved = [name for name in before if before[name] != after[name]]
    require(not moved, f"it drew from a generator ({', '.join(moved)}): use unmask.rng, whose draws have no state")
    subject.objective.corrupt(pack(subject.texts[-1:]), subject.seed + 1)  # something in between, for what remembers
    differs = _same(first, subject.objective.corrupt(subject.batch(), subject.seed))
    require(not differs, f"the same batch and seed gave another `{differs}` the second time")
    late = replace(subject.batch(), progress=0.75)
    once = subject.objective.corrupt(late, subject.seed)
    subject.puzzle()  # of the beginning
    differs = _same(once, subject.objective.corrupt(late, subject.seed))
    require(not differs, f"the same batch, seed and progress gave another `{differs}` the second time")


@law(OBJECTIVE_LAWS)
def a_text_is_asked_alike_in_any_company(subject: ObjectiveSubject) -> None:
    """What is hidden and asked in a text is the same alone, beside other texts and in another order."""
    whole = subject.puzzle()
    turned = subject.objective.corrupt(pack(list(reversed(subject.texts))), subject.seed)
    for number, text in enumerate(subject.texts):
        alone = _rows(subject.objective.corrupt(pack([text]), subject.seed), 0)
        company = ("beside others", _rows(whole, number)), ("in another order", _rows(turned, -2 - number))
        for how, rows in company:
            differing = [name for name in alone if alone[name] != rows[name]]
            require(not differing, f"text {number}: `{', '.join(differing)}` is another alone than {how}")


@law(OBJECTIVE_LAWS)
def asks_something(subject: ObjectiveSubject) -> None:
    """Of ordinary texts, something is asked."""
    tokens = subject.batch().tokens
    require(len(subject.puzzle().at_M) > 0, f"nothing was asked in {len(subject.texts)} texts of {tokens} tokens")


@law(OBJECTIVE_LAWS)
def asked_slots_ascend_inside_texts(subject: ObjectiveSubject) -> None:
    """`at_M` is int64, ascending, each slot once, and none lies in the filler text or beyond."""
    batch = subject.batch(slots=_FILLER_SLOTS)
    at_M = subject.objective.corrupt(batch, subject.seed).at_M
    require(at_M.dtype == torch.int64 and at_M.ndim == 1, f"`at_M` is {at_M.dtype} with {at_M.ndim} dimensions")
    require(bool((at_M.diff() > 0).all()), "`at_M` does not ascend, or names a slot twice")
    outside = [slot for slot in at_M.tolist() if not 0 <= slot < batch.tokens]
    require(not outside, f"slots {outside[:5]} lie in no text: the texts end at {batch.tokens}")


@law(OBJECTIVE_LAWS)
def special_pieces_are_never_asked(subject: ObjectiveSubject) -> None:
    """No slot with the mark SPECIAL ([CLS], [SEP], [UNK] …) is asked about."""
    puzzle = subject.puzzle()
    special = [slot for slot in puzzle.at_M.tolist() if subject.batch().marks_T[slot] & SPECIAL]
    require(not special, f"special pieces are asked at slots {special[:5]}")


@law(OBJECTIVE_LAWS)
def answers_are_what_stood_there(subject: ObjectiveSubject) -> None:
    """`answer_M` holds the ids of the batch at `at_M`, before anything was hidden."""
    puzzle = subject.puzzle()
    original_M = subject.batch().ids_T[puzzle.at_M]
    require(torch.equal(puzzle.answer_M, original_M), "`answer_M` is not batch.ids_T[at_M]")


@law(OBJECTIVE_LAWS)
def the_layout_stays(subject: ObjectiveSubject) -> None:
    """Only ids change: texts keep their places, marks and keys, and ids stay within the vocabulary."""
    batch, seen = subject.batch(), subject.puzzle().batch
    require(seen.starts == batch.starts and seen.filler == batch.filler, "texts lie elsewhere than in the batch")
    require(torch.equal(seen.marks_T, batch.marks_T), "`marks_T` was changed")
    require(torch.equal(seen.sample_B2, batch.sample_B2), "`sample_B2`, the key of every draw, was changed")
    require(seen.progress == batch.progress, "`progress` was changed")
    require(seen.ids_T.dtype == torch.int64 and seen.ids_T.shape == batch.ids_T.shape, "`ids_T` has another shape")
    beyond = seen.ids_T[(seen.ids_T < 0) | (seen.ids_T >= subject.vocabulary)].tolist()
    require(not beyond, f"ids {beyond[:5]} are beyond the vocabulary of {subject.vocabulary}")


@law(OBJECTIVE_LAWS)
def counts_match_what_is_asked(subject: ObjectiveSubject) -> None:
    """There is a count for each term, and one answer, weight and chance for each asked slot."""
    puzzle, terms = subject.puzzle(), set(subject.objective.terms)
    require(set(puzzle.counts) == terms, f"`counts` has {sorted(puzzle.counts)}, `terms` has {sorted(terms)}")
    require(all(type(count) is int and count >= 0 for count in puzzle.counts.values()), f"no counts: {puzzle.counts}")
    asked = len(puzzle.at_M)
    sizes = {name: len(getattr(puzzle, name)) for name in _OF_SLOTS}
    require(set(sizes.values()) == {asked}, f"not one entry for each asked slot: {sizes}")
    askable = int(((subject.batch().marks_T & SPECIAL) == 0).sum())
    require(asked <= puzzle.askable <= askable, f"asked {asked}, `askable` {puzzle.askable}, ordinary slots {askable}")
    require(bool(puzzle.weight_M.isfinite().all()), "`weight_M` holds what is no finite number")
    require(bool(((puzzle.chance_M >= 0) & (puzzle.chance_M < 1)).all()), "`chance_M` leaves [0, 1)")


@law(OBJECTIVE_LAWS)
def the_loss_is_named_sums(subject: ObjectiveSubject) -> None:
    """`sums` has one finite scalar for each of `terms`, `seen` one (sum, count) for each of `metrics`."""
    loss, objective = subject.loss(subject.puzzle()), subject.objective
    require(set(loss.sums) == set(objective.terms), f"`sums` has {sorted(loss.sums)}, not {sorted(objective.terms)}")
    require(
        set(loss.seen) == set(objective.metrics), f"`seen` has {sorted(loss.seen)}, not {sorted(objective.metrics)}"
    )
    for name, value in loss.sums.items():
        require(value.ndim == 0 and bool(value.isfinite()), f"the sum of `{name}` is no finite scalar")
    for name, (value, count) in loss.seen.items():
        require(bool(torch.as_tensor(value).isfinite()) and type(count) is int, f"metric `{name}`: {value}, {count!r}")


@law(OBJECTIVE_LAWS)
def losses_add_over_micro_batches(subject: ObjectiveSubject) -> None:
    """Sums, counts and metrics of a batch are those of its parts added up: sums, never means."""
    half = max(1, len(subject.texts) // 2)
    groups = [group for group in (subject.texts, subject.texts[:half], subject.texts[half:]) if group]
    with torch.no_grad():
        puzzles = [subject.objective.corrupt(pack(group), subject.seed) for group in groups]
        whole, *parts = [subject.loss(puzzle) for puzzle in puzzles]
    for term in subject.objective.terms:
        counted = puzzles[0].counts[term], sum(puzzle.counts[term] for puzzle in puzzles[1:])
        require(counted[0] == counted[1], f"the count of `{term}` is {counted[0]} at once and {counted[1]} in parts")
        _require_near(float(whole.sums[term]), sum(float(part.sums[term]) for part in parts), f"the sum of `{term}`")
    for name, (value, count) in whole.seen.items():
        counted = count, sum(part.seen[name][1] for part in parts)
        require(
            counted[0] == counted[1], f"the count of metric `{name}` is {counted[0]} at once, {counted[1]} in parts"
        )
        _require_near(float(value), sum(float(part.seen[name][0]) for part in parts), f"metric `{name}`")


def _require_near(whole: float, parts: float, what: str) -> None:
    near = math.isclose(whole, parts, rel_tol=_NEAR, abs_tol=_NEAR)
    require(near, f"{what} is {whole:.5g} at once and {parts:.5g} in parts: is it a mean?")


@law(OBJECTIVE_LAWS)
def the_loss_draws_nothing(subject: ObjectiveSubject) -> None:
    """Without dropout, the loss of a puzzle is the same each time and no generator moves."""
    puzzle, before = subject.puzzle(), generators()
    with torch.no_grad():
        first, second = subject.loss(puzzle), subject.loss(puzzle)
    require(before == generators(), "it drew from a generator: what is random belongs into `corrupt` (chance_M)")
    for term, value in first.sums.items():
        require(torch.equal(value, second.sums[term]), f"the sum of `{term}` was another the second time")


@law(OBJECTIVE_LAWS)
def gradients_are_finite(subject: ObjectiveSubject) -> None:
    """Every gradient is finite, also beside a filler text, and some of the encoder's are not zero."""
    puzzle = subject.objective.corrupt(subject.batch(slots=_FILLER_SLOTS), subject.seed)
    gradients = subject.backward(puzzle)
    require(all(bool(gradient.isfinite().all()) for gradient in gradients), "a gradient is no finite number")
    if len(puzzle.at_M):
        moved = any(p.grad is not None and bool(p.grad.any()) for p in subject.encoder.parameters())
        require(moved, "nothing of the encoder would move: all its gradients are zero")


@law(OBJECTIVE_LAWS)
def nothing_askable_costs_nothing(subject: ObjectiveSubject) -> None:
    """A text of special pieces alone asks nothing, and what is not counted adds no loss and no gradient."""
    puzzle = subject.objective.corrupt(pack([subject.nothing]), subject.seed)
    require(not len(puzzle.at_M), f"asked {len(puzzle.at_M)} slots of a text that has nothing to ask")
    loss = subject.loss(puzzle)
    for term, value in loss.sums.items():
        require(bool(value.isfinite()), f"the sum of `{term}` is no number where nothing is asked (0 ÷ 0?)")
        cost = float(value.detach())
        require(puzzle.counts[term] > 0 or not cost, f"`{term}` counts nothing and costs {cost:.4g}")
    for name, (value, count) in loss.seen.items():
        if not bool(torch.as_tensor(value).isfinite()) or (not count and float(value)):
            raise Broken(f"metric `{name}` is {float(value)} over {count}")
    gradients = subject.backward(puzzle)
    require(all(bool(gradient.isfinite().all()) for gradient in gradients), "a gradient is no finite number")
    if not any(puzzle.counts.values()):
        require(not any(bool(gradient.any()) for gradient in gradients), "a gradient is not zero")
