"""What lies under `data.path`: a file, a folder or pattern of shards, a saved data set, or a hub id; one set of rows.

The shards of a folder come in the order of their names, `part-2` before `part-10`. Where the names of files or folders
say splits (`train-00000-of-00002.parquet`, `test/rows.jsonl`), those of `data.split` are read.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from alignkit.core.errors import InputError
from alignkit.data.files import FILES, first_line, looks_like_a_file, near_files, numbered, read_file

Row = dict[str, Any]
Place = tuple[str, Row | InputError]

# Words of a file's or folder's name that say its split, and the split they say.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("eval", "evaluation"), "eval"),
}
SHARD = re.compile(r"(?P<split>.+?)[-_.](?P<number>\d{5})-of-(?P<count>\d{5})\b")  # as `datasets` names them
# Files beside the rows that hold none.
BESIDE = re.compile(r"(readme|licen[cs]e|notice|changelog|citation).*|.*\.(md|py|sh|png|jpe?g|svg|pdf|lock)", re.I)
INFOS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def check(path: str) -> None:
    """Raise InputError where `path` can be seen to name nothing, without reading what it names."""
    given = Path(path).expanduser()
    if given.exists() and not (given.is_file() or given.is_dir()):  # <(zcat x.gz), too: rows are read several times
        raise InputError(
            f"data.path={path}: a pipe or a device, which is read once: write its rows to a file, and give that"
        )
    if given.exists() or not looks_like_a_file(path):
        return
    if is_pattern(given):
        expand(path)
    else:
        raise InputError(f"data.path={path}: no such file{near_files(given)}")


def rows(path: str, split: str, said: Counter[str]) -> Iterator[Place]:
    """(where it stands, row as it is there or why it cannot be read) of every row, in order.

    Args:
        said: counts, under a sentence with {} for the number, what a person should know of how the set was read.

    Raises:
        InputError: there is no such set or split, or a file of it cannot be read at all.
    """
    given = Path(path).expanduser()
    if given.is_dir() and is_saved(given):
        return numbered(path, _saved(path, given, split))
    files = shards(path, split, said)
    if not files:
        return numbered(path, _hub(path, split))
    return chain.from_iterable(map(read_file, files))


def is_pattern(path: Path) -> bool:
    return any(mark in str(path) for mark in "*?[") and not path.exists()


def is_saved(folder: Path) -> bool:
    """True for a folder that `save_to_disk` wrote."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return True
    return (folder / "dataset_info.json").is_file() and not any(is_rows(name) for name in os.listdir(folder))


def is_rows(name: str) -> bool:
    """True for the name of a file of rows, also of one that must be unpacked first."""
    return name.lower().endswith((*FILES, *(f"{suffix}.gz" for suffix in FILES))) and name not in INFOS


def natural(path: Path) -> tuple[list[Any], str]:
    """A key that sorts names by the numbers in them."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))], str(path)


def root_of(pattern: Path) -> Path:
    """The folder that a pattern starts in."""
    plain = takewhile(lambda part: not any(mark in part for mark in "*?["), pattern.parts[:-1])
    return Path(*plain)


def expand(path: str) -> list[Path]:
    """The files of rows that a pattern fits, in the order of their names.

    Raises:
        InputError: it fits none, or folders.
    """
    pattern = Path(path).expanduser()
    root = root_of(pattern)
    try:
        found = sorted(root.glob(str(pattern.relative_to(root))), key=natural)
    except ValueError as error:
        raise InputError(
            f"data.path={path}: no pattern: {first_line(error)}: write it as data/train-*.jsonl"
        ) from error
    files = [file for file in found if not file.name.startswith(".") and not BESIDE.fullmatch(file.name)]
    if folders := [file.name for file in files if file.is_dir()]:
        raise InputError(
            f"data.path={path}: fits folders, {', '.join(folders[:3])}: give one of them, "
            f"or {pattern}/*{FILES[0]} for their files"
        )
    if not files:
        near = sorted(file.name for file in root.iterdir())[:5] if root.is_dir() else []
        has = f"{root} holds {', '.join(near) or 'nothing'}" if root.is_dir() else f"there is no folder {root}"
        raise InputError(f"data.path={path}: no file fits the pattern: {has}")
    return files


def shards(path: str, split: str, said: Counter[str]) -> list[Path]:
    """The files that `path` names, those of one split, in the order of their names; [] where it names none on disk.

    Raises:
        InputError: a folder without files of rows, files of several formats, no such split, or a shard is missing.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        files = _of_split(path, _walk(path, given, said), given, split, named=False)
        _check_whole(path, files)
    elif given.is_file():
        files = _of_split(path, [given], given.parent, split, named=True)
    elif is_pattern(given) and looks_like_a_file(path):
        files = _of_split(path, expand(path), root_of(given), split, named=True)
    else:
        return []
    formats: dict[str, Path] = {}
    for file in files:
        formats.setdefault("".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix.lower(), file)
    if len(formats) > 1:
        one, other = list(formats.values())[:2]
        raise InputError(
            f"data.path={path}: files of several formats, {one.name} and {other.name}: "
            f"name those of one, as data.path={one.parent}/*{one.suffix}"
        )
    if len(files) > 1:
        ends = _plain(f"{files[0].name} first, {files[-1].name} last")
        said[f"{{}} files read as one set, {ends}"] += len(files)
    return files


