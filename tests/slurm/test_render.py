"""The batch script: golden files, what bash and sbatch say to them, and the fields that are refused."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from alignkit.core.errors import InputError
from alignkit.launch.slurm import Slurm, read_site, render, seconds, template

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).resolve().parents[2]
RUN = [Path("runs/mine/ppo")]

# name: (launcher, further arguments of `render`)
SCRIPTS = {
    "one_node": (Slurm(num_ranks=2, cpus_per_task=2, mem="3000M", time="00:30:00"), {}),
    "four_nodes": (
        Slurm(
            num_ranks=32, nodes=4, gpus_per_node=8, cpus_per_task=12, mem="480G", time="2-00:00:00", partition="gpu", account="rl",
            qos="high", constraint="h100&nvlink", exclude="node[7-8]", reservation="spring", flags=["--mail-type=FAIL"],
            setup=["module load cuda/12.8"], env={"NCCL_SOCKET_IFNAME": "ib0", "NOTE": "it's 5 o'clock"}, threads=4,
        ),
        {"report": True},
    ),
    "pyxis": (
        Slurm(num_ranks=8, gpus_per_node=8, container="nvcr.io/org/image:1", container_mounts=["/data:/data", "/home"]),
        {},
    ),
    "apptainer": (
        Slurm(
            num_ranks=8, gpus_per_node=8, container="/images/alignkit.sif", container_runtime="apptainer",
            container_mounts=["/data:/data"], requeue=False,
        ),
        {},
    ),
    "servers": (
        Slurm(num_ranks=2, gpus_per_node=2, server_nodes=1, server_gpus_per_node=4, mem="3000M", time="00:30:00"),
        {"servers": True},
    ),
    "array": (Slurm(time="01:00:00"), {"run_dirs": [Path(f"runs/sweep/{n}/ppo") for n in range(4)], "at_once": 2}),
}  # fmt: skip
# By the test cluster, which has two nodes with four GPUs each, no accounts and no containers.
JUDGED = ("one_node", "servers", "array")


def script(name: str) -> str:
    launcher, more = SCRIPTS[name][0], dict(SCRIPTS[name][1])
    launcher.check()
    return render(
        launcher,
        "ppo",
        more.pop("run_dirs", RUN),
        template=template(),
        cwd=Path("/project"),
        python="/project/.venv/bin/python",
        **more,
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_is_the_golden_one(name):
    """After a change that is meant: ALIGNKIT_GOLDEN=write pytest tests/slurm/test_render.py, and read the diff."""
    path = GOLDEN / f"{name}.sbatch"
    if os.environ.get("ALIGNKIT_GOLDEN") == "write":
        path.write_text(script(name))
    assert script(name) == path.read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_parses_it_and_nothing_is_left_to_fill_in(name):
    text = script(name)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert not re.search(r"\{\{\w|\bNone\b", text)


@pytest.mark.parametrize("name", JUDGED)
def test_sbatch_takes_it(cluster, name):
    done = subprocess.run(
        ["sbatch", "--test-only"], input=script(name).replace("/project", "/tmp"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_sbatch_refuses_what_the_cluster_does_not_have(cluster):
    """So that the test above can fail."""
    done = subprocess.run(["sbatch", "--test-only"], input=script("four_nodes"), capture_output=True, text=True)
    assert done.returncode != 0 and "invalid" in done.stderr.lower()


def test_values_reach_sbatch_and_the_ranks_as_they_are(cluster, tmp_path):
    """Blanks, quotes and dollar signs in values; what stands in for Python here writes down what a rank finds."""
    odd = "it's $HOME \"5\" o'clock; echo no"
    python = tmp_path / "py thon"
    python.write_text(
        '#!/bin/sh\n[ "$2" = alignkit ] || printf %s "$ODD|$RANK|$WORLD_SIZE|$LOCAL_RANK|$*" >odd.$RANK\n'
    )
    python.chmod(0o755)
    launcher = Slurm(num_ranks=4, nodes=2, env={"ODD": odd}, flags=["--comment='a b'"])
    text = render(launcher, "sft", [Path("runs/a b/sft")], template=template(), cwd=tmp_path, python=str(python))
    (tmp_path / "runs/a b/sft/logs").mkdir(parents=True)
    job = cluster.ask("sbatch", "--parsable", stdin=text).strip()
    assert cluster.ended(job) == "COMPLETED"
    for rank in range(4):
        words = f"{odd}|{rank}|4|{rank % 2}|-m alignkit.worker sft {tmp_path}/runs/a b/sft"
        assert (tmp_path / f"odd.{rank}").read_text() == words
    assert "Comment=a b" in cluster.ask("scontrol", "show", "job", job)
    assert [path.name for path in (tmp_path / "runs/a b/sft/logs").iterdir()] == [f"sft-{job}.log"]


def test_slurm_has_no_arrays_of_heterogeneous_jobs():
    run_dirs = [Path("runs/a/ppo"), Path("runs/b/ppo")]
    with pytest.raises(InputError, match="no arrays of heterogeneous jobs"):
        render(Slurm(server_nodes=1), "ppo", run_dirs, template="", cwd=Path("/"), python="python", servers=True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_ranks": 3, "nodes": 2}, ["launcher.num_ranks=3", "launcher.nodes=2", "try launcher.num_ranks=4"]),
        ({"num_ranks": 8, "nodes": 2, "gpus_per_node": 2}, ["gpus_per_node=2", "4 ranks a node", "num_ranks=4"]),
        ({"container_runtime": "docker"}, ["docker", "pyxis or apptainer"]),
        ({"time": "00:01:00"}, ["launcher.time=00:01:00", "signal_lead_s=120"]),
        ({"time": "43200"}, ["launcher.time=43200", "in quotes"]),
        ({"time": "12:00"}, ["launcher.time=12:00", "hours:minutes:seconds"]),
        ({"env": {"A B": "c"}}, ["'A B'"]),
        ({"server_nodes": 1, "container": "x.sqsh"}, ["server_nodes=1", "rollout.urls"]),
    ],
)
def test_what_cannot_be_is_refused(fields, words):
    with pytest.raises(InputError) as refused:
        Slurm(**fields).check()
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12:00:00", 43200), ("2-00:00:00", 172800), ("1-12", 129600), ("00:02:01", 121), ("1-01:30", 91800)],
)
def test_time_limits_in_seconds(text, expected):
    assert seconds(text) == expected


# ---------------------------------------------------------------------------------------------------------- sites


def test_a_site_fills_what_is_not_set(tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text("partition: gpu\ntime: 12:00:00\nmem: 64G\nrequeue: false\nsetup: [one]\nenv: {A: site, B: site}\n")
    made = Slurm(site=str(site), mem="8G", setup=["two"], env={"A": "mine"}).at_site()
    assert (made.partition, made.time, made.mem, made.requeue) == ("gpu", "12:00:00", "8G", False)
    assert made.setup == ["one", "two"] and made.env == {"A": "mine", "B": "site"}
    assert made.at_site() == made


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partitoin: gpu\n", ["partitoin", "partition"]),
        ("num_ranks: 8\n", ["num_ranks"]),
        ("gpus_per_node: many\n", ["many"]),
        ("- gpu\n", ["mapping"]),
    ],
)
def test_a_site_with_a_mistake_is_refused(tmp_path, text, words):
    site = tmp_path / "site.yaml"
    site.write_text(text)
    with pytest.raises(InputError) as refused:
        Slurm(site=str(site)).at_site()
    assert all(word in str(refused.value) for word in [*words, str(site)]), refused.value


def test_the_example_site_is_one():
    made = read_site(ROOT / "slurm" / "sites" / "example.yaml")
    assert made["time"] == "12:00:00" and made["cpus_per_task"] == 12
    Slurm(**made).check()


def test_a_site_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"there is no file nowhere\.yaml"):
        Slurm(site="nowhere.yaml").at_site()
