"""
Overfit the validation set
==========================

**What to see:** with one weight decay for each weight, training on 50 digits is bent
until 50 other digits are labelled without an error. The test accuracy does not follow:
a validation set that many hyperparameters have seen measures nothing.
"""

import functools

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import bilevel
from bilevel import learnable, stochastic

plt.style.use("tableau-colorblind10")

# %%
# 50 digits train, 50 validate, 1,697 test. No model is ever trained on the validation
# digits: they move the decays alone.
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
train, validation, test = order[:50], order[50:100], order[100:]


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))


def convolutional():
    return bilevel.cleaning.convolutional(1, 8, 10, width=8)


# %%
# An outer step is five Adam steps of the network and one of the log-decays.
def run(make, steps=250):
    torch.manual_seed(0)
    model = make()
    decay = learnable.WeightDecay.for_entries(model, initial=1e-3)
    method = stochastic.ImplicitStep(
        decay.objectives,
        model,
        decay,
        inner_steps=5,
        linear_solver=bilevel.CG(max_steps=5),
        hessian=bilevel.GaussNewtonHessian(),
        inner_optimizer=functools.partial(torch.optim.Adam, lr=1e-2),
        outer_optimizer=functools.partial(torch.optim.Adam, lr=0.2),
    )
    shares = []
    for _ in range(steps):
        method.step((x[train], y[train]), (x[validation], y[validation]))
        with torch.no_grad():
            shares.append(
                [
                    (model(x[rows]).argmax(1) == y[rows]).double().mean().item()
                    for rows in (train, validation, test)
                ]
            )
    count = sum(p.numel() for p in decay.parameters())
    return count, torch.tensor(shares)


runs = {"MLP": run(mlp), "CNN": run(convolutional)}
for name, (count, shares) in runs.items():
    print(
        f"{name}, {count:,} decays: validation {shares[4, 1]:.0%} after 5 steps and "
        f"{shares[:, 1].max():.0%} at best, test {shares[4, 2]:.1%} and "
        f"{shares[shares[:, 1].argmax(), 2]:.1%} there"
    )

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
for axes, (name, (count, shares)) in zip(panels, runs.items(), strict=True):
    for column, (what, style) in enumerate(
        {"training": "-", "validation": "--", "test": "-."}.items()
    ):
        axes.plot(100 * shares[:, column], style, label=what)
    axes.set_xlabel("outer step")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(f"{name}, {count:,} decays")
    axes.legend(loc="lower right")
plt.show()
