"""How strongly training images are rotated, shifted, scaled, sheared, brightened and made noisy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import bilevel
from bilevel.learnable._base import Learnable, Loss, number, require_pair

__all__ = ["Augmentation"]

_INITIAL = {
    "rotation": 0.1,
    "translation": 0.05,
    "scale": 0.05,
    "shear": 0.05,
    "brightness": 0.05,
    "contrast": 0.05,
    "noise": 0.05,
}


class Augmentation(Learnable):
    """Learn the strengths of random changes T of the training images: G = mean_i ℓ(f_φ(T_θ(x_i)), y_i) + ½ λ‖φ‖².

    Each image is changed by draws of its own: an affine map of the pixels by bilinear interpolation, black outside, then brightness,
    contrast and noise. A strength of zero changes nothing. Draws are those of ``torch.manual_seed``. Validation images are left as they are.

    ==============  ======================================================================
    rotation        the angle is uniform in ±θ, in radians
    translation     uniform in ±θ on each axis, in halves of the image's width and height
    scale           the factor is e^u on each axis, with u uniform in ±θ
    shear           uniform in ±θ
    brightness      a number uniform in ±θ is added to each pixel
    contrast        each pixel is multiplied by e^u, with u uniform in ±θ
    noise           normal numbers with standard deviation θ are added
    ==============  ======================================================================

    Parameters
    ----------
    initial
        The strengths at first by name; those left out are not used and not learned. None: all seven, small. A strength that is zero at
        first has no gradient, and stays zero.
    loss, weight_decay
        See :class:`Learnable`.
    dtype, device
        Of the parameters, each of shape ().

    Raises
    ------
    ArgumentError
        If a name is not one of the seven, a strength is not positive, or there is none.

    Notes
    -----
    torch differentiates its interpolation once. That suffices here, for the images do not depend on φ. Second derivatives by θ are not
    possible.

    References
    ----------
    Hataya, Zdenek, Yoshizoe, Nakayama, "Meta approach to data augmentation optimization", WACV 2022; Benton, Finzi, Izmailov, Wilson,
    "Learning invariances in neural networks", NeurIPS 2020 (strengths of uniform distributions).

    Examples
    --------
    >>> import torch
    >>> from bilevel.learnable import Augmentation
    >>> augmentation = Augmentation({"rotation": 0.5, "noise": 0.1})
    >>> augmentation(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 1, 8, 8])
    >>> {name: round(strength.item(), 2) for name, strength in augmentation.strengths.items()}
    {'rotation': 0.5, 'noise': 0.1}
    """

    def __init__(
        self,
        initial: Mapping[str, float] | None = None,
        *,
        loss: Loss | None = None,
        weight_decay: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(loss=loss, weight_decay=weight_decay)
        if initial is not None and not isinstance(initial, Mapping):
            raise bilevel.ArgumentError(
                f'Augmentation: expected initial to be a dict of strengths by name, got {initial!r}; pass for example {{"rotation": 0.1}}'
            )
        chosen = _INITIAL if initial is None else dict(initial)
        unknown = [name for name in chosen if name not in _INITIAL]
        if unknown or not chosen:
            raise bilevel.ArgumentError(
                f"Augmentation: expected initial to have some of the names {', '.join(_INITIAL)}, got {', '.join(map(repr, unknown)) or 'none'}; "
                'pass for example {"rotation": 0.1}'
            )
        for name, strength in chosen.items():
            number("Augmentation", name, strength)
        self.signed = nn.ParameterDict(
            [(name, nn.Parameter(torch.tensor(float(s), dtype=dtype, device=device))) for name, s in chosen.items()]
        )

    @property
    def strengths(self) -> dict[str, torch.Tensor]:
        """The strengths by name, each of shape (). Draws are symmetric, so that the signs of the parameters do not matter."""
        return {name: strength.abs() for name, strength in self.signed.items()}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return images (n, channels, height, width), each changed by its own draws."""
        if (
            not isinstance(images, torch.Tensor)
            or images.ndim != 4
            or not images.is_floating_point()
            or not len(images)
        ):
            tensor = isinstance(images, torch.Tensor)
            got = f"{images.dtype} of shape {tuple(images.shape)}" if tensor else type(images).__name__
            raise bilevel.ShapeError(
                f"Augmentation: expected floating-point images (n, channels, height, width), got {got}; reshape them, as "
                "images.reshape(-1, 1, 8, 8), convert integers with .float(), and skip an empty batch"
            )
        if self.signed.keys() & {"rotation", "translation", "scale", "shear"}:
            grid = nn.functional.affine_grid(self._maps(images), list(images.shape), align_corners=False)
            images = nn.functional.grid_sample(images, grid, align_corners=False)
        if "contrast" in self.signed:
            images = images * self._uniform("contrast", images, 1)[..., None, None].exp()
        if "brightness" in self.signed:
            images = images + self._uniform("brightness", images, 1)[..., None, None]
        if "noise" in self.signed:
            images = images + self.signed["noise"] * torch.randn_like(images)
        return images

    def outputs(self, model: nn.Module, data: Any) -> torch.Tensor:
        """Return what the model says of the changed images."""
        outputs: torch.Tensor = model(self(require_pair(self.where, data)[0]))
        return outputs

    def _uniform(self, name: str, images: torch.Tensor, count: int) -> torch.Tensor:
        """Return draws (n, count) in ±θ, or zeros for a strength that is not used."""
        if name not in self.signed:
            return images.new_zeros(len(images), count)
        draws: torch.Tensor = self.signed[name] * (2 * torch.rand_like(images[:, 0, 0, :1].expand(-1, count)) - 1)
        return draws

    def _maps(self, images: torch.Tensor) -> torch.Tensor:
        """Return the affine map (n, 2, 3) from places in the changed image to places in the given one.

        Both are in halves of width and height, in which a turn of an image that is not square is no rotation: ``aspect`` goes to pixels and back.
        """
        aspect = images.shape[2] / images.shape[3]
        angle = self._uniform("rotation", images, 1)[:, 0]
        across, down = self._uniform("scale", images, 2).exp().unbind(1)
        shear = self._uniform("shear", images, 1)[:, 0]
        shift = self._uniform("translation", images, 2)
        cos, sin = angle.cos(), angle.sin()
        rows = [across * cos, aspect * down * (shear * cos - sin), across * sin / aspect, down * (shear * sin + cos)]
        return torch.cat([torch.stack(rows, dim=1).reshape(-1, 2, 2), shift[:, :, None]], dim=2)
