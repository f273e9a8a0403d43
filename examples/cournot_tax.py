"""
A tax on the emissions of an oligopoly
======================================

**What to see:** the gradient through the market's equilibrium finds the tax at which
welfare is highest, in five Newton steps.
"""

import matplotlib.pyplot as plt
import torch

import bilevel

plt.style.use("tableau-colorblind10")

# %%
# Three firms sell the same good at the price 100 − (q₁ + q₂ + q₃). Each has its own
# unit cost and its own emissions for each unit, and pays the tax for each tonne.
COST = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64)
EMISSION = torch.tensor([1.2, 0.7, 0.2], dtype=torch.float64)
DAMAGE = 0.6  # of each squared tonne


def loss_of(firm):
    def negative_profit(q1, q2, q3, tax):
        q = (q1, q2, q3)[firm]
        price = 100 - q1 - q2 - q3
        return -(price - COST[firm] - tax * EMISSION[firm]) * q + 0.25 * q**2

    return negative_profit


market = bilevel.equilibrium([loss_of(0), loss_of(1), loss_of(2)])


# %%
# Each firm answers the others. The government sees the equilibrium as a function of
# the tax.
def outputs(tax):
    zero = torch.zeros((), dtype=torch.float64)
    return torch.stack(market((zero, zero, zero), tax))


def welfare(tax):
    q = outputs(tax)
    total, tonnes = q.sum(), (EMISSION * q).sum()
    surplus = 100 * total - 0.5 * total**2 - (COST * q + 0.25 * q**2).sum()
    return surplus - 0.5 * DAMAGE * tonnes**2


# %%
# First and second derivatives of the welfare give Newton's method for the tax.
tax = torch.tensor(0.0, dtype=torch.float64)
slope, curvature = torch.func.grad(welfare), torch.func.hessian(welfare)
for _ in range(5):
    tax = tax - slope(tax) / curvature(tax)
print(f"best tax: {tax:.4f} per tonne, where dW/dt = {slope(tax):+.1e}")
print(
    f"welfare: {welfare(0 * tax):.1f} without tax, {welfare(tax):.1f} with the best tax"
)

grid = torch.linspace(0, 25, 51, dtype=torch.float64)
curve = torch.func.vmap(welfare)(grid)
sold = torch.func.vmap(outputs)(grid)
print(f"best of a sweep over 51 taxes: {grid[curve.argmax()]:.1f}")
change = torch.func.jacrev(outputs)(tax)
print("change of each output per unit of tax:", [round(c, 4) for c in change.tolist()])

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
left.plot(grid, curve)
left.plot(tax, welfare(tax), "o", color="C1", label="found by the gradient")
left.set_xlabel("tax (€ per tonne)")
left.set_ylabel("welfare (€)")
left.set_title("Welfare")
left.legend()
for firm, style in enumerate(("-", "--", "-.")):
    name = f"firm {firm + 1}: {EMISSION[firm]:.1f} t per unit"
    right.plot(grid, sold[:, firm], style, label=name)
right.axvline(tax, color="0.5", linewidth=1, label="best tax")
right.set_xlabel("tax (€ per tonne)")
right.set_ylabel("output (units)")
right.set_title("Output of each firm")
right.legend()
plt.show()
