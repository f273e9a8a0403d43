"""The docstring contract: what the docstring of every public object must hold.

Every object of ``bilevel.__all__`` and of the public submodules' ``__all__`` has

- a summary of one line that ends in a period;
- ``Parameters``, which names every argument, with shape or dtype words for tensors;
- ``Returns``, for a function that returns something;
- ``Raises``, for an object that checks its arguments;
- ``References``, for a published method;
- an example that prints a number; of an error or an enumeration, one that prints anything.
"""

import ast
import dataclasses
import doctest
import enum
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from bilevel.errors import ArgumentError
from bilevel.layers.differentiation import Differentiation
from bilevel.linear._base import LinearSolver
from bilevel.outer.methods import OuterMethod
from bilevel.prox import Term
from bilevel.robust import RobustLoss
from bilevel.solvers._base import InnerSolver
from bilevel.stochastic import StochasticMethod

SUBMODULES = (
    "prox",
    "cones",
    "robust",
    "stochastic",
    "cleaning",
    "learnable",
    "testing",
    "loggers",
    "operators",
    "certificates",
    "meta",
    "display",
    "errors",
    "hyperopt.linear_models",
    "testing.strategies",
)

# A class below one of these is a published method: its docstring names the paper.
METHODS = (InnerSolver, LinearSolver, StochasticMethod, Term, RobustLoss, Differentiation, OuterMethod)
ABSTRACT = {cls.__name__ for cls in METHODS} | {"AdjointMethod"}

# Functions that implement a published method.
METHOD_FUNCTIONS = {
    "contraction_distance",
    "gauss_newton",
    "identify_support",
    "lanczos_spectrum",
    "newton_on_support",
    "proximal_distance",
}

# Methods without a paper, and why.
NO_REFERENCES = {
    "BatchedSolver": "it has no method of its own",
    "Custom": "the user's own term",
    "Zero": "the identity",
}

# Classes that a function makes: its docstring holds the arguments and the example.
MADE_BY = {
    "EquilibriumLayer": "bilevel.equilibrium",
    "Hypergradient": "bilevel.BilevelProblem",
    "Layer": "bilevel.argmin",
    "LeastSquaresLayer": "bilevel.least_squares",
    "LinearLayer": "bilevel.linear_solve",
    "OuterRun": "bilevel.minimize",
    "RectangularLayer": "bilevel.linear_solve",
    "Recording": "bilevel.record",
}

# Abstract bases whose example is that of a subclass, and what needs a package that is not here.
NO_EXAMPLE = {
    "MLflowLogger": "needs MLflow, which is not installed here",
    "AdjointMethod": "see SOBA, a method with an adjoint",
    "StochasticMethod": "see SOBA",
    "Goal": "see InnerSolver, which is given one",
    "InnerSolution": "see InnerSolver, which returns one",
    "assert_gradients": "it prints nothing: the example shows the error",
    "LinearModel": "see Ridge",
    "ProgressBar": "it draws on a terminal",
    "download_omniglot": "it needs the network",
    "load_omniglot": "it needs the downloaded files",
}

ARGUMENT_ERRORS = ("ArgumentError", "ShapeError", "DtypeError", "ConstantsError", "CapturedTensorError")
TENSOR = re.compile(r"\bTensor\b|\bScale\b|\bPytree\b|\bPyTree\b")
SHAPE_WORDS = re.compile(r"\([^)]*\)|\bscalar\b|\bshape|\bpytree|\bdtype|\bfloat|\bint64\b|\bsize\b|\bentr(y|ies)\b")
SECTION = re.compile(r"^(\w+)\n-{3,}$", re.MULTILINE)


def objects() -> Iterator[tuple[str, Any]]:
    """Yield every public object once, with the path that users import."""
    seen: set[int] = set()
    modules = ["bilevel", *(f"bilevel.{name}" for name in SUBMODULES)]
    for path in modules:
        module = importlib.import_module(path)
        for name in module.__all__:
            value = getattr(module, name)
            documented = inspect.isclass(value) or inspect.isroutine(value)
            if not isinstance(value, ModuleType) and documented and id(value) not in seen:
                seen.add(id(value))
                yield f"{path}.{name}", value


PUBLIC = dict(objects())


def sections(text: str) -> dict[str, str]:
    """Split a docstring at its underlined titles; the part before the first title has the name ""."""
    parts = SECTION.split(text)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def is_container(value: Any) -> bool:
    """Say whether the object is an error, a warning or an enumeration."""
    return inspect.isclass(value) and issubclass(value, (BaseException, enum.Enum))


