"""
Stiffness of a hanging chain from its shape
===========================================

**What to see:** the shape at rest tells which link is soft. scipy finds the shape,
and the layer differentiates it.
"""

import matplotlib.pyplot as plt
import numpy as np
import scipy.optimize
import torch

import bilevel

plt.style.use("tableau-colorblind10")

# %%
# Twelve springs of 10 cm hang between two hooks that are 1 m apart. Each knot weighs
# 50 g. At rest the energy is least.
LINKS, LENGTH, MASS, GRAVITY = 12, 0.1, 0.05, 9.81
HOOKS = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)


def energy(knots, log_stiffness):
    points = torch.cat([HOOKS[:1], knots, HOOKS[1:]])
    lengths = (points[1:] - points[:-1]).norm(dim=1)
    springs = 0.5 * (log_stiffness.exp() * (lengths - LENGTH) ** 2).sum()
    return springs + MASS * GRAVITY * knots[:, 1].sum()


# %%
# Any program may find the shape at rest: here scipy's L-BFGS. ``layer.at`` checks
# what it found, and makes it differentiable.
shape_layer = bilevel.argmin(energy)
inside = torch.linspace(0, 1, LINKS + 1, dtype=torch.float64)[1:-1]
last = torch.stack([inside, 0.3 * inside * (inside - 1)], dim=1).numpy()


def shape(log_stiffness):
    global last

    def value_and_gradient(flat):
        knots = torch.tensor(flat.reshape(-1, 2), requires_grad=True)
        value = energy(knots, log_stiffness.detach())
        return value.item(), torch.autograd.grad(value, knots)[0].numpy().ravel()

    options = {"gtol": 1e-9, "ftol": 1e-15, "maxiter": 5000, "maxfun": 20_000}
    found = scipy.optimize.minimize(
        value_and_gradient, last.ravel(), jac=True, method="L-BFGS-B", options=options
    )
    last = found.x.reshape(-1, 2)
    return shape_layer.at(torch.tensor(last), log_stiffness)


# %%
# The true chain has one soft link. We see its knots to within 1 mm.
true = torch.full((LINKS,), 60.0, dtype=torch.float64)
true[3] = 20.0
observed = shape(true.log())
noise = 1e-3 * np.random.default_rng(0).standard_normal((LINKS - 1, 2))
observed = observed + torch.tensor(noise)

theta = torch.full((LINKS,), 40.0, dtype=torch.float64).log().requires_grad_()
first_shape = shape(theta).detach()
optimizer = torch.optim.Adam([theta], lr=0.1)
losses = []
for _ in range(80):
    optimizer.zero_grad()
    loss = ((shape(theta) - observed) ** 2).sum(1).mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
found = theta.detach().exp()
print(
    f"distance from the observed knots: {1e3 * losses[0] ** 0.5:.1f} mm before, "
    f"{1e3 * losses[-1] ** 0.5:.1f} mm after"
)
print(f"stiffness of the soft link:      {found[3]:.1f} N/m (true 20.0)")
others = torch.cat([found[:3], found[4:]])
print(f"stiffness of the others, median: {others.median():.1f} N/m (true 60.0)")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for knots, style, name in (
    (observed, "o", "observed"),
    (first_shape, ":", "before"),
    (shape(theta).detach(), "-", "fitted"),
):
    points = 100 * torch.cat([HOOKS[:1], knots, HOOKS[1:]])
    left.plot(*points.T, style, label=name)
left.set_xlabel("across (cm)")
left.set_ylabel("height (cm)")
left.set_title("Shape at rest")
left.legend()
right.bar(range(1, LINKS + 1), found, label="found")
right.plot(
    range(1, LINKS + 1), true, "k_", markersize=18, markeredgewidth=2, label="true"
)
right.set_xlabel("link")
right.set_ylabel("stiffness (N/m)")
right.set_title("Stiffness")
right.set_ylim(0, 85)
right.legend(loc="upper right", ncols=2)
plt.show()
