"""Python that a user brings: found on disk without running it, and imported with the modules that lie beside it."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from alignkit.core.errors import InputError

ALIAS = "alignkit_user_"  # what a file's own package is called in sys.modules, with a hash of where it lies
INSTALLED = {"site-packages", "dist-packages"}


class _Beside(MetaPathFinder):
    """Finds the modules of some names in some folders, before what is installed is looked at."""

    def __init__(self, names: set[str], folders: list[str]) -> None:
        self.names, self.folders = names, folders

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, self.folders) if path is None and fullname in self.names else None


@dataclass
class Place:
    """The folders whose modules a file may import, and those it has imported from there."""

    folders: list[Path]
    modules: dict[str, ModuleType] = field(default_factory=dict)

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Inside, modules in the folders are found: after the standard library's, before installed ones of their name.

        Outside, nobody else sees them, so that two files may each have a `utils` beside them. The working directory is
        what it was before when it ends.
        """
        names = _importable_names(self.folders)
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in names}
        before = {name.partition(".")[0] for name in sys.modules}
        sys.modules.update(self.modules)
        finder = _Beside(names, [str(folder) for folder in self.folders])
        sys.meta_path.insert(0, finder)
        sys.path.extend(finder.folders)  # for folders without __init__.py, which count only where no other has the name
        here = os.getcwd()
        try:
            yield
        finally:
            os.chdir(here)
            sys.meta_path.remove(finder)
            for folder in finder.folders:
                sys.path.remove(folder)
            new = {name.partition(".")[0] for name in sys.modules} - before
            ours = {name for name in new if name in names or _lies_in(sys.modules.get(name), self.folders)}
            own = [name for name in sys.modules if name.partition(".")[0] in ours]
            self.modules.update({name: sys.modules.pop(name) for name in own})
            sys.modules.update(hidden)


def _importable_names(folders: list[Path]) -> set[str]:
    """Modules and packages that lie in the folders, but those called as one of the standard library's or loaded from there."""
    paths = [path for folder in folders for path in folder.iterdir()]
    found = {path.stem for path in paths if path.suffix == ".py" or (path / "__init__.py").is_file()}
    loaded = {name for name in found if _lies_in(sys.modules.get(name), folders)}
    return found - loaded - set(sys.stdlib_module_names)


def _lies_in(module: ModuleType | None, folders: list[Path]) -> bool:
    """Whether a top-level module is a file, or a package, right in one of the folders."""
    places = list(getattr(module, "__path__", None) or [getattr(module, "__file__", None)])
    return any(place is not None and Path(place).resolve().parent in folders for place in places)


def split_target(target: str) -> tuple[str, str]:
    """("my_reward.py" or "package.module", "name") of a target.

    Raises:
        InputError: it has another form, or no such file is there.
    """
    where, _, name = target.rpartition(":")
    if not where or not all(part.isidentifier() for part in name.split(".")):
        raise InputError(f"reward target {target!r}: expected file.py:function or package.module:function")
    if where.endswith(".py") and not Path(where).is_file():
        raise InputError(f"reward target {target!r}: no such file as {Path(where).absolute()}")
    return where, name


def load(target: str) -> tuple[Any, Place]:
    """What a target names, and where its later imports are to be looked for.

    Raises:
        InputError: no such file, module or name, or importing it fails.
    """
    where, name = split_target(target)
    path = Path(where).resolve()
    place = Place(list(dict.fromkeys((path.parent, _package_root(path.parent)))) if where.endswith(".py") else [])
    try:
        with place.importable():
            found: Any = _import_file(path) if where.endswith(".py") else importlib.import_module(where)
            for part in name.split("."):
                found = getattr(found, part, None)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"reward target {target!r}: {where} does not load: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if found is None:
        raise InputError(f"reward target {target!r}: {where} has no function {name!r}")
    return found, place


def _package_root(folder: Path) -> Path:
    """The folder that holds the outermost package which `folder` is a part of; without one, `folder` itself."""
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


def _import_file(path: Path) -> ModuleType:
    """Run a file as a module of the package it lies in, so that its relative imports work; without __init__.py files its
    folder counts as one. The package has a name of its own: files of one name in two folders are two modules."""
    root = _package_root(path.parent)
    top = root if root == path.parent else root / path.relative_to(root).parts[0]
    alias = ALIAS + hashlib.sha256(str(top).encode()).hexdigest()[:12]
    for name in [name for name in sys.modules if name.partition(".")[0] == alias]:
        del sys.modules[name]  # an earlier load: its files may have been edited since
    if top != root:
        package = importlib.util.spec_from_file_location(
            alias, top / "__init__.py", submodule_search_locations=[str(top)]
        )
    else:
        package = ModuleSpec(alias, None, is_package=True)
        package.submodule_search_locations = [str(top)]
    assert package is not None  # its file exists
    _execute(package)
    between = ".".join((alias, *path.parent.relative_to(top).parts))
    if between != alias:
        importlib.import_module(between)
    own = importlib.util.spec_from_file_location(f"{between}.{path.stem.replace('.', '_')}", path)
    assert own is not None
    return _execute(own)


def _execute(spec: ModuleSpec) -> ModuleType:
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    if spec.loader is not None:
        spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------ without running it


def source_files(target: str) -> list[Path]:
    """The file a target stands in, those of its packages, and those beside it that they import, found without running any.

    Of what is installed only the target's own package is followed. [] for what has no source file.

    Raises:
        InputError: the target has another form, or no such file is there.
    """
    where, _ = split_target(target)
    if where.endswith(".py"):
        first = Path(where).resolve()
    elif (found := _find_module(where)) is not None:
        first = found.resolve()
    else:
        return []
    root = _package_root(first.parent)
    folders = [folder for folder in (first.parent, root) if not INSTALLED & set(folder.parts)]
    packages = [each / "__init__.py" for each in first.parents if each.is_relative_to(root) and each != root]
    seen = [first, *(file for file in packages if file != first)]
    ahead = list(seen)
    while ahead:
        path = ahead.pop(0)
        new = [file for file in _imported_files(path, root, folders) if file not in seen]
        seen, ahead = [*seen, *dict.fromkeys(new)], [*ahead, *dict.fromkeys(new)]
    return seen


def _find_module(name: str) -> Path | None:
    """The source file of an installed module; its packages are not imported, as importlib.util.find_spec would."""
    locations: Any = None
    spec: ModuleSpec | None = None
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:count]), locations)
        if spec is None:
            return None
        locations = spec.submodule_search_locations or []
    assert spec is not None  # a name has a part
    return Path(spec.origin) if spec.has_location and spec.origin and spec.origin.endswith(".py") else None


def _imported_files(path: Path, root: Path, folders: list[Path]) -> list[Path]:
    """The files in `folders`, or in the package of `path`, that its import statements name."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []  # refused where it is loaded
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [file for name in node.names for file in _in(folders, name.name.split("."))]
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            starts = [path.parents[node.level - 1]] if node.level else folders
            if not node.level and (root / parts[0] / "__init__.py").is_file() and root / parts[0] in path.parents:
                starts = [*folders, root]  # its own package by name
            found += [file for name in node.names for file in _in(starts, [*parts, name.name])]
    return found


def _in(folders: list[Path], parts: list[str]) -> list[Path]:
    """The files that importing `parts` runs: of each package its __init__.py, then the module, in the first folder that has them."""
    if parts and parts[0] in sys.stdlib_module_names:
        return []
    for folder in folders:
        found = []
        for part in parts:
            folder = folder / part
            found += [file for file in (folder / "__init__.py", folder.with_name(f"{part}.py")) if file.is_file()]
        if found:
            return found
    return []
