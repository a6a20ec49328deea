"""The command line: compose the config, run it, say what was refused. Imports neither torch, vllm, deepspeed nor transformers."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
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

# Of runs that exist.
TOOLS = {
    "compare": "RUN…: one table and one page of what differs between runs and what they came to",
    "lineage": "RUN: from which data, configs, parents, commit and versions it came; what changed since",
    "doctor": "RUN [--json]: which known failure a PPO run shows, and what to change",
    "resume": "RUN: go on from wherever a run or a stage stands",
    "status": "RUN: what is queued, running, saved, done or failed, and why",
    "logs": "RUN [-f] [-n LINES]: its newest log",
    "cancel": "RUN: end its jobs and processes",
    "report": "RUN: summary.json, report.html and the table of what there is",
}

# alignkit check NAME: what it looks at.
CHECKS = {
    "data": "every row that a stage would read",
    "config": "every recipe, option and experiment of conf/ and of your folder (--config-dir DIR)",
}

# Options of Hydra that take the next word.
WITH_VALUE = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--cfg", "-c", "--package", "-p")

USAGE = f"""alignkit {__version__}: SFT → reward model → PPO from one configuration

usage: alignkit COMMAND [key=value …]

{chr(10).join(f"  {name:<9} {text}" for name, text in COMMANDS.items())}
{chr(10).join(f"  check {name}  {text}" for name, text in CHECKS.items())}

{chr(10).join(f"  {name:<9} {text}" for name, text in TOOLS.items())}

  alignkit COMMAND --help       its keys, defaults and config groups
  alignkit COMMAND --cfg job    the config as it would run
  alignkit COMMAND dry_run=true what would be launched
  alignkit plan COMMAND …       batches, tokens, memory and hours before it runs
                                [--device-memory=80GiB] [--throughput=TOKENS_A_SECOND|RUN]
  alignkit COMMAND -m a.b=1,2   sweep (Hydra multirun); each job in runs/<run_name>/<what is swept>

