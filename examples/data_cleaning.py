"""
Find wrong labels
=================

**What to see:** digits whose label we changed get a weight near zero, and nearly all
of those that are flagged are wrong.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

from bilevel import cleaning

plt.style.use("tableau-colorblind10")

# %%
# 400 digits train, and 35 % of them get another label. 150 digits are trusted: their
# labels are right. The others test.
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
train, trusted, test = order[:400], order[400:550], order[550:]
given, wrong = cleaning.corrupt(y[train], 0.35, seed=0)

# %%
# One call learns a weight for each training digit. The outer loss is that of the
# trusted digits, for a model that is trained with these weights.
result = cleaning.clean(
    (x[train], given), (x[trusted], y[trusted]), test=(x[test], y[test])
)
flagged = result.flagged
precision = (wrong & flagged).sum() / flagged.sum()
recall = (wrong & flagged).sum() / wrong.sum()
print(f"{int(flagged.sum())} flagged: precision {precision:.1%}, recall {recall:.1%}")
print(f"test accuracy, labels as given:    {result.accuracies.untrusted:.1%}")
print(f"test accuracy, cleaned:            {result.accuracies.cleaned:.1%}")
print(f"test accuracy, trusted data alone: {result.accuracies.trusted_only:.1%}")

# %%
# Above are the eight digits with the smallest weights, below are all weights.
figure = plt.figure(figsize=(7.2, 4.4), layout="constrained")
above, below = figure.subfigures(2, 1, height_ratios=[1, 2.2])
above.suptitle("The eight smallest weights", fontsize=11)
for tile, row in zip(
    above.subplots(1, 8), result.weights.argsort()[:8].tolist(), strict=True
):
    tile.imshow(x[train][row].reshape(8, 8), cmap="gray_r")
    tile.set_title(f"given {given[row]}\ntrue {y[train][row]}", fontsize=10)
    tile.set_axis_off()
axes = below.subplots()
axes.hist(
    [result.weights[~wrong].tolist(), result.weights[wrong].tolist()],
    bins=torch.linspace(0, 1, 31).tolist(),
    stacked=True,
    label=["right label", "wrong label"],
)
axes.set_xlabel("weight learned (0: ignored, 1: full)")
axes.set_ylabel("training digits (count)")
axes.legend(loc="upper center")
plt.show()
