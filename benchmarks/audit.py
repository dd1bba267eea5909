r"""What `unmask audit` finds: our own masking, and the collators of the installed `transformers`.

Ours by every `mask_unit`, on three kinds of tokenizer and the texts of three languages; `DataCollatorForLanguageModeling`
plain, seeded and with whole words, on tokenizers as they are commonly made. Every number is the same in each run.

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
from unmask.checks.audit.maskers import ObjectiveMasker, claims_of_settings, fast_tokenizer, library_collator
from unmask.checks.audit.settings import AuditConfig
from unmask.core.hardware import processor_name
from unmask.data.settings import DataConfig
from unmask.data.sources import open_source
from unmask.objectives.mlm import MaskedLMConfig, MaskedLMObjective
from unmask.tokenization.analysis import some_text
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
    """The same vocabulary as RobertaTokenizer sets it up: offsets without the space before a word."""
    from transformers import RobertaTokenizer

    model = json.loads(tokenizer.to_json())["model"]
    merges = [tuple(one.split(" ")) if isinstance(one, str) else tuple(one) for one in model["merges"]]
    named = ("[CLS]", "[SEP]", "[SEP]", "[CLS]", "[UNK]", "[PAD]", "[MASK]")
    roles = ("bos_token", "eos_token", "sep_token", "cls_token", "unk_token", "pad_token", "mask_token")
    made = RobertaTokenizer(vocab=model["vocab"], merges=merges, **dict(zip(roles, named, strict=True)))
    inner: tokenizers.Tokenizer = made.backend_tokenizer
    return Tokenizer(tokenizers.Tokenizer.from_str(inner.to_str()))


def ours(texts: dict[str, list[str]], made: dict[tuple[str, str], Tokenizer]) -> Iterator[dict[str, Any]]:
    for (language, kind), tokenizer in made.items():
        for choose in ("token", "whole-word", "span", "ngram"):
            settings = MaskedLMConfig(mask_unit=choose)
            objective = MaskedLMObjective(settings, tokenizer.mask_id, tokenizer.regular_token_ids)
            masker = ObjectiveMasker(objective, 17, f"unmask, mask_unit = {choose}", claims_of_settings(settings))
            yield told(masker, texts[language], tokenizer, (language, kind))


def theirs(texts: dict[str, list[str]], made: dict[tuple[str, str], Tokenizer]) -> Iterator[dict[str, Any]]:
    english = made["English", "WordPiece"]
    for variant, settings in (
        ("transformers", PLAIN),
        ("transformers", replace(PLAIN, seeds="alike")),
        ("transformers:seeded", replace(PLAIN, workers=0)),
        ("transformers:seeded", PLAIN),
    ):
        collator = library_collator(variant, english, 0)
        yield told(collator, texts["English"], english, ("English", "WordPiece"), settings)
    words = {
        ("English", "WordPiece"): english,
        ("English", "byte-level BPE"): made["English", "byte-level BPE"],
        ("English", "byte-level BPE as RobertaTokenizer"): as_roberta(made["English", "byte-level BPE"]),
        ("Korean", "WordPiece"): made["Korean", "WordPiece"],
        ("Chinese", "WordPiece"): made["Chinese", "WordPiece"],
    }
    for (language, kind), tokenizer in words.items():
        collator = library_collator("transformers:whole-word", tokenizer, 0)
        yield told(collator, texts[language], tokenizer, (language, kind))


def told(
    masker: Any, texts: list[str], tokenizer: Tokenizer, of: tuple[str, str], settings: AuditConfig = PLAIN
) -> dict[str, Any]:
    """An audit, a line of it printed, as a row of the results."""
    began = time.perf_counter()
    report = audit(masker, texts, tokenizer, settings=settings)
    seconds = round(time.perf_counter() - began, 1)
    language, kind = of
    print(f"{report.masker:<26} {language:<8} {kind:<36} {', '.join(report.found) or 'all is well'} ({seconds} s)")
    for finding in report.findings:
        if finding.verdict == "found":
            print(f"    {finding.name}: {finding.says}")
    return {
        "masker": report.masker,
        "language": language,
        "tokenizer": kind,
        "pieces": report.pieces,
        "words": report.words,
        "workers": settings.workers,
        "seeds": settings.seeds,
        "asked": report.asked,
        "found": list(report.found),
        "false_alarm": report.false_alarm,
        "notes": list(report.notes),
        "seconds": seconds,
        "findings": {finding.name: f"{finding.verdict}: {finding.says}" for finding in report.findings},
    }


def of_several_lengths(tokenizer: Tokenizer) -> str:
    """What the whole-word collator says to a batch of two lengths."""
    collator = library_collator("transformers:whole-word", tokenizer, 0).collator
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
    named = {"English": options.english, "Korean": options.korean, "Chinese": options.chinese}
    texts = {
        language: list(some_text(open_source([path], DataConfig()), CHARACTERS)) for language, path in named.items()
    }
    made = {(language, kind): train_tokenizer(texts[language], KINDS[kind]) for language in texts for kind in KINDS}
    rows = [*ours(texts, made), *theirs(texts, made)]
    several = of_several_lengths(made["English", "WordPiece"])
    print(f"whole words and a batch of two lengths: {several}")
    if options.results:
        report = {
            "date": date.today().isoformat(),
            "command": "python benchmarks/audit.py --english enwiki/train.txt.gz --korean kowiki/train.txt.gz "
            "--chinese zhwiki/train.txt.gz --results benchmarks/results/audit.json",
            "machine": {"system": platform.system(), "cores": os.cpu_count(), "processor": processor_name()},
            "versions": {"unmask": unmask.__version__, **rows_versions(texts, made)},
            "settings": asdict(PLAIN),
            "whole_words_in_a_batch_of_two_lengths": several,
            "audits": rows,
        }
        options.results.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def rows_versions(texts: dict[str, list[str]], made: dict[tuple[str, str], Tokenizer]) -> dict[str, str]:
    """The versions that one more, short audit tells."""
    tokenizer = made["English", "characters"]
    masker = MaskedLMObjective(MaskedLMConfig(), tokenizer.mask_id, tokenizer.regular_token_ids)
    short = AuditConfig(samples=64, workers=0)
    return dict(audit(masker, texts["English"][:20], tokenizer, settings=short).versions)


if __name__ == "__main__":
    main()
