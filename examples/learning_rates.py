"""
Learn a learning rate for each layer
====================================

**What to see:** the first layer's rate rises and those of the biases fall. Twenty steps
of gradient descent then come further than with the best single rate.
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
# 300 digits train, 300 validate, 1,197 test. Each outer step begins with another
# network, and the rates are tested on ten that are new.
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
train, validation, test = order[:300], order[300:600], order[600:]


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


# %%
# Calling the module makes 20 steps of descent, and returns the validation loss. Its
# gradient is clipped: near the largest stable rates it is now and then huge.
rates = learnable.LearningRates(network(0), initial=0.5, steps=20)
optimizer = torch.optim.Adam(rates.parameters(), lr=0.1)
losses, history = [], []
for step in range(80):
    optimizer.zero_grad()
    loss = rates(network(100 + step), (x[train], y[train]), (x[validation], y[validation]))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(rates.parameters(), 0.3)
    optimizer.step()
    losses.append(loss.item())
    history.append([rate.item() for rate in rates.rates.values()])
history = torch.tensor(history)


def test_losses(chosen):
    """Return the mean test loss after 20 steps from ten new starts."""
    found = []
    for seed in range(1, 11):
        model = network(seed)
        parameters = chosen.trained(model, (x[train], y[train]))
        with torch.no_grad():
            outputs = functional_call(model, parameters, (x[test],))
            found.append(cross_entropy(outputs, y[test]).item())
    return sum(found) / len(found)


single = {
    rate: test_losses(learnable.LearningRates(network(0), initial=rate, steps=20))
    for rate in (0.3, 0.5, 0.7, 1.0, 1.4, 2.0)
}
best = min(single, key=single.get)
print(f"test loss after 20 steps from new starts, rate {best}:  {single[best]:.3f}")
print(f"test loss after 20 steps from new starts, learned: {test_losses(rates):.3f}")
for name, rate in rates.rates.items():
    print(f"rate of {name:9s} {rate.item():.2f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.plot(losses)
left.set_xlabel("outer step")
left.set_ylabel("validation loss after 20 steps (nats)")
left.set_title("A fresh network each time")
for name, values, style in zip(rates.rates, history.T, ("-", "--", "-.", ":")):
    right.semilogy(values, style, label=name)
right.set_xlabel("outer step")
right.set_ylabel("learning rate (no unit)")
right.set_title("Rate of each tensor")
right.legend()
plt.show()
