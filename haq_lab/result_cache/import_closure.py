"""Find the source files that a module depends on, from the import statements in them."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from haq_lab.utils.paths import PACKAGE


def import_closure(*modules: str) -> set[Path]:
    """Return the files of `haq_lab` that `modules` are made of or import, directly or through other modules.

    Imports inside functions and under TYPE_CHECKING count, so the closure can be too large but never too small.
    A class that a config names by `_target_` is not imported anywhere: pass its module too. Names of modules
    outside `haq_lab` are ignored.

    Raises:
        ValueError: If `haq_lab` has no module of that name. A key without its code would match outdated results.

    Example:
        >>> sorted(path.name for path in import_closure("haq_lab.utils.units"))
        ['__init__.py', '__init__.py', 'units.py']
    """
    for module in modules:
        package, *parts = module.split(".")
        path = PACKAGE.joinpath(*parts)
        if package == PACKAGE.name and not (path.is_dir() or path.with_suffix(".py").is_file()):
            raise ValueError(f"{module}: haq_lab has no such module")
    closure: set[Path] = set()
    waiting = {path for module in modules for path in _files_of(module)}
    while waiting:
        path = waiting.pop()
        closure.add(path)
        waiting |= {file for module in _imports(path) for file in _files_of(module)} - closure
    return closure


def _files_of(module: str) -> Iterator[Path]:
    """Yield the file of a module of `haq_lab`, and the `__init__.py` of each package around it."""
    package, *parts = module.split(".")
    if package != PACKAGE.name:
        return
    for depth in range(len(parts) + 1):
        inside = PACKAGE.joinpath(*parts[:depth])
        for path in (inside / "__init__.py", inside.with_suffix(".py")):
            if path.is_file():
                yield path


@functools.cache
def _imports(path: Path) -> tuple[str, ...]:
    """Return the dotted names that a file imports; of `from a import b`, both `a` and `a.b`."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:  # the linter allows absolute imports only
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(names)
