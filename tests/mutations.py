"""Deliberate faults, one at a time: is each caught by a test? ``python -m tests.mutations`` (or ``make mutations``) tries them.

Each fault replaces a piece of text that occurs once in the package, in a copy of it, and runs the tests that are to catch it. What
no test catches is printed as SURVIVED, and the program ends with 1. ``--only WORD`` tries those whose name has the word in it.
"""

from __future__ import annotations

import argparse
import compileall
import concurrent.futures
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

# The processes that run the tests are forks of one that has imported what takes seconds to import.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["scipy.optimize", "scipy.linalg", "torch", "torch.func"])

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutation:
    """A fault.

    Parameters
    ----------
    name
        What is wrong.
    file
        In the package.
    old, new
        The text, which occurs once, and what stands in its place.
    tests
        Arguments for pytest that choose the tests which are to fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


GRADCHECK = ("tests/test_implicit.py", "-k", "test_gradcheck")
GRADGRADCHECK = ("tests/test_implicit.py", "-k", "test_gradgradcheck")
CONFORMANCE = "tests/linear/test_conformance.py"
MINIMUM_NORM = "tests/linear/test_minimum_norm.py"
GUARDS = "tests/test_guard_rails.py"
LINEAR = "tests/test_linear_solve.py"
IMAML = "tests/meta/test_imaml.py"
OUTER = "tests/test_outer.py"
TAPES = "tests/test_tapes.py"
ANDERSON = "tests/solvers/test_anderson.py"
STALE = "tests/test_stale_replays.py"
FORMULAS = "tests/learnable/test_formulas.py"


def matrix(*names: str, columns: str = "float64") -> tuple[str, ...]:
    """Choose rows of the matrix by words in their names."""
    return ("tests/transforms/test_matrix.py", "-k", f"({' or '.join(names)}) and {columns}")


def cells(row: str, *columns: str) -> tuple[str, ...]:
    """Choose cells of the matrix by the row's group and name, and the columns."""
    return tuple(f"tests/transforms/test_matrix.py::test_cell[{row}-{column}]" for column in columns)


