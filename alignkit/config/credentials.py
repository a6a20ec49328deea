"""No key, token or password in a config: it is written to config.yaml and to batch scripts, and told to trackers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from alignkit.core.errors import InputError

NAME = re.compile(r"(?:^|_)(?:API_?)?(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
ASSIGNED = re.compile(r"""\b(\w+)=(["']?)(?!\$|["'])[^\s"']""")  # NAME=value, not NAME=$OTHER
IN_URL = re.compile(r"\w+://[^/\s:@]*:[^/\s@]+@")  # https://user:password@host
SHORTEST = 8  # characters: a shorter value is found by chance


def check(texts: Iterable[tuple[str, str]], environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a config in which a secret stands. What it is does not appear in the message.

    Args:
        texts: (key, text) of all texts.

    Raises:
        InputError: naming the key, and the variable that holds it or is set.
    """
    secrets = {
        name: value
        for name, value in environment.items()
        if NAME.search(name) and len(value) >= SHORTEST and not os.path.exists(value)
    }
    fix = "the ranks have the environment of the command (under Slurm that of sbatch): export it there and leave it out here"
    for key, text in texts:
        name = next((name for name, value in secrets.items() if value in text), None)
        if name is not None:
            raise InputError(f"{key} holds what {name} is set to, and would be written to files: {fix}")
        if key.startswith("launcher.env.") or ".launcher.env." in key:
            if NAME.search(key.rpartition(".")[2]) and text:
                raise InputError(f"{key} sets a secret, and would be written to files: {fix}")
        elif ".setup." in key or ".flags." in key:
            for found in ASSIGNED.finditer(text):
                if NAME.search(found[1]):
                    raise InputError(
                        f"{key} sets {found[1]}, and would be written to files: {fix}, or have it read: {found[1]}=$(cat FILE)"
                    )
        if IN_URL.search(text):
            raise InputError(f"{key} holds a password in a URL, and would be written to files: {fix}")
