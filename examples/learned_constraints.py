"""
Learn the constraints of a projection
=====================================

**What to see:** a quadratic-program layer finds a hidden pentagon from examples of
points and their projections alone.
"""

import matplotlib.pyplot as plt
import torch

import bilevel

plt.style.use("tableau-colorblind10")

# %%
# The layer of OptNet (Amos and Kolter, 2017): x is the point nearest to z with Gx ≤
# h. The rows of G are unit vectors, given by angles. Angles and offsets are learned.


def project(z, angles, offsets):
    G = torch.stack([angles.cos(), angles.sin()], dim=1)
    eye = torch.eye(2, dtype=z.dtype)
    return bilevel.quadratic_program(eye, -z, G=G, h=offsets, smoothing=1e-5)


# %%
# The hidden set has five sides. We see 100 points and their projections.
generator = torch.Generator().manual_seed(0)
true_angles = torch.tensor([0.2, 1.5, 2.5, 3.9, 5.2], dtype=torch.float64)
true_offsets = torch.tensor([1.0, 0.7, 1.1, 0.8, 0.9], dtype=torch.float64)
points = 4 * torch.rand(100, 2, generator=generator, dtype=torch.float64) - 2
targets = project(points, true_angles, true_offsets)

# %%
# We begin with eight sides, and fit by Adam. All projections are one batch.
angles = (torch.arange(8, dtype=torch.float64) * torch.pi / 4).requires_grad_()
offsets = torch.full((8,), 1.5, dtype=torch.float64, requires_grad=True)
first = angles.detach().clone(), offsets.detach().clone()
optimizer = torch.optim.Adam([angles, offsets], lr=0.03)
losses = []
for _ in range(200):
    optimizer.zero_grad()
    loss = ((project(points, angles, offsets) - targets) ** 2).sum(1).mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
unseen = 4 * torch.rand(200, 2, generator=generator, dtype=torch.float64) - 2
gap = project(unseen, angles, offsets) - project(unseen, true_angles, true_offsets)
print(f"mean squared error: {losses[0]:.4f} before, {losses[-1]:.1e} after 200 steps")
print(f"mean distance on 200 unseen points: {gap.detach().norm(dim=1).mean():.1e}")


# %%
def outline(angles, offsets):
    """Return the boundary: projections of far points all around, of equal length."""
    around = torch.linspace(0, 2 * torch.pi, 721, dtype=torch.float64)
    far = 30 * torch.stack([around.cos(), around.sin()], dim=1)
    return project(far, angles.detach(), offsets.detach()).T


figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 4.4), layout="constrained", width_ratios=[1.1, 1]
)
left.plot(*targets.T, ".", color="0.5", label="projections seen")
left.plot(
    *outline(true_angles, true_offsets), color="C0", linewidth=4, label="hidden set"
)
left.plot(*outline(*first), ":", color="C2", label="before")
left.plot(*outline(angles, offsets), "--", color="C1", linewidth=2, label="learned")
left.set_aspect("equal")
left.set_xlabel("first coordinate (no unit)")
left.set_ylabel("second coordinate (no unit)")
left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
right.semilogy(losses)
right.set_xlabel("step of Adam")
right.set_ylabel("mean squared error (no unit)")
plt.show()
