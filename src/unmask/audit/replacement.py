"""Room card: what stands in the place of what is asked, and what must be left alone.

Comes in: a Scene. Goes out: findings: masked, randomised, kept; special pieces and padding asked, special pieces drawn,
ids that the vocabulary lacks; labels that are not the original; changes where nothing is asked. Called by: judge.

Only outputs are seen, so a random draw that equals the original counts as kept. With V ids to draw from that has the
chance 1/V, and of the share r of random draws r·(1 - 1/V) is expected to be seen changed, keep + r/V unchanged. V are
the ordinary ids; where special pieces are drawn, all ids, and mask + r/V is expected to be seen as the mask.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from unmask.audit.bounds import chance_of, clustered
from unmask.audit.report import CHANCE, Finding, none_allowed, untested
from unmask.audit.scene import Scene

_FEWEST = 200  # asked tokens


def replacement_findings(scene: Scene) -> Iterator[Finding]:
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


def _special(scene: Scene) -> Bool[np.ndarray, "V S"]:
    """Whether each slot shows a special piece."""
    return np.isin(scene.visits.shown_VS, list(scene.tokenizer.special_ids))


def _known(scene: Scene) -> NDArray[np.bool_]:
    """Which ids a piece has."""
    known = np.zeros(scene.tokenizer.size, dtype=bool)
    known[scene.tokenizer.ordinary_N] = True
    known[list(scene.tokenizer.special_ids)] = True
    return known


def _split(scene: Scene, changed_VS: Bool[np.ndarray, "V S"], specials_drawn: int) -> Iterator[Finding]:
    claims, fair_VS = scene.claims, scene.fair_VS
    asked_V = scene.asked_V
    names = ("masked", "randomised", "kept")
    if int(asked_V.sum()) < _FEWEST:
        yield from (untested(name, f"{int(asked_V.sum())} tokens asked are too few") for name in names)
        return
    pool, mask_drawn = len(scene.tokenizer.ordinary_N), 0
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
