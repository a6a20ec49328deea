"""Models: their files against their config, loading, adapters, score heads, what an architecture needs."""

from alignkit.core import lazy

__all__, __getattr__ = lazy.names(
    __name__,
    {
        "Model": "config",
        "load_policy": "loading",
        "load_reward": "loading",
        "resolve_model": "source",
    },
    ("models.loading", "models.config", "models.score_heads", "models.loaded"),
)
