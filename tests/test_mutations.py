"""The tests fail when the code is broken: faults planted by `mutate.py`, some in every run, all in a slow one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mutate
import pytest

# One of each kind: notes of the faults in `mutate.FAULTS`.
SOME = [
    "NaN outside the mask is read",
    "the KL is a bonus",
    "a hole in the mask ends the response",
    "sampler over trainer",
    "empty rows count",
    "the loss is not negated",
    "a margin [N, 1] broadcasts to [N, N]",
    "what follows the stop token is kept",
    "the missing-EOS penalty also before normalising",
    "the baseline holds the answer itself",
    "responses start a slot early",
    "ranks make different numbers of micro-batches",
]
HARMLESS = mutate.Fault("training/batches.py", "MAX_PADDING = 0.1", "MAX_PADDING = 0.10 + 0.0", "nothing is wrong")


def run(*arguments: str, more: str = "") -> tuple[subprocess.CompletedProcess, dict]:
    """`mutate.py`, with `more` done to its list before, and what its last line says."""
    code = f"import sys, mutate\n{more}\nsys.exit(mutate.main(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert result.returncode in (0, 1), result.stdout + result.stderr
    return result, json.loads(result.stdout.splitlines()[-1])


def test_every_entry_fits_the_package():
    for fault in mutate.FAULTS:
        mutate.planted(fault, (mutate.PACKAGE / fault.file).read_text())
    assert len({(f.file, f.old, f.new, f.tests) for f in mutate.FAULTS}) == len(mutate.FAULTS)


def test_an_entry_that_does_not_fit_is_named():
    fault = mutate.Fault("training/batches.py", "a = 1", "a = 2", "a is too large")
    assert mutate.planted(fault, "a = 1\n") == "a = 2\n"
    for source, says in (("b = 1\n", "stands 0 times"), ("a = 1\na = 1\n", "stands 2 times")):
        with pytest.raises(mutate.Outdated, match=f"a is too large\n.*{says} in alignkit/training/batches.py"):
            mutate.planted(fault, source)
    with pytest.raises(mutate.Outdated, match=r"a is too large\n.*is not Python"):
        mutate.planted(replace(fault, new="a = ("), "a = 1\n")


def test_some_faults_are_caught_and_what_is_none_is_not():
    """The unchanged copy passes, or `mutate.py` ends with 2."""
    numbers = [[i for i, fault in enumerate(mutate.FAULTS) if fault.note == note] for note in SOME]
    assert [len(found) for found in numbers] == [1] * 12
    harmless = f"mutate.FAULTS.append(mutate.{HARMLESS!r})"
    result, found = run("--only", *(str(n) for (n,) in numbers), str(len(mutate.FAULTS)), more=harmless)
    survivor = f"{len(mutate.FAULTS)} training/batches.py: nothing is wrong"
    assert found == {"faults": 13, "caught": 12, "survived": [survivor]}, result.stdout
    assert result.returncode == 1


@pytest.mark.slow
def test_every_fault_is_caught():
    result, found = run()
    assert found == {"faults": len(mutate.FAULTS), "caught": len(mutate.FAULTS), "survived": []}, result.stdout
    assert result.returncode == 0