def arguments(value: Any) -> dict[str, Any]:
    """Return the annotations of the arguments that a caller may pass."""
    made_by_fields = dataclasses.is_dataclass(value) and value.__dataclass_params__.init
    if inspect.isclass(value) and made_by_fields:
        return {f.name: f.type for f in dataclasses.fields(value) if f.init and not f.name.startswith("_")}
    if inspect.isclass(value) and value.__init__ is object.__init__:
        return {}
    called = inspect.signature(value.__init__ if inspect.isclass(value) else value).parameters
    return {name: p.annotation for name, p in called.items() if name != "self" and not name.startswith("_")}


def entries(parameters: str) -> dict[str, str]:
    """Return each entry of a ``Parameters`` section: the names of its first line, and its whole text."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in textwrap.dedent(parameters).splitlines():
        if line and not line.startswith(" "):
            names = [name.strip(" *`") for name in line.split(" : ")[0].split(",")]
            found = dict.fromkeys(names, "") | found
        for name in names:
            found[name] += line + "\n"
    return found


def raises_argument_errors(value: Any) -> bool:
    """Say whether the function, or the class when it is made, raises an argument error or calls a ``check_`` function."""
    made = [getattr(value, name, None) for name in ("__init__", "__post_init__")] if inspect.isclass(value) else [value]
    for function in made:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
        except (TypeError, OSError):
            continue
        called = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        if any(
            name in ARGUMENT_ERRORS or name.split(".")[-1].startswith(("check_", "_check", "require"))
            for name in called
        ):
            return True
    return False


def prints(pattern: str, text: str) -> bool:
    """Say whether an example prints what fits ``pattern``."""
    wanted = (example.want for example in doctest.DocTestParser().get_examples(text))
    return any(re.search(pattern, want) for want in wanted)


def breaches(path: str, value: Any) -> list[str]:
    """Return what the docstring of a public object lacks."""
    name = path.rsplit(".", 1)[-1]
    text = inspect.getdoc(value) or ""
    own = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    found: list[str] = []
    if not own:
        return ["no docstring of its own"]
    summary, *_ = text.split("\n\n")
    if "\n" in summary or not summary.endswith("."):
        found.append("summary: one line that ends in a period")
    if is_container(value):
        return found + ["Examples: none prints anything"] * (not prints(r"\S", text))
    held = sections(text)
    taken = {} if name in MADE_BY else arguments(value)
    described = entries(held.get("Parameters", "") + held.get("Attributes", ""))
    for argument, annotation in taken.items():
        if argument not in described:
            found.append(f"Parameters: no {argument}")
        elif TENSOR.search(str(annotation)) and not SHAPE_WORDS.search(described[argument]):
            found.append(f"Parameters: no shape or dtype for {argument}")
    returned = inspect.signature(value).return_annotation if inspect.isroutine(value) else None
    if returned not in (None, "None") and not {"Returns", "Yields"} & held.keys():
        found.append("Returns: missing")
    if name not in MADE_BY and raises_argument_errors(value) and "Raises" not in held:
        found.append("Raises: missing")
    published = (
        inspect.isclass(value) and issubclass(value, METHODS) and name not in ABSTRACT
    ) or name in METHOD_FUNCTIONS
    if published and not {"References", "Source"} & held.keys() and name not in NO_REFERENCES:
        found.append("References: missing")
    if name not in MADE_BY.keys() | NO_EXAMPLE.keys() and not prints(r"\d", text):
        found.append("Examples: none prints a number")
    return found


@pytest.mark.parametrize("path", PUBLIC)
def test_docstring_contract(path: str) -> None:
    assert not breaches(path, PUBLIC[path])


@pytest.mark.parametrize("name", MADE_BY)
def test_factory_has_the_example(name: str) -> None:
    assert prints(r"\d", PUBLIC[MADE_BY[name]].__doc__)


def test_exemptions_are_needed() -> None:
    """An exempt name that is no longer public, or that now keeps the contract, leaves the list."""
    names = {path.rsplit(".", 1)[-1]: value for path, value in PUBLIC.items()}
    assert {*NO_REFERENCES, *MADE_BY, *NO_EXAMPLE} <= names.keys()
    assert not [name for name in NO_EXAMPLE if prints(r"\d", names[name].__doc__)]
    assert not [name for name in NO_REFERENCES if "References" in sections(inspect.getdoc(names[name]) or "")]


def undocumented() -> None:
    return None


class Squared(LinearSolver):
    """Solve x = b².

    Parameters
    ----------
    other
        It is not an argument.

    Examples
    --------
    >>> 1 == 1
    True
    """

    def __init__(self, scale: "torch.Tensor") -> None:  # noqa: F821
        raise ArgumentError("never")

    def solve(self, *args: Any) -> Any:
        raise NotImplementedError


def test_breaches_are_found() -> None:
    assert breaches("undocumented", undocumented) == ["no docstring of its own"]
    assert breaches("Squared", Squared) == [
        "Parameters: no scale", "Raises: missing", "References: missing", "Examples: none prints a number",
    ]  # fmt: skip
