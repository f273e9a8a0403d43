"""
Weight decay for each layer, learned while training
===================================================

**What to see:** with a small fixed decay the network learns wrong labels by heart,
and the validation loss rises. Decays that are learned in the same run bring it down
again.
"""

import functools

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel
from bilevel import stochastic

plt.style.use("tableau-colorblind10")

# %%
# 150 digits train, a fifth of them with a wrong label, so that the network overfits.
# 400 validate, 1,247 test.
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
train, validation, test = order[:150], order[150:550], order[550:]
labels, _ = bilevel.cleaning.corrupt(y[train], 0.2, seed=0)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


# %%
# θ has a log-decay for each of the four parameters. The inner variable is the module.
def training_loss(model, log_decays, data):
    inputs, targets = data
    squares = torch.stack([(p**2).sum() for p in model.parameters()])
    return cross_entropy(model(inputs), targets) + 0.5 * log_decays.exp() @ squares


def validation_loss(model, log_decays, data):
    inputs, targets = data
    return cross_entropy(model(inputs), targets)


def run(learn, steps=250):
    model = network()
    log_decays = torch.full((4,), -9.0)
    method = stochastic.ImplicitStep(
        (training_loss, validation_loss),
        model,
        log_decays,
        inner_optimizer=functools.partial(torch.optim.Adam, lr=1e-2),
        outer_optimizer=functools.partial(torch.optim.Adam, lr=0.1),
        linear_solver=bilevel.CG(max_steps=5),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batches = stochastic.Minibatches((x[train], labels), 50, seed=0)
    judged = stochastic.Minibatches((x[validation], y[validation]), 100, seed=1)
    losses, decays = [], []
    for _ in range(steps):
        if learn:
            method.step(batches, judged)
        else:
            optimizer.zero_grad()
            training_loss(model, log_decays, next(batches).data).backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(cross_entropy(model(x[validation]), y[validation]).item())
        decays.append(log_decays.detach().exp().clone())
    with torch.no_grad():
        right = (model(x[test]).argmax(1) == y[test]).double().mean().item()
    return losses, torch.stack(decays), right


fixed, _, fixed_accuracy = run(learn=False)
learned, decays, learned_accuracy = run(learn=True)
print(
    f"validation loss at the end: fixed decay {fixed[-1]:.3f}, "
    f"learned {learned[-1]:.3f}"
)
print(
    f"test accuracy:              fixed decay {fixed_accuracy:.1%}, "
    f"learned {learned_accuracy:.1%}"
)
names = [name for name, _ in network().named_parameters()]
for name, decay in zip(names, decays[-1].tolist(), strict=True):
    print(f"decay of {name:9s} {decay:.1e}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
left.plot(fixed, label="fixed decay")
left.plot(learned, label="learned decays")
left.set_xlabel("training step")
left.set_ylabel("validation loss (nats)")
left.set_title("Validation loss")
left.legend()
for name, values, style in zip(names, decays.T, ("-", "--", "-.", ":"), strict=True):
    right.semilogy(values, style, label=name)
right.set_xlabel("training step")
right.set_ylabel("decay (no unit)")
right.set_title("Decay of each parameter")
right.legend()
plt.show()
