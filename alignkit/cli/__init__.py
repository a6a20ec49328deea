"""The command line."""

from alignkit.cli.entry import main as main
