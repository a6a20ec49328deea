"""What was typed is what is meant: words of the command line as Hydra must be given them.

Hydra reads a value by a grammar of its own, in which 007 is a number, `a,b` a sweep, and `=`, `(`, `#` or `ß` an error.
The typed configuration says which keys are texts; what is typed for one of those is handed to Hydra in quotes. Left as
they are: values in quotes, interpolations, Hydra's escapes (`a\\,b`) and functions (`choice(a,b)`), `null` for a text that
may be None, and with `-m` the commas between the values of a sweep.
"""

from __future__ import annotations

import re
import shlex
import types
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from alignkit.config.stages import GROUPS, STAGES, components
from alignkit.core.errors import InputError

FLAGS_WITH_VALUE = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p")
FUNCTIONS = re.compile(
    r"(choice|extend_list|range|glob|interval|shuffle|sort|tag|str|int|float|bool|json_str)[ \t]*\((.*)\)"
)
LISTS = ("choice", "extend_list")  # functions whose arguments are texts where the key is one
ESCAPE = re.compile(r"\\[\\()\[\]{}:=, \t]")  # of Hydra, outside of quotes
PAIRS = {"(": ")", "[": "]", "{": "}"}


def meant(command: str, words: Sequence[str]) -> list[str]:
    """The words of a command line with every text in quotes.

    Raises:
        InputError: with `-m`, a comma in what is both a path that exists and two values of a sweep.
    """
    sweeping = bool({"-m", "--multirun"} & set(words))
    found: list[str] = []
    for number, word in enumerate(words):
        key, equals, value = word.partition("=")
        plain = not equals or word.startswith(("-", "~")) or "@" in key
        if plain or (number and words[number - 1] in FLAGS_WITH_VALUE):
            found.append(word)
            continue
        kind = kind_of(command, key.lstrip("+"))
        if sweeping and kind in ("text", "text?") and "," in value and len(split(value)) > 1 and Path(value).exists():
            each = " and ".join(split(value))
            raise InputError(
                f"{word}: under -m a comma stands between two values ({each}), and {value} exists: for that path write "
                f"{as_shell(f'{key}={in_quotes(value)}')}, for the two {as_shell(f'{key}=choice({value})')}"
            )
        found.append(f"{key}={_value(value, kind, sweeping)}" if kind else word)
    return found


def kind_of(command: str, key: str) -> str:
    """What the typed configuration of a command expects at a key: text, text?, texts, table or "" (anything else).

    "text?" may be None; "texts" is a list and "table" a dictionary of texts.
    """
    hints = list(_hints(STAGES[command], key.split(".")))
    kinds = {_kind(hint) for hint in hints}
    return kinds.pop() if len(kinds) == 1 else ""


def _hints(hint: Any, parts: list[str]) -> Iterator[Any]:
    """The types that a key below `hint` may have; a component's key has one in each option of its group."""
    if not parts:
        yield hint
    elif is_dataclass(hint):
        name, rest = parts[0], parts[1:]
        below = get_type_hints(hint).get(name)
        if name == "rewards" and len(rest) > 1:
            name, rest = "reward", rest[1:]
        if name in GROUPS and rest:
            for option in components(name).values():
                yield from _hints(option, rest)
        elif below is not None:
            yield from _hints(below, rest)
    elif get_origin(hint) is dict and get_args(hint) == (str, str) and len(parts) == 1:
        yield str


