"""Loads the tokenizer of a Hugging Face folder, from tokenizer.json or, with transformers, from older files."""

from __future__ import annotations

import codecs
import importlib.util
import json
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import tokenizers
from tokenizers import processors

from unmask.core.errors import TokenizerError
from unmask.core.files import RunLayout, read_json
from unmask.hub.parity import SENTENCES, quiet_transformers
from unmask.tokenization.tokenizer import Tokenizer, library_errors

# Files of a tokenizer without tokenizer.json. AutoTokenizer makes an empty tokenizer if none exists.
_OLDER_FILES: Final = ("vocab.txt", "vocab.json", "*.model", "*.spm")
_ADDED: Final = "added_tokens.json"
_CONFIG: Final = "tokenizer_config.json"
_TOKENIZER_SUFFIXES: Final = (".json", ".txt", ".model", ".spm")
_VOCABULARY_TEXTS: Final = 200  # tokens of the vocabulary in the compared texts
_MAX_FOREIGN: Final = 0.1  # share of tokens with the mark of another kind of vocabulary
_UNUSUAL: Final = (
    "",
    " ",
    "  two  spaces\t and a tab\n and a line",
    " leading and trailing ",
    "na\u00efve CAF\u00c9 re\u0301sume\u0301 \u00dcber \u0130stanbul \u01c5",
    "zero\u200bwidth soft\u00adhyphen \x00\x07 \ufffd \u00a0nbsp",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "\uff21\uff22\uff23 \u2460 \ufb01 \u00bd",
    "1234567890 3.14 1,000 $5 50% a_b a-b http://a.b/c?d=e",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e\u0938\u094d\u0924\u0947 \uff76\uff9e",
)


def load_tokenizer(folder: Path) -> tuple[Tokenizer, list[str]]:
    """Load the tokenizer of a folder; also return notes on what was converted.

    If transformers is installed, the ids are those of AutoTokenizer: version 5 builds some tokenizers from
    tokenizer_config.json and the vocabulary, not from tokenizer.json as it is.

    Raises:
        TokenizerError: there is no tokenizer, it can't be read or converted, it has no mask token, or AutoTokenizer
            gives ids that no tokenizer.json gives, or other ids to added tokens than the files of the folder.
    """
    notes: list[str] = []
    has_json = (folder / RunLayout.TOKENIZER).is_file()
    has_transformers = importlib.util.find_spec("transformers") is not None
    if not has_json:
        _require_older_files(folder, has_transformers)
        notes.append(f"{RunLayout.TOKENIZER} was made by transformers from older files of the tokenizer")
    tokenizer = Tokenizer.load(folder) if has_json else None
    if has_transformers:
        try:
            with _without_byte_order_marks(folder) as clean:
                tokenizer, difference = _as_auto_tokenizer(clean, tokenizer)
        except TokenizerError as error:
            raise error.at(location=str(folder)) from error.__cause__
        notes += [difference] if difference else []
    else:
        notes.append("the ids were not compared with AutoTokenizer, because transformers is not installed")
    assert tokenizer is not None
    _check_kind(tokenizer, folder)
    _check_added_ids(tokenizer, folder)
    if (with_template := _with_cls_and_sep(tokenizer)) is not None:
        notes.append(f"{RunLayout.TOKENIZER} added no special tokens: it now adds CLS and SEP")
        return with_template, notes
    return tokenizer, notes


def _require_older_files(folder: Path, has_transformers: bool) -> None:
    """Raise TokenizerError if a folder without tokenizer.json can't be converted."""
    if not any(file for pattern in _OLDER_FILES for file in folder.glob(pattern)):
        raise TokenizerError(
            f"no tokenizer found: neither {RunLayout.TOKENIZER} nor {', '.join(_OLDER_FILES)}",
            location=str(folder),
            hint="copy the files of the tokenizer into this folder",
        )
    if not has_transformers:
        raise TokenizerError(
            f"this tokenizer has no {RunLayout.TOKENIZER}, and its conversion needs transformers",
            location=str(folder),
            hint='install it: pip install "unmask[hub]"',
        )


@contextmanager
def _without_byte_order_marks(folder: Path) -> Generator[Path]:
    """Yield a folder; if one of its text files starts with a byte order mark, a copy of the tokenizer without them.

    For transformers, the mark in vocab.txt is a part of the first token.
    """
    small = [file for file in sorted(folder.iterdir()) if file.suffix in _TOKENIZER_SUFFIXES and file.is_file()]
    if not any(_starts_with_mark(file) for file in small):
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        for file in small:
            (Path(copy) / file.name).write_bytes(file.read_bytes().removeprefix(codecs.BOM_UTF8))
        yield Path(copy)


