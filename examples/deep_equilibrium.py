"""
A deep equilibrium classifier
=============================

**What to see:** a network of one layer, repeated until nothing changes, learns
digits. Its memory does not depend on how many repetitions that takes.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import bilevel

plt.style.use("tableau-colorblind10")

# %%
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
train, test = order[:1200], order[1200:]

# %%
# The hidden state z solves z = tanh(W z + U x + b). Dividing W by its norm keeps the
# mapping a contraction. A module in a layer is a function, whose parameters are
# differentiated.


class Cell(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.W = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.U = nn.Linear(64, width)

    def forward(self, z, x):
        W = 0.9 * self.W / torch.linalg.matrix_norm(self.W).clamp(min=0.9)
        return torch.tanh(z @ W.T + self.U(x))


torch.manual_seed(0)
tolerance = bilevel.Tolerance(delta=1e-3, delta_prime=1e-3)
cell = Cell(32)
equilibrium = bilevel.fixed_point(cell, solver=bilevel.Anderson(), tolerance=tolerance)
head = nn.Linear(32, 10)
parameters = [*cell.parameters(), *head.parameters()]
optimizer = torch.optim.Adam(parameters, lr=5e-3)


def predict(rows):
    return head(equilibrium(torch.zeros(len(rows), 32), x[rows]))


losses, accuracies = [], []
for step in range(150):
    rows = train[torch.arange(80 * step, 80 * step + 80) % len(train)]
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(predict(rows), y[rows])
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
with torch.no_grad():
    accuracy = (predict(test).argmax(1) == y[test]).double().mean().item()
print(f"loss {losses[0]:.2f} at the first step, {losses[-1]:.2f} at the last")
print(f"test accuracy: {accuracy:.1%}")

# %%
# Some digits need more repetitions than others. Each has its own stopping time.
with torch.no_grad():
    report = torch.func.vmap(lambda z, row: equilibrium.solve(z, row), in_dims=(0, 0))(
        torch.zeros(len(test), 32), x[test]
    ).report
counts = report.iterations
print(f"repetitions: {int(counts.min())} to {int(counts.max())}")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.plot(losses)
left.set_xlabel("training step")
left.set_ylabel("cross-entropy (nats)")
left.set_title(f"Training; test accuracy {100 * accuracy:.1f} %")
right.bar(*counts.unique(return_counts=True))
right.set_xticks(counts.unique().tolist())
right.set_xlabel("steps of Anderson's method")
right.set_ylabel("test digits (count)")
right.set_title("Steps until nothing changes")
plt.show()
