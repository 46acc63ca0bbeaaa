"""Change the code in seeded places, one at a time, and count the changes that no test notices. The last line is JSON.

    python experiments/mutation_tests.py --count 100 --seed 0 [--resume FILE]

A mutation swaps a comparison, an arithmetic or a boolean operator, removes a `not`, changes a number by one, or
exchanges `min` and `max` or `amin` and `amax`. Docstrings, annotations, error messages and defaults of settings stay.
All tests run once without a mutation, to learn which test files execute which lines and how long they take. For each
mutation, the test files that execute its line then run on a copy of the repository, in forked children that have
already imported the large libraries: first the one with the module's name, then the fastest. If no test executes the
line, as in compiled functions and at import, the tests of the package and of whole runs run. A failure or a time-out
ends the mutation.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import coverage
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("quantizers", "calibration", "data", "measure", "offload")
RUNS = ("tests/pipeline", "tests/offload/test_runs.py", "tests/cli/test_main.py")
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "amin": "amax", "amax": "amin", "argmin": "argmax", "argmax": "argmin"}


def places(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the index of each node that can be changed, in the order of `ast.walk`, and the kind of change."""
    skipped = {id(inner) for node in ast.walk(tree) for outer in _untouched(node) for inner in ast.walk(outer)}
    for index, node in enumerate(ast.walk(tree)):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
            yield index, "comparison"
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not _is_text(node):
            yield index, "arithmetic"
        elif isinstance(node, ast.BoolOp):
            yield index, "boolean"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield index, "not"
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield index, "number"
        elif isinstance(node, ast.Name | ast.Attribute) and _name(node) in NAMES:
            yield index, "extremum"


def _untouched(node: ast.AST) -> list[ast.AST]:
    """Return the parts of a node that have no meaning at run time, or only for messages."""
    if isinstance(node, ast.AnnAssign):
        return [node.annotation]
    if isinstance(node, ast.FunctionDef):
        arguments = [*node.args.args, *node.args.kwonlyargs]
        return [part for part in (node.returns, *(one.annotation for one in arguments)) if part is not None]
    if isinstance(node, ast.Raise | ast.JoinedStr):
        return [node]
    if isinstance(node, ast.ClassDef):  # the settings' defaults are those of conf
        return [one for one in node.body if isinstance(one, ast.AnnAssign)]
    if isinstance(node, ast.If) and _name(node.test) == "TYPE_CHECKING":
        return [node]
    return []


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _is_text(node: ast.BinOp) -> bool:
    sides = (node.left, node.right)
    return any(isinstance(side, ast.JoinedStr) or isinstance(getattr(side, "value", None), str) for side in sides)


def mutate(source: str, index: int, kind: str) -> tuple[str, int, str]:
    """Return the changed source, the line and the old and new text of the changed expression."""
    tree = ast.parse(source)
    node: Any = list(ast.walk(tree))[index]
    before = ast.unparse(node)
    if kind == "comparison":
        node.ops[0] = COMPARISONS[type(node.ops[0])]()
    elif kind == "arithmetic":
        node.op = ARITHMETIC[type(node.op)]()
    elif kind == "boolean":
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif kind == "not":
        node.op, node.operand = ast.Not(), ast.UnaryOp(ast.Not(), node.operand)
    elif kind == "number":
        node.value = node.value + 1 if isinstance(node.value, int) else node.value * 2 + 0.5 * (not node.value)
    elif isinstance(node, ast.Name):
        node.id = NAMES[node.id]
    else:
        node.attr = NAMES[node.attr]
    return ast.unparse(tree), node.lineno, f"{before}  ->  {ast.unparse(node)}"


