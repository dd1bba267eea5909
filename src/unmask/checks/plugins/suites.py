"""The requirements for objectives, samplers, sources and loggers, one function each."""

from __future__ import annotations

import copy
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import nn

from unmask.checks.plugins.fixtures import (
    EPOCHS,
    LOG_LINES,
    MAX_SAMPLES,
    Check,
    CheckFailed,
    LoggerFixture,
    ObjectiveFixture,
    SamplerFixture,
    SourceFixture,
    check,
    generator_states,
    is_a,
    require,
    require_no_draw,
)
from unmask.core.files import file_digest
from unmask.core.types import SPECIAL, DocumentChunk, MaskedBatch, SampleSpec, Source, SourceShard, pack

_USE_RNG: Final = "use unmask.core.rng, whose draws have no state"

# Objectives ---------------------------------------------------------------------------------------------------------

OBJECTIVE_CHECKS: Final[list[Check[ObjectiveFixture]]] = []
_PER_POSITION: Final = ("positions_M", "labels_M")
_OPTIONAL: Final = ("weights_M", "draws_M")  # also per position
_TOLERANCE: Final = 1e-4  # relative: the last digits of a float32 sum depend on the batch


def _difference(one: MaskedBatch, other: MaskedBatch) -> str:
    """Return the name of a field in which two masked batches differ, or ""."""
    if not torch.equal(one.batch.ids_T, other.batch.ids_T):
        return "batch.ids_T"
    for name in _PER_POSITION:
        if not torch.equal(getattr(one, name), getattr(other, name)):
            return name
    for name in _OPTIONAL:
        values = getattr(one, name), getattr(other, name)
        if (values[0] is None) != (values[1] is None) or (values[0] is not None and not torch.equal(*values)):
            return name
    is_equal = dict(one.denominators) == dict(other.denominators) and one.num_maskable == other.num_maskable
    return "" if is_equal else "denominators"


def _of_sample(masked: MaskedBatch, sample: int) -> dict[str, list[Any]]:
    """Return the part of a masked batch that belongs to one sample, with positions within the sample."""
    first, last = masked.batch.offsets[sample], masked.batch.offsets[sample + 1]
    inside_M = (masked.positions_M >= first) & (masked.positions_M < last)
    names = (*_PER_POSITION, *(name for name in _OPTIONAL if getattr(masked, name) is not None))
    fields = {name: getattr(masked, name)[inside_M].tolist() for name in names}
    fields["positions_M"] = [position - first for position in fields["positions_M"]]
    return {"ids_T": masked.batch.ids_T[first:last].tolist(), **fields}


@check(OBJECTIVE_CHECKS)
def attributes_are_valid(fixture: ObjectiveFixture) -> None:
    """`loss_weights`, `metrics`, `sampler` and `modules` have valid values."""
    objective = fixture.objective
    weights = dict(objective.loss_weights)
    require(bool(weights), "`loss_weights` is empty: add a term, as in {'mlm': 1.0}")
    require(
        all(math.isfinite(weight) and weight > 0 for weight in weights.values()),
        f"invalid `loss_weights`: got {weights}, expected positive numbers",
    )
    require("loss" in objective.metrics, f'`metrics` lacks "loss", which the display shows: {objective.metrics}')
    require(is_a(objective.modules, nn.Module), "`modules` is not a torch.nn.Module; use nn.Module() if it has none")
    known = ("windows", "next-sentence", "sentence-order")
    require(
        objective.sampler in known, f"invalid `sampler`: got {objective.sampler!r}, expected one of {', '.join(known)}"
    )


@check(OBJECTIVE_CHECKS)
def corrupt_is_pure(fixture: ObjectiveFixture) -> None:
    """The same batch and seed give the same masked batch; the input is unchanged and no random generator is used."""
    batch, before = fixture.batch(), generator_states()
    ids_T = batch.ids_T.clone()
    first = fixture.objective.corrupt(batch, fixture.seed)
    require(torch.equal(batch.ids_T, ids_T), "the ids of the batch were changed in place: change a clone")
    require_no_draw(before, _USE_RNG)
    fixture.objective.corrupt(pack(fixture.samples[-1:]), fixture.seed + 1)  # reveals state kept between calls
    name = _difference(first, fixture.objective.corrupt(fixture.batch(), fixture.seed))
    require(not name, f"the same batch and seed gave another `{name}` the second time")
    late = replace(fixture.batch(), progress=0.75)
    first = fixture.objective.corrupt(late, fixture.seed)
    fixture.masked()  # at progress 0
    name = _difference(first, fixture.objective.corrupt(late, fixture.seed))
    require(not name, f"the same batch, seed and progress gave another `{name}` the second time")


