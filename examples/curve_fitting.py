"""
A curve fit and what each measurement moves
===========================================

**What to see:** the derivative of the fit tells which measurements matter. The
maximum speed hangs on the high concentrations, and the constant K on both ends, with
opposite signs.
"""

import matplotlib.pyplot as plt
import torch
from scipy.optimize import curve_fit

import bilevel

plt.style.use("tableau-colorblind10")

# %%
# The speed of a reaction with the enzyme puromycin (Treloar, 1974), and the law of
# Michaelis and Menten: v = V c / (K + c).
levels = [0.02, 0.06, 0.11, 0.22, 0.56, 1.10]
c = torch.tensor(levels, dtype=torch.float64).repeat_interleave(2)
rates = [76, 47, 97, 107, 123, 139, 159, 152, 191, 201, 207, 200]
v = torch.tensor(rates, dtype=torch.float64)


@bilevel.least_squares
def fit(p, c, v):
    V, K = p
    return V * c / (K + c) - v


start = torch.tensor([150.0, 0.2], dtype=torch.float64)
p = fit(start, c, v)
law = lambda c, V, K: V * c / (K + c)  # noqa: E731
reference, scipy_covariance = curve_fit(law, c.numpy(), v.numpy(), p0=[150, 0.2])
print(f"bilevel: V = {p[0]:.4f}, K = {p[1]:.6f}")
print(f"scipy:   V = {reference[0]:.4f}, K = {reference[1]:.6f}")

# %%
# The Jacobian dp/dv carries the scatter of the measurements over to the parameters.
jacobian = torch.func.jacrev(lambda v: fit(start, c, v))(v)  # (2, 12)
scatter = ((law(c, *p) - v) ** 2).sum() / (len(v) - 2)
errors = (scatter * (jacobian @ jacobian.T).diagonal()).sqrt()
print(f"standard errors by dp/dv: V ± {errors[0]:.2f}, K ± {errors[1]:.5f}")
print(
    f"by scipy (J only):        V ± {scipy_covariance[0, 0] ** 0.5:.2f}, "
    f"K ± {scipy_covariance[1, 1] ** 0.5:.5f}"
)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
line = torch.linspace(0.001, 1.2, 200, dtype=torch.float64)
left.plot(c, v, "o", label="measured")
left.plot(line, law(line, *p), label="fit")
left.set_xlabel("concentration (ppm)")
left.set_ylabel("reaction speed (counts/min²)")
left.set_title("Fit")
left.legend()
share = jacobian / p[:, None] * 1000
right.plot(range(1, 13), share[0], "o-", label="maximum speed V")
right.plot(range(1, 13), share[1], "s--", label="constant K")
right.axhline(0, color="0.6", linewidth=1)
right.set_xlabel("measurement, by rising concentration")
right.set_ylabel("change per count/min² (‰)")
right.set_title("Influence of each measurement")
right.legend()
plt.show()
