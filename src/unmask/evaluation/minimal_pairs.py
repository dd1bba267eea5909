"""Accuracy on minimal pairs: does a model find the acceptable sentence more probable than the unacceptable one?

Pairs are read in the format of BLiMP (Warstadt et al. 2020): JSON lines with `sentence_good` and `sentence_bad`, or
two columns of a TSV file. A paradigm is a set of pairs with one contrast; several paradigms form a field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np
from numpy.typing import NDArray

from unmask.core.distributed import DistributedContext, init_distributed
from unmask.core.errors import RecipeError, TextError
from unmask.core.types import ProgressCallback
from unmask.evaluation.scoring import METHODS, Method, encode, score_tokens
from unmask.models.model import Model

TIE_NATS: Final = 1e-4  # rounding of float32: scores of two texts that differ by less are a tie
_Z: Final = 1.959964  # 95 % of a normal distribution
_GOOD, _BAD = "sentence_good", "sentence_bad"
_LONGEST_LINE: Final = 1 << 20  # bytes
_MOST_PAIRS: Final = 1_000_000
_SUFFIXES: Final = (".jsonl", ".tsv")
PairErrors = Literal["strict", "skip"]


@dataclass(frozen=True)
class MinimalPair:
    """Two sentences, of which the first is acceptable and the second is not."""

    good: str
    bad: str
    paradigm: str  # BLiMP's UID; without one, the name of the file
    field: str = ""  # BLiMP's field, e.g. "morphology"


@dataclass(frozen=True)
class PairAccuracy:
    """Accuracy on a set of pairs; a tie counts one half."""

    accuracy: float
    interval: tuple[float, float]  # 95 %, of drawing other pairs of the same kind; not of other runs
    pairs: int
    ties: int


@dataclass(frozen=True)
class PairScores:
    """The two scores of a pair in nats, by one method."""

    pair: MinimalPair
    good: float
    bad: float
    # whether they can't be compared: they have different numbers of [UNK], or one has no token to score
    is_unknown: bool = False

    @property
    def difference(self) -> float:
        """Nats by which the acceptable sentence is more probable; 0 for a tie."""
        difference = self.good - self.bad
        return 0.0 if self.is_unknown or abs(difference) <= TIE_NATS else difference


@dataclass(frozen=True)
class MethodResult:
    """Accuracies by one method."""

    overall: PairAccuracy  # mean over paradigms
    fields: Mapping[str, PairAccuracy]  # mean over the paradigms of a field; empty if the pairs have no fields
    paradigms: Mapping[str, PairAccuracy]
    scores: tuple[PairScores, ...] = field(repr=False)  # of all pairs, in their order


@dataclass(frozen=True)
class MinimalPairsResult:
    """Accuracies on minimal pairs."""

    pairs: int
    paradigms: int
    unknown: int  # pairs that can't be compared, as in `PairScores.is_unknown`; they count as ties
    length_accuracy: float  # accuracy of a model for which all tokens are equally probable: fewer tokens win
    methods: Mapping[Method, MethodResult]
    left_out: int = 0  # lines of the files that aren't pairs

    def __repr__(self) -> str:
        """Return the overall accuracy by each method, one per line."""
        lines = [
            f"  {name}: {one.accuracy:.1%} ({one.interval[0]:.0%} to {one.interval[1]:.0%}), {one.ties:,} ties"
            for name, one in ((name, each.overall) for name, each in self.methods.items())
        ]
        return "\n".join([f"MinimalPairsResult({self.pairs:,} pairs of {self.paradigms:,} paradigms", *lines]) + ")"

    def summary(self) -> dict[str, Any]:
        """Return the accuracies without the scores of single pairs, as plain values."""
        return {
            "pairs": self.pairs,
            "paradigms": self.paradigms,
            "unknown": self.unknown,
            "length_accuracy": self.length_accuracy,
            "left_out": self.left_out,
            "methods": {
                name: {
                    "overall": vars(result.overall),
                    "fields": {each: vars(accuracy) for each, accuracy in result.fields.items()},
                    "paradigms": {each: vars(accuracy) for each, accuracy in result.paradigms.items()},
                }
                for name, result in self.methods.items()
            },
        }


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MinimalPairs:
    """Minimal pairs, and the number of lines that were left out because they aren't pairs."""

    pairs: tuple[MinimalPair, ...]
    left_out: int = 0


