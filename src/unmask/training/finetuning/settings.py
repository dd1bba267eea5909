"""Settings of fine-tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final, Literal

from unmask.core.config import require
from unmask.core.errors import RecipeError
from unmask.core.quantities import Quantity
from unmask.data.settings import QuotingRule

Task = Literal["classify", "regress", "pair", "tokens"]
Pooling = Literal["cls", "mean"]

# BERT (arXiv 1810.04805, A.3) uses 2e-5 to 5e-5 for width 768. For recipe `tiny` of width 128, on 6,000 film reviews
# and with one seed, 3e-4, 7e-4 and 1.5e-3 gave test accuracies of 77.8, 79.3 and 78.4 %. A power of the width fits
# both.
_LR_AT_768: Final = 5e-5
_LR_POWER: Final = -1.5


@dataclass(frozen=True)
class FieldsConfig:
    """Names of the columns in labeled data; an empty name stands for the first usual one that exists."""

    text: str = ""  # Column of the text; of the tokens for tokens.
    second: str = ""  # Column of the second text; with pair only.
    label: str = ""  # Column of the label; of the tags for tokens.
    # Quotes in .csv and .tsv; csv: they enclose cells; none: they are ordinary characters, each line is a row.
    quoting: QuotingRule = "csv"


@dataclass(frozen=True)
class FinetuneConfig:
    """How a model is fine-tuned."""

    task: Task
    seeds: int = 3  # Number of runs, which differ in the weights of new layers, the order of examples and dropout.
    # Length of training: epochs, steps or seconds of each run.
    budget: Quantity = field(default_factory=lambda: Quantity(4, "epochs"))
    patience: int = 2  # Number of validations without improvement after which a run ends.
    lr: float | None = None  # Peak learning rate of AdamW; None: chosen by the width of the model.
    batch_size: int = 32  # Number of examples per step.
    max_seq_len: int | None = None  # [tokens] Maximum length of a sequence; None: the context, at most 256.
    # Vector of a text; None: mean for ModernBERT, cls for BERT, which has no other. In the experiment above, mean and
    # cls gave 79.3 and 78.4 %.
    pooling: Pooling | None = None
    baselines: bool = False  # Whether the same architecture is trained from random weights, and a bag of words.
    threads: int | None = None  # Number of CPU threads; None: all cores.
    fields: FieldsConfig = field(default_factory=FieldsConfig)

    # Of BERT (arXiv 1810.04805, A.3): linear warm-up over a tenth of the steps, then linear decay to 0.
    warmup: float = 0.1
    weight_decay: float = 0.01
    dropout: float = 0.1  # Before the last linear map; the encoder keeps its own.

    def __post_init__(self) -> None:
        require(self, "seeds", min=1, max=100)
        require(self, "patience", "batch_size", min=1)
        if self.lr is not None:
            require(self, "lr", above=0, below=math.inf)
        if self.max_seq_len is not None:
            require(self, "max_seq_len", min=8)
        if self.budget.unit not in ("epochs", "steps", "seconds") or not self.budget.number > 0:
            raise RecipeError(
                f"invalid budget: got {self.budget}, expected a positive number of epochs, steps or seconds",
                location="--budget",
                hint='give a budget such as "4 epochs", "500 steps" or "60 s"',
            )
        if self.fields.second and self.task != "pair":
            raise RecipeError(
                f"a second text was named for --task {self.task}",
                location=f"--second-field {self.fields.second}",
                hint="choose --task pair, or leave it out",
            )

    def learning_rate(self, hidden_size: int) -> float:
        """Return the peak learning rate for a model of this width."""
        return self.lr if self.lr is not None else round(_LR_AT_768 * (hidden_size / 768) ** _LR_POWER, 6)
