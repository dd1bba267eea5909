"""Room card: the audit: is a masker what it says?

Comes in: a masker of any make, texts, a tokenizer. Goes out: an AuditReport. Called by: `unmask.audit`, cli, people.

    report = unmask.audit(my_masking, ["a text", "another"], tokenizer="runs/notes/latest")
    report.passed, report.found, report["rate"].measured
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from unmask import __version__
from unmask.checks.audit.findings import rate_findings, repeat_findings, replacement_findings, wholeness_findings
from unmask.checks.audit.maskers import masker_of
from unmask.checks.audit.replay import Progress, replay
from unmask.checks.audit.samples import make_material
from unmask.checks.audit.settings import AuditConfig, AuditReport, Claims
from unmask.checks.audit.statistics import Observations
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.words import WordsRule, detect_words


def audit(
    masker: Any,
    texts: Sequence[str],
    tokenizer: Tokenizer | str | Path,
    *,
    claims: Claims | None = None,
    settings: AuditConfig | None = None,
    words: WordsRule | None = None,
    progress: Progress | None = None,
) -> AuditReport:
    """Judge a masker by its inputs and outputs alone.

    Args:
        masker: a callable (ids, samples × slots -> inputs, labels), labels -100 where nothing is asked; a data collator
            of `transformers`; an objective of ours.
        texts: the texts themselves; more than the audit can use is not looked at.
        tokenizer: one in hand, or the folder of one.
        claims: what the masker promises; a collator's own attributes, else BERT's 15 % and 80/10/10.
        settings: how long it is watched, by how many workers and ranks.
        words: what a word is; what the texts' script asks for.
        progress: told what is being done and which share of it is.

    Raises:
        RecipeError: this is no masker, or what it gives back is no masked batch.
        TextError: the texts are too short.
        TokenizerError: there is no tokenizer, or it has no mask.
    """
    if isinstance(texts, str):
        texts = [texts]
    settings = settings or AuditConfig()
    opened = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(Path(tokenizer))
    rule = words or detect_words("".join(text[:200_000] for text in texts[:50]))
    taken = masker_of(masker, opened, settings.seed, claims)
    if progress:
        progress("cutting samples", 0.0)
    material = make_material(texts, opened, rule, settings, pads=taken.pads)
    visits = replay(taken, material, settings, progress)
    scene = Observations(material, visits, opened, taken.claims, settings)
    findings = (
        *rate_findings(scene),
        *replacement_findings(scene),
        *wholeness_findings(scene),
        *repeat_findings(scene),
    )
    return AuditReport(
        masker=taken.name,
        claims=taken.claims,
        settings=settings,
        findings=findings,
        samples=len(material.rows),
        tokens=int(scene.askable_V.sum()),
        asked=int(scene.asked_VS.sum()),
        pieces=opened.size,
        words=rule,
        versions=_versions(),
        notes=() if taken.pads else ("samples of one batch were equally long: this masker or tokenizer can't pad",),
    )


def _versions() -> dict[str, str]:
    """What the numbers depend on."""
    import torch

    versions = {"unmask": __version__, "python": platform.python_version(), "numpy": np.__version__}
    versions["torch"] = str(torch.__version__)
    for name in ("transformers", "tokenizers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
