"""A Kronecker-factored approximation of a network's Hessian, from a few products with random vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn

from bilevel._torch.factorisations import eigh
from bilevel.errors import ArgumentError, ShapeError
from bilevel.linear._approximation import Approximation
from bilevel.operators import LinearOperator
from bilevel.pytree import Raveler
from bilevel.setting_checks import check_number, check_steps

__all__ = ["Kronecker"]

# The longest side of a weight matrix that gets a full factor. A longer side gets a diagonal one.
_LONGEST_SIDE = 2048
# The most numbers of products that are held at a time.
_CHUNK = 2**22


@dataclass(frozen=True)
class Kronecker(Approximation):
    r"""(M + ρI)⁻¹ b in the place of H⁻¹ b. In M, each weight matrix W (o, i) of a network has one block A ⊗ B, with A (i, i) and B (o, o).

    K-FAC takes A and B from the inputs and the output gradients of each layer. Here they come from products
    with H alone, so that any function of any weights will do. Let v be a random normal vector, and V and Y the parts of v
    and of H v that belong to W. If the block of H is A ⊗ B, then E[Y Yᵀ] = tr(A²) B² and E[Yᵀ Y] = tr(B²) A². So
    A ⊗ B = E[Yᵀ Y]^½ ⊗ E[Y Yᵀ]^½ / (E‖Y‖²)^½. The expectation is the mean over the probes. A and B are positive semidefinite, whatever
    the signs of H's eigenvalues are. A kernel of a convolution is the matrix (out, in · height · width). A vector, such as a bias or a
    matrix of one row, has a diagonal block, and a side of more than 2,048 a diagonal factor.

    The report has the residual of H x = b. With no accuracy asked, the bias is not a failure: the status is ``BUDGET_SPENT``.
    ``CG(preconditioner=Kronecker(...))`` has no bias.

    Parameters
    ----------
    shapes
        The shapes of the tensors of the unknown, in their order; :meth:`like` reads them from the unknown.
    probes
        The number of random vectors, and of products.
    rho
        ρ > 0, in the units of H's eigenvalues.
    seed
        Of the random vectors.

    Raises
    ------
    ArgumentError
        If a setting is out of its range; on use, for a matrix that is not known to be symmetric.
    ShapeError
        On use, if the shapes do not belong to the unknown.

    References
    ----------
    Martens & Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015; the factors as second moments:
    Gupta, Koren & Singer, "Shampoo", ICML 2018; the damping in the basis of both: George, Laurent, Bouthillier, Ballas & Vincent, "Fast approximate
    natural gradient descent in a Kronecker-factored eigenbasis", NeurIPS 2018.

    Examples
    --------
    >>> import torch, bilevel
    >>> from bilevel.operators import DenseOperator
    >>> A, B = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> H = DenseOperator(torch.kron(B, A).unsqueeze(0), symmetric=True)
    >>> solver = bilevel.Kronecker([(2, 2)], probes=2000, rho=1e-3)
    >>> x = solver(H, torch.tensor([[1.0, 1.0, 1.0, 1.0]]), bilevel.Tolerance(delta_prime=None))
    >>> [round(float(entry), 1) for entry in x[0]]  # 1/9, 1/9, 1/3, 1/3
    [0.1, 0.1, 0.3, 0.3]
    """

    shapes: tuple[tuple[int, ...], ...]
    probes: int = 16
    rho: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        try:
            shapes = tuple(tuple(int(side) for side in shape) for shape in self.shapes)
        except TypeError:
            raise ArgumentError(
                f"Kronecker: expected shapes to be a sequence of shapes, got {self.shapes!r}; write Kronecker.like(unknown), or for example "
                "Kronecker([(10, 64), (10,)])"
            ) from None
        object.__setattr__(self, "shapes", shapes)
        check_steps("Kronecker", "probes", self.probes)
        check_number("Kronecker", "rho", self.rho)
        check_steps("Kronecker", "seed", self.seed, least=0)

    @classmethod
    def like(cls, unknown: Any, *, probes: int = 16, rho: float = 1e-2, seed: int = 0) -> Kronecker:
        """Return the solver for an unknown of this structure.

        Parameters
        ----------
        unknown
            A tensor, a pytree of tensors, or a module. Of a module, the parameters that require grad are taken.
        probes, rho, seed
            As in the class.

        Examples
        --------
        >>> import torch, bilevel
        >>> bilevel.Kronecker.like(torch.nn.Linear(3, 2)).shapes
        ((2, 3), (2,))
        """
        if isinstance(unknown, nn.Module):
            unknown = [parameter for parameter in unknown.parameters() if parameter.requires_grad]
        shapes = Raveler.of(unknown, "Kronecker.like", "unknown").real_shapes
        return cls(tuple(tuple(shape) for shape in shapes), probes, rho, seed)

    def products(self, size: int) -> int:
        return self.probes

    @property
    def _sizes(self) -> list[int]:
        return [prod(shape) for shape in self.shapes]

    def restored(self, state: list[torch.Tensor | None]) -> _BlockFactor:
        blocks = []
        for left, right, values in zip(state[::3], state[1::3], state[2::3], strict=True):
            assert values is not None
            blocks.append(_Block(left, right, values))
        return _BlockFactor(blocks, self._sizes, self.rho)

    def factor(self, base: LinearOperator) -> _BlockFactor:
        sizes = self._sizes
        if sum(sizes) != base.size:
            raise ShapeError(
                f"Kronecker: expected shapes with {base.size} numbers, those of the unknown, got {list(self.shapes)} with {sum(sizes)}; "
                "write Kronecker.like(unknown)"
            )
        moments = [_Moments.zero(shape, base) for shape in self.shapes]
        for products in self._products(base):
            for moment, shape, part in zip(moments, self.shapes, products.split(sizes, dim=-1), strict=True):
                moment.add(part.reshape(*part.shape[:-1], *_matrix(shape)))
        return _BlockFactor([moment.block() for moment in moments], sizes, self.rho)

    def _products(self, base: LinearOperator) -> Iterator[torch.Tensor]:
        """Yield H v / √probes for random normal v, (k, batch, n) at a time."""
        draws = np.random.default_rng(self.seed)
        many = max(1, _CHUNK // max(1, base.batch * base.size))
        for done in range(0, self.probes, many):
            k = min(many, self.probes - done)
            probes = torch.from_numpy(draws.standard_normal((k, 1, base.size))).to(base.device, base.dtype)
            yield base.matmat(probes.expand(k, base.batch, base.size)) / self.probes**0.5


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the sides of a weight as a matrix; a vector is a column."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def _has_matrix(side: int, other: int) -> bool:
    return 1 < side <= _LONGEST_SIDE and other > 1


class _Moments:
    """E[Y Yᵀ] and E[Yᵀ Y] of one weight, or their diagonals."""

    def __init__(self, left: torch.Tensor, right: torch.Tensor, full: tuple[bool, bool]) -> None:
        self._left, self._right, self._full = left, right, full

    @classmethod
    def zero(cls, shape: tuple[int, ...], base: LinearOperator) -> _Moments:
        """Return the moments before the first product."""
        rows, columns = _matrix(shape)
        full = _has_matrix(rows, columns), _has_matrix(columns, rows)

        def zeros(side: int, whole: bool) -> torch.Tensor:
            return torch.zeros((base.batch, side, side if whole else 1), dtype=base.dtype, device=base.device)

        return cls(zeros(rows, full[0]), zeros(columns, full[1]), full)

    def add(self, y: torch.Tensor) -> None:
        """Add the products ``y`` (k, batch, rows, columns)."""
        for total, one, whole in ((self._left, y, self._full[0]), (self._right, y.mT, self._full[1])):
            total += (one @ one.mT if whole else (one * one).sum(dim=-1, keepdim=True)).sum(dim=0)

    def block(self) -> _Block:
        """Return the block A ⊗ B in the basis of its eigenvectors."""
        (lefts, left), (rights, right) = (
            _spectrum(moment, whole) for moment, whole in zip((self._left, self._right), self._full, strict=True)
        )
        trace = lefts.sum(dim=-1)[:, None, None]  # E‖Y‖²
        values = (lefts.unsqueeze(-1) * rights.unsqueeze(-2) / torch.where(trace == 0, 1.0, trace)).sqrt()
        return _Block(left, right, values)


def _spectrum(moment: torch.Tensor, whole: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the eigenvalues (batch, side) of a moment, and its eigenvectors; None for those of a diagonal one."""
    if not whole:
        return moment.squeeze(-1), None
    values, vectors = eigh(moment)
    return values.clamp_min(0.0), vectors


