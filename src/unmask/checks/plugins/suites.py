"""Room card: what contracts.Cutter promises, law by law.

Comes in: a way to make the sampler, and the lengths of documents. Goes out: CUTTER_LAWS, judged by laws.judge. Called
by: check, tests/contracts.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn

from unmask.checks.plugins.fixtures import ObjectiveFixture
from unmask.checks.plugins.runner import Check, CheckFailed, generators, is_a, law, require
from unmask.core.types import (
    SPECIAL,
    DocumentChunk,
    MaskedBatch,
    Sampler,
    SamplerContext,
    SampleSpec,
    Source,
    SourceShard,
    pack,
)
from unmask.data.sampling import EPOCH_STRIDE

CUTTER_LAWS: Final[list[Check[SamplerFixture]]] = []
_EPOCHS: Final = (0, 1, EPOCH_STRIDE)  # the last is where the second stage of a run begins
_CUTS: Final = 5000  # looked at in an epoch, at most


@dataclass(frozen=True)
class SamplerFixture:
    """A sampler, as it is made from tools, and the cases that it is tried on."""

    cutter_of: Callable[[SamplerContext], Sampler]
    cases: Sequence[SamplerContext]
    spans: int = 1  # of each sample

    def tried(self) -> Iterator[tuple[SamplerContext, Sampler, str]]:
        """Each case, its sampler and how to call it."""
        for tools in self.cases:
            sizes = tools.lengths_N.tolist()
            shown = f"{sizes[:6]}{' …' if len(sizes) > 6 else ''}"
            yield tools, self.cutter_of(tools), f"documents of {shown} tokens, {tools.length} a sample"

    def cuts(self) -> Iterator[tuple[SamplerContext, int, int, SampleSpec, str]]:
        """Every cut of every case and epoch: tools, epoch, sample, cut, how to call it."""
        for tools, cutter, case in self.tried():
            for epoch in _EPOCHS:
                for sample in range(min(cutter.count(epoch), _CUTS)):
                    yield tools, epoch, sample, cutter.cut(epoch, sample), f"{case}: epoch {epoch}, sample {sample}"


@law(CUTTER_LAWS)
def the_number_of_samples_is_known(subject: SamplerFixture) -> None:
    """`count` is a whole number above 0, the same in each epoch and each time, and so many samples can be cut."""
    for _, cutter, case in subject.tried():
        counts = {epoch: cutter.count(epoch) for epoch in (*_EPOCHS, 0)}
        require(all(type(count) is int for count in counts.values()), f"{case}: `count` gives no int")
        require(min(counts.values()) > 0, f"{case}: there is no sample")
        require(len(set(counts.values())) == 1, f"{case}: epochs of different size: {counts}")
        last = cutter.cut(0, counts[0] - 1)
        require(is_a(last, SampleSpec), f"{case}: `cut` gives a {type(last).__name__}, not a Cut")


@law(CUTTER_LAWS)
def cut_is_pure(subject: SamplerFixture) -> None:
    """A sample is the same each time, in any order, from a sampler made anew; no generator moves."""
    before = generators()
    for tools, cutter, case in subject.tried():
        samples = range(min(cutter.count(0), _CUTS))
        for epoch in _EPOCHS:
            first = [cutter.cut(epoch, sample) for sample in samples]
            backwards = [cutter.cut(epoch, sample) for sample in reversed(samples)][::-1]
            require(first == backwards, f"{case}: epoch {epoch} is another when it is read backwards")
            anew = subject.cutter_of(tools)
            require(
                first == [anew.cut(epoch, sample) for sample in samples], f"{case}: a sampler made anew cuts otherwise"
            )
    require(before == generators(), "it drew from a generator: use unmask.core.rng, whose draws have no state")


@law(CUTTER_LAWS)
def a_sample_is_one_span_of_a_document(subject: SamplerFixture) -> None:
    """Each cut holds one span, not empty, within its document."""
    for tools, _, _, cut, case in subject.cuts():
        require(len(cut.spans) == subject.spans, f"{case}: {len(cut.spans)} spans, not {subject.spans}")
        for document, first, last, _ in cut.spans:
            require(0 <= document < len(tools.lengths_N), f"{case}: there is no document {document}")
            tokens = int(tools.lengths_N[document])
            require(first < last, f"{case}: an empty span, {first} to {last}")
            require(first >= 0 and last <= tokens, f"{case}: span {first} to {last} of a document of {tokens}")


@law(CUTTER_LAWS)
def a_sample_fits(subject: SamplerFixture) -> None:
    """No cut holds more tokens than `length`."""
    for tools, _, _, cut, case in subject.cuts():
        require(cut.tokens <= tools.length, f"{case}: {cut.tokens} tokens")


@law(CUTTER_LAWS)
def a_sample_has_its_own_key(subject: SamplerFixture) -> None:
    """No two samples have one (epoch, number), in an epoch or in two: every draw hangs on that key."""
    for _, cutter, case in subject.tried():
        seen: dict[tuple[int, int], str] = {}
        for epoch in _EPOCHS:
            for sample in range(min(cutter.count(epoch), _CUTS)):
                cut, place = cutter.cut(epoch, sample), f"epoch {epoch}, sample {sample}"
                require(cut.epoch >= 0 and cut.number >= 0, f"{case}: {place} has a negative key")
                before = seen.setdefault((cut.epoch, cut.number), place)
                require(before == place, f"{case}: {place} has the epoch and number of {before}")


SOURCE_LAWS: Final[list[Check[SourceFixture]]] = []
PASSAGE_CHARACTERS: Final = 1_000_000
MOST_CHARACTERS: Final = 5_000_000  # read of a part, at most: laws that hold so far hold
_PARTS: Final = 20

Read = dict[SourceShard, list[DocumentChunk]]


@dataclass(frozen=True)
class SourceFixture:
    """A source, as it is made, and others that differ from it by a setting or by their text."""

    source_of: Callable[[], Source]
    variants: Sequence[tuple[str, Callable[[], Source]]] = ()  # what is different, and the source that has it


def read(source: Source, *, backwards: bool = False) -> Read:
    """The passages of each part, of each as far as the laws look."""
    parts = list(source.parts())[:_PARTS]
    found = {part: _passages(source, part) for part in (reversed(parts) if backwards else parts)}
    return {part: found[part] for part in parts}


def _passages(source: Source, part: SourceShard) -> list[DocumentChunk]:
    held: list[DocumentChunk] = []
    characters = 0
    for passage in source.documents(part):
        held.append(passage)
        characters += len(passage.text)
        if characters > MOST_CHARACTERS:
            break
    return held


def _whole(source: Source, part: SourceShard, held: Sequence[DocumentChunk]) -> bool:
    return sum(len(passage.text) for passage in held) <= MOST_CHARACTERS


@law(SOURCE_LAWS)
def parts_come_in_a_fixed_order(subject: SourceFixture) -> None:
    """`parts` gives the same pieces in the same order each time, each once, at least one."""
    source = subject.source_of()
    first = list(source.parts())
    require(bool(first), "there is no part")
    wrong = [type(part).__name__ for part in first if not is_a(part, SourceShard)]
    require(not wrong, f"a part is a {wrong[:1]}, not a unmask.core.types.Part")
    require(len(set(first)) == len(first), "a part comes twice")
    require(first == list(source.parts()), "another order the second time")
    require(first == list(subject.source_of().parts()), "another order from a source made anew")


@law(SOURCE_LAWS)
def documents_are_the_same_each_time(subject: SourceFixture) -> None:
    """A part's passages are the same whenever they are read, whatever was read before, also from a source made anew."""
    source = subject.source_of()
    first = read(source)
    require(read(source) == first, "the second reading gave other passages than the first")
    require(read(source, backwards=True) == first, "read with the last part first, the passages are others")
    require(read(subject.source_of()) == first, "a source made anew gives other passages")


