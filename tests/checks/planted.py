"""Maskers with one fault each, and a correct one, for the tests of the audit."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.tokenization.tokenizer import Tokenizer


class Honest:
    """BERT's rule, with draws from PyTorch's global generator."""

    def __init__(self, tokenizer: Tokenizer, rate: float = 0.15, split: tuple[float, float] = (0.8, 0.1)) -> None:
        self.rate, self.split = rate, split
        self.mask_id = tokenizer.mask_id
        self.padding_id = tokenizer.role_id("pad_token")
        self.special = torch.tensor(tokenizer.special_ids)
        self.regular_ids = torch.from_numpy(tokenizer.regular_token_ids)

    def generator(self, ids: Tensor) -> torch.Generator | None:
        return None

    def rates(self, ids: Tensor, maskable: Tensor) -> Tensor:
        return torch.full(ids.shape, self.rate) * maskable

    def drawn(self, ids: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.regular_ids[torch.randint(len(self.regular_ids), ids.shape, generator=generator)]

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        generator = self.generator(ids)
        maskable = ~torch.isin(ids, self.special)
        masked = torch.rand(ids.shape, generator=generator) < self.rates(ids, maskable)
        action = torch.rand(ids.shape, generator=generator)
        shown = torch.where(masked & (action < self.split[0]), self.mask_id, ids)
        is_random = masked & (action >= self.split[0]) & (action < sum(self.split))
        shown = torch.where(is_random, self.drawn(ids, generator), shown)
        return shown, torch.where(masked, ids, -100)


class MasksCls(Honest):
    def rates(self, ids: Tensor, maskable: Tensor) -> Tensor:
        rates = super().rates(ids, maskable)
        rates[:, 0] = 0.15
        return rates


class MasksPadding(Honest):
    def rates(self, ids: Tensor, maskable: Tensor) -> Tensor:
        return super().rates(ids, maskable | (ids == self.padding_id))


class DrawsSpecials(Honest):
    def drawn(self, ids: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.randint(int(self.regular_ids.max()) + 1, ids.shape, generator=generator)


class DrawsInvalidIds(Honest):
    def drawn(self, ids: Tensor, generator: torch.Generator | None) -> Tensor:
        drawn = super().drawn(ids, generator)
        return torch.where(drawn == self.regular_ids[-1], self.regular_ids[-1] + 1000, drawn)


class SameEveryEpoch(Honest):
    """Its draws are a function of its input."""

    def generator(self, ids: Tensor) -> torch.Generator:
        return torch.Generator().manual_seed(int((ids * torch.arange(1, ids.numel() + 1).view(ids.shape)).sum()))


class SameInEveryRank(Honest):
    """Has a generator of its own, with the same seed in every process."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.shared: torch.Generator | None = None

    def generator(self, ids: Tensor) -> torch.Generator:
        self.shared = self.shared or torch.Generator().manual_seed(7)
        return self.shared


class SameInEveryWorker(SameInEveryRank):
    """Its seed is the same for all workers of a loader."""

    def generator(self, ids: Tensor) -> torch.Generator:
        if self.shared is None:
            worker = torch.utils.data.get_worker_info()
            self.shared = torch.Generator().manual_seed((worker.seed - worker.id) if worker else torch.initial_seed())
        return self.shared


class WrongLabels(Honest):
    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        shown, labels = super().__call__(ids)
        wrong = (labels != -100) & (torch.rand(ids.shape) < 0.01)
        return shown, torch.where(wrong, labels + 1, labels)


class ChangesUnmasked(Honest):
    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        shown, labels = super().__call__(ids)
        changed = (labels == -100) & ~torch.isin(ids, self.special) & (torch.rand(ids.shape) < 0.001)
        return torch.where(changed, self.regular_ids[0], shown), labels


class SkipsSamples(Honest):
    """Masks nothing in about every eighth sample, and more in the others."""

    def rates(self, ids: Tensor, maskable: Tensor) -> Tensor:
        left_out = torch.rand(len(ids), 1) < 0.125
        return torch.where(left_out, 0.0, super().rates(ids, maskable) / 0.875)


class NeverFirst(Honest):
    def rates(self, ids: Tensor, maskable: Tensor) -> Tensor:
        rates = super().rates(ids, maskable)
        rates[:, 1] = 0.0
        return rates


class FewerInShort(Honest):
    """Masks 12 % of samples of up to 63 tokens, and more of longer ones, so that the mean is as claimed."""

    def rates(self, ids: Tensor, maskable: Tensor) -> Tensor:
        tokens = maskable.sum(dim=1, keepdim=True)
        of_sample = torch.where(tokens <= 63, 0.12, torch.where(tokens < 126, 0.1601, 0.15))
        return of_sample * maskable


class HalfWords(Honest):
    """Whole words by the ## of WordPiece tokens, except for one continuation in fifty."""

    def __init__(self, tokenizer: Tokenizer, miss_rate: float = 0.02) -> None:
        super().__init__(tokenizer)
        self.miss_rate = miss_rate
        self.is_continuation = torch.tensor(
            [tokenizer.id_to_token(number).startswith("##") for number in range(tokenizer.size)]
        )

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        maskable = ~torch.isin(ids, self.special)
        masked = (torch.rand(ids.shape) < self.rate) & maskable
        for position in range(2, ids.shape[1]):
            follows = self.is_continuation[ids[:, position]] & maskable[:, position - 1]
            kept = torch.rand(len(ids)) >= self.miss_rate
            masked[:, position] = torch.where(follows, masked[:, position - 1] & kept, masked[:, position])
        return torch.where(masked, self.mask_id, ids), torch.where(masked, ids, -100)


class FitsQuota(Honest):
    """Whole words in random order, each if it fits into the rest of ⌊r·n + u⌋ tokens: short words fit more often."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.is_continuation = torch.tensor(
            [tokenizer.id_to_token(number).startswith("##") for number in range(tokenizer.size)]
        )

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        maskable = ~torch.isin(ids, self.special)
        follows = self.is_continuation[ids] & maskable
        follows[:, 1:] &= maskable[:, :-1]
        masked = torch.zeros_like(maskable)
        for row, word_of_token in enumerate(torch.cumsum(~follows, dim=1)):
            words, sizes = torch.unique(word_of_token[maskable[row]], return_counts=True)
            remaining = int(self.rate * int(sizes.sum()) + float(torch.rand(1)))
            for index in torch.randperm(len(words)).tolist():
                if sizes[index] <= remaining:
                    remaining -= int(sizes[index])
                    masked[row] |= word_of_token == words[index]
        return torch.where(masked, self.mask_id, ids), torch.where(masked, ids, -100)


def without_labels(ids: Tensor) -> Tensor:
    """Return no labels: not a masker."""
    return ids