@check(OBJECTIVE_CHECKS)
def masks_do_not_depend_on_the_batch(fixture: ObjectiveFixture) -> None:
    """A sample is masked in the same way alone, among other samples and in another order."""
    masked = fixture.masked()
    reverse = fixture.objective.corrupt(pack(list(reversed(fixture.samples))), fixture.seed)
    for number, sample in enumerate(fixture.samples):
        alone = _of_sample(fixture.objective.corrupt(pack([sample]), fixture.seed), 0)
        others = ("among others", _of_sample(masked, number)), ("in another order", _of_sample(reverse, -2 - number))
        for how, fields in others:
            names = [name for name in alone if alone[name] != fields[name]]
            require(not names, f"sample {number}: `{', '.join(names)}` alone differs from `{', '.join(names)}` {how}")


@check(OBJECTIVE_CHECKS)
def some_tokens_are_masked(fixture: ObjectiveFixture) -> None:
    """Some tokens of ordinary text are masked."""
    tokens = fixture.batch().tokens
    require(
        len(fixture.masked().positions_M) > 0, f"no token is masked in {len(fixture.samples)} samples, {tokens} tokens"
    )


@check(OBJECTIVE_CHECKS)
def positions_ascend(fixture: ObjectiveFixture) -> None:
    """`positions_M` is int64, ascending, without duplicates and within the batch."""
    batch = fixture.batch()
    positions_M = fixture.objective.corrupt(batch, fixture.seed).positions_M
    require(
        positions_M.dtype == torch.int64 and positions_M.ndim == 1,
        f"`positions_M` is {positions_M.dtype} with {positions_M.ndim} dimensions, expected int64 with one",
    )
    require(bool((positions_M.diff() > 0).all()), "`positions_M` is not ascending, or has duplicates")
    outside = [position for position in positions_M.tolist() if not 0 <= position < batch.tokens]
    require(not outside, f"positions {outside[:5]} are outside the batch of {batch.tokens} tokens")


@check(OBJECTIVE_CHECKS)
def special_tokens_are_never_masked(fixture: ObjectiveFixture) -> None:
    """No position with the flag SPECIAL ([CLS], [SEP], [UNK] …) is in `positions_M`."""
    flags_T = fixture.batch().token_flags_T
    special = [position for position in fixture.masked().positions_M.tolist() if flags_T[position] & SPECIAL]
    require(not special, f"special tokens are masked at positions {special[:5]}")


@check(OBJECTIVE_CHECKS)
def labels_are_the_original_ids(fixture: ObjectiveFixture) -> None:
    """`labels_M` has the ids of the input batch at `positions_M`."""
    masked = fixture.masked()
    original_M = fixture.batch().ids_T[masked.positions_M]
    require(torch.equal(masked.labels_M, original_M), "`labels_M` is not batch.ids_T[positions_M]")


@check(OBJECTIVE_CHECKS)
def only_ids_change(fixture: ObjectiveFixture) -> None:
    """Offsets, flags and keys of the batch are unchanged, and all ids are in the vocabulary."""
    batch, masked = fixture.batch(), fixture.masked().batch
    require(masked.offsets == batch.offsets, "`offsets` was changed")
    require(torch.equal(masked.token_flags_T, batch.token_flags_T), "`token_flags_T` was changed")
    require(
        torch.equal(masked.sample_keys_B2, batch.sample_keys_B2),
        "`sample_keys_B2`, the key of all random draws, was changed",
    )
    require(masked.progress == batch.progress, "`progress` was changed")
    require(
        masked.ids_T.dtype == torch.int64 and masked.ids_T.shape == batch.ids_T.shape, "the shape of `ids_T` changed"
    )
    outside = masked.ids_T[(masked.ids_T < 0) | (masked.ids_T >= fixture.vocab_size)].tolist()
    require(not outside, f"ids {outside[:5]} are outside the vocabulary of {fixture.vocab_size} tokens")


