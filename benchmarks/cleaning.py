"""Data cleaning beside its alternatives: half of the labels of scikit-learn's digits, or of Omniglot's characters, wrong, several seeds.

Rows: training on the labels as given, on the trusted examples alone, on what learned weights keep, on what small-loss selection and confident
learning (where ``cleanlab`` is installed) keep, and on the true labels. The trusted examples are part of all of them. Small-loss selection is
told how many labels are wrong. Test accuracies, precision and recall are means with 95 % intervals of Student's t over the seeds.

``--model`` is ``linear``, ``mlp`` or ``conv``. ``--omniglot PATH`` takes twenty characters of that zip file or folder; pass ``--training 260
--trusted 60`` with it.
``--imbalance`` is class imbalance of 1 to 100 in place of wrong labels.
"""

from __future__ import annotations

import argparse
import math
from functools import partial

import torch
from scipy.stats import t as student
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel
from bilevel import learnable, stochastic
from bilevel.cleaning.data import DIGITS, LabelledData, load
from bilevel.cleaning.experiment import run_cleaning
from bilevel.cleaning.models import convolutional
from bilevel.cleaning.noise import Noise
from bilevel.cleaning.outcome import CleanRunSettings
from bilevel.meta.omniglot import load_omniglot

CHARACTERS, PIXELS = 20, 14


def interval(numbers: list[float], unit: float = 100.0) -> str:
    """Return "mean ± half-width" in percent."""
    values = unit * torch.tensor([n for n in numbers if not math.isnan(n)], dtype=torch.float64)
    if len(values) < 2:
        return f"{values.mean():.1f}" if len(values) else ""
    half = student.ppf(0.975, len(values) - 1) * values.std() / len(values) ** 0.5
    return f"{values.mean():.1f} ± {half:.1f}"


def table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def omniglot(path: str) -> LabelledData:
    """Twenty characters, evenly spaced over the alphabets, with twenty drawings each."""
    images = load_omniglot(path, size=PIXELS)
    chosen = torch.arange(CHARACTERS) * (len(images.names) // CHARACTERS)
    rows = torch.isin(images.labels, chosen)
    labels = torch.searchsorted(chosen, images.labels[rows])
    names = tuple(images.names[number] for number in chosen.tolist())
    numbers = tuple(map(str, range(len(labels))))
    cells = tuple((number, names[label]) for number, label in zip(numbers, labels.tolist(), strict=True))
    inputs = images.images[rows][:, None].float() / 255
    return LabelledData("omniglot", inputs, labels, names, numbers, ("image", "label"), cells, 1)


def narrow(shape: tuple[int, ...], classes: int) -> nn.Module:
    """A convolutional classifier with 6 and 12 filters, small enough for five runs of one core."""
    return convolutional(shape[0], shape[1], classes, width=6)


def cleaning(args: argparse.Namespace) -> None:
    data = load(DIGITS) if args.omniglot is None else omniglot(args.omniglot)
    settings = CleanRunSettings(
        corrupt=args.corrupt,
        noise=Noise.UNIFORM,
        seeds=args.seeds,
        steps=args.steps,
        training_steps=args.training_steps,
        training_size=args.training,
        trusted_size=args.trusted,
    )
    outcome = run_cleaning(data, settings, model="cleaning:narrow" if args.model == "conv" else args.model)
    first = outcome.runs[0]
    print(
        f"{data.name}, {args.model}: {len(first.given)} training examples, {len(first.split.test)} test, {args.seeds} seeds"
    )
    rows: list[tuple[str, ...]] = [("trained on", "test accuracy (%)", "precision (%)", "recall (%)", "seconds")]
    for place, choice in enumerate(first.choices):
        all_runs = [run.choices[place] for run in outcome.runs]
        numbers = [interval([getattr(c, name) for c in all_runs]) for name in ("accuracy", "precision", "recall")]
        rows.append((choice.name, *numbers, f"{sum(c.seconds for c in all_runs) / len(all_runs):.1f}"))
    table(rows)
    for note in outcome.notes:
        print(note)


def imbalance(args: argparse.Namespace) -> None:
    """Digit 8 against the others: 8 to 800 in training, 20 and 20 held out."""
    data = load(DIGITS)
    x, y = data.inputs.reshape(len(data.labels), -1).float(), (data.labels == 8).long()
    x = x / x.max()
    found: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        rare, common = order[y[order] == 1], order[y[order] == 0]
        train, held = torch.cat([rare[:8], common[:800]]), torch.cat([rare[8:28], common[800:820]])
        both = torch.cat([train, held])

        def made(seed: int = seed) -> nn.Module:
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))

        def balanced(rows: torch.Tensor) -> torch.Tensor:
            return (len(rows) / (2 * torch.bincount(y[rows])))[y[rows]]

        def trained(rows: torch.Tensor, weights: torch.Tensor) -> nn.Module:
            model = made()
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            for _ in range(args.steps):
                optimizer.zero_grad()
                losses = cross_entropy(model(x[rows]), y[rows], reduction="none")
                ((weights * losses).mean() + 0.5e-3 * sum((p**2).sum() for p in model.parameters())).backward()
                optimizer.step()
            return model

        model, weights = made(), learnable.ExampleWeights(len(train), weight_decay=1e-3)
        method = stochastic.ImplicitStep(
            weights.objectives,
            model,
            weights,
            inner_steps=1,
            linear_solver=bilevel.CG(max_steps=5),
            hessian=bilevel.GaussNewtonHessian(),
            inner_optimizer=partial(torch.optim.Adam, lr=1e-2),
            outer_optimizer=partial(torch.optim.Adam, lr=0.1),
        )
        for _ in range(args.steps):
            method.step((x[train], y[train], torch.arange(len(train))), (x[held], y[held]))
        models = {
            "training set": trained(train, torch.ones(len(train))),
            "training set, inverse frequency": trained(train, balanced(train)),
            "held-out set alone": trained(held, torch.ones(len(held))),
            "learned weights": model,
            "both sets, inverse frequency": trained(both, balanced(both)),
        }
        for name, each in models.items():
            with torch.no_grad():
                recalls = [
                    (each(x[rows]).argmax(1) == label).double().mean()
                    for rows, label in ((rare[28:], 1), (common[820:], 0))
                ]
            found.setdefault(name, []).append(float(sum(recalls) / 2))
    print(f"digit 8 against the others, 8 to 800 in training, 40 held out, {args.seeds} seeds")
    table([("trained on", "mean of both recalls (%)"), *((name, interval(shares)) for name, shares in found.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mlp", choices=("linear", "mlp", "conv"))
    parser.add_argument("--omniglot", metavar="PATH", help="images_background.zip, or the folder that it unpacks to")
    parser.add_argument("--corrupt", type=float, default=0.5)
    parser.add_argument("--training", type=int, default=400)
    parser.add_argument("--trusted", type=int, default=100)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--training-steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--imbalance", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    (imbalance if args.imbalance else cleaning)(args)


if __name__ == "__main__":
    main()