def _plain(text: str) -> str:
    """Text to stand in a sentence with {} for a number."""
    return text.replace("{", "{{").replace("}", "}}")


def _walk(path: str, folder: Path, said: Counter[str]) -> list[Path]:
    """The files of rows in a folder and the folders in it; hidden ones and those that hold no rows are passed over."""
    if (folder / "manifest.json").is_file() and (folder / "config.yaml").is_file():
        held = ", ".join(sorted(file.name for file in folder.glob("*.jsonl"))) or "no .jsonl"
        raise InputError(f"data.path={path}: a run's folder, expected rows: name the file in it (it has {held})")
    found: list[Path] = []
    odd: list[str] = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        odd += [name for name in folders if Path(where, name).is_symlink()]  # may lead back here: not followed
        seen = [name for name in names if not name.startswith((".", "_")) and name not in INFOS]
        found += [Path(where, name) for name in seen if is_rows(name)]
        odd += [name for name in seen if not is_rows(name) and not BESIDE.fullmatch(name)]
    if not found:
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise InputError(
            f"data.path={path}: the folder holds no saved data set (it holds: {held}): expected one written by "
            f"datasets' save_to_disk, or files of {', '.join(FILES)}"
        )
    if odd:
        said[f"{{}} files in the folder are passed over: {_plain(', '.join(sorted(odd)[:5]))}"] += len(odd)
    return sorted(found, key=natural)


def split_of(file: Path, folder: Path) -> str:
    """The split that a file's name says, or the name of a folder that it is in; "" for none."""
    for part in (file.name, *reversed(file.relative_to(folder).parts[:-1])):
        if said := [SPLITS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in SPLITS]:
            shard = SHARD.match(part)
            return SPLITS.get(shard["split"], shard["split"]) if shard else said[0]
    return ""


def _of_split(path: str, files: list[Path], folder: Path, split: str, *, named: bool) -> list[Path]:
    """Those of one split. Files that were `named` by hand or by a pattern, and say one split only, are that one."""
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(split_of(file, folder), []).append(file)
    wanted = SPLITS.get(split, split)
    if split == "train" and len(found) == 1 and (named or "" in found):
        return files
    if wanted not in found or (not named and "" in found):
        has = ", ".join(name for name in found if name) or "no splits"
        loose = f", and files of no split: {', '.join(file.name for file in found[''][:3])}" if "" in found else ""
        raise InputError(f"data.split={split}: {path} has {has}{loose}: choose one, or name the files")
    return found[wanted]


def _check_whole(path: str, files: list[Path]) -> None:
    """Refuse a folder in which one of `...-of-00003` is missing."""
    sets: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        if shard := SHARD.match(file.name):
            key = (file.parent, shard["split"], int(shard["count"]))
            sets.setdefault(key, set()).add(int(shard["number"]))
    for (where, name, count), numbers in sets.items():
        if missing := sorted(set(range(count)) - numbers):
            raise InputError(
                f"data.path={path}: {where.name}/{name}-{missing[0]:05d}-of-{count:05d} is missing, "
                f"{len(missing)} of {count} shards: fetch it, or name those there with a pattern, data.path={where}/{name}-*"
            )


def _saved(path: str, folder: Path, split: str) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # pyarrow, OSError, KeyError, JSON: whatever a broken folder brings up
        raise InputError(f"data.path={path}: unreadable data set: {first_line(error)}: save it again") from error
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise InputError(f"data.split={split}: {path} has {', '.join(loaded)}: choose one")
        loaded = loaded[split]
    try:
        yield from loaded
    except Exception as error:  # a picture without its library, a broken shard
        raise InputError(f"data.path={path}: unreadable data set: {first_line(error)}: save it again") from error


def _hub(path: str, split: str) -> Iterator[Row]:
    from datasets import load_dataset

    name, _, config = path.partition(":")
    try:
        yield from load_dataset(name, config or None, split=split)
    except Exception as error:  # no network, no such id, no such split, a config to choose: all the user's to mend
        raise InputError(
            f"data.path={path} (data.split={split}): neither a file nor a folder, and not loaded as a "
            f"datasets id: {first_line(error)}: correct the path, or write id:config for a data set with several"
        ) from error