@check(OBJECTIVE_CHECKS)
def counts_match_the_positions(fixture: ObjectiveFixture) -> None:
    """`denominators` has a count for each loss term, and there is one label for each masked position."""
    masked, terms = fixture.masked(), set(fixture.objective.loss_weights)
    require(
        set(masked.denominators) == terms,
        f"`denominators` has {sorted(masked.denominators)}, `loss_weights` has {sorted(terms)}",
    )
    require(
        all(type(count) is int and count >= 0 for count in masked.denominators.values()),
        f"invalid `denominators`: got {masked.denominators}, expected non-negative integers",
    )
    num_masked = len(masked.positions_M)
    given = (*_PER_POSITION, *(name for name in _OPTIONAL if getattr(masked, name) is not None))
    sizes = {name: len(getattr(masked, name)) for name in given}
    require(set(sizes.values()) == {num_masked}, f"there is not one entry for each masked position: {sizes}")
    regular = int(((fixture.batch().token_flags_T & SPECIAL) == 0).sum())
    require(
        num_masked <= masked.num_maskable <= regular,
        f"expected masked <= num_maskable <= regular tokens, got {num_masked}, {masked.num_maskable}, {regular}",
    )


@check(OBJECTIVE_CHECKS)
def loss_returns_named_sums(fixture: ObjectiveFixture) -> None:
    """`sums` has a finite scalar for each of `loss_weights`, `metrics` a (sum, count) for each metric."""
    loss, objective = fixture.loss(fixture.masked()), fixture.objective
    require(
        set(loss.sums) == set(objective.loss_weights),
        f"`sums` has {sorted(loss.sums)}, not {sorted(objective.loss_weights)}",
    )
    require(
        set(loss.metrics) == set(objective.metrics),
        f"`metrics` has {sorted(loss.metrics)}, not {sorted(objective.metrics)}",
    )
    for name, value in loss.sums.items():
        require(value.ndim == 0 and bool(value.isfinite()), f"the sum of `{name}` is not a finite scalar")
    for name, (value, count) in loss.metrics.items():
        require(bool(torch.as_tensor(value).isfinite()) and type(count) is int, f"metric `{name}`: {value}, {count!r}")


