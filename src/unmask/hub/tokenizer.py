"""Room card: a tokenizer from whatever files a folder has.

Comes in: a folder that others have written. Goes out: a Tokenizer, and in sentences what was made of older files.
Called by: importing.

tokenizer.json is opened as it is. Where there is none, it is made from vocab.txt (BERT's WordPiece) or from vocab.json
and merges.txt (byte-level BPE), as `transformers` itself would read them. SentencePiece models need a library that is
not used here, and are refused with a way out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from unmask.core import files
from unmask.core.errors import TokenizerError
from unmask.tokenization.settings import LONGEST_WORD, PREFIX
from unmask.tokenization.tokenizer import Tokenizer, roles_in

WHOLE: Final = "tokenizer.json"
_CONFIG, _PIECES, _JSON, _MERGES, _ADDED = (
    "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json",
)  # fmt: skip
_SENTENCEPIECE: Final = ("*.model", "*.spm")
_WORDPIECE_ROLES: Final = {
    "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
}  # fmt: skip
_BPE_ROLES: Final = {
    "pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>",
}  # fmt: skip
_SAVE_WHOLE: Final = (
    "in `transformers`: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), which writes tokenizer.json"
)


def open_tokenizer(folder: Path) -> tuple[Tokenizer, list[str]]:
    """The tokenizer of a folder, and what is to be said of it.

    Raises:
        TokenizerError: there is none, it can't be read or made, or it has no mask.
    """
    if (folder / WHOLE).is_file():
        tokenizer, said = Tokenizer.load(folder), list[str]()
    elif (folder / _PIECES).is_file():
        tokenizer, said = _from_pieces(folder)
    elif (folder / _JSON).is_file() and (folder / _MERGES).is_file():
        tokenizer, said = _from_merges(folder)
    else:
        models_here = sorted(file.name for pattern in _SENTENCEPIECE for file in folder.glob(pattern))
        if models_here:
            raise TokenizerError(
                f"the tokenizer is a SentencePiece model ({models_here[0]}), which is not read here",
                location=str(folder),
                hint=f"{_SAVE_WHOLE} (it needs the sentencepiece library)",
            )
        raise TokenizerError(
            f"there is no tokenizer here: neither {WHOLE}, {_PIECES} nor {_JSON} with {_MERGES}",
            location=str(folder),
            hint="copy the tokenizer's files into this folder",
        )
    framed = _with_a_frame(tokenizer)
    if framed is not None:
        return framed, [*said, "tokenizer.json set nothing around a text: it now sets the special pieces"]
    return tokenizer, said


def _from_pieces(folder: Path) -> tuple[Tokenizer, list[str]]:
    """BERT's WordPiece from its list of pieces, one a line."""
    config, roles = _told(folder), _WORDPIECE_ROLES | roles_in(folder)
    pieces = _lines(folder / _PIECES)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise TokenizerError("a piece stands twice in this list", location=str(folder / _PIECES), hint=_SAVE_WHOLE)
    _check_roles(roles, vocabulary, folder / _PIECES, ("unk_token", "mask_token"))
    inner = tokenizers.Tokenizer(
        models.WordPiece(
            vocabulary,
            unk_token=roles["unk_token"],
            continuing_subword_prefix=PREFIX,
            max_input_chars_per_word=LONGEST_WORD,
        )
    )
    lower, accents = bool(config.get("do_lower_case", True)), config.get("strip_accents")
    chinese = bool(config.get("tokenize_chinese_chars", True))
    inner.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=chinese, strip_accents=accents, lowercase=lower
    )
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(prefix=PREFIX)
    _add(inner, config, roles, folder)
    where = "" if "do_lower_case" in config else " (no tokenizer_config.json says otherwise)"
    case = "lower-cases" if lower else "keeps capital letters"
    return Tokenizer(inner, roles), [f"{WHOLE} was made from {_PIECES}: it {case}{where}"]


