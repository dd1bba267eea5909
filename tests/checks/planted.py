"""Maskers with one fault each, and an honest one, for the tests of the audit."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.tokenization.tokenizer import Tokenizer


class Honest:
    """BERT's rule, drawn from PyTorch's global generator."""

    def __init__(self, tokenizer: Tokenizer, rate: float = 0.15, split: tuple[float, float] = (0.8, 0.1)) -> None:
        self.rate, self.split = rate, split
        self.mask_id = tokenizer.mask_id
        self.padding_id = tokenizer.role_id("pad_token")
        self.special = torch.tensor(tokenizer.special_ids)
        self.ordinary = torch.from_numpy(tokenizer.regular_token_ids)

    def generator(self, ids: Tensor) -> torch.Generator | None:
        return None

    def rates(self, ids: Tensor, askable: Tensor) -> Tensor:
        return torch.full(ids.shape, self.rate) * askable

    def drawn(self, ids: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.ordinary[torch.randint(len(self.ordinary), ids.shape, generator=generator)]

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        generator = self.generator(ids)
        askable = ~torch.isin(ids, self.special)
        asked = torch.rand(ids.shape, generator=generator) < self.rates(ids, askable)
        action = torch.rand(ids.shape, generator=generator)
        shown = torch.where(asked & (action < self.split[0]), self.mask_id, ids)
        at_random = asked & (action >= self.split[0]) & (action < sum(self.split))
        shown = torch.where(at_random, self.drawn(ids, generator), shown)
        return shown, torch.where(asked, ids, -100)


class AsksCls(Honest):
    def rates(self, ids: Tensor, askable: Tensor) -> Tensor:
        rates = super().rates(ids, askable)
        rates[:, 0] = 0.15
        return rates


class AsksPadding(Honest):
    def rates(self, ids: Tensor, askable: Tensor) -> Tensor:
        return super().rates(ids, askable | (ids == self.padding_id))


class DrawsSpecials(Honest):
    def drawn(self, ids: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.randint(int(self.ordinary.max()) + 1, ids.shape, generator=generator)


class DrawsStrangers(Honest):
    def drawn(self, ids: Tensor, generator: torch.Generator | None) -> Tensor:
        drawn = super().drawn(ids, generator)
        return torch.where(drawn == self.ordinary[-1], self.ordinary[-1] + 1000, drawn)


class SameEveryEpoch(Honest):
    """Its draws are a function of what it is given."""

    def generator(self, ids: Tensor) -> torch.Generator:
        return torch.Generator().manual_seed(int((ids * torch.arange(1, ids.numel() + 1).view(ids.shape)).sum()))


class SameInEveryRank(Honest):
    """A generator of its own, made with one seed in every process."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.begun: torch.Generator | None = None

    def generator(self, ids: Tensor) -> torch.Generator:
        self.begun = self.begun or torch.Generator().manual_seed(7)
        return self.begun


class SameInEveryWorker(SameInEveryRank):
    """Seeded by what all workers of a loader have in common."""

    def generator(self, ids: Tensor) -> torch.Generator:
        if self.begun is None:
            worker = torch.utils.data.get_worker_info()
            self.begun = torch.Generator().manual_seed((worker.seed - worker.id) if worker else torch.initial_seed())
        return self.begun


class WrongLabels(Honest):
    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        shown, labels = super().__call__(ids)
        wrong = (labels != -100) & (torch.rand(ids.shape) < 0.01)
        return shown, torch.where(wrong, labels + 1, labels)


class ChangesUnasked(Honest):
    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        shown, labels = super().__call__(ids)
        moved = (labels == -100) & ~torch.isin(ids, self.special) & (torch.rand(ids.shape) < 0.001)
        return torch.where(moved, self.ordinary[0], shown), labels


class LeavesRowsOut(Honest):
    """Every eighth sample or so asks nothing; the others ask more."""

    def rates(self, ids: Tensor, askable: Tensor) -> Tensor:
        left_out = torch.rand(len(ids), 1) < 0.125
        return torch.where(left_out, 0.0, super().rates(ids, askable) / 0.875)


class NeverFirst(Honest):
    def rates(self, ids: Tensor, askable: Tensor) -> Tensor:
        rates = super().rates(ids, askable)
        rates[:, 1] = 0.0
        return rates


class FewerOfShort(Honest):
    """Samples of up to 63 tokens ask 12 %, longer ones that are not full more, so that the mean is as promised."""

    def rates(self, ids: Tensor, askable: Tensor) -> Tensor:
        tokens = askable.sum(dim=1, keepdim=True)
        of_sample = torch.where(tokens <= 63, 0.12, torch.where(tokens < 126, 0.1601, 0.15))
        return of_sample * askable


class HalfWords(Honest):
    """Whole words, by the pieces' ## as it was long done, but for one continuation in fifty."""

    def __init__(self, tokenizer: Tokenizer, forgets: float = 0.02) -> None:
        super().__init__(tokenizer)
        self.forgets = forgets
        self.goes_on = torch.tensor(
            [tokenizer.id_to_token(number).startswith("##") for number in range(tokenizer.size)]
        )

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        askable = ~torch.isin(ids, self.special)
        asked = (torch.rand(ids.shape) < self.rate) & askable
        for slot in range(2, ids.shape[1]):
            follows = self.goes_on[ids[:, slot]] & askable[:, slot - 1]
            kept = torch.rand(len(ids)) >= self.forgets
            asked[:, slot] = torch.where(follows, asked[:, slot - 1] & kept, asked[:, slot])
        return torch.where(asked, self.mask_id, ids), torch.where(asked, ids, -100)


def gives_nothing_useful(ids: Tensor) -> Tensor:
    """No masker: the labels are missing."""
    return ids
