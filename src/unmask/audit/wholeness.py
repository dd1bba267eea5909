"""Room card: are words hidden whole, and one by one?

Comes in: a Scene. Goes out: findings: words in part, rate by word, words together. Called by: judge.

Words are the text's (text/words), not the tokenizer's. A masker that takes a run of several words for one hides
neighbours together: of the words after a hidden one, more are hidden than the rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from unmask.audit.bounds import chance_of, clustered
from unmask.audit.report import CHANCE, Finding, untested
from unmask.audit.scene import Scene

_SIZES: Final = ((1, 1), (2, 3), (4, 7), (8, 10_000))
_TOGETHER: Final = 0.02  # of neighbours may be one word by another rule than ours


def wholeness_findings(scene: Scene) -> Iterator[Finding]:
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


def _by_size(scene: Scene) -> Finding:
    """Long words fit into what is left of a quota less often than short ones."""
    said = list[str]()
    for first, last in _SIZES:
        held_VS = (scene.size_VS >= first) & (scene.size_VS <= last) & scene.long_V[:, None]
        if held_VS.any():
            said.append(f"{first if first == last else f'{first}-{last}' if last < 100 else f'{first} or more'}: "
                        f"{scene.fair_VS[held_VS].mean():.2%}")  # fmt: skip
    return Finding("rate by word", "noted", "tokens of a word " + ", ".join(said))
