"""
Learn which auxiliary task helps
================================

**What to see:** an auxiliary task with many labels helps a classifier with few. One
with random labels harms it. The weights that are learned tell the one from the other.
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
# The main task is to name the digit, and 40 of 600 training digits have that label.
# All of them have two other labels: the remainder of the digit divided by 5, and a
# number from 0 to 9 drawn at random. 200 digits validate, 997 test.
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
generator = torch.Generator().manual_seed(0)
order = torch.randperm(len(y), generator=generator)
train, validation, test = order[:600], order[600:800], order[800:]
remainder = y % 5
drawn = torch.randint(10, (len(y),), generator=generator)
known = torch.full_like(y, -100)  # cross_entropy ignores -100
known[train[:40]] = y[train[:40]]
training_set = x[train], torch.stack([known, remainder, drawn], dim=1)[train]
validation_set = x[validation], torch.stack([y, remainder, drawn], dim=1)[validation]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 25))


# %%
# The network has 10 + 5 + 10 outputs. Each loss takes its own columns.
def digit_loss(outputs, targets):
    return cross_entropy(outputs[:, :10], targets[:, 0])


def remainder_loss(outputs, targets):
    return cross_entropy(outputs[:, 10:15], targets[:, 1])


def drawn_loss(outputs, targets):
    return cross_entropy(outputs[:, 15:], targets[:, 2])


def run(learn, auxiliary=(remainder_loss, drawn_loss), initial=1.0, steps=120):
    model = network()
    weights = learnable.LossWeights(
        auxiliary, loss=digit_loss, initial=initial, weight_decay=2e-3
    )
    method = stochastic.ImplicitStep(
        weights.objectives,
        model,
        weights,
        inner_steps=3,
        linear_solver=bilevel.CG(max_steps=5),
        hessian=bilevel.GaussNewtonHessian(),
        inner_optimizer=functools.partial(torch.optim.Adam, lr=1e-2),
        outer_optimizer=functools.partial(torch.optim.Adam, lr=0.05 if learn else 0.0),
    )
    history = []
    for _ in range(steps):
        method.step(training_set, validation_set)
        history.append(weights().detach().clone())
    with torch.no_grad():
        right = (model(x[test])[:, :10].argmax(1) == y[test]).double().mean().item()
    return torch.stack(history), right


history, learned = run(learn=True)
_, equal = run(learn=False)
_, alone = run(learn=False, initial=1e-9)
_, only_drawn = run(learn=False, auxiliary=(drawn_loss,))
print(f"test accuracy, main task alone:       {alone:.1%}")
print(f"test accuracy, random labels added:   {only_drawn:.1%}")
print(f"test accuracy, equal weights:         {equal:.1%}")
print(f"test accuracy, learned weights:       {learned:.1%}")
print(
    f"weights at the end: remainder {history[-1][0]:.2f}, "
    f"random labels {history[-1][1]:.2f}"
)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.plot(history[:, 0], label="remainder")
left.plot(history[:, 1], "--", label="random labels")
left.set_xlabel("outer step")
left.set_ylabel("weight of the loss (no unit)")
left.set_title("Weights of the auxiliary losses")
left.legend()
names = [
    "main task\nalone",
    "random\nlabels added",
    "equal\nweights",
    "learned\nweights",
]
values = [100 * share for share in (alone, only_drawn, equal, learned)]
bars = right.bar(names, values)
right.bar_label(bars, fmt="%.1f")
right.set_xlabel("losses in training")
right.set_ylabel("test accuracy (%)")
right.set_ylim(60, 100)
right.set_title("Accuracy of the main task")
plt.show()
