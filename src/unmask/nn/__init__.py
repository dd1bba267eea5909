"""Room card: the nets. Texts end to end come in, one vector per slot goes out; and what others call their weights."""

from unmask.nn.build import EncoderSettings, build, flops_per_token, parameters
from unmask.nn.modern import ModernSettings
from unmask.nn.tutorial import TutorialSettings

__all__ = ["EncoderSettings", "ModernSettings", "TutorialSettings", "build", "flops_per_token", "parameters"]
