"""Room card: what contracts.Cutter promises, law by law.

Comes in: a way to make the cutter, and the lengths of documents. Goes out: CUTTER_LAWS, judged by laws.judge. Called
by: check, tests/contracts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from unmask.conformance.laws import Law, generators, is_a, law, require
from unmask.contracts import Cut, Cutter, CutterTools
from unmask.train.plan import EPOCH_STRIDE

CUTTER_LAWS: Final[list[Law[CutterSubject]]] = []
_EPOCHS: Final = (0, 1, EPOCH_STRIDE)  # the last is where the second stage of a run begins
_CUTS: Final = 5000  # looked at in an epoch, at most


@dataclass(frozen=True)
class CutterSubject:
    """A cutter, as it is made from tools, and the cases that it is tried on."""

    cutter_of: Callable[[CutterTools], Cutter]
    cases: Sequence[CutterTools]
    spans: int = 1  # of each sample

    def tried(self) -> Iterator[tuple[CutterTools, Cutter, str]]:
        """Each case, its cutter and how to call it."""
        for tools in self.cases:
            sizes = tools.lengths_N.tolist()
            shown = f"{sizes[:6]}{' …' if len(sizes) > 6 else ''}"
            yield tools, self.cutter_of(tools), f"documents of {shown} tokens, {tools.length} a sample"

    def cuts(self) -> Iterator[tuple[CutterTools, int, int, Cut, str]]:
        """Every cut of every case and epoch: tools, epoch, sample, cut, how to call it."""
        for tools, cutter, case in self.tried():
            for epoch in _EPOCHS:
                for sample in range(min(cutter.count(epoch), _CUTS)):
                    yield tools, epoch, sample, cutter.cut(epoch, sample), f"{case}: epoch {epoch}, sample {sample}"


@law(CUTTER_LAWS)
def the_number_of_samples_is_known(subject: CutterSubject) -> None:
    """`count` is a whole number above 0, the same in each epoch and each time, and so many samples can be cut."""
    for _, cutter, case in subject.tried():
        counts = {epoch: cutter.count(epoch) for epoch in (*_EPOCHS, 0)}
        require(all(type(count) is int for count in counts.values()), f"{case}: `count` gives no int")
        require(min(counts.values()) > 0, f"{case}: there is no sample")
        require(len(set(counts.values())) == 1, f"{case}: epochs of different size: {counts}")
        last = cutter.cut(0, counts[0] - 1)
        require(is_a(last, Cut), f"{case}: `cut` gives a {type(last).__name__}, not a Cut")


@law(CUTTER_LAWS)
def cut_is_pure(subject: CutterSubject) -> None:
    """A sample is the same each time, in any order, from a cutter made anew; no generator moves."""
    before = generators()
    for tools, cutter, case in subject.tried():
        samples = range(min(cutter.count(0), _CUTS))
        for epoch in _EPOCHS:
            first = [cutter.cut(epoch, sample) for sample in samples]
            backwards = [cutter.cut(epoch, sample) for sample in reversed(samples)][::-1]
            require(first == backwards, f"{case}: epoch {epoch} is another when it is read backwards")
            anew = subject.cutter_of(tools)
            require(
                first == [anew.cut(epoch, sample) for sample in samples], f"{case}: a cutter made anew cuts otherwise"
            )
    require(before == generators(), "it drew from a generator: use unmask.rng, whose draws have no state")


@law(CUTTER_LAWS)
def a_sample_is_one_span_of_a_document(subject: CutterSubject) -> None:
    """Each cut holds one span, not empty, within its document."""
    for tools, _, _, cut, case in subject.cuts():
        require(len(cut.spans) == subject.spans, f"{case}: {len(cut.spans)} spans, not {subject.spans}")
        for document, first, last, _ in cut.spans:
            require(0 <= document < len(tools.lengths_N), f"{case}: there is no document {document}")
            tokens = int(tools.lengths_N[document])
            require(first < last, f"{case}: an empty span, {first} to {last}")
            require(first >= 0 and last <= tokens, f"{case}: span {first} to {last} of a document of {tokens}")


@law(CUTTER_LAWS)
def a_sample_fits(subject: CutterSubject) -> None:
    """No cut holds more tokens than `length`."""
    for tools, _, _, cut, case in subject.cuts():
        require(cut.tokens <= tools.length, f"{case}: {cut.tokens} tokens")


@law(CUTTER_LAWS)
def a_sample_has_its_own_key(subject: CutterSubject) -> None:
    """No two samples have one (epoch, number), in an epoch or in two: every draw hangs on that key."""
    for _, cutter, case in subject.tried():
        seen: dict[tuple[int, int], str] = {}
        for epoch in _EPOCHS:
            for sample in range(min(cutter.count(epoch), _CUTS)):
                cut, place = cutter.cut(epoch, sample), f"epoch {epoch}, sample {sample}"
                require(cut.epoch >= 0 and cut.number >= 0, f"{case}: {place} has a negative key")
                before = seen.setdefault((cut.epoch, cut.number), place)
                require(before == place, f"{case}: {place} has the epoch and number of {before}")
