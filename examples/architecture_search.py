"""
Choose the operations of a small network
========================================

**What to see:** at both places, the weights of two of the four operations fall to
nearly zero within 30 steps. Two that are about as good stay close. The network with
the chosen two is trained anew, and so are all others: the choice is among the best.
"""

import functools
import itertools

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel
from bilevel import learnable, stochastic

plt.style.use("tableau-colorblind10")

# %%
# 300 digits train, 300 validate, 1,197 test. Each of two places has one of four
# operations.
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
train, validation, test = order[:300], order[300:600], order[600:]
OPERATIONS = ("skip", "blur", "3×3", "1×1")


def operation(name):
    if name == "skip":
        return nn.Identity()
    if name == "blur":
        return nn.AvgPool2d(3, stride=1, padding=1)
    size = 3 if name == "3×3" else 1
    return nn.Sequential(nn.Conv2d(4, 4, size, padding=size // 2), nn.Tanh())


class Network(nn.Module):
    """A stem, two places with an operation each, and a linear classifier."""

    def __init__(self, choices):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.places = nn.ModuleList(
            learnable.MixedOperation([operation(name) for name in names])
            for names in choices
        )
        self.last = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10))

    def forward(self, inputs, weights):
        features = self.stem(inputs)
        for place, row in zip(self.places, weights, strict=True):
            features = place(features, row)
        return self.last(features)


# %%
# The search trains all operations at once, mixed by softmax.
network = Network([OPERATIONS, OPERATIONS])
architecture = learnable.Architecture(2, 4, weight_decay=1e-3)
method = stochastic.ImplicitStep(
    architecture.objectives,
    network,
    architecture,
    inner_steps=3,
    linear_solver=bilevel.CG(max_steps=5),
    hessian=bilevel.GaussNewtonHessian(),
    inner_optimizer=functools.partial(torch.optim.Adam, lr=1e-2),
    outer_optimizer=functools.partial(torch.optim.Adam, lr=0.1),
)
batches = stochastic.Minibatches((x[train], y[train]), 150, seed=0)
held = stochastic.Minibatches((x[validation], y[validation]), 150, seed=1)
history = []
for _ in range(60):
    method.step(batches, held)
    history.append(architecture().detach())
chosen = tuple(OPERATIONS[number] for number in architecture.chosen())


# %%
# Then each of the sixteen networks is trained anew on the training digits.
def test_accuracy(names):
    model = Network([[name] for name in names])
    weights = torch.ones(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        cross_entropy(model(x[train], weights), y[train]).backward()
        optimizer.step()
    with torch.no_grad():
        return (model(x[test], weights).argmax(1) == y[test]).double().mean().item()


pairs = itertools.product(OPERATIONS, repeat=2)
table = {pair: test_accuracy(pair) for pair in pairs}
ranked = sorted(table, key=table.get, reverse=True)
place = ranked.index(chosen) + 1
print(f"chosen: {', then '.join(chosen)}")
print(f"its test accuracy: {table[chosen]:.1%}, number {place} of 16")
print(f"best and worst:    {table[ranked[0]]:.1%} and {table[ranked[-1]]:.1%}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
weights = torch.stack(history)
for number, name in enumerate(OPERATIONS):
    for place, style in enumerate(("-", "--")):
        left.plot(
            weights[:, place, number],
            style,
            color=f"C{number}",
            label=f"{name}, place {place + 1}",
        )
left.set_title("Weights during the search")
left.set_ylim(bottom=0)
left.set_xlabel("outer step")
left.set_ylabel("weight of the operation (no unit)")
left.legend(fontsize=8, ncols=2)
names = [", ".join(pair) for pair in ranked[::-1]]
hatches = ["////" if pair == chosen else "" for pair in ranked[::-1]]
right.barh(
    names,
    [100 * table[pair] for pair in ranked[::-1]],
    hatch=hatches,
    edgecolor="white",
)
right.set_xlim(80, 100)
right.set_title("All sixteen networks, the chosen one hatched")
right.set_xlabel("test accuracy, trained anew (%)")
right.set_ylabel("operations at the two places")
plt.show()