def read_pairs(path: Path, subset: int | None = None, errors: PairErrors = "strict") -> MinimalPairs:
    """Return the pairs of a .jsonl or .tsv file, or of all such files of a directory, sorted by name.

    A line of a .jsonl file needs `sentence_good` and `sentence_bad`; `UID` and `field` are optional. A line of a .tsv
    file has the acceptable sentence, a tab, and the other one.

    Args:
        path: File or directory.
        subset: Number of pairs of each paradigm, evenly spaced; None: all.
        errors: What to do with malformed lines and equal sentences, of which BLiMP has some: "strict" raises an error,
            "skip" leaves them out.

    Raises:
        TextError: there are no pairs, or a line is malformed or has two equal sentences; file and line are named.
        RecipeError: `subset` is below 1.
    """
    _check_subset(subset)
    pairs, left_out = list[MinimalPair](), 0
    for file in _files(path):
        before, left_out_before = len(pairs), left_out
        for line in _read_file(file):
            if isinstance(line, MinimalPair):
                pairs.append(line)
            elif errors == "strict":
                raise line
            else:
                left_out += 1
            if len(pairs) > _MOST_PAIRS:
                raise TextError(
                    f"there are more than {_MOST_PAIRS:,} pairs", location=str(path), hint="split them into directories"
                )
        if len(pairs) == before:
            skipped = left_out - left_out_before
            raise TextError(
                "the file has no minimal pairs" + (f": {skipped:,} malformed lines were left out" if skipped else ""),
                location=str(file),
                hint="read what is wrong with them: --errors strict" if skipped else "remove it, or add pairs",
            )
    return MinimalPairs(tuple(pairs if subset is None else take_subset(pairs, subset)), left_out)


def _check_subset(subset: int | None) -> None:
    if subset is not None and subset < 1:
        raise RecipeError(
            f"invalid number of pairs of each paradigm: got {subset}, expected at least 1",
            location=f"--subset {subset}",
            hint="choose a number such as 50",
        )


