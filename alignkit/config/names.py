"""Names of runs: which letters they may have, and how long the paths below them become."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from alignkit.core.errors import InputError

MARKS = "-_.=,"
PART = 255  # bytes of a name in a folder, on every usual file system
PATH = 4095  # bytes of a whole path, without the zero at its end
# What a run writes in its folder at most: DeepSpeed's checkpoints/partial/checkpoint-1000000/global_step1000000/
# bf16_zero_pp_rank_1000_mp_rank_00_optim_states.pt, and a tracker's files, whose names hold the machine's.
BELOW = 320


def check_run_name(name: str) -> None:
    """Refuse a run name that is no relative path of letters and digits (of any language) and MARKS.

    Raises:
        InputError: naming the letter, or the length, and what is allowed.
    """
    allowed = "use letters and digits of any language, '-', '_', '.', '=', ',' and '/' between parts"
    if unicodedata.normalize("NFC", name) != name:
        raise InputError(
            f"run_name={name!r}: a letter in it is written in two pieces ({_first_piece(name)}), which looks like another "
            f"name and is none: write {unicodedata.normalize('NFC', name)!r} (Unicode's NFC)"
        )
    for part in name.split("/"):
        if part in ("", ".", ".."):
            raise InputError(f"run_name={name!r}: {part or 'an empty name'!r} is no part of a name: {allowed}")
        if odd := [letter for letter in part if not (letter in MARKS or unicodedata.category(letter)[0] in "LMN")]:
            raise InputError(f"run_name={name!r} has {odd[0]!r}: {allowed}")
        if (size := len(os.fsencode(part))) > PART:
            raise InputError(
                f"run_name={name[:40]}…: {part[:20]}… is {size} bytes long, a folder's name has {PART} at most"
            )


def check_length(run_dir: Path) -> None:
    """Refuse a run folder in which the longest file of a run could not be made.

    Raises:
        InputError: naming the length and the room there is.
    """
    for part in run_dir.parts:
        if (size := len(os.fsencode(part))) > PART:
            raise InputError(f"{part[:20]}… in the run folder is {size} bytes long, a folder's name has {PART} at most")
    if (size := len(os.fsencode(os.path.abspath(run_dir)))) > PATH - BELOW:
        raise InputError(
            f"the run folder {str(run_dir)[:40]}… is {size} bytes long with the folders above it; a path has {PATH} and a run "
            f"needs {BELOW} for its files: shorten run_name= or runs_dir="
        )


def _first_piece(name: str) -> str:
    """The first letter that NFC would write in another way, with its code points."""
    letter = next((i for i, mark in enumerate(name) if unicodedata.combining(mark)), 0)
    return " ".join(f"U+{ord(mark):04X}" for mark in name[max(0, letter - 1) : letter + 1])
