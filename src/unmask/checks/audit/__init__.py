"""Audits maskers by their inputs and outputs: masking rate, replacement, special tokens, whole words, repeats.

report = unmask.audit(my_masking, ["a text", "another"], tokenizer="runs/notes/latest")
report.passed, report.failed, report["rate"].measured
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from unmask.checks.audit.findings import rate_findings, repeat_findings, replacement_findings, word_findings
from unmask.checks.audit.maskers import make_samples, open_masker
from unmask.checks.audit.settings import AuditConfig, AuditReport, Claims
from unmask.checks.audit.statistics import Observations, replay
from unmask.core.types import ProgressCallback
from unmask.core.version import __version__
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
    progress: ProgressCallback | None = None,
) -> AuditReport:
    """Audit a masker by its inputs and outputs alone.

    Args:
        masker: a callable (ids of shape batch × length -> inputs, labels) with labels -100 for tokens that are not
            masked; a data collator of `transformers`; or an objective.
        texts: texts from which samples are cut; the audit reads as many of them as it needs.
        tokenizer: a tokenizer, or its path.
        claims: claimed rate and replacement; by default the attributes of a collator, else BERT's 15 % and 80/10/10.
        settings: number of samples, epochs, workers and ranks.
        words: method of word segmentation; by default chosen by the script of the texts.
        progress: callback that gets the name of a stage and the fraction of it that is done.

    Raises:
        RecipeError: the object is not a masker, or it returns something else than a masked batch.
        TextError: the texts are too short.
        TokenizerError: there is no tokenizer, or it has no mask token.
    """
    if isinstance(texts, str):
        texts = [texts]
    settings = settings or AuditConfig()
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(Path(tokenizer))
    rule = words or detect_words("".join(text[:200_000] for text in texts[:50]))
    opened = open_masker(masker, tokenizer, settings.seed, claims)
    if progress:
        progress("cutting samples", 0.0)
    samples = make_samples(texts, tokenizer, rule, settings, can_pad=opened.can_pad)
    record = replay(opened, samples, settings, progress)
    obs = Observations(samples, record, tokenizer, opened.claims, settings)
    findings = (
        *rate_findings(obs),
        *replacement_findings(obs),
        *word_findings(obs),
        *repeat_findings(obs),
    )
    return AuditReport(
        masker=opened.name,
        claims=opened.claims,
        settings=settings,
        findings=findings,
        samples=len(samples.rows),
        tokens=int(obs.maskable_V.sum()),
        masked_tokens=int(obs.masked_VS.sum()),
        vocab_size=tokenizer.size,
        words=rule,
        versions=_versions(),
        notes=() if opened.can_pad else ("all samples of a batch had the same length: the masker can't pad",),
    )


def _versions() -> dict[str, str]:
    """Return the versions on which the numbers depend."""
    import torch

    versions = {"unmask": __version__, "python": platform.python_version(), "numpy": np.__version__}
    versions["torch"] = str(torch.__version__)
    for name in ("transformers", "tokenizers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
