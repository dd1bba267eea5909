"""Room card: an existing vocabulary, with pieces learnt from new text.

Comes in: a tokenizer.json (WordPiece or BPE), training text of another domain or language. Goes out: the same tokenizer
with more pieces behind its own; of which old pieces each new one consists. Called by: tokenizer, start.

Learning goes on where the vocabulary stopped: the words of the text, cut by it, are joined pair by pair, the most
frequent pair first, as in byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909). So no old id moves, and a text
in which none of the new pieces' letters occur is cut as before: a BPE merge of ours ranks behind all old ones, and
WordPiece finds a new piece only where its letters stand.

Characters that WordPiece doesn't know come first, each as the beginning and as the continuation of a word: without them
a word of another script stays [UNK] whatever else is learnt.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, Protocol, cast

import tokenizers

from unmask.core.errors import TokenizerError
from unmask.tokenization.normalization import continuing_prefix, splits_at_spaces
from unmask.tokenization.settings import ExtendedTokenizerConfig, Progress, blocks_of, round_below

_MOST_WORDS: Final = 300_000  # different ones, the most frequent, in which pairs are counted
_TOO_MANY: Final = 3  # of WordPiece, times as many pieces are joined as are wanted: some are used up by longer ones
_TOLD_EVERY: Final = 64  # pieces
_STAGE: Final = "extending the vocabulary"
_AT: Final = "data.tokenizer.num_new_tokens"

Node = dict[str, Any]


class _Kind(Protocol):
    """What differs between WordPiece and BPE."""

    def cut(self, word: str) -> list[str]:
        """A word as its pieces; none where it can't be spelled."""
        ...

    def join(self, left: str, right: str) -> str:
        """Two neighbouring pieces as one."""
        ...


class _WordPieces:
    """Greedy cutting from the left, longest piece first."""

    def __init__(self, vocabulary: Mapping[str, int], prefix: str, longest_word: int) -> None:
        self._vocabulary, self.prefix, self.longest_word = set(vocabulary), prefix, longest_word
        self._longest = max(map(len, vocabulary))

    def learn(self, pieces: Iterable[str]) -> None:
        self._vocabulary.update(pieces)

    def cut(self, word: str) -> list[str]:
        if len(word) > self.longest_word:
            return []
        begins = not word.startswith(self.prefix)
        rest, pieces = word if begins else word[len(self.prefix) :], list[str]()
        at = 0
        while at < len(rest):
            lead = "" if begins and not at else self.prefix
            ends = range(min(len(rest), at + self._longest), at, -1)
            found = next((end for end in ends if lead + rest[at:end] in self._vocabulary), None)
            if found is None:
                return []
            pieces.append(lead + rest[at:found])
            at = found
        return pieces

    def join(self, left: str, right: str) -> str:
        return left + right.removeprefix(self.prefix)


