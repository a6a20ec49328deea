"""alignkit: SFT, reward model and PPO from one configuration."""

__version__ = "0.1.0"
