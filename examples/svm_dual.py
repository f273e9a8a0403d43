"""
A support vector machine by its dual
====================================

**What to see:** the gradient through the dual quadratic program widens the kernel,
and the jagged boundary around single patients becomes smooth.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.svm import SVC
from torch.nn.functional import softplus

import bilevel

plt.style.use("tableau-colorblind10")

# %%
# Two measurements of the breast-cancer set, so that the boundary can be drawn.
data = load_breast_cancer()
columns = [1, 7]  # mean texture, mean concave points
X = torch.tensor(data.data[:, columns])
X = (X - X.mean(0)) / X.std(0)
y = torch.tensor(2.0 * data.target - 1, dtype=torch.float64)
order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
train, validation, test = order[:80], order[80:280], order[280:]


# %%
# The dual is min ½ αᵀQα − Σα with 0 ≤ α ≤ C and yᵀα = 0. Kernel width and C are θ.
def kernel(A, B, log_gamma):
    return (-log_gamma.exp() * ((A[:, None] - B[None]) ** 2).sum(-1)).exp()


def machine(theta):
    log_gamma, log_C = theta
    labels = y[train]
    K = kernel(X[train], X[train], log_gamma)
    solution = bilevel.quadratic_program.solve(
        labels[:, None] * K * labels,
        -torch.ones_like(labels),
        A=labels[None],
        b=0.0,
        lower=0.0,
        upper=log_C.exp().expand(len(labels)),
    )
    # The multiplier of the equation is the intercept.
    return labels * solution.value, solution.multipliers.equality[0]


def scores(theta, points):
    weights, intercept = machine(theta)
    return kernel(points, X[train], theta[0]) @ weights + intercept


# %%
# We check the solution beside scikit-learn, and then tune by the validation loss.
start = torch.tensor([3.0, 1.0], dtype=torch.float64)
reference = SVC(gamma=start[0].exp().item(), C=start[1].exp().item(), tol=1e-10)
reference.fit(X[train], y[train])
gap = scores(start, X[test]) - torch.tensor(reference.decision_function(X[test]))
print(f"largest difference of a score from scikit-learn: {gap.abs().max():.1e}")

theta = start.clone().requires_grad_()
optimizer = torch.optim.Adam([theta], lr=0.25)
losses = []
for _ in range(30):
    optimizer.zero_grad()
    loss = softplus(-2 * y[validation] * scores(theta, X[validation])).mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())


def accuracy(theta):
    return ((scores(theta, X[test]) * y[test]) > 0).double().mean().item()


theta = theta.detach()
print(f"validation loss: {losses[0]:.3f} before, {losses[-1]:.3f} after")
print(f"test accuracy:   {accuracy(start):.1%} before, {accuracy(theta):.1%} after")
print(
    f"gamma {start[0].exp():.1f} -> {theta[0].exp():.3f}, "
    f"C {start[1].exp():.1f} -> {theta[1].exp():.2f}"
)

# %%
line = torch.linspace(-2.5, 4.5, 80, dtype=X.dtype)
plane = torch.cartesian_prod(line, line)
figure, panels = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained", sharey=True)
for panel, at, name in zip(panels, (start, theta), ("before", "after"), strict=True):
    image = scores(at, plane).reshape(80, 80).T
    panel.contourf(line, line, image, [-9, 0, 9], colors=["C1", "C0"], alpha=0.25)
    panel.contour(line, line, image, [0], colors="k")
    for label, marker, color, text in (
        (-1, "^", "C1", "malignant"),
        (1, "o", "C0", "benign"),
    ):
        chosen = X[train][y[train] == label]
        panel.plot(*chosen.T, marker, color=color, markeredgecolor="k", label=text)
    panel.set_xlabel("mean texture (standard deviations)")
    panel.set_title(f"{name}: test accuracy {100 * accuracy(at):.1f} %")
panels[0].set_ylabel("mean concave points (standard deviations)")
panels[1].legend(loc="lower right")
plt.show()
