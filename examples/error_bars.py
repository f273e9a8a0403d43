"""
Error bars on hypergradients
============================

**What to see:** the report knows the error of a hypergradient without knowing the
truth. Filled marks are proofs, hollow ones are estimates.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_breast_cancer

import bilevel
from bilevel.hyperopt.linear_models import Logistic, WeightedData

plt.style.use("tableau-colorblind10")

# %%
# Logistic regression with a strength for each of 30 features. The model knows its
# constants: how convex the loss is, and how fast its curvature changes. That makes
# proofs possible.
X, y = (
    torch.tensor(a, dtype=torch.float64) for a in load_breast_cancer(return_X_y=True)
)
X = (X - X.mean(0)) / X.std(0)
model = Logistic(30)
training = torch.arange(len(y)) < 300
data = WeightedData(X, y, training.double(), (~training).double())
theta = torch.full((30,), -3.0, dtype=torch.float64)


def problem(**settings):
    return bilevel.HyperparameterOptimization(
        model.training_objective,
        model.validation_loss,
        theta,
        model.initial(),
        warm_start=False,
        **settings,
    )


exact = problem().hypergradient(data).grad

# %%
# Gradient descent stops after a given number of steps, and conjugate gradients after
# three.
steps = [2, 5, 10, 20, 40, 80, 160, 320, 640, 1280]
rows = []
for count in steps:
    for products in (3, 10):
        result = problem(
            solver=bilevel.GradientDescent(lr=0.3, max_steps=count),
            linear_solver=bilevel.CG(max_steps=products),
            tolerance=bilevel.Tolerance(delta=None, delta_prime=None),
        ).hypergradient(data)
        error = (result.grad - exact).norm().item()
        better = (result.refined().grad - exact).norm().item()
        bound = result.bound
        rows.append((count, products, error, bound.value, bound.basis.name, better))

print("steps  products  true error  bound     basis        error after one Newton step")
for count, products, error, bound, certified, better in rows:
    print(
        f"{count:5d}  {products:8d}  {error:10.1e}  {bound:.1e}   "
        f"{certified:11s}  {better:.1e}"
    )

# %%
figure, panels = plt.subplots(
    1, 2, figsize=(9.5, 3.8), layout="constrained", sharey=True
)
for panel, products in zip(panels, (3, 10), strict=True):
    shown = [row for row in rows if row[1] == products]
    panel.loglog(
        steps, [row[2] for row in shown], color="0.6", linewidth=5, label="true error"
    )
    for basis, fill in (("CERTIFIED", "C0"), ("ESTIMATED", "none")):
        chosen = [row for row in shown if row[4] == basis]
        panel.loglog(
            [row[0] for row in chosen],
            [row[3] for row in chosen],
            "s",
            color="C0",
            markerfacecolor=fill,
            label=f"reported: {basis.lower()}",
        )
    panel.loglog(
        steps,
        [row[5] for row in shown],
        "^:",
        color="C1",
        label="true error when refined",
    )
    panel.set_xlabel("inner steps of gradient descent")
    panel.set_title(f"{products} steps of conjugate gradients")
panels[0].set_ylabel("error of the hypergradient (norm)")
panels[0].legend()
plt.show()
