"""The command line: compose the config, run it, say what was refused. Imports neither torch, vllm, deepspeed nor transformers."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
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
  alignkit plan COMMAND …       batches, tokens, memory and hours before it runs
                                [--device-memory=80GiB] [--throughput=TOKENS_A_SECOND|RUN]
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
    if command == "plan":
        return _plan(sys.argv[2:])
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, 1)
        _refuse(
            f"no command {command!r}{f': did you mean {near[0]}?' if near else ''}; the commands are {', '.join(COMMANDS)}"
        )
    _hydra(command, sys.argv[2:])
    return None


def _plan(arguments: list[str]) -> None:
    """`alignkit plan COMMAND …`: what the command would do, in numbers."""
    from alignkit import pipeline
    from alignkit.plan import text as plan
    from alignkit.types import InputError

    try:
        options, rest = plan.options(arguments)
    except InputError as error:
        _refuse(str(error))
    if not rest or rest[0] not in COMMANDS:
        _refuse(
            f"plan {' '.join(rest[:1]) or 'of what'}: give a command, as in `alignkit plan ppo …`: {', '.join(COMMANDS)}"
        )
    _hydra(rest[0], rest[1:], lambda cfg: pipeline.print_plan(cfg, options))


def _hydra(command: str, arguments: list[str], action: Callable[[Any], Any] | None = None) -> None:
    """Run a command as the Hydra application it is, its refusals brought to one line.

    `action`: what to do with the checked config; None: run it.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from alignkit import config, pipeline
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
            return (action or pipeline.run_command)(config.to_config(composed, command))
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


def _refuse(message: str) -> NoReturn:
    print(f"alignkit: {message}", file=sys.stderr)
    raise SystemExit(2)
