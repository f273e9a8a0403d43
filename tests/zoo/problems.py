"""The problems of other projects' test suites: their mathematics and starting points as facts, written anew.

Sources: optimistix, ``tests/helpers.py`` (which takes many from Moré, Garbow, Hillstrom, "Testing Unconstrained Optimization Software",
1981, and from Wikipedia's list of test functions), and jaxopt, ``tests/fixed_point_iteration_test.py`` and ``anderson_test.py``. Both
draw some matrices at random with a generator that torch does not have: ours are drawn with the same shape and law by torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import softplus
from torch.utils import _pytree as pytree

from .support import F64, flat, like

Tree = Any


@dataclass(frozen=True)
class Case:
    """A function of (x, *args), where its search begins, and about where its solution lies.

    ``singular``: the Jacobian is singular at the solution,
    so that a refusal by name is right as well. ``stiff``: the condition number is beyond what float32 can solve, where it is as well.
    ``several``: there are several minima within ``scale`` of the solution.
    """

    name: str
    function: Callable[..., Tree]
    init: Tree
    args: tuple[Any, ...]
    solution: Tree
    singular: bool = False
    stiff: bool = False
    scale: float = 1.0
    several: bool = False


def scalar(number: float) -> torch.Tensor:
    return torch.tensor(number, dtype=F64)


def vector(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=F64)


def full(number: float, *shape: int) -> torch.Tensor:
    return torch.full(shape, number, dtype=F64)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def uniform(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def filled(tree: Tree, number: float) -> Tree:
    return pytree.tree_map(lambda leaf: torch.full_like(leaf, number), tree)


# --- optimistix: minimisation ---


def bowl(tree: Tree, matrix: torch.Tensor) -> torch.Tensor:
    y = flat(tree)
    return y @ matrix @ y


def diagonal_bowl(tree: Tree, weights: Tree) -> torch.Tensor:
    """The sum of the squares of y²(0.1 + w): its Hessian is zero at the minimum."""
    return ((flat(tree) ** 2 * (0.1 + flat(weights))) ** 2).sum()


def steep_chain(tree: Tree, const: torch.Tensor) -> torch.Tensor:
    """What optimistix calls Rosenbrock: its residuals are linear."""
    y = flat(tree)
    return ((100 * (y[1:] - y[:-1])) ** 2).sum() + ((const - y[:-1]) ** 2).sum()


def rosenbrock(tree: Tree, const: torch.Tensor) -> torch.Tensor:
    y = flat(tree)
    return (100 * (y[1:] - y[:-1] ** 2) ** 2).sum() + ((const - y[:-1]) ** 2).sum()


def network_fit(tree: Tree, x: torch.Tensor) -> torch.Tensor:
    """Squares of the squared errors of a relu network of width 8 that is to learn x²: more weights than are determined."""
    hidden = torch.relu(x @ tree["weight1"].mT + tree["bias1"])
    return (((hidden @ tree["weight2"].mT + tree["bias2"] - x**2) ** 2) ** 2).sum()


def variably_dimensioned(tree: Tree, const: torch.Tensor) -> torch.Tensor:
    y = flat(tree) - const
    total = (torch.arange(1, len(y) + 1, dtype=y.dtype) * y).sum()
    return (y**2).sum() + total**2 + total**4


def trigonometric(tree: Tree, const: torch.Tensor) -> torch.Tensor:
    y = flat(tree)
    n = len(y)
    k = torch.arange(1, n + 1, dtype=y.dtype)
    return ((n - torch.cos(y).sum() + k * (const - torch.cos(y)) - torch.sin(y)) ** 2).sum()


def himmelblau(tree: Tree, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    y, z = tree
    return (y**2 + z - a) ** 2 + (y + z**2 - b) ** 2


def matyas(tree: Tree, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    y, z = tree
    return a * (y**2 + z**2) - b * y * z


def beale(tree: Tree, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    y, z = tree
    return (a - y + y * z) ** 2 + (b - y + y * z**2) ** 2 + (c - y + y * z**3) ** 2


def eggholder(tree: Tree, shift: torch.Tensor) -> torch.Tensor:
    y, z = tree
    first = -(z + shift) * torch.sin(torch.sqrt(torch.abs(0.5 * y + z + shift)))
    return first - y * torch.sin(torch.sqrt(torch.abs(y - (z - shift))))


def square_minus_one(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return ((x - shift) ** 2).sum() - 1.0


def decay(rate: torch.Tensor, steps: int = 40) -> torch.Tensor:
    """Return y(10) of y′ = −rate·y, y(0) = 10, by Runge and Kutta's method."""
    y, h = torch.full_like(rate, 10.0), 10.0 / steps
    for _ in range(steps):
        k1 = -rate * y
        k2 = -rate * (y + h / 2 * k1)
        k3 = -rate * (y + h / 2 * k2)
        k4 = -rate * (y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y


def fit_decay(rate: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    return ((decay(true) - decay(rate)) ** 2).sum()


def parabola(y: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    return ((y - centre) ** 2).sum()


_BOWL_TREE = ({"a": full(0.05, 2, 3, 3)}, full(0.05, 2))
_A = normal(17, 20, 20)
_NETWORK = {
    "weight1": vector(3.39958394, -0.00648151, -0.57178741, -0.9259611, 0.43010087, 0.74950293, -0.35932756, 1.28393738)[:, None],
    "bias1": vector(-0.14702571, 3.61400359, -1.01404942, 0.3223137, 2.19991259, -0.51860872, 0.4717813, 0.9449359),
    "weight2": vector(0.26476087, 0.05913492, 0.40830152, 0.704758, 0.64347694, 0.85807767, 0.54285774, 0.05507022)[None],
    "bias2": vector(-2.16578771),
}  # fmt: skip
_TENTHS = 1 - torch.arange(1, 11, dtype=F64) / 10
_CHAIN_TREE = (full(1.45, 2, 4), {"a": full(1.45, 2, 3, 2)}, ())
_WAVE_TREE = ((full(1 / 70, 40), (), {"a": full(1 / 70, 20)}), full(1 / 70, 10))
_ONE = (scalar(1.0),)

MINIMISATION = (
    Case("bowl", bowl, _BOWL_TREE, (_A.mT @ _A,), filled(_BOWL_TREE, 0.0), scale=0.05),
    Case("diagonal bowl", diagonal_bowl, _BOWL_TREE, (pytree.tree_map(lambda t: t.square(), _BOWL_TREE),), filled(_BOWL_TREE, 0.0), singular=True),
    Case("steep chain", steep_chain, [scalar(1.5), scalar(1.5)], _ONE, [scalar(1.0), scalar(1.0)]),
    Case("steep chain of a tree", steep_chain, _CHAIN_TREE, _ONE, filled(_CHAIN_TREE, 1.0), stiff=True),
    Case("rosenbrock", rosenbrock, [scalar(1.5), scalar(1.5)], _ONE, [scalar(1.0), scalar(1.0)]),
    Case("network", network_fit, _NETWORK, (torch.linspace(0, 1, 100, dtype=F64)[:, None],), _NETWORK, singular=True),
    Case("variably dimensioned", variably_dimensioned, _TENTHS, _ONE, full(1.0, 10)),
    Case("variably dimensioned tree", variably_dimensioned, (_TENTHS[:6], {"a": _TENTHS[6:]}), _ONE, (full(1.0, 6), {"a": full(1.0, 4)})),
    Case("trigonometric", trigonometric, full(1 / 70, 70), _ONE, full(0.0, 70), scale=0.05, several=True),
    Case("trigonometric tree", trigonometric, _WAVE_TREE, _ONE, filled(_WAVE_TREE, 0.0), scale=0.05, several=True),
    Case("himmelblau", himmelblau, [scalar(2.0), scalar(2.5)], (scalar(11.0), scalar(7.0)), [scalar(3.0), scalar(2.0)]),
    Case("matyas", matyas, [scalar(6.0), scalar(6.0)], (scalar(0.26), scalar(0.48)), [scalar(0.0), scalar(0.0)]),
    Case("beale", beale, [scalar(2.0), scalar(0.0)], (scalar(1.5), scalar(2.25), scalar(2.625)), [scalar(3.0), scalar(0.5)]),
    Case("eggholder", eggholder, [scalar(440.0), scalar(450.0)], (scalar(47.0),), [scalar(459.15713), scalar(444.29071)]),
    Case("square minus one", square_minus_one, scalar(1.0), (scalar(0.0),), scalar(0.0)),
    Case("decay", fit_decay, scalar(0.6), (scalar(0.5),), scalar(0.5)),
    Case("parabola", parabola, scalar(1.0), (scalar(2.0),), scalar(2.0)),
)  # fmt: skip


# --- optimistix: fixed points, and roots of T(y) − y ---


def exponential(tree: Tree, const: torch.Tensor) -> Tree:
    return pytree.tree_map(lambda y: torch.exp(-const * y), tree)


def cosine(tree: Tree, const: torch.Tensor) -> Tree:
    return pytree.tree_map(lambda y: torch.cos(const * y), tree)


def small_network(tree: Tree, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor) -> Tree:
    return like(0.1 * (w2 @ softplus(w1 @ flat(tree) + b1) + b2), tree)


def heat(y: torch.Tensor, const: torch.Tensor) -> torch.Tensor:
    """A step of Crank and Nicolson's scheme, with the Laplacian as that suite computes it, which is the identity."""
    y0 = torch.linspace(-1, 1, len(y), dtype=y.dtype) ** 2
    return const * (y0 + 0.5 * ((1 - y) * y + (1 - y0) * y0))


def robertson(y: torch.Tensor, k1: torch.Tensor, k2: torch.Tensor, k3: torch.Tensor) -> torch.Tensor:
    slow, fast, back = k1 * y[0], k2 * y[1] ** 2, k3 * y[1] * y[2]
    return torch.stack([back - slow, slow - fast - back, fast])


def midpoint(form: str, right_side: Callable[..., torch.Tensor], step: float) -> Callable[..., Tree]:
    """Return the implicit midpoint rule from y₀ = 0 as a map of y, of f = f(y₀ + h f), or of k = h f(y₀ + k)."""

    def mapping(tree: Tree, *args: torch.Tensor) -> Tree:
        y = flat(tree)
        if form == "y":
            return like(step * right_side(0.5 * y, *args), tree)
        return like(right_side(step * y, *args) if form == "f" else step * right_side(y, *args), tree)

    return mapping


_TREE = ({"a": full(0.5, 3, 2, 4)}, full(0.5, 4))
_SPECIES = (full(1.0, 2), {"b": scalar(1.0)})
_RATES = (scalar(0.04), scalar(3e7), scalar(1e4))
_M = normal(19, 28, 28)


def _weights() -> tuple[torch.Tensor, ...]:
    within = lambda seed, size, *shape: (2 * uniform(seed, *shape) - 1) / math.sqrt(size)
    return within(1, 28, 8, 28), within(2, 28, 8), within(3, 8, 28, 8), within(4, 8, 28)


def _linear(y: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return matrix @ y


def _settled() -> torch.Tensor:
    """The solution of the heat step: y² + y = 3y₀ − y₀²."""
    y0 = torch.linspace(-1, 1, 100, dtype=F64) ** 2
    return (torch.sqrt(1 + 4 * (3 * y0 - y0**2)) - 1) / 2


def _network_solution() -> Tree:
    tree = _TREE
    for _ in range(200):
        tree = small_network(tree, *_weights())
    return tree


FIXED_POINTS = (
    Case("cosine", cosine, _TREE, _ONE, filled(_TREE, 0.7390851332151607)),
    Case("exponential", exponential, _TREE, _ONE, filled(_TREE, 0.5671432904097838)),
    Case("network", small_network, _TREE, _weights(), _network_solution()),
    Case("heat", heat, full(1.0, 100), _ONE, _settled()),
    *(Case(f"linear midpoint in {form}", midpoint(form, _linear, 1 / 16), _TREE, (_M,), filled(_TREE, 0.0)) for form in "yfk"),
    *(Case(f"Robertson's midpoint in {form}", midpoint(form, robertson, 1e-8), _SPECIES, _RATES, filled(_SPECIES, 0.0)) for form in "yfk"),
)  # fmt: skip


# --- jaxopt: fixed points ---


def geometric(x: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    return rates * x


def powers(x: Tree) -> Tree:
    return torch.sin(x[0]) * x[0] ** 2, x[1] ** 3


def powers_and_a_flip(x: Tree) -> Tree:
    return torch.sin(x[0]) * x[0] ** 2, (x[1][0] ** 3, -x[1][1])


def shifted_cosine(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    return torch.cos(x) + theta


def affine(x: torch.Tensor, matrix: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return matrix @ x + b


def halfway(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return 0.5 * x + b


def rotation(x: torch.Tensor, angles: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Rotations in planes about ``centre``: nonexpansive, so that plain iteration goes round for ever."""
    u, v = (x - centre).reshape(-1, 2).unbind(1)
    cos, sin = torch.cos(angles), torch.sin(angles)
    return torch.stack([cos * u - sin * v, sin * u + cos * v], 1).reshape(-1) + centre


def _contraction(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    m = 2 * uniform(0, n, n) - 1
    m = m + m.mT
    return m / (2 * torch.linalg.eigvalsh(m).abs().max() + 1e-4), uniform(1, n)


def _solved(matrix: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve(torch.eye(len(b), dtype=F64) - matrix, b)


_SMALL, _LARGE = _contraction(10), _contraction(200)
_POWERS = (vector(0.6, 0.0, -0.1), vector(0.7, 0.5)[:, None])
_FLIPPED = (_POWERS[0], (_POWERS[1], vector(-1.0, 0.0, 2.0, -0.4)[None] / 3))
_COSINES = (vector(0.7390851332151607, math.pi / 2), vector(0.0, math.pi / 2))
_ANGLES = math.pi / vector(2, 3, 4, 5, 6, 1.27, 1.73)
_CENTRE = torch.arange(1, 15, dtype=F64)

JAXOPT = (
    Case("geometric decay", geometric, vector(1.0, 0.4, -0.2), (vector(0.9, 0.99, 0.999),), full(0.0, 3)),
    Case("flat landscape", geometric, vector(1.0, -0.5), (vector(0.05, 0.2),), full(0.0, 2)),
    Case("powers", powers, _POWERS, (), filled(_POWERS, 0.0)),
    Case("powers and a flip", powers_and_a_flip, _FLIPPED, (), filled(_FLIPPED, 0.0)),
    Case("cosine from pi/4", shifted_cosine, vector(0.3, math.pi / 4), (_COSINES[1],), _COSINES[0]),
    Case("cosine from zero", shifted_cosine, vector(0.0, math.pi / 4), (_COSINES[1],), _COSINES[0]),
    Case("cosine from its solution", shifted_cosine, vector(0.0, math.pi / 2), (_COSINES[1],), _COSINES[0]),
    Case("cosine from one", shifted_cosine, vector(1.0), (vector(0.0),), vector(0.7390851332151607)),
    Case("a scalar", halfway, scalar(0.0), (scalar(0.5),), scalar(1.0)),
    Case("halfway", halfway, vector(1.0, -0.5), (scalar(0.5),), full(1.0, 2)),
    Case("small contraction", affine, full(0.0, 10), _SMALL, _solved(*_SMALL)),
    Case("large contraction", affine, full(0.0, 200), _LARGE, _solved(*_LARGE)),
    Case("rotation", rotation, uniform(5, 14), (_ANGLES, _CENTRE), _CENTRE),
)
