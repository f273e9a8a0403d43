"""
Distil a data set into ten images
=================================

**What to see:** ten learned images, one for each digit, train a classifier far better
than ten real ones.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import bilevel

plt.style.use("tableau-colorblind10")

# %%
# The inner problem trains a softmax regression on ten images. The outer variables are
# the pixels of these images, and the outer loss is that of the model on 1,200 real
# digits.
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float64) / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
train, test = order[:1200], order[1200:]
labels = torch.arange(10)


@bilevel.argmin(
    tolerance=bilevel.Tolerance(delta=1e-5, delta_prime=1e-5), warm_start=True
)
def trained(W, images):
    return cross_entropy(images @ W, labels) + 1e-3 * (W**2).sum()


def accuracy(W):
    return ((x[test] @ W).argmax(1) == y[test]).double().mean().item()


# %%
# We start from the first real image of each digit.
first = torch.stack([x[train][y[train] == digit][0] for digit in range(10)])
images = first.clone().requires_grad_()
optimizer = torch.optim.Adam([images], lr=0.05)
start = torch.zeros(64, 10, dtype=x.dtype)
losses, accuracies = [], []
for _ in range(60):
    optimizer.zero_grad()
    W = trained(start, images)
    loss = cross_entropy(x[train] @ W, y[train])
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    accuracies.append(accuracy(W.detach()))
print(f"test accuracy, ten real images:      {accuracies[0]:.1%}")
print(f"test accuracy, ten distilled images: {accuracies[-1]:.1%}")

# %%
figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
axes.plot([100 * a for a in accuracies])
axes.set_xlabel("outer step")
axes.set_ylabel("test accuracy (%)")
axes.set_title("The images learn to teach")
plt.show()

# %%
# The upper row shows the real images that we began from, the lower row the distilled
# ones.
figure, tiles = plt.subplots(2, 10, figsize=(9, 2.6), layout="constrained")
for row, shown in zip(tiles, (first, images.detach()), strict=True):
    for tile, image in zip(row, shown, strict=True):
        tile.imshow(image.reshape(8, 8), cmap="gray_r")
        tile.set_axis_off()
for row, name in zip(tiles, ("real", "distilled"), strict=True):
    row[0].set_title(name, loc="left", fontsize=11)
plt.show()