@law(SOURCE_LAWS)
def passages_come_in_order(subject: SourceFixture) -> None:
    """Documents of a part are numbered from 0 on, their passages too, and the last passage of each says so."""
    source = subject.source_of()
    for part, passages in read(source).items():
        document = piece = 0
        for number, passage in enumerate(passages):
            require(is_a(passage, DocumentChunk), f"{part.path}: `documents` gives a {type(passage).__name__}")
            place = f"{part.path}, passage {number}"
            wanted, got = (document, piece), (passage.document, passage.piece)
            require(got == wanted, f"{place}: document and piece are {got} where {wanted} come next")
            document, piece = (document + 1, 0) if passage.last else (document, piece + 1)
        ended = not passages or passages[-1].last or not _whole(source, part, passages)
        require(ended, f"{part.path}: the last document never ends (`last` is false)")


@law(SOURCE_LAWS)
def text_is_text(subject: SourceFixture) -> None:
    """Text can be written as UTF-8, is NFC, and there is some that is not blank."""
    seen = False
    for part, passages in read(subject.source_of()).items():
        for number, passage in enumerate(passages):
            place = f"{part.path}, passage {number}"
            require(is_a(passage.text, str), f"{place}: `text` is a {type(passage.text).__name__}")
            lone = [letter for letter in passage.text if "\ud800" <= letter <= "\udfff"]
            require(not lone, f"{place}: half of a surrogate pair, {lone[:1]!r}, which is no character")
            normal = unicodedata.is_normalized("NFC", passage.text)
            require(normal, f'{place}: not NFC; give unicodedata.normalize("NFC", text)')
            seen = seen or bool(passage.text.strip())
    require(seen, "there is nothing but white space")


