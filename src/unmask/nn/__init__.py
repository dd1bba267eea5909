"""Room card: the nets. Texts end to end come in, one vector per slot goes out; and what others call their weights."""

from unmask.nn.build import EncoderSettings, build, build_pair, flops_per_token, parameters, products
from unmask.nn.classic import ClassicSettings
from unmask.nn.modern import ModernSettings
from unmask.nn.tutorial import TutorialSettings

__all__ = [
    "ClassicSettings",
    "EncoderSettings",
    "ModernSettings",
    "TutorialSettings",
    "build",
    "build_pair",
    "flops_per_token",
    "parameters",
    "products",
]
