"""
Distil a data set for networks that start anew
==============================================

**What to see:** twenty learned images train a network from a fresh start, in twenty
steps, far better than twenty real ones.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call

from bilevel import learnable

plt.style.use("tableau-colorblind10")

# %%
# 1,200 digits are distilled, 597 test. We begin from two real images of each digit.
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
train, test = order[:1200], order[1200:]
rows = torch.cat([train[y[train] == digit][:2] for digit in range(10)])


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


# %%
# Each outer step begins with another network. It is trained on the twenty images, and
# judged on all 1,200. The images and the learning rates are learned together.
distilled = learnable.DistilledData(x[rows], y[rows])
rates = learnable.LearningRates(network(0), initial=0.5, steps=20)
optimizer = torch.optim.Adam(
    [
        {"params": distilled.inputs, "lr": 0.02},
        {"params": rates.logarithms, "lr": 0.05},
    ]
)
losses = []
for step in range(250):
    optimizer.zero_grad()
    loss = rates(network(1000 + step), distilled(), (x[train], y[train]))
    loss.backward()
    optimizer.step()
    losses.append(loss.item())


def accuracies(images, chosen):
    """Return the test accuracies of ten networks trained on twenty images."""
    found = []
    for seed in range(10):
        model = network(seed)
        parameters = chosen.trained(model, (images, y[rows]))
        with torch.no_grad():
            predicted = functional_call(model, parameters, (x[test],)).argmax(1)
        found.append((predicted == y[test]).double().mean().item())
    return torch.tensor(found)


images = distilled.inputs.detach()
real = max(
    (
        accuracies(x[rows], learnable.LearningRates(network(0), initial=r, steps=20))
        for r in (0.2, 0.5, 1.0, 2.0)
    ),
    key=torch.mean,
)
learned = accuracies(images, rates)
print(f"ten fresh networks, twenty real images:      {real.mean():.1%} of the test set")
print(f"ten fresh networks, twenty distilled images: {learned.mean():.1%}")
print(f"the worst of the ten:                        {learned.min():.1%}")

# %%
figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
axes.semilogy(losses)
axes.set_xlabel("outer step, each with a fresh network")
axes.set_ylabel("loss on real digits (nats)")
plt.show()

# %%
# Above are the real images that we began from, below the distilled ones.
figure, tiles = plt.subplots(2, 10, figsize=(9, 2.4), layout="constrained")
for row, shown in zip(tiles, (x[rows], images), strict=True):
    for tile, image in zip(row, shown[::2], strict=True):
        tile.imshow(image.reshape(8, 8), cmap="gray_r")
        tile.set_axis_off()
plt.show()