class _Merges:
    """The library's own cutting, by ranked merges."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def cut(self, word: str) -> list[str]:
        return [token.value for token in self._model.tokenize(word)]

    def join(self, left: str, right: str) -> str:
        return left + right


def extended(
    tokenizer_json: str, texts: Iterable[str], settings: ExtendedTokenizerConfig, progress: Progress | None
) -> str:
    """The same tokenizer with `settings.pieces` more pieces, learnt from text.

    Raises:
        TokenizerError: its vocabulary is of another kind, or the text gives fewer new pieces.
    """
    whole = cast("Node", json.loads(tokenizer_json))
    model = cast("Node", whole["model"])
    marks_ends = model["type"] == "BPE" and (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
    if model["type"] not in ("WordPiece", "BPE") or marks_ends:
        raise TokenizerError(
            f"a vocabulary of the kind {model['type']} can't be extended"
            + (" where it marks ends" if marks_ends else ""),
            location=str(settings.path),
            hint="go on with its own pieces (leave --extend-vocabulary out), or extend a WordPiece or BPE vocabulary",
        )
    inner = tokenizers.Tokenizer.from_str(tokenizer_json)
    counts = _counted(tokenizer_json, texts, settings, progress)
    if model["type"] == "WordPiece":
        kind = _WordPieces(model["vocab"], continuing_prefix(tokenizer_json), model["max_input_chars_per_word"])
        pieces = _wordpieces(kind, model["vocab"], counts, settings, progress)
    else:
        joiner = _Joiner(_Merges(inner.model), set(model["vocab"]), counts)
        merges = list(joiner.merges(settings.num_new_tokens, settings.min_frequency, progress))
        as_lists = _as_lists(model)
        model["merges"] += [[left, right] if as_lists else f"{left} {right}" for left, right, _ in merges]
        pieces = [joined for *_, joined in merges]
    if len(pieces) < settings.num_new_tokens:
        fits = round_below(len(pieces))
        raise TokenizerError(
            f"{settings.num_new_tokens:,} new pieces are more than this text can give: {len(pieces):,}",
            location=_AT,
            hint=f"ask for {fits:,} or fewer, or give more text" if fits else "give more text, or none of them",
        )
    first = max(inner.get_vocab(with_added_tokens=True).values()) + 1
    model["vocab"] |= {piece: first + number for number, piece in enumerate(pieces)}
    if progress is not None:
        progress(_STAGE, 1.0)
    return json.dumps(whole, ensure_ascii=False)


def origins(old_json: str, new_json: str) -> list[list[int]]:
    """For each piece that `extended` has added, in the order of their ids, the ids of the older pieces in it.

    They are pieces of the old vocabulary and new characters; a new character itself has none.
    """
    old, new = cast("Node", json.loads(old_json)), cast("Node", json.loads(new_json))
    known: dict[str, int] = old["model"]["vocab"]
    added = sorted((number, piece) for piece, number in new["model"]["vocab"].items() if piece not in known)
    if old["model"]["type"] == "WordPiece":
        prefix = continuing_prefix(old_json)
        ids = known | {piece: number for number, piece in added if len(piece.removeprefix(prefix)) == 1}
        longest = max((len(piece) for _, piece in added), default=1)
        kind = _WordPieces(ids, prefix, longest)
        return [[] if piece in ids else [ids[part] for part in kind.cut(piece)] for _, piece in added]
    halves: dict[str, tuple[str, str]] = {}
    for merge in new["model"]["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        halves.setdefault(left + right, (left, right))

    def spelled(piece: str) -> list[int]:
        return [known[piece]] if piece in known else [number for half in halves[piece] for number in spelled(half)]

    return [spelled(piece) for _, piece in added]


def _as_lists(model: Node) -> bool:
    """How the file writes its merges: "a b" in older ones."""
    return not (model["merges"] and isinstance(model["merges"][0], str))


def _counted(
    tokenizer_json: str, texts: Iterable[str], settings: ExtendedTokenizerConfig, progress: Progress | None
) -> dict[str, int]:
    """The words of a sample, as this tokenizer tells words apart, the most frequent first."""
    chunks: Counter[str] = Counter()
    parts = splits_at_spaces(tokenizer_json)  # so that each chunk is looked at once, however often it stands there
    for block in blocks_of(texts, settings.max_train_chars, progress, _STAGE):
        for text in block.split("\n"):
            first, *others = text.split(" ") if parts else [text]
            chunks[first] += 1
            chunks.update([f" {other}" for other in others])
    inner = tokenizers.Tokenizer.from_str(tokenizer_json)
    counts: Counter[str] = Counter()
    for chunk, count in chunks.items():
        normal = inner.normalizer.normalize_str(chunk) if inner.normalizer else chunk
        for word, _ in inner.pre_tokenizer.pre_tokenize_str(normal) if inner.pre_tokenizer else [(normal, (0, 0))]:
            counts[word] += count
    frequent = [(word, count) for word, count in counts.items() if count >= settings.min_frequency]
    # By the word where counts are equal, so that each process has the same order.
    return dict(sorted(frequent, key=lambda entry: (-entry[1], entry[0]))[:_MOST_WORDS])


def _wordpieces(
    kind: _WordPieces,
    vocabulary: Mapping[str, int],
    counts: Mapping[str, int],
    settings: ExtendedTokenizerConfig,
    progress: Progress | None,
) -> list[str]:
    """New characters, then the joined pieces that most words are still cut into at the end."""
    # Rare ones would take every place in a script of many: what is longer makes texts shorter, and is worth the others.
    found = _new_characters(kind, vocabulary, counts, settings)
    characters = found[: max(1, settings.num_new_tokens // 2)]
    kind.learn(characters)
    room = settings.num_new_tokens - len(characters)
    joiner = _Joiner(kind, {*vocabulary, *characters}, counts)
    made = [joined for *_, joined in joiner.merges(_TOO_MANY * room, settings.min_frequency, progress)]
    used = joiner.used()
    chosen = sorted(
        (piece for piece in made if used[piece] >= settings.min_frequency), key=lambda piece: (-used[piece], piece)
    )
    return [*characters, *chosen[:room], *found[len(characters) :]][: settings.num_new_tokens]


def _new_characters(
    kind: _WordPieces, vocabulary: Mapping[str, int], counts: Mapping[str, int], settings: ExtendedTokenizerConfig
) -> list[str]:
    """Characters of words that can't be spelled, as beginning and as continuation, the most frequent first."""
    missing: Counter[str] = Counter()
    prefix = kind.prefix
    for word, count in counts.items():
        if len(word) <= kind.longest_word and not kind.cut(word):
            for place, character in enumerate(word):
                piece = character if not place else prefix + character
                if piece not in vocabulary:
                    missing[piece] += count
    frequent = [piece for piece, count in missing.items() if count >= settings.min_frequency]
    return sorted(frequent, key=lambda piece: (-missing[piece], piece))


