"""
Sparse coding with a learned dictionary
=======================================

**What to see:** learned atoms explain more of unseen digits than random images do,
and need fewer atoms for each digit.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import bilevel

plt.style.use("tableau-colorblind10")

# %%
# A code is the solution of a Lasso with codes of at least zero. All codes of a
# minibatch are solved as one batch by ``vmap``.
images = torch.tensor(load_digits().data, dtype=torch.float64) / 16
images = images / images.norm(dim=1, keepdim=True)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = images[order[:640]], images[order[640:840]]
ATOMS, STRENGTH = 24, 0.15


def misfit(code, image, dictionary):
    return 0.5 * ((code @ dictionary - image) ** 2).sum() + STRENGTH * code.sum()


encode = torch.func.vmap(
    bilevel.argmin(misfit, prox=bilevel.prox.NonNegative()), in_dims=(0, 0, None)
)


def explained(dictionary, batch):
    codes = encode(torch.zeros(len(batch), ATOMS, dtype=batch.dtype), batch, dictionary)
    return codes, ((codes @ dictionary - batch) ** 2).sum(1).mean()


# %%
# The outer variable is the dictionary. Atoms have length one. The derivative of the
# codes with respect to the dictionary is that of the implicit function theorem.
first = images[order[840 : 840 + ATOMS]]
atoms = first.clone().requires_grad_()
optimizer = torch.optim.Adam([atoms], lr=0.01)
losses = []
for step in range(60):
    batch = train[torch.arange(64 * step, 64 * step + 64) % len(train)]
    dictionary = torch.nn.functional.normalize(atoms, dim=1)
    codes, error = explained(dictionary, batch)
    loss = error + 2 * STRENGTH * codes.sum(1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

learned = torch.nn.functional.normalize(atoms, dim=1).detach()
for name, dictionary in (("random images", first), ("learned atoms", learned)):
    codes, error = explained(dictionary, test)
    print(
        f"{name}: {100 * error:.1f} % of the squared norm unexplained, "
        f"{(codes > 0).sum(1).double().mean():.1f} of {ATOMS} atoms used"
    )

# %%
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
axes.plot(losses, color="0.6", linewidth=1, label="each minibatch of 64")
means = torch.tensor(losses).unfold(0, 10, 1).mean(1)
axes.plot(range(9, 9 + len(means)), means, label="mean of the last ten")
axes.set_xlabel("outer step")
axes.set_ylabel("squared error + penalty (no unit)")
axes.set_title("Training of the dictionary")
axes.legend()
plt.show()

# %%
# The learned atoms; orange is ink, violet is its opposite.
figure, tiles = plt.subplots(2, 12, figsize=(9, 1.8), layout="constrained")
for tile, atom in zip(tiles.flat, learned, strict=True):
    limit = atom.abs().max()
    tile.imshow(atom.reshape(8, 8), cmap="PuOr_r", vmin=-limit, vmax=limit)
    tile.set_axis_off()
plt.show()
