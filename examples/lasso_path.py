"""
The Lasso path and its derivative
=================================

**What to see:** the coefficients are piecewise linear in the strength, and the
derivative that the layer returns is the slope of each piece.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso

import bilevel

plt.style.use("tableau-colorblind10")

# %%
# The L1 norm is a proximal term. It is a function of the layer's arguments, so that
# its strength can be differentiated.
data = load_diabetes()
X, y = torch.tensor(data.data), torch.tensor(data.target)
X, y = X / X.std(0), y - y.mean()


def squares(w, strength):
    return ((X @ w - y) ** 2).sum() / (2 * len(y))


lasso = bilevel.argmin(squares, prox=lambda strength: bilevel.prox.L1(strength))
start = torch.zeros(10, dtype=X.dtype)

# %%
# ``vmap`` solves the whole path as one batch, and ``jvp`` gives its derivatives.
strengths = torch.logspace(1.65, -1, 120, dtype=X.dtype)
path = torch.func.vmap(lambda s: lasso(start, s))(strengths)
marks = torch.tensor([30.0, 12.0, 4.0], dtype=X.dtype)
slopes = torch.func.vmap(torch.func.jacrev(lambda s: lasso(start, s)))(marks)
at_marks = torch.func.vmap(lambda s: lasso(start, s))(marks)

# %%
# We compare with scikit-learn and with central differences.
reference = Lasso(alpha=4.0, tol=1e-12, max_iter=100_000).fit(X, y).coef_
gap = (at_marks[2] - torch.tensor(reference)).abs().max()
print(f"largest difference from scikit-learn: {gap:.1e}")
h = 1e-4
central = (lasso(start, marks[2] + h) - lasso(start, marks[2] - h)) / (2 * h)
error = (slopes[2] - central).abs().max()
print(f"largest error of the derivative beside central differences: {error:.1e}")
print(
    f"coefficients that are exactly zero at strength 4: {int((at_marks[2] == 0).sum())}"
)

# %%
# Short lines are tangents, drawn from the derivative alone.
figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
names = dict(zip(range(10), data.feature_names, strict=True))
largest = path[-1].abs().argsort(descending=True)[:6]
others = [n for n in range(10) if n not in largest]
axes.plot(strengths, path[:, others], color="0.75", linewidth=1)
for number, n in enumerate(largest.tolist()):
    axes.plot(strengths, path[:, n], color=f"C{number}", label=names[n])
for mark, w, slope in zip(marks, at_marks, slopes, strict=True):
    reach = torch.tensor([-0.25, 0.25], dtype=X.dtype) * mark
    for n in largest.tolist():
        if w[n] != 0:
            axes.plot(
                mark + reach, w[n] + slope[n] * reach, "k", linewidth=2.5, alpha=0.7
            )
axes.plot([], [], "k", linewidth=2.5, label="tangent")
axes.set_xlim(46, 0)
axes.set_xlabel("strength of the L1 penalty (no unit)")
axes.set_ylabel("coefficient (progress per standard deviation)")
axes.set_title("Tangents touch the Lasso path")
axes.legend(ncols=2)
plt.show()
