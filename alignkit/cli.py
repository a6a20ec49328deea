"""The command line: compose → check → run folder → launch. Imports neither torch, vllm, deepspeed nor transformers."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from alignkit import __version__

COMMANDS = {
    "pipeline": "every stage below, in order: from a base model to an aligned one, with a report",
    "sft": "supervised fine-tuning on prompts and completions",
    "sample": "sample answers, score them, write chosen/rejected pairs",
    "reward": "train a reward model on pairs",
    "ppo": "align a policy with PPO against a reward",
    "evaluate": "compare policies on held-out prompts",
}

USAGE = f"""alignkit {__version__}: SFT → reward model → PPO from one configuration

usage: alignkit COMMAND [key=value …]

{chr(10).join(f"  {name:<9} {text}" for name, text in COMMANDS.items())}

  alignkit COMMAND --help       its keys, defaults and config groups
  alignkit COMMAND --cfg job    the config as it would run
  alignkit COMMAND dry_run=true what would be launched
  alignkit COMMAND -m a.b=1,2   sweep (Hydra multirun)

first run: alignkit pipeline +experiment=quickstart
"""


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 a run failed, 2 an input was refused, 130 interrupted."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `alignkit ppo --help | head` ends without a traceback
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help", "help"):
        print(USAGE)
        return None
    if command in ("-V", "--version", "version"):
        print(__version__)
        return None
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, 1)
        _refuse(
            f"no command {command!r}{f': did you mean {near[0]}?' if near else ''}; the commands are {', '.join(COMMANDS)}"
        )
    _hydra(command, sys.argv[2:])
    return None


def _hydra(command: str, arguments: list[str]) -> None:
    """Run a command as the Hydra application it is, its refusals brought to one line."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from alignkit import config
    from alignkit.types import InputError, RunError

    config.register()
    sys.argv = [f"alignkit {command}", *arguments]
    if {"-h", "--help"} & set(arguments) and not any(a.startswith("--hydra-help") for a in arguments):
        try:
            return print(command_help(command, [a for a in arguments if not a.startswith("-")]))
        except (HydraException, OmegaConfBaseException) as error:
            _refuse(explain(error, command))
    show_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions come out here rather than be printed over many lines

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=command)
    def application(composed: Any) -> Any:
        try:
            return run_command(config.to_config(composed, command))
        except (InputError, RunError, KeyboardInterrupt) as error:
            stopped.append(error)  # raised below: Hydra would put a line of its own before it

    def terminate(signum: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt  # so that the launcher ends the ranks it started

    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGHUP, terminate)
    stopped: list[BaseException] = []
    try:
        application()
        if stopped:
            raise stopped[0]
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except InputError as error:
        _refuse(str(error))
    except RunError as error:
        print(f"alignkit: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (HydraException, OmegaConfBaseException) as error:
        if show_traceback:
            raise
        _refuse(explain(error, command))


def command_help(command: str, overrides: list[str]) -> str:
    """What `alignkit COMMAND --help` says. Hydra's own help takes seconds: it copies every schema for every group."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from alignkit import config

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = compose(command, overrides)
    groups: dict[str, Any] = {group: config.components(group) for group in config.GROUPS}
    groups["experiment"] = {path.stem: path for path in (conf_dir() / "experiment").glob("*.yaml")}
    lines = "\n".join(f"  {group}: {', '.join(sorted(options))}" for group, options in groups.items() if options)
    return (
        f"alignkit {command}: {COMMANDS[command]}\n\nusage: alignkit {command} [key=value …] [--cfg job] [-m]\n\n"
        f"Groups (group=option; the first time a name is added, +group=option)\n{lines}\n\n"
        f"Keys and their defaults (??? must be given; alignkit/config.py says what each means)\n\n{OmegaConf.to_yaml(composed)}"
    )


def conf_dir() -> Path:
    """The folder of recipes: beside the package in a checkout, inside it in an installed wheel."""
    here = Path(__file__).resolve().parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def run_command(cfg: Any) -> float | None:
    """A checked config: one stage or all of them. Returns the number a sweeper may optimise."""
    from alignkit.config import Pipeline

    return run_pipeline(cfg) if isinstance(cfg, Pipeline) else run_stage(cfg)


def run_stage(cfg: Any, label: str | None = None, later: dict[str, str] | None = None) -> float | None:
    """Check inputs, make the run folder, launch, wait for `done`.

    Raises:
        InputError: before anything is written.
        RunError: the stage did not reach `done`; its log is named.
    """
    from alignkit import artifacts
    from alignkit.config import config_hash, save
    from alignkit.types import InputError, RunError

    run_dir = cfg.run_dir
    sources = check_inputs(cfg, later or {})
    if cfg.dry_run:
        print(describe(cfg))
        return None
    inputs = {
        role: {"path": cfg.inputs()[role], "manifest_hash": artifacts.manifest_hash(source.run)}
        for role, source in sources.items()
    }
    if maker := artifacts.manifest_hash(Path(cfg.data.path).parent if cfg.data.path else None):  # rows that a run wrote
        inputs["data"] = {"path": cfg.data.path, "manifest_hash": maker}
    manifest = artifacts.read_manifest(run_dir)
    if manifest is not None:
        same = manifest["config_hash"] == config_hash(cfg)
        if cfg.resume and manifest["status"] == "done" and same and manifest["inputs"] != inputs:
            stale = next(
                role for role in inputs | manifest["inputs"] if inputs.get(role) != manifest["inputs"].get(role)
            )
            raise InputError(
                f"{run_dir} was made from another {stale} than {inputs.get(stale)}: delete that folder to make it anew"
            )
        if cfg.resume and manifest["status"] == "done" and same:
            print(f"{cfg.stage:<9} kept: {run_dir} is done with this config")
            return manifest["metrics"].get(MAIN_METRIC.get(cfg.stage, ""))
        fix = "choose another run_name=, or delete that folder"
        if cfg.resume and manifest["status"] == "done":
            raise InputError(f"{run_dir} is done, but with another config: {fix}")
        if cfg.resume and not same and (run_dir / "checkpoints").is_dir():
            raise InputError(
                f"{run_dir} has checkpoints of another config, which this one cannot go on from: use the same settings, or {fix}"
            )
        if not cfg.resume:
            raise InputError(
                f"{run_dir} exists (status {manifest['status']}): {fix}"
                + (", or add resume=true" if manifest["status"] != "done" else "")
            )
    with ExitStack() as held:
        held.enter_context(artifacts.lock(run_dir))
        if manifest is not None and not (run_dir / "checkpoints").is_dir():
            _set_aside(run_dir)  # resume: an unfinished stage starts over, what it wrote is kept aside
        save(cfg, run_dir / "config.yaml")
        artifacts.write_manifest(
            run_dir,
            stage=cfg.stage,
            status="running",
            seed=cfg.seed,
            config_hash=config_hash(cfg),
            inputs=inputs,
            git_commit=artifacts.git_commit(),
            versions=artifacts.versions(),
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
        try:
            error = cfg.launcher.run(cfg.stage, run_dir, label or cfg.stage)
        except KeyboardInterrupt:
            artifacts.write_manifest(run_dir, status="failed", error="interrupted")
            raise
    manifest = artifacts.read_manifest(run_dir) or {}
    if manifest.get("status") == "done":
        return manifest["metrics"].get(MAIN_METRIC.get(cfg.stage, ""))
    log = run_dir / "logs" / f"{cfg.stage}.log"
    if manifest.get("status") == "running":
        artifacts.write_manifest(run_dir, status="failed", error="its processes ended without a word")
    reason = error["error"] if error else f"its processes ended without a word; last line: {_last_line(log)}"
    if error and error["kind"] == "input":
        raise InputError(f"{cfg.stage}: {reason} (log: {log})")
    raise RunError(f"{cfg.stage} failed: {reason} (log: {log})")


# What a stage returns to Hydra's sweepers.
MAIN_METRIC = {"sft": "eval_loss", "reward": "eval_accuracy", "ppo": "objective/score", "sample": "pairs"}


def run_pipeline(cfg: Any) -> float | None:
    """Every stage in order in one run folder, then the report."""
    from alignkit import artifacts, report, report_html

    root = Path(cfg.runs_dir) / cfg.run_name
    stages = cfg.stages()
    made = {str(stage.run_dir): stage.stage for stage in stages}
    for stage in stages:  # all inputs of all stages, before the first one takes its minutes
        check_inputs(stage, made)
    if cfg.dry_run:
        for stage in stages:
            print(describe(stage))
        return None
    if not cfg.resume:
        _refuse_existing(root, [stage.run_dir for stage in stages])
    with artifacts.lock(root):
        for number, stage in enumerate(stages, start=1):
            stage.resume = cfg.resume
            run_stage(stage, f"[{number}/{len(stages)}] {stage.stage}")
        report.write_summary(root)
        report_html.write_html(root)
        report.print_summary(root, next_commands=list(cfg.next_commands) or None)
    return (report.summarize(root)["gold"].get("ppo") or {}).get("mean")


def check_inputs(cfg: Any, later: dict[str, str]) -> dict[str, Any]:
    """Resolve the models and runs a stage reads and validate its rows, without torch.

    Args:
        later: {run folder: stage} of runs that an earlier stage of the same pipeline will make.

    Returns:
        {role: ModelSource} of those that exist now.
    """
    from alignkit import artifacts
    from alignkit.types import InputError

    sources = {}
    for role, path in cfg.inputs().items():
        if path and path not in later:
            key = f"{role}.path" if role.startswith("rewards.") or "." not in role else role
            source = sources[role] = artifacts.resolve_model(path, key)
            stage = (artifacts.read_manifest(source.run) or {}).get("stage") if source.run else None
            if role.startswith("rewards.") and stage not in (None, "reward"):
                raise InputError(
                    f"{key}={path}: a run of {stage}, which has no score; expected one of reward, as runs/<name>/reward"
                )
    artifacts.check_hand_off(sources)
    if hasattr(cfg, "finetune"):
        for source in sources.values():
            cfg.finetune.check_start(source.adapter)
    for reward in getattr(cfg, "rewards", {}).values():
        if hasattr(reward, "load"):
            reward.load()
    for rows in (cfg.data, getattr(cfg, "eval_data", None)):
        if rows is not None and rows.path and not any(rows.path.startswith(f"{folder}/") for folder in later):
            rows.rows(cfg.row_kind)
    return sources


def describe(cfg: Any) -> str:
    """The resolved config of a stage and the command that would start it."""
    import shlex

    from omegaconf import OmegaConf

    command = cfg.launcher.command(cfg.stage, cfg.run_dir, cfg.launcher.port or 29500)
    return f"# {cfg.stage}\n{OmegaConf.to_yaml(OmegaConf.structured(cfg))}\n$ {shlex.join(command)}\n"


def explain(error: Exception, command: str) -> str:
    """A Hydra or OmegaConf error as one line that names the key and the nearest real one."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf

    from alignkit import config
    from alignkit.explain import nearest_key, one_line

    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = one_line(error).split(" Config search path:")[0]
    key = getattr(cause, "full_key", None) if "not in" in str(cause) else None
    key = key or _unknown_key(str(error), str(cause))
    if key is None:
        detail = one_line(cause)
        return text if detail == text else f"{text.splitlines()[0]} {detail}"
    GlobalHydra.instance().clear()
    chosen = [o for o in sys.argv[1:] if o.lstrip("+~").split("=")[0].split("@")[0] in config.GROUPS]
    experiments = [o for o in sys.argv[1:] if o.lstrip("+").startswith("experiment=")]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            composed = compose(command, experiments + chosen)
        except HydraException:  # the mistake is in the experiment file itself, or it lies elsewhere
            composed = compose(command, chosen)
    parent = OmegaConf.select(composed, key.rpartition(".")[0]) if "." in key else None
    if isinstance(parent, DictConfig) and OmegaConf.get_type(parent) is dict:  # open: columns, policies, rewards
        return f"{key} is new in {key.rpartition('.')[0]}, which takes any name: write +{key}=..."
    near = nearest_key(key, composed)
    if near == key:
        return f"{key} takes its own keys one by one: write +{key}.<name>=..."
    return f"no config key {key!r}{f': did you mean {near}?' if near else ''} (alignkit {command} --cfg job lists them all)"


def _unknown_key(*messages: str) -> str | None:
    for pattern in (r"Could not override '([^']+)'", r"[Kk]ey '([^']+)' (?:is )?not in"):
        for message in messages:
            if (found := re.search(pattern, message)) and any("not in" in m for m in messages):
                return found.group(1)
    return None


def _refuse_existing(root: Path, run_dirs: list[Path]) -> None:
    from alignkit import artifacts
    from alignkit.types import InputError

    for run_dir in run_dirs:
        manifest = artifacts.read_manifest(run_dir)
        if manifest is not None:
            with artifacts.lock(root):  # says so where another process works in it right now
                pass
            raise InputError(
                f"run_name={root.name}: {run_dir} exists (status {manifest['status']}): choose another run_name=, delete {root}, "
                "or add resume=true to go on with it"
            )


def _set_aside(run_dir: Path) -> None:
    """Move what an unfinished attempt wrote to `attempt_<n>/`; the lock file stays."""
    number = 1 + len(list(run_dir.glob("attempt_*")))
    target = run_dir / f"attempt_{number}"
    target.mkdir()
    for item in run_dir.iterdir():
        if item.name != ".lock" and not item.name.startswith("attempt_"):
            shutil.move(str(item), target / item.name)


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.is_file() else []
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (errors or lines or ["(the log is empty)"])[-1]


def _refuse(message: str) -> NoReturn:
    print(f"alignkit: {message}", file=sys.stderr)
    raise SystemExit(2)