def _from_merges(folder: Path) -> tuple[Tokenizer, list[str]]:
    """Byte-level BPE from its pieces and merges."""
    config, roles = _told(folder), _BPE_ROLES | roles_in(folder)
    vocabulary: Any = files.read_json(folder / _JSON)
    merges = [tuple(line.split(" ")) for line in _lines(folder / _MERGES) if line and not line.startswith("#version")]
    try:
        model = models.BPE(vocab=vocabulary, merges=cast("list[tuple[str, str]]", merges), fuse_unk=False)
    except Exception as error:  # the library raises nothing more exact
        raise TokenizerError(
            f"{_JSON} and {_MERGES} don't fit together: {error}", location=str(folder), hint="fetch them anew"
        ) from error
    _check_roles(roles, cast("Mapping[str, int]", vocabulary), folder / _JSON, ("mask_token",))
    inner = tokenizers.Tokenizer(model)
    leads = bool(config.get("add_prefix_space", False))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=leads)
    inner.decoder = decoders.ByteLevel()
    _add(inner, config, roles, folder)
    return Tokenizer(inner, roles), [f"{WHOLE} was made from {_JSON} and {_MERGES}: byte-level BPE"]


def _told(folder: Path) -> Mapping[str, Any]:
    told: Any = files.read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    if not isinstance(told, dict):
        raise TokenizerError("no table of settings", location=str(folder / _CONFIG), hint="restore it from a copy")
    return cast("Mapping[str, Any]", told)


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"not readable: {error}", location=str(file), hint="restore it from a copy") from error
    lines = [line.removesuffix("\r") for line in lines]
    return lines[:-1] if lines and not lines[-1] else lines


def _check_roles(roles: Mapping[str, str], vocabulary: Mapping[str, int], file: Path, needed: Sequence[str]) -> None:
    for role in needed:
        if roles[role] not in vocabulary:
            raise TokenizerError(
                f"{roles[role]!r}, the {role.replace('_', ' ')}, is not among the pieces",
                location=str(file),
                hint=f"name the piece in {_CONFIG}: {{{json.dumps(role)}: ...}}",
            )


def _add(inner: tokenizers.Tokenizer, config: Mapping[str, Any], roles: Mapping[str, str], folder: Path) -> None:
    """Mark the special pieces, and add what stands beside the vocabulary under the ids that it is said to have."""
    for role, piece in roles.items():
        if inner.token_to_id(piece) is not None:
            takes_space = role == "mask_token" and _takes_space(inner, config)
            inner.add_special_tokens([AddedToken(piece, special=True, normalized=False, lstrip=takes_space)])
    later: dict[int, tuple[str, bool]] = {}
    if (folder / _ADDED).is_file():
        told = cast("Mapping[str, int]", files.read_json(folder / _ADDED))
        later |= {int(number): (piece, piece in roles.values()) for piece, number in told.items()}
    for number, entry in cast("Mapping[str, Mapping[str, Any]]", config.get("added_tokens_decoder") or {}).items():
        later[int(number)] = (str(entry["content"]), bool(entry.get("special", False)))
    for number, (piece, special) in sorted(later.items()):
        if inner.token_to_id(piece) is None or special:
            takes_space = piece == roles["mask_token"] and _takes_space(inner, config)
            inner.add_tokens([AddedToken(piece, special=special, normalized=not special, lstrip=takes_space)])
        if inner.token_to_id(piece) != number:
            raise TokenizerError(
                f"the added piece {piece!r} would have the id {inner.token_to_id(piece)}, not {number}",
                location=str(folder),
                hint=_SAVE_WHOLE,
            )


def _takes_space(inner: tokenizers.Tokenizer, config: Mapping[str, Any]) -> bool:
    """Whether a mask takes the space before it: RoBERTa's does, which version 5 of `transformers` forgets."""
    said = config.get("mask_token")
    if isinstance(said, dict) and "lstrip" in said:
        return bool(cast("Mapping[str, Any]", said)["lstrip"])
    return not isinstance(inner.model, models.WordPiece)


def _with_a_frame(tokenizer: Tokenizer) -> Tokenizer | None:
    """The tokenizer that sets [CLS] and [SEP] around a text, where it has them and sets nothing; else None."""
    whole = json.loads(tokenizer.to_json())
    if whole.get("post_processor") is not None or tokenizer.cls_sep_ids is None:
        return None
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    first, last = (tokenizer.id_to_token(number) for number in tokenizer.cls_sep_ids)
    inner.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(first, tokenizer.cls_sep_ids[0]), (last, tokenizer.cls_sep_ids[1])],
    )
    return tokenizer.changed(inner.to_str())
