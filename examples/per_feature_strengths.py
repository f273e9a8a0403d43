"""
One strength for each feature
=============================

**What to see:** the gradient turns most of 40 columns of noise off, by strengths that
are hundreds of times those of the measurements, and the error on unseen patients
falls.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from sklearn.model_selection import KFold

import bilevel
from bilevel.hyperopt.linear_models import FOLD_DIMS, Ridge, WeightedData, fold_weights

plt.style.use("tableau-colorblind10")

# %%
# The diabetes set has 10 measurements. We append 40 columns of noise, and tune on 200
# patients. 242 patients are kept for the test.
X, y = (torch.tensor(a, dtype=torch.float64) for a in load_diabetes(return_X_y=True))
generator = torch.Generator().manual_seed(0)
X = (X - X.mean(0)) / X.std(0)
y = (y - y.mean()) / y.std()
noise = torch.randn(len(y), 40, generator=generator, dtype=X.dtype)
X = torch.cat([X, noise], dim=1)
order = torch.randperm(len(y), generator=generator)
tune, test = order[:200], order[200:]

# %%
# Five folds of cross-validation are one batch of inner problems.
folds = KFold(5).split(tune)
training, validation = fold_weights(folds, rows=len(tune))
data = WeightedData(X[tune], y[tune], training, validation)
model = Ridge(50)


def tuned(log_strengths):
    """Tune from these log-strengths, and return the result and the test loss."""
    problem = bilevel.HyperparameterOptimization(
        model.training_objective,
        model.validation_loss,
        log_strengths,
        model.initial(5),
        batch_dims=FOLD_DIMS,
    )
    result = bilevel.minimize(problem, problem.outer, data, max_steps=30)
    return problem.outer.detach(), result


# %%
# After tuning, one model is trained on all 200 patients.
def test_loss(log_strengths):
    ones, none = torch.ones(200, dtype=X.dtype), torch.zeros(200, dtype=X.dtype)
    fit = bilevel.argmin(model.training_objective)
    whole = WeightedData(X[tune], y[tune], ones, none)
    found = fit(model.initial(), log_strengths, whole)
    prediction = X[test] @ found["weights"] + found["intercept"]
    return ((prediction - y[test]) ** 2).mean().item()


start = torch.tensor(0.0, dtype=torch.float64)
shared, shared_run = tuned(start)
separate, separate_run = tuned(shared.expand(50).clone())
losses = {
    "not tuned": test_loss(start),
    "one strength": test_loss(shared),
    "50 strengths": test_loss(separate),
}
for name, value in losses.items():
    print(f"test loss, {name:13s} {value:.4f}")
print(shared_run)
print(separate_run)
medians = separate[:10].median().exp(), separate[10:].median().exp()
print(f"median strength: measurements {medians[0]:.3f}, noise {medians[1]:.3f}")

# %%
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.8), layout="constrained", width_ratios=[2, 1]
)
left.semilogy(range(10), separate[:10].exp(), "o", label="measurement")
left.semilogy(range(10, 50), separate[10:].exp(), "s", label="noise")
left.set_xlabel("number of the column")
left.set_ylabel("strength found (no unit)")
left.hlines(medians[0], 0, 9, "C0", label="their median")
left.hlines(medians[1], 10, 49, "C1", label="their median")
left.set_title("Half of the noise is penalised a hundredfold")
left.set_ylim(bottom=1e-4)
left.legend(loc="lower right", ncols=2)
right.bar(["none", "one", "50"], list(losses.values()), color=["C3", "C2", "C0"])
right.set_xlabel("strengths tuned")
right.set_ylabel("loss on unseen patients (variances)")
right.set_title("Test loss")
plt.show()
