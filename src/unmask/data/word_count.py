"""Number of words of a training text: runs of characters between white space, whatever the tokenizer."""

from __future__ import annotations

from unmask.core.types import ProgressCallback
from unmask.data.prepare import TokenizedCorpus
from unmask.data.sources import BaseSource

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
