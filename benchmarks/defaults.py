"""Is the library right with nothing chosen? At least 20,000 random problems, solved and differentiated at the default settings.

Three quarters are regular: the solution is chosen first and the problem drawn around it, the condition number after scaling of the
unknowns is at most 1e8 (float32: 1e4), and the search begins between 1e-6 and 1e6 of the unknowns' scale away. In a third of them each
unknown has a scale of its own and the objective has another, all between 1e-6 and 1e6. The others have no solution, a continuum, or a
singular one, and have to be named. Most are solved in batches under ``vmap``, a batch's row counting as one problem; the rest one by one.

x is judged per unknown, in its own scale; the gradient of a random linear outcome against the implicit function theorem in float64.
References are in ``default_references.py`` and import nothing of the library.

``--parts FILE`` appends what every twenty calls gave to a file of JSON lines, and skips what the file has: a run that was stopped goes on, and
runs of other seeds and families add up. The tables are then those of all that the file holds, and ``--rst`` prints that of the docs.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from default_problems import REGULAR, Family, Source
from default_references import implicit_gradient, linearized, newton, plain, polished, residual
from default_singular import SINGULAR

import bilevel

Tensor = torch.Tensor
DTYPES = {"float64": torch.float64, "float32": torch.float32}
DISTANCES = (1e-6, 1e-3, 1.0, 1e3, 1e6)
CONDITION = {torch.float64: 8.0, torch.float32: 4.0}  # log10 of the largest condition number
ACCURACY = {torch.float64: 1e-5, torch.float32: 2e-3}  # of x; of a gradient ten times that
BATCH = (8, 16)
PLAIN_STEPS = 20_000
PART = 20  # calls
FAMILIES = {family.name: family for family in (*REGULAR, *SINGULAR)}
REGULAR_NAMES = frozenset(family.name for family in REGULAR)


@dataclass(frozen=True)
class Draw:
    """One call of a layer: a batch of K problems, or a single one.

    Everything is float64 and has passed through ``dtype``, so that a reference solves the very numbers that the layer is given.
    """

    family: Family
    dtype: torch.dtype
    distance: float
    batched: bool
    start: Tensor  # (K, n), in units of z
    theta: Tensor
    data: tuple[Tensor, ...]
    scale: Tensor  # (K, n)
    level: Tensor  # (K,), a factor of the objective or residual
    weights: Tensor  # (K, n), of the outcome weights·z
    solution: Tensor  # (K, n), NaN where there is none

    @property
    def args(self) -> tuple[Tensor, ...]:
        return (self.theta, *self.data)


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).double()


def draw(family: Family, seed: int, index: int, only: str | None) -> Draw:
    """Draw the call number ``index`` of a family; every combination of dtype and distance comes in turn."""
    source = Source(zlib.crc32(f"{seed}/{family.name}/{index}".encode()))
    place = index + zlib.crc32(family.name.encode()) % 30  # so that a short run begins with other pairs in each family
    names = list(DTYPES) if only is None else [only]
    dtype = DTYPES[names[place % len(names)]]
    distances = [d for d in DISTANCES if d <= family.farthest] or [family.farthest]
    distance = distances[place // len(names) % len(distances)]
    batched = is_batched(index)
    k = source.integer(*BATCH) if batched else 1
    n = source.integer(*family.sizes)
    log_condition = float(source.uniform(0, CONDITION[dtype]))
    theta, data, solution = family.draw(source, k, n, log_condition)
    theta, data = rounded(theta, dtype), tuple(rounded(d, dtype) for d in data)
    scale, level = torch.ones(k, n, dtype=torch.float64), torch.ones(k, dtype=torch.float64)
    if source.integer(0, 2) == 0 and distance > 0:
        scale = rounded(10 ** source.uniform(-6, 6, k, n), dtype)
        level = rounded(10 ** source.uniform(-6, 6, k), dtype)
    weights = rounded(source.normal(k, n), dtype)
    direction = source.normal(k, n)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    about = torch.nan_to_num(solution, nan=0.0)
    sign = source.sign(k, 1)
    for _ in range(40):
        if family.positive:
            start = about * (1 + distance) ** (sign * direction.abs())
        else:
            start = about + distance * direction if family.farthest else torch.zeros_like(about)
        start = rounded(rounded(start * scale, dtype) / scale, torch.float64)
        fine = finite(family, start, scale, level, theta, data, dtype)
        if bool(fine.all()):
            break
        distance_row = torch.where(fine, 1.0, 0.3)[:, None]
        direction = direction * (distance_row**0.3 if family.positive else distance_row)
    return Draw(family, dtype, distance, batched, start, theta, data, scale, level, weights, solution)


def finite(
    family: Family,
    start: Tensor,
    scale: Tensor,
    level: Tensor,
    theta: Tensor,
    data: tuple[Tensor, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Return, per problem, whether objective and residual are finite at the start in ``dtype``, the squares of these too, and no slope underflows."""
    z, level = start.to(dtype), level.to(dtype)
    args = (theta.to(dtype), *(d.to(dtype) for d in data))
    value = residual(family.kind, family.function, z, *args).detach()
    if family.kind == "fixed_point":
        value = value * scale.to(dtype)
    else:
        value = value * level[:, None] / (scale.to(dtype) if family.kind == "argmin" else 1.0)
    fine = torch.isfinite((value * value).sum(-1))
    # Of a slope that the dtype cannot represent nothing is known there.
    exact = residual(family.kind, family.function, start, theta, *data).detach()
    fine &= ((value.abs() >= torch.finfo(dtype).tiny) | (exact == 0)).all(-1)
    if family.kind == "argmin":
        fine &= torch.isfinite(level * family.function(z, *args))
    return fine


