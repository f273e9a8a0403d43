"""What ``bilevel imaml`` trains, and how: the settings, and what they make of a data set."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import bilevel
from bilevel.meta.distortion import Distortion
from bilevel.meta.equal_outputs import equalize, last_layer
from bilevel.meta.glyphs import draw_glyphs
from bilevel.meta.images import LabelledImages, split_classes
from bilevel.meta.imaml import IMAML
from bilevel.meta.measured_descent import MeasuredDescent
from bilevel.meta.models import conv_network
from bilevel.meta.omniglot import download_omniglot, load_omniglot
from bilevel.meta.safeguarded import SafeguardedCG
from bilevel.meta.sampler import FewShotSampler
from bilevel.meta.seeds import check_seed

__all__ = ["Recipe", "Setup", "set_up", "unseen"]

GLYPHS, OMNIGLOT = "glyphs", "omniglot"
_MOST = 10**6
_BELOW_ONE = ("inner_momentum", "average")
_FROM_ZERO = (
    "damping",
    "decay_steps",
    "class_distortion",
    "image_distortion",
    "training_ways",
    "alphabets",
    *_BELOW_ONE,
)
_GLYPH_CLASSES, _GLYPH_ALPHABETS_HELD_OUT = 400, 5


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. The defaults reached 98.2 % on unseen Omniglot alphabets, 5-way 1-shot, in 1,550 CPU seconds.

    Parameters
    ----------
    ways, shots, queries
        Classes of a task, and support and query images of each class in training.
    inner_steps, inner_lr, inner_momentum
        Of gradient descent from θ; for the Hessian-free solver the steps of Newton's method. Neither the line search nor the
        released code has a momentum.
    adaptive
        Take ``inner_lr`` for the longest step, and shorten it for each task where the curvature is too large for it. Training
        raises the curvature, until fixed steps end nowhere near a minimum or diverge.
    line_search
        Halve an inner step of gradient descent, for each task by itself, until the inner objective falls. It takes the place of
        ``adaptive``, and evaluates the objective more often.
    hessian_free
        Adapt by Newton's method with conjugate gradients and a line search, the paper's second variant.
    cg_steps, damping
        Of the linear solve: steps, and γ added to ∇²L̂ + λI, which keeps it positive definite where adaptation stops short
        of a minimum. The paper has none.
    safeguard
        Where ``damping`` is 0, damp a task whose ∇²L̂ + λI has negative curvature, and no other. Otherwise its direction is
        that of conjugate gradients cut off there.
    lam, learn_lam
        λ, and whether it is learned.
    mode
        ``"paper"`` or ``"released"``, see :class:`bilevel.IMAML`.
    tasks_per_step, outer_lr, clip
        Tasks of a meta-step, the step of Adam, and the norm that the meta-gradient is clipped to.
    decay_steps
        Meta-steps over which the step of Adam falls to 0 along half a cosine, where training ends; 0: it stays, and training
        goes on.
    average
        Decay of the running mean of the learned parameters, which is what is measured and saved as ``averaged``; 0: none.
    rotations, mirrors
        Take each class turned by quarters, and each mirrored, as classes of their own, in training.
    alphabets
        Groups of classes that the classes of a training task come from, all turned and mirrored alike; 0: from all, each turned by itself. See
        ``groups`` of :class:`bilevel.meta.FewShotSampler`.
    class_distortion, image_distortion
        Strengths of the random affine maps of training images, for each class of a task and for each image. See
        :class:`bilevel.meta.Distortion`.
    equal_outputs
        Keep the outputs of the last layer equal in θ, so that adaptation does not depend on how the classes of a task are numbered. See
        :mod:`bilevel.meta.equal_outputs`.
    training_ways
        Classes of a training task, or all if the data have fewer; 0: ``ways``. Another number than ``ways`` needs ``equal_outputs``.
    hold_out
        Groups of classes (alphabets) that training never sees, for validation.
    validation_tasks, validate_every
        How many tasks validate, and after how many meta-steps each.
    seed
        Of the initialisation, the draws and the split.
    amp
        Evaluate the model in bfloat16 where torch's autocast does; gradients' linear solves stay in float32.

    Raises
    ------
    bilevel.ArgumentError
        If a number is out of its range.
    """

    ways: int = 5
    shots: int = 1
    queries: int = 5
    inner_steps: int = 10
    inner_lr: float = 0.02
    inner_momentum: float = 0.5
    adaptive: bool = True
    line_search: bool = False
    hessian_free: bool = False
    cg_steps: int = 4
    damping: float = 0.0
    safeguard: bool = False
    lam: float = 0.5
    learn_lam: bool = False
    mode: Literal["paper", "released"] = "paper"
    tasks_per_step: int = 2
    outer_lr: float = 2e-3
    clip: float = 1.0
    decay_steps: int = 6000
    average: float = 0.998
    rotations: bool = True
    mirrors: bool = True
    alphabets: int = 5
    class_distortion: float = 1.0
    image_distortion: float = 0.7
    equal_outputs: bool = True
    training_ways: int = 20
    hold_out: int = 5
    validation_tasks: int = 200
    validate_every: int = 250
    seed: int = 0
    amp: bool = False

    def __post_init__(self) -> None:
        check_seed("", self.seed)
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(item.default, bool) or item.name in ("seed", "mode"):
                continue
            least = 2 if item.name == "ways" else 0 if item.name in _FROM_ZERO else 1
            whole = isinstance(item.default, int)
            fits = (
                isinstance(value, int) and value <= _MOST
                if whole
                else isinstance(value, (int, float)) and math.isfinite(value)
            )
            if isinstance(value, bool) or not fits or (value < least if whole or least == 0 else value <= 0):
                bound = f"from {least} to {_MOST}" if whole else ">= 0" if least == 0 else "> 0"
                raise bilevel.ArgumentError(
                    f"expected {item.name.replace('_', '-')} to be a {'whole ' if whole else ''}number {bound}, got {value!r}; "
                    f"the default is {item.default}"
                )
        if self.training_ways not in (0, self.ways) and not self.equal_outputs:
            raise bilevel.ArgumentError(
                f"expected training-ways to be 0 or {self.ways} without equal-outputs, got {self.training_ways}; pass --training-ways 0, "
                "or --equal-outputs, for outputs that differ serve one number of classes"
            )
        if self.training_ways == 1:
            raise bilevel.ArgumentError(
                f"expected training-ways to be 0 or a whole number from 2 to {_MOST}, got 1; 0 takes as many as ways"
            )
        for name in _BELOW_ONE:
            if getattr(self, name) >= 1:
                raise bilevel.ArgumentError(
                    f"expected {name.replace('_', '-')} to be a number >= 0 and < 1, got {getattr(self, name)!r}; 0 takes none"
                )

    def outer_step(self, step: int) -> float:
        """Return the step size of Adam after ``step`` meta-steps."""
        if not self.decay_steps:
            return self.outer_lr
        return self.outer_lr * 0.5 * (1 + math.cos(math.pi * min(step / self.decay_steps, 1.0)))

    def learner(self, model: nn.Module, loss: Callable[[Any, Any], torch.Tensor]) -> IMAML:
        """Return the :class:`bilevel.IMAML` that this recipe describes."""
        linear: Any = bilevel.CG(max_steps=self.cg_steps)
        if self.damping and self.mode == "paper":
            linear = bilevel.Damped(linear, damping=self.damping)
        elif self.safeguard and self.mode == "paper":
            linear = SafeguardedCG(max_steps=self.cg_steps)
        # Training goes on over a task whose linear solve fails; the report of each step counts them.
        return IMAML(
            model, loss, self.lam, self._solver(), linear, on_failure="ignore", mode=self.mode, learn_lam=self.learn_lam
        )

    def _solver(self) -> bilevel.InnerSolver:
        if self.hessian_free:
            return bilevel.Newton(max_steps=self.inner_steps, dense_limit=0, linear_steps=self.cg_steps)
        if self.mode == "released":
            return bilevel.GradientDescent(self.inner_lr, self.inner_steps)  # that code has nothing else
        if self.line_search:
            return bilevel.GradientDescent(self.inner_lr, self.inner_steps, line_search=True)
        descent: Any = MeasuredDescent if self.adaptive else bilevel.GradientDescent
        return descent(self.inner_lr, self.inner_steps, momentum=self.inner_momentum)


