"""
Weight decay of each parameter, learned while training
======================================================

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
# θ has a log-decay for each of the four parameters, two weights and two biases. The
# inner variable is the module. Each outer step makes five training steps and then moves
# the decays. With a rate of zero they stay fixed.
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
        inner_steps=5,
        inner_optimizer=functools.partial(torch.optim.Adam, lr=1e-2),
        outer_optimizer=functools.partial(torch.optim.Adam, lr=0.1 if learn else 0.0),
        linear_solver=bilevel.CG(max_steps=5),
    )
    batches = stochastic.Minibatches((x[train], labels), 50, seed=0)
    judged = stochastic.Minibatches((x[validation], y[validation]), 100, seed=1)
    losses, decays = [], []
    for _ in range(steps):
        method.step(batches, judged)
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
left.set_xlabel("outer step, of five training steps")
left.set_ylabel("validation loss (nats)")
left.set_title("Validation loss")
left.legend()
for name, values, style in zip(names, decays.T, ("-", "--", "-.", ":"), strict=True):
    right.semilogy(values, style, label=name)
right.set_xlabel("outer step, of five training steps")
right.set_ylabel("decay (no unit)")
right.set_title("Decays that are learned")
right.legend()
plt.show()