@dataclass(frozen=True, eq=False)
class _Block:
    """A ⊗ B: the eigenvectors (batch, o, o) of B and (batch, i, i) of A, None for unit vectors, and the eigenvalues (batch, o, i)."""

    left: torch.Tensor | None
    right: torch.Tensor | None
    values: torch.Tensor

    def solve(self, r: torch.Tensor, rho: float) -> torch.Tensor:
        """Return (A ⊗ B + ρI)⁻¹ r for ``r`` (repeats, batch, o · i)."""
        matrix = r.reshape(*r.shape[:2], *self.values.shape[1:])
        matrix = matrix if self.left is None else self.left.mT @ matrix
        matrix = (matrix if self.right is None else matrix @ self.right) / (self.values + rho)
        matrix = matrix if self.left is None else self.left @ matrix
        matrix = matrix if self.right is None else matrix @ self.right.mT
        return matrix.reshape(r.shape)


@dataclass(frozen=True, eq=False)
class _BlockFactor:
    """(M + ρI)⁻¹ of a block-diagonal M, whose blocks have ``sizes``."""

    blocks: list[_Block]
    sizes: list[int]
    rho: float

    def solve(self, r: torch.Tensor) -> torch.Tensor:
        parts = zip(self.blocks, r.split(self.sizes, dim=-1), strict=True)
        return torch.cat([block.solve(part, self.rho) for block, part in parts], dim=-1)

    def state(self) -> list[torch.Tensor | None]:
        return [tensor for block in self.blocks for tensor in (block.left, block.right, block.values)]
