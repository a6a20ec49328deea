"""Runs in a queue: what is submitted, where it stands, how it goes on."""

from alignkit.core import lazy

__all__, __getattr__ = lazy.names(
    __name__,
    {
        "Queue": "queue",
        "first_error": "steps",
        "status": "steps",
    },
    ("jobs.steps",),
)
