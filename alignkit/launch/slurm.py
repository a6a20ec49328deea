"""Start a stage as a Slurm job: the batch script is rendered from `slurm/stage.sbatch` and submitted by `scheduler.py`.

One `srun` task is one rank, with rank, world and rendezvous from Slurm's own variables, and runs the same
`python -m alignkit.worker` as everywhere. Whether a stage succeeded is its manifest's status, never an exit code.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from alignkit.core import foreign
from alignkit.core.errors import InputError
from alignkit.core.fields import check_numbers, num
from alignkit.launch import ALLOCATOR

# A time limit as Slurm writes it. Bare minutes are left out: YAML reads 12:00:00 without quotes as the number 43200.
TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<h>\d+)(?::(?P<m>\d\d))?(?::(?P<s>\d\d))?")
# Fields that are lines of the script.
DIRECTIVES = ("cpus_per_task", "mem", "time", "partition", "account", "qos", "constraint", "exclude", "reservation")
# What a site says for everyone, and what belongs to one job.
OWN_KEYS = ("name", "num_ranks", "nodes", "after", "site", "server_nodes")


@dataclass
class Slurm:
    """A batch job on a Slurm cluster; None and empty: not asked for, the cluster's own default counts."""

    name: str = "slurm"
    num_ranks: int = num(1, ge=1)  # processes over all nodes: one a GPU
    nodes: int = num(1, ge=1)  # num_ranks is shared out evenly
    gpus_per_node: int | None = num(None, ge=1)
    cpus_per_task: int | None = num(None, ge=1)  # of each rank
    mem: str | None = None  # of each node, as 64G
    time: str | None = None  # wall-clock limit, as 12:00:00 or 2-00:00:00; a job that saved itself gets it anew
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None  # nodes
    reservation: str | None = None
    flags: list[str] = field(default_factory=list)  # further flags of sbatch, as --mail-type=END
    requeue: bool = True  # a job that was told to stop and saved itself is queued again
    max_restarts: int = num(50, ge=0)  # how often
    signal_lead_s: int = num(120, ge=1)  # how long before the time limit the ranks are told to save
    setup: list[str] = field(default_factory=list)  # lines of shell before anything runs, as module load cuda
    env: dict[str, str] = field(default_factory=dict)  # {name: value} exported to the ranks
    threads: int | None = num(None, ge=1)  # CPU threads a rank; None: cpus_per_task
    python: str | None = None  # None: the one that submits; python3 in a container
    container: str | None = None  # image that the ranks run in; the batch script stays outside
    container_runtime: str = "pyxis"  # or apptainer
    container_mounts: list[str] = field(default_factory=list)  # as /data:/data
    server_nodes: int = num(0, ge=0)  # further nodes for the servers of rollout=server: a heterogeneous job
    server_gpus_per_node: int | None = num(None, ge=1)
    after: list[str] = field(default_factory=list)  # ids of jobs that must end well first; an array's task as '12_3'
    at_once: int | None = num(None, ge=1)  # tasks of a sweep's array that run at a time; None: all
    site: str | None = None  # YAML file of these keys, or the name of one in slurm/sites; it fills what is not set here

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.nodes

    def check(self) -> None:
        """Raise InputError where two fields contradict each other."""
        if self.num_ranks % self.nodes:
            better = (self.num_ranks // self.nodes + 1) * self.nodes
            raise InputError(
                f"launcher.num_ranks={self.num_ranks} cannot be shared out evenly over launcher.nodes={self.nodes}; "
                f"try launcher.num_ranks={better}"
            )
        if self.gpus_per_node is not None and self.gpus_per_node < self.ranks_per_node:
            raise InputError(
                f"launcher.gpus_per_node={self.gpus_per_node} for {self.ranks_per_node} ranks a node: each takes one GPU; "
                f"try launcher.num_ranks={self.gpus_per_node * self.nodes}"
            )
        if self.container_runtime not in ("pyxis", "apptainer"):
            raise InputError(f"launcher.container_runtime={self.container_runtime!r}: expected pyxis or apptainer")
        if self.server_nodes and self.container:
            raise InputError(
                f"launcher.server_nodes={self.server_nodes} with launcher.container: rank 0 starts the servers with srun, which "
                "is not in a container; start them yourself and give rollout.urls"
            )
        if self.time is not None and seconds(self.time) <= self.signal_lead_s:
            raise InputError(
                f"launcher.time={self.time} is not longer than launcher.signal_lead_s={self.signal_lead_s} seconds: the ranks "
                "would be told to save when they start; raise the one or lower the other"
            )
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise InputError(f"launcher.env: {name!r} is no name of an environment variable")
        for name in (*DIRECTIVES, "flags"):  # a directive is a line: what follows its end would be a command
            for value in [getattr(self, name)] if name != "flags" else self.flags:
                if not str(value).isprintable():
                    raise InputError(f"launcher.{name}={value!r}: expected one line of printable characters")

    def at_site(self) -> Slurm:
        """This launcher with the values of its site file where it has none of its own; lists and env of both are joined.

        Raises:
            InputError: no such file, or a key that a site does not have.
        """
        if self.site is None:
            return self
        path = Path(self.site) if self.site.endswith((".yaml", ".yml")) else folder() / "sites" / f"{self.site}.yaml"
        if not path.is_file():
            raise InputError(
                f"launcher.site={self.site}: there is no file {path}; expected YAML as in slurm/sites/example.yaml"
            )
        ours, default = {f.name: getattr(self, f.name) for f in fields(self)}, Slurm()
        filled: dict[str, Any] = {}
        for name, value in read_site(path).items():
            if isinstance(value, list):
                filled[name] = value + [item for item in ours[name] if item not in value]
            elif isinstance(value, dict):
                filled[name] = value | ours[name]
            elif ours[name] == getattr(default, name):
                filled[name] = value
        made = replace(self, **filled)
        check_numbers(made, "launcher.")
        made.check()
        return made

    def script(self, stage: str, run_dirs: Sequence[Path], **more: Any) -> str:
        """The batch script of a stage, as submitted from here; see `render`."""
        return render(self, stage, run_dirs, template=template(), cwd=Path.cwd(), python=sys.executable, **more)


def render(
    launcher: Slurm,
    stage: str,
    run_dirs: Sequence[Path],
    *,
    template: str,
    cwd: Path,
    python: str,
    servers: bool = False,
    report: bool = False,
    at_once: int | None = None,
) -> str:
    """The text of the batch script: a pure function of its arguments.

    Args:
        run_dirs: the stage's folder, relative to `cwd`, where every path of the run's config starts; of several, each is
            a task of a job array.
        python: the interpreter, where the launcher names none.
        servers: the stage samples from rollout servers; with launcher.server_nodes they get nodes of their own.
        report: this stage is a pipeline's last: write the run's report when it is done.
        at_once: how many tasks of the array may run at a time; None: all.

    Raises:
        InputError: an array of heterogeneous jobs, which Slurm does not have.
    """
    run_dirs = [cwd / run_dir for run_dir in run_dirs]
    if not str(cwd).isprintable():
        raise InputError(
            f"{str(cwd)!r}: a batch script cannot name this directory; start from one of printable characters"
        )
    apart = servers and launcher.server_nodes > 0
    if apart and len(run_dirs) > 1:
        raise InputError("launcher.server_nodes: Slurm has no arrays of heterogeneous jobs; submit the runs one by one")
    groups = [directives(launcher, stage, run_dirs, cwd, at_once)] + ([server_directives(launcher)] if apart else [])
    exports = [f"export {name}={shlex.quote(value)}" for name, value in launcher.env.items()]
    words = {
        "directives": "\n#SBATCH hetjob\n".join("\n".join(f"#SBATCH {flag}" for flag in group) for group in groups),
        "stage": stage,
        "run_dirs": shlex.join(map(str, run_dirs)),
        "report": str(int(report)),
        "python": shlex.quote(launcher.python or ("python3" if launcher.container else python)),
        "nodes": str(launcher.nodes),
        "ranks": str(launcher.num_ranks),
        "ranks_per_node": str(launcher.ranks_per_node),
        "threads": str(launcher.threads or "${SLURM_CPUS_PER_TASK:-${OMP_NUM_THREADS:-1}}"),
        "allocator": ALLOCATOR,
        "setup": "\n".join([*launcher.setup, *exports]) or ":",
        # --export: the environment of this script, whatever sbatch was told (SLURM_EXPORT_ENV) or the submitter's SBATCH_*.
        "step": shlex.join(["--export=ALL", *(["--het-group=0"] if apart else []), *container_flags(launcher, cwd)]),
        "inside": shlex.join(container_prefix(launcher, cwd)),
        "server_hosts": "$SLURM_JOB_NODELIST_HET_GROUP_1" if apart else "",
        "requeue": str(int(launcher.requeue)),
        "max_restarts": str(launcher.max_restarts),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: words[match[1]], template)


def directives(
    launcher: Slurm, stage: str, run_dirs: Sequence[Path], cwd: Path, at_once: int | None = None
) -> list[str]:
    """The flags of sbatch for the job of the ranks."""
    name, array = f"{run_dirs[0].parent.name}-{stage}", None
    if len(run_dirs) > 1:
        array = f"0-{len(run_dirs) - 1}" + (f"%{at_once}" if at_once else "")
    return [
        *_flags(
            job_name=name,
            array=array,
            chdir=str(cwd),
            output=str(log_path(run_dirs[0], stage, "%j")),  # the script takes a task of an array to its own folder
            open_mode="append",  # a requeued job goes on with its log
            nodes=launcher.nodes,
            ntasks_per_node=launcher.ranks_per_node,
            gpus_per_node=launcher.gpus_per_node,
            signal=f"B:USR2@{launcher.signal_lead_s}",
        ),
        "--requeue" if launcher.requeue else "--no-requeue",
        *_resources(launcher),
        *launcher.flags,
    ]


def server_directives(launcher: Slurm) -> list[str]:
    """The flags of sbatch for the second part of a heterogeneous job, the rollout servers' nodes."""
    own = _flags(nodes=launcher.server_nodes, ntasks_per_node=1, gpus_per_node=launcher.server_gpus_per_node)
    return [*own, *_resources(launcher)]


def _resources(launcher: Slurm) -> list[str]:
    return _flags(**{name: getattr(launcher, name) for name in DIRECTIVES})


def _flags(**values: Any) -> list[str]:
    """--long-name=value of all that is not None."""
    return [f"--{name.replace('_', '-')}={shlex.quote(str(v))}" for name, v in values.items() if v is not None]


def log_path(run_dir: Path, stage: str, job: str) -> Path:
    """Where the output of a job goes."""
    return run_dir / "logs" / f"{stage}-{job}.log"


def container_flags(launcher: Slurm, cwd: Path) -> list[str]:
    """What `srun` is told where pyxis runs the container."""
    if not launcher.container or launcher.container_runtime != "pyxis":
        return []
    mounts = [f"--container-mounts={','.join(launcher.container_mounts)}"] if launcher.container_mounts else []
    return [f"--container-image={launcher.container}", *mounts, f"--container-workdir={cwd}"]


def container_prefix(launcher: Slurm, cwd: Path) -> list[str]:
    """What stands before a task's command where apptainer runs the container."""
    if not launcher.container or launcher.container_runtime != "apptainer":
        return []
    binds = [word for mount in launcher.container_mounts for word in ("--bind", mount)]
    nvidia = ["--nv"] if launcher.gpus_per_node else []
    return ["apptainer", "exec", *nvidia, *binds, "--pwd", str(cwd), launcher.container]


def folder() -> Path:
    """`slurm/`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    return package / "slurm" if (package / "slurm").is_dir() else package.parent / "slurm"


def template() -> str:
    """The text of `slurm/stage.sbatch`."""
    return (folder() / "stage.sbatch").read_text(encoding="utf-8")


def read_site(path: Path) -> dict[str, Any]:
    """A site file as {key: value of the type of the launcher's field}.

    Raises:
        InputError: a key that a site does not have, or a value of another type.
    """
    import yaml  # type: ignore[import-untyped]
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    foreign.check(path)
    raw = (
        yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    )  # all strings: 12:00:00 is a time, not 43200
    known = [f.name for f in fields(Slurm) if f.name not in OWN_KEYS]
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a mapping of {', '.join(known)}")
    for name in raw:
        if name not in known:
            raise InputError(f"{path}: no key {name!r} of a site; it may have {', '.join(known)}")
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Slurm), raw))
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from None
    return {name: getattr(typed, name) for name in raw}


def seconds(time: str) -> int:
    """A time limit in seconds.

    Raises:
        InputError: it is not written as hours:minutes:seconds, with days- before it or not.
    """
    found = TIME.fullmatch(time)
    if found is None or (found["d"] is None and found["s"] is None):
        raise InputError(
            f"launcher.time={time}: expected hours:minutes:seconds as '12:00:00' (in quotes in YAML) or '2-00:00:00'"
        )
    days, hours, minutes, rest = (int(found[name] or 0) for name in "dhms")
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest
