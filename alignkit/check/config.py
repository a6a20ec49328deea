"""`alignkit check config`: compose and check every recipe, option and experiment of `conf/` and of a user's own folder."""

from __future__ import annotations

from pathlib import Path

from alignkit.core import foreign
from alignkit.core.errors import InputError

USAGE = """usage: alignkit check config [--config-dir DIR]

Composes and checks every recipe, group option and experiment of conf/, and of DIR where one is given.
What only a command line can know (run_name, data, models) is filled in. Exit code 2 if any is refused."""
# What a recipe cannot do without and leaves to the command line: a score, something to compare.
BESIDE = {
    "sample": ["+reward@rewards.gold=vader"],
    "evaluate": ["+reward@rewards.gold=vader", "+policies.checked=org/model"],
    "pipeline": ["+reward@sample.rewards.gold=vader", "+reward@evaluate.rewards.gold=vader"],
}


def main(arguments: list[str], conf: Path) -> int:
    """Print a line a file; the exit code: 0 all are fine, 2 one is refused.

    Raises:
        InputError: unknown arguments, or a folder that is not there.
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    folders = [conf]
    if arguments:
        flag, *values = arguments[0].split("=", 1) + arguments[1:]
        if flag != "--config-dir" or len(values) != 1:
            raise InputError(f"check config {' '.join(arguments)}: expected --config-dir DIR and nothing else")
        if not Path(values[0]).is_dir():
            raise InputError(f"--config-dir={values[0]}: no such folder")
        folders.append(Path(values[0]))
    results = [(path, *check_file(path, folder, conf)) for folder in folders for path in sorted(folder.rglob("*.yaml"))]
    for path, fits, error in results:
        print(f"{path}  " + (f"REFUSED: {error}" if error else f"ok ({', '.join(fits)})"))
    refused = sum(error is not None for _, _, error in results)
    print(f"{len(results)} files, {refused} refused")
    return 2 if refused else 0


def check_file(path: Path, folder: Path, conf: Path) -> tuple[list[str], str | None]:
    """(the commands that take the file, None), or ([], why none of those it is for does)."""
    from alignkit.config import stages

    group, name = path.relative_to(folder).parent.as_posix(), path.stem
    try:
        foreign.check_file(path, folder)
    except InputError as error:
        return [], str(error)
    if group == ".":
        tried: dict[str, list[str]] = {name: []} if name in stages.STAGES else {}
        missing = f"no command {name}: a recipe is called like its command ({', '.join(stages.STAGES)})"
    elif group == "experiment":
        tried = {command: [f"+experiment={name}"] for command in commands_of(path)}
        missing = "no command has these keys"
    else:
        chosen = f"+reward@rewards.checked={name}" if group == "reward" else f"{group}={name}"
        tried = {command: [chosen] for command, cls in stages.STAGES.items() if group in (*cls.groups, "reward")}
        tried = {c: o for c, o in tried.items() if group != "reward" or hasattr(stages.STAGES[c](), "rewards")}
        missing = f"no group {group}: expected experiment, {', '.join(stages.GROUPS)}"
    errors = {command: refusal(command, words, folder, conf) for command, words in tried.items()}
    if group == "experiment":
        errors = {command: error or misread(command, path) for command, error in errors.items()}
    fits = [command for command, error in errors.items() if error is None]
    return fits, None if fits else next(iter(errors.values()), missing)


def commands_of(path: Path) -> list[str]:
    """The commands that an experiment is for: those that lack the fewest of its keys at the top."""
    from omegaconf import OmegaConf

    from alignkit.config import stages

    try:
        loaded = OmegaConf.load(path)
    except Exception:  # no YAML: composing it says so
        return ["pipeline"]
    keys = {str(key) for key in loaded} - {"defaults"} if OmegaConf.is_dict(loaded) else set()
    lacks = {command: len(keys - set(cls.__dataclass_fields__)) for command, cls in stages.STAGES.items()}
    return [command for command, count in lacks.items() if count == min(lacks.values())]


def misread(command: str, path: Path) -> str | None:
    """Which text of an experiment YAML reads as something else; None: none."""
    from alignkit.config import overrides

    try:
        overrides.check_experiment(command, path)
    except InputError as error:
        return str(error)
    return None


def refusal(command: str, overrides: list[str], folder: Path, conf: Path) -> str | None:
    """Why a command refuses these overrides, on one line; None where it takes them."""
    more = [] if folder == conf else [f"hydra.searchpath=[file://{folder.resolve()}]"]
    error = attempt(command, [*more, *overrides], conf)
    if error is not None and "is empty" in error:  # what the file leaves to the command line
        error = attempt(command, [*more, *BESIDE.get(command, []), *overrides], conf)
    return error


def attempt(command: str, overrides: list[str], conf: Path) -> str | None:
    """Compose and check once, with something in every mandatory key."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from alignkit.config import stages
    from alignkit.config.messages import one_line, unknown_key

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            composed = compose(command, overrides)
        for node, key in ((composed, "run_name"), (composed.model, "path")):  # first: others are made of them
            if OmegaConf.is_missing(node, key):
                node[key] = "checked"
        for key in sorted(OmegaConf.missing_keys(composed)):
            OmegaConf.update(composed, key, "checked")
        stages.to_config(composed, command)
    except InputError as error:
        return str(error)
    except Exception as error:  # Hydra's, OmegaConf's and YAML's: whatever a broken file brings up
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        line = one_line(cause)
        unknown = unknown_key(str(cause))
        return _nearest(unknown, command, conf) if unknown else f"{type(cause).__name__}: {line}"
    return None


def _nearest(key: str, command: str, conf: Path) -> str:
    from hydra import compose, initialize_config_dir

    from alignkit.config.messages import nearest_key

    with initialize_config_dir(str(conf), version_base="1.3"):
        near = nearest_key(key, compose(command, BESIDE.get(command, [])))
    return f"no config key {key!r}" + (f": did you mean {near}?" if near else "")
