"""Data sets: found, read, brought to one layout, validated; templates, ends and tokens of what they hold."""

from alignkit.core import lazy

__all__, __getattr__ = lazy.names(
    __name__,
    {
        "Data": "dataset",
        "PromptSampler": "tokens",
        "fingerprint": "dataset",
    },
    ("data.dataset",),
)
