"""z = tanh(Wz + Ux + b), d = 128, a batch of 256, to 1e-6: beside torchdeq, at contraction 0.8 and 0.99.

In float32 to 1e-5: 1e-6 is what rounding leaves of a residual there.

W is symmetric with spectral norm 0.8 or 0.99 of that factor, so that the mapping contracts no faster than it
says. Both sides start at zero, solve to that relative residual, and are differentiated to the same.
"""

from __future__ import annotations

import torch
from timing import compare, rounds
from torch.func import vmap

import bilevel

COUNT = rounds(10)
D, BATCH = 128, 256


def make(contraction: float, dtype: torch.dtype):
    torch.manual_seed(0)
    W = torch.randn(D, D, dtype=torch.float64)
    W = (W + W.T) / 2
    W = (contraction * W / torch.linalg.matrix_norm(W, 2)).to(dtype)
    U = (torch.randn(D, D, dtype=torch.float64) / D**0.5).to(dtype)
    b = torch.zeros(D, dtype=dtype)
    x = (0.1 * torch.randn(BATCH, D, dtype=torch.float64)).to(dtype)
    return W, U, b, x


def reference(W, U, b, x):
    """The gradient of Σz² with respect to U, from dense solves in float64."""
    W, U, b, x = (t.double() for t in (W, U, b, x))
    z = torch.zeros_like(x)
    for _ in range(20_000):
        z = torch.tanh(z @ W.T + x @ U.T + b)
    slope = 1 - z**2
    J = torch.eye(D, dtype=torch.float64) - slope[:, :, None] * W
    q = torch.linalg.solve(J.mT, (2 * z).unsqueeze(-1)).squeeze(-1)
    return z, (slope * q).T @ x


def contestants(setting, z, accuracy):
    W, U, b, x = setting

    def mapping(z, x, W, U, b):
        return torch.tanh(z @ W.T + x @ U.T + b)

    # Ours are absolute; this makes them relative to the smallest solution, and to the smallest right-hand side 2z.
    smallest = float(z.norm(dim=1).min())
    tolerance = bilevel.Tolerance(delta=accuracy * smallest, delta_prime=2 * accuracy * smallest)
    start = torch.zeros(D, dtype=x.dtype)

    def ours(**settings):
        layer = bilevel.fixed_point(mapping, tolerance=tolerance, **settings)

        def run():
            free = U.detach().requires_grad_(True)
            z = vmap(layer, in_dims=(None, 0, None, None, None))(start, x, W, free, b)
            (z**2).sum().backward()
            return free.grad

        return run

    found = {
        "bilevel, default": ours(),
        "bilevel, Anderson and BiCGStab": ours(solver=bilevel.Anderson(), linear_solver=bilevel.BiCGStab()),
    }
    try:
        from torchdeq import get_deq
    except ImportError:
        print("torchdeq is not installed: pip install 'bilevel[bench]'")
        return found
    for solver in ("anderson", "broyden", "fixed_point_iter"):
        deq = get_deq(
            f_solver=solver, b_solver=solver, f_max_iter=2000, b_max_iter=2000, f_tol=accuracy, b_tol=accuracy, ift=True
        )

        def run(deq=deq):
            free = U.detach().requires_grad_(True)
            z = deq(lambda z: torch.tanh(z @ W.T + x @ free.T + b), torch.zeros_like(x))[0][-1]
            (z**2).sum().backward()
            return free.grad

        found[f"torchdeq, {solver}"] = run
    return found


for dtype, accuracy in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
    for contraction in (0.8, 0.99):
        setting = make(contraction, dtype)
        z, exact = reference(*setting)
        exact = exact.to(dtype)
        print(f"\nAgreement at contraction {contraction}, {dtype}")
        entrants = contestants(setting, z, accuracy)
        for name, function in entrants.items():
            gradient = function()
            error = float((gradient - exact).abs().max() / exact.abs().max())
            print(f"  {name:44s} relative error {error:.1e}")
        compare(f"Deep equilibrium layer, contraction {contraction}, {dtype}", entrants, "bilevel, default", COUNT)
