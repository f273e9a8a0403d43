"""
Model predictive control that learns from an expert
===================================================

**What to see:** a controller with a horizon of 20 steps and limited thrust learns the
expert's costs from what the expert does, and then brakes as the expert does.
"""

import matplotlib.pyplot as plt
import torch

import bilevel

plt.style.use("tableau-colorblind10")

# %%
# A cart on a line: the state is (position, speed), the input is an acceleration
# between −1 and 1 m/s². A control problem of 20 steps of 0.2 s is one quadratic
# program.
STEPS, DT = 20, 0.2
F = torch.tensor([[1.0, DT], [0.0, 1.0]], dtype=torch.float64)
B = torch.tensor([0.5 * DT**2, DT], dtype=torch.float64)
powers = [torch.linalg.matrix_power(F, k) for k in range(STEPS + 1)]
free = torch.stack(powers[1:])  # (steps, 2, 2): states without input
forced = torch.zeros(STEPS, 2, STEPS, dtype=torch.float64)
for t in range(STEPS):
    for k in range(t + 1):
        forced[t, :, k] = powers[t - k] @ B


def plan(starts, log_costs):
    """Return the inputs (batch, 20) for the states ``starts`` (batch, 2)."""
    position, speed, effort = log_costs.exp()
    cost = torch.stack([position, speed])
    Q = torch.einsum("tsi,s,tsj->ij", forced, cost, forced)
    Q = Q + effort * torch.eye(STEPS, dtype=Q.dtype)
    drift = torch.einsum("tsr,br->bts", free, starts)
    q = torch.einsum("tsi,s,bts->bi", forced, cost, drift)
    return bilevel.quadratic_program(Q, q, lower=-1.0, upper=1.0)


# %%
# The expert's costs are hidden. We see 32 of its plans. Only ratios of costs matter,
# so the first one stays fixed.
generator = torch.Generator().manual_seed(0)
starts = 4 * torch.rand(32, 2, generator=generator, dtype=torch.float64) - 2
expert = torch.tensor([0.0, -0.5, -1.5], dtype=torch.float64)
seen = plan(starts, expert)
print(f"share of inputs at a limit: {(seen.abs() == 1).double().mean():.1%}")

learned = torch.tensor([1.5, 2.5], dtype=torch.float64, requires_grad=True)
zero = torch.zeros(1, dtype=torch.float64)
optimizer = torch.optim.Adam([learned], lr=0.1)
losses = []
for _ in range(80):
    optimizer.zero_grad()
    loss = ((plan(starts, torch.cat([zero, learned])) - seen) ** 2).mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(
    f"mean squared difference of inputs: {losses[0]:.3f} before, {losses[-1]:.1e} after"
)
print("costs of speed and effort:")
for name, costs in (("expert", expert[1:]), ("learned", learned)):
    print(f"  {name:8s}", [round(cost, 3) for cost in costs.exp().tolist()])

# %%
figure, panels = plt.subplots(2, 1, figsize=(7, 5), layout="constrained", sharex=True)
start = torch.tensor([[2.0, 0.5]], dtype=torch.float64)
time = DT * torch.arange(STEPS)
cases = (
    ("expert", expert, "C0", "-", 4),
    ("before", torch.tensor([0.0, 1.5, 2.5], dtype=torch.float64), "C2", ":", 2),
    ("learned", torch.cat([zero, learned.detach()]), "C1", "--", 2),
)
for name, costs, color, style, width in cases:
    inputs = plan(start, costs)
    states = torch.einsum("tsr,br->bts", free, start)
    states = states + torch.einsum("tsi,bi->bts", forced, inputs)
    look = {"color": color, "linestyle": style, "linewidth": width, "label": name}
    panels[0].plot(time + DT, states[0, :, 0], **look)
    panels[1].step(time, inputs[0], where="post", **look)
panels[0].set_ylabel("position (m)")
panels[1].set_ylabel("acceleration (m/s²)")
panels[1].set_xlabel("time (s)")
limit = panels[1].axhline(-1, color="0.5", linewidth=1, label="limits")
panels[1].axhline(1, color="0.5", linewidth=1)
panels[0].legend()
panels[1].legend(handles=[limit], loc="upper left", bbox_to_anchor=(0.0, 0.95))
panels[0].set_title("One start that was not seen")
plt.show()
