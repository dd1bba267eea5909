"""Room card: the data collators of `transformers`, made for a tokenizer of ours.

Comes in: a name ("transformers", with variants after a colon), a Tokenizer. Goes out: the collator, as that library
makes it. Called by: cli, benchmarks.

It is asked for nothing from a network: the tokenizer is handed over as it is.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any, Final

import tokenizers

from unmask.amounts import nearest
from unmask.audit.maskers import Collator, claims_of_collator
from unmask.errors import RecipeError
from unmask.text.tokenizer import Tokenizer

LIBRARY: Final = "transformers"
VARIANTS: Final = ("whole-word", "seeded")
_ROLES: Final = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def library_collator(name: str, tokenizer: Tokenizer, seed: int) -> Collator:
    """`DataCollatorForLanguageModeling` as `transformers[:whole-word][,seeded]` says.

    Raises:
        RecipeError: there is no such variant, or the library isn't installed.
    """
    library, _, said = name.partition(":")
    variants = said.split(",") if said else []
    for variant in variants:
        if variant not in VARIANTS:
            near = nearest(variant, list(VARIANTS))
            raise RecipeError(
                f"there is no variant `{variant}`" + (f": did you mean `{near}`?" if near else ""),
                where=name,
                next=f"choose of {', '.join(VARIANTS)}, as in {LIBRARY}:whole-word,seeded",
            )
    if importlib.util.find_spec(LIBRARY) is None:
        raise RecipeError(
            f"{LIBRARY} is not installed", where=library, next='install it: python -m pip install "unmask[hub]"'
        )
    from transformers import DataCollatorForLanguageModeling

    options: dict[str, Any] = {}
    if "whole-word" in variants:
        options["whole_word_mask"] = True
    if "seeded" in variants:
        options["seed"] = seed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that whole words are always hidden behind [MASK]: it stands in the claims
        made = DataCollatorForLanguageModeling(fast_tokenizer(tokenizer), **options)
    return Collator(made, name, claims_of_collator(made))


def fast_tokenizer(tokenizer: Tokenizer) -> Any:
    """Ours as one of `transformers`, with equal ids."""
    from transformers import PreTrainedTokenizerFast

    roles = {role: tokenizer.id_to_token(number) for role in _ROLES if (number := tokenizer.role_id(role)) is not None}
    inner: Any = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    return PreTrainedTokenizerFast(tokenizer_object=inner, **roles)
