"""
iMAML on sinusoids
==================

**What to see:** after meta-training, ten points are enough to learn a new sinusoid.
From the untrained initialisation they are not.
"""

import copy

import matplotlib.pyplot as plt
import torch

import bilevel
from bilevel.meta import SinusoidSampler, mlp

plt.style.use("tableau-colorblind10")

# %%
# A task is a sinusoid with its own amplitude and phase, known at ten points. The
# learner adapts all 25 tasks of a batch together.
torch.manual_seed(0)
learner = bilevel.IMAML(
    mlp(),
    torch.nn.functional.mse_loss,
    lam=1.0,
    solver=bilevel.GradientDescent(lr=0.02, max_steps=16),
    linear_solver=bilevel.CG(max_steps=5),
    on_failure="ignore",  # ReLU networks have tasks with negative curvature
)
untrained = copy.deepcopy(learner)
optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
sampler = SinusoidSampler(shots=10, queries=10, seed=0)
losses = []
for _ in range(300):
    loss = learner(sampler.sample(25))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

# %%
# Unseen tasks judge both initialisations.
unseen = SinusoidSampler(shots=10, queries=50, seed=1).sample(200)
support = unseen.support_x, unseen.support_y


def error(learner):
    adapted = learner.adapt(support)
    prediction = learner.predict(adapted, unseen.query_x)
    return ((prediction - unseen.query_y) ** 2).mean().item()


before, after = error(untrained), error(learner)
print(
    f"mean squared error on 200 unseen tasks: {before:.2f} untrained, "
    f"{after:.2f} trained"
)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
smooth = torch.tensor(losses).unfold(0, 20, 1).mean(1)
left.plot(range(20, 301), smooth)
left.set_xlabel("outer step")
left.set_ylabel("query loss, mean of 20 steps (no unit)")
left.set_title("Meta-training")

task = int((unseen.support_y.abs().amax((1, 2)) > 3).nonzero()[0])
line = torch.linspace(-5, 5, 200)[None, :, None]
place = unseen.query_x[task].squeeze(1).argsort()
truth = unseen.query_x[task][place], unseen.query_y[task][place]
right.plot(*truth, color="0.6", linewidth=4, label="sinusoid")
for name, model, style in (
    ("untrained", untrained, ":"),
    ("meta-trained", learner, "-"),
):
    adapted = model.adapt(
        (unseen.support_x[task : task + 1], unseen.support_y[task : task + 1])
    )
    right.plot(line[0], model.predict(adapted, line)[0].detach(), style, label=name)
right.plot(unseen.support_x[task], unseen.support_y[task], "ko", label="ten points")
right.set_xlabel("x (radians)")
right.set_ylabel("y (no unit)")
right.set_title("An unseen task after adaptation")
right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()
