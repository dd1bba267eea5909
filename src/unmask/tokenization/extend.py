"""Extends an existing WordPiece or BPE vocabulary with tokens learned from text of another domain or language.

Training continues where the vocabulary ended. The words of the text are encoded with it, and pairs of tokens are
merged, the most frequent first, as in byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909). No existing id
changes. A text without the letters of any new token is encoded as before: new BPE merges rank after all existing ones,
and WordPiece matches a new token only where its letters occur.

WordPiece gets unknown characters first, at the beginning and in the continuation of a word. Without them a word of
another script would remain [UNK].
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, Protocol, cast

import tokenizers

from unmask.core.errors import TokenizerError
from unmask.core.types import ProgressCallback
from unmask.tokenization.normalization import continuing_prefix, splits_at_spaces
from unmask.tokenization.settings import ExtendedTokenizerConfig, blocks_of, round_below

_MAX_WORDS: Final = 300_000  # pairs are counted in this number of distinct words, the most frequent ones
_MERGE_FACTOR: Final = 3  # WordPiece merges this multiple of the wanted tokens: longer tokens replace some
_REPORT_EVERY: Final = 64  # tokens
_MAX_COMPARED: Final = 5_000  # words that are encoded before and after
_STAGE: Final = "extending the vocabulary"
_LOCATION: Final = "data.tokenizer.num_new_tokens"
_MAX_ID: Final = 2**22  # tables have an entry for each id up to the largest; known vocabularies have up to 2**20

Node = dict[str, Any]


class _Model(Protocol):
    """Encoding and merging, which differ between WordPiece and BPE."""

    def encode(self, word: str) -> list[str]:
        """Return the tokens of a word; empty if the word is unknown."""
        ...

    def merge(self, left: str, right: str) -> str:
        """Return the token that merges two neighboring tokens."""
        ...


class _WordPiece:
    """Greedy longest match from the left."""

    def __init__(self, vocabulary: Mapping[str, int], prefix: str, longest_word: int) -> None:
        self._vocabulary, self.prefix, self.longest_word = set(vocabulary), prefix, longest_word
        self._longest = max(map(len, vocabulary))

    def add(self, tokens: Iterable[str]) -> None:
        self._vocabulary.update(tokens)

    def encode(self, word: str) -> list[str]:
        if len(word) > self.longest_word:
            return []
        begins = not word.startswith(self.prefix)
        rest, tokens = word if begins else word[len(self.prefix) :], list[str]()
        at = 0
        while at < len(rest):
            lead = "" if begins and not at else self.prefix
            ends = range(min(len(rest), at + self._longest), at, -1)
            longest = next((end for end in ends if lead + rest[at:end] in self._vocabulary), None)
            if longest is None:
                return []
            tokens.append(lead + rest[at:longest])
            at = longest
        return tokens

    def merge(self, left: str, right: str) -> str:
        return left + right.removeprefix(self.prefix)


class _Bpe:
    """Ranked merges, applied by the `tokenizers` library."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def encode(self, word: str) -> list[str]:
        return [token.value for token in self._model.tokenize(word)]

    def merge(self, left: str, right: str) -> str:
        return left + right


