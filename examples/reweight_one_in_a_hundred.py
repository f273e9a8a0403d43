"""
Reweight a class of one in a hundred
====================================

**What to see:** eight of 808 training examples are of the rare class, and a network
misses most of it. Weights of the examples, learned on 40 balanced ones, find most of
it again. Training on both sets, weighed by inverse frequency, does better still.
"""

import functools

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel
from bilevel import learnable, stochastic

plt.style.use("tableau-colorblind10")

# %%
# The rare class is the digit 8. Training has 8 of it and 800 others, validation 20
# and 20. The test set has 146 and 797, of which we take the mean of both recalls.
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target == 8).long()
order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
rare, common = order[y[order] == 1], order[y[order] == 0]
train = torch.cat([rare[:8], common[:800]])
validation = torch.cat([rare[8:28], common[800:820]])
test = rare[28:], common[820:]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))


def recalls(model):
    with torch.no_grad():
        return [
            (model(x[rows]).argmax(1) == label).double().mean().item()
            for rows, label in zip(test, (1, 0), strict=True)
        ]


def trained(rows, weights):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        losses = cross_entropy(model(x[rows]), y[rows], reduction="none")
        squares = sum((p**2).sum() for p in model.parameters())
        ((weights * losses).mean() + 0.5e-3 * squares).backward()
        optimizer.step()
    return model


def inverse_frequency(rows):
    return (len(rows) / (2 * torch.bincount(y[rows])))[y[rows]]


# %%
# The outer loss is that of the 40 validation examples.
model = network()
weights = learnable.ExampleWeights(len(train), weight_decay=1e-3)
method = stochastic.ImplicitStep(
    weights.objectives,
    model,
    weights,
    inner_steps=1,
    linear_solver=bilevel.CG(max_steps=5),
    hessian=bilevel.GaussNewtonHessian(),
    inner_optimizer=functools.partial(torch.optim.Adam, lr=1e-2),
    outer_optimizer=functools.partial(torch.optim.Adam, lr=0.1),
)
training = x[train], y[train], torch.arange(len(train))
for _ in range(150):
    method.step(training, (x[validation], y[validation]))

both = torch.cat([train, validation])
table = {
    "training set": trained(train, torch.ones(len(train))),
    "and inverse frequency": trained(train, inverse_frequency(train)),
    "validation set alone": trained(validation, torch.ones(len(validation))),
    "learned weights": model,
    "both sets, inverse frequency": trained(both, inverse_frequency(both)),
}
results = {name: recalls(chosen) for name, chosen in table.items()}
for name, (rare_recall, common_recall) in results.items():
    print(
        f"{name:29s} recall: rare {rare_recall:.1%}, others {common_recall:.1%}, "
        f"mean {(rare_recall + common_recall) / 2:.1%}"
    )
found = weights().detach()
print(f"mean weight: rare {found[:8].mean():.2f}, others {found[8:].mean():.2f}")

# %%
figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
place = torch.arange(len(results))
for number, (label, shift) in enumerate({"rare": -0.2, "others": 0.2}.items()):
    shares = [100 * pair[number] for pair in results.values()]
    axes.barh(place + shift, shares, height=0.38, label=label)
axes.set_yticks(place, list(results))
axes.invert_yaxis()
axes.set_xlabel("recall on the test set (%)")
axes.set_ylabel("trained on")
axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
plt.show()