MUTATIONS = (
    Mutation(
        "a small objective is judged by the number one", "quadratic_programs/_program.py",
        "return torch.where(size > 0, size, 1.0).clamp_max(1.0)", "return torch.ones_like(size)",
        ("tests/quadratic_programs/test_units.py",),
    ),
    Mutation(
        "the unit of the objective counts in a KKT matrix", "quadratic_programs/_kkt.py",
        "if bool(apart.any()):", "if False:", ("tests/quadratic_programs/test_units.py",),
    ),
    Mutation(
        "residuals of derivatives are compared in the user's units", "quadratic_programs/_call.py",
        "factor.in_units(right).norm(dim=-1), factor.in_units(left)", "right.norm(dim=-1), left",
        ("tests/quadratic_programs/test_units.py",),
    ),
    Mutation(
        "Clarabel is given the user's units", "quadratic_programs/_clarabel.py",
        "_MODERATE = 1e3", "_MODERATE = 1e300", ("tests/quadratic_programs/test_units.py",),
    ),
    Mutation(
        "constraints of small unknowns are weighed in another unit", "solvers/constrained/solve.py",
        "parts, rows * column.unsqueeze(-1))", "parts, rows)",
        ("tests/constraints/test_edges.py", "-k", "small_unknowns"),
    ),
    Mutation(
        "a claim of a solver is not checked on the answer's own scale", "solvers/constrained/solve.py",
        "& ~point.good & ~is_settled(program, answer)", "& ~point.good & False",
        ("tests/constraints/test_edges.py", "-k", "far_start or without_a_minimum"),
    ),
    Mutation(
        "no other multipliers are tried where there is no interior", "solvers/constrained/solve.py",
        "if bool((usable & ~point.good).any()) and _recoverable(program):", "if False:",
        ("tests/constraints/test_edges.py", "-k", "one_point"),
    ),
    Mutation(
        "tensors of a closure keep a solve in float32", "layers/constrained.py", "for promoted in (False, True):",
        "for promoted in (False,):", ("tests/constraints/test_edges.py", "-k", "float32_closures"),
    ),
    Mutation(
        "tiny rows of a quadratic program are not scaled", "quadratic_programs/quadratic_program.py",
        "backend = InUnits(settings.backend(arguments))", "backend = settings.backend(arguments)",
        ("tests/quadratic_programs/test_sparse.py", "-k", "any_unit"),
    ),
    Mutation(
        "unknowns of a quadratic program stay in the user's units", "quadratic_programs/_units.py",
        "x = torch.exp2(_columns(blocks, len(Q), n).round())", "x = torch.ones_like(root[:, 0])",
        ("tests/quadratic_programs/test_units.py", "-k", "own"),
    ),
    Mutation(
        "active sets of sparse programs go round in a circle", "quadratic_programs/_clarabel.py",
        "_FLIPS, _SINGLE_FLIPS = 2, 30", "_FLIPS, _SINGLE_FLIPS = 2, 0",
        ("tests/quadratic_programs/test_sparse.py", "-k", "circle"),
    ),
    Mutation(
        "a cone program's derivative is given across a kink", "cones/_call.py",
        "_SIDES, _BESIDE, _SAME = 4, 1e-7, 1e-6", "_SIDES, _BESIDE, _SAME = 4, 1e-7, 1e6",
        ("tests/cones/test_failures.py", "-k", "kink_is_named"),
    ),
    Mutation(
        "every process of a run writes to the logger", "loggers.py", "number % self.every == 0 and _is_first_process()",
        "number % self.every == 0", ("tests/test_loggers.py", "-k", "first_process"),
    ),
    Mutation(
        "MLflow begins a run of its own", "loggers.py", "if self._mlflow.active_run() is None:", "if False:",
        ("tests/test_loggers.py", "-k", "mlflow"),
    ),
    Mutation(
        "check_gradients accuses a constrained layer", "testing/gradients.py",
        "if subject.layer.structure is not None:", "if False:",
        ("tests/testing/test_gradients.py", "-k", "references_do_not_know"),
    ),
    Mutation(
        "Gauss–Newton's derivative in the place of the Hessian's", "layers/least_squares.py",
        "isinstance(hessian, GaussNewtonHessian) else LeastSquaresSystem", "True else LeastSquaresSystem",
        ("tests/test_least_squares.py", "-k", "biased_and_only_by_name"),
    ),
    Mutation(
        "a player at a maximum goes unnamed", "layers/equilibrium.py", "fault = player >= 0", "fault = player >= 99",
        ("tests/test_equilibrium.py", "-k", "maximum"),
    ),
    Mutation(
        "the derivative of a minimum-norm solution leaves out the null space", "layers/rectangular.py",
        "        if not deficient:\n", "        if not deficient or wide:\n",
        ("tests/test_rectangular.py", "-k", "golub"),
    ),
    Mutation(
        "an argument that changes the rank is not refused", "layers/rectangular.py",
        "return not any(_vanishes(pull, doubt) for pull in every)", "return False",
        ("tests/test_rectangular.py", "-k", "changes_the_rank"),
    ),
    Mutation(
        "a bracket without a sign change is bisected", "solvers/bracketing.py",
        "changes = f_low.sign() * f_high.sign() <= 0", "changes = f_low.sign() * f_high.sign() <= 1",
        ("tests/solvers/test_bracketing.py", "-k", "sign_change"),
    ),
    Mutation(
        "Nyström's approximation with twice the shift", "linear/nystrom.py",
        "weights / (weights + self.rho)", "weights / (weights + 2 * self.rho)",
        ("tests/linear/test_nystrom.py", "-k", "formula"),
    ),
    Mutation(
        "stochastic: a state has no kept preconditioner", "stochastic/implicit.py",
        '_STATE = ("_preconditioner_state",)', "_STATE = ()", ("tests/stochastic/test_engine.py", "-k", "kept"),
    ),
    Mutation(
        "stochastic: the Gauss-Newton matrix forgets the penalty", "stochastic/_gauss_newton.py",
        "if penalty is not None and penalty.requires_grad:", "if False:",
        ("tests/stochastic/test_gauss_newton.py", "-k", "dense"),
    ),
    Mutation(
        "stochastic: the Gauss-Newton matrix has no curvature of the loss", "stochastic/_gauss_newton.py",
        "(curved,) = reverse_pass([self.slope], [self.outputs], [pushed])", "curved = pushed",
        ("tests/stochastic/test_gauss_newton.py", "-k", "dense"),
    ),
    Mutation(
        "Kronecker: the block has the wrong scale", "linear/kronecker.py",
        "torch.where(trace == 0, 1.0, trace)", "torch.where(trace == 0, 1.0, trace * trace)",
        ("tests/linear/test_kronecker.py", "-k", "formula"),
    ),
    Mutation(
        "Kept: a factor that is not finite is kept", "linear/kept.py",
        "if not bool(torch.isfinite(made.solve(ones)).all()):", "if False:",
        ("tests/linear/test_kronecker.py", "-k", "not_keep"),
    ),
    Mutation(
        "Kept: a preconditioner is never made anew", "linear/kept.py",
        "self._uses >= self.refresh or ", "", ("tests/linear/test_kronecker.py", "-k", "kept_makes"),
    ),
    Mutation(
        "stochastic: VRBO's estimates do not follow the last inner step", "stochastic/vrbo.py",
        "            self._follow((inner.draw(), outer.draw()), before)", "            pass",
        ("tests/stochastic/test_pseudo_code.py", "-k", "VRBO"),
    ),
    Mutation(
        "stochastic: both sides of a difference draw their own random numbers", "layers/randomness.py",
        "        self.restore(self.recorded)", "        pass",
        ("tests/stochastic/test_pseudo_code.py", "-k", "common"),
    ),
    Mutation(
        "stochastic: a smaller minibatch weighs as much as the others", "stochastic/_batches.py",
        "weight=len(rows) * self.count / self.rows", "weight=1.0",
        ("tests/stochastic/test_misuse.py", "-k", "different_sizes"),
    ),
    Mutation(
        "stochastic: a state that cannot be loaded is loaded in half", "stochastic/_state.py",
        "        _put_optimizers(method, before)\n        _put(method, before)\n", "",
        ("tests/stochastic/test_misuse.py", "-k", "edited"),
    ),
    Mutation(
        "clean: transparent images show what is not seen", "cli/pictures.py",
        "        picture = _on_white(picture)\n", "        pass\n",
        ("tests/cleaning/test_command.py", "-k", "upright"),
    ),
    Mutation(
        "clean: images deeper than their class are left out", "cleaning/data.py",
        "        if deeper:\n", "        if False:\n",
        ("tests/cleaning/test_command.py", "-k", "left_out"),
    ),
    Mutation(
        "clean: columns are constant in single precision", "cleaning/experiment.py",
        "_CONSTANT = 1e-13", "_CONSTANT = 1e-6",
        ("tests/cleaning/test_command.py", "-k", "differ_little"),
    ),
    Mutation(
        "clean: 1 and 1.0 are two classes", "cleaning/data.py",
        "    _check_spelling(cells, f\"{path}: target {target!r}\")\n", "",
        ("tests/cleaning/test_command.py", "-k", "two_ways"),
    ),
    Mutation(
        "clean: grey images of 16 bits are cut off", "cli/pictures.py",
        "    if sixteen:", "    if False:",
        ("tests/cleaning/test_command.py", "-k", "any_depth"),
    ),
    Mutation(
        "argmin: a search by tiny steps does not end", "solvers/parts/tiny_steps.py",
        "stuck = self._count >= _MOST", "stuck = self._count < 0",
        ("tests/solvers/test_tiny_steps.py",),
    ),
    Mutation(
        "stochastic: SABA forgets to subtract the remembered derivative", "stochastic/saba.py",
        "change = subtract(new, old)", "change = subtract(new, [0 * tensor for tensor in old])",
        ("tests/stochastic/test_engine.py", "-k", "saba_converges"),
    ),
    Mutation(
        "stochastic: the adjoint enters the outer direction with the wrong sign", "stochastic/_adjoint.py",
        "outer=subtract_from(upper.outer, lower.cross),", "outer=subtract_from(lower.cross, upper.outer),",
        ("tests/stochastic/test_directions.py", "-k", "tends and SOBA"),
    ),
    Mutation(
        "a tensor that is seen elsewhere is written in place", "_torch/ownership.py",
        "counts in least\n        and not tensor.requires_grad", "not tensor.requires_grad", ("tests/test_ownership.py",),
    ),
    Mutation(
        "stochastic: a step goes on with weights that the caller's autocast has cast before", "stochastic/_oracle.py",
        "dtype, cache_enabled=False)", "dtype)", ("tests/stochastic/test_training_loops.py", "-k", "autocast"),
    ),
    Mutation(
        "stochastic: the second derivative of a weight norm is torch's, which is wrong", "stochastic/_oracle.py",
        "with Repeatable() as mode:", "with nullcontext(Repeatable()) as mode:",
        ("tests/stochastic/test_training_loops.py", "-k", "lacks_or_has_wrong and weight"),
    ),
    Mutation(
        "stochastic: a Function that is differentiable once is taken for a constant", "stochastic/_diagnosis.py",
        'refuse_once_only(where, "inner_objective", loss)', "pass",
        ("tests/stochastic/test_training_loops.py", "-k", "differentiated_once"),
    ),
    Mutation(
        "stochastic: an optimiser of other tensors steps in silence", "stochastic/_method.py",
        "check_holds(optimizer, variables.tensors, variables.what, self.where)", "pass",
        ("tests/stochastic/test_training_loops.py", "-k", "changes_from_outside and stranger"),
    ),
    Mutation(
        "stochastic: the last term of a Neumann series is left out of a small outer variable", "stochastic/_adjoint.py",
        "return add(outer, lower.cross(v), -rate)", "return outer", ("tests/stochastic/test_memory.py", "-k", "series"),
    ),
    Mutation(
        "stochastic: an evaluation at an old point changes running statistics", "stochastic/_variables.py",
        "copies.setdefault(id(buffer), buffer.clone())", "buffer", ("tests/stochastic/test_engine.py", "-k", "old_point"),
    ),
    Mutation(
        "stochastic: a state has no memory", "stochastic/_state.py",
        'setattr(method, name, state["memory"][name])', "pass", ("tests/stochastic/test_engine.py", "-k", "resumed"),
    ),
    Mutation(
        "stochastic: the two products by two passes", "stochastic/_oracle.py",
        "found = self._reverse(gradient, [*z, *x], q, retain_graph=False)",
        "found = (*self._reverse(gradient, z, q), *self._reverse(gradient, x, q))",
        ("tests/stochastic/test_engine.py", "-k", "passes"),
    ),
    Mutation(
        "stochastic: processes are not averaged", "stochastic/_oracle.py",
        "distributed.all_reduce(flat, group=group)", "pass", ("tests/stochastic/test_processes.py",),
    ),
    Mutation(
        "an inequality that is active with multiplier zero is differentiated", "solvers/constrained/regularity.py",
        "return self.weak.any | self.flat | self.irregular", "return self.flat | self.irregular",
        ("tests/constraints/test_degenerate.py", "-k", "multiplier_zero"),
    ),
    Mutation(
        "a one-sided derivative is given to every loss", "solvers/constrained/one_sided.py",
        "return (differ | moved.any(-1) | ~self.weak.any", "return (differ & moved.any(-1) | ~self.weak.any",
        ("tests/constraints/test_one_sided.py", "-k", "both_sides_agree"),
    ),
    Mutation(
        "a second derivative is compared like a first", "layers/call.py",
        "if first and self.sides is not None", "if self.sides is not None", ("tests/constraints/test_one_sided.py", "-k", "second"),
    ),
    Mutation(
        "directions into weakly active constraints are not looked at", "solvers/constrained/critical.py", "    if len(weak):", "    if False:",
        ("tests/constraints/test_second_order.py", "-k", "cubic or product"),
    ),
    Mutation(
        "a fall behind a rise counts", "solvers/constrained/critical.py",
        "torch.where(fell, lower, new <= first + noise)", "torch.where(fell, lower, new <= first + 1e9)",
        ("tests/constraints/test_second_order.py", "-k", "fall_behind or none_of_these"),
    ),
    Mutation(
        "curvature at thresholds of terms is not looked at", "solvers/composite/judge.py",
        "if degenerate is not None and bool(degenerate.any()):", "if False:",
        ("tests/constraints/test_second_order.py", "-k", "hide_a_maximum"),
    ),
    Mutation(
        "no only point is looked for", "solvers/constrained/solve.py", "mask = found.unsqueeze(-1)", "mask = (found & False).unsqueeze(-1)",
        ("tests/constraints/test_edges.py", "-k", "touch_in_one_point"),
    ),
    Mutation(
        "a bound that moves does not carry x along", "layers/constrained.py", "return x + to_lower + to_upper", "return x + 0 * to_lower + 0 * to_upper",
        ("tests/constraints/test_closed_forms.py", "-k", "carries_x_along"),
    ),
    Mutation(
        "IMAML's default descends by a fixed step", "meta/imaml.py", "line_search=paper)", "line_search=False)",
        (IMAML, "-k", "default_learns"),
    ),
    Mutation(
        "IMAML's default does not damp negative curvature", "meta/safeguarded.py", "if not bool(bent.any()) or bool(", "if True or bool(",
        (IMAML, "-k", "damped_alone or default_learns"),
    ),
    Mutation(
        "IMAML's default takes vanishing curvature for a solution", "meta/safeguarded.py",
        "return bent | (flat & ~(residual <= torch.finfo(rhs.dtype).eps ** 0.75 * rhs.norm(dim=-1)))", "return bent",
        (IMAML, "-k", "indefinite_task_is_reported or singular_task"),
    ),
    Mutation(
        "damping passes for an accuracy that was asked for", "meta/safeguarded.py", " or bool((threshold > 0).any())", "",
        (IMAML, "-k", "damped_alone"),
    ),
    Mutation(
        "an edited state is taken", "checksum.py", "kept != _digest(body)", "False", (OUTER, "-k", "no_edit"),
    ),
    Mutation(
        "a checksum leaves out the numbers of tensors", "checksum.py", "found.update(flat.view(torch.uint8).numpy().tobytes())", "pass",
        (OUTER, "-k", "no_edit"),
    ),
    Mutation(
        "bilevel imaml adapts without its momentum", "meta/recipe.py", ", momentum=self.inner_momentum", "",
        ("tests/meta/test_training.py", "-k", "chooses_the_inner_solver"),
    ),
    Mutation(
        "inner steps are not shortened where the curvature is large", "meta/measured_descent.py",
        "alpha = ((1 + self.momentum) / curvature).clamp(max=self.lr)", "alpha = torch.full_like(alpha, self.lr)",
        ("tests/meta/test_measured_descent.py",),
    ),
    Mutation(
        "one task's curvature shortens the steps of all", "meta/measured_descent.py",
        "curvature = torch.fmax(_FORGET * curvature, ratio)", "curvature = torch.fmax(_FORGET * curvature, ratio).max().expand_as(ratio)",
        ("tests/meta/test_measured_descent.py", "-k", "loop"),
    ),
    Mutation(
        "the step of Adam stays", "meta/training.py", 'group["lr"] = recipe.outer_step(self.step)', "pass",
        ("tests/meta/test_training.py", "-k", "decays_to_the_end"),
    ),
    Mutation(
        "training goes on with steps of 0", "meta/training.py", "decayed = self.recipe.decay_steps or math.inf", "decayed = math.inf",
        ("tests/meta/test_training.py", "-k", "decays_to_the_end"),
    ),
    Mutation(
        "averaged parameters are lost when a run goes on", "meta/training.py", 'self.averaged.load_state_dict(state["averaged"])', "pass",
        ("tests/meta/test_training.py", "-k", "bit_for_bit"),
    ),
    Mutation(
        "a validation that a killed run owed is lost", "meta/training.py", "return self.step > validated and",
        "return bool(self.history) and self.history[-1].step == validated + 1 and",
        ("tests/meta/test_training.py", "-k", "owed"),
    ),
    Mutation(
        "the outputs of bilevel imaml do not stay equal", "meta/training.py", "equalize_gradients(last_layer(self.setup.model))", "pass",
        ("tests/meta/test_training.py", "-k", "stay_equal"),
    ),
    Mutation(
        "the outputs of bilevel imaml do not begin equal", "meta/recipe.py", "equalize(last_layer(model))", "pass",
        ("tests/meta/test_training.py", "-k", "stay_equal"),
    ),
    Mutation(
        "a model of other ways is measured with its first outputs alone", "meta/equal_outputs.py",
        "row = parameter[:1].expand(outputs, *parameter.shape[1:])", "row = parameter[:outputs]",
        ("tests/meta/test_training.py", "-k", "other_ways"),
    ),
    Mutation(
        "the classes of a task come from all groups", "meta/sampler.py", ".masked_fill(~inside, -1.0)", "",
        ("tests/meta/test_data.py", "-k", "few_groups"),
    ),
    Mutation(
        "classes of few groups are missing in a task", "meta/sampler.py", " | (sizes.cumsum(-1) - sizes < self.ways)", "",
        ("tests/meta/test_data.py", "-k", "further_groups"),
    ),
    Mutation(
        "each class of a task of few groups is turned by itself", "meta/sampler.py",
        "torch.randint(self.variants, (tasks, 1), generator", "torch.randint(self.variants, (tasks, self.ways), generator",
        ("tests/meta/test_data.py", "-k", "few_groups"),
    ),
    Mutation(
        "mirrored classes are turned ones", "meta/sampler.py", "images[these].flip(-1) if number >= self.turns", "images[these] if number >= self.turns",
        ("tests/meta/test_data.py", "-k", "mirrored"),
    ),
    Mutation(
        "distortions are drawn from torch's own generator", "meta/distortion.py", "torch.randn(*shape, 6, generator=generator)", "torch.randn(*shape, 6)",
        ("tests/meta/test_data.py", "-k", "drawn_from_the_seed"),
    ),
    Mutation(
        "each image of a class has the class's distortion to itself", "meta/distortion.py", "_draw((tasks, ways, 1), self.of_class", "_draw((tasks, ways, examples), self.of_class",
        ("tests/meta/test_data.py", "-k", "spread"),
    ),
    Mutation(
        "a root is told of its objective", "layers/messages.py", "        return {**words, **_BRACKET} if isinstance(solver, Bracketing) else words\n", "        return {}\n",
        ("tests/test_wording.py", "-k", "no_objective"),
    ),
    Mutation(
        "every gradient that changes is a kink", "solvers/judging/error.py", "(near > 0.5 * wide)", "(near > 0 * wide)",
        ("tests/solvers/test_error.py", "-k", "kinks_are_told"),
    ),
    Mutation(
        "the unknown's pytree in the place of its flat vector", "layers/rectangular.py", "check_captures(system, point, tensors",
        "check_captures(system, start, tensors", ("tests/test_rectangular.py", "-k", "transforms_of_pytrees"),
    ),
    Mutation(
        "an answer judged by its residual alone", "solvers/judging/given_answer.py", "codes, factor = _by_step(problem, x, residual, codes)", "factor = None",
        ("tests/test_differentiation.py", "-k", "flat_direction"),
    ),
    Mutation(
        "an answer is refused where the residual at zero is infinite", "solvers/judging/given_answer.py",
        "sizes.nan_to_num(0.0, 0.0).amax(0)", "sizes.amax(0).nan_to_num(0.0, 0.0)",
        ("tests/test_differentiation.py", "-k", "infinite_at_zero"),
    ),
    Mutation(
        "scipy's own type errors come through", "solvers/parts/scipy_bridge.py", '"bounds": "leave it out, and pass lower= and upper= to bilevel.argmin",', "",
        ("tests/solvers/test_scipy.py", "-k", "one_sentence"),
    ),
    Mutation(
        "a validation loss never sees the hyperparameters", "hyperopt/problem.py", "_required(validation_loss) == 3", "False",
        ("tests/hyperopt/test_problem.py", "-k", "may_see"),
    ),
    # The differentiation rule.
    Mutation(
        "the adjoint's sign", "implicit.py",
        "both.pullback(-adjoint.reshape(rhs.shape))", "both.pullback(adjoint.reshape(rhs.shape))",
        GRADCHECK,
    ),
    Mutation(
        "the adjoint's matrix not transposed", "implicit.py",
        "operator, axes = linearization.operator.T,", "operator, axes = linearization.operator,", GRADCHECK,
    ),
    Mutation(
        "the adjoint's matrix not transposed, in second derivatives", "implicit.py",
        "q = LinearSolve.apply(_checking(rule, tensors, needs_grad), True, cotangent,", "q = LinearSolve.apply(rule, False, cotangent,", GRADGRADCHECK,
    ),
    Mutation(
        "the adjoint's sign, in second derivatives", "implicit.py",
        "pulled = iter(pull(-q))", "pulled = iter(pull(q))", GRADGRADCHECK,
    ),
    Mutation(
        "the tangent's sign", "implicit.py",
        "LinearSolve.apply(rule, False, -pushed,", "LinearSolve.apply(rule, False, pushed,", matrix("jvp-"),
    ),
    Mutation(
        "the matrix not transposed in the linear solve's own adjoint", "implicit.py",
        "LinearSolve.apply(rule, not ctx.transposed, cotangent,", "LinearSolve.apply(rule, ctx.transposed, cotangent,",
        GRADGRADCHECK,
    ),
    Mutation(
        "left and right exchanged in the derivative of a matrix", "implicit.py",
        "left, right = (z, b_bar) if ctx.transposed else (b_bar, z)", "left, right = (b_bar, z) if ctx.transposed else (z, b_bar)",
        GRADGRADCHECK,
    ),
    Mutation(
        "a detached term: how the matrix changes with the solution", "implicit.py",
        "needs_grad = ctx.needs_input_grad[3:]", "needs_grad = (False, *ctx.needs_input_grad[4:])", GRADGRADCHECK,
    ),
    Mutation(
        "a detached term: how the matrix changes with the solution, forward", "implicit.py",
        "change = change - _push(pull, z, directions)", "_push(pull, z, directions)", matrix("jvp-", "hessian-"),
    ),
    Mutation(
        "repeated right-hand sides not in front of a lifted batch", "implicit.py",
        "batch_axis_first(rhs, in_dims[2], size).movedim(0, at)", "batch_axis_first(rhs, in_dims[2], size)",
        cells("Two transforms, vmap of jacrev", "root, single, float64", "root, batch, float64"),
    ),
    Mutation(
        "a mean for a sum over the problems that share a tensor", "equations/linearization.py",
        "return self._pull(q)[1]", "return self._pull(q / len(q))[1]",
        cells("Plain autograd, .backward()", "argmin, batch, float64", "root, batch, float64"),
    ),
    Mutation(
        "units taken for singularity", "linear/exact.py",
        "    return rows, rows if symmetric else columns", "    return torch.ones_like(rows), torch.ones_like(rows)",
        ("tests/linear/test_exact.py",),
    ),
    Mutation(
        "a null space left in the answer", "linear/_pseudo_inverse.py",
        "        return _without(self.null, solved)", "        return solved", (MINIMUM_NORM, "-k", "unknowns_as_they_are"),
    ),
    Mutation(
        "a solution called of minimum norm whatever is left", "linear/_judge.py",
        "    return torch.where(reached, int(Status.MINIMUM_NORM), status)", "    return torch.full_like(status, Status.MINIMUM_NORM)",
        (MINIMUM_NORM, "-k", "inconsistent"),
    ),
    Mutation(
        "a Hessian's small error taken for a saddle", "linear/exact.py",
        "& (negative <= eigenvalue_uncertainty(n, matrix.dtype)) & definite", "& False", (MINIMUM_NORM, "-k", "within_the_accuracy"),
    ),
    Mutation(
        "an argument that changes the free directions differentiated", "linear/_free_directions.py",
        "changed = changes_free_directions(operator, outcome.status, pullbacks())", "changed = outcome.status < 0",
        ("tests/linear/test_free_directions.py", "-k", "dependent or duplicated"),
    ),
    Mutation(
        "a converged solve not examined for free directions", "layers/call.py",
        "noise=noise, examine=examine", "noise=noise", ("tests/linear/test_null_space.py", "-k", "shift or minimum_norm"),
    ),
    Mutation(
        "a null vector searched without a new beginning from the true product", "linear/_null_space.py",
        "            run = _Run(gradient(r))\n    return u", "            break\n    return u",
        ("tests/linear/test_minimum_norm.py", "-k", "refused_alike"),
    ),
    Mutation(
        "the part in the null space left in an answer", "linear/_null_space.py",
        "torch.where(these.unsqueeze(-1), x - part, x), these", "x, these", ("tests/linear/test_null_space.py", "-k", "minimum_norm"),
    ),
    Mutation(
        "an active bound with a zero slope differentiated", "equations/equilibrium.py",
        "(at_lower | at_upper) & flat & ~pinned", "(at_lower | at_upper) & flat & pinned", ("tests/test_bounded_equilibrium.py", "-k", "zero_slope"),
    ),
    Mutation(
        "the curvature along an active bound counted", "equations/equilibrium.py",
        "hessian @ landing.dense()[:, rows, rows].mT", "hessian", ("tests/test_bounded_equilibrium.py", "-k", "curvature"),
    ),
    Mutation(
        "the curvature across a simplex counted", "equations/equilibrium.py",
        "hessian @ landing.dense()[:, rows, rows].mT", "hessian", ("tests/test_matrix_games.py", "-k", "curvature"),
    ),
    Mutation(
        "a game left to Newton's method alone", "solvers/defaults.py", "return _BRIEF_NEWTON, _AFTER_NEWTON_IN_GAMES", "return _NEWTON, _AGAIN",
        ("tests/test_matrix_games.py", "-k", "pennies or bilinear"),
    ),
    Mutation(
        "steps of least squares in torch's default dtype", "solvers/levenberg_marquardt.py", "torch.ones_like(after), 0.5)", "1.0, 0.5)",
        ("tests/test_mixed_dtypes.py", "-k", "default_dtype"),
    ),
    Mutation(
        "a path that turns back", "solvers/parts/path.py", "torch.where((sign < 0).unsqueeze(-1), -v, v)", "v",
        ("tests/test_matrix_games.py", "-k", "takes_over"),
    ),
    Mutation(
        "a given answer without its auxiliary output", "layers/layer.py",
        "return self._returned(self._around(settings, pytree.tree_map(_without_graph, x), args, kwargs))",
        "return self._around(settings, pytree.tree_map(_without_graph, x), args, kwargs).value",
        ("tests/test_differentiation.py", "-k", "auxiliary"),
    ),
    Mutation(
        "steps differentiated through kinks", "layers/differentiation.py", "if system.has_kinks:", "if False:",
        ("tests/test_differentiation.py", "-k", "no_sense"),
    ),
    Mutation(
        "an argument judged by itself, not by what it was computed from", "equations/pullbacks.py",
        "else (to_arguments, to_leaves)", "else (to_arguments,)", ("tests/linear/test_free_directions.py", "-k", "outside"),
    ),
    Mutation(
        "a factorisation lent where the matrix may be singular", "linear/exact.py",
        "(pivots > least**0.5 * torch.linalg.vector_norm(factor, dim=-1))", "(pivots > 1e-4 * pivots.amax())", (MINIMUM_NORM, "-k", "curved"),
    ),
    Mutation(
        "a failed solve not asked whether it could have succeeded", "linear/_judge.py",
        "if bool((failed & short).any()):", "if False:", (MINIMUM_NORM, "-k", "inconsistent"),
    ),
    Mutation(
        "a running term that stands still taken for a budget spent", "linear/neumann.py",
        "ended = torch.where(still, int(Status.MINIMUM_NORM), int(Status.MAX_STEPS))", "ended = int(Status.MAX_STEPS)",
        (MINIMUM_NORM, "-k", "inconsistent and neumann"),
    ),
    Mutation(
        "rounding of a former right-hand side refused", "linear/_base.py",
        "if noise is not None and not target.asked and bool(coarse.any()):", "if False:", (MINIMUM_NORM, "-k", "second_derivatives or third"),
    ),
    Mutation(
        "only matrices of condition 3e3 are regular in float32", "linear/exact.py",
        "_LEAST_REGULAR = 0.6", "_LEAST_REGULAR = 0.5", ("tests/linear/test_exact.py", "-k", "residual_of_its_rounding"),
    ),
    Mutation(
        "a residual excused of what is ill-conditioned in any units", "linear/exact.py",
        "sound = (least > eps**_LEAST_REGULAR * values[..., 0])", "sound = (least >= 0)", ("tests/linear/test_exact.py", "-k", "excuse"),
    ),
    Mutation(
        "a proposal taken for the answer whatever its residual", "linear/_base.py",
        "if not bool((left <= 16 * info.eps * norm).all()):", "if False:", ("tests/test_implicit.py", "-k", "proposal"),
    ),
    Mutation(
        "a proposal pulled back where it was not the adjoint", "equations/linearization.py",
        "if self._pulled is not None and torch.equal(self._pulled[0], v):", "if self._pulled is not None:",
        ("tests/test_implicit.py", "-k", "single_newton"),
    ),
    Mutation(
        "a linearisation kept that is not at the solution", "equations/linearization_cache.py",
        "if at is not None and torch.equal(at, x.reshape(at.shape)):", "if at is not None:",
        ("tests/test_implicit.py", "-k", "last_look"),
    ),
    Mutation(
        "nothing kept of the solver's last look", "equations/linearization_cache.py",
        "        if look is None or look.linearization is None or transforms_active():", "        if True:",
        ("tests/test_implicit.py", "-k", "last_look"),
    ),
    Mutation(
        "the variance held fixed in a batch norm's second derivative", "_torch/convolution.py",
        "by_y * b + by_u * c + scale * D", "by_y * b + by_u * c", ("tests/test_products.py", "-k", "test_batch_norm"),
    ),
    Mutation(
        "what the forward pass saved taken for constants, in a batch norm's third derivative", "_torch/convolution.py",
        "        if torch.is_grad_enabled():", "        if False:", ("tests/test_products.py", "-k", "third"),
    ),
    Mutation(
        "a convolution's second derivative without what its weights do", "_torch/convolution.py",
        "_applied(_Convolution, x, v, ctx.how) if to_y", "0 * _applied(_Convolution, x, v, ctx.how) if to_y",
        ("tests/test_products.py", "-k", "test_convolution"),
    ),
    Mutation(
        "the product that verifies a budget left out where the residual is read", "layers/call.py",
        "seen=bool(reported)", "seen=False", ("tests/test_layers.py", "-k", "looks"),
    ),
    Mutation(
        "a last product that is not a number taken for a step", "linear/cg.py",
        "active & torch.isnan(quotient), int(Status.NOT_FINITE)", "active & torch.isnan(quotient), int(Status.RUNNING)",
        ("tests/linear/test_base.py", "-k", "not_a_number"),
    ),
    Mutation(
        "a product's rule without its graph where a graph is recorded", "_torch/convolution.py",
        "recorded = torch.is_grad_enabled() or transforms_active()", "recorded = transforms_active()",
        ("tests/test_products.py", "-k", "third"),
    ),
    Mutation(
        "groups of a batch of convolutions not counted", "_torch/convolution.py",
        "w.flatten(0, 1), how._replace(groups=size * how.groups))\n        return _ungrouped(y, size), 1",
        "w.flatten(0, 1), how._replace(groups=size))\n        return _ungrouped(y, size), 1",
        ("tests/test_products.py", "-k", "under_vmap"),
    ),
    Mutation(
        "any tree taken for the unknown's vector", "pytree.py",
        "all(a is b for a, b in zip(leaves", "all(a.shape == b.shape for a, b in zip(leaves",
        ("tests/test_tree.py", "-k", "ravel"),
    ),
    Mutation(
        "a mean for a sum over the batch's objectives", "equations/system.py",
        "self.outputs(point, *tensors).sum(), x)[0]", "self.outputs(point, *tensors).mean(), x)[0]", matrix("jacrev-", "hessian-"),
    ),
    Mutation(
        "batch norm through vmap of grad, which torch differentiates wrongly from outside", "equations/system.py",
        "with WrittenNorms(), Repeatable():\n            return grad(lambda point: self.outputs(point, *tensors).sum(), x)[0]",
        "if True:\n            return self.lifted(lambda p, *t: grad(lambda at: self.output(at, *t), p)[0])(x, *tensors)",
        ("tests/test_implicit.py", "-k", "batch_norm"),
    ),
    Mutation(
        "products left to torch, which divides by factors", "_torch/double_backward.py",
        "    **PRODUCTS,\n", "", ("tests/test_products_of_factors.py", "-k", "test_a_minimum"),
    ),
    Mutation(
        "determinants left to torch, which divides by differences of singular values", "_torch/double_backward.py",
        "    **DETERMINANTS,\n", "", ("tests/test_determinants.py", "-k", "test_a_minimum"),
    ),
    Mutation(
        "a bracketed search that is said to have run away", "solvers/judging/judge.py",
        "verdict.endless & (not solver.is_confined)", "verdict.endless", ("tests/solvers/test_bracketing.py", "-k", "jumps"),
    ),
    Mutation(
        "norms left to torch, whose third derivatives are wrong", "_torch/norms.py",
        "return _WRITTEN.get(func, func)(*args, **(kwargs or {}))", "return func(*args, **(kwargs or {}))",
        ("tests/test_implicit.py", "-k", "norm"),
    ),
    Mutation(
        "a linearisation that holds itself", "equations/problem.py",
        "plain = Problem(self.system, self.tensors, None, self.replays)\n", "plain = self\n", ("tests/test_memory.py", "-k", "let_go"),
    ),
    Mutation(
        "a hypergradient that holds itself", "problems/result.py",
        "before.report.moved(at), before._rebuild)", "before.report.moved(at), rebuild)", ("tests/test_memory.py", "-k", "let_go"),
    ),
    Mutation(
        "the Hessian taken at zero", "equations/problem.py",
        "lambda: plain._dense(at)[1]", "lambda: plain._dense(torch.zeros_like(at))[1]", ("tests/test_implicit.py", "-k", "test_gradcheck or quartic"),
    ),
    Mutation(
        "two thirds of the curvature, as Gauss–Newton has of a quartic", "equations/problem.py",
        "operator = HessianOperator(residual, point, expect", "operator = HessianOperator(2 * residual / 3, point, expect",
        ("tests/test_implicit.py", "-k", "quartic"),
    ),
    Mutation(
        "only the diagonal blocks of a pytree", "equations/problem.py",
        "matrix = matrix.reshape(self.batch, self.size, self.size)",
        "matrix = matrix.reshape(self.batch, self.size, self.size) * torch.block_diag(*[matrix.new_ones(s.numel(), s.numel()) for s in self.system.raveler.shapes])",
        ("tests/test_acceptance.py", "-k", "coupled"),
    ),
    Mutation(
        "the axes of nested batches in the wrong order", "equations/problem.py",
        "zip(reversed(self.system.levels), reversed(position), strict=True)", "zip(reversed(self.system.levels), position, strict=True)",
        ("tests/test_acceptance.py", "-k", "nested"),
    ),
    Mutation(
        "float32 everywhere", "pytree.py",
        "(dtype,), real_dtype(dtype), device)", "(dtype,), torch.float32, device)", ("tests/test_implicit.py", "-k", "dtypes or float64_data"),
    ),
    Mutation(
        "forward mode twice let through", "layers/arguments.py",
        "if forward_levels(tensors) > 1:", "if forward_levels(tensors) > 9:", cells("Two transforms, jvp of jvp", "argmin, single, float64"),
    ),
    Mutation(
        "the compiler let in", "_torch/transforms.py",
        "    disabled: list[Callable[P, T]] = []", "    return function\n    disabled: list[Callable[P, T]] = []",
        matrix("compile", columns="float64 and argmin"),
    ),
    Mutation(
        "the compiler starts in our function modes", "_torch/transforms.py",
        'if hasattr(eval_frame, "set_code_exec_strategy"):', "if False:",
        matrix("compile", columns="float64 and argmin"),
    ),
    Mutation(
        "batched tangents of the older vmap unseen", "_torch/transforms.py",
        "        if not some:\n            return jvp(ctx, *tangents)", "        if True:\n            return jvp(ctx, *tangents)",
        matrix("strategy"),
    ),
    Mutation(
        "solvers under autocast", "_torch/transforms.py",
        "with autocasting(arg.device, None):", "with contextlib.nullcontext():", (GUARDS, "-k", "autocast"),
    ),
    # Guard rails.
    Mutation(
        "captured tensors not looked for", "layers/checks.py",
        "if captures and reaches_another_leaf(output, (point,)):", "if False:", (GUARDS, "-k", "captures_in_layers"),
    ),
    Mutation(
        "captured tensors of transforms not looked for", "layers/arguments.py",
        "    if carries_gradient(output):", "    if False:", (GUARDS, "-k", "captures_in_layers"),
    ),
    Mutation(
        "captured dual numbers not looked for", "_torch/transforms.py",
        "    if forward_ad._current_level >= 0:\n        return True\n", "", (GUARDS, "-k", "captures_in_layers and dual"),
    ),
    Mutation(
        "randomness not looked for", "layers/checks.py",
        "    if not agreed:\n", "    if False:\n", (GUARDS, "-k", "randomness_in_layers"),
    ),
    Mutation(
        "randomness looked for with two draws", "layers/checks.py", "_MORE_PAIRS = 12", "_MORE_PAIRS = 0",
        (GUARDS, "-k", "randomness_in_layers"),
    ),
    Mutation(
        "changes in place not looked for", "layers/checks.py",
        "if versions != [t._version for t in watched]:", "if False:", ("tests/test_failures.py", "-k", "running_statistics"),
    ),
    Mutation(
        "an init that requires grad let through", "layers/layer.py",
        "and carries_gradient(given):", "and False:", ("tests/test_failures.py", "-k", "init_that"),
    ),
    Mutation(
        "captures of the outer objective not looked for", "problems/checks.py",
        "    if not reaches_another_leaf(loss, (*outer, *known)):\n        return False\n", "    if True:\n        return False\n",
        (GUARDS, "-k", "outer_objective_get"),
    ),
    Mutation(
        "an outer objective that draws let through", "layers/checks.py",
        "if self._draws():", "if False:", (GUARDS, "-k", "randomness_in_problems"),
    ),
    Mutation(
        "a goal's residual made too small", "problems/adaptive/iterate.py", "here.rho = here.v - product\n", "here.rho = 0.3 * (here.v - product)\n",
        ("tests/test_goal.py", "-k", "true_ones"),
    ),
    Mutation(
        "a goal met on half of the error", "problems/adaptive/error_model.py", "Bound(inner + linear if self.seen(here)", "Bound(linear if self.seen(here)",
        ("tests/test_goal.py", "-k", "estimated_goal"),
    ),
    Mutation(
        "a goal's span solved for with another residual", "problems/adaptive/quasi_newton.py",
        "b - (shares @ W).squeeze(-2), shares", "b - 0.9 * (shares @ W).squeeze(-2), shares",
        ("tests/test_goal.py", "-k", "secants"),
    ),
    Mutation(
        "a goal's pairs fitted though they contradict each other", "problems/adaptive/quasi_newton.py",
        "least = (_MARGIN * doubt.nan_to_num(nan=1.0))", "least = (0 * doubt)", ("tests/test_goal.py", "-k", "contradicting"),
    ),
    Mutation(
        "a goal's directions not conjugate", "problems/adaptive/quasi_newton.py",
        "return p - (_shares(V", "return p - 0.5 * (_shares(V", ("tests/test_goal.py", "-k", "pullbacks"),
    ),
    Mutation(
        "a goal's pullbacks of other products than are kept", "problems/adaptive/quasi_newton.py",
        "[*self._pulled, pulled][-_MOST_PAIRS:]", "[pulled, *self._pulled][-_MOST_PAIRS:]", ("tests/test_goal.py", "-k", "pullbacks"),
    ),
    Mutation(
        "a goal met on changes that vanish by chance", "problems/adaptive/error_model.py",
        "(_CHANCE * here.left", "(0 * here.left", ("tests/test_goal.py", "-k", "bound_by_norms"),
    ),
    Mutation(
        "a goal's slopes measured in the last digits", "problems/adaptive/search.py",
        "        if length > torch.finfo(", "        if length > 0 * torch.finfo(", ("tests/test_goal.py", "-k", "stretch"),
    ),
    Mutation(
        "a goal that keeps a bad step beyond the inner solver's", "problems/adaptive/search.py",
        "        if not here.size <= size:\n", "        if False:\n", ("tests/test_goal.py", "-k", "beyond"),
    ),
    Mutation(
        "a goal that trusts any guess", "problems/adaptive/search.py", "                ahead = False\n", "                return here.left > 1.01 * want\n",
        ("tests/test_goal.py", "-k", "no_good"),
    ),
    Mutation(
        "a goal's outer objective not looked at", "problems/adaptive/driver.py",
        "settings.tolerance, known, certify, checked,", "settings.tolerance, known, certify, upper.system.outputs,", (GUARDS, "-k", "outer_objective_get"),
    ),
    Mutation(
        "a goal's disconnected tensors not looked for", "problems/hypergradient.py",
        "flat = torch.cat(problem.connected(parts, inner, outer, data, policy))", "flat = found.gradient", (GUARDS, "-k", "disconnected"),
    ),
    Mutation(
        "disconnected outer tensors not looked for", "problems/checks.py",
        "if asked and not seen]", "if False]", (GUARDS, "-k", "disconnected"),
    ),
    Mutation(
        "any function taken for a linear one", "equations/system.py", "if bool(wrong > doubt * size):", "if False:",
        (LINEAR, "-k", "not_linear"),
    ),
    # Linear solvers.
    Mutation(
        "right-hand sides below 1e-8 taken for zero", "linear/_base.py",
        "usable = finite & (scale > 0)", "usable = finite & (scale > 1e-8)", ("tests/test_implicit.py", "-k", "tiny_and_huge"),
    ),
    Mutation(
        "a zero right-hand side divided by its size", "linear/_base.py",
        "    scale = torch.where(usable, scale, torch.ones_like(scale))\n", "    unit = rhs / scale\n    scale = torch.where(scale > 0, scale, scale / scale)\n",
        (CONFORMANCE, "-k", "zero_on_the_right"),
    ),
    Mutation(
        "an answer called settled whatever was asked", "linear/_base.py",
        "or not bool((left <= threshold).all()):", "or False:", ("tests/test_implicit.py", "-k", "settled"),
    ),
    Mutation(
        "a step called the last while some problem runs on", "solvers/_base.py",
        "elif everyone and verdict is None and bool((norm <= threshold).all() &", "elif everyone and verdict is None and bool((norm <= threshold).any() &",
        ("tests/solvers/test_conformance.py",),
    ),
    Mutation(
        "a relative tolerance of 1", "linear/_base.py",
        "target.relative * norm, target.absolute", "1.0 * norm, target.absolute", (CONFORMANCE, "-k", "positive_definite"),
    ),
    Mutation(
        "a stopping rule of the batch's mean", "linear/_judge.py",
        "reached = residual_norm <= threshold\n    if", "reached = (residual_norm.mean() <= threshold.mean()).expand_as(residual_norm)\n    if",
        (CONFORMANCE, "-k", "one_slow_problem"),
    ),
    Mutation(
        "normal equations", "linear/_base.py",
        "solution = solver.solve(operator, unit, threshold,",
        "from bilevel.operators import FunctionOperator as F\n        solution = solver.solve(F(lambda v: operator.rmatvec(operator.matvec(v)), unit, symmetric=True), operator.rmatvec(unit), threshold,",
        (CONFORMANCE, "-k", "wastes_no_product or ill_conditioned"),
    ),
    Mutation(
        "a wasted first product", "linear/_preconditioner.py",
        "return torch.zeros_like(rhs), rhs\n", "return torch.zeros_like(rhs), rhs - operator.matvec(torch.zeros_like(rhs))\n",
        (CONFORMANCE, "-k", "wastes_no_product"),
    ),
    Mutation(
        "a start used however bad", "linear/_preconditioner.py",
        "better = (residual.norm(dim=-1) < rhs.norm(dim=-1)).unsqueeze(-1)", "better = torch.ones_like(rhs[:, :1], dtype=torch.bool)",
        (CONFORMANCE, "-k", "a_good_start"),
    ),
    Mutation(
        "an answer beyond the largest number called solved", "linear/_base.py",
        "beyond = ((status == Status.CONVERGED) | (status == Status.MINIMUM_NORM)) & ~torch", "beyond = (status != status) & ~torch",
        ("tests/linear/test_base.py", "-k", "beyond"),
    ),
    Mutation(
        "the next direction from the old residual", "linear/cg.py",
        "p = torch.addcmul(z, beta.unsqueeze(-1), p)", "p = torch.addcmul(z + alpha * Ap, beta.unsqueeze(-1), p)",
        ("tests/linear/test_cg.py", "-k", "new_residual"),
    ),
    Mutation(
        "the recursive residual alone", "linear/cg.py",
        "true = rhs - operator.matvec(x) if verify else r\n", "true = r\n", (CONFORMANCE, "tests/linear/test_cg.py", "-k", "true_residual"),
    ),
    Mutation(
        "an unverified solve that verifies", "linear/cg.py",
        "true = rhs - operator.matvec(x) if verify else r\n", "true = rhs - operator.matvec(x)\n",
        ("tests/linear/test_cg.py", "-k", "unverified"),
    ),
    Mutation(
        "a lone problem's recursive residual believed", "linear/_lone.py",
        "if verify else rest", "if False else rest", ("tests/linear/test_lone.py",),
    ),
    Mutation(
        "a lone problem's negative curvature stepped over", "linear/_lone.py",
        "if not quotient > tiny * largest:", "if quotient == 0:", ("tests/linear/test_lone.py",),
    ),
    Mutation(
        "negative curvature stepped over", "linear/cg.py",
        "curved = active & (quotient > tiny * largest)", "curved = active & (quotient == quotient)", (CONFORMANCE, "-k", "negative_curvature"),
    ),
    Mutation(
        "residuals not kept orthogonal in float32", "linear/cg.py",
        "else eps > 1e-12", "else False", (CONFORMANCE, "-k", "float32_cg"),
    ),
    Mutation(
        "the preconditioner dropped", "linear/cg.py",
        "given = self.preconditioner\n", "given = None\n", (CONFORMANCE, "-k", "preconditioner_is_used"),
    ),
    Mutation(
        "GMRES's preconditioner not undone", "linear/gmres.py",
        "update = self.preconditioner(update)", "pass", (CONFORMANCE, "-k", "preconditioner_is_used"),
    ),
    Mutation(
        "the units of a fixed point's unknowns are taken from its equations", "solvers/judging/error.py",
        "(_usable(noise / eps).unsqueeze(-1) * matrix.abs())", "(matrix.abs())",
        ("tests/solvers/test_error.py", "-k", "mixed_units or its_terms"),
    ),
    Mutation(
        "the rounding of 1 - T' is taken for a derivative", "equations/problem.py",
        "lost = diagonal.abs() <= _LOST * torch.finfo(x.dtype).eps", "lost = diagonal.abs() < 0", ("tests/solvers/test_error.py", "-k", "minus_the_slope"),
    ),
    Mutation(
        "a residual hidden by rounding lets every nearer point pass", "solvers/judging/weighing.py",
        "allowed = torch.minimum(size, goal.threshold)", "allowed = size", ("tests/solvers/test_error.py", "-k", "far_rounding"),
    ),
    Mutation(
        "a mixture is accepted where rounding hides its residual", "solvers/anderson.py",
        "(torch.finfo(size.dtype).eps * size > left)", "(left < 0)", (ANDERSON, "-k", "hides_the"),
    ),
    Mutation(
        "a singular matrix not noticed", "linear/exact.py",
        "((eigenvalues.abs().amin(-1) <= smallest * largest) | wrong)", "(eigenvalues.abs().amin(-1) < 0)",
        (MINIMUM_NORM,),
    ),
    Mutation(
        "a borrowed factorisation trusted", "linear/exact.py",
        "            if good:\n", "            if True:\n", ("tests/test_implicit.py", "-k", "borrowed"),
    ),
    Mutation(
        "a Neumann series without its step", "linear/neumann.py",
        "x + alpha * r, x)", "x + r, x)", (CONFORMANCE, "-k", "neumann"),
    ),
    # Operators.
    Mutation(
        "a transposed operator", "operators/_graph.py",
        "        return _pull(*self._transposed_pass, v)", "        return _pull(self._residual, self._point, v)",
        ("tests/test_operators.py", "-k", "products"),
    ),
    Mutation(
        "repeated matrices in the wrong order", "operators/_around.py",
        "return self._base.dense().repeat(self.repeats, 1, 1)", "return self._base.dense().repeat_interleave(self.repeats, 0)",
        ("tests/test_operators.py", "-k", "products"),
    ),
    Mutation(
        "damping left out of the transpose", "operators/_around.py",
        "return self.base.rmatvec(v) + self.damping * v", "return self.base.rmatvec(v)", ("tests/test_operators.py", "-k", "products"),
    ),
    # Inner solvers.
    Mutation(
        "a batch mask dropped: what has ended goes on", "solvers/_base.py",
        " merge(active & ~ended_badly, new, state)", " merge(~ended_badly, new, state)", ("tests/solvers/test_base.py",),
    ),
    Mutation(
        "a stopping rule of the batch's largest residual", "solvers/_base.py",
        "outcome = torch.where(norm <= threshold, torch", "outcome = torch.where((norm <= threshold).all(), torch", ("tests/solvers/test_base.py",),
    ),
    Mutation(
        "a solver's claim believed", "solvers/judging/judge.py",
        "believed = (noticed == Status.CONVERGED) & ~reached", "believed = (noticed == Status.CONVERGED) & False", ("tests/solvers/test_base.py",),
    ),
    Mutation(
        "equations that are not finite taken for solved", "solvers/judging/weighing.py",
        "torch.isfinite(size) & (size <= 30", "(size <= 30", ("tests/solvers/test_judge.py", "-k", "not_finite"),
    ),
    Mutation(
        "a residual lost in the rounding of x believed where n is large", "solvers/judging/error.py",
        "return doubtful & (residual.norm(dim=-1) <= 8 * eps * moved)", "return doubtful & (residual.norm(dim=-1) < 0 * moved)",
        ("tests/solvers/test_judge.py", "-k", "lost_in_the_rounding or plateau"),
    ),
    Mutation(
        "a kink looked for only where no unknown has moved", "solvers/judging/stationary.py",
        "unmoved = converged & ((x == start) & (solution.residual == 0)).any(dim=-1)", "unmoved = converged & (x == start).all(dim=-1)",
        ("tests/solvers/test_judge.py", "-k", "kink"),
    ),
    Mutation(
        "L-BFGS follows an objective that falls without end", "solvers/lbfgs.py",
        "torch.where(state.endless, int(Status.DIVERGED), verdict)", "torch.where(state.endless, int(Status.RUNNING), verdict)",
        ("tests/solvers/test_judge.py", "-k", "without_end"),
    ),
    Mutation(
        "a saddle taken for a minimum", "solvers/newton.py",
        "status=torch.where(doubtful & saddle,", "status=torch.where(doubtful & ~doubtful,", ("tests/solvers/test_newton.py", "-k", "saddle or maximum"),
    ),
    Mutation(
        "the second loop of L-BFGS adds where it should take away", "solvers/lbfgs.py",
        "share - (y * r)", "share + (y * r)", ("tests/solvers/test_lbfgs.py", "-k", "inverse_hessian"),
    ),
    Mutation(
        "momentum left out", "solvers/gradient_descent.py",
        "self.momentum * state.momentum + state.residual if", "0 * state.momentum + state.residual if", ("tests/test_acceptance.py", "-k", "heavy_ball"),
    ),
    # Calls, policies, problems.
    Mutation(
        "a failed backward solve never looked at", "layers/call.py",
        "shaped = apply_policy(report, shaped, settings.on_failure,", "shaped = shaped if report else apply_policy(report, shaped, settings.on_failure,",
        ("tests/test_failures.py", "-k", "test_backward_failures"),
    ),
    Mutation(
        "a failed backward solve raised though it was asked not to be", "layers/call.py",
        "shaped = apply_policy(report, shaped, settings.on_failure,", 'shaped = apply_policy(report, shaped, "raise",', ("tests/test_failures.py", "-k", "test_backward_failures"),
    ),
    Mutation(
        "one failed problem spoils its batch", "policy.py",
        'torch.where(failed.unsqueeze(-1), torch.full_like(x, float("nan")), x)', 'torch.full_like(x, float("nan"))',
        ("tests/test_failures.py", "-k", "one_failed_problem"),
    ),
    Mutation(
        "the adjoint's warm start lost", "layers/call.py",
        "begun = None if product is None else self._start(rhs)", "begun = None", ("tests/test_problem.py", "-k", "warm_starts_of"),
    ),
    Mutation(
        "the adjoint not kept", "layers/call.py",
        "on_adjoint = settings.on_adjoint if product is not None else None", "on_adjoint = None", ("tests/test_problem.py", "-k", "closed_form"),
    ),
    Mutation(
        "the inner warm start lost", "problems/problem.py", "replace(self._warm, inner=last, multipliers=multipliers)", "replace(self._warm, inner=None, multipliers=multipliers)", ("tests/test_problem.py", "-k", "warm_starts_of"),
    ),
    Mutation(
        "a sum for a mean over a batch of problems", "problems/hypergradient.py",
        "value = outer_losses(problem, solution.value, theta, prepared, policy).mean()",
        "value = outer_losses(problem, solution.value, theta, prepared, policy).sum()",
        ("tests/test_problem.py", "-k", "mean_of_its_members"),
    ),
    Mutation(
        "the outer value corrected the wrong way", "problems/hypergradient.py",
        "corrected = corrected - (q", "corrected = corrected + (q", ("tests/test_problem.py", "-k", "certified_bound"),
    ),
    Mutation(
        "a bound without the inner error", "certificates/_bounds.py",
        "return Split.of((l_f + l_h * size) * epsilon / mu, r_lin / mu)", "return Split.of(0 * epsilon, r_lin / mu)", ("tests/test_problem.py", "-k", "inner_error_alone"),
    ),
    Mutation(
        "a bound without what is left at the better point", "certificates/_errors.py",
        "total = distance * (1 + slack) + remainder.value", "total = distance * (1 + slack)", ("tests/certificates/test_route.py", "-k", "bounds_are_tight"),
    ),
    Mutation(
        "a bound with B's norm of another point", "certificates/_errors.py",
        "(norm_b + l_b * step)", "(norm_b + 0 * step)", ("tests/certificates/test_bounds.py", "-k", "norm_of_b"),
    ),
    Mutation(
        "a curvature that is the same everywhere", "certificates/_errors.py",
        "bounds.curvature_there(curvature, l_h, step),", "curvature,", ("tests/certificates/test_route.py", "-k", "same_minimum"),
    ),
    Mutation(
        "a bound whose products are not counted", "certificates/_route.py",
        "self.left -= int(found.iterations.max())", "self.left -= 0", ("tests/certificates/test_route.py", "-k", "products_allowed"),
    ),
    Mutation(
        "any operation taken for one that keeps the degree", "equations/degrees.py",
        "        beyond = math.inf if self.whole > 0 else 0.0\n", "        beyond = self.whole\n",
        ("tests/test_degrees.py", "-k", "proves_nothing"),
    ),
    Mutation(
        "a degree proven behind a stopped gradient", "equations/degrees.py",
        "if (moved and (reads or chosen or cut))", "if (moved and (reads or chosen))",
        ("tests/test_degrees.py", "-k", "stopped or graph"),
    ),
    Mutation(
        "a degree proven of one branch", "equations/degrees.py",
        "(given and (not harmless or", "(given and (",
        ("tests/test_degrees.py", "-k", "reads_a_number"),
    ),
    Mutation(
        "products that do not add degrees", "equations/degrees.py",
        "return Degree(self.whole + other.whole, max(parts, default=NONE))", "return Degree(max(self.whole, other.whole), max(parts, default=NONE))",
        ("tests/test_degrees.py", "-k", "polynomials"),
    ),
    Mutation(
        "slopes of many unknowns that are compared with the slope at zero alone", "solvers/constrained/solve.py",
        "torch.maximum(torch.maximum(first, bent), force)", "torch.maximum(first, force)",
        ("tests/constraints/test_many_bounds.py", "-k", "factorisation"),
    ),
    Mutation(
        "a player's term at its threshold that passes for smooth", "equations/equilibrium.py",
        "margins <= tiny, landed", "margins < -1, landed",
        ("tests/test_proximal_equilibrium.py", "-k", "threshold"),
    ),
    Mutation(
        "unknowns of players that do not end exactly at zero", "layers/equilibrium.py",
        "state.landed, outcome.x)", "torch.minimum(torch.maximum(outcome.x, state.lower), state.upper), outcome.x)",
        ("tests/test_proximal_equilibrium.py", "-k", "ends_exactly_there"),
    ),
    Mutation(
        "multipliers that the next solve does not begin from", "problems/problem.py",
        "self._warm.multipliers if init is None and self.warm_start else {}", "{}",
        ("tests/constraints/test_warm_starts.py", "-k", "minimize_takes"),
    ),
    Mutation(
        "violated equations that move the solution by nothing", "quadratic_programs/_proof.py",
        "e = (off + (r + self.steepness * off) / m)", "e = (r / m)",
        ("tests/quadratic_programs/test_proofs.py", "-k", "by_hand"),
    ),
    Mutation(
        "a duality gap that counts once", "quadratic_programs/_proof.py",
        "(r * r + 4 * m * gap).sqrt()", "(r * r + m * gap).sqrt()",
        ("tests/quadratic_programs/test_proofs.py", "-k", "by_hand"),
    ),
    Mutation(
        "zeros proven as if the gradient at the solution were known", "solvers/composite/proof.py",
        "torch.stack(constants).amin(0) * e +", "0 * torch.stack(constants).amin(0) * e +",
        ("tests/prox/test_proofs.py", "-k", "hold_and_grow"),
    ),
    Mutation(
        "a proof of arguments that have changed", "solvers/composite/proof.py",
        "        if self._changed():", "        if False:",
        ("tests/prox/test_proofs.py", "-k", "changed_since"),
    ),
    Mutation(
        "a cubic taken for quadratic", "certificates/_quadratic.py",
        "inner.whole <= 2", "inner.whole <= 1e400", ("tests/certificates/test_bounds.py", "-k", "quadratic_in_pieces"),
    ),
    Mutation(
        "an outer objective taken for quadratic", "certificates/_quadratic.py",
        "outer.whole <= 2", "outer.whole <= 1e400", ("tests/certificates/test_evidence.py", "-k", "flat or kink"),
    ),
    Mutation(
        "bounds that contradict each other", "certificates/refuting.py",
        "wrong = wrong | (distance", "wrong = wrong & (distance", ("tests/certificates/test_evidence.py", "-k", "agree"),
    ),
    Mutation(
        "a refinement that runs away", "certificates/_inner_point.py",
        "longer = ~((left < r) | (left <= noise)) & (length > 0)", "longer = torch.zeros_like(left, dtype=torch.bool)",
        ("tests/certificates/test_evidence.py", "-k", "run_away"),
    ),
    Mutation(
        "one matrix's failure raised for its batch", "_torch/factorisations.py",
        "    except LinAlgError:\n        made, failed", "    except ZeroDivisionError:\n        made, failed",
        ("tests/certificates/test_evidence.py", "-k", "one_by_one"),
    ),
    Mutation(
        "Newton's method calls a factorisation that raises", "solvers/parts/newton_directions.py",
        "    eigenvalues, vectors = eigh(", "    eigenvalues, vectors = torch.linalg.eigh(",
        ("tests/solvers/test_newton.py", "-k", "spoils_its_own"),
    ),
    Mutation(
        "a kink looked for on one side of it", "solvers/judging/error.py",
        "(slope_above - slope_below - 2 *", "(slope_above - residual - 1 *", ("tests/test_wording.py", "-k", "whichever_side"),
    ),
    Mutation(
        "a kink that another solver found is forgotten", "solvers/judging/judge.py",
        "is_one_of(second.status, (Status.CONVERGED, Status.KINK))", "(second.status == Status.CONVERGED)",
        ("tests/test_wording.py", "-k", "whichever_side"),
    ),
    Mutation(
        "a start on a kink taken for a solution where δ is asked", "solvers/judging/judge.py",
        "still = (status == Status.CONVERGED) & (solution.x == goal.init).all(dim=-1)", "still = torch.zeros_like(reached)",
        ("tests/test_wording.py", "-k", "whatever_accuracy"),
    ),
    Mutation(
        "a singular start called a solution that is not unique", "testing/_steps_solution.py",
        "bilevel.Status.SINGULAR: Defect.SINGULAR_SEARCH", "bilevel.Status.SINGULAR: Defect.SINGULAR",
        ("tests/testing/test_diagnose.py", "-k", "singular_at_the_start"),
    ),
    Mutation(
        "a trusted size for a class of one row", "cleaning/splits.py",
        "if math.ceil(total / max(rarest, 1)) > total - held - fewest:", "if False:",
        ("tests/cleaning/test_command.py", "-k", "remedy_for_a_class"),
    ),
    Mutation(
        "a captured tensor beside bounds called healthy", "testing/_diagnose.py", "    *_STEPS[:5],\n", "    *_STEPS[4:5],\n",
        ("tests/testing/test_diagnose_says_fine.py", "-k", "captured and bound"),
    ),
    Mutation(
        "an outer loss that is NaN called healthy", "testing/_steps_gradient.py", "if not math.isfinite(first):", "if False:",
        ("tests/testing/test_diagnose_says_fine.py", "-k", "NaN"),
    ),
    Mutation(
        "an outer loss at a kink called healthy", "testing/_steps_gradient.py", "        if kink:\n", "        if False:\n",
        ("tests/testing/test_diagnose_says_fine.py", "-k", "outer_loss"),
    ),
    Mutation(
        "an argument lost in a constraint called healthy", "testing/_diagnose.py",
        '    (_steps_constraints.arguments, "the outer tensors"),\n', "",
        ("tests/testing/test_diagnose_constraints.py", "-k", "argument"),
    ),
    Mutation(
        "a solution of zero called unconverged", "testing/_steps_solution.py",
        "max(float(x.norm()), float((x - start).norm()))", "float(x.norm())",
        ("tests/testing/test_diagnose_says_fine.py", "-k", "zero_is_stationary"),
    ),
    Mutation(
        "a symmetry called singular", "testing/_steps_gradient.py",
        "        seen.replace(Defect.SINGULAR", "        _ = (Defect.SINGULAR", ("tests/testing/test_diagnose.py", "-k", "free_shift"),
    ),
    Mutation(
        "matrices that are not finite", "_torch/factorisations.py",
        "safe = torch.where(finite[..., None, None], matrix, unit)", "safe = matrix",
        ("tests/certificates/test_evidence.py", "-k", "each_matrix or trouble"),
    ),
    Mutation(
        "a goal given up at negative curvature", "problems/adaptive/search.py",
        "        if self._stretches >= _MOST_STRETCHES:\n", "        if True:\n", ("tests/test_goal.py", "-k", "negative_curvature"),
    ),
    Mutation(
        "a remedy that does not name the inner solver", "problems/adaptive/state.py",
        "if self.inner is not None and not self.inner.success and self.inner is not Status.INDEFINITE:", "if False:", ("tests/test_goal.py", "-k", "remedy"),
    ),
    Mutation(
        "an error estimated from one step, however far off", "certificates/_certificate.py",
        "_CONTRACTION, _MOST_STEPS = 0.1,", "_CONTRACTION, _MOST_STEPS = 1e9,", ("tests/certificates/test_bounds.py", "-k", "contracted"),
    ),
    # iMAML.
    Mutation(
        "the proximal term without its half", "meta/imaml.py",
        "return fit + lam * half_square(", "return fit + 2 * lam * half_square(", (IMAML, "-k", "quadratic_tasks"),
    ),
    Mutation(
        "the sum of the tasks' losses", "meta/imaml.py",
        "loss = torch.cat(losses).mean()", "loss = torch.cat(losses).sum()", (IMAML, "-k", "quadratic_tasks"),
    ),
    Mutation(
        "adaptation that begins at zero", "meta/imaml.py",
        "{name: value.detach().expand(count", "{name: torch.zeros_like(value).expand(count", (IMAML, "-k", "steps_of_the_paper"),
    ),
    Mutation(
        "the query's loss on the support", "meta/imaml.py",
        'by_parts(functools.partial(self._judge, data["fixed"]), adapted, data["query"])', 'by_parts(functools.partial(self._judge, data["fixed"]), adapted, data["support"])',
        (IMAML, "-k", "quadratic_tasks"),
    ),
    Mutation(
        "the released code's procedure for the paper's: 2v + Hv/12 in place of v + Hv/2", "meta/imaml.py",
        'if mode == "released":', "if True:", (IMAML, "-k", "steps_of_the_paper"),
    ),
    Mutation(
        "the paper's linear system for the released code's", "meta/released.py",
        "shift = (1 + self.c) * (self.lam + self.d) - self.lam", "shift = 0.0", (IMAML, "-k", "released_procedure"),
    ),
    # The fault after the linear layer.
    Mutation(
        "the linear layer's right-hand side taken for a constant", "layers/linear_layer.py",
        "call.look), False, flat, point,", "call.look), False, flat.detach(), point,", (LINEAR, "-k", "gradcheck"),
    ),
    Mutation(
        "the linear layer's matrix transposed", "layers/linear_layer.py",
        "call.look), False, flat, point,", "call.look), True, flat, point,", (LINEAR, "-k", "test_the_grid and triangular and default"),
    ),
    Mutation(
        "a trail whose weights do not sum to one", "outer/trail.py",
        "weights[nearest] = 1.0 - weights.sum()", "weights[nearest] = 1.0", (OUTER, "-k", "trail"),
    ),
    Mutation(
        "a setting that reaches the calls before it", "layers/settings.py",
        "owner._settings = replace(owner._settings, **{self._name: value})", "object.__setattr__(owner._settings, self._name, value)",
        ("tests/test_settings.py", "-k", "test_the_tolerance_of"),
    ),
    Mutation(
        "an answer that is given replaced by the last one", "layers/layer.py",
        "transforms_active() and not settings.start_matters", "transforms_active()", ("tests/test_differentiation.py", "-k", "judged_itself"),
    ),
    Mutation(
        "Newton's step in place of the layer's own at a given answer", "layers/differentiation.py",
        "solver = solver.own if isinstance", "solver = solver if isinstance",
        ("tests/test_differentiation.py", "-k", "layer_s_own_solver"),
    ),
    Mutation(
        "a warm start shortens what is unrolled", "layers/settings.py",
        "return by_path or isinstance", "return isinstance", ("tests/test_differentiation.py", "-k", "does_not_shorten"),
    ),
    Mutation(
        "all problems of a batch unrolled for the steps of the slowest", "layers/differentiation.py",
        "x = moved if taken.each is None else", "x = moved if True else", ("tests/test_differentiation.py", "-k", "own_steps"),
    ),
    Mutation(
        "the derivative of a failed problem's steps is finite", "layers/layer.py",
        "answer, taken) * (1 + 0 * answer)", "answer, taken) + 0 * answer", ("tests/test_differentiation.py", "-k", "failed_problem_is_nan_under"),
    ),
    Mutation(
        "a residual that overflows at both bounds has a rounding of zero", "solvers/bracketing.py",
        "torch.isinf(f_high), torch.nan, size)", "torch.isinf(f_high), size, size)", ("tests/solvers/test_bracketing.py", "-k", "overflows"),
    ),
    Mutation(
        "a recursive estimate kept while the point moves", "stochastic/vrbo.py",
        "last, self._estimate = self._estimate, []", "last = self._estimate", ("tests/stochastic/test_misuse.py", "-k", "recursive_estimate"),
    ),
    Mutation(
        "an outer loop shortens what is unrolled", "problems/problem.py",
        "        if self._settings.start_matters:\n            return\n", "", ("tests/test_outer.py", "-k", "unrolls_every_step"),
    ),
    Mutation(
        "a random preparation goes unnoticed", "problems/definition.py",
        "poisoned = watch.ended(on_failure)", "poisoned = False", ("tests/test_differentiation.py", "-k", "random_preparation"),
    ),
    Mutation(
        "a layer's own settings in place of the call's", "layers/layer.py",
        "return SolveCall(settings,", "return SolveCall(self._settings,", ("tests/test_problem.py", "-k", "closed_form"),
    ),
    Mutation(
        "what a result computes later at another theta", "pytree.py",
        "made = copied(tree)", "made = detached(tree)", ("tests/test_settings.py", "-k", "computes_later"),
    ),
    Mutation(
        "a bound of data that were changed in place", "problems/result.py",
        "if any(tensor._version != version for", "if any(tensor._version < 0 for", ("tests/test_settings.py", "-k", "changed_in_place"),
    ),
    Mutation(
        "a pass of few tasks held to the accuracy of few", "meta/imaml.py",
        "inspect=number == 0, tolerance=tolerance)", "inspect=number == 0)", ("tests/test_settings.py", "-k", "in_parts"),
    ),
    Mutation(
        "a warm start that decides the dtype", "problems/warm_start.py",
        "[a.to(b) for a, b in", "[a for a, b in", ("tests/test_settings.py", "-k", "decide_the_dtype"),
    ),
    Mutation(
        "a tensor without a connection found in the first call alone", "problems/problem.py",
        "if not cut or policy in", "if policy or policy in", ("tests/test_settings.py", "-k", "found_in_every_call"),
    ),
    Mutation(
        "a warm start that is not wanted", "problems/problem.py",
        "return self._warm if self.warm_start else WarmStart()", "return self._warm",
        ("tests/test_settings.py", "-k", "without_warm_starts"),
    ),
    Mutation(
        "a batch's adjoint begun from K times too large", "problems/problem.py",
        "adjoint=flat / max(1, len(flat))", "adjoint=flat", ("tests/test_problem.py", "-k", "told"),
    ),
    Mutation(
        "errors of goals forgotten where nothing is measured", "problems/adaptive/state.py",
        "        if not stepped:\n", "        if False:\n", ("tests/test_goal.py", "-k", "trusted"),
    ),
    Mutation(
        "a norm that counts as zero taken for the error allowed", "tolerance.py",
        "else self.stationary - norm", "else self.stationary", ("tests/test_goal.py", "-k", "allows"),
    ),
    Mutation(
        "steps along one line all taken for new", "outer/trail.py",
        "if row[j] > _LEAST_NEW**2 * gram[j, j] > 0:", "if row[j] > 1e-14 * gram[j, j] > 0:", (OUTER, "-k", "trail"),
    ),
    Mutation(
        "the pseudo-inverse stands in for LU where a program's matrix is regular", "quadratic_programs/_kkt.py",
        "for t in (self.suspect, values, vectors, null))\n",
        "for t in (self.suspect, values, vectors, null)) if False else (self.suspect, values, vectors, null)\n",
        ("tests/quadratic_programs/test_derivatives.py", "-k", "parallel"),
    ),
    Mutation(
        "a callback may move the point of a run", "outer/run.py",
        "    if versions != [t._version for t in shown]:", "    if False:", (OUTER, "-k", "changes_the_point"),
    ),
    Mutation(
        "a path takes over from Newton's method in games only after all its steps", "solvers/defaults.py",
        "return _BRIEF_NEWTON, ", "return _NEWTON, ", ("tests/test_matrix_games.py", "-k", "takes_over"),
    ),
    Mutation(
        "steps of ProjectedLBFGS do not grow along a line", "solvers/projected_lbfgs.py",
        "_FIRST, _GROWTH = 0.01, 4.0", "_FIRST, _GROWTH = 0.01, 1.0", ("tests/constraints/test_many_bounds.py", "-k", "no_solution"),
    ),
    Mutation(
        "a module's hyperparameters left behind by minimize", "outer/run.py",
        "                    parameter.copy_(of_real(value, parameter))\n", "                    pass\n", (OUTER, "-k", "module"),
    ),
    Mutation(
        "instructions that are not on the list passed over", "replay/reading.py",
        "if not is_known_step(step):", "if False:", ("tests/test_straight.py",),
    ),
    Mutation(
        "a list of instructions for any version of Python", "replay/opcodes.py",
        "_BY_VERSION.get(version, ())", "_BY_VERSION.get(version, _BY_VERSION[3, 11])", ("tests/test_straight.py", "-k", "instruction"),
    ),
    Mutation(
        "other ways to call a module passed over", "replay/pure_modules.py",
        "if any(getattr(kind, name, None) is not value for name, value in _CALL.items()):", "if False:", (STALE, "-k", "called"),
    ),
    Mutation(
        "a call that one module keeps passed over", "replay/pure_modules.py",
        'if "forward" in own or any(own.get(name) is not None for name in _CALL):', 'if "forward" in own:', (STALE, "-k", "called"),
    ),
    Mutation(
        "operators of a module passed over", "replay/pure_modules.py",
        "return all(name in _SPECIAL or not _is_special(name) for base in ours for name in vars(base))", "return True", (STALE, "-k", "operators_of_a_module"),
    ),
    Mutation(
        "functions below torch's own modules that are set anew passed over", "replay/pure_modules.py",
        "if any(getattr(holder, name, None) is not value for holder, name, value in _KNOWN[kind]):", "if False:", (STALE, "-k", "called"),
    ),
    Mutation(
        "operators of tensors that are set anew passed over", "replay/purity.py",
        "if not operators_are_torch_s():", "if False:", (STALE, "-k", "operators_of_tensors"),
    ),
    Mutation(
        "tensors that are printed passed over", "replay/recorder.py",
        "\"a tensor was printed\" if printed.any else \"\"", "\"\"", (STALE, "-k", "print"),
    ),
    Mutation(
        "random numbers of another thread taken for the call's own", "layers/randomness.py",
        "        evaluate()\n    return seen.any", "        evaluate()\n    return True", (GUARDS, "-k", "other_threads or counts"),
    ),
    Mutation(
        "an operation with a generator of its own taken for a draw", "layers/randomness.py",
        'given.get("generator") is None and ', "", (GUARDS, "-k", "counts"),
    ),
    Mutation(
        "torch's compiler imported to note a run", "replay/recorder.py",
        "        return False\n\n    def __init__(self, inputs", "        return True\n\n    def __init__(self, inputs", ("tests/test_import.py", "-k", "again"),
    ),
    Mutation(
        "dead wrappers left on what a rule saved", "_torch/reverse.py",
        "_functorch.unwrap_if_dead(tensor)", "tensor", cells("Two transforms, grad of vjp", "argmin with bounds, single, float64"),
    ),
    Mutation(
        "a checkpoint inside a function let in", "_torch/transforms.py",
        "control._saved_tensors_hooks_disable(_HOOKS_REFUSED, False)  # False", "pass  # False",
        ("tests/test_checkpoints.py", "-k", "inside_a_function_a_second and single"),
    ),
    Mutation(
        "functions called with a batch of no problems", "_torch/empty_batches.py",
        "return transforms_active() is not None and any(", "return False and any(", ("tests/test_empty_batches.py",),
    ),
    Mutation(
        "sympy imported for a product", "_torch/reverse.py",
        "found = _engine_run_backward(", "import sympy\n        found = _engine_run_backward(", ("tests/test_import.py", "-k", "again"),
    ),
    Mutation(
        "what a function reaches not compared", "replay/inspection_cache.py",
        "and all(map(_is, objects, parts))", "", ("tests/test_straight.py",),
    ),
    Mutation(
        "an object reached from two places taken for one", "replay/purity.py",
        '        parts.extend(followed[0])', '        parts += [part for part in followed[0] if not any(part is p for p in parts)]', ("tests/test_straight.py",),
    ),
    Mutation(
        "random numbers that a solve draws after a look passed over", "layers/randomness.py",
        "(error is None and self.changed())", "False", ("tests/test_straight.py",),
    ),
    Mutation(
        "the first step of an outer search shortened no more often than later ones", "outer/methods.py",
        '(1 if "taken" in memory or method.step is not None else 5)', "1", (OUTER, "-k", "units_far_below"),
    ),
    Mutation(
        "a complex outer loss handed to autograd", "problems/outer_loss.py",
        "loss.ndim == 0 and not loss.is_floating_point()", "False", (OUTER, "-k", "not_real"),
    ),
    Mutation(
        "a residual flat around the start said to need a start beside it", "layers/messages.py",
        "_FLAT if flat else _singular", "_singular", ("tests/test_wording.py", "-k", "flat_around"),
    ),
    Mutation(
        "MAID's doubts settled by exacter values alone", "outer/methods.py",
        "fall + doubt < promised or not doubt >", "fall + doubt < promised or not doubt > 0 *", (OUTER, "-k", "shortened"),
    ),
    Mutation(
        "a tensor of the first part that the second part reads written over", "replay/memory.py",
        "for number in (*given, *outputs, *tape.constants)}", "for number in (*given, *outputs[:1], *tape.constants)}", (TAPES,),
    ),
    Mutation(
        "results of tensors whose numbers may change made once", "replay/folding.py",
        "all(number in made for number in step.reads)", "all(number in {**tape.constants, **made} for number in step.reads)", (TAPES,),
    ),
    Mutation(
        "a result that belongs to the caller made once", "replay/folding.py",
        " and tape.layouts[step.makes[0]].memory not in outward:", ":", (TAPES,),
    ),
    Mutation(
        "a line search that doubles every step that was accepted", "solvers/gradient_descent.py",
        "longer = along >= _KEPT_SLOPE * slope", "longer = along == along", ("tests/solvers/test_gradient_descent.py", "-k", "few_more"),
    ),
    Mutation(
        "a line search that takes any step", "solvers/gradient_descent.py",
        "held = value <= torch.addcmul(begun, lr, slope, value=-_ARMIJO)", "held = value == value",
        ("tests/solvers/test_gradient_descent.py", "-k", "every_step"),
    ),
    Mutation(
        "a residual judged by the first bound of its floor", "linear/_judge.py",
        "        if bool((within | ~asked).all()):", "        if True:", ("tests/linear/test_base.py", "-k", "floor"),
    ),
    Mutation(
        "arguments of a program written over", "replay/memory.py",
        "for number in (*given, *outputs, *tape.constants)}", "for number in (*outputs, *tape.constants)}", (TAPES,),
    ),
    Mutation(
        "a tensor written over that a view of it still needs", "replay/memory.py",
        "last = {memory[number]: place for", "last = {number: place for", (TAPES,),
    ),
    Mutation(
        "a tensor written over by a result of another layout", "replay/memory.py",
        "fits = tape.layouts[over][2:] == tape.layouts[step.makes[0]][2:]", "fits = True", (TAPES,),
    ),
    Mutation(
        "what a noted run reads from tensors passed over", "replay/recorder.py",
        "    return not _OPEN.isdisjoint(func.tags)", "    return False", (TAPES,),
    ),
    Mutation(
        "a mask taken for places", "replay/recorder.py",
        "        return any(index is not None and index.dtype not in _WHOLE for index in args[1])", "        return False", (TAPES,),
    ),
    Mutation(
        "tensors from nowhere taken for constants", "replay/recorder.py",
        'known = self._found or (tensor.ndim == 0 and tensor.device.type == "cpu")', "known = True", (TAPES,),
    ),
    Mutation(
        "arguments in one memory taken for one", "replay/recorder.py",
        "        if _memory(tensor) in met:", "        if False:", (TAPES, "tests/test_replay.py"),
    ),
    Mutation(
        "an argument that is written to passed over", "replay/recorder.py",
        "any(_memory(t) in self._given for t in _changed(func, args, kwargs))", "False", (TAPES,),
    ),
    Mutation(
        "views in place noted as they are", "replay/recorder.py",
        "        operation = _VIEWS.get(func, func)", "        operation = func", (TAPES,),
    ),
    Mutation(
        "a check that makes nothing left out of a program", "replay/tape.py",
        " or (not step.makes and here(step))", "", (TAPES, "tests/test_replay.py"),
    ),
    Mutation(
        "the reason why a call is not replayed lost", "layers/inspector.py",
        "self._last = inspection.replays or inspection.reason\n        return inspection\n", "return inspection\n", ("tests/test_replay_reasons.py",),
    ),
    Mutation(
        "the operation that ended a recording not named", "replay/recorder.py",
        "self._stopped = self._stopped or reason", "self._stopped = 'it cannot be recorded'", ("tests/test_replay_reasons.py",),
    ),
    Mutation(
        "replays relied on without a comparison", "replay/cache.py",
        "enumerate(map(_same, found, expected)) if not agreed", "enumerate(map(_same, found, expected)) if False", ("tests/test_replay.py", TAPES),
    ),
    Mutation(
        "attributes that are not on the list passed over", "replay/purity.py",
        'name in ATTRIBUTES and (', '(', ("tests/test_replay.py", "tests/test_replay_reading.py"),
    ),
    Mutation(
        "what a problem keeps not told apart", "replay/purity.py",
        '(objects, [*named, *own])', '(objects, named)', ("tests/test_replay.py",),
    ),
    Mutation(
        "hooks of modules passed over", "replay/pure_modules.py",
        " or any(own[hooks] for hooks in _HOOKS)", "", ("tests/test_replay.py",),
    ),
    Mutation(
        "a module's settings not told apart", "replay/pure_modules.py",
        'named += [name, tuple(value) if type(value) is list else value]', 'named += []', ("tests/test_replay_reading.py",),
    ),
    Mutation(
        "replays where a debugger steps through", "_torch/transforms.py",
        "        or sys.gettrace() is not None  # a debugger steps through it\n", "", ("tests/test_replay.py",),
    ),
    Mutation(
        "dtypes that torch takes by default not told apart", "layers/inspector.py",
        "torch.get_default_dtype(),", "", ("tests/test_replay.py",),
    ),
    Mutation(
        "replays that cannot be switched off", "layers/inspector.py",
        "    if not allowed():", "    if False:", ("tests/test_replay.py",),
    ),
    Mutation(
        "the error of a goal's hypergradient underestimated after full accuracy", "problems/adaptive/direct.py",
        "looked=known.looks > 0).estimate(here)\n", "looked=known.looks > 0).estimate(here)\n    bound = replace(bound, value=0.0)\n", ("tests/test_goal.py", "-k", "sensitive"),
    ),
    Mutation(
        "the error of a goal's hypergradient measured in each call", "problems/adaptive/direct.py",
        "    if known is not None and known.slope:\n", "    if False:\n", ("tests/test_goal.py", "-k", "measured_once"),
    ),
    Mutation(
        "the error of a goal's hypergradient trusted for ever", "problems/adaptive/direct.py",
        "known.age(older, stepped=False, solved=False)", "known.age(older, stepped=True, solved=True)", ("tests/test_goal.py", "-k", "measured_once"),
    ),
    Mutation(
        "the error of a goal's hypergradient trusted anywhere", "problems/adaptive/direct.py",
        "<= _NEAR * float(", "<= 1e9 * float(", ("tests/test_goal.py", "-k", "far_away"),
    ),
    Mutation(
        "data prepared in every evaluation of a goal", "problems/hypergradient.py",
        "        if problem.prepare is not None:\n", "        if False:\n", ("tests/test_goal.py", "-k", "prepared_once"),
    ),
    Mutation(
        "a preparation's captures not looked for with a goal", "problems/definition.py",
        "            check_captures(self.where, tensor, leaves, given, on_failure)\n", "            pass\n", ("tests/test_goal.py", "-k", "preparation_captures"),
    ),
    Mutation(
        "searches for goals not replayed", "problems/adaptive/search.py",
        "lower.tensors, replays=lower.replays)", "lower.tensors)", ("tests/test_goal.py", "-k", "records_nothing"),
    ),
    Mutation(
        "a root's error by factors of a Jacobian that changes", "solvers/parts/newton_error.py",
        "return error if bool(known.all() & state.definite.all()) else None", "return error", ("tests/zoo/test_issue_inputs.py", "tests/solvers"),
    ),
    Mutation(
        "sizes of batches not told apart", "layers/inspector.py",
        "tuple([(level.size, level.batched) for level", "tuple([level.batched for level", ("tests/test_replay.py",),
    ),
    Mutation(
        "what a run finds taken for what it makes", "replay/cache.py",
        "return not program.shares_constants(again)", "return True", ("tests/test_replay.py",),
    ),
    Mutation(
        "arrays that a vouched function makes outside of torch taken for tensors that last", "replay/cache.py",
        "return program.finds_what_lasts(again)", "return True", ("tests/test_replay.py", "-k", "wrong_promise"),
    ),
    Mutation(
        "a tensor that a vouched function reaches comes to require grad unseen", "layers/inspector.py",
        "if replays is not None and not replays.needs_grad and not isinstance(known, str):", "if replays is not None and not isinstance(known, str):", ("tests/test_replay.py", "-k", "vouched"),
    ),
    Mutation(
        "functions that can be followed taken on trust", "replay/purity.py",
        "        parts = follow(function)\n", "        parts = '' if static else follow(function)\n", ("tests/test_replay.py", "-k", "on_trust"),
    ),
    Mutation(
        "functions that the user vouches for passed over", "layers/layer.py",
        "Inspector(static=static)", "Inspector()", ("tests/test_replay.py", "-k", "vouch"),
    ),
    Mutation(
        "tensors changed before a derivative passed over", "replay/program.py",
        "        if now != self.versions and any(", "        if False and any(", ("tests/test_replay.py",),
    ),
    Mutation(
        "an object that is handed on taken for its names", "replay/reading.py",
        '                if not taken or not _only_loads(step, first):\n', '                if not taken:\n                    continue\n                if False:\n', ("tests/test_replay.py",),
    ),
    Mutation(
        "what a class makes of a name passed over", "replay/pure_modules.py",
        'if of_class is not _NOWHERE and type(of_class) not in constants:', 'if isinstance(of_class, FunctionType):', ("tests/test_replay_reading.py",),
    ),
    Mutation(
        "keys that are more than names passed over", "replay/purity.py",
        ' or not all(type(key) in _KEYS for key in structure.context or ())', '', ("tests/test_replay_reading.py",),
    ),
    Mutation(
        "variables around a function that it sets passed over", "replay/reading.py",
        'if step.opname in ("STORE_DEREF", "DELETE_DEREF") and', 'if False and', ("tests/test_replay_reading.py",),
    ),
    Mutation(
        "operations on tensors that are set anew passed over", "replay/purity.py",
        'getattr(torch.Tensor, name) is AS_IMPORTED[name]', 'True', ("tests/test_replay_reading.py",),
    ),
    Mutation(
        "a model's numbers that are named like an operation passed over", "replay/pure_modules.py",
        ' and not _looks_like_a_tensor(part)', '', ("tests/test_replay_reading.py",),
    ),
    Mutation(
        "tuples that are kept with what is in them", "replay/purity.py",
        'followed = [tuple, len(item)], list(item)', 'followed = [item], list(item)', ("tests/test_replay.py",),
    ),
    # Anderson acceleration.
    Mutation(
        "no plain run beneath Anderson acceleration", "solvers/anderson.py",
        "if self.steps in self.turns:", "if self.steps in ():", (ANDERSON, "-k", "beneath"),
    ),
    Mutation(
        "an acceleration that breaks down is not taken over by the plain run", "solvers/anderson.py",
        "self._switch(lost & ~over)", "self._switch(lost & over)", (ANDERSON, "-k", "takes_over"),
    ),
    Mutation(
        "every mixture is accepted", "solvers/anderson.py",
        "torch.where(mixed, self.bound, self.ceiling)", "self.ceiling", (ANDERSON, "-k", "plain_iteration_solves"),
    ),
    Mutation(
        "a mixture is returned in place of T of it", "solvers/anderson.py",
        "self.whole & (self.polishes >= _POLISHES)", "self.whole", (ANDERSON, "-k", "lasso or probabilities"),
    ),
    Mutation(
        "the last step of a budget is a mixture", "solvers/anderson.py",
        "if self.steps == self.budget:", "if self.steps == -1:", (ANDERSON, "-k", "budget"),
    ),
    Mutation(
        "a fixed point's run at rounding level goes on", "solvers/fixed_point.py",
        "ended = stalled & ((residual", "ended = ~stalled & stalled & ((residual", (ANDERSON, "-k", "rounding_ends"),
    ),
    # Dtypes and layouts.
    Mutation(
        'dtypes: imaginary parts change their sign', 'pytree.py',
        'torch.complex(pairs[..., 0], pairs[..., 1])',
        'torch.complex(pairs[..., 0], -pairs[..., 1])',
        ('tests/test_complex.py', '-k', 'follow'),
    ),
    Mutation(
        'dtypes: a conjugate view is not resolved', 'pytree.py',
        'torch.view_as_real(tensor.resolve_conj())',
        'torch.view_as_real(tensor)',
        ('tests/test_complex.py', '-k', 'odd_places'),
    ),
    Mutation(
        'dtypes: an imaginary part is dropped without a word', 'pytree.py',
        'if leaf.is_complex() and not dtype.is_complex:',
        'if False:',
        ('tests/test_complex.py', '-k', 'has_to_be'),
    ),
    Mutation(
        'dtypes: replays take complex tensors for pairs', 'layers/inspector.py',
        'given.is_tensor, given.is_complex,',
        'given.is_tensor,',
        ('tests/test_complex.py', '-k', 'from_pairs'),
    ),
    Mutation(
        'dtypes: complex outer variables do not move', 'pytree.py',
        '(leaf.is_floating_point() or leaf.is_complex())',
        'leaf.is_floating_point()',
        ('tests/test_complex.py', '-k', 'hypergradients'),
    ),
    Mutation(
        'dtypes: a misuse of dtypes is gone on with', 'layers/call.py',
        'isinstance(error, (ValueError, TypeError))',
        'isinstance(error, ValueError)',
        ('tests/test_failures.py', '-k', 'misfits and complex'),
    ),
    Mutation(
        "sparse: the construction is torch's own", '_torch/sparse.py',
        '    torch.sparse_coo_tensor: _sparse_coo_tensor,\n',
        '',
        ('tests/test_sparse.py', '-k', 'derivatives_by_the_values'),
    ),
    Mutation(
        "sparse: products with a matrix of values are torch's own", '_torch/sparse.py',
        '        if _made_of_entries(*args):\n            return _entry',
        '        if False:\n            return _entry',
        ('tests/test_sparse.py', '-k', 'derivatives_by_the_values'),
    ),
    Mutation(
        'sparse: a compressed constant stays so', '_torch/sparse.py',
        '        return item.to_sparse_coo()',
        '        return item',
        ('tests/test_sparse.py', '-k', 'compressed_constant'),
    ),
    Mutation(
        'sparse: what the arguments go through is not learned', 'equations/problem.py',
        'record_graph_features(system.function, nodes(values))',
        'pass',
        ('tests/test_sparse.py', '-k', 'few_values'),
    ),
    Mutation(
        'once: rewritten operations only where the unknown goes through them', 'equations/system.py',
        'with WrittenNorms(), Repeatable():\n            return grad(',
        'with WrittenNorms():\n            return grad(',
        ('tests/test_sparse.py', '-k', 'fused_norm'),
    ),
    Mutation(
        "once: a transform hides the user's Function", '_torch/once_differentiable.py',
        'kind = closed.get("autograd_function")',
        'kind = None',
        ('tests/test_sparse.py', '-k', 'marked'),
    ),
    Mutation(
        'once: a second derivative is not looked at', 'implicit.py',
        '        if again:\n            refuse_once_only(system.where',
        '        if False:\n            refuse_once_only(system.where',
        ('tests/test_sparse.py', '-k', 'marked'),
    ),
    Mutation(
        "once: a sparse argument's graph is not looked at", 'implicit.py',
        'for tensor in system.sparse(tensors) if again else ():',
        'for tensor in ():',
        ('tests/test_sparse.py', '-k', 'argument_made'),
    ),
    Mutation(
        'once: products J v are not looked at', 'implicit.py',
        'if not (transposed or rule.system.symmetric):',
        'if False:',
        ('tests/test_sparse.py', '-k', 'marked'),
    ),
    Mutation(
        'once: an outer objective is not looked at', 'problems/outer_loss.py',
        '    _refuse_again(where, losses, given)\n',
        '',
        ('tests/test_sparse.py', '-k', 'outer_objective'),
    ),
    Mutation(
        "numpy is spoken of in torch's words", 'equations/function_errors.py',
        'return "call numpy() on Tensor" in said or "numpy.ndarray" in said',
        'return False',
        ('tests/test_sparse.py', '-k', 'numpy'),
    ),
    # The judge of convergence.
    Mutation(
        "no error in x is too large", "solvers/judging/weighing.py",
        "within = (error <= allowed).all(dim=-1) & (found.solved | unknown)", "within = (error <= allowed * 1e9).all(dim=-1)",
        ("tests/solvers/test_error.py", "-k", "hang_on"),
    ),
    Mutation(
        "an estimate believed that solves nothing", "solvers/judging/weighing.py",
        "& (found.solved | unknown)", "", ("tests/zoo/test_issue_inputs.py", "-k", "singular_at_the_start"),
    ),
    Mutation(
        "a runaway taken for a solution that is not unique", "solvers/judging/weighing.py",
        "return ~_is_solved(problem, near, allowed) & ", "return torch.zeros_like(residual[:, 0], dtype=torch.bool) & ",
        ("tests/solvers/test_error.py", "-k", "ran_away"),
    ),
    Mutation(
        "a tensor without numbers reaches a solver", "layers/layer.py", 'if raveler.device.type == "meta":', "if False:",
        ("tests/test_guard_rails.py", "-k", "without_numbers"),
    ),
    Mutation(
        "a rotation of a cluster taken for an ill-determined direction", "solvers/judging/error.py", "_SHORT_TANGENT = 10", "_SHORT_TANGENT = 2",
        ("tests/linear/test_minimum_norm.py", "-k", "springs"),
    ),
    Mutation(
        "a search that ran down a bell believed, and one of a scale-free objective not", "solvers/judging/weighing.py",
        "near, beyond = x - found.null_part + share * found.null_part, ", "near, beyond = x - found.null_part, ",
        ("tests/linear/test_minimum_norm.py", "-k", "scale"),
    ),
    Mutation(
        "an x whose last place is larger than delta", "solvers/judging/judge.py",
        "if bool(blind.any()):\n            status = torch.where(blind, blind_status(problem, solution", "if False:\n            status = torch.where(blind, blind_status(problem, solution", ("tests/solvers/test_error.py", "-k", "rounds_by"),
    ),
    Mutation(
        "kinks are passed over", "solvers/judging/stationary.py",
        "kinked = doubtful & has_kink(problem, solution.x, solution.residual)", "kinked = doubtful & False",
        ("tests/zoo/test_issue_inputs.py", "-k", "local_maximum_at_a_kink"),
    ),
    Mutation(
        "kinks without a finite Hessian are passed over", "solvers/judging/error.py",
        "operator.matvec(reach * signs).nan_to_num(0.0, 0.0, 0.0)", "operator.matvec(reach * signs)",
        ("tests/test_wording.py", "-k", "without_a_finite_hessian"),
    ),
    Mutation(
        "a large maximum at the start passed over", "solvers/judging/stationary.py",
        "curved = still & meets_negative_curvature(problem, x, still)", "curved = still & False",
        ("tests/zoo/test_issue_inputs.py", "-k", "maxim"),
    ),
    Mutation(
        "nobody takes over from a failed default", "solvers/judging/judge.py",
        "if others and not trial.settled:", "if False:", ("tests/solvers/test_error.py", "-k", "hands_over"),
    ),
    Mutation(
        "values that round decide Newton's last steps", "solvers/parts/newton_search.py",
        "(ratio < 0.5) & falls | steady", "steady", ("tests/zoo/test_issue_inputs.py", "-k", "rounding_inside"),
    ),
    Mutation(
        "a descent from a flat tail diverges", "solvers/_base.py",
        "torch.full_like(norm, torch.inf) if descends else", "", ("tests/solvers/test_error.py", "-k", "flat_tail"),
    ),
    Mutation(
        "rtol is a setting without effect", "tolerance.py",
        "rtol = eps ** (2 / 3) if rtol is None else rtol", "rtol = eps ** (2 / 3)", ("tests/solvers/test_error.py", "-k", "rtol_is_relative"),
    ),
    Mutation(
        "unknowns share one scale", "solvers/judging/judge.py",
        "allowed = target.rtol * x.abs() + target.atol", "allowed = target.rtol * x.abs().amax(dim=-1, keepdim=True).expand_as(x)",
        ("tests/zoo/test_issue_inputs.py", "-k", "large_unknown"),
    ),
    # Proximal terms.
    Mutation(
        "solutions on a bound do not move with it", "prox/box.py",
        "return torch.where(below, lower, torch.where(above, upper, y))", "return torch.where(below | above, x, y)",
        ("tests/prox/test_manifolds.py", "-k", "derivative_of_a_solution and Box"),
    ),
    Mutation(
        "traces of rounding in a transport plan count as mass", "prox/transport.py",
        "_NO_MASS = 8.0", "_NO_MASS = 0.0", ("tests/prox/test_manifolds.py", "-k", "rounding_moved"),
    ),
    Mutation(
        "the curvature of a group's norm is left out", "prox/group.py",
        "strength * _norms(y, labels, strength.numel()), 0.0)", "strength * _norms(detached(y), labels, strength.numel()), 0.0)",
        ("tests/prox/test_manifolds.py", "-k", "derivative_of_a_solution and GroupL2"),
    ),
    Mutation(
        "spectral functions have first derivatives only", "prox/_spectral.py",
        "ORDER = 5", "ORDER = 1", ("tests/prox/test_proximal_points.py", "-k", "second_and_third"),
    ),
    Mutation(
        "a segment's level does not know its neighbours", "prox/_taut_string.py",
        "v + threshold * ends", "v + 0 * threshold * ends", ("tests/prox/test_proximal_points.py", "-k", "taut_string"),
    ),
    Mutation(
        "a dual variable on its bound has a margin", "prox/l1.py",
        "torch.where(x == 0, at_zero,", "torch.where(x == 0, at_zero + 1,", ("tests/prox/test_manifolds.py", "-k", "vanishes and L1"),
    ),
    Mutation(
        "potentials of least norm for plans in several parts", "prox/transport.py",
        "(dual,) = batched(least_cycle_mean, move - potentials, support)",
        "dual = torch.where(support > 0, float('inf'), move - potentials)",
        ("tests/prox/test_manifolds.py", "-k", "several_parts"),
    ),
    Mutation(
        "large entries leave rounding in a projection", "prox/_support.py",
        "for _ in range(2):", "for _ in range(1):", ("tests/prox/test_proximal_points.py", "-k", "far_away"),
    ),
    Mutation(
        "a large matrix is projected on the transport plans at once", "prox/_transport.py", "_MOST_STAGES = 20", "_MOST_STAGES = 0",
        ("tests/prox/test_proximal_points.py", "-k", "solves_the_linear_program"),
    ),
    Mutation(
        "a smoothed quadratic program steps up to the boundary", "solvers/programs/mehrotra.py",
        "torch.where(target > 0, 0.9, 1 - mean.clamp(1e-3, 1e-2))", "1 - mean.clamp(1e-3, 1e-2)",
        ("tests/quadratic_programs/test_derivatives.py", "-k", "many_rows"),
    ),
    Mutation(
        "weakly active constraints pass for inactive", "quadratic_programs/_dense.py",
        "weak &= ~program.fixed_rows", "weak &= False", ("tests/quadratic_programs/test_failures.py", "-k", "weakly_active"),
    ),
    Mutation(
        "a slack at zero is compared with its own rounding", "quadratic_programs/_program.py",
        "BESIDE * torch.maximum(size.amax(-1, keepdim=True), self.unit)", "0 * self.unit",
        ("tests/quadratic_programs/test_failures.py", "-k", "constraint_at_zero"),
    ),
    Mutation(
        "Mehrotra's iterates go round in a circle", "solvers/programs/mehrotra.py", "_CIRCLING = 3", "_CIRCLING = 10**6",
        ("tests/quadratic_programs/test_solutions.py", "-k", "degenerate_integer"),
    ),
    Mutation(
        "an active set never loses a constraint", "quadratic_programs/_dense.py",
        "(weight >= -_EXACT * size) | fixed", "weight == weight",
        ("tests/quadratic_programs/test_solutions.py", "-k", "solved_to_rounding"),
    ),
    Mutation(
        "an infeasible program is accepted for its large multipliers", "quadratic_programs/_dense.py",
        "relative = torch.maximum(slope / dual, rest.amax(-1) / primal)",
        "relative = torch.maximum(slope, rest.amax(-1)) / torch.maximum(dual, primal)",
        ("tests/quadratic_programs/test_failures.py", "-k", "farkas"),
    ),
    Mutation(
        "the derivative of an infeasible program is finite", "quadratic_programs/_call.py",
        "if bool(lost.any()) else (None, None)", "if False else (None, None)",
        ("tests/quadratic_programs/test_failures.py", "-k", "no_derivative_comes"),
    ),
    Mutation(
        "second derivatives forget a half of the slope by G", "quadratic_programs/_rule.py",
        "structure.G.outer(dlam, wx) + structure.G.outer(wlam, dx)", "structure.G.outer(wlam, dx)",
        ("tests/quadratic_programs/test_derivatives.py", "-k", "gradgradcheck"),
    ),
    Mutation(
        "a central path of matrices has the slope of the absolute value", "cones/_psd.py",
        "abs_change(matrix, values, vectors, 4 * smoothing)", "abs_change(matrix, values, vectors)",
        ("tests/cones/test_derivatives.py", "-k", "gradcheck and semidefinite"),
    ),
    Mutation(
        "a kink of a cone is not looked for", "cones/_product.py",
        "near = ((edges >= low) & (edges <= high)).any(-1)", "near = (edges > edges).any(-1)",
        ("tests/cones/test_failures.py", "-k", "kink_is_named"),
    ),
    Mutation(
        "a proof that a cone program has no solution has any length", "cones/_solve.py",
        "(0 * x, y / -value) if infeasible", "(0 * x, y) if infeasible",
        ("tests/cones/test_failures.py", "-k", "have_a_ray"),
    ),
    Mutation(
        "cone programs are not polished", "cones/_solve.py", "_STEPS = 25 ", "_STEPS = 0 ",
        ("tests/cones/test_solutions.py", "-k", "solved_to_rounding"),
    ),
    Mutation(
        "the vector of a matrix has √2 in single precision", "cones/_psd.py",
        "np.where(lines == columns, 1.0, 2**0.5)", "np.where(lines == columns, 1.0, float(np.float32(2**0.5)))",
        ("tests/cones/test_solutions.py", "-k", "matrix_and_its_vector or solved_to_rounding"),
    ),
    Mutation(
        "a power cone steps into noise beside its boundary", "cones/_scalar_root.py",
        "torch.where(step.abs() < 1, step, 0.0)", "step", ("tests/cones/test_projections.py", "-k", "moreau and Power"),
    ),
    Mutation(
        "the exponential cone has derivatives of first order only", "cones/_scalar_root.py", "_NEWTON = 3 ", "_NEWTON = 1 ",
        ("tests/cones/test_projections.py", "-k", "where_there_is_no_kink and Exponential"),
    ),
    Mutation(
        "second derivatives of a cone program forget how a sparse matrix was made", "cones/cone_program.py",
        "given=arguments.sparse", "given=()", ("tests/cones/test_derivatives.py", "-k", "sparse_derivatives"),
    ),
    Mutation(
        "a batch of cone programs shares the first matrix", "cones/_arguments.py",
        "size == whole != 1]", "size == whole != 1][:0]",
        ("tests/cones/test_solutions.py", "-k", "batch"),
    ),
    Mutation(
        "a prox of many points shrinks negative entries twice", "prox/_entries.py", "_between(v, -threshold, threshold)",
        "_between(v, -2 * threshold, threshold)", ("tests/prox/test_entries.py",),
    ),
    Mutation(
        "an unknown without a term is fixed at zero beside others", "prox/_entries.py", "(x != 0) | (self.l1 == 0)", "(x != 0)",
        ("tests/prox/test_entries.py", "-k", "joined or numbers_for"),
    ),
    Mutation(
        "a class derived from a term counts as that term", "prox/_flat.py", "type(term) not in _OF_ENTRIES", "not isinstance(term, _OF_ENTRIES)",
        ("tests/prox/test_entries.py", "-k", "of_the_user"),
    ),
    Mutation(
        "the columns for unit vectors come in another order", "_torch/thin_products.py", "left.index_select(1, self._places)",
        "left.index_select(1, self._places.flip(0))", ("tests/prox/test_working_set.py", "-k", "rows_of_a_hessian"),
    ),
    Mutation(
        "a quadratic is evaluated in every round", "solvers/composite/working_set.py", "(quadratic or len(state.rows) < _TRIALS)", "len(state.rows) < 0",
        ("tests/prox/test_working_set.py", "-k", "three_times"),
    ),
    Mutation(
        "a one-sided derivative is handed out", "layers/call.py",
        "status = torch.where(these, int(Status.DEGENERATE), outcome.status)", "status = outcome.status",
        ("tests/prox/test_layer.py", "-k", "degenerate"),
    ),
    Mutation(
        "rows of a Jacobian without rows", "equations/system.py", "if not n:  #", "if n < 0:  #",
        ("tests/test_layers.py", "-k", "no_unknowns"),
    ),
    Mutation(
        "a player without unknowns has eigenvalues", "equations/equilibrium.py", "if not size:", "if size < 0:",
        ("tests/test_equilibrium.py", "-k", "without_unknowns"),
    ),
    Mutation(
        "autocast is not named", "layers/call.py", "if system.autocast is not None:", "if False:",
        ("tests/test_layers.py", "-k", "autocast_is_named"),
    ),
    Mutation(
        "nothing unrolled is a zero derivative", "layers/layer.py", "if not taken.most and", "if False and",
        ("tests/test_differentiation.py", "-k", "start_at_the_solution"),
    ),
    Mutation(
        "Newton is unrolled from the start", "layers/differentiation.py", "return answer, Taken(max(taken.most, _FEWEST_NEWTON_STEPS))", "return init, Taken(2)",
        ("tests/test_differentiation.py", "-k", "without_a_solver"),
    ),
    Mutation(
        "least squares names no minimum norm", "layers/least_squares.py", "self.backward_messages = {Status.SINGULAR: _NOT_UNIQUE}", "pass",
        ("tests/test_least_squares.py", "-k", "names_a_door"),
    ),
    Mutation(
        "solves inside a tracer", "_torch/transforms.py", "        _refuse_tracing()\n        if", "        if",
        ("tests/transforms/test_compiler.py", "-k", "tracers_are_refused"),
    ),
    Mutation(
        "first proximal step divides by a slope of zero", "solvers/proximal_gradient.py",
        ".clamp_min(torch.finfo(norm.dtype).tiny ** 0.5)", "",
        ("tests/prox/test_layer.py", "-k", "without_a_slope"),
    ),
    Mutation(
        "curvature at a vertex from rounding", "solvers/proximal_gradient.py",
        "<= _HELD * _TRIAL * size", "< 0 * size", ("tests/prox/test_layer.py", "-k", "at_a_vertex"),
    ),
    Mutation(
        "a distance to a proximal point forgets the change of the slope", "solvers/composite/manifold_newton.py",
        "return new, (at.x - new.x) / at.step.unsqueeze(-1) - at.slope + new.slope", "return new, new.slope - at.slope",
        ("tests/prox/test_layer.py", "-k", "proven"),
    ),
    Mutation(
        "a degenerate saddle is a minimum", "solvers/judging/degenerate.py",
        "found = found | (fell & (slope < -noise) & (slope < -here))", "pass",
        ("tests/zoo/test_default_faults.py", "-k", "degenerate_saddle_is_named"),
    ),
    Mutation(
        "a derivative is not compared with the call", "layers/call.py",
        "changed = (residual - before).norm(dim=-1)", "changed = torch.zeros_like((residual - before).norm(dim=-1))",
        ("tests/zoo/test_default_faults.py", "-k", "function_that_changed"),
    ),
    Mutation(
        "a failed factorisation at a trial point ends the solve", "equations/domain.py",
        "return isinstance(error, LinAlgError) or", "return",
        ("tests/zoo/test_default_faults.py", "-k", "cholesky_fails"),
    ),
    Mutation(
        "a bound above δ is no matter", "linear/_second_solves.py",
        "return bound > error * (1 + 16 * torch.finfo(bound.dtype).eps)", "return bound > torch.inf",
        ("tests/linear/test_base.py", "-k", "bound_contradicts"),
    ),
    Mutation(
        "a plain run that drifts ever slower is no drift", "solvers/anderson.py",
        "_EARLY_STEPS, _LONGER, _SHARE_LEFT = 256, 4, 0.22", "_EARLY_STEPS, _LONGER, _SHARE_LEFT = 256, 4, 0.999",
        ("tests/zoo/test_default_faults.py", "-k", "named_early or named_from_elsewhere"),
    ),
    Mutation(
        "an accelerated run that drifts in rounding goes on", "solvers/anderson.py",
        "drifts = (norm > _DRIFT * rounding) | striding | self.drifts", "drifts = (norm > _DRIFT * rounding) | striding",
        ("tests/zoo/test_default_faults.py", "-k", "named_early or named_from_elsewhere"),
    ),
    Mutation(
        "a root at infinity is stagnation", "solvers/judging/weighing.py",
        "gone = gone & (rounded | little)", "gone = gone & ~gone",
        ("tests/zoo/test_default_faults.py", "-k", "root_at_infinity"),
    ),
    Mutation(
        "squares of residuals overflow in Newton's search", "solvers/parts/newton_search.py",
        "            residual = problem.residual(x)\n            reached = length(residual)",
        "            residual = problem.residual(x)\n            reached = residual.norm(dim=-1)",
        ("tests/zoo/test_default_faults.py", "-k", "squared_residual_overflows"),
    ),
    Mutation(
        "no search begins beside a saddle", "solvers/defaults.py",
        "*_POLISH, *3 * (Successor(_NEWTON, onward=True),))", "*_POLISH)",
        ("tests/zoo/test_default_faults.py", "-k", "atoms_in_a_row or energy_is_lowest"),
    ),
    Mutation(
        "a search goes on from the last point, not the lowest", "solvers/judging/judge.py",
        "begun, failed = lowest.onward(", "_, failed = lowest.onward(",
        ("tests/zoo/test_default_faults.py", "-k", "energy_is_lowest"),
    ),
    Mutation(
        "a saddle is left in the unknowns' units", "solvers/judging/successors.py",
        "direction = unit * vectors[..., 0]", "direction = vectors[..., 0]",
        ("tests/zoo/test_default_faults.py", "-k", "energy_is_lowest or units_of_the_curvature"),
    ),
    Mutation(
        "sufficient decrease is enough for Newton's steps", "solvers/parts/newton_search.py",
        "if not bool(bent.any()):", "if True:", ("tests/zoo/test_default_faults.py", "-k", "zigzag"),
    ),
    Mutation(
        "negative curvature is not followed in rounding", "solvers/parts/newton_search.py",
        "steady & (ratio < 1) | shorter, shorter | still_down)", "steady & (ratio < 1) | shorter, shorter)",
        ("tests/zoo/test_default_faults.py", "-k", "far_pair"),
    ),
    Mutation(
        "a batched strength is never asked for its range", "layers/proximal.py",
        "if not self.levels or not bool(met.any()):", "if True:",
        ("tests/zoo/test_default_faults.py", "-k", "out_of_range"),
    ),
    Mutation(
        "what a constraint captures is the objective's", "equations/structured.py",
        "return self.besides", "return self.noun",
        ("tests/zoo/test_default_faults.py", "-k", "captures_a_tensor"),
    ),
    Mutation(
        "a method that numpy lacks is a raw error", "equations/function_errors.py",
        "if arrays and isinstance(error, (TypeError, AttributeError)):", "if False:",
        ("tests/zoo/test_default_faults.py", "-k", "array_of_numpy"),
    ),
    Mutation(
        "a second derivative that is infinite has general words", "layers/messages.py",
        "    what = \"a second derivative", "    return {}\n    what = \"a second derivative",
        ("tests/zoo/test_default_faults.py", "-k", "infinite_is_named"),
    ),
    Mutation(
        "steps are never lengthened", "solvers/anderson.py",
        "stride = torch.where(still, 2 * self.stride, one)", "stride = one",
        ("tests/zoo/test_default_faults.py", "-k", "named_early"),
    ),
    Mutation(
        "an overflow is left by quarters", "solvers/parts/newton_search.py",
        "shorter = torch.where(beyond, torch.minimum(shorter, within), shorter)", "pass",
        ("tests/zoo/test_default_faults.py", "-k", "exponential_from_where"),
    ),
    Mutation(
        "large units hide small ones", "solvers/fixed_point.py",
        "ended = ended & (absorbed | (size <= floor).all(dim=-1))", "pass",
        ("tests/zoo/test_default_faults.py", "-k", "large_units"),
    ),
    Mutation(
        "no second search along what rounding leaves", "solvers/newton.py",
        "return search_again(problem, operator, state, direction, threshold, active, found, verdict)", "pass",
        ("tests/zoo/test_default_faults.py", "-k", "direction_of_others"),
    ),
    Mutation(
        "the default's threshold is shown as if it were asked for", "reports.py",
        'word = "the default asks" if status is Status.BUDGET_SPENT else "asked"', 'word = "asked"',
        ("tests/test_failures.py", "-k", "without_a_tolerance"),
    ),
    Mutation(
        "inequalities without an interior are given up", "solvers/constrained/solve.py", "    if resume is not None:\n        answer, point = _without", "    if False:\n        answer, point = _without",
        ("tests/constraints/test_degenerate.py", "-k", "no_interior"),
    ),
    Mutation(
        "unknowns leave their bounds by rounding", "solvers/constrained/active_set.py", "torch.where(held, 0.0, step[:, :n])", "step[:, :n]",
        ("tests/constraints/test_degenerate.py", "-k", "stay_exactly"),
    ),
    Mutation(
        "equations that repeat each other are advised to be smoothed", "solvers/constrained/regularity.py",
        "repeated = _dependence(jh, jh, torch.ones_like(repeated))[1]", "pass",
        ("tests/constraints/test_degenerate.py", "-k", "repeat_each_other"),
    ),
    Mutation(
        "an ignored column is a feature all the same", "cli/table.py", "name != target and name not in ignore", "name != target",
        ("tests/hyperopt/test_data.py", "-k", "ignored_columns"),
    ),
    Mutation(
        "a misspelled column is ignored in silence", "cli/table.py", "if name not in header:\n            raise", "if False:\n            raise",
        ("tests/cleaning/test_command.py", "-k", "one_sentence"),
    ),
    Mutation(
        "the rounding of x - T(x) is not counted in the error left", "solvers/parts/newton_error.py",
        "noise = noise + eps * x.abs().unsqueeze(-1)", "pass",
        ("tests/zoo/test_default_faults.py", "-k", "rounding_absorbs"),
    ),
    Mutation(
        "a network given as the start of a problem is not made a pytree", "problems/problem.py",
        "return FunctionalModule.of(init, self.where) if", "return init if",
        ("tests/test_networks.py", "-k", "problem_takes"),
    ),
    Mutation(
        "a trusted file is encoded by its own words and medians", "cli/encoding.py",
        "if self.encoding is None:", "if True:",
        ("tests/cleaning/test_command.py", "-k", "trusted_file_is_encoded"),
    ),
    Mutation(
        "learnable: a minibatch gets the weights of the first examples", "learnable/example_weights.py",
        "index_select(0, rows)", "narrow(0, 0, len(rows))", (FORMULAS, "-k", "formulas and example_weights"),
    ),
    Mutation(
        "learnable: auxiliary losses are weighted by logarithms", "learnable/loss_weights.py",
        "return self.logarithms.exp()", "return self.logarithms", (FORMULAS, "-k", "formulas and loss_weights"),
    ),
    Mutation(
        "learnable: the penalty has no half", "learnable/_base.py", "return 0.5 * self.weight_decay",
        "return self.weight_decay", (FORMULAS, "-k", "formulas"),
    ),
    Mutation(
        "learnable: a layer's tensors have decays of their own", "learnable/weight_decay.py",
        'layers = [name.rpartition(".")[0] for name in names]', "layers = names",
        ("tests/learnable/test_messages.py", "-k", "share_a_decay"),
    ),
    Mutation(
        "learnable: augmentations go to one side alone", "learnable/augmentation.py",
        "(2 * torch.rand_like(images[:, 0, 0, :1].expand(-1, count)) - 1)",
        "torch.rand_like(images[:, 0, 0, :1].expand(-1, count))", (FORMULAS, "-k", "both_sides"),
    ),
    Mutation(
        "learnable: an image that is not square is sheared where it is to be turned", "learnable/augmentation.py",
        "aspect = images.shape[2] / images.shape[3]", "aspect = 1.0", (FORMULAS, "-k", "quarter_turn"),
    ),
    Mutation(
        "learnable: distilled data change the examples that they begin from", "learnable/distilled_data.py",
        "nn.Parameter(inputs.detach().clone())", "nn.Parameter(inputs.detach())", (FORMULAS, "-k", "leaves_the_examples"),
    ),
    Mutation(
        "learnable: heads are penalised by the sum over tasks, and their loss is a mean", "learnable/shared_body.py",
        "super().penalty(model) / len(first)", "super().penalty(model)",
        ("tests/learnable/test_messages.py", "-k", "minimise_its_loss"),
    ),
    Mutation(
        "learnable: operations compete between places", "learnable/architecture.py", "self.logits.softmax(1)",
        "self.logits.softmax(0)", (FORMULAS, "-k", "formulas and architecture"),
    ),
    Mutation(
        "learnable: one step more is unrolled than asked", "learnable/learning_rates.py", "max_steps=self.steps)",
        "max_steps=self.steps + 1)", ("tests/learnable/test_gradients.py", "-k", "as_a_loop and linear"),
    ),
    Mutation(
        "stochastic: MA-SOBA moves along the average before its update", "stochastic/masoba.py",
        "return replace(found, outer=clone(self._mean))", "mean, self._last = getattr(self, '_last', self._mean), self._mean; "
        "return replace(found, outer=clone(mean))", ("tests/stochastic/test_pseudo_code.py", "-k", "pseudo_code and MASOBA"),
    ),
    Mutation(
        "stochastic: a resumed run draws other dropout", "stochastic/_state.py",
        'method._random_numbers().restore(state["torch_generators"])', "pass",
        ("tests/stochastic/test_engine.py", "-k", "dropout and SOBA"),
    ),
    Mutation(
        "stochastic: a loss that is NaN with finite gradients is taken for a loss", "stochastic/_method.py",
        "[*norms.values(), *losses], losses, *given.values())", "list(norms.values()), *given.values())",
        ("tests/learnable/test_messages.py", "-k", "data_that_do_not_fit"),
    ),
    Mutation(
        "stochastic: systems of float16 are solved in float16", "stochastic/implicit.py",
        "dtype = torch.float32\n    for tensor in tensors:", "dtype = tensors[0].dtype\n    for tensor in tensors:",
        ("tests/learnable/test_messages.py", "-k", "few_digits"),
    ),
    Mutation(
        "learnable: negative rows are weights from the end", "learnable/example_weights.py",
        "self.logits.index_select(0, rows)", "self.logits[rows]", ("tests/learnable/test_messages.py", "-k", "data_that_do_not_fit"),
    ),
    Mutation(
        "a layer saves tensors of inference mode", "pytree.py", "[usable(tensor) for tensor in tensors] if torch.is_grad_enabled() else list(tensors)", "list(tensors)",
        ("tests/test_problem.py", "-k", "inference"),
    ),
    Mutation(
        "a search goes on where values contradict derivatives", "solvers/parts/tiny_steps.py",
        "stuck | self._contradicts(last, step, gradient)", "stuck",
        ("tests/test_levels.py", "-k", "inexact"),
    ),
    Mutation(
        "iMAML takes a loss of integers", "meta/task_losses.py", "or not value.is_floating_point()", "",
        ("tests/meta/test_imaml.py", "-k", "loss_that_is_none"),
    ),
    Mutation(
        "a message counts failures of other kinds", "reports.py", "int((codes == status).sum())} of", "int(failed.sum())} of",
        ("tests/quadratic_programs/test_failures.py", "-k", "counts_the_problems"),
    ),
)  # fmt: skip