def is_batched(index: int) -> bool:
    """Every eighth problem or so is solved by itself: two calls of three."""
    return index % 3 == 0


def scaled(family: Family) -> Any:
    """Return the family's function of x = scale · z, as a user would write it: of (x, θ, scale, level, *data)."""
    function = family.function

    def objective(x: Tensor, theta: Tensor, scale: Tensor, level: Tensor, *data: Tensor) -> Tensor:
        value = function(x / scale, theta, *data)
        return scale * value if family.kind == "fixed_point" else level * value

    return objective


def layer_of(family: Family) -> bilevel.Layer:
    """Return the layer, nothing chosen but that failures are reported and not raised."""
    make = {"argmin": bilevel.argmin, "root": bilevel.root, "fixed_point": bilevel.fixed_point}[family.kind]
    return make(scaled(family), on_failure="ignore")


@dataclass
class Answer:
    """What the library answered to a call, per problem; ``error`` if it raised."""

    z: Tensor
    gradient: Tensor
    forward: list[str]
    backward: list[str]
    success: Tensor
    error: str = ""
    raw: bool = False


def ask(layer: bilevel.Layer, given: Draw) -> Answer:
    k, n = given.start.shape
    cast = lambda tensor: tensor.to(given.dtype)
    scale, level, theta = cast(given.scale), cast(given.level), cast(given.theta).clone().requires_grad_()
    init, data = cast(given.start * given.scale), tuple(cast(d) for d in given.data)
    nothing = torch.full((k, n), math.nan, dtype=torch.float64)
    no_slope = torch.full_like(given.theta, math.nan)
    try:
        with bilevel.record() as reports, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if given.batched:
                x = torch.func.vmap(layer.solve)(init, theta, scale, level, *data).value
            else:
                x = layer.solve(init[0], theta[0], scale[0], level[0], *(d[0] for d in data)).value[None]
            (slope,) = torch.autograd.grad((x / scale * cast(given.weights)).sum(), theta)
    except bilevel.BilevelError as error:
        return Answer(nothing, no_slope, ["error"] * k, ["error"] * k, torch.zeros(k, dtype=torch.bool), f"{error}")
    except Exception as error:  # a raw error, which is what is looked for
        said = f"{type(error).__name__}: {error}"
        return Answer(nothing, no_slope, ["raw"] * k, ["raw"] * k, torch.zeros(k, dtype=torch.bool), said, raw=True)
    success, named = torch.ones(k, dtype=torch.bool), {}
    for direction in (bilevel.Pass.FORWARD, bilevel.Pass.BACKWARD):
        report = [r for r in reports if r.direction is direction][-1]
        codes = report.status_code.reshape(-1).expand(k)
        named[direction] = [bilevel.Status(code).name for code in codes.tolist()]
        success &= report.success.reshape(-1).expand(k)
    z = x.detach().double() / given.scale
    return Answer(z, slope.double(), named[bilevel.Pass.FORWARD], named[bilevel.Pass.BACKWARD], success)