def _starts_with_mark(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def _as_auto_tokenizer(folder: Path, own: Tokenizer | None) -> tuple[Tokenizer, str]:
    """Return a tokenizer with the ids of AutoTokenizer, and a note if tokenizer.json gives other ids.

    Args:
        folder: Folder of the tokenizer.
        own: Tokenizer of its tokenizer.json; None if there is none.
    """
    with quiet_transformers():
        auto = _auto_tokenizer(folder)
        _check_class(auto, folder)
        texts = _texts(own, auto)
        first_difference = "" if own is None else _difference(auto, own, texts)
        if own is not None and not first_difference:
            return own, ""
        backend = _backend(auto, folder)
        difference = _difference(auto, backend, texts)
    if own is not None and not difference:
        old, new = own.vocabulary(), backend.vocabulary()
        if moved := [token for token, number in old.items() if new.get(token) != number]:
            difference = f"{len(moved):,} tokens of {RunLayout.TOKENIZER} have other ids, such as {moved[0]!r}"
    if difference:
        raise TokenizerError(
            f"{type(auto).__name__}, which AutoTokenizer uses for this folder, gives other ids: {difference}",
            location=str(folder),
            hint=f"correct tokenizer_config.json; if {RunLayout.TOKENIZER} is right, set tokenizer_class to "
            '"PreTrainedTokenizerFast"',
        )
    note = f"used the ids of AutoTokenizer ({type(auto).__name__}), not of {RunLayout.TOKENIZER}: {first_difference}"
    return backend, note if own is not None else ""


def _auto_tokenizer(folder: Path) -> Any:
    import transformers

    auto_class: Any = transformers.AutoTokenizer
    hint = f"check its files and tokenizer_class in tokenizer_config.json, or add a {RunLayout.TOKENIZER}"
    with library_errors("transformers can't load this tokenizer", hint=hint):
        return auto_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _check_class(auto: Any, folder: Path) -> None:
    """Raise TokenizerError if AutoTokenizer's class has no tokenizer.json, or reads none of the folder's files."""
    name = type(auto).__name__
    if not getattr(auto, "is_fast", False):
        raise TokenizerError(
            f"{name} splits text in Python, which no {RunLayout.TOKENIZER} can express",
            location=str(folder),
            hint="use a checkpoint with a fast tokenizer, or pretrain with a tokenizer of this package",
        )
    read = {str(file) for file in type(auto).vocab_files_names.values()} | {RunLayout.TOKENIZER}
    if not any((folder / file).is_file() for file in read):
        raise TokenizerError(
            f"transformers makes a tokenizer without regular tokens from this folder: {name} reads "
            f"{' or '.join(sorted(read))}, and there is neither",
            location=str(folder),
            hint="copy that file into the folder, or correct tokenizer_class in tokenizer_config.json",
        )


def _backend(auto: Any, folder: Path) -> Tokenizer:
    """Return the tokenizer.json that AutoTokenizer saves, as a tokenizer."""
    with tempfile.TemporaryDirectory() as converted:
        with library_errors("transformers can't save this tokenizer", hint="check its files"):
            auto.save_pretrained(converted)
        try:
            tokenizer = Tokenizer.load(Path(converted))
        except TokenizerError as error:
            raise error.at(location=str(folder)) from None
    if not len(tokenizer.regular_token_ids):  # transformers doesn't report files that don't fit the class
        raise TokenizerError(
            "transformers made a tokenizer without regular tokens from this folder",
            location=str(folder),
            hint="check that the files of the tokenizer fit tokenizer_class in tokenizer_config.json",
        )
    return tokenizer


def _check_kind(tokenizer: Tokenizer, folder: Path) -> None:
    """Raise TokenizerError if a WordPiece model has a vocabulary of SentencePiece or of BPE."""
    model = json.loads(tokenizer.to_json())["model"]
    if model.get("type") != "WordPiece":
        return
    vocabulary = list(model["vocab"])
    prefix = model.get("continuing_subword_prefix", "##")
    if any(token.startswith(prefix) for token in vocabulary):
        return
    for mark, kind in (("\u2581", "SentencePiece"), ("@@", "BPE")):
        marked = sum(mark in token for token in vocabulary)
        if marked > _MAX_FOREIGN * len(vocabulary):
            raise TokenizerError(
                f"the vocabulary is of {kind}, not of WordPiece: {marked:,} of {len(vocabulary):,} tokens "
                f"contain {mark!r}",
                location=str(folder),
                hint=f"name the right tokenizer_class in tokenizer_config.json, or add a {RunLayout.TOKENIZER}",
            )


def _check_added_ids(tokenizer: Tokenizer, folder: Path) -> None:
    """Raise TokenizerError if an added token has another id than in the files of the folder.

    transformers doesn't report that it gives these tokens other ids, while their embeddings stay.
    """
    for file, token, id in _added_ids(folder):
        own_id = tokenizer.token_to_id(token)
        if own_id != id or isinstance(id, bool):
            raise TokenizerError(
                f"the token {token!r} has the id {id!r} in {file}, but the tokenizer gives it "
                f"{'none' if own_id is None else own_id}",
                location=str(folder / file),
                hint=f"correct {file}, or give the token this id in the vocabulary",
            )


def _added_ids(folder: Path) -> Generator[tuple[str, str, Any]]:
    """Yield file name, token and id of the added tokens in added_tokens.json and tokenizer_config.json."""
    for file in (_ADDED, _CONFIG):
        content: Any = read_json(folder / file) if (folder / file).is_file() else {}
        if not isinstance(content, dict):
            raise TokenizerError(
                "expected a JSON object", location=str(folder / file), hint="restore the file from a copy"
            )
        entries = cast("dict[str, Any]", content)
        if file == _ADDED:
            yield from ((file, token, id) for token, id in entries.items())
            continue
        decoder: Any = entries.get("added_tokens_decoder")
        for id, token in cast("dict[str, Any]", decoder if isinstance(decoder, dict) else {}).items():
            name: Any = cast("dict[str, Any]", token).get("content") if isinstance(token, dict) else token
            if isinstance(name, str):
                yield file, name, int(id) if id.isdecimal() else id


def _texts(own: Tokenizer | None, auto: Any) -> list[str]:
    """Return texts for a comparison of ids: languages, case, accents, spaces, special tokens and vocabulary."""
    vocabulary = sorted(auto.get_vocab().items(), key=lambda item: (item[1], item[0]))
    chosen = [token for token, _ in vocabulary[:: max(1, len(vocabulary) // _VOCABULARY_TEXTS)]]
    names = [str(token) for token in auto.all_special_tokens]
    names += [str(token) for token in auto.get_added_vocab()][:_VOCABULARY_TEXTS]
    if own is not None:
        names += [own.id_to_token(number) for number in own.special_ids]
    around = [variant for name in dict.fromkeys(names) for variant in (f"a {name} b", f"a{name}b", f"{name} {name}")]
    cased = [variant for text in SENTENCES for variant in (text, text.upper())]
    plain = [token.replace("\u2581", " ").replace("\u0120", " ").removeprefix("##") for token in chosen]
    return [*cased, *_UNUSUAL, *around, " ".join(chosen), "".join(plain), " ".join(plain)]


def _difference(auto: Any, tokenizer: Tokenizer, texts: Sequence[str]) -> str:
    """Return how the ids of AutoTokenizer first differ from those of a tokenizer; "" if they don't."""
    for role in ("mask_token", "unk_token", "pad_token", "cls_token", "sep_token"):
        token, own_id = getattr(auto, role, None), tokenizer.role_id(role)
        if token is not None and own_id is not None and auto.convert_tokens_to_ids(str(token)) != own_id:
            return f"{role} is {token!s}, not {tokenizer.id_to_token(own_id)}"
    for token, number in auto.get_vocab().items():
        own_id = tokenizer.token_to_id(token)
        if own_id is not None and own_id != number:
            return f"{token!r} has the id {number} instead of {own_id}"
    hint = f"restore {RunLayout.TOKENIZER} and tokenizer_config.json from a copy"
    with library_errors("this tokenizer can't encode text", hint=hint):
        all_ids: list[list[int]] = auto(list(texts), add_special_tokens=False)["input_ids"]
        framed: list[list[int]] = auto(list(texts))["input_ids"]
        all_encoded = [tokenizer.encode(text, specials_in_text=True) for text in texts]
    needs_frame = json.loads(tokenizer.to_json()).get("post_processor") is not None
    for text, encoded, auto_ids, auto_framed in zip(texts, all_encoded, all_ids, framed, strict=True):
        pairs = [(list(auto_ids), encoded.ids.tolist())]
        if needs_frame or list(auto_framed) != list(auto_ids):
            pairs.append((list(auto_framed), tokenizer.add_special_tokens(encoded.ids, encoded.marks)[0].tolist()))
        for expected, ids in pairs:
            if expected != ids:
                place = next((i for i, (a, b) in enumerate(zip(expected, ids, strict=False)) if a != b), 0)
                return f"{expected[place : place + 5]} instead of {ids[place : place + 5]} in {text[:40]!r}"
    return ""


def _with_cls_and_sep(tokenizer: Tokenizer) -> Tokenizer | None:
    """Return the tokenizer with a post-processor that adds CLS and SEP; None if it has one or lacks these tokens."""
    if json.loads(tokenizer.to_json()).get("post_processor") is not None or tokenizer.cls_sep_ids is None:
        return None
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    cls_id, sep_id = tokenizer.cls_sep_ids
    first, last = tokenizer.id_to_token(cls_id), tokenizer.id_to_token(sep_id)
    inner.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(first, cls_id), (last, sep_id)],
    )
    return tokenizer.with_json(inner.to_str())
