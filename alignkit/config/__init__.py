"""The typed config of every command: its stages, what contradicts what, and how it is typed. No torch."""

from alignkit.core import lazy

__all__, __getattr__ = lazy.names(
    __name__,
    {
        "components": "stages",
        "config_hash": "stages",
        "load": "stages",
        "register": "stages",
        "save": "stages",
        "to_config": "stages",
    },
    ("config.stages",),
)