def truth(given: Draw, near: Tensor) -> tuple[Tensor, Tensor]:
    """Return the right z (K, n) and whether it is verified: of a family with several solutions the one beside ``near``."""
    begun = given.solution
    if given.family.several:
        begun = torch.where(torch.isfinite(near).all(-1, keepdim=True), near, given.solution)
    return polished(given.family.kind, given.family.function, begun, *given.args)


def condition(given: Draw, z: Tensor) -> Tensor:
    _, jacobian = linearized(given.family.kind, given.family.function, z, *given.args)
    values = torch.linalg.svdvals(torch.nan_to_num(jacobian))
    return values[:, 0] / values[:, -1]


def attainable(given: Draw, z: Tensor) -> Tensor:
    """Return the error (K,) that one rounding of z and of the arithmetic in ``dtype`` brings: |J⁻¹R| at the rounded solution."""
    kind, function = given.family.kind, given.family.function
    _, jacobian = linearized(kind, function, z, *given.args)
    near = residual(kind, function, z.to(given.dtype), *(a.to(given.dtype) for a in given.args)).detach().double()
    step = torch.linalg.solve_ex(jacobian, near.unsqueeze(-1))[0].squeeze(-1)
    return torch.nan_to_num(step.abs().amax(-1), nan=math.inf)