first run: alignkit pipeline +experiment=quickstart
"""


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 a run failed, 2 an input was refused, 75 stopped and saved, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):  # a terminal of another encoding shows ? for what it has not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `alignkit ppo --help | head` ends without a traceback
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help", "help"):
        return print(USAGE)
    if command in ("-V", "--version", "version"):
        return print(__version__)
    with _exit_codes():
        if command == "plan":
            return _plan(arguments)
        if command == "check":
            return _check(arguments)
        if command in (*TOOLS, "job"):  # `job`: what a batch script calls
            return _tool(command, arguments)
        known = [*COMMANDS, *TOOLS, "check", "plan"]
        if command not in COMMANDS:
            import difflib

            near = difflib.get_close_matches(command, known, 1)
            _refuse(
                f"no command {command!r}{f': did you mean {near[0]}?' if near else ''}; the commands are {', '.join(known)}"
            )
        return _hydra(command, arguments)


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """What a refused input, a failed run and a stop from outside come to: a line and an exit code."""
    from alignkit.core.errors import InputError, RunError

    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGHUP, _terminate)
    try:
        with _long_names_refused():
            yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except InputError as error:
        _refuse(str(error))
    except RunError as error:
        _refuse(str(error), 1)


@contextlib.contextmanager
def _long_names_refused() -> Iterator[None]:
    """A path that is too long for the file system is a refused input, wherever it is met first."""
    from alignkit.core.errors import InputError

    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        name = f"{str(error.filename)[:60]}… ({len(os.fsencode(str(error.filename)))} bytes)"
        raise InputError(f"{name}: too long for the file system: expected 255 bytes a name, 4095 a path") from None


def _tool(command: str, arguments: list[str]) -> None:
    """Run a command about runs that exist."""
    from alignkit.core import terminal
    from alignkit.jobs import resume, steps
    from alignkit.pipeline import lineage
    from alignkit.report import compare, doctor

    if {"-h", "--help"} & set(arguments) or not [a for a in arguments if not a.startswith("-")]:
        more = {"compare": compare, "doctor": doctor, "lineage": lineage, "resume": resume}.get(command, steps).__doc__
        return print(f"usage: alignkit {command} {TOOLS.get(command, '')}\n{more}")
    own = {"compare": compare, "doctor": doctor, "lineage": lineage, "resume": resume}
    reads = command not in ("resume", "job")  # those run stages, with a line that moves
    with contextlib.redirect_stdout(terminal.Screen(sys.stdout)) if reads else contextlib.nullcontext():
        own[command].main(arguments) if command in own else steps.main(arguments, command)


def _terminate(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt  # so that the launcher ends the ranks it started


def _plan(arguments: list[str]) -> None:
    """`alignkit plan COMMAND …`: what the command would do, in numbers."""
    from alignkit.pipeline import stage
    from alignkit.plan import text as plan

    options, rest = plan.options(arguments)
    if not rest or rest[0] not in COMMANDS:
        _refuse(
            f"plan {' '.join(rest[:1]) or 'of what'}: give a command, as in `alignkit plan ppo …`: {', '.join(COMMANDS)}"
        )
    _hydra(rest[0], rest[1:], lambda cfg: stage.print_plan(cfg, options))


def _hydra(command: str, arguments: list[str], action: Callable[[Any], Any] | None = None) -> None:
    """Run a command as the Hydra application it is, its refusals brought to one line.

    `action`: what to do with the checked config; None: run it.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from alignkit.config import overrides, stages
    from alignkit.core import foreign
    from alignkit.core.errors import InputError, RunError, Saved
    from alignkit.jobs import queue as submit
    from alignkit.pipeline import stage, sweep

    stages.register()
    arguments = options_first(arguments)
    foreign.check_folders(foreign.folders(arguments))
    words = overrides.meant(command, arguments)
    overrides.check_experiments(command, arguments, conf_dir())
    sys.argv = [f"alignkit {command}", *words]
    if {"-h", "--help"} & set(arguments) and not any(a.startswith("--hydra-help") for a in arguments):
        try:
            return print(command_help(command, [a for a in words if not a.startswith("-")]))
        except (HydraException, OmegaConfBaseException) as error:
            _refuse(explain(error, command, arguments))
    show_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions come out here rather than be printed over many lines

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=command)
    def application(composed: Any) -> Any:
        try:
            with _long_names_refused():
                if action is not None:
                    return action(stages.to_config(composed, command))
                sweep.begin_job(composed, words)
                cfg = stages.to_config(composed, command)
                accepted.append(True)
                value = submit.run_command(cfg, queue)
                done.extend([] if cfg.dry_run else [stage.folder(cfg)])
                return value
        except (InputError, RunError, Saved) as error:
            if sweeping and isinstance(error, Saved):
                raise  # the sweep was asked to stop, not this job alone
            stopped.append(error)  # raised below: Hydra would put a line of its own before it
            if sweeping:
                print(f"alignkit: {error}", file=sys.stderr, flush=True)

    stopped: list[InputError | RunError | Saved] = []
    done: list[Path] = []
    sweeping = bool({"-m", "--multirun"} & set(arguments))
    accepted: list[bool] = []  # whether Hydra and the typed config took the command line
    try:
        with submit.Queue() as queue:  # of Slurm: all jobs of a sweep go into it together
            try:
                application()
            except ValueError:  # of a sweeper that has no number to go on with
                if not stopped:
                    raise
            queue.submit()
        if sweeping and done:
            sweep.finish(done, len(stopped))
        if sweeping and stopped:
            raise SystemExit(1 if any(isinstance(error, RunError) for error in stopped) else 2)
        if stopped:
            raise stopped[0]
    except Saved as saved:
        again = [*(a for a in arguments if not a.startswith("resume=")), "resume=true"]
        print(f"{saved}; go on with: alignkit {command} {shlex.join(again)}", file=sys.stderr)
        raise SystemExit(Saved.CODE) from None
    except (InputError, RunError):
        raise
    except Exception as error:  # Hydra refuses some command lines with a ValueError, a KeyError, …
        if show_traceback or (accepted and not isinstance(error, (HydraException, OmegaConfBaseException))):
            raise
        _refuse(explain(error, command, arguments))


def options_first(words: list[str]) -> list[str]:
    """The words with Hydra's options before the overrides: argparse takes overrides in one piece only."""
    options: list[str] = []
    rest = list(words)
    for word in words:
        if word not in rest or not word.startswith("-"):
            continue
        at = rest.index(word)
        size = 2 if word in WITH_VALUE else 1
        options += rest[at : at + size]
        del rest[at : at + size]
    return options + rest