@dataclass(frozen=True, eq=False)
class Setup:
    """A model, its loss and its tasks.

    Parameters
    ----------
    name
        Of the data.
    model, loss
        For :class:`bilevel.IMAML`. The last layer of the model has an output for each class of a training task.
    training
        Draws training tasks.
    validation
        Makes a sampler of unseen tasks, the same tasks each time, of ``ways`` classes if this is given.
    """

    name: str
    model: nn.Sequential
    loss: Callable[[Any, Any], torch.Tensor]
    training: FewShotSampler
    validation: Callable[..., FewShotSampler]


def set_up(data: str, recipe: Recipe, device: torch.device) -> Setup:
    """Return what ``recipe`` trains on ``data``: glyphs, omniglot (downloaded), or a folder or zip file of characters.

    Raises
    ------
    bilevel.ArgumentError
        If the data cannot be used.
    """
    torch.manual_seed(recipe.seed)
    images = characters(data)
    groups = len(set(images.groups))
    by_group = groups > recipe.hold_out
    held = recipe.hold_out if by_group else max(recipe.ways, images.classes // 5)
    seen, fresh = split_classes(images, held, seed=recipe.seed, by_group=by_group)
    distortion = Distortion(of_class=recipe.class_distortion, of_image=recipe.image_distortion)
    ways = recipe.training_ways or recipe.ways
    if ways > recipe.ways:  # more than were asked for: as many as there are
        ways = max(recipe.ways, min(ways, seen.classes))
    training = FewShotSampler(
        seen, ways=ways, shots=recipe.shots, queries=recipe.queries, rotations=recipe.rotations,
        mirrors=recipe.mirrors, groups=recipe.alphabets or None, distortion=distortion, seed=recipe.seed, device=device,
    )  # fmt: skip
    model = conv_network(ways, size=int(images.images.shape[-1])).to(device)
    if recipe.equal_outputs:
        equalize(last_layer(model))
    return Setup(
        data,
        model,
        nn.functional.cross_entropy,
        training,
        lambda ways=recipe.ways: unseen(fresh, recipe, device, seed=recipe.seed + 1, ways=ways),
    )


def characters(data: str) -> LabelledImages:
    """Return the labelled images that ``data`` names."""
    if data == GLYPHS:
        return draw_glyphs(_GLYPH_CLASSES)
    return load_omniglot(download_omniglot() if data == OMNIGLOT else Path(data))


def unseen(
    images: LabelledImages, recipe: Recipe, device: torch.device, *, seed: int, ways: int | None = None
) -> FewShotSampler:
    """Return a sampler of test tasks: as many queries as there are images, up to 15, and no rotations."""
    fewest = int(torch.bincount(images.labels, minlength=images.classes).min())
    queries = max(1, min(15, fewest - recipe.shots))
    return FewShotSampler(
        images, ways=ways or recipe.ways, shots=recipe.shots, queries=queries, seed=seed, device=device
    )
