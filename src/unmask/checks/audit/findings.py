"""Room card: how many are asked, where, and of which samples.

Comes in: a Scene. Goes out: findings: rate, nothing asked, rate by length, rate by position. Called by: judge.

Whole words can't meet a number of tokens exactly: where a masker claims them, it may miss by half a word a sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Final

import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import NDArray

from unmask.checks.audit.settings import CHANCE, Finding, none_allowed, untested
from unmask.checks.audit.statistics import Observations, chance_of, clustered, combinations, poisson_tail

_BINS: Final = 4  # of length
_EDGE: Final = 2  # slots at each end that are told by themselves
_FEWEST_TOKENS_FOR_RATES: Final = 50  # clusters in which the normal distribution is trusted
_POSITION_TOLERANCE: Final = 0.05  # of the rate, where words are hidden whole: their sizes don't explain all


def rate_findings(scene: Observations) -> Iterator[Finding]:
    """What the rates tell."""
    yield _rate(scene)
    yield _nothing(scene)
    yield _by_length(scene)
    yield _by_position(scene)


def _rate(scene: Observations) -> Finding:
    share, expected = scene.rate, scene.claims.rate
    if not share.of:
        return untested("rate", f"no sample is long enough for a rate of {expected:g}")
    mean = share.of / int(scene.long_V.sum())
    chance = chance_of(share.share, share.error, expected, scene.slack / mean)
    says = f"{share.share:.3%} ± {share.error:.3%} of {share.of:,} tokens are asked, {expected:.4g} promised"
    return Finding("rate", "found" if chance < CHANCE else "well", says, share.share, expected, share.error,
                   share.hits, share.of, chance)  # fmt: skip


def _nothing(scene: Observations) -> Finding:
    """Samples that teach nothing; independent draws leave some, which short samples explain."""
    some_V = scene.askable_V > 0
    empty = int((some_V & (scene.asked_V == 0)).sum())
    draws_V = scene.askable_V if scene.claims.units == "tokens" else scene.words_V
    rate = min(scene.claims.rate, max(scene.rate.share, 1e-9))
    alone_V = np.where(some_V, (1.0 - rate) ** draws_V, 0.0)
    lanes = scene.settings.lanes * scene.settings.ranks * scene.settings.epochs
    # What repeats itself leaves the same samples empty again, so only one of its visits counts.
    chance = poisson_tail(empty // lanes, float(alone_V.sum()) / lanes)
    explained = float(alone_V.sum())
    says = f"{empty:,} of {int(some_V.sum()):,} samples have nothing asked; independent draws leave {explained:,.1f}"
    return Finding("nothing asked", "found" if chance < CHANCE else "well", says, float(empty), explained, None,
                   empty, int(some_V.sum()), chance)  # fmt: skip


def _by_length(scene: Observations) -> Finding:
    long = scene.askable_V[scene.long_V]
    if not len(long) or not scene.rate.hits:
        return untested("rate by length", "no sample is long enough")
    edges = np.unique(np.quantile(long[~scene.full_V[scene.long_V]], np.linspace(0, 1, _BINS + 1)).astype(np.int64))
    worst, said = 1.0, list[str]()
    for first, last in itertools.pairwise(edges.tolist()):
        held_V = scene.long_V & (scene.askable_V >= first) & (scene.askable_V < last) & ~scene.full_V
        share = scene.rate_over(held_V)
        if len(np.unique(scene.cluster_V[held_V])) < _FEWEST_TOKENS_FOR_RATES:
            continue
        mean = share.of / int(held_V.sum())
        slack = scene.slack * (1.0 / mean + scene.long_V.sum() / scene.rate.of)
        chance = chance_of(share.share, float(np.hypot(share.error, scene.rate.error)), scene.rate.share, slack)
        worst = min(worst, chance)
        said.append(f"{first}-{last - 1}: {share.share:.2%}")
    short_V = ~scene.long_V & (scene.askable_V > 0)
    if short_V.any():
        said.insert(0, f"under {edges[0]}: {scene.rate_over(short_V).share:.2%} (not judged)")
    chance = min(1.0, worst * max(1, len(said)))
    return Finding("rate by length", "found" if chance < CHANCE else "well", "tokens of a sample " + ", ".join(said),
                   chance=chance)  # fmt: skip


def _by_position(scene: Observations) -> Finding:
    """The rate at each slot of full samples against the rate of all; the first and last slots are told.

    A word that the edge of a sample cuts is short, and short words fit more often: where whole words are hidden, what
    is expected at a slot is the rate of words as long as those that stand there.
    """
    full_V = scene.full_V
    if len(np.unique(scene.cluster_V[full_V])) < _FEWEST_TOKENS_FOR_RATES or not scene.rate.hits:
        return untested("rate by position", "too few full samples")
    fair_VS, askable_VS, cluster_V = scene.fair_VS[full_V], scene.askable_VS[full_V], scene.cluster_V[full_V]
    overall = scene.rate_over(full_V)
    expected_VS = np.full(fair_VS.shape, overall.share)
    tolerance = 0.0
    if scene.claims.units != "tokens":
        size_VS = scene.size_VS[full_V]
        expected_VS = scene.rate_of_size(full_V)[size_VS]
        tolerance = _POSITION_TOLERANCE * overall.share
    slots = np.flatnonzero(askable_VS.any(axis=0))
    at: dict[int, float] = {}
    worst, worst_slot = 1.0, int(slots[0])
    for slot in slots.tolist():
        expected_V = expected_VS[:, slot] * askable_VS[:, slot]
        beyond = clustered(fair_VS[:, slot] - expected_V, askable_VS[:, slot], cluster_V)
        at[slot] = beyond.share + float(expected_V.sum()) / beyond.of
        chance = chance_of(beyond.share, max(beyond.error, 1.0 / beyond.of), 0.0, tolerance or 1e-9)
        if chance < worst:
            worst, worst_slot = chance, slot
    chance = min(1.0, worst * len(slots))
    told = [*slots[:_EDGE].tolist(), *slots[-_EDGE:].tolist()]
    says = ", ".join(f"slot {slot}: {at[slot]:.2%}" for slot in told)
    says = f"{says}; of all {overall.share:.2%}; least likely: slot {worst_slot}, {at[worst_slot]:.2%}"
    if scene.claims.units == "spans":  # an edge is reached from one side only
        return Finding("rate by position", "noted", says)
    verdict = "found" if chance < CHANCE else "well"
    return Finding("rate by position", verdict, says, at[worst_slot], overall.share, chance=chance)


_ALIKE: Final = 0.05  # where words that fit badly are asked less often, the same words are asked more often than others
_ALIKE_UNEVEN: Final = 0.5  # where preferred words are asked again and again, as promised
_FEWEST_FOR_REPEATS: Final = 16  # pairs
_CAUTION: Final = 2.0  # how much likelier twins may be than if all places were equally likely


def repeat_findings(scene: Observations) -> Iterator[Finding]:
    """What was drawn again."""
    visits, settings = scene.visits, scene.settings
    full_V = scene.full_V
    for name, several, column, why in (
        ("repeats between epochs", settings.epochs, visits.epoch_V, "one epoch was watched"),
        ("repeats between workers", settings.lanes, visits.worker_V, "there was no more than one worker"),
        ("repeats between ranks", settings.ranks, visits.rank_V, "one rank was watched"),
    ):
        if several < 2:
            yield untested(name, why)
            continue
        # The same place in all other respects: what is left of (epoch, rank, worker, turn, seat).
        parts = [visits.epoch_V, visits.rank_V, visits.worker_V]
        rest = [part for part in parts if part is not column]
        order = np.lexsort((column, visits.seat_V, visits.turn_V, *rest))
        groups = order[full_V[order]].reshape(-1, several)
        yield _pairs(
            scene, name, np.concatenate([groups[:, pair] for pair in itertools.combinations(range(several), 2)])
        )


def _pairs(scene: Observations, name: str, pair_P2: Int[np.ndarray, "P 2"]) -> Finding:
    first_PS, second_PS = scene.fair_VS[pair_P2[:, 0]], scene.fair_VS[pair_P2[:, 1]]
    some_P = first_PS.any(axis=1) & second_PS.any(axis=1)
    pair_P2, first_PS, second_PS = pair_P2[some_P], first_PS[some_P], second_PS[some_P]
    if len(pair_P2) < _FEWEST_FOR_REPEATS:
        return untested(name, f"{len(pair_P2)} pairs of full samples are too few")
    twins = int((first_PS == second_PS).all(axis=1).sum())
    by_chance = _CAUTION * sum(1.0 / ways for ways in _ways(scene, pair_P2[:, 0]))
    cluster_P = scene.cluster_V[pair_P2[:, 0]]
    clusters = len(np.unique(cluster_P))
    # One cluster's pairs may all repeat for one reason, so it counts as one.
    share = clusters / len(pair_P2)
    chance_twins = poisson_tail(int(np.ceil(twins * share)), by_chance * share)

    open_PS = scene.askable_VS[pair_P2[:, 0]] & scene.askable_VS[pair_P2[:, 1]]
    one_P, other_P = (first_PS & open_PS).sum(axis=1), (second_PS & open_PS).sum(axis=1)
    size_P = np.maximum(1, open_PS.sum(axis=1))
    expected_P = one_P * other_P / size_P
    room_P = np.minimum(one_P, other_P) - expected_P
    beyond_P = (first_PS & second_PS).sum(axis=1) - expected_P
    alike = clustered(beyond_P, room_P, cluster_P)
    tolerance = _ALIKE if scene.claims.even else _ALIKE_UNEVEN
    telling = len(np.unique(cluster_P[room_P >= 1.0])) >= _FEWEST_FOR_REPEATS  # where all is asked, all are alike
    chance_alike = chance_of(alike.share, alike.error, 0.0, tolerance, side="above") if telling else 1.0
    chance = min(1.0, 2.0 * min(chance_twins, chance_alike))
    says = (
        f"{twins:,} of {len(pair_P2):,} pairs ask for the same slots; likeness {alike.share:+.2%} ± {alike.error:.2%}"
    )
    return Finding(name, "found" if chance < CHANCE else "well", says, alike.share, 0.0, alike.error,
                   twins, len(pair_P2), chance)  # fmt: skip


def _ways(scene: Observations, visit_P: Int[np.ndarray, "P"]) -> Iterator[float]:
    """In how many ways the runs of touched words of each visit could have been placed; fewer than there are.

    What a masker takes for one word may be as long as the runs that it hides (a line, a sentence), so only as many
    places are counted as runs of that length fit into the sample.
    """
    for visit in visit_P.tolist():
        words = scene.word_VS[visit]
        touched: Bool[np.ndarray, "W"] = np.zeros(int(scene.words_V[visit]) + 1, dtype=bool)
        touched[words[scene.fair_VS[visit]]] = True
        runs = int((touched[:-1] & ~touched[1:]).sum())
        yield combinations((len(touched) - 1) * runs // max(1, int(touched.sum())), runs)


_FEWEST_FOR_REPLACEMENT = 200  # asked tokens


def replacement_findings(scene: Observations) -> Iterator[Finding]:
    """What was asked, what was shown."""
    special_VS, changed_VS = _special(scene), scene.visits.shown_VS != scene.original_VS
    drawn_VS = scene.fair_VS & changed_VS & (scene.visits.shown_VS != scene.tokenizer.mask_id)
    known = _known(scene)
    inside_VS = (scene.visits.shown_VS >= 0) & (scene.visits.shown_VS < len(known))
    strange_VS = drawn_VS & ~(inside_VS & known[np.where(inside_VS, scene.visits.shown_VS, 0)])
    specials_drawn = int((drawn_VS & special_VS).sum())
    yield from _split(scene, changed_VS, specials_drawn)
    drawn = int(drawn_VS.sum())
    yield none_allowed("specials drawn", specials_drawn, drawn, "random tokens are special pieces")
    yield none_allowed("unknown ids", int(strange_VS.sum()), drawn, "random tokens are ids that no piece has")
    real_VS = scene.original_VS >= 0
    unknown_VS = scene.material.unknown_NS[scene.visits.row_V]
    framing_VS = real_VS & ~scene.askable_VS & ~unknown_VS
    yield none_allowed("specials asked", int((scene.asked_VS & framing_VS).sum()), int(framing_VS.sum()),
                       "special pieces are asked")  # fmt: skip
    unknown, asked = int(unknown_VS.sum()), int((scene.asked_VS & unknown_VS).sum())
    yield (
        Finding("[UNK] asked", "noted", f"{asked:,} of {unknown:,} unknown pieces are asked", count=asked, of=unknown)
        if unknown
        else untested("[UNK] asked", "the text has no unknown piece")
    )
    padding = int(scene.visits.padding_V.sum())
    yield (
        none_allowed("padding asked", int(scene.visits.padding_asked_V.sum()), padding, "slots of padding are asked")
        if padding
        else untested("padding asked", "no batch was padded")
    )
    wrong = int((scene.asked_VS & real_VS & (scene.visits.label_VS != scene.original_VS)).sum())
    yield none_allowed("labels", wrong, int(scene.asked_VS.sum()), "labels are not the original id")
    unasked_VS = real_VS & ~scene.asked_VS
    moved = int((unasked_VS & changed_VS).sum())
    yield none_allowed("unasked changed", moved, int(unasked_VS.sum()), "tokens that nobody asks about were changed")


def _special(scene: Observations) -> Bool[np.ndarray, "V S"]:
    """Whether each slot shows a special piece."""
    return np.isin(scene.visits.shown_VS, list(scene.tokenizer.special_ids))


def _known(scene: Observations) -> NDArray[np.bool_]:
    """Which ids a piece has."""
    known = np.zeros(scene.tokenizer.size, dtype=bool)
    known[scene.tokenizer.regular_token_ids] = True
    known[list(scene.tokenizer.special_ids)] = True
    return known


def _split(scene: Observations, changed_VS: Bool[np.ndarray, "V S"], specials_drawn: int) -> Iterator[Finding]:
    claims, fair_VS = scene.claims, scene.fair_VS
    asked_V = scene.asked_V
    names = ("masked", "randomised", "kept")
    if int(asked_V.sum()) < _FEWEST_FOR_REPLACEMENT:
        yield from (untested(name, f"{int(asked_V.sum())} tokens asked are too few") for name in names)
        return
    pool, mask_drawn = len(scene.tokenizer.regular_token_ids), 0
    if specials_drawn:
        pool, mask_drawn = pool + len(scene.tokenizer.special_ids), 1
    masked_VS = scene.visits.shown_VS == scene.tokenizer.mask_id
    expected = (
        claims.mask + claims.random * mask_drawn / pool,
        claims.random * (1.0 - (1 + mask_drawn) / pool),
        claims.keep + claims.random / pool,
    )
    seen = (fair_VS & masked_VS, fair_VS & changed_VS & ~masked_VS, fair_VS & ~changed_VS)
    for name, promised, seen_VS in zip(names, expected, seen, strict=True):
        share = clustered(seen_VS.sum(axis=1), asked_V, scene.cluster_V)
        chance = chance_of(share.share, share.error, promised)
        says = f"{share.share:.3%} ± {share.error:.3%} of {share.of:,} asked, {promised:.3%} expected"
        yield Finding(name, "found" if chance < CHANCE else "well", says, share.share, promised, share.error,
                      share.hits, share.of, chance)  # fmt: skip


_SIZES: Final = ((1, 1), (2, 3), (4, 7), (8, 10_000))
_TOGETHER: Final = 0.02  # of neighbours may be one word by another rule than ours


def wholeness_findings(scene: Observations) -> Iterator[Finding]:
    """What became of words."""
    most = int(scene.words_V.max(initial=0)) + 1
    visits, slots = np.nonzero(scene.askable_VS)
    key = visits * most + scene.word_VS[visits, slots]
    shape = (len(scene.words_V), most)
    size_VW = np.bincount(key, minlength=shape[0] * most).reshape(shape)
    asked_VW = np.bincount(key, weights=scene.fair_VS[visits, slots], minlength=shape[0] * most).reshape(shape)
    touched_VW = asked_VW > 0
    several_VW = touched_VW & (size_VW > 1)
    part_VW = several_VW & (asked_VW < size_VW)
    part, several = int(part_VW.sum()), int(several_VW.sum())
    promised = scene.claims.units != "tokens"
    name = "words in part"
    says = f"{part:,} of {several:,} words of several tokens that were touched are hidden in part"
    if not several:
        yield untested(name, "no word of several tokens was touched")
    elif promised:
        yield Finding(name, "found" if part else "well", says, part / several, 0.0, 0.0, part, several)
    else:
        yield Finding(name, "noted", says, part / several, count=part, of=several)

    yield _by_size(scene)

    both_V = (touched_VW[:, :-1] & touched_VW[:, 1:]).sum(axis=1)
    before_V = (touched_VW[:, :-1] & (size_VW[:, 1:] > 0)).sum(axis=1)
    after = clustered(both_V, before_V, scene.cluster_V)
    rate = float(touched_VW.sum()) / max(1, int((size_VW > 0).sum()))
    if not after.of or rate >= 1.0:
        yield untested("words together", "no word was hidden that has another after it")
        return
    excess = max(0.0, (after.share - rate) / (1.0 - rate))
    error = after.error / (1.0 - rate)
    says = f"after a hidden word {after.share:.2%} are hidden, of all {rate:.2%}: {excess:.2%} go together"
    if scene.claims.units != "words":
        yield Finding("words together", "noted", says, excess, error=error, count=after.hits, of=after.of)
        return
    chance = chance_of(excess, error, 0.0, _TOGETHER, side="above")
    yield Finding("words together", "found" if chance < CHANCE else "well", says, excess, 0.0, error,
                  after.hits, after.of, chance)  # fmt: skip


def _by_size(scene: Observations) -> Finding:
    """Long words fit into what is left of a quota less often than short ones."""
    said = list[str]()
    for first, last in _SIZES:
        held_VS = (scene.size_VS >= first) & (scene.size_VS <= last) & scene.long_V[:, None]
        if held_VS.any():
            said.append(f"{first if first == last else f'{first}-{last}' if last < 100 else f'{first} or more'}: "
                        f"{scene.fair_VS[held_VS].mean():.2%}")  # fmt: skip
    return Finding("rate by word", "noted", "tokens of a word " + ", ".join(said))