def _check(arguments: list[str]) -> None:
    """`alignkit check NAME …`. Exit codes: 0 nothing is refused, 2 something is, 130 interrupted."""
    from alignkit.check import config as check_config
    from alignkit.check import data
    from alignkit.config import stages

    mains = {"data": data.main, "config": lambda rest, _: check_config.main(rest, conf_dir())}
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        return print("\n".join(f"alignkit check {check} …  {text}" for check, text in CHECKS.items()))
    if name not in CHECKS:
        _refuse(f"no check {name!r}: the checks are {', '.join(CHECKS)}")
    stages.register()
    if code := mains[name](rest, _compose):
        raise SystemExit(code)


def _compose(command: str, words: list[str]) -> Any:
    """The config of a command as Hydra composes it, its refusals brought to one line."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from alignkit.config import overrides
    from alignkit.core import foreign

    foreign.check_folders(foreign.folders(words))
    overrides.check_experiments(command, words, conf_dir())
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose(command, overrides.meant(command, words))
    except (HydraException, OmegaConfBaseException) as error:
        _refuse(explain(error, command, words))


def command_help(command: str, words: list[str]) -> str:
    """What `alignkit COMMAND --help` says. Hydra's own help takes seconds: it copies every schema for every group."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from alignkit.config import stages

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = compose(command, words)
    groups: dict[str, Any] = {group: stages.components(group) for group in stages.GROUPS}
    groups["experiment"] = {path.stem: path for path in (conf_dir() / "experiment").glob("*.yaml")}
    lines = "\n".join(f"  {group}: {', '.join(sorted(options))}" for group, options in groups.items() if options)
    return (
        f"alignkit {command}: {COMMANDS[command]}\n\nusage: alignkit {command} [key=value …] [--cfg job] [-m]\n\n"
        f"Groups (group=option; the first time a name is added, +group=option)\n{lines}\n\n"
        f"Keys and their defaults (??? must be given; alignkit/config/stages.py says what each means)\n\n{OmegaConf.to_yaml(composed)}"
    )


def conf_dir() -> Path:
    """The folder of recipes: beside the package in a checkout, inside it in an installed wheel."""
    here = Path(__file__).resolve().parents[1]
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def explain(error: Exception, command: str, typed: list[str]) -> str:
    """A Hydra or OmegaConf error as one line that names the key and the nearest real one. `typed`: the command's words."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf import DictConfig, OmegaConf

    from alignkit.config import overrides, stages
    from alignkit.config.messages import nearest_key, one_line, unknown_key

    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        return overrides.refusal(command, typed) or overrides.unreadable(key, value)
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = one_line(error).split(" Config search path:")[0]
    key = getattr(cause, "full_key", None) if "not in" in str(cause) else None
    key = key or unknown_key(str(error), str(cause))
    if "Config group override must be" in text:
        group = next(o.lstrip("+").split("=")[0] for o in sys.argv[1:] if o.lstrip("+").split("=")[0] in stages.GROUPS)
        return f"{group}=null: expected an option, {group}=<{'|'.join(stages.components(group))}>"
    if key is None:
        detail = one_line(cause)
        return text if detail == text else f"{text.splitlines()[0]} {detail}"
    GlobalHydra.instance().clear()
    chosen = [o for o in sys.argv[1:] if o.lstrip("+~").split("=")[0].split("@")[0] in stages.GROUPS]
    experiments = [o for o in sys.argv[1:] if o.lstrip("+").startswith("experiment=")]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            composed = compose(command, experiments + chosen)
        except HydraException:  # the mistake is in the experiment file itself, or it lies elsewhere
            composed = compose(command, chosen)
    parent = OmegaConf.select(composed, key.rpartition(".")[0]) if "." in key else None
    if isinstance(parent, DictConfig) and OmegaConf.get_type(parent) is dict:  # open: columns, policies, rewards
        return f"{key} is new in {key.rpartition('.')[0]}, which takes any name: write +{key}=..."
    group, _, name = key.rpartition(".")
    theirs = [o for o, cls in stages.components(group).items() if hasattr(cls, name)] if group in stages.GROUPS else []
    if theirs and parent is not None:
        return f"{key} is no key of {group}={parent.name}, but of {' and '.join(f'{group}={o}' for o in theirs)}: leave it out, or choose that"
    near = nearest_key(key, composed)
    if near == key:
        return f"{key} takes its own keys one by one: write +{key}.<name>=..."
    return f"no config key {key!r}{f': did you mean {near}?' if near else ''} (alignkit {command} --cfg job lists them all)"


def _refuse(message: str, code: int = 2) -> NoReturn:
    from alignkit.core.terminal import shown

    print(f"alignkit: {shown(message)}", file=sys.stderr)
    raise SystemExit(code)
