"""
Learn a representation that many tasks share
============================================

**What to see:** a network that was learned on twelve tasks solves new tasks of the kind
from a few examples, far better than a linear classifier of pixels.
"""

import functools
import itertools

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import bilevel
from bilevel import learnable, stochastic

plt.style.use("tableau-colorblind10")

# %%
# A task is to say whether a digit belongs to a group of five. There are 126 ways to
# divide ten digits into two such groups: 12 of them train the body, 20 others are new.
# The body sees 600 digits, and the new tasks are made of 1,197 others.
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
generator = torch.Generator().manual_seed(0)
order = torch.randperm(len(y), generator=generator)
seen, unseen = order[:600], order[600:]
groups = [{0, *four} for four in itertools.combinations(range(1, 10), 4)]
groups = [groups[i] for i in torch.randperm(126, generator=generator)[:32]]
member = torch.tensor([[digit in group for digit in range(10)] for group in groups])


def tasks(numbers, rows, counts):
    """Return inputs and targets of tasks, for each of the two counts per digit."""
    parts = ([], [])
    for _ in numbers:
        mixed = rows[torch.randperm(len(rows), generator=generator)]
        by_digit = [mixed[y[mixed] == digit] for digit in range(10)]
        parts[0].append(torch.cat([r[: counts[0]] for r in by_digit]))
        parts[1].append(torch.cat([r[counts[0] : sum(counts)] for r in by_digit]))
    return [
        (x[(chosen := torch.stack(part))], member[numbers[:, None], y[chosen]].long())
        for part in parts
    ]


lower, upper = tasks(torch.arange(12), seen, (5, 40))

# %%
# The heads are the inner variables, the body is what is learned. The inner problems
# are convex, so that conjugate gradients meet no negative curvature.
torch.manual_seed(0)
body = learnable.SharedBody(
    nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16), nn.Tanh()),
    weight_decay=1e-2,
)
heads = learnable.TaskHeads(12, 16, 2)
method = stochastic.ImplicitStep(
    body.objectives,
    heads,
    body,
    inner_steps=5,
    linear_solver=bilevel.CG(max_steps=5),
    inner_optimizer=functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9),
    outer_optimizer=functools.partial(torch.optim.Adam, lr=5e-3),
)
losses = [method.step(lower, upper).outer_loss.item() for _ in range(100)]

# %%
# A head is fitted to a few examples of each new task.
torch.manual_seed(0)
untrained = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16), nn.Tanh())
table = {
    "pixels": learnable.SharedBody(nn.Flatten(), weight_decay=1e-2),
    "untrained body": learnable.SharedBody(untrained, weight_decay=1e-2),
    "learned body": body,
}
results = {name: [] for name in table}
counts = (1, 3, 10)
for shots in counts:
    few, rest = tasks(torch.arange(12, 32), unseen, (shots, 80))
    for name, chosen in table.items():
        fitted = chosen.fit(*few, outputs=2)
        with torch.no_grad():
            right = fitted(chosen(rest[0])).argmax(2) == rest[1]
        results[name].append(100 * right.double().mean().item())
print(f"outer loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after 100 steps")
for name, shares in results.items():
    listed = ", ".join(
        f"{s:.1f} % ({n} of each digit)" for s, n in zip(shares, counts, strict=True)
    )
    print(f"{name:15s} {listed}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.plot(losses)
left.set_xlabel("outer step")
left.set_ylabel("loss of held-out examples (nats)")
left.set_title("The twelve tasks of the body")
for (name, shares), style in zip(results.items(), (":o", "--o", "-o"), strict=True):
    right.plot(counts, shares, style, label=name)
right.set_xlabel("examples of each digit in a task")
right.set_ylabel("accuracy (%), by chance 50")
right.set_ylim(50, 100)
right.set_title("Twenty new tasks")
right.legend(loc="lower right", ncols=2)
plt.show()