def take_subset(pairs: Sequence[MinimalPair], subset: int) -> list[MinimalPair]:
    """Return at most `subset` pairs of each paradigm, evenly spaced."""
    kept = set[int]()
    for numbers in _by(pairs, lambda pair: pair.paradigm).values():
        count = min(subset, len(numbers))
        kept |= {numbers[each * len(numbers) // count] for each in range(count)}
    return [pair for number, pair in enumerate(pairs) if number in kept]


def _by(pairs: Sequence[MinimalPair], key: Callable[[MinimalPair], str]) -> dict[str, list[int]]:
    """Return the numbers of the pairs for each value of a key, in order of appearance."""
    groups: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        groups.setdefault(key(pair), []).append(number)
    return groups


def _files(path: Path) -> list[Path]:
    hint = f"name a directory with BLiMP's files, or one file that ends with {' or '.join(_SUFFIXES)}"
    try:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
            if not found:
                raise TextError("the directory has no minimal pairs", location=str(path), hint=hint)
            return found
        is_file = path.is_file()
    except OSError as error:
        raise TextError(f"can't read: {error.strerror}", location=str(path), hint="check the path") from error
    if not is_file:
        raise TextError("the path doesn't exist", location=str(path), hint=hint)
    if path.suffix not in _SUFFIXES:
        raise TextError(f"unknown format `{path.suffix}` of minimal pairs", location=str(path), hint=hint)
    return [path]


def _read_file(file: Path) -> Iterator[MinimalPair | TextError]:
    """Yield the pairs of a file, and an error for each line that isn't a pair."""
    parse = _parse_json if file.suffix == ".jsonl" else _parse_tsv
    for number, line in enumerate(_lines(file), start=1):
        if isinstance(line, TextError):
            yield line
            continue
        if not line.strip() or (number == 1 and line.split("\t") == [_GOOD, _BAD]):
            continue
        location = f"{file}, line {number}"
        try:
            pair = parse(line, file.stem, location)
        except TextError as error:
            yield error
            continue
        if pair.good == pair.bad:
            yield TextError(
                f"the two sentences are identical: {pair.good[:60]!r}",
                location=location,
                hint="remove this pair, or leave such pairs out: --errors skip",
            )
        else:
            yield pair


def _lines(file: Path) -> Iterator[str | TextError]:
    """Yield the lines of a file without their ends, and an error for each line that is too long or not UTF-8."""
    number = 0
    try:
        with file.open("rb") as stream:
            while line := stream.readline(_LONGEST_LINE + 1):
                number += 1
                where = f"{file}, line {number}"
                if len(line) > _LONGEST_LINE:
                    while not line.endswith(b"\n") and (line := stream.readline(_LONGEST_LINE)):
                        pass
                    text = f"the line has more than {_LONGEST_LINE:,} bytes"
                    yield TextError(text, location=where, hint="break the line")
                    continue
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError:
                    yield TextError("text is not UTF-8", location=where, hint="convert it: iconv -t UTF-8")
    except OSError as error:
        raise TextError(f"can't read: {error.strerror}", location=str(file), hint="check the path") from error


def _parse_json(line: str, stem: str, location: str) -> MinimalPair:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TextError("the line is not JSON", location=location, hint="write one JSON object per line") from error
    if not isinstance(row, dict):
        raise TextError("the line is not a JSON object", location=location, hint="write one JSON object per line")
    fields = cast("dict[str, Any]", row)
    for key in (_GOOD, _BAD):
        if key not in fields:
            raise TextError(
                f"the pair has no `{key}`",
                location=location,
                hint=f"give {_GOOD} and {_BAD}; this line has {', '.join(map(str, fields)) or 'no keys'}",
            )
        if not isinstance(fields[key], str) or not fields[key].strip():
            raise TextError(
                f"invalid {key}: got {fields[key]!r:.60}, expected a sentence", location=location, hint="write a text"
            )
    try:
        "".join(value for value in fields.values() if isinstance(value, str)).encode()
    except UnicodeEncodeError as error:
        raise TextError(f"invalid character: {error}", location=location, hint="correct it") from error
    paradigm, name = fields.get("UID"), fields.get("field")
    return MinimalPair(
        fields[_GOOD],
        fields[_BAD],
        paradigm if isinstance(paradigm, str) and paradigm else stem,
        name.replace("/", "_") if isinstance(name, str) else "",  # BLiMP has syntax/semantics and syntax_semantics
    )


def _parse_tsv(line: str, stem: str, location: str) -> MinimalPair:
    cells = line.split("\t")
    if len(cells) != 2 or not all(cell.strip() for cell in cells):
        raise TextError(
            f"the line has {len(cells)} columns, expected two sentences separated by a tab"
            if len(cells) != 2
            else "a sentence is empty",
            location=location,
            hint="write the acceptable sentence, a tab, and the other sentence",
        )
    return MinimalPair(cells[0], cells[1], stem)


def to_jsonl(pairs: Sequence[MinimalPair]) -> str:
    """Return pairs as JSON lines, which `read_pairs` reads."""
    rows = ({_GOOD: pair.good, _BAD: pair.bad, "field": pair.field, "UID": pair.paradigm} for pair in pairs)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# Scoring --------------------------------------------------------------------------------------------------------------


def evaluate_minimal_pairs(
    model: Model,
    pairs: str | Path | MinimalPairs | Sequence[MinimalPair | Sequence[str]],
    method: Method | Literal["both"] = "both",
    *,
    subset: int | None = None,
    errors: PairErrors = "strict",
    context: DistributedContext | None = None,
    on_progress: ProgressCallback | None = None,
) -> MinimalPairsResult:
    """Return the accuracy of a model on minimal pairs, by one or both pseudo-log-likelihoods.

    The sentence with the higher pseudo-log-likelihood is the model's answer. Each sentence is scored once, and what the
    two methods have in common is computed once. The sentences are distributed over the ranks. The overall accuracy is
    the mean over paradigms, as in BLiMP.

    Args:
        model: Model to use, as returned by `unmask.load`.
        pairs: Path of a .jsonl or .tsv file or of a directory of them, or a list of pairs: the acceptable sentence and
            the other one.
        method: Pseudo-log-likelihood that judges the pairs, as in `unmask.score`.
        subset: Number of pairs of each paradigm, evenly spaced; None: all.
        errors: "strict" refuses malformed lines and equal sentences of a file, "skip" leaves them out and counts them.
        context: Device to compute on; default: as chosen for training.
        on_progress: Called with a name and the fraction that is done.

    Raises:
        TextError: there are no pairs, or one is malformed or has two equal sentences.
        RecipeError: `subset` is below 1.
        ModelError: as for `unmask.score`.
    """
    found = _as_pairs(pairs, subset, errors)
    methods: tuple[Method, ...] = METHODS if method == "both" else (method,)
    return _evaluate(model, found, methods, context or init_distributed("float32"), on_progress)


def _as_pairs(
    pairs: str | Path | MinimalPairs | Sequence[MinimalPair | Sequence[str]], subset: int | None, errors: PairErrors
) -> MinimalPairs:
    """Return pairs that are given as a path, or as a list.

    Raises:
        TextError: as for `evaluate_minimal_pairs`.
        RecipeError: `subset` is below 1.
    """
    if isinstance(pairs, str | Path):
        return read_pairs(Path(pairs), subset, errors)
    _check_subset(subset)
    if isinstance(pairs, MinimalPairs):
        return pairs if subset is None else replace(pairs, pairs=tuple(take_subset(pairs.pairs, subset)))
    listed = [
        pair if isinstance(pair, MinimalPair) else _pair_of(pair, number) for number, pair in enumerate(pairs, start=1)
    ]
    if not listed:
        raise TextError("there are no minimal pairs", location="pairs", hint="give at least one pair")
    return MinimalPairs(tuple(listed if subset is None else take_subset(listed, subset)))


def _pair_of(sentences: Sequence[str], number: int) -> MinimalPair:
    if len(sentences) != 2 or not all(each.strip() for each in sentences) or sentences[0] == sentences[1]:
        raise TextError(
            f"invalid pair: got {list(sentences)!r:.120}, expected two sentences that differ",
            location=f"pair {number}",
            hint="give the acceptable sentence, then the other one",
        )
    return MinimalPair(*sentences, paradigm="pairs")


def _evaluate(
    model: Model,
    given: MinimalPairs,
    methods: Sequence[Method],
    context: DistributedContext,
    on_progress: ProgressCallback | None,
) -> MinimalPairsResult:
    pairs = given.pairs
    sentences = list(dict.fromkeys(sentence for pair in pairs for sentence in (pair.good, pair.bad)))
    number_of = {sentence: number for number, sentence in enumerate(sentences)}
    encoded = [*encode(model, sentences)]
    mine = range(context.rank, len(sentences), context.ranks)
    found = score_tokens(model, [encoded[number] for number in mine], methods, context, on_progress)
    unknown = np.array([int((~each.is_scored).sum()) for each in encoded])
    tokens = np.array([int(each.is_scored.sum()) for each in encoded])
    good = np.array([number_of[pair.good] for pair in pairs])
    bad = np.array([number_of[pair.bad] for pair in pairs])
    # A sentence without a token, of characters that the tokenizer drops, would win with a probability of 1.
    is_unknown = ((unknown[good] != unknown[bad]) | ((tokens[good] == 0) != (tokens[bad] == 0))).tolist()

    def result_of(nats: NDArray[np.float64]) -> MethodResult:
        columns = zip(pairs, nats[good].tolist(), nats[bad].tolist(), is_unknown, strict=True)
        return _result([PairScores(*row) for row in columns])

    results: dict[Method, MethodResult] = {}
    for method in methods:
        nats = np.zeros(len(sentences))
        nats[mine] = [float(by_method[method].sum()) for by_method in found]
        results[method] = result_of(np.array(context.sum(nats.tolist())))
    return MinimalPairsResult(
        pairs=len(pairs),
        paradigms=len(results[methods[0]].paradigms),
        unknown=sum(is_unknown),
        length_accuracy=result_of(-tokens.astype(np.float64)).overall.accuracy,
        methods=results,
        left_out=given.left_out,
    )


def _result(scores: Sequence[PairScores]) -> MethodResult:
    pairs = [score.pair for score in scores]
    paradigms = {
        name: _accuracy([scores[number].difference for number in numbers])
        for name, numbers in _by(pairs, lambda pair: pair.paradigm).items()
    }
    field_of = {pair.paradigm: pair.field for pair in reversed(pairs)}
    fields = {
        name: _mean([accuracy for paradigm, accuracy in paradigms.items() if field_of[paradigm] == name])
        for name in sorted({name for name in field_of.values() if name})
    }
    return MethodResult(_mean(list(paradigms.values())), fields, paradigms, tuple(scores))


def _accuracy(differences: Sequence[float]) -> PairAccuracy:
    ties = sum(difference == 0 for difference in differences)
    correct = sum(difference > 0 for difference in differences) + ties / 2
    count = len(differences)
    return PairAccuracy(correct / count, wilson(correct / count, count), count, ties)


def _mean(parts: Sequence[PairAccuracy]) -> PairAccuracy:
    """Return the mean over paradigms.

    Its interval is that of as many pairs as give a mean over paradigms the same variance: all of them if the paradigms
    have equal sizes, fewer otherwise.
    """
    accuracy = sum(part.accuracy for part in parts) / len(parts)
    effective = len(parts) ** 2 / sum(1 / part.pairs for part in parts)
    return PairAccuracy(
        accuracy, wilson(accuracy, effective), sum(part.pairs for part in parts), sum(part.ties for part in parts)
    )


def wilson(fraction: float, count: float) -> tuple[float, float]:
    """Return the 95 % interval of a fraction of `count` observations (Wilson 1927)."""
    squared = _Z * _Z
    center = (fraction + squared / (2 * count)) / (1 + squared / count)
    half = _Z / (1 + squared / count) * math.sqrt(fraction * (1 - fraction) / count + squared / (4 * count * count))
    return max(0.0, center - half), min(1.0, center + half)


# Predictions ----------------------------------------------------------------------------------------------------------


def predictions(result: MethodResult) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return the sentence that the model prefers in each pair, in the format of the BabyLM evaluation.

    A tie has an empty prediction, which that evaluation counts as wrong. The scores are added to each entry.
    """
    listed: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for score in result.scores:
        of_paradigm = listed.setdefault(score.pair.paradigm, {"predictions": []})["predictions"]
        preferred = score.pair.good if score.difference > 0 else score.pair.bad if score.difference < 0 else ""
        of_paradigm.append(
            {
                "id": f"{score.pair.paradigm}_{len(of_paradigm)}",
                "pred": preferred,
                "log_probability_good": score.good,
                "log_probability_bad": score.bad,
            }
        )
    return listed
