r"""Audits unmask's masking and the collators of the installed transformers.

unmask is audited with every `mask_unit`, on three kinds of tokenizer and texts in three languages.
`DataCollatorForLanguageModeling` is audited plain, seeded and with whole words. All numbers are reproducible.

    python benchmarks/audit.py --english EN.txt --korean KO.txt --chinese ZH.txt \
        [--results benchmarks/results/audit.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import tokenizers

import unmask
from unmask.checks.audit import audit
from unmask.checks.audit.maskers import ObjectiveMasker, claims_of_config, fast_tokenizer, transformers_collator
from unmask.checks.audit.settings import AuditConfig
from unmask.core.hardware import processor_name
from unmask.data.settings import DataConfig
from unmask.data.sources import open_source
from unmask.objectives.mlm import MaskedLMConfig, MaskedLMObjective
from unmask.tokenization.analysis import first_texts
from unmask.tokenization.settings import ByteBpeConfig, CharacterConfig, WordPieceConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer

CHARACTERS = 2_000_000
KINDS = {
    "WordPiece": WordPieceConfig(vocab_size=8192),
    "byte-level BPE": ByteBpeConfig(vocab_size=8192),
    "characters": CharacterConfig(),
}
PLAIN = AuditConfig()


def as_roberta(tokenizer: Tokenizer) -> Tokenizer:
    """Return the same vocabulary as made by RobertaTokenizer: offsets exclude the space before a word."""
    from transformers import RobertaTokenizer

    model = json.loads(tokenizer.to_json())["model"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    tokens = ("[CLS]", "[SEP]", "[SEP]", "[CLS]", "[UNK]", "[PAD]", "[MASK]")
    roles = ("bos_token", "eos_token", "sep_token", "cls_token", "unk_token", "pad_token", "mask_token")
    roberta = RobertaTokenizer(vocab=model["vocab"], merges=merges, **dict(zip(roles, tokens, strict=True)))
    inner: tokenizers.Tokenizer = roberta.backend_tokenizer
    return Tokenizer(tokenizers.Tokenizer.from_str(inner.to_str()))


def audit_unmask(
    texts: dict[str, list[str]], tokenizers_by_case: dict[tuple[str, str], Tokenizer]
) -> Iterator[dict[str, Any]]:
    for (language, kind), tokenizer in tokenizers_by_case.items():
        for mask_unit in ("token", "whole-word", "span", "ngram"):
            settings = MaskedLMConfig(mask_unit=mask_unit)
            objective = MaskedLMObjective(settings, tokenizer.mask_id, tokenizer.regular_token_ids)
            masker = ObjectiveMasker(objective, 17, f"unmask, mask_unit = {mask_unit}", claims_of_config(settings))
            yield run_audit(masker, texts[language], tokenizer, (language, kind))


def audit_transformers(
    texts: dict[str, list[str]], tokenizers_by_case: dict[tuple[str, str], Tokenizer]
) -> Iterator[dict[str, Any]]:
    english = tokenizers_by_case["English", "WordPiece"]
    for variant, settings in (
        ("transformers", PLAIN),
        ("transformers", replace(PLAIN, seeds="alike")),
        ("transformers:seeded", replace(PLAIN, workers=0)),
        ("transformers:seeded", PLAIN),
    ):
        collator = transformers_collator(variant, english, 0)
        yield run_audit(collator, texts["English"], english, ("English", "WordPiece"), settings)
    words = {
        ("English", "WordPiece"): english,
        ("English", "byte-level BPE"): tokenizers_by_case["English", "byte-level BPE"],
        ("English", "byte-level BPE as RobertaTokenizer"): as_roberta(tokenizers_by_case["English", "byte-level BPE"]),
        ("Korean", "WordPiece"): tokenizers_by_case["Korean", "WordPiece"],
        ("Chinese", "WordPiece"): tokenizers_by_case["Chinese", "WordPiece"],
    }
    for (language, kind), tokenizer in words.items():
        collator = transformers_collator("transformers:whole-word", tokenizer, 0)
        yield run_audit(collator, texts[language], tokenizer, (language, kind))


def run_audit(
    masker: Any, texts: list[str], tokenizer: Tokenizer, case: tuple[str, str], settings: AuditConfig = PLAIN
) -> dict[str, Any]:
    """Run an audit, print a summary and return the row of the results."""
    start = time.perf_counter()
    report = audit(masker, texts, tokenizer, settings=settings)
    seconds = round(time.perf_counter() - start, 1)
    language, kind = case
    print(
        f"{report.masker:<26} {language:<8} {kind:<36} {', '.join(report.failed) or 'all checks passed'} ({seconds} s)"
    )
    for finding in report.findings:
        if finding.verdict == "fail":
            print(f"    {finding.name}: {finding.detail}")
    return {
        "masker": report.masker,
        "language": language,
        "tokenizer": kind,
        "vocab_size": report.vocab_size,
        "words": report.words,
        "workers": settings.workers,
        "seeds": settings.seeds,
        "masked_tokens": report.masked_tokens,
        "failed": list(report.failed),
        "false_alarm": report.false_alarm,
        "notes": list(report.notes),
        "seconds": seconds,
        "findings": {finding.name: f"{finding.verdict}: {finding.detail}" for finding in report.findings},
    }


def collate_two_lengths(tokenizer: Tokenizer) -> str:
    """Return the error of the whole-word collator for a batch of two lengths, or "no error"."""
    collator = transformers_collator("transformers:whole-word", tokenizer, 0).collator
    fast = fast_tokenizer(tokenizer)
    features = [fast(text, return_offsets_mapping=True) for text in ("one", "one or two words more")]
    try:
        collator([dict(feature) for feature in features])
    except ValueError as error:
        return f"ValueError: {str(error).splitlines()[0]}"
    return "no error"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for language in ("english", "korean", "chinese"):
        parser.add_argument(f"--{language}", required=True, help="a text in this language")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    paths = {"English": options.english, "Korean": options.korean, "Chinese": options.chinese}
    texts = {
        language: list(first_texts(open_source([path], DataConfig()), CHARACTERS)) for language, path in paths.items()
    }
    tokenizers_by_case = {
        (language, kind): train_tokenizer(texts[language], KINDS[kind]) for language in texts for kind in KINDS
    }
    rows = [*audit_unmask(texts, tokenizers_by_case), *audit_transformers(texts, tokenizers_by_case)]
    several = collate_two_lengths(tokenizers_by_case["English", "WordPiece"])
    print(f"whole words and a batch of two lengths: {several}")
    if options.results:
        report = {
            "date": date.today().isoformat(),
            "command": "python benchmarks/audit.py --english enwiki/train.txt.gz --korean kowiki/train.txt.gz "
            "--chinese zhwiki/train.txt.gz --results benchmarks/results/audit.json",
            "machine": {"system": platform.system(), "cores": os.cpu_count(), "processor": processor_name()},
            "versions": {"unmask": unmask.__version__, **library_versions(texts, tokenizers_by_case)},
            "settings": asdict(PLAIN),
            "whole_words_in_a_batch_of_two_lengths": several,
            "audits": rows,
        }
        options.results.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def library_versions(
    texts: dict[str, list[str]], tokenizers_by_case: dict[tuple[str, str], Tokenizer]
) -> dict[str, str]:
    """Return the versions that a short audit reports."""
    tokenizer = tokenizers_by_case["English", "characters"]
    masker = MaskedLMObjective(MaskedLMConfig(), tokenizer.mask_id, tokenizer.regular_token_ids)
    short = AuditConfig(samples=64, workers=0)
    return dict(audit(masker, texts["English"][:20], tokenizer, settings=short).versions)


if __name__ == "__main__":
    main()
