"""Findings about a text before training."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from unmask.checks.doctor import Finding, finding, named, severity
from unmask.checks.doctor.scan import MIN_REPEATS, SHINGLE, SHORT, SIMILAR, TextScan, scan_text
from unmask.core.errors import TextError, TokenizerError, UnmaskError
from unmask.core.format import count, duration, size, visible
from unmask.core.types import ProgressCallback
from unmask.data.advice import (
    MANY_UNKNOWN,
    Choice,
    adapt,
    may_shrink,
    spelling_kind,
    text_facts,
    train_fitting,
    vocabulary_choice,
)
from unmask.data.inputs import kind_of
from unmask.data.readers.bytes import packing
from unmask.data.report import Report, inspect_text
from unmask.data.settings import DataConfig
from unmask.data.sources import BaseSource, open_text
from unmask.evaluation.masked_lm import unigram_losses
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.words import WordsRule, detect_words
from unmask.training.display.text import MANY_EPOCHS, epochs_text, estimate_notes
from unmask.training.estimate import CostEstimate
from unmask.training.recipe import Recipe

_CONVERSION: Final = re.compile(r"(?:(?:gzip|zstd) -dc \S+ \| )?iconv -f .+? > (?:'[^']*'|[^,\s]+)")
_NOT_UTF_8: Final = "not UTF-8"  # begins the errors of readers/bytes.py about an encoding
# Limits above which a share is a note and a problem.
_COPIES: Final = (0.005, 0.05)
_NEAR_COPIES: Final = (0.01, 0.1)
_SHORT: Final = (0.2, 0.5)
_BOILERPLATE: Final = (0.05, 0.2)
_REPLACED: Final = (0.0, 0.001)
_OTHER_SCRIPT: Final = (0.05, 1.0)
_UNKNOWN: Final = (0.001, MANY_UNKNOWN)
_RARE: Final = (0.3, 1.0)
_MIN_MISREAD: Final = 5  # sequences in one file
_MISREAD_SHARE: Final = 0.2  # of them among the characters of one file that a decoding as Latin-1 gives
_LITTLE_CHARACTERS: Final = 1_000_000
_RARE_COUNT: Final = 10  # occurrences per epoch below which an embedding learns little
_LISTED_PAIRS: Final = 100
_SEARCHED: Final = 300  # characters of a repeated line that a command searches for; a line may have a million
_SAMPLE_BATCH: Final = 1000  # texts that are encoded together


@dataclass(frozen=True)
class _Examined:
    """What is known about a text."""

    names: Sequence[str]
    settings: DataConfig
    source: BaseSource
    scan: TextScan
    report: Report
    tokenizer: Tokenizer | None
    choice: Choice | None  # of a smaller vocabulary
    counts: np.ndarray | None = None  # of each token id in the sample

    def command(self, options: str) -> str:
        """Return the command that trains on this text with further options."""
        return f"unmask pretrain {named(self.names)} {options}"


def examine_text(
    texts: Sequence[str | Path],
    recipe: Recipe,
    explicit: Collection[str] | None,
    progress: ProgressCallback,
    tokenizer: Tokenizer | None = None,
) -> list[Finding]:
    """Return the findings about a text, in a fixed order.

    Args:
        texts: names of the text, as for `unmask pretrain`.
        recipe: how the text is read, and which tokenizer is trained.
        explicit: keys that the user set; None: all of them.
        progress: called with the stage and its completed fraction.
        tokenizer: existing tokenizer; by default, one is trained on a sample.

    Raises:
        TextError: the text is missing, empty, or no text.
    """
    names, settings = [str(text) for text in texts], recipe.data
    found: list[Finding] = []
    try:
        source, settings, _ = adapt(open_text(texts, settings), settings, explicit)
        scan = scan_text(source, progress)
        found.append(_encoding_ok())
    except TextError as error:
        if not error.message.startswith(_NOT_UTF_8):
            raise
        found.append(_encoding_finding(error, names))
        if " at byte " not in error.message:  # all of it has another encoding: there is nothing to examine
            return found
        settings = replace(settings, errors="replace")
        source, settings, _ = adapt(open_text(texts, settings), settings, explicit)
        scan = scan_text(source, progress)
    choice, failed = None, None
    if tokenizer is None:
        try:
            progress("training the tokenizer on a sample", 0.0)
            tokenizer = train_fitting(
                lambda: iter(scan.sample), settings.tokenizer, shrinks=may_shrink(settings, explicit)
            )
            choice = vocabulary_choice(settings, tokenizer.size)
        except TokenizerError as error:
            failed = error
        progress("training the tokenizer on a sample", 1.0)
    lengths = [stage.max_seq_len for stage in recipe.stage]
    report = inspect_text(source, settings, lengths, progress, tokenizer=tokenizer)
    text = _Examined(names, settings, source, scan, report, tokenizer, choice)
    if tokenizer is not None:
        rule: WordsRule = detect_words("".join(scan.sample)[:1_000_000]) if settings.words == "auto" else settings.words
        text = replace(text, counts=_token_counts(scan.sample, tokenizer, rule))
    has_damage = found[0].severity != "ok"  # then U+FFFD stands for the bytes that were counted there
    found += [_misread(text), *([] if has_damage else [_replaced(text)]), _controls(text)]
    found += [_copies(text), _near_copies(text), _short(text), _boilerplate(text), _scripts(text)]
    found += _tokenizer_findings(text) if failed is None else [_untrainable(text, failed)]
    return [*found, _amount(text)]


# Characters -----------------------------------------------------------------------------------------------------------

_ENCODING_WHY: Final = "bytes in another encoding become wrong letters or U+FFFD, which the vocabulary then learns"


def _encoding_ok() -> Finding:
    return Finding("encoding", "ok", "all bytes are UTF-8", _ENCODING_WHY)


def _encoding_finding(error: TextError, names: Sequence[str]) -> Finding:
    """Return the finding for bytes that are not UTF-8; the command is the one that the error advises."""
    converts = _CONVERSION.search(error.hint)
    command = converts[0] if converts else f"unmask doctor {named(names)} --errors replace"
    return Finding("encoding", "problem", f"{error.message}; {error.location}", _ENCODING_WHY, command)


def _misread(text: _Examined) -> Finding:
    """Return the finding for UTF-8 that was decoded as Latin-1 or Windows-1252: é became two letters."""
    wrong = {
        path: each
        for path, each in text.scan.misread.items()
        if each.sequences >= _MIN_MISREAD and each.sequences > _MISREAD_SHARE * each.latin
    }
    why = "each such character is spelled by two or three wrong ones, which hides its words from the model"
    if not wrong:
        return Finding("mojibake", "ok", "no UTF-8 that was decoded as Latin-1", why)
    path, worst = max(wrong.items(), key=lambda entry: entry[1].sequences)
    total = sum(each.sequences for each in wrong.values())
    files = f"{len(wrong):,} files, most in {path}" if len(wrong) > 1 else path
    figure = f'{total:,} UTF-8 sequences decoded as Latin-1 in {files}: "{visible(worst.example)}"'
    charset = "ISO-8859-1" if worst.has_controls else "WINDOWS-1252"
    command = f"unmask data inspect {named(text.names)}"
    if _is_plain(path):
        command = f"iconv -f UTF-8 -t {charset} {shlex.quote(path)} > {shlex.quote(_renamed(path, 'fixed'))}"
    return Finding("mojibake", "problem", figure, why, command, {"sequences": total, "files": list(wrong)})


def _replaced(text: _Examined) -> Finding:
    replaced = text.report.alphabet.replaced
    share = replaced / max(1, text.report.characters)
    figure = f"{replaced:,} U+FFFD ({share:.2%} of the characters)" if replaced else "none"
    why = "U+FFFD stands for bytes that an earlier program could not decode: the letters are lost"
    command = f"unmask data inspect {named(text.names)}"
    if all(map(_is_plain, text.names)):
        command = f"grep -n $'\\uFFFD' {named(text.names)}"
    return finding(
        "replacement characters", severity(share, *_REPLACED), figure, why, command, {"count": replaced, "share": share}
    )


def _controls(text: _Examined) -> Finding:
    controls = text.report.alphabet.controls
    figure = f"{controls:,} other than tabs and line ends" if controls else "none"
    why = "control characters are remains of page layouts or of binary data, and take places in the vocabulary"
    names = text.names
    command = f"unmask data inspect {named(names)}"
    if len(names) == 1 and _is_plain(names[0]):
        target = shlex.quote(_renamed(names[0], "clean"))
        command = f"tr -d '\\000-\\010\\013-\\014\\016-\\037\\177' < {shlex.quote(names[0])} > {target}"
    return finding("control characters", severity(controls, 0, float("inf")), figure, why, command, {"count": controls})


def _is_plain(path: str) -> bool:
    return Path(path).is_file() and kind_of(path) == "text" and not packing(Path(path))


def _renamed(path: str, ending: str) -> str:
    """Return the name of a changed copy in the working folder."""
    return f"{Path(path).stem}-{ending}{Path(path).suffix}"


# Documents ------------------------------------------------------------------------------------------------------------


def _copies(text: _Examined) -> Finding:
    copies = text.report.copies
    figure = "none"
    if copies.documents:
        figure = (
            f"{copies.documents:,} documents ({copies.share:.1%}) are copies of an earlier one; the most frequent "
            f'text occurs {copies.most:,} times: "{visible(copies.example)}"'
        )
    why = "the model is trained on a text as often as it occurs, and memorizes it"
    values = {"documents": copies.documents, "share": copies.share}
    command = text.command("--set data.drop_duplicates=true")
    return finding("exact duplicates", severity(copies.share, *_COPIES), figure, why, command, values)


def _near_copies(text: _Examined) -> Finding:
    near, scan = len(text.scan.near), text.scan
    share = near / max(1, scan.documents)
    figure = f"none among {scan.compared:,} documents of 200 characters and more"
    if near:
        earlier, later = scan.near[0]
        figure = (
            f"{near:,} documents ({share:.1%}) share about {SIMILAR:.0%} of their sequences of {SHINGLE} characters "
            f'with an earlier one, such as {later:,} with {earlier:,}: "{visible(scan.example)}"'
        )
    why = "near copies on both sides of the split make the validation loss too low"
    values = {"documents": near, "share": share, "pairs": scan.near[:_LISTED_PAIRS]}
    command = f"unmask doctor {named(text.names)} --json"  # lists the pairs
    return finding("near duplicates", severity(share, *_NEAR_COPIES), figure, why, command, values)


def _short(text: _Examined) -> Finding:
    report, lengths = text.report, text.report.lengths
    share = text.scan.short / max(1, text.scan.documents)
    is_single = report.documents == 1
    figure = (
        f"{report.documents:,}; {share:.1%} have less than {SHORT} characters, median {lengths.median:,}, 80 % between "
        f"{lengths.tenth:,} and {lengths.ninetieth:,}"
    )
    why = "a prediction uses nothing outside its document: short documents give little context"
    rule = "blank-line" if text.settings.document == "line" else "file"
    if is_single:
        figure, why = "the text is a single document", "held-out text is then its end, which may differ from the rest"
        rule = "line"
    command = text.command(f"--document {rule}")
    if not any(kind_of(part.path) == "text" for part in text.source.parts()):
        command = f"unmask data inspect {named(text.names)}"  # a row is a document, whatever the rule
    values = {"documents": report.documents, "short": share, "median": lengths.median}
    return finding("documents", "note" if is_single else severity(share, *_SHORT), figure, why, command, values)


def _boilerplate(text: _Examined) -> Finding:
    scan = text.scan
    share = scan.repeated_characters / max(1, scan.line_characters)
    line, documents, path = scan.most_repeated
    figure = f"no line of 30 characters occurs in {MIN_REPEATS} documents"
    if scan.repeated_lines:
        figure = (
            f"{share:.1%} of the characters are lines that {MIN_REPEATS} documents and more contain; the most frequent "
            f'in {documents:,}: "{visible(line[:60])}"'
        )
    why = "headers, footers and licenses teach one sentence many times"
    command = f"unmask data inspect {named(text.names)}"
    if line and _is_plain(path):
        target = shlex.quote(_renamed(path, "clean"))
        command = f"grep -vF -- {shlex.quote(line[:_SEARCHED])} {shlex.quote(path)} > {target}"
    values = {"share": share, "lines": scan.repeated_lines, "line": line[:_SEARCHED], "documents": documents}
    return finding("repeated lines", severity(share, *_BOILERPLATE), figure, why, command, values)


def _scripts(text: _Examined) -> Finding:
    scripts = text.scan.scripts
    total = max(1, scripts.total())
    main, *others = [name for name, _ in scripts.most_common()] or [""]
    share = sum(scripts[name] for name in others) / total
    shown = [f"{name.title()} {scripts[name] / total:.1%}" for name in (main, *others[:3]) if name]
    figure = ("documents by script: " + ", ".join(shown)) if shown else "no letters"
    why = "languages in several scripts share one vocabulary and one loss: validate each of them, or train on one"
    command = f"unmask data inspect {named(text.names)} --json"
    values = {"documents": {name: scripts[name] for name, _ in scripts.most_common()}, "share": share}
    return finding("scripts", severity(share, *_OTHER_SCRIPT), figure, why, command, values)


# Tokens ---------------------------------------------------------------------------------------------------------------


def _untrainable(text: _Examined, error: TokenizerError) -> Finding:
    why = "without a tokenizer, there is no run"
    command = text.command("--set data.tokenizer.kind=bpe")
    return Finding("vocabulary", "problem", f"no tokenizer: {error.message}", why, command)


def _token_counts(sample: Sequence[str], tokenizer: Tokenizer, rule: WordsRule) -> np.ndarray:
    """Return the occurrences of each token id in the sample."""
    counts = np.zeros(tokenizer.size, dtype=np.int64)
    for first in range(0, len(sample), _SAMPLE_BATCH):
        for encoded in tokenizer.encode_batch(sample[first : first + _SAMPLE_BATCH], rule):
            counts += np.bincount(encoded.ids, minlength=tokenizer.size)
    return counts


def _tokenizer_findings(text: _Examined) -> Iterator[Finding]:
    """Yield the findings about unknown characters, the vocabulary and the unigram line."""
    tokenizer, counts, seen = text.tokenizer, text.counts, text.report.tokenizer
    assert tokenizer is not None and counts is not None and seen is not None
    kind = text.settings.tokenizer.kind
    share = seen.unknown_share
    fix = text.command(f"--set data.tokenizer.kind={spelling_kind(text_facts(text.source), kind)}")
    figure = f"{share:.2%} of the characters are [UNK]"
    why = "unknown characters are never predicted and give no context"
    yield finding("unknown characters", severity(share, *_UNKNOWN), figure, why, fix, {"share": share})
    yield _vocabulary(text, tokenizer, counts)
    ids = tokenizer.regular_token_ids
    shares = counts[ids] / max(1, int(counts[ids].sum()))
    unigram = float((shares * unigram_losses(counts, tokenizer)[ids]).sum())
    figure = f"{unigram:.2f} nats per token"
    why = "a model that predicts frequencies only has this loss; context begins below it"
    yield Finding("unigram line", "ok", figure, why, values={"nats": unigram})


def _vocabulary(text: _Examined, tokenizer: Tokenizer, counts: np.ndarray) -> Finding:
    """Return the finding about tokens that are too rare to be learned."""
    sampled = max(1, sum(map(len, text.scan.sample)))
    seen = counts[tokenizer.regular_token_ids] * (text.report.characters / sampled)
    frequent = int((seen >= _RARE_COUNT).sum())
    rare = int(((seen > 0) & (seen < _RARE_COUNT)).sum()) / max(1, len(seen))  # others only lead to longer tokens
    rate = text.report.tokenizer.characters_per_token if text.report.tokenizer else float("nan")
    figure = (
        f"{tokenizer.size:,} tokens of {rate:.2f} characters; {rare:.0%} of them occur 1 to {_RARE_COUNT - 1} times"
    )
    if text.choice is not None:
        figure += f"; {text.choice.what}, because {text.choice.reason}"
    why = "the embedding of a rare token stays close to random, and costs as much as that of a frequent one"
    values: dict[str, Any] = {"tokens": tokenizer.size, "rare": rare, "frequent": frequent}
    is_sized = hasattr(text.settings.tokenizer, "vocab_size")
    level = severity(rare, *_RARE) if is_sized else "ok"
    return finding("vocabulary", level, figure, why, _smaller_vocabulary(text, frequent), values)


def _smaller_vocabulary(text: _Examined, frequent: int) -> str:
    rounded = max(100, round(frequent, 1 - len(str(frequent))))
    return text.command(f"--set data.tokenizer.vocab_size={rounded}")


def _amount(text: _Examined) -> Finding:
    report = text.report
    figure = f"{report.characters:,} characters ({size(report.bytes)})"
    if report.stages:
        figure += f", {count(report.stages[0].epoch_tokens)} tokens per epoch"
    why = "a model of any size overfits less than a million characters within some dozens of epochs"
    level = "note" if report.characters < _LITTLE_CHARACTERS else "ok"
    command = text.command("--set train.early_stopping_patience=3")
    return finding("amount", level, figure, why, command, {"characters": report.characters})


# Budget ---------------------------------------------------------------------------------------------------------------


_BUDGET_WHY: Final = "less than one epoch leaves text unused, and dozens of epochs memorize it"


def budget_finding(estimate: CostEstimate, names: Sequence[str]) -> Finding:
    """Return what a budget reaches, from the estimate of a dry run."""
    plan, epochs = estimate.plan, sum(estimate.epochs)
    time = f"about {duration(plan.seconds)}" if plan.seconds else "time not measured"
    figure = (
        f"{plan.steps:,} steps, {count(plan.tokens)} tokens, {epochs_text(epochs)}; {count(estimate.parameters)} "
        f"parameters; {time}, {size(estimate.memory_bytes)} of memory"
    )
    notes = [note for note in estimate_notes(estimate) if not note.startswith("epochs by text")]
    budget = "1 epoch" if epochs < 1 else f"{MANY_EPOCHS // 2} epochs"
    values = {"steps": plan.steps, "tokens": plan.tokens, "epochs": epochs, "parameters": estimate.parameters,
              "seconds": plan.seconds, "notes": notes}  # fmt: skip
    level = "problem" if epochs > MANY_EPOCHS else "note" if notes else "ok"
    return finding("budget", level, figure, _BUDGET_WHY, f'unmask pretrain {named(names)} --budget "{budget}"', values)


def refused_finding(error: UnmaskError, names: Sequence[str], budget: str) -> Finding:
    """Return the finding that no run can start with a budget; the command prints the reason with its hint."""
    command = f'unmask pretrain {named(names)} --budget "{budget}" --dry-run'
    return Finding("budget", "problem", f"no run starts: {error.message}", error.hint or _BUDGET_WHY, command)