class _Joiner:
    """Joins neighbouring pieces of counted words, the most frequent pair first."""

    def __init__(self, kind: _Kind, taken: set[str], counts: Mapping[str, int]) -> None:
        self._kind, self._taken = kind, taken
        self._words: list[list[str]] = []
        self._counts: list[int] = []
        self._pairs: Counter[tuple[str, str]] = Counter()
        self._where: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
        for word, count in counts.items():
            pieces = kind.cut(word)
            if len(pieces) > 1:
                self._add(len(self._words), pieces, count)
                self._words.append(pieces)
                self._counts.append(count)

    def merges(self, most: int, min_frequency: int, progress: Progress | None) -> Iterator[tuple[str, str, str]]:
        """Pairs and what they become, at most so many, until no pair is frequent enough."""
        left = most
        heap = [(-count, pair) for pair, count in self._pairs.items()]
        heapq.heapify(heap)
        while heap and left:
            count, pair = heapq.heappop(heap)
            now = self._pairs[pair]
            if now != -count:  # it was joined elsewhere since; what is left of it stands further back
                if now >= min_frequency:
                    heapq.heappush(heap, (-now, pair))
                continue
            if now < min_frequency:
                return
            joined = self._kind.join(*pair)
            if joined in self._taken:  # an old piece that the old cut doesn't use here: it must stay so
                continue
            self._taken.add(joined)
            for touched in self._join(pair, joined):
                heapq.heappush(heap, (-self._pairs[touched], touched))
            left -= 1
            if progress is not None and not left % _TOLD_EVERY:
                progress(_STAGE, 0.5 + 0.49 * (1 - left / most))
            yield (*pair, joined)

    def used(self) -> Counter[str]:
        """How often each piece stands in the words as they are now."""
        found: Counter[str] = Counter()
        for pieces, count in zip(self._words, self._counts, strict=True):
            for piece in pieces:
                found[piece] += count
        return found

    def _add(self, number: int, pieces: Sequence[str], count: int) -> None:
        for pair in pairwise(pieces):
            self._pairs[pair] += count
            if count > 0:
                self._where[pair].add(number)

    def _join(self, pair: tuple[str, str], joined: str) -> list[tuple[str, str]]:
        """Join this pair in all words; the pairs that came about."""
        left, right = pair
        touched: set[tuple[str, str]] = set()
        for number in self._where.pop(pair):
            pieces, count = self._words[number], self._counts[number]
            merged, at = list[str](), 0
            while at < len(pieces):
                both = at + 1 < len(pieces) and pieces[at] == left and pieces[at + 1] == right
                merged.append(joined if both else pieces[at])
                at += 2 if both else 1
            if len(merged) < len(pieces):
                self._add(number, pieces, -count)
                self._add(number, merged, count)
                touched.update(two for two in pairwise(merged) if joined in two)
                self._words[number] = merged
        return sorted(touched)