@law(SOURCE_LAWS)
def passages_are_bounded(subject: SourceFixture) -> None:
    """No passage is longer than a million characters, and each says for how many it stands."""
    for part, passages in read(subject.source_of()).items():
        for number, passage in enumerate(passages):
            place, size = f"{part.path}, passage {number}", len(passage.text)
            require(size <= PASSAGE_CHARACTERS, f"{place}: {size:,} characters; give a document in several passages")
            told = passage.characters
            require(type(told) is int and told >= 0, f"{place}: `characters` is {told!r}")
            require(bool(told) or not size, f"{place}: stands for 0 characters and has {size}")


@law(SOURCE_LAWS)
def a_fingerprint_is_stable(subject: SourceFixture) -> None:
    """The fingerprint is a text that stays, before and after reading and for a source made anew."""
    source = subject.source_of()
    first = source.fingerprint
    require(is_a(first, str) and bool(first), f"`fingerprint` is {first!r}")
    read(source)
    require(source.fingerprint == first, "reading the source changed its fingerprint")
    require(subject.source_of().fingerprint == first, "a source made anew has another fingerprint")


@law(SOURCE_LAWS)
def a_fingerprint_changes_with_the_text(subject: SourceFixture) -> None:
    """Where a setting or a file gives other text, the fingerprint is another: caches and resuming go by it."""
    source = subject.source_of()
    seen = {source.fingerprint: ("as it is", list(read(source).values()))}
    for what, source_of in subject.variants:
        try:
            source = source_of()
            fingerprint, texts = source.fingerprint, list(read(source).values())
        except Exception:  # what is refused, in whatever way, nobody can train on
            continue
        before = seen.setdefault(fingerprint, (what, texts))
        require(before[1] == texts, f"one fingerprint for two texts: {before[0]}, and {what}")


OBJECTIVE_LAWS: Final[list[Check[ObjectiveFixture]]] = []
_OF_SLOTS: Final = ("positions_M", "labels_M", "weights_M", "chance_M")
_FILLER_SLOTS: Final = 11
_NEAR: Final = 1e-4  # relative; sums in float32 differ in their last digits by how texts were batched


def _same(one: MaskedBatch, other: MaskedBatch) -> str:
    """The name of what differs between two puzzles, or nothing."""
    if not torch.equal(one.batch.ids_T, other.batch.ids_T):
        return "batch.ids_T"
    for name in _OF_SLOTS:
        if not torch.equal(getattr(one, name), getattr(other, name)):
            return name
    return (
        ""
        if dict(one.denominators) == dict(other.denominators) and one.num_maskable == other.num_maskable
        else "denominators"
    )