def _kind(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        inner = [part for part in get_args(hint) if part is not type(None)]
        return "text?" if inner == [str] else ""
    known = {str: "text", list[str]: "texts", dict[str, str]: "table"}
    return next((kind for type_, kind in known.items() if hint == type_), "")


def _value(value: str, kind: str, sweeping: bool) -> str:
    """A value of a key of that kind, its texts in quotes."""
    if not value or _is_syntax(value, sweeping) or (kind == "text?" and value.lower() == "null"):
        return value
    parts = split(value)
    if sweeping and len(parts) > 1 and all(parts):
        return ",".join(_value(part, kind, sweeping) for part in parts)
    if call := FUNCTIONS.fullmatch(value):
        if call[1] not in LISTS:
            return value
        of = kind if call[1] == "choice" else "text"
        return f"{call[1]}({','.join(_value(part, of, sweeping=False) for part in split(call[2]))})"
    if kind in ("texts", "table"):
        ends = "[]" if kind == "texts" else "{}"
        if value[0] != ends[0] or value[-1] != ends[1] or not value[1:-1].strip():
            return value
        return ends[0] + ",".join(_entry(part, kind) for part in split(value[1:-1])) + ends[1]
    return in_quotes(value)


def _entry(part: str, kind: str) -> str:
    name, colon, text = part.partition(":") if kind == "table" else ("", "", part)
    return f"{name}{colon}{_value(text.strip(), 'text', sweeping=False)}"


def split(value: str) -> list[str]:
    """`value` at the commas that stand neither in quotes nor in brackets."""
    parts, closers, quote = [""], [], ""
    for number, letter in enumerate(value):
        before = value[:number]
        escaped = (len(before) - len(before.rstrip("\\"))) % 2
        if quote:
            quote = "" if letter == quote and not escaped else quote
        elif letter in "'\"" and not parts[-1].strip(" [{("):
            quote = letter
        elif letter in PAIRS and not escaped and PAIRS[letter] in value[number:]:
            closers.append(PAIRS[letter])
        elif closers and letter == closers[-1]:
            closers.pop()
        elif letter == "," and not closers and not escaped:
            parts.append("")
            continue
        parts[-1] += letter
    return [part.strip(" \t") for part in parts] if not quote and not closers else [value]


def _is_syntax(value: str, sweeping: bool) -> bool:
    """Whether a value is one text in Hydra's own terms: in quotes, with an interpolation or an escape that it can read."""
    from hydra.core.override_parser.types import QuotedString

    if value[0] not in "'\"" and "${" not in value and not ESCAPE.search(value):
        return False
    found = parsed(f"key={value}")
    if found is None or (found.is_sweep_override() and not sweeping):
        return False
    return isinstance(found._value, (str, QuotedString))


def parsed(word: str) -> Any:
    """Hydra's `Override` of a word, or None where its grammar refuses it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def in_quotes(text: str) -> str:
    """A text as Hydra and OmegaConf read it back letter by letter; what can be an interpolation stays one."""
    from hydra.core.override_parser.types import Quote, QuotedString
    from omegaconf import grammar_parser
    from omegaconf.errors import GrammarParseError

    if "${" in text:
        try:
            grammar_parser.parse(text)
        except GrammarParseError:
            text = text.replace("${", "\\${")
    quote = Quote.double if "'" in text and '"' not in text else Quote.single
    return QuotedString(text, quote).with_quotes()


def as_shell(word: str) -> str:
    """A word as it is pasted into a shell."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def refusal(command: str, words: Sequence[str]) -> str | None:
    """Why Hydra's grammar refuses a command line: its first word that cannot be read, and how it must be quoted.

    Args:
        words: as they were typed.
    """
    given = [pair for pair in zip(words, meant(command, words), strict=True) if not pair[0].startswith(("-", "~"))]
    for number, (word, handed) in enumerate(given):
        if parsed(handed) is not None:
            continue
        key, equals, value = word.partition("=")
        if not equals:
            before = given[number - 1][0] if number else ""
            more = f", or, if it belongs to the word before it, {as_shell(f'{before} {word}')}" if "=" in before else ""
            return f"{word!r} has no value: write {as_shell(f'{word}=')}...{more}"
        if parsed(f"{key}=x") is None:
            return (
                f"{word}: {key} cannot be written as a key here: between the dots stand letters a to z, digits, '-' and '_'; "
                "a file of your own (--config-dir DIR, +experiment=NAME) takes any name"
            )
        return unreadable(key, value)
    return None


def unreadable(key: str, value: str) -> str:
    """The refusal of a value that Hydra's grammar has no reading of."""
    fix = as_shell(f"{key}={in_quotes(value)}")
    return f"{key}={value} is no value that Hydra can read: write {fix}, in the quotes of both the shell and Hydra"


def check_experiments(command: str, words: Sequence[str], conf: Path) -> None:
    """Refuse experiment files in which a text was written so that YAML reads it as something else (run_name: 007).

    Raises:
        InputError: naming file, line and key, and how it is written.
    """
    flags = [word.partition("=") for word in words]
    after = [value or words[i + 1] for i, (flag, _, value) in enumerate(flags[:-1]) if flag in ("--config-dir", "-cd")]
    last = [value for flag, _, value in flags[-1:] if flag in ("--config-dir", "-cd") and value]
    folders = [conf, *map(Path, after + last)]
    names = [value for key, _, value in flags if key.lstrip("+") == "experiment"]
    for name in (part for value in names for part in split(value)):
        for folder in folders:
            if (path := folder / "experiment" / f"{name}.yaml").is_file():
                check_experiment(command, path)


def check_experiment(command: str, path: Path) -> None:
    """The same of one file.

    Raises:
        InputError: naming file, line and key, and how it is written.
    """
    import yaml  # type: ignore[import-untyped]
    from omegaconf._utils import get_yaml_loader

    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), get_yaml_loader())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):  # composing the config says so
        return
    for key, node in _scalars(root, ""):
        kind, tag = kind_of(command, key), node.tag.rpartition(":")[2]
        if kind[:4] == "text" and tag not in ("str", "null"):
            raise InputError(
                f"{path} line {node.start_mark.line + 1}: {key}: {node.value} is a text, but YAML reads {tag} there: "
                f"write {key.rpartition('.')[2]}: {node.value!r}"
            )


def _scalars(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, node) of every scalar of a YAML document; those of a list have the list's key."""
    if node is None or node.id == "scalar":
        yield from [(key, node)] if node is not None else []
        return
    for entry in node.value:
        name, below = (f"{key}.{entry[0].value}".lstrip("."), entry[1]) if node.id == "mapping" else (key, entry)
        if name != "defaults":
            yield from _scalars(below, name)