@check(OBJECTIVE_CHECKS)
def sums_add_over_micro_batches(fixture: ObjectiveFixture) -> None:
    """The sums, counts and metrics of a batch equal those of its parts added up: they are sums, not means."""
    half = max(1, len(fixture.samples) // 2)
    groups = [group for group in (fixture.samples, fixture.samples[:half], fixture.samples[half:]) if group]
    with torch.no_grad():
        whole_masked, *part_masked = [fixture.objective.corrupt(pack(group), fixture.seed) for group in groups]
        whole, *parts = [fixture.loss(masked) for masked in (whole_masked, *part_masked)]
    for term in fixture.objective.loss_weights:
        counts = whole_masked.denominators[term], sum(masked.denominators[term] for masked in part_masked)
        require(counts[0] == counts[1], f"the count of `{term}` is {counts[0]} for the batch and {counts[1]} in parts")
        _require_close(float(whole.sums[term]), sum(float(part.sums[term]) for part in parts), f"the sum of `{term}`")
    for name, (value, count) in whole.metrics.items():
        counts = count, sum(part.metrics[name][1] for part in parts)
        require(
            counts[0] == counts[1], f"the count of metric `{name}` is {counts[0]} for the batch, {counts[1]} in parts"
        )
        _require_close(float(value), sum(float(part.metrics[name][0]) for part in parts), f"metric `{name}`")


def _require_close(whole: float, parts: float, name: str) -> None:
    is_close = math.isclose(whole, parts, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    require(is_close, f"{name} is {whole:.5g} for the batch and {parts:.5g} in parts: is it a mean?")


@check(OBJECTIVE_CHECKS)
def loss_is_deterministic(fixture: ObjectiveFixture) -> None:
    """Without dropout, the loss of a masked batch is always the same and no random generator is used."""
    masked, before = fixture.masked(), generator_states()
    with torch.no_grad():
        first, second = fixture.loss(masked), fixture.loss(masked)
    require_no_draw(before, "draw random numbers in `corrupt`")
    for term, value in first.sums.items():
        require(torch.equal(value, second.sums[term]), f"the sum of `{term}` was different the second time")


@check(OBJECTIVE_CHECKS)
def gradients_are_finite(fixture: ObjectiveFixture) -> None:
    """All gradients are finite, and some of the encoder's gradients are not zero."""
    masked = fixture.masked()
    gradients = fixture.backward(masked)
    require(all(bool(gradient.isfinite().all()) for gradient in gradients), "a gradient is not finite")
    if len(masked.positions_M):
        has_gradient = any(p.grad is not None and bool(p.grad.any()) for p in fixture.encoder.parameters())
        require(has_gradient, "all gradients of the encoder are zero")


@check(OBJECTIVE_CHECKS)
def nothing_to_mask_costs_nothing(fixture: ObjectiveFixture) -> None:
    """In a sample of special tokens nothing is masked; a loss term with count 0 adds no loss and no gradient."""
    masked = fixture.objective.corrupt(pack([fixture.unmaskable]), fixture.seed)
    require(not len(masked.positions_M), f"{len(masked.positions_M)} positions of special tokens are masked")
    loss = fixture.loss(masked)
    for term, value in loss.sums.items():
        require(bool(value.isfinite()), f"the sum of `{term}` is not finite if nothing is masked (0 / 0?)")
        total = float(value.detach())
        require(masked.denominators[term] > 0 or not total, f"`{term}` has count 0 and the sum {total:.4g}")
    for name, (value, count) in loss.metrics.items():
        if not bool(torch.as_tensor(value).isfinite()) or (not count and float(value)):
            raise CheckFailed(f"metric `{name}` has the sum {float(value)} and the count {count}")
    gradients = fixture.backward(masked)
    require(all(bool(gradient.isfinite().all()) for gradient in gradients), "a gradient is not finite")
    if not any(masked.denominators.values()):
        require(not any(bool(gradient.any()) for gradient in gradients), "a gradient is not zero")


# Samplers -----------------------------------------------------------------------------------------------------------

SAMPLER_CHECKS: Final[list[Check[SamplerFixture]]] = []


@check(SAMPLER_CHECKS)
def count_is_constant(fixture: SamplerFixture) -> None:
    """`count` is an integer above 0, the same for every epoch, and the last sample can be computed."""
    for _, sampler, case in fixture.cases():
        counts = {epoch: sampler.count(epoch) for epoch in (*EPOCHS, 0)}
        require(all(type(count) is int for count in counts.values()), f"{case}: `count` doesn't return an int")
        require(min(counts.values()) > 0, f"{case}: there are no samples")
        require(len(set(counts.values())) == 1, f"{case}: epochs have different numbers of samples: {counts}")
        last = sampler.spec(0, counts[0] - 1)
        require(is_a(last, SampleSpec), f"{case}: `spec` returns a {type(last).__name__}, not a SampleSpec")


@check(SAMPLER_CHECKS)
def spec_is_pure(fixture: SamplerFixture) -> None:
    """A sample is the same each time, in any order, also from a new sampler; no random generator is used."""
    before = generator_states()
    for context, sampler, case in fixture.cases():
        samples = range(min(sampler.count(0), MAX_SAMPLES))
        for epoch in EPOCHS:
            first = [sampler.spec(epoch, sample) for sample in samples]
            backward = [sampler.spec(epoch, sample) for sample in reversed(samples)][::-1]
            require(first == backward, f"{case}: epoch {epoch} differs if it is read backwards")
            new = fixture.create(context)
            require(
                first == [new.spec(epoch, sample) for sample in samples],
                f"{case}: a new sampler returns other samples in epoch {epoch}",
            )
    require_no_draw(before, _USE_RNG)


@check(SAMPLER_CHECKS)
def samples_are_spans_of_documents(fixture: SamplerFixture) -> None:
    """Each sample has one span, not empty, within its document."""
    for context, spec, case in fixture.specs():
        require(len(spec.spans) == fixture.spans, f"{case}: got {len(spec.spans)} spans, expected {fixture.spans}")
        for document, first, last, _ in spec.spans:
            require(0 <= document < len(context.lengths), f"{case}: there is no document {document}")
            tokens = int(context.lengths[document])
            require(first < last, f"{case}: an empty span, {first} to {last}")
            require(first >= 0 and last <= tokens, f"{case}: span {first} to {last} of a document of {tokens} tokens")


@check(SAMPLER_CHECKS)
def samples_fit(fixture: SamplerFixture) -> None:
    """No sample has more tokens than `length`."""
    for context, spec, case in fixture.specs():
        require(spec.tokens <= context.length, f"{case}: {spec.tokens} tokens")


@check(SAMPLER_CHECKS)
def keys_are_unique(fixture: SamplerFixture) -> None:
    """No two samples have the same (epoch, number): it is the key of all random draws for a sample."""
    for _, sampler, case in fixture.cases():
        keys: dict[tuple[int, int], str] = {}
        for epoch in EPOCHS:
            for sample in range(min(sampler.count(epoch), MAX_SAMPLES)):
                spec, place = sampler.spec(epoch, sample), f"epoch {epoch}, sample {sample}"
                require(spec.epoch >= 0 and spec.number >= 0, f"{case}: {place} has a negative key")
                first = keys.setdefault((spec.epoch, spec.number), place)
                require(first == place, f"{case}: {place} has the epoch and number of {first}")


# Sources ------------------------------------------------------------------------------------------------------------

SOURCE_CHECKS: Final[list[Check[SourceFixture]]] = []
MAX_CHUNK_CHARACTERS: Final = 1_000_000
MAX_SHARD_CHARACTERS: Final = 5_000_000  # checked per shard
_MAX_SHARDS: Final = 20  # checked

Chunks = dict[SourceShard, list[DocumentChunk]]


def read_source(source: Source, *, backward: bool = False) -> Chunks:
    """Return the chunks of each shard, as far as the checks read."""
    shards = list(source.parts())[:_MAX_SHARDS]
    chunks = {shard: _read_shard(source, shard) for shard in (reversed(shards) if backward else shards)}
    return {shard: chunks[shard] for shard in shards}


def _read_shard(source: Source, shard: SourceShard) -> list[DocumentChunk]:
    chunks: list[DocumentChunk] = []
    characters = 0
    for chunk in source.documents(shard):
        chunks.append(chunk)
        characters += len(chunk.text)
        if characters > MAX_SHARD_CHARACTERS:
            break
    return chunks


def _is_complete(chunks: Sequence[DocumentChunk]) -> bool:
    return sum(len(chunk.text) for chunk in chunks) <= MAX_SHARD_CHARACTERS


@check(SOURCE_CHECKS)
def parts_have_a_fixed_order(fixture: SourceFixture) -> None:
    """`parts` returns the same shards in the same order each time, at least one, without duplicates."""
    source = fixture.create()
    first = list(source.parts())
    require(bool(first), "there is no shard")
    wrong = [type(shard).__name__ for shard in first if not is_a(shard, SourceShard)]
    require(not wrong, f"a shard is a {wrong[:1]}, not an unmask.core.types.SourceShard")
    require(len(set(first)) == len(first), "a shard is listed twice")
    require(first == list(source.parts()), "the order was different the second time")
    require(first == list(fixture.create().parts()), "a new source returns another order")


@check(SOURCE_CHECKS)
def documents_are_reproducible(fixture: SourceFixture) -> None:
    """The chunks of a shard are the same each time, in any order of shards, also from a new source."""
    source = fixture.create()
    first = read_source(source)
    require(read_source(source) == first, "the second reading returned other chunks")
    require(read_source(source, backward=True) == first, "the chunks differ if the last shard is read first")
    require(read_source(fixture.create()) == first, "a new source returns other chunks")


@check(SOURCE_CHECKS)
def chunks_are_in_order(fixture: SourceFixture) -> None:
    """Documents of a shard are numbered from 0, so are the chunks of a document, and `last` marks its last chunk."""
    source = fixture.create()
    for shard, chunks in read_source(source).items():
        document = index = 0
        for number, chunk in enumerate(chunks):
            require(is_a(chunk, DocumentChunk), f"{shard.path}: `documents` yields a {type(chunk).__name__}")
            expected, got = (document, index), (chunk.document, chunk.number)
            require(
                got == expected, f"{shard.path}, chunk {number}: document and number are {got}, expected {expected}"
            )
            document, index = (document + 1, 0) if chunk.last else (document, index + 1)
        is_ended = not chunks or chunks[-1].last or not _is_complete(chunks)
        require(is_ended, f"{shard.path}: no chunk of the last document has last=True")


@check(SOURCE_CHECKS)
def text_is_valid(fixture: SourceFixture) -> None:
    """Text can be encoded as UTF-8, is in NFC, and is not all white space."""
    has_text = False
    for shard, chunks in read_source(fixture.create()).items():
        for number, chunk in enumerate(chunks):
            place = f"{shard.path}, chunk {number}"
            require(is_a(chunk.text, str), f"{place}: `text` is a {type(chunk.text).__name__}")
            surrogates = [character for character in chunk.text if "\ud800" <= character <= "\udfff"]
            require(not surrogates, f"{place}: a lone surrogate, {surrogates[:1]!r}, can't be encoded")
            is_normalized = unicodedata.is_normalized("NFC", chunk.text)
            require(is_normalized, f'{place}: not in NFC; use unicodedata.normalize("NFC", text)')
            has_text = has_text or bool(chunk.text.strip())
    require(has_text, "there is only white space")


@check(SOURCE_CHECKS)
def chunks_are_bounded(fixture: SourceFixture) -> None:
    """No chunk is longer than a million characters, and `characters` is the number of source characters it covers."""
    for shard, chunks in read_source(fixture.create()).items():
        for number, chunk in enumerate(chunks):
            place, size = f"{shard.path}, chunk {number}", len(chunk.text)
            require(
                size <= MAX_CHUNK_CHARACTERS, f"{place}: {size:,} characters; divide the document into several chunks"
            )
            covered = chunk.characters
            require(type(covered) is int and covered >= 0, f"{place}: `characters` is {covered!r}")
            require(bool(covered) or not size, f"{place}: `characters` is 0 for {size} characters of text")


@check(SOURCE_CHECKS)
def fingerprint_is_stable(fixture: SourceFixture) -> None:
    """The fingerprint is a string that is the same before and after reading, and for a new source."""
    source = fixture.create()
    first = source.fingerprint
    require(is_a(first, str) and bool(first), f"`fingerprint` is {first!r}")
    read_source(source)
    require(source.fingerprint == first, "reading the source changed its fingerprint")
    require(fixture.create().fingerprint == first, "a new source has another fingerprint")


@check(SOURCE_CHECKS)
def fingerprint_changes_with_the_text(fixture: SourceFixture) -> None:
    """If a setting or a file changes the text, the fingerprint changes: caches and resumed runs rely on it."""
    source = fixture.create()
    seen = {source.fingerprint: ("unchanged", list(read_source(source).values()))}
    for name, create in fixture.variants:
        try:
            source = create()
            fingerprint, chunks = source.fingerprint, list(read_source(source).values())
        except Exception:  # a source that refuses a variant can't be used with it
            continue
        first = seen.setdefault(fingerprint, (name, chunks))
        require(first[1] == chunks, f"one fingerprint for two texts: {first[0]}, and {name}")


# Loggers ------------------------------------------------------------------------------------------------------------

LOGGER_CHECKS: Final[list[Check[LoggerFixture]]] = []


def _metrics(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in line.items() if name != "step"}


@check(LOGGER_CHECKS)
def every_line_is_accepted(fixture: LoggerFixture) -> None:
    """`write` accepts training and validation lines, with nested tables, missing numbers (None) and text."""
    logger = fixture.create(fixture.context())
    for line in LOG_LINES:
        logger.write(line["step"], _metrics(line))
    logger.close()


@check(LOGGER_CHECKS)
def a_run_can_be_resumed(fixture: LoggerFixture) -> None:
    """A logger can be created again for the same run, with or without `close` before, and closed without a line."""
    logger = fixture.create(fixture.context())
    logger.write(1, _metrics(LOG_LINES[0]))  # as after a kill: no close
    logger = fixture.create(fixture.context(lines=2))
    logger.write(3, _metrics(LOG_LINES[2]))
    logger.close()
    fixture.create(fixture.context(lines=3)).close()


@check(LOGGER_CHECKS)
def metrics_are_unchanged(fixture: LoggerFixture) -> None:
    """`write` changes neither the metrics that it gets nor the lines of the context."""
    context = fixture.context(lines=2)
    lines = copy.deepcopy(list(context.lines))
    logger = fixture.create(context)
    for line in LOG_LINES:
        metrics = _metrics(line)
        logger.write(line["step"], metrics)
        require(metrics == _metrics(line), f"`write` changed its metrics to {metrics}")
    logger.close()
    require(list(context.lines) == lines, "the lines of the context were changed")


@check(LOGGER_CHECKS)
def no_generator_is_used(fixture: LoggerFixture) -> None:
    """No random generator is used: the dropout of a run depends on PyTorch's."""
    before = generator_states()
    every_line_is_accepted(fixture)
    require_no_draw(before, "use a generator of your own, such as random.Random(1)")


@check(LOGGER_CHECKS)
def files_of_the_run_are_unchanged(fixture: LoggerFixture) -> None:
    """Existing files of the run, such as recipe.toml and log.jsonl, are unchanged."""
    names = ("recipe.toml", "log.jsonl", "env.json")
    for name in names:
        (fixture.run / name).write_text(f"{name}\n", encoding="utf-8")
    before = {name: file_digest(fixture.run / name) for name in names}
    every_line_is_accepted(fixture)
    for name in names:
        path = fixture.run / name
        require(path.is_file() and file_digest(path) == before[name], f"{name} was changed or removed")
