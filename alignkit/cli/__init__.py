"""The command line."""

from alignkit.core import lazy

__all__, __getattr__ = lazy.names(__name__, {"main": "entry"}, ("cli.entry",))