def _rows(masked: MaskedBatch, text: int) -> dict[str, list[Any]]:
    """What a puzzle holds of one of its texts, as if it lay alone."""
    first, last = masked.batch.offsets[text], masked.batch.offsets[text + 1]
    inside_M = (masked.positions_M >= first) & (masked.positions_M < last)
    rows = {name: getattr(masked, name)[inside_M].tolist() for name in _OF_SLOTS}
    rows["positions_M"] = [slot - first for slot in rows["positions_M"]]
    return {"ids_T": masked.batch.ids_T[first:last].tolist(), **rows}


@law(OBJECTIVE_LAWS)
def says_what_it_is(subject: ObjectiveFixture) -> None:
    """`loss_weights`, `metrics`, `sampler`, `modules` and `fills` are what the loop reads from them."""
    objective = subject.objective
    weights = dict(objective.loss_weights)
    require(bool(weights), "`loss_weights` is empty: name one, as in {'mlm': 1.0}")
    require(
        all(math.isfinite(w) and w > 0 for w in weights.values()),
        f"`loss_weights` has a weight that is no share: {weights}",
    )
    require("loss" in objective.metrics, f'`metrics` has no "loss", which every display shows: {objective.metrics}')
    require(is_a(objective.modules, nn.Module), "`modules` is no torch.nn.Module; an empty nn.Module() will do")
    require(is_a(objective.fills, bool), "`fills` is neither True nor False")
    known = ("windows", "next-sentence", "sentence-order")
    require(objective.sampler in known, f"`sampler` is {objective.sampler!r}; there are {', '.join(known)}")


@law(OBJECTIVE_LAWS)
def corrupt_is_pure(subject: ObjectiveFixture) -> None:
    """A batch and a seed always give the same puzzle; the batch stays as it was and no generator moves."""
    batch, before = subject.batch(), generators()
    ids_T = batch.ids_T.clone()
    first = subject.objective.corrupt(batch, subject.seed)
    require(torch.equal(batch.ids_T, ids_T), "the ids of the batch were changed in place: work on a clone")
    after = generators()
    moved = [name for name in before if before[name] != after[name]]
    require(not moved, f"it drew from a generator ({', '.join(moved)}): use unmask.core.rng, whose draws have no state")
    subject.objective.corrupt(pack(subject.texts[-1:]), subject.seed + 1)  # something in between, for what remembers
    differs = _same(first, subject.objective.corrupt(subject.batch(), subject.seed))
    require(not differs, f"the same batch and seed gave another `{differs}` the second time")
    late = replace(subject.batch(), progress=0.75)
    once = subject.objective.corrupt(late, subject.seed)
    subject.puzzle()  # of the beginning
    differs = _same(once, subject.objective.corrupt(late, subject.seed))
    require(not differs, f"the same batch, seed and progress gave another `{differs}` the second time")


@law(OBJECTIVE_LAWS)
def a_text_is_asked_alike_in_any_company(subject: ObjectiveFixture) -> None:
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
def asks_something(subject: ObjectiveFixture) -> None:
    """Of ordinary texts, something is asked."""
    tokens = subject.batch().tokens
    require(
        len(subject.puzzle().positions_M) > 0, f"nothing was asked in {len(subject.texts)} texts of {tokens} tokens"
    )


@law(OBJECTIVE_LAWS)
def asked_slots_ascend_inside_texts(subject: ObjectiveFixture) -> None:
    """`positions_M` is int64, ascending, each slot once, and none lies in the filler text or beyond."""
    batch = subject.batch(slots=_FILLER_SLOTS)
    positions_M = subject.objective.corrupt(batch, subject.seed).positions_M
    require(
        positions_M.dtype == torch.int64 and positions_M.ndim == 1,
        f"`positions_M` is {positions_M.dtype} with {positions_M.ndim} dimensions",
    )
    require(bool((positions_M.diff() > 0).all()), "`positions_M` does not ascend, or names a slot twice")
    outside = [slot for slot in positions_M.tolist() if not 0 <= slot < batch.tokens]
    require(not outside, f"slots {outside[:5]} lie in no text: the texts end at {batch.tokens}")


