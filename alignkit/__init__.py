"""alignkit: SFT, reward model and PPO from one configuration."""

from alignkit.core import before

__version__ = "0.1.0"

before.install()