def extend_vocabulary(
    tokenizer_json: str, texts: Iterable[str], settings: ExtendedTokenizerConfig, on_progress: ProgressCallback | None
) -> str:
    """Return the tokenizer.json with `num_new_tokens` more tokens, learned from text.

    Raises:
        TokenizerError: the vocabulary is neither WordPiece nor BPE, or the text yields fewer new tokens.
    """
    spec = cast("Node", json.loads(tokenizer_json))
    model = cast("Node", spec["model"])
    marks_ends = model["type"] == "BPE" and (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
    if model["type"] not in ("WordPiece", "BPE") or marks_ends:
        raise TokenizerError(
            f"can't extend a vocabulary of kind {model['type']}"
            + (" with prefixes or suffixes" if marks_ends else "")
            + ", expected WordPiece or BPE",
            location=str(settings.path),
            hint="remove --extend-vocabulary to keep the vocabulary as it is",
        )
    inner = tokenizers.Tokenizer.from_str(tokenizer_json)
    old = inner.get_vocab(with_added_tokens=True)
    counts = _count_words(tokenizer_json, texts, settings, on_progress)
    if model["type"] == "WordPiece":
        wordpiece = _WordPiece(model["vocab"], continuing_prefix(tokenizer_json), model["max_input_chars_per_word"])
        tokens = _new_wordpieces(wordpiece, old, counts, settings, on_progress)
    else:
        merger = _Merger(_Bpe(inner.model), set(old), counts)
        merges = list(merger.merges(settings.num_new_tokens, settings.min_frequency, on_progress))
        as_lists = _as_lists(model)
        model["merges"] += [[left, right] if as_lists else f"{left} {right}" for left, right, _ in merges]
        tokens = [merged for *_, merged in merges]
    if len(tokens) < settings.num_new_tokens:
        fits = round_below(len(tokens))
        raise TokenizerError(
            f"invalid num_new_tokens: got {settings.num_new_tokens:,}, but this text gives {len(tokens):,} new tokens",
            location=_LOCATION,
            hint=f"set it to {fits:,} or less, or add text" if fits else "add text, or don't extend the vocabulary",
        )
    first = max(old.values()) + 1
    # The library numbers added tokens that the model lacks after those of the model. Within the model, they keep ids.
    model["vocab"] = old | {token: first + number for number, token in enumerate(tokens)}
    if on_progress is not None:
        on_progress(_STAGE, 1.0)
    extended = json.dumps(spec, ensure_ascii=False)
    after = tokenizers.Tokenizer.from_str(extended)
    require_ids(extended, after)
    _require_equal_encoding(inner, after, counts, first)
    return extended


def _require_equal_encoding(
    before: tokenizers.Tokenizer, after: tokenizers.Tokenizer, counts: Mapping[str, int], first_new: int
) -> None:
    """Raise TokenizerError if a word of the text gets other tokens after an extension, and none of them is new.

    An added token that matched whole words only has become a token of the model, which matches parts of words too.
    """
    words = list(itertools.islice(counts, _MAX_COMPARED))
    encoded = (one.encode_batch(words, add_special_tokens=False) for one in (before, after))
    for word, old, new in zip(words, *encoded, strict=True):
        if old.ids != new.ids and max(new.ids, default=0) < first_new:
            raise TokenizerError(
                f"the vocabulary can't be extended: {word!r} would become {new.tokens}, and is {old.tokens} now",
                location=_LOCATION,
                hint="remove --extend-vocabulary to keep the vocabulary as it is",
            )


def require_ids(tokenizer_json: str, inner: tokenizers.Tokenizer) -> None:
    """Raise TokenizerError unless the loaded tokenizer has the ids of its tokenizer.json, each for one token."""
    spec = cast("Node", json.loads(tokenizer_json))
    vocabulary = spec["model"]["vocab"]
    # A list of Unigram may repeat a token: the library keeps its last id.
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {entry[0]: n for n, entry in enumerate(vocabulary)}
    loaded = inner.get_vocab(with_added_tokens=True)
    tokens: dict[int, str] = {}
    if (largest := max(loaded.items(), key=lambda item: item[1], default=("", 0)))[1] > _MAX_ID:
        raise TokenizerError(
            f"the token {largest[0]!r} has the id {largest[1]}, expected at most {_MAX_ID}",
            hint="correct the id in tokenizer.json, or restore the file from a copy",
        )
    for token, id in [*ids.items(), *((added["content"], added["id"]) for added in spec.get("added_tokens") or ())]:
        if loaded.get(token) != id:
            raise TokenizerError(
                f"the token {token!r} has the id {id} in tokenizer.json, but the tokenizers library gives it "
                f"{loaded.get(token, 'none')}",
                hint="give the tokens of added_tokens in tokenizer.json the same ids in model.vocab",
            )
        if tokens.setdefault(id, token) != token:
            raise TokenizerError(
                f"the tokens {tokens[id]!r} and {token!r} have the same id {id}",
                hint="give each token of tokenizer.json its own id",
            )


def origins(old_json: str, new_json: str) -> list[list[int]]:
    """Return, for each token that `extend_vocabulary` added, the ids of the older tokens it consists of.

    The added tokens are in the order of their ids. Older tokens are those of the old vocabulary and new characters. The
    list of a new character is empty.
    """
    old, new = cast("Node", json.loads(old_json)), cast("Node", json.loads(new_json))
    known: dict[str, int] = old["model"]["vocab"] | {token["content"]: token["id"] for token in old["added_tokens"]}
    added = sorted((number, token) for token, number in new["model"]["vocab"].items() if token not in known)
    if old["model"]["type"] == "WordPiece":
        prefix = continuing_prefix(old_json)
        ids = old["model"]["vocab"] | {token: number for number, token in added if len(token.removeprefix(prefix)) == 1}
        longest = max((len(token) for _, token in added), default=1)
        wordpiece = _WordPiece(ids, prefix, longest)
        return [[] if token in ids else [ids[part] for part in wordpiece.encode(token)] for _, token in added]
    halves: dict[str, tuple[str, str]] = {}
    for merge in new["model"]["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        halves.setdefault(left + right, (left, right))

    def known_ids(token: str) -> list[int]:
        return [known[token]] if token in known else [id for half in halves[token] for id in known_ids(half)]

    return [known_ids(token) for _, token in added]


def _as_lists(model: Node) -> bool:
    """Return whether the file writes merges as lists; older ones write "a b"."""
    return not (model["merges"] and isinstance(model["merges"][0], str))


def _count_words(
    tokenizer_json: str, texts: Iterable[str], settings: ExtendedTokenizerConfig, on_progress: ProgressCallback | None
) -> dict[str, int]:
    """Return the counts of the pre-tokens in the training sample, the most frequent first."""
    chunks: Counter[str] = Counter()
    parts = splits_at_spaces(tokenizer_json)  # so that equal chunks are pre-tokenized once
    for block in blocks_of(texts, settings.max_train_chars, on_progress, _STAGE):
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
    # Equal counts are ordered by the word, so that the order is the same in every process.
    return dict(sorted(frequent, key=lambda entry: (-entry[1], entry[0]))[:_MAX_WORDS])


def _new_wordpieces(
    wordpiece: _WordPiece,
    vocabulary: Mapping[str, int],
    counts: Mapping[str, int],
    settings: ExtendedTokenizerConfig,
    on_progress: ProgressCallback | None,
) -> list[str]:
    """Return new characters, then the merged tokens that are used most after the last merge."""
    # Characters get at most half: rare ones of a large script would use all tokens, and longer tokens save more.
    all_characters = _new_characters(wordpiece, vocabulary, counts, settings)
    characters = all_characters[: max(1, settings.num_new_tokens // 2)]
    wordpiece.add(characters)
    left = settings.num_new_tokens - len(characters)
    merger = _Merger(wordpiece, {*vocabulary, *characters}, counts)
    merged = [token for *_, token in merger.merges(_MERGE_FACTOR * left, settings.min_frequency, on_progress)]
    uses = merger.token_counts()
    chosen = sorted(
        (token for token in merged if uses[token] >= settings.min_frequency), key=lambda token: (-uses[token], token)
    )
    return [*characters, *chosen[:left], *all_characters[len(characters) :]][: settings.num_new_tokens]


def _new_characters(
    wordpiece: _WordPiece, vocabulary: Mapping[str, int], counts: Mapping[str, int], settings: ExtendedTokenizerConfig
) -> list[str]:
    """Return the missing characters of unknown words, with and without prefix, the most frequent first."""
    missing: Counter[str] = Counter()
    prefix = wordpiece.prefix
    for word, count in counts.items():
        if len(word) <= wordpiece.longest_word and not wordpiece.encode(word):
            for index, character in enumerate(word):
                token = character if not index else prefix + character
                if token not in vocabulary:
                    missing[token] += count
    frequent = [token for token, count in missing.items() if count >= settings.min_frequency]
    return sorted(frequent, key=lambda token: (-missing[token], token))


class _Merger:
    """Merges neighboring tokens of counted words, the most frequent pair first."""

    def __init__(self, model: _Model, known: set[str], counts: Mapping[str, int]) -> None:
        self._model, self._known = model, known
        self._words: list[list[str]] = []
        self._counts: list[int] = []
        self._pairs: Counter[tuple[str, str]] = Counter()
        self._where: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
        for word, count in counts.items():
            tokens = model.encode(word)
            if len(tokens) > 1:
                self._add(len(self._words), tokens, count)
                self._words.append(tokens)
                self._counts.append(count)

    def merges(
        self, limit: int, min_frequency: int, on_progress: ProgressCallback | None
    ) -> Iterator[tuple[str, str, str]]:
        """Yield pairs and the merged token, at most `limit`, until no pair is frequent enough."""
        left = limit
        heap = [(-count, pair) for pair, count in self._pairs.items()]
        heapq.heapify(heap)
        while heap and left:
            count, pair = heapq.heappop(heap)
            current = self._pairs[pair]
            if current != -count:  # another merge has used some occurrences: put the pair back with its new count
                if current >= min_frequency:
                    heapq.heappush(heap, (-current, pair))
                continue
            if current < min_frequency:
                return
            merged = self._model.merge(*pair)
            if merged in self._known:  # an existing token that the existing encoding doesn't use here
                continue
            self._known.add(merged)
            for touched in self._apply(pair, merged):
                heapq.heappush(heap, (-self._pairs[touched], touched))
            left -= 1
            if on_progress is not None and not left % _REPORT_EVERY:
                on_progress(_STAGE, 0.5 + 0.49 * (1 - left / limit))
            yield (*pair, merged)

    def token_counts(self) -> Counter[str]:
        """Return how often each token occurs in the words after all merges so far."""
        totals: Counter[str] = Counter()
        for tokens, count in zip(self._words, self._counts, strict=True):
            for token in tokens:
                totals[token] += count
        return totals

    def _add(self, number: int, tokens: Sequence[str], count: int) -> None:
        for pair in pairwise(tokens):
            self._pairs[pair] += count
            if count > 0:
                self._where[pair].add(number)

    def _apply(self, pair: tuple[str, str], merged: str) -> list[tuple[str, str]]:
        """Merge this pair in all words and return the new pairs."""
        left, right = pair
        touched: set[tuple[str, str]] = set()
        for number in self._where.pop(pair):
            tokens, count = self._words[number], self._counts[number]
            shorter, at = list[str](), 0
            while at < len(tokens):
                is_pair = at + 1 < len(tokens) and tokens[at] == left and tokens[at + 1] == right
                shorter.append(merged if is_pair else tokens[at])
                at += 2 if is_pair else 1
            if len(shorter) < len(tokens):
                self._add(number, tokens, -count)
                self._add(number, shorter, count)
                touched.update(two for two in pairwise(shorter) if merged in two)
                self._words[number] = shorter
        return sorted(touched)