@law(OBJECTIVE_LAWS)
def special_pieces_are_never_asked(subject: ObjectiveFixture) -> None:
    """No slot with the mark SPECIAL ([CLS], [SEP], [UNK] …) is asked about."""
    masked = subject.puzzle()
    special = [slot for slot in masked.positions_M.tolist() if subject.batch().token_flags_T[slot] & SPECIAL]
    require(not special, f"special pieces are asked at slots {special[:5]}")


@law(OBJECTIVE_LAWS)
def answers_are_what_stood_there(subject: ObjectiveFixture) -> None:
    """`labels_M` holds the ids of the batch at `positions_M`, before anything was hidden."""
    masked = subject.puzzle()
    original_M = subject.batch().ids_T[masked.positions_M]
    require(torch.equal(masked.labels_M, original_M), "`labels_M` is not batch.ids_T[positions_M]")


@law(OBJECTIVE_LAWS)
def the_layout_stays(subject: ObjectiveFixture) -> None:
    """Only ids change: texts keep their places, marks and keys, and ids stay within the vocabulary."""
    batch, seen = subject.batch(), subject.puzzle().batch
    require(seen.offsets == batch.offsets and seen.filler == batch.filler, "texts lie elsewhere than in the batch")
    require(torch.equal(seen.token_flags_T, batch.token_flags_T), "`token_flags_T` was changed")
    require(
        torch.equal(seen.sample_keys_B2, batch.sample_keys_B2), "`sample_keys_B2`, the key of every draw, was changed"
    )
    require(seen.progress == batch.progress, "`progress` was changed")
    require(seen.ids_T.dtype == torch.int64 and seen.ids_T.shape == batch.ids_T.shape, "`ids_T` has another shape")
    beyond = seen.ids_T[(seen.ids_T < 0) | (seen.ids_T >= subject.vocabulary)].tolist()
    require(not beyond, f"ids {beyond[:5]} are beyond the vocabulary of {subject.vocabulary}")


@law(OBJECTIVE_LAWS)
def counts_match_what_is_asked(subject: ObjectiveFixture) -> None:
    """There is a count for each term, and one answer, weight and chance for each asked slot."""
    masked, terms = subject.puzzle(), set(subject.objective.loss_weights)
    require(
        set(masked.denominators) == terms,
        f"`denominators` has {sorted(masked.denominators)}, `loss_weights` has {sorted(terms)}",
    )
    require(
        all(type(count) is int and count >= 0 for count in masked.denominators.values()),
        f"no counts: {masked.denominators}",
    )
    asked = len(masked.positions_M)
    sizes = {name: len(getattr(masked, name)) for name in _OF_SLOTS}
    require(set(sizes.values()) == {asked}, f"not one entry for each asked slot: {sizes}")
    askable = int(((subject.batch().token_flags_T & SPECIAL) == 0).sum())
    require(
        asked <= masked.num_maskable <= askable,
        f"asked {asked}, `num_maskable` {masked.num_maskable}, ordinary slots {askable}",
    )
    require(bool(masked.weights_M.isfinite().all()), "`weights_M` holds what is no finite number")
    require(bool(((masked.chance_M >= 0) & (masked.chance_M < 1)).all()), "`chance_M` leaves [0, 1)")


@law(OBJECTIVE_LAWS)
def the_loss_is_named_sums(subject: ObjectiveFixture) -> None:
    """`sums` has one finite scalar for each of `loss_weights`, `metrics` one (sum, count) for each of the objective's `metrics`."""
    loss, objective = subject.loss(subject.puzzle()), subject.objective
    require(
        set(loss.sums) == set(objective.loss_weights),
        f"`sums` has {sorted(loss.sums)}, not {sorted(objective.loss_weights)}",
    )
    require(
        set(loss.metrics) == set(objective.metrics),
        f"`metrics` has {sorted(loss.metrics)}, not {sorted(objective.metrics)}",
    )
    for name, value in loss.sums.items():
        require(value.ndim == 0 and bool(value.isfinite()), f"the sum of `{name}` is no finite scalar")
    for name, (value, count) in loss.metrics.items():
        require(bool(torch.as_tensor(value).isfinite()) and type(count) is int, f"metric `{name}`: {value}, {count!r}")


