"""Models that a run keeps when it has seen certain numbers of words (`train.keep_at`), as in the BabyLM challenge.

Words are runs of characters between white space, whatever the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence

from unmask.core.errors import RecipeError
from unmask.core.files import RunLayout
from unmask.core.quantities import Quantity
from unmask.core.types import ProgressCallback
from unmask.data.prepare import TokenizedCorpus
from unmask.data.sources import BaseSource
from unmask.training.plan import Plan

_MAX_KEPT = 1_000
# Of the words that `keep_at` names, the part that may be missing after the last step. Ten epochs of a text without its
# held-out documents have a little fewer words than ten times the text.
_MAX_MISSING = 0.02


def check_keep_at(keep_at: Sequence[Quantity]) -> None:
    """Checks the numbers of words of `train.keep_at`.

    Raises:
        RecipeError: one is not a whole number of words, they don't rise, or they are too many.
    """
    for quantity in keep_at:
        if quantity.unit != "words" or quantity.number < 1 or quantity.number % 1:
            raise RecipeError(
                f"invalid keep_at: got {quantity}, expected a whole number of words",
                location="keep_at",
                hint='write for example ["1M words", "2M words"]',
            )
    numbers = [quantity.number for quantity in keep_at]
    if sorted(set(numbers)) != numbers:
        raise RecipeError(
            f"invalid keep_at: {', '.join(map(str, keep_at))} don't rise",
            location="keep_at",
            hint="name each number of words once, the smallest first",
        )
    if len(numbers) > _MAX_KEPT:
        raise RecipeError(
            f"invalid keep_at: got {len(numbers):,} numbers of words, expected at most {_MAX_KEPT:,}",
            location="keep_at",
            hint="keep fewer models",
        )


def kept_name(words: int) -> str:
    """Returns the name of the folder of a model kept at a number of words: "chck_1M", "chck_1000M", "chck_500k"."""
    for unit, power in (("M", 10**6), ("k", 10**3)):
        if words % power == 0:
            return f"{RunLayout.KEPT}{words // power}{unit}"
    return f"{RunLayout.KEPT}{words}"


class KeptModels:
    """Knows after which steps of a run a model is kept."""

    def __init__(
        self, keep_at: Sequence[Quantity], plan: Plan, epoch_tokens: Sequence[int], words: int, tokens: int
    ) -> None:
        """Create it for a run that has processed `tokens` tokens.

        Args:
            keep_at: Numbers of words seen at which a model is kept.
            plan: Plan of the run.
            epoch_tokens: Tokens of one epoch at the length of each stage.
            words: Words of the training text.
            tokens: Tokens that the run has processed so far. A model that these have reached is not kept again.
        """
        self._numbers = [round(quantity.number) for quantity in keep_at]
        self._plan, self._epoch_tokens, self._words = plan, epoch_tokens, words
        self._seen = self.words_seen(tokens)

    def words_seen(self, tokens: int) -> float:
        """Returns how many words the first `tokens` tokens of the run contain. Words of each epoch count again.

        Samples are drawn in a random order, so the number is that of the text on average, not of these samples.
        """
        return self._plan.epochs(tokens, self._epoch_tokens) * self._words

    def reached(self, tokens: int, *, is_last: bool) -> list[str]:
        """Returns the names of the models to keep now that the run has processed `tokens` tokens."""
        before, self._seen = self._seen, self.words_seen(tokens)
        enough = self._seen / (1 - _MAX_MISSING) if is_last else self._seen
        return [kept_name(number) for number in self._numbers if before < number <= enough]

    def go_back(self, tokens: int) -> None:
        """Makes models due again that the run reaches after its first `tokens` tokens, to which it went back."""
        self._seen = self.words_seen(tokens)

    def describe(self) -> str:
        """Returns the words of text and plan, and the models that the plan doesn't reach, as a sentence."""
        planned = self.words_seen(self._plan.tokens)
        beyond = [kept_name(number) for number in self._numbers if number * (1 - _MAX_MISSING) > planned]
        missing = f"; the plan doesn't reach {', '.join(beyond)} (train.keep_at)" if beyond else ""
        return f"words: {self._words:,} in the training text, {planned:,.0f} with repeats in the plan{missing}"


# Words of a text ------------------------------------------------------------------------------------------------------


_REPORT_CHARACTERS = 4_000_000


def count_train_words(corpus: TokenizedCorpus, source: BaseSource, on_progress: ProgressCallback) -> int:
    """Return the number of words of the documents that are trained on.

    The words of the whole text are counted. The share of the training documents is their share of the characters,
    because held-out documents are chosen by a hash. A word is a run of characters between white space, as `wc -w` and
    BabyLM count (arXiv 2301.11796).

    Raises:
        TextError: the text can't be read.
    """
    total = max(1, int(corpus.facts["characters"]))
    words = characters = reported = 0
    for part in source.parts():
        for chunk in source.documents(part):
            words += len(chunk.text.split())
            characters += chunk.characters
            if characters - reported >= _REPORT_CHARACTERS:
                reported = characters
                on_progress("counting words", min(characters / total, 0.99))
    on_progress("counting words", 1.0)
    return round(words * int(corpus.facts["train_characters"]) / total)
