"""
Learn which layers to fine-tune
===============================

**What to see:** a trained network has to be adapted in ten steps. With learned rates it
comes further than with the best single one. Where the labels change, the rate of the
last layer's weights is several times that of the first's.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from bilevel import learnable

plt.style.use("tableau-colorblind10")

# %%
# The network is trained on 600 digits. To adapt it there are 100 others. 300 validate,
# 797 test.
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
first, train, validation, test = order.split([600, 100, 300, len(y) - 1000])
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
for _ in range(150):
    optimizer.zero_grad()
    cross_entropy(network(x[first]), y[first]).backward()
    optimizer.step()

# %%
# Two changes: the images are mirrored, or each digit gets the name of the next one.
mirrored = x.reshape(-1, 8, 8).flip(2).reshape(-1, 64)
changes = {"images mirrored": (mirrored, y), "labels renamed": (x, (y + 1) % 10)}


def adapted_accuracy(rates, inputs, targets, rows):
    parameters = rates.trained(network, (inputs[train], targets[train]))
    with torch.no_grad():
        outputs = functional_call(network, parameters, (inputs[rows],))
        return (outputs.argmax(1) == targets[rows]).double().mean().item()


# %%
# Calling the module makes ten steps of descent from the trained network, and returns
# the validation loss. All rates are 0.1 at first.
learned = {}
for change, (inputs, targets) in changes.items():
    rates = learnable.LearningRates(network, initial=0.1, steps=10)
    optimizer = torch.optim.Adam(rates.parameters(), lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        loss = rates(
            network,
            (inputs[train], targets[train]),
            (inputs[validation], targets[validation]),
        )
        loss.backward()
        optimizer.step()
    learned[change] = {name: rate.item() for name, rate in rates.rates.items()}
    single = [
        learnable.LearningRates(network, initial=rate, steps=10)
        for rate in (0.1, 0.2, 0.5, 0.7, 1.0, 1.4, 2.0)
    ]
    best = max(single, key=lambda r: adapted_accuracy(r, inputs, targets, validation))
    print(
        f"{change}, test accuracy after ten steps: best single rate "
        f"{adapted_accuracy(best, inputs, targets, test):.1%}, learned rates "
        f"{adapted_accuracy(rates, inputs, targets, test):.1%}"
    )
    print("   " + ", ".join(f"{n} {r:.2f}" for n, r in learned[change].items()))

# %%
figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
place = torch.arange(4)
for number, (change, found) in enumerate(learned.items()):
    axes.bar(place + 0.4 * number - 0.2, list(found.values()), width=0.38, label=change)
axes.axhline(0.1, color="0.2", linestyle=":", label="all rates at first")
axes.set_yscale("log")
axes.set_xticks(place, list(learned["images mirrored"]))
axes.set_xlabel("tensor of the network")
axes.set_ylabel("learned rate (no unit)")
axes.legend()
plt.show()
