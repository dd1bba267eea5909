"""Pretraining objectives, each in its own file: what is masked, and which predictions the loss scores."""

from unmask.objectives.adaptive import AdaptiveMaskingConfig
from unmask.objectives.causal import CausalLMConfig, MaskedNextTokenConfig
from unmask.objectives.diffusion import MaskedDiffusionConfig
from unmask.objectives.mlm import MaskedLMConfig
from unmask.objectives.rtd import ReplacedTokenConfig
from unmask.objectives.sentence_pairs import BertPretrainingConfig

ObjectiveConfig = (
    MaskedLMConfig
    | BertPretrainingConfig
    | CausalLMConfig
    | MaskedNextTokenConfig
    | MaskedDiffusionConfig
    | AdaptiveMaskingConfig
    | ReplacedTokenConfig
)

__all__ = ["ObjectiveConfig"]