@law(OBJECTIVE_LAWS)
def losses_add_over_micro_batches(subject: ObjectiveFixture) -> None:
    """Sums, counts and metrics of a batch are those of its parts added up: sums, never means."""
    half = max(1, len(subject.texts) // 2)
    groups = [group for group in (subject.texts, subject.texts[:half], subject.texts[half:]) if group]
    with torch.no_grad():
        masked_batches = [subject.objective.corrupt(pack(group), subject.seed) for group in groups]
        whole, *parts = [subject.loss(masked) for masked in masked_batches]
    for term in subject.objective.loss_weights:
        counted = masked_batches[0].denominators[term], sum(puzzle.denominators[term] for puzzle in masked_batches[1:])
        require(counted[0] == counted[1], f"the count of `{term}` is {counted[0]} at once and {counted[1]} in parts")
        _require_near(float(whole.sums[term]), sum(float(part.sums[term]) for part in parts), f"the sum of `{term}`")
    for name, (value, count) in whole.metrics.items():
        counted = count, sum(part.metrics[name][1] for part in parts)
        require(
            counted[0] == counted[1], f"the count of metric `{name}` is {counted[0]} at once, {counted[1]} in parts"
        )
        _require_near(float(value), sum(float(part.metrics[name][0]) for part in parts), f"metric `{name}`")


def _require_near(whole: float, parts: float, what: str) -> None:
    near = math.isclose(whole, parts, rel_tol=_NEAR, abs_tol=_NEAR)
    require(near, f"{what} is {whole:.5g} at once and {parts:.5g} in parts: is it a mean?")


@law(OBJECTIVE_LAWS)
def the_loss_draws_nothing(subject: ObjectiveFixture) -> None:
    """Without dropout, the loss of a puzzle is the same each time and no generator moves."""
    masked, before = subject.puzzle(), generators()
    with torch.no_grad():
        first, second = subject.loss(masked), subject.loss(masked)
    require(before == generators(), "it drew from a generator: what is random belongs into `corrupt` (chance_M)")
    for term, value in first.sums.items():
        require(torch.equal(value, second.sums[term]), f"the sum of `{term}` was another the second time")


@law(OBJECTIVE_LAWS)
def gradients_are_finite(subject: ObjectiveFixture) -> None:
    """Every gradient is finite, also beside a filler text, and some of the encoder's are not zero."""
    masked = subject.objective.corrupt(subject.batch(slots=_FILLER_SLOTS), subject.seed)
    gradients = subject.backward(masked)
    require(all(bool(gradient.isfinite().all()) for gradient in gradients), "a gradient is no finite number")
    if len(masked.positions_M):
        moved = any(p.grad is not None and bool(p.grad.any()) for p in subject.encoder.parameters())
        require(moved, "nothing of the encoder would move: all its gradients are zero")


@law(OBJECTIVE_LAWS)
def nothing_askable_costs_nothing(subject: ObjectiveFixture) -> None:
    """A text of special pieces alone asks nothing, and what is not counted adds no loss and no gradient."""
    masked = subject.objective.corrupt(pack([subject.nothing]), subject.seed)
    require(not len(masked.positions_M), f"asked {len(masked.positions_M)} slots of a text that has nothing to ask")
    loss = subject.loss(masked)
    for term, value in loss.sums.items():
        require(bool(value.isfinite()), f"the sum of `{term}` is no number where nothing is asked (0 ÷ 0?)")
        cost = float(value.detach())
        require(masked.denominators[term] > 0 or not cost, f"`{term}` counts nothing and costs {cost:.4g}")
    for name, (value, count) in loss.metrics.items():
        if not bool(torch.as_tensor(value).isfinite()) or (not count and float(value)):
            raise CheckFailed(f"metric `{name}` is {float(value)} over {count}")
    gradients = subject.backward(masked)
    require(all(bool(gradient.isfinite().all()) for gradient in gradients), "a gradient is no finite number")
    if not any(masked.denominators.values()):
        require(not any(bool(gradient.any()) for gradient in gradients), "a gradient is not zero")
