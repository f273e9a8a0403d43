"""
Learn how strongly to augment
=============================

**What to see:** training digits are upright, and those to be read are turned by up to
45 degrees. The strength of the rotation is learned from 200 turned digits; it rises
to about that angle, and the strengths of brightness and noise stay small.
"""

import functools
import math

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import affine_grid, grid_sample

import bilevel
from bilevel import learnable, stochastic

plt.style.use("tableau-colorblind10")

# %%
# 600 digits train, 200 validate, 997 test. Validation and test digits are turned.
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
y = torch.tensor(digits.target)
generator = torch.Generator().manual_seed(0)
order = torch.randperm(len(y), generator=generator)
train, validation, test = order[:600], order[600:800], order[800:]
angle = math.pi / 4 * (2 * torch.rand(len(y), generator=generator) - 1)
zero = torch.zeros_like(angle)
turn = [angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero]
grid = affine_grid(torch.stack(turn, 1).view(-1, 2, 3), x.shape, align_corners=False)
turned = grid_sample(x, grid, align_corners=False)


def run(initial, learn, steps=300):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    augmentation = learnable.Augmentation(initial, weight_decay=1e-3)
    method = stochastic.ImplicitStep(
        augmentation.objectives,
        model,
        augmentation,
        inner_steps=2,
        linear_solver=bilevel.CG(max_steps=5),
        hessian=bilevel.GaussNewtonHessian(),
        inner_optimizer=functools.partial(torch.optim.Adam, lr=5e-3),
        outer_optimizer=functools.partial(torch.optim.Adam, lr=0.02 if learn else 0.0),
    )
    batches = stochastic.Minibatches((x[train], y[train]), 200, seed=0)
    held = stochastic.Minibatches((turned[validation], y[validation]), 100, seed=1)
    history = []
    for _ in range(steps):
        method.step(batches, held)
        history.append([s.item() for s in augmentation.strengths.values()])
    with torch.no_grad():
        right = (model(turned[test]).argmax(1) == y[test]).double().mean().item()
    return augmentation, torch.tensor(history), right


start = {"rotation": 0.1, "scale": 0.1, "brightness": 0.1, "noise": 0.1}
_, _, plain = run(dict.fromkeys(start, 1e-9), learn=False)
_, _, fixed = run(start, learn=False)
augmentation, history, learned = run(start, learn=True)
print(f"test accuracy on turned digits, no augmentation:    {plain:.1%}")
print(f"test accuracy on turned digits, strengths of 0.1:   {fixed:.1%}")
print(f"test accuracy on turned digits, learned strengths:  {learned:.1%}")
for name, values in zip(augmentation.strengths, history.T, strict=True):
    unit = f" = {math.degrees(values[-1]):.0f} degrees" if name == "rotation" else ""
    print(f"{name:10s} {values[-1]:.2f}{unit}")

# %%
figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
for name, values, style in zip(
    augmentation.strengths, history.T, ("-", "--", "-.", ":"), strict=True
):
    axes.plot(values, style, label=name)
axes.axhline(math.pi / 4, color="0.5", linewidth=1)
axes.text(140, math.pi / 4 + 0.01, "45 degrees", color="0.35")
axes.set_title("Strengths during training")
axes.set_xlabel("outer step")
axes.set_ylabel("strength (radians, or no unit)")
axes.legend(loc="center right")
plt.show()

# %%
# The upper row shows training digits, the lower row what the learned augmentation
# makes of them.
figure, tiles = plt.subplots(2, 8, figsize=(8, 2.3), layout="constrained")
with torch.no_grad():
    shown = x[train[:8]], augmentation(x[train[:8]])
for name, row, images in zip(("digit", "augmented"), tiles, shown, strict=True):
    row[0].set_title(name, loc="left", fontsize=9)
    for tile, image in zip(row, images, strict=True):
        tile.imshow(image[0], cmap="gray_r", vmin=0, vmax=1)
        tile.set_axis_off()
plt.show()
