"""No module above 400 lines, no function above 50: what is longer is named here, with its reason."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "bilevel"
LINES, STATEMENT_LINES = 400, 50

LONG_MODULES = {
    "problems/problem.py": "one class that users subclass; half of it documents what they override and call",
}

# Docstrings do not count.
LONG_FUNCTIONS = {
    # The commands: an option is a line, and typer reads them from the signature.
    "cleaning/command.py:clean": "options of a command",
    "hyperopt/command.py:tune": "options of a command",
    "meta/command.py:train": "options of a command",
    "meta/command.py:_run": "one experiment, from options to files",
    "meta/imaml.py:__init__": "settings of a public class, a line each",
    # Loops that are one derivation, with an invariant that holds from line to line.
    "linear/cg.py:_run": "the loop of conjugate gradients, with reorthogonalisation",
    "linear/_lsmr.py:lsmr": "the loop of LSMR",
    "linear/bicgstab.py:solve": "the loop of BiCGStab",
    "linear/gmres.py:_cycle": "one cycle of GMRES",
    "solvers/anderson.py:step": "one step of Anderson acceleration",
    "solvers/newton.py:solve": "the loop of Newton's method",
    "solvers/parts/newton_search.py:search": "one line search",
    "solvers/_base.py:iterate": "the loop of all inner solvers",
    # Decisions that are read from top to bottom, each case after the one before.
    "linear/_base.py:solve_linear": "solve, refine, judge: the order is the method",
    "linear/_judge.py:judge": "the order of a judgement",
    "linear/exact.py:_factorize": "which factorisation a matrix gets",
    "solvers/judging/judge.py:_by_error": "the order of a judgement",
    "solvers/judging/weighing.py:weigh": "whether an estimated error is small enough",
    "linear/scipy_bridge.py:solve": "one call of scipy, in and out",
    "solvers/constrained/bridges.py:_one": "one call of a user's solver, in and out",
}


def _functions() -> dict[str, int]:
    """Return the lines of every function, without its docstring; of equal names in a file the longest."""
    found: dict[str, int] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            first, lines = node.body[0], node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= first.end_lineno - first.lineno + 1
            name = f"{path.relative_to(PACKAGE).as_posix()}:{node.name}"
            found[name] = max(lines, found.get(name, 0))
    return found


def test_modules_are_short() -> None:
    lines = {p.relative_to(PACKAGE).as_posix(): len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    long = {name: count for name, count in lines.items() if count > LINES}
    assert set(long) <= set(LONG_MODULES), (
        f"split these at their second reason to change, or name the reason here: {long}"
    )
    assert set(LONG_MODULES) <= set(long), "these are short by now: take them off the list"


def test_functions_are_short() -> None:
    long = {name: count for name, count in _functions().items() if count > STATEMENT_LINES}
    unnamed = {name: count for name, count in long.items() if name not in LONG_FUNCTIONS}
    assert not unnamed, f"give their parts names, or name the reason here: {unnamed}"
    assert set(LONG_FUNCTIONS) <= set(long), f"short by now: {set(LONG_FUNCTIONS) - set(long)}"
