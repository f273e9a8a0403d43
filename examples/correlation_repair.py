"""
A correlation matrix with gaps in its data
==========================================

**What to see:** correlations from data with gaps need not fit together. The nearest
correlation matrix repairs them. Its derivative finds how much to trust each of them.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_wine

import bilevel
from bilevel import cones

plt.style.use("tableau-colorblind10")

# %%
# 13 measurements of 30 wines; about half of the numbers are missing. Each correlation
# is computed from the wines that have both measurements, which are 3 to 19.
table = torch.tensor(load_wine().data)
table = (table - table.mean(0)) / table.std(0)
generator = torch.Generator().manual_seed(5)
order = torch.randperm(len(table), generator=generator)
sample, rest = table[order[:30]], table[order[30:]]
seen = torch.rand(sample.shape, generator=generator, dtype=torch.float64) < 0.5
names, k = load_wine().feature_names, table.shape[1]
correlations, counts = (
    torch.eye(k, dtype=torch.float64),
    seen.double().T @ seen.double(),
)
for i in range(k):
    for j in range(i):
        both = seen[:, i] & seen[:, j]
        pair = torch.corrcoef(sample[both][:, [i, j]].T)[0, 1].nan_to_num()
        correlations[i, j] = correlations[j, i] = pair
print(f"wines for each pair: {int(counts.min())} to {int(counts.max())}")
print("eigenvalues below zero:", int((torch.linalg.eigvalsh(correlations) < 0).sum()))

# %%
# The nearest correlation matrix X minimises Σ w (X − C)² with ones on its diagonal and
# no negative eigenvalue: a semidefinite program in the upper triangle of X.
cone = cones.PSDTriangle(k)
target = cone.vector(correlations)
diagonal = torch.stack([cone.vector(torch.diag(row)) for row in torch.eye(k).double()])
A = torch.cat([diagonal, -torch.eye(len(target), dtype=torch.float64)])
b = torch.cat([torch.ones(k), torch.zeros(len(target))]).double()


def repaired(power):
    """Weigh each correlation by its number of wines to a ``power``."""
    weights = (counts / counts.mean()) ** power
    w = weights[torch.triu(torch.ones(k, k)).T.bool()]  # as in the vector
    x = bilevel.cone_program(torch.diag(w), -w * target, A, b, [cones.Zero(k), cone])
    return cone.matrix(x)


# %%
# The other 148 wines, without gaps, tell how good a repair is.
truth = torch.corrcoef(rest.T)


def error(power):
    return (repaired(power) - truth).square().sum().sqrt()


power = torch.tensor(0.0, dtype=torch.float64)
for _ in range(8):
    slope, curvature = torch.func.grad(error)(power), torch.func.hessian(error)(power)
    power = power - slope / curvature.abs().clamp(min=0.05)
print(f"error of the correlations: {(correlations - truth).norm():.3f}")
print(f"repaired, equal weights:   {error(torch.zeros(()).double()):.3f}")
print(f"repaired, best weights:    {error(power):.3f} (power {power:.2f})")

# %%
# The curve and its tangents, whose slopes are the derivatives of the programs.
powers = torch.linspace(0, 6, 13, dtype=torch.float64)
errors = torch.stack([error(p) for p in powers])
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for matrix, label, marker in (
    (correlations, "from data with gaps", "o"),
    (repaired(power), "repaired", "s"),
    (truth, "from other wines", "^"),
):
    left.plot(torch.linalg.eigvalsh(matrix).flip(0), marker=marker, ms=4, label=label)
left.axhline(0, color="k", lw=0.8)
left.set_xlabel("number of the eigenvalue")
left.set_ylabel("eigenvalue (no unit)")
left.set_title("Eigenvalues of the correlation matrices")
left.legend()
right.plot(powers, errors, label="error")
for p in powers[1::4]:
    here, slope = error(p), torch.func.grad(error)(p)
    ends = torch.tensor([-0.5, 0.5])
    label = "tangents" if p == powers[1] else None
    right.plot(p + ends, here + slope * ends, color="C1", lw=3, alpha=0.7, label=label)
right.plot(power, error(power), "k*", ms=12, label="found by Newton's method")
right.set_xlabel("power of the number of wines in the weights")
right.set_ylabel("distance to correlations of other wines (no unit)")
right.set_title("Which weights repair best")
right.legend()
plt.show()