@dataclass
class Tally:
    """Counts by (family, dtype, distance), and the problems that went wrong."""

    counts: dict[tuple[str, str, float], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    statuses: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    failures: list[dict[str, Any]] = field(default_factory=list)

    def to_line(self, key: list[Any]) -> str:
        """Return the tally as a line of JSON that begins with ``key``."""
        counts = [[*of, dict(counter)] for of, counter in self.counts.items()]
        statuses = {name: dict(counter) for name, counter in self.statuses.items()}
        return json.dumps([key, counts, statuses, dict(self.seconds), self.failures])

    @classmethod
    def of_line(cls, line: str) -> tuple[str, Tally]:
        """Return the key of a line, as JSON, and its tally."""
        key, counts, statuses, seconds, failures = json.loads(line)
        tally = cls(seconds=defaultdict(float, seconds), failures=failures)
        for *of, counter in counts:
            tally.counts[of[0], of[1], of[2]].update(counter)
        for name, counter in statuses.items():
            tally.statuses[name].update(counter)
        return json.dumps(key), tally

    def merge(self, other: Tally) -> None:
        for key, counter in other.counts.items():
            self.counts[key].update(counter)
        for name, counter in other.statuses.items():
            self.statuses[name].update(counter)
        for name, seconds in other.seconds.items():
            self.seconds[name] += seconds
        self.failures.extend(other.failures)


def judge_regular(given: Draw, answer: Answer, note: Any) -> None:
    family, limit = given.family, ACCURACY[given.dtype]
    kind, function = family.kind, family.function
    intended, verified = polished(kind, function, given.solution, *given.args)
    fit = verified & (condition(given, intended) <= 1.01 * 10 ** CONDITION[given.dtype])
    fit &= attainable(given, intended) <= limit / 4
    right, there = truth(given, answer.z) if family.several else (intended, verified)
    error = ((answer.z - right).abs()).amax(-1)
    wrong_x = answer.success & ~(there & (error <= limit))
    slope, size = implicit_gradient(
        kind, function, torch.where(there[:, None], right, intended), given.theta, *given.data, weights=given.weights
    )
    size = torch.maximum(slope.norm(dim=-1), 0.1 * size)
    off = (answer.gradient - slope).norm(dim=-1) / size
    wrong_slope = answer.success & ~wrong_x & ~((off <= 10 * limit) | (size == 0))
    failed = ~answer.success
    reached = torch.zeros_like(failed)
    if bool((failed & fit).any()):
        picked = failed & fit
        start, args = given.start[picked], tuple(a[picked] for a in given.args)
        if kind == "fixed_point":
            reached[picked] = plain(function, start, *args, steps=PLAIN_STEPS)[1]
        else:
            reached[picked] = newton(kind, function, start, *args)[1]
    for row in range(len(fit)):
        if not bool(fit[row]):
            note(row, None)
            continue
        found = []
        if bool(answer.success[row]):
            found.append("success")
            found += ["wrong x"] * bool(wrong_x[row]) + ["wrong gradient"] * bool(wrong_slope[row])
        else:
            found += ["failed", "lost" if bool(reached[row]) else "out of reach"]
        note(row, found, error=float(error[row]), gradient_error=float(off[row]), right=right[row].tolist())


def judge_singular(given: Draw, answer: Answer, note: Any) -> None:
    """A success is right where it is the known answer, or of minimum norm, says so, and solves the equations."""
    family, limit = given.family, ACCURACY[given.dtype]
    kind, function = family.kind, family.function
    known = torch.isfinite(given.solution).all(-1)
    # From a symmetric start either sign is right, and Newton's method is fooled by torch's slope at a kink.
    right = given.solution * torch.where(answer.z < 0, -1.0, 1.0) if family.several else given.solution
    error = (answer.z - right).abs().amax(-1)
    # Where x* = θ the gradient is the weights; beside a symmetric start the problem is regular.
    slope = given.weights
    if family.several:
        slope = implicit_gradient(kind, function, right, given.theta, *given.data, weights=given.weights)[0]
    explain_misuse = known & (error <= limit)
    if slope.shape == answer.gradient.shape:
        explain_misuse &= (answer.gradient - slope).norm(dim=-1) <= 10 * limit * slope.norm(dim=-1)
    left = residual(kind, function, torch.nan_to_num(answer.z), *given.args).detach().norm(dim=-1)
    size = 1 + answer.z.norm(dim=-1) + given.theta.norm(dim=-1)
    for row in range(len(known)):
        found = ["named"]
        if bool(answer.success[row]):
            said = "MINIMUM_NORM" in (answer.forward[row], answer.backward[row])
            solved = bool(left[row] <= limit * size[row])
            found = ["right"] if bool(explain_misuse[row]) or (said and solved) else ["silent"]
        note(row, found, error=float(error[row]), right=right[row].tolist())


def run_calls(work: Work) -> Tally:
    """Solve the calls of one family that are numbered; what is solved hangs on their numbers alone."""
    name, seed, indices, only = work
    command = f"python benchmarks/defaults.py --seed {seed} --family '{name}'" + (f" --dtype {only}" if only else "")
    torch.set_num_threads(1)
    family, tally = FAMILIES[name], Tally()
    layer = layer_of(family)
    regular = name in REGULAR_NAMES
    for index in indices:
        given = draw(family, seed, index, only)
        begin = time.perf_counter()
        answer = ask(layer, given)
        tally.seconds[name] += time.perf_counter() - begin
        dtype = str(given.dtype).removeprefix("torch.")
        counter = tally.counts[name, dtype, given.distance]

        def note(row: int, found: list[str] | None, **figures: Any) -> None:
            if found is None:
                counter["not regular"] += 1
                return
            counter["problems"] += 1
            counter["raw"] += answer.raw
            counter.update(found)
            if not bool(answer.success[row]):
                forward, backward = answer.forward[row], answer.backward[row]
                ended = backward if bilevel.Status.__members__.get(forward, bilevel.Status.RUNNING).success else forward
                tally.statuses[name][ended] += 1
            if answer.raw or {"wrong x", "wrong gradient", "lost", "silent"} & set(found):
                record = {
                    "command": f"{command} --call {index}", "row": row, "family": name, "seed": seed, "call": index,
                    "dtype": dtype, "distance": given.distance, "batch": len(given.start) if given.batched else 0,
                    "found": found, "forward": answer.forward[row], "backward": answer.backward[row],
                    "start": given.start[row].tolist(), "scale": given.scale[row].tolist(),
                    "got": answer.z[row].tolist(), "raised": answer.error, **figures,
                }  # fmt: skip
                tally.failures.append(record)

        (judge_regular if regular else judge_singular)(given, answer, note)
    return tally


def calls(count: int, families: list[Family]) -> Iterable[tuple[str, list[int]]]:
    """Return, per family, the numbers of its calls: a singular family has a third of a regular one's problems."""
    mean = (sum(BATCH) / 2 + 2) / 3  # problems in a call, see ``is_batched``
    shares = [1.0 if family.name in REGULAR_NAMES else 1 / 3 for family in families]
    for family, share in zip(families, shares, strict=True):
        yield family.name, list(range(math.ceil(1.05 * count * share / sum(shares) / mean)))


Work = tuple[str, int, list[int], str | None]


def run_parts(work: list[Work], file: Path) -> Tally:
    """Solve what ``file`` does not hold yet, family by family in turn, and return the tally of all that it holds then."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    parts = dict(Tally.of_line(line) for line in lines)
    chunks = [
        (start, (name, seed, list(range(start, start + PART)), dtype))
        for name, seed, numbers, dtype in work
        for start in range(0, len(numbers), PART)
    ]
    for _, chunk in sorted(chunks, key=lambda pair: pair[0]):
        name, seed, numbers, dtype = chunk
        key = [name, seed, numbers[0], dtype]
        if json.dumps(key) in parts:
            continue
        parts[json.dumps(key)] = part = run_calls(chunk)
        with file.open("a", encoding="utf-8") as out:
            out.write(part.to_line(key) + "\n")
    tally = Tally()
    for part in parts.values():
        tally.merge(part)
    return tally


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def table(head: list[str], rows: list[list[Any]]) -> None:
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print()


def row_of(label: list[str], counter: Counter[str]) -> list[Any]:
    reach = counter["success"] + counter["lost"]
    solved = counter["success"] - counter["wrong x"] - counter["wrong gradient"]
    counts = [
        counter[name] for name in ("problems", "success", "wrong x", "wrong gradient", "lost", "out of reach", "raw")
    ]
    return [*label, *counts, percent(solved, reach)]


def summary(tally: Tally) -> None:
    """Print the tables in Markdown."""
    head = [
        "problems",
        "success",
        "wrong x",
        "wrong gradient",
        "lost",
        "out of reach",
        "raw errors",
        "solved of those within reach",
    ]
    regular, singular = (
        {k: c for k, c in tally.counts.items() if (k[0] in REGULAR_NAMES) is flag} for flag in (True, False)
    )

    def grouped(counts: dict[Any, Counter[str]], key: Any) -> dict[Any, Counter[str]]:
        groups: dict[Any, Counter[str]] = defaultdict(Counter)
        for of, counter in counts.items():
            groups[key(of)].update(counter)
        return groups

    if regular:
        print("\n### Regular problems\n")
        rows = [row_of([*key], c) for key, c in grouped(regular, lambda of: of[:2]).items()]
        total = sum(regular.values(), Counter())
        table(["family", "dtype", *head], [*rows, row_of(["all", ""], total)])
        by_distance = sorted(grouped(regular, lambda of: (of[2], of[1])).items())
        table(["distance of the start", "dtype", *head], [row_of([f"{d:g}", name], c) for (d, name), c in by_distance])
        print(f"Dropped as not regular: {total['not regular']}.")
    if singular:
        print("\n### Singular problems\n")
        groups = grouped(singular, lambda of: of[:2])
        cells = [
            [*key, *(c[name] for name in ("problems", "named", "right", "silent", "raw"))] for key, c in groups.items()
        ]
        table(["family", "dtype", "problems", "named", "right", "silently wrong", "raw errors"], cells)
    print("### Statuses of what failed, and seconds\n")
    names = dict.fromkeys(key[0] for key in tally.counts)
    said = {name: ", ".join(f"{s} {c}" for s, c in tally.statuses[name].most_common()) for name in names}
    table(["family", "ended", "seconds"], [[name, said[name], f"{tally.seconds[name]:.1f}"] for name in names])


def rst(tally: Tally) -> None:
    """Print the table of the docs, in reStructuredText, and the figures of the text below it."""
    regular = {key: counter for key, counter in tally.counts.items() if key[0] in REGULAR_NAMES}
    total = sum(regular.values(), Counter())
    print(
        f".. list-table:: Regular problems: {total['problems']:,}, of which {total['out of reach']} are out of reach of the references too"
    )
    print("   :header-rows: 1\n")
    cells = ["distance of the start"]
    for dtype in DTYPES:
        cells += [f"{dtype}: problems", "wrong", "lost", "solved"]
    rows = [cells]
    for distance in DISTANCES:
        cells = [
            f"{distance:g}".replace("e-0", "e-").replace("e+0", "e").replace("0.001", "1e-3").replace("1000", "1e3")
        ]
        for dtype in DTYPES:
            counter = sum((c for key, c in regular.items() if key[1:] == (dtype, distance)), Counter())
            wrong = counter["wrong x"] + counter["wrong gradient"]
            share = percent(counter["success"] - wrong, counter["success"] + counter["lost"])
            cells += [str(counter["problems"]), str(wrong), str(counter["lost"]), share]
        rows.append(cells)
    for cells in rows:
        print("\n".join(f"   {'* -' if not place else '  -'} {cell}" for place, cell in enumerate(cells)))
    singular = sum((c for key, c in tally.counts.items() if key[0] not in REGULAR_NAMES), Counter())
    solved = total["success"] - total["wrong x"] - total["wrong gradient"]
    print(f"\nWithin reach: {percent(solved, total['success'] + total['lost'])} solved, {total['lost']} lost.")
    print(
        f"Singular: {singular['problems']:,}, {singular['named']:,} named, {singular['right']} right, {singular['silent']} silent."
    )
    print(f"Raw errors: {total['raw'] + singular['raw']}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20_000, help="at least so many problems")
    parser.add_argument("--family", action="append", choices=sorted(FAMILIES), help="these families alone")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="this dtype alone")
    parser.add_argument("--call", type=int, help="this call of each family alone: the one that a failure names")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--parts", type=Path, help="go on with this file of JSON lines, one for twenty calls; one process"
    )
    parser.add_argument("--rst", action="store_true", help="print the table of the docs instead")
    parser.add_argument("--output", type=Path, help="a JSON file of all failures")
    options = parser.parse_args()
    families = [family for name, family in FAMILIES.items() if not options.family or name in options.family]
    work: list[Work] = [
        (name, options.seed, numbers, options.dtype) for name, numbers in calls(options.count, families)
    ]
    if options.call is not None:
        work = [(name, seed, [options.call], dtype) for name, seed, _, dtype in work]
    begin, tally = time.perf_counter(), Tally()
    if options.parts:
        tally = run_parts(work, options.parts)
    elif options.jobs > 1:
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            for part in pool.imap(run_calls, work, chunksize=1):
                tally.merge(part)
    else:
        for item in work:
            tally.merge(run_calls(item))
    problems = sum(counter["problems"] for counter in tally.counts.values())
    print(
        f"{problems} problems of seed {options.seed} in {time.perf_counter() - begin:.0f} s, {options.jobs} process(es)"
    )
    (rst if options.rst else summary)(tally)
    if options.output:
        options.output.write_text(json.dumps(tally.failures, indent=1), encoding="utf-8")
        print(f"{len(tally.failures)} failures are in {options.output}")


if __name__ == "__main__":
    main()
