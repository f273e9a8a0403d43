"""
Points that move by optimal transport
=====================================

**What to see:** the gradient of a transport cost moves a cloud of points onto two
moons. The plan between them is sparse: most pairs share no mass.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons

import bilevel

plt.style.use("tableau-colorblind10")

# %%
# The plan minimises ⟨C, P⟩ + ε‖P‖²/2 over all P ≥ 0 with given sums of rows and
# columns (Blondel, Seguy and Rolet, 2018). Squares in the place of an entropy leave
# exact zeros.
n, m, EPSILON = 20, 24, 0.5
target = torch.tensor(make_moons(m, noise=0.03, random_state=0)[0])
generator = torch.Generator().manual_seed(0)
cloud = 0.3 * torch.randn(n, 2, generator=generator, dtype=torch.float64)
cloud = cloud + torch.tensor([0.5, 1.8], dtype=torch.float64)
rows = torch.full((n,), 1 / n, dtype=torch.float64)
columns = torch.full((m,), 1 / m, dtype=torch.float64)


def cost(P, C):
    return (C * P).sum() + 0.5 * EPSILON * (P**2).sum()


transport = bilevel.argmin(cost, prox=bilevel.prox.TransportPolytope(rows, columns))


def distance(points):
    C = ((points[:, None] - target) ** 2).sum(-1)
    P = transport(rows[:, None] * columns, C)
    return P, (P * C).sum()


# %%
# The outer loss is the cost of the plan. Its gradient flows through the plan too.
points = cloud.clone().requires_grad_()
optimizer = torch.optim.SGD([points], lr=3.0)
plan_before, _ = distance(cloud)
losses = []
for _ in range(20):
    optimizer.zero_grad()
    plan, loss = distance(points)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
plan, final = distance(points.detach())
print(f"transport cost: {losses[0]:.4f} before, {final:.4f} after 20 steps")
print(f"pairs with mass: {int((plan > 0).sum())} of {n * m}")
print(f"largest error of a row sum: {(plan.sum(1) - rows).abs().max():.1e}")

# %%
figure, panels = plt.subplots(
    1, 2, figsize=(9.5, 4.2), layout="constrained", sharey=True
)
cases = ((cloud, plan_before.detach(), "before"), (points.detach(), plan, "after"))
for panel, (at, shown, name) in zip(panels, cases, strict=True):
    for i, j in torch.nonzero(shown > 0).tolist():
        strength = min(1.0, float(shown[i, j] * n))
        line = torch.stack([at[i], target[j]])
        panel.plot(*line.T, color="0.4", alpha=strength, linewidth=1)
    panel.plot(*target.T, "s", color="C1", label="target")
    panel.plot(*at.T, "o", color="C0", label="moving points")
    panel.set_xlabel("first coordinate (no unit)")
    panel.set_title(name)
panels[0].set_ylabel("second coordinate (no unit)")
panels[0].legend()
plt.show()
