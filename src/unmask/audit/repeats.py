"""Room card: is the same drawn twice?

Comes in: a Scene. Goes out: findings: repeats between epochs (the same sample), workers and ranks (the sample at the
same place of another's order). Called by: judge.

Two measures each. Twins are pairs whose asked slots are exactly the same: by chance that happens with at most one in
the number of ways to place as many runs of words, which the Poisson distribution turns into a bound. Likeness is how
much more pairs overlap than independent draws do, 1 where they are the same; it finds half a repeat, too. Pairs are of
full samples, so that one stream of draws would give both the same slots.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Final

import numpy as np
from jaxtyping import Bool, Int

from unmask.audit.bounds import chance_of, clustered, combinations, poisson_tail
from unmask.audit.report import CHANCE, Finding, untested
from unmask.audit.scene import Scene

_ALIKE: Final = 0.05  # where words that fit badly are asked less often, the same words are asked more often than others
_ALIKE_UNEVEN: Final = 0.5  # where preferred words are asked again and again, as promised
_FEWEST: Final = 16  # pairs
_CAUTION: Final = 2.0  # how much likelier twins may be than if all places were equally likely


def repeat_findings(scene: Scene) -> Iterator[Finding]:
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


def _pairs(scene: Scene, name: str, pair_P2: Int[np.ndarray, "P 2"]) -> Finding:
    first_PS, second_PS = scene.fair_VS[pair_P2[:, 0]], scene.fair_VS[pair_P2[:, 1]]
    some_P = first_PS.any(axis=1) & second_PS.any(axis=1)
    pair_P2, first_PS, second_PS = pair_P2[some_P], first_PS[some_P], second_PS[some_P]
    if len(pair_P2) < _FEWEST:
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
    telling = len(np.unique(cluster_P[room_P >= 1.0])) >= _FEWEST  # where all is asked, all are alike
    chance_alike = chance_of(alike.share, alike.error, 0.0, tolerance, side="above") if telling else 1.0
    chance = min(1.0, 2.0 * min(chance_twins, chance_alike))
    says = (
        f"{twins:,} of {len(pair_P2):,} pairs ask for the same slots; likeness {alike.share:+.2%} ± {alike.error:.2%}"
    )
    return Finding(name, "found" if chance < CHANCE else "well", says, alike.share, 0.0, alike.error,
                   twins, len(pair_P2), chance)  # fmt: skip


def _ways(scene: Scene, visit_P: Int[np.ndarray, "P"]) -> Iterator[float]:
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
