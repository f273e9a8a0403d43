"""
A ridge regression as a layer
=============================

**What to see:** a dozen gradients lead the strength to the lowest point of the
validation curve, which a sweep over 60 strengths draws for comparison.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes

import bilevel

plt.style.use("tableau-colorblind10")

# %%
# The data are scikit-learn's diabetes set: ten measurements of each patient, and the
# progress of the disease a year later. 25 patients train, 417 validate.
X, y = (torch.tensor(a) for a in load_diabetes(return_X_y=True))
X, y = X / X.std(0), (y - y.mean()) / y.std()
order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
train, held_out = order[:25], order[25:]

# %%
# The decorated objective is a layer. Its result is the minimiser, and the minimiser
# is differentiable with respect to every other argument.


@bilevel.argmin
def ridge(w, X, y, log_strength):
    return ((X @ w - y) ** 2).mean() + log_strength.exp() * (w**2).sum()


def validation_loss(log_strength):
    w = ridge(X.new_zeros(10), X[train], y[train], log_strength)
    return ((X[held_out] @ w - y[held_out]) ** 2).mean()


# %%
# Any optimiser of ``torch.optim`` can use the gradient.
log_strength = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
optimizer = torch.optim.LBFGS(
    [log_strength], max_iter=12, line_search_fn="strong_wolfe"
)
path = []


def closure():
    optimizer.zero_grad()
    loss = validation_loss(log_strength)
    loss.backward()
    path.append((log_strength.item(), loss.item(), log_strength.grad.item()))
    return loss


optimizer.step(closure)
print(f"{len(path)} gradients")
print(f"first point: loss {path[0][1]:.4f}, gradient {path[0][2]:+.5f}")
print(f"last point:  loss {path[-1][1]:.4f}, gradient {path[-1][2]:+.5f}")

# %%
# ``vmap`` solves all problems of a sweep as one batch.
grid = torch.linspace(-6.5, 3.0, 60, dtype=torch.float64)
curve = torch.func.vmap(validation_loss)(grid)
print(
    f"best of the sweep: {curve.min():.4f} at strength {grid[curve.argmin()].exp():.3f}"
)
print(f"found by gradient: {path[-1][1]:.4f} at strength {log_strength.exp():.3f}")

figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
axes.semilogx(grid.exp(), curve, label="sweep")
points = torch.tensor(path)
axes.plot(points[:, 0].exp(), points[:, 1], "o-", label="steps by the gradient")
axes.set_xlabel("strength of the ridge penalty (no unit)")
axes.set_ylabel("validation loss (variances of the target)")
axes.set_title("The gradient finds the best strength")
axes.legend()
plt.show()