# No fault at all: its test has to pass, or the faults prove nothing.
UNHARMED = Mutation("nothing", "solvers/anderson.py", "", "", (ANDERSON, "-k", "beneath"))


def duplicate(source: Path, copy: Path) -> None:
    """Copy what the tests need. Compiled files stay valid, because the copies keep the times of their sources."""
    for name in ("bilevel", "tests", "docs"):
        shutil.copytree(source / name, copy / name, ignore=shutil.ignore_patterns("_build", "gallery"))
    shutil.copy2(source / "pyproject.toml", copy)


def run_tests(folder: str, tests: tuple[str, ...]) -> None:
    """Run pytest in ``folder``, print to a file in it, and end this process with pytest's exit code."""
    with open(os.path.join(folder, "output"), "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "bilevel")]:
        del sys.modules[name]
    os.chdir(folder)
    os.environ |= {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path[:] = [folder, *(entry for entry in sys.path if entry and Path(entry).resolve() != ROOT)]
    quiet = ("--disable-warnings", "--no-header", "--tb=line", "-p", "no:cacheprovider")
    sys.exit(int(pytest.main(["-q", "-x", "--long", *quiet, *tests])))


def attempt(mutation: Mutation, source: Path) -> tuple[bool, str, float]:
    """Return whether the tests caught a fault, the last line that they printed, and how long they took."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        duplicate(source, Path(folder))
        file = Path(folder, "bilevel", mutation.file)
        file.write_text(file.read_text().replace(mutation.old, mutation.new, 1))
        process = FORKS.Process(target=run_tests, args=(folder, mutation.tests))
        process.start()
        process.join(600)
        if process.exitcode is None:
            process.kill()
            process.join()
        output = Path(folder, "output")
        lines = output.read_text().strip().splitlines() if output.exists() else []
        last = lines[-1] if lines else ""
    # 1: tests failed. Anything else, such as 5 for no tests found, is no proof of anything.
    code = process.exitcode
    return (
        code == 1,
        last if code in (0, 1) else f"pytest ended with {code}: {last}",
        (time.monotonic() - began),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Try deliberate faults against the tests.")
    parser.add_argument("--only", default="", metavar="WORD", help="those whose name has this in it")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if options.only in mutation.name]
    survivors = []
    # One copy for all, so that nothing that is edited meanwhile gets in.
    with tempfile.TemporaryDirectory() as source, concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        duplicate(ROOT, Path(source))
        compileall.compile_dir(source, quiet=1)
        caught, last, _ = attempt(UNHARMED, Path(source))
        if caught or "passed" not in last:
            raise SystemExit(f"expected the tests of an unharmed copy to pass, got: {last}; mend what fails first")
        attempts = pool.map(lambda mutation: attempt(mutation, Path(source)), chosen)
        for mutation, (killed, last, seconds) in zip(chosen, attempts, strict=True):
            verdict = "killed  " if killed else "SURVIVED"
            print(f"{verdict}  {mutation.file:28}  {mutation.name}  [{last}; {seconds:.0f} s]", flush=True)
            survivors += [] if killed else [mutation]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults were caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
