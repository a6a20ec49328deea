"""A real Slurm: one controller and two nodes on this machine, for the whole session of tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests" / "stages"))

CLUSTER = ROOT / "slurm" / "cluster.sh"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """The cluster; the tests are skipped, with the reason, where Slurm is not installed and cannot be."""
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([str(CLUSTER), "up", str(folder)], capture_output=True, text=True, timeout=300)
    if started.returncode:
        installed = shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin")
        if installed and os.geteuid() == 0:
            pytest.fail(f"Slurm is installed, but does not start: {started.stderr}")
        pytest.skip(f"no Slurm here: {started.stderr.strip()}")
    os.environ["SLURM_CONF"] = started.stdout.strip()
    yield Cluster()
    subprocess.run([str(CLUSTER), "down", str(folder)], check=True, timeout=120)
    del os.environ["SLURM_CONF"]


class Cluster:
    """What the tests ask Slurm, without our own code."""

    def ask(self, *command: str, stdin: str | None = None) -> str:
        done = subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def show(self, job: str) -> dict[str, str]:
        """{field: value} as `scontrol show job` has them."""
        words = self.ask("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def until(self, job: str, *states: str, timeout: float = 240) -> str:
        """The state of a job once it is one of these."""
        deadline = time.monotonic() + timeout
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state}, not {' or '.join(states)}, after {timeout} s"
            time.sleep(0.2)
        return state

    def ended(self, job: str, timeout: float = 240) -> str:
        """The state a job ends with."""
        return self.until(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", timeout=timeout)