def draw(count: int, seed: int) -> list[tuple[str, int, str]]:
    """Draw places (file, index, kind) without repetition, over all files of the packages."""
    every = []
    for package in PACKAGES:
        for path in sorted((ROOT / "haq_lab" / package).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            every += [(name, *place) for place in places(ast.parse(path.read_text()))]
    return random.Random(seed).sample(every, count)


def test_files(name: str, line: int, executed: dict[str, Any]) -> list[str]:
    """Return the tests to run for a line of a file, in their order.

    Args:
        name: The file.
        line: The line.
        executed: The result of `executed_lines`.
    """
    path = Path(name).relative_to("haq_lab")
    own = str(Path("tests") / path.parent / f"test_{path.name}")
    files = [file for file, lines in executed["lines"].items() if line in lines.get(name, [])]
    if not files:
        near = [own] if (ROOT / own).exists() else []
        return [*near, f"tests/{path.parts[0]}", *RUNS]
    return sorted(files, key=lambda file: (file != own, executed["seconds"][file]))


class Recorder:
    """A pytest plugin that records the lines that each test file executes, and its seconds."""

    def __init__(self, copy: Path):
        packages = [str(copy / "haq_lab" / package) for package in PACKAGES]
        self._coverage = coverage.Coverage(data_file=None, source=packages, config_file=False)
        self._copy, self._file, self._began = copy, "", 0.0
        self.seconds: dict[str, float] = {}
        self._coverage.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._end()
        self._file, self._began = nodeid.partition("::")[0], time.monotonic()
        self._coverage.switch_context(self._file)

    def _end(self) -> None:
        if self._file:
            self.seconds[self._file] = self.seconds.get(self._file, 0.0) + time.monotonic() - self._began

    def result(self) -> dict[str, Any]:
        """Return `lines` by test file and source file, and `seconds` by test file."""
        self._end()
        self._coverage.stop()
        data, lines = self._coverage.get_data(), {}
        for file in self.seconds:
            data.set_query_context(file)
            found = {str(Path(path).relative_to(self._copy)): data.lines(path) for path in data.measured_files()}
            lines[file] = {path: own for path, own in found.items() if own}
        return {"lines": lines, "seconds": self.seconds}


def executed_lines(copy: Path) -> dict[str, Any]:
    """Run the tests once in a forked child. Return `lines` by test file and source file, and `seconds` by test file."""
    target = copy / "executed.json"

    def run() -> int:
        recorder = Recorder(copy)
        status = _run_pytest(copy, [*(f"tests/{package}" for package in PACKAGES), *RUNS], [recorder])
        target.write_text(json.dumps(recorder.result()))
        return status

    if _status_of(run, limit=float("inf")) != 0:
        raise SystemExit("the tests fail without a mutation")
    found: dict[str, Any] = json.loads(target.read_text())
    return found


def noticed_by(copy: Path, tests: list[str], limit: float) -> str:
    """Run tests, one file or folder after the other. Return the first that fails, or an empty string."""
    for test in tests:
        status = _status_of(partial(_run_pytest, copy, [test], []), limit)
        if status not in (0, 5):  # 5: no test was left in it
            return test if status is not None else f"time-out of {test}"
    return ""


def _status_of(run: Callable[[], int], limit: float) -> int | None:
    """Return the status of a function that runs in a forked child, or None if it takes longer than `limit` seconds."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()  # so that a time-out can kill the child's own children too
            status = run()
        finally:
            os._exit(status)  # without the clean-up of the parent's context managers
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _run_pytest(copy: Path, tests: list[str], plugins: list[Any]) -> int:
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os.environ["PYTHONPATH"] = str(copy)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    early = "ignore::pytest.PytestAssertRewriteWarning"  # the parent has imported a plugin's package
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-n", "0", "-W", early, *tests], plugins))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="number of mutations")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one group of tests")
    parser.add_argument("--resume", type=Path, help="file of the results so far; finished mutations are not repeated")
    arguments = parser.parse_args()
    state: dict[str, Any] = {"executed": None, "finished": []}
    if arguments.resume and arguments.resume.exists():
        state = json.loads(arguments.resume.read_text())
    finished: list[dict[str, Any]] = state["finished"]
    import datasets  # noqa: F401
    import torch
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".cache"))
        state["executed"] = executed = state["executed"] or executed_lines(copy)
        for name, index, kind in draw(arguments.count, arguments.seed)[len(finished) :]:
            source = (ROOT / name).read_text()
            changed, line, text = mutate(source, index, kind)
            (copy / name).write_text(changed)
            by = noticed_by(copy, test_files(name, line, executed), arguments.limit)
            (copy / name).write_text(source)
            finished.append({"file": name, "line": line, "change": text, "noticed_by": by})
            print(f"{len(finished)}: {name}:{line}: {text}: {by or 'SURVIVED'}", flush=True)
            if arguments.resume:
                arguments.resume.write_text(json.dumps(state))
    survived = sum(not one["noticed_by"] for one in finished)
    print(json.dumps({"mutations": len(finished), "survived": survived}))


if __name__ == "__main__":
    main()
