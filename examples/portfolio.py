"""
A portfolio with limits
=======================

**What to see:** as the limit on each asset is loosened, money moves to the best ones.
The multipliers say beforehand what a looser limit is worth.
"""

import matplotlib.pyplot as plt
import torch

import bilevel

plt.style.use("tableau-colorblind10")

# %%
# Eight assets with expected returns and a covariance from two common factors. The
# numbers are made up, in per cent a year.
NAMES = ["A", "B", "C", "D", "E", "F", "G", "H"]
generator = torch.Generator().manual_seed(3)
returns = (
    torch.tensor([3.0, 4.0, 5.0, 5.5, 6.0, 7.0, 8.0, 9.0], dtype=torch.float64) / 100
)
factors = 0.08 * torch.randn(8, 2, generator=generator, dtype=torch.float64)
own = torch.tensor([3, 5, 8, 9, 10, 13, 16, 20], dtype=torch.float64) / 100
covariance = factors @ factors.T + torch.diag(own**2)
AVERSION = 1.5


# %%
# The weights are at least 0, sum to one, and each is at most ``limit``.
def portfolio(returns, limit):
    return bilevel.quadratic_program.solve(
        AVERSION * covariance,
        -returns,
        A=torch.ones(1, 8, dtype=torch.float64),
        b=1.0,
        lower=0.0,
        upper=limit.expand(8),
    )


def utility(returns, limit):
    w = portfolio(returns, limit).value
    return returns @ w - 0.5 * AVERSION * w @ covariance @ w


# %%
# ``vmap`` solves for 60 limits at once. By the envelope theorem the derivative of the
# utility is the sum of the multipliers of the limit.
limits = torch.linspace(0.13, 0.5, 60, dtype=torch.float64)
weights = torch.func.vmap(lambda cap: portfolio(returns, cap).value)(limits)
slope = torch.func.vmap(torch.func.grad(lambda cap: utility(returns, cap)))(limits)
limit = torch.tensor(0.25, dtype=torch.float64)
at = portfolio(returns, limit)
print(f"utility at a limit of 25 %: {100 * utility(returns, limit):.3f} % a year")
print(f"its derivative:             {torch.func.grad(utility, 1)(returns, limit):.6f}")
print(f"sum of the multipliers:     {at.multipliers.upper.sum():.6f}")
print(
    "at the limit:", [n for n, full in zip(NAMES, at.active.upper, strict=True) if full]
)
print(
    "not held:    ", [n for n, none in zip(NAMES, at.active.lower, strict=True) if none]
)

# %%
# The Jacobian says which estimates of returns the portfolio hinges on.
jacobian = torch.func.jacrev(lambda r: portfolio(r, limit).value)(returns)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
colors = plt.get_cmap("cividis")(torch.linspace(0, 1, 8).numpy())
left.stackplot(
    100 * limits, 100 * weights.T, labels=NAMES, colors=colors, edgecolor="w"
)
left.set_xlabel("limit on each asset (%)")
left.set_ylabel("share of the portfolio (%)")
left.set_title("Shares against the limit")
left.set_xlim(13, 50)
left.set_ylim(0, 100)
left.legend(title="asset", loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)
size = jacobian.abs().max()
image = right.imshow(jacobian, cmap="PuOr", vmin=-size, vmax=size)
right.set_xticks(range(8), NAMES)
right.set_yticks(range(8), NAMES)
right.set_xlabel("asset whose expected return rises")
right.set_ylabel("asset whose share changes")
right.set_title("Derivative at a limit of 25 %")
figure.colorbar(image, label="points of share per point of return")
plt.show()
