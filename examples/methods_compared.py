"""
Hypergradient methods compared
==============================

**What to see:** conjugate gradients reach every error below a tenth in the least time.
The memory of unrolled and truncated steps grows with their number, that of conjugate
gradients does not.
"""

import json
import os
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

import bilevel

plt.style.use("tableau-colorblind10")
os.environ["KINETO_LOG_LEVEL"] = "99"  # of the profiler, which is talkative

# %%
# Softmax regression on digits with a strength for each of the 64 pixels: 640 inner
# unknowns. The inner solution is the same for all methods, so that only the
# derivatives differ.
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float64) / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
train, validation = order[:500], order[500:1000]
theta = torch.full((64,), -3.5, dtype=torch.float64)


def training_loss(W, log_strengths):
    return cross_entropy(x[train] @ W, y[train]) + (log_strengths.exp() @ W**2).sum()


STEP = 1.0  # of gradient descent
zero = torch.zeros(64, 10, dtype=torch.float64)
solution = bilevel.argmin(training_loss)(zero, theta)


# %%
# Torch's profiler says what is allocated and freed. The memory of a method is the
# peak of the forward and backward pass together.
def peak_megabytes(work):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = [e for e in events if e.get("name") == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    held = torch.tensor([e["args"]["Bytes"] for e in changes], dtype=torch.float64)
    return held.cumsum(0).max().item() / 1e6


def measured(layer, init):
    at = theta.clone().requires_grad_()

    def loss_at():
        return cross_entropy(x[validation] @ layer(init, at), y[validation])

    def hypergradient():
        return torch.autograd.grad(loss_at(), at)[0]

    seconds = []
    for _ in range(3):
        loss = loss_at()
        begin = time.perf_counter()
        gradient = torch.autograd.grad(loss, at)[0]
        seconds.append(time.perf_counter() - begin)
    return gradient, min(seconds), peak_megabytes(hypergradient)


# Nyström's approximation is good where most eigenvalues are nearly zero. Here the
# strengths keep all of them above 0.06, which is the hard case for it.
silent = bilevel.Tolerance(delta=None, delta_prime=None)


def implicit(linear_solver):
    return bilevel.argmin(
        training_loss,
        solver=bilevel.GradientDescent(lr=STEP, max_steps=1),
        linear_solver=linear_solver,
        tolerance=silent,
    )


def by_steps(how, count=1):
    solver = bilevel.GradientDescent(lr=STEP, max_steps=count)
    return bilevel.argmin(
        training_loss, solver=solver, differentiation=how, tolerance=silent
    )


families = {
    "exact": [(0, implicit(bilevel.Exact()))],
    "CG": [(k, implicit(bilevel.CG(max_steps=k))) for k in (2, 5, 10, 20, 40)],
    "Neumann": [
        (k, implicit(bilevel.Neumann(terms=k, step=STEP))) for k in (2, 5, 20, 80)
    ],
    "Nyström": [
        (k, implicit(bilevel.Nystrom(rank=k, rho=0.02))) for k in (40, 160, 320)
    ],
    "truncated": [(k, by_steps(bilevel.Truncated(k))) for k in (2, 5, 20, 80)],
    "one step": [(1, by_steps(bilevel.OneStep()))],
    "unrolled": [(k, by_steps(bilevel.Unrolled(), k)) for k in (20, 80)],
}
exact = measured(families["exact"][0][1], solution.detach())[0]
table = {}
for name, layers in families.items():
    for count, layer in layers:
        init = zero if name == "unrolled" else solution.detach()
        gradient, seconds, megabytes = measured(layer, init)
        error = ((gradient - exact).norm() / exact.norm()).item()
        table.setdefault(name, []).append((count, error, 1e3 * seconds, megabytes))

print("method     number  relative error  milliseconds  peak (MB)")
for name, rows in table.items():
    for count, error, milliseconds, megabytes in rows:
        print(
            f"{name:9s} {count:7d}  {error:14.1e}  {milliseconds:12.1f}  "
            f"{megabytes:10.1f}"
        )

# %%
# The exact method has no error by definition; it is drawn at 1e-15.
figure, (left, right) = plt.subplots(
    1, 2, figsize=(10, 4.2), layout="constrained", sharey=True
)
marks = dict(zip(table, "*osD^vX", strict=True))
for number, (name, rows) in enumerate(table.items()):
    _, errors, milliseconds, megabytes = zip(*rows, strict=True)
    errors = [max(error, 1e-15) for error in errors]
    look = {
        "marker": marks[name],
        "color": f"C{number}",
        "label": name,
        "markersize": 8,
    }
    left.loglog(milliseconds, errors, **look)
    right.loglog(megabytes, errors, **look)
left.set_xlabel("time of the derivative (ms)")
left.set_ylabel("relative error of the hypergradient")
left.set_title("Time")
right.set_xlabel("peak memory of both passes (MB)")
right.set_title("Memory")
right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
plt.show()
