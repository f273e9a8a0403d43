"""Time to the first answer: importing the package, and the first calls of a process beside later ones.

Each row is measured in processes of its own, medians of five (``--rounds``), in turn with those of the other rows. The package has its bytecode, as
an installed one has; with ``--no-bytecode`` each process compiles its sources.

- import: ``import bilevel`` behind ``import torch``.
- first: the first call with its gradient, less the second.
- later: the longest of all calls but the first.

What the last rows do imports torch's compiler or sympy in torch's own code, and no library can spare it: ``torch.func.grad`` around a layer, a
cotangent that the caller hands to ``backward``, and ``torch.optim``. So they stand beside the same without a layer.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import bilevel

MOST_IMPORT, MOST_FIRST, MOST_LATER = 0.25, 0.3, 0.3
CALLS = 12

BEGIN = """
import json, sys, time
import torch
torch.set_num_threads(1)
begin = time.{clock}()
import bilevel
imported = time.{clock}() - begin
start, data = torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])

def theta():
    return data.clone().requires_grad_()

def objective(x, a):
    return ((x - a) ** 2).sum() + (x**4).sum()

class Problem(bilevel.BilevelProblem):
    def inner_objective(self, inner, outer, data):
        return objective(inner, outer)

    def outer_objective(self, inner, outer, data):
        return ((inner - data) ** 2).sum()
"""
END = """
times = []
for _ in range({calls}):
    begin = time.{clock}()
    call()
    times.append(time.{clock}() - begin)
print(json.dumps([imported, times]))
"""

# What is made before the first call, and the call.
ROWS = {
    "argmin": ("layer = bilevel.argmin(objective)", "layer(start, theta()).sum().backward()"),
    "argmin, L-BFGS and CG": (
        "layer = bilevel.argmin(objective, solver=bilevel.LBFGS(), linear_solver=bilevel.CG())", "layer(start, theta()).sum().backward()",
    ),
    "argmin, a batch under vmap": (
        "layer = torch.vmap(bilevel.argmin(objective)); many = start.expand(8, 3)",
        "layer(many, data.expand(8, 3).clone().requires_grad_()).sum().backward()",
    ),
    "argmin, twice differentiated": (
        "layer = bilevel.argmin(objective)",
        "a = theta(); torch.autograd.grad(layer(start, a).sum(), a, create_graph=True)[0].square().sum().backward()",
    ),
    "root": ("layer = bilevel.root(lambda x, a: x**3 + x - a)", "layer(start, theta()).sum().backward()"),
    "fixed_point": ("layer = bilevel.fixed_point(lambda x, a: x.cos() * a / 4)", "layer(start, theta()).sum().backward()"),
    "linear_solve": ("layer = bilevel.linear_solve(lambda x, a: a * x)", "layer(data, theta()).sum().backward()"),
    "BilevelProblem.hypergradient": ("problem = Problem()", "problem.hypergradient(data, data + 1, init=start)"),
    "BilevelProblem, called": ("problem = Problem()", "problem(theta(), data + 1, init=start).backward()"),
    "IMAML": (
        "model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))\n"
        "learner = bilevel.IMAML(model, torch.nn.functional.mse_loss, lam=2.0, on_failure='ignore')\n"
        "task = tuple(torch.randn(4, 5, 1) for _ in range(4))",
        "learner(task).backward()",
    ),
    "ScipyMinimize": ("layer = bilevel.argmin(objective, solver=bilevel.ScipyMinimize('BFGS'))", "layer(start, theta()).sum().backward()"),
}  # fmt: skip
TORCH_S = {
    "torch.func.grad of argmin": ("layer = bilevel.argmin(objective)", "torch.func.grad(lambda a: layer(start, a).sum())(data)"),
    "torch.func.grad of a sum": ("", "torch.func.grad(lambda a: a.sum())(data)"),
    "argmin, backward(cotangent)": ("layer = bilevel.argmin(objective)", "layer(start, theta()).backward(data)"),
    "a square, backward(cotangent)": ("", "theta().square().backward(data)"),
    "argmin, TorchOptimizer(Adam)": (
        "layer = bilevel.argmin(objective, solver=bilevel.TorchOptimizer(torch.optim.Adam, lr=0.1, max_steps=300), on_failure='ignore')",
        "layer(start, theta()).sum().backward()",
    ),
    "torch.optim.Adam alone": ("", "torch.optim.Adam([theta()], lr=0.1)"),
}  # fmt: skip


def measured(made: str, call: str, folder: str, clock: str) -> tuple[float, list[float]]:
    """Return the seconds of the import and of each call, in a new process that finds the package in ``folder``."""
    code = "\n".join(
        [
            BEGIN.replace("{clock}", clock),
            made,
            "def call():",
            *(f"    {line}" for line in call.splitlines()),
            END.format(calls=CALLS, clock=clock),
        ]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": folder}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    imported, times = json.loads(done.stdout.splitlines()[-1])
    return imported, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-bytecode", action="store_true")
    parser.add_argument(
        "--cpu", action="store_true", help="count the process's own seconds, on a machine that others use"
    )
    options = parser.parse_args()
    clock = "process_time" if options.cpu else "perf_counter"
    rows = {**ROWS, **TORCH_S}
    found: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in rows}
    with tempfile.TemporaryDirectory() as folder:
        package = Path(bilevel.__file__).parent
        shutil.copytree(package, Path(folder, package.name), ignore=shutil.ignore_patterns("__pycache__"))
        if not options.no_bytecode:
            compileall.compile_dir(folder, quiet=1)
        measured("", "pass", folder, clock)  # which brings torch's files into memory
        for _ in range(options.rounds):
            for name, (made, call) in rows.items():
                found[name].append(measured(made, call, folder, clock))
    every = [imported for name in rows for imported, _ in found[name]]
    print(
        f"import bilevel, beyond torch: {statistics.median(every):.3f} s, at most {MOST_IMPORT} is wanted ({len(every)} processes)\n"
    )
    heading = "CPU seconds, medians" if options.cpu else "seconds, medians"
    print(f"{heading:36s} {'first call':>10s} {'second':>8s} {'first − second':>15s} {'longest later':>14s}")
    missed = statistics.median(every) > MOST_IMPORT
    for name in rows:
        runs = [times for _, times in found[name]]
        first, second = (statistics.median(times[place] for times in runs) for place in (0, 1))
        beyond = statistics.median(times[0] - times[1] for times in runs)
        later = statistics.median(max(times[1:]) for times in runs)
        over = name in ROWS and (beyond > MOST_FIRST or later > MOST_LATER)
        missed |= over
        print(f"{name:36s} {first:10.4f} {second:8.4f} {beyond:15.4f} {later:14.4f}{'  over' if over else ''}")
    print(
        f"\nfirst − second: at most {MOST_FIRST} is wanted; later calls: at most {MOST_LATER}; the last {len(TORCH_S)} rows are torch's own imports."
    )
    raise SystemExit(int(missed))


if __name__ == "__main__":
    main()
