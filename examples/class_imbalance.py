"""
Learn class weights for an imbalanced set
=========================================

**What to see:** five digits are rare in training and are often missed. Ten class
weights, learned on a small balanced set, bring them back.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import bilevel

plt.style.use("tableau-colorblind10")

# %%
# Training has 80 of each of the digits 0 to 4, and 4 of each of the digits 5 to 9.
# The validation set has 20 of each.
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float64) / 16
x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
y = torch.tensor(digits.target)
generator = torch.Generator().manual_seed(0)
train, validation, test = [], [], []
for digit in range(10):
    rows = torch.nonzero(y == digit).squeeze(1)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    count = 80 if digit < 5 else 4
    train.append(rows[:count])
    validation.append(rows[80:100])
    test.append(rows[100:])
train, validation, test = (torch.cat(part) for part in (train, validation, test))

# %%
# The inner problem is softmax regression with a weight for each class. The weights
# are softmax(θ), and the loss is a weighted mean.


@bilevel.argmin(
    tolerance=bilevel.Tolerance(delta=1e-4, delta_prime=1e-4), warm_start=True
)
def classifier(W, theta):
    losses = cross_entropy(x[train] @ W, y[train], reduction="none")
    weights = theta.softmax(0)[y[train]]
    return (weights * losses).sum() / weights.sum() + 5e-3 * (W**2).sum()


def validation_loss(theta):
    W = classifier(torch.zeros(65, 10, dtype=x.dtype), theta)
    return W, cross_entropy(x[validation] @ W, y[validation])


def recalls(W):
    right = (x[test] @ W).argmax(1) == y[test]
    return torch.stack([right[y[test] == digit].double().mean() for digit in range(10)])


theta = torch.zeros(10, dtype=x.dtype, requires_grad=True)
optimizer = torch.optim.Adam([theta], lr=0.5)
before, loss_before = validation_loss(theta)
for _ in range(80):
    optimizer.zero_grad()
    W, loss = validation_loss(theta)
    loss.backward()
    optimizer.step()

counts = torch.bincount(y[train]).double()
balanced, _ = validation_loss(-counts.log())
table = {
    "equal weights": recalls(before.detach()),
    "inverse frequency": recalls(balanced),
    "learned": recalls(W.detach()),
}
print(f"validation loss: {loss_before:.3f} before, {loss:.3f} after 80 steps")
for name, values in table.items():
    print(
        f"{name:18s} recall: frequent digits {values[:5].mean():.1%}, "
        f"rare digits {values[5:].mean():.1%}"
    )

# %%
figure, axes = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
place = torch.arange(10)
for number, (name, values) in enumerate(table.items()):
    axes.bar(place + 0.28 * (number - 1), 100 * values, width=0.26, label=name)
axes.set_xticks(range(10))
axes.set_xlabel("digit (5 to 9 are rare in training)")
axes.set_ylabel("recall on the test set (%)")
axes.set_title("Learned class weights bring back rare digits")
axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=3)
plt.show()
