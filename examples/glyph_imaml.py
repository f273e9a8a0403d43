"""
iMAML on drawn characters
=========================

**What to see:** the network learns to tell five characters that it has never seen
from one image of each. Meta-training raises its accuracy on new characters.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import bilevel
from bilevel.meta import FewShotSampler, conv_network, draw_glyphs

plt.style.use("tableau-colorblind10")

# %%
# The library draws the characters itself. 60 of them train, 40 others test. A task
# has five characters, one support image and three query images of each.
glyphs = draw_glyphs(classes=100, examples=8, size=20, seed=0)
images, labels = glyphs.images, glyphs.labels
seen = labels < 60


def sampler(rows, seed):
    numbers = labels[rows].tolist()
    return FewShotSampler(images[rows], numbers, ways=5, shots=1, queries=3, seed=seed)


torch.manual_seed(0)
learner = bilevel.IMAML(
    conv_network(5, filters=8, size=20),
    nn.functional.cross_entropy,
    lam=1.0,
    solver=bilevel.GradientDescent(lr=0.1, max_steps=8),
    linear_solver=bilevel.CG(max_steps=3),
    on_failure="ignore",
)
test = sampler(~seen, seed=1).sample(60)


def accuracy():
    adapted = learner.adapt((test.support_x, test.support_y))
    guess = learner.predict(adapted, test.query_x).argmax(-1)
    return (guess == test.query_y).double().mean().item()


# %%
training = sampler(seen, seed=0)
optimizer = torch.optim.Adam(learner.parameters(), lr=5e-3)
steps, accuracies = [0], [accuracy()]
for step in range(1, 121):
    loss = learner(training.sample(8))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        steps.append(step)
        accuracies.append(accuracy())
print(
    f"accuracy on 60 tasks of unseen characters: {accuracies[0]:.1%} before, "
    f"{accuracies[-1]:.1%} after {steps[-1]} steps (chance: 20 %)"
)

# %%
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
axes.plot(steps, [100 * a for a in accuracies], "o-")
axes.axhline(20, color="0.5", linestyle=":", label="chance")
axes.set_xlabel("outer step")
axes.set_ylabel("accuracy on unseen characters (%)")
axes.set_ylim(0, 100)
axes.set_title("One image of each character is enough")
axes.legend()
plt.show()

# %%
# One test task: the support images are above, one query image of each character is
# below.
figure, tiles = plt.subplots(2, 5, figsize=(6, 3), layout="constrained")
for column in range(5):
    query = (test.query_y[0] == column).nonzero()[0, 0]
    tiles[0, column].imshow(1 - test.support_x[0, column, 0], cmap="gray")
    tiles[1, column].imshow(1 - test.query_x[0, query, 0], cmap="gray")
tiles[0, 0].set_title("support", loc="left", fontsize=11)
tiles[1, 0].set_title("query", loc="left", fontsize=11)
for tile in tiles.flat:
    tile.set_axis_off()
plt.show()
